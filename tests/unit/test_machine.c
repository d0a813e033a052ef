/* Operations on all devices of a machine: order, roll-back of a failed pause, save and load. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "base/util.h"
#include "device/machine.h"

static char trace[512];

struct thing {
    struct device dev;
    uint64_t value;
    int pause_error;
};

static void note(struct device *d, const char *what)
{
    size_t n = strlen(trace);
    snprintf(trace + n, sizeof(trace) - n, "%s:%s ", d->id, what);
}

static void thing_reset(struct device *d)
{
    note(d, "reset");
}

static int thing_pause(struct device *d)
{
    note(d, "pause");
    return container_of(d, struct thing, dev)->pause_error;
}

static int thing_resume(struct device *d)
{
    note(d, "resume");
    return 0;
}

static void thing_save(struct device *d, struct state_writer *w)
{
    state_put_u64(w, "value", container_of(d, struct thing, dev)->value);
}

static int thing_load(struct device *d, const struct state_reader *r)
{
    return state_get_u64(r, "value", &container_of(d, struct thing, dev)->value);
}

static void thing_destroy(struct device *d)
{
    note(d, "destroy");
    free(container_of(d, struct thing, dev));
}

static const struct device_ops disk_ops = {"disk",       2,          thing_reset, thing_pause,
                                           thing_resume, thing_save, thing_load,  thing_destroy};
static const struct device_ops newer_disk_ops = {
    "disk", 3, thing_reset, thing_pause, thing_resume, thing_save, thing_load, thing_destroy};
/* Has nothing to drain or keep. */
static const struct device_ops rng_ops = {.name = "rng", .version = 1, .destroy = thing_destroy};

static struct thing *add(struct machine *m, const struct device_ops *ops, uint64_t value)
{
    struct thing *t = calloc(1, sizeof(*t));
    t->value = value;
    machine_add_device(m, &t->dev, ops);
    return t;
}

static int setup(void **state)
{
    struct machine *m = calloc(1, sizeof(*m));
    trace[0] = 0;
    *state = m;
    return machine_init(m, true);
}

static int teardown(void **state)
{
    machine_destroy(*state);
    free(*state);
    return 0;
}

static void devices_have_names_and_order(void **state)
{
    struct machine *m = *state;
    struct thing *d0 = add(m, &disk_ops, 0), *r = add(m, &rng_ops, 0), *d1 = add(m, &disk_ops, 0);
    assert_string_equal(d0->dev.id, "disk0");
    assert_string_equal(d1->dev.id, "disk1");
    assert_ptr_equal(machine_find_device(m, "rng0"), &r->dev);
    assert_null(machine_find_device(m, "rng1"));
    machine_reset_devices(m);
    assert_string_equal(trace, "disk0:reset disk1:reset ");
    trace[0] = 0;
    assert_int_equal(machine_pause_devices(m), 0);
    assert_int_equal(machine_resume_devices(m), 0);
    assert_string_equal(trace, "disk0:pause disk1:pause disk0:resume disk1:resume ");
}

static void destroyed_last_first(void **state)
{
    struct machine m;
    assert_int_equal(machine_init(&m, true), 0);
    add(&m, &disk_ops, 0);
    add(&m, &rng_ops, 0);
    machine_destroy(&m);
    assert_string_equal(trace, "rng0:destroy disk0:destroy ");
}

static void failed_pause_is_undone(void **state)
{
    struct machine *m = *state;
    add(m, &disk_ops, 0);
    add(m, &disk_ops, 0)->pause_error = -EIO;
    add(m, &disk_ops, 0);
    assert_int_equal(machine_pause_devices(m), -EIO);
    assert_string_equal(trace, "disk0:pause disk1:pause disk0:resume ");
}

static struct state_writer *save(struct machine *m, struct state_reader *r)
{
    struct state_writer *w = state_writer_create();
    machine_save_devices(m, w);
    const void *data;
    size_t len;
    assert_int_equal(state_writer_finish(w, &data, &len), 0);
    state_reader_init(r, data, len);
    return w;
}

static void saved_devices_load(void **state)
{
    struct machine *m = *state, other;
    add(m, &disk_ops, 11);
    add(m, &rng_ops, 0);
    add(m, &disk_ops, 22);
    struct state_reader r;
    struct state_writer *w = save(m, &r);

    assert_int_equal(machine_init(&other, true), 0);
    struct thing *d0 = add(&other, &newer_disk_ops, 0), *d1 = add(&other, &newer_disk_ops, 0);
    assert_int_equal(machine_load_devices(&other, &r), 0);
    assert_int_equal(d0->value, 11);
    assert_int_equal(d1->value, 22);

    /* A device too many, then a device too few. */
    add(&other, &disk_ops, 0);
    assert_int_equal(machine_load_devices(&other, &r), -EINVAL);
    struct state_reader r3;
    struct state_writer *w3 = save(&other, &r3);
    assert_int_equal(machine_load_devices(m, &r3), -EINVAL);
    state_writer_free(w3);
    machine_destroy(&other);
    state_writer_free(w);
}

static void newer_state_is_refused(void **state)
{
    struct machine *m = *state, other;
    add(m, &newer_disk_ops, 11);
    struct state_reader r;
    struct state_writer *w = save(m, &r);
    assert_int_equal(machine_init(&other, true), 0);
    struct thing *t = add(&other, &disk_ops, 5);
    assert_int_equal(machine_load_devices(&other, &r), -EINVAL);
    assert_int_equal(t->value, 5);
    machine_destroy(&other);
    state_writer_free(w);
    state_reader_init(&r, "", 0);
    assert_int_equal(machine_load_devices(m, &r), -EINVAL);
}

int main(void)
{
    log_set_level(-1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(devices_have_names_and_order, setup, teardown),
        cmocka_unit_test_setup_teardown(destroyed_last_first, setup, teardown),
        cmocka_unit_test_setup_teardown(failed_pause_is_undone, setup, teardown),
        cmocka_unit_test_setup_teardown(saved_devices_load, setup, teardown),
        cmocka_unit_test_setup_teardown(newer_state_is_refused, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
