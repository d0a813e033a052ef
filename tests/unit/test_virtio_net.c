/*
 * virtio-net with a backend made of this file: what the guest sends, with and without offloads that
 * the backend lacks, what it receives, and waiting both ways.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include <linux/virtio_config.h>
#include <linux/virtio_net.h>
#include <linux/virtio_pci.h>
#include <linux/virtio_ring.h>

#include "backend/net/net.h"
#include "base/log.h"
#include "base/util.h"
#include "virtio_guest.h"

#define HEADER 12u
#define BIT    VIRTIO_BIT

/* ---- The backend. ---- */

static struct wire {
    struct net net;
    uint64_t offers, chosen;
    bool full, receiving, closed;
    struct ring *feed; /* each frame that is sent makes the guest send another one */
    unsigned sent;
    size_t len; /* of the last frame, header included */
    uint8_t frame[HEADER + NET_MAX_FRAME];
    size_t lens[64];
} wire;

static int wire_send(struct net *n, const struct iovec *iov, unsigned count)
{
    if (wire.full)
        return -EAGAIN;
    assert_true(iov[0].iov_len >= HEADER);
    wire.len = 0;
    for (unsigned i = 0; i < count; i++) {
        assert_true(wire.len + iov[i].iov_len <= sizeof(wire.frame));
        memcpy(wire.frame + wire.len, iov[i].iov_base, iov[i].iov_len);
        wire.len += iov[i].iov_len;
    }
    wire.lens[wire.sent++ % 64] = wire.len;
    if (wire.feed)
        ring_add_head(wire.feed, 0);
    return 0;
}

static uint64_t wire_features(struct net *n)
{
    return wire.offers;
}
static void wire_set_features(struct net *n, uint64_t f)
{
    wire.chosen = f;
}
static void wire_set_receive(struct net *n, bool ready)
{
    wire.receiving = ready;
}
static void wire_close(struct net *n)
{
    wire.closed = true;
}

static const struct net_ops wire_ops = {
    .name = "wire",
    .send = wire_send,
    .features = wire_features,
    .set_features = wire_set_features,
    .set_receive = wire_set_receive,
    .close = wire_close,
};

/* From the wire to the guest. A refusal is for the backend as good as set_receive(false). */
static bool deliver(const struct net_header *h, const uint8_t *frame, size_t len)
{
    const struct iovec iov[] = {{(void *)(uintptr_t)h, sizeof(*h)},
                                {(void *)(uintptr_t)frame, len}};
    bool taken = wire.net.receive(wire.net.opaque, iov, 2);
    if (!taken)
        wire.receiving = false;
    return taken;
}

/* ---- The guest. ---- */

static struct guest g;
static struct driver d;
static struct ring rx, tx;
static gpa_t out;
static const uint8_t mac[6] = {0x52, 0x54, 0, 1, 2, 3};

static void make(uint64_t offers, bool link)
{
    memset(&wire, 0, sizeof(wire));
    wire.net.ops = &wire_ops;
    wire.offers = offers;
    guest_init(&g);
    assert_non_null(virtio_net_create(&g.m, g.host, link ? &wire.net : NULL, mac));
    driver_find(&d, &g, 0x1041);
    driver_msix(&d);
    out = guest_alloc(&g, HEADER + NET_MAX_FRAME, 8);
}

static void start(uint64_t features)
{
    driver_negotiate(&d, features);
    ring_setup(&rx, &d, 0, 64);
    ring_setup(&tx, &d, 1, 64);
    driver_start(&d);
    guest_run(&g);
}

static void restart(uint64_t offers, uint64_t features)
{
    guest_destroy(&g);
    make(offers, true);
    start(features);
}

static int setup(void **state)
{
    log_set_level(LOG_ERROR);
    make(0, true);
    start(BIT(VIRTIO_NET_F_MRG_RXBUF));
    return 0;
}

static int teardown(void **state)
{
    guest_destroy(&g);
    return 0;
}

static void fill(uint8_t *p, size_t len)
{
    for (size_t i = 0; i < len; i++)
        p[i] = (uint8_t)(i * 13 + i / 251);
}

