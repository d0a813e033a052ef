/*
 * FXSAVE, FXRSTOR and the XSAVE family on guest memory, from and to the canonical state.
 * SDM vol. 1 10.5 and ch. 13. The instructions run in the vCPU's thread; the layout questions in any.
 *
 * Which components are in use (XINUSE) is found by looking, not by keeping track: so images are the same
 * whichever engine made the state. x87 error pointers follow the vendor: AMD stores them as
 * zero unless an exception is pending, which also keeps host code addresses from the guest.
 */
#include "isa/x86/xsave.h"

#include <cpuid.h>
#include <pthread.h>
#include <string.h>

#include "base/util.h"
#include "isa/x86/cpuid.h"
#include "isa/x86/mmu.h"
#include "isa/x86/system.h"

#define FSW_ES 0x80u
#define BIT(c) (1ull << (c))
#define COMPACTED (1ull << 63)

/* ---- layout ---- */

static pthread_once_t once = PTHREAD_ONCE_INIT;
static struct {
    uint32_t size, offset;
    bool aligned;               /* to 64 bytes in the compacted format */
} component[XSTATE_COUNT];
static uint64_t host_components;
/*
 * How Linux saves what it hands out: by XSAVES or XSAVEC where there is one. Those have MXCSR in SSE's component alone, and where that is in its
 * initial configuration they write none: what an image has there is of another time.
 */
static bool kernel_compacts;

/* What the architecture fixes; the offsets of AVX-512 parts differ by vendor. */
static const uint32_t known_size[XSTATE_COUNT] = {
    [XSTATE_AVX] = 256, [XSTATE_OPMASK] = 64, [XSTATE_ZMM_HI256] = 512, [XSTATE_HI16_ZMM] = 1024,
};

__attribute__((target("xsave"))) static uint64_t host_xcr0(void)
{
    return __builtin_ia32_xgetbv(0);
}

static void find_layout(void)
{
    uint32_t a, b, c, d;

    host_components = BIT(XSTATE_X87) | BIT(XSTATE_SSE);
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1))
        return;
    kernel_compacts = __get_cpuid_count(0xd, 1, &a, &b, &c, &d) && (a & 0xa);     /* XSAVEC, XSAVES */
    for (unsigned i = XSTATE_AVX; i < XSTATE_COUNT; i++) {
        if (!known_size[i] || !(host_xcr0() >> i & 1) || !__get_cpuid_count(0xd, i, &a, &b, &c, &d))
            continue;
        if (a != known_size[i] || b < XSAVE_MIN_SIZE || b + a > XSAVE_MAX_SIZE)
            continue;
        component[i].size = a;
        component[i].offset = b;
        component[i].aligned = c >> 1 & 1;
        host_components |= BIT(i);
    }
}

uint32_t x86_xsave_size(unsigned i)
{
    pthread_once(&once, find_layout);
    return component[i].size;
}

uint32_t x86_xsave_offset(unsigned i)
{
    pthread_once(&once, find_layout);
    return component[i].offset;
}

bool x86_xsave_aligned(unsigned i)
{
    pthread_once(&once, find_layout);
    return component[i].aligned;
}

uint64_t x86_xsave_host_components(void)
{
    pthread_once(&once, find_layout);
    return host_components;
}

uint32_t x86_xsave_standard_bytes(uint64_t components)
{
    uint32_t bytes = XSAVE_MIN_SIZE;

    for (unsigned i = XSTATE_AVX; i < XSTATE_COUNT; i++)
        if (components & BIT(i))
            bytes = MAX(bytes, x86_xsave_offset(i) + x86_xsave_size(i));
    return bytes;
}

/* The offset of component i in a compacted image with these components; i = XSTATE_COUNT: its end. */
static uint32_t compact_offset(uint64_t components, unsigned i)
{
    uint32_t offset = XSAVE_MIN_SIZE;

    pthread_once(&once, find_layout);
    for (unsigned k = XSTATE_AVX; k < XSTATE_COUNT; k++) {
        if (k != i && !(components & BIT(k)))
            continue;
        if (component[k].aligned)
            offset = (uint32_t)align_up(offset, 64);
        if (k == i)
            break;
        offset += component[k].size;
    }
    return offset;
}

