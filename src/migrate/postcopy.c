/*
 * userfaultfd on guest memory; see postcopy.h.
 *
 * A page's bit in missing is cleared after the page is there, so the fault thread, which finds the bit cleared, can only be
 * late: then it wakes whoever waits. Requests are remembered in a bitmap of their own, so that each page is asked for once
 * per connection.
 */
#include "migrate/postcopy.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"
#include "migrate/frame.h"
#include "migrate/protocol.h"

struct postcopy {
    struct memory *memory;
    int fd, wake[2];
    pthread_t thread;
    bool started;
    uint64_t *missing[MEMORY_MAX_REGIONS];      /* bits by atomic operations */
    _Atomic uint64_t left, requests;
    pthread_mutex_t lock;                       /* guards what follows */
    uint64_t *requested[MEMORY_MAX_REGIONS];
    struct channel *urgent;
    bool given_up;
};

static const uint8_t zeros[GUEST_PAGE_SIZE] __attribute__((aligned(GUEST_PAGE_SIZE)));

/* *kernel: whether the kernel's faults are stopped, too. */
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

bool postcopy_usable(bool kernel, char why[CHANNEL_ERROR_MAX])
{
    bool has_kernel;
    int fd = open_uffd(&has_kernel);

    if (fd >= 0)
        close(fd);
    if (fd >= 0 && (has_kernel || !kernel))
        return true;
    snprintf(why, CHANNEL_ERROR_MAX, "the target may not use userfaultfd (%s): run it with CAP_SYS_PTRACE or set vm.unprivileged_userfaultfd=1",
             fd < 0 ? strerror(-fd) : "not for faults of the kernel, which its engine needs");
    return false;
}

static bool is_missing(const struct postcopy *p, unsigned region, uint64_t page)
{
    return __atomic_load_n(&p->missing[region][page / 64], __ATOMIC_ACQUIRE) >> (page % 64) & 1;
}

/* Puts the page there, unless one is; wakes whoever waits for it. */
static int copy_page(struct postcopy *p, uint8_t *to, const uint8_t *contents)
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

static void touched(struct postcopy *p, uint64_t address)
{
    for (unsigned i = 0; i < p->memory->regions; i++) {
        const struct memory_region *r = &p->memory->region[i];
        uint64_t offset = address - (uintptr_t)r->host, page = offset >> GUEST_PAGE_SHIFT;

        if (offset >= r->size)
            continue;
        if (!is_missing(p, i, page)) {
            int err = copy_page(p, r->host + (page << GUEST_PAGE_SHIFT), zeros);

            if (err)
                log_error("a page of guest memory cannot be made: %s", strerror(-err));
            return;
        }
        pthread_mutex_lock(&p->lock);
        if (p->given_up) {
            copy_page(p, r->host + (page << GUEST_PAGE_SHIFT), zeros);
        } else if (!(p->requested[i][page / 64] >> (page % 64) & 1)) {
            p->requested[i][page / 64] |= 1ull << (page % 64);
            atomic_fetch_add(&p->requests, 1);
            send_request(p, i, page);
        }
        pthread_mutex_unlock(&p->lock);
        return;
    }
}

static void *fault_main(void *opaque)
{
    struct postcopy *p = opaque;
    struct pollfd poll_fd[2] = { { .fd = p->fd, .events = POLLIN }, { .fd = p->wake[0], .events = POLLIN } };
    struct uffd_msg msg[16];

    for (;;) {
        ssize_t n;

        if (poll(poll_fd, 2, -1) < 0 && errno != EINTR)
            return NULL;
        if (poll_fd[1].revents)
            return NULL;
        n = read(p->fd, msg, sizeof(msg));
        for (ssize_t i = 0; i < n / (ssize_t)sizeof(msg[0]); i++)
            if (msg[i].event == UFFD_EVENT_PAGEFAULT)
                touched(p, msg[i].arg.pagefault.address);
    }
}

