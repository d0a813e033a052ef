/*
 * The interpreter as an engine: a vCPU's life and its run loop.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/log.h"
#include "device/machine.h"
#include "engine/interp/interp.h"
#include "engine/interp/trace.h"

/*
 * Decoded code of one vCPU. A kernel's boot is content with 8 MiB, but a server's start goes through programs of
 * all kinds: it decodes 4.6 million blocks with 24 MiB, most of them again and again. So a vCPU gets what the memory
 * limits leave (64 MiB beyond guest RAM for the interpreter, 192 MiB for the translator, with one vCPU). Each of several gets as
 * much, if it comes to need it: with half, a compiler on each of two took three times as long.
 * Translations are dear, and go with the blocks that they belong to.
 */
#define ARENA_SIZE MIB(32)
#define ARENA_SIZE_TRANSLATED MIB(112)

static size_t arena_size(const struct interp *it) { return it->block_hooks ? ARENA_SIZE_TRANSLATED : ARENA_SIZE; }

static void drop_code(struct x86_cpu *cpu, gpa_t gpa, unsigned len) { block_invalidate(interp_of(cpu), gpa, len); }

/* Called at block boundaries of the run loop only. */
static void drop_all(struct x86_cpu *cpu) { block_flush_all(interp_of(cpu)); }

void interp_code_stored(struct x86_cpu *cpu, gpa_t gpa, unsigned len)
{
    soft_code_written(&interp_of(cpu)->soft, gpa, len);
}

/* Blocks are found through the TLB, so a changed mapping is seen there. */
static void hook_mapping_changed(struct x86_cpu *cpu, const struct x86_tlb_space *space) {}

static const struct x86_engine_hooks hooks = {
    .code_written = interp_code_stored,
    .mapping_changed = hook_mapping_changed,
};

void interp_teardown(struct interp *it)
{
    soft_leave(&it->soft);
    block_cache_destroy(it);
    x86_cpu_destroy(&it->cpu);
}

int interp_setup(struct interp *it, struct vcpu *vcpu, const struct x86_engine_hooks *engine_hooks)
{
    int err = x86_cpu_init(&it->cpu, vcpu->machine, vcpu->lapic, vcpu->model, vcpu->index);

    if (err)
        return err;
    it->cpu.tsc_hz = vcpu->tsc_hz;
    it->cpu.cpus = vcpu->count;
    it->cpu.hooks = engine_hooks;
    it->cpu.engine = it;
    it->soft.drop_code = drop_code;
    it->soft.drop_all = drop_all;
    err = block_cache_init(it, arena_size(it));
    return err ? err : soft_join(vcpu->group, &it->soft, &it->cpu);
}

static void interp_destroy(struct vcpu *vcpu)
{
    if (vcpu->data)
        interp_teardown(vcpu->data);
    free(vcpu->data);
    vcpu->data = NULL;
}

static int interp_create(struct vcpu *vcpu)
{
    struct interp *it = aligned_alloc(64, align_up(sizeof(*it), 64));
    int err;

    if (!it) {
        log_error("out of memory for vCPU %u", vcpu->index);
        return -ENOMEM;
    }
    memset(it, 0, sizeof(*it));
    vcpu->data = it;
    if (trace_on())
        it->block_hooks = &trace_hooks;
    err = interp_setup(it, vcpu, &hooks);
    if (err)
        interp_destroy(vcpu);
    return err;
}

/* What keeps an instruction from simply being followed by the next: single step, interrupt shadow. */
static bool must_step(const struct x86_cpu *cpu)
{
    return (cpu->s.rflags & RFLAGS_TF) || cpu->s.interrupt_shadow;
}

static void execute(struct x86_cpu *cpu, const struct op *op)
{
    while (op)
        op = op->fn(cpu, op);
}

