/* The sandbox of direct execution: what it promises its user. What attacks it: test_sandbox_attacks.c. */
#include "sandbox_box.h"

#include <cpuid.h>
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/util.h"

/* ---- stops and registers ---- */

GUEST(does_int80, "mov $20, %rax; int $0x80; ud2");
GUEST(reads_nowhere, "mov $0x123456789abc, %rbx; nop; mov (%rbx), %rax");
GUEST(writes_code, "lea does_ud(%rip), %rax; movl $0, 0x400004");
GUEST(jumps_nowhere, "mov $0x123456789abc, %rax; jmp *%rax");
GUEST(does_hlt, "nop; hlt");
GUEST(does_ud, "nop; ud2");
GUEST(divides, "xor %ecx, %ecx; div %ecx");
GUEST(reads_tsc, "nop; rdtsc");
GUEST(non_canonical, "mov $0x8000000000000000, %rax; mov (%rax), %rax");
GUEST(does_int1, "nop; .byte 0xf1; ud2");
GUEST(does_int_3, "nop; .byte 0xcd, 3; ud2");
GUEST(steps, "pushfq; orl $0x100, (%rsp); popfq; nop; ud2");
GUEST(misaligns, "pushfq; orl $0x40000, (%rsp); popfq; mov $0x600001, %eax; mov (%rax), %ebx");

static void stops(void **state)
{
    static const struct {
        const char *name;
        const uint8_t *code, *end;
        enum sandbox_stop stop;
        uint64_t rip, address;
    } cases[] = {
#define CASE(name, stop, ...) { #name, name, name##_end, stop, __VA_ARGS__ }
        CASE(does_syscall, SANDBOX_SYSCALL, 12), CASE(does_int80, SANDBOX_SYSCALL, 9), CASE(reads_nowhere, SANDBOX_PAGE_FAULT, 11, 0x123456789abc),
        CASE(writes_code, SANDBOX_PAGE_FAULT, 7, 0x400004), CASE(jumps_nowhere, SANDBOX_PAGE_FAULT, 0x123456789abc - CODE, 0x123456789abc),
        CASE(does_hlt, SANDBOX_FAULT, 1), CASE(does_ud, SANDBOX_FAULT, 1), CASE(divides, SANDBOX_FAULT, 2), CASE(reads_tsc, SANDBOX_FAULT, 1),
        CASE(non_canonical, SANDBOX_FAULT, 10), CASE(does_int3, SANDBOX_BREAKPOINT, 2), CASE(does_int1, SANDBOX_BREAKPOINT, 2),
        CASE(does_int_3, SANDBOX_BREAKPOINT, 3), CASE(steps, SANDBOX_STEPPED, 10), CASE(misaligns, SANDBOX_FAULT, 14),
    };
    struct box *b = *state;

    for (unsigned i = 0; i < ARRAY_SIZE(cases); i++) {
        uint64_t address = 0;
        enum sandbox_stop stop;

        start_at(b, cases[i].code, cases[i].end);
        stop = sandbox_run(b->s, &address);
        if (stop != cases[i].stop || sandbox_regs(b->s)->rip != CODE + cases[i].rip || address != cases[i].address)
            fail_msg("%s: stop %d at %llx, address %" PRIx64, cases[i].name, (int)stop, sandbox_regs(b->s)->rip, address);
    }
    START(b, does_syscall);
    assert_int_equal(run(b), SANDBOX_SYSCALL);
    assert_int_equal(sandbox_regs(b->s)->orig_rax, 0x1122334455667788);
    START(b, does_int80);
    assert_int_equal(run(b), SANDBOX_SYSCALL);
    assert_int_equal(sandbox_regs(b->s)->orig_rax, 20);
}

GUEST(inverts, "not %rax; not %rbx; not %rcx; not %rdx; not %rsi; not %rdi; not %rbp; not %rsp; not %r8; not %r9; not %r10; not %r11;"
      "not %r12; not %r13; not %r14; not %r15; int3");
