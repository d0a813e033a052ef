/* See lockstep.h. The vCPU's thread. */
#include "engine/translate/lockstep.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/log.h"
#include "isa/x86/mmu.h"
#include "isa/x86/system.h"
#include "isa/x86/trial.h"

#define MAX_INSNS 64            /* more than a unit has */
#define MAX_STORES 512
#define STORE_BYTES KIB(128)
#define ALWAYS 64u              /* so often a translation is compared each time… */
#define SAMPLE 64u              /* …and then once in so many times */

/* The instructions behind a block's start, each lowered by itself. In the arena, as long as the block. */
struct line_insn {
    struct op op[2];            /* the instruction; what comes back */
    bool vectors;               /* may change x87, vector state or MXCSR */
};
struct lockstep_line {
    unsigned count;
    struct line_insn insn[];
};

struct store {
    uint8_t *to;
    uint32_t len;
    uint32_t data;              /* in bytes[]: before, then after */
    bool complete;              /* the bytes after are there */
};

/* State in front of an instruction of the trial, and behind its last one. */
struct point {
    uint64_t rip, gpr[16];
    uint64_t rflags, fs_base, gs_base;
    uint32_t arith;
    unsigned stores;            /* so many were done by then */
    unsigned fpu;               /* which of fpus[] */
};

enum ending {
    END_BRANCH,                 /* a transfer was taken, or the line ended: nothing goes on behind it */
    END_RAISED,                 /* the last point's instruction raised */
    END_STOPPED,                /* the next instruction is not for a trial, or there was no room */
};

struct trial_log {
    struct point point[MAX_INSNS + 1];
    struct x86_fpu fpus[MAX_INSNS + 1];
    unsigned points, fpu_count, stores, used;
    enum ending ending;
    uint8_t vector;             /* END_RAISED */
    bool has_error;
    uint32_t error;
    uint64_t cr2;
    struct store store[MAX_STORES];
    uint8_t bytes[STORE_BYTES];
};

struct lockstep {
    struct x86_trial trial;     /* first */
    struct translator *t;
    struct trial_log *log;      /* the trial under way */
    struct trial_log first, again;
    jmp_buf jump;
    bool full, finished;
    bool jumped;                /* the translation may have come out by a branch */
    struct x86_state before, after;     /* of the comparison under way */
    uint64_t before_insns;
    uint32_t before_arith, after_arith;
    uint8_t held[STORE_BYTES];
    uint64_t compared, raised, unstable, apart;
};

/* ---- the line of instructions ---- */

/* Semantics functions that touch nothing but registers and memory that the trial knows of. */
static bool for_trial(const struct x86_insn *insn)
{
    if (!x86_system_semantics(insn) || insn->category == ZYDIS_CATEGORY_PREFETCH)
        return true;
    switch (insn->mnemonic) {
    case ZYDIS_MNEMONIC_MOV:    /* reading a segment, control or debug register */
        return insn->operand[0].kind == OPERAND_GPR || insn->operand[0].kind == OPERAND_MEM;
    case ZYDIS_MNEMONIC_CLI: case ZYDIS_MNEMONIC_SWAPGS: case ZYDIS_MNEMONIC_WRFSBASE: case ZYDIS_MNEMONIC_WRGSBASE:
    case ZYDIS_MNEMONIC_PREFETCHW: case ZYDIS_MNEMONIC_ENTER:
    case ZYDIS_MNEMONIC_PUSHF: case ZYDIS_MNEMONIC_PUSHFQ: case ZYDIS_MNEMONIC_CPUID: case ZYDIS_MNEMONIC_XGETBV:
    case ZYDIS_MNEMONIC_RDFSBASE: case ZYDIS_MNEMONIC_RDGSBASE: case ZYDIS_MNEMONIC_FXSAVE: case ZYDIS_MNEMONIC_FXSAVE64:
    case ZYDIS_MNEMONIC_FXRSTOR: case ZYDIS_MNEMONIC_FXRSTOR64: case ZYDIS_MNEMONIC_XSAVE: case ZYDIS_MNEMONIC_XSAVE64:
    case ZYDIS_MNEMONIC_XSAVEOPT: case ZYDIS_MNEMONIC_XSAVEOPT64: case ZYDIS_MNEMONIC_XRSTOR: case ZYDIS_MNEMONIC_XRSTOR64:
        return true;
    default:
        return false;
    }
}

