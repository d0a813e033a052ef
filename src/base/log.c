/*
 * Messages to the person who runs the machine: one formatted line, one write(2).
 *
 * Any thread. The settings are atomics or, for the machine's name, set before threads start.
 */
#include "base/log.h"

#include <errno.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/util.h"

static _Atomic int log_level = LOG_WARN;
static _Atomic bool log_raw, log_times;
static char log_machine[64];

void log_set_level(enum log_level level)
{
    atomic_store_explicit(&log_level, level, memory_order_relaxed);
}

bool log_enabled(enum log_level level)
{
    return (int)level <= atomic_load_explicit(&log_level, memory_order_relaxed);
}

void log_set_machine(const char *name)
{
    snprintf(log_machine, sizeof(log_machine), "%s", name ? name : "");
}

void log_set_raw_terminal(bool raw)
{
    atomic_store_explicit(&log_raw, raw, memory_order_relaxed);
}

void log_set_times(bool on)
{
    atomic_store_explicit(&log_times, on, memory_order_relaxed);
}

/* "2026-01-31T12:00:00.123Z ", or nothing. */
static size_t put_time(char *out, size_t room)
{
    struct timespec now;
    struct tm utc;
    if (!atomic_load_explicit(&log_times, memory_order_relaxed))
        return 0;
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &utc);
    size_t n = strftime(out, room, "%Y-%m-%dT%H:%M:%S", &utc);
    return n + (size_t)snprintf(out + n, room - n, ".%03ldZ ", now.tv_nsec / 1000000);
}

/* Text may quote what a guest or a file said: it must not steer the reader's terminal. */
static void make_printable(char *s, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (((unsigned char)s[i] < 0x20 && s[i] != '\t') || s[i] == 0x7f)
            s[i] = '?';
}

/* Standard error may share a terminal that somebody made non-blocking: wait a little for it, then
 * give up. */
static void write_line(const char *p, size_t n)
{
    while (n) {
        ssize_t r = write(STDERR_FILENO, p, n);
        if (r > 0) {
            p += r;
            n -= (size_t)r;
        } else if (r < 0 && errno == EAGAIN) {
            struct pollfd pfd = {.fd = STDERR_FILENO, .events = POLLOUT};
            if (poll(&pfd, 1, 100) <= 0)
                return;
        } else if (r == 0 || errno != EINTR) {
            return;
        }
    }
}

static _Thread_local struct {
    char *buf;
    size_t size;
    bool hold;
} keep;

void log_keep_error(char *buf, size_t size)
{
    keep.buf = buf;
    keep.size = size;
    keep.hold = false;
    if (buf)
        buf[0] = 0;
}

void log_hold_error(char *buf, size_t size)
{
    log_keep_error(buf, size);
    keep.hold = true;
}

void log_at(enum log_level level, const char *fmt, ...)
{
    if (level == LOG_ERROR && keep.buf && !keep.buf[0]) {
        va_list ap;
        va_start(ap, fmt);
        vsnprintf(keep.buf, keep.size, fmt, ap);
        va_end(ap);
        make_printable(keep.buf, strlen(keep.buf));
        if (keep.hold)
            return;
    }
    if (!log_enabled(level))
        return;

    int saved = errno;
    char line[2048];
    const size_t room = sizeof(line) - 2; /* for the line end */
    size_t n = put_time(line, room);
    n += (size_t)(log_machine[0] ? snprintf(line + n, room - n, "ringfort: %s: ", log_machine)
                                 : snprintf(line + n, room - n, "ringfort: "));

    va_list ap;
    va_start(ap, fmt);
    errno = saved; /* for %m */
    int len = vsnprintf(line + n, room - n, fmt, ap);
    va_end(ap);
    if (len > 0)
        n += MIN((size_t)len, room - n - 1);
    make_printable(line, n);
    if (atomic_load_explicit(&log_raw, memory_order_relaxed))
        line[n++] = '\r';
    line[n++] = '\n';
    write_line(line, n);
    errno = saved;
}
