/*
 * The core of all consoles: buffers between the device and two descriptors.
 *
 * Output goes into a buffer and is written by the event loop. The first byte after a rest is written
 * at once, what follows in the next PACE_NS together: a guest that prints byte by byte does not wake the
 * loop for each. Machine lock held everywhere; everything but console_write() and console_can_write()
 * runs in the event loop's thread or before it runs.
 */
#include "backend/console/console.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "backend/console/console_impl.h"
#include "base/log.h"
#include "base/util.h"

#define ESCAPE_KEY        0x1d /* Ctrl-] */
#define CLOSE_PATIENCE_MS 1000
#define PACE_NS           2000000

static int64_t now_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000000000 + ts.tv_nsec;
}

static unsigned queue_used(const struct byte_queue *q)
{
    return q->tail - q->head;
}

static unsigned queue_room(const struct byte_queue *q)
{
    return q->size - queue_used(q);
}

static void queue_put(struct byte_queue *q, const uint8_t *p, unsigned n)
{
    unsigned at = q->tail & (q->size - 1), first = MIN(n, q->size - at);
    memcpy(q->data + at, p, first);
    memcpy(q->data, p + first, n - first);
    q->tail += n;
}

/* The bytes at the head that lie together. */
static unsigned queue_peek(const struct byte_queue *q, const uint8_t **p)
{
    unsigned at = q->head & (q->size - 1);
    *p = q->data + at;
    return MIN(queue_used(q), q->size - at);
}

/* Descriptor input and output that never blocks, whatever the descriptor is. */

static bool ready_now(int fd, short events)
{
    struct pollfd p = {.fd = fd, .events = events};
    return poll(&p, 1, 0) > 0;
}

static ssize_t read_some(int fd, enum console_io io, void *buf, size_t n)
{
    ssize_t r;
    do {
        if (io == CONSOLE_IO_SOCKET) {
            r = recv(fd, buf, n, MSG_DONTWAIT);
        } else if (io == CONSOLE_IO_POLL && !ready_now(fd, POLLIN)) {
            r = -1;
            errno = EAGAIN;
        } else {
            r = read(fd, buf, n);
        }
    } while (r < 0 && errno == EINTR);
    return r;
}

static ssize_t write_some(int fd, enum console_io io, const void *buf, size_t n)
{
    ssize_t r;
    do {
        if (io == CONSOLE_IO_SOCKET) {
            r = send(fd, buf, n, MSG_DONTWAIT | MSG_NOSIGNAL);
        } else if (io == CONSOLE_IO_POLL && !ready_now(fd, POLLOUT)) {
            r = -1;
            errno = EAGAIN;
        } else {
            /* What poll() promises to take without blocking: at least this much. */
            r = write(fd, buf, io == CONSOLE_IO_POLL ? MIN(n, 256) : n);
        }
    } while (r < 0 && errno == EINTR);
    return r;
}

static void hangup(struct console *c)
{
    console_detach(c);
    if (c->kind->hangup)
        c->kind->hangup(c);
}

/* Output. */

static void out_ready(void *opaque, int fd, short revents);

static void out_failed(struct console *c, int err)
{
    if (c->kind->reader_optional) {
        hangup(c);
        return;
    }
    log_warn("console %s: cannot write: %s; its output is dropped from here on", c->kind->name,
             strerror(err));
    loop_fd_remove(c->out_watch);
    c->out_watch = NULL;
    c->out_broken = true;
    c->out.head = c->out.tail;
    if (c->was_full)
        loop_schedule(c->loop, &c->flush_call);
}

/* Writes what the host takes now. */
static void flush(struct console *c)
{
    while (c->out_fd >= 0 && !c->out_broken && queue_used(&c->out)) {
        const uint8_t *p;
        unsigned n = queue_peek(&c->out, &p);
        ssize_t r = write_some(c->out_fd, c->out_io, p, n);
        if (r > 0) {
            c->out.head += (unsigned)r;
        } else if (r < 0 && errno == EAGAIN) {
            if (!c->out_watch)
                c->out_watch = loop_fd_add(c->loop, c->out_fd, POLLOUT, out_ready, c);
            return;
        } else {
            out_failed(c, r < 0 ? errno : EIO);
            return;
        }
    }
    loop_fd_remove(c->out_watch);
    c->out_watch = NULL;
}

