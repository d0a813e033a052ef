/*
 * The split ring code alone: chains of every kind, and those that a guest must not make.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <stdlib.h>

#include <linux/virtio_ring.h>

#include "base/log.h"
#include "base/state.h"
#include "base/util.h"
#include "device/virtio/queue.h"

#define SIZE  8u
#define DESC  0x1000u
#define AVAIL 0x2000u
#define USED  0x3000u
#define DATA  0x10000u
#define TABLE 0x20000u
#define SPLIT 0x80000u /* two regions meet here */
#define END   0x100000u

struct fixture {
    struct memory memory;
    struct virtq q;
    struct virtq_chain c;
    uint16_t avail_idx;
};

static int setup(void **state)
{
    struct fixture *f = calloc(1, sizeof(*f));
    assert_non_null(f);
    assert_int_equal(memory_init(&f->memory), 0);
    assert_int_equal(memory_add_ram(&f->memory, 0, SPLIT), 0);
    assert_int_equal(memory_add_ram(&f->memory, SPLIT, END - SPLIT), 0);
    f->q = (struct virtq){.memory = &f->memory, .owner = "test", .max_size = SIZE};
    virtq_reset(&f->q);
    f->q.desc = DESC;
    f->q.avail = AVAIL;
    f->q.used = USED;
    f->q.enabled = true;
    f->q.indirect = true;
    log_set_level(LOG_ERROR);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    struct fixture *f = *state;
    memory_destroy(&f->memory);
    free(f);
    return 0;
}

static void put(struct fixture *f, gpa_t at, const void *data, size_t len)
{
    assert_int_equal(memory_write(&f->memory, at, data, len), 0);
}

static void put16(struct fixture *f, gpa_t at, uint16_t v)
{
    put(f, at, &v, 2);
}

static uint32_t get(struct fixture *f, gpa_t at, size_t len)
{
    uint32_t v = 0;
    assert_int_equal(memory_read(&f->memory, at, &v, len), 0);
    return v;
}

static void desc_at(struct fixture *f, gpa_t table, unsigned i, uint64_t addr, uint32_t len,
                    uint16_t flags, uint16_t next)
{
    const struct vring_desc d = {.addr = addr, .len = len, .flags = flags, .next = next};
    put(f, table + 16 * i, &d, sizeof(d));
}

static void desc(struct fixture *f, unsigned i, uint64_t addr, uint32_t len, uint16_t flags,
                 uint16_t next)
{
    desc_at(f, DESC, i, addr, len, flags, next);
}

static void offer(struct fixture *f, uint16_t head)
{
    put16(f, AVAIL + 4 + 2 * (f->avail_idx % SIZE), head);
    put16(f, AVAIL + 2, ++f->avail_idx);
}

#define NEXT     VRING_DESC_F_NEXT
#define WRITE    VRING_DESC_F_WRITE
#define INDIRECT VRING_DESC_F_INDIRECT

static void test_empty(void **state)
{
    struct fixture *f = *state;
    assert_int_equal(virtq_check(&f->q), 0);
    assert_int_equal(virtq_pop(&f->q, &f->c), 0);
    assert_false(virtq_has_work(&f->q));
}

