/*
 * The guest TSC, and KVM's clock made from it.
 *
 * The clock page says "stable": guest time is one linear function of the TSC on all vCPUs, so a program may read
 * any vCPU's page. Therefore every page of a machine is computed from one anchor, a pair of TSC and
 * clock_now() taken together, and not from two clocks read anew for each vCPU.
 * In the vCPU's thread, or while it is stopped; the anchor has a lock of its own.
 */
#include "isa/x86/kvmclock.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include "base/clock.h"
#include "device/machine.h"
#include "isa/x86/system.h"

#define NS_PER_S 1000000000ull
#define ENABLED 1ull
#define TSC_STABLE 1u
/* How far clock_now() may have strayed from the anchor before a pause must have been the cause. */
#define STRAY_NS 5000000ull
#define SAME_RATE 5000          /* 200 ppm */
#define STRAY_PER_ELAPSED 10000ull      /* plus 100 ppm of the time since */

/* Guest memory layout: struct pvclock_vcpu_time_info and struct pvclock_wall_clock. */
struct time_page {
    uint32_t version, pad0;
    uint64_t tsc_timestamp;
    uint64_t system_time;
    uint32_t tsc_to_system_mul;
    int8_t tsc_shift;
    uint8_t flags;
    uint8_t pad[2];
};
_Static_assert(sizeof(struct time_page) == 32, "the guest reads this");

struct wall_clock {
    uint32_t version, sec, nsec;
};

uint64_t x86_tsc_ticks(uint64_t ns, uint64_t hz)
{
    return (uint64_t)((unsigned __int128)ns * hz / NS_PER_S);
}

/* The rate that the guest knows may be another host's; but two measurements of one counter differ a little, too. */
static bool is_host_rate(uint64_t hz)
{
    uint64_t host_hz = tsc_frequency_hz();

    return (hz > host_hz ? hz - host_hz : host_hz - hz) <= host_hz / SAME_RATE;
}

bool x86_tsc_is_host(const struct machine *m, uint64_t hz)
{
    return !(m != NULL && clock_is_manual(m->clock)) && is_host_rate(hz);
}

uint64_t x86_tsc_base(const struct machine *m, uint64_t hz)
{
    if (m != NULL && clock_is_manual(m->clock))
        return x86_tsc_ticks(clock_now(m->clock), hz);
    return is_host_rate(hz) ? tsc_read() : (uint64_t)((unsigned __int128)tsc_read() * hz / tsc_frequency_hz());
}

static uint64_t base_tsc(const struct x86_cpu *cpu)
{
    return x86_tsc_base(cpu->machine, cpu->tsc_hz);
}

uint64_t x86_guest_tsc(const struct x86_cpu *cpu)
{
    return base_tsc(cpu) + cpu->s.tsc_offset;
}

static struct {
    pthread_mutex_t lock;
    const struct machine *machine;
    uint64_t tsc, ns;
} anchor = { .lock = PTHREAD_MUTEX_INITIALIZER };

static uint64_t ticks_to_ns(uint64_t ticks, uint64_t hz)
{
    return (uint64_t)((unsigned __int128)ticks * NS_PER_S / hz);
}

/* The machine's anchor: taken at first use, and anew when time stood still since (a pause). */
static void get_anchor(const struct x86_cpu *cpu, uint64_t *tsc, uint64_t *ns)
{
    uint64_t now_tsc, now_ns, elapsed, expected, stray;

    pthread_mutex_lock(&anchor.lock);
    now_tsc = base_tsc(cpu);
    now_ns = clock_now(cpu->machine->clock);
    elapsed = ticks_to_ns(now_tsc - anchor.tsc, cpu->tsc_hz);
    expected = anchor.ns + elapsed;
    stray = now_ns > expected ? now_ns - expected : expected - now_ns;
    if (anchor.machine != cpu->machine || now_tsc < anchor.tsc || stray > STRAY_NS + elapsed / STRAY_PER_ELAPSED) {
        anchor.machine = cpu->machine;
        anchor.tsc = now_tsc;
        anchor.ns = now_ns;
    }
    *tsc = anchor.tsc;
    *ns = anchor.ns;
    pthread_mutex_unlock(&anchor.lock);
}

