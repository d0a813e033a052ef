/*
 * Processor models: what they promise stands together, and is what the host's processor has.
 */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

#include <cpuid.h>
#include <errno.h>
#include <string.h>

#include "base/util.h"
#include "isa/x86/cpu.h"
#include "isa/x86/cpuid.h"
#include "isa/x86/xsave.h"

enum { EAX, EBX, ECX, EDX };

static struct x86_cpu cpu;      /* only what x86_cpuid() looks at */

static void use(const struct x86_cpu_model *m)
{
    memset(&cpu, 0, sizeof(cpu));
    cpu.model = m;
    cpu.s.xcr0 = 1;
}

static uint32_t reg(uint32_t leaf, uint32_t subleaf, unsigned r)
{
    uint32_t out[4];

    x86_cpuid(&cpu, leaf, subleaf, out);
    return out[r];
}

static bool bit(uint32_t leaf, uint32_t subleaf, unsigned r, unsigned b)
{
    return reg(leaf, subleaf, r) >> b & 1;
}

static void models_are_listed(void **state)
{
    static const char *const names[] = { "x86-64-v2", "x86-64-v3", "x86-64-v4", "host" };
    unsigned n = 0;

    while (x86_cpu_model_at(n) != NULL)
        n++;
    assert_int_equal(n, ARRAY_SIZE(names));
    for (unsigned i = 0; i < ARRAY_SIZE(names); i++) {
        const struct x86_cpu_model *m = x86_cpu_model_find(names[i]);

        assert_non_null(m);
        assert_string_equal(m->name, names[i]);
        assert_true(strlen(m->summary) > 0);
    }
    assert_null(x86_cpu_model_find("x86-64-v5"));
    assert_null(x86_cpu_model_find(""));
}

static void host_model_is_usable(void **state)
{
    const char *missing = NULL;

    assert_int_equal(x86_cpu_model_usable(x86_cpu_model_find("host"), &missing), 0);
    assert_int_equal(x86_cpu_model_usable(x86_cpu_model_find("x86-64-v2"), &missing), 0);
}

/* v4 without AVX-512 in the host must name what is missing. */
static void usable_says_what_is_missing(void **state)
{
    const struct x86_cpu_model *v4 = x86_cpu_model_find("x86-64-v4");
    const char *missing = NULL;
    bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx2");

    if (has) {
        assert_int_equal(x86_cpu_model_usable(v4, &missing), 0);
    } else {
        assert_int_equal(x86_cpu_model_usable(v4, &missing), -ENOTSUP);
        assert_non_null(missing);
    }
}

/* The microarchitecture levels of the x86-64 psABI. */
static void levels(void **state)
{
    for (unsigned i = 0; i < 3; i++) {
        use(x86_cpu_model_at(i));
        /* v2: SSE3, SSSE3, SSE4.1, SSE4.2, POPCNT, CMPXCHG16B, LAHF. */
        assert_int_equal(reg(1, 0, ECX) & 0x00982201, 0x00982201);
        assert_true(bit(0x80000001, 0, ECX, 0));
        /* v3: AVX, F16C, FMA, MOVBE; AVX2, BMI1, BMI2; LZCNT. */
        assert_int_equal(reg(1, 0, ECX) & 0x30401000, i >= 1 ? 0x30401000 : 0);
        assert_int_equal(reg(7, 0, EBX) & 0x128, i >= 1 ? 0x128 : 0);
        assert_int_equal(bit(0x80000001, 0, ECX, 5), i >= 1);
        /* v4: AVX-512 F, DQ, CD, BW, VL. */
        assert_int_equal(reg(7, 0, EBX) & 0xd0030000, i >= 2 ? 0xd0030000 : 0);
        assert_int_equal(cpu.model->xcr0_allowed, i == 0 ? 0x3 : i == 1 ? 0x7 : 0xe7);
        /* Nothing that only some hosts have. */
        assert_false(bit(7, 0, EBX, 29));
    }
}

