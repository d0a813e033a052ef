/*
 * The one table of what a machine's configuration can say. Each entry is a command-line flag, a
 * JSON key and a line of --help; its functions turn a value into fields of struct vm_config and
 * back. One thread at a time.
 *
 * Strings are written unchecked: a file name that is not UTF-8 then makes json_dumps() fail in
 * vm_config_to_json(), which says so, instead of vanishing from the output.
 */
#include "vm/config_options.h"

#include <assert.h>
#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"
#include "device/testdev.h"
#include "engine/engine.h"
#include "engine/interp/trace_options.h"
#include "isa/x86/cpuid.h"
#include "vm/control/registry.h"

#define MAX_NAMES 24

static const char *const cache_names[] = {[BLOCK_CACHE_WRITEBACK] = "writeback",
                                          [BLOCK_CACHE_NONE] = "none",
                                          [BLOCK_CACHE_UNSAFE] = "unsafe",
                                          NULL};
static const char *const device_names[] = {[VM_DEVICE_DEBUG_EXIT] = "isa-debug-exit",
                                           [VM_DEVICE_PC_TESTDEV] = "pc-testdev",
                                           [VM_DEVICE_VIRTIO_RNG] = "virtio-rng",
                                           [VM_DEVICE_VIRTIO_CONSOLE] = "virtio-console",
                                           NULL};
static const char *const net_names[] = {
    [VM_NET_USER] = "user", [VM_NET_TAP] = "tap", [VM_NET_TAP + 1] = "none", NULL};
static const char *const crash_names[] = {
    [VM_ON_CRASH_RESET] = "reset", [VM_ON_CRASH_EXIT] = "exit", NULL};
static const char *const level_names[] = {
    [LOG_ERROR] = "error", [LOG_WARN] = "warn", [LOG_INFO] = "info", [LOG_DEBUG] = "debug", NULL};

static const char *const *engine_names(void)
{
    static _Thread_local const char *names[MAX_NAMES] = {"auto"};
    for (unsigned i = 0; i < MAX_NAMES - 2 && engine_at(i); i++)
        names[i + 1] = engine_at(i)->name;
    return names;
}

static const char *const *cpu_model_names(void)
{
    static _Thread_local const char *names[MAX_NAMES];
    for (unsigned i = 0; i < MAX_NAMES - 1 && x86_cpu_model_at(i); i++)
        names[i] = x86_cpu_model_at(i)->name;
    return names;
}

const char *const *vm_config_names(const char *kind)
{
    if (strcmp(kind, "engine") == 0)
        return engine_names();
    if (strcmp(kind, "cpu-model") == 0)
        return cpu_model_names();
    return strcmp(kind, "device") == 0 ? device_names : NULL;
}

/* Room for one more element of size bytes, zeroed; NULL: out of memory. */
static void *append(void *array, unsigned *count, size_t size)
{
    char **base = array;
    char *bigger = realloc(*base, (*count + 1) * size);
    if (!bigger)
        return NULL;
    *base = bigger;
    return memset(bigger + (*count)++ * size, 0, size);
}

/* A string option that takes any text, and its writer. */
#define STRING_OPTION(field, empty)                                                             \
    static int set_##field(struct vm_config *c, const struct config_origin *o, const json_t *v) \
    {                                                                                           \
        return config_string(o, v, empty, &c->field);                                           \
    }                                                                                           \
    static json_t *get_##field(const struct vm_config *c)                                       \
    {                                                                                           \
        return c->field ? json_string_nocheck(c->field) : NULL;                                 \
    }
STRING_OPTION(kernel, false)
STRING_OPTION(cmdline, true)
STRING_OPTION(stats, false)

/* The nearest name that is one. */
static void suggest_name(const char *name, char out[REGISTRY_MAX_NAME + 1])
{
    size_t n = 0;
    for (; *name && n < REGISTRY_MAX_NAME; name++) {
        bool good = isalnum((unsigned char)*name) || (n && strchr("._-", *name));
        if (good)
            out[n++] = *name;
        else if (n && out[n - 1] != '-')
            out[n++] = '-';
    }
    while (n && out[n - 1] == '-')
        n--;
    out[n] = 0;
    if (!n)
        strcpy(out, "server1");
}

