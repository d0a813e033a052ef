/*
 * A virtual machine's life: made from a configuration, run, reset, ended.
 *
 * vm_run() is the event loop's thread; each vCPU has a thread of its own.
 */
#ifndef RINGFORT_VM_VM_H
#define RINGFORT_VM_VM_H

#include <stdbool.h>
#include <stdint.h>

struct console;
struct vm;
struct vm_config;

/* Exit statuses of the command (also of vm_create through *status). */
enum vm_status {
    VM_STATUS_POWEROFF = 0,
    VM_STATUS_USER = 1,         /* the user ended the run while the guest was running */
    VM_STATUS_USAGE = 2,        /* bad usage or configuration */
    VM_STATUS_HOST = 3,         /* the host lacks something */
    VM_STATUS_CRASH = 4,        /* the guest crashed beyond continuing */
    VM_STATUS_BACKEND = 5,      /* a backend failed for good */
};

/* NULL on failure (logged), with the exit status that fits in *status. config is borrowed until vm_destroy(). */
struct vm *vm_create(const struct vm_config *config, int *status);
/*
 * SIGTERM, SIGINT and SIGHUP are read from the descriptor (signalfd, nonblocking) from here on, and not delivered to this thread or
 * those it starts. Negative with errno (silent). vm_create() does this for the machine's run.
 */
int vm_signals_open(void);
/* Starts the vCPUs' threads, so that what can go wrong with that is known before vm_run(). 0 or a negative errno (logged). */
int vm_start(struct vm *vm);
/* vm_start() unless that was done, then runs until the guest powers off, crashes, or the user leaves. Returns the exit status. */
int vm_run(struct vm *vm);
void vm_destroy(struct vm *vm);

struct engine;
struct state_reader;
struct state_writer;

/*
 * The state of everything but RAM (vm/state.h; docs/state.md has the sections). Both while the caller holds the machine
 * (vm_pause()); any thread, machine lock not held.
 * vm_save: 0, or -ENOMEM (logged). vm_load: into a machine of vm_create_empty() or any other of the same configuration, whose
 * RAM has its contents already. 0, or -EINVAL (logged); the machine may then only be ended.
 */
int vm_save(struct vm *vm, struct state_writer *w);
int vm_load(struct vm *vm, const struct state_reader *r);

/*
 * Goes on with another engine; the guest does not notice. Any thread but a vCPU's, machine lock not held. *pause_ns
 * (may be NULL): how long the guest stood still. 0; -ENOSYS when the engine cannot run here, or its other error
 * (logged): the machine goes on as it was.
 */
int vm_set_engine(struct vm *vm, const struct engine *engine, uint64_t *pause_ns);

/* Ends the run as soon as may be, with this exit status (the first one given counts). Any thread, machine lock held or not. */
void vm_end(struct vm *vm, int status);

/* Whether the run has ended or is ending; then its exit status and what ended it ("poweroff", "crash", "exit", "backend",
 * "user", "migrated", "error"; static), each unless NULL. Any thread. */
bool vm_ended(struct vm *vm, int *status, const char **cause);
/* Presses the guest's power button. Any thread, machine lock not held. */
void vm_press_button(struct vm *vm);
/* The console that people mean: the serial port's, or the first virtio console's where that one has none; NULL: there is none. */
struct console *vm_console(struct vm *vm);

/* What happens in a machine's life, for who follows it. */
enum vm_notice {
    VM_NOTICE_STATE,            /* it is held by others than before: paused, or runs */
    VM_NOTICE_RESET,            /* the guest begins anew */
    VM_NOTICE_CRASH,            /* a triple fault */
    VM_NOTICE_ENDED,            /* with this exit status */
};
/*
 * fn runs in whatever thread it happens in and whatever locks are held there: quick, and without locks that are held
 * around functions of this header. Set before vm_run(); NULL after it.
 */
void vm_set_observer(struct vm *vm, void (*fn)(void *opaque, enum vm_notice what, int status), void *opaque);

/* Who wants the guest to stand still. Each holds the machine for itself; it runs while nobody does. */
enum vm_hold {
    VM_HOLD_USER = 1 << 0,      /* the verb pause */
    VM_HOLD_SAVE = 1 << 1,      /* a snapshot is taken or restored */
    VM_HOLD_ENGINE = 1 << 2,    /* the engine is exchanged */
    VM_HOLD_MIGRATE = 1 << 3,   /* the machine's state is on its way to or from another host */
};

/*
 * vm_pause() returns when no vCPU is in its engine, the devices have finished what they had begun and change nothing
 * any more (neither their state nor guest memory), and the clock and the guest's TSC stand still. Then the engine's
 * export_state() and import_state(), machine_save_devices() and machine_load_devices() (machine lock held) and
 * clock_set() may be used until vm_resume(). Before vm_run() it makes the machine begin paused.
 *
 * Any thread but a vCPU's. Machine lock not held: a callback of the event loop gives it up around the call. Both are
 * idempotent for each holder, and calls of several threads wait for each other. A guest that resets itself or
 * crashes just before is reset while it is held, and ends as it would otherwise.
 *
 * vm_pause: 0, -ESHUTDOWN (silent; the machine has ended: not held), or a device's error (logged; not held, runs on).
 * vm_resume: 0, or the first device's error (logged); the machine runs either way.
 */
int vm_pause(struct vm *vm, enum vm_hold hold);
int vm_resume(struct vm *vm, enum vm_hold hold);
/*
 * As vm_create(), for vm_load(): without a guest, and held. tsc_hz: the rate that the state's guest knows (vm_state_peek()).
 */
struct vm *vm_create_empty(const struct vm_config *config, uint64_t tsc_hz, enum vm_hold hold, int *status);
/* The holds there are now; 0: the guest runs. Any thread. */
unsigned vm_holds(struct vm *vm);

#endif
