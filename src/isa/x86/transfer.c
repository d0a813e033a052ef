/*
 * Control transfers between code segments and privilege levels.
 *
 * SDM vol. 2 (the instructions' pages) and vol. 3A 5.8; AMD's differences from APM vol. 3 where the
 * model's vendor is AMD. The vCPU's thread. Each function finds out everything that can fault
 * first, then commits.
 *
 * Not offered: hardware task switching (task gates and TSS as targets: #GP; IRET with NT set: #TS)
 * and virtual-8086 mode (IRET that would enter it: #GP).
 */
#include "isa/x86/transfer.h"

#include "base/util.h"
#include "isa/x86/mmu.h"
#include "isa/x86/segment.h"

/* Flat segments as SYSCALL and its relatives make them: present, G; code additionally L or D. */
#define FLAT_CODE64 0xa09bu
#define FLAT_CODE32 0xc09bu
#define FLAT_DATA   0xc093u
#define FLAT_DPL3   0x0060u

static struct x86_seg flat_segment(unsigned selector, uint32_t attr)
{
    return (struct x86_seg){.limit = UINT32_MAX, .attr = attr, .selector = (uint16_t)selector};
}

static bool protected_mode(const struct x86_cpu *cpu)
{
    return (cpu->s.cr0 & CR0_PE) && !(cpu->s.rflags & RFLAGS_VM);
}

/* Raises #GP(0) unless rip is a place that the code segment can run. */
static void check_target(struct x86_cpu *cpu, const struct x86_seg *cs, uint64_t rip)
{
    if (cpu->long_mode && (cs->attr & SEG_L) ? !x86_canonical(cpu, rip) : rip > cs->limit)
        x86_raise_error(cpu, X86_GP, 0);
}

static void commit_cs(struct x86_cpu *cpu, const struct x86_seg *cs, uint64_t rip)
{
    cpu->s.seg[SEG_CS] = *cs;
    cpu->next_rip = rip;
    x86_update_mode(cpu);
}

/* ---- far JMP and CALL ---- */

static void far_pointer(struct x86_cpu *cpu, const struct x86_insn *insn, unsigned size,
                        uint16_t *selector, uint64_t *offset)
{
    if (!insn->has_mem) {
        *offset = (uint64_t)insn->imm[0] & (size == 2 ? 0xffff : UINT32_MAX);
        *selector = (uint16_t)insn->imm[1];
        return;
    }
    gva_t va = x86_linear(cpu, insn, size + 2, false);
    uint8_t bytes[10] = {0};
    x86_read_bytes(cpu, va, bytes, size + 2);
    *offset = size == 2 ? load_le16(bytes) : size == 4 ? load_le32(bytes) : load_le64(bytes);
    *selector = load_le16(bytes + size);
}

/* AMD has no 64-bit far pointers: REX.W is ignored. */
static unsigned far_size(const struct x86_cpu *cpu, const struct x86_insn *insn)
{
    return insn->op_size == 8 && cpu->amd ? 4 : insn->op_size;
}

static void far_real(struct x86_cpu *cpu, uint16_t selector, uint64_t offset, unsigned size,
                     bool call)
{
    struct x86_seg cs = cpu->s.seg[SEG_CS];
    struct x86_stack st;

    if (offset > cs.limit)
        x86_raise_error(cpu, X86_GP, 0);
    if (call) {
        x86_stack_current(cpu, &st);
        x86_stack_push(cpu, &st, cs.selector, size);
        x86_stack_push(cpu, &st, cpu->next_rip, size);
        x86_stack_commit(cpu, &st);
    }
    cs.selector = selector;
    cs.base = (uint32_t)selector << 4;
    commit_cs(cpu, &cs, offset);
}

/* The code segment that a transfer without change of privilege goes to; raises if it may not. */
static struct x86_seg direct_target(struct x86_cpu *cpu, uint16_t selector, uint64_t *d)
{
    uint32_t error = selector & 0xfffcu;

