/*
 * Saving a snapshot while the guest runs.
 *
 * The guest stands still for as long as it takes to write down its processors and devices and to mark RAM and disks as "copy
 * before write"; everything else happens while it runs. Pages that it is about to write are copied in memory by
 * whoever writes them, and put into the file by the thread that saves; when that one cannot keep up, writers write
 * their page themselves, which holds them back. Zero pages are holes of the file, at each page's own place, so that a restored
 * machine can map it.
 *
 * With an engine whose vCPUs do not look at page flags, the kernel stops their writes (memory/protect.c). Where it does not, RAM is
 * written before that moment, and then what the engine's dirty log says was written since, in rounds; the guest stands still for the last one.
 */
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "backend/block/block.h"
#include "base/log.h"
#include "base/state.h"
#include "base/util.h"
#include "vm/config.h"
#include "vm/snapshot.h"
#include "vm/snapshot_pack.h"
#include "vm/snapshot_store.h"
#include "vm/state_file.h"
#include "vm/vm_internal.h"

#define BATCH 64u               /* pages */
/* Copies of pages that wait to be written: at least this, else a share of RAM. */
#define MIN_WAITING MIB(32)
#define WAITING_SHARE 8
/* Rounds after the dirty log end when so little is left, or when they bring nothing. */
#define FEW_BYTES MIB(8)
#define MAX_ROUNDS 8
#define PIECE KIB(256)

struct page_copy {
    struct page_copy *next;
    gpa_t gpa;
    uint8_t bytes[GUEST_PAGE_SIZE];
};

struct saver {
    struct vm *vm;
    const char *name;
    bool compress;
    char root_path[PATH_MAX], path[PATH_MAX], folder[VM_SNAPSHOT_NAME_MAX + 32];
    int root, dir, memory_fd;
    struct state_writer *state;
    char created[32];
    const char *engine;
    struct memory_protect *protect; /* stops writes of an engine whose vCPUs do not look at flags; NULL: none */
    bool logging;               /* after the dirty log: what is below of RAM has been written once */
    uint64_t *dirty[MEMORY_MAX_REGIONS];
    unsigned disks;             /* whose copies have begun: the first so many of the configuration's */
    struct vm_snapshot_result result;

    pthread_mutex_t lock;       /* guards what follows; a leaf */
    struct page_copy *copies, **copies_tail;
    uint64_t waiting, max_waiting;
    int error;                  /* of writing RAM; the first one */
};

static uint64_t monotonic_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---- RAM ---- */

static uint64_t file_offset(const struct memory *m, gpa_t gpa)
{
    for (unsigned i = 0; i < m->regions; i++)
        if (gpa - m->region[i].base < m->region[i].size)
            return snapshot_region_offset(m, i) + (gpa - m->region[i].base);
    return 0;                   /* not reached: pages are RAM */
}

static bool is_zero(const uint8_t *page)
{
    return page[0] == 0 && memcmp(page, page + 1, GUEST_PAGE_SIZE - 1) == 0;
}

/* Any thread. */
static void write_bytes(struct saver *s, uint64_t offset, const uint8_t *bytes, size_t len)
{
    int err = 0;

    for (size_t done = 0; done < len && !err;) {
        ssize_t n = pwrite(s->memory_fd, bytes + done, len - done, (off_t)(offset + done));

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            err = n < 0 ? -errno : -EIO;
        else
            done += (size_t)n;
    }
    pthread_mutex_lock(&s->lock);
    if (err && !s->error)
        s->error = err;
    s->result.memory_bytes += err ? 0 : len;
    pthread_mutex_unlock(&s->lock);
}

/* A page is about to be written. Any thread; memory's lock held. */
static void copy_page(void *opaque, gpa_t gpa, const uint8_t *bytes)
{
    struct saver *s = opaque;
    struct page_copy *c;
    bool full;

    if (is_zero(bytes))
        return;
    pthread_mutex_lock(&s->lock);
    full = s->waiting >= s->max_waiting;
    pthread_mutex_unlock(&s->lock);
    c = full ? NULL : malloc(sizeof(*c));
    if (!c) {
        write_bytes(s, file_offset(&s->vm->machine.memory, gpa), bytes, GUEST_PAGE_SIZE);
        return;
    }
    c->next = NULL;
    c->gpa = gpa;
    memcpy(c->bytes, bytes, GUEST_PAGE_SIZE);
    pthread_mutex_lock(&s->lock);
    *s->copies_tail = c;
    s->copies_tail = &c->next;
    s->waiting += GUEST_PAGE_SIZE;
    pthread_mutex_unlock(&s->lock);
}

