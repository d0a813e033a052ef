/* See run_native.h. */
#include "run_native.h"

#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>
#include <asm/ldt.h>
#include <asm/prctl.h>

#include "isa/x86/insn.h"

/* Far from all else, but where 32-bit code reaches. */
#define CODE_PAGE ((uint8_t *)0x70000000)
#define BOUNDARY (CODE_PAGE + 4096)
#define STACK_AREA ((uint8_t *)0x78000000)
#define STACK_SIZE 0x20000
#define DATA_PAGE ((uint8_t *)0x7c000000)
#define CODE64 0x33             /* Linux' code segments */
#define CODE32 0x23
#define CODE16 0x07             /* of the LDT: 16-bit, at CODE_PAGE */
#define MAX_REPORTS 20
#define CASE_SECONDS 10

static sigjmp_buf back;
static volatile struct native_result result;
static unsigned long fs_base;
static uint8_t *volatile entry;
static bool have_16_bit;

static inline __attribute__((always_inline)) long raw_arch_prctl(long code, unsigned long v)
{
    long r;

    __asm__ volatile("syscall" : "=a"(r) : "0"((long)SYS_arch_prctl), "D"(code), "S"(v) : "rcx", "r11", "memory");
    return r;
}

static void on_signal(int sig, siginfo_t *info, void *context)
{
    const ucontext_t *u = context;

    /* The first trap comes after the return to the instruction: go on, still stepping. */
    if (sig == SIGTRAP && (uint8_t *)u->uc_mcontext.gregs[REG_RIP] == entry) {
        entry = NULL;
        return;
    }
    /* FS is not the C library's yet. */
    raw_arch_prctl(ARCH_SET_FS, fs_base);
    result.signal = sig;
    result.vector = (unsigned)u->uc_mcontext.gregs[REG_TRAPNO];
    result.fetch_fault = u->uc_mcontext.gregs[REG_TRAPNO] == 14 && (u->uc_mcontext.gregs[REG_ERR] & 0x10) &&
                         (uint8_t *)u->uc_mcontext.gregs[REG_CR2] == BOUNDARY;
    siglongjmp(back, 1);
}

struct native_result native_run(const uint8_t *bytes, unsigned n, unsigned code_size)
{
    uint64_t selector = code_size == 8 ? CODE64 : code_size == 4 ? CODE32 : CODE16;
    uint8_t *volatile start = BOUNDARY - n;

    memcpy(start, bytes, n);
    memset(STACK_AREA + STACK_SIZE / 2 - 256, 0, 512);
    if (code_size == 2)
        start = (uint8_t *)(start - CODE_PAGE);
    result.signal = 0;
    result.vector = 0;
    result.fetch_fault = false;
    entry = start;
    if (sigsetjmp(back, 1) == 0) {
        /* Nothing of the C library's through FS. */
        raw_arch_prctl(ARCH_SET_FS, 0);
        __asm__ volatile("fninit\n\t"
                         "mov %0, %%rsp\n\t"
                         "pushq %2\n\t"
                         "pushq %1\n\t"
                         "pushq $0x302\n\t"
                         "xor %%ebp, %%ebp\n\t"
                         "xor %%r8d, %%r8d\n\txor %%r9d, %%r9d\n\txor %%r10d, %%r10d\n\txor %%r11d, %%r11d\n\t"
                         "xor %%r12d, %%r12d\n\txor %%r13d, %%r13d\n\txor %%r14d, %%r14d\n\txor %%r15d, %%r15d\n\t"
                         "popfq\n\t"
                         "lretq\n\t"
                         :
                         : "r"(STACK_AREA + STACK_SIZE / 2), "r"(start), "r"(selector), "a"(-1L), "b"(DATA_PAGE),
                           "c"(0L), "d"(0L), "S"(0L), "D"(0L)
                         : "memory");
        __builtin_unreachable();
    }
    return (struct native_result){ result.signal, result.vector, result.fetch_fault };
}

uint8_t *native_run_data(void)
{
    return DATA_PAGE;
}

bool native_run_can_16_bit(void)
{
    return have_16_bit;
}

