/*
 * Dirty logging: see memory.h for the promise.
 *
 * Why nothing is lost: a page's flag is cleared first, then whoever may write it unseen is made to forget that
 * (rearm), and only then does the caller read the page. A write before the forgetting is in what the caller reads; a
 * write after it takes the slow path and sets the flag again. Device writes set the flag after the bytes, with a full fence
 * between, against this file's clearing and the caller's reading: one of the two sees the other.
 */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "base/util.h"
#include "memory/memory.h"

int memory_bitmaps_alloc(const struct memory *m, uint64_t *bitmap[MEMORY_MAX_REGIONS])
{
    memset(bitmap, 0, MEMORY_MAX_REGIONS * sizeof(*bitmap));
    for (unsigned i = 0; i < m->regions; i++) {
        bitmap[i] = calloc(memory_bitmap_words(&m->region[i]), 8);
        if (!bitmap[i]) {
            memory_bitmaps_free(bitmap);
            return -ENOMEM;
        }
    }
    return 0;
}

void memory_bitmaps_free(uint64_t *bitmap[MEMORY_MAX_REGIONS])
{
    for (unsigned i = 0; i < MEMORY_MAX_REGIONS; i++) {
        free(bitmap[i]);
        bitmap[i] = NULL;
    }
}

uint64_t memory_bitmaps_count(const struct memory *m, uint64_t *const bitmap[])
{
    uint64_t n = 0;

    for (unsigned i = 0; i < m->regions; i++)
        for (size_t w = 0; w < memory_bitmap_words(&m->region[i]); w++)
            n += (uint64_t)__builtin_popcountll(__atomic_load_n(&bitmap[i][w], __ATOMIC_RELAXED));
    return n;
}

void memory_dirty_attach(struct memory *m, const struct memory_dirty_hooks *hooks, void *opaque)
{
    pthread_mutex_lock(&m->dirty_lock);
    for (unsigned i = 0; i < MEMORY_DIRTY_HOOKS; i++)
        if (!m->dirty_hooks[i].hooks) {
            m->dirty_hooks[i] = (struct memory_dirty_user){ .hooks = hooks, .opaque = opaque };
            if (atomic_load(&m->dirty_logging) && hooks->start && hooks->start(opaque))
                log_error("an engine cannot log the guest's writes: a running migration or snapshot may be incomplete");
            pthread_mutex_unlock(&m->dirty_lock);
            return;
        }
    pthread_mutex_unlock(&m->dirty_lock);
    assert(!"more engines than MEMORY_DIRTY_HOOKS");
}

void memory_dirty_detach(struct memory *m, void *opaque)
{
    pthread_mutex_lock(&m->dirty_lock);
    for (unsigned i = 0; i < MEMORY_DIRTY_HOOKS; i++)
        if (m->dirty_hooks[i].opaque == opaque)
            m->dirty_hooks[i] = (struct memory_dirty_user){ 0 };
    pthread_mutex_unlock(&m->dirty_lock);
}

static void clear_flags(struct memory *m)
{
    for (unsigned i = 0; i < m->regions; i++)
        for (uint64_t page = 0; page < m->region[i].size >> GUEST_PAGE_SHIFT; page++)
            if (atomic_load_explicit(&m->region[i].flags[page], memory_order_relaxed) & PAGE_DIRTY)
                atomic_fetch_and(&m->region[i].flags[page], (uint8_t)~PAGE_DIRTY);
}

void memory_rearm(struct memory *m)
{
    for (unsigned i = 0; i < MEMORY_DIRTY_HOOKS; i++)
        if (m->dirty_hooks[i].hooks && m->dirty_hooks[i].hooks->rearm)
            m->dirty_hooks[i].hooks->rearm(m->dirty_hooks[i].opaque);
    atomic_thread_fence(memory_order_seq_cst);
}

/* Ends the logging of the first n users. Lock held. */
static void stop_users(struct memory *m, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        if (m->dirty_hooks[i].hooks && m->dirty_hooks[i].hooks->stop)
            m->dirty_hooks[i].hooks->stop(m->dirty_hooks[i].opaque);
    atomic_store(&m->dirty_logging, false);
}

int memory_dirty_start(struct memory *m)
{
    int err = 0;

    pthread_mutex_lock(&m->dirty_lock);
    if (atomic_load(&m->dirty_logging)) {
        err = -EBUSY;
        goto out;
    }
    clear_flags(m);
    atomic_store(&m->dirty_logging, true);
    for (unsigned i = 0; i < MEMORY_DIRTY_HOOKS && !err; i++)
        if (m->dirty_hooks[i].hooks && m->dirty_hooks[i].hooks->start) {
            err = m->dirty_hooks[i].hooks->start(m->dirty_hooks[i].opaque);
            if (err)
                stop_users(m, i);
        }
    if (!err)
        memory_rearm(m);
out:
    pthread_mutex_unlock(&m->dirty_lock);
    return err;
}

void memory_dirty_stop(struct memory *m)
{
    pthread_mutex_lock(&m->dirty_lock);
    if (atomic_load(&m->dirty_logging))
        stop_users(m, MEMORY_DIRTY_HOOKS);
    pthread_mutex_unlock(&m->dirty_lock);
}

/* Moves the flags of one region into its bitmap. */
static void fetch_flags(struct memory_region *r, uint64_t *bitmap)
{
    uint64_t pages = r->size >> GUEST_PAGE_SHIFT, page = 0;
    const uint64_t dirty = PAGE_DIRTY * 0x0101010101010101ull;

    while (page < pages) {
        /* Eight flags at a time: most pages are clean. */
        if (!(page & 7) && pages - page >= 8 &&
            !(__atomic_load_n((const uint64_t *)(const void *)&r->flags[page], __ATOMIC_RELAXED) & dirty)) {
            page += 8;
            continue;
        }
        if (atomic_load_explicit(&r->flags[page], memory_order_relaxed) & PAGE_DIRTY) {
            atomic_fetch_and(&r->flags[page], (uint8_t)~PAGE_DIRTY);
            bitmap[page / 64] |= 1ull << (page % 64);
        }
        page++;
    }
}

int memory_dirty_fetch(struct memory *m, uint64_t *const bitmap[])
{
    int err = 0;

    pthread_mutex_lock(&m->dirty_lock);
    if (!atomic_load(&m->dirty_logging))
        err = -EINVAL;
    for (unsigned i = 0; i < m->regions && !err; i++) {
        fetch_flags(&m->region[i], bitmap[i]);
        for (unsigned k = 0; k < MEMORY_DIRTY_HOOKS && !err; k++)
            if (m->dirty_hooks[k].hooks && m->dirty_hooks[k].hooks->collect)
                err = m->dirty_hooks[k].hooks->collect(m->dirty_hooks[k].opaque, i, bitmap[i]);
    }
    if (!err)
        memory_rearm(m);
    pthread_mutex_unlock(&m->dirty_lock);
    return err;
}
