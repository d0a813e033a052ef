/*
 * Jobs: threads, their progress, and what is remembered of them; job.h has the rules.
 *
 * The table's lock guards every field of every job but for what only the job's own thread uses; events are sent
 * under it. A cancel hook runs under a lock of its own, so that taking it away waits for one that runs.
 */
#include "vm/control/job.h"

#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/log.h"
#include "base/util.h"
#include "vm/control/control.h"

#define KEPT_JOBS       16u
#define PROGRESS_GAP_NS 100000000u

struct control_job {
    struct control_jobs *jobs;
    unsigned id;
    char kind[32], name[64];
    const struct control_route *route;
    struct vm *vm;
    json_t *args;
    pthread_t thread;
    bool started, ended, cancelled;
    int status; /* HTTP, once ended */
    json_t *answer, *progress;
    uint64_t told_ns;

    pthread_mutex_t hook_lock; /* taken before the table's */
    void (*on_cancel)(void *opaque);
    void *on_cancel_opaque;
    void (*finally)(struct vm *vm, int status); /* the job's thread's own */
    int finally_status;
};

struct control_jobs {
    struct control *control;
    void (*changed)(void *opaque);
    void *opaque;
    pthread_mutex_t lock;
    struct control_job *job[KEPT_JOBS]; /* slot: id modulo */
    unsigned next_id;
    bool stopped;
};

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

struct control_jobs *control_jobs_create(struct control *control, void (*changed)(void *opaque), void *opaque)
{
    struct control_jobs *jobs = calloc(1, sizeof(*jobs));

    if (!jobs)
        return NULL;
    *jobs = (struct control_jobs){.control = control, .changed = changed, .opaque = opaque, .next_id = 1};
    pthread_mutex_init(&jobs->lock, NULL);
    return jobs;
}

/* The job has ended, or never began. */
static void free_job(struct control_job *job)
{
    if (!job)
        return;
    if (job->started)
        pthread_join(job->thread, NULL);
    json_decref(job->args);
    json_decref(job->answer);
    json_decref(job->progress);
    pthread_mutex_destroy(&job->hook_lock);
    free(job);
}

static struct control_job *find(struct control_jobs *jobs, unsigned id)
{
    struct control_job *job = jobs->job[id % KEPT_JOBS];
    return job && job->id == id ? job : NULL;
}

static const char *state_of(const struct control_job *job)
{
    return !job->ended            ? job->cancelled ? "cancelling" : "running"
           : job->status < 300    ? "done"
           : job->cancelled       ? "cancelled"
                                  : "failed";
}

/* Lock held. */
static json_t *describe(const struct control_job *job)
{
    json_t *o = json_pack("{s:i, s:s, s:s}", "job", (int)job->id, "kind", job->kind, "state", state_of(job));

    if (o && job->name[0])
        json_object_set_new(o, "name", json_string(job->name));
    if (o && job->progress)
        json_object_set_new(o, "progress", json_deep_copy(job->progress));
    if (o && job->ended && job->answer)
        json_object_set_new(o, "result", json_deep_copy(job->answer));
    return o;
}

/* Lock held, so that followers see a job's states in their order. */
static void tell(struct control_job *job)
{
    control_event(job->jobs->control, "job", describe(job));
}

static void *run(void *opaque)
{
    struct control_job *job = opaque;
    struct control_jobs *jobs = job->jobs;
    struct control_request r = {
        .control = jobs->control, .vm = job->vm, .name = job->name, .args = job->args, .job = job};
    json_t *answer = NULL;
    int status = job->route->handler(&r, &answer);

    control_job_on_cancel(job, NULL, NULL);
    pthread_mutex_lock(&jobs->lock);
    job->status = status;
    job->answer = answer ? answer : json_object();
    job->ended = true;
    tell(job);
    pthread_mutex_unlock(&jobs->lock);
    jobs->changed(jobs->opaque);
    if (job->finally)
        job->finally(job->vm, job->finally_status);
    return NULL;
}

void control_job_finally(struct control_job *job, void (*fn)(struct vm *vm, int status), int status)
{
    job->finally = fn;
    job->finally_status = status;
}

/* "/v1/snapshots/{name}" -> "snapshots" */
static void kind_of(const char *path, char *out, size_t size)
{
    const char *begin = path + 1, *slash;

    while ((slash = strchr(begin, '/')) && slash[1] != '{')
        begin = slash + 1;
    snprintf(out, size, "%.*s", (int)strcspn(begin, "/"), begin);
}

/* Lock held. */
static int check_idle(const struct control_jobs *jobs, json_t **answer)
{
    if (jobs->stopped)
        return control_refuse(answer, 409, "the machine is ending");
    for (unsigned i = 0; i < KEPT_JOBS; i++) {
        const struct control_job *job = jobs->job[i];
        if (job && !job->ended)
            return control_refuse(answer, 409, "the machine is busy: job %u (%s) is running; wait for it, or cancel it", job->id,
                                  job->kind);
    }
    return 0;
}

