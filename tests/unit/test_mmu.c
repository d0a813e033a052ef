/*
 * Paging: permissions in every mode against a table of rights, accessed and dirty bits, reserved
 * bits, address spaces and flushes. Accesses through the TLB are in test_access.c.
 */
#include "x86_guest.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

struct layout {
    enum paging mode;
    uint64_t size;
    unsigned leaf_level, levels; /* levels that hold permissions */
};

static const struct layout layouts[] = {
    {PAGING_32, KIB(4), 1, 2},     {PAGING_32, MIB(4), 2, 2},     {PAGING_PAE, KIB(4), 1, 2},
    {PAGING_PAE, MIB(2), 2, 2},    {PAGING_4LEVEL, KIB(4), 1, 4}, {PAGING_4LEVEL, MIB(2), 2, 4},
    {PAGING_4LEVEL, GIB(1), 3, 4},
};

/* Rows: page of the supervisor or user, read-only or writable. Columns: who asks. SDM vol.
 * 3A 4.6.1, by hand. */
enum who { USER, KERNEL_WP, KERNEL_NO_WP, SMAP_WP, SMAP_NO_WP };
static const char *const data_rights[4][5] = {
    /*          USER  K,WP  K,!WP SMAP  SMAP,!WP */
    /* clang-format off */
    /* S ro */ {"",   "r",  "rw", "r",  "rw"},
    /* S rw */ {"",   "rw", "rw", "rw", "rw"},
    /* U ro */ {"r",  "r",  "rw", "",   ""},
    /* U rw */ {"rw", "rw", "rw", "",   ""},
    /* clang-format on */
};
enum fetcher { FETCH_USER, FETCH_KERNEL, FETCH_SMEP };
static const bool fetch_rights[4][3] = {
    {false, true, true},
    {false, true, true},
    {true, true, false},
    {true, true, false},
};

static bool allowed(unsigned page, bool nx, enum x86_access access, unsigned view, bool wp,
                    bool smap, bool smep)
{
    if (access == ACCESS_EXEC)
        return !nx && fetch_rights[page][view == VIEW_USER ? FETCH_USER
                                         : smep            ? FETCH_SMEP
                                                           : FETCH_KERNEL];
    enum who who = view == VIEW_USER             ? USER
                   : view == VIEW_KERNEL && smap ? (wp ? SMAP_WP : SMAP_NO_WP)
                                                 : (wp ? KERNEL_WP : KERNEL_NO_WP);
    return strchr(data_rights[page][who], access == ACCESS_WRITE ? 'w' : 'r') != NULL;
}

static uint64_t get_entry(const void *e, enum paging mode)
{
    uint64_t v = 0;
    memcpy(&v, e, mode == PAGING_32 ? 4 : 8);
    return v;
}

static void put_entry(void *e, enum paging mode, uint64_t v)
{
    memcpy(e, &v, mode == PAGING_32 ? 4 : 8);
}

/* One page with one level that restricts it: each access by each accessor. */
static void check_page(struct guest *g, const struct layout *l, void *leaf, gva_t va, gpa_t pa,
                       unsigned page, bool nx)
{
    uint64_t fresh = get_entry(leaf, l->mode);

    for (unsigned bits = 0; bits < 8; bits++) {
        bool wp = bits & 1, smap = bits & 2, smep = bits & 4;
        g->cpu.s.cr0 = (g->cpu.s.cr0 & ~CR0_WP) | (wp ? CR0_WP : 0);
        g->cpu.s.cr4 =
            (g->cpu.s.cr4 & ~(CR4_SMAP | CR4_SMEP)) | (smap ? CR4_SMAP : 0) | (smep ? CR4_SMEP : 0);
        for (unsigned view = 0; view < VIEWS; view++) {
            for (unsigned access = ACCESS_READ; access <= ACCESS_EXEC; access++) {
                gpa_t gpa = 0;
                uint64_t size = 0;
                uint32_t error = 0;
                put_entry(leaf, l->mode, fresh);
                int ret = x86_walk(&g->cpu, va + 0x123, access, view, &gpa, &size, &error);
                uint64_t after = get_entry(leaf, l->mode);
                if (allowed(page, nx, access, view, wp, smap, smep)) {
                    assert_int_equal(ret, 0);
                    assert_int_equal(gpa, pa + 0x123);
                    assert_int_equal(size, l->size);
                    assert_int_equal(after, fresh | PTE_A | (access == ACCESS_WRITE ? PTE_D : 0));
                } else {
                    uint32_t want = PF_PRESENT | (access == ACCESS_WRITE ? PF_WRITE : 0) |
                                    (view == VIEW_USER ? PF_USER : 0);
                    if (access == ACCESS_EXEC && (smep || l->mode != PAGING_32))
                        want |= PF_FETCH;
                    assert_int_equal(ret, -EFAULT);
                    assert_int_equal(error, want);
                    assert_int_equal(after, fresh);
                }
            }
        }
    }
}

