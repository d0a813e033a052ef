/*
 * The source of a migration: the stages, and who owns the machine in each. See migrate.h and docs/migration.md.
 *
 * Everything up to the first byte of COMMIT can be taken back: give_back() makes the machine what it was. From then on settle()
 * alone decides, by asking the target.
 */
#include "migrate/migrate.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

#include "base/log.h"
#include "base/util.h"
#include "migrate/source_internal.h"

#define DEFAULT_TIMEOUT_MS 10000u
#define DEFAULT_SETTLE_MS 30000u
/* How long the target may take to make the machine. */
#define PATIENCE_MS 120000u

/* ---- what is shared ---- */

const char *migrate_stage_name(enum migrate_stage s)
{
    static const char *const names[] = { "checks", "reservation", "pre-copy", "stop-and-copy", "commitment", "activation",
                                         "post-copy", "done", "failed", "unknown", "lost" };

    return s < ARRAY_SIZE(names) ? names[s] : "?";
}

struct migrate_source *migrate_source_create(const struct migrate_source_options *opt, const struct migrate_source_ops *ops,
                                             void *opaque, struct memory *memory)
{
    struct migrate_source *s = calloc(1, sizeof(*s));

    if (!s) {
        log_error("out of memory");
        return NULL;
    }
    s->opt = opt;
    s->ops = ops;
    s->opaque = opaque;
    s->memory = memory;
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->changed, NULL);
    limit_init(&s->limit, opt->bandwidth);
    return s;
}

void migrate_source_free(struct migrate_source *s)
{
    if (!s)
        return;
    limit_destroy(&s->limit);
    pthread_mutex_destroy(&s->lock);
    pthread_cond_destroy(&s->changed);
    free(s);
}

bool migrate_source_cancel(struct migrate_source *s, bool force)
{
    bool early;

    pthread_mutex_lock(&s->lock);
    /* Once the machine changes hands there is nothing to cancel: an abort would only hide the answer. */
    early = s->progress.stage < MIGRATE_COMMITMENT;
    if (early || force) {
        atomic_store(&s->cancelled, true);
        atomic_store(&s->stop, true);
        if (s->control)
            channel_abort(s->control);
        pthread_cond_broadcast(&s->changed);
    }
    pthread_mutex_unlock(&s->lock);
    return early || force;
}

void source_report(struct migrate_source *s)
{
    s->progress.bytes = source_bytes(s);
    s->progress.elapsed_ms = migrate_now_ms() - s->began_ms;
    if (s->ops->progress)
        s->ops->progress(s->opaque, &s->progress);
}

void source_set_stage(struct migrate_source *s, enum migrate_stage stage)
{
    pthread_mutex_lock(&s->lock);
    s->progress.stage = stage;
    pthread_mutex_unlock(&s->lock);
    log_info("migration: %s", migrate_stage_name(stage));
    source_report(s);
}

int source_because(struct migrate_source *s, int err, const char *reason)
{
    if (!s->reason[0])
        snprintf(s->reason, sizeof(s->reason), "%s", reason);
    return err;
}

/* ---- the control connection ---- */

/* Taken away before it is closed: whoever cancels aborts what is there. */
void source_control_close(struct migrate_source *s)
{
    struct channel *c;

    pthread_mutex_lock(&s->lock);
    c = s->control;
    s->control = NULL;
    if (c)
        s->closed_bytes += channel_bytes(c);
    pthread_mutex_unlock(&s->lock);
    channel_close(c);
}

int source_control_send(struct migrate_source *s, unsigned type, const void *data, uint32_t length)
{
    int err = frame_send(s->control, type, 0, data, length);

    return err ? source_because(s, err, channel_error(s->control)) : 0;
}

