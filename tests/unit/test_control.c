/*
 * Control and debug registers, XCR0, EFER and the other model-specific registers: what may be written, in which mode,
 * and what it changes. KVM's clock.
 */
#include "x86_guest.h"

#include <errno.h>
#include <string.h>

#include "base/clock.h"
#include "isa/x86/cpuid.h"
#include "isa/x86/kvmclock.h"
#include "isa/x86/msr.h"
#include "isa/x86/system.h"
#include "isa/x86/xsave.h"

enum { EFER = 0xc0000080u, MSR_TSC = 0x10, TSC_ADJUST = 0x3b, KVM_WALL = 0x4b564d00, KVM_TIME = 0x4b564d01 };

#define RUN RUN_SYSTEM

static int setup(void **state)
{
    struct guest *g;

    if (guest_setup(state) != 0)
        return -1;
    g = *state;
    g->cpu.model = x86_cpu_model_find("x86-64-v3");
    g->cpu.amd = g->cpu.model->leaves[0].ebx == 0x68747541;
    return 0;
}

/* MOV CRn, RAX with the value, in the mode in force. */
static int set_cr(struct guest *g, unsigned n, uint64_t value)
{
    char bytes[] = { 0x0f, 0x22, (char)(0xc0 | n << 3) };

    g->cpu.s.gpr[RAX] = value;
    return guest_run_system(g, bytes, sizeof(bytes));
}

static int set_msr(struct guest *g, uint32_t msr, uint64_t value)
{
    return x86_msr_write(&g->cpu, msr, value);
}

static uint64_t get_msr(struct guest *g, uint32_t msr)
{
    uint64_t v = ~0ull;

    assert_int_equal(x86_msr_read(&g->cpu, msr, &v), 0);
    return v;
}

static void cr0_legality(void **state)
{
    struct guest *g = *state;
    struct x86_state *s = &g->cpu.s;

    assert_int_equal(set_cr(g, 0, CR0_PG), X86_GP);             /* paging without protection */
    assert_int_equal(set_cr(g, 0, CR0_PE | CR0_NW), X86_GP);    /* NW without CD */
    assert_int_equal(s->cr0, CR0_PE | CR0_ET | CR0_NE | CR0_WP);
    assert_int_equal(set_cr(g, 0, CR0_PE | CR0_NW | CR0_CD), -1);
    assert_int_equal(s->cr0, CR0_PE | CR0_NW | CR0_CD | CR0_ET);
    assert_int_equal(set_cr(g, 0, CR0_PE | 0x1ffaffc0), -1);    /* reserved bits of the lower half are dropped */
    assert_int_equal(s->cr0, CR0_PE | CR0_ET);
    assert_int_equal(set_cr(g, 0, 0), -1);                      /* back to real mode */
    assert_int_equal(s->cr0, CR0_ET);
    assert_int_equal(g->cpu.cpl, 0);

    guest_system(g, GUEST_LONG);
    assert_int_equal(set_cr(g, 0, s->cr0 | 1ull << 32), X86_GP);
    assert_int_equal(set_cr(g, 0, s->cr0 & ~CR0_PG), X86_GP);   /* not from 64-bit code */
    guest_enter_user(g, true);
    assert_int_equal(set_cr(g, 0, s->cr0), X86_GP);
    assert_int_equal(RUN(g, "\x0f\x20\xc0"), X86_GP);
    assert_int_equal(RUN(g, "\x0f\x06"), X86_GP);
}

