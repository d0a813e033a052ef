/*
 * A small x86-64 host assembler: just the forms that translators emit. Knows nothing of guests.
 *
 * Code is written through one mapping and runs in another (code.h); positions are pointers into the
 * writable one. Running over the end is remembered, not written: check asm_full() at the end.
 */
#ifndef RINGFORT_ENGINE_TRANSLATE_ASM_H
#define RINGFORT_ENGINE_TRANSLATE_ASM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { H_RAX, H_RCX, H_RDX, H_RBX, H_RSP, H_RBP, H_RSI, H_RDI, H_R8, H_R9, H_R10, H_R11, H_R12, H_R13, H_R14, H_R15 };
#define H_NONE 0xffu

struct assembler {
    uint8_t *at, *end;
    bool full;
};

static inline void asm_byte(struct assembler *a, unsigned b)
{
    if (a->at < a->end)
        *a->at++ = (uint8_t)b;
    else
        a->full = true;
}

static inline void asm_bytes(struct assembler *a, const void *p, size_t n)
{
    for (size_t i = 0; i < n; i++)
        asm_byte(a, ((const uint8_t *)p)[i]);
}

static inline void asm_u32(struct assembler *a, uint32_t v) { asm_bytes(a, &v, 4); }
static inline void asm_u64(struct assembler *a, uint64_t v) { asm_bytes(a, &v, 8); }

/* [prefix] REX opcode modrm of two registers. opcode may have 0F in bits 15:8. size: operand bytes. */
static inline void asm_rex(struct assembler *a, bool w, unsigned reg, unsigned index, unsigned base, bool force)
{
    unsigned rex = (w ? 8u : 0u) | (reg >> 3 & 1) << 2 | (index >> 3 & 1) << 1 | (base >> 3 & 1);

    if (rex || force)
        asm_byte(a, 0x40 | rex);
}

static inline void asm_opcode(struct assembler *a, unsigned opcode)
{
    if (opcode > 0xffff)
        asm_byte(a, opcode >> 16);
    if (opcode > 0xff)
        asm_byte(a, opcode >> 8 & 0xff);
    asm_byte(a, opcode & 0xff);
}

/* opcode reg, gs:[offset] */
static inline void asm_gs(struct assembler *a, bool w, unsigned opcode, unsigned reg, size_t offset)
{
    asm_byte(a, 0x65);
    asm_rex(a, w, reg, 0, 0, false);
    asm_opcode(a, opcode);
    asm_byte(a, (reg & 7) << 3 | 4);
    asm_byte(a, 0x25);
    asm_u32(a, (uint32_t)offset);
}
static inline void asm_load_gs(struct assembler *a, unsigned reg, size_t offset) { asm_gs(a, true, 0x8b, reg, offset); }
static inline void asm_store_gs(struct assembler *a, unsigned reg, size_t offset) { asm_gs(a, true, 0x89, reg, offset); }

static inline void asm_rr(struct assembler *a, bool w, unsigned opcode, unsigned reg, unsigned rm)
{
    asm_rex(a, w, reg, 0, rm, false);
    asm_opcode(a, opcode);
    asm_byte(a, 0xc0 | (reg & 7) << 3 | (rm & 7));
}
static inline void asm_mov(struct assembler *a, unsigned to, unsigned from) { asm_rr(a, true, 0x89, from, to); }

/* A memory operand: [base + index * (1 << shift) + disp]; base and index may be H_NONE. */
struct asm_address {
    uint8_t base, index, shift;
    int32_t disp;
};

/* ModRM, SIB and displacement of an operand in memory. wide: a 32-bit displacement, as EVEX scales shorter ones. */
static inline void asm_modrm(struct assembler *a, unsigned reg, const struct asm_address *m, bool wide)
{
    unsigned mod;

    if (m->base == H_NONE) {
        asm_byte(a, (reg & 7) << 3 | 4);
        asm_byte(a, (unsigned)m->shift << 6 | (m->index == H_NONE ? 4 : m->index & 7u) << 3 | 5);
        asm_u32(a, (uint32_t)m->disp);
        return;
    }
    mod = m->disp == 0 && (m->base & 7) != 5 ? 0 : m->disp == (int8_t)m->disp && !wide ? 1 : 2;
    if (m->index == H_NONE && (m->base & 7) != 4) {
        asm_byte(a, mod << 6 | (reg & 7) << 3 | (m->base & 7u));
    } else {
        asm_byte(a, mod << 6 | (reg & 7) << 3 | 4);
        asm_byte(a, (unsigned)m->shift << 6 | (m->index == H_NONE ? 4 : m->index & 7u) << 3 | (m->base & 7u));
    }
    if (mod == 1)
        asm_byte(a, (uint8_t)m->disp);
    else if (mod == 2)
        asm_u32(a, (uint32_t)m->disp);
}

/* opcode reg, [base + index * (1 << shift) + disp]; base and index may be H_NONE. */
static inline void asm_mem(struct assembler *a, bool w, unsigned opcode, unsigned reg, unsigned base, unsigned index,
                           unsigned shift, int32_t disp)
{
    struct asm_address m = { (uint8_t)base, (uint8_t)index, (uint8_t)shift, disp };

    asm_rex(a, w, reg, index == H_NONE ? 0 : index, base == H_NONE ? 0 : base, false);
    asm_opcode(a, opcode);
    asm_modrm(a, reg, &m, false);
}
static inline void asm_lea(struct assembler *a, unsigned reg, unsigned base, unsigned index, unsigned shift, int32_t disp)
{
    asm_mem(a, true, 0x8d, reg, base, index, shift, disp);
}

