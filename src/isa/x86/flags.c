/*
 * PUSHF, POPF, CLI, STI, STAC, CLAC: the instructions on RFLAGS that privilege bears on.
 * SDM vol. 2; virtual-8086 mode extensions (VME, PVI) are not offered. In the vCPU's thread.
 */
#include "device/irqchip/irqchip.h"
#include "isa/x86/system.h"

/* In virtual-8086 mode these need IOPL 3. */
static void require_v86_iopl(struct x86_cpu *cpu)
{
    if (x86_in_v86(cpu) && x86_iopl(cpu) != 3)
        x86_raise_error(cpu, X86_GP, 0);
}

void x86_insn_pushf(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    require_v86_iopl(cpu);
    x86_push(cpu, x86_rflags(cpu) & ~(uint64_t)(RFLAGS_VM | RFLAGS_RF), insn->op_size);
}

void x86_insn_popf(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    uint64_t change = RFLAGS_ARITH | RFLAGS_TF | RFLAGS_DF | RFLAGS_NT | RFLAGS_AC | RFLAGS_ID;
    uint64_t value, old;

    require_v86_iopl(cpu);
    value = x86_pop(cpu, insn->op_size);
    if (cpu->cpl == 0)
        change |= RFLAGS_IOPL;
    if (cpu->cpl <= x86_iopl(cpu))
        change |= RFLAGS_IF;
    if (insn->op_size == 2)
        change &= 0xffff;
    old = x86_rflags(cpu) & ~(uint64_t)RFLAGS_RF;
    x86_set_rflags(cpu, (old & ~change) | (value & change));
}

/* IF may be changed at CPL ≤ IOPL; real mode is CPL 0, virtual-8086 mode CPL 3. */
static void require_iopl(struct x86_cpu *cpu)
{
    if (cpu->cpl > x86_iopl(cpu))
        x86_raise_error(cpu, X86_GP, 0);
}

void x86_insn_cli(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    require_iopl(cpu);
    cpu->s.rflags &= ~(uint64_t)RFLAGS_IF;
}

void x86_insn_sti(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    require_iopl(cpu);
    if (cpu->s.rflags & RFLAGS_IF)
        return;
    cpu->s.rflags |= RFLAGS_IF;
    cpu->s.interrupt_shadow = 1;
    /* Mostly nothing waits, and then the engine need not look. */
    if (cpu->lapic == NULL || lapic_pending(cpu->lapic) >= 0)
        x86_request(cpu, REQUEST_INTR);
}

static void set_ac(struct x86_cpu *cpu, bool ac)
{
    if (cpu->cpl != 0)
        x86_raise(cpu, X86_UD);
    if (((cpu->s.rflags & RFLAGS_AC) != 0) == ac)
        return;
    cpu->s.rflags ^= RFLAGS_AC;
    x86_update_mode(cpu);
}

void x86_insn_stac(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    set_ac(cpu, true);
}

void x86_insn_clac(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    set_ac(cpu, false);
}
