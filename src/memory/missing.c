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
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"

struct memory_missing {
    struct memory *memory;
    memory_wanted_fn *wanted;
    void *opaque;
    int fd, wake;
    pthread_t thread;
    bool started;
    unsigned registered;                        /* regions */
    uint64_t *missing[MEMORY_MAX_REGIONS];      /* bits by atomic operations */
    _Atomic uint64_t left;
};

static const uint8_t zeros[GUEST_PAGE_SIZE] __attribute__((aligned(GUEST_PAGE_SIZE)));

static int open_uffd(bool *kernel)
{
    struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_MISSING_SHMEM };
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK), err;

    *kernel = fd >= 0;
    if (fd < 0 && errno == EPERM)
        fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    if (fd < 0)
        return -errno;
    if (ioctl(fd, UFFDIO_API, &api)) {
        err = -errno;
        close(fd);
        return err;
    }
    return fd;
}

int memory_missing_usable(bool *kernel)
{
    int fd = open_uffd(kernel);

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

    while (ioctl(p->fd, UFFDIO_COPY, &copy)) {
        if (errno == EEXIST) {
            ioctl(p->fd, UFFDIO_WAKE, &range);
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

static void touched(struct memory_missing *p, uint64_t address)
{
    for (unsigned i = 0; i < p->memory->regions; i++) {
        const struct memory_region *r = &p->memory->region[i];
        uint64_t offset = address - (uintptr_t)r->host, page = offset >> GUEST_PAGE_SHIFT;
        int err;

        if (offset >= r->size)
            continue;
        if (memory_missing_is(p, i, page)) {
            p->wanted(p->opaque, p, i, page);
            return;
        }
        err = copy_page(p, r->host + (page << GUEST_PAGE_SHIFT), zeros);
        if (err)
            log_error("a page of guest memory cannot be made: %s", strerror(-err));
        return;
    }
}

static void *fault_main(void *opaque)
{
    struct memory_missing *p = opaque;
    struct pollfd poll_fds[2] = { { .fd = p->fd, .events = POLLIN }, { .fd = p->wake, .events = POLLIN } };
    struct uffd_msg message[16];

    for (;;) {
        ssize_t n;

        if (poll(poll_fds, 2, -1) < 0 && errno != EINTR)
            return NULL;
        if (poll_fds[1].revents)
            return NULL;
        n = read(p->fd, message, sizeof(message));
        for (ssize_t i = 0; i < n / (ssize_t)sizeof(message[0]); i++)
            if (message[i].event == UFFD_EVENT_PAGEFAULT)
                touched(p, message[i].arg.pagefault.address);
    }
}

static int watch(struct memory_missing *p)
{
    for (unsigned i = 0; i < p->memory->regions; i++) {
        struct uffdio_register reg = { .range = { (uintptr_t)p->memory->region[i].host, p->memory->region[i].size },
                                       .mode = UFFDIO_REGISTER_MODE_MISSING };

        if (ioctl(p->fd, UFFDIO_REGISTER, &reg))
            return -errno;
        p->registered = i + 1;
    }
    return 0;
}

static int start(struct memory_missing *p)
{
    sigset_t all, before;
    int err;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    err = -pthread_create(&p->thread, NULL, fault_main, p);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    p->started = !err;
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
    p->fd = open_uffd(&kernel);
    p->wake = eventfd(0, EFD_CLOEXEC);
    *err = p->fd < 0 ? p->fd : p->wake < 0 ? -errno : 0;
    atomic_store(&m->touch, !kernel);
    if (!*err)
        *err = watch(p);
    if (!*err)
        *err = start(p);
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
    if (p->started) {
        eventfd_write(p->wake, 1);
        pthread_join(p->thread, NULL);
    }
    /* Wakes who touched a page of zeros and was not told so. */
    for (unsigned i = 0; i < p->registered; i++) {
        struct uffdio_range range = { (uintptr_t)p->memory->region[i].host, p->memory->region[i].size };

        ioctl(p->fd, UFFDIO_UNREGISTER, &range);
    }
    if (p->fd >= 0)
        close(p->fd);
    if (p->wake >= 0)
        close(p->wake);
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
