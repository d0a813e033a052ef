/*
 * The user network with a guest made by hand: DHCP, ARP, and TCP through a forwarded port both
 * ways.
 */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

#include <arpa/inet.h>
#include <errno.h>
#include <linux/virtio_net.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "backend/net/net.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/util.h"
#include "loop_helper.h"

static const uint8_t guest_mac[6] = {0x52, 0x54, 0, 0x12, 0x34, 0x56};
static const uint8_t guest_ip[4] = {10, 0, 2, 15};
static const uint8_t host_ip[4] = {10, 0, 2, 2};

enum { TCP_FIN = 1, TCP_SYN = 2, TCP_RST = 4, TCP_PSH = 8, TCP_ACK = 16 };

struct guest {
    struct loop *loop;
    struct clock *clock;
    struct net *net;
    bool refuse; /* frames from the host */
    unsigned refused, frames, writables;
    bool in_send, reentered;

    uint8_t host_mac[6];
    bool arp_answered;
    uint8_t offered[4], dns[4], router[4], dhcp_type;

    /* The guest's end of one TCP connection. */
    bool listening, connected, peer_closed, reset;
    uint16_t port, peer_port;
    uint32_t seq, ack;
    char got[8192];
    size_t count;

    int fd; /* the host's end */
    char reply[65536];
    size_t reply_count, reply_want, want;
};

static uint16_t get16(const uint8_t *p)
{
    return (uint16_t)(p[0] << 8 | p[1]);
}

static uint32_t get32(const uint8_t *p)
{
    return (uint32_t)get16(p) << 16 | get16(p + 2);
}

static void put16(uint8_t *p, unsigned v)
{
    p[0] = (uint8_t)(v >> 8);
    p[1] = (uint8_t)v;
}

static void put32(uint8_t *p, uint32_t v)
{
    put16(p, v >> 16);
    put16(p + 2, v & 0xffff);
}

static uint32_t sum(uint32_t s, const uint8_t *p, size_t n)
{
    for (size_t i = 0; i + 1 < n; i += 2)
        s += get16(p + i);
    return n & 1 ? s + (uint32_t)(p[n - 1] << 8) : s;
}

static unsigned fold(uint32_t s)
{
    while (s >> 16)
        s = (s & 0xffff) + (s >> 16);
    return ~s & 0xffff;
}

static int send_frame(struct guest *g, const uint8_t *frame, size_t len)
{
    struct net_header head = {0};
    /* Cut at an odd place: a frame may come in any pieces. */
    size_t cut = MIN(len, 9);
    struct iovec iov[3] = {
        {&head, sizeof(head)}, {(void *)frame, cut}, {(void *)(frame + cut), len - cut}};
    g->in_send = true;
    int ret = g->net->ops->send(g->net, iov, 3);
    g->in_send = false;
    return ret;
}

static void send_ip(struct guest *g, uint8_t proto, const uint8_t *src, const uint8_t *dst,
                    const uint8_t *payload, size_t n)
{
    uint8_t f[66000];
    memset(f, 0xff, 6);
    if (g->arp_answered)
        memcpy(f, g->host_mac, 6);
    memcpy(f + 6, guest_mac, 6);
    put16(f + 12, 0x0800);
    uint8_t *ip = f + 14;
    memset(ip, 0, 20);
    ip[0] = 0x45;
    put16(ip + 2, (unsigned)(20 + n));
    ip[8] = 64;
    ip[9] = proto;
    memcpy(ip + 12, src, 4);
    memcpy(ip + 16, dst, 4);
    put16(ip + 10, fold(sum(0, ip, 20)));
    memcpy(ip + 20, payload, n);
    assert_int_equal(send_frame(g, f, 34 + n), 0);
}

