/*
 * The routines around translated code: in from C, out to C, and the call of one interpreter op from the middle of a
 * block. Emitted once into each vCPU's code memory.
 */
#include "engine/translate/translate.h"

#define T_GS(field) offsetof(struct translator, field)
#define CPU_GS(field) offsetof(struct x86_cpu, field)

/* Guest registers that live in host registers: guest number → host number. */
static const uint8_t mapped[][2] = {
    { RAX, H_RAX }, { RCX, H_R14 }, { RDX, H_RDX }, { RBX, H_RBX }, { RSP, H_R15 }, { RBP, H_RBP },
    { RSI, H_RSI }, { RDI, H_RDI }, { R8, H_R8 },   { R9, H_R9 },   { R12, H_R12 }, { R13, H_R13 },
};

/*
 * Translated code runs with the guest's MXCSR, all of whose exceptions are masked then; C code with the default one and
 * clean upper halves.
 */
static void spill(struct assembler *a)
{
    for (unsigned i = 0; i < ARRAY_SIZE(mapped); i++)
        asm_store_gs(a, mapped[i][1], gpr_offset(mapped[i][0]));
    asm_byte(a, 0x9f);                                                  /* lahf */
    asm_byte(a, 0x0f), asm_byte(a, 0x90), asm_byte(a, 0xc0);            /* seto %al */
    asm_byte(a, 0x0f), asm_byte(a, 0xb7), asm_byte(a, 0xc0);            /* movzwl %ax, %eax */
    asm_gs(a, false, 0x89, H_RAX, CPU_GS(arith));
    asm_gs(a, false, 0x0fae, 3, CPU_GS(s.fpu.mxcsr));                   /* stmxcsr */
    asm_gs(a, false, 0x0fae, 2, CPU_GS(native_mxcsr_host));             /* ldmxcsr */
    if (__builtin_cpu_supports("avx"))
        asm_byte(a, 0xc5), asm_byte(a, 0xf8), asm_byte(a, 0x77);        /* vzeroupper */
}

static void reload(struct assembler *a)
{
    asm_gs(a, false, 0x0fae, 2, CPU_GS(s.fpu.mxcsr));
    asm_gs(a, false, 0x8b, H_RAX, CPU_GS(arith));
    asm_byte(a, 0x04), asm_byte(a, 0x7f);                               /* add $0x7f, %al */
    asm_byte(a, 0x9e);                                                  /* sahf */
    for (unsigned i = 0; i < ARRAY_SIZE(mapped); i++)
        asm_load_gs(a, mapped[i][1], gpr_offset(mapped[i][0]));
}

static const uint8_t preserved[] = { H_RBX, H_RBP, H_R12, H_R13, H_R14, H_R15 };

static void push_pop(struct assembler *a, unsigned opcode, unsigned reg)
{
    asm_rex(a, false, 0, 0, reg, false);
    asm_byte(a, opcode + (reg & 7));
}

/* Back to the caller of enter(), with RAX as result. */
static void leave_host(struct assembler *a)
{
    asm_load_gs(a, H_RSP, T_GS(host_rsp));
    asm_lea(a, H_RSP, H_RSP, H_NONE, 0, 8);
    for (unsigned i = ARRAY_SIZE(preserved); i-- > 0;)
        push_pop(a, 0x58, preserved[i]);
    asm_byte(a, 0xc3);
}

void translate_emit_runtime(struct translator *t)
{
    struct assembler a = { .at = t->code.write, .end = t->code.write + 4096 };
    uint8_t *out;

    /* enter(t, code): six pushes and 8 bytes keep the stack aligned for calls from translated code. */
    t->enter = (const struct op *(*)(struct translator *, const void *))code_exec(&t->code, a.at);
    for (unsigned i = 0; i < ARRAY_SIZE(preserved); i++)
        push_pop(&a, 0x50, preserved[i]);
    asm_lea(&a, H_RSP, H_RSP, H_NONE, 0, -8);
    asm_store_gs(&a, H_RSP, T_GS(host_rsp));
    asm_mov(&a, H_R11, H_RSI);
    reload(&a);
    asm_rex(&a, false, 0, 0, H_R11, false);
    asm_byte(&a, 0xff), asm_byte(&a, 0xe3);                             /* jmp *%r11 */

    /* Out with nothing to run next: s.rip is set. */
    t->exit_null = a.at;
    spill(&a);
    asm_mov_imm(&a, H_RAX, 0);
    leave_host(&a);

    /* Out with what R11 holds: an op, or a chain with bit 0 set. */
    t->exit_op = a.at;
    spill(&a);
    asm_mov(&a, H_RAX, H_R11);
    leave_host(&a);

    /* Called with an op in R11: runs it and returns behind it, or leaves. */
    t->slow = a.at;
    spill(&a);
    asm_load_gs(&a, H_RDI, T_GS(self));
    asm_mov(&a, H_RSI, H_R11);
    asm_lea(&a, H_RSP, H_RSP, H_NONE, 0, -8);
    asm_mov_imm(&a, H_RAX, (uint64_t)(uintptr_t)translate_run_op);
    asm_byte(&a, 0xff), asm_byte(&a, 0xd0);                             /* call *%rax */
    asm_lea(&a, H_RSP, H_RSP, H_NONE, 0, 8);
    asm_byte(&a, 0x85), asm_byte(&a, 0xc0);                             /* test %eax, %eax */
    out = asm_jcc(&a, 4);
    reload(&a);
    asm_byte(&a, 0xc3);
    asm_set_target(out, a.at);
    asm_mov_imm(&a, H_RAX, 0);
    leave_host(&a);

    code_use(&t->code, t->code.write + align_up((size_t)(a.at - t->code.write), 64));
    t->code.fixed = t->code.used;
}
