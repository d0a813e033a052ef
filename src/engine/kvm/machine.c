/*
 * What the vCPUs of one machine share under KVM: the VM, guest memory, guest time.
 *
 * Made by the first vCPU, gone with the last. Regions of guest memory are fixed by then.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/util.h"
#include "device/machine.h"
#include "engine/kvm/kvm.h"
#include "isa/x86/kvmclock.h"

/* Four pages that Intel's processors need for a guest's real mode, where the machine's map has nothing. */
#define IDENTITY_MAP 0xfeffc000ull
#define TSS 0xfeffd000ul

static pthread_mutex_t list_lock = PTHREAD_MUTEX_INITIALIZER;
static struct kvm_machine *list;    /* guarded by list_lock */

/* ---- memory ---- */

static int set_slot(struct kvm_machine *k, unsigned i)
{
    const struct memory_region *r = &k->machine->memory.region[i];
    struct kvm_userspace_memory_region slot = {
        .slot = i,
        .flags = k->dirty_log ? KVM_MEM_LOG_DIRTY_PAGES : 0,
        .guest_phys_addr = r->base,
        .memory_size = r->size,
        .userspace_addr = (uintptr_t)r->host,
    };
    int err = kvm_ioctl(k->fd, KVM_SET_USER_MEMORY_REGION, &slot);

    if (err < 0)
        log_error("KVM does not take guest memory at %#llx: %s", (unsigned long long)r->base, strerror(-err));
    return err;
}

int kvm_set_slots(struct kvm_machine *k)
{
    int err = 0;

    for (unsigned i = 0; i < k->machine->memory.regions && err >= 0; i++)
        err = set_slot(k, i);
    return err < 0 ? err : 0;
}

/* ---- entering and leaving ---- */

/*
 * What kvmclock shows to the guest goes on in the kernel while vCPUs run, by another clock of the host, and is carried over both ways:
 * it neither jumps nor goes back.
 */
static void clock_to_kernel(struct kvm_machine *k)
{
    struct kvm_clock_data data = { .clock = x86_kvmclock_at(k->machine, x86_tsc_base(k->machine, k->tsc_hz), k->tsc_hz) };
    int err = kvm_ioctl(k->fd, KVM_SET_CLOCK, &data);

    if (err < 0)
        log_warn("KVM does not take the guest's time: %s", strerror(-err));
}

static void clock_to_machine(struct kvm_machine *k)
{
    struct kvm_clock_data data = { 0 };

    if (!clock_is_manual(k->machine->clock) && kvm_ioctl(k->fd, KVM_GET_CLOCK, &data) >= 0)
        x86_kvmclock_set(k->machine, x86_tsc_base(k->machine, k->tsc_hz), data.clock);
}

void kvm_enter(struct kvm_machine *k)
{
    irqchip_move_begin(k->chip);
    if (k->inside++ == 0) {
        kvm_tsc_find_skew(k);
        clock_to_kernel(k);
        kvm_lapics_to_kernel(k);
    }
    irqchip_move_end(k->chip, true);
}

void kvm_leave(struct kvm_machine *k)
{
    irqchip_move_begin(k->chip);
    if (--k->inside == 0) {
        kvm_tsc_find_skew(k);
        clock_to_machine(k);
        kvm_lapics_to_machine(k);
    }
    irqchip_move_end(k->chip, k->inside != 0);
}

/* ---- life ---- */

static void destroy(struct kvm_machine *k)
{
    kvm_doorbells_stop(k);
    kvm_dirty_destroy(k);
    if (k->chip)
        irqchip_set_host(k->chip, NULL);
    if (k->fd >= 0)
        close(k->fd);
    pthread_mutex_destroy(&k->lock);
    free(k);
}

static int create(const struct vcpu *vcpu, struct kvm_machine **out)
{
    struct machine *m = vcpu->machine;
    const char *why;
    const struct kvm_host *host = kvm_host(&why);
    uint64_t identity = IDENTITY_MAP;
    struct kvm_machine *k;
    int err;

    if (!host) {
        log_error("engine kvm: %s; or use --engine auto", why);
        return -ENODEV;
    }
    k = calloc(1, sizeof(*k));
    if (!k) {
        log_error("out of memory");
        return -ENOMEM;
    }
    pthread_mutex_init(&k->lock, NULL);
    k->host = host;
    k->machine = m;
    k->tsc_hz = vcpu->tsc_hz;
    k->fd = kvm_ioctl(host->fd, KVM_CREATE_VM, NULL);
    if (k->fd < 0) {
        err = k->fd;
        log_error("engine kvm: the host makes no machine: %s", strerror(-err));
        goto out;
    }
    kvm_ioctl(k->fd, KVM_SET_IDENTITY_MAP_ADDR, &identity);
    err = kvm_ioctl(k->fd, KVM_SET_TSS_ADDR, (void *)TSS);
    if (err < 0) {
        log_error("engine kvm: KVM_SET_TSS_ADDR: %s", strerror(-err));
        goto out;
    }
    kvm_dirty_init(k);
    k->chip = irqchip_find(m);
    if (!k->chip) {
        log_error("engine kvm: the machine has no interrupt controllers");
        err = -EINVAL;
        goto out;
    }
    err = kvm_irqchip_init(k);
    if (err == 0)
        err = kvm_set_slots(k);
    if (err == 0) {
        kvm_dirty_attach(k);
        kvm_doorbells_start(k);
    }
out:
    if (err)
        destroy(k);
    else
        *out = k;
    return err;
}

struct kvm_machine *kvm_machine_get(const struct vcpu *vcpu, int *err)
{
    struct kvm_machine *k;

    *err = 0;
    pthread_mutex_lock(&list_lock);
    for (k = list; k && k->machine != vcpu->machine; k = k->next)
        ;
    if (!k) {
        *err = create(vcpu, &k);
        if (!*err) {
            k->next = list;
            list = k;
        }
    }
    if (!*err)
        k->users++;
    pthread_mutex_unlock(&list_lock);
    return *err ? NULL : k;
}

void kvm_machine_put(struct kvm_machine *k)
{
    struct kvm_machine **p;

    pthread_mutex_lock(&list_lock);
    if (--k->users == 0) {
        for (p = &list; *p != k; p = &(*p)->next)
            ;
        *p = k->next;
        destroy(k);
    }
    pthread_mutex_unlock(&list_lock);
}
