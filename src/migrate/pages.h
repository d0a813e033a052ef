/*
 * How pages of guest memory are put into frames, and taken out.
 *
 * A PAGES frame has up to PAGES_PER_FRAME pages of one region:
 *
 *     u16 region   u16 count   u32 0   count times u64: page number << 8 | kind   the contents of RAW pages, in order
 *
 * With FRAME_FLAG_ZSTD the contents are one zstd frame. Kinds: ZERO has no contents, RAW has 4096 bytes. A page whose
 * contents the target has from an earlier round is not mentioned: the encoder keeps a hash of what it sent last of each page. The hash is
 * XXH3-128 under a secret seed, so that a guest cannot look for collisions (it would hurt itself alone).
 *
 * Encoders: one per stream and thread; all share a struct page_hashes, in which a page belongs to one stream.
 */
#ifndef RINGFORT_MIGRATE_PAGES_H
#define RINGFORT_MIGRATE_PAGES_H

#include <stdbool.h>

#include "memory/memory.h"
#include "migrate/frame.h"

#define PAGES_PER_FRAME 64u
#define PAGES_MAX_PAYLOAD (8u + PAGES_PER_FRAME * (8u + GUEST_PAGE_SIZE) + 1024u)

enum page_kind { PAGE_ZERO = 0, PAGE_RAW = 1 };

/* What the target holds, as far as the source knows. */
struct page_hashes {
    uint64_t seed;
    struct page_hash { uint64_t low, high; } *region[MEMORY_MAX_REGIONS];  /* both 0: unknown */
};

/* The target's memory is all zero at first, and so are the hashes' knowledge of it. -ENOMEM. */
int page_hashes_init(struct page_hashes *h, const struct memory *m);
void page_hashes_destroy(struct page_hashes *h);

struct page_counts {
    uint64_t zero, raw, skipped;        /* pages */
};

struct page_encoder;

/* compress: zstd. hashes: NULL: every page is mentioned. NULL: out of memory. */
struct page_encoder *page_encoder_create(struct memory *m, struct page_hashes *hashes, bool compress);
void page_encoder_free(struct page_encoder *e);
/* Adds a page as it is now. True: the frame is full, or the next page is of another region: take it. */
bool page_encoder_add(struct page_encoder *e, unsigned region, uint64_t page);
/*
 * What was added, as a frame with FRAME_HEADER_SIZE of room in front, for frame_send_in_place(); empty again then. Length 0: nothing to send.
 */
uint8_t *page_encoder_take(struct page_encoder *e, uint32_t *length, unsigned *flags);
const struct page_counts *page_encoder_counts(const struct page_encoder *e);

/* Where pages go. 0 or a negative errno. contents: NULL for zeros; valid during the call. */
typedef int page_sink_fn(void *opaque, unsigned region, uint64_t page, const uint8_t *contents);

struct page_decoder;

struct page_decoder *page_decoder_create(const struct memory *m);
void page_decoder_free(struct page_decoder *d);
/* Checks all of the frame before the first page goes to the sink. -EPROTO with error for what no encoder makes. */
int page_decoder_take(struct page_decoder *d, const struct frame *f, page_sink_fn *sink, void *opaque,
                      char error[CHANNEL_ERROR_MAX]);

#endif
