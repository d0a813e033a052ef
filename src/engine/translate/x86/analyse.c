/*
 * What a unit consists of, found out before any code is emitted: its instructions, which flags are live in front of each, which
 * registers hold the same value but for a constant, and so which memory accesses can share one check.
 */
#include "engine/translate/x86/unit.h"
#include "isa/x86/cpuid.h"
#include "isa/x86/native_internal.h"

#define FLAGS_ALL RFLAGS_ARITH
#define PEEK_MAX 16

/* ---- decoding ---- */

static int condition_of(const struct x86_insn *insn)
{
    switch (insn->mnemonic) {
#define CASE(cc, n) case ZYDIS_MNEMONIC_J##cc: return n;
    CASE(O, 0) CASE(NO, 1) CASE(B, 2) CASE(NB, 3) CASE(Z, 4) CASE(NZ, 5) CASE(BE, 6) CASE(NBE, 7) CASE(S, 8) CASE(NS, 9)
    CASE(P, 10) CASE(NP, 11) CASE(L, 12) CASE(NL, 13) CASE(LE, 14) CASE(NLE, 15)
#undef CASE
    default: return -1;
    }
}

/* A near branch of full width with a displacement. */
static bool is_direct(const struct x86_insn *insn)
{
    return insn->operand[0].kind == OPERAND_REL && insn->op_size == 8;
}

static bool is_indirect(const struct x86_insn *insn)
{
    const struct x86_operand *o = &insn->operand[0];

    return insn->op_size == 8 && (o->kind == OPERAND_GPR || (o->kind == OPERAND_MEM && o->size == 8));
}

/* Instructions after which the interpreter looks around before it goes on; see lower.c. */
static bool ends_unit(const struct x86_insn *insn)
{
    return x86_system_semantics(insn) && !interp_goes_on(insn);
}

static void classify(struct unit *x, struct unit_insn *i)
{
    const struct x86_insn *insn = &i->insn;
    int cc = condition_of(insn);

    i->form = FORM_END;
    if (!x86_model_has_insn(x->t->it.cpu.model, insn))
        return;
    if (cc >= 0) {
        if (is_direct(insn)) {
            i->form = FORM_JCC;
            i->cc = (uint8_t)cc;
        }
    } else if (insn->mnemonic == ZYDIS_MNEMONIC_JMP) {
        if (is_direct(insn))
            i->form = FORM_JMP;
        else if (is_indirect(insn) && !x86_is_far(insn))
            i->form = FORM_JMP_INDIRECT;
    } else if (insn->mnemonic == ZYDIS_MNEMONIC_CALL) {
        if (is_direct(insn))
            i->form = FORM_CALL;
        else if (is_indirect(insn) && !x86_is_far(insn))
            i->form = FORM_CALL_INDIRECT;
    } else if (insn->mnemonic == ZYDIS_MNEMONIC_RET) {
        if (insn->op_size == 8 && !x86_is_far(insn))
            i->form = FORM_RET;
    } else if (insn->category != ZYDIS_CATEGORY_COND_BR) {
        unit_classify(x, i);
        if (i->form == FORM_OP && ends_unit(insn))
            i->form = FORM_END;
    }
    i->target = i->offset + insn->length + (uint64_t)insn->imm[0];
    i->serial = (i->form == FORM_OP && x86_system_semantics(insn)) || (i->form == FORM_QUICK && unit_quick_serial(insn));
}

/* ---- flags ---- */

static bool shifts_by_nothing(const struct x86_insn *insn)
{
    const struct x86_operand *count = &insn->operand[insn->visible - 1];

    if (count->kind != OPERAND_IMM)
        return true;            /* CL: may be 0 */
    return (insn->imm[count->reg] & (insn->op_size == 8 ? 63 : 31)) == 0;
}