GUEST(reads_bases, "mov %fs:8, %rax; mov %gs:16, %rbx; int3");

static void registers(void **state)
{
    struct box *b = *state;
    struct user_regs_struct *r = sandbox_regs(b->s), was;

    START(b, inverts);
    r->rax = 1, r->rbx = 2, r->rcx = 3ull << 60, r->rdx = 4, r->rsi = 5, r->rdi = 6, r->rbp = 7, r->rsp = 8;
    r->r8 = 9, r->r9 = 10, r->r10 = 11, r->r11 = 12, r->r12 = 13, r->r13 = 14, r->r14 = 15, r->r15 = 16;
    r->eflags = 0x2 | 0x8d5 | 0x400;
    r->fs_base = DATA, r->gs_base = 0x7fffffffe000;
    was = *r;
    assert_int_equal(run(b), SANDBOX_BREAKPOINT);
#define INVERTED(name) assert_int_equal(r->name, ~was.name)
    INVERTED(rax), INVERTED(rbx), INVERTED(rcx), INVERTED(rdx), INVERTED(rsi), INVERTED(rdi), INVERTED(rbp), INVERTED(rsp);
    INVERTED(r8), INVERTED(r9), INVERTED(r10), INVERTED(r11), INVERTED(r12), INVERTED(r13), INVERTED(r14), INVERTED(r15);
    assert_int_equal(r->eflags & 0xdd7, was.eflags & 0xdd7);
    assert_int_equal(r->fs_base, was.fs_base);
    assert_int_equal(r->gs_base, was.gs_base);
    assert_int_equal(r->cs, 0x33);
    assert_int_equal(r->ss, 0x2b);
    assert_int_equal(r->ds | r->es | r->fs | r->gs, 0);

    memcpy(b->ram + PAGE + 8, &(uint64_t){ 0x1234 }, 8);
    memcpy(b->ram + PAGE + 16, &(uint64_t){ 0x5678 }, 8);
    START(b, reads_bases);
    r->fs_base = r->gs_base = DATA;
    assert_int_equal(run(b), SANDBOX_BREAKPOINT);
    assert_int_equal(r->rax, 0x1234);
    assert_int_equal(r->rbx, 0x5678);
}

GUEST(toggles, "pushfq; xorl $0x204c00, (%rsp); popfq; pushfq; pop %rax; int3");
GUEST(steps_syscall, "pushfq; orl $0x100, (%rsp); popfq; syscall; nop; nop; ud2");

/* Those that ptrace does not set, too; and single steps are the guest's, not those of our code. */
static void flags(void **state)
{
    struct box *b = *state;
    struct user_regs_struct *r = sandbox_regs(b->s);

    for (unsigned i = 0; i < 2; i++) {
        START(b, toggles);
        assert_int_equal(run(b), SANDBOX_BREAKPOINT);
        assert_int_equal(r->rax & 0x204c00, 0x204c00);
        assert_int_equal(r->eflags & 0x204c00, 0x204c00);
        START(b, toggles);
        r->eflags |= 0x200000;
        assert_int_equal(run(b), SANDBOX_BREAKPOINT);
        assert_int_equal(r->eflags & 0x204c00, 0x4c00);
    }
    START(b, steps_syscall);
    assert_int_equal(run(b), SANDBOX_SYSCALL);
    assert_int_equal(r->eflags & 0x100, 0x100);
    for (unsigned i = 0; i < 2; i++) {
        sandbox_map(b->s, 0x50000000, PAGE, 0, 0, PROT_READ);
        assert_int_equal(sandbox_commit(b->s), 0);
        assert_int_equal(run(b), SANDBOX_STEPPED);
        assert_int_equal(r->rip, CODE + 12 + i);
    }
    START(b, does_int3);
    assert_int_equal(run(b), SANDBOX_BREAKPOINT);
}

