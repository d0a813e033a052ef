/*
 * Snapshots: a machine as it was at one moment, in a folder of its own, and machines that go on from there.
 *
 * docs/snapshots.md says what is in the folder and why. Names: letters, digits, "-", "_", "." inside, at most 63. Everything
 * here may take long and is called from threads that may wait, never the event loop's or a vCPU's.
 */
#ifndef RINGFORT_VM_SNAPSHOT_H
#define RINGFORT_VM_SNAPSHOT_H

#include <stdbool.h>
#include <stdint.h>

struct vm;
struct vm_config;

#define VM_SNAPSHOT_NAME_MAX 64 /* with the final 0 */

struct vm_snapshot_result {
    uint64_t pause_ns;          /* how long the guest stood still */
    uint64_t total_ns;
    uint64_t memory_bytes;      /* of RAM that were written: what is not zero */
    uint64_t disk_bytes;
};

/*
 * Saves while the guest runs; it stands still for the moment that is saved. Nothing of an older snapshot changes, and one of this
 * name exists either whole or not at all, whatever happens. compress: RAM takes less room, but a restored
 * machine has to unpack it, while it runs, and it is not shared. 0, -EINVAL (bad name), -EEXIST, -EBUSY (one is being saved), or
 * another negative errno (all logged).
 */
int vm_snapshot_save(struct vm *vm, const char *name, bool compress, struct vm_snapshot_result *out);

/* Makes the save under way end soon with -ECANCELED; none under way: nothing. Any thread. */
void vm_snapshot_cancel(struct vm *vm);

struct vm_snapshot_info {
    char name[VM_SNAPSHOT_NAME_MAX];
    char machine[128];          /* name of the machine that was saved */
    char created[32];           /* UTC, "2026-01-31T12:00:00Z" */
    char engine[16];
    uint64_t memory;            /* bytes of guest RAM */
    uint64_t stored;            /* bytes on disk */
    unsigned cpus, disks;
};
/* All snapshots by name: an array that the caller frees. 0 or a negative errno (logged). */
int vm_snapshot_list(struct vm_snapshot_info **list, unsigned *count);
/* Machines that were restored from it go on. 0, -ENOENT, … (logged). */
int vm_snapshot_remove(const char *name);

struct vm_snapshot;
/* 0, -ENOENT, -EINVAL (damaged, foreign, newer), … (all logged). */
int vm_snapshot_open(const char *name, struct vm_snapshot **out);
void vm_snapshot_close(struct vm_snapshot *s);
/* The name of the machine that was saved; borrowed. */
const char *vm_snapshot_machine(const struct vm_snapshot *s);
/* Fills a configuration (initialised by the caller) with that of the saved machine. 0 or a negative errno (logged). */
int vm_snapshot_config(struct vm_snapshot *s, struct vm_config *c);
/*
 * A machine that goes on from the snapshot; config is that of vm_snapshot_config(), finished, whose name, engine, console and
 * nets may have been changed; its disks get overlays over the snapshot's in the folder of the machine. The machine is held by
 * hold (VM_HOLD_USER: it begins paused). NULL on failure (logged), with the exit status that fits.
 */
struct vm *vm_snapshot_restore(struct vm_snapshot *s, struct vm_config *config, unsigned hold, int *status);

#endif
