/*
 * Unpacking of what kernels and initramfs archives are compressed with, in one call from memory to
 * memory.
 *
 * The input is hostile; output never goes past its buffer, and a decompressor's own memory is
 * bounded (256 MiB for the dictionary of XZ and LZMA, 128 MiB for the window of Zstandard). Any
 * thread.
 */
#ifndef RINGFORT_BOARD_UNPACK_H
#define RINGFORT_BOARD_UNPACK_H

#include <stddef.h>
#include <stdint.h>

enum unpack_format {
    UNPACK_NONE,
    UNPACK_GZIP,
    UNPACK_XZ,
    UNPACK_LZMA,
    UNPACK_LZ4, /* the legacy frame, as Linux uses it */
    UNPACK_ZSTD,
    UNPACK_BZIP2, /* known by name only: unpack() gives -ENOTSUP */
    UNPACK_LZO,   /* likewise */
};

/* By the first bytes. */
enum unpack_format unpack_detect(const uint8_t *data, size_t len);
/* "gzip", "XZ", … */
const char *unpack_format_name(enum unpack_format f);

struct unpack_result {
    size_t consumed;   /* input bytes that belong to the stream */
    size_t produced;   /* bytes of output */
    const char *error; /* after an error: what is wrong, as a predicate: "is truncated" */
};

/*
 * Unpacks one stream (for LZ4: one frame up to the end of input or what cannot be a block) from in
 * to out. out NULL: only checks the stream, against out_cap as well. 0; -EINVAL corrupt or
 * truncated, -EFBIG more than out_cap, -ENOMEM, -ENOTSUP. Logs nothing: error says it.
 */
int unpack(enum unpack_format f, const uint8_t *in, size_t in_len, uint8_t *out, size_t out_cap,
           struct unpack_result *r);

#endif
