/*
 * Which pages vCPUs write, for memory/memory.h's dirty log: by rings where the kernel has them, else by a bitmap.
 *
 * A ring is a vCPU's: the kernel enters each page that the vCPU wrote for the first time since it was protected, so finding them costs
 * what was written, not what the machine has. Entries are taken, and pages protected anew (KVM_RESET_DIRTY_RINGS), by whoever collects, and
 * by a vCPU whose ring is full, which cannot go on before. A VM with rings has no bitmap (Linux, Documentation/virt/kvm/api.rst, 8.29).
 *
 * Not where kernel code is emulated (host.c): an emulator writes on without a look at how full the ring is, and was seen to lose what did not
 * fit.
 *
 * Whoever collects reads the pages afterwards: writes up to the protecting are in what is read, and later ones are entered again.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base/log.h"
#include "base/util.h"
#include "device/machine.h"
#include "engine/kvm/kvm.h"

/* Pages that a vCPU writes between two looks without being stopped for it; 16 bytes each. */
#define RING_ENTRIES 16384u

bool kvm_use_dirty_ring = true;

static void free_bitmaps(struct kvm_machine *k) { memory_bitmaps_free(k->dirty_bitmap); }

/* ---- rings ---- */

int kvm_ring_map(struct kvm_vcpu *v)
{
    void *ring;

    if (!v->k->ring_entries)
        return 0;
    ring = mmap(NULL, v->k->ring_entries * sizeof(*v->ring), PROT_READ | PROT_WRITE, MAP_SHARED, v->fd,
                (off_t)KVM_DIRTY_LOG_PAGE_OFFSET * GUEST_PAGE_SIZE);
    if (ring == MAP_FAILED)
        return -errno;
    v->ring = ring;
    return 0;
}

void kvm_ring_unmap(struct kvm_vcpu *v)
{
    if (v->ring)
        munmap(v->ring, v->k->ring_entries * sizeof(*v->ring));
    v->ring = NULL;
}

