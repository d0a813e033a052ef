/*
 * One instruction that is no control transfer, in translated code.
 *
 * Registers keep their names or have stand-ins: a guest register in memory is loaded into a scratch register before the
 * instruction and stored behind it. What has no form here, or would need more scratch registers than there are, is run by the
 * interpreter.
 */
#include "engine/translate/x86/unit.h"
#include "isa/x86/legacy.h"
#include "isa/x86/native_internal.h"

/* ---- what can be copied ---- */

static bool copyable(const struct x86_insn *insn)
{
    switch (insn->mnemonic) {
    case ZYDIS_MNEMONIC_ADD: case ZYDIS_MNEMONIC_OR: case ZYDIS_MNEMONIC_ADC: case ZYDIS_MNEMONIC_SBB:
    case ZYDIS_MNEMONIC_AND: case ZYDIS_MNEMONIC_SUB: case ZYDIS_MNEMONIC_XOR: case ZYDIS_MNEMONIC_CMP:
    case ZYDIS_MNEMONIC_TEST: case ZYDIS_MNEMONIC_MOVZX: case ZYDIS_MNEMONIC_MOVSX: case ZYDIS_MNEMONIC_MOVSXD:
    case ZYDIS_MNEMONIC_INC: case ZYDIS_MNEMONIC_DEC: case ZYDIS_MNEMONIC_NEG: case ZYDIS_MNEMONIC_NOT:
    case ZYDIS_MNEMONIC_ROL: case ZYDIS_MNEMONIC_ROR: case ZYDIS_MNEMONIC_RCL: case ZYDIS_MNEMONIC_RCR:
    case ZYDIS_MNEMONIC_SHL: case ZYDIS_MNEMONIC_SHR: case ZYDIS_MNEMONIC_SAR: case ZYDIS_MNEMONIC_SHLD:
    case ZYDIS_MNEMONIC_SHRD: case ZYDIS_MNEMONIC_MUL: case ZYDIS_MNEMONIC_IMUL: case ZYDIS_MNEMONIC_BSF:
    case ZYDIS_MNEMONIC_BSR: case ZYDIS_MNEMONIC_TZCNT: case ZYDIS_MNEMONIC_LZCNT: case ZYDIS_MNEMONIC_POPCNT:
    case ZYDIS_MNEMONIC_BSWAP: case ZYDIS_MNEMONIC_CBW: case ZYDIS_MNEMONIC_CWDE: case ZYDIS_MNEMONIC_CDQE:
    case ZYDIS_MNEMONIC_CWD: case ZYDIS_MNEMONIC_CDQ: case ZYDIS_MNEMONIC_CQO: case ZYDIS_MNEMONIC_CLC:
    case ZYDIS_MNEMONIC_STC: case ZYDIS_MNEMONIC_CMC: case ZYDIS_MNEMONIC_LAHF: case ZYDIS_MNEMONIC_SAHF:
    case ZYDIS_MNEMONIC_XADD: case ZYDIS_MNEMONIC_CMPXCHG: case ZYDIS_MNEMONIC_XCHG: case ZYDIS_MNEMONIC_CMPXCHG16B:
#define CASE(cc) case ZYDIS_MNEMONIC_SET##cc: case ZYDIS_MNEMONIC_CMOV##cc:
    CASE(O) CASE(NO) CASE(B) CASE(NB) CASE(Z) CASE(NZ) CASE(BE) CASE(NBE) CASE(S) CASE(NS) CASE(P) CASE(NP) CASE(L)
    CASE(NL) CASE(LE) CASE(NLE)
#undef CASE
        return true;
    case ZYDIS_MNEMONIC_MOV:    /* not to or from segment, control and debug registers */
        for (unsigned i = 0; i < insn->visible; i++)
            if (insn->operand[i].kind != OPERAND_GPR && insn->operand[i].kind != OPERAND_GPR8H &&
                insn->operand[i].kind != OPERAND_MEM && insn->operand[i].kind != OPERAND_IMM)
                return false;
        return true;
    case ZYDIS_MNEMONIC_BT: case ZYDIS_MNEMONIC_BTS: case ZYDIS_MNEMONIC_BTR: case ZYDIS_MNEMONIC_BTC:
        /* A bit offset in a register reaches beyond a memory operand. */
        return !insn->has_mem || insn->operand[1].kind == OPERAND_IMM;
    default:
        return false;
    }
}

