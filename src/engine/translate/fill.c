/*
 * What translated code has done for it: misses of the soft TLB, and single instructions run by the interpreter.
 */
#include "engine/translate/translate.h"

/* Out of the unit, in front of the site's instruction, which the interpreter executes. */
static const void *leave(struct translator *t, const struct translate_site *site)
{
    t->interpret_once = 1;
    if (site->behind_sti)
        t->it.cpu.s.interrupt_shadow = t->sti_shadow;
    t->it.cpu.s.rip = page_rip(&t->it.cpu, site->offset);
    return NULL;
}

/* Behind the op of a site: it came to its end. */
static const struct op *op_finished(struct x86_cpu *cpu, const struct op *op)
{
    const struct block *b = op->aux;
    struct translator *t = translator_of(cpu);

    if (unlikely(b->dead || !translate_masks_all(cpu) || cpu->simd_trap != t->simd_trap)) {
        cpu->s.rip = op_rip(cpu, op);
        return NULL;
    }
    t->op_finished = true;
    return NULL;
}

/* The site's instruction, to be run alone. NULL: no room, or it is not what was translated any more. */
static const struct op *op_of(struct translator *t, struct translate_site *site)
{
    const struct block *b = site->block;
    uint8_t bytes[X86_MAX_INSN];
    struct x86_insn insn;
    struct op *pair;
    bool gp;

    if (site->op)
        return site->op;
    if (t->it.arena_size - t->it.arena_used < KIB(8)) {
        t->it.flush_wanted = true;
        return NULL;
    }
    if (x86_decode(&insn, bytes, block_fetch(b, site->offset, bytes), 8, &gp) || insn.length != site->length)
        return NULL;
    pair = block_alloc(&t->it, 2 * sizeof(*pair));
    pair[0] = (struct op){ .rip = site->offset, .len = insn.length };
    lower(&t->it, &pair[0], &insn);
    pair[1] = (struct op){ .fn = op_finished, .rip = site->offset + (uint64_t)insn.length, .aux = site->block };
    return site->op = pair;
}

const void *translate_run_op(struct translator *t, struct translate_site *site)
{
    const struct op *op = op_of(t, site);

    if (!op)
        return leave(t, site);
    t->slow_ops++;
    t->op_finished = false;
    while (op)
        op = op->fn(&t->it.cpu, op);
    return t->op_finished ? site : NULL;
}

const void *translate_slow(struct translator *t, struct translate_site *site)
{
#if defined(__SANITIZE_ADDRESS__)
    if (site == t->site) {
        const void *go = translate_fill(t, site, t->site_va);

        t->site = NULL;
        if (go)
            return go;
    }
#endif
    if (site->group) {
        if (!site->block->apart && !translate_apart(t, site->block))
            return leave(t, site);
        return site->apart;
    }
    if (!site->back)
        return leave(t, site);
    return translate_run_op(t, site) ? site->back : NULL;
}