/* Flags that are certainly overwritten. What the manuals call undefined may be what it was before. */
static uint16_t flags_killed(const struct x86_insn *insn)
{
    switch (insn->mnemonic) {
    case ZYDIS_MNEMONIC_AND: case ZYDIS_MNEMONIC_OR: case ZYDIS_MNEMONIC_XOR: case ZYDIS_MNEMONIC_TEST:
        return FLAGS_ALL;       /* processors clear AF */
    case ZYDIS_MNEMONIC_SHL: case ZYDIS_MNEMONIC_SHR: case ZYDIS_MNEMONIC_SAR: case ZYDIS_MNEMONIC_ROL: case ZYDIS_MNEMONIC_ROR:
    case ZYDIS_MNEMONIC_RCL: case ZYDIS_MNEMONIC_RCR: case ZYDIS_MNEMONIC_SHLD: case ZYDIS_MNEMONIC_SHRD:
        return shifts_by_nothing(insn) ? 0 : insn->flags_written;
    default:
        return insn->category == ZYDIS_CATEGORY_STRINGOP ? 0 : insn->flags_written;
    }
}

static void depends_on(struct unit *x, unsigned from, unsigned to)
{
    x->seen_from = MIN(x->seen_from, (uint16_t)from);
    x->seen_to = MAX(x->seen_to, (uint16_t)to);
}

/* Looks a few instructions ahead, inside the page. */
static uint16_t look_ahead(struct unit *x, uint64_t offset, unsigned *from, unsigned *to)
{
    const uint8_t *page = (const uint8_t *)((uintptr_t)x->b->host & GUEST_PAGE_MASK);
    uint16_t left = FLAGS_ALL;

    *from = *to = (unsigned)offset;
    for (unsigned n = 0; n < PEEK_MAX && left && offset < GUEST_PAGE_SIZE; n++) {
        struct x86_insn insn;
        bool gp;

        if (x86_decode(&insn, page + offset, (unsigned)(GUEST_PAGE_SIZE - offset), 8, &gp))
            break;
        *from = MIN(*from, (unsigned)offset);
        *to = MAX(*to, (unsigned)offset + insn.length);
        if (insn.flags_read & left || x86_system_semantics(&insn))
            break;
        left &= (uint16_t)~flags_killed(&insn);
        if (!left)
            return 0;
        offset += insn.length;
        if (insn.category == ZYDIS_CATEGORY_UNCOND_BR || insn.category == ZYDIS_CATEGORY_CALL) {
            if (!is_direct(&insn))
                break;
            offset += (uint64_t)insn.imm[0];
        } else if (insn.category == ZYDIS_CATEGORY_COND_BR || insn.category == ZYDIS_CATEGORY_RET) {
            break;
        }
    }
    return left;
}

uint16_t unit_live_at(struct unit *x, uint64_t offset)
{
    const uint8_t *host = (const uint8_t *)((uintptr_t)x->b->host & GUEST_PAGE_MASK) + offset;
    struct live_memo *m = &x->memo[((uintptr_t)host ^ (uintptr_t)host >> 12) % UNIT_MEMOS];
    uint64_t version = x->t->it.code_writes + x->t->it.block_flushes;
    unsigned from, to;

    if (!x->t->options.liveness)
        return FLAGS_ALL;
    /* Decoding is most of what translation costs, and the same places are looked at again and again. */
    if (m->host != host || m->version != version) {
        *m = (struct live_memo){ .host = host, .version = version, .live = look_ahead(x, offset, &from, &to) };
        m->from = (uint16_t)from;
        m->to = (uint16_t)to;
    }
    depends_on(x, m->from, m->to);
    return m->live;
}

static uint16_t live_behind(struct unit *x, const struct unit_insn *i, uint16_t next)
{
    switch (i->form) {
    case FORM_JCC: return next | (i->target < GUEST_PAGE_SIZE ? unit_live_at(x, i->target) : FLAGS_ALL);
    case FORM_CALL:
    case FORM_JMP: return i->target < GUEST_PAGE_SIZE ? unit_live_at(x, i->target) : FLAGS_ALL;
    case FORM_CALL_INDIRECT: case FORM_JMP_INDIRECT: case FORM_RET: case FORM_END: case FORM_OP: return FLAGS_ALL;
    default: return next;
    }
}

