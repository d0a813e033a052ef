/*
 * Live migration: one machine moves from this process to another one while it runs. docs/migration.md has the protocol, the
 * stages and what happens when either side or the link dies in each.
 *
 * This folder knows memory and connections, and of the machine only the functions that it is given, so that all of it can be
 * tested with machines that are a few lines of C. Each side runs in a thread of its own, without the machine lock.
 *
 * The rule about ownership. The source owns the machine until it begins to send COMMIT; from then on it does not run
 * it unless the target itself answers that it has not taken it (and then never will). The target runs it only
 * after COMMIT. Who cannot know stays paused and says by which command a person decides.
 */
#ifndef RINGFORT_MIGRATE_MIGRATE_H
#define RINGFORT_MIGRATE_MIGRATE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "memory/memory.h"

#define MIGRATE_VERSION 1u
#define MIGRATE_MAX_STREAMS 16u
#define MIGRATE_TEXT 512u
#define MIGRATE_MAX_DISKS 32u
#define MIGRATE_DISK_GRANULE 65536u     /* bytes in which writes to disks are noted */

enum migrate_post_copy { MIGRATE_POST_COPY_NEVER, MIGRATE_POST_COPY_AUTO, MIGRATE_POST_COPY_NOW };

/* Where a migration is. The words of migrate_stage_name() are a contract with scripts. */
enum migrate_stage {
    MIGRATE_CHECKS,         /* "checks": versions, CPU model, devices, disks, memory */
    MIGRATE_RESERVATION,    /* "reservation": the target makes the machine */
    MIGRATE_PRE_COPY,       /* "pre-copy" */
    MIGRATE_STOP_AND_COPY,  /* "stop-and-copy": the guest stands still */
    MIGRATE_COMMITMENT,     /* "commitment": the machine changes hands */
    MIGRATE_ACTIVATION,     /* "activation": the target runs it */
    MIGRATE_POST_COPYING,   /* "post-copy": the target runs it, memory follows */
    MIGRATE_DONE,           /* "done" */
    MIGRATE_FAILED,         /* "failed": the source has it, as before */
    MIGRATE_UNKNOWN,        /* "unknown": paused here, because the target may have it */
    MIGRATE_LOST,           /* "lost": target, the machine cannot run: memory is missing */
};
const char *migrate_stage_name(enum migrate_stage s);

struct migrate_progress {
    enum migrate_stage stage;
    unsigned round;             /* of pre-copy, from 1 */
    uint64_t bytes;             /* sent or received so far, all connections */
    uint64_t total_pages;       /* of the machine's memory */
    uint64_t left_pages;        /* still to send in this round; post-copy: not there yet */
    uint64_t dirty_rate;        /* bytes per second that the guest dirties */
    uint64_t rate;              /* bytes of memory per second that get through */
    uint64_t estimate_ms;       /* pre-copy: how long the guest would stand still now */
    unsigned throttle;          /* percent of the vCPUs' time taken away */
    uint64_t elapsed_ms;
};

struct migrate_result {
    enum migrate_stage end;     /* DONE, FAILED, UNKNOWN, LOST */
    char reason[MIGRATE_TEXT];  /* empty after DONE */
    uint64_t downtime_ms, total_ms, bytes;
    unsigned rounds;
    uint64_t disk_bytes;        /* of disks that were copied: what is not zero, as often as it was sent */
    uint64_t pages_sent, pages_zero, pages_skipped, pages_requested;
    bool post_copy;
};

/* ---- source ---- */

/* Disks that are copied to the target while the machine goes on. Bitmaps have a bit for each MIGRATE_DISK_GRANULE bytes. */
struct migrate_disks {
    unsigned count;             /* at most MIGRATE_MAX_DISKS */
    uint64_t size[MIGRATE_MAX_DISKS];
    void *opaque;
    /* From here on writes are noted. 0 or a negative errno (logged). */
    int (*start)(void *opaque);
    void (*stop)(void *opaque);
    /* Sets the bits of what may be other than zero. */
    void (*contents)(void *opaque, unsigned disk, uint64_t *bitmap);
    /* Sets the bits of what was written since it was asked last. Complete while the machine stands still. */
    void (*written)(void *opaque, unsigned disk, uint64_t *bitmap);
    /* Any thread, while the guest writes: such a part is noted as written afterwards. 0 or a negative errno. */
    int (*read)(void *opaque, unsigned disk, uint64_t offset, void *buf, size_t len);
};

struct migrate_source_options {
    const char *name;           /* of the machine */
    const char *to;             /* address; channel.h */
    const char *tls_dir;        /* NULL: in clear */
    uint64_t downtime_ms;       /* wanted at most */
    uint64_t bandwidth;         /* bytes per second; 0: no limit */
    unsigned streams;           /* 1…MIGRATE_MAX_STREAMS */
    bool compress;
    enum migrate_post_copy post_copy;
    const struct migrate_disks *disks;  /* NULL: none; both sides see the same */
    unsigned timeout_ms;        /* how long silence or an unreachable target is borne; 0: 10 s */
    unsigned settle_ms;         /* how long the target is asked who owns the machine, after COMMIT; 0: 30 s */
};

