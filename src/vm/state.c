/* The state of a whole machine but its RAM. state.h has the thread and the order; docs/state.md the sections. */
#include "vm/state.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/log.h"
#include "base/state.h"
#include "base/util.h"
#include "device/machine.h"
#include "engine/engine.h"
#include "isa/x86/cpuid.h"
#include "isa/x86/kvmclock.h"

/* What no machine reaches: a state that says so is damaged. 73 years. */
#define MAX_GUEST_NS (INT64_MAX / 4)
#define MIN_TSC_HZ 1000000u
#define MAX_TSC_HZ 100000000000u

/* The sections at the top, in the order in which they are written. */
static const struct section {
    const char *name;
    uint32_t version;
} sections[] = { { "config", 1 }, { "memory", 1 }, { "clock", 1 }, { "cpus", 1 }, { "devices", 1 } };

/* ---- standing still ---- */

void vm_stand_still(const struct vm_hardware *hw, struct vm_standstill *still)
{
    clock_pause(hw->machine->clock);
    still->base_tsc = x86_tsc_base(hw->machine, hw->tsc_hz);
    still->kvmclock_ns = x86_kvmclock_at(hw->machine, still->base_tsc, hw->tsc_hz);
}

static void shift_tsc(const struct vm_hardware *hw, unsigned cpu, uint64_t ticks)
{
    struct x86_state s;

    if (ticks && hw->engine->shift_tsc) {
        hw->engine->shift_tsc(hw->vcpus[cpu], ticks);
    } else if (ticks) {
        hw->engine->export_state(hw->vcpus[cpu], &s);
        s.tsc_offset += ticks;
        hw->engine->import_state(hw->vcpus[cpu], &s);
    }
}

/* Clock pages that the guest has stay true: they are in terms of its TSC. */
void vm_go_on(const struct vm_hardware *hw, const struct vm_standstill *still)
{
    uint64_t base = x86_tsc_base(hw->machine, hw->tsc_hz);

    x86_kvmclock_set(hw->machine, base, still->kvmclock_ns);
    for (unsigned i = 0; i < hw->cpus; i++)
        shift_tsc(hw, i, still->base_tsc - base);
    clock_resume(hw->machine->clock);
}

/* ---- saving ---- */

static uint32_t version_of(const char *section)
{
    for (unsigned i = 0; i < ARRAY_SIZE(sections); i++)
        if (strcmp(sections[i].name, section) == 0)
            return sections[i].version;
    return 0;
}

static void begin(struct state_writer *w, const char *section) { state_begin(w, section, version_of(section)); }

static void save_memory(const struct memory *m, struct state_writer *w)
{
    begin(w, "memory");
    state_put_u64(w, "regions", m->regions);
    for (unsigned i = 0; i < m->regions; i++) {
        char name[32];

        snprintf(name, sizeof(name), "base%u", i);
        state_put_u64(w, name, m->region[i].base);
        snprintf(name, sizeof(name), "size%u", i);
        state_put_u64(w, name, m->region[i].size);
    }
    state_end(w);
}

/* From offsets to the counter that stands at still->base_tsc to offsets to guest time, and back. */
static uint64_t offset_shift(const struct vm_hardware *hw, const struct vm_standstill *still)
{
    return still->base_tsc - x86_tsc_ticks(clock_now(hw->machine->clock), hw->tsc_hz);
}

static void save_cpus(const struct vm_hardware *hw, const struct vm_standstill *still, struct state_writer *w)
{
    const struct x86_cpu_model *model = hw->model;

    begin(w, "cpus");
    state_put_u64(w, "count", hw->cpus);
    state_put_bytes(w, "model", model->name, strlen(model->name));
    state_put_bytes(w, "cpuid", model->leaves, model->leaf_count * sizeof(model->leaves[0]));
    for (unsigned i = 0; i < hw->cpus; i++) {
        struct x86_state s;
        char name[32];

        snprintf(name, sizeof(name), "cpu%u", i);
        state_begin(w, name, 1);
        hw->engine->export_state(hw->vcpus[i], &s);
        s.tsc_offset += offset_shift(hw, still);
        x86_state_save(&s, w);
        state_end(w);
    }
    state_end(w);
}

void vm_state_save(const struct vm_hardware *hw, const struct vm_standstill *still, struct state_writer *w)
{
    begin(w, "config");
    state_put_bytes(w, "ringfort", RINGFORT_VERSION, strlen(RINGFORT_VERSION));
    if (hw->config)
        state_put_bytes(w, "json", hw->config, strlen(hw->config));
    state_end(w);
    save_memory(&hw->machine->memory, w);
    begin(w, "clock");
    state_put_u64(w, "guest_ns", clock_now(hw->machine->clock));
    state_put_u64(w, "kvmclock_ns", still->kvmclock_ns);
    state_put_u64(w, "tsc_hz", hw->tsc_hz);
    state_end(w);
    save_cpus(hw, still, w);
    machine_save_devices(hw->machine, w);
}

/* ---- loading ---- */

static int bad(const char *what)
{
    log_error("saved machine: %s", what);
    return -EINVAL;
}

static int open_section(const struct state_reader *r, const char *name, struct state_reader *out)
{
    int err = state_open(r, name, out);

    if (err == -ENOENT)
        log_error("saved machine: no section %s; is the file complete?", name);
    return err ? -EINVAL : 0;
}

static int get(const struct state_reader *r, const char *name, uint64_t min, uint64_t max, uint64_t *v)
{
    int err = state_get_u64(r, name, v);

    if (!err && *v >= min && *v <= max)
        return 0;
    log_error("saved machine: %s: %s", name, err == -ENOENT ? "missing" : "bad value");
    return -EINVAL;
}

