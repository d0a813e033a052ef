/*
 * The inside of the control server, for its own files: server.c (thread and connections), http.c (requests and
 * answers), attach.c (the console) and the handlers that need more than a machine.
 *
 * Everything here belongs to the server's thread, unless it says otherwise.
 */
#ifndef RINGFORT_VM_CONTROL_SERVER_H
#define RINGFORT_VM_CONTROL_SERVER_H

#include <microhttpd.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "base/loop.h"
#include "vm/control/control.h"
#include "vm/control/event.h"
#include "vm/control/job.h"
#include "vm/control/registry.h"
#include "vm/control/route.h"
#include "vm/vm.h"

#define CONTROL_MAX_CONNECTIONS 64u
#define CONTROL_MAX_STREAMS     32u        /* of those: followers of events or the console, and waiters for jobs */
#define CONTROL_MAX_HEADER      16384u     /* bytes of a request's head */
#define CONTROL_MAX_BODY        65536u     /* bytes */
#define CONTROL_MAX_DISCARD     1048576u   /* bytes of a longer body that are read before it is refused */
#define CONTROL_REQUEST_NS      10000000000u /* from the connection to the end of the request */
#define CONTROL_IDLE_S          30u        /* an answer that nobody reads */

struct exchange;
struct attach;
struct keeper;

/* One client's connection; each carries one request. */
struct connection {
    struct control *control;
    struct MHD_Connection *http;
    int fd;
    uint64_t deadline_ns; /* 0: the request is here */
    struct exchange *exchange;
    struct connection *next, **prev_next;
};

struct control {
    const struct vm_config *config;
    struct vm *vm;
    struct registry_claim claim;
    char *console_path; /* where the console is kept, too; NULL: nowhere */

    struct loop *loop;
    pthread_t thread;
    bool serving, closed;
    struct MHD_Daemon *http;
    struct loop_fd *http_watch, *listen_watch;
    struct loop_hook http_hook;
    int tick_fd;
    struct loop_fd *tick_watch;
    bool ticking;
    struct connection *connections;
    unsigned connection_count, stream_count;

    struct events *events;     /* any thread */
    struct loop_call wake;     /* any thread schedules it: events, ended jobs */
    struct control_jobs *jobs; /* any thread */
    struct attach *attached;   /* clients of the console */
    struct keeper *keeper;     /* writes console_path; NULL: none */
    struct loop_call console_call; /* any thread schedules it: output, room for input */

    _Atomic bool closing;
    uint64_t closing_deadline_ns;
    uint64_t stop_deadline_ns; /* when a guest that was asked to power off is cut off; 0: never */
};

uint64_t control_now_ns(void);
/* Ticks begin when there is something to watch the time for, and end by themselves. */
void control_need_ticks(struct control *c);

/* http.c */
enum MHD_Result http_access(void *control, struct MHD_Connection *http, const char *url, const char *method,
                            const char *version, const char *upload, size_t *upload_size, void **state);
void http_completed(void *control, struct MHD_Connection *http, void **state, enum MHD_RequestTerminationCode why);
/* Something happened that exchanges wait for. */
void http_wake(struct control *c);
/* The client of a waiting exchange has gone. */
void http_gone(struct connection *conn);
/* False: nothing more will come for a stream. */
bool http_waits(const struct connection *conn);
/* A JSON answer (consumed). */
enum MHD_Result http_answer(struct MHD_Connection *http, unsigned status, json_t *answer, const char *text_type);

/* info.c: what vm_set_observer() is given. Any thread. */
void control_observe(void *control, enum vm_notice what, int status);
/* "running", "paused", "ended" of the machine. Any thread. */
const char *control_state(struct vm *vm);

/* attach.c */
enum MHD_Result attach_upgrade(struct control *c, struct MHD_Connection *http, const json_t *args);
/* New output, or room for input: called through console_call. */
void attach_wake(struct control *c);
/* All have got everything that the guest has written, or are gone. */
bool attach_done(struct control *c);
void attach_close_all(struct control *c);
int keeper_open(struct control *c);
void keeper_flush(struct control *c);
void keeper_close(struct control *c);

#endif
