/*
 * What virtio devices have in common: see virtio.h.
 *
 * Life of a device: reset → features → FEATURES_OK → queues → DRIVER_OK, and from there it
 * processes its queues. Four things keep it from doing so: a guest error (DEVICE_NEEDS_RESET), a
 * transport without access to memory, a pause, and a drain that somebody waits for.
 * refresh_running() is the one place that decides.
 */
#include "device/virtio/virtio.h"

#include <errno.h>
#include <string.h>

#include <linux/virtio_config.h>
#include <linux/virtio_ring.h>

#include "base/log.h"
#include "base/util.h"
#include "device/machine.h"

#define ALL_STATUS                                                                        \
    (VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK | \
     VIRTIO_CONFIG_S_DRIVER_OK | VIRTIO_CONFIG_S_FAILED | VIRTIO_CONFIG_S_NEEDS_RESET)

/* Offered by every device. */
#define COMMON_FEATURES                                                         \
    (VIRTIO_BIT(VIRTIO_F_VERSION_1) | VIRTIO_BIT(VIRTIO_RING_F_INDIRECT_DESC) | \
     VIRTIO_BIT(VIRTIO_RING_F_EVENT_IDX) | VIRTIO_BIT(VIRTIO_F_RING_RESET))

/* Chains that one call of process() may take before other devices get their turn, in queue sizes.
 */
#define ROUND_IN_QUEUE_SIZES 2

static bool in_service(const struct virtio_device *v)
{
    return (v->status & VIRTIO_CONFIG_S_DRIVER_OK) && !(v->status & VIRTIO_CONFIG_S_NEEDS_RESET);
}

bool virtio_queue_ready(const struct virtio_device *v, const struct virtq *q)
{
    return v->running && q->enabled;
}

/* Tells the device when its queues begin or cease to work; whatever came meanwhile is looked at
 * then. */
static void refresh_running(struct virtio_device *v)
{
    bool on = in_service(v) && v->dma && !v->paused && !v->draining;
    if (on == v->running)
        return;
    v->running = on;
    if (v->ops->running)
        v->ops->running(v, on);
    if (on)
        for (unsigned i = 0; i < v->queue_count; i++)
            virtio_kick(v, &v->queue[i]);
}

void virtio_kick(struct virtio_device *v, struct virtq *q)
{
    if (!virtio_queue_ready(v, q))
        return;
    v->kicked |= UINT32_C(1) << q->index;
    loop_schedule(v->machine->loop, &v->call);
}

static void process(struct virtio_device *v, struct virtq *q)
{
    if (!virtio_queue_ready(v, q))
        return;
    q->budget = ROUND_IN_QUEUE_SIZES * q->size;
    v->ops->process(v, q);
}

static void process_kicked(void *opaque)
{
    struct virtio_device *v = opaque;
    for (unsigned i = 0; i < v->queue_count; i++) {
        struct virtq *q = &v->queue[i];
        uint32_t bit = UINT32_C(1) << i;
        if (!(v->kicked & bit))
            continue;
        v->kicked &= ~bit;
        process(v, q);
    }
}

int virtio_pop(struct virtio_device *v, struct virtq *q, struct virtq_chain *c)
{
    if (!virtio_queue_ready(v, q))
        return -EAGAIN;
    if (q->budget == 0) {
        /* A driver that adds chains as fast as they are used must not keep the loop for itself. */
        virtio_kick(v, q);
        return -EAGAIN;
    }
    int ret = virtq_pop(q, c);
    if (ret > 0)
        q->budget--;
    else if (ret < 0)
        virtio_guest_error(v, "bad virtqueue");
    return ret;
}

void virtio_push(struct virtio_device *v, struct virtq *q, const struct virtq_chain *c,
                 uint64_t len)
{
    if (virtq_put(q, c, len) || virtq_publish(q))
        virtio_guest_error(v, "bad virtqueue");
}

void virtio_signal(struct virtio_device *v, struct virtq *q)
{
    if (virtq_wants_interrupt(q))
        v->interrupt(v, q);
}

static void signal_now(void *opaque)
{
    struct virtio_device *v = opaque;
    timer_disarm(v->machine->clock, &v->signal_timer);
    for (unsigned i = 0; i < v->queue_count; i++)
        if (v->signal_later >> i & 1)
            virtio_signal(v, &v->queue[i]);
    v->signal_later = 0;
}

void virtio_signal_later(struct virtio_device *v, struct virtq *q)
{
    v->signal_later |= UINT32_C(1) << q->index;
    if (!timer_armed(&v->signal_timer))
        timer_arm(v->machine->clock, &v->signal_timer,
                  clock_now(v->machine->clock) + VIRTIO_SIGNAL_DELAY_NS);
}

