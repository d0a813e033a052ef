/* From errno to the exit statuses of `ringfort run`, which are a contract with scripts; ringfort(1)
 * lists them. */
#ifndef RINGFORT_VM_STATUS_H
#define RINGFORT_VM_STATUS_H

#include <errno.h>

#include "vm/vm.h"

/* The status for a start-up that failed with this negative errno. 0 gives VM_STATUS_POWEROFF. */
static inline int vm_status_of(int error)
{
    switch (-error) {
    case 0:
        return VM_STATUS_POWEROFF;
    case EIO:
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
    case EPIPE:
        return VM_STATUS_BACKEND;
    case EACCES:
    case EPERM:
    case EROFS:
    case EADDRINUSE:
    case EADDRNOTAVAIL:
    case EBUSY:
    case ETXTBSY:
    case EAGAIN: /* resource limits of threads and processes */
    case EMFILE:
    case ENFILE:
    case ENOMEM:
    case ENODEV:
    case ENXIO:
    case ENOSYS:
    case EOPNOTSUPP:
        return VM_STATUS_HOST;
    default: /* ENOENT, EINVAL, ENOEXEC, EISDIR, EEXIST, … */
        return VM_STATUS_USAGE;
    }
}

#endif