static bool is_nop(const struct x86_insn *insn)
{
    switch (insn->mnemonic) {
    case ZYDIS_MNEMONIC_NOP: case ZYDIS_MNEMONIC_PAUSE: case ZYDIS_MNEMONIC_ENDBR64: case ZYDIS_MNEMONIC_ENDBR32:
    case ZYDIS_MNEMONIC_LFENCE: case ZYDIS_MNEMONIC_SFENCE: case ZYDIS_MNEMONIC_PREFETCHT0: case ZYDIS_MNEMONIC_PREFETCHT1:
    case ZYDIS_MNEMONIC_PREFETCHT2: case ZYDIS_MNEMONIC_PREFETCHNTA: case ZYDIS_MNEMONIC_PREFETCHW:
        return true;
    default:
        return false;
    }
}

/* A memory operand whose address is one of those that unit_place() knows. */
static bool addressable(const struct unit_insn *i)
{
    const struct x86_mem *m = &i->insn.mem;
    int64_t disp = m->disp;

    if (!i->insn.has_mem)
        return true;
    if (!i->insn.modrm_offset || m->addr_size != 8 || m->vsib_size)
        return false;
    if (m->base == X86_REG_RIP)
        disp += i->offset + i->insn.length;
    return disp == (int32_t)disp;
}

/* Guest registers named in the encoding that live in memory. */
static unsigned stand_ins(const struct x86_insn *insn)
{
    unsigned mask = 0;

    for (unsigned n = 0; n < insn->operands; n++)
        if (insn->operand[n].kind == OPERAND_GPR && unit_host_of[insn->operand[n].reg] == H_NONE)
            mask |= 1u << insn->operand[n].reg;
    return (unsigned)__builtin_popcount(mask);
}

/* The register whose second byte is an operand beside one in memory, or X86_NO_REG. */
static unsigned high_byte(const struct x86_insn *insn)
{
    for (unsigned n = 0; n < insn->visible && insn->has_mem; n++)
        if (insn->operand[n].kind == OPERAND_GPR8H)
            return insn->operand[n].reg;
    return X86_NO_REG;
}

/*
 * AH and its like have no encoding beside a REX prefix. With a renamed register there is no way; with a checked operand in
 * memory, whose encoding has one, they become the lowest byte for a moment, unless RAX is an operand by itself.
 */
static bool high_bytes_fit(const struct x86_insn *insn)
{
    bool any = false, renamed = insn->has_mem && insn->mnemonic == ZYDIS_MNEMONIC_CMPXCHG;

    for (unsigned n = 0; n < insn->visible; n++) {
        const struct x86_operand *o = &insn->operand[n];

        any |= o->kind == OPERAND_GPR8H;
        renamed |= o->kind == OPERAND_GPR && !o->implicit && unit_host_of[o->reg] != o->reg;
    }
    return !any || !renamed;
}