static void permissions(void **state)
{
    struct guest *g = *state;
    const gva_t va = 0x40200000;

    for (unsigned i = 0; i < ARRAY_SIZE(layouts); i++) {
        const struct layout *l = &layouts[i];
        gva_t at = align_down(va, l->size);
        gpa_t pa = l->size == GIB(1) ? 0 : align_up(MIB(4), l->size);
        /* Which level restricts: the leaf, or one above it. */
        for (unsigned level = l->leaf_level; level <= l->levels; level++) {
            for (unsigned page = 0; page < 4; page++) {
                for (unsigned nx = 0; nx <= (l->mode != PAGING_32); nx++) {
                    guest_paging(g, l->mode);
                    void *leaf = guest_map(g, at, pa, l->size, PTE_W | PTE_U, PTE_W | PTE_U);
                    void *e = guest_entry(g, at, level, PTE_W | PTE_U);
                    uint64_t v = get_entry(e, l->mode) & ~(PTE_W | PTE_U);
                    put_entry(e, l->mode,
                              v | (page & 1 ? PTE_W : 0) | (page & 2 ? PTE_U : 0) |
                                  (nx ? PTE_NX : 0));
                    check_page(g, l, leaf, at, pa, page, nx);
                }
            }
        }
    }
}

static void upper_levels_get_accessed(void **state)
{
    struct guest *g = *state;
    gpa_t gpa;
    uint64_t size;
    uint32_t error;

    guest_paging(g, PAGING_4LEVEL);
    void *leaf = guest_map(g, 0x7000, 0x200000, KIB(4), PTE_U, PTE_W | PTE_U);
    uint64_t *pml4e = (uint64_t *)guest_ram(g, GUEST_ROOT);
    uint64_t *pdpte = (uint64_t *)guest_ram(g, *pml4e & GUEST_PAGE_MASK);
    uint64_t *pde = (uint64_t *)guest_ram(g, *pdpte & GUEST_PAGE_MASK);

    /* A write to a read-only page leaves no trace. */
    assert_int_equal(x86_walk(&g->cpu, 0x7000, ACCESS_WRITE, VIEW_USER, &gpa, &size, &error),
                     -EFAULT);
    assert_false((*pml4e | *pdpte | *pde | get_entry(leaf, PAGING_4LEVEL)) & (PTE_A | PTE_D));
    assert_int_equal(x86_walk(&g->cpu, 0x7000, ACCESS_READ, VIEW_USER, &gpa, &size, &error), 0);
    assert_true(*pml4e & *pdpte & *pde & get_entry(leaf, PAGING_4LEVEL) & PTE_A);
    assert_false((*pml4e | *pdpte | *pde) & PTE_D);
    /* The quiet walk leaves none either. */
    *pml4e &= ~PTE_A;
    assert_int_equal(x86_walk_quiet(&g->cpu, 0x7abc, &gpa), 0);
    assert_int_equal(gpa, 0x200abc);
    assert_false(*pml4e & PTE_A);
    assert_int_equal(x86_walk_quiet(&g->cpu, 0x8000, &gpa), -EFAULT);
    assert_int_equal(x86_walk_quiet(&g->cpu, 0x800000000000, &gpa), -EFAULT);
}

static void not_present_at_each_level(void **state)
{
    struct guest *g = *state;
    gpa_t gpa;
    uint64_t size;
    uint32_t error;

    for (unsigned i = 0; i < ARRAY_SIZE(layouts); i++) {
        const struct layout *l = &layouts[i];
        for (unsigned level = l->leaf_level; level <= l->levels; level++) {
            guest_paging(g, l->mode);
            guest_map(g, 0, 0, l->size, PTE_W | PTE_U, PTE_W | PTE_U);
            assert_int_equal(x86_walk(&g->cpu, 0, ACCESS_WRITE, VIEW_USER, &gpa, &size, &error), 0);
            void *e = guest_entry(g, 0, level, PTE_W | PTE_U);
            /* All other bits set, so only P is asked. */
            put_entry(e, l->mode, ~PTE_P);
            assert_int_equal(x86_walk(&g->cpu, 0, ACCESS_WRITE, VIEW_USER, &gpa, &size, &error),
                             -EFAULT);
            assert_int_equal(error, PF_WRITE | PF_USER);
        }
    }
}

/* Sets one bit in one level's entry; true when a read then is a reserved-bit fault. */
static bool bit_reserved(struct guest *g, const struct layout *l, unsigned level, unsigned bit)
{
    gpa_t gpa;
    uint64_t size;
    uint32_t error = 0;

    guest_paging(g, l->mode);
    guest_map(g, 0, 0, l->size, PTE_W | PTE_U, PTE_W | PTE_U);
    void *e = guest_entry(g, 0, level, PTE_W | PTE_U);
    put_entry(e, l->mode, get_entry(e, l->mode) | 1ull << bit);
    int ret = x86_walk(&g->cpu, 0, ACCESS_READ, VIEW_KERNEL_AC, &gpa, &size, &error);
    if (ret == -EFAULT && (error & PF_RESERVED)) {
        assert_int_equal(error, PF_PRESENT | PF_RESERVED);
        return true;
    }
    return false;
}

