/*
 * The quick half of a miss of the soft TLB. This file, and what it calls, is compiled without vector registers, because they
 * may hold the guest's.
 */
#include "engine/translate/translate.h"

const void *translate_fill(struct translator *t, struct translate_site *site, gva_t va)
{
    struct x86_cpu *cpu = &t->it.cpu;

    t->fills++;
    if ((va & (GUEST_PAGE_SIZE - 1)) + site->span <= GUEST_PAGE_SIZE && !(site->aligned && va & (site->align - 1u)) &&
        x86_tlb_try_fill(cpu, cpu->tlb, va, (enum x86_access)site->kind))
        return site->retry;
    if (!site->group)
        return NULL;
    t->group_misses++;
    return site->block->apart ? site->apart : NULL;
}
