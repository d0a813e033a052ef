/*
 * A bounded first-in first-out queue of Ethernet frames in one ring of bytes.
 *
 * Frames lie contiguous, each behind its length. No lock: its owner has one.
 */
#ifndef RINGFORT_BACKEND_NET_FRAME_QUEUE_H
#define RINGFORT_BACKEND_NET_FRAME_QUEUE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

struct frame_queue {
    uint8_t *data;
    size_t size, head, tail; /* head == tail: empty */
    unsigned frames;
};

/* size: bytes of the ring; the longest frame it takes is a little less than half. 0 or -ENOMEM. */
int frame_queue_init(struct frame_queue *q, size_t size);
void frame_queue_destroy(struct frame_queue *q);
/* Appends the frame in iov without its first skip bytes. false: no room, or nothing left of it. */
bool frame_queue_push(struct frame_queue *q, const struct iovec *iov, unsigned iovcnt, size_t skip);
/* The oldest frame, valid until frame_queue_pop(); NULL: empty. */
const uint8_t *frame_queue_peek(const struct frame_queue *q, size_t *len);
void frame_queue_pop(struct frame_queue *q);

#endif
