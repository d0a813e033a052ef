/*
 * The PCI host bridge: who is at which slot, the two ways into configuration space, and the
 * assignment of BARs that firmware would do. Machine lock held.
 */
#include "device/pci.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/log.h"
#include "device/machine.h"
#include "device/pci_internal.h"

#define CF8_PORT 0xcf8u
#define CF8_PORTS 8u
#define CF8_ENABLE (1u << 31)
#define CF8_BITS 0x80fffffcu

/* Configuration space, by addresses in ECAM order. */

static uint64_t ones(unsigned size) { return size >= 8 ? UINT64_MAX : (UINT64_C(1) << (8 * size)) - 1; }

/* The function that ecam_offset names, or NULL. Only bus 0 and functions 0 exist. */
static struct pci_device *function_at(struct pci_host *host, uint64_t ecam_offset)
{
    if (ecam_offset >> 20 || (ecam_offset >> 12 & 7))
        return NULL;
    return host->slot[ecam_offset >> 15 & 31];
}

uint64_t pci_host_config_read(struct pci_host *host, uint64_t ecam_offset, unsigned size)
{
    struct pci_device *pci = function_at(host, ecam_offset);
    unsigned offset = ecam_offset & (PCI_CONFIG_SIZE - 1);
    if (!pci)
        return ones(size);
    if (offset + size > PCI_CONFIG_SIZE) {
        /* What lies beyond the function's end is nobody's. */
        uint64_t value = ones(size);
        for (unsigned i = 0; offset + i < PCI_CONFIG_SIZE; i++) {
            value &= ~(UINT64_C(0xff) << (8 * i));
            value |= (uint64_t)pci_config_read(pci, offset + i, 1) << (8 * i);
        }
        return value;
    }
    if (size == 8)
        return pci_config_read(pci, offset, 4) | (uint64_t)pci_config_read(pci, offset + 4, 4) << 32;
    return pci_config_read(pci, offset, size);
}

void pci_host_config_write(struct pci_host *host, uint64_t ecam_offset, uint64_t value, unsigned size)
{
    struct pci_device *pci = function_at(host, ecam_offset);
    unsigned offset = ecam_offset & (PCI_CONFIG_SIZE - 1);
    if (!pci)
        return;
    if (offset + size > PCI_CONFIG_SIZE) {
        for (unsigned i = 0; offset + i < PCI_CONFIG_SIZE; i++)
            pci_config_write(pci, offset + i, value >> (8 * i) & 0xff, 1);
        return;
    }
    pci_config_write(pci, offset, (uint32_t)value, size == 8 ? 4 : size);
    if (size == 8)
        pci_config_write(pci, offset + 4, (uint32_t)(value >> 32), 4);
}

static uint64_t ecam_read(void *opaque, uint64_t offset, unsigned size)
{
    return pci_host_config_read(opaque, offset, size);
}

static void ecam_write(void *opaque, uint64_t offset, uint64_t value, unsigned size)
{
    pci_host_config_write(opaque, offset, value, size);
}

static const struct bus_ops ecam_ops = {.read = ecam_read, .write = ecam_write};

/*
 * Ports 0xCF8…0xCFF. Only a dword at 0xCF8 reaches the address register; a byte at 0xCF9 is the reset
 * control register; other narrow accesses to the first four ports are not for the bridge.
 */
static bool data_access(const struct pci_host *host, uint64_t offset, unsigned size, uint64_t *ecam_offset)
{
    if (offset < 4 || !(host->address & CF8_ENABLE))
        return false;
    /* Bus 23:16, device 15:11, function 10:8, register 7:2: ECAM has them four bits higher. */
    *ecam_offset = (uint64_t)(host->address & 0xffff00) << 4 | (host->address & 0xfc) | (offset & 3);
    return true;
}