static void all_models(void **state)
{
    const struct x86_cpu_model *m;
    uint32_t host[4];

    __cpuid(0, host[EAX], host[EBX], host[ECX], host[EDX]);
    for (unsigned i = 0; (m = x86_cpu_model_at(i)) != NULL; i++) {
        use(m);
        assert_int_equal(reg(0, 0, EBX), host[EBX]);
        assert_int_equal(reg(0, 0, ECX), host[ECX]);
        assert_int_equal(reg(0, 0, EDX), host[EDX]);
        assert_true(reg(0, 0, EAX) >= 0xd);
        assert_true(reg(0x80000000, 0, EAX) >= 0x80000008);
        /* Beyond the largest leaf there is nothing. */
        assert_int_equal(reg(reg(0, 0, EAX) + 1, 0, EAX), 0);
        for (unsigned k = 0; k < m->leaf_count; k++) {
            uint32_t leaf = m->leaves[k].leaf;

            assert_true(leaf <= reg(leaf & 0x80000000, 0, EAX));
            for (unsigned j = 0; j < k; j++)
                assert_false(m->leaves[j].leaf == leaf && m->leaves[j].subleaf == m->leaves[k].subleaf);
        }
        /* Always: hypervisor, x2APIC, TSC deadline, PCID, XSAVE; FSGSBASE, SMEP, INVPCID, SMAP; UMIP, RDPID; ARAT. */
        assert_int_equal(reg(1, 0, ECX) & 0x85220000, 0x85220000);
        assert_int_equal(reg(7, 0, EBX) & 0x100481, 0x100481);
        assert_int_equal(reg(7, 0, ECX) & 0x400004, 0x400004);
        assert_true(bit(6, 0, EAX, 2));
        /* NX, 1 GiB pages, RDTSCP, long mode, SYSCALL; invariant TSC. */
        assert_int_equal(reg(0x80000001, 0, EDX) & 0x2c100800, 0x2c100800);
        assert_true(bit(0x80000007, 0, EDX, 8));
        /* Never: MONITOR, VMX, SMX, VME; RTM, HLE, MPX, PT; PKU, CET, LA57; AMX; SVM. */
        assert_int_equal(reg(1, 0, ECX) & 0x68, 0);
        assert_int_equal(reg(1, 0, EDX) & 2, 0);
        assert_int_equal(reg(7, 0, EBX) & 0x02004810, 0);
        assert_int_equal(reg(7, 0, ECX) & 0x10098, 0);
        assert_int_equal(reg(7, 0, EDX) & 0x03500000, 0);
        assert_false(bit(0x80000001, 0, ECX, 2));
        /* A brand of at most 47 characters. */
        assert_int_equal(reg(0x80000004, 0, EDX) >> 24, 0);
        assert_true(reg(0x80000002, 0, EAX) != 0);
        /* Physical addresses of sensible width. */
        assert_in_range(reg(0x80000008, 0, EAX) & 0xff, 36, 52);
        assert_int_equal(reg(0x80000008, 0, EAX) >> 8 & 0xff, 48);
    }
}

/* What `host` shows of instructions that run natively is what the host has. */
static void host_bits(void **state)
{
    static const struct {
        uint32_t leaf;
        unsigned reg;
        uint32_t native;
    } words[] = {
        { 1, ECX, 0x32d83203 },     /* SSE3 … F16C, without what is Ringfort's */
        { 7, EBX, 0xf02b0128 },
        { 7, ECX, 0x00005f42 },
        { 7, EDX, 0x00800100 },
    };

    use(x86_cpu_model_find("host"));
    for (unsigned i = 0; i < ARRAY_SIZE(words); i++) {
        uint32_t h[4];

        __cpuid_count(words[i].leaf, 0, h[EAX], h[EBX], h[ECX], h[EDX]);
        assert_int_equal(reg(words[i].leaf, 0, words[i].reg) & words[i].native & ~h[words[i].reg], 0);
    }
    assert_int_equal(cpu.model->xcr0_allowed & ~x86_xsave_host_components(), 0);
}

static void xsave_sizes(void **state)
{
    use(x86_cpu_model_find("host"));
    assert_int_equal(reg(0xd, 0, EAX), cpu.model->xcr0_allowed);
    assert_int_equal(reg(0xd, 0, EBX), 576);
    assert_true(reg(0xd, 0, ECX) >= 576);
    if (!(cpu.model->xcr0_allowed & 4))
        return;
    cpu.s.xcr0 = 7;
    assert_int_equal(reg(0xd, 2, EAX), 256);
    assert_int_equal(reg(0xd, 0, EBX), reg(0xd, 2, EAX) + reg(0xd, 2, EBX));
    assert_int_equal(reg(0xd, 1, EBX), 576 + 256);
    cpu.s.xcr0 = cpu.model->xcr0_allowed;
    assert_int_equal(reg(0xd, 0, EBX), reg(0xd, 0, ECX));
    /* The same layout as the host's. */
    for (unsigned i = 2; i < 8; i++) {
        uint32_t h[4];

        if (!(cpu.model->xcr0_allowed >> i & 1)) {
            assert_int_equal(reg(0xd, i, EAX), 0);
            continue;
        }
        __cpuid_count(0xd, i, h[EAX], h[EBX], h[ECX], h[EDX]);
        assert_int_equal(reg(0xd, i, EAX), h[EAX]);
        assert_int_equal(reg(0xd, i, EBX), h[EBX]);
        assert_int_equal(reg(0xd, i, ECX), h[ECX]);
    }
}

