/*
 * Stack instructions of any operand and stack size, decimal arithmetic, XLAT, SALC.
 *
 * Decimal adjustments follow the pseudo-code of the SDM. Flags that it leaves undefined are those of the addition or
 * subtraction inside, of AL, or of AX for AAA and AAS: so AMD's processors, tried with every operand. Intel's have those of AL's
 * new value, and no OF.
 */
#include "base/util.h"
#include "isa/x86/legacy.h"

#define CF 0x100u               /* in cpu->arith */
#define AF 0x1000u
#define OF 1u

static uint64_t operand_value(struct x86_cpu *cpu, const struct x86_insn *insn, unsigned size)
{
    const struct x86_operand *o = &insn->operand[0];

    switch (o->kind) {
    case OPERAND_IMM: return (uint64_t)insn->imm[o->reg];
    case OPERAND_GPR: return x86_get_gpr(cpu, o->reg, size);
    default: {
        gva_t va = x86_linear(cpu, insn, size, false);

        return size == 2 ? x86_read16(cpu, va) : size == 4 ? x86_read32(cpu, va) : x86_read64(cpu, va);
    }
    }
}

static void push(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    x86_push(cpu, operand_value(cpu, insn, insn->op_size), insn->op_size);
}

static void pop(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    const struct x86_operand *o = &insn->operand[0];
    unsigned size = insn->op_size;
    uint64_t rsp = cpu->s.gpr[RSP], value = x86_pop(cpu, size), after = cpu->s.gpr[RSP];
    gva_t va;

    if (o->kind == OPERAND_GPR) {
        x86_set_gpr(cpu, o->reg, value, size);
        return;
    }
    /* The address is formed with the stack pointer already raised; should it fault, RSP is as before. */
    va = x86_effective(cpu, insn);
    cpu->s.gpr[RSP] = rsp;
    va = x86_seg_linear(cpu, insn->mem.seg, va, size, true);
    if (size == 2)
        x86_write16(cpu, va, (uint16_t)value);
    else if (size == 4)
        x86_write32(cpu, va, (uint32_t)value);
    else
        x86_write64(cpu, va, value);
    cpu->s.gpr[RSP] = after;
}

static void leave(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    unsigned size = insn->op_size;
    uint64_t frame = x86_get_gpr(cpu, RBP, cpu->stack_size);
    gva_t va = x86_seg_linear(cpu, SEG_SS, frame, size, false);
    uint64_t value = size == 2 ? x86_read16(cpu, va) : size == 4 ? x86_read32(cpu, va) : x86_read64(cpu, va);

    x86_set_gpr(cpu, RSP, frame + size, cpu->stack_size);
    x86_set_gpr(cpu, RBP, value, size);
}

/* A fault in the middle of PUSHA or POPA leaves RSP as it was, but what has been pushed or popped by then stays: no vendor's look ahead. */
static gva_t all_linear(struct x86_cpu *cpu, uint64_t offset, unsigned size, bool write)
{
    if (cpu->stack_size < 8)
        offset &= (1ull << (cpu->stack_size * 8)) - 1;
    return x86_seg_linear(cpu, SEG_SS, offset, size, write);
}

static void pusha(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    static const uint8_t order[] = { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI };
    unsigned size = insn->op_size;
    uint64_t sp = x86_get_gpr(cpu, RSP, cpu->stack_size);

    for (unsigned i = 0; i < ARRAY_SIZE(order); i++) {
        gva_t va = all_linear(cpu, sp - (i + 1) * size, size, true);

        if (size == 2)
            x86_write16(cpu, va, (uint16_t)cpu->s.gpr[order[i]]);
        else
            x86_write32(cpu, va, (uint32_t)cpu->s.gpr[order[i]]);
    }
    x86_set_gpr(cpu, RSP, sp - 8 * size, cpu->stack_size);
}

static void popa(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    static const uint8_t order[] = { RDI, RSI, RBP, RSP, RBX, RDX, RCX, RAX };
    unsigned size = insn->op_size;
    uint64_t sp = x86_get_gpr(cpu, RSP, cpu->stack_size);

    for (unsigned i = 0; i < ARRAY_SIZE(order); i++) {
        gva_t va = all_linear(cpu, sp + i * size, size, false);
        uint64_t value = size == 2 ? x86_read16(cpu, va) : x86_read32(cpu, va);

        if (order[i] != RSP)
            x86_set_gpr(cpu, order[i], value, size);
    }
    x86_set_gpr(cpu, RSP, sp + 8 * size, cpu->stack_size);
}

/* XLAT: AL from the table at rBX. */
static void xlat(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    uint64_t offset = cpu->s.gpr[RBX] + (uint8_t)cpu->s.gpr[RAX];

    if (insn->addr_size < 8)
        offset &= (1ull << (insn->addr_size * 8)) - 1;
    x86_set_gpr(cpu, RAX, x86_read8(cpu, x86_seg_linear(cpu, insn->mem.seg, offset, 1, false)), 1);
}

