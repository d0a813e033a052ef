/*
 * Exceptions: each with its signal, its address, its instruction and its error code, exactly.
 *
 * attempt() is for one thread at a time.
 */
#define _GNU_SOURCE
#include "probe.h"

#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#define MIDDLE 0x345678901000ull        /* of nowhere */
#define NON_CANONICAL 0x800000000000ull
#define KERNEL 0xffffffff81000000ull

volatile uint64_t rip_wanted;
static struct fault caught;
static sigjmp_buf back;

static void on_fault(int signal, siginfo_t *info, void *context)
{
    const greg_t *g = ((ucontext_t *)context)->uc_mcontext.gregs;

    caught = (struct fault){ .signal = signal, .code = info->si_code, .address = (uint64_t)(uintptr_t)info->si_addr,
                             .rip = (uint64_t)g[REG_RIP], .error = (uint64_t)g[REG_ERR], .trap = (uint64_t)g[REG_TRAPNO],
                             .cr2 = (uint64_t)g[REG_CR2], .rcx = (uint64_t)g[REG_RCX], .rsi = (uint64_t)g[REG_RSI],
                             .rdi = (uint64_t)g[REG_RDI] };
    siglongjmp(back, 1);
}

struct fault attempt(void (*f)(void *), void *argument)
{
    static const int signals[] = { SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP };
    struct sigaction action = { .sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK };
    static uint8_t *stack;

    if (!stack) {
        stack = map(65536, PROT_READ | PROT_WRITE);
        sigaltstack(&(stack_t){ .ss_sp = stack, .ss_size = 65536 }, NULL);
    }
    for (unsigned i = 0; i < sizeof(signals) / sizeof(signals[0]); i++)
        sigaction(signals[i], &action, NULL);
    memset(&caught, 0, sizeof(caught));
    rip_wanted = 0;
    if (!sigsetjmp(back, 1))
        f(argument);
    for (unsigned i = 0; i < sizeof(signals) / sizeof(signals[0]); i++)
        signal(signals[i], SIG_DFL);
    return caught;
}

static void tell(const char *what, const struct fault *f, const char *member, uint64_t is, uint64_t wanted)
{
    wrong("%s: %s is %llx, not %llx (signal %d, code %d, address %llx, RIP %llx, error %llx, trap %llx)", what, member,
          (unsigned long long)is, (unsigned long long)wanted, f->signal, f->code, (unsigned long long)f->address,
          (unsigned long long)f->rip, (unsigned long long)f->error, (unsigned long long)f->trap);
}

static void expect(const char *what, struct fault f, int signal, int code, uint64_t address, uint64_t trap, uint64_t error)
{
    if (f.signal != signal)
        tell(what, &f, "the signal", (uint64_t)f.signal, (uint64_t)signal);
    if (f.code != code)
        tell(what, &f, "the code", (uint64_t)(int64_t)f.code, (uint64_t)(int64_t)code);
    if (f.address != address)
        tell(what, &f, "the address", f.address, address);
    if (trap == 14 && f.cr2 != address)
        tell(what, &f, "CR2", f.cr2, address);
    if (f.trap != trap)
        tell(what, &f, "the trap", f.trap, trap);
    if (f.error != error)
        tell(what, &f, "the error code", f.error, error);
    if (rip_wanted && f.rip != rip_wanted)
        tell(what, &f, "RIP", f.rip, rip_wanted);
}

/* Where an exception has no address, the kernel shows none, or that of the instruction. */
#define NOWHERE 0
#define HERE rip_wanted

static void read_it(void *at) { __asm__ volatile(FAULTS_HERE "mov (%1), %%rax" : WANTED : "r"(at) : "rax", "memory"); }
static void write_it(void *at) { __asm__ volatile(FAULTS_HERE "movq $5, (%1)" : WANTED : "r"(at) : "rax", "memory"); }
static void add_it(void *at) { __asm__ volatile(FAULTS_HERE "lock addq $5, (%1)" : WANTED : "r"(at) : "rax", "memory"); }
static void read_16(void *at) { __asm__ volatile(FAULTS_HERE "movups (%1), %%xmm0" : WANTED : "r"(at) : "rax", "xmm0", "memory"); }
static uint64_t string_from;
static void move_to(void *at)
{
    static uint8_t from[4096];
    uint64_t count = sizeof(from);
    void *source = from;

    string_from = (uint64_t)(uintptr_t)from;
    __asm__ volatile(FAULTS_HERE "rep movsb" : WANTED, "+D"(at), "+c"(count), "+S"(source) :: "rax", "memory");
}
static void call_it(void *at)
{
    rip_wanted = (uint64_t)(uintptr_t)at;
    __asm__ volatile("call *%0" ::"r"(at) : "rax", "memory");
}

