/*
 * Control transfers in translated code.
 *
 * Inside the page a fixed target is jumped to directly, once it is translated (struct chain): the mapping that led here
 * holds for it too. Everything else finds its target in the jump table of the address space. Backward jumps and those
 * through the table look for requests, so no loop goes without.
 *
 * Calls and returns use the return stack (translate.h). Where a RET comes back to, T is the guest address that was
 * returned to, and what the CALL had pushed lies on top:
 *
 *     mov   (%rsp), %rcx
 *     not   %rcx
 *     lea   1(%rcx, T), %rcx
 *     jrcxz hit                          ; else return_missed
 *     lea   8(%rsp), %rsp
 *     lea   -offset(T), A
 *     mov   A, gs:code_page
 *
 * with RCX put aside. Flags stay, whatever the code here makes of them: who missed goes on somewhere else.
 */
#include "engine/translate/x86/unit.h"

void unit_target(struct unit *x, uint64_t offset)
{
    asm_load_gs(&x->a, T, CPU_GS(code_page));
    asm_lea(&x->a, T, T, H_NONE, 0, (int32_t)offset);
}

void unit_set_rip(struct unit *x, uint64_t offset)
{
    asm_load_gs(&x->a, A, CPU_GS(code_page));
    asm_lea(&x->a, A, A, H_NONE, 0, (int32_t)offset);
    asm_store_gs(&x->a, A, CPU_GS(s.rip));
}

static bool is_near(uint64_t target) { return target < GUEST_PAGE_SIZE; }

void unit_poll(struct unit *x, uint16_t live, uint64_t target)
{
    struct assembler *a = &x->a;
    struct stub *s;

    if (live) {
        uint8_t *none;

        unit_save_rcx(x);
        asm_gs(a, false, 0x8b, H_RCX, CPU_GS(request));
        none = asm_jrcxz(a);
        s = unit_stub(x, STUB_AT, asm_jmp(a));
        if (s)
            s->restore_rcx = true;
        asm_set_short(none, a->at);
        unit_restore_rcx(x);
    } else {
        asm_gs_imm8(a, 0x83, ALU_DIGIT_CMP, CPU_GS(request), 0);
        s = unit_stub(x, STUB_AT, asm_jcc(a, 5));
    }
    if (s)
        s->target = target;
}

/* What a look-up does that finds nothing, or finds a request. */
static struct stub *lookup_stub(struct unit *x, uint8_t *jump, enum stub_kind kind, bool restore)
{
    struct stub *s = unit_stub(x, kind, jump);

    if (s)
        s->restore_rcx = restore;
    return s;
}

/* T: guest target, kept. A := its jump entry. Both stubs get the kind; at most two are made, from x->stubs on. */
static void lookup(struct unit *x, uint16_t live, enum stub_kind kind)
{
    struct assembler *a = &x->a;
    struct stub *s;

    if (live) {
        uint8_t *hit;

        unit_save_rcx(x);
        asm_rorx(a, H_RCX, T, 64 - TRANSLATE_JUMP_ROTATE);
        asm_lea(a, H_RCX, H_RCX, T, 0, 0);
        asm_pext_gs(a, H_RCX, H_RCX, T_GS(jump_mask));
        asm_load_gs(a, A, T_GS(jumps_now));
        asm_lea(a, H_RCX, H_NONE, H_RCX, 2, 0);
        asm_lea(a, A, A, H_RCX, 3, 0);
        asm_mem(a, true, 0x8b, H_RCX, A, H_NONE, 0, offsetof(struct jump_entry_host, negative));
        asm_lea(a, H_RCX, H_RCX, T, 0, 0);
        hit = asm_jrcxz(a);
        s = lookup_stub(x, asm_jmp(a), kind, true);
        asm_set_short(hit, a->at);
        asm_gs(a, false, 0x8b, H_RCX, CPU_GS(request));
        hit = asm_jrcxz(a);
        lookup_stub(x, asm_jmp(a), kind, true);
        asm_set_short(hit, a->at);
        unit_restore_rcx(x);
    } else {
        asm_rorx(a, A, T, 64 - TRANSLATE_JUMP_ROTATE);
        asm_rr(a, true, 0x01, T, A);
        asm_alu_imm(a, false, ALU_DIGIT_AND, A, (TRANSLATE_JUMPS - 1) << TRANSLATE_JUMP_ROTATE);
        asm_gs(a, true, 0x03, A, T_GS(jumps_now));
        asm_mem(a, true, 0x3b, T, A, H_NONE, 0, offsetof(struct jump_entry_host, rip));
        s = lookup_stub(x, asm_jcc(a, 5), kind, false);
        asm_gs_imm8(a, 0x83, ALU_DIGIT_CMP, CPU_GS(request), 0);
        lookup_stub(x, asm_jcc(a, 5), kind, false);
    }
    if (s)
        s->back = a->at;
}
_Static_assert(sizeof(struct jump_entry_host) == 1 << TRANSLATE_JUMP_ROTATE, "an index is shifted into place by the same");

