/*
 * Stack instructions of any operand and stack size, decimal arithmetic, XLAT, SALC.
 *
 * Decimal adjustments follow the pseudo-code of the SDM; flags that they leave undefined (OF, and for
 * AAA and AAS also SF, ZF, PF) are set from the result, as processors do.
 */
#include "base/util.h"
#include "isa/x86/legacy.h"

#define CF 0x100u               /* in cpu->arith */
#define AF 0x1000u

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

static void pusha(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    unsigned size = insn->op_size;
    uint64_t rsp = cpu->s.gpr[RSP];
    uint64_t lowest = x86_get_gpr(cpu, RSP, cpu->stack_size) - 8 * size;
    static const uint8_t order[] = { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI };

    /* All or nothing: the far end first. */
    if (cpu->stack_size < 8)
        lowest &= (1ull << (cpu->stack_size * 8)) - 1;
    x86_probe_write(cpu, x86_seg_linear(cpu, SEG_SS, lowest, 8 * size, true), 8 * size);
    for (unsigned i = 0; i < ARRAY_SIZE(order); i++)
        x86_push(cpu, order[i] == RSP ? rsp : cpu->s.gpr[order[i]], size);
}

static void popa(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    static const uint8_t order[] = { RDI, RSI, RBP, RSP, RBX, RDX, RCX, RAX };
    unsigned size = insn->op_size;
    uint64_t value[ARRAY_SIZE(order)];
    uint64_t sp = x86_get_gpr(cpu, RSP, cpu->stack_size);

    for (unsigned i = 0; i < ARRAY_SIZE(order); i++) {
        uint64_t offset = sp + i * size;
        gva_t va;

        if (cpu->stack_size < 8)
            offset &= (1ull << (cpu->stack_size * 8)) - 1;
        va = x86_seg_linear(cpu, SEG_SS, offset, size, false);
        value[i] = size == 2 ? x86_read16(cpu, va) : x86_read32(cpu, va);
    }
    for (unsigned i = 0; i < ARRAY_SIZE(order); i++)
        if (order[i] != RSP)
            x86_set_gpr(cpu, order[i], value[i], size);
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

/* SF, ZF, PF as of AL; CF and AF as given; OF clear. */
static void set_flags(struct x86_cpu *cpu, bool carry, bool adjust)
{
    uint8_t al = (uint8_t)cpu->s.gpr[RAX];
    uint32_t f = 0x200;

    f |= al & 0x80 ? 0x8000u : 0;
    f |= al == 0 ? 0x4000u : 0;
    f |= __builtin_parity(al) ? 0 : 0x400u;
    cpu->arith = f | (carry ? CF : 0) | (adjust ? AF : 0);
}

static void daa(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    uint8_t al = (uint8_t)cpu->s.gpr[RAX];
    bool low = (al & 15) > 9 || (cpu->arith & AF), high = al > 0x99 || (cpu->arith & CF);

    x86_set_gpr(cpu, RAX, (uint8_t)(al + (low ? 6 : 0) + (high ? 0x60 : 0)), 1);
    set_flags(cpu, high, low);
}

static void das(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    uint8_t al = (uint8_t)cpu->s.gpr[RAX];
    bool low = (al & 15) > 9 || (cpu->arith & AF), high = al > 0x99 || (cpu->arith & CF);
    bool borrow = high || (low && al < 6);

    x86_set_gpr(cpu, RAX, (uint8_t)(al - (low ? 6 : 0) - (high ? 0x60 : 0)), 1);
    set_flags(cpu, borrow, low);
}

static void ascii_adjust(struct x86_cpu *cpu, int sign)
{
    uint16_t ax = (uint16_t)cpu->s.gpr[RAX];
    bool adjust = (ax & 15) > 9 || (cpu->arith & AF);

    if (adjust)
        ax = (uint16_t)(ax + sign * 0x106);
    x86_set_gpr(cpu, RAX, ax & 0xff0f, 2);
    set_flags(cpu, adjust, adjust);
}

static void aaa(struct x86_cpu *cpu, const struct x86_insn *insn) { ascii_adjust(cpu, 1); }
static void aas(struct x86_cpu *cpu, const struct x86_insn *insn) { ascii_adjust(cpu, -1); }

static void aam(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    uint8_t base = (uint8_t)insn->imm[0], al = (uint8_t)cpu->s.gpr[RAX];

    if (base == 0)
        x86_raise(cpu, X86_DE);
    x86_set_gpr(cpu, RAX, (uint64_t)(al / base) << 8 | al % base, 2);
    set_flags(cpu, false, false);
}

static void aad(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    uint16_t ax = (uint16_t)cpu->s.gpr[RAX];

    x86_set_gpr(cpu, RAX, (uint8_t)((ax & 0xff) + (ax >> 8) * (uint8_t)insn->imm[0]), 2);
    set_flags(cpu, false, false);
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
