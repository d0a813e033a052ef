/*
 * Packing a memory file; snapshot_pack.h has the format.
 *
 * Contents that occurred before are found by a hash, under a seed that guests cannot know (they would slow it down with collisions
 * otherwise), and compared with where they were found first.
 */
#include "vm/snapshot_pack.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>
#define XXH_INLINE_ALL
#include <xxhash.h>
#include <zstd.h>

#include "base/util.h"
#include "vm/snapshot_pack_format.h"

#define LEVEL 1
#define PIECE KIB(256)          /* that are read at once */

struct packer {
    int from, to;
    ZSTD_CCtx *zstd;
    uint8_t *piece, *before;    /* of the memory file: now, and a page to compare with */
    uint8_t *raw, *packed;      /* the chunk under way */
    size_t packed_size;
    uint64_t seed;
    uint32_t *found;            /* hash table of contents' numbers, 0: none; twice as many as max_contents, a power of two */
    uint64_t *hash;             /* of each content, from 1 on */
    uint32_t *first;            /* page that had it first */
    uint32_t contents, chunks, max_contents;
    uint8_t *chunk, *run;       /* as in the file */
    uint32_t runs, max_runs, run_pages, run_first;
};

static int write_all(int fd, const uint8_t *p, size_t len)
{
    while (len) {
        ssize_t n = write(fd, p, len);

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -EIO;
        p += n;
        len -= (size_t)n;
    }
    return 0;
}

static bool is_zero(const uint8_t *page) { return page[0] == 0 && memcmp(page, page + 1, GUEST_PAGE_SIZE - 1) == 0; }

/* ---- chunks ---- */

/* The last one is not full. */
static int put_chunk(struct packer *p)
{
    uint32_t pages = p->contents - p->chunks * SNAPSHOT_CHUNK_PAGES;
    uint8_t *entry = p->chunk + (size_t)p->chunks * CHUNK_ENTRY;
    size_t len;

    if (!pages)
        return 0;
    len = ZSTD_compress2(p->zstd, p->packed, p->packed_size, p->raw, (size_t)pages * GUEST_PAGE_SIZE);
    if (ZSTD_isError(len))
        return -ENOMEM;
    store_le64(entry, XXH3_64bits(p->packed, len));
    store_le32(entry + 8, (uint32_t)len);
    p->chunks++;
    return write_all(p->to, p->packed, len);
}

/* Whether page has what the content's first page had. */
static int is_same(struct packer *p, uint32_t content, const uint8_t *page)
{
    ssize_t n;

    do
        n = pread(p->from, p->before, GUEST_PAGE_SIZE, (off_t)p->first[content] << GUEST_PAGE_SHIFT);
    while (n < 0 && errno == EINTR);
    if (n != GUEST_PAGE_SIZE)
        return n < 0 ? -errno : -EIO;
    return memcmp(p->before, page, GUEST_PAGE_SIZE) == 0;
}

static uint32_t *slot_of(struct packer *p, uint64_t hash, uint64_t probe)
{
    return &p->found[(hash + probe) & ((uint64_t)p->max_contents * 2 - 1)];
}

/* Room for more contents. */
static int grow(struct packer *p)
{
    uint32_t most = p->max_contents ? p->max_contents * 2 : 8192;
    uint32_t *found = calloc((size_t)most * 2, sizeof(*found)), *first = realloc(p->first, (most + 1ull) * sizeof(*first));
    uint64_t *hash = realloc(p->hash, (most + 1ull) * sizeof(*hash));
    uint8_t *chunk = realloc(p->chunk, (most / SNAPSHOT_CHUNK_PAGES + 1ull) * CHUNK_ENTRY);

    p->first = first ? first : p->first;
    p->hash = hash ? hash : p->hash;
    p->chunk = chunk ? chunk : p->chunk;
    if (!found || !first || !hash || !chunk) {
        free(found);
        return -ENOMEM;
    }
    free(p->found);
    p->found = found;
    p->max_contents = most;
    for (uint32_t i = 1, *slot; i <= p->contents; i++) {
        for (uint64_t probe = 0; *(slot = slot_of(p, hash[i], probe)); probe++)
            ;
        *slot = i;
    }
    return 0;
}

/* The number of what page holds. */
static int put_content(struct packer *p, uint32_t number, const uint8_t *page, uint32_t *content)
{
    uint64_t hash = XXH3_64bits_withSeed(page, GUEST_PAGE_SIZE, p->seed);
    int err = p->contents == p->max_contents ? grow(p) : 0;
    uint32_t *slot = NULL;

    if (err)
        return err;
    for (uint64_t probe = 0; *(slot = slot_of(p, hash, probe)); probe++) {
        int same = p->hash[*slot] == hash ? is_same(p, *slot, page) : 0;

        if (same)
            *content = *slot;
        if (same)
            return MIN(same, 0);
    }
    memcpy(p->raw + (size_t)(p->contents % SNAPSHOT_CHUNK_PAGES) * GUEST_PAGE_SIZE, page, GUEST_PAGE_SIZE);
    *content = *slot = ++p->contents;
    p->hash[*content] = hash;
    p->first[*content] = number;
    return p->contents % SNAPSHOT_CHUNK_PAGES ? 0 : put_chunk(p);
}

/* ---- which page has which content ---- */

