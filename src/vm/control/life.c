/* Pause, resume, stop and reset by the control socket. Server's thread. */
#include <errno.h>

#include "base/log.h"
#include "device/power.h"
#include "vm/control/server.h"
#include "vm/migrate.h"
#include "vm/vm_internal.h"

#define STOP_SECONDS     60u
#define MAX_STOP_SECONDS (24u * 3600u)

static int answer_state(struct control_request *r, int status, json_t **answer)
{
    *answer = json_pack("{s:s}", "state", control_state(r->vm));
    return status;
}

static int refuse_errno(int err, json_t **answer)
{
    if (err == -ESHUTDOWN)
        return control_refuse(answer, 409, "the machine has ended");
    return control_refuse(answer, control_status_of(err), "a device failed; the machine's log says which");
}

static int do_pause(struct control_request *r, json_t **answer)
{
    int err = vm_pause(r->vm, VM_HOLD_USER);
    return err ? refuse_errno(err, answer) : answer_state(r, 200, answer);
}

static int do_resume(struct control_request *r, json_t **answer)
{
    char why[512] = "";
    int err;

    /* After a migration of which nobody knows how it ended, a person decides by this. */
    log_keep_error(why, sizeof(why));
    err = vm_migrate_decide(r->vm);
    log_keep_error(NULL, 0);
    if (err)
        return control_refuse(answer, 409, "%s", why[0] ? why : "the machine's log says why");
    err = vm_resume(r->vm, VM_HOLD_USER);
    return err ? refuse_errno(err, answer) : answer_state(r, 200, answer);
}

static int do_reset(struct control_request *r, json_t **answer)
{
    log_warn("reset by the control socket");
    machine_raise(&r->vm->machine, MACHINE_RESET, 0);
    return answer_state(r, 200, answer);
}

static int do_stop(struct control_request *r, json_t **answer)
{
    uint64_t seconds = STOP_SECONDS;
    bool force = false;
    int status = control_arg_bool(r, "force", &force, answer);

    if (!status)
        status = control_arg_uint(r, "timeout", 0, MAX_STOP_SECONDS, &seconds, answer);
    if (status)
        return status;
    if (force) {
        log_warn("cut off by the control socket");
        vm_end(r->vm, VM_STATUS_USER);
    } else if (vm_holds(r->vm)) {
        return control_refuse(answer, 409, "the machine is paused and cannot power off by itself; resume it first, or force it");
    } else {
        log_warn("the control socket presses the guest's power button");
        vm_press_button(r->vm);
        r->control->stop_deadline_ns = control_now_ns() + seconds * 1000000000u;
        control_need_ticks(r->control);
        control_event(r->control, "stopping", json_pack("{s:I}", "timeout", (json_int_t)seconds));
    }
    *answer = json_pack("{s:s}", "state", "stopping");
    return 202;
}

const struct control_route control_life_routes[] = {
    {"POST", "/v1/pause", NULL, ROUTE_QUICK, do_pause, NULL},
    {"POST", "/v1/resume", NULL, ROUTE_QUICK, do_resume, NULL},
    {"POST", "/v1/reset", NULL, ROUTE_QUICK, do_reset, NULL},
    {"POST", "/v1/stop", "force timeout", ROUTE_QUICK, do_stop, NULL},
    {0},
};
