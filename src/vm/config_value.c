/*
 * Single values of a configuration: reading them with messages that name the nearest valid form,
 * and writing them back. Nothing here knows the options themselves. One thread at a time.
 */
#include "vm/config_value.h"

#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/un.h>

#include "backend/net/net.h"
#include "base/log.h"
#include "base/util.h"
#include "vm/suggest.h"

#define QUOTE_SIZE 400

static char *message_buffer(void)
{
    static _Thread_local char buffer[4][QUOTE_SIZE];
    static _Thread_local unsigned next;
    return buffer[next++ % 4];
}

int config_bad(const struct config_origin *o, const char *fmt, ...)
{
    char text[1024];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    if (o->file)
        log_error("%s: \"%s\": %s", o->file, o->key, text);
    else
        log_error("--%s: %s", o->key, text);
    return -EINVAL;
}

const char *config_quote(const char *text)
{
    char *out = message_buffer();
    size_t n = 0;
    out[n++] = '\'';
    for (unsigned i = 0; text[i]; i++) {
        unsigned char ch = (unsigned char)text[i];
        if (i == 80) {
            n += (size_t)sprintf(out + n, "...");
            break;
        }
        if (ch < 0x20 || ch == 0x7f)
            n += (size_t)sprintf(out + n, "\\x%02x", ch);
        else
            out[n++] = (char)ch;
    }
    out[n++] = '\'';
    out[n] = 0;
    return out;
}

const char *config_form(const struct config_origin *o, const char *value)
{
    char *out = message_buffer();
    snprintf(out, QUOTE_SIZE, o->file ? "\"%s\": \"%s\"" : "--%s %s", o->key, value);
    return out;
}

/* Whose value: "readonly='x'" or "'x'". */
static const char *shown(const char *sub, const json_t *v)
{
    if (!json_is_string(v)) {
        char *out = message_buffer();
        char *text = json_dumps(v, JSON_ENCODE_ANY | JSON_COMPACT);
        snprintf(out, QUOTE_SIZE, "%s%s%.80s", sub ? sub : "", sub ? "=" : "", text ? text : "?");
        free(text);
        return out;
    }
    const char *quoted = config_quote(json_string_value(v));
    if (!sub)
        return quoted;
    char *out = message_buffer();
    snprintf(out, QUOTE_SIZE, "%s=%s", sub, quoted);
    return out;
}

int config_string(const struct config_origin *o, const json_t *v, bool empty, char **out)
{
    if (!json_is_string(v))
        return config_bad(o, "%s is not a string", shown(NULL, v));
    const char *text = json_string_value(v);
    if (!*text && !empty)
        return config_bad(o, "needs a value that is not empty");
    char *copy = strdup(text);
    if (!copy)
        return -ENOMEM;
    free(*out);
    *out = copy;
    return 0;
}

/* Several values where there is one, as in "tier=1,tier=2": true (logged). */
static bool several_values(const struct config_origin *o, const char *sub, const json_t *v)
{
    if (!sub || !json_is_array(v))
        return false;
    config_bad(o, "%s takes one value; leave the others out", sub);
    return true;
}

int config_choice(const struct config_origin *o, const char *sub, const json_t *v, const char *what,
                  const char *const *names, unsigned *out)
{
    const char *text = json_string_value(v);
    if (!text)
        return several_values(o, sub, v) ? -EINVAL : config_bad(o, "%s is not %s", shown(sub, v), what);
    for (unsigned i = 0; names[i]; i++) {
        if (strcmp(text, names[i]) == 0) {
            *out = i;
            return 0;
        }
    }
    const char *nearest = suggest_nearest(text, names);
    if (nearest)
        return config_bad(o, "%s is not %s; did you mean %s%s%s?", shown(sub, v), what,
                          sub ? sub : "", sub ? "=" : "", sub ? nearest : config_form(o, nearest));
    char all[256] = "";
    for (size_t i = 0, n = 0; names[i] && n < sizeof(all); i++)
        n += (size_t)snprintf(all + n, sizeof(all) - n, "%s%s", i ? ", " : "", names[i]);
    return config_bad(o, "%s is not %s; there are: %s", shown(sub, v), what, all);
}

int config_bool(const struct config_origin *o, const char *sub, const json_t *v, bool *out)
{
    const char *text = json_string_value(v);
    if (json_is_boolean(v))
        *out = json_is_true(v);
    else if (text && strcmp(text, "on") == 0)
        *out = true;
    else if (text && strcmp(text, "off") == 0)
        *out = false;
    else
        return several_values(o, sub, v) ? -EINVAL : config_bad(o, "%s is neither on nor off; did you mean %s=on?", shown(sub, v), sub);
    return 0;
}

