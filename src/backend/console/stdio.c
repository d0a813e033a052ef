/*
 * The console on standard input and output; on a terminal it is in raw mode while the machine runs.
 *
 * Standard output is usually shared (with the shell, with standard error), and O_NONBLOCK belongs
 * to what is shared. So terminals and pipes are opened anew through /proc for a file description of
 * our own; what cannot be opened so is used with care (console_io).
 *
 * The terminal is put back by console_close(), at exit(), and by the signals that end a process,
 * unless somebody handles those already. The saved settings are process-wide: there is one
 * terminal.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <termios.h>
#include <unistd.h>

#include "backend/console/console_impl.h"
#include "base/log.h"
#include "base/util.h"

static struct termios saved_termios;
static volatile sig_atomic_t raw_fd = -1; /* the terminal to be put back, -1: none */
static volatile sig_atomic_t resize_event_fd = -1;

/* Async-signal-safe. */
static void restore_terminal(void)
{
    int fd = raw_fd;
    if (fd < 0)
        return;
    raw_fd = -1;
    tcsetattr(fd, TCSANOW, &saved_termios);
}

static void ending_signal(int sig)
{
    restore_terminal();
    /* The handler was reset to the default (SA_RESETHAND): this ends the process when we return. */
    raise(sig);
}

static void window_changed(int sig)
{
    int saved = errno;
    uint64_t one = 1;
    int fd = resize_event_fd;
    if (fd >= 0 && write(fd, &one, sizeof(one)) < 0) {
        /* It counts already: nothing to do. */
    }
    errno = saved;
}

static void handle_signals(void)
{
    static const int ending[] = {SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGABRT,
                                 SIGSEGV, SIGBUS, SIGILL, SIGFPE};
    struct sigaction act = {.sa_handler = ending_signal,
                            .sa_flags = (int)(SA_RESETHAND | SA_ONSTACK)};
    sigfillset(&act.sa_mask);
    for (unsigned i = 0; i < ARRAY_SIZE(ending); i++) {
        struct sigaction old;
        if (sigaction(ending[i], NULL, &old) == 0 && !(old.sa_flags & SA_SIGINFO) &&
            old.sa_handler == SIG_DFL)
            sigaction(ending[i], &act, NULL);
    }
}

static int make_raw(int fd)
{
    static bool registered;
    if (tcgetattr(fd, &saved_termios) < 0)
        return -errno;
    if (!registered) {
        atexit(restore_terminal);
        at_quick_exit(restore_terminal);
        registered = true;
    }
    raw_fd = fd;
    handle_signals();
    struct termios raw = saved_termios;
    cfmakeraw(&raw);
    if (tcsetattr(fd, TCSAFLUSH, &raw) < 0) {
        int err = errno;
        raw_fd = -1;
        return -err;
    }
    if (isatty(STDERR_FILENO))
        log_set_raw_terminal(true);
    return 0;
}

static void resize_ready(void *opaque, int fd, short revents)
{
    struct console *c = opaque;
    uint64_t count;
    if (read(fd, &count, sizeof(count)) == (ssize_t)sizeof(count) && c->resized)
        c->resized(c->resized_opaque);
}

static void watch_size(struct console *c)
{
    c->resize_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (c->resize_fd < 0)
        return;
    c->resize_watch = loop_fd_add(c->loop, c->resize_fd, POLLIN, resize_ready, c);
    resize_event_fd = c->resize_fd;
    struct sigaction act = {.sa_handler = window_changed, .sa_flags = SA_RESTART};
    sigaction(SIGWINCH, &act, NULL);
}

/* A descriptor of our own for fd, and how it may be used. */
static int own_fd(int fd, int mode, enum console_io *io)
{
    struct stat st;
    *io = CONSOLE_IO_PLAIN;
    if (fstat(fd, &st) < 0)
        return -errno;
    /* Nobody is there, so nobody holds the guest back: a detached machine's history is what counts. */
    if (S_ISCHR(st.st_mode) && st.st_rdev == makedev(1, 3))
        return -EBADF;
    if (S_ISCHR(st.st_mode) || S_ISFIFO(st.st_mode)) {
        char path[32];
        snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
        int own = open(path, mode | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
        if (own >= 0)
            return own;
        *io = CONSOLE_IO_POLL;
    } else if (S_ISSOCK(st.st_mode)) {
        *io = CONSOLE_IO_SOCKET;
    }
    int own = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    return own < 0 ? -errno : own;
}

bool console_size(const struct console *c, unsigned *columns, unsigned *rows)
{
    struct winsize ws;
    if (!c->in_terminal || ioctl(c->in_fd, TIOCGWINSZ, &ws) < 0 || !ws.ws_col || !ws.ws_row)
        return false;
    *columns = ws.ws_col;
    *rows = ws.ws_row;
    return true;
}

static void stdio_close(struct console *c)
{
    if (c->in_terminal) {
        restore_terminal();
        log_set_raw_terminal(false);
    }
    if (c->resize_fd >= 0) {
        resize_event_fd = -1;
        loop_fd_remove(c->resize_watch);
        c->resize_watch = NULL;
        close(c->resize_fd);
        c->resize_fd = -1;
    }
}

static const struct console_kind stdio_kind = {.name = "stdio", .close = stdio_close};

int console_stdio_open(struct console *c)
{
    c->kind = &stdio_kind;
    enum console_io in_io, out_io;
    /* Closed standard descriptors are like /dev/null. */
    int in = own_fd(STDIN_FILENO, O_RDONLY, &in_io);
    int out = own_fd(STDOUT_FILENO, O_WRONLY, &out_io);
    if (in < 0 && in != -EBADF)
        log_warn("console stdio: cannot use standard input: %s", strerror(-in));
    if (out < 0 && out != -EBADF)
        log_warn("console stdio: cannot use standard output: %s", strerror(-out));
    if (in >= 0 && isatty(STDIN_FILENO)) {
        int ret = make_raw(STDIN_FILENO);
        if (ret)
            log_warn("console stdio: cannot set the terminal to raw mode: %s", strerror(-ret));
        else
            c->in_terminal = true;
    }
    int ret = console_attach(c, in < 0 ? -1 : in, in_io, out < 0 ? -1 : out, out_io);
    if (ret == 0 && c->in_terminal)
        watch_size(c);
    return ret;
}
