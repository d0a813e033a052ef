/* See disks.h. */
#include "migrate/disks.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"
#include "migrate/pack.h"

#define HEADER 24u

/* ---- bitmaps ---- */

size_t disk_bitmap_words(uint64_t size) { return (size_t)((size + MIGRATE_DISK_GRANULE * 64ull - 1) / (MIGRATE_DISK_GRANULE * 64ull)); }

int disk_bitmaps_alloc(const struct migrate_disks *d, uint64_t *bitmap[MIGRATE_MAX_DISKS])
{
    for (unsigned i = 0; d && i < d->count; i++) {
        bitmap[i] = calloc(disk_bitmap_words(d->size[i]), sizeof(uint64_t));
        if (!bitmap[i]) {
            disk_bitmaps_free(bitmap);
            return -ENOMEM;
        }
    }
    return 0;
}

void disk_bitmaps_free(uint64_t *bitmap[MIGRATE_MAX_DISKS])
{
    for (unsigned i = 0; i < MIGRATE_MAX_DISKS; i++) {
        free(bitmap[i]);
        bitmap[i] = NULL;
    }
}

uint64_t disk_bitmaps_count(const struct migrate_disks *d, uint64_t *const bitmap[])
{
    uint64_t n = 0;

    for (unsigned i = 0; d && i < d->count; i++)
        for (size_t w = 0; w < disk_bitmap_words(d->size[i]); w++)
            n += (uint64_t)__builtin_popcountll(__atomic_load_n(&bitmap[i][w], __ATOMIC_RELAXED));
    return n;
}

/* ---- encoding ---- */

struct disk_encoder {
    const struct migrate_disks *disks;
    struct packer *packer;
    uint8_t contents[MIGRATE_DISK_GRANULE];
    uint8_t out[FRAME_HEADER_SIZE + DISK_MAX_PAYLOAD];
};

struct disk_encoder *disk_encoder_create(const struct migrate_disks *d, bool compress)
{
    struct disk_encoder *e = calloc(1, sizeof(*e));

    if (!e || !(e->packer = packer_create(compress))) {
        free(e);
        return NULL;
    }
    e->disks = d;
    return e;
}

void disk_encoder_free(struct disk_encoder *e)
{
    if (e)
        packer_free(e->packer);
    free(e);
}

static bool is_zero(const uint8_t *p, size_t len) { return p[0] == 0 && memcmp(p, p + 1, len - 1) == 0; }

uint8_t *disk_encoder_put(struct disk_encoder *e, unsigned disk, uint64_t granule, bool fresh, uint32_t *length, unsigned *flags, int *err)
{
    uint64_t offset = granule * MIGRATE_DISK_GRANULE, len = MIN(MIGRATE_DISK_GRANULE, e->disks->size[disk] - offset);
    uint8_t *payload = e->out + FRAME_HEADER_SIZE;

    *flags = 0;
    *length = 0;
    *err = e->disks->read(e->disks->opaque, disk, offset, e->contents, len);
    if (*err)
        return NULL;
    store_le32(payload, disk);
    store_le32(payload + 4, 0);
    store_le64(payload + 8, offset);
    store_le64(payload + 16, len);
    if (is_zero(e->contents, len)) {
        *length = fresh ? 0 : HEADER;
        return e->out;
    }
    *length = HEADER + (uint32_t)packer_put(e->packer, payload + HEADER, e->contents, len, flags);
    return e->out;
}

/* ---- decoding ---- */

struct disk_decoder {
    struct unpacker *unpacker;
};

struct disk_decoder *disk_decoder_create(void)
{
    struct disk_decoder *d = calloc(1, sizeof(*d));

    if (d && !(d->unpacker = unpacker_create(MIGRATE_DISK_GRANULE))) {
        free(d);
        d = NULL;
    }
    return d;
}

void disk_decoder_free(struct disk_decoder *d)
{
    if (d)
        unpacker_free(d->unpacker);
    free(d);
}

int disk_decoder_take(struct disk_decoder *d, const struct frame *f, disk_sink_fn *sink, void *opaque, char error[CHANNEL_ERROR_MAX])
{
    const uint8_t *contents;
    uint64_t offset, len;
    size_t bytes;
    int err;

    if (f->length < HEADER)
        goto damaged;
    offset = load_le64(f->data + 8);
    len = load_le64(f->data + 16);
    bytes = f->length - HEADER;
    if (load_le32(f->data + 4) || !len || len > MIGRATE_DISK_GRANULE || offset % MIGRATE_DISK_GRANULE)
        goto damaged;
    contents = unpacker_take(d->unpacker, f->flags, f->data + HEADER, &bytes);
    if (!contents || (bytes != len && (bytes || f->flags)))
        goto damaged;
    err = sink(opaque, load_le32(f->data), offset, bytes ? contents : NULL, len);
    if (err == -EPROTO)
        goto damaged;
    if (err)
        snprintf(error, CHANNEL_ERROR_MAX, "a disk cannot be written: %s", strerror(-err));
    return err;
damaged:
    snprintf(error, CHANNEL_ERROR_MAX, "the stream is damaged: a part of a disk that cannot be");
    return -EPROTO;
}
