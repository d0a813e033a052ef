/*
 * Delivery of exceptions and interrupts: frames in every mode, faults of the delivery itself,
 * double and triple faults, and requests from outside.
 */
#include "x86_guest.h"

#include <string.h>

static void raise_and_deliver(struct guest *g, unsigned vector, bool has_error, uint32_t error)
{
    int got =
        RAISED(g, has_error ? x86_raise_error(&g->cpu, vector, error) : x86_raise(&g->cpu, vector));
    assert_int_equal(got, vector);
    x86_deliver_exception(&g->cpu);
}

static uint64_t stack(struct guest *g, unsigned n, unsigned size)
{
    return guest_get(g, g->cpu.s.seg[SEG_SS].base + g->cpu.s.gpr[RSP] + (gpa_t)n * size, size);
}

/* The frame at RSP: [error,] rip, cs, flags, rsp, ss. */
static void check_long_frame(struct guest *g, bool has_error, uint32_t error, uint64_t rip,
                             unsigned cs, uint64_t flags, uint64_t rsp, unsigned ss)
{
    unsigned at = 0;
    if (has_error)
        assert_int_equal(stack(g, at++, 8), error);
    assert_int_equal(stack(g, at, 8), rip);
    assert_int_equal(stack(g, at + 1, 8), cs);
    assert_int_equal(stack(g, at + 2, 8), flags);
    assert_int_equal(stack(g, at + 3, 8), rsp);
    assert_int_equal(stack(g, at + 4, 8), ss);
}

static void long_mode_from_user(void **state)
{
    struct guest *g = *state;
    struct x86_state *s = &g->cpu.s;
    const uint64_t flags = RFLAGS_IF | RFLAGS_TF | RFLAGS_NT | RFLAGS_AC | RFLAGS_DF | RFLAGS_CF |
                           RFLAGS_OF | RFLAGS_ZF | 2;

    for (unsigned wide = 0; wide < 2; wide++) {
        guest_system(g, GUEST_LONG);
        guest_enter_user(g, wide);
        x86_set_rflags(&g->cpu, flags);
        s->gpr[RSP] = USER_STACK - 5;
        s->interrupt_shadow = 1;
        raise_and_deliver(g, X86_GP, true, 0x1234);
        /* Six words below the stack of the TSS. */
        assert_int_equal(s->gpr[RSP], KERNEL_STACK - 0x1000 - 48);
        check_long_frame(g, true, 0x1234, USER_CODE, (wide ? SEL_UCODE64 : SEL_UCODE32) | 3,
                         flags | RFLAGS_RF, USER_STACK - 5, SEL_UDATA | 3);
        assert_int_equal(s->rip, HANDLER(X86_GP));
        assert_int_equal(g->cpu.next_rip, HANDLER(X86_GP));
        assert_int_equal(g->cpu.cpl, 0);
        assert_int_equal(g->cpu.code_size, 8);
        assert_int_equal(s->seg[SEG_CS].selector, SEL_KCODE);
        assert_int_equal(s->seg[SEG_SS].selector, 0);
        assert_true(s->seg[SEG_SS].attr & SEG_UNUSABLE);
        assert_int_equal(x86_rflags(&g->cpu),
                         RFLAGS_AC | RFLAGS_DF | RFLAGS_CF | RFLAGS_OF | RFLAGS_ZF | 2);
        assert_int_equal(s->interrupt_shadow, 0);
        assert_int_equal(g->cpu.exceptions, wide + 1);
        /* The accessed bit of the code segment. */
        assert_true(guest_get(g, GUEST_GDT + SEL_KCODE, 8) >> 40 & 1);
    }
}

static void long_mode_same_level(void **state)
{
    struct guest *g = *state;
    struct x86_state *s = &g->cpu.s;

    for (unsigned low = 0; low < 16; low++) {
        guest_system(g, GUEST_LONG);
        guest_gate(g, X86_UD, SEL_KCODE, HANDLER(X86_UD), 15, 0, true, 0);
        s->gpr[RSP] = KERNEL_STACK - low;
        raise_and_deliver(g, X86_UD, false, 0);
        assert_int_equal(s->gpr[RSP], ((KERNEL_STACK - low) & ~15ull) - 40);
        check_long_frame(g, false, 0, 0x150000, SEL_KCODE, RFLAGS_IF | RFLAGS_RF | 2,
                         KERNEL_STACK - low, SEL_KDATA);
        /* A trap gate leaves IF alone; SS stays. */
        assert_int_equal(x86_rflags(&g->cpu), RFLAGS_IF | 2);
        assert_int_equal(s->seg[SEG_SS].selector, SEL_KDATA);
    }
}