static void osxsave_follows_cr4(void **state)
{
    use(x86_cpu_model_find("host"));
    assert_false(bit(1, 0, ECX, 27));
    cpu.s.cr4 = CR4_OSXSAVE;
    assert_true(bit(1, 0, ECX, 27));
}

static void topology(void **state)
{
    use(x86_cpu_model_find("x86-64-v3"));
    cpu.cpus = 1;
    assert_false(bit(1, 0, EDX, 28));
    assert_int_equal(reg(0xb, 1, EBX), 1);
    cpu.cpus = 6;
    cpu.index = 5;
    assert_true(bit(1, 0, EDX, 28));
    assert_int_equal(reg(1, 0, EBX) >> 24, 5);
    assert_int_equal(reg(1, 0, EBX) >> 16 & 0xff, 6);
    assert_int_equal(reg(0xb, 0, EAX), 0);
    assert_int_equal(reg(0xb, 0, EBX), 1);
    assert_int_equal(reg(0xb, 0, ECX), 0x100);
    assert_int_equal(reg(0xb, 1, EAX), 3);      /* six cores need three bits */
    assert_int_equal(reg(0xb, 1, EBX), 6);
    assert_int_equal(reg(0xb, 1, ECX), 0x201);
    assert_int_equal(reg(0xb, 2, EBX), 0);
    assert_int_equal(reg(0xb, 2, ECX), 2);
    for (unsigned i = 0; i < 3; i++)
        assert_int_equal(reg(0xb, i, EDX), 5);
    cpu.cpus = 300;
    cpu.index = 299;
    assert_int_equal(reg(0xb, 1, EAX), 9);
    assert_int_equal(reg(1, 0, EBX) >> 24, 299 & 0xff);
}

static void tsc_rate(void **state)
{
    static const uint64_t rates[] = { 2300000000, 2299998764, 5000000000, 4294967311, 1, 999999999, 3579545, 2095078417 };

    use(x86_cpu_model_find("x86-64-v2"));
    assert_int_equal(reg(0x15, 0, EBX), 0);     /* not known */
    if (reg(0, 0, EBX) != 0x756e6547)           /* "Genu"; AMD's processors have no such leaf */
        return;
    for (unsigned i = 0; i < ARRAY_SIZE(rates); i++) {
        uint64_t hz = rates[i], shown;

        cpu.tsc_hz = hz;
        if (hz < 1000000) {
            assert_int_equal(reg(0x15, 0, EBX), 0);
            continue;
        }
        assert_in_range((uint64_t)reg(0x15, 0, ECX) / 1000 * reg(0x15, 0, EBX), 1, UINT32_MAX);
        shown = (uint64_t)reg(0x15, 0, ECX) * reg(0x15, 0, EBX) / reg(0x15, 0, EAX);
        assert_in_range(shown, hz - hz / 1000000, hz + hz / 1000000);
    }
    cpu.tsc_hz = 2300000000;
    assert_int_equal(reg(0x15, 0, EAX), 10);
    assert_int_equal(reg(0x15, 0, EBX), 23);
    assert_int_equal(reg(0x16, 0, EAX), 2300);
}

static void kvm_leaves(void **state)
{
    uint32_t out[4];

    use(x86_cpu_model_find("x86-64-v2"));
    x86_cpuid(&cpu, 0x40000000, 0, out);
    assert_int_equal(out[EAX], 0x40000001);
    assert_memory_equal(&out[EBX], "KVMKVMKVM\0\0\0", 12);
    assert_int_equal(reg(0x40000001, 0, EAX), 0x0100000b);
    assert_int_equal(reg(0x40000002, 0, EAX), 0);
}

static bool has(const char *model, const char *bytes, unsigned len)
{
    struct x86_insn insn;
    bool gp;

    assert_int_equal(x86_decode(&insn, (const uint8_t *)bytes, len, 8, &gp), 0);
    return x86_model_has_insn(x86_cpu_model_find(model), &insn);
}
#define HAS(model, bytes) has(model, bytes, sizeof(bytes) - 1)

