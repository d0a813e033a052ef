/*
 * Reading a packed memory file; snapshot_pack.h has the format. Nothing that is in the file is believed before its checksum was
 * right, and nothing then that could not be.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#define XXH_INLINE_ALL
#include <xxhash.h>
#include <zstd.h>

#include "base/util.h"
#include "vm/snapshot_pack.h"
#include "vm/snapshot_pack_format.h"

/* -EINVAL: the file ends before. */
static int read_at(int fd, void *to, size_t len, uint64_t offset)
{
    for (size_t done = 0; done < len;) {
        ssize_t n = pread(fd, (uint8_t *)to + done, len - done, (off_t)(offset + done));

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -EINVAL;
        done += (size_t)n;
    }
    return 0;
}

/* ---- where everything is ---- */

/* All of the last frame, its checksum right; malloc'ed. */
static int read_index(int fd, uint8_t **index, size_t *len, uint64_t *offset)
{
    uint8_t tail[INDEX_TAIL], *data;
    uint64_t length, size;
    struct stat st;
    int err;

    if (fstat(fd, &st) < 0)
        return -errno;
    size = (uint64_t)st.st_size;
    if (size < INDEX_HEADER + INDEX_TAIL)
        return -EINVAL;
    err = read_at(fd, tail, sizeof(tail), size - sizeof(tail));
    if (err)
        return err;
    length = load_le64(tail);
    if (memcmp(tail + 16, INDEX_MAGIC, 8) != 0 || length < INDEX_HEADER + INDEX_TAIL || length > size)
        return -EINVAL;
    data = malloc(length);
    if (!data)
        return -ENOMEM;
    err = read_at(fd, data, length, size - length);
    if (!err && (load_le32(data) != INDEX_FRAME || load_le32(data + 4) != length - 8 ||
                 load_le64(data + length - 16) != XXH3_64bits(data, length - 16)))
        err = -EINVAL;
    if (err) {
        free(data);
        return err;
    }
    *index = data;
    *len = length;
    *offset = size - length;
    return 0;
}

/* They are all of the file in front of the index. */
static int take_chunks(struct snapshot_packed *p, const uint8_t *entry, uint64_t index_offset)
{
    uint64_t at = 0;

    for (uint32_t i = 0; i < p->chunks; i++, entry += CHUNK_ENTRY) {
        uint32_t length = load_le32(entry + 8);

        if (!length || length > ZSTD_COMPRESSBOUND(SNAPSHOT_CHUNK_SIZE))
            return -EINVAL;
        p->chunk[i] = (struct snapshot_chunk){ at, load_le64(entry), length };
        at += length;
    }
    return at == index_offset ? 0 : -EINVAL;
}

static int take_runs(struct snapshot_packed *p, const uint8_t *entry, uint32_t runs)
{
    uint32_t page = 0;

    for (uint32_t i = 0; i < runs; i++, entry += RUN_ENTRY) {
        uint32_t pages = load_le32(entry), first = load_le32(entry + 4);

        if (!pages || pages > p->pages - page || (first && (first > p->contents || pages > p->contents - first + 1)))
            return -EINVAL;
        for (uint32_t k = 0; first && k < pages; k++)
            p->content[page + k] = first + k;
        page += pages;
    }
    return page == p->pages ? 0 : -EINVAL;
}

static int take_index(struct snapshot_packed *p, const uint8_t *index, size_t len, uint64_t offset, uint64_t pages)
{
    uint32_t runs = load_le32(index + 24);
    int err;

    p->contents = load_le32(index + 16);
    p->chunks = load_le32(index + 20);
    if (load_le64(index + 8) != pages || pages > SNAPSHOT_MAX_PAGES || p->contents > pages || load_le32(index + 28) != SNAPSHOT_CHUNK_PAGES ||
        p->chunks != (p->contents + SNAPSHOT_CHUNK_PAGES - 1) / SNAPSHOT_CHUNK_PAGES ||
        len != INDEX_HEADER + (uint64_t)p->chunks * CHUNK_ENTRY + (uint64_t)runs * RUN_ENTRY + INDEX_TAIL)
        return -EINVAL;
    p->pages = (uint32_t)pages;
    p->content = calloc(MAX(pages, 1), sizeof(*p->content));
    p->chunk = malloc(MAX(p->chunks, 1) * sizeof(*p->chunk));
    if (!p->content || !p->chunk)
        return -ENOMEM;
    err = take_chunks(p, index + INDEX_HEADER, offset);
    return err ? err : take_runs(p, index + INDEX_HEADER + (size_t)p->chunks * CHUNK_ENTRY, runs);
}

int snapshot_packed_open(struct snapshot_packed *p, int fd, uint64_t pages)
{
    uint8_t *index;
    uint64_t offset;
    size_t len;
    int err;

    *p = (struct snapshot_packed){ .fd = fd };
    err = read_index(fd, &index, &len, &offset);
    if (err)
        return err;
    err = take_index(p, index, len, offset, pages);
    free(index);
    if (err)
        snapshot_packed_close(p);
    return err;
}

void snapshot_packed_close(struct snapshot_packed *p)
{
    free(p->content);
    free(p->chunk);
    *p = (struct snapshot_packed){ .fd = -1 };
}

uint32_t snapshot_chunk_contents(const struct snapshot_packed *p, uint32_t chunk)
{
    return MIN(SNAPSHOT_CHUNK_PAGES, p->contents - chunk * SNAPSHOT_CHUNK_PAGES);
}

/* ---- chunks ---- */

struct snapshot_unpacker {
    ZSTD_DCtx *zstd;
    uint8_t pages[SNAPSHOT_CHUNK_SIZE];
    uint8_t packed[ZSTD_COMPRESSBOUND(SNAPSHOT_CHUNK_SIZE)];
};

struct snapshot_unpacker *snapshot_unpacker_create(void)
{
    struct snapshot_unpacker *u = NULL;

    if (posix_memalign((void **)&u, GUEST_PAGE_SIZE, sizeof(*u)))
        return NULL;
    u->zstd = ZSTD_createDCtx();
    if (u->zstd)
        return u;
    free(u);
    return NULL;
}

void snapshot_unpacker_free(struct snapshot_unpacker *u)
{
    if (u)
        ZSTD_freeDCtx(u->zstd);
    free(u);
}

const uint8_t *snapshot_unpack(struct snapshot_unpacker *u, const struct snapshot_packed *p, uint32_t chunk, int *err)
{
    const struct snapshot_chunk *c = &p->chunk[chunk];
    size_t len = (size_t)snapshot_chunk_contents(p, chunk) * GUEST_PAGE_SIZE;

    *err = read_at(p->fd, u->packed, c->length, c->offset);
    if (!*err && XXH3_64bits(u->packed, c->length) != c->hash)
        *err = -EINVAL;
    if (!*err && ZSTD_decompressDCtx(u->zstd, u->pages, sizeof(u->pages), u->packed, c->length) != len)
        *err = -EINVAL;
    return *err ? NULL : u->pages;
}