static void into_long_mode_and_out(void **state)
{
    struct guest *g = *state;
    struct x86_state *s = &g->cpu.s;

    memset(guest_ram(g, GUEST_ROOT), 0, 0x1000);
    assert_int_equal(set_msr(g, EFER, EFER_LME), 0);
    assert_int_equal(set_cr(g, 0, s->cr0 | CR0_PG), X86_GP);    /* without PAE */
    assert_int_equal(set_cr(g, 4, CR4_PAE), -1);
    s->seg[SEG_CS].attr = (s->seg[SEG_CS].attr & ~SEG_DB) | SEG_L;
    assert_int_equal(set_cr(g, 0, s->cr0 | CR0_PG), X86_GP);    /* with CS.L set already */
    s->seg[SEG_CS].attr = (s->seg[SEG_CS].attr & ~SEG_L) | SEG_DB;
    assert_int_equal(set_cr(g, 0, s->cr0 | CR0_PG), -1);
    assert_int_equal(s->efer, EFER_LME | EFER_LMA);
    assert_true(g->cpu.long_mode);
    assert_int_equal(g->cpu.code_size, 4);

    assert_int_equal(set_cr(g, 4, 0), X86_GP);                  /* PAE must stay */
    assert_int_equal(set_msr(g, EFER, 0), -EINVAL);             /* and LME */
    assert_int_equal(set_msr(g, EFER, EFER_LME | EFER_SCE), 0); /* LMA is the processor's own */
    assert_int_equal(s->efer, EFER_LME | EFER_LMA | EFER_SCE);
    assert_int_equal(set_msr(g, EFER, EFER_LME | 1ull << 12), -EINVAL);

    assert_int_equal(set_cr(g, 4, CR4_PAE | CR4_PCIDE), -1);
    assert_int_equal(set_cr(g, 0, s->cr0 & ~CR0_PG), X86_GP);   /* PCIDs need long mode */
    assert_int_equal(set_cr(g, 4, CR4_PAE), -1);
    assert_int_equal(set_cr(g, 0, s->cr0 & ~CR0_PG), -1);
    assert_int_equal(s->efer, EFER_LME | EFER_SCE);
    assert_false(g->cpu.long_mode);
}

static void cr4_legality(void **state)
{
    struct guest *g = *state;
    struct x86_state *s = &g->cpu.s;

    assert_int_equal(set_cr(g, 4, CR4_PCIDE), X86_GP);          /* outside long mode */
    assert_int_equal(set_cr(g, 4, CR4_VME), X86_GP);
    assert_int_equal(set_cr(g, 4, CR4_LA57), X86_GP);
    assert_int_equal(set_cr(g, 4, CR4_PKE), X86_GP);
    assert_int_equal(set_cr(g, 4, 1u << 13), X86_GP);           /* VMXE */
    assert_int_equal(set_cr(g, 4, 1u << 23), X86_GP);           /* CET */

    guest_system(g, GUEST_LONG);
    s->cr3 |= 5;
    assert_int_equal(set_cr(g, 4, s->cr4 | CR4_PCIDE), X86_GP); /* with a PCID in CR3 */
    s->cr3 &= ~0xfffull;
    assert_int_equal(set_cr(g, 4, s->cr4 | CR4_PCIDE | CR4_SMEP | CR4_SMAP | CR4_UMIP | CR4_FSGSBASE | CR4_OSXSAVE), -1);
    assert_int_equal(set_cr(g, 4, s->cr4 | 1ull << 32), X86_GP);
    assert_int_equal(RUN(g, "\x0f\x20\xe0"), -1);
    assert_int_equal(s->gpr[RAX], s->cr4);
}