static int set_name(struct vm_config *c, const struct config_origin *o, const json_t *v)
{
    const char *text = json_string_value(v);
    if (text && !registry_name_valid(text)) {
        char fixed[REGISTRY_MAX_NAME + 1];
        suggest_name(text, fixed);
        return config_bad(o, "%s is not a name of 1...%d letters, digits, '.', '_' and '-', the first a letter or digit; "
                          "did you mean %s?", config_quote(text), REGISTRY_MAX_NAME, config_form(o, fixed));
    }
    c->name_given = true;
    return config_string(o, v, false, &c->name);
}

static json_t *get_name(const struct vm_config *c)
{
    return c->name_given ? json_string_nocheck(c->name) : NULL;
}

static int set_initrd(struct vm_config *c, const struct config_origin *o, const json_t *v)
{
    char *path = NULL;
    int r = config_string(o, v, false, &path);
    if (r < 0)
        return r;
    if (c->initrd_count == VM_CONFIG_MAX_INITRDS) {
        free(path);
        return config_bad(o, "at most %u files", VM_CONFIG_MAX_INITRDS);
    }
    char **slot = append(&c->initrds, &c->initrd_count, sizeof(*slot));
    if (!slot) {
        free(path);
        return -ENOMEM;
    }
    *slot = path;
    return 0;
}

static json_t *get_initrd(const struct vm_config *c)
{
    json_t *list = json_array();
    for (unsigned i = 0; i < c->initrd_count; i++)
        json_array_append_new(list, json_string_nocheck(c->initrds[i]));
    return list;
}

static void clear_initrd(struct vm_config *c)
{
    for (unsigned i = 0; i < c->initrd_count; i++)
        free(c->initrds[i]);
    free(c->initrds);
    c->initrds = NULL;
    c->initrd_count = 0;
}

static int set_cpus(struct vm_config *c, const struct config_origin *o, const json_t *v)
{
    uint64_t n;
    int r = config_uint(o, NULL, v, 1, VM_CONFIG_MAX_CPUS, &n);
    if (r == 0)
        c->cpus = (unsigned)n;
    return r;
}

static json_t *get_cpus(const struct vm_config *c)
{
    return json_integer((json_int_t)c->cpus);
}

static int set_memory(struct vm_config *c, const struct config_origin *o, const json_t *v)
{
    return config_size(o, NULL, v, VM_CONFIG_MIN_MEMORY, VM_CONFIG_MAX_MEMORY, &c->memory);
}

static json_t *get_memory(const struct vm_config *c)
{
    char text[24];
    config_format_size(c->memory, text);
    return json_string(text);
}

static int set_named(const struct config_origin *o, const json_t *v, const char *what,
                     const char *const *names, char **out)
{
    unsigned i;
    int r = config_choice(o, NULL, v, what, names, &i);
    return r < 0 ? r : config_string(o, v, false, out);
}

static int set_cpu_model(struct vm_config *c, const struct config_origin *o, const json_t *v)
{
    return set_named(o, v, "a CPU model", cpu_model_names(), &c->cpu_model);
}

static json_t *get_cpu_model(const struct vm_config *c)
{
    return json_string_nocheck(c->cpu_model);
}

static int set_engine(struct vm_config *c, const struct config_origin *o, const json_t *v)
{
    return set_named(o, v, "an engine", engine_names(), &c->engine);
}

static json_t *get_engine(const struct vm_config *c)
{
    return json_string_nocheck(c->engine);
}

