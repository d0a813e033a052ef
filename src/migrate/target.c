/*
 * The target of a migration: see migrate.h and docs/migration.md.
 *
 * Threads: the caller of migrate_target_run() reads the control connection and goes through the stages; an acceptor takes
 * connections, checks whose they are, and answers questions about the owner; each stream has a thread that puts pages into memory.
 * The owner is decided under the lock, once: by COMMIT in one thread or by a question in the other.
 */
#include "migrate/migrate.h"

#include <assert.h>
#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/log.h"
#include "base/thread.h"
#include "base/util.h"
#include "migrate/target_internal.h"

#define DEFAULT_TIMEOUT_MS 10000u
#define DEFAULT_SETTLE_MS 60000u
/* How many times the bound on a transfer the source may be silent: it drains and syncs disks meanwhile. */
#define SILENCES 3

static void report(struct migrate_target *t)
{
    t->progress.elapsed_ms = migrate_now_ms() - t->began_ms;
    if (t->ops->progress)
        t->ops->progress(t->opaque, &t->progress);
}

static void set_stage(struct migrate_target *t, enum migrate_stage stage)
{
    t->progress.stage = stage;
    log_info("migration: %s", migrate_stage_name(stage));
    report(t);
}

void target_set_broken(struct migrate_target *t, const char *reason)
{
    if (!t->broken)
        snprintf(t->reason, sizeof(t->reason), "%s", reason);
    t->broken = true;
    if (t->owner != TARGET_TAKEN && t->postcopy) {
        t->owner = TARGET_GIVEN_UP;
        postcopy_give_up(t->postcopy);
    }
    pthread_cond_broadcast(&t->changed);
}

/* ---- running the machine ---- */

static void *runner_main(void *opaque)
{
    struct migrate_target *t = opaque;

    t->ops->run(t->opaque);
    return NULL;
}

static void join_runner(struct migrate_target *t)
{
    if (t->runner_started)
        pthread_join(t->runner, NULL);
    t->runner_started = false;
}

/* ---- making and ending ---- */

struct migrate_target *migrate_target_create(const struct migrate_target_options *opt, const struct migrate_target_ops *ops,
                                             void *opaque)
{
    struct migrate_target *t = calloc(1, sizeof(*t));
    unsigned timeout = opt->timeout_ms ? opt->timeout_ms : DEFAULT_TIMEOUT_MS;
    char error[CHANNEL_ERROR_MAX] = "out of memory";

    if (!t)
        goto out;
    t->opt = opt;
    t->ops = ops;
    t->opaque = opaque;
    pthread_mutex_init(&t->lock, NULL);
    pthread_cond_init(&t->changed, NULL);
    pthread_rwlock_init(&t->placing, NULL);
    t->channel_options = (struct channel_options){ .connect_ms = MIN(timeout, 3000u), .idle_ms = timeout };
    if (opt->tls_dir) {
        t->channel_options.tls = channel_tls_load(opt->tls_dir, error);
        if (!t->channel_options.tls)
            goto out;
    }
    t->listener = channel_listen(opt->listen, error);
    if (!t->listener)
        goto out;
    /* Signals are for the thread that runs the machine; the acceptor's own threads take after it. */
    if (thread_start(&t->acceptor, 0, target_acceptor_main, t)) {
        snprintf(error, sizeof(error), "cannot start a thread");
        goto out;
    }
    t->acceptor_started = true;
    return t;
out:
    log_error("cannot receive a machine: %s", error);
    migrate_target_free(t);
    return NULL;
}

unsigned migrate_target_port(const struct migrate_target *t) { return channel_listener_port(t->listener); }

static void stop_accepting(struct migrate_target *t)
{
    if (t->acceptor_started) {
        channel_listener_abort(t->listener);
        pthread_join(t->acceptor, NULL);
        t->acceptor_started = false;
    }
    channel_listener_close(t->listener);
    t->listener = NULL;
}

void migrate_target_free(struct migrate_target *t)
{
    if (!t)
        return;
    stop_accepting(t);
    target_close_connections(t);
    channel_close(t->next);
    postcopy_destroy(t->postcopy);
    join_runner(t);
    memory_bitmaps_free(t->missing);
    channel_tls_free(t->channel_options.tls);
    pthread_mutex_destroy(&t->lock);
    pthread_cond_destroy(&t->changed);
    pthread_rwlock_destroy(&t->placing);
    free(t);
}

