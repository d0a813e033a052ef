/*
 * Cases of a shape: longer sequences of common instructions that a translator optimizes together. See diff.h.
 *
 *   groups    many accesses off one base that is moved and copied in between, over the ends of pages with other permissions
 *   stack     PUSH, POP, CALL, RET, LEAVE, also returns to where nothing was called from
 *   loops     counted loops, nested, that walk memory until it faults, and flags that live across branches
 *   vectors   the same with SSE, AVX and AVX-512 registers
 *   mixed     all of that in one case
 *   walks     loops over pages whose accesses all move by constants, up or down, by pointers and by indexes
 *   self      loops that write their own code: constants, displacements, opcodes, conditions, ahead and behind
 *
 * 64-bit code. Instructions that a model or the host lacks raise on both sides, which is as good a case as any.
 */
#include <stdio.h>
#include <string.h>

#include "diff.h"
#include "isa/x86/insn.h"

#define MAX_SKIPS 4

struct shape {
    struct cpu_case *c;
    struct rng *r;
    unsigned base;              /* register that accesses go off */
    unsigned index, scale;      /* the last index that one of them had; 4: none yet */
    unsigned counters;          /* registers that count the loops around, a bit for each: not written otherwise */
    unsigned pointers;          /* registers that hold addresses, a bit for each: not written but moved */
    struct { unsigned at, insns; } skip[MAX_SKIPS];     /* rel32 of forward branches, and how many instructions are left */
    unsigned skips;
};

/* ---- encoding ---- */

static bool has_room(const struct shape *s, unsigned insns)
{
    return s->c->bytes + 16u * insns < MAX_CODE - 32 && s->c->insns + insns < MAX_INSNS;
}

static void set_rel32(struct cpu_case *c, unsigned at, unsigned target)
{
    int32_t rel = (int32_t)target - (int32_t)(at + 4);

    memcpy(c->code + at, &rel, 4);
}

/* Adds one instruction, and lets forward branches land. */
static void add(struct shape *s, const uint8_t *bytes, unsigned n)
{
    struct cpu_case *c = s->c;
    struct x86_insn insn;
    bool gp;

    memcpy(c->code + c->bytes, bytes, n);
    c->insn[c->insns] = (struct case_insn){ .offset = c->bytes, .length = (uint8_t)n };
    if (x86_decode(&insn, bytes, n, 8, &gp) == 0)
        c->insn[c->insns].mnemonic = insn.mnemonic;
    c->insns++;
    c->bytes = (uint16_t)(c->bytes + n);
    for (unsigned i = 0; i < s->skips;) {
        if (s->skip[i].insns-- > 1) {
            i++;
            continue;
        }
        set_rel32(c, s->skip[i].at, c->bytes);
        s->skip[i] = s->skip[--s->skips];
    }
}

/* prefix (or 0), REX, opcode (up to three bytes, highest first), ModRM with [base + index * scale + disp] or a register, immediate. */
struct encoding {
    unsigned prefix, opcode, reg, rm;
    bool w, memory, byte;
    unsigned index, scale;      /* index 4: none */
    int32_t disp;
    unsigned imm_size;
    uint32_t imm;
};

static void encode(struct shape *s, struct encoding e)
{
    uint8_t b[16];
    unsigned n = 0, rex = (e.w ? 8u : 0) | (e.reg >> 3 & 1) << 2 | (e.rm >> 3 & 1);

    if (e.memory && e.index != 4)
        rex |= (e.index >> 3 & 1) << 1;
    if (e.prefix)
        b[n++] = (uint8_t)e.prefix;
    if (rex || e.byte)
        b[n++] = (uint8_t)(0x40 | rex);
    if (e.opcode > 0xffff)
        b[n++] = (uint8_t)(e.opcode >> 16);
    if (e.opcode > 0xff)
        b[n++] = (uint8_t)(e.opcode >> 8);
    b[n++] = (uint8_t)e.opcode;
    if (!e.memory) {
        b[n++] = (uint8_t)(0xc0 | (e.reg & 7) << 3 | (e.rm & 7));
    } else {
        bool short_disp = e.disp == (int8_t)e.disp;
        bool sib = e.index != 4 || (e.rm & 7) == 4;

        b[n++] = (uint8_t)((short_disp ? 0x40 : 0x80) | (e.reg & 7) << 3 | (sib ? 4 : e.rm & 7));
        if (sib)
            b[n++] = (uint8_t)(e.scale << 6 | (e.index & 7) << 3 | (e.rm & 7));
        memcpy(b + n, &e.disp, 4);
        n += short_disp ? 1 : 4;
    }
    memcpy(b + n, &e.imm, 4);
    add(s, b, n + e.imm_size);
}