static void find_liveness(struct unit *x)
{
    uint16_t live = x->end_live = x->end < GUEST_PAGE_SIZE ? unit_live_at(x, x->end) : FLAGS_ALL;

    for (unsigned k = x->insns; k-- > 0;) {
        struct unit_insn *i = &x->insn[k];

        live = live_behind(x, i, live);
        if (i->form == FORM_PUSHF)
            live = FLAGS_ALL;
        else if (i->form != FORM_OP && i->form != FORM_END)
            live = (uint16_t)((live & ~flags_killed(&i->insn)) | i->insn.flags_read);
        if (!x->t->options.liveness)
            live = FLAGS_ALL;
        i->live = live;
    }
}

/* ---- flags that can be made again ---- */

static bool is_mapped(const struct x86_operand *o) { return o->kind == OPERAND_GPR && unit_host_of[o->reg] != H_NONE; }

/*
 * The registers whose contents the instruction's flags can be made from afterwards, or 0: compares as they are, others from what they
 * leave behind (unit_flags_of()).
 */
static unsigned flags_from(const struct unit_insn *i)
{
    const struct x86_operand *d = &i->insn.operand[0], *s = &i->insn.operand[1];
    unsigned registers;

    if (i->form != FORM_COPY || i->insn.has_mem || !is_mapped(d) || (s->kind != OPERAND_IMM && !is_mapped(s)))
        return 0;
    registers = 1u << d->reg;
    switch (i->insn.mnemonic) {
    case ZYDIS_MNEMONIC_ADD: case ZYDIS_MNEMONIC_SUB:
        if (d->size < 4 || (s->kind == OPERAND_GPR && s->reg == d->reg))
            return 0;
        /* fall through */
    case ZYDIS_MNEMONIC_CMP: case ZYDIS_MNEMONIC_TEST: return registers | (s->kind == OPERAND_GPR ? 1u << s->reg : 0);
    case ZYDIS_MNEMONIC_AND: case ZYDIS_MNEMONIC_OR: case ZYDIS_MNEMONIC_XOR: return registers;
    default: return 0;
    }
}

static unsigned registers_written(const struct unit_insn *i)
{
    unsigned registers = 0;

    switch (i->form) {
    case FORM_PUSH: case FORM_PUSHF: return 1u << RSP;
    case FORM_LEAVE: return 1u << RSP | 1u << RBP;
    case FORM_POP: registers = 1u << RSP; break;
    }
    for (unsigned n = 0; n < i->insn.operands; n++)
        if ((i->insn.operand[n].kind == OPERAND_GPR || i->insn.operand[n].kind == OPERAND_GPR8H) && i->insn.operand[n].write)
            registers |= 1u << i->insn.operand[n].reg;
    return registers;
}

/* Other code does it, or a part of it, which sees the flags. */
static bool runs_apart(const struct unit_insn *i)
{
    return i->form == FORM_OP || i->form == FORM_QUICK || i->form == FORM_PUSHF || i->form == FORM_DIVIDE || i->form == FORM_END;
}

/* From the first instruction on, behind find_liveness(). */
static void find_sources(struct unit *x)
{
    unsigned registers = 0;
    int source = -1;

    for (unsigned k = 0; k < x->insns; k++) {
        struct unit_insn *i = &x->insn[k];
        bool branch = i->form >= FORM_JCC && i->form != FORM_END;
        int after = source;

        i->source = (int8_t)source;
        if (runs_apart(i) || (branch && i->form != FORM_JCC)) {
            after = -1;
        } else if (i->insn.flags_written) {
            registers = flags_from(i);
            after = registers ? (int)k : -1;
        } else if (registers_written(i) & registers) {
            after = -1;
        }
        /* Branches see to it themselves when they are emitted. */
        i->needs_flags = i->form == FORM_JCC || i->form == FORM_END ||
                         (!branch && (i->insn.flags_read || (i->insn.flags_written && i->live) || after != source || runs_apart(i)));
        source = after;
    }
}

/* ---- values ---- */

static struct value new_value(struct unit *x) { return (struct value){ x->values++, 0 }; }

