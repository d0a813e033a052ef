/*
 * Disk I/O by io_uring; completions arrive through an eventfd in the event loop.
 *
 * Machine lock held everywhere. The kernel ties requests to the thread that hands them over, and
 * drops them when it ends; so that is the event loop's thread, or whoever drains.
 */
#include <errno.h>
#include <liburing.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "backend/block/block_impl.h"
#include "base/log.h"
#include "base/util.h"

struct uring {
    struct io_uring ring;
    int event_fd;
    struct loop_fd *watch;
    unsigned pending;   /* in the submission queue, not handed over */
    unsigned in_flight; /* pending ones too */
};

static void uring_submit(struct block *b)
{
    struct uring *u = b->engine_data;
    while (u->pending) {
        int r = io_uring_submit(&u->ring);
        if (r > 0) {
            u->pending -= MIN((unsigned)r, u->pending);
        } else if (r != -EINTR) {
            /* The kernel is short of memory: try again in the next round. */
            loop_schedule(b->loop, &b->start_call);
            return;
        }
    }
}

static void uring_start(struct block *b, struct block_io *io)
{
    struct uring *u = b->engine_data;
    if (io->part == PART_DISCARD || io->part == PART_ZERO || io->fd < 0) {
        block_workers_add(b, io);
        return;
    }
    /* There are as many entries as requests can be under way, so there is one. */
    struct io_uring_sqe *sqe = io_uring_get_sqe(&u->ring);
    switch (io->part) {
    case PART_READ:
        io_uring_prep_readv(sqe, io->fd, io->iov, io->iovcnt, io->at);
        break;
    case PART_WRITE:
        io_uring_prep_writev(sqe, io->fd, io->iov, io->iovcnt, io->at);
        break;
    default:
        io_uring_prep_fsync(sqe, io->fd, IORING_FSYNC_DATASYNC);
        break;
    }
    io_uring_sqe_set_data(sqe, io);
    u->pending++;
    u->in_flight++;
}

/* Reports what is complete; how many that were. A done() in between may drain, so may get here
 * again. */
static unsigned reap(struct block *b)
{
    struct uring *u = b->engine_data;
    unsigned count = 0;
    struct io_uring_cqe *cqe;
    while (io_uring_peek_cqe(&u->ring, &cqe) == 0) {
        struct block_io *io = io_uring_cqe_get_data(cqe);
        io->result = cqe->res;
        io_uring_cqe_seen(&u->ring, cqe);
        u->in_flight--;
        count++;
        block_part_done(b, io);
    }
    uring_submit(b); /* next parts of requests */
    return count;
}

static void complete_ready(void *opaque, int fd, short revents)
{
    uint64_t n;
    if (read(fd, &n, sizeof(n)) < 0 && errno != EAGAIN && errno != EINTR)
        log_error("disk: %s", strerror(errno));
    reap(opaque);
}

static void uring_wait(struct block *b)
{
    struct uring *u = b->engine_data;
    uring_submit(b);
    while (!reap(b)) {
        if (block_workers_busy(b) && !u->in_flight) {
            block_workers_reap(b, true);
            return;
        }
        struct pollfd p = {.fd = u->event_fd, .events = POLLIN};
        poll(&p, 1, u->pending ? 10 : -1);
        uint64_t n;
        if (read(u->event_fd, &n, sizeof(n)) < 0 && errno != EAGAIN && errno != EINTR)
            log_error("disk %s: %s", b->path, strerror(errno));
    }
}

static void uring_close(struct block *b)
{
    struct uring *u = b->engine_data;
    if (!u)
        return;
    loop_fd_remove(u->watch);
    io_uring_queue_exit(&u->ring);
    close(u->event_fd);
    free(u);
    b->engine_data = NULL;
}

static int uring_open(struct block *b)
{
    struct uring *u = calloc(1, sizeof(*u));
    if (!u)
        return -ENOMEM;
    int ret = io_uring_queue_init(BLOCK_DEPTH, &u->ring, 0);
    if (ret < 0) {
        free(u);
        return ret;
    }
    u->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (u->event_fd < 0) {
        ret = -errno;
        io_uring_queue_exit(&u->ring);
        free(u);
        return ret;
    }
    b->engine_data = u;
    ret = io_uring_register_eventfd(&u->ring, u->event_fd);
    if (ret == 0)
        ret = block_workers_start(b);
    if (ret == 0) {
        u->watch = loop_fd_add(b->loop, u->event_fd, POLLIN, complete_ready, b);
        if (!u->watch)
            ret = -ENOMEM;
    }
    if (ret) {
        uring_close(b);
        block_workers_stop(b);
    }
    return ret;
}

const struct block_engine block_engine_uring = {
    .name = "io_uring",
    .open = uring_open,
    .close = uring_close,
    .start = uring_start,
    .submit = uring_submit,
    .wait = uring_wait,
};
