/*
 * Registers of a vCPU between KVM's structures and the canonical state. docs/kvm.md has the table.
 *
 * What the canonical state has no room for is an exception on its way to the guest. It is left out: RIP still points to the
 * instruction, which raises it again.
 */
#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/util.h"
#include "engine/kvm/kvm.h"
#include "isa/x86/cpuid.h"
#include "isa/x86/kvmclock.h"
#include "isa/x86/xsave.h"

/* ---- MSRs ---- */

#define MSR_TSC 0x10u

/* Those that are a field of the canonical state. APIC base, TSC and TSC deadline are elsewhere. */
static const struct {
    uint32_t msr;
    uint16_t offset;
} msrs[] = {
#define MSR(number, field) { number, offsetof(struct x86_state, field) }
    MSR(0x174, sysenter_cs), MSR(0x175, sysenter_esp), MSR(0x176, sysenter_eip),
    MSR(0xc0000081, star), MSR(0xc0000082, lstar), MSR(0xc0000083, cstar), MSR(0xc0000084, sfmask),
    MSR(0xc0000102, kernel_gs_base), MSR(0xc0000103, tsc_aux),
    MSR(0x277, pat), MSR(0x1a0, misc_enable), MSR(0x48, spec_ctrl), MSR(0x3b, tsc_adjust), MSR(0xda0, xss),
    MSR(0x2ff, mtrr_def_type),
    MSR(0x250, mtrr_fixed[0]), MSR(0x258, mtrr_fixed[1]), MSR(0x259, mtrr_fixed[2]), MSR(0x268, mtrr_fixed[3]),
    MSR(0x269, mtrr_fixed[4]), MSR(0x26a, mtrr_fixed[5]), MSR(0x26b, mtrr_fixed[6]), MSR(0x26c, mtrr_fixed[7]),
    MSR(0x26d, mtrr_fixed[8]), MSR(0x26e, mtrr_fixed[9]), MSR(0x26f, mtrr_fixed[10]),
    MSR(0x200, mtrr_base[0]), MSR(0x201, mtrr_mask[0]), MSR(0x202, mtrr_base[1]), MSR(0x203, mtrr_mask[1]),
    MSR(0x204, mtrr_base[2]), MSR(0x205, mtrr_mask[2]), MSR(0x206, mtrr_base[3]), MSR(0x207, mtrr_mask[3]),
    MSR(0x208, mtrr_base[4]), MSR(0x209, mtrr_mask[4]), MSR(0x20a, mtrr_base[5]), MSR(0x20b, mtrr_mask[5]),
    MSR(0x20c, mtrr_base[6]), MSR(0x20d, mtrr_mask[6]), MSR(0x20e, mtrr_base[7]), MSR(0x20f, mtrr_mask[7]),
    /* Writing it makes KVM start its clock page: after the TSC. */
    MSR(0x4b564d00, kvm_wall_clock), MSR(0x4b564d01, kvm_system_time),
#undef MSR
};
_Static_assert(ARRAY_SIZE(msrs) <= KVM_MSRS, "kvm_vcpu.msr_known has room for each");

struct msr_list {
    struct kvm_msrs head;
    struct kvm_msr_entry entry[KVM_MSRS];
};

int kvm_msr_get(struct kvm_vcpu *v, uint32_t msr, uint64_t *value)
{
    struct msr_list l = { .head.nmsrs = 1, .entry = { { .index = msr } } };
    int r = kvm_ioctl(v->fd, KVM_GET_MSRS, &l);

    if (r == 1)
        *value = l.entry[0].data;
    return r == 1 ? 0 : r < 0 ? r : -EINVAL;
}

int kvm_msr_set(struct kvm_vcpu *v, uint32_t msr, uint64_t value)
{
    struct msr_list l = { .head.nmsrs = 1, .entry = { { .index = msr, .data = value } } };
    int r = kvm_ioctl(v->fd, KVM_SET_MSRS, &l);

    return r == 1 ? 0 : r < 0 ? r : -EINVAL;
}

