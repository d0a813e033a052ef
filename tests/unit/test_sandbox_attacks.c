/* The sandbox of direct execution: what it must not let guest code do, and what others on the host may do to it. What it promises: test_sandbox.c. */
#include "sandbox_box.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/util.h"

/* ---- what guest code must not do ---- */

static void confined(void **state)
{
    struct box *b = *state;
    static char text[8192];
    char path[64], target[64] = "", wanted[32];

    read_text(sandbox_pid(b->s), "status", text, sizeof(text));
    snprintf(wanted, sizeof(wanted), "\nTracerPid:\t%d\n", (int)gettid());
    assert_non_null(strstr(text, wanted));
    assert_non_null(strstr(text, "\nSeccomp:\t2\n"));
    assert_non_null(strstr(text, "\nNoNewPrivs:\t1\n"));
    assert_non_null(strstr(text, "Name:\tringfort-user\n"));
    assert_non_null(strstr(text, "\nThreads:\t1\n"));
    assert_int_equal(files_of(sandbox_pid(b->s)), 1);
    snprintf(path, sizeof(path), "/proc/%d/fd/4", (int)sandbox_pid(b->s));
    assert_true(readlink(path, target, sizeof(target) - 1) > 0);
    assert_non_null(strstr(target, "guest-ram"));
    sandbox_clear(b->s);
    assert_int_equal(sandbox_commit(b->s), 0);
    assert_only_ours(b);
}

/* RAX to R9 are what mmap(0x30000000, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, 4, 0x5000) takes. */
static void attack_registers(struct box *b)
{
    struct user_regs_struct *r = sandbox_regs(b->s);

    r->rax = SYS_mmap, r->rdi = 0x30000000, r->rsi = PAGE, r->rdx = PROT_READ | PROT_WRITE, r->r10 = MAP_SHARED | MAP_FIXED, r->r8 = 4, r->r9 = 0x5000;
    r->rbx = DATA, r->rbp = 1;  /* the list of "batch": ours, where the same call is written down */
    memcpy(b->ram + PAGE, ((uint64_t[]){ SYS_mmap, 0x30000000, PAGE, 3, MAP_SHARED | MAP_FIXED, 4, 0x5000 }), 56);
}

GUEST(attacks_syscall, "1: syscall; jmp 1b");
GUEST(attacks_int80, "mov $192, %eax; mov $0x30000000, %ebx; mov $4096, %ecx; mov $3, %edx; mov $0x11, %esi; mov $4, %edi; mov $5, %ebp;"
      "1: int $0x80; mov $192, %eax; jmp 1b");
GUEST(attacks_sysenter, "mov $192, %eax; mov $0x30000000, %ebx; mov $4096, %ecx; mov $3, %edx; mov $0x11, %esi; mov $4, %edi; lea -64(%rsp), %rbp;"
      "movl $5, (%rbp); sysenter");
GUEST(attacks_far, "movl $0x400010, (%rsp); movl $0x23, 4(%rsp); ljmp *(%rsp); .code32; .balign 16, 0x90; mov $192, %eax; mov $0x30000000, %ebx;"
      "mov $4096, %ecx; mov $3, %edx; mov $0x11, %esi; mov $4, %edi; mov $5, %ebp; 1: int $0x80; mov $192, %eax; jmp 1b; .code64");
GUEST(attacks_far_syscall, "movl $0x400010, (%rsp); movl $0x23, 4(%rsp); ljmp *(%rsp); .code32; .balign 16, 0x90; mov $192, %eax; mov $0x30000000, %ebx;"
      "mov $4096, %ecx; mov $3, %edx; mov $0x11, %esi; mov $4, %edi; mov %esp, %ebp; movl $5, (%ebp); 1: syscall; sysenter; .code64");
GUEST(attacks_page, "jmp *%r15");
GUEST(attacks_vsyscall, "mov $0xffffffffff600000, %r15; mov $0x600800, %edi; mov $0x600900, %esi; call *%r15; int3");

