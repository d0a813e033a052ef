/*
 * The PCI transport and the life of a virtio device, with the random number generator as the
 * device: negotiation, registers, interrupts, errors, reset, and saved state.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <stdlib.h>

#include <linux/pci_regs.h>
#include <linux/virtio_config.h>
#include <linux/virtio_pci.h>
#include <linux/virtio_ring.h>

#include "base/log.h"
#include "base/util.h"
#include "virtio_guest.h"

#define RNG       0x1044
#define VERSION_1 VIRTIO_BIT(VIRTIO_F_VERSION_1)

static struct guest g;
static struct driver d;
static struct ring r;
static struct virtio_device *rng;

static int setup(void **state)
{
    log_set_level(LOG_ERROR);
    guest_init(&g);
    rng = virtio_rng_create(&g.m, g.host);
    assert_non_null(rng);
    driver_find(&d, &g, RNG);
    return 0;
}

static int teardown(void **state)
{
    guest_destroy(&g);
    return 0;
}

static void start(uint64_t features, bool msix)
{
    if (msix)
        driver_msix(&d);
    driver_negotiate(&d, features);
    ring_setup(&r, &d, 0, 8);
    driver_start(&d);
}

/* One request; returns whether it was served. */
static bool ask(void)
{
    uint32_t head, len;
    gpa_t at = guest_alloc(&g, 64, 8);
    uint16_t expected = ring_add(&r, &(struct buffer){at, 64, true}, 1);
    ring_notify(&r);
    guest_run(&g);
    if (!ring_used(&r, &head, &len))
        return false;
    assert_int_equal(head, expected);
    assert_int_equal(len, 64);
    uint8_t data[64], zeros[64] = {0};
    guest_get(&g, at, data, 64);
    assert_memory_not_equal(data, zeros, 64);
    return true;
}

static void test_serves(void **state)
{
    start(0, true);
    for (int i = 0; i < 20; i++) {
        assert_true(ask());
        assert_int_equal(g.msi_seen[0x41], i + 1);
    }
    assert_int_equal(g.msi_count, 20);
}

static void test_notified_only_in_the_loop(void **state)
{
    start(0, true);
    ring_add(&r, &(struct buffer){guest_alloc(&g, 64, 8), 64, true}, 1);
    ring_notify(&r);
    assert_int_equal(guest_get16(&g, r.used + 2), 0);
    guest_run(&g);
    assert_int_equal(guest_get16(&g, r.used + 2), 1);
}

static void test_intx(void **state)
{
    unsigned pin = driver_config_read(&d, PCI_INTERRUPT_PIN, 1);
    assert_int_equal(pin, 1);
    start(0, false);
    assert_true(ask());
    assert_int_equal(g.msi_count, 0);
    unsigned high = 0;
    for (unsigned i = 0; i < ARRAY_SIZE(g.gsi); i++)
        high += g.gsi[i];
    assert_int_equal(high, 1);
    assert_int_equal(bus_read(&g.m.mmio, d.isr, 1), 1);
    for (unsigned i = 0; i < ARRAY_SIZE(g.gsi); i++)
        assert_false(g.gsi[i]);
    assert_int_equal(bus_read(&g.m.mmio, d.isr, 1), 0);
}

static void test_negotiation(void **state)
{
    uint64_t offered = driver_features(&d);
    assert_true(offered & VERSION_1);
    assert_true(offered & VIRTIO_BIT(VIRTIO_RING_F_EVENT_IDX));
    driver_write(&d, VIRTIO_PCI_COMMON_DFSELECT, 2, 4);
    assert_int_equal(driver_read(&d, VIRTIO_PCI_COMMON_DF, 4), 0);

    const uint8_t ready = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;
    /* Not offered; and too old. */
    const uint64_t refused[] = {VERSION_1 | VIRTIO_BIT(63), VERSION_1 | VIRTIO_BIT(0), 0};
    for (unsigned i = 0; i < ARRAY_SIZE(refused); i++) {
        driver_set_status(&d, 0);
        driver_set_status(&d, ready);
        driver_accept(&d, refused[i]);
        driver_set_status(&d, ready | VIRTIO_CONFIG_S_FEATURES_OK);
        assert_int_equal(driver_status(&d), ready);
    }
    driver_accept(&d, VERSION_1);
    driver_set_status(&d, ready | VIRTIO_CONFIG_S_FEATURES_OK);
    assert_int_equal(driver_status(&d), ready | VIRTIO_CONFIG_S_FEATURES_OK);
    /* From now on they are fixed. */
    driver_accept(&d, offered);
    assert_int_equal(rng->features, VERSION_1);
    /* Status bits are not taken back but by a reset, and NEEDS_RESET is not the driver's. */
    driver_set_status(&d, ready | VIRTIO_CONFIG_S_NEEDS_RESET);
    assert_int_equal(driver_status(&d), ready | VIRTIO_CONFIG_S_FEATURES_OK);
}

