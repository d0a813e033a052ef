/*
 * Near control transfers: Jcc, JMP, CALL, RET, LOOPcc and JrCXZ, and the ends of blocks.
 *
 * A direct branch inside a page is linked: its block remembers the successor's first op. That is
 * valid for as long as this page is the one being executed, whatever happens to other mappings; every other
 * transfer looks its target up through the TLB.
 */
#include "engine/interp/interp.h"

/* Counts are up to date; offset: the target's, from cpu->code_page. Links the block's successor when it may. */
static __attribute__((noinline)) const struct op *follow_slow(struct x86_cpu *cpu, struct block *block, unsigned slot,
                                                              uint64_t offset)
{
    uint64_t target = page_rip(cpu, offset);
    const struct op *found;

    cpu->s.rip = target;
    if (atomic_load_explicit(&cpu->request, memory_order_relaxed))
        return NULL;
    found = block_find(cpu, target);
    if (offset < GUEST_PAGE_SIZE && !block->dead && block_linkable(found))
        block->link[slot] = found;
    GO(found);
}

#define FOLLOW(slot, offset) \
    do { \
        struct block *block_ = op->aux; \
        const struct op *link_ = block_->link[slot]; \
        if (likely(link_ && !atomic_load_explicit(&cpu->request, memory_order_relaxed))) \
            GO(link_); \
        return follow_slow(cpu, block_, slot, offset); \
    } while (0)

/* A block that ends without a branch: op->imm is where the next instruction is. */
const struct op *op_end(struct x86_cpu *cpu, const struct op *op)
{
    cpu->insns += op->n;
    FOLLOW(0, op->imm);
}

