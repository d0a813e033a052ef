/* See migrate_disks.h. */
#include "vm/migrate_disks.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "backend/block/block.h"
#include "base/log.h"
#include "base/util.h"
#include "vm/config.h"
#include "vm/snapshot_store.h"
#include "vm/vm_internal.h"

_Static_assert(BLOCK_DIRTY_GRANULE == MIGRATE_DISK_GRANULE, "one bitmap is handed through");

/* ---- source ---- */

struct source_disks {
    struct migrate_disks ops;
    struct vm *vm;
    struct block *block[MIGRATE_MAX_DISKS];
    int fd[MIGRATE_MAX_DISKS];
};

static int start(void *opaque)
{
    struct source_disks *s = opaque;
    int err = 0;

    pthread_mutex_lock(&s->vm->machine.lock);
    for (unsigned i = 0; i < s->ops.count && !err; i++) {
        err = block_dirty_start(s->block[i]);
        while (err && i--)
            block_dirty_stop(s->block[i]);
        if (err)
            break;
    }
    pthread_mutex_unlock(&s->vm->machine.lock);
    if (err)
        log_error("writes to disks cannot be noted: %s", strerror(-err));
    return err;
}

static void stop(void *opaque)
{
    struct source_disks *s = opaque;

    pthread_mutex_lock(&s->vm->machine.lock);
    for (unsigned i = 0; i < s->ops.count; i++)
        block_dirty_stop(s->block[i]);
    pthread_mutex_unlock(&s->vm->machine.lock);
}

static void contents(void *opaque, unsigned disk, uint64_t *bitmap)
{
    struct source_disks *s = opaque;

    pthread_mutex_lock(&s->vm->machine.lock);
    block_contents(s->block[disk], bitmap);
    pthread_mutex_unlock(&s->vm->machine.lock);
}

static void written(void *opaque, unsigned disk, uint64_t *bitmap)
{
    struct source_disks *s = opaque;

    pthread_mutex_lock(&s->vm->machine.lock);
    block_dirty_fetch(s->block[disk], bitmap);
    pthread_mutex_unlock(&s->vm->machine.lock);
}

static int read_disk(void *opaque, unsigned disk, uint64_t offset, void *buf, size_t len)
{
    struct source_disks *s = opaque;

    return block_read_aside(s->block[disk], s->fd[disk], offset, buf, len);
}

struct source_disks *source_disks_create(struct vm *vm, int *err)
{
    struct source_disks *s = calloc(1, sizeof(*s));

    *err = s ? 0 : -ENOMEM;
    if (!s) {
        log_error("out of memory");
        return NULL;
    }
    s->vm = vm;
    s->ops = (struct migrate_disks){ .opaque = s, .start = start, .stop = stop, .contents = contents, .written = written, .read = read_disk };
    for (unsigned i = 0; i < vm->parts.board.disk_count && !*err; i++) {
        struct block *b = vm->parts.disks[i].backend;
        unsigned n = s->ops.count;

        if (!block_is_local(b))
            continue;
        s->fd[n] = block_open_aside(b);
        if (s->fd[n] < 0) {
            *err = s->fd[n];
            break;
        }
        s->block[n] = b;
        s->ops.size[n] = block_size(b);
        s->ops.count++;
    }
    if (*err || !s->ops.count) {
        source_disks_free(s);
        s = NULL;
    }
    return s;
}

void source_disks_free(struct source_disks *s)
{
    for (unsigned i = 0; s && i < s->ops.count; i++)
        close(s->fd[i]);
    free(s);
}

const struct migrate_disks *source_disks_ops(const struct source_disks *s) { return &s->ops; }

bool source_disks_has(const struct source_disks *s, unsigned i)
{
    for (unsigned n = 0; s && n < s->ops.count; n++)
        if (s->block[n] == s->vm->parts.disks[i].backend)
            return true;
    return false;
}

/* ---- target ---- */

struct target_file {
    /* In the folder. Partial until the machine is this side's, so that what a killed target leaves is not taken for a disk. */
    char name[160], partial[176];
    char *path;                     /* of the partial one */
    int fd;
    uint64_t size;
    bool named;
};

struct target_disks {
    unsigned count;
    int dir;
    bool own_folder;
    char path[PATH_MAX];
    struct target_file file[MIGRATE_MAX_DISKS];
};

static int open_folder(struct target_disks *t, const char *folder, const char *machine)
{
    if (!folder) {
        t->own_folder = true;
        t->dir = snapshot_make_machine_folder(machine, t->path);
        return t->dir < 0 ? t->dir : 0;
    }
    snprintf(t->path, sizeof(t->path), "%.4000s", folder);
    t->dir = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (t->dir >= 0)
        return 0;
    t->dir = -1;
    log_error("%s: cannot put the machine's disks into this folder: %s", folder, strerror(errno));
    return -errno;
}

static int lock_partial(int fd, short type)
{
    struct flock fl = { .l_type = type, .l_whence = SEEK_SET };

    return fcntl(fd, F_OFD_SETLK, &fl) < 0 && (errno == EAGAIN || errno == EACCES) ? -EBUSY : 0;
}

/* What a target left that was killed; -EBUSY: it lives. */
static int clear_partial(int dir, const char *name)
{
    int fd = openat(dir, name, O_RDWR | O_CLOEXEC | O_NOFOLLOW), err;

    if (fd < 0)
        return errno == ENOENT ? 0 : -errno;
    err = lock_partial(fd, F_WRLCK);
    if (!err && unlinkat(dir, name, 0) < 0)
        err = -errno;
    close(fd);
    return err;
}