static void test_without_features_ok(void **state)
{
    driver_set_status(&d, VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER |
                              VIRTIO_CONFIG_S_DRIVER_OK);
    assert_true(driver_status(&d) & VIRTIO_CONFIG_S_NEEDS_RESET);
    start(0, true);
    assert_true(ask());
}

static void test_queue_registers(void **state)
{
    driver_negotiate(&d, 0);
    assert_int_equal(driver_read(&d, VIRTIO_PCI_COMMON_NUMQ, 2), 1);
    driver_write(&d, VIRTIO_PCI_COMMON_Q_SELECT, 0, 2);
    uint16_t max = (uint16_t)driver_read(&d, VIRTIO_PCI_COMMON_Q_SIZE, 2);
    assert_int_equal(max, 64);
    const uint16_t bad[] = {0, 3, 63, 128, 0xffff};
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
        driver_write(&d, VIRTIO_PCI_COMMON_Q_SIZE, bad[i], 2);
        assert_int_equal(driver_read(&d, VIRTIO_PCI_COMMON_Q_SIZE, 2), max);
    }
    /* Vectors: 0 and 1 exist. */
    const struct {
        uint16_t written, read;
    } vectors[] = {{0, 0}, {1, 1}, {2, 0xffff}, {1, 1}, {0xfffe, 0xffff}, {0xffff, 0xffff}};
    for (unsigned i = 0; i < ARRAY_SIZE(vectors); i++) {
        driver_write(&d, VIRTIO_PCI_COMMON_Q_MSIX, vectors[i].written, 2);
        assert_int_equal(driver_read(&d, VIRTIO_PCI_COMMON_Q_MSIX, 2), vectors[i].read);
        driver_write(&d, VIRTIO_PCI_COMMON_MSIX, vectors[i].written, 2);
        assert_int_equal(driver_read(&d, VIRTIO_PCI_COMMON_MSIX, 2), vectors[i].read);
    }
    /* 64-bit addresses, in halves and as a whole. */
    driver_write(&d, VIRTIO_PCI_COMMON_Q_DESCLO, 0x11223344, 4);
    driver_write(&d, VIRTIO_PCI_COMMON_Q_DESCHI, 0x55667788, 4);
    assert_int_equal(driver_read(&d, VIRTIO_PCI_COMMON_Q_DESCLO, 8), 0x5566778811223344);
    driver_write(&d, VIRTIO_PCI_COMMON_Q_USEDLO, 0x123456789abcdef0, 8);
    assert_int_equal(driver_read(&d, VIRTIO_PCI_COMMON_Q_USEDHI, 4), 0x12345678);
    driver_write(&d, VIRTIO_PCI_COMMON_Q_DESCLO, 0, 8);
    driver_write(&d, VIRTIO_PCI_COMMON_Q_USEDLO, 0, 8);

    ring_setup(&r, &d, 0, 8);
    driver_write(&d, VIRTIO_PCI_COMMON_Q_SIZE, 16, 2);
    assert_int_equal(driver_read(&d, VIRTIO_PCI_COMMON_Q_SIZE, 2), 8);
    driver_write(&d, VIRTIO_PCI_COMMON_Q_DESCLO, 0, 4);
    assert_int_equal(driver_read(&d, VIRTIO_PCI_COMMON_Q_DESCLO, 4), r.desc);
    driver_write(&d, VIRTIO_PCI_COMMON_Q_ENABLE, 0, 2);
    assert_int_equal(driver_read(&d, VIRTIO_PCI_COMMON_Q_ENABLE, 2), 1);

    /* A queue that does not exist: size 0, and nothing sticks. */
    driver_write(&d, VIRTIO_PCI_COMMON_Q_SELECT, 1, 2);
    assert_int_equal(driver_read(&d, VIRTIO_PCI_COMMON_Q_SIZE, 2), 0);
    driver_write(&d, VIRTIO_PCI_COMMON_Q_MSIX, 0, 2);
    assert_int_equal(driver_read(&d, VIRTIO_PCI_COMMON_Q_MSIX, 2), 0xffff);
    driver_write(&d, VIRTIO_PCI_COMMON_Q_ENABLE, 1, 2);
    assert_int_equal(driver_read(&d, VIRTIO_PCI_COMMON_Q_ENABLE, 2), 0);
}