/* Writes the copies that others made. */
static void write_copies(struct saver *s)
{
    struct page_copy *c;

    pthread_mutex_lock(&s->lock);
    c = s->copies;
    s->copies = NULL;
    s->copies_tail = &s->copies;
    pthread_mutex_unlock(&s->lock);
    while (c) {
        struct page_copy *next = c->next;

        write_bytes(s, file_offset(&s->vm->machine.memory, c->gpa), c->bytes, GUEST_PAGE_SIZE);
        free(c);
        pthread_mutex_lock(&s->lock);
        s->waiting -= GUEST_PAGE_SIZE;
        pthread_mutex_unlock(&s->lock);
        c = next;
    }
}

/* Pages that stand side by side go out in one piece. */
static void write_batch(struct saver *s, const gpa_t *gpa, const uint8_t *buf, unsigned count)
{
    for (unsigned i = 0, n; i < count; i += n) {
        for (n = 0; i + n < count && gpa[i + n] == gpa[i] + n * GUEST_PAGE_SIZE &&
                    !is_zero(buf + (size_t)(i + n) * GUEST_PAGE_SIZE);)
            n++;
        if (n)
            write_bytes(s, file_offset(&s->vm->machine.memory, gpa[i]), buf + (size_t)i * GUEST_PAGE_SIZE,
                        (size_t)n * GUEST_PAGE_SIZE);
        else
            n = 1;              /* a page of zeroes */
    }
}

/* All of RAM but what others have copied. */
static int save_memory(struct saver *s)
{
    struct memory *m = &s->vm->machine.memory;
    uint8_t *buf = malloc(BATCH * GUEST_PAGE_SIZE);
    uint64_t cursor = 0;
    gpa_t gpa[BATCH];
    unsigned n;

    if (!buf)
        return -ENOMEM;
    do {
        write_copies(s);
        n = memory_save_next(m, &cursor, BATCH, gpa, buf);
        write_batch(s, gpa, buf, n);
    } while (n && !s->error && !atomic_load(&s->vm->save_cancelled));
    free(buf);
    return atomic_load(&s->vm->save_cancelled) ? -ECANCELED : 0;
}

static void end_memory(struct saver *s)
{
    memory_save_end(&s->vm->machine.memory);
    write_copies(s);
}

/* Whether pages are copied before they are written. Else RAM is written in rounds after the dirty log. */
static bool copies_before_write(const struct saver *s) { return s->vm->engine->checks_pages || s->protect; }

/* ---- RAM after the dirty log ---- */

/* Everything that the guest ever touched. The file has zeroes already. */
static void write_region(struct saver *s, unsigned index)
{
    struct memory_region *r = &s->vm->machine.memory.region[index];
    uint64_t at = 0, end = 0;

    while (at < r->size && !s->error && !atomic_load(&s->vm->save_cancelled)) {
        uint64_t n;

        if (at >= end && r->fd >= 0) {
            off_t data = lseek(r->fd, (off_t)at, SEEK_DATA);
            off_t hole = data < 0 ? -1 : lseek(r->fd, data, SEEK_HOLE);

            if (data < 0 && errno == ENXIO)
                break;
            at = data < 0 ? at : align_down((uint64_t)data, GUEST_PAGE_SIZE);
            end = hole < 0 ? r->size : (uint64_t)hole;
        }
        n = MIN(PIECE, r->size - at);
        for (uint64_t page = at; page < at + n; page += GUEST_PAGE_SIZE)
            if (!is_zero(r->host + page))
                write_bytes(s, snapshot_region_offset(&s->vm->machine.memory, index) + page, r->host + page, GUEST_PAGE_SIZE);
        at += n;
    }
}

