/*
 * See snapshot_fill.h.
 *
 * Two threads unpack: that of memory/missing.h, which is told of the pages that are wanted, and the filler, which goes through
 * all chunks. Both may do the same chunk; a page is placed once. When a page is wanted its chunk's contents are placed where each
 * occurs first, which is near, and in the page itself; where a content occurs a hundred thousand times the filler has time for it.
 */
#include "vm/snapshot_fill.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "base/thread.h"
#include "base/util.h"
#include "memory/missing.h"
#include "vm/snapshot_pack.h"
#include "vm/snapshot_store.h"
#include "vm/vm_internal.h"

struct snapshot_fill {
    struct vm *vm;
    struct memory *memory;
    char *name;
    struct snapshot_packed packed;
    uint32_t *first, *next;     /* page + 1 that has the content first; that has the same content as the page next; 0: none */
    struct memory_missing *missing;         /* NULL: all pages are there */
    struct snapshot_unpacker *on_demand, *ahead;    /* of the two threads */
    pthread_t thread;
    bool started;
    _Atomic bool stop;
    pthread_mutex_t lock;       /* guards what follows */
    bool running;               /* the machine may run */
    int error;                  /* the first one; logged */
};

/* Where a page of the memory file is. False: it is not RAM. */
static bool locate(const struct memory *m, uint32_t page, unsigned *region, uint64_t *in_region)
{
    for (unsigned i = 0; i < m->regions; i++) {
        uint64_t offset = page - (snapshot_region_offset(m, i) >> GUEST_PAGE_SHIFT);

        if (offset < m->region[i].size >> GUEST_PAGE_SHIFT) {
            *region = i;
            *in_region = offset;
            return true;
        }
    }
    return false;
}

static int place(struct snapshot_fill *f, struct memory_missing *missing, uint32_t page, const uint8_t *bytes)
{
    unsigned region = 0;
    uint64_t in_region = 0;

    locate(f->memory, page, &region, &in_region);   /* list() has refused others */
    if (missing)
        return memory_missing_place(missing, region, in_region, bytes);
    memcpy(f->memory->region[region].host + (in_region << GUEST_PAGE_SHIFT), bytes, GUEST_PAGE_SIZE);
    return 0;
}

/* ---- what cannot be had ---- */

/* waited: somebody cannot go on without it. */
static void failed(struct snapshot_fill *f, uint32_t chunk, int err, bool waited)
{
    bool first, running;

    pthread_mutex_lock(&f->lock);
    first = !f->error;
    if (first)
        f->error = err;
    running = f->running;
    pthread_mutex_unlock(&f->lock);
    if (first)
        log_error("%s: %s at byte %llu; %s", f->name, err == -EINVAL ? "it is damaged" : strerror(-err),
                  (unsigned long long)f->packed.chunk[chunk].offset,
                  !running ? "was it copied completely?"
                  : waited ? "the machine ends at once, as it cannot go on without that part of its memory: "
                             "what it wrote to its disks is as after a power failure"
                           : "the machine ends, as it cannot have that part of its memory");
    /* Whoever waits cannot be let go without contents; a terminal that shows the console is put back. */
    if (running && waited)
        quick_exit(VM_STATUS_BACKEND);
    if (running && first)
        vm_end_because(f->vm, VM_STATUS_BACKEND, "backend");
}

/* ---- unpacking ---- */

static bool is_there(const struct snapshot_fill *f, uint32_t chunk)
{
    uint32_t content = snapshot_chunk_first(chunk), end = content + snapshot_chunk_contents(&f->packed, chunk);

    for (; content < end; content++)
        for (uint32_t page = f->first[content]; page; page = f->next[page - 1]) {
            unsigned region = 0;
            uint64_t in_region = 0;

            locate(f->memory, page - 1, &region, &in_region);
            if (memory_missing_is(f->missing, region, in_region))
                return false;
        }
    return true;
}

static int unpack_all(struct snapshot_fill *f, uint32_t chunk)
{
    uint32_t content = snapshot_chunk_first(chunk), end = content + snapshot_chunk_contents(&f->packed, chunk);
    int err;
    const uint8_t *bytes = snapshot_unpack(f->ahead, &f->packed, chunk, &err);

    for (; !err && content < end; content++, bytes += GUEST_PAGE_SIZE)
        for (uint32_t page = f->first[content]; page && !err; page = f->next[page - 1])
            err = place(f, f->missing, page - 1, bytes);
    return err;
}

static void wanted(void *opaque, struct memory_missing *missing, unsigned region, uint64_t in_region)
{
    struct snapshot_fill *f = opaque;
    uint32_t page = (uint32_t)((snapshot_region_offset(f->memory, region) >> GUEST_PAGE_SHIFT) + in_region);
    uint32_t content = f->packed.content[page], chunk = snapshot_chunk_of(content), c = snapshot_chunk_first(chunk);
    uint32_t end = c + snapshot_chunk_contents(&f->packed, chunk);
    int err;
    const uint8_t *bytes = snapshot_unpack(f->on_demand, &f->packed, chunk, &err);

    if (!err)
        err = place(f, missing, page, bytes + (size_t)(content - c) * GUEST_PAGE_SIZE);
    for (; !err && c < end; c++, bytes += GUEST_PAGE_SIZE)
        if (f->first[c])
            err = place(f, missing, f->first[c] - 1, bytes);
    if (!err)
        return;
    failed(f, chunk, err, true);
    /* It never runs, and its loading need not wait for ever. */
    memory_missing_place(missing, region, in_region, NULL);
}

