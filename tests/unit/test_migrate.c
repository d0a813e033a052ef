/*
 * Migration between two machines of a few lines of C, over real sockets: stages, post-copy, refusals, and what is left when
 * the link breaks at any byte.
 *
 * The machine is a thread that writes pages by memory_write() and checks what it finds there. What each page should hold is in
 * its saved state, so a page that was lost on the way is found. `running` counts the machines that run in this process: two
 * would fail the test at once.
 *
 * Usage: test_migrate [ROUNDS [SEED]]: how many times the link is broken at random.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <errno.h>
#include <gnutls/gnutls.h>
#include <gnutls/x509.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"
#include "migrate/frame.h"
#include "migrate/migrate.h"
#include "migrate/postcopy.h"
#include "migrate/protocol.h"

#define PAGES 1024u
#define WORDS (GUEST_PAGE_SIZE / 8)
/* A disk of pages: some granules, and a part of one. */
#define BLOCKS (8 * (MIGRATE_DISK_GRANULE / GUEST_PAGE_SIZE) + 1)

static char folder[64];
static unsigned rounds = 60;
static uint64_t seed = 1;
static _Atomic int running;

static uint64_t next(uint64_t *x)
{
    *x ^= *x << 13;
    *x ^= *x >> 7;
    *x ^= *x << 17;
    return *x;
}

/* ---- a machine ---- */

struct machine {
    struct memory memory;
    bool made;
    struct {                    /* what is saved: what each page and block holds, as its number of writes */
        uint64_t page[PAGES], block[BLOCKS];
    } seq;
    bool disk_moves;            /* the disk is used, and copied */
    uint64_t disk[BLOCKS][WORDS];
    _Atomic uint64_t written;   /* granules */
    uint64_t random;
    unsigned pause_us;          /* between two writes */
    unsigned hot_pages;         /* that are written; 0: none by the thread */
    bool by_reports;            /* pages are written at each report of pre-copy instead: faster than any link */
    pthread_t thread;
    bool started;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool run, end, in_write, counted;
    _Atomic unsigned throttled;
    const char *refuse_prepare, *refuse_load, *refuse_activate;
    int activating[2], activate[2];     /* pipes, when not 0: it says that it is being activated, and waits for a byte */
    bool abandoned, orphaned;
    unsigned stages;            /* bits that were seen */
    _Atomic uint64_t sent;      /* bytes of pre-copy */
    uint64_t bad;               /* pages found with other contents */
};

static uint64_t word(uint64_t page, uint64_t seq, unsigned i)
{
    return seq ? (page * 0x9e3779b97f4a7c15ull + seq * 0xbf58476d1ce4e5b9ull) ^ i : 0;
}

static void check_page(struct machine *m, uint64_t page)
{
    uint64_t have[WORDS];

    memory_read(&m->memory, page * GUEST_PAGE_SIZE, have, sizeof(have));
    for (unsigned i = 0; i < WORDS; i++)
        if (have[i] != word(page, m->seq.page[page], i)) {
            if (!m->bad++)
                fprintf(stderr, "page %llu holds %llx, not write %llu\n", (unsigned long long)page, (unsigned long long)have[i],
                        (unsigned long long)m->seq.page[page]);
            return;
        }
}

static void write_page(struct machine *m, uint64_t page)
{
    uint64_t want[WORDS];

    check_page(m, page);
    m->seq.page[page]++;
    /* Now and then a page is emptied, or written as it was. */
    if (m->seq.page[page] % 16 == 0)
        m->seq.page[page] = 0;
    for (unsigned i = 0; i < WORDS; i++)
        want[i] = word(page, m->seq.page[page], i);
    memory_write(&m->memory, page * GUEST_PAGE_SIZE, want, sizeof(want));
}

static void check_block(struct machine *m, uint64_t block)
{
    for (unsigned i = 0; i < WORDS; i++)
        if (m->disk[block][i] != word(block, m->seq.block[block], i)) {
            if (!m->bad++)
                fprintf(stderr, "block %llu holds %llx, not write %llu\n", (unsigned long long)block,
                        (unsigned long long)m->disk[block][i], (unsigned long long)m->seq.block[block]);
            return;
        }
}

