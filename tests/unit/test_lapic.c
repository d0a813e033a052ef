/*
 * The LAPIC between threads: what the device tests, which have one thread, cannot show.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>

#include "base/util.h"
#include "device/irqchip/irqchip.h"
#include "device/machine.h"

#define ROUNDS 2000
#define SENDERS 3
#define LEVEL_GSI 20
#define LEVEL_VECTOR 0x81

struct vcpu {
    struct machine *m;
    struct lapic *lapic;
    struct irq_line line;       /* of a device that is quiet when its handler has run */
    pthread_mutex_t lock;
    pthread_cond_t cond;
    bool kicked;
    _Atomic unsigned got[256];
    _Atomic bool stop;
};

struct sender {
    struct machine *m;
    struct vcpu *to;
    uint8_t vector;
};

static void signalled(void *opaque, enum lapic_signal signal, unsigned value)
{
    struct vcpu *v = opaque;
    pthread_mutex_lock(&v->lock);
    v->kicked = true;
    pthread_cond_signal(&v->cond);
    pthread_mutex_unlock(&v->lock);
}

static void take_all(struct vcpu *v)
{
    int vector;
    while ((vector = lapic_ack(v->lapic)) >= 0) {
        if (vector == LEVEL_VECTOR) {
            pthread_mutex_lock(&v->m->lock);
            irq_set(&v->line, false);
            pthread_mutex_unlock(&v->m->lock);
        }
        atomic_fetch_add(&v->got[vector], 1);
        lapic_mmio_write(v->lapic, 0xb0, 0, 4);
    }
}

/* Sleeps until it is signalled, as a halted vCPU; a signal that is missing shows as a hang. */
static void *run_vcpu(void *opaque)
{
    struct vcpu *v = opaque;
    while (!v->stop) {
        take_all(v);
        pthread_mutex_lock(&v->lock);
        while (!v->kicked && !v->stop)
            pthread_cond_wait(&v->cond, &v->lock);
        v->kicked = false;
        pthread_mutex_unlock(&v->lock);
    }
    return NULL;
}

/* Spins until the count goes beyond before; false: ten seconds went by. */
static bool wait_for(_Atomic unsigned *count, unsigned before)
{
    struct timespec start, now;
    clock_gettime(CLOCK_MONOTONIC, &start);
    while (atomic_load(count) == before) {
        sched_yield();
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (now.tv_sec > start.tv_sec + 10)
            return false;
    }
    return true;
}

/* Each interrupt is sent when the one before has been taken: none may be lost, and none comes twice. */
static void *send_msis(void *opaque)
{
    struct sender *s = opaque;
    for (unsigned i = 0; i < ROUNDS; i++) {
        unsigned before = atomic_load(&s->to->got[s->vector]);
        msi_send(&s->m->irq, LAPIC_DEFAULT_BASE | 1 << 12, s->vector);
        if (!wait_for(&s->to->got[s->vector], before))
            return s;
    }
    return NULL;
}

/* A level-triggered line under the machine lock, while ends of interrupt come without it. */
static void *raise_line(void *opaque)
{
    struct sender *s = opaque;
    for (unsigned i = 0; i < ROUNDS; i++) {
        unsigned before = atomic_load(&s->to->got[s->vector]);
        pthread_mutex_lock(&s->m->lock);
        irq_set(&s->to->line, true);
        pthread_mutex_unlock(&s->m->lock);
        if (!wait_for(&s->to->got[s->vector], before))
            return s;
    }
    return NULL;
}

