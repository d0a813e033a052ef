/*
 * Loops that are one unit: their checks hoisted.
 *
 * Where a unit branches back to its own beginning, and all its memory accesses move by constants from turn to turn, it gets a second version
 * for the turns after the first. That version begins by looking up the page of each group and by finding out how many turns stay
 * inside all these pages; then the turns run without checks, and without looking for requests, at most LOOP_TURNS at a time. What
 * the soft TLB has not got, and everything else that is unusual, goes back to the first version, so nothing here can fault.
 */
#include "engine/translate/x86/unit.h"
#include "isa/x86/native_internal.h"

#define LOOP_TURNS 256
#define LOOP_STEP_MAX 1024

/* The bytes that a register moves on by in one turn. False: that is not known. */
static bool register_step(const struct unit *x, unsigned reg, int64_t *step)
{
    const struct value *v = &x->insn[x->back].gpr[reg];

    *step += v->delta;
    return v->number == reg;
}

/* What a group's address is made of at the beginning of a turn, and how it moves. */
struct course {
    unsigned base, index, shift;
    int64_t step;
};

/* False: it is not fit. */
static bool find_course(const struct unit *x, const struct group *g, struct course *c)
{
    uint32_t number = g->value;

    *c = (struct course){ .base = X86_NO_REG, .index = X86_NO_REG };
    if (g->seg || g->lo != (int32_t)g->lo)
        return false;
    for (unsigned i = 0; i < x->sums; i++)
        if (x->sum[i].number == number) {
            int64_t step = 0;

            if (x->sum[i].index >= 16 || !register_step(x, x->sum[i].index, &step))
                return false;
            c->index = x->sum[i].index;
            c->shift = x->sum[i].shift;
            c->step = step * (1 << c->shift);
            number = x->sum[i].base;
            break;
        }
    if (number < 16) {
        c->base = number;
        if (!register_step(x, number, &c->step))
            return false;
    } else if (number == VALUE_RIP) {
        c->base = X86_REG_RIP;
    } else if (number != VALUE_ZERO) {
        return false;
    }
    return c->step >= -LOOP_STEP_MAX && c->step <= LOOP_STEP_MAX && !(c->step & (g->align - 1));
}

/* What may be in such a loop: nothing that leaves it but branches, nothing that C code does. */
static bool is_fit(const struct unit_insn *i, bool last)
{
    switch (i->form) {
    case FORM_NOP: case FORM_COPY: case FORM_VECTOR: case FORM_LEA: case FORM_PUSH: case FORM_POP: case FORM_LEAVE: case FORM_JCC:
        break;
    case FORM_JMP:
        if (!last)
            return false;
        break;
    default: return false;
    }
    for (unsigned n = 0; n < i->accesses; n++)
        if (i->access[n].group < 0)
            return false;
    return !i->crosses;
}

static unsigned groups_used(const struct unit *x)
{
    unsigned n = 0;

    for (unsigned k = 0; k <= (unsigned)x->back; k++)
        for (unsigned j = 0; j < x->insn[k].accesses; j++)
            n = MAX(n, (unsigned)x->insn[k].access[j].group + 1);
    return n;
}

void unit_find_loop(struct unit *x)
{
    unsigned start = x->insn[0].offset, k = 0;

    x->back = -1;
    if (!x->t->options.loops || !x->share || x->insn[0].live)
        return;
    while (k < x->insns && !((x->insn[k].form == FORM_JCC || x->insn[k].form == FORM_JMP) && x->insn[k].target == start)) {
        if (!is_fit(&x->insn[k], false))
            return;
        k++;
    }
    if (k == x->insns || !is_fit(&x->insn[k], true))
        return;
    x->back = (int)k;
    x->loop_groups = groups_used(x);
    for (unsigned g = 0; g < x->loop_groups; g++) {
        struct course c;

        if (x->loop_groups > TRANSLATE_ADDENDS || !find_course(x, &x->group[g], &c)) {
            x->back = -1;
            return;
        }
    }
}

