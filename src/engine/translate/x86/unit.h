/*
 * The insides of the x86-64 translator: one translation unit on its way from guest bytes to host code.
 *
 *   analyse.c   decodes the unit: which instructions, which flags live where, which memory accesses share a check
 *   memory.c    checks of the soft TLB, and what a checked access is addressed by
 *   encode.c    guest instructions again as host instructions, with other registers and other memory operands
 *   insn.c      one instruction
 *   branch.c    control transfers
 *   loop.c      loops of one unit, without checks
 *   block.c     the unit as a whole, its slow paths and exits
 *
 * A unit is a run of guest instructions in one page, entered at its first one only. It goes on behind conditional branches that
 * are not taken and behind calls. Registers, and what they stand for: translate.h.
 */
#ifndef RINGFORT_ENGINE_TRANSLATE_X86_UNIT_H
#define RINGFORT_ENGINE_TRANSLATE_X86_UNIT_H

#include "engine/translate/translate.h"

#define T_GS(field) offsetof(struct translator, field)
#define CPU_GS(field) offsetof(struct x86_cpu, field)

/* Scratch registers. */
#define T H_R10
#define A H_R11

#define UNIT_MAX_INSNS 64
#define UNIT_MAX_STUBS 320
#define UNIT_MAX_GROUPS 64
/* What one translation takes from the block arena at most: a site or a chain for each stub. */
#define UNIT_MAX_ARENA ((UNIT_MAX_STUBS + UNIT_MAX_INSNS) * MAX(sizeof(struct translate_site), sizeof(struct chain)))
/* How far the accesses of one group may lie apart. A group that crosses a page has to do without. */
#define UNIT_GROUP_SPAN 256
/* No instruction's flags (struct unit_insn's source), but those that were put aside. */
#define UNIT_ASIDE 127

enum unit_form {
    FORM_OP,            /* run by the interpreter */
    FORM_NOP,
    FORM_COPY,          /* integer instruction copied with registers renamed */
    FORM_VECTOR,        /* the same for vector and VEX-encoded instructions */
    FORM_SELECTOR,      /* MOV from a segment register */
    FORM_LEA, FORM_PUSH, FORM_POP, FORM_LEAVE, FORM_DIVIDE,
    FORM_QUICK,         /* sensitive, done by translate_quick() without leaving the guest's registers */
    FORM_PUSHF,
    /* Control transfers. */
    FORM_JCC, FORM_CALL, FORM_CALL_INDIRECT,    /* the unit may go on behind these */
    FORM_JMP, FORM_JMP_INDIRECT, FORM_RET,
    FORM_END,           /* the interpreter's, which goes on from there */
};

/* One access to guest memory. */
struct access {
    uint8_t kind;               /* TLB_READ or TLB_WRITE; what reads and writes counts as a write */
    uint8_t size;               /* bytes, 1…64 */
    bool aligned;               /* another address than a multiple of size takes the slow path */
    bool shareable;             /* value and delta are set */
    int8_t group;               /* or -1: a check of its own */
    uint8_t seg;                /* SEG_FS or SEG_GS, else 0 */
    uint8_t base, index, shift; /* guest registers, X86_REG_RIP, X86_NO_REG */
    int32_t disp;               /* of RIP: from cpu->code_page on */
    /* The address is value + delta, where registers with the same value number hold the same value. */
    uint32_t value;
    int64_t delta;
};

/* Value numbers: the registers at the unit's start, then these, then new ones. */
enum { VALUE_ZERO = 16, VALUE_RIP, VALUE_FIRST };

/* A value number and what is to be added. */
struct value {
    uint32_t number;
    int64_t delta;
};

struct unit_insn {
    struct x86_insn insn;
    const struct native_insn *native;   /* FORM_VECTOR */
    uint64_t target;            /* of direct branches, from cpu->code_page on */
    uint16_t offset;            /* in the page */
    uint8_t form;               /* enum unit_form */
    uint8_t cc;                 /* FORM_JCC */
    uint16_t live;              /* flags that may be read, by this instruction or later, before they are written */
    /* The instruction whose flags these are, and that can be done again for them with what the registers hold (unit_flags()); or -1. */
    int8_t source;
    bool needs_flags;           /* all that are live are to be right in front of it */
    uint8_t checks_ahead;       /* its own and those behind it before flags are needed */
    bool crosses;               /* reaches into the next page; the unit's last */
    bool serial;                /* FORM_OP, FORM_QUICK: address space or permissions may be others afterwards */
    uint8_t accesses;
    struct access access[2];    /* in the order in which they can fault */
    struct value gpr[16];       /* before the instruction */
};

