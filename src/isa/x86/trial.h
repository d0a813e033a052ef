/*
 * Executing instructions for trial: stores are noted so that they can be taken back, devices are not reached.
 *
 * While a trial is noting, the soft TLB has no entry that lets a store pass: every one goes through access.c, which calls
 * writing() first. When it is not noting, pages that become writable are copied before, so that it can be found out what was
 * written to them. The vCPU's thread; space.c's part runs while vector registers are the guest's.
 */
#ifndef RINGFORT_ISA_X86_TRIAL_H
#define RINGFORT_ISA_X86_TRIAL_H

#include "isa/x86/cpu.h"

#define TRIAL_PAGES 64u

struct x86_trial {
    bool noting;
    bool code_written;          /* a store that was noted hit a page of code */
    bool pages_lost;            /* more pages were written than fit */
    /* The host memory [p, p+len) is about to be written, maybe. */
    void (*writing)(struct x86_trial *trial, void *p, unsigned len);
    /* A device would be reached; does not return. */
    void (*device)(struct x86_cpu *cpu);
    unsigned pages;
    const uint8_t *page[TRIAL_PAGES];
    uint8_t image[TRIAL_PAGES][GUEST_PAGE_SIZE];
};

static inline void x86_trial_writing(struct x86_cpu *cpu, void *p, unsigned len)
{
    if (__builtin_expect(cpu->trial && cpu->trial->noting, 0))
        cpu->trial->writing(cpu->trial, p, len);
}

static inline void x86_trial_device(struct x86_cpu *cpu)
{
    if (__builtin_expect(cpu->trial && cpu->trial->noting, 0))
        cpu->trial->device(cpu);
}

/* Whether stores to this page may pass unseen from now on. */
static inline bool x86_trial_opens(struct x86_cpu *cpu, const uint8_t *page)
{
    struct x86_trial *t = cpu->trial;
    uint64_t words = GUEST_PAGE_SIZE / 8;
    const void *from = page;
    void *to;

    if (__builtin_expect(!t, 1))
        return true;
    if (t->noting)
        return false;
    for (unsigned i = 0; i < t->pages; i++)
        if (t->page[i] == page)
            return true;
    if (t->pages == TRIAL_PAGES) {
        t->pages_lost = true;
        return true;
    }
    t->page[t->pages] = page;
    to = t->image[t->pages++];
    __asm__ volatile("rep movsq" : "+S"(from), "+D"(to), "+c"(words) : : "memory");
    return true;
}

#endif
