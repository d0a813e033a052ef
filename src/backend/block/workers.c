/*
 * Threads that do host I/O by blocking calls.
 *
 * They are the engine where a host has no io_uring (containers often forbid it), and
 * otherwise serve what it cannot do on all kernels: discard and write zeroes. Threads are
 * made when there is work for them. The two lists are guarded by the workers' own lock; everything
 * else is called with the machine lock held.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/uio.h>
#include <unistd.h>

#include "backend/block/block_impl.h"
#include "base/log.h"
#include "base/thread.h"
#include "base/util.h"

#define MAX_THREADS 8u
#define STACK_SIZE  131072u

struct block_workers {
    struct block *block;
    int event_fd;
    struct loop_fd *watch;
    unsigned busy;          /* machine lock */
    struct block_io *ready; /* machine lock: taken from done, not reported yet */

    pthread_mutex_t lock;
    pthread_cond_t work;
    struct block_io *todo, **todo_tail, *done;
    unsigned threads, idle;
    bool stop;
    pthread_t thread[MAX_THREADS];
};

/* Parts. */

static const uint8_t zeroes[BLOCK_MAX_ALIGNMENT] __attribute__((aligned(BLOCK_MAX_ALIGNMENT)));

static uint64_t data_offset(const struct block *b)
{
    return b->overlay ? overlay_data_offset(b->overlay) : 0;
}

/* Zeroes len bytes that lie within one unit of writing. */
static int zero_part_of_block(struct block *b, uint64_t offset, uint64_t len)
{
    unsigned unit = block_write_unit(b);
    uint64_t begin = align_down(offset, unit);
    struct iovec iov = {.iov_len = unit};
    if (posix_memalign(&iov.iov_base, unit, unit))
        return -ENOMEM;
    uint8_t *buf = iov.iov_base;
    int ret = 0;
    int64_t got = b->overlay ? overlay_read(b->overlay, b->buffered_fd, &iov, 1, begin)
                             : pread(b->fd, buf, unit, (off_t)begin);
    if (got != (int64_t)unit) {
        ret = got < 0 && b->overlay ? (int)got : got < 0 ? -errno : -EIO;
    } else {
        memset(buf + (offset - begin), 0, len);
        ssize_t r = pwrite(b->fd, buf, unit, (off_t)(begin + data_offset(b)));
        ret = r < 0 ? -errno : r == (ssize_t)unit ? 0 : -EIO;
    }
    free(buf);
    return ret;
}

static int write_zeroes(struct block *b, uint64_t offset, uint64_t len)
{
    struct iovec iov[16];
    unsigned unit = block_write_unit(b);
    while (len) {
        uint64_t in_block = offset & (unit - 1);
        if (in_block || len < unit) {
            uint64_t n = MIN(len, unit - in_block);
            errno = 0;
            int ret = zero_part_of_block(b, offset, n);
            if (ret)
                return ret;
            offset += n;
            len -= n;
            continue;
        }
        uint64_t whole = len & ~(uint64_t)(unit - 1);
        unsigned count = 0;
        for (uint64_t left = whole; left && count < ARRAY_SIZE(iov); count++) {
            uint64_t n = MIN(left, sizeof(zeroes));
            iov[count] = (struct iovec){.iov_base = (void *)zeroes, .iov_len = n};
            left -= n;
        }
        ssize_t r = pwritev(b->fd, iov, (int)count, (off_t)(offset + data_offset(b)));
        if (r < 0 && errno == EINTR)
            continue;
        if (r <= 0)
            return r < 0 ? -errno : -EIO;
        offset += (uint64_t)r;
        len -= (uint64_t)r;
    }
    return 0;
}

static bool not_supported(int err)
{
    return err == EOPNOTSUPP || err == ENOSYS || err == ENOTTY || err == EINVAL || err == ENODEV;
}

static int allocate(struct block *b, int mode, const struct block_io *io)
{
    int r;
    do {
        r = fallocate(b->fd, mode | FALLOC_FL_KEEP_SIZE, (off_t)io->offset, (off_t)io->len);
    } while (r < 0 && errno == EINTR);
    return r < 0 ? -errno : 0;
}

