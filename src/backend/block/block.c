/*
 * A raw disk on the host: opening it, and requests as chains of host I/O parts.
 *
 * Machine lock held everywhere. Requests are started from the event loop's thread, which
 * gathers what a guest submitted in a burst, or by block_drain().
 *
 * With cache=none the host wants offsets, lengths and buffers aligned. A request that is not goes
 * through a bounce buffer; a write of less than a host block reads the block first and
 * runs alone, so that no other write to the block gets lost between.
 */
#include "backend/block/block.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "backend/block/block_impl.h"
#include "base/log.h"
#include "base/util.h"

/* Requests. */

static void finish(struct block *b, struct block_io *io, int status)
{
    struct block_request *req = io->req;
    if (!status && b->overlay && (req->op == BLOCK_WRITE || req->op == BLOCK_WRITE_ZEROES))
        overlay_mark(b->overlay, req->offset, io->total);
    /* One that failed may have been done in part. */
    if (b->dirty && req->op != BLOCK_READ && req->op != BLOCK_FLUSH)
        block_dirty_mark(b, req->offset, io->total);
    if (status)
        log_guest_error("disk %s: %s at byte %llu failed: %s", b->path,
                        req->op == BLOCK_READ    ? "read"
                        : req->op == BLOCK_FLUSH ? "flush"
                                                 : "write",
                        (unsigned long long)(req->offset + io->progress), strerror(-status));
    free(io->buffer);
    free(io->rest);
    io->buffer = NULL;
    io->rest = NULL;
    io->req = NULL;
    io->next = b->idle;
    b->idle = io;
    b->running--;
    b->alone = false;
    if (b->queue && !b->starting)
        loop_schedule(b->loop, &b->start_call);
    req->status = status;
    req->done(req->opaque, status);
}

/* Copies n bytes between buf and the request's memory from io->progress on. */
static void copy_iov(const struct block_io *io, uint8_t *buf, uint64_t n, bool to_guest)
{
    uint64_t skip = io->progress;
    for (unsigned i = 0; i < io->req->iovcnt && n; i++) {
        const struct iovec *v = &io->req->iov[i];
        if (skip >= v->iov_len) {
            skip -= v->iov_len;
            continue;
        }
        uint64_t here = MIN(v->iov_len - skip, n);
        uint8_t *guest = (uint8_t *)v->iov_base + skip;
        if (to_guest)
            memcpy(guest, buf, here);
        else
            memcpy(buf, guest, here);
        buf += here;
        n -= here;
        skip = 0;
    }
}

/* Which file a part is done in. */
static void place(struct block *b, struct block_io *io)
{
    io->fd = b->fd;
    io->at = io->offset;
    if (!b->overlay)
        return;
    io->at += overlay_data_offset(b->overlay);
    if (io->part == PART_SYNC && overlay_dirty(b->overlay))
        io->fd = -1;
    if (io->part != PART_READ)
        return;
    uint64_t len = 0;
    for (unsigned i = 0; i < io->iovcnt; i++)
        len += io->iov[i].iov_len;
    struct overlay_place p = overlay_find(b->overlay, io->offset, len);
    /* Bases are read through the page cache, so what they have needs no alignment. */
    if (p.len < len || io->offset + len > b->size) {
        io->fd = -1;
    } else if (p.fd >= 0) {
        io->fd = p.fd;
        io->at = p.offset;
    }
}

static void start_part(struct block *b, struct block_io *io, enum block_part part)
{
    io->part = part;
    place(b, io);
    b->engine->start(b, io);
}

/* The aligned range that the next bounce buffer covers, and how much of it the request wants. */
struct window {
    uint64_t begin, len;  /* on the disk, aligned */
    uint64_t skip, bytes; /* the request's bytes within it */
};

static unsigned unit_of(const struct block *b, enum block_op op)
{
    return op == BLOCK_READ || op == BLOCK_FLUSH ? b->alignment : block_write_unit(b);
}

static struct window next_window(const struct block *b, const struct block_io *io)
{
    struct window w;
    uint64_t at = io->req->offset + io->progress, end = io->req->offset + io->total;
    unsigned unit = unit_of(b, io->req->op);
    w.begin = align_down(at, unit);
    w.skip = at - w.begin;
    w.bytes = MIN(end - at, BLOCK_BOUNCE_SIZE - w.skip);
    w.len = align_up(w.skip + w.bytes, unit);
    return w;
}