/* The shortest of the three moves of a constant. */
static inline void asm_mov_imm(struct assembler *a, unsigned reg, uint64_t v)
{
    if (v == (uint32_t)v) {
        asm_rex(a, false, 0, 0, reg, false);
        asm_byte(a, 0xb8 | (reg & 7));
        asm_u32(a, (uint32_t)v);
    } else if (v == (uint64_t)(int32_t)v) {
        asm_rex(a, true, 0, 0, reg, false);
        asm_byte(a, 0xc7);
        asm_byte(a, 0xc0 | (reg & 7));
        asm_u32(a, (uint32_t)v);
    } else {
        asm_rex(a, true, 0, 0, reg, false);
        asm_byte(a, 0xb8 | (reg & 7));
        asm_u64(a, v);
    }
}

/* opcode /digit reg, imm of the ADD, OR, AND, CMP… group, 32 or 64 bits. */
static inline void asm_alu_imm(struct assembler *a, bool w, unsigned digit, unsigned reg, int32_t imm)
{
    asm_rex(a, w, 0, 0, reg, false);
    asm_byte(a, imm == (int8_t)imm ? 0x83 : 0x81);
    asm_byte(a, 0xc0 | digit << 3 | (reg & 7));
    if (imm == (int8_t)imm)
        asm_byte(a, (uint8_t)imm);
    else
        asm_u32(a, (uint32_t)imm);
}
enum { ALU_DIGIT_ADD = 0, ALU_DIGIT_AND = 4, ALU_DIGIT_SUB = 5, ALU_DIGIT_CMP = 7 };

/* RORX reg, src, count: no flags. BMI2. */
static inline void asm_rorx(struct assembler *a, unsigned reg, unsigned src, unsigned count)
{
    asm_byte(a, 0xc4);
    asm_byte(a, (reg >> 3 & 1 ? 0 : 0x80) | 0x40 | (src >> 3 & 1 ? 0 : 0x20) | 3);
    asm_byte(a, 0xfb);
    asm_byte(a, 0xf0);
    asm_byte(a, 0xc0 | (reg & 7) << 3 | (src & 7));
    asm_byte(a, count);
}

static inline void asm_push(struct assembler *a, unsigned reg)
{
    asm_rex(a, false, 0, 0, reg, false);
    asm_byte(a, 0x50 | (reg & 7));
}
static inline void asm_pop(struct assembler *a, unsigned reg)
{
    asm_rex(a, false, 0, 0, reg, false);
    asm_byte(a, 0x58 | (reg & 7));
}
static inline void asm_ret(struct assembler *a) { asm_byte(a, 0xc3); }
static inline void asm_jmp_reg(struct assembler *a, unsigned reg)
{
    asm_rex(a, false, 0, 0, reg, false);
    asm_byte(a, 0xff);
    asm_byte(a, 0xe0 | (reg & 7));
}
/* op gs:[offset], imm of one byte: opcode 0x83 /digit (32 bits) or 0x80 /digit (8 bits). */
static inline void asm_gs_imm8(struct assembler *a, unsigned opcode, unsigned digit, size_t offset, unsigned imm)
{
    asm_gs(a, false, opcode, digit, offset);
    asm_byte(a, imm);
}

/* PEXT reg, src, gs:[mask_offset]: the bits of src under the mask, moved down; no flags. BMI2. */
static inline void asm_pext_gs(struct assembler *a, unsigned reg, unsigned src, size_t mask_offset)
{
    asm_byte(a, 0x65);
    asm_byte(a, 0xc4);
    asm_byte(a, (reg >> 3 & 1 ? 0 : 0x80) | 0x40 | 0x20 | 2);
    asm_byte(a, 0x80 | (~src & 15) << 3 | 2);
    asm_byte(a, 0xf5);
    asm_byte(a, (reg & 7) << 3 | 4);
    asm_byte(a, 0x25);
    asm_u32(a, (uint32_t)mask_offset);
}

/* Jumps: rel32 forms return where their displacement is, for asm_set_target(). */
static inline uint8_t *asm_jmp(struct assembler *a)
{
    asm_byte(a, 0xe9);
    asm_u32(a, 0);
    return a->at - 4;
}
static inline uint8_t *asm_jcc(struct assembler *a, unsigned cc)
{
    asm_byte(a, 0x0f);
    asm_byte(a, 0x80 | cc);
    asm_u32(a, 0);
    return a->at - 4;
}
static inline uint8_t *asm_call(struct assembler *a)
{
    asm_byte(a, 0xe8);
    asm_u32(a, 0);
    return a->at - 4;
}
static inline void asm_set_target(uint8_t *disp, const uint8_t *target)
{
    int32_t d = (int32_t)(target - (disp + 4));

    memcpy(disp, &d, 4);
}
static inline void asm_jmp_to(struct assembler *a, const uint8_t *target)
{
    uint8_t *d = asm_jmp(a);

    if (!a->full)
        asm_set_target(d, target);
}
/* JRCXZ rel8; the returned byte is set by asm_set_short(). */
static inline uint8_t *asm_jrcxz(struct assembler *a)
{
    asm_byte(a, 0xe3);
    asm_byte(a, 0);
    return a->at - 1;
}
static inline void asm_set_short(uint8_t *disp, const uint8_t *target) { *disp = (uint8_t)(target - (disp + 1)); }

#endif
