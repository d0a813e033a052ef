/*
 * Guest memory whose pages are not there yet, and come when somebody touches them: post-copy migration, and machines that are
 * restored from a compressed snapshot.
 *
 * userfaultfd stops whoever touches a missing page: vCPUs of any engine, devices, the kernel on their behalf. A thread tells the
 * owner which page is wanted, and whoever has its contents places it. A page that is neither there nor missing is zero.
 *
 * Without the right to handle faults of the kernel (root, CAP_SYS_PTRACE, or vm.unprivileged_userfaultfd = 1) only this
 * process's own touches are stopped. That will do where vCPUs are software, since devices get at memory through memory_map(),
 * which then touches what the kernel is going to; not for KVM.
 *
 * What looks for holes in the memory's files in place of reading it (saving, migration) must not be used while pages are missing.
 */
#ifndef RINGFORT_MEMORY_MISSING_H
#define RINGFORT_MEMORY_MISSING_H

#include "memory/memory.h"

struct memory_missing;

/* 0, or the negative errno of why this host does not let this process do it. *kernel: faults of the kernel are stopped, too. */
int memory_missing_usable(bool *kernel);

/* Somebody waits for a page that is missing. The thread of all such calls, no lock held. May come again for a page that was asked for. */
typedef void memory_wanted_fn(void *opaque, struct memory_missing *p, unsigned region, uint64_t page);

/*
 * Waits for touches of the pages in missing from here on. They must not have contents, and regions be in memfds. missing is taken
 * over in any case. One per memory. NULL with the negative errno in *err (silent).
 */
struct memory_missing *memory_missing_create(struct memory *m, uint64_t *missing[MEMORY_MAX_REGIONS], memory_wanted_fn *wanted,
                                             void *opaque, int *err);
/*
 * Touches are not waited for any more; nobody is told of one when it returns. All pages have to be there, or nobody may touch what is
 * not. NULL is allowed. Not from wanted().
 */
void memory_missing_destroy(struct memory_missing *p);
/*
 * A page's contents are here; NULL: zeros. One that is there already stays as it is. Wakes who waits for it. Any thread. 0 or a
 * negative errno.
 */
int memory_missing_place(struct memory_missing *p, unsigned region, uint64_t page, const uint8_t *contents);
/* Whether it is missing still, and how many are: such a page may be there already for who waited for it. Any thread. */
bool memory_missing_is(const struct memory_missing *p, unsigned region, uint64_t page);
uint64_t memory_missing_count(const struct memory_missing *p);
/* The bits. They may become fewer at any time. */
uint64_t *const *memory_missing_bitmaps(const struct memory_missing *p);
/* How many pages are missing in this memory; 0 without anything of this kind. Any thread. */
uint64_t memory_missing_in(struct memory *m);
/* Whether there is such a thing still, so that others cannot use the kernel's means for theirs. Any thread. */
bool memory_missing_any(struct memory *m);
/* [offset, offset+len) of a region, whole pages, is going to be zero whatever it was. With missing_lock held for writing; for memory.c. */
void memory_missing_drop(struct memory_missing *p, unsigned region, uint64_t offset, uint64_t len);

#endif