static bool vector_fits(struct unit *x, struct unit_insn *i)
{
    const struct x86_insn *insn = &i->insn;
    const struct native_insn *n;

    if (!x->t->options.vectors || x->t->simd_trap || x86_system_semantics(insn) || x86_legacy_semantics(insn))
        return false;
    n = native_prepare(insn);
    if (n && insn->mnemonic == ZYDIS_MNEMONIC_VZEROUPPER && n->kind == NATIVE_AVX && __builtin_cpu_supports("avx")) {
        i->native = n;
        return true;
    }
    if (!n || n->special || n->uses_fx || (insn->has_mem && !n->mem_size) || (insn->has_mem && n->mem_size > 64))
        return false;
    if (insn->has_mem && n->mem_size & (n->mem_size - 1))
        return false;
    switch (insn->mnemonic) {
    case ZYDIS_MNEMONIC_VP2INTERSECTD: case ZYDIS_MNEMONIC_VP2INTERSECTQ:
    case ZYDIS_MNEMONIC_LDMXCSR: case ZYDIS_MNEMONIC_STMXCSR: case ZYDIS_MNEMONIC_VLDMXCSR: case ZYDIS_MNEMONIC_VSTMXCSR:
        return false;
    }
    for (unsigned k = 0; k < insn->operands; k++) {
        const struct x86_operand *o = &insn->operand[k];

        /* EVEX's vvvv and the registers of an immediate byte are not renamed. */
        if (o->kind == OPERAND_GPR && unit_host_of[o->reg] != o->reg &&
            (o->implicit ||
             (o->encoding != ZYDIS_OPERAND_ENCODING_MODRM_REG && o->encoding != ZYDIS_OPERAND_ENCODING_MODRM_RM &&
              (o->encoding != ZYDIS_OPERAND_ENCODING_NDSNDD || insn->has_evex))))
            return false;
    }
    /* A mask that suppresses faults does not matter where the whole operand can be accessed; elsewhere the interpreter heeds it. */
    i->native = n;
    return true;
}

/* DIV and IDIV of 32 and 64 bits: behind a test that they do not raise. */
static bool divides(const struct unit_insn *i)
{
    const struct x86_insn *insn = &i->insn;

    return (insn->mnemonic == ZYDIS_MNEMONIC_DIV || insn->mnemonic == ZYDIS_MNEMONIC_IDIV) && insn->op_size >= 4 &&
           addressable(i);
}

/* MOVS and STOS through ES and DS, with 64-bit addresses. */
static bool is_plain_string(const struct x86_insn *insn)
{
    return insn->category == ZYDIS_CATEGORY_STRINGOP && insn->addr_size == 8 && insn->mem.seg < SEG_FS && !insn->repne &&
           insn->operand[0].kind == OPERAND_MEM;
}

static enum translate_quick quick_of(const struct x86_insn *insn)
{
    switch (insn->mnemonic) {
    case ZYDIS_MNEMONIC_MOVSB: case ZYDIS_MNEMONIC_MOVSW: case ZYDIS_MNEMONIC_MOVSD: case ZYDIS_MNEMONIC_MOVSQ:
        return is_plain_string(insn) ? QUICK_MOVS : QUICK_NONE;
    case ZYDIS_MNEMONIC_STOSB: case ZYDIS_MNEMONIC_STOSW: case ZYDIS_MNEMONIC_STOSD: case ZYDIS_MNEMONIC_STOSQ:
        return is_plain_string(insn) ? QUICK_STOS : QUICK_NONE;
    case ZYDIS_MNEMONIC_RDTSC: return QUICK_RDTSC;
    case ZYDIS_MNEMONIC_RDTSCP: return QUICK_RDTSCP;
    case ZYDIS_MNEMONIC_CLI: return QUICK_CLI;
    case ZYDIS_MNEMONIC_STI: return QUICK_STI;
    case ZYDIS_MNEMONIC_STAC: return QUICK_STAC;
    case ZYDIS_MNEMONIC_CLAC: return QUICK_CLAC;
    case ZYDIS_MNEMONIC_SWAPGS: return QUICK_SWAPGS;
    default: return QUICK_NONE;
    }
}

bool unit_quick_serial(const struct x86_insn *insn)
{
    switch (quick_of(insn)) {
    case QUICK_STAC: case QUICK_CLAC: case QUICK_SWAPGS: return true;
    default: return false;
    }
}

