/*
 * `ringfort top`: a table of the machines that run, anew every second. Rates come from the difference of two
 * samples of each machine's counters.
 */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include "base/util.h"
#include "cli/cli.h"
#include "cli/client.h"
#include "cli/terminal.h"
#include "cli/verb.h"
#include "vm/status.h"

#define PATIENCE_S 2u

static const char help[] =
    "Usage: ringfort top [--interval SECONDS] [--count N] [-o text|json]\n\n"
    "Shows the machines that run with their use of processors, memory, disks and networks, until q or\n"
    "Ctrl-C. With -o json, or where the output is no terminal, prints one sample; --count N: so many.\n\n"
    "  --interval SECONDS   between samples (default 1)\n"
    "  -n, --count N        end after N samples\n"
    "  -o, --output FORMAT  text (default) or json: an array of machines for each sample\n"
    "  --help               show this text\n";

/* One machine's counters at one moment. */
struct sample {
    struct registry_entry machine;
    bool known;
    char state[16], engine[16];
    unsigned cpus;
    double at; /* seconds */
    bool counted; /* instructions are */
    double cpu, instructions, ram, ram_resident, own, disk_read, disk_written, net_received, net_sent;
};

struct samples {
    struct sample *list;
    unsigned count;
};

/* What happened between two samples, per second. */
struct rates {
    double cpu_percent, mips, disk_read, disk_written, net_received, net_sent;
};

static double now_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static double number_of(const json_t *o, const char *key) { return json_number_value(json_object_get(o, key)); }

static void read_stats(struct sample *s, const json_t *stats)
{
    const json_t *memory = json_object_get(stats, "memory"), *vcpus = json_object_get(stats, "vcpus"), *v;
    const char *id, *state = json_string_value(json_object_get(stats, "state"));
    const char *engine = json_string_value(json_object_get(stats, "engine"));
    json_t *device;
    size_t i;

    s->known = true;
    snprintf(s->state, sizeof(s->state), "%s", state ? state : "-");
    snprintf(s->engine, sizeof(s->engine), "%s", engine ? engine : "-");
    s->cpus = (unsigned)json_array_size(vcpus);
    s->cpu = number_of(stats, "cpu_seconds");
    s->counted = true;
    json_array_foreach(vcpus, i, v)
    {
        s->counted &= json_is_integer(json_object_get(v, "instructions"));
        s->instructions += number_of(v, "instructions");
    }
    s->ram = number_of(memory, "ram_bytes");
    s->ram_resident = number_of(memory, "ram_resident_bytes");
    s->own = number_of(memory, "own_bytes");
    json_object_foreach(json_object_get(stats, "devices"), id, device)
    {
        s->disk_read += number_of(device, "read_bytes");
        s->disk_written += number_of(device, "write_bytes");
        s->net_received += number_of(device, "received_bytes");
        s->net_sent += number_of(device, "sent_bytes");
    }
}

/* 0 or a negative errno (logged). */
static int take(struct samples *out)
{
    struct registry_entry *machines;
    int count = registry_list(&machines);

    *out = (struct samples){0};
    if (count < 0)
        return count;
    out->list = calloc((size_t)count + 1, sizeof(*out->list));
    for (int i = 0; out->list && i < count; i++) {
        struct sample *s = &out->list[out->count++];
        json_t *stats;

        s->machine = machines[i];
        snprintf(s->state, sizeof(s->state), "unresponsive");
        strcpy(s->engine, "-");
        int status = client_try(&machines[i], "GET", "/v1/stats", NULL, PATIENCE_S, &stats);
        s->at = now_seconds();
        if (status == 200)
            read_stats(s, stats);
        json_decref(stats);
    }
    free(machines);
    return out->list ? 0 : -ENOMEM;
}

/* The same machine in an older sample: the name may have passed to another process since. */
static const struct sample *before(const struct samples *old, const struct sample *s)
{
    for (unsigned i = 0; i < old->count; i++) {
        const struct sample *o = &old->list[i];
        if (o->known && o->machine.pid == s->machine.pid && strcmp(o->machine.name, s->machine.name) == 0)
            return o;
    }
    return NULL;
}

static struct rates rates(const struct sample *s, const struct sample *old)
{
    double seconds = old ? s->at - old->at : 0;

    if (!s->known || seconds <= 0)
        return (struct rates){0};
#define RATE(field) (s->field > old->field ? (s->field - old->field) / seconds : 0)
    return (struct rates){.cpu_percent = 100 * RATE(cpu),
                          .mips = RATE(instructions) / 1e6,
                          .disk_read = RATE(disk_read),
                          .disk_written = RATE(disk_written),
                          .net_received = RATE(net_received),
                          .net_sent = RATE(net_sent)};
#undef RATE
}

