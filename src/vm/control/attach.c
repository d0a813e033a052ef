/*
 * The console for others than the host's end of it: clients that are attached, and the file that keeps it.
 *
 * Each reads the console's history at its own pace, and one that is too slow misses something instead of holding the
 * guest back. A client's connection is a plain byte stream both ways after "101 Switching Protocols".
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <unistd.h>

#include "backend/console/console.h"
#include "backend/console/history.h"
#include "base/log.h"
#include "base/util.h"
#include "vm/control/server.h"

#define PROTOCOL      "ringfort-console"
#define KEEPER_LIMIT  (8u << 20) /* then the file becomes FILE.1 and a new one begins */

struct attach {
    struct control *control;
    struct MHD_UpgradeResponseHandle *upgrade;
    int fd;
    struct loop_fd *watch;
    uint64_t at;
    char out[16384], in[1024];
    size_t out_from, out_to, in_len;
    struct attach *next, **prev_next;
};

struct keeper {
    int fd;
    uint64_t at, size;
    bool broken;
};

static struct history *history_of(struct control *c)
{
    struct console *console = vm_console(c->vm);
    return console ? console_history(console) : NULL;
}

/* Any thread, machine lock held. */
static void console_changed(void *opaque)
{
    struct control *c = opaque;
    loop_schedule(c->loop, &c->console_call);
}

/* The guest's output wakes this thread only while somebody reads it. */
static void update_watcher(struct control *c)
{
    struct history *h = history_of(c);

    if (h)
        history_set_watcher(h, c->attached || c->keeper ? console_changed : NULL, c);
}

/* ---- Clients. ---- */

static void detach(struct attach *a)
{
    struct control *c = a->control;

    loop_fd_remove(a->watch);
    *a->prev_next = a->next;
    if (a->next)
        a->next->prev_next = a->prev_next;
    MHD_upgrade_action(a->upgrade, MHD_UPGRADE_ACTION_CLOSE);
    free(a);
    update_watcher(c);
}

/* Sends what there is. false: the client is gone. */
static bool pump_out(struct attach *a)
{
    struct history *h = history_of(a->control);

    for (;;) {
        if (a->out_from == a->out_to) {
            a->out_from = 0;
            a->out_to = history_read(h, &a->at, a->out, sizeof(a->out));
            if (!a->out_to)
                return true;
        }
        ssize_t n = send(a->fd, a->out + a->out_from, a->out_to - a->out_from, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0)
            return errno == EAGAIN || errno == EINTR;
        a->out_from += (size_t)n;
    }
}

/* Types what the client sent. false: the client is gone. */
static bool pump_in(struct attach *a, bool readable)
{
    if (!a->in_len && readable) {
        ssize_t n = recv(a->fd, a->in, sizeof(a->in), MSG_DONTWAIT);
        if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
            return false;
        a->in_len = n > 0 ? (size_t)n : 0;
    }
    if (a->in_len) {
        size_t taken = console_feed(vm_console(a->control->vm), a->in, a->in_len);
        a->in_len -= taken;
        memmove(a->in, a->in + taken, a->in_len);
    }
    return true;
}

static void pump(struct attach *a, bool readable)
{
    if (!pump_out(a) || !pump_in(a, readable)) {
        detach(a);
        return;
    }
    loop_fd_set_events(a->watch,
                       (short)((a->in_len ? 0 : POLLIN) | (a->out_from < a->out_to ? POLLOUT : 0)));
}

static void on_attached(void *opaque, int fd, short revents)
{
    struct attach *a = opaque;

    /* While input waits for the guest, only a hang-up is of interest. */
    if ((revents & (POLLHUP | POLLERR)) && !(revents & POLLIN))
        detach(a);
    else
        pump(a, revents & POLLIN);
}

/* libmicrohttpd has sent the head of the answer; the socket is ours until MHD_UPGRADE_ACTION_CLOSE. */
static void upgraded(void *opaque, struct MHD_Connection *http, void *state, const char *extra, size_t extra_len,
                     MHD_socket sock, struct MHD_UpgradeResponseHandle *urh)
{
    struct attach *a = opaque;
    struct control *c = a->control;

    a->upgrade = urh;
    a->fd = sock;
    a->next = c->attached;
    a->prev_next = &c->attached;
    if (a->next)
        a->next->prev_next = &a->next;
    c->attached = a;
    a->in_len = MIN(extra_len, sizeof(a->in));
    memcpy(a->in, extra, a->in_len);
    a->watch = loop_fd_add(c->loop, sock, POLLIN, on_attached, a);
    if (!a->watch) {
        detach(a);
        return;
    }
    update_watcher(c);
    pump(a, false);
}

enum MHD_Result attach_upgrade(struct control *c, struct MHD_Connection *http, const json_t *args)
{
    const char *upgrade = MHD_lookup_connection_value(http, MHD_HEADER_KIND, "Upgrade");
    struct control_request r = {.control = c, .vm = c->vm, .args = args};
    struct history *h = history_of(c);
    uint64_t lines = 0;
    json_t *answer = NULL;
    char replay[24];

