/* `ringfort ls`: the machines that run. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "cli/cli.h"
#include "cli/client.h"
#include "cli/verb.h"
#include "vm/status.h"

/* One that does not answer in this time is shown as such. */
#define PATIENCE_S 2u

static const char help[] = "Usage: ringfort ls [-o text|json]\n\n"
                           "Lists the machines that this user runs.\n\n"
                           "  -o, --output FORMAT  text (default) or json\n"
                           "  --help               show this text\n";

/* What the list says about one; a new reference. */
static json_t *describe(const struct registry_entry *m)
{
    static const char *const keys[] = {"state", "held_by", "engine", "cpus", "memory_bytes", "uptime_seconds", NULL};
    json_t *info, *o = json_pack("{s:s, s:i, s:s}", "name", m->name, "pid", (int)m->pid, "socket", m->socket);
    int status = client_try(m, "GET", "/v1/info", NULL, PATIENCE_S, &info);

    if (status != 200)
        json_object_set_new(o, "state", json_string("unresponsive"));
    for (unsigned i = 0; status == 200 && keys[i]; i++)
        json_object_set(o, keys[i], json_object_get(info, keys[i]));
    json_decref(info);
    return o;
}

static int print_text(const json_t *list)
{
    char *text = NULL;
    size_t len, i;
    const json_t *m;
    FILE *f = open_memstream(&text, &len);

    if (!f)
        return VM_STATUS_HOST;
    fprintf(f, "%-20s %-12s %-10s %4s %9s %10s %8s\n", "NAME", "STATE", "ENGINE", "CPUS", "MEMORY", "UPTIME", "PID");
    json_array_foreach(list, i, m)
    {
        const char *engine = json_string_value(json_object_get(m, "engine"));
        bool known = engine != NULL;
        fprintf(f, "%-20s %-12s %-10s %4lld %9s %10s %8lld\n", json_string_value(json_object_get(m, "name")),
                json_string_value(json_object_get(m, "state")), known ? engine : "-",
                (long long)json_integer_value(json_object_get(m, "cpus")),
                known ? verb_bytes(json_number_value(json_object_get(m, "memory_bytes"))) : "-",
                known ? verb_duration(json_number_value(json_object_get(m, "uptime_seconds"))) : "-",
                (long long)json_integer_value(json_object_get(m, "pid")));
    }
    int status = fclose(f) == 0 ? cli_print(text) : VM_STATUS_HOST;
    free(text);
    return status;
}

int cli_ls(char **args)
{
    struct verb v = {.name = "ls", .help = help};
    struct registry_entry *machines;
    int status;

    if (!verb_parse(&v, args, &status))
        return status;
    int count = registry_list(&machines);
    if (count < 0)
        return vm_status_of(count);
    json_t *list = json_array();
    for (int i = 0; i < count; i++)
        json_array_append_new(list, describe(&machines[i]));
    free(machines);
    if (v.json)
        return verb_print_json(list);
    status = print_text(list);
    json_decref(list);
    return status;
}
