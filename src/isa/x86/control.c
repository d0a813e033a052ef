/*
 * Control and debug registers, XCR0: reading, writing with every check, and what a change means for mode and TLB.
 * SDM vol. 3A 2.5, 4.1, 9.8.5, 17.2. In the vCPU's thread.
 */
#include "device/irqchip/irqchip.h"
#include "isa/x86/cpuid.h"
#include "isa/x86/mmu.h"
#include "isa/x86/system.h"
#include "isa/x86/xsave.h"

#define CR0_KNOWN (CR0_PE | CR0_MP | CR0_EM | CR0_TS | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_NW | CR0_CD | CR0_PG)
#define CR0_TLB (CR0_PG | CR0_PE | CR0_WP)
#define CR4_TLB (CR4_PSE | CR4_PAE | CR4_PGE | CR4_PCIDE | CR4_SMEP | CR4_SMAP)
#define CR3_NO_FLUSH (1ull << 63)

#define DR6_FIXED 0xffff0ff0u
#define DR6_WRITABLE 0x0000e00fu
#define DR6_BD (1u << 13)
#define DR7_FIXED 0x400u
#define DR7_WRITABLE 0xffff23ffu
#define DR7_GD (1u << 13)

static _Noreturn void gp(struct x86_cpu *cpu)
{
    x86_raise_error(cpu, X86_GP, 0);
}

/* ---- CR0, CR3, CR4, CR8 ---- */

void x86_write_cr0(struct x86_cpu *cpu, uint64_t value)
{
    uint64_t old = cpu->s.cr0, changed, efer = cpu->s.efer;

    if (value >> 32)
        gp(cpu);
    /* Reserved bits in the lower half are ignored; ET is fixed. */
    value = (value & CR0_KNOWN) | CR0_ET;
    if (((value & CR0_PG) && !(value & CR0_PE)) || ((value & CR0_NW) && !(value & CR0_CD)))
        gp(cpu);
    changed = old ^ value;
    if (changed & CR0_PG) {
        bool to_64_bit_code = (cpu->s.seg[SEG_CS].attr & SEG_L) != 0;

        if (value & CR0_PG) {
            /* Paging on: with LME this activates long mode, in compatibility mode first. */
            if ((efer & EFER_LME) && (!(cpu->s.cr4 & CR4_PAE) || to_64_bit_code))
                gp(cpu);
            if (efer & EFER_LME)
                efer |= EFER_LMA;
        } else {
            if (cpu->code_size == 8 || (cpu->s.cr4 & CR4_PCIDE))
                gp(cpu);
            efer &= ~EFER_LMA;
        }
    }
    if (!(efer & EFER_LMA) && (changed & (CR0_PG | CR0_CD | CR0_NW)) &&
        x86_load_pdptes(cpu, value, cpu->s.cr3, cpu->s.cr4) != 0)
        gp(cpu);
    cpu->s.cr0 = value;
    cpu->s.efer = efer;
    if (changed & CR0_TLB)
        x86_tlb_flush_all(cpu);
    x86_update_mode(cpu);
}

void x86_write_cr3(struct x86_cpu *cpu, uint64_t value)
{
    uint64_t old = cpu->s.cr3;
    bool no_flush = false;

    if (cpu->s.cr4 & CR4_PCIDE) {
        no_flush = (value & CR3_NO_FLUSH) != 0;
        value &= ~CR3_NO_FLUSH;
    }
    if (cpu->long_mode ? value >> cpu->phys_bits != 0 : value >> 32 != 0)
        gp(cpu);
    if (!cpu->long_mode && x86_load_pdptes(cpu, cpu->s.cr0, value, cpu->s.cr4) != 0)
        gp(cpu);
    cpu->s.cr3 = value;
    x86_tlb_load_cr3(cpu, old, no_flush);
    x86_update_mode(cpu);
}

uint64_t x86_cr4_allowed(const struct x86_cpu *cpu)
{
    if (cpu->model)
        return cpu->model->cr4_allowed;
    return CR4_TSD | CR4_DE | CR4_PSE | CR4_PAE | CR4_MCE | CR4_PGE | CR4_PCE | CR4_OSFXSR | CR4_OSXMMEXCPT |
           CR4_UMIP | CR4_FSGSBASE | CR4_PCIDE | CR4_OSXSAVE | CR4_SMEP | CR4_SMAP;
}

void x86_write_cr4(struct x86_cpu *cpu, uint64_t value)
{
    uint64_t old = cpu->s.cr4, changed = old ^ value;

    if (value & ~x86_cr4_allowed(cpu))
        gp(cpu);
    if (cpu->long_mode && !(value & CR4_PAE))
        gp(cpu);
    if ((value & changed & CR4_PCIDE) && (!cpu->long_mode || (cpu->s.cr3 & 0xfff) != 0))
        gp(cpu);
    if (!cpu->long_mode && (changed & (CR4_PAE | CR4_PGE | CR4_PSE | CR4_SMEP)) &&
        x86_load_pdptes(cpu, cpu->s.cr0, cpu->s.cr3, value) != 0)
        gp(cpu);
    cpu->s.cr4 = value;
    if (changed & CR4_TLB)
        x86_tlb_flush_all(cpu);
    x86_update_mode(cpu);
}

static void write_cr8(struct x86_cpu *cpu, uint64_t value)
{
    if (value > 15)
        gp(cpu);
    lapic_set_cr8(cpu->lapic, (uint8_t)value);
    if (lapic_pending(cpu->lapic) >= 0)
        x86_request(cpu, REQUEST_INTR);
}