static void test_chain(void **state)
{
    struct fixture *f = *state;
    f->memory.dirty_logging = true;
    desc(f, 3, DATA, 100, NEXT, 7);
    desc(f, 7, DATA + 0x1000, 50, NEXT | WRITE, 1);
    desc(f, 1, DATA + 0x3000, 4096, WRITE, 0);
    offer(f, 3);
    assert_true(virtq_has_work(&f->q));
    assert_int_equal(virtq_pop(&f->q, &f->c), 1);
    assert_int_equal(f->c.head, 3);
    assert_int_equal(f->c.out_count, 1);
    assert_int_equal(f->c.in_count, 2);
    assert_int_equal(f->c.out_len, 100);
    assert_int_equal(f->c.in_len, 50 + 4096);
    assert_ptr_equal(virtq_out(&f->c)[0].iov_base, f->memory.region[0].host + DATA);
    assert_ptr_equal(virtq_in(&f->c)[1].iov_base, f->memory.region[0].host + DATA + 0x3000);
    assert_int_equal(virtq_pop(&f->q, &f->c), 0);

    /* 60 bytes: all of the first buffer and ten of the second. Only written pages become dirty. */
    assert_int_equal(virtq_put(&f->q, &f->c, 60), 0);
    assert_int_equal(get(f, USED + 2, 2), 0);
    assert_int_equal(virtq_publish(&f->q), 0);
    assert_int_equal(get(f, USED + 2, 2), 1);
    assert_int_equal(get(f, USED + 4, 4), 3);
    assert_int_equal(get(f, USED + 8, 4), 60);
    _Atomic uint8_t *flags = f->memory.region[0].flags;
    assert_true(flags[(DATA + 0x1000) >> 12] & PAGE_DIRTY);
    assert_true(flags[(DATA + 0x3000) >> 12] & PAGE_DIRTY);
    assert_true(flags[USED >> 12] & PAGE_DIRTY);
    assert_false(flags[DATA >> 12] & PAGE_DIRTY);
}

static void test_wraps_around(void **state)
{
    struct fixture *f = *state;
    /* Past 65536 entries, both indexes wrap. */
    for (unsigned i = 0; i < 70000; i++) {
        uint16_t head = (uint16_t)(i % SIZE);
        desc(f, head, DATA + i % 16, 1, WRITE, 0);
        offer(f, head);
        assert_int_equal(virtq_pop(&f->q, &f->c), 1);
        assert_int_equal(f->c.head, head);
        assert_int_equal(virtq_put(&f->q, &f->c, 1), 0);
        assert_int_equal(virtq_publish(&f->q), 0);
        assert_int_equal(get(f, USED + 2, 2), (uint16_t)(i + 1));
    }
}

static void test_indirect(void **state)
{
    struct fixture *f = *state;
    /* A normal descriptor, and then a table: §2.7.7.3.2 wants both. */
    desc(f, 0, DATA, 16, NEXT, 1);
    desc(f, 1, TABLE, 20 * 16, INDIRECT, 0);
    for (unsigned i = 0; i < 20; i++)
        desc_at(f, TABLE, i, DATA + 0x100 * i, 0x100, (i < 19 ? NEXT : 0) | (i >= 5 ? WRITE : 0),
                (uint16_t)(i + 1));
    offer(f, 0);
    assert_int_equal(virtq_pop(&f->q, &f->c), 1);
    assert_int_equal(f->c.out_count, 6);
    assert_int_equal(f->c.in_count, 15);
    assert_int_equal(f->c.in_len, 15 * 0x100);
}

static void test_buffer_across_regions(void **state)
{
    struct fixture *f = *state;
    desc(f, 0, SPLIT - 100, 300, WRITE, 0);
    offer(f, 0);
    assert_int_equal(virtq_pop(&f->q, &f->c), 1);
    assert_int_equal(f->c.in_count, 2);
    assert_int_equal(f->c.iov[0].iov_len, 100);
    assert_int_equal(f->c.iov[1].iov_len, 200);
    assert_ptr_equal(f->c.iov[1].iov_base, f->memory.region[1].host);
}

static void test_unpop_and_unstage(void **state)
{
    struct fixture *f = *state;
    for (unsigned i = 0; i < 3; i++) {
        desc(f, i, DATA, 8, WRITE, 0);
        offer(f, (uint16_t)i);
    }
    for (unsigned i = 0; i < 3; i++) {
        assert_int_equal(virtq_pop(&f->q, &f->c), 1);
        assert_int_equal(virtq_put(&f->q, &f->c, 8), 0);
    }
    virtq_unstage(&f->q);
    virtq_unpop(&f->q, 3);
    assert_int_equal(virtq_publish(&f->q), 0);
    assert_int_equal(get(f, USED + 2, 2), 0);
    for (unsigned i = 0; i < 3; i++) {
        assert_int_equal(virtq_pop(&f->q, &f->c), 1);
        assert_int_equal(f->c.head, i);
    }
    assert_int_equal(f->q.in_flight, 3);
}

