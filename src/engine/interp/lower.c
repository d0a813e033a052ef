/*
 * Lowering: from a decoded instruction to the handler and operands of an op.
 *
 * Frequent instructions have handlers of their own for each size and operand form. What has none is a
 * semantics function of src/isa/x86, or runs natively, or does not exist (#UD).
 */
#include "engine/interp/interp.h"
#include "isa/x86/cpuid.h"
#include "isa/x86/legacy.h"

struct lowering {
    struct interp *it;
    struct op *op;
    const struct x86_insn *insn;
    unsigned code_size;
};

#define ZERO_OFFSET ((uint16_t)offsetof(struct x86_cpu, zero))

static int size_index(unsigned bytes)
{
    switch (bytes) {
    case 1: return SIZE8;
    case 2: return SIZE16;
    case 4: return SIZE32;
    case 8: return SIZE64;
    default: return -1;
    }
}

static struct slow_insn *attach(struct lowering *l)
{
    struct slow_insn *slow = block_alloc(l->it, sizeof(*slow));

    *slow = (struct slow_insn){ .insn = *l->insn };
    l->op->aux = slow;
    return slow;
}

static bool is_reg(const struct x86_operand *o) { return o->kind == OPERAND_GPR || o->kind == OPERAND_GPR8H; }

static uint16_t reg_offset(const struct x86_operand *o)
{
    return (uint16_t)(gpr_offset(o->reg) + (o->kind == OPERAND_GPR8H));
}

/* Puts the memory operand into the op: FORM_B, FORM_X or FORM_G. */
static enum form1 lower_mem(struct lowering *l)
{
    const struct x86_mem *m = &l->insn->mem;
    struct op *op = l->op;

    op->base = m->base < 16 ? gpr_offset(m->base) : ZERO_OFFSET;
    op->index = m->index < 16 ? gpr_offset(m->index) : ZERO_OFFSET;
    op->scale = m->scale ? (uint8_t)__builtin_ctz(m->scale) : 0;
    op->seg_base = m->seg >= SEG_FS ? (uint16_t)(offsetof(struct x86_cpu, s.seg[0].base) + m->seg * sizeof(struct x86_seg))
                                    : ZERO_OFFSET;
    op->disp = m->disp;
    if (m->base == X86_REG_RIP) {
        op->base = offsetof(struct x86_cpu, code_page);
        op->disp += (int64_t)(op->rip + op->len);
    }
    if (l->code_size != 8 || m->addr_size != 8) {
        attach(l);
        return FORM_G;
    }
    return op->index == ZERO_OFFSET && op->seg_base == ZERO_OFFSET ? FORM_B : FORM_X;
}

static enum form1 lower_operand(struct lowering *l, const struct x86_operand *o, uint16_t *reg)
{
    if (is_reg(o)) {
        *reg = reg_offset(o);
        return FORM_R;
    }
    return lower_mem(l);
}

/* Destination and source of a two-operand instruction; FORMS when it is none of the usual. */
static enum form lower_two(struct lowering *l)
{
    const struct x86_operand *d = &l->insn->operand[0], *s = &l->insn->operand[1];

    if (is_reg(d)) {
        l->op->dst = reg_offset(d);
        if (is_reg(s)) {
            l->op->src = reg_offset(s);
            return FORM_RR;
        }
        if (s->kind == OPERAND_IMM) {
            l->op->imm = (uint64_t)l->insn->imm[s->reg];
            return FORM_RI;
        }
        if (s->kind == OPERAND_MEM)
            return FORM_RM_B + (lower_mem(l) - FORM_B);
    } else if (d->kind == OPERAND_MEM) {
        if (is_reg(s)) {
            l->op->src = reg_offset(s);
            return FORM_MR_B + (lower_mem(l) - FORM_B);
        }
        if (s->kind == OPERAND_IMM) {
            l->op->imm = (uint64_t)l->insn->imm[s->reg];
            return FORM_MI_B + (lower_mem(l) - FORM_B);
        }
    }
    return FORMS;
}

static bool set(struct lowering *l, op_fn *fn)
{
    l->op->fn = fn;
    return fn != NULL;
}

/* ---- by subject: true when the op is done ---- */

