/*
 * Power off, reset, power button and the ACPI PM timer; power.h has the registers. Machine lock held.
 */
#include "device/power.h"

#include <errno.h>
#include <stdlib.h>

#include "base/log.h"
#include "base/util.h"
#include "device/machine.h"
#include "device/pci.h"

#define SLEEP_ENABLE (1u << 5)
#define CF9_PORT 0xcf9u
#define CF9_RESET (1u << 2)
#define CF9_BITS 0x0eu          /* system reset, reset CPU, full reset */
#define KEYBOARD_PORT 0x64u
#define KEYBOARD_RESET 0xfeu

struct power {
    struct device dev;
    struct machine *machine;
    bool cf9_claimed;           /* port 0xCF9 is ours, not the host bridge's */
    struct irq_line ged;
    uint8_t events;             /* pending, enum power_event_bit */
    uint8_t cf9;
};

static uint32_t pm_timer(const struct power *p)
{
    uint64_t ns = clock_now(p->machine->clock);
    return (uint32_t)((unsigned __int128)ns * POWER_PM_TIMER_HZ / 1000000000u);
}

static uint8_t read_byte(struct power *p, uint64_t port, uint32_t timer)
{
    uint8_t value = 0;
    if (port == POWER_GED_EVENTS) {
        value = p->events;
        p->events = 0;
        irq_set(&p->ged, false);
    } else if (port >= POWER_PM_TIMER && port < POWER_PM_TIMER + 4) {
        value = (uint8_t)(timer >> (8 * (port - POWER_PM_TIMER)));
    }
    return value;
}

/* An access of several bytes sees one value of the timer. */
static uint64_t power_read(void *opaque, uint64_t offset, unsigned size)
{
    struct power *p = opaque;
    uint32_t timer = pm_timer(p);
    uint64_t value = 0;
    for (unsigned i = 0; i < size; i++)
        value |= (uint64_t)read_byte(p, POWER_PORT + offset + i, timer) << (8 * i);
    return value;
}

static void power_write(void *opaque, uint64_t offset, uint64_t value, unsigned size)
{
    struct power *p = opaque;
    for (unsigned i = 0; i < size; i++) {
        uint64_t port = POWER_PORT + offset + i;
        uint8_t byte = (uint8_t)(value >> (8 * i));
        if (port == POWER_SLEEP_CONTROL && (byte & SLEEP_ENABLE)) {
            if ((byte >> 2 & 7) == POWER_S5_TYPE)
                machine_raise(p->machine, MACHINE_POWEROFF, 0);
            else
                log_guest_error("the guest asks for sleep type %u, which this machine has not",
                                byte >> 2 & 7u);
        } else if (port == POWER_RESET && byte == POWER_RESET_VALUE) {
            machine_raise(p->machine, MACHINE_RESET, 0);
        }
    }
}

static const struct bus_ops power_bus_ops = {.read = power_read, .write = power_write};

static uint64_t cf9_read(void *opaque, uint64_t offset, unsigned size)
{
    struct power *p = opaque;
    return p->cf9;
}

static void cf9_write(void *opaque, uint64_t offset, uint64_t value, unsigned size)
{
    struct power *p = opaque;
    uint8_t before = p->cf9;
    p->cf9 = (uint8_t)value & CF9_BITS;
    if (p->cf9 & ~before & CF9_RESET)
        machine_raise(p->machine, MACHINE_RESET, 0);
}

static const struct bus_ops cf9_ops = {.read = cf9_read, .write = cf9_write};

static uint64_t keyboard_read(void *opaque, uint64_t offset, unsigned size)
{
    return UINT64_MAX;
}

static void keyboard_write(void *opaque, uint64_t offset, uint64_t value, unsigned size)
{
    struct power *p = opaque;
    if ((uint8_t)value == KEYBOARD_RESET)
        machine_raise(p->machine, MACHINE_RESET, 0);
}

static const struct bus_ops keyboard_ops = {.read = keyboard_read, .write = keyboard_write};

void power_press_button(struct power *p)
{
    p->events |= POWER_EVENT_BUTTON;
    irq_set(&p->ged, true);
}

static void power_reset(struct device *dev)
{
    struct power *p = container_of(dev, struct power, dev);
    p->events = 0;
    p->cf9 = 0;
    irq_set(&p->ged, false);
}

static void power_save(struct device *dev, struct state_writer *w)
{
    struct power *p = container_of(dev, struct power, dev);
    state_put_u64(w, "events", p->events);
    state_put_u64(w, "cf9", p->cf9);
    state_put_u64(w, "ged_level", p->ged.level);
}

static int power_load(struct device *dev, const struct state_reader *r)
{
    struct power *p = container_of(dev, struct power, dev);
    uint64_t events, cf9, level;
    if (state_get_u64(r, "events", &events) || state_get_u64(r, "cf9", &cf9) ||
        state_get_u64(r, "ged_level", &level) || (events & ~(uint64_t)POWER_EVENT_BUTTON)) {
        log_error("saved %s: a field is missing or has a value that it cannot have", dev->id);
        return -EINVAL;
    }
    p->events = (uint8_t)events;
    p->cf9 = (uint8_t)cf9 & CF9_BITS;
    p->ged.level = level & 1;
    return 0;
}

static void power_destroy(struct device *dev)
{
    struct power *p = container_of(dev, struct power, dev);
    bus_remove(&p->machine->ports, POWER_PORT, p);
    bus_remove(&p->machine->ports, KEYBOARD_PORT, p);
    if (p->cf9_claimed)
        bus_remove(&p->machine->ports, CF9_PORT, p);
    free(p);
}

static const struct device_ops power_ops = {
    .name = "power",
    .version = 1,
    .reset = power_reset,
    .save = power_save,
    .load = power_load,
    .destroy = power_destroy,
};

struct power *power_create(struct machine *m, struct pci_host *pci)
{
    struct power *p = calloc(1, sizeof(*p));
    if (!p) {
        log_error("out of memory for the power controls");
        return NULL;
    }
    p->machine = m;
    p->ged = (struct irq_line){.router = &m->irq, .gsi = POWER_GED_GSI};
    p->cf9_claimed = !pci;
    if (bus_add(&m->ports, POWER_PORT, POWER_PORTS, &power_bus_ops, p, "power") ||
        bus_add(&m->ports, KEYBOARD_PORT, 1, &keyboard_ops, p, "keyboard reset") ||
        (!pci && bus_add(&m->ports, CF9_PORT, 1, &cf9_ops, p, "reset control"))) {
        power_destroy(&p->dev);
        return NULL;
    }
    /* The bridge was made before and is destroyed after this device. */
    if (pci)
        pci_host_forward_cf9(pci, &cf9_ops, p);
    machine_add_device(m, &p->dev, &power_ops);
    return p;
}

struct power *power_find(struct machine *m)
{
    struct device *dev = machine_find_device(m, "power0");
    return dev ? container_of(dev, struct power, dev) : NULL;
}
