/*
 * The life of a configuration object: defaults, filling from a file and from flags, writing back.
 * What the options are is in config_options.c, what they may not be together in config_check.c.
 * One thread at a time.
 */
#include "vm/config.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/util.h"
#include "vm/config_options.h"
#include "vm/suggest.h"

/* Far more than any machine's description; a larger file is not one. */
#define MAX_FILE MIB(1)

int vm_config_init(struct vm_config *c)
{
    memset(c, 0, sizeof(*c));
    c->cpus = 1;
    c->memory = MIB(512);
    c->on_crash = VM_ON_CRASH_RESET;
    c->translate = translate_defaults;
    c->log_level = LOG_WARN;
    c->cmdline = strdup("");
    c->cpu_model = strdup("host");
    c->engine = strdup("auto");
    c->console = strdup("stdio");
    if (c->cmdline && c->cpu_model && c->engine && c->console)
        return 0;
    vm_config_destroy(c);
    return -ENOMEM;
}

int vm_config_set_cpuid(struct vm_config *c, const void *bytes, size_t len)
{
    if (len == 0 || len % sizeof(*c->cpuid) || len / sizeof(*c->cpuid) > VM_CONFIG_MAX_CPUID) {
        log_error("saved machine: what it says of its CPUID is damaged");
        return -EINVAL;
    }
    free(c->cpuid);
    c->cpuid = malloc(len);
    if (!c->cpuid) {
        log_error("out of memory");
        return -ENOMEM;
    }
    memcpy(c->cpuid, bytes, len);
    c->cpuid_count = (unsigned)(len / sizeof(*c->cpuid));
    return 0;
}

void vm_config_destroy(struct vm_config *c)
{
    for (unsigned i = 0; i < config_option_count; i++)
        if (config_options[i].clear)
            config_options[i].clear(c);
    free(c->name);
    free(c->kernel);
    free(c->cmdline);
    free(c->cpu_model);
    free(c->engine);
    free(c->console);
    free(c->stats);
    free(c->cpuid);
    free(c->trace_exec);
    free(c->file);
    memset(c, 0, sizeof(*c));
}

/* One key of the file: a list's elements one by one; a single element need not stand in an array.
 */
static int load_key(struct vm_config *c, const struct config_option *option,
                    const struct config_origin *o, const json_t *value)
{
    if (!option->info.list || !json_is_array(value))
        return option->set(c, o, value);
    size_t i;
    const json_t *element;
    json_array_foreach(value, i, element)
    {
        int r = option->set(c, o, element);
        if (r < 0)
            return r;
    }
    return 0;
}

int vm_config_load_json(struct vm_config *c, const char *text, size_t len, const char *file)
{
    json_error_t error;
    json_t *root = json_loadb(text, len, JSON_REJECT_DUPLICATES, &error);
    if (!root) {
        if (json_error_code(&error) == json_error_out_of_memory)
            return -ENOMEM;
        log_error("%s: line %d, column %d: not JSON: %s", file, error.line, error.column,
                  error.text);
        return -EINVAL;
    }
    int r = 0;
    if (!json_is_object(root)) {
        log_error("%s: not an object of options; did you mean {\"kernel\": \"vmlinuz\"}?", file);
        r = -EINVAL;
    }
    const char *key;
    json_t *value;
    json_object_foreach(root, key, value)
    {
        struct config_origin o = {.file = file, .key = key};
        int i = config_option_find(key);
        if (i < 0) {
            const char *nearest = suggest_nearest(key, config_option_names());
            if (nearest)
                log_error("%s: unknown key %s; did you mean \"%s\"?", file, config_quote(key),
                          nearest);
            else
                log_error(
                    "%s: unknown key %s; the keys are the flags that 'ringfort run --help' lists",
                    file, config_quote(key));
            r = -EINVAL;
        } else {
            r = load_key(c, &config_options[i], &o, value);
        }
        if (r < 0)
            break;
    }
    json_decref(root);
    return r;
}

int vm_config_load_file(struct vm_config *c, const char *file)
{
    struct stat st;
    char *text = NULL;
    size_t len = 0;
    int r = 0;
    int fd = open(file, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0 || fstat(fd, &st) < 0) {
        r = -errno;
        log_error("%s: cannot read the configuration: %s", file, strerror(errno));
        goto out;
    }
    if (S_ISDIR(st.st_mode)) {
        log_error("%s: is a directory, not a file of JSON", file);
        r = -EISDIR;
        goto out;
    }
    text = malloc(MAX_FILE + 1);
    if (!text) {
        r = -ENOMEM;
        goto out;
    }
    /* Pipes are welcome (process substitution), so their data may need to be waited for. */
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK);
    while (len <= MAX_FILE) {
        ssize_t n = read(fd, text + len, MAX_FILE + 1 - len);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0) {
            r = -errno;
            log_error("%s: cannot read the configuration: %s", file, strerror(errno));
            goto out;
        }
        if (n == 0)
            break;
        len += (size_t)n;
    }
    if (len > MAX_FILE) {
        log_error("%s: larger than 1 MiB, so not a configuration", file);
        r = -EINVAL;
        goto out;
    }
    free(c->file);
    c->file = strdup(file);
    r = c->file ? vm_config_load_json(c, text, len, file) : -ENOMEM;
out:
    free(text);
    if (fd >= 0)
        close(fd);
    return r;
}

int vm_config_set_flag(struct vm_config *c, const char *name, const char *value)
{
    int i = config_option_find(name);
    if (i < 0)
        return i;
    const struct config_option *option = &config_options[i];
    struct config_origin o = {.key = option->info.name};
    bool again = c->flags_given >> i & 1;
    if (again && !option->info.list)
        return config_bad(&o, "is given twice; leave one of them out");
    if (!again && option->clear)
        option->clear(c);
    c->flags_given |= UINT64_C(1) << i;

    /* File names need not be UTF-8, so nothing is checked here. */
    json_t *v = json_string_nocheck(value);
    int r = v ? option->set(c, &o, v) : -ENOMEM;
    json_decref(v);
    return r;
}

char *vm_config_to_json(const struct vm_config *c)
{
    json_t *root = json_object();
    bool ok = root != NULL;
    for (unsigned i = 0; i < config_option_count; i++) {
        json_t *v = config_options[i].get(c);
        if (v)
            ok &= json_object_set_new(root, config_options[i].info.name, v) == 0;
    }
    char *text = ok ? json_dumps(root, JSON_INDENT(4) | JSON_PRESERVE_ORDER) : NULL, *line = NULL;
    if (text && asprintf(&line, "%s\n", text) < 0)
        line = NULL;
    if (!line)
        log_error(
            "the configuration cannot be written as JSON: out of memory, or a value is not UTF-8");
    free(text);
    json_decref(root);
    return line;
}
