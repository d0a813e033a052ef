/*
 * virtio-blk: a disk (virtio 1.2 §5.2).
 *
 * Requests are taken from the one queue in the event loop's thread, checked, and given to the block
 * backend with the guest's own buffers; its done() gives the chain back. A request object lives
 * from the pop to the push; as many exist as were ever in flight at once, and they are kept for the
 * next. One exists from the start, so that even without memory there is always one to use or to
 * wait for.
 *
 * The disk's size does not change while the machine runs. Errors of the disk are the guest's to
 * handle: they end as VIRTIO_BLK_S_IOERR. Only a chain without room for header or status is a guest
 * error.
 */
#include "device/virtio/virtio.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include <linux/virtio_blk.h>

#include "backend/block/block.h"
#include "base/log.h"
#include "base/util.h"
#include "device/machine.h"
#include "device/virtio/iov.h"

#define SECTOR_SHIFT 9
#define SECTOR_SIZE  (1u << SECTOR_SHIFT)
#define QUEUE_SIZE   256
#define MAX_RANGES   32 /* of one discard or write zeroes request */
#define PAGE_SECTORS 8  /* 4 KiB, what file systems and host files like */
/* Bounds of one range: a hole costs nothing, zeroes may have to be written. In sectors. */
#define MAX_DISCARD_SECTORS (UINT32_C(1) << 22)
#define MAX_ZEROES_SECTORS  (UINT32_C(1) << 18)

_Static_assert(QUEUE_SIZE <= VIRTQ_MAX_SEGMENTS, "a chain may be as long as the queue");

struct blk;

struct request {
    struct blk *blk;
    struct request *next; /* in the free list */
    struct block_request io;
    unsigned ranges, range; /* discard, write zeroes: how many, and which one is under way */
    struct virtio_blk_discard_write_zeroes list[MAX_RANGES];
    struct virtq_chain chain;
};

struct blk {
    struct virtio_device v;
    struct block *backend;
    char serial[VIRTIO_BLK_ID_BYTES];
    bool writeback; /* the driver's choice through the configuration space */
    bool batch;     /* process() runs: one interrupt at its end */
    bool starved;   /* process() stopped for want of memory; a completion lets it go on */
    struct request *free;
};

static struct blk *from_virtio(struct virtio_device *v)
{
    return container_of(v, struct blk, v);
}

/* §5.2.5.2: does a completed write have to be on the disk? */
static bool write_through(const struct blk *b)
{
    if (!block_writeback(b->backend))
        return false;
    if (virtio_has(&b->v, VIRTIO_BLK_F_CONFIG_WCE))
        return !b->writeback;
    return !virtio_has(&b->v, VIRTIO_BLK_F_FLUSH);
}

static struct request *get_request(struct blk *b)
{
    struct request *r = b->free;
    if (r) {
        b->free = r->next;
        return r;
    }
    r = calloc(1, sizeof(*r));
    if (!r) {
        log_error("%s: out of memory", b->v.dev.id);
        return NULL;
    }
    r->blk = b;
    return r;
}

static void put_request(struct blk *b, struct request *r)
{
    r->next = b->free;
    b->free = r;
}

static void complete(struct request *r, uint8_t status)
{
    struct blk *b = r->blk;
    struct virtq_chain *c = &r->chain;
    const struct virtq_range *last = &c->range[c->out_count + c->in_count - 1];
    memory_write(&b->v.machine->memory, last->gpa + last->len - 1, &status, 1);
    /* Also after an error all of the buffers count as written: some may be. */
    virtio_push(&b->v, &b->v.queue[0], c, c->in_len);
    put_request(b, r);
    if (!b->batch)
        virtio_signal(&b->v, &b->v.queue[0]);
    if (b->starved) {
        b->starved = false;
        virtio_kick(&b->v, &b->v.queue[0]);
    }
}

enum figure { READS, READ_BYTES, WRITES, WRITE_BYTES, FLUSHES, ERRORS };
static const char *const figure_names[] = {
    "reads", "read_bytes", "writes", "write_bytes", "flushes", "errors", NULL};