void unit_classify(struct unit *x, struct unit_insn *i)
{
    const struct x86_insn *insn = &i->insn;
    const struct x86_operand *o = &insn->operand[0];

    i->form = FORM_OP;
    if (is_nop(insn)) {
        i->form = FORM_NOP;
    } else if (quick_of(insn)) {
        i->form = FORM_QUICK;
    } else if (insn->mnemonic == ZYDIS_MNEMONIC_MOV && insn->operand[1].kind == OPERAND_SEG) {
        if (o->kind == OPERAND_GPR && o->size >= 4)
            i->form = FORM_SELECTOR;
    } else if (insn->mnemonic == ZYDIS_MNEMONIC_PUSHFQ) {
        i->form = FORM_PUSHF;
    } else if (insn->mnemonic == ZYDIS_MNEMONIC_LEA) {
        if (insn->op_size >= 4 && addressable(i))
            i->form = FORM_LEA;
    } else if (insn->mnemonic == ZYDIS_MNEMONIC_PUSH) {
        if (insn->op_size == 8 && (o->kind == OPERAND_GPR || o->kind == OPERAND_IMM ||
                                   (o->kind == OPERAND_MEM && o->size == 8 && addressable(i))))
            i->form = FORM_PUSH;
    } else if (insn->mnemonic == ZYDIS_MNEMONIC_POP) {
        if (insn->op_size == 8 && o->kind == OPERAND_GPR)
            i->form = FORM_POP;
    } else if (insn->mnemonic == ZYDIS_MNEMONIC_LEAVE) {
        if (insn->op_size == 8)
            i->form = FORM_LEAVE;
    } else if (divides(i)) {
        i->form = FORM_DIVIDE;
    } else if (copyable(insn)) {
        if (!insn->has_vex && !insn->has_evex && addressable(i) && high_bytes_fit(insn) &&
            stand_ins(insn) <= (insn->has_mem ? 1u : 2u))
            i->form = FORM_COPY;
    } else if (addressable(i) && high_bytes_fit(insn) && stand_ins(insn) <= (insn->has_mem ? 1u : 2u) && vector_fits(x, i)) {
        i->form = FORM_VECTOR;
    }
}

/* ---- registers ---- */

/* Host registers for the fields of an instruction, and what is to be loaded and stored around it. */
struct renamed {
    unsigned reg, vvvv, rm;             /* H_NONE: as they are */
    unsigned guest[2], host[2];         /* stand-ins */
    bool write[2];
    unsigned count;
};

static unsigned rename_register(struct unit *x, unsigned k, const struct x86_operand *o, struct asm_address *m, struct renamed *r)
{
    unsigned host = unit_host_of[o->reg], taken = 0;

    if (host != H_NONE)
        return host;
    for (unsigned n = 0; n < r->count; n++) {
        if (r->guest[n] == o->reg) {
            r->write[n] |= o->write;
            return r->host[n];
        }
        taken |= 1u << r->host[n];
    }
    host = unit_scratch(x, k, m, taken);
    if (host == H_NONE) {
        x->failed = true;
        return T;
    }
    r->guest[r->count] = o->reg;
    r->host[r->count] = host;
    r->write[r->count++] = o->write;
    return host;
}

static void rename_operands(struct unit *x, unsigned k, struct asm_address *m, struct renamed *r)
{
    const struct x86_insn *insn = &x->insn[k].insn;

    *r = (struct renamed){ .reg = H_NONE, .vvvv = H_NONE, .rm = H_NONE };
    for (unsigned n = 0; n < insn->operands; n++) {
        const struct x86_operand *o = &insn->operand[n];

        if (o->kind != OPERAND_GPR)
            continue;
        switch (o->encoding) {
        case ZYDIS_OPERAND_ENCODING_MODRM_REG: r->reg = rename_register(x, k, o, m, r); break;
        case ZYDIS_OPERAND_ENCODING_NDSNDD: r->vvvv = rename_register(x, k, o, m, r); break;
        case ZYDIS_OPERAND_ENCODING_MODRM_RM:
        case ZYDIS_OPERAND_ENCODING_OPCODE: r->rm = rename_register(x, k, o, m, r); break;
        default: break;         /* implied: the same on the host */
        }
    }
    for (unsigned n = 0; n < r->count; n++)
        asm_load_gs(&x->a, r->host[n], gpr_offset(r->guest[n]));
}

