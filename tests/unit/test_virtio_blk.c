/*
 * virtio-blk with a disk made of this file: requests wait until the test lets them end, so that
 * order, errors, reset and drain can be chosen.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <stdlib.h>

#include <linux/virtio_blk.h>
#include <linux/virtio_config.h>
#include <linux/virtio_pci.h>
#include <linux/virtio_ring.h>

#include "backend/block/block.h"
#include "base/log.h"
#include "base/util.h"
#include "virtio_guest.h"

#define SECTORS 2048u

/* ---- The disk: the functions of backend/block that the device links with. ---- */

static struct block {
    uint8_t data[SECTORS * 512];
    bool readonly, no_discard;
    uint64_t size; /* 0: that of data; what lies beyond is never reached */
    struct block_request *first, **last;
    unsigned ops[5]; /* finished, by kind */
    bool may_unmap;  /* of the last write zeroes */
    int fail;        /* what the next request ends with */
    bool closed;
} disk;

uint64_t block_size(const struct block *b)
{
    return b->size ? b->size : sizeof(b->data);
}
bool block_readonly(const struct block *b)
{
    return b->readonly;
}
bool block_can_discard(const struct block *b)
{
    return !b->no_discard;
}
bool block_writeback(const struct block *b)
{
    return true;
}

void block_submit(struct block *b, struct block_request *r)
{
    r->next = NULL;
    *b->last = r;
    b->last = &r->next;
}

static int perform(struct block *b, struct block_request *r)
{
    uint64_t at = r->offset;
    assert_true(at % 512 == 0 && at <= sizeof(b->data));
    if (r->op == BLOCK_DISCARD || r->op == BLOCK_WRITE_ZEROES) {
        assert_true(r->len && r->len <= sizeof(b->data) - at);
        memset(b->data + at, r->op == BLOCK_DISCARD ? 0xdd : 0, r->len);
    }
    if (r->op == BLOCK_WRITE_ZEROES)
        b->may_unmap = r->may_unmap;
    for (unsigned i = 0; i < r->iovcnt; i++) {
        assert_true(r->iov[i].iov_len <= sizeof(b->data) - at);
        if (r->op == BLOCK_READ)
            memcpy(r->iov[i].iov_base, b->data + at, r->iov[i].iov_len);
        else
            memcpy(b->data + at, r->iov[i].iov_base, r->iov[i].iov_len);
        at += r->iov[i].iov_len;
    }
    return 0;
}

/* Ends the oldest request; false: there is none. */
static bool finish_one(struct block *b)
{
    struct block_request *r = b->first;
    if (!r)
        return false;
    b->first = r->next;
    if (!b->first)
        b->last = &b->first;
    int status = b->fail ? b->fail : perform(b, r);
    b->fail = 0;
    b->ops[r->op]++;
    r->done(r->opaque, status);
    return true;
}

void block_drain(struct block *b)
{
    while (finish_one(b))
        ;
}

void block_close(struct block *b)
{
    block_drain(b);
    b->closed = true;
}

/* ---- The guest. ---- */

static struct guest g;
static struct driver d;
static struct ring r;
static gpa_t header, status, data;

static void make(void)
{
    memset(&disk.ops, 0, sizeof(disk.ops));
    disk.first = NULL;
    disk.last = &disk.first;
    for (size_t i = 0; i < sizeof(disk.data); i++)
        disk.data[i] = (uint8_t)(i / 512 + i);
    guest_init(&g);
    assert_non_null(virtio_blk_create(
        &g.m, g.host, &disk, &(struct virtio_blk_options){.serial = "abcdefghijklmnopqrstuvwxyz"}));
    driver_find(&d, &g, 0x1042);
    driver_msix(&d);
    header = guest_alloc(&g, 16, 16);
    status = guest_alloc(&g, 1, 1);
    data = guest_alloc(&g, 0x10000, 4096);
}

static void start(uint64_t features)
{
    driver_negotiate(&d, features);
    ring_setup(&r, &d, 0, 64);
    driver_start(&d);
}