/* Everything that is there is known and not newer than what this program knows. */
static int check_sections(const struct state_reader *r)
{
    struct state_reader one;
    size_t cursor = 0;
    char name[64];
    int more;

    while ((more = state_next(r, &cursor, name, &one)) > 0) {
        uint32_t known = version_of(name);

        if (!known) {
            log_error("saved machine: this ringfort does not know its section %s: use a newer one", name);
            return -EINVAL;
        }
        if (one.version > known) {
            log_error("saved machine: section %s has version %u, this ringfort knows up to %u: use a newer one", name,
                      one.version, known);
            return -EINVAL;
        }
    }
    return more ? -EINVAL : 0;
}

int vm_state_peek(const struct state_reader *r, const char **config, size_t *config_len, uint64_t *tsc_hz)
{
    struct state_reader s;
    const void *json = NULL;
    int err = check_sections(r);

    *config_len = 0;
    if (!err)
        err = open_section(r, "config", &s);
    if (!err) {
        err = state_get_blob(&s, "json", &json, config_len);
        err = err == -ENOENT ? 0 : err;
    }
    *config = json;
    if (!err)
        err = open_section(r, "clock", &s);
    if (!err)
        err = get(&s, "tsc_hz", MIN_TSC_HZ, MAX_TSC_HZ, tsc_hz);
    return err ? -EINVAL : 0;
}

int vm_state_peek_cpuid(const struct state_reader *r, const void **leaves, size_t *len)
{
    struct state_reader cpus;

    if (open_section(r, "cpus", &cpus))
        return -EINVAL;
    return state_get_blob(&cpus, "cpuid", leaves, len) ? bad("no CPU model") : 0;
}

static int check_memory(const struct memory *m, const struct state_reader *r)
{
    struct state_reader s;
    uint64_t regions, base, size;

    if (open_section(r, "memory", &s) || get(&s, "regions", 0, MEMORY_MAX_REGIONS, &regions))
        return -EINVAL;
    if (regions != m->regions)
        return bad("its memory is laid out otherwise than this machine's; give the same --memory");
    for (unsigned i = 0; i < m->regions; i++) {
        char name[32];

        snprintf(name, sizeof(name), "base%u", i);
        if (get(&s, name, 0, UINT64_MAX, &base))
            return -EINVAL;
        snprintf(name, sizeof(name), "size%u", i);
        if (get(&s, name, 0, UINT64_MAX, &size))
            return -EINVAL;
        if (base != m->region[i].base || size != m->region[i].size)
            return bad("it has another amount of memory than this machine; give the same --memory");
    }
    return 0;
}

/* The guest looked at CPUID when it started, and lives by it. */
static int check_model(const struct x86_cpu_model *model, const struct state_reader *cpus)
{
    const void *name, *leaves;
    size_t name_len, len;

    if (state_get_blob(cpus, "model", &name, &name_len) || state_get_blob(cpus, "cpuid", &leaves, &len))
        return bad("no CPU model");
    if (name_len != strlen(model->name) || memcmp(name, model->name, name_len) != 0) {
        log_error("saved machine: its CPU model is %.*s, this machine's is %s; give the same --cpu-model",
                  (int)MIN(name_len, 40u), (const char *)name, model->name);
        return -EINVAL;
    }
    if (len != model->leaf_count * sizeof(model->leaves[0]) || memcmp(leaves, model->leaves, len) != 0) {
        log_error("saved machine: CPU model %s was another processor where it was saved; machines that move between "
                  "hosts need a common --cpu-model from the start, as x86-64-v2",
                  model->name);
        return -EINVAL;
    }
    return 0;
}

static int load_cpus(const struct vm_hardware *hw, const struct vm_standstill *still, const struct state_reader *cpus)
{
    for (unsigned i = 0; i < hw->cpus; i++) {
        struct state_reader s;
        struct x86_state state;
        char name[32];

        snprintf(name, sizeof(name), "cpu%u", i);
        if (open_section(cpus, name, &s) || x86_state_load(&state, &s))
            return -EINVAL;
        if (state.xcr0 & ~hw->model->xcr0_allowed)
            return bad("its XCR0 has bits that the CPU model does not have");
        state.tsc_offset -= offset_shift(hw, still);
        hw->engine->import_state(hw->vcpus[i], &state);
    }
    return 0;
}

int vm_state_load(const struct vm_hardware *hw, struct vm_standstill *still, const struct state_reader *r)
{
    struct state_reader clock, cpus;
    uint64_t guest_ns, count, tsc_hz;

    if (check_sections(r) || check_memory(&hw->machine->memory, r) || open_section(r, "clock", &clock) ||
        get(&clock, "guest_ns", 0, MAX_GUEST_NS, &guest_ns) ||
        get(&clock, "kvmclock_ns", 0, MAX_GUEST_NS, &still->kvmclock_ns) ||
        get(&clock, "tsc_hz", MIN_TSC_HZ, MAX_TSC_HZ, &tsc_hz) || open_section(r, "cpus", &cpus) ||
        get(&cpus, "count", 1, UINT32_MAX, &count))
        return -EINVAL;
    if (count != hw->cpus) {
        log_error("saved machine: it has %llu vCPUs, this machine %u; give the same --cpus", (unsigned long long)count,
                  hw->cpus);
        return -EINVAL;
    }
    if (check_model(hw->model, &cpus))
        return -EINVAL;
    clock_pause(hw->machine->clock);
    clock_set(hw->machine->clock, guest_ns);
    still->base_tsc = x86_tsc_base(hw->machine, hw->tsc_hz);
    x86_kvmclock_set(hw->machine, still->base_tsc, still->kvmclock_ns);
    if (machine_load_devices(hw->machine, r))
        return -EINVAL;
    return load_cpus(hw, still, &cpus);
}