/* ---- registers and addresses ---- */

/* One that holds data: no pointer, no counter, not RSP. */
static unsigned data_register(struct shape *s)
{
    unsigned r;

    do
        r = rng_below(s->r, 16);
    while (r == RSP || (s->counters | s->pointers) >> r & 1);
    return r;
}

static void new_pointer(struct shape *s)
{
    static const uint8_t any[] = { RAX, RDX, RBX, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15 };
    uint64_t start = rng_percent(s->r, 50) ? WINDOW_LOW : WINDOW_HIGH;
    unsigned offset;

    do
        s->base = RNG_PICK(s->r, any);
    while (s->counters >> s->base & 1);
    s->pointers |= 1u << s->base;
    /* Mostly where all around is writable; often near the end of a page. */
    offset = 0x1000 * (1 + rng_below(s->r, WINDOW_PAGES - 2));
    offset += rng_percent(s->r, 60) ? rng_below(s->r, 4096) : rng_percent(s->r, 50) ? 4096 - rng_below(s->r, 96) : rng_below(s->r, 96);
    s->c->in.gpr[s->base] = start + offset;
}

static int32_t displacement(struct shape *s)
{
    switch (rng_below(s->r, 4)) {
    case 0: return (int32_t)(8 * rng_below(s->r, 12));
    case 1: return (int32_t)rng_below(s->r, 128) - 64;
    case 2: return (int32_t)(4 * rng_below(s->r, 64)) - 128;
    default: return (int32_t)rng_below(s->r, 1024) - 512;
    }
}

static struct encoding at_base(struct shape *s, unsigned opcode)
{
    return (struct encoding){ .opcode = opcode, .rm = s->base, .memory = true, .index = 4, .disp = displacement(s),
                              .w = rng_percent(s->r, 50) };
}

/* ---- pieces ---- */

static void access(struct shape *s)
{
    static const uint8_t alu[] = { 0x01, 0x03, 0x09, 0x0b, 0x21, 0x23, 0x29, 0x2b, 0x31, 0x33, 0x39, 0x3b, 0x11, 0x13, 0x19, 0x1b, 0x85 };
    struct encoding e = at_base(s, 0x8b);

    e.reg = data_register(s);
    switch (rng_below(s->r, 12)) {
    case 0: case 1: case 2: break;
    case 3: case 4: case 5: e.opcode = 0x89; break;
    case 6: e.opcode = RNG_PICK(s->r, alu); break;
    case 7: e.opcode = rng_percent(s->r, 50) ? 0x0fb6 : 0x0fbf; break;
    case 8: e.opcode = rng_percent(s->r, 50) ? 0x88 : 0x8a; e.byte = true; break;
    case 9: e.opcode = 0xc7; e.reg = 0; e.imm_size = 4; e.imm = (uint32_t)rng64(s->r); break;
    case 10: e.opcode = 0x83; e.reg = rng_below(s->r, 8); e.imm_size = 1; e.imm = rng_below(s->r, 256); break;
    default: e.opcode = 0x87; break;
    }
    if (rng_percent(s->r, 20)) {        /* an index that is small, or not; often the one from before */
        if (s->index == 4 || rng_percent(s->r, 40)) {
            s->index = data_register(s);
            s->scale = rng_below(s->r, 4);
            if (rng_percent(s->r, 85))
                s->c->in.gpr[s->index] = rng_below(s->r, 16);
        }
        e.index = s->index;
        e.scale = s->scale;
    }
    encode(s, e);
}

