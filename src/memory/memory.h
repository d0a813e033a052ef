/*
 * Guest physical memory: RAM regions behind checked access functions.
 *
 * RAM is one memfd mapping per region, at most a handful of regions, fixed once
 * the vCPUs run. What is not RAM belongs to the MMIO bus (device/bus.h).
 *
 * Every RAM page (4 KiB) has one byte of flags, kept for all engines:
 *   PAGE_CODE   some engine holds decoded or translated code of the page. Who sets it makes sure
 *               that no vCPU's TLB lets writes to the page pass unseen; who writes the page tells the engines.
 *   PAGE_WRITABLE some vCPU's TLB may let writes to the page pass unseen; set before such an entry is filled.
 *   PAGE_DIRTY  written since the flag was last cleared (only maintained while dirty logging is on).
 *   PAGE_SAVE   what the page holds is to be copied before it is written: memory_before_write(). Only cleared while
 *               vCPUs run, so who finds it clear before a write need not look again.
 *
 * Devices (any thread) go through memory_read/memory_write/memory_map; each write marks
 * pages and invalidates code. vCPU engines map pages by memory_page() and follow the flag rules.
 * Functions are safe to call from any thread; data races between guest CPUs and devices are the guest's own.
 */
#ifndef RINGFORT_MEMORY_MEMORY_H
#define RINGFORT_MEMORY_MEMORY_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint64_t gpa_t;         /* guest physical address */
typedef uint64_t gva_t;         /* guest virtual (linear) address */

#define GUEST_PAGE_SHIFT 12
#define GUEST_PAGE_SIZE 4096u
#define GUEST_PAGE_MASK (~(uint64_t)0xfff)

enum page_flag { PAGE_CODE = 1, PAGE_DIRTY = 2, PAGE_WRITABLE = 4, PAGE_SAVE = 8 };

struct memory_region {
    gpa_t base;
    uint64_t size;              /* bytes, multiple of the page size */
    uint8_t *host;              /* mapping of size bytes */
    _Atomic uint8_t *flags;     /* one byte per page */
    int fd;                     /* memfd; what pages it has none of are zero. -1: mapped from a file, see below */
};

#define MEMORY_MAX_REGIONS 8

/* What an engine does for dirty logging. Each may be NULL. Called with dirty_lock held, machine lock not held. */
struct memory_dirty_hooks {
    /* Writes by vCPUs are to be logged; 0 or a negative errno (logged). */
    int (*start)(void *opaque);
    void (*stop)(void *opaque);
    /* For engines with a log of their own: adds the pages of region that it holds to bitmap, and logs their next writes again. */
    int (*collect)(void *opaque, unsigned region, uint64_t *bitmap);
    /* For engines that set PAGE_DIRTY: when this returns, every write that set no flag is done, and the next one to any page sets it. */
    void (*rearm)(void *opaque);
};

#define MEMORY_DIRTY_HOOKS 4

struct memory_dirty_user {
    const struct memory_dirty_hooks *hooks;
    void *opaque;
};

struct memory {
    struct memory_region region[MEMORY_MAX_REGIONS];
    unsigned regions;
    _Atomic bool dirty_logging;
    /*
     * Called after a write by something that is not a vCPU hit a PAGE_CODE page, once per page.
     * Set by the virtual machine to drop decoded code of all vCPUs. Any thread.
     */
    void (*code_written)(void *opaque, gpa_t page);
    void *code_written_opaque;
    pthread_mutex_t dirty_lock; /* guards what follows, and serializes starting, stopping and fetching */
    struct memory_dirty_user dirty_hooks[MEMORY_DIRTY_HOOKS];
    /* save.c's: */
    _Atomic bool saving;        /* some page may have PAGE_SAVE */
    /*
     * Pages may be missing (missing.h), and come when this process touches them, but not when the kernel does on its behalf (no
     * privileges): memory_map() touches what it gives out.
     */
    _Atomic bool touch;
    pthread_rwlock_t missing_lock; /* missing.c's; a leaf: guest memory may not be touched under it */
    struct memory_missing *missing; /* guarded by missing_lock; NULL: all pages are there */
    pthread_mutex_t save_lock;  /* guards what follows; inside dirty_lock */
    void (*save_copy)(void *opaque, gpa_t page, const uint8_t *bytes);
    void *save_opaque;
    unsigned save_region;
    uint64_t save_data_begin, save_data_end;
};

int memory_init(struct memory *m);
void memory_destroy(struct memory *m);
/* Adds RAM. 0, -ENOMEM (logged), -EEXIST overlap, -EINVAL alignment. Before vCPUs run. */
int memory_add_ram(struct memory *m, gpa_t base, uint64_t size);
uint64_t memory_total(const struct memory *m);

/* The region that holds gpa, or NULL. */
static inline struct memory_region *memory_find(struct memory *m, gpa_t gpa)
{
    for (unsigned i = 0; i < m->regions; i++)
        if (gpa - m->region[i].base < m->region[i].size)
            return &m->region[i];
    return NULL;
}

/* Host address of the page that holds gpa (page start), or NULL when it is not RAM. For engines. */
uint8_t *memory_page(struct memory *m, gpa_t gpa, _Atomic uint8_t **flags);

/*
 * Gives a region that nobody has used the contents of a file from offset on, a page boundary: pages are read when they
 * are touched, and shared by all that map them until they are written. The file must not change or shrink while
 * the machine lives; fd may be closed. 0, or the negative errno of the system call (silent).
 */
