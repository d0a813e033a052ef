/*
 * Split virtqueues (virtio 1.2 §2.7): taking descriptor chains and giving them back.
 *
 * The ring code of all virtio devices. Everything that is read from guest memory is checked here,
 * and read only once: a device sees host pointers inside RAM, in order, all readable ones before
 * all writable ones. Guest errors return -EINVAL after a line in the log; the queue stays as it was
 * and its owner takes the device out of service (virtio_pop does so).
 *
 * No host pointer outlives the chain that it came with; the rings' own addresses are looked up at
 * each use. Machine lock held.
 */
#ifndef RINGFORT_DEVICE_VIRTIO_QUEUE_H
#define RINGFORT_DEVICE_VIRTIO_QUEUE_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "base/state.h"
#include "memory/memory.h"

#define VIRTQ_MAX_SIZE 1024
/* The longest chain in segments, wherever its descriptors stand. A buffer across two RAM regions
 * counts twice. */
#define VIRTQ_MAX_SEGMENTS 258
/* The most bytes in a chain. */
#define VIRTQ_MAX_BYTES UINT32_MAX
#define VIRTQ_NO_VECTOR 0xffff

struct virtq {
    struct memory *memory; /* borrowed */
    const char *owner;     /* device id, for messages; borrowed */
    unsigned index;
    uint16_t max_size; /* power of two */

    /* Set by the driver through the transport. */
    uint16_t size;
    uint16_t vector; /* MSI-X, or VIRTQ_NO_VECTOR */
    bool enabled;
    gpa_t desc, avail, used;

    /* Negotiated; derived from the device's features. */
    bool event_idx, indirect;

    /* Progress. */
    uint16_t last_avail;     /* next entry of the available ring to take */
    uint16_t used_idx;       /* next entry of the used ring to fill */
    uint16_t signalled_used; /* used_idx when virtq_wants_interrupt() was asked last… */
    bool overrun;            /* …too long ago to compare with: the answer is yes */
    uint16_t staged;         /* used entries written but not yet published */
    unsigned in_flight;      /* chains taken and not given back */
    unsigned budget;         /* chains that virtio_pop() still hands out in this round */
};

/*
 * A descriptor chain: iov[0 … out_count) is what the device reads, the in_count entries after that
 * are what it writes. A device may trim the entries as it likes: range[] keeps what virtq_put()
 * needs.
 */
struct virtq_chain {
    uint16_t head;
    unsigned out_count, in_count;
    uint64_t out_len, in_len; /* bytes in all */
    struct iovec iov[VIRTQ_MAX_SEGMENTS];
    struct virtq_range {
        gpa_t gpa;
        uint32_t len;
    } range[VIRTQ_MAX_SEGMENTS];
};

static inline struct iovec *virtq_out(struct virtq_chain *c)
{
    return c->iov;
}
static inline struct iovec *virtq_in(struct virtq_chain *c)
{
    return c->iov + c->out_count;
}

/* To the state after a device reset; memory, owner, index and max_size stay. */
void virtq_reset(struct virtq *q);
/* Are size, alignment and place of the rings acceptable? 0, or -EINVAL (logged as the guest's
 * error). */
int virtq_check(const struct virtq *q);
/* True while the available ring has entries; false also when the rings are out of RAM. */
bool virtq_has_work(const struct virtq *q);

/* 1: *c holds the next chain; 0: none is available; -EINVAL: guest error (logged). */
int virtq_pop(struct virtq *q, struct virtq_chain *c);
/* Undo the last n pops, none of which has been given back. */
void virtq_unpop(struct virtq *q, unsigned n);
/*
 * Give a chain back with len bytes written, counted from the start of its writable part; marks
 * those bytes as written. virtq_put() only stages it: the driver sees it after virtq_publish(), all
 * staged ones at once, in order. 0, or -EINVAL when the used ring is gone (logged).
 */
int virtq_put(struct virtq *q, const struct virtq_chain *c, uint64_t len);
int virtq_publish(struct virtq *q);
/* Forget what is staged: the chains count as taken again (for virtq_unpop()). */
void virtq_unstage(struct virtq *q);

/*
 * Does the driver want an interrupt for what was published since the last call? Also answers for
 * the event index (§2.7.7), so it is called once per batch, and its answer is acted upon.
 */
bool virtq_wants_interrupt(struct virtq *q);
/* Ask the driver not to notify (a hint). */
void virtq_notify_off(struct virtq *q);
/* Ask for a notification of the next chain; true: some are available already, look again. */
bool virtq_notify_on(struct virtq *q);

/* Fields of a queue, into the current section; the names carry its index. */
void virtq_save(const struct virtq *q, struct state_writer *w);
/* -EINVAL (logged) for what no queue can have. */
int virtq_load(struct virtq *q, const struct state_reader *r, unsigned vectors);

#endif
