/*
 * Receiving a machine; migrate.h has the contract.
 *
 * Threads: the reception's own goes through the migration and makes the machine; the caller of vm_reception_wait() then runs its
 * event loop, as for any machine.
 */
#include <errno.h>
#include <jansson.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "base/log.h"
#include "base/state.h"
#include "base/thread.h"
#include "base/util.h"
#include "device/virtio/virtio.h"
#include "engine/engine.h"
#include "isa/x86/cpuid.h"
#include "vm/config.h"
#include "vm/migrate.h"
#include "vm/migrate_disks.h"
#include "vm/migrate_state.h"
#include "vm/status.h"
#include "vm/vm_internal.h"

/* The network is told several times where the machine is now: such frames may get lost, and ports take time to come up. */
#define ANNOUNCEMENTS 4u
#define ANNOUNCE_FIRST_NS 50000000u

struct vm_reception {
    const struct vm_reception_options *opt;
    struct migrate_target *target;
    pthread_t thread;
    bool started, joined;
    int ready;                  /* eventfd */
    struct vm_config config;
    bool configured;
    int (*on_config)(void *opaque, const struct vm_config *config);
    void *on_config_opaque;

    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct vm *vm;              /* made; guarded by lock */
    bool over;                  /* the migration's thread is done; guarded by lock */
    enum migrate_stage end;
    struct migrate_result result;
    bool stay_paused;
    struct target_disks *disks; /* that are copied; NULL: none */
    pthread_t announcer;
    bool announcing;
};

/* The error that was held back since log_hold_error(): whoever gets the reason tells both sides. */
static int failed(int err, const char *why, char reason[MIGRATE_TEXT])
{
    log_keep_error(NULL, 0);
    if (err)
        snprintf(reason, MIGRATE_TEXT, "%.500s", why[0] ? why : strerror(-err));
    return err;
}

/* ---- making the machine ---- */

static int configure(struct vm_reception *r, const json_t *description)
{
    const char *name = json_string_value(json_object_get(description, "name"));
    char *text = json_dumps(json_object_get(description, "config"), JSON_COMPACT);
    struct vm_config source, *c = &r->config;
    int err = text && name ? 0 : -EINVAL;

    if (err) {
        log_error("the source does not say what machine it is");
        free(text);
        return err;
    }
    if (vm_config_init(&source)) {
        free(text);
        return -ENOMEM;
    }
    /* As it is there, for what depends on its name: addresses of network cards. */
    err = vm_config_load_json(&source, text, strlen(text), "the source's configuration");
    if (!err)
        err = vm_config_set_flag(&source, "name", name);
    if (!err)
        err = vm_config_finish(&source);
    if (!err)
        err = vm_config_load_json(c, text, strlen(text), "the source's configuration");
    if (!err) {
        /* Figures are of one run, and its file is that run's. */
        free(c->stats);
        c->stats = NULL;
        err = vm_config_set_flag(c, "name", r->opt->name);
    }
    for (unsigned i = 0; !err && r->opt->flags && r->opt->flags[i][0]; i++)
        err = vm_config_set_flag(c, r->opt->flags[i][0], r->opt->flags[i][1]);
    if (!err)
        err = vm_config_finish(c);
    if (!err && c->net_count != source.net_count) {
        log_error("the machine has %u network cards, so --net has to be given %u times", source.net_count, source.net_count);
        err = -EINVAL;
    }
    for (unsigned i = 0; !err && i < c->net_count; i++) {
        memcpy(c->nets[i].mac, source.nets[i].mac, sizeof(c->nets[i].mac));
        c->nets[i].mac_given = true;
    }
    for (unsigned i = 0; !err && i < c->disk_count; i++) {
        const json_t *disk = json_array_get(json_object_get(description, "disks"), i);
        json_int_t size = json_integer_value(json_object_get(disk, "size"));

        c->disks[i].block.unlocked = true;
        c->disks[i].block.size = size > 0 ? (uint64_t)size : 0;
        c->disks[i].block.can_discard = json_is_true(json_object_get(disk, "discard"));
    }
    vm_config_destroy(&source);
    free(text);
    return err;
}

