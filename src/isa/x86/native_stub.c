/*
 * Host code for one guest instruction.
 *
 * A stub gets struct x86_cpu and a host pointer for the memory operand. It loads the registers that the
 * instruction names into the host registers of the same number, executes the guest's own bytes with the
 * memory operand replaced by [M], stores what was written and returns. Besides the instruction's own it
 * uses P (struct x86_cpu), M (memory) and, where the instruction names RSP, T in its place.
 *
 * Code memory is one memfd mapped twice: written through one view, executed through the other.
 */
#include <cpuid.h>
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/log.h"
#include "base/resident.h"
#include "base/util.h"
#include "isa/x86/native_internal.h"

#define CODE_SIZE MIB(32)
#define MAX_STUB 1024
#define SCRATCH_SLOTS 64u      /* stubs that are used once, one place for each vCPU; at the end */
#define SHARED_SIZE (CODE_SIZE - SCRATCH_SLOTS * MAX_STUB)
#define NONE 0xff

static struct {
    uint8_t *write, *exec;
    size_t used;
    bool failed;
} code;

struct emitter {
    uint8_t *at, *end;
    unsigned p;                 /* register that holds struct x86_cpu */
    bool wide;                  /* the host has AVX-512: vectors move as ZMM */
};

static bool code_ready(void)
{
    int fd;

    if (code.exec || code.failed)
        return !code.failed;
    code.failed = true;
    fd = memfd_create("ringfort-native", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, CODE_SIZE)) {
        log_error("cannot make memory for code: %s", strerror(errno));
        if (fd >= 0)
            close(fd);
        return false;
    }
    code.write = mmap(NULL, CODE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    code.exec = mmap(NULL, CODE_SIZE, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0);
    close(fd);
    if (code.write == MAP_FAILED || code.exec == MAP_FAILED) {
        log_error("cannot map executable memory: %s; does a security module forbid it?", strerror(errno));
        return false;
    }
    code.failed = false;
    return true;
}

/* Both views of the pages in use, for the figures of resident memory. */
static size_t resident_bytes(void) { return 2 * align_up(code.used, GUEST_PAGE_SIZE); }

void native_code_free(void)
{
    if (code.exec) {
        resident_remove_shared(resident_bytes());
        munmap(code.write, CODE_SIZE);
        munmap(code.exec, CODE_SIZE);
    }
    memset(&code, 0, sizeof(code));
}

/* ---- emitting ---- */

static void byte(struct emitter *e, unsigned b)
{
    if (e->at < e->end)
        *e->at++ = (uint8_t)b;
}

static void word32(struct emitter *e, uint32_t v)
{
    for (unsigned i = 0; i < 4; i++)
        byte(e, v >> (i * 8));
}

/* ModRM with [P+disp32]; P is never RSP or R12. */
static void modrm_p(struct emitter *e, unsigned reg, size_t offset)
{
    byte(e, 0x80 | (reg & 7) << 3 | (e->p & 7));
    word32(e, (uint32_t)offset);
}

/* REX.W opcode reg, [P+offset]: 8b loads, 89 stores. */
static void gpr_p(struct emitter *e, unsigned opcode, unsigned reg, size_t offset)
{
    byte(e, 0x48 | (reg >> 3) << 2 | (e->p >> 3));
    byte(e, opcode);
    modrm_p(e, reg, offset);
}

static void mov_reg(struct emitter *e, unsigned to, unsigned from)
{
    byte(e, 0x48 | (from >> 3) << 2 | (to >> 3));
    byte(e, 0x89);
    byte(e, 0xc0 | (from & 7) << 3 | (to & 7));
}

static void push_pop(struct emitter *e, unsigned opcode, unsigned reg)
{
    if (reg >= 8)
        byte(e, 0x41);
    byte(e, opcode + (reg & 7));
}

