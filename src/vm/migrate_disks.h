/*
 * Disks that are copied along in a migration: the source's, read and logged through the block backend, and the target's, which are
 * new raw files: diskN in the folder of the machine (snapshot_store.h), or NAME.diskN in a folder that was given. Until the machine is
 * the target's ".partial" follows; the next one that receives a machine of that name there removes what is called so, as a killed
 * target's.
 *
 * Disks on servers are not copied: both sides reach them.
 */
#ifndef RINGFORT_VM_MIGRATE_DISKS_H
#define RINGFORT_VM_MIGRATE_DISKS_H

#include <jansson.h>

#include "migrate/migrate.h"

struct vm;
struct vm_config;

struct source_disks;

/* NULL: *err: 0: there is none to be copied, or a negative errno (logged). */
struct source_disks *source_disks_create(struct vm *vm, int *err);
void source_disks_free(struct source_disks *s);
const struct migrate_disks *source_disks_ops(const struct source_disks *s);
/* Whether the configuration's i-th disk is copied. s: NULL: no. */
bool source_disks_has(const struct source_disks *s, unsigned i);

struct target_disks;

/*
 * Makes the files of those of the configuration's disks that the source's list (objects with size and copied) says are
 * copied, and puts their names into the configuration, which borrows the partial ones. The machine's name is this process's. folder:
 * NULL: the machine's. *out: NULL: there is none. 0 or a negative errno (logged).
 */
int target_disks_create(const json_t *list, struct vm_config *c, const char *folder, struct target_disks **out);
/* As migrate_target_ops has them. */
int target_disks_write(struct target_disks *t, unsigned disk, uint64_t offset, const void *buf, size_t len);
int target_disks_sync(struct target_disks *t);
/* Before the machine takes locks of its own on them. */
void target_disks_unlock(struct target_disks *t);
/* The machine is this side's: the files get their names. 0 or a negative errno (logged). May be done again. */
int target_disks_name(struct target_disks *t);
/* Their names are on the host's disk, too. 0 or a negative errno (silent). */
int target_disks_sync_names(struct target_disks *t);
/* Removes the files: the machine stays where it was. */
void target_disks_remove(struct target_disks *t);
/* The files stay. NULL is allowed. */
void target_disks_free(struct target_disks *t);

#endif
