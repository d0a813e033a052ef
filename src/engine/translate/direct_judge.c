/*
 * Whether user code runs natively, and on which processor: judged by how long it runs before it comes out, and by how much of the processor
 * it gets. Figures are in ticks of the host's TSC, constants in µs.
 */
#include <x86intrin.h>

#include "base/clock.h"
#include "base/util.h"
#include "engine/translate/direct_internal.h"

/* ---- what a switch costs ---- */

/*
 * Some 6 µs; but many times as much where the host is itself a guest, or somebody traces or profiles us. So it is measured again and
 * again, for what it is: a trip into the sandbox that does nothing. The better of two, for others interrupt us.
 */
static void measure_switch(struct direct *d, struct direct_space *s)
{
    uint64_t first = sandbox_trip(s->box), second = sandbox_trip(s->box);

    s->switch_cost = MIN(first, second);
    if (s->cpuid_stops)
        return;
    d->switch_cost = s->switch_cost;
    d->measured = __rdtsc();
}

static void guess_switch(struct direct *d) { d->switch_cost = 6 * d->tick; }

void direct_judge_begin(struct direct *d)
{
    d->tick = MAX(tsc_frequency_hz() / 1000000, 1ul);
    guess_switch(d);
}

/* ---- processors ---- */

/*
 * The vCPU's thread and the sandbox take turns, so they belong on one processor: to wake an idle one costs twenty times as much as to
 * switch. The scheduler does not see that, so both are bound to one, and to the next if they do not get enough of it.
 */
static void bind_thread(struct direct *d, int processor)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    CPU_SET(processor, &set);
    if (sched_setaffinity(0, sizeof(set), &set) == 0) {
        d->bound = true;
        d->processor = processor;
    }
}

void direct_unbind(struct direct *d)
{
    if (d->bound)
        sched_setaffinity(0, sizeof(d->allowed), &d->allowed);
    d->bound = false;
}

void direct_bind(struct direct *d, struct direct_space *s)
{
    cpu_set_t set;

    if (!d->bound) {
        int now = sched_getcpu();

        if (CPU_COUNT(&d->allowed) < 2 || now < 0 || now >= CPU_SETSIZE)
            return;
        bind_thread(d, now);
    }
    if (!d->bound || s->processor == d->processor)
        return;
    CPU_ZERO(&set);
    CPU_SET(d->processor, &set);
    if (sched_setaffinity(sandbox_pid(s->box), sizeof(set), &set) == 0)
        s->processor = d->processor;
    d->watched_ran = d->watched_runs = 0;
    d->watched_time = sandbox_time(s->box);
}

/* Every 20 ms: has it got the processor that it ran on, or does somebody else have half of it? */
void direct_judge_processor(struct direct *d, struct direct_space *s)
{
    uint64_t ran = d->watched_ran * 1000 / d->tick, had;
    int next;

    if (ran < 20000000)
        return;
    had = sandbox_time(s->box) - d->watched_time;
    d->watched_time += had;
    had += d->watched_runs * s->switch_cost * 1000 / d->tick;
    d->watched_ran = d->watched_runs = 0;
    /* By lot, or two vCPUs on one processor would move together. */
    if (!d->bound || had > ran - ran / 4 || (__rdtsc() >> 5 & 1))
        return;
    for (next = (d->processor + 1) % CPU_SETSIZE; !CPU_ISSET(next, &d->allowed); next = (next + 1) % CPU_SETSIZE)
        ;
    bind_thread(d, next);
    direct_bind(d, s);
}

/* ---- whether it pays ---- */

#define TRIAL 20000u            /* µs of user code by translation after which it may be */
#define WINDOW 256u             /* stops that are judged together */
#define DETOURS_MAX 500u        /* a program asks for the processor's features when it starts, and that is that */
#define DETOUR 4u               /* stops that an excursion of the interpreter's counts as */
#define BACKOFF_MIN 50000u

/* How long user code has to run between two entries of the kernel, on average: by translation to begin, and natively to go on. */
static uint64_t long_stay(const struct direct *d) { return d->switch_cost * 10 / 3; }
static uint64_t worth(const struct direct_space *s) { return s->switch_cost * 2 / 3; }
/* Longer than this it may have been others that ran: where they take turns with us, no single time is to decide. */
static uint64_t believed(uint64_t ran, uint64_t switch_cost) { return MIN(ran, switch_cost * 64); }

static void begin_window(struct direct_space *s) { s->ran = s->switches = s->stops = s->detours = 0; }

void direct_demote(struct direct *d, struct direct_space *s, uint64_t now, uint64_t backoff)
{
    s->backoff = backoff;
    s->not_before = now + backoff * d->tick;
    begin_window(s);
    d->t->native_space = NULL;
    d->demotions++;
}

void direct_judge(struct direct *d, struct direct_space *s, uint64_t ran, uint64_t now, bool first)
{
    d->ticks += ran;
    d->watched_ran += ran;
    d->watched_runs++;
    if (!s->switch_cost)
        measure_switch(d, s);
    s->ran += believed(ran, s->switch_cost);
    s->switches++;
    if (first || d->always || ++s->stops < WINDOW)
        return;
    measure_switch(d, s);
    if (s->ran < s->switches * s->switch_cost + s->stops * worth(s)) {
        if (s->detours * DETOUR > s->stops / 2 && !s->lingers) {
            s->all_detours += s->detours;
            s->lingers = s->all_detours > DETOURS_MAX;
            begin_window(s);
            return;
        }
        direct_demote(d, s, now, MIN(MAX(s->backoff * 2, BACKOFF_MIN), DIRECT_BACKOFF_MAX));
        return;
    }
    if (s->backoff)
        s->backoff /= 2;
    begin_window(s);
}

static bool wanted(struct direct *d, uint64_t now)
{
    struct direct_space *s = direct_space_now(d);

    if (d->always)
        return direct_eligible(d);
    return s->average > long_stay(d) && s->total > TRIAL * d->tick && now >= s->not_before && direct_eligible(d);
}

void direct_entered(struct translator *t, bool user)
{
    struct direct *d = t->direct;
    struct direct_space *s = direct_space_now(d);
    uint64_t now = __rdtsc();

    if (user) {
        uint64_t root = direct_root(d);

        if (s->judged_root != root) {
            s->judged_root = root;
            s->total = s->average = s->backoff = s->not_before = 0;
            s->all_detours = 0;
            begin_window(s);
        }
        /* Before it is measured there, a program has to begin. */
        if (now > d->measured + DIRECT_BACKOFF_MAX * d->tick)
            guess_switch(d);
        d->entered = now;
        d->t->native_space = wanted(d, now) ? t->it.cpu.space : NULL;
        if (!d->t->native_space)
            direct_unbind(d);
    } else if (d->entered) {
        uint64_t stay = now - d->entered;

        d->entered = 0;
        s->total += stay;
        stay = believed(stay, d->switch_cost);
        s->average += (int64_t)(stay - s->average) / 8;
    }
}

void direct_judge_detour(struct direct_space *s)
{
    s->stops += DETOUR;
    s->detours++;
}

/*
 * The interpreter has been busy in one page that must not run natively. If that is because of CPUID, switching may become dearer
 * instead; else the translator is faster.
 */
void direct_lingers(struct translator *t)
{
    struct direct_space *s = direct_space_now(t->direct);

    if (s->cpuid_stops || s->lingers)
        direct_demote(t->direct, s, __rdtsc(), MIN(MAX(s->backoff * 2, BACKOFF_MIN), DIRECT_BACKOFF_MAX));
    s->lingers = true;
}
