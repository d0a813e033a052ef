/*
 * Disks on an NBD server: nbdkit, which is killed, comes back, comes back smaller, or stays away.
 */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>

#include "backend/block/block.h"
#include "base/util.h"
#include "block_requests.h"
#include "log_capture.h"

#define DISK_SIZE MIB(8)
#define NO_NBDKIT 77

struct fixture {
    struct loop *loop;
    char dir[64], image[96], socket[96], uri[192];
    pid_t server;
};

static int setup(void **state)
{
    struct fixture *f = calloc(1, sizeof(*f));
    int fd;

    f->loop = loop_create(NULL);
    snprintf(f->dir, sizeof(f->dir), "/var/tmp/ringfort-nbd-XXXXXX");
    if (!mkdtemp(f->dir))
        return -1;
    snprintf(f->image, sizeof(f->image), "%s/disk.img", f->dir);
    snprintf(f->socket, sizeof(f->socket), "%s/nbd.sock", f->dir);
    snprintf(f->uri, sizeof(f->uri), "nbd+unix:///disk.img?socket=%s", f->socket);
    fd = open(f->image, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0 || ftruncate(fd, DISK_SIZE))
        return -1;
    close(fd);
    *state = f;
    return 0;
}

static void kill_server(struct fixture *f)
{
    if (f->server > 0) {
        kill(f->server, SIGKILL);
        waitpid(f->server, NULL, 0);
    }
    f->server = 0;
    unlink(f->socket);
}

static int teardown(void **state)
{
    struct fixture *f = *state;
    char command[128];

    kill_server(f);
    snprintf(command, sizeof(command), "rm -rf '%s'", f->dir);
    assert_int_equal(system(command), 0);
    loop_destroy(f->loop);
    free(f);
    return 0;
}

/* nbdkit serves the folder's files under their names; more: up to 6 further arguments, flags first. Returns when it takes connections. */
static void start_server(struct fixture *f, const char *const *more)
{
    const char *argv[20] = { "nbdkit", "-f", "--exit-with-parent", "-U", f->socket };
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    uint64_t until = test_now_ns() + 20000000000u;
    unsigned n = 5;
    int fd;

    while (more && *more && **more == '-')
        argv[n++] = *more++;
    argv[n++] = "file";
    argv[n++] = "dir=.";
    while (more && *more)
        argv[n++] = *more++;
    f->server = fork();
    if (f->server == 0) {
        /* What it says of clients that go away is nobody's concern. */
        if (chdir(f->dir) == 0 && freopen("/dev/null", "w", stderr))
            execvp(argv[0], (char **)argv);
        _exit(127);
    }
    snprintf(address.sun_path, sizeof(address.sun_path), "%s", f->socket);
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    while (connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0) {
        assert_true(test_now_ns() < until);
        assert_int_equal(waitpid(f->server, NULL, WNOHANG), 0);
        usleep(2000);
    }
    close(fd);
}

static int try_open(struct fixture *f, const struct block_options *how, struct block **out)
{
    struct block_options opt = *how;

    if (!opt.path)
        opt.path = f->uri;
    return block_open(f->loop, &opt, out);
}

static struct block *open_disk(struct fixture *f, unsigned reconnect_s)
{
    struct block *b;

    assert_int_equal(try_open(f, &(struct block_options){ .reconnect_s = reconnect_s }, &b), 0);
    return b;
}

/* ---- requests ---- */

/* buf in pieces that are multiples of 512 bytes and otherwise as they come. */
static void submit(struct block *b, struct request *q, enum block_op op, uint64_t offset, uint8_t *buf, uint64_t len, unsigned pieces)
{
    request_set(q, op, offset, buf, len);
    q->r.may_unmap = pieces & 1;
    q->r.iovcnt = 0;
    for (uint64_t at = 0; buf && at < len;) {
        uint64_t some = 512 + (uint64_t)(rand() % 40) * 512, n = q->r.iovcnt + 1 == pieces ? len - at : MIN(len - at, some);

        q->iov[q->r.iovcnt++] = (struct iovec){ buf + at, n };
        at += n;
    }
    block_submit(b, &q->r);
}

static int io(struct fixture *f, struct block *b, enum block_op op, uint64_t offset, uint8_t *buf, uint64_t len)
{
    struct request q;

    submit(b, &q, op, offset, buf, len, 1);
    return request_wait(f->loop, &q, 60000);
}