static void long_mode_ist(void **state)
{
    struct guest *g = *state;

    for (unsigned ist = 1; ist <= 7; ist++) {
        for (unsigned user = 0; user < 2; user++) {
            guest_system(g, GUEST_LONG);
            guest_gate(g, 0x40, SEL_KCODE, 0xffffffff80001234, 14, 0, true, ist);
            if (user)
                guest_enter_user(g, true);
            uint64_t rsp = g->cpu.s.gpr[RSP], rip = g->cpu.s.rip;
            x86_deliver_interrupt(&g->cpu, 0x40);
            assert_int_equal(g->cpu.s.gpr[RSP], IST_STACK(ist) - 40);
            check_long_frame(g, false, 0, rip, user ? SEL_UCODE64 | 3 : SEL_KCODE, RFLAGS_IF | 2,
                             rsp, user ? SEL_UDATA | 3 : SEL_KDATA);
            assert_true(g->cpu.s.rip == 0xffffffff80001234);
            assert_int_equal(g->cpu.s.seg[SEG_SS].selector, user ? 0 : SEL_KDATA);
        }
    }
}

static void resume_flag(void **state)
{
    struct guest *g = *state;
    static const struct {
        uint8_t vector;
        bool has_error, rf;
    } cases[] = {{X86_DE, false, true}, {X86_DB, false, false}, {X86_UD, false, true},
                 {X86_NM, false, true}, {X86_GP, true, true},   {X86_PF, true, true},
                 {X86_MF, false, true}, {X86_AC, true, true},   {X86_XM, false, true}};

    for (unsigned i = 0; i < ARRAY_SIZE(cases); i++) {
        guest_system(g, GUEST_LONG);
        raise_and_deliver(g, cases[i].vector, cases[i].has_error, 0);
        assert_int_equal(stack(g, cases[i].has_error ? 3 : 2, 8) & RFLAGS_RF,
                         cases[i].rf ? RFLAGS_RF : 0);
    }
    /* #DB lets general detection rest. */
    guest_system(g, GUEST_LONG);
    g->cpu.s.dr7 = 0x2400;
    raise_and_deliver(g, X86_DB, false, 0);
    assert_int_equal(g->cpu.s.dr7, 0x400);
}

/* What is wrong with the way to the handler, and what INT n and an interrupt get for it. */
enum defect {
    BEYOND_LIMIT,
    WRONG_TYPE,
    GATE_DPL,
    GATE_ABSENT,
    NULL_CODE,
    CODE_BEYOND,
    CODE_IS_DATA,
    CODE_ABSENT,
    CODE_NOT_LONG,
    CODE_OUTWARD,
    NO_TSS_ROOM,
    BAD_STACK,
    BAD_TARGET,
    DEFECTS,
};

static void break_gate(struct guest *g, enum defect defect)
{
    struct x86_state *s = &g->cpu.s;
    unsigned code = SEL_KCODE, type = 14, dpl = 3;
    uint64_t target = HANDLER(0x40);
    bool present = true;

    switch (defect) {
    case BEYOND_LIMIT:
        s->idt.limit = 0x40 * 16 + 14;
        break;
    case WRONG_TYPE:
        type = 12;
        break;
    case GATE_DPL:
        dpl = 2;
        break;
    case GATE_ABSENT:
        present = false;
        break;
    case NULL_CODE:
        code = 3;
        break;
    case CODE_BEYOND:
        code = 0x1000;
        break;
    case CODE_IS_DATA:
        code = SEL_KDATA;
        break;
    case CODE_ABSENT:
        code = SEL_ABSENT_CODE;
        break;
    case CODE_NOT_LONG:
        code = SEL_KCODE_OTHER;
        break;
    case CODE_OUTWARD:
        break;
    case NO_TSS_ROOM:
        s->tr.limit = 10;
        break;
    case BAD_STACK:
        guest_put(g, GUEST_TSS + 4, 0x800000001000, 8);
        break;
    case BAD_TARGET:
        target = 0x800000000000;
        break;
    case DEFECTS:
        break;
    }
    guest_gate(g, 0x40, code, target, type, dpl, present, 0);
}