GUEST(loads_ds, "mov $0x28, %eax; mov %eax, %ds; mov $77, %rbx; mov 0x123456789abc, %al");
GUEST(loads_fs_base, "mov $0xffff888000000000, %rax; wrfsbase %rax; mov $78, %rbx; mov 0x123456789abc, %al");

/* Code gets into states that it cannot be continued in from outside: that is no end of it, and what it computed is there. */
static void refused(void **state)
{
    struct box *b = *state;
    uint64_t address = 0;

    START(b, loads_ds);
    assert_int_equal(sandbox_run(b->s, &address), SANDBOX_PAGE_FAULT);
    assert_int_equal(sandbox_regs(b->s)->ds, 0x28);
    assert_int_equal(run(b), SANDBOX_REFUSED);
    assert_int_equal(sandbox_regs(b->s)->rbx, 77);
    assert_int_equal(sandbox_get_vectors(b->s), 0);
    if (getauxval(AT_HWCAP2) & 2) {
        START(b, loads_fs_base);
        assert_int_equal(sandbox_run(b->s, &address), SANDBOX_PAGE_FAULT);
        assert_int_equal(sandbox_regs(b->s)->fs_base, 0xffff888000000000);
        assert_int_equal(run(b), SANDBOX_REFUSED);
        assert_int_equal(sandbox_regs(b->s)->rbx, 78);
    }
    START(b, does_int3);
    assert_int_equal(run(b), SANDBOX_BREAKPOINT);
}

/* ---- vectors ---- */

GUEST(adds_xmm, "paddd %xmm0, %xmm0; fld1; int3");
GUEST(stores_zmm31, "mov $0x600000, %eax; vmovdqu64 %zmm31, (%rax); vpaddd %zmm31, %zmm31, %zmm31; int3");

static uint64_t host_components(void)
{
    uint32_t a, c, d, low, high;

    __cpuid(1, a, low, c, d);
    if (!(c & bit_OSXSAVE))
        return 3;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low | (uint64_t)high << 32;
}

static unsigned place_of(unsigned component)
{
    uint32_t a, b, c, d;

    __cpuid_count(0xd, component, a, b, c, d);
    return b;
}

static void vectors(void **state)
{
    struct box *b = *state;
    uint64_t bv;
    size_t size;
    uint8_t *v = sandbox_vectors(b->s, &size);

    assert_true(size >= 576);
    /* MXCSR, XMM0 to XMM15, and ST(0) that the code makes. */
    memset(v, 0, size);
    *(uint64_t *)(void *)(v + 512) = 3;
    *(uint16_t *)(void *)v = 0x37f;
    *(uint32_t *)(void *)(v + 24) = 0x9f80;
    for (unsigned i = 0; i < 256; i++)
        v[160 + i] = (uint8_t)(i & 0x7f);
    assert_int_equal(sandbox_set_vectors(b->s), 0);
    START(b, adds_xmm);
    assert_int_equal(run(b), SANDBOX_BREAKPOINT);
    memset(v, 0xee, size);
    assert_int_equal(sandbox_get_vectors(b->s), 0);
    assert_int_equal(*(uint32_t *)(void *)(v + 24), 0x9f80);
    for (unsigned i = 0; i < 256; i++)
        assert_int_equal(v[160 + i], i < 16 ? 2 * i : i & 0x7f);
    assert_memory_equal(v + 32, ((uint8_t[]){ 0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f }), 10);

    if ((host_components() & 0xe7) != 0xe7) {
        print_message("no AVX-512 here\n");
        return;
    }
    /* ZMM31, and a mask. */
    memset(v, 0, size);
    *(uint64_t *)(void *)(v + 512) = 0xe7;
    *(uint16_t *)(void *)v = 0x37f;
    *(uint32_t *)(void *)(v + 24) = 0x1f80;
    v[place_of(5)] = 0x55;
    for (unsigned i = 0; i < 64; i++)
        v[place_of(7) + 15 * 64 + i] = (uint8_t)(i + 1);
    assert_int_equal(sandbox_set_vectors(b->s), 0);
    START(b, stores_zmm31);
    assert_int_equal(run(b), SANDBOX_BREAKPOINT);
    assert_int_equal(sandbox_get_vectors(b->s), 0);
    assert_int_equal(v[place_of(5)], 0x55);
    for (unsigned i = 0; i < 64; i++) {
        assert_int_equal(b->ram[PAGE + i], i + 1);
        assert_int_equal(v[place_of(7) + 15 * 64 + i], 2 * (i + 1));
    }
    /* An image of a guest that has less leaves nothing of what there was. */
    bv = 7;
    memset(v, 0, size);
    memcpy(v + 512, &bv, 8);
    *(uint16_t *)(void *)v = 0x37f;
    *(uint32_t *)(void *)(v + 24) = 0x1f80;
    assert_int_equal(sandbox_set_vectors(b->s), 0);
    START(b, stores_zmm31);
    assert_int_equal(run(b), SANDBOX_BREAKPOINT);
    for (unsigned i = 0; i < 64; i++)
        assert_int_equal(b->ram[PAGE + i], 0);
    /* One that is not sound is refused, and does no harm. */
    memset(v, 0xff, size);
    assert_true(sandbox_set_vectors(b->s) < 0);
    assert_int_equal(sandbox_get_vectors(b->s), 0);
}

