/* See limit.h: each taker waits until what those before it took is paid for. */
#include "migrate/limit.h"

#include <time.h>

#include "base/util.h"

#define NS_PER_S 1000000000ull
#define BURST_NS (NS_PER_S / 50)

static uint64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * NS_PER_S + (uint64_t)t.tv_nsec;
}

void limit_init(struct limit *l, uint64_t bytes_per_second)
{
    pthread_mutex_init(&l->lock, NULL);
    l->rate = bytes_per_second;
    l->free_at_ns = 0;
}

void limit_destroy(struct limit *l) { pthread_mutex_destroy(&l->lock); }

void limit_take(struct limit *l, uint64_t bytes, const _Atomic bool *cancel)
{
    uint64_t now, start;

    if (!l->rate)
        return;
    pthread_mutex_lock(&l->lock);
    now = now_ns();
    /* Idle time earns a little credit, so that a late wake-up costs nothing. */
    start = MAX(l->free_at_ns, now > BURST_NS ? now - BURST_NS : 0);
    l->free_at_ns = start + (uint64_t)((unsigned __int128)bytes * NS_PER_S / l->rate);
    pthread_mutex_unlock(&l->lock);
    while (start > now && !atomic_load(cancel)) {
        uint64_t part = MIN(start - now, NS_PER_S / 10);

        nanosleep(&(struct timespec){ .tv_nsec = (long)part }, NULL);
        now = now_ns();
    }
}
