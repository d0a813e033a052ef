/*
 * Virtio devices: what they have in common, apart from how the guest reaches them.
 *
 * A device (blk.c, net.c, console.c, rng.c) is a struct virtio_device with a struct virtio_ops.
 * virtio.c keeps status, features, queues, reset, pause and saved state; pci.c is the transport.
 *
 * Threads: register accesses come from vCPU threads; queues are processed in the event loop's
 * thread, so that a vCPU that notifies goes on at once. All functions: machine lock held.
 * Virtio 1.2.
 */
#ifndef RINGFORT_DEVICE_VIRTIO_VIRTIO_H
#define RINGFORT_DEVICE_VIRTIO_VIRTIO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/clock.h"
#include "base/loop.h"
#include "device/device.h"
#include "device/irq.h"
#include "device/pci.h"
#include "device/virtio/queue.h"

struct block;
struct console;
struct machine;
struct net;
struct virtio_device;

/* ---- Making devices. The machine owns and destroys them. NULL: an error, logged. ---- */

struct virtio_blk_options {
    const char *serial; /* at most 20 bytes are shown to the guest; NULL: none. Copied */
};
/* backend is owned by the device from the call on, also when it fails. opt may be NULL. */
struct virtio_device *virtio_blk_create(struct machine *m, struct pci_host *host,
                                        struct block *backend,
                                        const struct virtio_blk_options *opt);
/* backend: as above; NULL: a network card without link. */
struct virtio_device *virtio_net_create(struct machine *m, struct pci_host *host,
                                        struct net *backend, const uint8_t mac[6]);
/*
 * Tells switches that the card of this address is here now, as its guest would by sending: a RARP request, to all. For a machine that came from
 * another host. dev: of virtio_net_create().
 */
void virtio_net_announce(struct device *dev);
/* console is borrowed and outlives the device (the serial port or the VM may own it). */
struct virtio_device *virtio_console_create(struct machine *m, struct pci_host *host,
                                            struct console *console);
struct virtio_device *virtio_rng_create(struct machine *m, struct pci_host *host);

/* ---- For the device files. ---- */

#define VIRTIO_MAX_QUEUES 16
#define VIRTIO_BIT(n)     (UINT64_C(1) << (n))

#define VIRTIO_MAX_FIGURES 6

struct virtio_ops {
    /* For the machine's list; fill it in with VIRTIO_DEVICE_OPS. */
    struct device_ops device;
    uint16_t id; /* virtio device type, §5 */
    uint32_t pci_class;
    /* Is a driver's choice, already a subset of what is offered, fit to work with? NULL: always. */
    bool (*features_ok)(struct virtio_device *, uint64_t features);
    /* The driver's choice is final (v->features), or was taken back by a reset (0). NULL: nothing
     * to do. */
    void (*set_features)(struct virtio_device *);
    /*
     * Chains may have become available in q, which is enabled: take them with virtio_pop(). Loop
     * thread, or a vCPU's for the queues in at_once. Also called for each enabled queue after
     * DRIVER_OK and after a resume.
     */
    void (*process)(struct virtio_device *, struct virtq *q);
    /* Bits of queues whose drivers wait actively for the end: processed before the notification
     * returns. It must be short. */
    uint32_t at_once;
    /* Wait until all chains that were taken are given back. NULL: none is ever kept beyond
     * process(). */
    void (*drain)(struct virtio_device *);
    /* The queues stop or go on working: reset, guest error, pause, DRIVER_OK, resume. NULL: no
     * matter. */
    void (*running)(struct virtio_device *, bool on);
    /* Own state back to power-on. NULL: none. */
    void (*reset)(struct virtio_device *);
    /* Device configuration space; [offset, offset + len) is inside config_size. NULL write:
     * read-only. */
    void (*config_read)(struct virtio_device *, unsigned offset, void *buf, unsigned len);
    void (*config_write)(struct virtio_device *, unsigned offset, const void *buf, unsigned len);
    void (*save)(struct virtio_device *, struct state_writer *);
    int (*load)(struct virtio_device *, const struct state_reader *);
    /* Frees the device and its backend. */
    void (*destroy)(struct virtio_device *);
    /* Names of the device's figures, in their order, ending with NULL. NULL: it counts nothing. */
    const char *const *figures;
};

/* How interrupts leave a device; q NULL: the configuration changed. */
typedef void virtio_interrupt_fn(struct virtio_device *, const struct virtq *q);

struct virtio_device {
    struct device dev;
    const struct virtio_ops *ops;
    struct machine *machine;
    unsigned config_size; /* bytes of device configuration space */
    uint64_t offered;     /* feature bits */
    uint64_t features;    /* the driver's; final with FEATURES_OK */
    uint8_t status;
    uint8_t config_generation;
    unsigned queue_count;
    struct virtq queue[VIRTIO_MAX_QUEUES];

