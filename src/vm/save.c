/*
 * Saving and loading a virtual machine that stands still, and changing its engine by that. vm.h has the contract.
 */
#include <errno.h>
#include <jansson.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "backend/block/block.h"
#include "base/log.h"
#include "base/state.h"
#include "base/util.h"
#include "engine/soft.h"
#include "isa/x86/cpuid.h"
#include "memory/missing.h"
#include "vm/config.h"
#include "vm/stats.h"
#include "vm/vm_internal.h"

/* Whoever makes the machine again stands in another folder. */
static json_t *absolute(json_t *path)
{
    const char *text = json_string_value(path);
    char folder[PATH_MAX];

    if (!text || *text == '/' || block_is_uri(text) || !getcwd(folder, sizeof(folder)))
        return json_incref(path);
    return json_sprintf("%s/%s", folder, text);
}

char *vm_config_text(const struct vm_config *c)
{
    char *text = vm_config_to_json(c);
    json_t *root = text ? json_loads(text, 0, NULL) : NULL, *v;
    size_t i;

    free(text);
    if (!root)
        return NULL;
    if ((v = json_object_get(root, "kernel")))
        json_object_set_new(root, "kernel", absolute(v));
    for (i = 0; i < json_array_size(json_object_get(root, "initrd")); i++)
        json_array_set_new(json_object_get(root, "initrd"), i, absolute(json_array_get(json_object_get(root, "initrd"), i)));
    json_array_foreach(json_object_get(root, "disk"), i, v)
        for (size_t k = 0; k < 2; k++) {
            const char *key = k ? "tls" : "path";

            if (json_object_get(v, key))
                json_object_set_new(v, key, absolute(json_object_get(v, key)));
        }
    text = json_dumps(root, JSON_PRESERVE_ORDER);
    if (!text)
        log_error("out of memory");
    json_decref(root);
    return text;
}

int vm_save_held(struct vm *vm, struct state_writer *w)
{
    char *config = vm_config_text(vm->config);
    struct vm_hardware hw;

    if (!config)
        return -ENOMEM;
    vm_get_hardware(vm, &hw);
    hw.config = config;
    vm_state_save(&hw, &vm->still, w);
    free(config);
    return 0;
}

int vm_save(struct vm *vm, struct state_writer *w)
{
    int err;

    pthread_mutex_lock(&vm->life);
    pthread_mutex_lock(&vm->machine.lock);
    err = vm_save_held(vm, w);
    pthread_mutex_unlock(&vm->machine.lock);
    pthread_mutex_unlock(&vm->life);
    return err;
}

int vm_load(struct vm *vm, const struct state_reader *r)
{
    struct vm_hardware hw;
    int err;

    pthread_mutex_lock(&vm->life);
    pthread_mutex_lock(&vm->machine.lock);
    vm_get_hardware(vm, &hw);
    err = vm_state_load(&hw, &vm->still, r);
    /* A reset has to clear it, though nobody loaded a kernel here. */
    vm->pc.loaded = true;
    vm->started_ns = clock_now(vm->machine.clock);
    pthread_mutex_unlock(&vm->machine.lock);
    pthread_mutex_unlock(&vm->life);
    return err;
}

/* ---- change of the engine ---- */

/* Makes the vCPUs anew with another engine and gives them their states. The old ones are in old then, or untouched. */
static int make_others(struct vm *vm, const struct engine *engine, struct soft_group *group, struct vcpu *old,
                       const struct x86_state *states)
{
    int err = 0;
    unsigned made;

    for (made = 0; made < vm->cpus && !err; made++) {
        struct vcpu *v = &vm->vcpus[made].vcpu;

        old[made] = *v;
        v->engine = engine;
        v->group = group;
        v->data = NULL;
        err = engine->vcpu_create(v);
        if (err)
            *v = old[made];
    }
    if (err) {
        for (unsigned i = 0; i + 1 < made; i++) {
            engine->vcpu_destroy(&vm->vcpus[i].vcpu);
            vm->vcpus[i].vcpu = old[i];
        }
        return err;
    }
    for (unsigned i = 0; i < vm->cpus; i++) {
        struct engine_counters counters;

        old[i].engine->counters(&old[i], &counters);
        vm->vcpus[i].native_cpu_ns += counters.native_cpu_ns;
        if (vm->stats)
            vm_stats_add_vcpu(vm->stats, &counters, 0);
        old[i].engine->vcpu_destroy(&old[i]);
    }
    for (unsigned i = 0; i < vm->cpus; i++)
        engine->import_state(&vm->vcpus[i].vcpu, &states[i]);
    return 0;
}

