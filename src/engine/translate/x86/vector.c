/*
 * Vector instructions in translated code, and integer ones with VEX encoding.
 *
 * Guest vector registers are in memory: an instruction loads those it names into the host registers of the same number,
 * runs, and stores what it wrote. Only instructions that native.c would run by a plain stub come here, while the
 * control registers allow vector instructions at all (translator.simd_trap is 0) and MXCSR masks every exception.
 */
#include "engine/translate/x86/translation.h"
#include "isa/x86/native_internal.h"

/* MOVUPS of the whole register that the encoding can see, gs:[…]: 0x10 loads, 0x11 stores. */
static void vector_gs(struct assembler *a, enum native_kind kind, unsigned opcode, unsigned reg)
{
    size_t offset = offsetof(struct x86_cpu, s.fpu.zmm) + reg * 64;
    unsigned r = reg >> 3 & 1;

    if (kind < NATIVE_AVX) {
        asm_gs(a, false, 0x0f00 | opcode, reg, offset);
        return;
    }
    asm_byte(a, 0x65);
    if (__builtin_cpu_supports("avx512f")) {
        asm_byte(a, 0x62);
        asm_byte(a, (r ? 0 : 0x80) | 0x60 | (reg >> 4 & 1 ? 0 : 0x10) | 1);
        asm_byte(a, 0x7c);
        asm_byte(a, 0x48);
    } else {
        asm_byte(a, 0xc4);
        asm_byte(a, (r ? 0 : 0x80) | 0x60 | 1);
        asm_byte(a, 0x7c);
    }
    asm_byte(a, opcode);
    asm_byte(a, (reg & 7) << 3 | 4);
    asm_byte(a, 0x25);
    asm_u32(a, (uint32_t)offset);
}

/* KMOVQ: 0x90 loads, 0x91 stores. */
static void mask_gs(struct assembler *a, unsigned opcode, unsigned reg)
{
    asm_byte(a, 0x65);
    asm_byte(a, 0xc4), asm_byte(a, 0xe1), asm_byte(a, 0xf8);
    asm_byte(a, opcode);
    asm_byte(a, (reg & 7) << 3 | 4);
    asm_byte(a, 0x25);
    asm_u32(a, (uint32_t)(offsetof(struct x86_cpu, s.fpu.k) + reg * 8));
}

/* The instruction's bytes; a memory operand becomes [T]. */
static void copy(struct assembler *a, const struct x86_insn *insn)
{
    unsigned at;

    for (unsigned i = 0; i < insn->prefix_count; i++) {
        uint8_t b = insn->bytes[i];

        if (b == 0x66 || b == 0xf2 || b == 0xf3)
            asm_byte(a, b);
    }
    /* T has an extension bit, B (inverted in VEX and EVEX), and no index, X. */
    if (insn->has_evex) {
        const uint8_t *p = insn->bytes + insn->evex_offset;

        at = insn->evex_offset + 4u;
        asm_byte(a, p[0]);
        asm_byte(a, insn->has_mem ? (p[1] | 0x40) & ~0x20 : p[1]);
        asm_byte(a, p[2]);
        asm_byte(a, p[3]);
    } else if (insn->has_vex && insn->vex_size == 3) {
        const uint8_t *p = insn->bytes + insn->vex_offset;

        at = insn->vex_offset + 3u;
        asm_byte(a, p[0]);
        asm_byte(a, insn->has_mem ? (p[1] | 0x40) & ~0x20 : p[1]);
        asm_byte(a, p[2]);
    } else if (insn->has_vex) {
        uint8_t p = insn->bytes[insn->vex_offset + 1];

        at = insn->vex_offset + 2u;
        if (insn->has_mem) {    /* the short form has no B: R, X = 0, B = 1, map 1; W = 0 */
            asm_byte(a, 0xc4);
            asm_byte(a, (p & 0x80) | 0x40 | 1);
            asm_byte(a, p & 0x7f);
        } else {
            asm_byte(a, 0xc5);
            asm_byte(a, p);
        }
    } else {
        unsigned rex = insn->has_rex ? insn->bytes[insn->rex_offset] : 0;

        at = insn->has_rex ? insn->rex_offset + 1u : insn->prefix_count;
        if (insn->has_mem)
            rex = 0x40 | (rex & 0xc) | 1;
        if (rex)
            asm_byte(a, rex);
    }
    if (!insn->has_mem) {
        asm_bytes(a, insn->bytes + at, insn->length - at);
        return;
    }
    asm_bytes(a, insn->bytes + at, insn->modrm_offset - at);
    asm_byte(a, (insn->bytes[insn->modrm_offset] & 0x38) | (T & 7));
    asm_bytes(a, insn->bytes + insn->length - insn->imm_size, insn->imm_size);
}

bool translate_vector(struct translation *x, const struct x86_insn *insn, const struct op *op)
{
    const struct native_insn *n;
    struct assembler *a = &x->a;
    uint32_t vectors = 0, written = 0, masks = 0, masks_written = 0;
    uint8_t *miss = NULL;

    if (op->fn != op_native || x->t->simd_trap)
        return false;
    n = native_prepare(insn);
    if (!n || n->special || n->uses_fx || n->masked || (insn->has_mem && (!insn->modrm_offset || !n->mem_size)))
        return false;
    if (insn->has_mem && n->mem_size & (n->mem_size - 1))
        return false;
    for (unsigned i = 0; i < insn->operands; i++) {
        const struct x86_operand *o = &insn->operand[i];

        switch (o->kind) {
        case OPERAND_GPR:
            if (translate_host_of[o->reg] != o->reg)
                return false;
            break;
        case OPERAND_GPR8H:
            if (insn->has_mem || translate_host_of[o->reg] != o->reg)
                return false;
            break;
        case OPERAND_VEC:
            vectors |= 1u << o->reg;
            written |= o->write ? 1u << o->reg : 0;
            break;
        case OPERAND_K:
            masks |= 1u << o->reg;
            masks_written |= o->write ? 1u << o->reg : 0;
            break;
        }
    }
    if (insn->mnemonic == ZYDIS_MNEMONIC_VP2INTERSECTD || insn->mnemonic == ZYDIS_MNEMONIC_VP2INTERSECTQ)
        return false;
    masks |= insn->mask_reg ? 1u << insn->mask_reg : 0;

    if (insn->has_mem) {
        if (!translate_address(x, insn, op->rip + op->len))
            return false;
        miss = translate_check(x, n->mem_size, n->mem_write ? TLB_WRITE : TLB_READ, n->aligned);
    }
    if (n->components && !x->vectors_noted) {
        asm_mov_imm(a, A, x->t->it.cpu.s.xcr0 | 3);
        asm_store_gs(a, A, offsetof(struct x86_cpu, s.fpu.xinuse_hint));
        x->vectors_noted = true;
    }
    for (unsigned r = 0; r < 32; r++)
        if (vectors & 1u << r)
            vector_gs(a, n->kind, 0x10, r);
    for (unsigned r = 0; r < 8; r++)
        if (masks & 1u << r)
            mask_gs(a, 0x90, r);
    copy(a, insn);
    for (unsigned r = 0; r < 32; r++)
        if (written & 1u << r)
            vector_gs(a, n->kind, 0x11, r);
    for (unsigned r = 0; r < 8; r++)
        if (masks_written & 1u << r)
            mask_gs(a, 0x91, r);
    if (miss)
        translate_add_stub(x, STUB_OP, miss, a->at, op, 0);
    return true;
}
