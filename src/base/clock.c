/*
 * The machine's clock and its timers: a binary heap of deadlines and one timerfd.
 *
 * Guest time is one atomic word, so that clock_now() needs no lock: either "stands at this value"
 * (paused, or a manual clock) or "CLOCK_MONOTONIC minus this value". The heap, and
 * what the timerfd is set to, are guarded by the clock's own lock; callbacks run without it.
 *
 * The timerfd is set from whichever thread arms a timer: nobody has to wake the loop for it. It
 * is moved only to earlier times; when it goes off before anything is due, it is set
 * again. A guest that pushes its next tick ahead over and over thus costs no system call each time.
 */
#include "base/clock.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "base/log.h"
#include "base/loop.h"
#include "base/util.h"

#define NOT_ARMED       UINT64_MAX
#define MANUAL_EPOCH_NS (UINT64_C(1577836800) * 1000000000) /* 2020-01-01T00:00:00Z */
#define FIRE_BATCH      256 /* callbacks before descriptors get a turn again */

struct clock {
    struct loop *loop;
    bool manual;
    bool paused;          /* manual clocks: clock_advance() does nothing */
    _Atomic int64_t time; /* value << 1 | stands still: see time_at() */

    pthread_mutex_t lock;
    struct timer **heap;
    unsigned count, capacity;
    int timer_fd;
    struct loop_fd *watch;
    uint64_t programmed;        /* CLOCK_MONOTONIC time the timerfd is set to, NOT_ARMED: off */
    struct loop_call fire_call; /* manual clocks with a loop: a timer was armed for the past */
};

static uint64_t monotonic_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000 + (uint64_t)ts.tv_nsec;
}

static int64_t encode(int64_t value, bool still)
{
    return (int64_t)((uint64_t)value << 1) | still;
}

uint64_t clock_now(const struct clock *c)
{
    int64_t t = atomic_load_explicit(&c->time, memory_order_acquire);
    return t & 1 ? (uint64_t)(t >> 1) : monotonic_ns() - (uint64_t)(t >> 1);
}

bool clock_is_manual(const struct clock *c)
{
    return c->manual;
}

uint64_t clock_wall_ns(const struct clock *c)
{
    if (c->manual)
        return MANUAL_EPOCH_NS + clock_now(c);
    struct timespec ts;
    clock_gettime(CLOCK_REALTIME, &ts);
    return (uint64_t)ts.tv_sec * 1000000000 + (uint64_t)ts.tv_nsec;
}

/* The heap. Clock's lock held. */

static void heap_place(struct clock *c, unsigned i, struct timer *t)
{
    c->heap[i] = t;
    t->heap_index = i;
}

static void heap_up(struct clock *c, unsigned i, struct timer *t)
{
    while (i && c->heap[(i - 1) / 2]->deadline > t->deadline) {
        heap_place(c, i, c->heap[(i - 1) / 2]);
        i = (i - 1) / 2;
    }
    heap_place(c, i, t);
}

static void heap_down(struct clock *c, unsigned i, struct timer *t)
{
    for (;;) {
        unsigned child = 2 * i + 1;
        if (child >= c->count)
            break;
        if (child + 1 < c->count && c->heap[child + 1]->deadline < c->heap[child]->deadline)
            child++;
        if (c->heap[child]->deadline >= t->deadline)
            break;
        heap_place(c, i, c->heap[child]);
        i = child;
    }
    heap_place(c, i, t);
}

static void heap_remove(struct clock *c, struct timer *t)
{
    unsigned i = t->heap_index;
    struct timer *last = c->heap[--c->count];
    if (last != t) {
        if (last->deadline < t->deadline)
            heap_up(c, i, last);
        else
            heap_down(c, i, last);
    }
    __atomic_store_n(&t->deadline, NOT_ARMED, __ATOMIC_RELAXED);
}

static void heap_insert(struct clock *c, struct timer *t, uint64_t deadline)
{
    if (c->count == c->capacity) {
        unsigned capacity = c->capacity ? 2 * c->capacity : 64;
        struct timer **heap = realloc(c->heap, capacity * sizeof(*heap));
        if (!heap) {
            /* The number of timers follows from the machine's configuration, not from what the
             * guest does. */
            log_error("out of memory for timers");
            abort();
        }
        c->heap = heap;
        c->capacity = capacity;
    }
    __atomic_store_n(&t->deadline, deadline, __ATOMIC_RELAXED);
    heap_up(c, c->count++, t);
}

/* Makes sure that something calls fire() in time for the first deadline. Clock's lock held. */
static void program(struct clock *c)
{
    if (!c->count)
        return;
    int64_t t = atomic_load_explicit(&c->time, memory_order_relaxed);
    uint64_t first = c->heap[0]->deadline;
    if (c->manual) {
        if (c->loop && first <= (uint64_t)(t >> 1))
            loop_schedule(c->loop, &c->fire_call);
        return;
    }
    if (t & 1)
        return;
    int64_t at;
    if (first > INT64_MAX || __builtin_add_overflow((int64_t)first, t >> 1, &at))
        return; /* some centuries from now */
    uint64_t when = at < 1 ? 1 : (uint64_t)at;
    if (when >= c->programmed)
        return;
    struct itimerspec its = {
        .it_value = {.tv_sec = (time_t)(when / 1000000000), .tv_nsec = (long)(when % 1000000000)}};
    if (timerfd_settime(c->timer_fd, TFD_TIMER_ABSTIME, &its, NULL) == 0)
        c->programmed = when;
    else
        log_error("cannot set a timer: %s", strerror(errno));
}

