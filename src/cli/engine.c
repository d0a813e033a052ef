/* `ringfort engine`: a running machine goes on with another engine. */
#include <stdio.h>

#include "cli/cli.h"
#include "cli/verb.h"
#include "vm/config.h"
#include "vm/status.h"

static const char help[] =
    "Usage: ringfort engine NAME interp|translate|kvm|auto [-o text|json]\n\n"
    "Changes how a running machine's processors are run. The guest stands still for some milliseconds and\n"
    "does not notice otherwise. 'ringfort host' shows which engines this host has.\n\n"
    "  -o, --output FORMAT  text (default) or json: engine, pause_ms\n"
    "  --help               show this text\n";

/* 0 or the exit status (logged). */
static int check_engine(const char *name)
{
    struct vm_config config;
    int err = vm_config_init(&config);

    if (!err)
        err = vm_config_set_flag(&config, "engine", name);
    vm_config_destroy(&config);
    return vm_status_of(err);
}

int cli_engine(char **args)
{
    struct verb v = {.name = "engine", .min_words = 2, .max_words = 2, .what = "NAME ENGINE", .help = help};
    struct registry_entry m;
    json_t *answer = NULL;
    char line[256];
    int status;

    if (!verb_parse(&v, args, &status) || (status = check_engine(v.words[1])) ||
        !verb_job(&v, "/v1/engine", json_pack("{s:s}", "engine", v.words[1]), &m, &answer, &status))
        return status;
    const char *engine = json_string_value(json_object_get(answer, "engine"));
    snprintf(line, sizeof(line), "%s: %s, after a pause of %.1f ms\n", m.name, engine ? engine : v.words[1],
             json_number_value(json_object_get(answer, "pause_ms")));
    json_decref(answer);
    return cli_print(line);
}