static bool changes_vectors(const struct op *op)
{
    return op->fn == op_native || op->fn == op_semantics || op->fn == op_semantics_end;
}

static const struct op *op_come_back(struct x86_cpu *cpu, const struct op *op)
{
    struct lockstep *l = translator_of(cpu)->lockstep;

    cpu->s.rip = op_rip(cpu, op);
    l->finished = true;
    return NULL;
}

/* NULL: there is no room (flush_wanted is set). */
static struct lockstep_line *make_line(struct translator *t, struct block *b)
{
    unsigned start = (uintptr_t)b->host & (GUEST_PAGE_SIZE - 1), offset = start;
    struct lockstep_line *line;

    if (t->it.arena_size - t->it.arena_used < KIB(64)) {
        t->it.flush_wanted = true;
        return NULL;
    }
    line = block_alloc(&t->it, sizeof(*line) + MAX_INSNS * sizeof(line->insn[0]));
    line->count = 0;
    while (line->count < MAX_INSNS) {
        struct line_insn *i = &line->insn[line->count];
        struct x86_insn insn;
        bool gp, ends;

        if (x86_decode(&insn, b->host + (offset - start), GUEST_PAGE_SIZE - offset, 8, &gp) || !for_trial(&insn))
            break;
        memset(i, 0, sizeof(*i));
        i->op[0] = (struct op){ .rip = offset, .len = insn.length };
        ends = lower(&t->it, &i->op[0], &insn);
        if (i->op[0].aux == BLOCK_SELF)
            i->op[0].aux = b;
        i->vectors = changes_vectors(&i->op[0]);
        offset += insn.length;
        i->op[1] = (struct op){ .fn = op_come_back, .rip = offset };
        line->count++;
        /* Behind a conditional branch or a call a unit may go on, behind others not. */
        if (ends && insn.category != ZYDIS_CATEGORY_COND_BR && insn.category != ZYDIS_CATEGORY_CALL)
            break;
    }
    return b->line = line;
}

/* ---- the trial ---- */

static void note_store(struct x86_trial *trial, void *p, unsigned len)
{
    struct lockstep *l = (struct lockstep *)trial;
    struct trial_log *log = l->log;

    if (log->stores == MAX_STORES || log->used + 2 * len > STORE_BYTES) {
        l->full = true;
        longjmp(l->jump, 2);
    }
    log->store[log->stores++] = (struct store){ .to = p, .len = len, .data = log->used };
    memcpy(log->bytes + log->used, p, len);
    log->used += 2 * len;
}

static void reached_device(struct x86_cpu *cpu)
{
    longjmp(((struct lockstep *)cpu->trial)->jump, 2);
}

/* The stores of the instruction that just ended have their bytes now. */
static void complete_stores(struct trial_log *log)
{
    for (unsigned i = log->stores; i-- > 0 && !log->store[i].complete;) {
        struct store *s = &log->store[i];

        memcpy(log->bytes + s->data + s->len, s->to, s->len);
        s->complete = true;
    }
}

static void take_back(struct trial_log *log)
{
    for (unsigned i = log->stores; i-- > 0;)
        memcpy(log->store[i].to, log->bytes + log->store[i].data, log->store[i].len);
}

static void mark_point(struct x86_cpu *cpu, struct trial_log *log, bool vectors)
{
    struct point *p = &log->point[log->points++];

    *p = (struct point){ .rip = cpu->s.rip, .rflags = cpu->s.rflags & ~(uint64_t)RFLAGS_ARITH,
                         .fs_base = cpu->s.seg[SEG_FS].base, .gs_base = cpu->s.seg[SEG_GS].base, .arith = cpu->arith,
                         .stores = log->stores };
    memcpy(p->gpr, cpu->s.gpr, sizeof(p->gpr));
    if (vectors || log->points == 1)
        log->fpus[log->fpu_count++] = cpu->s.fpu;
    p->fpu = log->fpu_count - 1;
}

