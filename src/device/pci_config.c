/*
 * Configuration space of one PCI function: reads and writes by the guest, BARs and their mappings on
 * the machine's buses, capabilities, the wired interrupt.
 *
 * config[] holds the bytes as the guest reads them, writable[] which bits it can change. What follows from
 * a change (mappings, interrupt line, MSI-X) is worked out afterwards from the bytes alone. Machine lock held.
 */
#include <errno.h>
#include <stdio.h>

#include "base/log.h"
#include "device/machine.h"
#include "device/pci_internal.h"

#define BAR_IO 1u
#define BAR_64 4u
#define BAR_PREFETCHABLE 8u

static uint16_t command_of(const struct pci_device *pci) { return load_le16(&pci->config[PCI_COMMAND]); }

/* Building. */

void pci_set_ids(struct pci_device *pci, uint16_t vendor, uint16_t device, uint8_t revision,
                 uint32_t class_code, uint16_t sub_vendor, uint16_t sub_device)
{
    store_le16(&pci->config[PCI_VENDOR_ID], vendor);
    store_le16(&pci->config[PCI_DEVICE_ID], device);
    pci->config[PCI_REVISION_ID] = revision;
    pci->config[PCI_CLASS_PROG] = (uint8_t)class_code;
    store_le16(&pci->config[PCI_CLASS_PROG + 1], (uint16_t)(class_code >> 8));
    store_le16(&pci->config[PCI_SUBSYSTEM_VENDOR_ID], sub_vendor);
    store_le16(&pci->config[PCI_SUBSYSTEM_ID], sub_device);
}

void pci_set_bar(struct pci_device *pci, unsigned index, const struct pci_bar *bar)
{
    unsigned at = PCI_BASE_ADDRESS_0 + 4 * index;
    pci->bar[index] = *bar;
    pci->bar[index].mapped = false;
    uint64_t mask = ~(bar->size - 1);
    uint32_t kind = bar->is_io ? BAR_IO
                               : (bar->is_64 ? BAR_64 : 0) | (bar->prefetchable ? BAR_PREFETCHABLE : 0);
    store_le32(&pci->config[at], kind);
    store_le32(&pci->writable[at], (uint32_t)mask & (bar->is_io ? ~3u : ~15u));
    if (bar->is_64 && !bar->is_io) {
        store_le32(&pci->config[at + 4], 0);
        store_le32(&pci->writable[at + 4], (uint32_t)(mask >> 32));
    }
}

unsigned pci_add_capability(struct pci_device *pci, uint8_t id, unsigned len)
{
    unsigned at = pci->next_cap ? pci->next_cap : 0x40;
    unsigned end = (at + len + 3) & ~3u;
    if (end > 256) {
        /* The device's own layout, not the guest's: a mistake of ours. */
        log_error("%s: its capabilities do not fit into PCI configuration space", pci->name);
        __builtin_trap();
    }
    memset(&pci->config[at], 0, end - at);
    memset(&pci->writable[at], 0, end - at);
    pci->config[at] = id;
    /* At the end of the list, so that guests see them in the order they were added. */
    unsigned link = PCI_CAPABILITY_LIST;
    while (pci->config[link])
        link = pci->config[link] + 1u;
    pci->config[link] = (uint8_t)at;
    pci->config[PCI_STATUS] |= PCI_STATUS_CAP_LIST;
    pci->next_cap = end;
    return at;
}

unsigned pci_add_pcie_capability(struct pci_device *pci)
{
    unsigned at = pci_add_capability(pci, PCI_CAP_ID_EXP, 0x3c);
    store_le16(&pci->config[at + 2], 2 | 9 << 4);       /* version 2, root complex integrated endpoint */
    store_le32(&pci->config[at + 4], 1u << 15);         /* role-based error reporting */
    store_le16(&pci->writable[at + 8], 0x7fef);         /* device control; relaxed ordering stays 0 */
    return at;
}

/* BARs. */