void virtio_config_changed(struct virtio_device *v)
{
    v->config_generation++;
    if (v->status & VIRTIO_CONFIG_S_DRIVER_OK)
        v->interrupt(v, NULL);
}

void virtio_guest_error(struct virtio_device *v, const char *what)
{
    if (v->status & VIRTIO_CONFIG_S_NEEDS_RESET)
        return;
    log_guest_error("%s: %s: out of service until the guest resets it", v->dev.id, what);
    v->status |= VIRTIO_CONFIG_S_NEEDS_RESET;
    refresh_running(v);
    virtio_config_changed(v);
}

static void drain(struct virtio_device *v)
{
    bool nested = v->draining;
    v->draining = true;
    refresh_running(v);
    if (v->ops->drain)
        v->ops->drain(v);
    signal_now(v);
    v->draining = nested;
}

void virtio_set_dma(struct virtio_device *v, bool on)
{
    v->dma = on;
    if (!on)
        drain(v);
    refresh_running(v);
}

/* Rings follow the features. */
static void apply_features(struct virtio_device *v)
{
    for (unsigned i = 0; i < v->queue_count; i++) {
        v->queue[i].event_idx = virtio_has(v, VIRTIO_RING_F_EVENT_IDX);
        v->queue[i].indirect = virtio_has(v, VIRTIO_RING_F_INDIRECT_DESC);
    }
    if (v->ops->set_features)
        v->ops->set_features(v);
}

static void reset(struct virtio_device *v, bool power_on)
{
    drain(v);
    v->status = 0;
    v->features = 0;
    v->kicked = 0;
    refresh_running(v);
    loop_cancel(v->machine->loop, &v->call);
    for (unsigned i = 0; i < v->queue_count; i++)
        virtq_reset(&v->queue[i]);
    virtio_pci_reset(v, power_on);
    apply_features(v);
    if (v->ops->reset)
        v->ops->reset(v);
}

static bool features_acceptable(const struct virtio_device *v)
{
    if (v->features & ~v->offered) {
        log_guest_error("%s: the guest accepted features that were not offered: 0x%llx", v->dev.id,
                        (unsigned long long)(v->features & ~v->offered));
        return false;
    }
    if (!virtio_has(v, VIRTIO_F_VERSION_1)) {
        log_guest_error("%s: the guest's driver is older than virtio 1.0", v->dev.id);
        return false;
    }
    return true;
}

static void enter_service(struct virtio_device *v)
{
    if (!(v->status & VIRTIO_CONFIG_S_FEATURES_OK)) {
        virtio_guest_error(v, "DRIVER_OK without FEATURES_OK");
        return;
    }
    for (unsigned i = 0; i < v->queue_count; i++)
        if (v->queue[i].enabled && virtq_check(&v->queue[i])) {
            virtio_guest_error(v, "bad virtqueue");
            return;
        }
    refresh_running(v);
}

void virtio_set_status(struct virtio_device *v, uint8_t status)
{
    if (status == 0) {
        reset(v, false);
        return;
    }
    /* Bits are only ever added (§2.1.1); DEVICE_NEEDS_RESET is the device's own. */
    uint8_t added = status & ALL_STATUS & ~VIRTIO_CONFIG_S_NEEDS_RESET & ~v->status;
    if (added & VIRTIO_CONFIG_S_FEATURES_OK) {
        if (features_acceptable(v) &&
            (!v->ops->features_ok || v->ops->features_ok(v, v->features))) {
            v->status |= VIRTIO_CONFIG_S_FEATURES_OK;
            apply_features(v);
        } else {
            added &= ~VIRTIO_CONFIG_S_FEATURES_OK;
        }
    }
    v->status |= added;
    if (added & VIRTIO_CONFIG_S_DRIVER_OK)
        enter_service(v);
}

void virtio_notify(struct virtio_device *v, unsigned queue)
{
    if (queue >= v->queue_count)
        return;
    /* The one place that says where queues are processed: rather not in the vCPU's thread. */
    if (v->ops->at_once >> queue & 1)
        process(v, &v->queue[queue]);
    else
        virtio_kick(v, &v->queue[queue]);
}

void virtio_enable_queue(struct virtio_device *v, struct virtq *q)
{
    if (q->enabled || !(v->status & VIRTIO_CONFIG_S_FEATURES_OK))
        return;
    q->enabled = true;
    if (!(v->status & VIRTIO_CONFIG_S_DRIVER_OK))
        return;
    if (virtq_check(q))
        virtio_guest_error(v, "bad virtqueue");
    else
        virtio_kick(v, q);
}

void virtio_reset_queue(struct virtio_device *v, struct virtq *q)
{
    if (!virtio_has(v, VIRTIO_F_RING_RESET))
        return;
    drain(v);
    virtq_reset(q);
    q->event_idx = virtio_has(v, VIRTIO_RING_F_EVENT_IDX);
    q->indirect = virtio_has(v, VIRTIO_RING_F_INDIRECT_DESC);
    refresh_running(v);
}

