/* See migrate_trip.h. */
#include "migrate_trip.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"

char trip_folder[64];
_Atomic int machines_running;

uint64_t trip_random(uint64_t *x)
{
    *x ^= *x << 13;
    *x ^= *x >> 7;
    *x ^= *x << 17;
    return *x;
}

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
        write_page(m, trip_random(&m->random) % m->hot_pages);
        if (m->disk_moves)
            write_block(m, trip_random(&m->random) % MIN(BLOCKS, m->hot_pages));
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
    m->made = true;
}

void machine_run(struct machine *m, bool run)
{
    pthread_mutex_lock(&m->lock);
    if (run && !m->started) {
        assert_int_equal(pthread_create(&m->thread, NULL, machine_main, m), 0);
        m->started = true;
    }
    m->run = run;
    if (run && !m->counted) {
        m->counted = true;
        if (atomic_fetch_add(&machines_running, 1) != 0) {
            fprintf(stderr, "two machines run\n");
            abort();
        }
    }
    pthread_cond_broadcast(&m->changed);
    while (!run && m->in_write)
        pthread_cond_wait(&m->changed, &m->lock);
    if (!run && m->counted) {
        m->counted = false;
        atomic_fetch_sub(&machines_running, 1);
    }
    pthread_mutex_unlock(&m->lock);
}

static void machine_end(struct machine *m)
{
    if (!m->made)
        return;
    machine_run(m, false);
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

void machine_check(struct machine *m)
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
    machine_run(opaque, false);
    return 0;
}

static int op_resume(void *opaque)
{
    machine_run(opaque, true);
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
    return 0;
}

static void op_run(void *opaque)
{
    struct machine *m = opaque;
    uint64_t first;

    /* Devices may need memory before anything runs, which in post-copy has yet to come. */
    memory_read(&m->memory, 5 * GUEST_PAGE_SIZE, &first, sizeof(first));
    machine_run(m, true);
}

static void op_abandon(void *opaque) { ((struct machine *)opaque)->abandoned = true; }
static void op_orphan(void *opaque) { ((struct machine *)opaque)->orphaned = true; }

static const struct migrate_target_ops target_ops = { op_prepare, op_in_kernel, op_load, op_activate, op_run, op_abandon, op_orphan, op_progress, op_disk_write, op_disk_sync };

/* ---- one migration ---- */

static void *target_main(void *opaque)
{
    struct trip *t = opaque;

    migrate_target_run(t->target, &t->received);
    return NULL;
}

struct trip *trip_make(void)
{
    struct trip *t = calloc(1, sizeof(*t));

    machine_make(&t->a);
    machine_make(&t->b);
    snprintf(t->to, sizeof(t->to), "unix:%s/target", trip_folder);
    snprintf(t->listen, sizeof(t->listen), "unix:%s/target", trip_folder);
    t->options = (struct migrate_source_options){ .name = "test", .to = t->to, .downtime_ms = 300, .streams = 2,
                                                  .post_copy = MIGRATE_POST_COPY_NEVER, .timeout_ms = 20000, .settle_ms = 500 };
    t->target_options = (struct migrate_target_options){ .listen = t->listen, .timeout_ms = 20000, .settle_ms = 60000 };
    /* Contents to begin with, and a page that is there but zero. */
    for (uint64_t page = 0; page < PAGES / 2; page++)
        write_page(&t->a, page);
    memory_fill(&t->a.memory, (PAGES - 1) * GUEST_PAGE_SIZE, 0, GUEST_PAGE_SIZE);
    return t;
}

void trip_with_disk(struct trip *t)
{
    t->a.disk_moves = t->b.disk_moves = true;
    t->disks = (struct migrate_disks){ 1, { sizeof(t->a.disk) }, &t->a, disks_start, disks_stop, disks_contents, disks_written, disks_read };
    t->options.disks = &t->disks;
    for (uint64_t block = 0; block < BLOCKS; block += 2)
        write_block(&t->a, block);
}

void trip_target(struct trip *t, const char *tls)
{
    t->target_options.tls_dir = tls;
    t->target = migrate_target_create(&t->target_options, &target_ops, &t->b);
    assert_non_null(t->target);
    assert_int_equal(pthread_create(&t->thread, NULL, target_main, t), 0);
}

void trip_source_make(struct trip *t)
{
    machine_run(&t->a, true);
    t->source = migrate_source_create(&t->options, &source_ops, &t->a, &t->a.memory);
    assert_non_null(t->source);
}

void trip_source(struct trip *t)
{
    trip_source_make(t);
    migrate_source_run(t->source, &t->sent);
}

void trip_end(struct trip *t)
{
    migrate_source_free(t->source);
    migrate_target_free(t->target);
    machine_end(&t->a);
    machine_end(&t->b);
    free(t);
    assert_int_equal(machines_running, 0);
}

void trip_arrived(struct trip *t)
{
    if (t->thread)
        pthread_join(t->thread, NULL);
    assert_int_equal(t->sent.end, MIGRATE_DONE);
    assert_int_equal(t->received.end, MIGRATE_DONE);
    assert_false(t->a.counted);
    assert_true(t->b.counted);
    machine_run(&t->b, false);
    machine_check(&t->b);
    trip_end(t);
}

void trip_stayed(struct trip *t, const char *why)
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
    machine_run(&t->a, false);
    machine_check(&t->a);
    trip_end(t);
}

/* ---- a program's tests ---- */

int trip_socket(const char *path, bool listening)
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

static int set_up(void **state)
{
    strcpy(trip_folder, "/tmp/test_migrate.XXXXXX");
    return mkdtemp(trip_folder) ? 0 : -1;
}

static int tear_down(void **state) { return rmdir(trip_folder); }

int trip_run_tests(const char *name, const struct CMUnitTest *tests, size_t count)
{
    /* Pages of zeroes that are sent are counted: the host is not to make contents of those beside a page by making it a huge one. */
    prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
    log_set_level(getenv("MIGRATE_LOG") ? LOG_INFO : -1);
    return _cmocka_run_group_tests(name, tests, count, set_up, tear_down);
}
