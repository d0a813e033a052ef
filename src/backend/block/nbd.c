/*
 * A disk on a server that speaks NBD, by libnbd: an engine whose parts are the protocol's commands.
 *
 * Machine lock held everywhere but in the connector: a thread that exists while there is no connection and makes a new one,
 * because looking up names and TLS's handshake take time. What was under way when a connection broke is sent again through the next
 * one; each command may be carried out twice, which does no harm. Commands that have waited for longer than the disk's
 * reconnect time fail, and later ones fail at once until the server is there again.
 *
 * libnbd's descriptor is in an epoll of our own, which the event loop watches: what it waits for changes all the time.
 */
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "backend/block/block_impl.h"
#include "backend/block/nbd_library.h"
#include "base/log.h"
#include "base/thread.h"
#include "base/util.h"

#define CONNECT_MS 5000u
#define HANDOVER_MS 1000u
#define RETRY_MS 500u
#define GREETING_MS 1500u
#define ERROR_MAX 256
/* Pieces of the guest's memory shorter than this are gathered. */
#define DIRECT_BYTES KIB(64)
#define GATHER_BYTES KIB(512)
#define MOST_BYTES MIB(4)
/* Lengths of trim and zero have 32 bits in the protocol. */
#define MOST_ZERO_BYTES MIB(1024)

struct command {
    struct nbd_disk *disk;
    struct block_io *io;        /* NULL: idle */
    struct command *next;       /* in disk->done or ->waiting */
    void *buffer;               /* gathered bytes, or zeroes; NULL: straight from or to the guest */
    uint64_t bytes, at;         /* of the command on its way; at: trim and zero: how far it is */
    bool in_flight;
    int error;
};

struct nbd_disk {
    struct block *block;
    char *tls;                  /* folder of certificates; NULL: libnbd's */
    uint64_t reconnect_ms;
    const struct nbd_library *nbd;
    struct nbd_handle *h;       /* NULL: no connection */
    int epoll;
    struct loop_fd *watch;
    uint32_t events;
    struct command command[BLOCK_DEPTH];
    struct command *done, *waiting, **waiting_tail;
    struct loop_call call;
    bool can_flush, can_trim, can_zero;
    bool failed;                /* the server has been away for too long */
    bool parting;               /* no new connection */

    pthread_t connector;
    bool connector_started;
    uint64_t lost_ms;
    pthread_mutex_t lock;       /* guards what follows; a leaf */
    pthread_cond_t changed;
    struct nbd_handle *fresh;   /* what the connector made */
    bool late;                  /* it has tried for too long */
    bool stop;
    char error[ERROR_MAX];      /* its last one */
};

static uint64_t now_ms(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

/* ---- connecting ---- */

/* libnbd's last error in this thread, without the name of its function. */
static void last_error(const struct nbd_disk *d, char error[ERROR_MAX])
{
    const char *text = d->nbd->get_error(), *colon = text && strncmp(text, "nbd_", 4) == 0 ? strstr(text, ": ") : NULL;

    snprintf(error, ERROR_MAX, "%s", colon ? colon + 2 : text ? text : "no connection");
}

/* A server whose host is gone is noticed by the kernel, not only by the next command. */
static void watch_peer(int fd)
{
    int on = 1, idle = 10, interval = 5, count = 3, timeout = 25000;

    /* Unix sockets know none of these, and need none. */
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof(idle));
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof(interval));
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &count, sizeof(count));
    setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &timeout, sizeof(timeout));
}