void migrate_target_cancel(struct migrate_target *t)
{
    atomic_store(&t->cancelled, true);
    pthread_mutex_lock(&t->lock);
    target_set_broken(t, "cancelled");
    if (t->control)
        channel_abort(t->control);
    pthread_cond_broadcast(&t->changed);
    pthread_mutex_unlock(&t->lock);
}

bool migrate_target_take(struct migrate_target *t)
{
    bool taken;

    pthread_mutex_lock(&t->lock);
    taken = t->owner == TARGET_ORPHAN;
    if (taken)
        t->owner = TARGET_TAKEN;
    pthread_cond_broadcast(&t->changed);
    pthread_mutex_unlock(&t->lock);
    return taken;
}

/* ---- the stages ---- */

/*
 * Waits for the acceptor's next control connection. False: cancelled, or until (migrate_now_ms(); 0: no bound) has come, or
 * the source knows all.
 */
static bool next_control(struct migrate_target *t, uint64_t until)
{
    uint64_t now;

    pthread_mutex_lock(&t->lock);
    while (!t->next && !t->known && !atomic_load(&t->cancelled)) {
        struct timespec at;

        if (!until) {
            pthread_cond_wait(&t->changed, &t->lock);
            continue;
        }
        now = migrate_now_ms();
        if (now >= until)
            break;
        clock_gettime(CLOCK_REALTIME, &at);
        at.tv_nsec += (long)((until - now) % 1000) * 1000000;
        at.tv_sec += (time_t)((until - now) / 1000) + at.tv_nsec / 1000000000;
        at.tv_nsec %= 1000000000;
        pthread_cond_timedwait(&t->changed, &t->lock, &at);
    }
    /* Whoever cancels aborts the control connection that there is, so there must not be another one afterwards. */
    if (!atomic_load(&t->cancelled)) {
        t->control = t->next;
        t->next = NULL;
    }
    t->broken = false;
    pthread_mutex_unlock(&t->lock);
    return t->control != NULL;
}

/* The next frame of the control connection. A reason of the streams' is better than one of this connection's. */
static int hear(struct migrate_target *t, struct frame *f, char error[CHANNEL_ERROR_MAX])
{
    int ready = channel_wait(t->control, (int)t->channel_options.idle_ms * SILENCES), err;

    if (ready == 1) {
        err = frame_recv(t->control, f, error);
    } else {
        err = ready == 0 ? -ETIMEDOUT : ready;
        snprintf(error, CHANNEL_ERROR_MAX, "%s", ready == 0 ? "the source has fallen silent" : channel_error(t->control));
    }
    if (!err && f->type == FRAME_REFUSE) {
        snprintf(error, CHANNEL_ERROR_MAX, "the source says: %.480s", (const char *)f->data);
        err = -EACCES;
    }
    if (err) {
        pthread_mutex_lock(&t->lock);
        if (t->broken)
            snprintf(error, CHANNEL_ERROR_MAX, "%s", t->reason);
        pthread_mutex_unlock(&t->lock);
    }
    return err;
}

/* Whether the regions are those of this machine. */
static bool same_memory(const struct memory *m, const json_t *regions)
{
    if (json_array_size(regions) != m->regions)
        return false;
    for (unsigned i = 0; i < m->regions; i++) {
        const json_t *r = json_array_get(regions, i);

        if ((uint64_t)json_integer_value(json_array_get(r, 0)) != m->region[i].base ||
            (uint64_t)json_integer_value(json_array_get(r, 1)) != m->region[i].size)
            return false;
    }
    return true;
}

