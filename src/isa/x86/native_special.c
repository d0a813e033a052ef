/*
 * Vector and x87 instructions that cannot simply run on the host: several memory locations (gather, scatter,
 * masked moves), state that has another form here (x87 environment, MXCSR), or no operand at all.
 */
#include <string.h>

#include "base/util.h"
#include "isa/x86/mmu.h"
#include "isa/x86/native_internal.h"

/* ---- x87 state ---- */

void native_fx_load(struct x86_cpu *cpu)
{
    const struct x86_fpu *f = &cpu->s.fpu;
    uint8_t *fx = cpu->native_fx;

    store_le16(fx, f->fcw);
    store_le16(fx + 2, f->fsw);
    fx[4] = f->ftw;
    store_le16(fx + 6, f->fop);
    store_le64(fx + 8, f->fip);
    store_le64(fx + 16, f->fdp);
    store_le32(fx + 24, 0x1f80);
    memcpy(fx + 32, f->st, sizeof(f->st));
}

void native_fx_store(struct x86_cpu *cpu)
{
    struct x86_fpu *f = &cpu->s.fpu;
    const uint8_t *fx = cpu->native_fx;

    f->fcw = load_le16(fx);
    f->fsw = load_le16(fx + 2);
    f->ftw = fx[4];
    memcpy(f->st, fx + 32, sizeof(f->st));
}

/* SDM vol. 1 8.1.3: bit 7 and its copy, bit 15, say whether an unmasked exception is pending. */
static void update_summary(struct x86_fpu *f)
{
    f->fsw &= 0x7f7f;
    if (f->fsw & ~f->fcw & 0x3f)
        f->fsw |= 0x8080;
}

static uint16_t full_tag(const struct x86_fpu *f)
{
    unsigned top = f->fsw >> 11 & 7;
    uint16_t tag = 0;

    for (unsigned i = 0; i < 8; i++) {
        const uint8_t *st = f->st[(i - top) & 7];
        uint64_t mantissa = load_le64(st);
        unsigned exponent = load_le16(st + 8) & 0x7fff;
        unsigned t;

        if (!(f->ftw >> i & 1))
            t = 3;
        else if (exponent == 0 && mantissa == 0)
            t = 1;
        else if (exponent == 0 || exponent == 0x7fff || !(mantissa >> 63))
            t = 2;
        else
            t = 0;
        tag |= (uint16_t)(t << (i * 2));
    }
    return tag;
}

static uint8_t abridged_tag(uint16_t tag)
{
    uint8_t ftw = 0;

    for (unsigned i = 0; i < 8; i++)
        if ((tag >> (i * 2) & 3) != 3)
            ftw |= (uint8_t)(1 << i);
    return ftw;
}

/* 14 or 28 bytes in protected-mode format, which is also what 64-bit mode uses. */
static unsigned environment_size(const struct x86_insn *insn) { return insn->op_size == 2 ? 14 : 28; }

/* Intel's processors store zeros for the selectors (SDM vol. 1 8.1.8). */
static void put_environment(const struct x86_cpu *cpu, uint8_t *out, unsigned size)
{
    const struct x86_fpu *f = &cpu->s.fpu;
    uint16_t fcs = cpu->amd ? f->fcs : 0, fds = cpu->amd ? f->fds : 0;

    if (size == 28) {
        const uint32_t words[7] = { 0xffff0000u | f->fcw, 0xffff0000u | f->fsw, 0xffff0000u | full_tag(f),
                                    (uint32_t)f->fip, fcs | (uint32_t)f->fop << 16, (uint32_t)f->fdp, 0xffff0000u | fds };

        memcpy(out, words, sizeof(words));
    } else {
        const uint16_t words[7] = { f->fcw, f->fsw, full_tag(f), (uint16_t)f->fip, fcs, (uint16_t)f->fdp, fds };

        memcpy(out, words, sizeof(words));
    }
}