/* Advice: a host that cannot take it has obeyed. */
static int discard(struct block *b, const struct block_io *io)
{
    int ret;
    if (b->device) {
        uint64_t range[2] = {io->offset, io->len};
        ret = ioctl(b->fd, BLKDISCARD, range) < 0 ? -errno : 0;
    } else {
        ret = allocate(b, FALLOC_FL_PUNCH_HOLE, io);
    }
    return not_supported(-ret) ? 0 : ret;
}

/* What lies below an overlay is hidden by what is zeroed here; discarding gives back only what lies here. */
static int zero_overlay(struct block *b, const struct block_io *io)
{
    uint64_t first = align_up(io->offset, OVERLAY_GRANULE);
    uint64_t end = align_down(io->offset + io->len, OVERLAY_GRANULE);
    int ret = 0;
    if (first < end && fallocate(b->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(data_offset(b) + first),
                                 (off_t)(end - first)) < 0)
        ret = -errno;
    if (io->part == PART_DISCARD)
        return not_supported(-ret) ? 0 : ret;
    if (first >= end || not_supported(-ret))
        return write_zeroes(b, io->offset, io->len);
    if (!ret && io->offset < first)
        ret = write_zeroes(b, io->offset, first - io->offset);
    if (!ret && end < io->offset + io->len)
        ret = write_zeroes(b, end, io->offset + io->len - end);
    return ret;
}

/* The bits of granules reach the disk after what they stand for. */
int block_overlay_sync(struct block *b)
{
    int ret = fdatasync(b->fd) < 0 ? -errno : 0;
    if (!ret)
        ret = overlay_write_bitmap(b->overlay, b->buffered_fd);
    if (!ret && fdatasync(b->buffered_fd) < 0)
        ret = -errno;
    return ret;
}

static int zero(struct block *b, const struct block_io *io)
{
    if (io->req->may_unmap) {
        int ret = allocate(b, FALLOC_FL_PUNCH_HOLE, io);
        if (!not_supported(-ret))
            return ret;
    }
    int ret = allocate(b, FALLOC_FL_ZERO_RANGE, io);
    if (!not_supported(-ret))
        return ret;
    return write_zeroes(b, io->offset, io->len);
}

int64_t block_do_part(struct block *b, const struct block_io *io)
{
    ssize_t r = 0;
    switch (io->part) {
    case PART_READ:
        if (io->fd < 0)
            return overlay_read(b->overlay, b->buffered_fd, io->iov, io->iovcnt, io->offset);
        r = preadv(io->fd, io->iov, (int)io->iovcnt, (off_t)io->at);
        break;
    case PART_WRITE:
        r = pwritev(io->fd, io->iov, (int)io->iovcnt, (off_t)io->at);
        break;
    case PART_SYNC:
        if (io->fd < 0)
            return block_overlay_sync(b);
        r = fdatasync(io->fd);
        break;
    case PART_DISCARD:
        return b->overlay ? zero_overlay(b, io) : discard(b, io);
    case PART_ZERO:
        return b->overlay ? zero_overlay(b, io) : zero(b, io);
    }
    return r < 0 ? -errno : r;
}

/* Threads. */

static void tell_done(struct block_workers *w, struct block_io *io)
{
    pthread_mutex_lock(&w->lock);
    bool first = !w->done;
    io->next = w->done;
    w->done = io;
    pthread_mutex_unlock(&w->lock);
    uint64_t one = 1;
    if (first && write(w->event_fd, &one, sizeof(one)) < 0)
        log_error("disk %s: cannot report I/O: %s", w->block->path, strerror(errno));
}

static void *worker(void *opaque)
{
    struct block_workers *w = opaque;
    pthread_mutex_lock(&w->lock);
    for (;;) {
        while (!w->todo && !w->stop) {
            w->idle++;
            pthread_cond_wait(&w->work, &w->lock);
            w->idle--;
        }
        if (!w->todo)
            break;
        struct block_io *io = w->todo;
        w->todo = io->next;
        if (!w->todo)
            w->todo_tail = &w->todo;
        pthread_mutex_unlock(&w->lock);
        io->result = block_do_part(w->block, io);
        tell_done(w, io);
        pthread_mutex_lock(&w->lock);
    }
    pthread_mutex_unlock(&w->lock);
    return NULL;
}

