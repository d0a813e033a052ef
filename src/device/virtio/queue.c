/*
 * Split virtqueues: see queue.h.
 *
 * The rings are shared with vCPUs that run at the same time. What the driver writes is loaded once
 * into a local variable and then checked. Order (virtio 1.2 §2.7.13): the available index is loaded
 * before the entries that it covers (acquire); used entries are stored before the used index
 * (release); and between storing an index and loading the other side's event field there is a full
 * barrier.
 */
#include "device/virtio/queue.h"

#include <errno.h>
#include <stdio.h>

#include <linux/virtio_ring.h>

#include "base/log.h"
#include "base/util.h"

#define DESC_BYTES 16

static size_t desc_bytes(const struct virtq *q)
{
    return (size_t)q->size * DESC_BYTES;
}

static size_t avail_bytes(const struct virtq *q)
{
    return 6 + 2 * (size_t)q->size;
}

static size_t used_bytes(const struct virtq *q)
{
    return 6 + 8 * (size_t)q->size;
}

/* Offsets in the rings. */
static size_t avail_entry(const struct virtq *q, uint16_t i)
{
    return 4 + 2 * (size_t)(i & (q->size - 1));
}

static size_t avail_used_event(const struct virtq *q)
{
    return 4 + 2 * (size_t)q->size;
}

static size_t used_entry(const struct virtq *q, uint16_t i)
{
    return 4 + 8 * (size_t)(i & (q->size - 1));
}

static size_t used_avail_event(const struct virtq *q)
{
    return 4 + 8 * (size_t)q->size;
}

static uint16_t load16(const uint8_t *p)
{
    return __atomic_load_n((const uint16_t *)(const void *)p, __ATOMIC_RELAXED);
}

static uint16_t load16_acquire(const uint8_t *p)
{
    return __atomic_load_n((const uint16_t *)(const void *)p, __ATOMIC_ACQUIRE);
}

static void store16(uint8_t *p, uint16_t v)
{
    __atomic_store_n((uint16_t *)(void *)p, v, __ATOMIC_RELEASE);
}

static int guest_error(const struct virtq *q, const char *what)
{
    log_guest_error("%s: queue %u: the guest gave %s", q->owner, q->index, what);
    return -EINVAL;
}

static const uint8_t *map_avail(const struct virtq *q)
{
    return memory_map(q->memory, q->avail, avail_bytes(q));
}

/* For writing. */
static uint8_t *map_used(const struct virtq *q)
{
    memory_prepare_write(q->memory, q->used, used_bytes(q));
    return memory_map(q->memory, q->used, used_bytes(q));
}

void virtq_reset(struct virtq *q)
{
    *q = (struct virtq){
        .memory = q->memory,
        .owner = q->owner,
        .index = q->index,
        .max_size = q->max_size,
        .size = q->max_size,
        .vector = VIRTQ_NO_VECTOR,
    };
}

static bool size_ok(const struct virtq *q)
{
    return q->size && q->size <= q->max_size && (q->size & (q->size - 1)) == 0;
}

int virtq_check(const struct virtq *q)
{
    if (!size_ok(q))
        return guest_error(q, "a bad queue size");
    if (q->desc % 16 || q->avail % 2 || q->used % 4)
        return guest_error(q, "a misaligned ring");
    if (!memory_map(q->memory, q->desc, desc_bytes(q)) || !map_avail(q) || !map_used(q))
        return guest_error(q, "a ring outside of RAM");
    return 0;
}

bool virtq_has_work(const struct virtq *q)
{
    const uint8_t *avail = map_avail(q);
    return avail && load16_acquire(avail + 2) != q->last_avail;
}

/* Adds the buffer of one descriptor to the chain, split where RAM regions meet. */
static int add_buffer(struct virtq *q, struct virtq_chain *c, gpa_t gpa, uint32_t len, bool in)
{
    if (len == 0)
        return guest_error(q, "an empty descriptor");
    if (!in && c->in_count)
        return guest_error(q, "a readable descriptor behind a writable one");
    if (c->out_len + c->in_len + len > VIRTQ_MAX_BYTES)
        return guest_error(q, "a chain of 4 GiB or more");
    *(in ? &c->in_len : &c->out_len) += len;

    while (len) {
        const struct memory_region *region = memory_find(q->memory, gpa);
        if (!region)
            return guest_error(q, "a buffer outside of RAM");
        unsigned n = c->out_count + c->in_count;
        if (n == VIRTQ_MAX_SEGMENTS)
            return guest_error(q, "a chain of too many buffers");
        uint32_t part = (uint32_t)MIN((uint64_t)len, region->size - (gpa - region->base));
        void *host = memory_map(q->memory, gpa, part);
        if (!host)
            return guest_error(q, "a buffer outside of RAM");
        if (in)
            memory_prepare_write(q->memory, gpa, part);
        c->iov[n] = (struct iovec){host, part};
        c->range[n] = (struct virtq_range){gpa, part};
        (*(in ? &c->in_count : &c->out_count))++;
        gpa += part;
        len -= part;
    }
    return 0;
}

