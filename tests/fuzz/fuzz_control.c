/*
 * Fuzz target: what a client of a control socket asks for, behind the HTTP library. The first line is method and path; the rest is the
 * body. A request that its route takes must be readable by each of the ways in which handlers read arguments, and every
 * refusal must say something that can be sent.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "vm/control/route.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check_refusal(int status, json_t **answer)
{
    if (status) {
        char *text = *answer ? json_dumps(*answer, 0) : NULL;
        if (status < 400 || !text || !json_is_string(json_object_get(*answer, "error")))
            abort();
        free(text);
    }
    json_decref(*answer);
    *answer = NULL;
}

/* All arguments of the route, as each kind. */
static void read_arguments(const struct control_route *route, const struct control_request *r)
{
    char names[256], *save;
    json_t *answer = NULL;

    strncpy(names, route->args ? route->args : "", sizeof(names) - 1);
    names[sizeof(names) - 1] = 0;
    for (char *key = strtok_r(names, " ", &save); key; key = strtok_r(NULL, " ", &save)) {
        uint64_t n = 5;
        bool b = false;
        const char *s = "";
        int status = control_arg_uint(r, key, 5, 500, &n, &answer);
        if (n < 5 || n > 500)
            abort();
        check_refusal(status, &answer);
        check_refusal(control_arg_bool(r, key, &b, &answer), &answer);
        check_refusal(control_arg_string(r, key, &s, &answer), &answer);
        if (!s)
            abort();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const uint8_t *end = memchr(data, '\n', size);
    size_t head_len = end ? (size_t)(end - data) : size, skip = end ? head_len + 1 : size;
    char *head = strndup((const char *)data, head_len), *path = head ? strchr(head, ' ') : NULL;
    const struct control_route *route;
    struct control_request r = {0};
    const char *error = NULL;
    json_t *answer = NULL;

    if (!path) {
        free(head);
        return 0;
    }
    *path++ = 0;
    int status = control_route_find(head, path, &route, &r.name);
    json_t *args = control_args_parse((const char *)data + skip, size - skip, &error);
    if (!args && !error)
        abort();
    if (status && status != 404 && status != 405)
        abort();
    if (args && !status) {
        r.args = args;
        status = control_route_check(route, args, &answer);
        if (!status)
            read_arguments(route, &r);
        check_refusal(status, &answer);
    }
    json_decref(args);
    free(head);
    return 0;
}