#define ALL_FEATURES                                                     \
    (VIRTIO_BIT(VIRTIO_BLK_F_FLUSH) | VIRTIO_BIT(VIRTIO_BLK_F_DISCARD) | \
     VIRTIO_BIT(VIRTIO_BLK_F_WRITE_ZEROES))

static int setup(void **state)
{
    log_set_level(LOG_ERROR);
    memset(&disk, 0, sizeof(disk));
    make();
    start(ALL_FEATURES);
    return 0;
}

static int teardown(void **state)
{
    guest_destroy(&g);
    assert_true(disk.closed);
    return 0;
}

static void put_header(uint32_t type, uint64_t sector)
{
    const struct virtio_blk_outhdr h = {.type = type, .sector = sector};
    guest_put(&g, header, &h, sizeof(h));
    guest_put(&g, status, &(uint8_t){0xee}, 1);
}

/* Gives the guest's request to the device; nothing is finished yet. */
static void submit(uint32_t type, uint64_t sector, uint32_t len, bool in)
{
    put_header(type, sector);
    struct buffer b[3] = {{header, 16, false}};
    unsigned n = 1;
    if (len)
        b[n++] = (struct buffer){data, len, in};
    b[n++] = (struct buffer){status, 1, true};
    ring_add(&r, b, n);
    ring_notify(&r);
    guest_run(&g);
}

static uint8_t get_status(void)
{
    uint8_t s;
    guest_get(&g, status, &s, 1);
    return s;
}

/* A whole request; returns its status. */
static uint8_t request(uint32_t type, uint64_t sector, uint32_t len, bool in)
{
    uint32_t head, used;
    submit(type, sector, len, in);
    pthread_mutex_lock(&g.m.lock);
    block_drain(&disk);
    pthread_mutex_unlock(&g.m.lock);
    assert_true(ring_used(&r, &head, &used));
    assert_false(ring_used(&r, &head, &used));
    assert_int_equal(used, (in ? len : 0) + 1);
    return get_status();
}

static uint8_t range(uint32_t type, uint64_t sector, uint32_t sectors, uint32_t flags)
{
    const struct virtio_blk_discard_write_zeroes seg = {sector, sectors, flags};
    guest_put(&g, data, &seg, sizeof(seg));
    return request(type, 0, sizeof(seg), false);
}

static void test_configuration(void **state)
{
    struct virtio_blk_config c;
    for (unsigned i = 0; i < 60; i++)
        ((uint8_t *)&c)[i] = (uint8_t)bus_read(&g.m.mmio, d.device + i, 1);
    assert_int_equal(c.capacity, SECTORS);
    assert_int_equal(bus_read(&g.m.mmio, d.device, 8), SECTORS);
    assert_int_equal(c.blk_size, 512);
    assert_true(c.seg_max >= 64 && c.seg_max <= 254);
    assert_true(c.max_discard_sectors && c.max_write_zeroes_sectors);
    assert_int_equal(c.write_zeroes_may_unmap, 1);
    assert_int_equal(bus_read(&g.m.mmio, d.device + 60, 4), 0xffffffff);
    assert_int_equal(bus_read(&g.m.mmio, d.device + 58, 4), 0xffff0000);
}

static void test_read_and_write(void **state)
{
    uint8_t buf[4096];
    assert_int_equal(request(VIRTIO_BLK_T_IN, 3, 4096, true), VIRTIO_BLK_S_OK);
    guest_get(&g, data, buf, sizeof(buf));
    assert_memory_equal(buf, disk.data + 3 * 512, sizeof(buf));

    for (unsigned i = 0; i < sizeof(buf); i++)
        buf[i] = (uint8_t)(i * 7);
    guest_put(&g, data, buf, sizeof(buf));
    assert_int_equal(request(VIRTIO_BLK_T_OUT, SECTORS - 8, 4096, false), VIRTIO_BLK_S_OK);
    assert_memory_equal(buf, disk.data + (SECTORS - 8) * 512, sizeof(buf));
    assert_int_equal(disk.ops[BLOCK_FLUSH], 0);
    assert_int_equal(request(VIRTIO_BLK_T_FLUSH, 0, 0, false), VIRTIO_BLK_S_OK);
    assert_int_equal(disk.ops[BLOCK_FLUSH], 1);
    assert_int_equal(g.msi_seen[0x41], 3);
}

