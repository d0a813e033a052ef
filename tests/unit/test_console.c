/*
 * Consoles of each kind: bytes both ways, a slow or absent reader, Ctrl-], and the terminal as it
 * was.
 */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <pty.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <termios.h>

#include "backend/console/console.h"
#include "backend/console/history.h"
#include "base/log.h"
#include "base/util.h"
#include "loop_helper.h"

/* What the device got, and how much of it it wants to take. */
struct guest {
    struct loop *loop;
    struct console *c;
    char dir[64], path[96];
    char got[70000];
    size_t count, want, limit;
    unsigned escapes, writables, resizes;
};

static size_t guest_receive(void *opaque, const uint8_t *data, size_t len)
{
    struct guest *g = opaque;
    size_t n = MIN(len, g->limit - g->count);
    memcpy(g->got + g->count, data, n);
    g->count += n;
    return n;
}

static void guest_escape(void *opaque)
{
    ((struct guest *)opaque)->escapes++;
}

static void guest_writable(void *opaque)
{
    ((struct guest *)opaque)->writables++;
}

static void guest_resized(void *opaque)
{
    ((struct guest *)opaque)->resizes++;
}

static const struct console_ops ops = {guest_receive, NULL, guest_writable};

static bool got_enough(void *opaque)
{
    struct guest *g = opaque;
    return g->count >= g->want;
}

static bool has_escaped(void *opaque)
{
    return ((struct guest *)opaque)->escapes;
}

static bool is_writable_again(void *opaque)
{
    return ((struct guest *)opaque)->writables;
}

static bool is_resized(void *opaque)
{
    return ((struct guest *)opaque)->resizes;
}

static bool wait_input(struct guest *g, size_t want)
{
    g->want = want;
    return run_until(g->loop, got_enough, g, 10000);
}

static int setup(void **state)
{
    struct guest *g = calloc(1, sizeof(*g));
    g->limit = sizeof(g->got) - 1;
    g->loop = loop_create(NULL);
    snprintf(g->dir, sizeof(g->dir), "/tmp/ringfort-test-XXXXXX");
    if (!mkdtemp(g->dir))
        return -1;
    snprintf(g->path, sizeof(g->path), "%s/console", g->dir);
    *state = g;
    return 0;
}

static int teardown(void **state)
{
    struct guest *g = *state;
    console_close(g->c);
    loop_destroy(g->loop);
    unlink(g->path);
    rmdir(g->dir);
    free(g);
    return 0;
}

static void open_console(struct guest *g, const char *spec)
{
    assert_int_equal(console_open(g->loop, spec, &g->c), 0);
    console_connect(g->c, &ops, g);
    console_set_escape(g->c, guest_escape, g);
}

static void bad_specs_are_refused(void **state)
{
    struct guest *g = *state;
    static const char *const bad[] = {
        "", "stdi", "stdio:", "file", "file:", "unix:", "pty:", "none:", "tcp:5", "nonesuch"};
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
        assert_int_equal(console_open(g->loop, bad[i], &g->c), -EINVAL);
        assert_null(g->c);
    }
    assert_int_equal(console_open(g->loop, "file:/nonexistent/x", &g->c), -ENOENT);
    assert_int_equal(console_open(g->loop, "unix:/nonexistent/x", &g->c), -ENOENT);
    char spec[300] = "unix:/";
    memset(spec + 6, 'x', 200);
    assert_int_equal(console_open(g->loop, spec, &g->c), -ENAMETOOLONG);
}

static void none_takes_everything(void **state)
{
    struct guest *g = *state;
    open_console(g, "none");
    for (int i = 0; i < 100000; i++)
        console_write(g->c, "xxxx", 4);
    assert_true(console_can_write(g->c));
    console_kick(g->c);
}

static void count_up(void *opaque)
{
    ++*(unsigned *)opaque;
}

