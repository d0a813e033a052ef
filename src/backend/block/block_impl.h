/*
 * The two halves of a disk: what a request means (block.c) and how one host I/O is done (an
 * engine). Private to backend/block. Machine lock held everywhere but in worker threads.
 *
 * A request is done as a chain of parts, one after the other: a part is one host I/O of a size that
 * the host takes at once. Up to BLOCK_DEPTH requests have a part under way; the others wait in
 * order of arrival.
 */
#ifndef RINGFORT_BACKEND_BLOCK_IMPL_H
#define RINGFORT_BACKEND_BLOCK_IMPL_H

#include "backend/block/block.h"
#include "backend/block/overlay.h"
#include "base/loop.h"

#define BLOCK_DEPTH         128u
#define BLOCK_BOUNCE_SIZE   131072u /* bytes; a multiple of any alignment that we accept */
#define BLOCK_MAX_ALIGNMENT 65536u
#define BLOCK_PART_IOVS     1024u /* the kernel's UIO_MAXIOV */

enum block_part { PART_READ, PART_WRITE, PART_SYNC, PART_DISCARD, PART_ZERO };

/* A request under way. */
struct block_io {
    struct block *block;
    struct block_request *req;
    struct block_io *next;

    /* The running part, for the engine: */
    enum block_part part;
    const struct iovec *iov;
    unsigned iovcnt;
    uint64_t offset, len; /* on the disk; len: of discard and zero */
    int fd;               /* -1: through the layers of an overlay, by block_do_part() */
    uint64_t at;          /* offset in fd */
    int64_t result;       /* the engine's answer: bytes or a negative errno */

    /* How far the request is: */
    uint64_t total, progress;
    bool bounce, merging; /* merging: the part reads what a write of less than a block must keep */
    uint8_t *buffer;      /* BLOCK_BOUNCE_SIZE bytes, aligned; while bounce */
    struct iovec buffer_iov;
    struct iovec *rest; /* a part that begins in the middle of the request's iovec; 1 + iovcnt */
};

struct block_engine {
    const char *name;
    /* 0, or a negative errno when this host does not have it (silent). */
    int (*open)(struct block *b);
    void (*close)(struct block *b);
    /* Starts io's part; engine_done() is called for it later, never from within. */
    void (*start)(struct block *b, struct block_io *io);
    /* Hands what was started to the kernel, when that is not done yet. NULL: nothing to do. */
    void (*submit)(struct block *b);
    /* Waits until at least one part is done and reports what is. Parts are under way. */
    void (*wait)(struct block *b);

    /* Disks that are no files (b->fd is -1); NULL: they are. Nothing is under way. */
    int (*attach)(struct block *b);  /* the disk is this machine's. 0 or a negative errno (logged) */
    void (*detach)(struct block *b); /* it is not any more */
    int (*sync)(struct block *b);    /* what was written is on the server's disk. 0 or a negative errno */
};

/* Threads that do blocking calls: the whole engine on hosts without io_uring, else the rare
 * operations. */
struct block_workers;

struct block {
    struct loop *loop;
    char *path;
    int fd;
    uint64_t size;
    unsigned alignment; /* of offsets, lengths and buffers; 1 without O_DIRECT */
    struct overlay *overlay; /* NULL: path is the disk itself */
    int buffered_fd;         /* the same file without O_DIRECT, for an overlay's bitmap; else -1 */
    struct block_save *save; /* a copy is being made; save.c's */
    uint64_t *dirty;         /* what was written, when that is noted; dirty.c's */
    enum block_cache cache;
    bool readonly, device, can_discard;
    bool unlocked; /* another machine has it */

    const struct block_engine *engine;
    void *engine_data;
    struct block_workers *workers; /* NULL until needed */

    struct block_request *queue, **queue_tail; /* not started */
    struct loop_call start_call;
    struct block_io io[BLOCK_DEPTH];
    struct block_io *idle;
    unsigned running;
    bool alone; /* a write that merges is under way: nothing else may run */
    bool starting;
};

/* As block_open(), with a choice of engine (tests); NULL: the best that works. */
int block_open_with(struct loop *loop, const struct block_options *opt,
                    const struct block_engine *engine, struct block **out);

/* What a write begins and ends at a multiple of. */
static inline unsigned block_write_unit(const struct block *b)
{
    return b->overlay && b->alignment < OVERLAY_GRANULE ? OVERLAY_GRANULE : b->alignment;
}

/* save.c: whether a write may start; if not, start_call is scheduled when that has changed. And waiting for that. */
bool block_save_may_write(struct block *b, uint64_t offset, uint64_t len);
void block_save_wait_write(struct block *b);
/* A read for the copy that is to be done before what waits in the queue; NULL: none. When there is one, start_call is scheduled. */
struct block_request *block_save_take_read(struct block *b);

void block_dirty_mark(struct block *b, uint64_t offset, uint64_t len);

/* For engines. A part is done: io->result says how. Machine lock held. */
void block_part_done(struct block *b, struct block_io *io);

extern const struct block_engine block_engine_uring, block_engine_threads, block_engine_nbd;
/* Engine, size and alignment of a disk on a server. 0 or a negative errno (logged). */
int block_nbd_open(struct block *b, const struct block_options *opt);

/* Worker threads. 0 or a negative errno (logged). Stopping waits for what they do. */
int block_workers_start(struct block *b);
void block_workers_stop(struct block *b);
void block_workers_add(struct block *b, struct block_io *io);
/* The parts that are with the workers or wait to be reported. */
unsigned block_workers_busy(const struct block *b);
/* Reports what is done; wait: at least one. */
void block_workers_reap(struct block *b, bool wait);

/* One part as blocking system calls, in any thread. Bytes or a negative errno. */
int block_overlay_sync(struct block *b);
int64_t block_do_part(struct block *b, const struct block_io *io);

#endif
