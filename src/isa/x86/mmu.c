/*
 * Paging: the page walk, and the address spaces of the soft TLB.
 *
 * SDM vol. 3A ch. 4. Runs in the vCPU's thread. Page tables are guest RAM that other vCPUs and devices change
 * at any time: each entry is read once, and its accessed and dirty bits are set by compare-exchange with
 * the value the walk went by; when that fails the walk starts over. A paging-structure entry outside RAM reads as all
 * ones, which has reserved bits set.
 */
#include "isa/x86/mmu.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"

#define PTE_P 0x001ull
#define PTE_W 0x002ull
#define PTE_U 0x004ull
#define PTE_A 0x020ull
#define PTE_D 0x040ull
#define PTE_PS 0x080ull
#define PTE_G 0x100ull
#define PTE_NX (1ull << 63)

#define MAX_LEVELS 5

struct slot {
    uint8_t *host;
    gpa_t gpa;
    _Atomic uint8_t *flags;
    uint64_t value;
};

struct walk {
    gpa_t gpa;
    uint64_t page_size;
};

void x86_phys_written(struct x86_cpu *cpu, gpa_t gpa, unsigned len, _Atomic uint8_t *flags)
{
    atomic_thread_fence(memory_order_seq_cst);
    uint8_t f = atomic_load_explicit(flags, memory_order_relaxed);
    if (!(f & PAGE_DIRTY) && atomic_load_explicit(&cpu->mem->dirty_logging, memory_order_relaxed))
        atomic_fetch_or(flags, PAGE_DIRTY);
    if ((f & PAGE_CODE) && cpu->hooks)
        cpu->hooks->code_written(cpu, gpa, len);
}

static void read_slot(struct x86_cpu *cpu, struct slot *s, gpa_t gpa, unsigned size)
{
    s->gpa = gpa;
    s->host = memory_page(cpu->mem, gpa, &s->flags);
    if (!s->host) {
        s->value = size == 8 ? ~0ull : UINT32_MAX;
        return;
    }
    s->host += gpa & ~GUEST_PAGE_MASK;
    s->value = size == 8 ? __atomic_load_n((uint64_t *)s->host, __ATOMIC_RELAXED)
                         : __atomic_load_n((uint32_t *)s->host, __ATOMIC_RELAXED);
}

/* Sets bits in an entry unless they are set. False when the entry is not any more what the walk saw. */
static bool set_bits(struct x86_cpu *cpu, const struct slot *s, uint64_t bits, unsigned size)
{
    if ((s->value & bits) == bits)
        return true;
    bool same;
    if (size == 8) {
        uint64_t old = s->value;
        same = __atomic_compare_exchange_n((uint64_t *)s->host, &old, old | bits, false, __ATOMIC_SEQ_CST,
                                           __ATOMIC_RELAXED);
    } else {
        uint32_t old = (uint32_t)s->value;
        same = __atomic_compare_exchange_n((uint32_t *)s->host, &old, old | (uint32_t)bits, false,
                                           __ATOMIC_SEQ_CST, __ATOMIC_RELAXED);
    }
    if (same)
        x86_phys_written(cpu, s->gpa, size, s->flags);
    return same;
}

/* Whether the combined permissions of all levels allow the access; SDM vol. 3A 4.6.1. */
static bool permitted(const struct x86_cpu *cpu, enum x86_access access, unsigned view, bool user, bool writable,
                      bool nx)
{
    const struct x86_state *s = &cpu->s;

    if (access == ACCESS_EXEC) {
        if (nx)
            return false;
        return view == VIEW_USER ? user : !(user && (s->cr4 & CR4_SMEP));
    }
    if (view == VIEW_USER)
        return user && (access == ACCESS_READ || writable);
    if (user && view == VIEW_KERNEL && (s->cr4 & CR4_SMAP))
        return false;
    return access == ACCESS_READ || writable || !(s->cr0 & CR0_WP);
}