/* Executes along the line from the state in force, s.rip being its start. */
static void walk_line(struct lockstep *l, const struct lockstep_line *line)
{
    struct x86_cpu *cpu = &l->t->it.cpu;
    struct trial_log *log = l->log;
    bool vectors = false;

    for (unsigned k = 0; k < line->count; k++) {
        const struct line_insn *i = &line->insn[k];
        uint64_t rip = op_rip(cpu, &i->op[0]);

        if (cpu->s.rip != rip) {        /* taken */
            log->ending = END_BRANCH;
            break;
        }
        mark_point(cpu, log, vectors);
        vectors = i->vectors;
        do {                            /* a repeated string instruction comes back in between */
            const struct op *op = i->op;

            l->finished = false;
            while (op)
                op = op->fn(cpu, op);
        } while (!l->finished && cpu->s.rip == rip && i->op[0].fn == op_string);
        complete_stores(log);
        if (k + 1 == line->count)
            log->ending = cpu->s.rip == op_rip(cpu, &i->op[1]) ? END_STOPPED : END_BRANCH;
    }
    mark_point(cpu, log, true);
}

static void run_trial(struct lockstep *l, struct block *b, struct trial_log *log)
{
    struct x86_cpu *cpu = &l->t->it.cpu;
    jmp_buf *outer = cpu->fault_jmp;
    int why;

    log->points = log->fpu_count = log->stores = log->used = 0;
    log->ending = END_STOPPED;
    l->log = log;
    l->trial.noting = true;
    l->trial.code_written = false;
    tlb_drop_writes(x86_unchecked_set(cpu));
    cpu->trial = &l->trial;
    cpu->fault_jmp = &l->jump;
    /* Branches come back. */
    atomic_fetch_or(&cpu->request, REQUEST_DEBUG);
    why = _setjmp(l->jump);
    if (why == 0) {
        walk_line(l, b->line);
    } else if (why == 1) {
        log->ending = END_RAISED;
        log->vector = cpu->exc_vector;
        log->has_error = cpu->exc_has_error;
        log->error = cpu->exc_error;
        log->cr2 = cpu->s.cr2;
        complete_stores(log);
        mark_point(cpu, log, true);
    } else {
        log->ending = END_STOPPED;
        /* What the instruction did so far is not to be compared. */
        if (log->points)
            log->point[log->points - 1].stores = log->stores;
    }
    atomic_fetch_and(&cpu->request, ~REQUEST_DEBUG);
    cpu->fault_jmp = outer;
    cpu->trial = NULL;
    l->trial.noting = false;
    take_back(log);
}

static void restore(struct lockstep *l)
{
    struct x86_cpu *cpu = &l->t->it.cpu;

    cpu->s = l->before;
    cpu->arith = l->before_arith;
    cpu->insns = l->before_insns;
}

/* ---- comparison ---- */

static bool same_fpu(const struct x86_fpu *a, const struct x86_fpu *b)
{
    return memcmp(a->zmm, b->zmm, sizeof(a->zmm)) == 0 && memcmp(a->k, b->k, sizeof(a->k)) == 0 &&
           memcmp(a->st, b->st, sizeof(a->st)) == 0 && a->fcw == b->fcw && a->fsw == b->fsw && a->ftw == b->ftw &&
           a->mxcsr == b->mxcsr;
}

static bool same_registers(const struct lockstep *l, const struct trial_log *log, const struct point *p)
{
    return p->rip == l->after.rip && p->arith == l->after_arith &&
           p->rflags == (l->after.rflags & ~(uint64_t)RFLAGS_ARITH) && p->fs_base == l->after.seg[SEG_FS].base &&
           p->gs_base == l->after.seg[SEG_GS].base && memcmp(p->gpr, l->after.gpr, sizeof(p->gpr)) == 0 &&
           same_fpu(&log->fpus[p->fpu], &l->after.fpu);
}

/* The point where the translation came out; NULL: the trial was never there. */
static const struct point *find_point(const struct lockstep *l, const struct trial_log *log, bool raised)
{
    const struct point *nearest = NULL;

    if (raised)
        return log->ending == END_RAISED ? &log->point[log->points - 1] : NULL;
    /* A loop comes back to where it began. What an instruction that raised has done by then is not in front of it. */
    for (unsigned i = 0; i + (log->ending == END_RAISED) < log->points; i++) {
        const struct point *p = &log->point[i];

        if (p->rip != l->after.rip)
            continue;
        if (!nearest || same_registers(l, log, p) || !same_registers(l, log, nearest))
            nearest = p;
    }
    /* It may have gone round behind what the trial could do. */
    if (nearest && log->ending == END_STOPPED && l->jumped && !same_registers(l, log, nearest))
        return NULL;
    return nearest;
}

