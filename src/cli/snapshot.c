/* `ringfort snapshot`: save, ls, restore, rm. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "base/util.h"
#include "cli/cli.h"
#include "cli/detach.h"
#include "cli/verb.h"
#include "vm/config.h"
#include "vm/config_value.h"
#include "vm/snapshot.h"
#include "vm/snapshot_store.h"
#include "vm/status.h"
#include "vm/suggest.h"

static const char help[] =
    "Usage: ringfort snapshot save NAME SNAPSHOT [--compress] [-o text|json]\n"
    "       ringfort snapshot ls [-o text|json]\n"
    "       ringfort snapshot restore SNAPSHOT [flag...]\n"
    "       ringfort snapshot rm SNAPSHOT [-o text|json]\n\n"
    "Saves a running machine, with its memory and disks as they are at one moment, and makes machines\n"
    "that go on from there. 'ringfort snapshot COMMAND --help' tells more.\n";

static const char save_help[] =
    "Usage: ringfort snapshot save NAME SNAPSHOT [--compress] [-o text|json]\n\n"
    "Saves the machine NAME as SNAPSHOT. The guest goes on meanwhile; it stands still only for the moment\n"
    "that is saved. Disks are copied (where the file system can, without taking room), but those with\n"
    "readonly=on stay where they are.\n\n"
    "  --compress           pack memory with zstd: less room, but restored machines share no memory\n"
    "                       with others, and unpack it while they run\n"
    "  -o, --output FORMAT  text (default) or json: pause_ms, total_ms, memory_bytes, disk_bytes\n"
    "  --help               show this text\n";

static const char ls_help[] = "Usage: ringfort snapshot ls [-o text|json]\n\n"
                              "Lists the snapshots of this user.\n\n"
                              "  -o, --output FORMAT  text (default) or json\n"
                              "  --help               show this text\n";

static const char rm_help[] = "Usage: ringfort snapshot rm SNAPSHOT [-o text|json]\n\n"
                              "Removes a snapshot. Machines that were restored from it go on.\n\n"
                              "  -o, --output FORMAT  text (default) or json\n"
                              "  --help               show this text\n";

static const char restore_help[] =
    "Usage: ringfort snapshot restore SNAPSHOT [--name NEW] [flag...]\n\n"
    "Makes a machine that goes on from the snapshot, in the foreground like 'ringfort run'. The snapshot\n"
    "stays as it is: several machines can be made from it, and share the memory that they do not change.\n"
    "Its disks become disks of the new machine's own, in ~/.local/share/ringfort/machines/NEW.\n\n"
    "  --name NEW           the machine's name (default: that of the saved one)\n"
    "  --paused             begin paused; 'ringfort resume NEW' lets it go on\n"
    "  --detach             return as soon as the machine runs and leave it running\n"
    "  --engine ENGINE      how processors run (default: as the saved machine was started)\n"
    "  --console CONSOLE    the serial port's other end (default: as the saved machine was started)\n"
    "  --net KIND[,...]     in place of the saved machine's cards, as many and of the same addresses:\n"
    "                       for other forwarded ports\n"
    "  --stats FILE         write figures of the run there as JSON at exit\n"
    "  --log-level LEVEL    error, warn, info or debug\n"
    "  --help               show this text\n\n"
    "Exit status: as 'ringfort run'.\n";

static int save(char **args)
{
    struct verb_flag flags[] = {{.name = "--compress"}, {0}};
    struct verb v = {.name = "snapshot save", .min_words = 2, .max_words = 2, .what = "NAME SNAPSHOT", .help = save_help,
                     .flags = flags};
    struct registry_entry m;
    json_t *answer = NULL;
    char line[256];
    int status;

    if (!verb_parse(&v, args, &status) || (status = vm_status_of(snapshot_check_name(v.words[1]))) ||
        !verb_job(&v, "/v1/snapshot", json_pack("{s:s, s:b}", "name", v.words[1], "compress", (int)flags[0].given), &m, &answer,
                  &status))
        return status;
    snprintf(line, sizeof(line), "%s: saved as %s in %.1f s, paused for %.1f ms; memory %s, disks %s\n", m.name, v.words[1],
             json_number_value(json_object_get(answer, "total_ms")) / 1000,
             json_number_value(json_object_get(answer, "pause_ms")),
             verb_bytes(json_number_value(json_object_get(answer, "memory_bytes"))),
             verb_bytes(json_number_value(json_object_get(answer, "disk_bytes"))));
    json_decref(answer);
    return cli_print(line);
}

static int print_table(const struct vm_snapshot_info *list, unsigned count)
{
    char *text = NULL;
    size_t len;
    FILE *f = open_memstream(&text, &len);

    if (!f)
        return VM_STATUS_HOST;
    fprintf(f, "%-20s %-16s %-20s %4s %9s %5s %9s\n", "NAME", "MACHINE", "CREATED", "CPUS", "MEMORY", "DISKS", "STORED");
    for (unsigned i = 0; i < count; i++)
        fprintf(f, "%-20s %-16s %-20s %4u %9s %5u %9s\n", list[i].name, list[i].machine, list[i].created, list[i].cpus,
                verb_bytes((double)list[i].memory), list[i].disks, verb_bytes((double)list[i].stored));
    int status = fclose(f) == 0 ? cli_print(text) : VM_STATUS_HOST;
    free(text);
    return status;
}

static int ls(char **args)
{
    struct verb v = {.name = "snapshot ls", .help = ls_help};
    struct vm_snapshot_info *list;
    unsigned count;
    int status;

    if (!verb_parse(&v, args, &status))
        return status;
    status = vm_status_of(vm_snapshot_list(&list, &count));
    if (!status && v.json) {
        json_t *array = json_array();

        for (unsigned i = 0; i < count; i++)
            json_array_append_new(array, json_pack("{s:s, s:s, s:s, s:s, s:i, s:I, s:i, s:I}", "name", list[i].name, "machine",
                                                   list[i].machine, "created", list[i].created, "engine", list[i].engine,
                                                   "cpus", (int)list[i].cpus, "memory_bytes", (json_int_t)list[i].memory,
                                                   "disks", (int)list[i].disks, "stored_bytes", (json_int_t)list[i].stored));
        status = verb_print_json(array);
    } else if (!status) {
        status = print_table(list, count);
    }
    free(list);
    return status;
}

static int rm(char **args)
{
    struct verb v = {.name = "snapshot rm", .min_words = 1, .max_words = 1, .what = "SNAPSHOT", .help = rm_help};
    char line[VM_SNAPSHOT_NAME_MAX + 32];
    int status;

    if (!verb_parse(&v, args, &status))
        return status;
    status = vm_status_of(vm_snapshot_remove(v.words[0]));
    if (status)
        return status;
    if (v.json)
        return verb_print_json(json_pack("{s:s, s:b}", "snapshot", v.words[0], "removed", 1));
    snprintf(line, sizeof(line), "%s: removed\n", v.words[0]);
    return cli_print(line);
}

/* ---- restore ---- */

