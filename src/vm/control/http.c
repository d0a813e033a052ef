/*
 * Requests and answers: from libmicrohttpd's calls to handlers and back.
 *
 * A request is read whole (its size and time are bounded), then carried out. What cannot be answered at once waits with
 * its connection suspended: for a job's end, or for the next event. http_wake() resumes those for whom
 * there is something.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"
#include "vm/config.h"
#include "vm/control/server.h"

/* One request and its answer. */
struct exchange {
    struct connection *conn;
    char *body;
    size_t body_len;
    bool too_big;
    bool suspended; /* nothing happens until MHD_resume_connection() */
    bool gone;      /* the client hung up while it waited */
    bool stream;    /* counted as one */
    unsigned job;   /* waits for this one; 0: none */
    /* Of a stream of events. */
    bool follows;
    uint64_t seq;
    char *line; /* what is being sent */
    size_t line_at, line_len;
};

static struct connection *connection_of(struct MHD_Connection *http)
{
    return MHD_get_connection_info(http, MHD_CONNECTION_INFO_SOCKET_CONTEXT)->socket_context;
}

/* ---- Answers. ---- */

static char *to_text(json_t *answer, const char *text_type, size_t *len)
{
    char *dump, *text = NULL;

    if (text_type && json_is_string(answer)) {
        *len = json_string_length(answer);
        text = malloc(*len + 1);
        if (text)
            memcpy(text, json_string_value(answer), *len + 1);
        return text;
    }
    dump = answer ? json_dumps(answer, JSON_INDENT(4) | JSON_REAL_PRECISION(12)) : strdup("{}");
    if (!dump || asprintf(&text, "%s\n", dump) < 0)
        text = NULL;
    free(dump);
    *len = text ? strlen(text) : 0;
    return text;
}

static enum MHD_Result send_response(struct MHD_Connection *http, unsigned status, struct MHD_Response *response,
                                     const char *type)
{
    if (!response)
        return MHD_NO;
    MHD_add_response_header(response, "Content-Type", type);
    MHD_add_response_header(response, "Connection", "close");
    enum MHD_Result r = MHD_queue_response(http, status, response);
    MHD_destroy_response(response);
    return r;
}

enum MHD_Result http_answer(struct MHD_Connection *http, unsigned status, json_t *answer, const char *text_type)
{
    size_t len;
    bool text_answer = text_type && json_is_string(answer);
    char *text = to_text(answer, text_type, &len);

    json_decref(answer);
    if (!text)
        return MHD_NO;
    return send_response(http, status, MHD_create_response_from_buffer(len, text, MHD_RESPMEM_MUST_FREE),
                         text_answer ? text_type : "application/json");
}

static enum MHD_Result refuse(struct MHD_Connection *http, unsigned status, const char *text)
{
    return http_answer(http, status, json_pack("{s:s}", "error", text), NULL);
}

/* ---- Waiting. ---- */

static bool begin_stream(struct exchange *ex)
{
    struct control *c = ex->conn->control;

    if (c->stream_count >= CONTROL_MAX_STREAMS)
        return false;
    c->stream_count++;
    ex->stream = true;
    return true;
}

static void suspend(struct exchange *ex)
{
    ex->suspended = true;
    MHD_suspend_connection(ex->conn->http);
}

static void resume(struct exchange *ex)
{
    ex->suspended = false;
    MHD_resume_connection(ex->conn->http);
}

bool http_waits(const struct connection *conn)
{
    return conn->exchange && conn->exchange->suspended;
}

void http_gone(struct connection *conn)
{
    conn->exchange->gone = true;
    resume(conn->exchange);
}

static bool has_news(const struct exchange *ex)
{
    struct control *c = ex->conn->control;
    json_t *answer = NULL;

    if (ex->follows)
        return ex->seq < events_next(c->events);
    int status = control_jobs_result(c->jobs, ex->job, &answer);
    json_decref(answer);
    return status != 0;
}

void http_wake(struct control *c)
{
    for (struct connection *conn = c->connections; conn; conn = conn->next)
        if (http_waits(conn) && (c->closing || has_news(conn->exchange)))
            resume(conn->exchange);
}

/* ---- The stream of events. ---- */

