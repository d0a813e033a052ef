/*
 * Random cases.
 *
 * Instructions come from random bytes in the shape of each encoding space (diff_encode.c), and the decoder says which of them are
 * instructions; so what is tested does not depend on a list that somebody has to keep. Then they are
 * steered: registers get values that make memory operands land in the data window, also where it hurts (page borders,
 * pages without permission, addresses that are not canonical), branches lead to other instructions of the
 * case, counts stay small. Values that cannot be arranged by the initial state are loaded by a MOV in front.
 *
 * Not generated: what shows time, randomness, or the system around (see user_visible() below); INT1, whose return address
 * under a hypervisor on AMD is the instruction itself.
 */
#include <Zydis/Zydis.h>
#include <cpuid.h>
#include <pthread.h>
#include <string.h>

#include "base/util.h"
#include "diff.h"
#include "diff_encode.h"
#include "isa/x86/cpuid.h"
#include "isa/x86/insn.h"
#include "isa/x86/xsave.h"

#define FILL_ZONE 0x400u        /* start of the code pages that no case uses: pointers in data lead there */
#define ROOM 96u                /* code bytes that an instruction with all its fix-ups may take */
#define TRIES 4000u

enum register_use { REG_FREE, REG_KNOWN, REG_UNKNOWN };

/* A value that depends on where an instruction ends up. */
struct patch {
    enum { PATCH_RELATIVE, PATCH_IMMEDIATE, PATCH_REGISTER } kind;
    uint16_t where;             /* offset in code[], or register */
    uint8_t size;
    uint16_t insn;              /* the one whose operand it is */
};

struct generator {
    struct rng rng;
    const struct generate_options *options;
    struct cpu_case *c;
    uint8_t use[16];
    uint64_t value[16];         /* of known registers, where code has been generated up to */
    uint64_t initial[16];       /* of all but free ones */
    uint32_t vectors_set;       /* vector registers that have their value already */
    struct patch patch[MAX_INSNS * 2];
    unsigned patches;
};

static pthread_once_t once = PTHREAD_ONCE_INIT;
static ZydisDecoder decoder64, decoder32, decoder16;
static const struct x86_cpu_model *host_model;
static uint64_t host_xcr0;
static struct encode_pool pool64, pool32, pool16;       /* with generate_options.only */

