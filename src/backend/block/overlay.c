/* See overlay.h for the format and its rules. */
#include "backend/block/overlay.h"

#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "backend/block/block.h"
#include "base/log.h"
#include "base/util.h"

#define MAGIC "ringfort overlay"
#define OVERLAY_VERSION 1u
#define HEADER_SIZE 4096u
#define MAX_BASE_PATH 1024u
#define MAX_DEPTH 64u
#define MAX_SIZE ((uint64_t)1 << 50)
#define BITMAP_BLOCK 4096u

struct layer {
    int fd;                     /* -1: the top */
    uint64_t data;              /* where the disk's bytes begin in the file */
    uint64_t size;              /* raw files: what is beyond is zero */
    uint8_t *bitmap;            /* NULL: a raw file, which has everything */
};

struct overlay {
    uint64_t size, granules;
    struct layer layer[MAX_DEPTH];
    unsigned layers;
    size_t bitmap_bytes;
    uint8_t *dirty;             /* a byte per BITMAP_BLOCK of the top's bitmap */
    bool any_dirty;
};

bool overlay_is(const uint8_t *head, size_t len) { return len >= 16 && memcmp(head, MAGIC, 16) == 0; }

static size_t bitmap_bytes(uint64_t size)
{
    uint64_t granules = (size + OVERLAY_GRANULE - 1) / OVERLAY_GRANULE;

    return (size_t)align_up((granules + 7) / 8, BITMAP_BLOCK);
}

static int bad(const char *path, const char *what)
{
    log_error("disk %s: %s", path, what);
    return -EINVAL;
}

static int read_all(int fd, void *buf, size_t len, uint64_t offset)
{
    uint8_t *p = buf;

    while (len) {
        ssize_t n = pread(fd, p, len, (off_t)offset);

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -ENODATA;
        p += n;
        offset += (uint64_t)n;
        len -= (size_t)n;
    }
    return 0;
}

/* Reads header and bitmap of the overlay fd into l; base gets the name that it has for its base. */
static int read_layer(struct overlay *o, struct layer *l, int fd, const char *path, char base[MAX_BASE_PATH + 1])
{
    uint8_t header[HEADER_SIZE];
    uint64_t size;
    unsigned len;
    int err = read_all(fd, header, sizeof(header), 0);

    if (err || !overlay_is(header, sizeof(header)))
        return bad(path, "the overlay is cut short");
    if (load_le32(header + 16) != OVERLAY_VERSION || load_le32(header + 20) != OVERLAY_GRANULE)
        return bad(path, "an overlay of a newer ringfort: use that one");
    size = load_le64(header + 24);
    l->data = load_le64(header + 32);
    len = load_le16(header + 40);
    if (!size || size % 512 || size > MAX_SIZE || l->data % MIB(1) || l->data > MAX_SIZE ||
        l->data < HEADER_SIZE + bitmap_bytes(size) || len == 0 || len > MAX_BASE_PATH || memchr(header + 42, 0, len))
        return bad(path, "the overlay's header is damaged");
    if (o->layers > 1 && size != o->size)
        return bad(path, "it has another size than the overlay on top of it");
    memcpy(base, header + 42, len);
    base[len] = 0;
    o->size = size;
    o->granules = (size + OVERLAY_GRANULE - 1) / OVERLAY_GRANULE;
    o->bitmap_bytes = bitmap_bytes(size);
    l->size = size;
    l->bitmap = calloc(1, o->bitmap_bytes);
    if (!l->bitmap)
        return -ENOMEM;
    err = read_all(fd, l->bitmap, o->bitmap_bytes, HEADER_SIZE);
    return err ? bad(path, "the overlay is cut short") : 0;
}

/* base as seen from the folder of path. */
static int resolve(const char *path, const char *base, char out[PATH_MAX])
{
    char copy[PATH_MAX];
    int n;

    if (*base == '/')
        n = snprintf(out, PATH_MAX, "%s", base);
    else if (snprintf(copy, sizeof(copy), "%s", path) >= PATH_MAX)
        return -ENAMETOOLONG;
    else
        n = snprintf(out, PATH_MAX, "%s/%s", dirname(copy), base);
    return n < 0 || n >= PATH_MAX ? -ENAMETOOLONG : 0;
}