static void write_block(struct machine *m, uint64_t block)
{
    check_block(m, block);
    m->seq.block[block]++;
    if (m->seq.block[block] % 8 == 0)
        m->seq.block[block] = 0;
    for (unsigned i = 0; i < WORDS; i++)
        __atomic_store_n(&m->disk[block][i], word(block, m->seq.block[block], i), __ATOMIC_RELAXED);
    atomic_fetch_or(&m->written, 1ull << (block * GUEST_PAGE_SIZE / MIGRATE_DISK_GRANULE));
}

static void *machine_main(void *opaque)
{
    struct machine *m = opaque;

    pthread_mutex_lock(&m->lock);
    while (!m->end) {
        if (!m->run || !m->hot_pages) {
            pthread_cond_wait(&m->changed, &m->lock);
            continue;
        }
        m->in_write = true;
        pthread_mutex_unlock(&m->lock);
        write_page(m, next(&m->random) % m->hot_pages);
        if (m->disk_moves)
            write_block(m, next(&m->random) % MIN(BLOCKS, m->hot_pages));
        if (m->pause_us || m->throttled)
            nanosleep(&(struct timespec){ .tv_nsec = (long)(m->pause_us + m->throttled * 10) * 1000 }, NULL);
        pthread_mutex_lock(&m->lock);
        m->in_write = false;
        pthread_cond_broadcast(&m->changed);
    }
    pthread_mutex_unlock(&m->lock);
    return NULL;
}

static void machine_make(struct machine *m)
{
    memset(m, 0, sizeof(*m));
    m->random = 88172645463325252ull;
    m->pause_us = 100;
    m->hot_pages = PAGES;
    pthread_mutex_init(&m->lock, NULL);
    pthread_cond_init(&m->changed, NULL);
    assert_int_equal(memory_init(&m->memory), 0);
    assert_int_equal(memory_add_ram(&m->memory, 0, PAGES * GUEST_PAGE_SIZE / 2), 0);
    assert_int_equal(memory_add_ram(&m->memory, PAGES * GUEST_PAGE_SIZE / 2, PAGES * GUEST_PAGE_SIZE / 2), 0);
    /* A huge page gives contents to what was never written, on hosts that have them for shared memory. */
    for (unsigned i = 0; i < m->memory.regions; i++)
        madvise(m->memory.region[i].host, m->memory.region[i].size, MADV_NOHUGEPAGE);
    m->made = true;
}

static void set_running(struct machine *m, bool run)
{
    pthread_mutex_lock(&m->lock);
    if (run && !m->started) {
        assert_int_equal(pthread_create(&m->thread, NULL, machine_main, m), 0);
        m->started = true;
    }
    m->run = run;
    if (run && !m->counted) {
        m->counted = true;
        if (atomic_fetch_add(&running, 1) != 0) {
            fprintf(stderr, "two machines run\n");
            abort();
        }
    }
    pthread_cond_broadcast(&m->changed);
    while (!run && m->in_write)
        pthread_cond_wait(&m->changed, &m->lock);
    if (!run && m->counted) {
        m->counted = false;
        atomic_fetch_sub(&running, 1);
    }
    pthread_mutex_unlock(&m->lock);
}

static void machine_end(struct machine *m)
{
    if (!m->made)
        return;
    set_running(m, false);
    pthread_mutex_lock(&m->lock);
    m->end = true;
    pthread_cond_broadcast(&m->changed);
    pthread_mutex_unlock(&m->lock);
    if (m->started)
        pthread_join(m->thread, NULL);
    memory_destroy(&m->memory);
    pthread_mutex_destroy(&m->lock);
    pthread_cond_destroy(&m->changed);
    m->made = false;
}

