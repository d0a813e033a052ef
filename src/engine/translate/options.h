/*
 * What can be switched in the translator: --translate key=value,… and the key "translate" of a configuration. One table has
 * the names, the values and a line of help for each; the command line, the manual page's test and the counters go by it.
 *
 * The options of the process are set before the first vCPU is made and only read then.
 */
#ifndef RINGFORT_ENGINE_TRANSLATE_OPTIONS_H
#define RINGFORT_ENGINE_TRANSLATE_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum translate_direct { TRANSLATE_DIRECT_OFF, TRANSLATE_DIRECT_ON, TRANSLATE_DIRECT_ALWAYS };
enum translate_perf { TRANSLATE_PERF_OFF, TRANSLATE_PERF_MAP, TRANSLATE_PERF_JITDUMP };

struct translate_options {
    unsigned tier;              /* 0 interprets, 1 translates block by block, 2 translates units of several blocks */
    unsigned threshold;         /* how often a block is interpreted before it is translated */
    uint64_t cache;             /* bytes of memory for translations, for each vCPU */
    bool chain;                 /* direct jumps from translation to translation */
    bool share;                 /* one check for accesses off the same base */
    bool loops;                 /* checks of simple loops hoisted out of them */
    bool liveness;              /* flags are only kept where they can matter */
    bool redo;                  /* what set flags is done again where keeping them costs more */
    bool returns;               /* returns predicted by the host's return stack */
    bool indirect;              /* targets of indirect jumps looked up in line */
    bool vectors;               /* vector instructions in line */
    bool extend;                /* units go on behind branches that are not taken, and behind calls; tier 2 only */
    bool count;                 /* guest instructions are counted */
    bool lockstep;              /* each translation is compared with the interpreter */
    unsigned perf;              /* enum translate_perf */
    unsigned direct;            /* enum translate_direct: user code runs natively in a sandbox where that pays; wherever it can */
};

/* Read when a vCPU is made. */
extern struct translate_options translate_options;
extern const struct translate_options translate_defaults;

enum translate_option_kind { TRANSLATE_SWITCH, TRANSLATE_NUMBER, TRANSLATE_SIZE, TRANSLATE_WORD };

struct translate_option {
    const char *name;
    const char *help;           /* one line */
    enum translate_option_kind kind;
    size_t offset;              /* in struct translate_options: a bool, an unsigned, a uint64_t, an unsigned */
    uint64_t min, max;          /* of numbers and sizes; sizes are multiples of 4 KiB */
    const char *const *words;   /* NULL-terminated: what an index stands for */
};
extern const struct translate_option translate_option_table[];
extern const unsigned translate_option_count;

static inline bool *translate_switch(struct translate_options *o, const struct translate_option *t)
{
    return (bool *)((char *)o + t->offset);
}
static inline unsigned *translate_number(struct translate_options *o, const struct translate_option *t)
{
    return (unsigned *)((char *)o + t->offset);
}
static inline uint64_t *translate_size(struct translate_options *o, const struct translate_option *t)
{
    return (uint64_t *)((char *)o + t->offset);
}

#endif
