/* The event loop: descriptors, calls from other threads, hooks, and when its lock is held. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"
#include "loop_helper.h"

struct fixture {
    pthread_mutex_t lock;
    struct loop *loop;
    int pipe[2][2];
};

static int setup(void **state)
{
    struct fixture *f = calloc(1, sizeof(*f));
    pthread_mutex_init(&f->lock, NULL);
    f->loop = loop_create(&f->lock);
    for (int i = 0; i < 2; i++)
        if (pipe2(f->pipe[i], O_CLOEXEC | O_NONBLOCK))
            return -1;
    *state = f;
    return f->loop ? 0 : -1;
}

static int teardown(void **state)
{
    struct fixture *f = *state;
    loop_destroy(f->loop);
    for (int i = 0; i < 4; i++)
        close(f->pipe[i / 2][i % 2]);
    pthread_mutex_destroy(&f->lock);
    free(f);
    return 0;
}

struct reader {
    struct fixture *f;
    struct loop_fd *watch, *victim;
    unsigned calls;
    char got[8];
    bool done, lock_was_held;
};

static void read_one(void *opaque, int fd, short revents)
{
    struct reader *r = opaque;
    r->lock_was_held = pthread_mutex_trylock(&r->f->lock) == EBUSY;
    assert_true(revents & POLLIN);
    assert_int_equal(read(fd, &r->got[r->calls], 1), 1);
    r->calls++;
    r->done = r->calls == 2;
}

static void descriptor_calls_back_with_lock_held(void **state)
{
    struct fixture *f = *state;
    struct reader r = {.f = f};
    r.watch = loop_fd_add(f->loop, f->pipe[0][0], POLLIN, read_one, &r);
    assert_int_equal(write(f->pipe[0][1], "ab", 2), 2);
    assert_true(run_until(f->loop, flag_is_set, &r.done, 5000));
    assert_string_equal(r.got, "ab");
    assert_true(r.lock_was_held);
    loop_fd_remove(r.watch);
}

static void no_events_no_calls(void **state)
{
    struct fixture *f = *state;
    struct reader r = {.f = f};
    r.watch = loop_fd_add(f->loop, f->pipe[0][0], 0, read_one, &r);
    assert_int_equal(write(f->pipe[0][1], "ab", 2), 2);
    assert_false(run_until(f->loop, flag_is_set, &r.done, 50));
    assert_int_equal(r.calls, 0);
    loop_fd_set_events(r.watch, POLLIN);
    assert_true(run_until(f->loop, flag_is_set, &r.done, 5000));
    loop_fd_remove(r.watch);
}

static void remove_the_other(void *opaque, int fd, short revents)
{
    struct reader *r = opaque;
    r->calls++;
    loop_fd_remove(r->victim);
    r->victim = NULL;
    loop_fd_remove(r->watch);
    r->watch = NULL;
    r->done = true;
}

/* Both are ready in the same round; whichever comes first removes both. */
static void removed_descriptor_is_not_called(void **state)
{
    struct fixture *f = *state;
    struct reader a = {.f = f}, b = {.f = f};
    a.watch = b.victim = loop_fd_add(f->loop, f->pipe[0][0], POLLIN, remove_the_other, &a);
    b.watch = a.victim = loop_fd_add(f->loop, f->pipe[1][0], POLLIN, remove_the_other, &b);
    assert_int_equal(write(f->pipe[0][1], "a", 1), 1);
    assert_int_equal(write(f->pipe[1][1], "b", 1), 1);
    run_until(f->loop, NULL, NULL, 50);
    assert_int_equal(a.calls + b.calls, 1);
}

struct counter {
    struct loop *loop;
    struct loop_call call;
    unsigned calls, again;
    bool done;
};

static void count_call(void *opaque)
{
    struct counter *c = opaque;
    c->calls++;
    c->done = true;
    if (c->again) {
        c->again--;
        c->done = false;
        loop_schedule(c->loop, &c->call);
    }
}