/* Stands still; every page is what it should be. */
static void check_machine(struct machine *m)
{
    for (uint64_t page = 0; page < PAGES; page++)
        check_page(m, page);
    for (uint64_t block = 0; block < BLOCKS && m->disk_moves; block++)
        check_block(m, block);
    assert_int_equal(m->bad, 0);
}

static char *op_describe(void *opaque) { return strdup("{\"kind\":\"test\"}"); }

static int op_pause(void *opaque)
{
    set_running(opaque, false);
    return 0;
}

static int op_resume(void *opaque)
{
    set_running(opaque, true);
    return 0;
}

static int op_save(void *opaque, void **data, size_t *len)
{
    struct machine *m = opaque;

    *len = sizeof(m->seq);
    *data = malloc(*len);
    memcpy(*data, &m->seq, *len);
    return 0;
}

static int disks_start(void *opaque)
{
    atomic_store(&((struct machine *)opaque)->written, 0);
    return 0;
}

static void disks_stop(void *opaque) {}
static void disks_contents(void *opaque, unsigned disk, uint64_t *bitmap) { *bitmap |= 0x1ff; }
static void disks_written(void *opaque, unsigned disk, uint64_t *bitmap) { *bitmap |= atomic_exchange(&((struct machine *)opaque)->written, 0); }

static int disks_read(void *opaque, unsigned disk, uint64_t offset, void *buf, size_t len)
{
    const uint64_t *from = (uint64_t *)((struct machine *)opaque)->disk + offset / 8;
    uint64_t *to = buf;

    for (size_t i = 0; i < len / 8; i++)
        to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
    return 0;
}

static int op_disk_write(void *opaque, unsigned disk, uint64_t offset, const void *buf, size_t len)
{
    struct machine *m = opaque;

    if (!m->disk_moves || disk || offset > sizeof(m->disk) || len > sizeof(m->disk) - offset)
        return -EPROTO;
    if (buf)
        memcpy((uint8_t *)m->disk + offset, buf, len);
    else
        memset((uint8_t *)m->disk + offset, 0, len);
    return 0;
}

static int op_disk_sync(void *opaque) { return 0; }

static void op_release(void *opaque) {}
static int op_reclaim(void *opaque) { return 0; }
static void op_throttle(void *opaque, unsigned percent) { ((struct machine *)opaque)->throttled = percent; }

static void op_progress(void *opaque, const struct migrate_progress *p)
{
    struct machine *m = opaque;

    m->stages |= 1u << p->stage;
    if (p->stage == MIGRATE_PRE_COPY)
        m->sent = p->bytes;
    if (p->stage == MIGRATE_PRE_COPY && m->by_reports && m->run)
        for (uint64_t page = 0; page < PAGES * (100 - m->throttled) / 100; page++)
            write_page(m, page);
}

static const struct migrate_source_ops source_ops = { op_describe, op_pause, op_resume, op_save, op_release, op_reclaim,
                                                      op_throttle, op_progress };

static int refuse(const char *why, char reason[MIGRATE_TEXT])
{
    snprintf(reason, MIGRATE_TEXT, "%s", why);
    return -EINVAL;
}

static int op_prepare(void *opaque, const char *description, size_t len, struct memory **memory, char reason[MIGRATE_TEXT])
{
    struct machine *m = opaque;

    if (m->refuse_prepare)
        return refuse(m->refuse_prepare, reason);
    if (strncmp(description, "{\"kind\":\"test\"}", len) != 0)
        return refuse("another machine", reason);
    *memory = &m->memory;
    return 0;
}

static bool op_in_kernel(void *opaque) { return false; }

static int op_load(void *opaque, const void *data, size_t len, char reason[MIGRATE_TEXT])
{
    struct machine *m = opaque;
    uint64_t first;

    if (m->refuse_load)
        return refuse(m->refuse_load, reason);
    if (len != sizeof(m->seq))
        return refuse("a state of another length", reason);
    memcpy(&m->seq, data, len);
    /* Loading may touch memory, also such that comes when touched, or that will not come any more. */
    memory_read(&m->memory, 3 * GUEST_PAGE_SIZE, &first, sizeof(first));
    return 0;
}

