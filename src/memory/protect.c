/*
 * Copy before write for engines whose vCPUs do not look at page flags: pages are write-protected by userfaultfd, and a thread
 * calls memory_before_write() for whoever writes one. See memory.h for the promise.
 *
 * Protecting takes time that grows with RAM, so it is done while the guest runs: what is written until the moment is noted and let
 * go, and at the moment only that is protected again. The lock keeps the thread from letting go of a page in between
 * without a copy. The kernel's own writes (KVM, reads from disks) have to be stopped too, which takes privileges.
 */
#include <errno.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#include "base/log.h"
#include "base/util.h"
#include "memory/faults.h"

#define FEATURES (UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM)

struct memory_protect {
    struct memory *memory;
    struct memory_faults faults;
    pthread_mutex_t lock;       /* guards what follows; taken before memory's save_lock */
    bool saving;                /* the moment has been */
    uint64_t *let_go[MEMORY_MAX_REGIONS];
};

static int set_protected(struct memory_protect *p, const uint8_t *host, uint64_t len, bool on)
{
    struct uffdio_writeprotect w = { .range = { (uintptr_t)host, len }, .mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : 0 };

    while (ioctl(p->faults.fd, UFFDIO_WRITEPROTECT, &w))
        if (errno != EAGAIN)
            return -errno;
    return 0;
}

/* Somebody is about to write there. */
static void let_go(void *opaque, unsigned region, uint64_t page)
{
    struct memory_protect *p = opaque;
    const struct memory_region *r = &p->memory->region[region];
    uint64_t offset = page << GUEST_PAGE_SHIFT;
    int err;

    pthread_mutex_lock(&p->lock);
    if (p->saving)
        memory_before_write(p->memory, r->base + offset);
    else
        p->let_go[region][page / 64] |= 1ull << (page % 64);
    err = set_protected(p, r->host + offset, GUEST_PAGE_SIZE, false);
    pthread_mutex_unlock(&p->lock);
    if (err)
        log_error("a page of guest memory cannot be made writable: %s", strerror(-err));
}

static int protect_all(struct memory_protect *p)
{
    int err = 0;

    for (unsigned i = 0; i < p->memory->regions && !err; i++) {
        const struct memory_region *r = &p->memory->region[i];

        err = memory_faults_watch_next(&p->faults, UFFDIO_REGISTER_MODE_WP, _UFFDIO_WRITEPROTECT);
        /* In pieces, as who writes meanwhile waits for the whole call. */
        for (uint64_t at = 0; at < r->size && !err; at += MIB(64))
            err = set_protected(p, r->host + at, MIN(MIB(64), r->size - at), true);
    }
    return err;
}

struct memory_protect *memory_protect_create(struct memory *m)
{
    struct memory_protect *p = calloc(1, sizeof(*p));
    int err;

    if (!p)
        return NULL;
    p->memory = m;
    pthread_mutex_init(&p->lock, NULL);
    /* The bits are there before anybody writes. */
    err = memory_bitmaps_alloc(m, p->let_go);
    err = memory_faults_start(&p->faults, m, err ? err : memory_faults_open(FEATURES, NULL), let_go, p);
    if (!err)
        err = protect_all(p);
    if (err) {
        log_debug("memory cannot be write-protected here: %s", strerror(-err));
        memory_protect_destroy(p);
        return NULL;
    }
    return p;
}

int memory_protect_moment(struct memory_protect *p)
{
    int err = 0;

    pthread_mutex_lock(&p->lock);
    p->saving = true;
    for (unsigned i = 0; i < p->memory->regions; i++) {
        const struct memory_region *r = &p->memory->region[i];
        uint64_t pages = r->size >> GUEST_PAGE_SHIFT;

        for (uint64_t page = 0, n; page < pages && !err; page += n) {
            for (n = 0; page + n < pages && p->let_go[i][(page + n) / 64] >> ((page + n) % 64) & 1;)
                n++;
            if (n)
                err = set_protected(p, r->host + (page << GUEST_PAGE_SHIFT), n << GUEST_PAGE_SHIFT, true);
            else
                n = p->let_go[i][page / 64] ? 1 : 64 - page % 64;
        }
    }
    pthread_mutex_unlock(&p->lock);
    if (err)
        log_error("guest memory cannot be write-protected: %s", strerror(-err));
    return err;
}

void memory_protect_destroy(struct memory_protect *p)
{
    if (!p)
        return;
    /* What anybody waits to write is writable then; who wrote before memory_save_end() was served. */
    memory_faults_stop(&p->faults);
    memory_bitmaps_free(p->let_go);
    pthread_mutex_destroy(&p->lock);
    free(p);
}
