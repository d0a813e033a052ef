/*
 * The machine as devices see it: the things a device may need from around it.
 *
 * struct vm (vm/vm.h) embeds one; the device test harness makes one without vCPUs. A
 * device gets a struct machine* when it is made and keeps it.
 */
#ifndef RINGFORT_DEVICE_MACHINE_H
#define RINGFORT_DEVICE_MACHINE_H

#include <pthread.h>

#include "base/clock.h"
#include "base/loop.h"
#include "device/bus.h"
#include "device/device.h"
#include "device/irq.h"
#include "memory/memory.h"

enum machine_event {
    MACHINE_POWEROFF,           /* the guest powered off: S5 */
    MACHINE_RESET,              /* the guest asked for a reset */
    MACHINE_EXIT,               /* isa-debug-exit: leave with the given status */
    MACHINE_CRASH,              /* triple fault, or a guest state beyond continuing */
    MACHINE_BACKEND_FAILED,     /* a backend failed for good */
};

struct machine {
    pthread_mutex_t lock;       /* "the machine lock": devices, buses, interrupt wiring */
    struct memory memory;
    struct bus ports, mmio;
    struct irq_router irq;      /* filled in by the irqchip */
    struct loop *loop;          /* uses lock */
    struct clock *clock;
    struct device *devices;     /* list in order of creation */
    struct device **devices_tail;
    /* A thing that ends or restarts the run. Any thread; returns at once. status: MACHINE_EXIT's. */
    void (*event)(void *opaque, enum machine_event event, int status);
    void *event_opaque;
};

/* manual_clock: for device tests. 0 or a negative errno (logged). */
int machine_init(struct machine *m, bool manual_clock);
/* Destroys the devices, last first: the backends can be closed then, while their loop still is. */
void machine_destroy_devices(struct machine *m);
/* Destroys the devices that are left, then the rest. */
void machine_destroy(struct machine *m);

/* Sets dev->ops and a unique id (ops->name + a number), and puts it into the list. */
void machine_add_device(struct machine *m, struct device *dev, const struct device_ops *ops);
struct device *machine_find_device(struct machine *m, const char *id);
/* All devices, in order. Lock held. pause: the first error stops and resumes those already paused. */
void machine_reset_devices(struct machine *m);
int machine_pause_devices(struct machine *m);
int machine_resume_devices(struct machine *m);
void machine_save_devices(struct machine *m, struct state_writer *w);
int machine_load_devices(struct machine *m, const struct state_reader *r);

static inline void machine_raise(struct machine *m, enum machine_event event, int status)
{
    m->event(m->event_opaque, event, status);
}

#endif
