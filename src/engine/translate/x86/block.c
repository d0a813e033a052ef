/*
 * From a block of x86-64 guest code to host code.
 *
 * Instructions on registers are copied with their registers renamed; a memory operand becomes a check of
 * the soft TLB and an access through the host pointer. What has no form here is run by its interpreter op, which
 * also is the slow path of every access: a check that misses runs the whole instruction there.
 *
 * Checks leave EFLAGS alone (PEXT, LEA, JRCXZ), so flags are exact everywhere, also in the frame of a page fault.
 */
#include <stdlib.h>

#include "engine/translate/x86/translation.h"

void translate_add_stub(struct translation *x, enum stub_kind kind, uint8_t *jump, uint8_t *back, const struct op *op,
                        uint64_t target)
{
    if (x->stubs == MAX_STUBS) {
        x->failed = true;
        return;
    }
    x->stub[x->stubs++] = (struct stub){ .jump = jump, .back = back, .kind = kind, .op = op, .target = target };
}

/* ---- pieces ---- */

bool translate_address(struct translation *x, const struct x86_insn *insn, uint64_t next)
{
    const struct x86_mem *m = &insn->mem;
    struct assembler *a = &x->a;
    unsigned base = H_NONE, index = H_NONE;

    int64_t relative = m->disp + (int64_t)next;

    if (m->addr_size != 8 || m->vsib_size || m->disp != (int32_t)m->disp)
        return false;
    if (m->base == X86_REG_RIP && relative != (int32_t)relative)
        return false;
    if (m->base == X86_REG_RIP) {
        asm_load_gs(a, T, CPU_GS(code_page));
        asm_lea(a, T, T, H_NONE, 0, (int32_t)relative);
    } else {
        if (m->base < 16) {
            base = translate_host_of[m->base];
            if (base == H_NONE) {
                asm_load_gs(a, T, gpr_offset(m->base));
                base = T;
            }
        }
        if (m->index < 16) {
            index = translate_host_of[m->index];
            if (index == H_NONE) {
                asm_load_gs(a, A, gpr_offset(m->index));
                index = A;
            }
        }
        if (base == H_NONE && index == H_NONE)
            asm_mov_imm(a, T, (uint64_t)m->disp);
        else
            asm_lea(a, T, base, index, m->scale ? (unsigned)__builtin_ctz(m->scale) : 0, (int32_t)m->disp);
    }
    if (m->seg >= SEG_FS) {
        asm_load_gs(a, A, CPU_GS(s.seg[0].base) + m->seg * sizeof(struct x86_seg));
        asm_lea(a, T, T, A, 0, 0);
    }
    return true;
}

uint8_t *translate_check(struct translation *x, unsigned size, enum tlb_kind kind, bool aligned)
{
    struct assembler *a = &x->a;
    uint8_t *hit, *miss;

    asm_pext_gs(a, A, T, T_GS(tlb_mask));
    asm_load_gs(a, S, CPU_GS(tlb));
    asm_lea(a, A, H_NONE, A, 2, 0);
    asm_lea(a, A, S, A, 3, 0);
    asm_mem(a, true, 0x8b, S, A, H_NONE, 0, (int32_t)(offsetof(struct tlb_entry, tag) + kind * 8));
    /* The offset's last byte inside the page: no bit from 12 on. Aligned operands cannot cross; low bits must be 0. */
    asm_lea(a, S, S, T, 0, aligned ? 0 : (int32_t)size - 1);
    asm_pext_gs(a, S, S, aligned ? T_GS(aligned_mask) + (unsigned)__builtin_ctz(size) * 8 : T_GS(page_mask));
    hit = asm_jrcxz(a);
    miss = asm_jmp(a);
    asm_set_short(hit, a->at);
    asm_mem(a, true, 0x8b, A, A, H_NONE, 0, offsetof(struct tlb_entry, addend));
    asm_lea(a, T, T, A, 0, 0);
    return miss;
}

