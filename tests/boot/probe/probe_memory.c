/*
 * Memory that changes its contents, its rights and its place.
 */
#define _GNU_SOURCE
#include "probe.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

/* ---- code ---- */

/* At p: a function that returns the number. */
static void write_number(uint8_t *p, uint32_t number)
{
    p[0] = 0xb8;
    memcpy(p + 1, &number, 4);
    p[5] = 0xc3;
}

static uint32_t run_number(const uint8_t *p)
{
    uint32_t (*f)(void);

    memcpy(&f, &p, sizeof(f));
    return f();
}

static void serialize(void)
{
    __asm__ volatile("push $0; pop %%rax; mov %%rsp, %%rcx; mov %%ss, %%eax; push %%rax; push %%rcx; pushfq; mov %%cs, %%eax; push %%rax;"
                     "lea 1f(%%rip), %%rax; push %%rax; iretq; 1:" ::: "rax", "rcx", "memory");
}

/* In one page, by the one who runs it: by stores, by a loop that changes the instruction behind, and by the kernel. */
void part_code(uint64_t round)
{
    static uint8_t *p;
    int ends[2];

    if (!p)
        p = map(4 * PAGE, PROT_READ | PROT_WRITE | PROT_EXEC);
    for (uint32_t i = 0; i < 100; i++) {
        uint8_t *at = p + i * 37 % (4 * PAGE - 16);

        write_number(at, i + (uint32_t)round);
        if (run_number(at) != i + (uint32_t)round)
            wrong("code that was just written returned %x", run_number(at));
    }
    /* 1: incl 2f+1(%rip); 2: mov $n,%eax; dec %edi; jnz 1b; ret: it changes what it runs next. */
    static const uint8_t changing[] = { 0xff, 0x05, 0x01, 0, 0, 0, 0xb8, 0, 0, 0, 0, 0xff, 0xcf, 0x75, 0xf1, 0xc3 };
    uint32_t result, count = 500;
    memcpy(p + PAGE - 8, changing, sizeof(changing));
    __asm__ volatile("call *%2" : "=a"(result), "+D"(count) : "r"(p + PAGE - 8) : "memory", "cc");
    if (result != 500)
        wrong("code that changes itself came to %u, not 500", result);
    if (pipe(ends))
        wrong("pipe: %s", strerror(errno));
    for (uint32_t i = 0; i < 20; i++) {
        uint8_t code[6];

        write_number(code, i * 3 + (uint32_t)round);
        if (write(ends[1], code, 6) != 6 || read(ends[0], p + 64, 6) != 6)
            wrong("pipe: %s", strerror(errno));
        if (run_number(p + 64) != i * 3 + (uint32_t)round)
            wrong("code that the kernel wrote returned %x, not %x", run_number(p + 64), i * 3 + (uint32_t)round);
    }
    close(ends[0]), close(ends[1]);
    /* Taken apart: written, then made executable, again and again. */
    for (uint32_t i = 0; i < 20; i++) {
        mprotect(p, PAGE, PROT_READ | PROT_WRITE);
        write_number(p + 128, i + 5);
        mprotect(p, PAGE, PROT_READ | PROT_EXEC);
        if (run_number(p + 128) != i + 5)
            wrong("code between two calls of mprotect() returned %x", run_number(p + 128));
    }
    mprotect(p, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC);
}

static void call_code(void *at)
{
    __asm__ volatile("call *%0" ::"r"(at) : "rax", "rdx", "rcx", "r11", "memory");
}