/* 0F-map instruction with a memory operand [P+offset] and register or extension reg: LDMXCSR, STMXCSR, FXSAVE64, … */
static void op_0f_p(struct emitter *e, bool rex_w, unsigned opcode, unsigned reg, size_t offset)
{
    unsigned rex = (rex_w ? 8u : 0u) | (reg >> 3) << 2 | (e->p >> 3);

    if (rex)
        byte(e, 0x40 | rex);
    byte(e, 0x0f);
    byte(e, opcode);
    modrm_p(e, reg, offset);
}

/* MOVUPS in the width that the instruction's encoding has: 0x10 loads, 0x11 stores. */
static void vector_p(struct emitter *e, enum native_kind kind, unsigned opcode, unsigned reg)
{
    size_t offset = offsetof(struct x86_cpu, s.fpu.zmm) + reg * 64;
    unsigned r = reg >> 3 & 1, b = e->p >> 3;

    if (kind < NATIVE_AVX) {
        op_0f_p(e, false, opcode, reg, offset);
    } else if (e->wide) {
        byte(e, 0x62);
        byte(e, (r ? 0 : 0x80) | 0x40 | (b ? 0 : 0x20) | (reg >> 4 & 1 ? 0 : 0x10) | 1);
        byte(e, 0x7c);
        byte(e, 0x48);
        byte(e, opcode);
        modrm_p(e, reg, offset);
    } else {
        byte(e, 0xc4);
        byte(e, (r ? 0 : 0x80) | 0x40 | (b ? 0 : 0x20) | 1);
        byte(e, 0x7c);
        byte(e, opcode);
        modrm_p(e, reg, offset);
    }
}

/* KMOVQ: 0x90 loads, 0x91 stores. */
static void mask_p(struct emitter *e, unsigned opcode, unsigned reg)
{
    byte(e, 0xc4);
    byte(e, 0xc0 | (e->p >> 3 ? 0 : 0x20) | 1);
    byte(e, 0xf8);
    byte(e, opcode);
    modrm_p(e, reg, offsetof(struct x86_cpu, s.fpu.k) + reg * 8);
}

/* ---- the guest's bytes with other operands ---- */

static bool names_rsp(const struct x86_operand *o) { return o->kind == OPERAND_GPR && o->reg == RSP; }

/* W chooses between 32 and 64-bit integers, where there are 64-bit ones. */
static bool w_is_size(const struct x86_insn *insn)
{
    for (unsigned i = 0; i < insn->operands; i++)
        if (insn->operand[i].kind == OPERAND_GPR)
            return true;
    switch (insn->mnemonic) {
    case ZYDIS_MNEMONIC_VCVTSI2SS: case ZYDIS_MNEMONIC_VCVTSI2SD: case ZYDIS_MNEMONIC_VCVTUSI2SS:
    case ZYDIS_MNEMONIC_VCVTUSI2SD: case ZYDIS_MNEMONIC_VMOVD: case ZYDIS_MNEMONIC_VPINSRD: case ZYDIS_MNEMONIC_VPEXTRD:
        return true;
    default:
        return false;
    }
}

/* A register in the immediate. */
static bool is4_operand(const struct x86_insn *insn)
{
    for (unsigned i = 0; i < insn->operands; i++)
        if (insn->operand[i].encoding == ZYDIS_OPERAND_ENCODING_IS4)
            return true;
    return false;
}

/* Guest code that is not 64-bit, to run in 64-bit mode: what is ignored there gets the value without effect. */
static void widen_vex(const struct x86_insn *insn, uint8_t *prefix)
{
    if (insn->has_evex) {
        prefix[1] |= 0xf0;
        prefix[2] |= 0x40;
        prefix[3] |= 8;
        if (w_is_size(insn))
            prefix[2] &= 0x7f;
    } else if (insn->vex_size == 3) {
        prefix[1] |= 0xe0;
        prefix[2] |= 0x40;
        if (w_is_size(insn))
            prefix[2] &= 0x7f;
    } else {
        prefix[1] |= 0xc0;
    }
}