static void get_environment(struct x86_fpu *f, const uint8_t *in, unsigned size)
{
    unsigned step = size / 7;

    f->fcw = (uint16_t)((load_le16(in) & 0x1f7f) | 0x40);
    f->fsw = load_le16(in + step);
    f->ftw = abridged_tag(load_le16(in + 2 * step));
    if (size == 28) {
        f->fip = load_le32(in + 12);
        f->fcs = load_le16(in + 16);
        f->fop = load_le16(in + 18) & 0x7ff;
        f->fdp = load_le32(in + 20);
        f->fds = load_le16(in + 24);
    } else {
        f->fop = 0;             /* not in this format */
        f->fip = load_le16(in + 6);
        f->fcs = load_le16(in + 8);
        f->fdp = load_le16(in + 10);
        f->fds = load_le16(in + 12);
    }
    update_summary(f);
}

/*
 * The address of an environment or image. Its parts are accessed one by one, but a fault must come first: processors look at
 * the first word, then at the last byte.
 */
static gva_t image_address(struct x86_cpu *cpu, const struct x86_insn *insn, unsigned size, bool write)
{
    gva_t va = x86_linear(cpu, insn, size, write);
    uint8_t word[4];

    if (cpu->tlb == &x86_checking_set || (va ^ (va + size - 1)) & GUEST_PAGE_MASK) {
        if (write) {
            x86_probe_write(cpu, va, environment_size(insn) / 7);
            x86_probe_write(cpu, va + size - 1, 1);
        } else {
            x86_read_bytes(cpu, va, word, environment_size(insn) / 7);
            x86_read_bytes(cpu, va + size - 1, word, 1);
        }
    }
    return va;
}

static void fnstenv(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    struct x86_fpu *f = &cpu->s.fpu;
    unsigned size = environment_size(insn);
    uint8_t env[28];

    put_environment(cpu, env, size);
    x86_write_bytes(cpu, image_address(cpu, insn, size, true), env, size);
    f->fcw |= 0x3f;
    update_summary(f);
}

/*
 * st[] is in stack order: when TOP changes and the registers stay, their places move. old_top: what st[] is in order of;
 * fsw has the new one.
 */
static void restack(struct x86_fpu *f, unsigned old_top)
{
    unsigned top = f->fsw >> 11 & 7;
    uint8_t st[8][16];

    memcpy(st, f->st, sizeof(st));
    for (unsigned i = 0; i < 8; i++)
        memcpy(f->st[(old_top + i - top) & 7], st[i], sizeof(st[i]));
}

static void fldenv(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    struct x86_fpu *f = &cpu->s.fpu;
    unsigned size = environment_size(insn), top = f->fsw >> 11 & 7;
    uint8_t env[28];

    x86_read_bytes(cpu, image_address(cpu, insn, size, false), env, size);
    get_environment(f, env, size);
    restack(f, top);
}

static void reset_x87(struct x86_fpu *f)
{
    f->fcw = 0x37f;
    f->fsw = 0;
    f->ftw = 0;
    f->fop = 0;
    f->fip = f->fdp = 0;
    f->fcs = f->fds = 0;
}

/* FNINIT forgets the pointers as well, which a stub would not show. */
static void fninit(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    unsigned top = cpu->s.fpu.fsw >> 11 & 7;

    reset_x87(&cpu->s.fpu);
    restack(&cpu->s.fpu, top);
}

/* The images of FNSAVE and FRSTOR are in stack order, too. */
static void fnsave(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    struct x86_fpu *f = &cpu->s.fpu;
    unsigned size = environment_size(insn), top = f->fsw >> 11 & 7;
    uint8_t image[28 + 80];

    put_environment(cpu, image, size);
    for (unsigned i = 0; i < 8; i++)
        memcpy(image + size + i * 10, f->st[i], 10);
    x86_write_bytes(cpu, image_address(cpu, insn, size + 80, true), image, size + 80);
    reset_x87(f);
    restack(f, top);
}

