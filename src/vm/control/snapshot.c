/* Snapshots by the control socket. The job's thread. */
#include <errno.h>

#include "base/log.h"
#include "vm/control/job.h"
#include "vm/control/server.h"
#include "vm/snapshot.h"
#include "vm/vm_internal.h"

static void cancel(void *opaque)
{
    vm_snapshot_cancel(opaque);
}

static int do_save(struct control_request *r, json_t **answer)
{
    struct vm_snapshot_result result;
    const char *name = NULL;
    bool compress = false;
    char why[512] = "";
    int status = control_arg_string(r, "name", &name, answer), err;

    if (!status)
        status = control_arg_bool(r, "compress", &compress, answer);
    if (status)
        return status;
    if (!name)
        return control_refuse(answer, 400, "the name of the snapshot is missing");
    log_keep_error(why, sizeof(why));
    control_job_on_cancel(r->job, cancel, r->vm);
    err = vm_snapshot_save(r->vm, name, compress, &result);
    control_job_on_cancel(r->job, NULL, NULL);
    log_keep_error(NULL, 0);
    if (err == -ECANCELED)
        return control_refuse(answer, 499, "cancelled; nothing was saved");
    if (err)
        return control_refuse(answer, err == -EEXIST || err == -EBUSY ? 409 : control_status_of(err), "%s",
                              why[0] ? why : "the machine's log says why");
    *answer = json_pack("{s:s, s:f, s:f, s:I, s:I}", "snapshot", name, "pause_ms", (double)result.pause_ns / 1e6, "total_ms",
                        (double)result.total_ns / 1e6, "memory_bytes", (json_int_t)result.memory_bytes, "disk_bytes",
                        (json_int_t)result.disk_bytes);
    return 200;
}

const struct control_route control_snapshot_routes[] = {
    {"POST", "/v1/snapshot", "name compress", ROUTE_JOB, do_save, NULL},
    {0},
};
