/*
 * What pci.c (the bridge and who is where), pci_config.c (configuration space of a function) and
 * pci_msix.c share. Machine lock held.
 */
#ifndef RINGFORT_DEVICE_PCI_INTERNAL_H
#define RINGFORT_DEVICE_PCI_INTERNAL_H

#include "base/util.h"
#include "device/pci.h"

struct pci_host {
    struct device dev;
    struct machine *machine;
    struct pci_host_config cfg;
    struct pci_device *slot[PCI_SLOTS];
    struct pci_device bridge;           /* 00:00.0 */
    uint32_t address;                   /* port 0xCF8 */
    const struct bus_ops *cf9_ops;
    void *cf9_opaque;
};

/* pci_config.c: accesses of 1, 2 or 4 bytes within the function's 4096. */
uint32_t pci_config_read(struct pci_device *pci, unsigned offset, unsigned size);
void pci_config_write(struct pci_device *pci, unsigned offset, uint32_t value, unsigned size);
/* Makes mappings follow what config space says, for this function and for those that lost to it before. */
void pci_update_mappings(struct pci_device *pci);
void pci_unmap(struct pci_device *pci);
/* Where BAR index points, UINT64_MAX when it cannot be mapped there or decoding is off. */
uint64_t pci_bar_address(const struct pci_device *pci, unsigned index);
void pci_set_bar_address(struct pci_device *pci, unsigned index, uint64_t address);

/* pci_msix.c */
/* After a change of the capability's control word or of bus mastering: sends what may go now. */
void pci_msix_update(struct pci_device *pci);
void pci_msix_reset(struct pci_device *pci);
void pci_msix_save(struct pci_device *pci, struct state_writer *w);
int pci_msix_load(struct pci_device *pci, const struct state_reader *r);

#endif
