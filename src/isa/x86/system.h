/*
 * The instructions that are not plain computing: what x86_system_semantics() chooses from, and what
 * its files share. Functions follow the calling convention at the top of cpu.h.
 */
#ifndef RINGFORT_ISA_X86_SYSTEM_H
#define RINGFORT_ISA_X86_SYSTEM_H

#include "isa/x86/cpu.h"

#define X86_LIST_OF_SYSTEM_INSNS(X) \
    /* control.c */ \
    X(mov_from_cr) X(mov_to_cr) X(mov_from_dr) X(mov_to_dr) X(clts) X(lmsw) X(smsw) X(xgetbv) X(xsetbv) \
    /* flags.c */ \
    X(pushf) X(popf) X(cli) X(sti) X(stac) X(clac) \
    /* descriptor.c */ \
    X(sgdt) X(sidt) X(lgdt) X(lidt) X(sldt) X(str) X(lldt) X(ltr) X(lar) X(lsl) X(verr) X(verw) X(arpl) \
    X(mov_from_seg) X(mov_to_seg) X(push_seg) X(pop_seg) X(load_far_pointer) \
    X(rdfsbase) X(rdgsbase) X(wrfsbase) X(wrgsbase) X(swapgs) \
    /* system.c */ \
    X(hlt) X(cpuid) X(rdtsc) X(rdtscp) X(rdpid) X(rdpmc) X(rdmsr) X(wrmsr) X(invlpg) X(invpcid) X(cache_all) \
    X(cache_line) X(clzero) X(prefetch) X(hypercall) X(rdrand) X(rdseed) X(enter) X(bound) X(undefined) \
    /* io.c */ \
    X(in) X(out) X(ins) X(outs) \
    /* xsave.c */ \
    X(fxsave) X(fxrstor) X(xsave) X(xsaveopt) X(xsavec) X(xsaves) X(xrstor) X(xrstors)

#define DECLARE(name) x86_semantics_fn x86_insn_##name;
X86_LIST_OF_SYSTEM_INSNS(DECLARE)
#undef DECLARE

/* #GP(0) unless at privilege level 0. */
static inline void x86_require_cpl0(struct x86_cpu *cpu)
{
    if (cpu->cpl != 0)
        x86_raise_error(cpu, X86_GP, 0);
}

/* Protected mode proper: neither real-address nor virtual-8086 mode. Else instructions on selectors are #UD. */
static inline bool x86_in_protected_mode(const struct x86_cpu *cpu)
{
    return (cpu->s.cr0 & CR0_PE) && !(cpu->s.rflags & RFLAGS_VM);
}

static inline bool x86_in_v86(const struct x86_cpu *cpu)
{
    return (cpu->s.rflags & RFLAGS_VM) != 0;
}

static inline unsigned x86_iopl(const struct x86_cpu *cpu)
{
    return (unsigned)(cpu->s.rflags & RFLAGS_IOPL) >> 12;
}

/* Reads the source operand i, a register or memory, at the given size. */
static inline uint64_t x86_read_operand(struct x86_cpu *cpu, const struct x86_insn *insn, unsigned i, unsigned size)
{
    const struct x86_operand *o = &insn->operand[i];
    gva_t va;

    if (o->kind == OPERAND_GPR)
        return x86_get_gpr(cpu, o->reg, size);
    va = x86_linear(cpu, insn, size, false);
    return size == 8 ? x86_read64(cpu, va) : size == 4 ? x86_read32(cpu, va) : size == 2 ? x86_read16(cpu, va)
                                                                                        : x86_read8(cpu, va);
}

/* The TSC as this vCPU's guest reads it now. */
uint64_t x86_guest_tsc(const struct x86_cpu *cpu);

/* Control registers by other ways than MOV (boot loaders, LMSW). Raise #GP(0) for illegal values. */
void x86_write_cr0(struct x86_cpu *cpu, uint64_t value);
void x86_write_cr3(struct x86_cpu *cpu, uint64_t value);
void x86_write_cr4(struct x86_cpu *cpu, uint64_t value);
/* Bits of CR4 that this vCPU's model has. */
uint64_t x86_cr4_allowed(const struct x86_cpu *cpu);

#endif
