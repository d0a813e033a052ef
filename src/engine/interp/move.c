/*
 * Data movement: MOV, MOVZX/MOVSX, LEA, CMOVcc, SETcc, PUSH, POP, XCHG of registers, BSWAP,
 * sign extension of the accumulator, flag loads and stores.
 */
#include "engine/interp/interp.h"

/* ---- MOV ---- */
#define DEFINE_MOV(bits) \
    HANDLER(mov##bits##_rr) \
    { \
        SET##bits(op->dst, R##bits(op->src)); \
        NEXT; \
    } \
    HANDLER(mov##bits##_ri) \
    { \
        SET##bits(op->dst, (uint##bits##_t)op->imm); \
        NEXT; \
    } \
    DEFINE_MOV_MEM(bits, b, B) \
    DEFINE_MOV_MEM(bits, x, X) \
    DEFINE_MOV_MEM(bits, g, G)
#define DEFINE_MOV_MEM(bits, ea, EA) \
    MEM_HANDLER(mov##bits##_rm_##ea) \
    { \
        LD(bits, v, EA_##EA(bits / 8, false)); \
        SET##bits(op->dst, v); \
        NEXT; \
    } \
    MEM_HANDLER(mov##bits##_mr_##ea) \
    { \
        ST(bits, EA_##EA(bits / 8, true), R##bits(op->src)); \
        NEXT; \
    } \
    MEM_HANDLER(mov##bits##_mi_##ea) \
    { \
        ST(bits, EA_##EA(bits / 8, true), op->imm); \
        NEXT; \
    }
DEFINE_MOV(8)
DEFINE_MOV(16)
DEFINE_MOV(32)
DEFINE_MOV(64)

op_fn *const mov_handlers[SIZES][FORMS] = { FORMS_OF(mov8), FORMS_OF(mov16), FORMS_OF(mov32), FORMS_OF(mov64) };

/* ---- MOVZX, MOVSX, MOVSXD ---- */
#define DEFINE_EXTEND(name, to, from, cast) \
    HANDLER(name##to##from##_r) \
    { \
        SET##to(op->dst, (cast)R##from(op->src)); \
        NEXT; \
    } \
    DEFINE_EXTEND_MEM(name, to, from, cast, b, B) \
    DEFINE_EXTEND_MEM(name, to, from, cast, x, X) \
    DEFINE_EXTEND_MEM(name, to, from, cast, g, G)
#define DEFINE_EXTEND_MEM(name, to, from, cast, ea, EA) \
    MEM_HANDLER(name##to##from##_##ea) \
    { \
        LD(from, v, EA_##EA(from / 8, false)); \
        SET##to(op->dst, (cast)v); \
        NEXT; \
    }
#define DEFINE_EXTENDS(to) \
    DEFINE_EXTEND(zx, to, 8, uint8_t) \
    DEFINE_EXTEND(zx, to, 16, uint16_t) \
    DEFINE_EXTEND(sx, to, 8, int8_t) \
    DEFINE_EXTEND(sx, to, 16, int16_t) \
    DEFINE_EXTEND(sx, to, 32, int32_t)
DEFINE_EXTENDS(16)
DEFINE_EXTENDS(32)
DEFINE_EXTENDS(64)
#define EXTENDS_OF(name, to) { [SIZE8] = FORM1_OF(name##to##8), [SIZE16] = FORM1_OF(name##to##16) }
#define EXTENDS3_OF(name, to) \
    { [SIZE8] = FORM1_OF(name##to##8), [SIZE16] = FORM1_OF(name##to##16), [SIZE32] = FORM1_OF(name##to##32) }
op_fn *const extend_handlers[2][SIZES][SIZES][FORM1S] = {
    { [SIZE16] = EXTENDS_OF(zx, 16), [SIZE32] = EXTENDS_OF(zx, 32), [SIZE64] = EXTENDS_OF(zx, 64) },
    { [SIZE16] = EXTENDS3_OF(sx, 16), [SIZE32] = EXTENDS3_OF(sx, 32), [SIZE64] = EXTENDS3_OF(sx, 64) },
};

/* ---- LEA: the offset alone, so X here is without the segment base ---- */
#define DEFINE_LEA(bits) \
    HANDLER(lea##bits##_b) \
    { \
        SET##bits(op->dst, ea_b(cpu, op)); \
        NEXT; \
    } \
    HANDLER(lea##bits##_x) \
    { \
        SET##bits(op->dst, R64(op->base) + (R64(op->index) << op->scale) + (uint64_t)op->disp); \
        NEXT; \
    } \
    HANDLER(lea##bits##_g) \
    { \
        enter_slow(cpu, op); \
        SET##bits(op->dst, x86_effective(cpu, &((struct slow_insn *)op->aux)->insn)); \
        NEXT; \
    }
DEFINE_LEA(16)
DEFINE_LEA(32)
DEFINE_LEA(64)
op_fn *const lea_handlers[SIZES][3] = {
    [SIZE16] = { lea16_b, lea16_x, lea16_g },
    [SIZE32] = { lea32_b, lea32_x, lea32_g },
    [SIZE64] = { lea64_b, lea64_x, lea64_g },
};

/* ---- CMOVcc: the load happens and may fault either way; 32 bits clear the upper half either way ---- */
#define DEFINE_CMOV(cc, bits) \
    HANDLER(cmov##cc##_##bits##_r) \
    { \
        SET##bits(op->dst, condition(cpu->arith, cc) ? R##bits(op->src) : R##bits(op->dst)); \
        NEXT; \
    } \
    DEFINE_CMOV_MEM(cc, bits, b, B) \
    DEFINE_CMOV_MEM(cc, bits, x, X) \
    DEFINE_CMOV_MEM(cc, bits, g, G)
#define DEFINE_CMOV_MEM(cc, bits, ea, EA) \
    MEM_HANDLER(cmov##cc##_##bits##_##ea) \
    { \
        LD(bits, v, EA_##EA(bits / 8, false)); \
        SET##bits(op->dst, condition(cpu->arith, cc) ? v : R##bits(op->dst)); \
        NEXT; \
    }
#define DEFINE_SETCC(cc) \
    HANDLER(set##cc##_r) \
    { \
        SET8(op->dst, condition(cpu->arith, cc)); \
        NEXT; \
    } \
    DEFINE_SETCC_MEM(cc, b, B) \
    DEFINE_SETCC_MEM(cc, x, X) \
    DEFINE_SETCC_MEM(cc, g, G)
#define DEFINE_SETCC_MEM(cc, ea, EA) \
    MEM_HANDLER(set##cc##_##ea) \
    { \
        ST(8, EA_##EA(1, true), condition(cpu->arith, cc)); \
        NEXT; \
    }
#define DEFINE_CC(cc) \
    DEFINE_CMOV(cc, 16) \
    DEFINE_CMOV(cc, 32) \
    DEFINE_CMOV(cc, 64) \
    DEFINE_SETCC(cc)
DEFINE_CC(0)
DEFINE_CC(1)
DEFINE_CC(2)
DEFINE_CC(3)
DEFINE_CC(4)
DEFINE_CC(5)
DEFINE_CC(6)
DEFINE_CC(7)
DEFINE_CC(8)
DEFINE_CC(9)
DEFINE_CC(10)
DEFINE_CC(11)
DEFINE_CC(12)
DEFINE_CC(13)
DEFINE_CC(14)
DEFINE_CC(15)
#define CMOV_OF(cc) \
    { [SIZE16] = FORM1_OF(cmov##cc##_16), [SIZE32] = FORM1_OF(cmov##cc##_32), [SIZE64] = FORM1_OF(cmov##cc##_64) }
op_fn *const cmov_handlers[16][SIZES][FORM1S] = {
    CMOV_OF(0), CMOV_OF(1), CMOV_OF(2), CMOV_OF(3), CMOV_OF(4), CMOV_OF(5), CMOV_OF(6), CMOV_OF(7),
    CMOV_OF(8), CMOV_OF(9), CMOV_OF(10), CMOV_OF(11), CMOV_OF(12), CMOV_OF(13), CMOV_OF(14), CMOV_OF(15),
};
op_fn *const setcc_handlers[16][FORM1S] = {
    FORM1_OF(set0), FORM1_OF(set1), FORM1_OF(set2), FORM1_OF(set3), FORM1_OF(set4), FORM1_OF(set5),
    FORM1_OF(set6), FORM1_OF(set7), FORM1_OF(set8), FORM1_OF(set9), FORM1_OF(set10), FORM1_OF(set11),
    FORM1_OF(set12), FORM1_OF(set13), FORM1_OF(set14), FORM1_OF(set15),
};

/* ---- PUSH and POP in 64-bit mode; other modes go through x86_push() and x86_pop() (slow.c) ---- */
#define RSP_ cpu->s.gpr[RSP]
#define DEFINE_PUSH(bits) \
    MEM_HANDLER(push##bits##_r) \
    { \
        ST(bits, RSP_ - bits / 8, R##bits(op->src)); \
        RSP_ -= bits / 8; \
        NEXT; \
    } \
    MEM_HANDLER(push##bits##_i) \
    { \
        ST(bits, RSP_ - bits / 8, op->imm); \
        RSP_ -= bits / 8; \
        NEXT; \
    } \
    DEFINE_PUSH_MEM(bits, b, B) \
    DEFINE_PUSH_MEM(bits, x, X) \
    DEFINE_PUSH_MEM(bits, g, G)
#define DEFINE_PUSH_MEM(bits, ea, EA) \
    MEM_HANDLER(push##bits##_##ea) \
    { \
        LD(bits, v, EA_##EA(bits / 8, false)); \
        ST(bits, RSP_ - bits / 8, v); \
        RSP_ -= bits / 8; \
        NEXT; \
    }
DEFINE_PUSH(16)
DEFINE_PUSH(64)
op_fn *const push_handlers[SIZES][5] = {
    [SIZE16] = { push16_r, push16_b, push16_x, push16_g, push16_i },
    [SIZE64] = { push64_r, push64_b, push64_x, push64_g, push64_i },
};

/* POP to memory forms its address with RSP already raised; on a fault RSP is as before. */
#define DEFINE_POP(bits) \
    MEM_HANDLER(pop##bits##_r) \
    { \
        LD(bits, v, RSP_); \
        RSP_ += bits / 8; \
        SET##bits(op->dst, v); \
        NEXT; \
    } \
    DEFINE_POP_MEM(bits, b, B) \
    DEFINE_POP_MEM(bits, x, X) \
    DEFINE_POP_MEM(bits, g, G)
#define DEFINE_POP_MEM(bits, ea, EA) \
    HANDLER(pop##bits##_##ea) \
    { \
        uint64_t rsp = RSP_; \
        uint##bits##_t v = (uint##bits##_t)ld_slow(cpu, op, rsp, bits / 8); \
        gva_t va; \
        RSP_ = rsp + bits / 8; \
        va = EA_##EA(bits / 8, true); \
        RSP_ = rsp; \
        st_slow(cpu, op, va, v, bits / 8); \
        RSP_ = rsp + bits / 8; \
        NEXT; \
    }
DEFINE_POP(16)
DEFINE_POP(64)
op_fn *const pop_handlers[SIZES][FORM1S] = { [SIZE16] = FORM1_OF(pop16), [SIZE64] = FORM1_OF(pop64) };

MEM_HANDLER(leave64)
{
    LD(64, v, cpu->s.gpr[RBP]);
    RSP_ = cpu->s.gpr[RBP] + 8;
    cpu->s.gpr[RBP] = v;
    NEXT;
}
const struct op *op_leave64(struct x86_cpu *cpu, const struct op *op) { return leave64(cpu, op); }

/* ---- exchanges and conversions ---- */
#define DEFINE_XCHG(bits) \
    HANDLER(xchg##bits) \
    { \
        uint##bits##_t a = R##bits(op->dst), b = R##bits(op->src); \
        SET##bits(op->dst, b); \
        SET##bits(op->src, a); \
        NEXT; \
    }
DEFINE_XCHG(8)
DEFINE_XCHG(16)
DEFINE_XCHG(32)
DEFINE_XCHG(64)
op_fn *const xchg_rr_handlers[SIZES] = { xchg8, xchg16, xchg32, xchg64 };

/* BSWAP of 16 bits is undefined; processors clear the low word. */
HANDLER(bswap16)
{
    SET16(op->dst, 0);
    NEXT;
}
HANDLER(bswap32)
{
    SET32(op->dst, __builtin_bswap32(R32(op->dst)));
    NEXT;
}
HANDLER(bswap64)
{
    SET64(op->dst, __builtin_bswap64(R64(op->dst)));
    NEXT;
}
op_fn *const bswap_handlers[SIZES] = { [SIZE16] = bswap16, [SIZE32] = bswap32, [SIZE64] = bswap64 };

HANDLER(cbw)
{
    SET16(RAX_, (int8_t)R8(RAX_));
    NEXT;
}
HANDLER(cwde)
{
    SET32(RAX_, (int16_t)R16(RAX_));
    NEXT;
}
HANDLER(cdqe)
{
    SET64(RAX_, (int64_t)(int32_t)R32(RAX_));
    NEXT;
}
HANDLER(cwd)
{
    SET16(RDX_, (int16_t)R16(RAX_) >> 15);
    NEXT;
}
HANDLER(cdq)
{
    SET32(RDX_, (int32_t)R32(RAX_) >> 31);
    NEXT;
}
HANDLER(cqo)
{
    SET64(RDX_, (int64_t)R64(RAX_) >> 63);
    NEXT;
}
op_fn *const convert_handlers[2][SIZES] = {
    { [SIZE16] = cbw, [SIZE32] = cwde, [SIZE64] = cdqe },
    { [SIZE16] = cwd, [SIZE32] = cdq, [SIZE64] = cqo },
};

/* ---- flags and nothing ---- */
const struct op *op_nop(struct x86_cpu *cpu, const struct op *op) { NEXT; }

/* Loads and stores of the guest are those of the host, so its fence is the guest's. */
const struct op *op_mfence(struct x86_cpu *cpu, const struct op *op)
{
    atomic_thread_fence(memory_order_seq_cst);
    NEXT;
}

const struct op *op_lahf(struct x86_cpu *cpu, const struct op *op)
{
    R8(RAX_ + 1) = (uint8_t)(((cpu->arith >> 8) & 0xd5) | 2);
    NEXT;
}

const struct op *op_sahf(struct x86_cpu *cpu, const struct op *op)
{
    cpu->arith = (cpu->arith & 1) | ((R8(RAX_ + 1) & 0xd5u) | 2u) << 8;
    NEXT;
}

const struct op *op_cld(struct x86_cpu *cpu, const struct op *op)
{
    cpu->s.rflags &= ~(uint64_t)RFLAGS_DF;
    NEXT;
}

const struct op *op_std(struct x86_cpu *cpu, const struct op *op)
{
    cpu->s.rflags |= RFLAGS_DF;
    NEXT;
}

HANDLER(clc)
{
    cpu->arith &= ~0x100u;
    NEXT;
}
HANDLER(stc)
{
    cpu->arith |= 0x100u;
    NEXT;
}
HANDLER(cmc)
{
    cpu->arith ^= 0x100u;
    NEXT;
}
op_fn *const carry_handlers[3] = { clc, stc, cmc };