static uint32_t error_code(const struct x86_cpu *cpu, enum x86_access access, unsigned view)
{
    const struct x86_state *s = &cpu->s;
    uint32_t e = 0;

    if (access == ACCESS_WRITE)
        e |= PF_WRITE;
    if (view == VIEW_USER)
        e |= PF_USER;
    if (access == ACCESS_EXEC && ((s->cr4 & CR4_SMEP) || ((s->cr4 & CR4_PAE) && (s->efer & EFER_NXE))))
        e |= PF_FETCH;
    return e;
}

/* 4- and 5-level paging, and PAE paging below its page directory pointers. */
static int walk_wide(struct x86_cpu *cpu, gva_t va, enum x86_access access, unsigned view, bool quiet,
                     struct walk *w, uint32_t *error)
{
    const struct x86_state *s = &cpu->s;
    const uint64_t address_bits = (1ull << cpu->phys_bits) - 1;
    /* PAE reserves all bits up to NX; with 4 levels bits 62:52 are the software's. */
    uint64_t reserved = (s->efer & EFER_LMA ? (1ull << 52) - 1 : ~PTE_NX) & ~address_bits;
    if (!(s->efer & EFER_NXE))
        reserved |= PTE_NX;

    struct slot slot[MAX_LEVELS + 1];
    unsigned top, level;
    gpa_t table;
    bool user, writable, nx;

again:
    user = writable = true;
    nx = false;
    if (s->efer & EFER_LMA) {
        top = s->cr4 & CR4_LA57 ? 5 : 4;
        table = s->cr3 & address_bits & GUEST_PAGE_MASK;
    } else {
        uint64_t pdpte = cpu->pdpte[(va >> 30) & 3];
        if (!(pdpte & PTE_P)) {
            *error = error_code(cpu, access, view);
            return -EFAULT;
        }
        top = 2;
        table = pdpte & address_bits & GUEST_PAGE_MASK;
    }

    for (level = top;; level--) {
        unsigned shift = 12 + 9 * (level - 1);
        read_slot(cpu, &slot[level], table + ((va >> shift) & 511) * 8, 8);
        uint64_t e = slot[level].value;

        if (!(e & PTE_P)) {
            *error = error_code(cpu, access, view);
            return -EFAULT;
        }
        uint64_t bad = reserved;
        bool leaf = level == 1;
        if (e & PTE_PS && level > 1) {
            if (level == 2 || (level == 3 && cpu->has_gib_pages)) {
                leaf = true;
                bad |= (1ull << shift) - (1ull << 13);
            } else {
                bad |= PTE_PS;
            }
        }
        if (e & bad) {
            *error = error_code(cpu, access, view) | PF_PRESENT | PF_RESERVED;
            return -EFAULT;
        }
        user = user && (e & PTE_U);
        writable = writable && (e & PTE_W);
        nx = nx || (e & PTE_NX);
        if (leaf) {
            w->page_size = 1ull << shift;
            w->gpa = (e & address_bits & ~(w->page_size - 1)) | (va & (w->page_size - 1));
            break;
        }
        table = e & address_bits & GUEST_PAGE_MASK;
    }

    if (quiet)
        return 0;
    if (!permitted(cpu, access, view, user, writable, nx)) {
        *error = error_code(cpu, access, view) | PF_PRESENT;
        return -EFAULT;
    }
    for (unsigned l = top; l > level; l--)
        if (!set_bits(cpu, &slot[l], PTE_A, 8))
            goto again;
    if (!set_bits(cpu, &slot[level], access == ACCESS_WRITE ? PTE_A | PTE_D : PTE_A, 8))
        goto again;
    return 0;
}

/* Two levels of 4-byte entries. */
static int walk_narrow(struct x86_cpu *cpu, gva_t va, enum x86_access access, unsigned view, bool quiet,
                       struct walk *w, uint32_t *error)
{
    const struct x86_state *s = &cpu->s;
    struct slot pde, pte;

again:
    read_slot(cpu, &pde, (s->cr3 & 0xfffff000) + ((va >> 22) & 1023) * 4, 4);
    bool large = (pde.value & PTE_PS) && (s->cr4 & CR4_PSE);
    struct slot *leaf = large ? &pde : &pte;

