/*
 * The two address spaces through which vCPUs reach devices: I/O ports and MMIO.
 *
 * A range belongs to one device; ranges of a space do not overlap. Accesses that
 * nothing claims read all ones and drop writes. All functions: machine lock held.
 * The access functions take it themselves where said.
 */
#ifndef RINGFORT_DEVICE_BUS_H
#define RINGFORT_DEVICE_BUS_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

struct bus_ops {
    /*
     * An access at offset inside the range, size 1, 2, 4 or 8 bytes (ports: 1, 2, 4), always inside the
     * range: bus_access splits what crosses its end. Values in the low bytes; the bus masks results to size.
     * Devices see the guest's own size and alignment: each decides what odd ones mean.
     */
    uint64_t (*read)(void *opaque, uint64_t offset, unsigned size);
    void (*write)(void *opaque, uint64_t offset, uint64_t value, unsigned size);
    /*
     * Offset of the i-th doorbell: a place where a write only gives notice, with any value and width, and may take effect a little
     * later. False: there are no more. NULL: none. An engine can have such writes done without the vCPU's leaving the guest.
     */
    bool (*doorbell)(void *opaque, unsigned i, uint64_t *offset);
};

/* Learns of each doorbell on a bus: those that are there, then as ranges come (there) and go. Machine lock held. */
struct bus_listener {
    void (*doorbell)(void *opaque, uint64_t address, bool there);
    void *opaque;
};

struct bus_range {
    uint64_t base, size;
    const struct bus_ops *ops;
    void *opaque;
    const char *name;           /* for messages and `--stats`; borrowed */
};

struct bus {
    struct bus_range *range;    /* sorted by base */
    unsigned count, capacity;
    const char *space;          /* "port" or "MMIO" */
    pthread_mutex_t *lock;      /* the machine lock */
    uint64_t reads, writes;     /* counters */
    const struct bus_listener *listener;    /* or NULL */
};

void bus_init(struct bus *bus, const char *space, pthread_mutex_t *lock);
void bus_destroy(struct bus *bus);
/* 0, -EEXIST when it overlaps (logged with both names), -ENOMEM, -EINVAL for size 0 or wrap-around. */
int bus_add(struct bus *bus, uint64_t base, uint64_t size, const struct bus_ops *ops, void *opaque,
            const char *name);
/* Removes the range that was added with exactly this base and opaque; none: nothing happens. */
void bus_remove(struct bus *bus, uint64_t base, const void *opaque);
/* NULL: nobody listens any more, and the one that did is not told of what there still is. Borrowed. */
void bus_listen(struct bus *bus, const struct bus_listener *listener);
const struct bus_range *bus_find(const struct bus *bus, uint64_t addr);

/* From vCPU threads: these take the machine lock. An access may cross ranges; it is split bytewise then. */
uint64_t bus_read(struct bus *bus, uint64_t addr, unsigned size);
void bus_write(struct bus *bus, uint64_t addr, uint64_t value, unsigned size);
/* The same with the lock already held (tests, device models that forward). */
uint64_t bus_read_locked(struct bus *bus, uint64_t addr, unsigned size);
void bus_write_locked(struct bus *bus, uint64_t addr, uint64_t value, unsigned size);

#endif