/* §2.6.4.1: header, data and status may be cut anywhere. */
static void test_any_layout(void **state)
{
    put_header(VIRTIO_BLK_T_IN, 1);
    struct buffer b[] = {{header, 5, false},    {header + 5, 11, false}, {data, 1, true},
                         {data + 1, 100, true}, {data + 101, 411, true}, {data + 512, 513, true}};
    ring_add(&r, b, 6);
    ring_notify(&r);
    guest_run(&g);
    block_drain(&disk);
    uint8_t buf[1025];
    guest_get(&g, data, buf, sizeof(buf));
    assert_memory_equal(buf, disk.data + 512, 1024);
    assert_int_equal(buf[1024], VIRTIO_BLK_S_OK);

    /* All that the device reads in one buffer. */
    put_header(VIRTIO_BLK_T_OUT, 2);
    gpa_t all = guest_alloc(&g, 16 + 512, 16);
    uint8_t head[16];
    guest_get(&g, header, head, 16);
    guest_put(&g, all, head, 16);
    ring_add(&r, (struct buffer[]){{all, 16 + 512, false}, {status, 1, true}}, 2);
    ring_notify(&r);
    guest_run(&g);
    block_drain(&disk);
    assert_int_equal(get_status(), VIRTIO_BLK_S_OK);
    assert_int_equal(disk.data[2 * 512], 0);
}

static void test_bad_transfers(void **state)
{
    const struct {
        uint64_t sector;
        uint32_t len;
    } bad[] = {{SECTORS, 512},
               {SECTORS - 1, 1024},
               {UINT64_MAX, 512},
               {UINT64_MAX / 512 + 1, 512},
               {UINT64_MAX - 1, 4096},
               {0, 511},
               {0, 513},
               {0, 0}};
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
        assert_int_equal(request(VIRTIO_BLK_T_IN, bad[i].sector, bad[i].len, true),
                         VIRTIO_BLK_S_IOERR);
        assert_int_equal(request(VIRTIO_BLK_T_OUT, bad[i].sector, bad[i].len, false),
                         VIRTIO_BLK_S_IOERR);
    }
    /* Data in the wrong direction is no data. */
    assert_int_equal(request(VIRTIO_BLK_T_IN, 0, 512, false), VIRTIO_BLK_S_IOERR);
    assert_int_equal(request(VIRTIO_BLK_T_OUT, 0, 512, true), VIRTIO_BLK_S_IOERR);
    for (unsigned i = 0; i < 5; i++)
        assert_int_equal(disk.ops[i], 0);
    assert_int_equal(request(VIRTIO_BLK_T_IN, 0, 512, true), VIRTIO_BLK_S_OK);
}

static void test_unknown_requests(void **state)
{
    const uint32_t types[] = {2, 3, 5, 7, 9, 10, 12, 14, 15, 16, 0x80000000, 0xffffffff};
    for (unsigned i = 0; i < ARRAY_SIZE(types); i++)
        assert_int_equal(request(types[i], 0, 512, true), VIRTIO_BLK_S_UNSUPP);
}

static void test_serial(void **state)
{
    char id[24] = {0};
    assert_int_equal(request(VIRTIO_BLK_T_GET_ID, 0, 20, true), VIRTIO_BLK_S_OK);
    guest_get(&g, data, id, sizeof(id));
    assert_string_equal(id, "abcdefghijklmnopqrst");
    /* Less room, more room. */
    assert_int_equal(request(VIRTIO_BLK_T_GET_ID, 0, 3, true), VIRTIO_BLK_S_OK);
    assert_int_equal(request(VIRTIO_BLK_T_GET_ID, 0, 0, true), VIRTIO_BLK_S_OK);
    assert_int_equal(request(VIRTIO_BLK_T_GET_ID, 0, 4096, true), VIRTIO_BLK_S_OK);
}