/* Accesses that one check serves. */
struct group {
    uint32_t value;
    uint8_t seg;
    bool write;
    bool checked;               /* emitted */
    bool open;                  /* no barrier since */
    bool stored;                /* its addend is in translator.addend[] too */
    uint8_t members, slot;
    uint8_t align;              /* of the address at lo, for members that need it; 1: none does */
    int64_t lo, hi;             /* bytes [value + lo, value + hi) */
    uint16_t at;                /* the instruction in front of which it is checked */
    uint16_t first, last;       /* instructions with members */
    struct access *leader;      /* how to address it there: seg, base, with disp for lo */
    uint8_t base, index;        /* the index is scaled as the leader's */
    int32_t disp;
};

/* A value number made of two others. */
struct sum {
    uint32_t base, index, number;
    uint8_t shift;
};

enum stub_kind {
    STUB_FILL,                  /* a check missed: T is the address, plus the entry's tag at A when tagged */
    STUB_RUN,                   /* the interpreter runs the instruction */
    STUB_CHAIN,                 /* leave for target; patched into a jump when that is translated. T is its address if it is in another page */
    STUB_AT,                    /* leave; the run loop goes on at target */
    STUB_INTERPRET,             /* leave; the interpreter executes what is at target, whether that is translated or not */
    STUB_CODE,                  /* to a routine of the runtime */
};

/* An exit or slow path, emitted behind the unit. */
struct stub {
    uint8_t *jump;              /* rel32 that leads to it */
    uint8_t kind;               /* enum stub_kind */
    uint8_t tag;                /* STUB_FILL: offset of the tag in the entry that T has in it; 0xff: none */
    bool restore_rcx;           /* from its slot */
    bool restore_flags;         /* from the return stack */
    bool behind_sti;            /* STUB_AT, STUB_INTERPRET: target is the instruction behind an STI in line */
    int8_t lost;                /* as struct unit's */
    struct translate_site *site;
    uint64_t target;            /* guest address, from cpu->code_page on */
    const uint8_t *code;
    const uint8_t *back;        /* a look-up: where to go on when the runtime found the target after all; else NULL */
};

/* What unit_live_at() found, for as long as no code was written and the page stayed one of code. */
struct live_memo {
    const uint8_t *host;
    uint64_t version;
    uint16_t live, from, to;
};
#define UNIT_MEMOS 4096u

struct unit {
    struct translator *t;
    struct block *b;
    struct assembler a;
    bool share;                 /* accesses share checks */
    bool failed;
    bool entered_anywhere;      /* it is the version without groups: entered at any instruction */
    bool vectors_ready;         /* guest's vector registers are in the host's */
    bool vectors_noted;         /* XINUSE says already that vector state changes */
    int lost;                   /* the same: EFLAGS hold something else than the guest's flags. UNIT_ASIDE: which are in translator.aside */
    int held;                   /* the group whose addend A holds, or -1 */
    unsigned insns, stubs, groups;
    unsigned end;               /* offset from the page's start behind the last instruction */
    uint16_t seen_from, seen_to;        /* bytes of the page that the translation depends on */
    uint16_t end_live;
    int back;                   /* the branch back to the unit's beginning that makes it a loop with hoisted checks; or -1 */
    unsigned loop_groups;       /* the first ones are the loop's */
    uint8_t *loop_jump;         /* from the first version into the loop */
    const uint8_t *loop_start, *loop_turn;      /* NULL in the first version */
    uint32_t values;            /* value numbers given out */
    unsigned sums;
    struct sum sum[32];
    uint8_t next_slot;
    struct unit_insn insn[UNIT_MAX_INSNS];
    struct group group[UNIT_MAX_GROUPS];
    struct stub stub[UNIT_MAX_STUBS];
    struct live_memo memo[UNIT_MEMOS];
    unsigned counted;           /* instructions */
    struct translate_site *sites;       /* of the instruction being emitted, linked by next: back is still to be set */
    const uint8_t *code[UNIT_MAX_INSNS];        /* writable view: where each instruction begins */
};

/* Host register of a guest register, or H_NONE: in memory. */
static const uint8_t unit_host_of[16] = { H_RAX, H_RCX, H_RDX,  H_RBX,  H_R15, H_RBP, H_RSI, H_RDI,
                                          H_R8,  H_R9,  H_NONE, H_NONE, H_R12, H_R13, H_R14, H_NONE };

/* ---- analyse.c ---- */
/* Fills x->insn and x->group for the block. False: no unit begins there. */
bool unit_analyse(struct unit *x);

/* The access's address can be had again by one LEA. */
bool unit_is_plain(const struct access *m);

/* Flags that code at this offset in the page may read before it writes them. */
uint16_t unit_live_at(struct unit *x, uint64_t offset);

