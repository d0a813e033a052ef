/*
 * Which machines run, by name: files in a folder that only the user may enter.
 *
 *   NAME.lock   locked (flock) by the machine's process for as long as it lives; holds its process id
 *   NAME.sock   its control socket
 *
 * The folder is $XDG_RUNTIME_DIR/ringfort; without that variable /run/user/UID/ringfort where there is such a folder;
 * else /run/ringfort for root and /tmp/ringfort-UID for others. A lock ends with its process however that ends, so
 * what a killed machine leaves behind is told from a running one without asking it, and is cleared away by whoever
 * comes across it.
 *
 * Any thread; each function stands for itself.
 */
#ifndef RINGFORT_VM_CONTROL_REGISTRY_H
#define RINGFORT_VM_CONTROL_REGISTRY_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#define REGISTRY_MAX_NAME 64
/* As sockaddr_un has it. */
#define REGISTRY_MAX_PATH 108

/* A name is a file's name and a word of a command: 1…REGISTRY_MAX_NAME of A-Z a-z 0-9 . _ -, a letter or digit first. */
bool registry_name_valid(const char *name);

struct registry_claim {
    int lock_fd, listen_fd; /* -1: none */
    char lock[REGISTRY_MAX_PATH], socket[REGISTRY_MAX_PATH];
};

/*
 * Takes the name for this process and listens on its socket (mode 0600, non-blocking, close-on-exec). 0, -EBUSY (a
 * machine of that name runs), or another negative errno; logged.
 */
int registry_claim(const char *name, struct registry_claim *out);
/* Closes and removes the socket; the name stays taken. Idempotent. */
void registry_close_socket(struct registry_claim *c);
/* Gives the name back; idempotent for one that was zeroed by registry_release() or has fds -1. */
void registry_release(struct registry_claim *c);

struct registry_entry {
    char name[REGISTRY_MAX_NAME + 1];
    char socket[REGISTRY_MAX_PATH];
    pid_t pid; /* 0: not known */
};

/* The machines that run, sorted by name; the caller frees *out. The number, or a negative errno (logged). */
int registry_list(struct registry_entry **out);
/*
 * The machine that word means: its name, or the beginning of the name of one machine only. 0; -ENOENT, -ENOTUNIQ
 * (logged in one line, with what there is), or another negative errno (logged).
 */
int registry_find(const char *word, struct registry_entry *out);

/* Waits until the machine's process has given the name back. 0 or -ETIMEDOUT. */
int registry_await_end(const struct registry_entry *m, unsigned seconds);

/*
 * Where a detached machine's files stay when it has ended: $XDG_STATE_HOME/ringfort, ~/.local/state/ringfort, for root
 * /var/log/ringfort. what: "console", "log". With make the folder is made if missing. 0 or a negative errno (logged).
 */
int registry_log_path(const char *name, const char *what, bool make, char *out, size_t size);

#endif
