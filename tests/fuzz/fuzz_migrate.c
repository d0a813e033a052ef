/*
 * Fuzz target: what the receiving side of a migration reads. The first byte says how the rest is taken: "s": as the bytes
 * of a connection; otherwise as the payload of one frame, whose type and flags that byte has, so that the checksum is no
 * wall. What is accepted must lie inside memory.
 */
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"
#include "memory/memory.h"
#include "migrate/disks.h"
#include "migrate/pages.h"
#include "migrate/protocol.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static struct memory memory;
static struct page_decoder *decoder;
static struct disk_decoder *disks;
static uint64_t *bitmap[MEMORY_MAX_REGIONS];
static volatile unsigned sink_byte;

static int sink(void *opaque, unsigned region, uint64_t page, const uint8_t *contents)
{
    if (region >= memory.regions || page >= memory.region[region].size >> GUEST_PAGE_SHIFT)
        abort();
    if (contents)
        for (unsigned i = 0; i < GUEST_PAGE_SIZE; i += 64)
            sink_byte += contents[i];
    return 0;
}

static int disk_sink(void *opaque, unsigned disk, uint64_t offset, const void *buf, size_t len)
{
    if (!len || len > MIGRATE_DISK_GRANULE || offset % MIGRATE_DISK_GRANULE)
        abort();
    for (size_t i = 0; buf && i < len; i += 64)
        sink_byte += ((const uint8_t *)buf)[i];
    return disk < 4 && offset < MIB(1) ? 0 : -EPROTO;
}

static void take(const struct frame *f)
{
    char error[CHANNEL_ERROR_MAX] = "";
    struct hello h;
    int err = 0;

    switch (f->type) {
    case FRAME_HELLO:
        err = hello_get(f, &h, error);
        break;
    case FRAME_PAGES:
        err = page_decoder_take(decoder, f, sink, NULL, error);
        break;
    case FRAME_DISK:
        err = disk_decoder_take(disks, f, disk_sink, NULL, error);
        break;
    case FRAME_MISSING:
        err = missing_take(f, &memory, bitmap, error);
        for (unsigned i = 0; i < memory.regions; i++)
            if (bitmap[i][memory_bitmap_words(&memory.region[i]) - 1] >> (memory.region[i].size >> GUEST_PAGE_SHIFT) % 64 &&
                (memory.region[i].size >> GUEST_PAGE_SHIFT) % 64)
                abort();
        break;
    default:
        break;
    }
    /* Whoever refuses says why. */
    if ((err != 0) != (error[0] != 0))
        abort();
}

static void stream(const uint8_t *data, size_t size)
{
    char error[CHANNEL_ERROR_MAX];
    struct frame f = { 0 };
    struct channel *c;
    int fd[2];

    size = MIN(size, 65536u);
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fd) || write(fd[1], data, size) != (ssize_t)size)
        abort();
    close(fd[1]);
    c = channel_from_fd(fd[0], 1000);
    while (frame_recv(c, &f, error) == 0) {
        if (f.length > frame_limit(f.type) || f.data[f.length] != 0)
            abort();
        take(&f);
    }
    frame_free(&f);
    channel_close(c);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const unsigned types[8] = { FRAME_PAGES, FRAME_PAGES, FRAME_MISSING, FRAME_HELLO, FRAME_DISK, FRAME_DISK, FRAME_PAGES, FRAME_MISSING };
    struct frame f;

    log_set_level(-1);
    if (!decoder) {
        if (memory_init(&memory) || memory_add_ram(&memory, 0, 64 * GUEST_PAGE_SIZE) ||
            memory_add_ram(&memory, GIB(4), 70 * GUEST_PAGE_SIZE) || memory_bitmaps_alloc(&memory, bitmap))
            abort();
        decoder = page_decoder_create(&memory);
        disks = disk_decoder_create();
    }
    if (!size)
        return 0;
    if (data[0] == 's') {
        stream(data + 1, size - 1);
        return 0;
    }
    /* In memory of exactly its size, for the address sanitizer. */
    f = (struct frame){ .type = types[data[0] & 7], .flags = data[0] >> 7, .length = (uint32_t)(size - 1), .data = malloc(size) };
    memcpy(f.data, data + 1, size - 1);
    f.data[size - 1] = 0;
    if (f.length <= frame_limit(f.type))
        take(&f);
    free(f.data);
    return 0;
}