/* One descriptor, or a few, that the guest must not give. The queue stays where it was. */
struct bad {
    const char *what;
    struct vring_desc d[3];
    struct vring_desc table[3]; /* at TABLE */
    uint16_t head;
    bool without_indirect;
};

static const struct bad bad_chains[] = {
    {"head beyond the table", .head = SIZE},
    {"head far beyond the table", .head = 0xffff},
    {"loop of one", {{DATA, 8, NEXT, 0}}},
    {"loop of two", {{DATA, 8, NEXT, 1}, {DATA, 8, NEXT, 0}}},
    {"next beyond the table", {{DATA, 8, NEXT, SIZE}}},
    {"empty buffer", {{DATA, 0, 0, 0}}},
    {"readable behind writable", {{DATA, 8, NEXT | WRITE, 1}, {DATA, 8, 0, 0}}},
    {"outside of RAM", {{END, 8, 0, 0}}},
    {"past the end of RAM", {{END - 4, 8, WRITE, 0}}},
    {"wraps around", {{UINT64_MAX - 3, 8, WRITE, 0}}},
    {"wraps around into RAM", {{UINT64_MAX - 0xfff, 0x80000000, WRITE, 0}}},
    {"4 GiB in all", {{DATA, 0xffffffff, NEXT, 1}, {DATA, 8, 0, 0}}},
    {"indirect not negotiated",
     {{TABLE, 16, INDIRECT, 0}},
     {{DATA, 8, 0, 0}},
     .without_indirect = true},
    {"indirect with next", {{TABLE, 16, INDIRECT | NEXT, 1}, {DATA, 8, 0, 0}}, {{DATA, 8, 0, 0}}},
    {"indirect of length 0", {{TABLE, 0, INDIRECT, 0}}},
    {"indirect of odd length", {{TABLE, 24, INDIRECT, 0}}, {{DATA, 8, 0, 0}}},
    {"indirect table outside of RAM", {{END, 16, INDIRECT, 0}}},
    {"indirect table past the end", {{END - 16, 32, INDIRECT, 0}}},
    {"indirect table that wraps", {{UINT64_MAX - 15, 32, INDIRECT, 0}}},
    {"indirect in indirect", {{TABLE, 32, INDIRECT, 0}}, {{TABLE, 16, INDIRECT, 0}}},
    {"loop in the table", {{TABLE, 32, INDIRECT, 0}}, {{DATA, 8, NEXT, 1}, {DATA, 8, NEXT, 0}}},
    {"next beyond the indirect table",
     {{TABLE, 32, INDIRECT, 0}},
     {{DATA, 8, NEXT, 2}, {0}, {DATA, 8, 0, 0}}},
    {"empty buffer in the table", {{TABLE, 16, INDIRECT, 0}}, {{DATA, 0, 0, 0}}},
    {"direction across the table",
     {{DATA, 8, NEXT | WRITE, 1}, {TABLE, 16, INDIRECT, 0}},
     {{DATA, 8, 0, 0}}},
};

static void test_bad_chains(void **state)
{
    struct fixture *f = *state;
    for (unsigned i = 0; i < ARRAY_SIZE(bad_chains); i++) {
        const struct bad *b = &bad_chains[i];
        put(f, DESC, b->d, sizeof(b->d));
        put(f, TABLE, b->table, sizeof(b->table));
        f->q.indirect = !b->without_indirect;
        f->q.last_avail = f->avail_idx;
        offer(f, b->head);
        if (virtq_pop(&f->q, &f->c) != -EINVAL)
            fail_msg("accepted: %s", b->what);
        assert_int_equal(f->q.last_avail, (uint16_t)(f->avail_idx - 1));
        assert_int_equal(f->q.in_flight, 0);
    }
}

