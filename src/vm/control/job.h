/*
 * What takes long: a handler of a ROUTE_JOB route in a thread of its own, with progress that others can follow and a
 * way to cancel it.
 *
 * One job at a time: what takes long here (a snapshot, a migration, a change of engine) concerns the machine as a whole.
 * Followers get events "job" with the job's number, kind ("migrate": the last word of the path), state ("running", "done",
 * "failed", "cancelled") and progress, and in the end its result. GET /v1/jobs shows the latest ones.
 */
#ifndef RINGFORT_VM_CONTROL_JOB_H
#define RINGFORT_VM_CONTROL_JOB_H

#include <jansson.h>
#include <stdbool.h>

#include "vm/control/route.h"

/* For handlers, in the job's thread or one that it started. */

/* True once somebody wants it to end: DELETE /v1/jobs/N, or the machine ends. The handler then puts things back as they
 * were and returns 499 by control_refuse(). */
bool control_job_cancelled(struct control_job *job);
/* fn runs once, in the canceller's thread, when that happens (at once if it has): to wake the handler from a
 * wait. NULL: no more; after that returned, fn does not run any more. */
void control_job_on_cancel(struct control_job *job, void (*fn)(void *opaque), void *opaque);
/* How far it is: an object (consumed) that replaces the one before. Followers get at most some ten a second, the last
 * one always. */
void control_job_progress(struct control_job *job, json_t *progress);

/* fn runs in the job's thread once followers have been told of the job's end: to end the machine by that, which they would
 * otherwise hear of first. The handler's own thread only. */
void control_job_finally(struct control_job *job, void (*fn)(struct vm *vm, int status), int status);

/* ---- For the server. ---- */

struct control_jobs;

/* changed: a job has ended; runs in its thread. NULL: out of memory. */
struct control_jobs *control_jobs_create(struct control *control, void (*changed)(void *opaque), void *opaque);
/* After control_jobs_stop(). NULL is allowed. */
void control_jobs_destroy(struct control_jobs *jobs);
/* Refuses new ones, cancels the one there is and waits for its end. Any thread but a job's. */
void control_jobs_stop(struct control_jobs *jobs);

/*
 * Starts r's handler; the job takes over a reference to args and a copy of the name. *id: its number. 0, or an HTTP
 * status with *answer.
 */
int control_jobs_start(struct control_jobs *jobs, const struct control_route *route, const struct control_request *r,
                       unsigned *id, json_t **answer);
/* The answer of a job that has ended: its status and a new reference. 0: it runs; -1: no such job. */
int control_jobs_result(struct control_jobs *jobs, unsigned id, json_t **answer);
/* {"id", "kind", "state", …} of one, or NULL; of all, an array. New references. */
json_t *control_jobs_describe(struct control_jobs *jobs, unsigned id);
json_t *control_jobs_list(struct control_jobs *jobs);
/* Starts, or an HTTP status: 404. One that has ended stays as it is. */
int control_jobs_cancel(struct control_jobs *jobs, unsigned id);

#endif