static void flush_and_tell(struct console *c)
{
    flush(c);
    if (c->was_full && (c->out_fd < 0 || queue_used(&c->out) <= CONSOLE_OUT_SIZE / 4)) {
        c->was_full = false;
        if (c->ops && c->ops->writable)
            c->ops->writable(c->opaque);
    }
}

static void out_ready(void *opaque, int fd, short revents)
{
    flush_and_tell(opaque);
}

static void flush_called(void *opaque)
{
    struct console *c = opaque;
    c->flushed_ns = now_ns();
    flush_and_tell(c);
}

static void pace_over(void *opaque, int fd, short revents)
{
    struct console *c = opaque;
    uint64_t count;
    if (read(fd, &count, sizeof(count)) < 0)
        return;
    c->paced = false;
    flush_called(c);
}

/* Sees to it that the loop writes what is there: soon, or at once if much is there. */
static void flush_later(struct console *c)
{
    bool much = c->was_full || queue_used(&c->out) >= CONSOLE_OUT_SIZE / 8;
    if (c->paced && !much)
        return;
    int64_t due = c->flushed_ns + PACE_NS;
    if (!much && now_ns() < due) {
        struct itimerspec its = {.it_value = {due / 1000000000, due % 1000000000}};
        c->paced = timerfd_settime(c->pace_fd, TFD_TIMER_ABSTIME, &its, NULL) == 0;
    }
    if (!c->paced || much)
        loop_schedule(c->loop, &c->flush_call);
}

void console_write(struct console *c, const void *data, size_t len)
{
    if (!c->out.data)
        return;
    history_write(c->history, data, len);
    if (c->out_broken)
        return;
    const uint8_t *p = data;
    while (len) {
        if (queue_room(&c->out) == 0)
            flush(c);
        /* The writer did not heed can_write(), or there is no reader: the newest matters most. */
        if (queue_room(&c->out) == 0)
            c->out.head += (unsigned)MIN(len, CONSOLE_OUT_SIZE / 8);
        unsigned n = (unsigned)MIN(len, queue_room(&c->out));
        queue_put(&c->out, p, n);
        p += n;
        len -= n;
    }
    if (c->out_fd >= 0 && !c->out_watch)
        flush_later(c);
}

bool console_can_write(const struct console *c)
{
    if (!c->out.data || c->out_broken || c->out_fd < 0 ||
        queue_used(&c->out) < CONSOLE_OUT_SIZE / 2)
        return true;
    ((struct console *)c)->was_full = true;
    return false;
}

/* Input. */

static void in_ready(void *opaque, int fd, short revents);

static void watch_input(struct console *c)
{
    /* A watch without events would still report hang-ups, for ever: none at all while input is not
     * wanted. */
    bool want = c->in_fd >= 0 && !c->in_eof && (c->in_terminal || queue_room(&c->in) > 0);
    if (want && !c->in_watch) {
        c->in_watch = loop_fd_add(c->loop, c->in_fd, POLLIN, in_ready, c);
    } else if (!want) {
        loop_fd_remove(c->in_watch);
        c->in_watch = NULL;
    }
}

/* Moves what others have typed into the queue; true: they wait for room and there is some. */
static bool take_fed(struct console *c)
{
    pthread_mutex_lock(&c->feed_lock);
    while (queue_used(&c->fed) && queue_room(&c->in)) {
        const uint8_t *p;
        unsigned n = queue_peek(&c->fed, &p);
        n = MIN(n, queue_room(&c->in));
        queue_put(&c->in, p, n);
        c->fed.head += n;
    }
    bool room = c->feed_refused && queue_room(&c->fed);
    c->feed_refused &= !room;
    pthread_mutex_unlock(&c->feed_lock);
    return room;
}

static void deliver(struct console *c)
{
    if (c->delivering || !c->ops)
        return;
    bool tell = c->history && take_fed(c);
    c->delivering = true;
    while (queue_used(&c->in)) {
        const uint8_t *p;
        unsigned n = queue_peek(&c->in, &p);
        size_t taken = c->ops->receive ? c->ops->receive(c->opaque, p, n) : n;
        c->in.head += (unsigned)MIN(taken, n);
        if (taken < n)
            break;
        tell |= c->history && take_fed(c);
    }
    c->delivering = false;
    watch_input(c);
    if (tell)
        history_touch(c->history);
}

static void feed_called(void *opaque)
{
    deliver(opaque);
}

struct history *console_history(struct console *c)
{
    return c->history;
}