/* Whether byte n of store i is overwritten by a later one before the point. */
static bool overwritten(const struct trial_log *log, const struct point *p, unsigned i, unsigned n)
{
    const uint8_t *at = log->store[i].to + n;

    for (unsigned k = i + 1; k < p->stores; k++)
        if (at >= log->store[k].to && at < log->store[k].to + log->store[k].len)
            return true;
    return false;
}

/* The first byte that the translation has not written as the interpreter did; NULL: none. */
static const uint8_t *different_byte(const struct trial_log *log, const struct point *p, uint8_t *expected)
{
    for (unsigned i = 0; i < p->stores; i++) {
        const struct store *s = &log->store[i];
        const uint8_t *after = log->bytes + s->data + s->len;

        if (!s->complete || memcmp(after, s->to, s->len) == 0)
            continue;
        for (unsigned n = 0; n < s->len; n++)
            if (after[n] != s->to[n] && !overwritten(log, p, i, n)) {
                *expected = after[n];
                return s->to + n;
            }
    }
    return NULL;
}

/* The first byte that only the translation has written. */
static const uint8_t *stray_byte(const struct lockstep *l, const struct trial_log *log, uint8_t *expected)
{
    for (unsigned i = 0; i < l->trial.pages; i++) {
        const uint8_t *page = l->trial.page[i], *image = l->trial.image[i];

        if (memcmp(page, image, GUEST_PAGE_SIZE) == 0)
            continue;
        for (unsigned n = 0; n < GUEST_PAGE_SIZE; n++) {
            bool noted = page[n] == image[n];

            for (unsigned k = 0; k < log->stores && !noted; k++)
                noted = page + n >= log->store[k].to && page + n < log->store[k].to + log->store[k].len;
            if (!noted) {
                *expected = image[n];
                return page + n;
            }
        }
    }
    return NULL;
}

/* ---- telling ---- */

static void hex(char *out, const uint8_t *bytes, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        sprintf(out + 2 * i, "%02x", bytes[n - 1 - i]);
}

static void tell_number(const char *name, uint64_t before, uint64_t interpreter, uint64_t translation)
{
    if (interpreter != translation)
        log_error("  %-6s before %016" PRIx64 ", interpreter %016" PRIx64 ", translation %016" PRIx64, name, before, interpreter,
                  translation);
}

static void tell_bytes(const char *name, unsigned i, const uint8_t *interpreter, const uint8_t *translation, unsigned n)
{
    char a[129], b[129];

    if (memcmp(interpreter, translation, n) == 0)
        return;
    hex(a, interpreter, n);
    hex(b, translation, n);
    log_error("  %s%u: interpreter %s", name, i, a);
    log_error("  %s%u: translation %s", name, i, b);
}

static uint64_t guest_of(const struct translator *t, const uint8_t *p)
{
    const struct memory *m = t->it.cpu.mem;

    for (unsigned i = 0; i < m->regions; i++)
        if (p >= m->region[i].host && (uint64_t)(p - m->region[i].host) < m->region[i].size)
            return m->region[i].base + (uint64_t)(p - m->region[i].host);
    return ~0ull;
}