/* k->lock held. How many entries there were. */
static unsigned take_entries(struct kvm_vcpu *v)
{
    struct kvm_machine *k = v->k;
    const struct memory *m = &k->machine->memory;
    unsigned n = 0;

    for (; n < k->ring_entries; n++) {
        struct kvm_dirty_gfn *e = &v->ring[v->ring_next & (k->ring_entries - 1)];

        if (!(__atomic_load_n(&e->flags, __ATOMIC_ACQUIRE) & KVM_DIRTY_GFN_F_DIRTY))
            break;
        if (e->slot < m->regions && e->offset < m->region[e->slot].size >> GUEST_PAGE_SHIFT && k->dirty_bitmap[e->slot])
            k->dirty_bitmap[e->slot][e->offset / 64] |= 1ull << (e->offset % 64);
        __atomic_store_n(&e->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
        v->ring_next++;
    }
    return n;
}

/* k->lock held. */
static int drain(struct kvm_machine *k)
{
    unsigned n = 0;
    int err;

    for (unsigned i = 0; i < KVM_MAX_VCPUS; i++)
        if (k->vcpu[i])
            n += take_entries(k->vcpu[i]);
    if (!n)
        return 0;
    err = kvm_ioctl(k->fd, KVM_RESET_DIRTY_RINGS, NULL);
    if (err < 0)
        log_error("KVM does not take back the rings of written pages: %s", strerror(-err));
    return MIN(err, 0);
}

int kvm_ring_drain(struct kvm_machine *k)
{
    int err;

    pthread_mutex_lock(&k->lock);
    err = drain(k);
    pthread_mutex_unlock(&k->lock);
    return err;
}

static int collect_rings(struct kvm_machine *k, unsigned region, uint64_t *bitmap)
{
    size_t words = memory_bitmap_words(&k->machine->memory.region[region]);
    int err;

    pthread_mutex_lock(&k->lock);
    err = drain(k);
    for (size_t i = 0; i < words; i++) {
        bitmap[i] |= k->dirty_bitmap[region][i];
        k->dirty_bitmap[region][i] = 0;
    }
    pthread_mutex_unlock(&k->lock);
    return err;
}

/* ---- the bitmap ---- */

static int collect_bitmap(struct kvm_machine *k, unsigned region, uint64_t *bitmap)
{
    const struct memory_region *r = &k->machine->memory.region[region];
    uint64_t *written = k->dirty_bitmap[region], any = 0;
    struct kvm_dirty_log get = { .slot = region, .dirty_bitmap = written };
    struct kvm_clear_dirty_log clear = { .slot = region, .num_pages = (uint32_t)(r->size >> GUEST_PAGE_SHIFT), .dirty_bitmap = written };
    size_t words = memory_bitmap_words(r);
    int err;

    memset(written, 0, words * sizeof(*written));
    err = kvm_ioctl(k->fd, KVM_GET_DIRTY_LOG, &get);
    for (size_t i = 0; i < words && err >= 0; i++) {
        any |= written[i];
        bitmap[i] |= written[i];
    }
    if (err >= 0 && any && k->host->manual_protect)
        err = kvm_ioctl(k->fd, KVM_CLEAR_DIRTY_LOG, &clear);
    if (err < 0)
        log_error("KVM does not tell which pages were written: %s", strerror(-err));
    return MIN(err, 0);
}

/* ---- the memory's dirty log ---- */

static void stop_log(void *opaque)
{
    struct kvm_machine *k = opaque;

    k->dirty_log = false;
    kvm_set_slots(k);
    /* What a vCPU is still to enter is of no account then. */
    pthread_mutex_lock(&k->lock);
    drain(k);
    free_bitmaps(k);
    pthread_mutex_unlock(&k->lock);
}

static int start_log(void *opaque)
{
    struct kvm_machine *k = opaque;
    int err;

    pthread_mutex_lock(&k->lock);
    drain(k);
    err = memory_bitmaps_alloc(&k->machine->memory, k->dirty_bitmap);
    pthread_mutex_unlock(&k->lock);
    if (err) {
        log_error("out of memory for the log of written pages");
        return err;
    }
    k->dirty_log = true;
    err = kvm_set_slots(k);
    if (err)
        stop_log(k);
    return err;
}

static int collect_log(void *opaque, unsigned region, uint64_t *bitmap)
{
    struct kvm_machine *k = opaque;

    return k->ring_entries ? collect_rings(k, region, bitmap) : collect_bitmap(k, region, bitmap);
}

static const struct memory_dirty_hooks hooks = { .start = start_log, .stop = stop_log, .collect = collect_log };

/* ---- life ---- */

void kvm_dirty_init(struct kvm_machine *k)
{
    uint32_t bytes = kvm_use_dirty_ring ? MIN(k->host->dirty_ring, RING_ENTRIES * (uint32_t)sizeof(struct kvm_dirty_gfn)) : 0;
    struct kvm_enable_cap ring = { .cap = KVM_CAP_DIRTY_LOG_RING, .args = { bytes } };
    /* With the manual mode the log is write-protected anew only where this has taken note of the writes. */
    struct kvm_enable_cap manual = { .cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, .args = { KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE } };

    struct engine_report report;

    kvm_probe(&report);
    if (report.fast && bytes && kvm_ioctl(k->fd, KVM_ENABLE_CAP, &ring) == 0)
        k->ring_entries = bytes / (uint32_t)sizeof(struct kvm_dirty_gfn);
    else if (k->host->manual_protect)
        kvm_ioctl(k->fd, KVM_ENABLE_CAP, &manual);
}

void kvm_dirty_attach(struct kvm_machine *k) { memory_dirty_attach(&k->machine->memory, &hooks, k); }

void kvm_dirty_destroy(struct kvm_machine *k)
{
    memory_dirty_detach(&k->machine->memory, k);
    free_bitmaps(k);
}
