/*
 * The routines around translated code: in from C, out to C, the interpreter's help in the middle of a unit, misses of the soft TLB,
 * and returns that were not predicted. Emitted once into each vCPU's code memory.
 *
 * Translated code runs on a return stack, C on the thread's own: who calls C changes stacks first.
 */
#include "engine/translate/translate.h"

#define T_GS(field) offsetof(struct translator, field)
#define CPU_GS(field) offsetof(struct x86_cpu, field)

/* Guest registers that live in host registers, guest number → host number: those that C functions keep come last. */
static const uint8_t mapped[][2] = {
    { RAX, H_RAX }, { RCX, H_RCX }, { RDX, H_RDX }, { RSI, H_RSI }, { RDI, H_RDI }, { R8, H_R8 },    { R9, H_R9 },
    { RBX, H_RBX }, { RBP, H_RBP }, { R12, H_R12 }, { R13, H_R13 }, { R14, H_R14 }, { RSP, H_R15 },
};
#define CHANGED_BY_C 7

static void spill_registers(struct assembler *a, unsigned from, unsigned to)
{
    for (unsigned i = from; i < to; i++)
        asm_store_gs(a, mapped[i][1], gpr_offset(mapped[i][0]));
}

static void reload_registers(struct assembler *a, unsigned to)
{
    for (unsigned i = 0; i < to; i++)
        asm_load_gs(a, mapped[i][1], gpr_offset(mapped[i][0]));
}

/* RAX is lost: it has been spilled, or is still to be loaded. */
static void spill_flags(struct assembler *a)
{
    asm_byte(a, 0x9f);                                                  /* lahf */
    asm_byte(a, 0x0f), asm_byte(a, 0x90), asm_byte(a, 0xc0);            /* seto %al */
    asm_byte(a, 0x0f), asm_byte(a, 0xb7), asm_byte(a, 0xc0);            /* movzwl %ax, %eax */
    asm_gs(a, false, 0x89, H_RAX, CPU_GS(arith));
}

static void reload_flags(struct assembler *a)
{
    asm_gs(a, false, 0x8b, H_RAX, CPU_GS(arith));
    asm_byte(a, 0x04), asm_byte(a, 0x7f);                               /* add $0x7f, %al */
    asm_byte(a, 0x9e);                                                  /* sahf */
}

static void to_host_stack(struct assembler *a)
{
    asm_store_gs(a, H_RSP, T_GS(it.returns.top));
    asm_load_gs(a, H_RSP, T_GS(host_rsp));
}

static void spill_all(struct assembler *a)
{
    spill_registers(a, 0, ARRAY_SIZE(mapped));
    spill_flags(a);
    to_host_stack(a);
}

static void reload_all(struct assembler *a)
{
    asm_load_gs(a, H_RSP, T_GS(it.returns.top));
    reload_flags(a);
    reload_registers(a, ARRAY_SIZE(mapped));
}

/* ---- vector registers ---- */

/* MOVUPS of the widest registers that the host has: 0x10 loads, 0x11 stores. */
static void vector_gs(struct assembler *a, unsigned opcode, unsigned reg)
{
    size_t offset = offsetof(struct x86_cpu, s.fpu.zmm) + reg * 64;
    unsigned r = reg >> 3 & 1;

    if (!__builtin_cpu_supports("avx")) {
        asm_gs(a, false, 0x0f00 | opcode, reg, offset);
        return;
    }
    asm_byte(a, 0x65);
    if (__builtin_cpu_supports("avx512f")) {
        asm_byte(a, 0x62);
        asm_byte(a, (r ? 0 : 0x80) | 0x60 | (reg >> 4 & 1 ? 0 : 0x10) | 1);
        asm_byte(a, 0x7c);
        asm_byte(a, 0x48);
    } else {
        asm_byte(a, 0xc4);
        asm_byte(a, (r ? 0 : 0x80) | 0x60 | 1);
        asm_byte(a, 0x7c);
    }
    asm_byte(a, opcode);
    asm_byte(a, (reg & 7) << 3 | 4);
    asm_byte(a, 0x25);
    asm_u32(a, (uint32_t)offset);
}

