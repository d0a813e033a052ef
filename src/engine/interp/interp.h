/*
 * The interpreter's insides: decoded blocks made of ops, and how handlers are written.
 *
 * A block is a run of guest instructions up to a control transfer, each lowered to one struct op that
 * holds all its handler needs. Handlers call each other in tail position (threaded code): NEXT
 * continues with the following op. Where the compiler does not turn that into a jump (sanitizer
 * and debug builds), handlers return the next op to a loop instead; handler text is the same.
 *
 * A handler that may raise goes through the ld and st functions or calls enter_slow() first, so that s.rip is exact, and
 * changes guest state only after everything that can raise.
 */
#ifndef RINGFORT_ENGINE_INTERP_H
#define RINGFORT_ENGINE_INTERP_H

#include "base/util.h"
#include "engine/soft.h"
#include "isa/x86/cpu.h"
#include "isa/x86/native.h"

struct op;
typedef const struct op *op_fn(struct x86_cpu *cpu, const struct op *op);

struct op {
    op_fn *fn;
    uint64_t rip;               /* where the instruction is, from cpu->code_page on: op_rip() */
    uint64_t imm;               /* immediate, or the target of a direct branch, from cpu->code_page on */
    int64_t disp;               /* displacement; for RIP-relative operands from cpu->code_page on */
    uint16_t dst, src;          /* registers as byte offsets into struct x86_cpu */
    uint16_t base, index;       /* the same; absent ones name a field that is always 0 */
    uint16_t seg_base;
    uint8_t scale;              /* shift of the index */
    uint8_t len;                /* bytes of the instruction */
    uint16_t n;                 /* instructions of the block before this one */
    uint16_t sub;               /* small selector for shared handlers */
    void *aux;                  /* struct slow_insn, or the struct block of a branch */
};

/* What ops for rarer instructions need besides. Lives in the block arena. */
struct slow_insn {
    x86_semantics_fn *semantics;
    const struct native_insn *native;
    struct x86_insn insn;
};

/*
 * Where the instructions came from. 64-bit code is keyed by host address and mode alone, so programs that share pages share
 * blocks wherever they map them; in other modes the guest address belongs to the key.
 */
struct block {
    uint64_t origin;            /* block_origin() */
    const uint8_t *host;        /* host address of the first byte */
    const uint8_t *host2;       /* the second page, when the last instruction, or that of its translation, crosses into it; else NULL */
    gpa_t gpa, gpa2;            /* of the first byte; of the second page's start */
    uint16_t bytes;             /* guest bytes covered */
    uint16_t second;            /* …and bytes in the second page that it depends on */
    uint16_t ops;
    uint8_t mode;               /* interp_mode() it is for */
    bool dead;
    struct block *next_hash;
    struct block *next_page, *next_page2;   /* lists of the code pages */
    const struct op *link[2];   /* successors in the same page: fall-through, taken */
    /* The translator's (NULL or 0 without): host code, its entry and way out in the writable view, ways to others. */
    const void *code;           /* with cpu->code_page set */
    const void *indirect;       /* sets it, from the guest address in a scratch register */
    uint8_t *entry, *leave, *gate;      /* gate: where jumps from other pages come in, or NULL */
    struct chain *chains;
    struct return_site *returns;
    struct translate_site *sites;
    uint16_t insns;             /* guest instructions that are translated together with it */
    bool apart;                 /* translated without shared checks too */
    uint32_t heat;              /* how often it ran before it was translated */
    uint32_t runs;              /* lock-step: how often its translation was entered, */
    struct lockstep_line *line; /* and its instructions one by one */
    uint16_t seen_from, seen_to;        /* bytes of the first page, besides the block's, that its translation depends on */
    struct op op[];
};

#define JUMP_CACHE_BITS 14
struct jump_entry {
    uint64_t origin;
    const uint8_t *host;
    const struct op *op;
    uint64_t mode;
};

/* What becomes of user code. */
enum interp_user {
    INTERP_USER_BLOCK,          /* go on with the block at s.rip */
    INTERP_USER_STEP,           /* one instruction */
    INTERP_USER_AGAIN,          /* it ran: look for requests */
};

struct code_page;
struct chain;
struct return_site;
struct lockstep_line;
struct translate_site;
struct interp;