static void store_back(struct unit *x, const struct renamed *r)
{
    for (unsigned n = 0; n < r->count; n++)
        if (r->write[n])
            asm_store_gs(&x->a, r->host[n], gpr_offset(r->guest[n]));
}

/* ---- flags ---- */

/* Putting flags aside and taking them back costs what this many checks cost to keep them. */
#define ASIDE_CHECKS 3

static void put_aside(struct unit *x)
{
    struct assembler *a = &x->a;

    asm_store_gs(a, H_RAX, T_GS(rax));
    asm_byte(a, 0x9f);                                          /* lahf */
    asm_byte(a, 0x0f), asm_byte(a, 0x90), asm_byte(a, 0xc0);    /* seto %al */
    asm_byte(a, 0x66), asm_gs(a, false, 0x89, H_RAX, T_GS(aside));
    asm_load_gs(a, H_RAX, T_GS(rax));
    x->lost = UNIT_ASIDE;
}

static void take_back(struct unit *x)
{
    struct assembler *a = &x->a;

    asm_store_gs(a, H_RAX, T_GS(rax));
    asm_gs(a, false, 0x0fb7, H_RAX, T_GS(aside));               /* movzwl */
    asm_byte(a, 0x04), asm_byte(a, 0x7f);                       /* add $0x7f, %al: overflows if it was 1 */
    asm_byte(a, 0x9e);                                          /* sahf */
    asm_load_gs(a, H_RAX, T_GS(rax));
}

bool unit_may_clobber(struct unit *x, unsigned k)
{
    const struct unit_insn *i = &x->insn[k];

    if (!i->live)
        return true;
    if (i->needs_flags || !x->t->options.redo)
        return false;
    if (x->lost < 0 && i->source < 0) {
        /* Who comes in in the middle has put nothing aside. */
        if (i->checks_ahead < ASIDE_CHECKS || x->entered_anywhere)
            return false;
        put_aside(x);
    }
    if (x->lost < 0)
        x->lost = i->source;
    return true;
}

void unit_flags_of(struct unit *x, int source)
{
    const struct x86_insn *insn;
    const struct x86_operand *d, *s;
    struct assembler *a = &x->a;
    unsigned to, from;
    bool w, adds;
    struct renamed r;

    if (source == UNIT_ASIDE) {
        take_back(x);
        return;
    }
    insn = &x->insn[source].insn;
    d = &insn->operand[0], s = &insn->operand[1];
    to = unit_host_of[d->reg], from = s->kind == OPERAND_GPR ? unit_host_of[s->reg] : H_NONE;
    w = d->size == 8, adds = insn->mnemonic == ZYDIS_MNEMONIC_ADD;
    switch (insn->mnemonic) {
    case ZYDIS_MNEMONIC_ADD: case ZYDIS_MNEMONIC_SUB:           /* back, and again */
        for (unsigned n = 0; n < 2; n++, adds = !adds)
            if (from == H_NONE)
                asm_alu_imm(a, w, adds ? ALU_DIGIT_SUB : ALU_DIGIT_ADD, to, (int32_t)insn->imm[s->reg]);
            else
                asm_rr(a, w, adds ? 0x29 : 0x01, from, to);
        break;
    case ZYDIS_MNEMONIC_AND: case ZYDIS_MNEMONIC_OR: case ZYDIS_MNEMONIC_XOR:   /* the flags of the result */
        if (d->size == 2)
            asm_byte(a, 0x66);
        asm_rex(a, w, to, 0, to, d->size == 1);
        asm_byte(a, d->size == 1 ? 0x84 : 0x85);                                /* test */
        asm_byte(a, 0xc0 | (to & 7) << 3 | (to & 7));
        break;
    default:                                                    /* CMP, TEST */
        rename_operands(x, (unsigned)source, NULL, &r);
        unit_copy(x, insn, r.reg, r.rm, NULL);
        break;
    }
}

