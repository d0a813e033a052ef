/* Running an event loop in a test until something holds, with a bound. */
#ifndef TESTS_UNIT_LOOP_HELPER_H
#define TESTS_UNIT_LOOP_HELPER_H

#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "base/loop.h"

static inline uint64_t test_now_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000 + (uint64_t)ts.tv_nsec;
}

struct loop_until {
    struct loop *loop;
    struct loop_hook hook;
    bool (*condition)(void *opaque);
    void *opaque;
    uint64_t end;
    bool met;
};

static inline void loop_until_check(struct loop_until *u)
{
    if (u->condition && u->condition(u->opaque)) {
        u->met = true;
        loop_stop(u->loop);
    } else if (test_now_ns() >= u->end) {
        loop_stop(u->loop);
    }
}

static inline void loop_until_prepare(void *opaque, int *timeout_ms)
{
    if (*timeout_ms < 0 || *timeout_ms > 5)
        *timeout_ms = 5;
}

static inline void loop_until_dispatch(void *opaque)
{
    loop_until_check(opaque);
}

/* Runs loop until condition(opaque) holds or ms milliseconds are over; whether it holds. NULL: just
 * run. */
static inline bool run_until(struct loop *loop, bool (*condition)(void *), void *opaque,
                             unsigned ms)
{
    struct loop_until u = {.loop = loop,
                           .condition = condition,
                           .opaque = opaque,
                           .end = test_now_ns() + (uint64_t)ms * 1000000};
    u.hook = (struct loop_hook){
        .prepare = loop_until_prepare, .dispatch = loop_until_dispatch, .opaque = &u};
    if (condition && condition(opaque))
        return true;
    loop_hook_add(loop, &u.hook);
    loop_run(loop);
    loop_hook_remove(loop, &u.hook);
    return u.met;
}

static inline bool flag_is_set(void *opaque)
{
    return *(volatile bool *)opaque;
}

#endif
