/*
 * Decompressors behind one function. See unpack.h.
 *
 * Each takes a struct stream and moves it on; when only checking, output goes round in one scratch
 * buffer, which is as long as the longest LZ4 block.
 */
#include "board/loader/unpack.h"

#include <errno.h>
#include <limits.h>
#include <lz4.h>
#include <lzma.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>
#include <zstd.h>
#include <zstd_errors.h>

#include "base/resident.h"
#include "base/util.h"

#define LZ4_LEGACY_MAGIC  0x184c2102u
#define LZ4_LEGACY_BLOCK  MIB(8)
#define LZMA_MEMORY_LIMIT MIB(256)

static const char truncated[] = "is truncated";
static const char corrupt[] = "is corrupt";
static const char no_memory[] = "cannot be unpacked: out of memory";
static const char too_big[] = "unpacks to more than it may";

struct stream {
    const uint8_t *in;
    size_t in_len, in_pos;
    uint8_t *out; /* NULL: check only */
    size_t out_cap, out_pos;
    uint8_t *scratch; /* LZ4_LEGACY_BLOCK bytes when out is NULL */
    const char *error;
};

static int fail(struct stream *s, int err, const char *why)
{
    s->error = why;
    return err;
}

/* Where the next output goes, and how much fits there. */
static uint8_t *room(const struct stream *s, size_t *len)
{
    size_t left = s->out_cap - s->out_pos;
    *len = s->out ? left : MIN(left, LZ4_LEGACY_BLOCK);
    return s->out ? s->out + s->out_pos : s->scratch;
}

/*
 * One byte for a decompressor to write to when the room is used up: it may need to run once more
 * without output to find its end. If it does write, there was too much.
 */
static uint8_t overflow[1];

static int unpack_gzip(struct stream *s)
{
    z_stream z = {0};
    if (inflateInit2(&z, 15 + 16) != Z_OK)
        return fail(s, -ENOMEM, no_memory);
    int err, ret;
    do {
        size_t space;
        uint8_t *to = room(s, &space);
        bool full = space == 0;
        z.next_out = full ? overflow : to;
        z.avail_out = full ? 1 : (uInt)MIN(space, (size_t)INT_MAX);
        uInt in = (uInt)MIN(s->in_len - s->in_pos, (size_t)INT_MAX);
        z.next_in = (Bytef *)(s->in + s->in_pos);
        z.avail_in = in;
        uInt had = z.avail_out;
        ret = inflate(&z, Z_NO_FLUSH);
        s->in_pos += in - z.avail_in;
        if (full && z.avail_out == 0) {
            err = fail(s, -EFBIG, too_big);
            goto out;
        }
        s->out_pos += full ? 0 : had - z.avail_out;
        if (ret == Z_BUF_ERROR && s->in_pos == s->in_len) {
            err = fail(s, -EINVAL, truncated);
            goto out;
        }
    } while (ret == Z_OK);
    if (ret == Z_STREAM_END)
        err = 0;
    else if (ret == Z_MEM_ERROR)
        err = fail(s, -ENOMEM, no_memory);
    else
        err = fail(s, -EINVAL, corrupt);
out:
    inflateEnd(&z);
    return err;
}

static int unpack_lzma(struct stream *s, bool alone)
{
    lzma_stream z = LZMA_STREAM_INIT;
    lzma_ret ret = alone ? lzma_alone_decoder(&z, LZMA_MEMORY_LIMIT)
                         : lzma_stream_decoder(&z, LZMA_MEMORY_LIMIT, 0);
    if (ret != LZMA_OK)
        return fail(s, -ENOMEM, no_memory);
    int err = 0;
    z.next_in = s->in + s->in_pos;
    z.avail_in = s->in_len - s->in_pos;
    do {
        size_t space;
        uint8_t *to = room(s, &space);
        bool full = space == 0;
        z.next_out = full ? overflow : to;
        z.avail_out = full ? 1 : space;
        size_t had = z.avail_out;
        ret = lzma_code(&z, LZMA_FINISH);
        s->in_pos = s->in_len - z.avail_in;
        if (full && z.avail_out == 0) {
            err = fail(s, -EFBIG, too_big);
            goto out;
        }
        s->out_pos += full ? 0 : had - z.avail_out;
    } while (ret == LZMA_OK);
    if (ret == LZMA_STREAM_END)
        err = 0;
    else if (ret == LZMA_MEM_ERROR)
        err = fail(s, -ENOMEM, no_memory);
    else if (ret == LZMA_MEMLIMIT_ERROR)
        err = fail(s, -EINVAL, "needs more than 256 MiB of memory to unpack");
    else
        err = fail(s, -EINVAL, ret == LZMA_BUF_ERROR ? truncated : corrupt);
out:
    resident_note();            /* the dictionary is as big as the format allows */
    lzma_end(&z);
    return err;
}

/* Blocks with a length in front; a frame ends with the input, or where no length of a block stands.
 */
static int unpack_lz4(struct stream *s)
{
    s->in_pos = 4;
    while (s->in_len - s->in_pos >= 4) {
        uint32_t len = load_le32(s->in + s->in_pos);
        if (len == LZ4_LEGACY_MAGIC) { /* another frame goes on here */
            s->in_pos += 4;
            continue;
        }
        if (len == 0 || len > LZ4_COMPRESSBOUND(LZ4_LEGACY_BLOCK))
            break;
        if (len > s->in_len - s->in_pos - 4)
            return fail(s, -EINVAL, truncated);
        size_t space;
        uint8_t *to = room(s, &space);
        int cap = (int)MIN(space, LZ4_LEGACY_BLOCK);
        int n = LZ4_decompress_safe((const char *)s->in + s->in_pos + 4, (char *)to, (int)len, cap);
        if (n < 0)
            return cap < (int)LZ4_LEGACY_BLOCK
                       ? fail(s, -EFBIG, "is corrupt or unpacks to more than it may")
                       : fail(s, -EINVAL, corrupt);
        s->in_pos += 4 + len;
        s->out_pos += (size_t)n;
    }
    return 0;
}