/* Runs the instruction in the interpreter, in line. */
static void emit_op(struct translation *x, const struct op *op)
{
    const struct op *single = translate_single(x->t, op, x->b);
    uint8_t *call;

    x->vectors_noted = false;
    asm_mov_imm(&x->a, A, (uint64_t)(uintptr_t)single);
    call = asm_call(&x->a);
    if (!x->a.full)
        asm_set_target(call, x->t->slow);
}

static void emit_count(struct translation *x, unsigned insns, unsigned scratch)
{
    asm_load_gs(&x->a, scratch, CPU_GS(insns));
    asm_lea(&x->a, scratch, scratch, H_NONE, 0, (int32_t)insns);
    asm_store_gs(&x->a, scratch, CPU_GS(insns));
}

/* ---- copied instructions ---- */

/* The instruction's bytes with other registers: reg for ModRM.reg, rm for ModRM.rm or the opcode's register, or [T] for memory. */
static void emit_copy(struct translation *x, const struct x86_insn *insn, unsigned reg, unsigned rm)
{
    struct assembler *a = &x->a;
    unsigned opcode_at = insn->has_rex ? insn->rex_offset + 1u : insn->prefix_count;
    unsigned end = insn->modrm_offset ? insn->modrm_offset : insn->length - insn->imm_size;
    bool w = insn->has_rex && insn->bytes[insn->rex_offset] & 8;
    bool opcode_reg = !insn->modrm_offset && rm != H_NONE;

    for (unsigned i = 0; i < insn->prefix_count; i++) {
        uint8_t b = insn->bytes[i];

        if (b == 0x66 || b == 0xf2 || b == 0xf3)
            asm_byte(a, b);
    }
    if (insn->has_mem)
        rm = T;
    asm_rex(a, w, reg == H_NONE ? 0 : reg, 0, rm == H_NONE ? 0 : rm, insn->has_rex);
    for (unsigned i = opcode_at; i < end; i++)
        asm_byte(a, opcode_reg && i == end - 1 ? (insn->bytes[i] & ~7u) | (rm & 7) : insn->bytes[i]);
    if (insn->modrm_offset) {
        unsigned modrm = insn->bytes[insn->modrm_offset];

        if (reg != H_NONE)
            modrm = (modrm & ~0x38u) | (reg & 7) << 3;
        if (insn->has_mem)
            modrm = (modrm & 0x38) | (T & 7);
        else if (rm != H_NONE)
            modrm = (modrm & ~7u) | (rm & 7);
        asm_byte(a, modrm);
    }
    asm_bytes(a, insn->bytes + insn->length - insn->imm_size, insn->imm_size);
}

/* Instructions that can be copied: explicit registers, one memory operand, immediates, and implied RAX, RCX, RDX. */
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
#define CASE(cc) case ZYDIS_MNEMONIC_SET##cc: case ZYDIS_MNEMONIC_CMOV##cc:
    CASE(O) CASE(NO) CASE(B) CASE(NB) CASE(Z) CASE(NZ) CASE(BE) CASE(NBE) CASE(S) CASE(NS) CASE(P) CASE(NP) CASE(L)
    CASE(NL) CASE(LE) CASE(NLE)
#undef CASE
        return !insn->lock;
    case ZYDIS_MNEMONIC_MOV:    /* not to or from segment, control and debug registers */
        for (unsigned i = 0; i < insn->visible; i++)
            if (insn->operand[i].kind != OPERAND_GPR && insn->operand[i].kind != OPERAND_GPR8H &&
                insn->operand[i].kind != OPERAND_MEM && insn->operand[i].kind != OPERAND_IMM)
                return false;
        return true;
    case ZYDIS_MNEMONIC_XCHG:
        return !insn->has_mem;
    case ZYDIS_MNEMONIC_BT: case ZYDIS_MNEMONIC_BTS: case ZYDIS_MNEMONIC_BTR: case ZYDIS_MNEMONIC_BTC:
        /* A bit offset in a register reaches beyond a memory operand. */
        return !insn->lock && (!insn->has_mem || insn->operand[1].kind == OPERAND_IMM);
    default:
        return false;
    }
}