static void scheduled_calls_merge(void **state)
{
    struct fixture *f = *state;
    struct counter c = {.loop = f->loop};
    c.call = (struct loop_call){.fn = count_call, .opaque = &c};
    for (int i = 0; i < 10; i++)
        loop_schedule(f->loop, &c.call);
    run_until(f->loop, NULL, NULL, 30);
    assert_int_equal(c.calls, 1);
    loop_schedule(f->loop, &c.call);
    run_until(f->loop, NULL, NULL, 30);
    assert_int_equal(c.calls, 2);
}

static void cancelled_call_does_not_run(void **state)
{
    struct fixture *f = *state;
    struct counter c[3];
    for (int i = 0; i < 3; i++) {
        c[i] = (struct counter){.loop = f->loop};
        c[i].call = (struct loop_call){.fn = count_call, .opaque = &c[i]};
        loop_schedule(f->loop, &c[i].call);
    }
    loop_cancel(f->loop, &c[2].call);
    loop_cancel(f->loop, &c[0].call);
    loop_schedule(f->loop, &c[2].call);
    run_until(f->loop, NULL, NULL, 30);
    assert_int_equal(c[0].calls, 0);
    assert_int_equal(c[1].calls, 1);
    assert_int_equal(c[2].calls, 1);
}

static void call_that_schedules_itself_does_not_starve(void **state)
{
    struct fixture *f = *state;
    struct counter c = {.loop = f->loop, .again = UINT32_MAX};
    struct reader r = {.f = f};
    c.call = (struct loop_call){.fn = count_call, .opaque = &c};
    loop_schedule(f->loop, &c.call);
    r.watch = loop_fd_add(f->loop, f->pipe[0][0], POLLIN, read_one, &r);
    assert_int_equal(write(f->pipe[0][1], "ab", 2), 2);
    assert_true(run_until(f->loop, flag_is_set, &r.done, 5000));
    loop_cancel(f->loop, &c.call);
    loop_fd_remove(r.watch);
}

struct other {
    struct fixture *f;
    struct counter *c;
    struct reader *r;
};

static void count_atomically(void *opaque)
{
    struct counter *c = opaque;
    __atomic_fetch_add(&c->calls, 1, __ATOMIC_SEQ_CST);
}

static void *schedule_one_by_one(void *opaque)
{
    struct other *o = opaque;
    for (unsigned i = 1; i <= 5000; i++) {
        loop_schedule(o->f->loop, &o->c->call);
        while (__atomic_load_n(&o->c->calls, __ATOMIC_SEQ_CST) != i)
            ;
    }
    loop_stop(o->f->loop);
    return NULL;
}

/* A lost wake-up would hang this for good: nothing else wakes the loop. The test's time limit is
 * the bound. */
static void calls_from_another_thread_arrive(void **state)
{
    struct fixture *f = *state;
    struct counter c = {.loop = f->loop};
    c.call = (struct loop_call){.fn = count_atomically, .opaque = &c};
    struct other o = {.f = f, .c = &c};
    pthread_t t;
    pthread_create(&t, NULL, schedule_one_by_one, &o);
    assert_int_equal(loop_run(f->loop), 0);
    pthread_join(t, NULL);
    assert_int_equal(c.calls, 5000);
}

/* The loop waits without its lock, so this thread gets it; what it adds takes effect at once. */
static void *add_with_lock(void *opaque)
{
    struct other *o = opaque;
    pthread_mutex_lock(&o->f->lock);
    o->r->watch = loop_fd_add(o->f->loop, o->f->pipe[0][0], POLLIN, read_one, o->r);
    pthread_mutex_unlock(&o->f->lock);
    return write(o->f->pipe[0][1], "ab", 2) == 2 ? NULL : o;
}

static bool reader_done(void *opaque)
{
    return ((struct reader *)opaque)->done;
}

static void other_thread_adds(void **state)
{
    struct fixture *f = *state;
    struct reader r = {.f = f};
    struct other o = {.f = f, .r = &r};
    pthread_t t;
    pthread_create(&t, NULL, add_with_lock, &o);
    assert_true(run_until(f->loop, reader_done, &r, 5000));
    void *failed;
    pthread_join(t, &failed);
    assert_null(failed);
    loop_fd_remove(r.watch);
}

