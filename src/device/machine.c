/*
 * The machine as devices see it: what it is made of, and operations on all of its devices.
 *
 * machine_init() and machine_destroy(): one thread, nothing else runs. The rest: machine lock held.
 */
#include "device/machine.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/log.h"
#include "base/util.h"

/* Until an interrupt controller and a virtual machine take their places, what they would get is
 * dropped. */
static void drop_gsi(void *opaque, unsigned gsi, bool level)
{
}
static void drop_msi(void *opaque, uint64_t address, uint32_t data)
{
}
static void drop_event(void *opaque, enum machine_event event, int status)
{
}

int machine_init(struct machine *m, bool manual_clock)
{
    memset(m, 0, sizeof(*m));
    m->devices_tail = &m->devices;
    m->irq = (struct irq_router){.set_gsi = drop_gsi, .send_msi = drop_msi};
    m->event = drop_event;

    /* vCPU threads hold it for the time of one register access: worth spinning for. */
    pthread_mutexattr_t attr;
    pthread_mutexattr_init(&attr);
    pthread_mutexattr_settype(&attr, PTHREAD_MUTEX_ADAPTIVE_NP);
    pthread_mutex_init(&m->lock, &attr);
    pthread_mutexattr_destroy(&attr);

    bus_init(&m->ports, "port", &m->lock);
    bus_init(&m->mmio, "MMIO", &m->lock);
    int ret = memory_init(&m->memory);
    if (ret)
        goto out;
    ret = -ENOMEM;
    m->loop = loop_create(&m->lock);
    if (!m->loop)
        goto out;
    m->clock = clock_create(m->loop, manual_clock);
    if (!m->clock)
        goto out;
    return 0;

out:
    machine_destroy(m);
    return ret;
}

void machine_destroy_devices(struct machine *m)
{
    struct device *last_first = NULL;
    while (m->devices) {
        struct device *d = m->devices;
        m->devices = d->next;
        d->next = last_first;
        last_first = d;
    }
    m->devices_tail = &m->devices;
    pthread_mutex_lock(&m->lock);
    while (last_first) {
        struct device *d = last_first;
        last_first = d->next;
        if (d->ops->destroy)
            d->ops->destroy(d);
    }
    pthread_mutex_unlock(&m->lock);
}

void machine_destroy(struct machine *m)
{
    machine_destroy_devices(m);
    clock_destroy(m->clock);
    loop_destroy(m->loop);
    m->clock = NULL;
    m->loop = NULL;
    bus_destroy(&m->mmio);
    bus_destroy(&m->ports);
    memory_destroy(&m->memory);
    pthread_mutex_destroy(&m->lock);
}

void machine_add_device(struct machine *m, struct device *dev, const struct device_ops *ops)
{
    unsigned number = 0;
    for (struct device *d = m->devices; d; d = d->next)
        if (strcmp(d->ops->name, ops->name) == 0)
            number++;
    dev->ops = ops;
    dev->next = NULL;
    snprintf(dev->id, sizeof(dev->id), "%.20s%u", ops->name, number);
    *m->devices_tail = dev;
    m->devices_tail = &dev->next;
}

struct device *machine_find_device(struct machine *m, const char *id)
{
    for (struct device *d = m->devices; d; d = d->next)
        if (strcmp(d->id, id) == 0)
            return d;
    return NULL;
}

void machine_reset_devices(struct machine *m)
{
    for (struct device *d = m->devices; d; d = d->next)
        if (d->ops->reset)
            d->ops->reset(d);
}

int machine_pause_devices(struct machine *m)
{
    for (struct device *d = m->devices; d; d = d->next) {
        int ret = d->ops->pause ? d->ops->pause(d) : 0;
        if (ret == 0)
            continue;
        log_error("%s cannot pause: %s", d->id, strerror(-ret));
        for (struct device *p = m->devices; p != d; p = p->next)
            if (p->ops->resume)
                p->ops->resume(p);
        return ret;
    }
    return 0;
}

int machine_resume_devices(struct machine *m)
{
    int first_error = 0;
    for (struct device *d = m->devices; d; d = d->next) {
        int ret = d->ops->resume ? d->ops->resume(d) : 0;
        if (ret) {
            log_error("%s cannot resume: %s", d->id, strerror(-ret));
            first_error = first_error ? first_error : ret;
        }
    }
    return first_error;
}

void machine_save_devices(struct machine *m, struct state_writer *w)
{
    state_begin(w, "devices", 1);
    for (struct device *d = m->devices; d; d = d->next) {
        if (!d->ops->save)
            continue;
        state_begin(w, d->id, d->ops->version);
        d->ops->save(d, w);
        state_end(w);
    }
    state_end(w);
}

static int load_device(struct device *d, const struct state_reader *devices)
{
    struct state_reader r;
    int ret = state_open(devices, d->id, &r);
    if (ret == -ENOENT) {
        log_error("the saved machine has no device %s: give the devices that it was saved with",
                  d->id);
        return -EINVAL;
    }
    if (ret)
        return ret;
    if (r.version > d->ops->version) {
        log_error("the state of %s has version %u, this ringfort knows up to %u: use a newer one",
                  d->id, r.version, d->ops->version);
        return -EINVAL;
    }
    return d->ops->load(d, &r);
}

int machine_load_devices(struct machine *m, const struct state_reader *r)
{
    struct state_reader devices, one;
    int ret = state_open(r, "devices", &devices);
    if (ret) {
        if (ret == -ENOENT)
            log_error("the saved machine has no devices");
        return -EINVAL;
    }
    size_t cursor = 0;
    char name[64];
    while ((ret = state_next(&devices, &cursor, name, &one)) > 0) {
        if (!machine_find_device(m, name)) {
            log_error("the saved machine has a device %s: give the devices that it was saved with",
                      name);
            return -EINVAL;
        }
    }
    if (ret)
        return ret;
    /* All wires are low then; a device that lowered one while it loads would upset an irqchip that has loaded. */
    machine_reset_devices(m);
    for (struct device *d = m->devices; ret == 0 && d; d = d->next)
        if (d->ops->load)
            ret = load_device(d, &devices);
    return ret;
}