static void no_interrupt_is_lost(void **state)
{
    struct machine m;
    assert_int_equal(machine_init(&m, true), 0);
    struct irqchip *chip = irqchip_create(&m, 2, 1000000000);
    assert_non_null(chip);
    assert_ptr_equal(irqchip_find(&m), chip);
    struct vcpu v = {.m = &m, .lapic = irqchip_lapic(chip, 1),
                     .line = {.router = &m.irq, .gsi = LEVEL_GSI}, .lock = PTHREAD_MUTEX_INITIALIZER,
                     .cond = PTHREAD_COND_INITIALIZER};
    lapic_connect(v.lapic, signalled, &v);
    lapic_mmio_write(v.lapic, 0xf0, 0x1ff, 4);
    bus_write(&m.mmio, IOAPIC_BASE, 0x11 + 2 * LEVEL_GSI, 4);
    bus_write(&m.mmio, IOAPIC_BASE + 0x10, 1u << 24, 4);
    bus_write(&m.mmio, IOAPIC_BASE, 0x10 + 2 * LEVEL_GSI, 4);
    bus_write(&m.mmio, IOAPIC_BASE + 0x10, 1u << 15 | LEVEL_VECTOR, 4);

    pthread_t vcpu, thread[SENDERS + 1];
    struct sender sender[SENDERS + 1];
    pthread_create(&vcpu, NULL, run_vcpu, &v);
    for (unsigned i = 0; i <= SENDERS; i++) {
        /* One class for all, and one of its own for the line. */
        sender[i] = (struct sender){&m, &v, (uint8_t)(i < SENDERS ? 0x41 + i : LEVEL_VECTOR)};
        pthread_create(&thread[i], NULL, i < SENDERS ? send_msis : raise_line, &sender[i]);
    }
    for (unsigned i = 0; i <= SENDERS; i++) {
        void *failed;
        pthread_join(thread[i], &failed);
        assert_null(failed);
    }
    for (unsigned i = 0; i < SENDERS; i++)
        assert_int_equal(v.got[0x41 + i], ROUNDS);
    assert_int_equal(v.got[LEVEL_VECTOR], ROUNDS);
    v.stop = true;
    signalled(&v, LAPIC_INTR, 0);
    pthread_join(vcpu, NULL);
    assert_int_equal(lapic_pending(v.lapic), -1);
    machine_destroy(&m);
}

/* Moves the clock, and so fires the timers, while the vCPU arms one again and again. */
static void *fire_timers(void *opaque)
{
    struct sender *s = opaque;
    for (unsigned i = 0; i < ROUNDS; i++) {
        pthread_mutex_lock(&s->m->lock);
        clock_advance(s->m->clock, 1000);
        pthread_mutex_unlock(&s->m->lock);
    }
    return NULL;
}

static void a_timer_that_moves_fires_not_too_early(void **state)
{
    struct machine m;
    assert_int_equal(machine_init(&m, true), 0);
    struct irqchip *chip = irqchip_create(&m, 1, 1000000000);
    assert_non_null(chip);
    struct lapic *l = irqchip_lapic(chip, 0);
    lapic_mmio_write(l, 0xf0, 0x1ff, 4);
    lapic_mmio_write(l, 0x320, 0x40040, 4);
    struct sender s = {&m, NULL, 0};
    pthread_t thread;
    pthread_create(&thread, NULL, fire_timers, &s);
    /* Always a tick ahead of the clock's end: what goes off now was armed for a time that had come. */
    uint64_t end = UINT64_C(1000) * ROUNDS, deadline = 0;
    for (unsigned i = 0; i < ROUNDS; i++) {
        uint64_t now = clock_now(m.clock);
        deadline = i % 2 ? end + 1000 : now + 500;
        lapic_set_tsc_deadline(l, deadline, now);
        if (i % 2) {
            lapic_ack(l);
            lapic_mmio_write(l, 0xb0, 0, 4);
            assert_true(clock_now(m.clock) <= end);
            assert_int_equal(lapic_pending(l), -1);
            assert_int_equal(lapic_tsc_deadline(l), deadline);
        }
    }
    pthread_join(thread, NULL);
    assert_int_equal(lapic_pending(l), -1);
    pthread_mutex_lock(&m.lock);
    clock_advance(m.clock, 2000);
    pthread_mutex_unlock(&m.lock);
    assert_int_equal(lapic_ack(l), 0x40);
    machine_destroy(&m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(no_interrupt_is_lost),
        cmocka_unit_test(a_timer_that_moves_fires_not_too_early),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
