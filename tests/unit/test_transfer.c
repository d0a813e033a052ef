/*
 * Control transfers between segments and levels, and the loading of segment registers: results, and
 * the error of every check, with the state unchanged by it.
 */
#include "x86_guest.h"

#include <string.h>

/* Runs a semantics function; a fault must leave all state but CR2 and nmi_blocked as it was. */
static int run(struct guest *g, x86_semantics_fn *fn, const struct x86_insn *insn)
{
    struct x86_state before = g->cpu.s;
    int vector = RAISED(g, fn(&g->cpu, insn));

    if (vector >= 0) {
        before.cr2 = g->cpu.s.cr2;
        before.nmi_blocked = g->cpu.s.nmi_blocked;
        assert_memory_equal(&g->cpu.s, &before, sizeof(before));
    }
    return vector;
}

static int run_bytes(struct guest *g, x86_semantics_fn *fn, const void *bytes, unsigned len)
{
    struct x86_insn insn = guest_insn(g, bytes, len);
    return run(g, fn, &insn);
}

static void put_frame(struct guest *g, unsigned size, unsigned n, const uint64_t *words)
{
    for (unsigned i = 0; i < n; i++)
        guest_put(g, g->cpu.s.seg[SEG_SS].base + g->cpu.s.gpr[RSP] + (gpa_t)i * size, words[i],
                  size);
}

#define FRAME(g, size, ...)                                                  \
    put_frame(g, size, sizeof((uint64_t[]){__VA_ARGS__}) / sizeof(uint64_t), \
              (const uint64_t[]){__VA_ARGS__})

static int iretq(struct guest *g)
{
    return run_bytes(g, x86_insn_iret, "\x48\xcf", 2);
}

static void iret_to_user(void **state)
{
    struct guest *g = *state;
    struct x86_cpu *cpu = &g->cpu;
    const uint64_t flags = RFLAGS_IF | RFLAGS_TF | RFLAGS_AC | RFLAGS_ID | RFLAGS_DF |
                           RFLAGS_ARITH | RFLAGS_RF | RFLAGS_NT;

    guest_system(g, GUEST_LONG);
    x86_set_rflags(cpu, 0);
    cpu->s.seg[SEG_FS] = (struct x86_seg){.base = 0x1234, .attr = SEG_UNUSABLE};
    cpu->s.seg[SEG_DS] = cpu->s.seg[SEG_SS];
    FRAME(g, 8, 0x7fffffffffff, SEL_UCODE64 | 3, flags | 0x3000 | 1ull << 40, 0x300ff8,
          SEL_UDATA | 3);
    assert_int_equal(iretq(g), -1);
    assert_int_equal(cpu->next_rip, 0x7fffffffffff);
    assert_int_equal(cpu->cpl, 3);
    assert_int_equal(cpu->code_size, 8);
    assert_int_equal(cpu->s.gpr[RSP], 0x300ff8);
    assert_int_equal(x86_rflags(cpu), flags | 0x3002);
    assert_int_equal(cpu->s.seg[SEG_SS].selector, SEL_UDATA | 3);
    /* The supervisor's data segment is not for the user; a null FS keeps its base. */
    assert_int_equal(cpu->s.seg[SEG_DS].selector, 0);
    assert_true(cpu->s.seg[SEG_DS].attr & SEG_UNUSABLE);
    assert_int_equal(cpu->s.seg[SEG_ES].selector, SEL_UDATA | 3);
    assert_int_equal(cpu->s.seg[SEG_FS].base, 0x1234);

    /* To 32-bit code. */
    guest_system(g, GUEST_LONG);
    FRAME(g, 8, 0x201000, SEL_UCODE32 | 3, RFLAGS_IF, 0xffffffff00300ff8, SEL_UDATA | 3);
    assert_int_equal(iretq(g), -1);
    assert_int_equal(cpu->code_size, 4);
    assert_int_equal(cpu->s.gpr[RSP], 0x300ff8);
    assert_true(cpu->flat);
    /* Its limit counts there. */
    guest_system(g, GUEST_LONG);
    FRAME(g, 8, 0x100201000, SEL_UCODE32 | 3, RFLAGS_IF, 0x300ff8, SEL_UDATA | 3);
    assert_int_equal(iretq(g), X86_GP);
    assert_int_equal(cpu->exc_error, 0);
}

static void iret_in_kernel(void **state)
{
    struct guest *g = *state;
    struct x86_cpu *cpu = &g->cpu;

    guest_system(g, GUEST_LONG);
    /* Same level: SS and RSP are loaded all the same, and SS may be null. */
    FRAME(g, 8, 0xffffffff80000000, SEL_KCODE, RFLAGS_IF, 0x91234, 0);
    assert_int_equal(iretq(g), -1);
    assert_true(cpu->next_rip == 0xffffffff80000000);
    assert_int_equal(cpu->s.gpr[RSP], 0x91234);
    assert_true(cpu->s.seg[SEG_SS].attr & SEG_UNUSABLE);
    assert_int_equal(cpu->cpl, 0);
    /* 16-bit and 32-bit frames. */
    guest_system(g, GUEST_LONG);
    x86_set_rflags(cpu, RFLAGS_AC | RFLAGS_ID);
    FRAME(g, 2, 0x9abc, SEL_KCODE, RFLAGS_IF, 0x1234, SEL_KDATA);
    assert_int_equal(run_bytes(g, x86_insn_iret, "\x66\xcf", 2), -1);
    assert_int_equal(cpu->next_rip, 0x9abc);
    assert_int_equal(cpu->s.gpr[RSP], 0x1234);
    assert_int_equal(x86_rflags(cpu), RFLAGS_AC | RFLAGS_ID | RFLAGS_IF | 2);
    guest_system(g, GUEST_LONG);
    FRAME(g, 4, 0x56789abc, SEL_KCODE, 0, 0x12345678, SEL_KDATA);
    assert_int_equal(run_bytes(g, x86_insn_iret, "\xcf", 1), -1);
    assert_int_equal(cpu->next_rip, 0x56789abc);
}

