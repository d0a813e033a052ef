/*
 * The kernel's LAPICs and the machine's irqchip, which keeps the IOAPIC ("split").
 *
 * While vCPUs run, the LAPICs are the kernel's: messages go there by KVM_SIGNAL_MSI, and the kernel is told by routes which
 * vectors are level-triggered, so that it comes back with their ends. While they do not run, the state is in the machine's irqchip.
 */
#include <errno.h>
#include <string.h>

#include "base/log.h"
#include "base/util.h"
#include "device/machine.h"
#include "engine/kvm/kvm.h"
#include "isa/x86/kvmclock.h"

#define MSR_APIC_BASE 0x1bu
#define MSR_TSC_DEADLINE 0x6e0u
#define BASE_ENABLED (1ull << 11)

/* Word of a register page; the offsets are those of SDM vol. 3A table 11-1. */
#define WORD(offset) ((offset) / 4)
enum { ISR = 0x100, IRR = 0x200, LVT_LINT1 = 0x360 };
#define LVT_MASKED (1u << 16)
enum { MODE_FIXED = 0, MODE_NMI = 4 };

_Static_assert(sizeof(((struct lapic_image *)0)->page) == KVM_APIC_REG_SIZE, "both are the register page");

/* ---- from the machine's irqchip ---- */

/* The destination's upper bits are in bits 11:5 of a guest's address, and apart in KVM's. */
static void split_address(uint64_t address, uint32_t *low, uint32_t *high)
{
    *low = (uint32_t)address & 0xfffff01c;
    *high = (uint32_t)(address >> 5 & 0x7f) << 8;
}

static unsigned send(void *opaque, uint64_t address, uint32_t data)
{
    struct kvm_machine *k = opaque;
    struct kvm_msi msi = { .data = data };
    int r;

    split_address(address, &msi.address_lo, &msi.address_hi);
    r = kvm_ioctl(k->fd, KVM_SIGNAL_MSI, &msi);
    /* Negative: nobody has that address, which is the guest's own affair. */
    return r > 0 ? (unsigned)r : 0;
}

static void pulse_lint1(void *opaque)
{
    struct kvm_machine *k = opaque;

    pthread_mutex_lock(&k->lock);
    for (unsigned i = 0; i < KVM_MAX_VCPUS; i++)
        if (k->vcpu[i])
            kvm_request(k->vcpu[i], KVM_REQUEST_LINT1);
    pthread_mutex_unlock(&k->lock);
}

/* All that the kernel has to know are the level-triggered ones: of other interrupts nobody asks the end. */
static void route(void *opaque, unsigned input, uint64_t address, uint32_t data, bool level)
{
    struct kvm_machine *k = opaque;
    struct {
        struct kvm_irq_routing head;
        struct kvm_irq_routing_entry entry[IOAPIC_INPUTS];
    } table = { 0 };
    struct kvm_irq_routing_entry e = { .gsi = input, .type = KVM_IRQ_ROUTING_MSI };
    int err = 0;

    split_address(address, &e.u.msi.address_lo, &e.u.msi.address_hi);
    e.u.msi.data = data;
    pthread_mutex_lock(&k->lock);
    if (level || k->routed[input]) {
        k->route[input] = e;
        k->routed[input] = level;
        for (unsigned i = 0; i < IOAPIC_INPUTS; i++)
            if (k->routed[i])
                table.entry[table.head.nr++] = k->route[i];
        err = kvm_ioctl(k->fd, KVM_SET_GSI_ROUTING, &table);
    }
    pthread_mutex_unlock(&k->lock);
    if (err < 0)
        log_error("KVM does not take the routes of interrupts: %s", strerror(-err));
}

int kvm_irqchip_init(struct kvm_machine *k)
{
    struct kvm_enable_cap split = { .cap = KVM_CAP_SPLIT_IRQCHIP, .args = { IOAPIC_INPUTS } };
    struct kvm_enable_cap ids = { .cap = KVM_CAP_X2APIC_API, .args = { KVM_X2APIC_API_USE_32BIT_IDS } };
    int err = kvm_ioctl(k->fd, KVM_ENABLE_CAP, &split);

    if (err >= 0)
        err = kvm_ioctl(k->fd, KVM_ENABLE_CAP, &ids);
    if (err < 0) {
        log_error("engine kvm: the kernel gives no LAPICs without an IOAPIC: %s", strerror(-err));
        return err;
    }
    k->lapic_host = (struct lapic_host){ .send = send, .pulse_lint1 = pulse_lint1, .route = route, .opaque = k };
    irqchip_set_host(k->chip, &k->lapic_host);
    return 0;
}