static void send_udp(struct guest *g, const uint8_t *src, uint16_t sport, const uint8_t *dst,
                     uint16_t dport, const uint8_t *data, size_t n)
{
    uint8_t u[1500];
    put16(u, sport);
    put16(u + 2, dport);
    put16(u + 4, (unsigned)(8 + n));
    put16(u + 6, 0);
    memcpy(u + 8, data, n);
    send_ip(g, 17, src, dst, u, 8 + n);
}

static void send_tcp(struct guest *g, uint8_t flags, const void *data, size_t n)
{
    uint8_t t[65000] = {0};
    put16(t, g->port);
    put16(t + 2, g->peer_port);
    put32(t + 4, g->seq);
    put32(t + 8, g->ack);
    t[12] = 5 << 4;
    t[13] = flags;
    put16(t + 14, 8192);
    memcpy(t + 20, data, n);
    uint32_t s = sum(0, guest_ip, 4);
    s = sum(s, host_ip, 4) + 6 + (uint32_t)(20 + n);
    put16(t + 16, fold(sum(s, t, 20 + n)));
    send_ip(g, 6, guest_ip, host_ip, t, 20 + n);
    g->seq += (uint32_t)n + !!(flags & TCP_SYN) + !!(flags & TCP_FIN);
}

static void send_arp(struct guest *g, unsigned op, const uint8_t *target_mac,
                     const uint8_t *target_ip)
{
    uint8_t f[42];
    memset(f, 0xff, 6);
    memcpy(f + 6, guest_mac, 6);
    put16(f + 12, 0x0806);
    put16(f + 14, 1);
    put16(f + 16, 0x0800);
    f[18] = 6;
    f[19] = 4;
    put16(f + 20, op);
    memcpy(f + 22, guest_mac, 6);
    memcpy(f + 28, guest_ip, 4);
    memcpy(f + 32, target_mac, 6);
    memcpy(f + 38, target_ip, 4);
    assert_int_equal(send_frame(g, f, sizeof(f)), 0);
}

/* What the guest's network stack does with a frame. */

static void got_arp(struct guest *g, const uint8_t *f)
{
    if (get16(f + 20) == 2 && memcmp(f + 28, host_ip, 4) == 0) {
        memcpy(g->host_mac, f + 22, 6);
        g->arp_answered = true;
    } else if (get16(f + 20) == 1 && memcmp(f + 38, guest_ip, 4) == 0) {
        send_arp(g, 2, f + 22, f + 28);
    }
}

static void got_dhcp(struct guest *g, const uint8_t *b, size_t n)
{
    memcpy(g->offered, b + 16, 4);
    for (size_t i = 240; i + 1 < n && b[i] != 255;) {
        if (b[i] == 0) {
            i++;
            continue;
        }
        const uint8_t *v = b + i + 2;
        if (b[i] == 53)
            g->dhcp_type = v[0];
        else if (b[i] == 6)
            memcpy(g->dns, v, 4);
        else if (b[i] == 3)
            memcpy(g->router, v, 4);
        i += 2 + b[i + 1];
    }
}

static void got_tcp(struct guest *g, const uint8_t *t, size_t n)
{
    uint8_t flags = t[13];
    size_t head = (size_t)(t[12] >> 4) * 4, len = n - head;
    if (get16(t + 2) != g->port)
        return;
    if (flags & TCP_RST) {
        g->reset = true;
        return;
    }
    if ((flags & TCP_SYN) && g->listening) {
        g->peer_port = get16(t);
        g->ack = get32(t + 4) + 1;
        send_tcp(g, TCP_SYN | TCP_ACK, "", 0);
        g->listening = false;
        return;
    }
    if (flags & TCP_ACK)
        g->connected = true;
    if (get32(t + 4) != g->ack) {
        send_tcp(g, TCP_ACK, "", 0); /* seen before */
        return;
    }
    assert_true(g->count + len <= sizeof(g->got));
    memcpy(g->got + g->count, t + head, len);
    g->count += len;
    g->ack += (uint32_t)len;
    if (flags & TCP_FIN) {
        g->ack++;
        g->peer_closed = true;
    }
    if (len || (flags & TCP_FIN))
        send_tcp(g, TCP_ACK, "", 0);
}