static void iret_checks(void **state)
{
    struct guest *g = *state;
    static const struct {
        uint64_t rip;
        unsigned cs, ss;
        uint8_t vector, error;
    } cases[] = {
        {0, 0, SEL_UDATA | 3, X86_GP, 0},
        {0, 3, SEL_UDATA | 3, X86_GP, 0},
        {0, 0x1003, SEL_UDATA | 3, X86_GP, 0}, /* beyond the table: error 0x1000, see below */
        {0, SEL_UDATA | 3, SEL_UDATA | 3, X86_GP, SEL_UDATA},
        {0, SEL_KCODE | 3, SEL_UDATA | 3, X86_GP, SEL_KCODE},
        {0, SEL_UCODE64, SEL_KDATA, X86_GP, SEL_UCODE64},
        {0, SEL_ABSENT_CODE, SEL_KDATA, X86_NP, SEL_ABSENT_CODE},
        {0, SEL_UCODE64 | 3, 0, X86_GP, 0},
        {0, SEL_UCODE64 | 3, 3, X86_GP, 0},
        {0, SEL_UCODE64 | 3, SEL_UDATA, X86_GP, SEL_UDATA},
        {0, SEL_UCODE64 | 3, SEL_KDATA | 3, X86_GP, SEL_KDATA},
        {0, SEL_UCODE64 | 3, SEL_UCODE32 | 3, X86_GP, SEL_UCODE32},
        {0, SEL_KCODE, SEL_ABSENT_DATA, X86_SS, SEL_ABSENT_DATA},
        {0, SEL_KCODE_OTHER, 0, X86_GP, 0}, /* a null SS only for 64-bit code */
        {0x800000000000, SEL_UCODE64 | 3, SEL_UDATA | 3, X86_GP, 0},
    };

    for (unsigned i = 0; i < ARRAY_SIZE(cases); i++) {
        guest_system(g, GUEST_LONG);
        FRAME(g, 8, cases[i].rip, cases[i].cs, RFLAGS_IF, 0x300000, cases[i].ss);
        assert_int_equal(iretq(g), cases[i].vector);
        assert_int_equal(g->cpu.exc_error, cases[i].cs == 0x1003 ? 0x1000 : cases[i].error);
    }
    /* NT; a frame that is not there. */
    guest_system(g, GUEST_LONG);
    x86_set_rflags(&g->cpu, RFLAGS_NT);
    assert_int_equal(iretq(g), X86_GP);
    x86_set_rflags(&g->cpu, 0);
    g->cpu.s.gpr[RSP] = MIB(4) - 24;
    FRAME(g, 8, 0, SEL_UCODE64 | 3, 0);
    assert_int_equal(iretq(g), X86_PF);
    assert_int_equal(g->cpu.s.cr2, MIB(4));
    g->cpu.s.gpr[RSP] = 0x7fffffffffe8;
    guest_map(g, 0x7ffffffff000, MIB(3), KIB(4), PTE_W, PTE_W | PTE_U);
    guest_put(g, MIB(3) + 0xff0, SEL_UCODE64 | 3, 8);
    x86_tlb_flush_all(&g->cpu);
    assert_int_equal(iretq(g), X86_SS);
    assert_int_equal(g->cpu.exc_error, 0);
}

static void iret_flags_by_privilege(void **state)
{
    struct guest *g = *state;
    struct x86_cpu *cpu = &g->cpu;
    const uint64_t always =
        RFLAGS_ARITH | RFLAGS_TF | RFLAGS_DF | RFLAGS_NT | RFLAGS_RF | RFLAGS_AC | RFLAGS_ID;

    for (unsigned cpl = 0; cpl <= 3; cpl += 3) {
        for (unsigned iopl = 0; iopl <= 3; iopl++) {
            guest_system(g, GUEST_LONG);
            if (cpl)
                guest_enter_user(g, true);
            x86_set_rflags(cpu, iopl << 12);
            g->cpu.s.gpr[RSP] = cpl ? USER_STACK : KERNEL_STACK;
            FRAME(g, 8, 0x201000, cpl ? SEL_UCODE64 | 3 : SEL_KCODE, 0x3fffd7, 0x300000,
                  cpl ? SEL_UDATA | 3 : SEL_KDATA);
            assert_int_equal(iretq(g), -1);
            uint64_t want = always | 2 | (cpl <= iopl ? RFLAGS_IF : 0);
            want |= cpl == 0 ? 0x3000 | RFLAGS_VIF | RFLAGS_VIP : iopl << 12;
            assert_int_equal(x86_rflags(cpu), want);
        }
    }
}

static void iret_in_protected_mode(void **state)
{
    struct guest *g = *state;
    struct x86_cpu *cpu = &g->cpu;

    guest_system(g, GUEST_32);
    FRAME(g, 4, 0x151234, SEL_KCODE, RFLAGS_IF | RFLAGS_CF);
    assert_int_equal(run_bytes(g, x86_insn_iret, "\xcf", 1), -1);
    assert_int_equal(cpu->next_rip, 0x151234);
    assert_int_equal(cpu->s.gpr[RSP], KERNEL_STACK + 12);
    assert_int_equal(x86_rflags(cpu), RFLAGS_IF | RFLAGS_CF | 2);
    guest_system(g, GUEST_32);
    FRAME(g, 4, USER_CODE, SEL_UCODE32 | 3, RFLAGS_IF, USER_STACK, SEL_UDATA | 3);
    assert_int_equal(run_bytes(g, x86_insn_iret, "\xcf", 1), -1);
    assert_int_equal(cpu->cpl, 3);
    assert_int_equal(cpu->s.gpr[RSP], USER_STACK);
    /* Neither virtual-8086 mode nor task return is offered. */
    guest_system(g, GUEST_32);
    FRAME(g, 4, 0x1234, 0x100, RFLAGS_VM, 0x1000, 0x200, 0, 0, 0, 0);
    assert_int_equal(run_bytes(g, x86_insn_iret, "\xcf", 1), X86_GP);
    x86_set_rflags(cpu, RFLAGS_NT);
    assert_int_equal(run_bytes(g, x86_insn_iret, "\xcf", 1), X86_TS);

    guest_system(g, GUEST_REAL);
    FRAME(g, 2, 0x1234, 0x3000, RFLAGS_CF | RFLAGS_TF);
    assert_int_equal(run_bytes(g, x86_insn_iret, "\xcf", 1), -1);
    assert_int_equal(cpu->next_rip, 0x1234);
    assert_int_equal(cpu->s.seg[SEG_CS].base, 0x30000);
    assert_int_equal(x86_rflags(cpu), RFLAGS_CF | RFLAGS_TF | 2);
    assert_int_equal(cpu->s.gpr[RSP], 0x1006);
}