static void assert_nothing_happened(struct box *b, const char *maps, const char *name)
{
    static char now[1 << 16];

    read_maps(b, now, sizeof(now));
    if (strcmp(maps, now) != 0)
        fail_msg("after %s mapped is:\n%sand was:\n%s", name, now, maps);
    assert_int_equal(files_of(sandbox_pid(b->s)), 1);
}

static void system_calls(void **state)
{
    static const struct {
        const char *name;
        const uint8_t *code, *end;
        int place;              /* in the page of ours, -1: none */
    } attacks[] = {
        { "syscall", attacks_syscall, attacks_syscall_end, -1 }, { "int 0x80", attacks_int80, attacks_int80_end, -1 },
        { "sysenter", attacks_sysenter, attacks_sysenter_end, -1 }, { "int 0x80 in 32-bit code", attacks_far, attacks_far_end, -1 },
        { "syscall in 32-bit code", attacks_far_syscall, attacks_far_syscall_end, -1 },
        { "once", attacks_page, attacks_page_end, 0 }, { "batch", attacks_page, attacks_page_end, 8 }, { "its call", attacks_page, attacks_page_end, 35 }, { "its end", attacks_page, attacks_page_end, 37 },
    };
    static char maps[1 << 16];
    struct box *b = *state;

    read_maps(b, maps, sizeof(maps));
    for (unsigned i = 0; i < ARRAY_SIZE(attacks); i++) {
        bool reported = false;

        start_at(b, attacks[i].code, attacks[i].end);
        attack_registers(b);
        sandbox_regs(b->s)->r15 = b->ours + 120 + (uint64_t)attacks[i].place;
        /* And again from where it stopped. */
        for (unsigned k = 0; k < 4; k++) {
            enum sandbox_stop stop = run(b);

            reported = reported || stop == SANDBOX_SYSCALL;
            assert_int_not_equal(stop, SANDBOX_GONE);
            assert_nothing_happened(b, maps, attacks[i].name);
            sandbox_regs(b->s)->rax = SYS_mmap;
        }
        /* SYSENTER and the 32-bit ones are none on all processors. */
        if (attacks[i].place < 37 && (attacks[i].place >= 0 || i < 2))
            assert_true(reported);
        /* Nor does one wait to be made when our own code runs. */
        assert_true(sandbox_unmap(b->s, 0x40000000, PAGE));
        assert_int_equal(sandbox_commit(b->s), 0);
        assert_nothing_happened(b, maps, attacks[i].name);
    }
    /* The page that the kernel emulates calls for: whatever it says of it, nothing is written, and RIP is there or at the call. */
    memset(b->ram + PAGE, 0, PAGE);
    START(b, attacks_vsyscall);
    for (unsigned k = 0; k < 3; k++) {
        enum sandbox_stop stop = run(b);

        assert_true(stop == SANDBOX_FAULT || stop == SANDBOX_PAGE_FAULT);
        assert_int_equal(sandbox_regs(b->s)->rip, 0xffffffffff600000);
        assert_int_equal(sandbox_regs(b->s)->rsp, STACK + PAGE - 8);
        for (unsigned i = 0; i < PAGE; i++)
            assert_int_equal(b->ram[PAGE + i], 0);
    }
}

GUEST(asks_pid, "mov $39, %eax; syscall; ud2");
GUEST(asks_pid_int80, "mov $20, %eax; int $0x80; ud2");

/* What it stops with when it is continued as no code of the guest's ever is. */
static int stop_without_emulation(struct box *b, struct user_regs_struct *r)
{
    int status;

    r->orig_rax = ~0ull;
    assert_int_equal(ptrace(PTRACE_SETREGS, sandbox_pid(b->s), NULL, r), 0);
    assert_int_equal(ptrace(PTRACE_CONT, sandbox_pid(b->s), NULL, NULL), 0);
    assert_int_equal(waitpid(sandbox_pid(b->s), &status, __WALL), sandbox_pid(b->s));
    assert_true(WIFSTOPPED(status));
    assert_int_equal(ptrace(PTRACE_GETREGS, sandbox_pid(b->s), NULL, r), 0);
    return WSTOPSIG(status);
}

