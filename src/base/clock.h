/*
 * The machine's clock and its timers.
 *
 * clock_now() is guest time: nanoseconds since the machine was made, standing
 * still while the machine is paused. In manual mode (device tests) it moves only
 * by clock_advance(). Wall-clock time for the CMOS clock comes from
 * clock_wall_ns(), which a manual clock derives from its own time.
 *
 * Timers belong to a struct clock that is tied to an event loop: callbacks run
 * in the loop's thread with the machine lock held. Timers may be armed and
 * disarmed from any thread (an own lock guards the heap).
 */
#ifndef RINGFORT_BASE_CLOCK_H
#define RINGFORT_BASE_CLOCK_H

#include <stdbool.h>
#include <stdint.h>

struct clock;
struct loop;

struct timer {
    void (*fn)(void *opaque);
    void *opaque;
    uint64_t deadline;          /* clock's own; guest ns, UINT64_MAX: not armed */
    unsigned heap_index;        /* clock's own */
};

/* manual: time moves by clock_advance() only. loop may be NULL with a manual clock. */
struct clock *clock_create(struct loop *loop, bool manual);
void clock_destroy(struct clock *c);
/* Any thread. */
bool clock_is_manual(const struct clock *c);

/* Any thread. */
uint64_t clock_now(const struct clock *c);
/* CLOCK_REALTIME in ns (real mode), or 2020-01-01T00:00:00Z + clock_now() (manual mode). Any thread. */
uint64_t clock_wall_ns(const struct clock *c);

/* Pause and resume guest time. Machine lock held. Idempotent. Timers keep their guest deadlines. */
void clock_pause(struct clock *c);
void clock_resume(struct clock *c);
/* For loading a saved machine: set guest time while paused. */
void clock_set(struct clock *c, uint64_t now_ns);

/* Manual mode: move time forward and run the timers that come due, in order of their deadlines. */
void clock_advance(struct clock *c, uint64_t ns);

void timer_init(struct timer *t, void (*fn)(void *), void *opaque);
/* Arms (or re-arms) for guest time deadline_ns; one that is past fires at once from the loop. Any thread. */
void timer_arm(struct clock *c, struct timer *t, uint64_t deadline_ns);
/*
 * Any thread. After it returns in the loop's thread (or with the machine lock held) the
 * callback does not run any more.
 */
void timer_disarm(struct clock *c, struct timer *t);
static inline bool timer_armed(const struct timer *t) { return t->deadline != UINT64_MAX; }

/*
 * The time stamp counter. tsc_frequency_hz() is the host counter's rate, found once
 * (error below 50 ppm). It takes 5 ms from tsc_frequency_begin() on, or from the first question. Any thread.
 */
void tsc_frequency_begin(void);
uint64_t tsc_frequency_hz(void);
uint64_t tsc_read(void);

#endif