static ssize_t read_events(void *opaque, uint64_t pos, char *buf, size_t max)
{
    struct exchange *ex = opaque;
    struct control *c = ex->conn->control;

    if (ex->gone)
        return MHD_CONTENT_READER_END_WITH_ERROR;
    if (!ex->line) {
        ex->line = events_line(c->events, &ex->seq);
        ex->line_at = 0;
        ex->line_len = ex->line ? strlen(ex->line) : 0;
    }
    if (!ex->line) {
        if (c->closing)
            return MHD_CONTENT_READER_END_OF_STREAM;
        suspend(ex);
        return 0;
    }
    size_t n = MIN(max, ex->line_len - ex->line_at);
    memcpy(buf, ex->line + ex->line_at, n);
    ex->line_at += n;
    if (ex->line_at == ex->line_len) {
        free(ex->line);
        ex->line = NULL;
    }
    return (ssize_t)n;
}

/* The first line tells where things stand, so that a follower misses nothing between asking and following. */
static enum MHD_Result follow_events(struct exchange *ex, const struct control_request *r)
{
    struct control *c = ex->conn->control;
    uint64_t next = events_next(c->events);
    json_t *answer = NULL;

    ex->seq = next;
    int status = control_arg_uint(r, "since", 0, UINT64_MAX, &ex->seq, &answer);
    if (status)
        return http_answer(ex->conn->http, (unsigned)status, answer, NULL);
    if (!begin_stream(ex))
        return refuse(ex->conn->http, 503, "too many followers; close some");
    ex->seq = MIN(ex->seq, next);
    ex->follows = true;
    json_t *hello = json_pack("{s:s, s:I, s:s, s:s}", "event", "hello", "next", (json_int_t)next, "name",
                              c->config->name, "state", control_state(c->vm));
    char *text = hello ? json_dumps(hello, JSON_COMPACT) : NULL;
    json_decref(hello);
    if (text && asprintf(&ex->line, "%s\n", text) < 0)
        ex->line = NULL;
    free(text);
    ex->line_len = ex->line ? strlen(ex->line) : 0;
    return send_response(ex->conn->http, 200,
                         MHD_create_response_from_callback(MHD_SIZE_UNKNOWN, 4096, read_events, ex, NULL),
                         "application/x-ndjson");
}

/* ---- Requests. ---- */

static enum MHD_Result add_argument(void *opaque, enum MHD_ValueKind kind, const char *key, const char *value)
{
    /* One that is not UTF-8 is left out, and then missed or not. */
    json_object_set_new(opaque, key, json_string(value ? value : ""));
    return MHD_YES;
}

/* The request's arguments: an object, or NULL with *error. */
static json_t *read_arguments(struct exchange *ex, const char **error)
{
    json_t *args;

    if (ex->body_len)
        return control_args_parse(ex->body, ex->body_len, error);
    args = json_object();
    MHD_get_connection_values(ex->conn->http, MHD_GET_ARGUMENT_KIND, add_argument, args);
    return args;
}

static enum MHD_Result run_quick(struct exchange *ex, const struct control_route *route, struct control_request *r)
{
    json_t *answer = NULL;
    int status = route->handler(r, &answer);
    return http_answer(ex->conn->http, (unsigned)status, answer, route->text_type);
}

static enum MHD_Result start_job(struct exchange *ex, const struct control_route *route, struct control_request *r)
{
    struct control *c = ex->conn->control;
    json_t *answer = NULL, *rest = json_deep_copy(r->args);
    bool wait = true;
    unsigned id = 0;
    int status = control_arg_bool(r, "wait", &wait, &answer);

    json_object_del(rest, "wait");
    r->args = rest;
    if (!status && wait && c->stream_count >= CONTROL_MAX_STREAMS)
        status = control_refuse(&answer, 503, "too many clients wait; close some");
    if (!status)
        status = control_jobs_start(c->jobs, route, r, &id, &answer);
    json_decref(rest);
    if (status)
        return http_answer(ex->conn->http, (unsigned)status, answer, NULL);
    if (!wait)
        return http_answer(ex->conn->http, 202, control_jobs_describe(c->jobs, id), NULL);
    begin_stream(ex);
    ex->job = id;
    suspend(ex);
    return MHD_YES;
}