static void reserved_bits(void **state)
{
    struct guest *g = *state;
    const struct layout small = {PAGING_4LEVEL, KIB(4), 1, 4}, two = {PAGING_4LEVEL, MIB(2), 2, 4},
                        gib = {PAGING_4LEVEL, GIB(1), 3, 4}, pae = {PAGING_PAE, KIB(4), 1, 2},
                        four = {PAGING_32, MIB(4), 2, 2};

    assert_int_equal(g->cpu.phys_bits, 46);
    /* In upper entries address bits lead to tables outside RAM, so this is for the last level. */
    assert_false(bit_reserved(g, &small, 1, 45));
    assert_false(bit_reserved(g, &pae, 1, 45));
    for (unsigned level = 1; level <= 4; level++) {
        assert_true(bit_reserved(g, &small, level, 46));
        assert_true(bit_reserved(g, &small, level, 51));
        assert_false(bit_reserved(g, &small, level, 52));
        assert_false(bit_reserved(g, &small, level, 62));
        assert_false(bit_reserved(g, &small, level, 63));
    }
    assert_true(bit_reserved(g, &small, 4, 7));
    assert_false(bit_reserved(g, &two, 2, 12));
    assert_true(bit_reserved(g, &two, 2, 13));
    assert_true(bit_reserved(g, &two, 2, 20));
    assert_false(bit_reserved(g, &two, 2, 21));
    assert_false(bit_reserved(g, &gib, 3, 12));
    assert_true(bit_reserved(g, &gib, 3, 13));
    assert_true(bit_reserved(g, &gib, 3, 29));
    assert_false(bit_reserved(g, &gib, 3, 30));
    for (unsigned level = 1; level <= 2; level++) {
        assert_true(bit_reserved(g, &pae, level, 52));
        assert_true(bit_reserved(g, &pae, level, 62));
        assert_false(bit_reserved(g, &pae, level, 63));
    }
    assert_false(bit_reserved(g, &four, 2, 12));
    assert_false(bit_reserved(g, &four, 2, 13));
    assert_false(bit_reserved(g, &four, 2, 20));
    assert_true(bit_reserved(g, &four, 2, 21));

    /* Without 1 GiB pages PS is reserved there. */
    g->cpu.has_gib_pages = false;
    assert_true(bit_reserved(g, &gib, 3, 7));

    /* Without NXE so is bit 63. */
    gpa_t gpa;
    uint64_t size;
    uint32_t error;
    guest_paging(g, PAGING_4LEVEL);
    g->cpu.s.efer &= ~EFER_NXE;
    guest_map(g, 0, 0, KIB(4), PTE_NX, 0);
    assert_int_equal(x86_walk(&g->cpu, 0, ACCESS_EXEC, VIEW_KERNEL, &gpa, &size, &error), -EFAULT);
    assert_int_equal(error, PF_PRESENT | PF_RESERVED);
    /* A table outside RAM reads as ones. */
    guest_paging(g, PAGING_4LEVEL);
    guest_put(g, GUEST_ROOT, DEVICE_BASE | PTE_P | PTE_W, 8);
    assert_int_equal(x86_walk(&g->cpu, 0, ACCESS_READ, VIEW_KERNEL, &gpa, &size, &error), -EFAULT);
    assert_int_equal(error, PF_PRESENT | PF_RESERVED);
    assert_int_equal(g->device_reads, 0);
}

static void addresses_of_large_pages(void **state)
{
    struct guest *g = *state;
    gpa_t gpa;
    uint64_t size;
    uint32_t error;

    guest_paging(g, PAGING_32);
    guest_map(g, 0x40000000, 0x3f00c00000, MIB(4), PTE_W, PTE_W);
    assert_int_equal(x86_walk(&g->cpu, 0x403fffff, ACCESS_READ, VIEW_KERNEL, &gpa, &size, &error),
                     0);
    assert_int_equal(gpa, 0x3f00ffffff);
    /* PS means nothing without CR4.PSE: the entry points to a table then. */
    g->cpu.s.cr4 &= ~CR4_PSE;
    guest_put(g, GUEST_ROOT + 4, GUEST_TABLES | PTE_P | PTE_PS, 4);
    guest_put(g, GUEST_TABLES, 0x123000 | PTE_P, 4);
    assert_int_equal(x86_walk(&g->cpu, 0x400000, ACCESS_READ, VIEW_KERNEL, &gpa, &size, &error), 0);
    assert_int_equal(gpa, 0x123000);

    /* Without paging, and with 32 bits of address at most. */
    g->cpu.s.cr0 &= ~CR0_PG;
    assert_int_equal(x86_walk(&g->cpu, 0x1fffff123, ACCESS_WRITE, VIEW_USER, &gpa, &size, &error),
                     0);
    assert_int_equal(gpa, 0xfffff123);
}

static void page_directory_pointers(void **state)
{
    struct guest *g = *state;
    gpa_t gpa;
    uint64_t size;
    uint32_t error;

    guest_paging(g, PAGING_PAE);
    guest_map(g, 0x40000000, 0x200000, KIB(4), PTE_W, PTE_W);
    assert_int_equal(x86_walk(&g->cpu, 0x40000000, ACCESS_READ, VIEW_KERNEL, &gpa, &size, &error),
                     0);
    /* They are the processor's until CR3 is loaded. */
    guest_put(g, GUEST_ROOT + 8, 0, 8);
    assert_int_equal(x86_walk(&g->cpu, 0x40000000, ACCESS_READ, VIEW_KERNEL, &gpa, &size, &error),
                     0);
    x86_tlb_load_cr3(&g->cpu, GUEST_ROOT, false);
    assert_int_equal(x86_walk(&g->cpu, 0x40000000, ACCESS_READ, VIEW_KERNEL, &gpa, &size, &error),
                     -EFAULT);
    assert_int_equal(error, 0);

    const struct x86_state *s = &g->cpu.s;
    static const uint8_t reserved[] = {1, 2, 5, 6, 7, 8, 46, 52, 63};
    for (unsigned i = 0; i < ARRAY_SIZE(reserved); i++) {
        guest_put(g, GUEST_ROOT + 8, GUEST_TABLES | PTE_P | 1ull << reserved[i], 8);
        assert_int_equal(x86_load_pdptes(&g->cpu, s->cr0, s->cr3, s->cr4), -EINVAL);
        guest_put(g, GUEST_ROOT + 8, GUEST_TABLES | 1ull << reserved[i], 8);
        assert_int_equal(x86_load_pdptes(&g->cpu, s->cr0, s->cr3, s->cr4), 0);
    }
    /* None of this outside PAE paging. */
    guest_put(g, GUEST_ROOT + 8, ~0ull, 8);
    assert_int_equal(x86_load_pdptes(&g->cpu, s->cr0 & ~CR0_PG, s->cr3, s->cr4), 0);
    assert_int_equal(x86_load_pdptes(&g->cpu, s->cr0, s->cr3, s->cr4 & ~CR4_PAE), 0);
}