static int set_trace_exec(struct vm_config *c, const struct config_origin *o, const json_t *v)
{
    static const char *const keys[] = {"path", "registers", "size", "files", NULL};
    json_t *object;
    uint64_t n = TRACE_DEFAULT_FILES;
    int r = config_object(o, v, "a trace", "path", keys, &object);
    if (r < 0)
        return r;
    const json_t *path = json_object_get(object, "path");
    const json_t *registers = json_object_get(object, "registers");
    const json_t *size = json_object_get(object, "size");
    const json_t *files = json_object_get(object, "files");
    r = path ? config_string(o, path, false, &c->trace_exec)
             : config_bad(o, "lacks the file; did you mean %s?", config_form(o, "trace.txt"));
    if (r == 0 && registers)
        r = config_bool(o, "registers", registers, &c->trace_registers);
    c->trace_size = TRACE_DEFAULT_SIZE;
    if (r == 0 && size)
        r = config_size(o, "size", size, TRACE_MIN_SIZE, INT64_MAX, &c->trace_size);
    if (r == 0 && files)
        r = config_uint(o, "files", files, 1, TRACE_MAX_FILES, &n);
    c->trace_files = (unsigned)n;
    json_decref(object);
    return r;
}

static json_t *get_trace_exec(const struct vm_config *c)
{
    char size[24];
    if (!c->trace_exec)
        return NULL;
    config_format_size(c->trace_size, size);
    return json_pack("{s:o, s:b, s:s, s:I}", "path", json_string_nocheck(c->trace_exec), "registers", (int)c->trace_registers,
                     "size", size, "files", (json_int_t)c->trace_files);
}

/* ---- the translator's switches: the table is the engine's ---- */

static const char *const *translate_names(void)
{
    static _Thread_local const char *names[MAX_NAMES];
    assert(translate_option_count < MAX_NAMES);
    for (unsigned i = 0; i < translate_option_count; i++)
        names[i] = translate_option_table[i].name;
    return names;
}

static int read_translate(const struct config_origin *o, const json_t *v,
                          const struct translate_option *t, struct translate_options *out)
{
    uint64_t n = 0;
    int r;
    switch (t->kind) {
    case TRANSLATE_SWITCH:
        return config_bool(o, t->name, v, translate_switch(out, t));
    case TRANSLATE_SIZE:
        return config_size(o, t->name, v, t->min, t->max, translate_size(out, t));
    case TRANSLATE_WORD:
        return config_choice(o, t->name, v, "what there is", t->words, translate_number(out, t));
    default:
        r = config_uint(o, t->name, v, t->min, t->max, &n);
        if (r == 0)
            *translate_number(out, t) = (unsigned)n;
        return r;
    }
}

static int set_translate(struct vm_config *c, const struct config_origin *o, const json_t *v)
{
    json_t *object;
    int r = config_object(o, v, "the translator", NULL, translate_names(), &object);
    if (r < 0)
        return r;
    for (unsigned i = 0; r == 0 && i < translate_option_count; i++) {
        const struct translate_option *t = &translate_option_table[i];
        const json_t *value = json_object_get(object, t->name);
        if (value)
            r = read_translate(o, value, t, &c->translate);
    }
    json_decref(object);
    return r;
}

static json_t *translate_value(const struct translate_options *options,
                               const struct translate_option *t)
{
    struct translate_options copy = *options;
    char text[24];
    switch (t->kind) {
    case TRANSLATE_SWITCH:
        return json_boolean(*translate_switch(&copy, t));
    case TRANSLATE_SIZE:
        config_format_size(*translate_size(&copy, t), text);
        return json_string(text);
    case TRANSLATE_WORD:
        return json_string(t->words[*translate_number(&copy, t)]);
    default:
        return json_integer((json_int_t)*translate_number(&copy, t));
    }
}

/* Only what is not the default. */
static json_t *get_translate(const struct vm_config *c)
{
    json_t *object = NULL;
    for (unsigned i = 0; i < translate_option_count; i++) {
        const struct translate_option *t = &translate_option_table[i];
        json_t *value = translate_value(&c->translate, t);
        json_t *usual = translate_value(&translate_defaults, t);
        if (!json_equal(value, usual)) {
            object = object ? object : json_object();
            json_object_set(object, t->name, value);
        }
        json_decref(value);
        json_decref(usual);
    }
    return object;
}

