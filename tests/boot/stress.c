/*
 * stress MILLISECONDS [PART...]: what an operating system and its programs do to a processor, each part repeated for so
 * long, every result checked: faults and signals, copy on write, code that changes, threads, context switches, vector
 * state, memory of every alignment. Runs as a static program in a guest with nothing else (cases_stress_short.py), and on
 * any Linux. Prints "PART: N rounds" for each part; the first wrong result ends it with status 1.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#define PAGE 4096

static const char *self;

static __attribute__((noreturn, format(printf, 1, 2))) void wrong(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    printf("WRONG: ");
    vprintf(format, args);
    printf("\n");
    va_end(args);
    exit(1);
}

static uint64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

static uint64_t next(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    return *state ^= *state << 17;
}

static char *map(size_t size, int protection)
{
    char *p = mmap(NULL, size, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        wrong("mmap: %s", strerror(errno));
    return p;
}

static void handle(int signal, void (*handler)(int, siginfo_t *, void *), int flags)
{
    struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | flags};
    if (sigaction(signal, &action, NULL) < 0)
        wrong("sigaction: %s", strerror(errno));
}

static void join(pid_t pid)
{
    int status;
    if (waitpid(pid, &status, 0) != pid || status != 0)
        wrong("a child ended with wait status %x", (unsigned)status);
}

static pid_t split(void)
{
    fflush(stdout);
    pid_t pid = fork();
    if (pid < 0)
        wrong("fork: %s", strerror(errno));
    return pid;
}

/* Page faults that a program handles itself, with everything in registers where it was. */
static volatile char *fault_page;
static volatile unsigned fault_count;

static void on_fault(int signal, siginfo_t *info, void *context)
{
    (void)signal;
    (void)context;
    if ((volatile char *)info->si_addr < fault_page || (volatile char *)info->si_addr >= fault_page + PAGE)
        wrong("fault at %p, not in %p", info->si_addr, (void *)fault_page);
    fault_count++;
    if (mprotect((void *)fault_page, PAGE, PROT_READ | PROT_WRITE) < 0)
        _exit(3);
}

static void part_faults(uint64_t round)
{
    handle(SIGSEGV, on_fault, 0);
    fault_page = map(PAGE, PROT_NONE);
    uint64_t seed = round + 1, a = next(&seed), b = next(&seed), c = next(&seed), sum = a * 3 + b * 5 + c * 7;
    unsigned offset = (unsigned)(next(&seed) % (PAGE / 8)) * 8;
    fault_count = 0;
    *(volatile uint64_t *)(fault_page + offset) = a;
    if (fault_count != 1 || *(volatile uint64_t *)(fault_page + offset) != a || a * 3 + b * 5 + c * 7 != sum)
        wrong("a write after its fault");
    if (mprotect((void *)fault_page, PAGE, PROT_READ) < 0)
        wrong("mprotect");
    *(volatile uint64_t *)(fault_page + offset) += b;
    if (fault_count != 2 || *(volatile uint64_t *)(fault_page + offset) != a + b)
        wrong("a read-modify-write after its fault");
    munmap((void *)fault_page, PAGE);
    signal(SIGSEGV, SIG_DFL);
}

/* Traps: division by zero left by a jump, an undefined instruction stepped over, a breakpoint. */
static sigjmp_buf trap_return;
static volatile unsigned traps;

static void on_divide(int signal, siginfo_t *info, void *context)
{
    (void)signal;
    (void)context;
    if (info->si_code != FPE_INTDIV)
        wrong("SIGFPE with code %d", info->si_code);
    traps++;
    siglongjmp(trap_return, 1);
}

static void on_undefined(int signal, siginfo_t *info, void *context)
{
    ucontext_t *u = context;
    (void)signal;
    (void)info;
    traps += 16;
    u->uc_mcontext.gregs[REG_RIP] += 2;
    u->uc_mcontext.gregs[REG_RAX] *= 3;
}

static void on_breakpoint(int signal, siginfo_t *info, void *context)
{
    ucontext_t *u = context;
    (void)signal;
    (void)info;
    traps += 256;
    u->uc_mcontext.gregs[REG_EFL] ^= 1;
}