static void cr3_and_pcids(void **state)
{
    struct guest *g = *state;
    struct x86_state *s = &g->cpu.s;
    uint64_t root;

    guest_system(g, GUEST_LONG);
    root = s->cr3;
    assert_int_equal(set_cr(g, 3, 1ull << g->cpu.phys_bits), X86_GP);
    assert_int_equal(set_cr(g, 3, root | 1ull << 63), X86_GP);  /* only with PCIDs */
    assert_int_equal(set_cr(g, 3, root | 0x18), -1);
    assert_int_equal(s->cr3, root | 0x18);
    s->cr3 = root;
    assert_int_equal(set_cr(g, 4, s->cr4 | CR4_PCIDE), -1);

    /* A changed mapping shows after a flushing load. (One that says "keep" need not keep.) */
    guest_put(g, 0x120000, 1, 4);
    guest_put(g, 0x320000, 2, 4);
    assert_int_equal(x86_read32(&g->cpu, 0x120000), 1);
    uint64_t *entry = guest_entry(g, 0, 2, PTE_W | PTE_U), old = *entry;
    *entry = old + MIB(2);
    assert_int_equal(set_cr(g, 3, root | 1ull << 63), -1);
    assert_int_equal(s->cr3, root);
    assert_int_equal(set_cr(g, 3, root), -1);
    assert_int_equal(x86_read32(&g->cpu, 0x120000), 2);

    /* INVLPG and INVPCID do it, too. */
    *entry = old;
    s->gpr[RBX] = 0x120000;
    assert_int_equal(RUN(g, "\x0f\x01\x3b"), -1);
    assert_int_equal(x86_read32(&g->cpu, 0x120000), 1);
    *entry = old + MIB(2);
    s->gpr[RBX] = 0x130000;
    guest_put(g, 0x330000, 0, 8);
    guest_put(g, 0x330008, 0x120000, 8);
    guest_put(g, 0x130000, 0, 8);
    guest_put(g, 0x130008, 0x120000, 8);
    s->gpr[RAX] = 0;
    assert_int_equal(RUN(g, "\x66\x0f\x38\x82\x03"), -1);
    assert_int_equal(x86_read32(&g->cpu, 0x120000), 2);

    s->gpr[RAX] = 4;
    assert_int_equal(RUN(g, "\x66\x0f\x38\x82\x03"), X86_GP);
    s->gpr[RAX] = 0;
    guest_put(g, 0x330008, 1ull << 63, 8);
    assert_int_equal(RUN(g, "\x66\x0f\x38\x82\x03"), X86_GP);   /* not canonical */
    guest_put(g, 0x330000, 0x1000, 8);
    s->gpr[RAX] = 1;
    assert_int_equal(RUN(g, "\x66\x0f\x38\x82\x03"), X86_GP);   /* reserved bits */
}

static void cr8_is_the_task_priority(void **state)
{
    struct guest *g = *state;

    guest_system(g, GUEST_LONG);
    g->cpu.s.gpr[RAX] = 9;
    assert_int_equal(RUN(g, "\x44\x0f\x22\xc0"), -1);
    assert_int_equal(lapic_cr8(g->cpu.lapic), 9);
    g->cpu.s.gpr[RAX] = 16;
    assert_int_equal(RUN(g, "\x44\x0f\x22\xc0"), X86_GP);
    assert_int_equal(RUN(g, "\x44\x0f\x20\xc0"), -1);
    assert_int_equal(g->cpu.s.gpr[RAX], 9);
}

static void machine_status_word(void **state)
{
    struct guest *g = *state;
    struct x86_state *s = &g->cpu.s;

    s->cr0 = CR0_ET | CR0_NE;
    x86_update_mode(&g->cpu);
    s->gpr[RAX] = 0xffff;
    assert_int_equal(RUN(g, "\x0f\x01\xf0"), -1);               /* LMSW AX */
    assert_int_equal(s->cr0, CR0_ET | CR0_NE | 0xf);
    s->gpr[RAX] = 0;
    assert_int_equal(RUN(g, "\x0f\x01\xf0"), -1);
    assert_int_equal(s->cr0, CR0_ET | CR0_NE | CR0_PE);         /* PE stays */
    assert_int_equal(RUN(g, "\x0f\x01\xe0"), -1);               /* SMSW EAX */
    assert_int_equal(s->gpr[RAX], s->cr0);
    s->cr0 |= CR0_TS;
    assert_int_equal(RUN(g, "\x0f\x06"), -1);
    assert_int_equal(s->cr0 & CR0_TS, 0);
}

