/* Between diff_host.c (parent) and diff_host_child.c: the memory that both share. */
#ifndef RINGFORT_TESTS_CPU_DIFF_HOST_H
#define RINGFORT_TESTS_CPU_DIFF_HOST_H

#include <stdatomic.h>
#include <ucontext.h>

#include "diff.h"

#define IMAGE_SIZE 4096u        /* room for an XSAVE image */

struct host_slot {
    greg_t gregs[NGREG];        /* in, then out; as in a signal frame */
    uint64_t fs_base, gs_base;
    uint16_t start, bytes;
    uint8_t code_size;
    uint8_t end;                /* enum case_end */
    uint64_t changed[DATA_LINES / 64];
    uint8_t code[MAX_CODE];
    uint8_t image[IMAGE_SIZE] __attribute__((aligned(64)));     /* in, then out; standard format */
    uint8_t line[DATA_LINES][LINE];
};

struct host_shared {
    /* Futex words, counting batches. The parent raises posted, the child raises done when it has run them. */
    _Atomic uint32_t posted, done;
    _Atomic uint32_t current;   /* case that the child runs or ran last */
    uint32_t first, count;      /* of the batch's slots */
    bool writes_code, code16, null_segments;
    uint32_t image_size;        /* of images on this host, as the child's first signal frame said; 0: not known yet */
    uint8_t data[DATA_SIZE];
    struct host_slot slot[BATCH];
};

struct host_memory {
    int code_fd, data_fd;       /* memfds of CODE_SIZE and DATA_SIZE */
    struct host_shared *shared;
};

/* The child's life. Never returns; an exit status other than 0 is an error that it has printed. */
_Noreturn void host_child(const struct host_memory *memory);

#endif
