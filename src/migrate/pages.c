/*
 * Encoding and decoding of pages; see pages.h.
 *
 * The guest writes while its pages are read. A page is copied first, and hash and contents are of the copy; a copy that caught
 * a write in the middle is followed by another, because the page is dirty.
 */
#include "migrate/pages.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "base/util.h"
#include "migrate/pack.h"

#define TABLE 8u

/* ---- hashes ---- */

int page_hashes_init(struct page_hashes *h, const struct memory *m)
{
    memset(h, 0, sizeof(*h));
    if (getrandom(&h->seed, sizeof(h->seed), 0) != sizeof(h->seed))
        h->seed = (uint64_t)(uintptr_t)h;
    for (unsigned i = 0; i < m->regions; i++) {
        h->region[i] = calloc(m->region[i].size >> GUEST_PAGE_SHIFT, sizeof(*h->region[i]));
        if (!h->region[i]) {
            page_hashes_destroy(h);
            return -ENOMEM;
        }
    }
    return 0;
}

void page_hashes_destroy(struct page_hashes *h)
{
    for (unsigned i = 0; i < MEMORY_MAX_REGIONS; i++)
        free(h->region[i]);
    memset(h, 0, sizeof(*h));
}

/* ---- encoding ---- */

struct page_encoder {
    struct memory *memory;
    struct page_hashes *hashes;
    struct packer *packer;
    unsigned region, count, raw;
    uint64_t entry[PAGES_PER_FRAME];
    struct page_counts counts;
    uint8_t contents[PAGES_PER_FRAME * GUEST_PAGE_SIZE];
    uint8_t out[FRAME_HEADER_SIZE + PAGES_MAX_PAYLOAD];
};

struct page_encoder *page_encoder_create(struct memory *m, struct page_hashes *hashes, bool compress)
{
    struct page_encoder *e = calloc(1, sizeof(*e));

    if (!e || !(e->packer = packer_create(compress))) {
        free(e);
        return NULL;
    }
    e->memory = m;
    e->hashes = hashes;
    return e;
}

void page_encoder_free(struct page_encoder *e)
{
    if (e)
        packer_free(e->packer);
    free(e);
}

static bool is_zero(const uint8_t *p)
{
    return load_le64(p) == 0 && memcmp(p, p + 8, GUEST_PAGE_SIZE - 8) == 0;
}

/* Whether the target has this already; else it is noted to have it from now on. */
static bool target_has(struct page_encoder *e, unsigned region, uint64_t page, const uint8_t *contents)
{
    struct page_hash *known = &e->hashes->region[region][page];
    XXH128_hash_t h = XXH3_128bits_withSeed(contents, GUEST_PAGE_SIZE, e->hashes->seed);

    if (known->low == h.low64 && known->high == h.high64)
        return true;
    *known = (struct page_hash){ h.low64, h.high64 };
    return false;
}

bool page_encoder_add(struct page_encoder *e, unsigned region, uint64_t page)
{
    uint8_t *copy = e->contents + (size_t)e->raw * GUEST_PAGE_SIZE;
    bool zero;

    e->region = region;
    memcpy(copy, e->memory->region[region].host + (page << GUEST_PAGE_SHIFT), GUEST_PAGE_SIZE);
    zero = is_zero(copy);
    if (e->hashes && target_has(e, region, page, copy)) {
        e->counts.skipped++;
        return false;
    }
    if (zero) {
        e->counts.zero++;
    } else {
        e->counts.raw++;
        e->raw++;
    }
    e->entry[e->count++] = page << 8 | (zero ? PAGE_ZERO : PAGE_RAW);
    return e->count == PAGES_PER_FRAME;
}

uint8_t *page_encoder_take(struct page_encoder *e, uint32_t *length, unsigned *flags)
{
    uint8_t *payload = e->out + FRAME_HEADER_SIZE, *contents = payload + TABLE + 8u * e->count;

    *flags = 0;
    *length = 0;
    if (!e->count)
        return e->out;
    store_le16(payload, (uint16_t)e->region);
    store_le16(payload + 2, (uint16_t)e->count);
    store_le32(payload + 4, 0);
    for (unsigned i = 0; i < e->count; i++)
        store_le64(payload + TABLE + 8 * i, e->entry[i]);
    *length = TABLE + 8u * e->count + (uint32_t)packer_put(e->packer, contents, e->contents, (size_t)e->raw * GUEST_PAGE_SIZE, flags);
    e->count = e->raw = 0;
    return e->out;
}

const struct page_counts *page_encoder_counts(const struct page_encoder *e) { return &e->counts; }

/* ---- decoding ---- */

struct page_decoder {
    const struct memory *memory;
    struct unpacker *unpacker;
};

struct page_decoder *page_decoder_create(const struct memory *m)
{
    struct page_decoder *d = calloc(1, sizeof(*d));

    if (!d || !(d->unpacker = unpacker_create(PAGES_PER_FRAME * GUEST_PAGE_SIZE))) {
        free(d);
        return NULL;
    }
    d->memory = m;
    return d;
}

void page_decoder_free(struct page_decoder *d)
{
    if (d)
        unpacker_free(d->unpacker);
    free(d);
}

int page_decoder_take(struct page_decoder *d, const struct frame *f, page_sink_fn *sink, void *opaque,
                      char error[CHANNEL_ERROR_MAX])
{
    const uint8_t *contents;
    unsigned region, count, raw = 0;
    uint64_t pages;
    size_t bytes;

    if (f->length < TABLE)
        goto damaged;
    region = load_le16(f->data);
    count = load_le16(f->data + 2);
    if (region >= d->memory->regions || !count || count > PAGES_PER_FRAME || load_le32(f->data + 4) ||
        f->length < TABLE + 8u * count)
        goto damaged;
    pages = d->memory->region[region].size >> GUEST_PAGE_SHIFT;
    for (unsigned i = 0; i < count; i++) {
        uint64_t entry = load_le64(f->data + TABLE + 8 * i);

        if (entry >> 8 >= pages || (entry & 0xff) > PAGE_RAW)
            goto damaged;
        raw += (entry & 0xff) == PAGE_RAW;
    }
    bytes = f->length - (TABLE + 8 * count);
    contents = unpacker_take(d->unpacker, f->flags, f->data + TABLE + 8 * count, &bytes);
    if (!contents || bytes != (size_t)raw * GUEST_PAGE_SIZE)
        goto damaged;
    for (unsigned i = 0; i < count; i++) {
        uint64_t entry = load_le64(f->data + TABLE + 8 * i);
        bool zero = (entry & 0xff) == PAGE_ZERO;
        int err = sink(opaque, region, entry >> 8, zero ? NULL : contents);

        if (err) {
            snprintf(error, CHANNEL_ERROR_MAX, "a page cannot be stored: %s", strerror(-err));
            return err;
        }
        contents += zero ? 0 : GUEST_PAGE_SIZE;
    }
    return 0;
damaged:
    snprintf(error, CHANNEL_ERROR_MAX, "the stream is damaged: pages that cannot be");
    return -EPROTO;
}