uint64_t pci_bar_address(const struct pci_device *pci, unsigned index)
{
    const struct pci_bar *bar = &pci->bar[index];
    unsigned at = PCI_BASE_ADDRESS_0 + 4 * index;
    uint16_t command = command_of(pci);
    if (!bar->size || !(command & (bar->is_io ? PCI_COMMAND_IO : PCI_COMMAND_MEMORY)))
        return UINT64_MAX;
    uint64_t base = load_le32(&pci->config[at]) & (bar->is_io ? ~3u : ~15u);
    uint64_t limit = bar->is_io ? 0xffff : UINT32_MAX;
    if (bar->is_64 && !bar->is_io) {
        base |= (uint64_t)load_le32(&pci->config[at + 4]) << 32;
        limit = (UINT64_C(1) << 52) - 1;
    }
    /* 0 is "not assigned"; the rest is beyond what the bus can address. */
    if (base == 0 || base > limit || limit - base < bar->size - 1)
        return UINT64_MAX;
    return base;
}

void pci_set_bar_address(struct pci_device *pci, unsigned index, uint64_t address)
{
    unsigned at = PCI_BASE_ADDRESS_0 + 4 * index;
    uint32_t fixed = load_le32(&pci->config[at]) & ~load_le32(&pci->writable[at]);
    store_le32(&pci->config[at], fixed | (uint32_t)address);
    if (pci->bar[index].is_64)
        store_le32(&pci->config[at + 4], (uint32_t)(address >> 32));
}

static struct bus *bus_of(const struct pci_device *pci, unsigned index)
{
    struct machine *m = pci->host->machine;
    return pci->bar[index].is_io ? &m->ports : &m->mmio;
}

/* bus_add() complains of overlaps as of a fault in the configuration; a guest may make one any time. */
static const struct bus_range *find_overlap(const struct bus *bus, uint64_t base, uint64_t size)
{
    const struct bus_range *r = bus_find(bus, base);
    if (r)
        return r;
    for (unsigned i = 0; i < bus->count; i++)
        if (bus->range[i].base - base < size)
            return &bus->range[i];
    return NULL;
}

static void unmap_bar(struct pci_device *pci, unsigned index)
{
    struct pci_bar *bar = &pci->bar[index];
    if (bar->mapped) {
        bus_remove(bus_of(pci, index), bar->mapped_at, bar->opaque);
        bar->mapped = false;
    }
}

static void map_bar(struct pci_device *pci, unsigned index, bool complain)
{
    struct pci_bar *bar = &pci->bar[index];
    uint64_t base = pci_bar_address(pci, index);
    if (bar->mapped || base == UINT64_MAX)
        return;
    struct bus *bus = bus_of(pci, index);
    const struct bus_range *other = find_overlap(bus, base, bar->size);
    if (other) {
        if (complain)
            log_guest_error("%s: the guest puts BAR %u at %#llx, onto %s; it stays unmapped", pci->name,
                            index, (unsigned long long)base, other->name);
        return;
    }
    if (bus_add(bus, base, bar->size, bar->ops, bar->opaque, pci->name) == 0) {
        bar->mapped = true;
        bar->mapped_at = base;
    }
}

void pci_unmap(struct pci_device *pci)
{
    for (unsigned i = 0; i < ARRAY_SIZE(pci->bar); i++)
        unmap_bar(pci, i);
}

void pci_update_mappings(struct pci_device *pci)
{
    struct pci_host *host = pci->host;
    if (!host)
        return;
    bool room = false;
    for (unsigned i = 0; i < ARRAY_SIZE(pci->bar); i++) {
        if (pci->bar[i].mapped && pci_bar_address(pci, i) != pci->bar[i].mapped_at) {
            unmap_bar(pci, i);
            room = true;
        }
    }
    for (unsigned i = 0; i < ARRAY_SIZE(pci->bar); i++)
        map_bar(pci, i, true);
    if (!room)
        return;
    for (unsigned s = 0; s < PCI_SLOTS; s++)
        for (unsigned i = 0; host->slot[s] && i < ARRAY_SIZE(pci->bar); i++)
            map_bar(host->slot[s], i, false);
}

/* The wired interrupt. */

static void update_intx(struct pci_device *pci)
{
    pci->config[PCI_STATUS] &= (uint8_t)~PCI_STATUS_INTERRUPT;
    if (pci->intx_wanted)
        pci->config[PCI_STATUS] |= PCI_STATUS_INTERRUPT;
    if (pci->intx.router)
        irq_set(&pci->intx, pci->intx_wanted && !(command_of(pci) & PCI_COMMAND_INTX_DISABLE));
}

