/*
 * A machine's life: threads, pause, reset, end.
 *
 * The caller of vm_run() runs the event loop; each vCPU has a thread that runs its engine until it is kicked. What
 * ends or restarts the machine comes in through vm_event() from any thread and is dealt with in the
 * event loop by settle(), where all vCPUs can be stopped.
 */
#include "vm/vm.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/signalfd.h>
#include <time.h>
#include <unistd.h>

#include "backend/console/console.h"
#include "base/log.h"
#include "base/util.h"
#include "board/pc/pc.h"
#include "device/machine.h"
#include "device/power.h"
#include "engine/engine.h"
#include "engine/interp/trace.h"
#include "engine/soft.h"
#include "isa/x86/cpuid.h"
#include "migrate/migrate.h"
#include "vm/config.h"
#include "vm/snapshot_fill.h"
#include "vm/stats.h"
#include "vm/status.h"
#include "vm/vm_internal.h"

/* A guest that crashes so often, each time so soon after its start, is beyond help by a reset. */
#define MAX_QUICK_CRASHES 5
#define QUICK_CRASH_NS 10000000000u

/* ---- vCPU threads ---- */

static void *vcpu_main(void *opaque)
{
    struct vm_vcpu *v = opaque;
    struct vm *vm = v->vm;
    struct timespec used;

    for (;;) {
        enum vm_exit exit;

        pthread_mutex_lock(&vm->gate);
        while (vm->paused && !vm->ending)
            pthread_cond_wait(&vm->gate_changed, &vm->gate);
        v->running = !vm->ending;
        pthread_mutex_unlock(&vm->gate);
        if (!v->running)
            break;

        exit = vm->engine->run(&v->vcpu);

        if (exit != VM_EXIT_KICK) {
            vm->crash = exit == VM_EXIT_ERROR ? "its engine cannot go on" : "triple fault";
            machine_raise(&vm->machine, MACHINE_CRASH, 0);
        }
        pthread_mutex_lock(&vm->gate);
        v->running = false;
        /* After a crash this vCPU has nothing to run until settle() has reset it or ended the machine. */
        if (exit != VM_EXIT_KICK)
            vm->paused = true;
        pthread_cond_broadcast(&vm->gate_changed);
        pthread_mutex_unlock(&vm->gate);
    }
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &used);
    v->cpu_ns = (uint64_t)used.tv_sec * 1000000000u + (uint64_t)used.tv_nsec;
    return NULL;
}

/* ---- guest start ---- */

/* Puts kernel and tables into memory and the vCPUs into their first state. vCPUs stopped, lock held. */
static int prepare_guest(struct vm *vm)
{
    struct x86_entry entry;
    int err = pc_load_kernel(&vm->pc, &vm->parts.board, &entry);

    if (err)
        return err;
    for (unsigned i = 0; i < vm->cpus; i++) {
        struct x86_state state;

        x86_state_reset(&state, i == 0);
        if (i == 0)
            pc_entry_state(&state, &entry);
        vm->engine->import_state(&vm->vcpus[i].vcpu, &state);
    }
    return 0;
}

/* ---- events ---- */

/* Whether a crash resets the guest or ends the run. Gate held. */
static bool survives_crash(struct vm *vm)
{
    bool quick = clock_now(vm->machine.clock) - vm->started_ns < QUICK_CRASH_NS;

    vm->quick_crashes = quick ? vm->quick_crashes + 1 : 1;
    if (vm->config->on_crash == VM_ON_CRASH_EXIT) {
        log_warn("the guest crashed (%s); leaving", vm->crash);
        return false;
    }
    if (vm->quick_crashes >= MAX_QUICK_CRASHES) {
        log_warn("the guest crashed (%s) %u times in a row soon after its start; leaving", vm->crash, vm->quick_crashes);
        return false;
    }
    log_warn("the guest crashed (%s); resetting it", vm->crash);
    return true;
}

