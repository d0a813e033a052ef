/* The history of a console: a ring of bytes under a lock. */
#include "backend/console/history.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"

struct history {
    pthread_mutex_t lock;
    uint64_t end;
    void (*watcher)(void *opaque);
    void *watcher_opaque;
    uint8_t data[HISTORY_SIZE];
};

struct history *history_create(void)
{
    /* Not zeroed: pages that nothing was written to take no memory. */
    struct history *h = malloc(sizeof(*h));
    if (!h)
        return NULL;
    pthread_mutex_init(&h->lock, NULL);
    h->end = 0;
    h->watcher = NULL;
    h->watcher_opaque = NULL;
    return h;
}

void history_destroy(struct history *h)
{
    if (!h)
        return;
    pthread_mutex_destroy(&h->lock);
    free(h);
}

static uint64_t oldest(const struct history *h)
{
    return h->end > HISTORY_SIZE ? h->end - HISTORY_SIZE : 0;
}

void history_write(struct history *h, const void *data, size_t len)
{
    const uint8_t *p = data;
    pthread_mutex_lock(&h->lock);
    while (len) {
        size_t at = h->end & (HISTORY_SIZE - 1), n = MIN(len, HISTORY_SIZE - at);
        memcpy(h->data + at, p, n);
        h->end += n;
        p += n;
        len -= n;
    }
    if (h->watcher)
        h->watcher(h->watcher_opaque);
    pthread_mutex_unlock(&h->lock);
}

uint64_t history_end(struct history *h)
{
    pthread_mutex_lock(&h->lock);
    uint64_t end = h->end;
    pthread_mutex_unlock(&h->lock);
    return end;
}

size_t history_read(struct history *h, uint64_t *at, void *buf, size_t len)
{
    uint8_t *p = buf;
    size_t total = 0;
    pthread_mutex_lock(&h->lock);
    *at = MIN(MAX(*at, oldest(h)), h->end);
    while (total < len && *at < h->end) {
        size_t from = *at & (HISTORY_SIZE - 1);
        size_t n = MIN(MIN(len - total, HISTORY_SIZE - from), h->end - *at);
        memcpy(p + total, h->data + from, n);
        *at += n;
        total += n;
    }
    pthread_mutex_unlock(&h->lock);
    return total;
}

uint64_t history_lines(struct history *h, uint64_t lines)
{
    pthread_mutex_lock(&h->lock);
    uint64_t at = h->end, first = oldest(h);
    if (lines == UINT64_MAX)
        at = first;
    else if (lines && at > first && h->data[(at - 1) & (HISTORY_SIZE - 1)] == '\n')
        at--; /* it ends the last line and does not begin another */
    for (; lines && at > first; at--)
        if (h->data[(at - 1) & (HISTORY_SIZE - 1)] == '\n' && --lines == 0)
            break;
    pthread_mutex_unlock(&h->lock);
    return at;
}

void history_touch(struct history *h)
{
    history_write(h, NULL, 0);
}

void history_set_watcher(struct history *h, void (*fn)(void *opaque), void *opaque)
{
    pthread_mutex_lock(&h->lock);
    h->watcher = fn;
    h->watcher_opaque = opaque;
    pthread_mutex_unlock(&h->lock);
}