/* A guest that resets itself loads them again. */
static int check_files(const struct vm_config *c)
{
    const char *missing = c->kernel && access(c->kernel, R_OK) ? c->kernel : NULL;

    for (unsigned i = 0; i < c->initrd_count && !missing; i++)
        if (access(c->initrds[i], R_OK))
            missing = c->initrds[i];
    if (!missing)
        return 0;
    log_error("%s: %s on this host; a guest that restarts needs it", missing, strerror(errno));
    return -ENOENT;
}

/* What the guest knows by heart. */
static int check_hardware(struct vm *vm, const json_t *description)
{
    const char *cpuid = json_string_value(json_object_get(description, "cpuid")), *model, *id;
    json_t *own = vm_migrate_cpuid(vm->model), *devices, *theirs = json_object_get(description, "devices"), *version;
    bool same = own && cpuid && strcmp(json_string_value(own), cpuid) == 0;
    int err = 0;

    json_decref(own);
    if (!same) {
        model = json_string_value(json_object_get(description, "cpu_model"));
        log_error("CPU model %s is another processor on this host; machines that move between hosts need a common --cpu-model from the start, as x86-64-v2",
                  model ? model : "?");
        return -ENOSYS;
    }
    devices = vm_migrate_devices(&vm->machine);
    json_object_foreach(theirs, id, version) {
        const json_t *mine = json_object_get(devices, id);

        if (!mine) {
            log_error("this ringfort makes the machine without its device %s; use the same release on both hosts", id);
            err = -ENODEV;
        } else if (json_integer_value(version) > json_integer_value(mine)) {
            log_error("device %s is newer there (version %d) than here (%d); use the same release on both hosts", id,
                      (int)json_integer_value(version), (int)json_integer_value(mine));
            err = -ENODEV;
        }
        if (err)
            break;
    }
    if (!err && json_object_size(devices) != json_object_size(theirs)) {
        log_error("this ringfort makes the machine with other devices; use the same release on both hosts");
        err = -ENODEV;
    }
    json_decref(devices);
    return err;
}

static int hex_digit(char c) { return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1; }

/* The guest goes on with the processor that it knows. */
static int take_cpuid(struct vm_config *c, const json_t *description)
{
    const char *hex = json_string_value(json_object_get(description, "cpuid"));
    size_t len = hex ? strlen(hex) / 2 : 0;
    uint8_t *bytes = malloc(len + 1);
    int err = bytes ? 0 : -ENOMEM;

    for (size_t i = 0; i < len && !err; i++) {
        int high = hex_digit(hex[2 * i]), low = hex_digit(hex[2 * i + 1]);

        err = high < 0 || low < 0 ? -EINVAL : 0;
        bytes[i] = (uint8_t)(high << 4 | low);
    }
    if (!err)
        err = vm_config_set_cpuid(c, bytes, len);
    else
        log_error("the source's description of its processor is damaged");
    free(bytes);
    return err;
}

static int make(struct vm_reception *r, const json_t *description)
{
    json_int_t tsc_hz = json_integer_value(json_object_get(description, "tsc_hz"));
    int err = configure(r, description), status;
    struct vm *vm;

    if (!err)
        err = take_cpuid(&r->config, description);
    if (!err)
        err = check_files(&r->config);
    if (err)
        return err;
    r->configured = true;
    log_set_machine(r->config.name);
    /* Takes the name; whatever has that name on the host's disk is no living machine's from here on. */
    if (r->on_config)
        err = r->on_config(r->on_config_opaque, &r->config);
    if (!err)
        err = target_disks_create(json_object_get(description, "disks"), &r->config, r->opt->disks, &r->disks);
    if (!err)
        err = vm_config_check_host(&r->config);
    if (err)
        return err;
    vm = vm_create_empty(&r->config, tsc_hz > 0 ? (uint64_t)tsc_hz : 0, VM_HOLD_MIGRATE, &status);
    if (!vm)
        return status == VM_STATUS_HOST ? -ENODEV : -EINVAL;
    vm->incoming = r->target;
    err = check_hardware(vm, description);
    /* Also one that will not do: its end is the run's to see to. */
    pthread_mutex_lock(&r->lock);
    r->vm = vm;
    pthread_mutex_unlock(&r->lock);
    if (!err)
        eventfd_write(r->ready, 1);
    return err;
}