static bool guest_receive(void *opaque, const struct iovec *iov, unsigned iovcnt)
{
    struct guest *g = opaque;
    g->reentered |= g->in_send;
    if (g->refuse) {
        g->refused++;
        return false;
    }
    uint8_t f[70000];
    size_t n = 0;
    for (unsigned i = 0; i < iovcnt; i++) {
        memcpy(f + n, iov[i].iov_base, iov[i].iov_len);
        n += iov[i].iov_len;
    }
    struct net_header head;
    memcpy(&head, f, sizeof(head));
    assert_int_equal(head.num_buffers, 1);
    assert_int_equal(head.flags, VIRTIO_NET_HDR_F_DATA_VALID);
    assert_int_equal(head.gso_type, 0);
    const uint8_t *e = f + sizeof(head);
    n -= sizeof(head);
    assert_true(n >= 14);
    g->frames++;
    if (get16(e + 12) == 0x0806) {
        got_arp(g, e);
    } else if (get16(e + 12) == 0x0800) {
        const uint8_t *ip = e + 14, *payload = ip + (ip[0] & 15) * 4;
        size_t len = get16(ip + 2) - (size_t)(ip[0] & 15) * 4;
        if (ip[9] == 6)
            got_tcp(g, payload, len);
        else if (ip[9] == 17 && get16(payload + 2) == 68)
            got_dhcp(g, payload + 8, len - 8);
    }
    return true;
}

static void guest_writable(void *opaque)
{
    ((struct guest *)opaque)->writables++;
}

static uint16_t free_port(void)
{
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t n = sizeof(a);
    assert_int_equal(bind(fd, (struct sockaddr *)&a, sizeof(a)), 0);
    assert_int_equal(getsockname(fd, (struct sockaddr *)&a, &n), 0);
    close(fd);
    return ntohs(a.sin_port);
}

static struct net_forward forward_to_22(uint16_t port)
{
    struct net_forward f = {.host_addr = "127.0.0.1", .host_port = port, .guest_port = 22};
    return f;
}

static int open_net(struct guest *g, const struct net_user_options *opt)
{
    int ret = net_user_open(g->loop, g->clock, opt, &g->net);
    if (ret == 0) {
        g->net->receive = guest_receive;
        g->net->writable = guest_writable;
        g->net->opaque = g;
        g->net->ops->set_receive(g->net, true);
    }
    return ret;
}

static int setup(void **state)
{
    struct guest *g = calloc(1, sizeof(*g));
    g->loop = loop_create(NULL);
    g->clock = clock_create(g->loop, false);
    g->fd = -1;
    *state = g;
    return 0;
}

static int teardown(void **state)
{
    struct guest *g = *state;
    if (g->fd >= 0)
        close(g->fd);
    net_close(g->net);
    clock_destroy(g->clock);
    loop_destroy(g->loop);
    free(g);
    return 0;
}

static bool has_arp(void *opaque)
{
    return ((struct guest *)opaque)->arp_answered;
}

static void gateway_answers_arp(void **state)
{
    struct guest *g = *state;
    assert_int_equal(open_net(g, &(struct net_user_options){0}), 0);
    assert_string_equal(g->net->ops->name, "user");
    /* Long TCP frames are welcome, but with their checksums. */
    assert_true(g->net->ops->features(g->net) & 1u << VIRTIO_NET_F_HOST_TSO4);
    assert_false(g->net->ops->features(g->net) & 1u << VIRTIO_NET_F_CSUM);
    static const uint8_t zero[6];
    send_arp(g, 1, zero, host_ip);
    assert_true(run_until(g->loop, has_arp, g, 10000));
    assert_false(g->reentered);
}

