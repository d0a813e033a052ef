/* The change of a machine's engine by the control socket. The job's thread. */
#include <errno.h>
#include <string.h>

#include "base/log.h"
#include "engine/engine.h"
#include "vm/control/job.h"
#include "vm/control/server.h"
#include "vm/vm_internal.h"

static const struct engine *find(const char *name)
{
    return strcmp(name, "auto") == 0 ? engine_choose() : engine_find(name);
}

static int do_change(struct control_request *r, json_t **answer)
{
    const struct engine *engine;
    const char *name = NULL;
    uint64_t pause_ns = 0;
    char why[512] = "";
    int status = control_arg_string(r, "engine", &name, answer), err;

    if (status)
        return status;
    if (!name || !(engine = find(name)))
        return control_refuse(answer, 400, "there is no such engine; 'ringfort host' shows those that there are");
    log_keep_error(why, sizeof(why));
    err = vm_set_engine(r->vm, engine, &pause_ns);
    log_keep_error(NULL, 0);
    if (err == -ESHUTDOWN)
        return control_refuse(answer, 409, "the machine has ended");
    if (err)
        return control_refuse(answer, err == -EBUSY || err == -ENOSYS ? 409 : control_status_of(err), "%s",
                              why[0] ? why : "the machine's log says why");
    control_event(r->control, "engine", json_pack("{s:s}", "engine", engine->name));
    *answer = json_pack("{s:s, s:f}", "engine", engine->name, "pause_ms", (double)pause_ns / 1e6);
    return 200;
}

const struct control_route control_engine_routes[] = {
    {"POST", "/v1/engine", "engine", ROUTE_JOB, do_change, NULL},
    {0},
};
