/*
 * A guest with random tables: whatever descriptors, gates, TSS, page tables and registers hold,
 * deliveries and transfers end, in a state that the rest can go on from. Most use: under the
 * sanitizers. The seed is fixed, so a failure repeats.
 */
#include "x86_guest.h"

#include <stdio.h>
#include <string.h>

static uint64_t rng = 0x243f6a8885a308d3;

static uint64_t random64(void)
{
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return rng;
}

static unsigned pick(unsigned n)
{
    return (unsigned)(random64() >> 33) % n;
}

static bool chance(unsigned percent)
{
    return pick(100) < percent;
}

/* Numbers that matter, more often than chance would have them. */
static uint64_t address(void)
{
    static const uint64_t favourites[] = {
        0,
        1,
        0xfff,
        0xffe,
        0x10000,
        GUEST_GDT,
        GUEST_IDT,
        GUEST_TSS,
        KERNEL_STACK,
        USER_STACK,
        USER_CODE,
        MIB(2),
        MIB(4),
        MIB(16),
        DEVICE_BASE,
        0xfee00000,
        0xffffffff,
        0x100000000,
        0x7ffffffffff8,
        0x7fffffffffff,
        0x800000000000,
        0xffff7fffffffffff,
        0xffff800000000000,
        0xfffffffffffffff8,
        0xffffffffffffffff,
        HIGH_RAM_BASE,
    };
    uint64_t a = favourites[pick(ARRAY_SIZE(favourites))];
    return chance(50) ? a : chance(50) ? a + pick(64) - 32 : random64() >> pick(64);
}

static unsigned selector(void)
{
    return chance(90) ? pick(0x100) : pick(0x10000);
}

/* A descriptor or gate: sound ones with a few bits wrong are the interesting ones. */
static uint64_t descriptor(void)
{
    static const uint32_t attrs[] = {0xa09a, 0xa0fa, 0xc09a, 0xc0fa, 0xc092, 0xc0f2, 0xa09e,
                                     0x009a, 0x0092, 0x0089, 0x008b, 0x0082, 0x008c, 0x00ec,
                                     0x0084, 0x0085, 0x008e, 0x00ee, 0x0096, 0xc0f6};
    if (chance(10))
        return random64();
    uint64_t d =
        guest_desc(chance(60) ? 0 : (uint32_t)address(),
                   chance(60) ? UINT32_MAX : (uint32_t)address(), attrs[pick(ARRAY_SIZE(attrs))]);
    if (desc_type(d) >= 12 || (!desc_s(d) && desc_type(d) >= 4))
        d = (d & 0x0000ff0000000000) | (address() & 0xffff) | (uint64_t)selector() << 16 |
            random64() << 56;
    return chance(20) ? d ^ 1ull << pick(64) : d;
}

static void fill_tables(struct guest *g)
{
    for (unsigned i = 0; i < 0x100; i += 8)
        if (chance(30))
            guest_put(g, GUEST_GDT + i, descriptor(), 8);
    for (unsigned i = 0; i < 8; i++)
        guest_put(g, GUEST_LDT + i * 8, descriptor(), 8);
    for (unsigned v = 0; v < 64; v++)
        if (chance(25))
            guest_gate(g, v, selector(), address(), chance(90) ? 14 + pick(2) : pick(16), pick(4),
                       chance(90), chance(80) ? 0 : pick(8));
    for (unsigned i = 0; i < 0x68; i += 4)
        if (chance(20))
            guest_put(g, GUEST_TSS + i, address(), 4);
    /* Entries of page tables, at any level. */
    for (unsigned n = pick(8); n; n--) {
        gpa_t at = GUEST_ROOT + (gpa_t)pick((unsigned)((g->next_table - GUEST_ROOT) / 8)) * 8;
        uint64_t e = chance(50) ? guest_get(g, at, 8) ^ 1ull << pick(64)
                                : (address() & 0xfffffff000) | (random64() & 0x80000000000001ff);
        guest_put(g, at, e, 8);
    }
}