int config_uint(const struct config_origin *o, const char *sub, const json_t *v, uint64_t min,
                uint64_t max, uint64_t *out)
{
    const char *text = json_string_value(v);
    uint64_t value = 0;
    bool below = false, number = false;

    if (json_is_integer(v)) {
        number = true;
        below = json_integer_value(v) < 0;
        value = (uint64_t)json_integer_value(v);
    } else if (text && isdigit((unsigned char)*text)) {
        char *end;
        bool hex = text[0] == '0' && (text[1] == 'x' || text[1] == 'X');
        errno = 0;
        value = strtoull(text, &end, hex ? 16 : 10);
        number = !*end && end != text + (hex ? 1 : 0);
        if (errno == ERANGE)
            value = UINT64_MAX;
    } else if (text && *text == '-' && isdigit((unsigned char)text[1])) {
        number = below = true;
    }
    if (number && !below && value >= min && value <= max) {
        *out = value;
        return 0;
    }
    if (several_values(o, sub, v))
        return -EINVAL;
    char nearest[64], range[64];
    /* Ports have hexadecimal numbers, times and counts have not. */
    bool port = sub && strcmp(sub, "iobase") == 0;
    snprintf(nearest, sizeof(nearest), port ? "%s%s0x%llx" : "%s%s%llu", sub ? sub : "", sub ? "=" : "",
             (unsigned long long)(number && !below && value > max ? max : min));
    snprintf(range, sizeof(range), port ? "0x%llx...0x%llx" : "%llu...%llu",
             (unsigned long long)min, (unsigned long long)max);
    return config_bad(o, "%s is not a number in %s; did you mean %s?", shown(sub, v), range,
                      sub ? nearest : config_form(o, nearest));
}

void config_format_size(uint64_t size, char out[24])
{
    static const char suffix[] = "TGMK";
    for (unsigned i = 0; suffix[i]; i++) {
        unsigned shift = 40 - 10 * i;
        if (size && !(size & ((UINT64_C(1) << shift) - 1))) {
            snprintf(out, 24, "%llu%c", (unsigned long long)(size >> shift), suffix[i]);
            return;
        }
    }
    snprintf(out, 24, "%llu", (unsigned long long)size);
}

/* The power of 1024 of a size's suffix as a shift, or -1. */
static int size_shift(char ch)
{
    static const char suffix[] = "KMGT";
    const char *p = ch ? strchr(suffix, toupper((unsigned char)ch)) : NULL;
    return p ? 10 * (int)(p - suffix + 1) : -1;
}

/* What somebody may have meant who wrote "512MB", "1.5G" or "512". */
static uint64_t guess_size(const char *text, uint64_t min, uint64_t max)
{
    char *end;
    double value = isdigit((unsigned char)*text) ? strtod(text, &end) : 0;
    if (!(value > 0))
        return MIN(MAX(MIB(512), min), max);
    while (*end == ' ')
        end++;
    int shift = size_shift(*end);
    /* A bare small number means mebibytes, as for other machines' -m. */
    value *= (double)(UINT64_C(1) << (shift >= 0 ? shift : value < (double)min ? 20 : 0));
    if (value >= (double)max)
        return max;
    return MAX(align_down((uint64_t)value, value >= (double)MIB(1) ? MIB(1) : 4096), min);
}

/* What to write instead: "--memory 512M", or "cache=64M" of a sub-option. */
static const char *size_form(const struct config_origin *o, const char *sub, const char *size)
{
    if (!sub)
        return config_form(o, size);
    char *out = message_buffer();
    snprintf(out, QUOTE_SIZE, "%s=%s", sub, size);
    return out;
}

