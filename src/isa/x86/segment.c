/*
 * Segmentation: linear addresses, the stack, descriptors and segment registers.
 *
 * SDM vol. 3A ch. 3 and 5; the instructions' own pages for the order of checks. The vCPU's thread.
 * Descriptor tables and the TSS are read by implicit supervisor accesses, whatever CPL is.
 */
#include "isa/x86/segment.h"

#include "base/util.h"
#include "isa/x86/mmu.h"

/* ---- linear addresses ---- */

bool x86_in_limit(const struct x86_seg *seg, uint64_t offset, unsigned size)
{
    uint64_t last = offset + (size ? size - 1 : 0);

    /* Expand-down data: the limit is what lies below the segment. */
    if ((seg->attr & (SEG_S | 0xc)) == (SEG_S | 0x4))
        return offset > seg->limit && last <= (seg->attr & SEG_DB ? UINT32_MAX : 0xffffu);
    return last <= seg->limit;
}

/* Whether the register's type allows the access. Real mode and virtual-8086 mode have no types. */
static bool type_allows(const struct x86_cpu *cpu, const struct x86_seg *seg, bool write)
{
    if (!(cpu->s.cr0 & CR0_PE) || (cpu->s.rflags & RFLAGS_VM))
        return true;
    if ((seg->attr & (SEG_UNUSABLE | SEG_P | SEG_S)) != (SEG_P | SEG_S))
        return false;
    if (seg->attr & 8)
        return !write && (seg->attr & 2);
    return !write || (seg->attr & 2);
}

/* An operand that wraps at the end of a segment of 4 GiB is within its limit on Intel's processors (SDM vol. 3A 5.3). */
static bool within(const struct x86_cpu *cpu, const struct x86_seg *s, uint64_t offset, unsigned size)
{
    return x86_in_limit(s, offset, size) || (!cpu->amd && s->limit == UINT32_MAX && x86_in_limit(s, (uint32_t)offset, 1));
}

gva_t x86_seg_linear(struct x86_cpu *cpu, unsigned seg, uint64_t offset, unsigned size, bool write)
{
    const struct x86_seg *s = &cpu->s.seg[seg];

    if (cpu->code_size == 8)
        return seg >= SEG_FS ? s->base + offset : offset;
    if (!(cpu->flat && seg != SEG_CS && seg < SEG_FS && offset + size <= 1ull << 32) &&
        (!type_allows(cpu, s, write) || !within(cpu, s, offset, size)))
        x86_raise_error(cpu, seg == SEG_SS ? X86_SS : X86_GP, 0);
    return (uint32_t)(s->base + offset);
}

uint64_t x86_effective(const struct x86_cpu *cpu, const struct x86_insn *insn)
{
    const struct x86_mem *m = &insn->mem;
    uint64_t ea = (uint64_t)m->disp;

    if (m->base == X86_REG_RIP)
        ea += cpu->s.rip + insn->length;
    else if (m->base != X86_NO_REG)
        ea += cpu->s.gpr[m->base];
    if (m->index != X86_NO_REG && !m->vsib_size)
        ea += cpu->s.gpr[m->index] * m->scale;
    return m->addr_size == 8 ? ea : m->addr_size == 4 ? (uint32_t)ea : (uint16_t)ea;
}

gva_t x86_linear(struct x86_cpu *cpu, const struct x86_insn *insn, unsigned size, bool write)
{
    return x86_seg_linear(cpu, insn->mem.seg, x86_effective(cpu, insn), size, write);
}

/* ---- the stack ---- */

static uint64_t width_mask(unsigned width)
{
    return width == 8 ? ~0ull : width == 4 ? UINT32_MAX : 0xffff;
}