static int zstd_error(struct stream *s, size_t ret)
{
    switch (ZSTD_getErrorCode(ret)) {
    case ZSTD_error_memory_allocation:
        return fail(s, -ENOMEM, no_memory);
    case ZSTD_error_dstSize_tooSmall:
        return fail(s, -EFBIG, too_big);
    case ZSTD_error_srcSize_wrong:
        return fail(s, -EINVAL, truncated);
    case ZSTD_error_frameParameter_windowTooLarge:
        return fail(s, -EINVAL, "needs more than 128 MiB of memory to unpack");
    default:
        return fail(s, -EINVAL, corrupt);
    }
}

static int check_zstd(struct stream *s)
{
    ZSTD_DStream *z = ZSTD_createDStream();
    if (!z)
        return fail(s, -ENOMEM, no_memory);
    ZSTD_inBuffer in = {s->in, s->in_len, 0};
    int err = 0;
    size_t ret;
    do {
        ZSTD_outBuffer out = {s->scratch, LZ4_LEGACY_BLOCK, 0};
        size_t before = in.pos;
        ret = ZSTD_decompressStream(z, &out, &in);
        if (ZSTD_isError(ret)) {
            err = zstd_error(s, ret);
            break;
        }
        if (out.pos > s->out_cap - s->out_pos) {
            err = fail(s, -EFBIG, too_big);
            break;
        }
        s->out_pos += out.pos;
        if (ret != 0 && in.pos == before && out.pos == 0) {
            err = fail(s, -EINVAL, truncated);
            break;
        }
    } while (ret != 0);
    s->in_pos = in.pos;
    resident_note();
    ZSTD_freeDStream(z);
    return err;
}

static int unpack_zstd(struct stream *s)
{
    /* Walking block by block with a window of its own is for checking: here the output is the
     * window. */
    if (!s->out)
        return check_zstd(s);
    size_t len = ZSTD_findFrameCompressedSize(s->in, s->in_len);
    if (ZSTD_isError(len))
        return zstd_error(s, len);
    size_t n = ZSTD_decompress(s->out, s->out_cap, s->in, len);
    if (ZSTD_isError(n))
        return zstd_error(s, n);
    s->in_pos = len;
    s->out_pos = n;
    return 0;
}

enum unpack_format unpack_detect(const uint8_t *data, size_t len)
{
    static const struct {
        enum unpack_format format;
        uint8_t len, bytes[6];
    } magic[] = {
        {UNPACK_GZIP, 3, {0x1f, 0x8b, 0x08}},
        {UNPACK_XZ, 6, {0xfd, '7', 'z', 'X', 'Z', 0}},
        {UNPACK_LZMA, 3, {0x5d, 0, 0}},
        {UNPACK_LZ4, 4, {0x02, 0x21, 0x4c, 0x18}},
        {UNPACK_ZSTD, 4, {0x28, 0xb5, 0x2f, 0xfd}},
        {UNPACK_BZIP2, 3, {'B', 'Z', 'h'}},
        {UNPACK_LZO, 4, {0x89, 'L', 'Z', 'O'}},
    };
    for (size_t i = 0; i < ARRAY_SIZE(magic); i++)
        if (len >= magic[i].len && !memcmp(data, magic[i].bytes, magic[i].len))
            return magic[i].format;
    return UNPACK_NONE;
}

const char *unpack_format_name(enum unpack_format f)
{
    static const char *const name[] = {
        [UNPACK_NONE] = "uncompressed", [UNPACK_GZIP] = "gzip", [UNPACK_XZ] = "XZ",
        [UNPACK_LZMA] = "LZMA",         [UNPACK_LZ4] = "LZ4",   [UNPACK_ZSTD] = "Zstandard",
        [UNPACK_BZIP2] = "bzip2",       [UNPACK_LZO] = "LZO",
    };
    return name[f];
}

int unpack(enum unpack_format f, const uint8_t *in, size_t in_len, uint8_t *out, size_t out_cap,
           struct unpack_result *r)
{
    struct stream s = {.in = in, .in_len = in_len, .out = out, .out_cap = out_cap};
    int err;
    if (!out && !(s.scratch = malloc(LZ4_LEGACY_BLOCK))) {
        err = fail(&s, -ENOMEM, no_memory);
        goto out;
    }
    if (f != UNPACK_NONE && unpack_detect(in, in_len) != f) {
        err = fail(&s, -EINVAL, corrupt);
        goto out;
    }
    switch (f) {
    case UNPACK_GZIP:
        err = unpack_gzip(&s);
        break;
    case UNPACK_XZ:
    case UNPACK_LZMA:
        err = unpack_lzma(&s, f == UNPACK_LZMA);
        break;
    case UNPACK_LZ4:
        err = unpack_lz4(&s);
        break;
    case UNPACK_ZSTD:
        err = unpack_zstd(&s);
        break;
    default:
        err = fail(&s, -ENOTSUP, "is compressed in a way that is not supported here");
        break;
    }
out:
    if (s.scratch)
        resident_note();
    free(s.scratch);
    *r = (struct unpack_result){
        .consumed = s.in_pos, .produced = s.out_pos, .error = err ? s.error : NULL};
    return err;
}