/* The file is counted, and so removed, from the moment that it is there. */
static int make_file(struct target_disks *t, struct vm_disk_config *d, const char *machine, unsigned index, uint64_t size)
{
    struct target_file *f = &t->file[t->count];
    char name[sizeof(f->name)], *path = NULL;
    int err;

    if (t->own_folder)
        snprintf(name, sizeof(name), "disk%u", index);
    else
        snprintf(name, sizeof(name), "%.128s.disk%u", machine, index);
    snprintf(f->name, sizeof(f->name), "%s", name);
    snprintf(f->partial, sizeof(f->partial), "%s" SNAPSHOT_PARTIAL, name);
    f->size = size;
    err = faccessat(t->dir, f->name, F_OK, AT_SYMLINK_NOFOLLOW) == 0 ? -EEXIST : clear_partial(t->dir, f->partial);
    if (err)
        goto out;
    f->fd = openat(t->dir, f->partial, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (f->fd < 0) {
        err = -errno;
        goto out;
    }
    t->count++;
    err = lock_partial(f->fd, F_WRLCK);
    if (!err && ftruncate(f->fd, (off_t)size) < 0)
        err = -errno;
    if (!err && (asprintf(&path, "%s/%s", t->path, f->name) < 0 || asprintf(&f->path, "%s/%s", t->path, f->partial) < 0))
        err = -ENOMEM;
    if (err)
        goto out;
    free((char *)d->block.path);
    d->block.path = path;
    d->block.until_named = f->path;
    return 0;
out:
    free(path);
    log_error("%s/%s: cannot make this file for the machine's disk: %s", t->path, f->name,
              err == -EBUSY ? "another machine is being received into it" : strerror(-err));
    return err;
}

int target_disks_create(const json_t *list, struct vm_config *c, const char *folder, struct target_disks **out)
{
    struct target_disks *t = NULL;
    int err = 0;

    *out = NULL;
    for (unsigned i = 0; i < c->disk_count && !err; i++) {
        const json_t *disk = json_array_get(list, i);
        json_int_t size = json_integer_value(json_object_get(disk, "size"));

        if (!json_is_true(json_object_get(disk, "copied")))
            continue;
        if (size <= 0 || size % 512) {
            log_error("the source's description of its disks is damaged");
            err = -EINVAL;
            break;
        }
        if (!t) {
            t = calloc(1, sizeof(*t));
            if (!t) {
                log_error("out of memory");
                return -ENOMEM;
            }
            t->dir = -1;
            err = open_folder(t, folder, c->name);
        }
        if (!err && t->count == MIGRATE_MAX_DISKS)
            err = -E2BIG;
        if (!err)
            err = make_file(t, &c->disks[i], c->name, i, (uint64_t)size);
    }
    if (err && t) {
        target_disks_remove(t);
        target_disks_free(t);
        t = NULL;
    }
    *out = t;
    return err;
}

int target_disks_write(struct target_disks *t, unsigned disk, uint64_t offset, const void *buf, size_t len)
{
    static const uint8_t zeroes[MIGRATE_DISK_GRANULE];
    const uint8_t *p = buf ? buf : zeroes;

    if (!t || disk >= t->count || offset > t->file[disk].size || len > t->file[disk].size - offset || len > sizeof(zeroes))
        return -EPROTO;
    if (!buf && fallocate(t->file[disk].fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)len) == 0)
        return 0;
    while (len) {
        ssize_t n = pwrite(t->file[disk].fd, p, len, (off_t)offset);

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -EIO;
        p += n;
        offset += (uint64_t)n;
        len -= (size_t)n;
    }
    return 0;
}

int target_disks_sync(struct target_disks *t)
{
    for (unsigned i = 0; t && i < t->count; i++)
        if (fdatasync(t->file[i].fd) < 0)
            return -errno;
    return target_disks_sync_names(t);
}

void target_disks_unlock(struct target_disks *t)
{
    for (unsigned i = 0; t && i < t->count; i++)
        lock_partial(t->file[i].fd, F_UNLCK);
}

/* Some file systems cannot rename without replacing; there it is looked before. */
static int rename_new(int dir, const char *from, const char *to)
{
    if (renameat2(dir, from, dir, to, RENAME_NOREPLACE) == 0)
        return 0;
    if (errno != EINVAL && errno != ENOSYS)
        return -errno;
    if (faccessat(dir, to, F_OK, AT_SYMLINK_NOFOLLOW) == 0)
        return -EEXIST;
    return renameat(dir, from, dir, to) < 0 ? -errno : 0;
}

int target_disks_name(struct target_disks *t)
{
    int err = 0;

    for (unsigned i = 0; t && i < t->count && !err; i++) {
        struct target_file *f = &t->file[i];

        if (f->named)
            continue;
        err = rename_new(t->dir, f->partial, f->name);
        f->named = !err;
        if (err)
            log_error("%s/%s: the machine's disk cannot get this name: %s", t->path, f->name, strerror(-err));
    }
    return err;
}

int target_disks_sync_names(struct target_disks *t) { return t && fsync(t->dir) < 0 ? -errno : 0; }

void target_disks_remove(struct target_disks *t)
{
    for (unsigned i = 0; t && i < t->count; i++)
        unlinkat(t->dir, t->file[i].named ? t->file[i].name : t->file[i].partial, 0);
    if (t && t->own_folder)
        rmdir(t->path);
}

void target_disks_free(struct target_disks *t)
{
    if (!t)
        return;
    for (unsigned i = 0; i < t->count; i++) {
        close(t->file[i].fd);
        free(t->file[i].path);
    }
    if (t->dir >= 0)
        close(t->dir);
    free(t);
}