static int end_run(struct packer *p)
{
    uint8_t *entry;

    if (!p->run_pages)
        return 0;
    if (p->runs == p->max_runs) {
        uint32_t more = p->max_runs ? p->max_runs * 2 : 1024;
        uint8_t *run = realloc(p->run, (size_t)more * RUN_ENTRY);

        if (!run)
            return -ENOMEM;
        p->run = run;
        p->max_runs = more;
    }
    entry = p->run + (size_t)p->runs++ * RUN_ENTRY;
    store_le32(entry, p->run_pages);
    store_le32(entry + 4, p->run_first);
    p->run_pages = 0;
    return 0;
}

/* The next pages have this content, which is 0 where they are more than one. */
static int put_pages(struct packer *p, uint32_t pages, uint32_t content)
{
    bool goes_on = p->run_pages && (content ? p->run_first && content == p->run_first + p->run_pages : !p->run_first);
    int err = goes_on ? 0 : end_run(p);

    if (!p->run_pages)
        p->run_first = content;
    p->run_pages += pages;
    return err;
}

static int put_index(struct packer *p, uint32_t pages)
{
    size_t chunks = (size_t)p->chunks * CHUNK_ENTRY, runs = (size_t)p->runs * RUN_ENTRY;
    size_t len = INDEX_HEADER + chunks + runs + INDEX_TAIL;
    uint8_t *index = malloc(len), *tail = index ? index + len - INDEX_TAIL : NULL;
    int err = -ENOMEM;

    if (index && len - 8 <= UINT32_MAX) {
        store_le32(index, INDEX_FRAME);
        store_le32(index + 4, (uint32_t)(len - 8));
        store_le64(index + 8, pages);
        store_le32(index + 16, p->contents);
        store_le32(index + 20, p->chunks);
        store_le32(index + 24, p->runs);
        store_le32(index + 28, SNAPSHOT_CHUNK_PAGES);
        if (chunks)
            memcpy(index + INDEX_HEADER, p->chunk, chunks);
        if (runs)
            memcpy(index + INDEX_HEADER + chunks, p->run, runs);
        store_le64(tail, len);
        store_le64(tail + 8, XXH3_64bits(index, len - INDEX_TAIL + 8));
        memcpy(tail + 16, INDEX_MAGIC, 8);
        err = write_all(p->to, index, len);
    }
    free(index);
    return err;
}

/* ---- all of it ---- */

static int pack(struct packer *p, uint32_t pages, const _Atomic bool *cancel)
{
    uint32_t at = 0;
    int err = 0;

    while (!err && at < pages) {
        off_t data = lseek(p->from, (off_t)at << GUEST_PAGE_SHIFT, SEEK_DATA);
        uint32_t next = data < 0 && errno == ENXIO ? pages : data < 0 ? at : (uint32_t)((uint64_t)data >> GUEST_PAGE_SHIFT);
        ssize_t n;

        if (atomic_load(cancel))
            return -ECANCELED;
        if (next > at)
            err = put_pages(p, next - at, 0);
        at = next;
        if (err || at == pages)
            break;
        n = pread(p->from, p->piece, MIN(PIECE, (uint64_t)(pages - at) << GUEST_PAGE_SHIFT), (off_t)at << GUEST_PAGE_SHIFT);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < (ssize_t)GUEST_PAGE_SIZE)
            return n < 0 ? -errno : -EIO;
        for (const uint8_t *page = p->piece; !err && page + GUEST_PAGE_SIZE <= p->piece + n; page += GUEST_PAGE_SIZE) {
            uint32_t content = 0;

            if (!is_zero(page))
                err = put_content(p, at, page, &content);
            if (!err)
                err = put_pages(p, 1, content);
            at++;
        }
    }
    if (!err)
        err = put_chunk(p);
    if (!err)
        err = end_run(p);
    return err ? err : put_index(p, pages);
}

static int prepare(struct packer *p)
{
    p->packed_size = ZSTD_compressBound(SNAPSHOT_CHUNK_SIZE);
    p->zstd = ZSTD_createCCtx();
    p->piece = malloc(PIECE);
    p->before = malloc(GUEST_PAGE_SIZE);
    p->raw = malloc(SNAPSHOT_CHUNK_SIZE);
    p->packed = malloc(p->packed_size);
    if (!p->zstd || !p->piece || !p->before || !p->raw || !p->packed)
        return -ENOMEM;
    if (getrandom(&p->seed, sizeof(p->seed), 0) != sizeof(p->seed))
        return -EIO;
    return ZSTD_isError(ZSTD_CCtx_setParameter(p->zstd, ZSTD_c_compressionLevel, LEVEL)) ||
                   ZSTD_isError(ZSTD_CCtx_setParameter(p->zstd, ZSTD_c_checksumFlag, 1))
               ? -EINVAL
               : 0;
}

int snapshot_pack(int memory_fd, int packed_fd, const _Atomic bool *cancel)
{
    struct packer p = { .from = memory_fd, .to = packed_fd };
    struct stat st;
    int err = fstat(memory_fd, &st) < 0 ? -errno : 0;

    if (!err && (st.st_size % GUEST_PAGE_SIZE || st.st_size >> GUEST_PAGE_SHIFT > SNAPSHOT_MAX_PAGES))
        err = -EFBIG;
    if (!err)
        err = prepare(&p);
    if (!err)
        err = pack(&p, (uint32_t)(st.st_size >> GUEST_PAGE_SHIFT), cancel);
    if (!err && fsync(packed_fd) < 0)
        err = -errno;
    ZSTD_freeCCtx(p.zstd);
    free(p.piece);
    free(p.before);
    free(p.raw);
    free(p.packed);
    free(p.found);
    free(p.hash);
    free(p.first);
    free(p.chunk);
    free(p.run);
    return err;
}
