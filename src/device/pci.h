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

#include "device/bus.h"
#include "device/device.h"

struct machine;
struct pci_host;
struct pci_device;

#define PCI_CONFIG_SIZE 4096
#define PCI_MAX_MSIX 64

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
    struct irq_line intx;
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

struct pci_host *pci_host_create(struct machine *m, const struct pci_host_config *cfg);
/* Fills identification and makes the function present at the next free slot (or pci->slot if nonzero). */
int pci_add_device(struct pci_host *host, struct pci_device *pci);
/* Sets vendor, device, revision, class (24 bits), subsystem ids. */
void pci_set_ids(struct pci_device *pci, uint16_t vendor, uint16_t device, uint8_t revision, uint32_t class_code,
                 uint16_t sub_vendor, uint16_t sub_device);
void pci_set_bar(struct pci_device *pci, unsigned index, const struct pci_bar *bar);
/* Returns the config offset. The body (len includes the 2-byte header) is zeroed and read-only at first. */
unsigned pci_add_capability(struct pci_device *pci, uint8_t id, unsigned len);
/* MSI-X capability, with table and PBA inside BAR bar at the given offsets. */
void pci_add_msix(struct pci_device *pci, unsigned vectors, unsigned bar, uint32_t table_off, uint32_t pba_off);
/* For the BAR owner to forward accesses to table and PBA (offset relative to the table/PBA start). */
uint64_t pci_msix_table_read(struct pci_device *pci, uint64_t offset, unsigned size);
void pci_msix_table_write(struct pci_device *pci, uint64_t offset, uint64_t value, unsigned size);
uint64_t pci_msix_pba_read(struct pci_device *pci, uint64_t offset, unsigned size);
/* True when the guest has switched MSI-X on. */
bool pci_msix_enabled(const struct pci_device *pci);
/* Sends or, while masked, marks pending. vector out of range is ignored. Sends nothing unless enabled. */
void pci_msix_notify(struct pci_device *pci, unsigned vector);
/* Assign addresses to all BARs from the windows and enable decoding: what firmware would have done. */
void pci_assign_bars(struct pci_host *host);
/* Reset to power-on config (BARs unassigned, MSI-X off). Called by the device's reset. */
void pci_reset_device(struct pci_device *pci);
/* Fields of a PCI device for its owner's saved section. */
void pci_save(struct pci_device *pci, struct state_writer *w);
int pci_load(struct pci_device *pci, const struct state_reader *r);

#endif