static void frstor(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    struct x86_fpu *f = &cpu->s.fpu;
    unsigned size = environment_size(insn);
    uint8_t image[28 + 80];

    x86_read_bytes(cpu, image_address(cpu, insn, size + 80, false), image, size + 80);
    get_environment(f, image, size);
    memset(f->st, 0, sizeof(f->st));
    for (unsigned i = 0; i < 8; i++)
        memcpy(f->st[i], image + size + i * 10, 10);
}

static void fwait(struct x86_cpu *cpu, const struct x86_insn *insn) {}

/* ---- MXCSR ---- */

static void ldmxcsr(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    uint32_t v = x86_read32(cpu, x86_linear(cpu, insn, 4, false));

    if (v & 0xffff0000u)
        x86_raise_error(cpu, X86_GP, 0);
    cpu->s.fpu.mxcsr = v;
}

static void stmxcsr(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    x86_write32(cpu, x86_linear(cpu, insn, 4, true), cpu->s.fpu.mxcsr);
}

/* ---- upper halves ---- */

static void vzeroupper(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    unsigned count = insn->code_size == 8 ? 16 : 8;

    for (unsigned i = 0; i < count; i++)
        memset(cpu->s.fpu.zmm[i] + 16, 0, 48);
}

static void vzeroall(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    memset(cpu->s.fpu.zmm, 0, (insn->code_size == 8 ? 16 : 8) * 64);
}

/* ---- masked moves: sign bits of a vector choose the elements ---- */

static bool sign(const uint8_t *vector, unsigned i, unsigned element) { return vector[(i + 1) * element - 1] >> 7; }

/* VMASKMOVPS/PD, VPMASKMOVD/Q: operands are destination, mask, source. */
static void vmaskmov(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    bool store = insn->operand[0].kind == OPERAND_MEM;
    const struct x86_operand *reg = &insn->operand[store ? 2 : 0];
    bool wide = insn->mnemonic == ZYDIS_MNEMONIC_VMASKMOVPD || insn->mnemonic == ZYDIS_MNEMONIC_VPMASKMOVQ;
    unsigned element = wide ? 8 : 4, size = reg->size;
    const uint8_t *mask = cpu->s.fpu.zmm[insn->operand[1].reg];
    uint8_t *vector = cpu->s.fpu.zmm[reg->reg], loaded[64] = { 0 };
    struct tlb_set *set = x86_unchecked_set(cpu);
    uint64_t offset = x86_effective(cpu, insn);
    uint64_t wanted = 0;
    gva_t va[8];

    for (unsigned i = 0; i < size / element; i++)
        wanted |= (uint64_t)sign(mask, i, element) << i;
    if (wanted && !cpu->amd)
        native_check_masked(cpu, insn, element, wanted, store, false);
    for (unsigned i = 0; i < size / element; i++) {
        if (!(wanted >> i & 1))
            continue;
        va[i] = x86_seg_linear(cpu, insn->mem.seg, offset + i * element, element, store);
        if (store)
            x86_probe_write_in(cpu, set, va[i], element);
        else
            x86_read_bytes_in(cpu, set, va[i], loaded + i * element, element);
    }
    if (!store) {
        memcpy(vector, loaded, 64);
        return;
    }
    for (unsigned i = 0; i < size / element; i++)
        if (sign(mask, i, element))
            x86_write_bytes_in(cpu, set, va[i], vector + i * element, element);
}

void native_clear_top(struct x86_fpu *f)
{
    unsigned top = f->fsw >> 11 & 7;

    f->fsw &= (uint16_t)~0x3800;
    restack(f, top);
}

/* What every MMX instruction does: all registers valid, TOP 0. */
static void enter_mmx(struct x86_fpu *f)
{
    native_clear_top(f);
    f->ftw = 0xff;
}

/*
 * MASKMOVDQU and MASKMOVQ: bytes to DS:rDI, which a prefix may override. Whether bytes that are not stored may fault is up
 * to the processor: AMD's and Intel's do, and have changed to MMX state before. Intel's take eight bytes at a time, the upper ones
 * first.
 */