/* ---- SYSCALL and SYSENTER ---- */

static void syscall_and_back(void **state)
{
    struct guest *g = *state;
    struct x86_cpu *cpu = &g->cpu;

    guest_system(g, GUEST_LONG);
    guest_enter_user(g, true);
    assert_int_equal(run_bytes(g, x86_insn_syscall, "\x0f\x05", 2), X86_UD);
    cpu->s.efer |= EFER_SCE;
    cpu->s.star = 0x0013000800000000;
    cpu->s.lstar = 0xffffffff81000000;
    cpu->s.cstar = 0xffffffff82000000;
    cpu->s.sfmask = RFLAGS_IF | RFLAGS_TF | RFLAGS_CF;
    x86_set_rflags(cpu, RFLAGS_IF | RFLAGS_CF | RFLAGS_ZF | RFLAGS_RF);
    assert_int_equal(run_bytes(g, x86_insn_syscall, "\x0f\x05", 2), -1);
    assert_true(cpu->next_rip == 0xffffffff81000000);
    assert_int_equal(cpu->s.gpr[RCX], USER_CODE + 2);
    assert_int_equal(cpu->s.gpr[R11], RFLAGS_IF | RFLAGS_CF | RFLAGS_ZF | 2);
    assert_int_equal(x86_rflags(cpu), RFLAGS_ZF | 2);
    assert_int_equal(cpu->s.gpr[RSP], USER_STACK);
    assert_int_equal(cpu->s.seg[SEG_CS].selector, 8);
    assert_int_equal(cpu->s.seg[SEG_SS].selector, 16);
    assert_int_equal(cpu->cpl, 0);
    assert_int_equal(cpu->code_size, 8);

    /* Back to 64-bit and to 32-bit code. */
    cpu->s.gpr[R11] = 0x3c7fd7 | 1ull << 50 | RFLAGS_RF | RFLAGS_VM;
    struct x86_state kernel = cpu->s;
    assert_int_equal(run_bytes(g, x86_insn_sysret, "\x48\x0f\x07", 3), -1);
    assert_int_equal(cpu->next_rip, USER_CODE + 2);
    assert_int_equal(cpu->cpl, 3);
    assert_int_equal(cpu->s.seg[SEG_CS].selector, 0x23);
    assert_int_equal(cpu->s.seg[SEG_CS].attr, 0xa0fb);
    assert_int_equal(cpu->s.seg[SEG_SS].selector, 0x1b);
    assert_int_equal(x86_rflags(cpu), 0x3c7fd7);
    assert_int_equal(run_bytes(g, x86_insn_sysret, "\x48\x0f\x07", 3), X86_GP);
    x86_cpu_import(cpu, &kernel);
    cpu->s.gpr[RCX] = 0xabcdef0012345678;
    assert_int_equal(run_bytes(g, x86_insn_sysret, "\x0f\x07", 2), -1);
    assert_int_equal(cpu->next_rip, 0x12345678);
    assert_int_equal(cpu->s.seg[SEG_CS].selector, 0x13);
    assert_int_equal(cpu->code_size, 4);

    /* The vendors differ: return to a non-canonical address, and SYSCALL from 32-bit code. */
    for (unsigned amd = 0; amd < 2; amd++) {
        cpu->amd = amd;
        x86_cpu_import(cpu, &kernel);
        cpu->s.gpr[RCX] = 0x800000000000;
        assert_int_equal(run_bytes(g, x86_insn_sysret, "\x48\x0f\x07", 3), amd ? -1 : X86_GP);
        x86_cpu_import(cpu, &kernel);
        guest_enter_user(g, false);
        struct x86_insn insn = {.mnemonic = ZYDIS_MNEMONIC_SYSCALL, .length = 2, .op_size = 4};
        cpu->next_rip = USER_CODE + 2;
        assert_int_equal(run(g, x86_insn_syscall, &insn), amd ? -1 : X86_UD);
        if (amd)
            assert_true(cpu->next_rip == 0xffffffff82000000);
    }
}