static int op_activate(void *opaque, char reason[MIGRATE_TEXT])
{
    struct machine *m = opaque;
    char byte;

    if (m->refuse_activate)
        return refuse(m->refuse_activate, reason);
    if (m->activate[0] && (write(m->activating[1], "", 1) != 1 || read(m->activate[0], &byte, 1) != 1))
        abort();
    set_running(m, true);
    return 0;
}

static void op_abandon(void *opaque) { ((struct machine *)opaque)->abandoned = true; }
static void op_orphan(void *opaque) { ((struct machine *)opaque)->orphaned = true; }

static const struct migrate_target_ops target_ops = { op_prepare, op_in_kernel, op_load, op_activate, op_abandon, op_orphan, op_progress, op_disk_write, op_disk_sync };

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

static int unix_socket(const char *path, bool listening)
{
    struct sockaddr_un un = { .sun_family = AF_UNIX };
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    strcpy(un.sun_path, path);
    if (listening ? bind(fd, (struct sockaddr *)&un, sizeof(un)) || listen(fd, 64) : connect(fd, (struct sockaddr *)&un, sizeof(un))) {
        close(fd);
        return -1;
    }
    return fd;
}

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
                b = unix_socket(r->to, false);
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
    snprintf(r->from, sizeof(r->from), "%s/link", folder);
    snprintf(r->to, sizeof(r->to), "%s/target", folder);
    unlink(r->from);
    r->fault = fault;
    r->at = at;
    r->heal_ms = 50;
    r->fd = unix_socket(r->from, true);
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

/* ---- one migration ---- */

struct trip {
    struct migrate_source_options options;
    struct migrate_disks disks;
    struct migrate_target_options target_options;
    struct machine a, b;
    struct migrate_source *source;
    struct migrate_target *target;
    struct migrate_result sent, received;
    _Atomic bool over;          /* at the source */
    pthread_t thread;
    char to[128], listen[128];
};

static void *target_main(void *opaque)
{
    struct trip *t = opaque;

    migrate_target_run(t->target, &t->received);
    return NULL;
}

static struct trip *trip_make(void)
{
    struct trip *t = calloc(1, sizeof(*t));

    machine_make(&t->a);
    machine_make(&t->b);
    snprintf(t->to, sizeof(t->to), "unix:%s/target", folder);
    snprintf(t->listen, sizeof(t->listen), "unix:%s/target", folder);
    t->options = (struct migrate_source_options){ .name = "test", .to = t->to, .downtime_ms = 300, .streams = 2,
                                                  .post_copy = MIGRATE_POST_COPY_NEVER, .timeout_ms = 20000, .settle_ms = 500 };
    t->target_options = (struct migrate_target_options){ .listen = t->listen, .timeout_ms = 20000, .settle_ms = 60000 };
    /* Contents to begin with, and a page that is there but zero. */
    for (uint64_t page = 0; page < PAGES / 2; page++)
        write_page(&t->a, page);
    memory_fill(&t->a.memory, (PAGES - 1) * GUEST_PAGE_SIZE, 0, GUEST_PAGE_SIZE);
    return t;
}

static void trip_with_disk(struct trip *t)
{
    t->a.disk_moves = t->b.disk_moves = true;
    t->disks = (struct migrate_disks){ 1, { sizeof(t->a.disk) }, &t->a, disks_start, disks_stop, disks_contents, disks_written, disks_read };
    t->options.disks = &t->disks;
    for (uint64_t block = 0; block < BLOCKS; block += 2)
        write_block(&t->a, block);
}

static void trip_target(struct trip *t, const char *tls)
{
    t->target_options.tls_dir = tls;
    t->target = migrate_target_create(&t->target_options, &target_ops, &t->b);
    assert_non_null(t->target);
    assert_int_equal(pthread_create(&t->thread, NULL, target_main, t), 0);
}

