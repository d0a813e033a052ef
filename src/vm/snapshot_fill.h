/*
 * RAM out of a packed memory file, unpacked while the machine runs: what is touched comes first, and a thread brings the rest.
 *
 * A chunk of the file that is damaged, or cannot be read, ends the machine with a message that names the file: in an orderly way when
 * that was found ahead of time, and at once when somebody waits for a page of it, as nothing can go on in its place. For the snapshot_*.c files and vm.c.
 */
#ifndef RINGFORT_VM_SNAPSHOT_FILL_H
#define RINGFORT_VM_SNAPSHOT_FILL_H

struct vm;
struct snapshot_fill;

/*
 * Gives the RAM of a machine that has not run the contents of the file; name: for messages; packed_fd stays the caller's. *out: what goes on
 * meanwhile; NULL: nothing, all of it is there: this host does not let pages come later (memory/missing.h). 0, -EINVAL (damaged),
 * … (all logged).
 */
int snapshot_fill_create(struct vm *vm, int packed_fd, const char *name, struct snapshot_fill **out);
/*
 * The machine's state is loaded, and it may run from here on. 0; -EINVAL or another negative errno (logged): a page that loading
 * touched could not be had, the machine must not run.
 */
int snapshot_fill_begin(struct snapshot_fill *f);
/* The machine has ended and nobody touches its memory any more. NULL is allowed. */
void snapshot_fill_destroy(struct snapshot_fill *f);

#endif
