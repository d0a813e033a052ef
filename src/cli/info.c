/* `ringfort info`: what one machine is and does. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/cli.h"
#include "cli/client.h"
#include "cli/verb.h"
#include "vm/vm.h"

static const char help[] = "Usage: ringfort info NAME [-o text|json]\n\n"
                           "Shows a machine's configuration, state and counters.\n\n"
                           "  -o, --output FORMAT  text (default) or json\n"
                           "  --help               show this text\n";

static const char *text_of(const json_t *o, const char *key)
{
    const char *text = json_string_value(json_object_get(o, key));
    return text ? text : "-";
}

static double number_of(const json_t *o, const char *key) { return json_number_value(json_object_get(o, key)); }

static void put_state(FILE *f, const json_t *info)
{
    const json_t *held = json_object_get(info, "held_by"), *by;
    size_t i;

    fprintf(f, "state        %s", text_of(info, "state"));
    json_array_foreach(held, i, by) fprintf(f, "%s%s", i ? ", " : " by ", json_string_value(by));
    fprintf(f, ", for %s\n", verb_duration(number_of(info, "uptime_seconds")));
}

static void put_devices(FILE *f, const json_t *devices)
{
    const char *id, *name, *separator;
    json_t *figures, *value;

    json_object_foreach((json_t *)devices, id, figures)
    {
        if (json_object_size(figures) == 0)
            continue;
        fprintf(f, "%-12s ", id);
        separator = "";
        json_object_foreach(figures, name, value)
        {
            fprintf(f, "%s%s %lld", separator, name, (long long)json_integer_value(value));
            separator = ", ";
        }
        fputc('\n', f);
    }
}

static int print_text(const json_t *info, const json_t *stats)
{
    const json_t *config = json_object_get(info, "config"), *memory = json_object_get(stats, "memory"), *o;
    const char *kernel = text_of(config, "kernel"), *cmdline = text_of(config, "cmdline");
    char *text = NULL;
    size_t len, i;
    FILE *f = open_memstream(&text, &len);

    if (!f)
        return VM_STATUS_HOST;
    fprintf(f, "name         %s (process %lld, ringfort %s)\n", text_of(info, "name"), (long long)number_of(info, "pid"),
            text_of(info, "version"));
    put_state(f, info);
    fprintf(f, "engine       %s, CPU model %s\n", text_of(info, "engine"), text_of(info, "cpu_model"));
    fprintf(f, "kernel       %s%s%s\n", kernel, *cmdline ? " " : "", cmdline);
    fprintf(f, "memory       %s, %s of it in use, and %s for the machine itself\n",
            verb_bytes(number_of(info, "memory_bytes")), verb_bytes(number_of(memory, "ram_resident_bytes")),
            verb_bytes(number_of(memory, "own_bytes")));
    if (number_of(memory, "missing_bytes") > 0)
        fprintf(f, "missing      %s of memory still to come\n", verb_bytes(number_of(memory, "missing_bytes")));
    json_array_foreach(json_object_get(config, "disk"), i, o)
        fprintf(f, "disk %-7zu %s%s\n", i, text_of(o, "path"),
                json_is_true(json_object_get(o, "readonly")) ? " (read-only)" : "");
    json_array_foreach(json_object_get(config, "net"), i, o) fprintf(f, "net %-8zu %s\n", i, text_of(o, "type"));
    json_array_foreach(json_object_get(stats, "vcpus"), i, o)
    {
        fprintf(f, "vCPU %-7zu %.1f s of processor time, ", i, number_of(o, "cpu_seconds"));
        if (json_is_integer(json_object_get(o, "instructions")))
            fprintf(f, "%.0f million instructions, ", number_of(o, "instructions") / 1e6);
        fprintf(f, "%.0f halts, %.0f interrupts\n", number_of(o, "halts"), number_of(o, "interrupts"));
    }
    put_devices(f, json_object_get(stats, "devices"));
    fprintf(f, "console      %s\n", text_of(config, "console"));
    if (json_object_get(info, "console_file"))
        fprintf(f, "console log  %s\n", text_of(info, "console_file"));
    fprintf(f, "socket       %s\n", text_of(info, "socket"));
    int status = fclose(f) == 0 ? cli_print(text) : VM_STATUS_HOST;
    free(text);
    return status;
}

int cli_info(char **args)
{
    struct verb v = {.name = "info", .min_words = 1, .max_words = 1, .what = "NAME", .help = help};
    json_t *info = NULL, *stats = NULL;
    struct registry_entry m;
    int status;

    if (!verb_parse(&v, args, &status))
        return status;
    status = verb_machine(&v, &m);
    if (!status)
        status = client_call(&m, "GET", "/v1/info", NULL, CLIENT_PATIENCE_S, &info);
    if (!status)
        status = client_call(&m, "GET", "/v1/stats", NULL, CLIENT_PATIENCE_S, &stats);
    if (!status && v.json) {
        json_object_set(info, "stats", stats);
        status = verb_print_json(json_incref(info));
    } else if (!status) {
        status = print_text(info, stats);
    }
    json_decref(info);
    json_decref(stats);
    return status;
}