/* jmp or call *code(A): /4 or /2. */
static void through_entry(struct unit *x, unsigned digit)
{
    asm_mem(&x->a, false, 0xff, digit, A, H_NONE, 0, offsetof(struct jump_entry_host, code));
}

static void chain_to(struct unit *x, uint8_t *jump, uint64_t target)
{
    struct stub *s = unit_stub(x, STUB_CHAIN, jump);

    if (s)
        s->target = target;
}

/* jump: a jump or call to the target, in another page; T is its address. */
static void far_to(struct unit *x, uint8_t *jump, uint64_t target)
{
    if (x->t->options.chain)
        chain_to(x, jump, target);
    else if (!x->a.full)
        asm_set_target(jump, x->t->far);
}

void unit_goto(struct unit *x, uint64_t target, uint16_t live, bool backward)
{
    if (is_near(target)) {
        if (backward)
            unit_poll(x, live, target);
        chain_to(x, asm_jmp(&x->a), target);
        return;
    }
    unit_target(x, target);
    far_to(x, asm_jmp(&x->a), target);
}

/* Leaves to the interpreter, in front of instruction k, unless RCX is 0; flags stay. RCX is in its slot. */
static void unless_zero(struct unit *x, unsigned k)
{
    uint8_t *zero = asm_jrcxz(&x->a);
    struct stub *s = unit_stub(x, STUB_INTERPRET, asm_jmp(&x->a));

    if (s) {
        s->restore_rcx = true;
        s->behind_sti = unit_behind_sti(x, k);
        s->target = x->insn[k].offset;
    }
    asm_set_short(zero, x->a.at);
}

void unit_cross(struct unit *x, unsigned k)
{
    struct assembler *a = &x->a;

    unit_take_a(x, k);
    unit_target(x, GUEST_PAGE_SIZE);
    unit_save_rcx(x);
    asm_pext_gs(a, A, T, T_GS(tlb_mask));
    asm_load_gs(a, H_RCX, CPU_GS(tlb_fetch));
    asm_lea(a, A, H_NONE, A, 2, 0);
    asm_lea(a, A, H_RCX, A, 3, 0);
    asm_mem(a, true, 0x8b, H_RCX, A, H_NONE, 0, (int32_t)(offsetof(struct tlb_entry, tag) + TLB_EXEC * 8));
    asm_lea(a, H_RCX, H_RCX, T, 0, 0);
    unless_zero(x, k);
    asm_mem(a, true, 0x8b, A, A, H_NONE, 0, offsetof(struct tlb_entry, addend));
    asm_lea(a, A, A, T, 0, 0);
    asm_mov_imm(a, H_RCX, -(uint64_t)(uintptr_t)x->b->host2);
    asm_lea(a, H_RCX, H_RCX, A, 0, 0);
    unless_zero(x, k);
    unit_restore_rcx(x);
}

