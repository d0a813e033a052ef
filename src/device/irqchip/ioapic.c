/*
 * The IOAPIC: 24 wired inputs, each with a redirection entry that says where it goes (82093AA;
 * version 0x20 with the EOI register).
 *
 * Inputs come from devices under the machine lock, ends of interrupts from vCPU threads without it; the
 * own lock guards all. Input polarity is of no account: devices say "asserted", as guests and
 * tables do not agree on polarity in practice.
 */
#include <errno.h>

#include "base/log.h"
#include "device/bus.h"
#include "device/irqchip/internal.h"

enum { REG_SELECT = 0x00, REG_WINDOW = 0x10, REG_EOI = 0x40 };

#define VERSION (0x20u | (IOAPIC_INPUTS - 1) << 16)
#define ID_MASK 0x0f000000u

#define RTE_LOGICAL (UINT64_C(1) << 11)
#define RTE_REMOTE_IRR (UINT64_C(1) << 14)
#define RTE_LEVEL (UINT64_C(1) << 15)
#define RTE_MASKED (UINT64_C(1) << 16)
/* Delivery status (12) and remote IRR (14) are read-only; 49…55 carry destination bits 14:8, as MSI does. */
#define RTE_WRITABLE UINT64_C(0xfffe00000001afff)

void ioapic_init(struct ioapic *io, struct irqchip *chip)
{
    io->chip = chip;
    pthread_mutex_init(&io->lock, NULL);
    ioapic_reset(io);
}

void ioapic_destroy(struct ioapic *io)
{
    pthread_mutex_destroy(&io->lock);
}

static void message(uint64_t rte, struct apic_message *m)
{
    *m = (struct apic_message){
        .dest = (uint32_t)(rte >> 56) | ((uint32_t)(rte >> 49) & 0x7f) << 8,
        .logical = rte & RTE_LOGICAL,
        .level = rte & RTE_LEVEL,
        .mode = rte >> 8 & 7,
        .vector = (uint8_t)rte,
    };
    m->broadcast = m->dest == 0xff;
}

/* Lock held, before the entry is used. A mask is of no account, so that guests can mask for an instant at no cost. */
static void tell_route(struct ioapic *io, unsigned n)
{
    const struct lapic_host *host = atomic_load_explicit(&io->chip->host, memory_order_acquire);
    uint64_t route = io->rte[n] & ~(RTE_MASKED | RTE_REMOTE_IRR);
    struct apic_message m;
    uint64_t address;
    uint32_t data;

    if (!host || route == io->told[n])
        return;
    io->told[n] = route;
    message(route, &m);
    apic_message_encode(&m, &address, &data);
    host->route(host->opaque, n, address, data, m.level && m.mode <= APIC_LOWEST && m.vector >= 16);
}

void ioapic_tell_routes(struct ioapic *io)
{
    pthread_mutex_lock(&io->lock);
    for (unsigned i = 0; i < IOAPIC_INPUTS; i++) {
        io->told[i] = UINT64_MAX;
        tell_route(io, i);
    }
    pthread_mutex_unlock(&io->lock);
}

/* The wires keep their levels: those belong to the devices that hold them. */
void ioapic_reset(struct ioapic *io)
{
    pthread_mutex_lock(&io->lock);
    io->select = 0;
    io->id = IOAPIC_ID << 24;
    for (unsigned i = 0; i < IOAPIC_INPUTS; i++)
        io->rte[i] = RTE_MASKED;
    for (unsigned i = 0; i < IOAPIC_INPUTS; i++)
        tell_route(io, i);
    pthread_mutex_unlock(&io->lock);
}

/* Sends input n to where its entry says. Returns how many LAPICs took it. */
static unsigned send(struct ioapic *io, unsigned n)
{
    uint64_t rte = io->rte[n];
    struct apic_message m;
    message(rte, &m);
    /* SIPI is not among an IOAPIC's delivery modes (reserved). */
    if (m.mode == APIC_SIPI || m.mode == 3) {
        log_guest_error("IOAPIC input %u has the reserved delivery mode %u", n, m.mode);
        return 0;
    }
    return irqchip_deliver(io->chip, &m, NULL);
}

/* A level-triggered input sends while it is up, unless one is still being served. */
static void service_level(struct ioapic *io, unsigned n)
{
    uint64_t rte = io->rte[n];
    if (!io->asserted[n] || (rte & (RTE_MASKED | RTE_REMOTE_IRR)) || !(rte & RTE_LEVEL))
        return;
    unsigned mode = rte >> 8 & 7;
    /* Only what ends in an EOI sets remote IRR; if nobody took it, the next change tries again. */
    if (send(io, n) && mode <= APIC_LOWEST)
        io->rte[n] |= RTE_REMOTE_IRR;
}

void ioapic_set(struct ioapic *io, unsigned gsi, bool level)
{
    if (gsi >= IOAPIC_INPUTS)
        return;
    pthread_mutex_lock(&io->lock);
    if (!level) {
        if (io->asserted[gsi])
            io->asserted[gsi]--;
    } else if (io->asserted[gsi]++ == 0) {
        /* An edge that meets a mask is lost (82093AA §3.2.4, bit 16). */
        if (io->rte[gsi] & RTE_LEVEL)
            service_level(io, gsi);
        else if (!(io->rte[gsi] & RTE_MASKED))
            send(io, gsi);
    }
    pthread_mutex_unlock(&io->lock);
}