/* What an engine on top of the block cache adds. */
struct block_hooks {
    op_fn *prologue;            /* put in front of each block that may be translated, with the block as aux */
    void (*killed)(struct interp *it, struct block *b);
    void (*unlink)(struct block *from, const struct block *to);     /* from is not to jump to to any more */
    void (*flushed)(struct interp *it);
};

/*
 * Where the translator predicts returns (translate.h): pairs of host and guest address, growing down. The interpreter keeps it
 * in step with the calls and returns that it executes.
 */
struct interp_returns {
    uint64_t *top;              /* NULL: there is none */
    uint64_t *bottom, *limit;
    uint64_t stub;              /* host address for calls of the interpreter's */
};

struct interp {
    struct x86_cpu cpu;         /* first: handlers get a struct x86_cpu* */
    struct jump_entry jump[1 << JUMP_CACHE_BITS];
    struct soft_vcpu soft;
    const struct block_hooks *block_hooks;      /* NULL: none */
    enum interp_user (*run_user)(struct interp *it);    /* who may run user code otherwise, or NULL */
    struct interp_returns returns;
    /* Block cache. */
    struct block **hash;
    struct code_page **page_hash;
    uint8_t *arena;
    size_t arena_used, arena_size;
    bool arena_reserve;         /* block_alloc() gives out scratch_insn instead */
    struct block *scratch;      /* one instruction for a single step */
    struct slow_insn *scratch_insn;
    bool flush_wanted;          /* the arena is full: drop everything at the next safe point */
    _Atomic uint8_t sipi_vector;        /* of REQUEST_START */
    uint64_t blocks_decoded, block_flushes, code_writes;
};

static inline struct interp *interp_of(struct x86_cpu *cpu) { return (struct interp *)cpu; }

/* The part of the processor's mode that decoded blocks depend on. */
static inline unsigned interp_mode(const struct x86_cpu *cpu)
{
    return cpu->code_size | (unsigned)(cpu->cpl == 3) << 4 | (unsigned)(cpu->stack_size & 12) << 3;
}

/* ---- dispatch ---- */
#if defined(__OPTIMIZE__) && !defined(__SANITIZE_ADDRESS__) && !defined(RINGFORT_NO_TAIL_CALLS)
#define GO(o) return (o)->fn(cpu, (o))
#else
#define GO(o) return (o)
#endif
#define GO_SLOW() return slow(cpu, op)
#define NEXT \
    do { \
        const struct op *next_ = op + 1; \
        GO(next_); \
    } while (0)
#define HANDLER(name) static const struct op *name(struct x86_cpu *cpu, const struct op *op)

/* ---- registers ---- */
#define R8(o) (*(uint8_t *)((char *)cpu + (o)))
#define R16(o) (*(uint16_t *)((char *)cpu + (o)))
#define R32(o) (*(uint32_t *)((char *)cpu + (o)))
#define R64(o) (*(uint64_t *)((char *)cpu + (o)))
/* Writing 32 bits clears the upper half. */
#define SET8(o, v) (R8(o) = (uint8_t)(v))
#define SET16(o, v) (R16(o) = (uint16_t)(v))
#define SET32(o, v) (R64(o) = (uint32_t)(v))
#define SET64(o, v) (R64(o) = (uint64_t)(v))

/* ---- addresses: B base + displacement; X everything flat in 64-bit mode; G any mode, with checks ---- */
static inline gva_t ea_b(struct x86_cpu *cpu, const struct op *op) { return R64(op->base) + (uint64_t)op->disp; }
static inline gva_t ea_x(struct x86_cpu *cpu, const struct op *op)
{
    return R64(op->base) + (R64(op->index) << op->scale) + (uint64_t)op->disp + R64(op->seg_base);
}

/* Guest addresses of an op, and of what lies offset bytes from the start of its page. */
static inline uint64_t page_rip(const struct x86_cpu *cpu, uint64_t offset)
{
    uint64_t rip = cpu->code_page + offset;

    return cpu->code_size == 8 ? rip : (uint32_t)rip;
}
static inline uint64_t op_rip(const struct x86_cpu *cpu, const struct op *op) { return page_rip(cpu, op->rip); }

static inline void enter_slow(struct x86_cpu *cpu, const struct op *op)
{
    cpu->s.rip = op_rip(cpu, op);
    cpu->next_rip = op_rip(cpu, op) + op->len;
}

