/* Jobs and events as the control socket shows them. Server's thread. */
#include <stdlib.h>

#include "vm/control/server.h"


static int no_such_job(const char *name, json_t **answer)
{
    return control_refuse(answer, 404, "there is no job %.20s", name);
}

static unsigned job_number(const char *name)
{
    char *end;
    unsigned long n = strtoul(name, &end, 10);
    return *name >= '0' && *name <= '9' && !*end && n <= 0xffffffffu ? (unsigned)n : 0;
}

static int list_jobs(struct control_request *r, json_t **answer)
{
    *answer = json_pack("{s:o}", "jobs", control_jobs_list(r->control->jobs));
    return 200;
}

static int get_job(struct control_request *r, json_t **answer)
{
    *answer = control_jobs_describe(r->control->jobs, job_number(r->name));
    return *answer ? 200 : no_such_job(r->name, answer);
}

static int cancel_job(struct control_request *r, json_t **answer)
{
    if (control_jobs_cancel(r->control->jobs, job_number(r->name)))
        return no_such_job(r->name, answer);
    *answer = control_jobs_describe(r->control->jobs, job_number(r->name));
    return 202;
}

const struct control_route control_job_routes[] = {
    {"GET", "/v1/jobs", NULL, ROUTE_QUICK, list_jobs, NULL},
    {"GET", "/v1/jobs/{name}", NULL, ROUTE_QUICK, get_job, NULL},
    {"DELETE", "/v1/jobs/{name}", NULL, ROUTE_QUICK, cancel_job, NULL},
    {0},
};

const struct control_route control_event_routes[] = {
    {"GET", "/v1/events", "since", ROUTE_EVENTS, NULL, NULL},
    {0},
};
