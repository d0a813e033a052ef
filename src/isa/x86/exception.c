/*
 * Exceptions and interrupts: raising, delivery through the IDT, double and triple faults, and
 * what other threads ask of the vCPU at an instruction boundary.
 *
 * SDM vol. 3A ch. 6. The vCPU's thread. Delivery changes registers only when all of it has
 * succeeded; a fault in the middle is caught by a jump buffer of its own and combined with the
 * event being delivered as table 6-5 says.
 *
 * Hardware task switching is not offered: a task gate raises #TS with the TSS's selector (in long
 * mode it is #GP anyway).
 */
#include <string.h>

#include "base/util.h"
#include "device/irqchip/irqchip.h"
#include "isa/x86/mmu.h"
#include "isa/x86/segment.h"
#include "isa/x86/transfer.h"

#define DR6_BS 0x4000u
#define DR7_GD 0x2000u

enum event_kind {
    EVENT_EXCEPTION, /* of the processor */
    EVENT_INTERRUPT, /* external, NMI */
    EVENT_SOFTWARE,  /* INT n, INT3, INTO: the gate's DPL counts */
    EVENT_ICEBP,     /* INT1: like an exception */
};

struct event {
    uint8_t vector, kind;
    bool has_error;
    uint32_t error;
    uint64_t rip; /* to return to */
};

/* ---- raising ---- */

_Noreturn static void raise_now(struct x86_cpu *cpu, unsigned vector, bool has_error,
                                uint32_t error)
{
    x86_split_unlock(cpu);
    cpu->exc_vector = (uint8_t)vector;
    cpu->exc_has_error = has_error;
    cpu->exc_software = false;
    cpu->exc_error = error;
    longjmp(*cpu->fault_jmp, 1);
}

void x86_raise(struct x86_cpu *cpu, unsigned vector)
{
    raise_now(cpu, vector, false, 0);
}

void x86_raise_error(struct x86_cpu *cpu, unsigned vector, uint32_t error)
{
    raise_now(cpu, vector, true, error);
}

void x86_raise_page_fault(struct x86_cpu *cpu, gva_t address, uint32_t error)
{
    cpu->s.cr2 = cpu->s.efer & EFER_LMA ? address : (uint32_t)address;
    raise_now(cpu, X86_PF, true, error);
}

/* ---- delivery ---- */

/* Bit 0 of the error codes of faults during delivery: the event came from outside the program. */
static uint32_t ext_bit(const struct event *e)
{
    return e->kind != EVENT_SOFTWARE;
}

/* Error code that names the IDT entry. */
static uint32_t idt_error(const struct event *e)
{
    return e->vector * 8u + 2 + ext_bit(e);
}

/*
 * RFLAGS as pushed: faults set RF, so that the instruction is not stopped by its breakpoint again.
 * Otherwise the instruction before has cleared it, which engines do not do at each instruction.
 */
static uint64_t pushed_flags(const struct x86_cpu *cpu, const struct event *e)
{
    uint64_t flags = x86_rflags(cpu) & ~(uint64_t)RFLAGS_RF;
    bool fault = e->kind == EVENT_EXCEPTION && e->vector != X86_DB && e->vector != X86_BP &&
                 e->vector != X86_OF && e->vector != X86_DF && e->vector != X86_MC;

    return fault ? flags | RFLAGS_RF : flags;
}

/* The last step of each kind of delivery. */
static void enter_handler(struct x86_cpu *cpu, const struct x86_seg *cs, uint64_t rip,
                          bool mask_interrupts)
{
    uint64_t clear = RFLAGS_TF | RFLAGS_NT | RFLAGS_RF | RFLAGS_VM;

    if (mask_interrupts)
        clear |= RFLAGS_IF;
    cpu->s.rflags &= ~clear;
    cpu->s.seg[SEG_CS] = *cs;
    cpu->s.rip = cpu->next_rip = rip;
    cpu->s.interrupt_shadow = 0;
    x86_update_mode(cpu);
}

static void deliver_real(struct x86_cpu *cpu, const struct event *e)
{
    struct x86_stack st;
    struct x86_seg cs = cpu->s.seg[SEG_CS];

    if (e->vector * 4u + 3 > cpu->s.idt.limit)
        x86_raise(cpu, X86_GP);
    uint32_t entry =
        x86_read32_in(cpu, x86_system_set(cpu), (uint32_t)(cpu->s.idt.base + e->vector * 4u));
    if ((entry & 0xffff) > cs.limit)
        x86_raise(cpu, X86_GP);

    x86_stack_current(cpu, &st);
    x86_stack_push(cpu, &st, pushed_flags(cpu, e), 2);
    x86_stack_push(cpu, &st, cs.selector, 2);
    x86_stack_push(cpu, &st, e->rip, 2);
    x86_stack_commit(cpu, &st);
    cs.selector = (uint16_t)(entry >> 16);
    cs.base = (uint32_t)cs.selector << 4;
    cpu->s.rflags &= ~(uint64_t)RFLAGS_AC;
    enter_handler(cpu, &cs, entry & 0xffff, true);
}

