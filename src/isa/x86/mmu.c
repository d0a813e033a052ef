/*
 * Paging: the page walk.
 *
 * SDM vol. 3A ch. 4. Runs in the vCPU's thread. Page tables are guest RAM that other vCPUs and
 * devices change at any time: each entry is read once, and its accessed and dirty bits are set by
 * compare-exchange with the value the walk went by; when that fails the walk starts over. A
 * paging-structure entry outside RAM reads as all ones, which has reserved bits set.
 */
#include "isa/x86/mmu.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"

#define PTE_P  0x001ull
#define PTE_W  0x002ull
#define PTE_U  0x004ull
#define PTE_A  0x020ull
#define PTE_D  0x040ull
#define PTE_PS 0x080ull
#define PTE_G  0x100ull
#define PTE_NX (1ull << 63)

#define MAX_LEVELS 5

struct slot {
    uint8_t *host;
    gpa_t gpa;
    _Atomic uint8_t *flags;
    uint64_t value;
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

/* Sets bits in an entry unless they are set. False when the entry is not any more what the walk
 * saw. */
static bool set_bits(struct x86_cpu *cpu, const struct slot *s, uint64_t bits, unsigned size)
{
    if ((s->value & bits) == bits)
        return true;
    if (atomic_load_explicit(s->flags, memory_order_relaxed) & PAGE_SAVE)
        memory_before_write(cpu->mem, s->gpa);
    bool same;
    if (size == 8) {
        uint64_t old = s->value;
        same = __atomic_compare_exchange_n((uint64_t *)s->host, &old, old | bits, false,
                                           __ATOMIC_SEQ_CST, __ATOMIC_RELAXED);
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
static bool permitted(const struct x86_cpu *cpu, enum x86_access access, unsigned view, bool user,
                      bool writable, bool nx)
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
    if (access == ACCESS_EXEC &&
        ((s->cr4 & CR4_SMEP) || ((s->cr4 & CR4_PAE) && (s->efer & EFER_NXE))))
        e |= PF_FETCH;
    return e;
}

/* 4- and 5-level paging, and PAE paging below its page directory pointers. */
static int walk_wide(struct x86_cpu *cpu, gva_t va, enum x86_access access, unsigned view,
                     bool quiet, struct x86_walk_result *w, uint32_t *error)
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
    w->global = (slot[level].value & PTE_G) && (s->cr4 & CR4_PGE);
    w->write_ready =
        (slot[level].value & PTE_D) && permitted(cpu, ACCESS_WRITE, view, user, writable, nx);
    return 0;
}

/* Two levels of 4-byte entries. */
static int walk_narrow(struct x86_cpu *cpu, gva_t va, enum x86_access access, unsigned view,
                       bool quiet, struct x86_walk_result *w, uint32_t *error)
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
    w->global = (leaf->value & PTE_G) && (s->cr4 & CR4_PGE);
    w->write_ready =
        (leaf->value & PTE_D) && permitted(cpu, ACCESS_WRITE, view, user, writable, false);
    return 0;
}

static int walk(struct x86_cpu *cpu, gva_t va, enum x86_access access, unsigned view, bool quiet,
                struct x86_walk_result *w, uint32_t *error)
{
    if (!(cpu->s.efer & EFER_LMA))
        va = (uint32_t)va;
    if (!(cpu->s.cr0 & CR0_PG)) {
        *w = (struct x86_walk_result){.gpa = va, .page_size = GUEST_PAGE_SIZE, .write_ready = true};
        return 0;
    }
    if (cpu->s.cr4 & CR4_PAE)
        return walk_wide(cpu, va, access, view, quiet, w, error);
    return walk_narrow(cpu, va, access, view, quiet, w, error);
}

int x86_walk_for_fill(struct x86_cpu *cpu, gva_t va, enum x86_access access, unsigned view,
                      struct x86_walk_result *w, uint32_t *error)
{
    cpu->page_walks++;
    return walk(cpu, va, access, view, false, w, error);
}

int x86_walk(struct x86_cpu *cpu, gva_t va, enum x86_access access, unsigned view, gpa_t *gpa,
             uint64_t *page_size, uint32_t *error)
{
    struct x86_walk_result w;

    if (x86_walk_for_fill(cpu, va, access, view, &w, error) < 0)
        return -EFAULT;
    *gpa = w.gpa;
    *page_size = w.page_size;
    return 0;
}

int x86_walk_quiet(const struct x86_cpu *cpu, gva_t va, gpa_t *gpa)
{
    struct x86_walk_result w;
    uint32_t error;

    if ((cpu->s.efer & EFER_LMA) && !x86_canonical(cpu, va))
        return -EFAULT;
    /* A quiet walk changes nothing of the vCPU. */
    if (walk((struct x86_cpu *)cpu, va, ACCESS_READ, VIEW_KERNEL_AC, true, &w, &error) < 0)
        return -EFAULT;
    *gpa = w.gpa;
    return 0;
}

bool x86_walk_ready(struct x86_cpu *cpu, gva_t va, struct x86_ready *r)
{
    const uint64_t address_bits = (1ull << cpu->phys_bits) - 1, wanted = PTE_P | PTE_U | PTE_A;
    /* What is reserved, and what none of the levels may have. */
    const uint64_t reserved = (((1ull << 52) - 1) & ~address_bits) | (cpu->s.efer & EFER_NXE ? 0 : PTE_NX);
    gpa_t table = cpu->s.cr3 & address_bits & GUEST_PAGE_MASK;
    bool writable = true, nx = false;

    if ((cpu->s.cr4 & CR4_LA57) || !(cpu->s.efer & EFER_LMA) || !x86_canonical(cpu, va))
        return false;
    for (unsigned level = 4;; level--) {
        unsigned shift = 12 + 9 * (level - 1);
        struct slot slot;
        bool leaf = level == 1;
        uint64_t e, low;

        read_slot(cpu, &slot, table + ((va >> shift) & 511) * 8, 8);
        e = slot.value;
        if ((e & wanted) != wanted || (e & reserved))
            return false;
        writable = writable && (e & PTE_W);
        nx = nx || (e & PTE_NX);
        if ((e & PTE_PS) && level > 1) {
            leaf = level == 2 || (level == 3 && cpu->has_gib_pages);
            if (!leaf || (e & ((1ull << shift) - (1ull << 13))))
                return false;
        }
        if (!leaf) {
            table = e & address_bits & GUEST_PAGE_MASK;
            continue;
        }
        low = (1ull << shift) - 1;
        *r = (struct x86_ready){ .gpa = (e & address_bits & ~low) | (va & low), .writable = writable && (e & PTE_D), .executable = !nx,
                                 .page_size = low + 1 };
        return true;
    }
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