static void debug_registers(void **state)
{
    struct guest *g = *state;
    struct x86_state *s = &g->cpu.s;

    guest_system(g, GUEST_LONG);
    s->dr6 = 0xffff0ff0;
    s->dr7 = 0x400;
    s->gpr[RAX] = 0x123456789abcull;
    assert_int_equal(RUN(g, "\x0f\x23\xd8"), -1);               /* DR3 */
    assert_int_equal(s->dr[3], 0x123456789abcull);
    s->gpr[RAX] = 1ull << 32;
    assert_int_equal(RUN(g, "\x0f\x23\xf0"), X86_GP);           /* DR6 */
    s->gpr[RAX] = 0;
    assert_int_equal(RUN(g, "\x0f\x23\xf0"), -1);
    assert_int_equal(s->dr6, 0xffff0ff0);
    s->gpr[RAX] = 0xffffffff;
    assert_int_equal(RUN(g, "\x0f\x23\xe0"), -1);               /* DR4 is DR6 … */
    assert_int_equal(s->dr6, 0xffffefff);
    s->cr4 |= CR4_DE;
    assert_int_equal(RUN(g, "\x0f\x23\xe0"), X86_UD);           /* … unless debug extensions are on */
    s->gpr[RAX] = 0x2000;
    assert_int_equal(RUN(g, "\x0f\x23\xf8"), -1);               /* DR7: general detect */
    assert_int_equal(s->dr7, 0x2400);
    s->dr6 = 0xffff0ff0;
    assert_int_equal(RUN(g, "\x0f\x21\xc0"), X86_DB);
    assert_int_equal(s->dr6, 0xffff2ff0);
    x86_deliver_exception(&g->cpu);
    assert_int_equal(s->dr7, 0x400);                            /* the handler may look */
    assert_int_equal(RUN(g, "\x0f\x21\xf8"), -1);
    assert_int_equal(s->gpr[RAX], 0x400);
    guest_enter_user(g, true);
    assert_int_equal(RUN(g, "\x0f\x21\xc0"), X86_GP);
}

static void xcr0(void **state)
{
    struct guest *g = *state;
    struct x86_state *s = &g->cpu.s;
    static const struct {
        uint64_t value;
        bool ok;
    } tries[] = { { 1, true }, { 3, true }, { 7, true }, { 0, false }, { 2, false }, { 5, false }, { 0xe7, false },
                  { 9, false }, { 0x207, false }, { 1ull << 63 | 1, false } };

    guest_system(g, GUEST_LONG);
    s->gpr[RCX] = 0;
    assert_int_equal(RUN(g, "\x0f\x01\xd1"), X86_UD);
    assert_int_equal(RUN(g, "\x0f\x01\xd0"), X86_UD);
    s->cr4 |= CR4_OSXSAVE;
    for (unsigned i = 0; i < ARRAY_SIZE(tries); i++) {
        s->gpr[RAX] = (uint32_t)tries[i].value;
        s->gpr[RDX] = tries[i].value >> 32;
        assert_int_equal(RUN(g, "\x0f\x01\xd1"), tries[i].ok ? -1 : X86_GP);
    }
    assert_int_equal(s->xcr0, 7);
    s->gpr[RAX] = s->gpr[RDX] = ~0ull;
    assert_int_equal(RUN(g, "\x0f\x01\xd0"), -1);
    assert_int_equal(s->gpr[RAX], 7);
    assert_int_equal(s->gpr[RDX], 0);
    s->gpr[RCX] = 1;
    assert_int_equal(RUN(g, "\x0f\x01\xd1"), X86_GP);
    s->gpr[RCX] = 0;
    guest_enter_user(g, true);
    s->gpr[RAX] = 3;
    assert_int_equal(RUN(g, "\x0f\x01\xd1"), X86_GP);
    assert_true(x86_xcr0_consistent(0xe7));
    assert_false(x86_xcr0_consistent(0x67));
    assert_false(x86_xcr0_consistent(0xe3));
}