static bool lower_atomic(struct lowering *l, enum atomic_kind kind)
{
    const struct x86_operand *d = &l->insn->operand[0], *s = &l->insn->operand[1];
    int size;

    if (kind == AT_XCHG && s->kind == OPERAND_MEM) {
        const struct x86_operand *t = d;

        d = s;
        s = t;
    }
    size = size_index(d->size);
    if (d->kind != OPERAND_MEM || size < 0)
        return false;
    l->op->sub = (uint16_t)kind;
    lower_mem(l);
    l->op->src = ZERO_OFFSET;
    if (l->insn->visible > 1 && is_reg(s)) {
        l->op->src = reg_offset(s);
        if (kind >= AT_BTS)
            l->op->scale |= ATOMIC_BIT_REG;
    } else if (l->insn->visible > 1) {
        l->op->imm = (uint64_t)l->insn->imm[s->reg];
    }
    return set(l, atomic_handlers[size]);
}

static bool lower_alu(struct lowering *l, enum alu alu)
{
    int size = size_index(l->insn->operand[0].size);
    enum form form;

    if (l->insn->lock)
        return lower_atomic(l, (enum atomic_kind)alu);  /* the same order */
    form = lower_two(l);
    return form != FORMS && size >= 0 && set(l, alu_handlers[alu][size][form]);
}
_Static_assert((int)AT_ADD == ALU_ADD && (int)AT_XOR == ALU_XOR && (int)AT_SBB == ALU_SBB, "same order");

static bool lower_mov(struct lowering *l)
{
    int size = size_index(l->insn->operand[0].size);
    enum form form = lower_two(l);

    return form != FORMS && size >= 0 && set(l, mov_handlers[size][form]);
}

static bool lower_extend(struct lowering *l, bool is_signed)
{
    const struct x86_operand *d = &l->insn->operand[0], *s = &l->insn->operand[1];
    int to = size_index(d->size), from = size_index(s->size);

    if (to < 0 || from < 0)
        return false;
    l->op->dst = reg_offset(d);
    if (from == to)             /* MOVSXD with 16 or 32-bit operands */
        return set(l, mov_handlers[to][lower_two(l)]);
    return set(l, extend_handlers[is_signed][to][from][lower_operand(l, s, &l->op->src)]);
}

static bool lower_lea(struct lowering *l)
{
    int size = size_index(l->insn->operand[0].size);
    enum form1 form;

    l->op->dst = reg_offset(&l->insn->operand[0]);
    form = lower_mem(l);
    if (form == FORM_X && l->op->index == ZERO_OFFSET)
        form = FORM_B;
    return set(l, lea_handlers[size][form - FORM_B]);
}

static bool lower_cmov(struct lowering *l, unsigned cc)
{
    const struct x86_operand *d = &l->insn->operand[0];

    l->op->dst = reg_offset(d);
    return set(l, cmov_handlers[cc][size_index(d->size)][lower_operand(l, &l->insn->operand[1], &l->op->src)]);
}

static bool lower_setcc(struct lowering *l, unsigned cc)
{
    return set(l, setcc_handlers[cc][lower_operand(l, &l->insn->operand[0], &l->op->dst)]);
}

static bool lower_push(struct lowering *l)
{
    const struct x86_operand *o = &l->insn->operand[0];
    int size = size_index(l->insn->op_size);

    if (l->code_size != 8 || o->kind == OPERAND_SEG)
        return false;
    if (o->kind == OPERAND_IMM) {
        l->op->imm = (uint64_t)l->insn->imm[o->reg];
        return set(l, push_handlers[size][4]);
    }
    return set(l, push_handlers[size][lower_operand(l, o, &l->op->src)]);
}

static bool lower_pop(struct lowering *l)
{
    const struct x86_operand *o = &l->insn->operand[0];

    if (l->code_size != 8 || o->kind == OPERAND_SEG)
        return false;
    return set(l, pop_handlers[size_index(l->insn->op_size)][lower_operand(l, o, &l->op->dst)]);
}

static bool lower_unary(struct lowering *l, enum unary unary)
{
    const struct x86_operand *o = &l->insn->operand[0];

    if (l->insn->lock)
        return lower_atomic(l, AT_INC + (enum atomic_kind)unary);
    return set(l, unary_handlers[unary][size_index(o->size)][lower_operand(l, o, &l->op->dst)]);
}