/* The base moves, or another register takes its place. */
static void move_base(struct shape *s)
{
    unsigned other;

    switch (rng_below(s->r, 5)) {
    case 0:
        encode(s, (struct encoding){ .opcode = 0x83, .w = true, .reg = rng_percent(s->r, 70) ? 0 : 5, .rm = s->base, .imm_size = 1,
                                     .imm = 8 * rng_below(s->r, 8) });
        break;
    case 1:
        encode(s, (struct encoding){ .opcode = 0x8d, .w = true, .reg = s->base, .rm = s->base, .memory = true, .index = 4,
                                     .disp = (int32_t)rng_below(s->r, 128) - 64 });
        break;
    case 2:
        encode(s, (struct encoding){ .opcode = 0xff, .w = true, .reg = rng_below(s->r, 2), .rm = s->base });
        break;
    default:
        other = data_register(s);
        encode(s, (struct encoding){ .opcode = 0x89, .w = true, .reg = s->base, .rm = other });
        if (__builtin_popcount(s->pointers) < 5) {
            s->pointers |= 1u << other;
            s->base = other;
        }
    }
}

static void compute(struct shape *s)
{
    static const uint8_t alu[] = { 0x01, 0x09, 0x11, 0x19, 0x21, 0x29, 0x31, 0x39, 0x85 };
    unsigned a = data_register(s), b = data_register(s);

    switch (rng_below(s->r, 9)) {
    case 0: case 1: case 2:
        encode(s, (struct encoding){ .opcode = RNG_PICK(s->r, alu), .w = rng_percent(s->r, 50), .reg = a, .rm = b });
        break;
    case 3:
        encode(s, (struct encoding){ .opcode = 0x0f90 + rng_below(s->r, 16), .byte = true, .rm = a });
        break;
    case 4:
        encode(s, (struct encoding){ .opcode = 0x0f40 + rng_below(s->r, 16), .w = rng_percent(s->r, 50), .reg = a, .rm = b });
        break;
    case 5:
        encode(s, (struct encoding){ .opcode = 0xff, .w = rng_percent(s->r, 50), .reg = rng_below(s->r, 2), .rm = a });
        break;
    case 6:
        encode(s, (struct encoding){ .opcode = 0xc1, .w = rng_percent(s->r, 50), .reg = rng_below(s->r, 8), .rm = a, .imm_size = 1,
                                     .imm = rng_below(s->r, 64) });
        break;
    case 7:
        encode(s, (struct encoding){ .opcode = 0x0faf, .w = rng_percent(s->r, 50), .reg = a, .rm = b });
        break;
    default:
        encode(s, (struct encoding){ .opcode = 0x81, .w = rng_percent(s->r, 50), .reg = rng_below(s->r, 8), .rm = a, .imm_size = 4,
                                     .imm = (uint32_t)rng64(s->r) });
    }
}

/* A conditional branch over some of what follows. */
static void branch_over(struct shape *s)
{
    uint8_t b[6] = { 0x0f, (uint8_t)(0x80 | rng_below(s->r, 16)) };

    if (s->skips == MAX_SKIPS)
        return;
    add(s, b, sizeof(b));
    s->skip[s->skips].at = s->c->bytes - 4u;
    s->skip[s->skips++].insns = 1 + rng_below(s->r, 4);
}

static void push_pop(struct shape *s)
{
    unsigned r = rng_percent(s->r, 70) ? data_register(s) : s->base;
    uint8_t b[2] = { (uint8_t)(0x40 | r >> 3) };

    b[1] = (uint8_t)((rng_percent(s->r, 50) || r == s->base ? 0x50 : 0x58) | (r & 7));
    add(s, b, 2);
}