/* "chain=on|off" and what it does, a line each. */
static const char *translate_help(const char *head)
{
    static _Thread_local char help[2048];
    size_t n = (size_t)snprintf(help, sizeof(help), "%s", head);
    for (unsigned i = 0; i < translate_option_count && n < sizeof(help); i++) {
        const struct translate_option *t = &translate_option_table[i];
        json_t *usual = translate_value(&translate_defaults, t);
        char values[64] = "on|off", text[32] = "";
        if (t->kind == TRANSLATE_SIZE)
            strcpy(values, "SIZE");
        if (t->kind == TRANSLATE_NUMBER)
            snprintf(values, sizeof(values), t->max < 10 ? "%llu...%llu" : "N",
                     (unsigned long long)t->min, (unsigned long long)t->max);
        for (size_t k = 0, at = 0; t->kind == TRANSLATE_WORD && t->words[k]; k++)
            at += (size_t)snprintf(values + at, sizeof(values) - at, "%s%s", k ? "|" : "",
                                   t->words[k]);
        if (json_is_integer(usual))
            snprintf(text, sizeof(text), "%lld", (long long)json_integer_value(usual));
        else
            snprintf(text, sizeof(text), "%s",
                     json_is_string(usual) ? json_string_value(usual)
                     : json_is_true(usual) ? "on"
                                           : "off");
        char left[64];
        snprintf(left, sizeof(left), "%s=%s", t->name, values);
        n += (size_t)snprintf(help + n, sizeof(help) - n, "\n%-20s %s (default %s)", left, t->help,
                              text);
        json_decref(usual);
    }
    return help;
}

static void free_disk(struct vm_disk_config *d)
{
    free((char *)d->block.path);
    free((char *)d->block.tls);
    free(d->serial);
}

static int read_disk(const struct config_origin *o, const json_t *object, struct vm_disk_config *d)
{
    const json_t *v = json_object_get(object, "path");
    char *path = NULL;
    unsigned cache = d->block.cache;
    int r;

    if (!v)
        return config_bad(o, "lacks the file; did you mean %s?",
                          o->file ? "{\"path\": \"disk.img\"}" : "--disk path=disk.img");
    r = config_string(o, v, false, &path);
    d->block.path = path;
    if (r == 0 && (v = json_object_get(object, "readonly")))
        r = config_bool(o, "readonly", v, &d->block.readonly);
    if (r == 0 && (v = json_object_get(object, "cache")))
        r = config_choice(o, "cache", v, "a cache mode", cache_names, &cache);
    d->block.cache = (enum block_cache)cache;
    if (r == 0 && (v = json_object_get(object, "tls"))) {
        char *tls = NULL;
        r = config_string(o, v, false, &tls);
        d->block.tls = tls;
    }
    if (r == 0 && (v = json_object_get(object, "reconnect"))) {
        uint64_t seconds = 0;
        r = config_uint(o, "reconnect", v, 0, 3600, &seconds);
        d->block.reconnect_s = (unsigned)seconds;
    }
    if (r == 0 && !block_is_uri(path) && (d->block.tls || json_object_get(object, "reconnect")))
        r = config_bad(o, "%s is on this host; tls and reconnect are for disks on an NBD server, as path=nbd://HOST/EXPORT",
                       config_quote(path));
    if (r == 0 && (v = json_object_get(object, "serial"))) {
        r = config_string(o, v, false, &d->serial);
        for (const char *p = d->serial; r == 0 && *p; p++)
            if (*p <= ' ' || *p > '~' || p - d->serial >= VM_CONFIG_MAX_SERIAL)
                r = config_bad(o,
                               "serial=%s: a serial number is at most %u printable ASCII "
                               "characters; use a shorter one",
                               config_quote(d->serial), VM_CONFIG_MAX_SERIAL);
    }
    return r;
}

static int set_disk(struct vm_config *c, const struct config_origin *o, const json_t *v)
{
    static const char *const keys[] = {"path", "readonly", "cache", "serial", "tls", "reconnect", NULL};
    json_t *object, *uri = NULL;
    /* A URI cannot be mistaken for anything else, whatever it has of "=". */
    if (json_is_string(v) && block_is_uri(json_string_value(v)))
        v = uri = json_sprintf("path=%s", json_string_value(v));
    int r = config_object(o, v, "a disk", NULL, keys, &object);
    json_decref(uri);
    if (r < 0)
        return r;
    struct vm_disk_config d = {.block = {.cache = BLOCK_CACHE_WRITEBACK, .reconnect_s = BLOCK_RECONNECT_S}}, *slot = NULL;
    r = read_disk(o, object, &d);
    json_decref(object);
    if (r == 0 && !(slot = append(&c->disks, &c->disk_count, sizeof(*slot))))
        r = -ENOMEM;
    if (r == 0)
        *slot = d;
    else
        free_disk(&d);
    return r;
}