    if (desc_is_conforming(*d) ? desc_dpl(*d) > cpu->cpl
                               : (selector & 3u) > cpu->cpl || desc_dpl(*d) != cpu->cpl)
        x86_raise_error(cpu, X86_GP, error);
    if (cpu->long_mode && desc_l(*d) && desc_db(*d))
        x86_raise_error(cpu, X86_GP, error);
    if (!desc_present(*d))
        x86_raise_error(cpu, X86_NP, error);
    x86_set_accessed(cpu, selector, d);
    return x86_seg_from_desc((uint16_t)((selector & ~3u) | cpu->cpl), *d);
}

/* Through a call gate; SDM vol. 3A 5.8.4. */
static void far_gate(struct x86_cpu *cpu, uint16_t gate_selector, uint64_t gate, bool call)
{
    uint32_t error = gate_selector & 0xfffcu;
    unsigned type = desc_type(gate);
    uint64_t high = 0, d;

    if (desc_dpl(gate) < cpu->cpl || (gate_selector & 3u) > desc_dpl(gate))
        x86_raise_error(cpu, X86_GP, error);
    if (cpu->long_mode &&
        (!x86_read_descriptor_high(cpu, gate_selector, &high) || (high >> 40 & 0x1f)))
        x86_raise_error(cpu, X86_GP, error);
    if (!desc_present(gate))
        x86_raise_error(cpu, X86_NP, error);

    uint16_t selector = (uint16_t)(gate >> 16);
    uint32_t code_error = selector & 0xfffcu;
    uint64_t rip = gate & 0xffff;
    unsigned size = cpu->long_mode ? 8 : type == DESC_CALL_GATE ? 4 : 2;
    if (size >= 4)
        rip |= gate >> 32 & 0xffff0000;
    rip |= high << 32;

    if (selector_null(selector))
        x86_raise_error(cpu, X86_GP, 0);
    if (!x86_read_descriptor(cpu, selector, &d) || !desc_is_code(d) || desc_dpl(d) > cpu->cpl ||
        (!call && !desc_is_conforming(d) && desc_dpl(d) != cpu->cpl) ||
        (cpu->long_mode && (!desc_l(d) || desc_db(d))))
        x86_raise_error(cpu, X86_GP, code_error);
    if (!desc_present(d))
        x86_raise_error(cpu, X86_NP, code_error);
    x86_set_accessed(cpu, selector, &d);

    unsigned cpl = desc_is_conforming(d) || !call ? cpu->cpl : desc_dpl(d);
    struct x86_seg cs = x86_seg_from_desc((uint16_t)((selector & ~3u) | cpl), d);
    if (!call) {
        check_target(cpu, &cs, rip);
        commit_cs(cpu, &cs, rip);
        return;
    }

    struct x86_stack st, caller;
    x86_stack_current(cpu, &caller);
    if (cpl != cpu->cpl) {
        uint64_t parameter[31];
        unsigned count = cpu->long_mode ? 0 : gate >> 32 & 31;
        x86_stack_from_tss(cpu, cpl, 0, 0, &st);
        for (unsigned i = 0; i < count; i++)
            parameter[i] = x86_stack_pop(cpu, &caller, size);
        x86_stack_push(cpu, &st, cpu->s.seg[SEG_SS].selector, size);
        x86_stack_push(cpu, &st, cpu->s.gpr[RSP], size);
        while (count)
            x86_stack_push(cpu, &st, parameter[--count], size);
    } else {
        st = caller;
        if (cpu->long_mode) {
            st.width = 8;
            st.sp = cpu->s.gpr[RSP];
        }
    }
    x86_stack_push(cpu, &st, cpu->s.seg[SEG_CS].selector, size);
    x86_stack_push(cpu, &st, cpu->next_rip, size);
    check_target(cpu, &cs, rip);
    cpu->s.seg[SEG_SS] = st.ss;
    x86_stack_commit(cpu, &st);
    commit_cs(cpu, &cs, rip);
}

