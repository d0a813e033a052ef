/*
 * Interrupt wiring between devices and the interrupt controllers.
 *
 * A device has struct irq_line for a wired interrupt (global system interrupt, GSI) and
 * sends message-signalled interrupts through struct irq_router. Who implements them
 * (the software IOAPIC and LAPICs, or KVM's) is not the device's business. Machine lock held.
 */
#ifndef RINGFORT_DEVICE_IRQ_H
#define RINGFORT_DEVICE_IRQ_H

#include <stdbool.h>
#include <stdint.h>

struct irq_router {
    /* Level of a GSI input. Called only on changes. */
    void (*set_gsi)(void *opaque, unsigned gsi, bool level);
    /* A message-signalled interrupt: a 32-bit write of data to address (SDM vol. 3A 11.11). Any thread. */
    void (*send_msi)(void *opaque, uint64_t address, uint32_t data);
    void *opaque;
};

/* One wired interrupt of one device. level is the device's output; state that its owner saves. */
struct irq_line {
    struct irq_router *router;  /* borrowed */
    unsigned gsi;
    bool level;
};

static inline void irq_set(struct irq_line *line, bool level)
{
    if (line->level != level) {
        line->level = level;
        line->router->set_gsi(line->router->opaque, line->gsi, level);
    }
}

static inline void msi_send(struct irq_router *r, uint64_t address, uint32_t data)
{
    r->send_msi(r->opaque, address, data);
}

#endif
