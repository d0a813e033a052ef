/*
 * A bandwidth limit that several streams share. Any thread.
 */
#ifndef RINGFORT_MIGRATE_LIMIT_H
#define RINGFORT_MIGRATE_LIMIT_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct limit {
    pthread_mutex_t lock;
    uint64_t rate;              /* bytes per second; 0: none */
    uint64_t free_at_ns;        /* CLOCK_MONOTONIC at which what was taken so far is paid for */
};

void limit_init(struct limit *l, uint64_t bytes_per_second);
void limit_destroy(struct limit *l);
/* Waits until bytes may be sent; comes back early when *cancel becomes true. */
void limit_take(struct limit *l, uint64_t bytes, const _Atomic bool *cancel);

#endif
