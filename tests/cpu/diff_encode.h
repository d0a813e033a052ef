/* Bytes that may be instructions (diff_encode.c). What comes out depends on the random numbers and the arguments alone. */
#ifndef RINGFORT_TESTS_CPU_DIFF_ENCODE_H
#define RINGFORT_TESTS_CPU_DIFF_ENCODE_H

#include "diff.h"

struct x86_insn;

struct bytes {
    uint8_t b[24];              /* at least X86_MAX_INSN + 1 of them */
    unsigned n;
};

void encode_random(struct bytes *o, struct rng *r, unsigned code_size);

/* Encodings that decode to wanted instructions. */
#define ENCODE_POOL 512u
#define ENCODE_TRIES 1000000u
struct encode_pool {
    bool searched;
    unsigned count;
    struct { struct bytes bytes; uint8_t modrm; } kept[ENCODE_POOL];    /* modrm: its offset, or 0 */
};
/* The same each time for the same code size and wish. */
void encode_find(struct encode_pool *p, unsigned code_size, bool (*wanted)(void *opaque, const struct x86_insn *insn), void *opaque);
/* Like one of them, often; as encode_random() if there are none. */
void encode_like(struct bytes *o, const struct encode_pool *p, struct rng *r, unsigned code_size);

#endif