/* The filter holds by itself. */
static void filter(void **state)
{
    struct box *b = *state;
    struct user_regs_struct *r = sandbox_regs(b->s);

    START(b, asks_pid);
    assert_int_equal(stop_without_emulation(b, r), SIGSYS);
    START(b, asks_pid_int80);
    assert_int_equal(stop_without_emulation(b, r), SIGSYS);
    /* Not from the page of ours, either, but for mapping. */
    START(b, asks_pid);
    r->rip = b->ours + 120, r->rax = SYS_getpid;
    assert_int_equal(stop_without_emulation(b, r), SIGSYS);
    START(b, asks_pid);
    r->rip = b->ours + 120, r->rax = SYS_mprotect, r->rdi = DATA, r->rsi = PAGE, r->rdx = PROT_READ | PROT_WRITE | PROT_EXEC;
    assert_int_equal(stop_without_emulation(b, r), SIGSYS);
    START(b, asks_pid);
    r->rip = b->ours + 120, r->rax = SYS_munmap, r->rdi = DATA, r->rsi = PAGE;
    assert_int_equal(stop_without_emulation(b, r), SIGTRAP);
    assert_int_equal(r->rax, 0);
    START(b, does_int3);
    assert_int_equal(run(b), SANDBOX_BREAKPOINT);
}

/* The list is for reading, the page of ours for executing. */
static void ours_is_not_written(void **state)
{
    struct box *b = *state;

    assert_int_equal(touch(b, b->ours, true), SANDBOX_PAGE_FAULT);
    assert_int_equal(touch(b, b->ours + PAGE, true), SANDBOX_PAGE_FAULT);
    assert_int_equal(touch(b, b->ours + 17 * PAGE - 8, true), SANDBOX_PAGE_FAULT);
    assert_int_equal(touch(b, b->ours + 17 * PAGE, false), SANDBOX_PAGE_FAULT);
    assert_int_equal(touch(b, b->ours - PAGE, false), SANDBOX_PAGE_FAULT);
}

/* ---- what somebody else on the host does to it ---- */

struct storm {
    pid_t pid;
    atomic_bool stop;
    unsigned sent;
};

/* All that do not kill, from the process and from the thread, without end. */
static void *storm(void *opaque)
{
    static const int signals[] = { SIGSTOP, SIGCONT, SIGTERM, SIGINT, SIGUSR1, SIGTRAP, SIGSEGV, SIGSYS, SIGILL, SIGBUS, SIGTSTP, SIGCHLD, SIGHUP, 40 };
    struct storm *s = opaque;

    while (!atomic_load(&s->stop)) {
        int signal = signals[s->sent % ARRAY_SIZE(signals)];

        if (s->sent++ & 1)
            kill(s->pid, signal);
        else
            syscall(SYS_tgkill, s->pid, s->pid, signal);
        if (s->sent % 5 == 0)
            sched_yield();
    }
    return NULL;
}

GUEST(counts, "mov $300000, %ecx; 1: add $3, %rax; dec %ecx; jnz 1b; syscall");

