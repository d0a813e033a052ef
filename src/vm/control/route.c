/* The one table of routes, and how handlers read their arguments. Pure but for the tables; any thread. */
#include "vm/control/route.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"
#include "vm/config_value.h"
#include "vm/suggest.h"

#define MAX_ARGS 16

static const struct control_route *const tables[] = {
    control_info_routes, control_life_routes, control_console_routes, control_job_routes, control_event_routes,
    control_snapshot_routes, control_engine_routes, control_migrate_routes,
};

const struct control_route *control_route_at(unsigned i)
{
    for (unsigned t = 0; t < ARRAY_SIZE(tables); t++)
        for (const struct control_route *r = tables[t]; r->method; r++)
            if (i-- == 0)
                return r;
    return NULL;
}

/* The length of what comes before {name}, 0: the path is fixed. */
static size_t fixed_part(const char *path)
{
    const char *brace = strchr(path, '{');
    return brace ? (size_t)(brace - path) : 0;
}

static bool matches(const struct control_route *r, const char *path, const char **name)
{
    size_t n = fixed_part(r->path);

    *name = "";
    if (!n)
        return strcmp(r->path, path) == 0;
    if (strncmp(r->path, path, n) != 0 || !path[n] || strchr(path + n, '/'))
        return false;
    *name = path + n;
    return true;
}

int control_route_find(const char *method, const char *path, const struct control_route **route, const char **name)
{
    int status = 404;
    const struct control_route *r;

    for (unsigned i = 0; (r = control_route_at(i)); i++) {
        if (!matches(r, path, name))
            continue;
        if (strcmp(r->method, method) == 0) {
            *route = r;
            return 0;
        }
        status = 405;
    }
    return status;
}

json_t *control_args_parse(const char *body, size_t len, const char **error)
{
    json_t *args = json_loadb(body, len, JSON_REJECT_DUPLICATES, NULL);

    *error = "the body is not JSON";
    if (!args || json_is_object(args))
        return args;
    *error = "the body must be a JSON object";
    json_decref(args);
    return NULL;
}

/* The names in r->args, and "wait" for jobs. */
static unsigned arg_names(const struct control_route *r, char *copy, size_t size, const char *names[MAX_ARGS])
{
    unsigned n = 0;

    snprintf(copy, size, "%s%s", r->args ? r->args : "", r->kind == ROUTE_JOB ? " wait" : "");
    for (char *save, *word = strtok_r(copy, " ", &save); word && n < MAX_ARGS - 1; word = strtok_r(NULL, " ", &save))
        names[n++] = word;
    names[n] = NULL;
    return n;
}

int control_route_check(const struct control_route *route, const json_t *args, json_t **answer)
{
    char copy[256];
    const char *names[MAX_ARGS], *key;
    unsigned n = arg_names(route, copy, sizeof(copy), names);
    const json_t *value;

    json_object_foreach((json_t *)args, key, value)
    {
        bool known = false;
        for (unsigned i = 0; i < n; i++)
            known |= strcmp(names[i], key) == 0;
        if (known)
            continue;
        const char *nearest = suggest_nearest(key, names);
        if (nearest)
            return control_refuse(answer, 400, "unknown argument %s; did you mean \"%s\"?", config_quote(key), nearest);
        return control_refuse(answer, 400, "unknown argument %s; this takes %s%s", config_quote(key),
                              n ? route->args : "none", n && route->kind == ROUTE_JOB ? " wait" : "");
    }
    return 0;
}

int control_refuse(json_t **answer, int status, const char *fmt, ...)
{
    char text[1024];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    json_decref(*answer);
    *answer = json_pack("{s:s}", "error", text);
    if (!*answer) /* a name in it that is not UTF-8 */
        *answer = json_pack("{s:s}", "error", "bad request");
    return status;
}

int control_arg_bool(const struct control_request *r, const char *key, bool *out, json_t **answer)
{
    const json_t *v = json_object_get(r->args, key);
    const char *s = json_string_value(v);

    if (!v)
        return 0;
    if (json_is_boolean(v))
        *out = json_is_true(v);
    else if (s && (strcmp(s, "true") == 0 || strcmp(s, "1") == 0))
        *out = true;
    else if (s && (strcmp(s, "false") == 0 || strcmp(s, "0") == 0))
        *out = false;
    else
        return control_refuse(answer, 400, "\"%s\" must be true or false", key);
    return 0;
}

int control_arg_uint(const struct control_request *r, const char *key, uint64_t min, uint64_t max, uint64_t *out,
                     json_t **answer)
{
    const json_t *v = json_object_get(r->args, key);
    const char *s = json_string_value(v);
    bool good = false;
    uint64_t value = 0;

    if (!v)
        return 0;
    if (json_is_integer(v)) {
        good = json_integer_value(v) >= 0;
        value = (uint64_t)json_integer_value(v);
    } else if (s && *s >= '0' && *s <= '9') {
        char *end;
        errno = 0;
        value = strtoull(s, &end, 10);
        good = errno == 0 && *end == 0;
    }
    if (!good || value < min || value > max)
        return control_refuse(answer, 400, "\"%s\" must be a number in %llu...%llu", key, (unsigned long long)min,
                              (unsigned long long)max);
    *out = value;
    return 0;
}

int control_arg_string(const struct control_request *r, const char *key, const char **out, json_t **answer)
{
    const json_t *v = json_object_get(r->args, key);

    if (!v)
        return 0;
    if (!json_is_string(v) || strlen(json_string_value(v)) != json_string_length(v))
        return control_refuse(answer, 400, "\"%s\" must be a string", key);
    *out = json_string_value(v);
    return 0;
}

int control_status_of(int error)
{
    switch (-error) {
    case 0:
        return 200;
    case ESHUTDOWN:
    case EBUSY:
    case EEXIST:
        return 409;
    case ENOENT:
        return 404;
    case EINVAL:
        return 400;
    case ENOSYS:
    case EOPNOTSUPP:
        return 501;
    default:
        return 500;
    }
}
