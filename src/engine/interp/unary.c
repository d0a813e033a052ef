/*
 * One-operand arithmetic, shifts and rotates, multiplication and division, bit tests and scans.
 */
#include "engine/interp/compute.h"

/* ---- INC, DEC, NEG, NOT ---- */
#define DEFINE_UNARY_FORM(name, bits, ea, EA) \
    MEM_HANDLER(name##bits##_##ea) \
    { \
        uint32_t f = cpu->arith; \
        RMW(bits, EA_##EA(bits / 8, true), compute_##name##bits(old, &f)); \
        cpu->arith = f; \
        NEXT; \
    }
#define DEFINE_UNARY(name, bits) \
    HANDLER(name##bits##_r) \
    { \
        uint32_t f = cpu->arith; \
        SET##bits(op->dst, compute_##name##bits(R##bits(op->dst), &f)); \
        cpu->arith = f; \
        NEXT; \
    } \
    DEFINE_UNARY_FORM(name, bits, b, B) \
    DEFINE_UNARY_FORM(name, bits, x, X) \
    DEFINE_UNARY_FORM(name, bits, g, G)
#define DEFINE_UNARIES(name) \
    DEFINE_UNARY(name, 8) \
    DEFINE_UNARY(name, 16) \
    DEFINE_UNARY(name, 32) \
    DEFINE_UNARY(name, 64)
DEFINE_UNARIES(inc)
DEFINE_UNARIES(dec)
DEFINE_UNARIES(neg)
DEFINE_UNARIES(not)
#define SIZES_OF(n) { FORM1_OF(n##8), FORM1_OF(n##16), FORM1_OF(n##32), FORM1_OF(n##64) }
op_fn *const unary_handlers[UNARIES][SIZES][FORM1S] = { SIZES_OF(inc), SIZES_OF(dec), SIZES_OF(neg), SIZES_OF(not) };

/* ---- shifts and rotates ---- */

/*
 * ROL and ROR by more than one leave OF undefined. On some processors (Intel's since Sandy Bridge) those of a register by an
 * immediate leave it alone, unlike all others.
 */
static bool rotates_keep_overflow;

static __attribute__((constructor)) void try_rotates(void)
{
    rotates_keep_overflow = true;
    for (unsigned overflow = 0; overflow < 2; overflow++)
        for (uint64_t bits = 0; bits < 64; bits += 9) {
            uint64_t v = bits << 57 | bits;
            uint32_t f = overflow;

            __asm__(LOAD_FLAGS "rolq $5, %[v]" SAVE_FLAGS : [v] "+&r"(v), "+&a"(f) : : "cc");
            if ((f & 1) != overflow)
                rotates_keep_overflow = false;
        }
}

static inline uint32_t after_rotate(uint32_t before, uint32_t after, uint8_t count, unsigned bits)
{
    return rotates_keep_overflow && (count & (bits == 64 ? 63 : 31)) > 1 ? (after & ~1u) | (before & 1) : after;
}
#define ANY_FLAGS(f, count, bits) (f)
#define ROTATE_FLAGS(f, count, bits) after_rotate(cpu->arith, f, count, bits)
#define DEFINE_SHIFT_FORMS(name, bits, by, count, flags) \
    HANDLER(name##bits##by##_r) \
    { \
        uint32_t f = cpu->arith; \
        SET##bits(op->dst, compute_##name##bits(R##bits(op->dst), count, &f)); \
        cpu->arith = flags(f, count, bits); \
        NEXT; \
    } \
    DEFINE_SHIFT_MEM(name, bits, by, count, b, B) \
    DEFINE_SHIFT_MEM(name, bits, by, count, x, X) \
    DEFINE_SHIFT_MEM(name, bits, by, count, g, G)
#define DEFINE_SHIFT_MEM(name, bits, by, count, ea, EA) \
    MEM_HANDLER(name##bits##by##_##ea) \
    { \
        uint32_t f = cpu->arith; \
        RMW(bits, EA_##EA(bits / 8, true), compute_##name##bits(old, count, &f)); \
        cpu->arith = f; \
        NEXT; \
    }
#define DEFINE_SHIFT(name, bits, flags) \
    DEFINE_SHIFT_FORMS(name, bits, _imm, (uint8_t)op->imm, flags) \
    DEFINE_SHIFT_FORMS(name, bits, _cl, (uint8_t)cpu->s.gpr[RCX], ANY_FLAGS)
#define DEFINE_SHIFTS(name, flags) \
    DEFINE_SHIFT(name, 8, flags) \
    DEFINE_SHIFT(name, 16, flags) \
    DEFINE_SHIFT(name, 32, flags) \
    DEFINE_SHIFT(name, 64, flags)
DEFINE_SHIFTS(rol, ROTATE_FLAGS)
DEFINE_SHIFTS(ror, ROTATE_FLAGS)
DEFINE_SHIFTS(rcl, ANY_FLAGS)
DEFINE_SHIFTS(rcr, ANY_FLAGS)
DEFINE_SHIFTS(shl, ANY_FLAGS)
DEFINE_SHIFTS(shr, ANY_FLAGS)
DEFINE_SHIFTS(sar, ANY_FLAGS)
#define BY_OF(n) { FORM1_OF(n##_imm), FORM1_OF(n##_cl) }
#define SHIFTS_OF(n) { BY_OF(n##8), BY_OF(n##16), BY_OF(n##32), BY_OF(n##64) }
op_fn *const shift_handlers[SHIFTS][SIZES][2][FORM1S] = {
    [SHIFT_ROL] = SHIFTS_OF(rol), [SHIFT_ROR] = SHIFTS_OF(ror), [SHIFT_RCL] = SHIFTS_OF(rcl),
    [SHIFT_RCR] = SHIFTS_OF(rcr), [SHIFT_SHL] = SHIFTS_OF(shl), [SHIFT_SHR] = SHIFTS_OF(shr),
    [SHIFT_SAR] = SHIFTS_OF(sar),
};

/* ---- SHLD, SHRD ---- */
#define DEFINE_DOUBLE_FORMS(name, bits, by, count) \
    HANDLER(name##bits##by##_r) \
    { \
        uint32_t f = cpu->arith; \
        SET##bits(op->dst, compute_##name##bits(R##bits(op->dst), R##bits(op->src), count, &f)); \
        cpu->arith = f; \
        NEXT; \
    } \
    DEFINE_DOUBLE_MEM(name, bits, by, count, b, B) \
    DEFINE_DOUBLE_MEM(name, bits, by, count, x, X) \
    DEFINE_DOUBLE_MEM(name, bits, by, count, g, G)
#define DEFINE_DOUBLE_MEM(name, bits, by, count, ea, EA) \
    MEM_HANDLER(name##bits##by##_##ea) \
    { \
        uint32_t f = cpu->arith; \
        RMW(bits, EA_##EA(bits / 8, true), compute_##name##bits(old, R##bits(op->src), count, &f)); \
        cpu->arith = f; \
        NEXT; \
    }
#define DEFINE_DOUBLE(name, bits) \
    DEFINE_DOUBLE_FORMS(name, bits, _imm, (uint8_t)op->imm) \
    DEFINE_DOUBLE_FORMS(name, bits, _cl, (uint8_t)cpu->s.gpr[RCX])
DEFINE_DOUBLE(shld, 16)
DEFINE_DOUBLE(shld, 32)
DEFINE_DOUBLE(shld, 64)
DEFINE_DOUBLE(shrd, 16)
DEFINE_DOUBLE(shrd, 32)
DEFINE_DOUBLE(shrd, 64)
op_fn *const double_shift_handlers[2][SIZES][2][FORM1S] = {
    { [SIZE16] = BY_OF(shld16), [SIZE32] = BY_OF(shld32), [SIZE64] = BY_OF(shld64) },
    { [SIZE16] = BY_OF(shrd16), [SIZE32] = BY_OF(shrd32), [SIZE64] = BY_OF(shrd64) },
};

/* ---- MUL, IMUL, DIV, IDIV of the accumulator ---- */

/*
 * The multiplication's flags: CF and OF say whether the high half matters, the others are undefined and taken from the
 * host, which is given the guest's flags before.
 */
#define DEFINE_MULTIPLY(name, bits) \
    static inline void multiply_##name##bits(struct x86_cpu *cpu, uint##bits##_t b) \
    { \
        uint##bits##_t hi; \
        uint64_t lo = R64(RAX_); \
        uint64_t f = cpu->arith; \
        __asm__("xchgq %%rax, %[f]\n\t" LOAD_FLAGS "xchgq %%rax, %[f]\n\t" #name SFX##bits " %[b]\n\t" \
                "movq %%rax, %[f]" SAVE_FLAGS \
                : "+&a"(lo), "=&d"(hi), [f] "+&r"(f) \
                : [b] "r"(b) \
                : "cc"); \
        cpu->arith = (uint16_t)lo; \
        SET##bits(RAX_, f); \
        SET##bits(RDX_, hi); \
    }
DEFINE_MULTIPLY(mul, 16)
DEFINE_MULTIPLY(mul, 32)
DEFINE_MULTIPLY(mul, 64)
DEFINE_MULTIPLY(imul, 16)
DEFINE_MULTIPLY(imul, 32)
DEFINE_MULTIPLY(imul, 64)
#define DEFINE_MULTIPLY8(name) \
    static inline void multiply_##name##8(struct x86_cpu *cpu, uint8_t b) \
    { \
        uint64_t ax = R64(RAX_), f = cpu->arith; \
        __asm__("xchgq %%rax, %[f]\n\t" LOAD_FLAGS "xchgq %%rax, %[f]\n\t" #name "b %[b]\n\t" \
                "movq %%rax, %[f]" SAVE_FLAGS \
                : "+&a"(ax), [f] "+&r"(f) \
                : [b] "q"(b) \
                : "cc"); \
        cpu->arith = (uint16_t)ax; \
        SET16(RAX_, f); \
    }
DEFINE_MULTIPLY8(mul)
DEFINE_MULTIPLY8(imul)

static __attribute__((noinline, cold)) _Noreturn void divide_error(struct x86_cpu *cpu, const struct op *op)
{
    enter_slow(cpu, op);
    x86_raise(cpu, X86_DE);
}

/* With the guest's flags, which the host leaves undefined in its own way. What would fault has been found before. */
#define DEFINE_DIVISION(name, bits) \
    static inline void run_##name##bits(struct x86_cpu *cpu, uint##bits##_t b) \
    { \
        uint64_t lo = R64(RAX_), hi = R64(RDX_), f = cpu->arith; \
        __asm__("xchgq %%rax, %[f]\n\t" LOAD_FLAGS "xchgq %%rax, %[f]\n\t" #name SFX##bits " %[b]\n\t" \
                "movq %%rax, %[f]" SAVE_FLAGS \
                : "+&a"(lo), "+&d"(hi), [f] "+&r"(f) \
                : [b] "r"(b) \
                : "cc"); \
        cpu->arith = (uint16_t)lo; \
        SET##bits(RAX_, f); \
        SET##bits(RDX_, hi); \
    }
#define DEFINE_DIVIDE(bits, uwide, swide) \
    DEFINE_DIVISION(div, bits) \
    DEFINE_DIVISION(idiv, bits) \
    static inline void multiply_div##bits(struct x86_cpu *cpu, const struct op *op, uint##bits##_t b) \
    { \
        if (unlikely(R##bits(RDX_) >= b)) \
            divide_error(cpu, op); \
        run_div##bits(cpu, b); \
    } \
    static inline void multiply_idiv##bits(struct x86_cpu *cpu, const struct op *op, uint##bits##_t b) \
    { \
        swide n = (swide)((uwide)R##bits(RDX_) << bits | R##bits(RAX_)), d = (int##bits##_t)b; \
        if (unlikely(d == 0 || (d == -1 && n == (swide)((uwide)1 << (2 * bits - 1))))) \
            divide_error(cpu, op); \
        /* Dividing twice costs; most dividends are no wider than the quotient, which then fits but for one case. */ \
        if (unlikely(n != (swide)(int##bits##_t)n || d == -1) && n / d != (swide)(int##bits##_t)(n / d)) \
            divide_error(cpu, op); \
        run_idiv##bits(cpu, b); \
    }
DEFINE_DIVIDE(16, uint32_t, int32_t)
DEFINE_DIVIDE(32, uint64_t, int64_t)
DEFINE_DIVIDE(64, unsigned __int128, __int128)

#define DEFINE_DIVISION8(name) \
    static inline void run_##name##8(struct x86_cpu *cpu, uint8_t b) \
    { \
        uint64_t ax = R64(RAX_), f = cpu->arith; \
        __asm__("xchgq %%rax, %[f]\n\t" LOAD_FLAGS "xchgq %%rax, %[f]\n\t" #name "b %[b]\n\t" \
                "movq %%rax, %[f]" SAVE_FLAGS \
                : "+&a"(ax), [f] "+&r"(f) \
                : [b] "q"(b) \
                : "cc"); \
        cpu->arith = (uint16_t)ax; \
        SET16(RAX_, f); \
    }
DEFINE_DIVISION8(div)
DEFINE_DIVISION8(idiv)

static inline void multiply_div8(struct x86_cpu *cpu, const struct op *op, uint8_t b)
{
    if (unlikely(R16(RAX_) >> 8 >= b))
        divide_error(cpu, op);
    run_div8(cpu, b);
}

static inline void multiply_idiv8(struct x86_cpu *cpu, const struct op *op, uint8_t b)
{
    int n = (int16_t)R16(RAX_), d = (int8_t)b;

    if (unlikely(d == 0 || n / d != (int8_t)(n / d)))
        divide_error(cpu, op);
    run_idiv8(cpu, b);
}

#define DEFINE_MULDIV(name, bits, call) \
    HANDLER(name##bits##_r) \
    { \
        uint##bits##_t v = R##bits(op->dst); \
        call; \
        NEXT; \
    } \
    DEFINE_MULDIV_MEM(name, bits, call, b, B) \
    DEFINE_MULDIV_MEM(name, bits, call, x, X) \
    DEFINE_MULDIV_MEM(name, bits, call, g, G)
#define DEFINE_MULDIV_MEM(name, bits, call, ea, EA) \
    MEM_HANDLER(name##bits##_##ea) \
    { \
        LD(bits, v, EA_##EA(bits / 8, false)); \
        call; \
        NEXT; \
    }
#define DEFINE_MULDIVS(bits) \
    DEFINE_MULDIV(mul, bits, multiply_mul##bits(cpu, v)) \
    DEFINE_MULDIV(imul, bits, multiply_imul##bits(cpu, v)) \
    DEFINE_MULDIV(div, bits, multiply_div##bits(cpu, op, v)) \
    DEFINE_MULDIV(idiv, bits, multiply_idiv##bits(cpu, op, v))
DEFINE_MULDIVS(8)
DEFINE_MULDIVS(16)
DEFINE_MULDIVS(32)
DEFINE_MULDIVS(64)
op_fn *const muldiv_handlers[MULDIVS][SIZES][FORM1S] = { SIZES_OF(mul), SIZES_OF(imul), SIZES_OF(div), SIZES_OF(idiv) };

/* ---- IMUL with two and three operands ---- */
#define DEFINE_IMUL_FORM(bits, ea, EA) \
    MEM_HANDLER(imul2_##bits##_##ea) \
    { \
        LD(bits, v, EA_##EA(bits / 8, false)); \
        uint32_t f = cpu->arith; \
        SET##bits(op->dst, compute_imul##bits(R##bits(op->dst), v, &f)); \
        cpu->arith = f; \
        NEXT; \
    } \
    MEM_HANDLER(imul3_##bits##_##ea) \
    { \
        LD(bits, v, EA_##EA(bits / 8, false)); \
        uint32_t f = cpu->arith; \
        SET##bits(op->dst, compute_imul##bits(v, (uint##bits##_t)op->imm, &f)); \
        cpu->arith = f; \
        NEXT; \
    }
#define DEFINE_IMUL(bits) \
    HANDLER(imul2_##bits##_r) \
    { \
        uint32_t f = cpu->arith; \
        SET##bits(op->dst, compute_imul##bits(R##bits(op->dst), R##bits(op->src), &f)); \
        cpu->arith = f; \
        NEXT; \
    } \
    HANDLER(imul3_##bits##_r) \
    { \
        uint32_t f = cpu->arith; \
        SET##bits(op->dst, compute_imul##bits(R##bits(op->src), (uint##bits##_t)op->imm, &f)); \
        cpu->arith = f; \
        NEXT; \
    } \
    DEFINE_IMUL_FORM(bits, b, B) \
    DEFINE_IMUL_FORM(bits, x, X) \
    DEFINE_IMUL_FORM(bits, g, G)
DEFINE_IMUL(16)
DEFINE_IMUL(32)
DEFINE_IMUL(64)
#define WIDE_OF(n) { [SIZE16] = FORM1_OF(n##16), [SIZE32] = FORM1_OF(n##32), [SIZE64] = FORM1_OF(n##64) }
op_fn *const imul2_handlers[SIZES][FORM1S] = WIDE_OF(imul2_);
op_fn *const imul3_handlers[SIZES][FORM1S] = WIDE_OF(imul3_);

/*
 * ---- BT, BTS, BTR, BTC ----
 * With a register as bit offset and memory as base, the offset reaches beyond the operand: it selects the
 * word first (SDM vol. 2, BT).
 */
#define BIT_WORD(bits) ((gva_t)((int64_t)(int##bits##_t)R##bits(op->src) >> (bits == 64 ? 6 : bits == 32 ? 5 : 4)) * (bits / 8))
#define DEFINE_BIT_REG(name, bits) \
    HANDLER(name##bits##_reg_r) \
    { \
        uint32_t f = cpu->arith; \
        uint##bits##_t v = compute_##name##bits(R##bits(op->dst), R##bits(op->src), &f); \
        BIT_COMMIT_##name(bits) \
        cpu->arith = f; \
        NEXT; \
    } \
    HANDLER(name##bits##_imm_r) \
    { \
        uint32_t f = cpu->arith; \
        uint##bits##_t v = compute_##name##bits(R##bits(op->dst), (uint##bits##_t)op->imm, &f); \
        BIT_COMMIT_##name(bits) \
        cpu->arith = f; \
        NEXT; \
    }
#define BIT_COMMIT_bt(bits) (void)v;
#define BIT_COMMIT_bts(bits) SET##bits(op->dst, v);
#define BIT_COMMIT_btr(bits) SET##bits(op->dst, v);
#define BIT_COMMIT_btc(bits) SET##bits(op->dst, v);
#define DEFINE_BT_MEM(bits, ea, EA) \
    MEM_HANDLER(bt##bits##_reg_##ea) \
    { \
        LD(bits, v, BIT_EA(bits, ea, false)); \
        uint32_t f = cpu->arith; \
        compute_bt##bits(v, R##bits(op->src), &f); \
        cpu->arith = f; \
        NEXT; \
    } \
    MEM_HANDLER(bt##bits##_imm_##ea) \
    { \
        LD(bits, v, EA_##EA(bits / 8, false)); \
        uint32_t f = cpu->arith; \
        compute_bt##bits(v, (uint##bits##_t)op->imm, &f); \
        cpu->arith = f; \
        NEXT; \
    }
#define DEFINE_BTX_MEM(name, bits, ea, EA) \
    MEM_HANDLER(name##bits##_reg_##ea) \
    { \
        uint32_t f = cpu->arith; \
        RMW(bits, BIT_EA(bits, ea, true), compute_##name##bits(old, R##bits(op->src), &f)); \
        cpu->arith = f; \
        NEXT; \
    } \
    MEM_HANDLER(name##bits##_imm_##ea) \
    { \
        uint32_t f = cpu->arith; \
        RMW(bits, EA_##EA(bits / 8, true), compute_##name##bits(old, (uint##bits##_t)op->imm, &f)); \
        cpu->arith = f; \
        NEXT; \
    }
#define BIT_EA(bits, ea, write) BIT_EA_##ea(bits, write)
#define BIT_EA_b(bits, write) (ea_b(cpu, op) + BIT_WORD(bits))
#define BIT_EA_x(bits, write) (ea_x(cpu, op) + BIT_WORD(bits))
#define BIT_EA_g(bits, write) bit_ea_slow(cpu, op, (int64_t)BIT_WORD(bits), bits / 8, write)

gva_t bit_ea_slow(struct x86_cpu *cpu, const struct op *op, int64_t distance, unsigned size, bool write)
{
    struct x86_insn insn = ((struct slow_insn *)op->aux)->insn;

    enter_slow(cpu, op);
    insn.mem.disp += distance;
    return x86_linear(cpu, &insn, size, write);
}
#define DEFINE_BITS(bits) \
    DEFINE_BIT_REG(bt, bits) \
    DEFINE_BIT_REG(bts, bits) \
    DEFINE_BIT_REG(btr, bits) \
    DEFINE_BIT_REG(btc, bits) \
    DEFINE_BT_MEM(bits, b, B) \
    DEFINE_BT_MEM(bits, x, X) \
    DEFINE_BT_MEM(bits, g, G) \
    DEFINE_BTX_MEM(bts, bits, b, B) \
    DEFINE_BTX_MEM(bts, bits, x, X) \
    DEFINE_BTX_MEM(bts, bits, g, G) \
    DEFINE_BTX_MEM(btr, bits, b, B) \
    DEFINE_BTX_MEM(btr, bits, x, X) \
    DEFINE_BTX_MEM(btr, bits, g, G) \
    DEFINE_BTX_MEM(btc, bits, b, B) \
    DEFINE_BTX_MEM(btc, bits, x, X) \
    DEFINE_BTX_MEM(btc, bits, g, G)
DEFINE_BITS(16)
DEFINE_BITS(32)
DEFINE_BITS(64)
#define BIT_BY(n) { FORM1_OF(n##_reg), FORM1_OF(n##_imm) }
#define BIT_SIZES(n) { [SIZE16] = BIT_BY(n##16), [SIZE32] = BIT_BY(n##32), [SIZE64] = BIT_BY(n##64) }
op_fn *const bit_handlers[BITS][SIZES][2][FORM1S] = { BIT_SIZES(bt), BIT_SIZES(bts), BIT_SIZES(btr), BIT_SIZES(btc) };

/* ---- BSF, BSR, TZCNT, LZCNT, POPCNT ---- */
#define SCAN_SET_count(bits, v) SET##bits(op->dst, v)
#define SCAN_GET_count(bits) R##bits(op->dst)
#define SCAN_SET_keep(bits, v) (R64(op->dst) = (v))
#define SCAN_GET_keep(bits) R64(op->dst)
#define DEFINE_SCAN_FORM(name, bits, kind, ea, EA) \
    MEM_HANDLER(name##bits##_##ea) \
    { \
        LD(bits, v, EA_##EA(bits / 8, false)); \
        uint32_t f = cpu->arith; \
        SCAN_SET_##kind(bits, compute_##name##bits(SCAN_GET_##kind(bits), v, &f)); \
        cpu->arith = f; \
        NEXT; \
    }
#define DEFINE_SCAN_FORMS(name, bits, kind) \
    HANDLER(name##bits##_r) \
    { \
        uint32_t f = cpu->arith; \
        SCAN_SET_##kind(bits, compute_##name##bits(SCAN_GET_##kind(bits), R##bits(op->src), &f)); \
        cpu->arith = f; \
        NEXT; \
    } \
    DEFINE_SCAN_FORM(name, bits, kind, b, B) \
    DEFINE_SCAN_FORM(name, bits, kind, x, X) \
    DEFINE_SCAN_FORM(name, bits, kind, g, G)
#define DEFINE_SCANS(bits) \
    DEFINE_SCAN_FORMS(bsf, bits, keep) \
    DEFINE_SCAN_FORMS(bsr, bits, keep) \
    DEFINE_SCAN_FORMS(tzcnt, bits, count) \
    DEFINE_SCAN_FORMS(lzcnt, bits, count) \
    DEFINE_SCAN_FORMS(popcnt, bits, count)
DEFINE_SCANS(16)
DEFINE_SCANS(32)
DEFINE_SCANS(64)
op_fn *const scan_handlers[SCANS][SIZES][FORM1S] = {
    WIDE_OF(bsf), WIDE_OF(bsr), WIDE_OF(tzcnt), WIDE_OF(lzcnt), WIDE_OF(popcnt),
};