static void test_odd_accesses(void **state)
{
    driver_negotiate(&d, 0);
    /* Bytes of a register, and two registers at once. */
    driver_write(&d, VIRTIO_PCI_COMMON_Q_SELECT, 0, 2);
    uint64_t whole = driver_read(&d, 16, 8);
    for (unsigned size = 1; size <= 4; size *= 2)
        for (unsigned at = 0; at + size <= 8; at++)
            assert_int_equal(driver_read(&d, 16 + at, size),
                             whole >> (8 * at) & ((1ull << (8 * size)) - 1));
    /* Writes of the wrong width change nothing. */
    driver_write(&d, VIRTIO_PCI_COMMON_MSIX, 1, 1);
    driver_write(&d, VIRTIO_PCI_COMMON_MSIX, 0xffff, 4);
    driver_write(&d, VIRTIO_PCI_COMMON_MSIX + 1, 1, 2);
    driver_write(&d, VIRTIO_PCI_COMMON_STATUS, 0, 2);
    driver_write(&d, VIRTIO_PCI_COMMON_DF, 0, 4);
    assert_int_equal(driver_read(&d, 16, 8), whole);
    /* Beyond every structure there are ones, and writes go nowhere; the whole BAR, with every size.
     */
    assert_int_equal(driver_read(&d, 0x200, 4), 0xffffffff);
    for (unsigned size = 1; size <= 8; size *= 2) {
        for (uint64_t at = 0; at < 0x8000; at += at % 0x1000 < 0x80 ? 1 : 0x3f) {
            bus_read(&g.m.mmio, d.bar + at, size);
            if (at >= 0x100)
                bus_write(&g.m.mmio, d.bar + at, 0x0101010101010101u * size, size);
        }
    }
    guest_run(&g);
    assert_int_equal(driver_read(&d, 16, 8), whole);
    /* A device without configuration has no such capability; its page reads ones. */
    assert_int_equal(d.device, 0);
}

static void test_disabled_queue(void **state)
{
    /* Before DRIVER_OK, not enabled, not existing. */
    driver_negotiate(&d, 0);
    for (unsigned q = 0; q < 100; q++)
        bus_write(&g.m.mmio, d.notify + q * d.notify_multiplier, q, 2);
    guest_run(&g);
    driver_start(&d);
    for (unsigned q = 0; q < 100; q++)
        bus_write(&g.m.mmio, d.notify + q * d.notify_multiplier, q, 2);
    guest_run(&g);
    assert_int_equal(driver_status(&d) & VIRTIO_CONFIG_S_NEEDS_RESET, 0);
    /* Enabled late, it works. */
    ring_setup(&r, &d, 0, 8);
    assert_true(ask());
}

static void test_what_came_before_driver_ok(void **state)
{
    uint32_t head, len;
    driver_negotiate(&d, 0);
    ring_setup(&r, &d, 0, 8);
    ring_add(&r, &(struct buffer){guest_alloc(&g, 64, 8), 64, true}, 1);
    ring_notify(&r);
    guest_run(&g);
    assert_false(ring_used(&r, &head, &len));
    driver_start(&d);
    guest_run(&g);
    assert_true(ring_used(&r, &head, &len));
}

