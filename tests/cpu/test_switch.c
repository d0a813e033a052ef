/*
 * The state of a vCPU goes from one engine to another and back, at rest and in the middle of work. Usage: test_switch ENGINE ENGINE [PATTERN].
 *
 * The guest is a few routines below, copied into a small machine (engine_guest.h). One that ends a piece of its work writes to the port,
 * and the machine goes on on the other engine.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/clock.h"
#include "engine_guest.h"

#define CODE 0x400000ull
#define CODE_GPA 0x200000u
#define DATA 0x610000ull        /* a page, also for user mode; the kernel's counters are at its end */
#define DATA_GPA 0x320000u
#define STACK 0x700000ull
#define STACK_GPA 0x330000u
#define IDT_GPA 0x3000u

enum { LOW_VECTOR = 0x40, HIGH_VECTOR = 0x50, LEVEL_VECTOR = 0x60, DEVICE_PORT = 0x20, DEVICE_GSI = 5 };

static const char *engines[2];
static struct engine_guest *guest;
static unsigned turn;           /* which engine runs */
/*
 * There are /dev/kvm without hardware whose guests read the host's TSC, and whose LAPICs show no interrupt in service. Not all
 * can be asked of them.
 */
static bool faithful = true;
static bool exact_tsc = true;   /* nor of those on hosts with a TSC that is not to be trusted */
static struct x86_state *s;

/* ---- the guest's code; AT&T syntax, no absolute addresses ---- */

__asm__(
    ".pushsection .rodata\n"
    "code:\n"
    /* User mode: RCX rounds of arithmetic on registers, memory at RDI, XMM0/1 and the x87 stack. */
    "compute:\n"
    "   fninit; fldz\n"
    "1: imul %r8, %rax; add %r9, %rax\n"
    "   mov %rax, %rdx; shr $33, %rdx; and $0x7f8, %edx\n"
    "   xor %rax, (%rdi,%rdx); rol $7, %rbx; xor (%rdi,%rdx), %rbx\n"
    "   movq %rax, %xmm0; paddq %xmm0, %xmm1; pshufd $0x39, %xmm1, %xmm1\n"
    "   fld1; faddp\n"
    "   dec %rcx; jnz 1b\n"
    "   movdqu %xmm1, 0x800(%rdi); fistpll 0x810(%rdi)\n"
    "   ud2\n"                              /* not INT3: see docs/kvm.md */
    /* Ring 0, with an x2APIC: counts interrupts of LOW_VECTOR until there are RBX, between which it halts. */
    "ticks:\n"
    "   sti; hlt; cli\n"
    "   cmp %rbx, (%rdi); jb ticks\n"
    "   out %al, $0x10\n"
    /* Ring 0: two interrupts to itself while it takes none. Then it takes them. */
    "interrupts:\n"
    "   cli; mov $0x83f, %ecx; xor %edx, %edx\n"
    "   mov $0x40, %eax; wrmsr; mov $0x50, %eax; wrmsr\n"
    "   out %al, $0x10; sti; 1: cmpq $0, (%rdi); je 1b; cli; out %al, $0x10\n"
    /* Ring 0: waits for interrupts, for ever. */
    "wait_nmi:\n"
    "   sti; hlt; 1: cmpq $0, 32(%rdi); je 1b; 1: cmpq $0, (%rdi); je 1b; cli; out %al, $0x10\n"
    /* Ring 0: goes on when there were RBX interrupts of the device. */
    "wait_level:\n"
    "   sti; 1: cmp %rbx, 24(%rdi); jb 1b; cli; out %al, $0x10; jmp wait_level\n"
    "wait:\n"
    "   sti; hlt; cli; out %al, $0x10; jmp wait\n"
    /* Handlers: count at RDI + 8 × n, perhaps stop once in the middle, end of interrupt. RSI bit 0: one-shot timer anew, 1: deadline. */
    "low_handler:\n"
    "   push %rax; push %rcx; push %rdx\n"
    "   incq (%rdi)\n"
    "   test $1, %sil; jz 1f; mov $0x838, %ecx; mov %r8d, %eax; xor %edx, %edx; wrmsr; 1:\n"
    "   test $2, %sil; jz 1f; rdtsc; shl $32, %rdx; or %rdx, %rax; add %r8, %rax; mov %rax, %rdx; shr $32, %rdx\n"
    "   mov $0x6e0, %ecx; wrmsr; 1:\n"
    "   jmp end_of_interrupt\n"
    "high_handler:\n"
    "   push %rax; push %rcx; push %rdx\n"
    "   incq 8(%rdi); mov (%rdi), %rax; mov %rax, 16(%rdi)\n"   /* how many low ones were there before */
    "   out %al, $0x10\n"
    "end_of_interrupt:\n"
    "   mov $0x80b, %ecx; xor %eax, %eax; xor %edx, %edx; wrmsr\n"
    "   pop %rdx; pop %rcx; pop %rax; iretq\n"
    "level_handler:\n"
    "   push %rax; push %rcx; push %rdx\n"
    "   incq 24(%rdi); out %al, $0x10; in $0x20, %al; jmp end_of_interrupt\n"
    "nmi_handler:\n"
    "   incq 32(%rdi); out %al, $0x10; iretq\n"
    "code_end:\n"
    ".popsection\n");
