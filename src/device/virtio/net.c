/*
 * virtio-net: a network card with one pair of queues (virtio 1.2 §5.1).
 *
 * Frames pass between the guest's buffers and the backend without a copy of our own, except where
 * an offload that the backend lacks is done here (net_offload.c). Chains are never kept: a frame
 * that the backend cannot take now goes back to the ring until writable(); one that the guest has
 * no room for stays with the backend until it has. The control queue knows one command: that the
 * guest has announced itself, which it is asked to do after a migration (§5.1.6.5.4). Loop thread.
 */
#include "device/virtio/virtio.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include <linux/if_ether.h>
#include <linux/virtio_config.h>
#include <linux/virtio_net.h>

#include "backend/net/net.h"
#include "base/log.h"
#include "base/util.h"
#include "device/virtio/iov.h"
#include "device/virtio/net_offload.h"

#define QUEUE_SIZE 256

enum { RECEIVE, TRANSMIT, CONTROL, QUEUES };

_Static_assert(sizeof(struct net_header) == sizeof(struct virtio_net_hdr_v1), "§5.1.6");

/* Offloads of the guest's frames that are done here where the backend does not. */
#define SOFTWARE_HOST                                                     \
    (VIRTIO_BIT(VIRTIO_NET_F_CSUM) | VIRTIO_BIT(VIRTIO_NET_F_HOST_TSO4) | \
     VIRTIO_BIT(VIRTIO_NET_F_HOST_TSO6) | VIRTIO_BIT(VIRTIO_NET_F_HOST_ECN))
/* Offered if the backend has them. GUEST_CSUM only allows flags in headers: it is offered always.
 */
#define BACKEND_ONLY                                                            \
    (VIRTIO_BIT(VIRTIO_NET_F_HOST_UFO) | VIRTIO_BIT(VIRTIO_NET_F_GUEST_TSO4) |  \
     VIRTIO_BIT(VIRTIO_NET_F_GUEST_TSO6) | VIRTIO_BIT(VIRTIO_NET_F_GUEST_ECN) | \
     VIRTIO_BIT(VIRTIO_NET_F_GUEST_UFO))

struct nic {
    struct virtio_device v;
    struct net *backend; /* NULL: no link */
    uint64_t backend_features;
    uint8_t mac[ETH_ALEN];
    bool receiving;           /* what the backend was told last */
    bool announce;            /* the guest is asked to announce itself, and has not said that it did */
    struct virtq_chain chain; /* the chain in hand */
    struct virtq_chain first; /* the one that begins the frame under way, for its num_buffers */
    struct iovec iov[VIRTQ_MAX_SEGMENTS + 1];
    uint8_t frame[NET_MAX_FRAME]; /* for software offloads */
};

static struct nic *from_virtio(struct virtio_device *v)
{
    return container_of(v, struct nic, v);
}

static bool backend_has(const struct nic *n, unsigned feature)
{
    return n->backend_features >> feature & 1;
}

/* ---- From the guest. ---- */

/* The feature that allows a gso_type, or -1: there is none. */
static int gso_feature(uint8_t type, bool from_guest)
{
    switch (type & ~VIRTIO_NET_HDR_GSO_ECN) {
    case VIRTIO_NET_HDR_GSO_TCPV4:
        return from_guest ? VIRTIO_NET_F_HOST_TSO4 : VIRTIO_NET_F_GUEST_TSO4;
    case VIRTIO_NET_HDR_GSO_TCPV6:
        return from_guest ? VIRTIO_NET_F_HOST_TSO6 : VIRTIO_NET_F_GUEST_TSO6;
    case VIRTIO_NET_HDR_GSO_UDP:
        return from_guest ? VIRTIO_NET_F_HOST_UFO : VIRTIO_NET_F_GUEST_UFO;
    default:
        return -1;
    }
}

/* Does the header of a frame of len bytes ask only for what was negotiated and makes sense? */
static bool header_ok(const struct nic *n, const struct net_header *h, size_t len, bool from_guest)
{
    if (h->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM &&
        (!virtio_has(&n->v, from_guest ? VIRTIO_NET_F_CSUM : VIRTIO_NET_F_GUEST_CSUM) ||
         (size_t)h->csum_start + h->csum_offset + 2 > len))
        return false;
    if (h->gso_type == VIRTIO_NET_HDR_GSO_NONE)
        return true;
    int feature = gso_feature(h->gso_type, from_guest);
    return feature >= 0 && virtio_has(&n->v, (unsigned)feature) && h->gso_size &&
           h->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM;
}

