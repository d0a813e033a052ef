/*
 * Disks on real files, with each engine: data, alignment, discard and zeroes, errors, draining,
 * locks.
 */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include "backend/block/block.h"
#include "base/log.h"
#include "base/util.h"
#include "block_engines.h"
#include "block_requests.h"

#define DISK_SIZE MIB(4)

struct fixture {
    struct loop *loop;
    char dir[64], path[96];
    int fd; /* of the image, to look behind the disk's back */
};

static int setup(void **state)
{
    struct fixture *f = calloc(1, sizeof(*f));
    f->loop = loop_create(NULL);
    /* Not in /tmp when that is a tmpfs: O_DIRECT and holes are what disks have. */
    snprintf(f->dir, sizeof(f->dir), "/var/tmp/ringfort-test-XXXXXX");
    if (!mkdtemp(f->dir))
        return -1;
    snprintf(f->path, sizeof(f->path), "%s/disk.img", f->dir);
    f->fd = open(f->path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    *state = f;
    return f->fd < 0 || ftruncate(f->fd, DISK_SIZE);
}

static int teardown(void **state)
{
    struct fixture *f = *state;
    close(f->fd);
    unlink(f->path);
    rmdir(f->dir);
    loop_destroy(f->loop);
    free(f);
    return 0;
}

static struct block *open_disk(struct fixture *f, enum block_cache cache, bool readonly)
{
    struct block_options opt = {.path = f->path, .cache = cache, .readonly = readonly};
    struct block *b;
    assert_int_equal(block_open_with(f->loop, &opt, engine, &b), 0);
    return b;
}

static int io(struct fixture *f, struct block *b, enum block_op op, uint64_t offset, void *buf,
              uint64_t len)
{
    struct request q;
    request_set(&q, op, offset, buf, len);
    return request_perform(f->loop, b, &q);
}

static void pattern(uint8_t *p, size_t n, unsigned seed)
{
    for (size_t i = 0; i < n; i++)
        p[i] = (uint8_t)(seed + i * 7 + i / 251);
}

static void check_file(struct fixture *f, uint64_t offset, const uint8_t *expect, size_t n)
{
    uint8_t *got = malloc(n);
    assert_int_equal(pread(f->fd, got, n, (off_t)offset), n);
    assert_memory_equal(got, expect, n);
    free(got);
}

static void data_goes_there_and_back(void **state)
{
    struct fixture *f = *state;
    for (int cache = BLOCK_CACHE_WRITEBACK; cache <= BLOCK_CACHE_UNSAFE; cache++) {
        struct block *b = open_disk(f, (enum block_cache)cache, false);
        assert_true(block_size(b) == DISK_SIZE);
        assert_false(block_readonly(b));
        assert_int_equal(block_writeback(b), cache != BLOCK_CACHE_UNSAFE);
        uint8_t *w = aligned_alloc(4096, MIB(1)), *r = aligned_alloc(4096, MIB(1));
        pattern(w, MIB(1), (unsigned)cache);
        assert_int_equal(io(f, b, BLOCK_WRITE, MIB(1), w, MIB(1)), 0);
        assert_int_equal(io(f, b, BLOCK_FLUSH, 0, NULL, 0), 0);
        memset(r, 0, MIB(1));
        assert_int_equal(io(f, b, BLOCK_READ, MIB(1), r, MIB(1)), 0);
        assert_memory_equal(w, r, MIB(1));
        check_file(f, MIB(1), w, MIB(1));
        block_close(b);
        free(w);
        free(r);
    }
}

/* Every way to be not aligned: buffer, offset, length, pieces; more than one bounce buffer long. */
static void odd_buffers_and_offsets(void **state)
{
    struct fixture *f = *state;
    for (int cache = BLOCK_CACHE_WRITEBACK; cache <= BLOCK_CACHE_NONE; cache++) {
        struct block *b = open_disk(f, (enum block_cache)cache, false);
        uint8_t *model = calloc(1, DISK_SIZE), *buf = aligned_alloc(4096, MIB(1));
        assert_int_equal(pread(f->fd, model, DISK_SIZE, 0), DISK_SIZE);
        srand(7);
        for (int i = 0; i < 60; i++) {
            uint64_t offset = (uint64_t)rand() % (DISK_SIZE - KIB(512));
            size_t len = 1 + (size_t)rand() % (i % 5 ? 3000 : 400000);
            if (i % 3 == 0) {
                offset = align_down(offset, 512);
                len = align_up(len, 512);
            }
            uint8_t *p = buf + rand() % 512;
            struct request q;
            request_set(&q, i & 1 ? BLOCK_READ : BLOCK_WRITE, offset, p, len);
            /* In up to three pieces of any size, one of them perhaps empty. */
            size_t a = (size_t)rand() % (len + 1), c = (size_t)rand() % (len - a + 1);
            q.iov[0].iov_len = a;
            q.iov[1] = (struct iovec){p + a, c};
            q.iov[2] = (struct iovec){p + a + c, len - a - c};
            q.r.iovcnt = 3;
            if (q.r.op == BLOCK_WRITE) {
                pattern(p, len, (unsigned)i);
                memcpy(model + offset, p, len);
            } else {
                memset(p, 0xee, len);
            }
            assert_int_equal(request_perform(f->loop, b, &q), 0);
            if (q.r.op == BLOCK_READ)
                assert_memory_equal(p, model + offset, len);
        }
        /* To the last byte, from the last sector. */
        assert_int_equal(io(f, b, BLOCK_READ, DISK_SIZE - 1, buf + 1, 1), 0);
        assert_int_equal(buf[1], model[DISK_SIZE - 1]);
        block_close(b);
        check_file(f, 0, model, DISK_SIZE);
        free(model);
        free(buf);
    }
}

/* Neighbours within a host block, written at the same time, must not undo each other. */
static void small_writes_at_once(void **state)
{
    struct fixture *f = *state;
    struct block *b = open_disk(f, BLOCK_CACHE_NONE, false);
    enum { N = 300 };
    struct request *q = calloc(N, sizeof(*q));
    uint8_t *buf = malloc(N * 100);
    pattern(buf, N * 100, 3);
    for (unsigned i = 0; i < N; i++) {
        request_set(&q[i], BLOCK_WRITE, 5000 + i * 100, buf + i * 100, 100);
        block_submit(b, &q[i].r);
    }
    block_drain(b);
    for (unsigned i = 0; i < N; i++) {
        assert_true(q[i].done);
        assert_int_equal(q[i].status, 0);
    }
    check_file(f, 5000, buf, N * 100);
    block_close(b);
    free(q);
    free(buf);
}

/* A sequence of many small pieces: more than the kernel takes in one call. */
static void thousands_of_pieces(void **state)
{
    struct fixture *f = *state;
    for (int cache = BLOCK_CACHE_WRITEBACK; cache <= BLOCK_CACHE_NONE; cache++) {
        struct block *b = open_disk(f, (enum block_cache)cache, false);
        enum { PIECES = 3000, PIECE = 512 };
        uint8_t *buf = aligned_alloc(4096, PIECES * PIECE);
        struct iovec *iov = calloc(PIECES, sizeof(*iov));
        pattern(buf, PIECES * PIECE, 9);
        for (unsigned i = 0; i < PIECES; i++)
            iov[i] = (struct iovec){buf + i * PIECE, PIECE};
        struct request q;
        request_set(&q, BLOCK_WRITE, 4096, buf, 0);
        q.r.iov = iov;
        q.r.iovcnt = PIECES;
        assert_int_equal(request_perform(f->loop, b, &q), 0);
        check_file(f, 4096, buf, PIECES * PIECE);
        memset(buf, 0, PIECES * PIECE);
        request_set(&q, BLOCK_READ, 4096, buf, 0);
        q.r.iov = iov;
        q.r.iovcnt = PIECES;
        assert_int_equal(request_perform(f->loop, b, &q), 0);
        check_file(f, 4096, buf, PIECES * PIECE);
        block_close(b);
        free(iov);
        free(buf);
    }
}

static void requests_are_checked(void **state)
{
    struct fixture *f = *state;
    uint8_t buf[1024] = {0};
    struct block *b = open_disk(f, BLOCK_CACHE_WRITEBACK, false);
    assert_int_equal(io(f, b, BLOCK_READ, DISK_SIZE - 512, buf, 1024), -EINVAL);
    assert_int_equal(io(f, b, BLOCK_WRITE, DISK_SIZE, buf, 512), -EINVAL);
    assert_int_equal(io(f, b, BLOCK_WRITE, UINT64_MAX - 100, buf, 512), -EINVAL);
    assert_int_equal(io(f, b, BLOCK_DISCARD, 512, NULL, DISK_SIZE), -EINVAL);
    assert_int_equal(io(f, b, BLOCK_WRITE_ZEROES, 512, NULL, UINT64_MAX), -EINVAL);
    assert_int_equal(io(f, b, BLOCK_READ, DISK_SIZE, buf, 0), 0);
    struct request q;
    request_set(&q, BLOCK_READ, 0, buf, 512);
    q.iov[1] = (struct iovec){buf, SIZE_MAX};
    q.r.iovcnt = 2;
    assert_int_equal(request_perform(f->loop, b, &q), -EINVAL);
    struct stat st;
    assert_int_equal(fstat(f->fd, &st), 0);
    assert_true((uint64_t)st.st_size == DISK_SIZE);
    block_close(b);
}

static void readonly_disk_takes_no_writes(void **state)
{
    struct fixture *f = *state;
    uint8_t buf[512];
    pattern(buf, 512, 1);
    assert_int_equal(pwrite(f->fd, buf, 512, 1024), 512);
    struct block *b = open_disk(f, BLOCK_CACHE_WRITEBACK, true);
    assert_true(block_readonly(b));
    assert_false(block_can_discard(b));
    uint8_t got[512];
    assert_int_equal(io(f, b, BLOCK_READ, 1024, got, 512), 0);
    assert_memory_equal(buf, got, 512);
    assert_int_equal(io(f, b, BLOCK_WRITE, 0, buf, 512), -EROFS);
    assert_int_equal(io(f, b, BLOCK_DISCARD, 0, NULL, 512), -EROFS);
    assert_int_equal(io(f, b, BLOCK_WRITE_ZEROES, 0, NULL, 512), -EROFS);
    assert_int_equal(io(f, b, BLOCK_FLUSH, 0, NULL, 0), 0);
    block_close(b);
    uint8_t zero[512] = {0};
    check_file(f, 0, zero, 512);
}

static uint64_t allocated(struct fixture *f)
{
    struct stat st;
    fsync(f->fd);
    assert_int_equal(fstat(f->fd, &st), 0);
    return (uint64_t)st.st_blocks * 512;
}

static void discard_frees_space(void **state)
{
    struct fixture *f = *state;
    struct block *b = open_disk(f, BLOCK_CACHE_WRITEBACK, false);
    assert_true(block_can_discard(b));
    uint8_t *buf = malloc(DISK_SIZE);
    memset(buf, 0x55, DISK_SIZE);
    assert_int_equal(io(f, b, BLOCK_WRITE, 0, buf, DISK_SIZE), 0);
    assert_int_equal(io(f, b, BLOCK_FLUSH, 0, NULL, 0), 0);
    uint64_t before = allocated(f);
    assert_true(before >= DISK_SIZE);
    assert_int_equal(io(f, b, BLOCK_DISCARD, MIB(1), NULL, MIB(2)), 0);
    uint64_t after = allocated(f);
    if (after == before)
        print_message("this file system cannot punch holes\n");
    else
        assert_true(after <= before - MIB(2));
    check_file(f, 0, buf, MIB(1));
    check_file(f, MIB(3), buf, MIB(1));
    struct stat st;
    assert_int_equal(fstat(f->fd, &st), 0);
    assert_true((uint64_t)st.st_size == DISK_SIZE);
    block_close(b);
    free(buf);
}

static void zeroes_are_written(void **state)
{
    struct fixture *f = *state;
    uint8_t *model = malloc(DISK_SIZE);
    for (int cache = BLOCK_CACHE_WRITEBACK; cache <= BLOCK_CACHE_NONE; cache++) {
        struct block *b = open_disk(f, (enum block_cache)cache, false);
        memset(model, 0x77, DISK_SIZE);
        assert_int_equal(io(f, b, BLOCK_WRITE, 0, model, DISK_SIZE), 0);
        static const struct {
            uint64_t offset, len;
            bool may_unmap;
        } range[] = {{4096, 65536, false},
                     {MIB(1), MIB(1), true},
                     {MIB(3) + 512, 512, false},
                     {MIB(3) + 1536, 5632, true},
                     {DISK_SIZE - 512, 512, false}};
        for (unsigned i = 0; i < ARRAY_SIZE(range); i++) {
            struct request q;
            request_set(&q, BLOCK_WRITE_ZEROES, range[i].offset, NULL, range[i].len);
            q.r.may_unmap = range[i].may_unmap;
            assert_int_equal(request_perform(f->loop, b, &q), 0);
            memset(model + range[i].offset, 0, range[i].len);
        }
        block_close(b);
        check_file(f, 0, model, DISK_SIZE);
    }
    free(model);
}

/* A full disk is the guest's I/O error, and the disk goes on. By a limit on file sizes: works for
 * everybody. */
static void file_size_limit_is_no_space(void **state)
{
    struct fixture *f = *state;
    struct block *b = open_disk(f, BLOCK_CACHE_WRITEBACK, false);
    struct rlimit old, small;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
    small = old;
    small.rlim_cur = MIB(1);
    uint8_t buf[4096];
    pattern(buf, sizeof(buf), 2);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    int beyond = io(f, b, BLOCK_WRITE, MIB(2), buf, sizeof(buf));
    int within = io(f, b, BLOCK_WRITE, 0, buf, sizeof(buf));
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
    assert_int_equal(beyond, -ENOSPC);
    assert_int_equal(within, 0);
    assert_int_equal(io(f, b, BLOCK_WRITE, MIB(2), buf, sizeof(buf)), 0);
    block_close(b);
}

static void full_file_system(void **state)
{
    struct fixture *f = *state;
    if (mount("none", f->dir, "tmpfs", 0, "size=512k")) {
        print_message("skipped: no file system can be mounted here (%s)\n", strerror(errno));
        skip();
    }
    int fd = open(f->path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    assert_true(fd >= 0);
    assert_int_equal(ftruncate(fd, DISK_SIZE), 0);
    struct block *b = open_disk(f, BLOCK_CACHE_WRITEBACK, false);
    uint8_t *buf = malloc(MIB(1)), *got = malloc(KIB(64));
    pattern(buf, MIB(1), 5);
    int full = io(f, b, BLOCK_WRITE, 0, buf, MIB(1));
    int read_back = io(f, b, BLOCK_READ, 0, got, KIB(64));
    /* This file system has no FALLOC_FL_ZERO_RANGE: zeroes are written by hand. */
    int zeroed = io(f, b, BLOCK_WRITE_ZEROES, 1000, NULL, KIB(300));
    block_close(b);
    uint8_t *all = malloc(KIB(512));
    ssize_t n = pread(fd, all, KIB(512), 0);
    close(fd);
    umount2(f->dir, MNT_DETACH);
    assert_int_equal(full, -ENOSPC);
    assert_int_equal(read_back, 0);
    assert_memory_equal(buf, got, KIB(64));
    assert_int_equal(zeroed, 0);
    assert_int_equal(n, KIB(512));
    assert_memory_equal(all, buf, 1000);
    for (size_t i = 1000; i < 1000 + KIB(300); i++)
        assert_int_equal(all[i], 0);
    assert_memory_equal(all + 1000 + KIB(300), buf + 1000 + KIB(300), 1000);
    free(buf);
    free(got);
    free(all);
}

/* Somebody cut the image short: an error, not an endless wait or made-up data. */
static void shortened_image(void **state)
{
    struct fixture *f = *state;
    struct block *b = open_disk(f, BLOCK_CACHE_WRITEBACK, false);
    assert_int_equal(ftruncate(f->fd, MIB(1)), 0);
    uint8_t *buf = malloc(MIB(1));
    assert_int_equal(io(f, b, BLOCK_READ, MIB(2), buf, 4096), -EIO);
    assert_int_equal(io(f, b, BLOCK_READ, KIB(512), buf, MIB(1)), -EIO);
    assert_int_equal(io(f, b, BLOCK_READ, 0, buf, MIB(1)), 0);
    block_close(b);
    free(buf);
}

/* More requests than can be under way, of all kinds, and no event loop: draining completes them. */
static void drain_completes_everything(void **state)
{
    struct fixture *f = *state;
    struct block *b = open_disk(f, BLOCK_CACHE_WRITEBACK, false);
    enum { N = 700 };
    struct request *q = calloc(N, sizeof(*q));
    uint8_t *buf = calloc(N, 4096);
    for (unsigned i = 0; i < N; i++) {
        static const enum block_op ops[] = {BLOCK_WRITE, BLOCK_READ, BLOCK_FLUSH, BLOCK_DISCARD,
                                            BLOCK_WRITE_ZEROES};
        enum block_op op = ops[i % 5];
        bool data = op == BLOCK_WRITE || op == BLOCK_READ;
        request_set(&q[i], op, (i % 512) * 4096, data ? buf + i * 4096 : NULL, 4096);
        block_submit(b, &q[i].r);
    }
    block_drain(b);
    for (unsigned i = 0; i < N; i++) {
        assert_true(q[i].done);
        assert_int_equal(q[i].status, 0);
    }
    block_drain(b);
    block_close(b);
    free(q);
    free(buf);
}

struct chain {
    struct request q;
    struct block *b;
    unsigned left;
    uint8_t buf[4096];
    bool done;
};

static void chain_done(void *opaque, int status)
{
    struct chain *c = opaque;
    assert_int_equal(status, 0);
    if (--c->left == 0) {
        c->done = true;
        return;
    }
    c->q.r.offset += 4096;
    block_submit(c->b, &c->q.r);
}

static void done_may_submit_again(void **state)
{
    struct fixture *f = *state;
    struct chain c = {.left = 200};
    c.b = open_disk(f, BLOCK_CACHE_WRITEBACK, false);
    request_set(&c.q, BLOCK_WRITE, 0, c.buf, sizeof(c.buf));
    c.q.r.done = chain_done;
    c.q.r.opaque = &c;
    block_submit(c.b, &c.q.r);
    assert_true(run_until(f->loop, flag_is_set, &c.done, 20000));
    /* The same, but closing finishes it. */
    c.left = 200;
    c.done = false;
    c.q.r.offset = 0;
    block_submit(c.b, &c.q.r);
    block_close(c.b);
    assert_true(c.done);
}

static int try_open(struct fixture *f, const char *path, bool readonly, enum block_cache cache)
{
    struct block_options opt = {.path = path, .readonly = readonly, .cache = cache};
    struct block *b = (struct block *)1;
    int ret = block_open_with(f->loop, &opt, engine, &b);
    if (ret == 0)
        block_close(b);
    else
        assert_null(b);
    return ret;
}

static void a_disk_belongs_to_one_machine(void **state)
{
    struct fixture *f = *state;
    struct block *b = open_disk(f, BLOCK_CACHE_WRITEBACK, false);
    assert_int_equal(try_open(f, f->path, false, BLOCK_CACHE_WRITEBACK), -EBUSY);
    assert_int_equal(try_open(f, f->path, true, BLOCK_CACHE_WRITEBACK), -EBUSY);
    block_close(b);
    b = open_disk(f, BLOCK_CACHE_WRITEBACK, true);
    assert_int_equal(try_open(f, f->path, true, BLOCK_CACHE_WRITEBACK), 0);
    assert_int_equal(try_open(f, f->path, false, BLOCK_CACHE_WRITEBACK), -EBUSY);
    block_close(b);
    assert_int_equal(try_open(f, f->path, false, BLOCK_CACHE_WRITEBACK), 0);
}

static void bad_images_are_refused(void **state)
{
    struct fixture *f = *state;
    assert_int_equal(try_open(f, "/nonexistent/disk.img", false, BLOCK_CACHE_WRITEBACK), -ENOENT);
    assert_int_equal(try_open(f, f->dir, false, BLOCK_CACHE_WRITEBACK), -EINVAL);
    assert_int_equal(try_open(f, "/dev/null", false, BLOCK_CACHE_WRITEBACK), -EINVAL);
    assert_int_equal(pwrite(f->fd, "QFI\xfb", 4, 0), 4);
    assert_int_equal(try_open(f, f->path, false, BLOCK_CACHE_WRITEBACK), -EINVAL);
    assert_int_equal(ftruncate(f->fd, 0), 0);
    assert_int_equal(try_open(f, f->path, false, BLOCK_CACHE_WRITEBACK), -EINVAL);
    assert_int_equal(ftruncate(f->fd, 1000), 0);
    assert_int_equal(try_open(f, f->path, false, BLOCK_CACHE_WRITEBACK), -EINVAL);
    assert_int_equal(ftruncate(f->fd, 512), 0);
    assert_int_equal(try_open(f, f->path, false, BLOCK_CACHE_WRITEBACK), 0);
    assert_int_equal(ftruncate(f->fd, 4096), 0);
    assert_int_equal(try_open(f, f->path, false, BLOCK_CACHE_NONE), 0);
    if (geteuid() != 0) {
        assert_int_equal(fchmod(f->fd, 0400), 0);
        assert_int_equal(try_open(f, f->path, false, BLOCK_CACHE_WRITEBACK), -EACCES);
        assert_int_equal(try_open(f, f->path, true, BLOCK_CACHE_WRITEBACK), 0);
    }
}

int main(void)
{
    log_set_level(-1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(data_goes_there_and_back, setup, teardown),
        cmocka_unit_test_setup_teardown(odd_buffers_and_offsets, setup, teardown),
        cmocka_unit_test_setup_teardown(small_writes_at_once, setup, teardown),
        cmocka_unit_test_setup_teardown(thousands_of_pieces, setup, teardown),
        cmocka_unit_test_setup_teardown(requests_are_checked, setup, teardown),
        cmocka_unit_test_setup_teardown(readonly_disk_takes_no_writes, setup, teardown),
        cmocka_unit_test_setup_teardown(discard_frees_space, setup, teardown),
        cmocka_unit_test_setup_teardown(zeroes_are_written, setup, teardown),
        cmocka_unit_test_setup_teardown(file_size_limit_is_no_space, setup, teardown),
        cmocka_unit_test_setup_teardown(full_file_system, setup, teardown),
        cmocka_unit_test_setup_teardown(shortened_image, setup, teardown),
        cmocka_unit_test_setup_teardown(drain_completes_everything, setup, teardown),
        cmocka_unit_test_setup_teardown(done_may_submit_again, setup, teardown),
        cmocka_unit_test_setup_teardown(a_disk_belongs_to_one_machine, setup, teardown),
        cmocka_unit_test_setup_teardown(bad_images_are_refused, setup, teardown),
    };
    return RUN_WITH_EACH_ENGINE(tests);
}