static void tell(struct lockstep *l, const struct block *b, const struct point *p, bool raised)
{
    static const char *const names[16] = { "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
                                           "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15" };
    const struct trial_log *log = &l->first;
    const struct x86_cpu *cpu = &l->t->it.cpu;
    const struct lockstep_line *line = b->line;
    unsigned start = (uintptr_t)b->host & (GUEST_PAGE_SIZE - 1);
    const uint8_t *byte;
    uint8_t expected = 0;

    log_error("lock-step: the translation at %016" PRIx64 " (comparison %" PRIu64 ") differs from the interpreter:",
              l->before.rip, l->compared);
    for (unsigned i = 0; i < line->count && i + 1 < log->points + (log->ending != END_BRANCH); i++) {
        const struct op *op = &line->insn[i].op[0];
        char text[128];

        x86_format(text, sizeof(text), b->host + (op->rip - start), op->len, 8, op_rip(cpu, op));
        log_error("  %c %016" PRIx64 "  %s", p && p->rip == op_rip(cpu, op) ? '>' : ' ', op_rip(cpu, op), text);
    }
    if (raised)
        log_error("  the translation raised exception %u, error %x, at %016" PRIx64 ", CR2 %" PRIx64, cpu->exc_vector,
                  cpu->exc_has_error ? cpu->exc_error : 0, l->after.rip, l->after.cr2);
    if (log->ending == END_RAISED)
        log_error("  the interpreter raised exception %u, error %x, at %016" PRIx64 ", CR2 %" PRIx64, log->vector,
                  log->has_error ? log->error : 0, log->point[log->points - 1].rip, log->cr2);
    if (!p) {
        log_error("  the translation came out at %016" PRIx64 ", the interpreter at %016" PRIx64, l->after.rip,
                  log->point[log->points - 1].rip);
        p = &log->point[log->points - 1];
    }
    for (unsigned i = 0; i < 16; i++)
        tell_number(names[i], l->before.gpr[i], p->gpr[i], l->after.gpr[i]);
    tell_number("rflags", l->before.rflags & ~(uint64_t)RFLAGS_ARITH, p->rflags, l->after.rflags & ~(uint64_t)RFLAGS_ARITH);
    tell_number("fs", l->before.seg[SEG_FS].base, p->fs_base, l->after.seg[SEG_FS].base);
    tell_number("gs", l->before.seg[SEG_GS].base, p->gs_base, l->after.seg[SEG_GS].base);
    tell_number("flags", l->before_arith, p->arith, l->after_arith);
    for (unsigned i = 0; i < 32; i++)
        tell_bytes("zmm", i, log->fpus[p->fpu].zmm[i], l->after.fpu.zmm[i], 64);
    for (unsigned i = 0; i < 8; i++) {
        tell_bytes("k", i, (const uint8_t *)&log->fpus[p->fpu].k[i], (const uint8_t *)&l->after.fpu.k[i], 8);
        tell_bytes("st", i, log->fpus[p->fpu].st[i], l->after.fpu.st[i], 10);
    }
    tell_number("mxcsr", l->before.fpu.mxcsr, log->fpus[p->fpu].mxcsr, l->after.fpu.mxcsr);
    tell_number("fsw", l->before.fpu.fsw, log->fpus[p->fpu].fsw, l->after.fpu.fsw);
    if ((byte = different_byte(log, p, &expected)))
        log_error("  memory at physical %" PRIx64 ": interpreter %02x, translation %02x", guest_of(l->t, byte), expected, *byte);
    if ((byte = stray_byte(l, log, &expected)))
        log_error("  memory at physical %" PRIx64 ": was %02x, the translation alone wrote %02x", guest_of(l->t, byte), expected,
                  *byte);
    for (unsigned i = 0; i < 16; i += 4)
        log_error("  before: %s %016" PRIx64 "  %s %016" PRIx64 "  %s %016" PRIx64 "  %s %016" PRIx64, names[i],
                  l->before.gpr[i], names[i + 1], l->before.gpr[i + 1], names[i + 2], l->before.gpr[i + 2], names[i + 3],
                  l->before.gpr[i + 3]);
}

/* ---- the two together ---- */

static bool same_as(const struct lockstep *l, const struct trial_log *log, const struct point *p)
{
    uint8_t expected;

    return p && same_registers(l, log, p) && !different_byte(log, p, &expected) &&
           (l->trial.pages_lost || !stray_byte(l, log, &expected));
}

/* Where a device changed memory between the two, a second trial agrees with the translation. */
static bool agrees_now(struct lockstep *l, struct block *b, bool raised)
{
    struct x86_cpu *cpu = &l->t->it.cpu;
    unsigned used = 0;

    for (unsigned i = 0; i < l->first.stores; used += l->first.store[i++].len)
        memcpy(l->held + used, l->first.store[i].to, l->first.store[i].len);
    take_back(&l->first);
    restore(l);
    run_trial(l, b, &l->again);
    cpu->s = l->after;
    cpu->arith = l->after_arith;
    for (unsigned i = l->first.stores; i-- > 0;) {
        used -= l->first.store[i].len;
        memcpy(l->first.store[i].to, l->held + used, l->first.store[i].len);
    }
    return same_as(l, &l->again, find_point(l, &l->again, raised));
}

/*
 * Whether it came out in the middle of a repeated string instruction because somebody wants something: the trial has no points there,
 * and had perhaps nobody who did.
 */
static bool was_interrupted_inside(const struct lockstep *l, const struct block *b)
{
    const struct x86_cpu *cpu = &l->t->it.cpu;

    if (!atomic_load(&cpu->request))
        return false;
    for (unsigned k = 0; k < b->line->count; k++)
        if (b->line->insn[k].op[0].fn == op_string && op_rip(cpu, &b->line->insn[k].op[0]) == l->after.rip)
            return true;
    return false;
}

