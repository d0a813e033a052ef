/*
 * A network through a TAP interface of the host, with checksum and segmentation offload.
 *
 * The kernel speaks the same header in front of frames as virtio (IFF_VNET_HDR), so with
 * it frames pass unchanged. Machine lock held everywhere.
 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/if_tun.h>
#include <linux/virtio_net.h>
#include <net/if.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "backend/net/net.h"
#include "base/log.h"
#include "base/loop.h"
#include "base/util.h"

#define FEATURE(bit)  (UINT64_C(1) << (bit))
#define RECEIVE_BATCH 64 /* frames before others get a turn */

struct net_tap {
    struct net net;
    struct loop *loop;
    int fd;
    bool vnet_hdr;
    bool receive_ready;
    struct loop_fd *watch;
    short events;
    struct loop_call pending_call;
    size_t pending; /* length of the frame in buffer that the device had no room for; 0: none */
    uint8_t buffer[sizeof(struct net_header) + NET_MAX_FRAME];
};

static void set_events(struct net_tap *t, short events)
{
    t->events = events;
    if (t->watch)
        loop_fd_set_events(t->watch, events);
}

/* Gives the frame in the buffer to the device. false: it stays. */
static bool give_guest(struct net_tap *t)
{
    struct iovec iov = {t->buffer, t->pending};
    if (!t->receive_ready || !t->net.receive || !t->net.receive(t->net.opaque, &iov, 1)) {
        t->receive_ready = false;
        set_events(t, t->events & ~POLLIN);
        return false;
    }
    t->pending = 0;
    return true;
}

static void receive_frames(struct net_tap *t)
{
    const size_t head = sizeof(struct net_header);
    for (unsigned i = 0; i < RECEIVE_BATCH && t->receive_ready; i++) {
        size_t skip = t->vnet_hdr ? 0 : head;
        ssize_t n = read(t->fd, t->buffer + skip, sizeof(t->buffer) - skip);
        if (n < 0)
            return; /* EAGAIN; EIO while the interface is down */
        if ((size_t)n + skip <= head)
            continue;
        if (!t->vnet_hdr)
            memset(t->buffer, 0, head);
        struct net_header h;
        memcpy(&h, t->buffer, sizeof(h));
        h.num_buffers = 1; /* not filled in by the kernel */
        memcpy(t->buffer, &h, sizeof(h));
        t->pending = (size_t)n + skip;
        if (!give_guest(t))
            return;
    }
}

static void tap_ready(void *opaque, int fd, short revents)
{
    struct net_tap *t = opaque;
    if (revents & POLLOUT) {
        set_events(t, t->events & ~POLLOUT);
        if (t->net.writable)
            t->net.writable(t->net.opaque);
    }
    if ((revents & POLLIN) && (!t->pending || give_guest(t)))
        receive_frames(t);
    if ((revents & (POLLERR | POLLHUP)) && !(revents & POLLIN)) {
        log_error("the tap interface is gone: the guest's network is dead");
        loop_fd_remove(t->watch);
        t->watch = NULL;
    }
}

static void pending_called(void *opaque)
{
    struct net_tap *t = opaque;
    if (t->pending && t->receive_ready)
        give_guest(t);
}

static int tap_send(struct net *net, const struct iovec *iov, unsigned iovcnt)
{
    struct net_tap *t = container_of(net, struct net_tap, net);
    struct iovec copy[IOV_MAX];
    if (iovcnt > IOV_MAX || !t->watch)
        return 0;
    if (!t->vnet_hdr) {
        size_t skip = sizeof(struct net_header);
        for (unsigned i = 0; i < iovcnt; i++) {
            size_t drop = MIN(skip, iov[i].iov_len);
            copy[i] = (struct iovec){(uint8_t *)iov[i].iov_base + drop, iov[i].iov_len - drop};
            skip -= drop;
        }
        iov = copy;
    }
    ssize_t n;
    do {
        n = writev(t->fd, iov, (int)iovcnt);
    } while (n < 0 && errno == EINTR);
    if (n < 0 && errno == EAGAIN) {
        set_events(t, t->events | POLLOUT);
        return -EAGAIN;
    }
    if (n < 0)
        log_guest_error("tap: the host refuses a frame: %s", strerror(errno));
    return 0;
}

