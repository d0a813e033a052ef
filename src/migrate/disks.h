/*
 * Disks that move along: which parts are to be sent, and how they are put into frames.
 *
 * A disk is granules of MIGRATE_DISK_GRANULE bytes; the last may be shorter. A DISK frame has one:
 *
 *     u32 disk   u32 0   u64 offset   u64 length   the contents, nothing for zeroes
 *
 * With FRAME_FLAG_ZSTD the contents are one zstd frame. The target's disks are all zero at first.
 */
#ifndef RINGFORT_MIGRATE_DISKS_H
#define RINGFORT_MIGRATE_DISKS_H

#include <stdbool.h>

#include "migrate/frame.h"
#include "migrate/migrate.h"

#define DISK_MAX_PAYLOAD (24u + MIGRATE_DISK_GRANULE)
/* What a granule counts as where progress is told in pages. */
#define DISK_PAGES (MIGRATE_DISK_GRANULE / GUEST_PAGE_SIZE)

/* A bitmap for each disk, all 0; d: NULL: none. -ENOMEM. */
int disk_bitmaps_alloc(const struct migrate_disks *d, uint64_t *bitmap[MIGRATE_MAX_DISKS]);
void disk_bitmaps_free(uint64_t *bitmap[MIGRATE_MAX_DISKS]);
uint64_t disk_bitmaps_count(const struct migrate_disks *d, uint64_t *const bitmap[]);
/* u64 words in a disk's bitmap. */
size_t disk_bitmap_words(uint64_t size);

/* One for each thread. */
struct disk_encoder;

struct disk_encoder *disk_encoder_create(const struct migrate_disks *d, bool compress);
void disk_encoder_free(struct disk_encoder *e);
/*
 * Reads a granule and makes a frame of it, with FRAME_HEADER_SIZE of room in front, as page_encoder_take(). fresh: the target has
 * nothing of this disk yet, so zeroes need not be sent: length 0. NULL: *err is the reason.
 */
uint8_t *disk_encoder_put(struct disk_encoder *e, unsigned disk, uint64_t granule, bool fresh, uint32_t *length, unsigned *flags, int *err);

/* Where granules go. buf: NULL for zeroes. 0, -EPROTO: there is no such place; or another negative errno. */
typedef int disk_sink_fn(void *opaque, unsigned disk, uint64_t offset, const void *buf, size_t len);

struct disk_decoder;

struct disk_decoder *disk_decoder_create(void);
void disk_decoder_free(struct disk_decoder *d);
int disk_decoder_take(struct disk_decoder *d, const struct frame *f, disk_sink_fn *sink, void *opaque, char error[CHANNEL_ERROR_MAX]);

#endif
