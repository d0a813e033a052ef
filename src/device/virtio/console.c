/*
 * virtio-console: one port (virtio 1.2 §5.3), without the multiport feature.
 *
 * Output that the host does not take now stays in the ring: the guest waits. Input that the guest
 * has no buffers for stays with the console. Loop thread, but for output, which begins in the
 * vCPU's.
 */
#include "device/virtio/virtio.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include <linux/virtio_console.h>

#include "backend/console/console.h"
#include "base/log.h"
#include "base/util.h"
#include "device/virtio/iov.h"

#define QUEUE_SIZE 128
#define PIECE      4096u /* written at once; a console that takes output has far more room */
#define MAX_PIECES 64    /* of one chain before others get their turn */

enum { RECEIVE, TRANSMIT, QUEUES };

struct virtio_console {
    struct virtio_device v;
    struct console *console;
    uint64_t sent; /* bytes of the next chain to transmit that are written already */
    struct virtq_chain chain;
};

static struct virtio_console *from_virtio(struct virtio_device *v)
{
    return container_of(v, struct virtio_console, v);
}

/* Writes the chain from p->sent on. false: there is more for later, and p->sent says how far it
 * came. */
static bool write_chain(struct virtio_console *p, struct virtq *q, const struct virtq_chain *c)
{
    uint8_t piece[PIECE];
    for (unsigned pieces = 0; p->sent < c->out_len; pieces++) {
        /* Of the first kind, writable() tells the end. */
        if (!console_can_write(p->console))
            return false;
        if (pieces == MAX_PIECES) {
            virtio_kick(&p->v, q);
            return false;
        }
        size_t len = iov_read(c->iov, c->out_count, p->sent, piece, sizeof(piece));
        console_write(p->console, piece, len);
        p->sent += len;
    }
    p->sent = 0;
    return true;
}

static void transmit(struct virtio_console *p, struct virtq *q)
{
    struct virtq_chain *c = &p->chain;
    int ret;
    do {
        virtq_notify_off(q);
        while ((ret = virtio_pop(&p->v, q, c)) > 0) {
            if (!write_chain(p, q, c)) {
                virtq_unpop(q, 1);
                ret = -EAGAIN;
                break;
            }
            virtio_push(&p->v, q, c, 0);
        }
    } while (ret == 0 && virtq_notify_on(q));
    virtio_signal_later(&p->v, q);
}

static void process(struct virtio_device *v, struct virtq *q)
{
    struct virtio_console *p = from_virtio(v);
    if (q->index == RECEIVE) {
        virtq_notify_off(q);
        console_kick(p->console);
    } else {
        transmit(p, q);
    }
}

/* From the console: input. Returns how much of it fits into the guest's buffers. */
static size_t receive(void *opaque, const uint8_t *data, size_t len)
{
    struct virtio_console *p = opaque;
    struct virtq *q = &p->v.queue[RECEIVE];
    size_t taken = 0;
    bool again = true;
    q->budget = q->size;
    while (taken < len && again) {
        int ret = virtio_pop(&p->v, q, &p->chain);
        if (ret > 0) {
            size_t part =
                iov_write(virtq_in(&p->chain), p->chain.in_count, 0, data + taken, len - taken);
            virtio_push(&p->v, q, &p->chain, part);
            taken += part;
        } else {
            again = ret == 0 && virtq_notify_on(q);
        }
    }
    if (taken)
        virtio_signal(&p->v, q);
    return taken;
}

static void writable(void *opaque)
{
    struct virtio_console *p = opaque;
    virtio_kick(&p->v, &p->v.queue[TRANSMIT]);
}

static void config_read(struct virtio_device *v, unsigned offset, void *buf, unsigned len)
{
    const struct virtio_console_config config = {.max_nr_ports = 1};
    memcpy(buf, (const uint8_t *)&config + offset, len);
}

static void config_write(struct virtio_device *v, unsigned offset, const void *buf, unsigned len)
{
    if (offset == offsetof(struct virtio_console_config, emerg_wr))
        console_write(from_virtio(v)->console, buf, 1);
}

static void reset(struct virtio_device *v)
{
    from_virtio(v)->sent = 0;
}

static void save(struct virtio_device *v, struct state_writer *w)
{
    state_put_u64(w, "sent", from_virtio(v)->sent);
}

static int load(struct virtio_device *v, const struct state_reader *r)
{
    if (state_get_u64(r, "sent", &from_virtio(v)->sent) == 0)
        return 0;
    log_error("%s: saved state: bad or missing field sent", v->dev.id);
    return -EINVAL;
}

static void destroy(struct virtio_device *v)
{
    struct virtio_console *p = from_virtio(v);
    console_connect(p->console, NULL, NULL);
    free(p);
}

static const struct virtio_ops ops = {
    .device = VIRTIO_DEVICE_OPS("virtio-console"),
    .id = 3,
    .pci_class = 0x078000,
    .process = process,
    /* Linux spins, with interrupts off, until the buffer is back. */
    .at_once = 1 << TRANSMIT,
    .reset = reset,
    .config_read = config_read,
    .config_write = config_write,
    .save = save,
    .load = load,
    .destroy = destroy,
};

static const struct console_ops console_ops = {.receive = receive, .writable = writable};

struct virtio_device *virtio_console_create(struct machine *m, struct pci_host *host,
                                            struct console *console)
{
    struct virtio_console *p = calloc(1, sizeof(*p));
    if (!p) {
        log_error("virtio-console: out of memory");
        return NULL;
    }
    p->console = console;
    p->v.ops = &ops;
    p->v.config_size = sizeof(struct virtio_console_config);
    p->v.offered = VIRTIO_BIT(VIRTIO_CONSOLE_F_EMERG_WRITE);
    if (virtio_init(&p->v, m, host, QUEUES, QUEUE_SIZE)) {
        free(p);
        return NULL;
    }
    console_connect(console, &console_ops, p);
    return &p->v;
}