/* The linear address of size bytes at offset in a stack. */
static gva_t stack_linear(struct x86_cpu *cpu, const struct x86_stack *st, uint64_t offset,
                          unsigned size)
{
    if (st->width == 8) {
        if (!x86_canonical(cpu, offset))
            x86_raise_error(cpu, X86_SS, st->fault_error);
        if (!x86_canonical(cpu, offset + size - 1)) {
            if (!cpu->amd && st->set == &x86_checking_set && (offset & (size - 1)))
                x86_raise_error(cpu, X86_AC, 0);
            x86_raise_error(cpu, X86_SS, st->fault_error);
        }
        return offset;
    }
    /* Pushes and pops write and read data: SS is never anything but writable data. */
    if (!type_allows(cpu, &st->ss, true) || !within(cpu, &st->ss, offset, size))
        x86_raise_error(cpu, X86_SS, st->fault_error);
    return (uint32_t)(st->ss.base + offset);
}

void x86_stack_current(struct x86_cpu *cpu, struct x86_stack *st)
{
    st->set = cpu->tlb;
    st->ss = cpu->s.seg[SEG_SS];
    st->width = cpu->stack_size;
    st->sp = cpu->s.gpr[RSP] & width_mask(st->width);
    st->fault_error = 0;
}

void x86_stack_push(struct x86_cpu *cpu, struct x86_stack *st, uint64_t value, unsigned size)
{
    uint64_t sp = (st->sp - size) & width_mask(st->width);
    gva_t va = stack_linear(cpu, st, sp, size);

    switch (size) {
    case 2:
        x86_write16_in(cpu, st->set, va, (uint16_t)value);
        break;
    case 4:
        x86_write32_in(cpu, st->set, va, (uint32_t)value);
        break;
    default:
        x86_write64_in(cpu, st->set, va, value);
        break;
    }
    st->sp = sp;
}

uint64_t x86_stack_pop(struct x86_cpu *cpu, struct x86_stack *st, unsigned size)
{
    gva_t va = stack_linear(cpu, st, st->sp, size);
    uint64_t value = size == 2   ? x86_read16_in(cpu, st->set, va)
                     : size == 4 ? x86_read32_in(cpu, st->set, va)
                                 : x86_read64_in(cpu, st->set, va);
    x86_stack_skip(st, size);
    return value;
}

void x86_stack_skip(struct x86_stack *st, uint64_t bytes)
{
    st->sp = (st->sp + bytes) & width_mask(st->width);
}

void x86_stack_commit(struct x86_cpu *cpu, const struct x86_stack *st)
{
    x86_set_gpr(cpu, RSP, st->sp, st->width);
}

void x86_push(struct x86_cpu *cpu, uint64_t value, unsigned size)
{
    struct x86_stack st;

    x86_stack_current(cpu, &st);
    x86_stack_push(cpu, &st, value, size);
    x86_stack_commit(cpu, &st);
}

uint64_t x86_pop(struct x86_cpu *cpu, unsigned size)
{
    struct x86_stack st;

    x86_stack_current(cpu, &st);
    uint64_t value = x86_stack_pop(cpu, &st, size);
    x86_stack_commit(cpu, &st);
    return value;
}

void x86_stack_from_tss(struct x86_cpu *cpu, unsigned cpl, unsigned ist, uint32_t ext,
                        struct x86_stack *st)
{
    const struct x86_seg *tr = &cpu->s.tr;
    uint32_t ts_error = (tr->selector & 0xfffcu) | ext;
    struct tlb_set *sys = x86_system_set(cpu);

    st->set = x86_set_for_cpl(cpu, cpl);
    if (cpu->long_mode) {
        unsigned offset = ist ? 0x1c + 8 * ist : 4 + 8 * cpl;
        if (offset + 7 > tr->limit)
            x86_raise_error(cpu, X86_TS, ts_error);
        st->sp = x86_read64_in(cpu, sys, tr->base + offset);
        st->width = 8;
        st->ss = (struct x86_seg){.attr = SEG_UNUSABLE | cpl << 5, .selector = (uint16_t)cpl};
        st->fault_error = ext;
        return;
    }