/* ---- memory ---- */

static void mapping(void **state)
{
    struct box *b = *state;
    static char maps[1 << 16];
    const uint64_t va = 0x10000000;
    unsigned before;

    for (unsigned i = 0; i < FILE_PAGES; i++)
        memcpy(b->ram + i * PAGE, &(uint64_t){ i }, 8);
    read_maps(b, maps, sizeof(maps));
    before = lines(maps);
    /* Neighbours are one mapping, where place, file and rights fit. */
    for (unsigned i = 0; i < 8; i++)
        assert_true(sandbox_map(b->s, va + i * PAGE, PAGE, 0, (16 + i) * PAGE, PROT_READ));
    assert_true(sandbox_map(b->s, va + 8 * PAGE, PAGE, 0, 24 * PAGE, PROT_READ | PROT_WRITE));
    assert_true(sandbox_map(b->s, va + 9 * PAGE, PAGE, 0, 40 * PAGE, PROT_READ | PROT_WRITE));
    assert_int_equal(sandbox_commit(b->s), 0);
    read_maps(b, maps, sizeof(maps));
    assert_int_equal(lines(maps), before + 3);
    for (unsigned i = 0; i < 10; i++) {
        assert_int_equal(touch(b, va + i * PAGE, false), SANDBOX_BREAKPOINT);
        assert_int_equal(sandbox_regs(b->s)->rax, i == 9 ? 40 : 16 + i);
        assert_int_equal(touch(b, va + i * PAGE, true), i < 8 ? SANDBOX_PAGE_FAULT : SANDBOX_BREAKPOINT);
    }
    assert_int_equal(b->ram[24 * PAGE], 0x77);
    /* Other rights, another place, away, in this order. */
    assert_true(sandbox_map(b->s, va, PAGE, 0, 16 * PAGE, PROT_READ | PROT_WRITE));
    assert_true(sandbox_map(b->s, va + PAGE, PAGE, 0, 50 * PAGE, PROT_READ));
    assert_true(sandbox_unmap(b->s, va + 2 * PAGE, PAGE));
    assert_true(sandbox_unmap(b->s, va + 3 * PAGE, PAGE));
    assert_true(sandbox_map(b->s, va + 3 * PAGE, PAGE, 0, 51 * PAGE, PROT_READ));
    assert_int_equal(sandbox_commit(b->s), 0);
    assert_int_equal(touch(b, va, true), SANDBOX_BREAKPOINT);
    assert_int_equal(touch(b, va + PAGE, false), SANDBOX_BREAKPOINT);
    assert_int_equal(sandbox_regs(b->s)->rax, 50);
    assert_int_equal(touch(b, va + 2 * PAGE, false), SANDBOX_PAGE_FAULT);
    assert_int_equal(touch(b, va + 3 * PAGE, false), SANDBOX_BREAKPOINT);
    assert_int_equal(sandbox_regs(b->s)->rax, 51);
    /* A page of data does not execute. */
    START(b, does_int3);
    sandbox_regs(b->s)->rip = va;
    assert_int_equal(run(b), SANDBOX_PAGE_FAULT);
}