extern const uint8_t code[], code_end[], compute[], ticks[], interrupts[], wait[], wait_nmi[], wait_level[], low_handler[], high_handler[], level_handler[],
    nmi_handler[];

static gva_t address(const uint8_t *label) { return CODE + (uint64_t)(label - code); }

static void set_gate(unsigned vector, const uint8_t *handler)
{
    uint64_t va = address(handler);

    engine_guest_put(guest, IDT_GPA + vector * 16,
                     (va & 0xffff) | SEL_KERNEL_CODE << 16 | 0x8e0000000000 | (va & 0xffff0000) << 32, 8);
    engine_guest_put(guest, IDT_GPA + vector * 16 + 8, va >> 32, 8);
}

static uint64_t counter(unsigned n) { return engine_guest_get(guest, DATA_GPA + 0xf00 + 8 * n); }

/* ---- a device that holds its line until its port is read ---- */

static struct irq_line line = { .gsi = DEVICE_GSI };

static uint64_t device_read(void *opaque, uint64_t offset, unsigned size)
{
    irq_set(&line, false);
    return 0;
}

static void device_write(void *opaque, uint64_t offset, uint64_t value, unsigned size) {}

static const struct bus_ops device_ops = { .read = device_read, .write = device_write };

static void raise_line(void)
{
    pthread_mutex_lock(&guest->machine.lock);
    irq_set(&line, true);
    pthread_mutex_unlock(&guest->machine.lock);
}

/* ---- */

static int setup_with(bool real_clock)
{
    turn = 0;
    guest = aligned_alloc(64, align_up(sizeof(*guest), 64));
    memset(guest, 0, sizeof(*guest));
    guest->real_clock = real_clock;
    guest->other_engine = engines[1];
    engine_guest_init(guest, engines[0], "host");
    s = aligned_alloc(64, align_up(sizeof(*s), 64));
    *s = guest->base;
    engine_guest_map(guest, CODE, CODE_GPA, PTE_W);
    engine_guest_map(guest, STACK - 0x1000, STACK_GPA, PTE_W | PTE_NX);
    engine_guest_map(guest, DATA, DATA_GPA, PTE_W | PTE_NX);
    memcpy(guest->ram + CODE_GPA, code, (size_t)(code_end - code));
    memset(guest->ram + DATA_GPA, 0, 4096);
    set_gate(LOW_VECTOR, low_handler);
    set_gate(HIGH_VECTOR, high_handler);
    set_gate(LEVEL_VECTOR, level_handler);
    set_gate(2, nmi_handler);
    line = (struct irq_line){ .router = &guest->machine.irq, .gsi = DEVICE_GSI };
    bus_add(&guest->machine.ports, DEVICE_PORT, 1, &device_ops, NULL, "device");
    s->seg[SEG_CS] = engine_guest_segment(guest, SEL_KERNEL_CODE);
    s->seg[SEG_SS] = engine_guest_segment(guest, SEL_KERNEL_DATA);
    s->gpr[RSP] = STACK;
    s->gpr[RDI] = DATA + 0xf00;
    return 0;
}

static int setup(void **state) { return setup_with(false); }
static int setup_real(void **state) { return setup_with(true); }