static int prepare(void *opaque, const char *text, size_t len, struct memory **memory, char reason[MIGRATE_TEXT])
{
    struct vm_reception *r = opaque;
    json_t *description = json_loadb(text, len, 0, NULL);
    char why[512] = "";
    int err;

    log_hold_error(why, sizeof(why));
    err = description ? make(r, description) : -EINVAL;
    json_decref(description);
    if (!err)
        *memory = &r->vm->machine.memory;
    return failed(err, why, reason);
}

static bool in_kernel(void *opaque)
{
    struct vm_reception *r = opaque;

    return strcmp(r->vm->engine->name, "kvm") == 0;
}

/* ---- its state ---- */

static int load(void *opaque, const void *data, size_t len, char reason[MIGRATE_TEXT])
{
    struct vm_reception *r = opaque;
    struct state_reader reader;
    char why[512] = "";
    int err = 0;

    log_hold_error(why, sizeof(why));
    if (len < MIGRATE_STATE_HEADER || load_le32(data) != MIGRATE_STATE_VERSION) {
        log_error("the machine's state is damaged, or of a newer ringfort");
        err = -EINVAL;
    }
    if (!err) {
        r->stay_paused = load_le32((const uint8_t *)data + 4) & MIGRATE_STATE_PAUSED;
        target_disks_unlock(r->disks);
        err = vm_migrate_lock_disks(r->vm);
    }
    if (!err) {
        state_reader_init(&reader, (const uint8_t *)data + MIGRATE_STATE_HEADER, len - MIGRATE_STATE_HEADER);
        err = vm_load(r->vm, &reader);
    }
    return failed(err, why, reason);
}

/* ---- running it ---- */

static void announce(struct vm *vm)
{
    pthread_mutex_lock(&vm->machine.lock);
    for (struct device *d = vm->machine.devices; d; d = d->next)
        if (strcmp(d->ops->name, "virtio-net") == 0)
            virtio_net_announce(d);
    pthread_mutex_unlock(&vm->machine.lock);
}

static void *announce_more(void *opaque)
{
    struct vm_reception *r = opaque;

    for (unsigned i = 1; i < ANNOUNCEMENTS; i++) {
        nanosleep(&(struct timespec){ .tv_nsec = (long)(ANNOUNCE_FIRST_NS * i) }, NULL);
        announce(r->vm);
    }
    return NULL;
}

static int activate(void *opaque, char reason[MIGRATE_TEXT])
{
    struct vm_reception *r = opaque;
    char why[512] = "";
    int err;

    log_hold_error(why, sizeof(why));
    /* After load() they are held; an orphan gave them up. */
    err = vm_migrate_lock_disks(r->vm);
    if (!err)
        err = target_disks_name(r->disks);
    if (!err && r->stay_paused)
        err = vm_pause(r->vm, VM_HOLD_USER);
    return failed(err, why, reason);
}

static void run(void *opaque)
{
    struct vm_reception *r = opaque;
    int err;

    vm_resume(r->vm, VM_HOLD_MIGRATE);
    announce(r->vm);
    r->announcing = pthread_create(&r->announcer, NULL, announce_more, r) == 0;
    /* The guest goes on meanwhile. Should the host lose power right now, the files are there, as partial ones. */
    err = target_disks_sync_names(r->disks);
    if (err)
        log_warn("the names of the machine's disks may not have reached the host's disk: %s", strerror(-err));
}

static void abandon(void *opaque)
{
    struct vm_reception *r = opaque;

    if (r->vm)
        vm_end_because(r->vm, VM_STATUS_BACKEND, "migration");
    target_disks_remove(r->disks);
}