/* Whether what the server offers is the disk. Any thread. 0 or a negative errno with error. */
static int check_export(const struct nbd_disk *d, struct nbd_handle *h, uint64_t *size, char error[ERROR_MAX])
{
    const struct block *b = d->block;
    int64_t bytes = d->nbd->get_size(h), least = d->nbd->get_block_size(h, LIBNBD_SIZE_MINIMUM);

    if (bytes < 0) {
        last_error(d, error);
        return -EIO;
    }
    if (!b->readonly && d->nbd->is_read_only(h) == 1) {
        snprintf(error, ERROR_MAX, "the server lets nobody write; to use it without writing, add readonly=on");
        return -EROFS;
    }
    if (!bytes || bytes % 512 || least > 512) {
        snprintf(error, ERROR_MAX, "the server's disk has %lld bytes in blocks of %lld; a disk has a multiple of 512 bytes, in blocks of at most 512",
                 (long long)bytes, (long long)MAX(least, 1));
        return -EINVAL;
    }
    if (b->size && (uint64_t)bytes < b->size) {
        snprintf(error, ERROR_MAX, "the server's disk has %lld bytes, and the machine's has %llu: it is another one",
                 (long long)bytes, (unsigned long long)b->size);
        return -EINVAL;
    }
    *size = (uint64_t)bytes;
    return 0;
}

/* A connection that is being made. NULL: error and *err say why. */
static struct nbd_handle *connect_begin(const struct nbd_disk *d, char error[ERROR_MAX], int *err)
{
    struct nbd_handle *h = d->nbd->create();
    int r = h ? 0 : -1;

    if (!r && d->tls)
        r = d->nbd->set_tls_certificates(h, d->tls);
    if (!r)
        r = d->nbd->set_uri_allow_transports(h, LIBNBD_ALLOW_TRANSPORT_TCP | LIBNBD_ALLOW_TRANSPORT_UNIX);
    /* Bytes that an error leaves unread are not shown to anybody. */
    if (!r)
        r = d->nbd->set_pread_initialize(h, false);
    if (!r)
        r = d->nbd->aio_connect_uri(h, d->block->path);
    if (!r)
        return h;
    last_error(d, error);
    /* libnbd has no errno for what is wrong with the URI, as a host that nobody knows. */
    *err = d->nbd->get_errno() ? -d->nbd->get_errno() : -ENOENT;
    if (h)
        d->nbd->close(h);
    return NULL;
}

/* A connection that is ready. Bounded, and ends early when d->stop is set. Any thread. NULL: error and *err say why. */
static struct nbd_handle *connect_once(struct nbd_disk *d, uint64_t *size, char error[ERROR_MAX], int *err)
{
    uint64_t until = now_ms() + CONNECT_MS;
    struct nbd_handle *h = connect_begin(d, error, err);
    bool ready = false, stop = false;
    int r = 0;

    if (!h)
        return NULL;
    while (!r && !(ready = d->nbd->aio_is_ready(h) == 1) && !stop && now_ms() < until) {
        r = d->nbd->poll(h, 100) < 0 ? -1 : 0;
        pthread_mutex_lock(&d->lock);
        stop = d->stop;
        pthread_mutex_unlock(&d->lock);
    }
    *err = 0;
    if (r) {
        last_error(d, error);
        *err = d->nbd->get_errno() ? -d->nbd->get_errno() : -EIO;
    } else if (!ready) {
        snprintf(error, ERROR_MAX, "the server does not answer");
        *err = -ETIMEDOUT;
    } else {
        *err = check_export(d, h, size, error);
    }
    if (*err) {
        d->nbd->close(h);
        h = NULL;
    }
    return h;
}

static void say_goodbye(const struct nbd_disk *d, struct nbd_handle *h)
{
    if (d->nbd->aio_disconnect(h, 0) == 0)
        for (unsigned i = 0; i < 10 && d->nbd->aio_is_closed(h) != 1 && d->nbd->aio_is_dead(h) != 1; i++)
            if (d->nbd->poll(h, 20) < 0)
                break;
    d->nbd->close(h);
}

/* ---- looking whether it is there ---- */

/* How far a connection is on which the server speaks first. */
enum word { CONNECTING, WAITING, GREETED, CLOSED };