/* Instructions that may clear TF on their way into a handler and are then not followed by the trap. */
static bool enters_handler(const struct op *op)
{
    if (op->fn != op_semantics_end)
        return false;
    switch (((const struct slow_insn *)op->aux)->insn.mnemonic) {
    case ZYDIS_MNEMONIC_INT: case ZYDIS_MNEMONIC_INT1: case ZYDIS_MNEMONIC_INT3: case ZYDIS_MNEMONIC_INTO:
    case ZYDIS_MNEMONIC_SYSCALL: case ZYDIS_MNEMONIC_SYSENTER:
        return true;
    default:
        return false;
    }
}

/* One instruction; REQUEST_DEBUG makes whatever handler it has come back here. */
static __attribute__((noinline)) void step(struct x86_cpu *cpu)
{
    bool trap = cpu->s.rflags & RFLAGS_TF, enters;
    const struct op *op;

    x86_request(cpu, REQUEST_DEBUG);
    cpu->s.interrupt_shadow = 0;
    op = block_step(cpu);
    enters = enters_handler(op);
    execute(cpu, op);
    atomic_fetch_and(&cpu->request, ~REQUEST_DEBUG);
    /* A load of SS holds the trap back until after the next instruction (SDM vol. 3A 6.8.3). */
    if (trap && (!enters || (cpu->s.rflags & RFLAGS_TF)) && cpu->s.interrupt_shadow != 2) {
        if (cpu->s.activity == X86_HALTED)
            cpu->s.activity = X86_RUNNING;
        cpu->s.dr6 |= 0x4000;
        x86_raise(cpu, X86_DB);
    }
}

/* The state is this thread's alone: INIT rewrites it, while the SIPI that follows INIT may be on its way. */
static void take_sipi(struct interp *it)
{
    atomic_fetch_and(&it->cpu.request, ~REQUEST_START);
    it->cpu.s.sipi_vector = atomic_load(&it->sipi_vector);
    x86_request(&it->cpu, REQUEST_SIPI);
}

enum vm_exit interp_run(struct vcpu *vcpu)
{
    struct interp *it = vcpu->data;
    struct x86_cpu *cpu = &it->cpu;
    enum vm_exit exit;
    jmp_buf fault;

    soft_enter(&it->soft);
    cpu->fault_jmp = &fault;
    if (_setjmp(fault)) {
        it->arena_reserve = false;
        atomic_fetch_and(&cpu->request, ~REQUEST_DEBUG);
        x86_deliver_exception(cpu);
    }
    for (;;) {
        uint32_t request = atomic_load(&cpu->request);

        if (unlikely(request)) {
            if (request & REQUEST_EXIT) {
                atomic_fetch_and(&cpu->request, ~REQUEST_EXIT);
                exit = VM_EXIT_KICK;
                break;
            }
            if (request & (REQUEST_SYNC | REQUEST_CODE))
                soft_handle(&it->soft);
            if (request & REQUEST_START)
                take_sipi(it);
            if (!cpu->s.interrupt_shadow)
                x86_handle_requests(cpu);
        }
        if (unlikely(it->flush_wanted))
            block_flush_all(it);
        if (unlikely(cpu->s.activity != X86_RUNNING)) {
            if (cpu->s.activity == X86_SHUTDOWN) {
                exit = VM_EXIT_SHUTDOWN;
                break;
            }
            cpu->s.interrupt_shadow = 0;
            if (!atomic_load(&cpu->request))
                soft_wait(&it->soft);
            continue;
        }
        if (unlikely(cpu->cpl == 3 && !cpu->first_user_ns))
            cpu->first_user_ns = clock_now(cpu->machine->clock);
        if (it->run_user && cpu->cpl == 3) {
            enum interp_user what = it->run_user(it);

            if (what == INTERP_USER_STEP)
                step(cpu);
            if (what != INTERP_USER_BLOCK)
                continue;
        }
        if (unlikely(must_step(cpu)))
            step(cpu);
        else
            execute(cpu, block_find(cpu, cpu->s.rip));
    }
    cpu->fault_jmp = NULL;
    soft_exit(&it->soft);
    return exit;
}

