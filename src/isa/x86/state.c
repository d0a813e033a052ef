/*
 * The canonical state: power-on and INIT values, and its saved form.
 * SDM vol. 3A table 9-1 (10-1 in newer editions). Called while the vCPU does not run.
 */
#include "isa/x86/state.h"

#include <errno.h>
#include <string.h>

#include "base/log.h"
#include "base/state.h"
#include "base/util.h"
#include "isa/x86/xsave.h"

/* 2: init_pending, sipi_pending (absent: none). */
#define STATE_VERSION 2
#define SEGMENT_VERSION 1

#define CR0_RESET (CR0_ET | CR0_NW | CR0_CD)
#define DR6_RESET 0xffff0ff0u
#define DR7_RESET 0x400u
/*
 * Enabled, all memory write-back: not what the processor starts with, but what firmware leaves behind for an operating
 * system, which may be started without any. Linux switches the PAT off when it finds the MTRRs off.
 */
#define MTRR_DEF_TYPE_RESET 0x806u
#define PAT_RESET 0x0007040600070406ull
/* Fast strings; no branch trace store, no precise events. */
#define MISC_ENABLE_RESET (1u | 1u << 11 | 1u << 12)

/* What RESET and INIT set alike. */
static void reset_common(struct x86_state *s, bool boot_cpu)
{
    const struct x86_seg data = { .limit = 0xffff, .attr = SEG_P | SEG_S | 3 };

    memset(s->gpr, 0, sizeof(s->gpr));
    s->rip = 0xfff0;
    s->rflags = 2;
    for (unsigned i = 0; i < ARRAY_SIZE(s->seg); i++)
        s->seg[i] = data;
    s->seg[SEG_CS] = (struct x86_seg){ .selector = 0xf000, .base = 0xffff0000, .limit = 0xffff,
                                       .attr = SEG_P | SEG_S | 0xb };
    s->ldtr = (struct x86_seg){ .limit = 0xffff, .attr = SEG_P | 2 };
    s->tr = (struct x86_seg){ .limit = 0xffff, .attr = SEG_P | 0xb };
    s->gdt = s->idt = (struct x86_table){ .limit = 0xffff };
    s->cr2 = s->cr3 = s->cr4 = 0;
    s->efer = 0;
    memset(s->dr, 0, sizeof(s->dr));
    s->dr6 = DR6_RESET;
    s->dr7 = DR7_RESET;
    s->interrupt_shadow = 0;
    s->nmi_blocked = s->nmi_pending = false;
    s->init_pending = s->sipi_pending = false;
    s->activity = boot_cpu ? X86_RUNNING : X86_WAIT_FOR_SIPI;
    s->sipi_vector = 0;
}

void x86_state_reset(struct x86_state *s, bool boot_cpu)
{
    memset(s, 0, sizeof(*s));
    reset_common(s, boot_cpu);
    s->cr0 = CR0_RESET;
    s->xcr0 = 1;
    s->pat = PAT_RESET;
    s->mtrr_def_type = MTRR_DEF_TYPE_RESET;
    s->misc_enable = MISC_ENABLE_RESET;
    s->fpu.fcw = 0x40;
    s->fpu.ftw = 0xff;
    s->fpu.mxcsr = MXCSR_DEFAULT;
}

void x86_state_init_signal(struct x86_state *s, bool boot_cpu)
{
    /* INIT keeps cache control, x87 and vector state, XCR0, the time stamp counter and the other MSRs. */
    uint64_t cr0 = (s->cr0 & (CR0_CD | CR0_NW)) | CR0_ET;

    reset_common(s, boot_cpu);
    s->cr0 = cr0;
}

/* ---- saved form ---- */

/* One field: its name in the stream, where and how long it is. Integers and arrays alike, little-endian. */
struct field {
    const char *name;
    uint16_t offset, size;
};
#define FIELD(f) { #f, offsetof(struct x86_state, f), sizeof(((struct x86_state *)0)->f) }
#define FPU(f) { #f, offsetof(struct x86_state, fpu.f), sizeof(((struct x86_state *)0)->fpu.f) }

static const struct field fields[] = {
    FIELD(gpr), FIELD(rip), FIELD(rflags), FIELD(cr0), FIELD(cr2), FIELD(cr3), FIELD(cr4), FIELD(xcr0), FIELD(xss),
    FIELD(efer), FIELD(dr), FIELD(dr6), FIELD(dr7), FIELD(star), FIELD(lstar), FIELD(cstar), FIELD(sfmask),
    FIELD(kernel_gs_base), FIELD(sysenter_cs), FIELD(sysenter_esp), FIELD(sysenter_eip), FIELD(pat), FIELD(tsc_aux),
    FIELD(misc_enable), FIELD(spec_ctrl), FIELD(mtrr_def_type), FIELD(mtrr_fixed), FIELD(mtrr_base), FIELD(mtrr_mask),
    FIELD(tsc_offset), FIELD(tsc_adjust), FIELD(kvm_wall_clock), FIELD(kvm_system_time), FIELD(kvm_steal_time),
    FIELD(kvm_poll_control), FIELD(interrupt_shadow), FIELD(activity), FIELD(sipi_vector),
    FPU(zmm), FPU(k), FPU(st), FPU(fcw), FPU(fsw), FPU(ftw), FPU(fop), FPU(fip), FPU(fdp), FPU(fcs), FPU(fds),
    FPU(mxcsr), FPU(xinuse_hint),
};