static void test_host_errors(void **state)
{
    disk.fail = -EIO;
    assert_int_equal(request(VIRTIO_BLK_T_IN, 0, 512, true), VIRTIO_BLK_S_IOERR);
    disk.fail = -ENOSPC;
    assert_int_equal(request(VIRTIO_BLK_T_OUT, 0, 512, false), VIRTIO_BLK_S_IOERR);
    disk.fail = -EIO;
    assert_int_equal(request(VIRTIO_BLK_T_FLUSH, 0, 0, false), VIRTIO_BLK_S_IOERR);
    disk.fail = -EOPNOTSUPP;
    assert_int_equal(range(VIRTIO_BLK_T_DISCARD, 0, 8, 0), VIRTIO_BLK_S_UNSUPP);
    assert_int_equal(request(VIRTIO_BLK_T_IN, 0, 512, true), VIRTIO_BLK_S_OK);
}

static void test_discard_and_zeroes(void **state)
{
    assert_int_equal(range(VIRTIO_BLK_T_DISCARD, 8, 8, 0), VIRTIO_BLK_S_OK);
    assert_int_equal(disk.data[8 * 512], 0xdd);
    assert_int_equal(disk.data[16 * 512 - 1], 0xdd);
    assert_int_equal(range(VIRTIO_BLK_T_WRITE_ZEROES, SECTORS - 1, 1, 0), VIRTIO_BLK_S_OK);
    assert_false(disk.may_unmap);
    assert_int_equal(disk.data[sizeof(disk.data) - 1], 0);
    assert_int_equal(disk.data[sizeof(disk.data) - 513], (uint8_t)(SECTORS - 2 + 511));
    assert_int_equal(range(VIRTIO_BLK_T_WRITE_ZEROES, 0, 1, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP),
                     VIRTIO_BLK_S_OK);
    assert_true(disk.may_unmap);
    assert_int_equal(range(VIRTIO_BLK_T_DISCARD, 0, 0, 0), VIRTIO_BLK_S_OK);

    /* Several ranges, one after the other; the last one is bad: then none is touched. */
    struct virtio_blk_discard_write_zeroes seg[32];
    for (unsigned i = 0; i < 32; i++)
        seg[i] = (struct virtio_blk_discard_write_zeroes){100 + 2 * i, 1, 0};
    guest_put(&g, data, seg, sizeof(seg));
    unsigned before = disk.ops[BLOCK_WRITE_ZEROES];
    assert_int_equal(request(VIRTIO_BLK_T_WRITE_ZEROES, 0, sizeof(seg), false), VIRTIO_BLK_S_OK);
    assert_int_equal(disk.ops[BLOCK_WRITE_ZEROES], before + 32);
    assert_int_equal(disk.data[162 * 512], 0);
    assert_int_equal(disk.data[161 * 512], 161);
    seg[31].sector = SECTORS;
    guest_put(&g, data, seg, sizeof(seg));
    assert_int_equal(request(VIRTIO_BLK_T_WRITE_ZEROES, 0, sizeof(seg), false), VIRTIO_BLK_S_IOERR);
    assert_int_equal(disk.ops[BLOCK_WRITE_ZEROES], before + 32);

    const uint32_t types[] = {VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES};
    for (unsigned i = 0; i < 2; i++) {
        unsigned done = disk.ops[BLOCK_DISCARD] + disk.ops[BLOCK_WRITE_ZEROES];
        assert_int_equal(range(types[i], SECTORS, 1, 0), VIRTIO_BLK_S_IOERR);
        assert_int_equal(range(types[i], SECTORS - 1, 2, 0), VIRTIO_BLK_S_IOERR);
        assert_int_equal(range(types[i], UINT64_MAX, 1, 0), VIRTIO_BLK_S_IOERR);
        assert_int_equal(range(types[i], UINT64_MAX - 1, 8, 0), VIRTIO_BLK_S_IOERR);
        assert_int_equal(range(types[i], (UINT64_MAX >> 9) + 1, 8, 0), VIRTIO_BLK_S_IOERR);
        assert_int_equal(range(types[i], 0, UINT32_MAX, 0), VIRTIO_BLK_S_IOERR);
        assert_int_equal(range(types[i], 0, 1, 2), VIRTIO_BLK_S_UNSUPP);
        assert_int_equal(range(types[i], 0, 1, 0x80000000), VIRTIO_BLK_S_UNSUPP);
        /* Lengths that are no list of ranges, or too long a one. */
        assert_int_equal(request(types[i], 0, 0, false), VIRTIO_BLK_S_IOERR);
        assert_int_equal(request(types[i], 0, 15, false), VIRTIO_BLK_S_IOERR);
        assert_int_equal(request(types[i], 0, 33 * 16, false), VIRTIO_BLK_S_IOERR);
        assert_int_equal(request(types[i], 0, 16, true), VIRTIO_BLK_S_IOERR);
        assert_int_equal(disk.ops[BLOCK_DISCARD] + disk.ops[BLOCK_WRITE_ZEROES], done);
    }
    assert_int_equal(range(VIRTIO_BLK_T_DISCARD, 0, 1, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP),
                     VIRTIO_BLK_S_UNSUPP);
}

