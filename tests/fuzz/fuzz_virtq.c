/*
 * Fuzz target: the split ring code, against a guest that writes anything anywhere in its rings.
 *
 * The input is a program of characters that count as digits of base 64 (0-9, a-z, A-Z, + and /);
 * others are left out. An operation is a digit and its operands, see run(). Each chain that the
 * device code accepts or refuses is judged a second time by reference(), which knows the rules
 * only; whatever it hands out must lie inside of RAM, and a refusal must leave the queue as it was.
 */
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <linux/virtio_ring.h>

#include "base/log.h"
#include "base/state.h"
#include "base/util.h"
#include "device/virtio/queue.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define SIZE  16u
#define SPLIT 0x8000u /* two regions meet here */
#define END   0x10000u
#define DESC  0x1000u
#define AVAIL 0x2000u
#define USED  0x3000u
#define TABLE 0x4000u /* for indirect tables */

static struct memory memory;
static uint8_t *ram[2];

static const uint8_t *in, *in_end;

static unsigned digit(void)
{
    while (in < in_end) {
        uint8_t c = *in++;
        if (c >= '0' && c <= '9')
            return c - '0';
        if (c >= 'a' && c <= 'z')
            return c - 'a' + 10u;
        if (c >= 'A' && c <= 'Z')
            return c - 'A' + 36u;
        if (c == '+' || c == '/')
            return c == '+' ? 62 : 63;
    }
    return 0;
}

static gpa_t address(void)
{
    static const gpa_t base[] = {0x5000,     TABLE,    DESC, AVAIL,           USED,
                                 SPLIT - 32, END - 32, END,  UINT64_MAX - 31, UINT64_MAX - 0xffff,
                                 0x80000000, 0};
    unsigned which = digit();
    return base[which % ARRAY_SIZE(base)] + digit();
}

static uint32_t length(void)
{
    static const uint32_t scale[] = {1, 16, 0x400, 0x1000000, 0x4000000};
    unsigned which = digit();
    uint32_t len = digit() * scale[which % ARRAY_SIZE(scale)];
    return which == 63 ? UINT32_MAX : len;
}

/* ---- What the rules say of the chain at head. ---- */

struct verdict {
    bool ok;
    unsigned segments, out;
    uint64_t bytes, out_bytes;
};

static bool inside(gpa_t at, uint64_t len)
{
    return at < END && len <= END - at;
}

static struct vring_desc descriptor(gpa_t table, uint32_t i)
{
    struct vring_desc d = {0};
    if (memory_read(&memory, table + 16 * (uint64_t)i, &d, sizeof(d)))
        abort();
    return d;
}

static struct verdict reference(const struct virtq *q, uint16_t head)
{
    struct verdict v = {.ok = false};
    gpa_t table = q->desc;
    uint32_t i = head, count = q->size, steps = 0;
    bool direct = true, writing = false;
    for (;;) {
        if (i >= count || steps++ == count)
            return v;
        struct vring_desc d = descriptor(table, i);
        if (d.flags & VRING_DESC_F_INDIRECT) {
            if (!direct || !q->indirect || d.flags & VRING_DESC_F_NEXT || !d.len || d.len % 16 ||
                !inside(d.addr, d.len) || (d.addr < SPLIT && d.addr + d.len > SPLIT))
                return v;
            direct = false;
            table = d.addr;
            count = d.len / 16;
            i = steps = 0;
            continue;
        }
        bool write = d.flags & VRING_DESC_F_WRITE;
        if (!d.len || !inside(d.addr, d.len) || (writing && !write))
            return v;
        writing = write;
        v.segments += 1 + (d.addr < SPLIT && d.addr + d.len > SPLIT);
        v.bytes += d.len;
        if (!write) {
            v.out = v.segments;
            v.out_bytes = v.bytes;
        }
        if (v.segments > VIRTQ_MAX_SEGMENTS)
            return v;
        if (!(d.flags & VRING_DESC_F_NEXT))
            break;
        i = d.next;
    }
    v.ok = true;
    return v;
}

static void check_chain(const struct virtq_chain *c, const struct verdict *v)
{
    uint64_t bytes[2] = {0, 0};
    unsigned n = c->out_count + c->in_count;
    if (!v->ok || n != v->segments || c->out_count != v->out)
        abort();
    for (unsigned i = 0; i < n; i++) {
        const uint8_t *p = c->iov[i].iov_base;
        size_t len = c->iov[i].iov_len;
        bool found = false;
        for (unsigned r = 0; r < 2; r++)
            found |= p >= ram[r] && p < ram[r] + SPLIT && len <= (size_t)(ram[r] + SPLIT - p) &&
                     c->range[i].gpa == (gpa_t)(p - ram[r]) + r * SPLIT;
        if (!found || len == 0 || c->range[i].len != len)
            abort();
        bytes[i >= c->out_count] += len;
    }
    if (bytes[0] != c->out_len || bytes[1] != c->in_len || bytes[0] != v->out_bytes ||
        bytes[0] + bytes[1] != v->bytes)
        abort();
}