/* Sends header and frame in one buffer; the chain comes back. */
static void transmit(const struct net_header *h, const uint8_t *frame, size_t len)
{
    uint32_t head, used;
    guest_put(&g, out, h, sizeof(*h));
    guest_put(&g, out + HEADER, frame, len);
    uint16_t expected = ring_add(&tx, &(struct buffer){out, (uint32_t)(HEADER + len), false}, 1);
    ring_notify(&tx);
    guest_run(&g);
    assert_true(ring_used(&tx, &head, &used));
    assert_int_equal(head, expected);
    assert_int_equal(used, 0);
}

static void test_configuration(void **state)
{
    uint64_t offered = driver_features(&d);
    assert_true(offered & BIT(VIRTIO_NET_F_MAC));
    assert_true(offered & BIT(VIRTIO_NET_F_CSUM));
    assert_true(offered & BIT(VIRTIO_NET_F_HOST_TSO4));
    assert_false(offered & BIT(VIRTIO_NET_F_GUEST_TSO4));
    for (unsigned i = 0; i < 6; i++)
        assert_int_equal(bus_read(&g.m.mmio, d.device + i, 1), mac[i]);
    assert_int_equal(bus_read(&g.m.mmio, d.device + 6, 2), VIRTIO_NET_S_LINK_UP);
    bus_write(&g.m.mmio, d.device, 0, 1);
    assert_int_equal(bus_read(&g.m.mmio, d.device, 1), mac[0]);
    assert_false(offered & BIT(VIRTIO_NET_F_MTU));
    wire.net.mtu = 9000;
    guest_destroy(&g);
    guest_init(&g);
    assert_non_null(virtio_net_create(&g.m, g.host, &wire.net, mac));
    driver_find(&d, &g, 0x1041);
    assert_true(driver_features(&d) & BIT(VIRTIO_NET_F_MTU));
    assert_int_equal(bus_read(&g.m.mmio, d.device + 10, 2), 9000);
}

/* After a migration: switches are told, and a guest that can is asked to tell the network itself. */
static void test_announce(void **state)
{
    struct ring ctl;
    uint32_t head, used;
    struct device *dev = machine_find_device(&g.m, "virtio-net0");
    gpa_t at = guest_alloc(&g, 4, 4);

    assert_non_null(dev);
    pthread_mutex_lock(&g.m.lock);
    virtio_net_announce(dev);
    pthread_mutex_unlock(&g.m.lock);
    assert_int_equal(wire.sent, 1);
    assert_int_equal(wire.len, HEADER + 60);
    for (unsigned i = 0; i < 6; i++) {
        assert_int_equal(wire.frame[HEADER + i], 0xff);
        assert_int_equal(wire.frame[HEADER + 6 + i], mac[i]);
    }
    assert_int_equal(wire.frame[HEADER + 12] << 8 | wire.frame[HEADER + 13], 0x8035);
    /* This driver did not ask for more. */
    assert_int_equal(bus_read(&g.m.mmio, d.device + 6, 2), VIRTIO_NET_S_LINK_UP);

    guest_destroy(&g);
    make(0, true);
    driver_negotiate(&d, BIT(VIRTIO_NET_F_STATUS) | BIT(VIRTIO_NET_F_CTRL_VQ) | BIT(VIRTIO_NET_F_GUEST_ANNOUNCE));
    ring_setup(&ctl, &d, 2, 16);
    driver_start(&d);
    pthread_mutex_lock(&g.m.lock);
    virtio_net_announce(machine_find_device(&g.m, "virtio-net0"));
    pthread_mutex_unlock(&g.m.lock);
    assert_int_equal(bus_read(&g.m.mmio, d.device + 6, 2), VIRTIO_NET_S_LINK_UP | VIRTIO_NET_S_ANNOUNCE);
    /* An unknown command first, then the one that says that it is done. */
    at = guest_alloc(&g, 4, 4);
    for (unsigned i = 0; i < 2; i++) {
        const uint8_t command[3] = {i ? VIRTIO_NET_CTRL_ANNOUNCE : 0x77, VIRTIO_NET_CTRL_ANNOUNCE_ACK, 0xee};
        uint8_t ack;
        guest_put(&g, at, command, 3);
        ring_add(&ctl, (struct buffer[]){{at, 2, false}, {at + 2, 1, true}}, 2);
        ring_notify(&ctl);
        guest_run(&g);
        assert_true(ring_used(&ctl, &head, &used));
        assert_int_equal(used, 1);
        guest_get(&g, at + 2, &ack, 1);
        assert_int_equal(ack, i ? VIRTIO_NET_OK : VIRTIO_NET_ERR);
        assert_int_equal(bus_read(&g.m.mmio, d.device + 6, 2), VIRTIO_NET_S_LINK_UP | (i ? 0 : VIRTIO_NET_S_ANNOUNCE));
    }
}