/* What the instruction makes of the registers' values. */
static void follow_values(struct unit *x, const struct unit_insn *i, struct value *v)
{
    const struct x86_insn *insn = &i->insn;
    const struct x86_operand *d = &insn->operand[0], *s = &insn->operand[1];
    bool wide = d->kind == OPERAND_GPR && d->size == 8;

    switch (i->form) {
    case FORM_QUICK:            /* strings: not all of what they write is among the operands */
    case FORM_OP: case FORM_END: case FORM_CALL: case FORM_CALL_INDIRECT:
        for (unsigned r = 0; r < 16; r++)
            v[r] = new_value(x);
        return;
    case FORM_PUSH: case FORM_PUSHF: v[RSP].delta -= 8; return;
    case FORM_POP:
        v[RSP].delta += 8;      /* POP RSP leaves what it loads */
        v[d->reg] = new_value(x);
        return;
    case FORM_LEAVE:
        v[RSP] = (struct value){ v[RBP].number, v[RBP].delta + 8 };
        v[RBP] = new_value(x);
        return;
    case FORM_LEA:
        if (wide && insn->mem.index == X86_NO_REG && insn->mem.base < 16) {
            v[d->reg] = (struct value){ v[insn->mem.base].number, v[insn->mem.base].delta + insn->mem.disp };
            return;
        }
        break;
    case FORM_COPY:
        if (!wide)
            break;
        switch (insn->mnemonic) {
        case ZYDIS_MNEMONIC_MOV:
            if (s->kind == OPERAND_GPR) {
                v[d->reg] = v[s->reg];
                return;
            }
            break;
        case ZYDIS_MNEMONIC_ADD:
            if (s->kind == OPERAND_IMM) {
                v[d->reg].delta += insn->imm[s->reg];
                return;
            }
            break;
        case ZYDIS_MNEMONIC_SUB:
            if (s->kind == OPERAND_IMM) {
                v[d->reg].delta -= insn->imm[s->reg];
                return;
            }
            break;
        case ZYDIS_MNEMONIC_INC: v[d->reg].delta++; return;
        case ZYDIS_MNEMONIC_DEC: v[d->reg].delta--; return;
        case ZYDIS_MNEMONIC_CMP: case ZYDIS_MNEMONIC_TEST: return;
        }
        break;
    }
    for (unsigned n = 0; n < insn->operands; n++)
        if ((insn->operand[n].kind == OPERAND_GPR || insn->operand[n].kind == OPERAND_GPR8H) && insn->operand[n].write)
            v[insn->operand[n].reg] = new_value(x);
}

/* ---- accesses ---- */

static struct access *add_access(struct unit_insn *i, unsigned kind, unsigned size)
{
    struct access *m = &i->access[i->accesses++];

    *m = (struct access){ .kind = (uint8_t)kind, .size = (uint8_t)size, .group = -1, .base = X86_NO_REG, .index = X86_NO_REG };
    return m;
}

static void add_stack_access(struct unit_insn *i, unsigned kind, unsigned base, int disp)
{
    struct access *m = add_access(i, kind, 8);

    m->base = (uint8_t)base;
    m->disp = disp;
    m->shareable = true;
    m->value = i->gpr[base].number;
    m->delta = i->gpr[base].delta + disp;
}

/* base + (index << shift): the same sum of the same values has the same number. */
static uint32_t sum_value(struct unit *x, uint32_t base, uint32_t index, unsigned shift)
{
    struct sum *s;

    for (s = x->sum; s < x->sum + x->sums; s++)
        if (s->base == base && s->index == index && s->shift == shift)
            return s->number;
    if (x->sums == ARRAY_SIZE(x->sum))
        return x->values++;
    x->sum[x->sums++] = (struct sum){ base, index, x->values, (uint8_t)shift };
    return x->values++;
}

/* Can be had again by one LEA. */
bool unit_is_plain(const struct access *m)
{
    return !m->seg && (m->base < 16 ? unit_host_of[m->base] != H_NONE : m->base == X86_NO_REG && m->index != X86_NO_REG) &&
           (m->index == X86_NO_REG || unit_host_of[m->index] != H_NONE);
}