/* More at once than the list has room for, none of them neighbours. */
static void many_mappings(void **state)
{
    struct box *b = *state;
    const uint64_t va = 0x20000000;

    for (unsigned i = 0; i < FILE_PAGES; i++)
        memcpy(b->ram + i * PAGE, &(uint64_t){ i }, 8);
    for (unsigned i = 0; i < 3000; i++)
        assert_true(sandbox_map(b->s, va + 2 * i * PAGE, PAGE, 0, (FILE_PAGES - 1 - i) * PAGE, PROT_READ));
    assert_int_equal(sandbox_commit(b->s), 0);
    for (unsigned i = 0; i < 3000; i += 7) {
        assert_int_equal(touch(b, va + 2 * i * PAGE, false), SANDBOX_BREAKPOINT);
        assert_int_equal(sandbox_regs(b->s)->rax, FILE_PAGES - 1 - i);
        assert_int_equal(touch(b, va + (2 * i + 1) * PAGE, false), SANDBOX_PAGE_FAULT);
    }
}

static void clearing(void **state)
{
    struct box *b = *state;

    sandbox_map(b->s, SANDBOX_BEGIN, PAGE, 0, 0, PROT_READ);
    sandbox_map(b->s, SANDBOX_END - PAGE, PAGE, 0, 0, PROT_READ);
    sandbox_map(b->s, b->ours - PAGE, PAGE, 0, 0, PROT_READ);
    sandbox_map(b->s, b->ours + 17 * PAGE, PAGE, 0, 0, PROT_READ);
    assert_int_equal(sandbox_commit(b->s), 0);
    assert_int_equal(touch(b, SANDBOX_BEGIN, false), SANDBOX_BREAKPOINT);
    assert_int_equal(touch(b, SANDBOX_END - PAGE, false), SANDBOX_BREAKPOINT);
    assert_int_equal(touch(b, b->ours - PAGE, false), SANDBOX_BREAKPOINT);
    assert_int_equal(touch(b, b->ours + 17 * PAGE, false), SANDBOX_BREAKPOINT);
    sandbox_clear(b->s);
    assert_int_equal(sandbox_commit(b->s), 0);
    assert_only_ours(b);
    START(b, does_int3);
    assert_int_equal(run(b), SANDBOX_PAGE_FAULT);
    /* What came before it is not done, what comes after it is. */
    sandbox_map(b->s, DATA, PAGE, 0, 0, PROT_READ);
    sandbox_clear(b->s);
    sandbox_map(b->s, CODE, PAGE, 0, 0, PROT_READ | PROT_EXEC);
    assert_int_equal(sandbox_commit(b->s), 0);
    assert_int_equal(touch(b, DATA, false), SANDBOX_PAGE_FAULT);
    assert_int_equal(touch(b, CODE, false), SANDBOX_BREAKPOINT);
}

