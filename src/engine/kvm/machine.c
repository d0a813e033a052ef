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

static struct kvm_machine *machine_of(struct vcpu *vcpu) { return ((struct kvm_vcpu *)vcpu->data)->k; }

/* With the manual mode the log is write-protected anew only where this has taken note of the writes. */
static void use_manual_protect(struct kvm_machine *k)
{
    struct kvm_enable_cap cap = { .cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, .args = { KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE } };

    if (k->host->manual_protect)
        kvm_ioctl(k->fd, KVM_ENABLE_CAP, &cap);
}

int kvm_dirty_start(struct vcpu *vcpu)
{
    struct kvm_machine *k = machine_of(vcpu);
    uint64_t largest = 0;
    int err;

    if (k->dirty_log)
        return 0;
    for (unsigned i = 0; i < k->machine->memory.regions; i++)
        largest = MAX(largest, k->machine->memory.region[i].size);
    k->dirty_bitmap = calloc((largest >> GUEST_PAGE_SHIFT) / 64 + 1, 8);
    if (!k->dirty_bitmap) {
        log_error("out of memory for the log of written pages");
        return -ENOMEM;
    }
    k->dirty_log = true;
    err = set_slots(k);
    if (err < 0)
        kvm_dirty_stop(vcpu);
    return err;
}

void kvm_dirty_stop(struct vcpu *vcpu)
{
    struct kvm_machine *k = machine_of(vcpu);

    if (!k->dirty_log)
        return;
    k->dirty_log = false;
    set_slots(k);
    free(k->dirty_bitmap);
    k->dirty_bitmap = NULL;
}

static int fetch_region(struct kvm_machine *k, unsigned slot)
{
    struct memory_region *r = &k->machine->memory.region[slot];
    uint64_t pages = r->size >> GUEST_PAGE_SHIFT, words = (pages + 63) / 64;
    struct kvm_dirty_log get = { .slot = slot, .dirty_bitmap = k->dirty_bitmap };
    struct kvm_clear_dirty_log clear = { .slot = slot, .num_pages = (uint32_t)pages, .dirty_bitmap = k->dirty_bitmap };
    bool any = false;
    int err;

    memset(k->dirty_bitmap, 0, words * 8);
    err = kvm_ioctl(k->fd, KVM_GET_DIRTY_LOG, &get);
    if (err < 0)
        return err;
    for (uint64_t w = 0; w < words; w++)
        for (uint64_t left = k->dirty_bitmap[w]; left; left &= left - 1, any = true)
            atomic_fetch_or_explicit(&r->flags[w * 64 + (unsigned)__builtin_ctzll(left)], PAGE_DIRTY, memory_order_relaxed);
    /* Whoever reads the pages does so after this, so writes up to here are in what is read. */
    return any && k->host->manual_protect ? kvm_ioctl(k->fd, KVM_CLEAR_DIRTY_LOG, &clear) : 0;
}

int kvm_dirty_fetch(struct vcpu *vcpu)
{
    struct kvm_machine *k = machine_of(vcpu);
    int err = k->dirty_log ? 0 : -EINVAL;

    for (unsigned i = 0; i < k->machine->memory.regions && err >= 0; i++)
        err = fetch_region(k, i);
    if (err < 0)
        log_error("KVM does not tell which pages were written: %s", strerror(-err));
    return err < 0 ? err : 0;
}

/* ---- time ---- */

/*
 * The machine's clock is what kvmclock shows to the guest. While vCPUs run the kernel keeps it by another clock of the host, undisturbed by
 * time servers; what the two have come apart by is taken over, so that guest time neither jumps nor goes back.
 */
void kvm_clock_start(struct kvm_machine *k)
{
    struct kvm_clock_data data = { .clock = clock_now(k->machine->clock) };
    int err = kvm_ioctl(k->fd, KVM_SET_CLOCK, &data);

    if (err < 0)
        log_warn("KVM does not take the guest's time: %s", strerror(-err));
}

void kvm_clock_stop(struct kvm_machine *k)
{
    struct kvm_clock_data data = { 0 };

    if (!clock_is_manual(k->machine->clock) && kvm_ioctl(k->fd, KVM_GET_CLOCK, &data) >= 0)
        clock_set(k->machine->clock, data.clock);
}

/* ---- life ---- */

static void destroy(struct kvm_machine *k)
{
    if (k->chip)
        irqchip_set_host(k->chip, NULL);
    free(k->dirty_bitmap);
    if (k->fd >= 0)
        close(k->fd);
    pthread_mutex_destroy(&k->lock);
    free(k);
}

static int create(struct machine *m, struct kvm_machine **out)
{
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
out:
    if (err)
        destroy(k);
    else
        *out = k;
    return err;
}

struct kvm_machine *kvm_machine_get(struct machine *m, int *err)
{
    struct kvm_machine *k;

    *err = 0;
    pthread_mutex_lock(&list_lock);
    for (k = list; k && k->machine != m; k = k->next)
        ;
    if (!k) {
        *err = create(m, &k);
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