static void trip_source(struct trip *t)
{
    set_running(&t->a, true);
    t->source = migrate_source_create(&t->options, &source_ops, &t->a, &t->a.memory);
    assert_non_null(t->source);
    migrate_source_run(t->source, &t->sent);
}

static void trip_end(struct trip *t)
{
    migrate_source_free(t->source);
    migrate_target_free(t->target);
    machine_end(&t->a);
    machine_end(&t->b);
    free(t);
    assert_int_equal(running, 0);
}

/* It arrived: only the target's runs, and all of it is there. */
static void assert_arrived(struct trip *t)
{
    if (t->thread)
        pthread_join(t->thread, NULL);
    assert_int_equal(t->sent.end, MIGRATE_DONE);
    assert_int_equal(t->received.end, MIGRATE_DONE);
    assert_false(t->a.counted);
    assert_true(t->b.counted);
    set_running(&t->b, false);
    check_machine(&t->b);
    trip_end(t);
}

static void assert_stayed(struct trip *t, const char *why)
{
    migrate_target_cancel(t->target);
    pthread_join(t->thread, NULL);
    assert_int_equal(t->sent.end, MIGRATE_FAILED);
    if (!strstr(t->sent.reason, why))
        fail_msg("'%s' does not say '%s'", t->sent.reason, why);
    assert_true(t->a.counted);
    assert_false(t->b.counted);
    assert_int_equal(t->a.throttled, 0);
    assert_false(atomic_load(&t->a.memory.dirty_logging));
    set_running(&t->a, false);
    check_machine(&t->a);
    trip_end(t);
}

static void test_pre_copy(void **state)
{
    for (unsigned i = 0; i < 4; i++) {
        struct trip *t = trip_make();

        t->options.streams = (unsigned[]){ 1, 2, 5, 16 }[i];
        t->options.compress = i & 1;
        if (i >= 1)
            trip_with_disk(t);
        trip_target(t, NULL);
        trip_source(t);
        assert_int_equal(t->sent.disk_bytes != 0, i >= 1);
        assert_true(t->sent.rounds >= 1 && t->sent.bytes > 0);
        assert_int_equal(t->a.stages & 0x3f, 0x3f);
        assert_arrived(t);
    }
}

/* What the target has already is not sent again, and neither is what never had contents. */
static void test_skips(void **state)
{
    struct trip *t = trip_make();

    t->a.hot_pages = 1;
    trip_target(t, NULL);
    trip_source(t);
    assert_in_range(t->sent.pages_sent + t->sent.pages_zero, PAGES / 2, PAGES / 2 + 200);
    assert_arrived(t);
}

static void test_post_copy(void **state)
{
    char why[CHANNEL_ERROR_MAX];
    struct trip *t;

    if (!postcopy_usable(false, why)) {
        print_message("%s\n", why);
        skip();
    }
    t = trip_make();
    t->options.post_copy = MIGRATE_POST_COPY_NOW;
    t->options.bandwidth = 4 << 20;
    t->b.pause_us = 1000;
    trip_target(t, NULL);
    trip_source(t);
    assert_true(t->sent.post_copy);
    assert_true(t->sent.pages_requested > 0);
    assert_true(t->sent.downtime_ms < t->sent.total_ms);
    assert_arrived(t);
}

/* A guest that writes faster than the link, on however busy a host: post-copy where it is allowed, else it is slowed down. */
static void test_stalls(void **state)
{
    char why[CHANNEL_ERROR_MAX];

    for (unsigned i = 0; i < 2; i++) {
        struct trip *t = trip_make();

        t->options.post_copy = i && postcopy_usable(false, why) ? MIGRATE_POST_COPY_AUTO : MIGRATE_POST_COPY_NEVER;
        t->options.bandwidth = 12 << 20;
        t->options.downtime_ms = 30;
        t->a.hot_pages = 0;
        t->a.by_reports = true;
        t->b.pause_us = 1000;
        trip_target(t, NULL);
        trip_source(t);
        assert_int_equal(t->sent.post_copy, t->options.post_copy == MIGRATE_POST_COPY_AUTO);
        if (!t->sent.post_copy)
            assert_true(t->a.throttled > 0);
        assert_arrived(t);
    }
}