static bool lower_shift(struct lowering *l, enum shift shift)
{
    const struct x86_operand *o = &l->insn->operand[0], *count = &l->insn->operand[1];
    bool by_cl = is_reg(count);

    l->op->imm = by_cl ? 0 : (uint8_t)l->insn->imm[count->reg];
    return set(l, shift_handlers[shift][size_index(o->size)][by_cl][lower_operand(l, o, &l->op->dst)]);
}

static bool lower_double_shift(struct lowering *l, bool right)
{
    const struct x86_operand *o = &l->insn->operand[0], *count = &l->insn->operand[2];
    bool by_cl = is_reg(count);

    l->op->src = reg_offset(&l->insn->operand[1]);
    l->op->imm = by_cl ? 0 : (uint8_t)l->insn->imm[count->reg];
    return set(l, double_shift_handlers[right][size_index(o->size)][by_cl][lower_operand(l, o, &l->op->dst)]);
}

static bool lower_muldiv(struct lowering *l, enum muldiv kind)
{
    const struct x86_operand *o = &l->insn->operand[0];

    return set(l, muldiv_handlers[kind][size_index(o->size)][lower_operand(l, o, &l->op->dst)]);
}

static bool lower_imul(struct lowering *l)
{
    const struct x86_operand *d = &l->insn->operand[0];
    int size = size_index(d->size);

    if (l->insn->visible == 1)
        return lower_muldiv(l, MULDIV_IMUL);
    l->op->dst = reg_offset(d);
    if (l->insn->visible == 2)
        return set(l, imul2_handlers[size][lower_operand(l, &l->insn->operand[1], &l->op->src)]);
    l->op->imm = (uint64_t)l->insn->imm[l->insn->operand[2].reg];
    return set(l, imul3_handlers[size][lower_operand(l, &l->insn->operand[1], &l->op->src)]);
}

static bool lower_bit(struct lowering *l, enum bit bit)
{
    const struct x86_operand *o = &l->insn->operand[0], *offset = &l->insn->operand[1];
    bool by_imm = !is_reg(offset);

    if (l->insn->lock)
        return lower_atomic(l, AT_BTS + (enum atomic_kind)(bit - BIT_BTS));
    if (by_imm)
        l->op->imm = (uint8_t)l->insn->imm[offset->reg];
    else
        l->op->src = reg_offset(offset);
    return set(l, bit_handlers[bit][size_index(o->size)][by_imm][lower_operand(l, o, &l->op->dst)]);
}

static bool lower_scan(struct lowering *l, enum scan scan)
{
    const struct x86_operand *d = &l->insn->operand[0];

    l->op->dst = reg_offset(d);
    return set(l, scan_handlers[scan][size_index(d->size)][lower_operand(l, &l->insn->operand[1], &l->op->src)]);
}

static bool lower_string(struct lowering *l, enum string_kind kind)
{
    l->op->sub = (uint16_t)kind;
    switch (l->insn->mnemonic) {
    case ZYDIS_MNEMONIC_MOVSB: case ZYDIS_MNEMONIC_STOSB: case ZYDIS_MNEMONIC_LODSB: case ZYDIS_MNEMONIC_CMPSB:
    case ZYDIS_MNEMONIC_SCASB:
        l->op->scale = 1;
        break;
    case ZYDIS_MNEMONIC_MOVSW: case ZYDIS_MNEMONIC_STOSW: case ZYDIS_MNEMONIC_LODSW: case ZYDIS_MNEMONIC_CMPSW:
    case ZYDIS_MNEMONIC_SCASW:
        l->op->scale = 2;
        break;
    case ZYDIS_MNEMONIC_MOVSD: case ZYDIS_MNEMONIC_STOSD: case ZYDIS_MNEMONIC_LODSD: case ZYDIS_MNEMONIC_CMPSD:
    case ZYDIS_MNEMONIC_SCASD:
        l->op->scale = 4;
        break;
    default:
        l->op->scale = 8;
    }
    attach(l);
    return set(l, op_string);
}

/* ---- branches: these end the block ---- */

/* Jcc, LOOP, JRCXZ whose target needs a look: to is op_branch16 or op_branch32. */
static bool lower_direct_to(struct lowering *l, op_fn *fn, op_fn *to)
{
    struct op *op = l->op;

    if (fn == op_loop) {
        op->sub += 16;
        return set(l, to);
    }
    for (unsigned cc = 0; cc < 16; cc++)
        if (fn == jcc_handlers[cc])
            op->sub = (uint16_t)cc;
    return set(l, to);
}

