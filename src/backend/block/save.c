/*
 * A copy of a disk as it is at one moment, while the guest goes on writing to it: copy before write.
 *
 * A thread copies the file chunk by chunk. A write to a chunk that is not copied yet waits in the queue, and its chunks are
 * copied next. The copy is of the file, not of the disk: that of an overlay is an overlay with the same base.
 *
 * A disk on a server is read by requests of the disk's own, which go ahead of the guest's: another connection need not see what was
 * written through this one, and the server may take one client only. The thread asks, block.c takes the request with the machine lock.
 *
 * The chunks' states are guarded by the copy's own lock; block.c calls with the machine lock held.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include "backend/block/block_impl.h"
#include "base/log.h"
#include "base/util.h"

#define CHUNK MIB(1)
#define PIECE KIB(256)

/* How often a thread that waits for the server looks whether it is to end. */
#define PATIENCE_NS 50000000

enum chunk { TODO, URGENT, DONE };
/* Of the request that reads: not there, to be taken, taken, answered. */
enum reading { IDLE, ASKED, TAKEN, ANSWERED };

struct block_save {
    struct block *block;
    int from;                   /* -1: a disk on a server */
    int to;
    uint64_t size;              /* of the file */
    uint8_t *buf;               /* PIECE */
    struct block_request read;  /* into buf */
    struct iovec read_iov;
    uint64_t shift;             /* where the disk's byte 0 is in it */
    pthread_t thread;
    bool started;

    pthread_mutex_t lock;
    pthread_cond_t changed;
    uint8_t *chunk;             /* enum chunk */
    uint64_t chunks, next;      /* next: all before are done or urgent */
    uint64_t urgent;            /* how many */
    uint64_t urgent_from;       /* the first is here or later */
    uint64_t bytes;
    int error;                  /* then nothing waits any more */
    const _Atomic bool *cancel;
    bool awaited;               /* a write waits */
    enum reading reading;
    int read_status;
};

/* ---- copying ---- */

static bool all_zero(const uint8_t *p, size_t n)
{
    return n == 0 || (p[0] == 0 && memcmp(p, p + 1, n - 1) == 0);
}

static void read_done(void *opaque, int status)
{
    struct block_save *s = opaque;

    pthread_mutex_lock(&s->lock);
    s->reading = ANSWERED;
    s->read_status = status;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
}

/* len bytes of a disk on a server. 0 or a negative errno; after -ECANCELED the request may be under way still. */
static int read_server(struct block_save *s, uint64_t offset, uint64_t len)
{
    int err;

    s->read_iov = (struct iovec){ s->buf, len };
    s->read = (struct block_request){
        .op = BLOCK_READ, .offset = offset, .iov = &s->read_iov, .iovcnt = 1, .done = read_done, .opaque = s
    };
    pthread_mutex_lock(&s->lock);
    s->reading = ASKED;
    pthread_cond_broadcast(&s->changed);
    loop_schedule(s->block->loop, &s->block->start_call);
    while (s->reading != ANSWERED && !*s->cancel) {
        struct timespec until;

        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_nsec += PATIENCE_NS;
        until.tv_sec += until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
        pthread_cond_timedwait(&s->changed, &s->lock, &until);
    }
    err = s->reading == ANSWERED ? s->read_status : -ECANCELED;
    if (s->reading != TAKEN)
        s->reading = IDLE;
    pthread_mutex_unlock(&s->lock);
    return err;
}

struct block_request *block_save_take_read(struct block *b)
{
    struct block_save *s = b->save;
    struct block_request *read = NULL;

    pthread_mutex_lock(&s->lock);
    if (s->reading == ASKED) {
        s->reading = TAKEN;
        read = &s->read;
    }
    pthread_mutex_unlock(&s->lock);
    return read;
}

/* Up to PIECE bytes into s->buf. Bytes, or a negative errno. */
static int64_t read_piece(struct block_save *s, uint64_t offset, uint64_t end)
{
    uint64_t len = MIN(PIECE, end - offset);
    ssize_t n;

    if (s->from < 0) {
        int err = read_server(s, offset, len);

        return err ? err : (int64_t)len;
    }
    do
        n = pread(s->from, s->buf, len, (off_t)offset);
    while (n < 0 && errno == EINTR);
    return n > 0 ? n : n < 0 ? -errno : -EIO;
}

