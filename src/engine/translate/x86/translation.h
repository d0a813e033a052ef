/* Between block.c (a block's translation) and vector.c (its vector instructions). */
#ifndef RINGFORT_ENGINE_TRANSLATE_X86_TRANSLATION_H
#define RINGFORT_ENGINE_TRANSLATE_X86_TRANSLATION_H

#include "engine/translate/translate.h"

#define T_GS(field) offsetof(struct translator, field)
#define CPU_GS(field) offsetof(struct x86_cpu, field)

/* Scratch registers; JRCXZ is the one jump on a value that leaves flags alone, hence RCX. */
#define T H_R10
#define A H_R11
#define S H_RCX

#define MAX_STUBS 160
/* What one translation takes from the block arena at most: an op pair or a chain for each stub and instruction. */
#define MAX_ARENA ((MAX_STUBS + 64) * 2 * sizeof(struct op))

enum stub_kind {
    STUB_OP,                    /* run the op, come back */
    STUB_EXIT_OP,               /* leave; the interpreter goes on with the op */
    STUB_CHAIN,                 /* leave for target; patched into a jump when that is translated */
    STUB_AT,                    /* leave; the run loop goes on at target */
};

/* An exit or slow path, emitted behind the block. */
struct stub {
    uint8_t *jump;              /* rel32 that leads to it */
    uint8_t *back;              /* where it continues; NULL: it leaves */
    enum stub_kind kind;
    const struct op *op;
    uint64_t target;            /* guest address, from cpu->code_page on */
};

struct translation {
    struct translator *t;
    struct block *b;
    struct assembler a;
    struct stub stub[MAX_STUBS];
    unsigned stubs;
    bool failed;
    bool vectors_noted;         /* XINUSE says already that vector state changes */
};

/* Host register of a guest register, or H_NONE: in memory. */
static const uint8_t translate_host_of[16] = { H_RAX, H_R14, H_RDX, H_RBX,  H_R15,  H_RBP, H_RSI,  H_RDI,
                                               H_R8,  H_R9,  H_NONE, H_NONE, H_R12, H_R13, H_NONE, H_NONE };

void translate_add_stub(struct translation *x, enum stub_kind kind, uint8_t *jump, uint8_t *back, const struct op *op,
                        uint64_t target);
/* T := linear address of the memory operand. False: a form that is left to the interpreter; nothing was emitted. */
bool translate_address(struct translation *x, const struct x86_insn *insn, uint64_t next);
/*
 * T: linear address → host pointer. Returns the jump of the miss, to be bound by translate_add_stub(). A is destroyed.
 * aligned: an address that is not a multiple of size misses too.
 */
uint8_t *translate_check(struct translation *x, unsigned size, enum tlb_kind kind, bool aligned);

/* Vector and other VEX instructions whose operands can stay what they are. False: the interpreter has to run it. */
bool translate_vector(struct translation *x, const struct x86_insn *insn, const struct op *op);

#endif