/* ---- tests ---- */

/*
 * Requests of all kinds at once, each in a part of the disk of its own, against a copy in memory; the server is killed
 * and started anew meanwhile, if asked for. At the end the server's file is that copy.
 */
static void random_requests(struct fixture *f, unsigned rounds, unsigned kills, const char *const *server)
{
    enum { LANES = 16 };
    const uint64_t lane = DISK_SIZE / LANES;
    uint8_t *mirror = calloc(1, DISK_SIZE), *buf = malloc(DISK_SIZE);
    struct request q[LANES];
    struct block *b;
    FILE *file;

    start_server(f, server);
    b = open_disk(f, 60);
    assert_int_equal(block_size(b), DISK_SIZE);
    for (unsigned round = 0; round < rounds; round++) {
        enum block_op op[LANES];
        uint64_t at[LANES], len[LANES];

        for (unsigned i = 0; i < LANES; i++) {
            uint64_t some = 512 + (uint64_t)(rand() % (int)(lane / 1024)) * 512;
            uint8_t *mine = buf + i * lane;

            op[i] = (enum block_op)(rand() % 5);
            at[i] = i * lane + (uint64_t)(rand() % (int)(lane / 1024)) * 512;
            len[i] = MIN(some, (i + 1) * lane - at[i]);
            if (op[i] == BLOCK_WRITE)
                for (uint64_t k = 0; k < len[i]; k++)
                    mine[k] = (uint8_t)(rand() >> 8);
            submit(b, &q[i], op[i], at[i], op[i] == BLOCK_READ || op[i] == BLOCK_WRITE ? mine : NULL, len[i], 1 + (unsigned)rand() % REQUEST_IOVS);
        }
        if (kills && round % (rounds / kills) == 1) {
            /* Some are with the server, some are not. */
            run_until(f->loop, NULL, NULL, (unsigned)rand() % 4);
            kill_server(f);
            run_until(f->loop, NULL, NULL, 20);
            start_server(f, server);
        }
        for (unsigned i = 0; i < LANES; i++) {
            assert_int_equal(request_wait(f->loop, &q[i], 60000), 0);
            if (op[i] == BLOCK_READ)
                assert_memory_equal(buf + i * lane, mirror + at[i], len[i]);
            else if (op[i] == BLOCK_WRITE)
                memcpy(mirror + at[i], buf + i * lane, len[i]);
            else if (op[i] == BLOCK_WRITE_ZEROES)
                memset(mirror + at[i], 0, len[i]);
            /* What discarded bytes are is the server's to say. */
            if (op[i] == BLOCK_DISCARD)
                assert_int_equal(io(f, b, BLOCK_READ, at[i], mirror + at[i], len[i]), 0);
        }
    }
    block_close(b);
    file = fopen(f->image, "re");
    assert_int_equal(fread(buf, 1, DISK_SIZE, file), DISK_SIZE);
    fclose(file);
    assert_memory_equal(buf, mirror, DISK_SIZE);
    free(mirror);
    free(buf);
}

static void data_goes_there_and_back(void **state) { random_requests(*state, 40, 0, NULL); }

/* More in one piece than a socket takes at once: all of the disk, twice; several of such on their way, too. */
static void much_at_once(struct fixture *f, struct block *b)
{
    uint8_t *buf = malloc(DISK_SIZE), *got = malloc(DISK_SIZE);
    struct request q[4];

    for (uint64_t i = 0; i < DISK_SIZE; i++)
        buf[i] = (uint8_t)(rand() >> 8);
    assert_int_equal(io(f, b, BLOCK_WRITE, 0, buf, DISK_SIZE), 0);
    assert_int_equal(io(f, b, BLOCK_READ, 0, got, DISK_SIZE), 0);
    assert_memory_equal(got, buf, DISK_SIZE);
    for (unsigned round = 0; round < 2; round++) {
        memset(got, 0, DISK_SIZE);
        for (unsigned i = 0; i < 4; i++)
            submit(b, &q[i], round ? BLOCK_READ : BLOCK_WRITE, i * DISK_SIZE / 4, (round ? got : buf) + i * DISK_SIZE / 4, DISK_SIZE / 4, 1);
        for (unsigned i = 0; i < 4; i++)
            assert_int_equal(request_wait(f->loop, &q[i], 60000), 0);
    }
    assert_memory_equal(got, buf, DISK_SIZE);
    free(buf);
    free(got);
}

