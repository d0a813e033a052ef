/* The list of engines, and what "auto" means. */
#include "engine/engine.h"

#include <stddef.h>
#include <string.h>

#include "base/util.h"
#include "isa/x86/cpuid.h"

static const struct engine *const engines[] = { &interp_engine, &translate_engine, &kvm_engine };

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

    kvm_engine.probe(&report);
    if (report.usable && report.fast)
        return &kvm_engine;
    translate_engine.probe(&report);
    return report.usable ? &translate_engine : &interp_engine;
}

const struct x86_cpu_model *engine_offer(const struct engine *e, const struct x86_cpu_model *m, bool exact, const char **missing)
{
    if (e->offer)
        return e->offer(m, exact, missing);
    return x86_cpu_model_usable(m, missing) ? NULL : m;
}