static enum word first_word(int fd)
{
    struct sockaddr_storage peer;
    socklen_t len = sizeof(peer);
    char byte;
    ssize_t n;

    if (fd < 0 || getpeername(fd, (struct sockaddr *)&peer, &len) < 0)
        return CONNECTING;
    n = recv(fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT);
    return n > 0 ? GREETED : n == 0 ? CLOSED : WAITING;
}

/*
 * Another machine uses the disk now, and this one will: whether there is such a server with such a disk. One that takes no more
 * clients while it has the other machine closes the connection without a word, or leaves it waiting; it is there. 0 or a negative errno
 * with error; -EAGAIN: it closed the connection, and perhaps without a word.
 */
static int probe_once(struct nbd_disk *d, char error[ERROR_MAX])
{
    uint64_t until = now_ms() + CONNECT_MS, size;
    enum word word = CONNECTING;
    bool ready = false;
    int err = 0, r = 0;
    struct nbd_handle *h = connect_begin(d, error, &err);

    if (!h)
        return err;
    while (!r && !(ready = d->nbd->aio_is_ready(h) == 1) && now_ms() < until) {
        struct pollfd p = { .fd = d->nbd->aio_get_fd(h), .events = POLLIN };
        enum word now = word == GREETED ? word : first_word(p.fd);

        if (now != word)
            until = now_ms() + (now == WAITING ? GREETING_MS : CONNECT_MS);
        word = now;
        if (word == CLOSED)
            break;
        /* libnbd would take the greeting, or what stands for it, away. */
        if (word == WAITING)
            poll(&p, 1, 100);
        else
            r = d->nbd->poll(h, 100) < 0 ? -1 : 0;
    }
    if (ready) {
        err = check_export(d, h, &size, error);
    } else if (r) {
        last_error(d, error);
        err = d->nbd->get_errno() ? -d->nbd->get_errno() : word == CONNECTING ? -EAGAIN : -EIO;
    } else if (word == CONNECTING || word == GREETED) {
        snprintf(error, ERROR_MAX, "the server does not answer");
        err = -ETIMEDOUT;
    }
    say_goodbye(d, h);
    return err;
}

static int probe(struct nbd_disk *d)
{
    char error[ERROR_MAX];
    int err = -EAGAIN;

    for (unsigned i = 0; i < 3 && err == -EAGAIN; i++)
        err = probe_once(d, error);
    if (err)
        log_error("disk %s: cannot open: %s", d->block->path, error);
    return err == -EAGAIN ? -EIO : err;
}

static void update_events(struct nbd_disk *d)
{
    unsigned direction = d->nbd->aio_get_direction(d->h);
    struct epoll_event e = { .events = (direction & LIBNBD_AIO_DIRECTION_READ ? EPOLLIN : 0) |
                                       (direction & LIBNBD_AIO_DIRECTION_WRITE ? EPOLLOUT : 0) };

    if (e.events != d->events)
        epoll_ctl(d->epoll, EPOLL_CTL_MOD, d->nbd->aio_get_fd(d->h), &e);
    d->events = e.events;
}

/* The connection is used from here on. */
static void adopt(struct nbd_disk *d, struct nbd_handle *h)
{
    struct epoll_event e = { .events = EPOLLIN };

    d->h = h;
    d->events = EPOLLIN;
    d->can_flush = d->nbd->can_flush(h) == 1;
    d->can_trim = d->nbd->can_trim(h) == 1;
    d->can_zero = d->nbd->can_zero(h) == 1;
    watch_peer(d->nbd->aio_get_fd(h));
    epoll_ctl(d->epoll, EPOLL_CTL_ADD, d->nbd->aio_get_fd(h), &e);
    update_events(d);
}