static int teardown(void **state)
{
    engine_guest_destroy(guest);
    free(guest);
    free(s);
    return 0;
}

static void switch_engine(void)
{
    turn ^= 1;
    engine_guest_switch(guest, engines[turn]);
}

static void run(void)
{
    struct guest_exception e;

    enum guest_end end = engine_guest_run(guest, s);
    if (end != GUEST_ENDED)
        fail_msg("%s: %s, rip is %llx", engines[turn], end == GUEST_EXPIRED ? "does not end" : "died", (unsigned long long)s->rip);
    if (engine_guest_exception(guest, s, &e))
        fail_msg("%s: exception %u, error %x, at %llx, cr2 %llx", engines[turn], e.vector, e.error, (unsigned long long)e.rip,
                 (unsigned long long)s->cr2);
}

/* Enabled, in x2APIC mode. */
static void enable_apic(void)
{
    struct lapic *l = guest->vcpu.lapic;

    assert_int_equal(lapic_set_base(l, LAPIC_DEFAULT_BASE | 0xd00), 0);
    assert_int_equal(lapic_msr_write(l, 0x80f, 0x1ff), 0);
}

/* ---- at rest ---- */

static void fill(void *p, size_t n, unsigned seed)
{
    for (size_t i = 0; i < n; i++)
        ((uint8_t *)p)[i] = (uint8_t)(seed += 0x9d + (seed >> 3));
}

/* Everything has a value of its own. */
static void make_distinct(struct x86_state *x)
{
    uint64_t allowed = guest->model->xcr0_allowed;

    fill(x->gpr, sizeof(x->gpr), 1);
    x->rip = 0xffff800012345678;
    x->rflags = RFLAGS_IF | RFLAGS_CF | RFLAGS_ZF | RFLAGS_ID | RFLAGS_AC | 2;
    x->seg[SEG_FS] = (struct x86_seg){ .base = 0x7f0123456000, .limit = UINT32_MAX, .attr = 0xc0f3, .selector = 0x53 };
    x->seg[SEG_GS].base = 0xffff888012340000;
    x->gdt = (struct x86_table){ .base = 0xffffffff81110000, .limit = 0x7f };
    x->idt = (struct x86_table){ .base = 0xffffffff82220000, .limit = 0xfff };
    x->ldtr = (struct x86_seg){ .base = 0xffff888033330000, .limit = 0xff, .attr = 0x82, .selector = 0x48 };
    x->cr2 = 0x5555666677778888;
    fill(x->dr, sizeof(x->dr), 7);
    for (unsigned i = 0; i < 4; i++)
        x->dr[i] &= 0x7fffffffffff;
    x->dr7 = 0x700;
    x->star = 0x0023001000000000;
    x->lstar = 0xffffffff81800000;
    x->cstar = 0xffffffff81801000;
    x->sfmask = 0x47700;
    x->kernel_gs_base = 0x7fff12340000;
    x->sysenter_cs = 0x10;
    x->sysenter_esp = 0x44440000;       /* 32 bits on AMD's processors */
    x->sysenter_eip = 0x81802000;
    x->pat = 0x0407050600070106;
    x->tsc_aux = 0;
    x->tsc_offset = 0x123456789;
    x->tsc_adjust = 0x55;
    x->mtrr_def_type = 0xc06;
    x->mtrr_base[1] = 0xc0000000;
    x->mtrr_mask[1] = 0x7fc0000800;     /* as far as the smallest physical address space goes */
    for (unsigned i = 0; i < 11; i++)
        x->mtrr_fixed[i] = 0x0606060606060606;
    /* Vector state, as far as the model has it. */
    fill(x->fpu.zmm, sizeof(x->fpu.zmm), 3);
    for (unsigned i = 0; i < 32; i++)
        memset(x->fpu.zmm[i] + (allowed & 0xe0 ? 64 : i >= 16 ? 0 : allowed & 4 ? 32 : 16), 0,
               allowed & 0xe0 ? 0 : i >= 16 ? 64 : allowed & 4 ? 32 : 48);
    if (allowed & 0x20)
        fill(x->fpu.k, sizeof(x->fpu.k), 4);
    for (unsigned i = 0; i < 8; i++) {
        fill(x->fpu.st[i], 10, 5 + i);
        x->fpu.st[i][7] |= 0x80;
    }
    x->fpu.fcw = 0x27f;
    x->fpu.fsw = 0x3800;
    x->fpu.ftw = 0xa5;
    x->fpu.fop = 0x155;
    x->fpu.fip = 0x401234;
    x->fpu.fdp = 0x605678;
    x->fpu.mxcsr = 0x1f85;
}