static json_t *get_disk(const struct vm_config *c)
{
    json_t *list = json_array();
    for (unsigned i = 0; i < c->disk_count; i++) {
        const struct vm_disk_config *d = &c->disks[i];
        json_t *object =
            json_pack("{s:o, s:b, s:s}", "path", json_string_nocheck(d->block.path), "readonly",
                      (int)d->block.readonly, "cache", cache_names[d->block.cache]);
        if (d->serial)
            json_object_set_new(object, "serial", json_string_nocheck(d->serial));
        if (d->block.tls)
            json_object_set_new(object, "tls", json_string_nocheck(d->block.tls));
        if (block_is_uri(d->block.path))
            json_object_set_new(object, "reconnect", json_integer(d->block.reconnect_s));
        json_array_append_new(list, object);
    }
    return list;
}

static void clear_disk(struct vm_config *c)
{
    for (unsigned i = 0; i < c->disk_count; i++)
        free_disk(&c->disks[i]);
    free(c->disks);
    c->disks = NULL;
    c->disk_count = 0;
}

static void free_net(struct vm_net_config *n)
{
    free(n->user.forwards);
    free((char *)n->tap.ifname);
}

static int add_forward(const struct config_origin *o, const json_t *v, struct vm_net_config *n)
{
    struct net_forward f, *slot;
    int r = config_forward(o, v, &f);
    if (r < 0)
        return r;
    slot = append(&n->user.forwards, &n->user.forward_count, sizeof(*slot));
    if (!slot)
        return -ENOMEM;
    *slot = f;
    return 0;
}

static int read_net(const struct config_origin *o, const json_t *object, struct vm_net_config *n)
{
    static const char *const keys[][4] = {{"type", "hostfwd", "mac"}, {"type", "ifname", "mac"}};
    const json_t *v;
    int r = config_only_keys(o, object, n->type == VM_NET_TAP ? "a tap net" : "a user net",
                             keys[n->type]);

    if (r == 0 && (v = json_object_get(object, "mac"))) {
        r = config_mac(o, v, n->mac);
        n->mac_given = true;
    }
    v = json_object_get(object, "hostfwd");
    if (r == 0 && json_is_array(v)) {
        size_t i;
        const json_t *element;
        json_array_foreach(v, i, element) if (r == 0) r = add_forward(o, element, n);
    } else if (r == 0 && v) {
        r = add_forward(o, v, n);
    }
    if (r == 0 && n->type == VM_NET_TAP) {
        char *name = NULL;
        v = json_object_get(object, "ifname");
        if (!v)
            return config_bad(o, "a tap net lacks its interface; did you mean %s?",
                              o->file ? "{\"type\": \"tap\", \"ifname\": \"tap0\"}"
                                      : "--net tap,ifname=tap0");
        r = config_string(o, v, false, &name);
        n->tap = (struct net_tap_options){.ifname = name, .vnet_hdr = true};
        /* Linux: IFNAMSIZ with the NUL, no slash, no white space (dev_valid_name). */
        if (r == 0 && (strlen(name) > 15 || strpbrk(name, "/: \t\n")))
            r = config_bad(
                o,
                "ifname=%s: an interface name has at most 15 characters, no slash, colon or space; "
                "did you mean ifname=tap0?",
                config_quote(name));
    }
    return r;
}

