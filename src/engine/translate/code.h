/*
 * Memory for translated code: one memfd mapped twice, writable and executable, never both in one mapping.
 * Filled from the start, emptied as a whole. One vCPU's; its own thread.
 */
#ifndef RINGFORT_ENGINE_TRANSLATE_CODE_H
#define RINGFORT_ENGINE_TRANSLATE_CODE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct code_memory {
    uint8_t *write, *exec;
    size_t size, used;
    size_t fixed;               /* what code_reset() keeps: routines emitted once */
    size_t touched;             /* pages below are resident, and reported as such… */
    size_t written;             /* …and so many bytes of them in the writable mapping, too */
};

/* anonymous: not a memfd, so that perf maps apply. 0 or a negative errno (logged). */
int code_init(struct code_memory *c, size_t size, bool anonymous);
void code_destroy(struct code_memory *c);
/* Everything up to end, in the writable view, is in use from now on. */
void code_use(struct code_memory *c, const uint8_t *end);
static inline void code_reset(struct code_memory *c) { c->used = c->fixed; }
/* From the writable view to where the code runs. */
static inline const void *code_exec(const struct code_memory *c, const uint8_t *write)
{
    return c->exec + (write - c->write);
}

#endif
