/* Guest time and timers: by hand, and against the host's clock. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/util.h"
#include "loop_helper.h"

#define MS 1000000ull

struct shot {
    struct clock *clock;
    struct timer timer;
    uint64_t period, fired_at, again;
    unsigned count;
    unsigned *order, *next_order;
    bool done;
};

static void fire_shot(void *opaque)
{
    struct shot *s = opaque;
    assert_false(timer_armed(&s->timer));
    s->fired_at = clock_now(s->clock);
    s->count++;
    s->done = true;
    if (s->order)
        *s->order = (*s->next_order)++;
    if (s->period)
        timer_arm(s->clock, &s->timer, s->fired_at + s->period);
}

static void shot_init(struct shot *s, struct clock *c)
{
    *s = (struct shot){.clock = c};
    timer_init(&s->timer, fire_shot, s);
}

static void manual_time_moves_only_by_hand(void **state)
{
    struct clock *c = clock_create(NULL, true);
    assert_int_equal(clock_now(c), 0);
    assert_int_equal(clock_wall_ns(c), 1577836800ull * 1000000000);
    clock_advance(c, 12345);
    assert_int_equal(clock_now(c), 12345);
    assert_int_equal(clock_wall_ns(c), 1577836800ull * 1000000000 + 12345);
    clock_pause(c);
    clock_advance(c, 5);
    assert_int_equal(clock_now(c), 12345);
    clock_resume(c);
    clock_advance(c, 5);
    assert_int_equal(clock_now(c), 12350);
    clock_destroy(c);
}

static void timers_see_their_deadline(void **state)
{
    struct clock *c = clock_create(NULL, true);
    struct shot a, b;
    shot_init(&a, c);
    shot_init(&b, c);
    b.period = 10;
    timer_arm(c, &a.timer, 25);
    timer_arm(c, &b.timer, 10);
    clock_advance(c, 9);
    assert_int_equal(a.count + b.count, 0);
    clock_advance(c, 1);
    assert_int_equal(b.count, 1);
    assert_int_equal(b.fired_at, 10);
    clock_advance(c, 30);
    assert_int_equal(a.fired_at, 25);
    assert_int_equal(a.count, 1);
    assert_int_equal(b.count, 4);
    assert_int_equal(b.fired_at, 40);
    timer_disarm(c, &b.timer);
    clock_advance(c, 100);
    assert_int_equal(b.count, 4);
    /* One for the past fires at the next chance and does not turn time back. */
    timer_arm(c, &a.timer, 3);
    clock_advance(c, 0);
    assert_int_equal(a.count, 2);
    assert_int_equal(a.fired_at, 140);
    timer_arm(c, &a.timer, UINT64_MAX);
    assert_false(timer_armed(&a.timer));
    clock_destroy(c);
}

static void pause_within_a_timer(void *opaque)
{
    clock_pause(*(struct clock **)opaque);
}

static void pausing_stops_an_advance(void **state)
{
    struct clock *c = clock_create(NULL, true);
    struct timer t;
    timer_init(&t, pause_within_a_timer, &c);
    timer_arm(c, &t, 50);
    clock_advance(c, 100);
    assert_int_equal(clock_now(c), 50);
    clock_destroy(c);
}

/* Many timers armed, re-armed and disarmed at random fire once each, in order. */
static void heap_keeps_order(void **state)
{
    enum { N = 300 };
    struct clock *c = clock_create(NULL, true);
    struct shot *s = calloc(N, sizeof(*s));
    unsigned order[N], next = 0;
    srand(1);
    for (int round = 0; round < 20; round++) {
        next = 0;
        uint64_t now = clock_now(c);
        for (int i = 0; i < N; i++) {
            shot_init(&s[i], c);
            s[i].order = &order[i];
            s[i].next_order = &next;
        }
        for (int k = 0; k < 4 * N; k++) {
            struct shot *t = &s[rand() % N];
            if (rand() % 4 == 0)
                timer_disarm(c, &t->timer);
            else
                timer_arm(c, &t->timer, now + 1 + (uint64_t)(rand() % 1000));
        }
        uint64_t deadline[N];
        unsigned armed = 0;
        for (int i = 0; i < N; i++) {
            deadline[i] = s[i].timer.deadline;
            armed += timer_armed(&s[i].timer);
        }
        clock_advance(c, 2000);
        assert_int_equal(next, armed);
        for (int i = 0; i < N; i++) {
            assert_int_equal(s[i].count, deadline[i] != UINT64_MAX);
            if (s[i].count)
                assert_int_equal(s[i].fired_at, deadline[i]);
            for (int k = 0; k < i; k++)
                if (s[i].count && s[k].count && deadline[i] != deadline[k])
                    assert_int_equal(order[i] < order[k], deadline[i] < deadline[k]);
        }
    }
    free(s);
    clock_destroy(c);
}

