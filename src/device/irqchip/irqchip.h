/*
 * The software interrupt controllers of a PC: one local APIC per vCPU, one IOAPIC.
 *
 * Devices reach the IOAPIC with the machine lock held, LAPICs reach it (end of interrupt) without:
 * it has an own small lock. A local APIC is used by its own vCPU thread (register accesses, lapic_pending,
 * lapic_ack) and by any other thread that sends it an interrupt: an own small lock guards it, too. The order is
 * machine lock, IOAPIC lock, LAPIC lock; each function here may be called with or without the machine lock.
 * Wired inputs are shared by counting: a GSI is asserted while any of its irq_lines is.
 * Intel SDM vol. 3A ch. 11 (APIC), 82093AA (IOAPIC).
 */
#ifndef RINGFORT_DEVICE_IRQCHIP_H
#define RINGFORT_DEVICE_IRQCHIP_H

#include <stdbool.h>
#include <stdint.h>

#include "device/device.h"

#define LAPIC_DEFAULT_BASE 0xfee00000u
#define IOAPIC_BASE 0xfec00000u
#define IOAPIC_SIZE 0x1000u
#define IOAPIC_INPUTS 24u
#define IOAPIC_ID 0u            /* of the one IOAPIC, after reset; for the MADT */
#define LAPIC_BUS_HZ 1000000000u /* what the timer's divider divides */

struct machine;
struct irqchip;
struct lapic;

/*
 * How a LAPIC reaches its vCPU. Any thread, also the vCPU's own, with or without the machine lock and the
 * IOAPIC's: the function only notes it and kicks, and calls nothing of the irqchip but lapic_pending().
 * On LAPIC_INIT the vCPU itself calls lapic_reset(l, true) when it takes the INIT.
 */
enum lapic_signal {
    LAPIC_INTR,                 /* the answer of lapic_pending() may have changed to "yes" */
    LAPIC_NMI,
    LAPIC_SMI,
    LAPIC_INIT,
    LAPIC_SIPI,                 /* value: vector, start at vector << 12 */
};
typedef void lapic_signal_fn(void *opaque, enum lapic_signal signal, unsigned value);

/*
 * Creates IOAPIC (24 inputs at 0xFEC00000, id ioapic_id) and cpus LAPICs (APIC id = index), fills m->irq,
 * and maps the IOAPIC on m->mmio. tsc_hz: rate of the guest TSC for the TSC-deadline timer.
 */
struct irqchip *irqchip_create(struct machine *m, unsigned cpus, uint64_t tsc_hz);
struct lapic *irqchip_lapic(struct irqchip *chip, unsigned cpu);
/* The machine's irqchip, or NULL. Machine lock held. */
struct irqchip *irqchip_find(struct machine *m);
unsigned irqchip_cpus(const struct irqchip *chip);
/* Asserted state of an IOAPIC input (false for inputs it does not have). Machine lock held. */
bool irqchip_gsi_level(struct irqchip *chip, unsigned gsi);
/* An NMI button: pulses LINT1 of every LAPIC; what comes of it is in each LVT LINT1. Any thread. */
void irqchip_pulse_lint1(struct irqchip *chip);
void lapic_connect(struct lapic *l, lapic_signal_fn *signal, void *opaque);

/*
 * The 4 KiB register page (default 0xFEE00000), by the vCPU that owns it, machine lock not needed. A vCPU engine routes
 * accesses inside its own APIC base page here; MMIO offsets and x2APIC MSR numbers both become register indexes.
 * read/write: xAPIC MMIO of any size, at offset 0…4095.
 */