/* Whether 66 means another operand size, and is no part of the opcode. */
static bool has_operand_size(const struct x86_insn *insn)
{
    switch (insn->mnemonic) {
    case ZYDIS_MNEMONIC_CMPXCHG: case ZYDIS_MNEMONIC_XADD: case ZYDIS_MNEMONIC_MOVBE: case ZYDIS_MNEMONIC_CRC32:
        return true;
    default:
        return false;
    }
}

/* Copies the instruction; memory operand → [m], RSP as an explicit operand → t. m, t below 8 or NONE. */
static void copy_insn(struct emitter *e, const struct x86_insn *insn, unsigned m, unsigned t)
{
    uint8_t out[X86_MAX_INSN + 1];
    unsigned n = 0, opcode_at, modrm;
    bool rsp_reg = false, rsp_rm = false, rsp_v = false, sized = false;

    for (unsigned i = 0; i < insn->operands; i++) {
        if (!names_rsp(&insn->operand[i]))
            continue;
        rsp_reg |= insn->operand[i].encoding == ZYDIS_OPERAND_ENCODING_MODRM_REG;
        rsp_rm |= insn->operand[i].encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM;
        rsp_v |= insn->operand[i].encoding == ZYDIS_OPERAND_ENCODING_NDSNDD;
    }
    /* In 16-bit code 66 means 32 bits; the copy runs in 64-bit mode. */
    if (insn->code_size == 2 && has_operand_size(insn)) {
        sized = true;
        if (insn->op_size == 2)
            out[n++] = 0x66;
    }
    for (unsigned i = 0; i < insn->prefix_count; i++) {
        uint8_t b = insn->bytes[i];

        if ((b == 0x66 && !sized) || b == 0xf2 || b == 0xf3)
            out[n++] = b;
    }
    if (insn->has_evex || insn->has_vex) {
        unsigned at = insn->has_evex ? insn->evex_offset : insn->vex_offset;
        unsigned size = insn->has_evex ? 4 : insn->vex_size;
        unsigned start = n;

        memcpy(out + n, insn->bytes + at, size);
        n += size;
        opcode_at = at + size;
        if (insn->has_mem && size > 2)
            out[start + 1] |= 0x60;             /* inverted X and B: no extension */
        if (insn->code_size != 8) {
            /* There are eight registers: the bits that would name others, all inverted, are not looked at. */
            out[start + 1] |= insn->has_evex ? 0xf0 : size > 2 ? 0xe0 : 0xc0;
            if (size > 2)
                out[start + 2] |= 0x40;
            if (insn->has_evex)
                out[start + 3] |= 0x08;
        }
        if (insn->code_size != 8)
            widen_vex(insn, out + start);
        if (rsp_v)                              /* inverted vvvv */
            out[start + size - (insn->has_evex ? 2 : 1)] =
                (uint8_t)((out[start + size - (insn->has_evex ? 2 : 1)] & ~0x78) | (~t & 15) << 3);
    } else {
        opcode_at = insn->prefix_count;
        if (insn->has_rex) {
            uint8_t rex = insn->bytes[insn->rex_offset];

            out[n++] = insn->has_mem ? rex & ~3 : rex;
            opcode_at = insn->rex_offset + 1u;
        }
    }
    if (!insn->modrm_offset) {
        memcpy(out + n, insn->bytes + opcode_at, insn->length - opcode_at);
        n += insn->length - opcode_at;
    } else {
        memcpy(out + n, insn->bytes + opcode_at, insn->modrm_offset - opcode_at);
        n += insn->modrm_offset - opcode_at;
        modrm = insn->bytes[insn->modrm_offset];
        /* The encodings of RSP have no extension bit, nor has t. */
        if (rsp_reg)
            modrm = (modrm & ~0x38u) | t << 3;
        if (insn->has_mem)
            modrm = (modrm & 0x38) | m;
        else if (rsp_rm)
            modrm = (modrm & ~7u) | t;
        out[n++] = (uint8_t)modrm;
        memcpy(out + n, insn->bytes + insn->length - insn->imm_size, insn->imm_size);
        n += insn->imm_size;
    }
    if (insn->code_size != 8 && is4_operand(insn))
        out[n - 1] &= 0x7f;
    for (unsigned i = 0; i < n; i++)
        byte(e, out[i]);
}