void pci_set_intx(struct pci_device *pci, bool level)
{
    pci->intx_wanted = level;
    update_intx(pci);
}

/* The guest's accesses. */

uint32_t pci_config_read(struct pci_device *pci, unsigned offset, unsigned size)
{
    uint32_t value = 0;
    if (pci->config_read && pci->config_read(pci, offset, size, &value))
        return value;
    memcpy(&value, &pci->config[offset], size);
    return value;
}

static bool touches(unsigned offset, unsigned size, unsigned at, unsigned len)
{
    return offset < at + len && at < offset + size;
}

void pci_config_write(struct pci_device *pci, unsigned offset, uint32_t value, unsigned size)
{
    if (pci->config_write && pci->config_write(pci, offset, size, value))
        return;
    for (unsigned i = 0; i < size; i++) {
        uint8_t mask = pci->writable[offset + i], byte = (uint8_t)(value >> (8 * i));
        pci->config[offset + i] = (pci->config[offset + i] & ~mask) | (byte & mask);
    }
    if (touches(offset, size, PCI_COMMAND, 2) || touches(offset, size, PCI_BASE_ADDRESS_0, 24))
        pci_update_mappings(pci);
    if (touches(offset, size, PCI_COMMAND, 2))
        update_intx(pci);
    if (touches(offset, size, PCI_COMMAND, 2) ||
        (pci->msix_cap && touches(offset, size, pci->msix_cap + 2, 2)))
        pci_msix_update(pci);
}

/* Life. */

void pci_reset_device(struct pci_device *pci)
{
    pci->intx_wanted = false;
    for (unsigned i = 0; i < PCI_CONFIG_SIZE; i++)
        pci->config[i] &= ~pci->writable[i];
    pci_msix_reset(pci);
    pci_update_mappings(pci);
    update_intx(pci);
}

/* Fields in the section of the function's owner; their names begin with pci_. */
void pci_save(struct pci_device *pci, struct state_writer *w)
{
    uint8_t mapped = 0;
    for (unsigned i = 0; i < ARRAY_SIZE(pci->bar); i++)
        mapped |= (uint8_t)(pci->bar[i].mapped << i);
    state_put_bytes(w, "pci_config", pci->config, sizeof(pci->config));
    state_put_u64(w, "pci_mapped", mapped);
    state_put_u64(w, "pci_intx_wanted", pci->intx_wanted);
    state_put_u64(w, "pci_intx_level", pci->intx.level);
    if (pci->msix_cap)
        pci_msix_save(pci, w);
}

int pci_load(struct pci_device *pci, const struct state_reader *r)
{
    uint8_t config[PCI_CONFIG_SIZE];
    uint64_t mapped, wanted, level;
    if (state_get_bytes(r, "pci_config", config, sizeof(config)) ||
        state_get_u64(r, "pci_mapped", &mapped) || state_get_u64(r, "pci_intx_wanted", &wanted) ||
        state_get_u64(r, "pci_intx_level", &level)) {
        log_error("saved %s: PCI fields are missing", pci->name);
        return -EINVAL;
    }
    if (memcmp(config, pci->config, 4)) {
        log_error("saved %s: it was PCI device %04x:%04x, here it is %04x:%04x", pci->name,
                  load_le16(config), load_le16(config + 2), load_le16(pci->config),
                  load_le16(pci->config + 2));
        return -EINVAL;
    }
    pci_unmap(pci);
    for (unsigned i = 0; i < PCI_CONFIG_SIZE; i++)
        pci->config[i] = (pci->config[i] & ~pci->writable[i]) | (config[i] & pci->writable[i]);
    /* Of BARs that overlap, the one that had the place gets it again. */
    for (unsigned i = 0; pci->host && i < ARRAY_SIZE(pci->bar); i++)
        if (mapped >> i & 1)
            map_bar(pci, i, true);
    /* The level on the wire is the interrupt controller's state as well: it is not told again. */
    pci->intx_wanted = wanted & 1;
    pci->intx.level = level & 1;
    pci->config[PCI_STATUS] &= (uint8_t)~PCI_STATUS_INTERRUPT;
    if (pci->intx_wanted)
        pci->config[PCI_STATUS] |= PCI_STATUS_INTERRUPT;
    return pci->msix_cap ? pci_msix_load(pci, r) : 0;
}
