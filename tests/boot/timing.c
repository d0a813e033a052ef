/*
 * timing WHAT...: how a guest's time goes. A static program for a small guest (cases_time.py), which runs on any Linux.
 *
 *     late N              N sleeps of 1 to 10 ms by clock_nanosleep(), N by a timerfd: how much too late they end
 *     under LOAD N        N sleeps of 1 to 4 ms in a thread of the highest priority, while another thread computes
 *     stamps S LOAD       for S seconds a line "stamp MONOTONIC REALTIME" every 50 ms, for the host to compare with its own
 *                         clocks; meanwhile another thread computes
 *     loads               lists the kinds of LOAD
 *
 * Prints "late WHAT N median P90 P99 max", in microseconds.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define AREA (64u << 20)

static uint8_t *area;

static __attribute__((noreturn)) void fail(const char *what)
{
    perror(what);
    exit(1);
}

static int64_t now(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static struct timespec timespec_of(int64_t ns)
{
    return (struct timespec){.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000};
}

/* ---- what computes meanwhile ---- */

static void load_none(void)
{
    pause();
}

static void load_loop(void)
{
    uint64_t n = 100000000;
    __asm__ volatile("1: dec %0; jnz 1b" : "+r"(n)::"cc");
}

/* 256 KiB of code without a jump. */
static void load_straight(void)
{
    uint64_t a = 1, b = 2;
    __asm__ volatile(".rept 32768; add %0, %1; lea 3(%1, %0), %0; .endr" : "+r"(a), "+r"(b)::"cc");
}

static void load_copy(void)
{
    void *to = area, *from = area + AREA / 2;
    size_t n = AREA / 2;
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n)::"memory");
}

/* Overlapping by an odd distance, downwards: nothing that a memcpy could do. */
static void load_copy_back(void)
{
    void *to = area + AREA - 8, *from = area + AREA - 11;
    size_t n = AREA / 8 - 2;
    __asm__ volatile("std; rep movsq; cld" : "+D"(to), "+S"(from), "+c"(n)::"memory", "cc");
}

static void load_scan(void)
{
    void *at = area;
    size_t n = AREA;
    __asm__ volatile("repne scasb" : "+D"(at), "+c"(n) : "a"(0xa5) : "memory", "cc");
}

static void load_jumps(void)
{
    uint64_t n = 20000000, to;
    __asm__ volatile("   lea 1f(%%rip), %1\n"
                     "1: dec %0\n"
                     "   lea 2f(%%rip), %1\n"
                     "   jmp *%1\n"
                     "3: lea 1b(%%rip), %1\n"
                     "   test %0, %0\n"
                     "   js 4f\n"
                     "   jmp *%1\n"
                     "2: lea 3b(%%rip), %1\n"
                     "   jmp *%1\n"
                     "4:" : "+r"(n), "=&r"(to)::"cc");
}

static uint64_t fibonacci(uint64_t n)
{
    return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2);
}

static void load_calls(void)
{
    volatile uint64_t n = 30;
    n = fibonacci(n);
}

static void load_float(void)
{
    volatile double sum = 0;
    for (unsigned i = 1; i < 10000000; i++)
        sum += 1.0 / i;
}

static void load_kernel(void)
{
    static char page[4096];
    FILE *f = fopen("/dev/zero", "r");
    for (unsigned i = 0; f && i < 2000; i++)
        (void)!fread(page, 1, sizeof(page), f);
    if (f)
        fclose(f);
}