static unsigned pick(const uint8_t *candidates, unsigned count, uint32_t used)
{
    for (unsigned i = 0; i < count; i++)
        if (!(used & 1u << candidates[i]))
            return candidates[i];
    return NONE;
}

/* SysV: callee-saved. */
static bool preserved(unsigned reg) { return reg == RBX || reg == RBP || reg >= R12; }

static bool is_vp2intersect(const struct x86_insn *insn)
{
    return insn->mnemonic == ZYDIS_MNEMONIC_VP2INTERSECTD || insn->mnemonic == ZYDIS_MNEMONIC_VP2INTERSECTQ;
}

/* The stub from start on, at most MAX_STUB bytes. Its end, or NULL. */
static uint8_t *emit(const struct x86_insn *insn, struct native_insn *n, uint8_t *start)
{
    static const uint8_t p_candidates[] = { R15, R14, R11, R10, R9, R8, RBP };
    static const uint8_t low[] = { RSI, RDI, RBX, RCX, RDX, RAX };
    uint32_t gprs = 0, written = 0, vectors = 0, vectors_written = 0, masks = 0, masks_written = 0, used, clobbered;
    struct emitter e;
    unsigned m = NONE, t = NONE;

    for (unsigned i = 0; i < insn->operands; i++) {
        const struct x86_operand *o = &insn->operand[i];

        switch (o->kind) {
        case OPERAND_GPR:
        case OPERAND_GPR8H:
            gprs |= 1u << o->reg;
            written |= o->write ? 1u << o->reg : 0;
            break;
        case OPERAND_VEC:
            vectors |= 1u << o->reg;
            vectors_written |= o->write ? 1u << o->reg : 0;
            break;
        case OPERAND_K:
            masks |= 1u << o->reg;
            masks_written |= o->write ? 1u << o->reg : 0;
            if (o->write && is_vp2intersect(insn))
                masks_written |= 3u << (o->reg & ~1u);
            break;
        }
    }
    masks |= insn->mask_reg ? 1u << insn->mask_reg : 0;

    used = gprs | 1u << RSP;
    e.p = pick(p_candidates, ARRAY_SIZE(p_candidates), used);
    used |= 1u << e.p;
    if (insn->has_mem) {
        m = pick(low, ARRAY_SIZE(low), used);
        used |= 1u << (m & 31);
    }
    if (gprs & 1u << RSP) {
        t = pick(low, ARRAY_SIZE(low), used);
        used |= 1u << (t & 31);
    }
    if ((insn->has_mem && m == NONE) || (gprs & 1u << RSP && t == NONE))
        return NULL;

    e.at = start;
    e.end = start + MAX_STUB;
    e.wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");

    clobbered = used & ~(1u << RSP);
    for (unsigned r = 0; r < 16; r++)
        if (preserved(r) && clobbered & 1u << r)
            push_pop(&e, 0x50, r);
    mov_reg(&e, e.p, RDI);
    if (n->uses_fx)
        op_0f_p(&e, true, 0xae, 1, offsetof(struct x86_cpu, native_fx));                /* fxrstor64 */
    for (unsigned r = 0; r < 32; r++)
        if (vectors & 1u << r)
            vector_p(&e, n->kind, 0x10, r);
    for (unsigned r = 0; r < 8; r++)
        if (masks & 1u << r)
            mask_p(&e, 0x90, r);
    if (n->raises_simd)
        op_0f_p(&e, false, 0xae, 2, offsetof(struct x86_cpu, native_mxcsr_in));         /* ldmxcsr */
    gpr_p(&e, 0x8b, RAX, offsetof(struct x86_cpu, arith));
    byte(&e, 0x04), byte(&e, 0x7f);                                                     /* add $0x7f, %al */
    byte(&e, 0x9e);                                                                     /* sahf */
    if (m != NONE && m != RSI)
        mov_reg(&e, m, RSI);
    for (unsigned r = 0; r < 16; r++)
        if (gprs & 1u << r)
            gpr_p(&e, 0x8b, r == RSP ? t : r, offsetof(struct x86_cpu, s.gpr) + r * 8);

    copy_insn(&e, insn, m, t);
    n->resume = code.exec + (e.at - code.write);

    for (unsigned r = 0; r < 16; r++)
        if (written & 1u << r)
            gpr_p(&e, 0x89, r == RSP ? t : r, offsetof(struct x86_cpu, s.gpr) + r * 8);
    byte(&e, 0x9f);                                                                     /* lahf */
    byte(&e, 0x0f), byte(&e, 0x90), byte(&e, 0xc0);                                     /* seto %al */
    byte(&e, 0x0f), byte(&e, 0xb7), byte(&e, 0xc0);                                     /* movzwl %ax, %eax */
    if (e.p >= 8)
        byte(&e, 0x41);
    byte(&e, 0x89);
    modrm_p(&e, RAX, offsetof(struct x86_cpu, arith));
    if (n->raises_simd) {
        op_0f_p(&e, false, 0xae, 3, offsetof(struct x86_cpu, native_mxcsr_out));        /* stmxcsr */
        op_0f_p(&e, false, 0xae, 2, offsetof(struct x86_cpu, native_mxcsr_host));       /* ldmxcsr */
    }
    for (unsigned r = 0; r < 32; r++)
        if (vectors_written & 1u << r)
            vector_p(&e, n->kind, 0x11, r);
    for (unsigned r = 0; r < 8; r++)
        if (masks_written & 1u << r)
            mask_p(&e, 0x91, r);
    if (n->kind >= NATIVE_AVX)
        byte(&e, 0xc5), byte(&e, 0xf8), byte(&e, 0x77);                                 /* vzeroupper */
    if (n->uses_fx) {
        op_0f_p(&e, true, 0xae, 0, offsetof(struct x86_cpu, native_fx));                /* fxsave64 */
        byte(&e, 0xdb), byte(&e, 0xe3);                                                 /* fninit */
    }
    for (unsigned r = 16; r-- > 0;)
        if (preserved(r) && clobbered & 1u << r)
            push_pop(&e, 0x58, r);
    byte(&e, 0xc3);
    return e.at == e.end ? NULL : e.at;
}