_Static_assert(ARRAY_SIZE(figure_names) - 1 <= VIRTIO_MAX_FIGURES, "there is room for each");

static void count(struct blk *b, const struct block_request *io)
{
    if (io->op == BLOCK_FLUSH) {
        b->v.figure[FLUSHES]++;
        return;
    }
    enum figure first = io->op == BLOCK_READ ? READS : WRITES;
    b->v.figure[first]++;
    b->v.figure[first + 1] += io->len;
}

static void done(void *opaque, int error);

static void submit(struct request *r, enum block_op op, uint64_t offset, uint64_t len)
{
    r->io.op = op;
    r->io.offset = offset;
    r->io.len = len;
    r->io.done = done;
    r->io.opaque = r;
    block_submit(r->blk->backend, &r->io);
}

/* The next range of a discard or write zeroes request; false: there is none left. */
static bool submit_range(struct request *r, enum block_op op)
{
    while (r->range < r->ranges) {
        const struct virtio_blk_discard_write_zeroes *range = &r->list[r->range++];
        if (range->num_sectors == 0)
            continue;
        r->io.may_unmap = range->flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
        submit(r, op, range->sector << SECTOR_SHIFT, (uint64_t)range->num_sectors << SECTOR_SHIFT);
        return true;
    }
    return false;
}

/* From the backend: loop thread, or whoever drains it. */
static void done(void *opaque, int error)
{
    struct request *r = opaque;
    struct blk *b = r->blk;
    enum block_op op = r->io.op;
    if (error)
        b->v.figure[ERRORS]++;
    else
        count(b, &r->io);
    if (error) {
        complete(r, error == -EOPNOTSUPP ? VIRTIO_BLK_S_UNSUPP : VIRTIO_BLK_S_IOERR);
        return;
    }
    if ((op == BLOCK_DISCARD || op == BLOCK_WRITE_ZEROES) && submit_range(r, op))
        return;
    if (op != BLOCK_READ && op != BLOCK_FLUSH && write_through(b))
        submit(r, BLOCK_FLUSH, 0, 0);
    else
        complete(r, VIRTIO_BLK_S_OK);
}

/* Are len sectors from first on inside the disk? */
static bool inside(const struct blk *b, uint64_t first, uint64_t len)
{
    uint64_t capacity = block_size(b->backend) >> SECTOR_SHIFT;
    return first <= capacity && len <= capacity - first;
}

static void start_transfer(struct request *r, bool write, uint64_t sector)
{
    struct blk *b = r->blk;
    uint64_t len = iov_length(r->io.iov, r->io.iovcnt);
    if (len == 0 || len % SECTOR_SIZE || !inside(b, sector, len >> SECTOR_SHIFT) ||
        (write && block_readonly(b->backend)))
        complete(r, VIRTIO_BLK_S_IOERR);
    else
        submit(r, write ? BLOCK_WRITE : BLOCK_READ, sector << SECTOR_SHIFT, len);
}

/* §5.2.6.2. The ranges are copied first: the guest may change them while they are worked on. */
static void start_ranges(struct request *r, bool discard)
{
    struct blk *b = r->blk;
    uint64_t len = iov_length(r->io.iov, r->io.iovcnt);
    uint32_t limit = discard ? MAX_DISCARD_SECTORS : MAX_ZEROES_SECTORS;
    uint32_t known_flags = discard ? 0 : VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;

    if (!virtio_has(&b->v, discard ? VIRTIO_BLK_F_DISCARD : VIRTIO_BLK_F_WRITE_ZEROES)) {
        complete(r, VIRTIO_BLK_S_UNSUPP);
        return;
    }
    if (len == 0 || len % sizeof(r->list[0]) || len > sizeof(r->list) ||
        block_readonly(b->backend)) {
        complete(r, VIRTIO_BLK_S_IOERR);
        return;
    }
    iov_read(r->io.iov, r->io.iovcnt, 0, r->list, len);
    r->ranges = (unsigned)(len / sizeof(r->list[0]));
    r->range = 0;
    for (unsigned i = 0; i < r->ranges; i++) {
        if (r->list[i].flags & ~known_flags) {
            complete(r, VIRTIO_BLK_S_UNSUPP);
            return;
        }
        if (r->list[i].num_sectors > limit ||
            !inside(b, r->list[i].sector, r->list[i].num_sectors)) {
            complete(r, VIRTIO_BLK_S_IOERR);
            return;
        }
    }
    r->io.iovcnt = 0;
    if (!submit_range(r, discard ? BLOCK_DISCARD : BLOCK_WRITE_ZEROES))
        complete(r, VIRTIO_BLK_S_OK);
}