/* ---- memory.c ---- */
/* Emits the shared checks that belong in front of instruction k. */
void unit_checks(struct unit *x, unsigned k);
/*
 * Makes access n of instruction k possible and gives the host operand for it, which may use T and A. leaves: a slow path that
 * cannot make it possible leaves the unit in front of the instruction instead of having it run.
 */
struct asm_address unit_place(struct unit *x, unsigned k, unsigned n, bool leaves);
/* A register that is free besides those of the operand (NULL: none) and those in taken; may change the operand to free one. */
unsigned unit_scratch(struct unit *x, unsigned k, struct asm_address *m, unsigned taken);
/* A is about to be overwritten by instruction k: keeps the addend in it for later if need be. */
void unit_take_a(struct unit *x, unsigned k);
/* All shared checks are void from here on. */
void unit_barrier(struct unit *x);

/*
 * Flags are dead. T := offset in its page of [base + (index << shift) + disp], A := its entry in the soft TLB, if that has it for all of the
 * group's bytes; otherwise goes to missed. base may be X86_REG_RIP, or as index X86_NO_REG.
 */
void unit_look_up(struct unit *x, unsigned base, unsigned index, unsigned shift, const struct group *g, const uint8_t *missed);

/* ---- encode.c ---- */
/* A legacy-encoded instruction; reg and rm replace ModRM's registers (H_NONE: as they are), m its memory operand. */
void unit_copy(struct unit *x, const struct x86_insn *insn, unsigned reg, unsigned rm, const struct asm_address *m);
/* A VEX- or EVEX-encoded one; vvvv as reg. */
void unit_copy_vex(struct unit *x, const struct x86_insn *insn, unsigned reg, unsigned vvvv, unsigned rm,
                   const struct asm_address *m);

/* ---- insn.c ---- */
/* What form an instruction gets that is no control transfer. */
void unit_classify(struct unit *x, struct unit_insn *i);
/* FORM_QUICK: whether address space, permissions or segments may be others afterwards. */
bool unit_quick_serial(const struct x86_insn *insn);
void unit_insn(struct unit *x, unsigned k);
/* Sees to it that vector registers are the guest's (vectors) and that what was not in use before is noted (components). dead: flags are. */
void unit_vectors(struct unit *x, bool vectors, bool components, bool dead);
/* Flags may be overwritten in front of instruction k: they are dead, or unit_flags() can make them again. Notes that in the latter case. */
bool unit_may_clobber(struct unit *x, unsigned k);
/* Makes the flags right if they were overwritten. T and A stay. */
void unit_flags(struct unit *x);
/* The same for code beside, which goes on in the same state. */
void unit_flags_of(struct unit *x, int source);

/* ---- branch.c ---- */
void unit_branch(struct unit *x, unsigned k);
/* In front of an instruction that reaches into the next page: leaves when that is not the page it was decoded from. */
void unit_cross(struct unit *x, unsigned k);
/* Leaves for the target, from the page's start on, where somebody wants something. */
void unit_poll(struct unit *x, uint16_t live, uint64_t target);
/* To a fixed target, all else being done. live: flags that may be read there. backward: looks for requests. */
void unit_goto(struct unit *x, uint64_t target, uint16_t live, bool backward);
/* s.rip := offset from the page's start; A is lost. */
void unit_set_rip(struct unit *x, uint64_t offset);
/* T := the guest address that lies offset from the page's start. */
void unit_target(struct unit *x, uint64_t offset);

/* ---- loop.c ---- */
/* Whether the unit is a loop that can be done without checks: x->back. */
void unit_find_loop(struct unit *x);
/* Emits that version of it. entry: of the first. */
void unit_loop(struct unit *x, const uint8_t *entry);
/* The branch back, taken, in either version. */
void unit_loop_back(struct unit *x);

/* ---- block.c ---- */
/* One instruction, without checks of groups. */
void unit_body(struct unit *x, unsigned k);

struct stub *unit_stub(struct unit *x, enum stub_kind kind, uint8_t *jump);
/* A place in guest code for the runtime; see translate.h. */
struct translate_site *unit_site(struct unit *x, unsigned k);
/* The instruction in front of k is an STI in line, so none comes between. */
bool unit_behind_sti(const struct unit *x, unsigned k);
/* For leaving in front of the instruction behind an STI: its shadow goes along. T is lost, flags stay. */
void unit_keep_shadow(struct unit *x);
/* Saves RCX in its slot and restores it: for sequences around JRCXZ. */
void unit_save_rcx(struct unit *x);
void unit_restore_rcx(struct unit *x);
/* The instruction run by the interpreter, in line. */
void unit_op(struct unit *x, unsigned k);
/* The same, by way of translate_quick(). */
void unit_quick(struct unit *x, unsigned k, enum translate_quick quick);

#endif