static int take_offer(struct migrate_target *t, const struct frame *f, char reason[MIGRATE_TEXT])
{
    json_t *o = json_loadb((const char *)f->data, f->length, 0, NULL), *answer;
    json_t *machine = json_object_get(o, "machine");
    json_int_t streams = json_integer_value(json_object_get(o, "streams"));
    char *description = machine ? json_dumps(machine, JSON_COMPACT) : NULL, *text, why[CHANNEL_ERROR_MAX] = "";
    struct memory *memory = NULL;
    bool post_copy;
    int err;

    if (!description || streams < 1 || streams > (json_int_t)MIGRATE_MAX_STREAMS) {
        snprintf(reason, MIGRATE_TEXT, "the offer of a machine is not understood: is the source's ringfort newer?");
        err = -EPROTO;
        goto out;
    }
    set_stage(t, MIGRATE_RESERVATION);
    err = t->ops->prepare(t->opaque, description, strlen(description), &memory, reason);
    if (err)
        goto out;
    if (!same_memory(memory, json_object_get(o, "memory"))) {
        snprintf(reason, MIGRATE_TEXT, "the machine's memory lies elsewhere in this version of ringfort");
        err = -EINVAL;
        goto out;
    }
    err = memory_bitmaps_alloc(memory, t->missing);
    if (err) {
        snprintf(reason, MIGRATE_TEXT, "out of memory");
        goto out;
    }
    pthread_mutex_lock(&t->lock);
    t->memory = memory;
    t->streams = (unsigned)streams;
    t->streams_wanted = true;
    pthread_mutex_unlock(&t->lock);
    t->progress.total_pages = memory_total(memory) >> GUEST_PAGE_SHIFT;
    post_copy = json_is_true(json_object_get(o, "post_copy")) &&
                postcopy_usable(t->ops->in_kernel(t->opaque), why);
    answer = json_pack("{s:b,s:s,s:s}", "post_copy", post_copy, "post_copy_reason", why, "ringfort", RINGFORT_VERSION);
    text = json_dumps(answer, JSON_COMPACT);
    err = text ? frame_send(t->control, FRAME_READY, 0, text, (uint32_t)strlen(text)) : -ENOMEM;
    if (err)
        snprintf(reason, MIGRATE_TEXT, "%s", text ? channel_error(t->control) : "out of memory");
    free(text);
    json_decref(answer);
    if (!err)
        set_stage(t, MIGRATE_PRE_COPY);
out:
    if (err == -EPROTO || !memory)
        err = err ? err : -EINVAL;
    free(description);
    json_decref(o);
    return err;
}

static void take_progress(struct migrate_target *t, const struct frame *f)
{
    json_t *o = json_loadb((const char *)f->data, f->length, 0, NULL);

    t->progress.round = (unsigned)json_integer_value(json_object_get(o, "round"));
    t->progress.left_pages = (uint64_t)json_integer_value(json_object_get(o, "left"));
    t->progress.throttle = (unsigned)json_integer_value(json_object_get(o, "throttle"));
    json_decref(o);
    report(t);
}

static int take_state(struct migrate_target *t, const struct frame *f, char reason[MIGRATE_TEXT])
{
    int err;

    set_stage(t, MIGRATE_STOP_AND_COPY);
    if (memory_bitmaps_count(t->memory, t->missing)) {
        struct postcopy *p;

        pthread_rwlock_wrlock(&t->placing);
        p = postcopy_create(t->memory, t->missing, reason);
        t->postcopy = p;
        pthread_rwlock_unlock(&t->placing);
        if (!p)
            return -ENOSYS;
        pthread_mutex_lock(&t->lock);
        /* The source opened it before it sent the state. */
        if (t->stream[TARGET_URGENT].channel)
            postcopy_connect(p, t->stream[TARGET_URGENT].channel);
        if (t->broken)
            target_set_broken(t, t->reason);
        pthread_mutex_unlock(&t->lock);
    }
    err = t->ops->load(t->opaque, f->data, f->length, reason);
    if (err)
        return err;
    set_stage(t, MIGRATE_COMMITMENT);
    pthread_mutex_lock(&t->lock);
    if (t->owner == TARGET_RECEIVING)
        t->owner = TARGET_PREPARED;
    else
        err = -ECANCELED;
    pthread_mutex_unlock(&t->lock);
    if (err) {
        snprintf(reason, MIGRATE_TEXT, "%s", t->reason);
        return err;
    }
    /* If that does not arrive the machine is complete all the same, and what comes next is the connection's end. */
    frame_send(t->control, FRAME_PREPARED, 0, NULL, 0);
    return 0;
}

/*
 * COMMIT has come, or a person took the machine. 0: it runs. In post-copy its devices may need memory to begin with; when the link
 * breaks just now the source has to be told whose the machine is, and has to be heard when it connects again to send that memory.
 */
static int activate(struct migrate_target *t, char reason[MIGRATE_TEXT])
{
    int err;

    set_stage(t, MIGRATE_ACTIVATION);
    err = t->ops->activate(t->opaque, reason);
    if (!err) {
        atomic_store(&t->activated, true);
        t->runner_started = t->postcopy && pthread_create(&t->runner, NULL, runner_main, t) == 0;
        if (!t->runner_started)
            t->ops->run(t->opaque);
        return 0;
    }
    pthread_mutex_lock(&t->lock);
    /* It does not run, and nobody else was told that it does. */
    t->owner = TARGET_GIVEN_UP;
    pthread_mutex_unlock(&t->lock);
    return err;
}