static void test_features(void **state)
{
    const uint64_t all = BIT(VIRTIO_NET_F_CSUM) | BIT(VIRTIO_NET_F_GUEST_CSUM) |
                         BIT(VIRTIO_NET_F_HOST_TSO4) | BIT(VIRTIO_NET_F_GUEST_TSO4);
    restart(all, all | BIT(VIRTIO_NET_F_MRG_RXBUF));
    assert_int_equal(wire.chosen, all);
    driver_set_status(&d, 0);
    assert_int_equal(wire.chosen, 0);
    assert_false(wire.receiving);
    /* Segmentation without checksums. */
    const uint8_t ready = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;
    const uint64_t bad[] = {BIT(VIRTIO_NET_F_HOST_TSO4), BIT(VIRTIO_NET_F_GUEST_TSO4),
                            BIT(VIRTIO_NET_F_HOST_ECN) | BIT(VIRTIO_NET_F_CSUM)};
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
        driver_set_status(&d, 0);
        driver_set_status(&d, ready);
        driver_accept(&d, bad[i] | BIT(VIRTIO_F_VERSION_1));
        driver_set_status(&d, ready | VIRTIO_CONFIG_S_FEATURES_OK);
        assert_int_equal(driver_status(&d), ready);
    }
}

static void test_transmit(void **state)
{
    uint8_t frame[1514];
    fill(frame, sizeof(frame));
    for (size_t len = 14; len <= sizeof(frame); len += 100) {
        transmit(&(struct net_header){0}, frame, len);
        assert_int_equal(wire.len, HEADER + len);
        assert_memory_equal(wire.frame + HEADER, frame, len);
    }
    assert_int_equal(g.msi_seen[0x42], wire.sent);
}

static void send_some(unsigned count)
{
    guest_put(&g, out, &(struct net_header){0}, HEADER);
    for (unsigned i = 0; i < count; i++)
        ring_add(&tx, &(struct buffer){out, HEADER + 60, false}, 1);
    ring_notify(&tx);
    guest_run_loop(&g);
}

static void take_used(gpa_t used_event)
{
    uint32_t head, used;
    while (ring_used(&tx, &head, &used))
        ;
    guest_put16(&g, used_event, tx.seen);
}

/* Nobody waits for the end of what was sent: one interrupt for many, none that is not needed. */
static void test_late_interrupts(void **state)
{
    start(BIT(VIRTIO_RING_F_EVENT_IDX));
    const gpa_t used_event = tx.avail + 4 + 2 * tx.size;
    send_some(3);
    send_some(2);
    assert_int_equal(wire.sent, 5);
    assert_int_equal(g.msi_seen[0x42], 0);
    guest_run(&g);
    assert_int_equal(g.msi_seen[0x42], 1);
    take_used(used_event);

    /* The driver looks by itself before the time is up. */
    send_some(2);
    take_used(used_event);
    guest_run(&g);
    assert_int_equal(wire.sent, 7);
    assert_int_equal(g.msi_seen[0x42], 1);

    /* A pause or a reset does not lose it: it is sent before. */
    send_some(1);
    pthread_mutex_lock(&g.m.lock);
    int ret = machine_pause_devices(&g.m);
    pthread_mutex_unlock(&g.m.lock);
    assert_int_equal(ret, 0);
    assert_int_equal(g.msi_seen[0x42], 2);
    pthread_mutex_lock(&g.m.lock);
    machine_resume_devices(&g.m);
    pthread_mutex_unlock(&g.m.lock);
    guest_run(&g);
    take_used(used_event);
    assert_int_equal(g.msi_seen[0x42], 2);
    send_some(1);
    driver_set_status(&d, 0);
    guest_run(&g);
    assert_int_equal(g.msi_seen[0x42], 3);
}