static void long_requests(void **state)
{
    struct fixture *f = *state;
    struct block *b;

    start_server(f, NULL);
    b = open_disk(f, 10);
    much_at_once(f, b);
    block_close(b);
}

/* It has no command for zeroes, and takes its time. */
static void poor_server(void **state)
{
    random_requests(*state, 15, 0, (const char *const[]){ "--filter=nozero", "--filter=delay", NULL });
}

static void server_is_killed_and_comes_back(void **state)
{
    const char *text;

    log_capture_begin();
    random_requests(*state, 40, 4, NULL);
    text = log_capture_end();
    assert_non_null(strstr(text, "the connection broke"));
    assert_non_null(strstr(text, "connected again"));
    assert_true(log_capture_lines(text) <= 2 * 4 + 1);
}

/* ---- copies ---- */

struct copying {
    struct block *b;
    pthread_t thread;
    uint64_t bytes;
    int err;
    bool done;
};

static void *wait_for_copy(void *opaque)
{
    struct copying *c = opaque;

    c->err = block_save_wait(c->b, &c->bytes);
    __atomic_store_n(&c->done, true, __ATOMIC_RELEASE);
    return NULL;
}

static void begin_copy(struct fixture *f, struct copying *c, struct block *b, const char *name, const _Atomic bool *cancel)
{
    char path[160];
    int fd;

    *c = (struct copying){ .b = b };
    snprintf(path, sizeof(path), "%s/%s", f->dir, name);
    fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    assert_true(fd >= 0);
    block_drain(b);
    assert_int_equal(block_save_begin(b, fd, cancel), 0);
    assert_int_equal(pthread_create(&c->thread, NULL, wait_for_copy, c), 0);
}

static int end_copy(struct fixture *f, struct copying *c)
{
    assert_true(run_until(f->loop, flag_is_set, &c->done, 60000));
    pthread_join(c->thread, NULL);
    block_save_end(c->b);
    return c->err;
}

/*
 * A copy is the disk at the moment at which it was begun, whatever is written meanwhile: before and behind what is copied, from the
 * loop and while all requests are waited for, by a server that is slow, and is killed once.
 */
static void copied_while_used(void **state)
{
    static const char *const server[] = { "--filter=delay", "delay-read=3ms", NULL };
    struct fixture *f = *state;
    uint8_t *was = malloc(DISK_SIZE), *now = malloc(DISK_SIZE), *got = malloc(DISK_SIZE);
    _Atomic bool cancel = false;
    struct request q[16];
    struct copying c;
    struct block *b;

    start_server(f, server);
    b = open_disk(f, 60);
    for (uint64_t i = 0; i < DISK_SIZE; i++)
        was[i] = i / MIB(1) == 5 ? 0 : (uint8_t)(rand() >> 8);
    assert_int_equal(io(f, b, BLOCK_WRITE, 0, was, DISK_SIZE), 0);
    for (unsigned round = 0; round < 3; round++) {
        char name[32], path[160];
        FILE *file;

        memcpy(now, was, DISK_SIZE);
        snprintf(name, sizeof(name), "copy%u", round);
        begin_copy(f, &c, b, name, &cancel);
        for (unsigned step = 0; step < 6; step++) {
            for (unsigned i = 0; i < ARRAY_SIZE(q); i++) {
                uint64_t at = (uint64_t)(rand() % (int)(DISK_SIZE / ARRAY_SIZE(q) / 512 - 16)) * 512 + i * (DISK_SIZE / ARRAY_SIZE(q));

                memset(now + at, (int)(round * 100 + step * 16 + i), 4096);
                submit(b, &q[i], BLOCK_WRITE, at, now + at, 4096, 1);
            }
            if (round == 1 && step == 2) {
                log_capture_begin();
                kill_server(f);
                run_until(f->loop, NULL, NULL, 20);
                start_server(f, server);
            }
            if (step & 1)
                block_drain(b);
            for (unsigned i = 0; i < ARRAY_SIZE(q); i++)
                assert_int_equal(request_wait(f->loop, &q[i], 60000), 0);
            if (round == 1 && step == 2)
                log_capture_end();
        }
        assert_int_equal(end_copy(f, &c), 0);
        assert_int_equal(c.bytes, round ? DISK_SIZE : DISK_SIZE - MIB(1));
        snprintf(path, sizeof(path), "%s/%s", f->dir, name);
        file = fopen(path, "re");
        assert_int_equal(fread(got, 1, DISK_SIZE, file), DISK_SIZE);
        fclose(file);
        assert_memory_equal(got, was, DISK_SIZE);
        assert_int_equal(io(f, b, BLOCK_READ, 0, got, DISK_SIZE), 0);
        assert_memory_equal(got, now, DISK_SIZE);
        memcpy(was, now, DISK_SIZE);
    }
    /* Given up while the server is away, with a read under way and a write that waits for it. */
    begin_copy(f, &c, b, "cancelled", &cancel);
    run_until(f->loop, NULL, NULL, 2);
    log_capture_begin();
    kill_server(f);
    submit(b, &q[0], BLOCK_WRITE, DISK_SIZE - 4096, now, 4096, 1);
    run_until(f->loop, NULL, NULL, 5);
    cancel = true;
    assert_true(run_until(f->loop, flag_is_set, &c.done, 20000));
    start_server(f, server);
    assert_int_equal(end_copy(f, &c), -ECANCELED);
    assert_int_equal(request_wait(f->loop, &q[0], 60000), 0);
    block_close(b);
    log_capture_end();
    free(was);
    free(now);
    free(got);
}