static void far_transfer(struct x86_cpu *cpu, const struct x86_insn *insn, bool call)
{
    unsigned size = far_size(cpu, insn);
    uint16_t selector;
    uint64_t offset, d;

    far_pointer(cpu, insn, size, &selector, &offset);
    if (!protected_mode(cpu)) {
        far_real(cpu, selector, offset, size, call);
        return;
    }
    if (selector_null(selector))
        x86_raise_error(cpu, X86_GP, 0);
    uint32_t error = selector & 0xfffcu;
    if (!x86_read_descriptor(cpu, selector, &d))
        x86_raise_error(cpu, X86_GP, error);
    if (!desc_s(d)) {
        if (desc_type(d) != DESC_CALL_GATE && (cpu->long_mode || desc_type(d) != DESC_CALL_GATE16))
            x86_raise_error(cpu, X86_GP, error);
        far_gate(cpu, selector, d, call);
        return;
    }
    if (!desc_is_code(d))
        x86_raise_error(cpu, X86_GP, error);

    struct x86_seg cs = direct_target(cpu, selector, &d);
    if (!call) {
        check_target(cpu, &cs, offset);
        commit_cs(cpu, &cs, offset);
        return;
    }
    struct x86_stack st;
    x86_stack_current(cpu, &st);
    x86_stack_push(cpu, &st, cpu->s.seg[SEG_CS].selector, size);
    x86_stack_push(cpu, &st, cpu->next_rip, size);
    check_target(cpu, &cs, offset);
    x86_stack_commit(cpu, &st);
    commit_cs(cpu, &cs, offset);
}

void x86_insn_jmp_far(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    far_transfer(cpu, insn, false);
}

void x86_insn_call_far(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    far_transfer(cpu, insn, true);
}

/* ---- far RET and IRET ---- */

/* The code segment that a return goes to. */
static struct x86_seg return_target(struct x86_cpu *cpu, uint16_t selector)
{
    uint32_t error = selector & 0xfffcu;
    unsigned rpl = selector & 3u;
    uint64_t d;

    if (selector_null(selector))
        x86_raise_error(cpu, X86_GP, 0);
    if (!x86_read_descriptor(cpu, selector, &d) || !desc_is_code(d) || rpl < cpu->cpl ||
        (desc_is_conforming(d) ? desc_dpl(d) > rpl : desc_dpl(d) != rpl) ||
        (cpu->long_mode && desc_l(d) && desc_db(d)))
        x86_raise_error(cpu, X86_GP, error);
    if (!desc_present(d))
        x86_raise_error(cpu, X86_NP, error);
    x86_set_accessed(cpu, selector, &d);
    return x86_seg_from_desc(selector, d);
}

/* The stack segment of a return to privilege level cpl. */
static struct x86_seg return_stack(struct x86_cpu *cpu, uint16_t selector, unsigned cpl,
                                   bool to_64bit)
{
    uint32_t error = selector & 0xfffcu;
    uint64_t d;

    if (selector_null(selector)) {
        if (!to_64bit || cpl == 3 || (selector & 3u) != cpl)
            x86_raise_error(cpu, X86_GP, 0);
        return (struct x86_seg){.attr = SEG_UNUSABLE | cpl << 5, .selector = selector};
    }
    if (!x86_read_descriptor(cpu, selector, &d) || (selector & 3u) != cpl ||
        !desc_is_writable_data(d) || desc_dpl(d) != cpl)
        x86_raise_error(cpu, X86_GP, error);
    if (!desc_present(d))
        x86_raise_error(cpu, X86_SS, error);
    x86_set_accessed(cpu, selector, &d);
    return x86_seg_from_desc(selector, d);
}

/* Data segments that the outer level may not use become null. Bases stay: those of FS and GS matter
 * in 64-bit mode. */
static void drop_segments(struct x86_cpu *cpu, unsigned cpl)
{
    static const uint8_t data[] = {SEG_ES, SEG_DS, SEG_FS, SEG_GS};

    for (unsigned i = 0; i < ARRAY_SIZE(data); i++) {
        struct x86_seg *seg = &cpu->s.seg[data[i]];
        bool conforming = (seg->attr & 0xc) == 0xc;
        if (!(seg->attr & SEG_UNUSABLE) && !conforming && SEG_DPL(seg->attr) < cpl) {
            seg->selector = 0;
            seg->attr = SEG_UNUSABLE;
        }
    }
}

/* The width of the stack pointer under new CS and SS. */
static unsigned stack_width(const struct x86_cpu *cpu, const struct x86_seg *cs,
                            const struct x86_seg *ss)
{
    return cpu->long_mode && (cs->attr & SEG_L) ? 8 : ss->attr & SEG_DB ? 4 : 2;
}

