/*
 * Guest memory in translated code: checks of the soft TLB (memory/tlb.h), and how a checked access is addressed.
 *
 * Where flags are dead a check is
 *
 *     lea   address, T                   ; lowest byte
 *     rorx  $7, T, A
 *     and   $(TLB_ENTRIES - 1) << 5, A
 *     add   gs:tlb, A                    ; the entry
 *     add   tag(A), T                    ; offset in the page on a hit: tags are negated
 *     cmp   $4096 - span, T
 *     ja    slow
 *     mov   addend(A), A
 *     op    disp(base, A)
 *
 * and where they are live it does without them: PEXT, LEA and JRCXZ, with RCX put aside.
 *
 * A group is checked once, for all its bytes; further accesses are only the last line. What fails is filled by the
 * runtime; what that cannot do (a device, a page boundary inside the group, a page that would fault) makes the unit go on in its
 * version without groups, where each access stands for itself and faults are exact.
 */
#include "engine/translate/x86/unit.h"

#define ENTRY_SHIFT 5
#define INDEX_MASK ((TLB_ENTRIES - 1) << ENTRY_SHIFT)
_Static_assert(sizeof(struct tlb_entry) == 1 << ENTRY_SHIFT, "the index is made by a rotation and a mask");

static const struct asm_address none = { H_NONE, H_NONE, 0, 0 };

void unit_take_a(struct unit *x, unsigned k)
{
    struct group *g = x->held >= 0 ? &x->group[x->held] : NULL;

    x->held = -1;
    if (!g || !g->open || g->stored || g->last < k)
        return;
    g->slot = x->next_slot++ % TRANSLATE_ADDENDS;
    /* A slot that is taken from another group makes that one check again. */
    for (unsigned i = 0; i < x->groups; i++)
        if (x->group[i].stored && x->group[i].slot == g->slot)
            x->group[i].stored = false;
    asm_store_gs(&x->a, A, T_GS(addend) + g->slot * 8u);
    g->stored = true;
}

void unit_barrier(struct unit *x)
{
    x->held = -1;
    for (unsigned i = 0; i < x->groups; i++)
        x->group[i].open = x->group[i].stored = false;
}

/* ---- addresses ---- */

/* T := linear address. A may be used. */
static void address(struct unit *x, unsigned seg, unsigned base, unsigned index, unsigned shift, int32_t disp)
{
    struct assembler *a = &x->a;
    unsigned b = H_NONE, i = H_NONE;

    if (base == X86_REG_RIP) {
        asm_load_gs(a, T, CPU_GS(code_page));
        b = T;
    } else if (base < 16) {
        b = unit_host_of[base];
        if (b == H_NONE) {
            asm_load_gs(a, T, gpr_offset(base));
            b = T;
        }
    }
    if (index < 16) {
        i = unit_host_of[index];
        if (i == H_NONE) {
            asm_load_gs(a, A, gpr_offset(index));
            i = A;
        }
    }
    if (b == H_NONE && i == H_NONE)
        asm_mov_imm(a, T, (uint64_t)(int64_t)disp);
    else if (b != T || i != H_NONE || disp)
        asm_lea(a, T, b, i, shift, disp);
    if (seg) {
        asm_load_gs(a, A, CPU_GS(s.seg[0].base) + seg * sizeof(struct x86_seg));
        asm_lea(a, T, T, A, 0, 0);
    }
}

/* T := base + index of a plain access. */
static void sum(struct unit *x, const struct access *m)
{
    asm_lea(&x->a, T, m->base < 16 ? unit_host_of[m->base] : H_NONE, unit_host_of[m->index], m->shift, m->disp);
}

/* ---- checks ---- */

struct check {
    unsigned span, align;
    enum tlb_kind kind;
};

static struct stub *miss(struct unit *x, uint8_t *jump, unsigned tag, struct translate_site *site)
{
    struct stub *s = unit_stub(x, STUB_FILL, jump);

    if (s) {
        s->site = site;
        s->tag = (uint8_t)tag;
    }
    return s;
}

static int32_t tag_of(enum tlb_kind kind) { return (int32_t)(offsetof(struct tlb_entry, tag) + kind * 8u); }

/*
 * T: address → offset in the page. A: entry. Gives the jumps that are taken where the soft TLB has not got it; the first is NULL unless the
 * address is to be aligned.
 */
