/*
 * What the vCPUs of one machine share under KVM: the VM, guest memory, the log of written pages, guest time.
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

static int set_slots(struct kvm_machine *k)
{
    int err = 0;

    for (unsigned i = 0; i < k->machine->memory.regions && err >= 0; i++)
        err = set_slot(k, i);
    return err < 0 ? err : 0;
}

/* ---- pages that vCPUs write ---- */

/* With the manual mode the log is write-protected anew only where this has taken note of the writes. */
static void use_manual_protect(struct kvm_machine *k)
{
    struct kvm_enable_cap cap = { .cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, .args = { KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE } };

    if (k->host->manual_protect)
        kvm_ioctl(k->fd, KVM_ENABLE_CAP, &cap);
}

static void stop_log(void *opaque)
{
    struct kvm_machine *k = opaque;

    k->dirty_log = false;
    set_slots(k);
    free(k->dirty_bitmap);
    k->dirty_bitmap = NULL;
}

static int start_log(void *opaque)
{
    struct kvm_machine *k = opaque;
    uint64_t largest = 0;
    int err;

    for (unsigned i = 0; i < k->machine->memory.regions; i++)
        largest = MAX(largest, memory_bitmap_words(&k->machine->memory.region[i]));
    k->dirty_bitmap = calloc(largest, sizeof(uint64_t));
    if (!k->dirty_bitmap) {
        log_error("out of memory for the log of written pages");
        return -ENOMEM;
    }
    k->dirty_log = true;
    err = set_slots(k);
    if (err)
        stop_log(k);
    return err;
}

static int collect_log(void *opaque, unsigned region, uint64_t *bitmap)
{
    struct kvm_machine *k = opaque;
    const struct memory_region *r = &k->machine->memory.region[region];
    struct kvm_dirty_log get = { .slot = region, .dirty_bitmap = k->dirty_bitmap };
    struct kvm_clear_dirty_log clear = { .slot = region, .num_pages = (uint32_t)(r->size >> GUEST_PAGE_SHIFT),
                                         .dirty_bitmap = k->dirty_bitmap };
    size_t words = memory_bitmap_words(r);
    uint64_t any = 0;
    int err;

    memset(k->dirty_bitmap, 0, words * sizeof(uint64_t));
    err = kvm_ioctl(k->fd, KVM_GET_DIRTY_LOG, &get);
    for (size_t i = 0; i < words && err >= 0; i++) {
        any |= k->dirty_bitmap[i];
        bitmap[i] |= k->dirty_bitmap[i];
    }
    /* Whoever reads the pages does so after this: writes up to here are in what is read, and later ones are logged. */
    if (err >= 0 && any && k->host->manual_protect)
        err = kvm_ioctl(k->fd, KVM_CLEAR_DIRTY_LOG, &clear);
    if (err < 0)
        log_error("KVM does not tell which pages were written: %s", strerror(-err));
    return err < 0 ? err : 0;
}

static const struct memory_dirty_hooks dirty_hooks = { .start = start_log, .stop = stop_log, .collect = collect_log };

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
    memory_dirty_detach(&k->machine->memory, k);
    if (k->chip)
        irqchip_set_host(k->chip, NULL);
    free(k->dirty_bitmap);
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
    use_manual_protect(k);
    k->chip = irqchip_find(m);
    if (!k->chip) {
        log_error("engine kvm: the machine has no interrupt controllers");
        err = -EINVAL;
        goto out;
    }
    err = kvm_irqchip_init(k);
    if (err == 0)
        err = set_slots(k);
    if (err == 0) {
        memory_dirty_attach(&m->memory, &dirty_hooks, k);
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
