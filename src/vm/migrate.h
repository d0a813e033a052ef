/*
 * A virtual machine on its way to another process or host: what of vm and its devices migrate/ needs.
 *
 * docs/migration.md has the stages and who owns the machine in each. Disks are shared by their path: both sides open them, and
 * the lock on them changes hands with the machine; or they are copied (migrate_disks.h).
 */
#ifndef RINGFORT_VM_MIGRATE_H
#define RINGFORT_VM_MIGRATE_H

#include "migrate/migrate.h"

struct vm;
struct vm_config;

struct vm_migration;

/* with_disks: copy those on this host. progress: in the thread of vm_migration_run(). opt is copied. NULL: out of memory, or a disk (logged). */
struct vm_migration *vm_migration_create(struct vm *vm, const struct migrate_source_options *opt, bool with_disks,
                                         void (*progress)(void *opaque, const struct migrate_progress *p), void *opaque);
/*
 * Sends the machine; may take long, in a thread that may wait. After MIGRATE_DONE the machine is not this process's any more: the caller
 * ends it. After MIGRATE_UNKNOWN it is paused as by its user, and vm_migrate_decide() lets it go on.
 */
enum migrate_stage vm_migration_run(struct vm_migration *m, struct migrate_result *result);
/* Any thread. As migrate_source_cancel(). */
bool vm_migration_cancel(struct vm_migration *m, bool force);
void vm_migration_free(struct vm_migration *m);

/*
 * A person resumes the machine: if nobody knew whose it is after a migration, it is this process's from now on. Takes the
 * locks on disks: 0, or -EBUSY (logged): the other side has them. 0 also when there is nothing to decide. Any thread.
 */
int vm_migrate_decide(struct vm *vm);

/* ---- the receiving side ---- */

/* What is given to `ringfort receive`. */
struct vm_reception_options {
    const char *name;           /* of the machine here */
    struct migrate_target_options target;
    /* Changes to the source's configuration: names and values of flags, as of vm_config_set_flag(); ends with NULL. */
    const char *const (*flags)[2];
    const char *disks;          /* folder for disks that are copied; NULL: the machine's own */
};

struct vm_reception;

/* Listens from here on. The signals that end a machine are blocked in its threads. NULL (logged). */
struct vm_reception *vm_reception_create(const struct vm_reception_options *opt);
/* The port that was got when 0 was asked for. */
unsigned vm_reception_port(const struct vm_reception *r);
/*
 * Called once a source has come and its machine was made, in a thread of the reception's own: give it a control socket and the like before
 * it answers. 0, or a negative errno (logged): the source is turned away.
 */
void vm_reception_on_config(struct vm_reception *r, int (*fn)(void *opaque, const struct vm_config *config), void *opaque);
/* Readable once vm_reception_wait() does not block. */
int vm_reception_fd(const struct vm_reception *r);
/* Waits until there is a machine to vm_run(), which is held until it is this process's; NULL: the migration failed before. */
struct vm *vm_reception_wait(struct vm_reception *r);
const struct vm_config *vm_reception_config(const struct vm_reception *r);
/* Ends it, whatever it does. Any thread. */
void vm_reception_cancel(struct vm_reception *r);
/* After vm_run(), before vm_destroy(): waits for the migration's end. */
enum migrate_stage vm_reception_end(struct vm_reception *r, struct migrate_result *result);
/* After vm_destroy(): frees the configuration, too. NULL is allowed. */
void vm_reception_free(struct vm_reception *r);

#endif