int control_jobs_start(struct control_jobs *jobs, const struct control_route *route, const struct control_request *r,
                       unsigned *id, json_t **answer)
{
    struct control_job *job = calloc(1, sizeof(*job)), *old = NULL;
    int status = 0;

    if (!job)
        return control_refuse(answer, 500, "out of memory");
    pthread_mutex_init(&job->hook_lock, NULL);
    job->jobs = jobs;
    job->route = route;
    job->vm = r->vm;
    job->args = json_deep_copy(r->args);
    snprintf(job->name, sizeof(job->name), "%s", r->name);
    kind_of(route->path, job->kind, sizeof(job->kind));

    pthread_mutex_lock(&jobs->lock);
    status = check_idle(jobs, answer);
    if (!status) {
        job->id = jobs->next_id++;
        *id = job->id;
        old = jobs->job[job->id % KEPT_JOBS];
        jobs->job[job->id % KEPT_JOBS] = job;
        int err = pthread_create(&job->thread, NULL, run, job);
        job->started = !err;
        if (err) {
            jobs->job[job->id % KEPT_JOBS] = NULL;
            status = control_refuse(answer, 500, "cannot start a thread: %s", strerror(err));
        }
    }
    pthread_mutex_unlock(&jobs->lock);
    free_job(old);
    if (status)
        free_job(job);
    return status;
}

int control_jobs_result(struct control_jobs *jobs, unsigned id, json_t **answer)
{
    int status = -1;

    pthread_mutex_lock(&jobs->lock);
    struct control_job *job = find(jobs, id);
    if (job) {
        status = job->ended ? job->status : 0;
        if (job->ended)
            *answer = json_deep_copy(job->answer);
    }
    pthread_mutex_unlock(&jobs->lock);
    return status;
}

json_t *control_jobs_describe(struct control_jobs *jobs, unsigned id)
{
    pthread_mutex_lock(&jobs->lock);
    struct control_job *job = find(jobs, id);
    json_t *o = job ? describe(job) : NULL;
    pthread_mutex_unlock(&jobs->lock);
    return o;
}

json_t *control_jobs_list(struct control_jobs *jobs)
{
    json_t *list = json_array();

    pthread_mutex_lock(&jobs->lock);
    for (unsigned i = 0; i < KEPT_JOBS; i++) {
        /* Oldest first. */
        const struct control_job *job = jobs->job[(jobs->next_id + i) % KEPT_JOBS];
        if (job)
            json_array_append_new(list, describe(job));
    }
    pthread_mutex_unlock(&jobs->lock);
    return list;
}

/* The job cannot go away meanwhile: its id is not reused before KEPT_JOBS others have ended. */
static void cancel(struct control_job *job)
{
    bool first;

    pthread_mutex_lock(&job->hook_lock);
    pthread_mutex_lock(&job->jobs->lock);
    first = !job->ended && !job->cancelled;
    job->cancelled |= first;
    if (first)
        tell(job);
    pthread_mutex_unlock(&job->jobs->lock);
    if (first && job->on_cancel)
        job->on_cancel(job->on_cancel_opaque);
    pthread_mutex_unlock(&job->hook_lock);
}

int control_jobs_cancel(struct control_jobs *jobs, unsigned id)
{
    pthread_mutex_lock(&jobs->lock);
    struct control_job *job = find(jobs, id);
    pthread_mutex_unlock(&jobs->lock);
    if (!job)
        return 404;
    cancel(job);
    return 0;
}

void control_jobs_stop(struct control_jobs *jobs)
{
    pthread_mutex_lock(&jobs->lock);
    jobs->stopped = true;
    pthread_mutex_unlock(&jobs->lock);
    /* No job begins any more, so the table stays as it is. */
    for (unsigned i = 0; i < KEPT_JOBS; i++) {
        struct control_job *job = jobs->job[i];

        if (!job || !job->started)
            continue;
        cancel(job);
        pthread_join(job->thread, NULL);
        job->started = false;
    }
}

void control_jobs_destroy(struct control_jobs *jobs)
{
    if (!jobs)
        return;
    for (unsigned i = 0; i < KEPT_JOBS; i++)
        free_job(jobs->job[i]);
    pthread_mutex_destroy(&jobs->lock);
    free(jobs);
}

/* ---- In the job's thread. ---- */

bool control_job_cancelled(struct control_job *job)
{
    pthread_mutex_lock(&job->jobs->lock);
    bool cancelled = job->cancelled;
    pthread_mutex_unlock(&job->jobs->lock);
    return cancelled;
}

void control_job_on_cancel(struct control_job *job, void (*fn)(void *opaque), void *opaque)
{
    pthread_mutex_lock(&job->hook_lock);
    job->on_cancel = fn;
    job->on_cancel_opaque = opaque;
    if (fn && control_job_cancelled(job))
        fn(opaque);
    pthread_mutex_unlock(&job->hook_lock);
}

void control_job_progress(struct control_job *job, json_t *progress)
{
    uint64_t now = now_ns();

    pthread_mutex_lock(&job->jobs->lock);
    json_decref(job->progress);
    job->progress = progress;
    bool due = now - job->told_ns >= PROGRESS_GAP_NS;
    if (due) {
        job->told_ns = now;
        tell(job);
    }
    pthread_mutex_unlock(&job->jobs->lock);
}
