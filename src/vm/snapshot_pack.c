/* See snapshot_pack.h for the format. */
#include "vm/snapshot_pack.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#define XXH_INLINE_ALL
#include <xxhash.h>
#include <zstd.h>

#include "base/util.h"
#include "memory/memory.h"
#include "vm/snapshot_store.h"

#define LEVEL 1
#define WINDOW_LOG 27           /* 128 MiB; readers accept up to this by default */
#define RECORD_HEADER 12u
/* The frame behind the data's, of a kind that zstd skips: magic, length of the rest, checksum. */
#define SEAL_MAGIC 0x184d2a5eu
#define SEAL_SIZE 16u

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

static bool is_zero(const uint8_t *p, size_t len) { return p[0] == 0 && memcmp(p, p + 1, len - 1) == 0; }

/* ---- packing ---- */

struct packer {
    ZSTD_CCtx *zstd;
    int fd;
    XXH3_state_t *seal;
    uint8_t *out;
    size_t out_size;
};

static int put(struct packer *p, const void *data, size_t len, ZSTD_EndDirective how)
{
    ZSTD_inBuffer in = { data, len, 0 };
    size_t left;

    do {
        ZSTD_outBuffer out = { p->out, p->out_size, 0 };
        int err;

        left = ZSTD_compressStream2(p->zstd, &out, &in, how);
        if (ZSTD_isError(left))
            return -ENOMEM;
        err = write_all(p->fd, p->out, out.pos);
        if (err)
            return err;
        XXH3_64bits_update(p->seal, p->out, out.pos);
    } while (how == ZSTD_e_end ? left != 0 : in.pos < in.size);
    return 0;
}

static int put_record(struct packer *p, uint64_t offset, const uint8_t *bytes, uint32_t len)
{
    uint8_t header[RECORD_HEADER];
    int err;

    store_le64(header, offset);
    store_le32(header + 8, len);
    err = put(p, header, sizeof(header), ZSTD_e_continue);
    return err || !len ? err : put(p, bytes, len, ZSTD_e_continue);
}

/* A piece of the memory file, without its pages of zeroes. */
static int put_pages(struct packer *p, uint64_t offset, const uint8_t *bytes, size_t len)
{
    int err = 0;

    for (size_t at = 0, n; at < len && !err; at += n) {
        for (n = 0; at + n < len && !is_zero(bytes + at + n, GUEST_PAGE_SIZE);)
            n += GUEST_PAGE_SIZE;
        if (n)
            err = put_record(p, offset + at, bytes + at, (uint32_t)n);
        else
            n = GUEST_PAGE_SIZE;
    }
    return err;
}

static int put_seal(struct packer *p)
{
    uint8_t seal[SEAL_SIZE];

    store_le32(seal, SEAL_MAGIC);
    store_le32(seal + 4, SEAL_SIZE - 8);
    store_le64(seal + 8, XXH3_64bits_digest(p->seal));
    return write_all(p->fd, seal, sizeof(seal));
}

static int pack(struct packer *p, int from, uint8_t *buf, const _Atomic bool *cancel)
{
    off_t size = lseek(from, 0, SEEK_END);
    int err = size < 0 ? -errno : 0;

    for (off_t at = 0; !err && at < size;) {
        off_t data = lseek(from, at, SEEK_DATA);
        ssize_t n;

        if (atomic_load(cancel))
            return -ECANCELED;
        if (data < 0 && errno == ENXIO)
            break;
        at = data < 0 ? at : (off_t)align_down((uint64_t)data, GUEST_PAGE_SIZE);
        n = pread(from, buf, MIN((off_t)SNAPSHOT_PACK_RECORD, size - at), at);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0 || n % GUEST_PAGE_SIZE)
            return n < 0 ? -errno : -EIO;
        err = put_pages(p, (uint64_t)at, buf, (size_t)n);
        at += n;
    }
    if (!err)
        err = put_record(p, 0, NULL, 0);
    if (!err)
        err = put(p, NULL, 0, ZSTD_e_end);
    return err ? err : put_seal(p);
}

int snapshot_pack(int memory_fd, int packed_fd, const _Atomic bool *cancel)
{
    struct packer p = { .zstd = ZSTD_createCCtx(), .fd = packed_fd, .seal = XXH3_createState(), .out_size = ZSTD_CStreamOutSize() };
    uint8_t *buf = malloc(SNAPSHOT_PACK_RECORD);
    int err = -ENOMEM;

    p.out = malloc(p.out_size);
    if (p.zstd && p.out && p.seal && buf && XXH3_64bits_reset(p.seal) == XXH_OK &&
        !ZSTD_isError(ZSTD_CCtx_setParameter(p.zstd, ZSTD_c_compressionLevel, LEVEL)) &&
        !ZSTD_isError(ZSTD_CCtx_setParameter(p.zstd, ZSTD_c_windowLog, WINDOW_LOG)) &&
        !ZSTD_isError(ZSTD_CCtx_setParameter(p.zstd, ZSTD_c_enableLongDistanceMatching, 1)) &&
        !ZSTD_isError(ZSTD_CCtx_setParameter(p.zstd, ZSTD_c_checksumFlag, 1)))
        err = pack(&p, memory_fd, buf, cancel);
    if (!err && fsync(packed_fd) < 0)
        err = -errno;
    ZSTD_freeCCtx(p.zstd);
    XXH3_freeState(p.seal);
    free(p.out);
    free(buf);
    return err;
}

