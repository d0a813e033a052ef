/*
 * The translator as an engine: warm-up, entering and leaving translated code, chaining, and what happens to
 * translations when blocks are dropped or mappings change.
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
#include "engine/translate/translate.h"

#define CODE_SIZE MIB(48)
/* Most code that runs at all runs once; what has run a dozen times tends to run thousands of times. */
unsigned translate_threshold = 12;

/* ---- running one op from translated code ---- */

/* Unmasked exceptions are found by the interpreter's way of running vector instructions. */
static bool masks_all(const struct x86_cpu *cpu) { return (cpu->s.fpu.mxcsr & 0x1f80) == 0x1f80; }

/* Behind the copy of an op: it came to its end. */
static const struct op *op_finished(struct x86_cpu *cpu, const struct op *op)
{
    struct block *b = op->aux;

    if (unlikely(b->dead || !masks_all(cpu))) {
        cpu->s.rip = op_rip(cpu, op);
        return NULL;
    }
    translator_of(cpu)->op_finished = true;
    return NULL;
}

const struct op *translate_single(struct translator *t, const struct op *op, struct block *b)
{
    struct op *pair = block_alloc(&t->it, 2 * sizeof(*pair));

    pair[0] = *op;
    pair[0].n = 0;              /* the block's count is added at its end */
    pair[1] = (struct op){ .fn = op_finished, .rip = op->rip + op->len, .aux = b };
    return pair;
}

int translate_run_op(struct x86_cpu *cpu, const struct op *op)
{
    struct translator *t = translator_of(cpu);

    t->op_finished = false;
    while (op)
        op = op->fn(cpu, op);
    return t->op_finished;
}

/* ---- in and out ---- */

static struct block *block_of(const struct op *first) { return container_of(first, struct block, op); }

/* Translated code came to a jump that is not linked yet. */
static const struct op *follow(struct translator *t, struct chain *c)
{
    struct x86_cpu *cpu = &t->it.cpu;
    const struct op *found;

    cpu->s.rip = page_rip(cpu, c->target);
    if (atomic_load_explicit(&cpu->request, memory_order_relaxed))
        return NULL;
    found = block_find(cpu, cpu->s.rip);
    /* Inside a page the mapping that brought us here holds for the target too. */
    if (block_linkable(found) && c->target < GUEST_PAGE_SIZE && !c->block->dead) {
        const struct block *b = block_of(found);

        if (b->code && !b->dead) {
            asm_set_target(c->jump, b->entry);
            c->to = b;
            t->chained++;
        }
    }
    return found;
}

static const struct op *op_enter(struct x86_cpu *cpu, const struct op *op)
{
    struct translator *t = translator_of(cpu);
    const struct block *b = op->aux;
    struct jump_table *jumps = &t->jumps[cpu->cpl == 3];
    uint64_t rip = op_rip(cpu, op);
    unsigned i = translate_jump_index(rip);
    const struct op *next;

    if (unlikely(!masks_all(cpu) || cpu->simd_trap != t->simd_trap))
        NEXT;
    jumps->tag[i] = -rip;
    jumps->code[i] = b->indirect;
    t->jumps_now = jumps;
    t->jumps_used[cpu->cpl == 3] = true;
    t->entered++;
    next = t->enter(t, b->code);
    if ((uintptr_t)next & 1)
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

    /* Vector instructions are translated on the ground of what the control registers allow. */
    if (unlikely(cpu->simd_trap != t->simd_trap)) {
        t->simd_trap = cpu->simd_trap;
        t->it.flush_wanted = true;
    }
    if (unlikely(++b->heat == t->threshold) && !t->it.flush_wanted && translate_block(t, b)) {
        b->op[0].fn = op_enter;
        GO(op);
    }
    NEXT;
}

/* ---- dropping ---- */

static void on_killed(struct interp *it, struct block *b)
{
    struct assembler a;

    if (!b->code)
        return;
    /* The first bytes of a translation are never being executed while C runs. */
    a = (struct assembler){ .at = b->entry, .end = b->entry + 5 };
    asm_jmp_to(&a, b->leave);
}