    if (pde.value & PTE_P && !large)
        read_slot(cpu, &pte, (pde.value & 0xfffff000) + ((va >> 12) & 1023) * 4, 4);
    if (!(pde.value & PTE_P) || !(leaf->value & PTE_P)) {
        *error = error_code(cpu, access, view);
        return -EFAULT;
    }
    bool user = pde.value & leaf->value & PTE_U, writable = pde.value & leaf->value & PTE_W;
    if (large) {
        /* PSE-36: bits 20:13 are address bits 39:32, as many as the processor has. */
        unsigned high = cpu->phys_bits < 40 ? cpu->phys_bits - 32u : 8;
        if (pde.value & 0x3fe000 & ~(uint64_t)(((1u << high) - 1) << 13)) {
            *error = error_code(cpu, access, view) | PF_PRESENT | PF_RESERVED;
            return -EFAULT;
        }
        w->page_size = MIB(4);
        w->gpa = (pde.value & 0xffc00000) | (pde.value & 0x1fe000) << 19 | (va & 0x3fffff);
    } else {
        w->page_size = GUEST_PAGE_SIZE;
        w->gpa = (pte.value & 0xfffff000) | (va & 0xfff);
    }

    if (quiet)
        return 0;
    if (!permitted(cpu, access, view, user, writable, false)) {
        *error = error_code(cpu, access, view) | PF_PRESENT;
        return -EFAULT;
    }
    if (!large && !set_bits(cpu, &pde, PTE_A, 4))
        goto again;
    if (!set_bits(cpu, leaf, access == ACCESS_WRITE ? PTE_A | PTE_D : PTE_A, 4))
        goto again;
    return 0;
}

static int walk(struct x86_cpu *cpu, gva_t va, enum x86_access access, unsigned view, bool quiet, struct walk *w,
                uint32_t *error)
{
    if (!(cpu->s.efer & EFER_LMA))
        va = (uint32_t)va;
    if (!(cpu->s.cr0 & CR0_PG)) {
        w->gpa = va;
        w->page_size = GUEST_PAGE_SIZE;
        return 0;
    }
    if (cpu->s.cr4 & CR4_PAE)
        return walk_wide(cpu, va, access, view, quiet, w, error);
    return walk_narrow(cpu, va, access, view, quiet, w, error);
}

int x86_walk(struct x86_cpu *cpu, gva_t va, enum x86_access access, unsigned view, gpa_t *gpa, uint64_t *page_size,
             uint32_t *error)
{
    struct walk w;

    cpu->page_walks++;
    if (walk(cpu, va, access, view, false, &w, error) < 0)
        return -EFAULT;
    *gpa = w.gpa;
    *page_size = w.page_size;
    return 0;
}

int x86_walk_quiet(const struct x86_cpu *cpu, gva_t va, gpa_t *gpa)
{
    struct walk w;
    uint32_t error;

    if ((cpu->s.efer & EFER_LMA) && !x86_canonical(cpu, va))
        return -EFAULT;
    /* A quiet walk changes nothing of the vCPU. */
    if (walk((struct x86_cpu *)cpu, va, ACCESS_READ, VIEW_KERNEL_AC, true, &w, &error) < 0)
        return -EFAULT;
    *gpa = w.gpa;
    return 0;
}

