/*
 * All registers at once, kept across everything that can come between: system calls, faults, signals, timers, other processes and threads.
 *
 * probe_registers (assembly below) loads every register of the processor, does one thing, and writes down what is there then.
 */
#define _GNU_SOURCE
#include "probe.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <ucontext.h>
#include <unistd.h>

enum { AX, BX, CX, DX, SI, DI, BP, R8, R9, R10, R11, R12, R13, R14, R15, GPRS };

struct registers {
    uint64_t gpr[GPRS];         /* 0 */
    uint64_t flags;             /* 120 */
    uint8_t x87[8][10];         /* 128 */
    uint32_t mxcsr;             /* 208 */
    uint16_t control, pad;      /* 212 */
    uint64_t fs_is_not_ours;    /* 216: to 224 */
    uint64_t mask[8];           /* 224 */
    uint8_t vector[32][64];     /* 288 */
} __attribute__((aligned(32)));
_Static_assert(offsetof(struct registers, vector) == 288 && offsetof(struct registers, mask) == 224, "the assembly knows them");

/* level: 0 SSE, 1 AVX, 2 AVX-512. The action is called with everything loaded and may change what its caller expects. */
void probe_registers(const struct registers *in, struct registers *out, void (*action)(void), int level);
void act_spin(void);
void act_syscall(void);
void act_int80(void);
void act_write(void);
void act_ud2(void);
void act_int3(void);
extern const uint8_t after_syscall[];

__asm__(
    ".text\n"
    "probe_registers:\n"
    " push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15\n"
    " sub $8, %rsp; stmxcsr (%rsp); fnstcw 4(%rsp)\n"
    " push %rcx; push %rsi; push %rdx\n"        /* action at (%rsp), out, level, control words */
    " fninit; fldcw 212(%rdi)\n"
    " fldt 198(%rdi); fldt 188(%rdi); fldt 178(%rdi); fldt 168(%rdi); fldt 158(%rdi); fldt 148(%rdi); fldt 138(%rdi); fldt 128(%rdi)\n"
    " ldmxcsr 208(%rdi)\n"
    " cmp $1, %ecx; je 1f; ja 2f\n"
    ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n movups 288+64*\\n(%rdi), %xmm\\n\n .endr\n jmp 3f\n"
    "1: .irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n vmovups 288+64*\\n(%rdi), %ymm\\n\n .endr\n jmp 3f\n"
    "2: .irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n"
    " vmovups 288+64*\\n(%rdi), %zmm\\n\n .endr\n"
    " .irp n,0,1,2,3,4,5,6,7\n kmovq 224+8*\\n(%rdi), %k\\n\n .endr\n"
    "3: push 120(%rdi)\n"
    " mov 0(%rdi),%rax; mov 8(%rdi),%rbx; mov 16(%rdi),%rcx; mov 24(%rdi),%rdx; mov 32(%rdi),%rsi; mov 48(%rdi),%rbp\n"
    " mov 56(%rdi),%r8; mov 64(%rdi),%r9; mov 72(%rdi),%r10; mov 80(%rdi),%r11; mov 88(%rdi),%r12; mov 96(%rdi),%r13\n"
    " mov 104(%rdi),%r14; mov 112(%rdi),%r15; mov 40(%rdi),%rdi\n"
    " popfq\n"
    " call *(%rsp)\n"
    " pushfq; push %rdi; mov 24(%rsp), %rdi\n"
    " mov %rax,0(%rdi); mov %rbx,8(%rdi); mov %rcx,16(%rdi); mov %rdx,24(%rdi); mov %rsi,32(%rdi); mov %rbp,48(%rdi)\n"
    " mov %r8,56(%rdi); mov %r9,64(%rdi); mov %r10,72(%rdi); mov %r11,80(%rdi); mov %r12,88(%rdi); mov %r13,96(%rdi)\n"
    " mov %r14,104(%rdi); mov %r15,112(%rdi); pop 40(%rdi); pop 120(%rdi); cld\n"
    " fstpt 128(%rdi); fstpt 138(%rdi); fstpt 148(%rdi); fstpt 158(%rdi); fstpt 168(%rdi); fstpt 178(%rdi); fstpt 188(%rdi); fstpt 198(%rdi)\n"
    " fnstcw 212(%rdi); stmxcsr 208(%rdi)\n"
    " pop %rdx; pop %rsi; pop %rcx\n"
    " cmp $1, %ecx; je 1f; ja 2f\n"
    ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n movups %xmm\\n, 288+64*\\n(%rdi)\n .endr\n jmp 3f\n"
    "1: .irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n vmovups %ymm\\n, 288+64*\\n(%rdi)\n .endr\n vzeroupper; jmp 3f\n"
    "2: .irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n"
    " vmovups %zmm\\n, 288+64*\\n(%rdi)\n .endr\n"
    " .irp n,0,1,2,3,4,5,6,7\n kmovq %k\\n, 224+8*\\n(%rdi)\n .endr\n vzeroupper\n"
    "3: ldmxcsr (%rsp); fninit; fldcw 4(%rsp); add $8, %rsp\n"
    " pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx; ret\n"
    "act_spin: loop act_spin; ret\n"            /* RCX is its time; no flags */
    "act_syscall: syscall\n after_syscall: ret\n"
    "act_write: mov %rax, (%rbx); mov %rbx, 2040(%rbx); ret\n"
    "act_ud2: ud2; ret\n"
    "act_int3: int3; ret\n");