static void over_ours(void **state)
{
    struct box *b = *state;

    assert_false(sandbox_map(b->s, b->ours, PAGE, 0, 0, PROT_READ | PROT_WRITE));
    assert_false(sandbox_map(b->s, b->ours - PAGE, 2 * PAGE, 0, 0, PROT_READ | PROT_WRITE));
    assert_false(sandbox_map(b->s, b->ours + 16 * PAGE, 2 * PAGE, 0, 0, PROT_READ));
    assert_false(sandbox_unmap(b->s, b->ours + PAGE, PAGE));
    assert_false(sandbox_unmap(b->s, SANDBOX_BEGIN, SANDBOX_END - SANDBOX_BEGIN));
    assert_int_equal(sandbox_commit(b->s), 0);
    sandbox_clear(b->s);
    assert_int_equal(sandbox_commit(b->s), 0);
    assert_only_ours(b);
}

static void failing(void **state)
{
    struct box *b = *state;
    const uint64_t va = 0x20000000;

    /* There is no second file. Nothing behind that is done, also when the list was full meanwhile. */
    sandbox_map(b->s, va, PAGE, 0, 0, PROT_READ);
    sandbox_map(b->s, va + 2 * PAGE, PAGE, 1, 0, PROT_READ);
    for (unsigned i = 2; i < 2000; i++)
        sandbox_map(b->s, va + 2 * i * PAGE, PAGE, 0, 0, PROT_READ);
    assert_int_equal(sandbox_commit(b->s), -EBADF);
    assert_int_equal(touch(b, va, false), SANDBOX_BREAKPOINT);
    for (unsigned i = 1; i < 2000; i += 37)
        assert_int_equal(touch(b, va + 2 * i * PAGE, false), SANDBOX_PAGE_FAULT);
    assert_int_equal(sandbox_commit(b->s), 0);
    /* Taking everything away also takes away what failed. */
    for (unsigned i = 0; i < 2000; i++)
        sandbox_map(b->s, va + 2 * i * PAGE, PAGE, 1, 0, PROT_READ);
    sandbox_clear(b->s);
    assert_int_equal(sandbox_commit(b->s), 0);
    assert_only_ours(b);
}

/* ---- interrupts ---- */

/* Also when pages are mapped in between. */
static void interrupt_before(void **state)
{
    struct box *b = *state;

    START(b, spins);
    sandbox_interrupt(sandbox_handle(b->s));
    assert_int_equal(run(b), SANDBOX_INTERRUPTED);
    sandbox_interrupt(sandbox_handle(b->s));
    sandbox_map(b->s, 0x50000000, PAGE, 0, 0, PROT_READ);
    assert_int_equal(sandbox_commit(b->s), 0);
    assert_int_equal(run(b), SANDBOX_INTERRUPTED);
    START(b, does_int3);
    assert_int_equal(run(b), SANDBOX_BREAKPOINT);
}

static void interrupt_running(void **state)
{
    struct box *b = *state;
    struct other o = { b, 0 };

    for (unsigned i = 0; i < 20; i++) {
        pthread_t thread;

        b->ram[PAGE] = 0;
        START(b, tells);
        assert_int_equal(pthread_create(&thread, NULL, when_it_runs, &o), 0);
        assert_int_equal(run(b), SANDBOX_INTERRUPTED);
        pthread_join(thread, NULL);
        assert_in_range(sandbox_regs(b->s)->rip, CODE, CODE + 16);
    }
    assert_true(sandbox_time(b->s) > 0);
}

/* ---- life and death ---- */

static pid_t told[2];           /* a pipe's ends */

static void *lives_shortly(void *opaque)
{
    struct box *b = opaque;

    return open_box(b) ? b : NULL;
}

static void dies_with_thread(void **state)
{
    struct box b = { 0 };
    pthread_t thread;
    siginfo_t info;
    void *made;

    assert_int_equal(pthread_create(&thread, NULL, lives_shortly, &b), 0);
    pthread_join(thread, &made);
    assert_non_null(made);
    assert_int_equal(waitid(P_PID, (id_t)sandbox_pid(b.s), &info, WEXITED | WNOWAIT), 0);
    assert_int_equal(info.si_code, CLD_KILLED);
    assert_int_equal(info.si_status, SIGKILL);
    assert_int_equal(run(&b), SANDBOX_DEAD);
    close_box(&b);
}

