/* The translator's options: see options.h. */
#include "engine/translate/options.h"

#include "base/util.h"

#define DEFAULTS \
    { \
        /* Translating a block costs as much as interpreting it some hundred times. */ \
        .tier = 2, .threshold = 120, .cache = MIB(48), .chain = true, .share = true, .loops = true, .liveness = true, .redo = true, .returns = true, \
        .indirect = true, .vectors = true, .extend = true, .count = false, .lockstep = false, .perf = TRANSLATE_PERF_OFF, \
        .direct = TRANSLATE_DIRECT_ON, \
    }
struct translate_options translate_options = DEFAULTS;
const struct translate_options translate_defaults = DEFAULTS;

static const char *const perf_words[] = { "off", "map", "jitdump", NULL };
static const char *const direct_words[] = { "off", "on", "always", NULL };

#define SWITCH(name, help) { #name, help, TRANSLATE_SWITCH, offsetof(struct translate_options, name), 0, 1, NULL }
#define NUMBER(name, help, min, max) { #name, help, TRANSLATE_NUMBER, offsetof(struct translate_options, name), min, max, NULL }
#define SIZE(name, help, min, max) { #name, help, TRANSLATE_SIZE, offsetof(struct translate_options, name), min, max, NULL }
#define WORD(name, help, words) { #name, help, TRANSLATE_WORD, offsetof(struct translate_options, name), 0, 0, words }

const struct translate_option translate_option_table[] = {
    NUMBER(tier, "interpret, translate, in larger units", 0, 2),
    NUMBER(threshold, "runs before a block is translated", 1, 1000000),
    SIZE(cache, "memory for translations, per processor", MIB(1), MIB(1024)),
    SWITCH(chain, "translations jump to each other"),
    SWITCH(share, "one check for accesses off one base"),
    SWITCH(loops, "checks ahead of simple loops"),
    SWITCH(liveness, "keep flags only where they matter"),
    SWITCH(redo, "set flags again rather than keep them"),
    SWITCH(returns, "predict returns by the host's stack"),
    SWITCH(indirect, "look up indirect targets in line"),
    SWITCH(vectors, "vector instructions in line"),
    SWITCH(extend, "go on behind untaken branches, calls"),
    SWITCH(count, "count guest instructions"),
    SWITCH(lockstep, "compare with the interpreter"),
    WORD(direct, "run user code natively in a sandbox", direct_words),
    WORD(perf, "/tmp/perf-PID.map or jit-PID.dump", perf_words),
};
const unsigned translate_option_count = ARRAY_SIZE(translate_option_table);
