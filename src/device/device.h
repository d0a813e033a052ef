/*
 * What every stateful part of a machine has in common.
 *
 * A device embeds struct device. The machine keeps a list of them and pauses, saves,
 * loads and resumes each through device_ops. All functions: machine lock held.
 */
#ifndef RINGFORT_DEVICE_DEVICE_H
#define RINGFORT_DEVICE_DEVICE_H

#include <stdint.h>

#include "base/state.h"

struct device;
struct machine;

struct device_ops {
    const char *name;           /* type: "serial", "virtio-blk", … */
    uint32_t version;           /* of the saved section; raise it when fields change meaning */
    /* Back to power-on state; also before the first run. */
    void (*reset)(struct device *);
    /*
     * Drain I/O: after it returned 0 the device changes neither its state nor guest memory until
     * resume. May release and retake the machine lock while it waits. NULL: nothing to drain.
     */
    int (*pause)(struct device *);
    int (*resume)(struct device *);
    void (*save)(struct device *, struct state_writer *);
    /* -EINVAL (logged) for values no device can have; the device may then be in any state that is safe. */
    int (*load)(struct device *, const struct state_reader *);
    void (*destroy)(struct device *);   /* frees the device */
    /* For people: what the device has done since it was made, as calls of put(). NULL: nothing is counted. */
    void (*figures)(struct device *, void (*put)(void *opaque, const char *name, uint64_t value), void *opaque);
};

struct device {
    const struct device_ops *ops;
    char id[32];                /* unique in the machine: "serial0", "virtio-blk1" */
    struct device *next;        /* machine's list */
};

#endif