uint64_t lapic_mmio_read(struct lapic *l, unsigned offset, unsigned size);
void lapic_mmio_write(struct lapic *l, unsigned offset, uint64_t value, unsigned size);
/* x2APIC MSRs 0x800…0x8ff. 0, or -EINVAL: the guest gets #GP. */
int lapic_msr_read(struct lapic *l, uint32_t msr, uint64_t *value);
int lapic_msr_write(struct lapic *l, uint32_t msr, uint64_t value);
/* IA32_APIC_BASE (0x1b). The write checks reserved bits and legal mode changes: -EINVAL → #GP. */
uint64_t lapic_base(const struct lapic *l);
int lapic_set_base(struct lapic *l, uint64_t value);
/* IA32_TSC_DEADLINE (0x6e0); the guest's own TSC value. tsc_offset: guest TSC = host TSC + offset. */
uint64_t lapic_tsc_deadline(struct lapic *l);
void lapic_set_tsc_deadline(struct lapic *l, uint64_t deadline, uint64_t guest_tsc_now);
/* CR8: TPR bits 7:4. */
uint8_t lapic_cr8(struct lapic *l);
void lapic_set_cr8(struct lapic *l, uint8_t cr8);

/* The highest-priority vector that may be delivered now, or -1. Cheap: one atomic read when there is none. */
int lapic_pending(struct lapic *l);
/* Moves that vector from IRR to ISR (INTA). Returns it, or -1 when it is gone (spurious: deliver none). */
int lapic_ack(struct lapic *l);

/* Reset as by INIT (keeps APIC id) or power-on. */
void lapic_reset(struct lapic *l, bool init);

/*
 * ---- LAPICs that an engine has itself (KVM's, in the kernel) ----
 *
 * While the machine's vCPUs run, the engine's LAPICs work and the ones here stand still; what is sent to LAPICs from here
 * (MSI, IOAPIC) goes to the engine, and ends of level-triggered interrupts come back by irqchip_eoi(). While they do not run,
 * the state is here, where it is saved, loaded and reset like any device's, and what arrives waits here. The
 * engine moves it: lapic_take() or lapic_put() for each vCPU, between irqchip_move_begin() and irqchip_move_end().
 */
struct lapic_host {
    /* A message for the engine's LAPICs, in the form of an MSI (as irqchip_msi() gets it). Returns how many accepted it. Any thread. */
    unsigned (*send)(void *opaque, uint64_t address, uint32_t data);
    /* Pulses LINT1 of all. Any thread. */
    void (*pulse_lint1)(void *opaque);
    /*
     * What IOAPIC input sends from now on, before it is sent; level: it needs to be told the end of it. Only calls with another
     * content than the last one. Any thread.
     */
    void (*route)(void *opaque, unsigned input, uint64_t address, uint32_t data, bool level);
    void *opaque;
};
/* NULL: the LAPICs here work (the state is to be here then). No vCPU runs. host is borrowed. */
void irqchip_set_host(struct irqchip *chip, const struct lapic_host *host);
/* Nothing is delivered to any LAPIC between these two. begin returns where the state is: true: in the host. Any thread. */
bool irqchip_move_begin(struct irqchip *chip);
void irqchip_move_end(struct irqchip *chip, bool in_host);
/* The end of a level-triggered interrupt. Any thread. */
void irqchip_eoi(struct irqchip *chip, uint8_t vector);

/* The registers as in the register page, one in each 16 bytes, and what is not among them. */
struct lapic_image {
    uint32_t page[256];
    uint64_t base;              /* IA32_APIC_BASE */
    uint64_t tsc_deadline;      /* IA32_TSC_DEADLINE; 0: not armed */
};
/* Takes the state out; the timer stops. A count-down timer that does not run has an initial count of 0. */
void lapic_take(struct lapic *l, struct lapic_image *image);
/*
 * Puts a state in; one that no LAPIC can have becomes a legal one. The timer goes on. A one-shot timer with an initial but no current
 * count expires at once: it may have done so before, but one interrupt too many is better than one too few.
 */
void lapic_put(struct lapic *l, const struct lapic_image *image, uint64_t guest_tsc_now);

/* Sets a request of the board's (IPI from another bus agent, MSI): SDM 11.11.1 address and data. Any thread. */
void irqchip_msi(struct irqchip *chip, uint64_t address, uint32_t data);

/*
 * The LAPIC state in the layout of the register page (canonical state; KVM uses the same): 1 KiB of
 * registers plus base, TSC deadline and timer remaining, through save/load of the device "irqchip".
 */

#endif
