/*
 * Whether direct execution pays, as it is judged: with sandboxes whose switches cost what the test says, and programs that run as
 * long as the test says between two of them.
 */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

#include <stdlib.h>

#include "engine/translate/direct_internal.h"

/* What a switch costs, in µs; each third one is interrupted by others. */
static unsigned switch_us;
static unsigned trips;
static uint64_t tick;

uint64_t sandbox_trip(struct sandbox *s) { return (switch_us + (++trips % 3 ? 0 : 3000)) * tick; }
uint64_t sandbox_time(const struct sandbox *s) { return 0; }
pid_t sandbox_pid(const struct sandbox *s) { return 0; }
bool direct_eligible(const struct direct *d) { return true; }

struct judged {
    struct translator t;
    struct direct d;
    struct x86_tlbs tlbs;
};

static int setup(void **state)
{
    struct judged *j = aligned_alloc(64, (sizeof(*j) + 63) / 64 * 64);

    if (!j)
        return -1;
    memset(j, 0, sizeof(*j));
    j->t.it.cpu.tlbs = &j->tlbs;
    j->t.it.cpu.space = &j->tlbs.space[0];
    j->t.direct = &j->d;
    j->d.t = &j->t;
    direct_judge_begin(&j->d);
    tick = j->d.tick;
    *state = j;
    return 0;
}

static int teardown(void **state)
{
    free(*state);
    return 0;
}

/*
 * Stops that come after so many µs of user code, and, each so many stops, after long_us instead: for how many it ran natively,
 * of at most 2,000.
 */
static unsigned runs_natively(struct judged *j, unsigned cost_us, unsigned user_us, unsigned every, unsigned long_us)
{
    struct direct_space *s = &j->d.space[0];
    uint64_t now = __builtin_ia32_rdtsc();
    unsigned n = 0;

    switch_us = cost_us;
    j->t.native_space = j->t.it.cpu.space;
    for (; n < 2000 && j->t.native_space; n++) {
        uint64_t ran = (cost_us + (every && n % every == every - 1 ? long_us : user_us)) * tick;

        now += ran;
        direct_judge(&j->d, s, ran, now, false);
    }
    return n;
}

static void program_that_computes_stays(void **state)
{
    assert_int_equal(runs_natively(*state, 6, 20, 0, 0), 2000);
    assert_int_equal(runs_natively(*state, 6, 100000, 0, 0), 2000);
}

static void program_that_calls_the_kernel_goes(void **state)
{
    assert_true(runs_natively(*state, 6, 1, 0, 0) < 300);
}

/* Dear switches are part of what was measured; they must not pass for the program's own work. */
static void where_switches_are_dear_it_must_run_longer(void **state)
{
    assert_true(runs_natively(*state, 65, 1, 0, 0) < 300);
    assert_true(runs_natively(*state, 65, 20, 0, 0) < 300);
    assert_int_equal(runs_natively(*state, 65, 200, 0, 0), 2000);
    assert_true(runs_natively(*state, 500, 20, 0, 0) < 300);
}

/* They may become so, and cheap again. */
static void cost_is_measured_again(void **state)
{
    assert_int_equal(runs_natively(*state, 6, 20, 0, 0), 2000);
    assert_true(runs_natively(*state, 65, 20, 0, 0) < 300);
    assert_int_equal(runs_natively(*state, 6, 20, 0, 0), 2000);
}

/* A neighbour that takes the processor for 4 ms makes no computing program of one that calls the kernel. */
static void neighbours_do_not_count(void **state)
{
    assert_true(runs_natively(*state, 6, 1, 200, 4000) < 300);
}

/* Short stays among long ones. */
static void mixed_program_stays(void **state)
{
    assert_int_equal(runs_natively(*state, 6, 1, 4, 60), 2000);
}

/* A stay of user code by translation. */
static void stay(struct judged *j, unsigned us)
{
    direct_entered(&j->t, true);
    j->d.entered = __builtin_ia32_rdtsc() - us * tick;
    direct_entered(&j->t, false);
}

static bool begins(struct judged *j)
{
    direct_entered(&j->t, true);
    return j->t.native_space != NULL;
}

static void begins_when_stays_are_long(void **state)
{
    struct judged *j = *state;

    for (unsigned i = 0; i < 100; i++)
        stay(j, 100);
    assert_false(begins(j));            /* 10 ms in all: not yet */
    for (unsigned i = 0; i < 200; i++)
        stay(j, 100);
    assert_true(begins(j));
}

static void does_not_begin_when_stays_are_short(void **state)
{
    struct judged *j = *state;

    for (unsigned i = 0; i < 10000; i++)
        stay(j, 5);
    assert_false(begins(j));
}

/* The same program, on a host where a stay of 100 µs is not worth a switch. */
static void does_not_begin_where_switches_are_dear(void **state)
{
    struct judged *j = *state;

    assert_true(runs_natively(j, 200, 20, 0, 0) < 300);
    j->d.space[0].not_before = 0;
    for (unsigned i = 0; i < 1000; i++)
        stay(j, 100);
    assert_false(begins(j));
}

static void is_tried_again_after_a_while(void **state)
{
    struct judged *j = *state;

    for (unsigned i = 0; i < 1000; i++)
        stay(j, 100);
    assert_true(runs_natively(j, 6, 1, 0, 0) < 300);
    assert_false(begins(j));
    assert_true(j->d.space[0].not_before > __builtin_ia32_rdtsc());
    j->d.space[0].not_before = __builtin_ia32_rdtsc();
    assert_true(begins(j));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(program_that_computes_stays, setup, teardown),
        cmocka_unit_test_setup_teardown(program_that_calls_the_kernel_goes, setup, teardown),
        cmocka_unit_test_setup_teardown(where_switches_are_dear_it_must_run_longer, setup, teardown),
        cmocka_unit_test_setup_teardown(cost_is_measured_again, setup, teardown),
        cmocka_unit_test_setup_teardown(neighbours_do_not_count, setup, teardown),
        cmocka_unit_test_setup_teardown(mixed_program_stays, setup, teardown),
        cmocka_unit_test_setup_teardown(begins_when_stays_are_long, setup, teardown),
        cmocka_unit_test_setup_teardown(does_not_begin_when_stays_are_short, setup, teardown),
        cmocka_unit_test_setup_teardown(does_not_begin_where_switches_are_dear, setup, teardown),
        cmocka_unit_test_setup_teardown(is_tried_again_after_a_while, setup, teardown),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