struct owner {
    struct box box;
    pthread_barrier_t made, destroyed;
    bool ok;
};

static void *makes_one(void *opaque)
{
    struct owner *o = opaque;

    o->ok = open_box(&o->box) && works(&o->box);
    pthread_barrier_wait(&o->made);
    pthread_barrier_wait(&o->destroyed);
    return NULL;
}

/* While the thread that made it lives on. */
static void destroyed_by_other(void **state)
{
    struct owner o = { .ok = false };
    pthread_t thread;
    pid_t pid;

    pthread_barrier_init(&o.made, NULL, 2);
    pthread_barrier_init(&o.destroyed, NULL, 2);
    assert_int_equal(pthread_create(&thread, NULL, makes_one, &o), 0);
    pthread_barrier_wait(&o.made);
    assert_true(o.ok);
    pid = sandbox_pid(o.box.s);
    close_box(&o.box);
    assert_int_equal(kill(pid, 0), -1);
    assert_int_equal(errno, ESRCH);
    pthread_barrier_wait(&o.destroyed);
    pthread_join(thread, NULL);
}

static void dies_with_process(void **state)
{
    struct box b = { 0 };
    pid_t pid, box;
    int status;

    /* So that it comes to us when its parent is dead. */
    assert_int_equal(prctl(PR_SET_CHILD_SUBREAPER, 1), 0);
    assert_int_equal(pipe(told), 0);
    pid = fork();
    if (pid == 0) {
        if (!open_box(&b))
            _exit(1);
        START(&b, spins);
        box = sandbox_pid(b.s);
        if (write(told[1], &box, sizeof(box)) != sizeof(box))
            _exit(1);
        for (;;)
            run(&b);
    }
    close(told[1]);
    assert_int_equal(read(told[0], &box, sizeof(box)), sizeof(box));
    close(told[0]);
    assert_int_equal(kill(pid, SIGKILL), 0);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_int_equal(waitpid(box, &status, 0), box);
    assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
}

static void many(void **state)
{
    struct box boxes[24] = { 0 };

    for (unsigned i = 0; i < ARRAY_SIZE(boxes); i++)
        assert_true(open_box(&boxes[i]));
    for (unsigned k = 0; k < 10; k++)
        for (unsigned i = 0; i < ARRAY_SIZE(boxes); i++)
            assert_true(works(&boxes[i]));
    /* None holds anything of the others'. */
    for (unsigned i = 0; i < ARRAY_SIZE(boxes); i++)
        assert_int_equal(files_of(sandbox_pid(boxes[i].s)), 1);
    for (unsigned i = 0; i < ARRAY_SIZE(boxes); i++)
        close_box(&boxes[i]);
}

static void no_leaks(void **state)
{
    unsigned before = files_of(getpid());
    struct sandbox *s;
    int files[SANDBOX_FILES + 1] = { 0 };

    for (unsigned i = 0; i < 10; i++) {
        struct box b = { 0 };

        assert_true(open_box(&b));
        assert_true(works(&b));
        close_box(&b);
    }
    /* What cannot be made leaves nothing, either. */
    assert_int_equal(sandbox_create(&s, files, SANDBOX_FILES + 1), -EINVAL);
    assert_true(sandbox_create(&s, (int[]){ 1 << 20 }, 1) < 0);
    assert_int_equal(files_of(getpid()), before);
    assert_int_equal(waitpid(-1, NULL, WNOHANG | __WALL), -1);
    assert_int_equal(errno, ECHILD);
}