/* ---- moving the state ---- */

static void to_kernel(struct kvm_vcpu *v)
{
    struct lapic_image image;
    int err;

    lapic_take(v->vcpu->lapic, &image);
    err = kvm_msr_set(v, MSR_APIC_BASE, image.base);
    if (err >= 0)
        err = kvm_ioctl(v->fd, KVM_SET_LAPIC, image.page);
    /* The mode of the timer has to be known first. */
    if (err >= 0 && image.tsc_deadline)
        err = kvm_msr_set(v, MSR_TSC_DEADLINE, image.tsc_deadline);
    if (err < 0)
        log_error("vCPU %u: KVM does not take the state of its LAPIC: %s", v->vcpu->index, strerror(-err));
}

void kvm_lapics_to_kernel(struct kvm_machine *k)
{
    for (unsigned i = 0; i < KVM_MAX_VCPUS; i++)
        if (k->vcpu[i])
            to_kernel(k->vcpu[i]);
}

/*
 * An interrupt that was acknowledged, but whose delivery was cut off by an exit, goes back to where it came from: nothing else has room
 * for it. KVM forgets it. The same for an NMI.
 */
static void take_back_interrupt(struct kvm_vcpu *v, struct lapic_image *image)
{
    struct kvm_vcpu_events e;

    if (kvm_ioctl(v->fd, KVM_GET_VCPU_EVENTS, &e) < 0 || !(e.nmi.injected || (e.interrupt.injected && !e.interrupt.soft)))
        return;
    if (e.interrupt.injected && !e.interrupt.soft) {
        unsigned word = e.interrupt.nr / 32 * 4;
        uint32_t bit = 1u << e.interrupt.nr % 32;

        image->page[WORD(ISR) + word] &= ~bit;
        image->page[WORD(IRR) + word] |= bit;
        e.interrupt.injected = 0;
    }
    if (e.nmi.injected) {
        e.nmi.injected = 0;
        e.nmi.masked = 0;
        e.nmi.pending = 1;
    }
    e.flags |= KVM_VCPUEVENT_VALID_NMI_PENDING;
    kvm_ioctl(v->fd, KVM_SET_VCPU_EVENTS, &e);
}

static void to_machine(struct kvm_vcpu *v)
{
    struct lapic_image image = { 0 };
    int err = kvm_ioctl(v->fd, KVM_GET_LAPIC, image.page);

    if (err >= 0)
        err = kvm_msr_get(v, MSR_APIC_BASE, &image.base);
    if (err < 0) {
        log_error("vCPU %u: KVM does not give the state of its LAPIC: %s", v->vcpu->index, strerror(-err));
        return;
    }
    /* A KVM without the register has no such timer. */
    kvm_msr_get(v, MSR_TSC_DEADLINE, &image.tsc_deadline);
    take_back_interrupt(v, &image);
    lapic_put(v->vcpu->lapic, &image, x86_tsc_base(v->k->machine, v->k->tsc_hz) + kvm_tsc_offset(v));
}

void kvm_lapics_to_machine(struct kvm_machine *k)
{
    for (unsigned i = 0; i < KVM_MAX_VCPUS; i++)
        if (k->vcpu[i])
            to_machine(k->vcpu[i]);
}

/* ---- LINT1 ---- */

void kvm_lapic_pulse_lint1(struct kvm_vcpu *v)
{
    struct kvm_lapic_state state;
    uint64_t base;
    uint32_t lvt;

    if (kvm_ioctl(v->fd, KVM_GET_LAPIC, &state) < 0 || kvm_msr_get(v, MSR_APIC_BASE, &base) < 0 || !(base & BASE_ENABLED))
        return;
    lvt = load_le32(state.regs + LVT_LINT1);
    if (lvt & LVT_MASKED)
        return;
    switch (lvt >> 8 & 7) {
    case MODE_NMI:
        kvm_ioctl(v->fd, KVM_NMI, NULL);
        break;
    case MODE_FIXED:
        send(v->k, LAPIC_DEFAULT_BASE | (uint64_t)(v->vcpu->index & 0xff) << 12 | (uint64_t)(v->vcpu->index >> 8) << 5, lvt & 0xff);
        break;
    }
}
