/*
 * The event loop: epoll for descriptors, one eventfd to be woken by other threads.
 *
 * Who touches what: the descriptor list, hooks and graveyard belong to the holder of the loop's
 * lock (or, without one, to the loop's thread); the list of scheduled calls has a mutex of its own.
 *
 * A descriptor can be removed by another thread after epoll_wait() reported it and before the
 * loop got the lock. So a removed one goes to the graveyard, and only the loop's thread
 * empties it, when it holds no reported events.
 *
 * Regular files and /dev/null cannot be polled by epoll (EPERM). As poll(2) does, they count as
 * always ready.
 */
#include "base/loop.h"

#include <errno.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"

struct loop_fd {
    struct loop *loop;
    int fd;
    short events;
    bool dead;
    bool always_ready;
    loop_fd_fn *fn;
    void *opaque;
    struct loop_fd *next, **prev_next;
};

struct loop {
    pthread_mutex_t *lock;
    int epoll_fd, wake_fd;
    struct loop_fd *fds, *graveyard;
    unsigned always_ready; /* descriptors with always_ready and events != 0 */
    struct loop_hook *hooks, *next_hook;

    pthread_mutex_t calls_lock;
    struct loop_call *calls, **calls_tail;

    _Atomic bool stop;
    _Atomic bool running;
    pthread_t thread;
};

_Static_assert(EPOLLIN == POLLIN && EPOLLOUT == POLLOUT && EPOLLERR == POLLERR &&
                   EPOLLHUP == POLLHUP && EPOLLRDHUP == POLLRDHUP && EPOLLPRI == POLLPRI,
               "events of poll and epoll are passed on unchanged");

struct loop *loop_create(pthread_mutex_t *lock)
{
    struct loop *l = calloc(1, sizeof(*l));
    if (!l) {
        log_error("out of memory");
        return NULL;
    }
    l->lock = lock;
    l->calls_tail = &l->calls;
    pthread_mutex_init(&l->calls_lock, NULL);
    l->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    l->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    struct epoll_event ev = {.events = EPOLLIN, .data.ptr = NULL};
    if (l->epoll_fd < 0 || l->wake_fd < 0 ||
        epoll_ctl(l->epoll_fd, EPOLL_CTL_ADD, l->wake_fd, &ev) < 0) {
        log_error("cannot make an event loop: %s", strerror(errno));
        loop_destroy(l);
        return NULL;
    }
    return l;
}

static void empty_graveyard(struct loop *l)
{
    while (l->graveyard) {
        struct loop_fd *f = l->graveyard;
        l->graveyard = f->next;
        free(f);
    }
}

void loop_destroy(struct loop *l)
{
    if (!l)
        return;
    while (l->fds)
        loop_fd_remove(l->fds);
    empty_graveyard(l);
    if (l->epoll_fd >= 0)
        close(l->epoll_fd);
    if (l->wake_fd >= 0)
        close(l->wake_fd);
    pthread_mutex_destroy(&l->calls_lock);
    free(l);
}

static void wake(struct loop *l)
{
    uint64_t one = 1;
    while (write(l->wake_fd, &one, sizeof(one)) < 0 && errno == EINTR)
        ;
}

bool loop_in_thread(const struct loop *l)
{
    return atomic_load_explicit(&l->running, memory_order_acquire) &&
           pthread_equal(l->thread, pthread_self());
}

void loop_stop(struct loop *l)
{
    atomic_store(&l->stop, true);
    wake(l);
}

/* Descriptors. */

struct loop_fd *loop_fd_add(struct loop *l, int fd, short events, loop_fd_fn *fn, void *opaque)
{
    struct loop_fd *f = calloc(1, sizeof(*f));
    if (!f) {
        log_error("out of memory");
        return NULL;
    }
    *f = (struct loop_fd){.loop = l, .fd = fd, .events = events, .fn = fn, .opaque = opaque};
    struct epoll_event ev = {.events = (uint16_t)events, .data.ptr = f};
    if (epoll_ctl(l->epoll_fd, EPOLL_CTL_ADD, fd, &ev) < 0) {
        if (errno != EPERM) {
            log_error("cannot watch descriptor %d: %s", fd, strerror(errno));
            free(f);
            return NULL;
        }
        f->always_ready = true;
        if (events) {
            l->always_ready++;
            wake(l);
        }
    }
    f->next = l->fds;
    f->prev_next = &l->fds;
    if (f->next)
        f->next->prev_next = &f->next;
    l->fds = f;
    return f;
}

void loop_fd_set_events(struct loop_fd *f, short events)
{
    if (f->events == events)
        return;
    struct loop *l = f->loop;
    if (f->always_ready) {
        l->always_ready += (events != 0);
        l->always_ready -= (f->events != 0);
        f->events = events;
        if (events)
            wake(l);
        return;
    }
    f->events = events;
    struct epoll_event ev = {.events = (uint16_t)events, .data.ptr = f};
    if (epoll_ctl(l->epoll_fd, EPOLL_CTL_MOD, f->fd, &ev) < 0)
        log_error("cannot watch descriptor %d: %s", f->fd, strerror(errno));
}

void loop_fd_remove(struct loop_fd *f)
{
    if (!f)
        return;
    struct loop *l = f->loop;
    if (f->always_ready)
        l->always_ready -= (f->events != 0);
    else
        epoll_ctl(l->epoll_fd, EPOLL_CTL_DEL, f->fd,
                  NULL); /* fails when fd was closed before: no matter */
    *f->prev_next = f->next;
    if (f->next)
        f->next->prev_next = f->prev_next;
    f->dead = true;
    f->next = l->graveyard;
    l->graveyard = f;
}

