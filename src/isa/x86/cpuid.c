/*
 * Processor models: CPUID leaves made from the feature table (cpuid_features.def), and what instructions exist.
 *
 * The models are built once, at the first question, from the tables and the host's CPUID; then they are only read,
 * by any thread. An engine that cannot show all of a model makes a smaller one of it. All have the vendor of the host, because instructions that are run natively behave like its
 * processors. A named model shows the same on every host of that vendor that can run it.
 */
#include "isa/x86/cpuid.h"

#include <cpuid.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"
#include "device/irqchip/irqchip.h"
#include "isa/x86/cpu.h"
#include "isa/x86/xsave.h"

enum { EAX, EBX, ECX, EDX };
enum feature_kind { NATIVE, SOFT };
enum vendor { ANY, AMD, INTEL };

enum feature_id {
    F_NONE,
#define FEATURE(id, ...) F_##id,
#include "isa/x86/cpuid_features.def"
#undef FEATURE
    FEATURES
};

struct feature {
    const char *name;
    uint32_t leaf, subleaf;
    uint8_t reg, bit, level, kind, vendor;
};

static const struct feature features[FEATURES] = {
#define FEATURE(id, name, leaf, subleaf, reg, bit, level, kind, vendor) \
    [F_##id] = { name, leaf, subleaf, reg, bit, level, kind, vendor },
#include "isa/x86/cpuid_features.def"
#undef FEATURE
};

/* What an instruction set needs; a set with present = false is not offered. */
static const struct {
    bool present;
    uint8_t needs[2];
} isa_needs[ZYDIS_ISA_SET_MAX_VALUE + 1] = {
#define ISA(set, first, second) [ZYDIS_ISA_SET_##set] = { true, { F_##first, F_##second } },
#include "isa/x86/cpuid_isa.def"
#undef ISA
};

static const struct {
    uint8_t vendor;
    struct x86_cpuid_leaf leaf;
} fixed_leaves[] = {
#define LEAF(vendor, leaf, subleaf, eax, ebx, ecx, edx) { vendor, { leaf, subleaf, eax, ebx, ecx, edx } },
#include "isa/x86/cpuid_leaves.def"
#undef LEAF
};

#define MAX_LEAVES 64
#define KVM_LEAF 0x40000000u
/* KVM features: NOP_IO_DELAY, CLOCKSOURCE2, CLOCKSOURCE, CLOCKSOURCE_STABLE. */
#define KVM_FEATURES (1u << 0 | 1u << 1 | 1u << 3 | 1u << 24)

struct model {
    struct x86_cpu_model public;
    unsigned level;             /* 2, 3, 4; 9: host */
    bool has[FEATURES];
    bool isa[ZYDIS_ISA_SET_MAX_VALUE + 1];
    struct x86_cpuid_leaf leaf[MAX_LEAVES];
};

static pthread_once_t once = PTHREAD_ONCE_INIT;
static enum vendor host_vendor;
static struct model models[] = {
    { .public = { .name = "x86-64-v2", .summary = "SSE4.2, POPCNT, CMPXCHG16B" }, .level = 2 },
    { .public = { .name = "x86-64-v3", .summary = "v2 and AVX2, BMI, FMA, AES, MOVBE" }, .level = 3 },
    { .public = { .name = "x86-64-v4", .summary = "v3 and AVX-512 F, BW, CD, DQ, VL" }, .level = 4 },
    { .public = { .name = "host", .summary = "all that this host's processor can run" }, .level = 9 },
};

/* ---- building ---- */

/*
 * What the host's CPUID said, since in a virtual machine each CPUID leaves the machine, which takes tens of microseconds, and
 * each feature asks. Filled while the models are built; then only read.
 */
static struct {
    struct x86_cpuid_leaf leaf[MAX_LEAVES];
    unsigned count;
    bool full;
} host;

static void ask_host(uint32_t leaf, uint32_t subleaf, uint32_t r[4])
{
    unsigned max = __get_cpuid_max(leaf & 0x80000000u, NULL);

    memset(r, 0, 4 * sizeof(r[0]));
    if (max >= leaf)
        __cpuid_count(leaf, subleaf, r[EAX], r[EBX], r[ECX], r[EDX]);
}

static void host_cpuid(uint32_t leaf, uint32_t subleaf, uint32_t r[4])
{
    for (unsigned i = 0; i < host.count; i++) {
        const struct x86_cpuid_leaf *l = &host.leaf[i];

        if (l->leaf == leaf && l->subleaf == subleaf) {
            r[EAX] = l->eax;
            r[EBX] = l->ebx;
            r[ECX] = l->ecx;
            r[EDX] = l->edx;
            return;
        }
    }
    ask_host(leaf, subleaf, r);
    if (!host.full && host.count < MAX_LEAVES)
        host.leaf[host.count++] = (struct x86_cpuid_leaf){ leaf, subleaf, r[EAX], r[EBX], r[ECX], r[EDX] };
}

static bool host_has(const struct feature *f)
{
    uint32_t r[4];

    if (f->leaf == 7 && f->subleaf > 0) {
        host_cpuid(7, 0, r);
        if (r[EAX] < f->subleaf)
            return false;
    }
    host_cpuid(f->leaf, f->subleaf, r);
    return r[f->reg] >> f->bit & 1;
}

/* State components that a feature's registers live in. */
static uint64_t components_of(enum feature_id id)
{
    switch (id) {
    case F_AVX: case F_AVX2: case F_FMA: case F_F16C: case F_VAES: case F_VPCLMULQDQ: case F_AVX_VNNI:
        return 1u << XSTATE_AVX;
    case F_AVX512F: case F_AVX512DQ: case F_AVX512CD: case F_AVX512BW: case F_AVX512VL: case F_AVX512IFMA:
    case F_AVX512VBMI: case F_AVX512VBMI2: case F_AVX512VNNI: case F_AVX512BITALG: case F_AVX512VPOPCNTDQ:
    case F_AVX512VP2INTERSECT: case F_AVX512FP16: case F_AVX512BF16:
        return 1u << XSTATE_AVX | 7u << XSTATE_OPMASK;
    default:
        return 0;
    }
}

/* The host's processor has it, and its kernel lets programs use the registers. */
static bool host_can_run(enum feature_id id)
{
    uint64_t components = components_of(id);

    return host_has(&features[id]) && (x86_xsave_host_components() & components) == components;
}

/* The leaf to fill in, made if it is not there. */
static struct x86_cpuid_leaf *get_leaf(struct model *m, uint32_t leaf, uint32_t subleaf)
{
    struct x86_cpuid_leaf *l;

    for (unsigned i = 0; i < m->public.leaf_count; i++)
        if (m->leaf[i].leaf == leaf && m->leaf[i].subleaf == subleaf)
            return &m->leaf[i];
    if (m->public.leaf_count == MAX_LEAVES)
        __builtin_trap();       /* the tables above are longer than this file expects */
    l = &m->leaf[m->public.leaf_count++];
    l->leaf = leaf;
    l->subleaf = subleaf;
    return l;
}

static void copy_host_leaf(struct model *m, uint32_t leaf, uint32_t subleaf)
{
    uint32_t r[4];
    struct x86_cpuid_leaf *l;

    host_cpuid(leaf, subleaf, r);
    if (!(r[EAX] | r[EBX] | r[ECX] | r[EDX]))
        return;
    l = get_leaf(m, leaf, subleaf);
    l->eax = r[EAX];
    l->ebx = r[EBX];
    l->ecx = r[ECX];
    l->edx = r[EDX];
}

static void set_feature(struct model *m, enum feature_id id)
{
    const struct feature *f = &features[id];
    struct x86_cpuid_leaf *l = get_leaf(m, f->leaf, f->subleaf);
    uint32_t *reg = f->reg == EAX ? &l->eax : f->reg == EBX ? &l->ebx : f->reg == ECX ? &l->ecx : &l->edx;

    m->has[id] = true;
    *reg |= 1u << f->bit;
    /* AMD repeats these of leaf 1 EDX in the extended leaf. */
    if (host_vendor == AMD && f->leaf == 1 && f->reg == EDX && (0x0183f3ffu >> f->bit & 1))
        get_leaf(m, 0x80000001, 0)->edx |= 1u << f->bit;
}

/* Twelve bytes of a vendor, or four of something else, into registers in CPUID's order of that leaf. */
static uint32_t text4(const char *s)
{
    uint32_t v;

    memcpy(&v, s, 4);
    return v;
}

static void set_vendor(struct model *m, uint32_t leaf, uint32_t max)
{
    struct x86_cpuid_leaf *l = get_leaf(m, leaf, 0);
    uint32_t r[4];

    host_cpuid(0, 0, r);
    l->eax = max;
    l->ebx = r[EBX];
    l->ecx = r[ECX];
    l->edx = r[EDX];
}

static void set_brand(struct model *m)
{
    char brand[48] = "Ringfort ";

    if (m->level == 9) {
        for (unsigned i = 0; i < 3; i++)
            copy_host_leaf(m, 0x80000002 + i, 0);
        return;
    }
    strcat(brand, m->public.name);
    strcat(brand, " Processor");
    for (unsigned i = 0; i < 3; i++) {
        struct x86_cpuid_leaf *l = get_leaf(m, 0x80000002 + i, 0);

        l->eax = text4(brand + 16 * i);
        l->ebx = text4(brand + 16 * i + 4);
        l->ecx = text4(brand + 16 * i + 8);
        l->edx = text4(brand + 16 * i + 12);
    }
}

/* What follows from the features: XCR0 and CR4 bits, XSAVE's sizes, instruction sets. */
static void derive(struct model *m)
{
    static const struct {
        enum feature_id id;
        uint64_t bits;
    } cr4[] = {
        { F_TSC, CR4_TSD }, { F_DE, CR4_DE }, { F_PSE, CR4_PSE }, { F_PAE, CR4_PAE }, { F_MCE, CR4_MCE }, { F_PGE, CR4_PGE },
        { F_FXSR, CR4_OSFXSR }, { F_SSE, CR4_OSXMMEXCPT }, { F_UMIP, CR4_UMIP }, { F_FSGSBASE, CR4_FSGSBASE },
        { F_PCID, CR4_PCIDE }, { F_XSAVE, CR4_OSXSAVE }, { F_SMEP, CR4_SMEP }, { F_SMAP, CR4_SMAP },
    };
    struct x86_cpuid_leaf *l;

    m->public.cr4_allowed = CR4_PCE;
    for (unsigned i = 0; i < ARRAY_SIZE(cr4); i++)
        if (m->has[cr4[i].id])
            m->public.cr4_allowed |= cr4[i].bits;
    m->public.xcr0_allowed = 1u << XSTATE_X87 | 1u << XSTATE_SSE;
    if (m->has[F_AVX])
        m->public.xcr0_allowed |= 1u << XSTATE_AVX;
    if (m->has[F_AVX512F])
        m->public.xcr0_allowed |= 7u << XSTATE_OPMASK;
    if (m->has[F_XSAVE]) {
        l = get_leaf(m, 0xd, 0);
        l->eax = (uint32_t)m->public.xcr0_allowed;
        l->ecx = x86_xsave_standard_bytes(m->public.xcr0_allowed);
    }
    for (unsigned i = XSTATE_AVX; i < XSTATE_COUNT; i++) {
        if (!(m->public.xcr0_allowed >> i & 1))
            continue;
        l = get_leaf(m, 0xd, i);
        l->eax = x86_xsave_size(i);
        l->ebx = x86_xsave_offset(i);
        l->ecx = (uint32_t)x86_xsave_aligned(i) << 1;
    }
    for (unsigned i = 0; i < m->public.leaf_count; i++)
        if (m->leaf[i].leaf == 7 && m->leaf[i].subleaf > 0)
            get_leaf(m, 7, 0)->eax = MAX(get_leaf(m, 7, 0)->eax, m->leaf[i].subleaf);

    for (unsigned i = 0; i <= ZYDIS_ISA_SET_MAX_VALUE; i++) {
        const uint8_t *needs = isa_needs[i].needs;

        m->isa[i] = isa_needs[i].present && (needs[0] == F_NONE || m->has[needs[0]]) &&
                    (needs[1] == F_NONE || m->has[needs[1]]);
    }
    m->public.leaves = m->leaf;
}

/* Family 6 model 0x6a and family 0x19 model 1: server processors of 2021 that operating systems all know. */
#define SIGNATURE_INTEL 0x000606a6u
#define SIGNATURE_AMD 0x00a00f11u
#define ADDRESS_SIZES 0x302eu   /* 46 bits physical, 48 virtual */

static void build(struct model *m)
{
    bool is_host = m->level == 9, amd = host_vendor == AMD;
    uint32_t r[4], max_basic = amd ? 0xd : 0x1f, max_extended = amd ? 0x80000021 : 0x80000008;
    struct x86_cpuid_leaf *l;

    set_vendor(m, 0, max_basic);
    set_vendor(m, 0x80000000, max_extended);
    if (!amd) {
        l = get_leaf(m, 0x80000000, 0);     /* Intel says nothing more here */
        l->ebx = l->ecx = l->edx = 0;
    }
    set_brand(m);

    host_cpuid(1, 0, r);
    l = get_leaf(m, 1, 0);
    l->eax = is_host ? r[EAX] : amd ? SIGNATURE_AMD : SIGNATURE_INTEL;
    l->ebx = 8 << 8;                        /* CLFLUSH line of 8 × 8 bytes */
    if (amd)
        get_leaf(m, 0x80000001, 0)->eax = l->eax;
    get_leaf(m, 0x80000008, 0)->eax = ADDRESS_SIZES;
    if (is_host) {
        host_cpuid(0x80000008, 0, r);
        if ((r[EAX] & 0xff) >= 36 && (r[EAX] & 0xff) <= 52)
            get_leaf(m, 0x80000008, 0)->eax = (r[EAX] & 0xff) | 48 << 8;
    }

    if (is_host) {
        copy_host_leaf(m, 2, 0);
        for (unsigned i = 0; !amd && i < 8; i++)
            copy_host_leaf(m, 4, i);
        copy_host_leaf(m, 0x80000005, 0);
        copy_host_leaf(m, 0x80000006, 0);
        copy_host_leaf(m, 0x80000019, 0);
        for (unsigned i = 0; amd && i < 8; i++)
            copy_host_leaf(m, 0x8000001d, i);
        copy_host_leaf(m, 0x8000001a, 0);
    } else {
        for (unsigned i = 0; i < ARRAY_SIZE(fixed_leaves); i++)
            if (fixed_leaves[i].vendor == host_vendor)
                *get_leaf(m, fixed_leaves[i].leaf.leaf, fixed_leaves[i].leaf.subleaf) = fixed_leaves[i].leaf;
    }

    for (enum feature_id id = F_NONE + 1; id < FEATURES; id++) {
        const struct feature *f = &features[id];

        if (f->vendor != ANY && f->vendor != host_vendor)
            continue;
        if (f->level > m->level || (is_host && f->kind == NATIVE && !host_can_run(id)))
            continue;
        set_feature(m, id);
    }

    derive(m);
}

static void build_all(void)
{
    uint32_t r[4];

    host_cpuid(0, 0, r);
    host_vendor = r[EBX] == text4("Auth") || r[EBX] == text4("Hygo") ? AMD : INTEL;
    for (unsigned i = 0; i < ARRAY_SIZE(models); i++)
        build(&models[i]);
    host.full = true;
}

/* ---- questions ---- */

const struct x86_cpu_model *x86_cpu_model_at(unsigned i)
{
    pthread_once(&once, build_all);
    return i < ARRAY_SIZE(models) ? &models[i].public : NULL;
}

const struct x86_cpu_model *x86_cpu_model_find(const char *name)
{
    const struct x86_cpu_model *m;

    for (unsigned i = 0; (m = x86_cpu_model_at(i)) != NULL; i++)
        if (strcmp(m->name, name) == 0)
            return m;
    return NULL;
}

static const struct model *model_of(const struct x86_cpu_model *m)
{
    return container_of(m, struct model, public);
}

int x86_cpu_model_usable(const struct x86_cpu_model *m, const char **missing)
{
    for (enum feature_id id = F_NONE + 1; id < FEATURES; id++) {
        if (model_of(m)->has[id] && features[id].kind == NATIVE && !host_can_run(id)) {
            *missing = features[id].name;
            return -ENOTSUP;
        }
    }
    return 0;
}

static bool offers(const struct x86_cpuid_leaf *offered, unsigned count, const struct feature *f)
{
    for (unsigned i = 0; i < count; i++) {
        const struct x86_cpuid_leaf *l = &offered[i];

        if (l->leaf == f->leaf && l->subleaf == f->subleaf)
            return (f->reg == EAX ? l->eax : f->reg == EBX ? l->ebx : f->reg == ECX ? l->ecx : l->edx) >> f->bit & 1;
    }
    return false;
}

static void clear_feature(struct model *m, enum feature_id id)
{
    const struct feature *f = &features[id];
    struct x86_cpuid_leaf *l = get_leaf(m, f->leaf, f->subleaf);
    uint32_t *reg = f->reg == EAX ? &l->eax : f->reg == EBX ? &l->ebx : f->reg == ECX ? &l->ecx : &l->edx;

    m->has[id] = false;
    *reg &= ~(1u << f->bit);
    if (host_vendor == AMD && f->leaf == 1 && f->reg == EDX && (0x0183f3ffu >> f->bit & 1))
        get_leaf(m, 0x80000001, 0)->edx &= ~(1u << f->bit);
}

struct x86_cpu_model *x86_cpu_model_restrict(const struct x86_cpu_model *from, const struct x86_cpuid_leaf *offered,
                                             unsigned count, const char **missing)
{
    struct model *m = malloc(sizeof(*m));
    unsigned kept = 0;

    *missing = NULL;
    if (!m)
        return NULL;
    *m = *model_of(from);
    for (enum feature_id id = F_NONE + 1; id < FEATURES; id++) {
        if (!m->has[id] || offers(offered, count, &features[id]))
            continue;
        if (features[id].kind == NATIVE && m->level < 9) {
            *missing = features[id].name;
            free(m);
            return NULL;
        }
        clear_feature(m, id);
    }
    /* Features whose registers need XSAVE go with it; its own leaf is made anew. */
    for (enum feature_id id = F_NONE + 1; id < FEATURES; id++)
        if (m->has[id] && components_of(id) && !m->has[F_XSAVE])
            clear_feature(m, id);
    for (unsigned i = 0; i < m->public.leaf_count; i++)
        if (m->leaf[i].leaf != 0xd || (m->leaf[i].subleaf == 1 && m->has[F_XSAVE]))
            m->leaf[kept++] = m->leaf[i];
    m->public.leaf_count = kept;
    derive(m);
    return &m->public;
}

void x86_cpu_model_free(struct x86_cpu_model *m)
{
    if (m)
        free(container_of(m, struct model, public));
}

const char *x86_cpu_model_lacks(const struct x86_cpu_model *other, const struct x86_cpu_model *m)
{
    for (enum feature_id id = F_NONE + 1; id < FEATURES; id++)
        if (model_of(m)->has[id] && !model_of(other)->has[id])
            return features[id].name;
    return NULL;
}

void x86_cpu_model_select(const struct x86_cpu_model *m)
{
    x86_decode_offer(model_of(m)->has[F_LZCNT], model_of(m)->has[F_BMI1]);
}

bool x86_model_has_insn(const struct x86_cpu_model *m, const struct x86_insn *insn)
{
    /* Hypercalls belong to hypervisors' instruction sets, which no guest has otherwise. */
    if (insn->mnemonic == ZYDIS_MNEMONIC_VMCALL || insn->mnemonic == ZYDIS_MNEMONIC_VMMCALL)
        return true;
    return insn->isa_set <= ZYDIS_ISA_SET_MAX_VALUE && model_of(m)->isa[insn->isa_set];
}

static bool subleaf_matters(uint32_t leaf)
{
    return leaf == 4 || leaf == 7 || leaf == 0xb || leaf == 0xd || leaf == 0x1f || leaf == 0x8000001d;
}

/* One package, one thread per core: APIC ids are core numbers. */
static void topology(const struct x86_cpu *cpu, uint32_t leaf, uint32_t subleaf, uint32_t out[4])
{
    unsigned cpus = MAX(cpu->cpus, 1u);
    unsigned shift = cpus > 1 ? 32 - (unsigned)__builtin_clz(cpus - 1) : 0;

    switch (leaf) {
    case 1:
        out[EBX] |= (cpu->index & 0xff) << 24;
        if (cpus > 1) {
            out[EBX] |= MIN(cpus, 255u) << 16;
            out[EDX] |= 1u << 28;           /* HTT: several logical processors in the package */
        }
        break;
    case 4:
    case 0x8000001d:
        if ((out[EAX] & 0x1f) == 0)
            break;
        out[EAX] &= 0x3fff;
        if ((out[EAX] >> 5 & 7) == 3)       /* level 3 is shared by all */
            out[EAX] |= ((1u << MIN(shift, 12u)) - 1) << 14;
        if (leaf == 4)
            out[EAX] |= ((1u << MIN(shift, 6u)) - 1) << 26;
        break;
    case 0xb:
    case 0x1f:
        out[EDX] = cpu->index;
        out[ECX] = subleaf & 0xff;
        if (subleaf == 0) {
            out[EBX] = 1;
            out[ECX] |= 1 << 8;
        } else if (subleaf == 1) {
            out[EAX] = shift;
            out[EBX] = cpus;
            out[ECX] |= 2 << 8;
        }
        break;
    case 0x80000001:
        if (cpus > 1 && host_vendor == AMD)
            out[ECX] |= 1u << 1;            /* CMP_LEGACY: HTT means cores */
        break;
    case 0x80000008:
        if (host_vendor == AMD)
            out[ECX] = shift << 12 | MIN(cpus - 1, 255u);
        break;
    case 0x8000001e:
        if (host_vendor == AMD) {
            out[EAX] = cpu->index;
            out[EBX] = cpu->index & 0xff;
        }
        break;
    }
}

static void kvm_leaf(uint32_t leaf, uint32_t out[4])
{
    if (leaf == KVM_LEAF) {
        out[EAX] = KVM_LEAF + 1;
        out[EBX] = text4("KVMK");
        out[ECX] = text4("VMKV");
        out[EDX] = text4("M\0\0\0");
    } else {
        out[EAX] = KVM_FEATURES;
    }
}

/*
 * Leaf 0x15: TSC = ECX Hz × EBX / EAX, so that systems without KVM's clock need not measure it, for which there is no PIT. ECX, the "core
 * crystal", also clocks the local APIC's timer (SDM vol. 3A 11.5.4), so it is what that runs at. Linux computes ECX / 1000 × EBX in 32
 * bits: a near fraction with a small EBX.
 */
static void tsc_rate(uint64_t hz, uint32_t out[4])
{
    const uint32_t crystal = LAPIC_BUS_HZ, most = UINT32_MAX / (crystal / 1000);
    uint64_t best = UINT64_MAX;

    if (hz > UINT32_MAX * 16ull)        /* no processor's; a migrated state may say anything */
        return;

    for (uint32_t below = 1; best && below < 1u << 16; below++) {
        uint64_t above = (hz * below + crystal / 2) / crystal, product = above * crystal, error;

        if (above == 0)
            continue;
        if (above > most)
            break;
        error = (product > hz * below ? product - hz * below : hz * below - product) / below;
        if (error < best) {
            best = error;
            out[EAX] = below;
            out[EBX] = (uint32_t)above;
        }
    }
    out[ECX] = crystal;
}

void x86_cpuid(const struct x86_cpu *cpu, uint32_t leaf, uint32_t subleaf, uint32_t out[4])
{
    const struct x86_cpu_model *m = cpu->model;
    uint32_t wanted = subleaf_matters(leaf) ? subleaf : 0;

    memset(out, 0, 4 * sizeof(out[0]));
    if (leaf == KVM_LEAF || leaf == KVM_LEAF + 1) {
        kvm_leaf(leaf, out);
        return;
    }
    for (unsigned i = 0; i < m->leaf_count; i++) {
        if (m->leaves[i].leaf == leaf && m->leaves[i].subleaf == wanted) {
            out[EAX] = m->leaves[i].eax;
            out[EBX] = m->leaves[i].ebx;
            out[ECX] = m->leaves[i].ecx;
            out[EDX] = m->leaves[i].edx;
            break;
        }
    }
    if ((leaf == 0x1f || leaf == 4 || leaf == 2) && host_vendor == AMD)
        return;
    topology(cpu, leaf, subleaf, out);
    if (leaf == 0x15 && host_vendor == INTEL && cpu->tsc_hz)
        tsc_rate(cpu->tsc_hz, out);
    if (leaf == 0x16 && host_vendor == INTEL) {
        out[EAX] = out[EBX] = (uint32_t)((cpu->tsc_hz + 500000) / 1000000);
        out[ECX] = 100;
    }
    if (leaf == 1 && (cpu->s.cr4 & CR4_OSXSAVE))
        out[ECX] |= 1u << 27;
    if (leaf == 0xd && subleaf == 0)
        out[EBX] = x86_xsave_standard_bytes(cpu->s.xcr0);
    if (leaf == 0xd && subleaf == 1)
        out[EBX] = x86_xsave_compact_bytes(cpu->s.xcr0 | cpu->s.xss);
}
