/* `ringfort migrate`: a running machine moves to another process or host. */
#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "cli/cli.h"
#include "cli/client.h"
#include "cli/verb.h"
#include "migrate/channel.h"
#include "migrate/migrate.h"
#include "vm/config_value.h"
#include "vm/vm.h"

static const char help[] =
    "Usage: ringfort migrate NAME tcp:HOST:PORT|unix:PATH [flag...]\n\n"
    "Moves a running machine to where 'ringfort receive' waits for it. The guest goes on meanwhile and\n"
    "stands still only for the moment in which it changes hands. Until then every failure leaves it\n"
    "running here; Ctrl-C gives up. Disks are shared by their path: both sides see the same files;\n"
    "or they are copied.\n\n"
    "  --with-disks         copy the disks that are on this host, while the guest uses them; those on NBD\n"
    "                       servers stay where they are\n"
    "  --downtime MS        how long the guest may stand still (default 300)\n"
    "  --bandwidth RATE     bytes per second at most: 100M, 1G (default: no limit)\n"
    "  --streams N          connections that carry memory, 1 to 16 (default 2)\n"
    "  --compress           with zstd: for slow links\n"
    "  --post-copy WHEN     let the guest go on there before all of its memory is there: auto (default),\n"
    "                       when it changes memory faster than it is sent; never (its processors are\n"
    "                       slowed down instead); now (without a round of copying)\n"
    "  --tls DIR            encrypted, with ca.pem, cert.pem and key.pem in DIR on both sides\n"
    "  -o, --output FORMAT  text (default) or json: downtime_ms, total_ms, rounds, bytes and more\n"
    "  --help               show this text\n\n"
    "Exit status: 0 when the machine has moved; 1 when it has not, and why is said; 2 for bad usage;\n"
    "3 when the machine cannot be reached.\n";

/* ---- progress on a terminal ---- */

struct bar {
    bool shown;
};

static double member(const json_t *o, const char *key) { return json_number_value(json_object_get(o, key)); }

static void show(void *opaque, unsigned job, const json_t *p)
{
    const char *stage = json_string_value(json_object_get(p, "stage"));
    double total = member(p, "total_pages"), left = member(p, "left_pages");
    struct bar *b = opaque;
    char cells[21], more[64] = "";
    int filled = total > 0 ? (int)(20 * (1 - left / total)) : 0;

    for (int i = 0; i < 20; i++)
        cells[i] = i < filled ? '#' : '.';
    cells[20] = 0;
    if (member(p, "throttle") > 0)
        snprintf(more, sizeof(more), ", processors slowed by %.0f %%", member(p, "throttle"));
    fprintf(stderr, "\r\033[K[%s] %-13s round %.0f, sent %s at %s/s, dirty %s/s, would stand still %.0f ms%s", cells,
            stage ? stage : "", member(p, "round"), verb_bytes(member(p, "bytes")), verb_bytes(member(p, "rate")),
            verb_bytes(member(p, "dirty_rate")), member(p, "estimate_ms"), more);
    fflush(stderr);
    b->shown = true;
}

/* ---- arguments ---- */

/* The machine's process stands in another folder. 0 or the exit status (logged). */
static int absolute_address(const char *address, char out[PATH_MAX + 8])
{
    char error[CHANNEL_ERROR_MAX], folder[PATH_MAX];

    if (channel_check_address(address, error)) {
        log_error("migrate: %s", error);
        return VM_STATUS_USAGE;
    }
    if (strncmp(address, "unix:", 5) == 0 && address[5] != '/' && getcwd(folder, sizeof(folder)))
        snprintf(out, PATH_MAX + 8, "unix:%.3000s/%.1000s", folder, address + 5);
    else
        snprintf(out, PATH_MAX + 8, "%s", address);
    return 0;
}