static bool send_segment(void *opaque, const uint8_t *headers, size_t headers_len,
                         const uint8_t *payload, size_t payload_len)
{
    struct nic *n = opaque;
    struct net_header none = {0};
    const struct iovec iov[] = {
        {&none, sizeof(none)},
        {(void *)(uintptr_t)headers, headers_len},
        {(void *)(uintptr_t)payload, payload_len},
    };
    return n->backend->ops->send(n->backend, iov, payload_len ? 3 : 2) == 0;
}

/* A frame with offloads that the backend does not do. 0 also when it is lost, or -EAGAIN. */
static int send_in_software(struct nic *n, struct net_header *h, const struct iovec *frame,
                            unsigned count, size_t len)
{
    bool segment =
        h->gso_type &&
        (!backend_has(n, (unsigned)gso_feature(h->gso_type, true)) ||
         (h->gso_type & VIRTIO_NET_HDR_GSO_ECN && !backend_has(n, VIRTIO_NET_F_HOST_ECN)));
    iov_read(frame, count, 0, n->frame, len);
    if (segment) {
        if (net_offload_segment(h, n->frame, len, send_segment, n))
            log_guest_error("%s: the guest asked to segment what is not TCP", n->v.dev.id);
        return 0;
    }
    net_offload_checksum(n->frame, len, h->csum_start, h->csum_offset);
    h->flags = 0;
    h->csum_start = h->csum_offset = 0;
    const struct iovec iov[] = {{h, sizeof(*h)}, {n->frame, len}};
    return n->backend->ops->send(n->backend, iov, 2);
}

enum figure { SENT_FRAMES, SENT_BYTES, RECEIVED_FRAMES, RECEIVED_BYTES };
static const char *const figure_names[] = {
    "sent_frames", "sent_bytes", "received_frames", "received_bytes", NULL};
_Static_assert(ARRAY_SIZE(figure_names) - 1 <= VIRTIO_MAX_FIGURES, "there is room for each");

/* len: with the header in front. */
static void count(struct nic *n, enum figure frames, size_t len)
{
    n->v.figure[frames]++;
    n->v.figure[frames + 1] += len > sizeof(struct net_header) ? len - sizeof(struct net_header) : 0;
}

/* Sends the frame in n->chain. 0: done with it, sent or lost; -EAGAIN: later. */
static int send_frame(struct nic *n)
{
    struct virtq_chain *c = &n->chain;
    struct net_header h;
    if (!n->backend || c->out_len < sizeof(h) + ETH_HLEN || c->out_len > sizeof(h) + NET_MAX_FRAME)
        return 0;

    /* From here on the copy of the header counts: the guest may change its own. */
    size_t len = c->out_len - sizeof(h);
    struct iovec *frame = virtq_out(c);
    unsigned count = c->out_count;
    iov_read(frame, count, 0, &h, sizeof(h));
    iov_drop_front(&frame, &count, sizeof(h));
    if (!header_ok(n, &h, len, true)) {
        log_guest_error("%s: lost a frame with a bad header (flags 0x%x, gso type 0x%x)",
                        n->v.dev.id, h.flags, h.gso_type);
        return 0;
    }
    h.flags &= VIRTIO_NET_HDR_F_NEEDS_CSUM;
    h.num_buffers = 0;

    int gso = h.gso_type ? gso_feature(h.gso_type, true) : -1;
    if ((h.flags && !backend_has(n, VIRTIO_NET_F_CSUM)) ||
        (gso >= 0 && !backend_has(n, (unsigned)gso)) ||
        (h.gso_type & VIRTIO_NET_HDR_GSO_ECN && !backend_has(n, VIRTIO_NET_F_HOST_ECN)))
        return send_in_software(n, &h, frame, count, len);
    n->iov[0] = (struct iovec){&h, sizeof(h)};
    memcpy(n->iov + 1, frame, count * sizeof(*frame));
    return n->backend->ops->send(n->backend, n->iov, count + 1);
}

