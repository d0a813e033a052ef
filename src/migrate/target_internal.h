/*
 * The target's parts among each other: target.c (the stages), target_accept.c (whose connections are taken, and who owns the machine),
 * target_streams.c (what carries pages and disks).
 */
#ifndef RINGFORT_MIGRATE_TARGET_INTERNAL_H
#define RINGFORT_MIGRATE_TARGET_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>

#include "migrate/migrate.h"
#include "migrate/postcopy.h"
#include "migrate/protocol.h"

#define TARGET_URGENT MIGRATE_MAX_STREAMS      /* index of the urgent connection */
#define TARGET_STREAMS (MIGRATE_MAX_STREAMS + 1)

/* Whose the machine is, as far as this side knows. */
enum ownership {
    TARGET_NOTHING,     /* no source yet */
    TARGET_RECEIVING,   /* the source's */
    TARGET_PREPARED,    /* the source's; complete here */
    TARGET_ORPHAN,      /* complete here, and the source is gone */
    TARGET_TAKEN,       /* the target's */
    TARGET_GIVEN_UP,    /* the source's for ever */
};

struct target_stream {
    struct migrate_target *target;
    pthread_t thread;
    bool started;
    struct channel *channel;
    uint64_t unsynced;          /* bytes of disks since the last sync */
};

struct migrate_target {
    const struct migrate_target_options *opt;
    const struct migrate_target_ops *ops;
    void *opaque;
    struct channel_listener *listener;
    struct channel_options channel_options;
    pthread_t acceptor;
    bool acceptor_started;
    _Atomic bool cancelled;
    _Atomic bool activated;     /* it runs, or may at any moment */
    pthread_t runner;           /* ops->run() in post-copy */
    bool runner_started;

    struct memory *memory;
    /*
     * Streams hold it while they put pages into memory, and who sets postcopy holds it alone: a stream that touched a page in
     * the other way would wait for that page for ever.
     */
    pthread_rwlock_t placing;
    struct postcopy *_Atomic postcopy;
    uint64_t *missing[MEMORY_MAX_REGIONS];

    /* Guarded by lock. */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    enum ownership owner;
    struct hello hello;         /* the source's */
    struct channel *control;
    struct channel *next;       /* one that the acceptor has for run() */
    struct target_stream stream[TARGET_STREAMS];
    unsigned streams;           /* that the source announced */
    bool streams_wanted;        /* of this control connection; those of an earlier one may still come */
    bool broken;
    bool known;                 /* the source said that it knows that the machine is here */
    char reason[CHANNEL_ERROR_MAX];

    uint64_t closed_bytes;
    struct migrate_progress progress;
    uint64_t began_ms;
};

/* ---- target.c ---- */

/*
 * Lock held: a stream or migrate_target_run() cannot go on. A machine that does not run yet never will, so its loading need not wait for memory.
 */
void target_set_broken(struct migrate_target *t, const char *reason);

/* ---- target_streams.c ---- */

/* Lock held: starts the thread of stream[index], which takes c over. 0 or a negative errno. */
int target_stream_start(struct migrate_target *t, unsigned index, struct channel *c);
/* The streams and the control connection; whatever they are doing. Lock not held. */
void target_close_connections(struct migrate_target *t);

/* ---- target_accept.c ---- */

/* The acceptor's thread; opaque: the target. Ends when the listener is aborted. */
void *target_acceptor_main(void *opaque);
/* Says why a connection ends. */
void target_refuse(struct channel *c, const char *reason);

#endif