static const struct field segments[] = {
    { "es", offsetof(struct x86_state, seg[SEG_ES]), 0 }, { "cs", offsetof(struct x86_state, seg[SEG_CS]), 0 },
    { "ss", offsetof(struct x86_state, seg[SEG_SS]), 0 }, { "ds", offsetof(struct x86_state, seg[SEG_DS]), 0 },
    { "fs", offsetof(struct x86_state, seg[SEG_FS]), 0 }, { "gs", offsetof(struct x86_state, seg[SEG_GS]), 0 },
    { "ldtr", offsetof(struct x86_state, ldtr), 0 },      { "tr", offsetof(struct x86_state, tr), 0 },
};

void x86_state_save(const struct x86_state *s, struct state_writer *w)
{
    state_begin(w, "x86-cpu", STATE_VERSION);
    for (unsigned i = 0; i < ARRAY_SIZE(fields); i++)
        state_put_bytes(w, fields[i].name, (const char *)s + fields[i].offset, fields[i].size);
    state_put_u64(w, "nmi_blocked", s->nmi_blocked);
    state_put_u64(w, "nmi_pending", s->nmi_pending);
    state_put_u64(w, "init_pending", s->init_pending);
    state_put_u64(w, "sipi_pending", s->sipi_pending);
    for (unsigned i = 0; i < ARRAY_SIZE(segments); i++) {
        const struct x86_seg *seg = (const void *)((const char *)s + segments[i].offset);

        state_begin(w, segments[i].name, SEGMENT_VERSION);
        state_put_u64(w, "selector", seg->selector);
        state_put_u64(w, "base", seg->base);
        state_put_u64(w, "limit", seg->limit);
        state_put_u64(w, "attr", seg->attr);
        state_end(w);
    }
    state_put_u64(w, "gdt_base", s->gdt.base);
    state_put_u64(w, "gdt_limit", s->gdt.limit);
    state_put_u64(w, "idt_base", s->idt.base);
    state_put_u64(w, "idt_limit", s->idt.limit);
    state_end(w);
}

static bool canonical(uint64_t v)
{
    return (uint64_t)((int64_t)(v << 16) >> 16) == v;
}

/* NULL, or what is wrong: things that no engine and no processor could continue from. */
static const char *complaint(const struct x86_state *s)
{
    if (!(s->rflags & 2) || (s->rflags & ~0x3f7fd7ull))
        return "rflags";
    if ((s->cr0 >> 32) || ((s->cr0 & CR0_PG) && !(s->cr0 & CR0_PE)) || ((s->cr0 & CR0_NW) && !(s->cr0 & CR0_CD)))
        return "cr0";
    if (s->cr4 >> 32)
        return "cr4";
    if (s->efer & ~(EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE | 1ull << 21 /* automatic IBRS */))
        return "efer";
    if (((s->efer & EFER_LMA) != 0) != ((s->efer & EFER_LME) && (s->cr0 & CR0_PG)))
        return "efer: long mode active";
    if ((s->efer & EFER_LMA) && !(s->cr4 & CR4_PAE))
        return "cr4: long mode without PAE";
    if ((s->cr4 & CR4_PCIDE) && !(s->efer & EFER_LMA))
        return "cr4: PCID outside long mode";
    if (s->rflags & RFLAGS_VM && ((s->efer & EFER_LMA) || !(s->cr0 & CR0_PE)))
        return "rflags: virtual-8086 mode";
    if ((s->efer & EFER_LMA) && (s->seg[SEG_CS].attr & SEG_L)) {
        if (s->seg[SEG_CS].attr & SEG_DB)
            return "cs: both L and D";
        if (!canonical(s->rip))
            return "rip";
    } else if (s->rip >> 32) {
        return "rip";
    }
    for (unsigned i = 0; i < ARRAY_SIZE(s->seg); i++)
        if (s->seg[i].attr & ~(0xf0ffu | SEG_UNUSABLE) || !canonical(s->seg[i].base))
            return "segment register";
    if (!canonical(s->ldtr.base) || !canonical(s->tr.base) || !canonical(s->gdt.base) || !canonical(s->idt.base))
        return "descriptor table";
    if (!canonical(s->lstar) || !canonical(s->cstar) || !canonical(s->kernel_gs_base) ||
        !canonical(s->sysenter_esp) || !canonical(s->sysenter_eip))
        return "non-canonical address in an MSR";
    if (!x86_xcr0_consistent(s->xcr0) || (s->xcr0 & ~0xe7ull) || s->xss != 0)
        return "xcr0";
    if ((s->dr6 >> 32) || (s->dr7 >> 32))
        return "dr6 or dr7";
    if (s->fpu.mxcsr & ~MXCSR_MASK)
        return "mxcsr";
    if (s->activity > X86_SHUTDOWN)
        return "activity";
    if (s->interrupt_shadow > 2)
        return "interrupt_shadow";
    for (unsigned i = 0; i < 8; i++) {
        uint8_t type = (uint8_t)(s->pat >> 8 * i);

        if (type == 2 || type == 3 || type > 7)
            return "pat";
    }
    return NULL;
}