/* Something that the target says unasked is a reason to stop; ask for it where a connection broke. */
void source_hear_reason(struct migrate_source *s)
{
    char error[CHANNEL_ERROR_MAX];
    struct frame f = { 0 };

    if (s->control && channel_wait(s->control, 1000) == 1 && frame_recv(s->control, &f, error) == 0 && f.type == FRAME_REFUSE)
        snprintf(s->reason, sizeof(s->reason), "the target says: %.480s", (const char *)f.data);
    frame_free(&f);
}

/* Waits for a frame of this type. */
static int expect(struct migrate_source *s, unsigned type, struct frame *f, unsigned patience_ms)
{
    char error[CHANNEL_ERROR_MAX];
    uint64_t until = migrate_now_ms() + patience_ms;
    int ready, err;

    do {
        ready = channel_wait(s->control, 100);
        source_report(s);
    } while (ready == 0 && migrate_now_ms() < until);
    if (ready == 0)
        return source_because(s, -ETIMEDOUT, "the target does not answer");
    if (ready < 0)
        return source_because(s, ready, channel_error(s->control));
    err = frame_recv(s->control, f, error);
    if (err)
        return source_because(s, err, error);
    if (f->type == FRAME_REFUSE) {
        snprintf(s->reason, sizeof(s->reason), "the target refuses: %.480s", (const char *)f->data);
        return -EACCES;
    }
    if (f->type != type)
        return source_because(s, -EPROTO, "the target answers something else than was asked");
    return 0;
}

/* Also against the silence that the target bears only so long; nothing when it was said lately. */
int source_send_progress(struct migrate_source *s)
{
    const struct migrate_progress *p = &s->progress;
    uint64_t now = migrate_now_ms();
    char text[256];

    if (now - s->said_ms < s->channel_options.idle_ms / 8)
        return 0;
    s->said_ms = now;
    int n = snprintf(text, sizeof(text), "{\"stage\":\"%s\",\"round\":%u,\"left\":%llu,\"total\":%llu,\"throttle\":%u}",
                     migrate_stage_name(p->stage), p->round, (unsigned long long)p->left_pages,
                     (unsigned long long)p->total_pages, p->throttle);

    return source_control_send(s, FRAME_PROGRESS, text, (uint32_t)n);
}

/* ---- checks and reservation ---- */

static int offer(struct migrate_source *s, bool *post_copy)
{
    char *description = s->ops->describe(s->opaque);
    json_t *machine = description ? json_loads(description, 0, NULL) : NULL;
    json_t *regions = json_array(), *answer, *o;
    struct frame f = { 0 };
    char *text = NULL;
    int err = -ENOMEM;

    for (unsigned i = 0; i < s->memory->regions; i++)
        json_array_append_new(regions, json_pack("[I,I]", (json_int_t)s->memory->region[i].base, (json_int_t)s->memory->region[i].size));
    o = machine ? json_pack("{s:s,s:s,s:O,s:o,s:i,s:b}", "name", s->opt->name, "ringfort", RINGFORT_VERSION, "machine", machine,
                            "memory", regions, "streams", (int)s->opt->streams, "post_copy",
                            s->opt->post_copy != MIGRATE_POST_COPY_NEVER)
                : NULL;
    text = o ? json_dumps(o, JSON_COMPACT) : NULL;
    if (text) {
        source_set_stage(s, MIGRATE_RESERVATION);
        err = source_control_send(s, FRAME_OFFER, text, (uint32_t)strlen(text));
    } else {
        source_because(s, err, "the machine cannot be described");
    }
    if (!err)
        err = expect(s, FRAME_READY, &f, PATIENCE_MS);
    if (!err) {
        answer = json_loadb((const char *)f.data, f.length, 0, NULL);
        *post_copy = json_is_true(json_object_get(answer, "post_copy"));
        if (!*post_copy && s->opt->post_copy == MIGRATE_POST_COPY_NOW) {
            const char *why = json_string_value(json_object_get(answer, "post_copy_reason"));

            err = source_because(s, -ENOSYS, why ? why : "the target cannot do post-copy");
        }
        json_decref(answer);
    }
    frame_free(&f);
    free(text);
    free(description);
    json_decref(o);
    json_decref(machine);
    return err;
}

