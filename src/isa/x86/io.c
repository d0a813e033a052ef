/*
 * Port input and output: IN, OUT, INS, OUTS with REP, and the permission to do so.
 * SDM vol. 1 ch. 19 (18.5 the permission bit map). In the vCPU's thread, which takes the machine lock for each access.
 */
#include "device/machine.h"
#include "isa/x86/mmu.h"
#include "isa/x86/segment.h"
#include "isa/x86/system.h"

#define TSS_IO_MAP_BASE 102u    /* offset of the 16-bit field in 32-bit and 64-bit task state segments alike */

/* #GP(0) unless IOPL or the bit map in the TSS lets this program access the ports. */
static void check_ports(struct x86_cpu *cpu, uint16_t port, unsigned size)
{
    const struct x86_seg *tr = &cpu->s.tr;
    unsigned type = tr->attr & SEG_TYPE, offset;
    uint16_t bits;

    if (!(cpu->s.cr0 & CR0_PE) || (!x86_in_v86(cpu) && cpu->cpl <= x86_iopl(cpu)))
        return;
    if ((tr->attr & SEG_UNUSABLE) || !(tr->attr & SEG_P) || (type != DESC_TSS && type != DESC_TSS_BUSY) ||
        tr->limit < TSS_IO_MAP_BASE + 1)
        x86_raise_error(cpu, X86_GP, 0);
    offset = x86_read16_in(cpu, x86_system_set(cpu), tr->base + TSS_IO_MAP_BASE) + port / 8;
    /* Two bytes are read, so both must lie in the segment. */
    if (offset + 1 > tr->limit)
        x86_raise_error(cpu, X86_GP, 0);
    bits = x86_read16_in(cpu, x86_system_set(cpu), tr->base + offset);
    if (bits >> (port & 7) & ((1u << size) - 1))
        x86_raise_error(cpu, X86_GP, 0);
}

static uint32_t port_read(struct x86_cpu *cpu, uint16_t port, unsigned size)
{
    cpu->port_exits++;
    return (uint32_t)bus_read(&cpu->machine->ports, port, size);
}

static void port_write(struct x86_cpu *cpu, uint16_t port, uint32_t value, unsigned size)
{
    cpu->port_exits++;
    bus_write(&cpu->machine->ports, port, value, size);
}

static uint16_t port_operand(const struct x86_cpu *cpu, const struct x86_insn *insn, unsigned i)
{
    return insn->operand[i].kind == OPERAND_IMM ? (uint8_t)insn->imm[0] : (uint16_t)cpu->s.gpr[RDX];
}

void x86_insn_in(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    unsigned size = insn->operand[0].size;
    uint16_t port = port_operand(cpu, insn, 1);

    check_ports(cpu, port, size);
    x86_set_gpr(cpu, RAX, port_read(cpu, port, size), size);
}

void x86_insn_out(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    unsigned size = insn->operand[1].size;
    uint16_t port = port_operand(cpu, insn, 0);

    check_ports(cpu, port, size);
    port_write(cpu, port, (uint32_t)x86_get_gpr(cpu, RAX, size), size);
}

/* ---- strings ---- */

static unsigned string_size(const struct x86_insn *insn)
{
    switch (insn->mnemonic) {
    case ZYDIS_MNEMONIC_INSB:
    case ZYDIS_MNEMONIC_OUTSB:
        return 1;
    case ZYDIS_MNEMONIC_INSW:
    case ZYDIS_MNEMONIC_OUTSW:
        return 2;
    default:
        return 4;
    }
}

static void ins_one(struct x86_cpu *cpu, const struct x86_insn *insn, uint16_t port, unsigned size)
{
    gva_t va = x86_seg_linear(cpu, SEG_ES, x86_get_gpr(cpu, RDI, insn->addr_size), size, true);
    uint32_t value;

    /* What the device gives must not get lost in a fault. */
    x86_probe_write(cpu, va, size);
    value = port_read(cpu, port, size);
    x86_write_bytes(cpu, va, &value, size);
}

static void outs_one(struct x86_cpu *cpu, const struct x86_insn *insn, uint16_t port, unsigned size)
{
    gva_t va = x86_seg_linear(cpu, insn->mem.seg, x86_get_gpr(cpu, RSI, insn->addr_size), size, false);
    uint32_t value = 0;

    x86_read_bytes(cpu, va, &value, size);
    port_write(cpu, port, value, size);
}

/*
 * One element, or with REP as many as there are: registers advance with each, and when something else wants
 * the vCPU the instruction ends early with RIP still on it.
 */
static void string_io(struct x86_cpu *cpu, const struct x86_insn *insn, bool in)
{
    unsigned size = string_size(insn), width = insn->addr_size, reg = in ? RDI : RSI;
    uint16_t port = (uint16_t)cpu->s.gpr[RDX];
    uint64_t step = cpu->s.rflags & RFLAGS_DF ? -(uint64_t)size : size;

    check_ports(cpu, port, size);
    for (;;) {
        uint64_t count = insn->rep ? x86_get_gpr(cpu, RCX, width) : 1;

        if (count == 0)
            return;
        if (in)
            ins_one(cpu, insn, port, size);
        else
            outs_one(cpu, insn, port, size);
        x86_set_gpr(cpu, reg, x86_get_gpr(cpu, reg, width) + step, width);
        if (!insn->rep)
            return;
        x86_set_gpr(cpu, RCX, count - 1, width);
        if (count > 1 && ((cpu->s.rflags & RFLAGS_TF) ||
                          atomic_load_explicit(&cpu->request, memory_order_relaxed) != 0)) {
            cpu->next_rip = cpu->s.rip;
            return;
        }
    }
}

void x86_insn_ins(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    string_io(cpu, insn, true);
}

void x86_insn_outs(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    string_io(cpu, insn, false);
}