static void start_bounce(struct block *b, struct block_io *io)
{
    struct window w = next_window(b, io);
    bool write = io->req->op == BLOCK_WRITE;
    io->offset = w.begin;
    io->buffer_iov = (struct iovec){.iov_base = io->buffer, .iov_len = w.len};
    io->iov = &io->buffer_iov;
    io->iovcnt = 1;
    io->merging = write && (w.skip || w.skip + w.bytes != w.len);
    if (write && !io->merging)
        copy_iov(io, io->buffer + w.skip, w.bytes, false);
    start_part(b, io, write && !io->merging ? PART_WRITE : PART_READ);
}

/* Reads and writes straight from the guest's memory; progress may be in the middle of it. */
static void start_direct(struct block *b, struct block_io *io)
{
    struct block_request *req = io->req;
    uint64_t skip = io->progress;
    unsigned first = 0;
    while (skip >= req->iov[first].iov_len)
        skip -= req->iov[first++].iov_len;
    io->iov = req->iov + first;
    io->iovcnt = MIN(req->iovcnt - first, BLOCK_PART_IOVS);
    io->offset = req->offset + io->progress;
    if (skip) {
        if (!io->rest)
            io->rest = malloc(MIN(req->iovcnt, BLOCK_PART_IOVS) * sizeof(*io->rest));
        if (!io->rest) {
            finish(b, io, -ENOMEM);
            return;
        }
        memcpy(io->rest, io->iov, io->iovcnt * sizeof(*io->rest));
        io->rest[0].iov_base = (uint8_t *)io->rest[0].iov_base + skip;
        io->rest[0].iov_len -= skip;
        io->iov = io->rest;
    }
    start_part(b, io, req->op == BLOCK_WRITE ? PART_WRITE : PART_READ);
}

static void bounce_done(struct block *b, struct block_io *io)
{
    struct window w = next_window(b, io);
    uint64_t done = (uint64_t)io->result;
    if (io->req->op == BLOCK_WRITE)
        done = align_down(done, block_write_unit(b));
    if (done <= w.skip || (io->merging && done < w.len)) {
        finish(b, io, -EIO);
        return;
    }
    if (io->merging) {
        copy_iov(io, io->buffer + w.skip, w.bytes, false);
        io->merging = false;
        start_part(b, io, PART_WRITE);
        return;
    }
    uint64_t got = MIN(done - w.skip, w.bytes);
    if (io->req->op == BLOCK_READ)
        copy_iov(io, io->buffer + w.skip, got, true);
    io->progress += got;
    if (io->progress == io->total)
        finish(b, io, 0);
    else
        start_bounce(b, io);
}

void block_part_done(struct block *b, struct block_io *io)
{
    if (io->result == -EAGAIN || io->result == -EINTR) {
        start_part(b, io, io->part);
        return;
    }
    if (io->result < 0) {
        /* A limit of the process or the file system on file sizes is, for the guest, a full disk.
         */
        int err = (int)io->result;
        finish(b, io, err == -EFBIG || err == -EDQUOT ? -ENOSPC : err);
        return;
    }
    if (io->part != PART_READ && io->part != PART_WRITE) {
        finish(b, io, 0);
        return;
    }
    if (io->bounce) {
        bounce_done(b, io);
        return;
    }
    if (io->result == 0) {
        finish(b, io, -EIO); /* the file was cut short under us */
        return;
    }
    io->progress += (uint64_t)io->result;
    if (io->progress >= io->total)
        finish(b, io, 0);
    else
        start_direct(b, io);
}

static bool range_ok(const struct block *b, uint64_t offset, uint64_t len)
{
    return offset <= b->size && len <= b->size - offset;
}

/* The length of a request, or false when the sum of its iovec overflows. */
static bool request_length(const struct block_request *req, uint64_t *total)
{
    *total = 0;
    if (req->op == BLOCK_FLUSH)
        return true;
    if (req->op == BLOCK_DISCARD || req->op == BLOCK_WRITE_ZEROES) {
        *total = req->len;
        return true;
    }
    for (unsigned i = 0; i < req->iovcnt; i++)
        if (__builtin_add_overflow(*total, req->iov[i].iov_len, total))
            return false;
    return true;
}

