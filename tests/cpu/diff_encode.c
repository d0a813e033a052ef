/*
 * Random bytes in the shape of each encoding space: most decode to something, all spaces come up, and operands vary. Which of them are
 * instructions the decoder says.
 *
 * For few wanted instructions that would take long. So encodings of them are searched once, and most tries begin as one of those.
 */
#include <string.h>

#include "base/util.h"
#include "diff_encode.h"
#include "isa/x86/insn.h"

struct encoder {
    struct rng *rng;
    unsigned code_size;
};

static void put(struct bytes *o, unsigned b) { o->b[o->n++] = (uint8_t)b; }

static void fill(struct encoder *e, struct bytes *o)
{
    while (o->n < X86_MAX_INSN + 1)
        put(o, rng64(e->rng) >> 56);
}

static void prefixes(struct encoder *e, struct bytes *o, unsigned percent66, unsigned percent_rep)
{
    static const uint8_t segments[] = { 0x64, 0x65, 0x64, 0x65, 0x2e, 0x36, 0x3e, 0x26 };
    struct rng *r = e->rng;

    if (rng_percent(r, percent66))
        put(o, 0x66);
    if (rng_percent(r, percent_rep))
        put(o, rng_percent(r, 50) ? 0xf2 : 0xf3);
    if (rng_percent(r, 5))
        put(o, 0x67);
    if (rng_percent(r, 6))
        put(o, RNG_PICK(r, segments));
}

static void rex(struct encoder *e, struct bytes *o)
{
    if (e->code_size == 8 && rng_percent(e->rng, 60))
        put(o, 0x40 | (rng64(e->rng) >> 60));
}

/* ModRM with registers in 40 of 100 cases; the rest is random. */
static void modrm(struct encoder *e, struct bytes *o)
{
    uint64_t v = rng64(e->rng);
    unsigned m = rng_percent(e->rng, 40) ? 3 : (unsigned)(v >> 8) % 3;

    put(o, (v & 0x3f) | m << 6);
    for (unsigned i = 0; i < 12; i++)
        put(o, v >> (16 + i * 4));
}

static void encode_one_byte(struct encoder *e, struct bytes *o)
{
    prefixes(e, o, 20, 4);
    if (rng_percent(e->rng, 3))
        put(o, 0xf0);
    rex(e, o);
    put(o, rng64(e->rng) >> 56);
    modrm(e, o);
}

static void encode_two_byte(struct encoder *e, struct bytes *o)
{
    prefixes(e, o, 30, 35);
    rex(e, o);
    put(o, 0x0f);
    put(o, rng64(e->rng) >> 56);
    modrm(e, o);
}

static void encode_three_byte(struct encoder *e, struct bytes *o)
{
    prefixes(e, o, 60, 15);
    rex(e, o);
    put(o, 0x0f);
    put(o, rng_percent(e->rng, 70) ? 0x38 : 0x3a);
    put(o, rng64(e->rng) >> 56);
    modrm(e, o);
}

static void encode_vex(struct encoder *e, struct bytes *o)
{
    uint64_t v = rng64(e->rng);
    unsigned vvvv = rng_percent(e->rng, 35) ? 0x78 : (unsigned)(v & 0x78);

    if (rng_percent(e->rng, 8))
        prefixes(e, o, 0, 0);
    if (rng_percent(e->rng, 25)) {
        put(o, 0xc5);
        put(o, (v & 0x87) | vvvv | (e->code_size == 8 ? 0 : 0xc0));
    } else {
        unsigned high = e->code_size == 8 ? v >> 8 & 0xe0 : 0xe0;

        put(o, 0xc4);
        put(o, high | (1 + (v >> 16) % 3));
        put(o, (v & 0x87) | vvvv);
    }
    put(o, v >> 24);
    modrm(e, o);
}

static void encode_evex(struct encoder *e, struct bytes *o)
{
    uint64_t v = rng64(e->rng);
    unsigned vvvv = rng_percent(e->rng, 35) ? 0x78 : (unsigned)(v & 0x78);
    unsigned v_high = vvvv == 0x78 || rng_percent(e->rng, 50) ? 8 : 0;
    unsigned control = (unsigned)(v >> 8 & 0x70) | (rng_percent(e->rng, 25) ? 0x80 : 0);

    if (rng_percent(e->rng, 8))
        prefixes(e, o, 0, 0);
    put(o, 0x62);
    put(o, (e->code_size == 8 ? v >> 16 & 0xf0 : 0xf0) | (1 + (v >> 24) % 3));
    put(o, (v & 0x83) | vvvv | 4);
    put(o, control | v_high | (rng_percent(e->rng, 40) ? 0 : v >> 32 & 7));
    put(o, v >> 40);
    modrm(e, o);
}