struct restoring {
    struct vm_snapshot *snapshot;
    struct vm_config *config;
    bool paused;
};

static struct vm *make(void *opaque, int *status)
{
    struct restoring *r = opaque;

    return vm_snapshot_restore(r->snapshot, r->config, r->paused ? VM_HOLD_USER : VM_HOLD_SAVE, status);
}

/* Cards keep their addresses: the guest knows them. */
static int keep_addresses(const struct vm_config *saved, struct vm_config *c)
{
    if (saved->net_count != c->net_count) {
        log_error("snapshot restore: the saved machine has %u network cards, so --net has to be given %u times",
                  saved->net_count, saved->net_count);
        return VM_STATUS_USAGE;
    }
    for (unsigned i = 0; i < c->net_count; i++) {
        memcpy(c->nets[i].mac, saved->nets[i].mac, sizeof(c->nets[i].mac));
        c->nets[i].mac_given = true;
    }
    return 0;
}

/* The saved machine's configuration in c, with what the flags say in place of some of it. */
static int configure(struct restoring *r, const struct verb_flag *flags, unsigned count)
{
    struct vm_config saved;
    struct vm_config *c = r->config;
    bool nets = false;
    int err, status = 0;

    if (vm_config_init(&saved))
        return VM_STATUS_HOST;
    err = vm_snapshot_config(r->snapshot, &saved);
    if (!err && !saved.name_given)
        err = vm_config_set_flag(&saved, "name", vm_snapshot_machine(r->snapshot));
    if (!err)
        err = vm_config_finish(&saved);
    if (!err)
        err = vm_snapshot_config(r->snapshot, c);
    for (unsigned i = 0; i < count && !err; i++) {
        if (!flags[i].given || !flags[i].form)
            continue;
        nets |= strcmp(flags[i].name, "--net") == 0;
        err = vm_config_set_flag(c, flags[i].name + 2, flags[i].value);
    }
    if (!err && !c->name)
        err = vm_config_set_flag(c, "name", saved.name);
    if (!err)
        err = vm_config_finish(c);
    if (err)
        status = vm_status_of(err);
    else if (nets)
        status = keep_addresses(&saved, c);
    vm_config_destroy(&saved);
    return status;
}