/* ---- stop-and-copy ---- */

static int send_state(struct migrate_source *s)
{
    void *data = NULL;
    size_t len = 0;
    int err = s->ops->save(s->opaque, &data, &len);

    if (err)
        source_because(s, err, "the machine's state cannot be saved");
    else if (len > frame_limit(FRAME_STATE))
        err = source_because(s, -EFBIG, "the machine's state is too big to be sent");
    if (!err) {
        s->ops->release(s->opaque);
        err = source_control_send(s, FRAME_STATE, data, (uint32_t)len);
    }
    free(data);
    return err;
}

static int stop_and_copy(struct migrate_source *s, bool post_copy)
{
    struct frame f = { 0 };
    uint64_t pages;
    int err;

    source_set_stage(s, MIGRATE_STOP_AND_COPY);
    err = s->ops->pause(s->opaque);
    if (err)
        return source_because(s, err, "the machine cannot be stopped");
    err = source_fetch(s, &pages);
    /* Disks have to be complete in any case. */
    if (!err && post_copy && source_disk_pages(s)) {
        s->only_disks = true;
        err = source_send_round(s, source_disk_pages(s));
        s->only_disks = false;
    }
    if (!err && post_copy) {
        err = missing_send(s->control, s->memory, s->todo);
        if (err)
            source_because(s, err, channel_error(s->control));
        /* The streams' connections are for later; the urgent one has to be there before the target loads the state. */
        if (!err)
            err = source_streams_forget(s);
        if (!err)
            err = source_urgent_open(s);
    } else if (!err) {
        err = source_send_round(s, pages);
    }
    if (!err)
        err = send_state(s);
    if (!err) {
        source_set_stage(s, MIGRATE_COMMITMENT);
        err = expect(s, FRAME_PREPARED, &f, s->channel_options.idle_ms);
    }
    frame_free(&f);
    return err;
}

/* ---- who owns it ---- */

/* Asks the target once: an enum owner, or a negative errno. */
static int ask_owner(struct migrate_source *s)
{
    struct channel_options usual = s->channel_options;
    char reason[CHANNEL_ERROR_MAX];
    struct channel *c;
    struct frame f = { 0 };
    int ret;

    /* The guest stands still meanwhile. */
    s->channel_options.connect_ms = MIN(usual.connect_ms, 1000u);
    s->channel_options.idle_ms = MIN(usual.idle_ms, 2000u);
    ret = source_connect(s, HELLO_QUERY, 0, &c, reason);
    s->channel_options = usual;
    if (ret)
        return ret;
    ret = frame_recv(c, &f, reason);
    if (!ret)
        ret = f.type == FRAME_STATUS && f.length == 4 && load_le32(f.data) >= OWNER_SOURCE && load_le32(f.data) <= OWNER_TARGET
                  ? (int)load_le32(f.data)
                  : -EPROTO;
    /* So that it need not expect more questions: it would not know that its answer came too late. */
    if (ret == OWNER_TARGET)
        frame_send(c, FRAME_COMPLETE, 0, NULL, 0);
    frame_free(&f);
    channel_close(c);
    return ret;
}

void source_nap(unsigned ms) { nanosleep(&(struct timespec){ .tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * 1000000 }, NULL); }

/* COMMIT may or may not have arrived. */
static enum migrate_stage settle(struct migrate_source *s)
{
    uint64_t until = migrate_now_ms() + (s->opt->settle_ms ? s->opt->settle_ms : DEFAULT_SETTLE_MS);

    do {
        int owner = ask_owner(s);

        if (owner == OWNER_TARGET)
            return MIGRATE_DONE;
        if (owner == OWNER_SOURCE)
            return MIGRATE_FAILED;
        source_nap(200);
    } while (migrate_now_ms() < until && !atomic_load(&s->cancelled));
    return MIGRATE_UNKNOWN;
}

