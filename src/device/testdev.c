/*
 * isa-debug-exit and pc-testdev; testdev.h has the registers. Machine lock held.
 */
#include "device/testdev.h"

#include <errno.h>
#include <stdlib.h>

#include "base/log.h"
#include "base/util.h"
#include "device/machine.h"

/* isa-debug-exit. */

struct debug_exit {
    struct device dev;
    struct machine *machine;
    uint64_t base;
};

static uint64_t exit_read(void *opaque, uint64_t offset, unsigned size)
{
    return 0;
}

static void exit_write(void *opaque, uint64_t offset, uint64_t value, unsigned size)
{
    struct debug_exit *d = opaque;
    machine_raise(d->machine, MACHINE_EXIT, (int)((uint32_t)value << 1 | 1));
}

static const struct bus_ops exit_bus_ops = {.read = exit_read, .write = exit_write};

static void exit_destroy(struct device *dev)
{
    struct debug_exit *d = container_of(dev, struct debug_exit, dev);
    bus_remove(&d->machine->ports, d->base, d);
    free(d);
}

/* Without state of its own. */
static const struct device_ops exit_ops = {
    .name = "isa-debug-exit", .version = 1, .destroy = exit_destroy};

int testdev_add_debug_exit(struct machine *m, uint64_t iobase, uint64_t iosize)
{
    if (iosize == 0 || iosize > 256 || iobase > 0xffff || 0x10000 - iobase < iosize) {
        log_error("isa-debug-exit: ports %#llx+%#llx do not exist (iobase below 0x10000, iosize 1 to 256)",
                  (unsigned long long)iobase, (unsigned long long)iosize);
        return -EINVAL;
    }
    struct debug_exit *d = calloc(1, sizeof(*d));
    if (!d) {
        log_error("out of memory for isa-debug-exit");
        return -ENOMEM;
    }
    d->machine = m;
    d->base = iobase;
    int ret = bus_add(&m->ports, iobase, iosize, &exit_bus_ops, d, "isa-debug-exit");
    if (ret) {
        free(d);
        return ret;
    }
    machine_add_device(m, &d->dev, &exit_ops);
    return 0;
}

/* pc-testdev. */

#define REGISTER_PORT 0xe0u
#define FLUSH_PORT 0xe4u
#define REGISTER_BYTE_PORT 0xe8u
#define IRQ_PORT 0x2000u
#define IRQS 24u
#define MEMORY_BASE 0xff000000u
#define MEMORY_SIZE 0x10000u

struct pc_testdev {
    struct device dev;
    struct machine *machine;
    uint8_t port_register[4];
    struct irq_line irq[IRQS];
    uint8_t memory[MEMORY_SIZE];
};

/* Both views of the register: its bytes at their places, and accesses never leave the range. */
static uint64_t register_read(void *opaque, uint64_t offset, unsigned size)
{
    struct pc_testdev *t = opaque;
    uint64_t value = 0;
    memcpy(&value, &t->port_register[offset], size);
    return value;
}

static void register_write(void *opaque, uint64_t offset, uint64_t value, unsigned size)
{
    struct pc_testdev *t = opaque;
    memcpy(&t->port_register[offset], &value, size);
}

static const struct bus_ops register_ops = {.read = register_read, .write = register_write};

/* Of what can only be written. */
static uint64_t nothing_read(void *opaque, uint64_t offset, unsigned size)
{
    return 0;
}

static void flush_write(void *opaque, uint64_t offset, uint64_t value, unsigned size)
{
    struct pc_testdev *t = opaque;
    gpa_t page = value & GUEST_PAGE_MASK;
    if (memory_find(&t->machine->memory, page))
        memory_mark_written(&t->machine->memory, page, GUEST_PAGE_SIZE);
}

static const struct bus_ops flush_ops = {.read = nothing_read, .write = flush_write};

static void lines_write(void *opaque, uint64_t offset, uint64_t value, unsigned size)
{
    struct pc_testdev *t = opaque;
    irq_set(&t->irq[offset], value != 0);
}

static const struct bus_ops lines_ops = {.read = nothing_read, .write = lines_write};

