/*
 * Guest instructions as host instructions: the same opcode, prefixes and immediate, with other registers where the register
 * mapping says so and another operand in memory. Segment and address-size prefixes have done their part already.
 */
#include "engine/translate/x86/unit.h"

static void prefixes(struct assembler *a, const struct x86_insn *insn)
{
    for (unsigned i = 0; i < insn->prefix_count; i++) {
        uint8_t b = insn->bytes[i];

        if (b == 0x66 || b == 0xf2 || b == 0xf3 || b == 0xf0)
            asm_byte(a, b);
    }
}

static unsigned high(unsigned reg) { return reg != H_NONE ? reg >> 3 & 1 : 0; }

/* ModRM and what follows. modrm: the guest's. */
static void operands(struct assembler *a, const struct x86_insn *insn, unsigned reg, unsigned rm,
                     const struct asm_address *m, bool wide)
{
    unsigned modrm = insn->bytes[insn->modrm_offset];

    if (reg == H_NONE)
        reg = modrm >> 3 & 7;
    if (m)
        asm_modrm(a, reg, m, wide);
    else
        asm_byte(a, 0xc0 | (reg & 7) << 3 | (rm == H_NONE ? modrm & 7 : rm & 7));
    asm_bytes(a, insn->bytes + insn->length - insn->imm_size, insn->imm_size);
}

void unit_copy(struct unit *x, const struct x86_insn *insn, unsigned reg, unsigned rm, const struct asm_address *m)
{
    struct assembler *a = &x->a;
    unsigned rex = insn->has_rex ? insn->bytes[insn->rex_offset] & 15u : 0;
    unsigned opcode = insn->has_rex ? insn->rex_offset + 1u : insn->prefix_count;
    unsigned end = insn->modrm_offset ? insn->modrm_offset : insn->length - insn->imm_size;

    prefixes(a, insn);
    if (reg != H_NONE)
        rex = (rex & ~4u) | high(reg) << 2;
    if (m)
        rex = (rex & ~3u) | high(m->index) << 1 | high(m->base);
    else if (rm != H_NONE)
        rex = (rex & ~1u) | high(rm);
    if (rex || insn->has_rex)
        asm_byte(a, 0x40 | rex);
    if (!insn->modrm_offset) {
        asm_bytes(a, insn->bytes + opcode, end - opcode - 1);
        asm_byte(a, rm == H_NONE ? insn->bytes[end - 1] : (insn->bytes[end - 1] & ~7u) | (rm & 7));
        asm_bytes(a, insn->bytes + end, insn->imm_size);
        return;
    }
    asm_bytes(a, insn->bytes + opcode, end - opcode);
    operands(a, insn, reg, rm, m, false);
}

/* Register extension bits are inverted in VEX and EVEX. */
static unsigned with_bit(unsigned byte, unsigned bit, bool extended) { return extended ? byte & ~bit : byte | bit; }

static unsigned extend(unsigned byte, unsigned reg, unsigned rm, const struct asm_address *m)
{
    if (reg != H_NONE)
        byte = with_bit(byte, 0x80, high(reg));
    if (m)
        return with_bit(with_bit(byte, 0x40, high(m->index)), 0x20, high(m->base));
    return rm != H_NONE ? with_bit(byte, 0x20, high(rm)) : byte;
}

void unit_copy_vex(struct unit *x, const struct x86_insn *insn, unsigned reg, unsigned vvvv, unsigned rm,
                   const struct asm_address *m)
{
    struct assembler *a = &x->a;
    unsigned opcode;

    prefixes(a, insn);
    if (insn->has_evex) {
        const uint8_t *p = insn->bytes + insn->evex_offset;

        opcode = insn->evex_offset + 4u;
        asm_byte(a, p[0]);
        asm_byte(a, extend(p[1], reg, rm, m));
        asm_byte(a, p[2]);
        asm_byte(a, p[3]);
    } else {
        const uint8_t *p = insn->bytes + insn->vex_offset;
        unsigned first, last;

        opcode = (unsigned)insn->vex_offset + insn->vex_size;
        if (insn->vex_size == 3) {
            first = p[1];
            last = p[2];
        } else {
            first = (p[1] & 0x80u) | 0x61;      /* X and B clear, map 0F */
            last = p[1] & 0x7f;
        }
        first = extend(first, reg, rm, m);
        if (vvvv != H_NONE)
            last = (last & ~0x78u) | (~vvvv & 15) << 3;
        if ((first & 0x7f) == 0x61 && !(last & 0x80)) {
            asm_byte(a, 0xc5);
            asm_byte(a, (first & 0x80) | (last & 0x7f));
        } else {
            asm_byte(a, 0xc4);
            asm_byte(a, first);
            asm_byte(a, last);
        }
    }
    asm_bytes(a, insn->bytes + opcode, insn->modrm_offset - opcode);
    operands(a, insn, reg, rm, m, insn->has_evex);
}
