/*
 * `ringfort logs`: what a machine's console has printed so far, or what ringfort said about it.
 *
 * A detached machine keeps its console in files, which are there after its end as well; of one in the foreground
 * there is what its process remembers.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"
#include "cli/cli.h"
#include "cli/client.h"
#include "cli/terminal.h"
#include "cli/verb.h"
#include "vm/status.h"

static const char help[] =
    "Usage: ringfort logs NAME [--lines N] [--messages] [-o text|json]\n\n"
    "Prints what a machine's console has printed so far; of a detached machine also after its end.\n\n"
    "  -n, --lines N        only the last N lines\n"
    "  --messages           what ringfort said about a detached machine instead\n"
    "  -o, --output FORMAT  text (default) or json\n"
    "  --help               show this text\n";

struct text {
    char *data;
    size_t len;
};

/* Adds a file's content; one that is not there adds nothing. 0 or a negative errno. */
static int add_file(struct text *t, const char *path)
{
    struct stat st;
    int err = 0, fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY);

    if (fd < 0)
        return errno == ENOENT ? 0 : -errno;
    if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode))
        err = -EINVAL;
    char *more = err ? NULL : realloc(t->data, t->len + (size_t)st.st_size + 1);
    if (!err && !more)
        err = -ENOMEM;
    if (more)
        t->data = more;
    for (off_t left = st.st_size; !err && left > 0;) {
        ssize_t n = read(fd, t->data + t->len, (size_t)left);
        if (n < 0 && errno != EINTR)
            err = -errno;
        if (n == 0)
            break;
        if (n > 0) {
            t->len += (size_t)n;
            left -= n;
        }
    }
    close(fd);
    return err;
}

static int add_files(struct text *t, const char *path)
{
    char older[4200];
    int err;

    snprintf(older, sizeof(older), "%s.1", path);
    err = add_file(t, older);
    if (!err)
        err = add_file(t, path);
    if (err)
        log_error("cannot read %s: %s", path, strerror(-err));
    return vm_status_of(err);
}

/* The running machine that word means, without a word when there is none. */
static bool is_running(const char *word, struct registry_entry *m)
{
    struct registry_entry *list;
    int matches = 0, count = registry_list(&list);

    for (int i = 0; i < count; i++) {
        if (strcmp(list[i].name, word) != 0 && (!*word || strncmp(list[i].name, word, strlen(word)) != 0))
            continue;
        matches++;
        *m = list[i];
        if (strcmp(list[i].name, word) == 0) {
            matches = 1;
            break;
        }
    }
    free(list);
    return matches == 1;
}

/* What a running machine tells about itself: its file, or what it remembers. */
static int read_running(const struct registry_entry *m, struct text *t)
{
    json_t *info = NULL;
    int status = client_call(m, "GET", "/v1/info", NULL, CLIENT_PATIENCE_S, &info);
    const char *path = json_string_value(json_object_get(info, "console_file"));

    if (!status && path)
        status = add_files(t, path);
    else if (!status)
        status = client_text(m, "/v1/console/log", NULL, &t->data, &t->len);
    json_decref(info);
    return status;
}

static void keep_last_lines(struct text *t, uint64_t lines)
{
    size_t at = t->len;

    if (lines && at && t->data[at - 1] == '\n')
        at--;
    for (; lines && at > 0; at--)
        if (t->data[at - 1] == '\n' && --lines == 0)
            break;
    t->len -= at;
    memmove(t->data, t->data + at, t->len);
}

/* Bytes that are not UTF-8 become question marks; NUL, too. */
static json_t *to_json(const struct text *t)
{
    json_t *o = json_stringn(t->data ? t->data : "", t->len);
    if (o)
        return o;
    for (size_t i = 0; i < t->len; i++)
        if ((unsigned char)t->data[i] >= 0x80)
            t->data[i] = '?';
    return json_stringn(t->data, t->len);
}

static int print(const struct verb *v, const char *name, const char *key, struct text *t)
{
    if (v->json)
        return verb_print_json(json_pack("{s:s, s:o}", "name", name, key, to_json(t)));
    if (isatty(STDOUT_FILENO) && t->len) {
        struct terminal_filter filter = {0};
        char *out = malloc(t->len + sizeof(filter.held));
        if (!out)
            return vm_status_of(-ENOMEM);
        t->len = terminal_filter(&filter, t->data, t->len, out);
        free(t->data);
        t->data = out;
    }
    if (fwrite(t->data, 1, t->len, stdout) == t->len && fflush(stdout) == 0)
        return 0;
    log_error("cannot write to standard output: %s", strerror(errno));
    return VM_STATUS_BACKEND;
}

int cli_logs(char **args)
{
    struct verb_flag flags[] = {{.name = "--lines", .alias = "-n", .form = "N"}, {.name = "--messages"}, {0}};
    struct verb v = {.name = "logs", .min_words = 1, .max_words = 1, .what = "NAME", .help = help, .flags = flags};
    struct registry_entry m;
    struct text text = {0};
    uint64_t lines = 1000;
    char path[4096];
    int status;

    if (!verb_parse(&v, args, &status))
        return status;
    status = verb_number(&v, &flags[0], 0, 1000000000, &lines);
    if (status)
        return status;
    const char *what = flags[1].given ? "log" : "console", *name = v.words[0];
    bool running = is_running(name, &m);
    if (running)
        name = m.name;
    if (running && !flags[1].given) {
        status = read_running(&m, &text);
    } else if (registry_name_valid(name) && registry_log_path(name, what, false, path, sizeof(path)) == 0 &&
               access(path, F_OK) == 0) {
        status = add_files(&text, path);
    } else if (running) {
        log_error("%s: it runs in the foreground, and its messages are there", name);
        status = VM_STATUS_USER;
    } else {
        status = verb_machine(&v, &m);
    }
    if (!status) {
        if (flags[0].given && text.len)
            keep_last_lines(&text, lines);
        status = print(&v, name, flags[1].given ? "messages" : "console", &text);
    }
    free(text.data);
    return status;
}
