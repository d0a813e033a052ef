/*
 * Sending a machine; migrate.h has the contract. Everything runs in the thread of vm_migration_run(), but for the throttle's.
 */
#include <errno.h>
#include <jansson.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "backend/block/block.h"
#include "base/log.h"
#include "base/state.h"
#include "base/util.h"
#include "isa/x86/cpuid.h"
#include "vm/config.h"
#include "vm/migrate.h"
#include "vm/migrate_disks.h"
#include "vm/migrate_state.h"
#include "vm/vm_internal.h"

#define THROTTLE_PERIOD_NS 40000000u
#define PRESYNC_MS 10000u

struct vm_migration {
    struct vm *vm;
    struct migrate_source *source;
    struct migrate_source_options opt;
    struct source_disks *disks; /* NULL: none is copied */
    void (*progress)(void *opaque, const struct migrate_progress *p);
    void *opaque;
    bool released;              /* the disks' locks */
    _Atomic bool cancelled;
    pthread_t throttler;
    bool throttling;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    unsigned percent;           /* guarded by lock */
    bool end;
};

/* ---- what it is ---- */

json_t *vm_migrate_cpuid(const struct x86_cpu_model *model)
{
    const uint8_t *bytes = (const uint8_t *)model->leaves;
    size_t len = model->leaf_count * sizeof(model->leaves[0]);
    char *text = malloc(len * 2 + 1);
    json_t *hex;

    if (!text)
        return NULL;
    for (size_t i = 0; i < len; i++) {
        text[2 * i] = "0123456789abcdef"[bytes[i] >> 4];
        text[2 * i + 1] = "0123456789abcdef"[bytes[i] & 15];
    }
    text[2 * len] = 0;
    hex = json_string(text);
    free(text);
    return hex;
}

json_t *vm_migrate_devices(struct machine *m)
{
    json_t *list = json_object();

    for (struct device *d = m->devices; d; d = d->next)
        json_object_set_new(list, d->id, json_integer(d->ops->version));
    return list;
}

/* What the guest knows of its disks, in the order of the configuration. */
static json_t *describe_disks(struct vm *vm, const struct source_disks *copied)
{
    json_t *list = json_array();

    for (unsigned i = 0; i < vm->parts.board.disk_count; i++) {
        const struct block *b = vm->parts.disks[i].backend;

        json_array_append_new(list, json_pack("{s:I, s:b, s:b}", "size", (json_int_t)block_size(b), "discard", block_can_discard(b),
                                              "copied", source_disks_has(copied, i)));
    }
    return list;
}

static char *describe(void *opaque)
{
    struct vm_migration *m = opaque;
    struct vm *vm = m->vm;
    char *config = vm_config_text(vm->config), *text;
    json_t *o = config ? json_pack("{s:s, s:o, s:I, s:s, s:o, s:s, s:o, s:o}", "name", vm->config->name, "config",
                                   json_loads(config, 0, NULL), "tsc_hz", (json_int_t)vm->parts.board.tsc_hz, "cpu_model",
                                   vm->model->name, "cpuid", vm_migrate_cpuid(vm->model), "engine", vm->engine->name, "devices",
                                   vm_migrate_devices(&vm->machine), "disks", describe_disks(vm, m->disks))
                       : NULL;

    free(config);
    text = o ? json_dumps(o, JSON_COMPACT) : NULL;
    json_decref(o);
    return text;
}

/* ---- standing still ---- */

/* Belongs to who waits for it and to the disk that does it; the last one frees it. */
struct server_flush {
    struct block_request request;
    _Atomic bool done;
    _Atomic int users;
};

static void let_go(struct server_flush *f)
{
    if (atomic_fetch_sub(&f->users, 1) == 1)
        free(f);
}

static void flushed(void *opaque, int status)
{
    struct server_flush *f = opaque;

    atomic_store(&f->done, true);
    let_go(f);
}