/* Writes what was written to since the last round. Bytes, or a negative errno. */
static int64_t write_dirty(struct saver *s)
{
    struct memory *m = &s->vm->machine.memory;
    int64_t bytes = 0;
    int err;

    for (unsigned i = 0; i < m->regions; i++)
        memset(s->dirty[i], 0, memory_bitmap_words(&m->region[i]) * sizeof(uint64_t));
    err = memory_dirty_fetch(m, s->dirty);
    if (err)
        return err;
    for (unsigned i = 0; i < m->regions; i++)
        for (size_t word = 0; word < memory_bitmap_words(&m->region[i]); word++)
            for (uint64_t bits = s->dirty[i][word]; bits; bits &= bits - 1) {
                uint64_t offset = (word * 64 + (unsigned)__builtin_ctzll(bits)) << GUEST_PAGE_SHIFT;

                write_bytes(s, snapshot_region_offset(m, i) + offset, m->region[i].host + offset, GUEST_PAGE_SIZE);
                bytes += GUEST_PAGE_SIZE;
            }
    return bytes;
}

static void end_log(struct saver *s)
{
    if (s->logging)
        memory_dirty_stop(&s->vm->machine.memory);
    s->logging = false;
    memory_bitmaps_free(s->dirty);
}

/* While the guest runs. Without a log (a migration has it) RAM is written while it stands. */
static int write_ahead(struct saver *s)
{
    struct memory *m = &s->vm->machine.memory;
    int64_t before = INT64_MAX, bytes;

    if (memory_bitmaps_alloc(m, s->dirty)) {
        log_error("out of memory");
        return -ENOMEM;
    }
    s->logging = memory_dirty_start(m) == 0;
    for (unsigned i = 0; s->logging && i < m->regions; i++)
        write_region(s, i);
    for (unsigned round = 0; s->logging && round < MAX_ROUNDS && !s->error; round++) {
        bytes = write_dirty(s);
        if (bytes < 0)
            return (int)bytes;
        if (bytes < (int64_t)FEW_BYTES || bytes > before / 4 * 3)
            break;
        before = bytes;
    }
    return atomic_load(&s->vm->save_cancelled) ? -ECANCELED : 0;
}

/* The guest stands still. */
static int write_rest(struct saver *s)
{
    int64_t bytes = 0;

    if (s->logging)
        bytes = write_dirty(s);
    else
        for (unsigned i = 0; i < s->vm->machine.memory.regions; i++)
            write_region(s, i);
    end_log(s);
    return bytes < 0 ? (int)bytes : 0;
}

/* ---- the moment ---- */

