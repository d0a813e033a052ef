/*
 * What stands behind a network device on the host.
 *
 * Frames cross with a virtio_net_hdr (12 bytes, with num_buffers) in front, whatever offloads the backend has. A
 * backend with HOST_TSO4/6 but without CSUM gets long TCP frames whose checksum is complete. All calls and callbacks: machine lock held; receive runs in the event loop's thread.
 */
#ifndef RINGFORT_BACKEND_NET_H
#define RINGFORT_BACKEND_NET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

struct loop;
struct clock;
struct net;

/* As virtio 1.2 §5.1.6: in front of each frame both ways. */
struct net_header {
    uint8_t flags, gso_type;
    uint16_t hdr_len, gso_size, csum_start, csum_offset, num_buffers;
} __attribute__((packed));

#define NET_MAX_FRAME (65535 + 18)

struct net_ops {
    const char *name;           /* "user", "tap" */
    /* Sends one frame: header and Ethernet frame in iov (iov[0] begins with struct net_header). 0, or -EAGAIN: full, try when writable. */
    int (*send)(struct net *, const struct iovec *iov, unsigned iovcnt);
    /* Which of the guest's offloads the backend takes: VIRTIO_NET_F_* bits it can back (CSUM, HOST_TSO4, …, GUEST_TSO4 …). */
    uint64_t (*features)(struct net *);
    /* The guest's choice, after feature negotiation (and at reset: 0). */
    void (*set_features)(struct net *, uint64_t features);
    /* The device can (or cannot) take frames now: stop reading from the host while it cannot. */
    void (*set_receive)(struct net *, bool ready);
    void (*close)(struct net *);
};

struct net {
    const struct net_ops *ops;
    /* Set by the backend: the longest IP packet it likes, for the guest to use; 0: as Ethernet, 1500. */
    uint16_t mtu;
    /*
     * Set by the device. Delivers one frame (header first) to the guest. true: taken; false: no room, the backend
     * keeps it and delivers it again after set_receive(true).
     */
    bool (*receive)(void *opaque, const struct iovec *iov, unsigned iovcnt);
    void (*writable)(void *opaque);     /* after -EAGAIN */
    void *opaque;
};

struct net_forward { bool udp; char host_addr[64]; uint16_t host_port; char guest_addr[64]; uint16_t guest_port; };

struct net_user_options {
    struct net_forward *forwards;
    unsigned forward_count;
    const char *network;        /* "10.0.2.0/24" when NULL */
    const char *hostname;
    bool restricted;            /* guest reaches only forwarded ports' peers */
};
struct net_tap_options { const char *ifname; bool vnet_hdr; };

/* Each logs one line with the cause. Errors: -EADDRINUSE (a forward's port), -EACCES, -EPERM, -ENODEV, … */
int net_user_open(struct loop *loop, struct clock *clock, const struct net_user_options *opt, struct net **out);
int net_tap_open(struct loop *loop, const struct net_tap_options *opt, struct net **out);
static inline void net_close(struct net *n) { if (n) n->ops->close(n); }

#endif