static void add_operand_access(struct unit *x, struct unit_insn *i, unsigned kind, unsigned size)
{
    const struct x86_mem *mem = &i->insn.mem;
    struct access *m = add_access(i, kind, size);

    m->seg = mem->seg >= SEG_FS ? mem->seg : 0;
    m->base = mem->base;
    m->index = mem->index;
    m->shift = mem->scale ? (uint8_t)__builtin_ctz(mem->scale) : 0;
    m->disp = (int32_t)mem->disp;
    if (mem->base == X86_REG_RIP)
        m->disp = (int32_t)(mem->disp + i->offset + i->insn.length);
    m->shareable = mem->index == X86_NO_REG || unit_is_plain(m);
    if (mem->base < 16) {
        m->value = i->gpr[mem->base].number;
        m->delta = i->gpr[mem->base].delta + m->disp;
    } else {
        m->value = mem->base == X86_REG_RIP ? VALUE_RIP : VALUE_ZERO;
        m->delta = m->disp;
    }
    if (m->shareable && mem->index != X86_NO_REG) {
        m->value = sum_value(x, m->value, i->gpr[mem->index].number, m->shift);
        m->delta += i->gpr[mem->index].delta * (1 << m->shift);
    }
    /* LOCK across a cache line is slow on the host, and for some hosts forbidden. */
    m->aligned = i->insn.lock || i->insn.mnemonic == ZYDIS_MNEMONIC_XCHG ||
                 i->insn.mnemonic == ZYDIS_MNEMONIC_CMPXCHG16B || (i->native && i->native->aligned);
}

static void find_accesses(struct unit *x, struct unit_insn *i)
{
    const struct x86_operand *mem = NULL;

    for (unsigned n = 0; n < i->insn.visible; n++)
        if (i->insn.operand[n].kind == OPERAND_MEM)
            mem = &i->insn.operand[n];
    switch (i->form) {
    case FORM_COPY: case FORM_DIVIDE:
        if (mem && mem->size)
            add_operand_access(x, i, mem->write ? TLB_WRITE : TLB_READ, mem->size);
        break;
    case FORM_VECTOR:
        if (i->insn.has_mem)
            add_operand_access(x, i, i->native->mem_write ? TLB_WRITE : TLB_READ, i->native->mem_size);
        break;
    case FORM_JMP_INDIRECT:
        if (mem)
            add_operand_access(x, i, TLB_READ, 8);
        break;
    case FORM_CALL_INDIRECT:
        if (mem)
            add_operand_access(x, i, TLB_READ, 8);
        add_stack_access(i, TLB_WRITE, RSP, -8);
        break;
    case FORM_PUSH:
        if (mem)
            add_operand_access(x, i, TLB_READ, 8);
        add_stack_access(i, TLB_WRITE, RSP, -8);
        break;
    case FORM_PUSHF: case FORM_CALL: add_stack_access(i, TLB_WRITE, RSP, -8); break;
    case FORM_POP: case FORM_RET: add_stack_access(i, TLB_READ, RSP, 0); break;
    case FORM_LEAVE: add_stack_access(i, TLB_READ, RBP, 0); break;
    }
}

/* ---- groups ---- */

/* Behind these no check from before holds. */
static bool is_barrier(const struct unit_insn *i)
{
    return i->form == FORM_CALL || i->form == FORM_CALL_INDIRECT || i->serial;
}

static int64_t round_down(int64_t v, unsigned align, int64_t to) { return v - ((v - to) & (int64_t)(align - 1)); }

/* Takes the access of instruction k into the group if it can be. */
static bool join(struct unit *x, struct group *g, struct access *m, unsigned k)
{
    int64_t lo = MIN(g->lo, m->delta), hi = MAX(g->hi, m->delta + m->size);
    unsigned align = g->align;

    if (g->value != m->value || g->seg != m->seg)
        return false;
    if (m->aligned && m->size > 1) {
        if (g->align > 1 && ((g->lo - m->delta) & (int64_t)(MIN(g->align, m->size) - 1)))
            return false;
        if (m->size > align) {
            /* lo has to keep the alignment of both. */
            lo = round_down(lo, m->size, m->delta);
            align = m->size;
        }
    }
    if (align > 1)
        lo = round_down(lo, align, m->aligned && m->size == align ? m->delta : g->lo);
    if (hi - lo > UNIT_GROUP_SPAN)
        return false;
    if (m->kind == TLB_WRITE && !g->write) {
        /* What is only written on some ways must not make the page's being writable a condition for all. */
        for (unsigned n = g->at; n < k; n++)
            if (x->insn[n].form == FORM_JCC)
                return false;
        g->write = true;
    }
    g->lo = lo;
    g->hi = hi;
    g->align = (uint8_t)align;
    g->last = (uint16_t)k;
    g->members++;
    return true;
}