uint32_t x86_xsave_compact_bytes(uint64_t components)
{
    return compact_offset(components, XSTATE_COUNT);
}

bool x86_xcr0_consistent(uint64_t xcr0)
{
    const uint64_t avx512 = 7u << XSTATE_OPMASK;

    if (!(xcr0 & 1u << XSTATE_X87))
        return false;
    if ((xcr0 & 1u << XSTATE_AVX) && !(xcr0 & 1u << XSTATE_SSE))
        return false;
    return !(xcr0 & avx512) || ((xcr0 & avx512) == avx512 && (xcr0 & 1u << XSTATE_AVX));
}

/* ---- components ---- */

static bool all_zero(const void *p, size_t n)
{
    const uint64_t *w = p;
    uint64_t any = 0;

    for (size_t i = 0; i < n / 8; i++)
        any |= w[i];
    return any == 0;
}

uint64_t x86_xinuse(const struct x86_fpu *f)
{
    uint64_t in_use = 0;

    if (f->fcw != 0x37f || f->fsw || f->ftw || f->fop || f->fip || f->fdp || f->fcs || f->fds ||
        !all_zero(f->st, sizeof(f->st)))
        in_use |= BIT(XSTATE_X87);
    for (unsigned i = 0; i < 16; i++) {
        if (!all_zero(f->zmm[i], 16))
            in_use |= BIT(XSTATE_SSE);
        if (!all_zero(f->zmm[i] + 16, 16))
            in_use |= BIT(XSTATE_AVX);
        if (!all_zero(f->zmm[i] + 32, 32))
            in_use |= BIT(XSTATE_ZMM_HI256);
        if (!all_zero(f->zmm[16 + i], 64))
            in_use |= BIT(XSTATE_HI16_ZMM);
    }
    if (!all_zero(f->k, sizeof(f->k)))
        in_use |= BIT(XSTATE_OPMASK);
    return in_use;
}

void x86_fpu_init_components(struct x86_fpu *f, uint64_t components, unsigned vectors)
{
    if (components & BIT(XSTATE_X87)) {
        f->fcw = 0x37f;
        f->fsw = f->fop = f->fcs = f->fds = 0;
        f->ftw = 0;
        f->fip = f->fdp = 0;
        memset(f->st, 0, sizeof(f->st));
    }
    for (unsigned i = 0; i < vectors; i++) {
        if (components & BIT(XSTATE_SSE))
            memset(f->zmm[i], 0, 16);
        if (components & BIT(XSTATE_AVX))
            memset(f->zmm[i] + 16, 0, 16);
        if (components & BIT(XSTATE_ZMM_HI256))
            memset(f->zmm[i] + 32, 0, 32);
        if ((components & BIT(XSTATE_HI16_ZMM)) && vectors == 16)
            memset(f->zmm[16 + i], 0, 64);
    }
    if (components & BIT(XSTATE_OPMASK))
        memset(f->k, 0, sizeof(f->k));
}

/* How many of XMM0…15 (and their extensions) an instruction sees. */
static unsigned vector_registers(const struct x86_cpu *cpu)
{
    return cpu->code_size == 8 ? 16 : 8;
}

/* Whether instructions store x87's error pointers. */
static bool pointers_shown(const struct x86_cpu *cpu)
{
    return !cpu->amd || (cpu->s.fpu.fsw & FSW_ES);
}

