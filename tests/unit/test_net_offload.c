/*
 * Checksums and segmentation in software, against a plain implementation of RFC 1071 in this file.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include <linux/virtio_net.h>

#include "base/util.h"
#include "device/virtio/net_offload.h"

#define ETH 14u

static uint32_t add(const uint8_t *p, size_t len, uint32_t s)
{
    for (size_t i = 0; i < len; i++) {
        s += i & 1 ? p[i] : (uint32_t)p[i] << 8;
        s = (s & 0xffff) + (s >> 16);
    }
    return s;
}

static uint32_t be(const uint8_t *p, unsigned bytes)
{
    uint32_t v = 0;
    while (bytes--)
        v = v << 8 | *p++;
    return v;
}

static void put(uint8_t *p, unsigned bytes, uint32_t v)
{
    while (bytes--) {
        p[bytes] = (uint8_t)v;
        v >>= 8;
    }
}

/* A TCP frame as a guest hands it over for segmentation. Returns its length. */
static size_t make_frame(uint8_t *f, struct net_header *h, bool v6, unsigned tags, unsigned options,
                         size_t payload, uint16_t mss)
{
    size_t ip = ETH + 4 * tags, tcp = ip + (v6 ? 40 : 20), data = tcp + 20 + options;
    for (size_t i = 0; i < data + payload; i++)
        f[i] = (uint8_t)(i * 31 + i / 256);
    for (unsigned t = 0; t < tags; t++)
        put(f + 12 + 4 * t, 2, t ? 0x8100 : 0x88a8);
    if (tags == 1)
        put(f + 12, 2, 0x8100);
    put(f + ip - 2, 2, v6 ? 0x86dd : 0x0800);
    if (v6) {
        f[ip] = 0x60;
        put(f + ip + 4, 2, (uint32_t)(20 + options + payload));
        f[ip + 6] = 6;
    } else {
        f[ip] = 0x45;
        put(f + ip + 2, 2, (uint32_t)(40 + options + payload));
        put(f + ip + 4, 2, 0xfffe);
        f[ip + 9] = 6;
    }
    put(f + tcp + 4, 4, 0xfffff000);
    f[tcp + 12] = (uint8_t)((20 + options) / 4 << 4);
    f[tcp + 13] = 0x80 | 0x10 | 0x08 | 0x01; /* CWR ACK PSH FIN */
    *h =
        (struct net_header){.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM,
                            .gso_type = (v6 ? VIRTIO_NET_HDR_GSO_TCPV6 : VIRTIO_NET_HDR_GSO_TCPV4) |
                                        VIRTIO_NET_HDR_GSO_ECN,
                            .hdr_len = (uint16_t)data,
                            .gso_size = mss,
                            .csum_start = (uint16_t)tcp,
                            .csum_offset = 16};
    return data + payload;
}

struct check {
    const uint8_t *whole;
    size_t ip, tcp, data, total, done;
    bool v6;
    uint16_t mss;
    unsigned count, stop_after;
};

static bool check_segment(void *opaque, const uint8_t *headers, size_t headers_len,
                          const uint8_t *payload, size_t payload_len)
{
    struct check *c = opaque;
    uint8_t f[70000];
    assert_int_equal(headers_len, c->data);
    memcpy(f, headers, headers_len);
    memcpy(f + headers_len, payload, payload_len);

    bool last = c->done + payload_len == c->total;
    assert_true(last ? payload_len <= c->mss : payload_len == c->mss);
    assert_memory_equal(f + c->data, c->whole + c->data + c->done, payload_len);
    assert_memory_equal(f, c->whole, c->ip);
    const uint8_t *ip = f + c->ip, *tcp = f + c->tcp;
    size_t tcp_len = c->data - c->tcp + payload_len;
    uint32_t s = 0;
    if (c->v6) {
        assert_int_equal(be(ip + 4, 2), c->data - c->ip - 40 + payload_len);
        s = add(ip + 8, 32, s);
    } else {
        assert_int_equal(be(ip + 2, 2), c->data - c->ip + payload_len);
        assert_int_equal(be(ip + 4, 2), (0xfffe + c->count) & 0xffff);
        assert_int_equal(add(ip, c->tcp - c->ip, 0), 0xffff);
        s = add(ip + 12, 8, s);
    }
    uint8_t tail[4] = {0, 6, (uint8_t)(tcp_len >> 8), (uint8_t)tcp_len};
    s = add(tail, 4, s);
    assert_int_equal(add(tcp, tcp_len, s), 0xffff);
    assert_int_equal(be(tcp + 4, 4), (uint32_t)(0xfffff000 + c->done));
    assert_int_equal(tcp[13], 0x10 | (c->count == 0 ? 0x80 : 0) | (last ? 0x09 : 0));
    c->done += payload_len;
    c->count++;
    return c->count != c->stop_after;
}