/* Copies what there is in [offset, end), leaving out holes and zeroes. Bytes, or a negative errno. */
static int64_t copy_range(struct block_save *s, uint64_t offset, uint64_t end)
{
    int64_t copied = 0;

    while (offset < end) {
        off_t data = s->from < 0 ? -1 : lseek(s->from, (off_t)offset, SEEK_DATA);
        int64_t n;

        if (s->from >= 0 && data < 0 && errno == ENXIO)
            break;
        if (data > 0 && (uint64_t)data > offset)
            offset = MIN((uint64_t)data, end);
        if (offset == end)
            break;
        n = read_piece(s, offset, end);
        if (n < 0)
            return n;
        if (!all_zero(s->buf, (size_t)n)) {
            for (ssize_t done = 0, w; done < n; done += w) {
                w = pwrite(s->to, s->buf + done, (size_t)(n - done), (off_t)offset + done);
                if (w <= 0)
                    return w < 0 ? -errno : -EIO;
            }
            copied += n;
        }
        offset += (uint64_t)n;
    }
    return copied;
}

/* The next chunk to copy: s->chunks when there is none. Lock held. */
static uint64_t choose(struct block_save *s)
{
    if (s->urgent) {
        while (s->chunk[s->urgent_from] != URGENT)
            s->urgent_from++;
        return s->urgent_from;
    }
    while (s->next < s->chunks && s->chunk[s->next] == DONE)
        s->next++;
    return s->next;
}

/* Lock held. */
static void wake_writes(struct block_save *s)
{
    pthread_cond_broadcast(&s->changed);
    if (s->awaited)
        loop_schedule(s->block->loop, &s->block->start_call);
    s->awaited = false;
}

static void *copy_thread(void *opaque)
{
    struct block_save *s = opaque;
    uint64_t i;

    pthread_mutex_lock(&s->lock);
    while (!s->error && !*s->cancel && (i = choose(s)) < s->chunks) {
        int64_t r;

        pthread_mutex_unlock(&s->lock);
        r = copy_range(s, i * CHUNK, MIN((i + 1) * CHUNK, s->size));
        pthread_mutex_lock(&s->lock);
        if (r < 0) {
            s->error = (int)r;
            break;
        }
        s->bytes += (uint64_t)r;
        s->urgent -= s->chunk[i] == URGENT;
        s->chunk[i] = DONE;
        wake_writes(s);
    }
    if (*s->cancel && !s->error)
        s->error = -ECANCELED;
    wake_writes(s);
    pthread_mutex_unlock(&s->lock);
    return NULL;
}

/* ---- the disk's side ---- */

/* Lock held. True when all chunks of the disk's range are copied; marks those that are not. */
static bool is_copied(struct block_save *s, uint64_t offset, uint64_t len)
{
    uint64_t first = align_down(offset + s->shift, block_write_unit(s->block)) / CHUNK;
    uint64_t last = (align_up(offset + len + s->shift, block_write_unit(s->block)) - 1) / CHUNK;
    bool copied = true;

    if (s->error)
        return true;
    for (uint64_t i = first; i <= last && i < s->chunks; i++) {
        if (s->chunk[i] == DONE)
            continue;
        copied = false;
        if (s->chunk[i] == URGENT)
            continue;
        s->urgent_from = s->urgent ? MIN(s->urgent_from, i) : i;
        s->urgent++;
        s->chunk[i] = URGENT;
    }
    return copied;
}

bool block_save_may_write(struct block *b, uint64_t offset, uint64_t len)
{
    struct block_save *s = b->save;
    bool may;

    pthread_mutex_lock(&s->lock);
    may = !len || is_copied(s, offset, len);
    s->awaited |= !may;
    pthread_mutex_unlock(&s->lock);
    return may;
}