static void plain_msrs(void **state)
{
    static const struct {
        uint32_t msr;
        uint64_t good, bad;     /* bad 0: takes everything */
    } list[] = {
        { 0x174, 0x10, 1ull << 32 }, { 0x175, 0xffff800000000000, 0x0000800000000000 }, { 0x176, 5, 1ull << 63 },
        { 0xc0000081, 0x123456789abcdef0, 0 }, { 0xc0000082, 0xffffffff81000000, 0x8000000000000000 },
        { 0xc0000083, 0x7fffffffffff, 0x800000000000 }, { 0xc0000084, 0x47700, 1ull << 32 },
        { 0xc0000100, 0x7fff12345678, 0x1234567812345678 }, { 0xc0000101, 0xffff888000000000, 1ull << 48 },
        { 0xc0000102, 1, 1ull << 47 }, { 0xc0000103, 0xffffffff, 1ull << 32 },
        { 0x277, 0x0407010600070406, 0x0407010600070402 }, { 0x2ff, 0xc06, 0xc02 }, { 0x250, 0x0606060606060606, 2 },
        { 0x26f, 0x0505050505050505, 0x0700000000000000 }, { 0x200, 0x100006, 0x100002 }, { 0x20f, 0xfff800, 1 },
        { 0xda0, 0, 1 }, { 0x179, 0, 0 },
    };
    struct guest *g = *state;
    uint64_t v;

    for (unsigned i = 0; i < ARRAY_SIZE(list); i++) {
        if (list[i].msr != 0x179)
            assert_int_equal(set_msr(g, list[i].msr, list[i].good), 0);
        if (list[i].bad)
            assert_int_equal(set_msr(g, list[i].msr, list[i].bad), -EINVAL);
        assert_int_equal(get_msr(g, list[i].msr), list[i].good);
    }
    assert_int_equal(get_msr(g, 0xfe) & 0xff, 8);       /* as many variable ranges as there are registers */
    assert_int_equal(x86_msr_read(&g->cpu, 0x210, &v), -EINVAL);
    assert_int_equal(set_msr(g, 0xfe, 0), -EINVAL);
    assert_int_equal(set_msr(g, 0x179, 0), -EINVAL);
    assert_int_equal(x86_msr_read(&g->cpu, 0x12345, &v), -EINVAL);
    assert_int_equal(x86_msr_read(&g->cpu, 0x4b564d03, &v), -EINVAL);
    assert_int_equal(set_msr(g, 0xc0010117, 0), -EINVAL);
    assert_int_equal(get_msr(g, 0x8b), 0);
}

/* No number makes it crash, and what is refused changes nothing. */
static void all_msrs(void **state)
{
    static const uint32_t starts[] = { 0, 0x800, 0xd00, 0x40000000, 0x4b564d00, 0xc0000000, 0xc0010000, 0xc0011000 };
    static const uint64_t values[] = { 0, 1, ~0ull, 1ull << 63, 0x800000000000, 0x0606060606060606 };
    struct guest *g = *state;
    unsigned known = 0;

    for (unsigned i = 0; i < ARRAY_SIZE(starts); i++) {
        for (uint32_t msr = starts[i]; msr < starts[i] + 0x400; msr++) {
            for (unsigned k = 0; k < ARRAY_SIZE(values); k++) {
                struct x86_state before = g->cpu.s;

                if (set_msr(g, msr, values[k]) < 0)
                    assert_memory_equal(&before, &g->cpu.s, sizeof(before));
            }
            uint64_t v;
            known += x86_msr_read(&g->cpu, msr, &v) == 0;
        }
    }
    assert_in_range(known, 50, 400);
}

static void rdmsr_and_wrmsr(void **state)
{
    struct guest *g = *state;
    struct x86_state *s = &g->cpu.s;

    guest_system(g, GUEST_LONG);
    s->gpr[RCX] = 0xffffffffc0000082;      /* the upper half of RCX does not count */
    s->gpr[RAX] = 0xdeadbeef81000000;
    s->gpr[RDX] = 0x12345678ffffffff;
    assert_int_equal(RUN(g, "\x0f\x30"), -1);
    assert_int_equal(s->lstar, 0xffffffff81000000);
    s->gpr[RAX] = s->gpr[RDX] = ~0ull;
    assert_int_equal(RUN(g, "\x0f\x32"), -1);
    assert_int_equal(s->gpr[RAX], 0x81000000);
    assert_int_equal(s->gpr[RDX], 0xffffffff);
    s->gpr[RCX] = 0x12345;
    assert_int_equal(RUN(g, "\x0f\x32"), X86_GP);
    assert_int_equal(RUN(g, "\x0f\x30"), X86_GP);
    guest_enter_user(g, true);
    s->gpr[RCX] = 0xc0000082;
    assert_int_equal(RUN(g, "\x0f\x32"), X86_GP);
    assert_int_equal(RUN(g, "\x0f\x30"), X86_GP);
}