/* A register operand: its host register, or a scratch register that stands for it. */
struct renamed {
    unsigned host;
    int guest;                  /* guest register to load and store around, or -1 */
    bool write;
};

static bool rename_operand(const struct x86_operand *o, unsigned *free_scratch, struct renamed *r)
{
    r->host = translate_host_of[o->reg];
    r->guest = -1;
    r->write = o->write;
    if (r->host != H_NONE)
        return true;
    if (*free_scratch == H_NONE)
        return false;
    r->host = *free_scratch;
    *free_scratch = *free_scratch == A ? T : H_NONE;
    r->guest = o->reg;
    return true;
}

/* Copies one instruction. False: nothing was emitted, the interpreter has to run it. */
static bool emit_copied(struct translation *x, const struct x86_insn *insn, const struct op *op)
{
    struct renamed reg = { H_NONE, -1, false }, rm = { H_NONE, -1, false };
    unsigned scratch = A;       /* with memory T is taken */
    const struct x86_operand *mem = NULL;
    bool high = false, by_cl = false;
    uint8_t *miss = NULL, *start = x->a.at;

    if (!copyable(insn) || insn->has_vex || insn->has_evex || (insn->has_mem && !insn->modrm_offset))
        return false;
    for (unsigned i = 0; i < insn->visible; i++) {
        const struct x86_operand *o = &insn->operand[i];

        high |= o->kind == OPERAND_GPR8H;
        if (o->kind == OPERAND_MEM)
            mem = o;
    }
    for (unsigned i = 0; i < insn->visible; i++) {
        const struct x86_operand *o = &insn->operand[i];
        struct renamed *r, *other;

        if (o->kind != OPERAND_GPR && o->kind != OPERAND_GPR8H)
            continue;
        if (o->kind == OPERAND_GPR8H) {
            /* AH and its like have no encoding beside a REX prefix, and CH is not in a register that has one. */
            if (mem || o->reg == RCX)
                return false;
            if (o->encoding == ZYDIS_OPERAND_ENCODING_MODRM_REG)
                reg.host = 4 + o->reg;
            else
                rm.host = 4 + o->reg;
            continue;
        }
        r = o->encoding == ZYDIS_OPERAND_ENCODING_MODRM_REG ? &reg
            : o->encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM || o->encoding == ZYDIS_OPERAND_ENCODING_OPCODE ? &rm : NULL;
        if (!r) {
            by_cl |= o->reg == RCX;
            continue;           /* an implied accumulator: the same on the host */
        }
        other = r == &reg ? &rm : &reg;
        if (other->guest == o->reg) {
            *r = *other;        /* the same displaced register twice: one stand-in */
            other->write = r->write |= o->write;
            r->guest = -1;
        } else if (!rename_operand(o, &scratch, r)) {
            return false;
        }
        if (mem && scratch == T)
            scratch = H_NONE;
    }
    if (high && ((reg.host != H_NONE && reg.host >= 8) || (rm.host != H_NONE && rm.host >= 8)))
        return false;
    /* SPL, BPL, SIL, DIL need a REX prefix that the original has; R8B… bring theirs. */

    if (mem && mem->size) {
        if (mem->size > 8 || !translate_address(x, insn, op->rip + op->len)) {
            x->a.at = start;
            return false;
        }
        miss = translate_check(x, mem->size, mem->write ? TLB_WRITE : TLB_READ, false);
    }
    if (reg.guest >= 0)
        asm_load_gs(&x->a, reg.host, gpr_offset((unsigned)reg.guest));
    if (rm.guest >= 0)
        asm_load_gs(&x->a, rm.host, gpr_offset((unsigned)rm.guest));
    if (by_cl)
        asm_rr(&x->a, false, 0x89, translate_host_of[RCX], H_RCX);
    emit_copy(x, insn, reg.host, rm.host);
    if (reg.guest >= 0 && reg.write)
        asm_store_gs(&x->a, reg.host, gpr_offset((unsigned)reg.guest));
    if (rm.guest >= 0 && rm.write)
        asm_store_gs(&x->a, rm.host, gpr_offset((unsigned)rm.guest));
    if (miss)
        translate_add_stub(x, STUB_OP, miss, x->a.at, op, 0);
    return true;
}