/*
 * What a far return pops, n values from RSP upward. Where they are not all there, Intel's processors miss the last one first, and of the
 * selector they look at no more than its two bytes.
 */
static void pop_frame(struct x86_cpu *cpu, struct x86_stack *st, unsigned size, uint64_t *value, unsigned n)
{
    for (unsigned k = 0; k < n; k++) {
        unsigned i = cpu->amd ? k : n - 1 - k;
        uint64_t sp = st->sp;

        x86_stack_skip(st, (uint64_t)i * size);
        value[i] = x86_stack_pop(cpu, st, i == 1 && !cpu->amd ? 2 : size);
        st->sp = sp;
    }
    x86_stack_skip(st, (uint64_t)n * size);
}

void x86_insn_ret_far(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    unsigned size = insn->op_size;
    uint16_t release =
        insn->visible && insn->operand[0].kind == OPERAND_IMM ? (uint16_t)insn->imm[0] : 0;
    struct x86_stack st;
    uint64_t frame[2], rip;
    uint16_t selector;

    x86_stack_current(cpu, &st);
    pop_frame(cpu, &st, size, frame, 2);
    rip = frame[0];
    selector = (uint16_t)frame[1];

    if (!protected_mode(cpu)) {
        struct x86_seg cs = cpu->s.seg[SEG_CS];
        if (rip > cs.limit)
            x86_raise_error(cpu, X86_GP, 0);
        x86_stack_skip(&st, release);
        x86_stack_commit(cpu, &st);
        cs.selector = selector;
        cs.base = (uint32_t)selector << 4;
        commit_cs(cpu, &cs, rip);
        return;
    }

    struct x86_seg cs = return_target(cpu, selector);
    unsigned cpl = selector & 3u;
    x86_stack_skip(&st, release);
    if (cpl == cpu->cpl) {
        check_target(cpu, &cs, rip);
        x86_stack_commit(cpu, &st);
        commit_cs(cpu, &cs, rip);
        return;
    }
    uint64_t sp = x86_stack_pop(cpu, &st, size);
    uint16_t ss_selector = (uint16_t)x86_stack_pop(cpu, &st, size);
    struct x86_seg ss = return_stack(cpu, ss_selector, cpl, cpu->long_mode && (cs.attr & SEG_L));
    check_target(cpu, &cs, rip);
    cpu->s.seg[SEG_SS] = ss;
    x86_set_gpr(cpu, RSP, sp + release, stack_width(cpu, &cs, &ss));
    drop_segments(cpu, cpl);
    commit_cs(cpu, &cs, rip);
}

/* The flags after IRET: which may change depends on the privilege level that it leaves. */
static uint64_t returned_flags(const struct x86_cpu *cpu, uint64_t popped, unsigned size)
{
    uint64_t old = x86_rflags(cpu);
    uint64_t change =
        RFLAGS_ARITH | RFLAGS_TF | RFLAGS_DF | RFLAGS_NT | RFLAGS_RF | RFLAGS_AC | RFLAGS_ID;

    if (cpu->cpl <= (old & RFLAGS_IOPL) >> 12)
        change |= RFLAGS_IF;
    if (cpu->cpl == 0)
        change |= RFLAGS_IOPL | RFLAGS_VIF | RFLAGS_VIP;
    if (size == 2)
        change &= 0xffff;
    return (old & ~change) | (popped & change);
}

static void iret_real(struct x86_cpu *cpu, unsigned size)
{
    struct x86_stack st;
    struct x86_seg cs = cpu->s.seg[SEG_CS];

    x86_stack_current(cpu, &st);
    uint64_t rip = x86_stack_pop(cpu, &st, size);
    uint16_t selector = (uint16_t)x86_stack_pop(cpu, &st, size);
    uint64_t flags = x86_stack_pop(cpu, &st, size);
    if (rip > cs.limit)
        x86_raise_error(cpu, X86_GP, 0);
    x86_stack_commit(cpu, &st);
    x86_set_rflags(cpu, returned_flags(cpu, flags, size));
    cs.selector = selector;
    cs.base = (uint32_t)selector << 4;
    commit_cs(cpu, &cs, rip);
}

