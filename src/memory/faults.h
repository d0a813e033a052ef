/*
 * userfaultfd on guest memory: a thread that is told which page somebody touched and waits for. For the parts of this folder that
 * stop such touches (missing.c, protect.c).
 */
#ifndef RINGFORT_MEMORY_FAULTS_H
#define RINGFORT_MEMORY_FAULTS_H

#include <pthread.h>
#include <stdbool.h>

#include "memory/memory.h"

/* Somebody waits at this page of a region until an ioctl on fd wakes them. The thread of all such calls, no lock held. */
typedef void memory_fault_fn(void *opaque, unsigned region, uint64_t page);

struct memory_faults {
    int fd;                     /* userfaultfd; the user's for ioctls */
    /* faults.c's: */
    struct memory *memory;
    memory_fault_fn *fault;
    void *opaque;
    int wake;
    pthread_t thread;
    bool started;
    unsigned registered;        /* regions; others may be somebody else's */
};

/*
 * A userfaultfd with these UFFD_FEATURE_*, or the negative errno of why this host does not let this process have it (silent). kernel
 * NULL: it has to stop what the kernel touches, too, which takes privileges; else *kernel says whether it does.
 */
int memory_faults_open(uint64_t features, bool *kernel);
/* Takes over fd, which may be a negative errno, and starts the thread. 0 or a negative errno (silent); memory_faults_stop() in any case. */
int memory_faults_start(struct memory_faults *f, struct memory *m, int fd, memory_fault_fn *fault, void *opaque);
/*
 * Touches of the next region are waited for from here on; mode: UFFDIO_REGISTER_MODE_*; need: the ioctl (_UFFDIO_*) that lets go on
 * who touches it. 0 or a negative errno (silent).
 */
int memory_faults_watch_next(struct memory_faults *f, uint64_t mode, unsigned need);
/* Nobody is told any more when it returns, nobody stopped, and who waits still goes on. Not from fault(). */
void memory_faults_stop(struct memory_faults *f);

#endif