/* KMOVQ, or KMOVW where there are only 16 bits: 0x90 loads, 0x91 stores. */
static void mask_gs(struct assembler *a, unsigned opcode, unsigned reg)
{
    bool wide = __builtin_cpu_supports("avx512bw");

    asm_byte(a, 0x65);
    asm_byte(a, 0xc4), asm_byte(a, 0xe1), asm_byte(a, wide ? 0xf8 : 0x78);
    asm_byte(a, opcode);
    asm_byte(a, (reg & 7) << 3 | 4);
    asm_byte(a, 0x25);
    asm_u32(a, (uint32_t)(offsetof(struct x86_cpu, s.fpu.k) + reg * 8));
}

static void move_vectors(struct assembler *a, bool store)
{
    bool avx512 = __builtin_cpu_supports("avx512f");

    for (unsigned r = 0; r < (avx512 ? 32u : 16u); r++)
        vector_gs(a, store ? 0x11 : 0x10, r);
    for (unsigned r = 0; avx512 && r < 8; r++)
        mask_gs(a, store ? 0x91 : 0x90, r);
}

/* Flags are lost. C code gets its MXCSR and clean upper halves. */
static void save_vectors(struct assembler *a)
{
    uint8_t *none;

    asm_gs_imm8(a, 0x80, ALU_DIGIT_CMP, T_GS(vectors_loaded), 0);
    none = asm_jcc(a, 4);
    move_vectors(a, true);
    asm_gs(a, false, 0x0fae, 3, CPU_GS(s.fpu.mxcsr));                   /* stmxcsr */
    asm_gs(a, false, 0x0fae, 2, CPU_GS(native_mxcsr_host));             /* ldmxcsr */
    if (__builtin_cpu_supports("avx"))
        asm_byte(a, 0xc5), asm_byte(a, 0xf8), asm_byte(a, 0x77);        /* vzeroupper */
    asm_gs_imm8(a, 0xc6, 0, T_GS(vectors_loaded), 0);
    asm_set_target(none, a->at);
}

/* Flags stay. */
static void load_vectors(struct assembler *a)
{
    move_vectors(a, false);
    asm_gs(a, false, 0x0fae, 2, CPU_GS(s.fpu.mxcsr));
    asm_gs_imm8(a, 0xc6, 0, T_GS(vectors_loaded), 1);
}

/* ---- routines ---- */

static const uint8_t preserved[] = { H_RBX, H_RBP, H_R12, H_R13, H_R14, H_R15 };

/* Back to the caller of enter(), with RAX as result; RSP is the host's. */
static void leave_host(struct assembler *a)
{
    asm_lea(a, H_RSP, H_RSP, H_NONE, 0, 8);
    for (unsigned i = ARRAY_SIZE(preserved); i-- > 0;)
        asm_pop(a, preserved[i]);
    asm_ret(a);
}

static void call_c(struct assembler *a, const void *fn)
{
    asm_mov_imm(a, H_RAX, (uint64_t)(uintptr_t)fn);
    asm_byte(a, 0xff), asm_byte(a, 0xd0);
}

static uint8_t *if_null(struct assembler *a)
{
    asm_rr(a, true, 0x85, H_RAX, H_RAX);
    return asm_jcc(a, 4);
}

/*
 * All guest registers are spilled. Has C do something for the site in RSI; RAX: what it returns. Leaves if that is NULL, else
 * reloads everything; R11 is RAX then.
 */
static void with_interpreter(struct assembler *a, const void *fn)
{
    uint8_t *out, *none;

    asm_gs(a, false, 0x0fb6, H_RCX, T_GS(vectors_loaded));
    asm_gs(a, false, 0x88, H_RCX, T_GS(vectors_reload));
    save_vectors(a);
    asm_load_gs(a, H_RDI, T_GS(self));
    call_c(a, fn);
    out = if_null(a);
    asm_mov(a, H_R11, H_RAX);
    asm_gs_imm8(a, 0x80, ALU_DIGIT_CMP, T_GS(vectors_reload), 0);
    none = asm_jcc(a, 4);
    load_vectors(a);
    asm_set_target(none, a->at);
    {
        uint8_t *over = asm_jmp(a);

        asm_set_target(out, a->at);
        leave_host(a);
        asm_set_target(over, a->at);
    }
    reload_all(a);
}