size_t console_feed(struct console *c, const void *data, size_t len)
{
    if (!c->history)
        return 0;
    pthread_mutex_lock(&c->feed_lock);
    unsigned n = (unsigned)MIN(len, queue_room(&c->fed));
    queue_put(&c->fed, data, n);
    c->feed_refused |= n < len;
    pthread_mutex_unlock(&c->feed_lock);
    loop_schedule(c->loop, &c->feed_call);
    return n;
}

static void escape_pressed(struct console *c)
{
    if (c->escape)
        c->escape(c->escape_opaque);
    else if (c->ops && c->ops->escape)
        c->ops->escape(c->opaque);
}

/* Takes the escape key out of buf and returns how many bytes are left. */
static unsigned take_escape(uint8_t *buf, unsigned n, bool *pressed)
{
    unsigned kept = 0;
    for (unsigned i = 0; i < n; i++) {
        if (buf[i] == ESCAPE_KEY)
            *pressed = true;
        else
            buf[kept++] = buf[i];
    }
    return kept;
}

static void in_ready(void *opaque, int fd, short revents)
{
    struct console *c = opaque;
    uint8_t buf[4096];
    size_t want = c->in_terminal ? sizeof(buf) : MIN(sizeof(buf), queue_room(&c->in));
    ssize_t r = read_some(fd, c->in_io, buf, want);
    if (r < 0 && errno == EAGAIN)
        return;
    if (r <= 0) {
        if (c->kind->reader_optional) {
            hangup(c);
        } else {
            if (r < 0)
                log_warn("console %s: cannot read: %s", c->kind->name, strerror(errno));
            c->in_eof = true;
            watch_input(c);
        }
        return;
    }
    unsigned n = (unsigned)r;
    bool pressed = false;
    if (c->in_terminal) {
        n = take_escape(buf, n, &pressed);
        /* Somebody types into a guest that does not listen: what does not fit is lost, but Ctrl-]
         * works. */
        n = MIN(n, queue_room(&c->in));
    }
    queue_put(&c->in, buf, n);
    deliver(c);
    watch_input(c);
    if (pressed)
        escape_pressed(c);
}

static void kick_called(void *opaque)
{
    deliver(opaque);
}

void console_kick(struct console *c)
{
    /* Not from here: the device may be in the middle of something. */
    bool waits = queue_used(&c->in);
    if (c->history && !waits) {
        pthread_mutex_lock(&c->feed_lock);
        waits = queue_used(&c->fed);
        pthread_mutex_unlock(&c->feed_lock);
    }
    if (waits && !c->delivering)
        loop_schedule(c->loop, &c->kick_call);
}

void console_connect(struct console *c, const struct console_ops *ops, void *opaque)
{
    c->ops = ops;
    c->opaque = opaque;
    console_kick(c);
}

void console_set_escape(struct console *c, void (*escape)(void *opaque), void *opaque)
{
    c->escape = escape;
    c->escape_opaque = opaque;
}

void console_set_resized(struct console *c, void (*resized)(void *opaque), void *opaque)
{
    c->resized = resized;
    c->resized_opaque = opaque;
}

int console_attach(struct console *c, int in_fd, enum console_io in_io, int out_fd,
                   enum console_io out_io)
{
    c->in_fd = in_fd;
    c->in_io = in_io;
    c->out_fd = out_fd;
    c->out_io = out_io;
    c->in_eof = c->out_broken = false;
    watch_input(c);
    if (in_fd >= 0 && !c->in_watch)
        return -ENOMEM;
    flush_and_tell(c);
    return 0;
}

void console_detach(struct console *c)
{
    loop_fd_remove(c->in_watch);
    loop_fd_remove(c->out_watch);
    c->in_watch = c->out_watch = NULL;
    if (c->in_fd >= 0)
        close(c->in_fd);
    if (c->out_fd >= 0)
        close(c->out_fd);
    c->in_fd = c->out_fd = -1;
    /* Nothing holds the guest back now. */
    if (c->was_full)
        loop_schedule(c->loop, &c->flush_call);
}

/* The kinds that need no file of their own. */

static const struct console_kind none_kind = {.name = "none"};
static const struct console_kind file_kind = {.name = "file"};

static int console_file_open(struct console *c, const char *path)
{
    c->kind = &file_kind;
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOCTTY | O_NONBLOCK, 0644);
    if (fd < 0) {
        int err = errno;
        log_error("console file %s: cannot open: %s%s", path, strerror(err),
                  err == ENXIO ? " (a pipe needs its reader first)" : "");
        return -err;
    }
    return console_attach(c, -1, CONSOLE_IO_PLAIN, fd, CONSOLE_IO_PLAIN);
}

