/* See protocol.h. */
#include "migrate/protocol.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/util.h"

#define MISSING_HEADER 16u
#define MISSING_WORDS 65536u    /* in one frame */

static const char hello_magic[16] = "ringfort migrate";

uint64_t migrate_now_ms(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

void hello_put(const struct hello *h, uint8_t out[HELLO_SIZE])
{
    memset(out, 0, HELLO_SIZE);
    memcpy(out, hello_magic, 16);
    store_le32(out + 16, h->oldest);
    store_le32(out + 20, h->newest);
    store_le32(out + 24, h->kind);
    store_le32(out + 28, h->index);
    memcpy(out + 32, h->session, SESSION_SIZE);
}

int hello_get(const struct frame *f, struct hello *h, char error[CHANNEL_ERROR_MAX])
{
    if (f->type != FRAME_HELLO || f->length < HELLO_SIZE || memcmp(f->data, hello_magic, 16) != 0) {
        snprintf(error, CHANNEL_ERROR_MAX, "the other side does not begin as a migration does");
        return -EPROTO;
    }
    h->oldest = load_le32(f->data + 16);
    h->newest = load_le32(f->data + 20);
    h->kind = load_le32(f->data + 24);
    h->index = load_le32(f->data + 28);
    memcpy(h->session, f->data + 32, SESSION_SIZE);
    if (h->oldest > MIGRATE_VERSION || h->newest < MIGRATE_VERSION) {
        snprintf(error, CHANNEL_ERROR_MAX,
                 "the other side's ringfort speaks versions %u to %u of the migration protocol, this one version %u: use the same release on both hosts",
                 h->oldest, h->newest, MIGRATE_VERSION);
        return -EPROTO;
    }
    if (h->kind >= HELLO_KINDS) {
        snprintf(error, CHANNEL_ERROR_MAX, "the other side asks for something unknown (%u)", h->kind);
        return -EPROTO;
    }
    return 0;
}

/* ---- bitmaps ---- */

/* u32 region, u32 0, u64 first word, words */
int missing_send(struct channel *c, const struct memory *m, uint64_t *const bitmap[])
{
    uint8_t *buffer = malloc(MISSING_HEADER + MISSING_WORDS * 8);
    int err = buffer ? 0 : -ENOMEM;

    for (unsigned i = 0; i < m->regions && !err; i++) {
        size_t words = memory_bitmap_words(&m->region[i]);

        for (size_t w = 0; w < words && !err; w += MISSING_WORDS) {
            size_t n = MIN(words - w, MISSING_WORDS);

            store_le32(buffer, i);
            store_le32(buffer + 4, 0);
            store_le64(buffer + 8, w);
            memcpy(buffer + MISSING_HEADER, bitmap[i] + w, n * 8);
            err = frame_send(c, FRAME_MISSING, 0, buffer, (uint32_t)(MISSING_HEADER + n * 8));
        }
    }
    free(buffer);
    return err;
}

int missing_take(const struct frame *f, const struct memory *m, uint64_t *const bitmap[], char error[CHANNEL_ERROR_MAX])
{
    uint64_t words, first, pages;
    uint32_t region;

    if (f->length < MISSING_HEADER || f->length % 8)
        goto damaged;
    region = load_le32(f->data);
    first = load_le64(f->data + 8);
    words = (f->length - MISSING_HEADER) / 8;
    if (region >= m->regions || first > memory_bitmap_words(&m->region[region]) ||
        words > memory_bitmap_words(&m->region[region]) - first)
        goto damaged;
    for (uint64_t w = 0; w < words; w++)
        bitmap[region][first + w] |= load_le64(f->data + MISSING_HEADER + w * 8);
    /* No bits beyond the end. */
    pages = m->region[region].size >> GUEST_PAGE_SHIFT;
    if (pages % 64 && first + words == memory_bitmap_words(&m->region[region]) && words)
        bitmap[region][pages / 64] &= (1ull << (pages % 64)) - 1;
    return 0;
damaged:
    snprintf(error, CHANNEL_ERROR_MAX, "the stream is damaged: a list of pages that cannot be");
    return -EPROTO;
}
