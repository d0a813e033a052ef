/*
 * Overlays: a disk that is another file, read only, plus what was written since. Private to backend/block.
 *
 * File, little-endian:
 *   0      16 bytes  "ringfort overlay"
 *   16     u32       version: 1
 *   20     u32       bytes in a granule: 4096
 *   24     u64       size of the disk in bytes
 *   32     u64       where the data begin: a multiple of 1 MiB
 *   40     u16       length of the base's path, at most 1024; then the path: relative to the overlay's folder, or absolute
 *   4096             bitmap: a bit per granule, lowest bit of the first byte first: the granule's data are here, not below
 *   data             the disk's bytes at their offsets; what is not here is a hole
 * The base is a raw image or an overlay in turn.
 *
 * A write covers whole granules: block.c makes it so. A granule's bit is set in memory when its data are written, and in the
 * file by the next flush, after the data are on the disk; so after a crash a granule is either the old one or whole.
 * Machine lock held, but for overlay_read() and the functions for worker threads.
 */
#ifndef RINGFORT_BACKEND_BLOCK_OVERLAY_H
#define RINGFORT_BACKEND_BLOCK_OVERLAY_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#define OVERLAY_GRANULE 4096u

struct overlay;

/* Whether a file that begins with these bytes is one. */
bool overlay_is(const uint8_t *head, size_t len);
/* fd: the overlay's, buffered, which stays the caller's. Opens and locks the bases. 0 or a negative errno (logged). */
int overlay_open(int fd, const char *path, struct overlay **out);
void overlay_close(struct overlay *o);
uint64_t overlay_size(const struct overlay *o);
uint64_t overlay_data_offset(const struct overlay *o);

/* The file that has the byte at offset, where there, and for how many bytes up to len (a granule's rest at least). Any thread. */
struct overlay_place {
    int fd;                     /* -1: the overlay itself */
    uint64_t offset, len;
};
struct overlay_place overlay_find(const struct overlay *o, uint64_t offset, uint64_t len);
/* Reads through all layers; top: a descriptor of the overlay. Bytes or a negative errno. Worker threads. */
int64_t overlay_read(const struct overlay *o, int top, const struct iovec *iov, unsigned iovcnt, uint64_t offset);

/* The data of these granules are in the overlay now. */
void overlay_mark(struct overlay *o, uint64_t offset, uint64_t len);
/* Bits were set that the file does not have. */
bool overlay_dirty(const struct overlay *o);
/* Writes them: after the data were synced, and before another sync. Nothing else is under way. Worker threads. 0 or -errno. */
int overlay_write_bitmap(struct overlay *o, int fd);

#endif