static void on_unlink(struct block *from, const struct block *to)
{
    for (struct chain *c = from->chains; c; c = c->next)
        if (c->to == to) {
            asm_set_target(c->jump, c->stub);
            c->to = NULL;
        }
}

/* mode: 0 the supervisor's, 1 the user's. */
static void empty_jumps(struct translator *t, unsigned mode)
{
    if (!t->jumps_used[mode])
        return;
    for (unsigned i = 0; i < TRANSLATE_JUMPS; i++)
        t->jumps[mode].tag[i] = -((uint64_t)(i ^ 1) << TRANSLATE_JUMP_SHIFT);     /* matches nothing with this index */
    t->jumps_used[mode] = false;
}

static void on_flushed(struct interp *it)
{
    struct translator *t = (struct translator *)it;

    code_reset(&t->code);
    empty_jumps(t, 0);
    empty_jumps(t, 1);
}

static const struct block_hooks block_hooks = {
    .prologue = op_warm_up,
    .killed = on_killed,
    .unlink = on_unlink,
    .flushed = on_flushed,
};

static void mapping_changed(struct x86_cpu *cpu, bool user, bool supervisor)
{
    struct translator *t = translator_of(cpu);

    if (supervisor)
        empty_jumps(t, 0);
    if (user)
        empty_jumps(t, 1);
}

static const struct x86_engine_hooks cpu_hooks = {
    .code_written = interp_code_stored,
    .mapping_changed = mapping_changed,
};

/* ---- the engine ---- */

static void translate_destroy(struct vcpu *vcpu)
{
    struct translator *t = vcpu->data;

    if (!t)
        return;
    interp_teardown(&t->it);
    code_destroy(&t->code);
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
    t->threshold = translate_threshold;
    t->tlb_mask = (uint64_t)(TLB_ENTRIES - 1) << GUEST_PAGE_SHIFT;
    t->jump_mask = (uint64_t)(TRANSLATE_JUMPS - 1) << TRANSLATE_JUMP_SHIFT;
    t->page_mask = GUEST_PAGE_MASK;
    for (unsigned i = 0; i < ARRAY_SIZE(t->aligned_mask); i++)
        t->aligned_mask[i] = GUEST_PAGE_MASK | ((1u << i) - 1);
    t->jumps = calloc(2, sizeof(*t->jumps));
    t->work = translate_work_create();
    if (!t->jumps || !t->work)
        goto out;
    err = code_init(&t->code, CODE_SIZE);
    if (err)
        goto out;
    translate_emit_runtime(t);
    for (unsigned mode = 0; mode < 2; mode++) {
        t->jumps_used[mode] = true;
        empty_jumps(t, mode);
    }
    t->it.block_hooks = &block_hooks;
    err = interp_setup(&t->it, vcpu, &cpu_hooks);
    t->it.cpu.native_mxcsr_host = 0x1f80;
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
    /* Translated code finds its data through GS, which neither the C library nor the compiler uses. */
    if (syscall(SYS_arch_prctl, ARCH_SET_GS, vcpu->data)) {
        log_error("cannot set the GS base: %s", strerror(errno));
        return VM_EXIT_ERROR;
    }
    return interp_run(vcpu);
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
    snprintf(r->text, sizeof(r->text), "binary translation of warm code, interpretation of the rest");
}

const struct engine translate_engine = {
    .name = "translate",
    .summary = "binary translator on top of the interpreter",
    .checks_pages = true,
    .probe = translate_probe,
    .vcpu_create = translate_create,
    .vcpu_destroy = translate_destroy,
    .run = translate_run,
    .kick = interp_kick,
    .signal = interp_signal,
    .export_state = interp_export,
    .import_state = interp_import,
    .shift_tsc = interp_shift_tsc,
    .code_written = interp_code_written,
    .counters = interp_counters,
};