static json_t *to_json(const struct samples *now, const struct samples *old)
{
    json_t *list = json_array();

    for (unsigned i = 0; i < now->count; i++) {
        const struct sample *s = &now->list[i];
        struct rates r = rates(s, before(old, s));
        json_array_append_new(
            list,
            json_pack("{s:s, s:i, s:s, s:s, s:i, s:f, s:o, s:I, s:I, s:I, s:f, s:f, s:f, s:f}", "name",
                      s->machine.name, "pid", (int)s->machine.pid, "state", s->state, "engine", s->engine, "cpus",
                      (int)s->cpus, "cpu_percent", r.cpu_percent, "million_instructions_per_second", s->counted ? json_real(r.mips) : json_null(),
                      "ram_bytes", (json_int_t)s->ram, "ram_resident_bytes", (json_int_t)s->ram_resident,
                      "own_bytes", (json_int_t)s->own, "disk_read_bytes_per_second", r.disk_read,
                      "disk_write_bytes_per_second", r.disk_written, "net_received_bytes_per_second",
                      r.net_received, "net_sent_bytes_per_second", r.net_sent));
    }
    return list;
}

/* A line without its newline, cut to the terminal's width. */
static void put_line(FILE *f, unsigned columns, const char *line, bool clear)
{
    fprintf(f, "%.*s%s\n", (int)columns, line, clear ? "\x1b[K" : "");
}

static void put_table(FILE *f, const struct samples *now, const struct samples *old, unsigned columns, unsigned rows,
                      bool clear)
{
    char line[512];

    snprintf(line, sizeof(line), "%-16s %-12s %-9s %4s %6s %6s %9s %9s %9s %9s %9s %9s", "NAME", "STATE", "ENGINE",
             "CPUS", "CPU%", "MIPS", "RAM USED", "OWN", "READ/s", "WRITE/s", "RECV/s", "SENT/s");
    put_line(f, columns, line, clear);
    for (unsigned i = 0; i < now->count && i + 2 < rows; i++) {
        const struct sample *s = &now->list[i];
        struct rates r = rates(s, before(old, s));
        char mips[24] = "-"; /* not counted */
        if (s->counted)
            snprintf(mips, sizeof(mips), "%.0f", r.mips);
        int n = snprintf(line, sizeof(line), "%-16s %-12s %-9s %4u %6.1f %6s %9s %9s", s->machine.name, s->state,
                         s->engine, s->cpus, r.cpu_percent, mips, verb_bytes(s->ram_resident), verb_bytes(s->own));
        snprintf(line + n, sizeof(line) - (size_t)n, " %9s %9s %9s %9s", verb_bytes(r.disk_read),
                 verb_bytes(r.disk_written), verb_bytes(r.net_received), verb_bytes(r.net_sent));
        put_line(f, columns, line, clear);
    }
    if (!now->count)
        put_line(f, columns, "no machine runs", clear);
}

/* Waits; true when the user wants to leave. */
static bool pause_for(double seconds, bool keys)
{
    double end = now_seconds() + seconds;

    for (double left; (left = end - now_seconds()) > 0;) {
        struct pollfd p = {.fd = keys ? STDIN_FILENO : -1, .events = POLLIN};
        char key;
        if (poll(&p, 1, (int)(left * 1000) + 1) <= 0)
            continue;
        if (read(STDIN_FILENO, &key, 1) <= 0)
            keys = false;
        else if (key == 'q' || key == 'Q')
            return true;
    }
    return false;
}

static int show(const struct verb *v, const struct samples *now, const struct samples *old, bool live)
{
    struct winsize ws = {0};
    char *text = NULL;
    size_t len;

    if (v->json)
        return verb_print_json(to_json(now, old));
    FILE *f = open_memstream(&text, &len);
    if (!f)
        return vm_status_of(-ENOMEM);
    bool sized = live && ioctl(STDOUT_FILENO, TIOCGWINSZ, &ws) == 0 && ws.ws_col && ws.ws_row;
    if (live)
        fputs("\x1b[H", f);
    put_table(f, now, old, sized ? ws.ws_col : 500, sized ? ws.ws_row : 100000, live);
    if (live)
        fputs("\x1b[J", f);
    int status = fclose(f) == 0 ? cli_print(text) : vm_status_of(-ENOMEM);
    free(text);
    return status;
}

int cli_top(char **args)
{
    struct verb_flag flags[] = {
        {.name = "--interval", .form = "SECONDS"}, {.name = "--count", .alias = "-n", .form = "N"}, {0}};
    struct verb v = {.name = "top", .help = help, .flags = flags};
    uint64_t interval = 1, count = 1;
    struct samples old, now;
    int status;

    if (!verb_parse(&v, args, &status))
        return status;
    status = verb_number(&v, &flags[0], 1, 3600, &interval);
    if (!status)
        status = verb_number(&v, &flags[1], 1, 1000000000, &count);
    if (status)
        return status;
    bool live = !v.json && isatty(STDOUT_FILENO), endless = live && !flags[1].given;
    bool keys = live && terminal_raw(STDIN_FILENO, true);
    if (live)
        status = cli_print("\x1b[H\x1b[2J");
    if (!status)
        status = vm_status_of(take(&old));
    if (!status && endless)
        status = show(&v, &old, &old, live);
    while (!status && (endless || count--)) {
        if (pause_for((double)interval, keys)) {
            break;
        }
        status = vm_status_of(take(&now));
        if (!status)
            status = show(&v, &now, &old, live);
        free(old.list);
        old = now;
    }
    free(old.list);
    terminal_restore();
    return status;
}
