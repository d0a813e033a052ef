/*
 * PCI Express: configuration space, the host bridge's two access ways (ECAM and ports
 * 0xCF8/0xCFC), BARs on the machine's buses, and MSI-X.
 *
 * One bus (0), functions at device numbers 0…31, function 0 of each; leave room for root ports.
 * Everything here: machine lock held. PCI Local Bus 3.0, PCI Express 5.0 §7.
 */
#ifndef RINGFORT_DEVICE_PCI_H
#define RINGFORT_DEVICE_PCI_H

#include <stdbool.h>
#include <stdint.h>

#include <linux/pci_regs.h> /* offsets and bits of configuration space */

#include "device/bus.h"
#include "device/device.h"
#include "device/irq.h"

struct machine;
struct pci_host;
struct pci_device;

#define PCI_CONFIG_SIZE 4096
#define PCI_MAX_MSIX 64
#define PCI_SLOTS 32

struct pci_bar {
    uint64_t size;              /* 0: absent; power of two, at least 16 */
    bool is_64, is_io, prefetchable;
    const struct bus_ops *ops;
    void *opaque;
    uint64_t mapped_at;         /* bus address where it is mapped now; derived from config space */
    bool mapped;
};

struct msix_entry {
    uint64_t address;
    uint32_t data;
    uint32_t control;           /* bit 0: masked */
};

/* A device embeds this. */
struct pci_device {
    struct pci_host *host;
    const char *name;           /* for messages */
    unsigned slot;              /* device number on bus 0 */
    uint8_t config[PCI_CONFIG_SIZE];
    uint8_t writable[PCI_CONFIG_SIZE];   /* mask of the bits the guest may write */
    struct pci_bar bar[6];
    /* Called for accesses to a range of config space that the device handles itself (virtio's PCI cfg
     * capability); NULL: plain bytes. Return false: handle as plain bytes. */
    bool (*config_read)(struct pci_device *, unsigned offset, unsigned size, uint32_t *value);
    bool (*config_write)(struct pci_device *, unsigned offset, unsigned size, uint32_t value);
    unsigned msix_cap;          /* config offset, 0: none */
    unsigned msix_vectors;
    struct msix_entry msix[PCI_MAX_MSIX];
    uint64_t msix_pending;      /* PBA */
    struct irq_line intx;       /* set it by pci_set_intx(): the guest can switch it off */
    bool intx_wanted;           /* what the device asks for, whether or not it reaches the line */
    unsigned next_cap;          /* for pci_add_capability: next free config offset */
};

/* ECAM window at ecam_base (256 MiB for 256 buses, or less), MMIO windows from which firmware/board assigns BARs. */
struct pci_host_config {
    uint64_t ecam_base, ecam_size;
    uint64_t mem32_base, mem32_size;
    uint64_t mem64_base, mem64_size;
    uint64_t io_base, io_size;
    unsigned intx_gsi[4];       /* GSI of INTA…INTD at slot 0; rotates with the slot (swizzle) */
};

/*
 * Makes the host bridge (00:00.0) with its ECAM window and ports 0xCF8…0xCFF, and adds it to the machine's devices.
 * NULL: out of resources, ranges taken or absurd (logged).
 */
struct pci_host *pci_host_create(struct machine *m, const struct pci_host_config *cfg);
/* The machine's host bridge, or NULL. */
struct pci_host *pci_host_find(struct machine *m);
/* The function at 00:slot.0, or NULL. */
struct pci_device *pci_host_device(struct pci_host *host, unsigned slot);
/* Byte accesses to port 0xCF9, which lies inside the bridge's range, go to ops (offset 0, size 1). */
void pci_host_forward_cf9(struct pci_host *host, const struct bus_ops *ops, void *opaque);
/*
 * Configuration space as the guest's accesses see it; bus, device and function in PCIe's ECAM order
 * (address bits 27:12). size 1, 2, 4, 8; any alignment; what is outside a function reads ones and drops writes.
 */
uint64_t pci_host_config_read(struct pci_host *host, uint64_t ecam_offset, unsigned size);
void pci_host_config_write(struct pci_host *host, uint64_t ecam_offset, uint64_t value, unsigned size);
/*
 * Makes the function present at the next free slot (or pci->slot if nonzero), with INTA wired (except for bridges). The
 * device's own struct device is added to the machine by its owner. 0, -ENOSPC, -EEXIST (logged).
 */
int pci_add_device(struct pci_host *host, struct pci_device *pci);
/* Takes the function out again, BARs unmapped. For the owner's destroy; a function never added is allowed. */
void pci_remove_device(struct pci_device *pci);
/* Sets vendor, device, revision, class (24 bits), subsystem ids. */
void pci_set_ids(struct pci_device *pci, uint16_t vendor, uint16_t device, uint8_t revision, uint32_t class_code,
                 uint16_t sub_vendor, uint16_t sub_device);
void pci_set_bar(struct pci_device *pci, unsigned index, const struct pci_bar *bar);
/* Returns the config offset. The body (len includes the 2-byte header) is zeroed and read-only at first. */
unsigned pci_add_capability(struct pci_device *pci, uint8_t id, unsigned len);
/* PCI Express capability of a root complex integrated endpoint (PCIe 5.0 §7.5.3). Returns its offset. */
unsigned pci_add_pcie_capability(struct pci_device *pci);
/* MSI-X capability, with table and PBA inside BAR bar at the given offsets. */
void pci_add_msix(struct pci_device *pci, unsigned vectors, unsigned bar, uint32_t table_off, uint32_t pba_off);
/* For the BAR owner to forward accesses to table and PBA (offset relative to the table/PBA start). */
uint64_t pci_msix_table_read(struct pci_device *pci, uint64_t offset, unsigned size);
void pci_msix_table_write(struct pci_device *pci, uint64_t offset, uint64_t value, unsigned size);
uint64_t pci_msix_pba_read(struct pci_device *pci, uint64_t offset, unsigned size);
/* True when the guest has switched MSI-X on. */
bool pci_msix_enabled(const struct pci_device *pci);
/*
 * Sends or, while masked or without bus mastering, marks pending. vector out of range is ignored. Sends nothing
 * unless enabled.
 */
void pci_msix_notify(struct pci_device *pci, unsigned vector);
/* Level of the wired interrupt INTA; reaches the line unless command bit 10 is set. Keep it low while MSI-X is on. */
void pci_set_intx(struct pci_device *pci, bool level);
/* Assign addresses to all BARs from the windows and enable decoding: what firmware would have done. */
void pci_assign_bars(struct pci_host *host);
/* Reset to power-on config (BARs unassigned, MSI-X off). Called by the device's reset. */
void pci_reset_device(struct pci_device *pci);
/* Fields of a PCI device for its owner's saved section. */
void pci_save(struct pci_device *pci, struct state_writer *w);
int pci_load(struct pci_device *pci, const struct state_reader *r);

#endif