/* The place to check a new group at: as near as possible to instruction k where flags are dead; k itself otherwise. */
static void place_group(struct unit *x, struct group *g, const struct access *m, unsigned k, unsigned region)
{
    const struct value *then = x->insn[k].gpr;

    g->at = (uint16_t)k;
    g->base = m->base;
    g->index = m->index;
    g->disp = m->disp;
    for (unsigned p = k + 1; p-- > region;) {
        const struct unit_insn *i = &x->insn[p];

        if (i->live)
            continue;
        if (m->index != X86_NO_REG) {
            int64_t disp = m->disp + (then[m->index].delta - i->gpr[m->index].delta) * (1 << m->shift);

            if (m->base < 16)
                disp += then[m->base].delta - i->gpr[m->base].delta;
            if (i->gpr[m->index].number != then[m->index].number || disp != (int32_t)disp ||
                (m->base < 16 && i->gpr[m->base].number != then[m->base].number))
                continue;
            g->at = (uint16_t)p;
            g->disp = (int32_t)disp;
            return;
        }
        if (m->base >= 16) {
            g->at = (uint16_t)p;
            return;
        }
        for (unsigned n = 0; n < 16; n++) {
            unsigned r = n == 0 ? m->base : n;      /* the same register if possible */
            int64_t disp = m->delta - i->gpr[r].delta;

            if (i->gpr[r].number != m->value || disp != (int32_t)disp)
                continue;
            g->at = (uint16_t)p;
            g->base = (uint8_t)r;
            g->disp = (int32_t)disp;
            return;
        }
    }
}

static void find_groups(struct unit *x)
{
    unsigned region = 0, first_open = 0;

    for (unsigned k = 0; k < x->insns; k++) {
        struct unit_insn *i = &x->insn[k];

        for (unsigned n = 0; n < i->accesses; n++) {
            struct access *m = &i->access[n];
            unsigned g;

            m->group = -1;
            if (!m->shareable)
                continue;
            for (g = x->groups; g-- > first_open;)
                if (join(x, &x->group[g], m, k))
                    break;
            if (g + 1 > first_open && g < x->groups) {
                m->group = (int8_t)g;
                continue;
            }
            if (x->groups == UNIT_MAX_GROUPS)
                continue;
            g = x->groups++;
            x->group[g] = (struct group){ .value = m->value, .seg = m->seg, .write = m->kind == TLB_WRITE, .members = 1,
                                          .lo = m->delta, .hi = m->delta + m->size, .first = (uint16_t)k, .last = (uint16_t)k,
                                          .align = m->aligned ? m->size : 1 };
            place_group(x, &x->group[g], m, k, region);
            /* disp leads to the first member: keep what leads to value itself. */
            x->group[g].leader = m;
            m->group = (int8_t)g;
        }
        if (is_barrier(i)) {
            region = k + 1;
            first_open = x->groups;
        }
        /* A check ahead of a branch would often look at what the branch is there to protect. */
        if (i->form == FORM_JCC)
            region = k + 1;
    }
}

/* How many checks are to come, from each instruction on, before flags have to be right. */
static void count_checks(struct unit *x)
{
    unsigned ahead = 0;

    for (unsigned k = x->insns; k-- > 0;) {
        struct unit_insn *i = &x->insn[k];

        if (i->needs_flags || !i->live || i->form >= FORM_JMP)
            ahead = 0;
        for (unsigned n = 0; n < i->accesses; n++)
            ahead += i->access[n].group < 0 || x->group[i->access[n].group].first == k;
        i->checks_ahead = (uint8_t)ahead;
    }
}

/* ---- the whole ---- */

