/*
 * `ringfort run --detach`: the machine goes on in a process of its own, once it runs.
 *
 * Until then that process speaks to the caller's terminal, so that what goes wrong is seen where the command was
 * given, with its exit status.
 */
#ifndef RINGFORT_CLI_DETACH_H
#define RINGFORT_CLI_DETACH_H

#include <stdbool.h>

struct detach {
    int ready_fd; /* to the waiting parent; -1: not detached */
    char log[4096]; /* where messages go from detach_ready() on */
};

/*
 * Forks. In the parent: waits, and returns true with the exit status of the command in *status. In the child: false; standard
 * input and output are /dev/null, and the session is its own. In the parent also on errors (logged). Before any
 * thread is started. name: the machine's.
 */
bool detach_begin(struct detach *d, const char *name, int *status);
/* The machine runs: lets the parent go, with status 0; messages go to the log file from here on. 0 or a negative
 * errno (logged); then the parent gets the child's exit status. */
int detach_ready(struct detach *d);

#endif
