/*
 * What is left of a migration when the link breaks, is damaged or falls silent, at any byte.
 *
 * Usage: test_migrate_link [ROUNDS [SEED]]: how many times that is done at random.
 */
#include "migrate_trip.h"

#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/util.h"
#include "migrate/postcopy.h"
#include "migrate/protocol.h"

static unsigned rounds = 60;
static uint64_t seed = 1;

/* ---- a link that can break ---- */

/* FAULT_CUT_CONTROL: only the first connection, just before the bytes that are on their way by another. */
enum fault { FAULT_NONE, FAULT_CUT, FAULT_CUT_FOR_A_WHILE, FAULT_DAMAGE, FAULT_SILENCE, FAULT_CUT_CONTROL };

#define LINK_MAX 128

struct relay {
    char from[96], to[96];      /* paths */
    int fd, wake[2];
    pthread_t thread;
    enum fault fault;
    uint64_t at;                /* bytes, both directions, all connections */
    uint64_t passed, cut_ms;
    bool cut, damaged;
    unsigned heal_ms;
    struct { int a, b; bool dead; } pair[LINK_MAX];
    unsigned pairs;
};

static void relay_cut(struct relay *r)
{
    for (unsigned i = 0; i < r->pairs; i++)
        if (!r->pair[i].dead) {
            shutdown(r->pair[i].a, SHUT_RDWR);
            shutdown(r->pair[i].b, SHUT_RDWR);
            close(r->pair[i].a);
            close(r->pair[i].b);
            r->pair[i].dead = true;
        }
    r->cut = true;
    r->cut_ms = migrate_now_ms();
}

/* False: the pair is over. */
static bool relay_pass(struct relay *r, int from, int to)
{
    uint8_t buffer[16384];
    size_t room = sizeof(buffer);
    ssize_t n;

    if (r->fault != FAULT_NONE && !r->cut && r->passed < r->at)
        room = MIN(room, r->at - r->passed);
    n = recv(from, buffer, room, 0);
    if (n <= 0)
        return false;
    r->passed += (uint64_t)n;
    if (r->fault == FAULT_DAMAGE && r->passed >= r->at && !r->damaged) {
        buffer[n - 1] ^= 0x10;
        r->damaged = true;
    }
    if (r->fault == FAULT_CUT_CONTROL && r->passed >= r->at && !r->damaged) {
        shutdown(r->pair[0].a, SHUT_RDWR);
        shutdown(r->pair[0].b, SHUT_RDWR);
        r->damaged = true;
    }
    if (r->fault == FAULT_SILENCE && r->passed >= r->at)
        return true;
    for (ssize_t done = 0; done < n;) {
        ssize_t sent = send(to, buffer + done, (size_t)(n - done), MSG_NOSIGNAL);

        if (sent <= 0)
            return false;
        done += sent;
    }
    if ((r->fault == FAULT_CUT || r->fault == FAULT_CUT_FOR_A_WHILE) && r->passed >= r->at && !r->cut)
        relay_cut(r);
    return true;
}

static void *relay_main(void *opaque)
{
    struct relay *r = opaque;

    for (;;) {
        struct pollfd p[2 + LINK_MAX * 2];
        unsigned who[2 + LINK_MAX * 2], n = 2;

        p[0] = (struct pollfd){ .fd = r->wake[0], .events = POLLIN };
        p[1] = (struct pollfd){ .fd = r->fd, .events = POLLIN };
        for (unsigned i = 0; i < r->pairs; i++)
            if (!r->pair[i].dead) {
                who[n] = who[n + 1] = i;
                p[n++] = (struct pollfd){ .fd = r->pair[i].a, .events = POLLIN };
                p[n++] = (struct pollfd){ .fd = r->pair[i].b, .events = POLLIN };
            }
        if (poll(p, n, -1) < 0)
            continue;
        if (p[0].revents)
            break;
        for (unsigned i = 2; i < n; i++) {
            unsigned k = who[i];

            if (!p[i].revents || r->pair[k].dead)
                continue;
            if (!relay_pass(r, p[i].fd, p[i].fd == r->pair[k].a ? r->pair[k].b : r->pair[k].a) && !r->pair[k].dead) {
                close(r->pair[k].a);
                close(r->pair[k].b);
                r->pair[k].dead = true;
            }
        }
        if (p[1].revents) {
            int a = accept(r->fd, NULL, NULL), b = -1;
            bool open = !r->cut || (r->fault == FAULT_CUT_FOR_A_WHILE && migrate_now_ms() - r->cut_ms >= r->heal_ms);

            if (a >= 0 && open && r->pairs < LINK_MAX)
                b = trip_socket(r->to, false);
            if (b >= 0) {
                r->pair[r->pairs].a = a;
                r->pair[r->pairs].b = b;
                r->pair[r->pairs++].dead = false;
            } else if (a >= 0) {
                close(a);
            }
        }
    }
    relay_cut(r);
    return NULL;
}

static void relay_begin(struct relay *r, enum fault fault, uint64_t at)
{
    memset(r, 0, sizeof(*r));
    snprintf(r->from, sizeof(r->from), "%s/link", trip_folder);
    snprintf(r->to, sizeof(r->to), "%s/target", trip_folder);
    unlink(r->from);
    r->fault = fault;
    r->at = at;
    r->heal_ms = 50;
    r->fd = trip_socket(r->from, true);
    assert_true(r->fd >= 0 && pipe(r->wake) == 0);
    assert_int_equal(pthread_create(&r->thread, NULL, relay_main, r), 0);
}