static void maskmov_bytes(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    bool mmx = insn->mnemonic == ZYDIS_MNEMONIC_MASKMOVQ;
    unsigned size = mmx ? 8 : 16, operand = 0, top = cpu->s.fpu.fsw >> 11 & 7;
    uint8_t vector[16], mask[16];
    gva_t va;

    /* The memory destination is implied; the register operands come in order around it. MMX registers are the physical ones. */
    for (unsigned i = 0; i < 2; i++, operand++) {
        while (insn->operand[operand].kind == OPERAND_MEM)
            operand++;
        unsigned reg = insn->operand[operand].reg;
        memcpy(i ? mask : vector, mmx ? cpu->s.fpu.st[(reg - top) & 7] : cpu->s.fpu.zmm[reg], size);
    }
    if (mmx)
        enter_mmx(&cpu->s.fpu);
    va = x86_seg_linear(cpu, insn->mem.seg, x86_get_gpr(cpu, RDI, insn->addr_size), size, true);
    /* The whole location, whatever the mask, its alignment too. */
    if (!cpu->amd && !mmx)
        x86_probe_write(cpu, va + 8, 8);
    x86_probe_write(cpu, va, cpu->amd ? size : 8);
    for (unsigned i = 0; i < size; i++)
        if (mask[i] >> 7)
            x86_write8(cpu, va + i, vector[i]);
}

/* ---- gather and scatter ---- */

struct vsib {
    uint8_t element, index;     /* bytes */
    bool scatter;
};

static bool vsib_form(const struct x86_insn *insn, struct vsib *v)
{
    switch (insn->mnemonic) {
#define FORM(name, e, i) \
    case ZYDIS_MNEMONIC_V##name: *v = (struct vsib){ e, i, false }; return true;
    FORM(PGATHERDD, 4, 4)
    FORM(PGATHERDQ, 8, 4)
    FORM(PGATHERQD, 4, 8)
    FORM(PGATHERQQ, 8, 8)
    FORM(GATHERDPS, 4, 4)
    FORM(GATHERDPD, 8, 4)
    FORM(GATHERQPS, 4, 8)
    FORM(GATHERQPD, 8, 8)
#undef FORM
#define FORM(name, e, i) \
    case ZYDIS_MNEMONIC_V##name: *v = (struct vsib){ e, i, true }; return true;
    FORM(PSCATTERDD, 4, 4)
    FORM(PSCATTERDQ, 8, 4)
    FORM(PSCATTERQD, 4, 8)
    FORM(PSCATTERQQ, 8, 8)
    FORM(SCATTERDPS, 4, 4)
    FORM(SCATTERDPD, 8, 4)
    FORM(SCATTERQPS, 4, 8)
    FORM(SCATTERQPD, 8, 8)
#undef FORM
    default: return false;
    }
}

static gva_t element_address(struct x86_cpu *cpu, const struct x86_insn *insn, const struct vsib *v, const uint8_t *index,
                             unsigned i)
{
    const struct x86_mem *m = &insn->mem;
    uint64_t offset = (uint64_t)m->disp;

    if (m->base < 16)
        offset += cpu->s.gpr[m->base];
    offset += (uint64_t)(v->index == 4 ? (int64_t)(int32_t)load_le32(index + i * 4) : (int64_t)load_le64(index + i * 8)) *
              m->scale;
    if (m->addr_size == 4)
        offset = (uint32_t)offset;
    return x86_seg_linear(cpu, m->seg, offset, v->element, v->scatter);
}

/*
 * Elements are done one by one, each clearing its mask bit, so a fault in the middle leaves what is done and the
 * instruction goes on with the rest. By then Intel's processors have made the mask one of all ones and zeros.
 */