static void part_traps(uint64_t round)
{
    handle(SIGFPE, on_divide, 0);
    handle(SIGILL, on_undefined, 0);
    handle(SIGTRAP, on_breakpoint, 0);
    traps = 0;
    if (sigsetjmp(trap_return, 1) == 0) {
        unsigned high = 0, low = (unsigned)round;
        __asm__ volatile("divl %2" : "+a"(low), "+d"(high) : "r"(0));
        wrong("a division by zero has a quotient");
    }
    uint64_t a = round;
    unsigned char carry;
    __asm__ volatile("ud2" : "+a"(a));
    if (a != round * 3)
        wrong("a register that the handler of SIGILL changed");
    __asm__ volatile("clc; int3; setc %0" : "=r"(carry)::"cc");
    if (carry != 1 || traps != 1 + 16 + 256)
        wrong("traps: carry %d, sum %x", carry, traps);
}

/* Copy on write: parent and child write the same pages and see their own. */
static void part_fork(uint64_t round)
{
    enum { PAGES = 16 };
    unsigned char *p = (unsigned char *)map(PAGES * PAGE, PROT_READ | PROT_WRITE);
    for (int i = 0; i < PAGES; i++)
        memset(p + i * PAGE, (int)(round + (uint64_t)i), PAGE);
    pid_t pid = split();
    unsigned char mine = pid ? 0x55 : 0xaa;
    for (int i = (int)(round % 3); i < PAGES; i += 3)
        p[i * PAGE + i] ^= mine;
    for (int i = 0; i < PAGES; i++) {
        unsigned char expected = (unsigned char)(round + (uint64_t)i);
        if (i % 3 == (int)(round % 3))
            expected ^= mine;
        if (p[i * PAGE + i] != expected || p[i * PAGE + i + 1] != (unsigned char)(round + (uint64_t)i))
            wrong("page %d after fork", i);
    }
    if (!pid)
        _exit(0);
    join(pid);
    munmap(p, PAGES * PAGE);
}

static void part_exec(uint64_t round)
{
    char number[32];
    snprintf(number, sizeof(number), "%llu", (unsigned long long)round);
    pid_t pid = split();
    if (!pid) {
        execl(self, self, "child", number, (char *)NULL);
        _exit(4);
    }
    join(pid);
}

/* Code that is written and run at once: by the same mapping, and by another one of the same memory. */
static void part_code(uint64_t round)
{
    static const unsigned char add[] = {0x48, 0x8d, 0x87, 0, 0, 0, 0, 0xc3};   /* lea imm32(%rdi), %rax; ret */
    static unsigned char *same, *writable, *executable;
    if (!same) {
        same = (unsigned char *)map(PAGE, PROT_READ | PROT_WRITE | PROT_EXEC);
        int fd = memfd_create("code", 0);
        if (fd < 0 || ftruncate(fd, PAGE) < 0)
            wrong("memfd_create: %s", strerror(errno));
        writable = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        executable = mmap(NULL, PAGE, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0);
        if (writable == MAP_FAILED || executable == MAP_FAILED)
            wrong("mmap: %s", strerror(errno));
        close(fd);
    }
    for (unsigned i = 0; i < 60; i++) {
        unsigned at = i % 7 * 160 + (unsigned)(round % 5) * 3;
        int32_t value = (int32_t)(round * 77 + i);
        for (int view = 0; view < 2; view++) {
            unsigned char *p = view ? writable : same, *run = view ? executable : same;
            memcpy(p + at, add, sizeof(add));
            memcpy(p + at + 3, &value, 4);
            if (view)   /* another address: what was fetched before is forgotten by a serialising instruction */
                __asm__ volatile("xor %%eax, %%eax; cpuid" ::: "rax", "rbx", "rcx", "rdx", "memory");
            long (*f)(long);
            memcpy(&f, &(void *){run + at}, sizeof(f));
            /* Warm enough to be compiled, then changed under way. */
            for (long k = 0; k < 40; k++)
                if (f(k) != k + value)
                    wrong("changed code %u gave %ld, not %ld", i, f(k), k + value);
        }
    }
}