static void setup(void)
{
    unsigned eax, ebx = 0, ecx = 0, edx;
    ZydisDecoder *d[3] = { &decoder64, &decoder32, &decoder16 };

    __get_cpuid(0, &eax, &ebx, &ecx, &edx);
    ZydisDecoderInit(d[0], ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
    ZydisDecoderInit(d[1], ZYDIS_MACHINE_MODE_LEGACY_32, ZYDIS_STACK_WIDTH_32);
    ZydisDecoderInit(d[2], ZYDIS_MACHINE_MODE_LEGACY_16, ZYDIS_STACK_WIDTH_16);
    for (unsigned i = 0; i < 3; i++) {
        ZydisDecoderEnableMode(d[i], ZYDIS_DECODER_MODE_AMD_BRANCHES, ebx == signature_AMD_ebx);
        ZydisDecoderEnableMode(d[i], ZYDIS_DECODER_MODE_MPX, ZYAN_FALSE);
        ZydisDecoderEnableMode(d[i], ZYDIS_DECODER_MODE_CET, ZYAN_FALSE);
        ZydisDecoderEnableMode(d[i], ZYDIS_DECODER_MODE_CLDEMOTE, ZYAN_FALSE);
    }
    host_model = x86_cpu_model_find("host");
    __get_cpuid(1, &eax, &ebx, &ecx, &edx);
    if (ecx & bit_OSXSAVE)
        __asm__("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
    host_xcr0 = ecx & bit_OSXSAVE ? (uint64_t)edx << 32 | eax : 3;
}

/* State components that only the native side has: no case asks for them. */
static uint64_t native_components(const struct generate_options *o)
{
    return o->model ? host_xcr0 & ~o->model->xcr0_allowed : 0;
}

/* ---- values ---- */

static uint64_t truncate(uint64_t v, unsigned bytes) { return bytes >= 8 ? v : v & ((1ull << (bytes * 8)) - 1); }

static uint64_t any_integer(struct rng *r)
{
    static const uint64_t edges[] = {
        0, 1, 2, 0x7f, 0x80, 0xff, 0x100, 0x7fff, 0x8000, 0xffff, 0x10000, 0x7fffffff, 0x80000000, 0xffffffff, 0x100000000,
        0x7fffffffffffffff, 0x8000000000000000, 0xffffffffffffffff, 0xffffffff80000000, 0xfffffffffffffffe,
        0x00007fffffffffff, 0x0000800000000000, 0xffff800000000000, 0x0101010101010101, 0x5555555555555555,
    };
    uint64_t v = rng64(r);

    switch (rng_below(r, 8)) {
    case 0: return RNG_PICK(r, edges);
    case 1: return RNG_PICK(r, edges) + (v & 7) - 3;
    case 2: return v & 0x3f;
    case 3: return (uint64_t)(int64_t)(int8_t)v;
    case 4: return 1ull << (v & 63);
    case 5: return (uint64_t)(int64_t)(int32_t)v;
    default: return v;
    }
}

static uint64_t any_double(struct rng *r)
{
    static const uint64_t special[] = {
        0, 0x8000000000000000, 0x3ff0000000000000, 0xbff0000000000000, 0x7ff0000000000000, 0xfff0000000000000,
        0x7ff8000000000000, 0x7ff0000000000001, 0xfff8000000000000, 1, 0x8000000000000001, 0x000fffffffffffff,
        0x0010000000000000, 0x7fefffffffffffff, 0x43e0000000000000, 0xc3e0000000000000, 0x41dfffffffc00000,
        0x41e0000000000000, 0x3fe0000000000000, 0x4008000000000000, 0x3fd5555555555555,
    };
    uint64_t v = rng64(r);

    if (v & 1)
        return RNG_PICK(r, special);
    /* Exponents near each other, so that sums and products neither vanish nor overflow always. */
    return (v & 0x800fffffffffffff) | (0x3f0ull + (v >> 52 & 0x1f)) << 52;
}

static uint32_t any_float(struct rng *r)
{
    static const uint32_t special[] = {
        0, 0x80000000, 0x3f800000, 0xbf800000, 0x7f800000, 0xff800000, 0x7fc00000, 0x7f800001, 0xffc00000, 1, 0x80000001,
        0x007fffff, 0x00800000, 0x7f7fffff, 0x4f000000, 0xcf000000, 0x5f000000, 0x3f000000, 0x40400000, 0x3eaaaaab,
    };
    uint64_t v = rng64(r);

    if (v & 1)
        return RNG_PICK(r, special);
    return ((uint32_t)(v >> 32) & 0x807fffff) | (uint32_t)(0x70 + (v >> 8 & 0x1f)) << 23;
}

static void any_vector(struct rng *r, uint8_t v[64])
{
    switch (rng_below(r, 8)) {
    case 0:
        memset(v, rng_percent(r, 60) ? 0 : 0xff, 64);
        return;
    case 1: case 2:
        for (unsigned i = 0; i < 8; i++)
            store_le64(v + i * 8, any_double(r));
        return;
    case 3: case 4:
        for (unsigned i = 0; i < 16; i++)
            store_le32(v + i * 4, any_float(r));
        return;
    case 5:
        for (unsigned i = 0; i < 8; i++)
            store_le64(v + i * 8, any_integer(r));
        return;
    default:
        for (unsigned i = 0; i < 8; i++)
            store_le64(v + i * 8, rng64(r));
    }
}

static void any_extended(struct rng *r, uint8_t v[10])
{
    static const struct { uint16_t exponent; uint64_t mantissa; } special[] = {
        { 0, 0 }, { 0x8000, 0 }, { 0x3fff, 1ull << 63 }, { 0xbfff, 1ull << 63 }, { 0x7fff, 1ull << 63 }, { 0xffff, 1ull << 63 },
        { 0x7fff, 3ull << 62 }, { 0xffff, 3ull << 62 }, { 0x7fff, 1ull << 63 | 1 }, { 0, 1 }, { 0, 1ull << 63 },
        { 0x8000, 0x7fffffffffffffff }, { 1, 1ull << 63 }, { 0x7ffe, ~0ull }, { 0x3fff, 1ull << 62 }, { 0x7fff, 0 },
        { 0x4000, 0xc90fdaa22168c235 }, { 0x3ffe, 1ull << 63 }, { 0x403e, 1ull << 63 }, { 0xc03e, 1ull << 63 }, { 0x4001, 5ull << 61 },
        { 0x401e, 0xfffffffe00000000 }, { 0x400e, 0xfffe000000000000 },
    };
    uint64_t x = rng64(r);
    uint16_t exponent = (uint16_t)((x & 0x8000) | (0x3fe0 + (x >> 16 & 0x7f)));
    uint64_t mantissa = rng64(r) | 1ull << 63;

    if (rng_percent(r, 50)) {
        unsigned i = rng_below(r, ARRAY_SIZE(special));

        exponent = special[i].exponent;
        mantissa = special[i].mantissa;
    } else if (rng_percent(r, 10)) {
        exponent = (uint16_t)x;
        mantissa = rng64(r);
    } else if (rng_percent(r, 40)) {
        mantissa &= ~0ull << (x >> 24 & 63);    /* small integers and short fractions */
        mantissa |= 1ull << 63;
    }
    store_le64(v, mantissa);
    store_le16(v + 8, exponent);
}

/* The exception summary follows from flags and masks. */
static uint16_t consistent_fsw(uint16_t fcw, uint16_t fsw)
{
    fsw &= 0x7f7f;
    return fsw & ~fcw & 0x3f ? fsw | 0x8080 : fsw;
}

static void any_fpu(struct generator *g, struct x86_fpu *f)
{
    static const uint16_t precision[] = { 0x300, 0x300, 0x300, 0x200, 0 };
    struct rng *r = &g->rng;
    uint64_t v = rng64(r);

    for (unsigned i = 0; i < 32; i++)
        if (!(g->vectors_set & 1u << i))
            any_vector(r, f->zmm[i]);
    for (unsigned i = 0; i < 8; i++) {
        f->k[i] = rng_percent(r, 30) ? any_integer(r) : rng64(r);
        any_extended(r, f->st[i]);
    }
    f->fcw = (uint16_t)(0x40 | RNG_PICK(r, precision) | (v & 0xc00) | 0x3f);
    if (rng_percent(r, 15))
        f->fcw &= (uint16_t)(v >> 16 | 0xffc0);
    f->fsw = (uint16_t)(v >> 32 & 0x7f00);
    if (rng_percent(r, 25))
        f->fsw |= v >> 48 & 0x7f;
    f->fsw = consistent_fsw(f->fcw, f->fsw);
    f->ftw = rng_percent(r, 30) ? 0xff : rng_percent(r, 30) ? 0 : (uint8_t)(v >> 56);
    if (f->fsw & 0x80) {        /* else a task switch of the host loses them */
        f->fop = (uint16_t)rng64(r) & 0x7ff;
        f->fip = CODE_BASE + rng_below(r, CODE_SIZE);
        f->fdp = WINDOW_LOW + rng_below(r, 0x8000);
    }
    v = rng64(r);
    f->mxcsr = (uint32_t)(0x1f80 | (v & 0x6000));
    if (rng_percent(r, 30))
        f->mxcsr |= v >> 16 & 0x3f;
    if (rng_percent(r, 25))
        f->mxcsr |= v >> 24 & 0x8040;
    if (rng_percent(r, 15))
        f->mxcsr &= (uint32_t)(v >> 32) | ~0x1f80u;
    if (rng_percent(r, 5))
        x86_fpu_init_components(f, v >> 40 & 0xe7, 16);
}

/* ---- data memory ---- */

void generate_data(uint8_t data[DATA_SIZE], const struct generate_options *o, uint64_t number)
{
    struct rng r = { o->seed * 0x9e3779b97f4a7c15u + number / BATCH * 0xd1342543de82ef95u + 77 };

    pthread_once(&once, setup);
    rng64(&r);
    for (unsigned i = 0; i < DATA_SIZE; i += 64) {
        unsigned kind = rng_below(&r, 8);

        for (unsigned k = 0; k < 64; k += 8) {
            uint64_t v = rng64(&r);

            switch (kind) {
            case 0: v = rng_percent(&r, 80) ? 0 : v; break;
            case 1: v = any_double(&r); break;
            case 2: v = (uint64_t)any_float(&r) << 32 | any_float(&r); break;
            case 3: v = any_integer(&r); break;
            case 4: v = CODE_BASE + v % FILL_ZONE; break;
            case 5: v = 0x1f80 | (v & 0xffff0000ffffull); break;
            }
            store_le64(data + i + k, v);
        }
    }
    /* Images for FXRSTOR and XRSTOR at the beginning of the read-only page: legacy area, then an empty header. */
    uint8_t *image = data + 2 * 4096;

    store_le16(image, 0x37f);
    store_le32(image + 24, 0x1f80 | (rng64(&r) & 0xe07f));
    memset(image + 512, 0, 64);
    store_le64(image + 512, rng64(&r) & x86_xsave_host_components() & ~native_components(o));
}

/* ---- which instructions ---- */

/* Sensitive and privileged instructions with which programs always get the same. */
static bool user_visible(const struct x86_insn *insn)
{
    switch (insn->mnemonic) {
    case ZYDIS_MNEMONIC_PUSHF: case ZYDIS_MNEMONIC_PUSHFD: case ZYDIS_MNEMONIC_PUSHFQ: case ZYDIS_MNEMONIC_POPF:
    case ZYDIS_MNEMONIC_POPFD: case ZYDIS_MNEMONIC_POPFQ:
    case ZYDIS_MNEMONIC_RDFSBASE: case ZYDIS_MNEMONIC_RDGSBASE: case ZYDIS_MNEMONIC_WRFSBASE: case ZYDIS_MNEMONIC_WRGSBASE:
    case ZYDIS_MNEMONIC_FXSAVE: case ZYDIS_MNEMONIC_FXSAVE64: case ZYDIS_MNEMONIC_FXRSTOR: case ZYDIS_MNEMONIC_FXRSTOR64:
    case ZYDIS_MNEMONIC_XSAVE: case ZYDIS_MNEMONIC_XSAVE64: case ZYDIS_MNEMONIC_XSAVEOPT: case ZYDIS_MNEMONIC_XSAVEOPT64:
    case ZYDIS_MNEMONIC_XSAVEC: case ZYDIS_MNEMONIC_XSAVEC64: case ZYDIS_MNEMONIC_XRSTOR: case ZYDIS_MNEMONIC_XRSTOR64:
    case ZYDIS_MNEMONIC_FNSTENV: case ZYDIS_MNEMONIC_FNSAVE:
    case ZYDIS_MNEMONIC_INT3: case ZYDIS_MNEMONIC_INTO: case ZYDIS_MNEMONIC_BOUND:
    case ZYDIS_MNEMONIC_UD0: case ZYDIS_MNEMONIC_UD1: case ZYDIS_MNEMONIC_UD2:
    /* Always a general protection fault. */
    case ZYDIS_MNEMONIC_HLT: case ZYDIS_MNEMONIC_CLTS: case ZYDIS_MNEMONIC_LMSW: case ZYDIS_MNEMONIC_LGDT:
    case ZYDIS_MNEMONIC_LIDT: case ZYDIS_MNEMONIC_LLDT: case ZYDIS_MNEMONIC_LTR: case ZYDIS_MNEMONIC_INVLPG:
    case ZYDIS_MNEMONIC_INVD: case ZYDIS_MNEMONIC_WBINVD: case ZYDIS_MNEMONIC_RDMSR: case ZYDIS_MNEMONIC_WRMSR:
    case ZYDIS_MNEMONIC_CLI: case ZYDIS_MNEMONIC_STI: case ZYDIS_MNEMONIC_IN: case ZYDIS_MNEMONIC_OUT:
    case ZYDIS_MNEMONIC_INSB: case ZYDIS_MNEMONIC_INSW: case ZYDIS_MNEMONIC_INSD: case ZYDIS_MNEMONIC_OUTSB:
    case ZYDIS_MNEMONIC_OUTSW: case ZYDIS_MNEMONIC_OUTSD: case ZYDIS_MNEMONIC_SWAPGS: case ZYDIS_MNEMONIC_SYSRET:
    case ZYDIS_MNEMONIC_XSETBV:
        return true;
    case ZYDIS_MNEMONIC_MOV:
        return insn->operand[0].kind != OPERAND_SEG;
    case ZYDIS_MNEMONIC_PUSH:
        return true;
    case ZYDIS_MNEMONIC_INT:    /* Linux' system calls, and what hypervisors and debuggers might catch */
        return (uint8_t)insn->imm[0] > 31 && (uint8_t)insn->imm[0] != 0x80;
    default:
        return false;
    }
}

/* Those of them that do the same at privilege level 0, and leave nothing different behind. */
static bool same_in_kernel(const struct x86_insn *insn)
{
    if (x86_classify(insn) == X86_PRIVILEGED)
        return false;
    switch (insn->mnemonic) {
    case ZYDIS_MNEMONIC_POPF: case ZYDIS_MNEMONIC_POPFD: case ZYDIS_MNEMONIC_POPFQ: case ZYDIS_MNEMONIC_INT:
    case ZYDIS_MNEMONIC_CLI: case ZYDIS_MNEMONIC_STI: case ZYDIS_MNEMONIC_IN: case ZYDIS_MNEMONIC_OUT:
    case ZYDIS_MNEMONIC_INSB: case ZYDIS_MNEMONIC_INSW: case ZYDIS_MNEMONIC_INSD: case ZYDIS_MNEMONIC_OUTSB:
    case ZYDIS_MNEMONIC_OUTSW: case ZYDIS_MNEMONIC_OUTSD:
        return false;
    case ZYDIS_MNEMONIC_MOV:    /* selectors */
        return insn->operand[1].kind != OPERAND_SEG && user_visible(insn);
    default:
        return user_visible(insn);
    }
}

/* XSAVE and its kin: EDX:EAX says of which components. */
static bool names_components(uint16_t mnemonic)
{
    switch (mnemonic) {
    case ZYDIS_MNEMONIC_XSAVE: case ZYDIS_MNEMONIC_XSAVE64: case ZYDIS_MNEMONIC_XSAVEOPT: case ZYDIS_MNEMONIC_XSAVEOPT64:
    case ZYDIS_MNEMONIC_XSAVEC: case ZYDIS_MNEMONIC_XSAVEC64: case ZYDIS_MNEMONIC_XRSTOR: case ZYDIS_MNEMONIC_XRSTOR64:
        return true;
    default:
        return false;
    }
}

/* Their stack holds no selectors but by chance, so they all fault. Only where they are asked for. */
static bool returns_far(const struct x86_insn *insn)
{
    switch (insn->mnemonic) {
    case ZYDIS_MNEMONIC_IRET: case ZYDIS_MNEMONIC_IRETD: case ZYDIS_MNEMONIC_IRETQ: return true;
    case ZYDIS_MNEMONIC_RET: return x86_is_far(insn);
    default: return false;
    }
}

static bool acceptable(const struct generator *g, const struct x86_insn *insn)
{
    switch (insn->mnemonic) {
    case ZYDIS_MNEMONIC_INVALID:
    case ZYDIS_MNEMONIC_XGETBV:
    case ZYDIS_MNEMONIC_RDRAND: case ZYDIS_MNEMONIC_RDSEED:
        return false;
    }
    if (g->options->only && !g->options->kernel && returns_far(insn))
        return true;
    if (x86_classify(insn) != X86_INNOCUOUS && !(g->options->kernel ? same_in_kernel(insn) : user_visible(insn)))
        return false;
    /* A Zen 5 broadcasts RSP as it was before the POP in front. */
    if (insn->has_evex && insn->operands > 1 && insn->operand[1].kind == OPERAND_GPR && insn->operand[1].reg == RSP)
        return false;
    if (!host_model || !x86_model_has_insn(host_model, insn) ||
        (g->options->model && !x86_model_has_insn(g->options->model, insn)))
        return false;
    /* RAX then names components that both sides have: it must not have had another value before, nor be needed for the address. */
    if (names_components(insn->mnemonic) && native_components(g->options) &&
        (g->c->insns || insn->mem.base == RAX || insn->mem.index == RAX))
        return false;
    return !g->options->only || g->options->only[insn->mnemonic];
}

static bool wanted(void *opaque, const struct x86_insn *insn)
{
    const struct generator *g = opaque;

    return g->options->only[insn->mnemonic] && acceptable(g, insn);
}

static void encode(struct generator *g, struct bytes *o)
{
    unsigned code_size = g->c->code_size;
    struct encode_pool *p = code_size == 8 ? &pool64 : code_size == 4 ? &pool32 : &pool16;

    if (!g->options->only) {
        encode_random(o, &g->rng, code_size);
        return;
    }
    if (!p->searched)
        encode_find(p, code_size, wanted, g);
    encode_like(o, p, &g->rng, code_size);
}

/* ---- emitting ---- */

static void append(struct generator *g, const uint8_t *bytes, unsigned length, unsigned mnemonic)
{
    struct cpu_case *c = g->c;

    memcpy(c->code + c->bytes, bytes, length);
    c->insn[c->insns++] = (struct case_insn){ .offset = c->bytes, .length = (uint8_t)length, .mnemonic = (uint16_t)mnemonic };
    c->bytes = (uint16_t)(c->bytes + length);
}

static void take_value(struct generator *g, unsigned reg)
{
    if (g->use[reg] != REG_FREE)
        return;
    g->use[reg] = REG_KNOWN;
    g->value[reg] = g->initial[reg] = truncate(any_integer(&g->rng), g->c->code_size);
}

/* Makes the register hold v when the next instruction starts. Returns where the value is in the code, 0 if in the initial state. */
static unsigned set_register(struct generator *g, unsigned reg, uint64_t v)
{
    uint8_t mov[10];
    unsigned n = 0, size = g->c->code_size;

    if (g->use[reg] == REG_FREE) {
        g->use[reg] = REG_KNOWN;
        g->value[reg] = g->initial[reg] = v;
        return 0;
    }
    if (size == 8)
        mov[n++] = (uint8_t)(0x48 | reg >> 3);
    mov[n++] = (uint8_t)(0xb8 | (reg & 7));
    memcpy(mov + n, &v, size);
    append(g, mov, n + size, ZYDIS_MNEMONIC_MOV);
    g->use[reg] = REG_KNOWN;
    g->value[reg] = truncate(v, size);
    return (unsigned)(g->c->bytes - size);
}

/* ---- addresses ---- */

static uint64_t window_base(struct generator *g, bool high_reachable)
{
    return high_reachable && rng_percent(&g->rng, 35) ? WINDOW_HIGH : WINDOW_LOW;
}

/* Where an access of size bytes should go. */
static uint64_t any_address(struct generator *g, unsigned size, bool wide)
{
    static const uint64_t odd[] = { 0x00007ffffffffff0, 0x00007fffffffffff, 0x0000800000000000, 0xffff7fffffffffff,
                                    0xffff800000000000, 0xfffffffffffffff8, 0xffffffffffffffff, 0, 8, 0x4000000000000000 };
    static const uint8_t good[] = { 1, 2, 3, 4, 6 };
    static const uint8_t borders[] = { 1, 2, 2, 2, 3, 4, 5, 6, 7 };
    struct rng *r = &g->rng;
    uint64_t base = window_base(g, wide);
    unsigned kind = rng_below(r, 100), span = size ? size : 1, offset;

    if (kind < 68) {
        unsigned page = RNG_PICK(r, good);

        /* The read-only page is often wrong: take it less. */
        if (page == 3 && rng_percent(r, 60))
            page = 4;
        offset = rng_below(r, span < 4096 ? 4097 - span : 1);
        if (rng_percent(r, 65))
            offset &= ~((span > 64 ? 64u : span & -span) - 1);
        return base + page * 4096 + offset;
    }
    if (kind < 85)
        return base + RNG_PICK(r, borders) * 4096 - rng_below(r, span + 1);
    if (kind < 88)
        return base + 4 * 4096 + rng_below(r, 64) * 64;
    if (kind < 92)
        return base + (rng_percent(r, 50) ? 5 : 7) * 4096 + rng_below(r, 4096);
    if (kind < 95)
        return EDGE_HIGH - rng_below(r, span + 1);
    if (wide)
        return RNG_PICK(r, odd);
    return rng64(r);
}

static uint64_t segment_base(const struct generator *g, const struct x86_insn *insn)
{
    if (g->c->code_size == 2)
        return insn->mem.seg == SEG_CS ? CODE_BASE : insn->mem.seg < SEG_FS ? WINDOW_LOW : 0;
    if (g->c->code_size != 8)
        return 0;
    return insn->mem.seg == SEG_FS ? g->c->in.fs_base : insn->mem.seg == SEG_GS ? g->c->in.gs_base : 0;
}

static void any_indexes(struct generator *g, const struct x86_insn *insn)
{
    unsigned v = insn->mem.index, element = 8;
    int64_t reach = 1 + rng_below(&g->rng, rng_percent(&g->rng, 70) ? 200 : 6000);

    if (g->vectors_set & 1u << v)
        return;
    g->vectors_set |= 1u << v;
    switch (insn->mnemonic) {
    case ZYDIS_MNEMONIC_VPGATHERDD: case ZYDIS_MNEMONIC_VPGATHERDQ: case ZYDIS_MNEMONIC_VGATHERDPS: case ZYDIS_MNEMONIC_VGATHERDPD:
    case ZYDIS_MNEMONIC_VPSCATTERDD: case ZYDIS_MNEMONIC_VPSCATTERDQ: case ZYDIS_MNEMONIC_VSCATTERDPS:
    case ZYDIS_MNEMONIC_VSCATTERDPD:
        element = 4;
    }
    for (unsigned i = 0; i < 64 / element; i++) {
        int64_t x = (int64_t)(rng64(&g->rng) >> 1) % (2 * reach) - reach;

        memcpy(g->c->in.fpu.zmm[v] + i * element, &x, element);
    }
}

/* Steers the encoded memory operand; may emit MOVs, and changes the displacement in bytes[]. */
static void steer(struct generator *g, const struct x86_insn *insn, uint8_t *bytes, unsigned size)
{
    const struct x86_mem *m = &insn->mem;
    bool has_index = m->index < 16 && !m->vsib_size, has_base = m->base < 16;
    uint64_t target = any_address(g, size, m->addr_size == 8 && g->c->code_size == 8), rest;

    if (rng_percent(&g->rng, 3))
        return;
    if (m->vsib_size)
        any_indexes(g, insn);
    rest = target - segment_base(g, insn) - (uint64_t)m->disp;
    if (has_index && m->index != m->base) {
        if (g->use[m->index] != REG_KNOWN || rng_percent(&g->rng, 50))
            set_register(g, m->index, rng_percent(&g->rng, 80) ? truncate((uint64_t)((int64_t)rng_below(&g->rng, 256) - 128), g->c->code_size)
                                                               : truncate(any_integer(&g->rng), g->c->code_size));
        rest -= truncate(g->value[m->index], m->addr_size) * m->scale;
    }
    if (has_base && m->base != RSP && !(has_index && m->index == m->base)) {
        uint64_t v = truncate(rest, m->addr_size);

        if (m->addr_size < g->c->code_size && rng_percent(&g->rng, 50))
            v |= rng64(&g->rng) << 32;
        set_register(g, m->base, truncate(v, g->c->code_size));
        return;
    }
    if (insn->disp_size < MIN(m->addr_size, 4) || !insn->disp_offset)
        return;
    /* The displacement has to do it. */
    rest += (uint64_t)m->disp;
    if (m->base == X86_REG_RIP)
        rest -= CODE_BASE + g->c->start + g->c->bytes + insn->length;
    if (has_base && g->use[m->base] == REG_KNOWN)
        rest -= g->value[m->base];
    if (has_index && m->index == m->base && g->use[m->base] == REG_KNOWN)
        rest -= g->value[m->base] * m->scale;
    memcpy(bytes + insn->disp_offset, &rest, insn->disp_size);
}

/* Patches that set registers to the address of a later instruction. */
static void lead_register(struct generator *g, unsigned reg)
{
    unsigned where;

    if (reg == RSP)
        return;
    where = set_register(g, reg, CODE_BASE);
    g->use[reg] = REG_UNKNOWN;
    g->patch[g->patches++] = (struct patch){ .kind = where ? PATCH_IMMEDIATE : PATCH_REGISTER,
                                             .where = (uint16_t)(where ? where : reg), .size = g->c->code_size,
                                             .insn = g->c->insns };
}

/* ---- what certain instructions need ---- */

static uint64_t any_count(struct generator *g, unsigned addr_size)
{
    static const uint16_t limits[] = { 1, 3, 20, 20, 100, 100, 600, 5000 };
    uint64_t n = rng_below(&g->rng, RNG_PICK(&g->rng, limits) + 1u);

    return addr_size < g->c->code_size && rng_percent(&g->rng, 50) ? n | rng64(&g->rng) << 32 : n;
}

static unsigned element_size(const struct x86_insn *insn)
{
    for (unsigned i = 0; i < insn->operands; i++)
        if (insn->operand[i].kind == OPERAND_MEM && insn->operand[i].size)
            return insn->operand[i].size;
    return 1;
}

static void prepare_hidden_memory(struct generator *g, const ZydisDecodedOperand *o, const struct x86_insn *insn)
{
    ZydisRegister base = ZydisRegisterGetLargestEnclosing(ZYDIS_MACHINE_MODE_LONG_64, o->mem.base);
    uint64_t target = any_address(g, element_size(insn), g->c->code_size == 8 && insn->addr_size == 8);
    unsigned reg;

    if (base < ZYDIS_REGISTER_RAX || base > ZYDIS_REGISTER_R15)
        return;
    reg = base - ZYDIS_REGISTER_RAX;
    if (reg == RSP)
        return;
    /* Fast strings look at virtual addresses: with overlapping aliases they do not copy in order. */
    if (insn->mnemonic >= ZYDIS_MNEMONIC_MOVSB && insn->category == ZYDIS_CATEGORY_STRINGOP && target - WINDOW_HIGH < WINDOW_PAGES * 4096)
        target -= WINDOW_HIGH - WINDOW_LOW;
    if (g->c->code_size == 2)
        target -= WINDOW_LOW;
    else if (o->mem.segment == ZYDIS_REGISTER_FS || o->mem.segment == ZYDIS_REGISTER_GS)
        target -= segment_base(g, insn);
    if (insn->addr_size < g->c->code_size && rng_percent(&g->rng, 50))
        target = truncate(target, insn->addr_size) | rng64(&g->rng) << (insn->addr_size * 8);
    set_register(g, reg, truncate(target, g->c->code_size));
}

static void prepare(struct generator *g, const struct x86_insn *insn, const ZydisDecodedInstruction *z,
                    const ZydisDecodedOperand *operand)
{
    struct rng *r = &g->rng;
    bool few = rng_percent(r, 85);

    for (unsigned i = 0; i < z->operand_count; i++)
        if (operand[i].type == ZYDIS_OPERAND_TYPE_MEMORY && operand[i].visibility == ZYDIS_OPERAND_VISIBILITY_HIDDEN)
            prepare_hidden_memory(g, &operand[i], insn);
    if (insn->rep || insn->repne)
        set_register(g, RCX, truncate(any_count(g, insn->addr_size), g->c->code_size));
    if (names_components(insn->mnemonic))
        set_register(g, RAX, rng64(r) & 0xffffffff & ~native_components(g->options));

    switch (insn->mnemonic) {
    case ZYDIS_MNEMONIC_DIV: case ZYDIS_MNEMONIC_IDIV:
        if (few)
            set_register(g, RDX, rng_percent(r, 70) ? 0 : truncate(~0ull, g->c->code_size));
        if (few && rng_percent(r, 60))
            set_register(g, RAX, rng_below(r, 30000));
        break;
    case ZYDIS_MNEMONIC_BT: case ZYDIS_MNEMONIC_BTS: case ZYDIS_MNEMONIC_BTR: case ZYDIS_MNEMONIC_BTC:
        if (few && insn->has_mem && insn->operand[1].kind == OPERAND_GPR && insn->operand[1].reg != RSP &&
            insn->operand[1].reg != insn->mem.base && insn->operand[1].reg != insn->mem.index)
            set_register(g, insn->operand[1].reg, truncate((uint64_t)((int64_t)rng_below(r, 1000) - 500), g->c->code_size));
        break;
    case ZYDIS_MNEMONIC_JMP: case ZYDIS_MNEMONIC_CALL:
        if (insn->operand[0].kind == OPERAND_GPR && few)
            lead_register(g, insn->operand[0].reg);
        break;
    default:
        break;
    }
}

/* The memory image of FXRSTOR and XRSTOR is random elsewhere. */
static bool restores_image(const struct x86_insn *insn)
{
    switch (insn->mnemonic) {
    case ZYDIS_MNEMONIC_FXRSTOR: case ZYDIS_MNEMONIC_FXRSTOR64: case ZYDIS_MNEMONIC_XRSTOR: case ZYDIS_MNEMONIC_XRSTOR64:
        return true;
    default:
        return false;
    }
}

static unsigned access_size(const struct x86_insn *insn)
{
    switch (insn->mnemonic) {
    case ZYDIS_MNEMONIC_FXSAVE: case ZYDIS_MNEMONIC_FXSAVE64: return 512;
    case ZYDIS_MNEMONIC_XSAVE: case ZYDIS_MNEMONIC_XSAVE64: case ZYDIS_MNEMONIC_XSAVEOPT: case ZYDIS_MNEMONIC_XSAVEOPT64:
    case ZYDIS_MNEMONIC_XSAVEC: case ZYDIS_MNEMONIC_XSAVEC64: return 2560;
    default: break;
    }
    for (unsigned i = 0; i < insn->operands; i++)
        if (insn->operand[i].kind == OPERAND_MEM && !insn->operand[i].implicit)
            return insn->operand[i].size;
    return 1;
}

static int gpr_number(ZydisRegister reg)
{
    ZydisRegister full = ZydisRegisterGetLargestEnclosing(ZYDIS_MACHINE_MODE_LONG_64, reg);

    return full >= ZYDIS_REGISTER_RAX && full <= ZYDIS_REGISTER_R15 ? (int)(full - ZYDIS_REGISTER_RAX) : -1;
}

/* Registers that the instruction reads get values, those that it writes are not known any more. */
static void note_registers(struct generator *g, const ZydisDecodedInstruction *z, const ZydisDecodedOperand *operand)
{
    for (unsigned pass = 0; pass < 2; pass++) {
        for (unsigned i = 0; i < z->operand_count; i++) {
            const ZydisDecodedOperand *o = &operand[i];
            int reg;

            if (o->type == ZYDIS_OPERAND_TYPE_MEMORY) {
                if ((reg = gpr_number(o->mem.base)) >= 0)
                    take_value(g, (unsigned)reg);
                if ((reg = gpr_number(o->mem.index)) >= 0)
                    take_value(g, (unsigned)reg);
            }
            if (o->type != ZYDIS_OPERAND_TYPE_REGISTER || (reg = gpr_number(o->reg.value)) < 0)
                continue;
            take_value(g, (unsigned)reg);
            if (pass && o->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE)
                g->use[reg] = REG_UNKNOWN;
        }
    }
    /* Hidden ones that Zydis does not list in full. */
    if (z->meta.category == ZYDIS_CATEGORY_STRINGOP || z->attributes & ZYDIS_ATTRIB_HAS_REP)
        g->use[RSI] = g->use[RDI] = g->use[RCX] = REG_UNKNOWN;
    if (z->mnemonic == ZYDIS_MNEMONIC_POPA || z->mnemonic == ZYDIS_MNEMONIC_POPAD)
        for (unsigned i = 0; i < 8; i++)
            g->use[i] = REG_UNKNOWN;
}

static bool emit_invalid(struct generator *g)
{
    struct bytes o;
    struct x86_insn insn;
    bool gp;

    encode(g, &o);
    if (x86_decode(&insn, o.b, X86_MAX_INSN, g->c->code_size, &gp) != -22 || gp)
        return false;
    /* Instructions of virtualization, which depend on what is below this host. */
    for (unsigned i = 0; i < 5; i++)
        if (o.b[i] == 0x0f && o.b[i + 1] == 0x01)
            return false;
    append(g, o.b, X86_MAX_INSN, ZYDIS_MNEMONIC_INVALID);
    return true;
}

/* One random instruction with its fix-ups. */
static bool emit_random(struct generator *g)
{
    const ZydisDecoder *d = g->c->code_size == 8 ? &decoder64 : g->c->code_size == 4 ? &decoder32 : &decoder16;
    ZydisDecodedInstruction z;
    ZydisDecodedOperand operand[ZYDIS_MAX_OPERAND_COUNT];
    struct x86_insn insn;
    struct bytes o;
    bool gp;

    for (unsigned tries = 0;; tries++) {
        if (tries == TRIES)
            return false;
        encode(g, &o);
        if (x86_decode(&insn, o.b, X86_MAX_INSN, g->c->code_size, &gp) || !acceptable(g, &insn))
            continue;
        /* To a model without LZCNT and TZCNT they are BSR and BSF: not to the host. */
        if (ZYAN_SUCCESS(ZydisDecoderDecodeFull(d, o.b, insn.length, &z, operand)) && z.length == insn.length &&
            z.mnemonic == insn.mnemonic)
            break;
    }
    prepare(g, &insn, &z, operand);
    if (insn.has_mem) {
        if (restores_image(&insn) && insn.mem.base < 16 && insn.mem.base != RSP && insn.mem.index == X86_NO_REG &&
            rng_percent(&g->rng, 75))
            set_register(g, insn.mem.base, truncate(WINDOW_LOW + 3 * 4096 - segment_base(g, &insn) - (uint64_t)insn.mem.disp,
                                                    g->c->code_size));
        else
            steer(g, &insn, o.b, access_size(&insn));
    }
    note_registers(g, &z, operand);
    if (insn.operands && insn.operand[0].kind == OPERAND_REL)
        g->patch[g->patches++] = (struct patch){ .kind = PATCH_RELATIVE, .where = (uint16_t)(g->c->bytes + insn.imm_offset),
                                                 .size = insn.imm_size, .insn = g->c->insns };
    append(g, o.b, insn.length, insn.mnemonic);
    return true;
}

/* ---- branches ---- */

static uint64_t insn_address(const struct cpu_case *c, unsigned i)
{
    return CODE_BASE + c->start + (i < c->insns ? c->insn[i].offset : c->bytes);
}

/* A later instruction, or the end; for short branches only what they reach. */
static uint64_t later_insn(struct generator *g, unsigned insn, unsigned size)
{
    const struct cpu_case *c = g->c;
    unsigned first = insn + 1, last = c->insns;
    uint64_t end = insn_address(c, first);

    while (size == 1 && last > first && insn_address(c, last) - end > 127)
        last--;
    return insn_address(c, first + rng_below(&g->rng, last - first + 1));
}

static bool inside_case(const struct cpu_case *c, uint64_t address)
{
    return address - (CODE_BASE + c->start) < c->bytes;
}

static void apply_patches(struct generator *g)
{
    struct cpu_case *c = g->c;

    for (unsigned i = 0; i < g->patches; i++) {
        const struct patch *p = &g->patch[i];
        uint64_t target = later_insn(g, p->insn, p->kind == PATCH_RELATIVE ? p->size : 8), next, wild = rng64(&g->rng);

        switch (p->kind) {
        case PATCH_RELATIVE:
            next = insn_address(c, p->insn + 1u);
            target -= next;
            /* Elsewhere: into the filling, or where nothing is; but never between instructions of the case. */
            wild = p->size == 1 ? (uint64_t)(int64_t)(int8_t)wild : p->size == 2 ? (uint64_t)(int64_t)(int16_t)wild : (uint64_t)(int64_t)(int32_t)wild;
            if (rng_percent(&g->rng, 8) && !inside_case(c, c->code_size == 2 ? CODE_BASE | ((next + wild) & 0xffff) : next + wild))
                target = wild;
            memcpy(c->code + p->where, &target, p->size);
            break;
        case PATCH_IMMEDIATE:
            memcpy(c->code + p->where, &target, p->size);
            break;
        case PATCH_REGISTER:
            g->initial[p->where] = target;
            break;
        }
    }
}

/* Closes a loop over the last instructions, counted by a register that nothing else uses. */
static void emit_loop(struct generator *g)
{
    struct cpu_case *c = g->c;
    unsigned body = rng_below(&g->rng, c->insns), reg;
    int64_t back;
    uint8_t code[8];
    unsigned n = 0;
    int size;

    if (g->use[RCX] == REG_FREE && rng_percent(&g->rng, 50)) {
        set_register(g, RCX, 1 + rng_below(&g->rng, 6));
        back = (int64_t)c->insn[body].offset - (c->bytes + 2);
        if (back < -128)
            return;
        append(g, (uint8_t[]){ (uint8_t)(0xe0 + rng_below(&g->rng, 3)), (uint8_t)back }, 2, ZYDIS_MNEMONIC_LOOP);
        return;
    }
    for (reg = 0; reg < (g->c->code_size == 8 ? 16 : 8) && g->use[reg] != REG_FREE; reg++)
        ;
    if (reg >= (g->c->code_size == 8 ? 16u : 8u))
        return;
    set_register(g, reg, 1 + rng_below(&g->rng, 6));
    if (c->code_size == 8)
        code[n++] = (uint8_t)(0x48 | reg >> 3);
    code[n++] = 0xff;
    code[n++] = (uint8_t)(0xc8 | (reg & 7));
    append(g, code, n, ZYDIS_MNEMONIC_DEC);
    size = c->code_size == 2 ? 2 : 4;
    back = (int64_t)c->insn[body].offset - (c->bytes + 2 + size);
    code[0] = 0x0f;
    code[1] = 0x85;
    memcpy(code + 2, &back, size);
    append(g, code, 2u + (unsigned)size, ZYDIS_MNEMONIC_JNZ);
    g->use[reg] = REG_UNKNOWN;
}

/* ---- cases ---- */

static uint64_t any_stack(struct generator *g)
{
    struct rng *r = &g->rng;
    uint64_t base = window_base(g, g->c->code_size == 8);

    if (rng_percent(r, 85))
        return base + 0x2000 + rng_below(r, 512) * 8 - 2048;
    if (rng_percent(r, 40))
        return base + 0x2000 + rng_below(r, 4096);
    return any_address(g, 8, g->c->code_size == 8);
}

static uint64_t any_base(struct rng *r)
{
    switch (rng_below(r, 4)) {
    case 0: return 0;
    case 1: return WINDOW_LOW + rng_below(r, 0x8000);
    case 2: return WINDOW_HIGH + rng_below(r, 0x8000);
    default: return (uint64_t)((int64_t)(rng64(r) << 16) >> 16);
    }
}

static unsigned how_many(struct generator *g)
{
    struct rng *r = &g->rng;

    if (g->options->max_insns)
        return 1 + rng_below(r, g->options->max_insns);
    return rng_percent(r, 45) ? 1 : rng_percent(r, 60) ? 2 + rng_below(r, 3) : 4 + rng_below(r, 13);
}

/* What does not depend on the instructions. */
static void finish_case(struct generator *g)
{
    struct cpu_case *c = g->c;
    struct rng *r = &g->rng;

    c->in.rip = CODE_BASE + c->start;
    c->in.rflags = 0x202 | (rng64(r) & RFLAGS_ARITH) | (rng_percent(r, 15) ? RFLAGS_DF : 0) |
                   (rng_percent(r, g->options->percent_ac) ? RFLAGS_AC : 0);
    any_fpu(g, &c->in.fpu);
    if (g->options->model)
        x86_fpu_init_components(&c->in.fpu, ~g->options->model->xcr0_allowed, 16);
}

void generate_case(struct cpu_case *c, const struct generate_options *o, uint64_t number)
{
    struct generator g = { .rng = { o->seed ^ number * 0xd1342543de82ef95u }, .options = o, .c = c };
    struct rng *r = &g.rng;
    unsigned count, place;

    pthread_once(&once, setup);
    rng64(r);
    c->number = number;
    c->bytes = c->insns = 0;
    c->code_size = o->code16 ? 2 : !o->shape && rng_percent(r, o->percent32) ? 4 : 8;
    memset(&c->in, 0, sizeof(c->in));
    c->in.fs_base = any_base(r);
    c->in.gs_base = any_base(r);
    place = rng_below(r, 100);
    c->start = (uint16_t)(place < 12 ? 4096 - rng_below(r, 48) : place < 14 ? CODE_SIZE - 1 - rng_below(r, 48)
                                                                          : FILL_ZONE + rng_below(r, 2048));
    if (o->shape) {
        generate_shape(c, o->shape - 1, r);
        if (c->start + c->bytes > CODE_SIZE)
            c->bytes = (uint16_t)(CODE_SIZE - c->start);
        finish_case(&g);
        return;
    }
    g.use[RSP] = REG_KNOWN;
    g.value[RSP] = g.initial[RSP] = truncate(any_stack(&g) - (c->code_size == 2 ? WINDOW_LOW : 0), c->code_size);

    count = how_many(&g);
    for (unsigned i = 0; i < count && c->bytes + ROOM < MAX_CODE && c->insns + 8u < MAX_INSNS; i++) {
        if (rng_percent(r, 1) && !o->only && emit_invalid(&g))
            break;
        if (!emit_random(&g))
            break;
    }
    if (c->insns > 1 && rng_percent(r, 15) && !(names_components(c->insn[0].mnemonic) && native_components(o)))
        emit_loop(&g);
    apply_patches(&g);
    if (c->start + c->bytes > CODE_SIZE)        /* runs off the mapped pages */
        c->bytes = (uint16_t)(CODE_SIZE - c->start);

    for (unsigned i = 0; i < 16; i++) {
        take_value(&g, i);
        c->in.gpr[i] = g.initial[i];
    }
    finish_case(&g);
}