static int restore(char **args)
{
    struct verb_flag flags[] = {{.name = "--name", .form = "NEW"},       {.name = "--engine", .form = "ENGINE"},
                                {.name = "--console", .form = "CONSOLE"}, {.name = "--net", .form = "KIND"},
                                {.name = "--stats", .form = "FILE"},      {.name = "--log-level", .form = "LEVEL"},
                                {.name = "--paused"},                     {.name = "--detach"},
                                {0}};
    struct verb v = {.name = "snapshot restore", .min_words = 1, .max_words = 1, .what = "SNAPSHOT", .help = restore_help,
                     .flags = flags};
    struct vm_config config;
    struct restoring r = {.config = &config};
    struct detach detach = {.ready_fd = -1};
    bool detached;
    int status;

    if (!verb_parse(&v, args, &status))
        return status;
    r.paused = flags[6].given;
    detached = flags[7].given;
    if (vm_config_init(&config)) {
        log_error("out of memory");
        return VM_STATUS_HOST;
    }
    status = vm_status_of(vm_snapshot_open(v.words[0], &r.snapshot));
    if (!status)
        status = configure(&r, flags, 6);
    if (!status) {
        log_set_level(config.log_level);
        log_set_machine(config.name);
        status = vm_status_of(vm_config_check_host(&config));
    }
    if (!status && detached && detach_begin(&detach, config.name, &status))
        goto out;
    if (!status)
        status = cli_run_machine(&config, detached ? &detach : NULL, make, &r);
out:
    vm_snapshot_close(r.snapshot);
    vm_config_destroy(&config);
    return status;
}

static const struct {
    const char *name;
    int (*run)(char **args);
} commands[] = {{"save", save}, {"ls", ls}, {"restore", restore}, {"rm", rm}};

int cli_snapshot(char **args)
{
    const char *names[ARRAY_SIZE(commands) + 1] = {NULL}, *nearest;

    for (unsigned i = 0; i < ARRAY_SIZE(commands); i++) {
        names[i] = commands[i].name;
        if (*args && strcmp(*args, commands[i].name) == 0)
            return commands[i].run(args + 1);
    }
    if (cli_wants_help(args))
        return cli_print(help);
    nearest = *args ? suggest_nearest(*args, names) : NULL;
    if (!*args)
        log_error("snapshot: what to do is missing: save, ls, restore or rm");
    else if (nearest)
        log_error("snapshot: there is no command %s; did you mean 'ringfort snapshot %s'?", config_quote(*args), nearest);
    else
        log_error("snapshot: there is no command %s; there are save, ls, restore and rm", config_quote(*args));
    return VM_STATUS_USAGE;
}