static void test_guest_errors(void **state)
{
    for (int i = 0; i < 4; i++) {
        start(0, true);
        unsigned config_irqs = g.msi_seen[0x40];
        uint8_t generation = (uint8_t)driver_read(&d, VIRTIO_PCI_COMMON_CFGGENERATION, 1);
        switch (i) {
        case 0:
            ring_add_head(&r, 100);
            break;
        case 1:
            guest_put16(&g, r.avail + 2, 1000);
            break;
        case 2:
            ring_add(&r, &(struct buffer){GUEST_RAM_END, 64, true}, 1);
            break;
        case 3:
            ring_add(&r, (struct buffer[]){{0, 0, true}}, 1);
            break;
        }
        ring_notify(&r);
        guest_run(&g);
        assert_true(driver_status(&d) & VIRTIO_CONFIG_S_NEEDS_RESET);
        assert_int_equal(g.msi_seen[0x40], config_irqs + 1);
        assert_true(driver_read(&d, VIRTIO_PCI_COMMON_CFGGENERATION, 1) != generation);
        assert_false(ask());
    }
    start(0, true);
    assert_true(ask());
}

static void test_bad_ring_address(void **state)
{
    driver_negotiate(&d, 0);
    ring_setup(&r, &d, 0, 8);
    driver_set_status(&d, 0);
    driver_negotiate(&d, 0);
    driver_write(&d, VIRTIO_PCI_COMMON_Q_SELECT, 0, 2);
    driver_write(&d, VIRTIO_PCI_COMMON_Q_DESCLO, UINT64_MAX - 15, 8);
    driver_write(&d, VIRTIO_PCI_COMMON_Q_ENABLE, 1, 2);
    driver_start(&d);
    assert_true(driver_status(&d) & VIRTIO_CONFIG_S_NEEDS_RESET);
}

static void test_reset(void **state)
{
    start(VIRTIO_BIT(VIRTIO_RING_F_EVENT_IDX), true);
    assert_true(ask());
    ring_add(&r, &(struct buffer){guest_alloc(&g, 64, 8), 64, true}, 1);
    ring_notify(&r);
    driver_set_status(&d, 0);
    assert_int_equal(driver_status(&d), 0);
    driver_write(&d, VIRTIO_PCI_COMMON_Q_SELECT, 0, 2);
    assert_int_equal(driver_read(&d, VIRTIO_PCI_COMMON_Q_ENABLE, 2), 0);
    assert_int_equal(driver_read(&d, VIRTIO_PCI_COMMON_Q_SIZE, 2), 64);
    assert_int_equal(driver_read(&d, VIRTIO_PCI_COMMON_Q_MSIX, 2), 0xffff);
    assert_int_equal(driver_read(&d, VIRTIO_PCI_COMMON_MSIX, 2), 0xffff);
    /* What was notified before the reset is not done after it. */
    guest_run(&g);
    assert_int_equal(guest_get16(&g, r.used + 2), 1);
    start(0, true);
    assert_true(ask());
}

static void test_ring_reset(void **state)
{
    start(VIRTIO_BIT(VIRTIO_F_RING_RESET), true);
    assert_true(ask());
    driver_write(&d, VIRTIO_PCI_COMMON_Q_SELECT, 0, 2);
    driver_write(&d, VIRTIO_PCI_COMMON_Q_RESET, 1, 2);
    assert_int_equal(driver_read(&d, VIRTIO_PCI_COMMON_Q_RESET, 2), 0);
    assert_int_equal(driver_read(&d, VIRTIO_PCI_COMMON_Q_ENABLE, 2), 0);
    ring_notify(&r);
    guest_run(&g);
    ring_setup(&r, &d, 0, 16);
    assert_true(ask());
    assert_true(driver_status(&d) & VIRTIO_CONFIG_S_DRIVER_OK);
}

static void test_bus_master(void **state)
{
    start(0, true);
    uint32_t command = driver_config_read(&d, PCI_COMMAND, 2);
    driver_config_write(&d, PCI_COMMAND, command & ~PCI_COMMAND_MASTER, 2);
    assert_false(ask());
    driver_config_write(&d, PCI_COMMAND, command, 2);
    uint32_t head, len;
    guest_run(&g);
    assert_true(ring_used(&r, &head, &len));
}