static int open_base(const char *path, const char *user)
{
    struct flock fl = { .l_type = F_RDLCK, .l_whence = SEEK_SET };
    int fd = open(path, O_RDONLY | O_CLOEXEC);

    if (fd < 0) {
        log_error("disk %s: cannot open its base %s: %s", user, path, strerror(errno));
        return -errno;
    }
    /* A base that somebody writes to makes garbage of what lies on it. */
    if (fcntl(fd, F_OFD_SETLK, &fl) < 0 && (errno == EAGAIN || errno == EACCES)) {
        log_error("disk %s: a machine writes to its base %s", user, path);
        close(fd);
        return -EBUSY;
    }
    return fd;
}

/* The layers below the top, until a raw file. */
static int open_bases(struct overlay *o, const char *top_path, char base[MAX_BASE_PATH + 1])
{
    char path[PATH_MAX], below[PATH_MAX];
    uint8_t head[16];
    struct stat st;
    int err;

    snprintf(path, sizeof(path), "%s", top_path);
    for (;;) {
        struct layer *l = &o->layer[o->layers];
        ssize_t n;

        if (o->layers == MAX_DEPTH)
            return bad(top_path, "it has more layers below it than ringfort follows; are they a circle?");
        if ((err = resolve(path, base, below))) {
            return bad(path, "the name of its base is too long");
        }
        *l = (struct layer){ .fd = open_base(below, path) };
        if (l->fd < 0)
            return l->fd;
        o->layers++;
        n = pread(l->fd, head, sizeof(head), 0);
        if (n < 0 || !overlay_is(head, (size_t)n)) {
            if (fstat(l->fd, &st) < 0 || (S_ISREG(st.st_mode) && (uint64_t)st.st_size != o->size))
                return bad(below, "it has another size than the overlay on top of it");
            l->size = o->size;
            return 0;
        }
        snprintf(path, sizeof(path), "%s", below);
        err = read_layer(o, l, l->fd, path, base);
        if (err)
            return err;
    }
}

int overlay_open(int fd, const char *path, struct overlay **out)
{
    struct overlay *o = calloc(1, sizeof(*o));
    char base[MAX_BASE_PATH + 1];
    int err;

    *out = NULL;
    if (!o) {
        log_error("out of memory");
        return -ENOMEM;
    }
    o->layer[0].fd = -1;
    o->layers = 1;
    err = read_layer(o, &o->layer[0], fd, path, base);
    if (!err)
        err = open_bases(o, path, base);
    if (!err && !(o->dirty = calloc(1, o->bitmap_bytes / BITMAP_BLOCK)))
        err = -ENOMEM;
    if (err) {
        if (err == -ENOMEM)
            log_error("disk %s: out of memory", path);
        overlay_close(o);
        return err;
    }
    *out = o;
    return 0;
}

void overlay_close(struct overlay *o)
{
    if (!o)
        return;
    for (unsigned i = 0; i < o->layers; i++) {
        if (o->layer[i].fd >= 0)
            close(o->layer[i].fd);
        free(o->layer[i].bitmap);
    }
    free(o->dirty);
    free(o);
}

uint64_t overlay_size(const struct overlay *o) { return o->size; }
uint64_t overlay_data_offset(const struct overlay *o) { return o->layer[0].data; }

static bool has(const struct layer *l, uint64_t granule)
{
    return !l->bitmap || (__atomic_load_n(&l->bitmap[granule / 8], __ATOMIC_RELAXED) >> (granule % 8) & 1);
}

static unsigned layer_of(const struct overlay *o, uint64_t granule)
{
    unsigned i = 0;

    while (!has(&o->layer[i], granule))
        i++;
    return i;
}

struct overlay_place overlay_find(const struct overlay *o, uint64_t offset, uint64_t len)
{
    uint64_t granule = offset / OVERLAY_GRANULE, end = offset + len, run = (granule + 1) * OVERLAY_GRANULE;
    unsigned i = layer_of(o, granule);

    while (run < end && layer_of(o, run / OVERLAY_GRANULE) == i)
        run += OVERLAY_GRANULE;
    return (struct overlay_place){ .fd = o->layer[i].fd, .offset = o->layer[i].data + offset, .len = MIN(run, end) - offset };
}

/* A part of an iovec, at most max vectors of it. */
static unsigned cut(const struct iovec *iov, unsigned iovcnt, uint64_t skip, uint64_t len, struct iovec *out, unsigned max)
{
    unsigned n = 0;

    for (unsigned i = 0; i < iovcnt && len && n < max; i++) {
        uint64_t here;

        if (skip >= iov[i].iov_len) {
            skip -= iov[i].iov_len;
            continue;
        }
        here = MIN(iov[i].iov_len - skip, len);
        out[n++] = (struct iovec){ (uint8_t *)iov[i].iov_base + skip, here };
        len -= here;
        skip = 0;
    }
    return n;
}