static uint64_t memory_area_read(void *opaque, uint64_t offset, unsigned size)
{
    struct pc_testdev *t = opaque;
    uint64_t value = 0;
    memcpy(&value, &t->memory[offset], size);
    return value;
}

static void memory_area_write(void *opaque, uint64_t offset, uint64_t value, unsigned size)
{
    struct pc_testdev *t = opaque;
    memcpy(&t->memory[offset], &value, size);
}

static const struct bus_ops memory_area_ops = {.read = memory_area_read, .write = memory_area_write};

static void testdev_reset(struct device *dev)
{
    struct pc_testdev *t = container_of(dev, struct pc_testdev, dev);
    memset(t->port_register, 0, sizeof(t->port_register));
    memset(t->memory, 0, sizeof(t->memory));
    for (unsigned i = 0; i < IRQS; i++)
        irq_set(&t->irq[i], false);
}

static void testdev_save(struct device *dev, struct state_writer *w)
{
    struct pc_testdev *t = container_of(dev, struct pc_testdev, dev);
    uint64_t levels = 0;
    for (unsigned i = 0; i < IRQS; i++)
        levels |= (uint64_t)t->irq[i].level << i;
    state_put_bytes(w, "register", t->port_register, sizeof(t->port_register));
    state_put_u64(w, "irq_levels", levels);
    state_put_bytes(w, "memory", t->memory, sizeof(t->memory));
}

static int testdev_load(struct device *dev, const struct state_reader *r)
{
    struct pc_testdev *t = container_of(dev, struct pc_testdev, dev);
    uint64_t levels;
    if (state_get_bytes(r, "register", t->port_register, sizeof(t->port_register)) ||
        state_get_u64(r, "irq_levels", &levels) ||
        state_get_bytes(r, "memory", t->memory, sizeof(t->memory))) {
        log_error("saved %s: fields are missing", dev->id);
        return -EINVAL;
    }
    for (unsigned i = 0; i < IRQS; i++)
        t->irq[i].level = levels >> i & 1;
    return 0;
}

static void testdev_destroy(struct device *dev)
{
    struct pc_testdev *t = container_of(dev, struct pc_testdev, dev);
    struct bus *ports = &t->machine->ports;
    bus_remove(ports, REGISTER_PORT, t);
    bus_remove(ports, FLUSH_PORT, t);
    bus_remove(ports, REGISTER_BYTE_PORT, t);
    bus_remove(ports, IRQ_PORT, t);
    bus_remove(&t->machine->mmio, MEMORY_BASE, t);
    free(t);
}

static const struct device_ops testdev_ops = {
    .name = "pc-testdev",
    .version = 1,
    .reset = testdev_reset,
    .save = testdev_save,
    .load = testdev_load,
    .destroy = testdev_destroy,
};

int testdev_add_pc_testdev(struct machine *m)
{
    struct pc_testdev *t = calloc(1, sizeof(*t));
    if (!t) {
        log_error("out of memory for pc-testdev");
        return -ENOMEM;
    }
    t->machine = m;
    for (unsigned i = 0; i < IRQS; i++)
        t->irq[i] = (struct irq_line){.router = &m->irq, .gsi = i};
    int ret = bus_add(&m->ports, REGISTER_PORT, 4, &register_ops, t, "pc-testdev");
    if (!ret)
        ret = bus_add(&m->ports, FLUSH_PORT, 4, &flush_ops, t, "pc-testdev flush");
    if (!ret)
        ret = bus_add(&m->ports, REGISTER_BYTE_PORT, 4, &register_ops, t, "pc-testdev bytes");
    if (!ret)
        ret = bus_add(&m->ports, IRQ_PORT, IRQS, &lines_ops, t, "pc-testdev irq");
    if (!ret)
        ret = bus_add(&m->mmio, MEMORY_BASE, MEMORY_SIZE, &memory_area_ops, t, "pc-testdev memory");
    if (ret) {
        testdev_destroy(&t->dev);
        return ret;
    }
    machine_add_device(m, &t->dev, &testdev_ops);
    return 0;
}
