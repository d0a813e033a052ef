/*
 * Two-operand arithmetic and logic: ADD, OR, ADC, SBB, AND, SUB, XOR, CMP, TEST in all sizes and
 * operand forms. The host's own instruction computes result and flags.
 */
#include "engine/interp/compute.h"

/* Destination written. */
#define DEFINE_WRITING(name, bits) \
    HANDLER(name##bits##_rr) \
    { \
        uint32_t f = cpu->arith; \
        SET##bits(op->dst, compute_##name##bits(R##bits(op->dst), R##bits(op->src), &f)); \
        cpu->arith = f; \
        NEXT; \
    } \
    HANDLER(name##bits##_ri) \
    { \
        uint32_t f = cpu->arith; \
        SET##bits(op->dst, compute_##name##bits(R##bits(op->dst), (uint##bits##_t)op->imm, &f)); \
        cpu->arith = f; \
        NEXT; \
    } \
    DEFINE_WRITING_MEM(name, bits, b, B) \
    DEFINE_WRITING_MEM(name, bits, x, X) \
    DEFINE_WRITING_MEM(name, bits, g, G)
#define DEFINE_WRITING_MEM(name, bits, ea, EA) \
    MEM_HANDLER(name##bits##_rm_##ea) \
    { \
        LD(bits, v, EA_##EA(bits / 8, false)); \
        uint32_t f = cpu->arith; \
        SET##bits(op->dst, compute_##name##bits(R##bits(op->dst), v, &f)); \
        cpu->arith = f; \
        NEXT; \
    } \
    MEM_HANDLER(name##bits##_mr_##ea) \
    { \
        uint32_t f = cpu->arith; \
        RMW(bits, EA_##EA(bits / 8, true), compute_##name##bits(old, R##bits(op->src), &f)); \
        cpu->arith = f; \
        NEXT; \
    } \
    MEM_HANDLER(name##bits##_mi_##ea) \
    { \
        uint32_t f = cpu->arith; \
        RMW(bits, EA_##EA(bits / 8, true), compute_##name##bits(old, (uint##bits##_t)op->imm, &f)); \
        cpu->arith = f; \
        NEXT; \
    }

/* Only flags written: CMP and TEST. */
#define DEFINE_COMPARING(name, bits) \
    HANDLER(name##bits##_rr) \
    { \
        uint32_t f = cpu->arith; \
        compute_##name##bits(R##bits(op->dst), R##bits(op->src), &f); \
        cpu->arith = f; \
        NEXT; \
    } \
    HANDLER(name##bits##_ri) \
    { \
        uint32_t f = cpu->arith; \
        compute_##name##bits(R##bits(op->dst), (uint##bits##_t)op->imm, &f); \
        cpu->arith = f; \
        NEXT; \
    } \
    DEFINE_COMPARING_MEM(name, bits, b, B) \
    DEFINE_COMPARING_MEM(name, bits, x, X) \
    DEFINE_COMPARING_MEM(name, bits, g, G)
#define DEFINE_COMPARING_MEM(name, bits, ea, EA) \
    MEM_HANDLER(name##bits##_rm_##ea) \
    { \
        LD(bits, v, EA_##EA(bits / 8, false)); \
        uint32_t f = cpu->arith; \
        compute_##name##bits(R##bits(op->dst), v, &f); \
        cpu->arith = f; \
        NEXT; \
    } \
    MEM_HANDLER(name##bits##_mr_##ea) \
    { \
        LD(bits, v, EA_##EA(bits / 8, false)); \
        uint32_t f = cpu->arith; \
        compute_##name##bits(v, R##bits(op->src), &f); \
        cpu->arith = f; \
        NEXT; \
    } \
    MEM_HANDLER(name##bits##_mi_##ea) \
    { \
        LD(bits, v, EA_##EA(bits / 8, false)); \
        uint32_t f = cpu->arith; \
        compute_##name##bits(v, (uint##bits##_t)op->imm, &f); \
        cpu->arith = f; \
        NEXT; \
    }

#define DEFINE_OPERATION(name, KIND) DEFINE_##KIND(name, 8) DEFINE_##KIND(name, 16) DEFINE_##KIND(name, 32) DEFINE_##KIND(name, 64)
DEFINE_OPERATION(add, WRITING)
DEFINE_OPERATION(or, WRITING)
DEFINE_OPERATION(adc, WRITING)
DEFINE_OPERATION(sbb, WRITING)
DEFINE_OPERATION(and, WRITING)
DEFINE_OPERATION(sub, WRITING)
DEFINE_OPERATION(xor, WRITING)
DEFINE_OPERATION(cmp, COMPARING)
DEFINE_OPERATION(test, COMPARING)

#define SIZES_OF(n) { FORMS_OF(n##8), FORMS_OF(n##16), FORMS_OF(n##32), FORMS_OF(n##64) }

op_fn *const alu_handlers[ALUS][SIZES][FORMS] = {
    [ALU_ADD] = SIZES_OF(add), [ALU_OR] = SIZES_OF(or), [ALU_ADC] = SIZES_OF(adc),
    [ALU_SBB] = SIZES_OF(sbb), [ALU_AND] = SIZES_OF(and), [ALU_SUB] = SIZES_OF(sub),
    [ALU_XOR] = SIZES_OF(xor), [ALU_CMP] = SIZES_OF(cmp), [ALU_TEST] = SIZES_OF(test),
};
