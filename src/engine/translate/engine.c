/*
 * The translator as an engine: warm-up, entering and leaving translated code, chaining, jump tables, and what
 * happens to translations when blocks are dropped or mappings change.
 */
#include <asm/prctl.h>
#include <cpuid.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/log.h"
#include "device/machine.h"
#include "engine/interp/trace.h"
#include "engine/translate/direct.h"
#include "engine/translate/lockstep.h"
#include "engine/translate/perf.h"
#include "engine/translate/sandbox.h"
#include "engine/translate/translate.h"
#include "isa/x86/kvmclock.h"

/* ---- jump tables ---- */

static struct jump_table *table_of(struct translator *t, const struct x86_tlb_space *space)
{
    return &t->jumps[space ? 1 + (space - t->it.cpu.tlbs->space) : 0];
}

/* An empty entry has an address of another index, so no look-up finds it: 0 in all but the first, as new memory has. */
static void empty_entry(struct jump_table *table, unsigned i)
{
    uint64_t rip = i ? 0 : 1;

    table->entry[i] = (struct jump_entry_host){ .rip = rip, .negative = -rip };
}

/* Address spaces come and go with a few entries each, so it is remembered which were used. */
static void empty_table(struct jump_table *table)
{
    bool all = table->count > TRANSLATE_JUMPS_NOTED;
    unsigned n = all ? TRANSLATE_JUMPS : table->count;

    for (unsigned i = 0; i < n; i++)
        empty_entry(table, all ? i : table->noted[i]);
    table->count = 0;
}

/* ---- in and out ---- */

/* Translated code came to a jump that is not linked yet. */
static const struct op *follow(struct translator *t, struct chain *c)
{
    struct x86_cpu *cpu = &t->it.cpu;
    bool far = c->target >= GUEST_PAGE_SIZE;
    const struct op *found;

    cpu->s.rip = page_rip(cpu, c->target);
    if (atomic_load_explicit(&cpu->request, memory_order_relaxed))
        return NULL;
    found = block_find(cpu, cpu->s.rip);
    /* Inside a page the mapping that brought us here holds for the target too; elsewhere the gate looks. */
    if (block_linkable(found) && !c->block->dead && t->options.chain) {
        struct block *b = container_of(found, struct block, op);
        const uint8_t *to = !b->code || b->dead ? NULL : far ? translate_gate(t, b) : b->entry;

        if (to) {
            asm_set_target(c->jump, to);
            c->to = far ? NULL : b;          /* a dropped block's gate leads to where it is looked up */
            t->chained++;
        }
    }
    return found;
}

/* A RET found no translation where it leads, s.rip. One that leads nowhere raises where it stands. */
static const struct op *returned(struct translator *t)
{
    struct x86_cpu *cpu = &t->it.cpu;

    if (unlikely((uint64_t)((int64_t)(cpu->s.rip << 16) >> 16) != cpu->s.rip)) {
        cpu->s.gpr[RSP] -= 8 + (t->saved_code >> GUEST_PAGE_SHIFT);
        cpu->s.rip = page_rip(cpu, t->saved_code & (GUEST_PAGE_SIZE - 1));
        t->interpret_once = 1;
        return NULL;
    }
    if (atomic_load_explicit(&cpu->request, memory_order_relaxed))
        return NULL;
    return block_find(cpu, cpu->s.rip);
}

/* Chooses jump table and return stack for the mode and address space in force. */
static void select_space(struct translator *t)
{
    struct x86_cpu *cpu = &t->it.cpu;
    unsigned mode = cpu->cpl == 3;

    t->jumps_now = table_of(t, mode ? cpu->space : NULL);
    if (mode != t->return_mode) {
        t->returns[t->return_mode].saved = t->it.returns.top;
        t->return_mode = (uint8_t)mode;
        t->it.returns.top = t->returns[mode].saved;
        t->it.returns.bottom = t->returns[mode].bottom;
        t->it.returns.limit = (uint64_t *)(t->returns[mode].memory + GUEST_PAGE_SIZE);
    }
    if (mode && t->return_space != cpu->space) {
        t->return_space = cpu->space;
        translate_forget_returns(t, 1);
    }
}