static void gather_scatter(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    struct x86_fpu *f = &cpu->s.fpu;
    struct vsib v;
    const struct x86_operand *reg;
    struct tlb_set *set = x86_unchecked_set(cpu);
    uint8_t *vector, *vex_mask = NULL, index[64];
    unsigned count, size, width;

    vsib_form(insn, &v);
    reg = &insn->operand[v.scatter ? 1 : 0];
    if (reg->kind != OPERAND_VEC)
        reg = &insn->operand[v.scatter ? 0 : 1];
    vector = f->zmm[reg->reg];
    memcpy(index, f->zmm[insn->mem.index], 64);
    /* As many elements as the smaller of data and index vector holds. */
    count = MIN(reg->size / v.element, insn->mem.vsib_size / v.index);
    if (insn->has_vex) {
        const struct x86_operand *mask = &insn->operand[2];

        /* Two of the three registers the same: #UD. */
        if (mask->reg == reg->reg || mask->reg == insn->mem.index || reg->reg == insn->mem.index)
            x86_raise(cpu, X86_UD);
        vex_mask = f->zmm[mask->reg];
    } else if (!insn->mask_reg || (!v.scatter && reg->reg == insn->mem.index)) {
        x86_raise(cpu, X86_UD);
    }

    size = count * v.element;
    width = MAX(reg->size, insn->mem.vsib_size);
    if (vex_mask && !cpu->amd) {
        for (unsigned i = 0; i < width / v.element; i++)
            memset(vex_mask + i * v.element, sign(vex_mask, i, v.element) ? 0xff : 0, v.element);
        memset(vex_mask + width, 0, 64 - width);
    }
    for (unsigned i = 0; i < count; i++) {
        uint8_t *element = vector + i * v.element;
        bool wanted = vex_mask ? sign(vex_mask, i, v.element) : f->k[insn->mask_reg] >> i & 1;

        if (wanted && v.scatter) {
            x86_write_bytes_in(cpu, set, element_address(cpu, insn, &v, index, i), element, v.element);
        } else if (wanted) {
            x86_read_bytes_in(cpu, set, element_address(cpu, insn, &v, index, i), element, v.element);
            /* What an EVEX instruction writes at all ends with the wider of its vectors; on Intel's also a VEX one. */
            if (!vex_mask || !cpu->amd)
                memset(vector + width, 0, 64 - width);
        }
        if (vex_mask)
            memset(vex_mask + i * v.element, 0, v.element);
        else
            f->k[insn->mask_reg] &= ~(1ull << i);
    }
    if (vex_mask)
        memset(vex_mask, 0, 64);
    else
        f->k[insn->mask_reg] = 0;
    if (!v.scatter)
        memset(vector + size, 0, 64 - size);
}

native_special_fn *native_special(const struct x86_insn *insn)
{
    struct vsib v;

    switch (insn->mnemonic) {
    case ZYDIS_MNEMONIC_FNINIT: return fninit;
    case ZYDIS_MNEMONIC_FNSTENV: return fnstenv;
    case ZYDIS_MNEMONIC_FLDENV: return fldenv;
    case ZYDIS_MNEMONIC_FNSAVE: return fnsave;
    case ZYDIS_MNEMONIC_FRSTOR: return frstor;
    case ZYDIS_MNEMONIC_FWAIT: return fwait;
    case ZYDIS_MNEMONIC_LDMXCSR: case ZYDIS_MNEMONIC_VLDMXCSR: return ldmxcsr;
    case ZYDIS_MNEMONIC_STMXCSR: case ZYDIS_MNEMONIC_VSTMXCSR: return stmxcsr;
    case ZYDIS_MNEMONIC_VZEROUPPER: return vzeroupper;
    case ZYDIS_MNEMONIC_VZEROALL: return vzeroall;
    case ZYDIS_MNEMONIC_VMASKMOVPS: case ZYDIS_MNEMONIC_VMASKMOVPD: case ZYDIS_MNEMONIC_VPMASKMOVD:
    case ZYDIS_MNEMONIC_VPMASKMOVQ: return vmaskmov;
    case ZYDIS_MNEMONIC_MASKMOVDQU: case ZYDIS_MNEMONIC_VMASKMOVDQU: case ZYDIS_MNEMONIC_MASKMOVQ: return maskmov_bytes;
    default: return vsib_form(insn, &v) ? gather_scatter : NULL;
    }
}
