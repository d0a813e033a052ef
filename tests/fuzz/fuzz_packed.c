/*
 * Fuzz target: a compressed snapshot's memory. "w" and then letters are the pages of a memory file, each full of its letter, a
 * digit for zeroes and a dot for a hole: packed, they must unpack to what they were. Anything else is a packed file, whose checksums are made
 * right, so that what is behind them is reached.
 */
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "base/util.h"
#include "vm/snapshot_pack.h"
#include "vm/snapshot_pack_format.h"

#define MOST_PAGES 256u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static int file[2] = { -1, -1 };
static struct snapshot_unpacker *unpacker;
static volatile unsigned sink;

static void set_file(int fd, const void *bytes, size_t len)
{
    if (ftruncate(fd, 0) || (len && pwrite(fd, bytes, len, 0) != (ssize_t)len) || lseek(fd, 0, SEEK_SET))
        abort();
}

/* Everything that opening it promises. */
static void walk(const struct snapshot_packed *p)
{
    int err;

    for (uint32_t page = 0; page < p->pages; page++)
        if (p->content[page] > p->contents || (p->content[page] && snapshot_chunk_of(p->content[page]) >= p->chunks))
            abort();
    for (uint32_t chunk = 0; chunk < p->chunks; chunk++) {
        size_t len = (size_t)snapshot_chunk_contents(p, chunk) * GUEST_PAGE_SIZE;
        const uint8_t *bytes = snapshot_unpack(unpacker, p, chunk, &err);

        if (!len || len > SNAPSHOT_CHUNK_SIZE || (!bytes && !err))
            abort();
        if (bytes)
            sink += bytes[0] + bytes[len - 1];
    }
}

static void read_packed(const uint8_t *data, size_t size)
{
    uint8_t *bytes = malloc(size);
    uint64_t length = size, pages = 0, at = 0;
    struct snapshot_packed p;

    memcpy(bytes, data, size);
    set_file(file[0], bytes, size);
    if (size >= INDEX_HEADER + INDEX_TAIL) {
        uint8_t *tail = bytes + size - INDEX_TAIL, *index;

        length = load_le64(tail);
        if (length < INDEX_HEADER + INDEX_TAIL || length > size)
            length = size;
        index = bytes + size - length;
        pages = load_le64(index + 8);
        for (uint64_t i = 0; i < load_le32(index + 20) && (i + 1) * CHUNK_ENTRY <= length - INDEX_HEADER - INDEX_TAIL; i++) {
            uint8_t *entry = index + INDEX_HEADER + i * CHUNK_ENTRY;
            uint32_t chunk = load_le32(entry + 8);

            if (chunk <= size - length - at)
                store_le64(entry, XXH3_64bits(bytes + at, chunk));
            at += MIN(chunk, size - length - at);
        }
        store_le32(index, INDEX_FRAME);
        store_le32(index + 4, (uint32_t)(length - 8));
        store_le64(tail, length);
        memcpy(tail + 16, INDEX_MAGIC, 8);
        store_le64(tail + 8, XXH3_64bits(index, length - 16));
    }
    if (snapshot_packed_open(&p, file[0], MIN(pages, MOST_PAGES)) == 0) {
        walk(&p);
        snapshot_packed_close(&p);
    }
    set_file(file[0], bytes, size);
    if (snapshot_packed_open(&p, file[0], MIN(pages, MOST_PAGES)) == 0) {
        walk(&p);
        snapshot_packed_close(&p);
    }
    free(bytes);
}

static void write_packed(const uint8_t *letter, size_t pages)
{
    _Atomic bool cancel = false;
    struct snapshot_packed p;
    bool seen[256] = { false };
    uint32_t contents = 0;
    uint8_t page[GUEST_PAGE_SIZE];

    pages = MIN(pages, MOST_PAGES);
    set_file(file[0], NULL, 0);
    set_file(file[1], NULL, 0);
    if (ftruncate(file[0], (off_t)(pages * GUEST_PAGE_SIZE)))
        abort();
    for (size_t i = 0; i < pages; i++) {
        bool zero = !letter[i] || (letter[i] >= '0' && letter[i] <= '9') || letter[i] == '.';

        memset(page, zero ? 0 : letter[i], sizeof(page));
        if (letter[i] != '.' && pwrite(file[0], page, sizeof(page), (off_t)(i * GUEST_PAGE_SIZE)) != sizeof(page))
            abort();
        contents += !zero && !seen[letter[i]];
        seen[letter[i]] |= !zero;
    }
    if (snapshot_pack(file[0], file[1], &cancel) || snapshot_packed_open(&p, file[1], pages + 1) != -EINVAL ||
        snapshot_packed_open(&p, file[1], pages) || p.contents != contents)
        abort();
    for (size_t i = 0; i < pages; i++) {
        const uint8_t *bytes = NULL;
        int err = 0;

        if (pread(file[0], page, sizeof(page), (off_t)(i * GUEST_PAGE_SIZE)) != sizeof(page))
            abort();
        if (p.content[i])
            bytes = snapshot_unpack(unpacker, &p, snapshot_chunk_of(p.content[i]), &err);
        if (err || !bytes != !page[0] ||
            (bytes && memcmp(page, bytes + (size_t)(p.content[i] - snapshot_chunk_first(snapshot_chunk_of(p.content[i]))) * GUEST_PAGE_SIZE,
                             sizeof(page)) != 0))
            abort();
    }
    snapshot_packed_close(&p);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    for (unsigned i = 0; i < 2 && file[i] < 0; i++)
        if ((file[i] = memfd_create("packed", MFD_CLOEXEC)) < 0)
            abort();
    if (!unpacker && !(unpacker = snapshot_unpacker_create()))
        abort();
    if (size && data[0] == 'w')
        write_packed(data + 1, size - 1);
    else if (size)
        read_packed(data, size);
    return 0;
}