static void test_pci_cfg_access(void **state)
{
    unsigned cap = d.cfg_cap;
    /* Read the number of queues, two bytes, through configuration space. */
    driver_config_write(&d, cap + 4, 0, 1);
    driver_config_write(&d, cap + 8, VIRTIO_PCI_COMMON_NUMQ, 4);
    driver_config_write(&d, cap + 12, 2, 4);
    assert_int_equal(driver_config_read(&d, cap + 16, 2), 1);
    /* Write the status, and read it back both ways. */
    driver_config_write(&d, cap + 8, VIRTIO_PCI_COMMON_STATUS, 4);
    driver_config_write(&d, cap + 12, 1, 4);
    driver_config_write(&d, cap + 16, VIRTIO_CONFIG_S_ACKNOWLEDGE, 1);
    assert_int_equal(driver_status(&d), VIRTIO_CONFIG_S_ACKNOWLEDGE);
    assert_int_equal(driver_config_read(&d, cap + 16, 1), VIRTIO_CONFIG_S_ACKNOWLEDGE);
    /* Not aligned: the data stay what they were. */
    driver_config_write(&d, cap + 12, 0, 4);
    driver_config_write(&d, cap + 16, 0xaabbccdd, 4);
    driver_config_write(&d, cap + 8, VIRTIO_PCI_COMMON_NUMQ + 1, 4);
    driver_config_write(&d, cap + 12, 2, 4);
    assert_int_equal(driver_config_read(&d, cap + 16, 4), 0xaabbccdd);
    /* Lengths, places and BARs that there are not: no effect. */
    const struct {
        uint32_t bar, offset, length;
    } bad[] = {{0, VIRTIO_PCI_COMMON_STATUS, 0},
               {0, VIRTIO_PCI_COMMON_STATUS, 3},
               {0, VIRTIO_PCI_COMMON_STATUS, 8},
               {0, VIRTIO_PCI_COMMON_STATUS, 0xffffffff},
               {1, VIRTIO_PCI_COMMON_STATUS, 1},
               {0xff, VIRTIO_PCI_COMMON_STATUS, 1},
               {0, 0x8000, 1},
               {0, 0xfffffffc, 4},
               {0, 0xffffffff, 1},
               {0, 0x7ffe, 4}};
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
        driver_config_write(&d, cap + 4, bad[i].bar, 1);
        driver_config_write(&d, cap + 8, bad[i].offset, 4);
        driver_config_write(&d, cap + 12, bad[i].length, 4);
        driver_config_write(&d, cap + 16, 0, 4);
        driver_config_read(&d, cap + 16, 4);
        assert_int_equal(driver_status(&d), VIRTIO_CONFIG_S_ACKNOWLEDGE);
    }
}

static void test_pause(void **state)
{
    start(0, true);
    pthread_mutex_lock(&g.m.lock);
    assert_int_equal(machine_pause_devices(&g.m), 0);
    pthread_mutex_unlock(&g.m.lock);
    assert_false(ask());
    /* Not even what makes it look anew wakes it. */
    uint32_t command = driver_config_read(&d, PCI_COMMAND, 2);
    driver_config_write(&d, PCI_COMMAND, command & ~PCI_COMMAND_MASTER, 2);
    driver_config_write(&d, PCI_COMMAND, command, 2);
    assert_false(ask());
    pthread_mutex_lock(&g.m.lock);
    assert_int_equal(machine_resume_devices(&g.m), 0);
    pthread_mutex_unlock(&g.m.lock);
    uint32_t head, len;
    guest_run(&g);
    assert_true(ring_used(&r, &head, &len));
}

/* The saved bytes of all devices; free the writer. */
static struct state_writer *save(const void **data, size_t *len)
{
    struct state_writer *w = state_writer_create();
    pthread_mutex_lock(&g.m.lock);
    assert_int_equal(machine_pause_devices(&g.m), 0);
    machine_save_devices(&g.m, w);
    pthread_mutex_unlock(&g.m.lock);
    assert_int_equal(state_writer_finish(w, data, len), 0);
    return w;
}