static uint64_t ports_read(void *opaque, uint64_t offset, unsigned size)
{
    struct pci_host *host = opaque;
    uint64_t at;
    if (offset == 0 && size == 4)
        return host->address;
    if (offset == 1 && size == 1 && host->cf9_ops)
        return host->cf9_ops->read(host->cf9_opaque, 0, 1);
    if (data_access(host, offset, size, &at))
        return pci_host_config_read(host, at, size);
    return UINT64_MAX;
}

static void ports_write(void *opaque, uint64_t offset, uint64_t value, unsigned size)
{
    struct pci_host *host = opaque;
    uint64_t at;
    if (offset == 0 && size == 4)
        host->address = (uint32_t)value & CF8_BITS;
    else if (offset == 1 && size == 1 && host->cf9_ops)
        host->cf9_ops->write(host->cf9_opaque, 0, value, 1);
    else if (data_access(host, offset, size, &at))
        pci_host_config_write(host, at, value, size);
}

static const struct bus_ops ports_ops = {.read = ports_read, .write = ports_write};

void pci_host_forward_cf9(struct pci_host *host, const struct bus_ops *ops, void *opaque)
{
    host->cf9_ops = ops;
    host->cf9_opaque = opaque;
}

/* Slots. */

int pci_add_device(struct pci_host *host, struct pci_device *pci)
{
    bool bridge = pci->config[PCI_CLASS_PROG + 2] == 0x06;
    if (!bridge && pci->slot == 0)
        for (pci->slot = 1; pci->slot < PCI_SLOTS && host->slot[pci->slot];)
            pci->slot++;
    if (pci->slot >= PCI_SLOTS) {
        log_error("%s: no PCI slot is left (a machine has %u)", pci->name, PCI_SLOTS - 1);
        return -ENOSPC;
    }
    if (host->slot[pci->slot]) {
        log_error("%s: PCI slot %u is taken by %s", pci->name, pci->slot, host->slot[pci->slot]->name);
        return -EEXIST;
    }
    store_le16(&pci->writable[PCI_COMMAND], PCI_COMMAND_IO | PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER |
                                                1 << 6 | 1 << 8 | PCI_COMMAND_INTX_DISABLE);
    pci->writable[PCI_CACHE_LINE_SIZE] = 0xff;
    if (!bridge) {
        pci->config[PCI_INTERRUPT_PIN] = 1;
        pci->writable[PCI_INTERRUPT_LINE] = 0xff;
        pci->intx.router = &host->machine->irq;
        pci->intx.gsi = host->cfg.intx_gsi[pci->slot & 3];
    }
    pci->host = host;
    host->slot[pci->slot] = pci;
    return 0;
}

void pci_remove_device(struct pci_device *pci)
{
    struct pci_host *host = pci->host;
    if (!host || host->slot[pci->slot] != pci)
        return;
    pci_unmap(pci);
    if (pci->intx.router)
        irq_set(&pci->intx, false);
    host->slot[pci->slot] = NULL;
    pci->host = NULL;
}

struct pci_device *pci_host_device(struct pci_host *host, unsigned slot)
{
    return slot < PCI_SLOTS ? host->slot[slot] : NULL;
}

/* What firmware does. */

struct window {
    uint64_t next, end;
};

/* The next address in w for size bytes, or 0 when it is full. */
static uint64_t take(struct window *w, uint64_t size)
{
    uint64_t at = align_up(w->next, size);
    if (at < w->next || at > w->end || w->end - at < size || at == 0)
        return 0;
    w->next = at + size;
    return at;
}

static void assign_function(struct pci_device *pci, struct window *io, struct window *mem32,
                            struct window *mem64)
{
    uint16_t command = PCI_COMMAND_MASTER;
    for (unsigned i = 0; i < ARRAY_SIZE(pci->bar); i++) {
        const struct pci_bar *bar = &pci->bar[i];
        if (!bar->size)
            continue;
        uint64_t at = 0;
        if (bar->is_io)
            at = take(io, bar->size);
        else if (bar->is_64)
            at = take(mem64, bar->size);
        if (!at && !bar->is_io)
            at = take(mem32, bar->size);
        if (!at)
            log_warn("%s: no address is left for BAR %u of %#llx bytes", pci->name, i,
                     (unsigned long long)bar->size);
        else
            command |= bar->is_io ? PCI_COMMAND_IO : PCI_COMMAND_MEMORY;
        pci_set_bar_address(pci, i, at);
    }
    pci->config[PCI_INTERRUPT_LINE] = pci->config[PCI_INTERRUPT_PIN] ? (uint8_t)pci->intx.gsi : 0;
    pci_config_write(pci, PCI_COMMAND, command, 2);
}