/* The flags that ADD or SUB of these bytes leaves; AF and CF replaced as given. */
static void set_flags(struct x86_cpu *cpu, uint16_t a, uint16_t b, bool subtract, unsigned bits, bool carry, bool adjust)
{
    uint32_t sign = 1u << (bits - 1), mask = (sign << 1) - 1, r = (subtract ? a - b : a + b) & mask;
    uint32_t overflow = (subtract ? (a ^ b) & (a ^ r) : ~(uint32_t)(a ^ b) & (a ^ r)) & sign;

    cpu->arith = 0x200 | (r & sign ? 0x8000u : 0) | (r == 0 ? 0x4000u : 0) | (__builtin_parity(r & 0xff) ? 0 : 0x400u) |
                 (overflow ? 1 : 0) | (carry ? CF : 0) | (adjust ? AF : 0);
}

static void decimal_adjust(struct x86_cpu *cpu, bool subtract)
{
    uint8_t al = (uint8_t)cpu->s.gpr[RAX];
    bool low = (al & 15) > 9 || (cpu->arith & AF), high = al > 0x99 || (cpu->arith & CF);
    uint8_t by = (uint8_t)((low ? 6 : 0) + (high ? 0x60 : 0));

    x86_set_gpr(cpu, RAX, (uint8_t)(subtract ? al - by : al + by), 1);
    set_flags(cpu, al, by, subtract, 8, high || (subtract && low && al < 6), low);
    if (!cpu->amd)
        cpu->arith &= ~OF;
}

static void daa(struct x86_cpu *cpu, const struct x86_insn *insn) { decimal_adjust(cpu, false); }
static void das(struct x86_cpu *cpu, const struct x86_insn *insn) { decimal_adjust(cpu, true); }

static void ascii_adjust(struct x86_cpu *cpu, bool subtract)
{
    uint16_t ax = (uint16_t)cpu->s.gpr[RAX];
    bool adjust = (ax & 15) > 9 || (cpu->arith & AF);
    uint16_t by = adjust ? 0x106 : 0;

    uint16_t result = (uint16_t)(subtract ? ax - by : ax + by) & 0xff0f;

    x86_set_gpr(cpu, RAX, result, 2);
    if (cpu->amd)
        set_flags(cpu, ax, by, subtract, 16, adjust, adjust);
    else
        set_flags(cpu, result & 15, 0, false, 8, adjust, adjust);
}

static void aaa(struct x86_cpu *cpu, const struct x86_insn *insn) { ascii_adjust(cpu, false); }
static void aas(struct x86_cpu *cpu, const struct x86_insn *insn) { ascii_adjust(cpu, true); }

static void aam(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    uint8_t base = (uint8_t)insn->imm[0], al = (uint8_t)cpu->s.gpr[RAX];

    if (base == 0)
        x86_raise(cpu, X86_DE);
    x86_set_gpr(cpu, RAX, (uint64_t)(al / base) << 8 | al % base, 2);
    set_flags(cpu, al % base, 0, false, 8, false, false);
}

static void aad(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    uint16_t ax = (uint16_t)cpu->s.gpr[RAX];
    uint8_t al = (uint8_t)ax, add = (uint8_t)((ax >> 8) * (uint8_t)insn->imm[0]);

    x86_set_gpr(cpu, RAX, (uint8_t)(al + add), 2);
    set_flags(cpu, al, add, false, 8, al + add > 0xff, (al & 15) + (add & 15) > 15);
}

/* D6, undocumented and everywhere: AL = CF ? FF : 0. */
static void salc(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    x86_set_gpr(cpu, RAX, cpu->arith & CF ? 0xff : 0, 1);
}

x86_semantics_fn *x86_legacy_semantics(const struct x86_insn *insn)
{
    switch (insn->mnemonic) {
    case ZYDIS_MNEMONIC_PUSH: return push;
    case ZYDIS_MNEMONIC_POP: return pop;
    case ZYDIS_MNEMONIC_LEAVE: return leave;
    case ZYDIS_MNEMONIC_PUSHA: case ZYDIS_MNEMONIC_PUSHAD: return pusha;
    case ZYDIS_MNEMONIC_POPA: case ZYDIS_MNEMONIC_POPAD: return popa;
    case ZYDIS_MNEMONIC_XLAT: return xlat;
    case ZYDIS_MNEMONIC_DAA: return daa;
    case ZYDIS_MNEMONIC_DAS: return das;
    case ZYDIS_MNEMONIC_AAA: return aaa;
    case ZYDIS_MNEMONIC_AAS: return aas;
    case ZYDIS_MNEMONIC_AAM: return aam;
    case ZYDIS_MNEMONIC_AAD: return aad;
    case ZYDIS_MNEMONIC_SALC: return salc;
    default: return NULL;
    }
}