/*
 * At a block's beginning: whether it is to be left for direct execution. In the page of a detour it is interpreted, since nobody
 * would look when translated code leaves that page.
 */
static bool goes_native(struct translator *t, const struct op *op)
{
    struct x86_cpu *cpu = &t->it.cpu;
    bool user = cpu->cpl == 3;

    if (unlikely(user != t->user_mode)) {
        t->user_mode = user;
        direct_entered(t, user);
    }
    if (likely(!user || t->native_space != cpu->space) || t->interpret_once)
        return false;
    cpu->s.rip = op_rip(cpu, op);
    if (likely((cpu->s.rip & GUEST_PAGE_MASK) != t->detour)) {
        t->detour = NO_DETOUR;
        return true;
    }
    if (++t->detour_blocks < DETOUR_BLOCKS) {
        t->interpret_once = 1;
        return false;
    }
    t->detour = NO_DETOUR;
    direct_lingers(t);
    return t->native_space != NULL;
}

static const struct op *op_enter(struct x86_cpu *cpu, const struct op *op)
{
    struct translator *t = translator_of(cpu);
    struct block *b = op->aux;
    const struct op *next;

    if (t->direct && goes_native(t, op))
        return NULL;
    if (unlikely(t->tracing && !t->interpret_once))     /* what is interpreted now was written down when it was entered */
        trace_block(cpu, b);
    if (unlikely(t->interpret_once || !translate_masks_all(cpu) || cpu->simd_trap != t->simd_trap)) {
        t->interpret_once = 0;
        NEXT;
    }
    select_space(t);
    if (t->options.indirect)
        translate_enter_jump(t->jumps_now, op_rip(cpu, op), b->indirect);
    t->entered++;
    next = unlikely(t->lockstep != NULL) ? lockstep_enter(t, b) : t->enter(t, b->code);
    if ((uintptr_t)next == RETURNED_NOWHERE)
        next = returned(t);
    else if ((uintptr_t)next & 1)
        next = follow(t, (struct chain *)((uintptr_t)next & ~(uintptr_t)1));
    if (!next)
        return NULL;
    GO(next);
}

/* In front of each block while it is interpreted. */
static const struct op *op_warm_up(struct x86_cpu *cpu, const struct op *op)
{
    struct translator *t = translator_of(cpu);
    struct block *b = op->aux;

    if (t->direct && goes_native(t, op))
        return NULL;
    /* Vector instructions are translated on the ground of what the control registers allow. */
    if (unlikely(cpu->simd_trap != t->simd_trap)) {
        t->simd_trap = cpu->simd_trap;
        t->it.flush_wanted = true;
    }
    if (unlikely(++b->heat == t->options.threshold) && t->options.tier && !t->it.flush_wanted && translate_block(t, b)) {
        if (unlikely(t->options.perf))
            perf_code(b->indirect, (size_t)(t->code.exec + t->code.used - (const uint8_t *)b->indirect), op_rip(cpu, op),
                      cpu->cpl == 3, NULL);
        b->op[0].fn = op_enter;
        GO(op);
    }
    if (unlikely(t->tracing && !t->interpret_once))
        trace_block(cpu, b);
    t->interpret_once = 0;
    NEXT;
}

/* ---- dropping ---- */

/* The first bytes of a translation are never being executed while C runs; neither are those of a place to return to. */
static void redirect(uint8_t *code, const uint8_t *target)
{
    struct assembler a = { .at = code, .end = code + 5 };

    asm_jmp_to(&a, target);
}

static void on_killed(struct interp *it, struct block *b)
{
    struct translator *t = (struct translator *)it;

    if (!b->code)
        return;
    redirect(b->entry, b->leave);
    if (b->gate)
        redirect(b->gate, t->far);
    for (const struct return_site *r = b->returns; r; r = r->next)
        redirect(r->code, t->return_missed);
}