static void test_segments(void **state)
{
    static uint8_t f[70000];
    const size_t payloads[] = {0, 1, 99, 100, 101, 1448, 14480, 14481, 65000};
    const uint16_t sizes[] = {1, 99, 100, 1448, 65535};
    for (unsigned v6 = 0; v6 < 2; v6++)
        for (unsigned tags = 0; tags <= 2; tags++)
            for (unsigned options = 0; options <= 40; options += 20)
                for (unsigned p = 0; p < ARRAY_SIZE(payloads); p++)
                    for (unsigned m = 0; m < ARRAY_SIZE(sizes); m++) {
                        if (payloads[p] / sizes[m] > 1000)
                            continue;
                        struct net_header h;
                        size_t len = make_frame(f, &h, v6, tags, options, payloads[p], sizes[m]);
                        struct check c = {.whole = f,
                                          .ip = ETH + 4 * tags,
                                          .tcp = h.csum_start,
                                          .data = h.csum_start + 20 + options,
                                          .total = payloads[p],
                                          .v6 = v6,
                                          .mss = sizes[m]};
                        assert_int_equal(net_offload_segment(&h, f, len, check_segment, &c), 0);
                        assert_int_equal(c.done, payloads[p]);
                        assert_int_equal(c.count, MAX(1, (payloads[p] + sizes[m] - 1) / sizes[m]));
                    }
}

static void test_stops_when_full(void **state)
{
    static uint8_t f[70000];
    struct net_header h;
    size_t len = make_frame(f, &h, false, 0, 0, 5000, 1000);
    struct check c = {
        .whole = f, .ip = ETH, .tcp = 34, .data = 54, .total = 5000, .mss = 1000, .stop_after = 2};
    assert_int_equal(net_offload_segment(&h, f, len, check_segment, &c), 0);
    assert_int_equal(c.count, 2);
}

static bool never(void *opaque, const uint8_t *headers, size_t headers_len, const uint8_t *payload,
                  size_t payload_len)
{
    fail_msg("emitted a segment of a bad frame");
    return false;
}

static void test_bad_frames(void **state)
{
    uint8_t f[2000];
    struct net_header h, good;
    size_t len = make_frame(f, &good, false, 0, 0, 1000, 100);
    /* Cut short anywhere in the headers. */
    for (size_t cut = 0; cut < 54; cut++)
        assert_int_equal(net_offload_segment(&good, f, cut, never, NULL), -EINVAL);
    h = good;
    h.gso_size = 0;
    assert_int_equal(net_offload_segment(&h, f, len, never, NULL), -EINVAL);
    h = good;
    h.gso_type = VIRTIO_NET_HDR_GSO_TCPV6;
    assert_int_equal(net_offload_segment(&h, f, len, never, NULL), -EINVAL);
    const uint16_t starts[] = {0, 14, 33, 35, 1040, 1054, 0xffff};
    for (unsigned i = 0; i < ARRAY_SIZE(starts); i++) {
        h = good;
        h.csum_start = starts[i];
        assert_int_equal(net_offload_segment(&h, f, len, never, NULL), -EINVAL);
    }
    const struct {
        unsigned at;
        uint8_t value;
    } bad[] = {{12, 0x86}, {14, 0x55}, {14, 0x44}, {14, 0x4f}, {23, 17}, {46, 0x40}};
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
        make_frame(f, &h, false, 0, 0, 1000, 100);
        f[bad[i].at] = bad[i].value;
        assert_int_equal(net_offload_segment(&h, f, len, never, NULL), -EINVAL);
    }
    /* A TCP header longer than the frame. */
    len = make_frame(f, &h, false, 0, 0, 4, 100);
    f[46] = 0xf0;
    assert_int_equal(net_offload_segment(&h, f, len, never, NULL), -EINVAL);
    /* IPv6: the TCP header inside the IP header, or too far behind it. */
    len = make_frame(f, &h, true, 0, 0, 1000, 100);
    h.csum_start = 40;
    assert_int_equal(net_offload_segment(&h, f, len, never, NULL), -EINVAL);
    h.csum_start = 500;
    f[512] = 0x50;
    assert_int_equal(net_offload_segment(&h, f, len, never, NULL), -EINVAL);
}