int memory_map_file(struct memory *m, unsigned region, int fd, uint64_t offset);
/* Makes [gpa, gpa+len), which lies in one region, zero, and gives the host's memory back where that can be done. No vCPU runs. */
void memory_clear(struct memory *m, gpa_t gpa, uint64_t len);

/* No page of it is missing (missing.h): other processes may map its files. */
bool memory_complete(struct memory *m);

/* Copy from or to RAM. 0, or -EFAULT when any byte is outside RAM (then nothing was written). */
int memory_read(struct memory *m, gpa_t gpa, void *buf, size_t len);
int memory_write(struct memory *m, gpa_t gpa, const void *buf, size_t len);
int memory_fill(struct memory *m, gpa_t gpa, uint8_t byte, size_t len);

/*
 * A host pointer for [gpa, gpa+len), which must lie in one region; NULL otherwise or when len is 0 and
 * gpa is outside. The pointer is valid until the machine ends, but a device must not keep one across a pause.
 * Before writing through it call memory_prepare_write(), and after it memory_mark_written() for what was written, before
 * telling the guest.
 */
void *memory_map(struct memory *m, gpa_t gpa, size_t len);
void memory_prepare_write_slow(struct memory *m, gpa_t gpa, size_t len);
static inline void memory_prepare_write(struct memory *m, gpa_t gpa, size_t len)
{
    if (__builtin_expect(atomic_load_explicit(&m->saving, memory_order_relaxed), 0))
        memory_prepare_write_slow(m, gpa, len);
}
void memory_mark_written(struct memory *m, gpa_t gpa, size_t len);

/*
 * Dirty logging (dirty.c), for migration and snapshots; one user at a time. From the return of memory_dirty_start() on,
 * whatever is written is in the bitmaps of a later fetch: a caller that reads a page after the fetch that named
 * it (or after the start) and is not told of it again has what the page holds. That is exact while vCPUs and devices run.
 * A device's write counts when it is marked, so the last fetch comes after devices are paused.
 *
 * Any thread, without the machine lock: a vCPU may need that to come to where it can answer.
 */

/* The bitmap of a region: one bit per page, lowest bit of the lowest word first. */
static inline size_t memory_bitmap_words(const struct memory_region *r)
{
    return (size_t)((r->size >> GUEST_PAGE_SHIFT) + 63) / 64;
}
/* One for each region, all zero. 0 or -ENOMEM (silent; then none). */
int memory_bitmaps_alloc(const struct memory *m, uint64_t *bitmap[MEMORY_MAX_REGIONS]);
void memory_bitmaps_free(uint64_t *bitmap[MEMORY_MAX_REGIONS]);
/* Bits that are set. */
uint64_t memory_bitmaps_count(const struct memory *m, uint64_t *const bitmap[]);

/* 0; -EBUSY: somebody else logs already; or the engine's error (logged). Nothing is dirty at first. */
int memory_dirty_start(struct memory *m);
void memory_dirty_stop(struct memory *m);
/* Adds to bitmap[region] what was written since the last fetch. 0, -EINVAL when logging is off, or the engine's error (logged). */
int memory_dirty_fetch(struct memory *m, uint64_t *const bitmap[]);
/* Engines, when they start and end to have vCPUs of the machine; at most MEMORY_DIRTY_HOOKS at once. */
void memory_dirty_attach(struct memory *m, const struct memory_dirty_hooks *hooks, void *opaque);
void memory_dirty_detach(struct memory *m, void *opaque);
/*
 * Every engine forgets which pages it may write without looking at their flags; when this returns, it looks. For dirty.c and
 * save.c; the caller holds dirty_lock.
 */
void memory_rearm(struct memory *m);

/*
 * Saving (save.c): RAM as it was at one moment, while the guest goes on. memory_save_begin() is that moment: no vCPU runs,
 * devices are paused. From then on every page is copied once: by whoever wants to write it, before it does (copy() is
 * called, in its thread), or by memory_save_next(). For engines whose vCPUs look at page flags.
 */
/* Copies a page of RAM away. Any thread, a lock held: it must not touch RAM otherwise. Cannot fail: remember errors. */
typedef void memory_save_fn(void *opaque, gpa_t page, const uint8_t *bytes);
/* 0, or -EBUSY: pages are being saved already. */
int memory_save_begin(struct memory *m, memory_save_fn *copy, void *opaque);
/*
 * Copies pages that nobody has copied yet to buf and their addresses to gpa, at most max of them, from *cursor (0 at first)
 * on. How many; 0: none are left. Pages that the guest never touched are left out: they are zero. One thread.
 */
unsigned memory_save_next(struct memory *m, uint64_t *cursor, unsigned max, gpa_t gpa[], uint8_t *buf);
/* No copy() is called any more after it returned. What is not copied by then is not. */
void memory_save_end(struct memory *m);
/*
 * The same for engines whose vCPUs do not look at page flags, where the host's kernel can stop their writes (protect.c): create while
 * the guest runs, at the moment memory_protect_moment() right after memory_save_begin(), destroy after memory_save_end(). NULL: not
 * here (logged for debugging): Linux before 5.19, no privileges, or memory that is mapped from a file. moment: 0 or a negative errno (logged).
 */
struct memory_protect;
struct memory_protect *memory_protect_create(struct memory *m);
int memory_protect_moment(struct memory_protect *p);
void memory_protect_destroy(struct memory_protect *p);
/* The page at gpa, which is RAM, has PAGE_SAVE set and is about to be written. Any thread. */
void memory_before_write(struct memory *m, gpa_t gpa);

#endif