static void server_stays_away(void **state)
{
    struct fixture *f = *state;
    uint8_t buf[4096], zeroes[4096] = { 0 };
    struct request q[3];
    const char *text;
    struct block *b;
    uint64_t began;

    start_server(f, NULL);
    b = open_disk(f, 1);
    kill_server(f);
    log_capture_begin();
    for (unsigned i = 0; i < 3; i++)
        submit(b, &q[i], i ? BLOCK_WRITE : BLOCK_READ, i * 4096, memset(buf, 0x5a, sizeof(buf)), 4096, 1);
    for (unsigned i = 0; i < 3; i++)
        assert_int_equal(request_wait(f->loop, &q[i], 10000), -EIO);
    text = log_capture_end();
    assert_non_null(strstr(text, "gets I/O errors until it is there again"));
    /* From now on at once. */
    began = test_now_ns();
    assert_int_equal(io(f, b, BLOCK_READ, 0, buf, 4096), -EIO);
    assert_true(test_now_ns() - began < 900000000u);
    start_server(f, NULL);
    began = test_now_ns();
    while (io(f, b, BLOCK_READ, 4096, buf, 4096)) {
        assert_true(test_now_ns() - began < 20000000000u);
        run_until(f->loop, NULL, NULL, 20);
    }
    assert_memory_equal(buf, zeroes, 4096);
    /* Whoever waits for all requests, as a pause does, waits no longer than they do. */
    kill_server(f);
    submit(b, &q[0], BLOCK_WRITE, 0, buf, 4096, 1);
    block_drain(b);
    assert_true(q[0].done);
    assert_int_equal(q[0].status, -EIO);
    log_capture_begin();
    block_close(b);
    text = log_capture_end();
    assert_non_null(strstr(text, "may not have reached the disk"));
}

static void smaller_server(void **state)
{
    struct fixture *f = *state;
    uint8_t buf[4096];
    const char *text;
    struct block *b;

    start_server(f, NULL);
    b = open_disk(f, 1);
    kill_server(f);
    assert_int_equal(truncate(f->image, DISK_SIZE / 2), 0);
    start_server(f, NULL);
    log_capture_begin();
    assert_int_equal(io(f, b, BLOCK_READ, 0, buf, 4096), -EIO);
    text = log_capture_end();
    assert_non_null(strstr(text, "it is another one"));
    log_capture_begin();
    block_close(b);
    log_capture_end();
    /* And one that is known from elsewhere, and was right when it was looked for. */
    log_capture_begin();
    kill_server(f);
    assert_int_equal(truncate(f->image, DISK_SIZE), 0);
    start_server(f, NULL);
    assert_int_equal(try_open(f, &(struct block_options){ .size = DISK_SIZE, .unlocked = true }, &b), 0);
    kill_server(f);
    assert_int_equal(truncate(f->image, DISK_SIZE / 2), 0);
    start_server(f, NULL);
    assert_int_equal(block_lock(b), -EINVAL);
    assert_int_equal(log_capture_lines(log_capture_end()), 1);
    block_close(b);
}