void virtio_config_get(struct virtio_device *v, uint64_t offset, void *buf, unsigned len)
{
    memset(buf, 0xff, len);
    if (offset < v->config_size)
        v->ops->config_read(v, (unsigned)offset, buf, (unsigned)MIN(len, v->config_size - offset));
}

void virtio_config_set(struct virtio_device *v, uint64_t offset, const void *buf, unsigned len)
{
    if (offset < v->config_size && len <= v->config_size - offset && v->ops->config_write)
        v->ops->config_write(v, (unsigned)offset, buf, len);
}

int virtio_init(struct virtio_device *v, struct machine *m, struct pci_host *host, unsigned queues,
                unsigned queue_size)
{
    v->machine = m;
    v->offered |= COMMON_FEATURES;
    v->queue_count = queues;
    v->call = (struct loop_call){.fn = process_kicked, .opaque = v};
    timer_init(&v->signal_timer, signal_now, v);
    for (unsigned i = 0; i < queues; i++) {
        v->queue[i] = (struct virtq){
            .memory = &m->memory, .owner = v->dev.id, .index = i, .max_size = (uint16_t)queue_size};
        virtq_reset(&v->queue[i]);
    }
    int ret = virtio_pci_attach(v, host);
    if (ret)
        return ret;
    machine_add_device(m, &v->dev, &v->ops->device);
    return 0;
}

/* ---- The machine's view of the device. ---- */

static struct virtio_device *from_device(struct device *dev)
{
    return container_of(dev, struct virtio_device, dev);
}

void virtio_device_reset(struct device *dev)
{
    reset(from_device(dev), true);
}

int virtio_device_pause(struct device *dev)
{
    struct virtio_device *v = from_device(dev);
    v->paused = true;
    drain(v);
    return 0;
}

int virtio_device_resume(struct device *dev)
{
    struct virtio_device *v = from_device(dev);
    v->paused = false;
    refresh_running(v);
    return 0;
}

void virtio_device_save(struct device *dev, struct state_writer *w)
{
    struct virtio_device *v = from_device(dev);
    state_put_u64(w, "features", v->features);
    state_put_u64(w, "status", v->status);
    state_put_u64(w, "config_generation", v->config_generation);
    for (unsigned i = 0; i < v->queue_count; i++)
        virtq_save(&v->queue[i], w);
    virtio_pci_save(v, w);
    if (v->ops->save)
        v->ops->save(v, w);
}

int virtio_device_load(struct device *dev, const struct state_reader *r)
{
    struct virtio_device *v = from_device(dev);
    uint64_t features, status, generation;
    reset(v, true);
    if (state_get_u64(r, "features", &features) || state_get_u64(r, "status", &status) ||
        state_get_u64(r, "config_generation", &generation) || generation > UINT8_MAX ||
        (status & ~(uint64_t)ALL_STATUS)) {
        log_error("%s: saved state: bad or missing status", dev->id);
        return -EINVAL;
    }
    /* Before FEATURES_OK the driver may have written anything; it is judged when it asks for that.
     */
    if ((status & VIRTIO_CONFIG_S_FEATURES_OK) && (features & ~v->offered)) {
        log_error("%s: saved state: the guest uses features that this host does not offer: 0x%llx; "
                  "give the device the backend that it had",
                  dev->id, (unsigned long long)(features & ~v->offered));
        return -EINVAL;
    }
    int ret = virtio_pci_load(v, r);
    for (unsigned i = 0; ret == 0 && i < v->queue_count; i++)
        ret = virtq_load(&v->queue[i], r, v->pci.pci.msix_vectors);
    if (ret == 0 && v->ops->load)
        ret = v->ops->load(v, r);
    if (ret) {
        reset(v, true);
        return ret;
    }

    v->features = features;
    v->status = (uint8_t)status;
    v->config_generation = (uint8_t)generation;
    if (status & VIRTIO_CONFIG_S_FEATURES_OK)
        apply_features(v);
    if (status & VIRTIO_CONFIG_S_DRIVER_OK)
        enter_service(v);
    return 0;
}

void virtio_device_destroy(struct device *dev)
{
    struct virtio_device *v = from_device(dev);
    drain(v);
    loop_cancel(v->machine->loop, &v->call);
    virtio_pci_detach(v);
    v->ops->destroy(v);
}

void virtio_device_figures(struct device *dev,
                           void (*put)(void *opaque, const char *name, uint64_t value),
                           void *opaque)
{
    struct virtio_device *v = from_device(dev);
    for (unsigned i = 0; v->ops->figures && v->ops->figures[i]; i++)
        put(opaque, v->ops->figures[i], v->figure[i]);
}