static uint64_t tap_features(struct net *net)
{
    struct net_tap *t = container_of(net, struct net_tap, net);
    if (!t->vnet_hdr)
        return 0;
    return FEATURE(VIRTIO_NET_F_CSUM) | FEATURE(VIRTIO_NET_F_HOST_TSO4) |
           FEATURE(VIRTIO_NET_F_HOST_TSO6) | FEATURE(VIRTIO_NET_F_HOST_ECN) |
           FEATURE(VIRTIO_NET_F_GUEST_CSUM) | FEATURE(VIRTIO_NET_F_GUEST_TSO4) |
           FEATURE(VIRTIO_NET_F_GUEST_TSO6) | FEATURE(VIRTIO_NET_F_GUEST_ECN);
}

static void tap_set_features(struct net *net, uint64_t features)
{
    struct net_tap *t = container_of(net, struct net_tap, net);
    if (!t->vnet_hdr)
        return;
    unsigned long offload = 0;
    if (features & FEATURE(VIRTIO_NET_F_GUEST_CSUM)) {
        offload = TUN_F_CSUM;
        if (features & FEATURE(VIRTIO_NET_F_GUEST_TSO4))
            offload |= TUN_F_TSO4;
        if (features & FEATURE(VIRTIO_NET_F_GUEST_TSO6))
            offload |= TUN_F_TSO6;
        if (features & FEATURE(VIRTIO_NET_F_GUEST_ECN))
            offload |= TUN_F_TSO_ECN;
    }
    if (ioctl(t->fd, TUNSETOFFLOAD, offload) < 0)
        log_warn("tap: cannot set offloads %#lx: %s", offload, strerror(errno));
}

static void tap_set_receive(struct net *net, bool ready)
{
    struct net_tap *t = container_of(net, struct net_tap, net);
    if (!t->watch)
        return;
    t->receive_ready = ready;
    set_events(t, ready ? t->events | POLLIN : t->events & ~POLLIN);
    if (ready && t->pending)
        loop_schedule(t->loop, &t->pending_call);
}

static void tap_close(struct net *net)
{
    struct net_tap *t = container_of(net, struct net_tap, net);
    loop_cancel(t->loop, &t->pending_call);
    loop_fd_remove(t->watch);
    close(t->fd);
    free(t);
}

static const struct net_ops tap_ops = {
    .name = "tap",
    .send = tap_send,
    .features = tap_features,
    .set_features = tap_set_features,
    .set_receive = tap_set_receive,
    .close = tap_close,
};

static const char *hint(int err)
{
    switch (err) {
    case EPERM:
    case EACCES:
        return "; make it yours as root: ip tuntap add dev NAME mode tap user $USER && ip link set "
               "NAME up";
    case EBUSY:
        return "; another program has it";
    case ENOENT:
    case ENODEV:
    case ENXIO:
        return "; this host has no TUN/TAP driver (modprobe tun)";
    case EINVAL:
        return "; it exists and is no tap interface, or the name is bad";
    default:
        return "";
    }
}

static int attach(struct net_tap *t, const char *ifname)
{
    t->fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (t->fd < 0)
        return -errno;
    struct ifreq ifr = {.ifr_flags =
                            (short)(IFF_TAP | IFF_NO_PI | (t->vnet_hdr ? IFF_VNET_HDR : 0))};
    snprintf(ifr.ifr_name, sizeof(ifr.ifr_name), "%s", ifname);
    if (ioctl(t->fd, TUNSETIFF, &ifr) < 0)
        return -errno;
    int size = sizeof(struct net_header);
    if (t->vnet_hdr &&
        (ioctl(t->fd, TUNSETVNETHDRSZ, &size) < 0 || ioctl(t->fd, TUNSETOFFLOAD, 0) < 0))
        return -errno;
    return 0;
}

int net_tap_open(struct loop *loop, const struct net_tap_options *opt, struct net **out)
{
    *out = NULL;
    const char *ifname = opt->ifname ? opt->ifname : "";
    if (strlen(ifname) >= IFNAMSIZ) {
        log_error("tap: '%s' is longer than an interface's name can be (%d)", ifname, IFNAMSIZ - 1);
        return -EINVAL;
    }
    struct net_tap *t = calloc(1, sizeof(*t));
    if (!t) {
        log_error("out of memory");
        return -ENOMEM;
    }
    t->net.ops = &tap_ops;
    t->loop = loop;
    t->vnet_hdr = opt->vnet_hdr;
    t->pending_call = (struct loop_call){.fn = pending_called, .opaque = t};
    int ret = attach(t, ifname);
    if (ret)
        log_error("tap interface %s: %s%s", ifname, strerror(-ret), hint(-ret));
    else if (!(t->watch = loop_fd_add(loop, t->fd, 0, tap_ready, t)))
        ret = -ENOMEM;
    if (ret) {
        if (t->fd >= 0)
            close(t->fd);
        free(t);
        return ret;
    }
    *out = &t->net;
    return 0;
}
