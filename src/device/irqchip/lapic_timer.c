/*
 * The local APIC's timer: one-shot, periodic and TSC-deadline (SDM vol. 3A 11.5.4).
 *
 * The count is not kept but follows from the deadline in guest time, so nothing ticks while the
 * guest does not look. LAPIC lock held, but for the callback, which takes it.
 */
#include <errno.h>

#include "base/log.h"
#include "device/irqchip/internal.h"
#include "device/machine.h"

#define NEVER UINT64_MAX
/* A guest may ask for a tick each nanosecond; the host's loop does not follow below this. */
#define SHORTEST_PERIOD_NS 50000u

enum timer_mode { MODE_ONE_SHOT, MODE_PERIODIC, MODE_DEADLINE, MODE_RESERVED };

static enum timer_mode mode_of(uint32_t lvt) { return lvt >> 17 & 3; }

/* LAPIC_BUS_HZ is 1 GHz: one tick of the undivided clock is one nanosecond. */
static unsigned divide_shift(const struct lapic *l)
{
    uint32_t d = l->reg[LAPIC_TIMER_DIV];
    return ((d & 3) | (d >> 1 & 4)) == 7 ? 0 : ((d & 3) | (d >> 1 & 4)) + 1;
}

static void arm(struct lapic *l, uint64_t deadline)
{
    l->timer_deadline = deadline;
    timer_arm(l->chip->machine->clock, &l->timer, deadline);
}

void lapic_timer_stop(struct lapic *l)
{
    l->timer_deadline = NEVER;
    l->timer_period = 0;
    l->tsc_deadline = 0;
    timer_disarm(l->chip->machine->clock, &l->timer);
}

/* Machine lock held, loop thread. A vCPU may have stopped or moved the timer just now: look again. */
static void timer_fired(void *opaque)
{
    struct lapic *l = opaque;
    pthread_mutex_lock(&l->lock);
    uint64_t now = clock_now(l->chip->machine->clock);
    if (l->timer_deadline == NEVER) {
        pthread_mutex_unlock(&l->lock);
        return;
    }
    if (now < l->timer_deadline) {
        arm(l, l->timer_deadline);
        pthread_mutex_unlock(&l->lock);
        return;
    }
    if (mode_of(l->reg[LAPIC_LVT_TIMER]) == MODE_PERIODIC && l->timer_period) {
        /* Ticks that were missed are one tick; the phase stays. */
        uint64_t missed = (now - l->timer_deadline) / l->timer_period;
        uint64_t next = l->timer_deadline + (missed + 1) * l->timer_period;
        l->timer_deadline = next;
        timer_arm(l->chip->machine->clock, &l->timer, MAX(next, now + SHORTEST_PERIOD_NS));
    } else {
        l->timer_deadline = NEVER;
        l->tsc_deadline = 0;
    }
    bool changed = lapic_local(l, LAPIC_LVT_TIMER);
    pthread_mutex_unlock(&l->lock);
    lapic_tell(l, changed);
}

void lapic_timer_init(struct lapic *l)
{
    timer_init(&l->timer, timer_fired, l);
    l->timer_deadline = NEVER;
}

static void start_count(struct lapic *l)
{
    uint64_t ns = (uint64_t)l->reg[LAPIC_TIMER_INIT] << divide_shift(l);
    if (!ns) {
        lapic_timer_stop(l);
        return;
    }
    l->timer_period = mode_of(l->reg[LAPIC_LVT_TIMER]) == MODE_PERIODIC ? ns : 0;
    arm(l, clock_now(l->chip->machine->clock) + ns);
}

void lapic_timer_set_lvt(struct lapic *l, uint32_t value)
{
    enum timer_mode before = mode_of(l->reg[LAPIC_LVT_TIMER]), after = mode_of(value);
    l->reg[LAPIC_LVT_TIMER] = value;
    if (before == after)
        return;
    /* To or from TSC-deadline mode disarms (11.5.4.1); one-shot and periodic change over while they run. */
    if (before >= MODE_DEADLINE || after >= MODE_DEADLINE) {
        lapic_timer_stop(l);
        l->reg[LAPIC_TIMER_INIT] = 0;
    } else if (l->timer_deadline != NEVER) {
        l->timer_period =
            after == MODE_PERIODIC ? (uint64_t)l->reg[LAPIC_TIMER_INIT] << divide_shift(l) : 0;
    }
}

void lapic_timer_set_count(struct lapic *l, uint32_t value)
{
    if (mode_of(l->reg[LAPIC_LVT_TIMER]) >= MODE_DEADLINE)
        return;
    l->reg[LAPIC_TIMER_INIT] = value;
    start_count(l);
}