/* The queue's head waits: until that has changed, or there is something to read for it. */
void block_save_wait_write(struct block *b)
{
    struct block_save *s = b->save;

    pthread_mutex_lock(&s->lock);
    if (s->urgent && !s->error && s->reading != ASKED)
        pthread_cond_wait(&s->changed, &s->lock);
    pthread_mutex_unlock(&s->lock);
}

void block_presync(struct block *b)
{
    if (b->fd >= 0 && fdatasync(b->fd) < 0)
        log_debug("disk %s: %s", b->path, strerror(errno));
}

/* The bitmap in the file is not up to date, and changes with later flushes: it is copied now. */
static int copy_head(struct block_save *s, struct block *b)
{
    int64_t r;

    if (!b->overlay)
        return 0;
    if (!b->readonly && (r = overlay_write_bitmap(b->overlay, b->buffered_fd)))
        return (int)r;
    /* What was written without a flush is in the bitmap now, but need not be on the disk: as after any write. */
    r = copy_range(s, 0, s->shift);
    for (uint64_t i = 0; i < s->shift / CHUNK; i++)
        s->chunk[i] = DONE;
    return r < 0 ? (int)r : 0;
}

static int prepare(struct block_save *s, struct block *b)
{
    char name[64];
    off_t end = (off_t)b->size;

    snprintf(name, sizeof(name), "/proc/self/fd/%d", b->fd);
    if (b->fd >= 0 && (s->from = open(name, O_RDONLY | O_CLOEXEC)) < 0)
        return -errno;
    if (s->from >= 0)
        end = lseek(s->from, 0, SEEK_END);
    if (end < 0)
        return -errno;
    s->size = (uint64_t)end;
    s->shift = b->overlay ? overlay_data_offset(b->overlay) : 0;
    s->chunks = (s->size + CHUNK - 1) / CHUNK;
    s->chunk = calloc(s->chunks + 1, 1);
    s->buf = malloc(PIECE);
    if (!s->chunk || !s->buf)
        return -ENOMEM;
    return ftruncate(s->to, end) < 0 ? -errno : 0;
}

static void destroy(struct block_save *s)
{
    if (s->from >= 0)
        close(s->from);
    if (s->to >= 0)
        close(s->to);
    pthread_mutex_destroy(&s->lock);
    pthread_cond_destroy(&s->changed);
    free(s->chunk);
    free(s->buf);
    free(s);
}

int block_save_begin(struct block *b, int fd, const _Atomic bool *cancel)
{
    struct block_save *s = b->save ? NULL : calloc(1, sizeof(*s));
    int err;

    if (!s) {
        close(fd);
        return b->save ? -EBUSY : -ENOMEM;
    }
    s->block = b;
    s->from = -1;
    s->to = fd;
    s->cancel = cancel;
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->changed, NULL);
    err = prepare(s, b);
    if (!err)
        err = copy_head(s, b);
    if (!err && s->from >= 0 && !b->device && ioctl(s->to, FICLONE, s->from) == 0) {
        memset(s->chunk, DONE, s->chunks);
    } else if (!err) {
        err = -pthread_create(&s->thread, NULL, copy_thread, s);
        s->started = !err;
    }
    if (err) {
        log_error("disk %s: cannot copy it for the snapshot: %s", b->path, strerror(-err));
        destroy(s);
        return err;
    }
    b->save = s;
    return 0;
}

int block_save_wait(struct block *b, uint64_t *bytes)
{
    struct block_save *s = b->save;
    int err;

    if (s->started)
        pthread_join(s->thread, NULL);
    s->started = false;
    err = s->error;
    if (!err && fsync(s->to) < 0)
        err = -errno;
    if (err && err != -ECANCELED)
        log_error("disk %s: cannot copy it for the snapshot: %s", b->path, strerror(-err));
    *bytes = s->bytes;
    return err;
}

void block_save_end(struct block *b)
{
    struct block_save *s = b->save;

    /* A read may be under way that nobody waits for any more. */
    if (s->reading == TAKEN)
        block_drain(b);
    b->save = NULL;
    destroy(s);
    loop_schedule(b->loop, &b->start_call);
}
