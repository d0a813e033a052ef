/*
 * What the parts of the irqchip share: LAPICs, the IOAPIC and the routing between them.
 *
 * Locks: IOAPIC lock, then irqchip.move, then LAPIC lock; no LAPIC lock is held while another is taken.
 */
#ifndef RINGFORT_DEVICE_IRQCHIP_INTERNAL_H
#define RINGFORT_DEVICE_IRQCHIP_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>

#include "base/clock.h"
#include "base/util.h"
#include "device/irqchip/irqchip.h"

/* Delivery modes of ICR, LVTs, MSI data and redirection entries. */
enum apic_mode {
    APIC_FIXED = 0,
    APIC_LOWEST = 1,
    APIC_SMI = 2,
    APIC_NMI = 4,
    APIC_INIT = 5,
    APIC_SIPI = 6,
    APIC_EXTINT = 7,
};

/* An interrupt on its way to LAPICs. */
struct apic_message {
    uint32_t dest;
    bool broadcast;             /* the sender's form of "all": dest is then of no account */
    bool logical;
    bool level;                 /* level-triggered: sets TMR */
    uint8_t mode;               /* enum apic_mode */
    uint8_t vector;
};

/* Register indexes: xAPIC offset >> 4, x2APIC MSR & 0xff. */
enum {
    LAPIC_ID = 0x02, LAPIC_VERSION = 0x03, LAPIC_TPR = 0x08, LAPIC_APR = 0x09, LAPIC_PPR = 0x0a,
    LAPIC_EOI = 0x0b, LAPIC_RRD = 0x0c, LAPIC_LDR = 0x0d, LAPIC_DFR = 0x0e, LAPIC_SVR = 0x0f,
    LAPIC_ISR = 0x10, LAPIC_TMR = 0x18, LAPIC_IRR = 0x20, LAPIC_ESR = 0x28, LAPIC_CMCI = 0x2f,
    LAPIC_ICR = 0x30, LAPIC_ICR2 = 0x31, LAPIC_LVT_TIMER = 0x32, LAPIC_LVT_THERMAL = 0x33,
    LAPIC_LVT_PERF = 0x34, LAPIC_LVT_LINT0 = 0x35, LAPIC_LVT_LINT1 = 0x36, LAPIC_LVT_ERROR = 0x37,
    LAPIC_TIMER_INIT = 0x38, LAPIC_TIMER_COUNT = 0x39, LAPIC_TIMER_DIV = 0x3e, LAPIC_SELF_IPI = 0x3f,
    LAPIC_REGS = 0x40,
};

#define LAPIC_LVT_MASKED (1u << 16)
#define LAPIC_SVR_ENABLED (1u << 8)
#define LAPIC_SVR_NO_EOI_BROADCAST (1u << 12)

struct lapic {
    struct irqchip *chip;
    unsigned id;                /* = index of the vCPU */
    pthread_mutex_t lock;       /* guards what follows */
    _Atomic int deliverable;    /* what lapic_pending() answers; kept right by lapic_update() */
    _Atomic uint64_t base;      /* IA32_APIC_BASE */
    uint32_t reg[LAPIC_REGS];   /* the register page; ISR, TMR, IRR are bitmaps of eight words each */
    uint32_t errors;            /* seen since ESR was last written */

    /* Timer. deadline is guest time in ns; UINT64_MAX: stopped. */
    uint64_t timer_deadline;
    uint64_t timer_period;      /* ns, periodic mode */
    uint64_t tsc_deadline;      /* as written; 0: none */
    struct timer timer;

    lapic_signal_fn *signal;
    void *signal_opaque;
};

struct ioapic {
    struct irqchip *chip;
    pthread_mutex_t lock;
    uint64_t told[IOAPIC_INPUTS];       /* what the host knows of each entry */
    uint8_t select;
    uint32_t id;                /* register 0: bits 27:24 */
    uint64_t rte[IOAPIC_INPUTS];
    uint32_t asserted[IOAPIC_INPUTS];   /* how many lines hold the input up */
};

struct irqchip {
    struct device dev;
    struct machine *machine;
    uint64_t tsc_hz;
    struct ioapic ioapic;
    _Atomic unsigned next_lowest;       /* where the search for the lowest priority begins */
    _Atomic(const struct lapic_host *) host;    /* NULL: the LAPICs here work */
    pthread_rwlock_t move;              /* with a host: read to deliver, written to move the state of the LAPICs */
    bool in_host;                       /* guarded by move */
    unsigned cpus;
    struct lapic lapic[];
};

/* irqchip.c */

/*
 * Sends m to every LAPIC that it names; except, if not NULL, is left out. Returns how many accepted
 * it. No LAPIC lock held.
 */
unsigned irqchip_deliver(struct irqchip *chip, const struct apic_message *m, const struct lapic *except);

/* lapic.c. Own lock taken inside. */

void lapic_init(struct lapic *l, struct irqchip *chip, unsigned id);
void lapic_destroy(struct lapic *l);
void lapic_power_on(struct lapic *l);
bool lapic_matches(struct lapic *l, const struct apic_message *m);
/* For lowest-priority delivery: -1 when the APIC takes no interrupts now, else its PPR. */
int lapic_priority(struct lapic *l);
bool lapic_deliver(struct lapic *l, const struct apic_message *m);
void lapic_pulse_lint(struct lapic *l, unsigned pin);
/* The message in the form of an MSI. */
void apic_message_encode(const struct apic_message *m, uint64_t *address, uint32_t *data);
void lapic_save(struct lapic *l, struct state_writer *w);
int lapic_load(struct lapic *l, const struct state_reader *r);

/* lapic.c, for lapic_timer.c. Lock held; true: the vCPU has to be told after unlocking (lapic_tell). */
bool lapic_local(struct lapic *l, unsigned lvt);
void lapic_tell(struct lapic *l, bool changed);

/* lapic_timer.c. Lock held unless said otherwise. */

void lapic_timer_init(struct lapic *l);     /* no lock */
void lapic_timer_stop(struct lapic *l);
void lapic_timer_set_lvt(struct lapic *l, uint32_t value);
void lapic_timer_set_count(struct lapic *l, uint32_t value);
void lapic_timer_set_divider(struct lapic *l, uint32_t value);
uint32_t lapic_timer_count(const struct lapic *l);
/* Goes on from what an image has in TIMER_COUNT or as deadline; mode, initial count and divider are set already. */
void lapic_timer_continue(struct lapic *l, uint32_t count, uint64_t tsc_deadline, uint64_t guest_tsc_now);
void lapic_timer_save(struct lapic *l, struct state_writer *w);
int lapic_timer_load(struct lapic *l, const struct state_reader *r);

/* ioapic.c. Own lock taken inside. */

void ioapic_init(struct ioapic *io, struct irqchip *chip);
void ioapic_destroy(struct ioapic *io);
void ioapic_reset(struct ioapic *io);
/* Tells the irqchip's host all routes. */
void ioapic_tell_routes(struct ioapic *io);
extern const struct bus_ops ioapic_bus_ops;     /* opaque: struct ioapic */
void ioapic_set(struct ioapic *io, unsigned gsi, bool level);
bool ioapic_level(struct ioapic *io, unsigned gsi);
/* End of a level-triggered interrupt on some LAPIC. No LAPIC lock held. */
void ioapic_eoi(struct ioapic *io, uint8_t vector);
void ioapic_save(struct ioapic *io, struct state_writer *w);
int ioapic_load(struct ioapic *io, const struct state_reader *r);

#endif