/*
 * Checks the gate's code segment. Returns the privilege level of the handler and the descriptor,
 * its accessed bit set.
 */
static unsigned handler_segment(struct x86_cpu *cpu, const struct event *e, uint16_t selector,
                                uint64_t *d)
{
    uint32_t error = (selector & 0xfffcu) | ext_bit(e);

    if (selector_null(selector))
        x86_raise_error(cpu, X86_GP, ext_bit(e));
    if (!x86_read_descriptor(cpu, selector, d) || !desc_is_code(*d) || desc_dpl(*d) > cpu->cpl ||
        (cpu->long_mode && (!desc_l(*d) || desc_db(*d))))
        x86_raise_error(cpu, X86_GP, error);
    if (!desc_present(*d))
        x86_raise_error(cpu, X86_NP, error);
    x86_set_accessed(cpu, selector, d);
    return desc_is_conforming(*d) ? cpu->cpl : desc_dpl(*d);
}

static void deliver_long(struct x86_cpu *cpu, const struct event *e)
{
    struct tlb_set *sys = x86_system_set(cpu);
    gva_t at = cpu->s.idt.base + e->vector * 16u;
    uint64_t d;

    if (e->vector * 16u + 15 > cpu->s.idt.limit)
        x86_raise_error(cpu, X86_GP, idt_error(e));
    uint64_t low = x86_read64_in(cpu, sys, at), high = x86_read64_in(cpu, sys, at + 8);
    if (desc_s(low) || (desc_type(low) != DESC_INT_GATE && desc_type(low) != DESC_TRAP_GATE))
        x86_raise_error(cpu, X86_GP, idt_error(e));
    if (e->kind == EVENT_SOFTWARE && desc_dpl(low) < cpu->cpl)
        x86_raise_error(cpu, X86_GP, idt_error(e));
    if (!desc_present(low))
        x86_raise_error(cpu, X86_NP, idt_error(e));

    uint16_t selector = (uint16_t)(low >> 16);
    unsigned cpl = handler_segment(cpu, e, selector, &d);
    unsigned ist = low >> 32 & 7;
    uint64_t rip = (low & 0xffff) | (low >> 32 & 0xffff0000) | high << 32;

    struct x86_stack st;
    if (ist || cpl != cpu->cpl) {
        x86_stack_from_tss(cpu, cpl, ist, ext_bit(e), &st);
        if (cpl == cpu->cpl)
            st.ss = cpu->s.seg[SEG_SS];
    } else {
        x86_stack_current(cpu, &st);
        st.sp = cpu->s.gpr[RSP];
        st.width = 8;
        st.set = x86_set_for_cpl(cpu, cpl);
        st.fault_error = ext_bit(e);
    }
    st.sp &= ~15ull;
    x86_stack_push(cpu, &st, cpu->s.seg[SEG_SS].selector, 8);
    x86_stack_push(cpu, &st, cpu->s.gpr[RSP], 8);
    x86_stack_push(cpu, &st, pushed_flags(cpu, e), 8);
    x86_stack_push(cpu, &st, cpu->s.seg[SEG_CS].selector, 8);
    x86_stack_push(cpu, &st, e->rip, 8);
    if (e->has_error)
        x86_stack_push(cpu, &st, e->error, 8);
    if (!x86_canonical(cpu, rip))
        x86_raise_error(cpu, X86_GP, ext_bit(e));

    cpu->s.seg[SEG_SS] = st.ss;
    cpu->s.gpr[RSP] = st.sp;
    struct x86_seg cs = x86_seg_from_desc((uint16_t)((selector & ~3u) | cpl), d);
    enter_handler(cpu, &cs, rip, desc_type(low) == DESC_INT_GATE);
}