static void *connector_main(void *opaque)
{
    struct nbd_disk *d = opaque;
    char error[ERROR_MAX];
    uint64_t size;
    int err;

    pthread_mutex_lock(&d->lock);
    while (!d->stop && !d->fresh) {
        struct timespec until;
        struct nbd_handle *h;

        pthread_mutex_unlock(&d->lock);
        h = connect_once(d, &size, error, &err);
        pthread_mutex_lock(&d->lock);
        d->fresh = h;
        if (!h)
            memcpy(d->error, error, sizeof(error));
        if (!h && !d->late)
            d->late = now_ms() - d->lost_ms >= d->reconnect_ms;
        if (h || d->late)
            loop_schedule(d->block->loop, &d->call);
        pthread_cond_broadcast(&d->changed);
        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_nsec += (long)RETRY_MS * 1000000;
        until.tv_sec += until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
        while (!d->stop && !d->fresh && pthread_cond_timedwait(&d->changed, &d->lock, &until) == 0)
            ;
    }
    pthread_mutex_unlock(&d->lock);
    return NULL;
}

static void stop_connector(struct nbd_disk *d)
{
    pthread_mutex_lock(&d->lock);
    d->stop = true;
    pthread_cond_broadcast(&d->changed);
    pthread_mutex_unlock(&d->lock);
    if (d->connector_started)
        pthread_join(d->connector, NULL);
    d->connector_started = false;
    if (d->fresh)
        d->nbd->close(d->fresh);
    d->fresh = NULL;
    d->stop = d->late = false;
}

/* ---- commands ---- */

static void finish(struct nbd_disk *d, struct command *c, int error)
{
    c->error = error;
    c->next = d->done;
    d->done = c;
    loop_schedule(d->block->loop, &d->call);
}

static void enqueue(struct nbd_disk *d, struct command *c)
{
    c->in_flight = false;
    c->next = NULL;
    *d->waiting_tail = c;
    d->waiting_tail = &c->next;
}

/* From within libnbd, so nothing is done here but taking note. */
static int completed(void *opaque, int *error)
{
    struct command *c = opaque;

    if (!c->in_flight)
        return 1;
    c->in_flight = false;
    if (*error == ENOTCONN || *error == ESHUTDOWN)
        enqueue(c->disk, c);
    else
        finish(c->disk, c, *error);
    return 1;
}

static void lost(struct nbd_disk *d)
{
    last_error(d, d->error);
    epoll_ctl(d->epoll, EPOLL_CTL_DEL, d->nbd->aio_get_fd(d->h), NULL);
    d->nbd->close(d->h);
    d->h = NULL;
    for (unsigned i = 0; i < BLOCK_DEPTH; i++)
        if (d->command[i].in_flight)
            enqueue(d, &d->command[i]);
    if (d->parting)
        return;
    log_warn("disk %s: the connection broke; trying to get it again for %llu s, while requests wait", d->block->path,
             (unsigned long long)d->reconnect_ms / 1000);
    d->lost_ms = now_ms();
    d->connector_started = thread_start(&d->connector, 0, connector_main, d) == 0;
    if (!d->connector_started) {
        d->late = true;
        loop_schedule(d->block->loop, &d->call);
    }
}

static void check_alive(struct nbd_disk *d)
{
    /* A server that shuts down says so to a command, which then waits for another connection. */
    if (d->h && (d->waiting || d->nbd->aio_is_dead(d->h) == 1 || d->nbd->aio_is_closed(d->h) == 1))
        lost(d);
    else if (d->h)
        update_events(d);
}