/* Its errors are told by the flush that counts, when the disk is given up. */
static void flush_server(struct vm *vm, struct block *b)
{
    struct server_flush *f = calloc(1, sizeof(*f));

    if (!f)
        return;
    f->request = (struct block_request){ .op = BLOCK_FLUSH, .done = flushed, .opaque = f };
    f->users = 2;
    pthread_mutex_lock(&vm->machine.lock);
    block_submit(b, &f->request);
    pthread_mutex_unlock(&vm->machine.lock);
    for (unsigned ms = 0; ms < PRESYNC_MS && !atomic_load(&f->done); ms++)
        nanosleep(&(struct timespec){ .tv_nsec = 1000000 }, NULL);
    let_go(f);
}

static int do_pause(void *opaque)
{
    struct vm_migration *m = opaque;
    struct vm *vm = m->vm;

    /* Most of what is to be synced when the locks are given up, while the guest runs. */
    for (unsigned i = 0; i < vm->parts.board.disk_count; i++) {
        block_presync(vm->parts.disks[i].backend);
        if (!block_is_local(vm->parts.disks[i].backend))
            flush_server(vm, vm->parts.disks[i].backend);
    }
    return vm_pause(vm, VM_HOLD_MIGRATE);
}

static int do_resume(void *opaque)
{
    struct vm_migration *m = opaque;

    return vm_resume(m->vm, VM_HOLD_MIGRATE);
}

static int save(void *opaque, void **data, size_t *len)
{
    struct vm_migration *m = opaque;
    struct state_writer *w = state_writer_create();
    const void *stream;
    uint8_t *copy;
    int err = w ? vm_save(m->vm, w) : -ENOMEM;

    if (!err)
        err = state_writer_finish(w, &stream, len);
    copy = err ? NULL : malloc(*len + MIGRATE_STATE_HEADER);
    if (!err && !copy)
        err = -ENOMEM;
    if (!err) {
        store_le32(copy, MIGRATE_STATE_VERSION);
        store_le32(copy + 4, vm_holds(m->vm) & VM_HOLD_USER ? MIGRATE_STATE_PAUSED : 0);
        memcpy(copy + MIGRATE_STATE_HEADER, stream, *len);
        *len += MIGRATE_STATE_HEADER;
        *data = copy;
    }
    state_writer_free(w);
    return err;
}

/* ---- disks ---- */

void vm_migrate_unlock_disks(struct vm *vm)
{
    pthread_mutex_lock(&vm->machine.lock);
    for (unsigned i = 0; i < vm->parts.board.disk_count; i++)
        block_unlock(vm->parts.disks[i].backend);
    pthread_mutex_unlock(&vm->machine.lock);
}

int vm_migrate_lock_disks(struct vm *vm)
{
    int err = 0;

    pthread_mutex_lock(&vm->machine.lock);
    for (unsigned i = 0; i < vm->parts.board.disk_count && !err; i++) {
        err = block_lock(vm->parts.disks[i].backend);
        while (err && i--)
            block_unlock(vm->parts.disks[i].backend);
        if (err)
            break;
    }
    pthread_mutex_unlock(&vm->machine.lock);
    return err;
}

static void release(void *opaque)
{
    struct vm_migration *m = opaque;

    m->released = true;
    vm_migrate_unlock_disks(m->vm);
}

static int reclaim(void *opaque)
{
    struct vm_migration *m = opaque;
    int err = m->released ? vm_migrate_lock_disks(m->vm) : 0;

    m->released = m->released && err;
    return err;
}

/* ---- throttle: vCPUs stand still for a part of each period; devices and clocks go on ---- */

static void *throttle_main(void *opaque)
{
    struct vm_migration *m = opaque;
    struct vm *vm = m->vm;

    pthread_mutex_lock(&m->lock);
    while (!m->end) {
        uint64_t still = (uint64_t)THROTTLE_PERIOD_NS / 100 * m->percent;

        if (!still) {
            pthread_cond_wait(&m->changed, &m->lock);
            continue;
        }
        pthread_mutex_unlock(&m->lock);
        pthread_mutex_lock(&vm->life);
        vm_stop_vcpus(vm);
        pthread_mutex_unlock(&vm->life);
        nanosleep(&(struct timespec){ .tv_nsec = (long)still }, NULL);
        pthread_mutex_lock(&vm->life);
        vm_start_vcpus(vm);
        pthread_mutex_unlock(&vm->life);
        nanosleep(&(struct timespec){ .tv_nsec = (long)(THROTTLE_PERIOD_NS - still) }, NULL);
        pthread_mutex_lock(&m->lock);
    }
    pthread_mutex_unlock(&m->lock);
    return NULL;
}

