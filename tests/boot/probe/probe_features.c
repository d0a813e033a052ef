/*
 * What the processor says of itself, its clocks, its number, and its segments.
 */
#define _GNU_SOURCE
#include "probe.h"

#include <asm/ldt.h>
#include <asm/prctl.h>
#include <cpuid.h>
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

/* ---- CPUID ---- */

struct answer { uint32_t a, b, c, d; };

static __attribute__((noinline)) struct answer ask(uint32_t leaf, uint32_t sub)
{
    struct answer r;

    __asm__ volatile("cpuid" : "=a"(r.a), "=b"(r.b), "=c"(r.c), "=d"(r.d) : "a"(leaf), "c"(sub));
    return r;
}

/* A line of /proc/cpuinfo about the first processor. */
static const char *cpuinfo(const char *key)
{
    static char text[65536], line[8192];
    static size_t size;
    const char *at;

    if (!size) {
        FILE *f = fopen("/proc/cpuinfo", "r");

        size = f ? fread(text, 1, sizeof(text) - 1, f) : 0;
        if (!size)
            wrong("/proc/cpuinfo: %s", strerror(errno));
        fclose(f);
    }
    at = strstr(text, key);
    if (!at || !(at = strchr(at, ':')))
        wrong("/proc/cpuinfo has no %s", key);
    snprintf(line, sizeof(line), "%.*s ", (int)strcspn(at + 1, "\n"), at + 1);
    return line;
}

static void agree(const char *flag, bool has)
{
    char word[32];

    snprintf(word, sizeof(word), " %s ", flag);
    if ((strstr(cpuinfo("flags"), word) != NULL) != has)
        wrong("the kernel and CPUID do not agree about %s", flag);
}

void part_features(uint64_t round)
{
    static struct answer first[64];
    unsigned leaves = 0;
    uint32_t low, high;

    pin(0);
    for (uint32_t leaf = 0; leaf < 0x10; leaf++)
        for (uint32_t sub = 0; sub < (leaf == 4 || leaf == 7 || leaf == 0xd ? 3 : 1); sub++, leaves++) {
            struct answer r = ask(leaf, sub);

            if (!round)
                first[leaves] = r;
            for (unsigned i = 0; i < (round % 4 == 3 ? 200 : 2); i++)
                if ((r = ask(leaf, sub), memcmp(&r, &first[leaves], sizeof(r))))
                    wrong("CPUID %x.%x: %x %x %x %x, then %x %x %x %x", leaf, sub, first[leaves].a, first[leaves].b, first[leaves].c,
                          first[leaves].d, r.a, r.b, r.c, r.d);
        }
    struct answer one = ask(1, 0), seven = ask(7, 0), name = ask(0, 0);
    char vendor[16] = " ";

    memcpy(vendor + 1, &name.b, 4), memcpy(vendor + 5, &name.d, 4), memcpy(vendor + 9, &name.c, 4);
    if (!strstr(cpuinfo("vendor_id"), vendor))
        wrong("CPUID's vendor is%s, the kernel's%s", vendor, cpuinfo("vendor_id"));
    if ((unsigned)atoi(cpuinfo("stepping")) != (one.a & 15))
        wrong("steppings");
    agree("sse3", false), agree("pni", one.c & 1), agree("ssse3", one.c >> 9 & 1), agree("hypervisor", one.c >> 31), agree("avx", one.c >> 28 & 1);
    agree("rdrand", one.c >> 30 & 1), agree("xsave", one.c >> 26 & 1), agree("movbe", one.c >> 22 & 1), agree("cx16", one.c >> 13 & 1);
    agree("avx2", seven.b >> 5 & 1), agree("avx512f", seven.b >> 16 & 1), agree("erms", seven.b >> 9 & 1), agree("bmi2", seven.b >> 8 & 1);
    agree("rtm", seven.b >> 11 & 1), agree("clwb", seven.b >> 24 & 1), agree("gfni", seven.c >> 8 & 1), agree("rdpid", seven.c >> 22 & 1);
    agree("fsrm", seven.d >> 4 & 1);
    if (one.c >> 27 & 1) {
        __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        struct answer d = ask(0xd, 0);
        if ((low & ~d.a) || (high & ~d.d) || (low & 3) != 3)
            wrong("XCR0 is %x, CPUID allows %x", low, d.a);
        uint8_t *area = map(4 * PAGE, PROT_READ | PROT_WRITE);
        memset(area, 0x5a, 4 * PAGE);
        memset(area + 512, 0, 64);
        __asm__ volatile("xsave64 (%0)" ::"r"(area), "a"(-1), "d"(-1) : "memory");
        uint64_t bv;
        memcpy(&bv, area + 512, 8);
        if (bv & ~(uint64_t)low)
            wrong("XSAVE saved %llx of %x", (unsigned long long)bv, low);
        for (uint32_t i = d.b; i < 4 * PAGE; i++)
            if (area[i] != 0x5a)
                wrong("XSAVE wrote at %x, behind %x", i, d.b);
        munmap(area, 4 * PAGE);
    }
    /* With UMIP the kernel answers, without it the processor; the same each time. */
    struct { uint16_t limit; uint64_t base; } __attribute__((packed)) gdt[2] = { 0 }, idt[2] = { 0 };
    for (unsigned i = 0; i < 2; i++)
        __asm__ volatile("sgdt %0; sidt %1" : "=m"(gdt[i]), "=m"(idt[i]));
    if (memcmp(&gdt[0], &gdt[1], 10) || memcmp(&idt[0], &idt[1], 10) || !(gdt[0].base >> 63) || !(idt[0].base >> 63))
        wrong("SGDT says %llx, SIDT %llx", (unsigned long long)gdt[0].base, (unsigned long long)idt[0].base);
    /* Rights of segments: those of Linux, which has no other. */
    uint32_t limit = 0, rights = 0;
    __asm__ volatile("lsl %1, %0" : "=r"(limit) : "r"(0x2b));
    __asm__ volatile("lar %1, %0" : "=r"(rights) : "r"(0x33));
    if (limit != 0xffffffff || (rights & 0x60f800) != 0x20f800)
        wrong("LSL says %x, LAR %x", limit, rights);
}

