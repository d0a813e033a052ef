/*
 * libnbd, loaded when the first disk needs it: it brings an XML parser and its tables, which would make every start of the
 * program longer. Its functions have their own types, and their names without "nbd_".
 */
#ifndef RINGFORT_BACKEND_BLOCK_NBD_LIBRARY_H
#define RINGFORT_BACKEND_BLOCK_NBD_LIBRARY_H

#include <libnbd.h>

#define NBD_FUNCTIONS(X) \
    X(create) X(close) X(get_error) X(get_errno) X(set_tls_certificates) X(set_uri_allow_transports) X(set_pread_initialize) \
    X(aio_connect_uri) X(aio_is_ready) X(aio_is_processing) X(aio_is_dead) X(aio_is_closed) X(aio_get_fd) X(aio_get_direction) \
    X(aio_notify_read) X(aio_notify_write) X(poll) X(get_size) X(get_block_size) X(is_read_only) X(can_flush) X(can_trim) \
    X(can_zero) X(aio_pread) X(aio_pwrite) X(aio_flush) X(aio_trim) X(aio_zero) X(aio_disconnect)

struct nbd_library {
#define NBD_FUNCTION(name) __typeof__(nbd_##name) *name;
    NBD_FUNCTIONS(NBD_FUNCTION)
#undef NBD_FUNCTION
};

/* NULL: it cannot be loaded here (logged, with what to install). Any thread. */
const struct nbd_library *nbd_library(void);

#endif