static void signals(void **state)
{
    static const int each[] = { SIGSTOP, SIGCONT, SIGTERM, SIGINT, SIGUSR1, SIGSEGV, SIGTRAP, SIGBUS, SIGFPE, SIGILL, SIGSYS, SIGTSTP, SIGQUIT, SIGABRT };
    static char maps[1 << 16];
    struct box *b = *state;
    struct storm s = { .pid = sandbox_pid(b->s) };
    pthread_t thread;
    unsigned interrupted = 0;

    /* One by one: it is interrupted, once, and goes on. */
    for (unsigned i = 0; i < ARRAY_SIZE(each); i++) {
        START(b, does_int3);
        assert_int_equal(kill(s.pid, each[i]), 0);
        assert_int_equal(run(b), SANDBOX_INTERRUPTED);
        assert_int_equal(sandbox_regs(b->s)->rip, CODE);
        assert_int_equal(run(b), SANDBOX_BREAKPOINT);
    }
    /* All at once, while guest code computes and attacks, and pages come and go. */
    read_maps(b, maps, sizeof(maps));
    assert_int_equal(pthread_create(&thread, NULL, storm, &s), 0);
    for (unsigned i = 0; i < 300 || (!interrupted && i < 4000); i++) {
        const uint64_t va = 0x50000000 + (i & 7) * PAGE;
        enum sandbox_stop stop;

        assert_true(sandbox_map(b->s, va, PAGE, 0, (8 + i) * PAGE, PROT_READ));
        assert_int_equal(sandbox_commit(b->s), 0);
        memcpy(b->ram + (8 + i) * PAGE, &(uint64_t){ i }, 8);
        START(b, loads);
        sandbox_regs(b->s)->rdi = va;
        while ((stop = run(b)) == SANDBOX_INTERRUPTED)
            interrupted++;
        assert_int_equal(stop, SANDBOX_BREAKPOINT);
        assert_int_equal(sandbox_regs(b->s)->rax, i);
        assert_true(sandbox_unmap(b->s, va, PAGE));
        assert_int_equal(sandbox_commit(b->s), 0);
        START(b, attacks_syscall);
        for (unsigned k = 0; k < 20; k++) {
            attack_registers(b);
            stop = run(b);
            assert_true(stop == SANDBOX_SYSCALL || stop == SANDBOX_INTERRUPTED);
        }
        START(b, counts);
        while ((stop = run(b)) == SANDBOX_INTERRUPTED)
            interrupted++;
        assert_int_equal(stop, SANDBOX_SYSCALL);
        assert_int_equal(sandbox_regs(b->s)->orig_rax, 900000);
    }
    atomic_store(&s.stop, true);
    pthread_join(thread, NULL);
    assert_true(interrupted > 0);
    assert_nothing_happened(b, maps, "the storm");
}

static void assert_gone(struct box *b)
{
    assert_int_equal(run(b), SANDBOX_DEAD);
    sandbox_map(b->s, 0x50000000, PAGE, 0, 0, PROT_READ);
    assert_int_equal(sandbox_commit(b->s), -ESRCH);
    assert_int_equal(sandbox_get_vectors(b->s), -ESRCH);
    assert_int_equal(sandbox_set_vectors(b->s), -ESRCH);
    assert_true(sandbox_stop_at_cpuid(b->s, true) < 0);
}

static void killed(void **state)
{
    struct box *b = *state;
    struct other o = { b, SIGKILL };
    pthread_t thread;

    b->ram[PAGE] = 0;
    START(b, tells);
    assert_int_equal(pthread_create(&thread, NULL, when_it_runs, &o), 0);
    assert_int_equal(run(b), SANDBOX_GONE);
    pthread_join(thread, NULL);
    assert_int_equal(sandbox_pid(b->s), -1);
    assert_int_equal(sandbox_time(b->s), 0);
    assert_gone(b);
    close_box(b);
    /* While it stands. */
    assert_true(open_box(b));
    START(b, tells);
    kill(sandbox_pid(b->s), SIGKILL);
    assert_gone(b);
    close_box(b);
    /* While it is to map something. */
    assert_true(open_box(b));
    kill(sandbox_pid(b->s), SIGKILL);
    sandbox_map(b->s, 0x50000000, PAGE, 0, 0, PROT_READ);
    assert_int_equal(sandbox_commit(b->s), -ESRCH);
    assert_gone(b);
}