/* DHCP's fixed part and its options (RFC 2131). */
static void send_dhcp(struct guest *g, uint8_t type)
{
    uint8_t b[300] = {1, 1, 6, 0, 0x12, 0x34, 0x56, 0x78};
    memcpy(b + 28, guest_mac, 6);
    static const uint8_t cookie[] = {99, 130, 83, 99, 53, 1};
    memcpy(b + 236, cookie, sizeof(cookie));
    b[242] = type;
    unsigned at = 243;
    if (type == 3) {
        b[at++] = 50;
        b[at++] = 4;
        memcpy(b + at, g->offered, 4);
        at += 4;
    }
    b[at] = 255;
    static const uint8_t none[4], all[4] = {255, 255, 255, 255};
    send_udp(g, none, 68, all, 67, b, sizeof(b));
}

static bool has_offer(void *opaque)
{
    return ((struct guest *)opaque)->dhcp_type == 2;
}

static bool has_lease(void *opaque)
{
    return ((struct guest *)opaque)->dhcp_type == 5;
}

static void dhcp_gives_the_usual_addresses(void **state)
{
    struct guest *g = *state;
    assert_int_equal(open_net(g, &(struct net_user_options){0}), 0);
    send_dhcp(g, 1);
    assert_true(run_until(g->loop, has_offer, g, 10000));
    send_dhcp(g, 3);
    assert_true(run_until(g->loop, has_lease, g, 10000));
    static const uint8_t dns[4] = {10, 0, 2, 3};
    assert_memory_equal(g->offered, guest_ip, 4);
    assert_memory_equal(g->router, host_ip, 4);
    assert_memory_equal(g->dns, dns, 4);
}

static void another_network(void **state)
{
    struct guest *g = *state;
    static const char *const bad[] = {"10.0.2.0",     "10.0.2.0/",   "10.0.2/24", "/24",
                                      "x/24",         "10.0.0.0/7",  "::/64",     "10.0.2.0/28",
                                      "10.0.2.0/24x", "10.0.2.0/ 24"};
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++)
        assert_int_equal(open_net(g, &(struct net_user_options){.network = bad[i]}), -EINVAL);
    assert_int_equal(open_net(g, &(struct net_user_options){.network = "192.168.76.0/24"}), 0);
    send_dhcp(g, 1);
    assert_true(run_until(g->loop, has_offer, g, 10000));
    static const uint8_t expect[4] = {192, 168, 76, 15};
    assert_memory_equal(g->offered, expect, 4);
}

static bool is_connected(void *opaque)
{
    return ((struct guest *)opaque)->connected;
}

static bool guest_got_enough(void *opaque)
{
    struct guest *g = opaque;
    return g->count >= g->want;
}

static bool host_got_enough(void *opaque)
{
    struct guest *g = opaque;
    ssize_t n;
    while ((n = recv(g->fd, g->reply + g->reply_count, sizeof(g->reply) - g->reply_count,
                     MSG_DONTWAIT)) > 0)
        g->reply_count += (size_t)n;
    return g->reply_count >= g->reply_want;
}

static bool is_closed_by_peer(void *opaque)
{
    return ((struct guest *)opaque)->peer_closed;
}

