/*
 * Doorbells (device/bus.h): the kernel notes a vCPU's write in an eventfd and the guest goes on at once; the write itself is then done in the
 * event loop. Machine lock held.
 *
 * A notice that is still in an eventfd when the machine stops need not be saved: virtio looks at all queues when it goes on.
 */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/log.h"
#include "base/loop.h"
#include "device/machine.h"
#include "engine/kvm/kvm.h"

struct kvm_doorbell {
    struct kvm_machine *k;
    uint64_t address;
    int fd;
    struct loop_fd *watch;
    struct kvm_doorbell *next;
};

static void rung(void *opaque, int fd, short revents)
{
    struct kvm_doorbell *d = opaque;
    uint64_t count;

    if (read(fd, &count, sizeof(count)) == (ssize_t)sizeof(count))
        bus_write_locked(&d->k->machine->mmio, d->address, 0, 4);
}

/* A width of 0 takes writes of every width. */
static int assign(struct kvm_doorbell *d, uint32_t flags)
{
    struct kvm_ioeventfd e = { .addr = d->address, .fd = d->fd, .flags = flags };

    return kvm_ioctl(d->k->fd, KVM_IOEVENTFD, &e);
}

static void remove_bell(struct kvm_doorbell *d)
{
    if (d->watch) {
        assign(d, KVM_IOEVENTFD_FLAG_DEASSIGN);
        loop_fd_remove(d->watch);
    }
    if (d->fd >= 0)
        close(d->fd);
    free(d);
}

static void add_bell(struct kvm_machine *k, uint64_t address)
{
    struct kvm_doorbell *d = calloc(1, sizeof(*d));
    int err = -ENOMEM;

    if (!d)
        goto out;
    *d = (struct kvm_doorbell){ .k = k, .address = address, .fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK) };
    err = d->fd < 0 ? -errno : assign(d, 0);
    if (err >= 0) {
        d->watch = loop_fd_add(k->machine->loop, d->fd, POLLIN, rung, d);
        err = d->watch ? 0 : -ENOMEM;
        if (err)
            assign(d, KVM_IOEVENTFD_FLAG_DEASSIGN);
    }
    if (err >= 0) {
        d->next = k->doorbells;
        k->doorbells = d;
        return;
    }
    remove_bell(d);
out:
    /* The vCPU leaves the guest then, and all is as with any other register. */
    log_debug("no eventfd for the doorbell at %#llx: %s", (unsigned long long)address, strerror(-err));
}

static void on_doorbell(void *opaque, uint64_t address, bool there)
{
    struct kvm_machine *k = opaque;

    if (there) {
        add_bell(k, address);
        return;
    }
    for (struct kvm_doorbell **p = &k->doorbells; *p; p = &(*p)->next) {
        struct kvm_doorbell *d = *p;

        if (d->address == address) {
            *p = d->next;
            remove_bell(d);
            return;
        }
    }
}

void kvm_doorbells_start(struct kvm_machine *k)
{
    k->listener = (struct bus_listener){ .doorbell = on_doorbell, .opaque = k };
    bus_listen(&k->machine->mmio, &k->listener);
}

void kvm_doorbells_stop(struct kvm_machine *k)
{
    if (k->machine->mmio.listener == &k->listener)
        bus_listen(&k->machine->mmio, NULL);
    while (k->doorbells) {
        struct kvm_doorbell *d = k->doorbells;

        k->doorbells = d->next;
        remove_bell(d);
    }
}