/* A disk so large that only the limits of one request count. */
static void test_range_limits(void **state)
{
    guest_destroy(&g);
    disk.size = UINT64_C(1) << 50;
    make();
    start(ALL_FEATURES);
    struct virtio_blk_config c;
    for (unsigned i = 0; i < 60; i++)
        ((uint8_t *)&c)[i] = (uint8_t)bus_read(&g.m.mmio, d.device + i, 1);
    assert_int_equal(range(VIRTIO_BLK_T_DISCARD, 0, c.max_discard_sectors + 1, 0),
                     VIRTIO_BLK_S_IOERR);
    assert_int_equal(range(VIRTIO_BLK_T_WRITE_ZEROES, 0, c.max_write_zeroes_sectors + 1, 0),
                     VIRTIO_BLK_S_IOERR);
    assert_int_equal(disk.ops[BLOCK_DISCARD] + disk.ops[BLOCK_WRITE_ZEROES], 0);
    /* The most that is allowed gets as far as the disk. */
    disk.fail = -EIO;
    range(VIRTIO_BLK_T_DISCARD, 1, c.max_discard_sectors, 0);
    disk.fail = -EIO;
    range(VIRTIO_BLK_T_WRITE_ZEROES, 1, c.max_write_zeroes_sectors, 0);
    assert_int_equal(disk.ops[BLOCK_DISCARD] + disk.ops[BLOCK_WRITE_ZEROES], 2);
}

static void test_not_negotiated(void **state)
{
    start(0);
    assert_int_equal(range(VIRTIO_BLK_T_DISCARD, 0, 8, 0), VIRTIO_BLK_S_UNSUPP);
    assert_int_equal(range(VIRTIO_BLK_T_WRITE_ZEROES, 0, 8, 0), VIRTIO_BLK_S_UNSUPP);
    /* Without FLUSH each write is on the disk when it ends. */
    assert_int_equal(request(VIRTIO_BLK_T_OUT, 0, 512, false), VIRTIO_BLK_S_OK);
    assert_int_equal(disk.ops[BLOCK_FLUSH], 1);
    assert_int_equal(request(VIRTIO_BLK_T_IN, 0, 512, true), VIRTIO_BLK_S_OK);
    assert_int_equal(disk.ops[BLOCK_FLUSH], 1);
}

