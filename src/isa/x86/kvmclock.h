/*
 * KVM's para-virtual clock: the guest registers a page, and finds there how to make nanoseconds of its TSC.
 * Linux, Documentation/virt/kvm/x86/msr.rst and cpuid.rst (MSR_KVM_WALL_CLOCK_NEW, MSR_KVM_SYSTEM_TIME_NEW).
 */
#ifndef RINGFORT_ISA_X86_KVMCLOCK_H
#define RINGFORT_ISA_X86_KVMCLOCK_H

#include <stdbool.h>
#include <stdint.h>

struct x86_cpu;

struct machine;

/*
 * The counter that guest TSCs are offsets to, at a rate of hz: the host's, scaled if its rate is another; for a manual clock
 * one that stands still with it. Any thread.
 */
uint64_t x86_tsc_base(const struct machine *m, uint64_t hz);
/* Whether that is the host's counter as RDTSC gives it. */
bool x86_tsc_is_host(const struct machine *m, uint64_t hz);
uint64_t x86_tsc_ticks(uint64_t ns, uint64_t hz);
/*
 * What the guest's clock says at this value of the counter; and making it say ns there (for all vCPUs, whose pages
 * x86_kvmclock_update() then has to write anew). Any thread.
 */
uint64_t x86_kvmclock_at(const struct machine *m, uint64_t base_tsc, uint64_t hz);
void x86_kvmclock_set(const struct machine *m, uint64_t base_tsc, uint64_t ns);

/* WRMSR of the two registers, in the vCPU's thread: 0, or -EINVAL (#GP): not in RAM, reserved bits. */
int x86_kvmclock_set_wall_clock(struct x86_cpu *cpu, uint64_t value);
int x86_kvmclock_set_system_time(struct x86_cpu *cpu, uint64_t value);
/*
 * Writes the vCPU's time page anew, if it has one: after the TSC was moved, after a pause, after loading. The vCPU is
 * stopped, or the caller is its thread. All vCPUs of the machine need it then.
 */
void x86_kvmclock_update(struct x86_cpu *cpu);

#endif