void x86_insn_iret(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    unsigned size = insn->op_size;

    /* NMIs are let in again even when the return faults. */
    if (cpu->s.nmi_blocked) {
        cpu->s.nmi_blocked = false;
        if (cpu->s.nmi_pending)
            x86_request(cpu, REQUEST_NMI);
    }
    if (!protected_mode(cpu)) {
        iret_real(cpu, size);
        return;
    }
    if (cpu->s.rflags & RFLAGS_NT) {
        if (cpu->long_mode)
            x86_raise_error(cpu, X86_GP, 0);
        x86_raise_error(cpu, X86_TS, cpu->s.tr.selector & 0xfffcu);
    }

    struct x86_stack st;
    uint64_t frame[3];

    x86_stack_current(cpu, &st);
    pop_frame(cpu, &st, size, frame, 3);

    uint64_t rip = frame[0], flags = frame[2];
    uint16_t selector = (uint16_t)frame[1];
    if ((flags & RFLAGS_VM) && size == 4 && !cpu->long_mode && cpu->cpl == 0)
        x86_raise_error(cpu, X86_GP, 0);

    struct x86_seg cs = return_target(cpu, selector);
    unsigned cpl = selector & 3u;
    flags = returned_flags(cpu, flags, size);
    if (cpl == cpu->cpl && cpu->code_size != 8) {
        check_target(cpu, &cs, rip);
        x86_stack_commit(cpu, &st);
        x86_set_rflags(cpu, flags);
        commit_cs(cpu, &cs, rip);
        return;
    }
    uint64_t sp = x86_stack_pop(cpu, &st, size);
    uint16_t ss_selector = (uint16_t)x86_stack_pop(cpu, &st, size);
    struct x86_seg ss = return_stack(cpu, ss_selector, cpl, cpu->long_mode && (cs.attr & SEG_L));
    check_target(cpu, &cs, rip);
    bool outer = cpl != cpu->cpl;
    cpu->s.seg[SEG_SS] = ss;
    x86_set_gpr(cpu, RSP, sp, stack_width(cpu, &cs, &ss));
    if (outer)
        drop_segments(cpu, cpl);
    x86_set_rflags(cpu, flags);
    commit_cs(cpu, &cs, rip);
}

/* ---- INT ---- */

void x86_insn_int(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    switch (insn->mnemonic) {
    case ZYDIS_MNEMONIC_INT1:
        x86_icebp(cpu);
        break;
    case ZYDIS_MNEMONIC_INT3:
        x86_software_interrupt(cpu, X86_BP);
        break;
    case ZYDIS_MNEMONIC_INTO:
        if (x86_rflags(cpu) & RFLAGS_OF)
            x86_software_interrupt(cpu, X86_OF);
        break;
    default:
        x86_software_interrupt(cpu, (uint8_t)insn->imm[0]);
        break;
    }
}

/* ---- SYSCALL, SYSENTER ---- */

void x86_insn_syscall(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    struct x86_state *s = &cpu->s;

    /* Intel's works in 64-bit mode only, AMD's in all of protected mode. */
    if (!(s->efer & EFER_SCE) || !protected_mode(cpu) || (cpu->code_size != 8 && !cpu->amd))
        x86_raise(cpu, X86_UD);

    unsigned selector = s->star >> 32 & 0xfffc;
    uint64_t rip;
    if (cpu->long_mode) {
        uint64_t flags = x86_rflags(cpu) & ~(uint64_t)RFLAGS_RF;
        s->gpr[RCX] = cpu->next_rip;
        s->gpr[R11] = flags;
        rip = cpu->code_size == 8 ? s->lstar : s->cstar;
        x86_set_rflags(cpu, flags & ~s->sfmask);
        s->seg[SEG_CS] = flat_segment(selector, FLAT_CODE64);
    } else {
        s->gpr[RCX] = (uint32_t)cpu->next_rip;
        rip = (uint32_t)s->star;
        x86_set_rflags(cpu, x86_rflags(cpu) & ~(uint64_t)(RFLAGS_IF | RFLAGS_RF | RFLAGS_VM));
        s->seg[SEG_CS] = flat_segment(selector, FLAT_CODE32);
    }
    s->seg[SEG_SS] = flat_segment(selector + 8, FLAT_DATA);
    cpu->next_rip = rip;
    x86_update_mode(cpu);
}