void part_memory_faults(uint64_t round)
{
    uint8_t *p = map(4 * PAGE, PROT_READ | PROT_WRITE | PROT_EXEC), *none = p + PAGE, *after = p + 2 * PAGE;
    uint64_t middle = MIDDLE + (round * 77 % 100000) * 0x100000;
    struct fault f;

    memset(p, 0xc3, 4 * PAGE);
    /* Pages that were used, and rights taken away after it. */
    mprotect(none, PAGE, PROT_NONE);
    expect("reading PROT_NONE", attempt(read_it, none + 8), SIGSEGV, SEGV_ACCERR, (uint64_t)(none + 8), 14, 4);
    expect("writing PROT_NONE", attempt(write_it, none + 8), SIGSEGV, SEGV_ACCERR, (uint64_t)(none + 8), 14, 6);
    expect("running PROT_NONE", attempt(call_it, none + 8), SIGSEGV, SEGV_ACCERR, (uint64_t)(none + 8), 14, 0x14);
    expect("reading into PROT_NONE", attempt(read_it, none - 3), SIGSEGV, SEGV_ACCERR, (uint64_t)none, 14, 4);
    expect("writing into PROT_NONE", attempt(write_it, none - 3), SIGSEGV, SEGV_ACCERR, (uint64_t)none, 14, 6);
    if (none[-1] != 0xc3 || none[-3] != 0xc3)
        wrong("half of a write was made");
    expect("reading out of PROT_NONE", attempt(read_it, after - 1), SIGSEGV, SEGV_ACCERR, (uint64_t)(after - 1), 14, 4);
    expect("16 bytes into PROT_NONE", attempt(read_16, none - 15), SIGSEGV, SEGV_ACCERR, (uint64_t)none, 14, 4);
    f = attempt(move_to, none - 100);
    expect("a string into PROT_NONE", f, SIGSEGV, SEGV_ACCERR, (uint64_t)none, 14, 6);
    if (f.rdi != (uint64_t)none || f.rcx != 4096 - 100 || f.rsi != string_from + 100)
        tell("a string into PROT_NONE", &f, "RCX", f.rcx, 4096 - 100);
    mprotect(none, PAGE, PROT_READ);
    read_it(none);
    expect("writing PROT_READ", attempt(write_it, none + 8), SIGSEGV, SEGV_ACCERR, (uint64_t)(none + 8), 14, 7);
    expect("adding to PROT_READ", attempt(add_it, none + 8), SIGSEGV, SEGV_ACCERR, (uint64_t)(none + 8), 14, 7);
    expect("running PROT_READ", attempt(call_it, none + 9), SIGSEGV, SEGV_ACCERR, (uint64_t)(none + 9), 14, 0x15);
    mprotect(none, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC);
    write_it(none), add_it(none - 3), read_16(none - 8), call_it(none + 100), call_it(none - 200);
    munmap(none, PAGE);
    expect("reading nothing", attempt(read_it, none + 8), SIGSEGV, SEGV_MAPERR, (uint64_t)(none + 8), 14, 4);
    expect("writing nothing", attempt(write_it, none + 8), SIGSEGV, SEGV_MAPERR, (uint64_t)(none + 8), 14, 6);
    expect("running nothing", attempt(call_it, none + 8), SIGSEGV, SEGV_MAPERR, (uint64_t)(none + 8), 14, 0x14);
    /* An instruction that goes on in the page that is not there. */
    memcpy(none - 3, "\x48\xc7\xc0", 3);
    f = attempt(call_it, none - 3);
    rip_wanted = (uint64_t)(none - 3);
    expect("half of an instruction", f, SIGSEGV, SEGV_MAPERR, (uint64_t)none, 14, 0x14);
    expect("reading at 0", attempt(read_it, NULL), SIGSEGV, SEGV_MAPERR, 0, 14, 4);
    expect("running at 0", attempt(call_it, NULL), SIGSEGV, SEGV_MAPERR, 0, 14, 0x14);
    expect("reading nowhere", attempt(read_it, (void *)middle), SIGSEGV, SEGV_MAPERR, middle, 14, 4);
    expect("writing nowhere", attempt(write_it, (void *)middle), SIGSEGV, SEGV_MAPERR, middle, 14, 6);
    expect("reading the kernel's", attempt(read_it, (void *)KERNEL), SIGSEGV, SEGV_MAPERR, KERNEL, 14, 5);
    expect("writing the kernel's", attempt(write_it, (void *)KERNEL), SIGSEGV, SEGV_MAPERR, KERNEL, 14, 7);
    expect("reading at no address", attempt(read_it, (void *)NON_CANONICAL), SIGSEGV, SI_KERNEL, NOWHERE, 13, 0);
    expect("reading up to no address", attempt(read_it, (void *)(NON_CANONICAL - 4096)), SIGSEGV, SEGV_MAPERR, NON_CANONICAL - 4096, 14, 5);
    munmap(p, 4 * PAGE);

    /* Beyond a file's end. */
    int fd = memfd_create("probe", 0);
    if (fd < 0 || ftruncate(fd, PAGE + 100) || (p = mmap(NULL, 3 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)) == MAP_FAILED)
        wrong("memfd: %s", strerror(errno));
    write_it(p + 2 * PAGE - 8);
    expect("writing beyond the end", attempt(write_it, p + 2 * PAGE + 24), SIGBUS, BUS_ADRERR, (uint64_t)(p + 2 * PAGE + 24), 14, 6);
    expect("reading up to beyond the end", attempt(read_it, p + 2 * PAGE - 1), SIGBUS, BUS_ADRERR, (uint64_t)(p + 2 * PAGE), 14, 4);
    if (ftruncate(fd, 0))
        wrong("ftruncate");
    expect("reading what was cut off", attempt(read_it, p + 16), SIGBUS, BUS_ADRERR, (uint64_t)(p + 16), 14, 4);
    close(fd);
    munmap(p, 3 * PAGE);
}

