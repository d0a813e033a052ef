/*
 * What memcheck and diskcheck have in common: which block of 4 KiB is next, what it holds that was written so often, the time, and
 * what they print.
 */
#ifndef RINGFORT_TESTS_BOOT_PATTERN_H
#define RINGFORT_TESTS_BOOT_PATTERN_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define BLOCK 4096u
#define WORDS (BLOCK / 8)

/* seq: how often it was written; 0: never, it is zero. */
static inline uint64_t word(uint64_t block, uint64_t seq, unsigned i)
{
    return seq ? (block * 0x9e3779b97f4a7c15ull + seq * 0xbf58476d1ce4e5b9ull) ^ i : 0;
}

/* Whether the block holds that; else it is said. */
static inline bool holds(const uint64_t *p, const char *what, uint64_t block, uint64_t seq)
{
    for (unsigned i = 0; i < WORDS; i++)
        if (p[i] != word(block, seq, i)) {
            printf("@lost %s %llu word %u holds %llx, not write %llu\n", what, (unsigned long long)block, i,
                   (unsigned long long)p[i], (unsigned long long)seq);
            return false;
        }
    return true;
}

static inline void write_again(uint64_t *p, uint64_t block, uint64_t seq)
{
    for (unsigned i = 0; i < WORDS; i++)
        p[i] = word(block, seq, i);
}

/* Not by chance: the same ones each time. */
static inline uint64_t next_random(void)
{
    static uint64_t x = 88172645463325252ull;

    x ^= x << 13;
    x ^= x >> 7;
    return x ^= x << 17;
}

/* Seconds. */
static inline double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* How far it is: "WORD N", at most once in so many seconds. From the program's last arguments: milliseconds, WORD. */
struct reports {
    double every, said;
    const char *word;
};

static inline struct reports reports_init(char **arguments)
{
    struct reports r = { .every = 1, .said = now(), .word = "@check" };

    if (arguments[0]) {
        r.every = atof(arguments[0]) / 1000;
        r.word = arguments[1] ? arguments[1] : r.word;
    }
    return r;
}

static inline void report(struct reports *r, uint64_t checked)
{
    double t = now();

    if (t - r->said < r->every)
        return;
    r->said = t;
    printf("%s %llu\n", r->word, (unsigned long long)checked);
}

#endif
