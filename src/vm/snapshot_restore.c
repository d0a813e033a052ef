/*
 * A machine that goes on from a snapshot.
 *
 * Its RAM is the snapshot's file, mapped privately: pages are read when they are touched, machines from one snapshot share what
 * none of them has written, and removing the snapshot takes nothing away from them. A compressed one is unpacked while the
 * machine runs (snapshot_fill.h). Its disks are overlays in the folder of
 * the machine, DATA/machines/NAME, on links to the snapshot's copies. What an earlier machine of that name had there is kept in a
 * folder beside it.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "backend/block/block.h"
#include "base/log.h"
#include "base/state.h"
#include "base/util.h"
#include "vm/config.h"
#include "vm/snapshot.h"
#include "vm/snapshot_fill.h"
#include "vm/snapshot_pack.h"
#include "vm/snapshot_store.h"
#include "vm/state_file.h"
#include "vm/status.h"
#include "vm/vm_internal.h"

struct vm_snapshot {
    char name[VM_SNAPSHOT_NAME_MAX], machine[128];
    char root_path[PATH_MAX], path[PATH_MAX];
    int root, dir, memory_fd;
    bool packed;                /* memory_fd is of SNAPSHOT_PACKED */
    void *stream;
    size_t stream_len;
    uint64_t tsc_hz;
    const char *config;
    size_t config_len;
};

void vm_snapshot_close(struct vm_snapshot *s)
{
    if (!s)
        return;
    if (s->memory_fd >= 0)
        close(s->memory_fd);
    if (s->dir >= 0)
        close(s->dir);
    if (s->root >= 0)
        close(s->root);
    free(s->stream);
    free(s);
}

