/*
 * Migration as the source sees it: rounds, post-copy, what slows it down, and giving up.
 */
#include "migrate_trip.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

#include "migrate/postcopy.h"

static void test_pre_copy(void **state)
{
    for (unsigned i = 0; i < 4; i++) {
        struct trip *t = trip_make();

        t->options.streams = (unsigned[]){ 1, 2, 5, 16 }[i];
        t->options.compress = i & 1;
        if (i >= 1)
            trip_with_disk(t);
        trip_target(t, NULL);
        trip_source(t);
        assert_int_equal(t->sent.disk_bytes != 0, i >= 1);
        assert_true(t->sent.rounds >= 1 && t->sent.bytes > 0);
        assert_int_equal(t->a.stages & 0x3f, 0x3f);
        trip_arrived(t);
    }
}

/* What the target has already is not sent again, and neither is what never had contents. */
static void test_skips(void **state)
{
    struct trip *t = trip_make();

    t->a.hot_pages = 1;
    trip_target(t, NULL);
    trip_source(t);
    assert_in_range(t->sent.pages_sent + t->sent.pages_zero, PAGES / 2, PAGES / 2 + 200);
    trip_arrived(t);
}

static void test_post_copy(void **state)
{
    char why[CHANNEL_ERROR_MAX];
    struct trip *t;

    if (!postcopy_usable(false, why)) {
        print_message("%s\n", why);
        skip();
    }
    t = trip_make();
    t->options.post_copy = MIGRATE_POST_COPY_NOW;
    t->options.bandwidth = 4 << 20;
    t->b.pause_us = 1000;
    trip_target(t, NULL);
    trip_source(t);
    assert_true(t->sent.post_copy);
    assert_true(t->sent.pages_requested > 0);
    assert_true(t->sent.downtime_ms < t->sent.total_ms);
    trip_arrived(t);
}

/* A guest that writes faster than the link, on however busy a host: post-copy where it is allowed, else it is slowed down. */
static void test_stalls(void **state)
{
    char why[CHANNEL_ERROR_MAX];

    for (unsigned i = 0; i < 2; i++) {
        struct trip *t = trip_make();

        t->options.post_copy = i && postcopy_usable(false, why) ? MIGRATE_POST_COPY_AUTO : MIGRATE_POST_COPY_NEVER;
        t->options.bandwidth = 12 << 20;
        t->options.downtime_ms = 30;
        t->a.hot_pages = 0;
        t->a.by_reports = true;
        t->b.pause_us = 1000;
        trip_target(t, NULL);
        trip_source(t);
        assert_int_equal(t->sent.post_copy, t->options.post_copy == MIGRATE_POST_COPY_AUTO);
        if (!t->sent.post_copy)
            assert_true(t->a.throttled > 0);
        trip_arrived(t);
    }
}

static void test_bandwidth(void **state)
{
    struct trip *t = trip_make();

    /* 2 MiB that are not zero. */
    t->options.bandwidth = 4 << 20;
    t->a.hot_pages = 1;
    trip_target(t, NULL);
    trip_source(t);
    assert_in_range(t->sent.total_ms, 350, 30000);
    trip_arrived(t);
}

static void test_no_target(void **state)
{
    struct trip *t = trip_make();

    trip_target(t, NULL);
    snprintf(t->to, sizeof(t->to), "unix:%s/nobody", trip_folder);
    trip_source(t);
    trip_stayed(t, "cannot connect");
}

static void *cancel_soon(void *opaque)
{
    struct trip *t = opaque;

    while (t->a.sent < 100000 && !t->over)
        nanosleep(&(struct timespec){ .tv_nsec = 1000000 }, NULL);
    return migrate_source_cancel(t->source, false) ? t : NULL;
}

static void test_cancel(void **state)
{
    struct trip *t = trip_make();
    pthread_t thread;
    void *cancelled;

    t->options.bandwidth = 1 << 20;
    trip_target(t, NULL);
    trip_source_make(t);
    assert_int_equal(pthread_create(&thread, NULL, cancel_soon, t), 0);
    migrate_source_run(t->source, &t->sent);
    t->over = true;
    pthread_join(thread, &cancelled);
    assert_non_null(cancelled);
    trip_stayed(t, "cancelled");
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_pre_copy),
        cmocka_unit_test(test_skips),
        cmocka_unit_test(test_post_copy),
        cmocka_unit_test(test_stalls),
        cmocka_unit_test(test_bandwidth),
        cmocka_unit_test(test_no_target),
        cmocka_unit_test(test_cancel),
    };

    return trip_tests(tests);
}