static void sysenter_and_back(void **state)
{
    struct guest *g = *state;
    struct x86_cpu *cpu = &g->cpu;

    for (unsigned wide = 0; wide < 2; wide++) {
        guest_system(g, wide ? GUEST_LONG : GUEST_32);
        guest_enter_user(g, wide);
        cpu->amd = false;
        cpu->s.sysenter_cs = 0;
        assert_int_equal(run_bytes(g, x86_insn_sysenter, "\x0f\x34", 2), X86_GP);
        cpu->s.sysenter_cs = 0x0b;
        cpu->s.sysenter_esp = 0xffffffff00090000;
        cpu->s.sysenter_eip = 0xffffffff00150000;
        x86_set_rflags(cpu, RFLAGS_IF | RFLAGS_ZF);
        assert_int_equal(run_bytes(g, x86_insn_sysenter, "\x0f\x34", 2), -1);
        assert_true(cpu->next_rip == (wide ? 0xffffffff00150000 : 0x150000));
        assert_true(cpu->s.gpr[RSP] == (wide ? 0xffffffff00090000 : 0x90000));
        assert_int_equal(cpu->s.seg[SEG_CS].selector, 0x8);
        assert_int_equal(cpu->s.seg[SEG_SS].selector, 0x10);
        assert_int_equal(x86_rflags(cpu), RFLAGS_ZF | 2);
        assert_int_equal(cpu->code_size, wide ? 8 : 4);

        cpu->s.gpr[RDX] = 0x201000;
        cpu->s.gpr[RCX] = 0x300000;
        assert_int_equal(run_bytes(g, x86_insn_sysexit, "\x0f\x35", 2), -1);
        assert_int_equal(cpu->next_rip, 0x201000);
        assert_int_equal(cpu->s.gpr[RSP], 0x300000);
        assert_int_equal(cpu->s.seg[SEG_CS].selector, 0x1b);
        assert_int_equal(cpu->s.seg[SEG_SS].selector, 0x23);
        assert_int_equal(cpu->code_size, 4);
        struct x86_insn insn = {.mnemonic = ZYDIS_MNEMONIC_SYSEXIT, .length = 2, .op_size = 4};
        assert_int_equal(run(g, x86_insn_sysexit, &insn), X86_GP);
    }
    guest_system(g, GUEST_LONG);
    cpu->s.sysenter_cs = 8;
    cpu->s.gpr[RDX] = 0x800000000000;
    assert_int_equal(run_bytes(g, x86_insn_sysexit, "\x48\x0f\x35", 3), X86_GP);
    cpu->s.gpr[RDX] = 0x7fff12345678;
    assert_int_equal(run_bytes(g, x86_insn_sysexit, "\x48\x0f\x35", 3), -1);
    assert_int_equal(cpu->s.seg[SEG_CS].selector, 0x2b);
    assert_int_equal(cpu->code_size, 8);
    /* AMD has neither in long mode. */
    guest_system(g, GUEST_LONG);
    cpu->amd = true;
    assert_int_equal(run_bytes(g, x86_insn_sysenter, "\x0f\x34", 2), X86_UD);
    assert_int_equal(run_bytes(g, x86_insn_sysexit, "\x0f\x35", 2), X86_UD);
}

/* ---- far JMP, CALL, RET ---- */

/* jmp or call *(%rax): the pointer at 0x151000. */
static int far_indirect(struct guest *g, bool call, unsigned size, uint64_t offset,
                        unsigned selector)
{
    static const char *const jmp[] = {[2] = "\x66\xff\x28", [4] = "\xff\x28", [8] = "\x48\xff\x28"};
    static const char *const call_[] = {
        [2] = "\x66\xff\x18", [4] = "\xff\x18", [8] = "\x48\xff\x18"};
    const char *bytes = call ? call_[size] : jmp[size];
    gpa_t at = g->cpu.cpl == 3 ? USER_CODE + 0x1000 : 0x151000;

    guest_put(g, at, offset, size);
    guest_put(g, at + size, selector, 2);
    g->cpu.s.gpr[RAX] = at;
    return run_bytes(g, call ? x86_insn_call_far : x86_insn_jmp_far, bytes,
                     (unsigned)strlen(bytes));
}

static void far_direct(void **state)
{
    struct guest *g = *state;
    struct x86_cpu *cpu = &g->cpu;

    for (unsigned call = 0; call < 2; call++) {
        /* Between 64-bit and 32-bit code of the kernel. */
        guest_system(g, GUEST_LONG);
        assert_int_equal(far_indirect(g, call, 4, 0x151234, SEL_KCODE_OTHER), -1);
        assert_int_equal(cpu->code_size, 4);
        assert_int_equal(cpu->next_rip, 0x151234);
        assert_int_equal(cpu->s.gpr[RSP], KERNEL_STACK - (call ? 8 : 0));
        if (call) {
            assert_int_equal(guest_get(g, KERNEL_STACK - 8, 4), 0x150000 + 2);
            assert_int_equal(guest_get(g, KERNEL_STACK - 4, 4), SEL_KCODE);
        }
        static const struct {
            unsigned selector;
            uint8_t vector;
            uint16_t error;
        } cases[] = {
            {0, X86_GP, 0},
            {2, X86_GP, 0},
            {0x1000, X86_GP, 0x1000},
            {SEL_KDATA, X86_GP, SEL_KDATA},
            {SEL_KCODE | 1, X86_GP, SEL_KCODE},
            {SEL_UCODE64, X86_GP, SEL_UCODE64},
            {SEL_ABSENT_CODE, X86_NP, SEL_ABSENT_CODE},
            {SEL_TSS, X86_GP, SEL_TSS},
            {4, X86_GP, 4},
        };
        for (unsigned i = 0; i < ARRAY_SIZE(cases); i++) {
            guest_system(g, GUEST_LONG);
            guest_gdt(g, SEL_TSS, guest_desc(0, 0x67, 0x89));
            assert_int_equal(far_indirect(g, call, 4, 0x151234, cases[i].selector),
                             cases[i].vector);
            assert_int_equal(cpu->exc_error, cases[i].error);
        }
        /* A conforming segment of the kernel runs at the caller's level. */
        guest_system(g, GUEST_LONG);
        guest_enter_user(g, true);
        assert_int_equal(far_indirect(g, call, 8, 0xffffffff80000000, SEL_CONFORMING | 3), -1);
        assert_int_equal(cpu->cpl, 3);
        assert_int_equal(cpu->s.seg[SEG_CS].selector, SEL_CONFORMING | 3);
        assert_true(cpu->next_rip == 0xffffffff80000000);
        /* Targets: non-canonical, or beyond the limit. AMD takes 32 bits of a 64-bit pointer. */
        guest_system(g, GUEST_LONG);
        assert_int_equal(far_indirect(g, call, 8, 0x800000000000, SEL_KCODE), X86_GP);
        guest_gdt(g, SEL_FREE, guest_desc(0, 0xfff, 0x409a));
        assert_int_equal(far_indirect(g, call, 4, 0x1000, SEL_FREE), X86_GP);
        assert_int_equal(cpu->exc_error, 0);
        assert_int_equal(far_indirect(g, call, 4, 0xfff, SEL_FREE), -1);
        guest_system(g, GUEST_LONG);
        cpu->amd = true;
        guest_put(g, 0x151004, SEL_KCODE, 2);
        cpu->s.gpr[RAX] = 0x151000;
        assert_int_equal(far_indirect(g, call, 8, 0x151000 | (uint64_t)SEL_KCODE << 32, 0x5555),
                         -1);
        assert_int_equal(cpu->next_rip, 0x151000);
        cpu->amd = false;

        guest_system(g, GUEST_REAL);
        const char *bytes = call ? "\x9a\x34\x12\x00\x30" : "\xea\x34\x12\x00\x30";
        assert_int_equal(run_bytes(g, call ? x86_insn_call_far : x86_insn_jmp_far, bytes, 5), -1);
        assert_int_equal(cpu->s.seg[SEG_CS].base, 0x30000);
        assert_int_equal(cpu->next_rip, 0x1234);
        assert_int_equal(cpu->code_base, 0x30000);
        if (call)
            assert_int_equal(guest_get(g, 0x20ffc, 4), 0x20000000 + 0x345 + 5);
    }
}