/* Any thread, machine lock held or not. */
static void vm_event(void *opaque, enum machine_event event, int status)
{
    static const char *const causes[] = {[MACHINE_POWEROFF] = "poweroff",
                                         [MACHINE_EXIT] = "exit",
                                         [MACHINE_CRASH] = "crash",
                                         [MACHINE_BACKEND_FAILED] = "backend"};
    struct vm *vm = opaque;
    bool reset, ends = false;

    if (event == MACHINE_CRASH)
        vm_notify(vm, VM_NOTICE_CRASH, 0);
    pthread_mutex_lock(&vm->gate);
    reset = event == MACHINE_RESET || (event == MACHINE_CRASH && survives_crash(vm));
    if (reset) {
        vm->reset_wanted = true;
    } else if (!vm->ended) {
        ends = true;
        vm->ended = true;
        vm->cause = causes[event];
        vm->status = event == MACHINE_POWEROFF         ? VM_STATUS_POWEROFF
                     : event == MACHINE_EXIT           ? status
                     : event == MACHINE_BACKEND_FAILED ? VM_STATUS_BACKEND
                                                       : VM_STATUS_CRASH;
    }
    /* Whoever asked for it does not run on. */
    vm->paused = true;
    for (unsigned i = 0; i < vm->cpus; i++)
        vm->engine->kick(&vm->vcpus[i].vcpu);
    pthread_mutex_unlock(&vm->gate);
    loop_schedule(vm->machine.loop, &vm->settle);
    if (ends)
        vm_notify(vm, VM_NOTICE_ENDED, vm->status);
}

void vm_end(struct vm *vm, int status)
{
    vm_end_because(vm, status, status == VM_STATUS_USER ? "user" : "error");
}

void vm_end_because(struct vm *vm, int status, const char *cause)
{
    bool ends;

    pthread_mutex_lock(&vm->gate);
    ends = !vm->ended;
    if (ends) {
        vm->ended = true;
        vm->status = status;
        vm->cause = cause;
    }
    pthread_mutex_unlock(&vm->gate);
    /* vCPUs may wait for memory that is not here yet, and would keep the machine from ending. */
    if (ends && vm->incoming)
        migrate_target_cancel(vm->incoming);
    loop_schedule(vm->machine.loop, &vm->settle);
    if (ends)
        vm_notify(vm, VM_NOTICE_ENDED, status);
}

bool vm_ended(struct vm *vm, int *status, const char **cause)
{
    pthread_mutex_lock(&vm->gate);
    bool ended = vm->ended;
    if (ended && status)
        *status = vm->status;
    if (ended && cause)
        *cause = vm->cause;
    pthread_mutex_unlock(&vm->gate);
    return ended;
}

void vm_set_observer(struct vm *vm, void (*fn)(void *opaque, enum vm_notice what, int status), void *opaque)
{
    pthread_mutex_lock(&vm->gate);
    vm->observer = fn;
    vm->observer_opaque = opaque;
    pthread_mutex_unlock(&vm->gate);
}

void vm_notify(struct vm *vm, enum vm_notice what, int status)
{
    pthread_mutex_lock(&vm->gate);
    void (*fn)(void *, enum vm_notice, int) = vm->observer;
    void *opaque = vm->observer_opaque;
    pthread_mutex_unlock(&vm->gate);
    if (fn)
        fn(opaque, what, status);
}

void vm_press_button(struct vm *vm)
{
    pthread_mutex_lock(&vm->machine.lock);
    power_press_button(vm->pc.power);
    pthread_mutex_unlock(&vm->machine.lock);
}

struct console *vm_console(struct vm *vm)
{
    if (vm->parts.serial && console_history(vm->parts.serial))
        return vm->parts.serial;
    for (unsigned i = 0; i < vm->parts.board.console_count; i++)
        if (console_history(vm->parts.consoles[i]))
            return vm->parts.consoles[i];
    return NULL;
}

/* Resets the guest. vCPUs stopped, life and machine lock held. */
static void reset_guest(struct vm *vm)
{
    int err;

    machine_reset_devices(&vm->machine);
    err = prepare_guest(vm);
    if (err) {
        vm_end(vm, vm_status_of(err));
        return;
    }
    pthread_mutex_lock(&vm->gate);
    vm->started_ns = clock_now(vm->machine.clock);
    pthread_mutex_unlock(&vm->gate);
    vm_notify(vm, VM_NOTICE_RESET, 0);
    /* A machine that somebody holds is reset, too, and waits at its first instruction. */
    vm_start_vcpus(vm);
}