static void emit_enter(struct translator *t, struct assembler *a)
{
    /* enter(t, code): six pushes and 8 bytes keep the stack aligned for calls from here. */
    t->enter = (const struct op *(*)(struct translator *, const void *))code_exec(&t->code, a->at);
    for (unsigned i = 0; i < ARRAY_SIZE(preserved); i++)
        asm_push(a, preserved[i]);
    asm_lea(a, H_RSP, H_RSP, H_NONE, 0, -8);
    asm_store_gs(a, H_RSP, T_GS(host_rsp));
    asm_mov(a, H_R11, H_RSI);
    reload_all(a);
    asm_jmp_reg(a, H_R11);
}

/*
 * Has C look for the guest address in T, with flags and all other registers as they are; RSP is the return stack's. R11: the jump
 * entry. Gives where the jump is that is taken if there is none.
 */
static uint8_t *call_jump(struct assembler *a)
{
    uint8_t *none, *found, *out;

    if (TRANSLATE_SANITIZED)
        return asm_jmp(a);
    asm_store_gs(a, H_R10, T_GS(site_va));
    spill_registers(a, 0, CHANGED_BY_C);
    spill_flags(a);
    to_host_stack(a);
    asm_load_gs(a, H_RDI, T_GS(self));
    asm_mov(a, H_RSI, H_R10);
    call_c(a, translate_jump);
    asm_load_gs(a, H_RSP, T_GS(it.returns.top));
    asm_load_gs(a, H_R10, T_GS(site_va));
    asm_mov(a, H_R11, H_RAX);
    asm_mov(a, H_RCX, H_RAX);
    reload_flags(a);
    none = asm_jrcxz(a);
    found = asm_jmp(a);
    asm_set_short(none, a->at);
    reload_registers(a, CHANGED_BY_C);
    out = asm_jmp(a);
    asm_set_target(found, a->at);
    reload_registers(a, CHANGED_BY_C);
    return out;
}

/*
 * To the guest address in T by the jump table, with flags and all other registers as they are. R11 is lost. Falls out of the end, RCX
 * restored, where the target is not translated or somebody wants something.
 */
static void emit_lookup(struct assembler *a)
{
    uint8_t *hit, *miss[2], *none;

    asm_store_gs(a, H_RCX, T_GS(rcx));
    asm_rorx(a, H_RCX, H_R10, 64 - TRANSLATE_JUMP_ROTATE);
    asm_lea(a, H_RCX, H_RCX, H_R10, 0, 0);
    asm_pext_gs(a, H_RCX, H_RCX, T_GS(jump_mask));
    asm_load_gs(a, H_R11, T_GS(jumps_now));
    asm_lea(a, H_RCX, H_NONE, H_RCX, 2, 0);
    asm_lea(a, H_R11, H_R11, H_RCX, 3, 0);
    asm_mem(a, true, 0x8b, H_RCX, H_R11, H_NONE, 0, offsetof(struct jump_entry_host, negative));
    asm_lea(a, H_RCX, H_RCX, H_R10, 0, 0);
    hit = asm_jrcxz(a);
    miss[0] = asm_jmp(a);
    asm_set_short(hit, a->at);
    asm_gs(a, false, 0x8b, H_RCX, CPU_GS(request));
    hit = asm_jrcxz(a);
    miss[1] = asm_jmp(a);
    asm_set_short(hit, a->at);
    asm_load_gs(a, H_RCX, T_GS(rcx));
    asm_mem(a, false, 0xff, 4, H_R11, H_NONE, 0, offsetof(struct jump_entry_host, code));
    asm_set_target(miss[0], a->at);
    asm_load_gs(a, H_RCX, T_GS(rcx));
    none = call_jump(a);
    asm_mem(a, false, 0xff, 4, H_R11, H_NONE, 0, offsetof(struct jump_entry_host, code));
    asm_set_target(miss[1], a->at);
    asm_load_gs(a, H_RCX, T_GS(rcx));
    asm_set_target(none, a->at);
}