static void nx_needs_efer(void **state)
{
    struct guest *g = *state;
    uint32_t error = 0;
    uint64_t size;
    gpa_t gpa;

    guest_system(g, GUEST_LONG);
    guest_map(g, MIB(4), MIB(4), GUEST_PAGE_SIZE, PTE_W | PTE_NX, PTE_W);
    x86_tlb_flush_all(&g->cpu);
    assert_int_equal(x86_walk(&g->cpu, MIB(4), ACCESS_EXEC, VIEW_KERNEL, &gpa, &size, &error), -EFAULT);
    assert_int_equal(error & PF_RESERVED, 0);
    assert_int_equal(set_msr(g, EFER, g->cpu.s.efer & ~EFER_NXE), 0);
    assert_int_equal(x86_walk(&g->cpu, MIB(4), ACCESS_READ, VIEW_KERNEL, &gpa, &size, &error), -EFAULT);
    assert_int_equal(error & PF_RESERVED, PF_RESERVED);
}

static void apic_base(void **state)
{
    struct guest *g = *state;

    assert_int_equal(get_msr(g, 0x1b) & 0xfffff000, 0xfee00000);
    assert_int_equal(g->cpu.apic_base, 0xfee00000);
    assert_int_equal(set_msr(g, 0x1b, 0xfee00d00 | 1ull << 60), -EINVAL);
    assert_int_equal(set_msr(g, 0x1b, get_msr(g, 0x1b) | 0x400), 0);    /* x2APIC: the window is gone */
    assert_int_equal(g->cpu.apic_base, ~0ull);
    assert_int_equal(get_msr(g, 0x802), 0);                             /* APIC id */
    assert_int_equal(set_msr(g, 0x802, 1), -EINVAL);
    assert_int_equal(set_msr(g, 0x808, 0x20), 0);
    assert_int_equal(lapic_cr8(g->cpu.lapic), 2);
}

static void tsc(void **state)
{
    struct guest *g = *state;
    struct x86_cpu *cpu = &g->cpu;
    uint64_t before;

    /* The machine's clock is manual, so the counter stands still with it. */
    cpu->tsc_hz = 2000000000;
    before = x86_guest_tsc(cpu);
    assert_int_equal(x86_guest_tsc(cpu), before);
    pthread_mutex_lock(&g->machine.lock);
    clock_advance(g->machine.clock, 1000);
    pthread_mutex_unlock(&g->machine.lock);
    assert_int_equal(x86_guest_tsc(cpu), before + 2000);

    assert_int_equal(set_msr(g, MSR_TSC, 1000000), 0);
    assert_int_equal(get_msr(g, MSR_TSC), 1000000);
    assert_int_equal(get_msr(g, TSC_ADJUST), 1000000 - (before + 2000));
    assert_int_equal(set_msr(g, TSC_ADJUST, get_msr(g, TSC_ADJUST) + 5), 0);
    assert_int_equal(get_msr(g, MSR_TSC), 1000005);

    guest_system(g, GUEST_LONG);
    assert_int_equal(RUN(g, "\x0f\x31"), -1);
    assert_int_equal(cpu->s.gpr[RAX] | cpu->s.gpr[RDX] << 32, 1000005);
    cpu->s.tsc_aux = 0x1234;
    assert_int_equal(RUN(g, "\x0f\x01\xf9"), -1);
    assert_int_equal(cpu->s.gpr[RCX], 0x1234);
    assert_int_equal(RUN(g, "\xf3\x0f\xc7\xfb"), -1);       /* RDPID RBX */
    assert_int_equal(cpu->s.gpr[RBX], 0x1234);
    guest_enter_user(g, true);
    assert_int_equal(RUN(g, "\x0f\x31"), -1);
    cpu->s.cr4 |= CR4_TSD;
    assert_int_equal(RUN(g, "\x0f\x31"), X86_GP);
    assert_int_equal(RUN(g, "\x0f\x01\xf9"), X86_GP);
    assert_int_equal(RUN(g, "\x0f\x33"), X86_GP);
}