void unit_flags(struct unit *x)
{
    if (x->lost >= 0)
        unit_flags_of(x, x->lost);
    x->lost = -1;
}

/* ---- instructions ---- */

static void emit_copy(struct unit *x, unsigned k)
{
    const struct unit_insn *i = &x->insn[k];
    struct asm_address m, *at = NULL;
    struct renamed r;
    unsigned high = high_byte(&i->insn);

    if (i->accesses) {
        m = unit_place(x, k, 0, false);
        at = &m;
    }
    if (high != X86_NO_REG) {
        if (m.base == unit_host_of[high] || m.index == unit_host_of[high]) {
            asm_lea(&x->a, T, m.base, m.index, m.shift, m.disp);
            m = (struct asm_address){ T, H_NONE, 0, 0 };
        }
        asm_rorx(&x->a, unit_host_of[high], unit_host_of[high], 8);
        unit_copy(x, &i->insn, high, H_NONE, at);
        asm_rorx(&x->a, unit_host_of[high], unit_host_of[high], 56);
        return;
    }
    rename_operands(x, k, at, &r);
    unit_copy(x, &i->insn, r.reg, r.rm, at);
    store_back(x, &r);
}

void unit_vectors(struct unit *x, bool vectors, bool components, bool dead)
{
    struct assembler *a = &x->a;

    if (vectors && !x->vectors_ready) {
        uint8_t *there, *load;

        /* The routine keeps all registers and flags. */
        if (!dead) {
            unit_save_rcx(x);
            asm_gs(a, false, 0x0fb6, H_RCX, T_GS(vectors_loaded));
            asm_lea(a, H_RCX, H_RCX, H_NONE, 0, -1);
            there = asm_jrcxz(a);
            load = asm_call(a);
            asm_set_short(there, a->at);
            unit_restore_rcx(x);
        } else {
            asm_gs_imm8(a, 0x80, ALU_DIGIT_CMP, T_GS(vectors_loaded), 0);
            there = a->at + 1;
            asm_byte(a, 0x75), asm_byte(a, 0);  /* jne */
            load = asm_call(a);
            asm_set_short(there, a->at);
        }
        if (!a->full)
            asm_set_target(load, x->t->vectors_load);
        x->vectors_ready = true;
    }
    if (components && !x->vectors_noted) {
        /* movq $…, xinuse_hint */
        asm_gs(a, true, 0xc7, 0, CPU_GS(s.fpu.xinuse_hint));
        asm_u32(a, (uint32_t)(x->t->it.cpu.s.xcr0 | 3));
        x->vectors_noted = true;
    }
}

static void emit_vector(struct unit *x, unsigned k)
{
    const struct unit_insn *i = &x->insn[k];
    bool vectors = i->native->kind != NATIVE_INTEGER;
    struct assembler *a = &x->a;
    struct asm_address m, *at = NULL;
    struct renamed r;

    unit_vectors(x, vectors, i->native->components != 0, vectors && !x->vectors_ready && unit_may_clobber(x, k));
    if (i->accesses) {
        m = unit_place(x, k, 0, false);
        at = &m;
    }
    rename_operands(x, k, at, &r);
    if (i->insn.mnemonic == ZYDIS_MNEMONIC_VZEROUPPER)
        asm_byte(a, 0xc5), asm_byte(a, 0xf8), asm_byte(a, 0x77);
    else if (i->insn.has_vex || i->insn.has_evex)
        unit_copy_vex(x, &i->insn, r.reg, r.vvvv, r.rm, at);
    else
        unit_copy(x, &i->insn, r.reg, r.rm, at);
    store_back(x, &r);
}

