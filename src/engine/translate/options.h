/*
 * What can be switched in the translator: --translate key=value,…
 */
#ifndef RINGFORT_ENGINE_TRANSLATE_OPTIONS_H
#define RINGFORT_ENGINE_TRANSLATE_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>

struct translate_options {
    unsigned threshold;         /* how often a block is interpreted before it is translated */
    bool chain;                 /* direct jumps from translation to translation */
    bool share;                 /* one check for accesses off the same base */
    bool liveness;              /* flags are only kept where they can matter */
    bool returns;               /* returns predicted by the host's return stack */
    bool indirect;              /* targets of indirect jumps looked up in line */
    bool vectors;               /* vector instructions in line */
    bool extend;                /* units go on behind branches that are not taken, and behind calls */
    bool count;                 /* guest instructions are counted */
};

/* Read when a vCPU is made. */
extern struct translate_options translate_options;

#endif
