/*
 * The other end of a machine's control socket: one request and its answer, a job with its progress, the stream of
 * events, the console. docs/control.md describes what there is to ask for.
 *
 * Functions that can fail log one line that names the machine, and return an exit status of the command:
 * 0; 1 (VM_STATUS_USER) when the machine refused or could not do it; 2 for an argument that it does not take;
 * 3 when it cannot be reached or does not answer in time. One thread.
 */
#ifndef RINGFORT_CLI_CLIENT_H
#define RINGFORT_CLI_CLIENT_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>

#include "vm/control/registry.h"

#define CLIENT_PATIENCE_S 30u /* for an answer that is to come at once */

/*
 * args (consumed; NULL: none) is an object: the body of a POST or DELETE, the query of a GET. *answer: a new reference,
 * NULL unless 0 is returned; answer may be NULL. seconds: how long it may take, 0: as long as it likes.
 */
int client_call(const struct registry_entry *m, const char *method, const char *path, json_t *args, unsigned seconds,
                json_t **answer);
/* The same without logging; the HTTP status or a negative errno. */
int client_try(const struct registry_entry *m, const char *method, const char *path, json_t *args, unsigned seconds,
               json_t **answer);
/* A GET whose answer is text of any bytes: *text is the caller's, with a NUL behind it. */
int client_text(const struct registry_entry *m, const char *path, json_t *args, char **text, size_t *len);

/*
 * What takes long: progress is called with each of the job's progress objects (and the job's number) while it runs.
 * An interrupt (SIGINT) cancels the job; the call then still waits for its end.
 */
int client_job(const struct registry_entry *m, const char *method, const char *path, json_t *args,
               void (*progress)(void *opaque, unsigned job, const json_t *progress), void *opaque, json_t **answer);

/* Events as they come. NULL: logged, with *status. */
struct client_events;
struct client_events *client_events_open(const struct registry_entry *m, int *status);
void client_events_close(struct client_events *e);
/* To be polled for reading. */
int client_events_fd(const struct client_events *e);
/* The next event, a new reference; NULL: none within so many ms (-1: as long as it takes), or the stream has ended. */
json_t *client_events_next(struct client_events *e, int ms);
bool client_events_ended(const struct client_events *e);

/*
 * A connection to the console: bytes both ways on *fd (blocking). *replay: how many of the first bytes were written
 * before. lines: how many lines of those are asked for.
 */
int client_console(const struct registry_entry *m, unsigned long lines, int *fd, size_t *replay);

#endif