static void emit_exits(struct translator *t, struct assembler *a)
{
    /* Out with what R11 holds: an op, a chain with bit 0 set, or RETURNED_NOWHERE. */
    t->exit_op = a->at;
    spill_all(a);
    save_vectors(a);
    asm_mov(a, H_RAX, H_R11);
    leave_host(a);

    /* Out with nothing to run next: s.rip is set. */
    t->exit_null = a->at;
    asm_mov_imm(a, H_R11, 0);
    asm_jmp_to(a, t->exit_op);

    /* To the guest address in T, in another page; jumped to, or called for a guest's CALL. */
    t->far = a->at;
    emit_lookup(a);
    asm_store_gs(a, H_R10, CPU_GS(s.rip));
    asm_jmp_to(a, t->exit_null);
}

/* How many calls further out a return is looked for. */
#define RETURN_SEARCH 12

static void emit_return_lookup(struct translator *t, struct assembler *a)
{
    emit_lookup(a);
    asm_store_gs(a, H_R10, CPU_GS(s.rip));
    asm_mov_imm(a, H_R11, RETURNED_NOWHERE);
    asm_jmp_to(a, t->exit_op);
}

/* RSP is at what a CALL of the interpreter had pushed. */
static void emit_return_interpreted(struct translator *t, struct assembler *a)
{
    uint8_t *hit;

    t->return_interpreted = code_exec(&t->code, a->at);
    asm_store_gs(a, H_RCX, T_GS(rcx));
    asm_mem(a, true, 0x8b, H_RCX, H_RSP, H_NONE, 0, 0);
    asm_byte(a, 0x48), asm_byte(a, 0xf7), asm_byte(a, 0xd1);            /* not %rcx */
    asm_lea(a, H_RCX, H_RCX, H_R10, 0, 1);
    hit = asm_jrcxz(a);
    asm_load_gs(a, H_RCX, T_GS(rcx));
    asm_jmp_to(a, t->return_missed);
    asm_set_short(hit, a->at);
    asm_load_gs(a, H_RCX, T_GS(rcx));
    asm_lea(a, H_RSP, H_RSP, H_NONE, 0, 8);
    asm_store_gs(a, H_R11, T_GS(saved_code));
    emit_return_lookup(t, a);
}

/*
 * A RET came to a place that it was not meant for: RSP is at what that place's CALL had pushed, T is the guest address, R11
 * says which RET it was (emit_ret()). Returns that were left out, by longjmp or because the interpreter made them, are
 * further out on the stack; one whose CALL was the interpreter's is not on it at all, and leaves it as it was.
 */
static void emit_return_missed(struct translator *t, struct assembler *a)
{
    uint8_t *loop, *bottom, *found, *dropped, *back;

    /* At the bottom of a stack: RSP has left it. */
    t->return_stub = code_exec(&t->code, a->at);
    asm_load_gs(a, H_RSP, T_GS(it.returns.bottom));
    asm_store_gs(a, H_R11, T_GS(saved_code));
    emit_return_lookup(t, a);

    t->return_missed = a->at;
    asm_store_gs(a, H_R11, T_GS(saved_code));
    asm_store_gs(a, H_RAX, gpr_offset(RAX));
    asm_store_gs(a, H_RCX, gpr_offset(RCX));
    spill_flags(a);
    asm_load_gs(a, H_RCX, T_GS(return_misses));
    asm_lea(a, H_RCX, H_RCX, H_NONE, 0, 1);
    asm_store_gs(a, H_RCX, T_GS(return_misses));
    /* The right place, but its unit was dropped. */
    asm_mem(a, true, 0x3b, H_R10, H_RSP, H_NONE, 0, 0);
    dropped = asm_jcc(a, 4);
    asm_mov_imm(a, H_RCX, RETURN_SEARCH);
    asm_mov(a, H_R11, H_RSP);
    loop = a->at;
    asm_lea(a, H_R11, H_R11, H_NONE, 0, 16);
    asm_gs(a, true, 0x3b, H_R11, T_GS(it.returns.bottom));
    bottom = asm_jcc(a, 3);
    asm_mem(a, true, 0x3b, H_R10, H_R11, H_NONE, 0, 0);
    found = asm_jcc(a, 4);
    asm_byte(a, 0xff), asm_byte(a, 0xc9);                               /* dec %ecx */
    asm_set_target(asm_jcc(a, 5), loop);
    asm_set_target(bottom, a->at);
    asm_lea(a, H_RSP, H_RSP, H_NONE, 0, -8);
    back = asm_jmp(a);
    asm_set_target(dropped, a->at);
    asm_lea(a, H_RSP, H_RSP, H_NONE, 0, 8);
    asm_set_target(back, a->at);
    reload_flags(a);
    asm_load_gs(a, H_RCX, gpr_offset(RCX));
    asm_load_gs(a, H_RAX, gpr_offset(RAX));
    emit_return_lookup(t, a);
    asm_set_target(found, a->at);
    asm_lea(a, H_RSP, H_R11, H_NONE, 0, -8);
    reload_flags(a);
    asm_load_gs(a, H_RCX, gpr_offset(RCX));
    asm_load_gs(a, H_RAX, gpr_offset(RAX));
    asm_ret(a);
}