void kvm_msrs_find(struct kvm_vcpu *v)
{
    uint64_t value;

    for (unsigned i = 0; i < ARRAY_SIZE(msrs); i++)
        v->msr_known[i] = kvm_msr_get(v, msrs[i].msr, &value) == 0;
}

static uint64_t *msr_field(struct x86_state *s, unsigned i) { return (uint64_t *)((char *)s + msrs[i].offset); }

static int get_msrs(struct kvm_vcpu *v, struct x86_state *s)
{
    struct msr_list l = { 0 };
    uint8_t which[KVM_MSRS];
    int r;

    for (unsigned i = 0; i < ARRAY_SIZE(msrs); i++)
        if (v->msr_known[i]) {
            which[l.head.nmsrs] = (uint8_t)i;
            l.entry[l.head.nmsrs++].index = msrs[i].msr;
        }
    r = kvm_ioctl(v->fd, KVM_GET_MSRS, &l);
    for (int i = 0; i < r; i++)
        *msr_field(s, which[i]) = l.entry[i].data;
    return r < 0 ? r : 0;
}

static int set_msrs(struct kvm_vcpu *v, const struct x86_state *s)
{
    struct x86_state copy = *s;

    for (unsigned i = 0; i < ARRAY_SIZE(msrs); i++) {
        uint64_t value = *msr_field(&copy, i);
        int err = v->msr_known[i] ? kvm_msr_set(v, msrs[i].msr, value) : value ? -ENOENT : 0;

        /* It stays in the state for the next engine; this guest may miss it. */
        if (err)
            log_debug("vCPU %u: KVM does not take %#llx in MSR %#x", v->vcpu->index, (unsigned long long)value, msrs[i].msr);
    }
    return 0;
}

/* ---- time stamp counter ---- */

static struct kvm_device_attr tsc_attribute(uint64_t *offset)
{
    return (struct kvm_device_attr){ .group = KVM_VCPU_TSC_CTRL, .attr = KVM_VCPU_TSC_OFFSET, .addr = (uintptr_t)offset };
}

/* KVM's own: to the host's counter, or to that after scaling. */
static uint64_t raw_offset(struct kvm_vcpu *v)
{
    uint64_t offset = v->kept.tsc_offset;
    struct kvm_device_attr a = tsc_attribute(&offset);

    kvm_ioctl(v->fd, KVM_GET_DEVICE_ATTR, &a);
    return offset;
}

uint64_t kvm_tsc_offset(struct kvm_vcpu *v) { return raw_offset(v) - v->k->tsc_skew; }

static int set_tsc_offset(struct kvm_vcpu *v, uint64_t offset)
{
    uint64_t raw = offset + v->k->tsc_skew;
    struct kvm_device_attr a = tsc_attribute(&raw);

    return kvm_ioctl(v->fd, KVM_SET_DEVICE_ATTR, &a);
}

void kvm_shift_tsc(struct vcpu *vcpu, uint64_t ticks)
{
    struct kvm_vcpu *v = vcpu->data;

    set_tsc_offset(v, kvm_tsc_offset(v) + ticks);
}

/* KVM scales by a rate in kHz and in its own arithmetic, so the two counters are apart, and move apart a little. */
void kvm_tsc_find_skew(struct kvm_machine *k)
{
    uint64_t guest;

    for (unsigned i = 0; k->tsc_scaled && i < KVM_MAX_VCPUS; i++)
        if (k->vcpu[i] && kvm_msr_get(k->vcpu[i], MSR_TSC, &guest) == 0) {
            k->tsc_skew = x86_tsc_base(k->machine, k->tsc_hz) - (guest - raw_offset(k->vcpu[i]));
            return;
        }
}

/* ---- segments ---- */

static struct kvm_segment to_segment(const struct x86_seg *s, bool long_mode)
{
    bool unusable = s->attr & SEG_UNUSABLE;