static void past_timer_of_manual_clock_fires_from_loop(void **state)
{
    struct loop *loop = loop_create(NULL);
    struct clock *c = clock_create(loop, true);
    struct shot s;
    shot_init(&s, c);
    timer_arm(c, &s.timer, 0);
    assert_int_equal(s.count, 0);
    assert_true(run_until(loop, flag_is_set, &s.done, 5000));
    clock_destroy(c);
    loop_destroy(loop);
}

static int compare_u64(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

/*
 * A timer rounded to whole milliseconds would always be late by 0.9 ms. The better quarter counts:
 * on a busy host the loop's thread may wait for its turn.
 */
static void real_timers_are_precise(void **state)
{
    enum { N = 41 };
    struct loop *loop = loop_create(NULL);
    struct clock *c = clock_create(loop, false);
    uint64_t late[N];
    for (int i = 0; i < N; i++) {
        struct shot s;
        shot_init(&s, c);
        uint64_t deadline = clock_now(c) + 2 * MS + MS / 10;
        timer_arm(c, &s.timer, deadline);
        assert_true(run_until(loop, flag_is_set, &s.done, 5000));
        assert_true(s.fired_at >= deadline);
        late[i] = s.fired_at - deadline;
    }
    qsort(late, N, sizeof(late[0]), compare_u64);
    print_message("lateness: median %llu us, worst %llu us\n",
                  (unsigned long long)late[N / 2] / 1000, (unsigned long long)late[N - 1] / 1000);
    assert_true(late[N / 4] < MS / 2);
    clock_destroy(c);
    loop_destroy(loop);
}

struct arming {
    struct clock *clock;
    struct shot *shot;
};

static void *arm_sooner(void *opaque)
{
    struct arming *a = opaque;
    timer_arm(a->clock, &a->shot->timer, clock_now(a->clock) + 5 * MS);
    return NULL;
}

/* The loop already waits for a deadline an hour away. */
static void arming_from_another_thread(void **state)
{
    struct loop *loop = loop_create(NULL);
    struct clock *c = clock_create(loop, false);
    struct shot far, s;
    shot_init(&far, c);
    shot_init(&s, c);
    timer_arm(c, &far.timer, clock_now(c) + 3600000 * MS);
    struct arming a = {c, &s};
    pthread_t t;
    pthread_create(&t, NULL, arm_sooner, &a);
    assert_true(run_until(loop, flag_is_set, &s.done, 5000));
    pthread_join(t, NULL);
    assert_int_equal(far.count, 0);
    timer_disarm(c, &far.timer);
    clock_destroy(c);
    loop_destroy(loop);
}

/* Pushed ahead, a timer fires at its last deadline and only then. */
static void pushing_ahead(void **state)
{
    struct loop *loop = loop_create(NULL);
    struct clock *c = clock_create(loop, false);
    struct shot s;
    shot_init(&s, c);
    uint64_t deadline = 0;
    for (int i = 1; i <= 20; i++) {
        deadline = clock_now(c) + (uint64_t)i * MS;
        timer_arm(c, &s.timer, deadline);
    }
    assert_true(run_until(loop, flag_is_set, &s.done, 5000));
    assert_true(s.fired_at >= deadline);
    run_until(loop, NULL, NULL, 20);
    assert_int_equal(s.count, 1);
    clock_destroy(c);
    loop_destroy(loop);
}

static void pause_stops_time_and_timers(void **state)
{
    struct loop *loop = loop_create(NULL);
    struct clock *c = clock_create(loop, false);
    struct shot s;
    shot_init(&s, c);
    uint64_t deadline = clock_now(c) + 20 * MS;
    timer_arm(c, &s.timer, deadline);
    clock_pause(c);
    clock_pause(c);
    uint64_t paused_at = clock_now(c);
    run_until(loop, NULL, NULL, 40);
    assert_int_equal(clock_now(c), paused_at);
    assert_int_equal(s.count, 0);
    uint64_t host = test_now_ns();
    clock_resume(c);
    clock_resume(c);
    assert_true(clock_now(c) - paused_at <= test_now_ns() - host);
    assert_true(run_until(loop, flag_is_set, &s.done, 5000));
    assert_true(s.fired_at >= deadline);
    assert_true(test_now_ns() - host >= deadline - paused_at);

    clock_pause(c);
    clock_set(c, UINT64_C(1) << 60);
    assert_int_equal(clock_now(c), UINT64_C(1) << 60);
    shot_init(&s, c);
    timer_arm(c, &s.timer, (UINT64_C(1) << 60) + 2 * MS);
    clock_resume(c);
    assert_true(run_until(loop, flag_is_set, &s.done, 5000));
    assert_true(s.fired_at >= (UINT64_C(1) << 60) + 2 * MS);
    clock_destroy(c);
    loop_destroy(loop);
}

static void deadline_beyond_all_time(void **state)
{
    struct loop *loop = loop_create(NULL);
    struct clock *c = clock_create(loop, false);
    struct shot s, t;
    shot_init(&s, c);
    shot_init(&t, c);
    timer_arm(c, &s.timer, UINT64_MAX - 1);
    timer_arm(c, &t.timer, INT64_MAX - 5);
    run_until(loop, NULL, NULL, 30);
    assert_int_equal(s.count + t.count, 0);
    timer_disarm(c, &t.timer);
    timer_disarm(c, &s.timer);
    clock_destroy(c);
    loop_destroy(loop);
}

static uint64_t raw_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC_RAW, &ts);
    return (uint64_t)ts.tv_sec * 1000000000 + (uint64_t)ts.tv_nsec;
}

