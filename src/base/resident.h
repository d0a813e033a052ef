/*
 * How much memory this process takes for itself: its resident memory without the guest's RAM.
 *
 * Guest RAM is shared memory (memfd), which Linux counts as RssShmem; everything else that the
 * process has is RssAnon or RssFile of /proc/self/status, except shared memory of its own, which
 * who makes it reports here. The peak comes from two sources, and the greater one holds:
 *   - samples: RssAnon + RssFile + own shared memory, taken by resident_note(). Call it from a
 *     timer and before a big piece of memory is given back.
 *   - the process's high-water mark, VmHWM, less the most guest RAM that any sample saw: never
 *     more than what there was at that mark, provided that resident_note() is called before guest
 *     RAM is given back.
 *
 * Any thread.
 */
#ifndef RINGFORT_BASE_RESIDENT_H
#define RINGFORT_BASE_RESIDENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Takes a sample: some 30 µs. False when /proc does not tell (then nothing is known). */
bool resident_note(void);
/* Bytes at this moment: guest RAM, and what the process has for itself. False: /proc does not tell. */
struct resident {
    uint64_t shared, own;
};
bool resident_read(struct resident *out);
/* Bytes of shared memory that are no guest RAM became resident, each mapping of them counted. */
void resident_add_shared(size_t bytes);
void resident_remove_shared(size_t bytes);
/* Bytes; the greatest that the samples and the high-water mark prove. 0 before the first sample. */
uint64_t resident_peak(void);

#endif
