/*
 * The interrupt controllers as one device: making them, finding whom a message is for, saved state.
 */
#include "device/irqchip/irqchip.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/log.h"
#include "device/irqchip/internal.h"
#include "device/machine.h"

#define MAX_CPUS 1024

/* Among those that m names, the one that does the least important thing now; ties go round. */
static struct lapic *find_lowest(struct irqchip *chip, const struct apic_message *m,
                                 const struct lapic *except)
{
    unsigned start = atomic_fetch_add_explicit(&chip->next_lowest, 1, memory_order_relaxed);
    struct lapic *best = NULL;
    int best_priority = 0;
    for (unsigned i = 0; i < chip->cpus; i++) {
        struct lapic *l = &chip->lapic[(start + i) % chip->cpus];
        if (l == except || !lapic_matches(l, m))
            continue;
        int priority = lapic_priority(l);
        if (priority >= 0 && (!best || priority < best_priority)) {
            best = l;
            best_priority = priority;
        }
    }
    return best;
}

/* By the LAPICs here. */
static unsigned deliver(struct irqchip *chip, const struct apic_message *m, const struct lapic *except)
{
    if (m->mode == APIC_LOWEST) {
        struct lapic *l = find_lowest(chip, m, except);
        return l && lapic_deliver(l, m);
    }
    if (!m->logical && !m->broadcast) {
        if (m->dest >= chip->cpus)
            return 0;
        struct lapic *l = &chip->lapic[m->dest];
        return l != except && lapic_matches(l, m) && lapic_deliver(l, m);
    }
    unsigned accepted = 0;
    for (unsigned i = 0; i < chip->cpus; i++) {
        struct lapic *l = &chip->lapic[i];
        if (l != except && lapic_matches(l, m))
            accepted += lapic_deliver(l, m);
    }
    return accepted;
}

void apic_message_encode(const struct apic_message *m, uint64_t *address, uint32_t *data)
{
    uint32_t dest = m->broadcast ? 0xff : m->dest;

    *address = LAPIC_DEFAULT_BASE | (uint64_t)(dest & 0xff) << 12 | (uint64_t)(dest >> 8 & 0x7f) << 5 |
               (uint64_t)m->logical << 2;
    *data = m->vector | (uint32_t)m->mode << 8 | (m->level ? 1u << 15 | 1u << 14 : 0);
}

unsigned irqchip_deliver(struct irqchip *chip, const struct apic_message *m, const struct lapic *except)
{
    const struct lapic_host *host = atomic_load_explicit(&chip->host, memory_order_acquire);
    unsigned accepted;

    if (likely(!host))
        return deliver(chip, m, except);
    pthread_rwlock_rdlock(&chip->move);
    if (chip->in_host) {
        uint64_t address;
        uint32_t data;
        apic_message_encode(m, &address, &data);
        accepted = host->send(host->opaque, address, data);
    } else {
        accepted = deliver(chip, m, except);
    }
    pthread_rwlock_unlock(&chip->move);
    return accepted;
}

void irqchip_set_host(struct irqchip *chip, const struct lapic_host *host)
{
    pthread_rwlock_wrlock(&chip->move);
    chip->in_host = false;
    atomic_store_explicit(&chip->host, host, memory_order_release);
    pthread_rwlock_unlock(&chip->move);
    if (host)
        ioapic_tell_routes(&chip->ioapic);
}

bool irqchip_move_begin(struct irqchip *chip)
{
    pthread_rwlock_wrlock(&chip->move);
    return chip->in_host;
}

void irqchip_move_end(struct irqchip *chip, bool in_host)
{
    chip->in_host = in_host;
    pthread_rwlock_unlock(&chip->move);
}

void irqchip_eoi(struct irqchip *chip, uint8_t vector)
{
    ioapic_eoi(&chip->ioapic, vector);
}

void irqchip_msi(struct irqchip *chip, uint64_t address, uint32_t data)
{
    if (address >> 20 != 0xfee) {
        log_guest_error("the guest sends a message-signalled interrupt to %#llx, where no APIC is",
                        (unsigned long long)address);
        return;
    }
    struct apic_message m = {
        /* Bits 11:5 extend the destination as KVM and Hyper-V do; zero for guests that do not know. */
        .dest = (uint32_t)(address >> 12 & 0xff) | (uint32_t)(address >> 5 & 0x7f) << 8,
        .logical = address >> 2 & 1,
        .level = data >> 15 & 1,
        .mode = data >> 8 & 7,
        .vector = (uint8_t)data,
    };
    m.broadcast = m.dest == 0xff;
    if (m.mode == APIC_SIPI || m.mode == 3)
        return;
    /* The redirection hint with a logical destination asks for one of them (11.11.1). */
    if (m.mode == APIC_FIXED && (address & 8) && m.logical)
        m.mode = APIC_LOWEST;
    irqchip_deliver(chip, &m, NULL);
}

void irqchip_pulse_lint1(struct irqchip *chip)
{
    const struct lapic_host *host = atomic_load_explicit(&chip->host, memory_order_acquire);
    if (host) {
        pthread_rwlock_rdlock(&chip->move);
        bool in_host = chip->in_host;
        if (in_host)
            host->pulse_lint1(host->opaque);
        pthread_rwlock_unlock(&chip->move);
        if (in_host)
            return;
    }
    for (unsigned i = 0; i < chip->cpus; i++)
        lapic_pulse_lint(&chip->lapic[i], 1);
}