static void look_up(struct assembler *a, const struct check *c, uint8_t *missed[2])
{
    asm_rorx(a, A, T, GUEST_PAGE_SHIFT - ENTRY_SHIFT);
    asm_alu_imm(a, false, ALU_DIGIT_AND, A, INDEX_MASK);
    asm_gs(a, true, 0x03, A, CPU_GS(tlb));
    asm_mem(a, true, 0x03, T, A, H_NONE, 0, tag_of(c->kind));
    missed[0] = NULL;
    if (c->align > 1) {
        asm_rex(a, false, 0, 0, T, true);
        asm_byte(a, 0xf6), asm_byte(a, 0xc0 | (T & 7)), asm_byte(a, c->align - 1);      /* test $…, T */
        missed[0] = asm_jcc(a, 5);
    }
    asm_alu_imm(a, true, ALU_DIGIT_CMP, T, (int32_t)(GUEST_PAGE_SIZE - c->span));
    missed[1] = asm_jcc(a, 7);
}

/* The same. */
static void check_dead(struct unit *x, const struct check *c, struct translate_site *site)
{
    uint8_t *missed[2];

    look_up(&x->a, c, missed);
    for (unsigned i = 0; i < 2; i++)
        if (missed[i])
            miss(x, missed[i], (unsigned)tag_of(c->kind), site);
}

/* T: address, kept. A: entry. */
static void check_live(struct unit *x, const struct check *c, struct translate_site *site)
{
    struct assembler *a = &x->a;
    unsigned tests = c->align > 1 && c->span > c->align ? 2 : 1;
    struct stub *s;

    unit_save_rcx(x);
    asm_pext_gs(a, A, T, T_GS(tlb_mask));
    asm_load_gs(a, H_RCX, CPU_GS(tlb));
    asm_lea(a, A, H_NONE, A, 2, 0);
    asm_lea(a, A, H_RCX, A, 3, 0);
    for (unsigned i = 0; i < tests; i++) {
        bool aligned = c->align > 1 && i == tests - 1;
        uint8_t *hit;

        asm_mem(a, true, 0x8b, H_RCX, A, H_NONE, 0, tag_of(c->kind));
        asm_lea(a, H_RCX, H_RCX, T, 0, aligned ? 0 : (int32_t)c->span - 1);
        asm_pext_gs(a, H_RCX, H_RCX, aligned ? T_GS(aligned_mask) + (unsigned)__builtin_ctz(c->align) * 8 : T_GS(page_mask));
        hit = asm_jrcxz(a);
        s = miss(x, asm_jmp(a), 0xff, site);
        if (s)
            s->restore_rcx = true;
        asm_set_short(hit, a->at);
    }
    unit_restore_rcx(x);
}

void unit_look_up(struct unit *x, unsigned base, unsigned index, unsigned shift, const struct group *g, const uint8_t *missed)
{
    struct check c = { (unsigned)(g->hi - g->lo), g->align, g->write ? TLB_WRITE : TLB_READ };
    uint8_t *jump[2];

    address(x, 0, base, index, shift, (int32_t)g->lo);
    look_up(&x->a, &c, jump);
    for (unsigned i = 0; i < 2; i++)
        if (jump[i] && !x->a.full)
            asm_set_target(jump[i], missed);
}

static const void *here(struct unit *x) { return code_exec(&x->t->code, x->a.at); }

static void check_group(struct unit *x, struct group *g, unsigned k)
{
    struct translate_site *site = unit_site(x, k);
    struct check c = { (unsigned)(g->hi - g->lo), g->align, g->write ? TLB_WRITE : TLB_READ };

    unit_take_a(x, k);
    site->group = true;
    site->next = x->b->sites;
    x->b->sites = site;
    site->span = (uint16_t)c.span;
    site->kind = (uint8_t)c.kind;
    site->aligned = g->align > 1;
    site->align = g->align;
    site->retry = here(x);
    address(x, g->seg, g->base, g->index, g->leader->shift, (int32_t)(g->disp - (g->leader->delta - g->lo)));
    (unit_may_clobber(x, k) ? check_dead : check_live)(x, &c, site);
    asm_mem(&x->a, true, 0x8b, A, A, H_NONE, 0, offsetof(struct tlb_entry, addend));
    g->checked = g->open = true;
    x->held = (int)(g - x->group);
}

