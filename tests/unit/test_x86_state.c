/*
 * The canonical state: power-on and INIT values, saving and loading, and what loading refuses.
 */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "base/state.h"
#include "isa/x86/state.h"

static void power_on(void **state)
{
    struct x86_state s;

    memset(&s, 0xff, sizeof(s));
    x86_state_reset(&s, true);
    assert_int_equal(s.seg[SEG_CS].base + s.rip, 0xfffffff0);
    assert_int_equal(s.seg[SEG_CS].selector, 0xf000);
    assert_int_equal(s.rflags, 2);
    assert_int_equal(s.cr0, 0x60000010);
    assert_int_equal(s.cr4 | s.cr3 | s.efer, 0);
    assert_int_equal(s.xcr0, 1);
    assert_int_equal(s.dr6, 0xffff0ff0);
    assert_int_equal(s.dr7, 0x400);
    assert_int_equal(s.pat, 0x0007040600070406);
    assert_int_equal(s.fpu.mxcsr, 0x1f80);
    assert_int_equal(s.idt.limit, 0xffff);
    assert_int_equal(s.activity, X86_RUNNING);
    x86_state_reset(&s, false);
    assert_int_equal(s.activity, X86_WAIT_FOR_SIPI);
}

/* Every byte different, but values that a processor can have. */
static void busy_state(struct x86_state *s)
{
    memset(s, 0, sizeof(*s));
    for (unsigned i = 0; i < 16; i++)
        s->gpr[i] = 0x1111111111111111ull * i + 5;
    s->rip = 0xffffffff81000123;
    s->rflags = RFLAGS_IF | RFLAGS_ZF | RFLAGS_AC | 2;
    for (unsigned i = 0; i < 6; i++)
        s->seg[i] = (struct x86_seg){ .base = 0x1000 * i, .limit = 0xfffff000 + i, .attr = 0xc093, .selector = 8 };
    s->seg[SEG_CS].attr = 0xa09b;
    s->seg[SEG_GS].base = 0xffff888000000000;
    s->ldtr = (struct x86_seg){ .attr = SEG_UNUSABLE };
    s->tr = (struct x86_seg){ .base = 0xfffffe0000003000, .limit = 0x206f, .attr = 0x8b, .selector = 0x40 };
    s->gdt = (struct x86_table){ .base = 0xfffffe0000001000, .limit = 0x7f };
    s->idt = (struct x86_table){ .base = 0xfffffe0000000000, .limit = 0xfff };
    s->cr0 = 0x80050033;
    s->cr2 = 0xdeadbeef;
    s->cr3 = 0x12345000;
    s->cr4 = CR4_PAE | CR4_PGE | CR4_OSXSAVE | CR4_OSFXSR | CR4_PCIDE;
    s->xcr0 = 0xe7;
    s->efer = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE;
    s->dr[2] = 7;
    s->dr6 = 0xffff0ff0;
    s->dr7 = 0x400;
    s->star = 0x23001000000000;
    s->lstar = 0xffffffff81a00000;
    s->sfmask = 0x47700;
    s->kernel_gs_base = 0x7fff0000;
    s->pat = 0x0407050600070106;
    s->mtrr_fixed[10] = 0x0606060606060606;
    s->mtrr_mask[7] = 0xfff000800;
    s->tsc_offset = -12345ull;
    s->kvm_system_time = 0x1001;
    s->interrupt_shadow = 1;
    s->nmi_blocked = true;
    s->activity = X86_HALTED;
    s->sipi_vector = 0x9a;
    for (unsigned i = 0; i < sizeof(s->fpu.zmm); i++)
        s->fpu.zmm[i / 64][i % 64] = (uint8_t)(i * 13);
    s->fpu.k[7] = 77;
    s->fpu.st[7][9] = 0x40;
    s->fpu.fcw = 0x37f;
    s->fpu.mxcsr = 0x1fa0;
}

static void init_signal(void **state)
{
    struct x86_state s, before;

    busy_state(&s);
    before = s;
    x86_state_init_signal(&s, false);
    assert_int_equal(s.activity, X86_WAIT_FOR_SIPI);
    assert_int_equal(s.cr0, CR0_ET);
    assert_int_equal(s.cr4 | s.efer | s.cr3, 0);
    assert_int_equal(s.rip, 0xfff0);
    assert_false(s.nmi_blocked);
    /* Kept. */
    assert_int_equal(s.xcr0, before.xcr0);
    assert_int_equal(s.pat, before.pat);
    assert_int_equal(s.tsc_offset, before.tsc_offset);
    assert_int_equal(s.lstar, before.lstar);
    assert_memory_equal(&s.fpu, &before.fpu, sizeof(s.fpu));
    before.cr0 |= CR0_CD;
    s = before;
    x86_state_init_signal(&s, true);
    assert_int_equal(s.cr0, CR0_ET | CR0_CD);
    assert_int_equal(s.activity, X86_RUNNING);
}

/* Saves s and loads it again. */
static int round_trip(const struct x86_state *s, struct x86_state *out)
{
    struct state_writer *w = state_writer_create();
    struct state_reader r;
    const void *data;
    size_t len;
    int err;

    x86_state_save(s, w);
    assert_int_equal(state_writer_finish(w, &data, &len), 0);
    state_reader_init(&r, data, len);
    err = x86_state_load(out, &r);
    state_writer_free(w);
    return err;
}

