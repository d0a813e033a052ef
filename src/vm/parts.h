/*
 * From a configuration to what a board is made of: opens the backends on the host that the
 * configuration names, and describes the board with them.
 *
 * One thread, machine lock not held, while the machine's loop does not run.
 */
#ifndef RINGFORT_VM_PARTS_H
#define RINGFORT_VM_PARTS_H

#include "board/pc/pc.h"

struct block;
struct console;
struct machine;
struct net;
struct vm_config;

struct vm_parts {
    /* Complete after vm_parts_open() but for tsc_hz, which is the caller's; borrows from the configuration and from here. */
    struct pc_config board;
    /* What board points to. Consoles are owned; disks and nets go to their devices in
     * vm_parts_build(). */
    struct console *serial;
    struct console **consoles;
    struct pc_disk *disks;
    struct pc_net *nets;
    bool built;
};

/*
 * m has its loop and clock. 0 or a negative errno (logged); *p is then closed. vm_status_of() gives
 * the exit status.
 */
int vm_parts_open(struct vm_parts *p, const struct vm_config *c, struct machine *m);
/* pc_create() with these parts. 0 or a negative errno (logged). */
int vm_parts_build(struct vm_parts *p, struct machine *m, struct pc *pc);
/* Between machine_destroy_devices() and machine_destroy(): devices use consoles, consoles use the
 * loop. Idempotent. */
void vm_parts_close(struct vm_parts *p);

/* Whichever console is the terminal: fn is called when the user asks to leave (Ctrl-]). Loop
 * thread, lock held. */
void vm_parts_set_escape(struct vm_parts *p, void (*fn)(void *opaque), void *opaque);

#endif