/* Makes the machine what it was before. Ownership is the source's. */
static enum migrate_stage give_back(struct migrate_source *s, bool paused, bool told)
{
    uint64_t until = migrate_now_ms() + (s->opt->timeout_ms ? s->opt->timeout_ms : DEFAULT_TIMEOUT_MS);
    int err = 0;

    /* A target that has the state may hold the disks' locks, and may be told by a person to run the machine. */
    if (told) {
        source_streams_close(s);
        source_control_close(s);
        for (unsigned tries = 0; tries < 3 && ask_owner(s) < 0; tries++)
            source_nap(100);
    }
    if (paused) {
        while ((err = s->ops->reclaim(s->opaque)) && migrate_now_ms() < until)
            source_nap(200);
        if (err) {
            log_error("migration of %s: the target still holds the machine's disks; it stays paused here: end the target, then `ringfort resume %s`",
                      s->opt->name, s->opt->name);
            return MIGRATE_UNKNOWN;
        }
        s->ops->resume(s->opaque);
    }
    if (s->progress.throttle && s->ops->throttle)
        s->ops->throttle(s->opaque, 0);
    return MIGRATE_FAILED;
}

/* ---- all of it ---- */

static int hand_over(struct migrate_source *s)
{
    struct frame f = { 0 };
    int err;

    source_set_stage(s, MIGRATE_ACTIVATION);
    err = source_control_send(s, FRAME_COMMIT, NULL, 0);
    if (!err)
        err = expect(s, FRAME_RUNNING, &f, s->channel_options.idle_ms);
    if (!err)
        s->result->downtime_ms = migrate_now_ms() - s->stopped_ms;
    frame_free(&f);
    return err;
}

static int run(struct migrate_source *s, bool *paused, bool *told, bool *given, bool *post_copy)
{
    bool can_post_copy = false;
    struct channel *c;
    int err;

    source_set_stage(s, MIGRATE_CHECKS);
    err = source_connect(s, HELLO_CONTROL, 0, &c, s->reason);
    if (err)
        return err;
    pthread_mutex_lock(&s->lock);
    s->control = c;
    pthread_mutex_unlock(&s->lock);
    err = offer(s, &can_post_copy);
    if (!err)
        err = source_streams_open(s);
    if (err)
        return err;
    source_set_stage(s, MIGRATE_PRE_COPY);
    err = source_copy_disks(s);
    if (err)
        return err;
    err = memory_dirty_start(s->memory);
    s->logging = !err;
    if (err)
        return source_because(s, err, err == -EBUSY ? "a snapshot or another migration of this machine is under way" : "the guest's writes cannot be logged");
    err = source_pre_copy(s, can_post_copy, post_copy);
    if (err)
        return err;
    if (atomic_load(&s->cancelled))
        return source_because(s, -ECANCELED, "cancelled");
    s->stopped_ms = migrate_now_ms();
    *paused = true;
    *told = true;
    err = stop_and_copy(s, *post_copy);
    if (err)
        return err;
    *given = true;
    return hand_over(s);
}

static enum migrate_stage conclude(struct migrate_source *s, int err, bool paused, bool told, bool given)
{
    enum migrate_stage end;

    if (!err)
        return MIGRATE_DONE;
    s->result->end = s->progress.stage;
    /* What broke because of that is no news. */
    if (atomic_load(&s->cancelled))
        snprintf(s->reason, sizeof(s->reason), "cancelled");
    if (!given)
        return give_back(s, paused, told);
    if (err == -EACCES)
        return give_back(s, true, true);        /* it says that it has not taken the machine, and never will */
    log_warn("migration of %s: the target fell silent while the machine changed hands: %s; asking it", s->opt->name, s->reason);
    end = settle(s);
    return end == MIGRATE_FAILED ? give_back(s, true, false) : end;
}