static void encode_x87(struct encoder *e, struct bytes *o)
{
    prefixes(e, o, 8, 0);
    rex(e, o);
    put(o, 0xd8 | (rng64(e->rng) >> 61));
    modrm(e, o);
}

static void encode_string(struct encoder *e, struct bytes *o)
{
    static const uint8_t opcodes[] = { 0xa4, 0xa5, 0xa6, 0xa7, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf };

    prefixes(e, o, 15, 70);
    rex(e, o);
    put(o, RNG_PICK(e->rng, opcodes));
}

static void encode_branch(struct encoder *e, struct bytes *o)
{
    struct rng *r = e->rng;
    unsigned cc = rng_below(r, 16);

    prefixes(e, o, 3, 3);
    switch (rng_below(r, 8)) {
    case 0: case 1: put(o, 0x70 | cc); break;
    case 2: put(o, 0x0f), put(o, 0x80 | cc); break;
    case 3: put(o, 0xe0 | rng_below(r, 4)); break;
    case 4: put(o, 0xe8 | rng_below(r, 2)); break;
    case 5: put(o, rng_percent(r, 50) ? 0xeb : 0xe8); break;
    case 6: rex(e, o), put(o, rng_percent(r, 80) ? 0xc3 : 0xc2); break;
    default:
        rex(e, o), put(o, 0xff);
        put(o, (rng64(r) & 0xc7) | (rng_percent(r, 50) ? 0x10 : 0x20));
    }
    modrm(e, o);
}

static void encode_stack(struct encoder *e, struct bytes *o)
{
    static const uint8_t opcodes[] = { 0x68, 0x6a, 0x8f, 0xff, 0xc8, 0xc9, 0x9c, 0x9d };
    struct rng *r = e->rng;
    unsigned opcode = rng_percent(r, 60) ? 0x50 | rng_below(r, 16) : RNG_PICK(r, opcodes);

    prefixes(e, o, 12, 0);
    rex(e, o);
    put(o, opcode);
    if (opcode == 0xc8) {
        put(o, rng64(r)), put(o, rng_percent(r, 80) ? 0 : 1);
        put(o, rng_percent(r, 60) ? 0 : rng_below(r, 40));
        return;
    }
    modrm(e, o);
    if (opcode == 0x8f || opcode == 0xff)
        o->b[o->n - 13] = (uint8_t)((o->b[o->n - 13] & 0xc7) | (opcode == 0xff ? 0x30 : 0));
}

/* Read-modify-write instructions with LOCK, most of which must name memory. */
static void encode_locked(struct encoder *e, struct bytes *o)
{
    static const uint8_t one[] = { 0x00, 0x08, 0x10, 0x18, 0x20, 0x28, 0x30 };
    static const uint8_t group[] = { 0x80, 0x81, 0x83, 0xf6, 0xf7, 0xfe, 0xff, 0x86, 0x87 };
    static const uint8_t two[] = { 0xab, 0xb3, 0xbb, 0xba, 0xb0, 0xb1, 0xc0, 0xc1, 0xc7 };
    struct rng *r = e->rng;

    prefixes(e, o, 15, 3);
    if (rng_percent(r, 85))
        put(o, 0xf0);
    rex(e, o);
    switch (rng_below(r, 3)) {
    case 0: put(o, RNG_PICK(r, one) | rng_below(r, 2)); break;
    case 1: put(o, RNG_PICK(r, group)); break;
    default: put(o, 0x0f), put(o, RNG_PICK(r, two));
    }
    modrm(e, o);
    if (rng_percent(r, 90))
        o->b[o->n - 13] &= 0x3f | (rng_percent(r, 50) ? 0x80 : 0x40);
}

