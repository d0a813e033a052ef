/*
 * The decoder against the host processor: instruction lengths, and which bytes are no instruction, in 64-, 32-
 * and (where the kernel lets programs have such segments) 16-bit code.
 *
 * Bytes are put in front of a page that cannot be executed. If the processor wants more bytes than there are, it faults
 * on the fetch at that page; if not, it executes the instruction or faults in another way. So two tries
 * per case tell whether x86_decode()'s length is the processor's, and a SIGILL what is undefined.
 *
 * A child process runs the cases in batches, since random instructions may destroy it: the parent then goes on
 * behind the case that did. Usage: test_decode [seed [cases]]; the seed is printed.
 */
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
#include <time.h>
#include <ucontext.h>
#include <unistd.h>
#include <asm/ldt.h>
#include <asm/prctl.h>

#include "isa/x86/cpuid.h"
#include "isa/x86/insn.h"
#include "isa/x86/state.h"

/* Far from all else, but where 32-bit code reaches. */
#define CODE_PAGE ((uint8_t *)0x70000000)
#define BOUNDARY (CODE_PAGE + 4096)
#define STACK_AREA ((uint8_t *)0x78000000)
#define STACK_SIZE 0x20000
#define CODE64 0x33             /* Linux' code segments */
#define CODE32 0x23
#define CODE16 0x07             /* of the LDT: 16-bit, at CODE_PAGE */
#define DEFAULT_CASES 150000
#define MAX_REPORTS 20
#define CASE_BYTES 24           /* more than an instruction has */

struct shared {
    uint64_t seed;
    volatile uint64_t next;     /* the case being run, or to be run next */
    volatile uint64_t decoded, undefined, differences, lost;
};

static struct shared *shared;
static sigjmp_buf back;
static volatile int got_signal;
static volatile bool got_fetch_fault;
static unsigned long fs_base;
static uint8_t *volatile entry;

static long raw_arch_prctl(long code, unsigned long v)
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
    /* The instruction may have loaded FS, and the C library lives by it. */
    raw_arch_prctl(ARCH_SET_FS, fs_base);
    got_signal = sig;
    got_fetch_fault = u->uc_mcontext.gregs[REG_TRAPNO] == 14 && (u->uc_mcontext.gregs[REG_ERR] & 0x10) &&
                      (uint8_t *)u->uc_mcontext.gregs[REG_CR2] == BOUNDARY;
    siglongjmp(back, 1);
}

/* Executes the last n bytes before the boundary, single-stepped, with harmless register values. */
static void try_host(const uint8_t *bytes, unsigned n, unsigned code_size)
{
    uint64_t selector = code_size == 8 ? CODE64 : code_size == 4 ? CODE32 : CODE16;
    uint8_t *volatile start = BOUNDARY - n;

    memcpy(start, bytes, n);
    memset(STACK_AREA + STACK_SIZE / 2 - 256, 0, 512);
    if (code_size == 2)
        start = (uint8_t *)(start - CODE_PAGE);
    got_signal = 0;
    got_fetch_fault = false;
    entry = start;
    if (sigsetjmp(back, 1) == 0) {
        /* Nothing of the C library's through FS. */
        raw_arch_prctl(ARCH_SET_FS, 0);
        __asm__ volatile("fninit\n\t"
                         "mov %0, %%rsp\n\t"
                         "pushq %2\n\t"
                         "pushq %1\n\t"
                         "pushq $0x302\n\t"
                         "popfq\n\t"
                         "lretq\n\t"
                         :
                         : "r"(STACK_AREA + STACK_SIZE / 2), "r"(start), "r"(selector), "a"(-1L), "b"(0L), "c"(0L),
                           "d"(0L), "S"(0L), "D"(0L)
                         : "memory");
        __builtin_unreachable();
    }
}

static uint64_t random_state;

static uint32_t next_random(void)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 32);
}