static void test_bandwidth(void **state)
{
    struct trip *t = trip_make();

    /* 2 MiB that are not zero. */
    t->options.bandwidth = 4 << 20;
    t->a.hot_pages = 1;
    trip_target(t, NULL);
    trip_source(t);
    assert_in_range(t->sent.total_ms, 350, 30000);
    assert_arrived(t);
}

static void test_refusals(void **state)
{
    for (unsigned i = 0; i < 3; i++) {
        struct trip *t = trip_make();
        static const char *const why[] = { "no disk here", "no such device", "cannot run" };

        *(i == 0 ? &t->b.refuse_prepare : i == 1 ? &t->b.refuse_load : &t->b.refuse_activate) = why[i];
        trip_target(t, NULL);
        trip_source(t);
        assert_stayed(t, why[i]);
    }
}

static void test_no_target(void **state)
{
    struct trip *t = trip_make();

    trip_target(t, NULL);
    snprintf(t->to, sizeof(t->to), "unix:%s/nobody", folder);
    trip_source(t);
    assert_stayed(t, "cannot connect");
}

static void *cancel_soon(void *opaque)
{
    struct trip *t = opaque;

    while (t->a.sent < 100000 && !t->over)
        nanosleep(&(struct timespec){ .tv_nsec = 1000000 }, NULL);
    return migrate_source_cancel(t->source, false) ? t : NULL;
}

static void test_cancel(void **state)
{
    struct trip *t = trip_make();
    pthread_t thread;
    void *cancelled;

    t->options.bandwidth = 1 << 20;
    trip_target(t, NULL);
    set_running(&t->a, true);
    t->source = migrate_source_create(&t->options, &source_ops, &t->a, &t->a.memory);
    assert_int_equal(pthread_create(&thread, NULL, cancel_soon, t), 0);
    migrate_source_run(t->source, &t->sent);
    t->over = true;
    pthread_join(thread, &cancelled);
    assert_non_null(cancelled);
    assert_stayed(t, "cancelled");
}