/* ---- flushes ---- */

/* Reads a byte and tells whether the TLB had to be filled for it. */
static bool read_misses(struct guest *g, gva_t va)
{
    uint64_t before = g->cpu.tlb_misses;
    x86_read8(&g->cpu, va);
    return g->cpu.tlb_misses != before;
}

static void flush_by_page(void **state)
{
    struct guest *g = *state;

    guest_paging(g, PAGING_4LEVEL);
    guest_map(g, 0x1000, 0x201000, KIB(4), PTE_W, PTE_W);
    guest_map(g, 0x2000, 0x202000, KIB(4), PTE_W, PTE_W);
    guest_put(g, 0x201000, 0x11, 1);
    guest_put(g, 0x205000, 0x55, 1);
    assert_int_equal(x86_read8(&g->cpu, 0x1000), 0x11);
    assert_true(read_misses(g, 0x2000));
    assert_false(read_misses(g, 0x1000));

    guest_map(g, 0x1000, 0x205000, KIB(4), PTE_W, PTE_W);
    x86_tlb_flush_page(&g->cpu, 0x1fff);
    assert_int_equal(x86_read8(&g->cpu, 0x1000), 0x55);
    assert_false(read_misses(g, 0x2000));
    x86_tlb_load_cr3(&g->cpu, GUEST_ROOT, false);
    assert_true(read_misses(g, 0x2000));
    assert_true(read_misses(g, 0x1000));
    assert_false(read_misses(g, 0x1000));
    x86_tlb_flush_all(&g->cpu);
    assert_true(read_misses(g, 0x1000));
}

static void flush_of_large_pages(void **state)
{
    struct guest *g = *state;
    static const struct {
        enum paging mode;
        uint64_t size;
        gva_t at;
    } cases[] = {
        {PAGING_32, MIB(4), 0x40400000},
        {PAGING_PAE, MIB(2), 0x40200000},
        {PAGING_4LEVEL, MIB(2), 0xffffffff80200000},
        {PAGING_4LEVEL, GIB(1), 0xffff888000000000},
    };

    for (unsigned i = 0; i < ARRAY_SIZE(cases); i++) {
        gva_t at = cases[i].at, small = at + GIB(1);
        uint64_t size = cases[i].size;
        guest_paging(g, cases[i].mode);
        gpa_t pa = size == GIB(1) ? 0 : align_up(MIB(4), size);
        guest_map(g, at, pa, size, PTE_W, PTE_W);
        guest_map(g, small, 0x300000, KIB(4), PTE_W, PTE_W);
        uint64_t last = MIN(size, MIB(16)) - 4096;
        /* These and the small page have different places in the TLB. */
        assert_true(read_misses(g, at + 0x1000));
        assert_true(read_misses(g, at + last - 0x1000));
        assert_true(read_misses(g, small));
        assert_false(read_misses(g, at + 0x1000));
        /* One INVLPG anywhere in the page drops all of it, and nothing else. */
        x86_tlb_flush_page(&g->cpu, at + size / 2);
        assert_true(read_misses(g, at + 0x1000));
        assert_true(read_misses(g, at + last - 0x1000));
        assert_false(read_misses(g, small));
    }
}

static void pcid_load(struct guest *g, unsigned pcid, bool no_flush)
{
    uint64_t old = g->cpu.s.cr3;
    g->cpu.s.cr3 = GUEST_ROOT | pcid;
    x86_tlb_load_cr3(&g->cpu, old, no_flush);
}