/* Chooses what of the part one command does, and gathers what it writes. 0 or a negative errno. */
static int prepare(struct command *c)
{
    struct block_io *io = c->io;
    uint64_t sum = 0, n = 0;

    if (io->part == PART_ZERO && !c->disk->can_zero && !c->buffer) {
        c->buffer = calloc(1, GATHER_BYTES);
        return c->buffer ? 0 : -ENOMEM;
    }
    if (io->part != PART_READ && io->part != PART_WRITE)
        return 0;
    if (io->iovcnt == 1 || io->iov[0].iov_len >= DIRECT_BYTES) {
        c->bytes = MIN(io->iov[0].iov_len, MOST_BYTES);
        return 0;
    }
    for (unsigned i = 0; i < io->iovcnt; i++)
        sum += io->iov[i].iov_len;
    c->bytes = MIN(sum, GATHER_BYTES);
    c->buffer = malloc(c->bytes);
    if (!c->buffer)
        return -ENOMEM;
    for (unsigned i = 0; io->part == PART_WRITE && n < c->bytes; i++) {
        uint64_t here = MIN(io->iov[i].iov_len, c->bytes - n);

        memcpy((uint8_t *)c->buffer + n, io->iov[i].iov_base, here);
        n += here;
    }
    return 0;
}

static void scatter(const struct command *c)
{
    const struct block_io *io = c->io;
    uint64_t n = 0;

    for (unsigned i = 0; c->buffer && n < c->bytes; i++) {
        uint64_t here = MIN(io->iov[i].iov_len, c->bytes - n);

        memcpy(io->iov[i].iov_base, (uint8_t *)c->buffer + n, here);
        n += here;
    }
}

/* Sends it to a server that is there. */
static void send_command(struct nbd_disk *d, struct command *c)
{
    struct block_io *io = c->io;
    /* Other parts have no iovec of their own. */
    bool moves = io->part == PART_READ || io->part == PART_WRITE;
    void *data = c->buffer || !moves ? c->buffer : io->iov[0].iov_base;
    nbd_completion_callback done = { .callback = completed, .user_data = c };
    uint64_t at = io->offset + c->at;
    int64_t r = 0;

    if ((io->part == PART_SYNC && !d->can_flush) || (io->part == PART_DISCARD && !d->can_trim)) {
        finish(d, c, 0);
        return;
    }
    c->in_flight = true;
    switch (io->part) {
    case PART_READ:
        r = d->nbd->aio_pread(d->h, data, c->bytes, at, done, 0);
        break;
    case PART_WRITE:
        r = d->nbd->aio_pwrite(d->h, data, c->bytes, at, done, 0);
        break;
    case PART_SYNC:
        r = d->nbd->aio_flush(d->h, done, 0);
        break;
    case PART_DISCARD:
        c->bytes = MIN(io->len - c->at, MOST_ZERO_BYTES);
        r = d->nbd->aio_trim(d->h, c->bytes, at, done, 0);
        break;
    case PART_ZERO:
        c->bytes = MIN(io->len - c->at, c->buffer ? GATHER_BYTES : MOST_ZERO_BYTES);
        r = c->buffer ? d->nbd->aio_pwrite(d->h, c->buffer, c->bytes, at, done, 0)
                      : d->nbd->aio_zero(d->h, c->bytes, at, done, io->req->may_unmap ? 0 : LIBNBD_CMD_FLAG_NO_HOLE);
        break;
    }
    if (r >= 0 || !c->in_flight)
        return;
    /* It was not taken: the connection has broken, or the command is one that this server does not do. */
    c->in_flight = false;
    if (d->nbd->aio_is_ready(d->h) == 1 || d->nbd->aio_is_processing(d->h) == 1)
        finish(d, c, d->nbd->get_errno() ? d->nbd->get_errno() : EIO);
    else
        enqueue(d, c);
}

/* Sends it, or what comes next of it; perhaps later. */
static void issue(struct nbd_disk *d, struct command *c)
{
    if (d->h)
        send_command(d, c);
    else if (d->failed || d->parting)
        finish(d, c, EIO);
    else
        enqueue(d, c);
}

static void nbd_start(struct block *b, struct block_io *io)
{
    struct nbd_disk *d = b->engine_data;
    struct command *c = &d->command[io - b->io];
    int err;

    *c = (struct command){ .disk = d, .io = io };
    err = prepare(c);
    if (err)
        finish(d, c, -err);
    else
        issue(d, c);
    check_alive(d);
}