static bool lower_direct(struct lowering *l, op_fn *fn, op_fn *any_mode)
{
    struct op *op = l->op;

    if (l->code_size != 8 || (l->insn->op_size == 2 && fn != op_loop)) {
        if (any_mode) {
            op->sub = l->insn->op_size;
            attach(l);
            return set(l, any_mode);
        }
    }
    op->imm = op->rip + op->len + (uint64_t)l->insn->imm[0];
    op->aux = BLOCK_SELF;
    if (l->insn->op_size == 2) {
        /* The target is cut to 16 bits, which only code that belongs to one address could know beforehand. */
        if (l->code_size == 8)
            return lower_direct_to(l, fn, op_branch16);
        op->imm = (uint16_t)(l->it->cpu.code_page + op->imm) - l->it->cpu.code_page;
    } else if (l->code_size == 2) {
        return lower_direct_to(l, fn, op_branch32);
    }
    return set(l, fn);
}

static bool lower_jump(struct lowering *l, bool call)
{
    const struct x86_operand *o = &l->insn->operand[0];

    if (o->kind == OPERAND_FAR || (o->kind == OPERAND_MEM && l->insn->op_size != o->size))
        return false;
    if (o->kind == OPERAND_REL)
        return lower_direct(l, call ? op_call : op_jmp, call ? op_call_slow : op_jump_slow);
    if (l->code_size != 8 || l->insn->op_size != 8) {
        l->op->sub = l->insn->op_size;
        attach(l);
        return set(l, call ? op_call_slow : op_jump_slow);
    }
    return set(l, (call ? call_indirect_handlers : jump_indirect_handlers)[lower_operand(l, o, &l->op->src)]);
}

static bool is_far_return(const struct x86_insn *insn)
{
    return insn->bytes[insn->prefix_count + insn->has_rex] == (insn->visible ? 0xca : 0xcb);
}

static bool lower_ret(struct lowering *l)
{
    if (l->insn->visible)
        l->op->imm = (uint16_t)l->insn->imm[0];
    if (l->code_size == 8 && l->insn->op_size == 8)
        return set(l, op_ret);
    l->op->sub = l->insn->op_size;
    return set(l, op_ret_slow);
}

static bool lower_loop(struct lowering *l, unsigned kind)
{
    l->op->sub = (uint16_t)kind;
    l->op->scale = l->insn->addr_size;
    return lower_direct(l, op_loop, NULL);
}

/* Condition code of a Jcc, SETcc or CMOVcc, or -1. Zydis sorts mnemonics by name, hence the lists. */
#define CONDITIONS(M) \
    M(O, 0) M(NO, 1) M(B, 2) M(NB, 3) M(Z, 4) M(NZ, 5) M(BE, 6) M(NBE, 7) M(S, 8) M(NS, 9) M(P, 10) M(NP, 11) M(L, 12) \
    M(NL, 13) M(LE, 14) M(NLE, 15)

static bool lower_conditional(struct lowering *l, bool *ends)
{
    switch (l->insn->mnemonic) {
#define CASE(cc, n) \
    case ZYDIS_MNEMONIC_J##cc: \
        *ends = true; \
        return lower_direct(l, jcc_handlers[n], NULL); \
    case ZYDIS_MNEMONIC_SET##cc: return lower_setcc(l, n); \
    case ZYDIS_MNEMONIC_CMOV##cc: return lower_cmov(l, n);
    CONDITIONS(CASE)
#undef CASE
    case ZYDIS_MNEMONIC_JCXZ:
    case ZYDIS_MNEMONIC_JECXZ:
    case ZYDIS_MNEMONIC_JRCXZ: *ends = true; return lower_loop(l, 3);
    case ZYDIS_MNEMONIC_LOOPNE: *ends = true; return lower_loop(l, 0);
    case ZYDIS_MNEMONIC_LOOPE: *ends = true; return lower_loop(l, 1);
    case ZYDIS_MNEMONIC_LOOP: *ends = true; return lower_loop(l, 2);
    case ZYDIS_MNEMONIC_JMP: *ends = true; return lower_jump(l, false);
    case ZYDIS_MNEMONIC_CALL: *ends = true; return lower_jump(l, true);
    case ZYDIS_MNEMONIC_RET:
        if (is_far_return(l->insn))
            return false;
        *ends = true;
        return lower_ret(l);
    default: return false;
    }
}

