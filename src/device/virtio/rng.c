/*
 * virtio-rng: random bytes from the host's kernel (virtio 1.2 §5.4).
 *
 * A chain is filled at once, with at most MAX_BYTES however large its buffers are, so that a guest
 * cannot keep the event loop busy with one request.
 */
#include "device/virtio/virtio.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/random.h>

#include "base/log.h"
#include "base/util.h"

#define QUEUE_SIZE 64
#define MAX_BYTES  4096

struct rng {
    struct virtio_device v;
    struct virtq_chain chain;
};

static size_t fill(const struct iovec *iov, unsigned count)
{
    size_t total = 0;
    for (unsigned i = 0; i < count && total < MAX_BYTES; i++) {
        size_t part = MIN(iov[i].iov_len, MAX_BYTES - total);
        ssize_t got = getrandom(iov[i].iov_base, part, 0);
        if (got > 0)
            total += (size_t)got;
        if (got != (ssize_t)part)
            break;
    }
    return total;
}

static void process(struct virtio_device *v, struct virtq *q)
{
    struct virtq_chain *c = &container_of(v, struct rng, v)->chain;
    int ret;
    do {
        virtq_notify_off(q);
        while ((ret = virtio_pop(v, q, c)) > 0)
            virtio_push(v, q, c, fill(virtq_in(c), c->in_count));
    } while (ret == 0 && virtq_notify_on(q));
    virtio_signal(v, q);
}

static void destroy(struct virtio_device *v)
{
    free(container_of(v, struct rng, v));
}

static const struct virtio_ops ops = {
    .device = VIRTIO_DEVICE_OPS("virtio-rng"),
    .id = 4,
    .pci_class = 0x00ff00,
    .process = process,
    .destroy = destroy,
};

struct virtio_device *virtio_rng_create(struct machine *m, struct pci_host *host)
{
    struct rng *r = calloc(1, sizeof(*r));
    if (!r) {
        log_error("virtio-rng: out of memory");
        return NULL;
    }
    r->v.ops = &ops;
    if (virtio_init(&r->v, m, host, 1, QUEUE_SIZE)) {
        destroy(&r->v);
        return NULL;
    }
    return &r->v;
}
