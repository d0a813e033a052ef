/*
 * The event loop: file descriptors, timers and calls from other threads.
 *
 * One thread runs loop_run(); every callback runs in that thread. Unless said
 * otherwise a function here may be called from the loop's thread only.
 * Callbacks of a machine's devices run with the machine lock held (struct loop
 * has an optional lock that it takes around each batch of callbacks and never
 * holds while it waits in poll).
 */
#ifndef RINGFORT_BASE_LOOP_H
#define RINGFORT_BASE_LOOP_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

struct loop;
struct loop_fd;

/* lock may be NULL; it is borrowed and must outlive the loop. NULL return: out of resources (logged). */
struct loop *loop_create(pthread_mutex_t *lock);
void loop_destroy(struct loop *loop);

/* Runs until loop_stop(). Returns 0 or a negative errno. */
int loop_run(struct loop *loop);
/* Any thread. */
void loop_stop(struct loop *loop);
/* True in the thread that runs loop_run(). */
bool loop_in_thread(const struct loop *loop);

/* events and revents are poll(2)'s POLLIN, POLLOUT, … */
typedef void loop_fd_fn(void *opaque, int fd, short revents);
/* Any thread that holds the loop's lock. The fd stays the caller's. NULL: out of memory (logged). */
struct loop_fd *loop_fd_add(struct loop *loop, int fd, short events, loop_fd_fn *fn, void *opaque);
void loop_fd_set_events(struct loop_fd *f, short events);
/* After this returns, fn is not called again for f; f is freed. NULL is allowed. */
void loop_fd_remove(struct loop_fd *f);

/*
 * A call from any thread into the loop's thread. The caller owns the struct
 * (embedded in its own) and it may be scheduled again and again; while it is
 * pending, further loop_schedule()s of it are merged into one call.
 */
struct loop_call {
    void (*fn)(void *opaque);
    void *opaque;
    struct loop_call *next;     /* loop's own */
    int pending;                /* loop's own, atomic */
};
/* Any thread. */
void loop_schedule(struct loop *loop, struct loop_call *call);
/* Loop thread, or any thread with the lock held: forget a pending call. */
void loop_cancel(struct loop *loop, struct loop_call *call);

/*
 * Poll hooks for libraries that bring their own descriptor lists (libslirp):
 * before waiting, prepare() may lower *timeout_ms and register what it wants
 * through loop_fd_*; after waiting, dispatch() runs.
 */
struct loop_hook {
    void (*prepare)(void *opaque, int *timeout_ms);
    void (*dispatch)(void *opaque);
    void *opaque;
    struct loop_hook *next;     /* loop's own */
};
void loop_hook_add(struct loop *loop, struct loop_hook *hook);
void loop_hook_remove(struct loop *loop, struct loop_hook *hook);

#endif