/* Tells of one command that is done, or goes on with it. */
static void conclude(struct nbd_disk *d, struct command *c)
{
    struct block_io *io = c->io;

    if (!c->error && (io->part == PART_DISCARD || io->part == PART_ZERO) && (c->at += c->bytes) < io->len) {
        issue(d, c);
        return;
    }
    if (!c->error && io->part == PART_READ)
        scatter(c);
    io->result = c->error ? -c->error : io->part == PART_READ || io->part == PART_WRITE ? (int64_t)c->bytes : 0;
    free(c->buffer);
    c->buffer = NULL;
    c->io = NULL;
    block_part_done(d->block, io);
}

/* True: something was reported. A done() may drain, so may get here again. */
static bool reap(struct nbd_disk *d)
{
    bool any = false;

    while (d->done) {
        struct command *c = d->done;

        d->done = c->next;
        conclude(d, c);
        any = true;
    }
    check_alive(d);
    return any;
}

/*
 * What epoll says of the connection. libnbd is told of one thing at a time and of nothing that is not so: a read that finds nothing to
 * read makes it forget that it has more to write.
 */
static void read_and_write(struct nbd_disk *d, uint32_t events)
{
    /* Its errors are the connection's end, which check_alive() sees. */
    if (d->h && events & (EPOLLIN | EPOLLHUP))
        d->nbd->aio_notify_read(d->h);
    else if (d->h && events & (EPOLLOUT | EPOLLERR))
        d->nbd->aio_notify_write(d->h);
    check_alive(d);
}

static void ready(void *opaque, int fd, short revents)
{
    struct nbd_disk *d = opaque;
    struct epoll_event e;

    if (epoll_wait(d->epoll, &e, 1, 0) == 1)
        read_and_write(d, e.events);
    reap(d);
}

/* What the connector has to say. */
static void hear_connector(struct nbd_disk *d)
{
    struct nbd_handle *fresh;
    struct command *c;
    bool late;

    pthread_mutex_lock(&d->lock);
    fresh = d->fresh;
    d->fresh = NULL;
    late = d->late && !d->failed;
    /* The connector ends once it has handed a connection over. */
    d->stop = d->stop || fresh;
    pthread_mutex_unlock(&d->lock);
    if (d->h || (!fresh && !late))
        return;
    c = d->waiting;
    d->waiting = NULL;
    d->waiting_tail = &d->waiting;
    if (fresh) {
        stop_connector(d);
        log_warn("disk %s: connected again after %llu ms", d->block->path, (unsigned long long)(now_ms() - d->lost_ms));
        d->failed = false;
        adopt(d, fresh);
    } else {
        log_error("disk %s: the server is away for %llu s (%s): the guest gets I/O errors until it is there again", d->block->path,
                  (unsigned long long)(now_ms() - d->lost_ms) / 1000, d->error);
        d->failed = true;
    }
    while (c) {
        struct command *next = c->next;

        issue(d, c);
        c = next;
    }
    check_alive(d);
}

static void called(void *opaque)
{
    hear_connector(opaque);
    reap(opaque);
}

static void nbd_wait(struct block *b)
{
    struct nbd_disk *d = b->engine_data;

    while (!reap(d)) {
        if (d->h) {
            struct epoll_event e;

            if (epoll_wait(d->epoll, &e, 1, -1) == 1)
                read_and_write(d, e.events);
        } else {
            pthread_mutex_lock(&d->lock);
            while (d->connector_started && !d->fresh && !(d->late && !d->failed) && !d->failed)
                pthread_cond_wait(&d->changed, &d->lock);
            pthread_mutex_unlock(&d->lock);
            hear_connector(d);
        }
    }
}

/* ---- life ---- */

