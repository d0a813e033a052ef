/* What memcheck and diskcheck have in common: what a block of 4 KiB holds that was written so often, and the time. */
#ifndef RINGFORT_TESTS_BOOT_PATTERN_H
#define RINGFORT_TESTS_BOOT_PATTERN_H

#include <stdint.h>
#include <time.h>

#define BLOCK 4096u
#define WORDS (BLOCK / 8)

/* seq: how often it was written; 0: never, it is zero. */
static inline uint64_t word(uint64_t block, uint64_t seq, unsigned i)
{
    return seq ? (block * 0x9e3779b97f4a7c15ull + seq * 0xbf58476d1ce4e5b9ull) ^ i : 0;
}

/* Seconds. */
static inline double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

#endif
