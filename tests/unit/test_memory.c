/* Guest memory: bounds, page flags, and telling engines about code that devices overwrite. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

#include <errno.h>
#include <pthread.h>
#include <string.h>

#include "base/log.h"
#include "base/util.h"
#include "memory/missing.h"

#define LOW_SIZE  MIB(3)
#define HIGH_BASE GIB(4)

static struct memory mem;
static gpa_t code_pages[16];
static unsigned code_calls;

static void note_code(void *opaque, gpa_t page)
{
    assert_ptr_equal(opaque, &mem);
    assert_true(code_calls < ARRAY_SIZE(code_pages));
    code_pages[code_calls++] = page;
}

/* [0, 3M) and right behind it [3M, 4M) as a region of its own; and [4G, 4G + 1M). */
static int setup(void **state)
{
    memory_init(&mem);
    mem.code_written = note_code;
    mem.code_written_opaque = &mem;
    code_calls = 0;
    return memory_add_ram(&mem, 0, LOW_SIZE) || memory_add_ram(&mem, LOW_SIZE, MIB(1)) ||
           memory_add_ram(&mem, HIGH_BASE, MIB(1));
}

static int teardown(void **state)
{
    memory_destroy(&mem);
    return 0;
}

static void regions_are_checked(void **state)
{
    assert_int_equal(memory_total(&mem), MIB(5));
    assert_int_equal(memory_add_ram(&mem, MIB(2), MIB(1)), -EEXIST);
    assert_int_equal(memory_add_ram(&mem, HIGH_BASE - MIB(1), MIB(2)), -EEXIST);
    assert_int_equal(memory_add_ram(&mem, MIB(16) + 1, MIB(1)), -EINVAL);
    assert_int_equal(memory_add_ram(&mem, MIB(16), 100), -EINVAL);
    assert_int_equal(memory_add_ram(&mem, MIB(16), 0), -EINVAL);
    assert_int_equal(memory_add_ram(&mem, UINT64_MAX - 4095, MIB(1)), -EINVAL);
    assert_int_equal(memory_total(&mem), MIB(5));
}

static void accesses_are_bounded(void **state)
{
    uint8_t buf[16];
    assert_int_equal(memory_read(&mem, MIB(4) - 16, buf, 16), 0);
    assert_int_equal(memory_read(&mem, MIB(4) - 15, buf, 16), -EFAULT);
    assert_int_equal(memory_read(&mem, MIB(4), buf, 1), -EFAULT);
    assert_int_equal(memory_read(&mem, HIGH_BASE - 1, buf, 2), -EFAULT);
    assert_int_equal(memory_read(&mem, UINT64_MAX, buf, 16), -EFAULT);
    assert_int_equal(memory_read(&mem, 0, buf, SIZE_MAX), -EFAULT);
    assert_int_equal(memory_read(&mem, UINT64_MAX, buf, 0), 0);

    /* Nothing is written when the end is outside. */
    memset(buf, 0xaa, sizeof(buf));
    assert_int_equal(memory_write(&mem, MIB(4) - 8, buf, 16), -EFAULT);
    assert_int_equal(memory_fill(&mem, MIB(4) - 8, 0xaa, 9), -EFAULT);
    assert_int_equal(memory_read(&mem, MIB(4) - 8, buf, 8), 0);
    for (int i = 0; i < 8; i++)
        assert_int_equal(buf[i], 0);
}

static void accesses_cross_regions(void **state)
{
    assert_int_equal(memory_write(&mem, LOW_SIZE - 3, "abcdef", 6), 0);
    char buf[7] = "";
    assert_int_equal(memory_read(&mem, LOW_SIZE - 3, buf, 6), 0);
    assert_string_equal(buf, "abcdef");
    assert_memory_equal(mem.region[0].host + LOW_SIZE - 3, "abc", 3);
    assert_memory_equal(mem.region[1].host, "def", 3);
    assert_int_equal(memory_fill(&mem, LOW_SIZE - 2, 'x', 4), 0);
    assert_int_equal(memory_read(&mem, LOW_SIZE - 3, buf, 6), 0);
    assert_string_equal(buf, "axxxxf");
}

static void map_stays_within_a_region(void **state)
{
    assert_ptr_equal(memory_map(&mem, 100, 50), mem.region[0].host + 100);
    assert_non_null(memory_map(&mem, 0, LOW_SIZE));
    assert_null(memory_map(&mem, 1, LOW_SIZE));
    assert_null(memory_map(&mem, LOW_SIZE - 1, 2));
    assert_null(memory_map(&mem, 0, SIZE_MAX));
    assert_null(memory_map(&mem, MIB(4), 0));
    assert_non_null(memory_map(&mem, 5, 0));
}

static void pages_and_flags(void **state)
{
    _Atomic uint8_t *flags = NULL;
    assert_null(memory_page(&mem, MIB(4), &flags));
    assert_ptr_equal(memory_page(&mem, HIGH_BASE + 0x2fff, &flags), mem.region[2].host + 0x2000);
    assert_ptr_equal(flags, &mem.region[2].flags[2]);
    assert_non_null(memory_page(&mem, 0, NULL));
}

static void dirty_pages_are_those_written(void **state)
{
    _Atomic uint8_t *f = mem.region[0].flags;
    assert_int_equal(memory_fill(&mem, 0x1000, 1, 0x1000), 0);
    assert_int_equal(f[1], 0); /* not logging */
    mem.dirty_logging = true;
    assert_int_equal(memory_fill(&mem, 0x2fff, 1, 2), 0);
    memory_mark_written(&mem, 0x5000, 0x1000);
    memory_mark_written(&mem, 0x7000, 0);
    memory_mark_written(&mem, MIB(4) - 1, 100); /* beyond: the part that is RAM */
    memory_mark_written(&mem, UINT64_MAX - 5, 100);
    static const uint8_t expect[8] = {0, 0, PAGE_DIRTY, PAGE_DIRTY, 0, PAGE_DIRTY, 0, 0};
    for (unsigned i = 0; i < 8; i++)
        assert_int_equal(f[i], expect[i]);
    assert_int_equal(mem.region[1].flags[255], PAGE_DIRTY);
}