static int set_net(struct vm_config *c, const struct config_origin *o, const json_t *v)
{
    static const char *const keys[] = {"type", "hostfwd", "ifname", "mac", NULL};
    static const char *const none_keys[] = {"type", NULL};
    struct vm_net_config n = {0}, *slot = NULL;
    unsigned type = 0;
    json_t *object;
    int r = config_object(o, v, "a net", "type", keys, &object);
    if (r < 0)
        return r;

    v = json_object_get(object, "type");
    r = v ? config_choice(o, NULL, v, "a kind of net", net_names, &type)
          : config_bad(o, "lacks its type; did you mean %s?",
                       o->file ? "{\"type\": \"user\"}" : "--net user,...");
    bool none = r == 0 && type > VM_NET_TAP;
    if (none)
        r = config_only_keys(o, object, "the net 'none'", none_keys);
    if (r == 0 && (c->net_none || (none && c->net_count)))
        r = config_bad(o, "'none' and another net exclude each other; leave one of them out");
    if (r == 0 && !none) {
        n.type = (enum vm_net_type)type;
        r = read_net(o, object, &n);
    }
    json_decref(object);
    if (r == 0 && none) {
        c->net_none = true;
        return 0;
    }
    if (r == 0 && !(slot = append(&c->nets, &c->net_count, sizeof(*slot))))
        r = -ENOMEM;
    if (r == 0)
        *slot = n;
    else
        free_net(&n);
    return r;
}

static json_t *get_net(const struct vm_config *c)
{
    json_t *list = json_array();
    for (unsigned i = 0; i < c->net_count; i++) {
        const struct vm_net_config *n = &c->nets[i];
        char mac[24];
        snprintf(mac, sizeof(mac), "%02x:%02x:%02x:%02x:%02x:%02x", n->mac[0], n->mac[1], n->mac[2],
                 n->mac[3], n->mac[4], n->mac[5]);
        json_t *object = json_pack("{s:s, s:s}", "type", net_names[n->type], "mac", mac);
        if (n->type == VM_NET_TAP)
            json_object_set_new(object, "ifname", json_string_nocheck(n->tap.ifname));
        if (n->user.forward_count) {
            json_t *forwards = json_array();
            for (unsigned k = 0; k < n->user.forward_count; k++) {
                char text[160];
                config_format_forward(&n->user.forwards[k], text);
                json_array_append_new(forwards, json_string(text));
            }
            json_object_set_new(object, "hostfwd", forwards);
        }
        json_array_append_new(list, object);
    }
    return list;
}

static void clear_net(struct vm_config *c)
{
    for (unsigned i = 0; i < c->net_count; i++)
        free_net(&c->nets[i]);
    free(c->nets);
    c->nets = NULL;
    c->net_count = 0;
    c->net_none = false;
}

static int read_device(const struct config_origin *o, const json_t *object,
                       struct vm_device_config *d)
{
    static const char *const keys[][4] = {[VM_DEVICE_DEBUG_EXIT] = {"type", "iobase", "iosize"},
                                          [VM_DEVICE_PC_TESTDEV] = {"type"},
                                          [VM_DEVICE_VIRTIO_RNG] = {"type"},
                                          [VM_DEVICE_VIRTIO_CONSOLE] = {"type", "console"}};
    const json_t *v = json_object_get(object, "type");
    uint64_t n;
    unsigned type;
    int r = v ? config_choice(o, NULL, v, "a device", device_names, &type)
              : config_bad(o, "lacks its type; did you mean %s?",
                           o->file ? "{\"type\": \"virtio-rng\"}" : "--device virtio-rng");
    if (r < 0)
        return r;
    d->type = (enum vm_device_type)type;
    r = config_only_keys(o, object, device_names[type], keys[type]);
    if (type == VM_DEVICE_DEBUG_EXIT) {
        d->iobase = TESTDEV_EXIT_PORT;
        d->iosize = TESTDEV_EXIT_PORTS;
    }
    if (r == 0 && (v = json_object_get(object, "iosize"))) {
        r = config_uint(o, "iosize", v, 1, 4, &n);
        if (r == 0 && n == 3)
            r = config_bad(o, "iosize=3 is not 1, 2 or 4; did you mean iosize=4?");
        d->iosize = r == 0 ? (uint16_t)n : 0;
    }
    if (r == 0 && (v = json_object_get(object, "iobase"))) {
        r = config_uint(o, "iobase", v, 0, 0x10000u - d->iosize, &n);
        d->iobase = r == 0 ? (uint16_t)n : 0;
    }
    if (r == 0 && type == VM_DEVICE_VIRTIO_CONSOLE) {
        v = json_object_get(object, "console");
        if (v)
            r = config_console(o, v, &d->console);
        else if (!(d->console = strdup("none")))
            r = -ENOMEM;
    }
    return r;
}