/* Threads: a mutex (futexes), atomic counters, and a ticket order that must hold. */
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static uint64_t guarded, atomic_sum, exchanged;

static void *worker(void *argument)
{
    uint64_t id = (uint64_t)(uintptr_t)argument;
    for (uint64_t i = 0; i < 500; i++) {
        pthread_mutex_lock(&mutex);
        uint64_t before = guarded;
        if (i % 50 == id * 10)
            sched_yield();
        guarded = before + 1;
        pthread_mutex_unlock(&mutex);
        __atomic_fetch_add(&atomic_sum, id + i, __ATOMIC_SEQ_CST);
        uint64_t old = __atomic_load_n(&exchanged, __ATOMIC_RELAXED);
        while (!__atomic_compare_exchange_n(&exchanged, &old, old * 3 + 1 - old * 2, 0, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED))
            ;
    }
    return NULL;
}

static void part_threads(uint64_t round)
{
    pthread_t threads[4];
    (void)round;
    guarded = atomic_sum = exchanged = 0;
    for (uintptr_t i = 0; i < 4; i++)
        if (pthread_create(&threads[i], NULL, worker, (void *)i) != 0)
            wrong("pthread_create");
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    if (guarded != 2000 || exchanged != 2000 || atomic_sum != 4 * (500 * 499 / 2) + 500 * 6)
        wrong("threads: %llu, %llu, %llu", (unsigned long long)guarded, (unsigned long long)exchanged,
              (unsigned long long)atomic_sum);
}

static void pipe_pair(int ends[2])
{
    if (pipe(ends) < 0)
        wrong("pipe: %s", strerror(errno));
}

static void part_switch(uint64_t round)
{
    int there[2], back[2];
    uint64_t x = round | 1, y = x;
    pipe_pair(there);
    pipe_pair(back);
    pid_t pid = split();
    if (!pid) {
        close(there[1]);
        while (read(there[0], &x, sizeof(x)) == sizeof(x)) {
            next(&x);
            if (write(back[1], &x, sizeof(x)) != sizeof(x))
                _exit(5);
        }
        _exit(0);
    }
    for (int i = 0; i < 200; i++) {
        if (write(there[1], &x, sizeof(x)) != sizeof(x) || read(back[0], &x, sizeof(x)) != sizeof(x) || x != next(&y))
            wrong("switch %d", i);
    }
    close(there[0]), close(there[1]), close(back[0]), close(back[1]);
    join(pid);
}

/* Timer signals in the middle of arithmetic in all kinds of registers; flags and vectors must survive. */
static volatile unsigned ticks;

static void on_alarm(int signal, siginfo_t *info, void *context)
{
    (void)signal;
    (void)info;
    (void)context;
    double x = 1.0;
    for (int i = 0; i < 10; i++)
        x = x / 3 + ticks;
    if (x < 0)
        _exit(6);
    ticks++;
}

static void part_timer(uint64_t round)
{
    struct itimerval every = {{0, 1100}, {0, 1100}}, never = {{0, 0}, {0, 0}};
    static double d_first;
    static uint64_t i_first;
    static long double l_first;
    handle(SIGALRM, on_alarm, SA_RESTART);
    setitimer(ITIMER_REAL, &every, NULL);
    double d = 0.5;
    long double l = 0.5L;
    uint64_t n = 1, high = 0, seed = 99;
    for (int i = 0; i < 60000; i++) {
        d = 3.9 * d * (1 - d);
        l = 3.9L * l * (1 - l);
        uint64_t step = next(&seed);
        high += __builtin_add_overflow(n, step, &n);
    }
    setitimer(ITIMER_REAL, &never, NULL);
    n ^= high;
    if (round == 0)
        d_first = d, l_first = l, i_first = n;
    if (d != d_first || l != l_first || n != i_first)
        wrong("arithmetic under timer signals: %g, %Lg, %llx", d, l, (unsigned long long)n);
}

