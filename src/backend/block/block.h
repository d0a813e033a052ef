/*
 * A disk on the host behind one narrow interface.
 *
 * Requests are asynchronous: block_submit() returns at once, done() is called later in the event loop's
 * thread with the machine lock held. Requests may complete in any order. Buffers belong to the
 * caller and stay valid until done(). Offsets and lengths are bytes; the caller checked nothing: a request
 * outside the disk completes with -EINVAL, one on a read-only disk that writes with -EROFS.
 */
#ifndef RINGFORT_BACKEND_BLOCK_H
#define RINGFORT_BACKEND_BLOCK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

struct loop;
struct block;

/* As users know them: none = O_DIRECT, writeback = host page cache and flushes reach the disk, unsafe = flushes ignored. */
enum block_cache { BLOCK_CACHE_WRITEBACK, BLOCK_CACHE_NONE, BLOCK_CACHE_UNSAFE };

struct block_options {
    const char *path;           /* raw image file or block device */
    bool readonly;
    enum block_cache cache;
};

enum block_op { BLOCK_READ, BLOCK_WRITE, BLOCK_FLUSH, BLOCK_DISCARD, BLOCK_WRITE_ZEROES };

struct block_request {
    enum block_op op;
    uint64_t offset, len;       /* len: of discard and write zeroes; reads and writes use the iovec's sum */
    struct iovec *iov;          /* borrowed until done */
    unsigned iovcnt;
    bool may_unmap;             /* write zeroes may deallocate */
    /* status: 0 or a negative errno (-EIO, -ENOSPC, …). */
    void (*done)(void *opaque, int status);
    void *opaque;
    /* The rest is the backend's own. */
    struct block_request *next;
    void *bounce;
    uint64_t progress;
    unsigned parts;
    int status;
};

/*
 * Opens and locks (OFD lock: shared when read-only, exclusive otherwise; a disk in use by another machine is an error).
 * Logs one line naming the file and the cause. *out on 0; -errno otherwise: -ENOENT, -EACCES, -EBUSY (in use),
 * -EINVAL (not a regular file or block device, empty, or not a multiple of 512 bytes).
 */
int block_open(struct loop *loop, const struct block_options *opt, struct block **out);
/* Waits for what is in flight (its done() runs before), syncs unless cache=unsafe or read-only, closes. */
void block_close(struct block *b);
uint64_t block_size(const struct block *b);             /* bytes */
bool block_readonly(const struct block *b);
bool block_can_discard(const struct block *b);
/* False for cache=unsafe… flush still succeeds. */
bool block_writeback(const struct block *b);
void block_submit(struct block *b, struct block_request *req);
/* Wait until nothing is in flight; done() callbacks have run. Loop thread or lock holder. */
void block_drain(struct block *b);

#endif