static bool emit_lea(struct translation *x, const struct x86_insn *insn, const struct op *op)
{
    const struct x86_operand *d = &insn->operand[0];
    struct x86_insn flat = *insn;
    unsigned host = translate_host_of[d->reg];

    if (d->size < 4)
        return false;
    flat.mem.seg = SEG_DS;
    if (!translate_address(x, &flat, op->rip + op->len))
        return false;
    if (host == H_NONE) {
        if (d->size == 4)
            asm_rr(&x->a, false, 0x89, T, T);
        asm_store_gs(&x->a, T, gpr_offset(d->reg));
    } else {
        asm_rr(&x->a, d->size == 8, 0x89, T, host);
    }
    return true;
}

/* ---- stack ---- */

static bool emit_push(struct translation *x, const struct x86_insn *insn, const struct op *op)
{
    const struct x86_operand *o = &insn->operand[0];
    struct assembler *a = &x->a;
    uint8_t *miss;
    unsigned host;

    if (insn->op_size != 8 || (o->kind != OPERAND_GPR && o->kind != OPERAND_IMM))
        return false;
    asm_lea(a, T, H_R15, H_NONE, 0, -8);
    miss = translate_check(x, 8, TLB_WRITE, false);
    if (o->kind == OPERAND_IMM) {
        asm_rex(a, true, 0, 0, T, false);
        asm_byte(a, 0xc7);
        asm_byte(a, T & 7);
        asm_u32(a, (uint32_t)insn->imm[o->reg]);
    } else {
        host = translate_host_of[o->reg];
        if (host == H_NONE) {
            asm_load_gs(a, A, gpr_offset(o->reg));
            host = A;
        }
        asm_mem(a, true, 0x89, host, T, H_NONE, 0, 0);
    }
    asm_lea(a, H_R15, H_R15, H_NONE, 0, -8);
    translate_add_stub(x, STUB_OP, miss, a->at, op, 0);
    return true;
}

static bool emit_pop(struct translation *x, const struct x86_insn *insn, const struct op *op)
{
    const struct x86_operand *o = &insn->operand[0];
    struct assembler *a = &x->a;
    uint8_t *miss;

    if (insn->op_size != 8 || o->kind != OPERAND_GPR)
        return false;
    asm_mov(a, T, H_R15);
    miss = translate_check(x, 8, TLB_READ, false);
    asm_lea(a, H_R15, H_R15, H_NONE, 0, 8);
    if (translate_host_of[o->reg] == H_NONE) {
        asm_mem(a, true, 0x8b, A, T, H_NONE, 0, 0);
        asm_store_gs(a, A, gpr_offset(o->reg));
    } else {
        asm_mem(a, true, 0x8b, translate_host_of[o->reg], T, H_NONE, 0, 0);
    }
    translate_add_stub(x, STUB_OP, miss, a->at, op, 0);
    return true;
}

static bool emit_leave(struct translation *x, const struct x86_insn *insn, const struct op *op)
{
    struct assembler *a = &x->a;
    uint8_t *miss;

    if (insn->op_size != 8)
        return false;
    asm_mov(a, T, H_RBP);
    miss = translate_check(x, 8, TLB_READ, false);
    asm_lea(a, H_R15, H_RBP, H_NONE, 0, 8);
    asm_mem(a, true, 0x8b, H_RBP, T, H_NONE, 0, 0);
    translate_add_stub(x, STUB_OP, miss, a->at, op, 0);
    return true;
}

/* ---- the end of a block ---- */

/* Jumps where request is not 0. */
static uint8_t *emit_request_check(struct translation *x)
{
    struct assembler *a = &x->a;
    uint8_t *none, *pending;

    asm_gs(a, false, 0x8b, S, CPU_GS(request));
    none = asm_jrcxz(a);
    pending = asm_jmp(a);
    asm_set_short(none, a->at);
    return pending;
}