static int take_commit(struct migrate_target *t, char reason[MIGRATE_TEXT])
{
    uint8_t payload[8];
    int err = 0;

    pthread_mutex_lock(&t->lock);
    if (t->owner == TARGET_PREPARED)
        t->owner = TARGET_TAKEN;
    else
        err = -EPROTO;
    pthread_mutex_unlock(&t->lock);
    if (err) {
        snprintf(reason, MIGRATE_TEXT, "the stream is damaged: commitment before the machine is complete");
        return err;
    }
    err = activate(t, reason);
    if (err)
        return err;
    store_le64(payload, migrate_now_ms() - t->began_ms);
    /* If that does not arrive the source asks. */
    frame_send(t->control, FRAME_RUNNING, 0, payload, 8);
    return 0;
}

/* Until the machine runs, or it is clear that it will not. */
static int receive(struct migrate_target *t, struct frame *f, char reason[MIGRATE_TEXT])
{
    bool told = false;
    int err = 0;

    while (!err) {
        err = hear(t, f, reason);
        if (err)
            break;
        /* What is wrong from here on the source does not know yet. */
        told = true;
        switch (f->type) {
        case FRAME_OFFER:
            if (t->memory)
                goto unexpected;
            err = take_offer(t, f, reason);
            break;
        case FRAME_PROGRESS:
            take_progress(t, f);
            break;
        case FRAME_MISSING:
            if (!t->memory || t->owner != TARGET_RECEIVING)
                goto unexpected;
            err = missing_take(f, t->memory, t->missing, reason);
            break;
        case FRAME_STATE:
            if (!t->memory || t->owner != TARGET_RECEIVING)
                goto unexpected;
            err = take_state(t, f, reason);
            break;
        case FRAME_COMMIT:
            err = take_commit(t, reason);
            if (!err)
                return 0;
            break;
        default:
        unexpected:
            snprintf(reason, MIGRATE_TEXT, "the stream is damaged: '%s' where it cannot be", frame_name(f->type));
            err = -EPROTO;
        }
        if (!err)
            told = false;
    }
    if (told && t->control) {
        /* The source goes on with the machine when it hears this. (TARGET_TAKEN is left by activate() when that fails.) */
        pthread_mutex_lock(&t->lock);
        assert(t->owner != TARGET_TAKEN);
        t->owner = TARGET_GIVEN_UP;
        pthread_mutex_unlock(&t->lock);
        target_refuse(t->control, reason);
    }
    return err;
}

/* The link broke when all was here and COMMIT was not. True: a person took it. */
static bool wait_as_orphan(struct migrate_target *t, char reason[MIGRATE_TEXT])
{
    bool complete, taken;

    pthread_mutex_lock(&t->lock);
    /* In post-copy it is not complete, and was given up with the streams. */
    complete = t->owner == TARGET_PREPARED;
    pthread_mutex_unlock(&t->lock);
    if (!complete)
        return false;
    log_error("migration: the source is gone (%s) after the machine was complete here and before it was handed over. It is kept, paused. If the source does not run it any more: `ringfort resume` it here; else `ringfort stop --force` it here",
              reason);
    t->ops->orphan(t->opaque);
    set_stage(t, MIGRATE_UNKNOWN);
    pthread_mutex_lock(&t->lock);
    if (t->owner == TARGET_PREPARED)
        t->owner = TARGET_ORPHAN;
    while (t->owner == TARGET_ORPHAN && !atomic_load(&t->cancelled))
        pthread_cond_wait(&t->changed, &t->lock);
    taken = t->owner == TARGET_TAKEN;
    if (t->owner == TARGET_GIVEN_UP)
        snprintf(reason, MIGRATE_TEXT, "the source goes on with the machine");
    if (!taken)
        t->owner = TARGET_GIVEN_UP;
    pthread_mutex_unlock(&t->lock);
    return taken;
}

/* Post-copy: the link broke. 0: the source is there again, or nothing is missing (then t->control may be NULL). */
static int reconnect(struct migrate_target *t, const char *reason)
{
    for (;;) {
        /* The threads of the streams still take what had arrived, and that can be the last of it. */
        target_close_connections(t);
        t->progress.left_pages = postcopy_missing(t->postcopy);
        if (!t->progress.left_pages)
            return 0;
        if (atomic_load(&t->cancelled))
            return -ECANCELED;
        log_warn("migration: the connection failed (%s) with %llu pages of memory still at the source; the guest waits for those that it needs, until the source connects again",
                 reason, (unsigned long long)t->progress.left_pages);
        if (!next_control(t, 0))
            return -ECANCELED;
        reason = "again";
        if (missing_send(t->control, t->memory, postcopy_bitmaps(t->postcopy)))
            continue;
        pthread_mutex_lock(&t->lock);
        t->streams_wanted = true;
        pthread_mutex_unlock(&t->lock);
        if (frame_send(t->control, FRAME_READY, 0, "{}", 2) == 0) {
            log_warn("migration: the source is there again");
            return 0;
        }
    }
}