gva_t ea_slow(struct x86_cpu *cpu, const struct op *op, unsigned size, bool write);
#define EA_B(size, write) ea_b(cpu, op)
#define EA_X(size, write) ea_x(cpu, op)
#define EA_G(size, write) ea_slow(cpu, op, size, write)

/* ---- guest memory ---- */
uint64_t ld_slow(struct x86_cpu *cpu, const struct op *op, gva_t va, unsigned size);
void st_slow(struct x86_cpu *cpu, const struct op *op, gva_t va, uint64_t v, unsigned size);
/* The read of a read-modify-write: page faults are those of a write, as on hardware. */
uint64_t rmw_slow_read(struct x86_cpu *cpu, const struct op *op, gva_t va, unsigned size);

/*
 * A handler that accesses memory is written once and compiled twice: the fast one has only the TLB hits and
 * keeps nothing across calls; at the first miss it hands the whole instruction to its slow twin.
 */
#define MEM_HANDLER(name) \
    static inline __attribute__((always_inline)) const struct op *name##_body( \
        struct x86_cpu *cpu, const struct op *op, op_fn *slow); \
    static __attribute__((cold, noinline)) const struct op *name##_slow(struct x86_cpu *cpu, const struct op *op) \
    { \
        return name##_body(cpu, op, NULL); \
    } \
    static const struct op *name(struct x86_cpu *cpu, const struct op *op) \
    { \
        return name##_body(cpu, op, name##_slow); \
    } \
    static inline const struct op *name##_body(struct x86_cpu *cpu, const struct op *op, op_fn *slow)

#define TLB_ENTRY(va) (&cpu->tlb->entry[tlb_index(va)])
#define TLB_MISS(e, va, size, kind) unlikely((va) + (e)->tag[kind] > GUEST_PAGE_SIZE - (size))