static void start(struct request *r)
{
    struct blk *b = r->blk;
    struct virtq_chain *c = &r->chain;
    struct virtio_blk_outhdr header;
    iov_read(virtq_out(c), c->out_count, 0, &header, sizeof(header));

    /* What is left between header and status is the data; only one direction of it is looked at. */
    struct iovec *out = virtq_out(c), *in = virtq_in(c);
    unsigned out_count = c->out_count, in_count = c->in_count;
    iov_drop_front(&out, &out_count, sizeof(header));
    iov_drop_back(in, &in_count, 1);
    bool reads = header.type == VIRTIO_BLK_T_IN || header.type == VIRTIO_BLK_T_GET_ID;
    memset(&r->io, 0, sizeof(r->io));
    r->io.iov = reads ? in : out;
    r->io.iovcnt = reads ? in_count : out_count;

    switch (header.type) {
    case VIRTIO_BLK_T_IN:
    case VIRTIO_BLK_T_OUT:
        start_transfer(r, header.type == VIRTIO_BLK_T_OUT, header.sector);
        break;
    case VIRTIO_BLK_T_FLUSH:
        r->io.iovcnt = 0;
        submit(r, BLOCK_FLUSH, 0, 0);
        break;
    case VIRTIO_BLK_T_GET_ID:
        iov_write(in, in_count, 0, b->serial, sizeof(b->serial));
        complete(r, VIRTIO_BLK_S_OK);
        break;
    case VIRTIO_BLK_T_DISCARD:
    case VIRTIO_BLK_T_WRITE_ZEROES:
        start_ranges(r, header.type == VIRTIO_BLK_T_DISCARD);
        break;
    default:
        complete(r, VIRTIO_BLK_S_UNSUPP);
    }
}

static void process(struct virtio_device *v, struct virtq *q)
{
    struct blk *b = from_virtio(v);
    int ret;
    b->batch = true;
    do {
        virtq_notify_off(q);
        for (;;) {
            struct request *r = get_request(b);
            ret = r ? virtio_pop(v, q, &r->chain) : -ENOMEM;
            b->starved = !r;
            if (ret <= 0) {
                if (r)
                    put_request(b, r);
                break;
            }
            if (r->chain.out_len < sizeof(struct virtio_blk_outhdr) || r->chain.in_len < 1) {
                virtq_unpop(q, 1);
                put_request(b, r);
                virtio_guest_error(v, "a request without header or status");
                break;
            }
            start(r);
        }
    } while (ret == 0 && virtq_notify_on(q));
    b->batch = false;
    virtio_signal(v, q);
}

static void drain(struct virtio_device *v)
{
    block_drain(from_virtio(v)->backend);
}

static void reset(struct virtio_device *v)
{
    from_virtio(v)->writeback = true;
}

static void config_read(struct virtio_device *v, unsigned offset, void *buf, unsigned len)
{
    const struct blk *b = from_virtio(v);
    const struct virtio_blk_config config = {
        .capacity = block_size(b->backend) >> SECTOR_SHIFT,
        .seg_max = QUEUE_SIZE - 2,
        .blk_size = SECTOR_SIZE,
        .physical_block_exp = 3,
        .min_io_size = PAGE_SECTORS,
        .wce = b->writeback,
        .max_discard_sectors = MAX_DISCARD_SECTORS,
        .max_discard_seg = MAX_RANGES,
        .discard_sector_alignment = PAGE_SECTORS,
        .max_write_zeroes_sectors = MAX_ZEROES_SECTORS,
        .max_write_zeroes_seg = MAX_RANGES,
        .write_zeroes_may_unmap = block_can_discard(b->backend),
    };
    memcpy(buf, (const uint8_t *)&config + offset, len);
}