static void test_transmit_any_layout(void **state)
{
    uint8_t frame[1514];
    fill(frame, sizeof(frame));
    guest_put(&g, out, &(struct net_header){0}, HEADER);
    guest_put(&g, out + HEADER, frame, sizeof(frame));
    const uint32_t cuts[][4] = {
        {1, 2, 9, 1514}, {12, 1, 1, 1512}, {11, 2, 1500, 13}, {600, 600, 300, 26}};
    for (unsigned i = 0; i < ARRAY_SIZE(cuts); i++) {
        struct buffer b[4];
        gpa_t at = out;
        for (unsigned k = 0; k < 4; at += cuts[i][k++])
            b[k] = (struct buffer){at, cuts[i][k], false};
        memset(wire.frame, 0, sizeof(wire.frame));
        ring_add(&tx, b, 4);
        ring_notify(&tx);
        guest_run(&g);
        assert_int_equal(wire.sent, i + 1);
        assert_int_equal(wire.len, HEADER + sizeof(frame));
        assert_memory_equal(wire.frame + HEADER, frame, sizeof(frame));
    }
}

static void test_bad_frames_are_lost(void **state)
{
    uint8_t frame[100];
    fill(frame, sizeof(frame));
    const struct net_header bad[] = {
        {.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM,
         .csum_start = 34,
         .csum_offset = 16}, /* not negotiated */
        {.gso_type = VIRTIO_NET_HDR_GSO_TCPV4, .gso_size = 10},
        {.gso_type = VIRTIO_NET_HDR_GSO_UDP, .gso_size = 10},
        {.gso_type = 0x77},
    };
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++)
        transmit(&bad[i], frame, sizeof(frame));
    transmit(&(struct net_header){0}, frame, 13);
    transmit(&(struct net_header){0}, frame, 0);
    assert_int_equal(wire.sent, 0);

    restart(0, BIT(VIRTIO_NET_F_CSUM) | BIT(VIRTIO_NET_F_HOST_TSO4));
    const struct net_header worse[] = {
        {.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .csum_start = 99, .csum_offset = 0},
        {.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .csum_start = 0xffff, .csum_offset = 0xffff},
        {.gso_type = VIRTIO_NET_HDR_GSO_TCPV4, .gso_size = 10, .csum_start = 34, .csum_offset = 16},
        {.flags = 1,
         .gso_type = VIRTIO_NET_HDR_GSO_TCPV4,
         .gso_size = 0,
         .csum_start = 34,
         .csum_offset = 16},
        {.flags = 1,
         .gso_type = VIRTIO_NET_HDR_GSO_TCPV6,
         .gso_size = 10,
         .csum_start = 34,
         .csum_offset = 16},
        {.flags = 1,
         .gso_type = VIRTIO_NET_HDR_GSO_TCPV4,
         .gso_size = 10,
         .csum_start = 34,
         .csum_offset = 16},
    };
    for (unsigned i = 0; i < ARRAY_SIZE(worse); i++)
        transmit(&worse[i], frame, sizeof(frame));
    assert_int_equal(wire.sent, 0);
    assert_int_equal(driver_status(&d) & VIRTIO_CONFIG_S_NEEDS_RESET, 0);
    /* The backend could, but the guest has not negotiated it. */
    restart(BIT(VIRTIO_NET_F_CSUM) | BIT(VIRTIO_NET_F_HOST_TSO6), BIT(VIRTIO_NET_F_CSUM));
    transmit(&(struct net_header){.flags = 1,
                                  .gso_type = VIRTIO_NET_HDR_GSO_TCPV6,
                                  .gso_size = 10,
                                  .csum_start = 54,
                                  .csum_offset = 16},
             frame, sizeof(frame));
    assert_int_equal(wire.sent, 0);
    /* Larger than any frame; with a writable part; less than a header. */
    uint32_t head, used;
    ring_add(&tx, &(struct buffer){0, HEADER + NET_MAX_FRAME + 1, false}, 1);
    ring_add(&tx, &(struct buffer){out, 4, false}, 1);
    ring_add(&tx, &(struct buffer){out, 40, true}, 1);
    ring_notify(&tx);
    guest_run(&g);
    for (unsigned i = 0; i < 3; i++)
        assert_true(ring_used(&tx, &head, &used));
    assert_int_equal(wire.sent, 0);
}