static void save_and_load(void **state)
{
    struct x86_state s, back;

    busy_state(&s);
    memset(&back, 0xee, sizeof(back));
    assert_int_equal(round_trip(&s, &back), 0);
    assert_memory_equal(&back.fpu, &s.fpu, offsetof(struct x86_fpu, xinuse_hint));
    assert_memory_equal(back.gpr, s.gpr, offsetof(struct x86_state, seg));
    for (unsigned i = 0; i < 6; i++) {
        assert_int_equal(back.seg[i].base, s.seg[i].base);
        assert_int_equal(back.seg[i].limit, s.seg[i].limit);
        assert_int_equal(back.seg[i].attr, s.seg[i].attr);
        assert_int_equal(back.seg[i].selector, s.seg[i].selector);
    }
    assert_int_equal(back.tr.base, s.tr.base);
    assert_int_equal(back.gdt.limit, s.gdt.limit);
    assert_int_equal(back.idt.base, s.idt.base);
    assert_memory_equal(&back.cr0, &s.cr0, offsetof(struct x86_state, interrupt_shadow) - offsetof(struct x86_state, cr0));
    assert_int_equal(back.interrupt_shadow, 1);
    assert_true(back.nmi_blocked);
    assert_false(back.nmi_pending);
    assert_int_equal(back.activity, X86_HALTED);
    assert_int_equal(back.sipi_vector, 0x9a);

    x86_state_reset(&s, true);
    assert_int_equal(round_trip(&s, &back), 0);
    x86_state_reset(&s, false);
    assert_int_equal(round_trip(&s, &back), 0);
}

#define REFUSED(change) \
    do { \
        struct x86_state s_, untouched_, out_; \
        busy_state(&s_); \
        memset(&out_, 0x77, sizeof(out_)); \
        untouched_ = out_; \
        { \
            struct x86_state *s = &s_; \
            change; \
        } \
        assert_int_equal(round_trip(&s_, &out_), -EINVAL); \
        assert_memory_equal(&out_, &untouched_, sizeof(out_)); \
    } while (0)

static void impossible_values(void **state)
{
    log_set_level(LOG_ERROR - 1);
    REFUSED(s->rflags = 0);
    REFUSED(s->rflags |= 1ull << 40);
    REFUSED(s->rflags |= RFLAGS_VM);
    REFUSED(s->cr0 &= ~CR0_PE);
    REFUSED(s->cr0 |= CR0_NW);
    REFUSED(s->cr0 |= 1ull << 32);
    REFUSED(s->cr4 &= ~CR4_PAE);
    REFUSED(s->efer &= ~EFER_LMA);
    REFUSED(s->efer |= 1ull << 30);
    REFUSED(s->cr0 &= ~CR0_PG);
    REFUSED(s->rip = 1ull << 60);
    REFUSED(s->seg[SEG_CS].attr |= SEG_DB);
    REFUSED(s->seg[SEG_FS].base = 1ull << 47);
    REFUSED(s->seg[SEG_ES].attr |= 1u << 20);
    REFUSED(s->gdt.base = 1ull << 63);
    REFUSED(s->lstar = 1ull << 63);
    REFUSED(s->xcr0 = 6);
    REFUSED(s->xcr0 |= 1u << 9);
    REFUSED(s->xcr0 = 0x21);
    REFUSED(s->xss = 1u << 8);
    REFUSED(s->dr7 |= 1ull << 32);
    REFUSED(s->fpu.mxcsr = 0x10000);
    REFUSED(s->activity = 4);
    REFUSED(s->interrupt_shadow = 3);
    REFUSED(s->pat = 2);
    REFUSED(s->efer = 0; s->cr4 = 0; s->cr0 = CR0_PE);      /* RIP beyond 4 GiB outside 64-bit code */
    log_set_level(LOG_WARN);
}

static void bad_streams(void **state)
{
    struct state_writer *w = state_writer_create();
    struct x86_state s, out;
    struct state_reader r;
    const void *data;
    uint8_t *copy;
    size_t len;

    log_set_level(LOG_ERROR - 1);
    busy_state(&s);
    x86_state_save(&s, w);
    assert_int_equal(state_writer_finish(w, &data, &len), 0);
    /* Cut anywhere. */
    for (size_t cut = 0; cut < len; cut += 17) {
        state_reader_init(&r, data, cut);
        assert_int_equal(x86_state_load(&out, &r), -EINVAL);
    }
    /* Bytes changed: refused, or a state that is allowed; never a crash. */
    copy = malloc(len);
    for (size_t i = 0; i < len; i += 3) {
        memcpy(copy, data, len);
        copy[i] ^= 0xff;
        state_reader_init(&r, copy, len);
        x86_state_load(&out, &r);
    }
    free(copy);
    state_writer_free(w);
    log_set_level(LOG_WARN);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(power_on),
        cmocka_unit_test(init_signal),
        cmocka_unit_test(save_and_load),
        cmocka_unit_test(impossible_values),
        cmocka_unit_test(bad_streams),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