/* In a MEM_HANDLER: declares var, loaded from va. */
#define LD(bits, var, va) \
    uint##bits##_t var; \
    do { \
        gva_t va_ = (va); \
        const struct tlb_entry *e_ = TLB_ENTRY(va_); \
        if (!slow) \
            var = (uint##bits##_t)ld_slow(cpu, op, va_, bits / 8); \
        else if (TLB_MISS(e_, va_, bits / 8, TLB_READ)) \
            GO_SLOW(); \
        else \
            var = *(uint##bits##_t *)(va_ + e_->addend); \
    } while (0)
/* The statements after it must not raise. */
#define ST(bits, va, v) \
    do { \
        gva_t va_ = (va); \
        const struct tlb_entry *e_ = TLB_ENTRY(va_); \
        if (!slow) \
            st_slow(cpu, op, va_, (uint##bits##_t)(v), bits / 8); \
        else if (TLB_MISS(e_, va_, bits / 8, TLB_WRITE)) \
            GO_SLOW(); \
        else \
            *(uint##bits##_t *)(va_ + e_->addend) = (uint##bits##_t)(v); \
    } while (0)
/* [va] = expr, in which old is the value before. Nothing else may be changed before it is done. */
#define RMW(bits, va, expr) \
    do { \
        gva_t va_ = (va); \
        const struct tlb_entry *e_ = TLB_ENTRY(va_); \
        if (!slow) { \
            uint##bits##_t old = (uint##bits##_t)rmw_slow_read(cpu, op, va_, bits / 8); \
            st_slow(cpu, op, va_, (expr), bits / 8); \
        } else if (TLB_MISS(e_, va_, bits / 8, TLB_WRITE)) { \
            GO_SLOW(); \
        } else { \
            uint##bits##_t *p_ = (uint##bits##_t *)(va_ + e_->addend); \
            uint##bits##_t old = *p_; \
            *p_ = (expr); \
        } \
    } while (0)

/* ---- flags: the host computes them; LAHF and SETO bring them into cpu->arith ---- */
/* Put cpu->arith (in %%eax) back into the host's flags; destroys %%al. */
#define LOAD_FLAGS "addb $0x7f, %%al\n\tsahf\n\t"
#define SAVE_FLAGS "\n\tlahf\n\tseto %%al"

/* Condition codes of Jcc, SETcc, CMOVcc, from the flags word. cc: 0…15 as in the opcode; constant. */
static inline bool condition(uint32_t a, unsigned cc)
{
    bool v;

    switch (cc >> 1) {
    case 0: v = a & 1; break;
    case 1: v = a & 0x100; break;
    case 2: v = a & 0x4000; break;
    case 3: v = a & 0x4100; break;
    case 4: v = a & 0x8000; break;
    case 5: v = a & 0x400; break;
    case 6: v = ((a >> 15) ^ a) & 1; break;
    default: v = (((a >> 15) ^ a) & 1) | ((a >> 14) & 1); break;
    }
    return v ^ (cc & 1);
}

/* ---- blocks (block.c) ---- */
int block_cache_init(struct interp *it, size_t arena_size);
void block_cache_destroy(struct interp *it);
/*
 * First op of the block at rip in the current mode; decodes it when new. Sets cpu->code_page. Raises fetch faults with
 * s.rip = rip.
 */
const struct op *block_find_slow(struct x86_cpu *cpu, uint64_t rip);
/* One instruction at s.rip as a block of its own, for single steps. */
const struct op *block_step(struct x86_cpu *cpu);
void block_flush_all(struct interp *it);
/* Guest bytes [gpa, gpa+len) changed: drop what was decoded from them. True if something was. */
bool block_invalidate(struct interp *it, gpa_t gpa, unsigned len);
/* Drops one block: its ops become op_leave. */
void block_kill(struct interp *it, struct block *block);
/* op is the first of its block. False when no link may lead to it: the scratch block, and the way out when the arena is full. */
bool block_linkable(const struct op *op);
/* The block depends on bytes [from, to) of its first page from now on: when they change it is dropped. */
void block_depends(struct interp *it, struct block *b, unsigned from, unsigned to);
/*
 * The translation of b ends with the instruction that crossing consists of, which reaches into the next page. False: that cannot be
 * (both pages are the same).
 */
bool block_extends(struct interp *it, struct block *b, const struct block *crossing);
/* At most 15 bytes of the block's code, or of what its translation goes on to, from this offset in its first page on. */
unsigned block_fetch(const struct block *b, unsigned offset, uint8_t bytes[X86_MAX_INSN]);
/* Arena for lowering; NULL never: block_find makes room before it starts. */
void *block_alloc(struct interp *it, size_t size);

static inline unsigned jump_index(const uint8_t *host)
{
    uintptr_t h = (uintptr_t)host;

    return (h ^ (h >> JUMP_CACHE_BITS)) & ((1u << JUMP_CACHE_BITS) - 1);
}

static inline void note_call(struct x86_cpu *cpu, uint64_t return_rip)
{
    struct interp_returns *r = &interp_of(cpu)->returns;

    if (!r->top)
        return;
    if (unlikely(r->top - 2 < r->limit))
        r->top = r->bottom;
    r->top -= 2;
    r->top[0] = r->stub;
    r->top[1] = return_rip;
}

static inline void note_return(struct x86_cpu *cpu, uint64_t rip)
{
    struct interp_returns *r = &interp_of(cpu)->returns;

    if (r->top < r->bottom && r->top[1] == rip)
        r->top += 2;
}

/* What of the guest address belongs to a block's key, with cpu->code_page set. */
static inline uint64_t block_origin(const struct x86_cpu *cpu) { return cpu->code_size == 8 ? 0 : cpu->code_page; }

#define BLOCK_HASH_BITS 17
static inline unsigned block_hash(const uint8_t *host)
{
    uint64_t h = (uint64_t)(uintptr_t)host * 0x9e3779b97f4a7c15ull;

    return (unsigned)(h >> (64 - BLOCK_HASH_BITS));
}

/* The block that begins at this host address in the current mode, or NULL. With cpu->code_page set. */
static inline struct block *block_lookup(struct x86_cpu *cpu, const uint8_t *host)
{
    struct block *b = interp_of(cpu)->hash[block_hash(host)];

    while (b && !(b->host == host && b->mode == interp_mode(cpu) && b->origin == block_origin(cpu)))
        b = b->next_hash;
    return b;
}

static inline const struct op *block_find(struct x86_cpu *cpu, uint64_t rip)
{
    struct interp *it = interp_of(cpu);
    gva_t va = cpu->code_base + rip;
    const uint8_t *host = tlb_lookup(cpu->tlb_fetch, va, 1, TLB_EXEC);
    const struct jump_entry *e = &it->jump[jump_index(host)];

    cpu->code_page = rip - (va & (GUEST_PAGE_SIZE - 1));
    if (likely(e->host == host && host && e->mode == interp_mode(cpu) && e->origin == block_origin(cpu)))
        return e->op;
    return block_find_slow(cpu, rip);
}

/* Continue at target after a branch. The end of every block. */
#define BRANCH_TO(target) \
    do { \
        uint64_t to_ = (target); \
        cpu->insns += op->n + 1u; \
        cpu->s.rip = to_; \
        if (unlikely(atomic_load_explicit(&cpu->request, memory_order_relaxed))) \
            return NULL; \
        const struct op *found_ = block_find(cpu, to_); \
        GO(found_); \
    } while (0)

/* ---- the engine (run.c), for the translator to build on ---- */
int interp_setup(struct interp *it, struct vcpu *vcpu, const struct x86_engine_hooks *hooks);
void interp_teardown(struct interp *it);
/* The hook for stores into code pages. */
void interp_code_stored(struct x86_cpu *cpu, gpa_t gpa, unsigned len);
enum vm_exit interp_run(struct vcpu *vcpu);
void interp_kick(struct vcpu *vcpu);
void interp_signal(struct vcpu *vcpu, enum lapic_signal signal, unsigned value);
void interp_export(struct vcpu *vcpu, struct x86_state *s);
void interp_import(struct vcpu *vcpu, const struct x86_state *s);
void interp_shift_tsc(struct vcpu *vcpu, uint64_t ticks);
void interp_code_written(struct vcpu *vcpu, gpa_t page);
void interp_counters(const struct vcpu *vcpu, struct engine_counters *c);

/* ---- lowering (lower.c) ---- */
/* Fills op->fn and operands for insn (op->rip, len and n are there). Returns true when the block ends with it. */
bool lower(struct interp *it, struct op *op, const struct x86_insn *insn);
/* Of an instruction that x86_system_semantics() knows: execution simply goes on with the next one. */
bool interp_goes_on(const struct x86_insn *insn);
/* In op->aux: stands for the op's own block, which has no address yet. */
#define BLOCK_SELF ((void *)1)
/* Leaves the block at this op: what ops of dropped blocks become. */
op_fn op_leave;

/* Register offsets. */
static inline uint16_t gpr_offset(unsigned reg) { return (uint16_t)(offsetof(struct x86_cpu, s.gpr) + reg * 8); }
#define RAX_ gpr_offset(RAX)
#define RDX_ gpr_offset(RDX)

/* Operand forms of two-operand instructions: destination, source. */
enum form { FORM_RR, FORM_RI, FORM_RM_B, FORM_RM_X, FORM_RM_G, FORM_MR_B, FORM_MR_X, FORM_MR_G, FORM_MI_B, FORM_MI_X,
            FORM_MI_G, FORMS };
/* log2 of the operand size. */
enum { SIZE8, SIZE16, SIZE32, SIZE64, SIZES };

/* Operand forms of one operand: register, or memory by kind of address. */
enum form1 { FORM_R, FORM_B, FORM_X, FORM_G, FORM1S };

/* The rows of handler tables, from the names of handlers. */
#define FORMS_OF(n) \
    { [FORM_RR] = n##_rr, [FORM_RI] = n##_ri, [FORM_RM_B] = n##_rm_b, [FORM_RM_X] = n##_rm_x, [FORM_RM_G] = n##_rm_g, \
      [FORM_MR_B] = n##_mr_b, [FORM_MR_X] = n##_mr_x, [FORM_MR_G] = n##_mr_g, [FORM_MI_B] = n##_mi_b, \
      [FORM_MI_X] = n##_mi_x, [FORM_MI_G] = n##_mi_g }
#define FORM1_OF(n) { [FORM_R] = n##_r, [FORM_B] = n##_b, [FORM_X] = n##_x, [FORM_G] = n##_g }

/* Handler tables, by subject; absent ones are NULL. */
enum alu { ALU_ADD, ALU_OR, ALU_ADC, ALU_SBB, ALU_AND, ALU_SUB, ALU_XOR, ALU_CMP, ALU_TEST, ALUS };
extern op_fn *const alu_handlers[ALUS][SIZES][FORMS];           /* alu.c */

/* move.c */
extern op_fn *const mov_handlers[SIZES][FORMS];
extern op_fn *const extend_handlers[2][SIZES][SIZES][FORM1S];   /* [signed][destination][source] */
extern op_fn *const lea_handlers[SIZES][3];                     /* B, X, then "slow" for any mode */
extern op_fn *const cmov_handlers[16][SIZES][FORM1S];
extern op_fn *const setcc_handlers[16][FORM1S];
extern op_fn *const push_handlers[SIZES][5];                    /* FORM_R, B, X, G, then immediate */
extern op_fn *const pop_handlers[SIZES][FORM1S];
extern op_fn *const xchg_rr_handlers[SIZES];
extern op_fn *const bswap_handlers[SIZES];
extern op_fn *const convert_handlers[2][SIZES];                 /* CBW/CWDE/CDQE, CWD/CDQ/CQO by operand size */
op_fn op_nop, op_mfence, op_leave64, op_lahf, op_sahf, op_cld, op_std;
extern op_fn *const carry_handlers[3];                          /* CLC, STC, CMC */

/* unary.c: one operand, shifts, multiplication and division */
enum unary { UNARY_INC, UNARY_DEC, UNARY_NEG, UNARY_NOT, UNARIES };
extern op_fn *const unary_handlers[UNARIES][SIZES][FORM1S];
enum shift { SHIFT_ROL, SHIFT_ROR, SHIFT_RCL, SHIFT_RCR, SHIFT_SHL, SHIFT_SHR, SHIFT_SAR, SHIFTS };
extern op_fn *const shift_handlers[SHIFTS][SIZES][2][FORM1S];   /* [by immediate, by CL] */
enum muldiv { MULDIV_MUL, MULDIV_IMUL, MULDIV_DIV, MULDIV_IDIV, MULDIVS };
extern op_fn *const muldiv_handlers[MULDIVS][SIZES][FORM1S];
extern op_fn *const imul2_handlers[SIZES][FORM1S];
extern op_fn *const imul3_handlers[SIZES][FORM1S];
enum bit { BIT_BT, BIT_BTS, BIT_BTR, BIT_BTC, BITS };
extern op_fn *const bit_handlers[BITS][SIZES][2][FORM1S];       /* [by register, by immediate] */
enum scan { SCAN_BSF, SCAN_BSR, SCAN_TZCNT, SCAN_LZCNT, SCAN_POPCNT, SCANS };
extern op_fn *const scan_handlers[SCANS][SIZES][FORM1S];
extern op_fn *const double_shift_handlers[2][SIZES][2][FORM1S]; /* [SHLD, SHRD][size][by immediate, by CL] */

/* branch.c */
extern op_fn *const jcc_handlers[16];
extern op_fn *const jump_indirect_handlers[FORM1S];
extern op_fn *const call_indirect_handlers[FORM1S];
op_fn op_jmp, op_call, op_ret, op_loop, op_branch16, op_branch32, op_jump_slow, op_call_slow, op_ret_slow, op_end, op_cross_check;

/* atomic.c: op->sub says what; the source is a register, or imm when src names the zero field */
enum atomic_kind { AT_ADD, AT_OR, AT_ADC, AT_SBB, AT_AND, AT_SUB, AT_XOR, AT_INC, AT_DEC, AT_NEG, AT_NOT, AT_XADD,
                   AT_XCHG, AT_CMPXCHG, AT_BTS, AT_BTR, AT_BTC };
#define ATOMIC_BIT_REG 0x80u    /* in op->scale: a bit offset in a register selects the word */
extern op_fn *const atomic_handlers[SIZES];
op_fn op_cmpxchg_wide;          /* op->sub: 8 or 16 bytes */
/* In G the word's distance is added to the offset inside the segment (unary.c). */
gva_t bit_ea_slow(struct x86_cpu *cpu, const struct op *op, int64_t distance, unsigned size, bool write);
/* string.c: op->sub says which, op->scale the element's bytes */
enum string_kind { STRING_MOVS, STRING_STOS, STRING_LODS, STRING_CMPS, STRING_SCAS };
op_fn op_string;
/* slow.c */
op_fn op_semantics, op_native, op_semantics_end, op_undefined, op_too_long;

#endif