static int connect_host(uint16_t port)
{
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in a = {
        .sin_family = AF_INET, .sin_port = htons(port), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    assert_int_equal(connect(fd, (struct sockaddr *)&a, sizeof(a)), 0);
    return fd;
}

/* Opens the network with a forward and makes a connection from the host to the guest. */
static void connect_through(struct guest *g)
{
    struct net_forward f = forward_to_22(free_port());
    assert_int_equal(open_net(g, &(struct net_user_options){.forwards = &f, .forward_count = 1}),
                     0);
    static const uint8_t zero[6];
    send_arp(g, 1, zero, host_ip);
    assert_true(run_until(g->loop, has_arp, g, 10000));
    g->port = 22;
    g->seq = 1000;
    g->listening = true;
    g->fd = connect_host(f.host_port);
    assert_true(run_until(g->loop, is_connected, g, 10000));
}

static void forwarded_port_passes_bytes(void **state)
{
    struct guest *g = *state;
    connect_through(g);
    uint8_t data[5000];
    for (unsigned i = 0; i < sizeof(data); i++)
        data[i] = (uint8_t)(i * 13 + i / 256);
    assert_int_equal(write(g->fd, data, sizeof(data)), sizeof(data));
    g->want = sizeof(data);
    assert_true(run_until(g->loop, guest_got_enough, g, 20000));
    assert_memory_equal(g->got, data, sizeof(data));

    send_tcp(g, TCP_ACK | TCP_PSH, "hello host", 10);
    send_tcp(g, TCP_ACK | TCP_PSH, ", again", 7);
    g->reply_want = 17;
    assert_true(run_until(g->loop, host_got_enough, g, 20000));
    assert_memory_equal(g->reply, "hello host, again", 17);

    /* The end of the stream gets through; then all is quiet: no spinning on the hang-up. */
    close(g->fd);
    g->fd = -1;
    assert_true(run_until(g->loop, is_closed_by_peer, g, 20000));
    send_tcp(g, TCP_ACK | TCP_FIN, "", 0);
    run_until(g->loop, NULL, NULL, 50);
    assert_false(g->reset);
    assert_false(g->reentered);
}

/* What the guest did not segment arrives as well as what it did: features() promises it. */
static void long_segments_pass(void **state)
{
    struct guest *g = *state;
    connect_through(g);
    static uint8_t data[60000];
    for (unsigned i = 0; i < sizeof(data); i++)
        data[i] = (uint8_t)(i * 13 + i / 256);
    send_tcp(g, TCP_ACK | TCP_PSH, data, sizeof(data));
    g->reply_want = sizeof(data);
    assert_true(run_until(g->loop, host_got_enough, g, 20000));
    assert_memory_equal(g->reply, data, sizeof(data));
    assert_false(g->reset);
}

/* Frames that the device has no room for are kept in order and come after set_receive(true). */
static void refused_frames_come_later(void **state)
{
    struct guest *g = *state;
    connect_through(g);
    g->refuse = true;
    unsigned frames = g->frames;
    assert_int_equal(write(g->fd, "0123456789", 10), 10);
    run_until(g->loop, NULL, NULL, 100);
    assert_int_equal(g->frames, frames);
    assert_true(g->refused > 0 && g->refused < 5);
    g->refuse = false;
    run_until(g->loop, NULL, NULL, 20);
    assert_int_equal(g->count, 0); /* not before it says so */
    g->net->ops->set_receive(g->net, true);
    g->want = 10;
    assert_true(run_until(g->loop, guest_got_enough, g, 20000));
    assert_memory_equal(g->got, "0123456789", 10);
}

/* A guest that sends faster than the loop runs is told to wait, and then to go on. */
static void a_full_queue_says_so(void **state)
{
    struct guest *g = *state;
    assert_int_equal(open_net(g, &(struct net_user_options){0}), 0);
    uint8_t f[1514] = {0};
    memset(f, 0xff, 6);
    int ret = 0;
    for (int i = 0; i < 100000 && ret == 0; i++)
        ret = send_frame(g, f, sizeof(f));
    assert_int_equal(ret, -EAGAIN);
    run_until(g->loop, NULL, NULL, 20);
    assert_int_equal(g->writables, 1);
    assert_int_equal(send_frame(g, f, sizeof(f)), 0);
}

/* Whatever a guest sends: dropped or answered, never a crash. The seed is fixed; restricted, so
 * that nothing of it reaches the programs of this host. */
static void garbage_is_survived(void **state)
{
    struct guest *g = *state;
    assert_int_equal(open_net(g, &(struct net_user_options){.restricted = true}), 0);
    static uint8_t f[NET_MAX_FRAME + 100];
    srand(11);
    for (int i = 0; i < 3000; i++) {
        size_t n = (size_t)rand() % (i % 50 ? 200 : sizeof(f));
        for (size_t k = 0; k < n; k++)
            f[k] = (uint8_t)rand();
        if (n > 34 && i % 3) {
            static const uint16_t types[] = {0x0806, 0x0800, 0x86dd};
            static const uint8_t protos[] = {1, 6, 17, 58};
            put16(f + 12, types[rand() % 3]);
            f[14] = get16(f + 12) == 0x86dd ? 0x60 : 0x45;
            f[23] = protos[rand() % 4];
            put16(f + 16, (unsigned)n - 14);
            f[20] = f[21] = 0;
            memcpy(f + 26, guest_ip, 4);
            memcpy(f + 30, host_ip, 4);
            f[33] = (uint8_t)(rand() % 5);
            put16(f + 24, 0);
            put16(f + 24, fold(sum(0, f + 14, 20)));
        }
        send_frame(g, f, n);
        if (i % 16 == 0)
            run_until(g->loop, NULL, NULL, 1);
    }
    run_until(g->loop, NULL, NULL, 20);
    static const uint8_t zero[6];
    g->arp_answered = false;
    send_arp(g, 1, zero, host_ip);
    assert_true(run_until(g->loop, has_arp, g, 10000));
}

static void ports_in_use_are_told(void **state)
{
    struct guest *g = *state;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t n = sizeof(a);
    assert_int_equal(bind(fd, (struct sockaddr *)&a, sizeof(a)), 0);
    assert_int_equal(listen(fd, 1), 0);
    assert_int_equal(getsockname(fd, (struct sockaddr *)&a, &n), 0);
    struct net_forward f[2] = {forward_to_22(free_port()), forward_to_22(ntohs(a.sin_port))};
    struct net_user_options opt = {.forwards = f, .forward_count = 2};
    assert_int_equal(open_net(g, &opt), -EADDRINUSE);
    assert_null(g->net);
    close(fd);
    /* The first forward was given up too. */
    assert_int_equal(open_net(g, &opt), 0);
}

static void bad_forwards_are_refused(void **state)
{
    struct guest *g = *state;
    struct net_forward f = forward_to_22(free_port());
    struct net_user_options opt = {.forwards = &f, .forward_count = 1};
    strcpy(f.host_addr, "300.1.1.1");
    assert_int_equal(open_net(g, &opt), -EINVAL);
    strcpy(f.host_addr, "127.0.0.1");
    strcpy(f.guest_addr, "guest");
    assert_int_equal(open_net(g, &opt), -EINVAL);
    f.guest_addr[0] = 0;
    f.guest_port = 0;
    assert_int_equal(open_net(g, &opt), -EINVAL);
    f.guest_port = 22;
    strcpy(f.host_addr, "203.0.113.77"); /* of documentation, not of this host */
    assert_int_equal(open_net(g, &opt), -EADDRNOTAVAIL);
}

int main(void)
{
    log_set_level(-1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(gateway_answers_arp, setup, teardown),
        cmocka_unit_test_setup_teardown(dhcp_gives_the_usual_addresses, setup, teardown),
        cmocka_unit_test_setup_teardown(another_network, setup, teardown),
        cmocka_unit_test_setup_teardown(forwarded_port_passes_bytes, setup, teardown),
        cmocka_unit_test_setup_teardown(long_segments_pass, setup, teardown),
        cmocka_unit_test_setup_teardown(refused_frames_come_later, setup, teardown),
        cmocka_unit_test_setup_teardown(a_full_queue_says_so, setup, teardown),
        cmocka_unit_test_setup_teardown(garbage_is_survived, setup, teardown),
        cmocka_unit_test_setup_teardown(ports_in_use_are_told, setup, teardown),
        cmocka_unit_test_setup_teardown(bad_forwards_are_refused, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
