/* See state_file.h for the layout. */
#include "vm/state_file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#include "base/log.h"
#include "base/util.h"

#define MAGIC "ringfort machine"
#define LAYOUT_VERSION 1u
#define HEADER_SIZE 32u
/* A thousand vCPUs and the largest devices are below this; what is longer is not read into memory. */
#define MAX_STREAM MIB(256)

static uint32_t checksum(const void *data, size_t len)
{
    const uint8_t *p = data;
    uLong crc = crc32(0, NULL, 0);

    for (size_t n; len; p += n, len -= n) {
        n = MIN(len, (size_t)MIB(64));
        crc = crc32(crc, p, (uInt)n);
    }
    return (uint32_t)crc;
}

/* All bytes, or a negative errno; a file that ends early is -ENODATA. */
static int transfer(int fd, void *buf, size_t len, bool out)
{
    uint8_t *p = buf;

    while (len) {
        ssize_t n = out ? write(fd, p, len) : read(fd, p, len);

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : out ? -EIO : -ENODATA;
        p += n;
        len -= (size_t)n;
    }
    return 0;
}

int state_file_write(int dirfd, const char *name, const char *path, const void *stream, size_t len)
{
    uint8_t header[HEADER_SIZE];
    int fd = openat(dirfd, name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600), err = 0;

    memcpy(header, MAGIC, 16);
    store_le32(header + 16, LAYOUT_VERSION);
    store_le32(header + 20, checksum(stream, len));
    store_le64(header + 24, len);
    if (fd < 0)
        err = -errno;
    if (!err)
        err = transfer(fd, header, sizeof(header), true);
    if (!err)
        err = transfer(fd, (void *)stream, len, true);
    if (!err && fsync(fd) < 0)
        err = -errno;
    if (fd >= 0)
        close(fd);
    if (err)
        log_error("%s/%s: cannot write: %s", path, name, strerror(-err));
    return err;
}

static int bad(const char *path, const char *name, const char *what)
{
    log_error("%s/%s: %s", path, name, what);
    return -EINVAL;
}

static int check_header(const uint8_t *header, uint64_t size, const char *path, const char *name)
{
    uint32_t version = load_le32(header + 16);
    uint64_t len = load_le64(header + 24);

    if (memcmp(header, MAGIC, 16) != 0)
        return bad(path, name, "this is not the state of a ringfort machine");
    if (version == 0 || version > LAYOUT_VERSION) {
        log_error("%s/%s: its layout has version %u, this ringfort knows up to %u: use a newer one", path, name, version,
                  LAYOUT_VERSION);
        return -EINVAL;
    }
    if (len > MAX_STREAM || size - HEADER_SIZE != len)
        return bad(path, name, "it is damaged: its length is not what it says; was it copied completely?");
    return 0;
}

int state_file_read(int dirfd, const char *name, const char *path, void **stream, size_t *len)
{
    int fd = openat(dirfd, name, O_RDONLY | O_CLOEXEC), err = 0;
    uint8_t header[HEADER_SIZE];
    struct stat st;
    void *data = NULL;

    if (fd < 0 || fstat(fd, &st) < 0) {
        err = -errno;
        log_error("%s/%s: cannot read: %s", path, name, strerror(-err));
        goto out;
    }
    if ((uint64_t)st.st_size < HEADER_SIZE) {
        err = bad(path, name, "this is not the state of a ringfort machine");
        goto out;
    }
    err = transfer(fd, header, sizeof(header), false);
    if (!err && (err = check_header(header, (uint64_t)st.st_size, path, name)))
        goto out;
    *len = err ? 0 : load_le64(header + 24);
    if (!err && !(data = malloc(MAX(*len, 1u))))
        err = -ENOMEM;
    if (!err)
        err = transfer(fd, data, *len, false);
    if (err)
        log_error("%s/%s: cannot read: %s", path, name, strerror(-err));
    else if (checksum(data, *len) != load_le32(header + 20))
        err = bad(path, name, "it is damaged: its checksum does not fit");
out:
    if (fd >= 0)
        close(fd);
    if (err)
        free(data);
    else
        *stream = data;
    return err;
}
