/*
 * Copy before write for engines whose vCPUs do not look at page flags: pages are write-protected by userfaultfd, and a thread
 * calls memory_before_write() for whoever writes one. See memory.h for the promise.
 *
 * Protecting takes time that grows with RAM, so it is done while the guest runs: what is written until the moment is noted and let
 * go, and at the moment only that is protected again. The lock keeps the thread from letting go of a page in between
 * without a copy. The kernel's own writes (KVM, reads from disks) have to be stopped too, which takes privileges.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"
#include "memory/memory.h"

#define FEATURES (UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM)

struct memory_protect {
    struct memory *memory;
    int fd, wake;
    pthread_t thread;
    bool started;
    unsigned registered;        /* regions; others may be somebody else's, as in post-copy */
    pthread_mutex_t lock;       /* guards what follows; taken before memory's save_lock */
    bool saving;                /* the moment has been */
    uint64_t *let_go[MEMORY_MAX_REGIONS];
};

static int set_protected(struct memory_protect *p, const uint8_t *host, uint64_t len, bool on)
{
    struct uffdio_writeprotect w = { .range = { (uintptr_t)host, len }, .mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : 0 };

    while (ioctl(p->fd, UFFDIO_WRITEPROTECT, &w))
        if (errno != EAGAIN)
            return -errno;
    return 0;
}

/* Somebody is about to write there. */
static void let_go(struct memory_protect *p, uint64_t address)
{
    for (unsigned i = 0; i < p->memory->regions; i++) {
        const struct memory_region *r = &p->memory->region[i];
        uint64_t offset = (address - (uintptr_t)r->host) & GUEST_PAGE_MASK, page = offset >> GUEST_PAGE_SHIFT;
        int err;

        if (address - (uintptr_t)r->host >= r->size)
            continue;
        pthread_mutex_lock(&p->lock);
        if (p->saving)
            memory_before_write(p->memory, r->base + offset);
        else
            p->let_go[i][page / 64] |= 1ull << (page % 64);
        err = set_protected(p, r->host + offset, GUEST_PAGE_SIZE, false);
        pthread_mutex_unlock(&p->lock);
        /* Not there: memory_protect_destroy() has made all of them writable. */
        if (err && err != -ENOENT)
            log_error("a page of guest memory cannot be made writable: %s", strerror(-err));
        return;
    }
}

static void *fault_main(void *opaque)
{
    struct memory_protect *p = opaque;
    struct pollfd poll_fds[2] = { { .fd = p->fd, .events = POLLIN }, { .fd = p->wake, .events = POLLIN } };

    for (;;) {
        struct uffd_msg message[16];
        ssize_t n;

        if (poll(poll_fds, 2, -1) < 0 && errno != EINTR)
            return NULL;
        if (poll_fds[1].revents)
            return NULL;
        n = read(p->fd, message, sizeof(message));
        for (ssize_t i = 0; i < n / (ssize_t)sizeof(message[0]); i++)
            if (message[i].event == UFFD_EVENT_PAGEFAULT)
                let_go(p, message[i].arg.pagefault.address);
    }
}

static int protect_all(struct memory_protect *p)
{
    int err = 0;

    for (unsigned i = 0; i < p->memory->regions && !err; i++) {
        const struct memory_region *r = &p->memory->region[i];
        struct uffdio_register reg = { .range = { (uintptr_t)r->host, r->size }, .mode = UFFDIO_REGISTER_MODE_WP };

        if (ioctl(p->fd, UFFDIO_REGISTER, &reg))
            return -errno;
        p->registered = i + 1;
        if (!(reg.ioctls & 1ull << _UFFDIO_WRITEPROTECT))
            return -EOPNOTSUPP;
        /* In pieces, as who writes meanwhile waits for the whole call. */
        for (uint64_t at = 0; at < r->size && !err; at += MIB(64))
            err = set_protected(p, r->host + at, MIN(MIB(64), r->size - at), true);
    }
    return err;
}

struct memory_protect *memory_protect_create(struct memory *m)
{
    struct memory_protect *p = calloc(1, sizeof(*p));
    struct uffdio_api api = { .api = UFFD_API, .features = FEATURES };
    sigset_t all, before;
    int err = 0;

    if (!p)
        return NULL;
    p->memory = m;
    p->wake = -1;
    pthread_mutex_init(&p->lock, NULL);
    p->fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (p->fd < 0 || ioctl(p->fd, UFFDIO_API, &api))
        err = -errno;
    for (unsigned i = 0; i < m->regions && !err; i++)
        if (!(p->let_go[i] = calloc(memory_bitmap_words(&m->region[i]), sizeof(uint64_t))))
            err = -ENOMEM;
    if (!err && (p->wake = eventfd(0, EFD_CLOEXEC)) < 0)
        err = -errno;
    if (!err) {
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        err = -pthread_create(&p->thread, NULL, fault_main, p);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        p->started = !err;
    }
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
    /* Wakes whoever waits: the page is writable then, and who wrote to it before memory_save_end() was served. */
    for (unsigned i = 0; i < p->registered; i++) {
        struct uffdio_range range = { (uintptr_t)p->memory->region[i].host, p->memory->region[i].size };

        ioctl(p->fd, UFFDIO_UNREGISTER, &range);
    }
    if (p->started) {
        eventfd_write(p->wake, 1);
        pthread_join(p->thread, NULL);
    }
    if (p->wake >= 0)
        close(p->wake);
    if (p->fd >= 0)
        close(p->fd);
    for (unsigned i = 0; i < MEMORY_MAX_REGIONS; i++)
        free(p->let_go[i]);
    pthread_mutex_destroy(&p->lock);
    free(p);
}