void interp_kick(struct vcpu *vcpu) { soft_request(&((struct interp *)vcpu->data)->cpu, REQUEST_EXIT); }

void interp_signal(struct vcpu *vcpu, enum lapic_signal signal, unsigned value)
{
    struct x86_cpu *cpu = &((struct interp *)vcpu->data)->cpu;

    switch (signal) {
    case LAPIC_INTR: soft_request(cpu, REQUEST_INTR); break;
    case LAPIC_NMI: soft_request(cpu, REQUEST_NMI); break;
    case LAPIC_SMI: break;      /* there is no system management mode */
    case LAPIC_INIT: soft_request(cpu, REQUEST_INIT); break;
    case LAPIC_SIPI:
        atomic_store(&((struct interp *)vcpu->data)->sipi_vector, (uint8_t)value);
        soft_request(cpu, REQUEST_START);
        break;
    }
}

void interp_export(struct vcpu *vcpu, struct x86_state *s)
{
    struct interp *it = vcpu->data;
    struct x86_cpu *cpu = &it->cpu;
    uint32_t request = atomic_load(&cpu->request);

    x86_cpu_export(cpu, s);
    s->nmi_pending |= (request & REQUEST_NMI) != 0;
    s->init_pending = (request & REQUEST_INIT) != 0;
    s->sipi_pending = (request & (REQUEST_SIPI | REQUEST_START)) != 0;
    if (request & REQUEST_START)
        s->sipi_vector = atomic_load(&it->sipi_vector);
}

void interp_import(struct vcpu *vcpu, const struct x86_state *s)
{
    struct x86_cpu *cpu = &((struct interp *)vcpu->data)->cpu;

    /* What was on its way to the former state is not for the new one. */
    atomic_fetch_and(&cpu->request, ~(REQUEST_NMI | REQUEST_INIT | REQUEST_SIPI | REQUEST_START));
    x86_cpu_import(cpu, s);
    x86_request(cpu, (s->init_pending ? REQUEST_INIT : 0) | (s->sipi_pending ? REQUEST_SIPI : 0));
}

void interp_shift_tsc(struct vcpu *vcpu, uint64_t ticks)
{
    ((struct interp *)vcpu->data)->cpu.s.tsc_offset += ticks;
}

void interp_code_written(struct vcpu *vcpu, gpa_t page)
{
    soft_post_code(&((struct interp *)vcpu->data)->soft, page);
}

void interp_counters(const struct vcpu *vcpu, struct engine_counters *c)
{
    const struct interp *it = vcpu->data;
    const struct x86_cpu *cpu = &it->cpu;

    *c = (struct engine_counters){
        .instructions = cpu->insns,
        .first_user_ns = cpu->first_user_ns,
        .mmio_exits = cpu->mmio_exits,
        .port_exits = cpu->port_exits,
        .halts = cpu->halts,
        .exceptions = cpu->exceptions,
        .interrupts = cpu->interrupts,
        .tlb_misses = cpu->tlb_misses,
        .tlb_flushes = cpu->tlb_flushes,
        .page_walks = cpu->page_walks,
        .blocks_decoded = it->blocks_decoded,
        .block_flushes = it->block_flushes,
        .code_writes = it->code_writes,
    };
}

static void interp_probe(struct engine_report *r)
{
    *r = (struct engine_report){ .usable = true };
    snprintf(r->text, sizeof(r->text), "needs nothing from the host; decodes each instruction once and interprets it");
}

const struct engine interp_engine = {
    .name = "interp",
    .summary = "interpreter with a cache of decoded blocks",
    .checks_pages = true,
    .probe = interp_probe,
    .vcpu_create = interp_create,
    .vcpu_destroy = interp_destroy,
    .run = interp_run,
    .kick = interp_kick,
    .signal = interp_signal,
    .export_state = interp_export,
    .import_state = interp_import,
    .shift_tsc = interp_shift_tsc,
    .code_written = interp_code_written,
    .counters = interp_counters,
};
