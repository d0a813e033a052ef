/* Checksums and TCP segmentation in software: see net_offload.h. */
#include "device/virtio/net_offload.h"

#include <errno.h>
#include <string.h>

#include <arpa/inet.h>
#include <linux/if_ether.h>
#include <linux/virtio_net.h>
#include <netinet/in.h>

#include "base/util.h"

/* Offsets in headers. */
enum {
    IP4_TOTAL_LEN = 2,
    IP4_ID = 4,
    IP4_PROTOCOL = 9,
    IP4_CHECKSUM = 10,
    IP4_ADDRESSES = 12,
    IP4_MIN = 20,
    IP6_PAYLOAD_LEN = 4,
    IP6_ADDRESSES = 8,
    IP6_MIN = 40,
    TCP_SEQ = 4,
    TCP_OFFSET = 12,
    TCP_FLAGS = 13,
    TCP_CHECKSUM = 16,
    TCP_MIN = 20,
};
#define TCP_FIN 0x01
#define TCP_PSH 0x08
#define TCP_CWR 0x80

static uint16_t load_be16(const uint8_t *p)
{
    return ntohs(load_le16(p));
}
static void store_be16(uint8_t *p, size_t v)
{
    store_le16(p, htons((uint16_t)v));
}

/* Adds len bytes to a ones' complement sum, in host order: swapping bytes commutes with it (RFC
 * 1071). */
static uint64_t sum(const uint8_t *p, size_t len, uint64_t s)
{
    /* 32-bit words into 64 bits: 64 KiB cannot overflow. */
    for (; len >= 4; p += 4, len -= 4)
        s += load_le32(p);
    if (len >= 2) {
        s += load_le16(p);
        p += 2;
        len -= 2;
    }
    return len ? s + *p : s;
}

static uint16_t fold(uint64_t s)
{
    s = (s & UINT32_MAX) + (s >> 32);
    s = (s & UINT32_MAX) + (s >> 32);
    s = (s & 0xffff) + (s >> 16);
    s = (s & 0xffff) + (s >> 16);
    return (uint16_t)~s;
}

bool net_offload_checksum(uint8_t *frame, size_t len, size_t start, size_t offset)
{
    if (start + offset + 2 > len)
        return false;
    uint16_t c = fold(sum(frame + start, len - start, 0));
    /* A zero would mean "none" in UDP; its other form is right everywhere. */
    store_le16(frame + start + offset, c ? c : 0xffff);
    return true;
}

/* Where the parts of a TCP frame begin. */
struct layout {
    size_t ip, tcp, payload;
    bool v6;
};

static bool parse(const struct net_header *hdr, const uint8_t *frame, size_t len, struct layout *l)
{
    l->v6 = (hdr->gso_type & ~VIRTIO_NET_HDR_GSO_ECN) == VIRTIO_NET_HDR_GSO_TCPV6;
    l->tcp = hdr->csum_start;

    size_t type = 12;
    for (int tags = 0; tags < 2 && type + 2 <= len; tags++, type += 4) {
        uint16_t t = load_be16(frame + type);
        if (t != ETH_P_8021Q && t != ETH_P_8021AD)
            break;
    }
    l->ip = type + 2;
    if (l->ip + (l->v6 ? IP6_MIN : IP4_MIN) > len ||
        load_be16(frame + type) != (l->v6 ? ETH_P_IPV6 : ETH_P_IP))
        return false;

    const uint8_t *ip = frame + l->ip;
    if (l->v6) {
        if (ip[0] >> 4 != 6 || l->tcp < l->ip + IP6_MIN)
            return false;
    } else {
        size_t ip_len = (ip[0] & 15) * 4u;
        if (ip[0] >> 4 != 4 || ip_len < IP4_MIN || l->tcp != l->ip + ip_len ||
            ip[IP4_PROTOCOL] != IPPROTO_TCP)
            return false;
    }
    if (l->tcp + TCP_MIN > len)
        return false;
    size_t tcp_len = (frame[l->tcp + TCP_OFFSET] >> 4) * 4u;
    l->payload = l->tcp + tcp_len;
    return tcp_len >= TCP_MIN && l->payload <= len && l->payload <= NET_OFFLOAD_MAX_HEADERS;
}

/* Lengths, numbers and checksums of the segment with payload_len bytes at offset done of the whole.
 */
static void finish_headers(uint8_t *headers, const struct layout *l, unsigned number, size_t done,
                           const uint8_t *payload, size_t payload_len)
{
    uint8_t *ip = headers + l->ip, *tcp = headers + l->tcp;
    size_t tcp_len = l->payload - l->tcp + payload_len;
    if (l->v6) {
        store_be16(ip + IP6_PAYLOAD_LEN, l->payload - l->ip - IP6_MIN + payload_len);
    } else {
        store_be16(ip + IP4_TOTAL_LEN, l->payload - l->ip + payload_len);
        store_be16(ip + IP4_ID, load_be16(ip + IP4_ID) + number);
        store_le16(ip + IP4_CHECKSUM, 0);
        store_le16(ip + IP4_CHECKSUM, fold(sum(ip, l->tcp - l->ip, 0)));
    }
    store_le32(tcp + TCP_SEQ, htonl(ntohl(load_le32(tcp + TCP_SEQ)) + (uint32_t)done));

    uint64_t s = htons(IPPROTO_TCP) + (uint64_t)htons((uint16_t)tcp_len);
    s = l->v6 ? sum(ip + IP6_ADDRESSES, 32, s) : sum(ip + IP4_ADDRESSES, 8, s);
    store_le16(tcp + TCP_CHECKSUM, 0);
    s = sum(tcp, l->payload - l->tcp, s);
    store_le16(tcp + TCP_CHECKSUM, fold(sum(payload, payload_len, s)));
}

int net_offload_segment(const struct net_header *hdr, const uint8_t *frame, size_t len,
                        net_offload_emit_fn *emit, void *opaque)
{
    struct layout l;
    if (hdr->gso_size == 0 || !parse(hdr, frame, len, &l))
        return -EINVAL;
    size_t total = len - l.payload, done = 0;
    unsigned number = 0;
    do {
        uint8_t headers[NET_OFFLOAD_MAX_HEADERS];
        size_t part = MIN(total - done, hdr->gso_size);
        memcpy(headers, frame, l.payload);
        /* FIN and PSH belong to the last segment, CWR to the first (RFC 3168 6.1.2). */
        if (done + part < total)
            headers[l.tcp + TCP_FLAGS] &= (uint8_t) ~(TCP_FIN | TCP_PSH);
        if (done)
            headers[l.tcp + TCP_FLAGS] &= (uint8_t)~TCP_CWR;
        finish_headers(headers, &l, number++, done, frame + l.payload + done, part);
        if (!emit(opaque, headers, l.payload, frame + l.payload + done, part))
            break;
        done += part;
    } while (done < total);
    return 0;
}