/* T: guest target, kept. A := its code; returns the jump for when it is not in the table. */
static uint8_t *emit_table(struct translation *x)
{
    struct assembler *a = &x->a;
    uint8_t *hit, *miss;

    asm_pext_gs(a, A, T, T_GS(jump_mask));
    asm_load_gs(a, S, T_GS(jumps_now));
    asm_lea(a, A, S, A, 3, 0);
    asm_mem(a, true, 0x8b, S, A, H_NONE, 0, 0);
    asm_lea(a, S, S, T, 0, 0);
    hit = asm_jrcxz(a);
    miss = asm_jmp(a);
    asm_set_short(hit, a->at);
    asm_mem(a, true, 0x8b, A, A, H_NONE, 0, offsetof(struct jump_table, code));
    return miss;
}

static void emit_jump_a(struct translation *x)
{
    asm_rex(&x->a, false, 0, 0, A, false);
    asm_byte(&x->a, 0xff);
    asm_byte(&x->a, 0xe0 | (A & 7));
}

/*
 * To a fixed target, everything else being done. Inside the page it becomes a jump once the target is translated; what
 * another page holds depends on mappings, so it is looked up. Backward jumps and those to other pages look for
 * requests: no loop goes without.
 */
static void emit_goto(struct translation *x, const struct op *op, uint64_t target)
{
    struct assembler *a = &x->a;
    bool near = target < GUEST_PAGE_SIZE;

    if (!near || target <= op->rip)
        translate_add_stub(x, STUB_AT, emit_request_check(x), NULL, op, target);
    if (near) {
        translate_add_stub(x, STUB_CHAIN, asm_jmp(a), NULL, op, target);
        return;
    }
    asm_load_gs(a, T, CPU_GS(code_page));
    asm_lea(a, T, T, H_NONE, 0, (int32_t)target);
    translate_add_stub(x, STUB_CHAIN, emit_table(x), NULL, op, target);
    emit_jump_a(x);
}

/* T: guest target, kept. Finds its code (in A afterwards) or gives the op to the interpreter, nothing having changed. */
static void emit_lookup(struct translation *x, const struct op *op)
{
    translate_add_stub(x, STUB_EXIT_OP, emit_request_check(x), NULL, op, 0);
    translate_add_stub(x, STUB_EXIT_OP, emit_table(x), NULL, op, 0);
}

static bool emit_return(struct translation *x, const struct x86_insn *insn, const struct op *op)
{
    struct assembler *a = &x->a;

    if (op->fn != op_ret)
        return false;
    asm_mov(a, T, H_R15);
    translate_add_stub(x, STUB_EXIT_OP, translate_check(x, 8, TLB_READ, false), NULL, op, 0);
    asm_mem(a, true, 0x8b, T, T, H_NONE, 0, 0);
    emit_lookup(x, op);
    asm_lea(a, H_R15, H_R15, H_NONE, 0, (int32_t)(8 + op->imm));
    emit_count(x, op->n + 1u, S);
    emit_jump_a(x);
    return true;
}

/* T := what the indirect branch's operand holds. */
static bool emit_branch_operand(struct translation *x, const struct x86_insn *insn, const struct op *op)
{
    const struct x86_operand *o = &insn->operand[0];

    if (o->kind == OPERAND_GPR) {
        if (translate_host_of[o->reg] == H_NONE)
            asm_load_gs(&x->a, T, gpr_offset(o->reg));
        else
            asm_mov(&x->a, T, translate_host_of[o->reg]);
        return true;
    }
    if (!translate_address(x, insn, op->rip + op->len))
        return false;
    translate_add_stub(x, STUB_EXIT_OP, translate_check(x, 8, TLB_READ, false), NULL, op, 0);
    asm_mem(&x->a, true, 0x8b, T, T, H_NONE, 0, 0);
    return true;
}