/* Loop thread, machine lock held. */
static void settle(void *opaque)
{
    struct vm *vm = opaque;
    bool ended, reset;

    pthread_mutex_unlock(&vm->machine.lock);
    pthread_mutex_lock(&vm->life);
    vm_stop_vcpus(vm);
    pthread_mutex_lock(&vm->machine.lock);

    pthread_mutex_lock(&vm->gate);
    ended = vm->ended;
    reset = vm->reset_wanted;
    vm->reset_wanted = false;
    pthread_mutex_unlock(&vm->gate);
    if (ended)
        loop_stop(vm->machine.loop);
    else if (reset)
        reset_guest(vm);
    else
        vm_start_vcpus(vm);
    pthread_mutex_unlock(&vm->life);
}

static void on_escape(void *opaque) { vm_end(opaque, VM_STATUS_USER); }

/* The first signal asks the guest to shut down, the next one does not ask. */
static void on_signal(void *opaque, int fd, short revents)
{
    struct vm *vm = opaque;
    struct signalfd_siginfo info;

    while (read(fd, &info, sizeof(info)) == (ssize_t)sizeof(info)) {
        if (vm->button_pressed) {
            log_warn("signal %u again: leaving at once", info.ssi_signo);
            vm_end(vm, VM_STATUS_USER);
        } else {
            log_warn("signal %u: pressing the guest's power button; another one leaves at once", info.ssi_signo);
            vm->button_pressed = true;
            power_press_button(vm->pc.power);
        }
    }
}

int vm_signals_open(void)
{
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGHUP);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    return signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
}

static int watch_signals(struct vm *vm)
{
    vm->signal_fd = vm_signals_open();
    if (vm->signal_fd < 0) {
        log_error("cannot watch for signals: %s", strerror(errno));
        return -errno;
    }
    vm->signals = loop_fd_add(vm->machine.loop, vm->signal_fd, POLLIN, on_signal, vm);
    return vm->signals ? 0 : -ENOMEM;
}

static void on_code_written(void *opaque, gpa_t page)
{
    struct vm *vm = opaque;

    for (unsigned i = 0; i < vm->cpus; i++)
        vm->engine->code_written(&vm->vcpus[i].vcpu, page);
}

static void on_lapic(void *opaque, enum lapic_signal signal, unsigned value)
{
    struct vm_vcpu *v = opaque;

    v->vm->engine->signal(&v->vcpu, signal, value);
}

/* ---- making and ending ---- */

/* The named model; without what a guest that comes from elsewhere was not shown there, if anything. */
static const struct x86_cpu_model *known_to_guest(struct vm *vm, const struct x86_cpu_model *named)
{
    const struct vm_config *c = vm->config;
    const char *missing;

    if (!c->cpuid)
        return named;
    vm->own_model = x86_cpu_model_restrict(named, c->cpuid, c->cpuid_count, &missing);
    /* Whether it is the same in all is checked when the state is loaded. */
    return vm->own_model && x86_cpu_model_lacks(vm->own_model, named) ? vm->own_model : named;
}

static int choose(struct vm *vm)
{
    const struct vm_config *c = vm->config;
    const char *missing;
    int err;

    translate_options = c->translate;
    err = trace_open(&(struct trace_options){c->trace_exec, c->trace_registers, c->trace_size, c->trace_files});
    if (err)
        return err;
    vm->engine = strcmp(c->engine, "auto") == 0 ? engine_choose() : engine_find(c->engine);
    vm->model = x86_cpu_model_find(c->cpu_model);
    if (!vm->engine || !vm->model) {
        log_error("engine '%s' or CPU model '%s' is not known", c->engine, c->cpu_model);
        return -EINVAL;
    }
    vm->model = known_to_guest(vm, vm->model);
    const struct x86_cpu_model *offered = engine_offer(vm->engine, vm->model, c->cpuid != NULL, &missing);
    struct engine_report report;
    if (!offered && (vm->engine->probe(&report), !report.usable)) {
        log_error("engine %s cannot run here: %s", vm->engine->name, report.text);
        return -ENOSYS;
    }
    if (!offered && c->cpuid) {
        log_error("engine %s cannot show the guest the processor that it was started with (%s): it lacks %s; use another --engine",
                  vm->engine->name, vm->model->name, missing);
        return -ENOSYS;
    }
    if (!offered) {
        log_error("engine %s cannot run CPU model %s on this host: it lacks %s; use a smaller --cpu-model, or host",
                  vm->engine->name, vm->model->name, missing);
        return -ENOSYS;
    }
    vm->model = offered;
    x86_cpu_model_select(vm->model);
    return 0;
}