void pci_assign_bars(struct pci_host *host)
{
    const struct pci_host_config *c = &host->cfg;
    struct window io = {c->io_base, c->io_base + c->io_size};
    struct window mem32 = {c->mem32_base, c->mem32_base + c->mem32_size};
    struct window mem64 = {c->mem64_base, c->mem64_base + c->mem64_size};
    for (unsigned s = 1; s < PCI_SLOTS; s++)
        if (host->slot[s])
            pci_unmap(host->slot[s]);
    for (unsigned s = 1; s < PCI_SLOTS; s++)
        if (host->slot[s])
            assign_function(host->slot[s], &io, &mem32, &mem64);
}

/* The device. */

static void host_reset(struct device *dev)
{
    struct pci_host *host = container_of(dev, struct pci_host, dev);
    host->address = 0;
    pci_reset_device(&host->bridge);
}

static void host_save(struct device *dev, struct state_writer *w)
{
    struct pci_host *host = container_of(dev, struct pci_host, dev);
    state_put_u64(w, "address", host->address);
    pci_save(&host->bridge, w);
}

static int host_load(struct device *dev, const struct state_reader *r)
{
    struct pci_host *host = container_of(dev, struct pci_host, dev);
    uint64_t address;
    if (state_get_u64(r, "address", &address)) {
        log_error("saved %s: fields are missing", dev->id);
        return -EINVAL;
    }
    host->address = (uint32_t)address & CF8_BITS;
    /* The functions are loaded after this, each into its place: none may stand in another's way. */
    for (unsigned s = 0; s < PCI_SLOTS; s++)
        if (host->slot[s])
            pci_unmap(host->slot[s]);
    return pci_load(&host->bridge, r);
}

/* Functions may be gone by now, or go without saying so: they are not touched. */
static void host_destroy(struct device *dev)
{
    struct pci_host *host = container_of(dev, struct pci_host, dev);
    struct machine *m = host->machine;
    bus_remove(&m->mmio, host->cfg.ecam_base, host);
    bus_remove(&m->ports, CF8_PORT, host);
    free(host);
}

static const struct device_ops host_ops = {
    .name = "pci-host",
    .version = 1,
    .reset = host_reset,
    .save = host_save,
    .load = host_load,
    .destroy = host_destroy,
};

struct pci_host *pci_host_create(struct machine *m, const struct pci_host_config *cfg)
{
    struct pci_host *host = calloc(1, sizeof(*host));
    if (!host) {
        log_error("out of memory for the PCI host bridge");
        return NULL;
    }
    host->machine = m;
    host->cfg = *cfg;
    host->bridge.name = "PCI host bridge";
    /* Red Hat's generic PCIe host bridge: no driver asks for more of it than its class. */
    pci_set_ids(&host->bridge, 0x1b36, 0x0008, 0, 0x060000, 0x1af4, 0x1100);
    if (pci_add_device(host, &host->bridge) ||
        (cfg->ecam_size &&
         bus_add(&m->mmio, cfg->ecam_base, cfg->ecam_size, &ecam_ops, host, "pci-ecam")) ||
        bus_add(&m->ports, CF8_PORT, CF8_PORTS, &ports_ops, host, "pci-config")) {
        host_destroy(&host->dev);
        return NULL;
    }
    machine_add_device(m, &host->dev, &host_ops);
    return host;
}

struct pci_host *pci_host_find(struct machine *m)
{
    struct device *dev = machine_find_device(m, "pci-host0");
    return dev ? container_of(dev, struct pci_host, dev) : NULL;
}