int config_size(const struct config_origin *o, const char *sub, const json_t *v, uint64_t min,
                uint64_t max, uint64_t *out)
{
    const char *text = json_string_value(v), *why = NULL;
    char number[32], nearest[24], limit[24];
    uint64_t size = 0;

    if (json_is_integer(v)) {
        snprintf(number, sizeof(number), "%lld", (long long)json_integer_value(v));
        text = number;
    }
    if (!text)
        return config_bad(o, "%s is not a size; did you mean %s?", shown(sub, v),
                          size_form(o, sub, "512M"));
    if (isdigit((unsigned char)*text)) {
        char *end;
        errno = 0;
        size = strtoull(text, &end, 10);
        int shift = *end ? size_shift(*end) : 0;
        if (shift < 0 || (*end && end[1]))
            why = "not a size";
        else if (errno == ERANGE || size > UINT64_MAX >> shift)
            size = UINT64_MAX;
        else
            size <<= shift;
    } else {
        why = "not a size";
    }
    if (!why && size < min) {
        config_format_size(min, limit);
        why = "too small: the least is";
    } else if (!why && size > max) {
        config_format_size(max, limit);
        why = "too large: the most is";
    } else if (!why && size % 4096) {
        strcpy(limit, "4K");
        why = "not a multiple of";
    } else if (!why) {
        *out = size;
        return 0;
    } else {
        limit[0] = 0;
    }
    config_format_size(guess_size(text, min, max), nearest);
    return config_bad(o, "%s is %s%s%s; did you mean %s?", shown(sub, v), why, limit[0] ? " " : "",
                      limit, size_form(o, sub, nearest));
}

int config_only_keys(const struct config_origin *o, const json_t *object, const char *what,
                     const char *const *keys)
{
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)object, key, value)
    {
        unsigned i = 0;
        while (keys[i] && strcmp(keys[i], key) != 0)
            i++;
        if (keys[i])
            continue;
        const char *nearest = suggest_nearest(key, keys);
        if (nearest)
            return config_bad(o, "%s has no option %s; did you mean %s?", what, config_quote(key),
                              nearest);
        char all[256] = "";
        for (size_t n = 0, k = 0; keys[k] && n < sizeof(all); k++)
            n += (size_t)snprintf(all + n, sizeof(all) - n, "%s%s", k ? ", " : "", keys[k]);
        return config_bad(o, "%s has no option %s; there are%s %s", what, config_quote(key), all[0] ? ":" : "",
                          all[0] ? all : "none");
    }
    return 0;
}

/* Cuts one part off at the next single comma, turning double commas into one. Returns what follows,
 * or NULL. */
static char *cut_part(char *p)
{
    char *to = p;
    for (; *p; p++) {
        if (*p == ',' && p[1] != ',') {
            *to = 0;
            return p + 1;
        }
        if (*p == ',')
            p++;
        *to++ = *p;
    }
    *to = 0;
    return NULL;
}

static int add_part(json_t *object, const char *key, const char *text)
{
    json_t *value = json_string_nocheck(text), *old = json_object_get(object, key);
    if (!old)
        return json_object_set_new_nocheck(object, key, value);
    if (!json_is_array(old)) {
        json_t *array = json_array();
        json_array_append(array, old);
        if (json_object_set_new_nocheck(object, key, array) < 0) {
            json_decref(value);
            return -1;
        }
        old = array;
    }
    return json_array_append_new(old, value);
}

int config_object(const struct config_origin *o, const json_t *v, const char *what,
                  const char *first_key, const char *const *keys, json_t **out)
{
    int r;
    if (json_is_object(v)) {
        r = config_only_keys(o, v, what, keys);
        if (r == 0)
            *out = json_incref((json_t *)v);
        return r;
    }
    if (!json_is_string(v))
        return config_bad(o, "%s is neither an object nor a string", shown(NULL, v));

    json_t *object = json_object();
    char *copy = strdup(json_string_value(v));
    r = object && copy ? 0 : -ENOMEM;
    bool first = true;
    for (char *part = copy; r == 0 && part; first = false) {
        char *next = cut_part(part), *equals = strchr(part, '=');
        if (!equals && first && first_key) {
            r = *part ? 0 : config_bad(o, "needs a value that is not empty");
            if (r == 0 && add_part(object, first_key, part) < 0)
                r = -ENOMEM;
        } else if (!equals || equals == part) {
            const char *nearest = suggest_nearest(part, keys);
            if (!nearest && first)
                nearest = keys[0];
            char form[256];
            /* A value without its name, and not a name without its value. */
            if (nearest && first && *part && *part != ',' && !equals && strcmp(part, nearest) != 0)
                snprintf(form, sizeof(form), "; did you mean %s=%.80s?", nearest, part);
            else if (nearest)
                snprintf(form, sizeof(form), "; did you mean %s=...?", nearest);
            else
                form[0] = 0;
            r = config_bad(o, "%s is not an option with a value (name=value)%s", config_quote(part),
                           form);
        } else {
            *equals = 0;
            if (add_part(object, part, equals + 1) < 0)
                r = -ENOMEM;
        }
        part = next;
    }
    free(copy);
    if (r == 0)
        r = config_only_keys(o, object, what, keys);
    if (r < 0)
        json_decref(object);
    else
        *out = object;
    return r;
}