static void deliver_protected(struct x86_cpu *cpu, const struct event *e)
{
    uint32_t at = (uint32_t)(cpu->s.idt.base + e->vector * 8u);
    uint64_t d;

    if (e->vector * 8u + 7 > cpu->s.idt.limit)
        x86_raise_error(cpu, X86_GP, idt_error(e));
    uint64_t gate = x86_read64_in(cpu, x86_system_set(cpu), at);
    unsigned type = desc_type(gate);
    if (desc_s(gate) ||
        (type != DESC_INT_GATE && type != DESC_TRAP_GATE && type != DESC_INT_GATE16 &&
         type != DESC_TRAP_GATE16 && type != DESC_TASK_GATE))
        x86_raise_error(cpu, X86_GP, idt_error(e));
    if (e->kind == EVENT_SOFTWARE && desc_dpl(gate) < cpu->cpl)
        x86_raise_error(cpu, X86_GP, idt_error(e));
    if (!desc_present(gate))
        x86_raise_error(cpu, X86_NP, idt_error(e));

    uint16_t selector = (uint16_t)(gate >> 16);
    if (type == DESC_TASK_GATE)
        x86_raise_error(cpu, X86_TS, (selector & 0xfffcu) | ext_bit(e));
    unsigned cpl = handler_segment(cpu, e, selector, &d);
    unsigned size = type & 8 ? 4 : 2;
    uint32_t eip = (uint32_t)(gate & 0xffff);
    if (size == 4)
        eip |= (uint32_t)(gate >> 32) & 0xffff0000;

    struct x86_stack st;
    if (cpl != cpu->cpl) {
        x86_stack_from_tss(cpu, cpl, 0, ext_bit(e), &st);
        x86_stack_push(cpu, &st, cpu->s.seg[SEG_SS].selector, size);
        x86_stack_push(cpu, &st, cpu->s.gpr[RSP], size);
    } else {
        x86_stack_current(cpu, &st);
        st.set = x86_set_for_cpl(cpu, cpl);
        st.fault_error = ext_bit(e);
    }
    x86_stack_push(cpu, &st, pushed_flags(cpu, e), size);
    x86_stack_push(cpu, &st, cpu->s.seg[SEG_CS].selector, size);
    x86_stack_push(cpu, &st, e->rip, size);
    if (e->has_error)
        x86_stack_push(cpu, &st, e->error, size);
    struct x86_seg cs = x86_seg_from_desc((uint16_t)((selector & ~3u) | cpl), d);
    if (eip > cs.limit)
        x86_raise_error(cpu, X86_GP, ext_bit(e));

    cpu->s.seg[SEG_SS] = st.ss;
    x86_stack_commit(cpu, &st);
    enter_handler(cpu, &cs, eip, !(type & 1));
}

/* Raises when delivery itself faults; nothing is changed then. */
static void deliver(struct x86_cpu *cpu, const struct event *e)
{
    if (!(cpu->s.cr0 & CR0_PE))
        deliver_real(cpu, e);
    else if (cpu->long_mode)
        deliver_long(cpu, e);
    else
        deliver_protected(cpu, e);
    if (e->kind != EVENT_SOFTWARE && e->vector == X86_DB)
        cpu->s.dr7 &= ~(uint64_t)DR7_GD;
}

static bool contributory(const struct event *e)
{
    return e->kind == EVENT_EXCEPTION &&
           (e->vector == X86_DE || (e->vector >= X86_TS && e->vector <= X86_GP));
}

static bool page_fault(const struct event *e)
{
    return e->kind == EVENT_EXCEPTION && e->vector == X86_PF;
}

/* What is delivered after second was raised during the delivery of first (SDM table 6-5). False:
 * shutdown. */
static bool combine(struct event *first, const struct event *second)
{
    bool serious = contributory(second) || page_fault(second);

    if (first->kind == EVENT_EXCEPTION && first->vector == X86_DF && serious)
        return false;
    if ((contributory(first) && contributory(second)) || (page_fault(first) && serious)) {
        first->vector = X86_DF;
        first->kind = EVENT_EXCEPTION;
        first->has_error = true;
        first->error = 0;
    } else {
        uint64_t rip = first->rip;
        *first = *second;
        first->rip = rip;
    }
    return true;
}

static struct event raised_event(const struct x86_cpu *cpu)
{
    /* Real mode's interrupt table has no room for error codes. */
    return (struct event){
        .vector = cpu->exc_vector,
        .kind = EVENT_EXCEPTION,
        .has_error = cpu->exc_has_error && (cpu->s.cr0 & CR0_PE),
        .error = cpu->exc_error,
        .rip = cpu->s.rip,
    };
}

static void deliver_nested(struct x86_cpu *cpu, struct event e)
{
    jmp_buf *outer = cpu->fault_jmp;
    jmp_buf inner;
    /* Changed between setjmp and longjmp. */
    volatile struct event pending = e;

    cpu->fault_jmp = &inner;
    if (setjmp(inner)) {
        struct event first = pending, second = raised_event(cpu);
        if (!combine(&first, &second)) {
            cpu->s.activity = X86_SHUTDOWN;
            cpu->fault_jmp = outer;
            return;
        }
        pending = first;
    }
    e = pending;
    deliver(cpu, &e);
    cpu->fault_jmp = outer;
}

void x86_deliver_exception(struct x86_cpu *cpu)
{
    struct event e = raised_event(cpu);

    if (cpu->exc_software)
        e.rip = cpu->next_rip;
    cpu->exceptions++;
    deliver_nested(cpu, e);
}