/* Nobody unpacks any more. */
static void release(struct snapshot_fill *f)
{
    memory_missing_destroy(f->missing);
    f->missing = NULL;
    if (f->packed.fd >= 0)
        close(f->packed.fd);
    snapshot_packed_close(&f->packed);
    snapshot_unpacker_free(f->on_demand);
    snapshot_unpacker_free(f->ahead);
    free(f->first);
    free(f->next);
    f->on_demand = f->ahead = NULL;
    f->first = f->next = NULL;
}

static void *filler_main(void *opaque)
{
    struct snapshot_fill *f = opaque;

    for (uint32_t chunk = 0; chunk < f->packed.chunks; chunk++) {
        int err = 0;

        if (atomic_load(&f->stop))
            return NULL;
        if (!is_there(f, chunk))
            err = unpack_all(f, chunk);
        if (err) {
            failed(f, chunk, err, false);
            return NULL;
        }
    }
    log_info("%s: all of it is unpacked", f->name);
    release(f);
    return NULL;
}

/* ---- life ---- */

/* The pages of each content, and which are not zero. */
static int list(struct snapshot_fill *f, uint64_t *missing[MEMORY_MAX_REGIONS])
{
    f->first = calloc((size_t)f->packed.contents + 1, sizeof(*f->first));
    f->next = malloc(MAX(f->packed.pages, 1) * sizeof(*f->next));
    if (!f->first || !f->next)
        return -ENOMEM;
    for (uint32_t page = f->packed.pages; page-- > 0;) {
        uint32_t content = f->packed.content[page];
        unsigned region;
        uint64_t in_region;

        if (!content)
            continue;
        if (!locate(f->memory, page, &region, &in_region))
            return -EINVAL;
        f->next[page] = f->first[content];
        f->first[content] = page + 1;
        missing[region][in_region / 64] |= 1ull << (in_region % 64);
    }
    return 0;
}

/* No page is there: also not what making the machine may have put there. */
static int empty(const struct memory *m)
{
    for (unsigned i = 0; i < m->regions; i++)
        if (fallocate(m->region[i].fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)m->region[i].size) < 0)
            return -errno;
    return 0;
}

static int unpack_now(struct snapshot_fill *f)
{
    int err = 0;

    for (uint32_t chunk = 0; chunk < f->packed.chunks && !err; chunk++) {
        err = unpack_all(f, chunk);
        if (err)
            failed(f, chunk, err, false);
    }
    return err;
}

static int create(struct snapshot_fill *f, bool *later)
{
    struct memory *m = f->memory;
    uint64_t *missing[MEMORY_MAX_REGIONS] = { 0 };
    bool kernel;
    int err = memory_bitmaps_alloc(m, missing);

    if (!err)
        err = list(f, missing);
    if (!err)
        err = empty(m);
    if (!err && (!(f->on_demand = snapshot_unpacker_create()) || !(f->ahead = snapshot_unpacker_create())))
        err = -ENOMEM;
    *later = !err && memory_missing_usable(&kernel) == 0 && (kernel || f->vm->engine->checks_pages);
    if (*later)
        f->missing = memory_missing_create(m, missing, wanted, f, &err);
    memory_bitmaps_free(missing);
    return err;
}

int snapshot_fill_create(struct vm *vm, int packed_fd, const char *name, struct snapshot_fill **out)
{
    struct snapshot_fill *f = calloc(1, sizeof(*f));
    struct memory *m = &vm->machine.memory;
    int fd = fcntl(packed_fd, F_DUPFD_CLOEXEC, 0), err = fd < 0 ? -errno : 0;
    bool later = false;

    *out = NULL;
    if (!f || !(f->name = strdup(name))) {
        log_error("out of memory");
        free(f);
        if (fd >= 0)
            close(fd);
        return -ENOMEM;
    }
    pthread_mutex_init(&f->lock, NULL);
    f->vm = vm;
    f->memory = m;
    if (!err)
        err = snapshot_packed_open(&f->packed, fd, snapshot_region_offset(m, m->regions) >> GUEST_PAGE_SHIFT);
    f->packed.fd = fd;
    if (!err)
        err = create(f, &later);
    if (err)
        log_error("%s: %s", name, err == -EINVAL ? "it is damaged; was it copied completely?" : strerror(-err));
    if (!err && !later) {
        log_info("%s: unpacked before the machine runs, as this process may not use userfaultfd for its engine", name);
        err = unpack_now(f);
    }
    if (!err && later)
        *out = f;
    else
        snapshot_fill_destroy(f);
    return err;
}

int snapshot_fill_begin(struct snapshot_fill *f)
{
    int err;

    pthread_mutex_lock(&f->lock);
    err = f->error;
    f->running = !err;
    pthread_mutex_unlock(&f->lock);
    if (err)
        return err;
    err = thread_start(&f->thread, 0, filler_main, f);
    f->started = !err;
    if (err)
        log_error("cannot start a thread: %s", strerror(-err));
    return err;
}

void snapshot_fill_destroy(struct snapshot_fill *f)
{
    if (!f)
        return;
    atomic_store(&f->stop, true);
    if (f->started)
        pthread_join(f->thread, NULL);
    release(f);
    free(f->name);
    pthread_mutex_destroy(&f->lock);
    free(f);
}