static int nbd_attach(struct block *b)
{
    struct nbd_disk *d = b->engine_data;
    char error[ERROR_MAX];
    struct nbd_handle *h;
    uint64_t size;
    int err;

    if (d->h || d->connector_started)
        return 0;
    h = connect_once(d, &size, error, &err);
    /* A server that takes one client only may not have noticed yet that the other machine is gone. */
    for (uint64_t until = now_ms() + HANDOVER_MS; !h && b->unlocked && now_ms() < until;) {
        nanosleep(&(struct timespec){ .tv_nsec = 20000000 }, NULL);
        h = connect_once(d, &size, error, &err);
    }
    if (!h) {
        log_error("disk %s: cannot open: %s", b->path, error);
        return err;
    }
    b->size = b->size ? b->size : size;
    d->parting = d->failed = false;
    adopt(d, h);
    return 0;
}

struct flush {
    bool done;
    int status;
};

static void flushed(void *opaque, int status)
{
    struct flush *f = opaque;

    f->done = true;
    f->status = status;
}

static int nbd_sync(struct block *b)
{
    struct flush f = { 0 };
    struct block_request req = { .op = BLOCK_FLUSH, .done = flushed, .opaque = &f };

    block_submit(b, &req);
    block_drain(b);
    return f.status;
}

/* Nothing is under way. */
static void nbd_detach(struct block *b)
{
    struct nbd_disk *d = b->engine_data;

    d->parting = true;
    stop_connector(d);
    if (!d->h)
        return;
    epoll_ctl(d->epoll, EPOLL_CTL_DEL, d->nbd->aio_get_fd(d->h), NULL);
    say_goodbye(d, d->h);
    d->h = NULL;
}

static void nbd_close_disk(struct block *b)
{
    struct nbd_disk *d = b->engine_data;

    if (!d)
        return;
    nbd_detach(b);
    loop_cancel(b->loop, &d->call);
    loop_fd_remove(d->watch);
    if (d->epoll >= 0)
        close(d->epoll);
    pthread_mutex_destroy(&d->lock);
    pthread_cond_destroy(&d->changed);
    free(d->tls);
    free(d);
    b->engine_data = NULL;
}

int block_nbd_open(struct block *b, const struct block_options *opt)
{
    struct nbd_disk *d = calloc(1, sizeof(*d));
    pthread_condattr_t monotonic;
    int err = -ENOMEM;

    if (!d)
        return -ENOMEM;
    b->engine = &block_engine_nbd;
    b->engine_data = d;
    b->alignment = 1;
    d->block = b;
    d->reconnect_ms = (uint64_t)opt->reconnect_s * 1000;
    d->call = (struct loop_call){ .fn = called, .opaque = d };
    d->waiting_tail = &d->waiting;
    d->parting = true;
    pthread_mutex_init(&d->lock, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&d->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    d->epoll = epoll_create1(EPOLL_CLOEXEC);
    d->nbd = nbd_library();
    if (opt->tls)
        d->tls = strdup(opt->tls);
    if (d->epoll >= 0 && d->nbd && (d->tls || !opt->tls))
        d->watch = loop_fd_add(b->loop, d->epoll, POLLIN, ready, d);
    if (d->watch && opt->unlocked) {
        /* Another machine uses it, and the server may take one client only: no connection is kept. */
        b->size = opt->size;
        b->can_discard = !b->readonly && opt->can_discard;
        err = b->size ? probe(d) : -EINVAL;
        if (!b->size)
            log_error("disk %s: its size is not known before it is this machine's", b->path);
    } else if (d->watch) {
        err = nbd_attach(b);
        b->can_discard = !err && !b->readonly && d->can_trim;
    } else if (!d->nbd) {
        err = -ENOENT;
    }
    if (err)
        nbd_close_disk(b);
    return err;
}

const struct block_engine block_engine_nbd = {
    .name = "nbd",
    .close = nbd_close_disk,
    .start = nbd_start,
    .wait = nbd_wait,
    .attach = nbd_attach,
    .detach = nbd_detach,
    .sync = nbd_sync,
};
