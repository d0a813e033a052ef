/*
 * What verbs share about arguments and output. The flags of a configuration are the table in
 * vm/config_options.c; a verb's own stand with the verb.
 */
#include "cli/cli.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "base/util.h"
#include "vm/config_value.h"
#include "vm/status.h"
#include "vm/suggest.h"

#define MAX_FLAGS 64

static const struct vm_config_option_info config_flag = {
    "config", "FILE",
    "read the same options from a JSON file, as {\"flag\": value};\n"
    "flags override it, a list's flags replace its whole list",
    false};
static const struct vm_config_option_info help_flag = {"help", NULL, "show this text", false};

/* What users of other programs type for the same thing. */
static const struct {
    const char *foreign, *ours;
} aliases[] = {
    {"m", "memory"},       {"mem", "memory"},     {"ram", "memory"},     {"smp", "cpus"},
    {"cpu", "cpu-model"},  {"append", "cmdline"}, {"drive", "disk"},     {"hda", "disk"},
    {"netdev", "net"},     {"nic", "net"},        {"serial", "console"}, {"accel", "engine"},
    {"ramdisk", "initrd"}, {"module", "initrd"},  {"d", "log-level"},    {"verbose", "log-level"},
    {"v", "log-level"},
};

int cli_print(const char *text)
{
    if (fputs(text, stdout) >= 0 && fflush(stdout) == 0)
        return 0;
    log_error("cannot write to standard output: %s", strerror(errno));
    return VM_STATUS_BACKEND;
}

bool cli_wants_help(char **args)
{
    for (; *args; args++)
        if (strcmp(*args, "--help") == 0 || strcmp(*args, "-h") == 0)
            return true;
    return false;
}

bool cli_flag(char ***args, const char *flag, const char **value)
{
    const char *arg = **args;
    size_t n = strlen(flag);
    if (strncmp(arg, flag, n) != 0 || (arg[n] && !(value && arg[n] == '=')))
        return false;
    if (value && arg[n] == '=')
        *value = arg + n + 1;
    else if (value && ((*value = (*args)[1])))
        ++*args;
    return true;
}

int cli_unknown(const char *verb, const char *arg, const char *const *names)
{
    const char *word = arg + strspn(arg, "-");
    char *copy = strdup(word);
    if (copy)
        copy[strcspn(copy, "=")] = 0;
    const char *nearest = copy && *arg == '-' ? suggest_nearest(copy, names) : NULL;
    const char *what = *arg == '-' ? "flag" : "argument";
    if (nearest)
        log_error("%s: unknown %s %s; did you mean %s%s?", verb, what, config_quote(arg),
                  nearest[1] ? "--" : "-", nearest);
    else
        log_error("%s: unknown %s %s; 'ringfort %s --help' shows what there is", verb, what,
                  config_quote(arg), verb);
    free(copy);
    return VM_STATUS_USAGE;
}

/* The flags of a verb: its own, --config and --help, and the configuration's. NULL past the end. */
struct flag_list {
    struct cli_own_flag *own;
    unsigned own_count;
};

static bool flag_at(const struct flag_list *list, unsigned i, struct vm_config_option_info *out)
{
    if (i == 0)
        *out = config_flag;
    else if (i <= list->own_count)
        *out = list->own[i - 1].info;
    else if (i == list->own_count + 1)
        *out = help_flag;
    else
        return vm_config_option(i - list->own_count - 2, out);
    return true;
}

int cli_print_help(const char *head, const struct cli_own_flag *own, unsigned own_count,
                   const char *tail)
{
    const struct flag_list list = {(struct cli_own_flag *)own, own_count};
    struct vm_config_option_info option;
    char *text = NULL;
    size_t size;
    FILE *f = open_memstream(&text, &size);
    if (!f)
        return vm_status_of(-ENOMEM);
    fprintf(f, "%s\nFlags (--flag VALUE or --flag=VALUE; those marked * may be repeated):\n", head);
    for (unsigned i = 0; flag_at(&list, i, &option); i++) {
        char left[64];
        snprintf(left, sizeof(left), "%s--%s%s%s", option.list ? "* " : "  ", option.name,
                 option.argument ? " " : "", option.argument ? option.argument : "");
        for (const char *line = option.help; line;) {
            int n = (int)strcspn(line, "\n");
            fprintf(f, "%-26s %.*s\n", left, n, line);
            left[0] = 0;
            line = line[n] ? line + n + 1 : NULL;
        }
    }
    fprintf(f,
            "\nA comma inside a value is written twice (path=a,,b.img). Sizes count in powers of "
            "1024.\n%s",
            tail);
    int status = fclose(f) == 0 ? cli_print(text) : vm_status_of(-ENOMEM);
    free(text);
    return status;
}