/* Runs what is due at guest time now. Loop's thread, or clock_advance()'s caller; machine lock
 * held. */
static void fire(struct clock *c, uint64_t now)
{
    pthread_mutex_lock(&c->lock);
    for (unsigned n = 0; n < FIRE_BATCH && c->count && c->heap[0]->deadline <= now; n++) {
        struct timer *t = c->heap[0];
        heap_remove(c, t);
        pthread_mutex_unlock(&c->lock);
        t->fn(t->opaque);
        pthread_mutex_lock(&c->lock);
    }
    program(c);
    pthread_mutex_unlock(&c->lock);
}

static void timer_fd_ready(void *opaque, int fd, short revents)
{
    struct clock *c = opaque;
    uint64_t expirations;
    pthread_mutex_lock(&c->lock);
    /* Nothing to read: another thread has set it to a new time since. */
    if (read(fd, &expirations, sizeof(expirations)) == (ssize_t)sizeof(expirations))
        c->programmed = NOT_ARMED;
    pthread_mutex_unlock(&c->lock);
    if (!(atomic_load_explicit(&c->time, memory_order_relaxed) & 1))
        fire(c, clock_now(c));
}

static void fire_called(void *opaque)
{
    struct clock *c = opaque;
    if (!c->paused)
        fire(c, clock_now(c));
}

struct clock *clock_create(struct loop *loop, bool manual)
{
    struct clock *c = calloc(1, sizeof(*c));
    if (!c) {
        log_error("out of memory");
        return NULL;
    }
    pthread_mutex_init(&c->lock, NULL);
    c->loop = loop;
    c->manual = manual;
    c->programmed = NOT_ARMED;
    c->timer_fd = -1;
    c->fire_call = (struct loop_call){.fn = fire_called, .opaque = c};
    if (manual) {
        c->time = encode(0, true);
        return c;
    }
    c->time = encode((int64_t)monotonic_ns(), false);
    c->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    if (c->timer_fd < 0) {
        log_error("cannot make a timer: %s", strerror(errno));
        clock_destroy(c);
        return NULL;
    }
    c->watch = loop_fd_add(loop, c->timer_fd, POLLIN, timer_fd_ready, c);
    if (!c->watch) {
        clock_destroy(c);
        return NULL;
    }
    return c;
}

void clock_destroy(struct clock *c)
{
    if (!c)
        return;
    if (c->loop)
        loop_cancel(c->loop, &c->fire_call);
    loop_fd_remove(c->watch);
    if (c->timer_fd >= 0)
        close(c->timer_fd);
    pthread_mutex_destroy(&c->lock);
    free(c->heap);
    free(c);
}

void clock_pause(struct clock *c)
{
    c->paused = true;
    if (!c->manual)
        atomic_store_explicit(&c->time, encode((int64_t)clock_now(c), true), memory_order_release);
}

void clock_resume(struct clock *c)
{
    pthread_mutex_lock(&c->lock);
    int64_t t = c->time;
    c->paused = false;
    if (!c->manual && (t & 1))
        atomic_store_explicit(&c->time, encode((int64_t)monotonic_ns() - (t >> 1), false),
                              memory_order_release);
    /* What the timerfd is set to was reckoned before the pause; it may now be too late. */
    c->programmed = NOT_ARMED;
    program(c);
    pthread_mutex_unlock(&c->lock);
}

void clock_set(struct clock *c, uint64_t now_ns)
{
    pthread_mutex_lock(&c->lock);
    bool still = c->time & 1;
    atomic_store_explicit(
        &c->time, encode(still ? (int64_t)now_ns : (int64_t)(monotonic_ns() - now_ns), still),
        memory_order_release);
    c->programmed = NOT_ARMED;
    program(c);
    pthread_mutex_unlock(&c->lock);
}

void clock_advance(struct clock *c, uint64_t ns)
{
    if (!c->manual || c->paused)
        return;
    uint64_t end = clock_now(c) + ns;
    while (!c->paused) {
        pthread_mutex_lock(&c->lock);
        uint64_t next = c->count ? c->heap[0]->deadline : NOT_ARMED;
        pthread_mutex_unlock(&c->lock);
        if (next > end)
            break;
        /* A timer sees its own deadline as the time; one armed for the past does not turn time
         * back. */
        uint64_t now = MAX(next, clock_now(c));
        atomic_store_explicit(&c->time, encode((int64_t)now, true), memory_order_release);
        fire(c, next);
    }
    if (c->paused)
        return; /* by a timer: time stands at its deadline */
    atomic_store_explicit(&c->time, encode((int64_t)end, true), memory_order_release);
}

void timer_init(struct timer *t, void (*fn)(void *), void *opaque)
{
    *t = (struct timer){.fn = fn, .opaque = opaque, .deadline = NOT_ARMED};
}

void timer_arm(struct clock *c, struct timer *t, uint64_t deadline_ns)
{
    pthread_mutex_lock(&c->lock);
    if (timer_armed(t))
        heap_remove(c, t);
    if (deadline_ns != NOT_ARMED) {
        heap_insert(c, t, deadline_ns);
        if (t->heap_index == 0)
            program(c);
    }
    pthread_mutex_unlock(&c->lock);
}

void timer_disarm(struct clock *c, struct timer *t)
{
    pthread_mutex_lock(&c->lock);
    if (timer_armed(t))
        heap_remove(c, t);
    pthread_mutex_unlock(&c->lock);
}