static int load(const void *data, size_t len)
{
    struct state_reader root;
    state_reader_init(&root, data, len);
    pthread_mutex_lock(&g.m.lock);
    int ret = machine_load_devices(&g.m, &root);
    if (ret == 0)
        assert_int_equal(machine_resume_devices(&g.m), 0);
    pthread_mutex_unlock(&g.m.lock);
    return ret;
}

static void test_saved_state(void **state)
{
    start(VIRTIO_BIT(VIRTIO_RING_F_EVENT_IDX) | VIRTIO_BIT(VIRTIO_RING_F_INDIRECT_DESC), true);
    for (int i = 0; i < 3; i++)
        assert_true(ask());
    driver_write(&d, VIRTIO_PCI_COMMON_GFSELECT, 1, 4);
    driver_write(&d, VIRTIO_PCI_COMMON_DFSELECT, 1, 4);
    uint8_t before[60], after[60];
    for (unsigned i = 0; i < sizeof(before); i++)
        before[i] = (uint8_t)driver_read(&d, i, 1);
    /* One more is asked for, and not served until the other side. */
    uint16_t expected = ring_add(&r, &(struct buffer){guest_alloc(&g, 64, 8), 64, true}, 1);
    ring_notify(&r);

    const void *data;
    size_t len;
    struct state_writer *w = save(&data, &len);
    guest_run(&g);
    assert_int_equal(guest_get16(&g, r.used + 2), 3);
    uint8_t ram[0x40000];
    guest_get(&g, 0, ram, sizeof(ram));
    guest_destroy(&g);

    gpa_t next_free = g.next_free;
    guest_init(&g);
    g.next_free = next_free;
    guest_put(&g, 0, ram, sizeof(ram));
    rng = virtio_rng_create(&g.m, g.host);
    assert_int_equal(load(data, len), 0);
    for (unsigned i = 0; i < sizeof(after); i++)
        after[i] = (uint8_t)driver_read(&d, i, 1);
    assert_memory_equal(before, after, sizeof(before));
    guest_run(&g);
    uint32_t head, used;
    assert_true(ring_used(&r, &head, &used));
    assert_int_equal(head, expected);
    /* Interrupts go where they went, and the event index counts on. */
    assert_int_equal(g.msi_count, 0);
    assert_true(ask());
    assert_int_equal(g.msi_count, 0);
    guest_put16(&g, r.avail + 4 + 2 * r.size, r.seen);
    assert_true(ask());
    assert_int_equal(g.msi_seen[0x41], 1);
    state_writer_free(w);
}

static void test_bad_saved_state(void **state)
{
    log_set_level(LOG_ERROR - 1);
    start(0, true);
    const void *data;
    size_t len;
    struct state_writer *w = save(&data, &len);
    uint8_t *copy = malloc(len);
    unsigned refused = 0;
    /* Any byte may be wrong: that is refused or taken, but it does no harm. */
    for (size_t i = 0; i < len; i++) {
        /* Inside the 4096 bytes of PCI configuration space every 37th will do. */
        if (i % 37 && i > 600 && i < len - 600)
            continue;
        memcpy(copy, data, len);
        copy[i] ^= 0xff;
        if (load(copy, len))
            refused++;
        guest_run(&g);
    }
    assert_true(refused > 20);
    for (size_t cut = 0; cut < len; cut += 101)
        assert_true(load(data, cut) != 0);
    assert_int_equal(load(data, len), 0);
    assert_true(ask());
    free(copy);
    state_writer_free(w);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_serves),
        TEST(test_notified_only_in_the_loop),
        TEST(test_intx),
        TEST(test_negotiation),
        TEST(test_without_features_ok),
        TEST(test_queue_registers),
        TEST(test_odd_accesses),
        TEST(test_disabled_queue),
        TEST(test_what_came_before_driver_ok),
        TEST(test_guest_errors),
        TEST(test_bad_ring_address),
        TEST(test_reset),
        TEST(test_ring_reset),
        TEST(test_bus_master),
        TEST(test_pci_cfg_access),
        TEST(test_pause),
        TEST(test_saved_state),
        TEST(test_bad_saved_state),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