/* Gives the missing pages' contents back to the host, run by run. */
static int empty_missing(struct postcopy *p)
{
    for (unsigned i = 0; i < p->memory->regions; i++) {
        const struct memory_region *r = &p->memory->region[i];
        uint64_t pages = r->size >> GUEST_PAGE_SHIFT;

        for (uint64_t page = 0; page < pages;) {
            uint64_t end = page;

            if (!(page % 64) && !p->missing[i][page / 64]) {
                page += 64;
                continue;
            }
            while (end < pages && is_missing(p, i, end))
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

static int watch(struct postcopy *p)
{
    for (unsigned i = 0; i < p->memory->regions; i++) {
        struct uffdio_register reg = { .range = { .start = (uintptr_t)p->memory->region[i].host, .len = p->memory->region[i].size },
                                       .mode = UFFDIO_REGISTER_MODE_MISSING };

        if (ioctl(p->fd, UFFDIO_REGISTER, &reg))
            return -errno;
    }
    return 0;
}

struct postcopy *postcopy_create(struct memory *m, uint64_t *missing[MEMORY_MAX_REGIONS], char error[CHANNEL_ERROR_MAX])
{
    struct postcopy *p = calloc(1, sizeof(*p));
    int err = p ? 0 : -ENOMEM;
    bool kernel = true;

    if (err)
        goto out;
    p->memory = m;
    p->fd = p->wake[0] = p->wake[1] = -1;
    pthread_mutex_init(&p->lock, NULL);
    for (unsigned i = 0; i < MEMORY_MAX_REGIONS; i++) {
        p->missing[i] = missing[i];
        missing[i] = NULL;
    }
    p->left = bitmaps_count(m, p->missing);
    err = bitmaps_alloc(m, p->requested);
    if (!err && pipe2(p->wake, O_CLOEXEC))
        err = -errno;
    if (!err) {
        p->fd = open_uffd(&kernel);
        err = MIN(p->fd, 0);
    }
    if (!err)
        err = empty_missing(p);
    atomic_store(&m->touch, !kernel);
    if (!err)
        err = watch(p);
    if (!err)
        err = -pthread_create(&p->thread, NULL, fault_main, p);
    if (!err) {
        p->started = true;
        return p;
    }
out:
    snprintf(error, CHANNEL_ERROR_MAX, "post-copy is not possible here: %s", strerror(-err));
    postcopy_destroy(p);
    return NULL;
}

void postcopy_destroy(struct postcopy *p)
{
    if (!p)
        return;
    if (p->started) {
        if (write(p->wake[1], "", 1) == 1)
            pthread_join(p->thread, NULL);
        for (unsigned i = 0; i < p->memory->regions; i++) {
            struct uffdio_range range = { .start = (uintptr_t)p->memory->region[i].host, .len = p->memory->region[i].size };

            ioctl(p->fd, UFFDIO_UNREGISTER, &range);
        }
    }
    if (p->fd >= 0)
        close(p->fd);
    for (unsigned i = 0; i < 2; i++)
        if (p->wake[i] >= 0)
            close(p->wake[i]);
    if (p->memory)
        atomic_store(&p->memory->touch, false);
    bitmaps_free(p->missing);
    bitmaps_free(p->requested);
    pthread_mutex_destroy(&p->lock);
    free(p);
}

void postcopy_connect(struct postcopy *p, struct channel *urgent)
{
    pthread_mutex_lock(&p->lock);
    p->urgent = urgent;
    for (unsigned i = 0; i < p->memory->regions && p->urgent; i++)
        for (size_t w = 0; w < memory_bitmap_words(&p->memory->region[i]); w++) {
            uint64_t bits = p->requested[i][w] & __atomic_load_n(&p->missing[i][w], __ATOMIC_ACQUIRE);

            for (; bits && p->urgent; bits &= bits - 1)
                send_request(p, i, w * 64 + (uint64_t)__builtin_ctzll(bits));
        }
    pthread_mutex_unlock(&p->lock);
}

void postcopy_give_up(struct postcopy *p)
{
    pthread_mutex_lock(&p->lock);
    p->given_up = true;
    for (unsigned i = 0; i < p->memory->regions; i++)
        for (size_t w = 0; w < memory_bitmap_words(&p->memory->region[i]); w++) {
            uint64_t bits = p->requested[i][w] & __atomic_load_n(&p->missing[i][w], __ATOMIC_ACQUIRE);

            for (; bits; bits &= bits - 1)
                copy_page(p, p->memory->region[i].host + ((w * 64 + (uint64_t)__builtin_ctzll(bits)) << GUEST_PAGE_SHIFT), zeros);
        }
    pthread_mutex_unlock(&p->lock);
}

int postcopy_place(struct postcopy *p, unsigned region, uint64_t page, const uint8_t *contents)
{
    uint64_t bit = 1ull << (page % 64);
    int err;

    /* What is there may have been written by the guest since. */
    if (!is_missing(p, region, page))
        return 0;
    err = copy_page(p, p->memory->region[region].host + (page << GUEST_PAGE_SHIFT), contents ? contents : zeros);
    if (err)
        return err;
    if (__atomic_fetch_and(&p->missing[region][page / 64], ~bit, __ATOMIC_ACQ_REL) & bit)
        atomic_fetch_sub(&p->left, 1);
    return 0;
}

uint64_t postcopy_missing(const struct postcopy *p) { return atomic_load(&p->left); }
uint64_t postcopy_requested(const struct postcopy *p) { return atomic_load(&p->requests); }
uint64_t *const *postcopy_bitmaps(const struct postcopy *p) { return p->missing; }