/* False: a difference (logged). raised: the translation did, at after.rip. */
static bool compare(struct lockstep *l, struct block *b, bool raised)
{
    const struct x86_cpu *cpu = &l->t->it.cpu;
    const struct trial_log *log = &l->first;
    const struct point *p = find_point(l, log, raised);
    bool same;

    /* Beyond what the trial could do, and anything that was changed for good by then. */
    if (!p && log->ending == END_STOPPED) {
        l->apart++;
        return true;
    }
    l->compared++;
    l->raised += raised;
    same = same_as(l, log, p);
    if (same && raised)
        same = log->vector == cpu->exc_vector && log->has_error == cpu->exc_has_error &&
               (!log->has_error || log->error == cpu->exc_error) && (log->vector != X86_PF || log->cr2 == l->after.cr2);
    if (same)
        return true;
    if (!raised && was_interrupted_inside(l, b)) {
        l->apart++;
        return true;
    }
    if (agrees_now(l, b, raised)) {
        l->unstable++;
        return true;
    }
    tell(l, b, p, raised);
    return false;
}

/* Where the translation's result says that execution goes on. */
static uint64_t place_of(const struct x86_cpu *cpu, const struct op *next)
{
    if ((uintptr_t)next == RETURNED_NOWHERE || !next)
        return cpu->s.rip;
    if ((uintptr_t)next & 1)
        return page_rip(cpu, ((const struct chain *)((uintptr_t)next & ~(uintptr_t)1))->target);
    return op_rip(cpu, next);
}

static const struct op *stop(struct translator *t)
{
    t->diverged = true;
    x86_request(&t->it.cpu, REQUEST_EXIT);
    return NULL;
}

const struct op *lockstep_enter(struct translator *t, struct block *b)
{
    struct lockstep *l = t->lockstep;
    struct x86_cpu *cpu = &t->it.cpu;
    jmp_buf *outer = cpu->fault_jmp;
    const struct op *next;
    unsigned start = (uintptr_t)b->host & (GUEST_PAGE_SIZE - 1);
    uint32_t run = b->runs++;

    if ((run >= ALWAYS && run % SAMPLE) || (!b->line && !make_line(t, b)))
        return t->enter(t, b->code);
    cpu->s.rip = page_rip(cpu, start);
    l->before = cpu->s;
    l->before_arith = cpu->arith;
    l->before_insns = cpu->insns;
    run_trial(l, b, &l->first);
    restore(l);

    l->trial.pages = 0;
    l->trial.pages_lost = false;
    cpu->trial = &l->trial;
    cpu->fault_jmp = &l->jump;
    if (_setjmp(l->jump) == 0) {
        next = t->enter(t, b->code);
        cpu->trial = NULL;
        cpu->fault_jmp = outer;
        l->after = cpu->s;
        l->after_arith = cpu->arith;
        l->after.rip = place_of(cpu, next);
        l->jumped = !t->interpret_once;
        return compare(l, b, false) ? next : stop(t);
    }
    cpu->trial = NULL;
    cpu->fault_jmp = outer;
    l->after = cpu->s;
    l->after_arith = cpu->arith;
    if (!compare(l, b, true))
        return stop(t);
    longjmp(*outer, 1);
}

int lockstep_create(struct translator *t, unsigned vcpus)
{
    if (vcpus > 1) {
        log_error("--translate lockstep=on compares one processor; use --cpus 1");
        return -EINVAL;
    }
    t->lockstep = calloc(1, sizeof(*t->lockstep));
    if (!t->lockstep)
        return -ENOMEM;
    t->lockstep->t = t;
    t->lockstep->trial.writing = note_store;
    t->lockstep->trial.device = reached_device;
    /* Translations come out at their end, with all flags. */
    t->options.chain = t->options.returns = t->options.indirect = t->options.liveness = t->options.loops = false;
    return 0;
}

void lockstep_destroy(struct translator *t)
{
    struct lockstep *l = t->lockstep;

    if (!l)
        return;
    log_info("lock-step: %" PRIu64 " translations compared, %" PRIu64 " of them raising; %" PRIu64
             " not comparable, %" PRIu64 " changed by devices", l->compared, l->raised, l->apart, l->unstable);
    free(l);
    t->lockstep = NULL;
}