/* ---- unpacking ---- */

struct unpacker {
    ZSTD_DCtx *zstd;
    int fd;
    XXH3_state_t *seal;
    uint8_t *buf;
    size_t size;
    ZSTD_inBuffer in;
    size_t hint;                /* zstd's last answer; 0: the frame is complete and its checksum was right */
};

/* More of the file, once u->in is used up. At its end u->in stays empty. */
static int refill(struct unpacker *u)
{
    ssize_t n;

    do
        n = read(u->fd, u->buf, u->size);
    while (n < 0 && errno == EINTR);
    if (n < 0)
        return -errno;
    u->in = (ZSTD_inBuffer){ u->buf, (size_t)n, 0 };
    return 0;
}

/* Exactly len bytes of what is inside. 0, -EINVAL: there are not so many, or they are damaged; or a negative errno. */
static int get(struct unpacker *u, void *data, size_t len)
{
    ZSTD_outBuffer out = { data, len, 0 };

    while (out.pos < out.size) {
        size_t before = out.pos, had;
        int err = u->in.pos == u->in.size ? refill(u) : 0;

        if (err)
            return err;
        had = u->in.pos;
        u->hint = ZSTD_decompressStream(u->zstd, &out, &u->in);
        if (ZSTD_isError(u->hint) || (out.pos == before && u->in.pos == had))
            return -EINVAL;
        XXH3_64bits_update(u->seal, u->buf + had, u->in.pos - had);
    }
    return 0;
}

/*
 * zstd's checksum is of what was packed, and some damage unpacks to just that: another distance, in data that repeats. It may be
 * worse the next time, so the seal is of the packed bytes; and the file ends with it.
 */
static int check_seal(struct unpacker *u)
{
    uint8_t seal[SEAL_SIZE + 1];
    size_t have = 0;

    while (have < sizeof(seal)) {
        size_t n;
        int err = u->in.pos == u->in.size ? refill(u) : 0;

        if (err)
            return err;
        n = MIN(u->in.size - u->in.pos, sizeof(seal) - have);
        if (!n)
            break;
        memcpy(seal + have, u->buf + u->in.pos, n);
        have += n;
        u->in.pos += n;
    }
    return have == SEAL_SIZE && load_le32(seal) == SEAL_MAGIC && load_le32(seal + 4) == SEAL_SIZE - 8 &&
                   load_le64(seal + 8) == XXH3_64bits_digest(u->seal)
               ? 0
               : -EINVAL;
}

/* The end: the last block and the checksum may still have to be read. */
static int get_end(struct unpacker *u)
{
    uint8_t none;
    int err = u->hint ? get(u, &none, 1) : 0;

    return u->hint == 0 ? check_seal(u) : err ? err : -EINVAL;
}

/* Where the bytes of the memory file are in RAM; NULL when that is not RAM. */
static uint8_t *place(struct memory *m, uint64_t offset, uint32_t len)
{
    for (unsigned i = 0; i < m->regions; i++) {
        struct memory_region *r = &m->region[i];

        if (offset < r->size)
            return len <= r->size - offset ? r->host + offset : NULL;
        if (offset < align_up(r->size, SNAPSHOT_REGION_ALIGN))
            return NULL;
        offset -= align_up(r->size, SNAPSHOT_REGION_ALIGN);
    }
    return NULL;
}

static int unpack(struct unpacker *u, struct memory *m)
{
    for (;;) {
        uint8_t header[RECORD_HEADER], *to;
        int err = get(u, header, sizeof(header));
        uint64_t offset = load_le64(header);
        uint32_t len = load_le32(header + 8);

        if (err)
            return err;
        if (!len)
            return get_end(u);
        to = len > SNAPSHOT_PACK_RECORD || (len | offset) % GUEST_PAGE_SIZE ? NULL : place(m, offset, len);
        if (!to)
            return -EINVAL;
        err = get(u, to, len);
        if (err)
            return err;
    }
}

int snapshot_unpack(int packed_fd, struct memory *m)
{
    struct unpacker u = { .zstd = ZSTD_createDCtx(), .fd = packed_fd, .seal = XXH3_createState(), .size = ZSTD_DStreamInSize(), .hint = 1 };
    int err = -ENOMEM;

    u.buf = malloc(u.size);
    if (u.zstd && u.buf && u.seal && XXH3_64bits_reset(u.seal) == XXH_OK)
        err = unpack(&u, m);
    ZSTD_freeDCtx(u.zstd);
    XXH3_freeState(u.seal);
    free(u.buf);
    return err;
}