static void random_registers(struct guest *g)
{
    struct x86_state *s = &g->cpu.s;

    for (unsigned i = 0; i < 16; i++)
        if (chance(50))
            s->gpr[i] = address();
    if (chance(30))
        s->gdt.limit = (uint16_t)pick(0x200);
    if (chance(10))
        s->idt.limit = (uint16_t)pick(0x400);
    if (chance(10))
        s->tr.limit = pick(0x80);
    if (chance(20))
        s->ldtr = (struct x86_seg){
            .base = GUEST_LDT, .limit = pick(0x50), .attr = 0x82, .selector = SEL_LDT};
    if (chance(30))
        s->cr4 ^= (chance(50) ? CR4_SMAP : CR4_SMEP);
    if (chance(30))
        s->cr0 ^= chance(50) ? CR0_WP : CR0_AM;
    s->sysenter_cs = selector();
    s->sysenter_eip = address() & 0x7fffffffffff;
    s->sysenter_esp = address() & 0x7fffffffffff;
    s->star = random64();
    s->lstar = USER_CODE;
    s->cstar = USER_CODE;
    if (chance(50))
        s->efer |= EFER_SCE;
    g->cpu.amd = chance(50);
    x86_set_rflags(&g->cpu, random64() & 0x3dffd7);
    x86_tlb_flush_all(&g->cpu);
}

/* What may follow any of it. */
static void check_state(struct guest *g)
{
    struct x86_cpu *cpu = &g->cpu;
    const struct x86_state *s = &cpu->s;

    assert_true(s->activity == X86_RUNNING || s->activity == X86_SHUTDOWN);
    assert_true(s->rflags & 2);
    assert_false(s->rflags & RFLAGS_VM);
    struct x86_cpu before = *cpu;
    x86_update_mode(cpu);
    assert_int_equal(before.cpl, cpu->cpl);
    assert_int_equal(before.code_size, cpu->code_size);
    assert_int_equal(before.stack_size, cpu->stack_size);
    assert_int_equal(before.flat, cpu->flat);
    assert_ptr_equal(before.tlb, cpu->tlb);
    assert_ptr_equal(before.tlb_fetch, cpu->tlb_fetch);
    assert_int_equal(before.code_base, cpu->code_base);
    if (s->cr0 & CR0_PE)
        assert_int_equal(s->seg[SEG_CS].selector & 3, cpu->cpl);
    if (cpu->code_size != 8)
        assert_true(cpu->s.rip <= UINT32_MAX);
    for (unsigned i = 0; i < 6; i++)
        assert_int_equal(s->seg[i].attr & ~0x1f0ffu, 0);
}

static const struct {
    x86_semantics_fn *fn;
    uint8_t bytes[4], len;
} transfers[] = {
    {x86_insn_iret, {0x48, 0xcf}, 2},
    {x86_insn_iret, {0xcf}, 1},
    {x86_insn_iret, {0x66, 0xcf}, 2},
    {x86_insn_ret_far, {0x48, 0xcb}, 2},
    {x86_insn_ret_far, {0xca, 4, 0}, 3},
    {x86_insn_ret_far, {0x66, 0xcb}, 2},
    {x86_insn_jmp_far, {0xff, 0x28}, 2},
    {x86_insn_jmp_far, {0x48, 0xff, 0x28}, 3},
    {x86_insn_call_far, {0xff, 0x18}, 2},
    {x86_insn_call_far, {0x48, 0xff, 0x18}, 3},
    {x86_insn_int, {0xcd, 0x20}, 2},
    {x86_insn_int, {0xcc}, 1},
    {x86_insn_int, {0xf1}, 1},
    {x86_insn_syscall, {0x0f, 0x05}, 2},
    {x86_insn_sysret, {0x0f, 0x07}, 2},
    {x86_insn_sysenter, {0x0f, 0x34}, 2},
    {x86_insn_sysexit, {0x0f, 0x35}, 2},
};

static void transfer(struct guest *g)
{
    unsigned i = pick(ARRAY_SIZE(transfers));
    struct x86_insn insn;
    bool gp;

    /* Some of them do not exist in all modes: others' business. */
    if (x86_decode(&insn, transfers[i].bytes, transfers[i].len, g->cpu.code_size, &gp) < 0)
        return;
    g->cpu.next_rip = g->cpu.s.rip + insn.length;
    if (g->cpu.code_size != 8)
        g->cpu.next_rip = (uint32_t)g->cpu.next_rip;
    if (RAISED(g, transfers[i].fn(&g->cpu, &insn)) >= 0)
        x86_deliver_exception(&g->cpu);
    else
        g->cpu.s.rip = g->cpu.next_rip;
}