static void test_backend_is_full(void **state)
{
    uint8_t frame[60] = {1};
    uint32_t head, used;
    wire.full = true;
    guest_put(&g, out, &(struct net_header){0}, HEADER);
    guest_put(&g, out + HEADER, frame, sizeof(frame));
    for (unsigned i = 0; i < 5; i++)
        ring_add(&tx, &(struct buffer){out, HEADER + sizeof(frame), false}, 1);
    ring_notify(&tx);
    guest_run(&g);
    assert_false(ring_used(&tx, &head, &used));
    wire.full = false;
    pthread_mutex_lock(&g.m.lock);
    wire.net.writable(wire.net.opaque);
    pthread_mutex_unlock(&g.m.lock);
    guest_run(&g);
    assert_int_equal(wire.sent, 5);
    for (unsigned i = 0; i < 5; i++)
        assert_true(ring_used(&tx, &head, &used));
}

/* A guest that never stops does not keep the event loop from others. */
static void test_endless_guest(void **state)
{
    wire.feed = &tx;
    guest_put(&g, out, &(struct net_header){0}, HEADER);
    ring_add(&tx, &(struct buffer){out, 100, false}, 1);
    ring_notify(&tx);
    guest_run(&g);
    assert_true(wire.sent >= 200);
    unsigned before = wire.sent;
    guest_run(&g);
    assert_true(wire.sent > before);
    wire.feed = NULL;
}

/* Ethernet, IPv4, TCP. */
static size_t tcp_frame(uint8_t *f, struct net_header *h, size_t payload)
{
    fill(f, 54 + payload);
    f[12] = 8;
    f[13] = 0;
    f[14] = 0x45;
    f[16] = (uint8_t)((40 + payload) >> 8);
    f[17] = (uint8_t)(40 + payload);
    f[23] = 6;
    f[46] = 0x50;
    *h = (struct net_header){
        .flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .csum_start = 34, .csum_offset = 16};
    return 54 + payload;
}

/* RFC 1071: the sum over data with its checksum in place is all ones. */
static bool checksum_ok(const uint8_t *p, size_t len, uint32_t s)
{
    for (size_t i = 0; i < len; i++)
        s += i & 1 ? p[i] : (uint32_t)p[i] << 8;
    while (s >> 16)
        s = (s & 0xffff) + (s >> 16);
    return s == 0xffff;
}

static void test_software_offloads(void **state)
{
    static uint8_t frame[60000];
    struct net_header h;
    restart(0, BIT(VIRTIO_NET_F_CSUM) | BIT(VIRTIO_NET_F_HOST_TSO4));
    size_t len = tcp_frame(frame, &h, 1000);
    transmit(&h, frame, len);
    assert_int_equal(wire.sent, 1);
    assert_int_equal(wire.len, HEADER + len);
    assert_int_equal(wire.frame[0], 0); /* no flags */
    /* The guest put the pseudo header's sum into the field; here it is whatever fill() made. */
    assert_true(
        checksum_ok(wire.frame + HEADER + 34, len - 34, (uint32_t)(frame[50] << 8 | frame[51])));
    memcpy(wire.frame + HEADER + 50, frame + 50, 2);
    assert_memory_equal(wire.frame + HEADER, frame, len);

    len = tcp_frame(frame, &h, 14000);
    h.gso_type = VIRTIO_NET_HDR_GSO_TCPV4;
    h.gso_size = 1400;
    transmit(&h, frame, len);
    assert_int_equal(wire.sent, 11);
    for (unsigned i = 1; i < 11; i++)
        assert_int_equal(wire.lens[i], HEADER + 54 + 1400);

    /* A backend that takes long frames, but wants their checksums: one frame, not cut. */
    restart(BIT(VIRTIO_NET_F_HOST_TSO4), BIT(VIRTIO_NET_F_CSUM) | BIT(VIRTIO_NET_F_HOST_TSO4));
    transmit(&h, frame, len);
    assert_int_equal(wire.sent, 1);
    assert_int_equal(wire.len, HEADER + len);
    assert_int_equal(wire.frame[0], 0);
    assert_true(
        checksum_ok(wire.frame + HEADER + 34, len - 34, (uint32_t)(frame[50] << 8 | frame[51])));

    /* A backend that does it all gets frame and header as they are. */
    restart(BIT(VIRTIO_NET_F_CSUM) | BIT(VIRTIO_NET_F_HOST_TSO4),
            BIT(VIRTIO_NET_F_CSUM) | BIT(VIRTIO_NET_F_HOST_TSO4));
    transmit(&h, frame, len);
    assert_int_equal(wire.sent, 1);
    assert_int_equal(wire.len, HEADER + len);
    assert_memory_equal(wire.frame, &h, HEADER);
    assert_memory_equal(wire.frame + HEADER, frame, len);
}