/* Everything written can be read by position, however late; a reader who is too slow loses the oldest. */
static void history_keeps_the_last_bytes(void **state)
{
    struct history *h = history_create();
    char buf[64];
    unsigned told = 0;
    uint64_t at = 0;
    history_set_watcher(h, count_up, &told);
    history_write(h, "one\ntwo\n", 8);
    assert_int_equal(told, 1);
    assert_int_equal(history_read(h, &at, buf, 4), 4);
    assert_memory_equal(buf, "one\n", 4);
    assert_int_equal(history_read(h, &at, buf, sizeof(buf)), 4);
    assert_memory_equal(buf, "two\n", 4);
    assert_int_equal(history_read(h, &at, buf, sizeof(buf)), 0);
    assert_int_equal(at, 8);

    assert_int_equal(history_lines(h, 0), 8);
    assert_int_equal(history_lines(h, 1), 4);
    assert_int_equal(history_lines(h, 2), 0);
    assert_int_equal(history_lines(h, 3), 0);
    history_write(h, "three", 5);
    assert_int_equal(history_lines(h, 1), 8);
    assert_int_equal(history_lines(h, 2), 4);

    /* Numbered lines of 8 bytes, across the end of the ring and more than once round. */
    const unsigned lines = 3 * HISTORY_SIZE / 8 + 5;
    for (unsigned i = 0; i < lines; i++) {
        snprintf(buf, sizeof(buf), "%07u\n", i % 10000000);
        history_write(h, buf, 8);
    }
    assert_int_equal(history_end(h), 13 + 8ull * lines);
    at = 0;
    assert_int_equal(history_read(h, &at, buf, 11), 11);
    assert_int_equal(at, history_end(h) - HISTORY_SIZE + 11);
    at = history_lines(h, 2);
    assert_int_equal(history_read(h, &at, buf, sizeof(buf)), 16);
    char expected[24];
    snprintf(expected, sizeof(expected), "%07u\n%07u\n", lines - 2, lines - 1);
    assert_memory_equal(buf, expected, 16);
    assert_int_equal(history_lines(h, UINT64_MAX), history_end(h) - HISTORY_SIZE);
    at = UINT64_MAX;
    assert_int_equal(history_read(h, &at, buf, sizeof(buf)), 0);
    assert_int_equal(at, history_end(h));
    history_set_watcher(h, NULL, NULL);
    history_touch(h);
    assert_int_equal(told, 2 + lines);
    history_destroy(h);
}

/* Output is in the history whether or not the host's end takes it; input comes from there and from others. */
static void others_read_and_type(void **state)
{
    struct guest *g = *state;
    char spec[128], buf[16];
    uint64_t at = 0;
    open_console(g, "none");
    assert_null(console_history(g->c));
    assert_int_equal(console_feed(g->c, "x", 1), 0);
    console_close(g->c);

    snprintf(spec, sizeof(spec), "file:%s", g->path);
    open_console(g, spec);
    struct history *h = console_history(g->c);
    unsigned told = 0;
    console_write(g->c, "login: ", 7);
    assert_int_equal(history_read(h, &at, buf, sizeof(buf)), 7);
    assert_memory_equal(buf, "login: ", 7);

    g->limit = g->count + 3; /* the guest takes three bytes, then none until it is kicked */
    g->want = g->count + 3;
    size_t begin = g->count, fed = 0, n;
    history_set_watcher(h, count_up, &told);
    while ((n = console_feed(g->c, "abcdefgh", 8)) == 8) {
        fed += n;
        run_until(g->loop, NULL, NULL, 0);
        assert_in_range(fed, 0, 40000);
    }
    fed += n;
    assert_int_equal(g->count, g->want);
    assert_int_equal(told, 0);
    g->limit = g->want = begin + fed;
    console_kick(g->c);
    assert_true(run_until(g->loop, got_enough, g, 10000));
    assert_int_not_equal(told, 0);
    for (size_t i = 0; i < fed; i++)
        assert_int_equal(g->got[begin + i], "abcdefgh"[i % 8]);
    history_set_watcher(h, NULL, NULL);
}

static void file_gets_all_output(void **state)
{
    struct guest *g = *state;
    char spec[128];
    snprintf(spec, sizeof(spec), "file:%s", g->path);
    open_console(g, spec);
    enum { LINES = 30000 };
    for (int i = 0; i < LINES; i++) {
        char line[16];
        int n = snprintf(line, sizeof(line), "%d\n", i);
        for (int k = 0; k < n; k++)
            console_write(g->c, line + k, 1);
    }
    console_close(g->c);
    g->c = NULL;
    FILE *f = fopen(g->path, "r");
    assert_non_null(f);
    int i, expect = 0;
    while (fscanf(f, "%d\n", &i) == 1)
        assert_int_equal(i, expect++);
    fclose(f);
    assert_int_equal(expect, LINES);
}