static void refused(void **state)
{
    struct fixture *f = *state;
    char uri[256];
    const struct {
        const char *path, *text;
        bool server;
    } cases[] = {
        { f->uri, "cannot open", false },
        { "nbd://127.0.0.1:1/x", "Connection refused", false },
        { uri, "other", true },
        { "nbd+unix:///x", "socket", false },
        { "nbds+unix:///disk.img?socket=nbd.sock", "cannot open", false },
    };
    struct block *b;

    snprintf(uri, sizeof(uri), "nbd+unix:///other?socket=%s", f->socket);
    for (unsigned i = 0; i < ARRAY_SIZE(cases); i++) {
        const char *text;

        if (cases[i].server)
            start_server(f, NULL);
        log_capture_begin();
        assert_true(try_open(f, &(struct block_options){ .path = cases[i].path }, &b) < 0);
        text = log_capture_end();
        assert_int_equal(log_capture_lines(text), 1);
        assert_non_null(strstr(text, cases[i].text));
        kill_server(f);
    }
    start_server(f, (const char *const[]){ "-r", NULL });
    log_capture_begin();
    assert_int_equal(try_open(f, &(struct block_options){ 0 }, &b), -EROFS);
    assert_non_null(strstr(log_capture_end(), "readonly=on"));
    assert_int_equal(try_open(f, &(struct block_options){ .readonly = true }, &b), 0);
    assert_false(block_can_discard(b));
    block_close(b);
}