    return (struct kvm_segment){
        .base = s->base, .limit = s->limit, .selector = s->selector, .type = s->attr & SEG_TYPE, .s = (s->attr & SEG_S) != 0,
        .dpl = SEG_DPL(s->attr), .present = (s->attr & SEG_P) && !unusable, .avl = s->attr >> 12 & 1,
        .l = (s->attr & SEG_L) && long_mode, .db = (s->attr & SEG_DB) != 0, .g = (s->attr & SEG_G) != 0, .unusable = unusable,
    };
}

static struct x86_seg from_segment(const struct kvm_segment *k)
{
    return (struct x86_seg){
        .base = k->base, .limit = k->limit, .selector = k->selector,
        .attr = k->type | (uint32_t)k->s << 4 | (uint32_t)(k->dpl & 3) << 5 | (uint32_t)k->present << 7 | (uint32_t)k->avl << 12 |
                (uint32_t)k->l << 13 | (uint32_t)k->db << 14 | (uint32_t)k->g << 15 | (k->unusable ? SEG_UNUSABLE : 0),
    };
}

/* Where the segments of struct kvm_sregs belong. */
#define SEGMENTS(X) \
    X(cs, seg[SEG_CS]) X(ds, seg[SEG_DS]) X(es, seg[SEG_ES]) X(fs, seg[SEG_FS]) X(gs, seg[SEG_GS]) X(ss, seg[SEG_SS]) \
    X(tr, tr) X(ldt, ldtr)

static int set_sregs(struct kvm_vcpu *v, const struct x86_state *s)
{
    bool long_mode = s->efer & EFER_LMA;
    struct kvm_sregs k = {
        .gdt = { .base = s->gdt.base, .limit = s->gdt.limit },
        .idt = { .base = s->idt.base, .limit = s->idt.limit },
        .cr0 = s->cr0, .cr2 = s->cr2, .cr3 = s->cr3, .cr4 = s->cr4, .efer = s->efer,
        .cr8 = lapic_cr8(v->vcpu->lapic), .apic_base = lapic_base(v->vcpu->lapic),
    };

#define SET(to, from) k.to = to_segment(&s->from, long_mode);
    SEGMENTS(SET)
#undef SET
    return kvm_ioctl(v->fd, KVM_SET_SREGS, &k);
}

static int get_sregs(struct kvm_vcpu *v, struct x86_state *s)
{
    struct kvm_sregs k;
    int err = kvm_ioctl(v->fd, KVM_GET_SREGS, &k);

    if (err < 0)
        return err;
#define GET(from, to) s->to = from_segment(&k.from);
    SEGMENTS(GET)
#undef GET
    s->gdt = (struct x86_table){ .base = k.gdt.base, .limit = k.gdt.limit };
    s->idt = (struct x86_table){ .base = k.idt.base, .limit = k.idt.limit };
    s->cr0 = k.cr0;
    s->cr2 = k.cr2;
    s->cr3 = k.cr3;
    s->cr4 = k.cr4;
    s->efer = k.efer;
    return 0;
}

/* ---- general registers ---- */

/* In the order of struct kvm_regs. */
static const uint8_t gpr_order[16] = { RAX, RBX, RCX, RDX, RSI, RDI, RSP, RBP, R8, R9, R10, R11, R12, R13, R14, R15 };
_Static_assert(offsetof(struct kvm_regs, r15) == 15 * 8, "sixteen registers in a row");

static int set_regs(struct kvm_vcpu *v, const struct x86_state *s)
{
    struct kvm_regs k = { .rip = s->rip, .rflags = s->rflags | 2 };

    for (unsigned i = 0; i < 16; i++)
        (&k.rax)[i] = s->gpr[gpr_order[i]];
    return kvm_ioctl(v->fd, KVM_SET_REGS, &k);
}

static int get_regs(struct kvm_vcpu *v, struct x86_state *s)
{
    struct kvm_regs k;
    int err = kvm_ioctl(v->fd, KVM_GET_REGS, &k);

    if (err < 0)
        return err;
    for (unsigned i = 0; i < 16; i++)
        s->gpr[gpr_order[i]] = (&k.rax)[i];
    s->rip = k.rip;
    s->rflags = k.rflags;
    return 0;
}