static int begin_disks(struct saver *s)
{
    const struct vm_config *c = s->vm->config;
    int err = 0;

    for (unsigned i = 0; i < c->disk_count && !err; i++) {
        char name[32];
        int fd;

        if (!c->disks[i].block.readonly) {
            snprintf(name, sizeof(name), "disk%u", i);
            fd = openat(s->dir, name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
            if (fd < 0) {
                err = -errno;
                log_error("%s/%s: cannot write: %s", s->path, name, strerror(-err));
                break;
            }
            err = block_save_begin(s->vm->parts.disks[i].backend, fd, &s->vm->save_cancelled);
        }
        s->disks += !err;
    }
    return err;
}

/* Cancels or awaits the disks' copies. */
static int end_disks(struct saver *s, int err)
{
    for (unsigned i = 0; i < s->disks; i++) {
        struct block *b = s->vm->parts.disks[i].backend;
        uint64_t bytes = 0;
        int r;

        if (s->vm->config->disks[i].block.readonly)
            continue;
        if (err)
            atomic_store(&s->vm->save_cancelled, true);
        r = block_save_wait(b, &bytes);
        err = err ? err : r;
        s->result.disk_bytes += bytes;
        pthread_mutex_lock(&s->vm->machine.lock);
        block_save_end(b);
        pthread_mutex_unlock(&s->vm->machine.lock);
    }
    return err;
}

/* The guest stands still from here to the return. */
static int take(struct saver *s, bool *memory_begun)
{
    struct vm *vm = s->vm;
    uint64_t start = monotonic_ns();
    int err = vm_pause(vm, VM_HOLD_SAVE);

    if (err) {
        if (err == -ESHUTDOWN)
            log_error("the machine has ended: there is nothing to save");
        return err;
    }
    pthread_mutex_lock(&vm->life);
    pthread_mutex_lock(&vm->machine.lock);
    s->engine = vm->engine->name;
    err = vm_save_held(vm, s->state);
    if (!err && copies_before_write(s)) {
        err = memory_save_begin(&vm->machine.memory, copy_page, s);
        *memory_begun = !err;
        if (err)
            log_error("memory is being saved already");
        else if (s->protect)
            err = memory_protect_moment(s->protect);
    }
    if (!err)
        err = begin_disks(s);
    pthread_mutex_unlock(&vm->machine.lock);
    pthread_mutex_unlock(&vm->life);
    if (!err && !copies_before_write(s))
        err = write_rest(s);
    vm_resume(vm, VM_HOLD_SAVE);
    s->result.pause_ns = monotonic_ns() - start;
    return err;
}

/* ---- the folder ---- */

static int open_folder(struct saver *s)
{
    struct stat st;
    int err;

    s->root = snapshot_open_root("snapshots", s->root_path);
    if (s->root < 0)
        return s->root;
    snapshot_sweep(s->root);
    if (fstatat(s->root, s->name, &st, AT_SYMLINK_NOFOLLOW) == 0) {
        log_error("there is a snapshot %s already: choose another name, or remove that one: ringfort snapshot rm %s", s->name,
                  s->name);
        return -EEXIST;
    }
    snprintf(s->folder, sizeof(s->folder), ".new-%s-%ld", s->name, (long)getpid());
    snprintf(s->path, sizeof(s->path), "%.2000s/%s", s->root_path, s->folder);
    if (mkdirat(s->root, s->folder, 0700) < 0)
        goto failed;
    s->dir = openat(s->root, s->folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (s->dir < 0 || flock(s->dir, LOCK_EX | LOCK_NB) < 0)
        goto failed;
    s->memory_fd = openat(s->dir, SNAPSHOT_MEMORY, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (s->memory_fd < 0 || ftruncate(s->memory_fd, (off_t)snapshot_region_offset(&s->vm->machine.memory,
                                                                          s->vm->machine.memory.regions)) < 0)
        goto failed;
    return 0;

failed:
    err = -errno;
    log_error("%s: cannot write: %s", s->path, strerror(-err));
    return err;
}

static int write_meta(struct saver *s)
{
    const struct vm_config *c = s->vm->config;
    json_t *disks = json_array(), *meta;
    int err;

    for (unsigned i = 0; i < c->disk_count; i++) {
        char name[32];

        snprintf(name, sizeof(name), "disk%u", i);
        json_array_append_new(disks, c->disks[i].block.readonly ? json_null() : json_string(name));
    }
    meta = json_pack("{s:i, s:s, s:s, s:s, s:s, s:i, s:I, s:o}", "version", snapshot_version(s->compress), "ringfort", RINGFORT_VERSION, "machine",
                     c->name, "created", s->created, "engine", s->engine, "cpus", (int)c->cpus, "memory",
                     (json_int_t)c->memory, "disks", disks);
    if (!meta) {
        log_error("out of memory");
        return -ENOMEM;
    }
    err = snapshot_write_meta(s->dir, s->path, meta);
    json_decref(meta);
    return err;
}

static int compress_memory(struct saver *s)
{
    int fd = openat(s->dir, SNAPSHOT_PACKED, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    int err = fd < 0 ? -errno : snapshot_pack(s->memory_fd, fd, &s->vm->save_cancelled);

    if (fd >= 0)
        close(fd);
    if (!err && unlinkat(s->dir, SNAPSHOT_MEMORY, 0) < 0)
        err = -errno;
    if (err && err != -ECANCELED)
        log_error("%s/%s: cannot write: %s", s->path, SNAPSHOT_PACKED, strerror(-err));
    return err;
}

/* The copy of an overlay is one on the same files. */
static int link_bases(struct saver *s)
{
    const struct vm_config *c = s->vm->config;
    int err = 0;

    for (unsigned i = 0; i < c->disk_count && !err; i++) {
        char folder[PATH_MAX];
        int fd;

        if (c->disks[i].block.readonly || !block_is_overlay(s->vm->parts.disks[i].backend))
            continue;
        snprintf(folder, sizeof(folder), "%s", c->disks[i].block.path);
        fd = open(dirname(folder), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        err = fd < 0 ? -errno : snapshot_link_bases(fd, s->dir, c->disks[i].block.path);
        if (fd >= 0)
            close(fd);
    }
    return err;
}

/* Everything is on disk: gives it its name. */
static int publish(struct saver *s)
{
    int err = 0;

    if ((!s->compress && fsync(s->memory_fd) < 0) || fsync(s->dir) < 0)
        err = -errno;
    if (!err && renameat(s->root, s->folder, s->root, s->name) < 0)
        err = -errno;
    if (!err && fsync(s->root) < 0)
        err = -errno;
    if (err)
        log_error("snapshot %s: cannot store it: %s", s->name, strerror(-err));
    return err;
}

static int finish_state(struct saver *s)
{
    const void *stream;
    size_t len;
    int err = state_writer_finish(s->state, &stream, &len);

    if (err) {
        log_error("snapshot %s: cannot write down the machine's state: %s", s->name, strerror(-err));
        return err;
    }
    return state_file_write(s->dir, SNAPSHOT_STATE, s->path, stream, len);
}

static int save(struct saver *s)
{
    bool memory_begun = false;
    int err = vm_await_memory(s->vm, &s->vm->save_cancelled);

    if (err == -ESHUTDOWN)
        log_error("the machine has ended: there is nothing to save");
    if (!err)
        err = open_folder(s);
    if (err)
        return err;
    for (unsigned i = 0; i < s->vm->config->disk_count; i++)
        block_presync(s->vm->parts.disks[i].backend);
    if (!s->vm->engine->checks_pages)
        s->protect = memory_protect_create(&s->vm->machine.memory);
    if (!copies_before_write(s))
        err = write_ahead(s);
    if (!err)
        err = take(s, &memory_begun);
    if (!err)
        err = finish_state(s);
    if (!err && memory_begun)
        err = save_memory(s);
    if (memory_begun)
        end_memory(s);
    memory_protect_destroy(s->protect);
    s->protect = NULL;
    end_log(s);
    if (!err && s->error) {
        err = s->error;
        log_error("%s/%s: cannot write: %s", s->path, SNAPSHOT_MEMORY, strerror(-err));
    }
    err = end_disks(s, err);
    if (!err && s->compress)
        err = compress_memory(s);
    if (!err)
        err = link_bases(s);
    if (!err)
        err = write_meta(s);
    return err ? err : publish(s);
}

/* One at a time, and none while the machine is being destroyed. */
static int enter(struct vm *vm)
{
    int err = 0;

    pthread_mutex_lock(&vm->gate);
    if (vm->saving)
        err = -EBUSY;
    else
        vm->saving = true;
    if (!err)
        atomic_store(&vm->save_cancelled, false);
    pthread_mutex_unlock(&vm->gate);
    if (err)
        log_error("a snapshot of this machine is being saved already; wait until it is done");
    return err;
}

static void leave(struct vm *vm)
{
    pthread_mutex_lock(&vm->gate);
    vm->saving = false;
    pthread_cond_broadcast(&vm->gate_changed);
    pthread_mutex_unlock(&vm->gate);
}

void vm_snapshot_drain(struct vm *vm)
{
    pthread_mutex_lock(&vm->gate);
    while (vm->saving)
        pthread_cond_wait(&vm->gate_changed, &vm->gate);
    pthread_mutex_unlock(&vm->gate);
}

void vm_snapshot_cancel(struct vm *vm) { atomic_store(&vm->save_cancelled, true); }

int vm_snapshot_save(struct vm *vm, const char *name, bool compress, struct vm_snapshot_result *out)
{
    uint64_t start = monotonic_ns();
    time_t now = time(NULL);
    struct tm tm;
    int err = snapshot_check_name(name);
    struct saver *s;

    if (!err)
        err = enter(vm);
    if (err)
        return err;
    s = calloc(1, sizeof(*s));
    if (!s || !(s->state = state_writer_create())) {
        log_error("out of memory");
        free(s);
        leave(vm);
        return -ENOMEM;
    }
    s->vm = vm;
    s->name = name;
    s->compress = compress;
    s->root = s->dir = s->memory_fd = -1;
    s->copies_tail = &s->copies;
    s->max_waiting = MAX(MIN_WAITING, vm->config->memory / WAITING_SHARE);
    strftime(s->created, sizeof(s->created), "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&now, &tm));
    pthread_mutex_init(&s->lock, NULL);
    err = save(s);
    s->result.total_ns = monotonic_ns() - start;
    if (err && s->dir >= 0)
        snapshot_remove_tree(s->root, s->folder);
    *out = s->result;
    if (s->memory_fd >= 0)
        close(s->memory_fd);
    if (s->dir >= 0)
        close(s->dir);
    if (s->root >= 0)
        close(s->root);
    state_writer_free(s->state);
    pthread_mutex_destroy(&s->lock);
    free(s);
    leave(vm);
    return err;
}