/* The machine to send. Calls come from migrate_source_run()'s thread, one at a time. */
struct migrate_source_ops {
    /* JSON that the target makes the machine from and checks itself against; malloc'ed. NULL: logged. */
    char *(*describe)(void *opaque);
    /* After its 0 nothing changes memory or state, until resume. May be called again when it is paused. */
    int (*pause)(void *opaque);
    int (*resume)(void *opaque);
    /* Everything but memory, malloc'ed. While paused. 0 or a negative errno (logged). */
    int (*save)(void *opaque, void **data, size_t *len);
    /* What both sides may not have at once (locks on disks): given up after save, taken back before resume. */
    void (*release)(void *opaque);
    int (*reclaim)(void *opaque);
    /* Percent of the vCPUs' time to take away; 0: none. */
    void (*throttle)(void *opaque, unsigned percent);
    void (*progress)(void *opaque, const struct migrate_progress *p);
};

struct migrate_source;

/* options and ops are borrowed. NULL: out of memory (logged). */
struct migrate_source *migrate_source_create(const struct migrate_source_options *opt, const struct migrate_source_ops *ops,
                                             void *opaque, struct memory *memory);
void migrate_source_free(struct migrate_source *s);
/*
 * Does it. Returns result->end. Afterwards: DONE: the machine runs elsewhere, and here it is paused for good. FAILED: it is as it was before,
 * running if it ran. UNKNOWN: paused, and only a person may resume it. One line is logged for all but DONE.
 */
enum migrate_stage migrate_source_run(struct migrate_source *s, struct migrate_result *result);
/*
 * Any thread: give up, if the machine is still the source's; false: it is changing hands already. force: in any case, since this
 * process ends: a machine that the target runs without all of its memory is lost then.
 */
bool migrate_source_cancel(struct migrate_source *s, bool force);

/* ---- target ---- */

struct migrate_target_options {
    const char *listen;
    const char *tls_dir;
    unsigned timeout_ms;        /* 0: 10 s */
    unsigned settle_ms;         /* how long it listens for the source's question after it has taken the machine; 0: 60 s */
};

/* The machine to receive. Calls come from migrate_target_run()'s thread, one at a time. */
struct migrate_target_ops {
    /*
     * Makes the machine, paused, its memory all zero. 0, or a negative errno with the reason in words for both sides (not
     * logged). *memory: NULL: there is none.
     */
    int (*prepare)(void *opaque, const char *description, size_t len, struct memory **memory, char reason[MIGRATE_TEXT]);
    /* Whether the kernel runs vCPUs (KVM): what that means for post-copy, postcopy.h has. After prepare. */
    bool (*in_kernel)(void *opaque);
    /* Memory is there (post-copy: comes when touched). Takes locks, loads the state; does not run. Errors as prepare. */
    int (*load)(void *opaque, const void *data, size_t len, char reason[MIGRATE_TEXT]);
    /* All that may fail before it runs. Its owner from the call on, unless that fails. */
    int (*activate)(void *opaque, char reason[MIGRATE_TEXT]);
    /* Runs it, and announces it to the network. In post-copy it may wait for memory, and so is in a thread of its own. */
    void (*run)(void *opaque);
    /* The source keeps it: what prepare and load did is undone as far as others could notice. */
    void (*abandon)(void *opaque);
    /*
     * The link broke between PREPARED and COMMIT: the machine stays, paused, and a person may say by migrate_target_take() that it is
     * the target's. Locks are given up meanwhile, and activate takes them again.
     */
    void (*orphan)(void *opaque);
    void (*progress)(void *opaque, const struct migrate_progress *p);
    /*
     * Disks that come along, all zero at first. After prepare, any thread, several at a time; len bytes at a multiple of
     * MIGRATE_DISK_GRANULE, buf NULL for zeroes. 0, -EPROTO: there is no such place, or another negative errno. disk_sync: what was
     * written is on the host's disk.
     */
    int (*disk_write)(void *opaque, unsigned disk, uint64_t offset, const void *buf, size_t len);
    int (*disk_sync)(void *opaque);
};

struct migrate_target;

/* Listens from here on. NULL (logged): the address is not usable, or the certificates. */
struct migrate_target *migrate_target_create(const struct migrate_target_options *opt, const struct migrate_target_ops *ops,
                                             void *opaque);
void migrate_target_free(struct migrate_target *t);
unsigned migrate_target_port(const struct migrate_target *t);
/*
 * Waits for a source and receives its machine. Strangers and the like are logged and forgotten. Returns when it is clear
 * how it ends: DONE: the machine runs here, with all of its memory. FAILED: abandoned, the source has it. LOST: it ran here, and
 * the rest of its memory will not come. One line is logged for all but DONE. An orphan (see ops) waits in here
 * until it is taken, the source answers for it, or cancel.
 */
enum migrate_stage migrate_target_run(struct migrate_target *t, struct migrate_result *result);
/* Any thread: end as soon as may be. A machine that runs here already, but with memory missing, is lost. */
void migrate_target_cancel(struct migrate_target *t);
/* Any thread. True: it was an orphan and is activated now. */
bool migrate_target_take(struct migrate_target *t);

#endif
