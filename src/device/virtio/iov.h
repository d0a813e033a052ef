/*
 * Reading and writing the scattered buffers of a descriptor chain, whatever its layout: virtio 1.2
 * §2.6.4 lets the driver cut them anywhere.
 */
#ifndef RINGFORT_DEVICE_VIRTIO_IOV_H
#define RINGFORT_DEVICE_VIRTIO_IOV_H

#include <stddef.h>
#include <sys/uio.h>

/* Copy len bytes at offset out of or into the vector; return how many there were. */
size_t iov_read(const struct iovec *iov, unsigned count, size_t offset, void *buf, size_t len);
size_t iov_write(const struct iovec *iov, unsigned count, size_t offset, const void *buf,
                 size_t len);
/* Copy between vectors: at most len bytes from the start of src to offset in dst. Returns how many.
 */
size_t iov_copy(const struct iovec *dst, unsigned dst_count, size_t offset, const struct iovec *src,
                unsigned src_count, size_t src_offset, size_t len);
size_t iov_length(const struct iovec *iov, unsigned count);
/* Drop bytes from the front, which must be there: entries that become empty go away. */
void iov_drop_front(struct iovec **iov, unsigned *count, size_t bytes);
/* The same from the end. */
void iov_drop_back(struct iovec *iov, unsigned *count, size_t bytes);

#endif
