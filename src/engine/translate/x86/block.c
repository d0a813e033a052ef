/*
 * From a block to a unit of host code: the order of things, slow paths and exits.
 */
#include <assert.h>
#include <stdlib.h>

#include "engine/translate/x86/unit.h"

/* Kept free at the end of code memory, so that nothing has to be checked byte by byte. */
#define CODE_MARGIN 256
/* A slow path takes no more. */
#define STUB_MAX 160
_Static_assert((UNIT_MAX_STUBS + 1) * STUB_MAX <= CODE_COLD_MAX, "a unit's slow paths are emitted at one place");

struct stub *unit_stub(struct unit *x, enum stub_kind kind, uint8_t *jump)
{
    struct stub *s;

    if (x->stubs == UNIT_MAX_STUBS) {
        x->failed = true;
        return NULL;
    }
    s = &x->stub[x->stubs++];
    *s = (struct stub){ .jump = jump, .kind = (uint8_t)kind, .tag = 0xff, .lost = (int8_t)x->lost };
    return s;
}

bool unit_behind_sti(const struct unit *x, unsigned k)
{
    return k > 0 && x->insn[k - 1].form == FORM_QUICK && x->insn[k - 1].insn.mnemonic == ZYDIS_MNEMONIC_STI;
}

void unit_keep_shadow(struct unit *x)
{
    asm_gs(&x->a, false, 0x0fb6, T, T_GS(sti_shadow));
    asm_gs(&x->a, false, 0x88, T, CPU_GS(s.interrupt_shadow));
}

struct translate_site *unit_site(struct unit *x, unsigned k)
{
    struct translate_site *site = block_alloc(&x->t->it, sizeof(*site));

    *site = (struct translate_site){ .block = x->b, .apart = code_exec(&x->t->code, x->t->run_and_go), .offset = x->insn[k].offset, .index = (uint16_t)k,
                                      .length = x->insn[k].insn.length, .behind_sti = unit_behind_sti(x, k) };
    return site;
}

void unit_save_rcx(struct unit *x) { asm_store_gs(&x->a, H_RCX, T_GS(rcx)); }
void unit_restore_rcx(struct unit *x) { asm_load_gs(&x->a, H_RCX, T_GS(rcx)); }

static void load_pointer(struct assembler *a, const void *p) { asm_mov_imm(a, A, (uint64_t)(uintptr_t)p); }

static void call_runtime(struct unit *x, unsigned k, const uint8_t *routine, enum translate_quick quick)
{
    struct translate_site *site = unit_site(x, k);
    const struct x86_insn *insn = &x->insn[k].insn;
    uint8_t *call;

    unit_take_a(x, k);
    site->quick = (uint8_t)quick;
    if (quick == QUICK_MOVS || quick == QUICK_STOS) {
        site->span = insn->operand[0].size;
        site->repeats = insn->rep;
    }
    load_pointer(&x->a, site);
    call = asm_call(&x->a);
    if (!x->a.full)
        asm_set_target(call, routine);
    if (x->insn[k].serial)
        unit_barrier(x);
}

void unit_op(struct unit *x, unsigned k) { call_runtime(x, k, x->t->run_op, QUICK_NONE); }

void unit_quick(struct unit *x, unsigned k, enum translate_quick quick) { call_runtime(x, k, x->t->run_quick, quick); }

/* Flags and registers stay. T is free between instructions. */
static void emit_count(struct unit *x, unsigned insns)
{
    asm_load_gs(&x->a, T, CPU_GS(insns));
    asm_lea(&x->a, T, T, H_NONE, 0, (int32_t)(insns - x->counted));
    asm_store_gs(&x->a, T, CPU_GS(insns));
    x->counted = insns;
}

static void stub_flags(struct unit *x, const struct stub *s)
{
    if (s->lost >= 0)
        unit_flags_of(x, s->lost);
}