static void relay_end(struct relay *r)
{
    assert_int_equal(write(r->wake[1], "", 1), 1);
    pthread_join(r->thread, NULL);
    close(r->fd);
    close(r->wake[0]);
    close(r->wake[1]);
    unlink(r->from);
}

/* ---- tests ---- */

/*
 * The link breaks, is damaged or falls silent after any number of bytes. Exactly one machine is left to run, or it is known
 * who may run it; and nothing that it wrote is lost.
 */
static void test_faults(void **state)
{
    uint64_t x = seed * 2654435761u + 1;
    unsigned ends[MIGRATE_LOST + 1] = { 0 };

    for (unsigned i = 0; i < rounds; i++) {
        struct trip *t = trip_make();
        struct relay r;
        char why[CHANNEL_ERROR_MAX];
        enum fault fault = 1 + trip_random(&x) % (i % 8 == 0 ? 4 : 3);
        bool post_copy = trip_random(&x) % 2 && postcopy_usable(false, why);
        /* Small, to be often where the machine changes hands; mostly within what all takes. */
        uint64_t at = trip_random(&x) % 3 == 0 ? 1 + trip_random(&x) % 2500000 : 2100000 + trip_random(&x) % 40000;

        /* A target that runs waits for its memory as long as it takes, so this link heals. */
        if (post_copy && fault != FAULT_DAMAGE)
            fault = FAULT_CUT_FOR_A_WHILE;
        if (post_copy && trip_random(&x) % 2)
            at = 1 + trip_random(&x) % 30000;
        if (trip_random(&x) % 2) {
            trip_with_disk(t);
            /* All of it once, and what is written meanwhile. */
            at += at > 2000000 ? sizeof(t->a.disk) + trip_random(&x) % 3 * MIGRATE_DISK_GRANULE : 0;
        }
        t->a.hot_pages = 4;
        t->a.pause_us = 2000;
        t->options.post_copy = post_copy ? MIGRATE_POST_COPY_NOW : MIGRATE_POST_COPY_NEVER;
        t->options.streams = 1 + trip_random(&x) % 3;
        t->options.timeout_ms = 400;
        t->target_options.timeout_ms = 2000;
        trip_target(t, NULL);
        relay_begin(&r, fault, at);
        snprintf(t->to, sizeof(t->to), "unix:%s", r.from);
        trip_source_make(t);
        migrate_source_run(t->source, &t->sent);
        ends[t->sent.end]++;
        /* After the source's end: whatever the target still waits for, like an orphan's owner, ends by a person's decision. */
        migrate_target_cancel(t->target);
        pthread_join(t->thread, NULL);
        if (t->sent.end == MIGRATE_UNKNOWN) {
            /* Neither knows of the other: a person looks at both. */
            assert_false(t->a.counted);
            if (t->received.end == MIGRATE_LOST) {
                /* It was cancelled while it waits for memory, which is the source's still; freeing lets go of it. */
                migrate_target_free(t->target);
                t->target = NULL;
                machine_run(&t->b, false);
            }
            if (t->received.end != MIGRATE_DONE)
                machine_run(&t->a, true);
        }
        if (machines_running != 1)
            fail_msg("fault %d at byte %llu, seed %llu round %u: source %s (%s), target %s (%s): %d machines run", fault,
                     (unsigned long long)at, (unsigned long long)seed, i, migrate_stage_name(t->sent.end), t->sent.reason,
                     migrate_stage_name(t->received.end), t->received.reason, machines_running);
        machine_run(&t->a, false);
        machine_run(&t->b, false);
        machine_check(t->received.end == MIGRATE_DONE ? &t->b : &t->a);
        relay_end(&r);
        trip_end(t);
    }
    print_message("done %u, failed %u, unknown %u, lost %u\n", ends[MIGRATE_DONE], ends[MIGRATE_FAILED], ends[MIGRATE_UNKNOWN],
                  ends[MIGRATE_LOST]);
}

/* Post-copy, through a relay with one fault at this byte; gives how many passed when the source was done. */
static uint64_t post_copy_by_relay(enum fault fault, uint64_t at)
{
    struct trip *t = trip_make();
    struct relay r;
    uint64_t passed;

    t->a.hot_pages = 4;
    t->options.post_copy = MIGRATE_POST_COPY_NOW;
    trip_target(t, NULL);
    relay_begin(&r, fault, at);
    snprintf(t->to, sizeof(t->to), "unix:%s", r.from);
    trip_source(t);
    pthread_join(t->thread, NULL);
    t->thread = 0;
    relay_end(&r);
    passed = r.passed;
    trip_arrived(t);
    return passed;
}

/* The control connection breaks when the last pages are on their way: they arrive, and then nothing is missing any more. */
static void test_last_pages(void **state)
{
    char why[CHANNEL_ERROR_MAX];
    uint64_t all;

    if (!postcopy_usable(false, why)) {
        print_message("%s\n", why);
        skip();
    }
    all = post_copy_by_relay(FAULT_NONE, 0);
    for (unsigned i = 0; i < 6; i++)
        post_copy_by_relay(FAULT_CUT_CONTROL, all - 200 - i * 12000);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_last_pages),
        cmocka_unit_test(test_faults),
    };

    if (argc > 1)
        rounds = (unsigned)strtoul(argv[1], NULL, 0);
    if (argc > 2)
        seed = strtoull(argv[2], NULL, 0);
    return trip_tests(tests);
}