#define SAME(a, b, field) \
    do { \
        if (memcmp(&(a)->field, &(b)->field, sizeof((a)->field))) \
            fail_msg("%s: %s is %llx instead of %llx", engines[turn], #field, \
                     (unsigned long long)*(const uint64_t *)&(b)->field, (unsigned long long)*(const uint64_t *)&(a)->field); \
    } while (0)

static void assert_same(const struct x86_state *a, const struct x86_state *b)
{
    SAME(a, b, gpr); SAME(a, b, rip); SAME(a, b, rflags);
    for (unsigned i = 0; i < 6; i++) {
        SAME(a, b, seg[i].base);
        SAME(a, b, seg[i].selector);
        /* Of an unusable segment nothing but base and selector counts. */
        assert_int_equal(!!(a->seg[i].attr & SEG_UNUSABLE) || !(a->seg[i].attr & SEG_P),
                         !!(b->seg[i].attr & SEG_UNUSABLE) || !(b->seg[i].attr & SEG_P));
        if (!(a->seg[i].attr & SEG_UNUSABLE)) {
            SAME(a, b, seg[i].attr);
            SAME(a, b, seg[i].limit);
        }
    }
    SAME(a, b, ldtr.base); SAME(a, b, ldtr.limit); SAME(a, b, ldtr.selector);
    SAME(a, b, tr.base); SAME(a, b, tr.limit); SAME(a, b, tr.selector); SAME(a, b, tr.attr);
    SAME(a, b, gdt.base); SAME(a, b, gdt.limit); SAME(a, b, idt.base); SAME(a, b, idt.limit);
    SAME(a, b, cr0); SAME(a, b, cr2); SAME(a, b, cr3); SAME(a, b, cr4); SAME(a, b, xcr0); SAME(a, b, efer);
    SAME(a, b, dr); SAME(a, b, dr6); SAME(a, b, dr7);
    SAME(a, b, star); SAME(a, b, lstar); SAME(a, b, cstar); SAME(a, b, sfmask); SAME(a, b, kernel_gs_base);
    SAME(a, b, sysenter_cs); SAME(a, b, sysenter_esp); SAME(a, b, sysenter_eip);
    SAME(a, b, pat); SAME(a, b, tsc_aux); SAME(a, b, misc_enable); SAME(a, b, spec_ctrl);
    SAME(a, b, mtrr_def_type); SAME(a, b, mtrr_fixed); SAME(a, b, mtrr_base); SAME(a, b, mtrr_mask);
    SAME(a, b, tsc_adjust); SAME(a, b, kvm_wall_clock); SAME(a, b, kvm_system_time);
    SAME(a, b, interrupt_shadow); SAME(a, b, nmi_blocked); SAME(a, b, nmi_pending); SAME(a, b, activity);
    if (exact_tsc)
        SAME(a, b, tsc_offset);
    SAME(a, b, fpu.zmm); SAME(a, b, fpu.k); SAME(a, b, fpu.st); SAME(a, b, fpu.fcw); SAME(a, b, fpu.fsw); SAME(a, b, fpu.ftw);
    SAME(a, b, fpu.fop); SAME(a, b, fpu.fip); SAME(a, b, fpu.fdp); SAME(a, b, fpu.mxcsr);
}

/* Through one engine, the other, and the first again. */
static void go_round(const struct x86_state *x)
{
    struct x86_state *got = aligned_alloc(64, align_up(sizeof(*got), 64));

    guest->engine->import_state(&guest->vcpu, x);
    for (unsigned i = 0; i < 3; i++) {
        guest->engine->export_state(&guest->vcpu, got);
        assert_same(x, got);
        switch_engine();
    }
    free(got);
}