/*
 * Follows descriptors from index on in a table of count entries. indirect NULL: this is an indirect
 * table; else *indirect gets the descriptor of a table with which the chain goes on (len 0: none).
 */
static int walk(struct virtq *q, struct virtq_chain *c, const uint8_t *table, uint32_t count,
                uint32_t index, struct vring_desc *indirect)
{
    for (uint32_t steps = 0; steps < count; steps++) {
        struct vring_desc d;
        if (index >= count)
            return guest_error(q, "a descriptor index beyond its table");
        memcpy(&d, table + (size_t)index * DESC_BYTES, sizeof(d));
        /* The guest may change the table under our eyes: from here on only the copy counts. */
        __asm__ volatile("" ::: "memory");

        if (d.flags & VRING_DESC_F_INDIRECT) {
            if (!indirect)
                return guest_error(q, "an indirect table inside an indirect table");
            if (!q->indirect)
                return guest_error(q, "an indirect table without having negotiated them");
            if (d.flags & VRING_DESC_F_NEXT)
                return guest_error(q, "an indirect descriptor with a next one");
            if (d.len == 0 || d.len % DESC_BYTES)
                return guest_error(q, "an indirect table of a bad length");
            *indirect = d;
            return 0;
        }
        int ret = add_buffer(q, c, d.addr, d.len, d.flags & VRING_DESC_F_WRITE);
        if (ret)
            return ret;
        if (!(d.flags & VRING_DESC_F_NEXT))
            return 0;
        index = d.next;
    }
    return guest_error(q, "a descriptor chain with a loop");
}

int virtq_pop(struct virtq *q, struct virtq_chain *c)
{
    const uint8_t *avail = map_avail(q);
    const uint8_t *desc = memory_map(q->memory, q->desc, desc_bytes(q));
    if (!avail || !desc)
        return guest_error(q, "a ring outside of RAM");

    uint16_t waiting = load16_acquire(avail + 2) - q->last_avail;
    if (!waiting)
        return 0;
    if (waiting > q->size)
        return guest_error(q, "an available index that jumps");
    if (q->in_flight >= q->size)
        return guest_error(q, "more chains than the queue has descriptors");

    c->head = load16(avail + avail_entry(q, q->last_avail));
    c->out_count = c->in_count = 0;
    c->out_len = c->in_len = 0;
    struct vring_desc indirect = {.len = 0};
    int ret = walk(q, c, desc, q->size, c->head, &indirect);
    if (ret == 0 && indirect.len) {
        /* Tables may be far longer than any chain: what counts is how many of their entries are
         * used. */
        const uint8_t *table = memory_map(q->memory, indirect.addr, indirect.len);
        ret = table ? walk(q, c, table, indirect.len / DESC_BYTES, 0, NULL)
                    : guest_error(q, "an indirect table outside of RAM");
    }
    if (ret)
        return ret;
    q->last_avail++;
    q->in_flight++;
    return 1;
}

void virtq_unpop(struct virtq *q, unsigned n)
{
    q->last_avail -= (uint16_t)n;
    q->in_flight -= n;
}

int virtq_put(struct virtq *q, const struct virtq_chain *c, uint64_t len)
{
    uint64_t left = len;
    for (unsigned i = c->out_count; left && i < c->out_count + c->in_count; i++) {
        uint32_t part = (uint32_t)MIN(left, c->range[i].len);
        memory_mark_written(q->memory, c->range[i].gpa, part);
        left -= part;
    }

    uint8_t *used = map_used(q);
    if (!used)
        return guest_error(q, "a ring outside of RAM");
    size_t at = used_entry(q, q->used_idx + q->staged);
    store_le32(used + at, c->head);
    store_le32(used + at + 4, (uint32_t)len);
    memory_mark_written(q->memory, q->used + at, 8);
    q->staged++;
    q->in_flight--;
    return 0;
}

int virtq_publish(struct virtq *q)
{
    if (!q->staged)
        return 0;
    uint8_t *used = map_used(q);
    if (!used)
        return guest_error(q, "a ring outside of RAM");
    if ((uint16_t)(q->used_idx - q->signalled_used) + q->staged > INT16_MAX)
        q->overrun = true;
    q->used_idx += q->staged;
    q->staged = 0;
    store16(used + 2, q->used_idx);
    memory_mark_written(q->memory, q->used + 2, 2);
    return 0;
}