struct lapic *irqchip_lapic(struct irqchip *chip, unsigned cpu)
{
    return cpu < chip->cpus ? &chip->lapic[cpu] : NULL;
}

unsigned irqchip_cpus(const struct irqchip *chip)
{
    return chip->cpus;
}

bool irqchip_gsi_level(struct irqchip *chip, unsigned gsi)
{
    return ioapic_level(&chip->ioapic, gsi);
}

static void set_gsi(void *opaque, unsigned gsi, bool level)
{
    struct irqchip *chip = opaque;
    ioapic_set(&chip->ioapic, gsi, level);
}

static void send_msi(void *opaque, uint64_t address, uint32_t data)
{
    irqchip_msi(opaque, address, data);
}

static void irqchip_reset(struct device *dev)
{
    struct irqchip *chip = container_of(dev, struct irqchip, dev);
    ioapic_reset(&chip->ioapic);
    for (unsigned i = 0; i < chip->cpus; i++)
        lapic_reset(&chip->lapic[i], false);
}

static void irqchip_save(struct device *dev, struct state_writer *w)
{
    struct irqchip *chip = container_of(dev, struct irqchip, dev);
    state_put_u64(w, "cpus", chip->cpus);
    ioapic_save(&chip->ioapic, w);
    for (unsigned i = 0; i < chip->cpus; i++) {
        char name[16];
        snprintf(name, sizeof(name), "lapic%u", i);
        state_begin(w, name, 1);
        lapic_save(&chip->lapic[i], w);
        state_end(w);
    }
}

static int irqchip_load(struct device *dev, const struct state_reader *r)
{
    struct irqchip *chip = container_of(dev, struct irqchip, dev);
    uint64_t cpus;
    int ret = state_get_u64(r, "cpus", &cpus);
    if (ret || cpus != chip->cpus) {
        log_error("the saved machine has another number of vCPUs than this one (%u)", chip->cpus);
        return -EINVAL;
    }
    ret = ioapic_load(&chip->ioapic, r);
    for (unsigned i = 0; ret == 0 && i < chip->cpus; i++) {
        char name[16];
        struct state_reader s;
        snprintf(name, sizeof(name), "lapic%u", i);
        ret = state_open(r, name, &s);
        if (ret == 0)
            ret = lapic_load(&chip->lapic[i], &s);
        else
            log_error("the saved machine has no LAPIC %u", i);
    }
    return ret ? -EINVAL : 0;
}

static void drop_gsi(void *opaque, unsigned gsi, bool level) {}
static void drop_msi(void *opaque, uint64_t address, uint32_t data) {}

static void irqchip_destroy(struct device *dev)
{
    struct irqchip *chip = container_of(dev, struct irqchip, dev);
    chip->machine->irq = (struct irq_router){.set_gsi = drop_gsi, .send_msi = drop_msi};
    bus_remove(&chip->machine->mmio, IOAPIC_BASE, &chip->ioapic);
    for (unsigned i = 0; i < chip->cpus; i++)
        lapic_destroy(&chip->lapic[i]);
    ioapic_destroy(&chip->ioapic);
    pthread_rwlock_destroy(&chip->move);
    free(chip);
}

static const struct device_ops irqchip_ops = {
    .name = "irqchip",
    .version = 1,
    .reset = irqchip_reset,
    .save = irqchip_save,
    .load = irqchip_load,
    .destroy = irqchip_destroy,
};

struct irqchip *irqchip_create(struct machine *m, unsigned cpus, uint64_t tsc_hz)
{
    if (cpus == 0 || cpus > MAX_CPUS || tsc_hz == 0) {
        log_error("no machine can have %u vCPUs at %llu Hz (1 to %u vCPUs)", cpus,
                  (unsigned long long)tsc_hz, MAX_CPUS);
        return NULL;
    }
    struct irqchip *chip = calloc(1, sizeof(*chip) + cpus * sizeof(chip->lapic[0]));
    if (!chip) {
        log_error("out of memory for the interrupt controllers");
        return NULL;
    }
    chip->machine = m;
    chip->tsc_hz = tsc_hz;
    chip->cpus = cpus;
    pthread_rwlock_init(&chip->move, NULL);
    ioapic_init(&chip->ioapic, chip);
    for (unsigned i = 0; i < cpus; i++)
        lapic_init(&chip->lapic[i], chip, i);
    if (bus_add(&m->mmio, IOAPIC_BASE, IOAPIC_SIZE, &ioapic_bus_ops, &chip->ioapic, "ioapic")) {
        irqchip_destroy(&chip->dev);
        return NULL;
    }
    m->irq = (struct irq_router){.set_gsi = set_gsi, .send_msi = send_msi, .opaque = chip};
    machine_add_device(m, &chip->dev, &irqchip_ops);
    return chip;
}

struct irqchip *irqchip_find(struct machine *m)
{
    struct device *dev = machine_find_device(m, "irqchip0");
    return dev ? container_of(dev, struct irqchip, dev) : NULL;
}