/* One mapping of 8 MiB, touched and given back: the kernel clears pages. */
static void load_faults(void)
{
    char *p = mmap(NULL, 8 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        fail("mmap");
    for (unsigned i = 0; i < 8u << 20; i += 4096)
        p[i] = 1;
    munmap(p, 8 << 20);
}

static const struct load {
    const char *name;
    void (*once)(void);
} loads[] = {
    {"none", load_none},   {"loop", load_loop},   {"straight", load_straight}, {"copy", load_copy},     {"copy-back", load_copy_back},
    {"scan", load_scan},   {"jumps", load_jumps}, {"calls", load_calls},       {"float", load_float},   {"kernel", load_kernel},
    {"faults", load_faults},
};

static const struct load *find_load(const char *name)
{
    for (unsigned i = 0; i < sizeof(loads) / sizeof(loads[0]); i++)
        if (strcmp(loads[i].name, name) == 0)
            return &loads[i];
    fprintf(stderr, "timing: there is no load '%s'\n", name);
    exit(2);
}

static void *work(void *opaque)
{
    const struct load *load = opaque;
    for (;;)
        load->once();
    return NULL;
}

static void start_load(const char *name)
{
    pthread_t thread;
    const struct sched_param first = {.sched_priority = 50};
    const struct load *load = find_load(name);

    area = mmap(NULL, AREA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (area == MAP_FAILED)
        fail("mmap");
    if (pthread_create(&thread, NULL, work, (void *)(uintptr_t)load))
        fail("pthread_create");
    if (sched_setscheduler(0, SCHED_FIFO, &first))
        fail("sched_setscheduler");
}

/* ---- how late ---- */

static int compare(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return x < y ? -1 : x > y;
}

static void report(const char *what, int64_t *late, unsigned n)
{
    qsort(late, n, sizeof(*late), compare);
    printf("late %s %u %.1f %.1f %.1f %.1f\n", what, n, (double)late[n / 2] / 1e3, (double)late[n * 9 / 10] / 1e3,
           (double)late[n * 99 / 100] / 1e3, (double)late[n - 1] / 1e3);
    fflush(stdout);
}

static int64_t some_time(unsigned i, int64_t max_ns)
{
    return 1000000 + (int64_t)(i * 2654435761u) % (max_ns - 1000000);
}

static void sleeps(const char *what, unsigned n, int64_t max_ns)
{
    int64_t *late = calloc(n, sizeof(*late));

    for (unsigned i = 0; late && i < n; i++) {
        int64_t until = now(CLOCK_MONOTONIC) + some_time(i, max_ns);
        struct timespec t = timespec_of(until);

        if (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL))
            fail("clock_nanosleep");
        late[i] = now(CLOCK_MONOTONIC) - until;
        if (late[i] < 0) {
            printf("EARLY %s by %lld ns\n", what, (long long)-late[i]);
            exit(1);
        }
    }
    report(what, late, n);
    free(late);
}

static void timerfds(const char *what, unsigned n, int64_t max_ns)
{
    int64_t *late = calloc(n, sizeof(*late));
    int fd = timerfd_create(CLOCK_MONOTONIC, 0);

    if (fd < 0)
        fail("timerfd_create");
    for (unsigned i = 0; late && i < n; i++) {
        int64_t until = now(CLOCK_MONOTONIC) + some_time(i, max_ns);
        struct itimerspec t = {.it_value = timespec_of(until)};
        uint64_t count;

        if (timerfd_settime(fd, TFD_TIMER_ABSTIME, &t, NULL) || read(fd, &count, sizeof(count)) != sizeof(count))
            fail("timerfd");
        late[i] = now(CLOCK_MONOTONIC) - until;
    }
    report(what, late, n);
    close(fd);
    free(late);
}

static void stamps(unsigned seconds)
{
    int64_t start = now(CLOCK_MONOTONIC);

    for (int64_t at = start; at < start + (int64_t)seconds * 1000000000; at += 50000000) {
        struct timespec t = timespec_of(at);

        if (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL))
            fail("clock_nanosleep");
        printf("stamp %lld %lld\n", (long long)now(CLOCK_MONOTONIC), (long long)now(CLOCK_REALTIME));
        fflush(stdout);
    }
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";

    if (strcmp(what, "late") == 0 && argc == 3) {
        sleeps("sleep", (unsigned)atoi(argv[2]), 10000000);
        timerfds("timerfd", (unsigned)atoi(argv[2]), 10000000);
    } else if (strcmp(what, "under") == 0 && argc == 4) {
        start_load(argv[2]);
        sleeps(argv[2], (unsigned)atoi(argv[3]), 4000000);
    } else if (strcmp(what, "stamps") == 0 && argc == 4) {
        start_load(argv[3]);
        stamps((unsigned)atoi(argv[2]));
    } else if (strcmp(what, "loads") == 0) {
        for (unsigned i = 0; i < sizeof(loads) / sizeof(loads[0]); i++)
            printf("%s\n", loads[i].name);
    } else {
        fprintf(stderr, "usage: timing late N | under LOAD N | stamps SECONDS LOAD | loads\n");
        return 2;
    }
    return 0;
}