/* Each process keeps its own vector registers while it yields to the others. */
static void keep_vectors(uint64_t pattern)
{
    for (int i = 0; i < 100; i++) {
        uint64_t in[4] = {pattern, pattern * 3, ~pattern, pattern ^ (uint64_t)i}, out[4];
        long number = 24;   /* sched_yield */
        __asm__ volatile("movups (%1), %%xmm3; movups 16(%1), %%xmm12; syscall; movups %%xmm3, (%2); movups %%xmm12, 16(%2)"
                         : "+a"(number) : "r"(in), "r"(out) : "rcx", "r11", "xmm3", "xmm12", "memory");
        if (memcmp(in, out, sizeof(in)) != 0)
            wrong("vector registers after a switch");
    }
}

static void part_vectors(uint64_t round)
{
    pid_t pids[3];
    for (int i = 0; i < 3; i++)
        if (!(pids[i] = split())) {
            keep_vectors(round * 5 + (uint64_t)i * 0x0123456789abcdef);
            _exit(0);
        }
    keep_vectors(~round);
    for (int i = 0; i < 3; i++)
        join(pids[i]);
}

/* Copies of all alignments and lengths, forward and backward, across pages. */
static void part_memory(uint64_t round)
{
    enum { SIZE = 3 * PAGE };
    static unsigned char a[SIZE], b[SIZE];
    uint64_t seed = round * 2 + 1;
    for (int i = 0; i < SIZE; i++)
        a[i] = b[i] = (unsigned char)next(&seed);
    for (int i = 0; i < 100; i++) {
        size_t from = next(&seed) % (SIZE / 2), to = next(&seed) % (SIZE / 2), n = next(&seed) % (i % 4 ? 80 : SIZE / 2);
        memmove(a + to, a + from, n);
        /* The same, byte by byte, in the order that keeps what is still to be read. */
        if (to <= from)
            for (size_t k = 0; k < n; k++)
                __atomic_store_n(&b[to + k], b[from + k], __ATOMIC_RELAXED);
        else
            for (size_t k = n; k-- > 0;)
                __atomic_store_n(&b[to + k], b[from + k], __ATOMIC_RELAXED);
        unsigned char *p = a + to, *q = b + to;
        size_t count = n, half = n;
        __asm__ volatile("rep stosb" : "+D"(p), "+c"(count) : "a"(i) : "memory");
        while (half-- > 0)
            __atomic_store_n(q++, (unsigned char)i, __ATOMIC_RELAXED);
        if (n == 0)
            continue;
        if (p != a + to + n || count != 0)
            wrong("rep stosb left %zu", count);
    }
    if (memcmp(a, b, SIZE) != 0)
        wrong("copies of memory");
}

static const struct part {
    const char *name;
    void (*run)(uint64_t round);
} parts[] = {
    {"faults", part_faults}, {"traps", part_traps},   {"fork", part_fork},       {"exec", part_exec},
    {"code", part_code},     {"threads", part_threads}, {"switch", part_switch}, {"timer", part_timer},
    {"vectors", part_vectors}, {"memory", part_memory},
};

static int chosen(const char *name, int argc, char **argv)
{
    for (int i = 2; i < argc; i++)
        if (strcmp(argv[i], name) == 0)
            return 1;
    return argc <= 2;
}

int main(int argc, char **argv)
{
    self = argv[0];
    if (argc == 3 && strcmp(argv[1], "child") == 0)
        return *argv[2] ? 0 : 1;
    if (argc < 2 || atol(argv[1]) <= 0) {
        fprintf(stderr, "usage: stress MILLISECONDS [PART...]\n");
        return 2;
    }
    for (size_t i = 0; i < sizeof(parts) / sizeof(*parts); i++) {
        if (!chosen(parts[i].name, argc, argv))
            continue;
        uint64_t end = now_ms() + (uint64_t)atol(argv[1]), round = 0;
        do
            parts[i].run(round++);
        while (now_ms() < end);
        printf("%s: %llu rounds\n", parts[i].name, (unsigned long long)round);
        fflush(stdout);
    }
    return 0;
}