/* The first 24 and the register bytes of the legacy region: x87. rex_w: 64-bit pointers. */
static void put_x87(const struct x86_fpu *f, bool pointers, bool selectors, uint8_t *image, bool rex_w)
{
    uint64_t fip = pointers ? f->fip : 0, fdp = pointers ? f->fdp : 0;

    store_le16(image, f->fcw);
    store_le16(image + 2, f->fsw);
    image[4] = f->ftw;
    image[5] = 0;
    store_le16(image + 6, pointers ? f->fop & 0x7ff : 0);
    store_le64(image + 8, fip);
    store_le64(image + 16, fdp);
    if (!rex_w) {
        store_le32(image + 12, selectors ? f->fcs : 0);
        store_le32(image + 20, selectors ? f->fds : 0);
    }
    for (unsigned i = 0; i < 8; i++) {
        memcpy(image + 32 + 16 * i, f->st[i], 10);
        memset(image + 32 + 16 * i + 10, 0, 6);
    }
}

/* Processors keep the pointers as linear addresses. */
static uint64_t sign_extend_48(uint64_t v)
{
    return (uint64_t)((int64_t)(v << 16) >> 16);
}

static void get_x87(struct x86_fpu *f, const uint8_t *image, bool rex_w)
{
    f->fcw = (load_le16(image) & ~0xe080) | 0x40;
    f->fsw = load_le16(image + 2);
    /* ES and B are what the exception flags and masks make them. */
    f->fsw &= (uint16_t)~0x8080;
    if (f->fsw & ~f->fcw & 0x3f)
        f->fsw |= 0x8080;
    f->ftw = image[4];
    f->fop = load_le16(image + 6) & 0x7ff;
    if (rex_w) {
        f->fip = sign_extend_48(load_le64(image + 8));
        f->fdp = sign_extend_48(load_le64(image + 16));
        f->fcs = f->fds = 0;
    } else {
        f->fip = load_le32(image + 8);
        f->fcs = load_le16(image + 12);
        f->fdp = load_le32(image + 16);
        f->fds = load_le16(image + 20);
    }
    for (unsigned i = 0; i < 8; i++) {
        memcpy(f->st[i], image + 32 + 16 * i, 10);
        memset(f->st[i] + 10, 0, 6);
    }
}

/* Component i (not x87) of n registers to or from its place in an image. */
static void put_component(const struct x86_fpu *f, unsigned n, unsigned i, uint8_t *p)
{
    if (i == XSTATE_OPMASK) {
        memcpy(p, f->k, sizeof(f->k));
        return;
    }
    for (unsigned r = 0; r < n; r++) {
        if (i == XSTATE_SSE)
            memcpy(p + 16 * r, f->zmm[r], 16);
        else if (i == XSTATE_AVX)
            memcpy(p + 16 * r, f->zmm[r] + 16, 16);
        else if (i == XSTATE_ZMM_HI256)
            memcpy(p + 32 * r, f->zmm[r] + 32, 32);
        else if (n == 16)
            memcpy(p + 64 * r, f->zmm[16 + r], 64);
    }
}

static void get_component(struct x86_fpu *f, unsigned n, unsigned i, const uint8_t *p)
{
    if (i == XSTATE_OPMASK) {
        memcpy(f->k, p, sizeof(f->k));
        return;
    }
    for (unsigned r = 0; r < n; r++) {
        if (i == XSTATE_SSE)
            memcpy(f->zmm[r], p + 16 * r, 16);
        else if (i == XSTATE_AVX)
            memcpy(f->zmm[r] + 16, p + 16 * r, 16);
        else if (i == XSTATE_ZMM_HI256)
            memcpy(f->zmm[r] + 32, p + 32 * r, 32);
        else if (n == 16)
            memcpy(f->zmm[16 + r], p + 64 * r, 64);
    }
}

/* Bytes of component i that an instruction in this mode touches: fewer registers outside 64-bit mode. */
static uint32_t component_bytes(const struct x86_cpu *cpu, unsigned i)
{
    bool all = vector_registers(cpu) == 16;

    switch (i) {
    case XSTATE_SSE:
        return all ? 256 : 128;
    case XSTATE_OPMASK:
        return 64;
    case XSTATE_HI16_ZMM:
        return all ? 1024 : 0;
    default:
        return all ? x86_xsave_size(i) : x86_xsave_size(i) / 2;
    }
}

