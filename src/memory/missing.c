/*
 * userfaultfd on guest memory; see missing.h.
 *
 * A page's bit in missing is cleared after the page is there, so the fault thread, which finds the bit cleared, can only be
 * late: then it wakes whoever waits.
 *
 * memory's missing_lock: held for reading from the look at a page's bit to the clearing of it, and for writing by who makes missing
 * pages zero (memory_clear()). So a page that was to become zero does not come from elsewhere afterwards.
 */
#include "memory/missing.h"

#include <errno.h>
#include <linux/userfaultfd.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"
#include "memory/faults.h"

struct memory_missing {
    struct memory *memory;
    memory_wanted_fn *wanted;
    void *opaque;
    struct memory_faults faults;
    uint64_t *missing[MEMORY_MAX_REGIONS];      /* bits by atomic operations */
    _Atomic uint64_t left;
};

static const uint8_t zeros[GUEST_PAGE_SIZE] __attribute__((aligned(GUEST_PAGE_SIZE)));

int memory_missing_usable(bool *kernel)
{
    int fd = memory_faults_open(UFFD_FEATURE_MISSING_SHMEM, kernel);

    if (fd < 0)
        return fd;
    close(fd);
    return 0;
}

bool memory_missing_is(const struct memory_missing *p, unsigned region, uint64_t page)
{
    return __atomic_load_n(&p->missing[region][page / 64], __ATOMIC_ACQUIRE) >> (page % 64) & 1;
}

/* Puts the page there, unless one is; wakes whoever waits for it. */
static int copy_page(struct memory_missing *p, uint8_t *to, const uint8_t *contents)
{
    struct uffdio_copy copy = { .dst = (uintptr_t)to, .src = (uintptr_t)contents, .len = GUEST_PAGE_SIZE };
    struct uffdio_range range = { .start = (uintptr_t)to, .len = GUEST_PAGE_SIZE };

    while (ioctl(p->faults.fd, UFFDIO_COPY, &copy)) {
        if (errno == EEXIST) {
            ioctl(p->faults.fd, UFFDIO_WAKE, &range);
            return 0;
        }
        if (errno != EAGAIN)
            return -errno;
        copy.copy = 0;
    }
    return 0;
}

/* The page is there, or zero from now on. missing_lock held. */
static void clear_bit(struct memory_missing *p, unsigned region, uint64_t page)
{
    uint64_t bit = 1ull << (page % 64);

    if (__atomic_fetch_and(&p->missing[region][page / 64], ~bit, __ATOMIC_ACQ_REL) & bit)
        atomic_fetch_sub(&p->left, 1);
}

int memory_missing_place(struct memory_missing *p, unsigned region, uint64_t page, const uint8_t *contents)
{
    int err = 0;

    pthread_rwlock_rdlock(&p->memory->missing_lock);
    /* What is there may have been written by the guest since. */
    if (memory_missing_is(p, region, page)) {
        err = copy_page(p, p->memory->region[region].host + (page << GUEST_PAGE_SHIFT), contents ? contents : zeros);
        if (!err)
            clear_bit(p, region, page);
    }
    pthread_rwlock_unlock(&p->memory->missing_lock);
    return err;
}

void memory_missing_drop(struct memory_missing *p, unsigned region, uint64_t offset, uint64_t len)
{
    uint64_t end = (offset + len) >> GUEST_PAGE_SHIFT;

    for (uint64_t page = offset >> GUEST_PAGE_SHIFT; page < end;) {
        if (!(page % 64) && !__atomic_load_n(&p->missing[region][page / 64], __ATOMIC_RELAXED))
            page += 64;
        else
            clear_bit(p, region, page++);
    }
}

static void touched(void *opaque, unsigned region, uint64_t page)
{
    struct memory_missing *p = opaque;
    int err;

    if (memory_missing_is(p, region, page)) {
        p->wanted(p->opaque, p, region, page);
        return;
    }
    err = copy_page(p, p->memory->region[region].host + (page << GUEST_PAGE_SHIFT), zeros);
    if (err)
        log_error("a page of guest memory cannot be made: %s", strerror(-err));
}

static int watch(struct memory_missing *p)
{
    int err = 0;

    for (unsigned i = 0; i < p->memory->regions && !err; i++)
        err = memory_faults_watch_next(&p->faults, UFFDIO_REGISTER_MODE_MISSING, _UFFDIO_COPY);
    return err;
}

static void publish(struct memory *m, struct memory_missing *p)
{
    pthread_rwlock_wrlock(&m->missing_lock);
    m->missing = p;
    pthread_rwlock_unlock(&m->missing_lock);
}

struct memory_missing *memory_missing_create(struct memory *m, uint64_t *missing[MEMORY_MAX_REGIONS], memory_wanted_fn *wanted,
                                             void *opaque, int *err)
{
    struct memory_missing *p = calloc(1, sizeof(*p));
    bool kernel = true;
    int fd;

    if (!p) {
        memory_bitmaps_free(missing);
        *err = -ENOMEM;
        return NULL;
    }
    p->memory = m;
    p->wanted = wanted;
    p->opaque = opaque;
    memcpy(p->missing, missing, sizeof(p->missing));
    memset(missing, 0, sizeof(p->missing));
    p->left = memory_bitmaps_count(m, p->missing);
    fd = memory_faults_open(UFFD_FEATURE_MISSING_SHMEM, &kernel);
    atomic_store(&m->touch, !kernel);
    *err = memory_faults_start(&p->faults, m, fd, touched, p);
    if (!*err)
        *err = watch(p);
    if (!*err) {
        publish(m, p);
        return p;
    }
    memory_missing_destroy(p);
    return NULL;
}

void memory_missing_destroy(struct memory_missing *p)
{
    if (!p)
        return;
    memory_faults_stop(&p->faults);
    atomic_store(&p->memory->touch, false);
    publish(p->memory, NULL);
    memory_bitmaps_free(p->missing);
    free(p);
}

uint64_t memory_missing_count(const struct memory_missing *p) { return atomic_load(&p->left); }
uint64_t *const *memory_missing_bitmaps(const struct memory_missing *p) { return p->missing; }

bool memory_missing_any(struct memory *m)
{
    bool any;

    pthread_rwlock_rdlock(&m->missing_lock);
    any = m->missing;
    pthread_rwlock_unlock(&m->missing_lock);
    return any;
}

uint64_t memory_missing_in(struct memory *m)
{
    uint64_t count;

    pthread_rwlock_rdlock(&m->missing_lock);
    count = m->missing ? memory_missing_count(m->missing) : 0;
    pthread_rwlock_unlock(&m->missing_lock);
    return count;
}