static bool needs_bounce(const struct block *b, const struct block_request *req, uint64_t total)
{
    uint64_t bits = 0;
    for (unsigned i = 0; i < req->iovcnt; i++)
        bits |= (uintptr_t)req->iov[i].iov_base | req->iov[i].iov_len;
    return (bits & (b->alignment - 1)) || ((req->offset | total) & (unit_of(b, req->op) - 1));
}

/*
 * Writes that read first, so nothing else may touch the disk in between; and the sync of an overlay whose bitmap has to follow
 * its data.
 */
static bool must_run_alone(const struct block *b, const struct block_request *req, uint64_t total)
{
    if (req->op == BLOCK_FLUSH)
        return b->overlay && overlay_dirty(b->overlay);
    return (req->op == BLOCK_WRITE || req->op == BLOCK_WRITE_ZEROES) &&
           ((req->offset | total) & (block_write_unit(b) - 1));
}

/* What can be answered without the host. 1: status is the answer. */
static int answer_at_once(const struct block *b, const struct block_request *req, uint64_t *total,
                          int *status)
{
    *status = 0;
    bool writes = req->op != BLOCK_READ && req->op != BLOCK_FLUSH;
    if (writes && b->readonly)
        *status = -EROFS;
    else if (!request_length(req, total) ||
             (req->op != BLOCK_FLUSH && !range_ok(b, req->offset, *total)))
        *status = -EINVAL;
    else if (req->op == BLOCK_FLUSH)
        return b->cache == BLOCK_CACHE_UNSAFE || b->readonly;
    else if (*total)
        return 0;
    return 1;
}

static void start_io(struct block *b, struct block_request *req, uint64_t total)
{
    struct block_io *io = b->idle;
    b->idle = io->next;
    b->running++;
    io->req = req;
    io->total = total;
    io->progress = 0;
    io->merging = false;
    io->bounce = false;
    switch (req->op) {
    case BLOCK_READ:
    case BLOCK_WRITE:
        io->bounce = unit_of(b, req->op) > 1 && needs_bounce(b, req, total);
        if (!io->bounce) {
            start_direct(b, io);
            return;
        }
        if (posix_memalign((void **)&io->buffer, MAX(b->alignment, 4096u), BLOCK_BOUNCE_SIZE)) {
            io->buffer = NULL;
            finish(b, io, -ENOMEM);
            return;
        }
        start_bounce(b, io);
        return;
    case BLOCK_FLUSH:
        start_part(b, io, PART_SYNC);
        return;
    case BLOCK_DISCARD:
    case BLOCK_WRITE_ZEROES:
        io->offset = req->offset;
        io->len = req->len;
        start_part(b, io, req->op == BLOCK_DISCARD ? PART_DISCARD : PART_ZERO);
        return;
    }
}

static void start_requests(struct block *b)
{
    if (b->starting)
        return; /* done() submitted more: the call below us goes on with it */
    b->starting = true;
    struct block_request *read = b->save ? block_save_take_read(b) : NULL;
    if (read) {
        read->next = b->queue;
        b->queue = read;
        if (!read->next)
            b->queue_tail = &read->next;
    }
    while (b->queue && !b->alone) {
        struct block_request *req = b->queue;
        uint64_t total;
        int status, answered = answer_at_once(b, req, &total, &status);
        bool alone = !answered && must_run_alone(b, req, total);
        if (!answered && (!b->idle || (alone && b->running)))
            break; /* what finishes next starts it */
        if (!answered && b->save && req->op != BLOCK_READ && req->op != BLOCK_FLUSH &&
            !block_save_may_write(b, req->offset, total))
            break; /* what it writes over is copied first, and that starts it */
        b->queue = req->next;
        if (!b->queue)
            b->queue_tail = &b->queue;
        if (answered) {
            req->status = status;
            req->done(req->opaque, status);
        } else {
            b->alone = alone;
            start_io(b, req, total);
        }
    }
    b->starting = false;
    if (b->engine->submit)
        b->engine->submit(b);
}

static void start_called(void *opaque)
{
    start_requests(opaque);
}