int config_mac(const struct config_origin *o, const json_t *v, uint8_t mac[6])
{
    const char *text = json_string_value(v);
    bool ok = text && strlen(text) == 17;
    for (unsigned i = 0; ok && i < 6; i++) {
        const char *p = text + 3 * i;
        ok = isxdigit((unsigned char)p[0]) && isxdigit((unsigned char)p[1]) &&
             (p[2] == ':' || !p[2]);
        if (ok)
            mac[i] = (uint8_t)strtoul(p, NULL, 16);
    }
    if (!ok)
        return config_bad(o, "%s is not an Ethernet address; did you mean mac=52:54:00:12:34:56?",
                          shown("mac", v));
    if (mac[0] & 1)
        return config_bad(o, "%s is a multicast address; did you mean mac=%02x%s?", shown("mac", v),
                          mac[0] & 0xfe, text + 2);
    return 0;
}

/* Cuts "address:port" at end into its parts. The address may be empty. */
static bool forward_end(char *text, char *addr, size_t size, uint16_t *port)
{
    char *colon = strrchr(text, ':'), *end;
    struct in_addr in;
    if (!colon || !isdigit((unsigned char)colon[1]))
        return false;
    *colon = 0;
    unsigned long n = strtoul(colon + 1, &end, 10);
    if (*end || n < 1 || n > 65535 || strlen(text) >= size ||
        (*text && inet_pton(AF_INET, text, &in) != 1))
        return false;
    strcpy(addr, text);
    *port = (uint16_t)n;
    return true;
}

int config_forward(const struct config_origin *o, const json_t *v, struct net_forward *out)
{
    const char *text = json_string_value(v);
    char copy[160];
    memset(out, 0, sizeof(*out));
    if (text && strlen(text) < sizeof(copy)) {
        strcpy(copy, text);
        char *dash = strchr(copy, '-');
        bool udp = strncmp(copy, "udp:", 4) == 0;
        if (dash && (udp || strncmp(copy, "tcp:", 4) == 0)) {
            *dash = 0;
            out->udp = udp;
            if (forward_end(copy + 4, out->host_addr, sizeof(out->host_addr), &out->host_port) &&
                forward_end(dash + 1, out->guest_addr, sizeof(out->guest_addr), &out->guest_port)) {
                if (!out->host_addr[0])
                    strcpy(out->host_addr, "0.0.0.0");
                return 0;
            }
        }
    }
    return config_bad(
        o,
        "%s is not tcp|udp:[host address]:port-[guest address]:port with IPv4 addresses and ports "
        "1...65535; did you mean hostfwd=tcp:127.0.0.1:2222-:22?",
        shown("hostfwd", v));
}

void config_format_forward(const struct net_forward *f, char out[160])
{
    snprintf(out, 160, "%s:%s:%u-%s:%u", f->udp ? "udp" : "tcp", f->host_addr, f->host_port,
             f->guest_addr, f->guest_port);
}

int config_console(const struct config_origin *o, const json_t *v, char **out)
{
    static const char *const words[] = {"stdio", "pty", "none", "file:", "unix:", NULL};
    const char *text = json_string_value(v), *rest = NULL;
    unsigned i = 0;

    for (; text && words[i]; i++) {
        size_t n = strlen(words[i]);
        bool path = words[i][n - 1] == ':';
        if (path ? strncmp(text, words[i], n) == 0 : strcmp(text, words[i]) == 0) {
            rest = text + n;
            if (path && !*rest)
                return config_bad(o, "%s lacks a path; did you mean %s?", config_quote(text),
                                  i == 3 ? "file:console.log" : "unix:console.sock");
            if (i == 4 && strlen(rest) >= sizeof(((struct sockaddr_un *)0)->sun_path))
                return config_bad(o,
                                  "the path of a socket has at most %zu bytes; use a shorter one",
                                  sizeof(((struct sockaddr_un *)0)->sun_path) - 1);
            return config_string(o, v, false, out);
        }
    }
    const char *nearest = text ? suggest_nearest(text, words) : NULL;
    char form[200] = "stdio, pty, file:PATH, unix:PATH or none";
    if (nearest && strchr(nearest, ':'))
        snprintf(form, sizeof(form), "%sPATH", nearest);
    else if (nearest)
        snprintf(form, sizeof(form), "%s", nearest);
    else if (text && strchr(text, '/'))
        snprintf(form, sizeof(form), "file:%.150s", text);
    return config_bad(o, "%s is not a console; did you mean %s?", shown(NULL, v), form);
}