/* Room for a gate. */
#define GATE_MAX 160

/* Goes on where RCX is 0; else RCX gets its value back and T is looked up. */
static void gate_unless_zero(struct translator *t, struct assembler *a)
{
    uint8_t *zero = asm_jrcxz(a);

    asm_load_gs(a, H_RCX, T_GS(rcx));
    asm_jmp_to(a, t->far);
    asm_set_short(zero, a->at);
}

const uint8_t *translate_gate(struct translator *t, struct block *b)
{
    struct assembler a = { .at = t->code.write + t->code.used, .end = t->code.write + t->code.limit };
    int32_t start = (int32_t)((uintptr_t)b->host & (GUEST_PAGE_SIZE - 1));

    if (b->gate)
        return b->gate;
    if (t->code.limit - t->code.used < GATE_MAX)
        return NULL;
    b->gate = a.at;
    /* The page of T is mapped… */
    asm_store_gs(&a, H_RCX, T_GS(rcx));
    asm_pext_gs(&a, H_R11, H_R10, T_GS(tlb_mask));
    asm_load_gs(&a, H_RCX, CPU_GS(tlb_fetch));
    asm_lea(&a, H_R11, H_NONE, H_R11, 2, 0);
    asm_lea(&a, H_R11, H_RCX, H_R11, 3, 0);
    asm_mem(&a, true, 0x8b, H_RCX, H_R11, H_NONE, 0, (int32_t)(offsetof(struct tlb_entry, tag) + TLB_EXEC * 8));
    asm_lea(&a, H_RCX, H_RCX, H_R10, 0, -start);
    gate_unless_zero(t, &a);
    /* …to the memory that the block was made from, … */
    asm_mem(&a, true, 0x8b, H_R11, H_R11, H_NONE, 0, offsetof(struct tlb_entry, addend));
    asm_mov_imm(&a, H_RCX, -(uint64_t)(uintptr_t)b->host);
    asm_lea(&a, H_R11, H_R11, H_R10, 0, 0);
    asm_lea(&a, H_RCX, H_RCX, H_R11, 0, 0);
    gate_unless_zero(t, &a);
    /* …and nobody wants anything. */
    asm_gs(&a, false, 0x8b, H_RCX, CPU_GS(request));
    gate_unless_zero(t, &a);
    asm_load_gs(&a, H_RCX, T_GS(rcx));
    asm_jmp_to(&a, t->code.write + ((const uint8_t *)b->indirect - t->code.exec));
    code_use(&t->code, a.at);
    return b->gate;
}