static void put_call_gate(struct guest *g, unsigned selector, uint64_t offset, unsigned type,
                          unsigned dpl, unsigned count, bool present)
{
    guest_gdt(g, SEL_FREE,
              (offset & 0xffff) | (uint64_t)selector << 16 | (uint64_t)count << 32 |
                  (uint64_t)type << 40 | (uint64_t)dpl << 45 | (uint64_t)present << 47 |
                  (offset >> 16 & 0xffff) << 48);
    guest_gdt(g, SEL_FREE + 8, offset >> 32);
}

static void call_gates(void **state)
{
    struct guest *g = *state;
    struct x86_cpu *cpu = &g->cpu;

    /* Long mode: to the kernel on the stack of the TSS, and back by a far return. */
    guest_system(g, GUEST_LONG);
    put_call_gate(g, SEL_KCODE, 0xffffffff80001000, 12, 3, 0, true);
    guest_enter_user(g, true);
    assert_int_equal(far_indirect(g, false, 4, 0, SEL_FREE | 3), X86_GP);
    assert_int_equal(cpu->exc_error, SEL_KCODE);
    assert_int_equal(far_indirect(g, true, 4, 0, SEL_FREE | 3), -1);
    assert_true(cpu->next_rip == 0xffffffff80001000);
    assert_int_equal(cpu->cpl, 0);
    assert_int_equal(cpu->s.gpr[RSP], KERNEL_STACK - 0x1000 - 32);
    assert_int_equal(guest_get(g, cpu->s.gpr[RSP], 8), USER_CODE + 2);
    assert_int_equal(guest_get(g, cpu->s.gpr[RSP] + 8, 8), SEL_UCODE64 | 3);
    assert_int_equal(guest_get(g, cpu->s.gpr[RSP] + 16, 8), USER_STACK);
    assert_int_equal(guest_get(g, cpu->s.gpr[RSP] + 24, 8), SEL_UDATA | 3);
    assert_int_equal(run_bytes(g, x86_insn_ret_far, "\x48\xcb", 2), -1);
    assert_int_equal(cpu->cpl, 3);
    assert_int_equal(cpu->next_rip, USER_CODE + 2);
    assert_int_equal(cpu->s.gpr[RSP], USER_STACK);

    static const struct {
        unsigned selector, type, dpl;
        bool present;
        uint8_t vector;
        uint16_t error;
    } cases[] = {
        {SEL_KCODE, 12, 2, true, X86_GP, SEL_FREE},
        {SEL_KCODE, 12, 3, false, X86_NP, SEL_FREE},
        {SEL_KCODE, 4, 3, true, X86_GP, SEL_FREE},
        {0, 12, 3, true, X86_GP, 0},
        {SEL_KDATA, 12, 3, true, X86_GP, SEL_KDATA},
        {SEL_KCODE_OTHER, 12, 3, true, X86_GP, SEL_KCODE_OTHER},
        {SEL_ABSENT_CODE, 12, 3, true, X86_NP, SEL_ABSENT_CODE},
        {SEL_KCODE, 5, 3, true, X86_GP, SEL_FREE},
    };
    for (unsigned i = 0; i < ARRAY_SIZE(cases); i++) {
        guest_system(g, GUEST_LONG);
        put_call_gate(g, cases[i].selector, 0x151000, cases[i].type, cases[i].dpl, 0,
                      cases[i].present);
        guest_enter_user(g, true);
        assert_int_equal(far_indirect(g, true, 4, 0, SEL_FREE | 3), cases[i].vector);
        assert_int_equal(cpu->exc_error, cases[i].error);
    }

    /* 32-bit with parameters: they are copied, and RET n drops them on both stacks. */
    guest_system(g, GUEST_32);
    put_call_gate(g, SEL_KCODE, 0x151000, 12, 3, 3, true);
    guest_enter_user(g, false);
    FRAME(g, 4, 0x111, 0x222, 0x333);
    char call[] = {'\x9a', 0, 0, 0, 0, (char)(SEL_FREE | 3), 0};
    assert_int_equal(run_bytes(g, x86_insn_call_far, call, 7), -1);
    uint64_t sp = cpu->s.gpr[RSP];
    assert_int_equal(sp, KERNEL_STACK - 0x1000 - 28);
    const uint32_t want[] = {USER_CODE + 7, SEL_UCODE32 | 3, 0x111,        0x222,
                             0x333,         USER_STACK,      SEL_UDATA | 3};
    assert_memory_equal(guest_ram(g, sp), want, sizeof(want));
    assert_int_equal(run_bytes(g, x86_insn_ret_far, "\xca\x0c\x00", 3), -1);
    assert_int_equal(cpu->s.gpr[RSP], USER_STACK + 12);
    assert_int_equal(cpu->cpl, 3);
}

