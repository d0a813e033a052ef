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
    const char *path;           /* raw image file, block device, overlay, or URI of a disk on an NBD server */
    const char *until_named;    /* a file that does not have that name yet is here; it is renamed while it is open. NULL: it has. Not kept */
    bool readonly;
    enum block_cache cache;
    /* Open without locking: another machine has it until block_lock(). Of a disk on a server it is only seen that it is there. */
    bool unlocked;
    /* What that machine knows of it: bytes (0: not known), whether it discards. A file of another size is refused. */
    uint64_t size;
    bool can_discard;
    /* NBD: folder of certificates for nbds (NULL: libnbd's own); how long requests wait for a server that is away, in seconds. */
    const char *tls;
    unsigned reconnect_s;
};

#define BLOCK_RECONNECT_S 30u   /* when nothing else is said */

/* Whether a path is the URI of a disk on a server: nbd://HOST[:PORT]/EXPORT, nbds://…, nbd+unix:///EXPORT?socket=PATH, nbds+unix. */
bool block_is_uri(const char *path);

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
 * -EINVAL (not a regular file or block device, empty, or not a multiple of 512 bytes). A server that does not answer is waited for for 5 s.
 */
int block_open(struct loop *loop, const struct block_options *opt, struct block **out);
/* Waits for what is in flight (its done() runs before), syncs unless cache=unsafe or read-only, closes. */
void block_close(struct block *b);
/*
 * Makes an overlay (overlay.h has the format): a disk of size bytes that holds what is written to it, on top of base, which
 * from then on must not change: a path, relative to the overlay's folder or absolute. 0 or a negative errno (silent).
 */
int block_overlay_create(int dirfd, const char *name, const char *base, uint64_t size);

/* The size of the disk that the raw image or overlay name holds. 0 or a negative errno (silent). */
int block_image_size(int dirfd, const char *name, uint64_t *size);

/*
 * Copies the disk as it is at one moment into a new file, while it is used: what has not been copied yet is copied
 * before it is written over. One copy at a time. A disk on a server is read through its connection: the event loop has to run meanwhile.
 *
 * block_save_begin() is the moment: nothing is in flight (block_drain()). It takes fd over. Where the file system can share
 * blocks, the copy is complete at once. Once *cancel is true it ends soon, with -ECANCELED. 0 or a negative errno (logged). Machine lock held.
 * block_save_wait() waits for the copy, without the lock; *bytes: how many were copied (a hole is not). 0, or the errno (logged)
 * of the first error; the disk itself is unharmed.
 * block_save_end() follows, with the machine lock held. Syncing fd is block_save_wait()'s.
 */
int block_save_begin(struct block *b, int fd, const _Atomic bool *cancel);
int block_save_wait(struct block *b, uint64_t *bytes);
void block_save_end(struct block *b);
/* Whether it is a file or device of this host, not a disk on a server. */
bool block_is_local(const struct block *b);
/* Whether the disk is an overlay: a copy of it needs the files below it. */
bool block_is_overlay(const struct block *b);
/* Hands what was written to the host's disk, so that a copy does not have to. Any thread; errors are the flushes' to tell. */
void block_presync(struct block *b);
/*
 * Noting which parts were written, for a copy that is made while the disk is used (not of disks on servers). Bitmaps have a bit for
 * each BLOCK_DIRTY_GRANULE bytes, lowest bit first. Machine lock held, except where said. start: 0, -EBUSY, -ENOMEM.
 */
#define BLOCK_DIRTY_GRANULE 65536u
int block_dirty_start(struct block *b);
void block_dirty_stop(struct block *b);
/* Adds what was written and noted since the last time. */
void block_dirty_fetch(struct block *b, uint64_t *bitmap);
/* Sets the bits of what may be other than zero. */
void block_contents(const struct block *b, uint64_t *bitmap);
/* Reading beside the guest, by a descriptor of one's own: -errno (logged). The reading itself, any thread: 0 or -errno (silent). */
int block_open_aside(const struct block *b);
int block_read_aside(struct block *b, int fd, uint64_t offset, void *buf, size_t len);
/*
 * A disk changes hands between two machines, as in a migration: block_unlock() hands what was written to the host's disk and gives the
 * lock up; nothing may be in flight or be submitted until block_lock() has succeeded. 0, or -EBUSY: another machine has
 * the lock (logged). A disk on a server has no lock: there the connection ends and begins. Machine lock held.
 */
void block_unlock(struct block *b);
int block_lock(struct block *b);
uint64_t block_size(const struct block *b);             /* bytes */
bool block_readonly(const struct block *b);
bool block_can_discard(const struct block *b);
/* False for cache=unsafe… flush still succeeds. */
bool block_writeback(const struct block *b);
void block_submit(struct block *b, struct block_request *req);
/* Wait until nothing is in flight; done() callbacks have run. Loop thread or lock holder. */
void block_drain(struct block *b);

#endif
