/*
 * The translator's insides. It works on the interpreter's blocks: a block runs as decoded ops until it is warm, then
 * its ops are translated to host code that hands to the interpreter, op by op, what it does not do itself.
 *
 * Registers while translated code runs (the register mapping; why: docs/translator.md):
 *   guest RAX RDX RBX RBP RSI RDI R8 R9 R12 R13           host register of the same name
 *   guest RSP, RCX                                        host R15, R14
 *   guest R10 R11 R14 R15                                 memory
 *   host R10, R11, RCX                                    scratch
 *   host GS base                                          struct translator (first: struct interp, struct x86_cpu)
 *   host RSP                                              the host's stack
 * EFLAGS hold the guest's arithmetic flags at every instruction boundary. Vector state is in memory.
 */
#ifndef RINGFORT_ENGINE_TRANSLATE_H
#define RINGFORT_ENGINE_TRANSLATE_H

#include "engine/interp/interp.h"
#include "engine/translate/asm.h"
#include "engine/translate/code.h"
#include "engine/translate/options.h"

#define TRANSLATE_JUMPS 16384u
#define TRANSLATE_JUMP_SHIFT 2

static inline unsigned translate_jump_index(uint64_t rip)
{
    return (rip >> TRANSLATE_JUMP_SHIFT) & (TRANSLATE_JUMPS - 1);
}

/*
 * Where indirect jumps lead, by guest address. Valid until the next change of mappings, hence emptied then; one table for
 * user and one for kernel mode. Tags are negated, so that a sum of zero means equal.
 */
struct jump_table {
    uint64_t tag[TRANSLATE_JUMPS];      /* minus the guest address; of another index when empty */
    const void *code[TRANSLATE_JUMPS];
};

/* A place where translated code is left, patched into a jump when its target is translated. */
struct chain {
    struct block *block;        /* it belongs to */
    uint8_t *jump;              /* rel32 of the jump, writable view */
    uint8_t *stub;              /* where it leads while unpatched */
    const struct block *to;     /* what it is patched to, or NULL */
    struct chain *next;         /* of the same block */
    uint64_t target;            /* from cpu->code_page on */
};

struct translator {
    struct interp it;           /* first */
    struct code_memory code;
    struct jump_table *jumps;   /* [0] kernel, [1] user */
    struct jump_table *jumps_now;       /* the one in force while translated code runs */
    bool jumps_used[2];         /* not empty */
    uint64_t tlb_mask;          /* PEXT masks */
    uint64_t jump_mask;
    uint64_t page_mask;
    uint64_t aligned_mask[7];   /* by log2 of the size: page_mask and the bits that an aligned address has not */
    uint8_t simd_trap;          /* cpu.simd_trap that translations were made for */
    uint64_t saved_code, saved_target;  /* over the store of a return address */
    struct translation *work;   /* the block being translated */
    uint64_t host_rsp;
    void *self;                 /* this struct: translated code has its address only as the GS base */
    bool op_finished;           /* the op that was run alone went on to the next one */
    /* Routines, emitted once. */
    const struct op *(*enter)(struct translator *t, const void *code);
    const uint8_t *exit_null, *exit_op, *slow;      /* writable view */
    /* Settings and figures. */
    struct translate_options options;
    uint64_t blocks, bytes, chained, indirect_misses, entered;
};

static inline struct translator *translator_of(struct x86_cpu *cpu) { return (struct translator *)cpu; }

/* Emits the routines. */
void translate_emit_runtime(struct translator *t);
struct translation *translate_work_create(void);
/* Translates a block; false: not this one (now). */
bool translate_block(struct translator *t, struct block *b);
/* Runs one op alone for translated code: 1 when it went on, 0 when translated code has to be left (s.rip is set). */
int translate_run_op(struct x86_cpu *cpu, const struct op *op);
/* Copies op so that it can be run alone. next: address of the following instruction. */
const struct op *translate_single(struct translator *t, const struct op *op, struct block *b);

#endif