static bool map(uint8_t *at, size_t size, int protection)
{
    return mmap(at, size, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == at;
}

bool native_run_setup(void)
{
    static uint8_t signal_stack[65536];
    static const int signals[] = { SIGSEGV, SIGILL, SIGBUS, SIGTRAP, SIGFPE, SIGALRM };
    stack_t ss = { .ss_sp = signal_stack, .ss_size = sizeof(signal_stack) };
    struct sigaction sa = { .sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER };
    struct user_desc code16 = { .entry_number = 0, .base_addr = (unsigned)(uintptr_t)CODE_PAGE, .limit = 0xffff,
                                .contents = MODIFY_LDT_CONTENTS_CODE };
    struct rlimit no_core = { 0, 0 };

    setrlimit(RLIMIT_CORE, &no_core);
    raw_arch_prctl(ARCH_GET_FS, (unsigned long)&fs_base);
    sigaltstack(&ss, NULL);
    for (unsigned i = 0; i < sizeof(signals) / sizeof(signals[0]); i++)
        sigaction(signals[i], &sa, NULL);
    if (!map(CODE_PAGE, 8192, PROT_READ | PROT_WRITE | PROT_EXEC) || mprotect(BOUNDARY, 4096, PROT_NONE) < 0 ||
        !map(STACK_AREA, STACK_SIZE, PROT_READ | PROT_WRITE) || !map(DATA_PAGE, 4096, PROT_READ | PROT_WRITE))
        return false;
    have_16_bit = syscall(SYS_modify_ldt, 1, &code16, sizeof(code16)) == 0;
    return true;
}

static uint32_t next_random(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 32);
}

void native_case(uint8_t bytes[CASE_BYTES], uint64_t seed, uint64_t number, unsigned code_size)
{
    static const uint8_t prefixes[] = { 0x66, 0x67, 0xf2, 0xf3, 0xf0, 0x2e, 0x3e, 0x64, 0x65, 0x40, 0x48, 0x41, 0x4f };
    uint64_t state = seed * 0x9e3779b97f4a7c15u + number * 0xbf58476d1ce4e5b9u;
    unsigned n = 0;

    next_random(&state);
    for (unsigned i = 0; i < CASE_BYTES; i++)
        bytes[i] = (uint8_t)next_random(&state);
    /* Outside 64-bit code the last four are instructions. */
    while (next_random(&state) % 2 && n < 4)
        bytes[n++] = prefixes[next_random(&state) % (sizeof(prefixes) - (code_size == 8 ? 0 : 4))];
    switch (next_random(&state) % 8) {
    case 0: case 1:
        bytes[n++] = 0x0f;
        break;
    case 2:
        bytes[n++] = 0x0f;
        bytes[n++] = next_random(&state) % 2 ? 0x38 : 0x3a;
        break;
    case 3:
        bytes[n++] = 0xc5;
        break;
    case 4:
        bytes[n++] = 0xc4;
        bytes[n] = (uint8_t)((bytes[n] & 0xe0) | (1 + next_random(&state) % 3));
        break;
    case 5:
        bytes[n++] = 0x62;
        bytes[n] = (uint8_t)((bytes[n] & 0xf0) | (1 + next_random(&state) % 3));
        bytes[n + 1] |= 4;
        break;
    }
}

void native_report(struct native_totals *t, const uint8_t *bytes, unsigned code_size, const char *what)
{
    char text[128];

    if (++t->differences > MAX_REPORTS)
        return;
    printf("case %llu, %u bit:", (unsigned long long)t->next, code_size * 8);
    for (unsigned i = 0; i < 15; i++)
        printf(" %02x", bytes[i]);
    x86_format(text, sizeof(text), bytes, 15, code_size, 0);
    printf("\n    %s; decoded: %s\n", what, text);
    fflush(stdout);
}

static void child(struct native_totals *t, uint64_t count, void (*run_case)(struct native_totals *))
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (!native_run_setup())
        _exit(9);
    while (t->next < count) {
        alarm(CASE_SECONDS);
        run_case(t);
        t->next++;
    }
    _exit(0);
}

struct native_totals *native_run_cases(uint64_t seed, uint64_t count, void (*run_case)(struct native_totals *))
{
    struct native_totals *t = mmap(NULL, sizeof(*t), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

    if (t == MAP_FAILED) {
        perror("mmap");
        return NULL;
    }
    t->seed = seed;
    printf("seed %llu, %llu cases\n", (unsigned long long)seed, (unsigned long long)count);
    fflush(stdout);
    while (t->next < count) {
        int status;
        pid_t pid = fork();

        if (pid == 0)
            child(t, count, run_case);
        if (pid < 0 || waitpid(pid, &status, 0) != pid) {
            perror("fork");
            return NULL;
        }
        if (WIFEXITED(status) && WEXITSTATUS(status) == 9) {
            printf("the addresses for the test are taken\n");
            return NULL;
        }
        if (t->next >= count)
            break;
        t->lost++;
        t->next++;
        if (t->lost > count / 100 + 10) {
            printf("%llu cases lost: this does not work here\n", (unsigned long long)t->lost);
            return NULL;
        }
    }
    return t;
}