static void test_too_many_segments(void **state)
{
    struct fixture *f = *state;
    desc(f, 0, TABLE, 0x10000 * 16 / 16, INDIRECT, 0);
    /* A table that is a loop of itself, and longer than any chain may be. */
    for (unsigned i = 0; i < 0x1000; i++)
        desc_at(f, TABLE, i, DATA, 1, NEXT, (uint16_t)((i + 1) % 0x1000));
    offer(f, 0);
    assert_int_equal(virtq_pop(&f->q, &f->c), -EINVAL);
    /* The longest chain is fine. */
    desc_at(f, TABLE, VIRTQ_MAX_SEGMENTS - 1, DATA, 1, 0, 0);
    assert_int_equal(virtq_pop(&f->q, &f->c), 1);
    assert_int_equal(f->c.out_count, VIRTQ_MAX_SEGMENTS);
}

static void test_avail_index(void **state)
{
    struct fixture *f = *state;
    desc(f, 0, DATA, 8, 0, 0);
    put16(f, AVAIL + 2, SIZE + 1);
    assert_int_equal(virtq_pop(&f->q, &f->c), -EINVAL);
    put16(f, AVAIL + 2, 0xffff);
    assert_int_equal(virtq_pop(&f->q, &f->c), -EINVAL);
    put16(f, AVAIL + 2, SIZE);
    for (unsigned i = 0; i < SIZE; i++)
        assert_int_equal(virtq_pop(&f->q, &f->c), 1);
    /* The same head again and again: more in flight than there can be. */
    put16(f, AVAIL + 2, SIZE + 1);
    assert_int_equal(virtq_pop(&f->q, &f->c), -EINVAL);
}

static void test_bad_rings(void **state)
{
    struct fixture *f = *state;
    const struct virtq good = f->q;
    struct {
        gpa_t *which;
        gpa_t value;
    } bad[] = {
        {&f->q.desc, DESC + 8},       {&f->q.avail, AVAIL + 1},
        {&f->q.used, USED + 2},       {&f->q.desc, END},
        {&f->q.avail, END - 4},       {&f->q.used, END - 4},
        {&f->q.desc, SPLIT - 16},     {&f->q.avail, UINT64_MAX - 1},
        {&f->q.used, UINT64_MAX - 3}, {&f->q.desc, UINT64_MAX - 15},
    };
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
        f->q = good;
        *bad[i].which = bad[i].value;
        assert_int_equal(virtq_check(&f->q), -EINVAL);
    }
    f->q = good;
    f->q.size = 6;
    assert_int_equal(virtq_check(&f->q), -EINVAL);
    f->q.size = 2 * SIZE;
    assert_int_equal(virtq_check(&f->q), -EINVAL);

    /* A ring that is gone later is an error as well, and no more. */
    f->q = good;
    f->q.avail = END;
    assert_int_equal(virtq_pop(&f->q, &f->c), -EINVAL);
    assert_false(virtq_has_work(&f->q));
    assert_false(virtq_wants_interrupt(&f->q));
    f->q = good;
    f->q.used = END;
    virtq_notify_off(&f->q);
    virtq_notify_on(&f->q);
    desc(f, 0, DATA, 8, 0, 0);
    offer(f, 0);
    assert_int_equal(virtq_pop(&f->q, &f->c), 1);
    assert_int_equal(virtq_put(&f->q, &f->c, 0), -EINVAL);
}

static void pass_one(struct fixture *f)
{
    desc(f, 0, DATA, 8, WRITE, 0);
    offer(f, 0);
    assert_int_equal(virtq_pop(&f->q, &f->c), 1);
    assert_int_equal(virtq_put(&f->q, &f->c, 8), 0);
    assert_int_equal(virtq_publish(&f->q), 0);
}