static void test_registers(void **state)
{
    make_distinct(s);
    for (unsigned i = 0; i < 2; i++) {
        struct x86_state got;

        guest->engine->import_state(&guest->vcpu, s);
        guest->engine->export_state(&guest->vcpu, &got);
        exact_tsc &= got.tsc_offset == s->tsc_offset;
        switch_engine();
    }
    go_round(s);
    s->fpu = (struct x86_fpu){ .fcw = 0x37f, .mxcsr = 0x1f80 };
    go_round(s);
    s->fpu.mxcsr = 0x7f80;
    go_round(s);
    x86_state_reset(s, true);
    go_round(s);
}

static void test_events(void **state)
{
    s->rip = address(wait);
    for (unsigned activity = X86_RUNNING; activity <= X86_SHUTDOWN; activity++) {
        s->activity = (uint8_t)activity;
        go_round(s);
    }
    s->activity = X86_RUNNING;
    s->rflags |= RFLAGS_IF;
    s->interrupt_shadow = 1;
    go_round(s);
    s->interrupt_shadow = 0;
    s->nmi_blocked = true;
    go_round(s);
    s->nmi_pending = true;
    go_round(s);
}

/* ---- in the middle of computing ---- */

#define ROUNDS 2000000u
#define MULTIPLIER 6364136223846793005u
#define INCREMENT 1442695040888963407u

/* The same here. Memory: 256 words, and then XMM1 and the x87 counter. */
static uint64_t expected(uint64_t memory[259])
{
    uint64_t rax = 1, rbx = 2, low = 0, high = 0;

    memset(memory, 0, 259 * 8);
    for (unsigned i = 0; i < ROUNDS; i++) {
        uint32_t d[4];

        rax = rax * MULTIPLIER + INCREMENT;
        memory[(rax >> 33 & 0x7f8) / 8] ^= rax;
        rbx = (rbx << 7 | rbx >> 57) ^ memory[(rax >> 33 & 0x7f8) / 8];
        low += rax;
        memcpy(d, &low, 8);
        memcpy(d + 2, &high, 8);
        low = d[1] | (uint64_t)d[2] << 32;
        high = d[3] | (uint64_t)d[0] << 32;
    }
    memory[256] = low;
    memory[257] = high;
    memory[258] = ROUNDS;
    return rbx;
}

/* Kicks the vCPU after some time, again and again. */
struct kicker {
    pthread_t thread;
    _Atomic bool stop;
    pthread_mutex_t lock;       /* the engine does not change while it is held */
    _Atomic uint64_t switch_ns; /* what the last change of the engine took */
};

static uint64_t now_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000 + (uint64_t)ts.tv_nsec;
}

static void *kick(void *opaque)
{
    struct kicker *k = opaque;

    for (unsigned i = 0; !atomic_load(&k->stop); i++) {
        /* Long enough for the guest to get somewhere, also on a slow host. */
        uint64_t ns = 200000 + (i * 7919 % 23) * 100000 + 2 * atomic_load(&k->switch_ns);
        struct timespec pause = { .tv_sec = (time_t)(ns / 1000000000), .tv_nsec = (long)(ns % 1000000000) };

        nanosleep(&pause, NULL);
        pthread_mutex_lock(&k->lock);
        if (!atomic_load(&k->stop))
            guest->engine->kick(&guest->vcpu);
        pthread_mutex_unlock(&k->lock);
    }
    return NULL;
}

/* Runs with kicks until done(); changes the engine each time that it is out. */
static unsigned run_kicked(bool (*done)(void))
{
    struct kicker k = { .lock = PTHREAD_MUTEX_INITIALIZER };
    unsigned switches = 0;

    assert_int_equal(pthread_create(&k.thread, NULL, kick, &k), 0);
    for (;;) {
        enum guest_end end = engine_guest_run(guest, s);

        if (end != GUEST_ENDED || done() || switches > 100000)
            break;
        uint64_t start = now_ns();
        pthread_mutex_lock(&k.lock);
        switch_engine();
        pthread_mutex_unlock(&k.lock);
        atomic_store(&k.switch_ns, now_ns() - start);
        switches++;
    }
    pthread_mutex_lock(&k.lock);
    atomic_store(&k.stop, true);
    pthread_mutex_unlock(&k.lock);
    pthread_join(k.thread, NULL);
    return switches;
}

static struct guest_exception last;

static bool in_handler(void) { return engine_guest_exception(guest, s, &last); }