static void instructions_by_model(void **state)
{
    assert_true(HAS("x86-64-v2", "\x01\xc0"));
    assert_true(HAS("x86-64-v2", "\x66\x0f\x38\x17\xc1"));         /* PTEST */
    assert_true(HAS("x86-64-v2", "\x0f\x0d\x08"));                 /* PREFETCHW */
    assert_true(HAS("x86-64-v2", "\x0f\x01\xc1"));                 /* VMCALL */
    assert_true(HAS("x86-64-v2", "\x0f\x01\xd9"));                 /* VMMCALL */
    assert_true(HAS("x86-64-v2", "\xf3\x48\x0f\xae\xc0"));         /* RDFSBASE */
    assert_false(HAS("x86-64-v2", "\xc5\xf8\x58\xc0"));            /* VADDPS */
    assert_true(HAS("x86-64-v3", "\xc5\xf8\x58\xc0"));
    assert_false(HAS("x86-64-v2", "\x66\x0f\x38\xdc\xc1"));        /* AESENC */
    assert_true(HAS("x86-64-v3", "\x66\x0f\x38\xdc\xc1"));
    assert_false(HAS("x86-64-v3", "\x62\xf1\x74\x48\x58\xc2"));    /* VADDPS ZMM */
    assert_true(HAS("x86-64-v4", "\x62\xf1\x74\x48\x58\xc2"));
    assert_false(HAS("x86-64-v3", "\x62\xf1\x74\x28\x58\xc2"));    /* VADDPS YMM, EVEX */
    assert_false(HAS("x86-64-v4", "\x0f\x38\xc8\xc1"));            /* SHA1NEXTE */
    /* Of no model. */
    assert_false(HAS("host", "\x0f\x01\xc8"));                     /* MONITOR */
    assert_false(HAS("host", "\x0f\x01\xee"));                     /* RDPKRU */
    assert_false(HAS("host", "\x0f\x01\xd8"));                     /* VMRUN */
    assert_false(HAS("host", "\x0f\x78\xc0"));                     /* VMREAD */
    assert_false(HAS("host", "\x0f\x0f\x00\xbf"));                 /* PAVGUSB */
    assert_false(HAS("host", "\xc7\xf8\x00\x00\x00\x00"));         /* XBEGIN */
    assert_false(HAS("host", "\xf3\x0f\xae\xe8"));                 /* INCSSPD */
}

/* What an engine lacks is gone, with all that follows from it, and nothing else is. */
static void restricted(void **state)
{
    const struct x86_cpu_model *v2 = x86_cpu_model_find("x86-64-v2"), *host = x86_cpu_model_find("host");
    struct x86_cpuid_leaf offered[128];
    struct x86_cpu_model *m;
    const char *missing;
    unsigned n = v2->leaf_count;

    assert_true(n <= ARRAY_SIZE(offered));
    memcpy(offered, v2->leaves, n * sizeof(offered[0]));
    m = x86_cpu_model_restrict(v2, offered, n, &missing);
    assert_non_null(m);
    assert_null(x86_cpu_model_lacks(m, v2));
    assert_int_equal(m->cr4_allowed, v2->cr4_allowed);
    assert_int_equal(m->xcr0_allowed, v2->xcr0_allowed);
    x86_cpu_model_free(m);

    /* Without SMEP (leaf 7 EBX bit 7) and XSAVE (leaf 1 ECX bit 26). */
    for (unsigned i = 0; i < n; i++) {
        if (offered[i].leaf == 7 && offered[i].subleaf == 0)
            offered[i].ebx &= ~(1u << 7);
        if (offered[i].leaf == 1)
            offered[i].ecx &= ~(1u << 26);
    }
    m = x86_cpu_model_restrict(v2, offered, n, &missing);
    assert_non_null(m);
    assert_non_null(x86_cpu_model_lacks(m, v2));
    assert_null(x86_cpu_model_lacks(v2, m));
    assert_int_equal(m->cr4_allowed, v2->cr4_allowed & ~(CR4_SMEP | CR4_OSXSAVE));
    use(m);
    assert_false(bit(7, 0, EBX, 7));
    assert_false(bit(1, 0, ECX, 26));
    assert_int_equal(reg(0xd, 0, EAX), 0);
    assert_true(bit(1, 0, ECX, 20));    /* SSE4.2 is still there */
    x86_cpu_model_free(m);

    /* Without SSE4.2: that is more than the named model can go without, but not more than `host` can. */
    for (unsigned i = 0; i < n; i++)
        if (offered[i].leaf == 1)
            offered[i].ecx &= ~(1u << 20);
    assert_null(x86_cpu_model_restrict(v2, offered, n, &missing));
    assert_string_equal(missing, "sse4.2");
    m = x86_cpu_model_restrict(host, offered, n, &missing);
    assert_non_null(m);
    use(m);
    assert_false(bit(1, 0, ECX, 20));
    assert_false(bit(1, 0, ECX, 28));   /* nor AVX, whose registers need XSAVE */
    assert_int_equal(m->xcr0_allowed, 3);
    x86_cpu_model_free(m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(models_are_listed),
        cmocka_unit_test(host_model_is_usable),
        cmocka_unit_test(usable_says_what_is_missing),
        cmocka_unit_test(levels),
        cmocka_unit_test(all_models),
        cmocka_unit_test(host_bits),
        cmocka_unit_test(xsave_sizes),
        cmocka_unit_test(osxsave_follows_cr4),
        cmocka_unit_test(topology),
        cmocka_unit_test(tsc_rate),
        cmocka_unit_test(kvm_leaves),
        cmocka_unit_test(instructions_by_model),
        cmocka_unit_test(restricted),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