static int pop(struct virtq *q, struct virtq_chain *c)
{
    const struct virtq before = *q;
    uint16_t head = 0, idx = 0;
    struct verdict v = {.ok = false};
    bool rings = virtq_check(q) == 0;
    if (rings) {
        memory_read(&memory, q->avail + 2, &idx, 2);
        memory_read(&memory, q->avail + 4 + 2 * (q->last_avail % q->size), &head, 2);
    }
    uint16_t waiting = idx - q->last_avail;
    if (rings && waiting && waiting <= q->size && q->in_flight < q->size)
        v = reference(q, head);

    int ret = virtq_pop(q, c);
    /* A ring may be fine for taking chains and not for giving them back: only then the two differ.
     */
    if (rings && (ret == 1) != v.ok)
        abort();
    if (rings && ret == 0 && waiting)
        abort();
    if (ret == 1) {
        if (rings)
            check_chain(c, &v);
        if (q->last_avail != (uint16_t)(before.last_avail + 1) ||
            q->in_flight != before.in_flight + 1)
            abort();
    } else if (memcmp(&before, q, sizeof(before))) {
        abort();
    }
    return ret;
}

static void save_and_load(struct virtq *q)
{
    struct state_writer *w = state_writer_create();
    const void *data;
    size_t len;
    state_begin(w, "q", 1);
    virtq_save(q, w);
    state_end(w);
    struct state_reader root, r;
    struct virtq copy = *q;
    if (state_writer_finish(w, &data, &len))
        abort();
    state_reader_init(&root, data, len);
    if (state_open(&root, "q", &r) || virtq_load(&copy, &r, 4))
        abort();
    if (copy.last_avail != q->last_avail || copy.used_idx != q->used_idx || copy.avail != q->avail)
        abort();
    state_writer_free(w);
}

static void run(void)
{
    static struct virtq_chain chain[SIZE + 1];
    unsigned taken = 0;
    struct virtq q = {.memory = &memory, .owner = "fuzz", .max_size = SIZE};
    virtq_reset(&q);
    q.desc = DESC;
    q.avail = AVAIL;
    q.used = USED;
    q.indirect = true;
    q.enabled = true;

    while (in < in_end) {
        uint16_t v;
        switch (digit() % 12) {
        case 0:
        case 1: { /* a descriptor: where, number, address, length, flags, next */
            gpa_t table = digit() % 2 ? TABLE : DESC;
            unsigned i = digit();
            struct vring_desc d = {.addr = address(), .len = length()};
            d.flags = (uint16_t)(digit() % 8);
            d.next = (uint16_t)digit();
            memory_write(&memory, table + 16 * i, &d, sizeof(d));
            break;
        }
        case 2: /* make head available */
        case 3: {
            uint16_t idx = 0;
            v = (uint16_t)digit();
            memory_read(&memory, q.avail + 2, &idx, 2);
            memory_write(&memory, q.avail + 4 + 2 * (idx % q.size), &v, 2);
            idx++;
            memory_write(&memory, q.avail + 2, &idx, 2);
            break;
        }
        case 4:
        case 5: /* take */
            if (taken <= SIZE && pop(&q, &chain[taken]) == 1)
                taken++;
            break;
        case 6: /* give back, with a length that may be more than there is */
            if (taken) {
                uint64_t len = length();
                if (virtq_put(&q, &chain[--taken], len) == 0 && digit() % 2)
                    virtq_publish(&q);
            }
            break;
        case 7:
            virtq_wants_interrupt(&q);
            virtq_notify_off(&q);
            if (virtq_notify_on(&q) != virtq_has_work(&q))
                abort();
            q.event_idx = digit() % 2;
            q.indirect = digit() % 4;
            break;
        case 8: /* the last few were not taken */
            v = (uint16_t)(digit() % 4);
            if (v <= taken && !q.staged) {
                virtq_unpop(&q, v);
                taken -= v;
            }
            break;
        case 9: { /* 16 bits anywhere */
            gpa_t at = address();
            v = (uint16_t)(digit() << 10 | digit());
            memory_write(&memory, at, &v, 2);
            break;
        }
        case 10: { /* another place for a ring, another size */
            gpa_t *ring[] = {&q.desc, &q.avail, &q.used};
            *ring[digit() % 3] = address();
            q.size = (uint16_t)(1u << digit() % 5);
            /* A device takes such a queue into service only after this; one that was loaded may
             * have any. */
            if (virtq_check(&q)) {
                q.desc = DESC;
                q.avail = AVAIL;
                q.used = USED;
                q.size = SIZE;
            }
            break;
        }
        case 11:
            if (taken == 0 && !q.staged)
                save_and_load(&q);
            break;
        }
        if (q.in_flight > SIZE)
            abort();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (!ram[0]) {
        log_set_level(LOG_ERROR);
        if (memory_init(&memory) || memory_add_ram(&memory, 0, SPLIT) ||
            memory_add_ram(&memory, SPLIT, END - SPLIT))
            abort();
        for (unsigned r = 0; r < 2; r++)
            ram[r] = memory.region[r].host;
    }
    for (unsigned r = 0; r < 2; r++)
        memset(ram[r], 0, SPLIT);
    in = data;
    in_end = data + size;
    run();
    return 0;
}
