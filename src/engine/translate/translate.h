/*
 * The translator's insides. It works on top of the interpreter: a block runs as decoded ops until it is warm, then a unit of
 * host code is made that begins with it. What translated code does not do itself it hands to the interpreter, one instruction at
 * a time or for good.
 *
 * Registers while translated code runs (the register mapping; why: docs/translator.md):
 *   guest RAX RCX RDX RBX RBP RSI RDI R8 R9 R12 R13 R14   host register of the same name
 *   guest RSP                                             host R15
 *   guest R10 R11 R15                                     memory
 *   host R10, R11                                         scratch
 *   host GS base                                          struct translator (first: struct interp, struct x86_cpu)
 *   host RSP                                              the return stack (below)
 * EFLAGS hold the guest's arithmetic flags wherever they can matter. Vector registers are in memory, or in the host's when
 * vectors_loaded is set; then MXCSR is the guest's too.
 *
 * The return stack: a guest CALL pushes the guest's return address on it and makes a host CALL; a guest RET makes a host
 * RET and compares, so the host predicts guest returns. It holds pairs: the host's address, the guest's above it. It only ever
 * predicts: what is on it may be dropped at any time by pointing RSP at its bottom, where a RET leads to the general way. It has a
 * guard page, whose hit does that.
 */
#ifndef RINGFORT_ENGINE_TRANSLATE_H
#define RINGFORT_ENGINE_TRANSLATE_H

#include <signal.h>

#include "engine/interp/interp.h"
#include "engine/translate/asm.h"
#include "engine/translate/code.h"
#include "engine/translate/options.h"

#define NO_DETOUR 1u
#define DETOUR_BLOCKS 2000u
#define TRANSLATE_JUMPS 16384u
#define TRANSLATE_JUMP_ROTATE 5         /* of the guest address, for the index; also log2 of an entry's size */
#define TRANSLATE_JUMPS_NOTED 2048u
#define TRANSLATE_ADDENDS 16u

/* Where indirect jumps lead, by guest address, in one address space and privilege. Emptied when mappings of code change. */
struct jump_entry_host {
    uint64_t rip;
    uint64_t negative;          /* minus rip */
    const void *code;           /* NULL: empty */
    uint64_t unused;
};
struct jump_table {
    struct jump_entry_host entry[TRANSLATE_JUMPS];
    uint16_t noted[TRANSLATE_JUMPS_NOTED];      /* entries that are not empty… */
    unsigned count;             /* …and how many; more than fit: any may be */
};
/* What enter() returns besides ops and chains: a RET whose target (in s.rip) has no translation. */
#define RETURNED_NOWHERE 2u

/*
 * Functions are aligned to 16 bytes, other targets are not: the sum gives neighbours entries of their own and aligned addresses
 * all entries, for 33 has no factor in common with their number.
 */
static inline unsigned translate_jump_index(uint64_t rip)
{
    uint64_t rotated = rip << TRANSLATE_JUMP_ROTATE | rip >> (64 - TRANSLATE_JUMP_ROTATE);

    return ((rotated + rip) >> TRANSLATE_JUMP_ROTATE) & (TRANSLATE_JUMPS - 1);
}

/* A place where translated code is left, patched into a jump when its target is translated. */
struct chain {
    struct block *block;        /* it belongs to */
    uint8_t *jump;              /* rel32 of the jump, writable view */
    uint8_t *stub;              /* where it leads while unpatched */
    const struct block *to;     /* what it is patched to, or NULL */
    struct chain *next;         /* of the same block */
    uint64_t target;            /* from cpu->code_page on; in another page: by way of the block's gate */
};

/* Where a RET comes back to; made void when the unit is dropped. */
struct return_site {
    uint8_t *code;              /* writable view */
    struct return_site *next;
};

/* Checked C code may use vector registers wherever it likes: then translated code calls none without leaving. */
#if defined(__SANITIZE_ADDRESS__)
#define TRANSLATE_SANITIZED 1
#else
#define TRANSLATE_SANITIZED 0
#endif

/* Instructions that translate_quick() does: sensitive ones that are frequent, and strings. */
enum translate_quick {
    QUICK_NONE, QUICK_CLI, QUICK_STI, QUICK_STAC, QUICK_CLAC, QUICK_SWAPGS, QUICK_PUSHF, QUICK_RDTSC, QUICK_RDTSCP,
    QUICK_MOVS, QUICK_STOS      /* with and without REP; span is the element's size */
};

/* A place in guest code where translated code may need the runtime. */
struct translate_site {
    struct block *block;
    const struct op *op;        /* the instruction, to be run alone; made when first needed */
    const void *retry, *back;   /* the check again; behind the instruction */
    const void *apart;          /* group: the instruction in the unit's version without groups; until that is made, what makes it */
    struct translate_site *next;
    uint16_t offset, index;     /* of the instruction: in its page, in its unit */
    uint16_t span;              /* bytes that the check covers */
    uint8_t kind;               /* enum tlb_kind */
    uint8_t length, align;      /* of the instruction; of the address when aligned */
    bool group, aligned;
    bool repeats;               /* QUICK_MOVS, QUICK_STOS: REP */
    bool behind_sti;            /* which is in line: leaving in front of this instruction leaves in STI's shadow */
    uint8_t quick;              /* enum translate_quick */
};

struct return_stack {
    uint8_t *memory;            /* guard page first */
    uint64_t *bottom;           /* RSP when empty */
    uint64_t *saved;            /* RSP while the other one is in use */
};

