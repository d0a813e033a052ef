/*
 * Model-specific registers, by number, for RDMSR and WRMSR and for whoever moves a vCPU between engines.
 * SDM vol. 4; AMD APM vol. 2 app. A; KVM's para-virtual ones: Linux, virt/kvm/x86/msr. In the vCPU's thread.
 */
#ifndef RINGFORT_ISA_X86_MSR_H
#define RINGFORT_ISA_X86_MSR_H

#include <stdint.h>

struct x86_cpu;

/* 0, or -EINVAL when RDMSR raises #GP: no such register. */
int x86_msr_read(struct x86_cpu *cpu, uint32_t msr, uint64_t *value);
/* 0, or -EINVAL when WRMSR raises #GP: no such register, read-only, reserved bits, or not in this mode. */
int x86_msr_write(struct x86_cpu *cpu, uint32_t msr, uint64_t value);

#endif
