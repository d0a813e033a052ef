/*
 * One process that watches another one's instructions (ptrace), and processes that come and go.
 */
#define _GNU_SOURCE
#include "probe.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

static volatile uint64_t traced_sum, traced_other;

/* The child's: sum += 3 n times, in a loop whose places are known; then it ends with 0 if the sum is what it must be. */
void traced_loop(uint64_t n);
extern const uint8_t traced_begin[], traced_add[], traced_end[];
__asm__(".text; traced_loop: traced_begin: mov %rdi, %rcx; 1: traced_add: addq $3, traced_sum(%rip); dec %rcx; jnz 1b; traced_end: ret");

static pid_t begin(uint64_t n)
{
    pid_t child = split();

    if (!child) {
        traced_sum = 0;
        if (ptrace(PTRACE_TRACEME, 0, NULL, NULL))
            _exit(2);
        raise(SIGSTOP);
        traced_loop(n);
        traced_other = 1;
        _exit(traced_sum == 3 * n ? 0 : 1);
    }
    int status;
    if (waitpid(child, &status, 0) != child || !WIFSTOPPED(status) || WSTOPSIG(status) != SIGSTOP)
        wrong("the child did not stop: %x", (unsigned)status);
    return child;
}

static struct user_regs_struct go(pid_t child, int how)
{
    struct user_regs_struct regs;
    int status;

    if (ptrace(how, child, NULL, NULL) || waitpid(child, &status, 0) != child || !WIFSTOPPED(status) || WSTOPSIG(status) != SIGTRAP)
        wrong("the child ended with %x instead of a trap", (unsigned)status);
    if (ptrace(PTRACE_GETREGS, child, NULL, &regs))
        wrong("PTRACE_GETREGS: %s", strerror(errno));
    return regs;
}

static void finish(pid_t child)
{
    if (ptrace(PTRACE_CONT, child, NULL, NULL))
        wrong("PTRACE_CONT: %s", strerror(errno));
    join(child);
}

static void poke(pid_t child, const void *at, uint8_t byte)
{
    long word;

    errno = 0;
    word = ptrace(PTRACE_PEEKTEXT, child, at, NULL);
    if (errno || ptrace(PTRACE_POKETEXT, child, at, (word & ~0xffl) | byte))
        wrong("PTRACE_POKETEXT: %s", strerror(errno));
}

static struct user_regs_struct to_begin(pid_t child)
{
    uint8_t old = *traced_begin;

    poke(child, traced_begin, 0xcc);
    struct user_regs_struct regs = go(child, PTRACE_CONT);
    if (regs.rip != (uintptr_t)traced_begin + 1)
        wrong("the breakpoint stopped at %llx", regs.rip);
    poke(child, traced_begin, old);
    regs.rip--;
    if (ptrace(PTRACE_SETREGS, child, NULL, &regs))
        wrong("PTRACE_SETREGS: %s", strerror(errno));
    return regs;
}

void part_trace_steps(uint64_t round)
{
    uint64_t n = 5 + round % 5, steps = 0;
    pid_t child = begin(n);
    struct user_regs_struct regs = to_begin(child);

    while (regs.rip != (uintptr_t)traced_end) {
        if (regs.rip < (uintptr_t)traced_begin || regs.rip > (uintptr_t)traced_end || steps > 100)
            wrong("step %llu is at %llx", (unsigned long long)steps, regs.rip);
        if ((regs.rip - (uintptr_t)traced_add) == 0 && steps && regs.rcx != n - (steps - 1) / 3)
            wrong("at step %llu RCX is %llu", (unsigned long long)steps, regs.rcx);
        regs = go(child, PTRACE_SINGLESTEP);
        steps++;
    }
    if (steps != 1 + 3 * n)
        wrong("%llu steps instead of %llu", (unsigned long long)steps, (unsigned long long)(1 + 3 * n));
    finish(child);
}

