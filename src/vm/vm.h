/*
 * A virtual machine's life: made from a configuration, run, reset, ended.
 *
 * vm_run() is the event loop's thread; each vCPU has a thread of its own.
 */
#ifndef RINGFORT_VM_VM_H
#define RINGFORT_VM_VM_H

struct vm;
struct vm_config;

/* Exit statuses of the command (also of vm_create through *status). */
enum vm_status {
    VM_STATUS_POWEROFF = 0,
    VM_STATUS_USER = 1,         /* the user ended the run while the guest was running */
    VM_STATUS_USAGE = 2,        /* bad usage or configuration */
    VM_STATUS_HOST = 3,         /* the host lacks something */
    VM_STATUS_CRASH = 4,        /* the guest crashed beyond continuing */
    VM_STATUS_BACKEND = 5,      /* a backend failed for good */
};

/* NULL on failure (logged), with the exit status that fits in *status. config is borrowed until vm_destroy(). */
struct vm *vm_create(const struct vm_config *config, int *status);
/* Runs until the guest powers off, crashes, or the user leaves. Returns the exit status. */
int vm_run(struct vm *vm);
void vm_destroy(struct vm *vm);

#endif