static int set_device(struct vm_config *c, const struct config_origin *o, const json_t *v)
{
    static const char *const keys[] = {"type", "iobase", "iosize", "console", NULL};
    struct vm_device_config d = {0}, *slot = NULL;
    json_t *object;
    int r = config_object(o, v, "a device", "type", keys, &object);
    if (r < 0)
        return r;
    r = read_device(o, object, &d);
    json_decref(object);
    if (r == 0 && !(slot = append(&c->devices, &c->device_count, sizeof(*slot))))
        r = -ENOMEM;
    if (r == 0)
        *slot = d;
    else
        free(d.console);
    return r;
}

static json_t *get_device(const struct vm_config *c)
{
    json_t *list = json_array();
    for (unsigned i = 0; i < c->device_count; i++) {
        const struct vm_device_config *d = &c->devices[i];
        json_t *object = json_pack("{s:s}", "type", device_names[d->type]);
        if (d->type == VM_DEVICE_DEBUG_EXIT) {
            char base[8];
            snprintf(base, sizeof(base), "0x%x", d->iobase);
            json_object_set_new(object, "iobase", json_string(base));
            json_object_set_new(object, "iosize", json_integer(d->iosize));
        }
        if (d->console)
            json_object_set_new(object, "console", json_string_nocheck(d->console));
        json_array_append_new(list, object);
    }
    return list;
}

static void clear_device(struct vm_config *c)
{
    for (unsigned i = 0; i < c->device_count; i++)
        free(c->devices[i].console);
    free(c->devices);
    c->devices = NULL;
    c->device_count = 0;
}

static int set_console(struct vm_config *c, const struct config_origin *o, const json_t *v)
{
    return config_console(o, v, &c->console);
}

static json_t *get_console(const struct vm_config *c)
{
    return json_string_nocheck(c->console);
}

static int set_on_crash(struct vm_config *c, const struct config_origin *o, const json_t *v)
{
    unsigned i = 0;
    int r = config_choice(o, NULL, v, "what to do", crash_names, &i);
    c->on_crash = (enum vm_on_crash)i;
    return r;
}

static json_t *get_on_crash(const struct vm_config *c)
{
    return json_string(crash_names[c->on_crash]);
}

static int set_log_level(struct vm_config *c, const struct config_origin *o, const json_t *v)
{
    unsigned i = 0;
    int r = config_choice(o, NULL, v, "a level", level_names, &i);
    c->log_level = (enum log_level)i;
    return r;
}

static json_t *get_log_level(const struct vm_config *c)
{
    return json_string(level_names[c->log_level]);
}

