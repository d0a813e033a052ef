/*
 * Requests over a machine's control socket; client.h has the contract.
 *
 * HTTP/1.0 is asked for, so that a body ends with the connection and needs no decoding; only the console's upgrade
 * needs 1.1. The server is the user's own machine, but what it sends is bounded all the same.
 */
#include "cli/client.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"
#include "vm/vm.h"

#define MAX_HEAD   16384u
#define MAX_ANSWER (64u << 20)

/* A connection with what has been read from it. */
struct stream {
    int fd;
    int64_t deadline_ms; /* CLOCK_MONOTONIC; -1: none */
    char *data;
    size_t len, size;
    bool eof;
};

static int64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* Waits for the descriptor. 0, or -ETIMEDOUT. */
static int await(const struct stream *s, short events)
{
    for (;;) {
        struct pollfd p = {.fd = s->fd, .events = events};
        int64_t left = s->deadline_ms < 0 ? -1 : MAX(s->deadline_ms - now_ms(), 0);
        /* What is there already is taken even when no time is left. */
        int r = poll(&p, 1, (int)left);
        if (r > 0)
            return 0;
        if (r == 0 && left == 0)
            return -ETIMEDOUT;
        if (r < 0 && errno != EINTR)
            return -errno;
    }
}

static int open_stream(struct stream *s, const char *path, unsigned seconds)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};

    *s = (struct stream){.fd = -1, .deadline_ms = seconds ? now_ms() + seconds * 1000ll : -1};
    snprintf(addr.sun_path, sizeof(addr.sun_path), "%s", path);
    s->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (s->fd < 0)
        return -errno;
    /* A full backlog would make connect() wait for as long as it likes. */
    struct timeval t = {.tv_sec = seconds};
    setsockopt(s->fd, SOL_SOCKET, SO_SNDTIMEO, &t, sizeof(t));
    if (connect(s->fd, (const struct sockaddr *)&addr, sizeof(addr)) < 0)
        return errno == EAGAIN || errno == EINPROGRESS ? -ETIMEDOUT : -errno;
    return 0;
}

static void close_stream(struct stream *s)
{
    if (s->fd >= 0)
        close(s->fd);
    free(s->data);
    *s = (struct stream){.fd = -1};
}