/* Random bytes, more often such as begin something interesting. */
static void make_case(uint8_t bytes[CASE_BYTES], uint64_t number, unsigned code_size)
{
    static const uint8_t prefixes[] = { 0x66, 0x67, 0xf2, 0xf3, 0xf0, 0x2e, 0x3e, 0x64, 0x65, 0x40, 0x48, 0x41, 0x4f };
    unsigned n = 0;

    random_state = shared->seed * 0x9e3779b97f4a7c15u + number * 0xbf58476d1ce4e5b9u;
    next_random();
    for (unsigned i = 0; i < CASE_BYTES; i++)
        bytes[i] = (uint8_t)next_random();
    /* Outside 64-bit code the last four are instructions. */
    while (next_random() % 2 && n < 4)
        bytes[n++] = prefixes[next_random() % (sizeof(prefixes) - (code_size == 8 ? 0 : 4))];
    switch (next_random() % 8) {
    case 0: case 1:
        bytes[n++] = 0x0f;
        break;
    case 2:
        bytes[n++] = 0x0f;
        bytes[n++] = next_random() % 2 ? 0x38 : 0x3a;
        break;
    case 3:
        bytes[n++] = 0xc5;
        break;
    case 4:
        bytes[n++] = 0xc4;
        bytes[n] = (uint8_t)((bytes[n] & 0xe0) | (1 + next_random() % 3));
        break;
    case 5:
        bytes[n++] = 0x62;
        bytes[n] = (uint8_t)((bytes[n] & 0xf0) | (1 + next_random() % 3));
        bytes[n + 1] |= 4;
        break;
    }
}

static void report(const uint8_t *bytes, unsigned code_size, const char *what)
{
    char text[128];

    if (++shared->differences > MAX_REPORTS)
        return;
    printf("case %llu, %u bit:", (unsigned long long)shared->next, code_size * 8);
    for (unsigned i = 0; i < 15; i++)
        printf(" %02x", bytes[i]);
    x86_format(text, sizeof(text), bytes, 15, code_size, 0);
    printf("\n    %s; decoded: %s\n", what, text);
    fflush(stdout);
}

/* Known differences: not what this test is about. */
static bool exempt(const struct x86_insn *insn)
{
    switch (insn->mnemonic) {
    /* Undefined where they are tried, and meant so; emulated by the kernel, which forgets the trap. */
    case ZYDIS_MNEMONIC_UD0:
    case ZYDIS_MNEMONIC_UD1:
    case ZYDIS_MNEMONIC_UD2:
    case ZYDIS_MNEMONIC_RSM:
    case ZYDIS_MNEMONIC_STAC:
    case ZYDIS_MNEMONIC_CLAC:
    case ZYDIS_MNEMONIC_SGDT:
    case ZYDIS_MNEMONIC_SIDT:
    case ZYDIS_MNEMONIC_SLDT:
    case ZYDIS_MNEMONIC_STR:
    case ZYDIS_MNEMONIC_SMSW:
    /* May hang, or leave the process. */
    case ZYDIS_MNEMONIC_MWAITX:
    case ZYDIS_MNEMONIC_SYSCALL:
    case ZYDIS_MNEMONIC_SYSENTER:
    case ZYDIS_MNEMONIC_INT:
        return true;
    /* No trap behind these. */
    case ZYDIS_MNEMONIC_MOV:
    case ZYDIS_MNEMONIC_POP:
        return insn->operand[0].kind == OPERAND_SEG && insn->operand[0].reg == SEG_SS;
    case ZYDIS_MNEMONIC_LSS:
        return true;
    /* With VEX.W in 32-bit code Intel takes these, AMD does not. */
    case ZYDIS_MNEMONIC_VPINSRD:
    case ZYDIS_MNEMONIC_VPEXTRD:
        return insn->code_size != 8;
    default:
        return false;
    }
}

/*
 * Undefined for a guest, but a program sees something else: AMD takes LOCK MOV CR0 for MOV CR8 (a feature that no model
 * has), looks at LOCK VERR's memory operand before it refuses it, and does not mind VEX.W0 in VPERMQ and VPERMPD.
 */
static bool exempt_undefined(const uint8_t *bytes)
{
    bool lock = false;
    unsigned i;

    for (i = 0; i < 12 && bytes[i] != 0x0f && bytes[i] != 0xc4; i++)
        lock |= bytes[i] == 0xf0;
    if (bytes[i] == 0xc4)
        return (bytes[i + 1] & 0x1f) == 3 && !(bytes[i + 2] & 0x80) && bytes[i + 3] <= 1;
    /* A hypervisor may know VMCALL with prefixes. */
    if (bytes[i + 1] == 0x01 && bytes[i + 2] == 0xc1)
        return true;
    return lock && (bytes[i + 1] == 0x00 || bytes[i + 1] == 0x20 || bytes[i + 1] == 0x22);
}