static void tell(struct migrate_source *s, enum migrate_stage end)
{
    const char *name = s->opt->name, *stage = migrate_stage_name(s->result->end);

    if (end == MIGRATE_FAILED)
        log_error("migration of %s to %s failed in stage %s: %s; it goes on running here", name, s->opt->to, stage, s->reason);
    else if (end == MIGRATE_UNKNOWN)
        log_error("migration of %s to %s: it is not known who has the machine (%s). It stays paused here. If it does not run there: `ringfort resume %s`; if it does: `ringfort stop --force %s`",
                  name, s->opt->to, s->reason, name, name);
    else if (end == MIGRATE_LOST)
        log_error("migration of %s to %s: the target has the machine, but not all of its memory, and does not take the rest: %s",
                  name, s->opt->to, s->reason);
}

enum migrate_stage migrate_source_run(struct migrate_source *s, struct migrate_result *result)
{
    unsigned timeout = s->opt->timeout_ms ? s->opt->timeout_ms : DEFAULT_TIMEOUT_MS;
    bool paused = false, told = false, given = false, post_copy = false;
    enum migrate_stage end;
    int err;

    *result = (struct migrate_result){ 0 };
    s->result = result;
    s->began_ms = migrate_now_ms();
    s->progress = (struct migrate_progress){ .total_pages = memory_total(s->memory) >> GUEST_PAGE_SHIFT };
    s->channel_options = (struct channel_options){ .connect_ms = timeout, .idle_ms = timeout };
    s->hello = (struct hello){ .oldest = MIGRATE_VERSION, .newest = MIGRATE_VERSION };
    err = getrandom(s->hello.session, SESSION_SIZE, 0) == SESSION_SIZE ? 0 : source_because(s, -EIO, "no random numbers");
    if (!err && s->opt->tls_dir) {
        s->channel_options.tls = channel_tls_load(s->opt->tls_dir, s->reason);
        err = s->channel_options.tls ? 0 : -EINVAL;
    }
    if (!err && (memory_bitmaps_alloc(s->memory, s->todo) || page_hashes_init(&s->hashes, s->memory) ||
                 disk_bitmaps_alloc(s->opt->disks, s->disk_todo)))
        err = source_because(s, -ENOMEM, "out of memory");
    if (!err)
        err = run(s, &paused, &told, &given, &post_copy);
    end = conclude(s, err, paused, told, given);
    if (s->logging)
        memory_dirty_stop(s->memory);
    if (s->disks_logged)
        s->opt->disks->stop(s->opt->disks->opaque);
    if (end == MIGRATE_DONE && !result->downtime_ms)
        result->downtime_ms = migrate_now_ms() - s->stopped_ms;
    if (end == MIGRATE_DONE && post_copy)
        end = source_post_copy_rest(s);
    if (end == MIGRATE_DONE && s->control)
        frame_send(s->control, FRAME_COMPLETE, 0, NULL, 0);     /* the target need not expect questions any more */
    tell(s, end);
    result->end = end;
    result->post_copy = post_copy;
    if (end != MIGRATE_DONE)
        snprintf(result->reason, sizeof(result->reason), "%s", s->reason);
    result->total_ms = migrate_now_ms() - s->began_ms;
    result->rounds = s->progress.round;
    result->disk_bytes = atomic_load(&s->disk_bytes);
    result->pages_requested = atomic_load(&s->requested);
    source_streams_close(s);
    source_control_close(s);
    result->bytes = source_bytes(s);
    pthread_mutex_lock(&s->lock);
    s->progress.stage = end;
    pthread_mutex_unlock(&s->lock);
    source_report(s);
    memory_bitmaps_free(s->todo);
    disk_bitmaps_free(s->disk_todo);
    page_hashes_destroy(&s->hashes);
    channel_tls_free(s->channel_options.tls);
    s->channel_options.tls = NULL;
    return end;
}