/* A guest that prints byte by byte, a byte per round of the loop. */
struct printer {
    struct guest *g;
    struct loop_call call;
    unsigned left;
};

static void print_one(void *opaque)
{
    struct printer *p = opaque;
    console_write(p->g->c, "x", 1);
    if (--p->left)
        loop_schedule(p->g->loop, &p->call);
}

static off_t size_of(const char *path)
{
    struct stat st;
    return stat(path, &st) == 0 ? st.st_size : -1;
}

enum { PRINTED = 5000 };

static bool all_is_printed(void *opaque)
{
    return size_of(((struct guest *)opaque)->path) == PRINTED;
}

/* write(2)s of this process so far; -1 where the kernel does not count them. */
static long writes_made(void)
{
    FILE *f = fopen("/proc/self/io", "r");
    char line[64];
    long n = -1;
    while (f && fgets(line, sizeof(line), f))
        sscanf(line, "syscw: %ld", &n);
    if (f)
        fclose(f);
    return n;
}

static void bytes_are_written_together(void **state)
{
    struct guest *g = *state;
    char spec[128];
    snprintf(spec, sizeof(spec), "file:%s", g->path);
    open_console(g, spec);
    struct printer p = {.g = g, .call = {.fn = print_one, .opaque = &p}, .left = PRINTED};
    long before = writes_made();
    loop_schedule(g->loop, &p.call);
    assert_true(run_until(g->loop, all_is_printed, g, 10000)); /* the last ones, too */
    assert_int_equal(p.left, 0);
    long made = writes_made() - before;
    if (before < 0)
        skip();
    assert_in_range(made, 1, PRINTED / 4);
}

/* Unix socket. */

static int connect_to(const char *path)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    strcpy(a.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct timeval limit = {.tv_sec = 10};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
    if (connect(fd, (struct sockaddr *)&a, sizeof(a))) {
        close(fd);
        return -errno;
    }
    return fd;
}

struct peer {
    int fd;
    char text[200000];
    size_t count, want;
};

static bool peer_got_enough(void *opaque)
{
    struct peer *p = opaque;
    ssize_t n;
    while ((n = recv(p->fd, p->text + p->count, sizeof(p->text) - p->count, MSG_DONTWAIT)) > 0)
        p->count += (size_t)n;
    return p->count >= p->want;
}