static void far_returns(void **state)
{
    struct guest *g = *state;
    struct x86_cpu *cpu = &g->cpu;
    static const struct {
        unsigned cs, ss;
        uint8_t vector;
        uint16_t error;
    } cases[] = {
        {0, SEL_UDATA | 3, X86_GP, 0},
        {SEL_KDATA, SEL_KDATA, X86_GP, SEL_KDATA},
        {SEL_UCODE64, SEL_KDATA, X86_GP, SEL_UCODE64},
        {SEL_KCODE | 3, SEL_UDATA | 3, X86_GP, SEL_KCODE},
        {SEL_ABSENT_CODE, SEL_KDATA, X86_NP, SEL_ABSENT_CODE},
        {SEL_UCODE64 | 3, SEL_KDATA | 3, X86_GP, SEL_KDATA},
        {SEL_UCODE64 | 3, 0, X86_GP, 0},
    };

    for (unsigned i = 0; i < ARRAY_SIZE(cases); i++) {
        guest_system(g, GUEST_LONG);
        FRAME(g, 8, 0x201000, cases[i].cs, USER_STACK, cases[i].ss);
        assert_int_equal(run_bytes(g, x86_insn_ret_far, "\x48\xcb", 2), cases[i].vector);
        assert_int_equal(cpu->exc_error, cases[i].error);
    }
    /* A user cannot return inward. */
    guest_system(g, GUEST_LONG);
    guest_enter_user(g, true);
    FRAME(g, 8, 0x151000, SEL_KCODE);
    assert_int_equal(run_bytes(g, x86_insn_ret_far, "\x48\xcb", 2), X86_GP);
    assert_int_equal(cpu->exc_error, SEL_KCODE);
    /* Same level, 32-bit frame, with release. */
    guest_system(g, GUEST_LONG);
    FRAME(g, 4, 0x151000, SEL_KCODE_OTHER);
    assert_int_equal(run_bytes(g, x86_insn_ret_far, "\xca\x10\x00", 3), -1);
    assert_int_equal(cpu->s.gpr[RSP], KERNEL_STACK + 8 + 16);
    assert_int_equal(cpu->code_size, 4);
    guest_system(g, GUEST_REAL);
    FRAME(g, 2, 0x1234, 0x4000);
    assert_int_equal(run_bytes(g, x86_insn_ret_far, "\xcb", 1), -1);
    assert_int_equal(cpu->s.seg[SEG_CS].base, 0x40000);
    assert_int_equal(cpu->next_rip, 0x1234);
}

/* ---- segment registers ---- */

static int load(struct guest *g, unsigned seg, unsigned selector)
{
    return RAISED(g, x86_load_segment(&g->cpu, seg, (uint16_t)selector));
}

static void segment_loads(void **state)
{
    struct guest *g = *state;
    struct x86_cpu *cpu = &g->cpu;

    guest_system(g, GUEST_32);
    uint64_t base = 0x12345678;
    guest_gdt(g, SEL_FREE, guest_desc((uint32_t)base, 0x54321, 0x40f2));
    assert_int_equal(load(g, SEG_ES, SEL_FREE | 3), -1);
    assert_int_equal(cpu->s.seg[SEG_ES].base, base);
    assert_int_equal(cpu->s.seg[SEG_ES].limit, 0x54321);
    assert_int_equal(cpu->s.seg[SEG_ES].attr, 0x40f3);
    assert_int_equal(cpu->s.seg[SEG_ES].selector, SEL_FREE | 3);
    /* The table has the accessed bit now. */
    assert_int_equal(guest_get(g, GUEST_GDT + SEL_FREE + 5, 1), 0xf3);
    assert_false(cpu->flat);

    static const struct {
        unsigned cpl, selector, attr;
        int data, stack; /* vector for ES and for SS; -1: fine */
    } cases[] = {
        {0, SEL_FREE, 0x4092, -1, -1},             /* writable data */
        {0, SEL_FREE, 0x4090, -1, X86_GP},         /* read-only data */
        {0, SEL_FREE, 0x4096, -1, -1},             /* expand-down */
        {0, SEL_FREE, 0x409a, -1, X86_GP},         /* readable code */
        {0, SEL_FREE, 0x4098, X86_GP, X86_GP},     /* execute-only code */
        {0, SEL_FREE, 0x0089, X86_GP, X86_GP},     /* system */
        {0, SEL_FREE, 0x4012, X86_NP, X86_SS},     /* not present */
        {0, SEL_FREE | 3, 0x4092, X86_GP, X86_GP}, /* RPL 3 on DPL 0 */
        {0, SEL_FREE | 3, 0x40f2, -1, X86_GP},
        {0, SEL_FREE, 0x40f2, -1, X86_GP},
        {3, SEL_FREE | 3, 0x40f2, -1, -1},
        {3, SEL_FREE, 0x40f2, -1, X86_GP}, /* SS wants RPL = CPL */
        {3, SEL_FREE, 0x4092, X86_GP, X86_GP},
        {3, SEL_FREE | 3, 0x409e, -1, X86_GP}, /* conforming code asks nobody */
        {3, SEL_FREE | 3, 0x409a, X86_GP, X86_GP},
    };
    for (unsigned i = 0; i < ARRAY_SIZE(cases); i++) {
        for (unsigned stack = 0; stack < 2; stack++) {
            guest_system(g, GUEST_32);
            guest_gdt(g, SEL_FREE, guest_desc(0, 0xffff, cases[i].attr));
            if (cases[i].cpl)
                guest_enter_user(g, false);
            struct x86_state before = cpu->s;
            int vector = load(g, stack ? SEG_SS : SEG_ES, cases[i].selector);
            assert_int_equal(vector, stack ? cases[i].stack : cases[i].data);
            if (vector >= 0) {
                assert_int_equal(cpu->exc_error, SEL_FREE);
                assert_memory_equal(&cpu->s, &before, sizeof(before));
            }
        }
    }

    /* Null: data registers always, SS only in 64-bit mode below CPL 3 with its own RPL. */
    guest_system(g, GUEST_32);
    assert_int_equal(load(g, SEG_DS, 3), -1);
    assert_int_equal(cpu->s.seg[SEG_DS].selector, 3);
    assert_int_equal(RAISED(g, x86_seg_linear(cpu, SEG_DS, 0, 1, false)), X86_GP);
    assert_int_equal(load(g, SEG_SS, 0), X86_GP);
    assert_int_equal(cpu->exc_error, 0);
    assert_int_equal(load(g, SEG_ES, 0x1000), X86_GP);
    assert_int_equal(cpu->exc_error, 0x1000);
    guest_system(g, GUEST_LONG);
    assert_int_equal(load(g, SEG_SS, 1), X86_GP);
    assert_int_equal(load(g, SEG_SS, 0), -1);
    assert_int_equal(cpu->cpl, 0);
    guest_enter_user(g, true);
    assert_int_equal(load(g, SEG_SS, 3), X86_GP);

    /* From the LDT. */
    guest_system(g, GUEST_32);
    assert_int_equal(load(g, SEG_ES, 4), X86_GP);
    assert_int_equal(cpu->exc_error, 4);
    guest_gdt(g, SEL_LDT, guest_desc(GUEST_LDT, 0xf, 0x82));
    assert_int_equal(RAISED(g, x86_load_ldt(cpu, SEL_LDT)), -1);
    guest_put(g, GUEST_LDT + 8, guest_desc(0x4000, 0xfff, 0x40f2), 8);
    assert_int_equal(load(g, SEG_ES, 0xf), -1);
    assert_int_equal(cpu->s.seg[SEG_ES].base, 0x4000);
    assert_int_equal(load(g, SEG_ES, 0x17), X86_GP);
    assert_int_equal(cpu->exc_error, 0x14);

    /* Real mode: the base alone. */
    guest_system(g, GUEST_REAL);
    cpu->s.seg[SEG_DS].limit = UINT32_MAX;
    assert_int_equal(load(g, SEG_DS, 0xabcd), -1);
    assert_int_equal(cpu->s.seg[SEG_DS].base, 0xabcd0);
    assert_int_equal(cpu->s.seg[SEG_DS].limit, UINT32_MAX);
}

