/*
 * The soft TLB of an x86 vCPU: which set serves which address space and privilege, what each
 * architectural flush drops, and filling from a page walk.
 *
 * SDM vol. 3A 4.10. The vCPU's thread. User mode has a data and a fetch set for each of the last
 * X86_TLB_SPACES PCIDs (without PCIDs: one space, flushed when CR3 is loaded). The supervisor's
 * sets are shared by all address spaces and keep global pages across loads of CR3, so that the
 * kernel does not start cold after each context switch; what is not global in them belongs to the
 * current address space and is dropped when it is left.
 */
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "base/util.h"
#include "isa/x86/mmu.h"
#include "isa/x86/trial.h"

#define KEY_VALID (1ull << 63)

struct tlb_set x86_checking_set;

static void set_init(struct x86_tlb *t, unsigned view)
{
    tlb_init(&t->set);
    t->view = (uint8_t)view;
}

int x86_tlb_create(struct x86_cpu *cpu)
{
    /* Fresh zero pages: sets that are never used cost little. */
    struct x86_tlbs *tlbs = mmap(NULL, sizeof(*tlbs), PROT_READ | PROT_WRITE,
                                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (tlbs == MAP_FAILED)
        return -ENOMEM;
    cpu->tlbs = tlbs;
    set_init(&tlbs->kernel, VIEW_KERNEL);
    set_init(&tlbs->kernel_ac, VIEW_KERNEL_AC);
    set_init(&tlbs->kernel_fetch, VIEW_KERNEL);
    tlbs->kernel_fetch.fetched = tlbs->kernel_fetched;
    for (unsigned i = 0; i < X86_TLB_SPACES; i++) {
        set_init(&tlbs->space[i].data, VIEW_USER);
        set_init(&tlbs->space[i].fetch, VIEW_USER);
        tlbs->space[i].fetch.fetched = tlbs->space[i].fetched;
    }
    /* All vCPUs write the same here, and nobody writes it otherwise. */
    tlb_init(&x86_checking_set);
    x86_tlb_flush_all(cpu);
    return 0;
}

void x86_tlb_destroy(struct x86_cpu *cpu)
{
    if (cpu->tlbs)
        munmap(cpu->tlbs, sizeof(*cpu->tlbs));
    cpu->tlbs = NULL;
    cpu->space = NULL;
}

/* ---- one set ---- */

static void flush_set(struct x86_tlb *t)
{
    if (!t->dirty)
        return;
    tlb_flush(&t->set);
    memset(t->large, 0, sizeof(t->large));
    if (t->fetched)
        memset(t->fetched, 0, X86_TLB_FETCHED / 8);
    t->locals = 0;
    t->dirty = false;
}

/* Drops what is not global from a supervisor's set. True if there was something. */
static bool flush_local(struct x86_tlb *t)
{
    unsigned locals = t->locals;

    if (locals > X86_TLB_LOCALS) {
        flush_set(t);
        return true;
    }
    for (unsigned i = 0; i < locals; i++)
        tlb_flush_index(&t->set, t->local[i]);
    t->locals = 0;
    return locals != 0;
}

static void note_local(struct x86_tlb *t, gva_t va)
{
    uint16_t index = (uint16_t)tlb_index(va);

    if (t->locals && t->locals <= X86_TLB_LOCALS && t->local[t->locals - 1] == index)
        return;
    if (t->locals < X86_TLB_LOCALS)
        t->local[t->locals] = index;
    if (t->locals <= X86_TLB_LOCALS)
        t->locals++;
}

/*
 * A filter with one bit per hash of a large page's number: no false negatives. 2 MiB pages are kept
 * by their 4 MiB range, to be one case with those of 32-bit paging.
 */
static unsigned large_hash(gva_t va, unsigned shift)
{
    return (unsigned)(((va >> shift) * 0x9e3779b97f4a7c15ull + shift) >> 54);
}

static void mark_large(struct x86_tlb *t, gva_t va, uint64_t page_size)
{
    unsigned h = large_hash(va, page_size == GIB(1) ? 30 : 22);
    t->large[h / 64] |= 1ull << (h % 64);
}

static bool maybe_large(const struct x86_tlb *t, gva_t va, unsigned shift)
{
    unsigned h = large_hash(va, shift);
    return t->large[h / 64] >> (h % 64) & 1;
}

static unsigned fetched_hash(gva_t va)
{
    return (unsigned)((va >> GUEST_PAGE_SHIFT) * 0x9e3779b97f4a7c15ull >> 50) % X86_TLB_FETCHED;
}

/* False when certainly no entry of the page was made since the set was empty, even if another took
 * its place since. */
static bool flush_page(struct x86_tlb *t, gva_t va)
{
    if (!t->dirty)
        return false;
    if (maybe_large(t, va, 30)) {
        tlb_flush_range(&t->set, align_down(va, GIB(1)), GIB(1));
        return true;
    }
    if (maybe_large(t, va, 22)) {
        tlb_flush_range(&t->set, align_down(va, MIB(4)), MIB(4));
        return true;
    }
    tlb_flush_page(&t->set, va);
    return !t->fetched || (t->fetched[fetched_hash(va) / 64] >> (fetched_hash(va) % 64) & 1);
}

/* ---- address spaces ---- */

static uint64_t key_in_force(const struct x86_cpu *cpu)
{
    return KEY_VALID | (cpu->s.cr4 & CR4_PCIDE ? cpu->s.cr3 & 0xfff : 0);
}

/* NULL: the supervisor's. */
static void mapping_changed(struct x86_cpu *cpu, const struct x86_tlb_space *space)
{
    if (cpu->hooks && cpu->hooks->mapping_changed)
        cpu->hooks->mapping_changed(cpu, space);
}

static void flushed(struct x86_cpu *cpu, const struct x86_tlb_space *space, gva_t va, bool all)
{
    if (cpu->hooks && cpu->hooks->flushed)
        cpu->hooks->flushed(cpu, space, va, all);
}

static void flush_space(struct x86_cpu *cpu, struct x86_tlb_space *space)
{
    flushed(cpu, space, 0, true);
    if (space->fetch.dirty)
        mapping_changed(cpu, space);
    flush_set(&space->data);
    flush_set(&space->fetch);
}

static void flush_kernel_local(struct x86_cpu *cpu)
{
    flush_local(&cpu->tlbs->kernel);
    flush_local(&cpu->tlbs->kernel_ac);
    if (flush_local(&cpu->tlbs->kernel_fetch))
        mapping_changed(cpu, NULL);
}

static void flush_kernel_page(struct x86_cpu *cpu, gva_t va)
{
    flush_page(&cpu->tlbs->kernel, va);
    flush_page(&cpu->tlbs->kernel_ac, va);
    if (flush_page(&cpu->tlbs->kernel_fetch, va))
        mapping_changed(cpu, NULL);
}

static void flush_space_page(struct x86_cpu *cpu, struct x86_tlb_space *space, gva_t va)
{
    flushed(cpu, space, va, false);
    flush_page(&space->data, va);
    if (flush_page(&space->fetch, va))
        mapping_changed(cpu, space);
}

/* The space with this key; the least recently used one is recycled when there is none. */
static struct x86_tlb_space *find_space(struct x86_cpu *cpu, uint64_t key, bool *found)
{
    struct x86_tlb_space *oldest = &cpu->tlbs->space[0];

    for (unsigned i = 0; i < X86_TLB_SPACES; i++) {
        struct x86_tlb_space *s = &cpu->tlbs->space[i];
        if (s->cr3_key == key) {
            *found = true;
            s->used = ++cpu->space_clock;
            return s;
        }
        if (s->used < oldest->used)
            oldest = s;
    }
    *found = false;
    flush_space(cpu, oldest);
    oldest->cr3_key = key;
    oldest->used = ++cpu->space_clock;
    return oldest;
}

/* ---- the architecture's flushes ---- */

void x86_tlb_flush_all(struct x86_cpu *cpu)
{
    bool found;

    cpu->tlb_flushes++;
    flush_set(&cpu->tlbs->kernel);
    flush_set(&cpu->tlbs->kernel_ac);
    flush_set(&cpu->tlbs->kernel_fetch);
    for (unsigned i = 0; i < X86_TLB_SPACES; i++) {
        flush_space(cpu, &cpu->tlbs->space[i]);
        cpu->tlbs->space[i].cr3_key = 0;
        cpu->tlbs->space[i].used = 0;
    }
    cpu->space = find_space(cpu, key_in_force(cpu), &found);
    x86_load_pdptes(cpu, cpu->s.cr0, cpu->s.cr3, cpu->s.cr4);
    x86_update_mode(cpu);
    mapping_changed(cpu, NULL);
}

void x86_tlb_flush_page(struct x86_cpu *cpu, gva_t va)
{
    flush_kernel_page(cpu, va);
    /* Global pages of the user are kept in whatever space they were filled in, so all are looked
     * at. */
    for (unsigned i = 0; i < X86_TLB_SPACES; i++)
        flush_space_page(cpu, &cpu->tlbs->space[i], va);
}

void x86_tlb_load_cr3(struct x86_cpu *cpu, uint64_t old_cr3, bool no_flush)
{
    bool found;
    struct x86_tlb_space *space = find_space(cpu, key_in_force(cpu), &found);

    if (found && !(no_flush && (cpu->s.cr4 & CR4_PCIDE))) {
        flush_space(cpu, space);
        cpu->tlb_flushes++;
    }
    flush_kernel_local(cpu);
    x86_load_pdptes(cpu, cpu->s.cr0, cpu->s.cr3, cpu->s.cr4);
    if (space != cpu->space) {
        cpu->space = space;
        x86_update_mode(cpu);
    }
}

void x86_tlb_invpcid(struct x86_cpu *cpu, unsigned type, unsigned pcid, gva_t va)
{
    uint64_t key = KEY_VALID | pcid;

    if (type == 2) {
        x86_tlb_flush_all(cpu);
        return;
    }
    if (type != 0)
        cpu->tlb_flushes++;
    for (unsigned i = 0; i < X86_TLB_SPACES; i++) {
        struct x86_tlb_space *s = &cpu->tlbs->space[i];
        if (type == 0 && s->cr3_key == key)
            flush_space_page(cpu, s, va);
        else if (type == 3 || (type == 1 && s->cr3_key == key))
            flush_space(cpu, s);
    }
    if (type == 3 || cpu->space->cr3_key == key) {
        if (type == 0)
            flush_kernel_page(cpu, va);
        else
            flush_kernel_local(cpu);
    }
}

static void writes_dropped(struct x86_cpu *cpu, const void *host_page)
{
    if (cpu->hooks && cpu->hooks->writes_dropped)
        cpu->hooks->writes_dropped(cpu, host_page);
}

void x86_tlb_drop_writes_to(struct x86_cpu *cpu, const void *host_page)
{
    writes_dropped(cpu, host_page);
    if (cpu->tlbs->kernel.dirty)
        tlb_drop_writes_to(&cpu->tlbs->kernel.set, host_page);
    if (cpu->tlbs->kernel_ac.dirty)
        tlb_drop_writes_to(&cpu->tlbs->kernel_ac.set, host_page);
    for (unsigned i = 0; i < X86_TLB_SPACES; i++)
        if (cpu->tlbs->space[i].data.dirty)
            tlb_drop_writes_to(&cpu->tlbs->space[i].data.set, host_page);
}

void x86_tlb_drop_writes(struct x86_cpu *cpu)
{
    writes_dropped(cpu, NULL);
    if (cpu->tlbs->kernel.dirty)
        tlb_drop_writes(&cpu->tlbs->kernel.set);
    if (cpu->tlbs->kernel_ac.dirty)
        tlb_drop_writes(&cpu->tlbs->kernel_ac.set);
    for (unsigned i = 0; i < X86_TLB_SPACES; i++)
        if (cpu->tlbs->space[i].data.dirty)
            tlb_drop_writes(&cpu->tlbs->space[i].data.set);
}

/* ---- translation and fill ---- */

/*
 * Whether the write tag may be filled. The other side is a decoder that sets PAGE_CODE and then
 * looks at PAGE_WRITABLE: one of the two always sees the other's flag.
 */
static bool may_write_unseen(struct x86_cpu *cpu, _Atomic uint8_t *flags)
{
    uint8_t f = atomic_load(flags);

    if (!(f & PAGE_DIRTY) && atomic_load_explicit(&cpu->mem->dirty_logging, memory_order_relaxed))
        atomic_fetch_or(flags, PAGE_DIRTY);
    if (f & PAGE_CODE)
        return false;
    if (!(f & PAGE_WRITABLE))
        f = atomic_fetch_or(flags, PAGE_WRITABLE);
    return !(f & PAGE_CODE);
}

/* Whether a read may fill the write tag along: only where that changes nothing for anybody else. */
static bool already_written_unseen(struct x86_cpu *cpu, _Atomic uint8_t *flags)
{
    return (atomic_load(flags) & (PAGE_CODE | PAGE_WRITABLE | PAGE_SAVE)) == PAGE_WRITABLE &&
           !atomic_load_explicit(&cpu->mem->dirty_logging, memory_order_relaxed);
}

/* Enters what a walk found into the set. False: it is not RAM, or (a write) the page is one that others watch. */
static bool fill(struct x86_cpu *cpu, struct x86_tlb *t, gva_t va, enum x86_access access, const struct x86_walk_result *w,
                 struct x86_place *place)
{
    _Atomic uint8_t *flags;
    uint8_t *page;

    place->gpa = w->gpa;
    if ((w->gpa & GUEST_PAGE_MASK) == cpu->apic_base)
        return false;
    page = memory_page(cpu->mem, w->gpa, &flags);
    if (!page)
        return false;
    place->host = page + (va & ~GUEST_PAGE_MASK);
    if (access == ACCESS_WRITE && (atomic_load_explicit(flags, memory_order_relaxed) & PAGE_SAVE))
        memory_before_write(cpu->mem, w->gpa);

    t->dirty = true;
    if (w->page_size != GUEST_PAGE_SIZE)
        mark_large(t, va, w->page_size);
    if (!w->global && t->view != VIEW_USER)
        note_local(t, va);
    if (access == ACCESS_EXEC) {
        t->fetched[fetched_hash(va) / 64] |= 1ull << (fetched_hash(va) % 64);
        tlb_fill(&t->set, va, page, TLB_EXEC);
        return true;
    }
    tlb_fill(&t->set, va, page, TLB_READ);
    if (access == ACCESS_READ) {
        if (w->write_ready && already_written_unseen(cpu, flags) && x86_trial_opens(cpu, page))
            tlb_fill(&t->set, va, page, TLB_WRITE);
    } else if (may_write_unseen(cpu, flags)) {
        if (x86_trial_opens(cpu, page))
            tlb_fill(&t->set, va, page, TLB_WRITE);
    } else {
        place->code = true;
        return false;
    }
    return true;
}

void x86_translate(struct x86_cpu *cpu, struct tlb_set *set, gva_t va, enum x86_access access,
                   struct x86_place *place)
{
    if (set == &x86_checking_set)
        set = &cpu->space->data.set;

    struct x86_walk_result w;
    uint32_t error = 0;

    place->code = false;
    place->host = tlb_lookup(set, va, 1, (enum tlb_kind)access);
    if (place->host)
        return;

    cpu->tlb_misses++;
    if (cpu->long_mode && !x86_canonical(cpu, va)) {
        if (access == ACCESS_EXEC)
            x86_raise_error(cpu, X86_GP, 0);
        x86_raise_non_canonical(cpu, va);
    }
    if (x86_walk_for_fill(cpu, va, access, container_of(set, struct x86_tlb, set)->view, &w, &error) < 0)
        x86_raise_page_fault(cpu, va, error);
    fill(cpu, container_of(set, struct x86_tlb, set), va, access, &w, place);
}

bool x86_tlb_try_fill(struct x86_cpu *cpu, struct tlb_set *set, gva_t va, enum x86_access access)
{
    struct x86_walk_result w;
    struct x86_place place;
    uint32_t error;

    cpu->tlb_misses++;
    if (set == &x86_checking_set || (cpu->long_mode && !x86_canonical(cpu, va)))
        return false;
    /* A walk that ends in a fault changes nothing, one for a read at most accessed bits, which processors set ahead of time too.
     * Dirty bits are for writes that happen. */
    if (x86_walk_for_fill(cpu, va, access == ACCESS_WRITE ? ACCESS_READ : access, container_of(set, struct x86_tlb, set)->view,
                          &w, &error) < 0 || (access == ACCESS_WRITE && !w.write_ready))
        return false;
    return fill(cpu, container_of(set, struct x86_tlb, set), va, access, &w, &place);
}