static int unknown_flag(const struct flag_list *list, const char *verb, const char *arg)
{
    struct vm_config_option_info option;
    const char *names[MAX_FLAGS] = {NULL};
    char word[64];

    if (*arg != '-') {
        log_error("%s: unexpected argument %s; did you mean --kernel %s?", verb, config_quote(arg),
                  config_quote(arg));
        return VM_STATUS_USAGE;
    }
    snprintf(word, sizeof(word), "%s", arg + strspn(arg, "-"));
    word[strcspn(word, "=")] = 0;
    for (unsigned i = 0; i < ARRAY_SIZE(aliases); i++) {
        if (strcmp(word, aliases[i].foreign) == 0) {
            log_error("%s: unknown flag %s; did you mean --%s?", verb, config_quote(arg),
                      aliases[i].ours);
            return VM_STATUS_USAGE;
        }
    }
    for (unsigned i = 0; i < MAX_FLAGS - 1 && flag_at(list, i, &option); i++)
        names[i] = option.name;
    return cli_unknown(verb, arg, names);
}

/* Reads the flag at *args and moves past it; *value is NULL for one without. 0, or the exit status
 * (logged). */
static int next_flag(const struct flag_list *list, const char *verb, char ***args,
                     struct vm_config_option_info *option, const char **value)
{
    const char *arg = *(*args)++;
    size_t n = strcspn(arg, "=");
    unsigned i = 0;

    while (flag_at(list, i, option)) {
        if (strncmp(arg, "--", 2) == 0 && strlen(option->name) == n - 2 &&
            strncmp(arg + 2, option->name, n - 2) == 0)
            break;
        i++;
    }
    if (!flag_at(list, i, option))
        return unknown_flag(list, verb, arg);
    *value = arg[n] ? arg + n + 1 : NULL;
    if (!option->argument && *value) {
        log_error("--%s takes no value; did you mean --%s?", option->name, option->name);
        return VM_STATUS_USAGE;
    }
    if (!option->argument || *value)
        return 0;
    /* A value that looks like a flag is more often a forgotten value. */
    if (!**args || strncmp(**args, "--", 2) == 0) {
        log_error("--%s needs a value: --%s %s, or --%s=VALUE for one that begins with dashes",
                  option->name, option->name, option->argument, option->name);
        return VM_STATUS_USAGE;
    }
    *value = *(*args)++;
    return 0;
}

static int given_twice(const char *flag)
{
    log_error("--%s: is given twice; leave one of them out", flag);
    return VM_STATUS_USAGE;
}

static int empty_value(const char *flag)
{
    log_error("--%s: needs a value that is not empty", flag);
    return VM_STATUS_USAGE;
}

/* First way through the arguments: all flags are known, and the verb's own are stored. */
static int read_own(char **args, const char *verb, const struct flag_list *list, const char **file)
{
    struct vm_config_option_info option;
    const char *value;

    while (*args) {
        int status = next_flag(list, verb, &args, &option, &value);
        if (status)
            return status;
        if (strcmp(option.name, config_flag.name) == 0) {
            if (*file)
                return given_twice(option.name);
            if (!*value)
                return empty_value(option.name);
            *file = value;
        }
        for (unsigned i = 0; i < list->own_count; i++) {
            struct cli_own_flag *own = &list->own[i];
            if (strcmp(option.name, own->info.name) != 0)
                continue;
            if (own->given && value)
                return given_twice(option.name);
            if (value && !*value)
                return empty_value(option.name);
            own->given = true;
            own->value = value;
        }
    }
    return 0;
}

int cli_read_config(char **args, const char *verb, struct cli_own_flag *own, unsigned own_count,
                    struct vm_config *config)
{
    const struct flag_list list = {own, own_count};
    struct vm_config_option_info option;
    const char *value, *file = NULL;
    int r, status = read_own(args, verb, &list, &file);

    /* The file comes first wherever --config stands, so that flags override it. */
    if (status == 0 && file)
        status = vm_status_of(vm_config_load_file(config, file));
    while (status == 0 && *args) {
        status = next_flag(&list, verb, &args, &option, &value);
        if (status)
            break;
        r = vm_config_set_flag(config, option.name, value ? value : "");
        /* -ENOENT: not the configuration's, so it was the verb's own. */
        if (r != -ENOENT)
            status = vm_status_of(r);
    }
    return status ? status : vm_status_of(vm_config_finish(config));
}
