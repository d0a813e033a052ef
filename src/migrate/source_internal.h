/*
 * The source's parts among each other: source.c (the stages, and who owns the machine), source_copy.c (copying while the guest runs),
 * source_postcopy.c (copying while it runs there), source_streams.c (the connections that carry pages).
 */
#ifndef RINGFORT_MIGRATE_SOURCE_INTERNAL_H
#define RINGFORT_MIGRATE_SOURCE_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>

#include "migrate/disks.h"
#include "migrate/limit.h"
#include "migrate/migrate.h"
#include "migrate/pages.h"
#include "migrate/protocol.h"

struct migrate_source;

struct source_stream {
    struct migrate_source *source;
    unsigned index;
    pthread_t thread;
    bool started;
    struct channel *channel;
    struct page_encoder *encoder;
    struct disk_encoder *disk_encoder;          /* NULL: no disks */
};

struct migrate_source {
    const struct migrate_source_options *opt;
    const struct migrate_source_ops *ops;
    void *opaque;
    struct memory *memory;
    struct channel_options channel_options;
    struct hello hello;
    struct page_hashes hashes;
    uint64_t *todo[MEMORY_MAX_REGIONS];         /* this round's pages; streams clear them by atomic operations */
    uint64_t *disk_todo[MIGRATE_MAX_DISKS];     /* the same of disks */
    bool only_disks;                            /* this round */
    bool fresh;                                 /* the target has nothing of the disks yet */
    bool disks_logged;                          /* their log is ours to stop */
    struct limit limit;

    /* Guarded by lock. */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct channel *control;                    /* NULL: none, for cancelling */
    struct source_stream stream[MIGRATE_MAX_STREAMS];
    unsigned streams;
    uint64_t round;                             /* number of the round to send; streams wait for it to change */
    unsigned working;                           /* streams that have not finished it */
    bool streams_end;
    bool broken;                                /* a stream failed */
    char broken_reason[CHANNEL_ERROR_MAX];      /* why */

    char reason[CHANNEL_ERROR_MAX];             /* why the migration fails; the migration's thread alone */

    /* Post-copy: the connection for pages that the guest waits for. */
    struct channel *urgent;
    pthread_t urgent_thread;
    bool urgent_started;
    _Atomic uint64_t requested;

    _Atomic bool cancelled;                     /* by a person */
    _Atomic bool stop;                          /* streams give up */
    _Atomic uint64_t handled;                   /* pages of this round that are done, and DISK_PAGES for each granule of a disk */
    _Atomic uint64_t disk_bytes;
    uint64_t closed_bytes;                      /* of connections that are closed */

    struct migrate_progress progress;
    struct migrate_result *result;
    uint64_t began_ms, stopped_ms;              /* of the migration; of the guest's standing still */
    uint64_t said_ms;                           /* when progress was sent last */
    bool logging;                               /* dirty logging is ours to stop */
};

/* ---- source.c: the migration's thread ---- */

void source_report(struct migrate_source *s);
void source_set_stage(struct migrate_source *s, enum migrate_stage stage);
/* Notes why the migration fails, if nothing is noted yet. Gives err. */
int source_because(struct migrate_source *s, int err, const char *reason);
void source_nap(unsigned ms);
/* 0 or a negative errno with s->reason. */
int source_control_send(struct migrate_source *s, unsigned type, const void *data, uint32_t length);
/* Against the silence that the target bears only so long; nothing when it was said lately. As source_control_send(). */
int source_send_progress(struct migrate_source *s);
/* Something that the target says unasked is a reason to stop; asks for it where a connection broke. */
void source_hear_reason(struct migrate_source *s);
void source_control_close(struct migrate_source *s);

/* ---- source_copy.c ---- */

/* Disks that come along, in rounds as long as these become shorter. 0 or a negative errno with s->reason. */
int source_copy_disks(struct migrate_source *s);
/* Rounds of memory. Ends with todo holding what the last fetch found, the guest running. As above; *post_copy: how to go on. */
int source_pre_copy(struct migrate_source *s, bool can_post_copy, bool *post_copy);
/* Sends what is in todo: so many pages. As above. */
int source_send_round(struct migrate_source *s, uint64_t pages);
/* Adds what was written since to todo; *pages: what is in there. As above. */
int source_fetch(struct migrate_source *s, uint64_t *pages);
/* What is in todo of disks, in pages. */
uint64_t source_disk_pages(const struct migrate_source *s);

/* ---- source_postcopy.c ---- */

/* Until the target has all of the memory: MIGRATE_DONE, or MIGRATE_LOST. */
enum migrate_stage source_post_copy_rest(struct migrate_source *s);

/* ---- source_streams.c ---- */

/* Connects with a hello of this kind. 0 or a negative errno with reason. */
int source_connect(struct migrate_source *s, unsigned kind, unsigned index, struct channel **out, char reason[CHANNEL_ERROR_MAX]);

/* Opens opt->streams connections and starts their threads. 0 or a negative errno with s->reason. */
int source_streams_open(struct migrate_source *s);
/* Has them send what is in s->todo, with hashes or not, and return at once. */
void source_streams_begin(struct migrate_source *s);
/* Waits at most ms: 1: all of it has arrived; 0: not yet; negative: a stream failed (s->reason). */
int source_streams_wait(struct migrate_source *s, unsigned ms);
/* From now on pages are sent whether the target has them or not. Between rounds. -ENOMEM. */
int source_streams_forget(struct migrate_source *s);
/* Ends threads and connections, also the urgent one; whatever they are doing. */
void source_streams_close(struct migrate_source *s);
/* Post-copy: opens the urgent connection and serves its requests in a thread. */
int source_urgent_open(struct migrate_source *s);
/* All bytes so far. */
uint64_t source_bytes(struct migrate_source *s);

#endif
