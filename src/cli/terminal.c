/* Raw mode and the filter; see terminal.h. One terminal per process. */
#include "cli/terminal.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <termios.h>
#include <unistd.h>

#include "base/util.h"

#define ESC 0x1b
#define ENQ 0x05
#define BEL 0x07

/* ---- The filter: ECMA-48 §5.4 (CSI sequences), §5.6 (strings). ---- */

static size_t put_held(struct terminal_filter *f, char *out)
{
    size_t n = f->held_len;
    memcpy(out, f->held, n);
    f->held_len = 0;
    f->state = FILTER_TEXT;
    return n;
}

static void drop_held(struct terminal_filter *f, int state)
{
    f->held_len = 0;
    f->state = state;
}

/* Device status, device attributes, terminal parameters, window manipulation. */
static bool asks(char final) { return final == 'n' || final == 'c' || final == 'x' || final == 't'; }

static size_t filter_byte(struct terminal_filter *f, char c, char *out)
{
    switch (f->state) {
    case FILTER_TEXT:
        if (c == ESC) {
            f->held[0] = c;
            f->held_len = 1;
            f->state = FILTER_ESCAPE;
            return 0;
        }
        if (c == ENQ)
            return 0;
        *out = c;
        return 1;
    case FILTER_ESCAPE:
        f->held[f->held_len++] = c;
        if (c == '[')
            f->state = FILTER_CSI;
        else if (c == 'P' || c == ']' || c == '_' || c == '^' || c == 'X')
            drop_held(f, FILTER_STRING);
        else if (c == 'Z')
            drop_held(f, FILTER_TEXT);
        else
            return put_held(f, out);
        return 0;
    case FILTER_CSI:
        f->held[f->held_len++] = c;
        if (c >= 0x40 && c <= 0x7e && asks(c))
            drop_held(f, FILTER_TEXT);
        else if ((c >= 0x40 && c <= 0x7e) || f->held_len == sizeof(f->held))
            return put_held(f, out);
        return 0;
    case FILTER_STRING:
        if (c == BEL)
            f->state = FILTER_TEXT;
        else if (c == ESC)
            f->state = FILTER_STRING_ESCAPE;
        /* No string has a line's end: its own was lost. */
        if (c != '\n')
            return 0;
        f->state = FILTER_TEXT;
        *out = c;
        return 1;
    case FILTER_STRING_ESCAPE:
        f->state = c == '\\' ? FILTER_TEXT : FILTER_STRING;
        return 0;
    }
    return 0;
}

size_t terminal_filter(struct terminal_filter *f, const char *in, size_t len, char *out)
{
    size_t n = 0;
    for (size_t i = 0; i < len; i++)
        n += filter_byte(f, in[i], out + n);
    return n;
}

/* ---- Raw mode. ---- */

static struct termios saved;
static volatile sig_atomic_t raw_fd = -1;

/* Async-signal-safe. */
void terminal_restore(void)
{
    int fd = raw_fd;
    raw_fd = -1;
    if (fd >= 0)
        tcsetattr(fd, TCSANOW, &saved);
}

static void ending_signal(int sig)
{
    terminal_restore();
    raise(sig); /* its handler is the default again (SA_RESETHAND) */
}

bool terminal_raw(int fd, bool keys_only)
{
    static const int ending[] = {SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGABRT, SIGSEGV, SIGBUS};
    struct sigaction act = {.sa_handler = ending_signal, .sa_flags = (int)SA_RESETHAND};
    struct termios raw;

    if (!isatty(fd) || tcgetattr(fd, &saved) < 0)
        return false;
    raw = saved;
    if (keys_only)
        raw.c_lflag &= ~(tcflag_t)(ICANON | ECHO);
    else
        cfmakeraw(&raw);
    raw_fd = fd;
    atexit(terminal_restore);
    at_quick_exit(terminal_restore);
    for (unsigned i = 0; i < ARRAY_SIZE(ending); i++)
        sigaction(ending[i], &act, NULL);
    if (tcsetattr(fd, TCSAFLUSH, &raw) < 0) {
        raw_fd = -1;
        return false;
    }
    return true;
}