/* What a guest makes of the page: Linux' __pvclock_read_cycles(). */
static uint64_t guest_ns(struct guest *g, gpa_t page)
{
    uint64_t delta = x86_guest_tsc(&g->cpu) - guest_get(g, page + 8, 8);
    int8_t shift = (int8_t)guest_get(g, page + 28, 1);

    delta = shift < 0 ? delta >> -shift : delta << shift;
    return guest_get(g, page + 16, 8) + (uint64_t)((unsigned __int128)delta * guest_get(g, page + 24, 4) >> 32);
}

static void advance(struct guest *g, uint64_t ns)
{
    pthread_mutex_lock(&g->machine.lock);
    clock_advance(g->machine.clock, ns);
    pthread_mutex_unlock(&g->machine.lock);
}

static void kvm_clock(void **state)
{
    static const uint64_t rates[] = { 1000000000, 2596122000, 800000000, 4900000000, 24000000 };
    struct guest *g = *state;
    const gpa_t page = 0x12340;

    for (unsigned i = 0; i < ARRAY_SIZE(rates); i++) {
        g->cpu.tsc_hz = rates[i];
        advance(g, 12345678901);
        guest_put(g, page, 7, 4);       /* an odd version */
        assert_int_equal(set_msr(g, KVM_TIME, page | 1), 0);
        assert_int_equal(guest_get(g, page, 4) & 1, 0);
        assert_int_equal(guest_get(g, page + 29, 1), 1);        /* stable */
        advance(g, 3600ull * 1000000000 + 777);
        int64_t difference = (int64_t)(guest_ns(g, page) - clock_now(g->machine.clock));
        int64_t allowed = (int64_t)(clock_now(g->machine.clock) / 1000000000 + 100);    /* 1 ppb */
        if (difference < -allowed || difference > allowed)
            fail_msg("%lld ns off at %llu Hz", (long long)difference, (unsigned long long)rates[i]);
    }

    /* The TSC is moved: time goes on. */
    assert_int_equal(set_msr(g, MSR_TSC, 99), 0);
    advance(g, 1000000);
    assert_in_range((int64_t)(guest_ns(g, page) - clock_now(g->machine.clock)) + 20000, 0, 40000);

    assert_int_equal(set_msr(g, KVM_TIME, RAM_SIZE | 1), -EINVAL);
    assert_int_equal(set_msr(g, KVM_TIME, (RAM_SIZE - 16) | 1), -EINVAL);
    assert_int_equal(set_msr(g, KVM_TIME, ~0ull), -EINVAL);
    assert_int_equal(get_msr(g, KVM_TIME), page | 1);
    assert_int_equal(set_msr(g, KVM_TIME, 0), 0);               /* off */
    guest_put(g, page, 0x11, 4);
    x86_kvmclock_update(&g->cpu);
    assert_int_equal(guest_get(g, page, 4), 0x11);

    /* Wall clock: 2020-01-01 with a manual clock. */
    assert_int_equal(set_msr(g, KVM_WALL, page), 0);
    assert_int_equal(guest_get(g, page + 4, 4), 1577836800);
    assert_int_equal(guest_get(g, page + 8, 4), 0);
    assert_int_equal(guest_get(g, page, 4) & 1, 0);
    assert_int_equal(set_msr(g, KVM_WALL, ~0ull - 3), -EINVAL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, guest_teardown)
        TEST(cr0_legality),
        TEST(into_long_mode_and_out),
        TEST(cr4_legality),
        TEST(cr3_and_pcids),
        TEST(cr8_is_the_task_priority),
        TEST(machine_status_word),
        TEST(debug_registers),
        TEST(xcr0),
        TEST(plain_msrs),
        TEST(all_msrs),
        TEST(rdmsr_and_wrmsr),
        TEST(nx_needs_efer),
        TEST(apic_base),
        TEST(tsc),
        TEST(kvm_clock),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
