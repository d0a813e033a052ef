/*
 * The inside of a virtual machine, for the files of src/vm that work on the whole of it: vm.c (life), pause.c,
 * and what saves, switches or moves machines. Users outside include vm/vm.h.
 *
 * Locks, in the order in which they are taken:
 *   life           whether the guest may run at all: holds, quiet. Held for as long as stopping or starting takes.
 *   machine.lock   devices, buses, interrupt wiring, the clock's standing still
 *   gate           what vCPU threads look at between two runs, and what has happened to the machine
 * A callback of the event loop has machine.lock already: it gives it up before it takes life, as settle() does.
 */
#ifndef RINGFORT_VM_INTERNAL_H
#define RINGFORT_VM_INTERNAL_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "board/pc/pc.h"
#include "device/machine.h"
#include "engine/engine.h"
#include "vm/parts.h"
#include "vm/state.h"
#include "vm/vm.h"

struct control;
struct vm_stats;

struct vm_vcpu {
    struct vcpu vcpu;
    struct vm *vm;
    pthread_t thread;
    bool started;
    bool running;               /* inside the engine; guarded by vm->gate */
    uint64_t cpu_ns;            /* the thread's CPU time, once it ended */
    uint64_t native_cpu_ns;     /* CPU time of processes that engines before this one ran its user code in */
};

struct vm {
    const struct vm_config *config;
    struct machine machine;
    struct vm_parts parts;
    struct pc pc;
    struct soft_group *group;
    const struct engine *engine;
    const struct x86_cpu_model *model;
    struct x86_cpu_model *own_model;    /* NULL, or the model, made for this machine alone */
    struct vm_vcpu *vcpus;
    unsigned cpus;              /* vCPUs created */
    struct vm_stats *stats;
    struct loop_fd *signals;
    int signal_fd;
    bool parts_open;
    bool button_pressed;

    pthread_mutex_t life;
    unsigned holds;             /* VM_HOLD_*; written under life and gate, so either is enough to read */
    bool quiet;                 /* vCPUs out of their engines, devices and clock stand still; guarded by life */
    struct vm_standstill still; /* while quiet: where the clocks stood */

    /* The gate that vCPU threads pass before they run the guest. */
    pthread_mutex_t gate;
    pthread_cond_t gate_changed;
    bool paused, ending;        /* guarded by gate */

    struct migrate_target *incoming; /* the migration that brings the machine here; set before vm_run(), borrowed */
    bool undecided;             /* a migration away ended without it being known who has the machine; guarded by life */

    struct snapshot_fill *fill; /* brings RAM out of a compressed snapshot; NULL: nothing does */
    bool saving;                /* a snapshot is being saved; guarded by gate */
    _Atomic bool save_cancelled;

    /* What happened, from any thread; guarded by gate. */
    struct loop_call settle;
    bool ended, reset_wanted;
    int status;
    const char *cause;          /* of the end, see vm_ended() */
    void (*observer)(void *opaque, enum vm_notice what, int status);
    void *observer_opaque;
    uint64_t started_ns;        /* guest clock at the last (re)start of the guest */
    unsigned quick_crashes;     /* in a row */
    const char *_Atomic crash;  /* what the last one was, for people */
};

/*
 * Stops all vCPUs and waits until none is in its engine. life held, machine lock not held: a vCPU may need that one to
 * get out.
 */
void vm_stop_vcpus(struct vm *vm);
/* The configuration as JSON, with absolute names of files. NULL (logged). */
char *vm_config_text(const struct vm_config *c);
/* vm_end() with the cause for vm_ended(), which is static. */
void vm_end_because(struct vm *vm, int status, const char *cause);
/*
 * Waits until no page of RAM is missing (memory/missing.h), for who does not get at it by touching. 0; -ECANCELED: *cancel is true;
 * -ESHUTDOWN: the machine ends (both silent). cancel may be NULL. Any thread that may wait.
 */
int vm_await_memory(struct vm *vm, const _Atomic bool *cancel);
/* Waits until no snapshot is being saved. */
void vm_snapshot_drain(struct vm *vm);
/* vm_save() with life and the machine lock held. */
int vm_save_held(struct vm *vm, struct state_writer *w);
/* What of the machine has state; without its configuration. */
void vm_get_hardware(struct vm *vm, struct vm_hardware *hw);
/* Lets them run again, unless something holds the machine or an event waits for settle(). life held. */
void vm_start_vcpus(struct vm *vm);
/* Tells the observer. Gate not held. */
void vm_notify(struct vm *vm, enum vm_notice what, int status);

#endif
