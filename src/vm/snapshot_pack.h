/*
 * A snapshot's RAM in a file that takes less room: compressed by zstd, without pages of zeroes, and each other content of a page once.
 *
 * A machine runs from it before all of it is unpacked, so it is in chunks that can be read, checked and unpacked each by itself.
 * The distinct contents of pages are numbered from 1 on in the order in which they occur; each SNAPSHOT_CHUNK_PAGES of them are a zstd
 * frame, one after the other from the beginning of the file. Behind them, and last in the file, is a frame that zstd skips (so that
 * `zstd -t` tests the file), little-endian:
 *
 *     u32 magic of the frame 0x184d2a5e, u32 length of what follows
 *     u64 pages of the memory file    u32 contents    u32 chunks    u32 runs    u32 contents in a chunk
 *     for each chunk   u64 XXH3-64 of its frame, u32 length of its frame
 *     for each run     u32 pages, u32 number of the first one's content, the next one has the next; 0: all are zeroes
 *     u64 length of this frame with all of its fields    u64 XXH3-64 of it up to here    8 bytes "RFMEM 02"
 *
 * So every byte of the file is covered by a checksum, and those that are needed before anything runs are read at once: at most a
 * 500th of RAM. Checksums are of what is in the file, since some damage unpacks to other pages than zstd's own tells.
 *
 * For the snapshot_*.c files and tests only.
 */
#ifndef RINGFORT_VM_SNAPSHOT_PACK_H
#define RINGFORT_VM_SNAPSHOT_PACK_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "memory/memory.h"

#define SNAPSHOT_PACKED "memory.zst"
#define SNAPSHOT_CHUNK_PAGES 32u
#define SNAPSHOT_CHUNK_SIZE (SNAPSHOT_CHUNK_PAGES * GUEST_PAGE_SIZE)

/* From the memory file to a new, synced file. One thread. 0, -ECANCELED, or a negative errno (silent). */
int snapshot_pack(int memory_fd, int packed_fd, const _Atomic bool *cancel);

struct snapshot_packed {
    int fd;                     /* borrowed */
    uint32_t pages;             /* of the memory file */
    uint32_t *content;          /* of each page: its number, 0: zeroes */
    uint32_t contents, chunks;
    struct snapshot_chunk {
        uint64_t offset, hash;
        uint32_t length;
    } *chunk;
};

/*
 * Reads and checks what says where everything is; fd has to stay open. 0, -EINVAL when that is damaged or not of a memory file of so
 * many pages, or another negative errno (silent); then nothing is to be closed.
 */
int snapshot_packed_open(struct snapshot_packed *p, int fd, uint64_t pages);
void snapshot_packed_close(struct snapshot_packed *p);

static inline uint32_t snapshot_chunk_of(uint32_t content) { return (content - 1) / SNAPSHOT_CHUNK_PAGES; }
/* The contents that it has; all chunks but the last one are full. */
static inline uint32_t snapshot_chunk_first(uint32_t chunk) { return chunk * SNAPSHOT_CHUNK_PAGES + 1; }
uint32_t snapshot_chunk_contents(const struct snapshot_packed *p, uint32_t chunk);

/* What one thread needs to unpack; NULL: out of memory. */
struct snapshot_unpacker;
struct snapshot_unpacker *snapshot_unpacker_create(void);
void snapshot_unpacker_free(struct snapshot_unpacker *u);
/* A chunk's contents, page by page, valid until the next call. NULL with *err: -EINVAL: it is damaged, or another negative errno (silent). */
const uint8_t *snapshot_unpack(struct snapshot_unpacker *u, const struct snapshot_packed *p, uint32_t chunk, int *err);

#endif