void x86_insn_sysret(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    struct x86_state *s = &cpu->s;

    if (!(s->efer & EFER_SCE) || !protected_mode(cpu) || (cpu->code_size != 8 && !cpu->amd))
        x86_raise(cpu, X86_UD);
    if (cpu->cpl != 0)
        x86_raise_error(cpu, X86_GP, 0);
    bool to_64bit = insn->op_size == 8 && cpu->code_size == 8;
    /* AMD lets the fetch in user mode find out. */
    if (to_64bit && !cpu->amd && !x86_canonical(cpu, s->gpr[RCX]))
        x86_raise_error(cpu, X86_GP, 0);

    unsigned selector = s->star >> 48;
    if (to_64bit) {
        s->seg[SEG_CS] = flat_segment(((selector + 16) & 0xffff) | 3, FLAT_CODE64 | FLAT_DPL3);
        cpu->next_rip = s->gpr[RCX];
    } else {
        s->seg[SEG_CS] = flat_segment(selector | 3, FLAT_CODE32 | FLAT_DPL3);
        cpu->next_rip = (uint32_t)s->gpr[RCX];
    }
    s->seg[SEG_SS] = flat_segment(((selector + 8) & 0xffff) | 3, FLAT_DATA | FLAT_DPL3);
    if (cpu->long_mode)
        x86_set_rflags(cpu, s->gpr[R11] & 0x3c7fd7);
    else
        x86_set_rflags(cpu, x86_rflags(cpu) | RFLAGS_IF);
    x86_update_mode(cpu);
}

void x86_insn_sysenter(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    struct x86_state *s = &cpu->s;

    if (cpu->long_mode && cpu->amd)
        x86_raise(cpu, X86_UD);
    if (!(s->cr0 & CR0_PE) || selector_null((unsigned)s->sysenter_cs & 0xffff))
        x86_raise_error(cpu, X86_GP, 0);

    unsigned selector = s->sysenter_cs & 0xfffc;
    x86_set_rflags(cpu, x86_rflags(cpu) & ~(uint64_t)(RFLAGS_VM | RFLAGS_IF | RFLAGS_RF));
    s->gpr[RSP] = cpu->long_mode ? s->sysenter_esp : (uint32_t)s->sysenter_esp;
    cpu->next_rip = cpu->long_mode ? s->sysenter_eip : (uint32_t)s->sysenter_eip;
    s->seg[SEG_CS] = flat_segment(selector, cpu->long_mode ? FLAT_CODE64 : FLAT_CODE32);
    s->seg[SEG_SS] = flat_segment(selector + 8, FLAT_DATA);
    x86_update_mode(cpu);
}

void x86_insn_sysexit(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    struct x86_state *s = &cpu->s;

    if (cpu->long_mode && cpu->amd)
        x86_raise(cpu, X86_UD);
    if (!(s->cr0 & CR0_PE) || selector_null((unsigned)s->sysenter_cs & 0xffff) || cpu->cpl != 0)
        x86_raise_error(cpu, X86_GP, 0);
    bool to_64bit = insn->op_size == 8 && cpu->code_size == 8;
    if (to_64bit && (!x86_canonical(cpu, s->gpr[RCX]) || !x86_canonical(cpu, s->gpr[RDX])))
        x86_raise_error(cpu, X86_GP, 0);

    unsigned selector = s->sysenter_cs & 0xffff;
    unsigned cs = selector + (to_64bit ? 32 : 16);
    s->seg[SEG_CS] =
        flat_segment((cs & 0xffff) | 3, (to_64bit ? FLAT_CODE64 : FLAT_CODE32) | FLAT_DPL3);
    s->seg[SEG_SS] = flat_segment(((cs + 8) & 0xffff) | 3, FLAT_DATA | FLAT_DPL3);
    cpu->next_rip = to_64bit ? s->gpr[RDX] : (uint32_t)s->gpr[RDX];
    s->gpr[RSP] = to_64bit ? s->gpr[RCX] : (uint32_t)s->gpr[RCX];
    x86_update_mode(cpu);
}
