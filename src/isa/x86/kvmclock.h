/*
 * KVM's para-virtual clock: the guest registers a page, and finds there how to make nanoseconds of its TSC.
 * Linux, Documentation/virt/kvm/x86/msr.rst and cpuid.rst (MSR_KVM_WALL_CLOCK_NEW, MSR_KVM_SYSTEM_TIME_NEW).
 */
#ifndef RINGFORT_ISA_X86_KVMCLOCK_H
#define RINGFORT_ISA_X86_KVMCLOCK_H

#include <stdint.h>

struct x86_cpu;

/* WRMSR of the two registers, in the vCPU's thread: 0, or -EINVAL (#GP): not in RAM, reserved bits. */
int x86_kvmclock_set_wall_clock(struct x86_cpu *cpu, uint64_t value);
int x86_kvmclock_set_system_time(struct x86_cpu *cpu, uint64_t value);
/*
 * Writes the vCPU's time page anew, if it has one: after the TSC was moved, after a pause, after loading. The vCPU is
 * stopped, or the caller is its thread. All vCPUs of the machine need it then.
 */
void x86_kvmclock_update(struct x86_cpu *cpu);

#endif