/* VEX or EVEX, map 1 or 2. */
static void vector(struct shape *s)
{
    static const struct { uint8_t prefix, opcode; bool store; } sse[] = {
        { 0xf3, 0x6f, false }, { 0xf3, 0x7f, true }, { 0, 0x10, false }, { 0, 0x11, true }, { 0x66, 0xfe, false }, { 0x66, 0xef, false },
        { 0, 0x58, false }, { 0x66, 0x59, false }, { 0xf2, 0x58, false }, { 0xf3, 0x10, false }, { 0xf3, 0x11, true }, { 0xf2, 0x10, false },
        { 0x66, 0x6e, false }, { 0x66, 0x7e, true }, { 0x66, 0xdb, false }, { 0, 0xc6, false }, { 0x66, 0x70, false }, { 0x66, 0xd7, false },
    };
    unsigned k = rng_below(s->r, sizeof(sse) / sizeof(sse[0]));
    unsigned reg = rng_below(s->r, 16), vvvv = rng_below(s->r, 16), p = sse[k].prefix == 0x66 ? 1 : sse[k].prefix == 0xf3 ? 2 : sse[k].prefix == 0xf2 ? 3 : 0;
    bool memory = rng_percent(s->r, 65) && sse[k].opcode != 0xd7, imm = sse[k].opcode == 0xc6 || sse[k].opcode == 0x70;
    bool moves = sse[k].opcode == 0x6f || sse[k].opcode == 0x7f || sse[k].opcode == 0x10 || sse[k].opcode == 0x11 ||
                 sse[k].opcode == 0x6e || sse[k].opcode == 0x7e || sse[k].opcode == 0x70 || sse[k].opcode == 0xd7;
    unsigned rm = memory ? s->base : sse[k].opcode == 0x6e || sse[k].opcode == 0x7e ? data_register(s) : rng_below(s->r, 16);
    int32_t disp = displacement(s);
    uint8_t b[16];
    unsigned n = 0;

    if (sse[k].opcode == 0xd7)
        reg = data_register(s);
    if (rng_percent(s->r, 45)) {
        encode(s, (struct encoding){ .prefix = sse[k].prefix, .opcode = 0x0f00u | sse[k].opcode, .reg = reg, .rm = rm, .memory = memory,
                                     .index = 4, .disp = disp, .imm_size = imm, .imm = rng_below(s->r, 256) });
        return;
    }
    if (moves && !(sse[k].opcode == 0x10 && p >= 2 && !memory) && !(sse[k].opcode == 0x11 && p >= 2 && !memory))
        vvvv = 0;
    b[n++] = 0xc4;
    b[n++] = (uint8_t)((reg >> 3 & 1 ? 0 : 0x80) | 0x40 | (rm >> 3 & 1 ? 0 : 0x20) | 1);
    b[n++] = (uint8_t)((~vvvv & 15) << 3 | (rng_percent(s->r, 50) && p < 2 && sse[k].opcode != 0x6e && sse[k].opcode != 0x7e ? 4 : 0) | p);
    b[n++] = sse[k].opcode;
    if (!memory) {
        b[n++] = (uint8_t)(0xc0 | (reg & 7) << 3 | (rm & 7));
    } else {
        b[n++] = (uint8_t)(0x80 | (reg & 7) << 3 | (rm & 7));
        if ((rm & 7) == 4)
            b[n++] = 0x24;
        memcpy(b + n, &disp, 4);
        n += 4;
    }
    if (imm)
        b[n++] = (uint8_t)rng_below(s->r, 256);
    add(s, b, n);
}

static void piece(struct shape *s, unsigned percent_vectors)
{
    if (rng_percent(s->r, percent_vectors)) {
        vector(s);
        return;
    }
    switch (rng_below(s->r, 12)) {
    case 0: case 1: case 2: case 3: case 4: case 5: access(s); break;
    case 6: move_base(s); break;
    case 7: branch_over(s); break;
    case 8: push_pop(s); break;
    default: compute(s); break;
    }
}

static void pieces(struct shape *s, unsigned n, unsigned percent_vectors)
{
    while (n-- > 0 && has_room(s, 2))
        piece(s, percent_vectors);
}

/* No forward branch reaches further than this. */
static void land(struct shape *s)
{
    static const uint8_t nop[] = { 0x90 };

    while (s->skips && has_room(s, 1))
        add(s, nop, 1);
    while (s->skips)
        set_rel32(s->c, s->skip[--s->skips].at, s->c->bytes);
}

