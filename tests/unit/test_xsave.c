/*
 * FXSAVE and the XSAVE family on guest memory, compared byte for byte with what the host's processor makes of
 * the same state; and the faults of each.
 */
#include "x86_guest.h"

#include <cpuid.h>
#include <string.h>

#include "isa/x86/cpuid.h"
#include "isa/x86/xsave.h"

#define AREA 0x100000ull        /* guest address of the image; flat, no paging */
#define SIZE 4096u

static uint8_t host_image[SIZE] __attribute__((aligned(64)));
static uint64_t random_state = 1;

static uint64_t next_random(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

static void fill_random(void *p, size_t n)
{
    for (size_t i = 0; i < n; i++)
        ((uint8_t *)p)[i] = (uint8_t)next_random();
}

/* 64-bit code over identity-mapped low memory, the model of the host, everything enabled. */
static int setup(void **state)
{
    struct guest *g;

    if (guest_setup(state) != 0)
        return -1;
    g = *state;
    g->cpu.model = x86_cpu_model_find("host");
    g->cpu.amd = g->cpu.model->leaves[0].ebx == 0x68747541;
    guest_system(g, GUEST_LONG);
    g->cpu.s.cr4 |= CR4_OSXSAVE | CR4_OSFXSR;
    g->cpu.s.xcr0 = g->cpu.model->xcr0_allowed;
    x86_update_mode(&g->cpu);
    x86_fpu_init_components(&g->cpu.s.fpu, ~0ull, 16);
    g->cpu.s.fpu.mxcsr = MXCSR_DEFAULT;
    return 0;
}

static void random_fpu(struct guest *g)
{
    struct x86_fpu *f = &g->cpu.s.fpu;

    fill_random(f->zmm, sizeof(f->zmm));
    fill_random(f->k, sizeof(f->k));
    for (unsigned i = 0; i < 8; i++) {
        fill_random(f->st[i], 10);
        memset(f->st[i] + 10, 0, 6);
    }
    f->fcw = 0x37f;
    f->fsw = (uint16_t)(next_random() & 0x7f00);
    f->ftw = (uint8_t)next_random();
    f->fop = 0;
    f->fip = f->fdp = 0;
    f->fcs = f->fds = 0;
    f->mxcsr = MXCSR_DEFAULT | (next_random() & 0x603f);
}

/* Runs one instruction with [RBX] as its operand and EDX:EAX all ones; the vector raised or -1. */
static int run(struct guest *g, const char *bytes, unsigned len, uint64_t components)
{
    g->cpu.s.gpr[RAX] = (uint32_t)components;
    g->cpu.s.gpr[RDX] = components >> 32;
    return guest_run_system(g, bytes, len);
}
#define RUN(g, bytes, components) run(g, bytes, sizeof(bytes) - 1, components)

#define FXSAVE "\x0f\xae\x03"
#define FXSAVE64 "\x48\x0f\xae\x03"
#define FXRSTOR "\x0f\xae\x0b"
#define FXRSTOR64 "\x48\x0f\xae\x0b"
#define XSAVE64 "\x48\x0f\xae\x23"
#define XRSTOR64 "\x48\x0f\xae\x2b"
#define XSAVEOPT64 "\x48\x0f\xae\x33"
#define XSAVEC64 "\x48\x0f\xc7\x23"
#define XSAVES64 "\x48\x0f\xc7\x2b"
#define XRSTORS64 "\x48\x0f\xc7\x1b"
#define ALL (~0ull)

static uint8_t *area(struct guest *g)
{
    return guest_ram(g, AREA);
}

static bool host_has_xsave(void)
{
    uint32_t a, b, c, d;

    return __get_cpuid(1, &a, &b, &c, &d) && (c >> 27 & 1);
}

static bool host_has_xsavec(void)
{
    uint32_t a, b, c, d;

    return host_has_xsave() && __get_cpuid_count(0xd, 1, &a, &b, &c, &d) && (a >> 1 & 1);
}

/* The host's processor loads from and stores into an image; its own state survives. */
#define ON_HOST(store, from, mask) \
    do { \
        static uint8_t saved[SIZE * 4] __attribute__((aligned(64))); \
        uint32_t lo_ = (uint32_t)(mask), hi_ = (uint32_t)((uint64_t)(mask) >> 32); \
        memset(saved, 0, sizeof(saved)); \
        __asm__ volatile("xsave64 (%[saved])\n\t" \
                         "xrstor64 (%[image])\n\t" store " (%[to])\n\t" \
                         "xrstor64 (%[saved])\n\t" \
                         : \
                         : "a"(lo_), "d"(hi_), [saved] "r"(saved), [image] "r"(from), [to] "r"(host_image) \
                         : "memory"); \
    } while (0)

/* The host may have more bits in MXCSR than a guest is shown. */
static void same_mxcsr_mask(const uint8_t *image)
{
    if (load_le32(host_image + 28) != 0xaaaaaaaa && load_le32(host_image + 28) != 0)
        assert_int_equal(load_le32(host_image + 28) & 0xffff, load_le32(image + 28));
    memcpy(host_image + 28, image + 28, 4);
}

static void xsave_equals_host(void **state)
{
    struct guest *g = *state;

    if (!host_has_xsave())
        skip();
    for (unsigned n = 0; n < 50; n++) {
        uint64_t components = n == 0 ? g->cpu.s.xcr0 : next_random() & g->cpu.s.xcr0;
        static uint8_t copy[SIZE] __attribute__((aligned(64)));

        random_fpu(g);
        memset(area(g), 0, SIZE);
        g->cpu.s.gpr[RBX] = AREA;
        assert_int_equal(RUN(g, XSAVE64, components), -1);
        memcpy(copy, area(g), SIZE);
        memset(host_image, 0, SIZE);
        ON_HOST("xsave64", copy, components);
        same_mxcsr_mask(copy);
        assert_memory_equal(host_image, copy, SIZE);
    }
}

static void xsavec_equals_host(void **state)
{
    struct guest *g = *state;

    if (!host_has_xsavec())
        skip();
    for (unsigned n = 0; n < 50; n++) {
        uint64_t components = n == 0 ? g->cpu.s.xcr0 : next_random() & g->cpu.s.xcr0;
        static uint8_t copy[SIZE] __attribute__((aligned(64)));

        random_fpu(g);
        memset(area(g), 0xaa, SIZE);
        g->cpu.s.gpr[RBX] = AREA;
        assert_int_equal(RUN(g, XSAVEC64, components), -1);
        memcpy(copy, area(g), SIZE);
        /* The rest of the header is not written, but has to be zero for restoring. */
        assert_int_equal(copy[512 + 16], 0xaa);
        memset(copy + 512 + 16, 0, 48);
        memset(host_image, 0xaa, SIZE);
        memset(host_image + 512 + 16, 0, 48);
        ON_HOST("xsavec64", copy, components);
        same_mxcsr_mask(copy);
        assert_memory_equal(host_image, copy, SIZE);
    }
}

static void xrstor_gets_what_xsave_put(void **state)
{
    static const char save[][5] = { XSAVE64, XSAVEOPT64, XSAVEC64, XSAVES64 };
    struct guest *g = *state;

    for (unsigned kind = 0; kind < ARRAY_SIZE(save); kind++) {
        for (unsigned n = 0; n < 30; n++) {
            struct x86_fpu before, after;
            uint64_t cleared = next_random() & g->cpu.s.xcr0;

            random_fpu(g);
            x86_fpu_init_components(&g->cpu.s.fpu, cleared, 16);
            if (!(g->cpu.s.xcr0 >> XSTATE_OPMASK & 1))
                x86_fpu_init_components(&g->cpu.s.fpu, 7u << XSTATE_OPMASK, 16);
            before = g->cpu.s.fpu;
            memset(area(g), 0, SIZE);
            g->cpu.s.gpr[RBX] = AREA;
            assert_int_equal(run(g, save[kind], 4, ALL), -1);
            if (kind != 0)
                assert_int_equal(guest_get(g, AREA + 512, 8) & cleared & ~2ull, 0);
            random_fpu(g);
            if (!(g->cpu.s.xcr0 >> XSTATE_OPMASK & 1))
                x86_fpu_init_components(&g->cpu.s.fpu, 7u << XSTATE_OPMASK, 16);
            assert_int_equal(run(g, kind == 3 ? XRSTORS64 : XRSTOR64, 4, ALL), -1);
            after = g->cpu.s.fpu;
            assert_memory_equal(&before, &after, sizeof(before));
        }
    }
}

static void only_the_asked_components_change(void **state)
{
    struct guest *g = *state;
    struct x86_fpu before;

    random_fpu(g);
    memset(area(g), 0, SIZE);
    g->cpu.s.gpr[RBX] = AREA;
    assert_int_equal(RUN(g, XSAVE64, ALL), -1);
    random_fpu(g);
    before = g->cpu.s.fpu;
    assert_int_equal(RUN(g, XRSTOR64, 1), -1);
    assert_memory_equal(g->cpu.s.fpu.zmm, before.zmm, sizeof(before.zmm));
    assert_int_equal(g->cpu.s.fpu.mxcsr, before.mxcsr);
    assert_memory_not_equal(g->cpu.s.fpu.st, before.st, sizeof(before.st));
    /* Not in the image, but asked for: initialized. */
    guest_put(g, AREA + 512, 0, 8);
    assert_int_equal(RUN(g, XRSTOR64, 2), -1);
    for (unsigned i = 0; i < 16; i++) {
        static const uint8_t zero[16];

        assert_memory_equal(g->cpu.s.fpu.zmm[i], zero, 16);
        assert_memory_equal(g->cpu.s.fpu.zmm[i] + 16, before.zmm[i] + 16, 48);
    }
}

static void xgetbv1_shows_use(void **state)
{
    struct guest *g = *state;

    g->cpu.s.gpr[RCX] = 1;
    assert_int_equal(RUN(g, "\x0f\x01\xd0", 0), -1);
    assert_int_equal(g->cpu.s.gpr[RAX], 0);
    g->cpu.s.fpu.zmm[3][0] = 1;
    g->cpu.s.fpu.mxcsr = 0x1f81;
    assert_int_equal(RUN(g, "\x0f\x01\xd0", 0), -1);
    assert_int_equal(g->cpu.s.gpr[RAX], 2);
    g->cpu.s.fpu.zmm[3][0] = 0;
    g->cpu.s.fpu.zmm[3][16] = 1;
    assert_int_equal(RUN(g, "\x0f\x01\xd0", 0), -1);
    assert_int_equal(g->cpu.s.gpr[RAX], 2 | (g->cpu.s.xcr0 & 4));    /* MXCSR counts */
    g->cpu.s.gpr[RCX] = 2;
    assert_int_equal(RUN(g, "\x0f\x01\xd0", 0), X86_GP);
}

/* Loads an image with FXRSTOR and stores it with FXSAVE, here and on the host: control and status words of all kinds. */
static void fxrstor_equals_host(void **state)
{
    struct guest *g = *state;

    for (unsigned n = 0; n < 2000; n++) {
        static uint8_t image[512] __attribute__((aligned(64))), saved[512] __attribute__((aligned(64)));

        fill_random(image, sizeof(image));
        store_le32(image + 24, (uint32_t)next_random() & 0xffff);
        for (unsigned i = 0; i < 8; i++)
            memset(image + 32 + 16 * i + 10, 0, 6);
        /* How many bits of the pointers exist depends on the processor. */
        store_le64(image + 8, next_random() >> 17);
        store_le64(image + 16, ~(next_random() >> 17));
        if (n % 2 == 0)     /* only masked exceptions: error pointers as usual */
            store_le16(image, load_le16(image) | 0x3f);
        memcpy(area(g), image, 512);
        g->cpu.s.gpr[RBX] = AREA;
        assert_int_equal(RUN(g, FXRSTOR64, 0), -1);
        memset(area(g), 0xbb, 512);
        assert_int_equal(RUN(g, FXSAVE64, 0), -1);
        memset(host_image, 0xbb, 512);
        __asm__ volatile("fxsave64 (%0)\n\tfxrstor64 (%1)\n\tfxsave64 (%2)\n\tfninit\n\tfxrstor64 (%0)"
                         :
                         : "r"(saved), "r"(image), "r"(host_image)
                         : "memory");
        same_mxcsr_mask(area(g));
        for (unsigned i = 0; i < 512; i++)
            if (host_image[i] != area(g)[i])
                fail_msg("byte %u: %02x, the host has %02x (fcw %02x%02x fsw %02x%02x)", i, area(g)[i], host_image[i],
                         image[1], image[0], image[3], image[2]);
    }
}

static void fxsave_in_32_bit_code(void **state)
{
    struct guest *g = *state;

    random_fpu(g);
    guest_system(g, GUEST_32);
    g->cpu.s.cr4 |= CR4_OSFXSR | CR4_OSXSAVE;
    memset(area(g), 0xcc, 512);
    g->cpu.s.gpr[RBX] = AREA;
    assert_int_equal(RUN(g, FXSAVE, 0), -1);
    assert_memory_equal(area(g) + 160 + 16 * 7, g->cpu.s.fpu.zmm[7], 16);
    assert_int_equal(area(g)[160 + 16 * 8], 0xcc);
    /* XMM8 and up are out of reach. */
    struct x86_fpu before = g->cpu.s.fpu;
    memset(area(g), 0, 512);
    assert_int_equal(RUN(g, FXRSTOR, 0), -1);
    assert_int_equal(g->cpu.s.fpu.zmm[7][0], 0);
    assert_memory_equal(g->cpu.s.fpu.zmm[8], before.zmm[8], 64);
    g->cpu.s.fpu = before;
    assert_int_equal(RUN(g, "\x0f\xae\x2b", ALL), -1);      /* XRSTOR of an empty image */
    assert_int_equal(g->cpu.s.fpu.zmm[7][0], 0);
    assert_memory_equal(g->cpu.s.fpu.zmm[8], before.zmm[8], 64);
    assert_memory_equal(g->cpu.s.fpu.zmm[16], before.zmm[16], 64);
}

static void faults(void **state)
{
    struct guest *g = *state;
    struct x86_state *s = &g->cpu.s;
    struct x86_fpu before;

    memset(area(g), 0, SIZE);
    s->gpr[RBX] = AREA + 8;
    assert_int_equal(RUN(g, FXSAVE, 0), X86_GP);
    s->gpr[RBX] = AREA + 16;
    assert_int_equal(RUN(g, FXSAVE, 0), -1);
    assert_int_equal(RUN(g, XSAVE64, ALL), X86_GP);     /* 64 bytes */
    s->gpr[RBX] = AREA;

    s->cr0 |= CR0_TS;
    assert_int_equal(RUN(g, FXSAVE, 0), X86_NM);
    assert_int_equal(RUN(g, XSAVE64, ALL), X86_NM);
    assert_int_equal(RUN(g, XRSTOR64, ALL), X86_NM);
    s->cr4 &= ~CR4_OSXSAVE;
    assert_int_equal(RUN(g, XSAVE64, ALL), X86_UD);
    s->cr4 |= CR4_OSXSAVE;
    s->cr0 = (s->cr0 & ~CR0_TS) | CR0_EM;
    assert_int_equal(RUN(g, FXRSTOR, 0), X86_NM);
    s->cr0 &= ~CR0_EM;

    /* Bad images. */
    before = s->fpu;
    guest_put(g, AREA + 24, 0x10000, 4);                /* MXCSR */
    assert_int_equal(RUN(g, FXRSTOR, 0), X86_GP);
    assert_int_equal(RUN(g, XRSTOR64, 2), X86_GP);
    assert_int_equal(RUN(g, XRSTOR64, 1), -1);
    guest_put(g, AREA + 24, MXCSR_DEFAULT, 4);
    guest_put(g, AREA + 512, 1ull << 40, 8);            /* a component that is not enabled */
    assert_int_equal(RUN(g, XRSTOR64, ALL), X86_GP);
    guest_put(g, AREA + 512, 0, 8);
    guest_put(g, AREA + 512 + 8, 1, 8);                 /* XCOMP_BV without the compaction bit */
    assert_int_equal(RUN(g, XRSTOR64, ALL), X86_GP);
    guest_put(g, AREA + 512 + 8, 0, 8);
    guest_put(g, AREA + 512 + 16, 1, 8);
    assert_int_equal(RUN(g, XRSTOR64, ALL), X86_GP);
    guest_put(g, AREA + 512 + 16, 0, 8);
    assert_int_equal(RUN(g, XRSTORS64, ALL), X86_GP);   /* not compacted */
    guest_put(g, AREA + 512 + 8, 1ull << 63 | 1, 8);
    guest_put(g, AREA + 512, 2, 8);                     /* in use, but not in the image */
    assert_int_equal(RUN(g, XRSTOR64, ALL), X86_GP);
    guest_put(g, AREA + 512, 1, 8);
    guest_put(g, AREA + 512 + 56, 1, 8);                /* reserved header bytes */
    assert_int_equal(RUN(g, XRSTOR64, ALL), X86_GP);
    before.ftw = s->fpu.ftw;
    assert_memory_equal(&before, &s->fpu, sizeof(before));

    guest_enter_user(g, true);
    s->gpr[RBX] = USER_CODE;
    assert_int_equal(RUN(g, XSAVES64, ALL), X86_GP);
    assert_int_equal(RUN(g, XRSTORS64, ALL), X86_GP);
    assert_int_equal(RUN(g, XSAVE64, ALL), -1);
    s->gpr[RBX] = MIB(4) - 512;                         /* the header is in a page that is not there */
    assert_int_equal(RUN(g, XSAVE64, ALL), X86_PF);
    assert_int_equal(s->cr2 & GUEST_PAGE_MASK, MIB(4)); /* which byte of it depends on the processor's make */
    assert_int_equal(RUN(g, XRSTOR64, ALL), X86_PF);
}

static void layout(void **state)
{
    assert_int_equal(x86_xsave_standard_bytes(3), 576);
    assert_int_equal(x86_xsave_compact_bytes(3), 576);
    if (x86_xsave_host_components() & 4) {
        assert_int_equal(x86_xsave_standard_bytes(7), 832);
        assert_int_equal(x86_xsave_compact_bytes(7), 832);
        assert_int_equal(x86_xsave_compact_bytes(0x26), x86_xsave_host_components() & 0x20 ? 832 + 64 : 832);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(xsave_equals_host, setup, guest_teardown),
        cmocka_unit_test_setup_teardown(xsavec_equals_host, setup, guest_teardown),
        cmocka_unit_test_setup_teardown(xrstor_gets_what_xsave_put, setup, guest_teardown),
        cmocka_unit_test_setup_teardown(only_the_asked_components_change, setup, guest_teardown),
        cmocka_unit_test_setup_teardown(xgetbv1_shows_use, setup, guest_teardown),
        cmocka_unit_test_setup_teardown(fxrstor_equals_host, setup, guest_teardown),
        cmocka_unit_test_setup_teardown(fxsave_in_32_bit_code, setup, guest_teardown),
        cmocka_unit_test_setup_teardown(faults, setup, guest_teardown),
        cmocka_unit_test(layout),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