/* ---- clocks ---- */

static uint64_t tsc(void)
{
    uint32_t low, high;

    __asm__ volatile("lfence; rdtsc" : "=a"(low), "=d"(high)::"memory");
    return low | (uint64_t)high << 32;
}

static uint64_t tscp(uint32_t *aux)
{
    uint32_t low, high;

    __asm__ volatile("rdtscp" : "=a"(low), "=d"(high), "=c"(*aux)::"memory");
    return low | (uint64_t)high << 32;
}

static double by_call(void)
{
    struct timespec t;

    syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

void part_clocks(uint64_t round)
{
    static uint64_t tsc_begin;
    static double begin;
    uint64_t last = tsc();
    double last_time = seconds();
    uint32_t aux;

    for (unsigned i = 0; i < 500; i++) {
        uint64_t now = i % 2 ? tsc() : tscp(&aux);
        double time = i % 3 ? seconds() : by_call();

        if (now < last)
            wrong("the TSC went back by %llu", (unsigned long long)(last - now));
        if (time < last_time)
            wrong("the clock went back by %.9f s", last_time - time);
        last = now, last_time = time;
        for (volatile unsigned k = 0; k < i; k++)
            ;
    }
    if (!round) {
        begin = by_call(), tsc_begin = tsc();
        return;
    }
    /* Both go at one speed. */
    double passed = by_call() - begin;
    static double hertz;
    if (passed > 0.02) {
        double is = (double)(tsc() - tsc_begin) / passed;
        if (hertz == 0)
            hertz = is;
        else if (is < hertz * 0.8 || is > hertz * 1.25)
            wrong("the TSC had %.0f MHz and has %.0f", hertz / 1e6, is / 1e6);
    }
}

/* ---- the processor's number ---- */

void part_numbers(uint64_t round)
{
    bool rdpid = strstr(cpuinfo("flags"), " rdpid ") != NULL;

    (void)round;
    for (unsigned cpu = 0; pin(cpu); cpu++)
        for (unsigned i = 0; i < 20; i++) {
            unsigned call = ~0u, number, by_lsl = ~0u, node;
            uint64_t by_pid = cpu;
            uint32_t aux;

            syscall(SYS_getcpu, &call, &node, NULL);
            number = (unsigned)sched_getcpu();
            tscp(&aux);
            __asm__ volatile("lsl %1, %0" : "+r"(by_lsl) : "r"(0x7b));
            if (rdpid)
                __asm__ volatile("rdpid %0" : "=r"(by_pid));
            if (call != cpu || number != cpu || (aux & 0xfff) != cpu || (by_lsl & 0xfff) != cpu || (by_pid & 0xfff) != cpu)
                wrong("on %u: getcpu() says %u, the vDSO %u, RDTSCP %u, LSL %u, RDPID %u", cpu, call, number, aux & 0xfff, by_lsl & 0xfff,
                      (unsigned)by_pid & 0xfff);
            for (volatile unsigned k = 0; k < 3000; k++)
                ;
        }
    unpin();
}

/* ---- the page for system calls of old ---- */

static void old_call(void *at)
{
    struct timeval t;

    rip_wanted = (uint64_t)(uintptr_t)at;
    __asm__ volatile("call *%0" ::"r"(at), "D"(&t), "S"(0) : "rax", "rcx", "r11", "memory");
}

static void read_at(void *at) { __asm__ volatile("mov (%0), %%rax" ::"r"(at) : "rax"); }

void part_vsyscall(uint64_t round)
{
    static int there = -1;
    uint64_t page = 0xffffffffff600000;

    (void)round;
    if (there < 0) {
        char line[256];
        FILE *f = fopen("/proc/self/maps", "r");

        for (there = 0; f && fgets(line, sizeof(line), f);)
            there |= strstr(line, "[vsyscall]") != NULL;
        if (f)
            fclose(f);
    }
    if (there) {
        for (unsigned i = 0; i < 20; i++) {
            struct timeval old, now;
            long result, rbx = 0x1234567890;
            uint32_t cpu = ~0u;

            __asm__ volatile("mov %%rsp, %%r12; call *%2; sub %%rsp, %%r12; jz 1f; ud2; 1:" : "=a"(result), "+b"(rbx)
                             : "r"(page), "D"(&old), "S"(0) : "rcx", "r11", "r12", "memory", "cc");
            gettimeofday(&now, NULL);
            if (result != 0 || rbx != 0x1234567890 || now.tv_sec - old.tv_sec > 5 || now.tv_sec < old.tv_sec)
                wrong("gettimeofday of the page gave %ld", result);
            __asm__ volatile("call *%1" : "=a"(result) : "r"(page + 0x800), "D"(&cpu), "S"(0) : "rcx", "r11", "memory", "cc");
            if (result != 0 || cpu > 1023)
                wrong("getcpu of the page gave %ld and %u", result, cpu);
        }
    } else {
        lacking("the page for vsyscalls");
    }
    /* Nothing begins there. */
    struct fault f = attempt(old_call, (void *)(page + 0x123));
    if (f.signal != SIGSEGV || f.rip != rip_wanted)
        wrong("in the middle of the page: signal %d at %llx", f.signal, (unsigned long long)f.rip);
    f = attempt(read_at, (void *)page);
    if (f.signal && (f.signal != SIGSEGV || f.address != page))
        wrong("reading the page: signal %d at %llx", f.signal, (unsigned long long)f.address);
}

/* ---- segments ---- */

static void set_gs(uint64_t base)
{
    if (has_fsgsbase())
        __asm__ volatile("wrgsbase %0" ::"r"(base));
    else if (syscall(SYS_arch_prctl, ARCH_SET_GS, base))
        wrong("arch_prctl: %s", strerror(errno));
}

static uint64_t get_gs(void)
{
    uint64_t base = 0;

    if (has_fsgsbase())
        __asm__ volatile("rdgsbase %0" : "=r"(base));
    else if (syscall(SYS_arch_prctl, ARCH_GET_GS, &base))
        wrong("arch_prctl: %s", strerror(errno));
    return base;
}

void part_segments(uint64_t round)
{
    static uint32_t *low;
    static int tls = -1;
    uint64_t old_gs, base;
    uint32_t value;
    uint16_t selector;

    if (!low) {
        low = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
        if (low == MAP_FAILED)
            wrong("mmap: %s", strerror(errno));
    }
    low[0] = 0x11111111 + (uint32_t)round, low[16] = ~low[0];
    __asm__ volatile("mov $0x2b, %%eax; mov %%eax, %%ds; mov %%eax, %%es" ::: "rax");
    for (unsigned i = 0; i < 20; i++)
        sched_yield();
    __asm__ volatile("mov %%ds, %0" : "=r"(selector));
    if (selector != 0x2b)
        wrong("DS is %x", selector);
    __asm__ volatile("xor %%eax, %%eax; mov %%eax, %%ds; mov %%eax, %%es" ::: "rax");

    old_gs = get_gs();
    tls = tls_entry((struct user_desc *)(void *)(low + 64), low, tls);
    if (tls >= 0) {
        __asm__ volatile("mov %1, %%gs; mov %%gs:0, %0" : "=r"(value) : "r"(tls * 8 + 3));
        base = get_gs();
        if (value != low[0] || base != (uintptr_t)low)
            wrong("a TLS selector shows %x at %llx", value, (unsigned long long)base);
        for (unsigned i = 0; i < 20; i++)
            sched_yield();
        __asm__ volatile("mov %%gs:0, %0; mov %%gs, %1" : "=r"(value), "=r"(selector));
        if (value != low[0] || selector != tls * 8 + 3)
            wrong("a TLS selector became %x with %x", selector, value);
    } else {
        lacking("set_thread_area");
    }
    struct user_desc d = { .entry_number = 5, .base_addr = (unsigned)(uintptr_t)(low + 16), .limit = 0xfffff, .seg_32bit = 1,
                           .limit_in_pages = 1, .useable = 1 };
    if (syscall(SYS_modify_ldt, 1, &d, sizeof(d)) == 0) {
        __asm__ volatile("mov %2, %%gs; mov %%gs:0, %0; mov %%gs, %1" : "=r"(value), "=r"(selector) : "r"(5 * 8 + 7));
        if (value != low[16] || selector != 5 * 8 + 7)
            wrong("a selector of the LDT shows %x", value);
        getppid();
        __asm__ volatile("mov %%gs:0, %0" : "=r"(value));
        if (value != low[16])
            wrong("a selector of the LDT shows %x after a system call", value);
    } else {
        lacking("modify_ldt");
    }
    __asm__ volatile("xor %%eax, %%eax; mov %%eax, %%gs" ::: "rax");
    set_gs(old_gs);
}

static void *keep_base(void *argument)
{
    uint64_t base = (uint64_t)(uintptr_t)argument, is;
    volatile uint64_t *page = (uint64_t *)map(PAGE, PROT_READ | PROT_WRITE);

    for (unsigned i = 0; i < 50; i++) {
        uint64_t wanted = i % 3 == 2 ? (uint64_t)(uintptr_t)page : base + i;

        page[1] = wanted;
        if (i % 2)
            set_gs(wanted);
        else if (syscall(SYS_arch_prctl, ARCH_SET_GS, wanted))
            wrong("arch_prctl: %s", strerror(errno));
        sched_yield();
        for (volatile unsigned k = 0; k < 2000; k++)
            ;
        if (i % 4 == 0)
            syscall(SYS_arch_prctl, ARCH_GET_GS, &is);
        else
            is = get_gs();
        if (is != wanted)
            wrong("GS has the base %llx, not %llx", (unsigned long long)is, (unsigned long long)wanted);
        if (i % 3 == 2) {
            __asm__ volatile("mov %%gs:8, %0" : "=r"(is));
            if (is != wanted)
                wrong("at GS:8 is %llx", (unsigned long long)is);
        }
    }
    munmap((void *)page, PAGE);
    return NULL;
}

/* Bases of segments, in threads and processes that take turns. */
void part_bases(uint64_t round)
{
    pthread_t thread[2];
    pid_t child = split();

    for (uintptr_t i = 0; i < 2; i++)
        pthread_create(&thread[i], NULL, keep_base, (void *)((i + 1) * 0x10000 * (child ? 1 : 3) + round));
    keep_base((void *)(uintptr_t)(0x7fff00000000 + round));
    for (unsigned i = 0; i < 2; i++)
        pthread_join(thread[i], NULL);
    if (!child)
        _exit(0);
    join(child);
}

/* ---- 32-bit code ---- */

/*
 * Goes to 32-bit code and back: it adds, writes a page that is new, asks INT 0x80 for the process's number, and CPUID for
 * the vendor. EDI: the numbers; ESI: the page.
 */
void part_code32(uint64_t round)
{
    static const uint8_t code[] = {
        0x8b, 0x07,                             /* mov (%edi),%eax */
        0x03, 0x47, 0x04,                       /* add 4(%edi),%eax */
        0x40,                                   /* inc %eax: a prefix in 64-bit code */
        0x89, 0x06,                             /* mov %eax,(%esi) */
        0x89, 0x86, 0x00, 0x10, 0x00, 0x00,     /* mov %eax,0x1000(%esi) */
        0xb8, 0x14, 0x00, 0x00, 0x00,           /* mov $20,%eax: getpid */
        0xcd, 0x80,                             /* int $0x80 */
        0x89, 0x46, 0x04,                       /* mov %eax,4(%esi) */
        0x31, 0xc0, 0x31, 0xc9,                 /* xor %eax,%eax; xor %ecx,%ecx */
        0x0f, 0xa2,                             /* cpuid */
        0x89, 0x5e, 0x08,                       /* mov %ebx,8(%esi) */
        0xb9, 0x00, 0x00, 0x01, 0x00,           /* mov $0x10000,%ecx */
        0xe2, 0xfe,                             /* loop . */
        0x9a, 0, 0, 0, 0, 0x33, 0x00,           /* lcall $0x33,back: what it pushes is not used */
    };
    static uint8_t *p;
    uint32_t *data, *page;

    if (!p) {
        p = mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
        if (p == MAP_FAILED)
            wrong("mmap: %s", strerror(errno));
    }
    madvise(p + 2 * PAGE, 6 * PAGE, MADV_DONTNEED);
    data = (uint32_t *)(p + PAGE), page = (uint32_t *)(p + 2 * PAGE);
    memcpy(p, code, sizeof(code));
    /* back: mov %r8,%rsp; jmp *%r9 */
    memcpy(p + 256, "\x4c\x89\xc4\x41\xff\xe1", 6);
    *(uint32_t *)(void *)(p + sizeof(code) - 6) = (uint32_t)(uintptr_t)p + 256;
    data[0] = (uint32_t)round * 3, data[1] = 0xfffffff0;

    struct { uint32_t offset; uint16_t selector; } __attribute__((packed)) there = { (uint32_t)(uintptr_t)p, 0x23 };
    __asm__ volatile("mov $0x2b, %%eax; mov %%eax, %%ds; mov %%eax, %%es;"
                     "mov %%rsp, %%r8; lea 1f(%%rip), %%r9; lea %c[top](%%rsi), %%rsp; ljmpl *(%0);"
                     "1: xor %%eax, %%eax; mov %%eax, %%ds; mov %%eax, %%es"
                     :: "r"(&there), "D"(data), "S"(page), [top] "i"(4 * PAGE)
                     : "rax", "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "memory", "cc");
    if (page[0] != data[0] + data[1] + 1 || page[PAGE / 4] != page[0])
        wrong("32-bit code added %x and %x to %x", data[0], data[1], page[0]);
    if ((pid_t)page[1] != getpid())
        wrong("INT 0x80 gave 32-bit code %d", page[1]);
    if (page[2] != ask(0, 0).b)
        wrong("CPUID gave 32-bit code %x", page[2]);
}