static void code_pages_are_told_once_each(void **state)
{
    atomic_fetch_or(&mem.region[0].flags[4], PAGE_CODE);
    atomic_fetch_or(&mem.region[0].flags[5], PAGE_CODE);
    atomic_fetch_or(&mem.region[0].flags[7], PAGE_CODE);
    atomic_fetch_or(&mem.region[2].flags[0], PAGE_CODE);
    assert_int_equal(memory_fill(&mem, 0x3000, 0x90, 0x1000), 0);
    assert_int_equal(code_calls, 0);
    assert_int_equal(memory_fill(&mem, 0x3800, 0x90, 0x3000), 0);
    assert_int_equal(code_calls, 2);
    assert_int_equal(code_pages[0], 0x4000);
    assert_int_equal(code_pages[1], 0x5000);
    assert_int_equal(memory_write(&mem, HIGH_BASE + 8, "x", 1), 0);
    assert_int_equal(code_calls, 3);
    assert_int_equal(code_pages[2], HIGH_BASE);
    uint8_t b;
    assert_int_equal(memory_read(&mem, 0x7000, &b, 1), 0);
    assert_int_equal(code_calls, 3);
}

/* ---- missing pages ---- */

static struct memory_missing *missing;
static pthread_mutex_t placing = PTHREAD_MUTEX_INITIALIZER;
static _Atomic unsigned wanted_calls;

/* Every page holds its number. */
static void bring(void *opaque, struct memory_missing *p, unsigned region, uint64_t page)
{
    uint64_t contents[GUEST_PAGE_SIZE / 8];

    assert_ptr_equal(opaque, &mem);
    for (unsigned i = 0; i < ARRAY_SIZE(contents); i++)
        contents[i] = (uint64_t)region << 32 | page;
    atomic_fetch_add(&wanted_calls, 1);
    pthread_mutex_lock(&placing);
    memory_missing_place(p, region, page, (const uint8_t *)contents);
    pthread_mutex_unlock(&placing);
}

static uint64_t word_at(gpa_t gpa)
{
    uint64_t word;

    assert_int_equal(memory_read(&mem, gpa, &word, sizeof(word)), 0);
    return word;
}

/* Once bring() is done with what it woke us for. */
static uint64_t still_missing(void)
{
    pthread_mutex_lock(&placing);
    uint64_t count = memory_missing_count(missing);
    pthread_mutex_unlock(&placing);
    return count;
}

/* Pages come when they are touched, once; what becomes zero meanwhile stays so. */
static void missing_pages_come(void **state)
{
    uint64_t *bits[MEMORY_MAX_REGIONS];
    bool kernel;
    int err;

    if (memory_missing_usable(&kernel))
        skip();
    assert_int_equal(memory_bitmaps_alloc(&mem, bits), 0);
    bits[0][0] = 0xf0;
    bits[0][3] = ~0ull;
    bits[2][1] = 1;
    wanted_calls = 0;
    missing = memory_missing_create(&mem, bits, bring, &mem, &err);
    assert_non_null(missing);
    assert_null(bits[0]);
    assert_int_equal(still_missing(), 4 + 64 + 1);

    assert_int_equal(word_at(0x3000), 0);
    assert_int_equal(wanted_calls, 0);
    assert_int_equal(word_at(0x4008), 4);
    assert_int_equal(word_at(0x4010), 4);
    assert_int_equal(word_at(HIGH_BASE + 0x40000), 2ull << 32 | 64);
    assert_int_equal(memory_write(&mem, 0x5ff8, "write", 5), 0);
    assert_int_equal(word_at(0x5000), 5);
    assert_int_equal(still_missing(), 2 + 64);

    /* Parts of pages at both ends: those come first, and then a part of them is zero. */
    memory_clear(&mem, 0x6ff0, 0xc8010 - 0x6ff0);
    assert_int_equal(word_at(0x6fe8), 6);
    assert_int_equal(word_at(0x6ff0), 0);
    assert_int_equal(word_at(0x7000), 0);
    assert_int_equal(word_at(0xc7000), 0);
    assert_int_equal(word_at(0xc8008), 0);
    assert_int_equal(word_at(0xc8010), 200);
    assert_false(memory_missing_is(missing, 0, 7));
    assert_int_equal(still_missing(), 64 - 9);
    bring(&mem, missing, 0, 193);
    assert_int_equal(word_at(193 << 12), 0);

    memory_clear(&mem, 0, LOW_SIZE);
    assert_int_equal(still_missing(), 0);
    memory_missing_destroy(missing);
    assert_int_equal(word_at(255 << 12), 0);
}

int main(void)
{
    log_set_level(-1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(regions_are_checked, setup, teardown),
        cmocka_unit_test_setup_teardown(accesses_are_bounded, setup, teardown),
        cmocka_unit_test_setup_teardown(accesses_cross_regions, setup, teardown),
        cmocka_unit_test_setup_teardown(map_stays_within_a_region, setup, teardown),
        cmocka_unit_test_setup_teardown(pages_and_flags, setup, teardown),
        cmocka_unit_test_setup_teardown(dirty_pages_are_those_written, setup, teardown),
        cmocka_unit_test_setup_teardown(code_pages_are_told_once_each, setup, teardown),
        cmocka_unit_test_setup_teardown(missing_pages_come, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