static void test_compute(void **state)
{
    static uint64_t memory[259];
    gpa_t user_code = CODE_GPA, user_data = DATA_GPA;
    unsigned switches = 0;
    uint64_t rbx = expected(memory);

    engine_guest_map(guest, 0x10000000, user_code, PTE_U);
    engine_guest_map(guest, 0x20000000, user_data, PTE_U | PTE_W | PTE_NX);
    /* On a busy host it may be done before it has been interrupted. */
    for (unsigned attempt = 0; attempt < 20 && switches <= 2; attempt++) {
        memset(guest->ram + DATA_GPA, 0, sizeof(memory));
        s->seg[SEG_CS] = engine_guest_segment(guest, SEL_CODE64);
        s->seg[SEG_SS] = engine_guest_segment(guest, SEL_DATA);
        s->rip = 0x10000000 + (uint64_t)(compute - code);
        s->gpr[RAX] = 1;
        s->gpr[RBX] = 2;
        s->gpr[RCX] = ROUNDS;
        s->gpr[RDI] = 0x20000000;
        s->gpr[R8] = MULTIPLIER;
        s->gpr[R9] = INCREMENT;
        memset(s->fpu.zmm, 0, sizeof(s->fpu.zmm));
        switches = run_kicked(in_handler);
        assert_true(in_handler());
        if (last.vector != X86_UD)
            fail_msg("%s: exception %u, error %x, at %llx after %u switches", engines[turn], last.vector, last.error,
                     (unsigned long long)last.rip, switches);
        assert_int_equal(s->gpr[RBX], rbx);
        assert_memory_equal(guest->ram + DATA_GPA, memory, sizeof(memory));
    }
    printf("%u rounds, %u switches\n", ROUNDS, switches);
    assert_true(switches > 2);
}

/* ---- timers ---- */

#define TICKS 60

static bool all_ticks(void) { return counter(0) >= TICKS; }

static void count_ticks(uint32_t lvt, uint64_t sil)
{
    uint64_t start = clock_now(guest->machine.clock);
    struct lapic *l = guest->vcpu.lapic;

    enable_apic();
    lapic_msr_write(l, 0x83e, 0xb);             /* by 1: a nanosecond */
    lapic_msr_write(l, 0x832, lvt | LOW_VECTOR);
    s->rip = address(ticks);
    s->gpr[RBX] = TICKS;
    s->gpr[RSI] = sil;
    s->gpr[R8] = 1000000;
    if (lvt >> 17 == 2)
        lapic_set_tsc_deadline(l, tsc_read() + s->tsc_offset + 1000000, tsc_read() + s->tsc_offset);
    else
        lapic_msr_write(l, 0x838, 1000000);
    run_kicked(all_ticks);
    assert_true(all_ticks());
    /* None comes too early; how late they are is up to the host's load. */
    if (lvt >> 17 == 1)
        assert_true(clock_now(guest->machine.clock) - start >= (TICKS - 2) * 1000000ull);
}

static void test_periodic(void **state) { count_ticks(1u << 17, 0); }
static void test_one_shot(void **state) { count_ticks(0, 1); }
static void test_deadline(void **state) { count_ticks(2u << 17, 2); }

/* ---- interrupts on their way ---- */

static void test_pending(void **state)
{
    enable_apic();
    s->rip = address(interrupts);
    run();                      /* both are requested */
    assert_int_equal(counter(0) + counter(1), 0);
    switch_engine();
    run();                      /* in the middle of the more important one */
    assert_int_equal(counter(1), 1);
    assert_int_equal(counter(2), 0);
    switch_engine();
    run();                      /* after both */
    assert_int_equal(counter(0), 1);
    assert_int_equal(counter(1), 1);
}

static void ioapic_write(unsigned reg, uint32_t value)
{
    bus_write(&guest->machine.mmio, IOAPIC_BASE, reg, 4);
    bus_write(&guest->machine.mmio, IOAPIC_BASE + 0x10, value, 4);
}

