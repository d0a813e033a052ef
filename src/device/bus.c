/*
 * The port and MMIO address spaces: a sorted array of ranges and a binary search.
 *
 * Machine lock held, except bus_read() and bus_write(), which take it.
 */
#include "device/bus.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "base/util.h"

void bus_init(struct bus *bus, const char *space, pthread_mutex_t *lock)
{
    *bus = (struct bus){.space = space, .lock = lock};
}

void bus_destroy(struct bus *bus)
{
    free(bus->range);
    bus->range = NULL;
    bus->count = bus->capacity = 0;
}

/* The index of the first range whose base is above addr. */
static unsigned upper_bound(const struct bus *bus, uint64_t addr)
{
    unsigned lo = 0, hi = bus->count;
    while (lo < hi) {
        unsigned mid = lo + (hi - lo) / 2;
        if (bus->range[mid].base <= addr)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

const struct bus_range *bus_find(const struct bus *bus, uint64_t addr)
{
    unsigned i = upper_bound(bus, addr);
    if (i == 0)
        return NULL;
    const struct bus_range *r = &bus->range[i - 1];
    return addr - r->base < r->size ? r : NULL;
}

static void tell_doorbells(const struct bus *bus, const struct bus_range *r, bool there)
{
    uint64_t offset;
    if (!bus->listener || !r->ops->doorbell)
        return;
    for (unsigned i = 0; r->ops->doorbell(r->opaque, i, &offset); i++)
        bus->listener->doorbell(bus->listener->opaque, r->base + offset, there);
}

void bus_listen(struct bus *bus, const struct bus_listener *listener)
{
    bus->listener = listener;
    for (unsigned i = 0; i < bus->count; i++)
        tell_doorbells(bus, &bus->range[i], true);
}

static int report_overlap(const struct bus *bus, const struct bus_range *r, uint64_t base,
                          uint64_t size, const char *name)
{
    log_error("%s range %#llx+%#llx of %s overlaps %#llx+%#llx of %s", bus->space,
              (unsigned long long)base, (unsigned long long)size, name, (unsigned long long)r->base,
              (unsigned long long)r->size, r->name);
    return -EEXIST;
}

int bus_add(struct bus *bus, uint64_t base, uint64_t size, const struct bus_ops *ops, void *opaque,
            const char *name)
{
    if (size == 0 || base + (size - 1) < base)
        return -EINVAL;
    unsigned i = upper_bound(bus, base);
    if (i > 0 && base - bus->range[i - 1].base < bus->range[i - 1].size)
        return report_overlap(bus, &bus->range[i - 1], base, size, name);
    if (i < bus->count && bus->range[i].base - base < size)
        return report_overlap(bus, &bus->range[i], base, size, name);
    if (bus->count == bus->capacity) {
        unsigned capacity = bus->capacity ? 2 * bus->capacity : 16;
        struct bus_range *range = realloc(bus->range, capacity * sizeof(*range));
        if (!range) {
            log_error("out of memory for the %s bus", bus->space);
            return -ENOMEM;
        }
        bus->range = range;
        bus->capacity = capacity;
    }
    memmove(&bus->range[i + 1], &bus->range[i], (bus->count - i) * sizeof(bus->range[0]));
    bus->range[i] =
        (struct bus_range){.base = base, .size = size, .ops = ops, .opaque = opaque, .name = name};
    bus->count++;
    tell_doorbells(bus, &bus->range[i], true);
    return 0;
}

void bus_remove(struct bus *bus, uint64_t base, const void *opaque)
{
    unsigned i = upper_bound(bus, base);
    if (i == 0 || bus->range[i - 1].base != base || bus->range[i - 1].opaque != opaque)
        return;
    tell_doorbells(bus, &bus->range[i - 1], false);
    memmove(&bus->range[i - 1], &bus->range[i], (bus->count - i) * sizeof(bus->range[0]));
    bus->count--;
}

static uint64_t size_mask(unsigned size)
{
    return size >= 8 ? UINT64_MAX : (UINT64_C(1) << (8 * size)) - 1;
}

static bool holds(const struct bus_range *r, uint64_t addr, unsigned size)
{
    return r && r->size - (addr - r->base) >= size;
}

/* An access that meets no range at any of its bytes, which is the common kind of miss. */
static bool touches_nothing(const struct bus *bus, uint64_t addr, unsigned size)
{
    unsigned i = upper_bound(bus, addr);
    return (i == 0 || addr - bus->range[i - 1].base >= bus->range[i - 1].size) &&
           (i == bus->count || bus->range[i].base - addr >= size);
}

/*
 * ops can remove or add ranges (a PCI BAR that moves), so a struct bus_range is not used after the
 * call. An address past the end of the space wraps, as a bus's address lines do.
 */
uint64_t bus_read_locked(struct bus *bus, uint64_t addr, unsigned size)
{
    bus->reads++;
    const struct bus_range *r = bus_find(bus, addr);
    if (likely(holds(r, addr, size)))
        return r->ops->read(r->opaque, addr - r->base, size) & size_mask(size);
    if (touches_nothing(bus, addr, size))
        return size_mask(size);
    uint64_t value = 0;
    for (unsigned i = 0; i < size; i++) {
        r = bus_find(bus, addr + i);
        uint64_t byte = r ? r->ops->read(r->opaque, addr + i - r->base, 1) & 0xff : 0xff;
        value |= byte << (8 * i);
    }
    return value;
}

void bus_write_locked(struct bus *bus, uint64_t addr, uint64_t value, unsigned size)
{
    bus->writes++;
    const struct bus_range *r = bus_find(bus, addr);
    if (likely(holds(r, addr, size))) {
        r->ops->write(r->opaque, addr - r->base, value & size_mask(size), size);
        return;
    }
    if (touches_nothing(bus, addr, size))
        return;
    for (unsigned i = 0; i < size; i++) {
        r = bus_find(bus, addr + i);
        if (r)
            r->ops->write(r->opaque, addr + i - r->base, (value >> (8 * i)) & 0xff, 1);
    }
}

uint64_t bus_read(struct bus *bus, uint64_t addr, unsigned size)
{
    pthread_mutex_lock(bus->lock);
    uint64_t value = bus_read_locked(bus, addr, size);
    pthread_mutex_unlock(bus->lock);
    return value;
}

void bus_write(struct bus *bus, uint64_t addr, uint64_t value, unsigned size)
{
    pthread_mutex_lock(bus->lock);
    bus_write_locked(bus, addr, value, size);
    pthread_mutex_unlock(bus->lock);
}