struct translator {
    struct interp it;           /* first */
    struct direct *direct;      /* direct.h; NULL: no direct execution */
    const struct x86_tlb_space *native_space;   /* whose user code is to be run natively, or NULL */
    gva_t detour;               /* page of user code that is interpreted all the same, until it is left; NO_DETOUR */
    unsigned detour_blocks;     /* how many blocks of it */
    bool user_mode;             /* what direct_entered() knows */
    struct code_memory code;
    struct jump_table *jumps;   /* [0] kernel, [1 + i] user's space i */
    struct jump_table *jumps_now;       /* the one in force while translated code runs */
    struct return_stack returns[2];     /* kernel, user */
    uint8_t return_mode;        /* which one is in use */
    const struct x86_tlb_space *return_space;   /* whose returns are on the user's */
    uint64_t tlb_mask;          /* PEXT masks */
    uint64_t jump_mask;
    uint64_t page_mask;
    uint64_t aligned_mask[7];   /* by log2 of the size: page_mask and the bits that an aligned address has not */
    uint64_t addend[TRANSLATE_ADDENDS];         /* of groups */
    uint64_t rcx, rax;          /* around JRCXZ; around LAHF and SAHF */
    uint16_t aside;             /* flags, as cpu.arith */
    uint32_t loop_turns;        /* of a loop with hoisted checks, until it looks around */
    uint8_t vectors_loaded;
    uint8_t vectors_reload;
    uint8_t interpret_once;     /* the next block is not to be entered by its translation, which would come back at once */
    uint8_t sti_shadow;         /* behind an STI in line: what cpu.s.interrupt_shadow is until the next instruction is done */
    uint8_t simd_trap;          /* cpu.simd_trap that translations were made for */
    struct unit *work;          /* the unit being translated */
    uint64_t host_rsp;
    void *signal_stack;
    stack_t former_signal_stack;
    void *self;                 /* this struct: translated code has its address only as the GS base */
    struct translate_site *site;        /* between the two halves of the miss routine */
    gva_t site_va;
    uint64_t slow_return;
    uint64_t value;             /* of a push, over the check of its store */
    uint64_t saved_code, saved_target;  /* of an indirect call, over the store of its return address; the first also: which RET missed */
    bool op_finished;           /* the op that was run alone went on to the next one */
    /* Routines, emitted once. */
    const struct op *(*enter)(struct translator *t, const void *code);
    const uint8_t *exit_null, *exit_op, *run_op, *run_quick, *run_and_go, *fill, *vectors_load, *return_missed;  /* writable view */
    const uint8_t *far, *jump_miss;     /* writable view */
    /* Executable view: what lies at the bottom of a return stack, and on it for a call of the interpreter's. */
    const void *return_stub, *return_interpreted;
    /* Settings and figures. */
    struct translate_options options;
    struct lockstep *lockstep;  /* NULL: not in lock-step mode */
    bool host_tsc;              /* the guest's TSC is the host's plus an offset */
    bool tracing;               /* blocks are written down as they are entered */
    bool diverged;              /* it found a difference: the run ends */
    bool lost;                  /* direct execution lost the guest's state: the same */
    uint64_t blocks, bytes, guest_bytes, apart, loops, chained, entered, fills, slow_ops, group_misses, jump_misses;
    uint64_t return_misses, stack_overflows;
};

static inline struct translator *translator_of(struct x86_cpu *cpu) { return (struct translator *)cpu; }

/* Unmasked exceptions are found by the interpreter's way of running vector instructions. */
static inline bool translate_masks_all(const struct x86_cpu *cpu) { return (cpu->s.fpu.mxcsr & 0x1f80) == 0x1f80; }

/* Emits the routines. */
void translate_emit_runtime(struct translator *t);
/*
 * Where a direct jump or call from another page may come in, with the guest address in T: it sees whether the block is still what is
 * mapped there, and looks for requests. Writable view. NULL: no room. Not from translated code.
 */
const uint8_t *translate_gate(struct translator *t, struct block *b);
struct unit *translate_work_create(void);
/* Translates the unit that begins with the block; false: not this one (now). */
bool translate_block(struct translator *t, struct block *b);
/* Its version without groups, for all its sites. False: no room (flush_wanted is set). */
bool translate_apart(struct translator *t, struct block *b);

/*
 * For the miss routine: makes the access of site to va possible. Host code to go on at, or NULL: the instruction needs
 * translate_slow(). Compiled without vector registers, which may be the guest's.
 */
const void *translate_fill(struct translator *t, struct translate_site *site, gva_t va);
/*
 * The sensitive instruction of site, with caller-saved registers and flags in the vCPU. False: it is not the simple case, and
 * nothing has been done. Compiled without vector registers, too.
 */
bool translate_quick(struct translator *t, const struct translate_site *site);
/*
 * For a look-up in the jump table that found nothing, with caller-saved registers and flags in the vCPU: the entry for the
 * guest address, made now, or NULL: it is not translated, or somebody wants something. Compiled like translate_fill().
 */
const struct jump_entry_host *translate_jump(struct translator *t, gva_t rip);
struct jump_entry_host *translate_enter_jump(struct jump_table *table, uint64_t rip, const void *code);
/* Does what fill could not, with all guest state in the vCPU: where to go on, or NULL to leave (s.rip is set). */
const void *translate_slow(struct translator *t, struct translate_site *site);
/* Runs the instruction of the site alone. The same result. */
const void *translate_run_op(struct translator *t, struct translate_site *site);

/* ---- returns.c ---- */
/* After the routines are there. 0 or a negative errno (logged). */
int translate_returns_create(struct translator *t);
void translate_returns_destroy(struct translator *t);
/* Around its running, in that thread: has the guard pages watched. 0 or a negative errno (logged). */
int translate_returns_attach(struct translator *t);
void translate_returns_detach(struct translator *t);
/* Drops what is on a return stack: 0 the supervisor's, 1 the user's. Not from translated code. */
void translate_forget_returns(struct translator *t, unsigned mode);

#endif