static uint32_t component_offset(unsigned i, uint64_t layout)
{
    if (i == XSTATE_SSE)
        return 160;
    return layout & COMPACTED ? compact_offset(layout & ~COMPACTED, i) : x86_xsave_offset(i);
}

void x86_fpu_to_image(const struct x86_fpu *f, uint64_t components, uint8_t image[XSAVE_MAX_SIZE])
{
    uint64_t in_use = x86_xinuse(f) & components;

    memset(image, 0, XSAVE_MAX_SIZE);
    /* Who reads an image leaves MXCSR alone that stands without SSE or AVX. */
    if (f->mxcsr != MXCSR_DEFAULT)
        in_use |= BIT(XSTATE_SSE);
    put_x87(f, true, false, image, true);
    store_le32(image + 24, f->mxcsr);
    store_le32(image + 28, MXCSR_MASK);
    put_component(f, 16, XSTATE_SSE, image + component_offset(XSTATE_SSE, 0));
    for (unsigned i = XSTATE_AVX; i < XSTATE_COUNT; i++)
        if (in_use & BIT(i) && x86_xsave_size(i))
            put_component(f, 16, i, image + x86_xsave_offset(i));
    store_le64(image + XSAVE_LEGACY_SIZE, in_use);
}

void x86_fpu_from_image(struct x86_fpu *f, const uint8_t image[XSAVE_MAX_SIZE])
{
    uint64_t in_use = load_le64(image + XSAVE_LEGACY_SIZE), with_mxcsr;

    x86_fpu_init_components(f, ~0ull, 16);
    if (in_use & BIT(XSTATE_X87))
        get_x87(f, image, true);
    pthread_once(&once, find_layout);
    with_mxcsr = kernel_compacts ? BIT(XSTATE_SSE) : BIT(XSTATE_SSE) | BIT(XSTATE_AVX);
    f->mxcsr = in_use & with_mxcsr ? load_le32(image + 24) & MXCSR_MASK : MXCSR_DEFAULT;
    if (in_use & BIT(XSTATE_SSE))
        get_component(f, 16, XSTATE_SSE, image + component_offset(XSTATE_SSE, 0));
    for (unsigned i = XSTATE_AVX; i < XSTATE_COUNT; i++)
        if (in_use & BIT(i) && x86_xsave_size(i))
            get_component(f, 16, i, image + x86_xsave_offset(i));
}

/* ---- FXSAVE, FXRSTOR ---- */

/* Processors look for faults at certain bytes of an image first. */
static void probe(struct x86_cpu *cpu, gva_t va, bool write)
{
    if (write)
        x86_probe_write(cpu, va, 1);
    else
        x86_read8(cpu, va);
}

/* The address of the image, whose alignment is checked: on Intel's processors after its being canonical, and maybe told by #AC. */
static gva_t image_address(struct x86_cpu *cpu, const struct x86_insn *insn, unsigned size, unsigned align, bool write)
{
    bool based = cpu->code_size != 8 || insn->mem.seg >= SEG_FS;
    gva_t va = x86_effective(cpu, insn) + (based ? cpu->s.seg[insn->mem.seg].base : 0);

    if (!cpu->amd) {
        if (cpu->code_size == 8 && !x86_canonical(cpu, va))
            x86_raise_non_canonical(cpu, va);
        if (cpu->tlb == &x86_checking_set && (va & 3) &&
            (cpu->code_size == 8 || !(cpu->s.seg[insn->mem.seg].attr & SEG_UNUSABLE)))
            x86_raise_error(cpu, X86_AC, 0);
    }
    va = x86_linear(cpu, insn, size, write);
    if (va & (align - 1))
        x86_raise_error(cpu, X86_GP, 0);
    return va;
}