static void on_unlink(struct block *from, const struct block *to)
{
    for (struct chain *c = from->chains; c; c = c->next)
        if (c->to == to) {
            asm_set_target(c->jump, c->stub);
            c->to = NULL;
        }
}

static void on_flushed(struct interp *it)
{
    struct translator *t = (struct translator *)it;

    code_reset(&t->code);
    for (unsigned i = 0; i < 1 + X86_TLB_SPACES; i++)
        empty_table(&t->jumps[i]);
    translate_forget_returns(t, 0);
    translate_forget_returns(t, 1);
}

static const struct block_hooks block_hooks = {
    .prologue = op_warm_up,
    .killed = on_killed,
    .unlink = on_unlink,
    .flushed = on_flushed,
};

static void mapping_changed(struct x86_cpu *cpu, const struct x86_tlb_space *space)
{
    struct translator *t = translator_of(cpu);

    empty_table(table_of(t, space));
    if (!space)
        translate_forget_returns(t, 0);
    else if (space == t->return_space)
        translate_forget_returns(t, 1);
}

static void flushed(struct x86_cpu *cpu, const struct x86_tlb_space *space, gva_t va, bool all)
{
    direct_flushed(translator_of(cpu), space, va, all);
}

static void writes_dropped(struct x86_cpu *cpu, const void *host_page) { direct_writes_dropped(translator_of(cpu), host_page); }

static void requested(struct x86_cpu *cpu) { direct_requested(translator_of(cpu)); }

static const struct x86_engine_hooks cpu_hooks = {
    .code_written = interp_code_stored,
    .mapping_changed = mapping_changed,
    .flushed = flushed,
    .writes_dropped = writes_dropped,
    .requested = requested,
};

/* ---- the engine ---- */

static void translate_destroy(struct vcpu *vcpu)
{
    struct translator *t = vcpu->data;

    if (!t)
        return;
    lockstep_destroy(t);
    interp_teardown(&t->it);
    direct_destroy(t);          /* when no other vCPU can reach this one's TLB any more */
    code_destroy(&t->code);
    translate_returns_destroy(t);
    free(t->jumps);
    free(t->work);
    free(t);
    vcpu->data = NULL;
}

static int translate_create(struct vcpu *vcpu)
{
    struct translator *t = aligned_alloc(64, align_up(sizeof(*t), 64));
    int err = -ENOMEM;

    if (!t)
        goto out;
    memset(t, 0, sizeof(*t));
    vcpu->data = t;
    t->self = t;
    t->options = translate_options;
    if (t->options.tier < 2)
        t->options.extend = false;
    t->tracing = trace_on();
    if (t->tracing)             /* each block by itself, and through here */
        t->options.chain = t->options.returns = t->options.indirect = t->options.extend = false;
    if (t->tracing || t->options.count || !t->options.chain)
        t->options.loops = false;
    if (t->options.lockstep) {
        err = lockstep_create(t, vcpu->count);
        if (err)
            goto out;
    }
    t->tlb_mask = (uint64_t)(TLB_ENTRIES - 1) << GUEST_PAGE_SHIFT;
    t->jump_mask = (uint64_t)(TRANSLATE_JUMPS - 1) << TRANSLATE_JUMP_ROTATE;
    t->page_mask = GUEST_PAGE_MASK;
    for (unsigned i = 0; i < ARRAY_SIZE(t->aligned_mask); i++)
        t->aligned_mask[i] = GUEST_PAGE_MASK | ((1u << i) - 1);
    t->jumps = calloc(1 + X86_TLB_SPACES, sizeof(*t->jumps));
    t->work = translate_work_create();
    if (!t->jumps || !t->work)
        goto out;
    err = code_init(&t->code, t->options.cache, t->options.perf == TRANSLATE_PERF_MAP);
    if (err)
        goto out;
    translate_emit_runtime(t);
    if (t->options.perf) {
        err = perf_open(t->options.perf);
        if (err)
            goto out;
        perf_code(t->code.exec, t->code.fixed, 0, false, "ringfort_runtime");
    }
    err = translate_returns_create(t);
    if (err)
        goto out;
    for (unsigned i = 0; i < 1 + X86_TLB_SPACES; i++)
        empty_entry(&t->jumps[i], 0);
    t->it.block_hooks = &block_hooks;
    err = interp_setup(&t->it, vcpu, &cpu_hooks);
    t->it.cpu.native_mxcsr_host = 0x1f80;
    t->detour = NO_DETOUR;
    if (!err)
        err = direct_create(t);
out:
    if (err) {
        if (err == -ENOMEM)
            log_error("out of memory for vCPU %u", vcpu->index);
        translate_destroy(vcpu);
    }
    return err;
}