static void address_spaces(void **state)
{
    struct guest *g = *state;

    guest_paging(g, PAGING_4LEVEL);
    g->cpu.s.cr4 |= CR4_PCIDE | CR4_PGE;
    x86_tlb_flush_all(&g->cpu);
    for (unsigned i = 1; i <= 3; i++)
        guest_map(g, i * 0x1000, 0x200000 + i * 0x1000, KIB(4), PTE_U | (i == 3 ? PTE_G : 0),
                  PTE_U);
    guest_set_cpl(g, 3);

    /* Entries of a PCID survive loads of others, and loads of it that keep them. */
    for (unsigned pcid = 1; pcid <= 3; pcid++) {
        pcid_load(g, pcid, true);
        for (unsigned i = 1; i <= 3; i++)
            assert_true(read_misses(g, i * 0x1000));
    }
    for (unsigned pcid = 1; pcid <= 3; pcid++) {
        pcid_load(g, pcid, true);
        assert_false(read_misses(g, 0x1000));
    }
    /* A load without the bit drops those of that PCID only. */
    pcid_load(g, 2, false);
    assert_true(read_misses(g, 0x1000));
    pcid_load(g, 1, true);
    assert_false(read_misses(g, 0x1000));

    /* INVLPG: this PCID's page, and global pages wherever they were filled in. */
    x86_tlb_flush_page(&g->cpu, 0x3000);
    assert_false(read_misses(g, 0x2000));
    for (unsigned pcid = 1; pcid <= 3; pcid++) {
        pcid_load(g, pcid, true);
        assert_true(read_misses(g, 0x3000));
    }

    /* INVPCID 0: one address of one PCID; 1: one PCID; 2 and 3: all. */
    pcid_load(g, 2, true);
    assert_true(read_misses(g, 0x2000));
    pcid_load(g, 3, true);
    x86_tlb_invpcid(&g->cpu, 0, 2, 0x1000);
    assert_false(read_misses(g, 0x1000));
    pcid_load(g, 2, true);
    assert_true(read_misses(g, 0x1000));
    assert_false(read_misses(g, 0x2000));
    x86_tlb_invpcid(&g->cpu, 1, 3, 0);
    assert_false(read_misses(g, 0x2000));
    pcid_load(g, 3, true);
    assert_true(read_misses(g, 0x1000));
    assert_true(read_misses(g, 0x2000));
    for (unsigned type = 2; type <= 3; type++) {
        x86_tlb_invpcid(&g->cpu, type, 0, 0);
        assert_true(read_misses(g, 0x1000));
        pcid_load(g, 1, true);
        assert_true(read_misses(g, 0x2000));
        pcid_load(g, 3, true);
        assert_false(read_misses(g, 0x1000));
    }
    /* A PCID that does not exist here is none of our business. */
    x86_tlb_invpcid(&g->cpu, 1, 77, 0);
    assert_false(read_misses(g, 0x1000));
}

/* The supervisor's entries: global ones stay across loads of CR3, others never outlive their
 * address space. */
static void supervisor_spaces(void **state)
{
    struct guest *g = *state;
    const gva_t kernel = 0xffff800000000000;

    guest_paging(g, PAGING_4LEVEL);
    g->cpu.s.cr4 |= CR4_PGE;
    for (unsigned pcide = 0; pcide < 2; pcide++) {
        g->cpu.s.cr3 = GUEST_ROOT;
        g->cpu.s.cr4 = (g->cpu.s.cr4 & ~CR4_PCIDE) | (pcide ? CR4_PCIDE : 0);
        x86_tlb_flush_all(&g->cpu);
        /* From few to many pages that are not global. */
        for (unsigned n = 1; n <= 128; n *= 2) {
            for (unsigned i = 0; i <= n; i++) {
                guest_map(g, kernel + i * 0x1000, 0x200000 + i * 0x1000, KIB(4), i == n ? PTE_G : 0,
                          0);
                x86_tlb_flush_page(&g->cpu, kernel + i * 0x1000);
            }
            for (unsigned how = 0; how < (pcide ? 4 : 1); how++) {
                for (unsigned i = 0; i <= n; i++)
                    x86_read8(&g->cpu, kernel + i * 0x1000);
                assert_false(read_misses(g, kernel));
                if (how == 0)
                    pcid_load(g, 0, false);
                else if (how == 1)
                    pcid_load(g, 1, true);
                else if (how == 2)
                    x86_tlb_invpcid(&g->cpu, 1, 1, 0);
                else
                    x86_tlb_invpcid(&g->cpu, 3, 0, 0);
                for (unsigned i = 0; i < n; i++)
                    assert_true(read_misses(g, kernel + i * 0x1000));
                /* With many of them it may go along. */
                if (n < 32)
                    assert_false(read_misses(g, kernel + n * 0x1000));
            }
            if (pcide) {
                x86_tlb_invpcid(&g->cpu, 0, 1, kernel);
                assert_true(read_misses(g, kernel));
                x86_tlb_invpcid(&g->cpu, 1, 7, 0);
                assert_false(read_misses(g, kernel));
                pcid_load(g, 0, true);
            }
            x86_read8(&g->cpu, kernel + n * 0x1000);
            x86_tlb_flush_page(&g->cpu, kernel + n * 0x1000);
            assert_true(read_misses(g, kernel + n * 0x1000));
            x86_tlb_flush_all(&g->cpu);
            assert_true(read_misses(g, kernel + n * 0x1000));
        }
    }
    /* Without CR4.PGE the bit means nothing. */
    g->cpu.s.cr4 &= ~(CR4_PGE | CR4_PCIDE);
    x86_tlb_flush_all(&g->cpu);
    guest_map(g, kernel, 0x200000, KIB(4), PTE_G, 0);
    x86_read8(&g->cpu, kernel);
    pcid_load(g, 0, false);
    assert_true(read_misses(g, kernel));
}

/* What the engine remembers of code is void exactly when a page it came from is flushed, or the
 * user's address space changes. */
static bool code_moved(struct guest *g, bool user)
{
    bool moved = user ? g->user_code_moved : g->supervisor_code_moved;
    bool other = user ? g->supervisor_code_moved : g->user_code_moved;
    g->user_code_moved = g->supervisor_code_moved = false;
    assert_false(other && !moved);
    return moved;
}

