/* Decompression to memory, and the walk through initramfs archives: sound ones pass, broken ones
 * are told. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"
#include "board/loader/initrd.h"
#include "board/loader/source.h"
#include "board/loader/unpack.h"
#include "kernel_image.h"
#include "log_capture.h"

static const struct source name = {.what = "initrd", .path = "made-up", .fd = -1};
static const enum unpack_format formats[] = {UNPACK_GZIP, UNPACK_XZ, UNPACK_LZMA, UNPACK_LZ4,
                                             UNPACK_ZSTD};

/* Compressible, but not to nothing; longer than one LZ4 block when asked for. */
static uint8_t *make_data(size_t size)
{
    uint8_t *data = malloc(size);
    assert_non_null(data);
    uint32_t x = 1;
    for (size_t i = 0; i < size; i++) {
        x = x * 1664525 + 1013904223;
        data[i] = i % 64 < 48 ? (uint8_t)(i / 64) : (uint8_t)(x >> 24);
    }
    return data;
}

static void round_trip(size_t size)
{
    uint8_t *data = make_data(size), *out = malloc(size + 1);
    for (size_t i = 0; i < ARRAY_SIZE(formats); i++) {
        struct image img = image_pack(formats[i], data, size);
        struct unpack_result r;
        assert_int_equal(unpack_detect(img.data, img.size), formats[i]);
        memset(out, 0x5a, size + 1);
        assert_int_equal(unpack(formats[i], img.data, img.size, out, size, &r), 0);
        assert_int_equal(r.produced, size);
        assert_int_equal(r.consumed, img.size);
        assert_memory_equal(out, data, size);
        assert_int_equal(out[size], 0x5a);
        /* Checking alone sees the same. */
        assert_int_equal(unpack(formats[i], img.data, img.size, NULL, size, &r), 0);
        assert_int_equal(r.produced, size);
        assert_int_equal(r.consumed, img.size);
        /* One byte too few of room, either way. */
        assert_int_equal(unpack(formats[i], img.data, img.size, out, size - 1, &r), -EFBIG);
        assert_non_null(r.error);
        assert_int_equal(unpack(formats[i], img.data, img.size, NULL, size - 1, &r), -EFBIG);
        free(img.data);
    }
    free(out);
    free(data);
}

static void test_round_trip(void **state)
{
    round_trip(1000);
    round_trip(MIB(8) + 12345);
}

/* Bytes behind a stream are not the stream's. (LZ4's frames end where no block length stands.) */
static void test_trailing_bytes(void **state)
{
    uint8_t *data = make_data(5000), out[5000];
    for (size_t i = 0; i < ARRAY_SIZE(formats); i++) {
        struct image img = image_pack(formats[i], data, 5000);
        struct unpack_result r;
        img.data = realloc(img.data, img.size + 100);
        memset(img.data + img.size, 0, 100);
        assert_int_equal(unpack(formats[i], img.data, img.size + 100, out, sizeof(out), &r), 0);
        assert_int_equal(r.consumed, img.size);
        assert_int_equal(unpack(formats[i], img.data, img.size + 100, NULL, sizeof(out), &r), 0);
        assert_int_equal(r.consumed, img.size);
        free(img.data);
    }
    free(data);
}

static void test_truncated_stream(void **state)
{
    uint8_t *data = make_data(1500), out[1500];
    for (size_t i = 0; i < ARRAY_SIZE(formats); i++) {
        struct image img = image_pack(formats[i], data, 1500);
        for (size_t len = 0; len < img.size; len++) {
            struct unpack_result r;
            uint8_t *cut = malloc(len); /* exact size: a sanitizer sees the first byte too far */
            memcpy(cut, img.data, len);
            int err = unpack(formats[i], cut, len, out, sizeof(out), &r);
            int check = unpack(formats[i], cut, len, NULL, sizeof(out), &r);
            /* A bare magic number is an empty LZ4 frame, and so it is with part of a length behind
             * it. */
            if (formats[i] == UNPACK_LZ4 && len >= 4 && len < 8) {
                assert_int_equal(r.produced, 0);
            } else {
                assert_int_equal(err, -EINVAL);
                assert_int_equal(check, -EINVAL);
                assert_non_null(r.error);
            }
            free(cut);
        }
        free(img.data);
    }
    free(data);
}

static void test_unsupported(void **state)
{
    const enum unpack_format no[] = {UNPACK_BZIP2, UNPACK_LZO};
    for (size_t i = 0; i < ARRAY_SIZE(no); i++) {
        struct image img = image_pack(no[i], NULL, 0);
        struct unpack_result r;
        uint8_t out[16];
        assert_int_equal(unpack_detect(img.data, img.size), no[i]);
        assert_int_equal(unpack(no[i], img.data, img.size, out, sizeof(out), &r), -ENOTSUP);
        free(img.data);
    }
    assert_int_equal(unpack_detect((const uint8_t *)"\x1f", 1), UNPACK_NONE);
    assert_int_equal(unpack_detect(NULL, 0), UNPACK_NONE);
}