static int send_all(struct stream *s, const char *data, size_t len)
{
    while (len) {
        ssize_t n = send(s->fd, data, len, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return errno == EAGAIN ? -ETIMEDOUT : -errno;
        data += n;
        len -= (size_t)n;
    }
    return 0;
}

/* Reads some more. 0 or a negative errno; s->eof at the end. */
static int read_more(struct stream *s)
{
    int err = await(s, POLLIN);
    if (err)
        return err;
    if (s->size - s->len < 4096) {
        size_t size = MAX(s->size * 2, 16384u);
        char *more = size > MAX_ANSWER ? NULL : realloc(s->data, size + 1);
        if (!more)
            return size > MAX_ANSWER ? -EMSGSIZE : -ENOMEM;
        s->data = more;
        s->size = size;
    }
    ssize_t n = recv(s->fd, s->data + s->len, s->size - s->len, 0);
    if (n < 0)
        return errno == EINTR ? 0 : -errno;
    s->eof = n == 0;
    s->len += (size_t)n;
    s->data[s->len] = 0;
    return 0;
}

/* Takes the first n bytes away. */
static void consume(struct stream *s, size_t n)
{
    memmove(s->data, s->data + n, s->len - n);
    s->len -= n;
    s->data[s->len] = 0;
}

/* ---- One request. ---- */

static void put_escaped(FILE *f, const char *text)
{
    for (const unsigned char *p = (const unsigned char *)text; *p; p++) {
        if ((*p >= 'a' && *p <= 'z') || (*p >= 'A' && *p <= 'Z') || (*p >= '0' && *p <= '9') || strchr("-_.~", *p))
            fputc(*p, f);
        else
            fprintf(f, "%%%02X", *p);
    }
}

static void put_query(FILE *f, const json_t *args)
{
    const char *key, *separator = "?";
    json_t *value;

    json_object_foreach((json_t *)args, key, value)
    {
        fputs(separator, f);
        put_escaped(f, key);
        fputc('=', f);
        if (json_is_string(value))
            put_escaped(f, json_string_value(value));
        else if (json_is_integer(value))
            fprintf(f, "%lld", (long long)json_integer_value(value));
        else
            fputs(json_is_true(value) ? "true" : "false", f);
        separator = "&";
    }
}

/* args: borrowed. */
static int send_request(struct stream *s, const char *method, const char *path, const json_t *args, const char *headers)
{
    bool query = strcmp(method, "GET") == 0;
    char *body = args && !query ? json_dumps(args, JSON_COMPACT) : NULL, *text = NULL;
    size_t len;
    FILE *f = open_memstream(&text, &len);
    int err = -ENOMEM;

    if (f) {
        fprintf(f, "%s %s", method, path);
        if (query && args)
            put_query(f, args);
        fprintf(f, " HTTP/1.%d\r\nHost: ringfort\r\n%s", headers ? 1 : 0, headers ? headers : "");
        if (body)
            fprintf(f, "Content-Type: application/json\r\nContent-Length: %zu\r\n", strlen(body));
        fprintf(f, "\r\n%s", body ? body : "");
        err = fclose(f) == 0 ? send_all(s, text, len) : -ENOMEM;
    }
    free(text);
    free(body);
    return err;
}

/* Reads the head of the answer and takes it away. The status or a negative errno. */
static int read_head(struct stream *s)
{
    const char *end;
    int status;

    while (!s->data || !(end = strstr(s->data, "\r\n\r\n"))) {
        if (s->eof)
            return -ECONNRESET;
        if (s->len > MAX_HEAD)
            return -EPROTO;
        int err = read_more(s);
        if (err)
            return err;
    }
    size_t len = (size_t)(end - s->data) + 4;
    if (sscanf(s->data, "HTTP/1.%*1[01] %3d ", &status) != 1 || status < 100)
        return -EPROTO;
    consume(s, len);
    return status;
}

static int exchange(struct stream *s, const struct registry_entry *m, const char *method, const char *path,
                    const json_t *args, unsigned seconds)
{
    int status = open_stream(s, m->socket, seconds);

    if (!status)
        status = send_request(s, method, path, args, NULL);
    if (!status)
        status = read_head(s);
    while (status > 0 && !s->eof) {
        int err = read_more(s);
        if (err)
            status = err;
    }
    return status;
}

int client_try(const struct registry_entry *m, const char *method, const char *path, json_t *args, unsigned seconds,
               json_t **answer)
{
    struct stream s;
    int status = exchange(&s, m, method, path, args, seconds);

    *answer = NULL;
    if (status > 0)
        *answer = json_loadb(s.data, s.len, JSON_DECODE_ANY, NULL);
    if (status > 0 && !*answer)
        status = -EPROTO;
    close_stream(&s);
    json_decref(args);
    return status;
}

/* From an HTTP status or negative errno to the command's; logs. */
static int verdict(const struct registry_entry *m, int status, const json_t *answer)
{
    const char *why = json_string_value(json_object_get(answer, "error"));

    if (status >= 200 && status < 300)
        return 0;
    if (status == -ETIMEDOUT)
        log_error("%s: the machine's process does not answer; see process %d", m->name, (int)m->pid);
    else if (status == -ECONNREFUSED || status == -ENOENT || status == -ECONNRESET || status == -EPIPE)
        log_error("%s: the machine has ended meanwhile", m->name);
    else if (status < 0)
        log_error("%s: cannot talk to the machine: %s", m->name, strerror(-status));
    else
        log_error("%s: %s", m->name, why ? why : "the machine refused");
    if (status < 0)
        return VM_STATUS_HOST;
    return status == 400 || status == 404 || status == 405 || status == 413 ? VM_STATUS_USAGE : VM_STATUS_USER;
}

int client_call(const struct registry_entry *m, const char *method, const char *path, json_t *args, unsigned seconds,
                json_t **answer)
{
    json_t *body;
    int status = client_try(m, method, path, args, seconds, &body), result = verdict(m, status, body);

    if (result || !answer) {
        json_decref(body);
        body = NULL;
    }
    if (answer)
        *answer = body;
    return result;
}

int client_text(const struct registry_entry *m, const char *path, json_t *args, char **text, size_t *len)
{
    struct stream s;
    int status = exchange(&s, m, "GET", path, args, CLIENT_PATIENCE_S);
    json_t *answer = status >= 300 ? json_loadb(s.data, s.len, 0, NULL) : NULL;
    int result = verdict(m, status, answer);

    json_decref(args);
    json_decref(answer);
    *text = NULL;
    if (!result) {
        *text = s.data;
        *len = s.len;
        s.data = NULL;
    }
    close_stream(&s);
    return result;
}

/* ---- Events. ---- */

struct client_events {
    struct stream stream;
};

struct client_events *client_events_open(const struct registry_entry *m, int *status)
{
    struct client_events *e = calloc(1, sizeof(*e));
    int http;

    if (!e) {
        log_error("out of memory");
        *status = VM_STATUS_HOST;
        return NULL;
    }
    http = open_stream(&e->stream, m->socket, CLIENT_PATIENCE_S);
    if (!http)
        http = send_request(&e->stream, "GET", "/v1/events", NULL, NULL);
    if (!http)
        http = read_head(&e->stream);
    *status = verdict(m, http, NULL);
    if (!*status)
        return e;
    client_events_close(e);
    return NULL;
}

void client_events_close(struct client_events *e)
{
    if (!e)
        return;
    close_stream(&e->stream);
    free(e);
}

int client_events_fd(const struct client_events *e)
{
    return e->stream.fd;
}

bool client_events_ended(const struct client_events *e)
{
    return e->stream.eof;
}

json_t *client_events_next(struct client_events *e, int ms)
{
    struct stream *s = &e->stream;
    const char *end;

    s->deadline_ms = ms < 0 ? -1 : now_ms() + ms;
    for (;;) {
        while (!s->data || !(end = memchr(s->data, '\n', s->len))) {
            int err = s->eof ? -ENODATA : read_more(s);
            if (err && err != -ETIMEDOUT)
                s->eof = true;
            if (err)
                return NULL;
        }
        size_t len = (size_t)(end - s->data) + 1;
        json_t *event = json_loadb(s->data, len, 0, NULL);
        consume(s, len);
        if (event)
            return event;
    }
}

/* ---- Jobs. ---- */

struct job_call {
    const struct registry_entry *m;
    struct client_events *events;
    void (*progress)(void *opaque, unsigned job, const json_t *progress);
    void *opaque;
    unsigned id;
    int interrupt_fd;
};

/* One event: progress is passed on. The job's description when it has ended (borrowed), or NULL. */
static const json_t *take_event(struct job_call *c, const json_t *event)
{
    const char *what = json_string_value(json_object_get(event, "event"));
    const char *state = json_string_value(json_object_get(event, "state"));
    json_t *progress = json_object_get(event, "progress");

    if (!what || strcmp(what, "job") != 0 || json_integer_value(json_object_get(event, "job")) != (json_int_t)c->id)
        return NULL;
    if (progress && c->progress)
        c->progress(c->opaque, c->id, progress);
    return state && strcmp(state, "running") != 0 && strcmp(state, "cancelling") != 0 ? event : NULL;
}

static void cancel_job(struct job_call *c)
{
    struct signalfd_siginfo info;
    char path[64];
    json_t *answer;

    if (read(c->interrupt_fd, &info, sizeof(info)) != (ssize_t)sizeof(info))
        return;
    log_warn("%s: cancelling", c->m->name);
    snprintf(path, sizeof(path), "/v1/jobs/%u", c->id);
    client_try(c->m, "DELETE", path, NULL, CLIENT_PATIENCE_S, &answer);
    json_decref(answer);
}

/* Waits for the job's end. Its last event, a new reference, or NULL: the machine has gone. */
static json_t *follow_job(struct job_call *c)
{
    for (;;) {
        struct pollfd p[2] = {{.fd = client_events_fd(c->events), .events = POLLIN},
                              {.fd = c->interrupt_fd, .events = POLLIN}};
        json_t *event = client_events_next(c->events, 0);

        if (event && take_event(c, event))
            return event;
        if (event) {
            json_decref(event);
            continue;
        }
        if (client_events_ended(c->events))
            return NULL;
        poll(p, 2, -1);
        if (p[1].revents & POLLIN)
            cancel_job(c);
    }
}

int client_job(const struct registry_entry *m, const char *method, const char *path, json_t *args,
               void (*progress)(void *opaque, unsigned job, const json_t *progress), void *opaque, json_t **answer)
{
    struct job_call c = {.m = m, .progress = progress, .opaque = opaque, .interrupt_fd = -1};
    json_t *job = NULL, *event;
    sigset_t set, old;
    int status;

    *answer = NULL;
    if (!args)
        args = json_object();
    json_object_set_new(args, "wait", json_false());
    /* Followed before it begins, so that nothing of it is missed. */
    c.events = client_events_open(m, &status);
    if (!c.events) {
        json_decref(args);
        return status;
    }
    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    sigprocmask(SIG_BLOCK, &set, &old);
    c.interrupt_fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    status = client_call(m, method, path, args, CLIENT_PATIENCE_S, &job);
    if (status)
        goto out;
    c.id = (unsigned)json_integer_value(json_object_get(job, "job"));
    event = follow_job(&c);
    if (!event) {
        log_error("%s: the machine ended before the job did", m->name);
        status = VM_STATUS_HOST;
        goto out;
    }
    *answer = json_incref(json_object_get(event, "result"));
    if (strcmp(json_string_value(json_object_get(event, "state")), "done") != 0) {
        const char *why = json_string_value(json_object_get(*answer, "error"));
        log_error("%s: %s", m->name, why ? why : "it failed");
        json_decref(*answer);
        *answer = NULL;
        status = VM_STATUS_USER;
    }
    json_decref(event);
out:
    if (c.interrupt_fd >= 0)
        close(c.interrupt_fd);
    sigprocmask(SIG_SETMASK, &old, NULL);
    client_events_close(c.events);
    json_decref(job);
    return status;
}

/* ---- The console. ---- */

int client_console(const struct registry_entry *m, unsigned long lines, int *fd, size_t *replay)
{
    struct stream s;
    char path[64];
    json_t *answer = NULL;

    snprintf(path, sizeof(path), "/v1/console?history=%lu", lines);
    int status = open_stream(&s, m->socket, CLIENT_PATIENCE_S);
    if (!status)
        status = send_request(&s, "GET", path, NULL, "Connection: Upgrade\r\nUpgrade: ringfort-console\r\n");
    /* What follows the head is the console's and is left in the socket: the head is read byte by byte. */
    char text[4096];
    size_t n = 0;
    while (!status && n < sizeof(text) - 1) {
        status = await(&s, POLLIN);
        ssize_t r = status ? 0 : recv(s.fd, text + n, 1, 0);
        if (!status && r <= 0)
            status = r < 0 && errno == EINTR ? 0 : -ECONNRESET;
        n += r > 0;
        text[n] = 0;
        if (n >= 4 && memcmp(text + n - 4, "\r\n\r\n", 4) == 0)
            break;
    }
    if (!status && sscanf(text, "HTTP/1.%*1[01] %3d ", &status) != 1)
        status = -EPROTO;
    if (status == 101) {
        const char *header = strcasestr(text, "\r\nReplay:");
        *replay = header ? strtoul(header + 9, NULL, 10) : 0;
        *fd = s.fd;
        struct timeval forever = {0};
        setsockopt(s.fd, SOL_SOCKET, SO_SNDTIMEO, &forever, sizeof(forever));
        return 0;
    }
    while (status > 0 && !s.eof && read_more(&s) == 0)
        ;
    if (status > 0 && s.len)
        answer = json_loadb(s.data, s.len, 0, NULL);
    status = verdict(m, status, answer);
    json_decref(answer);
    close_stream(&s);
    return status;
}