static int few_files_child(void)
{
    struct rlimit limit = { 40, 40 };
    struct box b = { 0 };

    if (setrlimit(RLIMIT_NOFILE, &limit))
        return 1;
    /* All that there are are used but four: guest RAM, and what making a sandbox takes. */
    while (dup(2) >= 0)
        ;
    close(20), close(21), close(22), close(23);
    b.file = make_file(&b.ram);
    if (b.file < 0 || sandbox_create(&b.s, &b.file, 1) || files_of(sandbox_pid(b.s)) > 1)
        return 2;
    sandbox_map(b.s, CODE, PAGE, 0, 0, PROT_READ | PROT_EXEC);
    return sandbox_commit(b.s) == 0 && works(&b) ? 0 : 3;
}

static void few_files(void **state) { in_child(few_files_child); }

static int no_stdio_child(void)
{
    struct box b = { 0 };

    close(0), close(1), close(2);
    if (!open_box(&b) || !works(&b) || files_of(sandbox_pid(b.s)) != 1)
        return 1;
    close_box(&b);
    return 0;
}

static void no_stdio(void **state) { in_child(no_stdio_child); }

/* Regions that are no files have none. */
static void missing_file(void **state)
{
    uint8_t *ram = NULL;
    int file = make_file(&ram);
    struct sandbox *s;

    assert_int_equal(sandbox_create(&s, (int[]){ -1, file, -1 }, 3), 0);
    assert_int_equal(files_of(sandbox_pid(s)), 1);
    sandbox_map(s, CODE, PAGE, 1, 0, PROT_READ);
    assert_int_equal(sandbox_commit(s), 0);
    sandbox_map(s, CODE, PAGE, 0, 0, PROT_READ);
    assert_int_equal(sandbox_commit(s), -EBADF);
    sandbox_destroy(s);
    munmap(ram, FILE_PAGES * PAGE);
    close(file);
}

static int ignores_children_child(void)
{
    struct box b = { 0 };

    signal(SIGCHLD, SIG_IGN);
    signal(SIGUSR1, SIG_IGN);
    if (!open_box(&b) || !works(&b))
        return 1;
    sandbox_interrupt(sandbox_handle(b.s));
    START(&b, spins);
    if (run(&b) != SANDBOX_INTERRUPTED)
        return 2;
    kill(sandbox_pid(b.s), SIGKILL);
    if (run(&b) != SANDBOX_DEAD)
        return 3;
    close_box(&b);
    return 0;
}

static void ignored_signals(void **state) { in_child(ignores_children_child); }

static void *makes_boxes(void *opaque)
{
    for (unsigned i = 0; i < 12; i++) {
        struct box b = { 0 };
        bool ok = open_box(&b) && works(&b) && files_of(sandbox_pid(b.s)) == 1;

        close_box(&b);
        if (!ok)
            return NULL;
    }
    return opaque;
}

static void many_threads(void **state)
{
    pthread_t thread[8];
    void *ok;

    for (unsigned i = 0; i < ARRAY_SIZE(thread); i++)
        assert_int_equal(pthread_create(&thread[i], NULL, makes_boxes, thread), 0);
    for (unsigned i = 0; i < ARRAY_SIZE(thread); i++) {
        pthread_join(thread[i], &ok);
        assert_ptr_equal(ok, thread);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        WITH_BOX(stops), WITH_BOX(registers), WITH_BOX(flags), WITH_BOX(refused), WITH_BOX(vectors), WITH_BOX(mapping),
        WITH_BOX(many_mappings), WITH_BOX(clearing), WITH_BOX(over_ours), WITH_BOX(failing), WITH_BOX(interrupt_before),
        WITH_BOX(interrupt_running), cmocka_unit_test(dies_with_thread), cmocka_unit_test(dies_with_process),
        cmocka_unit_test(destroyed_by_other), cmocka_unit_test(many), cmocka_unit_test(no_leaks),
        cmocka_unit_test(few_files), cmocka_unit_test(no_stdio), cmocka_unit_test(missing_file),
        cmocka_unit_test(ignored_signals), cmocka_unit_test(many_threads),
    };

    if (!sandbox_abilities()->usable) {
        fprintf(stderr, "skipped: %s\n", sandbox_abilities()->text);
        return 77;
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