bool ioapic_level(struct ioapic *io, unsigned gsi)
{
    if (gsi >= IOAPIC_INPUTS)
        return false;
    pthread_mutex_lock(&io->lock);
    bool level = io->asserted[gsi] != 0;
    pthread_mutex_unlock(&io->lock);
    return level;
}

static void end_of_interrupt(struct ioapic *io, uint8_t vector)
{
    for (unsigned i = 0; i < IOAPIC_INPUTS; i++) {
        if ((uint8_t)io->rte[i] != vector || !(io->rte[i] & RTE_REMOTE_IRR))
            continue;
        io->rte[i] &= ~RTE_REMOTE_IRR;
        service_level(io, i);
    }
}

void ioapic_eoi(struct ioapic *io, uint8_t vector)
{
    pthread_mutex_lock(&io->lock);
    end_of_interrupt(io, vector);
    pthread_mutex_unlock(&io->lock);
}

static uint32_t read_register(struct ioapic *io)
{
    switch (io->select) {
    case 0: /* ID */
    case 2: /* arbitration ID follows it */
        return io->id;
    case 1:
        return VERSION;
    default: {
        unsigned i = io->select - 0x10u;
        if (i >= 2 * IOAPIC_INPUTS)
            return 0;
        return (uint32_t)(io->rte[i / 2] >> (i & 1 ? 32 : 0));
    }
    }
}

static void write_entry(struct ioapic *io, unsigned n, uint64_t value)
{
    io->rte[n] = (io->rte[n] & ~RTE_WRITABLE) | (value & RTE_WRITABLE);
    /* Guests of version 0x11 parts end an interrupt by a spell of edge mode; it works here as well. */
    if (!(io->rte[n] & RTE_LEVEL))
        io->rte[n] &= ~RTE_REMOTE_IRR;
    tell_route(io, n);
    service_level(io, n);
}

static void write_register(struct ioapic *io, uint32_t value)
{
    if (io->select == 0) {
        io->id = value & ID_MASK;
        return;
    }
    unsigned i = io->select - 0x10u;
    if (i >= 2 * IOAPIC_INPUTS)
        return;
    uint64_t rte = io->rte[i / 2];
    if (i & 1)
        rte = (rte & 0xffffffff) | (uint64_t)value << 32;
    else
        rte = (rte & ~UINT64_C(0xffffffff)) | value;
    write_entry(io, i / 2, rte);
}

/* Registers are 32 bits wide; a narrower read gets its low part, and what is wider or elsewhere nothing. */
static uint64_t ioapic_bus_read(void *opaque, uint64_t offset, unsigned size)
{
    struct ioapic *io = opaque;
    uint32_t value = 0;
    pthread_mutex_lock(&io->lock);
    if (offset == REG_SELECT)
        value = io->select;
    else if (offset == REG_WINDOW)
        value = read_register(io);
    pthread_mutex_unlock(&io->lock);
    return value;
}

static void ioapic_bus_write(void *opaque, uint64_t offset, uint64_t value, unsigned size)
{
    struct ioapic *io = opaque;
    pthread_mutex_lock(&io->lock);
    if (offset == REG_SELECT)
        io->select = (uint8_t)value;
    else if (offset == REG_WINDOW && size >= 4)
        write_register(io, (uint32_t)value);
    else if (offset == REG_EOI)
        end_of_interrupt(io, (uint8_t)value);
    pthread_mutex_unlock(&io->lock);
}

const struct bus_ops ioapic_bus_ops = {.read = ioapic_bus_read, .write = ioapic_bus_write};

void ioapic_save(struct ioapic *io, struct state_writer *w)
{
    pthread_mutex_lock(&io->lock);
    state_begin(w, "ioapic", 1);
    state_put_u64(w, "select", io->select);
    state_put_u64(w, "id", io->id);
    state_put_bytes(w, "rte", io->rte, sizeof(io->rte));
    state_put_bytes(w, "asserted", io->asserted, sizeof(io->asserted));
    state_end(w);
    pthread_mutex_unlock(&io->lock);
}

int ioapic_load(struct ioapic *io, const struct state_reader *r)
{
    struct state_reader s;
    uint64_t select, id, rte[IOAPIC_INPUTS];
    uint32_t asserted[IOAPIC_INPUTS];
    if (state_open(r, "ioapic", &s) || state_get_u64(&s, "select", &select) ||
        state_get_u64(&s, "id", &id) || state_get_bytes(&s, "rte", rte, sizeof(rte)) ||
        state_get_bytes(&s, "asserted", asserted, sizeof(asserted))) {
        log_error("saved IOAPIC: fields are missing");
        return -EINVAL;
    }
    pthread_mutex_lock(&io->lock);
    io->select = (uint8_t)select;
    io->id = (uint32_t)id & ID_MASK;
    for (unsigned i = 0; i < IOAPIC_INPUTS; i++) {
        io->rte[i] = rte[i] & (RTE_WRITABLE | RTE_REMOTE_IRR);
        io->asserted[i] = asserted[i];
        tell_route(io, i);
    }
    pthread_mutex_unlock(&io->lock);
    return 0;
}
