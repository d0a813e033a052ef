/*
 * What a machine is and what it does: the answers to GET /v1, /v1/info and /v1/stats, and the events of its life.
 *
 * Server's thread, but for control_observe().
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/resident.h"
#include "base/util.h"
#include "isa/x86/cpuid.h"
#include "memory/missing.h"
#include "vm/config.h"
#include "vm/control/server.h"
#include "vm/vm_internal.h"

static const struct {
    enum vm_hold hold;
    const char *name;
} hold_names[] = {
    {VM_HOLD_USER, "user"},
    {VM_HOLD_SAVE, "snapshot"},
    {VM_HOLD_ENGINE, "engine"},
    {VM_HOLD_MIGRATE, "migration"},
};

static json_t *holders(unsigned holds)
{
    json_t *list = json_array();

    for (unsigned i = 0; i < ARRAY_SIZE(hold_names); i++)
        if (holds & hold_names[i].hold)
            json_array_append_new(list, json_string(hold_names[i].name));
    return list;
}

const char *control_state(struct vm *vm)
{
    return vm_ended(vm, NULL, NULL) ? "ended" : vm_holds(vm) ? "paused" : "running";
}

void control_observe(void *opaque, enum vm_notice what, int status)
{
    struct control *c = opaque;
    const char *cause = "";

    switch (what) {
    case VM_NOTICE_STATE:
        control_event(c, "state",
                      json_pack("{s:s, s:o}", "state", control_state(c->vm), "held_by", holders(vm_holds(c->vm))));
        break;
    case VM_NOTICE_RESET:
        control_event(c, "reset", NULL);
        break;
    case VM_NOTICE_CRASH:
        control_event(c, "crash", NULL);
        break;
    case VM_NOTICE_ENDED:
        vm_ended(c->vm, &status, &cause);
        control_event(c, "ended", json_pack("{s:s, s:i}", "cause", cause, "status", status));
        break;
    }
}

/* ---- GET /v1 ---- */

static int get_index(struct control_request *r, json_t **answer)
{
    json_t *list = json_array();
    const struct control_route *route;

    for (unsigned i = 0; (route = control_route_at(i)); i++)
        json_array_append_new(list, json_pack("{s:s, s:s, s:s*, s:b}", "method", route->method, "path", route->path,
                                              "arguments", route->args, "job", route->kind == ROUTE_JOB));
    *answer = json_pack("{s:s, s:s, s:o}", "version", RINGFORT_VERSION, "name", r->control->config->name, "routes", list);
    return 200;
}

/* ---- GET /v1/info ---- */

static double seconds(uint64_t ns)
{
    return (double)(ns / 1000000u) / 1000.0;
}

