/*
 * virtio-console with a console made of this file: output that has to wait, input that has no room.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#include <linux/virtio_config.h>
#include <linux/virtio_console.h>

#include "backend/console/console.h"
#include "base/log.h"
#include "base/util.h"
#include "virtio_guest.h"

/* ---- The console: the functions of backend/console that the device links with. ---- */

static struct console {
    const struct console_ops *ops;
    void *opaque;
    uint8_t out[0x200000];
    size_t out_len, room; /* room: what it takes before it is full */
    uint8_t in[5000];
    size_t in_len;
} con;

void console_write(struct console *c, const void *data, size_t len)
{
    assert_true(len <= 4096);
    assert_true(c->out_len + len <= sizeof(c->out));
    memcpy(c->out + c->out_len, data, len);
    c->out_len += len;
}

bool console_can_write(const struct console *c)
{
    return c->out_len < c->room;
}

void console_connect(struct console *c, const struct console_ops *ops, void *opaque)
{
    c->ops = ops;
    c->opaque = opaque;
}

void console_kick(struct console *c)
{
    size_t taken = c->in_len ? c->ops->receive(c->opaque, c->in, c->in_len) : 0;
    assert_true(taken <= c->in_len);
    memmove(c->in, c->in + taken, c->in_len - taken);
    c->in_len -= taken;
}

static void type(const char *text, size_t len)
{
    assert_true(con.in_len + len <= sizeof(con.in));
    memcpy(con.in + con.in_len, text, len);
    con.in_len += len;
    console_kick(&con);
}

static void make_room(size_t room)
{
    con.room = room;
    con.ops->writable(con.opaque);
}

/* ---- The guest. ---- */

static struct guest g;
static struct driver d;
static struct ring rx, tx;
static gpa_t text;

static void make(void)
{
    guest_init(&g);
    assert_non_null(virtio_console_create(&g.m, g.host, &con));
    driver_find(&d, &g, 0x1043);
    driver_msix(&d);
}

static void start(void)
{
    driver_negotiate(&d, VIRTIO_BIT(VIRTIO_CONSOLE_F_EMERG_WRITE));
    ring_setup(&rx, &d, 0, 16);
    ring_setup(&tx, &d, 1, 16);
    driver_start(&d);
    guest_run(&g);
}

static int setup(void **state)
{
    log_set_level(LOG_ERROR);
    memset(&con, 0, sizeof(con));
    con.room = sizeof(con.out);
    make();
    start();
    text = guest_alloc(&g, 0x200000, 8);
    return 0;
}

static int teardown(void **state)
{
    guest_destroy(&g);
    assert_null(con.ops);
    return 0;
}

static unsigned count_used(struct ring *r, uint32_t *len)
{
    uint32_t head;
    unsigned n = 0;
    while (ring_used(r, &head, len))
        n++;
    return n;
}

static void test_output(void **state)
{
    uint32_t len;
    guest_put(&g, text, "hello, world", 12);
    ring_add(&tx, (struct buffer[]){{text, 5, false}, {text + 5, 7, false}}, 2);
    ring_add(&tx, &(struct buffer){text, 5, false}, 1);
    ring_notify(&tx);
    /* Drivers spin for it: it is done already. */
    assert_int_equal(guest_get16(&g, tx.used + 2), 2);
    guest_run(&g);
    assert_int_equal(con.out_len, 17);
    assert_memory_equal(con.out, "hello, worldhello", 17);
    assert_int_equal(count_used(&tx, &len), 2);
    assert_true(g.msi_seen[0x42] >= 1);
}

/* Nothing is lost, and nothing twice, when the host takes output in bits. */
static void test_output_waits(void **state)
{
    uint32_t len;
    const size_t total = 3 * 50000;
    uint8_t *bytes = malloc(total);
    assert_non_null(bytes);
    for (size_t i = 0; i < total; i++)
        bytes[i] = (uint8_t)(i * 7 + i / 253);
    guest_put(&g, text, bytes, total);
    con.room = 1;
    for (unsigned i = 0; i < 3; i++)
        ring_add(&tx, &(struct buffer){text + 50000 * i, 50000, false}, 1);
    ring_notify(&tx);
    guest_run(&g);
    assert_int_equal(con.out_len, 4096);
    assert_int_equal(count_used(&tx, &len), 0);
    unsigned done = 0;
    while (con.out_len < total) {
        size_t before = con.out_len;
        make_room(con.out_len + 10000);
        guest_run(&g);
        assert_true(con.out_len > before);
        done += count_used(&tx, &len);
        assert_int_equal(done, con.out_len / 50000);
    }
    assert_int_equal(done, 3);
    assert_int_equal(con.out_len, total);
    assert_memory_equal(con.out, bytes, total);
    free(bytes);
}

