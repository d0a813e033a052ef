/*
 * The ways out of the fast handlers: memory accesses that miss, addresses with segment checks, and
 * instructions whose meaning is a function of src/isa/x86 or that run natively.
 */
#include "device/machine.h"
#include "engine/interp/interp.h"

gva_t ea_slow(struct x86_cpu *cpu, const struct op *op, unsigned size, bool write)
{
    enter_slow(cpu, op);
    return x86_linear(cpu, &((const struct slow_insn *)op->aux)->insn, size, write);
}

uint64_t ld_slow(struct x86_cpu *cpu, const struct op *op, gva_t va, unsigned size)
{
    enter_slow(cpu, op);
    return x86_read_slow(cpu, cpu->tlb, va, size);
}

void st_slow(struct x86_cpu *cpu, const struct op *op, gva_t va, uint64_t v, unsigned size)
{
    enter_slow(cpu, op);
    x86_write_slow(cpu, cpu->tlb, va, v, size);
}

uint64_t rmw_slow_read(struct x86_cpu *cpu, const struct op *op, gva_t va, unsigned size)
{
    enter_slow(cpu, op);
    x86_probe_write(cpu, va, size);
    return x86_read_slow(cpu, cpu->tlb, va, size);
}

const struct op *op_undefined(struct x86_cpu *cpu, const struct op *op)
{
    enter_slow(cpu, op);
    x86_raise(cpu, X86_UD);
}

/* Fetch found an instruction longer than 15 bytes. */
const struct op *op_too_long(struct x86_cpu *cpu, const struct op *op)
{
    enter_slow(cpu, op);
    x86_raise_error(cpu, X86_GP, 0);
}

/* Runs natively; never changes control flow or mode. */
const struct op *op_native(struct x86_cpu *cpu, const struct op *op)
{
    const struct slow_insn *slow = op->aux;

    enter_slow(cpu, op);
    native_execute(cpu, &slow->insn, slow->native);
    NEXT;
}

/* A semantics function that leaves mode, mappings and control flow alone. */
const struct op *op_semantics(struct x86_cpu *cpu, const struct op *op)
{
    const struct slow_insn *slow = op->aux;

    enter_slow(cpu, op);
    slow->semantics(cpu, &slow->insn);
    NEXT;
}

/* One that may change anything: the block ends, and the run loop looks around before it goes on. */
const struct op *op_semantics_end(struct x86_cpu *cpu, const struct op *op)
{
    const struct slow_insn *slow = op->aux;

    enter_slow(cpu, op);
    slow->semantics(cpu, &slow->insn);
    cpu->s.rip = cpu->next_rip;
    cpu->insns += op->n + 1u;
    if (unlikely(cpu->cpl == 3 && !cpu->first_user_ns))
        cpu->first_user_ns = clock_now(cpu->machine->clock);
    if (unlikely(atomic_load_explicit(&cpu->request, memory_order_relaxed)) || cpu->s.interrupt_shadow ||
        cpu->s.activity != X86_RUNNING || (cpu->s.rflags & RFLAGS_TF))
        return NULL;
    const struct op *found = block_find(cpu, cpu->s.rip);
    GO(found);
}