void virtq_unstage(struct virtq *q)
{
    q->in_flight += q->staged;
    q->staged = 0;
}

bool virtq_wants_interrupt(struct virtq *q)
{
    const uint8_t *avail = map_avail(q);
    uint16_t now = q->used_idx, before = q->signalled_used;
    bool overrun = q->overrun;
    if (!avail || (now == before && !overrun))
        return false;
    q->signalled_used = now;
    q->overrun = false;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (!q->event_idx)
        return !(load16(avail) & VRING_AVAIL_F_NO_INTERRUPT);
    return overrun || vring_need_event(load16(avail + avail_used_event(q)), now, before);
}

static void set_used_flags(struct virtq *q, uint16_t flags)
{
    uint8_t *used = map_used(q);
    if (!used || load16(used) == flags)
        return;
    store16(used, flags);
    memory_mark_written(q->memory, q->used, 2);
}

void virtq_notify_off(struct virtq *q)
{
    /* With the event index an event in the past is as good: it is left where it is. */
    if (!q->event_idx)
        set_used_flags(q, VRING_USED_F_NO_NOTIFY);
}

bool virtq_notify_on(struct virtq *q)
{
    if (q->event_idx) {
        uint8_t *used = map_used(q);
        if (used) {
            store16(used + used_avail_event(q), q->last_avail);
            memory_mark_written(q->memory, q->used + used_avail_event(q), 2);
        }
    } else {
        set_used_flags(q, 0);
    }
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return virtq_has_work(q);
}

/* ---- Saved state. ---- */

static const char *field(char buf[32], const struct virtq *q, const char *name)
{
    snprintf(buf, 32, "queue%u_%s", q->index, name);
    return buf;
}

void virtq_save(const struct virtq *q, struct state_writer *w)
{
    char name[32];
    state_put_u64(w, field(name, q, "size"), q->size);
    state_put_u64(w, field(name, q, "vector"), q->vector);
    state_put_u64(w, field(name, q, "enabled"), q->enabled);
    state_put_u64(w, field(name, q, "desc"), q->desc);
    state_put_u64(w, field(name, q, "avail"), q->avail);
    state_put_u64(w, field(name, q, "used"), q->used);
    state_put_u64(w, field(name, q, "last_avail"), q->last_avail);
    state_put_u64(w, field(name, q, "used_idx"), q->used_idx);
    state_put_u64(w, field(name, q, "signalled_used"), q->signalled_used);
    state_put_u64(w, field(name, q, "overrun"), q->overrun);
}

/* Gets an integer of at most max. */
static int get(const struct state_reader *r, const struct virtq *q, const char *what, uint64_t max,
               uint64_t *out)
{
    char name[32];
    int ret = state_get_u64(r, field(name, q, what), out);
    if (ret == 0 && *out > max)
        ret = -EINVAL;
    if (ret)
        log_error("%s: saved state: bad or missing field %s", q->owner, name);
    return ret ? -EINVAL : 0;
}

int virtq_load(struct virtq *q, const struct state_reader *r, unsigned vectors)
{
    uint64_t size, vector, enabled, desc, avail, used, last_avail, used_idx, signalled, overrun;
    if (get(r, q, "size", q->max_size, &size) || get(r, q, "vector", UINT16_MAX, &vector) ||
        get(r, q, "enabled", 1, &enabled) || get(r, q, "desc", UINT64_MAX, &desc) ||
        get(r, q, "avail", UINT64_MAX, &avail) || get(r, q, "used", UINT64_MAX, &used) ||
        get(r, q, "last_avail", UINT16_MAX, &last_avail) ||
        get(r, q, "used_idx", UINT16_MAX, &used_idx) ||
        get(r, q, "signalled_used", UINT16_MAX, &signalled) || get(r, q, "overrun", 1, &overrun))
        return -EINVAL;

    virtq_reset(q);
    q->size = (uint16_t)size;
    if (!size_ok(q) || (vector >= vectors && vector != VIRTQ_NO_VECTOR)) {
        log_error("%s: saved state: queue %u has a bad size or vector", q->owner, q->index);
        virtq_reset(q);
        return -EINVAL;
    }
    q->vector = (uint16_t)vector;
    q->enabled = enabled;
    q->desc = desc;
    q->avail = avail;
    q->used = used;
    q->last_avail = (uint16_t)last_avail;
    q->used_idx = (uint16_t)used_idx;
    q->signalled_used = (uint16_t)signalled;
    q->overrun = overrun;
    return 0;
}