static void defects_on_the_way(void **state)
{
    struct guest *g = *state;
    struct x86_state *s = &g->cpu.s;
    const unsigned idt = 0x40 * 8 + 2;
    static const struct {
        uint8_t vector;
        int error; /* -1: names the IDT entry */
        bool software_only;
    } expect[DEFECTS] = {
        [BEYOND_LIMIT] = {X86_GP, -1},
        [WRONG_TYPE] = {X86_GP, -1},
        [GATE_DPL] = {X86_GP, -1, true},
        [GATE_ABSENT] = {X86_NP, -1},
        [NULL_CODE] = {X86_GP, 0},
        [CODE_BEYOND] = {X86_GP, 0x1000},
        [CODE_IS_DATA] = {X86_GP, SEL_KDATA},
        [CODE_ABSENT] = {X86_NP, SEL_ABSENT_CODE},
        [CODE_NOT_LONG] = {X86_GP, SEL_KCODE_OTHER},
        [CODE_OUTWARD] = {X86_GP, SEL_UCODE64},
        [NO_TSS_ROOM] = {X86_TS, SEL_TSS},
        [BAD_STACK] = {X86_SS, 0},
        [BAD_TARGET] = {X86_GP, 0},
    };

    for (unsigned defect = 0; defect < DEFECTS; defect++) {
        unsigned error = expect[defect].error < 0 ? idt : (unsigned)expect[defect].error;
        guest_system(g, GUEST_LONG);
        if (defect == CODE_OUTWARD)
            guest_gate(g, 0x40, SEL_UCODE64, HANDLER(0x40), 14, 3, true, 0);
        else
            guest_enter_user(g, true);
        if (defect != CODE_OUTWARD)
            break_gate(g, defect);
        struct x86_state before = *s;
        g->cpu.next_rip = s->rip + 2;

        /* As an instruction: an ordinary fault of INT n, and nothing has changed. */
        assert_int_equal(RAISED(g, x86_software_interrupt(&g->cpu, 0x40)), expect[defect].vector);
        assert_int_equal(g->cpu.exc_error, error);
        assert_memory_equal(s, &before, sizeof(before));
        if (expect[defect].software_only) {
            x86_deliver_interrupt(&g->cpu, 0x40);
            assert_int_equal(s->rip, HANDLER(0x40));
            continue;
        }
        /* As an interrupt: the fault's own handler runs, EXT is set, the place to return to is the
         * same. */
        if (defect == NO_TSS_ROOM || defect == BAD_STACK) {
            /* The fault needs the same stack: contributory is not the first event, so it is raised,
             * then doubles. */
            x86_deliver_interrupt(&g->cpu, 0x40);
            assert_int_equal(s->activity, X86_SHUTDOWN);
            s->activity = X86_RUNNING;
            continue;
        }
        uint64_t rip = s->rip;
        x86_deliver_interrupt(&g->cpu, 0x40);
        assert_int_equal(s->activity, X86_RUNNING);
        assert_int_equal(s->rip, HANDLER(expect[defect].vector));
        assert_int_equal(stack(g, 0, 8), error | 1);
        assert_int_equal(stack(g, 1, 8), rip);
    }
}

static void conforming_handlers_keep_the_level(void **state)
{
    struct guest *g = *state;

    guest_system(g, GUEST_LONG);
    guest_gate(g, 0x40, SEL_CONFORMING, HANDLER(0x40), 14, 3, true, 0);
    guest_enter_user(g, true);
    g->cpu.next_rip = USER_CODE + 2;
    assert_int_equal(RAISED(g, x86_software_interrupt(&g->cpu, 0x40)), -1);
    assert_int_equal(g->cpu.cpl, 3);
    assert_int_equal(g->cpu.s.seg[SEG_CS].selector, SEL_CONFORMING | 3);
    assert_int_equal(g->cpu.s.gpr[RSP], USER_STACK - 40);
    check_long_frame(g, false, 0, USER_CODE + 2, SEL_UCODE64 | 3, RFLAGS_IF | 2, USER_STACK,
                     SEL_UDATA | 3);
}

/* The stack of a handler's gate points nowhere, so that its delivery is a page fault. */
static void gate_without_stack(struct guest *g, unsigned vector)
{
    guest_put(g, GUEST_TSS + 0x1c + 8, 0x700000, 8);
    guest_gate(g, vector, SEL_KCODE, HANDLER(vector), 14, 3, true, 1);
}