static void return_to(void *at)
{
    __asm__ volatile("lea 78f(%%rip), %%rax; mov %%rax, %[wanted]; push %1; 78: ret" : WANTED : "r"(at) : "rax", "memory");
}
static void jump_to(void *at) { __asm__ volatile(FAULTS_HERE "jmp *%1" : WANTED : "r"(at) : "rax", "memory"); }

void part_jumps(uint64_t round)
{
    uint64_t middle = MIDDLE + (round * 31 % 100000) * 0x4000000 % 0x200000000000;
    struct fault f;

    expect("running nowhere", attempt(call_it, (void *)middle), SIGSEGV, SEGV_MAPERR, middle, 14, 0x14);
    expect("running the kernel's", attempt(call_it, (void *)KERNEL), SIGSEGV, SEGV_MAPERR, KERNEL, 14, 0x15);
    expect("running the last page", attempt(call_it, (void *)-4096), SIGSEGV, SEGV_MAPERR, (uint64_t)-4096, 14, 0x15);
    /* Whether RIP is before or behind the jump is the processor's choice. */
    f = attempt(jump_to, (void *)(NON_CANONICAL + 16));
    if (f.signal != SIGSEGV || f.code != SI_KERNEL || f.trap != 13 || f.error || (f.rip != rip_wanted && f.rip != NON_CANONICAL + 16))
        tell("jumping to no address", &f, "RIP", f.rip, rip_wanted);
    f = attempt(return_to, (void *)(NON_CANONICAL + 16));
    if (f.signal != SIGSEGV || f.code != SI_KERNEL || f.trap != 13 || f.error || (f.rip != rip_wanted && f.rip != NON_CANONICAL + 16))
        tell("returning to no address", &f, "RIP", f.rip, rip_wanted);
}