/* Instructions that are not for a program alone, one after the other in the same place: what was known of the last one is void. */
void part_code_steps(uint64_t round)
{
    static const struct {
        uint8_t code[4];
        int signal;
    } steps[] = {
        { { 0x0f, 0x31, 0xc3 }, 0 }, { { 0x0f, 0x0b }, SIGILL }, { { 0xcd, 0x42 }, SIGSEGV }, { { 0x0f, 0x01, 0xf9, 0xc3 }, 0 },
        { { 0xcc, 0x90, 0xc3 }, SIGTRAP }, { { 0x90, 0x0f, 0x31, 0xc3 }, 0 }, { { 0xf4 }, SIGSEGV }, { { 0x90, 0x90, 0xc3 }, 0 }, { { 0x90, 0xcc, 0xc3 }, SIGTRAP },
    };
    enum { COUNT = sizeof(steps) / sizeof(steps[0]) };
    static uint8_t *p;
    uint64_t seed = round + 9;

    if (!p)
        p = map(2 * PAGE, PROT_READ | PROT_WRITE | PROT_EXEC);
    for (unsigned i = 0; i < 60; i++) {
        unsigned n = (unsigned)(next(&seed) % COUNT);
        uint8_t *at = p + (i % 3 == 0 ? 50 : i % 3 == 1 ? PAGE - 1 : PAGE + 77);

        for (unsigned k = 0; k < 4; k++)
            ((volatile uint8_t *)at)[k] = steps[n].code[k];
        struct fault f = attempt(call_code, at);
        if (f.signal != steps[n].signal)
            wrong("instruction %u, written over another, gave signal %d at %llx", n, f.signal, (unsigned long long)f.rip);
    }
}

static uint8_t *shared(size_t size, uint8_t **other, int protection, int other_protection)
{
    int fd = memfd_create("probe", 0);
    uint8_t *p;

    if (fd < 0 || ftruncate(fd, (off_t)size))
        wrong("memfd: %s", strerror(errno));
    p = mmap(NULL, size, protection, MAP_SHARED, fd, 0);
    *other = mmap(NULL, size, other_protection, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED || *other == MAP_FAILED)
        wrong("mmap: %s", strerror(errno));
    close(fd);
    return p;
}

/* Written at one address, run at another; by another process too. */
void part_aliases(uint64_t round)
{
    static uint8_t *writable, *executable;
    static volatile uint32_t *turn;

    if (!writable) {
        uint8_t *unused;

        writable = shared(2 * PAGE, &executable, PROT_READ | PROT_WRITE, PROT_READ | PROT_EXEC);
        turn = (uint32_t *)(void *)shared(PAGE, &unused, PROT_READ | PROT_WRITE, PROT_READ);
    }
    for (uint32_t i = 0; i < 100; i++) {
        write_number(writable + i * 61 % (2 * PAGE - 16), i ^ (uint32_t)round);
        serialize();
        if (run_number(executable + i * 61 % (2 * PAGE - 16)) != (i ^ (uint32_t)round))
            wrong("code of another address returned the old number");
    }
    *turn = 0;
    pid_t child = split();
    if (!child) {
        for (uint32_t i = 1; i < 100; i += 2) {
            while (*turn != i)
                sched_yield();
            write_number(writable + 100, i * 7);
            *turn = i + 1;
        }
        _exit(0);
    }
    for (uint32_t i = 0; i < 100; i += 2) {
        *turn = i + 1;
        while (*turn != i + 2)
            sched_yield();
        serialize();
        if (run_number(executable + 100) != (i + 1) * 7)
            wrong("code of another process returned %x, not %x", run_number(executable + 100), (i + 1) * 7);
    }
    join(child);
}

/* A thread changes a number in code that others run: they see it grow, and the last one in the end. */
static uint8_t *race_write, *race_run;
static volatile int race_over;

static void *race_runner(void *unused)
{
    uint32_t last = 0;

    while (!race_over) {
        uint32_t now = run_number(race_run + 3);

        if (now < last)
            wrong("code that others change went from %u back to %u", last, now);
        last = now;
    }
    serialize();
    if (run_number(race_run + 3) != 2000)
        wrong("code that others changed to 2000 returns %u", run_number(race_run + 3));
    return unused;
}

void part_code_races(uint64_t round)
{
    pthread_t thread[2];

    (void)round;
    if (!race_write)
        race_write = shared(PAGE, &race_run, PROT_READ | PROT_WRITE, PROT_READ | PROT_EXEC);
    write_number(race_write + 3, 0);            /* its number lies on an even address */
    race_over = 0;
    for (unsigned i = 0; i < 2; i++)
        pthread_create(&thread[i], NULL, race_runner, NULL);
    for (uint32_t i = 1; i <= 2000; i++) {
        __atomic_store_n((uint32_t *)(void *)(race_write + 4), i, __ATOMIC_SEQ_CST);
        if (i % 100 == 0)
            sched_yield();
    }
    race_over = 1;
    for (unsigned i = 0; i < 2; i++)
        pthread_join(thread[i], NULL);
}

