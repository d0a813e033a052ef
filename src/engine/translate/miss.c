/*
 * What translated code has C do for it without leaving: the quick half of a miss of the soft TLB, misses of the jump table, and
 * sensitive instructions that are frequent in kernels. This file, and what it calls, is compiled without vector registers, because
 * they may hold the guest's.
 */
#include "engine/translate/translate.h"
#include "isa/x86/mmu.h"

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

struct jump_entry_host *translate_enter_jump(struct jump_table *table, uint64_t rip, const void *code)
{
    unsigned i = translate_jump_index(rip);

    if (!table->entry[i].code && table->count <= TRANSLATE_JUMPS_NOTED) {
        if (table->count < TRANSLATE_JUMPS_NOTED)
            table->noted[table->count] = (uint16_t)i;
        table->count++;
    }
    table->entry[i] = (struct jump_entry_host){ rip, -rip, code, 0 };
    return &table->entry[i];
}

const struct jump_entry_host *translate_jump(struct translator *t, gva_t rip)
{
    struct x86_cpu *cpu = &t->it.cpu;
    const uint8_t *host = tlb_lookup(cpu->tlb_fetch, rip, 1, TLB_EXEC);
    const struct block *b;

    if (!host || !t->options.indirect || atomic_load_explicit(&cpu->request, memory_order_relaxed))
        return NULL;
    b = block_lookup(cpu, host);
    if (!b || !b->code || b->dead)
        return NULL;
    t->jump_misses++;
    return translate_enter_jump(t->jumps_now, rip, b->indirect);
}

static bool set_ac(struct x86_cpu *cpu, bool ac)
{
    /* What x86_update_mode() comes to when only AC changes at CPL 0. */
    cpu->s.rflags = ac ? cpu->s.rflags | RFLAGS_AC : cpu->s.rflags & ~(uint64_t)RFLAGS_AC;
    cpu->tlb = x86_kernel_set(cpu, ac);
    return true;
}

bool translate_quick(struct translator *t, const struct translate_site *site)
{
    struct x86_cpu *cpu = &t->it.cpu;
    uint64_t base = cpu->s.seg[SEG_GS].base;

    if (site->quick == QUICK_PUSHF) {
        t->value = x86_rflags(cpu) & ~(uint64_t)(RFLAGS_VM | RFLAGS_RF);
        return true;
    }
    if (cpu->cpl != 0)
        return false;
    switch ((enum translate_quick)site->quick) {
    case QUICK_CLI: cpu->s.rflags &= ~(uint64_t)RFLAGS_IF; return true;
    case QUICK_STAC: return set_ac(cpu, true);
    case QUICK_CLAC: return set_ac(cpu, false);
    case QUICK_SWAPGS:
        cpu->s.seg[SEG_GS].base = cpu->s.kernel_gs_base;
        cpu->s.kernel_gs_base = base;
        return true;
    default: return false;
    }
}
