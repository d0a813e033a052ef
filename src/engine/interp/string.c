/*
 * String instructions: MOVS, STOS, LODS, CMPS, SCAS with and without REP.
 *
 * Repeated ones work page by page on host memory where both sides are plain RAM, element by element
 * otherwise. Registers always say how far the instruction has come, so a fault or an interrupt in
 * the middle leaves the state of an instruction that continues.
 */
#include "engine/interp/compute.h"
#include "isa/x86/mmu.h"

struct walk {
    struct x86_cpu *cpu;
    unsigned size;              /* of an element, bytes */
    unsigned addr_size;
    unsigned seg;               /* source segment */
    bool plain;                 /* offsets are linear addresses, but for the source's base */
    uint64_t last;              /* the last offset of a whole element: a flat segment ends at 4 GiB */
    bool pieces;                /* several elements at once, where they are plain RAM */
    bool down;
    uint64_t src_base;
    uint32_t *flags;            /* of comparisons */
};

static gva_t source(const struct walk *w)
{
    uint64_t rsi = x86_get_gpr(w->cpu, RSI, w->addr_size);

    return w->plain && rsi <= w->last ? w->src_base + rsi : x86_seg_linear(w->cpu, w->seg, rsi, w->size, false);
}

static gva_t destination(const struct walk *w, bool write)
{
    uint64_t rdi = x86_get_gpr(w->cpu, RDI, w->addr_size);

    return w->plain && rdi <= w->last ? rdi : x86_seg_linear(w->cpu, SEG_ES, rdi, w->size, write);
}

static void advance(const struct walk *w, unsigned reg, uint64_t elements)
{
    uint64_t bytes = elements * w->size;

    x86_set_gpr(w->cpu, reg, w->cpu->s.gpr[reg] + (w->down ? -bytes : bytes), w->addr_size);
}

static uint64_t load(struct x86_cpu *cpu, gva_t va, unsigned size)
{
    switch (size) {
    case 1: return x86_read8(cpu, va);
    case 2: return x86_read16(cpu, va);
    case 4: return x86_read32(cpu, va);
    default: return x86_read64(cpu, va);
    }
}

static void store(struct x86_cpu *cpu, gva_t va, uint64_t v, unsigned size)
{
    switch (size) {
    case 1: x86_write8(cpu, va, (uint8_t)v); break;
    case 2: x86_write16(cpu, va, (uint16_t)v); break;
    case 4: x86_write32(cpu, va, (uint32_t)v); break;
    default: x86_write64(cpu, va, v); break;
    }
}

static uint32_t compare(uint64_t a, uint64_t b, unsigned size, uint32_t flags)
{
    switch (size) {
    case 1: compute_cmp8((uint8_t)a, (uint8_t)b, &flags); break;
    case 2: compute_cmp16((uint16_t)a, (uint16_t)b, &flags); break;
    case 4: compute_cmp32((uint32_t)a, (uint32_t)b, &flags); break;
    default: compute_cmp64(a, b, &flags); break;
    }
    return flags;
}

/* Elements from offset up to the end of the page and of the address size's range; 0 when the first crosses. */
static uint64_t elements_ahead(const struct walk *w, gva_t va, unsigned reg)
{
    uint64_t bytes = GUEST_PAGE_SIZE - (va & (GUEST_PAGE_SIZE - 1));

    if (w->addr_size < 8) {
        uint64_t range = 1ull << (w->addr_size * 8);

        bytes = MIN(bytes, range - x86_get_gpr(w->cpu, reg, w->addr_size));
    }
    return bytes / w->size;
}

/* One element of each kind, or several where that is the same. Returns how many, at least 1, at most limit. */
static uint64_t step_movs(const struct walk *w, uint64_t limit)
{
    gva_t src = source(w), dst = x86_get_gpr(w->cpu, RDI, w->addr_size);
    uint64_t n = 1, v;

    if (w->pieces && limit > 1 && dst <= w->last) {
        n = MIN(MIN(elements_ahead(w, src, RSI), elements_ahead(w, dst, RDI)), limit);
        if (n > 1) {
            uint64_t len = n * w->size;
            const uint8_t *from = x86_host_pointer(w->cpu, src, (unsigned)len, ACCESS_READ);
            uint8_t *to = from ? x86_host_pointer(w->cpu, dst, (unsigned)len, ACCESS_WRITE) : NULL;

            if (to && ((uint64_t)(to - from) >= len)) {
                memmove(to, from, len);
                goto done;
            }
        }
        n = 1;
    }
    /* The source's page faults come before the destination's limit. */
    v = load(w->cpu, src, w->size);
    store(w->cpu, destination(w, true), v, w->size);
done:
    advance(w, RSI, n);
    advance(w, RDI, n);
    return n;
}

static void fill(uint8_t *to, uint64_t v, unsigned size, uint64_t n)
{
    switch (size) {
    case 1: memset(to, (int)(uint8_t)v, n); break;
    case 2: for (uint64_t i = 0; i < n; i++) store_le16(to + i * 2, (uint16_t)v); break;
    case 4: for (uint64_t i = 0; i < n; i++) store_le32(to + i * 4, (uint32_t)v); break;
    default:
        if (v == 0)
            memset(to, 0, n * 8);
        else
            for (uint64_t i = 0; i < n; i++)
                store_le64(to + i * 8, v);
    }
}

