/* The exit statuses of `ringfort run`: a contract with scripts; ringfort(1) lists them. */
#ifndef RINGFORT_VM_EXIT_H
#define RINGFORT_VM_EXIT_H

#include <errno.h>

enum vm_exit_status {
    VM_EXIT_POWEROFF = 0,       /* the guest powered off */
    VM_EXIT_STOPPED = 1,        /* the user ended the run (Ctrl-], second signal) while the guest was running */
    VM_EXIT_USAGE = 2,          /* bad usage or configuration, including files that are not what they should be */
    VM_EXIT_HOST = 3,           /* the host lacks something: memory, permission, a free port, a device */
    VM_EXIT_CRASHED = 4,        /* the guest crashed beyond continuing */
    VM_EXIT_BACKEND = 5,        /* a backend failed for good: no space, I/O error */
};

/* The status for a start-up that failed with this negative errno. 0 gives VM_EXIT_POWEROFF. */
static inline int vm_exit_status_of(int error)
{
    switch (-error) {
    case 0:
        return VM_EXIT_POWEROFF;
    case EIO:
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
    case EPIPE:
        return VM_EXIT_BACKEND;
    case EACCES:
    case EPERM:
    case EROFS:
    case EADDRINUSE:
    case EADDRNOTAVAIL:
    case EBUSY:
    case ETXTBSY:
    case EAGAIN:                /* resource limits of threads and processes */
    case EMFILE:
    case ENFILE:
    case ENOMEM:
    case ENODEV:
    case ENXIO:
    case ENOSYS:
    case EOPNOTSUPP:
        return VM_EXIT_HOST;
    default:                    /* ENOENT, EINVAL, ENOEXEC, EISDIR, EEXIST, … */
        return VM_EXIT_USAGE;
    }
}

#endif