/* body n times, or until it faults. */
static void loop(struct shape *s, unsigned depth, unsigned percent_vectors)
{
    static const uint8_t counters[] = { RCX, R10, RDX, R15, RBX, R12, R8 };
    unsigned counter, start;
    uint8_t jnz[6] = { 0x0f, 0x85 };

    if (!has_room(s, 8))
        return;
    land(s);
    do
        counter = RNG_PICK(s->r, counters);
    while ((s->counters | s->pointers) >> counter & 1);
    s->counters |= 1u << counter;
    encode(s, (struct encoding){ .opcode = 0xc7, .rm = counter, .imm_size = 4, .imm = 1 + rng_below(s->r, depth ? 6 : 60) });
    start = s->c->bytes;
    pieces(s, 1 + rng_below(s->r, 7), percent_vectors);
    if (depth == 0 && rng_percent(s->r, 35))
        loop(s, 1, percent_vectors);
    if (rng_percent(s->r, 70) && has_room(s, 2))
        encode(s, (struct encoding){ .opcode = 0x81, .w = true, .reg = rng_percent(s->r, 80) ? 0 : 5, .rm = s->base, .imm_size = 4,
                                     .imm = 8u << rng_below(s->r, 7) });
    land(s);
    if (s->c->bytes + 16u < MAX_CODE && s->c->insns + 2u < MAX_INSNS) {
        encode(s, (struct encoding){ .opcode = 0xff, .w = true, .reg = 1, .rm = counter });
        add(s, jnz, sizeof(jnz));
        set_rel32(s->c, s->c->bytes - 4u, start);
    }
    s->counters &= ~(1u << counter);
}

/* Bytes that a pointer moves in each turn of a walk. */
static int walking_step(struct shape *s)
{
    int step = rng_percent(s->r, 70) ? 1 << rng_below(s->r, 7) : (int)rng_below(s->r, 100);

    return rng_percent(s->r, 70) ? step : -step;
}

static void add_constant(struct shape *s, unsigned reg, int step)
{
    encode(s, (struct encoding){ .opcode = 0x81, .w = true, .reg = rng_percent(s->r, 50) ? 0 : 5, .rm = reg, .imm_size = 4,
                                 .imm = (uint32_t)step });
}

/*
 * A loop that its translation can do without checks in between: until a counter is 0, an index has its end, or something faults. Sometimes one
 * access is made that does not move by a constant.
 */
static void walk(struct shape *s)
{
    static const uint8_t counters[] = { RCX, RDX, RBX, R12, R8, R15 };
    unsigned counter, index = 4, start, first = s->base;
    bool vectors = rng_percent(s->r, 40);
    uint8_t jcc[6] = { 0x0f, 0x85 };

    if (!has_room(s, 36))
        return;
    land(s);
    do
        counter = RNG_PICK(s->r, counters);
    while ((s->counters | s->pointers) >> counter & 1);
    s->counters |= 1u << counter;
    encode(s, (struct encoding){ .opcode = 0xc7, .rm = counter, .imm_size = 4, .imm = 1 + rng_below(s->r, 800) });
    if (rng_percent(s->r, 40)) {
        do
            index = data_register(s);
        while (index == 4);
        s->counters |= 1u << index;
        encode(s, (struct encoding){ .opcode = 0xc7, .rm = index, .imm_size = 4, .imm = rng_below(s->r, 64) });
    }
    start = s->c->bytes;
    for (unsigned n = 1 + rng_below(s->r, 6); n > 0; n--) {
        static const uint16_t moves[] = { 0x8b, 0x89, 0x03, 0x01, 0x39, 0x0fb6, 0x88, 0x8a, 0x33 };
        struct encoding e = { .opcode = RNG_PICK(s->r, moves), .reg = data_register(s), .rm = first, .memory = true, .index = 4,
                              .disp = (int32_t)(4 * rng_below(s->r, 12)) - 8, .w = rng_percent(s->r, 50) };

        e.byte = e.opcode == 0x88 || e.opcode == 0x8a;
        if (s->base != first && rng_percent(s->r, 50))
            e.rm = s->base;
        if (index != 4 && rng_percent(s->r, 70)) {
            e.index = rng_percent(s->r, 90) ? index : data_register(s);
            e.scale = rng_below(s->r, 4);
            if (e.index == 4)
                e.index = index;
        }
        if (rng_percent(s->r, 25))
            compute(s);
        else if (rng_percent(s->r, 15))
            branch_over(s);
        if (vectors && rng_percent(s->r, 50)) {
            e.opcode = rng_percent(s->r, 50) ? 0x0f28 : 0x0f10;         /* MOVAPS, MOVUPS: loads and stores */
            e.opcode += rng_percent(s->r, 40);
            e.reg = rng_below(s->r, 16);
        }
        encode(s, e);
    }
    land(s);
    add_constant(s, first, walking_step(s));
    if (s->base != first && rng_percent(s->r, 60))
        add_constant(s, s->base, walking_step(s));
    if (index != 4)
        add_constant(s, index, walking_step(s));
    encode(s, (struct encoding){ .opcode = 0x83, .w = true, .reg = 5, .rm = counter, .imm_size = 1, .imm = 1 });
    add(s, jcc, sizeof(jcc));
    set_rel32(s->c, s->c->bytes - 4u, start);
    s->counters &= ~(1u << counter | (index != 4 ? 1u << index : 0));
}

