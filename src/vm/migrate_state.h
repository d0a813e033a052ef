/*
 * What both sides of a machine's migration agree on, above what migrate/ carries: the description is JSON with
 *
 *     name, config (as a configuration file, names of files absolute), tsc_hz, cpu_model, cpuid (hexadecimal), engine, devices
 *     (id: version), disks (size in bytes, discard)
 *
 * and the state is u32 version, u32 flags, then the stream of vm_save().
 */
#ifndef RINGFORT_VM_MIGRATE_STATE_H
#define RINGFORT_VM_MIGRATE_STATE_H

#include <jansson.h>

#define MIGRATE_STATE_VERSION 1u
#define MIGRATE_STATE_HEADER 8u
#define MIGRATE_STATE_PAUSED 1u /* by its user: it is to stay so */

struct machine;
struct vm;
struct x86_cpu_model;

/* New references; NULL: out of memory. */
json_t *vm_migrate_cpuid(const struct x86_cpu_model *model);
json_t *vm_migrate_devices(struct machine *m);

/* The locks on all disks. -EBUSY (logged): another machine has one; then none is held. Machine lock not held. */
int vm_migrate_lock_disks(struct vm *vm);
void vm_migrate_unlock_disks(struct vm *vm);

#endif
