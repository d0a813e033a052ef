/*
 * Which parts of a disk were written, and reading it beside the guest: for copying it to another host while it is used.
 *
 * A part is noted once its write is done: whoever reads it before that may get a mixture of old and new, but then finds it noted.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "backend/block/block_impl.h"
#include "base/log.h"
#include "base/util.h"

static uint64_t words(const struct block *b) { return (b->size + BLOCK_DIRTY_GRANULE * 64ull - 1) / (BLOCK_DIRTY_GRANULE * 64ull); }

int block_dirty_start(struct block *b)
{
    if (b->dirty)
        return -EBUSY;
    b->dirty = calloc(words(b), sizeof(*b->dirty));
    return b->dirty ? 0 : -ENOMEM;
}

void block_dirty_stop(struct block *b)
{
    free(b->dirty);
    b->dirty = NULL;
}

void block_dirty_mark(struct block *b, uint64_t offset, uint64_t len)
{
    if (!len)
        return;
    for (uint64_t i = offset / BLOCK_DIRTY_GRANULE; i <= (offset + len - 1) / BLOCK_DIRTY_GRANULE; i++)
        b->dirty[i / 64] |= 1ull << (i % 64);
}

void block_dirty_fetch(struct block *b, uint64_t *bitmap)
{
    for (uint64_t w = 0; w < words(b); w++) {
        bitmap[w] |= b->dirty[w];
        b->dirty[w] = 0;
    }
}

static void set_bits(uint64_t *bitmap, uint64_t first, uint64_t end)
{
    for (uint64_t i = first; i < end; i++)
        bitmap[i / 64] |= 1ull << (i % 64);
}

void block_contents(const struct block *b, uint64_t *bitmap)
{
    uint64_t granules = (b->size + BLOCK_DIRTY_GRANULE - 1) / BLOCK_DIRTY_GRANULE;
    off_t at = 0, data, hole;

    /* What a device or the layers of an overlay have is found by reading. */
    while (!b->device && !b->overlay && (uint64_t)at < b->size) {
        data = lseek(b->fd, at, SEEK_DATA);
        if (data < 0 && errno == ENXIO)
            return;
        hole = data < 0 ? -1 : lseek(b->fd, data, SEEK_HOLE);
        if (hole < 0)
            break;
        set_bits(bitmap, (uint64_t)data / BLOCK_DIRTY_GRANULE, MIN(((uint64_t)hole + BLOCK_DIRTY_GRANULE - 1) / BLOCK_DIRTY_GRANULE, granules));
        at = hole;
    }
    if ((uint64_t)at < b->size)
        set_bits(bitmap, (uint64_t)at / BLOCK_DIRTY_GRANULE, granules);
}

int block_read_aside(struct block *b, int fd, uint64_t offset, void *buf, size_t len)
{
    uint8_t *p = buf;

    while (len) {
        struct iovec iov = { p, len };
        int64_t n = b->overlay ? overlay_read(b->overlay, fd, &iov, 1, offset) : pread(fd, p, len, (off_t)offset);

        if (n < 0 && !b->overlay && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? (b->overlay ? (int)n : -errno) : -EIO;
        p += n;
        offset += (uint64_t)n;
        len -= (size_t)n;
    }
    return 0;
}

int block_open_aside(const struct block *b)
{
    char name[64];
    int fd;

    /* Without O_DIRECT, so that buffers need no alignment. */
    snprintf(name, sizeof(name), "/proc/self/fd/%d", b->fd);
    fd = open(name, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        fd = -errno;
        log_error("disk %s: cannot read it beside the guest: %s", b->path, strerror(-fd));
    }
    return fd;
}
