/*
 * A snapshot's RAM in a file that is kept or sent, not run from: compressed by zstd, with a window that is long enough to find
 * pages again that occurred before, and without pages of zeroes.
 *
 * The stream inside is a sequence of records: u64 offset in the memory file, u32 length in bytes (at most SNAPSHOT_PACK_RECORD, whole
 * pages), the bytes; a record of length 0 ends it. Behind it, and last in the file, is a frame that zstd skips, with the XXH3-64 of all bytes
before: damage is refused also where it would unpack to the right pages. Little-endian. One thread; for the snapshot_*.c files only.
 */
#ifndef RINGFORT_VM_SNAPSHOT_PACK_H
#define RINGFORT_VM_SNAPSHOT_PACK_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#define SNAPSHOT_PACKED "memory.zst"
#define SNAPSHOT_PACK_RECORD 65536u

struct memory;

/* From the memory file to a new, synced file. 0, -ECANCELED, or a negative errno (silent). */
int snapshot_pack(int memory_fd, int packed_fd, const _Atomic bool *cancel);
/* Into RAM that nobody has used. 0, -EINVAL when the file is damaged, or a negative errno (silent). */
int snapshot_unpack(int packed_fd, struct memory *m);

#endif
