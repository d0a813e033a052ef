/*
 * A guest without a processor, for tests of virtio devices: a machine with RAM and a PCI bus, a
 * driver that finds and starts a device through its registers as a guest does, and rings in guest
 * memory.
 *
 * Accesses go through the machine's buses, with the lock taken as for a vCPU. Everything asserts by
 * cmocka.
 */
#ifndef RINGFORT_TESTS_VIRTIO_GUEST_H
#define RINGFORT_TESTS_VIRTIO_GUEST_H

#include "device/machine.h"
#include "device/pci.h"
#include "device/virtio/virtio.h"

/* RAM: two regions that touch, so that a buffer can lie across both. Nothing above. */
#define GUEST_RAM_SPLIT 0x400000u
#define GUEST_RAM_END   0x800000u
#define GUEST_ECAM      0xe0000000u

struct guest {
    struct machine m;
    struct pci_host *host;
    gpa_t next_free;        /* of guest_alloc() */
    unsigned msi_count;     /* sent in all */
    unsigned msi_seen[256]; /* by data */
    bool gsi[32];
};

void guest_init(struct guest *g);
void guest_destroy(struct guest *g);
/* Zeroed guest memory. */
gpa_t guest_alloc(struct guest *g, size_t len, size_t align);
void guest_put(struct guest *g, gpa_t at, const void *data, size_t len);
void guest_get(struct guest *g, gpa_t at, void *data, size_t len);
uint16_t guest_get16(struct guest *g, gpa_t at);
uint32_t guest_get32(struct guest *g, gpa_t at);
void guest_put16(struct guest *g, gpa_t at, uint16_t v);
/* Runs the event loop until nothing is scheduled any more, or for a bounded number of rounds. */
void guest_run_loop(struct guest *g);
/* The same, and then the time passes that delayed interrupts take. */
void guest_run(struct guest *g);

/* The driver's side of one device. */
struct driver {
    struct guest *g;
    unsigned slot;
    uint64_t bar;
    uint64_t common, isr, device, notify; /* bus addresses */
    unsigned notify_multiplier, cfg_cap, msix_cap;
    uint64_t msix_table;
};

/* Finds the device of that PCI id behind the capabilities in its configuration space. */
void driver_find(struct driver *d, struct guest *g, uint16_t pci_device);
uint64_t driver_read(struct driver *d, unsigned reg, unsigned size);
void driver_write(struct driver *d, unsigned reg, uint64_t value, unsigned size);
uint32_t driver_config_read(struct driver *d, unsigned offset, unsigned size);
void driver_config_write(struct driver *d, unsigned offset, uint32_t value, unsigned size);
uint8_t driver_status(struct driver *d);
void driver_set_status(struct driver *d, uint8_t status);
uint64_t driver_features(struct driver *d);
void driver_accept(struct driver *d, uint64_t features);
/* Vector v sends an MSI with data 0x40 + v; switches MSI-X on. */
void driver_msix(struct driver *d);

struct ring {
    struct driver *d;
    unsigned index, size;
    gpa_t desc, avail, used;
    uint16_t avail_idx, seen;
    unsigned next_desc;
};

struct buffer {
    gpa_t at;
    uint32_t len;
    bool in; /* the device writes it */
};

/* Sets the queue up in guest memory, vector index + 1 (0 is the configuration's), and enables it.
 */
void ring_setup(struct ring *r, struct driver *d, unsigned index, unsigned size);
void ring_desc(struct ring *r, unsigned i, gpa_t at, uint32_t len, uint16_t flags, uint16_t next);
/* Writes descriptors for the chain and makes it available; returns its head. */
uint16_t ring_add(struct ring *r, const struct buffer *b, unsigned count);
void ring_add_head(struct ring *r, uint16_t head);
void ring_notify(struct ring *r);
/* The next used entry; false: there is none. */
bool ring_used(struct ring *r, uint32_t *head, uint32_t *len);

/* ACKNOWLEDGE … FEATURES_OK; the rings follow; then driver_start() sets DRIVER_OK. */
void driver_negotiate(struct driver *d, uint64_t features);
void driver_start(struct driver *d);

#endif