/* MOV to and from these ignores the operand size: 64 bits in 64-bit mode, else 32. */
static unsigned register_size(const struct x86_cpu *cpu)
{
    return cpu->code_size == 8 ? 8 : 4;
}

void x86_insn_mov_from_cr(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    uint64_t value;

    x86_require_cpl0(cpu);
    switch (insn->operand[1].reg) {
    case 0:
        value = cpu->s.cr0;
        break;
    case 2:
        value = cpu->s.cr2;
        break;
    case 3:
        value = cpu->s.cr3;
        break;
    case 4:
        value = cpu->s.cr4;
        break;
    case 8:
        value = cpu->lapic != NULL ? lapic_cr8(cpu->lapic) : 0;
        break;
    default:
        x86_raise(cpu, X86_UD);
    }
    x86_set_gpr(cpu, insn->operand[0].reg, value, register_size(cpu));
}

void x86_insn_mov_to_cr(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    uint64_t value = x86_get_gpr(cpu, insn->operand[1].reg, register_size(cpu));

    x86_require_cpl0(cpu);
    switch (insn->operand[0].reg) {
    case 0:
        x86_write_cr0(cpu, value);
        break;
    case 2:
        cpu->s.cr2 = value;
        break;
    case 3:
        x86_write_cr3(cpu, value);
        break;
    case 4:
        x86_write_cr4(cpu, value);
        break;
    case 8:
        if (cpu->lapic != NULL)
            write_cr8(cpu, value);
        break;
    default:
        x86_raise(cpu, X86_UD);
    }
}

void x86_insn_clts(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    x86_require_cpl0(cpu);
    cpu->s.cr0 &= ~CR0_TS;
    x86_update_mode(cpu);
}

void x86_insn_lmsw(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    uint64_t value;

    x86_require_cpl0(cpu);
    value = x86_read_operand(cpu, insn, 0, 2);
    /* PE can be set this way, not cleared. */
    x86_write_cr0(cpu, (cpu->s.cr0 & ~(CR0_MP | CR0_EM | CR0_TS)) | (value & (CR0_PE | CR0_MP | CR0_EM | CR0_TS)));
}

void x86_insn_smsw(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    if ((cpu->s.cr4 & CR4_UMIP) && cpu->cpl != 0)
        gp(cpu);
    if (insn->operand[0].kind == OPERAND_GPR)
        x86_set_gpr(cpu, insn->operand[0].reg, cpu->s.cr0, insn->op_size);
    else
        x86_write16(cpu, x86_linear(cpu, insn, 2, true), (uint16_t)cpu->s.cr0);
}

/* ---- debug registers ---- */

/* The number with DR4 and DR5 resolved, after all checks but the value's. */
static unsigned debug_register(struct x86_cpu *cpu, unsigned n)
{
    if (n == 4 || n == 5) {
        if (cpu->s.cr4 & CR4_DE)
            x86_raise(cpu, X86_UD);
        n += 2;
    }
    x86_require_cpl0(cpu);
    if (cpu->s.dr7 & DR7_GD) {
        cpu->s.dr6 |= DR6_BD;
        x86_raise(cpu, X86_DB);
    }
    return n;
}

void x86_insn_mov_from_dr(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    unsigned n = debug_register(cpu, insn->operand[1].reg);
    uint64_t value = n == 6 ? cpu->s.dr6 : n == 7 ? cpu->s.dr7 : cpu->s.dr[n & 3];

    x86_set_gpr(cpu, insn->operand[0].reg, value, register_size(cpu));
}

void x86_insn_mov_to_dr(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    unsigned n = debug_register(cpu, insn->operand[0].reg);
    uint64_t value = x86_get_gpr(cpu, insn->operand[1].reg, register_size(cpu));

    if (n >= 6 && value >> 32)
        gp(cpu);
    if (n == 6)
        cpu->s.dr6 = (value & DR6_WRITABLE) | DR6_FIXED;
    else if (n == 7)
        cpu->s.dr7 = (value & DR7_WRITABLE) | DR7_FIXED;
    else
        cpu->s.dr[n & 3] = value;
}

/* ---- extended control registers ---- */

void x86_insn_xgetbv(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    uint64_t value;

    if (!(cpu->s.cr4 & CR4_OSXSAVE))
        x86_raise(cpu, X86_UD);
    switch ((uint32_t)cpu->s.gpr[RCX]) {
    case 0:
        value = cpu->s.xcr0;
        break;
    case 1:
        value = x86_xinuse(&cpu->s.fpu) & cpu->s.xcr0;
        if ((cpu->s.xcr0 & 1u << XSTATE_SSE) && cpu->s.fpu.mxcsr != MXCSR_DEFAULT)
            value |= 1u << XSTATE_SSE;
        break;
    default:
        gp(cpu);
    }
    cpu->s.gpr[RAX] = (uint32_t)value;
    cpu->s.gpr[RDX] = value >> 32;
}

void x86_insn_xsetbv(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    uint64_t value = (uint32_t)cpu->s.gpr[RAX] | cpu->s.gpr[RDX] << 32;

    if (!(cpu->s.cr4 & CR4_OSXSAVE))
        x86_raise(cpu, X86_UD);
    x86_require_cpl0(cpu);
    if ((uint32_t)cpu->s.gpr[RCX] != 0 || (value & ~cpu->model->xcr0_allowed) || !x86_xcr0_consistent(value))
        gp(cpu);
    cpu->s.xcr0 = value;
    x86_update_mode(cpu);
}