static bool alloc_queue(struct byte_queue *q, unsigned size)
{
    q->size = size;
    q->data = malloc(size);
    return q->data != NULL;
}

int console_open(struct loop *loop, const char *spec, struct console **out)
{
    *out = NULL;
    struct console *c = calloc(1, sizeof(*c));
    if (!c) {
        log_error("out of memory");
        return -ENOMEM;
    }
    c->kind = &none_kind;
    c->loop = loop;
    c->in_fd = c->out_fd = c->listen_fd = c->timer_fd = c->resize_fd = c->pace_fd = -1;
    c->flush_call = (struct loop_call){.fn = flush_called, .opaque = c};
    c->kick_call = (struct loop_call){.fn = kick_called, .opaque = c};
    c->feed_call = (struct loop_call){.fn = feed_called, .opaque = c};
    pthread_mutex_init(&c->feed_lock, NULL);

    int ret;
    const char *path = strchr(spec, ':');
    path = path && path[1] ? path + 1 : NULL;
    if (strcmp(spec, "none") == 0) {
        *out = c;
        return 0;
    }
    c->history = history_create();
    if (!c->history || !alloc_queue(&c->in, CONSOLE_IN_SIZE) ||
        !alloc_queue(&c->out, CONSOLE_OUT_SIZE) || !alloc_queue(&c->fed, CONSOLE_FEED_SIZE)) {
        log_error("out of memory");
        ret = -ENOMEM;
        goto out;
    }
    c->pace_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    c->pace_watch = c->pace_fd < 0 ? NULL : loop_fd_add(loop, c->pace_fd, POLLIN, pace_over, c);
    if (!c->pace_watch) {
        log_error("console: cannot make its timer: %s", c->pace_fd < 0 ? strerror(errno) : "out of memory");
        ret = -ENOMEM;
        goto out;
    }
    /* A reader of standard output that goes away is an error of write(), not the end of the
     * machine. */
    signal(SIGPIPE, SIG_IGN);
    if (strcmp(spec, "stdio") == 0)
        ret = console_stdio_open(c);
    else if (strcmp(spec, "pty") == 0)
        ret = console_pty_open(c);
    else if (strncmp(spec, "file:", 5) == 0 && path)
        ret = console_file_open(c, path);
    else if (strncmp(spec, "unix:", 5) == 0 && path)
        ret = console_unix_open(c, path);
    else {
        log_error("console '%s': give stdio, pty, file:PATH, unix:PATH or none", spec);
        ret = -EINVAL;
    }
out:
    if (ret) {
        console_close(c);
        return ret;
    }
    *out = c;
    return 0;
}

/* The last words of a guest are the ones people want to read: wait a little for a slow reader. */
static void flush_for_good(struct console *c)
{
    int64_t end = now_ns() + CLOSE_PATIENCE_MS * 1000000ll;
    while (c->out_fd >= 0 && !c->out_broken && queue_used(&c->out)) {
        flush(c);
        int64_t left_ms = (end - now_ns()) / 1000000;
        if (!c->out_watch || left_ms <= 0)
            return;
        struct pollfd p = {.fd = c->out_fd, .events = POLLOUT};
        poll(&p, 1, (int)left_ms);
    }
}

void console_close(struct console *c)
{
    if (!c)
        return;
    c->ops = NULL;
    c->was_full = false;
    flush_for_good(c);
    if (c->kind->close)
        c->kind->close(c);
    console_detach(c);
    loop_fd_remove(c->listen_watch);
    loop_fd_remove(c->timer_watch);
    loop_fd_remove(c->resize_watch);
    loop_fd_remove(c->pace_watch);
    if (c->pace_fd >= 0)
        close(c->pace_fd);
    if (c->listen_fd >= 0)
        close(c->listen_fd);
    if (c->timer_fd >= 0)
        close(c->timer_fd);
    loop_cancel(c->loop, &c->flush_call);
    loop_cancel(c->loop, &c->kick_call);
    loop_cancel(c->loop, &c->feed_call);
    pthread_mutex_destroy(&c->feed_lock);
    history_destroy(c->history);
    free(c->fed.data);
    free(c->path);
    free(c->in.data);
    free(c->out.data);
    free(c);
}