static void throttle(void *opaque, unsigned percent)
{
    struct vm_migration *m = opaque;

    pthread_mutex_lock(&m->lock);
    m->percent = percent;
    pthread_cond_broadcast(&m->changed);
    pthread_mutex_unlock(&m->lock);
    if (percent && !m->throttling)
        m->throttling = pthread_create(&m->throttler, NULL, throttle_main, m) == 0;
}

static void end_throttle(struct vm_migration *m)
{
    pthread_mutex_lock(&m->lock);
    m->end = true;
    pthread_cond_broadcast(&m->changed);
    pthread_mutex_unlock(&m->lock);
    if (m->throttling)
        pthread_join(m->throttler, NULL);
    m->throttling = false;
}

static void progress(void *opaque, const struct migrate_progress *p)
{
    struct vm_migration *m = opaque;

    if (m->progress)
        m->progress(m->opaque, p);
}

static const struct migrate_source_ops ops = { describe, do_pause, do_resume, save, release, reclaim, throttle, progress };

/* ---- all of it ---- */

struct vm_migration *vm_migration_create(struct vm *vm, const struct migrate_source_options *opt, bool with_disks,
                                         void (*fn)(void *opaque, const struct migrate_progress *p), void *opaque)
{
    struct vm_migration *m = calloc(1, sizeof(*m));
    int err = 0;

    if (!m) {
        log_error("out of memory");
        return NULL;
    }
    m->vm = vm;
    m->progress = fn;
    m->opaque = opaque;
    pthread_mutex_init(&m->lock, NULL);
    pthread_cond_init(&m->changed, NULL);
    m->opt = *opt;
    if (with_disks)
        m->disks = source_disks_create(vm, &err);
    if (m->disks)
        m->opt.disks = source_disks_ops(m->disks);
    m->source = err ? NULL : migrate_source_create(&m->opt, &ops, m, &vm->machine.memory);
    if (!m->source) {
        vm_migration_free(m);
        return NULL;
    }
    return m;
}

enum migrate_stage vm_migration_run(struct vm_migration *m, struct migrate_result *result)
{
    enum migrate_stage end;
    int err = vm_await_memory(m->vm, &m->cancelled);

    if (err) {
        *result = (struct migrate_result){ .end = MIGRATE_FAILED };
        snprintf(result->reason, sizeof(result->reason), "%s", err == -ECANCELED ? "cancelled" : "the machine has ended");
        return MIGRATE_FAILED;
    }
    end = migrate_source_run(m->source, result);
    end_throttle(m);
    if (end == MIGRATE_UNKNOWN) {
        pthread_mutex_lock(&m->vm->life);
        m->vm->undecided = true;
        pthread_mutex_unlock(&m->vm->life);
        vm_pause(m->vm, VM_HOLD_USER);
    }
    return end;
}

bool vm_migration_cancel(struct vm_migration *m, bool force)
{
    atomic_store(&m->cancelled, true);
    return migrate_source_cancel(m->source, force);
}

void vm_migration_free(struct vm_migration *m)
{
    if (!m)
        return;
    end_throttle(m);
    migrate_source_free(m->source);
    source_disks_free(m->disks);
    pthread_mutex_destroy(&m->lock);
    pthread_cond_destroy(&m->changed);
    free(m);
}

int vm_migrate_decide(struct vm *vm)
{
    bool undecided;
    int err;

    if (vm->incoming && migrate_target_take(vm->incoming))
        return 0;
    pthread_mutex_lock(&vm->life);
    undecided = vm->undecided;
    pthread_mutex_unlock(&vm->life);
    if (!undecided)
        return 0;
    err = vm_migrate_lock_disks(vm);
    if (err)
        return err;
    pthread_mutex_lock(&vm->life);
    vm->undecided = false;
    pthread_mutex_unlock(&vm->life);
    log_warn("a person says that the machine is this process's: it goes on here");
    return vm_resume(vm, VM_HOLD_MIGRATE);
}