/* A unit begins at this offset in the page already: nothing is gained by having its code twice. */
static bool is_unit(struct unit *x, unsigned offset)
{
    const uint8_t *page = (const uint8_t *)((uintptr_t)x->b->host & GUEST_PAGE_MASK);
    const struct block *b = block_lookup(&x->t->it.cpu, page + offset);

    return b && b->code;
}

/* The instruction at this offset, which reaches into the next page, as the interpreter found it there. */
static bool decode_crossing(struct unit *x, struct unit_insn *i, unsigned offset)
{
    const uint8_t *page = (const uint8_t *)((uintptr_t)x->b->host & GUEST_PAGE_MASK);
    const struct block *crossing = block_lookup(&x->t->it.cpu, page + offset);
    uint8_t bytes[X86_MAX_INSN];
    bool gp;

    return crossing && crossing->host2 && block_extends(&x->t->it, x->b, crossing) &&
           !x86_decode(&i->insn, bytes, block_fetch(x->b, offset, bytes), 8, &gp) &&
           offset + i->insn.length > GUEST_PAGE_SIZE;
}

/*
 * STI in line needs the next instruction in the unit, and begun without a look for requests: between the two no interrupt comes in
 * (SDM vol. 2B, STI). next: what follows, NULL at the unit's end. False: the unit ends with STI, the interpreter's.
 */
static bool sti_fits(struct unit *x, const struct unit_insn *next)
{
    struct unit_insn *last = x->insns ? &x->insn[x->insns - 1] : NULL;

    if (!last || last->form != FORM_QUICK || last->insn.mnemonic != ZYDIS_MNEMONIC_STI)
        return true;
    if (next && (next->form <= FORM_JCC || next->form == FORM_JMP || next->form == FORM_END ||
                 (next->form == FORM_RET && x->t->options.returns)))
        return true;
    last->form = FORM_END;
    return false;
}

bool unit_analyse(struct unit *x)
{
    struct block *b = x->b;
    unsigned start = (uintptr_t)b->host & (GUEST_PAGE_SIZE - 1), offset = start;
    struct value v[16];
    /* A second version consists of the same instructions as the first. */
    unsigned most = b->insns ? b->insns : UNIT_MAX_INSNS;
    bool ends = false;

    x->insns = x->groups = x->sums = 0;
    x->values = VALUE_FIRST;
    x->seen_from = x->seen_to = (uint16_t)start;
    for (unsigned r = 0; r < 16; r++)
        v[r] = (struct value){ r, 0 };
    while (!ends && x->insns < most && offset < GUEST_PAGE_SIZE) {
        struct unit_insn *i = &x->insn[x->insns];
        bool gp;

        i->crosses = false;
        if (x86_decode(&i->insn, b->host + (offset - start), GUEST_PAGE_SIZE - offset, 8, &gp)) {
            if (!decode_crossing(x, i, offset))
                break;
            i->crosses = ends = true;
        }
        i->offset = (uint16_t)offset;
        i->native = NULL;
        i->accesses = 0;
        memcpy(i->gpr, v, sizeof(v));
        classify(x, i);
        if (!sti_fits(x, i))
            break;
        find_accesses(x, i);
        follow_values(x, i, v);
        offset += i->insn.length;
        x->insns++;
        ends = ends || i->form >= FORM_JMP || (i->form >= FORM_JCC && !b->insns && offset < GUEST_PAGE_SIZE && is_unit(x, offset)) ||
               (!x->t->options.returns && (i->form == FORM_CALL || i->form == FORM_CALL_INDIRECT)) ||
               (!x->t->options.extend && (i->form == FORM_JCC || i->form == FORM_CALL || i->form == FORM_CALL_INDIRECT));
    }
    sti_fits(x, NULL);
    x->end = offset;
    depends_on(x, start, MIN(offset, GUEST_PAGE_SIZE));
    /* What begins with something for the interpreter is the interpreter's. */
    if (!x->insns || x->insn[0].form == FORM_END)
        return false;
    find_liveness(x);
    find_sources(x);
    find_groups(x);
    count_checks(x);
    unit_find_loop(x);
    return true;
}