static void transmit(struct nic *n, struct virtq *q)
{
    int ret;
    do {
        virtq_notify_off(q);
        while ((ret = virtio_pop(&n->v, q, &n->chain)) > 0) {
            if (send_frame(n) == -EAGAIN) {
                virtq_unpop(q, 1);
                ret = -EAGAIN;
                break;
            }
            count(n, SENT_FRAMES, n->chain.out_len);
            virtio_push(&n->v, q, &n->chain, 0);
        }
    } while (ret == 0 && virtq_notify_on(q));
    virtio_signal_later(&n->v, q);
}

static void writable(void *opaque)
{
    struct nic *n = opaque;
    virtio_kick(&n->v, &n->v.queue[TRANSMIT]);
}

/* ---- To the guest. ---- */

/*
 * Takes chains for a frame of len bytes, header included, and fills them. 1: done, with the chains
 * staged; 0: too few buffers; -ENOSPC: the frame never fits; other errors as virtio_pop().
 */
static int fill_chains(struct nic *n, struct virtq *q, const struct iovec *iov, unsigned iovcnt,
                       size_t len)
{
    bool merge = virtio_has(&n->v, VIRTIO_NET_F_MRG_RXBUF);
    uint16_t buffers = 0;
    size_t done = 0;
    while (done < len) {
        struct virtq_chain *c = buffers ? &n->chain : &n->first;
        int ret = virtio_pop(&n->v, q, c);
        if (ret <= 0)
            return ret;
        bool fits = c->in_len >= (buffers == 0 ? sizeof(struct net_header) : 1) &&
                    (merge || c->in_len >= len);
        if (!fits || buffers == UINT16_MAX) {
            virtq_unpop(q, 1);
            return -ENOSPC;
        }
        size_t part = iov_copy(virtq_in(c), c->in_count, 0, iov, iovcnt, done, len - done);
        if (virtq_put(q, c, part))
            return -EINVAL;
        done += part;
        buffers++;
    }
    iov_write(virtq_in(&n->first), n->first.in_count, offsetof(struct net_header, num_buffers),
              &buffers, sizeof(buffers));
    return 1;
}

static bool deliver(struct nic *n, const struct iovec *iov, unsigned iovcnt, size_t len)
{
    struct virtq *q = &n->v.queue[RECEIVE];
    q->budget = q->size;
    for (;;) {
        int ret = fill_chains(n, q, iov, iovcnt, len);
        if (ret > 0) {
            virtq_publish(q);
            virtio_signal(&n->v, q);
            return true;
        }
        unsigned staged = q->staged;
        virtq_unstage(q);
        virtq_unpop(q, staged);
        if (ret == -ENOSPC) {
            log_guest_error("%s: lost a frame that the guest's buffers are too small for",
                            n->v.dev.id);
            return true;
        }
        if (ret < 0 || !virtq_notify_on(q))
            return false;
        /* More buffers came just now; but a frame for which they will not do must not be tried for
         * ever. */
        if (q->budget == 0)
            return false;
    }
}

static bool receive(void *opaque, const struct iovec *iov, unsigned iovcnt)
{
    struct nic *n = opaque;
    struct net_header h;
    size_t len = iov_length(iov, iovcnt);
    if (!virtio_queue_ready(&n->v, &n->v.queue[RECEIVE])) {
        n->receiving = false;
        return false;
    }
    if (iovcnt >= ARRAY_SIZE(n->iov) || iov_read(iov, iovcnt, 0, &h, sizeof(h)) < sizeof(h))
        return true;
    if (!virtio_has(&n->v, VIRTIO_NET_F_GUEST_CSUM))
        h.flags &= (uint8_t)~VIRTIO_NET_HDR_F_DATA_VALID;
    if (!header_ok(n, &h, len - sizeof(h), false))
        return true;

    /* The header is ours, the rest the backend's. */
    struct iovec *rest = n->iov + 1;
    unsigned pieces = iovcnt;
    memcpy(rest, iov, pieces * sizeof(*iov));
    iov_drop_front(&rest, &pieces, sizeof(h));
    *--rest = (struct iovec){&h, sizeof(h)};
    if (deliver(n, rest, pieces + 1, len)) {
        count(n, RECEIVED_FRAMES, len);
        return true;
    }
    n->receiving = false;
    return false;
}