/*
 *     call f;  …;  jmp end
 * f:  …;  a way to return
 */
static void call(struct shape *s, unsigned depth)
{
    static const uint8_t rel32[] = { 0xe8, 0, 0, 0, 0 }, jump[] = { 0xe9, 0, 0, 0, 0 }, ret[] = { 0xc3 };
    static const uint8_t ret8[] = { 0xc2, 8, 0 }, drop[] = { 0x48, 0x83, 0xc4, 8 }, push_top[] = { 0xff, 0x34, 0x24 };
    static const uint8_t pop_r9[] = { 0x41, 0x59 }, jmp_r9[] = { 0x41, 0xff, 0xe1 }, push_rbp[] = { 0x55 }, leave[] = { 0xc9 };
    static const uint8_t mov_rbp[] = { 0x48, 0x89, 0xe5 }, swap[] = { 0x48, 0x87, 0x04, 0x24 };
    unsigned to_function, to_end, times = 1 + rng_below(s->r, 3);
    unsigned calls[3];

    if (!has_room(s, 14))
        return;
    land(s);
    for (unsigned i = 0; i < times; i++) {
        add(s, rel32, sizeof(rel32));
        calls[i] = s->c->bytes - 4u;
        pieces(s, rng_below(s->r, 2), 0);
    }
    land(s);
    add(s, jump, sizeof(jump));
    to_end = s->c->bytes - 4u;
    to_function = s->c->bytes;
    for (unsigned i = 0; i < times; i++)
        set_rel32(s->c, calls[i], to_function);
    pieces(s, rng_below(s->r, 3), 0);
    land(s);
    if (depth < 2 && rng_percent(s->r, 40))
        call(s, depth + 1);
    switch (rng_below(s->r, 10)) {
    case 0: add(s, ret8, sizeof(ret8)); break;
    case 1: add(s, drop, sizeof(drop)); add(s, ret, 1); break;          /* to the caller's caller, or nowhere */
    case 2: add(s, pop_r9, 2); add(s, jmp_r9, 3); break;
    case 3: add(s, push_top, 3); add(s, ret, 1); break;                 /* comes back twice */
    case 4: add(s, push_rbp, 1); add(s, mov_rbp, 3); pieces(s, 1, 0); land(s); add(s, leave, 1); add(s, ret, 1); break;
    case 5: add(s, swap, 4); add(s, ret, 1); break;                     /* to wherever RAX says */
    default: add(s, ret, 1);
    }
    set_rel32(s->c, to_end, s->c->bytes);
}

/* ---- code that changes ---- */

enum victim { VICTIM_IMM, VICTIM_ALU, VICTIM_CONDITION, VICTIMS };
#define MAX_VICTIMS 12