static void emit_jcc(struct unit *x, unsigned k)
{
    const struct unit_insn *i = &x->insn[k];
    struct assembler *a = &x->a;
    uint8_t *over;

    if ((int)k == x->back) {
        over = asm_jcc(a, i->cc ^ 1u);
        unit_loop_back(x);
        if (!a->full)
            asm_set_target(over, a->at);
        return;
    }
    if (is_near(i->target) && i->target > i->offset) {
        chain_to(x, asm_jcc(a, i->cc), i->target);
        return;
    }
    over = asm_jcc(a, i->cc ^ 1u);
    unit_goto(x, i->target, is_near(i->target) ? unit_live_at(x, i->target) : RFLAGS_ARITH, true);
    if (!a->full)
        asm_set_target(over, a->at);
}

/* The guest's return address into T, onto the guest's stack, and onto the return stack if that is used. */
static void push_return(struct unit *x, unsigned k, unsigned access)
{
    const struct unit_insn *i = &x->insn[k];
    struct assembler *a = &x->a;
    struct asm_address m = unit_place(x, k, access, true);

    unit_target(x, i->offset + (uint64_t)i->insn.length);
    asm_mem(a, true, 0x89, T, m.base, m.index, m.shift, m.disp);
    asm_lea(a, H_R15, H_R15, H_NONE, 0, -8);
    if (x->t->options.returns)
        asm_push(a, T);
}

static void return_site(struct unit *x, unsigned k)
{
    const struct unit_insn *i = &x->insn[k];
    struct assembler *a = &x->a;
    struct return_site *r = block_alloc(&x->t->it, sizeof(*r));
    struct stub *s;
    uint8_t *hit;

    *r = (struct return_site){ .code = a->at, .next = x->b->returns };
    x->b->returns = r;
    unit_save_rcx(x);
    asm_mem(a, true, 0x8b, H_RCX, H_RSP, H_NONE, 0, 0);
    asm_byte(a, 0x48), asm_byte(a, 0xf7), asm_byte(a, 0xd1);            /* not %rcx */
    asm_lea(a, H_RCX, H_RCX, T, 0, 1);
    hit = asm_jrcxz(a);
    s = lookup_stub(x, asm_jmp(a), STUB_CODE, true);
    asm_set_short(hit, a->at);
    unit_restore_rcx(x);
    if (s)
        s->code = x->t->return_missed;
    asm_lea(a, H_RSP, H_RSP, H_NONE, 0, 8);
    asm_lea(a, A, T, H_NONE, 0, -(int32_t)(i->offset + i->insn.length));
    asm_store_gs(a, A, CPU_GS(code_page));
    unit_barrier(x);
    x->vectors_ready = x->vectors_noted = false;
}

static void emit_call(struct unit *x, unsigned k)
{
    const struct unit_insn *i = &x->insn[k];
    struct assembler *a = &x->a;

    if (is_near(i->target) && i->target <= i->offset)
        unit_poll(x, x->lost < 0 ? i->live : 0, i->offset);
    push_return(x, k, 0);
    unit_flags(x);
    if (!x->t->options.returns) {
        unit_goto(x, i->target, RFLAGS_ARITH, false);
        return;
    }
    if (is_near(i->target)) {
        chain_to(x, asm_call(a), i->target);
    } else {
        unit_target(x, i->target);
        far_to(x, asm_call(a), i->target);
    }
    return_site(x, k);
}

/* T := the operand of an indirect branch. */
static void branch_operand(struct unit *x, unsigned k)
{
    const struct x86_operand *o = &x->insn[k].insn.operand[0];
    struct assembler *a = &x->a;

    if (o->kind == OPERAND_MEM) {
        struct asm_address m = unit_place(x, k, 0, true);

        asm_mem(a, true, 0x8b, T, m.base, m.index, m.shift, m.disp);
    } else if (unit_host_of[o->reg] == H_NONE) {
        asm_load_gs(a, T, gpr_offset(o->reg));
    } else {
        asm_mov(a, T, unit_host_of[o->reg]);
    }
}