static void moves_of_code_are_told(void **state)
{
    struct guest *g = *state;
    const gva_t kernel = 0xffffffff81000000, large = 0xffffffffc0200000, user = 0x400000;

    guest_paging(g, PAGING_4LEVEL);
    g->cpu.s.cr4 |= CR4_PCIDE | CR4_PGE;
    x86_tlb_flush_all(&g->cpu);
    assert_true(g->supervisor_code_moved);
    for (unsigned i = 0; i < 4; i++) {
        guest_map(g, kernel + i * 0x1000, 0x200000 + i * 0x1000, KIB(4), PTE_G | PTE_W, PTE_W);
        guest_map(g, user + i * 0x1000, 0x200000 + i * 0x1000, KIB(4), PTE_U, PTE_U);
    }
    guest_map(g, large, 0x400000, MIB(2), PTE_G | PTE_W, PTE_W);
    pcid_load(g, 1, true);
    x86_fetch_pointer(&g->cpu, kernel);
    x86_fetch_pointer(&g->cpu, large + 0x5000);
    guest_set_cpl(g, 3);
    x86_fetch_pointer(&g->cpu, user);
    x86_read8(&g->cpu, user + 0x1000);
    guest_set_cpl(g, 0);
    x86_read8(&g->cpu, kernel + 0x1000);
    g->user_code_moved = g->supervisor_code_moved = false;

    /* Data, and pages that nobody used. */
    for (unsigned i = 1; i < 4; i++) {
        x86_tlb_flush_page(&g->cpu, kernel + i * 0x1000);
        x86_tlb_flush_page(&g->cpu, user + i * 0x1000);
    }
    assert_false(g->user_code_moved || g->supervisor_code_moved);
    x86_tlb_flush_page(&g->cpu, user);
    assert_true(code_moved(g, true));
    x86_tlb_flush_page(&g->cpu, large + 0x180000);
    assert_true(code_moved(g, false));
    /* Also when another page has taken its place in the set since. */
    guest_map(g, kernel + ((gva_t)TLB_ENTRIES << 12), 0x205000, KIB(4), PTE_G, PTE_W);
    x86_fetch_pointer(&g->cpu, kernel + ((gva_t)TLB_ENTRIES << 12));
    x86_tlb_flush_page(&g->cpu, kernel);
    assert_true(code_moved(g, false));

    /* Loads of CR3 are the user's business as long as the supervisor's code is global. */
    pcid_load(g, 1, true);
    assert_false(g->user_code_moved || g->supervisor_code_moved);
    pcid_load(g, 2, true);
    assert_false(g->user_code_moved || g->supervisor_code_moved);
    pcid_load(g, 2, false);
    assert_false(g->user_code_moved || g->supervisor_code_moved);
    /* Of an address space that is not in force, too: what is remembered of it is kept. */
    pcid_load(g, 1, true);
    guest_set_cpl(g, 3);
    x86_fetch_pointer(&g->cpu, user);
    guest_set_cpl(g, 0);
    pcid_load(g, 2, true);
    x86_tlb_invpcid(&g->cpu, 1, 1, 0);
    assert_true(code_moved(g, true));
    x86_tlb_invpcid(&g->cpu, 0, 1, user);
    assert_false(g->user_code_moved);
    guest_map(g, kernel + 0x2000, 0x202000, KIB(4), 0, PTE_W);
    x86_fetch_pointer(&g->cpu, kernel + 0x2000);
    pcid_load(g, 2, false);
    assert_true(g->supervisor_code_moved);
    g->supervisor_code_moved = false;
    guest_set_cpl(g, 3);
    x86_fetch_pointer(&g->cpu, user);
    x86_tlb_invpcid(&g->cpu, 0, 2, user);
    assert_true(g->user_code_moved);
    g->user_code_moved = g->supervisor_code_moved = false;
    x86_fetch_pointer(&g->cpu, user);
    x86_tlb_invpcid(&g->cpu, 1, 2, 0);
    assert_true(code_moved(g, true));
    x86_fetch_pointer(&g->cpu, user);
    pcid_load(g, 2, false);
    assert_true(code_moved(g, true));
    x86_fetch_pointer(&g->cpu, user);
    x86_tlb_flush_all(&g->cpu);
    assert_true(g->user_code_moved && g->supervisor_code_moved);
}

/* A read fills the write tag as well where nobody has to be told of writes. */
static void reads_prepare_writes(void **state)
{
    struct guest *g = *state;
    const gva_t va = 0x40000000;
    _Atomic uint8_t *flags;

    for (unsigned i = 0; i < 32; i++) {
        bool dirty = i & 1, writable = i & 2, seen = i & 4, code = i & 8, logging = i & 16;
        guest_paging(g, PAGING_4LEVEL);
        uint64_t *leaf =
            guest_map(g, va, 0x200000, KIB(4), (writable ? PTE_W : 0) | (dirty ? PTE_D : 0), PTE_W);
        uint64_t before = *leaf | PTE_A;
        flags = guest_flags(g, 0x200000);
        atomic_store(flags, (seen ? PAGE_WRITABLE : 0) | (code ? PAGE_CODE : 0));
        atomic_store(&g->machine.memory.dirty_logging, logging);
        x86_read8(&g->cpu, va);
        assert_int_equal(tlb_lookup(g->cpu.tlb, va, 1, TLB_WRITE) != NULL,
                         dirty && writable && seen && !code && !logging);
        assert_int_equal(*leaf, before);
        assert_false(atomic_load(flags) & PAGE_DIRTY);
    }
}