/* Strangers do not disturb a target that waits. */
static void test_strangers(void **state)
{
    static const char text[] = "GET / HTTP/1.0\r\n\r\n padding to the length of a header";
    struct trip *t = trip_make();
    char path[96];

    trip_target(t, NULL);
    snprintf(path, sizeof(path), "%s/target", folder);
    for (unsigned i = 0; i < 5; i++) {
        struct hello h = { .oldest = 7, .newest = 9, .kind = HELLO_CONTROL };
        struct channel *c = channel_from_fd(unix_socket(path, false), 2000);
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
    assert_arrived(t);
}

/* A connection of a source that the test plays itself. */
static struct channel *play(unsigned kind)
{
    struct hello h = { .oldest = MIGRATE_VERSION, .newest = MIGRATE_VERSION, .kind = kind, .session = "played" };
    char path[96], error[CHANNEL_ERROR_MAX];
    struct frame f = { 0 };
    uint8_t hello[HELLO_SIZE];
    struct channel *c;

    snprintf(path, sizeof(path), "%s/target", folder);
    c = channel_from_fd(unix_socket(path, false), 20000);
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
    assert_int_equal(bitmaps_alloc(&t->a.memory, missing), 0);
    missing[1][2] = 1;
    assert_int_equal(missing_send(control, &t->a.memory, missing), 0);
    bitmaps_free(missing);
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

/* ---- TLS ---- */

static gnutls_x509_privkey_t make_key(void)
{
    gnutls_x509_privkey_t key;

    assert_int_equal(gnutls_x509_privkey_init(&key), 0);
    assert_int_equal(gnutls_x509_privkey_generate(key, GNUTLS_PK_ECDSA, GNUTLS_CURVE_TO_BITS(GNUTLS_ECC_CURVE_SECP256R1), 0), 0);
    return key;
}

static gnutls_x509_crt_t make_certificate(const char *name, gnutls_x509_privkey_t key, gnutls_x509_crt_t issuer,
                                          gnutls_x509_privkey_t issuer_key)
{
    gnutls_x509_crt_t crt;
    uint8_t serial = (uint8_t)(strlen(name) + (issuer ? 1 : 0));

    gnutls_x509_crt_init(&crt);
    gnutls_x509_crt_set_version(crt, 3);
    gnutls_x509_crt_set_serial(crt, &serial, 1);
    gnutls_x509_crt_set_activation_time(crt, time(NULL) - 3600);
    gnutls_x509_crt_set_expiration_time(crt, time(NULL) + 3600);
    gnutls_x509_crt_set_dn_by_oid(crt, GNUTLS_OID_X520_COMMON_NAME, 0, name, (unsigned)strlen(name));
    gnutls_x509_crt_set_subject_alt_name(crt, GNUTLS_SAN_DNSNAME, name, (unsigned)strlen(name), GNUTLS_FSAN_SET);
    gnutls_x509_crt_set_key(crt, key);
    gnutls_x509_crt_set_basic_constraints(crt, issuer == NULL, -1);
    if (!issuer)
        gnutls_x509_crt_set_key_usage(crt, GNUTLS_KEY_KEY_CERT_SIGN);
    assert_int_equal(gnutls_x509_crt_sign2(crt, issuer ? issuer : crt, issuer_key, GNUTLS_DIG_SHA256, 0), 0);
    return crt;
}

static void write_pem(const char *dir, const char *name, gnutls_datum_t *pem)
{
    char path[160];
    FILE *f;

    snprintf(path, sizeof(path), "%s/%s", dir, name);
    f = fopen(path, "w");
    assert_non_null(f);
    fwrite(pem->data, 1, pem->size, f);
    fclose(f);
    gnutls_free(pem->data);
}

/* A folder with what --tls wants: certified for localhost by an authority that is new for each. */
static void make_tls(char dir[96], const char *name)
{
    gnutls_x509_privkey_t ca_key = make_key(), key = make_key();
    gnutls_x509_crt_t ca = make_certificate("authority", ca_key, NULL, ca_key);
    gnutls_x509_crt_t crt = make_certificate("localhost", key, ca, ca_key);
    gnutls_datum_t pem;

    snprintf(dir, 96, "%s/%s", folder, name);
    assert_int_equal(mkdir(dir, 0700), 0);
    assert_int_equal(gnutls_x509_crt_export2(ca, GNUTLS_X509_FMT_PEM, &pem), 0);
    write_pem(dir, "ca.pem", &pem);
    assert_int_equal(gnutls_x509_crt_export2(crt, GNUTLS_X509_FMT_PEM, &pem), 0);
    write_pem(dir, "cert.pem", &pem);
    assert_int_equal(gnutls_x509_privkey_export2(key, GNUTLS_X509_FMT_PEM, &pem), 0);
    write_pem(dir, "key.pem", &pem);
    gnutls_x509_crt_deinit(ca);
    gnutls_x509_crt_deinit(crt);
    gnutls_x509_privkey_deinit(ca_key);
    gnutls_x509_privkey_deinit(key);
}

static void remove_tls(const char *dir)
{
    static const char *const names[] = { "ca.pem", "cert.pem", "key.pem" };
    char path[160];

    for (unsigned i = 0; i < 3; i++) {
        snprintf(path, sizeof(path), "%s/%s", dir, names[i]);
        unlink(path);
    }
    rmdir(dir);
}

static void test_tls(void **state)
{
    char ours[96], theirs[96];
    char why[CHANNEL_ERROR_MAX];

    make_tls(ours, "ours");
    make_tls(theirs, "theirs");
    for (unsigned i = 0; i < 6; i++) {
        struct trip *t = trip_make();

        /* The same authority, by TCP to the certified name, in both ways of copying; then what must not work. */
        strcpy(t->listen, "tcp:localhost:0");
        trip_target(t, i == 5 ? NULL : ours);
        snprintf(t->to, sizeof(t->to), "tcp:%s:%u", i == 3 ? "127.0.0.1" : "localhost", migrate_target_port(t->target));
        t->options.tls_dir = i == 2 ? theirs : i == 4 ? NULL : ours;
        t->options.post_copy = i == 1 && postcopy_usable(false, why) ? MIGRATE_POST_COPY_NOW : MIGRATE_POST_COPY_NEVER;
        trip_source(t);
        if (i < 2)
            assert_arrived(t);
        else
            assert_stayed(t, (const char *const[]){ "certificate", "certificate", "want TLS", "use TLS" }[i - 2]);
    }
    remove_tls(ours);
    remove_tls(theirs);
}

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
        enum fault fault = 1 + next(&x) % (i % 8 == 0 ? 4 : 3);
        bool post_copy = next(&x) % 2 && postcopy_usable(false, why);
        /* Small, to be often where the machine changes hands; mostly within what all takes. */
        uint64_t at = next(&x) % 3 == 0 ? 1 + next(&x) % 2500000 : 2100000 + next(&x) % 40000;

        /* A target that runs waits for its memory as long as it takes, so this link heals. */
        if (post_copy && fault != FAULT_DAMAGE)
            fault = FAULT_CUT_FOR_A_WHILE;
        if (post_copy && next(&x) % 2)
            at = 1 + next(&x) % 30000;
        if (next(&x) % 2) {
            trip_with_disk(t);
            /* All of it once, and what is written meanwhile. */
            at += at > 2000000 ? sizeof(t->a.disk) + next(&x) % 3 * MIGRATE_DISK_GRANULE : 0;
        }
        t->a.hot_pages = 4;
        t->a.pause_us = 2000;
        t->options.post_copy = post_copy ? MIGRATE_POST_COPY_NOW : MIGRATE_POST_COPY_NEVER;
        t->options.streams = 1 + next(&x) % 3;
        t->options.timeout_ms = 400;
        t->target_options.timeout_ms = 2000;
        trip_target(t, NULL);
        relay_begin(&r, fault, at);
        snprintf(t->to, sizeof(t->to), "unix:%s", r.from);
        set_running(&t->a, true);
        t->source = migrate_source_create(&t->options, &source_ops, &t->a, &t->a.memory);
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
                set_running(&t->b, false);
            }
            if (t->received.end != MIGRATE_DONE)
                set_running(&t->a, true);
        }
        if (running != 1)
            fail_msg("fault %d at byte %llu, seed %llu round %u: source %s (%s), target %s (%s): %d machines run", fault,
                     (unsigned long long)at, (unsigned long long)seed, i, migrate_stage_name(t->sent.end), t->sent.reason,
                     migrate_stage_name(t->received.end), t->received.reason, running);
        set_running(&t->a, false);
        set_running(&t->b, false);
        check_machine(t->received.end == MIGRATE_DONE ? &t->b : &t->a);
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
    assert_arrived(t);
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

static int set_up(void **state)
{
    strcpy(folder, "/tmp/test_migrate.XXXXXX");
    return mkdtemp(folder) ? 0 : -1;
}

static int tear_down(void **state) { return rmdir(folder); }

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_pre_copy), cmocka_unit_test(test_skips),     cmocka_unit_test(test_post_copy),
        cmocka_unit_test(test_stalls),   cmocka_unit_test(test_bandwidth), cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_no_target), cmocka_unit_test(test_cancel),   cmocka_unit_test(test_strangers), cmocka_unit_test(test_no_refusal_once_taken),
        cmocka_unit_test(test_tls),      cmocka_unit_test(test_last_pages), cmocka_unit_test(test_faults),
    };

    if (argc > 1)
        rounds = (unsigned)strtoul(argv[1], NULL, 0);
    if (argc > 2)
        seed = strtoull(argv[2], NULL, 0);
    if (!getenv("MIGRATE_LOG"))
        log_set_level(-1);
    else
        log_set_level(LOG_INFO);
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