static bool touch(void *opaque, const uint8_t *headers, size_t headers_len, const uint8_t *payload,
                  size_t payload_len)
{
    uint64_t *total = opaque;
    for (size_t i = 0; i < headers_len; i++)
        *total += headers[i];
    for (size_t i = 0; i < payload_len; i++)
        *total += payload[i];
    return true;
}

/* Whatever a guest sends: nothing outside of the frame is touched (with ASan: each is an object of
 * its own). */
static void test_random_frames(void **state)
{
    static uint8_t f[3000];
    unsigned accepted = 0;
    uint64_t total = 0;
    srand(1);
    for (unsigned i = 0; i < 100000; i++) {
        struct net_header h;
        size_t len =
            make_frame(f, &h, rand() & 1, (unsigned)rand() % 3, 4u * ((unsigned)rand() % 11),
                       (size_t)rand() % 1000, (uint16_t)(1 + rand() % 500));
        for (unsigned n = (unsigned)rand() % 4; n; n--)
            f[(size_t)rand() % 80] = (uint8_t)rand();
        if (rand() % 4 == 0)
            h.csum_start = (uint16_t)(rand() % 200);
        if (rand() % 4 == 0)
            len = (size_t)rand() % (len + 1);
        uint8_t *copy = malloc(len + 1);
        assert_non_null(copy);
        memcpy(copy, f, len);
        accepted += net_offload_segment(&h, copy, len, touch, &total) == 0;
        net_offload_checksum(copy, len, h.csum_start, h.csum_offset);
        free(copy);
    }
    assert_true(accepted > 10000 && accepted < 90000);
}

static void test_checksum(void **state)
{
    uint8_t f[1000], expected[1000];
    srand(2);
    for (unsigned i = 0; i < 20000; i++) {
        size_t len = 20 + (size_t)rand() % 900, start = (size_t)rand() % (len - 2);
        size_t offset = ((size_t)rand() % (len - start - 1)) & ~1ul;
        for (size_t k = 0; k < len; k++)
            f[k] = (uint8_t)rand();
        memcpy(expected, f, len);
        uint16_t sum = (uint16_t)~add(f + start, len - start, 0);
        put(expected + start + offset, 2, sum ? sum : 0xffff);
        assert_true(net_offload_checksum(f, len, start, offset));
        assert_memory_equal(f, expected, len);
    }
    memset(f, 0xff, 4);
    memset(f + 4, 0, 4);
    assert_true(net_offload_checksum(f, 8, 0, 6));
    assert_int_equal(be(f + 6, 2), 0xffff);
    assert_false(net_offload_checksum(f, 8, 7, 0));
    assert_false(net_offload_checksum(f, 8, 0, 7));
    assert_false(net_offload_checksum(f, 8, 0xffff, 0xffff));
    assert_true(net_offload_checksum(f, 8, 6, 0));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_segments),   cmocka_unit_test(test_stops_when_full),
        cmocka_unit_test(test_bad_frames), cmocka_unit_test(test_random_frames),
        cmocka_unit_test(test_checksum),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
