/*
 * The control server's thread: its loop, who may connect, and how long.
 *
 * libmicrohttpd does HTTP, driven from here through its epoll descriptor. Connections are accepted here: only the
 * user's own processes (and root's) get in, each carries one request, and one that does not get its request
 * across in time is cut off. With too many there, others wait in the socket's backlog.
 */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"
#include "vm/config.h"
#include "vm/control/server.h"
#include "vm/vm.h"

#define TICK_NS            500000000L
#define CLOSING_PATIENCE_NS 2000000000u

uint64_t control_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---- Time. ---- */

static void set_ticks(struct control *c, bool on)
{
    struct itimerspec every = {0};

    if (on)
        every.it_interval.tv_nsec = every.it_value.tv_nsec = TICK_NS;
    timerfd_settime(c->tick_fd, 0, &every, NULL);
    c->ticking = on;
}

void control_need_ticks(struct control *c)
{
    if (!c->ticking)
        set_ticks(c, true);
}

static bool hung_up(int fd)
{
    struct pollfd p = {.fd = fd, .events = 0};
    return poll(&p, 1, 0) > 0 && (p.revents & (POLLHUP | POLLERR | POLLNVAL));
}

static void set_accepting(struct control *c, bool on)
{
    loop_fd_set_events(c->listen_watch, on ? POLLIN : 0);
}

static void on_tick(void *opaque, int fd, short revents)
{
    struct control *c = opaque;
    uint64_t count, now = control_now_ns();

    if (read(fd, &count, sizeof(count)) < 0)
        return;
    for (struct connection *conn = c->connections; conn; conn = conn->next) {
        if (conn->deadline_ns && now >= conn->deadline_ns)
            shutdown(conn->fd, SHUT_RDWR); /* libmicrohttpd sees the end and closes */
        else if (http_waits(conn) && hung_up(conn->fd))
            http_gone(conn);
    }
    if (c->stop_deadline_ns && now >= c->stop_deadline_ns) {
        c->stop_deadline_ns = 0;
        log_warn("the guest has not powered off in the time it was given: cutting it off");
        vm_end(c->vm, VM_STATUS_USER);
    }
    if (c->connection_count < CONTROL_MAX_CONNECTIONS && !c->closing)
        set_accepting(c, true);
    if (!c->connections && !c->stop_deadline_ns && !c->closing)
        set_ticks(c, false);
}

/* ---- Connections. ---- */

static bool may_connect(int fd)
{
    struct ucred peer;
    socklen_t len = sizeof(peer);

    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &len) < 0)
        return false;
    return peer.uid == geteuid() || peer.uid == 0;
}

static void on_client(void *opaque, int fd, short revents)
{
    struct control *c = opaque;
    const struct sockaddr_un addr = {.sun_family = AF_UNIX};
    int client = accept4(fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

    if (client < 0) {
        /* Out of descriptors: the client waits until the next tick. */
        if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS) {
            set_accepting(c, false);
            control_need_ticks(c);
        }
        return;
    }
    if (!may_connect(client)) {
        log_warn("control socket: a process of another user was turned away");
        close(client);
        return;
    }
    MHD_add_connection(c->http, client, (const struct sockaddr *)&addr, sizeof(addr));
}

/* libmicrohttpd's: a connection begins or ends. */
static void on_connection(void *opaque, struct MHD_Connection *http, void **context,
                          enum MHD_ConnectionNotificationCode what)
{
    struct control *c = opaque;
    struct connection *conn = *context;

    if (what == MHD_CONNECTION_NOTIFY_STARTED) {
        conn = calloc(1, sizeof(*conn));
        *context = conn;
        if (!conn)
            return; /* http_access() sees that */
        conn->control = c;
        conn->http = http;
        conn->fd = MHD_get_connection_info(http, MHD_CONNECTION_INFO_CONNECTION_FD)->connect_fd;
        conn->deadline_ns = control_now_ns() + CONTROL_REQUEST_NS;
        conn->next = c->connections;
        conn->prev_next = &c->connections;
        if (conn->next)
            conn->next->prev_next = &conn->next;
        c->connections = conn;
        if (++c->connection_count >= CONTROL_MAX_CONNECTIONS)
            set_accepting(c, false);
        control_need_ticks(c);
    } else if (conn) {
        *conn->prev_next = conn->next;
        if (conn->next)
            conn->next->prev_next = conn->prev_next;
        c->connection_count--;
        free(conn);
        if (!c->closing)
            set_accepting(c, true);
    }
}

