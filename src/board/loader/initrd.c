/* Checking an initramfs. See initrd.h. */
#include "board/loader/initrd.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>

#include "base/log.h"
#include "base/util.h"
#include "board/loader/source.h"
#include "board/loader/unpack.h"

#define CPIO_HEADER   110u /* magic and 13 numbers of 8 hexadecimal digits */
#define CPIO_FIELD(n) (6 + 8 * (n))
#define CPIO_FILESIZE CPIO_FIELD(6)
#define CPIO_NAMESIZE CPIO_FIELD(11)

static bool is_cpio(const uint8_t *p, uint64_t len)
{
    return len >= 6 && (!memcmp(p, "070701", 6) || !memcmp(p, "070702", 6));
}

static bool parse_hex(const uint8_t *p, uint32_t *out)
{
    uint32_t v = 0;
    for (int i = 0; i < 8; i++) {
        unsigned c = p[i], digit;
        if (c >= '0' && c <= '9')
            digit = c - '0';
        else if ((c | 0x20) >= 'a' && (c | 0x20) <= 'f')
            digit = (c | 0x20) - 'a' + 10;
        else
            return false;
        v = v << 4 | digit;
    }
    *out = v;
    return true;
}

/*
 * One cpio archive from *pos on, up to its trailer. Offsets inside an archive count from the
 * archive's own start: Linux aligns by 4 bytes of the input, and archives begin at multiples of 4.
 */
static int check_cpio(const struct source *src, const uint8_t *data, uint64_t size, uint64_t *pos)
{
    uint64_t at = *pos;
    for (;;) {
        const uint8_t *h = data + at;
        uint64_t left = size - at;
        uint32_t name_len, file_len;
        if (left < CPIO_HEADER)
            return source_error(src, "is truncated: its cpio archive has no end (offset %llu)",
                                (unsigned long long)at);
        if (!is_cpio(h, left) || !parse_hex(h + CPIO_NAMESIZE, &name_len) ||
            !parse_hex(h + CPIO_FILESIZE, &file_len) || name_len == 0)
            return source_error(src, "is corrupt: no cpio header at offset %llu",
                                (unsigned long long)at);
        uint64_t body = align_up((uint64_t)CPIO_HEADER + name_len, 4);
        uint64_t next = align_up(body + file_len, 4);
        /* The padding behind the last file may be missing. */
        if (body + file_len > left)
            return source_error(src, "is truncated: a file in it has %u bytes, %llu are there",
                                file_len, (unsigned long long)(left > body ? left - body : 0));
        bool trailer = name_len == 11 && !memcmp(h + CPIO_HEADER, "TRAILER!!!", 11);
        at += MIN(next, left);
        if (trailer) {
            *pos = at;
            return 0;
        }
    }
}

int initrd_check(const struct source *src, const uint8_t *data, uint64_t size,
                 uint64_t memory_bytes)
{
    uint64_t pos = 0;
    bool any = false;
    for (;;) {
        while (pos < size && data[pos] == 0)
            pos++;
        if (pos == size)
            break;
        enum unpack_format format = unpack_detect(data + pos, size - pos);
        if (is_cpio(data + pos, size - pos)) {
            int err = check_cpio(src, data, size, &pos);
            if (err)
                return err;
        } else if (format == UNPACK_BZIP2 || format == UNPACK_LZO) {
            log_debug("%s %s: is not checked: %s", src->what, src->path,
                      unpack_format_name(format));
            return 0;
        } else if (format != UNPACK_NONE) {
            struct unpack_result r;
            int err = unpack(format, data + pos, size - pos, NULL, memory_bytes, &r);
            if (err == -ENOMEM) {
                log_error("%s %s: %s", src->what, src->path, r.error);
                return err;
            }
            if (err == -EFBIG)
                return source_error(src, "unpacks to more than the %llu MiB of guest memory",
                                    (unsigned long long)(memory_bytes >> 20));
            if (err)
                return source_error(src, "%s (%s)", r.error, unpack_format_name(format));
            pos += r.consumed;
        } else if (!any) {
            return source_error(
                src, "is not an initramfs: neither a cpio archive (newc) nor a known compression");
        } else {
            log_warn("%s %s: ignoring what follows the archive at offset %llu", src->what,
                     src->path, (unsigned long long)pos);
            return 0;
        }
        any = true;
    }
    if (!any)
        return source_error(src, "contains only zeroes");
    return 0;
}
