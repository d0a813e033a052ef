/* Arguments and output of the verbs about running machines; verb.h says how they are used. */
#include "cli/verb.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/log.h"
#include "base/util.h"
#include "cli/cli.h"
#include "cli/client.h"
#include "vm/config_value.h"
#include "vm/status.h"

#define MAX_NAMES 16

static int unknown(const struct verb *v, const char *arg)
{
    const char *names[MAX_NAMES] = {"o", "output", "help"};
    unsigned n = 3;

    for (const struct verb_flag *f = v->flags; f && f->name && n < MAX_NAMES - 1; f++)
        names[n++] = f->name + strspn(f->name, "-");
    return cli_unknown(v->name, arg, names);
}

static struct verb_flag *find_flag(const struct verb *v, char ***args, const char **value)
{
    for (struct verb_flag *f = v->flags; f && f->name; f++) {
        const char **slot = f->form ? value : NULL;
        if (cli_flag(args, f->name, slot) || (f->alias && cli_flag(args, f->alias, slot)))
            return f;
    }
    return NULL;
}

/* One argument that begins with a dash. 0 or the exit status (logged). */
static int take_flag(struct verb *v, char ***args)
{
    const char *arg = **args, *value = NULL;
    struct verb_flag *f;

    if (cli_flag(args, "-o", &value) || cli_flag(args, "--output", &value)) {
        if (!value || (strcmp(value, "text") != 0 && strcmp(value, "json") != 0)) {
            log_error("%s: the output is text or json; did you mean -o json?", v->name);
            return VM_STATUS_USAGE;
        }
        v->json = strcmp(value, "json") == 0;
        return 0;
    }
    f = find_flag(v, args, &value);
    if (!f)
        return unknown(v, arg);
    if (f->given) {
        log_error("%s: %s is given twice; leave one of them out", v->name, f->name);
        return VM_STATUS_USAGE;
    }
    if (f->form && !value) {
        log_error("%s: %s needs a value: %s %s", v->name, f->name, f->name, f->form);
        return VM_STATUS_USAGE;
    }
    f->given = true;
    f->value = value;
    return 0;
}

bool verb_parse(struct verb *v, char **args, int *status)
{
    bool only_words = false;

    *status = 0;
    if (cli_wants_help(args)) {
        *status = cli_print(v->help);
        return false;
    }
    for (; *args; args++) {
        if (!only_words && strcmp(*args, "--") == 0) {
            only_words = true;
        } else if (!only_words && **args == '-' && (*args)[1]) {
            *status = take_flag(v, &args);
            if (*status)
                return false;
        } else if (v->word_count == MIN(v->max_words, VERB_MAX_WORDS)) {
            *status = unknown(v, *args);
            return false;
        } else {
            v->words[v->word_count++] = *args;
        }
    }
    if (v->word_count >= v->min_words)
        return true;
    log_error("%s: something is missing: ringfort %s %s; 'ringfort ls' shows the machines that run", v->name, v->name,
              v->what);
    *status = VM_STATUS_USAGE;
    return false;
}

int verb_number(const struct verb *v, const struct verb_flag *f, uint64_t min, uint64_t max, uint64_t *out)
{
    char *end;

    if (!f->given)
        return 0;
    errno = 0;
    unsigned long long n = strtoull(f->value, &end, 10);
    if (f->value[0] < '0' || f->value[0] > '9' || *end || errno || n < min || n > max) {
        log_error("%s: %s %s is not a number in %llu...%llu; did you mean %s %llu?", v->name, f->name,
                  config_quote(f->value), (unsigned long long)min, (unsigned long long)max, f->name,
                  (unsigned long long)*out);
        return VM_STATUS_USAGE;
    }
    *out = n;
    return 0;
}

int verb_folder(const struct verb *v, const struct verb_flag *f, char out[PATH_MAX])
{
    struct stat st;
    int err = !realpath(f->value, out) || stat(out, &st) < 0 ? -errno : S_ISDIR(st.st_mode) ? 0 : -ENOTDIR;

    if (err)
        log_error("%s: %s %s: %s; give a folder", v->name, f->name, config_quote(f->value), strerror(-err));
    return vm_status_of(err);
}

int verb_machine(const struct verb *v, struct registry_entry *out)
{
    int err = registry_find(v->words[0], out);
    return err == -ENOENT || err == -ENOTUNIQ ? VM_STATUS_USAGE : vm_status_of(err);
}

int verb_print_json(json_t *answer)
{
    char *text = answer ? json_dumps(answer, JSON_INDENT(4) | JSON_REAL_PRECISION(12)) : NULL, *line = NULL;
    int status;

    if (text && asprintf(&line, "%s\n", text) >= 0) {
        status = cli_print(line);
    } else {
        log_error("out of memory");
        status = VM_STATUS_HOST;
        line = NULL;
    }
    free(line);
    free(text);
    json_decref(answer);
    return status;
}

static char *result_buffer(void)
{
    static char buffer[4][32];
    static unsigned next;
    return buffer[next++ % 4];
}

const char *verb_duration(double seconds)
{
    char *out = result_buffer();
    unsigned long long s = seconds > 0 ? (unsigned long long)seconds : 0;

    if (s < 60)
        snprintf(out, 32, "%llus", s);
    else if (s < 3600)
        snprintf(out, 32, "%llum %llus", s / 60, s % 60);
    else if (s < 86400)
        snprintf(out, 32, "%lluh %llum", s / 3600, s / 60 % 60);
    else
        snprintf(out, 32, "%llud %lluh", s / 86400, s / 3600 % 24);
    return out;
}

const char *verb_bytes(double bytes)
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    char *out = result_buffer();
    unsigned u = 0;

    while (bytes >= 1000 && u + 1 < ARRAY_SIZE(units)) {
        bytes /= 1024;
        u++;
    }
    snprintf(out, 32, u && bytes < 9.95 ? "%.1f %s" : "%.0f %s", bytes, units[u]);
    return out;
}

/* The end that verbs have in common: true: *answer is to be told as text. */
static bool as_text(const struct verb *v, const struct registry_entry *m, json_t *answer, int *status)
{
    if (*status)
        return false;
    if (!v->json)
        return true;
    json_object_set_new(answer, "name", json_string(m->name));
    *status = verb_print_json(answer);
    return false;
}

bool verb_job(const struct verb *v, const char *path, json_t *body, struct registry_entry *m, json_t **answer, int *status)
{
    *status = verb_machine(v, m);
    if (*status)
        json_decref(body);
    else
        *status = client_job(m, "POST", path, body, NULL, NULL, answer);
    return as_text(v, m, *answer, status);
}

int verb_post(struct verb *v, char **args, const char *path)
{
    struct registry_entry m;
    json_t *answer = NULL;
    char line[REGISTRY_MAX_NAME + 64];
    int status;

    if (!verb_parse(v, args, &status))
        return status;
    status = verb_machine(v, &m);
    if (!status)
        status = client_call(&m, "POST", path, NULL, CLIENT_PATIENCE_S, &answer);
    if (!as_text(v, &m, answer, &status))
        return status;
    const char *state = json_string_value(json_object_get(answer, "state"));
    snprintf(line, sizeof(line), "%s: %.40s\n", m.name, state ? state : "done");
    json_decref(answer);
    return cli_print(line);
}