/* The return address onto the stack; RSP moves. saved: what A holds is needed afterwards. */
static void emit_push_return(struct translation *x, const struct op *op, bool saved)
{
    struct assembler *a = &x->a;

    if (saved) {
        asm_store_gs(a, A, T_GS(saved_code));
        asm_store_gs(a, T, T_GS(saved_target));
    }
    asm_lea(a, T, H_R15, H_NONE, 0, -8);
    translate_add_stub(x, STUB_EXIT_OP, translate_check(x, 8, TLB_WRITE, false), NULL, op, 0);
    asm_load_gs(a, A, CPU_GS(code_page));
    asm_lea(a, A, A, H_NONE, 0, (int32_t)(op->rip + op->len));
    asm_mem(a, true, 0x89, A, T, H_NONE, 0, 0);
    asm_lea(a, H_R15, H_R15, H_NONE, 0, -8);
    if (saved) {
        asm_load_gs(a, A, T_GS(saved_code));
        asm_load_gs(a, T, T_GS(saved_target));
    }
}

static bool emit_indirect(struct translation *x, const struct x86_insn *insn, const struct op *op, bool call)
{
    if (insn->op_size != 8 || !emit_branch_operand(x, insn, op))
        return false;
    emit_lookup(x, op);
    if (call)
        emit_push_return(x, op, true);
    emit_count(x, op->n + 1u, S);
    emit_jump_a(x);
    return true;
}

/* Condition code of a Jcc's op, or -1. */
static int condition_of(const struct op *op)
{
    for (int cc = 0; cc < 16; cc++)
        if (op->fn == jcc_handlers[cc])
            return cc;
    return -1;
}

/* The block's last op. */
static void emit_end(struct translation *x, const struct x86_insn *insn, const struct op *op)
{
    struct assembler *a = &x->a;
    uint8_t *start = a->at;
    unsigned stubs = x->stubs;
    int cc = condition_of(op);

    if (op->fn == op_end) {
        emit_count(x, op->n, T);
        emit_goto(x, op, op->imm);
        return;
    }
    if (cc >= 0) {
        uint8_t *other;

        emit_count(x, op->n + 1u, T);
        other = asm_jcc(a, (unsigned)cc ^ 1);
        emit_goto(x, op, op->imm);
        if (!a->full)
            asm_set_target(other, a->at);
        emit_goto(x, op, op->rip + op->len);
        return;
    }
    if (op->fn == op_jmp) {
        emit_count(x, op->n + 1u, T);
        emit_goto(x, op, op->imm);
        return;
    }
    if (op->fn == op_call) {
        emit_push_return(x, op, false);
        emit_count(x, op->n + 1u, T);
        emit_goto(x, op, op->imm);
        return;
    }
    if (insn && (insn->mnemonic == ZYDIS_MNEMONIC_RET ? emit_return(x, insn, op)
                 : op->fn == op_jump_slow || op->fn == op_call_slow || insn->category == ZYDIS_CATEGORY_SYSCALL ? false
                 : insn->mnemonic == ZYDIS_MNEMONIC_JMP && op->fn != op_semantics_end ? emit_indirect(x, insn, op, false)
                 : insn->mnemonic == ZYDIS_MNEMONIC_CALL && op->fn != op_semantics_end ? emit_indirect(x, insn, op, true)
                                                                                        : false))
        return;
    /* All else is the interpreter's, which goes on from there. */
    a->at = start;
    x->stubs = stubs;
    translate_add_stub(x, STUB_EXIT_OP, asm_jmp(a), NULL, op, 0);
}

/* s.rip := what lies offset bytes from the page's start. */
static void emit_rip(struct translation *x, uint64_t offset)
{
    asm_load_gs(&x->a, A, CPU_GS(code_page));
    asm_lea(&x->a, A, A, H_NONE, 0, (int32_t)offset);
    asm_store_gs(&x->a, A, CPU_GS(s.rip));
}