static int read_snapshot(struct vm_snapshot *s)
{
    struct state_reader r;
    const char *machine;
    json_int_t version;
    json_t *meta;
    int err;

    s->root = snapshot_open_root("snapshots", s->root_path);
    if (s->root < 0)
        return s->root;
    meta = snapshot_read_meta(s->root, s->name, s->root_path, false);
    if (!meta)
        return faccessat(s->root, s->name, F_OK, 0) ? -ENOENT : -EINVAL;
    machine = json_string_value(json_object_get(meta, "machine"));
    snprintf(s->machine, sizeof(s->machine), "%s", machine ? machine : s->name);
    version = json_integer_value(json_object_get(meta, "version"));
    json_decref(meta);
    snprintf(s->path, sizeof(s->path), "%.2000s/%s", s->root_path, s->name);
    s->dir = openat(s->root, s->name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    s->memory_fd = s->dir < 0 ? -1 : openat(s->dir, SNAPSHOT_MEMORY, O_RDONLY | O_CLOEXEC);
    if (s->dir >= 0 && s->memory_fd < 0 && errno == ENOENT) {
        s->memory_fd = openat(s->dir, SNAPSHOT_PACKED, O_RDONLY | O_CLOEXEC);
        s->packed = s->memory_fd >= 0;
    }
    if (s->memory_fd < 0) {
        err = -errno;
        log_error("%s/%s: cannot read: %s", s->path, SNAPSHOT_MEMORY, strerror(-err));
        return err;
    }
    if (s->packed && version < snapshot_version(true)) {
        log_error("%s/%s: compressed by an older ringfort, in a form that this one does not read: restore it with that one, "
                  "and save it again without --compress",
                  s->path, SNAPSHOT_PACKED);
        return -EINVAL;
    }
    err = state_file_read(s->dir, SNAPSHOT_STATE, s->path, &s->stream, &s->stream_len);
    if (err)
        return err;
    state_reader_init(&r, s->stream, s->stream_len);
    err = vm_state_peek(&r, &s->config, &s->config_len, &s->tsc_hz);
    if (!err && !s->config) {
        log_error("%s/%s: it does not say what machine it is of", s->path, SNAPSHOT_STATE);
        err = -EINVAL;
    }
    return err;
}

int vm_snapshot_open(const char *name, struct vm_snapshot **out)
{
    struct vm_snapshot *s;
    int err = snapshot_check_name(name);

    *out = NULL;
    if (err)
        return err;
    s = calloc(1, sizeof(*s));
    if (!s) {
        log_error("out of memory");
        return -ENOMEM;
    }
    snprintf(s->name, sizeof(s->name), "%s", name);
    s->root = s->dir = s->memory_fd = -1;
    err = read_snapshot(s);
    if (err)
        vm_snapshot_close(s);
    else
        *out = s;
    return err;
}

const char *vm_snapshot_machine(const struct vm_snapshot *s) { return s->machine; }

int vm_snapshot_config(struct vm_snapshot *s, struct vm_config *c)
{
    char file[PATH_MAX + 16];
    int err;

    snprintf(file, sizeof(file), "%s/%s", s->path, SNAPSHOT_STATE);
    err = vm_config_load_json(c, s->config, s->config_len, file);
    /* Figures are of one run, and its file is that run's. */
    free(c->stats);
    c->stats = NULL;
    return err;
}

/* ---- disks ---- */

/* The disk's overlay in the machine's folder, on a link to the snapshot's copy. */
static int make_overlay(struct vm_snapshot *s, int folder, const char *folder_path, struct vm_disk_config *d, unsigned index)
{
    char disk[32], base[64], *path = NULL;
    uint64_t random = 0, size;
    int err = 0;

    snprintf(disk, sizeof(disk), "disk%u", index);
    if (getrandom(&random, sizeof(random), 0) != sizeof(random))
        return -EIO;
    snprintf(base, sizeof(base), SNAPSHOT_BASE_PREFIX "%016llx", (unsigned long long)random);
    if (linkat(s->dir, disk, folder, base, 0) < 0) {
        err = -errno;
        log_error("%s/%s: cannot use it for the restored machine: %s", s->path, disk, strerror(-err));
        return err;
    }
    err = block_image_size(s->dir, disk, &size);
    if (!err)
        err = block_overlay_create(folder, disk, base, size);
    if (!err && asprintf(&path, "%s/%s", folder_path, disk) < 0)
        err = -ENOMEM;
    if (err) {
        log_error("%s/%s: cannot make the restored machine's disk: %s", folder_path, disk, strerror(-err));
        return err;
    }
    free((char *)d->block.path);
    d->block.path = path;
    /* The saved one may have been on a server; this one is not. */
    free((char *)d->block.tls);
    d->block.tls = NULL;
    d->block.reconnect_s = BLOCK_RECONNECT_S;
    return 0;
}

static int make_disks(struct vm_snapshot *s, struct vm_config *c)
{
    char path[PATH_MAX];
    int folder = -1, err = 0;

    for (unsigned i = 0; i < c->disk_count && !err; i++) {
        if (c->disks[i].block.readonly)
            continue;
        if (folder < 0)
            folder = snapshot_make_machine_folder(c->name, path);
        err = folder < 0 ? folder : make_overlay(s, folder, path, &c->disks[i], i);
    }
    if (folder >= 0 && !err)
        err = snapshot_link_bases(s->dir, folder, s->path);
    if (folder >= 0)
        close(folder);
    return err;
}

/* ---- RAM ---- */

static int map_memory(struct vm_snapshot *s, struct memory *m)
{
    struct stat st;

    if (fstat(s->memory_fd, &st) < 0 || (uint64_t)st.st_size != snapshot_region_offset(m, m->regions)) {
        log_error("%s/%s: it is damaged: it has not the size of the machine's memory; was it copied completely?", s->path,
                  SNAPSHOT_MEMORY);
        return -EINVAL;
    }
    for (unsigned i = 0; i < m->regions; i++) {
        int err = memory_map_file(m, i, s->memory_fd, snapshot_region_offset(m, i));

        if (err) {
            log_error("%s/%s: cannot map it: %s", s->path, SNAPSHOT_MEMORY, strerror(-err));
            return err;
        }
    }
    return 0;
}

static int unpack_memory(struct vm_snapshot *s, struct vm *vm)
{
    char file[PATH_MAX + 16];

    snprintf(file, sizeof(file), "%s/%s", s->path, SNAPSHOT_PACKED);
    return snapshot_fill_create(vm, s->memory_fd, file, &vm->fill);
}

struct vm *vm_snapshot_restore(struct vm_snapshot *s, struct vm_config *config, unsigned hold, int *status)
{
    struct state_reader r;
    const void *cpuid;
    size_t cpuid_len;
    struct vm *vm;
    int err = make_disks(s, config);

    state_reader_init(&r, s->stream, s->stream_len);
    if (!err)
        err = vm_state_peek_cpuid(&r, &cpuid, &cpuid_len);
    if (!err)
        err = vm_config_set_cpuid(config, cpuid, cpuid_len);
    if (err) {
        *status = vm_status_of(err);
        return NULL;
    }
    vm = vm_create_empty(config, s->tsc_hz, (enum vm_hold)hold, status);
    if (!vm)
        return NULL;
    err = s->packed ? unpack_memory(s, vm) : map_memory(s, &vm->machine.memory);
    state_reader_init(&r, s->stream, s->stream_len);
    if (!err)
        err = vm_load(vm, &r);
    if (!err && vm->fill)
        err = snapshot_fill_begin(vm->fill);
    if (err) {
        *status = vm_status_of(err);
        vm_destroy(vm);
        return NULL;
    }
    return vm;
}