static void emit_stub(struct unit *x, struct stub *s)
{
    struct translator *t = x->t;
    struct assembler *a = &x->a;
    uint8_t *start = a->at;

    asm_set_target(s->jump, start);
    if (s->restore_rcx)
        unit_restore_rcx(x);
    if (s->restore_flags)
        asm_byte(a, 0x9d);                              /* popf */
    if (s->back) {
        asm_set_target(asm_call(a), t->jump_miss);
        asm_jmp_to(a, s->back);
    }
    if (s->kind != STUB_FILL)
        stub_flags(x, s);
    switch (s->kind) {
    case STUB_FILL: {
        uint8_t *crosses = NULL;

        if (s->tag != 0xff) {
            /* In the page, but not all of it: nothing to be filled. */
            if (s->site->group) {
                asm_alu_imm(a, true, ALU_DIGIT_CMP, T, GUEST_PAGE_SIZE);
                crosses = asm_jcc(a, 2);
            }
            asm_mem(a, true, 0x2b, T, A, H_NONE, 0, s->tag);
        }
        stub_flags(x, s);
        load_pointer(a, s->site);
        asm_jmp_to(a, t->fill);
        if (crosses) {
            asm_set_target(crosses, a->at);
            stub_flags(x, s);
            load_pointer(a, s->site);
            asm_mem(a, false, 0xff, 4, A, H_NONE, 0, offsetof(struct translate_site, apart));
        }
        break;
    }
    case STUB_RUN:
        load_pointer(a, s->site);
        asm_jmp_to(a, t->run_and_go);
        break;
    case STUB_INTERPRET:
        asm_gs_imm8(a, 0xc6, 0, T_GS(interpret_once), 1);
        /* fall through */
    case STUB_AT:
        if (s->behind_sti)
            unit_keep_shadow(x);
        unit_set_rip(x, s->target);
        asm_jmp_to(a, t->exit_null);
        break;
    case STUB_CODE: asm_jmp_to(a, s->code); break;
    case STUB_CHAIN: {
        struct chain *c = block_alloc(&t->it, sizeof(*c));

        *c = (struct chain){ .block = x->b, .jump = s->jump, .stub = start, .target = s->target, .next = x->b->chains };
        x->b->chains = c;
        load_pointer(a, (const void *)((uintptr_t)c | 1));
        asm_jmp_to(a, t->exit_op);
        break;
    }
    }
}

static bool has_room(struct translator *t)
{
    if (t->it.arena_size - t->it.arena_used < UNIT_MAX_ARENA + KIB(16)) {
        t->it.flush_wanted = true;
        return false;
    }
    return true;
}

static void begin(struct unit *x, struct translator *t, struct block *b, bool share)
{
    x->t = t;
    x->b = b;
    x->share = share && t->options.share;
    x->stubs = 0;
    x->failed = x->vectors_ready = x->vectors_noted = false;
    x->held = x->lost = -1;
    x->counted = 0;
    x->sites = NULL;
    x->loop_start = x->loop_turn = NULL;
    x->a = (struct assembler){ .at = t->code.write + t->code.used, .end = t->code.write + t->code.limit - CODE_MARGIN };
}

void unit_body(struct unit *x, unsigned k)
{
    const struct unit_insn *i = &x->insn[k];

    if (!i->live)
        x->lost = -1;
    if (i->needs_flags)
        unit_flags(x);
    if (!x->loop_turn)
        unit_checks(x, k);
    if (i->form >= FORM_JCC)
        unit_branch(x, k);
    else
        unit_insn(x, k);
}

static void emit_insns(struct unit *x)
{
    unsigned form = FORM_OP;

    for (unsigned k = 0; k < x->insns; k++) {
        form = x->insn[k].form;
        x->code[k] = x->a.at;
        if (x->entered_anywhere)
            x->vectors_ready = false;
        if (x->t->options.count && form >= FORM_JCC)
            emit_count(x, k + 1);
        if (x->insn[k].crosses)
            unit_cross(x, k);
        unit_body(x, k);
        /* Who comes back from a slow path has nothing in A. */
        if (x->sites)
            x->held = -1;
        for (; x->sites; x->sites = x->sites->next)
            x->sites->back = code_exec(&x->t->code, x->a.at);
    }
    if (form < FORM_JMP && (x->t->options.returns || (form != FORM_CALL && form != FORM_CALL_INDIRECT))) {
        if (x->t->options.count && x->counted < x->insns)
            emit_count(x, x->insns);
        unit_flags(x);
        unit_goto(x, x->end, x->end_live, false);
    }
}