static void set_receiving(struct nic *n, bool on)
{
    if (n->receiving == on || !n->backend)
        return;
    n->receiving = on;
    n->backend->ops->set_receive(n->backend, on);
}

/* RFC 903. The address is what switches look at; nobody answers. */
void virtio_net_announce(struct device *dev)
{
    struct nic *n = from_virtio(container_of(dev, struct virtio_device, dev));
    struct net_header header = {0};
    uint8_t frame[ETH_ZLEN] = {0};
    static const uint8_t request[] = {0x80, 0x35, 0, 1, 0x08, 0, ETH_ALEN, 4, 0, 3};
    const struct iovec iov[] = {{&header, sizeof(header)}, {frame, sizeof(frame)}};

    if (virtio_has(&n->v, VIRTIO_NET_F_GUEST_ANNOUNCE) && n->v.status & VIRTIO_CONFIG_S_DRIVER_OK) {
        n->announce = true;
        virtio_config_changed(&n->v);
    }
    if (!n->backend)
        return;
    memset(frame, 0xff, ETH_ALEN);
    memcpy(frame + 6, n->mac, ETH_ALEN);
    memcpy(frame + 12, request, sizeof(request));
    memcpy(frame + 22, n->mac, ETH_ALEN);
    memcpy(frame + 32, n->mac, ETH_ALEN);
    n->backend->ops->send(n->backend, iov, 2);
}

/* §5.1.6.5 */
static void control(struct nic *n, struct virtq *q)
{
    int ret;
    do {
        virtq_notify_off(q);
        while ((ret = virtio_pop(&n->v, q, &n->chain)) > 0) {
            struct virtq_chain *c = &n->chain;
            struct virtio_net_ctrl_hdr h;
            uint8_t ack = VIRTIO_NET_ERR;
            if (iov_read(virtq_out(c), c->out_count, 0, &h, sizeof(h)) == sizeof(h) &&
                h.class == VIRTIO_NET_CTRL_ANNOUNCE && h.cmd == VIRTIO_NET_CTRL_ANNOUNCE_ACK) {
                n->announce = false;
                ack = VIRTIO_NET_OK;
            }
            virtio_push(&n->v, q, c, iov_write(virtq_in(c), c->in_count, 0, &ack, sizeof(ack)));
        }
    } while (ret == 0 && virtq_notify_on(q));
    virtio_signal(&n->v, q);
}

/* ---- The device. ---- */

static void process(struct virtio_device *v, struct virtq *q)
{
    struct nic *n = from_virtio(v);
    if (q->index == TRANSMIT) {
        transmit(n, q);
    } else if (q->index == CONTROL) {
        control(n, q);
    } else {
        virtq_notify_off(q);
        set_receiving(n, true);
    }
}

static void running(struct virtio_device *v, bool on)
{
    /* On: once the receive queue is processed. */
    if (!on)
        set_receiving(from_virtio(v), false);
}

/* §5.1.3.1: features that need others. */
static bool features_ok(struct virtio_device *v, uint64_t features)
{
    static const struct {
        uint64_t bits, any_of;
    } needs[] = {
        {VIRTIO_BIT(VIRTIO_NET_F_HOST_TSO4) | VIRTIO_BIT(VIRTIO_NET_F_HOST_TSO6) |
             VIRTIO_BIT(VIRTIO_NET_F_HOST_UFO),
         VIRTIO_BIT(VIRTIO_NET_F_CSUM)},
        {VIRTIO_BIT(VIRTIO_NET_F_GUEST_TSO4) | VIRTIO_BIT(VIRTIO_NET_F_GUEST_TSO6) |
             VIRTIO_BIT(VIRTIO_NET_F_GUEST_UFO),
         VIRTIO_BIT(VIRTIO_NET_F_GUEST_CSUM)},
        {VIRTIO_BIT(VIRTIO_NET_F_GUEST_ANNOUNCE), VIRTIO_BIT(VIRTIO_NET_F_CTRL_VQ)},
        {VIRTIO_BIT(VIRTIO_NET_F_HOST_ECN),
         VIRTIO_BIT(VIRTIO_NET_F_HOST_TSO4) | VIRTIO_BIT(VIRTIO_NET_F_HOST_TSO6)},
        {VIRTIO_BIT(VIRTIO_NET_F_GUEST_ECN),
         VIRTIO_BIT(VIRTIO_NET_F_GUEST_TSO4) | VIRTIO_BIT(VIRTIO_NET_F_GUEST_TSO6)},
    };
    for (size_t i = 0; i < ARRAY_SIZE(needs); i++)
        if (features & needs[i].bits && !(features & needs[i].any_of)) {
            log_guest_error("%s: the guest accepted a feature without what it needs", v->dev.id);
            return false;
        }
    return true;
}

