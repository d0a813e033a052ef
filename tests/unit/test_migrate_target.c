/*
 * Migration as the target sees it: what it refuses, strangers, and sources that the test plays itself.
 */
#include "migrate_trip.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "migrate/postcopy.h"
#include "migrate/protocol.h"

static void test_refusals(void **state)
{
    for (unsigned i = 0; i < 3; i++) {
        struct trip *t = trip_make();
        static const char *const why[] = { "no disk here", "no such device", "cannot run" };

        *(i == 0 ? &t->b.refuse_prepare : i == 1 ? &t->b.refuse_load : &t->b.refuse_activate) = why[i];
        trip_target(t, NULL);
        trip_source(t);
        trip_stayed(t, why[i]);
    }
}

/* Strangers do not disturb a target that waits. */
static void test_strangers(void **state)
{
    static const char text[] = "GET / HTTP/1.0\r\n\r\n padding to the length of a header";
    struct trip *t = trip_make();
    char path[96];

    trip_target(t, NULL);
    snprintf(path, sizeof(path), "%s/target", trip_folder);
    for (unsigned i = 0; i < 5; i++) {
        struct hello h = { .oldest = 7, .newest = 9, .kind = HELLO_CONTROL };
        struct channel *c = channel_from_fd(trip_socket(path, false), 2000);
        char error[CHANNEL_ERROR_MAX];
        struct frame f = { 0 };
        uint8_t hello[HELLO_SIZE];

        if (i == 1)
            assert_int_equal(channel_send(c, text, sizeof(text)), 0);
        h.oldest = h.newest = i == 2 ? 9 : MIGRATE_VERSION;
        h.kind = i == 3 ? HELLO_QUERY : i == 4 ? HELLO_STREAM : HELLO_CONTROL;
        hello_put(&h, hello);
        if (i >= 2) {
            assert_int_equal(frame_send(c, FRAME_HELLO, 0, hello, sizeof(hello)), 0);
            assert_int_equal(frame_recv(c, &f, error), 0);
            assert_int_equal(f.type, FRAME_REFUSE);
            assert_non_null(strstr((char *)f.data, i == 2 ? "versions 9 to 9" : i == 3 ? "not known here" : "belongs to no migration"));
        }
        frame_free(&f);
        channel_close(c);
    }
    trip_source(t);
    trip_arrived(t);
}

/* A connection of a source that the test plays itself. */
static struct channel *play(unsigned kind)
{
    struct hello h = { .oldest = MIGRATE_VERSION, .newest = MIGRATE_VERSION, .kind = kind, .session = "played" };
    char path[96], error[CHANNEL_ERROR_MAX];
    struct frame f = { 0 };
    uint8_t hello[HELLO_SIZE];
    struct channel *c;

    snprintf(path, sizeof(path), "%s/target", trip_folder);
    c = channel_from_fd(trip_socket(path, false), 20000);
    assert_non_null(c);
    hello_put(&h, hello);
    assert_int_equal(frame_send(c, FRAME_HELLO, 0, hello, sizeof(hello)), 0);
    assert_int_equal(frame_recv(c, &f, error), 0);
    assert_int_equal(f.type, FRAME_HELLO);
    frame_free(&f);
    return c;
}

static void hear_frame(struct channel *c, unsigned type)
{
    char error[CHANNEL_ERROR_MAX];
    struct frame f = { 0 };

    assert_int_equal(frame_recv(c, &f, error), 0);
    assert_int_equal(f.type, type);
    frame_free(&f);
}

/*
 * A stream breaks while the target makes the machine its own. A refusal would have the source go on with it, too; the
 * connection has to break, for the source to ask.
 */
static void test_no_refusal_once_taken(void **state)
{
    struct trip *t = trip_make();
    uint64_t *missing[MEMORY_MAX_REGIONS];
    char offer[256], error[CHANNEL_ERROR_MAX], why[CHANNEL_ERROR_MAX], byte;
    struct channel *control, *stream, *urgent;
    struct frame f = { 0 };

    if (!postcopy_usable(false, why)) {
        print_message("%s\n", why);
        trip_end(t);
        skip();
    }
    assert_int_equal(pipe(t->b.activating) | pipe(t->b.activate), 0);
    t->b.hot_pages = 0;
    trip_target(t, NULL);
    control = play(HELLO_CONTROL);
    snprintf(offer, sizeof(offer), "{\"machine\":{\"kind\":\"test\"},\"streams\":1,\"post_copy\":true,\"memory\":[[0,%u],[%u,%u]]}",
             PAGES * GUEST_PAGE_SIZE / 2, PAGES * GUEST_PAGE_SIZE / 2, PAGES * GUEST_PAGE_SIZE / 2);
    assert_int_equal(frame_send(control, FRAME_OFFER, 0, offer, (uint32_t)strlen(offer)), 0);
    hear_frame(control, FRAME_READY);
    stream = play(HELLO_STREAM);
    assert_int_equal(memory_bitmaps_alloc(&t->a.memory, missing), 0);
    missing[1][2] = 1;
    assert_int_equal(missing_send(control, &t->a.memory, missing), 0);
    memory_bitmaps_free(missing);
    urgent = play(HELLO_URGENT);
    assert_int_equal(frame_send(control, FRAME_STATE, 0, &t->b.seq, sizeof(t->b.seq)), 0);
    hear_frame(control, FRAME_PREPARED);
    assert_int_equal(frame_send(control, FRAME_COMMIT, 0, NULL, 0), 0);
    assert_int_equal(read(t->b.activating[0], &byte, 1), 1);
    assert_int_equal(channel_send(urgent, "This is no frame of a migration.", 32), 0);
    assert_int_equal(frame_recv(control, &f, error), -ECONNRESET);
    assert_int_equal(write(t->b.activate[1], "", 1), 1);
    channel_close(control);
    channel_close(stream);
    channel_close(urgent);
    migrate_target_cancel(t->target);
    pthread_join(t->thread, NULL);
    assert_int_equal(t->received.end, MIGRATE_LOST);
    for (unsigned i = 0; i < 2; i++) {
        close(t->b.activating[i]);
        close(t->b.activate[i]);
    }
    frame_free(&f);
    trip_end(t);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_strangers),
        cmocka_unit_test(test_no_refusal_once_taken),
    };

    return trip_tests(tests);
}
