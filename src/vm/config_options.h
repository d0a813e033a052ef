/* The table of options, for config.c and its neighbours only; users of the configuration include
 * vm/config.h. */
#ifndef RINGFORT_VM_CONFIG_OPTIONS_H
#define RINGFORT_VM_CONFIG_OPTIONS_H

#include <jansson.h>

#include "vm/config.h"
#include "vm/config_value.h"

struct config_option {
    /* In help, %s stands for the names of vm_config_names(name). */
    struct vm_config_option_info info;
    /* Reads one value (of a list: one element). 0, or a negative errno (logged, but for -ENOMEM).
     */
    int (*set)(struct vm_config *c, const struct config_origin *o, const json_t *v);
    /* A new reference (of a list: an array); NULL: nothing to write. */
    json_t *(*get)(const struct vm_config *c);
    /* Of a list: forget all elements. */
    void (*clear)(struct vm_config *c);
};

extern const struct config_option config_options[];
extern const unsigned config_option_count;

/* The index of the option, or -ENOENT. */
int config_option_find(const char *name);
/* Its names for suggestions, NULL-terminated. */
const char *const *config_option_names(void);

#endif