static bool lower_integer(struct lowering *l)
{
    bool mem = l->insn->has_mem;

    switch (l->insn->mnemonic) {
    case ZYDIS_MNEMONIC_ADD: return lower_alu(l, ALU_ADD);
    case ZYDIS_MNEMONIC_OR: return lower_alu(l, ALU_OR);
    case ZYDIS_MNEMONIC_ADC: return lower_alu(l, ALU_ADC);
    case ZYDIS_MNEMONIC_SBB: return lower_alu(l, ALU_SBB);
    case ZYDIS_MNEMONIC_AND: return lower_alu(l, ALU_AND);
    case ZYDIS_MNEMONIC_SUB: return lower_alu(l, ALU_SUB);
    case ZYDIS_MNEMONIC_XOR: return lower_alu(l, ALU_XOR);
    case ZYDIS_MNEMONIC_CMP: return lower_alu(l, ALU_CMP);
    case ZYDIS_MNEMONIC_TEST: return lower_alu(l, ALU_TEST);
    case ZYDIS_MNEMONIC_MOV: return lower_mov(l);
    case ZYDIS_MNEMONIC_MOVZX: return lower_extend(l, false);
    case ZYDIS_MNEMONIC_MOVSX:
    case ZYDIS_MNEMONIC_MOVSXD: return lower_extend(l, true);
    case ZYDIS_MNEMONIC_LEA: return lower_lea(l);
    case ZYDIS_MNEMONIC_PUSH: return lower_push(l);
    case ZYDIS_MNEMONIC_POP: return lower_pop(l);
    case ZYDIS_MNEMONIC_INC: return lower_unary(l, UNARY_INC);
    case ZYDIS_MNEMONIC_DEC: return lower_unary(l, UNARY_DEC);
    case ZYDIS_MNEMONIC_NEG: return lower_unary(l, UNARY_NEG);
    case ZYDIS_MNEMONIC_NOT: return lower_unary(l, UNARY_NOT);
    case ZYDIS_MNEMONIC_ROL: return lower_shift(l, SHIFT_ROL);
    case ZYDIS_MNEMONIC_ROR: return lower_shift(l, SHIFT_ROR);
    case ZYDIS_MNEMONIC_RCL: return lower_shift(l, SHIFT_RCL);
    case ZYDIS_MNEMONIC_RCR: return lower_shift(l, SHIFT_RCR);
    case ZYDIS_MNEMONIC_SHL: return lower_shift(l, SHIFT_SHL);
    case ZYDIS_MNEMONIC_SHR: return lower_shift(l, SHIFT_SHR);
    case ZYDIS_MNEMONIC_SAR: return lower_shift(l, SHIFT_SAR);
    case ZYDIS_MNEMONIC_SHLD: return lower_double_shift(l, false);
    case ZYDIS_MNEMONIC_SHRD: return lower_double_shift(l, true);
    case ZYDIS_MNEMONIC_MUL: return lower_muldiv(l, MULDIV_MUL);
    case ZYDIS_MNEMONIC_IMUL: return lower_imul(l);
    case ZYDIS_MNEMONIC_DIV: return lower_muldiv(l, MULDIV_DIV);
    case ZYDIS_MNEMONIC_IDIV: return lower_muldiv(l, MULDIV_IDIV);
    case ZYDIS_MNEMONIC_BT: return lower_bit(l, BIT_BT);
    case ZYDIS_MNEMONIC_BTS: return lower_bit(l, BIT_BTS);
    case ZYDIS_MNEMONIC_BTR: return lower_bit(l, BIT_BTR);
    case ZYDIS_MNEMONIC_BTC: return lower_bit(l, BIT_BTC);
    case ZYDIS_MNEMONIC_BSF: return lower_scan(l, SCAN_BSF);
    case ZYDIS_MNEMONIC_BSR: return lower_scan(l, SCAN_BSR);
    case ZYDIS_MNEMONIC_TZCNT: return lower_scan(l, SCAN_TZCNT);
    case ZYDIS_MNEMONIC_LZCNT: return lower_scan(l, SCAN_LZCNT);
    case ZYDIS_MNEMONIC_POPCNT: return lower_scan(l, SCAN_POPCNT);
    case ZYDIS_MNEMONIC_XCHG:
        if (mem)
            return lower_atomic(l, AT_XCHG);
        lower_two(l);
        return set(l, xchg_rr_handlers[size_index(l->insn->operand[0].size)]);
    case ZYDIS_MNEMONIC_XADD: return mem && lower_atomic(l, AT_XADD);
    case ZYDIS_MNEMONIC_CMPXCHG: return mem && lower_atomic(l, AT_CMPXCHG);
    case ZYDIS_MNEMONIC_CMPXCHG8B:
    case ZYDIS_MNEMONIC_CMPXCHG16B:
        l->op->sub = l->insn->mnemonic == ZYDIS_MNEMONIC_CMPXCHG8B ? 8 : 16;
        attach(l);
        return set(l, op_cmpxchg_wide);
    case ZYDIS_MNEMONIC_BSWAP:
        l->op->dst = reg_offset(&l->insn->operand[0]);
        return set(l, bswap_handlers[size_index(l->insn->op_size)]);
    case ZYDIS_MNEMONIC_CBW: return set(l, convert_handlers[0][SIZE16]);
    case ZYDIS_MNEMONIC_CWDE: return set(l, convert_handlers[0][SIZE32]);
    case ZYDIS_MNEMONIC_CDQE: return set(l, convert_handlers[0][SIZE64]);
    case ZYDIS_MNEMONIC_CWD: return set(l, convert_handlers[1][SIZE16]);
    case ZYDIS_MNEMONIC_CDQ: return set(l, convert_handlers[1][SIZE32]);
    case ZYDIS_MNEMONIC_CQO: return set(l, convert_handlers[1][SIZE64]);
    case ZYDIS_MNEMONIC_LEAVE:
        return l->code_size == 8 && l->insn->op_size == 8 && set(l, op_leave64);
    case ZYDIS_MNEMONIC_MOVSB: case ZYDIS_MNEMONIC_MOVSW: case ZYDIS_MNEMONIC_MOVSQ: return lower_string(l, STRING_MOVS);
    case ZYDIS_MNEMONIC_MOVSD:
        return l->insn->category == ZYDIS_CATEGORY_STRINGOP && lower_string(l, STRING_MOVS);
    case ZYDIS_MNEMONIC_STOSB: case ZYDIS_MNEMONIC_STOSW: case ZYDIS_MNEMONIC_STOSD: case ZYDIS_MNEMONIC_STOSQ:
        return lower_string(l, STRING_STOS);
    case ZYDIS_MNEMONIC_LODSB: case ZYDIS_MNEMONIC_LODSW: case ZYDIS_MNEMONIC_LODSD: case ZYDIS_MNEMONIC_LODSQ:
        return lower_string(l, STRING_LODS);
    case ZYDIS_MNEMONIC_CMPSB: case ZYDIS_MNEMONIC_CMPSW: case ZYDIS_MNEMONIC_CMPSQ: return lower_string(l, STRING_CMPS);
    case ZYDIS_MNEMONIC_CMPSD:
        return l->insn->category == ZYDIS_CATEGORY_STRINGOP && lower_string(l, STRING_CMPS);
    case ZYDIS_MNEMONIC_SCASB: case ZYDIS_MNEMONIC_SCASW: case ZYDIS_MNEMONIC_SCASD: case ZYDIS_MNEMONIC_SCASQ:
        return lower_string(l, STRING_SCAS);
    case ZYDIS_MNEMONIC_LAHF: return set(l, op_lahf);
    case ZYDIS_MNEMONIC_SAHF: return set(l, op_sahf);
    case ZYDIS_MNEMONIC_CLD: return set(l, op_cld);
    case ZYDIS_MNEMONIC_STD: return set(l, op_std);
    case ZYDIS_MNEMONIC_CLC: return set(l, carry_handlers[0]);
    case ZYDIS_MNEMONIC_STC: return set(l, carry_handlers[1]);
    case ZYDIS_MNEMONIC_CMC: return set(l, carry_handlers[2]);
    case ZYDIS_MNEMONIC_NOP: case ZYDIS_MNEMONIC_PAUSE: case ZYDIS_MNEMONIC_ENDBR64: case ZYDIS_MNEMONIC_ENDBR32:
    case ZYDIS_MNEMONIC_LFENCE: case ZYDIS_MNEMONIC_SFENCE: case ZYDIS_MNEMONIC_PREFETCHT0: case ZYDIS_MNEMONIC_PREFETCHT1:
    case ZYDIS_MNEMONIC_PREFETCHT2: case ZYDIS_MNEMONIC_PREFETCHNTA: case ZYDIS_MNEMONIC_PREFETCHW:
        return set(l, op_nop);
    case ZYDIS_MNEMONIC_MFENCE: return set(l, op_mfence);
    default: return false;
    }
}

