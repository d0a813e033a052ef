/* Scattered buffers: see iov.h. Pure functions. */
#include "device/virtio/iov.h"

#include <stdint.h>
#include <string.h>

#include "base/util.h"

size_t iov_copy(const struct iovec *dst, unsigned dst_count, size_t offset, const struct iovec *src,
                unsigned src_count, size_t src_offset, size_t len)
{
    size_t done = 0;
    unsigned d = 0, s = 0;
    while (done < len) {
        while (d < dst_count && offset >= dst[d].iov_len)
            offset -= dst[d++].iov_len;
        while (s < src_count && src_offset >= src[s].iov_len)
            src_offset -= src[s++].iov_len;
        if (d == dst_count || s == src_count)
            break;
        size_t part = MIN(len - done, MIN(dst[d].iov_len - offset, src[s].iov_len - src_offset));
        memcpy((char *)dst[d].iov_base + offset, (const char *)src[s].iov_base + src_offset, part);
        offset += part;
        src_offset += part;
        done += part;
    }
    return done;
}

size_t iov_read(const struct iovec *iov, unsigned count, size_t offset, void *buf, size_t len)
{
    return iov_copy(&(struct iovec){buf, len}, 1, 0, iov, count, offset, len);
}

size_t iov_write(const struct iovec *iov, unsigned count, size_t offset, const void *buf,
                 size_t len)
{
    return iov_copy(iov, count, offset, &(struct iovec){(void *)(uintptr_t)buf, len}, 1, 0, len);
}

size_t iov_length(const struct iovec *iov, unsigned count)
{
    size_t len = 0;
    for (unsigned i = 0; i < count; i++)
        len += iov[i].iov_len;
    return len;
}

void iov_drop_front(struct iovec **iov, unsigned *count, size_t bytes)
{
    while (*count && bytes >= (*iov)->iov_len) {
        bytes -= (*iov)->iov_len;
        (*iov)++;
        (*count)--;
    }
    if (*count && bytes) {
        (*iov)->iov_base = (char *)(*iov)->iov_base + bytes;
        (*iov)->iov_len -= bytes;
    }
}

void iov_drop_back(struct iovec *iov, unsigned *count, size_t bytes)
{
    while (*count && bytes >= iov[*count - 1].iov_len)
        bytes -= iov[--*count].iov_len;
    if (*count)
        iov[*count - 1].iov_len -= bytes;
}
