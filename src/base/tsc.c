/*
 * The host's time stamp counter and its rate.
 *
 * The rate is measured against CLOCK_MONOTONIC_RAW: a counter value and a time belong together
 * as well as the time spent between two counter reads around the clock read, so the tightest of
 * several pairs is used, and the two pairs are taken far enough apart that what is left is below 50
 * ppm. A program that takes the first pair when it starts (tsc_frequency_begin()) need not wait when it asks.
 */
#include <pthread.h>
#include <time.h>

#include "base/clock.h"
#include "base/util.h"

#if defined(__x86_64__)
#include <x86intrin.h>
#elif !defined(__aarch64__)
#error "no time stamp counter is known for this host"
#endif

uint64_t tsc_read(void)
{
#if defined(__x86_64__)
    return __rdtsc();
#else
    uint64_t v;
    __asm__ volatile("mrs %0, cntvct_el0" : "=r"(v));
    return v;
#endif
}

static uint64_t tsc_hz;

#if defined(__x86_64__)

struct sample {
    uint64_t tsc, ns;
    uint64_t width; /* counter ticks that reading the clock took */
};

static uint64_t raw_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC_RAW, &ts);
    return (uint64_t)ts.tv_sec * 1000000000 + (uint64_t)ts.tv_nsec;
}

static struct sample tightest_sample(void)
{
    struct sample best = {.width = UINT64_MAX};
    for (unsigned i = 0; i < 64; i++) {
        _mm_lfence();
        uint64_t before = __rdtsc();
        _mm_lfence();
        uint64_t ns = raw_ns();
        _mm_lfence();
        uint64_t after = __rdtsc();
        if (after - before < best.width)
            best = (struct sample){
                .tsc = before + (after - before) / 2, .ns = ns, .width = after - before};
    }
    return best;
}

static struct sample first;
static pthread_once_t begun = PTHREAD_ONCE_INIT;

static void begin(void)
{
    first = tightest_sample();
}

void tsc_frequency_begin(void)
{
    pthread_once(&begun, begin);
}

static void measure(void)
{
    const uint64_t shortest = 5000000, longest = 100000000;
    tsc_frequency_begin();
    const struct sample a = first;
    for (;;) {
        struct sample b = tightest_sample();
        uint64_t elapsed = b.ns - a.ns, ticks = b.tsc - a.tsc;
        /* The error is at most half of both widths; 1/25000 is 40 ppm. */
        if (elapsed >= shortest && ((a.width + b.width) / 2 <= ticks / 25000 || elapsed >= longest)) {
            tsc_hz = (uint64_t)((unsigned __int128)ticks * 1000000000 / elapsed);
            return;
        }
        struct timespec pause = {.tv_nsec = elapsed < shortest ? (long)(shortest - elapsed) : 1000000};
        nanosleep(&pause, NULL);
    }
}

#else

void tsc_frequency_begin(void)
{
}

static void measure(void)
{
    __asm__ volatile("mrs %0, cntfrq_el0" : "=r"(tsc_hz));
}

#endif

uint64_t tsc_frequency_hz(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, measure);
    return tsc_hz;
}