    uint16_t ss;
    uint32_t base = (uint32_t)tr->base;
    if ((tr->attr & SEG_TYPE) & 8) {
        unsigned offset = 4 + 8 * cpl;
        if (offset + 5 > tr->limit)
            x86_raise_error(cpu, X86_TS, ts_error);
        st->sp = x86_read32_in(cpu, sys, base + offset);
        ss = x86_read16_in(cpu, sys, base + offset + 4);
    } else {
        unsigned offset = 2 + 4 * cpl;
        if (offset + 3 > tr->limit)
            x86_raise_error(cpu, X86_TS, ts_error);
        st->sp = x86_read16_in(cpu, sys, base + offset);
        ss = x86_read16_in(cpu, sys, base + offset + 2);
    }

    uint32_t ss_error = (ss & 0xfffcu) | ext;
    uint64_t d;
    if (selector_null(ss) || !x86_read_descriptor(cpu, ss, &d) || (ss & 3u) != cpl ||
        desc_dpl(d) != cpl || !desc_is_writable_data(d))
        x86_raise_error(cpu, X86_TS, ss_error);
    if (!desc_present(d))
        x86_raise_error(cpu, X86_SS, ss_error);
    x86_set_accessed(cpu, ss, &d);
    st->ss = x86_seg_from_desc(ss, d);
    st->width = desc_db(d) ? 4 : 2;
    st->sp &= width_mask(st->width);
    st->fault_error = ss_error;
}

/* ---- descriptors ---- */

/* The address of len bytes at selector's place in its table, or false. */
static bool descriptor_address(struct x86_cpu *cpu, unsigned selector, unsigned skip, gva_t *va)
{
    uint64_t base, limit;
    unsigned offset = (selector & 0xfff8u) + skip;

    if (selector & 4) {
        if (cpu->s.ldtr.attr & SEG_UNUSABLE || !(cpu->s.ldtr.attr & SEG_P))
            return false;
        base = cpu->s.ldtr.base;
        limit = cpu->s.ldtr.limit;
    } else {
        if (selector_null(selector))
            return false;
        base = cpu->s.gdt.base;
        limit = cpu->s.gdt.limit;
    }
    if (offset + 7 > limit)
        return false;
    *va = cpu->long_mode ? base + offset : (uint32_t)(base + offset);
    return true;
}

bool x86_read_descriptor(struct x86_cpu *cpu, unsigned selector, uint64_t *d)
{
    gva_t va;

    if (!descriptor_address(cpu, selector, 0, &va))
        return false;
    *d = x86_read64_in(cpu, x86_system_set(cpu), va);
    return true;
}

bool x86_read_descriptor_high(struct x86_cpu *cpu, unsigned selector, uint64_t *high)
{
    gva_t va;

    if (!descriptor_address(cpu, selector, 8, &va))
        return false;
    *high = x86_read64_in(cpu, x86_system_set(cpu), va);
    return true;
}

/* Sets bits of the type byte, which other processors may change at the same time. */
static void set_type_bits(struct x86_cpu *cpu, unsigned selector, unsigned bits)
{
    gva_t va;
    struct x86_place p;

    if (!descriptor_address(cpu, selector, 0, &va))
        return;
    x86_translate(cpu, x86_system_set(cpu), va + 5, ACCESS_WRITE, &p);
    if (!p.host)
        return;
    __atomic_fetch_or(p.host, (uint8_t)bits, __ATOMIC_SEQ_CST);
    if (p.code && cpu->hooks)
        cpu->hooks->code_written(cpu, p.gpa, 1);
}

void x86_set_accessed(struct x86_cpu *cpu, unsigned selector, uint64_t *d)
{
    if (*d >> 40 & 1)
        return;
    set_type_bits(cpu, selector, 1);
    *d |= 1ull << 40;
}

/* ---- segment registers ---- */

