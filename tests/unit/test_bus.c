/* The port and MMIO address spaces: who gets which access, and accesses that cross ranges. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/log.h"
#include "base/util.h"
#include "device/bus.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct bus bus;
static char trace[512];

struct dev {
    char name;
    uint8_t byte[16];
};

static struct dev a = {.name = 'a'}, b = {.name = 'b'};

static uint64_t dev_read(void *opaque, uint64_t offset, unsigned size)
{
    struct dev *d = opaque;
    size_t n = strlen(trace);
    snprintf(trace + n, sizeof(trace) - n, "%cr%llu.%u ", d->name, (unsigned long long)offset,
             size);
    assert_int_equal(pthread_mutex_trylock(&lock), EBUSY);
    assert_true(offset + size <= 16);
    uint64_t v = UINT64_MAX; /* dirt above the value: the bus masks */
    memcpy(&v, d->byte + offset, size);
    return v;
}

static void dev_write(void *opaque, uint64_t offset, uint64_t value, unsigned size)
{
    struct dev *d = opaque;
    size_t n = strlen(trace);
    snprintf(trace + n, sizeof(trace) - n, "%cw%llu.%u=%llx ", d->name, (unsigned long long)offset,
             size, (unsigned long long)value);
    assert_int_equal(pthread_mutex_trylock(&lock), EBUSY);
    memcpy(d->byte + offset, &value, size);
}

static const struct bus_ops ops = {dev_read, dev_write};

static int setup(void **state)
{
    bus_init(&bus, "port", &lock);
    trace[0] = 0;
    for (unsigned i = 0; i < 16; i++) {
        a.byte[i] = (uint8_t)(0xa0 + i);
        b.byte[i] = (uint8_t)(0xb0 + i);
    }
    return bus_add(&bus, 0x100, 16, &ops, &a, "a") || bus_add(&bus, 0x110, 16, &ops, &b, "b");
}

static int teardown(void **state)
{
    bus_destroy(&bus);
    return 0;
}

static void overlaps_are_refused(void **state)
{
    assert_int_equal(bus_add(&bus, 0x10f, 1, &ops, &b, "c"), -EEXIST);
    assert_int_equal(bus_add(&bus, 0xff, 2, &ops, &b, "c"), -EEXIST);
    assert_int_equal(bus_add(&bus, 0, 0x1000, &ops, &b, "c"), -EEXIST);
    assert_int_equal(bus_add(&bus, 0x120, 0, &ops, &b, "c"), -EINVAL);
    assert_int_equal(bus_add(&bus, UINT64_MAX, 2, &ops, &b, "c"), -EINVAL);
    assert_int_equal(bus_add(&bus, UINT64_MAX, 1, &ops, &b, "c"), 0);
    assert_int_equal(bus_add(&bus, 0x120, 1, &ops, &b, "c"), 0);
    assert_int_equal(bus_add(&bus, 0xff, 1, &ops, &b, "c"), 0);
    assert_int_equal(bus.count, 5);
    for (unsigned i = 1; i < bus.count; i++)
        assert_true(bus.range[i - 1].base < bus.range[i].base);
}

static void lookups(void **state)
{
    assert_null(bus_find(&bus, 0xff));
    assert_ptr_equal(bus_find(&bus, 0x100)->opaque, &a);
    assert_ptr_equal(bus_find(&bus, 0x10f)->opaque, &a);
    assert_ptr_equal(bus_find(&bus, 0x110)->opaque, &b);
    assert_null(bus_find(&bus, 0x120));
    bus_remove(&bus, 0x100, &b); /* another's */
    assert_non_null(bus_find(&bus, 0x100));
    bus_remove(&bus, 0x108, &a); /* not its base */
    assert_non_null(bus_find(&bus, 0x100));
    bus_remove(&bus, 0x100, &a);
    assert_null(bus_find(&bus, 0x100));
    assert_ptr_equal(bus_find(&bus, 0x110)->opaque, &b);
}