uint32_t lapic_timer_count(const struct lapic *l)
{
    if (l->timer_deadline == NEVER || mode_of(l->reg[LAPIC_LVT_TIMER]) >= MODE_DEADLINE)
        return 0;
    uint64_t now = clock_now(l->chip->machine->clock);
    uint64_t left = l->timer_deadline > now ? l->timer_deadline - now : 0;
    /* Late by more than a tick: the count has been reloaded already, though the interrupt is not there yet. */
    if (!left && l->timer_period)
        left = l->timer_period - (now - l->timer_deadline) % l->timer_period;
    uint64_t count = left >> divide_shift(l);
    return (uint32_t)MIN(count, l->reg[LAPIC_TIMER_INIT]);
}

void lapic_timer_set_divider(struct lapic *l, uint32_t value)
{
    uint32_t count = lapic_timer_count(l);
    l->reg[LAPIC_TIMER_DIV] = value & 0xb;
    if (l->timer_deadline == NEVER || mode_of(l->reg[LAPIC_LVT_TIMER]) >= MODE_DEADLINE)
        return;
    /* The count goes on from where it is, at the new rate. */
    if (l->timer_period)
        l->timer_period = (uint64_t)l->reg[LAPIC_TIMER_INIT] << divide_shift(l);
    arm(l, clock_now(l->chip->machine->clock) + ((uint64_t)count << divide_shift(l)));
}

uint64_t lapic_tsc_deadline(struct lapic *l)
{
    pthread_mutex_lock(&l->lock);
    uint64_t deadline = l->tsc_deadline;
    pthread_mutex_unlock(&l->lock);
    return deadline;
}

/* deadline lies ahead. */
static void arm_tsc_deadline(struct lapic *l, uint64_t deadline, uint64_t guest_tsc_now)
{
    unsigned __int128 ns = (unsigned __int128)(deadline - guest_tsc_now) * 1000000000u;
    ns = (ns + l->chip->tsc_hz - 1) / l->chip->tsc_hz;
    l->tsc_deadline = deadline;
    /* Centuries away is as good as never, but it still counts as armed. */
    arm(l, ns > INT64_MAX / 2 ? INT64_MAX : clock_now(l->chip->machine->clock) + (uint64_t)ns);
}

void lapic_timer_continue(struct lapic *l, uint32_t count, uint64_t tsc_deadline, uint64_t guest_tsc_now)
{
    enum timer_mode mode = mode_of(l->reg[LAPIC_LVT_TIMER]);
    if (mode == MODE_DEADLINE && tsc_deadline) {
        arm_tsc_deadline(l, tsc_deadline, MIN(guest_tsc_now, tsc_deadline));
    } else if (mode <= MODE_PERIODIC && l->reg[LAPIC_TIMER_INIT]) {
        if (mode == MODE_PERIODIC)
            l->timer_period = (uint64_t)l->reg[LAPIC_TIMER_INIT] << divide_shift(l);
        arm(l, clock_now(l->chip->machine->clock) + ((uint64_t)count << divide_shift(l)));
    }
}

void lapic_set_tsc_deadline(struct lapic *l, uint64_t deadline, uint64_t guest_tsc_now)
{
    bool changed = false;
    pthread_mutex_lock(&l->lock);
    if (mode_of(l->reg[LAPIC_LVT_TIMER]) == MODE_DEADLINE) {
        if (!deadline) {
            lapic_timer_stop(l);
        } else if (deadline <= guest_tsc_now) {
            lapic_timer_stop(l);
            changed = lapic_local(l, LAPIC_LVT_TIMER);
        } else {
            arm_tsc_deadline(l, deadline, guest_tsc_now);
        }
    }
    pthread_mutex_unlock(&l->lock);
    lapic_tell(l, changed);
}

void lapic_timer_save(struct lapic *l, struct state_writer *w)
{
    uint64_t now = clock_now(l->chip->machine->clock);
    bool running = l->timer_deadline != NEVER;
    uint64_t left = running && l->timer_deadline > now ? l->timer_deadline - now : 0;
    state_put_u64(w, "tsc_deadline", l->tsc_deadline);
    state_put_u64(w, "timer_running", running);
    state_put_u64(w, "timer_left_ns", left);
    state_put_u64(w, "timer_period_ns", l->timer_period);
}

int lapic_timer_load(struct lapic *l, const struct state_reader *r)
{
    uint64_t tsc_deadline, running, left, period;
    if (state_get_u64(r, "tsc_deadline", &tsc_deadline) ||
        state_get_u64(r, "timer_running", &running) || state_get_u64(r, "timer_left_ns", &left) ||
        state_get_u64(r, "timer_period_ns", &period) || left > INT64_MAX ||
        period > UINT64_C(1) << 39) {
        log_error("saved LAPIC %u: the timer's fields are missing or absurd", l->id);
        return -EINVAL;
    }
    lapic_timer_stop(l);
    if (running) {
        l->tsc_deadline = tsc_deadline;
        l->timer_period = period;
        arm(l, MIN(clock_now(l->chip->machine->clock) + left, (uint64_t)INT64_MAX));
    }
    return 0;
}