/* Of this process. */
static double running_seconds(void)
{
    static uint64_t start_ns; /* server's thread */
    struct timespec t;

    clock_gettime(CLOCK_BOOTTIME, &t);
    uint64_t now = (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
    if (!start_ns) {
        /* proc(5): field 22, in clock ticks since boot; the name in field 2 may hold anything. */
        unsigned long long ticks = 0;
        char line[1024] = "";
        FILE *f = fopen("/proc/self/stat", "re");
        const char *rest = f && fgets(line, sizeof(line), f) ? strrchr(line, ')') : NULL;
        if (f)
            fclose(f);
        start_ns = now;
        if (rest && sscanf(rest + 1, " %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d %llu", &ticks) == 1)
            start_ns = ticks * (1000000000u / (uint64_t)sysconf(_SC_CLK_TCK));
    }
    return now > start_ns ? seconds(now - start_ns) : 0;
}

static int get_info(struct control_request *r, json_t **answer)
{
    struct vm *vm = r->vm;
    const struct vm_config *c = vm->config;

    /* Who asks is about to read the console's file. */
    keeper_flush(r->control);
    json_error_t e;
    char *text = vm_config_to_json(c);
    json_t *config = text ? json_loads(text, 0, &e) : json_null();

    free(text);
    *answer = json_pack("{s:s, s:i, s:s, s:s, s:o, s:s, s:s, s:s, s:i, s:I, s:f, s:f, s:s, s:s*, s:o}", "name", c->name,
                        "pid", (int)getpid(), "version", RINGFORT_VERSION, "state", control_state(vm), "held_by",
                        holders(vm_holds(vm)), "engine", vm->engine->name, "configured_engine", c->engine, "cpu_model", vm->model->name, "cpus",
                        (int)vm->cpus, "memory_bytes", (json_int_t)c->memory, "uptime_seconds", running_seconds(),
                        "guest_seconds", seconds(clock_now(vm->machine.clock)), "socket", r->control->claim.socket,
                        "console_file",
                        r->control->keeper ? r->control->console_path : NULL, "config", config);
    return *answer ? 200 : control_refuse(answer, 500, "out of memory");
}

/* ---- GET /v1/stats ---- */

/* CPU time so far of each vCPU's thread, without the processes that run its user code natively. */
static uint64_t thread_ns(const struct vm_vcpu *v)
{
    struct timespec t;
    clockid_t clock;

    if (!v->started || v->vm->ending || pthread_getcpuclockid(v->thread, &clock) || clock_gettime(clock, &t) < 0)
        return v->cpu_ns;
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* *native_ns: CPU time of those processes. */
static json_t *vcpu_stats(struct vm *vm, uint64_t *native_ns)
{
    json_t *list = json_array();

    for (unsigned i = 0; i < vm->cpus; i++) {
        struct vm_vcpu *v = &vm->vcpus[i];
        struct engine_counters n;

        /* The gate: the thread does not end, and is not joined, while its clock is read. */
        pthread_mutex_lock(&vm->gate);
        uint64_t cpu = thread_ns(v);
        bool running = v->running;
        pthread_mutex_unlock(&vm->gate);
        vm->engine->counters(&v->vcpu, &n);
        n.native_cpu_ns += v->native_cpu_ns;
        *native_ns += n.native_cpu_ns;
        json_array_append_new(
            list, json_pack("{s:i, s:b, s:f, s:o, s:I, s:I, s:I, s:I, s:I}", "index", (int)i, "running", (int)running,
                            "cpu_seconds", seconds(cpu + n.native_cpu_ns), "instructions",
                            n.instructions ? json_integer((json_int_t)n.instructions) : json_null(), "mmio_exits",
                            (json_int_t)n.mmio_exits, "port_exits", (json_int_t)n.port_exits, "halts",
                            (json_int_t)n.halts, "exceptions", (json_int_t)n.exceptions, "interrupts",
                            (json_int_t)n.interrupts));
    }
    return list;
}

static void put_figure(void *object, const char *name, uint64_t value)
{
    json_object_set_new(object, name, json_integer((json_int_t)value));
}

static json_t *device_stats(struct machine *m)
{
    json_t *all = json_object();

    pthread_mutex_lock(&m->lock);
    for (struct device *d = m->devices; d; d = d->next) {
        if (!d->ops->figures)
            continue;
        json_t *one = json_object();
        d->ops->figures(d, put_figure, one);
        json_object_set_new(all, d->id, one);
    }
    pthread_mutex_unlock(&m->lock);
    return all;
}

static int get_stats(struct control_request *r, json_t **answer)
{
    struct vm *vm = r->vm;
    struct resident now = {0};
    struct timespec t;
    uint64_t native_ns = 0;
    json_t *vcpus = vcpu_stats(vm, &native_ns);

    resident_read(&now);
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    *answer = json_pack("{s:s, s:s, s:s, s:f, s:f, s:f, s:{s:I, s:I, s:I, s:I}, s:o, s:o}", "name", vm->config->name, "state",
                        control_state(vm), "engine", vm->engine->name, "uptime_seconds", running_seconds(),
                        "guest_seconds", seconds(clock_now(vm->machine.clock)), "cpu_seconds",
                        seconds((uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec + native_ns), "memory", "ram_bytes",
                        (json_int_t)vm->config->memory, "missing_bytes",
                        (json_int_t)(memory_missing_in(&vm->machine.memory) * GUEST_PAGE_SIZE), "ram_resident_bytes", (json_int_t)now.shared, "own_bytes",
                        (json_int_t)now.own, "vcpus", vcpus, "devices", device_stats(&vm->machine));
    return *answer ? 200 : control_refuse(answer, 500, "out of memory");
}

const struct control_route control_info_routes[] = {
    {"GET", "/v1", NULL, ROUTE_QUICK, get_index, NULL},
    {"GET", "/v1/info", NULL, ROUTE_QUICK, get_info, NULL},
    {"GET", "/v1/stats", NULL, ROUTE_QUICK, get_stats, NULL},
    {0},
};