static uint64_t step_stos(const struct walk *w, uint64_t limit)
{
    gva_t dst = destination(w, true);
    uint64_t n = 1;

    if (w->pieces && limit > 1) {
        n = MIN(elements_ahead(w, dst, RDI), limit);
        if (n > 1) {
            uint8_t *to = x86_host_pointer(w->cpu, dst, (unsigned)(n * w->size), ACCESS_WRITE);

            if (to) {
                fill(to, w->cpu->s.gpr[RAX], w->size, n);
                goto done;
            }
        }
        n = 1;
    }
    store(w->cpu, dst, w->cpu->s.gpr[RAX], w->size);
done:
    advance(w, RDI, n);
    return n;
}

static void step_lods(const struct walk *w)
{
    x86_set_gpr(w->cpu, RAX, load(w->cpu, source(w), w->size), w->size);
    advance(w, RSI, 1);
}

static void step_cmps(const struct walk *w)
{
    uint64_t a, b;

    if (w->cpu->amd) {
        a = load(w->cpu, source(w), w->size);
        b = load(w->cpu, destination(w, false), w->size);
    } else {                    /* Intel's processors load the second operand first */
        b = load(w->cpu, destination(w, false), w->size);
        a = load(w->cpu, source(w), w->size);
    }

    *w->flags = compare(a, b, w->size, *w->flags);
    advance(w, RSI, 1);
    advance(w, RDI, 1);
}

static void step_scas(const struct walk *w)
{
    uint64_t b = load(w->cpu, destination(w, false), w->size);

    *w->flags = compare(w->cpu->s.gpr[RAX], b, w->size, *w->flags);
    advance(w, RDI, 1);
}

static uint64_t step(const struct walk *w, unsigned what, uint64_t limit)
{
    switch (what) {
    case STRING_MOVS: return step_movs(w, limit);
    case STRING_STOS: return step_stos(w, limit);
    case STRING_LODS: step_lods(w); return 1;
    case STRING_CMPS: step_cmps(w); return 1;
    default: step_scas(w); return 1;
    }
}

/* True: it has ended. False: s.rip is this instruction, it goes on later. */
static __attribute__((noinline)) bool run_string(struct x86_cpu *cpu, const struct op *op)
{
    const struct x86_insn *insn = &((const struct slow_insn *)op->aux)->insn;
    struct walk w = {
        .cpu = cpu,
        .size = op->scale,
        .addr_size = insn->addr_size,
        .seg = insn->mem.seg,
        .down = cpu->s.rflags & RFLAGS_DF,
    };
    bool compares = op->sub == STRING_CMPS || op->sub == STRING_SCAS;
    uint32_t flags = cpu->arith;

    enter_slow(cpu, op);
    /* On Intel's processors a repeated comparison changes the flags when it ends, not in between (SDM vol. 2B, REP). */
    w.flags = cpu->amd || !(insn->rep || insn->repne) ? &cpu->arith : &flags;
    if (cpu->code_size == 8) {
        w.plain = true;
        w.last = UINT64_MAX;
        w.src_base = w.seg >= SEG_FS ? cpu->s.seg[w.seg].base : 0;
    } else {
        w.plain = cpu->flat && w.seg < SEG_FS;
        w.last = UINT32_MAX - (w.size - 1u);
    }
    /* Alignment is checked for each element. */
    w.pieces = w.plain && !w.down && cpu->tlb != &x86_checking_set;

    /* What Intel's processors extend before the first element, whether there is one or not. */
    if (!cpu->amd && cpu->code_size == 8 && w.addr_size == 4 && (insn->rep || insn->repne)) {
        cpu->s.gpr[RCX] = (uint32_t)cpu->s.gpr[RCX];
        if (op->sub == STRING_MOVS)
            cpu->s.gpr[RSI] = (uint32_t)cpu->s.gpr[RSI];
        if (op->sub == STRING_MOVS || op->sub == STRING_STOS)
            cpu->s.gpr[RDI] = (uint32_t)cpu->s.gpr[RDI];
    }
    if (!insn->rep && !insn->repne) {
        step(&w, op->sub, 1);
        return true;
    }
    for (;;) {
        uint64_t count = x86_get_gpr(cpu, RCX, w.addr_size);
        bool single = cpu->s.rflags & RFLAGS_TF;        /* traps after each element */
        unsigned budget;

        if (count == 0) {
            cpu->arith = *w.flags;
            return true;
        }
        /* Look up from time to time, so that interrupts wait no longer than for a few pages. */
        for (budget = single ? 1 : 64; budget && count; budget--) {
            uint64_t n = step(&w, op->sub, single ? 1 : count);

            count -= n;
            x86_set_gpr(cpu, RCX, count, w.addr_size);
            if (compares && condition(*w.flags, 4) == insn->repne) {
                cpu->arith = *w.flags;
                return true;
            }
            if (n > 1)
                budget = budget > 16 ? budget - 15 : 1;
        }
        if (count && (single || atomic_load_explicit(&cpu->request, memory_order_relaxed))) {
            cpu->insns += op->n;
            return false;
        }
    }
}

/* The walk lives in a function of its own: where the address of a local variable has been given away, GCC makes no tail call of NEXT. */
const struct op *op_string(struct x86_cpu *cpu, const struct op *op)
{
    if (unlikely(!run_string(cpu, op)))
        return NULL;
    NEXT;
}
