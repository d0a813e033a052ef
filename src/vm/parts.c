/* Opening what a configuration names. parts.h has the thread and the order. */
#include "vm/parts.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "backend/block/block.h"
#include "backend/console/console.h"
#include "backend/net/net.h"
#include "base/clock.h"
#include "base/log.h"
#include "device/machine.h"
#include "vm/config.h"

static int open_disks(struct vm_parts *p, const struct vm_config *c, struct machine *m)
{
    for (unsigned i = 0; i < c->disk_count; i++) {
        struct block *b;
        int r = block_open(m->loop, &c->disks[i].block, &b);
        if (r < 0)
            return r;
        p->disks[p->board.disk_count++] =
            (struct pc_disk){.backend = b, .serial = c->disks[i].serial};
    }
    return 0;
}

static int open_nets(struct vm_parts *p, const struct vm_config *c, struct machine *m)
{
    for (unsigned i = 0; i < c->net_count; i++) {
        const struct vm_net_config *n = &c->nets[i];
        struct net *net;
        int r = n->type == VM_NET_TAP ? net_tap_open(m->loop, &n->tap, &net)
                                      : net_user_open(m->loop, m->clock, &n->user, &net);
        if (r < 0)
            return r;
        struct pc_net *slot = &p->nets[p->board.net_count++];
        slot->backend = net;
        memcpy(slot->mac, n->mac, sizeof(slot->mac));
    }
    return 0;
}

static int open_devices(struct vm_parts *p, const struct vm_config *c, struct machine *m)
{
    int r = console_open(m->loop, c->console, &p->serial);
    for (unsigned i = 0; r == 0 && i < c->device_count; i++) {
        const struct vm_device_config *d = &c->devices[i];
        switch (d->type) {
        case VM_DEVICE_DEBUG_EXIT:
            p->board.debug_exit = true;
            p->board.debug_exit_base = d->iobase;
            p->board.debug_exit_size = d->iosize;
            break;
        case VM_DEVICE_PC_TESTDEV:
            p->board.testdev = true;
            break;
        case VM_DEVICE_VIRTIO_RNG:
            p->board.rng_count++;
            break;
        case VM_DEVICE_VIRTIO_CONSOLE:
            r = console_open(m->loop, d->console, &p->consoles[p->board.console_count]);
            p->board.console_count += r == 0;
            break;
        }
    }
    return r;
}

int vm_parts_open(struct vm_parts *p, const struct vm_config *c, struct machine *m)
{
    memset(p, 0, sizeof(*p));
    /* One more than needed, so that none is not NULL. */
    p->disks = calloc(c->disk_count + 1, sizeof(*p->disks));
    p->nets = calloc(c->net_count + 1, sizeof(*p->nets));
    p->consoles = calloc(c->device_count + 1, sizeof(*p->consoles));
    int r = p->disks && p->nets && p->consoles ? 0 : -ENOMEM;
    if (r < 0)
        log_error("out of memory");
    if (r == 0)
        r = open_disks(p, c, m);
    if (r == 0)
        r = open_nets(p, c, m);
    /* The terminal changes its mode when it is opened, so it comes last. */
    if (r == 0)
        r = open_devices(p, c, m);
    if (r < 0) {
        vm_parts_close(p);
        return r;
    }
    p->board.memory_bytes = c->memory;
    p->board.cpus = c->cpus;
    p->board.kernel = c->kernel;
    p->board.initrds = (const char *const *)c->initrds;
    p->board.initrd_count = c->initrd_count;
    p->board.cmdline = c->cmdline;
    p->board.serial = p->serial;
    p->board.disks = p->disks;
    p->board.nets = p->nets;
    p->board.consoles = p->consoles;
    return 0;
}

int vm_parts_build(struct vm_parts *p, struct machine *m, struct pc *pc)
{
    p->built = true;
    return pc_create(pc, m, &p->board);
}

void vm_parts_close(struct vm_parts *p)
{
    for (unsigned i = 0; !p->built && i < p->board.disk_count; i++)
        block_close(p->disks[i].backend);
    for (unsigned i = 0; !p->built && i < p->board.net_count; i++)
        net_close(p->nets[i].backend);
    for (unsigned i = 0; i < p->board.console_count; i++)
        console_close(p->consoles[i]);
    if (p->serial)
        console_close(p->serial);
    free(p->disks);
    free(p->nets);
    free(p->consoles);
    memset(p, 0, sizeof(*p));
}

void vm_parts_set_escape(struct vm_parts *p, void (*fn)(void *opaque), void *opaque)
{
    if (p->serial)
        console_set_escape(p->serial, fn, opaque);
    for (unsigned i = 0; i < p->board.console_count; i++)
        console_set_escape(p->consoles[i], fn, opaque);
}