static void *stop_it(void *opaque)
{
    loop_stop(opaque);
    return NULL;
}

static void stop_from_another_thread(void **state)
{
    struct fixture *f = *state;
    pthread_t t;
    pthread_create(&t, NULL, stop_it, f->loop);
    assert_int_equal(loop_run(f->loop), 0); /* the test's time limit is the bound */
    pthread_join(t, NULL);
    assert_false(loop_in_thread(f->loop));
}

struct file_reader {
    struct loop_fd *watch;
    size_t total;
    bool eof;
};

static void read_file(void *opaque, int fd, short revents)
{
    struct file_reader *r = opaque;
    char buf[1000];
    ssize_t n = read(fd, buf, sizeof(buf));
    assert_true(n >= 0);
    r->total += (size_t)n;
    if (n == 0) {
        r->eof = true;
        loop_fd_remove(r->watch);
        r->watch = NULL;
    }
}

/* epoll refuses them; they count as always ready. */
static void regular_files_are_always_ready(void **state)
{
    struct fixture *f = *state;
    char path[] = "/tmp/ringfort-test-XXXXXX";
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    unlink(path);
    assert_int_equal(ftruncate(fd, 5500), 0);
    struct file_reader r = {0};
    r.watch = loop_fd_add(f->loop, fd, POLLIN, read_file, &r);
    assert_non_null(r.watch);
    assert_true(run_until(f->loop, flag_is_set, &r.eof, 5000));
    assert_int_equal(r.total, 5500);
    close(fd);

    fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    r = (struct file_reader){0};
    r.watch = loop_fd_add(f->loop, fd, POLLIN, read_file, &r);
    assert_true(run_until(f->loop, flag_is_set, &r.eof, 5000));
    close(fd);
}

struct hook_counts {
    unsigned prepared, dispatched;
    bool done;
};

static void hook_prepare(void *opaque, int *timeout_ms)
{
    ((struct hook_counts *)opaque)->prepared++;
    *timeout_ms = 10;
}

static void hook_dispatch(void *opaque)
{
    struct hook_counts *h = opaque;
    h->done = ++h->dispatched == 5;
}

static void hooks_bound_the_wait(void **state)
{
    struct fixture *f = *state;
    struct hook_counts h = {0};
    struct loop_hook hook = {.prepare = hook_prepare, .dispatch = hook_dispatch, .opaque = &h};
    loop_hook_add(f->loop, &hook);
    uint64_t start = test_now_ns();
    assert_true(run_until(f->loop, flag_is_set, &h.done, 5000));
    assert_true(test_now_ns() - start >=
                4 * 4000000ull); /* it waits, 5 ms at most in run_until() */
    assert_true(h.prepared >= h.dispatched);
    loop_hook_remove(f->loop, &hook);
    unsigned dispatched = h.dispatched;
    run_until(f->loop, NULL, NULL, 20);
    assert_int_equal(h.dispatched, dispatched);
}

static void bad_descriptor_is_refused(void **state)
{
    struct fixture *f = *state;
    assert_null(loop_fd_add(f->loop, 100000, POLLIN, read_one, NULL));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(descriptor_calls_back_with_lock_held, setup, teardown),
        cmocka_unit_test_setup_teardown(no_events_no_calls, setup, teardown),
        cmocka_unit_test_setup_teardown(removed_descriptor_is_not_called, setup, teardown),
        cmocka_unit_test_setup_teardown(scheduled_calls_merge, setup, teardown),
        cmocka_unit_test_setup_teardown(cancelled_call_does_not_run, setup, teardown),
        cmocka_unit_test_setup_teardown(call_that_schedules_itself_does_not_starve, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(calls_from_another_thread_arrive, setup, teardown),
        cmocka_unit_test_setup_teardown(other_thread_adds, setup, teardown),
        cmocka_unit_test_setup_teardown(stop_from_another_thread, setup, teardown),
        cmocka_unit_test_setup_teardown(regular_files_are_always_ready, setup, teardown),
        cmocka_unit_test_setup_teardown(hooks_bound_the_wait, setup, teardown),
        cmocka_unit_test_setup_teardown(bad_descriptor_is_refused, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