/* FXSAVE's and FXRSTOR's. Where alignment is checked, processors look at the first word before the 16 bytes. */
static gva_t fx_address(struct x86_cpu *cpu, const struct x86_insn *insn, bool write)
{
    gva_t va = x86_linear(cpu, insn, XSAVE_LEGACY_SIZE, write);

    if (!x86_canonical(cpu, va) || (cpu->amd && !x86_canonical(cpu, va + 3)))
        x86_raise_non_canonical(cpu, va);
    if (cpu->tlb == &x86_checking_set && (va & 3))
        x86_raise_error(cpu, X86_AC, 0);
    if (va & 15)
        x86_raise_error(cpu, X86_GP, 0);
    probe(cpu, va + XSAVE_LEGACY_SIZE - 1, write);
    return va;
}

static bool rex_w(const struct x86_insn *insn)
{
    return insn->op_size == 8;
}

void x86_insn_fxsave(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    uint8_t image[XSAVE_LEGACY_SIZE];
    gva_t va;

    if (cpu->s.cr0 & (CR0_EM | CR0_TS))
        x86_raise(cpu, X86_NM);
    va = fx_address(cpu, insn, true);
    put_x87(&cpu->s.fpu, pointers_shown(cpu), cpu->amd && pointers_shown(cpu), image, rex_w(insn));
    store_le32(image + 24, cpu->s.fpu.mxcsr);
    store_le32(image + 28, MXCSR_MASK);
    put_component(&cpu->s.fpu, vector_registers(cpu), XSTATE_SSE, image + 160);
    /* What follows the last register is not written. */
    x86_write_bytes(cpu, va, image, 160 + component_bytes(cpu, XSTATE_SSE));
}

void x86_insn_fxrstor(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    uint8_t image[XSAVE_LEGACY_SIZE];
    gva_t va;

    if (cpu->s.cr0 & (CR0_EM | CR0_TS))
        x86_raise(cpu, X86_NM);
    va = fx_address(cpu, insn, false);
    x86_read_bytes(cpu, va, image, sizeof(image));
    if (load_le32(image + 24) & ~MXCSR_MASK)
        x86_raise_error(cpu, X86_GP, 0);
    get_x87(&cpu->s.fpu, image, rex_w(insn));
    cpu->s.fpu.mxcsr = load_le32(image + 24);
    get_component(&cpu->s.fpu, vector_registers(cpu), XSTATE_SSE, image + 160);
}

/* ---- XSAVE ---- */

enum save_kind { SAVE, SAVE_OPT, SAVE_COMPACT, SAVE_SUPERVISOR };

static void xsave_checks(struct x86_cpu *cpu)
{
    if (!(cpu->s.cr4 & CR4_OSXSAVE))
        x86_raise(cpu, X86_UD);
    if (cpu->s.cr0 & CR0_TS)
        x86_raise(cpu, X86_NM);
}

/* EDX:EAX, the components asked for, among the enabled ones. */
static uint64_t requested(const struct x86_cpu *cpu, uint64_t enabled)
{
    return ((uint32_t)cpu->s.gpr[RAX] | cpu->s.gpr[RDX] << 32) & enabled;
}

/*
 * The first byte that is touched, and looked at for faults. Intel's processors leave what is not asked for alone: MXCSR is the first of SSE,
 * and in the standard format of AVX; the header of all others.
 */
static uint32_t first_byte(const struct x86_cpu *cpu, uint64_t asked, bool compact)
{
    if (cpu->amd || asked & BIT(XSTATE_X87))
        return 0;
    return asked & (BIT(XSTATE_SSE) | (compact ? 0 : BIT(XSTATE_AVX))) ? 24 : XSAVE_LEGACY_SIZE;
}

/* Pieces of an image are collected into runs, so that what lies between them stays as it was. */
static void write_run(struct x86_cpu *cpu, gva_t va, const uint8_t *image, uint32_t from, uint32_t to)
{
    if (to > from)
        x86_write_bytes(cpu, va + from, image + from, to - from);
}