static int make_vcpus(struct vm *vm)
{
    vm->vcpus = calloc(vm->config->cpus, sizeof(*vm->vcpus));
    vm->group = soft_group_create(&vm->machine);
    if (!vm->vcpus || !vm->group)
        return -ENOMEM;
    for (unsigned i = 0; i < vm->config->cpus; i++) {
        struct vm_vcpu *v = &vm->vcpus[i];
        int err;

        v->vm = vm;
        v->vcpu = (struct vcpu){ .machine = &vm->machine, .lapic = irqchip_lapic(vm->pc.irqchip, i),
                                 .model = vm->model, .index = i, .count = vm->config->cpus, .group = vm->group,
                                 .tsc_hz = vm->parts.board.tsc_hz, .engine = vm->engine };
        err = vm->engine->vcpu_create(&v->vcpu);
        if (err)
            return err;
        vm->cpus++;
        lapic_connect(v->vcpu.lapic, on_lapic, v);
    }
    return 0;
}

/* empty: without a guest, for a state that was saved with this rate of the TSC. */
static int start(struct vm *vm, bool empty, uint64_t saved_tsc_hz)
{
    const struct vm_config *c = vm->config;
    int err = choose(vm);

    if (!err)
        err = machine_init(&vm->machine, false);
    if (err)
        return err;
    vm->machine.event = vm_event;
    vm->machine.event_opaque = vm;
    err = watch_signals(vm);
    if (!err && c->stats) {
        err = vm_stats_create(vm->machine.loop, c->stats, &vm->stats);
        if (!err)
            vm_stats_set_engine(vm->stats, vm->engine->name);
    }
    if (err)
        return err;
    err = vm_parts_open(&vm->parts, c, &vm->machine);
    if (err)
        return err;
    vm->parts_open = true;
    /* What a saved guest knows stays as it is. */
    vm->parts.board.tsc_hz = saved_tsc_hz ? saved_tsc_hz : tsc_frequency_hz();
    err = vm_parts_build(&vm->parts, &vm->machine, &vm->pc);
    if (!err)
        err = make_vcpus(vm);
    if (err)
        return err;
    vm->machine.memory.code_written = on_code_written;
    vm->machine.memory.code_written_opaque = vm;
    pthread_mutex_lock(&vm->machine.lock);
    machine_reset_devices(&vm->machine);
    if (!empty)
        err = prepare_guest(vm);
    pthread_mutex_unlock(&vm->machine.lock);
    if (!err)
        vm_parts_set_escape(&vm->parts, on_escape, vm);
    return err;
}

static struct vm *create(const struct vm_config *config, bool empty, uint64_t saved_tsc_hz, int *status)
{
    struct vm *vm = calloc(1, sizeof(*vm));
    int err;

    if (!vm) {
        log_error("out of memory");
        *status = VM_STATUS_HOST;
        return NULL;
    }
    vm->config = config;
    vm->signal_fd = -1;
    vm->settle = (struct loop_call){ .fn = settle, .opaque = vm };
    pthread_mutex_init(&vm->life, NULL);
    pthread_mutex_init(&vm->gate, NULL);
    pthread_cond_init(&vm->gate_changed, NULL);
    err = start(vm, empty, saved_tsc_hz);
    *status = vm_status_of(err);
    if (err) {
        vm_destroy(vm);
        return NULL;
    }
    return vm;
}

struct vm *vm_create(const struct vm_config *config, int *status) { return create(config, false, 0, status); }

struct vm *vm_create_empty(const struct vm_config *config, uint64_t tsc_hz, enum vm_hold hold, int *status)
{
    struct vm *vm = create(config, true, tsc_hz, status);
    int err;

    if (!vm)
        return NULL;
    err = vm_pause(vm, hold);
    if (err) {
        *status = vm_status_of(err);
        vm_destroy(vm);
        return NULL;
    }
    return vm;
}