void block_submit(struct block *b, struct block_request *req)
{
    req->next = NULL;
    *b->queue_tail = req;
    b->queue_tail = &req->next;
    loop_schedule(b->loop, &b->start_call);
}

void block_drain(struct block *b)
{
    while (b->queue || b->running) {
        start_requests(b);
        if (b->running)
            b->engine->wait(b);
        else if (b->queue && b->save)
            block_save_wait_write(b);
    }
}

bool block_is_uri(const char *path)
{
    static const char *const schemes[] = {"nbd://", "nbds://", "nbd+unix://", "nbds+unix://"};
    for (unsigned i = 0; i < ARRAY_SIZE(schemes); i++)
        if (strncmp(path, schemes[i], strlen(schemes[i])) == 0)
            return true;
    return false;
}

bool block_is_local(const struct block *b)
{
    return b->fd >= 0;
}

bool block_is_overlay(const struct block *b)
{
    return b->overlay;
}

uint64_t block_size(const struct block *b)
{
    return b->size;
}

bool block_readonly(const struct block *b)
{
    return b->readonly;
}

bool block_can_discard(const struct block *b)
{
    return b->can_discard;
}

bool block_writeback(const struct block *b)
{
    return b->cache != BLOCK_CACHE_UNSAFE;
}

/* Opening. */

static int open_file(struct block *b, const struct block_options *opt)
{
    int flags = (opt->readonly ? O_RDONLY : O_RDWR) | O_CLOEXEC;
    const char *at = opt->until_named ? opt->until_named : opt->path;
    /* Look before opening: opening a pipe or a terminal can have effects. */
    struct stat st;
    if (stat(at, &st) == 0 && !S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode)) {
        log_error("disk %s: %s is no disk: give a raw image file or a block device", opt->path,
                  S_ISDIR(st.st_mode) ? "a directory" : "this kind of file");
        return -EINVAL;
    }
    b->fd = open(at, flags | (opt->cache == BLOCK_CACHE_NONE ? O_DIRECT : 0));
    if (b->fd < 0 && errno == EINVAL && opt->cache == BLOCK_CACHE_NONE) {
        log_error("disk %s: its file system cannot do cache=none (O_DIRECT); use cache=writeback",
                  opt->path);
        return -EINVAL;
    }
    if (b->fd < 0) {
        int err = errno;
        const char *hint = "";
        if (!opt->readonly && (err == EACCES || err == EROFS || err == EPERM))
            hint = "; to use it without writing, add readonly=on";
        else if (err == EBUSY)
            hint = "; it is mounted or part of another device";
        else if (err == ENOENT && strstr(opt->path, "://"))
            hint = "; a disk is a file, a block device, or on an NBD server: nbd://HOST/EXPORT";
        log_error("disk %s: cannot open: %s%s", opt->path, strerror(err), hint);
        return -err;
    }
    return 0;
}

static int find_size(struct block *b)
{
    struct stat st;
    if (fstat(b->fd, &st) < 0)
        return -errno;
    b->device = S_ISBLK(st.st_mode);
    b->size = (uint64_t)st.st_size;
    if (b->device && ioctl(b->fd, BLKGETSIZE64, &b->size) < 0)
        return -errno;
    if (!b->device && !S_ISREG(st.st_mode)) {
        log_error("disk %s: it is neither a file nor a block device", b->path);
        return -EINVAL;
    }
    if (b->size == 0 || b->size % 512) {
        log_error(
            "disk %s: its size is %llu bytes; a disk has a multiple of 512 bytes, and not none",
            b->path, (unsigned long long)b->size);
        return -EINVAL;
    }
    return 0;
}

static int open_overlay(struct block *b)
{
    char name[64];
    snprintf(name, sizeof(name), "/proc/self/fd/%d", b->fd);
    b->buffered_fd = open(name, (b->readonly ? O_RDONLY : O_RDWR) | O_CLOEXEC);
    if (b->buffered_fd < 0) {
        log_error("disk %s: cannot open: %s", b->path, strerror(errno));
        return -errno;
    }
    int ret = overlay_open(b->buffered_fd, b->path, &b->overlay);
    if (!ret)
        b->size = overlay_size(b->overlay);
    return ret;
}