static int disk_write(void *opaque, unsigned disk, uint64_t offset, const void *buf, size_t len)
{
    return target_disks_write(((struct vm_reception *)opaque)->disks, disk, offset, buf, len);
}

static int disk_sync(void *opaque) { return target_disks_sync(((struct vm_reception *)opaque)->disks); }

static void orphan(void *opaque)
{
    struct vm_reception *r = opaque;

    vm_migrate_unlock_disks(r->vm);
}

static const struct migrate_target_ops ops = { prepare, in_kernel, load, activate,   run,
                                              abandon, orphan,    NULL, disk_write, disk_sync };

/* ---- life ---- */

static void *reception_main(void *opaque)
{
    struct vm_reception *r = opaque;
    enum migrate_stage end = migrate_target_run(r->target, &r->result);

    if (end == MIGRATE_LOST) {
        /* vCPUs and devices wait for memory that will never come, and nothing may go on with other contents in its place. */
        log_error("ending at once: what the guest wrote to its disks is as after a power failure");
        _exit(VM_STATUS_BACKEND);
    }
    pthread_mutex_lock(&r->lock);
    r->end = end;
    r->over = true;
    pthread_cond_broadcast(&r->changed);
    pthread_mutex_unlock(&r->lock);
    eventfd_write(r->ready, 1);
    return NULL;
}

struct vm_reception *vm_reception_create(const struct vm_reception_options *opt)
{
    struct vm_reception *r = calloc(1, sizeof(*r));

    if (!r || vm_config_init(&r->config)) {
        log_error("out of memory");
        free(r);
        return NULL;
    }
    r->opt = opt;
    r->ready = eventfd(0, EFD_CLOEXEC);
    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->changed, NULL);
    r->target = migrate_target_create(&opt->target, &ops, r);
    if (!r->target || r->ready < 0) {
        vm_reception_free(r);
        return NULL;
    }
    return r;
}

unsigned vm_reception_port(const struct vm_reception *r) { return migrate_target_port(r->target); }
int vm_reception_fd(const struct vm_reception *r) { return r->ready; }
const struct vm_config *vm_reception_config(const struct vm_reception *r) { return &r->config; }

void vm_reception_on_config(struct vm_reception *r, int (*fn)(void *opaque, const struct vm_config *config), void *opaque)
{
    r->on_config = fn;
    r->on_config_opaque = opaque;
    r->started = thread_start(&r->thread, 0, reception_main, r) == 0;
    if (!r->started) {
        r->over = true;
        eventfd_write(r->ready, 1);
    }
}

struct vm *vm_reception_wait(struct vm_reception *r)
{
    eventfd_t value;
    struct vm *vm;

    eventfd_read(r->ready, &value);
    pthread_mutex_lock(&r->lock);
    vm = r->vm;
    pthread_mutex_unlock(&r->lock);
    return vm;
}

void vm_reception_cancel(struct vm_reception *r) { migrate_target_cancel(r->target); }

enum migrate_stage vm_reception_end(struct vm_reception *r, struct migrate_result *result)
{
    /* While the source may still ask for the owner, it is to be answered; but this process ends. */
    migrate_target_cancel(r->target);
    if (r->started && !r->joined)
        pthread_join(r->thread, NULL);
    r->joined = true;
    if (r->announcing)
        pthread_join(r->announcer, NULL);
    r->announcing = false;
    if (result)
        *result = r->result;
    return r->started ? r->end : MIGRATE_FAILED;
}

void vm_reception_free(struct vm_reception *r)
{
    if (!r)
        return;
    if (r->target)
        vm_reception_end(r, NULL);
    migrate_target_free(r->target);
    if (r->ready >= 0)
        close(r->ready);
    target_disks_free(r->disks);
    vm_config_destroy(&r->config);
    pthread_mutex_destroy(&r->lock);
    pthread_cond_destroy(&r->changed);
    free(r);
}