/* False: there was no room, or too much of something. */
static bool finish(struct unit *x)
{
    struct code_memory *code = &x->t->code;
    struct assembler hot = x->a;
    size_t room = (x->stubs + 1) * STUB_MAX;
    uint8_t *cold;

    if (x->failed)
        return false;
    cold = hot.full ? NULL : code_cold(code, room, hot.at);
    if (!cold) {
        x->t->it.flush_wanted = true;
        return false;
    }
    x->a = (struct assembler){ .at = cold, .end = cold + room };
    if (!x->entered_anywhere) {
        /* Where a dropped unit's entry leads. */
        x->b->leave = x->a.at;
        unit_set_rip(x, (uintptr_t)x->b->host & (GUEST_PAGE_SIZE - 1));
        asm_jmp_to(&x->a, x->t->exit_null);
    }
    for (unsigned i = 0; i < x->stubs; i++)
        emit_stub(x, &x->stub[i]);
    assert(!x->a.full);
    x->t->bytes += (uint64_t)(hot.at - (code->write + code->used)) + (uint64_t)(x->a.at - cold);
    code_use_cold(code, x->a.at);
    code_use(code, hot.at);
    return true;
}

/* What a unit that is not to be used has entered into its block. */
static void take_back(struct block *b, struct chain *chains, struct return_site *returns)
{
    b->chains = chains;
    b->returns = returns;
}

struct unit *translate_work_create(void) { return calloc(1, sizeof(struct unit)); }

bool translate_block(struct translator *t, struct block *b)
{
    struct unit *x = t->work;
    unsigned start = (uintptr_t)b->host & (GUEST_PAGE_SIZE - 1);
    uint8_t *indirect, *entry;

    if (!has_room(t) || b->mode != interp_mode(&t->it.cpu) || t->it.cpu.code_size != 8)
        return false;
    begin(x, t, b, true);
    x->entered_anywhere = false;
    if (!unit_analyse(x))
        return false;
    /* From here on it is known when these bytes change. */
    block_depends(&t->it, b, x->seen_from, x->seen_to);

    /* Who comes through a jump table has the guest address in T. */
    indirect = x->a.at;
    asm_lea(&x->a, A, T, H_NONE, 0, -(int32_t)start);
    asm_store_gs(&x->a, A, CPU_GS(code_page));
    entry = x->a.at;
    emit_insns(x);
    if (x->back >= 0)
        unit_loop(x, entry);
    if (!finish(x)) {
        take_back(b, NULL, NULL);
        b->sites = NULL;
        return false;
    }
    b->insns = (uint16_t)x->insns;
    t->blocks++;
    t->loops += x->back >= 0;
    t->guest_bytes += x->end - start;
    b->indirect = code_exec(&t->code, indirect);
    b->code = code_exec(&t->code, entry);
    b->entry = entry;
    return true;
}

bool translate_apart(struct translator *t, struct block *b)
{
    struct unit *x = t->work;
    struct chain *chains = b->chains;
    struct return_site *returns = b->returns;

    if (!has_room(t))
        return false;
    begin(x, t, b, false);
    x->entered_anywhere = true;
    if (!unit_analyse(x))
        return false;
    emit_insns(x);
    if (!finish(x)) {
        take_back(b, chains, returns);
        return false;
    }
    t->apart++;
    b->apart = true;
    for (struct translate_site *s = b->sites; s; s = s->next)
        s->apart = code_exec(&t->code, x->code[s->index]);
    return true;
}
