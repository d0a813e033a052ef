/*
 * Checksums and TCP segmentation in software, for backends that leave them to the device.
 *
 * Guests under a software engine pay for each frame with translated code: it is cheaper to let them
 * send 64 KiB at once and cut it up here. Pure functions; frames begin with the Ethernet header and
 * come from the guest, so nothing about them is believed.
 */
#ifndef RINGFORT_DEVICE_VIRTIO_NET_OFFLOAD_H
#define RINGFORT_DEVICE_VIRTIO_NET_OFFLOAD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "backend/net/net.h"

/* The most bytes of headers in front of a segment's payload: Ethernet with two tags, IPv6 with some
 * options, TCP. */
#define NET_OFFLOAD_MAX_HEADERS 512

/*
 * Completes a partial checksum: the ones' complement sum from start to the end goes to start +
 * offset, where the pseudo header's sum stands already (virtio 1.2 §5.1.6.2). false: outside of the
 * frame.
 */
bool net_offload_checksum(uint8_t *frame, size_t len, size_t start, size_t offset);

/* One finished frame: headers and payload. false: the backend is full, stop. */
typedef bool net_offload_emit_fn(void *opaque, const uint8_t *headers, size_t headers_len,
                                 const uint8_t *payload, size_t payload_len);
/*
 * Cuts a TCP frame into segments of hdr->gso_size bytes, with all checksums in place. gso_type is
 * TCPV4 or TCPV6, with or without the ECN bit; csum_start is where the TCP header is. 0, or -EINVAL
 * (nothing was emitted) when the headers are not those of such a frame. A full backend loses the
 * rest of the segments, as a full network card does.
 */
int net_offload_segment(const struct net_header *hdr, const uint8_t *frame, size_t len,
                        net_offload_emit_fn *emit, void *opaque);

#endif