/* The entry of a target in T; where there is none the interpreter runs the instruction. */
static void lookup_or_leave(struct unit *x, unsigned k)
{
    unsigned first = x->stubs;

    unit_take_a(x, k);
    lookup(x, unit_may_clobber(x, k) ? 0 : x->insn[k].live, STUB_INTERPRET);
    for (unsigned i = first; i < x->stubs; i++)
        x->stub[i].target = x->insn[k].offset;
}

static void emit_jump_indirect(struct unit *x, unsigned k)
{
    branch_operand(x, k);
    lookup_or_leave(x, k);
    unit_flags(x);
    through_entry(x, 4);
}

static void emit_call_indirect(struct unit *x, unsigned k)
{
    struct assembler *a = &x->a;

    branch_operand(x, k);
    lookup_or_leave(x, k);
    asm_mem(a, true, 0x8b, A, A, H_NONE, 0, offsetof(struct jump_entry_host, code));
    asm_store_gs(a, A, T_GS(saved_code));
    asm_store_gs(a, T, T_GS(saved_target));
    push_return(x, k, x->insn[k].accesses - 1u);
    unit_flags(x);
    asm_load_gs(a, T, T_GS(saved_target));
    asm_gs(a, false, 0xff, x->t->options.returns ? 2 : 4, T_GS(saved_code));
    if (x->t->options.returns)
        return_site(x, k);
}

static void emit_ret(struct unit *x, unsigned k)
{
    const struct unit_insn *i = &x->insn[k];
    struct assembler *a = &x->a;
    struct asm_address m = unit_place(x, k, 0, true);
    unsigned extra = i->insn.visible ? (uint16_t)i->insn.imm[0] : 0, first = x->stubs;

    asm_mem(a, true, 0x8b, T, m.base, m.index, m.shift, m.disp);
    unit_flags(x);
    if (x->t->options.returns) {
        asm_lea(a, H_R15, H_R15, H_NONE, 0, (int32_t)(8 + extra));
        /* For the case that it was no address to return to. */
        asm_mov_imm(a, A, (uint32_t)i->offset | extra << GUEST_PAGE_SHIFT);
        asm_ret(a);
        return;
    }
    unit_take_a(x, k);
    lookup(x, i->live, STUB_INTERPRET);
    for (unsigned n = first; n < x->stubs; n++)
        x->stub[n].target = i->offset;
    asm_lea(a, H_R15, H_R15, H_NONE, 0, (int32_t)(8 + extra));
    through_entry(x, 4);
}

/*
 * To the interpreter, which goes on from there. Straight to what it does for a system instruction; by way of its block cache
 * for the rest.
 */
static void emit_end(struct unit *x, unsigned k)
{
    const struct unit_insn *i = &x->insn[k];
    struct assembler *a = &x->a;

    if (x86_system_semantics(&i->insn)) {
        struct op *op = block_alloc(&x->t->it, sizeof(*op));

        *op = (struct op){ .rip = i->offset, .len = i->insn.length };
        lower(&x->t->it, op, &i->insn);
        if (op->fn == op_semantics_end) {
            asm_mov_imm(a, A, (uint64_t)(uintptr_t)op);
            asm_jmp_to(a, x->t->exit_op);
            return;
        }
    }
    if (unit_behind_sti(x, k))
        unit_keep_shadow(x);
    unit_set_rip(x, i->offset);
    asm_jmp_to(a, x->t->exit_null);
}

void unit_branch(struct unit *x, unsigned k)
{
    const struct unit_insn *i = &x->insn[k];

    switch (i->form) {
    case FORM_JCC: emit_jcc(x, k); break;
    case FORM_CALL: emit_call(x, k); break;
    case FORM_CALL_INDIRECT: emit_call_indirect(x, k); break;
    case FORM_JMP:
        unit_flags(x);
        if ((int)k == x->back)
            unit_loop_back(x);
        else
            unit_goto(x, i->target, i->live, i->target <= i->offset);
        break;
    case FORM_JMP_INDIRECT: emit_jump_indirect(x, k); break;
    case FORM_RET: emit_ret(x, k); break;
    default: emit_end(x, k); break;
    }
}
