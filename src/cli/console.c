/*
 * `ringfort console`: the user's terminal on a machine's console, next to whoever else is there.
 *
 * What was printed before is shown first, so that the terminal's own scroll-back has it. Ctrl-] leaves;
 * everything else goes to the guest.
 */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"
#include "cli/cli.h"
#include "cli/client.h"
#include "cli/terminal.h"
#include "cli/verb.h"
#include "vm/vm.h"

#define ESCAPE_KEY    0x1d /* Ctrl-] */
#define HISTORY_LINES 1000u

static const char help[] =
    "Usage: ringfort console NAME [--history LINES] [-o text|json]\n\n"
    "Attaches the terminal to a machine's console. Ctrl-] leaves, and the machine goes on. Several may be\n"
    "attached at once; all see the same and all may type. Ctrl-C goes to the guest.\n\n"
    "  --history LINES      how many lines of what was printed before are shown first (default 1000)\n"
    "  -o, --output FORMAT  text (default); json only tells where the console is to be had\n"
    "  --help               show this text\n";

enum end { GOES_ON, LEFT, MACHINE_ENDED, OUTPUT_FAILED };

struct session {
    int fd;
    bool terminal; /* standard input is one, in raw mode */
    bool input;    /* standard input has not ended */
    size_t replay; /* bytes that are old */
    struct terminal_filter filter;
};

static bool write_all(int fd, const char *p, size_t n, bool is_socket)
{
    while (n) {
        ssize_t r = is_socket ? send(fd, p, n, MSG_NOSIGNAL) : write(fd, p, n);
        if (r < 0 && errno == EAGAIN) {
            struct pollfd wait = {.fd = fd, .events = POLLOUT};
            poll(&wait, 1, -1);
            continue;
        }
        if (r < 0 && errno != EINTR)
            return false;
        if (r > 0) {
            p += r;
            n -= (size_t)r;
        }
    }
    return true;
}

static enum end show(struct session *s)
{
    char in[16384], out[sizeof(in) + sizeof(s->filter.held)];
    ssize_t n = recv(s->fd, in, sizeof(in), 0);

    if (n < 0 && (errno == EINTR || errno == EAGAIN))
        return GOES_ON;
    if (n <= 0)
        return MACHINE_ENDED;
    size_t old = MIN((size_t)n, s->replay), len = terminal_filter(&s->filter, in, old, out);
    s->replay -= old;
    if (!write_all(STDOUT_FILENO, out, len, false) || !write_all(STDOUT_FILENO, in + old, (size_t)n - old, false))
        return OUTPUT_FAILED;
    return GOES_ON;
}

static enum end type(struct session *s)
{
    char buf[1024];
    ssize_t n = read(STDIN_FILENO, buf, sizeof(buf));

    if (n < 0 && (errno == EINTR || errno == EAGAIN))
        return GOES_ON;
    if (n <= 0) {
        /* A script's input has ended: what the guest says to it is still to come. */
        s->input = false;
        return s->terminal ? LEFT : GOES_ON;
    }
    const char *escape = s->terminal ? memchr(buf, ESCAPE_KEY, (size_t)n) : NULL;
    size_t len = escape ? (size_t)(escape - buf) : (size_t)n;
    if (!write_all(s->fd, buf, len, true))
        return MACHINE_ENDED;
    return escape ? LEFT : GOES_ON;
}

static enum end run(struct session *s)
{
    enum end end = GOES_ON;

    while (end == GOES_ON) {
        struct pollfd p[2] = {{.fd = s->fd, .events = POLLIN},
                              {.fd = s->input ? STDIN_FILENO : -1, .events = POLLIN}};
        if (poll(p, 2, -1) < 0 && errno != EINTR)
            return OUTPUT_FAILED;
        if (p[1].revents)
            end = type(s);
        if (end == GOES_ON && p[0].revents)
            end = show(s);
    }
    return end;
}

static int attach(const struct registry_entry *m, unsigned long lines)
{
    struct session s = {.input = true};
    int status = client_console(m, lines, &s.fd, &s.replay);

    if (status)
        return status;
    signal(SIGPIPE, SIG_IGN);
    if (isatty(STDIN_FILENO))
        fprintf(stderr, "ringfort: attached to %s; Ctrl-] leaves\n", m->name);
    s.terminal = terminal_raw(STDIN_FILENO, false);
    enum end end = run(&s);
    terminal_restore();
    close(s.fd);
    if (end == OUTPUT_FAILED) {
        log_error("cannot write to standard output: %s", strerror(errno));
        return VM_STATUS_BACKEND;
    }
    if (s.terminal)
        fprintf(stderr, "\nringfort: %s %s\n", end == LEFT ? "left" : "the machine has ended:", m->name);
    return 0;
}

int cli_console(char **args)
{
    struct verb_flag flags[] = {{.name = "--history", .form = "LINES"}, {0}};
    struct verb v = {
        .name = "console", .min_words = 1, .max_words = 1, .what = "NAME", .help = help, .flags = flags};
    struct registry_entry m;
    uint64_t lines = HISTORY_LINES;
    int status;

    if (!verb_parse(&v, args, &status))
        return status;
    status = verb_number(&v, &flags[0], 0, 100000000, &lines);
    if (!status)
        status = verb_machine(&v, &m);
    if (status)
        return status;
    if (v.json)
        return verb_print_json(json_pack("{s:s, s:s, s:s, s:s}", "name", m.name, "socket", m.socket, "path", "/v1/console",
                                         "upgrade", "ringfort-console"));
    return attach(&m, (unsigned long)lines);
}
