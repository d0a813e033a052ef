/* Small definitions that every part uses. */
#ifndef RINGFORT_BASE_UTIL_H
#define RINGFORT_BASE_UTIL_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))
#define container_of(ptr, type, member) ((type *)((char *)(ptr) - offsetof(type, member)))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

#define KIB(n) ((uint64_t)(n) << 10)
#define MIB(n) ((uint64_t)(n) << 20)
#define GIB(n) ((uint64_t)(n) << 30)

static inline uint64_t align_down(uint64_t v, uint64_t a) { return v & ~(a - 1); }
static inline uint64_t align_up(uint64_t v, uint64_t a) { return (v + a - 1) & ~(a - 1); }

/* Unaligned loads and stores of little-endian values (the host is little-endian x86-64 or AArch64). */
#define DEFINE_LE(bits) \
    static inline uint##bits##_t load_le##bits(const void *p) \
    { \
        uint##bits##_t v; \
        memcpy(&v, p, sizeof(v)); \
        return v; \
    } \
    static inline void store_le##bits(void *p, uint##bits##_t v) { memcpy(p, &v, sizeof(v)); }
DEFINE_LE(16)
DEFINE_LE(32)
DEFINE_LE(64)
#undef DEFINE_LE

#endif