/* Against a measurement over 20 times the time, by the tightest of several pairs. */
static void tsc_rate_is_right(void **state)
{
    uint64_t start = test_now_ns();
    uint64_t hz = tsc_frequency_hz();
    print_message("tsc %llu Hz, found in %llu us\n", (unsigned long long)hz,
                  (unsigned long long)(test_now_ns() - start) / 1000);
    assert_int_equal(tsc_frequency_hz(), hz);
    uint64_t tsc[2], ns[2];
    for (int k = 0; k < 2; k++) {
        uint64_t best = UINT64_MAX;
        for (int i = 0; i < 100; i++) {
            uint64_t before = tsc_read(), n = raw_ns(), after = tsc_read();
            if (after - before < best) {
                best = after - before;
                tsc[k] = before + best / 2;
                ns[k] = n;
            }
        }
        struct timespec pause = {.tv_nsec = 300 * 1000000};
        if (k == 0)
            nanosleep(&pause, NULL);
    }
    double long_hz = (double)(tsc[1] - tsc[0]) * 1e9 / (double)(ns[1] - ns[0]);
    double ppm = ((double)hz / long_hz - 1) * 1e6;
    print_message("difference %.1f ppm\n", ppm);
    assert_true(ppm > -50 && ppm < 50);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(manual_time_moves_only_by_hand),
        cmocka_unit_test(timers_see_their_deadline),
        cmocka_unit_test(pausing_stops_an_advance),
        cmocka_unit_test(heap_keeps_order),
        cmocka_unit_test(past_timer_of_manual_clock_fires_from_loop),
        cmocka_unit_test(real_timers_are_precise),
        cmocka_unit_test(arming_from_another_thread),
        cmocka_unit_test(pushing_ahead),
        cmocka_unit_test(pause_stops_time_and_timers),
        cmocka_unit_test(deadline_beyond_all_time),
        cmocka_unit_test(tsc_rate_is_right),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
