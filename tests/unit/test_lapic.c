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

/* ---- LAPICs that are somebody else's ---- */

static struct {
    unsigned sent, pulses, routes;
    uint64_t address;
    uint32_t data;
    bool level;
} host_saw;

static unsigned host_send(void *opaque, uint64_t address, uint32_t data)
{
    host_saw.sent++;
    host_saw.address = address;
    host_saw.data = data;
    return 1;
}

static void host_pulse(void *opaque) { host_saw.pulses++; }

static void host_route(void *opaque, unsigned input, uint64_t address, uint32_t data, bool level)
{
    host_saw.routes++;
    if (input == LEVEL_GSI) {
        host_saw.address = address;
        host_saw.data = data;
        host_saw.level = level;
    }
}

static void ioapic_write(struct machine *m, unsigned index, uint32_t value)
{
    bus_write(&m->mmio, IOAPIC_BASE, index, 4);
    bus_write(&m->mmio, IOAPIC_BASE + 0x10, value, 4);
}

static void a_host_gets_what_is_sent_while_it_has_the_state(void **state)
{
    static const struct lapic_host host = {.send = host_send, .pulse_lint1 = host_pulse, .route = host_route};
    struct machine m;
    struct irq_line line = {.router = &m.irq, .gsi = LEVEL_GSI};
    assert_int_equal(machine_init(&m, true), 0);
    struct irqchip *chip = irqchip_create(&m, 2, 1000000000);
    struct lapic *l = irqchip_lapic(chip, 1);
    lapic_mmio_write(l, 0xf0, 0x1ff, 4);

    irqchip_set_host(chip, &host);
    assert_int_equal(host_saw.routes, IOAPIC_INPUTS);
    /* The state is here: so are the interrupts. */
    irqchip_msi(chip, LAPIC_DEFAULT_BASE | 1 << 12, 0x55);
    assert_int_equal(host_saw.sent, 0);
    assert_int_equal(lapic_pending(l), 0x55);
    assert_false(irqchip_move_begin(chip));
    irqchip_move_end(chip, true);
    irqchip_msi(chip, LAPIC_DEFAULT_BASE | 1 << 12, 0x56);
    assert_int_equal(host_saw.sent, 1);
    assert_int_equal(host_saw.address, LAPIC_DEFAULT_BASE | 1 << 12);
    assert_int_equal(host_saw.data, 0x56);
    assert_int_equal(lapic_pending(l), 0x55);
    irqchip_pulse_lint1(chip);
    assert_int_equal(host_saw.pulses, 1);

    /* A level-triggered input: the route first, and nothing again before the end of the interrupt. */
    ioapic_write(&m, 0x11 + 2 * LEVEL_GSI, 1u << 24);
    ioapic_write(&m, 0x10 + 2 * LEVEL_GSI, 1u << 15 | LEVEL_VECTOR);
    assert_true(host_saw.level);
    assert_int_equal(host_saw.address, LAPIC_DEFAULT_BASE | 1 << 12);
    assert_int_equal(host_saw.data, 3u << 14 | LEVEL_VECTOR);
    unsigned routes = host_saw.routes;
    ioapic_write(&m, 0x10 + 2 * LEVEL_GSI, 1u << 16 | 1u << 15 | LEVEL_VECTOR);
    ioapic_write(&m, 0x10 + 2 * LEVEL_GSI, 1u << 15 | LEVEL_VECTOR);
    assert_int_equal(host_saw.routes, routes);      /* a mask is no other route */
    pthread_mutex_lock(&m.lock);
    irq_set(&line, true);
    assert_int_equal(host_saw.sent, 2);
    irq_set(&line, false);
    irq_set(&line, true);
    assert_int_equal(host_saw.sent, 2);
    irqchip_eoi(chip, LEVEL_VECTOR);
    assert_int_equal(host_saw.sent, 3);
    pthread_mutex_unlock(&m.lock);

    irqchip_set_host(chip, NULL);
    irqchip_msi(chip, LAPIC_DEFAULT_BASE | 1 << 12, 0x66);
    assert_int_equal(host_saw.sent, 3);
    assert_int_equal(lapic_pending(l), 0x66);
    machine_destroy(&m);
}

/* Out of one LAPIC and into another: what is pending and the timer go on. */
static void state_moves(void **state)
{
    for (unsigned mode = 0; mode < 3; mode++) {
        struct machine m;
        struct lapic_image image, again;
        assert_int_equal(machine_init(&m, true), 0);
        struct irqchip *chip = irqchip_create(&m, 1, 1000000000);
        struct lapic *l = irqchip_lapic(chip, 0);
        lapic_mmio_write(l, 0xf0, 0x1ff, 4);
        lapic_mmio_write(l, 0x80, 0x20, 4);
        lapic_mmio_write(l, 0x320, mode << 17 | 0x40, 4);
        lapic_mmio_write(l, 0x3e0, 0xb, 4);
        if (mode == 2)
            lapic_set_tsc_deadline(l, 1000, 0);
        else
            lapic_mmio_write(l, 0x380, 1000, 4);
        irqchip_msi(chip, LAPIC_DEFAULT_BASE, 0x55);
        lapic_ack(l);
        irqchip_msi(chip, LAPIC_DEFAULT_BASE, 0x70);
        pthread_mutex_lock(&m.lock);
        clock_advance(m.clock, 300);
        lapic_take(l, &image);
        clock_advance(m.clock, 5000);               /* nothing happens to what is not here */
        lapic_reset(l, false);
        lapic_put(l, &image, 300);
        assert_int_equal(lapic_pending(l), 0x70);
        lapic_take(l, &again);
        assert_memory_equal(&image, &again, sizeof(image));
        lapic_put(l, &again, 300);
        lapic_ack(l);
        lapic_mmio_write(l, 0xb0, 0, 4);
        lapic_mmio_write(l, 0xb0, 0, 4);
        assert_int_equal(lapic_pending(l), -1);
        clock_advance(m.clock, 699);
        assert_int_equal(lapic_pending(l), -1);
        clock_advance(m.clock, 1);
        assert_int_equal(lapic_ack(l), 0x40);
        lapic_mmio_write(l, 0xb0, 0, 4);
        clock_advance(m.clock, 60000);
        assert_int_equal(lapic_pending(l), mode == 1 ? 0x40 : -1);
        pthread_mutex_unlock(&m.lock);
        machine_destroy(&m);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(no_interrupt_is_lost),
        cmocka_unit_test(a_timer_that_moves_fires_not_too_early),
        cmocka_unit_test(a_host_gets_what_is_sent_while_it_has_the_state),
        cmocka_unit_test(state_moves),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
