/*
 * The KVM engine's inside: what its files share. docs/kvm.md has the whole picture.
 *
 *   host.c     /dev/kvm and what it can do; the probe
 *   model.c    CPUID
 *   machine.c  what the vCPUs of one machine share: the VM, its memory, the clock
 *   dirty.c    which pages they write
 *   doorbell.c writes that are only notices, without leaving the guest
 *   irqchip.c  the kernel's LAPICs and the machine's irqchip
 *   state.c    registers, to and from the canonical state
 *   run.c      a vCPU's life and its exits
 */
#ifndef RINGFORT_ENGINE_KVM_H
#define RINGFORT_ENGINE_KVM_H

#include <linux/kvm.h>
#include <pthread.h>
#include <stdatomic.h>

#include "device/bus.h"
#include "engine/engine.h"

#define KVM_MAX_VCPUS 64

/* ---- host.c ---- */

struct kvm_host {
    int fd;                     /* /dev/kvm; open as long as the process lives */
    size_t run_size;            /* bytes of a vCPU's struct kvm_run and what follows */
    size_t xsave_size;          /* of KVM_GET_XSAVE2 */
    bool xcrs, tsc_control, manual_protect;
    uint32_t dirty_ring;        /* the most bytes that a vCPU's may have; 0: there are none */
};
/* Opened and looked at once. NULL: unusable; why (if not NULL) then says the reason and what to do, without a full stop. Any thread. */
const struct kvm_host *kvm_host(const char **why);
void kvm_probe(struct engine_report *r);

/* ---- model.c ---- */

const struct x86_cpu_model *kvm_offer(const struct x86_cpu_model *m, bool exact, const char **missing);
/* What CPUID shows on this vCPU, for KVM_SET_CPUID2; to be freed. NULL: out of memory. */
struct kvm_cpuid2 *kvm_cpuid_of(const struct vcpu *vcpu);

/* ---- machine.c ---- */

struct kvm_vcpu;

struct kvm_machine {
    const struct kvm_host *host;
    struct machine *machine;    /* borrowed */
    struct irqchip *chip;       /* borrowed */
    int fd;                     /* the VM */
    unsigned users;             /* vCPUs; guarded by the list's lock */
    struct kvm_machine *next;
    pthread_mutex_t lock;       /* guards what follows. A leaf: nothing else is locked under it */
    struct kvm_vcpu *vcpu[KVM_MAX_VCPUS];
    struct kvm_irq_routing_entry route[IOAPIC_INPUTS];
    bool routed[IOAPIC_INPUTS];
    unsigned inside;            /* vCPUs in kvm_run() */
    bool dirty_log;             /* guarded by memory.dirty_lock */
    uint32_t ring_entries;      /* of each vCPU's dirty ring, a power of two; 0: a bitmap is asked for instead */
    /* By region, made by dirty.c; with rings: written by vCPUs and not yet told, guarded by lock. Else room for the kernel's answer. */
    uint64_t *dirty_bitmap[MEMORY_MAX_REGIONS];
    uint64_t tsc_hz;            /* of the guest's counter */
    bool tsc_scaled;            /* which is not the host's */
    uint64_t tsc_skew;          /* scaled: the machine's counter (x86_tsc_base()) minus KVM's */
    struct lapic_host lapic_host;
    struct bus_listener listener;
    struct kvm_doorbell *doorbells;     /* guarded by the machine lock */
};

/* The one of this vCPU's machine, made by the first that asks. NULL: an error, logged, its errno in *err. */
struct kvm_machine *kvm_machine_get(const struct vcpu *vcpu, int *err);
void kvm_machine_put(struct kvm_machine *k);
/*
 * Around all that a vCPU does in kvm_run(). While one is inside, LAPICs and kvmclock are the kernel's; while none is, they are the
 * machine's, where they are saved and loaded.
 */
void kvm_enter(struct kvm_machine *k);
void kvm_leave(struct kvm_machine *k);

/* The regions of guest memory to the kernel, logged or not as dirty_log says. 0 or a negative errno (logged). */
int kvm_set_slots(struct kvm_machine *k);

/* ---- dirty.c ---- */

