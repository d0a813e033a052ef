/*
 * Guest physical memory: memfd mappings and their page flags.
 *
 * The list of regions does not change once vCPUs run, so nothing here takes a lock. Flags are
 * set and read as atomics. Order matters between a device that writes a page and an engine that
 * decodes code of it: the engine sets PAGE_CODE and then reads the bytes, the device writes the
 * bytes and then reads the flag, each with a full fence between, so at least one of them sees the
 * other.
 */
#include "memory/memory.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"
#include "memory/missing.h"

#define HUGE_PAGE MIB(2)

int memory_init(struct memory *m)
{
    memset(m, 0, sizeof(*m));
    pthread_mutex_init(&m->dirty_lock, NULL);
    pthread_mutex_init(&m->save_lock, NULL);
    pthread_rwlock_init(&m->missing_lock, NULL);
    return 0;
}

void memory_destroy(struct memory *m)
{
    for (unsigned i = 0; i < m->regions; i++) {
        struct memory_region *r = &m->region[i];
        munmap(r->host, r->size);
        if (r->fd >= 0)
            close(r->fd);
        free((void *)r->flags);
    }
    m->regions = 0;
    pthread_mutex_destroy(&m->dirty_lock);
    pthread_mutex_destroy(&m->save_lock);
    pthread_rwlock_destroy(&m->missing_lock);
}

/* Maps fd so that host and guest addresses agree in their offset within a huge page. NULL with
 * errno. */