/* Other image formats would look like an empty or broken disk to the guest, and be damaged by it.
 */
static int look_at_format(struct block *b)
{
    uint8_t *head = NULL;
    if (posix_memalign((void **)&head, BLOCK_MAX_ALIGNMENT, BLOCK_MAX_ALIGNMENT))
        return -ENOMEM;
    int ret = 0;
    ssize_t got = pread(b->fd, head, BLOCK_MAX_ALIGNMENT, 0);
    if (got > 0 && overlay_is(head, (size_t)got)) {
        ret = open_overlay(b);
    } else if (got >= 8) {
        const char *format = memcmp(head, "QFI\xfb", 4) == 0    ? "qcow2"
                             : memcmp(head, "KDMV", 4) == 0     ? "VMDK"
                             : memcmp(head, "vhdxfile", 8) == 0 ? "VHDX"
                                                                : NULL;
        if (format) {
            log_error(
                "disk %s: this is a %s image; make a raw one: qemu-img convert -O raw %s disk.img",
                b->path, format, b->path);
            ret = -EINVAL;
        }
    }
    free(head);
    return ret;
}

/* O_DIRECT's alignment, by trying: it depends on the file system, the device and the kernel. */
static int find_alignment(struct block *b)
{
    b->alignment = 1;
    if (b->cache != BLOCK_CACHE_NONE)
        return 0;
    uint8_t *buf;
    if (posix_memalign((void **)&buf, 2 * BLOCK_MAX_ALIGNMENT, 2 * BLOCK_MAX_ALIGNMENT))
        return -ENOMEM;
    unsigned align;
    int err = EINVAL;
    for (align = 512; align <= BLOCK_MAX_ALIGNMENT; align *= 2) {
        /* Not aligned to more than align, at neither end. */
        if (align <= b->size - MIN(b->size, align) &&
            pread(b->fd, buf + align, align, align) == (ssize_t)align)
            break;
        if (b->size == align && pread(b->fd, buf + align, align, 0) == (ssize_t)align)
            break;
        err = errno;
    }
    free(buf);
    if (align > BLOCK_MAX_ALIGNMENT || b->size % align) {
        if (align > BLOCK_MAX_ALIGNMENT)
            log_error("disk %s: cache=none does not work here (%s); use cache=writeback", b->path,
                      strerror(err));
        else
            log_error("disk %s: cache=none needs a size that is a multiple of %u bytes; use "
                      "cache=writeback",
                      b->path, align);
        return -EINVAL;
    }
    b->alignment = align;
    return 0;
}

static int lock_file(struct block *b)
{
    struct flock fl = {.l_type = b->readonly ? F_RDLCK : F_WRLCK, .l_whence = SEEK_SET};
    if (fcntl(b->fd, F_OFD_SETLK, &fl) == 0)
        return 0;
    int err = errno;
    if (err == EAGAIN || err == EACCES) {
        log_error("disk %s: in use by another machine%s", b->path,
                  b->readonly ? ""
                              : "; several machines can share it only if all have readonly=on");
        return -EBUSY;
    }
    log_warn("disk %s: cannot lock it (%s): nothing keeps another machine from using it too",
             b->path, strerror(err));
    return 0;
}

static bool device_can_discard(int fd)
{
    struct stat st;
    if (fstat(fd, &st) < 0)
        return false;
    /* A partition's queue is its disk's. */
    static const char *const formats[] = {"/sys/dev/block/%u:%u/queue/discard_max_bytes",
                                          "/sys/dev/block/%u:%u/../queue/discard_max_bytes"};
    for (unsigned i = 0; i < ARRAY_SIZE(formats); i++) {
        char path[96], text[32] = "";
        snprintf(path, sizeof(path), formats[i], major(st.st_rdev), minor(st.st_rdev));
        FILE *f = fopen(path, "re");
        if (!f)
            continue;
        if (!fgets(text, sizeof(text), f))
            text[0] = 0;
        fclose(f);
        return strtoull(text, NULL, 10) > 0;
    }
    return false;
}