static void test_flags(void **state)
{
    struct fixture *f = *state;
    pass_one(f);
    assert_true(virtq_wants_interrupt(&f->q));
    /* Nothing new: nothing to tell. */
    assert_false(virtq_wants_interrupt(&f->q));
    put16(f, AVAIL, VRING_AVAIL_F_NO_INTERRUPT);
    pass_one(f);
    assert_false(virtq_wants_interrupt(&f->q));

    virtq_notify_off(&f->q);
    assert_int_equal(get(f, USED, 2), VRING_USED_F_NO_NOTIFY);
    assert_false(virtq_notify_on(&f->q));
    assert_int_equal(get(f, USED, 2), 0);
    offer(f, 0);
    assert_true(virtq_notify_on(&f->q));
}

static void test_event_index(void **state)
{
    struct fixture *f = *state;
    const gpa_t used_event = AVAIL + 4 + 2 * SIZE, avail_event = USED + 4 + 8 * SIZE;
    f->q.event_idx = true;
    /* NO_INTERRUPT means nothing now. */
    put16(f, AVAIL, VRING_AVAIL_F_NO_INTERRUPT);
    pass_one(f);
    assert_true(virtq_wants_interrupt(&f->q));
    /* "Tell me when the fourth is used." */
    put16(f, used_event, 3);
    pass_one(f);
    assert_false(virtq_wants_interrupt(&f->q));
    pass_one(f);
    assert_false(virtq_wants_interrupt(&f->q));
    pass_one(f);
    assert_true(virtq_wants_interrupt(&f->q));
    assert_false(virtq_wants_interrupt(&f->q));
    /* A batch that jumps over the event. */
    put16(f, used_event, 5);
    pass_one(f);
    pass_one(f);
    pass_one(f);
    assert_true(virtq_wants_interrupt(&f->q));

    /* So many since the last look that the indexes could mislead: better one too many. */
    put16(f, used_event, (uint16_t)(f->q.used_idx - 1));
    for (unsigned i = 0; i < 65536; i++)
        pass_one(f);
    assert_true(virtq_wants_interrupt(&f->q));
    assert_false(virtq_wants_interrupt(&f->q));

    assert_false(virtq_notify_on(&f->q));
    assert_int_equal(get(f, avail_event, 2), f->avail_idx);
    assert_int_equal(get(f, USED, 2), 0);
    virtq_notify_off(&f->q);
    assert_int_equal(get(f, USED, 2), 0);
}

static void test_saved_state(void **state)
{
    struct fixture *f = *state;
    f->q.event_idx = true;
    pass_one(f);
    virtq_wants_interrupt(&f->q);
    pass_one(f);
    f->q.vector = 1;

    struct state_writer *w = state_writer_create();
    state_begin(w, "q", 1);
    virtq_save(&f->q, w);
    state_end(w);
    const void *data;
    size_t len;
    assert_int_equal(state_writer_finish(w, &data, &len), 0);
    struct state_reader root, r;
    state_reader_init(&root, data, len);
    assert_int_equal(state_open(&root, "q", &r), 0);

    struct virtq copy = {.memory = &f->memory, .owner = "copy", .max_size = SIZE};
    virtq_reset(&copy);
    assert_int_equal(virtq_load(&copy, &r, 2), 0);
    copy.owner = f->q.owner;
    copy.event_idx = true;
    copy.indirect = true;
    assert_memory_equal(&copy, &f->q, sizeof(copy));

    log_set_level(LOG_ERROR - 1);
    assert_int_equal(virtq_load(&copy, &r, 1), -EINVAL); /* the vector does not exist */
    copy.max_size = 4;
    assert_int_equal(virtq_load(&copy, &r, 2), -EINVAL);
    copy.max_size = SIZE;
    copy.index = 1;
    assert_int_equal(virtq_load(&copy, &r, 2), -EINVAL);
    state_writer_free(w);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_empty),
        TEST(test_chain),
        TEST(test_wraps_around),
        TEST(test_indirect),
        TEST(test_buffer_across_regions),
        TEST(test_unpop_and_unstage),
        TEST(test_bad_chains),
        TEST(test_too_many_segments),
        TEST(test_avail_index),
        TEST(test_bad_rings),
        TEST(test_flags),
        TEST(test_event_index),
        TEST(test_saved_state),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
