/*
 * The user network: a NAT in this process by libslirp, without any privilege.
 *
 * The guest gets 10.0.2.15 by DHCP, its gateway and the host are 10.0.2.2, the name server is
 * 10.0.2.3; IPv6 is fec0::/64 likewise. Machine lock held everywhere.
 *
 * All of libslirp runs in the event loop's thread: what the guest sends is queued and handed over
 * there, so answers reach the device from the loop and never from within its own send().
 */
#include <arpa/inet.h>
#include <errno.h>
#include <linux/virtio_net.h>
#include <poll.h>
#include <slirp/libslirp.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "backend/net/frame_queue.h"
#include "backend/net/net.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/loop.h"
#include "base/util.h"

#define QUEUE_SIZE 524288u /* bytes, each way */

/*
 * The wire is this process: nothing limits a packet but IP itself. Few long packets cost a guest (whose
 * instructions may be emulated) far less than many short ones. A little below 64 KiB, in steps of 16.
 */
#define USER_MTU 65520

#define FEATURE(bit) (UINT64_C(1) << (bit))

/* One descriptor of libslirp's that the loop watches; indexed by the descriptor. */
struct watch {
    struct loop_fd *f;
    short revents;
    unsigned round; /* the last fill that wanted it */
};

struct slirp_timer {
    struct timer timer;
    struct net_user *net;
    SlirpTimerId id;
    void *opaque;
};

struct net_user {
    struct net net;
    struct loop *loop;
    struct clock *clock;
    Slirp *slirp;
    struct frame_queue to_slirp, to_guest;
    bool receive_ready, writer_waits;

    struct loop_hook hook;
    struct loop_call work_call;
    struct watch *watch;
    int watch_count; /* entries in watch */
    int *active;     /* descriptors with a watch */
    int active_count, active_size;
    unsigned round;
    bool stale; /* libslirp must be asked again what it waits for */
    bool any_ready;
    int64_t deadline_ms; /* when libslirp wants to run; INT64_MAX: no time */
};