static void run_case(const struct x86_cpu_model *model, bool have_16_bit)
{
    static const unsigned sizes[4] = { 8, 8, 4, 2 };
    unsigned code_size = sizes[shared->next % 4];
    struct x86_insn insn;
    uint8_t bytes[CASE_BYTES];
    bool gp;
    int r;

    if (code_size == 2 && !have_16_bit)
        return;
    make_case(bytes, shared->next, code_size);
    r = x86_decode(&insn, bytes, 15, code_size, &gp);
    if (r == 0 && (exempt(&insn) || !x86_model_has_insn(model, &insn)))
        return;
    if (r == 0) {
        shared->decoded++;
        try_host(bytes, insn.length, code_size);
        if (got_fetch_fault)
            report(bytes, code_size, "the processor wants more bytes");
        else if (got_signal == SIGILL)
            report(bytes, code_size, "undefined on the processor");
        if (insn.length > 1) {
            try_host(bytes, insn.length - 1u, code_size);
            if (!got_fetch_fault)
                report(bytes, code_size, "the processor needs fewer bytes");
        }
    } else if (!gp && !exempt_undefined(bytes)) {
        shared->undefined++;
        try_host(bytes, 15, code_size);
        /* With so many prefixes that it is too long, which a processor says first: look at it with fewer. */
        for (unsigned less = 1; got_signal == SIGSEGV && less < 5; less++)
            try_host(bytes + less, 15, code_size);
        if (got_signal != SIGILL)
            report(bytes, code_size, "the processor knows this");
    }
}

static bool make_16_bit_segment(void)
{
    struct user_desc d = { .entry_number = 0, .base_addr = (unsigned)(uintptr_t)CODE_PAGE, .limit = 0xffff,
                           .contents = MODIFY_LDT_CONTENTS_CODE };

    return syscall(SYS_modify_ldt, 1, &d, sizeof(d)) == 0;
}

static void child(uint64_t end)
{
    static uint8_t signal_stack[65536];
    static const int signals[] = { SIGSEGV, SIGILL, SIGBUS, SIGTRAP, SIGFPE, SIGALRM };
    const struct x86_cpu_model *model = x86_cpu_model_find("host");
    stack_t ss = { .ss_sp = signal_stack, .ss_size = sizeof(signal_stack) };
    struct sigaction sa = { .sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER };
    struct rlimit no_core = { 0, 0 };
    bool have_16_bit;

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    setrlimit(RLIMIT_CORE, &no_core);
    raw_arch_prctl(ARCH_GET_FS, (unsigned long)&fs_base);
    sigaltstack(&ss, NULL);
    for (unsigned i = 0; i < sizeof(signals) / sizeof(signals[0]); i++)
        sigaction(signals[i], &sa, NULL);
    if (mmap(CODE_PAGE, 8192, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) ==
            MAP_FAILED || mprotect(BOUNDARY, 4096, PROT_NONE) < 0 ||
        mmap(STACK_AREA, STACK_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) ==
            MAP_FAILED)
        _exit(9);
    have_16_bit = make_16_bit_segment();
    while (shared->next < end) {
        alarm(10);
        run_case(model, have_16_bit);
        shared->next++;
    }
    _exit(0);
}

int main(int argc, char **argv)
{
    uint64_t cases = argc > 2 ? strtoull(argv[2], NULL, 0) : DEFAULT_CASES;

    shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED)
        return 99;
    shared->seed = argc > 1 ? strtoull(argv[1], NULL, 0) : (uint64_t)time(NULL);
    printf("seed %llu, %llu cases\n", (unsigned long long)shared->seed, (unsigned long long)cases);
    fflush(stdout);
    while (shared->next < cases) {
        int status;
        pid_t pid = fork();

        if (pid == 0)
            child(cases);
        if (pid < 0 || waitpid(pid, &status, 0) != pid || (WIFEXITED(status) && WEXITSTATUS(status) == 9))
            return 99;
        if (WIFEXITED(status) && WEXITSTATUS(status) == 0 && shared->next >= cases)
            break;
        shared->lost++;
        shared->next++;
        if (shared->lost > cases / 100 + 10) {
            printf("%llu cases lost: the test does not work here\n", (unsigned long long)shared->lost);
            return 1;
        }
    }
    printf("%llu decoded, %llu undefined, %llu lost, %llu differences\n", (unsigned long long)shared->decoded,
           (unsigned long long)shared->undefined, (unsigned long long)shared->lost,
           (unsigned long long)shared->differences);
    return shared->differences != 0;
}
