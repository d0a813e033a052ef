/*
 * Instructions for whose sake a whole page may be run in another way, in a page of their own: all else is to be seen as it is natively.
 */
#define _GNU_SOURCE
#include "probe.h"

#include <asm/ldt.h>
#include <cpuid.h>
#include <signal.h>
#include <stdio.h>

int vector_level(void)
{
    unsigned a, b, c, d, low, high;

    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE))
        return 0;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & 6) != 6 || !(c & bit_AVX))
        return 0;
    return (low & 0xe6) == 0xe6 && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_AVX512F) && (b & bit_AVX512BW) ? 2 : 1;
}

int tls_entry(struct user_desc *at, void *base, int number)
{
    long result;

    *at = (struct user_desc){ .entry_number = (unsigned)number, .base_addr = (unsigned)(uintptr_t)base, .limit = 0xfffff, .seg_32bit = 1,
                              .limit_in_pages = 1, .useable = 1 };
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(243), "b"(at) : "memory");
    return (int)result ? -1 : (int)at->entry_number;
}

void odd_sysenter(void) { __asm__ volatile("sysenter" ::: "memory"); }

__asm__(".text; .globl act_int80; act_int80: int $0x80; ret");

void part_stepped(uint64_t round)
{
    struct sigaction action = { .sa_sigaction = on_step, .sa_flags = SA_SIGINFO };
    static uint64_t words[8];

    (void)round;
    sigaction(SIGTRAP, &action, NULL);
    STEPPED(2, "CPUID", "xor %%eax, %%eax; cpuid;");
    STEPPED(2, "RDTSC", "rdtsc; rdtscp;");
    signal(SIGTRAP, SIG_DFL);
}
