/*
 * A console on a new pseudo-terminal.
 *
 * While nobody has its slave open, a master reports a hang-up without end and cannot tell by an
 * event when somebody comes. So it is looked at a few times a second then, and the core keeps the
 * latest output.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/timerfd.h>
#include <termios.h>
#include <unistd.h>

#include "backend/console/console_impl.h"
#include "base/log.h"

#define LOOK_INTERVAL_NS 100000000

static bool has_reader(int master)
{
    struct pollfd p = {.fd = master, .events = 0};
    return poll(&p, 1, 0) >= 0 && !(p.revents & POLLHUP);
}

static void set_timer(struct console *c, bool on)
{
    struct itimerspec its = {0};
    if (on)
        its.it_interval.tv_nsec = its.it_value.tv_nsec = LOOK_INTERVAL_NS;
    timerfd_settime(c->timer_fd, 0, &its, NULL);
}

/* listen_fd holds the master for good; the core gets duplicates of it while there is a reader. */
static void look(void *opaque, int fd, short revents)
{
    struct console *c = opaque;
    uint64_t count;
    if (read(fd, &count, sizeof(count)) < 0 || c->in_fd >= 0 || !has_reader(c->listen_fd))
        return;
    int in = fcntl(c->listen_fd, F_DUPFD_CLOEXEC, 3), out = fcntl(c->listen_fd, F_DUPFD_CLOEXEC, 3);
    if (in < 0 || out < 0) {
        if (in >= 0)
            close(in);
        if (out >= 0)
            close(out);
        return; /* out of descriptors: look again */
    }
    set_timer(c, false);
    console_attach(c, in, CONSOLE_IO_PLAIN, out, CONSOLE_IO_PLAIN);
}

static void pty_hangup(struct console *c)
{
    set_timer(c, true);
}

static const struct console_kind pty_kind = {
    .name = "pty", .reader_optional = true, .hangup = pty_hangup};

int console_pty_open(struct console *c)
{
    c->kind = &pty_kind;
    char name[128];
    int err = 0, slave = -1;
    c->listen_fd = posix_openpt(O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
    if (c->listen_fd < 0 || grantpt(c->listen_fd) < 0 || unlockpt(c->listen_fd) < 0)
        err = errno;
    else
        err = ptsname_r(c->listen_fd, name, sizeof(name));
    if (!err) {
        /* Raw from the start; that the slave was open once makes hang-ups visible. */
        struct termios t;
        slave = open(name, O_RDWR | O_NOCTTY | O_CLOEXEC);
        if (slave < 0 || tcgetattr(slave, &t) < 0) {
            err = errno;
        } else {
            cfmakeraw(&t);
            if (tcsetattr(slave, TCSANOW, &t) < 0)
                err = errno;
        }
        if (slave >= 0)
            close(slave);
    }
    if (!err) {
        c->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
        if (c->timer_fd < 0)
            err = errno;
    }
    if (err) {
        log_error("console pty: cannot make a pseudo-terminal: %s", strerror(err));
        return -err;
    }
    c->timer_watch = loop_fd_add(c->loop, c->timer_fd, POLLIN, look, c);
    if (!c->timer_watch)
        return -ENOMEM;
    set_timer(c, true);
    log_warn("the console is on %s", name);
    return 0;
}