/* Not those that serialize: what other vCPUs made of the following code is seen after them. */
bool interp_goes_on(const struct x86_insn *insn)
{
    switch (insn->mnemonic) {
    case ZYDIS_MNEMONIC_RDTSC: case ZYDIS_MNEMONIC_RDTSCP: case ZYDIS_MNEMONIC_PUSHF:
    case ZYDIS_MNEMONIC_PUSHFD: case ZYDIS_MNEMONIC_PUSHFQ: case ZYDIS_MNEMONIC_CLI: case ZYDIS_MNEMONIC_RDMSR:
    case ZYDIS_MNEMONIC_RDRAND: case ZYDIS_MNEMONIC_RDSEED: case ZYDIS_MNEMONIC_RDPID: case ZYDIS_MNEMONIC_SWAPGS:
    case ZYDIS_MNEMONIC_RDFSBASE: case ZYDIS_MNEMONIC_RDGSBASE: case ZYDIS_MNEMONIC_WRFSBASE:
    case ZYDIS_MNEMONIC_WRGSBASE: case ZYDIS_MNEMONIC_CLFLUSH: case ZYDIS_MNEMONIC_CLFLUSHOPT: case ZYDIS_MNEMONIC_CLWB:
    case ZYDIS_MNEMONIC_XGETBV: case ZYDIS_MNEMONIC_STAC: case ZYDIS_MNEMONIC_CLAC: case ZYDIS_MNEMONIC_FXSAVE:
    case ZYDIS_MNEMONIC_FXSAVE64: case ZYDIS_MNEMONIC_FXRSTOR: case ZYDIS_MNEMONIC_FXRSTOR64: case ZYDIS_MNEMONIC_XSAVE:
    case ZYDIS_MNEMONIC_XSAVE64: case ZYDIS_MNEMONIC_XSAVEOPT: case ZYDIS_MNEMONIC_XSAVEOPT64: case ZYDIS_MNEMONIC_XSAVEC:
    case ZYDIS_MNEMONIC_XSAVEC64: case ZYDIS_MNEMONIC_XSAVES: case ZYDIS_MNEMONIC_XSAVES64: case ZYDIS_MNEMONIC_XRSTOR:
    case ZYDIS_MNEMONIC_XRSTOR64: case ZYDIS_MNEMONIC_XRSTORS: case ZYDIS_MNEMONIC_XRSTORS64: case ZYDIS_MNEMONIC_SGDT:
    case ZYDIS_MNEMONIC_SIDT: case ZYDIS_MNEMONIC_STR: case ZYDIS_MNEMONIC_SLDT: case ZYDIS_MNEMONIC_VERR:
    case ZYDIS_MNEMONIC_VERW: case ZYDIS_MNEMONIC_LSL: case ZYDIS_MNEMONIC_LAR: case ZYDIS_MNEMONIC_ENTER:
        return true;
    case ZYDIS_MNEMONIC_MOV:    /* reading a segment, control or debug register */
        return is_reg(&insn->operand[0]) || insn->operand[0].kind == OPERAND_MEM;
    case ZYDIS_MNEMONIC_PUSH: return true;
    default: return false;
    }
}

bool lower(struct interp *it, struct op *op, const struct x86_insn *insn)
{
    struct lowering l = { .it = it, .op = op, .insn = insn, .code_size = it->cpu.code_size };
    struct slow_insn *slow;
    bool ends = false;

    if (!x86_model_has_insn(it->cpu.model, insn)) {
        op->fn = op_undefined;
        return true;
    }
    if (lower_conditional(&l, &ends))
        return ends;
    if (lower_integer(&l))
        return false;

    slow = attach(&l);
    slow->semantics = x86_system_semantics(insn);
    if (slow->semantics) {
        bool plain = interp_goes_on(insn);

        op->fn = plain ? op_semantics : op_semantics_end;
        return !plain;
    }
    slow->semantics = x86_legacy_semantics(insn);
    if (slow->semantics) {
        op->fn = op_semantics;
        return false;
    }
    slow->native = native_prepare(insn);
    if (slow->native) {
        op->fn = op_native;
        return false;
    }
    op->fn = op_undefined;
    return true;
}