/* ---- initramfs ---- */

static struct image archive;

static void reset(void)
{
    free(archive.data);
    archive = (struct image){0};
}

static void append(struct image img)
{
    archive.data = realloc(archive.data, archive.size + img.size + 1);
    assert_non_null(archive.data);
    memcpy(archive.data + archive.size, img.data, img.size);
    archive.size += img.size;
    free(img.data);
}

static void append_zeroes(size_t n)
{
    append((struct image){.data = calloc(1, n + 1), .size = n});
}

static struct image packed_cpio(enum unpack_format f, uint32_t file_size)
{
    struct image cpio = image_cpio("init", file_size), img = image_pack(f, cpio.data, cpio.size);
    free(cpio.data);
    return img;
}

static void passes(unsigned warnings)
{
    log_capture_begin();
    int err = initrd_check(&name, archive.data, archive.size, MIB(64));
    const char *log = log_capture_end();
    if (err)
        fail_msg("refused: %s", log);
    assert_int_equal(log_capture_lines(log), warnings);
}

static void refused(const char *text)
{
    log_capture_begin();
    int err = initrd_check(&name, archive.data, archive.size, MIB(64));
    const char *log = log_capture_end();
    assert_int_equal(err, -EINVAL);
    assert_int_equal(log_capture_lines(log), 1);
    if (!strstr(log, text) || !strstr(log, "initrd made-up"))
        fail_msg("expected \"%s\", got: %s", text, log);
}

static void test_archives(void **state)
{
    reset();
    append(image_cpio("init", 1000));
    passes(0);
    append_zeroes(512 - archive.size % 512);
    passes(0);
    append(image_cpio("another", 3));
    passes(0);
    for (size_t i = 0; i < ARRAY_SIZE(formats); i++) {
        reset();
        append(image_cpio("early/microcode", 100));
        append_zeroes(8);
        append(packed_cpio(formats[i], 100000));
        append_zeroes(64);
        passes(0);
        append(image_cpio("late", 10));
        passes(0);
    }
    append((struct image){.data = (uint8_t *)strdup("junk"), .size = 4});
    passes(1);
    /* What cannot be unpacked here is the guest's to judge. */
    reset();
    append(packed_cpio(UNPACK_BZIP2, 1));
    passes(0);
    reset();
}

static void test_bad_archives(void **state)
{
    reset();
    append_zeroes(4096);
    refused("contains only zeroes");
    reset();
    append((struct image){.data = (uint8_t *)strdup("not an archive"), .size = 14});
    refused("is not an initramfs");

    reset();
    append(image_cpio("init", 1000));
    size_t whole = archive.size;
    for (size_t len = 6; len < whole; len++) {
        uint8_t *cut = malloc(len);
        memcpy(cut, archive.data, len);
        log_capture_begin();
        int err = initrd_check(&name, cut, len, MIB(64));
        const char *log = log_capture_end();
        free(cut);
        /* Only the padding behind the trailer may be missing. */
        if (whole - len <= 3 && !err)
            break;
        assert_int_equal(err, -EINVAL);
        assert_int_equal(log_capture_lines(log), 1);
        assert_non_null(strstr(log, "truncated"));
    }
    archive.data[54] = 'x'; /* a digit of the file's size */
    refused("no cpio header at offset 0");
    memcpy(archive.data + 54, "FFFFFFFF", 8);
    refused("is truncated: a file in it has 4294967295 bytes");
    memcpy(archive.data + 54, "000003E8", 8);
    memcpy(archive.data + 94, "FFFFFFFF", 8);
    refused("is truncated");
    memcpy(archive.data + 94, "00000000", 8);
    refused("no cpio header");

    for (size_t i = 0; i < ARRAY_SIZE(formats); i++) {
        reset();
        append(image_cpio("early", 100));
        append(packed_cpio(formats[i], 100000));
        archive.size -= 20;
        refused("is truncated");
        reset();
        append(packed_cpio(formats[i], MIB(64)));
        refused("unpacks to more than the 64 MiB of guest memory");
    }
    reset();
    append(packed_cpio(UNPACK_GZIP, 100000));
    archive.data[archive.size - 6] ^= 1; /* its checksum */
    refused("is corrupt (gzip)");
    reset();
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),       cmocka_unit_test(test_trailing_bytes),
        cmocka_unit_test(test_truncated_stream), cmocka_unit_test(test_unsupported),
        cmocka_unit_test(test_archives),         cmocka_unit_test(test_bad_archives),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
