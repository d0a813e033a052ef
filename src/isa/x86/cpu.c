/*
 * The life cycle of a software-run vCPU, and what is derived from its state.
 * The vCPU's own thread, except init and destroy.
 */
#include "isa/x86/cpu.h"

#include <errno.h>
#include <string.h>

#include "base/clock.h"
#include "device/irqchip/irqchip.h"
#include "device/machine.h"
#include "isa/x86/cpuid.h"
#include "isa/x86/mmu.h"

static void read_model(struct x86_cpu *cpu)
{
    uint32_t r[4];

    cpu->phys_bits = 46;
    cpu->has_gib_pages = cpu->has_nx = true;
    if (!cpu->model)
        return;
    x86_cpuid(cpu, 0, 0, r);
    /* "Auth…" and "Hygo…" */
    cpu->amd = r[1] == 0x68747541 || r[1] == 0x6f677948;
    x86_cpuid(cpu, 0x80000001, 0, r);
    cpu->has_nx = r[3] >> 20 & 1;
    cpu->has_gib_pages = r[3] >> 26 & 1;
    x86_cpuid(cpu, 0x80000000, 0, r);
    if (r[0] >= 0x80000008) {
        x86_cpuid(cpu, 0x80000008, 0, r);
        if ((r[0] & 0xff) >= 36 && (r[0] & 0xff) <= 52)
            cpu->phys_bits = (uint8_t)r[0];
    }
}

/* Where the local APIC's registers are in memory: loading a saved machine moves them too. */
static void find_apic(struct x86_cpu *cpu)
{
    uint64_t base = cpu->lapic ? lapic_base(cpu->lapic) : 0;

    cpu->apic_base = (base & 0xc00) == 0x800 ? base & GUEST_PAGE_MASK : ~0ull;
}

int x86_cpu_init(struct x86_cpu *cpu, struct machine *m, struct lapic *lapic,
                 const struct x86_cpu_model *model, unsigned index)
{
    memset(cpu, 0, sizeof(*cpu));
    cpu->machine = m;
    cpu->mem = m ? &m->memory : NULL;
    cpu->lapic = lapic;
    cpu->model = model;
    cpu->index = index;
    cpu->tsc_hz = tsc_frequency_hz();
    find_apic(cpu);
    x86_state_reset(&cpu->s, index == 0);
    read_model(cpu);
    x86_set_arith(cpu, cpu->s.rflags);
    return x86_tlb_create(cpu);
}

void x86_cpu_destroy(struct x86_cpu *cpu)
{
    x86_tlb_destroy(cpu);
}

void x86_cpu_import(struct x86_cpu *cpu, const struct x86_state *s)
{
    if (s != &cpu->s)
        cpu->s = *s;
    x86_set_arith(cpu, cpu->s.rflags);
    cpu->next_rip = cpu->s.rip;
    find_apic(cpu);
    x86_tlb_flush_all(cpu);
    x86_request(cpu, REQUEST_INTR | (cpu->s.nmi_pending ? REQUEST_NMI : 0));
}

void x86_cpu_export(struct x86_cpu *cpu, struct x86_state *s)
{
    cpu->s.rflags = x86_rflags(cpu);
    if (s != &cpu->s)
        *s = cpu->s;
}

/* Data accesses through this segment at a flat address need no check. */
static bool flat_data(const struct x86_seg *seg)
{
    /* Present, writable, expand-up data. */
    return seg->base == 0 && seg->limit == UINT32_MAX &&
           (seg->attr & (SEG_UNUSABLE | SEG_P | SEG_S | 0xe)) == (SEG_P | SEG_S | 0x2);
}

void x86_update_mode(struct x86_cpu *cpu)
{
    const struct x86_state *s = &cpu->s;
    const struct x86_seg *cs = &s->seg[SEG_CS], *ss = &s->seg[SEG_SS];

    cpu->long_mode = s->efer & EFER_LMA;
    cpu->cpl = !(s->cr0 & CR0_PE) ? 0 : s->rflags & RFLAGS_VM ? 3 : (uint8_t)SEG_DPL(ss->attr);
    if (cpu->long_mode && (cs->attr & SEG_L)) {
        cpu->code_base = 0;
        cpu->code_size = cpu->stack_size = 8;
        cpu->flat = true;
    } else {
        cpu->code_base = cs->base;
        cpu->code_size = cs->attr & SEG_DB ? 4 : 2;
        cpu->stack_size = ss->attr & SEG_DB ? 4 : 2;
        cpu->flat = cs->base == 0 && cs->limit == UINT32_MAX &&
                    (cs->attr & (SEG_P | SEG_S | 0xa)) == (SEG_P | SEG_S | 0xa) && flat_data(ss) &&
                    flat_data(&s->seg[SEG_DS]) && flat_data(&s->seg[SEG_ES]);
    }

    if (cpu->cpl == 3) {
        cpu->tlb_fetch = &cpu->space->fetch.set;
        cpu->tlb = (s->rflags & RFLAGS_AC) && (s->cr0 & CR0_AM) ? &x86_checking_set
                                                                : &cpu->space->data.set;
    } else {
        cpu->tlb_fetch = &cpu->tlbs->kernel_fetch.set;
        cpu->tlb = x86_kernel_set(cpu, s->rflags & RFLAGS_AC);
    }

    unsigned trap = 0;
    if (s->cr0 & (CR0_TS | CR0_EM))
        trap |= 1;
    if ((s->cr0 & (CR0_TS | CR0_EM)) || !(s->cr4 & CR4_OSFXSR))
        trap |= 2;
    if ((s->cr0 & CR0_TS) || !(s->cr0 & CR0_PE) || !(s->cr4 & CR4_OSXSAVE) ||
        (s->xcr0 & 0x6) != 0x6)
        trap |= 4;
    if ((trap & 4) || (s->xcr0 & 0xe6) != 0xe6)
        trap |= 8;
    cpu->simd_trap = (uint8_t)trap;
}

void x86_set_rflags(struct x86_cpu *cpu, uint64_t v)
{
    uint64_t old = cpu->s.rflags;

    cpu->s.rflags = (v & ~0x28ull & 0x3fffff & ~0x8000ull) | 2;
    x86_set_arith(cpu, v);
    if ((old ^ v) & (RFLAGS_AC | RFLAGS_VM))
        x86_update_mode(cpu);
    /* An interrupt that comes after this look makes the request itself. */
    if ((v & ~old & RFLAGS_IF) && cpu->lapic && lapic_pending(cpu->lapic) >= 0)
        x86_request(cpu, REQUEST_INTR);
}