void x86_load_segment(struct x86_cpu *cpu, unsigned seg, uint16_t selector)
{
    struct x86_seg *reg = &cpu->s.seg[seg];
    uint32_t error = selector & 0xfffcu;
    unsigned rpl = selector & 3u;
    uint64_t d;

    if (!(cpu->s.cr0 & CR0_PE)) {
        /* Limit and attributes stay what they were: with a limit of 4 GiB that is "unreal" mode. */
        reg->selector = selector;
        reg->base = (uint32_t)selector << 4;
        if (!cpu->long_mode)
            x86_update_mode(cpu);
        return;
    }

    if (selector_null(selector)) {
        struct x86_seg null = {.attr = SEG_UNUSABLE, .selector = selector};
        if (seg == SEG_SS) {
            if (cpu->code_size != 8 || cpu->cpl == 3 || rpl != cpu->cpl)
                x86_raise_error(cpu, X86_GP, 0);
            null.attr |= (uint32_t)cpu->cpl << 5;
        }
        *reg = null;
    } else {
        if (!x86_read_descriptor(cpu, selector, &d))
            x86_raise_error(cpu, X86_GP, error);
        unsigned dpl = desc_dpl(d);
        if (seg == SEG_SS) {
            if (rpl != cpu->cpl || !desc_is_writable_data(d) || dpl != cpu->cpl)
                x86_raise_error(cpu, X86_GP, error);
            if (!desc_present(d))
                x86_raise_error(cpu, X86_SS, error);
        } else {
            if (!desc_s(d) || (desc_is_code(d) && !(desc_type(d) & 2)))
                x86_raise_error(cpu, X86_GP, error);
            if (!desc_is_conforming(d) && (rpl > dpl || cpu->cpl > dpl))
                x86_raise_error(cpu, X86_GP, error);
            if (!desc_present(d))
                x86_raise_error(cpu, X86_NP, error);
        }
        x86_set_accessed(cpu, selector, &d);
        *reg = x86_seg_from_desc(selector, d);
    }
    /* In 64-bit mode nothing is derived from the data segments. */
    if (cpu->code_size != 8)
        x86_update_mode(cpu);
}

/* The base of a system segment, whose upper half is in a second descriptor in long mode. */
static uint64_t system_base(struct x86_cpu *cpu, uint16_t selector, uint64_t d, uint32_t error)
{
    uint64_t base = desc_base(d), high;

    if (!cpu->long_mode)
        return base;
    if (!x86_read_descriptor_high(cpu, selector, &high) || (high >> 40 & 0x1f))
        x86_raise_error(cpu, X86_GP, error);
    base |= high << 32;
    if (!x86_canonical(cpu, base))
        x86_raise_error(cpu, X86_GP, error);
    return base;
}

void x86_load_ldt(struct x86_cpu *cpu, uint16_t selector)
{
    uint32_t error = selector & 0xfffcu;
    uint64_t d;

    if (selector_null(selector)) {
        cpu->s.ldtr = (struct x86_seg){.attr = SEG_UNUSABLE, .selector = selector};
        return;
    }
    if ((selector & 4) || !x86_read_descriptor(cpu, selector, &d) || desc_s(d) ||
        desc_type(d) != DESC_LDT)
        x86_raise_error(cpu, X86_GP, error);
    if (!desc_present(d))
        x86_raise_error(cpu, X86_NP, error);
    uint64_t base = system_base(cpu, selector, d, error);
    cpu->s.ldtr = (struct x86_seg){
        .base = base, .limit = desc_limit(d), .attr = desc_attr(d), .selector = selector};
}

void x86_load_task_register(struct x86_cpu *cpu, uint16_t selector)
{
    uint32_t error = selector & 0xfffcu;
    uint64_t d;

    if (selector_null(selector))
        x86_raise_error(cpu, X86_GP, 0);
    if ((selector & 4) || !x86_read_descriptor(cpu, selector, &d) || desc_s(d) ||
        !(desc_type(d) == DESC_TSS || (desc_type(d) == DESC_TSS16 && !cpu->long_mode)))
        x86_raise_error(cpu, X86_GP, error);
    if (!desc_present(d))
        x86_raise_error(cpu, X86_NP, error);
    uint64_t base = system_base(cpu, selector, d, error);
    set_type_bits(cpu, selector, 2);
    cpu->s.tr = (struct x86_seg){
        .base = base, .limit = desc_limit(d), .attr = desc_attr(d) | 2, .selector = selector};
}