/* Bytes of instructions that may become others, and stores to some of them that do not know yet to which. */
struct changes {
    struct { enum victim kind; unsigned at; } victim[MAX_VICTIMS], store[MAX_VICTIMS];
    unsigned victims, stores;
};

static const uint8_t alu_opcode[] = { 0x01, 0x09, 0x11, 0x19, 0x21, 0x29, 0x31, 0x39, 0x03, 0x2b, 0x33, 0x85, 0x87, 0x89, 0x8b };

static void note_victim(struct changes *k, enum victim kind, unsigned at)
{
    k->victim[k->victims].kind = kind;
    k->victim[k->victims++].at = at;
}

static void add_victim(struct shape *s, struct changes *k)
{
    static const uint8_t nop[] = { 0x90 };
    uint8_t jcc[2] = { (uint8_t)(0x70 | rng_below(s->r, 16)), 1 };
    unsigned a = data_register(s), b = data_register(s), n = k->victims;

    if (n == MAX_VICTIMS || !has_room(s, 2))
        return;
    switch (rng_below(s->r, 5)) {
    case 0:
        encode(s, (struct encoding){ .opcode = 0xc7, .w = rng_percent(s->r, 50), .rm = a, .imm_size = 4, .imm = (uint32_t)rng64(s->r) });
        note_victim(k, VICTIM_IMM, s->c->bytes - 4u);
        break;
    case 1:
        encode(s, (struct encoding){ .opcode = 0x81, .w = rng_percent(s->r, 50), .reg = rng_below(s->r, 8), .rm = a, .imm_size = 4,
                                     .imm = (uint32_t)rng64(s->r) });
        note_victim(k, VICTIM_IMM, s->c->bytes - 4u);
        break;
    case 2:                     /* LEA, whose displacement changes */
        encode(s, (struct encoding){ .opcode = 0x8d, .w = true, .reg = a, .rm = b, .memory = true, .index = 4, .disp = 0x12345678 });
        note_victim(k, VICTIM_IMM, s->c->bytes - 4u);
        break;
    case 3:                     /* without REX, or the opcode would be the third byte for some */
        encode(s, (struct encoding){ .opcode = RNG_PICK(s->r, alu_opcode), .w = true, .reg = a, .rm = b });
        note_victim(k, VICTIM_ALU, s->c->bytes - 2u);
        break;
    default:
        add(s, jcc, 2);
        note_victim(k, VICTIM_CONDITION, s->c->bytes - 2u);
        add(s, nop, 1);
    }
}

static void add_store(struct shape *s, struct changes *k)
{
    static const uint8_t lea_rdi[] = { 0x48, 0x8d, 0x3d, 0, 0, 0, 0 }, stosd[] = { 0xab };
    unsigned n = k->stores, a = data_register(s);
    enum victim kind = (enum victim)rng_below(s->r, VICTIMS);
    uint8_t to_imm[7] = { (uint8_t)(0x40 | (a >> 3) << 2), 0x89, (uint8_t)(5 | (a & 7) << 3) };
    uint8_t add_imm[7] = { 0x83, 0x05, 0, 0, 0, 0, (uint8_t)rng64(s->r) };
    uint8_t to_opcode[7] = { 0xc6, 0x05, 0, 0, 0, 0, RNG_PICK(s->r, alu_opcode) };

    if (n == MAX_VICTIMS || !has_room(s, 3))
        return;
    if (kind == VICTIM_CONDITION)
        to_opcode[6] = (uint8_t)(0x70 | rng_below(s->r, 16));
    k->store[n].kind = kind;
    k->stores++;
    if (kind != VICTIM_IMM) {
        add(s, to_opcode, 7);
        k->store[n].at = s->c->bytes - 5u;
    } else if (rng_percent(s->r, 50)) {
        add(s, to_imm, 7);
        k->store[n].at = s->c->bytes - 4u;
    } else if (rng_percent(s->r, 60) || (s->counters | s->pointers) >> RDI & 1) {
        add(s, add_imm, 7);
        k->store[n].at = s->c->bytes - 5u;
    } else {
        add(s, lea_rdi, 7);
        k->store[n].at = s->c->bytes - 4u;
        add(s, stosd, 1);
    }
}