#define FLAGS 0xcd5ull          /* CF PF AF ZF SF DF OF */

static void fill(struct registers *r, uint64_t *seed, int level)
{
    memset(r, 0, sizeof(*r));
    for (unsigned i = 0; i < GPRS; i++)
        r->gpr[i] = next(seed);
    r->flags = (next(seed) & FLAGS) | 0x202;
    for (unsigned i = 0; i < 8; i++) {
        uint64_t mantissa = next(seed) | 1ull << 63;
        uint16_t exponent = (uint16_t)((next(seed) & 0x8fff) | 0x1000);

        memcpy(r->x87[i], &mantissa, 8);
        memcpy(r->x87[i] + 8, &exponent, 2);
        r->mask[i] = level == 2 ? next(seed) : 0;
    }
    r->mxcsr = 0x1f80 | ((uint32_t)next(seed) & 0xe07f);
    r->control = (uint16_t)(0x37f | (next(seed) & 0xc00));
    for (unsigned i = 0; i < (level == 2 ? 32 : 16); i++)
        for (unsigned k = 0; k < (16u << level); k += 8) {
            uint64_t v = next(seed);

            memcpy(r->vector[i] + k, &v, 8);
        }
}

static void compare(const char *what, const struct registers *expected, const struct registers *r)
{
    static const char *const name[] = { "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
                                        "r15" };

    for (unsigned i = 0; i < GPRS; i++)
        if (r->gpr[i] != expected->gpr[i])
            wrong("%s: %s is %llx, not %llx", what, name[i], (unsigned long long)r->gpr[i], (unsigned long long)expected->gpr[i]);
    if (r->flags != expected->flags)
        wrong("%s: flags are %llx, not %llx", what, (unsigned long long)r->flags, (unsigned long long)expected->flags);
    for (unsigned i = 0; i < 8; i++) {
        if (memcmp(r->x87[i], expected->x87[i], 10))
            wrong("%s: st%u", what, i);
        if (r->mask[i] != expected->mask[i])
            wrong("%s: k%u is %llx, not %llx", what, i, (unsigned long long)r->mask[i], (unsigned long long)expected->mask[i]);
    }
    if (r->mxcsr != expected->mxcsr || r->control != expected->control)
        wrong("%s: MXCSR %x, not %x; control word %x, not %x", what, r->mxcsr, expected->mxcsr, r->control, expected->control);
    for (unsigned i = 0; i < 32; i++)
        for (unsigned k = 0; k < 64; k++)
            if (r->vector[i][k] != expected->vector[i][k])
                wrong("%s: byte %u of vector register %u is %x, not %x", what, k, i, r->vector[i][k], expected->vector[i][k]);
}

static volatile unsigned signals;
static uint8_t *fault_page;

/* Uses the vector registers, as the library's functions in a handler do. */
static void on_signal(int signal, siginfo_t *info, void *context)
{
    ucontext_t *u = context;
    char text[200];

    memset(text, signal, sizeof(text));
    __asm__ volatile("" ::"r"(text) : "memory");
    if (signal == SIGILL)
        u->uc_mcontext.gregs[REG_RIP] += 2;
    if (signal == SIGSEGV && (info->si_addr != fault_page || mprotect(fault_page, PAGE, PROT_READ | PROT_WRITE)))
        _exit(3);
    signals++;
}

static void handle(int signal)
{
    struct sigaction action = { .sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_RESTART };

    sigaction(signal, &action, NULL);
}

static void try_action(const char *what, void (*action)(void), struct registers *in, int level, uint64_t rax, bool syscall)
{
    struct registers out = { 0 }, expected;

    probe_registers(in, &out, action, level);
    expected = *in;
    expected.gpr[AX] = rax;
    if (syscall) {
        expected.gpr[CX] = (uint64_t)(uintptr_t)after_syscall;
        expected.gpr[R11] = in->flags;
    }
    compare(what, &expected, &out);
}