void part_trace_breakpoints(uint64_t round)
{
    uint64_t n = 4 + round % 3;
    pid_t child = begin(n);
    uint8_t old = *traced_add;
    struct user_regs_struct regs = to_begin(child);

    /* A breakpoint in the loop that is stepped over each time. */
    for (uint64_t i = 0; i < n; i++) {
        poke(child, traced_add, 0xcc);
        regs = go(child, PTRACE_CONT);
        if (regs.rip != (uintptr_t)traced_add + 1 || regs.rcx != n - i)
            wrong("breakpoint %llu is at %llx with %llu", (unsigned long long)i, regs.rip, regs.rcx);
        poke(child, traced_add, old);
        regs.rip--;
        ptrace(PTRACE_SETREGS, child, NULL, &regs);
        regs = go(child, PTRACE_SINGLESTEP);
        if (regs.rip != (uintptr_t)traced_add + 8)
            wrong("behind breakpoint %llu is %llx", (unsigned long long)i, regs.rip);
    }
    finish(child);
    /* Put into code that runs. */
    child = begin(1ull << 60);
    if (ptrace(PTRACE_CONT, child, NULL, NULL))
        wrong("PTRACE_CONT: %s", strerror(errno));
    for (unsigned i = 0; i < 3; i++) {
        int status;

        usleep(2000);           /* it runs until it is stopped */
        kill(child, SIGSTOP);
        if (waitpid(child, &status, 0) != child || !WIFSTOPPED(status) || WSTOPSIG(status) != SIGSTOP)
            wrong("a running child stopped with %x", (unsigned)status);
        poke(child, traced_add, 0xcc);
        regs = go(child, PTRACE_CONT);
        if (regs.rip != (uintptr_t)traced_add + 1)
            wrong("a breakpoint in running code stopped at %llx", regs.rip);
        poke(child, traced_add, old);
        regs.rip--;
        if (i == 2)
            regs.rip = (uintptr_t)traced_end;
        ptrace(PTRACE_SETREGS, child, NULL, &regs);
        if (i < 2 && ptrace(PTRACE_CONT, child, NULL, NULL))
            wrong("PTRACE_CONT: %s", strerror(errno));
    }
    kill(child, SIGKILL);
    int status;
    if (waitpid(child, &status, 0) != child || !WIFSIGNALED(status))
        wrong("a killed child ended with %x", (unsigned)status);
}

static void debug_register(pid_t child, unsigned n, uint64_t value)
{
    if (ptrace(PTRACE_POKEUSER, child, offsetof(struct user, u_debugreg) + n * 8, value)) {
        if (errno == EOPNOTSUPP || errno == EBUSY || errno == ENOSPC)
            lacking("debug registers");
        else
            wrong("PTRACE_POKEUSER of debug register %u: %s", n, strerror(errno));
    }
}

void part_trace_watch(uint64_t round)
{
    uint64_t n = 3 + round % 3;
    pid_t child = begin(n);
    struct user_regs_struct regs = to_begin(child);

    debug_register(child, 0, (uintptr_t)&traced_sum);
    debug_register(child, 7, 0x1 | 0xdul << 16);                /* 8 bytes are written: a trap behind it */
    for (uint64_t i = 0; i < n; i++) {
        regs = go(child, PTRACE_CONT);
        errno = 0;
        uint64_t dr6 = (uint64_t)ptrace(PTRACE_PEEKUSER, child, offsetof(struct user, u_debugreg) + 6 * 8, NULL);
        uint64_t sum = (uint64_t)ptrace(PTRACE_PEEKDATA, child, &traced_sum, NULL);
        if (regs.rip != (uintptr_t)traced_add + 8 || !(dr6 & 1) || sum != 3 * (i + 1))
            wrong("a write that is watched: RIP %llx, DR6 %llx, sum %llu", regs.rip, (unsigned long long)dr6, (unsigned long long)sum);
    }
    debug_register(child, 7, 0);
    finish(child);

    child = begin(n);
    to_begin(child);
    debug_register(child, 1, (uintptr_t)traced_add);
    debug_register(child, 7, 0x4);                              /* it is executed: a fault before it */
    for (uint64_t i = 0; i < n; i++) {
        regs = go(child, PTRACE_CONT);
        if (regs.rip != (uintptr_t)traced_add || regs.rcx != n - i)
            wrong("an instruction that is watched: RIP %llx, RCX %llu", regs.rip, regs.rcx);
    }
    debug_register(child, 7, 0);
    finish(child);
}

/* Address spaces that come and go, most of them with tables where the last one's were. */
void part_exec(uint64_t round)
{
    static int child_waits = 7;

    for (unsigned i = 0; i < 4; i++) {
        char number[16];
        int status;
        pid_t child;

        snprintf(number, sizeof(number), "%u", (unsigned)(round * 4 + i) % 100);
        child = i % 2 ? vfork() : split();
        if (!child) {
            if (!(i % 2))
                child_waits = 9;
            execl("/proc/self/exe", "probe", "executed", number, (char *)NULL);
            _exit(101);
        }
        if (child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status) || WEXITSTATUS(status) != atoi(number))
            wrong("what was executed ended with %x instead of %s", (unsigned)status, number);
    }
    if (child_waits != 7)
        wrong("a child's variable is here");
}
