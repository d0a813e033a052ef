/* A whole machine with a guest of a few bytes: pause and resume, their holders, and the end. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/state.h"
#include "base/util.h"
#include "tiny_kernel.h"
#include "vm/config.h"
#include "vm/vm_internal.h"

#define COUNTER 0x200000u /* u32 */

/* 32-bit: again: inc [COUNTER]; jmp again */
static const uint8_t counting[] = {0xff, 0x05, 0x00, 0x00, 0x20, 0x00, 0xeb, 0xf8};

struct running {
    char kernel[40];
    struct vm_config config;
    struct vm *vm;
    pthread_t thread;
    int status;
};

static void *run(void *opaque)
{
    struct running *r = opaque;
    r->status = vm_run(r->vm);
    return NULL;
}

static void start(struct running *r, const char *engine, bool held)
{
    int status;

    strcpy(r->kernel, "/tmp/ringfort-vm-test-XXXXXX");
    tiny_kernel_write(r->kernel, counting, sizeof(counting));
    assert_int_equal(vm_config_init(&r->config), 0);
    assert_int_equal(vm_config_set_flag(&r->config, "kernel", r->kernel), 0);
    assert_int_equal(vm_config_set_flag(&r->config, "memory", "16M"), 0);
    assert_int_equal(vm_config_set_flag(&r->config, "console", "none"), 0);
    assert_int_equal(vm_config_set_flag(&r->config, "engine", engine), 0);
    assert_int_equal(vm_config_set_flag(&r->config, "device", "virtio-rng"), 0);
    assert_int_equal(vm_config_finish(&r->config), 0);
    r->vm = vm_create(&r->config, &status);
    assert_non_null(r->vm);
    if (held)
        assert_int_equal(vm_pause(r->vm, VM_HOLD_USER), 0);
    assert_int_equal(pthread_create(&r->thread, NULL, run, r), 0);
}

static int finish(struct running *r)
{
    vm_end(r->vm, VM_STATUS_USER);
    pthread_join(r->thread, NULL);
    vm_destroy(r->vm);
    vm_config_destroy(&r->config);
    unlink(r->kernel);
    return r->status;
}

static uint32_t counter(struct running *r)
{
    uint32_t value = 0;
    assert_int_equal(memory_read(&r->vm->machine.memory, COUNTER, &value, sizeof(value)), 0);
    return value;
}

static void nap(void)
{
    struct timespec t = {.tv_nsec = 1000000};
    nanosleep(&t, NULL);
}

/* Waits, at most 20 s, until the guest gets on. */
static void await_progress(struct running *r)
{
    uint32_t before = counter(r);

    for (unsigned i = 0; i < 20000 && counter(r) == before; i++)
        nap();
    assert_int_not_equal(counter(r), before);
}

/* Nothing moves for a while in which a running guest would count thousands. */
static void assert_stands(struct running *r)
{
    uint32_t before = counter(r);
    uint64_t clock = clock_now(r->vm->machine.clock);

    for (unsigned i = 0; i < 30; i++)
        nap();
    assert_int_equal(counter(r), before);
    assert_int_equal(clock_now(r->vm->machine.clock), clock);
}

/* What the guest's TSC is ahead of the host's. The machine is held. */
static uint64_t tsc_offset(struct running *r)
{
    struct x86_state s;

    pthread_mutex_lock(&r->vm->life);
    r->vm->engine->export_state(&r->vm->vcpus[0].vcpu, &s);
    pthread_mutex_unlock(&r->vm->life);
    return s.tsc_offset;
}

static void pause_and_resume(const char *engine)
{
    struct running r;

    start(&r, engine, false);
    await_progress(&r);
    for (unsigned i = 0; i < 3; i++) {
        uint64_t before_all = tsc_read();
        assert_int_equal(vm_pause(r.vm, VM_HOLD_USER), 0);
        uint64_t begin = tsc_read(), offset = tsc_offset(&r);
        assert_stands(&r);
        assert_int_equal(vm_pause(r.vm, VM_HOLD_USER), 0);
        uint64_t end = tsc_read();
        assert_int_equal(vm_resume(r.vm, VM_HOLD_USER), 0);
        uint64_t after_all = tsc_read();
        await_progress(&r);
        assert_int_equal(vm_resume(r.vm, VM_HOLD_USER), 0);
        await_progress(&r);
        /* The guest's counter stood still for the pause, no more and no less. */
        assert_int_equal(vm_pause(r.vm, VM_HOLD_SAVE), 0);
        uint64_t lost = offset - tsc_offset(&r);
        assert_int_equal(vm_resume(r.vm, VM_HOLD_SAVE), 0);
        assert_true(lost >= end - begin && lost <= after_all - before_all);
    }
    assert_int_equal(finish(&r), VM_STATUS_USER);
}