static int64_t now_ms(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

/* Frames. */

static bool give_guest(struct net_user *u, const uint8_t *frame, size_t len)
{
    /* No wire, no damage: the guest need not check what libslirp has just computed. */
    struct net_header head = {.flags = VIRTIO_NET_HDR_F_DATA_VALID, .num_buffers = 1};
    struct iovec iov[2] = {{&head, sizeof(head)}, {(void *)frame, len}};
    return u->net.receive && u->net.receive(u->net.opaque, iov, 2);
}

static void deliver_queued(struct net_user *u)
{
    size_t len;
    const uint8_t *frame;
    while (u->receive_ready && (frame = frame_queue_peek(&u->to_guest, &len))) {
        if (!give_guest(u, frame, len)) {
            u->receive_ready = false;
            break;
        }
        frame_queue_pop(&u->to_guest);
    }
}

static ssize_t slirp_send_packet(const void *buf, size_t len, void *opaque)
{
    struct net_user *u = opaque;
    deliver_queued(u);
    if (u->receive_ready && give_guest(u, buf, len))
        return (ssize_t)len;
    u->receive_ready = false;
    /* When this is full as well the frame is lost: TCP sends it again, and others must expect it.
     */
    struct iovec iov = {(void *)buf, len};
    frame_queue_push(&u->to_guest, &iov, 1, 0);
    return (ssize_t)len;
}

static void work_called(void *opaque)
{
    struct net_user *u = opaque;
    deliver_queued(u);
    size_t len;
    const uint8_t *frame;
    while ((frame = frame_queue_peek(&u->to_slirp, &len))) {
        slirp_input(u->slirp, frame, (int)len);
        frame_queue_pop(&u->to_slirp);
        u->stale = true;
    }
    if (u->writer_waits) {
        u->writer_waits = false;
        if (u->net.writable)
            u->net.writable(u->net.opaque);
    }
}

static int user_send(struct net *net, const struct iovec *iov, unsigned iovcnt)
{
    struct net_user *u = container_of(net, struct net_user, net);
    size_t total = 0;
    for (unsigned i = 0; i < iovcnt; i++)
        if (__builtin_add_overflow(total, iov[i].iov_len, &total))
            return 0;
    /* The longest and the shortest frame that a guest can mean; others are dropped, as on a wire.
     */
    if (total < sizeof(struct net_header) + 14 || total > sizeof(struct net_header) + NET_MAX_FRAME)
        return 0;
    if (!frame_queue_push(&u->to_slirp, iov, iovcnt, sizeof(struct net_header))) {
        u->writer_waits = true;
        return -EAGAIN;
    }
    loop_schedule(u->loop, &u->work_call);
    return 0;
}

/* libslirp takes TCP segments of any length as they are; but it checks checksums, so they must be there. */
static uint64_t user_features(struct net *net)
{
    return FEATURE(VIRTIO_NET_F_HOST_TSO4) | FEATURE(VIRTIO_NET_F_HOST_TSO6) |
           FEATURE(VIRTIO_NET_F_HOST_ECN);
}

static void user_set_features(struct net *net, uint64_t features)
{
}

static void user_set_receive(struct net *net, bool ready)
{
    struct net_user *u = container_of(net, struct net_user, net);
    u->receive_ready = ready;
    if (ready && u->to_guest.frames)
        loop_schedule(u->loop, &u->work_call);
}

/* Descriptors. */

static void fd_ready(void *opaque, int fd, short revents)
{
    struct net_user *u = opaque;
    u->watch[fd].revents |= revents;
    u->any_ready = true;
}

static short to_poll(int events)
{
    return (short)((events & SLIRP_POLL_IN ? POLLIN : 0) | (events & SLIRP_POLL_OUT ? POLLOUT : 0) |
                   (events & SLIRP_POLL_PRI ? POLLPRI : 0));
}

static int from_poll(short revents)
{
    return (revents & POLLIN ? SLIRP_POLL_IN : 0) | (revents & POLLOUT ? SLIRP_POLL_OUT : 0) |
           (revents & POLLPRI ? SLIRP_POLL_PRI : 0) | (revents & POLLERR ? SLIRP_POLL_ERR : 0) |
           (revents & POLLHUP ? SLIRP_POLL_HUP : 0);
}

static bool grow(struct net_user *u, int fd)
{
    if (fd >= u->watch_count) {
        int count = MAX(fd + 1, 2 * u->watch_count);
        struct watch *w = realloc(u->watch, (size_t)count * sizeof(*w));
        if (!w)
            return false;
        memset(w + u->watch_count, 0, (size_t)(count - u->watch_count) * sizeof(*w));
        u->watch = w;
        u->watch_count = count;
    }
    if (u->active_count == u->active_size) {
        int size = MAX(16, 2 * u->active_size);
        int *a = realloc(u->active, (size_t)size * sizeof(*a));
        if (!a)
            return false;
        u->active = a;
        u->active_size = size;
    }
    return true;
}

/* The index that libslirp gets is the descriptor itself. */
static int want_fd(int fd, int events, void *opaque)
{
    struct net_user *u = opaque;
    if (fd < 0 || !grow(u, fd))
        return -1;
    struct watch *w = &u->watch[fd];
    if (!w->f) {
        w->f = loop_fd_add(u->loop, fd, to_poll(events), fd_ready, u);
        if (!w->f)
            return -1;
        w->revents = 0;
        u->active[u->active_count++] = fd;
    } else {
        loop_fd_set_events(w->f, to_poll(events));
    }
    w->round = u->round;
    return fd;
}

static int got_events(int index, void *opaque)
{
    struct net_user *u = opaque;
    return index < 0 || index >= u->watch_count || !u->watch[index].f
               ? 0
               : from_poll(u->watch[index].revents);
}

static void drop_active(struct net_user *u, int i)
{
    struct watch *w = &u->watch[u->active[i]];
    loop_fd_remove(w->f);
    *w = (struct watch){0};
    u->active[i] = u->active[--u->active_count];
}

/* libslirp is about to close fd, or has a new socket with the number of an old one. */
static void forget_fd(int fd, void *opaque)
{
    struct net_user *u = opaque;
    for (int i = 0; i < u->active_count; i++) {
        if (u->active[i] == fd) {
            drop_active(u, i);
            break;
        }
    }
    u->stale = true;
}

static void prepare(void *opaque, int *timeout_ms)
{
    struct net_user *u = opaque;
    int64_t now = now_ms();
    if (u->stale) {
        uint32_t wait = UINT32_MAX;
        u->round++;
        slirp_pollfds_fill(u->slirp, &wait, want_fd, u);
        /* A descriptor that is not wanted now must not be watched: its hang-up would wake us for
         * ever. */
        for (int i = u->active_count - 1; i >= 0; i--)
            if (u->watch[u->active[i]].round != u->round)
                drop_active(u, i);
        u->deadline_ms = wait == UINT32_MAX ? INT64_MAX : now + MAX(wait, 1);
        u->stale = false;
    }
    if (u->deadline_ms == INT64_MAX)
        return;
    int64_t left = MAX(u->deadline_ms - now, 0);
    if (*timeout_ms < 0 || left < *timeout_ms)
        *timeout_ms = (int)MIN(left, 60000);
}

static void dispatch(void *opaque)
{
    struct net_user *u = opaque;
    if (!u->any_ready && now_ms() < u->deadline_ms)
        return;
    slirp_pollfds_poll(u->slirp, 0, got_events, u);
    for (int i = 0; i < u->active_count; i++)
        u->watch[u->active[i]].revents = 0;
    u->any_ready = false;
    u->stale = true;
}

/* The other callbacks. */

static void slirp_guest_error(const char *msg, void *opaque)
{
    log_guest_error("user network: %s", msg);
}

static int64_t slirp_clock_ns(void *opaque)
{
    struct net_user *u = opaque;
    return (int64_t)clock_now(u->clock);
}

static void slirp_timer_fired(void *opaque)
{
    struct slirp_timer *t = opaque;
    slirp_handle_timer(t->net->slirp, t->id, t->opaque);
    t->net->stale = true;
}

static void *slirp_timer_new(SlirpTimerId id, void *cb_opaque, void *opaque)
{
    struct slirp_timer *t = calloc(1, sizeof(*t));
    if (!t) {
        log_error("out of memory");
        abort(); /* libslirp aborts as well; it happens at start only */
    }
    t->net = opaque;
    t->id = id;
    t->opaque = cb_opaque;
    timer_init(&t->timer, slirp_timer_fired, t);
    return t;
}

static void slirp_timer_free(void *timer, void *opaque)
{
    struct slirp_timer *t = timer;
    if (!t)
        return;
    timer_disarm(t->net->clock, &t->timer);
    free(t);
}

static void slirp_timer_mod(void *timer, int64_t expire_ms, void *opaque)
{
    struct slirp_timer *t = timer;
    timer_arm(t->net->clock, &t->timer, expire_ms < 0 ? 0 : (uint64_t)expire_ms * 1000000);
}

static void slirp_register_fd(int fd, void *opaque)
{
    forget_fd(fd, opaque);
}

static void slirp_notify(void *opaque)
{
    struct net_user *u = opaque;
    u->stale = true;
}

static const SlirpCb callbacks = {
    .send_packet = slirp_send_packet,
    .guest_error = slirp_guest_error,
    .clock_get_ns = slirp_clock_ns,
    .timer_new_opaque = slirp_timer_new,
    .timer_free = slirp_timer_free,
    .timer_mod = slirp_timer_mod,
    .register_poll_fd = slirp_register_fd,
    .unregister_poll_fd = forget_fd,
    .notify = slirp_notify,
};

static void user_close(struct net *net)
{
    struct net_user *u = container_of(net, struct net_user, net);
    if (u->slirp) {
        loop_hook_remove(u->loop, &u->hook);
        slirp_cleanup(u->slirp);
    }
    loop_cancel(u->loop, &u->work_call);
    while (u->active_count)
        drop_active(u, u->active_count - 1);
    frame_queue_destroy(&u->to_slirp);
    frame_queue_destroy(&u->to_guest);
    free(u->watch);
    free(u->active);
    free(u);
}

static const struct net_ops user_ops = {
    .name = "user",
    .send = user_send,
    .features = user_features,
    .set_features = user_set_features,
    .set_receive = user_set_receive,
    .close = user_close,
};

/* Opening. */

/* "10.0.2.0/24" into host byte order. */
static int parse_network(const char *text, uint32_t *network, uint32_t *mask)
{
    char address[32];
    const char *slash = strchr(text, '/');
    struct in_addr a;
    char *end;
    unsigned long bits = slash ? strtoul(slash + 1, &end, 10) : 0;
    if (slash && (size_t)(slash - text) < sizeof(address)) {
        memcpy(address, text, (size_t)(slash - text));
        address[slash - text] = 0;
        /* Smaller networks have no room for the addresses 2, 3 and 15. */
        if (slash[1] >= '0' && slash[1] <= '9' && !*end && bits >= 8 && bits <= 27 &&
            inet_pton(AF_INET, address, &a) == 1) {
            *mask = UINT32_MAX << (32 - bits);
            *network = ntohl(a.s_addr) & *mask;
            return 0;
        }
    }
    log_error("user network '%s': give an IPv4 network like 10.0.2.0/24 (prefix 8 to 27)", text);
    return -EINVAL;
}

static int add_forward(struct net_user *u, const struct net_forward *f, struct in_addr first_guest)
{
    struct in_addr host = {.s_addr = htonl(INADDR_ANY)}, guest = first_guest;
    const char *proto = f->udp ? "udp" : "tcp";
    if (f->host_addr[0] && inet_pton(AF_INET, f->host_addr, &host) != 1) {
        log_error("port forward: '%s' is no IPv4 address of this host", f->host_addr);
        return -EINVAL;
    }
    if (f->guest_addr[0] && inet_pton(AF_INET, f->guest_addr, &guest) != 1) {
        log_error("port forward: '%s' is no IPv4 address of the guest", f->guest_addr);
        return -EINVAL;
    }
    if (f->guest_port == 0) {
        log_error("port forward: the guest's port must be 1 to 65535");
        return -EINVAL;
    }
    errno = 0;
    if (slirp_add_hostfwd(u->slirp, f->udp, host, f->host_port, guest, f->guest_port) == 0)
        return 0;
    int err = errno ? errno : EADDRINUSE;
    log_error("port forward %s:%s:%u: %s%s", proto, f->host_addr[0] ? f->host_addr : "0.0.0.0",
              f->host_port, strerror(err),
              err == EADDRINUSE      ? ": another program has this port; take another one"
              : err == EACCES        ? ": ports below 1024 need privileges; take a higher one"
              : err == EADDRNOTAVAIL ? ": this host does not have the address"
                                     : "");
    return -err;
}

int net_user_open(struct loop *loop, struct clock *clock, const struct net_user_options *opt,
                  struct net **out)
{
    *out = NULL;
    uint32_t network, mask;
    int ret = parse_network(opt->network ? opt->network : "10.0.2.0/24", &network, &mask);
    if (ret)
        return ret;

    struct net_user *u = calloc(1, sizeof(*u));
    if (!u || frame_queue_init(&u->to_slirp, QUEUE_SIZE) ||
        frame_queue_init(&u->to_guest, QUEUE_SIZE)) {
        log_error("out of memory");
        if (u)
            frame_queue_destroy(&u->to_slirp);
        free(u);
        return -ENOMEM;
    }
    u->net.ops = &user_ops;
    u->net.mtu = USER_MTU;
    u->loop = loop;
    u->clock = clock;
    u->stale = true;
    u->hook = (struct loop_hook){.prepare = prepare, .dispatch = dispatch, .opaque = u};
    u->work_call = (struct loop_call){.fn = work_called, .opaque = u};

    SlirpConfig config = {
        .version = 4,
        .restricted = opt->restricted,
        .in_enabled = true,
        .vnetwork = {htonl(network)},
        .vnetmask = {htonl(mask)},
        .vhost = {htonl(network | 2)},
        .vnameserver = {htonl(network | 3)},
        .vdhcp_start = {htonl(network | 15)},
        .in6_enabled = true,
        .vprefix_len = 64,
        .vhostname = opt->hostname,
        .if_mtu = USER_MTU,
        .if_mru = USER_MTU,
    };
    inet_pton(AF_INET6, "fec0::", &config.vprefix_addr6);
    inet_pton(AF_INET6, "fec0::2", &config.vhost6);
    inet_pton(AF_INET6, "fec0::3", &config.vnameserver6);
    u->slirp = slirp_new(&config, &callbacks, u);
    if (!u->slirp) {
        log_error("cannot start the user network");
        user_close(&u->net);
        return -ENOMEM;
    }
    loop_hook_add(loop, &u->hook);
    for (unsigned i = 0; i < opt->forward_count; i++) {
        ret = add_forward(u, &opt->forwards[i], config.vdhcp_start);
        if (ret) {
            user_close(&u->net);
            return ret;
        }
    }
    *out = &u->net;
    return 0;
}
