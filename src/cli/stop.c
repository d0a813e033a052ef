/* `ringfort stop`: the power button, and in the end the plug. */
#include <stdio.h>
#include <string.h>

#include "base/log.h"
#include "cli/cli.h"
#include "cli/client.h"
#include "cli/verb.h"
#include "vm/vm.h"

#define TIMEOUT_S     60u
#define MAX_TIMEOUT_S (24u * 3600u)
/* After the guest's time is over: disks are flushed, jobs end. */
#define ENDING_S      60u

static const char help[] =
    "Usage: ringfort stop NAME [--timeout SECONDS] [--force] [-o text|json]\n\n"
    "Presses a machine's power button and waits until it has ended. A guest that has not powered off in\n"
    "time is cut off.\n\n"
    "  --timeout SECONDS    how long the guest gets (default 60)\n"
    "  --force              cut the guest off at once; disks are flushed\n"
    "  -o, --output FORMAT  text (default) or json\n"
    "  --help               show this text\n\n"
    "Exit status: 0 when the machine has ended, however it did; see the output for that.\n";

static int print_end(const struct verb *v, const char *name, const json_t *ended)
{
    const char *cause = json_string_value(json_object_get(ended, "cause"));
    int status = (int)json_integer_value(json_object_get(ended, "status"));
    char line[256];

    if (v->json)
        return verb_print_json(json_pack("{s:s, s:s, s:s*, s:i}", "name", name, "state", "ended", "cause", cause,
                                         "status", status));
    snprintf(line, sizeof(line), "%s: %s\n", name,
             cause && strcmp(cause, "poweroff") == 0 ? "powered off"
             : cause && strcmp(cause, "user") == 0   ? "cut off"
                                                     : "ended");
    return cli_print(line);
}

/* Follows until the machine's name is free again. */
static int await_end(const struct verb *v, const struct registry_entry *m, struct client_events *events, uint64_t seconds)
{
    json_t *ended = NULL, *event;
    int status = 0;

    while (!client_events_ended(events)) {
        event = client_events_next(events, (int)((seconds + ENDING_S) * 1000));
        const char *what = json_string_value(json_object_get(event, "event"));
        if (what && strcmp(what, "ended") == 0 && !ended)
            ended = json_incref(event);
        json_decref(event);
        if (!event && !client_events_ended(events)) {
            log_error("%s: the machine's process does not end", m->name);
            status = VM_STATUS_HOST;
            break;
        }
    }
    if (!status && registry_await_end(m, ENDING_S)) {
        log_error("%s: the machine's process does not end", m->name);
        status = VM_STATUS_HOST;
    }
    if (!status)
        status = print_end(v, m->name, ended);
    json_decref(ended);
    return status;
}

int cli_stop(char **args)
{
    struct verb_flag flags[] = {{.name = "--force"}, {.name = "--timeout", .form = "SECONDS"}, {0}};
    struct verb v = {
        .name = "stop", .min_words = 1, .max_words = 1, .what = "NAME", .help = help, .flags = flags};
    struct client_events *events = NULL;
    struct registry_entry m;
    uint64_t seconds = TIMEOUT_S;
    int status;

    if (!verb_parse(&v, args, &status))
        return status;
    status = verb_number(&v, &flags[1], 0, MAX_TIMEOUT_S, &seconds);
    if (!status)
        status = verb_machine(&v, &m);
    if (!status)
        events = client_events_open(&m, &status);
    if (!status)
        status = client_call(&m, "POST", "/v1/stop",
                             json_pack("{s:b, s:I}", "force", (int)flags[0].given, "timeout", (json_int_t)seconds),
                             CLIENT_PATIENCE_S, NULL);
    if (!status)
        status = await_end(&v, &m, events, flags[0].given ? 0 : seconds);
    client_events_close(events);
    return status;
}