static void test_pause(void **state)
{
    pause_and_resume("interp");
    pause_and_resume("translate");
}

/* Each holder counts for itself, once. */
static void test_holders(void **state)
{
    struct running r;

    start(&r, "interp", false);
    await_progress(&r);
    assert_int_equal(vm_pause(r.vm, VM_HOLD_USER), 0);
    assert_int_equal(vm_pause(r.vm, VM_HOLD_SAVE), 0);
    assert_int_equal(vm_pause(r.vm, VM_HOLD_SAVE), 0);
    assert_int_equal(vm_holds(r.vm), VM_HOLD_USER | VM_HOLD_SAVE);
    assert_int_equal(vm_resume(r.vm, VM_HOLD_SAVE), 0);
    assert_stands(&r);
    assert_int_equal(vm_resume(r.vm, VM_HOLD_MIGRATE), 0);
    assert_stands(&r);
    assert_int_equal(vm_resume(r.vm, VM_HOLD_USER), 0);
    await_progress(&r);
    assert_int_equal(finish(&r), VM_STATUS_USER);
}

static void test_begins_paused(void **state)
{
    struct running r;

    start(&r, "interp", true);
    assert_stands(&r);
    assert_int_equal(counter(&r), 0);
    assert_int_equal(vm_resume(r.vm, VM_HOLD_USER), 0);
    await_progress(&r);
    assert_int_equal(finish(&r), VM_STATUS_USER);
}

/* A reset of a machine that is held is done, and does not start it. */
static void test_reset_while_held(void **state)
{
    struct running r;

    start(&r, "interp", false);
    await_progress(&r);
    assert_int_equal(vm_pause(r.vm, VM_HOLD_USER), 0);
    assert_int_not_equal(counter(&r), 0);
    uint64_t rip = 0;
    machine_raise(&r.vm->machine, MACHINE_RESET, 0);
    for (unsigned i = 0; i < 20000 && rip != TINY_KERNEL_LOAD + 32; i++) {
        struct x86_state s;
        nap();
        pthread_mutex_lock(&r.vm->life);
        r.vm->engine->export_state(&r.vm->vcpus[0].vcpu, &s);
        pthread_mutex_unlock(&r.vm->life);
        rip = s.rip;
    }
    assert_int_equal(rip, TINY_KERNEL_LOAD + 32);
    assert_stands(&r);
    assert_int_equal(vm_resume(r.vm, VM_HOLD_USER), 0);
    await_progress(&r);
    assert_int_equal(finish(&r), VM_STATUS_USER);
}

/* Ends while it is held; later holds are refused. */
static void test_end_while_held(void **state)
{
    struct running r;

    start(&r, "interp", false);
    await_progress(&r);
    assert_int_equal(vm_pause(r.vm, VM_HOLD_MIGRATE), 0);
    vm_end(r.vm, VM_STATUS_POWEROFF);
    vm_end(r.vm, VM_STATUS_CRASH);
    pthread_join(r.thread, NULL);
    assert_int_equal(r.status, VM_STATUS_POWEROFF);
    assert_int_equal(vm_pause(r.vm, VM_HOLD_USER), -ESHUTDOWN);
    vm_destroy(r.vm);
    vm_config_destroy(&r.config);
    unlink(r.kernel);
}

/* Several holders at once, from threads of their own: in the end it runs. */
static void *hold_often(void *opaque)
{
    struct running *r = opaque;
    static _Atomic unsigned next;
    enum vm_hold hold = (enum vm_hold)(1u << (atomic_fetch_add(&next, 1) & 3));

    for (unsigned i = 0; i < 100; i++) {
        if (vm_pause(r->vm, hold))
            return r;
        if (vm_resume(r->vm, hold))
            return r;
    }
    return NULL;
}

