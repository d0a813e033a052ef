/*
 * A vCPU that the host's processor runs: its life, and what it comes out of the guest for.
 *
 * KVM_RUN returns for an access to a device, which is finished by the next KVM_RUN; so this leaves only when KVM_RUN was
 * interrupted, and the registers are then those between two instructions. HLT, IPIs, the LAPIC and its timer are the kernel's.
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/util.h"
#include "device/machine.h"
#include "engine/kvm/kvm.h"

/* How far the host's TSC may be from the guest's rate before it has to be scaled (the kernel's own tolerance). */
#define TSC_TOLERANCE_PPM 250

/* ---- requests ---- */

int kvm_kick_signal(void) { return SIGRTMIN; }

static void interrupted(int number) {}

static void install(void)
{
    struct sigaction action = { .sa_handler = interrupted };

    sigaction(kvm_kick_signal(), &action, NULL);
}

void kvm_signal_setup(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;

    pthread_once(&once, install);
}

/*
 * immediate_exit is for a request that comes just before KVM_RUN, the signal for one that comes during it. The byte is shared with the
 * kernel, which only reads it.
 */
void kvm_request(struct kvm_vcpu *v, uint32_t bits)
{
    atomic_fetch_or(&v->request, bits);
    __atomic_store_n(&v->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
    pthread_mutex_lock(&v->lock);
    if (v->inside && !pthread_equal(v->thread, pthread_self()))
        pthread_kill(v->thread, kvm_kick_signal());
    pthread_mutex_unlock(&v->lock);
}

static void kick(struct vcpu *vcpu) { kvm_request(vcpu->data, KVM_REQUEST_EXIT); }

/* Only while the LAPIC's state is in the machine: the vCPU does not run, and gets these when it does. */
static void on_signal(struct vcpu *vcpu, enum lapic_signal signal, unsigned value)
{
    struct kvm_vcpu *v = vcpu->data;

    switch (signal) {
    case LAPIC_INTR:            /* goes to the kernel with the LAPIC's state */
    case LAPIC_SMI:             /* there is no system management mode */
        break;
    case LAPIC_NMI: kvm_request(v, KVM_REQUEST_NMI); break;
    case LAPIC_INIT: kvm_request(v, KVM_REQUEST_INIT); break;
    case LAPIC_SIPI:
        atomic_store(&v->sipi_vector, (uint8_t)value);
        kvm_request(v, KVM_REQUEST_SIPI);
        break;
    }
}

/* To the own LAPIC, as the message that it would have been. */
static void send_self(struct kvm_vcpu *v, uint32_t mode, uint32_t vector)
{
    uint64_t address = LAPIC_DEFAULT_BASE | (uint64_t)(v->vcpu->index & 0xff) << 12 | (uint64_t)(v->vcpu->index >> 8) << 5;

    v->k->lapic_host.send(v->k, address, 1u << 14 | mode << 8 | vector);
}

/* True: leave. The vCPU's thread, outside KVM_RUN and with nothing left to finish. */
static bool handle_requests(struct kvm_vcpu *v)
{
    uint32_t request;

    /* In this order: a request that comes in between is seen, at the latest by the next KVM_RUN. */
    __atomic_store_n(&v->run->immediate_exit, 0, __ATOMIC_SEQ_CST);
    request = atomic_exchange(&v->request, 0);
    if (request & KVM_REQUEST_LINT1)
        kvm_lapic_pulse_lint1(v);
    if (request & KVM_REQUEST_NMI)
        kvm_ioctl(v->fd, KVM_NMI, NULL);
    if (request & KVM_REQUEST_INIT)
        send_self(v, 5, 0);
    if (request & KVM_REQUEST_SIPI)
        send_self(v, 6, atomic_load(&v->sipi_vector));
    return request & KVM_REQUEST_EXIT;
}

/* ---- exits ---- */

static void access_ports(struct kvm_vcpu *v)
{
    struct kvm_run *run = v->run;
    uint8_t *data = (uint8_t *)run + run->io.data_offset;
    struct bus *bus = &v->vcpu->machine->ports;
    unsigned size = run->io.size;

    v->counters.port_exits++;
    for (uint32_t i = 0; i < run->io.count; i++, data += size) {
        uint64_t value = 0;

        if (run->io.direction == KVM_EXIT_IO_OUT) {
            memcpy(&value, data, size);
            bus_write(bus, run->io.port, value, size);
        } else {
            value = bus_read(bus, run->io.port, size);
            memcpy(data, &value, size);
        }
    }
}

static void access_mmio(struct kvm_vcpu *v)
{
    struct kvm_run *run = v->run;
    struct bus *bus = &v->vcpu->machine->mmio;
    uint64_t value = 0;

    v->counters.mmio_exits++;
    if (run->mmio.is_write) {
        memcpy(&value, run->mmio.data, MIN(run->mmio.len, 8u));
        bus_write(bus, run->mmio.phys_addr, value, MIN(run->mmio.len, 8u));
    } else {
        value = bus_read(bus, run->mmio.phys_addr, MIN(run->mmio.len, 8u));
        memcpy(run->mmio.data, &value, MIN(run->mmio.len, 8u));
    }
}

static void log_place(struct kvm_vcpu *v)
{
    struct kvm_regs regs = { 0 };
    struct kvm_sregs sregs = { 0 };

    kvm_ioctl(v->fd, KVM_GET_REGS, &regs);
    kvm_ioctl(v->fd, KVM_GET_SREGS, &sregs);
    log_error("vCPU %u was at CS:RIP %04x:%#llx, RSP %#llx, CR0 %#llx, CR3 %#llx, CR4 %#llx, EFER %#llx", v->vcpu->index,
              sregs.cs.selector, (unsigned long long)regs.rip, (unsigned long long)regs.rsp, (unsigned long long)sregs.cr0,
              (unsigned long long)sregs.cr3, (unsigned long long)sregs.cr4, (unsigned long long)sregs.efer);
}

static enum vm_exit internal_error(struct kvm_vcpu *v)
{
    struct kvm_run *run = v->run;
    char bytes[64] = "";

    switch (run->internal.suberror) {
    case KVM_INTERNAL_ERROR_EMULATION:
        if (run->emulation_failure.ndata >= 3 &&
            (run->emulation_failure.flags & KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES))
            for (unsigned i = 0; i < MIN(run->emulation_failure.insn_size, 15); i++)
                snprintf(bytes + 3 * i, sizeof(bytes) - 3 * i, " %02x", run->emulation_failure.insn_bytes[i]);
        log_error("vCPU %u: the kernel's KVM cannot emulate the guest's instruction%s%s; --engine translate and interp can", v->vcpu->index,
                  *bytes ? ":" : "", bytes);
        break;
    case KVM_INTERNAL_ERROR_DELIVERY_EV:
        log_error("vCPU %u: KVM could not deliver an event to the guest, whose descriptor tables are perhaps not in RAM "
                  "(%#llx %#llx); --engine interp tells more", v->vcpu->index, (unsigned long long)run->internal.data[0],
                  (unsigned long long)run->internal.data[1]);
        break;
    default:
        log_error("vCPU %u: KVM's internal error %u (%#llx %#llx): a fault of the host; see its kernel's log, or use another --engine",
                  v->vcpu->index, run->internal.suberror, (unsigned long long)run->internal.data[0],
                  (unsigned long long)run->internal.data[1]);
    }
    log_place(v);
    return VM_EXIT_ERROR;
}

/* What KVM_RUN came back for. True: the vCPU cannot go on, *exit says why. */
static bool handle_exit(struct kvm_vcpu *v, enum vm_exit *exit)
{
    struct kvm_run *run = v->run;

    switch (run->exit_reason) {
    case KVM_EXIT_IO:
        access_ports(v);
        return false;
    case KVM_EXIT_MMIO:
        access_mmio(v);
        return false;
    case KVM_EXIT_IOAPIC_EOI:
        irqchip_eoi(v->k->chip, run->eoi.vector);
        return false;
    case KVM_EXIT_INTR:
    case KVM_EXIT_IRQ_WINDOW_OPEN:
    case KVM_EXIT_SET_TPR:
        return false;
    case KVM_EXIT_DIRTY_RING_FULL:
        if (kvm_ring_drain(v->k) == 0)
            return false;
        break;
    case KVM_EXIT_HLT:          /* the kernel waits by itself */
        v->counters.halts++;
        return false;
    case KVM_EXIT_SHUTDOWN:
        v->shutdown = true;
        *exit = VM_EXIT_SHUTDOWN;
        return true;
    case KVM_EXIT_INTERNAL_ERROR:
        *exit = internal_error(v);
        return true;
    case KVM_EXIT_FAIL_ENTRY:
        log_error("vCPU %u: the host's processor refuses the guest's state (hardware reason %#llx); see the host kernel's log, or use "
                  "another --engine", v->vcpu->index, (unsigned long long)run->fail_entry.hardware_entry_failure_reason);
        break;
    case KVM_EXIT_UNKNOWN:
        log_error("vCPU %u: the guest left for a reason that KVM does not know (%#llx); use another --engine", v->vcpu->index,
                  (unsigned long long)run->hw.hardware_exit_reason);
        break;
    default:
        log_error("vCPU %u: KVM came back with the exit reason %u, which this version does not know; use another --engine",
                  v->vcpu->index, run->exit_reason);
    }
    log_place(v);
    *exit = VM_EXIT_ERROR;
    return true;
}

static enum vm_exit loop(struct kvm_vcpu *v)
{
    enum vm_exit exit;

    for (;;) {
        int r = ioctl(v->fd, KVM_RUN, 0);

        if (r == 0) {
            if (handle_exit(v, &exit))
                return exit;
        } else if (errno == EINTR) {
            if (handle_requests(v))
                return VM_EXIT_KICK;
        } else if (errno != EAGAIN) {   /* a vCPU that waits for SIPI looks again */
            log_error("vCPU %u: KVM_RUN: %s%s", v->vcpu->index, strerror(errno),
                      errno == EFAULT ? "; the host could not provide a page of guest memory" : "");
            log_place(v);
            return VM_EXIT_ERROR;
        }
    }
}

static enum vm_exit run(struct vcpu *vcpu)
{
    struct kvm_vcpu *v = vcpu->data;
    enum vm_exit exit = VM_EXIT_SHUTDOWN;

    pthread_mutex_lock(&v->lock);
    v->thread = pthread_self();
    v->inside = true;
    pthread_mutex_unlock(&v->lock);
    if (!v->shutdown) {
        kvm_enter(v->k);
        exit = loop(v);
        kvm_leave(v->k);
    }
    pthread_mutex_lock(&v->lock);
    v->inside = false;
    pthread_mutex_unlock(&v->lock);
    return exit;
}

/* ---- life ---- */

static void destroy(struct vcpu *vcpu)
{
    struct kvm_vcpu *v = vcpu->data;

    if (!v)
        return;
    vcpu->data = NULL;
    if (v->k) {
        pthread_mutex_lock(&v->k->lock);
        v->k->vcpu[vcpu->index] = NULL;
        pthread_mutex_unlock(&v->k->lock);
    }
    kvm_ring_unmap(v);
    if (v->run)
        munmap(v->run, v->k->host->run_size);
    if (v->fd >= 0)
        close(v->fd);
    if (v->k)
        kvm_machine_put(v->k);
    pthread_mutex_destroy(&v->lock);
    free(v->xsave);
    free(v);
}

/* The guest was told a rate when it started, perhaps on another host. The kernel's idea of its own rate may differ from ours. */
static void set_tsc_rate(struct kvm_vcpu *v)
{
    uint64_t wanted = v->vcpu->tsc_hz, host = tsc_frequency_hz(), tolerance = host / 1000000 * TSC_TOLERANCE_PPM;
    int khz;

    if (clock_is_manual(v->vcpu->machine->clock) || (wanted + tolerance >= host && wanted <= host + tolerance))
        return;
    khz = ioctl(v->fd, KVM_GET_TSC_KHZ, 0);
    if (khz > 0)
        khz = (int)((unsigned __int128)(unsigned)khz * wanted / host);
    if (khz <= 0 || !v->k->host->tsc_control || ioctl(v->fd, KVM_SET_TSC_KHZ, (unsigned long)khz))
        log_warn("vCPU %u expects a TSC of %llu MHz, this host has %llu and cannot scale it: the guest's clock may run wrong",
                 v->vcpu->index, (unsigned long long)wanted / 1000000, (unsigned long long)host / 1000000);
    else
        v->k->tsc_scaled = true;
}

static int set_cpuid(struct kvm_vcpu *v)
{
    struct kvm_cpuid2 *c = kvm_cpuid_of(v->vcpu);
    int err = c ? kvm_ioctl(v->fd, KVM_SET_CPUID2, c) : -ENOMEM;

    free(c);
    return err;
}

static int create(struct vcpu *vcpu)
{
    struct kvm_vcpu *v = calloc(1, sizeof(*v));
    struct x86_state reset;
    const char *what = "";
    int err = -EINVAL;

    if (!v) {
        log_error("out of memory for vCPU %u", vcpu->index);
        return -ENOMEM;
    }
    vcpu->data = v;
    v->vcpu = vcpu;
    v->fd = -1;
    pthread_mutex_init(&v->lock, NULL);
    kvm_signal_setup();
    if (vcpu->index >= KVM_MAX_VCPUS) {
        what = "there are too many";
        goto out;
    }
    v->k = kvm_machine_get(vcpu, &err);
    if (!v->k) {
        destroy(vcpu);
        return err;
    }
    what = "KVM_CREATE_VCPU";
    v->fd = kvm_ioctl(v->k->fd, KVM_CREATE_VCPU, (void *)(uintptr_t)vcpu->index);
    err = v->fd;
    if (err < 0)
        goto out;
    what = "memory";
    v->run = mmap(NULL, v->k->host->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, v->fd, 0);
    v->xsave = aligned_alloc(64, align_up(v->k->host->xsave_size, 64));
    if (v->run == MAP_FAILED || !v->xsave) {
        v->run = v->run == MAP_FAILED ? NULL : v->run;
        err = -ENOMEM;
        goto out;
    }
    what = "its ring of written pages";
    err = kvm_ring_map(v);
    if (err < 0)
        goto out;
    what = "KVM_SET_CPUID2";
    err = set_cpuid(v);
    if (err < 0)
        goto out;
    set_tsc_rate(v);
    kvm_msrs_find(v);
    x86_state_reset(&reset, vcpu->index == 0);
    kvm_import(vcpu, &reset);
    pthread_mutex_lock(&v->k->lock);
    v->k->vcpu[vcpu->index] = v;
    pthread_mutex_unlock(&v->k->lock);
    return 0;
out:
    log_error("engine kvm: no vCPU %u: %s: %s", vcpu->index, what, strerror(-err));
    destroy(vcpu);
    return err;
}

/* KVM keeps no code of the guest's. */
static void code_written(struct vcpu *vcpu, gpa_t page) {}

static void counters(const struct vcpu *vcpu, struct engine_counters *c) { *c = ((const struct kvm_vcpu *)vcpu->data)->counters; }

const struct engine kvm_engine = {
    .name = "kvm",
    .summary = "the host's processor by VT-x or AMD-V",
    .probe = kvm_probe,
    .offer = kvm_offer,
    .vcpu_create = create,
    .vcpu_destroy = destroy,
    .run = run,
    .kick = kick,
    .signal = on_signal,
    .export_state = kvm_export,
    .import_state = kvm_import,
    .shift_tsc = kvm_shift_tsc,
    .code_written = code_written,
    .counters = counters,
};
