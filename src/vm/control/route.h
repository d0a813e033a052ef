/*
 * What a control socket can be asked for. To add something: write handlers in a file of the subject's own, give them
 * a table of struct control_route, and name the table in route.c; describe it in docs/openapi.yaml (a test compares).
 *
 * A handler gets its arguments checked by name, and answers with an HTTP status and a JSON value. A quick one
 * (ROUTE_QUICK) runs in the server's thread, without locks, and may take the machine's; it must not wait for anything
 * that can take longer than a device takes to pause. Others are jobs (ROUTE_JOB): each runs in a thread of its own, may
 * take as long as it likes, tells how far it is (job.h) and looks whether it has been cancelled.
 */
#ifndef RINGFORT_VM_CONTROL_ROUTE_H
#define RINGFORT_VM_CONTROL_ROUTE_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct control;
struct control_job;
struct vm;

struct control_request {
    struct control *control;
    struct vm *vm;
    const char *name;        /* what stands for the last part of a path that ends in {name}; else "" */
    const json_t *args;      /* an object: the body's members, or the query's (all strings); never NULL */
    struct control_job *job; /* ROUTE_JOB: this one; else NULL */
};

/* Returns the HTTP status; *answer becomes a new reference, or stays NULL for an empty object. */
typedef int control_handler(struct control_request *r, json_t **answer);

enum control_route_kind {
    ROUTE_QUICK,
    ROUTE_JOB,       /* one at a time; answered when it is done, or at once with "wait": false */
    ROUTE_EVENTS,    /* the server's own: a stream */
    ROUTE_CONSOLE,   /* the server's own: an upgraded connection */
};

struct control_route {
    const char *method, *path; /* the last part may be {name} */
    const char *args;          /* names of the arguments, separated by blanks; NULL: none */
    enum control_route_kind kind;
    control_handler *handler;
    const char *text_type;     /* not NULL: the answer is a JSON string and is sent as text of this type */
};

/* The tables, each ending with an entry without a method. */
extern const struct control_route control_life_routes[];
extern const struct control_route control_info_routes[];
extern const struct control_route control_console_routes[];
extern const struct control_route control_job_routes[];
extern const struct control_route control_event_routes[];
extern const struct control_route control_snapshot_routes[];
extern const struct control_route control_engine_routes[];
extern const struct control_route control_migrate_routes[];

/* i counts over all tables; NULL past the end. */
const struct control_route *control_route_at(unsigned i);
/*
 * *route: the one for method and path, *name: where {name} begins in path, or "". 0, or the HTTP status of the error:
 * 404, 405.
 */
int control_route_find(const char *method, const char *path, const struct control_route **route, const char **name);
/* The arguments in a body: an object (a new reference), or NULL with *error (static). */
json_t *control_args_parse(const char *body, size_t len, const char **error);
/* 0, or 400 with *answer when args has a member that the route does not take. */
int control_route_check(const struct control_route *route, const json_t *args, json_t **answer);

/* For handlers: *answer becomes {"error": text}; returns status. */
int control_refuse(json_t **answer, int status, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
/*
 * Arguments by name; *out keeps its value when the argument is absent. Numbers and truth values may also come as strings, as they
 * do from a query. 0, or 400 with *answer.
 */
int control_arg_bool(const struct control_request *r, const char *key, bool *out, json_t **answer);
int control_arg_uint(const struct control_request *r, const char *key, uint64_t min, uint64_t max, uint64_t *out,
                     json_t **answer);
int control_arg_string(const struct control_request *r, const char *key, const char **out, json_t **answer);
/* The HTTP status for a negative errno of vm_pause() and its like. */
int control_status_of(int error);

#endif
