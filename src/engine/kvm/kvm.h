/*
 * The KVM engine's inside: what its files share. docs/kvm.md has the whole picture.
 *
 *   host.c     /dev/kvm and what it can do; the probe
 *   model.c    CPUID
 *   machine.c  what the vCPUs of one machine share: the VM, its memory, the dirty log, the clock
 *   irqchip.c  the kernel's LAPICs and the machine's irqchip
 *   state.c    registers, to and from the canonical state
 *   run.c      a vCPU's life and its exits
 */
#ifndef RINGFORT_ENGINE_KVM_H
#define RINGFORT_ENGINE_KVM_H

#include <linux/kvm.h>
#include <pthread.h>
#include <stdatomic.h>

#include "engine/engine.h"

#define KVM_MAX_VCPUS 64

/* ---- host.c ---- */

struct kvm_host {
    int fd;                     /* /dev/kvm; open as long as the process lives */
    size_t run_size;            /* bytes of a vCPU's struct kvm_run and what follows */
    size_t xsave_size;          /* of KVM_GET_XSAVE2 */
    bool xcrs, tsc_control, manual_protect;
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
    bool dirty_log;
    uint64_t *dirty_bitmap;     /* of the largest region */
    struct lapic_host lapic_host;
};

/* The one of this machine, made by the first vCPU that asks. NULL: an error, logged, its errno in *err. */
struct kvm_machine *kvm_machine_get(struct machine *m, int *err);
void kvm_machine_put(struct kvm_machine *k);
int kvm_dirty_start(struct vcpu *vcpu);
int kvm_dirty_fetch(struct vcpu *vcpu);
void kvm_dirty_stop(struct vcpu *vcpu);
/* Guest time: from the machine's clock into KVM's, and back. No vCPU runs. */
void kvm_clock_start(struct kvm_machine *k);
void kvm_clock_stop(struct kvm_machine *k);

/* ---- irqchip.c ---- */

/* For a fresh VM: the split irqchip. 0 or a negative errno (logged). */
int kvm_irqchip_init(struct kvm_machine *k);
/* Before a vCPU enters the guest: the kernel's LAPICs work from here on. */
void kvm_lapics_to_kernel(struct kvm_machine *k);
/* Before state is read or written; no vCPU runs: the machine's irqchip has the state from here on. */
void kvm_lapics_to_machine(struct kvm_machine *k);
/* Before a state is imported: what the kernel's LAPICs have is void, the state is what the machine's irqchip has. */
void kvm_lapics_forget(struct kvm_machine *k);
/* The vCPU's own thread: what a pulse of its LINT1 does. */
void kvm_lapic_pulse_lint1(struct kvm_vcpu *v);

/* ---- state.c ---- */

void kvm_export(struct vcpu *vcpu, struct x86_state *s);
void kvm_import(struct vcpu *vcpu, const struct x86_state *s);
/* Which MSRs of the canonical state this KVM has. */
void kvm_msrs_find(struct kvm_vcpu *v);
int kvm_msr_get(struct kvm_vcpu *v, uint32_t msr, uint64_t *value);
int kvm_msr_set(struct kvm_vcpu *v, uint32_t msr, uint64_t value);
/* The guest's TSC minus the host's. */
uint64_t kvm_tsc_offset(struct kvm_vcpu *v);

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
