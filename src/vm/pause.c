/*
 * Stopping and starting the guest, for whoever has a reason: the user, a snapshot, an engine switch, a migration.
 *
 * The machine runs while nobody holds it. The first hold stops the vCPUs, then the devices (which finish what they
 * have begun and may raise interrupts by that), then the clock; the last one that goes starts them the other way
 * round. The guest's TSC stands still together with the clock, so that its clock sources agree with each other
 * after the pause, and clock pages written before it stay true.
 *
 * Any thread but a vCPU's; vm_internal.h has the order of locks.
 */
#include <errno.h>

#include "base/clock.h"
#include "base/log.h"
#include "vm/vm_internal.h"

void vm_stop_vcpus(struct vm *vm)
{
    pthread_mutex_lock(&vm->gate);
    vm->paused = true;
    for (unsigned i = 0; i < vm->cpus; i++)
        vm->engine->kick(&vm->vcpus[i].vcpu);
    for (unsigned i = 0; i < vm->cpus; i++)
        while (vm->vcpus[i].running)
            pthread_cond_wait(&vm->gate_changed, &vm->gate);
    pthread_mutex_unlock(&vm->gate);
}

void vm_start_vcpus(struct vm *vm)
{
    pthread_mutex_lock(&vm->gate);
    if (!vm->holds && !vm->ended && !vm->reset_wanted) {
        vm->paused = false;
        pthread_cond_broadcast(&vm->gate_changed);
    }
    pthread_mutex_unlock(&vm->gate);
}

/* Moves the guest's TSC by so many ticks. vCPUs stopped. */
static void shift_tsc(struct vm *vm, uint64_t ticks)
{
    for (unsigned i = 0; i < vm->cpus; i++) {
        struct vcpu *v = &vm->vcpus[i].vcpu;
        struct x86_state state;

        if (vm->engine->shift_tsc) {
            vm->engine->shift_tsc(v, ticks);
            continue;
        }
        vm->engine->export_state(v, &state);
        state.tsc_offset += ticks;
        vm->engine->import_state(v, &state);
    }
}

/* life held. */
static int quieten(struct vm *vm)
{
    int err;

    vm_stop_vcpus(vm);
    pthread_mutex_lock(&vm->machine.lock);
    err = machine_pause_devices(&vm->machine);
    if (!err) {
        clock_pause(vm->machine.clock);
        vm->quiet_tsc = tsc_read();
        vm->quiet = true;
    }
    pthread_mutex_unlock(&vm->machine.lock);
    return err;
}

/* life held. */
static int wake(struct vm *vm)
{
    int err;

    pthread_mutex_lock(&vm->machine.lock);
    if (!clock_is_manual(vm->machine.clock))
        shift_tsc(vm, vm->quiet_tsc - tsc_read());
    clock_resume(vm->machine.clock);
    err = machine_resume_devices(&vm->machine);
    vm->quiet = false;
    pthread_mutex_unlock(&vm->machine.lock);
    return err;
}

/* life held. */
static void set_holds(struct vm *vm, unsigned holds)
{
    pthread_mutex_lock(&vm->gate);
    vm->holds = holds;
    pthread_mutex_unlock(&vm->gate);
}

/* life held. */
static void tell(struct vm *vm, unsigned before)
{
    if (vm->holds != before)
        vm_notify(vm, VM_NOTICE_STATE, 0);
}

int vm_pause(struct vm *vm, enum vm_hold hold)
{
    int err = 0;

    pthread_mutex_lock(&vm->life);
    if (vm_ended(vm, NULL, NULL)) {
        err = -ESHUTDOWN;
    } else {
        unsigned before = vm->holds;

        /* Before the vCPUs stop, so that nothing starts them again in between. */
        set_holds(vm, before | hold);
        if (!vm->quiet)
            err = quieten(vm);
        if (err) {
            set_holds(vm, before);
            vm_start_vcpus(vm);
        }
        tell(vm, before);
    }
    pthread_mutex_unlock(&vm->life);
    return err;
}

int vm_resume(struct vm *vm, enum vm_hold hold)
{
    int err = 0;

    pthread_mutex_lock(&vm->life);
    unsigned before = vm->holds;
    set_holds(vm, before & ~(unsigned)hold);
    if (!vm->holds && vm->quiet) {
        err = wake(vm);
        vm_start_vcpus(vm);
    }
    tell(vm, before);
    pthread_mutex_unlock(&vm->life);
    return err;
}

unsigned vm_holds(struct vm *vm)
{
    pthread_mutex_lock(&vm->gate);
    unsigned holds = vm->holds;
    pthread_mutex_unlock(&vm->gate);
    return holds;
}