static void test_many_holders(void **state)
{
    struct running r;
    pthread_t t[4];
    void *bad;

    start(&r, "interp", false);
    for (unsigned i = 0; i < ARRAY_SIZE(t); i++)
        assert_int_equal(pthread_create(&t[i], NULL, hold_often, &r), 0);
    for (unsigned i = 0; i < ARRAY_SIZE(t); i++) {
        pthread_join(t[i], &bad);
        assert_null(bad);
    }
    assert_int_equal(vm_holds(r.vm), 0);
    await_progress(&r);
    assert_int_equal(finish(&r), VM_STATUS_USER);
}

/* Back and forth while it runs. */
static void test_engines(void **state)
{
    struct running r;

    start(&r, "interp", false);
    for (unsigned i = 0; i < 20; i++) {
        uint64_t pause_ns = 0;

        await_progress(&r);
        assert_int_equal(vm_set_engine(r.vm, engine_find(i & 1 ? "interp" : "translate"), &pause_ns), 0);
        assert_true(pause_ns > 0);
    }
    await_progress(&r);
    /* A paused machine stays so. */
    assert_int_equal(vm_pause(r.vm, VM_HOLD_USER), 0);
    assert_int_equal(vm_set_engine(r.vm, engine_find("translate"), NULL), 0);
    assert_stands(&r);
    assert_string_equal(r.vm->engine->name, "translate");
    assert_int_equal(vm_resume(r.vm, VM_HOLD_USER), 0);
    await_progress(&r);
    assert_int_equal(finish(&r), VM_STATUS_USER);
}

static void save(struct running *r, struct state_writer **w, struct state_reader *reader)
{
    const void *data;
    size_t len;

    *w = state_writer_create();
    assert_int_equal(vm_save(r->vm, *w), 0);
    assert_int_equal(state_writer_finish(*w, &data, &len), 0);
    state_reader_init(reader, data, len);
}

/* A machine with all its devices goes on in another; what was loaded is saved with the same bytes. */
static void test_save_and_load(void **state)
{
    struct running r, other;
    struct state_writer *w, *again;
    struct state_reader saved, second;
    const char *json;
    size_t len;
    uint64_t tsc_hz;
    int status;

    start(&r, "interp", false);
    await_progress(&r);
    assert_int_equal(vm_pause(r.vm, VM_HOLD_SAVE), 0);
    save(&r, &w, &saved);

    assert_int_equal(vm_state_peek(&saved, &json, &len, &tsc_hz), 0);
    assert_int_equal(vm_config_init(&other.config), 0);
    assert_int_equal(vm_config_load_json(&other.config, json, len, "saved"), 0);
    assert_int_equal(vm_config_finish(&other.config), 0);
    strcpy(other.kernel, r.kernel);
    other.vm = vm_create_empty(&other.config, tsc_hz, VM_HOLD_SAVE, &status);
    assert_non_null(other.vm);
    memcpy(memory_map(&other.vm->machine.memory, 0, MIB(16)), memory_map(&r.vm->machine.memory, 0, MIB(16)), MIB(16));
    assert_int_equal(vm_load(other.vm, &saved), 0);
    save(&other, &again, &second);
    assert_int_equal(saved.len, second.len);
    assert_memory_equal(saved.data, second.data, saved.len);
    state_writer_free(again);
    state_writer_free(w);

    uint32_t before = counter(&r);
    assert_int_equal(counter(&other), before);
    assert_int_equal(pthread_create(&other.thread, NULL, run, &other), 0);
    assert_stands(&other);
    assert_int_equal(vm_resume(other.vm, VM_HOLD_SAVE), 0);
    await_progress(&other);
    /* A reset there begins with a clean memory. */
    assert_int_equal(memory_fill(&other.vm->machine.memory, MIB(8), 0x77, 16), 0);
    machine_raise(&other.vm->machine, MACHINE_RESET, 0);
    uint8_t byte = 1;
    for (unsigned i = 0; i < 20000 && byte; i++) {
        nap();
        assert_int_equal(memory_read(&other.vm->machine.memory, MIB(8), &byte, 1), 0);
    }
    assert_int_equal(byte, 0);
    await_progress(&other);
    assert_int_equal(finish(&other), VM_STATUS_USER);
    assert_int_equal(counter(&r), before);
    assert_int_equal(finish(&r), VM_STATUS_USER);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_pause),
        cmocka_unit_test(test_holders),
        cmocka_unit_test(test_begins_paused),
        cmocka_unit_test(test_reset_while_held),
        cmocka_unit_test(test_end_while_held),
        cmocka_unit_test(test_many_holders),
        cmocka_unit_test(test_engines),
        cmocka_unit_test(test_save_and_load),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