static unsigned log2_above(uint64_t v)
{
    unsigned n = 0;

    while (1ull << n < v)
        n++;
    return n;
}

/* Looks the group up for this turn, and lowers loop_turns to how many of them stay in the page. Goes back to entry if it is not there. */
static void begin_group(struct unit *x, struct group *g, unsigned slot, const uint8_t *entry)
{
    struct assembler *a = &x->a;
    int32_t room = (int32_t)(GUEST_PAGE_SIZE - (uint64_t)(g->hi - g->lo));
    struct course c;
    uint8_t *enough;

    if (!find_course(x, g, &c))
        return;
    unit_look_up(x, c.base, c.index, c.shift, g, entry);
    asm_mem(a, true, 0x8b, A, A, H_NONE, 0, offsetof(struct tlb_entry, addend));
    asm_store_gs(a, A, T_GS(addend) + slot * 8u);
    g->slot = (uint8_t)slot;
    g->open = g->stored = true;
    if (!c.step)
        return;
    if (c.step > 0) {                                                   /* room - T */
        asm_rr(a, true, 0xf7, 3, T);                                    /* neg */
        asm_alu_imm(a, true, ALU_DIGIT_ADD, T, room);
    }
    asm_rex(a, false, 0, 0, T, false);
    asm_byte(a, 0xc1), asm_byte(a, 0xe8 | (T & 7));                     /* shr */
    asm_byte(a, log2_above((uint64_t)(c.step > 0 ? c.step : -c.step)));
    asm_alu_imm(a, false, ALU_DIGIT_ADD, T, 1);
    asm_gs(a, false, 0x3b, T, T_GS(loop_turns));
    enough = asm_jcc(a, 3);                                             /* jae */
    asm_gs(a, false, 0x89, T, T_GS(loop_turns));
    if (!a->full)
        asm_set_target(enough, a->at);
}

void unit_loop(struct unit *x, const uint8_t *entry)
{
    struct assembler *a = &x->a;
    bool vectors = false, components = false;

    for (unsigned k = 0; k <= (unsigned)x->back; k++)
        if (x->insn[k].form == FORM_VECTOR) {
            vectors |= x->insn[k].native->kind != NATIVE_INTEGER;
            components |= x->insn[k].native->components != 0;
        }
    if (!a->full)
        asm_set_target(x->loop_jump, a->at);
    x->loop_start = a->at;
    x->held = x->lost = -1;
    unit_vectors(x, vectors, components, true);
    asm_gs(a, false, 0xc7, 0, T_GS(loop_turns));                        /* movl */
    asm_u32(a, LOOP_TURNS);
    for (unsigned g = 0; g < x->loop_groups; g++)
        begin_group(x, &x->group[g], g, entry);
    x->loop_turn = a->at;
    for (unsigned k = 0; k <= (unsigned)x->back; k++)
        unit_body(x, k);
    if (x->insn[x->back].form == FORM_JCC) {
        unsigned end = x->insn[x->back].offset + x->insn[x->back].insn.length;

        unit_goto(x, end, end < GUEST_PAGE_SIZE ? unit_live_at(x, end) : RFLAGS_ARITH, false);
    }
    x->loop_start = x->loop_turn = NULL;
}

void unit_loop_back(struct unit *x)
{
    struct assembler *a = &x->a;
    unsigned start = x->insn[0].offset;

    if (x->loop_turn) {
        asm_gs_imm8(a, 0x83, ALU_DIGIT_SUB, T_GS(loop_turns), 1);
        if (!a->full)
            asm_set_target(asm_jcc(a, 5), x->loop_turn);
    }
    unit_poll(x, 0, start);
    if (x->loop_start)
        asm_jmp_to(a, x->loop_start);
    else
        x->loop_jump = asm_jmp(a);
}