static void xsave(struct x86_cpu *cpu, const struct x86_insn *insn, enum save_kind kind)
{
    uint8_t image[XSAVE_MAX_SIZE];
    bool compact = kind == SAVE_COMPACT || kind == SAVE_SUPERVISOR;
    uint64_t rfbm, in_use, write, layout, bv;
    uint32_t bytes, from;
    gva_t va;

    xsave_checks(cpu);
    if (kind == SAVE_SUPERVISOR)
        x86_require_cpl0(cpu);
    rfbm = requested(cpu, cpu->s.xcr0 | (kind == SAVE_SUPERVISOR ? cpu->s.xss : 0));
    layout = compact ? rfbm | COMPACTED : 0;
    bytes = compact ? x86_xsave_compact_bytes(rfbm) : x86_xsave_standard_bytes(rfbm);
    va = image_address(cpu, insn, bytes, 64, true);
    if (cpu->amd)
        probe(cpu, va, true);
    probe(cpu, va + bytes - 1, true);
    from = first_byte(cpu, rfbm, compact);
    x86_probe_write(cpu, va + from, bytes - from);

    in_use = x86_xinuse(&cpu->s.fpu) & rfbm;
    if (!cpu->amd && cpu->code_size != 8)       /* out of reach, and not in use (SDM vol. 1 13.6) */
        in_use &= ~BIT(XSTATE_HI16_ZMM);
    if (compact && (rfbm & BIT(XSTATE_SSE)) && cpu->s.fpu.mxcsr != MXCSR_DEFAULT)
        in_use |= BIT(XSTATE_SSE);
    write = kind == SAVE ? rfbm : in_use;

    if (write & BIT(XSTATE_X87)) {
        put_x87(&cpu->s.fpu, pointers_shown(cpu), cpu->amd && pointers_shown(cpu), image, rex_w(insn));
        write_run(cpu, va, image, 0, 24);
        write_run(cpu, va, image, 32, 160);
    }
    if (compact ? (write & BIT(XSTATE_SSE)) != 0 : (rfbm & (BIT(XSTATE_SSE) | BIT(XSTATE_AVX))) != 0) {
        store_le32(image + 24, cpu->s.fpu.mxcsr);
        store_le32(image + 28, MXCSR_MASK);
        write_run(cpu, va, image, 24, 32);
    }
    for (unsigned i = XSTATE_SSE; i < XSTATE_COUNT; i++) {
        uint32_t offset;

        if (!(write & BIT(i)))
            continue;
        offset = component_offset(i, layout);
        put_component(&cpu->s.fpu, vector_registers(cpu), i, image + offset);
        write_run(cpu, va, image, offset, offset + component_bytes(cpu, i));
    }

    /* The header last: XSTATE_BV keeps what was not asked for in the standard format. */
    bv = in_use;
    if (!compact) {
        uint64_t old = x86_read64(cpu, va + XSAVE_LEGACY_SIZE);

        x86_write64(cpu, va + XSAVE_LEGACY_SIZE, (old & ~rfbm) | bv);
    } else {
        store_le64(image, bv);
        store_le64(image + 8, layout);
        x86_write_bytes(cpu, va + XSAVE_LEGACY_SIZE, image, 16);
    }
}

void x86_insn_xsave(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    xsave(cpu, insn, SAVE);
}

void x86_insn_xsaveopt(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    xsave(cpu, insn, SAVE_OPT);
}

void x86_insn_xsavec(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    xsave(cpu, insn, SAVE_COMPACT);
}

void x86_insn_xsaves(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    xsave(cpu, insn, SAVE_SUPERVISOR);
}

/* ---- XRSTOR ---- */

static _Noreturn void gp(struct x86_cpu *cpu)
{
    x86_raise_error(cpu, X86_GP, 0);
}

/*
 * Intel's processors look whether the format is possible, then at both ends of what is asked for, in use or not, and then at the rest of the
 * header. Returns the first byte.
 */
