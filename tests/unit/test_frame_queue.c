/* The queue of frames: order, contents and bounds, at every position of the ring. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#include "backend/net/frame_queue.h"
#include "base/util.h"

static void fill(uint8_t *p, size_t n, unsigned number)
{
    for (size_t i = 0; i < n; i++)
        p[i] = (uint8_t)(number * 31 + i);
}

static size_t length_of(unsigned number)
{
    return 1 + (number * 2654435761u >> 7) % 1500;
}

/* Random pushes and pops against numbers that tell what each frame must be. */
static void frames_come_out_as_they_went_in(void **state)
{
    struct frame_queue q;
    uint8_t in[1600], out[1600];
    unsigned pushed = 0, popped = 0, refused = 0;
    assert_int_equal(frame_queue_init(&q, 10000), 0);
    srand(5);
    for (int step = 0; step < 200000; step++) {
        if (rand() % 100 < (step / 1000 % 2 ? 60 : 40)) {
            size_t n = length_of(pushed), cut = (size_t)rand() % (n + 1);
            fill(in + 12, n, pushed);
            struct iovec iov[3] = {{in, 5}, {in + 5, 7 + cut}, {in + 12 + cut, n - cut}};
            if (frame_queue_push(&q, iov, 3, 12))
                pushed++;
            else
                refused++;
        } else {
            size_t n;
            const uint8_t *p = frame_queue_peek(&q, &n);
            assert_int_equal(p != NULL, pushed != popped);
            assert_int_equal(q.frames, pushed - popped);
            if (!p)
                continue;
            assert_int_equal(n, length_of(popped));
            fill(out, n, popped);
            assert_memory_equal(p, out, n);
            frame_queue_pop(&q);
            popped++;
        }
    }
    assert_true(refused > 100 && popped > 10000);
    frame_queue_destroy(&q);
}

static void bounds(void **state)
{
    struct frame_queue q;
    uint8_t buf[5000] = {0};
    struct iovec iov = {buf, 10};
    size_t n;
    assert_int_equal(frame_queue_init(&q, 4096), 0);
    assert_false(frame_queue_push(&q, &iov, 1, 10)); /* nothing left */
    assert_false(frame_queue_push(&q, &iov, 1, 11));
    assert_false(frame_queue_push(&q, &iov, 0, 0));
    iov.iov_len = sizeof(buf);
    assert_false(frame_queue_push(&q, &iov, 1, 0));
    struct iovec wrap[2] = {{buf, SIZE_MAX}, {buf, 20}};
    assert_false(frame_queue_push(&q, wrap, 2, 0));
    assert_null(frame_queue_peek(&q, &n));
    frame_queue_pop(&q);
    iov.iov_len = 1500;
    assert_true(frame_queue_push(&q, &iov, 1, 0));
    assert_true(frame_queue_push(&q, &iov, 1, 0));
    assert_false(frame_queue_push(&q, &iov, 1, 0));
    frame_queue_pop(&q);
    assert_true(frame_queue_push(&q, &iov, 1, 100)); /* to the front of the ring */
    assert_non_null(frame_queue_peek(&q, &n));
    assert_int_equal(n, 1500);
    frame_queue_pop(&q);
    assert_non_null(frame_queue_peek(&q, &n));
    assert_int_equal(n, 1400);
    frame_queue_destroy(&q);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(frames_come_out_as_they_went_in),
        cmocka_unit_test(bounds),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