static void set_features(struct virtio_device *v)
{
    struct nic *n = from_virtio(v);
    if (n->backend)
        n->backend->ops->set_features(n->backend, v->features & n->backend_features);
}

static void config_read(struct virtio_device *v, unsigned offset, void *buf, unsigned len)
{
    const struct nic *n = from_virtio(v);
    struct virtio_net_config config = {
        .status = (n->backend ? VIRTIO_NET_S_LINK_UP : 0) | (n->announce ? VIRTIO_NET_S_ANNOUNCE : 0),
        .max_virtqueue_pairs = 1,
    };
    memcpy(config.mac, n->mac, sizeof(config.mac));
    config.mtu = n->backend ? n->backend->mtu : 0;
    memcpy(buf, (const uint8_t *)&config + offset, len);
}

static void save(struct virtio_device *v, struct state_writer *w)
{
    state_put_bytes(w, "mac", from_virtio(v)->mac, ETH_ALEN);
    state_put_u64(w, "announce", from_virtio(v)->announce);
}

static void reset(struct virtio_device *v)
{
    from_virtio(v)->announce = false;
}

static int load(struct virtio_device *v, const struct state_reader *r)
{
    uint64_t announce = 0;
    int err = state_get_u64(r, "announce", &announce);
    if (err && err != -ENOENT)
        return err;
    from_virtio(v)->announce = announce != 0;
    if (state_get_bytes(r, "mac", from_virtio(v)->mac, ETH_ALEN) == 0)
        return 0;
    log_error("%s: saved state: bad or missing mac", v->dev.id);
    return -EINVAL;
}

static void destroy(struct virtio_device *v)
{
    struct nic *n = from_virtio(v);
    net_close(n->backend);
    free(n);
}

static const struct virtio_ops ops = {
    .device = VIRTIO_DEVICE_OPS("virtio-net"),
    .id = 1,
    .pci_class = 0x020000,
    .features_ok = features_ok,
    .set_features = set_features,
    .process = process,
    .running = running,
    .reset = reset,
    .config_read = config_read,
    .save = save,
    .load = load,
    .destroy = destroy,
    .figures = figure_names,
};

struct virtio_device *virtio_net_create(struct machine *m, struct pci_host *host,
                                        struct net *backend, const uint8_t mac[6])
{
    struct nic *n = calloc(1, sizeof(*n));
    if (!n) {
        log_error("virtio-net: out of memory");
        net_close(backend);
        return NULL;
    }
    n->backend = backend;
    memcpy(n->mac, mac, sizeof(n->mac));
    n->backend_features = backend ? backend->ops->features(backend) : 0;
    n->v.ops = &ops;
    n->v.config_size = offsetof(struct virtio_net_config, speed);
    n->v.offered = VIRTIO_BIT(VIRTIO_NET_F_MAC) | VIRTIO_BIT(VIRTIO_NET_F_STATUS) |
                   VIRTIO_BIT(VIRTIO_NET_F_MRG_RXBUF) | VIRTIO_BIT(VIRTIO_NET_F_GUEST_CSUM) |
                   VIRTIO_BIT(VIRTIO_NET_F_CTRL_VQ) | VIRTIO_BIT(VIRTIO_NET_F_GUEST_ANNOUNCE) |
                   SOFTWARE_HOST | (n->backend_features & BACKEND_ONLY);
    if (backend && backend->mtu)
        n->v.offered |= VIRTIO_BIT(VIRTIO_NET_F_MTU);
    if (virtio_init(&n->v, m, host, QUEUES, QUEUE_SIZE)) {
        destroy(&n->v);
        return NULL;
    }
    if (backend) {
        backend->receive = receive;
        backend->writable = writable;
        backend->opaque = n;
    }
    return &n->v;
}