static uint32_t probe_ends(struct x86_cpu *cpu, gva_t va, uint64_t rfbm, uint64_t enabled)
{
    uint64_t layout = x86_read64(cpu, va + XSAVE_LEGACY_SIZE + 8);
    bool compact = (layout & COMPACTED) != 0;
    uint64_t asked = compact ? rfbm & layout : rfbm;
    uint32_t first = first_byte(cpu, asked, compact), end = x86_xsave_standard_bytes(rfbm);

    if (compact) {
        if (layout & ~COMPACTED & ~enabled)
            gp(cpu);
        end = XSAVE_MIN_SIZE;
        for (unsigned i = XSTATE_AVX; i < XSTATE_COUNT; i++)
            if (asked & BIT(i))
                end = component_offset(i, layout) + x86_xsave_size(i);
    }
    probe(cpu, va + first, false);
    probe(cpu, va + end - 1, false);
    return first;
}

static void xrstor(struct x86_cpu *cpu, const struct x86_insn *insn, bool supervisor)
{
    uint8_t image[XSAVE_MAX_SIZE], *header = image + XSAVE_LEGACY_SIZE;
    uint64_t enabled, rfbm, bv, layout, load, init;
    uint32_t bytes, first = 0;
    bool compact, mxcsr;
    gva_t va;

    xsave_checks(cpu);
    if (supervisor)
        x86_require_cpl0(cpu);
    enabled = cpu->s.xcr0 | (supervisor ? cpu->s.xss : 0);
    rfbm = requested(cpu, enabled);
    va = image_address(cpu, insn, XSAVE_MIN_SIZE, 64, false);
    if (cpu->amd) {
        probe(cpu, va, false);
        probe(cpu, va + XSAVE_LEGACY_SIZE, false);
    } else {
        first = probe_ends(cpu, va, rfbm, enabled);
    }
    memset(image, 0, first);
    x86_read_bytes(cpu, va + first, image + first, XSAVE_MIN_SIZE - first);

    bv = load_le64(header);
    layout = load_le64(header + 8);
    compact = (layout & COMPACTED) != 0;
    if (compact) {
        if ((layout & ~COMPACTED & ~enabled) || (bv & ~layout) || !all_zero(header + 16, 48))
            gp(cpu);
    } else {
        if (supervisor || layout != 0 || load_le64(header + 16) != 0 || (bv & ~enabled))
            gp(cpu);
        if (cpu->amd)
            probe(cpu, va + x86_xsave_standard_bytes(rfbm) - 1, false);
    }
    load = rfbm & bv;
    init = rfbm & ~bv;
    bytes = compact ? compact_offset(layout & ~COMPACTED, XSTATE_COUNT) : x86_xsave_standard_bytes(load);
    if (bytes > XSAVE_MIN_SIZE) {
        image_address(cpu, insn, bytes, 64, false);
        for (unsigned i = XSTATE_AVX; i < XSTATE_COUNT; i++) {
            uint32_t offset = component_offset(i, layout);

            if ((load & BIT(i)) && component_bytes(cpu, i) != 0)
                x86_read_bytes(cpu, va + offset, image + offset, component_bytes(cpu, i));
        }
    }
    /* In the standard format MXCSR goes with SSE or AVX, in use or not; compacted, it is a part of SSE. */
    mxcsr = compact ? (load & BIT(XSTATE_SSE)) != 0 : (rfbm & (BIT(XSTATE_SSE) | BIT(XSTATE_AVX))) != 0;
    if (mxcsr && (load_le32(image + 24) & ~MXCSR_MASK))
        gp(cpu);

    /* Nothing can fault any more. */
    x86_fpu_init_components(&cpu->s.fpu, init, vector_registers(cpu));
    if (compact && (init & BIT(XSTATE_SSE)))
        cpu->s.fpu.mxcsr = MXCSR_DEFAULT;
    if (load & BIT(XSTATE_X87))
        get_x87(&cpu->s.fpu, image, rex_w(insn));
    for (unsigned i = XSTATE_SSE; i < XSTATE_COUNT; i++)
        if (load & BIT(i))
            get_component(&cpu->s.fpu, vector_registers(cpu), i, image + component_offset(i, layout));
    if (mxcsr)
        cpu->s.fpu.mxcsr = load_le32(image + 24);
}

void x86_insn_xrstor(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    xrstor(cpu, insn, false);
}

void x86_insn_xrstors(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    xrstor(cpu, insn, true);
}