/* Groups 15 and 9: images of the extended state, MXCSR, fences; CMPXCHG16B. */
static void encode_state(struct encoder *e, struct bytes *o)
{
    prefixes(e, o, 5, 5);
    rex(e, o);
    put(o, 0x0f);
    put(o, rng_percent(e->rng, 75) ? 0xae : 0xc7);
    modrm(e, o);
    if (rng_percent(e->rng, 85))
        o->b[o->n - 13] &= 0x3f | (rng_percent(e->rng, 50) ? 0x80 : 0x40);
}

/* Gather and scatter: VSIB, which random bytes seldom make. */
static void encode_vsib(struct encoder *e, struct bytes *o)
{
    struct rng *r = e->rng;
    unsigned start;

    if (rng_percent(r, 50)) {
        encode_evex(e, o);
        start = o->n - 14;
        o->b[start - 3] = (uint8_t)((o->b[start - 3] & 0xf0) | 2);
        o->b[start - 2] = (uint8_t)((o->b[start - 2] & 0x80) | 0x7d);
        o->b[start - 1] = (uint8_t)((o->b[start - 1] & 0x68) | (1 + rng_below(r, 7)));
        o->b[start] = (uint8_t)((rng_percent(r, 50) ? 0x90 : 0xa0) + rng_below(r, 4));
    } else {
        encode_vex(e, o);
        start = o->n - 14;
        if (start < 3 || o->b[start - 3] != 0xc4)
            return;
        o->b[start - 2] = (uint8_t)((o->b[start - 2] & 0xe0) | 2);
        o->b[start - 1] = (uint8_t)((o->b[start - 1] & 0xfc) | 1);
        o->b[start] = (uint8_t)(0x90 + rng_below(r, 4));
    }
    /* ModRM: memory with SIB. */
    o->b[start + 1] = (uint8_t)((o->b[start + 1] & 0x38) | 4 | rng_below(r, 3) << 6);
}

static void any_space(struct encoder *e, struct bytes *o)
{
    static const struct { void (*fn)(struct encoder *, struct bytes *); unsigned weight; } spaces[] = {
        { encode_one_byte, 24 }, { encode_two_byte, 18 }, { encode_three_byte, 8 }, { encode_vex, 13 }, { encode_evex, 16 },
        { encode_x87, 9 }, { encode_string, 4 }, { encode_branch, 5 }, { encode_stack, 5 }, { encode_locked, 5 },
        { encode_state, 3 }, { encode_vsib, 2 },
    };
    unsigned at = rng_below(e->rng, 112);

    o->n = 0;
    for (unsigned i = 0;; i++) {
        if (at < spaces[i].weight) {
            spaces[i].fn(e, o);
            break;
        }
        at -= spaces[i].weight;
    }
    fill(e, o);
}

void encode_random(struct bytes *o, struct rng *r, unsigned code_size)
{
    struct encoder e = { r, code_size };

    any_space(&e, o);
}

/* ---- wanted ones ---- */

void encode_find(struct encode_pool *p, unsigned code_size, bool (*wanted)(void *opaque, const struct x86_insn *insn), void *opaque)
{
    struct rng r = { code_size };
    struct x86_insn insn;
    struct bytes o;
    bool gp;

    p->searched = true;
    p->count = 0;
    for (unsigned i = 0; i < ENCODE_TRIES && p->count < ENCODE_POOL; i++) {
        encode_random(&o, &r, code_size);
        if (x86_decode(&insn, o.b, X86_MAX_INSN, code_size, &gp) || !wanted(opaque, &insn))
            continue;
        p->kept[p->count].bytes = o;
        p->kept[p->count++].modrm = insn.modrm_offset;
    }
}

/* The prefixes and the opcode of a kept one, with other operands; or another form of the same, one time in eight. */
void encode_like(struct bytes *o, const struct encode_pool *p, struct rng *r, unsigned code_size)
{
    struct encoder e = { r, code_size };
    unsigned i = p->count ? rng_below(r, p->count) : 0;

    if (!p->count || rng_percent(r, 12)) {
        any_space(&e, o);
        return;
    }
    *o = p->kept[i].bytes;
    if (!p->kept[i].modrm)
        return;
    o->n = p->kept[i].modrm;
    modrm(&e, o);
    if (rng_percent(r, 50))     /* the same group: its opcode goes on in ModRM */
        o->b[p->kept[i].modrm] = (uint8_t)((o->b[p->kept[i].modrm] & 0xc7) | (p->kept[i].bytes.b[p->kept[i].modrm] & 0x38));
    fill(&e, o);
}
