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

/* A long computation in a page with CPUID, that comes to it now and then. RDI: rounds of 1000; gives the sum of what EBX was. */
uint64_t compute_beside_cpuid(uint64_t rounds, uint64_t *computed);
__asm__(".text; .balign 4096; .globl compute_beside_cpuid\n"
        "compute_beside_cpuid: push %rbx; xor %r8d, %r8d; xor %r9d, %r9d\n"
        "1: mov $1000, %ecx\n"
        "2: imul $31, %r9, %r9; add %rcx, %r9; dec %ecx; jnz 2b\n"
        "xor %eax, %eax; cpuid; add %rbx, %r8\n"
        "dec %rdi; jnz 1b\n"
        "mov %r9, (%rsi); mov %r8, %rax; pop %rbx; ret; .balign 4096");

void part_lingering(uint64_t round)
{
    enum { ROUNDS = 200 };
    uint64_t computed, expected = 0, sum;
    unsigned a, b, c, d;

    (void)round;
    __cpuid(0, a, b, c, d);
    for (unsigned i = 0; i < ROUNDS; i++)
        for (uint64_t k = 1000; k; k--)
            expected = expected * 31 + k;
    sum = compute_beside_cpuid(ROUNDS, &computed);
    if (sum != (uint64_t)b * ROUNDS || computed != expected)
        wrong("beside CPUID: %llx instead of %llx; and %llx instead of %llx", (unsigned long long)sum, (unsigned long long)b * ROUNDS,
              (unsigned long long)computed, (unsigned long long)expected);
}