static void more_pcids_than_spaces(void **state)
{
    struct guest *g = *state;

    guest_paging(g, PAGING_4LEVEL);
    g->cpu.s.cr4 |= CR4_PCIDE;
    x86_tlb_flush_all(&g->cpu);
    uint64_t *leaf = guest_map(g, 0x1000, 0, KIB(4), PTE_U, PTE_U);
    guest_set_cpl(g, 3);
    /* Each PCID sees what was mapped when it filled its entry, or something newer: never another's
     * older one. */
    unsigned seen[40] = {0};
    for (unsigned round = 1; round <= 400; round++) {
        unsigned pcid = (round * round * 7 + round) % 40;
        *leaf = (0x200000 + (round % 32) * 0x1000ull) | PTE_P | PTE_U;
        guest_put(g, 0x200000 + (round % 32) * 0x1000ull, round, 4);
        bool flush = round % 3 == 0;
        pcid_load(g, pcid, !flush);
        unsigned value = x86_read32(&g->cpu, 0x1000);
        if (flush)
            assert_int_equal(value, round);
        assert_true(value >= seen[pcid]);
        seen[pcid] = value;
    }
}

static void modes_derive_views(void **state)
{
    struct guest *g = *state;
    struct x86_cpu *cpu = &g->cpu;

    guest_paging(g, PAGING_4LEVEL);
    assert_int_equal(cpu->cpl, 0);
    assert_int_equal(cpu->code_size, 8);
    assert_ptr_equal(cpu->tlb, &cpu->tlbs->kernel_ac.set);
    cpu->s.cr4 |= CR4_SMAP;
    x86_update_mode(cpu);
    assert_ptr_equal(cpu->tlb, &cpu->tlbs->kernel.set);
    x86_set_rflags(cpu, RFLAGS_AC);
    assert_ptr_equal(cpu->tlb, &cpu->tlbs->kernel_ac.set);
    assert_ptr_equal(cpu->tlb_fetch, &cpu->tlbs->kernel_fetch.set);
    /* Implicit accesses never have AC's licence. */
    assert_ptr_equal(x86_system_set(cpu), &cpu->tlbs->kernel.set);
    guest_set_cpl(g, 3);
    assert_ptr_equal(cpu->tlb, &cpu->space->data.set);
    cpu->s.cr0 |= CR0_AM;
    x86_update_mode(cpu);
    assert_ptr_equal(cpu->tlb, &x86_checking_set);
    assert_ptr_equal(cpu->tlb_fetch, &cpu->space->fetch.set);

    /* Compatibility mode, 16-bit code, real mode. */
    cpu->s.seg[SEG_CS].attr = 0xc0fb;
    cpu->s.seg[SEG_CS].base = 0x1000;
    x86_update_mode(cpu);
    assert_true(cpu->long_mode);
    assert_int_equal(cpu->code_size, 4);
    assert_int_equal(cpu->stack_size, 4);
    assert_int_equal(cpu->code_base, 0x1000);
    assert_false(cpu->flat);
    cpu->s.seg[SEG_CS].base = 0;
    x86_update_mode(cpu);
    assert_true(cpu->flat);
    cpu->s.seg[SEG_DS].attr = SEG_UNUSABLE;
    x86_update_mode(cpu);
    assert_false(cpu->flat);
    cpu->s.seg[SEG_CS].attr = 0x00fb;
    cpu->s.seg[SEG_SS].attr = 0x00f3;
    x86_update_mode(cpu);
    assert_int_equal(cpu->code_size, 2);
    assert_int_equal(cpu->stack_size, 2);
    cpu->s.cr0 &= ~(CR0_PE | CR0_PG);
    x86_update_mode(cpu);
    assert_int_equal(cpu->cpl, 0);
}

/* ---- x86_walk_ready() ---- */

static uint64_t ready_random(void)
{
    static uint64_t x = 88172645463325252u;

    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return x;
}

static bool one_in(unsigned n) { return ready_random() / 7 % n == 0; }

/* An entry with something amiss now and then. */
static uint64_t ready_entry(const struct x86_cpu *cpu, unsigned level, gpa_t next)
{
    uint64_t e = PTE_P | PTE_W | PTE_U | PTE_A | PTE_D | next;

    for (unsigned bit = 0; bit < 12; bit++)
        if (bit != 7 && one_in(bit == 0 || bit == 5 ? 60 : 25))
            e ^= 1ull << bit;
    if (one_in(10))
        e |= PTE_NX;
    if (one_in(60))
        e |= 1ull << (cpu->phys_bits + ready_random() % (52 - cpu->phys_bits));
    if (one_in(20))
        e |= 1ull << (52 + ready_random() % 11); /* free for software */
    if (level > 1 && one_in(level == 4 ? 100 : 4)) {
        /* A large page, with address bits that it may not have now and then. */
        e |= PTE_PS;
        if (level == 2 || !one_in(10))
            e &= ~(gpa_t)0xfffff000 | (one_in(8) ? 0xfffff000 : 0xffe00000);
        if (level == 3 && !one_in(8))
            e &= ~(gpa_t)0x3ffff000;
    }
    return e;
}