static void silent_server(void **state)
{
    struct fixture *f = *state;
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct block *b;

    snprintf(address.sun_path, sizeof(address.sun_path), "%s", f->socket);
    assert_int_equal(bind(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    assert_int_equal(listen(fd, 4), 0);
    log_capture_begin();
    assert_int_equal(try_open(f, &(struct block_options){ 0 }, &b), -ETIMEDOUT);
    assert_non_null(strstr(log_capture_end(), "does not answer"));
    close(fd);
}

/* As in a migration: one side at a time has a connection, on a server that takes one client. */
static void changes_hands(void **state)
{
    struct fixture *f = *state;
    uint8_t buf[4096], got[4096];
    struct block *source, *target;

    start_server(f, (const char *const[]){ "--filter=limit", "limit=1", NULL });
    source = open_disk(f, 5);
    /* It closes the connections of those who look whether it is there. */
    assert_int_equal(try_open(f, &(struct block_options){ .size = DISK_SIZE, .unlocked = true, .can_discard = true }, &target), 0);
    assert_true(block_can_discard(target));
    for (unsigned i = 0; i < 3; i++) {
        memset(buf, (int)i + 1, sizeof(buf));
        assert_int_equal(io(f, source, BLOCK_WRITE, i * 4096, buf, 4096), 0);
        block_drain(source);
        block_unlock(source);
        assert_int_equal(block_lock(target), 0);
        assert_int_equal(io(f, target, BLOCK_READ, i * 4096, got, 4096), 0);
        assert_memory_equal(got, buf, 4096);
        block_drain(target);
        block_unlock(target);
        assert_int_equal(block_lock(source), 0);
    }
    block_close(target);
    block_close(source);
}

/* What the target of a migration will need is looked for before it is needed. */
static void is_looked_for(void **state)
{
    struct fixture *f = *state;
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    char other[256];
    const struct {
        const char *path, *text;
        uint64_t size;
        const char *more;
    } cases[] = {
        { f->uri, "No such file", DISK_SIZE, NULL },
        { "nbd://127.0.0.1:1/x", "Connection refused", DISK_SIZE, NULL },
        { other, "other", DISK_SIZE, "" },
        { f->uri, "it is another one", DISK_SIZE + 512, "" },
        { f->uri, "readonly=on", DISK_SIZE, "-r" },
        { f->uri, NULL, DISK_SIZE, "" },
    };
    struct block *target;
    uint64_t began;
    int fd;

    snprintf(other, sizeof(other), "nbd+unix:///other?socket=%s", f->socket);
    for (unsigned i = 0; i < ARRAY_SIZE(cases); i++) {
        const char *text;
        int err;

        if (cases[i].more)
            start_server(f, *cases[i].more ? (const char *const[]){ cases[i].more, NULL } : NULL);
        log_capture_begin();
        err = try_open(f, &(struct block_options){ .path = cases[i].path, .size = cases[i].size, .unlocked = true }, &target);
        text = log_capture_end();
        if (cases[i].text) {
            assert_true(err < 0);
            assert_int_equal(log_capture_lines(text), 1);
            assert_non_null(strstr(text, cases[i].text));
        } else {
            assert_int_equal(err, 0);
            block_close(target);
        }
        kill_server(f);
    }
    /* One that has a client already may leave others waiting. */
    snprintf(address.sun_path, sizeof(address.sun_path), "%s", f->socket);
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(bind(fd, (struct sockaddr *)&address, sizeof(address)) | listen(fd, 4), 0);
    began = test_now_ns();
    assert_int_equal(try_open(f, &(struct block_options){ .size = DISK_SIZE, .unlocked = true }, &target), 0);
    assert_true(test_now_ns() - began < 4500000000u);
    block_close(target);
    close(fd);
    unlink(f->socket);
    /* Looking leaves no connection that would be in the way for long. */
    start_server(f, (const char *const[]){ "--filter=limit", "limit=1", NULL });
    assert_int_equal(try_open(f, &(struct block_options){ .size = DISK_SIZE, .unlocked = true }, &target), 0);
    assert_int_equal(block_lock(target), 0);
    block_close(target);
}

static void tls(void **state)
{
    /* Clients of an authority that the server does not know, or without a certificate, are refused. */
    static const char make[] =
        "set -e; cd '%s'; mkdir pki other; for d in pki other; do (cd $d; "
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout ca.key -out ca-cert.pem -subj /CN=ca-$d -days 2; for n in server client; do "
        "openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout $n-key.pem -out $n.csr -subj /CN=localhost; "
        "openssl x509 -req -in $n.csr -CA ca-cert.pem -CAkey ca.key -CAcreateserial -out $n-cert.pem -days 2; done); done) 2>/dev/null >&2";
    struct fixture *f = *state;
    char command[1024] = "(", uri[192], dir[96], other[96];
    uint8_t buf[4096] = { 7 }, got[4096];
    struct block *b;

    snprintf(command + 1, sizeof(command) - 1, make, f->dir);
    assert_int_equal(system(command), 0);
    snprintf(uri, sizeof(uri), "nbds+unix:///disk.img?socket=%s", f->socket);
    snprintf(dir, sizeof(dir), "%s/pki", f->dir);
    snprintf(other, sizeof(other), "%s/other", f->dir);
    start_server(f, (const char *const[]){ "--tls=require", "--tls-certificates=pki", "--tls-verify-peer", NULL });
    assert_int_equal(try_open(f, &(struct block_options){ .path = uri, .tls = dir, .reconnect_s = 20 }, &b), 0);
    assert_int_equal(io(f, b, BLOCK_WRITE, 4096, buf, 4096), 0);
    kill_server(f);
    start_server(f, (const char *const[]){ "--tls=require", "--tls-certificates=pki", "--tls-verify-peer", NULL });
    log_capture_begin();
    assert_int_equal(io(f, b, BLOCK_READ, 4096, got, 4096), 0);
    log_capture_end();
    assert_memory_equal(got, buf, 4096);
    much_at_once(f, b);
    block_close(b);
    log_capture_begin();
    assert_true(try_open(f, &(struct block_options){ .path = uri, .tls = other }, &b) < 0);
    assert_true(try_open(f, &(struct block_options){ 0 }, &b) < 0);
    assert_int_equal(log_capture_lines(log_capture_end()), 2);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(data_goes_there_and_back, setup, teardown),
        cmocka_unit_test_setup_teardown(long_requests, setup, teardown),
        cmocka_unit_test_setup_teardown(poor_server, setup, teardown),
        cmocka_unit_test_setup_teardown(server_is_killed_and_comes_back, setup, teardown),
        cmocka_unit_test_setup_teardown(copied_while_used, setup, teardown),
        cmocka_unit_test_setup_teardown(server_stays_away, setup, teardown),
        cmocka_unit_test_setup_teardown(smaller_server, setup, teardown),
        cmocka_unit_test_setup_teardown(refused, setup, teardown),
        cmocka_unit_test_setup_teardown(silent_server, setup, teardown),
        cmocka_unit_test_setup_teardown(changes_hands, setup, teardown),
        cmocka_unit_test_setup_teardown(is_looked_for, setup, teardown),
        cmocka_unit_test_setup_teardown(tls, setup, teardown),
    };

    if (system("nbdkit --version >/dev/null 2>&1") != 0) {
        printf("there is no nbdkit on this host\n");
        return NO_NBDKIT;
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