int x86_load_pdptes(struct x86_cpu *cpu, uint64_t cr0, uint64_t cr3, uint64_t cr4)
{
    const uint64_t reserved = 0x1e6 | ~((1ull << cpu->phys_bits) - 1);
    uint64_t pdpte[4];

    if (!(cr0 & CR0_PG) || !(cr4 & CR4_PAE) || (cpu->s.efer & (EFER_LME | EFER_LMA)))
        return 0;
    for (unsigned i = 0; i < 4; i++) {
        struct slot s;
        read_slot(cpu, &s, (cr3 & 0xffffffe0) + i * 8, 8);
        pdpte[i] = s.value;
        if ((pdpte[i] & PTE_P) && (pdpte[i] & reserved))
            return -EINVAL;
    }
    memcpy(cpu->pdpte, pdpte, sizeof(pdpte));
    return 0;
}

/* ---- address spaces ---- */

#define KEY_VALID (1ull << 63)

static uint64_t key_in_force(const struct x86_cpu *cpu)
{
    return KEY_VALID | (cpu->s.cr4 & CR4_PCIDE ? cpu->s.cr3 & 0xfff : 0);
}

static void mapping_changed(struct x86_cpu *cpu)
{
    if (cpu->hooks && cpu->hooks->mapping_changed)
        cpu->hooks->mapping_changed(cpu);
}

static void flush_space(struct x86_tlb_space *space)
{
    for (unsigned v = 0; v < VIEWS; v++)
        if (space->dirty & (1u << v))
            tlb_flush(&space->view[v]);
    space->dirty = 0;
    memset(space->large, 0, sizeof(space->large));
}

/* A filter with one bit per hash of a large page's number: no false negatives. */
static unsigned large_hash(gva_t va, unsigned shift)
{
    return (unsigned)(((va >> shift) * 0x9e3779b97f4a7c15ull + shift) >> 54);
}

static void mark_large(struct x86_tlb_space *space, gva_t va, uint64_t page_size)
{
    unsigned shift = page_size == GIB(1) ? 30 : 22;
    unsigned h = large_hash(va, shift);
    space->large[h / 64] |= 1ull << (h % 64);
}

static bool maybe_large(const struct x86_tlb_space *space, gva_t va, unsigned shift)
{
    unsigned h = large_hash(va, shift);
    return space->large[h / 64] >> (h % 64) & 1;
}

static void flush_page_in(struct x86_tlb_space *space, gva_t va)
{
    if (!space->dirty)
        return;
    /* 2 MiB pages are kept by their 4 MiB range, to be one case with those of 32-bit paging. */
    uint64_t range = maybe_large(space, va, 30) ? GIB(1) : maybe_large(space, va, 22) ? MIB(4) : 0;
    for (unsigned v = 0; v < VIEWS; v++) {
        if (!(space->dirty & (1u << v)))
            continue;
        if (range)
            tlb_flush_range(&space->view[v], align_down(va, range), range);
        else
            tlb_flush_page(&space->view[v], va);
    }
}

/* Makes the space with this key current; recycles the least recently used one when there is none. */
static struct x86_tlb_space *select_space(struct x86_cpu *cpu, uint64_t key, bool *found)
{
    struct x86_tlb_space *oldest = &cpu->spaces[0];

    for (unsigned i = 0; i < X86_TLB_SPACES; i++) {
        struct x86_tlb_space *s = &cpu->spaces[i];
        if (s->cr3_key == key) {
            *found = true;
            s->used = ++cpu->space_clock;
            return s;
        }
        if (s->used < oldest->used)
            oldest = s;
    }
    *found = false;
    flush_space(oldest);
    oldest->cr3_key = key;
    oldest->used = ++cpu->space_clock;
    return oldest;
}

void x86_tlb_reset(struct x86_cpu *cpu)
{
    bool found;

    cpu->tlb_flushes++;
    for (unsigned i = 0; i < X86_TLB_SPACES; i++) {
        flush_space(&cpu->spaces[i]);
        cpu->spaces[i].cr3_key = 0;
        cpu->spaces[i].used = 0;
    }
    cpu->space = select_space(cpu, key_in_force(cpu), &found);
    x86_load_pdptes(cpu, cpu->s.cr0, cpu->s.cr3, cpu->s.cr4);
    x86_update_mode(cpu);
    mapping_changed(cpu);
}