/* ---- libmicrohttpd in the loop. ---- */

static void http_prepare(void *opaque, int *timeout_ms)
{
    struct control *c = opaque;
    MHD_UNSIGNED_LONG_LONG ms;

    if (MHD_get_timeout(c->http, &ms) == MHD_YES && (*timeout_ms < 0 || ms < (unsigned)*timeout_ms))
        *timeout_ms = (int)MIN(ms, 60000u);
}

static void http_dispatch(void *opaque)
{
    struct control *c = opaque;

    MHD_run(c->http);
    if (!c->closing)
        return;
    /* Readers get what there is, but not for ever. */
    if (c->closing_deadline_ns == 0) {
        c->closing_deadline_ns = control_now_ns() + CLOSING_PATIENCE_NS;
        control_need_ticks(c);
        set_accepting(c, false);
        /* Who has not asked by now does not get an answer. */
        for (struct connection *conn = c->connections; conn; conn = conn->next)
            if (conn->deadline_ns)
                shutdown(conn->fd, SHUT_RDWR);
        http_wake(c);
    }
    attach_wake(c);
    if (attach_done(c))
        attach_close_all(c);
    if (!c->connections || control_now_ns() >= c->closing_deadline_ns)
        loop_stop(c->loop);
}

/* The epoll descriptor only has to end the wait: http_dispatch() runs after each. */
static void http_ready(void *opaque, int fd, short revents) {}

static void woken(void *opaque)
{
    http_wake(opaque);
}

static void console_woken(void *opaque)
{
    attach_wake(opaque);
}

/* A name with a NUL in it would be taken for what stands before that: such an escape stays one. */
static size_t unescape(void *opaque, struct MHD_Connection *http, char *text)
{
    return strstr(text, "%00") ? strlen(text) : MHD_http_unescape(text);
}

static void http_log(void *opaque, const char *fmt, va_list ap)
{
    char text[256];

    /* Mostly about clients that do not speak HTTP: of interest to who writes one. */
    if (!log_enabled(LOG_DEBUG))
        return;
    vsnprintf(text, sizeof(text), fmt, ap);
    text[strcspn(text, "\n")] = 0;
    log_debug("control socket: %s", text);
}

/* ---- Life. ---- */

int control_open(const struct vm_config *config, struct control **out)
{
    struct control *c = calloc(1, sizeof(*c));
    int err = -ENOMEM;

    *out = NULL;
    if (!c) {
        log_error("out of memory");
        return err;
    }
    c->config = config;
    c->tick_fd = -1;
    c->claim = (struct registry_claim){.lock_fd = -1, .listen_fd = -1};
    c->wake = (struct loop_call){.fn = woken, .opaque = c};
    c->console_call = (struct loop_call){.fn = console_woken, .opaque = c};
    c->events = events_create();
    if (!c->events) {
        log_error("out of memory");
        goto out;
    }
    err = registry_claim(config->name, &c->claim);
    if (err)
        goto out;
    *out = c;
    return 0;
out:
    control_destroy(c);
    return err;
}

int control_keep_console(struct control *c, const char *path)
{
    c->console_path = strdup(path);
    if (c->console_path)
        return 0;
    log_error("out of memory");
    return -ENOMEM;
}

/* A job has ended; in its thread. */
static void job_ended(void *opaque)
{
    struct control *c = opaque;
    loop_schedule(c->loop, &c->wake);
}