/* A number that must fit. */
static int get_number(const struct state_reader *r, const char *name, uint64_t max, uint64_t *v)
{
    int err = state_get_u64(r, name, v);

    if (err == 0 && *v > max)
        err = -EINVAL;
    if (err < 0)
        log_error("saved processor state: %s: %s", name, err == -ENOENT ? "missing" : "bad value");
    return err < 0 ? -EINVAL : 0;
}

/* One that older writers did not have. */
static int get_flag_since(const struct state_reader *r, uint32_t since, const char *name, bool *flag)
{
    uint64_t v = 0;
    int err = r->version < since ? 0 : get_number(r, name, 1, &v);

    *flag = v;
    return err;
}

static int load_segment(const struct state_reader *r, const char *name, struct x86_seg *seg)
{
    struct state_reader section;
    uint64_t selector, base, limit, attr;

    if (state_open(r, name, &section) < 0) {
        log_error("saved processor state: %s: missing", name);
        return -EINVAL;
    }
    if (get_number(&section, "selector", 0xffff, &selector) < 0 || get_number(&section, "base", ~0ull, &base) < 0 ||
        get_number(&section, "limit", UINT32_MAX, &limit) < 0 || get_number(&section, "attr", UINT32_MAX, &attr) < 0)
        return -EINVAL;
    *seg = (struct x86_seg){ .base = base, .limit = (uint32_t)limit, .attr = (uint32_t)attr,
                             .selector = (uint16_t)selector };
    return 0;
}

int x86_state_load(struct x86_state *out, const struct state_reader *r)
{
    struct state_reader section;
    struct x86_state s;
    uint64_t gdt_base, gdt_limit, idt_base, idt_limit, nmi_blocked, nmi_pending;
    const char *wrong;

    memset(&s, 0, sizeof(s));
    if (state_open(r, "x86-cpu", &section) < 0) {
        log_error("saved processor state: no section x86-cpu");
        return -EINVAL;
    }
    if (section.version > STATE_VERSION) {
        log_error("saved processor state: version %u, this ringfort knows up to %u: use a newer one", section.version,
                  STATE_VERSION);
        return -EINVAL;
    }
    for (unsigned i = 0; i < ARRAY_SIZE(fields); i++) {
        int err = state_get_bytes(&section, fields[i].name, (char *)&s + fields[i].offset, fields[i].size);

        if (err < 0) {
            if (err == -ENOENT)
                log_error("saved processor state: %s: missing", fields[i].name);
            return -EINVAL;
        }
    }
    for (unsigned i = 0; i < ARRAY_SIZE(segments); i++)
        if (load_segment(&section, segments[i].name, (void *)((char *)&s + segments[i].offset)) < 0)
            return -EINVAL;
    if (get_number(&section, "gdt_base", ~0ull, &gdt_base) < 0 ||
        get_number(&section, "gdt_limit", 0xffff, &gdt_limit) < 0 ||
        get_number(&section, "idt_base", ~0ull, &idt_base) < 0 ||
        get_number(&section, "idt_limit", 0xffff, &idt_limit) < 0 ||
        get_number(&section, "nmi_blocked", 1, &nmi_blocked) < 0 ||
        get_number(&section, "nmi_pending", 1, &nmi_pending) < 0 ||
        get_flag_since(&section, 2, "init_pending", &s.init_pending) < 0 ||
        get_flag_since(&section, 2, "sipi_pending", &s.sipi_pending) < 0)
        return -EINVAL;
    s.gdt = (struct x86_table){ .base = gdt_base, .limit = (uint16_t)gdt_limit };
    s.idt = (struct x86_table){ .base = idt_base, .limit = (uint16_t)idt_limit };
    s.nmi_blocked = nmi_blocked;
    s.nmi_pending = nmi_pending;

    wrong = complaint(&s);
    if (wrong != NULL) {
        log_error("saved processor state: impossible value: %s", wrong);
        return -EINVAL;
    }
    *out = s;
    return 0;
}
