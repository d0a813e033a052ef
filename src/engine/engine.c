/* The list of engines, and what "auto" means. */
#include "engine/engine.h"

#include <stddef.h>
#include <string.h>

#include "base/util.h"

/* In the order in which "auto" tries them. */
static const struct engine *const engines[] = { &interp_engine, &translate_engine };

const struct engine *engine_at(unsigned i) { return i < ARRAY_SIZE(engines) ? engines[i] : NULL; }

const struct engine *engine_find(const char *name)
{
    for (unsigned i = 0; i < ARRAY_SIZE(engines); i++)
        if (strcmp(engines[i]->name, name) == 0)
            return engines[i];
    return NULL;
}

const struct engine *engine_choose(void)
{
    struct engine_report report;

    for (unsigned i = 0; i < ARRAY_SIZE(engines); i++) {
        engines[i]->probe(&report);
        if (report.usable)
            return engines[i];
    }
    return NULL;                /* cannot be: the interpreter is always usable */
}