/* Workers' lock held. */
static bool add_thread(struct block_workers *w)
{
    int err = thread_start(&w->thread[w->threads], STACK_SIZE, worker, w);
    if (err) {
        log_debug("disk %s: cannot make a thread: %s", w->block->path, strerror(-err));
        return false;
    }
    pthread_setname_np(w->thread[w->threads], "disk");
    w->threads++;
    return true;
}

static void done_ready(void *opaque, int fd, short revents)
{
    block_workers_reap(opaque, false);
}

int block_workers_start(struct block *b)
{
    if (b->workers)
        return 0;
    struct block_workers *w = calloc(1, sizeof(*w));
    if (!w) {
        log_error("out of memory");
        return -ENOMEM;
    }
    w->block = b;
    w->todo_tail = &w->todo;
    w->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (w->event_fd < 0) {
        int err = errno;
        log_error("disk %s: cannot make an eventfd: %s", b->path, strerror(err));
        free(w);
        return -err;
    }
    w->watch = loop_fd_add(b->loop, w->event_fd, POLLIN, done_ready, b);
    if (!w->watch) {
        close(w->event_fd);
        free(w);
        return -ENOMEM;
    }
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->work, NULL);
    b->workers = w;
    return 0;
}

void block_workers_stop(struct block *b)
{
    struct block_workers *w = b->workers;
    if (!w)
        return;
    pthread_mutex_lock(&w->lock);
    w->stop = true;
    pthread_cond_broadcast(&w->work);
    pthread_mutex_unlock(&w->lock);
    for (unsigned i = 0; i < w->threads; i++)
        pthread_join(w->thread[i], NULL);
    loop_fd_remove(w->watch);
    close(w->event_fd);
    pthread_cond_destroy(&w->work);
    pthread_mutex_destroy(&w->lock);
    free(w);
    b->workers = NULL;
}

void block_workers_add(struct block *b, struct block_io *io)
{
    struct block_workers *w = b->workers;
    w->busy++;
    pthread_mutex_lock(&w->lock);
    io->next = NULL;
    *w->todo_tail = io;
    w->todo_tail = &io->next;
    bool served = w->idle > 0;
    if (!served && w->threads < MAX_THREADS)
        add_thread(w);
    bool alone = w->threads == 0;
    if (alone) {
        w->todo = NULL;
        w->todo_tail = &w->todo;
    }
    pthread_cond_signal(&w->work);
    pthread_mutex_unlock(&w->lock);
    if (alone) {
        /* No thread to be had at all: slow is better than not at all. */
        io->result = block_do_part(b, io);
        tell_done(w, io);
    }
}

unsigned block_workers_busy(const struct block *b)
{
    return b->workers ? b->workers->busy : 0;
}

void block_workers_reap(struct block *b, bool wait)
{
    struct block_workers *w = b->workers;
    while (!w->ready) {
        uint64_t count;
        if (read(w->event_fd, &count, sizeof(count)) < 0 && errno != EAGAIN && errno != EINTR)
            log_error("disk %s: %s", b->path, strerror(errno));
        pthread_mutex_lock(&w->lock);
        w->ready = w->done;
        w->done = NULL;
        pthread_mutex_unlock(&w->lock);
        if (w->ready || !wait)
            break;
        struct pollfd p = {.fd = w->event_fd, .events = POLLIN};
        poll(&p, 1, -1);
    }
    /* One by one: a done() in between may drain, so may get here again. */
    while (w->ready) {
        struct block_io *io = w->ready;
        w->ready = io->next;
        w->busy--;
        block_part_done(b, io);
    }
    if (b->engine->submit)
        b->engine->submit(b); /* next parts of requests */
}

/* The engine for hosts without io_uring. */

static int threads_open(struct block *b)
{
    return block_workers_start(b);
}

static void threads_close(struct block *b)
{
    block_workers_stop(b);
}

static void threads_wait(struct block *b)
{
    block_workers_reap(b, true);
}

const struct block_engine block_engine_threads = {
    .name = "threads",
    .open = threads_open,
    .close = threads_close,
    .start = block_workers_add,
    .wait = threads_wait,
};