/* Calls from other threads. */

void loop_schedule(struct loop *l, struct loop_call *call)
{
    if (__atomic_exchange_n(&call->pending, 1, __ATOMIC_ACQ_REL))
        return;
    pthread_mutex_lock(&l->calls_lock);
    bool first = !l->calls;
    call->next = NULL;
    *l->calls_tail = call;
    l->calls_tail = &call->next;
    pthread_mutex_unlock(&l->calls_lock);
    /* The loop's thread looks at the list before it waits. */
    if (first && !loop_in_thread(l))
        wake(l);
}

void loop_cancel(struct loop *l, struct loop_call *call)
{
    pthread_mutex_lock(&l->calls_lock);
    for (struct loop_call **p = &l->calls; *p; p = &(*p)->next) {
        if (*p == call) {
            *p = call->next;
            if (!*p)
                l->calls_tail = p;
            __atomic_store_n(&call->pending, 0, __ATOMIC_RELEASE);
            break;
        }
    }
    pthread_mutex_unlock(&l->calls_lock);
}

static bool calls_waiting(struct loop *l)
{
    pthread_mutex_lock(&l->calls_lock);
    bool any = l->calls != NULL;
    pthread_mutex_unlock(&l->calls_lock);
    return any;
}

/* Runs what is scheduled now; what these calls schedule runs in the next round, after descriptors
 * had a turn. */
static void run_calls(struct loop *l)
{
    pthread_mutex_lock(&l->calls_lock);
    unsigned count = 0;
    for (struct loop_call *c = l->calls; c; c = c->next)
        count++;
    while (count-- && l->calls) {
        struct loop_call *c = l->calls;
        l->calls = c->next;
        if (!l->calls)
            l->calls_tail = &l->calls;
        void (*fn)(void *) = c->fn;
        void *opaque = c->opaque;
        __atomic_store_n(&c->pending, 0, __ATOMIC_RELEASE);
        pthread_mutex_unlock(&l->calls_lock);
        fn(opaque);
        pthread_mutex_lock(&l->calls_lock);
    }
    pthread_mutex_unlock(&l->calls_lock);
}

/* Hooks. next_hook is the loop's place in the list, so that a hook may remove any hook. */

void loop_hook_add(struct loop *l, struct loop_hook *hook)
{
    hook->next = l->hooks;
    l->hooks = hook;
    if (!loop_in_thread(l))
        wake(l);
}

void loop_hook_remove(struct loop *l, struct loop_hook *hook)
{
    if (l->next_hook == hook)
        l->next_hook = hook->next;
    for (struct loop_hook **p = &l->hooks; *p; p = &(*p)->next) {
        if (*p == hook) {
            *p = hook->next;
            break;
        }
    }
}

static void prepare_hooks(struct loop *l, int *timeout_ms)
{
    for (struct loop_hook *h = l->hooks; h; h = l->next_hook) {
        l->next_hook = h->next;
        h->prepare(h->opaque, timeout_ms);
    }
}

static void dispatch_hooks(struct loop *l)
{
    for (struct loop_hook *h = l->hooks; h; h = l->next_hook) {
        l->next_hook = h->next;
        h->dispatch(h->opaque);
    }
}

/* The loop. */

static void dispatch_fds(struct loop *l, const struct epoll_event *ev, int n)
{
    for (int i = 0; i < n; i++) {
        struct loop_fd *f = ev[i].data.ptr;
        if (!f) {
            uint64_t count;
            while (read(l->wake_fd, &count, sizeof(count)) < 0 && errno == EINTR)
                ;
            continue;
        }
        if (!f->dead)
            f->fn(f->opaque, f->fd, (short)ev[i].events);
    }
}

static void dispatch_always_ready(struct loop *l)
{
    /* Removed ones stay allocated until the graveyard is emptied, but their links change: start
     * over each time. */
    struct loop_fd *ready[16];
    unsigned n = 0;
    for (struct loop_fd *f = l->fds; f && n < ARRAY_SIZE(ready); f = f->next)
        if (f->always_ready && f->events)
            ready[n++] = f;
    for (unsigned i = 0; i < n; i++)
        if (!ready[i]->dead && ready[i]->events)
            ready[i]->fn(ready[i]->opaque, ready[i]->fd, ready[i]->events & (POLLIN | POLLOUT));
}

int loop_run(struct loop *l)
{
    int ret = 0;
    l->thread = pthread_self();
    atomic_store_explicit(&l->running, true, memory_order_release);
    if (l->lock)
        pthread_mutex_lock(l->lock);
    while (!atomic_exchange(&l->stop, false)) {
        struct epoll_event ev[64];
        int timeout_ms = -1;
        prepare_hooks(l, &timeout_ms);
        if (l->always_ready || calls_waiting(l))
            timeout_ms = 0;
        empty_graveyard(l);
        if (l->lock)
            pthread_mutex_unlock(l->lock);
        int n = epoll_wait(l->epoll_fd, ev, ARRAY_SIZE(ev), timeout_ms);
        int err = errno;
        if (l->lock)
            pthread_mutex_lock(l->lock);
        if (n < 0 && err != EINTR) {
            log_error("event loop: %s", strerror(err));
            ret = -err;
            break;
        }
        dispatch_fds(l, ev, n);
        if (l->always_ready)
            dispatch_always_ready(l);
        run_calls(l);
        dispatch_hooks(l);
    }
    empty_graveyard(l);
    atomic_store_explicit(&l->running, false, memory_order_release);
    if (l->lock)
        pthread_mutex_unlock(l->lock);
    return ret;
}
