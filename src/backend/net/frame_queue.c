/* A bounded queue of frames; see frame_queue.h. */
#include "backend/net/frame_queue.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"

#define HEAD 8u         /* bytes in front of each frame; frames begin at multiples of it */
#define WRAP UINT64_MAX /* in place of a length: the next frame is at the start of the ring */

int frame_queue_init(struct frame_queue *q, size_t size)
{
    *q = (struct frame_queue){.size = align_down(size, HEAD)};
    q->data = malloc(q->size);
    return q->data ? 0 : -ENOMEM;
}

void frame_queue_destroy(struct frame_queue *q)
{
    free(q->data);
    *q = (struct frame_queue){0};
}

/* Where need bytes can lie together, or SIZE_MAX. head == tail must stay the mark of an empty
 * queue. */
static size_t find_room(struct frame_queue *q, size_t need)
{
    if (q->frames == 0)
        q->head = q->tail = 0;
    if (q->tail >= q->head) {
        if (need < q->size - q->tail)
            return q->tail;
        if (need < q->head) {
            store_le64(q->data + q->tail, WRAP);
            return 0;
        }
        return SIZE_MAX;
    }
    return need < q->head - q->tail ? q->tail : SIZE_MAX;
}

bool frame_queue_push(struct frame_queue *q, const struct iovec *iov, unsigned iovcnt, size_t skip)
{
    size_t total = 0;
    for (unsigned i = 0; i < iovcnt; i++)
        if (__builtin_add_overflow(total, iov[i].iov_len, &total))
            return false;
    if (total <= skip || total - skip > q->size)
        return false;
    size_t len = total - skip;
    size_t at = find_room(q, HEAD + align_up(len, HEAD));
    if (at == SIZE_MAX)
        return false;
    store_le64(q->data + at, len);
    uint8_t *p = q->data + at + HEAD;
    for (unsigned i = 0; i < iovcnt; i++) {
        size_t drop = MIN(skip, iov[i].iov_len), n = iov[i].iov_len - drop;
        if (n)
            memcpy(p, (const uint8_t *)iov[i].iov_base + drop, n);
        p += n;
        skip -= drop;
    }
    q->tail = at + HEAD + align_up(len, HEAD);
    q->frames++;
    return true;
}

const uint8_t *frame_queue_peek(const struct frame_queue *q, size_t *len)
{
    if (q->frames == 0)
        return NULL;
    const uint8_t *p = q->data + q->head;
    if (load_le64(p) == WRAP)
        p = q->data;
    *len = load_le64(p);
    return p + HEAD;
}

void frame_queue_pop(struct frame_queue *q)
{
    size_t len;
    const uint8_t *p = frame_queue_peek(q, &len);
    if (!p)
        return;
    q->head = (size_t)(p - q->data) + align_up(len, HEAD);
    q->frames--;
}
