/*
 * What the kinds of console share: two descriptors, a buffer each way, and what to do when the
 * other end goes away. Private to backend/console. Machine lock held everywhere.
 */
#ifndef RINGFORT_BACKEND_CONSOLE_IMPL_H
#define RINGFORT_BACKEND_CONSOLE_IMPL_H

#include <pthread.h>

#include "backend/console/console.h"
#include "backend/console/history.h"
#include "base/loop.h"

#define CONSOLE_OUT_SIZE 65536u /* output that waits for the host; a power of two */
#define CONSOLE_IN_SIZE  16384u /* input that waits for the guest; a power of two */

#define CONSOLE_FEED_SIZE 4096u /* input of console_feed() that waits for that; a power of two */

/* A byte queue of fixed size. head and tail count bytes for ever. */
struct byte_queue {
    uint8_t *data;
    unsigned size, head, tail;
};

enum console_io {
    CONSOLE_IO_PLAIN, /* the descriptor is non-blocking, or is a file and always takes everything */
    CONSOLE_IO_SOCKET, /* blocking for others who share it: MSG_DONTWAIT */
    CONSOLE_IO_POLL,   /* blocking for others who share it: poll before each small read or write */
};

struct console_kind {
    const char *name;
    /* No reader is an ordinary state: output is kept, the oldest is dropped when it gets too much.
     */
    bool reader_optional;
    /* The other end went away or failed. The core has dropped both watches already. NULL: nothing
     * to do. */
    void (*hangup)(struct console *c);
    /* Releases what the kind holds besides in_fd and out_fd. NULL: nothing. */
    void (*close)(struct console *c);
};

struct console {
    const struct console_kind *kind;
    struct loop *loop;
    int in_fd,
        out_fd; /* own descriptors, -1: none; console_detach() and console_close() close them */
    enum console_io in_io, out_io;
    bool in_terminal; /* Ctrl-] is looked for, and input is read even while the guest takes none */
    bool in_eof, out_broken;
    struct loop_fd *in_watch, *out_watch; /* out_watch: only while the host takes no more */
    struct byte_queue in, out;
    struct loop_call flush_call, kick_call;
    int pace_fd;            /* a timer: more output so soon after the last waits for it */
    struct loop_fd *pace_watch;
    int64_t flushed_ns;     /* CLOCK_MONOTONIC: when the loop last wrote */
    bool paced;             /* the timer runs */
    struct history *history; /* NULL: "none" */
    /* Input by console_feed() on its way into in. feed_lock is a leaf. */
    pthread_mutex_t feed_lock;
    struct byte_queue fed;
    bool feed_refused; /* somebody waits for room */
    struct loop_call feed_call;
    bool was_full; /* can_write() said false; writable() is owed */
    bool delivering;

    const struct console_ops *ops;
    void *opaque;
    void (*escape)(void *opaque);
    void *escape_opaque;
    void (*resized)(void *opaque);
    void *resized_opaque;

    /* The kinds' own. */
    int listen_fd, timer_fd, resize_fd; /* -1: none */
    struct loop_fd *listen_watch, *timer_watch, *resize_watch;
    char *path; /* of a socket, to be removed */
};

/* Starts using fds (which become the console's), either may be -1. */
int console_attach(struct console *c, int in_fd, enum console_io in_io, int out_fd,
                   enum console_io out_io);
/* Stops using and closes them; buffers stay. */
void console_detach(struct console *c);

/* Each sets up c for its kind and logs its own errors. 0 or a negative errno. */
int console_stdio_open(struct console *c);
int console_pty_open(struct console *c);
int console_unix_open(struct console *c, const char *path);

#endif