static void whole_accesses_keep_their_size(void **state)
{
    assert_int_equal(bus_read(&bus, 0x102, 1), 0xa2);
    assert_int_equal(bus_read(&bus, 0x102, 2), 0xa3a2);
    assert_int_equal(bus_read(&bus, 0x10c, 4), 0xafaeadac);
    assert_true(bus_read(&bus, 0x118, 8) == 0xbfbebdbcbbbab9b8);
    bus_write(&bus, 0x111, 0xffffffffffff1234, 2);
    assert_string_equal(trace, "ar2.1 ar2.2 ar12.4 br8.8 bw1.2=1234 ");
    assert_int_equal(bus.reads, 4);
    assert_int_equal(bus.writes, 1);
}

static void unclaimed_reads_all_ones(void **state)
{
    assert_int_equal(bus_read(&bus, 0x200, 1), 0xff);
    assert_int_equal(bus_read(&bus, 0x200, 2), 0xffff);
    assert_true(bus_read(&bus, 0x200, 4) == 0xffffffff);
    assert_true(bus_read(&bus, 0x200, 8) == UINT64_MAX);
    bus_write(&bus, 0x200, 1, 4);
    assert_string_equal(trace, "");
}

static void crossing_accesses_are_split(void **state)
{
    assert_true(bus_read(&bus, 0x10e, 4) == 0xb1b0afae);
    assert_string_equal(trace, "ar14.1 ar15.1 br0.1 br1.1 ");
    trace[0] = 0;
    assert_true(bus_read(&bus, 0xfe, 4) == 0xa1a0ffff);
    assert_true(bus_read(&bus, 0x11f, 2) == 0xffbf);
    trace[0] = 0;
    bus_write(&bus, 0x10f, 0x44332211, 4);
    assert_string_equal(trace, "aw15.1=11 bw0.1=22 bw1.1=33 bw2.1=44 ");
    trace[0] = 0;
    bus_write(&bus, 0xfd, 0x44332211, 4);
    assert_string_equal(trace, "aw0.1=44 ");
}

static void the_end_of_the_space(void **state)
{
    struct dev last = {.name = 'l', .byte = {0x11}}, first = {.name = 'f', .byte = {0x22}};
    assert_int_equal(bus_add(&bus, UINT64_MAX, 1, &ops, &last, "l"), 0);
    assert_int_equal(bus_add(&bus, 0, 1, &ops, &first, "f"), 0);
    assert_int_equal(bus_read(&bus, UINT64_MAX, 1), 0x11);
    assert_int_equal(bus_read(&bus, UINT64_MAX, 2), 0x2211);
}

/* ---- doorbells ---- */

static bool two_doorbells(void *opaque, unsigned i, uint64_t *offset)
{
    *offset = 4 + 8 * i;
    return i < 2;
}

static void note_doorbell(void *opaque, uint64_t address, bool there)
{
    snprintf(trace + strlen(trace), sizeof(trace) - strlen(trace), "%s%llx ", there ? "+" : "-", (unsigned long long)address);
}

static void doorbells_are_told(void **state)
{
    static const struct bus_ops with = {.read = NULL, .doorbell = two_doorbells};
    static const struct bus_listener listener = {.doorbell = note_doorbell};
    int early, late;
    assert_int_equal(bus_add(&bus, 0x1000, 0x20, &with, &early, "early"), 0);
    assert_string_equal(trace, "");
    bus_listen(&bus, &listener);
    assert_string_equal(trace, "+1004 +100c ");
    assert_int_equal(bus_add(&bus, 0x2000, 0x20, &with, &late, "late"), 0);
    bus_remove(&bus, 0x1000, &early);
    assert_string_equal(trace, "+1004 +100c +2004 +200c -1004 -100c ");
    bus_listen(&bus, NULL);
    bus_remove(&bus, 0x2000, &late);
    assert_string_equal(trace, "+1004 +100c +2004 +200c -1004 -100c ");
}

int main(void)
{
    log_set_level(-1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(overlaps_are_refused, setup, teardown),
        cmocka_unit_test_setup_teardown(lookups, setup, teardown),
        cmocka_unit_test_setup_teardown(whole_accesses_keep_their_size, setup, teardown),
        cmocka_unit_test_setup_teardown(unclaimed_reads_all_ones, setup, teardown),
        cmocka_unit_test_setup_teardown(crossing_accesses_are_split, setup, teardown),
        cmocka_unit_test_setup_teardown(the_end_of_the_space, setup, teardown),
        cmocka_unit_test_setup_teardown(doorbells_are_told, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