static void double_faults(void **state)
{
    struct guest *g = *state;
    enum { NP, PF };
    static const struct {
        uint8_t first;
        uint8_t second;
        bool twice;
    } cases[] = {
        {X86_DE, NP, true},  {X86_DE, PF, false}, {X86_TS, NP, true},  {X86_SS, NP, true},
        {X86_GP, NP, true},  {X86_GP, PF, false}, {X86_PF, NP, true},  {X86_PF, PF, true},
        {X86_UD, NP, false}, {X86_UD, PF, false}, {X86_DB, NP, false}, {X86_AC, NP, false},
        {X86_MF, PF, false}, {X86_NM, NP, false},
    };

    for (unsigned i = 0; i < ARRAY_SIZE(cases); i++) {
        guest_system(g, GUEST_LONG);
        guest_gate(g, X86_DF, SEL_KCODE, HANDLER(X86_DF), 14, 0, true, 2);
        if (cases[i].second == NP)
            guest_gate(g, cases[i].first, SEL_KCODE, HANDLER(cases[i].first), 14, 3, false, 0);
        else
            gate_without_stack(g, cases[i].first);
        bool has_error = cases[i].first >= X86_TS && cases[i].first <= X86_PF;
        guest_enter_user(g, true);
        g->cpu.s.cr2 = 0;
        raise_and_deliver(g, cases[i].first, has_error, 0);
        assert_int_equal(g->cpu.s.activity, X86_RUNNING);
        unsigned second = cases[i].second == NP ? X86_NP : X86_PF;
        assert_int_equal(g->cpu.s.rip, HANDLER(cases[i].twice ? X86_DF : second));
        uint32_t error = cases[i].twice ? 0 : second == X86_NP ? cases[i].first * 8u + 3 : PF_WRITE;
        assert_int_equal(stack(g, 0, 8), error);
        assert_int_equal(stack(g, 1, 8), USER_CODE);
        if (cases[i].second == PF)
            assert_int_equal(g->cpu.s.cr2, 0x700000 - 8);
    }
}

static void triple_faults(void **state)
{
    struct guest *g = *state;
    struct x86_state before;

    for (unsigned how = 0; how < 3; how++) {
        guest_system(g, GUEST_LONG);
        guest_gate(g, X86_GP, SEL_KCODE, HANDLER(X86_GP), 14, 0, false, 0);
        if (how == 0)
            guest_gate(g, X86_DF, SEL_KCODE, HANDLER(X86_DF), 14, 0, false, 0);
        else if (how == 1)
            gate_without_stack(g, X86_DF);
        else
            g->cpu.s.idt.limit = 0;
        before = g->cpu.s;
        raise_and_deliver(g, X86_GP, true, 0);
        assert_int_equal(g->cpu.s.activity, X86_SHUTDOWN);
        assert_int_equal(g->cpu.s.rip, before.rip);
        assert_int_equal(g->cpu.s.gpr[RSP], before.gpr[RSP]);
        g->cpu.s.activity = X86_RUNNING;
    }
    /* A page fault in the delivery of a double fault as well; a benign one would be served. */
    guest_system(g, GUEST_LONG);
    gate_without_stack(g, X86_DF);
    guest_gate(g, X86_PF, SEL_KCODE, HANDLER(X86_PF), 14, 0, false, 0);
    raise_and_deliver(g, X86_PF, true, 0);
    assert_int_equal(g->cpu.s.activity, X86_SHUTDOWN);
}