static void test_long_chain(void **state)
{
    uint32_t len;
    ring_add(&tx, &(struct buffer){text, 0x180000, false}, 1);
    ring_notify(&tx);
    guest_run(&g);
    assert_int_equal(con.out_len, 0x180000);
    assert_int_equal(count_used(&tx, &len), 1);
}

static void test_input(void **state)
{
    uint32_t len;
    char got[8];
    type("abc", 3);
    assert_int_equal(con.in_len, 3);
    ring_add(&rx, (struct buffer[]){{text, 2, true}, {text + 2, 2, true}}, 2);
    ring_add(&rx, &(struct buffer){text + 8, 2, true}, 1);
    ring_notify(&rx);
    guest_run(&g);
    assert_int_equal(con.in_len, 0);
    assert_int_equal(count_used(&rx, &len), 1);
    assert_int_equal(len, 3);
    guest_get(&g, text, got, 3);
    assert_memory_equal(got, "abc", 3);
    assert_int_equal(g.msi_seen[0x41], 1);
    /* Two of four bytes fit; the rest waits. */
    type("defg", 4);
    assert_int_equal(con.in_len, 2);
    assert_int_equal(count_used(&rx, &len), 1);
    ring_add(&rx, &(struct buffer){text + 16, 64, true}, 1);
    ring_notify(&rx);
    guest_run(&g);
    assert_int_equal(con.in_len, 0);
    guest_get(&g, text + 16, got, 2);
    assert_memory_equal(got, "fg", 2);
    /* A buffer that cannot be written takes nothing, and the next one does. */
    ring_add(&rx, &(struct buffer){text, 8, false}, 1);
    ring_add(&rx, &(struct buffer){text, 8, true}, 1);
    ring_notify(&rx);
    guest_run(&g);
    type("h", 1);
    assert_int_equal(con.in_len, 0);
}

static void test_emergency_write(void **state)
{
    driver_set_status(&d, 0);
    bus_write(&g.m.mmio, d.device + offsetof(struct virtio_console_config, emerg_wr), 'X', 4);
    bus_write(&g.m.mmio, d.device + offsetof(struct virtio_console_config, emerg_wr), 'Y', 1);
    assert_int_equal(con.out_len, 2);
    assert_memory_equal(con.out, "XY", 2);
    bus_write(&g.m.mmio, d.device, 'Z', 4);
    assert_int_equal(con.out_len, 2);
    assert_int_equal(bus_read(&g.m.mmio, d.device + 4, 4), 1);
}

static void test_saved_state(void **state)
{
    con.room = 1;
    guest_put(&g, text, "0123456789", 10);
    uint8_t page[8192];
    memset(page, 'x', sizeof(page));
    guest_put(&g, text + 10, page, sizeof(page));
    ring_add(&tx, &(struct buffer){text, 10 + sizeof(page), false}, 1);
    ring_notify(&tx);
    guest_run(&g);
    assert_int_equal(con.out_len, 4096);

    struct state_writer *w = state_writer_create();
    const void *bytes;
    size_t len;
    machine_pause_devices(&g.m);
    machine_save_devices(&g.m, w);
    assert_int_equal(state_writer_finish(w, &bytes, &len), 0);
    uint8_t *ram = malloc(0x80000);
    assert_non_null(ram);
    guest_get(&g, 0, ram, 0x80000);
    guest_destroy(&g);
    make();
    guest_put(&g, 0, ram, 0x80000);
    free(ram);
    con.room = sizeof(con.out);
    struct state_reader root;
    state_reader_init(&root, bytes, len);
    pthread_mutex_lock(&g.m.lock);
    int ret = machine_load_devices(&g.m, &root);
    ret = ret ? ret : machine_resume_devices(&g.m);
    pthread_mutex_unlock(&g.m.lock);
    assert_int_equal(ret, 0);
    state_writer_free(w);
    guest_run(&g);
    /* The other side goes on in the middle of the buffer. */
    assert_int_equal(con.out_len, 10 + sizeof(page));
    uint32_t used;
    assert_int_equal(count_used(&tx, &used), 1);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_output), TEST(test_output_waits),    TEST(test_long_chain),
        TEST(test_input),  TEST(test_emergency_write), TEST(test_saved_state),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