/* ---- vector state ---- */

static int set_fpu(struct kvm_vcpu *v, const struct x86_state *s)
{
    struct kvm_xcrs xcrs = { .nr_xcrs = 1, .xcrs = { { .xcr = 0, .value = s->xcr0 } } };
    int err;

    _Static_assert(sizeof(struct kvm_xsave) >= XSAVE_MAX_SIZE, "images fit");
    memset(v->xsave, 0, v->k->host->xsave_size);
    x86_fpu_to_image(&s->fpu, v->vcpu->model->xcr0_allowed, v->xsave);
    err = kvm_ioctl(v->fd, KVM_SET_XSAVE, v->xsave);
    if (err >= 0 && v->k->host->xcrs)
        err = kvm_ioctl(v->fd, KVM_SET_XCRS, &xcrs);
    /* A model without XSAVE has no XCR0 either. */
    return err < 0 && s->xcr0 == 1 ? 0 : err;
}

static int get_fpu(struct kvm_vcpu *v, struct x86_state *s)
{
    struct kvm_xcrs xcrs = { 0 };
    int err = kvm_ioctl(v->fd, v->k->host->xsave_size > sizeof(struct kvm_xsave) ? KVM_GET_XSAVE2 : KVM_GET_XSAVE, v->xsave);

    if (err < 0)
        return err;
    x86_fpu_from_image(&s->fpu, v->xsave);
    if (v->k->host->xcrs && kvm_ioctl(v->fd, KVM_GET_XCRS, &xcrs) >= 0)
        for (unsigned i = 0; i < xcrs.nr_xcrs; i++)
            if (xcrs.xcrs[i].xcr == 0)
                s->xcr0 = xcrs.xcrs[i].value | 1;
    return 0;
}

/* ---- debug registers ---- */

static int set_debug(struct kvm_vcpu *v, const struct x86_state *s)
{
    struct kvm_debugregs k = { .dr6 = s->dr6, .dr7 = s->dr7 };

    memcpy(k.db, s->dr, sizeof(k.db));
    return kvm_ioctl(v->fd, KVM_SET_DEBUGREGS, &k);
}

static int get_debug(struct kvm_vcpu *v, struct x86_state *s)
{
    struct kvm_debugregs k;
    int err = kvm_ioctl(v->fd, KVM_GET_DEBUGREGS, &k);

    if (err < 0)
        return err;
    memcpy(s->dr, k.db, sizeof(s->dr));
    s->dr6 = k.dr6;
    s->dr7 = k.dr7;
    return 0;
}

/* ---- events ---- */

static int set_events(struct kvm_vcpu *v, const struct x86_state *s)
{
    static const uint8_t shadow[] = { 0, KVM_X86_SHADOW_INT_STI, KVM_X86_SHADOW_INT_MOV_SS };
    struct kvm_vcpu_events e = { .flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW };
    struct kvm_mp_state mp = { .mp_state = s->activity == X86_HALTED          ? KVM_MP_STATE_HALTED
                                           : s->activity == X86_WAIT_FOR_SIPI ? KVM_MP_STATE_INIT_RECEIVED
                                                                              : KVM_MP_STATE_RUNNABLE };
    int err;

    e.nmi.pending = s->nmi_pending;
    e.nmi.masked = s->nmi_blocked;
    e.interrupt.shadow = s->interrupt_shadow < ARRAY_SIZE(shadow) ? shadow[s->interrupt_shadow] : 0;
    v->shutdown = s->activity == X86_SHUTDOWN;
    err = kvm_ioctl(v->fd, KVM_SET_VCPU_EVENTS, &e);
    return err < 0 ? err : kvm_ioctl(v->fd, KVM_SET_MP_STATE, &mp);
}