static void protected_mode_frames(void **state)
{
    struct guest *g = *state;
    struct x86_state *s = &g->cpu.s;
    static const unsigned types[] = {14, 15, 6, 7};

    for (unsigned i = 0; i < ARRAY_SIZE(types); i++) {
        unsigned size = types[i] >= 14 ? 4 : 2;
        for (unsigned user = 0; user < 2; user++) {
            guest_system(g, GUEST_32);
            guest_gate(g, X86_GP, SEL_KCODE, 0x151234, types[i], 0, true, 0);
            if (user)
                guest_enter_user(g, false);
            x86_set_rflags(&g->cpu, RFLAGS_IF | RFLAGS_TF | RFLAGS_SF | 0x3000);
            uint64_t rip = s->rip, cs = s->seg[SEG_CS].selector, rsp = s->gpr[RSP];
            raise_and_deliver(g, X86_GP, true, 0x77);
            uint64_t mask = size == 4 ? UINT32_MAX : 0xffff;
            assert_int_equal(s->gpr[RSP],
                             (user ? KERNEL_STACK - 0x1000 : KERNEL_STACK) - (user ? 6 : 4) * size);
            assert_int_equal(stack(g, 0, size), 0x77);
            assert_int_equal(stack(g, 1, size), rip & mask);
            assert_int_equal(stack(g, 2, size), cs);
            assert_int_equal(stack(g, 3, size),
                             (RFLAGS_IF | RFLAGS_TF | RFLAGS_SF | 0x3002 | RFLAGS_RF) & mask);
            if (user) {
                assert_int_equal(stack(g, 4, size), rsp & mask);
                assert_int_equal(stack(g, 5, size), SEL_UDATA | 3);
            }
            assert_int_equal(s->seg[SEG_SS].selector, SEL_KDATA);
            assert_int_equal(s->rip, size == 4 ? 0x151234 : 0x1234);
            assert_int_equal(x86_rflags(&g->cpu),
                             RFLAGS_SF | 0x3002 | (types[i] & 1 ? RFLAGS_IF : 0));
            assert_int_equal(g->cpu.cpl, 0);
        }
    }
}

static void protected_mode_stacks(void **state)
{
    struct guest *g = *state;
    static const struct {
        unsigned ss, vector, error;
    } cases[] = {
        {0, X86_TS, 0},
        {SEL_KDATA | 1, X86_TS, SEL_KDATA},
        {SEL_UDATA, X86_TS, SEL_UDATA},
        {SEL_KCODE, X86_TS, SEL_KCODE},
        {0xff8, X86_TS, 0xff8},
        {SEL_ABSENT_DATA, X86_SS, SEL_ABSENT_DATA},
    };

    for (unsigned i = 0; i < ARRAY_SIZE(cases); i++) {
        guest_system(g, GUEST_32);
        guest_put(g, GUEST_TSS + 8, cases[i].ss, 2);
        guest_enter_user(g, false);
        assert_int_equal(RAISED(g, x86_software_interrupt(&g->cpu, 0x40)), cases[i].vector);
        assert_int_equal(g->cpu.exc_error, cases[i].error);
    }
    /* A TSS that ends too early. */
    guest_system(g, GUEST_32);
    guest_enter_user(g, false);
    g->cpu.s.tr.limit = 8;
    assert_int_equal(RAISED(g, x86_software_interrupt(&g->cpu, 0x40)), X86_TS);
    assert_int_equal(g->cpu.exc_error, SEL_TSS);
    /* A 16-bit one. */
    guest_system(g, GUEST_32);
    g->cpu.s.tr.attr = 0x83;
    g->cpu.s.tr.limit = 0x2b;
    guest_put(g, GUEST_TSS + 2, 0x8000, 2);
    guest_put(g, GUEST_TSS + 4, SEL_DATA16, 2);
    guest_enter_user(g, false);
    g->cpu.s.gpr[RSP] = 0x12345678;
    assert_int_equal(RAISED(g, x86_software_interrupt(&g->cpu, 0x40)), -1);
    assert_int_equal(g->cpu.s.gpr[RSP], 0x12340000 + 0x8000 - 20);
    assert_int_equal(g->cpu.stack_size, 2);
    assert_int_equal(guest_get(g, 0x8000 - 8, 4), 0x12345678);
    /* A stack too small: #SS with its selector; in place, #SS(0). */
    guest_system(g, GUEST_32);
    guest_gdt(g, SEL_FREE, guest_desc(0, 0xfff, 0x4092));
    guest_put(g, GUEST_TSS + 4, 0x1008, 4);
    guest_put(g, GUEST_TSS + 8, SEL_FREE, 2);
    guest_enter_user(g, false);
    assert_int_equal(RAISED(g, x86_software_interrupt(&g->cpu, 0x40)), X86_SS);
    assert_int_equal(g->cpu.exc_error, SEL_FREE);
    guest_system(g, GUEST_32);
    g->cpu.s.seg[SEG_SS].limit = KERNEL_STACK - 9;
    assert_int_equal(RAISED(g, x86_software_interrupt(&g->cpu, 0x40)), X86_SS);
    assert_int_equal(g->cpu.exc_error, 0);
    /* A handler beyond the limit of its code segment; a task gate. */
    guest_system(g, GUEST_32);
    guest_gdt(g, SEL_FREE, guest_desc(0, 0xfff, 0x409a));
    guest_gate(g, 0x40, SEL_FREE, 0x1000, 14, 3, true, 0);
    assert_int_equal(RAISED(g, x86_software_interrupt(&g->cpu, 0x40)), X86_GP);
    assert_int_equal(g->cpu.exc_error, 0);
    guest_gate(g, 0x40, SEL_TSS, 0, 5, 3, true, 0);
    assert_int_equal(RAISED(g, x86_software_interrupt(&g->cpu, 0x40)), X86_TS);
    assert_int_equal(g->cpu.exc_error, SEL_TSS);
}