static void test_level(void **state)
{
    enable_apic();
    ioapic_write(0x11 + 2 * DEVICE_GSI, 0);
    ioapic_write(0x10 + 2 * DEVICE_GSI, LEVEL_VECTOR | 1u << 15);
    s->rip = address(wait_level);
    for (unsigned i = 1; i <= 4; i++) {
        s->gpr[RBX] = i;
        raise_line();
        run();                  /* in the handler, which has not served the device yet */
        assert_int_equal(counter(3), i);
        if ((i & 1) && faithful)
            switch_engine();
        run();                  /* has, and has ended the interrupt */
        assert_int_equal(counter(3), i);
        if (i & 2)
            switch_engine();
    }
}

static bool halted(void) { return s->activity == X86_HALTED; }

static void test_halted(void **state)
{
    enable_apic();
    s->rip = address(wait);
    for (unsigned i = 0; i < 4; i++) {
        uint64_t before = counter(0);

        run_kicked(halted);
        assert_true(halted());
        switch_engine();
        irqchip_msi(guest->chip, LAPIC_DEFAULT_BASE, LOW_VECTOR);
        run();
        assert_int_equal(counter(0), before + 1);
    }
}

static void test_nmi(void **state)
{
    enable_apic();
    lapic_msr_write(guest->vcpu.lapic, 0x836, 0x400);
    s->rip = address(wait_nmi);
    run_kicked(halted);
    assert_true(halted());
    switch_engine();
    guest->engine->export_state(&guest->vcpu, s);
    irqchip_pulse_lint1(guest->chip);
    guest->engine->export_state(&guest->vcpu, s);
    assert_true(s->nmi_pending);
    switch_engine();
    guest->engine->export_state(&guest->vcpu, s);
    run();
    assert_int_equal(counter(4), 1);
    assert_true(s->nmi_blocked);
    switch_engine();
    irqchip_msi(guest->chip, LAPIC_DEFAULT_BASE, LOW_VECTOR);
    run();                      /* IRET, and the other interrupt */
    assert_false(s->nmi_blocked);
    assert_int_equal(counter(0), 1);
}

/* ---- pages that were written ---- */

static bool page_dirty(gpa_t gpa)
{
    static uint64_t bitmap[GUEST_RAM_SIZE / GUEST_PAGE_SIZE / 64];
    uint64_t *const bitmaps[] = { bitmap };
    uint64_t page = gpa / GUEST_PAGE_SIZE, bit = 1ull << page % 64;
    bool dirty;

    assert_int_equal(memory_dirty_fetch(&guest->machine.memory, bitmaps), 0);
    dirty = bitmap[page / 64] & bit;
    bitmap[page / 64] &= ~bit;
    return dirty;
}

static void test_dirty(void **state)
{
    enable_apic();
    assert_int_equal(memory_dirty_start(&guest->machine.memory), 0);
    s->rip = address(interrupts);
    run();
    page_dirty(DATA_GPA);
    page_dirty(STACK_GPA);
    page_dirty(CODE_GPA);       /* KVM may count a page as written that it only could have been */
    run();                      /* writes the counters and the stack */
    assert_true(page_dirty(DATA_GPA));
    assert_true(page_dirty(STACK_GPA));
    assert_false(page_dirty(CODE_GPA));
    assert_false(page_dirty(DATA_GPA));
    switch_engine();
    run();
    assert_true(page_dirty(DATA_GPA));
    memory_dirty_stop(&guest->machine.memory);
}

int main(int argc, char **argv)
{
#define TEST(name) cmocka_unit_test_setup_teardown(test_##name, setup, teardown)
#define TEST_REAL(name) cmocka_unit_test_setup_teardown(test_##name, setup_real, teardown)
    const struct CMUnitTest tests[] = {
        TEST(registers), TEST(events), TEST(compute), TEST_REAL(periodic), TEST_REAL(one_shot), TEST_REAL(deadline),
        TEST(pending), TEST(level), TEST(halted), TEST(nmi), TEST(dirty),
    };

    for (int i = 1; i < argc && i < 3; i++) {
        struct engine_report report = { 0 };
        const struct engine *e = engine_find(argv[i]);

        engines[i - 1] = argv[i];
        if (e)
            e->probe(&report);
        if (e == &kvm_engine && !report.fast)
            faithful = false;
        if (!report.usable) {
            printf("skipped: %s: %s\n", argv[i], e ? report.text : "no such engine");
            return e ? 77 : 2;
        }
    }
    if (argc < 3)
        return 2;
    if (argc > 3)
        cmocka_set_test_filter(argv[3]);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
