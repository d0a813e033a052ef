/* The soft TLB by itself: what hits, what misses, and that no address ever matches an entry that is
 * not its own. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#include "base/util.h"
#include "memory/tlb.h"

static struct tlb_set *set;
static uint8_t *host; /* four host pages */

static int setup(void **state)
{
    set = aligned_alloc(64, sizeof(*set));
    host = aligned_alloc(4096, 4 * 4096);
    tlb_flush(set);
    return 0;
}

static int teardown(void **state)
{
    free(set);
    free(host);
    return 0;
}

static bool hits(gva_t va, unsigned size, enum tlb_kind kind)
{
    return tlb_lookup(set, va, size, kind) != NULL;
}

static const gva_t interesting[] = {
    0,
    1,
    0xfff,
    0x1000,
    0x1fff,
    0x2000,
    0x3ff000,
    0x400000,
    0x7ffffffff000,
    0x7fffffffffff,
    0x800000000000,
    0xffff7fffffffffff,
    0xffff800000000000,
    0xffffffffffc00000,
    0xfffffffffffff000,
    0xffffffffffffffff,
};

static void empty_sets_miss(void **state)
{
    /* Both ways to make a set empty. */
    for (unsigned way = 0; way < 2; way++) {
        if (way == 0) {
            tlb_flush(set);
        } else {
            memset(set, 0, sizeof(*set));
            tlb_init(set);
        }
        for (unsigned i = 0; i < ARRAY_SIZE(interesting); i++)
            for (unsigned kind = TLB_READ; kind <= TLB_EXEC; kind++)
                for (unsigned size = 1; size <= 4096; size *= 2)
                    assert_false(hits(interesting[i], size, kind));
        for (unsigned page = 0; page < 3 * TLB_ENTRIES; page++)
            assert_false(hits((gva_t)page << 12, 1, TLB_READ));
    }
}

static void an_entry_is_for_one_page_and_kind(void **state)
{
    for (unsigned i = 0; i < ARRAY_SIZE(interesting); i++) {
        gva_t page = interesting[i] & GUEST_PAGE_MASK;
        for (unsigned kind = TLB_READ; kind <= TLB_EXEC; kind++) {
            tlb_flush(set);
            tlb_fill(set, interesting[i], host, kind);
            assert_ptr_equal(tlb_lookup(set, page + 0x123, 8, kind), host + 0x123);
            assert_ptr_equal(tlb_lookup(set, page + 4088, 8, kind), host + 4088);
            assert_ptr_equal(tlb_lookup(set, page, 4096, kind), host);
            assert_false(hits(page + 4089, 8, kind));
            assert_false(hits(page + 4095, 2, kind));
            assert_false(hits(page - 1, 1, kind));
            assert_false(hits(page - 1, 2, kind));
            assert_false(hits(page + 4096, 1, kind));
            assert_false(hits(page ^ 1ull << 63, 1, kind));
            assert_false(hits(page ^ (gva_t)TLB_ENTRIES << 12, 1, kind));
            for (unsigned other = TLB_READ; other <= TLB_EXEC; other++)
                if (other != kind)
                    assert_false(hits(page, 1, other));
        }
    }
}

static void fills_replace(void **state)
{
    tlb_fill(set, 0x5000, host, TLB_READ);
    tlb_fill(set, 0x5000, host, TLB_WRITE);
    assert_true(hits(0x5000, 1, TLB_READ) && hits(0x5000, 1, TLB_WRITE));
    /* The same page elsewhere: what was known about the old place is void. */
    tlb_fill(set, 0x5000, host + 4096, TLB_EXEC);
    assert_ptr_equal(tlb_lookup(set, 0x5000, 1, TLB_EXEC), host + 4096);
    assert_false(hits(0x5000, 1, TLB_READ) || hits(0x5000, 1, TLB_WRITE));
    /* Another page with this index. */
    gva_t other = 0x5000 + ((gva_t)TLB_ENTRIES << 12);
    tlb_fill(set, other, host + 4096 + ((gva_t)TLB_ENTRIES << 12), TLB_READ);
    assert_false(hits(0x5000, 1, TLB_EXEC));
    assert_true(hits(other, 1, TLB_READ));
    assert_false(hits(other, 1, TLB_EXEC));
}

static void flushes(void **state)
{
    for (unsigned i = 0; i < 3; i++)
        tlb_fill(set, 0x5000 + i * 0x1000, host + i * 4096, TLB_READ);
    tlb_flush_page(set, 0x5000 + ((gva_t)TLB_ENTRIES << 12));
    assert_true(hits(0x5000, 1, TLB_READ));
    tlb_flush_page(set, 0x5fff);
    assert_false(hits(0x5000, 1, TLB_READ));
    assert_true(hits(0x6000, 1, TLB_READ) && hits(0x7000, 1, TLB_READ));

    tlb_fill(set, 0, host, TLB_WRITE);
    tlb_fill(set, -4096ull, host, TLB_EXEC);
    tlb_flush_range(set, 0x6000, 0x1000);
    assert_false(hits(0x6000, 1, TLB_READ));
    assert_true(hits(0x7000, 1, TLB_READ) && hits(0, 1, TLB_WRITE) && hits(-1ull, 1, TLB_EXEC));
    tlb_flush_range(set, 0, MIB(2));
    assert_false(hits(0x7000, 1, TLB_READ) || hits(0, 1, TLB_WRITE));
    assert_true(hits(-1ull, 1, TLB_EXEC));
    tlb_flush_range(set, -MIB(2), MIB(2));
    assert_false(hits(-1ull, 1, TLB_EXEC));
}

static void writes_are_dropped(void **state)
{
    /* Two aliases of one host page and a page of its own. */
    tlb_fill(set, 0x5000, host, TLB_WRITE);
    tlb_fill(set, 0x5000, host, TLB_READ);
    tlb_fill(set, 0xffff800000009000, host, TLB_WRITE);
    tlb_fill(set, 0x6000, host + 4096, TLB_WRITE);
    tlb_fill(set, 0x7000, host, TLB_EXEC);
    tlb_drop_writes_to(set, host);
    assert_false(hits(0x5000, 1, TLB_WRITE) || hits(0xffff800000009000, 1, TLB_WRITE));
    assert_true(hits(0x5000, 1, TLB_READ) && hits(0x6000, 1, TLB_WRITE) &&
                hits(0x7000, 1, TLB_EXEC));
    tlb_drop_writes(set);
    assert_false(hits(0x6000, 1, TLB_WRITE));
    assert_true(hits(0x5000, 1, TLB_READ) && hits(0x7000, 1, TLB_EXEC));
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(empty_sets_miss),    TEST(an_entry_is_for_one_page_and_kind),
        TEST(fills_replace),      TEST(flushes),
        TEST(writes_are_dropped),
    };
    return cmocka_run_group_tests_name("tlb", tests, NULL, NULL);
}
