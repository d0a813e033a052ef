/*
 * What pages and parts of disks hold, on its way in a frame: as it is, or as one zstd frame (FRAME_FLAG_ZSTD).
 *
 * One of each for each thread.
 */
#ifndef RINGFORT_MIGRATE_PACK_H
#define RINGFORT_MIGRATE_PACK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct packer;

/* compress: with zstd, what gets shorter by it. NULL: out of memory. */
struct packer *packer_create(bool compress);
void packer_free(struct packer *p);
/* Puts contents into out, where there is room for len bytes. Returns how many it takes; *flags: the frame's. */
size_t packer_put(struct packer *p, uint8_t *out, const uint8_t *contents, size_t len, unsigned *flags);

struct unpacker;

/* most: bytes that contents may have. NULL: out of memory. */
struct unpacker *unpacker_create(size_t most);
void unpacker_free(struct unpacker *u);
/*
 * The contents, from *len bytes of a frame with these flags; *len: of the contents. They are valid until the next call, and as long as
 * packed is. NULL: damaged, or of more than most bytes.
 */
const uint8_t *unpacker_take(struct unpacker *u, unsigned flags, const uint8_t *packed, size_t *len);

#endif
