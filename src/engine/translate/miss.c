/*
 * What translated code has C do for it without leaving: the quick half of a miss of the soft TLB, misses of the jump table, and
 * sensitive instructions that are frequent in kernels. This file, and what it calls, is compiled without vector registers, because
 * they may hold the guest's.
 */
#include "engine/translate/translate.h"
#include "device/irqchip/irqchip.h"
#include "isa/x86/mmu.h"

#include <x86intrin.h>

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

static const uint8_t *readable(struct x86_cpu *cpu, gva_t va, unsigned size)
{
    const uint8_t *host = tlb_lookup(cpu->tlb, va, size, TLB_READ);

    if (!host && x86_tlb_try_fill(cpu, cpu->tlb, va, ACCESS_READ))
        host = tlb_lookup(cpu->tlb, va, size, TLB_READ);
    return host;
}

static uint8_t *writable(struct x86_cpu *cpu, gva_t va, unsigned size)
{
    uint8_t *host = tlb_lookup(cpu->tlb, va, size, TLB_WRITE);

    if (!host && x86_tlb_try_fill(cpu, cpu->tlb, va, ACCESS_WRITE))
        host = tlb_lookup(cpu->tlb, va, size, TLB_WRITE);
    return host;
}

/* As the guest's instruction does it, also where source and destination overlap. from NULL: fills. */
static void move_elements(uint8_t *to, const uint8_t *from, uint64_t value, uint64_t size, uint64_t n)
{
#define ELEMENTS(suffix) \
    do { \
        if (from) \
            __asm__ volatile("rep movs" suffix : "+D"(to), "+S"(from), "+c"(n) : : "memory"); \
        else \
            __asm__ volatile("rep stos" suffix : "+D"(to), "+c"(n) : "a"(value) : "memory"); \
    } while (0)
    switch (size) {
    case 1: ELEMENTS("b"); break;
    case 2: ELEMENTS("w"); break;
    case 4: ELEMENTS("l"); break;
    default: ELEMENTS("q"); break;
    }
#undef ELEMENTS
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

/* A page at a time where all of that is plain RAM; false: the interpreter does the rest, registers say from where on. */
static bool copy_string(struct translator *t, const struct translate_site *site, bool fill)
{
    struct x86_cpu *cpu = &t->it.cpu;
    uint64_t size = site->span, count = site->repeats ? cpu->s.gpr[RCX] : 1;

    if (cpu->s.rflags & RFLAGS_DF)
        return false;
    while (count) {
        uint64_t to_va = cpu->s.gpr[RDI], from_va = cpu->s.gpr[RSI], bytes = GUEST_PAGE_SIZE - (to_va & (GUEST_PAGE_SIZE - 1)), n;
        const uint8_t *from = NULL;
        uint8_t *to;

        if (!fill)
            bytes = MIN(bytes, GUEST_PAGE_SIZE - (from_va & (GUEST_PAGE_SIZE - 1)));
        n = MIN(bytes / size, count);
        if (!n || atomic_load_explicit(&cpu->request, memory_order_relaxed))
            return false;
        if (!fill) {
            from = readable(cpu, from_va, (unsigned)(n * size));
            if (!from)
                return false;
        }
        to = writable(cpu, to_va, (unsigned)(n * size));
        if (!to)
            return false;
        move_elements(to, from, cpu->s.gpr[RAX], size, n);
        cpu->s.gpr[RDI] += n * size;
        if (!fill)
            cpu->s.gpr[RSI] += n * size;
        count -= n;
        if (site->repeats)
            cpu->s.gpr[RCX] = count;
    }
    return true;
}

static bool read_tsc(struct translator *t, bool with_processor)
{
    struct x86_cpu *cpu = &t->it.cpu;
    uint64_t tsc;

    if (!t->host_tsc || ((cpu->s.cr4 & CR4_TSD) && cpu->cpl != 0))
        return false;
    tsc = __rdtsc() + cpu->s.tsc_offset;
    cpu->s.gpr[RAX] = (uint32_t)tsc;
    cpu->s.gpr[RDX] = tsc >> 32;
    if (with_processor)
        cpu->s.gpr[RCX] = (uint32_t)cpu->s.tsc_aux;
    return true;
}

static bool set_ac(struct x86_cpu *cpu, bool ac)
{
    /* What x86_update_mode() comes to when only AC changes at CPL 0. */
    cpu->s.rflags = ac ? cpu->s.rflags | RFLAGS_AC : cpu->s.rflags & ~(uint64_t)RFLAGS_AC;
    cpu->tlb = x86_kernel_set(cpu, ac);
    return true;
}

/*
 * Where nothing waits for it. The interrupt shadow is that the instruction behind it comes before the next look for requests; who leaves
 * in front of that instruction takes sti_shadow along.
 */
static bool enable_interrupts(struct translator *t)
{
    struct x86_cpu *cpu = &t->it.cpu;

    t->sti_shadow = 0;
    if (cpu->s.rflags & RFLAGS_IF)
        return true;
    /* The local APIC's part is compiled as all C code is. */
    if (t->vectors_loaded || !cpu->lapic || atomic_load_explicit(&cpu->request, memory_order_relaxed) ||
        lapic_pending(cpu->lapic) >= 0)
        return false;
    cpu->s.rflags |= RFLAGS_IF;
    t->sti_shadow = 1;
    return true;
}

bool translate_quick(struct translator *t, const struct translate_site *site)
{
    struct x86_cpu *cpu = &t->it.cpu;
    uint64_t base = cpu->s.seg[SEG_GS].base;

    switch ((enum translate_quick)site->quick) {
    case QUICK_PUSHF: t->value = x86_rflags(cpu) & ~(uint64_t)(RFLAGS_VM | RFLAGS_RF); return true;
    case QUICK_RDTSC: return read_tsc(t, false);
    case QUICK_RDTSCP: return read_tsc(t, true);
    case QUICK_MOVS: return copy_string(t, site, false);
    case QUICK_STOS: return copy_string(t, site, true);
    default: break;
    }
    if (cpu->cpl != 0)
        return false;
    switch ((enum translate_quick)site->quick) {
    case QUICK_STI: return enable_interrupts(t);
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
