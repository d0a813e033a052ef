/*
 * A machine's control socket: HTTP/1.1 and JSON over a Unix socket, served by a thread of its own.
 *
 * Nothing that a client does holds up the machine: the server has its own event loop, takes the machine's locks only
 * for the moment in which a request is carried out, bounds requests in size and time, and runs what may take long
 * in worker threads (job.h). docs/control.md says what there is to ask for; route.h is for those who add to it.
 */
#ifndef RINGFORT_VM_CONTROL_CONTROL_H
#define RINGFORT_VM_CONTROL_CONTROL_H

#include <jansson.h>
#include <stdint.h>

struct control;
struct vm;
struct vm_config;

/*
 * Takes the machine's name and begins to listen; requests wait until control_serve(). Before the machine is made, so
 * that a second one of that name opens no disk. config is borrowed. 0 or a negative errno (logged).
 */
int control_open(const struct vm_config *config, struct control **out);
/* Starts the server's thread. vm is borrowed until control_close(). 0 or a negative errno (logged). */
int control_serve(struct control *c, struct vm *vm);
/*
 * After vm_run() and before vm_destroy(): cancels jobs and waits for them, gives readers of events and of the console
 * a moment to get the last of it, and closes the socket. Idempotent; NULL is allowed.
 */
void control_close(struct control *c);
/* After vm_destroy(), when the machine's disks are closed: gives the name back. NULL is allowed. */
void control_destroy(struct control *c);

/* Keeps the console of the machine in a file from here on, too; before control_serve(). path is copied. 0 or a
 * negative errno (logged). */
int control_keep_console(struct control *c, const char *path);

/*
 * Tells everybody who follows GET /v1/events. what: the name of the event; more: an object with further members
 * (consumed; NULL: none). Any thread, whatever locks it holds.
 */
void control_event(struct control *c, const char *what, json_t *more);

#endif