/* What it says of a page is what a walk for a program would find without changing anything, no more and no less. */
static void ready_as_walks(void **state)
{
    struct guest *g = *state;
    struct x86_cpu *cpu = &g->cpu;
    const bool gib_pages = cpu->has_gib_pages;
    unsigned ready = 0, writable = 0, executable = 0, large = 0, walkable = 0;

    guest_paging(g, PAGING_4LEVEL);
    for (unsigned round = 0; round < 200000; round++) {
        gva_t va = ready_random() & 0x7fffffffffff;
        void *entry[5];
        uint64_t content[5], size;
        struct x86_ready r = {.gpa = 0};
        gpa_t gpa, quiet;
        uint32_t error;
        bool is;

        if (round % 32 == 0)
            guest_paging(g, PAGING_4LEVEL); /* tables are taken from the start again */
        if (one_in(4))
            va |= 0xffff800000000000;
        cpu->s.efer = one_in(8) ? cpu->s.efer & ~(uint64_t)EFER_NXE : cpu->s.efer | EFER_NXE;
        cpu->has_gib_pages = !one_in(8);
        /* Tables for all levels, then what they hold. */
        for (unsigned level = 1; level <= 4; level++) {
            entry[level] = guest_entry(g, va, level, PTE_W | PTE_U);
            content[level] = get_entry(entry[level], PAGING_4LEVEL);
        }
        for (unsigned level = 4; level >= 1; level--) {
            gpa_t next = level > 1 ? content[level] & 0xffffffffff000 : MIB(4) + ready_random() % MIB(8) / 4096 * 4096;

            content[level] = ready_entry(cpu, level, next);
            put_entry(entry[level], PAGING_4LEVEL, content[level]);
        }
        is = x86_walk_ready(cpu, va, &r);
        for (unsigned level = 4; level >= 1; level--)
            assert_int_equal(get_entry(entry[level], PAGING_4LEVEL), content[level]);
        if (x86_walk_quiet(cpu, va, &quiet) == 0 && is)
            assert_int_equal(quiet, r.gpa);
        for (unsigned access = ACCESS_READ; access <= ACCESS_EXEC; access++) {
            bool allowed = x86_walk(cpu, va, access, VIEW_USER, &gpa, &size, &error) == 0;

            walkable += allowed && access == ACCESS_READ;
            if (allowed && is) {
                assert_int_equal(gpa, r.gpa);
                assert_int_equal(size, r.page_size);
            }
            for (unsigned level = 4; level >= 1; level--) {
                allowed = allowed && get_entry(entry[level], PAGING_4LEVEL) == content[level];
                put_entry(entry[level], PAGING_4LEVEL, content[level]);
            }
            if (allowed != (is && (access == ACCESS_READ || (access == ACCESS_WRITE ? r.writable : r.executable))))
                fail_msg("round %u, access %u: %llx %llx %llx %llx", round, access, (unsigned long long)content[4],
                         (unsigned long long)content[3], (unsigned long long)content[2], (unsigned long long)content[1]);
        }
        for (unsigned level = 4; level >= 1; level--)
            put_entry(entry[level], PAGING_4LEVEL, 0);
        ready += is;
        writable += is && r.writable;
        executable += is && r.executable;
        large += is && r.page_size > GUEST_PAGE_SIZE;
    }
    /* It has seen everything. */
    assert_in_range(ready, 1000, walkable - 1000);
    assert_in_range(writable, 1000, ready - 1000);
    assert_in_range(executable, 1000, ready - 1000);
    assert_in_range(large, 1000, ready - 1000);
    cpu->has_gib_pages = gib_pages;

    /* Nothing outside of what it is for. */
    struct x86_ready r;
    guest_paging(g, PAGING_4LEVEL);
    guest_map(g, 0x400000, MIB(4), KIB(4), PTE_W | PTE_U | PTE_A | PTE_D, PTE_W | PTE_U | PTE_A);
    assert_true(x86_walk_ready(cpu, 0x400123, &r));
    assert_int_equal(r.gpa, MIB(4) + 0x123);
    assert_false(x86_walk_ready(cpu, 0x400000 | 1ull << 47, &r));
    assert_false(x86_walk_ready(cpu, 0x400000 | 1ull << 63, &r));
    guest_paging(g, PAGING_PAE);
    guest_map(g, 0x400000, MIB(4), KIB(4), PTE_W | PTE_U | PTE_A | PTE_D, PTE_W | PTE_U | PTE_A);
    assert_false(x86_walk_ready(cpu, 0x400000, &r));
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, guest_setup, guest_teardown)
    const struct CMUnitTest tests[] = {
        TEST(permissions),
        TEST(upper_levels_get_accessed),
        TEST(not_present_at_each_level),
        TEST(reserved_bits),
        TEST(addresses_of_large_pages),
        TEST(page_directory_pointers),
        TEST(flush_by_page),
        TEST(flush_of_large_pages),
        TEST(address_spaces),
        TEST(supervisor_spaces),
        TEST(reads_prepare_writes),
        TEST(moves_of_code_are_told),
        TEST(more_pcids_than_spaces),
        TEST(modes_derive_views),
        TEST(ready_as_walks),
    };
    return cmocka_run_group_tests_name("mmu", tests, NULL, NULL);
}