int64_t overlay_read(const struct overlay *o, int top, const struct iovec *iov, unsigned iovcnt, uint64_t offset)
{
    uint64_t total = 0, done = 0;

    for (unsigned i = 0; i < iovcnt; i++)
        total += iov[i].iov_len;
    while (done < total) {
        struct overlay_place p = overlay_find(o, offset + done, total - done);
        struct iovec part[64];
        unsigned n = cut(iov, iovcnt, done, p.len, part, ARRAY_SIZE(part));
        ssize_t r = preadv(p.fd < 0 ? top : p.fd, part, (int)n, (off_t)p.offset);

        if (r < 0 && errno == EINTR)
            continue;
        if (r < 0 && !done)
            return -errno;
        if (r < 0)
            break;
        if (r == 0) {
            /* A disk may end inside a granule; behind it is nothing but zeroes. */
            if (offset + done < o->size)
                break;
            for (unsigned i = 0; i < n; i++)
                memset(part[i].iov_base, 0, part[i].iov_len);
            for (unsigned i = 0; i < n; i++)
                r += (ssize_t)part[i].iov_len;
        }
        done += (uint64_t)r;
    }
    return (int64_t)done;
}

void overlay_mark(struct overlay *o, uint64_t offset, uint64_t len)
{
    uint64_t first = offset / OVERLAY_GRANULE, end = (offset + len + OVERLAY_GRANULE - 1) / OVERLAY_GRANULE;
    uint8_t *bitmap = o->layer[0].bitmap;

    for (uint64_t g = first; g < end && g < o->granules; g++) {
        uint8_t bit = (uint8_t)(1u << (g % 8));

        if (bitmap[g / 8] & bit)
            continue;
        __atomic_fetch_or(&bitmap[g / 8], bit, __ATOMIC_RELAXED);
        o->dirty[g / 8 / BITMAP_BLOCK] = 1;
        o->any_dirty = true;
    }
}

bool overlay_dirty(const struct overlay *o) { return o->any_dirty; }

int overlay_write_bitmap(struct overlay *o, int fd)
{
    for (size_t i = 0; i < o->bitmap_bytes / BITMAP_BLOCK; i++) {
        const uint8_t *block = o->layer[0].bitmap + i * BITMAP_BLOCK;
        ssize_t n;

        if (!o->dirty[i])
            continue;
        n = pwrite(fd, block, BITMAP_BLOCK, (off_t)(HEADER_SIZE + i * BITMAP_BLOCK));
        if (n != (ssize_t)BITMAP_BLOCK)
            return n < 0 ? -errno : -EIO;
        o->dirty[i] = 0;
    }
    o->any_dirty = false;
    return 0;
}

int block_overlay_create(int dirfd, const char *name, const char *base, uint64_t size)
{
    uint8_t header[HEADER_SIZE] = { 0 };
    uint64_t data = align_up(HEADER_SIZE + bitmap_bytes(size), MIB(1));
    size_t len = strlen(base);
    int fd, err = 0;

    if (!len || len > MAX_BASE_PATH || !size || size > MAX_SIZE)
        return -EINVAL;
    memcpy(header, MAGIC, 16);
    store_le32(header + 16, OVERLAY_VERSION);
    store_le32(header + 20, OVERLAY_GRANULE);
    store_le64(header + 24, size);
    store_le64(header + 32, data);
    store_le16(header + 40, (uint16_t)len);
    memcpy(header + 42, base, len);
    fd = openat(dirfd, name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0)
        return -errno;
    if (ftruncate(fd, (off_t)(data + align_up(size, OVERLAY_GRANULE))) < 0 ||
        pwrite(fd, header, sizeof(header), 0) != (ssize_t)sizeof(header))
        err = errno ? -errno : -EIO;
    close(fd);
    if (err)
        unlinkat(dirfd, name, 0);
    return err;
}

int block_image_size(int dirfd, const char *name, uint64_t *size)
{
    int fd = openat(dirfd, name, O_RDONLY | O_CLOEXEC), err = 0;
    uint8_t head[32];
    struct stat st;
    ssize_t n;

    if (fd < 0 || fstat(fd, &st) < 0 || (n = pread(fd, head, sizeof(head), 0)) < 0)
        err = -errno;
    else
        *size = n == (ssize_t)sizeof(head) && overlay_is(head, sizeof(head)) ? load_le64(head + 24) : (uint64_t)st.st_size;
    if (fd >= 0)
        close(fd);
    return err;
}
