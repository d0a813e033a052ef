/*
 * A console on a listening Unix stream socket, one client at a time.
 *
 * Who is connected owns the guest's console, so the socket is for the user alone (mode 0600).
 */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <fcntl.h>
#include <unistd.h>

#include "backend/console/console_impl.h"
#include "base/log.h"

static void client_waits(void *opaque, int fd, short revents)
{
    struct console *c = opaque;
    int in = accept4(fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (in < 0) {
        if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED) {
            /* The client stays in the queue and would wake us without end. */
            log_warn("console: cannot serve clients any more: %s", strerror(errno));
            loop_fd_remove(c->listen_watch);
            c->listen_watch = NULL;
        }
        return;
    }
    if (c->in_fd >= 0) {
        static const char busy[] = "ringfort: this console has a client already\r\n";
        send(in, busy, sizeof(busy) - 1, MSG_DONTWAIT | MSG_NOSIGNAL);
        close(in);
        return;
    }
    int out = fcntl(in, F_DUPFD_CLOEXEC, 3);
    if (out < 0) {
        log_warn("console: cannot serve a client: %s", strerror(errno));
        close(in);
        return;
    }
    console_attach(c, in, CONSOLE_IO_SOCKET, out, CONSOLE_IO_SOCKET);
}

static void unix_close(struct console *c)
{
    if (c->path)
        unlink(c->path);
}

static const struct console_kind unix_kind = {
    .name = "unix", .reader_optional = true, .close = unix_close};

/* A socket whose owner is gone may be replaced. 0: path is free now, or what is in the way. */
static int clear_path(const struct sockaddr_un *addr)
{
    struct stat st;
    if (lstat(addr->sun_path, &st) < 0)
        return errno == ENOENT ? 0 : -errno;
    if (!S_ISSOCK(st.st_mode))
        return -EEXIST;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -errno;
    int ret = connect(fd, (const struct sockaddr *)addr, sizeof(*addr)) == 0 ? -EADDRINUSE : -errno;
    close(fd);
    if (ret != -ECONNREFUSED)
        return ret;
    return unlink(addr->sun_path) < 0 ? -errno : 0;
}

int console_unix_open(struct console *c, const char *path)
{
    c->kind = &unix_kind;
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof(addr.sun_path)) {
        log_error("console socket %s: the path is longer than %zu characters", path,
                  sizeof(addr.sun_path) - 1);
        return -ENAMETOOLONG;
    }
    strcpy(addr.sun_path, path);
    int ret = clear_path(&addr);
    if (ret) {
        log_error("console socket %s: %s", path,
                  ret == -EADDRINUSE ? "another program listens there"
                  : ret == -EEXIST   ? "a file of that name exists and is no socket"
                                     : strerror(-ret));
        return ret;
    }
    c->listen_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    /* The mode of an unbound socket is the mode of the file that bind() makes. */
    if (c->listen_fd < 0 || fchmod(c->listen_fd, 0600) < 0 ||
        bind(c->listen_fd, (struct sockaddr *)&addr, sizeof(addr)) < 0) {
        ret = -errno;
        log_error("console socket %s: %s", path, strerror(-ret));
        return ret;
    }
    c->path = strdup(path);
    if (!c->path)
        return -ENOMEM;
    if (listen(c->listen_fd, 4) < 0) {
        ret = -errno;
        log_error("console socket %s: %s", path, strerror(-ret));
        return ret;
    }
    c->listen_watch = loop_fd_add(c->loop, c->listen_fd, POLLIN, client_waits, c);
    return c->listen_watch ? 0 : -ENOMEM;
}