static void real_mode(void **state)
{
    struct guest *g = *state;
    struct x86_state *s = &g->cpu.s;

    guest_system(g, GUEST_REAL);
    x86_set_rflags(&g->cpu, RFLAGS_IF | RFLAGS_TF | RFLAGS_CF);
    raise_and_deliver(g, X86_GP, true, 0x55);
    /* No error code here. */
    assert_int_equal(s->gpr[RSP], 0x1000 - 6);
    assert_int_equal(stack(g, 0, 2), 0x345);
    assert_int_equal(stack(g, 1, 2), 0x2000);
    assert_int_equal(stack(g, 2, 2), RFLAGS_IF | RFLAGS_TF | RFLAGS_CF | 2);
    assert_int_equal(s->seg[SEG_CS].selector, 0x1000);
    assert_int_equal(s->seg[SEG_CS].base, 0x10000);
    assert_int_equal(s->rip, X86_GP * 0x10);
    assert_int_equal(x86_rflags(&g->cpu), RFLAGS_CF | 2);

    /* Beyond the table's end: #GP; if that has no entry either, shutdown. */
    guest_system(g, GUEST_REAL);
    s->idt.limit = 0x40 * 4 + 2;
    g->cpu.next_rip = s->rip + 2;
    assert_int_equal(RAISED(g, x86_software_interrupt(&g->cpu, 0x40)), X86_GP);
    assert_int_equal(RAISED(g, x86_software_interrupt(&g->cpu, 0x3f)), -1);
    assert_int_equal(stack(g, 0, 2), 0x347);
    guest_system(g, GUEST_REAL);
    s->idt.limit = 0;
    raise_and_deliver(g, X86_UD, false, 0);
    assert_int_equal(s->activity, X86_SHUTDOWN);
    s->activity = X86_RUNNING;
    /* A stack pointer of 1: #SS, and again for that: shutdown. */
    guest_system(g, GUEST_REAL);
    s->gpr[RSP] = 1;
    raise_and_deliver(g, X86_UD, false, 0);
    assert_int_equal(s->activity, X86_SHUTDOWN);
}

static void software_interrupts(void **state)
{
    struct guest *g = *state;
    static const struct {
        uint8_t bytes[2], len, vector;
    } cases[] = {
        {{0xcd, 0x80}, 2, 0x80}, {{0xcc}, 1, X86_BP}, {{0xf1}, 1, X86_DB}, {{0xcd, 0x03}, 2, 3}};

    for (unsigned i = 0; i < ARRAY_SIZE(cases); i++) {
        guest_system(g, GUEST_LONG);
        guest_enter_user(g, true);
        /* INT1 does not ask for the gate's privilege. */
        if (cases[i].vector == X86_DB)
            guest_gate(g, X86_DB, SEL_KCODE, HANDLER(X86_DB), 14, 0, true, 0);
        struct x86_insn insn = guest_insn(g, cases[i].bytes, cases[i].len);
        assert_int_equal(RAISED(g, x86_insn_int(&g->cpu, &insn)), -1);
        assert_int_equal(g->cpu.next_rip, HANDLER(cases[i].vector));
        check_long_frame(g, false, 0, USER_CODE + cases[i].len, SEL_UCODE64 | 3, RFLAGS_IF | 2,
                         USER_STACK, SEL_UDATA | 3);
    }
    /* INTO looks at OF. */
    for (unsigned of = 0; of < 2; of++) {
        guest_system(g, GUEST_32);
        struct x86_insn insn = guest_insn(g, "\xce", 1);
        x86_set_rflags(&g->cpu, of ? RFLAGS_OF : 0);
        uint64_t next = g->cpu.next_rip;
        assert_int_equal(RAISED(g, x86_insn_int(&g->cpu, &insn)), -1);
        assert_int_equal(g->cpu.next_rip, of ? HANDLER(X86_OF) : next);
    }
}

/* ---- requests ---- */