static gpa_t give_rx(unsigned count, uint32_t len)
{
    gpa_t at = guest_alloc(&g, (size_t)count * len, 8);
    for (unsigned i = 0; i < count; i++)
        ring_add(&rx, &(struct buffer){at + i * len, len, true}, 1);
    ring_notify(&rx);
    guest_run(&g);
    return at;
}

static void test_receive(void **state)
{
    uint8_t frame[1500], got[HEADER + 1500];
    uint32_t head, used;
    struct net_header h = {0};
    fill(frame, sizeof(frame));
    gpa_t at = give_rx(2, 2048);
    assert_true(wire.receiving);
    assert_true(deliver(&h, frame, sizeof(frame)));
    assert_true(ring_used(&rx, &head, &used));
    assert_int_equal(used, HEADER + sizeof(frame));
    guest_get(&g, at, got, sizeof(got));
    assert_memory_equal(got + HEADER, frame, sizeof(frame));
    assert_int_equal(load_le16(got + 10), 1);
    assert_int_equal(g.msi_seen[0x41], 1);
}

static void test_receive_merges(void **state)
{
    static uint8_t frame[9000], got[9000 + HEADER];
    uint32_t head, used;
    struct net_header h = {0};
    fill(frame, sizeof(frame));
    gpa_t at = give_rx(10, 1000);
    assert_true(deliver(&h, frame, 5000));
    for (unsigned i = 0; i < 6; i++) {
        assert_true(ring_used(&rx, &head, &used));
        assert_int_equal(used, i < 5 ? 1000 : 12);
    }
    assert_false(ring_used(&rx, &head, &used));
    guest_get(&g, at, got, 5000 + HEADER);
    assert_memory_equal(got + HEADER, frame, 5000);
    assert_int_equal(load_le16(got + 10), 6);
    assert_int_equal(g.msi_seen[0x41], 1);

    /* Four buffers are left: not enough. The frame waits, and no buffer is used up. */
    assert_true(wire.receiving);
    assert_false(deliver(&h, frame, 5000));
    assert_false(ring_used(&rx, &head, &used));
    /* But for a smaller one they do. */
    assert_true(deliver(&h, frame, 3000));
    for (unsigned i = 0; i < 4; i++)
        assert_true(ring_used(&rx, &head, &used));
    assert_false(wire.receiving);
    at = give_rx(6, 1000);
    assert_true(wire.receiving);
    assert_true(deliver(&h, frame, 5000));
    guest_get(&g, at, got, 5000 + HEADER);
    assert_memory_equal(got + HEADER, frame, 5000);
}

static void test_receive_without_merging(void **state)
{
    uint8_t frame[1500];
    uint32_t head, used;
    struct net_header h = {.num_buffers = 77};
    fill(frame, sizeof(frame));
    start(0);
    gpa_t at = guest_alloc(&g, 2048, 8);
    ring_add(&rx, (struct buffer[]){{at, 12, true}, {at + 12, 1500, true}}, 2);
    ring_notify(&rx);
    guest_run(&g);
    /* Too long for the buffer: lost, and the buffer stays. */
    uint8_t longer[1501] = {0};
    assert_true(deliver(&h, longer, sizeof(longer)));
    assert_false(ring_used(&rx, &head, &used));
    assert_true(deliver(&h, frame, sizeof(frame)));
    assert_true(ring_used(&rx, &head, &used));
    assert_int_equal(used, 1512);
    assert_int_equal(guest_get16(&g, at + 10), 1);
    /* Buffers too small even for a header, or not writable. */
    ring_add(&rx, &(struct buffer){at, 11, true}, 1);
    ring_notify(&rx);
    guest_run(&g);
    assert_true(deliver(&h, frame, 60));
    assert_false(ring_used(&rx, &head, &used));
}