    int status = control_arg_uint(&r, "history", 0, UINT64_MAX, &lines, &answer);
    if (!status && !h)
        status = control_refuse(&answer, 409, "the machine has no console (--console none)");
    if (!status && (!upgrade || strcasecmp(upgrade, PROTOCOL) != 0))
        status = control_refuse(&answer, 426, "ask with the headers Connection: Upgrade and Upgrade: " PROTOCOL);
    if (status)
        return http_answer(http, (unsigned)status, answer, NULL);
    struct attach *a = calloc(1, sizeof(*a));
    struct MHD_Response *response = a ? MHD_create_response_for_upgrade(upgraded, a) : NULL;
    if (!response) {
        free(a);
        return MHD_NO;
    }
    a->control = c;
    a->at = history_lines(h, lines);
    snprintf(replay, sizeof(replay), "%llu", (unsigned long long)(history_end(h) - a->at));
    MHD_add_response_header(response, "Upgrade", PROTOCOL);
    /* So many bytes were written before; a terminal must not answer the questions in them again. */
    MHD_add_response_header(response, "Replay", replay);
    enum MHD_Result result = MHD_queue_response(http, MHD_HTTP_SWITCHING_PROTOCOLS, response);
    MHD_destroy_response(response);
    if (result != MHD_YES)
        free(a);
    return result;
}

/* ---- The file. ---- */

static int open_file(const char *path)
{
    return open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW | O_NOCTTY, 0600);
}

int keeper_open(struct control *c)
{
    char other[4096];

    if (!c->console_path || !history_of(c))
        return 0;
    struct keeper *k = calloc(1, sizeof(*k));
    if (!k) {
        log_error("out of memory");
        return -ENOMEM;
    }
    /* The run before this one is what people look for after a restart. */
    snprintf(other, sizeof(other), "%s.old", c->console_path);
    rename(c->console_path, other);
    snprintf(other, sizeof(other), "%s.1", c->console_path);
    unlink(other);
    k->fd = open_file(c->console_path);
    if (k->fd < 0) {
        int err = errno;
        log_error("cannot keep the console in %s: %s", c->console_path, strerror(err));
        free(k);
        return -err;
    }
    c->keeper = k;
    update_watcher(c);
    loop_schedule(c->loop, &c->console_call);
    return 0;
}

static void keeper_failed(struct control *c, int err)
{
    log_warn("cannot keep the console in %s: %s; it goes on without", c->console_path, strerror(err));
    c->keeper->broken = true;
}

/* A guest that prints without end must not fill the disk. */
static void rotate(struct control *c)
{
    struct keeper *k = c->keeper;
    char older[4096];

    snprintf(older, sizeof(older), "%s.1", c->console_path);
    int fd = rename(c->console_path, older) < 0 ? -1 : open_file(c->console_path);
    if (fd < 0) {
        keeper_failed(c, errno);
        return;
    }
    close(k->fd);
    k->fd = fd;
    k->size = 0;
}

static void keep(struct control *c)
{
    struct keeper *k = c->keeper;
    char buf[16384];
    size_t n;

    while (!k->broken && (n = history_read(history_of(c), &k->at, buf, sizeof(buf)))) {
        for (size_t done = 0; done < n && !k->broken;) {
            ssize_t r = write(k->fd, buf + done, n - done);
            if (r > 0)
                done += (size_t)r;
            else if (r < 0 && errno != EINTR)
                keeper_failed(c, errno);
        }
        k->size += n;
        if (k->size >= KEEPER_LIMIT && !k->broken)
            rotate(c);
    }
}

void keeper_flush(struct control *c)
{
    if (c->keeper)
        keep(c);
}

void keeper_close(struct control *c)
{
    if (!c->keeper)
        return;
    keep(c);
    close(c->keeper->fd);
    free(c->keeper);
    c->keeper = NULL;
    update_watcher(c);
}

/* ---- Both. ---- */

void attach_wake(struct control *c)
{
    if (c->keeper)
        keep(c);
    for (struct attach *a = c->attached, *next; a; a = next) {
        next = a->next;
        pump(a, false);
    }
}

bool attach_done(struct control *c)
{
    for (struct attach *a = c->attached; a; a = a->next)
        if (a->out_from < a->out_to || a->at < history_end(history_of(c)))
            return false;
    return true;
}

void attach_close_all(struct control *c)
{
    while (c->attached)
        detach(c->attached);
}

/* ---- For single requests. ---- */

static int get_log(struct control_request *r, json_t **answer)
{
    struct history *h = history_of(r->control);
    uint64_t lines = UINT64_MAX;
    int status = control_arg_uint(r, "lines", 0, UINT64_MAX, &lines, answer);

    if (!status && !h)
        status = control_refuse(answer, 409, "the machine has no console (--console none)");
    if (status)
        return status;
    uint64_t at = history_lines(h, lines);
    size_t len = (size_t)(history_end(h) - at);
    char *text = malloc(len + 1);
    if (!text)
        return control_refuse(answer, 500, "out of memory");
    len = history_read(h, &at, text, len);
    *answer = json_stringn_nocheck(text, len);
    free(text);
    return *answer ? 200 : 500;
}

static int post_input(struct control_request *r, json_t **answer)
{
    struct console *console = vm_console(r->vm);
    const char *text = NULL;
    int status = control_arg_string(r, "text", &text, answer);

    if (!status && !text)
        status = control_refuse(answer, 400, "\"text\" is missing: what is to be typed");
    if (!status && !history_of(r->control))
        status = control_refuse(answer, 409, "the machine has no console (--console none)");
    if (status)
        return status;
    size_t taken = console_feed(console, text, strlen(text));
    *answer = json_pack("{s:I}", "taken", (json_int_t)taken);
    return taken == strlen(text) ? 200
                                 : control_refuse(answer, 503, "the guest takes no input; %zu bytes of it were taken", taken);
}

const struct control_route control_console_routes[] = {
    {"GET", "/v1/console", "history", ROUTE_CONSOLE, NULL, NULL},
    {"GET", "/v1/console/log", "lines", ROUTE_QUICK, get_log, "text/plain; charset=utf-8"},
    {"POST", "/v1/console/input", "text", ROUTE_QUICK, post_input, NULL},
    {0},
};