static void test_write_cache_switch(void **state)
{
    const unsigned wce = offsetof(struct virtio_blk_config, wce);
    start(ALL_FEATURES | VIRTIO_BIT(VIRTIO_BLK_F_CONFIG_WCE));
    assert_int_equal(bus_read(&g.m.mmio, d.device + wce, 1), 1);
    request(VIRTIO_BLK_T_OUT, 0, 512, false);
    assert_int_equal(disk.ops[BLOCK_FLUSH], 0);
    bus_write(&g.m.mmio, d.device + wce, 0, 1);
    assert_int_equal(bus_read(&g.m.mmio, d.device + wce, 1), 0);
    request(VIRTIO_BLK_T_OUT, 0, 512, false);
    assert_int_equal(disk.ops[BLOCK_FLUSH], 1);
    /* The flush behind the write fails: so does the write. */
    submit(VIRTIO_BLK_T_OUT, 0, 512, false);
    assert_true(finish_one(&disk));
    assert_int_equal(get_status(), 0xee);
    disk.fail = -EIO;
    assert_true(finish_one(&disk));
    assert_int_equal(get_status(), VIRTIO_BLK_S_IOERR);
    driver_set_status(&d, 0);
    assert_int_equal(bus_read(&g.m.mmio, d.device + wce, 1), 1);
    /* Nothing else can be written, with any size. */
    for (unsigned at = 0; at < 64; at++)
        for (unsigned size = 1; size <= 8; size *= 2)
            bus_write(&g.m.mmio, d.device + at, 0, size);
    assert_int_equal(bus_read(&g.m.mmio, d.device, 8), SECTORS);
    assert_int_equal(bus_read(&g.m.mmio, d.device + wce, 1), 1);
}

static void test_readonly(void **state)
{
    guest_destroy(&g);
    disk.readonly = true;
    make();
    uint64_t offered = driver_features(&d);
    assert_true(offered & VIRTIO_BIT(VIRTIO_BLK_F_RO));
    assert_false(offered &
                 (VIRTIO_BIT(VIRTIO_BLK_F_DISCARD) | VIRTIO_BIT(VIRTIO_BLK_F_WRITE_ZEROES)));
    start(VIRTIO_BIT(VIRTIO_BLK_F_RO));
    assert_int_equal(request(VIRTIO_BLK_T_OUT, 0, 512, false), VIRTIO_BLK_S_IOERR);
    assert_int_equal(request(VIRTIO_BLK_T_IN, 0, 512, true), VIRTIO_BLK_S_OK);
    assert_int_equal(request(VIRTIO_BLK_T_FLUSH, 0, 0, false), VIRTIO_BLK_S_OK);
    assert_int_equal(disk.ops[BLOCK_WRITE], 0);
}

static void test_chains_without_header_or_status(void **state)
{
    const struct {
        struct buffer b[2];
        unsigned count;
    } bad[] = {
        {{{0x10000, 16, false}}, 1},
        {{{0x10000, 64, true}}, 1},
        {{{0x10000, 15, false}, {0x11000, 1, true}}, 2},
    };
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
        ring_add(&r, bad[i].b, bad[i].count);
        ring_notify(&r);
        guest_run(&g);
        assert_true(driver_status(&d) & VIRTIO_CONFIG_S_NEEDS_RESET);
        start(ALL_FEATURES);
        assert_int_equal(request(VIRTIO_BLK_T_IN, 0, 512, true), VIRTIO_BLK_S_OK);
    }
}

/* What is in flight ends before the device says that it is reset. */
static void test_reset_drains(void **state)
{
    guest_put(&g, data, &(uint8_t[4]){1, 2, 3, 4}, 4);
    for (int i = 0; i < 5; i++)
        submit(VIRTIO_BLK_T_OUT, (uint64_t)i, 512, false);
    assert_non_null(disk.first);
    driver_set_status(&d, 0);
    assert_int_equal(driver_status(&d), 0);
    assert_null(disk.first);
    assert_int_equal(disk.ops[BLOCK_WRITE], 5);
    start(ALL_FEATURES);
    assert_int_equal(request(VIRTIO_BLK_T_IN, 4, 512, true), VIRTIO_BLK_S_OK);
}