static void test_receive_when_nobody_listens(void **state)
{
    uint8_t frame[60] = {0};
    struct net_header h = {0};
    /* Without buffers. */
    assert_false(deliver(&h, frame, sizeof(frame)));
    driver_set_status(&d, 0);
    assert_false(wire.receiving);
    assert_false(deliver(&h, frame, sizeof(frame)));
    start(BIT(VIRTIO_NET_F_MRG_RXBUF));
    assert_true(wire.receiving);
    /* A guest error while a frame arrives. */
    ring_add(&rx, &(struct buffer){GUEST_RAM_END, 2048, true}, 1);
    ring_notify(&rx);
    guest_run(&g);
    assert_false(deliver(&h, frame, sizeof(frame)));
    assert_true(driver_status(&d) & VIRTIO_CONFIG_S_NEEDS_RESET);
    assert_false(wire.receiving);
    start(BIT(VIRTIO_NET_F_MRG_RXBUF));
    give_rx(1, 2048);
    assert_true(deliver(&h, frame, sizeof(frame)));
}

static void test_receive_headers(void **state)
{
    uint8_t frame[100] = {0};
    struct net_header h = {.flags = VIRTIO_NET_HDR_F_DATA_VALID};
    /* The guest has not asked for any of it. */
    gpa_t at = give_rx(8, 256);
    assert_true(deliver(&h, frame, sizeof(frame)));
    uint32_t head, used;
    assert_true(ring_used(&rx, &head, &used));
    assert_int_equal(guest_get16(&g, at) & 0xff, 0);
    h.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
    assert_true(deliver(&h, frame, sizeof(frame)));
    assert_false(ring_used(&rx, &head, &used));

    const uint64_t all = BIT(VIRTIO_NET_F_GUEST_CSUM) | BIT(VIRTIO_NET_F_GUEST_TSO4);
    restart(all, all | BIT(VIRTIO_NET_F_MRG_RXBUF));
    at = give_rx(8, 256);
    h = (struct net_header){.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM,
                            .gso_type = VIRTIO_NET_HDR_GSO_TCPV4,
                            .gso_size = 10,
                            .hdr_len = 54,
                            .csum_start = 34,
                            .csum_offset = 16};
    assert_true(deliver(&h, frame, sizeof(frame)));
    assert_true(ring_used(&rx, &head, &used));
    uint8_t got[HEADER];
    guest_get(&g, at, got, HEADER);
    assert_memory_equal(got, &h, 10);
    h.flags = VIRTIO_NET_HDR_F_DATA_VALID;
    h.gso_type = 0;
    assert_true(deliver(&h, frame, sizeof(frame)));
    assert_true(ring_used(&rx, &head, &used));
    assert_int_equal(guest_get16(&g, at + 256) & 0xff, VIRTIO_NET_HDR_F_DATA_VALID);
}

static void test_pause(void **state)
{
    uint8_t frame[60] = {0};
    struct net_header h = {0};
    give_rx(2, 256);
    pthread_mutex_lock(&g.m.lock);
    assert_int_equal(machine_pause_devices(&g.m), 0);
    assert_false(wire.receiving);
    assert_false(deliver(&h, frame, sizeof(frame)));
    assert_int_equal(machine_resume_devices(&g.m), 0);
    pthread_mutex_unlock(&g.m.lock);
    guest_run(&g);
    assert_true(wire.receiving);
    assert_true(deliver(&h, frame, sizeof(frame)));
}

static void test_without_link(void **state)
{
    uint8_t frame[60] = {0};
    guest_destroy(&g);
    make(0, false);
    start(BIT(VIRTIO_NET_F_STATUS));
    assert_int_equal(bus_read(&g.m.mmio, d.device + 6, 2), 0);
    transmit(&(struct net_header){0}, frame, sizeof(frame));
    give_rx(1, 2048);
    driver_set_status(&d, 0);
}

static void test_closes_backend(void **state)
{
    assert_false(wire.closed);
    guest_destroy(&g);
    assert_true(wire.closed);
    make(0, true);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_configuration),
        TEST(test_announce),
        TEST(test_features),
        TEST(test_transmit),
        TEST(test_late_interrupts),
        TEST(test_transmit_any_layout),
        TEST(test_bad_frames_are_lost),
        TEST(test_backend_is_full),
        TEST(test_endless_guest),
        TEST(test_software_offloads),
        TEST(test_receive),
        TEST(test_receive_merges),
        TEST(test_receive_without_merging),
        TEST(test_receive_when_nobody_listens),
        TEST(test_receive_headers),
        TEST(test_pause),
        TEST(test_without_link),
        TEST(test_closes_backend),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