const struct config_option config_options[] = {
    {{"name", "NAME", "name of the machine, also for the other verbs (default vm-PID)", false},
     set_name,
     get_name,
     NULL},
    {{"kernel", "FILE", "kernel: a Linux bzImage or an ELF file (vmlinux, Multiboot)", false},
     set_kernel,
     get_kernel,
     NULL},
    {{"initrd", "FILE", "initial RAM disk; for a Multiboot kernel each is a module", true},
     set_initrd,
     get_initrd,
     clear_initrd},
    {{"cmdline", "TEXT", "kernel command line", false}, set_cmdline, get_cmdline, NULL},
    {{"cpus", "N", "virtual processors, 1...64 (default 1)", false}, set_cpus, get_cpus, NULL},
    {{"memory", "SIZE", "guest RAM with suffix K, M, G or T (default 512M)", false},
     set_memory,
     get_memory,
     NULL},
    {{"cpu-model", "MODEL", "%s (default host)", false}, set_cpu_model, get_cpu_model, NULL},
    {{"engine", "ENGINE", "how processors run: %s (default auto)", false},
     set_engine,
     get_engine,
     NULL},
    {{"translate", "KEY=V[,...]", "switches of the engine translate:", false},
     set_translate,
     get_translate,
     NULL},
    {{"disk", "path=FILE|URI[,...]",
      "virtio disk on a raw image or block device, or on an NBD server:\n"
      "nbd://HOST[:PORT]/EXPORT, nbd+unix:///EXPORT?socket=PATH; options:\n"
      "readonly=on|off  (default off)\n"
      "cache=writeback|none|unsafe  host page cache, O_DIRECT, or\n"
      "                 page cache and flushes ignored (default writeback)\n"
      "serial=TEXT      serial number, at most 20 characters\n"
      "tls=DIR          certificates for nbds://, nbds+unix://\n"
      "reconnect=S      seconds that requests wait for a server that is\n"
      "                 away (default 30)",
      true},
     set_disk,
     get_disk,
     clear_disk},
    {{"net", "KIND[,...]",
      "virtio network card (default none):\n"
      "user[,hostfwd=tcp|udp:[ADDRESS]:PORT-[GUEST]:PORT]...  without privileges\n"
      "tap,ifname=NAME  on a tap interface of the host\n"
      "none             no card, also when the file has some\n"
      "user and tap also take mac=XX:XX:XX:XX:XX:XX",
      true},
     set_net,
     get_net,
     clear_net},
    {{"device", "KIND[,...]",
      "further device:\n"
      "virtio-rng\n"
      "virtio-console[,console=CONSOLE]  (default console=none)\n"
      "isa-debug-exit[,iobase=0x501][,iosize=2]  a write of V ends the run\n"
      "                 with exit status V * 2 + 1\n"
      "pc-testdev",
      true},
     set_device,
     get_device,
     clear_device},
    {{"console", "CONSOLE",
      "the serial port's other end: stdio, pty, file:PATH,\n"
      "unix:PATH or none (default stdio)",
      false},
     set_console,
     get_console,
     NULL},
    {{"on-crash", "ACTION",
      "after a triple fault: reset or exit (default reset);\n"
      "the fifth in a row soon after the start ends the run, too",
      false},
     set_on_crash,
     get_on_crash,
     NULL},
    {{"trace-exec", "FILE[,...]",
      "write down what interp or translate executes, block by\n"
      "block; with registers=on their values before each;\n"
      "size=SIZE,files=N: so long, and so many (512M, 2)",
      false},
     set_trace_exec,
     get_trace_exec,
     NULL},
    {{"stats", "FILE", "write figures of the run there as JSON at exit", false},
     set_stats,
     get_stats,
     NULL},
    {{"log-level", "LEVEL", "error, warn, info or debug (default warn)", false},
     set_log_level,
     get_log_level,
     NULL},
};
const unsigned config_option_count = ARRAY_SIZE(config_options);

/* "a, b or c". */
static void join(const char *const *names, char *out, size_t size)
{
    size_t n = 0;
    out[0] = 0;
    for (unsigned i = 0; names[i] && n < size; i++)
        n += (size_t)snprintf(out + n, size - n, "%s%s",
                              !i             ? ""
                              : names[i + 1] ? ", "
                                             : " or ",
                              names[i]);
}

bool vm_config_option(unsigned i, struct vm_config_option_info *out)
{
    static _Thread_local char help[256];
    char names[160];
    if (i >= config_option_count)
        return false;
    *out = config_options[i].info;
    if (config_options[i].set == set_translate)
        out->help = translate_help(out->help);
    const char *const *list = vm_config_names(out->name);
    const char *place = strstr(out->help, "%s");
    if (list && place) {
        join(list, names, sizeof(names));
        snprintf(help, sizeof(help), "%.*s%s%s", (int)(place - out->help), out->help, names,
                 place + 2);
        out->help = help;
    }
    return true;
}

int config_option_find(const char *name)
{
    for (unsigned i = 0; i < config_option_count; i++)
        if (strcmp(config_options[i].info.name, name) == 0)
            return (int)i;
    return -ENOENT;
}

const char *const *config_option_names(void)
{
    static _Thread_local const char *names[ARRAY_SIZE(config_options) + 1];
    for (unsigned i = 0; i < config_option_count; i++)
        names[i] = config_options[i].info.name;
    return names;
}
