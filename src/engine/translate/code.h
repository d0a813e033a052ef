/*
 * Memory for translated code: one memfd mapped twice, writable and executable, never both in one mapping.
 * Filled from the start with what runs, and from the end, in pieces, with slow paths, so that what runs lies close together. Emptied as a
 * whole. One vCPU's; its own thread.
 */
#ifndef RINGFORT_ENGINE_TRANSLATE_CODE_H
#define RINGFORT_ENGINE_TRANSLATE_CODE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/util.h"

struct code_memory {
    uint8_t *write, *exec;
    size_t size, used;
    size_t limit;               /* where slow paths begin: used stays below */
    size_t cold, cold_end;      /* the piece that is being filled with them */
    size_t cold_touched;        /* pages from here on are resident */
    size_t fixed;               /* what code_reset() keeps: routines emitted once */
    size_t touched;             /* pages below are resident, and reported as such… */
    size_t written;             /* …and so many bytes of them in the writable mapping, too */
};

/* anonymous: not a memfd, so that perf maps apply. 0 or a negative errno (logged). */
int code_init(struct code_memory *c, size_t size, bool anonymous);
void code_destroy(struct code_memory *c);
/* Everything up to end, in the writable view, is in use from now on. */
void code_use(struct code_memory *c, const uint8_t *end);
/* Room for slow paths, at most CODE_COLD_MAX bytes, in the writable view. hot_end: how far the rest is filled. NULL: there is none. */
#define CODE_COLD_MAX KIB(64)
uint8_t *code_cold(struct code_memory *c, size_t bytes, const uint8_t *hot_end);
/* The slow paths up to end are in use from now on. */
static inline void code_use_cold(struct code_memory *c, const uint8_t *end) { c->cold = (size_t)(end - c->write); }
void code_reset(struct code_memory *c);
/* From the writable view to where the code runs. */
static inline const void *code_exec(const struct code_memory *c, const uint8_t *write)
{
    return c->exec + (write - c->write);
}

#endif