static int open_local(struct block *b, const struct block_options *opt,
                      const struct block_engine *engine)
{
    int ret = open_file(b, opt);
    if (!ret)
        ret = find_size(b);
    if (!ret && !opt->unlocked)
        ret = lock_file(b);
    if (!ret)
        ret = find_alignment(b);
    if (!ret)
        ret = look_at_format(b);
    if (!ret && opt->size && b->size != opt->size) {
        log_error("disk %s: it has %llu bytes, and the machine's has %llu: it is another one", b->path,
                  (unsigned long long)b->size, (unsigned long long)opt->size);
        ret = -EINVAL;
    }
    if (ret)
        return ret;
    b->can_discard = !b->readonly && (!b->device || device_can_discard(b->fd));
    b->engine = engine ? engine : &block_engine_uring;
    ret = b->engine->open(b);
    if (ret && !engine) {
        log_debug("disk %s: no io_uring here (%s), using threads", b->path, strerror(-ret));
        b->engine = &block_engine_threads;
        ret = b->engine->open(b);
    }
    return ret;
}

static void free_disk(struct block *b)
{
    overlay_close(b->overlay);
    if (b->buffered_fd >= 0)
        close(b->buffered_fd);
    if (b->fd >= 0)
        close(b->fd);
    free(b->path);
    free(b);
}

int block_open_with(struct loop *loop, const struct block_options *opt,
                    const struct block_engine *engine, struct block **out)
{
    *out = NULL;
    struct block *b = calloc(1, sizeof(*b));
    if (!b || !(b->path = strdup(opt->path))) {
        free(b);
        log_error("out of memory");
        return -ENOMEM;
    }
    b->loop = loop;
    b->fd = b->buffered_fd = -1;
    b->cache = opt->cache;
    b->readonly = opt->readonly;
    b->unlocked = opt->unlocked;
    b->queue_tail = &b->queue;
    b->start_call = (struct loop_call){.fn = start_called, .opaque = b};
    for (unsigned i = 0; i < BLOCK_DEPTH; i++) {
        b->io[i].block = b;
        b->io[i].next = b->idle;
        b->idle = &b->io[i];
    }
    /* A file size limit shall be an error of write(), not the end of the process. */
    signal(SIGXFSZ, SIG_IGN);

    int ret = block_is_uri(b->path) ? block_nbd_open(b, opt) : open_local(b, opt, engine);
    if (!ret) {
        *out = b;
        return 0;
    }
    free_disk(b);
    return ret;
}

int block_open(struct loop *loop, const struct block_options *opt, struct block **out)
{
    return block_open_with(loop, opt, NULL, out);
}

static void sync_all(struct block *b)
{
    int ret = 0;
    if (!b->readonly && b->overlay)
        ret = block_overlay_sync(b);
    else if (b->engine->sync)
        ret = b->engine->sync(b);
    else if (!b->readonly && b->cache != BLOCK_CACHE_UNSAFE && fdatasync(b->fd) < 0)
        ret = -errno;
    if (ret)
        log_error("disk %s: the last writes may not have reached the disk: %s", b->path,
                  strerror(-ret));
}

int block_lock(struct block *b)
{
    int ret = b->engine->attach ? b->engine->attach(b) : lock_file(b);
    if (ret || !b->unlocked)
        return ret;
    /* Who had it until now has put more into an overlay than was there when it was opened. */
    if (b->overlay) {
        overlay_close(b->overlay);
        close(b->buffered_fd);
        b->overlay = NULL;
        b->buffered_fd = -1;
        ret = open_overlay(b);
        if (ret) {
            block_unlock(b);
            return ret;
        }
    }
    b->unlocked = false;
    return 0;
}

void block_unlock(struct block *b)
{
    struct flock fl = {.l_type = F_UNLCK, .l_whence = SEEK_SET};
    if (!b->unlocked)
        sync_all(b);
    b->unlocked = true;
    if (b->engine->detach)
        b->engine->detach(b);
    else
        fcntl(b->fd, F_OFD_SETLK, &fl);
}

void block_close(struct block *b)
{
    if (!b)
        return;
    block_drain(b);
    /* What another machine has by now is not to be touched. */
    if (!b->unlocked)
        sync_all(b);
    /* A sync may be a request, too. */
    loop_cancel(b->loop, &b->start_call);
    b->engine->close(b);
    block_workers_stop(b);
    block_dirty_stop(b);
    free_disk(b);
}
