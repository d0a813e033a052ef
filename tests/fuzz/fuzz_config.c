/*
 * Fuzz target: the configuration. "--name=value" is given to the flag of that name; anything else
 * is the JSON of a file. What is accepted must be written as JSON that reads back as the same.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "vm/config.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check_round_trip(struct vm_config *c)
{
    struct vm_config again;
    if (vm_config_finish(c) < 0)
        return;
    char *text = vm_config_to_json(c);
    /* A flag's file name need not be UTF-8. */
    if (!text)
        return;
    if (vm_config_init(&again) < 0)
        abort();
    if (vm_config_load_json(&again, text, strlen(text), "again") < 0 ||
        vm_config_finish(&again) < 0)
        abort();
    char *twice = vm_config_to_json(&again);
    if (!twice || strcmp(text, twice) != 0)
        abort();
    if (c->memory != again.memory || c->disk_count != again.disk_count ||
        c->net_count != again.net_count)
        abort();
    free(text);
    free(twice);
    vm_config_destroy(&again);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct vm_config c;
    struct vm_config_option_info option;
    int r;
    if (vm_config_init(&c) < 0)
        return 0;
    if (size > 2 && data[0] == '-' && data[1] == '-') {
        char *name = strndup((const char *)data + 2, size - 2);
        if (!name)
            abort();
        char *value = strchr(name, '=');
        if (value)
            *value++ = 0;
        r = vm_config_set_flag(&c, name, value ? value : "");
        /* A list takes more than one: the second appends. */
        for (unsigned i = 0; r == 0 && vm_config_option(i, &option); i++)
            if (option.list && strcmp(option.name, name) == 0)
                r = vm_config_set_flag(&c, name, value ? value : "");
        free(name);
    } else {
        r = vm_config_load_json(&c, (const char *)data, size, "fuzz");
    }
    if (r == 0)
        check_round_trip(&c);
    vm_config_destroy(&c);
    return 0;
}