static enum MHD_Result answer_job(struct exchange *ex)
{
    struct control *c = ex->conn->control;
    json_t *answer = NULL;
    int status = ex->gone ? -1 : control_jobs_result(c->jobs, ex->job, &answer);

    if (status > 0)
        return http_answer(ex->conn->http, (unsigned)status, answer, NULL);
    if (status < 0 || c->closing)
        return MHD_NO;
    suspend(ex); /* woken too early */
    return MHD_YES;
}

static enum MHD_Result carry_out(struct exchange *ex, const char *method, const char *url)
{
    struct control *c = ex->conn->control;
    struct control_request r = {.control = c, .vm = c->vm};
    const struct control_route *route;
    const char *error = NULL;
    json_t *answer = NULL;
    enum MHD_Result result;

    int status = control_route_find(method, url, &route, &r.name);
    if (status == 404)
        return refuse(ex->conn->http, 404, "there is no such thing; GET /v1 lists what there is");
    if (status)
        return refuse(ex->conn->http, 405, "this takes another method; GET /v1 lists what there is");
    json_t *args = read_arguments(ex, &error);
    if (!args)
        return refuse(ex->conn->http, 400, error);
    r.args = args;
    status = control_route_check(route, args, &answer);
    if (status)
        result = http_answer(ex->conn->http, (unsigned)status, answer, NULL);
    else if (route->kind == ROUTE_QUICK)
        result = run_quick(ex, route, &r);
    else if (route->kind == ROUTE_JOB)
        result = start_job(ex, route, &r);
    else if (route->kind == ROUTE_EVENTS)
        result = follow_events(ex, &r);
    else if (begin_stream(ex))
        result = attach_upgrade(c, ex->conn->http, args);
    else
        result = refuse(ex->conn->http, 503, "too many clients at the console; close some");
    json_decref(args);
    return result;
}

/* A body that is only a little too long is read to its end, so that a client who reads the answer last gets it. */
static bool announces_too_much(struct MHD_Connection *http)
{
    const char *length = MHD_lookup_connection_value(http, MHD_HEADER_KIND, "Content-Length");
    return length && strtoull(length, NULL, 10) > CONTROL_MAX_DISCARD;
}

/* One more piece of the body. */
static void take_body(struct exchange *ex, const char *data, size_t len)
{
    if (ex->too_big || len > CONTROL_MAX_BODY - ex->body_len) {
        ex->too_big = true;
        return;
    }
    char *more = realloc(ex->body, ex->body_len + len);
    if (!more) {
        ex->too_big = true;
        return;
    }
    ex->body = more;
    memcpy(ex->body + ex->body_len, data, len);
    ex->body_len += len;
}

enum MHD_Result http_access(void *opaque, struct MHD_Connection *http, const char *url, const char *method,
                            const char *version, const char *upload, size_t *upload_size, void **state)
{
    struct connection *conn = connection_of(http);
    struct exchange *ex = *state;

    if (!conn)
        return MHD_NO;
    if (!ex) {
        ex = calloc(1, sizeof(*ex));
        if (!ex)
            return MHD_NO;
        ex->conn = conn;
        conn->exchange = ex;
        *state = ex;
        if (announces_too_much(http)) {
            conn->deadline_ns = 0;
            return refuse(http, 413, "the body is longer than 65536 bytes");
        }
        return MHD_YES;
    }
    if (*upload_size) {
        take_body(ex, upload, *upload_size);
        *upload_size = 0;
        return MHD_YES;
    }
    conn->deadline_ns = 0;
    if (ex->job)
        return answer_job(ex);
    if (ex->too_big)
        return refuse(http, 413, "the body is longer than 65536 bytes");
    return carry_out(ex, method, url);
}

void http_completed(void *opaque, struct MHD_Connection *http, void **state, enum MHD_RequestTerminationCode why)
{
    struct exchange *ex = *state;

    if (!ex)
        return;
    if (ex->stream)
        ex->conn->control->stream_count--;
    ex->conn->exchange = NULL;
    free(ex->body);
    free(ex->line);
    free(ex);
    *state = NULL;
}
