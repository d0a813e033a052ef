/*
 * A TAP interface in a network namespace of the test's own: frames both ways, with and without the
 * kernel's header, back-pressure, offloads. Skipped where this is not allowed.
 */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

#include <arpa/inet.h>
#include <errno.h>
#include <linux/if_packet.h>
#include <linux/virtio_net.h>
#include <net/if.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include "backend/net/net.h"
#include "base/log.h"
#include "base/util.h"
#include "loop_helper.h"

#define ETHERTYPE 0x88b5 /* for local experiments, so nobody else talks it */

struct fixture {
    struct loop *loop;
    struct net *net;
    int packet; /* the host's end */
    uint8_t got[70000];
    size_t got_len;
    unsigned count, want, refused;
    bool refuse;
};

static bool allowed;

static bool receive(void *opaque, const struct iovec *iov, unsigned iovcnt)
{
    struct fixture *f = opaque;
    size_t n = 0;
    uint8_t buf[70000];
    for (unsigned i = 0; i < iovcnt; i++) {
        memcpy(buf + n, iov[i].iov_base, iov[i].iov_len);
        n += iov[i].iov_len;
    }
    assert_true(n >= sizeof(struct net_header) + 14);
    if (buf[12 + 12] != ETHERTYPE >> 8 || buf[12 + 13] != (ETHERTYPE & 0xff))
        return true; /* the kernel's own chatter */
    if (f->refuse) {
        f->refused++;
        return false;
    }
    memcpy(f->got, buf, n);
    f->got_len = n;
    f->count++;
    return true;
}

static bool has_enough(void *opaque)
{
    struct fixture *f = opaque;
    return f->count >= f->want;
}

static int open_tap(struct fixture *f, bool vnet_hdr)
{
    struct net_tap_options opt = {.ifname = "rftest0", .vnet_hdr = vnet_hdr};
    int ret = net_tap_open(f->loop, &opt, &f->net);
    if (ret)
        return ret;
    f->net->receive = receive;
    f->net->opaque = f;
    f->packet = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, htons(ETHERTYPE));
    struct ifreq ifr = {.ifr_flags = IFF_UP | IFF_RUNNING};
    strcpy(ifr.ifr_name, "rftest0");
    assert_true(f->packet >= 0);
    assert_int_equal(ioctl(f->packet, SIOCSIFFLAGS, &ifr), 0);
    struct sockaddr_ll a = {.sll_family = AF_PACKET,
                            .sll_protocol = htons(ETHERTYPE),
                            .sll_ifindex = (int)if_nametoindex("rftest0")};
    assert_int_equal(bind(f->packet, (struct sockaddr *)&a, sizeof(a)), 0);
    struct timeval limit = {.tv_sec = 5};
    setsockopt(f->packet, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
    f->net->ops->set_receive(f->net, true);
    return 0;
}

static int setup(void **state)
{
    struct fixture *f = calloc(1, sizeof(*f));
    f->loop = loop_create(NULL);
    f->packet = -1;
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    struct fixture *f = *state;
    net_close(f->net);
    if (f->packet >= 0)
        close(f->packet);
    loop_destroy(f->loop);
    free(f);
    return 0;
}

static size_t make_frame(uint8_t *p, size_t payload, unsigned seed)
{
    memset(p, 0xff, 6);
    memset(p + 6, 0x52, 6);
    p[12] = ETHERTYPE >> 8;
    p[13] = ETHERTYPE & 0xff;
    for (size_t i = 0; i < payload; i++)
        p[14 + i] = (uint8_t)(seed + i * 3);
    return 14 + payload;
}

