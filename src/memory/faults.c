/* See faults.h. */
#include "memory/faults.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/thread.h"

int memory_faults_open(uint64_t features, bool *kernel)
{
    struct uffdio_api api = { .api = UFFD_API, .features = features };
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK), err;

    if (kernel) {
        *kernel = fd >= 0;
        if (fd < 0 && errno == EPERM)
            fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    }
    if (fd < 0)
        return -errno;
    if (ioctl(fd, UFFDIO_API, &api)) {
        err = -errno;
        close(fd);
        return err;
    }
    return fd;
}

static void touched(struct memory_faults *f, uint64_t address)
{
    for (unsigned i = 0; i < f->memory->regions; i++) {
        const struct memory_region *r = &f->memory->region[i];
        uint64_t offset = address - (uintptr_t)r->host;

        if (offset < r->size) {
            f->fault(f->opaque, i, offset >> GUEST_PAGE_SHIFT);
            return;
        }
    }
}

static void *fault_main(void *opaque)
{
    struct memory_faults *f = opaque;
    struct pollfd poll_fds[2] = { { .fd = f->fd, .events = POLLIN }, { .fd = f->wake, .events = POLLIN } };
    struct uffd_msg message[16];

    for (;;) {
        ssize_t n;

        if (poll(poll_fds, 2, -1) < 0 && errno != EINTR)
            return NULL;
        if (poll_fds[1].revents)
            return NULL;
        n = read(f->fd, message, sizeof(message));
        for (ssize_t i = 0; i < n / (ssize_t)sizeof(message[0]); i++)
            if (message[i].event == UFFD_EVENT_PAGEFAULT)
                touched(f, message[i].arg.pagefault.address);
    }
}

int memory_faults_start(struct memory_faults *f, struct memory *m, int fd, memory_fault_fn *fault, void *opaque)
{
    int err;

    *f = (struct memory_faults){ .fd = fd, .memory = m, .fault = fault, .opaque = opaque, .wake = eventfd(0, EFD_CLOEXEC) };
    err = fd < 0 ? fd : f->wake < 0 ? -errno : 0;
    if (!err)
        err = thread_start(&f->thread, 0, fault_main, f);
    f->started = !err;
    return err;
}

int memory_faults_watch_next(struct memory_faults *f, uint64_t mode, unsigned need)
{
    const struct memory_region *r = &f->memory->region[f->registered];
    struct uffdio_register reg = { .range = { (uintptr_t)r->host, r->size }, .mode = mode };

    if (ioctl(f->fd, UFFDIO_REGISTER, &reg))
        return -errno;
    f->registered++;
    return reg.ioctls >> need & 1 ? 0 : -EOPNOTSUPP;
}

void memory_faults_stop(struct memory_faults *f)
{
    if (f->started) {
        eventfd_write(f->wake, 1);
        pthread_join(f->thread, NULL);
    }
    /* Wakes who touched a page and was not heard any more. */
    for (unsigned i = 0; i < f->registered; i++) {
        struct uffdio_range range = { (uintptr_t)f->memory->region[i].host, f->memory->region[i].size };

        ioctl(f->fd, UFFDIO_UNREGISTER, &range);
    }
    if (f->wake >= 0)
        close(f->wake);
    if (f->fd >= 0)
        close(f->fd);
}