static void socket_serves_one_client_after_another(void **state)
{
    struct guest *g = *state;
    char spec[128];
    snprintf(spec, sizeof(spec), "unix:%s", g->path);
    open_console(g, spec);
    struct stat st;
    assert_int_equal(stat(g->path, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0600);

    /* What was said before anybody came is kept. */
    console_write(g->c, "boot\n", 5);
    struct peer *p = calloc(1, sizeof(*p));
    p->fd = connect_to(g->path);
    assert_true(p->fd >= 0);
    p->want = 5;
    assert_true(run_until(g->loop, peer_got_enough, p, 10000));
    assert_string_equal(p->text, "boot\n");
    assert_int_equal(write(p->fd, "login", 5), 5);
    assert_true(wait_input(g, 5));
    assert_string_equal(g->got, "login");
    /* Ctrl-] means nothing here. */
    assert_int_equal(write(p->fd, "\x1d!", 2), 2);
    assert_true(wait_input(g, 7));
    assert_int_equal(g->escapes, 0);

    /* A second one is told and sent away. */
    struct peer *second = calloc(1, sizeof(*second));
    second->fd = connect_to(g->path);
    assert_true(second->fd >= 0);
    second->want = 20;
    assert_true(run_until(g->loop, peer_got_enough, second, 10000));
    assert_non_null(strstr(second->text, "has a client"));
    close(second->fd);
    free(second);

    /* The first leaves, the next one comes. */
    close(p->fd);
    run_until(g->loop, NULL, NULL, 30);
    console_write(g->c, "again\n", 6);
    p->fd = connect_to(g->path);
    p->count = 0;
    p->want = 6;
    memset(p->text, 0, sizeof(p->text));
    assert_true(run_until(g->loop, peer_got_enough, p, 10000));
    assert_string_equal(p->text, "again\n");
    close(p->fd);
    free(p);

    /* Another machine may not take the path; a dead machine's socket may be replaced. */
    struct console *other;
    assert_int_equal(console_open(g->loop, spec, &other), -EADDRINUSE);
    console_close(g->c);
    g->c = NULL;
    assert_int_equal(access(g->path, F_OK), -1);
    int dead = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    strcpy(a.sun_path, g->path);
    assert_int_equal(bind(dead, (struct sockaddr *)&a, sizeof(a)), 0);
    close(dead);
    open_console(g, spec);
    console_close(g->c);
    g->c = NULL;
    int file = open(g->path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    close(file);
    assert_int_equal(console_open(g->loop, spec, &g->c), -EEXIST);
}

/* Without a reader the guest is never held up, and the newest output is what is kept. */
static void without_a_reader_the_oldest_is_dropped(void **state)
{
    struct guest *g = *state;
    char spec[128];
    snprintf(spec, sizeof(spec), "unix:%s", g->path);
    open_console(g, spec);
    char line[32];
    for (int i = 0; i < 50000; i++) {
        assert_true(console_can_write(g->c));
        console_write(g->c, line, (size_t)snprintf(line, sizeof(line), "line %d\n", i));
    }
    struct peer *p = calloc(1, sizeof(*p));
    p->fd = connect_to(g->path);
    p->want = 50000;
    assert_true(run_until(g->loop, peer_got_enough, p, 10000));
    run_until(g->loop, peer_got_enough, p, 20);
    assert_true(p->count <= 65536);
    assert_string_equal(p->text + p->count - 11, "line 49999\n");
    close(p->fd);
    free(p);
}

/* A reader that does not read: can_write() says so, and writable() comes when it reads. */
static void slow_reader_holds_the_writer(void **state)
{
    struct guest *g = *state;
    char spec[128];
    snprintf(spec, sizeof(spec), "unix:%s", g->path);
    open_console(g, spec);
    struct peer *p = calloc(1, sizeof(*p));
    p->fd = connect_to(g->path);
    int size = 4096;
    setsockopt(p->fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof(size));
    assert_int_equal(write(p->fd, "x", 1), 1);
    assert_true(wait_input(g, 1)); /* it is connected */
    size_t sent = 0;
    for (int i = 0; console_can_write(g->c); i++) {
        assert_true(i < 100000);
        char line[32];
        int n = snprintf(line, sizeof(line), "%d\n", i);
        console_write(g->c, line, (size_t)n);
        sent += (size_t)n;
        if (i % 1000 == 0)
            run_until(g->loop, NULL, NULL, 1);
    }
    run_until(g->loop, NULL, NULL, 30);
    assert_int_equal(g->writables, 0);
    p->want = sent;
    assert_true(run_until(g->loop, peer_got_enough, p, 10000));
    assert_true(run_until(g->loop, is_writable_again, g, 10000));
    assert_int_equal(g->writables, 1);
    assert_true(console_can_write(g->c));
    assert_int_equal(p->count, sent);
    char *at = p->text;
    for (long expect = 0; at < p->text + sent; expect++)
        assert_int_equal(strtol(at, &at, 10), expect), at++;
    close(p->fd);
    free(p);
}

/* Input that the device has no room for waits, in order, until it kicks. */
static void input_waits_for_the_device(void **state)
{
    struct guest *g = *state;
    char spec[128];
    snprintf(spec, sizeof(spec), "unix:%s", g->path);
    open_console(g, spec);
    int fd = connect_to(g->path);
    enum { N = 60000 };
    char *data = malloc(N);
    for (int i = 0; i < N; i++)
        data[i] = (char)('a' + i % 23);
    g->limit = 10;
    assert_int_equal(fcntl(fd, F_SETFL, O_NONBLOCK), 0);
    size_t sent = 0;
    while (g->count < N) {
        ssize_t r = write(fd, data + sent, N - sent);
        if (r > 0)
            sent += (size_t)r;
        assert_true(wait_input(g, g->limit));
        assert_int_equal(g->count, g->limit);
        g->limit = MIN(g->limit + 1500, N);
        console_kick(g->c);
    }
    assert_memory_equal(g->got, data, N);
    free(data);
    close(fd);
}

/* Pty. */

static char pty_name[64];

/* The slave's name is told on standard error. */
static void open_pty(struct guest *g)
{
    int p[2], saved = dup(STDERR_FILENO);
    assert_int_equal(pipe2(p, O_CLOEXEC), 0);
    dup2(p[1], STDERR_FILENO);
    log_set_level(LOG_WARN);
    open_console(g, "pty");
    log_set_level(-1);
    dup2(saved, STDERR_FILENO);
    close(saved);
    close(p[1]);
    char line[256] = "";
    assert_true(read(p[0], line, sizeof(line) - 1) > 0);
    close(p[0]);
    char *at = strstr(line, "/dev/pts/");
    assert_non_null(at);
    assert_int_equal(sscanf(at, "%63s", pty_name), 1);
}

static void pty_comes_and_goes(void **state)
{
    struct guest *g = *state;
    open_pty(g);
    console_write(g->c, "early\n", 6);
    run_until(g->loop, NULL, NULL, 30);
    for (int round = 0; round < 3; round++) {
        struct peer *p = calloc(1, sizeof(*p));
        int fd = open(pty_name, O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
        assert_true(fd >= 0);
        struct termios t;
        assert_int_equal(tcgetattr(fd, &t), 0);
        assert_int_equal(t.c_lflag & (ICANON | ECHO | ISIG), 0);
        assert_int_equal(t.c_oflag & OPOST, 0);
        char buf[64] = "";
        size_t n = 0;
        for (uint64_t end = test_now_ns() + 10000000000; n < 6 && test_now_ns() < end;) {
            run_until(g->loop, NULL, NULL, 10);
            ssize_t r = read(fd, buf + n, sizeof(buf) - 1 - n);
            n += r > 0 ? (size_t)r : 0;
        }
        assert_string_equal(buf, round ? "round\n" : "early\n");
        assert_int_equal(write(fd, "in\r\x1d", 4), 4);
        assert_true(wait_input(g, (size_t)(round + 1) * 4));
        assert_int_equal(g->escapes, 0);
        close(fd);
        free(p);
        run_until(g->loop, NULL, NULL, 30);
        console_write(g->c, "round\n", 6);
    }
    assert_string_equal(g->got, "in\r\x1din\r\x1din\r\x1d");
}

/* While nobody is there the loop sleeps but for a look now and then. */
static void abandoned_pty_does_not_spin(void **state)
{
    struct guest *g = *state;
    open_pty(g);
    int fd = open(pty_name, O_RDWR | O_NOCTTY | O_CLOEXEC);
    console_write(g->c, "x", 1);
    run_until(g->loop, NULL, NULL, 250);
    close(fd);
    struct rusage a, b;
    getrusage(RUSAGE_THREAD, &a);
    run_until(g->loop, NULL, NULL, 300);
    getrusage(RUSAGE_THREAD, &b);
    long us =
        (b.ru_utime.tv_sec - a.ru_utime.tv_sec + b.ru_stime.tv_sec - a.ru_stime.tv_sec) * 1000000 +
        b.ru_utime.tv_usec - a.ru_utime.tv_usec + b.ru_stime.tv_usec - a.ru_stime.tv_usec;
    assert_true(us < 100000);
}

/* Standard input and output. */

struct standard {
    int in, out; /* as they were */
};

static struct standard replace_standard(int in, int out)
{
    fflush(stdout);
    struct standard s = {dup(STDIN_FILENO), dup(STDOUT_FILENO)};
    dup2(in, STDIN_FILENO);
    dup2(out, STDOUT_FILENO);
    return s;
}

static void put_back(struct standard s)
{
    dup2(s.in, STDIN_FILENO);
    dup2(s.out, STDOUT_FILENO);
    close(s.in);
    close(s.out);
}

static void stdio_through_pipes(void **state)
{
    struct guest *g = *state;
    int in[2], out[2];
    assert_int_equal(pipe2(in, O_CLOEXEC), 0);
    assert_int_equal(pipe2(out, O_CLOEXEC), 0);
    struct standard s = replace_standard(in[0], out[1]);
    open_console(g, "stdio");
    ssize_t wrote = write(in[1], "yes\x1d\n", 5);
    bool arrived = wait_input(g, 5);
    console_write(g->c, "prompt> ", 8);
    run_until(g->loop, NULL, NULL, 20);
    int flags_in = fcntl(in[0], F_GETFL), flags_out = fcntl(out[1], F_GETFL);

    /* End of input: no more of it, and no spinning. */
    close(in[1]);
    struct rusage a, b;
    getrusage(RUSAGE_THREAD, &a);
    run_until(g->loop, NULL, NULL, 200);
    getrusage(RUSAGE_THREAD, &b);
    console_write(g->c, "bye", 3);
    console_close(g->c);
    g->c = NULL;
    put_back(s);

    assert_int_equal(wrote, 5);
    assert_true(arrived);
    assert_string_equal(g->got, "yes\x1d\n");
    assert_int_equal(g->escapes, 0);
    assert_int_equal((flags_in | flags_out) & O_NONBLOCK, 0);
    char text[32] = "";
    assert_int_equal(read(out[0], text, sizeof(text)), 11);
    assert_string_equal(text, "prompt> bye");
    assert_true(b.ru_utime.tv_sec * 1000000 + b.ru_utime.tv_usec -
                    (a.ru_utime.tv_sec * 1000000 + a.ru_utime.tv_usec) <
                80000);
    close(in[0]);
    close(out[0]);
    close(out[1]);
}

static void stdio_from_dev_null_and_to_a_file(void **state)
{
    struct guest *g = *state;
    int in = open("/dev/null", O_RDONLY | O_CLOEXEC);
    int out = open(g->path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    assert_int_equal(write(out, "before ", 7), 7);
    struct standard s = replace_standard(in, out);
    open_console(g, "stdio");
    run_until(g->loop, NULL, NULL, 30);
    console_write(g->c, "during ", 7);
    run_until(g->loop, NULL, NULL, 30);
    ssize_t n = write(out, "beside ", 7); /* somebody who shares the file offset */
    console_write(g->c, "end", 3);
    console_close(g->c);
    g->c = NULL;
    put_back(s);
    close(in);
    close(out);
    assert_int_equal(n, 7);
    char text[64] = "";
    in = open(g->path, O_RDONLY | O_CLOEXEC);
    assert_true(read(in, text, sizeof(text) - 1) > 0);
    close(in);
    assert_string_equal(text, "before during beside end");
}

static void reader_of_stdout_goes_away(void **state)
{
    struct guest *g = *state;
    int in = open("/dev/null", O_RDONLY | O_CLOEXEC), out[2];
    assert_int_equal(pipe2(out, O_CLOEXEC), 0);
    struct standard s = replace_standard(in, out[1]);
    open_console(g, "stdio");
    close(out[0]);
    bool writable = true;
    for (int i = 0; i < 100000; i++) {
        console_write(g->c, "text text\n", 10);
        if (i % 1000 == 0)
            run_until(g->loop, NULL, NULL, 1);
    }
    writable = console_can_write(g->c);
    console_close(g->c);
    g->c = NULL;
    put_back(s);
    close(in);
    close(out[1]);
    assert_true(writable);
}

static void terminal_is_raw_and_then_as_before(void **state)
{
    struct guest *g = *state;
    int master, slave;
    struct termios before, during, after;
    struct winsize ws = {.ws_row = 33, .ws_col = 101};
    assert_int_equal(openpty(&master, &slave, NULL, NULL, &ws), 0);
    assert_int_equal(tcgetattr(slave, &before), 0);
    assert_true(before.c_lflag & ICANON);
    struct standard s = replace_standard(slave, slave);
    open_console(g, "stdio");
    console_set_resized(g->c, guest_resized, g);
    tcgetattr(slave, &during);
    int flags = fcntl(slave, F_GETFL);
    unsigned columns = 0, rows = 0;
    bool has_size = console_size(g->c, &columns, &rows);

    /* Ctrl-C, Ctrl-Z, Ctrl-S are the guest's; Ctrl-] is ours. */
    g->limit = 5; /* and it works while the guest takes no input */
    ssize_t n = write(master, "a\x03\x1a\x13z\x1d more", 11);
    bool escaped = run_until(g->loop, has_escaped, g, 10000);
    g->limit = sizeof(g->got) - 1;
    console_kick(g->c);
    bool arrived = wait_input(g, 10);
    console_write(g->c, "out\n", 4);
    run_until(g->loop, NULL, NULL, 20);
    char text[16] = "";
    ssize_t m = read(master, text, sizeof(text) - 1);
    raise(SIGWINCH);
    bool resized = run_until(g->loop, is_resized, g, 10000);
    console_close(g->c);
    g->c = NULL;
    tcgetattr(slave, &after);
    put_back(s);
    close(slave);
    close(master);

    assert_int_equal(during.c_lflag & (ICANON | ECHO | ISIG), 0);
    assert_int_equal(during.c_oflag & OPOST, 0);
    assert_int_equal(flags & O_NONBLOCK, 0);
    assert_true(has_size);
    assert_int_equal(columns, 101);
    assert_int_equal(rows, 33);
    assert_int_equal(n, 11);
    assert_true(escaped);
    assert_true(arrived);
    assert_int_equal(g->escapes, 1);
    assert_string_equal(g->got, "a\x03\x1a\x13z more");
    assert_int_equal(m, 4);
    assert_string_equal(text, "out\n");
    assert_true(resized);
    assert_int_equal(after.c_lflag, before.c_lflag);
    assert_int_equal(after.c_iflag, before.c_iflag);
    assert_int_equal(after.c_oflag, before.c_oflag);
}

/* However the process ends, the terminal is put back. */
static void terminal_is_put_back_at_the_end(void **state)
{
    struct guest *g = *state;
    static const int ends[] = {0, SIGTERM, SIGINT, SIGHUP, SIGABRT, SIGSEGV};
    for (unsigned i = 0; i < ARRAY_SIZE(ends); i++) {
        int master, slave, ready[2];
        struct termios before, during, after;
        assert_int_equal(openpty(&master, &slave, NULL, NULL, NULL), 0);
        assert_int_equal(tcgetattr(slave, &before), 0);
        assert_int_equal(pipe(ready), 0);
        pid_t pid = fork();
        if (pid == 0) {
            struct rlimit none = {0, 0};
            setrlimit(RLIMIT_CORE, &none);
            for (unsigned k = 1; k < ARRAY_SIZE(ends); k++)
                signal(ends[k], SIG_DFL); /* a sanitizer's or the test's own */
            dup2(slave, STDIN_FILENO);
            dup2(slave, STDOUT_FILENO);
            struct console *c;
            if (console_open(g->loop, "stdio", &c) || write(ready[1], "x", 1) != 1)
                _exit(9);
            if (ends[i] == 0)
                exit(0);
            for (;;)
                pause();
        }
        close(ready[1]);
        char x;
        assert_int_equal(read(ready[0], &x, 1), 1);
        close(ready[0]);
        if (ends[i]) {
            assert_int_equal(tcgetattr(slave, &during), 0);
            assert_int_equal(during.c_lflag & ICANON, 0);
            assert_int_equal(kill(pid, ends[i]), 0);
        }
        int status;
        assert_int_equal(waitpid(pid, &status, 0), pid);
        if (ends[i]) {
            assert_true(WIFSIGNALED(status));
            assert_int_equal(WTERMSIG(status), ends[i]);
        }
        assert_int_equal(tcgetattr(slave, &after), 0);
        assert_int_equal(after.c_lflag, before.c_lflag);
        assert_int_equal(after.c_iflag, before.c_iflag);
        close(slave);
        close(master);
    }
}

int main(void)
{
    log_set_level(-1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(bad_specs_are_refused, setup, teardown),
        cmocka_unit_test_setup_teardown(none_takes_everything, setup, teardown),
        cmocka_unit_test(history_keeps_the_last_bytes),
        cmocka_unit_test_setup_teardown(others_read_and_type, setup, teardown),
        cmocka_unit_test_setup_teardown(file_gets_all_output, setup, teardown),
        cmocka_unit_test_setup_teardown(bytes_are_written_together, setup, teardown),
        cmocka_unit_test_setup_teardown(socket_serves_one_client_after_another, setup, teardown),
        cmocka_unit_test_setup_teardown(without_a_reader_the_oldest_is_dropped, setup, teardown),
        cmocka_unit_test_setup_teardown(slow_reader_holds_the_writer, setup, teardown),
        cmocka_unit_test_setup_teardown(input_waits_for_the_device, setup, teardown),
        cmocka_unit_test_setup_teardown(pty_comes_and_goes, setup, teardown),
        cmocka_unit_test_setup_teardown(abandoned_pty_does_not_spin, setup, teardown),
        cmocka_unit_test_setup_teardown(stdio_through_pipes, setup, teardown),
        cmocka_unit_test_setup_teardown(stdio_from_dev_null_and_to_a_file, setup, teardown),
        cmocka_unit_test_setup_teardown(reader_of_stdout_goes_away, setup, teardown),
        cmocka_unit_test_setup_teardown(terminal_is_raw_and_then_as_before, setup, teardown),
        cmocka_unit_test_setup_teardown(terminal_is_put_back_at_the_end, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