/* The first process of a namespace, whose others have the numbers that it gives them. */
static int number_reused_child(void)
{
    struct box b = { 0 };
    struct other o = { &b, SIGKILL };
    pthread_t thread;
    pid_t number, other;
    int status;

    b.file = make_file(&b.ram);
    if (b.file < 0 || sandbox_create(&b.s, &b.file, 1))
        return 1;
    number = sandbox_pid(b.s);
    sandbox_map(b.s, CODE, PAGE, 0, 0, PROT_READ | PROT_EXEC);
    sandbox_map(b.s, DATA, PAGE, 0, PAGE, PROT_READ | PROT_WRITE);
    START(&b, tells);
    if (sandbox_commit(b.s) || pthread_create(&thread, NULL, when_it_runs, &o) || run(&b) != SANDBOX_GONE || pthread_join(thread, NULL))
        return 2;
    other = (pid_t)syscall(SYS_clone3, &(struct clone_args){ .exit_signal = SIGCHLD, .set_tid = (uintptr_t)&number, .set_tid_size = 1 },
                           sizeof(struct clone_args));
    if (other == 0)
        for (;;)
            pause();
    if (other != number)
        return 3;
    errno = 77;
    sandbox_interrupt(sandbox_handle(b.s));
    sandbox_interrupt(-1);
    if (errno != 77)
        return 4;
    sandbox_destroy(b.s);
    /* A signal from there would have ended it before this one does. */
    kill(other, SIGTERM);
    return waitpid(other, &status, 0) == other && WIFSIGNALED(status) && WTERMSIG(status) == SIGTERM ? 0 : 5;
}

static int number_reused_parent(void)
{
    int status;
    pid_t first;

    if (unshare(CLONE_NEWPID))
        return 0;               /* not allowed here; as root it is */
    first = fork();
    if (first == 0)
        _exit(number_reused_child());
    return waitpid(first, &status, 0) == first ? WEXITSTATUS(status) : 1;
}

/* A sandbox is gone, and another process has its number. */
static void number_reused(void **state) { in_child(number_reused_parent); }

/* ---- stopped by somebody while it is being made ---- */

struct stopper {
    pid_t parent;
    bool continues;             /* else nobody but who makes the sandbox lets it go on */
    atomic_bool stop;
    unsigned stopped;
};

static void *stop_children(void *opaque)
{
    struct stopper *s = opaque;
    char path[64], text[256];

    snprintf(path, sizeof(path), "/proc/self/task/%d/children", (int)s->parent);
    while (!atomic_load(&s->stop)) {
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        ssize_t n = fd < 0 ? 0 : read(fd, text, sizeof(text) - 1);

        if (fd >= 0)
            close(fd);
        if (n > 0) {
            pid_t pid;

            text[n] = 0;
            pid = (pid_t)strtol(text, NULL, 10);
            s->stopped += pid > 0 && kill(pid, SIGSTOP) == 0;
            /* Before it is traced that really stops it. */
            if (pid > 0 && s->continues)
                kill(pid, SIGCONT);
            else
                sched_yield();
        }
    }
    return NULL;
}

static void be_born(bool continues)
{
    struct stopper s = { .parent = gettid(), .continues = continues };
    pthread_t thread;

    assert_int_equal(pthread_create(&thread, NULL, stop_children, &s), 0);
    for (unsigned i = 0; i < 60; i++) {
        struct sandbox *box;

        assert_int_equal(sandbox_create(&box, NULL, 0), 0);
        sandbox_destroy(box);
    }
    atomic_store(&s.stop, true);
    pthread_join(thread, NULL);
    print_message("stopped %u times\n", s.stopped);
}

static void stopped_at_birth(void **state) { be_born(true); }

static void stopped_for_good(void **state) { be_born(false); }

int main(void)
{
    const struct CMUnitTest tests[] = {
        WITH_BOX(confined), WITH_BOX(system_calls), WITH_BOX(filter), WITH_BOX(ours_is_not_written), WITH_BOX(signals),
        WITH_BOX(killed), cmocka_unit_test(number_reused), cmocka_unit_test(stopped_at_birth),
        cmocka_unit_test(stopped_for_good),
    };

    if (!sandbox_abilities()->usable) {
        fprintf(stderr, "skipped: %s\n", sandbox_abilities()->text);
        return 77;
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