#define DEFINE_JCC(cc) \
    HANDLER(jcc##cc) \
    { \
        cpu->insns += op->n + 1u; \
        if (condition(cpu->arith, cc)) \
            FOLLOW(1, op->imm); \
        FOLLOW(0, op->rip + op->len); \
    }
DEFINE_JCC(0)
DEFINE_JCC(1)
DEFINE_JCC(2)
DEFINE_JCC(3)
DEFINE_JCC(4)
DEFINE_JCC(5)
DEFINE_JCC(6)
DEFINE_JCC(7)
DEFINE_JCC(8)
DEFINE_JCC(9)
DEFINE_JCC(10)
DEFINE_JCC(11)
DEFINE_JCC(12)
DEFINE_JCC(13)
DEFINE_JCC(14)
DEFINE_JCC(15)
op_fn *const jcc_handlers[16] = { jcc0, jcc1, jcc2,  jcc3,  jcc4,  jcc5,  jcc6,  jcc7,
                                  jcc8, jcc9, jcc10, jcc11, jcc12, jcc13, jcc14, jcc15 };

const struct op *op_jmp(struct x86_cpu *cpu, const struct op *op)
{
    cpu->insns += op->n + 1u;
    FOLLOW(1, op->imm);
}

/* LOOPNE, LOOPE, LOOP, JrCXZ by kind 0…3; op->scale is the address size in bytes. Counts down. */
static bool loop_taken(struct x86_cpu *cpu, const struct op *op, unsigned kind)
{
    bool taken;

    if (kind == 3)
        return x86_get_gpr(cpu, RCX, op->scale) == 0;
    x86_set_gpr(cpu, RCX, cpu->s.gpr[RCX] - 1, op->scale);
    taken = x86_get_gpr(cpu, RCX, op->scale) != 0;
    return kind < 2 ? taken && condition(cpu->arith, 4) == (kind == 1) : taken;
}

const struct op *op_loop(struct x86_cpu *cpu, const struct op *op)
{
    bool taken = loop_taken(cpu, op, op->sub);

    cpu->insns += op->n + 1u;
    if (taken)
        FOLLOW(1, op->imm);
    FOLLOW(0, op->rip + op->len);
}

/* A target cut to 16 bits: Jcc by op->sub 0…15, LOOP and its like from 16 on. */
const struct op *op_branch16(struct x86_cpu *cpu, const struct op *op)
{
    bool taken = op->sub < 16 ? condition(cpu->arith, op->sub) : loop_taken(cpu, op, op->sub - 16u);

    if (taken)
        BRANCH_TO((uint16_t)page_rip(cpu, op->imm));
    cpu->insns += op->n + 1u;
    FOLLOW(0, op->rip + op->len);
}

/* The same with 32 bits in 16-bit code, whose segment may end before the target. */
const struct op *op_branch32(struct x86_cpu *cpu, const struct op *op)
{
    uint64_t rcx = cpu->s.gpr[RCX], target = (uint32_t)page_rip(cpu, op->imm);

    if (op->sub < 16 ? condition(cpu->arith, op->sub) : loop_taken(cpu, op, op->sub - 16u)) {
        if (unlikely(target > cpu->s.seg[SEG_CS].limit)) {
            cpu->s.gpr[RCX] = rcx;
            enter_slow(cpu, op);
            x86_raise_error(cpu, X86_GP, 0);
        }
        BRANCH_TO(target);
    }
    cpu->insns += op->n + 1u;
    FOLLOW(0, op->rip + op->len);
}

/* ---- 64-bit mode ---- */

static inline bool canonical(uint64_t va) { return (uint64_t)((int64_t)(va << 16) >> 16) == va; }

static __attribute__((noinline, cold)) const struct op *bad_target(struct x86_cpu *cpu, const struct op *op)
{
    enter_slow(cpu, op);
    x86_raise_error(cpu, X86_GP, 0);
}

/* The return address is pushed first: its faults come first. Intel's processors have stored it by then, with RSP as before. */
static __attribute__((noinline, cold)) const struct op *bad_call(struct x86_cpu *cpu, const struct op *op)
{
    enter_slow(cpu, op);
    if (cpu->amd)
        x86_probe_write(cpu, cpu->s.gpr[RSP] - 8, 8);
    else
        x86_write64(cpu, cpu->s.gpr[RSP] - 8, op_rip(cpu, op) + op->len);
    x86_raise_error(cpu, X86_GP, 0);
}

MEM_HANDLER(call64)
{
    ST(64, cpu->s.gpr[RSP] - 8, op_rip(cpu, op) + op->len);
    cpu->s.gpr[RSP] -= 8;
    cpu->insns += op->n + 1u;
    note_call(cpu, op_rip(cpu, op) + op->len);
    FOLLOW(1, op->imm);
}
const struct op *op_call(struct x86_cpu *cpu, const struct op *op) { return call64(cpu, op); }

/* op->imm: bytes of parameters to drop. */
MEM_HANDLER(ret64)
{
    LD(64, target, cpu->s.gpr[RSP]);
    if (unlikely(!canonical(target)))
        return bad_target(cpu, op);
    cpu->s.gpr[RSP] += 8 + op->imm;
    note_return(cpu, target);
    BRANCH_TO(target);
}
const struct op *op_ret(struct x86_cpu *cpu, const struct op *op) { return ret64(cpu, op); }

HANDLER(jump_r)
{
    if (unlikely(!canonical(R64(op->src))))
        return bad_target(cpu, op);
    BRANCH_TO(R64(op->src));
}
#define DEFINE_JUMP(ea, EA) \
    MEM_HANDLER(jump_##ea) \
    { \
        LD(64, target, EA_##EA(8, false)); \
        if (unlikely(!canonical(target))) \
            return bad_target(cpu, op); \
        BRANCH_TO(target); \
    }
DEFINE_JUMP(b, B)
DEFINE_JUMP(x, X)
DEFINE_JUMP(g, G)
op_fn *const jump_indirect_handlers[FORM1S] = FORM1_OF(jump);

MEM_HANDLER(call_r)
{
    uint64_t target = R64(op->src);
    if (unlikely(!canonical(target)))
        return bad_call(cpu, op);
    ST(64, cpu->s.gpr[RSP] - 8, op_rip(cpu, op) + op->len);
    cpu->s.gpr[RSP] -= 8;
    note_call(cpu, op_rip(cpu, op) + op->len);
    BRANCH_TO(target);
}
#define DEFINE_CALL(ea, EA) \
    MEM_HANDLER(call_##ea) \
    { \
        LD(64, target, EA_##EA(8, false)); \
        if (unlikely(!canonical(target))) \
            return bad_call(cpu, op); \
        ST(64, cpu->s.gpr[RSP] - 8, op_rip(cpu, op) + op->len); \
        cpu->s.gpr[RSP] -= 8; \
        note_call(cpu, op_rip(cpu, op) + op->len); \
        BRANCH_TO(target); \
    }
DEFINE_CALL(b, B)
DEFINE_CALL(x, X)
DEFINE_CALL(g, G)
op_fn *const call_indirect_handlers[FORM1S] = FORM1_OF(call);

/*
 * ---- any mode and operand size ----
 * op->sub is the operand size in bytes. aux: struct slow_insn.
 */

/* Outside 64-bit mode targets are checked against CS's limit. */
static bool good_target(const struct x86_cpu *cpu, uint64_t target)
{
    return cpu->code_size == 8 ? canonical(target) : target <= cpu->s.seg[SEG_CS].limit;
}

/* Cut to the operand size. */
static uint64_t cut(uint64_t target, unsigned size)
{
    return size == 2 ? (uint16_t)target : size == 4 ? (uint32_t)target : target;
}

static uint64_t operand_target(struct x86_cpu *cpu, const struct op *op)
{
    const struct x86_insn *insn = &((const struct slow_insn *)op->aux)->insn;
    const struct x86_operand *o = &insn->operand[0];

    if (o->kind == OPERAND_MEM) {
        gva_t va = x86_linear(cpu, insn, op->sub, false);

        return op->sub == 2 ? x86_read16(cpu, va) : op->sub == 4 ? x86_read32(cpu, va) : x86_read64(cpu, va);
    }
    if (o->kind == OPERAND_GPR)
        return x86_get_gpr(cpu, o->reg, op->sub);
    return op_rip(cpu, op) + op->len + (uint64_t)insn->imm[0];
}

const struct op *op_jump_slow(struct x86_cpu *cpu, const struct op *op)
{
    uint64_t target;

    enter_slow(cpu, op);
    target = cut(operand_target(cpu, op), op->sub);
    if (unlikely(!good_target(cpu, target)))
        x86_raise_error(cpu, X86_GP, 0);
    BRANCH_TO(target);
}

const struct op *op_call_slow(struct x86_cpu *cpu, const struct op *op)
{
    uint64_t rsp = cpu->s.gpr[RSP], target;
    bool good;

    enter_slow(cpu, op);
    target = cut(operand_target(cpu, op), op->sub);
    good = good_target(cpu, target);
    /* As for bad_call(). */
    if (likely(good || !cpu->amd))
        x86_push(cpu, op_rip(cpu, op) + op->len, op->sub);
    if (unlikely(!good)) {
        cpu->s.gpr[RSP] = rsp;
        x86_raise_error(cpu, X86_GP, 0);
    }
    BRANCH_TO(target);
}

const struct op *op_ret_slow(struct x86_cpu *cpu, const struct op *op)
{
    uint64_t rsp = cpu->s.gpr[RSP], target;

    enter_slow(cpu, op);
    target = x86_pop(cpu, op->sub);
    x86_set_gpr(cpu, RSP, cpu->s.gpr[RSP] + op->imm, cpu->stack_size);
    target = cut(target, op->sub);
    if (unlikely(!good_target(cpu, target))) {
        cpu->s.gpr[RSP] = rsp;
        x86_raise_error(cpu, X86_GP, 0);
    }
    BRANCH_TO(target);
}

/* ---- leaving ---- */

/* An op of a dropped block: go on from here with what is there now. */
const struct op *op_leave(struct x86_cpu *cpu, const struct op *op)
{
    cpu->insns += op->n;
    cpu->s.rip = op_rip(cpu, op);
    return NULL;
}

/*
 * In front of an instruction that reaches into the next page: is that still the page it was decoded from?
 */
const struct op *op_cross_check(struct x86_cpu *cpu, const struct op *op)
{
    struct block *block = op->aux;
    gva_t second = (cpu->code_base + op_rip(cpu, op) + GUEST_PAGE_SIZE) & GUEST_PAGE_MASK;
    const uint8_t *host = tlb_lookup(cpu->tlb_fetch, second, 1, TLB_EXEC);

    if (unlikely(host != block->host2)) {
        uint8_t bytes[X86_MAX_INSN];

        enter_slow(cpu, op);
        x86_fetch(cpu, second, bytes);
        host = tlb_lookup(cpu->tlb_fetch, second, 1, TLB_EXEC);
        if (host != block->host2) {
            block_kill(interp_of(cpu), block);
            return NULL;
        }
    }
    NEXT;
}