void x86_tlb_flush_all(struct x86_cpu *cpu)
{
    x86_tlb_reset(cpu);
}

void x86_tlb_flush_page(struct x86_cpu *cpu, gva_t va)
{
    /* Global entries are kept in whatever space they were filled in, so all are looked at. */
    for (unsigned i = 0; i < X86_TLB_SPACES; i++)
        flush_page_in(&cpu->spaces[i], va);
    mapping_changed(cpu);
}

void x86_tlb_load_cr3(struct x86_cpu *cpu, uint64_t old_cr3, bool no_flush)
{
    bool found;
    struct x86_tlb_space *space = select_space(cpu, key_in_force(cpu), &found);

    if (found && !(no_flush && (cpu->s.cr4 & CR4_PCIDE))) {
        flush_space(space);
        cpu->tlb_flushes++;
    }
    x86_load_pdptes(cpu, cpu->s.cr0, cpu->s.cr3, cpu->s.cr4);
    if (space != cpu->space) {
        cpu->space = space;
        x86_update_mode(cpu);
    }
    mapping_changed(cpu);
}

void x86_tlb_invpcid(struct x86_cpu *cpu, unsigned type, unsigned pcid, gva_t va)
{
    if (type >= 2) {
        x86_tlb_reset(cpu);
        return;
    }
    uint64_t key = KEY_VALID | pcid;
    for (unsigned i = 0; i < X86_TLB_SPACES; i++) {
        struct x86_tlb_space *s = &cpu->spaces[i];
        if (s->cr3_key != key)
            continue;
        if (type == 0) {
            flush_page_in(s, va);
        } else {
            flush_space(s);
            cpu->tlb_flushes++;
        }
        mapping_changed(cpu);
    }
}

void x86_tlb_drop_writes_to(struct x86_cpu *cpu, const void *host_page)
{
    for (unsigned i = 0; i < X86_TLB_SPACES; i++)
        for (unsigned v = 0; v < VIEWS; v++)
            if (cpu->spaces[i].dirty & (1u << v))
                tlb_drop_writes_to(&cpu->spaces[i].view[v], host_page);
}

/* ---- translation and fill ---- */

struct tlb_set x86_checking_set;

__attribute__((constructor)) void x86_checking_set_init(void)
{
    tlb_init(&x86_checking_set);
}

/*
 * Whether the write tag may be filled. The other side is a decoder that sets PAGE_CODE and then looks at PAGE_WRITABLE:
 * one of the two always sees the other's flag.
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

void x86_translate(struct x86_cpu *cpu, struct tlb_set *set, gva_t va, enum x86_access access,
                   struct x86_place *place)
{
    struct x86_tlb_space *space = cpu->space;
    unsigned view = set == &x86_checking_set ? VIEW_USER : (unsigned)(set - space->view);
    struct walk w;
    uint32_t error = 0;

    set = &space->view[view];
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
    cpu->page_walks++;
    if (walk(cpu, va, access, view, false, &w, &error) < 0)
        x86_raise_page_fault(cpu, va, error);

    place->gpa = w.gpa;
    if ((w.gpa & GUEST_PAGE_MASK) == cpu->apic_base)
        return;
    _Atomic uint8_t *flags;
    uint8_t *page = memory_page(cpu->mem, w.gpa, &flags);
    if (!page)
        return;
    place->host = page + (va & ~GUEST_PAGE_MASK);

    if (w.page_size != GUEST_PAGE_SIZE)
        mark_large(space, va, w.page_size);
    space->dirty |= (uint8_t)(1u << view);
    if (access == ACCESS_EXEC) {
        tlb_fill(set, va, page, TLB_EXEC);
        return;
    }
    tlb_fill(set, va, page, TLB_READ);
    if (access == ACCESS_WRITE) {
        if (may_write_unseen(cpu, flags))
            tlb_fill(set, va, page, TLB_WRITE);
        else
            place->code = true;
    }
}