static void external(struct guest *g, unsigned vector)
{
    irqchip_msi(g->chip, 0xfee00000, vector);
}

static void enable_apic(struct guest *g)
{
    lapic_mmio_write(g->cpu.lapic, 0xf0, 0x1ff, 4);
}

static void interrupts_wait_for_permission(void **state)
{
    struct guest *g = *state;
    struct x86_cpu *cpu = &g->cpu;

    guest_system(g, GUEST_LONG);
    enable_apic(g);
    x86_set_rflags(cpu, 0);
    external(g, 0x51);
    x86_request(cpu, REQUEST_INTR);
    x86_handle_requests(cpu);
    assert_int_equal(cpu->s.rip, 0x150000);
    /* The request is not kept while IF is clear: setting it asks again. */
    assert_int_equal(atomic_load(&cpu->request), 0);
    x86_set_rflags(cpu, RFLAGS_IF);
    assert_int_equal(atomic_load(&cpu->request), REQUEST_INTR);
    /* The shadow holds it for one instruction, and it is not forgotten. */
    cpu->s.interrupt_shadow = 1;
    x86_handle_requests(cpu);
    assert_int_equal(cpu->s.rip, 0x150000);
    assert_int_equal(atomic_load(&cpu->request), REQUEST_INTR);
    cpu->s.interrupt_shadow = 0;
    x86_handle_requests(cpu);
    assert_int_equal(cpu->s.rip, HANDLER(0x51));
    assert_int_equal(cpu->interrupts, 1);
    assert_int_equal(stack(g, 2, 8), RFLAGS_IF | 2);
    assert_int_equal(atomic_load(&cpu->request), 0);

    /* One in service holds back its class; a higher one comes through a trap gate at once. */
    guest_system(g, GUEST_LONG);
    guest_gate(g, 0x61, SEL_KCODE, HANDLER(0x61), 15, 0, true, 0);
    external(g, 0x52);
    external(g, 0x61);
    x86_request(cpu, REQUEST_INTR);
    x86_handle_requests(cpu);
    assert_int_equal(cpu->s.rip, HANDLER(0x61));
    external(g, 0x71);
    x86_request(cpu, REQUEST_INTR);
    x86_handle_requests(cpu);
    assert_int_equal(cpu->s.rip, HANDLER(0x71));
}

static void halt_ends(void **state)
{
    struct guest *g = *state;
    struct x86_cpu *cpu = &g->cpu;

    guest_system(g, GUEST_LONG);
    enable_apic(g);
    cpu->s.activity = X86_HALTED;
    x86_set_rflags(cpu, 0);
    external(g, 0x51);
    x86_request(cpu, REQUEST_INTR);
    x86_handle_requests(cpu);
    assert_int_equal(cpu->s.activity, X86_HALTED);
    x86_set_rflags(cpu, RFLAGS_IF);
    x86_handle_requests(cpu);
    assert_int_equal(cpu->s.activity, X86_RUNNING);
    assert_int_equal(cpu->s.rip, HANDLER(0x51));
    cpu->s.activity = X86_HALTED;
    x86_request(cpu, REQUEST_NMI);
    x86_handle_requests(cpu);
    assert_int_equal(cpu->s.activity, X86_RUNNING);
    assert_int_equal(cpu->s.rip, HANDLER(X86_NMI));
}

static void nmi_until_iret(void **state)
{
    struct guest *g = *state;
    struct x86_cpu *cpu = &g->cpu;

    guest_system(g, GUEST_LONG);
    x86_set_rflags(cpu, 0);
    cpu->s.interrupt_shadow = 2;
    x86_request(cpu, REQUEST_NMI);
    x86_handle_requests(cpu);
    assert_int_equal(cpu->s.rip, 0x150000);
    cpu->s.interrupt_shadow = 0;
    x86_handle_requests(cpu);
    assert_int_equal(cpu->s.rip, HANDLER(X86_NMI));
    assert_true(cpu->s.nmi_blocked);
    /* Another one waits for IRET. */
    x86_request(cpu, REQUEST_NMI);
    x86_handle_requests(cpu);
    assert_int_equal(cpu->s.gpr[RSP], KERNEL_STACK - 40);
    assert_int_equal(atomic_load(&cpu->request), 0);
    assert_true(cpu->s.nmi_pending);
    struct x86_insn iret = guest_insn(g, "\x48\xcf", 2);
    assert_int_equal(RAISED(g, x86_insn_iret(cpu, &iret)), -1);
    cpu->s.rip = cpu->next_rip;
    assert_int_equal(cpu->s.rip, 0x150000);
    assert_int_equal(cpu->s.gpr[RSP], KERNEL_STACK);
    assert_false(cpu->s.nmi_blocked);
    x86_handle_requests(cpu);
    assert_int_equal(cpu->s.rip, HANDLER(X86_NMI));
    assert_false(cpu->s.nmi_pending);
    /* A faulting IRET lets them in as well. */
    cpu->s.gpr[RSP] = 0x700000;
    assert_int_equal(RAISED(g, x86_insn_iret(cpu, &iret)), X86_PF);
    assert_false(cpu->s.nmi_blocked);
}

