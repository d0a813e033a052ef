/*
 * Asking for missing pages; see postcopy.h.
 *
 * Requests are remembered in a bitmap, so that each page is asked for once per connection.
 */
#include "migrate/postcopy.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"
#include "migrate/frame.h"

struct postcopy {
    struct memory *memory;
    struct memory_missing *missing;
    _Atomic uint64_t requests;
    pthread_mutex_t lock;                       /* guards what follows */
    uint64_t *requested[MEMORY_MAX_REGIONS];
    struct channel *urgent;
    bool given_up;
};

bool postcopy_usable(bool kernel, char why[CHANNEL_ERROR_MAX])
{
    bool has_kernel;
    int err = memory_missing_usable(&has_kernel);

    if (!err && (has_kernel || !kernel))
        return true;
    snprintf(why, CHANNEL_ERROR_MAX, "the target may not use userfaultfd (%s): run it with CAP_SYS_PTRACE or set vm.unprivileged_userfaultfd=1",
             err ? strerror(-err) : "not for faults of the kernel, which its engine needs");
    return false;
}

/* Lock held. */
static void send_request(struct postcopy *p, unsigned region, uint64_t page)
{
    uint8_t request[16];

    store_le64(request, region);
    store_le64(request + 8, page);
    /* A connection that fails is noticed by whoever receives from it; the request stays noted. */
    if (p->urgent && frame_send(p->urgent, FRAME_REQUEST, 0, request, sizeof(request)))
        p->urgent = NULL;
}

static void wanted(void *opaque, struct memory_missing *missing, unsigned region, uint64_t page)
{
    struct postcopy *p = opaque;

    pthread_mutex_lock(&p->lock);
    if (p->given_up) {
        memory_missing_place(missing, region, page, NULL);
    } else if (!(p->requested[region][page / 64] >> (page % 64) & 1)) {
        p->requested[region][page / 64] |= 1ull << (page % 64);
        atomic_fetch_add(&p->requests, 1);
        send_request(p, region, page);
    }
    pthread_mutex_unlock(&p->lock);
}

/* Gives the missing pages' contents back to the host, run by run. */
static int empty_missing(const struct memory *m, uint64_t *const missing[])
{
    for (unsigned i = 0; i < m->regions; i++) {
        const struct memory_region *r = &m->region[i];
        uint64_t pages = r->size >> GUEST_PAGE_SHIFT;

        for (uint64_t page = 0; page < pages;) {
            uint64_t end = page;

            if (!(page % 64) && !missing[i][page / 64]) {
                page += 64;
                continue;
            }
            while (end < pages && missing[i][end / 64] >> (end % 64) & 1)
                end++;
            if (end > page &&
                fallocate(r->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(page << GUEST_PAGE_SHIFT),
                          (off_t)((end - page) << GUEST_PAGE_SHIFT)))
                return -errno;
            page = end > page ? end : page + 1;
        }
    }
    return 0;
}

struct postcopy *postcopy_create(struct memory *m, uint64_t *missing[MEMORY_MAX_REGIONS], char error[CHANNEL_ERROR_MAX])
{
    struct postcopy *p = calloc(1, sizeof(*p));
    int err = p ? 0 : -ENOMEM;

    if (!err) {
        p->memory = m;
        pthread_mutex_init(&p->lock, NULL);
        err = memory_bitmaps_alloc(m, p->requested);
    }
    if (!err)
        err = empty_missing(m, missing);
    if (!err)
        p->missing = memory_missing_create(m, missing, wanted, p, &err);
    if (!err)
        return p;
    snprintf(error, CHANNEL_ERROR_MAX, "post-copy is not possible here: %s", strerror(-err));
    postcopy_destroy(p);
    return NULL;
}

void postcopy_destroy(struct postcopy *p)
{
    if (!p)
        return;
    memory_missing_destroy(p->missing);
    memory_bitmaps_free(p->requested);
    pthread_mutex_destroy(&p->lock);
    free(p);
}

/* What was asked for and has not come. Lock held. */
static void each_pending(struct postcopy *p, void (*fn)(struct postcopy *p, unsigned region, uint64_t page))
{
    uint64_t *const *missing = memory_missing_bitmaps(p->missing);

    for (unsigned i = 0; i < p->memory->regions; i++)
        for (size_t w = 0; w < memory_bitmap_words(&p->memory->region[i]); w++) {
            uint64_t bits = p->requested[i][w] & __atomic_load_n(&missing[i][w], __ATOMIC_ACQUIRE);

            for (; bits; bits &= bits - 1)
                fn(p, i, w * 64 + (uint64_t)__builtin_ctzll(bits));
        }
}

void postcopy_connect(struct postcopy *p, struct channel *urgent)
{
    pthread_mutex_lock(&p->lock);
    p->urgent = urgent;
    if (urgent)
        each_pending(p, send_request);
    pthread_mutex_unlock(&p->lock);
}

static void place_zeros(struct postcopy *p, unsigned region, uint64_t page) { memory_missing_place(p->missing, region, page, NULL); }

void postcopy_give_up(struct postcopy *p)
{
    pthread_mutex_lock(&p->lock);
    p->given_up = true;
    each_pending(p, place_zeros);
    pthread_mutex_unlock(&p->lock);
}

int postcopy_place(struct postcopy *p, unsigned region, uint64_t page, const uint8_t *contents)
{
    return memory_missing_place(p->missing, region, page, contents);
}

uint64_t postcopy_missing(const struct postcopy *p) { return memory_missing_count(p->missing); }
uint64_t postcopy_requested(const struct postcopy *p) { return atomic_load(&p->requests); }
uint64_t *const *postcopy_bitmaps(const struct postcopy *p) { return memory_missing_bitmaps(p->missing); }