void unit_checks(struct unit *x, unsigned k)
{
    if (!x->share)
        return;
    for (unsigned i = 0; i < x->groups; i++) {
        struct group *g = &x->group[i];

        if (g->at == k && (g->members > 1 || g->at != g->first))
            check_group(x, g, k);
    }
}

/* ---- accesses ---- */

static struct asm_address place_alone(struct unit *x, unsigned k, const struct access *m, bool leaves)
{
    struct assembler *a = &x->a;
    struct translate_site *site = unit_site(x, k);
    struct check c = { m->size, m->aligned ? m->size : 1, (enum tlb_kind)m->kind };
    bool live = !unit_may_clobber(x, k);

    unit_take_a(x, k);
    site->span = m->size;
    site->kind = m->kind;
    site->aligned = c.align > 1;
    site->align = (uint8_t)c.align;
    site->retry = here(x);
    if (!leaves) {
        site->next = x->sites;
        x->sites = site;
    }
    address(x, m->seg, m->base, m->index, m->shift, m->disp);
    (live ? check_live : check_dead)(x, &c, site);
    if (!live && !unit_is_plain(m))
        asm_mem(a, true, 0x2b, T, A, H_NONE, 0, tag_of(c.kind));
    asm_mem(a, true, 0x8b, A, A, H_NONE, 0, offsetof(struct tlb_entry, addend));
    if (!unit_is_plain(m))
        return (struct asm_address){ T, A, 0, 0 };
    if (m->index == X86_NO_REG)
        return (struct asm_address){ unit_host_of[m->base], A, 0, m->disp };
    if (!live)
        sum(x, m);
    return (struct asm_address){ T, A, 0, 0 };
}

struct asm_address unit_place(struct unit *x, unsigned k, unsigned n, bool leaves)
{
    struct assembler *a = &x->a;
    const struct access *m = &x->insn[k].access[n];
    struct group *g = x->share && m->group >= 0 ? &x->group[m->group] : NULL;

    if (!g || !g->open || (x->held != m->group && !g->stored) ||
        (m->seg && m->base < 16 && unit_host_of[m->base] == H_NONE) ||
        (m->seg && m->base == X86_REG_RIP && !unit_may_clobber(x, k)))
        return place_alone(x, k, m, leaves);
    if (x->held != m->group) {
        unit_take_a(x, k);
        asm_load_gs(a, A, T_GS(addend) + g->slot * 8u);
        x->held = m->group;
    }
    if (m->seg) {
        asm_load_gs(a, T, CPU_GS(s.seg[0].base) + m->seg * sizeof(struct x86_seg));
        if (m->base == X86_REG_RIP)
            asm_gs(a, true, 0x03, T, CPU_GS(code_page));
        else if (m->base < 16)
            asm_lea(a, T, T, unit_host_of[m->base], 0, 0);
        return (struct asm_address){ T, A, 0, m->disp };
    }
    if (m->index != X86_NO_REG) {
        sum(x, m);
        return (struct asm_address){ T, A, 0, 0 };
    }
    if (m->base == X86_NO_REG)
        return (struct asm_address){ A, H_NONE, 0, m->disp };
    if (m->base < 16 && unit_host_of[m->base] != H_NONE)
        return (struct asm_address){ unit_host_of[m->base], A, 0, m->disp };
    asm_load_gs(a, T, m->base == X86_REG_RIP ? CPU_GS(code_page) : gpr_offset(m->base));
    return (struct asm_address){ T, A, 0, m->disp };
}

unsigned unit_scratch(struct unit *x, unsigned k, struct asm_address *m, unsigned taken)
{
    const struct asm_address *at = m ? m : &none;

    if (at->base != T && at->index != T && !(taken & 1u << T))
        return T;
    if (at->base != A && at->index != A && !(taken & 1u << A)) {
        unit_take_a(x, k);
        return A;
    }
    if (at->base == T && at->index == A && !(taken & (1u << T | 1u << A))) {
        asm_lea(&x->a, T, T, A, 0, at->disp);
        *m = (struct asm_address){ T, H_NONE, 0, 0 };
        unit_take_a(x, k);
        return A;
    }
    return H_NONE;
}