    bool paused;           /* between pause and resume */
    bool dma;              /* the transport lets it use memory (PCI: bus master) */
    bool draining;         /* somebody waits for chains in flight; nothing new is begun */
    bool running;          /* what ops->running() was told last */
    uint32_t kicked;       /* queues to process */
    struct loop_call call; /* processes them */
    uint32_t signal_later; /* queues with an interrupt to consider when the timer fires */
    struct timer signal_timer;
    uint64_t figure[VIRTIO_MAX_FIGURES]; /* what ops->figures names */

    /* The PCI transport: pci.c only. */
    struct virtio_pci {
        struct pci_device pci;
        uint32_t device_feature_select, driver_feature_select;
        uint16_t queue_select;
        uint16_t config_vector;
        uint8_t isr;
        unsigned cfg_cap; /* config offset of the PCI configuration access capability */
    } pci;
    virtio_interrupt_fn *interrupt;
};

/*
 * Makes a device out of v (zeroed, and then filled in with ops, config_size and offered: the
 * device's own features; those of rings and transport are added) and puts it on the PCI bus. 0 or a
 * negative errno (logged).
 */
int virtio_init(struct virtio_device *v, struct machine *m, struct pci_host *host, unsigned queues,
                unsigned queue_size);

/* Has the driver negotiated feature bit n? */
static inline bool virtio_has(const struct virtio_device *v, unsigned n)
{
    return v->features >> n & 1;
}
/* May chains be taken from the queue now? */
bool virtio_queue_ready(const struct virtio_device *v, const struct virtq *q);
/*
 * virtq_pop() with the device's view: guest errors take it out of service. -EAGAIN: leave the queue
 * for now, process() is called again when there is reason to (not ready, or others' turn).
 */
int virtio_pop(struct virtio_device *v, struct virtq *q, struct virtq_chain *c);
/* Gives back one chain and publishes it. The interrupt is virtio_signal()'s. */
void virtio_push(struct virtio_device *v, struct virtq *q, const struct virtq_chain *c,
                 uint64_t len);
/* After one or more chains were published: interrupt the driver if it wants that. */
void virtio_signal(struct virtio_device *v, struct virtq *q);
/*
 * The same for chains whose end no one waits for, such as what was sent: the interrupt comes a
 * little (VIRTIO_SIGNAL_DELAY_NS) later, one for all that ended by then, and none if the driver has
 * seen them by itself, as drivers do that send more or wait actively.
 */
#define VIRTIO_SIGNAL_DELAY_NS 100000
void virtio_signal_later(struct virtio_device *v, struct virtq *q);
/* Process q from the event loop soon. Any number of calls are one. */
void virtio_kick(struct virtio_device *v, struct virtq *q);
/* The device's configuration space changed: new generation, interrupt. */
void virtio_config_changed(struct virtio_device *v);
/* The driver did what it must not: log, DEVICE_NEEDS_RESET (§2.1.2), no more work until it resets.
 */
void virtio_guest_error(struct virtio_device *v, const char *what);

/* ---- For the transport. ---- */

/* §3.1: applies a write to the status field. 0 resets, and the reset is complete on return. */
void virtio_set_status(struct virtio_device *v, uint8_t status);
void virtio_notify(struct virtio_device *v, unsigned queue);
/* §2.7.10 and 4.1.4.3: enabling a queue; and resetting one alone (VIRTIO_F_RING_RESET). */
void virtio_enable_queue(struct virtio_device *v, struct virtq *q);
void virtio_reset_queue(struct virtio_device *v, struct virtq *q);
/* Reads bytes beyond config_size as ones; drops writes there. */
void virtio_config_get(struct virtio_device *v, uint64_t offset, void *buf, unsigned len);
void virtio_config_set(struct virtio_device *v, uint64_t offset, const void *buf, unsigned len);
/* May the device use memory? When it may not any more, what it had begun is complete on return. */
void virtio_set_dma(struct virtio_device *v, bool on);
int virtio_pci_attach(struct virtio_device *v, struct pci_host *host);
void virtio_pci_detach(struct virtio_device *v);
void virtio_pci_reset(struct virtio_device *v, bool power_on);
void virtio_pci_save(struct virtio_device *v, struct state_writer *w);
int virtio_pci_load(struct virtio_device *v, const struct state_reader *r);

/* device_ops of every virtio device. */
void virtio_device_reset(struct device *dev);
int virtio_device_pause(struct device *dev);
int virtio_device_resume(struct device *dev);
void virtio_device_save(struct device *dev, struct state_writer *w);
int virtio_device_load(struct device *dev, const struct state_reader *r);
void virtio_device_destroy(struct device *dev);
void virtio_device_figures(struct device *dev,
                           void (*put)(void *opaque, const char *name, uint64_t value),
                           void *opaque);

#define VIRTIO_DEVICE_OPS(type)                                                                   \
    {                                                                                             \
        .name = (type), .version = 1, .reset = virtio_device_reset, .pause = virtio_device_pause, \
        .resume = virtio_device_resume, .save = virtio_device_save, .load = virtio_device_load,   \
        .destroy = virtio_device_destroy, .figures = virtio_device_figures                        \
    }

#endif