static void divide(void *by)
{
    uint32_t low = 5, high = 0;

    __asm__ volatile("lea 77f(%%rip), %%rcx; mov %%rcx, %[wanted]; 77: divl %3" : WANTED, "+a"(low), "+d"(high) : "r"((uint32_t)(uintptr_t)by)
                     : "rcx");
}
static void divide_signed(void *unused)
{
    uint64_t low = 1ull << 63, high = ~0ull;

    (void)unused;
    __asm__ volatile("lea 77f(%%rip), %%rcx; mov %%rcx, %[wanted]; 77: idivq %3" : WANTED, "+a"(low), "+d"(high) : "r"(-1ll) : "rcx");
}
static void divide_sse(void *unused)
{
    uint32_t mxcsr = 0x1d80;    /* division by zero is not masked */

    (void)unused;
    __asm__ volatile("ldmxcsr %1; mov $1, %%eax; cvtsi2sd %%eax, %%xmm0; xorps %%xmm1, %%xmm1;" FAULTS_HERE "divsd %%xmm1, %%xmm0" : WANTED
                     : "m"(mxcsr) : "rax", "xmm0", "xmm1");
}
static void divide_x87(void *unused)
{
    uint16_t control = 0x37b;

    (void)unused;
    __asm__ volatile("fninit; fldcw %1; fld1; fldz; fdivrp; nop;" FAULTS_HERE "fwait; fninit" : WANTED : "m"(control) : "rax");
}

#define ALONE(name, code) \
    static void name(void *unused) { (void)unused; __asm__ volatile(FAULTS_HERE code : WANTED :: "rax", "rcx", "rdx", "memory"); }
#define BEHIND(name, code) \
    static void name(void *unused) { (void)unused; __asm__ volatile("lea 77f(%%rip), %%rax; mov %%rax, %[wanted];" code "; 77: nop" : WANTED \
                                                                    :: "rax", "memory"); }
ALONE(undefined, "ud2")
ALONE(undefined_lock, ".byte 0xf0, 0x90")
ALONE(halt, "hlt")
ALONE(interrupts_off, "cli")
ALONE(port, "mov $0x80, %%edx; in %%dx, %%al")
ALONE(interrupt, "int $0x42")
ALONE(interrupt_1, "int $1")
ALONE(segment_base, "rdgsbase %%rax")
ALONE(control, "mov %%cr0, %%rax")
ALONE(model, "rdmsr")
ALONE(long_one, ".fill 15, 1, 0x66; nop")
ALONE(bound, ".byte 0x62, 0x00, 0x00, 0x00, 0x00, 0x00")
ALONE(unaligned, "movaps 4(%%rsp), %%xmm0; movaps 8(%%rsp), %%xmm0; movaps 12(%%rsp), %%xmm0")
BEHIND(breakpoint, "int3")
BEHIND(breakpoint_long, ".byte 0xcd, 3")
BEHIND(breakpoint_prefix, ".byte 0x66; int3")
BEHIND(icebp, ".byte 0xf1")

static void unaligned_with_ac(void *at)
{
    /* The page below the stack pointer is the library's red zone; nothing of it lives here. */
    __asm__ volatile("pushfq; orl $0x40000, (%%rsp); popfq; lea 77f(%%rip), %%rax; mov %%rax, %[wanted]; 77: mov 1(%1), %%eax;"
                     "pushfq; andl $~0x40000, (%%rsp); popfq" : WANTED : "r"(at) : "rax", "memory");
}
static void aligned_with_ac(void *at)
{
    __asm__ volatile("pushfq; orl $0x40000, (%%rsp); popfq; mov 4(%1), %%eax; movups 1(%1), %%xmm0; mov 5(%1), %%al;"
                     "pushfq; andl $~0x40000, (%%rsp); popfq" : WANTED : "r"(at) : "rax", "memory");
}