static void single_step(void **state)
{
    struct guest *g = *state;
    struct x86_cpu *cpu = &g->cpu;

    guest_system(g, GUEST_LONG);
    enable_apic(g);
    external(g, 0x51);
    x86_set_rflags(cpu, RFLAGS_TF | RFLAGS_IF);
    x86_request(cpu, REQUEST_DEBUG | REQUEST_INTR);
    x86_handle_requests(cpu);
    /* The trap first; its handler runs with interrupts off. */
    assert_int_equal(cpu->s.rip, HANDLER(X86_DB));
    assert_true(cpu->s.dr6 & 0x4000);
    assert_int_equal(stack(g, 2, 8), RFLAGS_TF | RFLAGS_IF | 2);
    assert_int_equal(stack(g, 0, 8), 0x150000);
    assert_int_equal(lapic_pending(cpu->lapic), 0x51);
}

static void init_and_start(void **state)
{
    struct guest *g = *state;
    struct x86_cpu *cpu = &g->cpu;

    guest_system(g, GUEST_LONG);
    enable_apic(g);
    cpu->index = 1;
    x86_request(cpu, REQUEST_INIT);
    x86_handle_requests(cpu);
    assert_int_equal(cpu->s.activity, X86_WAIT_FOR_SIPI);
    assert_false(cpu->long_mode);
    assert_int_equal(cpu->code_size, 2);
    assert_int_equal(cpu->s.cr0 & (CR0_PE | CR0_PG), 0);
    /* Nothing but a start signal wakes it. */
    x86_request(cpu, REQUEST_NMI | REQUEST_INTR);
    x86_handle_requests(cpu);
    assert_int_equal(cpu->s.activity, X86_WAIT_FOR_SIPI);
    cpu->s.nmi_pending = false;
    cpu->s.sipi_vector = 0x9a;
    x86_request(cpu, REQUEST_SIPI);
    x86_handle_requests(cpu);
    assert_int_equal(cpu->s.activity, X86_RUNNING);
    assert_int_equal(cpu->s.seg[SEG_CS].selector, 0x9a00);
    assert_int_equal(cpu->s.seg[SEG_CS].base, 0x9a000);
    assert_int_equal(cpu->code_base, 0x9a000);
    assert_int_equal(cpu->s.rip, 0);
    /* Running, it does not listen to another. */
    cpu->s.rip = 5;
    cpu->s.sipi_vector = 0x10;
    x86_request(cpu, REQUEST_SIPI);
    x86_handle_requests(cpu);
    assert_int_equal(cpu->s.rip, 5);
    /* Both at once: first INIT. */
    cpu->s.sipi_vector = 0x11;
    x86_request(cpu, REQUEST_INIT | REQUEST_SIPI);
    x86_handle_requests(cpu);
    assert_int_equal(cpu->s.seg[SEG_CS].selector, 0x1100);
    assert_int_equal(cpu->s.activity, X86_RUNNING);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, guest_setup, guest_teardown)
    const struct CMUnitTest tests[] = {
        TEST(long_mode_from_user),
        TEST(long_mode_same_level),
        TEST(long_mode_ist),
        TEST(resume_flag),
        TEST(defects_on_the_way),
        TEST(conforming_handlers_keep_the_level),
        TEST(double_faults),
        TEST(triple_faults),
        TEST(protected_mode_frames),
        TEST(protected_mode_stacks),
        TEST(real_mode),
        TEST(software_interrupts),
        TEST(interrupts_wait_for_permission),
        TEST(halt_ends),
        TEST(nmi_until_iret),
        TEST(single_step),
        TEST(init_and_start),
    };
    return cmocka_run_group_tests_name("exception", tests, NULL, NULL);
}