static void config_write(struct virtio_device *v, unsigned offset, const void *buf, unsigned len)
{
    if (offset == offsetof(struct virtio_blk_config, wce) && len == 1 &&
        virtio_has(v, VIRTIO_BLK_F_CONFIG_WCE))
        from_virtio(v)->writeback = *(const uint8_t *)buf & 1;
}

static void save(struct virtio_device *v, struct state_writer *w)
{
    const struct blk *b = from_virtio(v);
    state_put_u64(w, "capacity", block_size(b->backend) >> SECTOR_SHIFT);
    state_put_u64(w, "writeback", b->writeback);
}

static int load(struct virtio_device *v, const struct state_reader *r)
{
    struct blk *b = from_virtio(v);
    uint64_t capacity, writeback;
    if (state_get_u64(r, "capacity", &capacity) || state_get_u64(r, "writeback", &writeback)) {
        log_error("%s: saved state: bad or missing field", v->dev.id);
        return -EINVAL;
    }
    if (capacity != block_size(b->backend) >> SECTOR_SHIFT) {
        log_error("%s: the disk has %llu sectors, but the saved machine knows it with %llu",
                  v->dev.id, (unsigned long long)(block_size(b->backend) >> SECTOR_SHIFT),
                  (unsigned long long)capacity);
        return -EINVAL;
    }
    b->writeback = writeback;
    return 0;
}

static void destroy(struct virtio_device *v)
{
    struct blk *b = from_virtio(v);
    block_close(b->backend);
    while (b->free) {
        struct request *r = b->free;
        b->free = r->next;
        free(r);
    }
    free(b);
}

static const struct virtio_ops ops = {
    .device = VIRTIO_DEVICE_OPS("virtio-blk"),
    .id = 2,
    .pci_class = 0x018000,
    .process = process,
    .drain = drain,
    .reset = reset,
    .config_read = config_read,
    .config_write = config_write,
    .save = save,
    .load = load,
    .destroy = destroy,
    .figures = figure_names,
};

struct virtio_device *virtio_blk_create(struct machine *m, struct pci_host *host,
                                        struct block *backend, const struct virtio_blk_options *opt)
{
    struct blk *b = calloc(1, sizeof(*b));
    if (!b) {
        log_error("virtio-blk: out of memory");
        block_close(backend);
        return NULL;
    }
    b->backend = backend;
    b->writeback = true;
    if (opt && opt->serial)
        memcpy(b->serial, opt->serial, strnlen(opt->serial, sizeof(b->serial)));
    b->v.ops = &ops;
    b->v.config_size = offsetof(struct virtio_blk_config, max_secure_erase_sectors);
    b->v.offered = VIRTIO_BIT(VIRTIO_BLK_F_SEG_MAX) | VIRTIO_BIT(VIRTIO_BLK_F_BLK_SIZE) |
                   VIRTIO_BIT(VIRTIO_BLK_F_TOPOLOGY) | VIRTIO_BIT(VIRTIO_BLK_F_FLUSH);
    if (block_readonly(backend))
        b->v.offered |= VIRTIO_BIT(VIRTIO_BLK_F_RO);
    else
        b->v.offered |= VIRTIO_BIT(VIRTIO_BLK_F_CONFIG_WCE) |
                        VIRTIO_BIT(VIRTIO_BLK_F_WRITE_ZEROES) |
                        (block_can_discard(backend) ? VIRTIO_BIT(VIRTIO_BLK_F_DISCARD) : 0);
    struct request *first = get_request(b);
    if (first)
        put_request(b, first);
    if (!first || virtio_init(&b->v, m, host, 1, QUEUE_SIZE)) {
        destroy(&b->v);
        return NULL;
    }
    return &b->v;
}