static void system_segments(void **state)
{
    struct guest *g = *state;
    struct x86_cpu *cpu = &g->cpu;

    guest_system(g, GUEST_LONG);
    guest_gdt(g, SEL_TSS, guest_desc(0x84000, 0x67, 0x89));
    guest_gdt(g, SEL_TSS + 8, 0xffff8000);
    assert_int_equal(RAISED(g, x86_load_task_register(cpu, SEL_TSS)), -1);
    assert_true(cpu->s.tr.base == 0xffff800000084000);
    assert_int_equal(cpu->s.tr.limit, 0x67);
    assert_int_equal(cpu->s.tr.attr, 0x8b);
    assert_int_equal(guest_get(g, GUEST_GDT + SEL_TSS + 5, 1), 0x8b);
    /* Busy now. */
    assert_int_equal(RAISED(g, x86_load_task_register(cpu, SEL_TSS)), X86_GP);
    assert_int_equal(cpu->exc_error, SEL_TSS);
    guest_gdt(g, SEL_TSS, guest_desc(0x84000, 0x67, 0x09));
    assert_int_equal(RAISED(g, x86_load_task_register(cpu, SEL_TSS)), X86_NP);
    guest_gdt(g, SEL_TSS, guest_desc(0x84000, 0x67, 0x89));
    guest_gdt(g, SEL_TSS + 8, 0x8000);
    assert_int_equal(RAISED(g, x86_load_task_register(cpu, SEL_TSS)), X86_GP);
    guest_gdt(g, SEL_TSS + 8, 0x1f0000000000);
    assert_int_equal(RAISED(g, x86_load_task_register(cpu, SEL_TSS)), X86_GP);
    assert_int_equal(RAISED(g, x86_load_task_register(cpu, 0)), X86_GP);
    assert_int_equal(cpu->exc_error, 0);
    assert_int_equal(RAISED(g, x86_load_task_register(cpu, SEL_TSS | 4)), X86_GP);
    guest_gdt(g, SEL_TSS, guest_desc(0x84000, 0x67, 0x81));
    assert_int_equal(RAISED(g, x86_load_task_register(cpu, SEL_TSS)), X86_GP);

    assert_int_equal(RAISED(g, x86_load_ldt(cpu, 3)), -1);
    assert_true(cpu->s.ldtr.attr & SEG_UNUSABLE);
    assert_int_equal(RAISED(g, x86_load_ldt(cpu, SEL_KDATA)), X86_GP);
    guest_gdt(g, SEL_LDT, guest_desc(GUEST_LDT, 0xf, 0x02));
    guest_gdt(g, SEL_LDT + 8, 0);
    assert_int_equal(RAISED(g, x86_load_ldt(cpu, SEL_LDT)), X86_NP);
    assert_int_equal(cpu->exc_error, SEL_LDT);
    /* The second half must be in the table as well. */
    guest_gdt(g, SEL_LDT, guest_desc(GUEST_LDT, 0xf, 0x82));
    cpu->s.gdt.limit = SEL_LDT + 7;
    assert_int_equal(RAISED(g, x86_load_ldt(cpu, SEL_LDT)), X86_GP);
}