static enum vm_exit translate_run(struct vcpu *vcpu)
{
    struct translator *t = vcpu->data;
    enum vm_exit exit;

    /* Translated code finds its data through GS, which neither the C library nor the compiler uses. */
    if (syscall(SYS_arch_prctl, ARCH_SET_GS, t)) {
        log_error("cannot set the GS base: %s", strerror(errno));
        return VM_EXIT_ERROR;
    }
    t->host_tsc = x86_tsc_is_host(t->it.cpu.machine, t->it.cpu.tsc_hz);
    if (translate_returns_attach(t))
        return VM_EXIT_ERROR;
    direct_attach(t);
    exit = interp_run(vcpu);
    direct_detach(t);
    translate_returns_detach(t);
    if (t->lost) {
        t->lost = false;        /* it may be reset */
        return VM_EXIT_ERROR;
    }
    return t->diverged ? VM_EXIT_ERROR : exit;
}

static void translate_probe(struct engine_report *r)
{
    unsigned eax, ebx = 0, ecx, edx;

    *r = (struct engine_report){ .usable = false };
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(ebx & bit_BMI2)) {
        snprintf(r->text, sizeof(r->text), "this processor lacks BMI2; use --engine interp");
        return;
    }
    r->usable = true;
    snprintf(r->text, sizeof(r->text), "binary translation");
}

static void translate_describe(char *text, size_t size)
{
    const struct sandbox_abilities *a = sandbox_abilities();

    if (a->usable)
        snprintf(text, size, "binary translation of kernel code; user code runs natively in sandboxed processes where that pays");
    else
        snprintf(text, size, "binary translation of all code; not natively in sandboxed processes: %s", a->text);
}

static void translate_counters(const struct vcpu *vcpu, struct engine_counters *c)
{
    const struct translator *t = vcpu->data;

    interp_counters(vcpu, c);
    c->units = t->blocks;
    c->units_apart = t->apart;
    c->units_looping = t->loops;
    c->unit_bytes = t->bytes;
    c->guest_bytes = t->guest_bytes;
    c->chains = t->chained;
    c->entries = t->entered;
    c->checks_missed = t->fills;
    c->jumps_missed = t->jump_misses;
    c->groups_missed = t->group_misses;
    c->interpreted_ops = t->slow_ops;
    c->returns_missed = t->return_misses;
    c->return_overflows = t->stack_overflows;
    direct_counters(t, c);
    if (!t->options.count)
        c->instructions = 0;
}

const struct engine translate_engine = {
    .name = "translate",
    .summary = "binary translator on top of the interpreter",
    .checks_pages = true,
    .probe = translate_probe,
    .describe = translate_describe,
    .vcpu_create = translate_create,
    .vcpu_destroy = translate_destroy,
    .run = translate_run,
    .kick = interp_kick,
    .signal = interp_signal,
    .export_state = interp_export,
    .import_state = interp_import,
    .shift_tsc = interp_shift_tsc,
    .code_written = interp_code_written,
    .counters = translate_counters,
};