/* Post-copy: until all memory is here, through as many connections as that takes. */
static int receive_rest(struct migrate_target *t, struct frame *f, char reason[MIGRATE_TEXT])
{
    int err;

    set_stage(t, MIGRATE_POST_COPYING);
    do {
        int ready = t->control ? channel_wait(t->control, 100) : 0;

        t->progress.left_pages = postcopy_missing(t->postcopy);
        report(t);
        if (!t->progress.left_pages) {
            if (t->control)
                frame_send(t->control, FRAME_COMPLETE, 0, NULL, 0);
            return 0;
        }
        err = ready > 0 ? hear(t, f, reason) : ready;
        if (!err && ready > 0 && f->type == FRAME_PROGRESS)
            take_progress(t, f);
        if (!err)
            continue;
        pthread_mutex_lock(&t->lock);
        snprintf(reason, MIGRATE_TEXT, "%s", t->broken ? t->reason : channel_error(t->control));
        pthread_mutex_unlock(&t->lock);
        err = reconnect(t, reason);
    } while (!err);
    return err;
}

/*
 * Until the source says that it knows (COMPLETE), as it ends then: it may still ask whose the machine is, or connect again because
 * it missed that all memory is here.
 */
static void wait_until_known(struct migrate_target *t, struct frame *f)
{
    uint64_t until = migrate_now_ms() + (t->opt->settle_ms ? t->opt->settle_ms : DEFAULT_SETTLE_MS);
    char error[CHANNEL_ERROR_MAX];

    do {
        while (t->control && !atomic_load(&t->cancelled) && hear(t, f, error) == 0)
            if (f->type == FRAME_COMPLETE)
                return;
        target_close_connections(t);
        if (next_control(t, until))
            frame_send(t->control, FRAME_COMPLETE, 0, NULL, 0);
    } while (t->control);
}

enum migrate_stage migrate_target_run(struct migrate_target *t, struct migrate_result *result)
{
    char reason[MAX(MIGRATE_TEXT, CHANNEL_ERROR_MAX)] = "cancelled";
    enum migrate_stage end = MIGRATE_FAILED;
    struct frame f = { 0 };
    int err = -ECANCELED;
    bool prepared;

    *result = (struct migrate_result){ 0 };
    if (next_control(t, 0)) {
        t->began_ms = migrate_now_ms();
        set_stage(t, MIGRATE_CHECKS);
        err = receive(t, &f, reason);
    }
    pthread_mutex_lock(&t->lock);
    prepared = t->owner == TARGET_PREPARED;
    pthread_mutex_unlock(&t->lock);
    if (err && prepared && err != -EACCES && !atomic_load(&t->cancelled)) {
        target_close_connections(t);
        err = wait_as_orphan(t, reason) ? activate(t, reason) : err;
    }
    if (!err) {
        end = MIGRATE_DONE;
        if (t->postcopy && receive_rest(t, &f, reason))
            end = MIGRATE_LOST;
    } else {
        pthread_mutex_lock(&t->lock);
        if (t->owner != TARGET_NOTHING)
            t->owner = TARGET_GIVEN_UP;
        pthread_mutex_unlock(&t->lock);
        t->ops->abandon(t->opaque);
    }
    if (end == MIGRATE_DONE) {
        set_stage(t, MIGRATE_DONE);
        /* A person who took an orphan knows. */
        if (t->control || t->postcopy)
            wait_until_known(t, &f);
    }
    target_close_connections(t);
    stop_accepting(t);
    if (end == MIGRATE_FAILED)
        log_error("migration: the machine was not received: %s; it is still the source's", reason);
    else if (end == MIGRATE_LOST)
        log_error("migration: the machine cannot go on: the rest of its memory will not come: %s", reason);
    result->end = end;
    if (end != MIGRATE_DONE)
        snprintf(result->reason, sizeof(result->reason), "%s", reason);
    result->post_copy = t->postcopy != NULL;
    if (t->postcopy)
        result->pages_requested = postcopy_requested(t->postcopy);
    result->total_ms = t->began_ms ? migrate_now_ms() - t->began_ms : 0;
    result->bytes = t->closed_bytes;
    t->progress.stage = end;
    report(t);
    if (end == MIGRATE_DONE) {
        join_runner(t);
        postcopy_destroy(t->postcopy);
        t->postcopy = NULL;
    }
    frame_free(&f);
    return end;
}