static void emit_lea(struct unit *x, unsigned k)
{
    const struct x86_insn *insn = &x->insn[k].insn;
    const struct x86_operand *d = &insn->operand[0];
    struct assembler *a = &x->a;
    unsigned host = unit_host_of[d->reg], to = host == H_NONE ? T : host, b = H_NONE, i = H_NONE;
    int64_t disp = insn->mem.disp;
    unsigned shift = insn->mem.scale ? (unsigned)__builtin_ctz(insn->mem.scale) : 0;

    if (insn->mem.base == X86_REG_RIP) {
        asm_load_gs(a, T, CPU_GS(code_page));
        b = T;
        disp += x->insn[k].offset + insn->length;
    } else if (insn->mem.base < 16) {
        b = unit_host_of[insn->mem.base];
        if (b == H_NONE) {
            asm_load_gs(a, T, gpr_offset(insn->mem.base));
            b = T;
        }
    }
    if (insn->mem.index < 16) {
        i = unit_host_of[insn->mem.index];
        if (i == H_NONE) {
            i = b == T ? A : T;
            if (i == A)
                unit_take_a(x, k);
            asm_load_gs(a, i, gpr_offset(insn->mem.index));
        }
    }
    asm_mem(a, d->size == 8, 0x8d, to, b, i, shift, (int32_t)disp);
    if (host == H_NONE)
        asm_store_gs(a, T, gpr_offset(d->reg));
}

static void emit_selector(struct unit *x, unsigned k)
{
    const struct x86_operand *o = x->insn[k].insn.operand;
    unsigned host = unit_host_of[o[0].reg], to = host == H_NONE ? T : host;

    asm_gs(&x->a, false, 0x0fb7, to, CPU_GS(s.seg[0].selector) + o[1].reg * sizeof(struct x86_seg));     /* movzwl */
    if (host == H_NONE)
        asm_store_gs(&x->a, T, gpr_offset(o[0].reg));
}

/* translator.value onto the stack; by access n. */
static void push_value(struct unit *x, unsigned k, unsigned n)
{
    struct asm_address m = unit_place(x, k, n, false);

    asm_load_gs(&x->a, T, T_GS(value));
    asm_mem(&x->a, true, 0x89, T, m.base, m.index, m.shift, m.disp);
    asm_lea(&x->a, H_R15, H_R15, H_NONE, 0, -8);
}

static void emit_pushf(struct unit *x, unsigned k)
{
    /* The interpreter would do all of it, the push too. */
    if (TRANSLATE_SANITIZED) {
        unit_op(x, k);
        return;
    }
    unit_quick(x, k, QUICK_PUSHF);
    push_value(x, k, 0);
}

static void emit_push(struct unit *x, unsigned k)
{
    const struct x86_insn *insn = &x->insn[k].insn;
    const struct x86_operand *o = &insn->operand[0];
    struct assembler *a = &x->a;
    struct asm_address m = unit_place(x, k, 0, false);

    if (o->kind == OPERAND_MEM) {
        asm_mem(a, true, 0x8b, T, m.base, m.index, m.shift, m.disp);
        asm_store_gs(a, T, T_GS(value));
        push_value(x, k, 1);
        return;
    }
    if (o->kind == OPERAND_IMM) {
        asm_rex(a, true, 0, m.index == H_NONE ? 0 : m.index, m.base, false);
        asm_byte(a, 0xc7);
        asm_modrm(a, 0, &m, false);
        asm_u32(a, (uint32_t)insn->imm[o->reg]);
    } else {
        unsigned host = unit_host_of[o->reg];

        if (host == H_NONE) {
            host = unit_scratch(x, k, &m, 0);
            asm_load_gs(a, host, gpr_offset(o->reg));
        }
        asm_mem(a, true, 0x89, host, m.base, m.index, m.shift, m.disp);
    }
    asm_lea(a, H_R15, H_R15, H_NONE, 0, -8);
}

static void emit_pop(struct unit *x, unsigned k)
{
    const struct x86_operand *o = &x->insn[k].insn.operand[0];
    struct assembler *a = &x->a;
    struct asm_address m = unit_place(x, k, 0, false);
    unsigned host = unit_host_of[o->reg];

    asm_mem(a, true, 0x8b, host == H_NONE ? T : host, m.base, m.index, m.shift, m.disp);
    if (host == H_NONE)
        asm_store_gs(a, T, gpr_offset(o->reg));
    if (o->reg != RSP)          /* which then holds what it has loaded */
        asm_lea(a, H_R15, H_R15, H_NONE, 0, 8);
}