void part_exceptions(uint64_t round)
{
    uint64_t words[4] __attribute__((aligned(64))) = { 0 };
    struct fault f;

    (void)round;
    f = attempt(divide, NULL), expect("a division by zero", f, SIGFPE, FPE_INTDIV, HERE, 0, 0);
    f = attempt(divide_signed, NULL), expect("a quotient that does not fit", f, SIGFPE, FPE_INTDIV, HERE, 0, 0);
    f = attempt(divide_sse, NULL), expect("a division by zero in SSE", f, SIGFPE, FPE_FLTDIV, HERE, 19, 0);
    f = attempt(divide_x87, NULL), expect("a division by zero in the x87", f, SIGFPE, FPE_FLTDIV, HERE, 16, 0);
    __asm__ volatile("fninit; ldmxcsr %0" ::"m"(*&(uint32_t){ 0x1f80 }));
    f = attempt(undefined, NULL), expect("UD2", f, SIGILL, ILL_ILLOPN, HERE, 6, 0);
    f = attempt(undefined_lock, NULL), expect("LOCK NOP", f, SIGILL, ILL_ILLOPN, HERE, 6, 0);
    expect("HLT", attempt(halt, NULL), SIGSEGV, SI_KERNEL, NOWHERE, 13, 0);
    expect("CLI", attempt(interrupts_off, NULL), SIGSEGV, SI_KERNEL, NOWHERE, 13, 0);
    f = attempt(port, NULL), rip_wanted += 5, expect("IN", f, SIGSEGV, SI_KERNEL, NOWHERE, 13, 0);
    expect("INT 0x42", attempt(interrupt, NULL), SIGSEGV, SI_KERNEL, NOWHERE, 13, 0x42 * 8 + 2);
    expect("INT 1", attempt(interrupt_1, NULL), SIGSEGV, SI_KERNEL, NOWHERE, 13, 1 * 8 + 2);
    f = attempt(segment_base, NULL);
    if (f.signal != (has_fsgsbase() ? 0 : SIGILL))
        tell("RDGSBASE", &f, "the signal", (uint64_t)f.signal, SIGILL);
    expect("MOV CR0", attempt(control, NULL), SIGSEGV, SI_KERNEL, NOWHERE, 13, 0);
    expect("RDMSR", attempt(model, NULL), SIGSEGV, SI_KERNEL, NOWHERE, 13, 0);
    expect("16 bytes of an instruction", attempt(long_one, NULL), SIGSEGV, SI_KERNEL, NOWHERE, 13, 0);
    f = attempt(bound, NULL);
    if (f.signal != SIGILL && f.signal != SIGSEGV)
        tell("an EVEX prefix of nothing", &f, "the signal", (uint64_t)f.signal, SIGILL);
    f = attempt(unaligned, NULL);
    if (f.signal != SIGSEGV || f.trap != 13 || f.address != NOWHERE)
        tell("MOVAPS", &f, "the signal", (uint64_t)f.signal, SIGSEGV);
    f = attempt(breakpoint, NULL), expect("INT3", f, SIGTRAP, SI_KERNEL, NOWHERE, 3, 0);
    f = attempt(breakpoint_long, NULL), expect("INT 3", f, SIGTRAP, SI_KERNEL, NOWHERE, 3, 0);
    f = attempt(breakpoint_prefix, NULL), expect("a prefix and INT3", f, SIGTRAP, SI_KERNEL, NOWHERE, 3, 0);
    f = attempt(icebp, NULL), expect("INT1", f, SIGTRAP, TRAP_BRKPT, HERE, 1, 0);
    expect("unaligned with AC", attempt(unaligned_with_ac, words), SIGBUS, BUS_ADRALN, NOWHERE, 17, 0);
    aligned_with_ac(words);
}

/* RFLAGS.TF of the program's own. */
volatile unsigned steps;
static uint64_t step_rip[64];

void on_step(int signal, siginfo_t *info, void *context)
{
    ucontext_t *u = context;

    (void)signal;
    if (info->si_code != TRAP_TRACE && info->si_code != TRAP_BRKPT)
        _exit(4);
    if (steps < 64)
        step_rip[steps] = (uint64_t)u->uc_mcontext.gregs[REG_RIP];
    steps++;
}