void part_registers(uint64_t round)
{
    uint64_t seed = round * 0x9e3779b97f4a7c15 + 77;
    uint64_t parent = (uint64_t)getppid();
    int level = vector_level();
    struct registers in;

    for (int l = 0; l <= level; l++) {
        struct registers out = { 0 }, expected;
        uint8_t *page = map(PAGE, PROT_READ | PROT_WRITE);

        fill(&in, &seed, l);
        in.gpr[CX] = 2000;
        expected = in;
        expected.gpr[CX] = 0;
        probe_registers(&in, &out, act_spin, l);
        compare("a loop", &expected, &out);

        fill(&in, &seed, l);
        in.gpr[AX] = SYS_getppid;
        try_action("SYSCALL", act_syscall, &in, l, parent, true);
        fill(&in, &seed, l);
        in.gpr[AX] = (uint64_t)-1;
        try_action("SYSCALL without a number", act_syscall, &in, l, (uint64_t)-38, true);
        fill(&in, &seed, l);
        in.gpr[AX] = SYS_sched_yield;
        try_action("sched_yield", act_syscall, &in, l, 0, true);
        fill(&in, &seed, l);
        in.gpr[AX] = 0xabcd000000000040;        /* getppid() of i386; half of RAX is not looked at */
        try_action("INT 0x80", act_int80, &in, l, parent, false);

        fill(&in, &seed, l);
        in.gpr[BX] = (uint64_t)(uintptr_t)page;
        try_action("a page that is new", act_write, &in, l, in.gpr[AX], false);
        if (memcmp(page, &in.gpr[AX], 8) || memcmp(page + 2040, &in.gpr[BX], 8))
            wrong("a page that is new holds something else");
        handle(SIGSEGV), handle(SIGILL), handle(SIGTRAP);
        signals = 0;
        fault_page = page;
        mprotect(page, PAGE, PROT_READ);
        fill(&in, &seed, l);
        in.gpr[BX] = (uint64_t)(uintptr_t)page;
        try_action("a fault that is handled", act_write, &in, l, in.gpr[AX], false);
        fill(&in, &seed, l);
        try_action("UD2", act_ud2, &in, l, in.gpr[AX], false);
        fill(&in, &seed, l);
        try_action("INT3", act_int3, &in, l, in.gpr[AX], false);
        if (signals != 3)
            wrong("%u signals instead of 3", signals);
        munmap(page, PAGE);
    }
    signal(SIGSEGV, SIG_DFL), signal(SIGILL, SIG_DFL), signal(SIGTRAP, SIG_DFL);
}

/* Where the x87's last instruction and operand were. */
void part_x87_pointers(uint64_t round)
{
    struct { uint32_t control, status, tag, instruction, selector_opcode, operand, operand_selector; } before, after;
    double value = (double)round;

    for (unsigned i = 0; i < 20; i++) {
        __asm__ volatile("fninit; fldl %2; faddl %2; fnstenv %0; fldenv %0;\n"
                         "mov $24, %%eax; syscall; mov %3, %%ecx; 1: loop 1b; mov $110, %%eax; syscall; fnstenv %1; fninit"
                         : "=m"(before), "=m"(after) : "m"(value), "r"(i * 20000 + 1) : "rax", "rcx", "r11", "memory");
        if (before.instruction != after.instruction || before.operand != after.operand || (before.tag & 0xffff) != (after.tag & 0xffff) ||
            (before.status & 0xffff) != (after.status & 0xffff))
            wrong("the x87's last instruction was at %x with %x, and is at %x with %x", before.instruction, before.operand, after.instruction,
                  after.operand);
    }
}

static void *spin(void *argument)
{
    uint64_t seed = (uint64_t)(uintptr_t)argument * 0x1234567 + 1;
    int level = vector_level();

    for (unsigned i = 0; i < 12; i++) {
        struct registers in, out = { 0 }, expected;

        fill(&in, &seed, level);
        in.gpr[CX] = i % 3 ? 1000 : 300000;
        expected = in;
        expected.gpr[CX] = 0;
        probe_registers(&in, &out, act_spin, level);
        compare("a loop beside others", &expected, &out);
        sched_yield();
    }
    return NULL;
}

/* Processes and threads that compute with all their registers, more than there are processors. */
void part_switches(uint64_t round)
{
    pthread_t thread[2];
    pid_t child = split();

    for (uintptr_t i = 0; i < 2; i++)
        pthread_create(&thread[i], NULL, spin, (void *)(i + 3 * round + (child ? 0 : 100)));
    spin((void *)(uintptr_t)(child ? round + 7 : round + 8));
    for (unsigned i = 0; i < 2; i++)
        pthread_join(thread[i], NULL);
    if (!child)
        _exit(0);
    join(child);
}

/* A timer's signals in the midst of it. */
void part_storm(uint64_t round)
{
    struct itimerval often = { { 0, 1000 }, { 0, 1000 } }, never = { 0 };
    uint64_t seed = round + 1, sum = 0;
    static uint64_t first;

    handle(SIGALRM);
    setitimer(ITIMER_REAL, &often, NULL);
    for (unsigned i = 0; i < 6; i++)
        spin((void *)(uintptr_t)(i + round));
    seed = 5;
    for (unsigned i = 0; i < 300000; i++)
        sum = sum * 31 + next(&seed);
    setitimer(ITIMER_REAL, &never, NULL);
    signal(SIGALRM, SIG_IGN);
    if (!round)
        first = sum;
    if (sum != first)
        wrong("a sum is %llx, not %llx", (unsigned long long)sum, (unsigned long long)first);
}
