/*
 * Overlays and copies of disks in use, against a model in memory: random requests of any alignment, chains of overlays,
 * files as a crash leaves them.
 */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "backend/block/block.h"
#include "base/log.h"
#include "base/util.h"
#include "block_engines.h"
#include "block_requests.h"

/* Ends in the middle of a granule. */
#define DISK_SIZE (MIB(3) + 3 * 512)
#define MAX_REQUEST KIB(200)

struct fixture {
    struct loop *loop;
    char dir[64];
    int dirfd;
    uint8_t *model, *buf;
};

static void path_of(struct fixture *f, const char *name, char path[128])
{
    snprintf(path, 128, "%s/%s", f->dir, name);
}

static void fill(struct fixture *f, const char *name)
{
    int fd = openat(f->dirfd, name, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

    for (size_t i = 0; i < DISK_SIZE; i++)
        f->model[i] = (uint8_t)(i / 4096 % 5 == 3 ? 0 : i * 11 + i / 777);
    assert_int_equal(write(fd, f->model, DISK_SIZE), DISK_SIZE);
    close(fd);
}

static int setup(void **state)
{
    struct fixture *f = calloc(1, sizeof(*f));

    f->loop = loop_create(NULL);
    snprintf(f->dir, sizeof(f->dir), "/var/tmp/ringfort-test-XXXXXX");
    if (!mkdtemp(f->dir))
        return -1;
    f->dirfd = open(f->dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    f->model = malloc(DISK_SIZE);
    f->buf = aligned_alloc(4096, align_up(DISK_SIZE, 4096));
    fill(f, "base");
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    struct fixture *f = *state;
    char command[128];

    snprintf(command, sizeof(command), "rm -rf %s", f->dir);
    close(f->dirfd);
    loop_destroy(f->loop);
    free(f->model);
    free(f->buf);
    free(f);
    return system(command);
}

static int try_open(struct fixture *f, const char *name, enum block_cache cache, struct block **b)
{
    char path[128];

    path_of(f, name, path);
    struct block_options opt = {.path = path, .cache = cache};
    return block_open_with(f->loop, &opt, engine, b);
}

static struct block *open_disk(struct fixture *f, const char *name, enum block_cache cache)
{
    struct block *b;
    assert_int_equal(try_open(f, name, cache, &b), 0);
    return b;
}

static int io(struct fixture *f, struct block *b, enum block_op op, uint64_t offset, uint8_t *buf, uint64_t len)
{
    struct request q;
    size_t a = len / 3, c = len / 2;

    request_set(&q, op, offset, buf, len);
    if (buf) {
        q.iov[0] = (struct iovec){buf, a};
        q.iov[1] = (struct iovec){buf + a, c};
        q.iov[2] = (struct iovec){buf + a + c, len - a - c};
        q.r.iovcnt = 3;
    }
    q.r.may_unmap = true;
    return request_perform(f->loop, b, &q);
}

static void check_all(struct fixture *f, struct block *b, const uint8_t *model)
{
    assert_int_equal(io(f, b, BLOCK_READ, 0, f->buf, DISK_SIZE), 0);
    assert_memory_equal(f->buf, model, DISK_SIZE);
}

/* One request of any kind; the model follows. */
static void step(struct fixture *f, struct block *b, unsigned seed)
{
    uint64_t offset = (uint64_t)rand() % DISK_SIZE;
    uint64_t len = 1 + (uint64_t)rand() % (seed % 4 ? 9000 : MAX_REQUEST);

    if (seed % 3 == 0) {
        offset = align_down(offset, 4096);
        len = align_up(len, 4096);
    } else if (seed % 3 == 1) {
        offset = align_down(offset, 512);
        len = align_up(len, 512);
    }
    len = MIN(len, DISK_SIZE - offset);
    switch (rand() % 8) {
    case 0:
        assert_int_equal(io(f, b, BLOCK_WRITE_ZEROES, offset, NULL, len), 0);
        memset(f->model + offset, 0, len);
        break;
    case 1:
        assert_int_equal(io(f, b, BLOCK_FLUSH, 0, NULL, 0), 0);
        break;
    case 2:
    case 3:
    case 4:
        assert_int_equal(io(f, b, BLOCK_READ, offset, f->buf + seed % 512, len), 0);
        assert_memory_equal(f->buf + seed % 512, f->model + offset, len);
        break;
    default:
        for (uint64_t i = 0; i < len; i++)
            f->buf[i] = f->model[offset + i] = (uint8_t)(seed + i * 3);
        assert_int_equal(io(f, b, BLOCK_WRITE, offset, f->buf, len), 0);
    }
}

static uint8_t *contents(struct fixture *f, const char *name)
{
    uint8_t *data = malloc(DISK_SIZE);
    int fd = openat(f->dirfd, name, O_RDONLY | O_CLOEXEC);

    assert_int_equal(pread(fd, data, DISK_SIZE, 0), DISK_SIZE);
    close(fd);
    return data;
}

static void overlays_are_disks(void **state)
{
    struct fixture *f = *state;
    uint8_t *base = contents(f, "base");

    for (unsigned cache = BLOCK_CACHE_WRITEBACK; cache <= BLOCK_CACHE_UNSAFE; cache++) {
        char name[16], below[16];

        snprintf(name, sizeof(name), "over%u", cache);
        snprintf(below, sizeof(below), "over%u", cache - 1);
        /* Each on top of the one before. */
        assert_int_equal(block_overlay_create(f->dirfd, name, cache ? below : "base", DISK_SIZE), 0);
        for (unsigned again = 0; again < 3; again++) {
            struct block *b = open_disk(f, name, (enum block_cache)cache);
            assert_true(block_size(b) == DISK_SIZE);
            assert_true(block_is_overlay(b));
            check_all(f, b, f->model);
            srand(cache * 10 + again);
            for (unsigned i = 0; i < 150; i++)
                step(f, b, i);
            check_all(f, b, f->model);
            block_close(b);
        }
    }
    uint8_t *now = contents(f, "base");
    assert_memory_equal(base, now, DISK_SIZE);
    free(now);
    free(base);
}

/* Many at once, also on the same granules. */
static void requests_at_once(void **state)
{
    struct fixture *f = *state;
    enum { N = 400 };
    struct request *q = calloc(N, sizeof(*q));
    int base = openat(f->dirfd, "base", O_RDONLY | O_CLOEXEC);

    assert_int_equal(block_overlay_create(f->dirfd, "over", "base", DISK_SIZE), 0);
    struct block *b = open_disk(f, "over", BLOCK_CACHE_WRITEBACK);
    for (unsigned i = 0; i < N; i++) {
        uint64_t offset = i * 700, len = 700;
        memset(f->model + offset, (int)i, len);
        request_set(&q[i], i % 50 == 49 ? BLOCK_FLUSH : BLOCK_WRITE, offset, f->model + offset, len);
        if (q[i].r.op == BLOCK_FLUSH)
            assert_int_equal(pread(base, f->model + offset, len, (off_t)offset), len);
        block_submit(b, &q[i].r);
    }
    block_drain(b);
    for (unsigned i = 0; i < N; i++)
        assert_true(q[i].done && !q[i].status);
    check_all(f, b, f->model);
    block_close(b);
    close(base);
    free(q);
}

static void copy_file(struct fixture *f, const char *from, const char *to)
{
    char command[256];
    snprintf(command, sizeof(command), "cp --sparse=always %s/%s %s/%s", f->dir, from, f->dir, to);
    assert_int_equal(system(command), 0);
}

/* What a flush was answered for is in the file, whatever became of the process. */
static void flushed_is_there(void **state)
{
    struct fixture *f = *state;

    assert_int_equal(block_overlay_create(f->dirfd, "over", "base", DISK_SIZE), 0);
    struct block *b = open_disk(f, "over", BLOCK_CACHE_WRITEBACK);
    for (unsigned round = 0; round < 5; round++) {
        char name[16];
        srand(round);
        for (unsigned i = 0; i < 30; i++)
            step(f, b, i);
        assert_int_equal(io(f, b, BLOCK_FLUSH, 0, NULL, 0), 0);
        snprintf(name, sizeof(name), "crash%u", round);
        copy_file(f, "over", name);
        struct block *crashed = open_disk(f, name, BLOCK_CACHE_WRITEBACK);
        check_all(f, crashed, f->model);
        block_close(crashed);
    }
    block_close(b);
}

static void bad_overlays_are_refused(void **state)
{
    struct fixture *f = *state;
    struct block *b;
    int fd;

    assert_int_equal(block_overlay_create(f->dirfd, "over", "nothing", DISK_SIZE), 0);
    assert_int_equal(try_open(f, "over", BLOCK_CACHE_WRITEBACK, &b), -ENOENT);
    assert_int_equal(block_overlay_create(f->dirfd, "over", "base", DISK_SIZE), -EEXIST);
    assert_int_equal(block_overlay_create(f->dirfd, "small", "base", DISK_SIZE - 512), 0);
    assert_int_equal(try_open(f, "small", BLOCK_CACHE_WRITEBACK, &b), -EINVAL);
    assert_int_equal(block_overlay_create(f->dirfd, "self", "self", DISK_SIZE), 0);
    assert_true(try_open(f, "self", BLOCK_CACHE_WRITEBACK, &b) < 0);
    assert_int_equal(block_overlay_create(f->dirfd, "good", "base", DISK_SIZE), 0);
    static const struct { off_t at; uint8_t byte; } damage[] = {{16, 9}, {21, 1}, {24, 1}, {31, 1}, {34, 7}, {39, 1}, {40, 0}, {41, 0xff}};
    for (unsigned i = 0; i < ARRAY_SIZE(damage); i++) {
        uint8_t was;
        fd = openat(f->dirfd, "good", O_RDWR | O_CLOEXEC);
        assert_int_equal(pread(fd, &was, 1, damage[i].at), 1);
        assert_int_equal(pwrite(fd, &damage[i].byte, 1, damage[i].at), 1);
        assert_int_equal(try_open(f, "good", BLOCK_CACHE_WRITEBACK, &b), -EINVAL);
        assert_int_equal(pwrite(fd, &was, 1, damage[i].at), 1);
        close(fd);
    }
    assert_int_equal(try_open(f, "good", BLOCK_CACHE_WRITEBACK, &b), 0);
    /* What lies below is not written to meanwhile. */
    struct block *below;
    assert_int_equal(try_open(f, "base", BLOCK_CACHE_WRITEBACK, &below), -EBUSY);
    block_close(b);
    fd = openat(f->dirfd, "good", O_RDWR | O_CLOEXEC);
    assert_int_equal(ftruncate(fd, 5000 - 5000 % 512), 0);
    close(fd);
    assert_int_equal(try_open(f, "good", BLOCK_CACHE_WRITEBACK, &b), -EINVAL);
}

/* The copy is the disk as it was when it began, whatever is written meanwhile. */
static void copied_while_used(void **state)
{
    struct fixture *f = *state;
    const _Atomic bool cancel = false;
    uint8_t *model = malloc(DISK_SIZE);

    assert_int_equal(block_overlay_create(f->dirfd, "base-over", "under", DISK_SIZE), 0);
    copy_file(f, "base", "under");
    for (unsigned round = 0; round < 12; round++) {
        const char *name = round % 2 ? "base-over" : "base";
        enum block_cache cache = round % 3 ? BLOCK_CACHE_WRITEBACK : BLOCK_CACHE_NONE;
        char copy[16];
        uint64_t bytes;

        struct block *b = open_disk(f, name, cache);
        assert_int_equal(io(f, b, BLOCK_READ, 0, f->model, DISK_SIZE), 0);
        for (unsigned i = 0; i < 20; i++)
            step(f, b, i);
        block_drain(b);
        memcpy(model, f->model, DISK_SIZE);
        snprintf(copy, sizeof(copy), "copy%u", round);
        int fd = openat(f->dirfd, copy, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
        assert_int_equal(block_save_begin(b, fd, &cancel), 0);
        srand(round);
        for (unsigned i = 0; i < 40; i++)
            step(f, b, i);
        assert_int_equal(block_save_wait(b, &bytes), 0);
        block_save_end(b);
        for (unsigned i = 0; i < 10; i++)
            step(f, b, i);
        check_all(f, b, f->model);
        block_close(b);

        struct block *saved = open_disk(f, copy, BLOCK_CACHE_WRITEBACK);
        check_all(f, saved, model);
        block_close(saved);
    }
    free(model);
}

/* Writes that wait for the copy are not lost when the disk is drained or closed, or the copy is cancelled or fails. */
static void copies_end_early(void **state)
{
    struct fixture *f = *state;
    _Atomic bool cancel = false;
    uint64_t bytes;

    struct block *b = open_disk(f, "base", BLOCK_CACHE_WRITEBACK);
    for (unsigned round = 0; round < 3; round++) {
        struct request q[8] = {0};
        int fd = round == 2 ? open("/dev/full", O_RDWR | O_CLOEXEC)
                            : openat(f->dirfd, "copy", O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

        int err = block_save_begin(b, fd, &cancel);
        if (round == 2) {
            assert_true(err < 0);
            break;
        }
        assert_int_equal(err, 0);
        for (unsigned i = 0; i < ARRAY_SIZE(q); i++) {
            uint64_t offset = DISK_SIZE - 512 - i * KIB(300);
            memset(f->model + offset, 0x40 + (int)i, 512);
            request_set(&q[i], BLOCK_WRITE, offset, f->model + offset, 512);
            block_submit(b, &q[i].r);
        }
        cancel = round == 1;
        block_drain(b);
        for (unsigned i = 0; i < ARRAY_SIZE(q); i++)
            assert_true(q[i].done && !q[i].status);
        err = block_save_wait(b, &bytes);
        assert_true(round == 1 ? err == -ECANCELED : err == 0);
        block_save_end(b);
        cancel = false;
        check_all(f, b, f->model);
    }
    block_close(b);
}

/* Two machines have the disk open and use it in turn, as in a migration: the lock says who, and each sees all writes. */
static void hands_over(void **state)
{
    static const char *const names[] = {"base", "over"};
    struct fixture *f = *state;

    assert_int_equal(block_overlay_create(f->dirfd, "over", "base", DISK_SIZE), 0);
    for (unsigned i = 0; i < 2; i++) {
        struct block *b[2];
        char path[128];
        const char *name = names[1 - i];

        path_of(f, name, path);
        b[0] = open_disk(f, name, BLOCK_CACHE_WRITEBACK);
        struct block_options opt = {.path = path, .cache = BLOCK_CACHE_WRITEBACK, .unlocked = true};
        assert_int_equal(block_open_with(f->loop, &opt, engine, &b[1]), 0);
        for (unsigned turn = 0; turn < 6; turn++) {
            struct block *here = b[turn % 2], *there = b[1 - turn % 2];

            for (unsigned k = 0; k < 20; k++)
                step(f, here, turn * 20 + k);
            assert_int_equal(block_lock(there), -EBUSY);
            block_unlock(here);
            assert_int_equal(block_lock(there), 0);
            check_all(f, there, f->model);
        }
        /* The one that does not have it closes without a trace. */
        block_close(b[1]);
        check_all(f, b[0], f->model);
        block_close(b[0]);
        /* The next round is of the file below, as it was. */
        if (i == 0)
            fill(f, "base");
    }
}

int main(void)
{
    log_set_level(-1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(overlays_are_disks, setup, teardown),
        cmocka_unit_test_setup_teardown(requests_at_once, setup, teardown),
        cmocka_unit_test_setup_teardown(flushed_is_there, setup, teardown),
        cmocka_unit_test_setup_teardown(bad_overlays_are_refused, setup, teardown),
        cmocka_unit_test_setup_teardown(copied_while_used, setup, teardown),
        cmocka_unit_test_setup_teardown(copies_end_early, setup, teardown),
        cmocka_unit_test_setup_teardown(hands_over, setup, teardown),
    };
    return RUN_WITH_EACH_ENGINE(tests);
}