static void emit_leave(struct unit *x, unsigned k)
{
    struct assembler *a = &x->a;
    struct asm_address m = unit_place(x, k, 0, false);

    asm_lea(a, H_R15, H_RBP, H_NONE, 0, 8);
    asm_mem(a, true, 0x8b, H_RBP, m.base, m.index, m.shift, m.disp);
}

/*
 * The divisor comes into T, and what would raise #DE goes to the interpreter. The tests change flags, which DIV may leave as
 * they were: where they are live they are put aside on the return stack.
 */
static void emit_divide(struct unit *x, unsigned k)
{
    const struct unit_insn *i = &x->insn[k];
    const struct x86_insn *insn = &i->insn;
    const struct x86_operand *o = &insn->operand[0];
    struct assembler *a = &x->a;
    struct translate_site *site;
    struct stub *s;
    bool w = insn->op_size == 8, is_signed = insn->mnemonic == ZYDIS_MNEMONIC_IDIV;
    uint8_t *bad[2];
    unsigned host, count = 0;

    if (o->kind == OPERAND_MEM) {
        struct asm_address m = unit_place(x, k, 0, false);

        asm_mem(a, w, 0x8b, T, m.base, m.index, m.shift, m.disp);
        host = T;
    } else {
        host = unit_host_of[o->reg];
        if (host == H_NONE) {
            asm_load_gs(a, T, gpr_offset(o->reg));
            host = T;
        }
    }
    if (i->live)
        asm_byte(a, 0x9c);                              /* pushf */
    if (is_signed) {
        unit_take_a(x, k);
        asm_mem(a, w, 0x8d, A, host, H_NONE, 0, 1);     /* 0 and -1 become 1 and 0 */
        asm_alu_imm(a, w, ALU_DIGIT_CMP, A, 1);
        bad[count++] = asm_jcc(a, 6);
        asm_rr(a, w, 0x89, H_RAX, A);
        asm_rex(a, w, 0, 0, A, false);
        asm_byte(a, 0xc1), asm_byte(a, 0xf8 | (A & 7)), asm_byte(a, w ? 63 : 31);       /* sar */
        asm_rr(a, w, 0x39, A, H_RDX);
        bad[count++] = asm_jcc(a, 5);
    } else {
        asm_rr(a, w, 0x39, host, H_RDX);                /* the quotient fits only if the upper half is less */
        bad[count++] = asm_jcc(a, 3);
    }
    if (i->live)
        asm_byte(a, 0x9d);                              /* popf */
    asm_rex(a, w, 0, 0, host, false);
    asm_byte(a, 0xf7), asm_byte(a, 0xc0 | (is_signed ? 7u : 6u) << 3 | (host & 7));
    site = unit_site(x, k);
    site->next = x->sites;
    x->sites = site;
    for (unsigned n = 0; n < count; n++) {
        s = unit_stub(x, STUB_RUN, bad[n]);
        if (s) {
            s->site = site;
            s->restore_flags = i->live != 0;
        }
    }
}

void unit_insn(struct unit *x, unsigned k)
{
    switch (x->insn[k].form) {
    case FORM_NOP: break;
    case FORM_COPY: emit_copy(x, k); break;
    case FORM_VECTOR: emit_vector(x, k); break;
    case FORM_LEA: emit_lea(x, k); break;
    case FORM_SELECTOR: emit_selector(x, k); break;
    case FORM_PUSH: emit_push(x, k); break;
    case FORM_POP: emit_pop(x, k); break;
    case FORM_LEAVE: emit_leave(x, k); break;
    case FORM_DIVIDE: emit_divide(x, k); break;
    case FORM_QUICK: unit_quick(x, k, quick_of(&x->insn[k].insn)); break;
    case FORM_PUSHF: emit_pushf(x, k); break;
    default: unit_op(x, k); break;
    }
}