static void emit_stubs(struct translation *x)
{
    struct translator *t = x->t;
    struct assembler *a = &x->a;

    for (unsigned i = 0; i < x->stubs && !a->full; i++) {
        struct stub *s = &x->stub[i];

        asm_set_target(s->jump, a->at);
        switch (s->kind) {
        case STUB_OP:
            emit_op(x, s->op);
            asm_jmp_to(a, s->back);
            break;
        case STUB_EXIT_OP:
            asm_mov_imm(a, A, (uint64_t)(uintptr_t)s->op);
            asm_jmp_to(a, t->exit_op);
            break;
        case STUB_AT:
            emit_rip(x, s->target);
            asm_jmp_to(a, t->exit_null);
            break;
        case STUB_CHAIN: {
            struct chain *c = block_alloc(&t->it, sizeof(*c));

            *c = (struct chain){ .block = x->b, .jump = s->jump, .stub = a->at, .target = s->target, .next = x->b->chains };
            x->b->chains = c;
            asm_mov_imm(a, A, (uint64_t)(uintptr_t)c | 1);
            asm_jmp_to(a, t->exit_op);
            break;
        }
        }
    }
}

struct translation *translate_work_create(void) { return calloc(1, sizeof(struct translation)); }

bool translate_block(struct translator *t, struct block *b)
{
    struct translation *x = t->work;
    unsigned offset = 0;
    uint8_t *start = t->code.write + t->code.used, *entry;
    unsigned page_offset = (uintptr_t)b->host & (GUEST_PAGE_SIZE - 1);

    if (t->it.arena_size - t->it.arena_used < MAX_ARENA) {
        t->it.flush_wanted = true;
        return false;
    }
    if (b->mode != interp_mode(&t->it.cpu) || t->it.cpu.code_size != 8 || b->host2)
        return false;
    x->t = t;
    x->b = b;
    x->stubs = 0;
    x->failed = false;
    x->vectors_noted = false;
    x->a = (struct assembler){ .at = start, .end = t->code.write + t->code.size };

    /* Indirect jumps come in here, with their target in T. */
    asm_lea(&x->a, S, T, H_NONE, 0, -(int32_t)page_offset);
    asm_store_gs(&x->a, S, CPU_GS(code_page));
    entry = x->a.at;
    for (unsigned i = 1; i < b->ops; i++) {
        const struct op *op = &b->op[i];
        struct x86_insn insn;
        bool gp, last = i == b->ops - 1u;

        if (op->fn == op_end) {
            emit_end(x, NULL, op);
            break;
        }
        /* What is there now need not be what the ops were made from: another vCPU may be writing. */
        if (x86_decode(&insn, b->host + offset, b->bytes - offset, 8, &gp) || insn.length != op->len) {
            emit_end(x, NULL, op);
            break;
        }
        offset += insn.length;
        if (last) {
            emit_end(x, &insn, op);
            break;
        }
        if (op->fn == op_nop)
            continue;
        if (emit_copied(x, &insn, op))
            continue;
        if (translate_vector(x, &insn, op))
            continue;
        if (insn.mnemonic == ZYDIS_MNEMONIC_LEA && emit_lea(x, &insn, op))
            continue;
        if (insn.mnemonic == ZYDIS_MNEMONIC_PUSH && emit_push(x, &insn, op))
            continue;
        if (insn.mnemonic == ZYDIS_MNEMONIC_POP && emit_pop(x, &insn, op))
            continue;
        if (insn.mnemonic == ZYDIS_MNEMONIC_LEAVE && emit_leave(x, &insn, op))
            continue;
        emit_op(x, op);
    }
    /* Where a dropped block's entry leads. */
    b->leave = x->a.at;
    emit_rip(x, page_offset);
    asm_jmp_to(&x->a, t->exit_null);
    emit_stubs(x);
    if (x->a.full) {
        t->it.flush_wanted = true;
        return false;
    }
    if (x->failed)
        return false;
    code_use(&t->code, x->a.at);
    t->blocks++;
    t->bytes += (uint64_t)(x->a.at - start);
    b->indirect = code_exec(&t->code, start);
    b->code = code_exec(&t->code, entry);
    b->entry = entry;
    return true;
}