static int get_events(struct kvm_vcpu *v, struct x86_state *s)
{
    struct kvm_vcpu_events e;
    int err = kvm_ioctl(v->fd, KVM_GET_VCPU_EVENTS, &e);

    if (err < 0)
        return err;
    s->nmi_pending = e.nmi.pending || e.nmi.injected;
    s->nmi_blocked = e.nmi.masked && !e.nmi.injected;
    /* AMD's processors do not tell the two apart; what STI's leaves out of MOV SS's are debug traps. */
    s->interrupt_shadow = e.interrupt.shadow & KVM_X86_SHADOW_INT_STI ? 1 : e.interrupt.shadow & KVM_X86_SHADOW_INT_MOV_SS ? 2 : 0;
    return 0;
}

/* First of all: KVM settles here what INIT and SIPI have to do to the registers. */
static int get_activity(struct kvm_vcpu *v, struct x86_state *s)
{
    struct kvm_mp_state mp;
    int err = kvm_ioctl(v->fd, KVM_GET_MP_STATE, &mp);

    if (err < 0)
        return err;
    switch (mp.mp_state) {
    case KVM_MP_STATE_HALTED: s->activity = X86_HALTED; break;
    case KVM_MP_STATE_UNINITIALIZED:
    case KVM_MP_STATE_INIT_RECEIVED: s->activity = X86_WAIT_FOR_SIPI; break;
    default: s->activity = X86_RUNNING;
    }
    if (v->shutdown)
        s->activity = X86_SHUTDOWN;
    return 0;
}

/* On a host whose own TSC is not to be trusted, KVM moves a guest's about. */
static bool about_same(const struct kvm_vcpu *v, uint64_t difference)
{
    return difference + v->k->tsc_hz / 10 < v->k->tsc_hz / 5;
}

/* ---- all of it ---- */

void kvm_export(struct vcpu *vcpu, struct x86_state *s)
{
    static const struct {
        const char *what;
        int (*get)(struct kvm_vcpu *, struct x86_state *);
    } part[] = { { "activity", get_activity }, { "registers", get_regs }, { "system registers", get_sregs },
                 { "vector state", get_fpu }, { "MSRs", get_msrs },       { "debug registers", get_debug },
                 { "events", get_events } };
    struct kvm_vcpu *v = vcpu->data;

    *s = v->kept;
    for (unsigned i = 0; i < ARRAY_SIZE(part); i++) {
        int err = part[i].get(v, s);

        if (err < 0)
            log_error("vCPU %u: KVM does not give its %s: %s", vcpu->index, part[i].what, strerror(-err));
    }
    s->tsc_offset = kvm_tsc_offset(v);
    s->nmi_pending |= (atomic_load(&v->request) & KVM_REQUEST_NMI) != 0;
}

void kvm_import(struct vcpu *vcpu, const struct x86_state *s)
{
    static const struct {
        const char *what;
        int (*set)(struct kvm_vcpu *, const struct x86_state *);
    } part[] = { { "system registers", set_sregs }, { "registers", set_regs },       { "vector state", set_fpu },
                 { "MSRs", set_msrs },              { "debug registers", set_debug }, { "events", set_events } };
    struct kvm_vcpu *v = vcpu->data;

    atomic_fetch_and(&v->request, (uint32_t)KVM_REQUEST_EXIT);
    v->kept = *s;
    /* A KVM without hardware cannot offset what user mode reads; it takes the value all the same. */
    if ((set_tsc_offset(v, s->tsc_offset) < 0 || !about_same(v, kvm_tsc_offset(v) - s->tsc_offset)) && !v->told_about_tsc) {
        v->told_about_tsc = true;
        log_warn("vCPU %u: this KVM cannot give the guest a TSC of its own; its clock may jump", vcpu->index);
    }
    for (unsigned i = 0; i < ARRAY_SIZE(part); i++) {
        int err = part[i].set(v, s);

        if (err < 0)
            log_error("vCPU %u: KVM does not take its %s: %s", vcpu->index, part[i].what, strerror(-err));
    }
}