uint64_t x86_kvmclock_at(const struct machine *m, uint64_t base_tsc, uint64_t hz)
{
    uint64_t ns = clock_now(m->clock);

    pthread_mutex_lock(&anchor.lock);
    if (anchor.machine == m && base_tsc >= anchor.tsc)
        ns = anchor.ns + ticks_to_ns(base_tsc - anchor.tsc, hz);
    pthread_mutex_unlock(&anchor.lock);
    return ns;
}

void x86_kvmclock_set(const struct machine *m, uint64_t base_tsc, uint64_t ns)
{
    pthread_mutex_lock(&anchor.lock);
    anchor.machine = m;
    anchor.tsc = base_tsc;
    anchor.ns = ns;
    pthread_mutex_unlock(&anchor.lock);
}

/* ns = (ticks shifted left by shift) * mul >> 32, with mul as precise as 32 bits hold. */
static void scale(uint64_t hz, uint32_t *mul, int8_t *shift)
{
    for (int s = -31; s <= 31; s++) {
        unsigned __int128 m = ((unsigned __int128)NS_PER_S << (32 - s)) / hz;

        if (m >> 32 == 0) {
            *mul = (uint32_t)m;
            *shift = (int8_t)s;
            return;
        }
    }
    *mul = 0;
    *shift = 0;
}

static int write_page(struct x86_cpu *cpu, gpa_t gpa)
{
    struct time_page page = { .flags = TSC_STABLE };
    uint32_t version;
    int r;

    if (cpu->machine == NULL || memory_read(cpu->mem, gpa, &version, sizeof(version)) < 0)
        return -EINVAL;
    /* An odd version means "being written". */
    page.version = version | 1;
    get_anchor(cpu, &page.tsc_timestamp, &page.system_time);
    page.tsc_timestamp += cpu->s.tsc_offset;
    scale(cpu->tsc_hz, &page.tsc_to_system_mul, &page.tsc_shift);
    r = memory_write(cpu->mem, gpa, &page.version, sizeof(page.version));
    atomic_thread_fence(memory_order_seq_cst);
    if (r == 0)
        r = memory_write(cpu->mem, gpa + 4, &page.pad0, sizeof(page) - 4);
    atomic_thread_fence(memory_order_seq_cst);
    page.version++;
    if (r == 0)
        r = memory_write(cpu->mem, gpa, &page.version, sizeof(page.version));
    return r < 0 ? -EINVAL : 0;
}

int x86_kvmclock_set_system_time(struct x86_cpu *cpu, uint64_t value)
{
    if (value & 2)
        return -EINVAL;
    if ((value & ENABLED) && write_page(cpu, value & ~ENABLED) < 0)
        return -EINVAL;
    cpu->s.kvm_system_time = value;
    return 0;
}

void x86_kvmclock_update(struct x86_cpu *cpu)
{
    if (cpu->s.kvm_system_time & ENABLED)
        write_page(cpu, cpu->s.kvm_system_time & ~ENABLED);
}

int x86_kvmclock_set_wall_clock(struct x86_cpu *cpu, uint64_t value)
{
    struct wall_clock wall;
    uint64_t ns, boot_ns;

    if (cpu->machine == NULL || memory_read(cpu->mem, value, &wall, sizeof(wall)) < 0)
        return -EINVAL;
    ns = clock_now(cpu->machine->clock);
    boot_ns = clock_wall_ns(cpu->machine->clock) - ns;
    wall.version = (wall.version | 1) + 1;
    wall.sec = (uint32_t)(boot_ns / NS_PER_S);
    wall.nsec = (uint32_t)(boot_ns % NS_PER_S);
    if (memory_write(cpu->mem, value, &wall, sizeof(wall)) < 0)
        return -EINVAL;
    cpu->s.kvm_wall_clock = value;
    return 0;
}
