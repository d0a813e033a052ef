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

void vm_get_hardware(struct vm *vm, struct vm_hardware *hw)
{
    for (unsigned i = 0; i < vm->cpus; i++)
        hw->vcpus[i] = &vm->vcpus[i].vcpu;
    hw->machine = &vm->machine;
    hw->engine = vm->engine;
    hw->cpus = vm->cpus;
    hw->model = vm->model;
    hw->tsc_hz = vm->parts.board.tsc_hz;
    hw->config = NULL;
}

/* life held. */
static int quieten(struct vm *vm)
{
    struct vm_hardware hw;
    int err;

    vm_stop_vcpus(vm);
    pthread_mutex_lock(&vm->machine.lock);
    err = machine_pause_devices(&vm->machine);
    if (!err) {
        vm_get_hardware(vm, &hw);
        vm_stand_still(&hw, &vm->still);
        vm->quiet = true;
    }
    pthread_mutex_unlock(&vm->machine.lock);
    return err;
}

/* life held. */
static int wake(struct vm *vm)
{
    struct vm_hardware hw;
    int err;

    pthread_mutex_lock(&vm->machine.lock);
    vm_get_hardware(vm, &hw);
    vm_go_on(&hw, &vm->still);
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
