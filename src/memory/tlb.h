/*
 * The soft TLB: guest virtual page → host page, per vCPU, for engines that run in software.
 *
 * A set is a direct-mapped table of TLB_ENTRIES entries for one address space and one
 * privilege view. An entry holds one tag per kind of access, stored negated, so that one
 * addition and one unsigned compare test tag and page crossing together:
 *
 *     offset = address + entry->tag[kind];           // < 4096 when the page matches
 *     hit    = offset <= 4096 - size;
 *     host   = address + entry->addend;
 *
 * A kind that must take the slow path (absent, not permitted, MMIO, page of code or
 * dirty logging for writes) has a tag that no address of this index can match.
 * The layout is fixed: translated code addresses it. Used by the owning vCPU's thread only.
 */
#ifndef RINGFORT_MEMORY_TLB_H
#define RINGFORT_MEMORY_TLB_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "memory/memory.h"

#define TLB_BITS 12             /* 16 MiB in pages of 4 KiB; with a quarter of that, page walks took an eighth of Python's time */
#define TLB_ENTRIES (1u << TLB_BITS)

enum tlb_kind { TLB_READ, TLB_WRITE, TLB_EXEC };

struct tlb_entry {
    uint64_t tag[3];            /* by enum tlb_kind; minus the page's address, or tlb_never() */
    uint64_t addend;            /* host address minus guest virtual address */
};
_Static_assert(sizeof(struct tlb_entry) == 32, "translated code shifts the index by 5");

struct tlb_set {
    _Alignas(64) struct tlb_entry entry[TLB_ENTRIES];      /* none of them in two cache lines */
    uint64_t used;              /* a bit for each 64th of the entries: something was filled there since the last flush */
};

static inline unsigned tlb_index(gva_t va) { return (va >> GUEST_PAGE_SHIFT) & (TLB_ENTRIES - 1); }

/*
 * A tag that misses for every address with this index: minus a page with another index, far enough away that the
 * sum of an address and the tag is never a little below 0 either.
 */
static inline uint64_t tlb_never(unsigned index)
{
    return -((uint64_t)(index ^ TLB_ENTRIES / 2) << GUEST_PAGE_SHIFT);
}

/* The host pointer for [va, va+size) when the set has it, else NULL. size ≤ 4096. */
static inline void *tlb_lookup(const struct tlb_set *set, gva_t va, unsigned size, enum tlb_kind kind)
{
    const struct tlb_entry *e = &set->entry[tlb_index(va)];

    if (__builtin_expect(va + e->tag[kind] <= GUEST_PAGE_SIZE - size, 1))
        return (void *)(va + e->addend);
    return NULL;
}

/* Makes a set of fresh zero pages usable without touching more than its first entry. */
void tlb_init(struct tlb_set *set);
void tlb_flush(struct tlb_set *set);
void tlb_flush_page(struct tlb_set *set, gva_t va);
void tlb_flush_index(struct tlb_set *set, unsigned index);
/* Drops the pages in [start, start+size). Walks the set. */
void tlb_flush_range(struct tlb_set *set, gva_t start, uint64_t size);
/* Fills one kind of the entry for va's page; other kinds stay if they are of the same page and host page. */
void tlb_fill(struct tlb_set *set, gva_t va, const void *host_page, enum tlb_kind kind);
/* Makes writes to this host page miss, wherever it is mapped. Walks the set. */
void tlb_drop_writes_to(struct tlb_set *set, const void *host_page);
/* All writes miss from now on (start of dirty logging). */
void tlb_drop_writes(struct tlb_set *set);

#endif