void x86_deliver_interrupt(struct x86_cpu *cpu, unsigned vector)
{
    struct event e = {.vector = (uint8_t)vector, .kind = EVENT_INTERRUPT, .rip = cpu->s.rip};

    cpu->interrupts++;
    deliver_nested(cpu, e);
}

void x86_software_interrupt(struct x86_cpu *cpu, unsigned vector)
{
    /* A fault on the way is an ordinary fault of this instruction. */
    struct event e = {.vector = (uint8_t)vector, .kind = EVENT_SOFTWARE, .rip = cpu->next_rip};

    deliver(cpu, &e);
}

void x86_icebp(struct x86_cpu *cpu)
{
    struct event e = {.vector = X86_DB, .kind = EVENT_ICEBP, .rip = cpu->next_rip};

    deliver(cpu, &e);
}

/* ---- requests ---- */

static void handle_init(struct x86_cpu *cpu)
{
    uint8_t sipi_vector = cpu->s.sipi_vector;

    x86_state_init_signal(&cpu->s, cpu->index == 0);
    cpu->s.sipi_vector = sipi_vector;
    x86_set_arith(cpu, cpu->s.rflags);
    cpu->next_rip = cpu->s.rip;
    if (cpu->lapic)
        lapic_reset(cpu->lapic, true);
    x86_tlb_flush_all(cpu);
}

static void handle_sipi(struct x86_cpu *cpu)
{
    struct x86_seg *cs = &cpu->s.seg[SEG_CS];

    if (cpu->s.activity != X86_WAIT_FOR_SIPI)
        return;
    cs->selector = (uint16_t)(cpu->s.sipi_vector << 8);
    cs->base = (uint64_t)cpu->s.sipi_vector << 12;
    cpu->s.rip = cpu->next_rip = 0;
    cpu->s.activity = X86_RUNNING;
    x86_update_mode(cpu);
}

static void handle_nmi(struct x86_cpu *cpu)
{
    cpu->s.nmi_pending = false;
    cpu->s.nmi_blocked = true;
    cpu->s.activity = X86_RUNNING;
    x86_deliver_interrupt(cpu, X86_NMI);
}

/* True: a vector was delivered. */
static bool handle_interrupt(struct x86_cpu *cpu)
{
    if (!cpu->lapic || lapic_pending(cpu->lapic) < 0)
        return false;
    int vector = lapic_ack(cpu->lapic);
    if (vector < 0)
        return false;
    cpu->s.activity = X86_RUNNING;
    x86_deliver_interrupt(cpu, (unsigned)vector);
    return true;
}

void x86_handle_requests(struct x86_cpu *cpu)
{
    uint32_t request = atomic_load_explicit(&cpu->request, memory_order_relaxed) &
                       (REQUEST_INTR | REQUEST_NMI | REQUEST_INIT | REQUEST_SIPI | REQUEST_DEBUG);

    if (!request)
        return;
    /* What cannot be handled yet is asked for again below. */
    atomic_fetch_and(&cpu->request, ~request);
    if (request & REQUEST_NMI)
        cpu->s.nmi_pending = true;

    if (request & REQUEST_INIT)
        handle_init(cpu);
    if (request & REQUEST_SIPI)
        handle_sipi(cpu);
    if (cpu->s.activity == X86_WAIT_FOR_SIPI || cpu->s.activity == X86_SHUTDOWN)
        return;

    /* Traps of the instruction before come first (SDM table 6-2). */
    if (request & REQUEST_DEBUG) {
        cpu->s.dr6 |= DR6_BS;
        cpu->exc_vector = X86_DB;
        cpu->exc_has_error = cpu->exc_software = false;
        x86_deliver_exception(cpu);
    }
    if (cpu->s.interrupt_shadow) {
        if (cpu->s.nmi_pending || (request & REQUEST_INTR))
            x86_request(cpu, (cpu->s.nmi_pending ? REQUEST_NMI : 0) | (request & REQUEST_INTR));
        return;
    }
    /* A pending NMI that is blocked waits for IRET, which asks again. */
    if (cpu->s.nmi_pending && !cpu->s.nmi_blocked && cpu->s.activity != X86_SHUTDOWN)
        handle_nmi(cpu);
    /* While IF is clear the request is dropped: who sets IF asks again. */
    if (!(request & REQUEST_INTR) || !(cpu->s.rflags & RFLAGS_IF) ||
        cpu->s.activity == X86_SHUTDOWN)
        return;
    /* A handler behind a trap gate can be interrupted at once by a higher priority. */
    if (handle_interrupt(cpu) && (cpu->s.rflags & RFLAGS_IF))
        x86_request(cpu, REQUEST_INTR);
}
