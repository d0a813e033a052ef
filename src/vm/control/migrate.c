/* Migration away by the control socket. The job's thread. */
#include <errno.h>
#include <string.h>

#include "base/log.h"
#include "base/util.h"
#include "migrate/channel.h"
#include "vm/config.h"
#include "vm/control/job.h"
#include "vm/control/server.h"
#include "vm/migrate.h"
#include "vm/vm_internal.h"

#define DOWNTIME_MS 300u
#define STREAMS     2u

struct sending {
    struct control_job *job;
    struct vm *vm;
    struct vm_migration *migration;
};

/* Somebody wants it to end, or the machine's process does. */
static void cancel(void *opaque)
{
    struct sending *s = opaque;

    vm_migration_cancel(s->migration, vm_ended(s->vm, NULL, NULL));
}

static void progress(void *opaque, const struct migrate_progress *p)
{
    struct sending *s = opaque;

    control_job_progress(s->job, json_pack("{s:s, s:i, s:I, s:I, s:I, s:I, s:I, s:I, s:i, s:I}", "stage", migrate_stage_name(p->stage),
                                           "round", (int)p->round, "bytes", (json_int_t)p->bytes, "total_pages",
                                           (json_int_t)p->total_pages, "left_pages", (json_int_t)p->left_pages, "dirty_rate",
                                           (json_int_t)p->dirty_rate, "rate", (json_int_t)p->rate, "estimate_ms",
                                           (json_int_t)p->estimate_ms, "throttle", (int)p->throttle, "elapsed_ms",
                                           (json_int_t)p->elapsed_ms));
}

static int read_arguments(struct control_request *r, struct migrate_source_options *o, bool *with_disks, json_t **answer)
{
    const char *post_copy = "auto";
    char error[CHANNEL_ERROR_MAX];
    uint64_t streams = STREAMS;
    int status = control_arg_string(r, "to", &o->to, answer);

    if (!status)
        status = control_arg_uint(r, "downtime", 1, 3600000, &o->downtime_ms, answer);
    if (!status)
        status = control_arg_uint(r, "bandwidth", 0, UINT64_MAX / 1000, &o->bandwidth, answer);
    if (!status)
        status = control_arg_uint(r, "streams", 1, MIGRATE_MAX_STREAMS, &streams, answer);
    if (!status)
        status = control_arg_string(r, "post_copy", &post_copy, answer);
    if (!status)
        status = control_arg_string(r, "tls", &o->tls_dir, answer);
    if (!status)
        status = control_arg_bool(r, "compress", &o->compress, answer);
    if (!status)
        status = control_arg_bool(r, "with_disks", with_disks, answer);
    if (status)
        return status;
    o->streams = (unsigned)streams;
    if (!o->to || channel_check_address(o->to, error))
        return control_refuse(answer, 400, "%s", o->to ? error : "where to is missing");
    if (strcmp(post_copy, "auto") == 0)
        o->post_copy = MIGRATE_POST_COPY_AUTO;
    else if (strcmp(post_copy, "now") == 0)
        o->post_copy = MIGRATE_POST_COPY_NOW;
    else if (strcmp(post_copy, "never") == 0)
        o->post_copy = MIGRATE_POST_COPY_NEVER;
    else
        return control_refuse(answer, 400, "post_copy is auto, never or now");
    return 0;
}

static json_t *describe(const struct migrate_result *m)
{
    return json_pack("{s:I, s:I, s:i, s:I, s:b, s:I, s:I, s:I, s:I, s:I}", "downtime_ms", (json_int_t)m->downtime_ms, "total_ms",
                     (json_int_t)m->total_ms, "rounds", (int)m->rounds, "bytes", (json_int_t)m->bytes, "post_copy", m->post_copy,
                     "pages_sent", (json_int_t)m->pages_sent, "pages_zero", (json_int_t)m->pages_zero, "pages_skipped",
                     (json_int_t)m->pages_skipped, "pages_requested", (json_int_t)m->pages_requested, "disk_bytes",
                     (json_int_t)m->disk_bytes);
}

/* It is another process's now; this one has nothing left to do. */
static void leave(struct vm *vm, int status) { vm_end_because(vm, status, "migrated"); }

static int do_migrate(struct control_request *r, json_t **answer)
{
    struct migrate_source_options options = { .name = r->vm->config->name, .downtime_ms = DOWNTIME_MS };
    struct sending s = { .job = r->job, .vm = r->vm };
    struct migrate_result result;
    enum migrate_stage end;
    char why[1024] = "";
    bool with_disks = false;
    int status = read_arguments(r, &options, &with_disks, answer);

    if (status)
        return status;
    log_keep_error(why, sizeof(why));
    s.migration = vm_migration_create(r->vm, &options, with_disks, progress, &s);
    if (!s.migration) {
        log_keep_error(NULL, 0);
        return control_refuse(answer, 500, "%s", why[0] ? why : "out of memory");
    }
    control_job_on_cancel(r->job, cancel, &s);
    end = vm_migration_run(s.migration, &result);
    control_job_on_cancel(r->job, NULL, NULL);
    log_keep_error(NULL, 0);
    vm_migration_free(s.migration);
    if (end == MIGRATE_DONE) {
        *answer = describe(&result);
        json_object_set_new(*answer, "to", json_string(options.to));
        log_warn("the machine has moved to %s", options.to);
        control_job_finally(r->job, leave, VM_STATUS_POWEROFF);
        return 200;
    }
    if (end == MIGRATE_LOST)
        control_job_finally(r->job, leave, VM_STATUS_BACKEND);
    return control_refuse(answer, control_job_cancelled(r->job) ? 499 : 409, "%s", why[0] ? why : result.reason);
}

const struct control_route control_migrate_routes[] = {
    {"POST", "/v1/migrate", "to downtime bandwidth streams post_copy tls compress with_disks", ROUTE_JOB, do_migrate, NULL},
    {0},
};