/* Another thread throws the page away, which comes back from its file, while system calls and traps are made from it. */
static uint8_t *taken;
static volatile int taken_over;

static void *take_away(void *unused)
{
    while (!taken_over)
        for (unsigned i = 0; i < 50; i++)
            madvise(taken, PAGE, MADV_DONTNEED);
    return unused;
}

static volatile uint64_t trapped;

static void on_taken(int signal, siginfo_t *info, void *context)
{
    (void)info;
    (void)signal;
    trapped = (uint64_t)((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP];
}

void part_code_reclaimed(uint64_t round)
{
    /* mov $110,%eax; syscall; ret, the same by INT 0x80 (64), and INT3 */
    static const uint8_t code[] = { 0xb8, 110, 0, 0, 0, 0x0f, 0x05, 0xc3, 0xb8, 64, 0, 0, 0, 0xcd, 0x80, 0xc3, 0x90, 0xcc, 0xc3 };
    struct sigaction action = { .sa_sigaction = on_taken, .sa_flags = SA_SIGINFO };
    uint32_t parent = (uint32_t)getppid(), result;
    pthread_t thread;
    int fd;

    (void)round;
    if (!taken) {
        fd = memfd_create("probe", 0);
        if (fd < 0 || pwrite(fd, code, sizeof(code), 0) != sizeof(code) || ftruncate(fd, PAGE))
            wrong("memfd: %s", strerror(errno));
        taken = mmap(NULL, PAGE, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, 0);
        if (taken == MAP_FAILED)
            wrong("mmap: %s", strerror(errno));
        close(fd);
    }
    sigaction(SIGTRAP, &action, NULL);
    taken_over = 0;
    pthread_create(&thread, NULL, take_away, NULL);
    for (unsigned i = 0; i < 1500; i++) {
        __asm__ volatile("call *%1" : "=a"(result) : "r"(taken) : "rcx", "r11", "memory");
        if (result != parent)
            wrong("SYSCALL in a page that comes and goes gave %x", result);
        __asm__ volatile("call *%1" : "=a"(result) : "r"(taken + 8) : "rcx", "r11", "memory");
        if (result != parent)
            wrong("INT 0x80 in a page that comes and goes gave %x", result);
        if (i % 8)
            continue;
        trapped = 0;
        __asm__ volatile("call *%0" :: "r"(taken + 16) : "rcx", "r11", "memory");
        if (trapped != (uint64_t)taken + 18)
            wrong("INT3 in a page that comes and goes stopped at %llx", (unsigned long long)trapped);
    }
    taken_over = 1;
    pthread_join(thread, NULL);
    signal(SIGTRAP, SIG_DFL);
}

/* A breakpoint that another thread sets and removes in running code, as debuggers do: whoever meets it, is behind it. */
static uint8_t *broken;

static void *toggle(void *at)
{
    while (!taken_over) {
        __atomic_store_n((uint8_t *)at, 0xcc, __ATOMIC_SEQ_CST);
        for (volatile unsigned k = 0; k < 300; k++)
            ;
        __atomic_store_n((uint8_t *)at, 0x90, __ATOMIC_SEQ_CST);
    }
    return NULL;
}

void part_code_breakpoints(uint64_t round)
{
    /* A step back of two would come to UD2; of one, or none: incl (%rdi) */
    static const uint8_t code[] = { 0xeb, 0x02, 0x0f, 0x0b, 0x90, 0xff, 0x07, 0xc3 };
    struct sigaction action = { .sa_sigaction = on_taken, .sa_flags = SA_SIGINFO };
    pthread_t thread;
    uint32_t count = 0;

    (void)round;
    if (!broken)
        broken = map(PAGE, PROT_READ | PROT_WRITE | PROT_EXEC);
    memcpy(broken, code, sizeof(code));
    sigaction(SIGTRAP, &action, NULL);
    taken_over = 0;
    pthread_create(&thread, NULL, toggle, broken + 4);
    for (unsigned i = 0; i < 1500; i++) {
        trapped = 0;
        __asm__ volatile("call *%0" :: "r"(broken), "D"(&count) : "memory", "cc");
        if (trapped && trapped != (uint64_t)broken + 5)
            wrong("a breakpoint that comes and goes stopped at %llx", (unsigned long long)trapped);
        if (count != i + 1)
            wrong("a breakpoint that comes and goes kept %u of %u from happening", i + 1 - count, i + 1);
    }
    taken_over = 1;
    pthread_join(thread, NULL);
    signal(SIGTRAP, SIG_DFL);
}

/* ---- copies and sharing ---- */

static void expect_all(const char *what, const volatile uint8_t *p, size_t pages, uint8_t value)
{
    for (size_t i = 0; i < pages; i++)
        if (p[i * PAGE + i % PAGE] != value || p[i * PAGE + PAGE - 1] != value)
            wrong("%s: page %zu holds %x, not %x", what, i, p[i * PAGE + i % PAGE], value);
}

/* Copy on write, seen from both sides, in an order that a pipe keeps. */
void part_copies(uint64_t round)
{
    enum { PAGES = 40 };
    uint8_t *p = map(PAGES * PAGE, PROT_READ | PROT_WRITE), token = 0;
    int there[2], back[2];

    if (pipe(there) || pipe(back))
        wrong("pipe: %s", strerror(errno));
    memset(p, 1, PAGES * PAGE);
    pid_t child = split();
    if (!child) {
        expect_all("the child's", p, PAGES, 1);
        if (round % 2)
            memset(p, 2, PAGES * PAGE);
        if (write(back[1], &token, 1) != 1 || read(there[0], &token, 1) != 1)
            _exit(1);
        expect_all("the child's after the parent's writing", p, PAGES, round % 2 ? 2 : 1);
        memset(p, 4, PAGES * PAGE);
        if (write(back[1], &token, 1) != 1 || read(there[0], &token, 1) != 1)
            _exit(1);
        expect_all("the child's at the end", p, PAGES, 4);
        _exit(0);
    }
    if (read(back[0], &token, 1) != 1)
        wrong("the child is gone");
    expect_all("the parent's", p, PAGES, 1);
    memset(p, 3, PAGES * PAGE);
    if (write(there[1], &token, 1) != 1 || read(back[0], &token, 1) != 1)
        wrong("the child is gone");
    expect_all("the parent's after the child's writing", p, PAGES, 3);
    memset(p, 5, PAGES * PAGE);
    if (write(there[1], &token, 1) != 1)
        wrong("the child is gone");
    join(child);
    expect_all("the parent's at the end", p, PAGES, 5);
    munmap(p, PAGES * PAGE);
    close(there[0]), close(there[1]), close(back[0]), close(back[1]);
}

void part_shared(uint64_t round)
{
    enum { PAGES = 16 };
    volatile uint64_t *p = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

    if (p == MAP_FAILED)
        wrong("mmap: %s", strerror(errno));
    pid_t child = split();
    /* Each answers the other's number, a page further each time. */
    for (uint64_t i = child ? 0 : 1; i < 200; i += 2) {
        volatile uint64_t *from = p + (i + PAGES - 1) % PAGES * (PAGE / 8) + 5, *to = p + i % PAGES * (PAGE / 8) + 5;
        double begin = seconds();

        while (i && *from != (i - 1) * 3 + round + 1)
            if (sched_yield(), seconds() - begin > 20)
                wrong("number %llu of the other process does not come", (unsigned long long)i - 1);
        *to = i * 3 + round + 1;
    }
    if (!child)
        _exit(0);
    join(child);
    munmap((void *)p, PAGES * PAGE);
}

/* ---- rights and places ---- */

static void write_one(void *at) { *(volatile uint8_t *)at = 7; }
static void read_one(void *at) { (void)*(volatile uint8_t *)at; }

void part_protections(uint64_t round)
{
    enum { PAGES = 24 };
    static const int rights[] = { PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE, PROT_READ | PROT_EXEC };
    static uint8_t *p;
    uint64_t seed = round * 3 + 1;

    if (!p) {
        p = map(PAGES * PAGE, PROT_READ | PROT_WRITE);
        memset(p, 0xc3, PAGES * PAGE);
    }
    for (unsigned i = 0; i < 12; i++) {
        unsigned first = (unsigned)(next(&seed) % PAGES), count = 1 + (unsigned)(next(&seed) % (PAGES - first)), probe = (unsigned)(next(&seed) % count);
        int right = rights[next(&seed) % 4];
        uint8_t *at = p + (first + probe) * PAGE + next(&seed) % PAGE;

        mprotect(p + first * PAGE, count * PAGE, right);
        struct fault r = attempt(read_one, at), w = attempt(write_one, at);
        if ((r.signal == 0) != ((right & PROT_READ) != 0) || (w.signal == 0) != ((right & PROT_WRITE) != 0) ||
            (r.signal && r.address != (uint64_t)at) || (w.signal && w.address != (uint64_t)at))
            wrong("rights %x: reading gave signal %d, writing %d", right, r.signal, w.signal);
    }
    mprotect(p, PAGES * PAGE, PROT_READ | PROT_WRITE);
}

void part_remaps(uint64_t round)
{
    enum { PAGES = 20 };
    uint8_t *p = map(PAGES * PAGE, PROT_READ | PROT_WRITE), *q;

    for (unsigned i = 0; i < 10; i++) {
        memset(p, (int)(i + round), PAGES * PAGE);
        if (i % 3 == 0)
            madvise(p, PAGES * PAGE, MADV_DONTNEED);
        else if (i % 3 == 2 && (munmap(p, PAGES * PAGE) ||
                                mmap(p, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != p))
            wrong("mmap: %s", strerror(errno));
        else if (i % 3 == 1 && mmap(p, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != p)
            wrong("mmap: %s", strerror(errno));
        expect_all("what was mapped anew", p, PAGES, 0);
    }
    for (unsigned i = 0; i < 6; i++) {
        q = map((PAGES + 1) * PAGE, PROT_NONE);
        memset(p, (int)(i + 40), PAGES * PAGE);
        if (mremap(p, PAGES * PAGE, PAGES * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, q) != q)
            wrong("mremap: %s", strerror(errno));
        expect_all("what was moved", q, PAGES, (uint8_t)(i + 40));
        struct fault f = attempt(read_one, p + PAGE);
        if (f.signal != SIGSEGV || f.address != (uint64_t)(p + PAGE))
            wrong("where memory was before it was moved: signal %d", f.signal);
        munmap(q + PAGES * PAGE, PAGE);
        p = q;
    }
    munmap(p, PAGES * PAGE);
}

/* Large pages, taken apart. */
void part_huge(uint64_t round)
{
    const size_t size = 2ul << 20;
    uint8_t *all = map(4 * size, PROT_READ | PROT_WRITE), *p = (uint8_t *)(((uintptr_t)all + size - 1) & ~(size - 1));

    if (madvise(p, 2 * size, MADV_HUGEPAGE))
        lacking("large pages");
    p[5] = 1;
    for (size_t i = 0; i < 2 * size; i += PAGE)
        p[i + 9] = (uint8_t)(i / PAGE + round);
    for (size_t i = 0; i < 2 * size; i += PAGE)
        if (p[i + 9] != (uint8_t)(i / PAGE + round))
            wrong("a large page");
    mprotect(p + 64 * PAGE, 3 * PAGE, PROT_READ);
    munmap(p + 100 * PAGE, PAGE);
    madvise(p + 200 * PAGE, 2 * PAGE, MADV_DONTNEED);
    struct fault w = attempt(write_one, p + 65 * PAGE), u = attempt(read_one, p + 100 * PAGE + 1), b = attempt(write_one, p + 63 * PAGE),
                 a = attempt(write_one, p + 67 * PAGE);
    if (w.signal != SIGSEGV || w.address != (uint64_t)(p + 65 * PAGE) || u.signal != SIGSEGV || b.signal || a.signal)
        wrong("parts of a large page: signals %d %d %d %d", w.signal, u.signal, b.signal, a.signal);
    if (p[200 * PAGE + 9] || p[201 * PAGE + 9] || p[202 * PAGE + 9] != (uint8_t)(202 + round) || p[65 * PAGE + 9] != (uint8_t)(65 + round))
        wrong("contents of a large page's parts");
    pid_t child = split();
    p[size + 9] = child ? 100 : 101;
    if (p[size + 9] != (child ? 100 : 101) || p[size + PAGE + 9] != (uint8_t)(513 + round))
        wrong("a large page after fork()");
    if (!child)
        _exit(0);
    join(child);
    munmap(all, 4 * size);
}

/* Threads write and check memory while the kernel gives it other places: pages are moved, and put together into large ones. */
static struct {
    volatile int over;
    uint64_t *memory;
} moving;
enum { MOVING = 1024 };

static void *use_moving(void *argument)
{
    uint64_t which = (uint64_t)(uintptr_t)argument, n = 1;
    uint64_t *p = moving.memory + which * 64;   /* threads share pages, not lines */

    for (; !moving.over; n++)
        for (unsigned i = 0; i < MOVING; i++) {
            if (p[i * (PAGE / 8)] != n - 1)
                wrong("page %u of memory that moves holds %llu, not %llu", i, (unsigned long long)p[i * (PAGE / 8)], (unsigned long long)n - 1);
            p[i * (PAGE / 8)] = n;
        }
    return NULL;
}

void part_moved(uint64_t round)
{
    const size_t size = MOVING * PAGE;
    uint8_t *all = map(size + (2ul << 20), PROT_READ | PROT_WRITE);
    pthread_t thread[2];

    (void)round;
    moving.memory = (uint64_t *)(((uintptr_t)all + (2ul << 20) - 1) & ~((2ul << 20) - 1));
    moving.over = 0;
    madvise(moving.memory, size, MADV_NOHUGEPAGE);
    for (uintptr_t i = 0; i < 2; i++)
        pthread_create(&thread[i], NULL, use_moving, (void *)i);
    for (unsigned i = 0; i < 2; i++) {
        usleep(2000);                           /* others run meanwhile */
        madvise(moving.memory, size, MADV_HUGEPAGE);
        madvise(moving.memory, size, 25);       /* MADV_COLLAPSE */
        if (guest_of_ours())
            put("/proc/sys/vm/compact_memory", "1");
        usleep(2000);
        mprotect((uint8_t *)moving.memory + 20 * PAGE, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC);
        mprotect((uint8_t *)moving.memory + 20 * PAGE, PAGE, PROT_READ | PROT_WRITE);
    }
    moving.over = 1;
    for (unsigned i = 0; i < 2; i++)
        pthread_join(thread[i], NULL);
    munmap(all, size + (2ul << 20));
}

/* Equal pages, which the kernel makes one of, are written again. */
void part_merged(uint64_t round)
{
    enum { PAGES = 64 };
    uint8_t *p;
    char text[32] = "";

    if (round)
        return;
    if (!guest_of_ours() || !put("/sys/kernel/mm/ksm/sleep_millisecs", "5") || !put("/sys/kernel/mm/ksm/run", "1")) {
        lacking("KSM");
        return;
    }
    p = map(PAGES * PAGE, PROT_READ | PROT_WRITE);
    madvise(p, PAGES * PAGE, MADV_MERGEABLE);
    memset(p, 0x77, PAGES * PAGE);
    for (double begin = seconds(); seconds() - begin < 5 && atoi(text) < PAGES / 2;) {
        int fd = open("/sys/kernel/mm/ksm/pages_sharing", O_RDONLY);

        if (fd < 0 || read(fd, text, sizeof(text) - 1) <= 0)
            wrong("KSM says nothing of its pages");
        close(fd);
        expect_all("pages that are merged", p, PAGES, 0x77);
    }
    if (atoi(text) < PAGES / 2)
        lacking("KSM within 5 seconds");
    for (unsigned i = 0; i < PAGES; i += 2)
        p[i * PAGE + 5] = 1;
    for (unsigned i = 0; i < PAGES; i++)
        if (p[i * PAGE + 5] != (i % 2 ? 0x77 : 1) || p[i * PAGE + 6] != 0x77)
            wrong("page %u that was merged holds %x", i, p[i * PAGE + 5]);
    put("/sys/kernel/mm/ksm/run", "2");
    munmap(p, PAGES * PAGE);
}

/* More pages than a sandbox of the host can have mappings, in no order. */
void part_many(uint64_t round)
{
    const uint64_t pages = 41000;
    uint64_t *p = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0), at = 1;

    if (p == MAP_FAILED)
        wrong("mmap: %s", strerror(errno));
    if (round) {
        munmap(p, pages * PAGE);
        return;
    }
    madvise(p, pages * PAGE, MADV_NOHUGEPAGE);
    for (uint64_t i = 0; i < pages; i++, at = (at + 30011) % pages)
        p[at * (PAGE / 8) + i % 500] = i * 77;
    for (uint64_t i = 0; i < pages; i++, at = (at + 30011) % pages)
        if (p[at * (PAGE / 8) + i % 500] != i * 77)
            wrong("page %llu of many", (unsigned long long)at);
    munmap(p, pages * PAGE);
}

/* ---- what the kernel does behind the program's back ---- */

void part_proc_mem(uint64_t round)
{
    static uint8_t *p;
    int fd = open("/proc/self/mem", O_RDWR);
    uint8_t code[6];

    if (fd < 0) {
        lacking("/proc/self/mem");
        return;
    }
    if (!p) {
        p = map(PAGE, PROT_READ | PROT_WRITE);
        write_number(p, 0);
        mprotect(p, PAGE, PROT_READ | PROT_EXEC);
    }
    for (uint32_t i = 0; i < 10; i++) {
        write_number(code, (uint32_t)round * 10 + i);
        if (pwrite(fd, code, 6, (off_t)(uintptr_t)p) != 6)
            wrong("writing /proc/self/mem: %s", strerror(errno));
        if (run_number(p) != (uint32_t)round * 10 + i)
            wrong("code that /proc/self/mem changed returned %x", run_number(p));
    }
    struct fault f = attempt(write_one, p + 100);
    if (f.signal != SIGSEGV || f.error != 7)
        wrong("code that /proc/self/mem changed is writable");
    close(fd);
}

static bool soft_dirty(int pagemap, const void *at)
{
    uint64_t e = 0;

    if (pread(pagemap, &e, 8, (off_t)((uintptr_t)at / PAGE * 8)) != 8)
        wrong("/proc/self/pagemap: %s", strerror(errno));
    return e >> 55 & 1;
}

void part_soft_dirty(uint64_t round)
{
    static volatile uint8_t *p;
    int clear = open("/proc/self/clear_refs", O_WRONLY), pagemap = open("/proc/self/pagemap", O_RDONLY);

    if (!p)
        p = map(32 * PAGE, PROT_READ | PROT_WRITE);
    for (unsigned i = 0; i < 32; i++)
        p[i * PAGE] = (uint8_t)round;
    if (clear < 0 || pagemap < 0 || !soft_dirty(pagemap, (void *)p) || write(clear, "4", 1) != 1 || soft_dirty(pagemap, (void *)p)) {
        lacking("soft-dirty pages");
    } else {
        for (unsigned i = 0; i < 32; i++)
            (void)p[i * PAGE];
        for (unsigned i = 0; i < 32; i += 3)
            p[i * PAGE + 7]++;
        for (unsigned i = 0; i < 32; i++)
            if (soft_dirty(pagemap, (void *)(p + i * PAGE)) != (i % 3 == 0))
                wrong("page %u was %swritten, and the kernel does not know", i, i % 3 ? "not " : "");
    }
    close(clear), close(pagemap);
}

static void *serve_faults(void *argument)
{
    int fd = (int)(intptr_t)argument;
    static uint8_t page[4096] __attribute__((aligned(4096)));
    struct uffd_msg m;

    for (unsigned i = 0; i < 16; i++) {
        if (read(fd, &m, sizeof(m)) != sizeof(m) || m.event != UFFD_EVENT_PAGEFAULT)
            wrong("userfaultfd: %s", strerror(errno));
        memset(page, 0, sizeof(page));
        memcpy(page + 16, &m.arg.pagefault.address, 8);
        struct uffdio_copy copy = { .dst = m.arg.pagefault.address & ~(PAGE - 1), .src = (uintptr_t)page, .len = PAGE };
        if (ioctl(fd, UFFDIO_COPY, &copy))
            wrong("UFFDIO_COPY: %s", strerror(errno));
    }
    return NULL;
}

/* Another thread brings the pages; it learns the page's address only. */
void part_userfault(uint64_t round)
{
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
    struct uffdio_api api = { .api = UFFD_API };
    uint8_t *p = map(16 * PAGE, PROT_READ | PROT_WRITE);
    struct uffdio_register r = { .range = { (uintptr_t)p, 16 * PAGE }, .mode = UFFDIO_REGISTER_MODE_MISSING };
    pthread_t thread;

    if (fd < 0) {
        lacking("userfaultfd: %s", strerror(errno));
        return;
    }
    if (ioctl(fd, UFFDIO_API, &api) || ioctl(fd, UFFDIO_REGISTER, &r))
        wrong("userfaultfd: %s", strerror(errno));
    pthread_create(&thread, NULL, serve_faults, (void *)(intptr_t)fd);
    for (unsigned i = 0; i < 16; i++) {
        uint8_t *at = p + (i * 5 + round) % 16 * PAGE;
        uint64_t found;

        at[PAGE - 8]++;
        memcpy(&found, at + 16, 8);
        if (found != (uintptr_t)at || at[PAGE - 8] != 1)
            wrong("a page of userfaultfd holds %llx, not %p", (unsigned long long)found, (void *)at);
    }
    pthread_join(thread, NULL);
    close(fd);
    munmap(p, 16 * PAGE);
}

/* ---- at once ---- */

static struct {
    volatile uint64_t sum;
    __int128 pair __attribute__((aligned(16)));
    uint8_t line[192] __attribute__((aligned(64)));
} both;

static void *count(void *argument)
{
    uint64_t *split_line = (uint64_t *)(void *)(both.line + 60);

    for (unsigned i = 0; i < 2000; i++) {
        __asm__ volatile("lock incq %0" : "+m"(both.sum)::"cc");
        for (uint8_t done = 0; !done;) {
            uint64_t low = ((volatile uint64_t *)&both.pair)[0], high = ((volatile uint64_t *)&both.pair)[1], new_low = low + 1, new_high = high + 3;

            __asm__ volatile("lock cmpxchg16b %1; setz %0" : "=q"(done), "+m"(both.pair), "+a"(low), "+d"(high)
                             : "b"(new_low), "c"(new_high) : "cc", "memory");
        }
        if (i % 100 == 0)
            __asm__ volatile("lock incq %0" : "+m"(*split_line)::"cc");
    }
    return argument;
}

void part_atomics(uint64_t round)
{
    enum { THREADS = 3 };
    pthread_t thread[THREADS];
    uint64_t split_sum;

    (void)round;
    memset(&both, 0, sizeof(both));
    for (unsigned i = 0; i < THREADS; i++)
        pthread_create(&thread[i], NULL, count, NULL);
    for (unsigned i = 0; i < THREADS; i++)
        pthread_join(thread[i], NULL);
    memcpy(&split_sum, both.line + 60, 8);
    if (both.sum != THREADS * 2000 || (uint64_t)both.pair != THREADS * 2000 || (uint64_t)(both.pair >> 64) != THREADS * 6000 || split_sum != THREADS * 20)
        wrong("%llu, %llu, %llu, %llu counted by %u threads", (unsigned long long)both.sum, (unsigned long long)both.pair,
              (unsigned long long)(both.pair >> 64), (unsigned long long)split_sum, THREADS);
}