/* The machine stands still. */
static int exchange(struct vm *vm, const struct engine *engine)
{
    struct vcpu *old = calloc(vm->cpus, sizeof(*old));
    struct x86_state *states = aligned_alloc(64, vm->cpus * sizeof(*states));
    struct soft_group *group = soft_group_create(&vm->machine);
    int err = -ENOMEM;

    if (old && states && group) {
        /* So nothing resets the guest, and no device and no timer signals to a vCPU meanwhile. */
        pthread_mutex_lock(&vm->life);
        pthread_mutex_lock(&vm->machine.lock);
        for (unsigned i = 0; i < vm->cpus; i++)
            vm->engine->export_state(&vm->vcpus[i].vcpu, &states[i]);
        err = make_others(vm, engine, group, old, states);
        if (!err) {
            struct soft_group *unused = vm->group;

            pthread_mutex_lock(&vm->gate);
            vm->group = group;
            vm->engine = engine;
            pthread_mutex_unlock(&vm->gate);
            group = unused;
            if (vm->stats)
                vm_stats_set_engine(vm->stats, engine->name);
        }
        pthread_mutex_unlock(&vm->machine.lock);
        pthread_mutex_unlock(&vm->life);
    }
    soft_group_destroy(group);
    free(states);
    free(old);
    return err;
}

static uint64_t monotonic_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

int vm_await_memory(struct vm *vm, const _Atomic bool *cancel)
{
    while (memory_missing_any(&vm->machine.memory)) {
        if (cancel && atomic_load(cancel))
            return -ECANCELED;
        if (vm_ended(vm, NULL, NULL))
            return -ESHUTDOWN;
        /* A second for each GiB in all: not worth a signal from everywhere where a page may be the last. */
        nanosleep(&(struct timespec){ .tv_nsec = 5000000 }, NULL);
    }
    return 0;
}

int vm_set_engine(struct vm *vm, const struct engine *engine, uint64_t *pause_ns)
{
    struct engine_report report;
    const char *missing;
    uint64_t start;
    int err;

    engine->probe(&report);
    if (!report.usable) {
        log_error("engine %s cannot run here: %s", engine->name, report.text);
        return -ENOSYS;
    }
    if (!engine_offer(engine, vm->model, true, &missing)) {
        log_error("engine %s cannot show the guest the processor that it was started with (%s): it lacks %s; a machine that is started "
                  "with engine %s can change to the others and back", engine->name, vm->model->name, missing, engine->name);
        return -ENOSYS;
    }
    /* Such an engine may need what only this process's own touches bring. */
    err = engine->checks_pages ? 0 : vm_await_memory(vm, NULL);
    if (err)
        return err;
    start = monotonic_ns();
    err = vm_pause(vm, VM_HOLD_ENGINE);
    if (err)
        return err;
    pthread_mutex_lock(&vm->gate);
    /* The copies of pages that a snapshot makes depend on what the engine looks at. */
    if (vm->saving && !(engine->checks_pages && vm->engine->checks_pages))
        err = -EBUSY;
    pthread_mutex_unlock(&vm->gate);
    if (err) {
        log_error("a snapshot of this machine is being saved; change the engine when that is done");
    } else if (vm->engine != engine) {
        err = exchange(vm, engine);
        if (err)
            log_error("cannot change to engine %s: %s; the machine goes on with %s", engine->name, strerror(-err),
                      vm->engine->name);
    }
    vm_resume(vm, VM_HOLD_ENGINE);
    if (pause_ns)
        *pause_ns = monotonic_ns() - start;
    return err;
}