/* Each store gets some victim of its kind; without one, the data that the base register is good for. */
static void resolve(struct shape *s, struct changes *k)
{
    for (unsigned i = 0; i < k->stores; i++) {
        unsigned at = k->store[i].at, first = rng_below(s->r, k->victims ? k->victims : 1), chosen = MAX_VICTIMS;
        unsigned after = 0;

        for (unsigned j = 0; j < k->victims && chosen == MAX_VICTIMS; j++)
            if (k->victim[(first + j) % k->victims].kind == k->store[i].kind)
                chosen = (first + j) % k->victims;
        for (unsigned j = 0; j < s->c->insns; j++)
            if (s->c->insn[j].offset < at && at < s->c->insn[j].offset + s->c->insn[j].length)
                after = s->c->insn[j].offset + s->c->insn[j].length;
        if (chosen < MAX_VICTIMS)
            set_rel32(s->c, at, k->victim[chosen].at - (after - (at + 4)));
        else
            set_rel32(s->c, at, (unsigned)(WINDOW_LOW + 0x2000 - CODE_BASE - s->c->start));
    }
}

/* A loop with all that in it. */
static void change_code(struct shape *s)
{
    static const uint8_t counters[] = { RCX, R10, RDX, R15, RBX, R12, R8 };
    uint8_t jnz[6] = { 0x0f, 0x85 };
    struct changes k = { .victims = 0 };
    unsigned counter, start;

    if (!has_room(s, 12))
        return;
    land(s);
    do
        counter = RNG_PICK(s->r, counters);
    while ((s->counters | s->pointers) >> counter & 1);
    s->counters |= 1u << counter;
    encode(s, (struct encoding){ .opcode = 0xc7, .rm = counter, .imm_size = 4, .imm = 1 + rng_below(s->r, 30) });
    start = s->c->bytes;
    for (unsigned n = 4 + rng_below(s->r, 16); n-- > 0 && has_room(s, 5);) {
        if (rng_percent(s->r, 40))
            add_victim(s, &k);
        else if (rng_percent(s->r, 40))
            add_store(s, &k);
        else
            pieces(s, 1, 10);
    }
    land(s);
    encode(s, (struct encoding){ .opcode = 0xff, .w = true, .reg = 1, .rm = counter });
    add(s, jnz, sizeof(jnz));
    set_rel32(s->c, s->c->bytes - 4u, start);
    s->counters &= ~(1u << counter);
    resolve(s, &k);
}

/* ---- cases ---- */

const char *const shape_names[] = { "groups", "stack", "loops", "vectors", "mixed", "self", "walks", NULL };

void generate_shape(struct cpu_case *c, unsigned shape, struct rng *r)
{
    struct shape s = { .c = c, .r = r, .index = 4 };
    unsigned what;

    for (unsigned i = 0; i < 16; i++)
        c->in.gpr[i] = rng_percent(r, 50) ? rng64(r) : rng_below(r, 256);
    c->in.gpr[RSP] = (rng_percent(r, 50) ? WINDOW_LOW : WINDOW_HIGH) + 0x1000 + 8 * rng_below(r, 512);
    new_pointer(&s);
    if (rng_percent(r, 30))
        new_pointer(&s);
    for (unsigned n = 2 + rng_below(r, 5); n > 0 && has_room(&s, 4); n--) {
        what = shape == 4 ? rng_below(r, 4) : shape;
        if (what == 5)
            change_code(&s);
        else if (what == 6)
            walk(&s);
        else if (what == 0)
            pieces(&s, 2 + rng_below(r, 10), 0);
        else if (what == 1)
            call(&s, 0);
        else if (what == 2)
            loop(&s, 0, 0);
        else if (rng_percent(r, 50))
            pieces(&s, 2 + rng_below(r, 8), 60);
        else
            loop(&s, 0, 60);
    }
    land(&s);
}