/* False: vCPUs get no dirty rings even where the host has them; for tests, before the machine is made. */
extern bool kvm_use_dirty_ring;

/* For a fresh VM, before it has vCPUs. */
void kvm_dirty_init(struct kvm_machine *k);
/* From here on the memory's dirty log knows what vCPUs write. */
void kvm_dirty_attach(struct kvm_machine *k);
void kvm_dirty_destroy(struct kvm_machine *k);
/* The vCPU's ring, before it runs and before it is in k->vcpu. 0 or a negative errno (silent). */
int kvm_ring_map(struct kvm_vcpu *v);
/* It is not in k->vcpu any more. */
void kvm_ring_unmap(struct kvm_vcpu *v);
/* Empties the rings of all vCPUs. Any thread. 0 or a negative errno (logged). */
int kvm_ring_drain(struct kvm_machine *k);

/* ---- doorbell.c ---- */

/* Machine lock held, or nothing else runs. */
void kvm_doorbells_start(struct kvm_machine *k);
void kvm_doorbells_stop(struct kvm_machine *k);

/* ---- irqchip.c ---- */

/* For a fresh VM: the split irqchip. 0 or a negative errno (logged). */
int kvm_irqchip_init(struct kvm_machine *k);
/* Moves the state of all LAPICs, between irqchip_move_begin() and _end(). No vCPU runs. */
void kvm_lapics_to_kernel(struct kvm_machine *k);
void kvm_lapics_to_machine(struct kvm_machine *k);
/* The vCPU's own thread: what a pulse of its LINT1 does. */
void kvm_lapic_pulse_lint1(struct kvm_vcpu *v);

/* ---- state.c ---- */

void kvm_export(struct vcpu *vcpu, struct x86_state *s);
void kvm_import(struct vcpu *vcpu, const struct x86_state *s);
/* Which MSRs of the canonical state this KVM has. */
void kvm_msrs_find(struct kvm_vcpu *v);
int kvm_msr_get(struct kvm_vcpu *v, uint32_t msr, uint64_t *value);
int kvm_msr_set(struct kvm_vcpu *v, uint32_t msr, uint64_t value);
/* The guest's TSC minus the machine's counter. */
uint64_t kvm_tsc_offset(struct kvm_vcpu *v);
void kvm_shift_tsc(struct vcpu *vcpu, uint64_t ticks);
/* Sets k->tsc_skew anew, if it is of account. */
void kvm_tsc_find_skew(struct kvm_machine *k);

/* ---- run.c ---- */

#define KVM_MSRS 64             /* of the canonical state, at most */

/* Requests from other threads. */
enum { KVM_REQUEST_EXIT = 1, KVM_REQUEST_LINT1 = 2, KVM_REQUEST_NMI = 4, KVM_REQUEST_INIT = 8, KVM_REQUEST_SIPI = 16 };

struct kvm_vcpu {
    struct vcpu *vcpu;          /* borrowed */
    struct kvm_machine *k;
    int fd;
    struct kvm_run *run;
    void *xsave;                /* host->xsave_size bytes */
    struct kvm_dirty_gfn *ring; /* NULL: none */
    uint32_t ring_next;         /* entries taken; guarded by k->lock */
    _Atomic uint32_t request;
    _Atomic uint8_t sipi_vector;
    bool told_about_tsc;
    bool shutdown;              /* it ended in a triple fault */
    struct x86_state kept;      /* what KVM does not keep of the state */
    bool msr_known[KVM_MSRS];
    pthread_mutex_t lock;       /* guards what follows */
    bool inside;                /* thread is in kvm_run() */
    pthread_t thread;
    struct engine_counters counters;    /* the vCPU's thread writes, others read */
};

/* Any thread: makes the vCPU leave the guest and look at its requests. */
void kvm_request(struct kvm_vcpu *v, uint32_t bits);
/* Sets up the signal that ends KVM_RUN; once. */
void kvm_signal_setup(void);
int kvm_kick_signal(void);

/* ioctl() that starts again when a signal came; -errno. */
int kvm_ioctl(int fd, unsigned long request, void *argument);

#endif