void part_traps(uint64_t round)
{
    struct sigaction action = { .sa_sigaction = on_step, .sa_flags = SA_SIGINFO };
    static uint64_t words[8];
    uint8_t *page = map(2 * PAGE, PROT_READ | PROT_WRITE);

    (void)round;
    sigaction(SIGTRAP, &action, NULL);
    STEPPED(0, "TF", "");
    STEPPED(1, "a NOP", "nop;");
    STEPPED(3, "three", "nop; mov (%0), %%rax; nop;");
    for (unsigned i = 1; i < 3; i++)
        if (step_rip[i] <= step_rip[i - 1] || step_rip[i] > step_rip[0] + 16)
            wrong("step %u is at %llx", i, (unsigned long long)step_rip[i]);
    STEPPED(2, "RDTSC", "rdtsc; rdtsc;");
    STEPPED(6, "a loop", "mov $5, %%ecx; 78: loop 78b;");
    STEPPED(7, "a string", "mov $3, %%ecx; lea (%0), %%rbx; xchg %%rbx, %%rdi; rep stosb; xchg %%rbx, %%rdi;");
    {
        steps = 0;
        /* The system call itself is no step of the program's: the trap comes behind the instruction that follows, or behind it. */
        __asm__ volatile(SET_TF "syscall;" CLEAR_TF : : "a"(39) : "rcx", "r11", "memory", "cc");
        if (steps != 4 && steps != 3)
            wrong("SYSCALL with TF: %u steps", steps);
        steps = 0;
        __asm__ volatile(SET_TF "movq $1, (%0);" CLEAR_TF : : "r"(page) : "memory", "cc");
        if (steps != 4)
            wrong("a page that is new with TF: %u steps", steps);
    }
    signal(SIGTRAP, SIG_DFL);
    munmap(page, 2 * PAGE);
}

/* ---- stacks ---- */

static void push_at(void *at)
{
    __asm__ volatile("mov %%rsp, %%rbx; lea 77f(%%rip), %%rax; mov %%rax, %[wanted]; mov %1, %%rsp; 77: push %%rax; mov %%rbx, %%rsp" : WANTED
                     : "r"(at) : "rax", "rbx", "memory");
}

static __attribute__((noinline)) uint64_t deeper(uint64_t n)
{
    volatile uint8_t room[2000];

    room[n % 2000] = (uint8_t)n;
    return n ? deeper(n + 1) + room[n % 2000] : room[0];
}
static void overflow(void *unused)
{
    (void)unused;
    deeper(1);
}

/* Computes, and makes system calls, with a stack pointer that points nowhere. */
static uint64_t without_stack(uint64_t rsp, uint64_t n)
{
    uint64_t sum = 0;

    __asm__ volatile("mov %%rsp, %%r12; mov %[rsp], %%rsp\n"
                     "1: imul $31, %[sum], %[sum]; add %[n], %[sum]; test $0xfff, %[n]; jnz 2f\n"
                     "mov $39, %%eax; syscall; mov $110, %%eax; syscall\n"
                     "2: dec %[n]; jnz 1b\n"
                     "cmp %[rsp], %%rsp; mov %%r12, %%rsp; je 3f; ud2; 3:"
                     : [sum] "+r"(sum), [n] "+r"(n) : [rsp] "r"(rsp) : "rax", "rcx", "r11", "r12", "memory", "cc");
    return sum;
}

void part_stacks(uint64_t round)
{
    uint8_t *p = map(3 * PAGE, PROT_READ | PROT_WRITE);
    uint64_t sum = 0;

    munmap(p + PAGE, PAGE);
    expect("a push to nothing", attempt(push_at, p + 2 * PAGE), SIGSEGV, SEGV_MAPERR, (uint64_t)(p + 2 * PAGE - 8), 14, 6);
    expect("a push across", attempt(push_at, p + 2 * PAGE + 4), SIGSEGV, SEGV_MAPERR, (uint64_t)(p + 2 * PAGE - 4), 14, 6);
    push_at(p + 16), push_at(p + 13), push_at(p + 2 * PAGE + 8);
    expect("a push to no address", attempt(push_at, (void *)(NON_CANONICAL + 8192)), SIGBUS, SI_KERNEL, NOWHERE, 12, 0);
    expect("a push to the kernel's", attempt(push_at, (void *)KERNEL), SIGSEGV, SEGV_MAPERR, KERNEL - 8, 14, 7);
    for (uint64_t n = 20000; n; n--)
        sum = sum * 31 + n;
    if (without_stack(0, 20000) != sum || without_stack(NON_CANONICAL + 3, 20000) != sum || without_stack(KERNEL + 1, 20000) != sum ||
        without_stack(MIDDLE, 20000) != sum || without_stack((uint64_t)p + 7, 20000) != sum)
        wrong("computing without a stack");
    munmap(p, 3 * PAGE);
    if (round % 8)
        return;

    pid_t child = split();
    if (!child) {
        struct rlimit limit = { 256 * 1024, 256 * 1024 };
        uint64_t here = (uint64_t)__builtin_frame_address(0);
        struct fault f;

        setrlimit(RLIMIT_STACK, &limit);
        f = attempt(overflow, NULL);
        if (f.signal != SIGSEGV || f.address > here - 128 * 1024 || f.address < here - 300 * 1024 || (f.error & ~2ull) != 4)
            tell("a stack's end", &f, "the address", f.address, here - 256 * 1024);
        _exit(0);
    }
    join(child);
}