static native_stub *executable(const uint8_t *start) { return (native_stub *)(void *)(code.exec + (start - code.write)); }

bool native_code_full(void) { return code.exec && SHARED_SIZE - code.used < MAX_STUB; }

native_stub *native_emit(const struct x86_insn *insn, struct native_insn *n)
{
    size_t resident = resident_bytes();
    uint8_t *start, *end;

    if (!code_ready() || native_code_full())
        return NULL;
    start = code.write + code.used;
    end = emit(insn, n, start);
    if (!end)
        return NULL;
    code.used += align_up((size_t)(end - start), 16);
    if (resident_bytes() != resident)
        resident_add_shared(resident_bytes() - resident);
    return executable(start);
}

native_stub *native_emit_once(const struct x86_insn *insn, struct native_insn *n, unsigned cpu)
{
    unsigned eax, ebx, ecx, edx;
    uint8_t *start;

    if (!code_ready())
        return NULL;
    start = code.write + SHARED_SIZE + cpu % SCRATCH_SLOTS * MAX_STUB;
    if (!emit(insn, n, start))
        return NULL;
    /* Written at one address, executed at another: a serializing instruction has to come between (SDM vol. 3A 8.1.3). */
    __cpuid(0, eax, ebx, ecx, edx);
    return executable(start);
}
