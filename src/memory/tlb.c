/*
 * The soft TLB's maintenance: see tlb.h for what an entry means.
 *
 * Runs in the thread of the vCPU that owns the set. A tag of zero is the cheapest one
 * that misses: it could only match page 0, whose index is 0, or, where an access wraps around the
 * end of the address space, the last page. So a set is cleared by filling it with zeros and giving
 * the first and the last entry alone their proper tags.
 */
#include "memory/tlb.h"

#include <string.h>

void tlb_flush_index(struct tlb_set *set, unsigned index)
{
    uint64_t never = tlb_never(index);
    set->entry[index] = (struct tlb_entry){.tag = {never, never, never}};
}

void tlb_init(struct tlb_set *set)
{
    tlb_flush_index(set, 0);
    tlb_flush_index(set, TLB_ENTRIES - 1);
}

/* Entries whose bits in tlb_set.used belong together. */
#define CHUNK (TLB_ENTRIES / 64)

/* The first entry in use from index i on, or TLB_ENTRIES. Steps over the chunks where nothing is. */
static unsigned next_used(const struct tlb_set *set, unsigned i)
{
    while (i < TLB_ENTRIES && !(set->used >> (i / CHUNK) & 1))
        i = (i / CHUNK + 1) * CHUNK;
    return i;
}

void tlb_flush(struct tlb_set *set)
{
    for (unsigned i = next_used(set, 0); i < TLB_ENTRIES; i = next_used(set, i + CHUNK))
        memset(&set->entry[i], 0, CHUNK * sizeof(set->entry[0]));
    set->used = 0;
    tlb_init(set);
}

/* Whether any kind of the entry is for this page. */
static bool holds(const struct tlb_entry *e, uint64_t page_tag)
{
    return e->tag[TLB_READ] == page_tag || e->tag[TLB_WRITE] == page_tag ||
           e->tag[TLB_EXEC] == page_tag;
}

void tlb_flush_page(struct tlb_set *set, gva_t va)
{
    unsigned index = tlb_index(va);
    if (holds(&set->entry[index], -(va & GUEST_PAGE_MASK)))
        tlb_flush_index(set, index);
}

void tlb_flush_range(struct tlb_set *set, gva_t start, uint64_t size)
{
    for (unsigned i = next_used(set, 0); i < TLB_ENTRIES; i = next_used(set, i + 1)) {
        const struct tlb_entry *e = &set->entry[i];
        for (unsigned kind = TLB_READ; kind <= TLB_EXEC; kind++) {
            gva_t page = -e->tag[kind];
            if (tlb_index(page) == i && page - start < size) {
                tlb_flush_index(set, i);
                break;
            }
        }
    }
}

void tlb_fill(struct tlb_set *set, gva_t va, const void *host_page, enum tlb_kind kind)
{
    unsigned index = tlb_index(va);
    struct tlb_entry *e = &set->entry[index];
    gva_t page = va & GUEST_PAGE_MASK;
    uint64_t addend = (uint64_t)(uintptr_t)host_page - page;

    if (e->addend != addend || !holds(e, -page)) {
        tlb_flush_index(set, index);
        e->addend = addend;
    }
    e->tag[kind] = -page;
    set->used |= 1ull << (index / CHUNK);
}

void tlb_drop_writes_to(struct tlb_set *set, const void *host_page)
{
    for (unsigned i = next_used(set, 0); i < TLB_ENTRIES; i = next_used(set, i + 1)) {
        struct tlb_entry *e = &set->entry[i];
        gva_t page = -e->tag[TLB_WRITE];
        if (tlb_index(page) == i && page + e->addend == (uint64_t)(uintptr_t)host_page)
            e->tag[TLB_WRITE] = tlb_never(i);
    }
}

void tlb_drop_writes(struct tlb_set *set)
{
    for (unsigned i = next_used(set, 0); i < TLB_ENTRIES; i = next_used(set, i + 1))
        set->entry[i].tag[TLB_WRITE] = tlb_never(i);
}