struct device_figures {
    struct vm_stats *stats;
    const char *id;
};

static void add_device_figure(void *opaque, const char *name, uint64_t value)
{
    const struct device_figures *f = opaque;
    char path[128];

    snprintf(path, sizeof(path), "devices/%s/%s", f->id, name);
    vm_stats_add(f->stats, path, value);
}

static void add_devices(struct vm *vm)
{
    for (struct device *d = vm->machine.devices; d; d = d->next)
        if (d->ops->figures)
            d->ops->figures(d, add_device_figure, &(struct device_figures){vm->stats, d->id});
}

static void add_figures(struct vm *vm)
{
    struct machine *m = &vm->machine;
    int err;

    if (!vm->stats)
        return;
    for (unsigned i = 0; i < vm->cpus; i++) {
        struct engine_counters counters;

        vm->engine->counters(&vm->vcpus[i].vcpu, &counters);
        vm_stats_add_vcpu(vm->stats, &counters, vm->vcpus[i].cpu_ns);
    }
    add_devices(vm);
    vm_stats_add(vm->stats, "devices/ports/reads", m->ports.reads);
    vm_stats_add(vm->stats, "devices/ports/writes", m->ports.writes);
    vm_stats_add(vm->stats, "devices/mmio/reads", m->mmio.reads);
    vm_stats_add(vm->stats, "devices/mmio/writes", m->mmio.writes);
    /* Whoever asked for the figures cannot do without them. */
    err = vm_stats_write(vm->stats);
    if (err && vm->status == VM_STATUS_POWEROFF)
        vm->status = vm_status_of(err);
}

int vm_start(struct vm *vm)
{
    for (unsigned i = 0; i < vm->cpus; i++) {
        struct vm_vcpu *v = &vm->vcpus[i];
        int err = v->started ? 0 : -pthread_create(&v->thread, NULL, vcpu_main, v);

        if (err) {
            log_error("cannot start a thread for vCPU %u: %s", i, strerror(-err));
            return err;
        }
        pthread_mutex_lock(&vm->gate);
        v->started = true;
        pthread_mutex_unlock(&vm->gate);
    }
    return 0;
}

static void join_vcpus(struct vm *vm)
{
    pthread_mutex_lock(&vm->gate);
    vm->ending = true;
    for (unsigned i = 0; i < vm->cpus; i++)
        vm->engine->kick(&vm->vcpus[i].vcpu);
    pthread_cond_broadcast(&vm->gate_changed);
    pthread_mutex_unlock(&vm->gate);
    for (unsigned i = 0; i < vm->cpus; i++)
        if (vm->vcpus[i].started)
            pthread_join(vm->vcpus[i].thread, NULL);
    for (unsigned i = 0; i < vm->cpus; i++)
        vm->vcpus[i].started = false;
}

int vm_run(struct vm *vm)
{
    int err = vm_start(vm);

    if (!err)
        err = loop_run(vm->machine.loop);
    if (err)
        vm_end(vm, VM_STATUS_HOST);
    join_vcpus(vm);
    add_figures(vm);
    return vm->status;
}

void vm_destroy(struct vm *vm)
{
    if (!vm)
        return;
    vm_snapshot_drain(vm);
    join_vcpus(vm); /* after vm_start() without vm_run() */
    vm_stats_destroy(vm->stats);
    for (unsigned i = 0; i < vm->cpus; i++) {
        lapic_connect(vm->vcpus[i].vcpu.lapic, NULL, NULL);
        vm->engine->vcpu_destroy(&vm->vcpus[i].vcpu);
    }
    trace_close();
    free(vm->vcpus);
    soft_group_destroy(vm->group);
    loop_fd_remove(vm->signals);
    if (vm->signal_fd >= 0)
        close(vm->signal_fd);
    if (vm->parts_open) {
        machine_destroy_devices(&vm->machine);
        vm_parts_close(&vm->parts);
    }
    snapshot_fill_destroy(vm->fill);
    if (vm->machine.loop)
        machine_destroy(&vm->machine);
    pthread_mutex_destroy(&vm->life);
    pthread_mutex_destroy(&vm->gate);
    pthread_cond_destroy(&vm->gate_changed);
    x86_cpu_model_free(vm->own_model);
    free(vm);
}