/* A guest error with other requests in flight: they end, and nothing new begins. */
static void test_error_with_io_in_flight(void **state)
{
    uint32_t head, used;
    submit(VIRTIO_BLK_T_IN, 0, 512, true);
    ring_add_head(&r, 999);
    ring_notify(&r);
    guest_run(&g);
    assert_true(driver_status(&d) & VIRTIO_CONFIG_S_NEEDS_RESET);
    assert_true(finish_one(&disk));
    assert_true(ring_used(&r, &head, &used));
    driver_set_status(&d, 0);
    start(ALL_FEATURES);
    assert_int_equal(request(VIRTIO_BLK_T_IN, 0, 512, true), VIRTIO_BLK_S_OK);
}

static void test_many_in_flight(void **state)
{
    uint32_t head, used;
    put_header(VIRTIO_BLK_T_IN, 0);
    for (unsigned round = 0; round < 50; round++) {
        unsigned count = 1 + round % 21;
        for (unsigned i = 0; i < count; i++)
            ring_add(&r,
                     (struct buffer[]){
                         {header, 16, false}, {data + 512 * i, 512, true}, {status, 1, true}},
                     3);
        ring_notify(&r);
        guest_run(&g);
        block_drain(&disk);
        for (unsigned i = 0; i < count; i++)
            assert_true(ring_used(&r, &head, &used));
        assert_false(ring_used(&r, &head, &used));
    }
    assert_true(g.msi_seen[0x41] >= 50);
}

static void test_pause_and_saved_state(void **state)
{
    uint32_t head, used;
    start(ALL_FEATURES | VIRTIO_BIT(VIRTIO_BLK_F_CONFIG_WCE));
    bus_write(&g.m.mmio, d.device + offsetof(struct virtio_blk_config, wce), 0, 1);
    submit(VIRTIO_BLK_T_IN, 0, 512, true);
    pthread_mutex_lock(&g.m.lock);
    assert_int_equal(machine_pause_devices(&g.m), 0);
    pthread_mutex_unlock(&g.m.lock);
    assert_null(disk.first);
    assert_true(ring_used(&r, &head, &used));
    /* Nothing begins while it is paused. */
    submit(VIRTIO_BLK_T_IN, 1, 512, true);
    assert_null(disk.first);

    struct state_writer *w = state_writer_create();
    const void *bytes;
    size_t len;
    machine_save_devices(&g.m, w);
    assert_int_equal(state_writer_finish(w, &bytes, &len), 0);
    uint8_t *ram = malloc(0x60000);
    assert_non_null(ram);
    guest_get(&g, 0, ram, 0x60000);
    gpa_t next_free = g.next_free;
    guest_destroy(&g);

    guest_init(&g);
    g.next_free = next_free;
    guest_put(&g, 0, ram, 0x60000);
    free(ram);
    disk.closed = false;
    assert_non_null(virtio_blk_create(&g.m, g.host, &disk, NULL));
    struct state_reader root;
    state_reader_init(&root, bytes, len);
    pthread_mutex_lock(&g.m.lock);
    assert_int_equal(machine_load_devices(&g.m, &root), 0);
    assert_int_equal(machine_resume_devices(&g.m), 0);
    pthread_mutex_unlock(&g.m.lock);
    state_writer_free(w);

    guest_run(&g);
    assert_true(finish_one(&disk));
    assert_true(ring_used(&r, &head, &used));
    assert_int_equal(get_status(), VIRTIO_BLK_S_OK);
    /* The driver's cache mode came along. */
    assert_int_equal(request(VIRTIO_BLK_T_OUT, 0, 512, false), VIRTIO_BLK_S_OK);
    assert_int_equal(disk.ops[BLOCK_FLUSH], 1);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_configuration),
        TEST(test_read_and_write),
        TEST(test_any_layout),
        TEST(test_bad_transfers),
        TEST(test_unknown_requests),
        TEST(test_serial),
        TEST(test_host_errors),
        TEST(test_discard_and_zeroes),
        TEST(test_range_limits),
        TEST(test_not_negotiated),
        TEST(test_write_cache_switch),
        TEST(test_readonly),
        TEST(test_chains_without_header_or_status),
        TEST(test_reset_drains),
        TEST(test_error_with_io_in_flight),
        TEST(test_many_in_flight),
        TEST(test_pause_and_saved_state),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