/* ---- odd ones, after which the program may be wherever the processor likes, but the machine goes on ---- */

static void in_child(void (*f)(void))
{
    int status;
    pid_t child = split();

    if (!child) {
        alarm(10);
        f();
        _exit(0);
    }
    if (waitpid(child, &status, 0) != child || (WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM) ||
        (WIFEXITED(status) && WEXITSTATUS(status)))
        wrong("an odd child ended with %x", (unsigned)status);
}

/* Pages that the kernel has written: the guest is not asked when they are touched, but whoever shadows its tables is. */
static volatile uint8_t *ready_pages(size_t pages)
{
    uint8_t *p = map(pages * PAGE, PROT_READ | PROT_WRITE);
    int fd = open("/proc/self/exe", O_RDONLY);

    for (size_t i = 0; i < pages; i++)
        if (pread(fd, p + i * PAGE, PAGE, 0) < (ssize_t)PAGE)
            _exit(9);
    close(fd);
    return p;
}

/* Registers with values that the kernel's interfaces would not take, while pages are touched for the first time. */
static void odd_base(void)
{
    volatile uint8_t *p = ready_pages(64);
    uint64_t base = KERNEL, is;

    __asm__ volatile("wrgsbase %0" ::"r"(base));
    for (unsigned i = 0; i < 64; i++)
        p[i * PAGE] = 1;
    getppid();
    for (unsigned i = 0; i < 64; i++)
        p[i * PAGE]++;
    __asm__ volatile("rdgsbase %0" : "=r"(is));
    if (is != base)
        _exit(1);
}
static void odd_selectors(void)
{
    volatile uint8_t *p = ready_pages(64);

    for (unsigned s = 0; s < 4; s++) {
        uint32_t selector = s < 2 ? s : s == 2 ? 0x28 : 0x2a;
        uint16_t is, es;

        __asm__ volatile("mov %0, %%ds; mov %0, %%es" ::"r"(selector));
        for (unsigned i = 0; i < 16; i++)
            p[(s * 16 + i) * PAGE] = 1;
        __asm__ volatile("mov %%ds, %0; mov %%es, %1" : "=r"(is), "=r"(es));
        /* Selectors of nothing are 0 after an interruption. */
        if ((is != selector || es != selector) && selector > 3)
            _exit(2);
    }
}
static void odd_flags(void)
{
    volatile uint8_t *p = ready_pages(16);
    uint64_t flags;

    __asm__ volatile("pushfq; orl $0x244000, (%%rsp); popfq" ::: "memory", "cc");       /* NT, AC, ID */
    for (unsigned i = 0; i < 16; i++)
        p[i * PAGE] = 1;
    __asm__ volatile("pushfq; pop %0; pushfq; andl $~0x244000, (%%rsp); popfq" : "=r"(flags) :: "memory", "cc");
    if ((flags & 0x244000) != 0x244000)
        _exit(3);
}
static void odd_return(void)
{
    /* IRET to itself, with the flags as they are, is a way to go on. */
    __asm__ volatile("mov %%rsp, %%rcx; mov %%ss, %%eax; push %%rax; push %%rcx; pushfq; mov %%cs, %%eax; push %%rax; lea 1f(%%rip), %%rax; push %%rax;"
                     "iretq; 1:" ::: "rax", "rcx", "memory");
}

void part_oddities(uint64_t round)
{
    (void)round;
    if (has_fsgsbase())
        in_child(odd_base);
    in_child(odd_selectors);
    in_child(odd_flags);
    in_child(odd_return);
    in_child(odd_sysenter);
}