/* Something plausible on the stack for returns, if there is a stack. */
static void push_frame(struct guest *g)
{
    int vector = RAISED(g, {
        unsigned size = chance(70) ? 8 : chance(70) ? 4 : 2;
        uint64_t sp = g->cpu.s.gpr[RSP];
        x86_push(&g->cpu, selector(), size);
        x86_push(&g->cpu, address(), size);
        x86_push(&g->cpu, random64() & 0x3fffff & ~(chance(80) ? RFLAGS_NT : 0), size);
        x86_push(&g->cpu, selector(), size);
        x86_push(&g->cpu, address(), size);
        if (chance(5))
            g->cpu.s.gpr[RSP] = sp;
    });
    (void)vector;
}

static void one(struct guest *g, enum guest_mode mode)
{
    guest_system(g, mode);
    g->cpu.s.activity = X86_RUNNING;
    g->cpu.s.nmi_blocked = false;
    if (mode != GUEST_REAL && chance(50))
        guest_enter_user(g, mode == GUEST_LONG && chance(70));
    if (mode != GUEST_REAL)
        fill_tables(g);
    random_registers(g);
    for (unsigned step = 0; step < 6 && g->cpu.s.activity == X86_RUNNING; step++) {
        switch (pick(6)) {
        case 0:
            g->cpu.exc_vector = (uint8_t)pick(20);
            g->cpu.exc_has_error = chance(50);
            g->cpu.exc_error = (uint32_t)address();
            g->cpu.exc_software = false;
            x86_deliver_exception(&g->cpu);
            break;
        case 1:
            x86_deliver_interrupt(&g->cpu, pick(64));
            break;
        case 2:
            if (g->cpu.s.cr0 & CR0_PE &&
                RAISED(g, {
                    if (chance(80))
                        x86_load_segment(
                            &g->cpu, (unsigned[]){SEG_ES, SEG_SS, SEG_DS, SEG_FS, SEG_GS}[pick(5)],
                            (uint16_t)selector());
                    else if (chance(50))
                        x86_load_ldt(&g->cpu, (uint16_t)selector());
                    else
                        x86_load_task_register(&g->cpu, (uint16_t)selector());
                }) >= 0)
                x86_deliver_exception(&g->cpu);
            break;
        default:
            push_frame(g);
            transfer(g);
            break;
        }
        check_state(g);
    }
}

static void random_tables(void **state)
{
    struct guest *g = *state;
    const enum guest_mode modes[] = {GUEST_LONG, GUEST_LONG, GUEST_32, GUEST_REAL};

    for (unsigned i = 0; i < 20000; i++)
        one(g, modes[i % ARRAY_SIZE(modes)]);
    /* It was not all refused at the door. */
    assert_true(g->cpu.exceptions > 10000);
    assert_true(g->cpu.interrupts > 1000);
}

/* Random accesses through random page tables stay inside the guest. */
static void random_page_tables(void **state)
{
    struct guest *g = *state;
    unsigned good = 0;

    for (unsigned i = 0; i < 3000; i++) {
        guest_system(g, i % 3 ? GUEST_LONG : GUEST_32);
        if (i % 3 == 0 && chance(50))
            g->cpu.s.cr4 &= ~CR4_PAE;
        fill_tables(g);
        random_registers(g);
        for (unsigned n = 0; n < 40; n++) {
            /* Through the tables' own virtual address now and then: they change under the walker's
             * feet. */
            gva_t va = chance(30) ? GUEST_ROOT + pick(0x8000) : address();
            uint8_t buf[256];
            if (g->cpu.code_size != 8)
                va = (uint32_t)va;
            unsigned len = 1 + pick(256), size = 1u << pick(4);
            int vector = RAISED(g, {
                switch (pick(6)) {
                case 0:
                    x86_read_slow(&g->cpu, g->cpu.tlb, va, size);
                    break;
                case 1:
                    x86_write_slow(&g->cpu, g->cpu.tlb, va, random64(), size);
                    break;
                case 2:
                    x86_read_bytes(&g->cpu, va, buf, len);
                    break;
                case 3:
                    x86_fetch(&g->cpu, va, buf);
                    break;
                case 4:
                    x86_probe_write(&g->cpu, va, len);
                    break;
                default:
                    x86_host_pointer(&g->cpu, va, size, pick(3));
                    break;
                }
            });
            assert_true(vector == -1 || vector == X86_PF || vector == X86_GP || vector == X86_SS ||
                        vector == X86_AC);
            good += vector == -1;
        }
        x86_tlb_flush_page(&g->cpu, address());
    }
    assert_true(good > 10000);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, guest_setup, guest_teardown)
    const struct CMUnitTest tests[] = {TEST(random_tables), TEST(random_page_tables)};
    return cmocka_run_group_tests_name("x86_hostile", tests, NULL, NULL);
}