static void limits(void **state)
{
    struct guest *g = *state;
    struct x86_cpu *cpu = &g->cpu;
    struct x86_seg up = {.limit = 0xfff, .attr = 0x4093}, down = {.limit = 0xfff, .attr = 0x4097},
                   down16 = {.limit = 0xfff, .attr = 0x0097};

    assert_true(x86_in_limit(&up, 0xffc, 4));
    assert_false(x86_in_limit(&up, 0xffd, 4));
    assert_false(x86_in_limit(&up, 0x1000, 1));
    assert_false(x86_in_limit(&up, UINT32_MAX, 2));
    assert_false(x86_in_limit(&down, 0xfff, 1));
    assert_true(x86_in_limit(&down, 0x1000, 4));
    assert_true(x86_in_limit(&down, 0xfffffffc, 4));
    assert_false(x86_in_limit(&down, 0xfffffffd, 4));
    assert_true(x86_in_limit(&down16, 0xfffc, 4));
    assert_false(x86_in_limit(&down16, 0xfffd, 4));

    guest_system(g, GUEST_32);
    cpu->s.seg[SEG_FS] = (struct x86_seg){.base = 0xfffff000, .limit = 0x1fff, .attr = 0x40f1};
    assert_int_equal(x86_seg_linear(cpu, SEG_FS, 0x1004, 4, false), 4);
    assert_int_equal(RAISED(g, x86_seg_linear(cpu, SEG_FS, 0, 1, true)), X86_GP);
    assert_int_equal(RAISED(g, x86_seg_linear(cpu, SEG_FS, 0x1ffd, 4, false)), X86_GP);
    /* Code: never written, read only if it says so; the stack faults by its own name. */
    assert_int_equal(RAISED(g, x86_seg_linear(cpu, SEG_CS, 0, 1, true)), X86_GP);
    assert_int_equal(RAISED(g, x86_seg_linear(cpu, SEG_CS, 0, 1, false)), -1);
    cpu->s.seg[SEG_CS].attr &= ~2u;
    x86_update_mode(cpu);
    assert_int_equal(RAISED(g, x86_seg_linear(cpu, SEG_CS, 0, 1, false)), X86_GP);
    cpu->s.seg[SEG_SS].limit = 0xfff;
    x86_update_mode(cpu);
    assert_int_equal(RAISED(g, x86_seg_linear(cpu, SEG_SS, 0xffd, 4, true)), X86_SS);
    assert_int_equal(cpu->exc_error, 0);
    assert_int_equal(RAISED(g, x86_push(cpu, 1, 4)), X86_SS);
    /* In 64-bit mode only FS and GS have a base, and nothing has a limit. */
    guest_system(g, GUEST_LONG);
    cpu->s.seg[SEG_DS] = (struct x86_seg){.base = 0x1000, .attr = SEG_UNUSABLE};
    cpu->s.seg[SEG_GS] = (struct x86_seg){.base = 0x7f0000001000, .attr = SEG_UNUSABLE};
    assert_int_equal(x86_seg_linear(cpu, SEG_DS, 5, 8, true), 5);
    assert_int_equal(x86_seg_linear(cpu, SEG_GS, -8ull, 8, true), 0x7f0000000ff8);
}

static void pushes_and_pops(void **state)
{
    struct guest *g = *state;
    struct x86_cpu *cpu = &g->cpu;

    guest_system(g, GUEST_LONG);
    x86_push(cpu, 0x1122334455667788, 8);
    x86_push(cpu, 0xaabb, 2);
    assert_int_equal(cpu->s.gpr[RSP], KERNEL_STACK - 10);
    assert_int_equal(x86_pop(cpu, 2), 0xaabb);
    assert_true(x86_pop(cpu, 8) == 0x1122334455667788);
    cpu->s.gpr[RSP] = 0x800000000008;
    assert_int_equal(RAISED(g, x86_push(cpu, 1, 8)), X86_SS);
    assert_int_equal(RAISED(g, x86_pop(cpu, 8)), X86_SS);
    cpu->s.gpr[RSP] = MIB(4);
    assert_int_equal(RAISED(g, x86_pop(cpu, 8)), X86_PF);
    assert_int_equal(cpu->s.gpr[RSP], MIB(4));
    /* A 16-bit stack pointer wraps, and the upper bits stay. */
    guest_system(g, GUEST_REAL);
    cpu->s.gpr[RSP] = 0xabc0000;
    x86_push(cpu, 0x1234, 2);
    assert_int_equal(cpu->s.gpr[RSP], 0xabcfffe);
    assert_int_equal(guest_get(g, 0x2fffe, 2), 0x1234);
    assert_int_equal(x86_pop(cpu, 2), 0x1234);
    assert_int_equal(cpu->s.gpr[RSP], 0xabc0000);
}

static void effective_addresses(void **state)
{
    struct guest *g = *state;
    struct x86_cpu *cpu = &g->cpu;

    guest_system(g, GUEST_LONG);
    cpu->s.gpr[RBX] = 0xffffffff00000010;
    cpu->s.gpr[RCX] = 0x100;
    struct x86_insn insn = guest_insn(g, "\x8b\x44\xcb\xf0", 4); /* mov -16(%rbx,%rcx,8),%eax */
    assert_true(x86_effective(cpu, &insn) == 0xffffffff00000800);
    insn = guest_insn(g, "\x67\x8b\x44\xcb\xf0", 5);
    assert_int_equal(x86_effective(cpu, &insn), 0x800);
    insn = guest_insn(g, "\x8b\x05\x00\x01\x00\x00", 6); /* mov 0x100(%rip),%eax */
    assert_int_equal(x86_effective(cpu, &insn), 0x150106);
    cpu->s.seg[SEG_FS].base = 0x7f0000000000;
    insn = guest_insn(g, "\x64\x48\x8b\x04\x25\xf8\xff\xff\xff", 9); /* mov %fs:-8,%rax */
    assert_int_equal(x86_linear(cpu, &insn, 8, false), 0x7efffffffff8);
    guest_system(g, GUEST_REAL);
    cpu->s.gpr[RBX] = 0xfff0;
    cpu->s.gpr[RSI] = 0x20;
    insn = guest_insn(g, "\x8b\x00", 2); /* mov (%bx,%si),%ax */
    assert_int_equal(x86_linear(cpu, &insn, 2, false), 0x20010);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, guest_setup, guest_teardown)
    const struct CMUnitTest tests[] = {
        TEST(iret_to_user),
        TEST(iret_in_kernel),
        TEST(iret_checks),
        TEST(iret_flags_by_privilege),
        TEST(iret_in_protected_mode),
        TEST(syscall_and_back),
        TEST(sysenter_and_back),
        TEST(far_direct),
        TEST(call_gates),
        TEST(far_returns),
        TEST(segment_loads),
        TEST(system_segments),
        TEST(limits),
        TEST(pushes_and_pops),
        TEST(effective_addresses),
    };
    return cmocka_run_group_tests_name("transfer", tests, NULL, NULL);
}