static int cli_rate(const char *flag, const char *text, uint64_t *out)
{
    static const char units[] = "KMGT";
    char *end;
    uint64_t v;
    const char *unit;

    errno = 0;
    v = strtoull(text, &end, 10);
    unit = *end ? strchr(units, *end) : NULL;
    if (errno || end == text || *text == '-' || !v || (*end && (!unit || end[1])) ||
        (unit && v > (UINT64_MAX / 1000) >> (10 * (unit - units + 1)))) {
        log_error("%s: %s is not a number of bytes per second; did you mean %s 100M?", flag, config_quote(text), flag);
        return VM_STATUS_USAGE;
    }
    *out = unit ? v << (10 * (unit - units + 1)) : v;
    return 0;
}

static int arguments(const struct verb *v, const struct verb_flag *flags, json_t *args)
{
    char to[PATH_MAX + 8], tls[PATH_MAX];
    uint64_t downtime = 300, streams = 2, bandwidth = 0;
    int status = absolute_address(v->words[1], to);

    if (!status)
        status = verb_number(v, &flags[0], 1, 3600000, &downtime);
    if (!status && flags[1].given)
        status = cli_rate("--bandwidth", flags[1].value, &bandwidth);
    if (!status)
        status = verb_number(v, &flags[2], 1, MIGRATE_MAX_STREAMS, &streams);
    if (!status && flags[3].given && strcmp(flags[3].value, "auto") != 0 && strcmp(flags[3].value, "never") != 0 &&
        strcmp(flags[3].value, "now") != 0) {
        log_error("migrate: --post-copy is auto, never or now, not %s", config_quote(flags[3].value));
        status = VM_STATUS_USAGE;
    }
    if (!status && flags[4].given)
        status = verb_folder(v, &flags[4], tls);
    if (status)
        return status;
    json_object_set_new(args, "to", json_string(to));
    json_object_set_new(args, "downtime", json_integer((json_int_t)downtime));
    json_object_set_new(args, "streams", json_integer((json_int_t)streams));
    json_object_set_new(args, "bandwidth", json_integer((json_int_t)bandwidth));
    json_object_set_new(args, "post_copy", json_string(flags[3].given ? flags[3].value : "auto"));
    if (flags[4].given)
        json_object_set_new(args, "tls", json_string(tls));
    if (flags[5].given)
        json_object_set_new(args, "compress", json_true());
    if (flags[6].given)
        json_object_set_new(args, "with_disks", json_true());
    return 0;
}

int cli_migrate(char **args)
{
    struct verb_flag flags[] = { { .name = "--downtime", .form = "MS" },    { .name = "--bandwidth", .form = "RATE" },
                                 { .name = "--streams", .form = "N" },      { .name = "--post-copy", .form = "WHEN" },
                                 { .name = "--tls", .form = "DIR" },        { .name = "--compress" },
                                 { .name = "--with-disks" },                { 0 } };
    struct verb v = { .name = "migrate", .min_words = 2, .max_words = 2, .what = "NAME ADDRESS", .help = help, .flags = flags };
    struct registry_entry m;
    struct bar bar = { 0 };
    json_t *body, *answer = NULL;
    char line[512];
    int status;

    if (!verb_parse(&v, args, &status))
        return status;
    body = json_object();
    status = arguments(&v, flags, body);
    if (!status)
        status = verb_machine(&v, &m);
    if (status) {
        json_decref(body);
        return status;
    }
    status = client_job(&m, "POST", "/v1/migrate", body, isatty(STDERR_FILENO) ? show : NULL, &bar, &answer);
    if (bar.shown)
        fprintf(stderr, "\r\033[K");
    if (status)
        return status;
    if (v.json) {
        json_object_set_new(answer, "name", json_string(m.name));
        return verb_print_json(answer);
    }
    snprintf(line, sizeof(line), "%s: moved to %.200s in %.1f s, stood still for %.0f ms; %.0f rounds, %s%s\n", m.name, v.words[1],
             member(answer, "total_ms") / 1000, member(answer, "downtime_ms"), member(answer, "rounds"),
             verb_bytes(member(answer, "bytes")),
             json_is_true(json_object_get(answer, "post_copy")) ? ", part of its memory followed" : "");
    json_decref(answer);
    return cli_print(line);
}