static int start_http(struct control *c)
{
    c->http = MHD_start_daemon(
        MHD_USE_EPOLL | MHD_USE_NO_LISTEN_SOCKET | MHD_ALLOW_SUSPEND_RESUME | MHD_ALLOW_UPGRADE | MHD_USE_ERROR_LOG,
        0, NULL, NULL, http_access, c, MHD_OPTION_EXTERNAL_LOGGER, http_log, c, MHD_OPTION_NOTIFY_COMPLETED,
        http_completed, c, MHD_OPTION_UNESCAPE_CALLBACK, unescape, c, MHD_OPTION_NOTIFY_CONNECTION, on_connection, c, MHD_OPTION_CONNECTION_LIMIT,
        CONTROL_MAX_CONNECTIONS, MHD_OPTION_CONNECTION_TIMEOUT, CONTROL_IDLE_S, MHD_OPTION_CONNECTION_MEMORY_LIMIT,
        (size_t)CONTROL_MAX_HEADER, MHD_OPTION_STRICT_FOR_CLIENT, 1, MHD_OPTION_END);
    if (!c->http) {
        log_error("cannot start the control socket's HTTP server: %s", strerror(errno));
        return -EIO;
    }
    int fd = MHD_get_daemon_info(c->http, MHD_DAEMON_INFO_EPOLL_FD)->epoll_fd;
    c->http_hook = (struct loop_hook){.prepare = http_prepare, .dispatch = http_dispatch, .opaque = c};
    loop_hook_add(c->loop, &c->http_hook);
    c->http_watch = loop_fd_add(c->loop, fd, POLLIN, http_ready, c);
    c->listen_watch = loop_fd_add(c->loop, c->claim.listen_fd, POLLIN, on_client, c);
    return c->http_watch && c->listen_watch ? 0 : -ENOMEM;
}

static void *serve(void *opaque)
{
    struct control *c = opaque;

    pthread_setname_np(pthread_self(), "control");
    loop_run(c->loop);
    return NULL;
}

int control_serve(struct control *c, struct vm *vm)
{
    int err = -ENOMEM;

    c->vm = vm;
    /* Clients may go away while they are answered. */
    signal(SIGPIPE, SIG_IGN);
    c->loop = loop_create(NULL);
    if (!c->loop)
        return err;
    c->jobs = control_jobs_create(c, job_ended, c);
    c->tick_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    if (c->tick_fd >= 0)
        c->tick_watch = loop_fd_add(c->loop, c->tick_fd, POLLIN, on_tick, c);
    if (!c->jobs || !c->tick_watch) {
        log_error("no resources for the control socket");
        return err;
    }
    err = start_http(c);
    if (!err)
        err = keeper_open(c);
    if (err)
        return err;
    vm_set_observer(vm, control_observe, c);
    err = -pthread_create(&c->thread, NULL, serve, c);
    if (err)
        log_error("cannot start a thread for the control socket: %s", strerror(-err));
    c->serving = !err;
    return err;
}

void control_close(struct control *c)
{
    if (!c || c->closed)
        return;
    c->closed = true;
    if (c->jobs)
        control_jobs_stop(c->jobs);
    if (c->serving) {
        atomic_store(&c->closing, true);
        loop_schedule(c->loop, &c->wake);
        pthread_join(c->thread, NULL);
    }
    /* Not before: the server's thread may have ended the machine and be about to tell so. */
    if (c->vm)
        vm_set_observer(c->vm, NULL, NULL);
    if (c->loop)
        loop_fd_remove(c->listen_watch);
    registry_close_socket(&c->claim);
    if (c->loop) {
        attach_close_all(c);
        keeper_close(c);
        if (c->http) {
            loop_fd_remove(c->http_watch);
            loop_hook_remove(c->loop, &c->http_hook);
            c->closing = true;
            http_wake(c);
            MHD_run(c->http);
            MHD_stop_daemon(c->http);
        }
        loop_fd_remove(c->tick_watch);
        loop_cancel(c->loop, &c->wake);
        loop_cancel(c->loop, &c->console_call);
        loop_destroy(c->loop);
    }
    if (c->tick_fd >= 0)
        close(c->tick_fd);
    control_jobs_destroy(c->jobs);
    c->loop = NULL;
}

void control_destroy(struct control *c)
{
    if (!c)
        return;
    control_close(c);
    registry_release(&c->claim);
    events_destroy(c->events);
    free(c->console_path);
    free(c);
}

void control_event(struct control *c, const char *what, json_t *more)
{
    events_add(c->events, what, more);
    if (c->loop)
        loop_schedule(c->loop, &c->wake);
}