void translate_emit_runtime(struct translator *t)
{
    struct assembler a = { .at = t->code.write, .end = t->code.write + KIB(16) };
    uint8_t *full, *tail, *op_tail;

    emit_enter(t, &a);
    emit_exits(t, &a);
    emit_return_missed(t, &a);
    emit_return_interpreted(t, &a);

    /* Called: registers and flags stay. */
    t->vectors_load = a.at;
    load_vectors(&a);
    asm_ret(&a);

    /* Called: a look-up in line found nothing for T. Returns with R11 the entry, or 5 bytes further on: there is none. */
    t->jump_miss = a.at;
    full = call_jump(&a);
    asm_ret(&a);
    asm_set_target(full, a.at);
    asm_mem(&a, true, 0x8b, H_R11, H_RSP, H_NONE, 0, 0);
    asm_lea(&a, H_R11, H_R11, H_NONE, 0, 5);
    asm_mem(&a, true, 0x89, H_R11, H_RSP, H_NONE, 0, 0);
    asm_ret(&a);

    /* Called with a site in R11: its instruction is run, then it goes on behind the call. */
    t->run_op = a.at;
    asm_gs(&a, false, 0x8f, 0, T_GS(slow_return));
    spill_all(&a);
    asm_mov(&a, H_RSI, H_R11);
    op_tail = a.at;
    with_interpreter(&a, translate_run_op);
    asm_gs(&a, false, 0xff, 6, T_GS(slow_return));
    asm_ret(&a);

    /* The same for an instruction that translate_quick() may know. */
    t->run_quick = a.at;
    asm_gs(&a, false, 0x8f, 0, T_GS(slow_return));
    asm_store_gs(&a, H_R11, T_GS(site));
    spill_registers(&a, 0, CHANGED_BY_C);
    spill_flags(&a);
    to_host_stack(&a);
    if (!TRANSLATE_SANITIZED) {
        asm_load_gs(&a, H_RDI, T_GS(self));
        asm_mov(&a, H_RSI, H_R11);
        call_c(&a, translate_quick);
        asm_rr(&a, false, 0x84, H_RAX, H_RAX);                          /* test %al, %al */
        full = asm_jcc(&a, 4);
        asm_load_gs(&a, H_RSP, T_GS(it.returns.top));
        reload_flags(&a);
        reload_registers(&a, CHANGED_BY_C);
        asm_gs(&a, false, 0xff, 6, T_GS(slow_return));
        asm_ret(&a);
        asm_set_target(full, a.at);
    }
    spill_registers(&a, CHANGED_BY_C, ARRAY_SIZE(mapped));
    asm_load_gs(&a, H_RSI, T_GS(site));
    asm_jmp_to(&a, op_tail);

    /* Jumped to with a site in R11, whose instruction is run; goes on where C says. */
    t->run_and_go = a.at;
    spill_all(&a);
    asm_mov(&a, H_RSI, H_R11);
    tail = a.at;
    with_interpreter(&a, translate_slow);
    asm_jmp_reg(&a, H_R11);

    /* Jumped to with a site in R11 and an address in T that its check missed. */
    t->fill = a.at;
    asm_store_gs(&a, H_R11, T_GS(site));
    asm_store_gs(&a, H_R10, T_GS(site_va));
    spill_registers(&a, 0, CHANGED_BY_C);
    spill_flags(&a);
    to_host_stack(&a);
    if (!TRANSLATE_SANITIZED) {
        asm_load_gs(&a, H_RDI, T_GS(self));
        asm_mov(&a, H_RSI, H_R11);
        asm_mov(&a, H_RDX, H_R10);
        call_c(&a, translate_fill);
        full = if_null(&a);
        asm_mov(&a, H_R11, H_RAX);
        asm_load_gs(&a, H_RSP, T_GS(it.returns.top));
        reload_flags(&a);
        reload_registers(&a, CHANGED_BY_C);
        asm_jmp_reg(&a, H_R11);
        asm_set_target(full, a.at);
    }
    spill_registers(&a, CHANGED_BY_C, ARRAY_SIZE(mapped));
    asm_load_gs(&a, H_RSI, T_GS(site));
    asm_jmp_to(&a, tail);

    code_use(&t->code, t->code.write + align_up((size_t)(a.at - t->code.write), 64));
    t->code.fixed = t->code.used;
}