static void frames_pass_both_ways(void **state)
{
    struct fixture *f = *state;
    if (!allowed)
        skip();
    for (int vnet_hdr = 0; vnet_hdr < 2; vnet_hdr++) {
        assert_int_equal(open_tap(f, vnet_hdr), 0);
        assert_string_equal(f->net->ops->name, "tap");
        uint8_t frame[1514], back[2000];
        size_t n = make_frame(frame, 1000, (unsigned)vnet_hdr);
        assert_int_equal(write(f->packet, frame, n), n);
        f->count = 0;
        f->want = 1;
        assert_true(run_until(f->loop, has_enough, f, 5000));
        assert_int_equal(f->got_len, n + sizeof(struct net_header));
        struct net_header head;
        memcpy(&head, f->got, sizeof(head));
        assert_int_equal(head.num_buffers, 1);
        assert_int_equal(head.gso_type, 0);
        assert_memory_equal(f->got + sizeof(head), frame, n);

        n = make_frame(frame, 700, 77);
        memset(&head, 0, sizeof(head));
        struct iovec iov[3] = {{&head, sizeof(head)}, {frame, 5}, {frame + 5, n - 5}};
        assert_int_equal(f->net->ops->send(f->net, iov, 3), 0);
        assert_int_equal(recv(f->packet, back, sizeof(back), 0), n);
        assert_memory_equal(back, frame, n);

        /* What the host refuses is dropped: the guest's business alone. */
        head.gso_type = 0x55;
        head.flags = 0xff;
        head.csum_start = 0xffff;
        assert_int_equal(f->net->ops->send(f->net, iov, 3), 0);
        iov[1].iov_len = iov[2].iov_len = 0;
        assert_int_equal(f->net->ops->send(f->net, iov, 3), 0);
        net_close(f->net);
        f->net = NULL;
        close(f->packet);
        f->packet = -1;
    }
}

static void refused_frame_comes_later(void **state)
{
    struct fixture *f = *state;
    if (!allowed)
        skip();
    assert_int_equal(open_tap(f, true), 0);
    f->refuse = true;
    uint8_t frame[1514];
    for (unsigned i = 0; i < 3; i++)
        assert_true(write(f->packet, frame, make_frame(frame, 100 + i, i)) > 0);
    run_until(f->loop, NULL, NULL, 50);
    assert_int_equal(f->refused, 1); /* and not again and again */
    f->refuse = false;
    run_until(f->loop, NULL, NULL, 20);
    assert_int_equal(f->count, 0);
    f->net->ops->set_receive(f->net, true);
    f->want = 3;
    assert_true(run_until(f->loop, has_enough, f, 5000));
    assert_int_equal(f->got_len, sizeof(struct net_header) + 14 + 102);
}

static void offloads_follow_the_kernel_header(void **state)
{
    struct fixture *f = *state;
    if (!allowed)
        skip();
    assert_int_equal(open_tap(f, false), 0);
    assert_int_equal(f->net->ops->features(f->net), 0);
    net_close(f->net);
    close(f->packet);
    assert_int_equal(open_tap(f, true), 0);
    uint64_t features = f->net->ops->features(f->net);
    assert_true(features & (1u << VIRTIO_NET_F_CSUM));
    assert_true(features & (1u << VIRTIO_NET_F_HOST_TSO4));
    assert_true(features & (1u << VIRTIO_NET_F_GUEST_TSO6));
    f->net->ops->set_features(f->net, features);
    f->net->ops->set_features(f->net, 0);

    /* In use: one line and an error. */
    struct net *other;
    struct net_tap_options opt = {.ifname = "rftest0", .vnet_hdr = true};
    assert_int_equal(net_tap_open(f->loop, &opt, &other), -EBUSY);
    assert_null(other);
    opt.ifname = "a-name-that-is-too-long";
    assert_int_equal(net_tap_open(f->loop, &opt, &other), -EINVAL);
    opt.ifname = "lo";
    assert_int_equal(net_tap_open(f->loop, &opt, &other), -EINVAL);
}

int main(void)
{
    log_set_level(-1);
    if (unshare(CLONE_NEWNET) == 0 || unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0) {
        struct fixture f = {.loop = loop_create(NULL)};
        struct net_tap_options opt = {.ifname = "rftest0"};
        int ret = net_tap_open(f.loop, &opt, &f.net);
        allowed = ret == 0;
        if (ret)
            print_message("no TAP interfaces here: %s\n", strerror(-ret));
        net_close(f.net);
        loop_destroy(f.loop);
    } else {
        print_message("no network namespaces here: %s\n", strerror(errno));
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(frames_pass_both_ways, setup, teardown),
        cmocka_unit_test_setup_teardown(refused_frame_comes_later, setup, teardown),
        cmocka_unit_test_setup_teardown(offloads_follow_the_kernel_header, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