static uint8_t *map_ram(int fd, gpa_t base, uint64_t size)
{
    uint64_t span = size + HUGE_PAGE;
    uint8_t *space =
        mmap(NULL, span, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (space == MAP_FAILED)
        return NULL;
    uint8_t *host = space + ((base - (uintptr_t)space) & (HUGE_PAGE - 1));
    if (mmap(host, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE | MAP_FIXED, fd, 0) ==
        MAP_FAILED) {
        int err = errno;
        munmap(space, span);
        errno = err;
        return NULL;
    }
    uint64_t before = (uint64_t)(host - space), after = span - size - before;
    if (before)
        munmap(space, before);
    if (after)
        munmap(host + size, after);
    /* Both are wishes: a host that refuses them works as well, slower or with bigger core files. */
    madvise(host, size, MADV_HUGEPAGE);
    madvise(host, size, MADV_DONTDUMP);
    return host;
}

int memory_add_ram(struct memory *m, gpa_t base, uint64_t size)
{
    if ((base | size) & ~GUEST_PAGE_MASK || size == 0 || base + (size - 1) < base ||
        size > INT64_MAX - HUGE_PAGE)
        return -EINVAL;
    for (unsigned i = 0; i < m->regions; i++)
        if (base < m->region[i].base + m->region[i].size && m->region[i].base < base + size)
            return -EEXIST;
    if (m->regions == MEMORY_MAX_REGIONS) {
        log_error("more than %d regions of guest memory", MEMORY_MAX_REGIONS);
        return -ENOMEM;
    }

    struct memory_region r = {.base = base, .size = size, .fd = -1};
    int err;
    char name[64];
    snprintf(name, sizeof(name), "ringfort-ram-%#llx", (unsigned long long)base);
    r.fd = memfd_create(name, MFD_CLOEXEC);
    if (r.fd < 0 || ftruncate(r.fd, (off_t)size) < 0) {
        err = errno;
        goto out;
    }
    r.flags = calloc(size >> GUEST_PAGE_SHIFT, 1);
    if (!r.flags) {
        err = ENOMEM;
        goto out;
    }
    r.host = map_ram(r.fd, base, size);
    if (!r.host) {
        err = errno;
        goto out;
    }
    m->region[m->regions++] = r;
    return 0;

out:
    log_error("cannot get %llu MiB of guest memory: %s; try a smaller --memory",
              (unsigned long long)(size >> 20), strerror(err));
    free((void *)r.flags);
    if (r.fd >= 0)
        close(r.fd);
    return -ENOMEM;
}

int memory_map_file(struct memory *m, unsigned region, int fd, uint64_t offset)
{
    struct memory_region *r = &m->region[region];
    if (mmap(r->host, r->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE | MAP_FIXED, fd,
             (off_t)offset) == MAP_FAILED)
        return -errno;
    madvise(r->host, r->size, MADV_DONTDUMP);
    close(r->fd);
    r->fd = -1;
    return 0;
}

/* In place of the file's pages; they cannot be made to be zero otherwise than by writing them. */
static bool leave_file(struct memory_region *r)
{
    int fd = memfd_create("ringfort-ram", MFD_CLOEXEC);
    if (fd >= 0 && ftruncate(fd, (off_t)r->size) == 0 &&
        mmap(r->host, r->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE | MAP_FIXED, fd, 0) !=
            MAP_FAILED) {
        madvise(r->host, r->size, MADV_HUGEPAGE);
        madvise(r->host, r->size, MADV_DONTDUMP);
        r->fd = fd;
        return true;
    }
    if (fd >= 0)
        close(fd);
    return false;
}

/* Whole pages. What is still to come from elsewhere is dropped. False: they have to be written. */
static bool remove_pages(struct memory *m, struct memory_region *r, gpa_t first, gpa_t last)
{
    uint64_t offset = first - r->base, len = last - first;
    bool removed;

    pthread_rwlock_wrlock(&m->missing_lock);
    if (m->missing)
        memory_missing_drop(m->missing, (unsigned)(r - m->region), offset, len);
    removed = r->fd >= 0 && madvise(r->host + offset, len, MADV_REMOVE) == 0;
    pthread_rwlock_unlock(&m->missing_lock);
    return removed;
}

bool memory_complete(struct memory *m)
{
    bool complete;

    pthread_rwlock_rdlock(&m->missing_lock);
    complete = !m->missing;
    pthread_rwlock_unlock(&m->missing_lock);
    return complete;
}

void memory_clear(struct memory *m, gpa_t gpa, uint64_t len)
{
    struct memory_region *r = memory_find(m, gpa);
    if (!r || !len || len > r->size - (gpa - r->base))
        return;
    uint8_t *host = r->host + (gpa - r->base);
    memory_prepare_write(m, gpa, len);
    uint64_t first = align_up(gpa, GUEST_PAGE_SIZE), last = align_down(gpa + len, GUEST_PAGE_SIZE);
    bool whole = gpa == r->base && len == r->size;
    if (r->fd < 0 && whole && leave_file(r)) {
        /* All of it is new. */
    } else if (first >= last || !remove_pages(m, r, first, last)) {
        memset(host, 0, len);
    } else {
        memset(host, 0, first - gpa);
        memset(host + (last - gpa), 0, gpa + len - last);
    }
    memory_mark_written(m, gpa, len);
}

uint64_t memory_total(const struct memory *m)
{
    uint64_t total = 0;
    for (unsigned i = 0; i < m->regions; i++)
        total += m->region[i].size;
    return total;
}

uint8_t *memory_page(struct memory *m, gpa_t gpa, _Atomic uint8_t **flags)
{
    struct memory_region *r = memory_find(m, gpa);
    if (!r)
        return NULL;
    uint64_t page = (gpa - r->base) >> GUEST_PAGE_SHIFT;
    if (flags)
        *flags = &r->flags[page];
    return r->host + (page << GUEST_PAGE_SHIFT);
}

/* How many of len bytes from gpa lie in r, which holds gpa. */
static size_t bytes_in(const struct memory_region *r, gpa_t gpa, size_t len)
{
    uint64_t left = r->size - (gpa - r->base);
    return len < left ? len : (size_t)left;
}

static bool all_ram(struct memory *m, gpa_t gpa, size_t len)
{
    while (len) {
        struct memory_region *r = memory_find(m, gpa);
        if (!r)
            return false;
        size_t n = bytes_in(r, gpa, len);
        gpa += n;
        len -= n;
        if (len && gpa == 0)
            return false;
    }
    return true;
}

int memory_read(struct memory *m, gpa_t gpa, void *buf, size_t len)
{
    if (!all_ram(m, gpa, len))
        return -EFAULT;
    for (uint8_t *p = buf; len;) {
        struct memory_region *r = memory_find(m, gpa);
        size_t n = bytes_in(r, gpa, len);
        memcpy(p, r->host + (gpa - r->base), n);
        p += n;
        gpa += n;
        len -= n;
    }
    return 0;
}

static void mark_in_region(struct memory *m, struct memory_region *r, gpa_t gpa, size_t len)
{
    if (!len)
        return;
    bool dirty = atomic_load_explicit(&m->dirty_logging, memory_order_relaxed);
    uint64_t first = (gpa - r->base) >> GUEST_PAGE_SHIFT;
    uint64_t last = (gpa - r->base + len - 1) >> GUEST_PAGE_SHIFT;
    for (uint64_t page = first; page <= last; page++) {
        uint8_t flags = atomic_load_explicit(&r->flags[page], memory_order_relaxed);
        if (dirty && !(flags & PAGE_DIRTY))
            flags = atomic_fetch_or_explicit(&r->flags[page], PAGE_DIRTY, memory_order_relaxed);
        if ((flags & PAGE_CODE) && m->code_written)
            m->code_written(m->code_written_opaque, r->base + (page << GUEST_PAGE_SHIFT));
    }
}

void memory_mark_written(struct memory *m, gpa_t gpa, size_t len)
{
    atomic_thread_fence(memory_order_seq_cst);
    while (len) {
        struct memory_region *r = memory_find(m, gpa);
        if (!r)
            return;
        size_t n = bytes_in(r, gpa, len);
        mark_in_region(m, r, gpa, n);
        gpa += n;
        len -= n;
    }
}

int memory_write(struct memory *m, gpa_t gpa, const void *buf, size_t len)
{
    if (!all_ram(m, gpa, len))
        return -EFAULT;
    memory_prepare_write(m, gpa, len);
    const uint8_t *p = buf;
    gpa_t at = gpa;
    for (size_t left = len; left;) {
        struct memory_region *r = memory_find(m, at);
        size_t n = bytes_in(r, at, left);
        memcpy(r->host + (at - r->base), p, n);
        p += n;
        at += n;
        left -= n;
    }
    memory_mark_written(m, gpa, len);
    return 0;
}

int memory_fill(struct memory *m, gpa_t gpa, uint8_t byte, size_t len)
{
    if (!all_ram(m, gpa, len))
        return -EFAULT;
    memory_prepare_write(m, gpa, len);
    gpa_t at = gpa;
    for (size_t left = len; left;) {
        struct memory_region *r = memory_find(m, at);
        size_t n = bytes_in(r, at, left);
        memset(r->host + (at - r->base), byte, n);
        at += n;
        left -= n;
    }
    memory_mark_written(m, gpa, len);
    return 0;
}

void *memory_map(struct memory *m, gpa_t gpa, size_t len)
{
    struct memory_region *r = memory_find(m, gpa);
    if (!r || bytes_in(r, gpa, len) != len)
        return NULL;
    uint8_t *host = r->host + (gpa - r->base);
    if (atomic_load_explicit(&m->touch, memory_order_acquire)) {
        for (size_t at = 0; at < len; at += GUEST_PAGE_SIZE)
            (void)*(volatile uint8_t *)(host + at);
        if (len)
            (void)*(volatile uint8_t *)(host + len - 1);
    }
    return host;
}
