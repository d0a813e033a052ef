/*
 * Model-specific registers: a table of those that are plain storage or constant, functions for those that do something.
 * What is in neither raises #GP, as unknown registers do.
 *
 * Registers that operating systems touch without asking CPUID first are there even when what they
 * control is not: they read as "off" and take only harmless values.
 */
#include "isa/x86/msr.h"

#include <errno.h>
#include <stddef.h>

#include "base/util.h"
#include "device/irqchip/irqchip.h"
#include "isa/x86/cpuid.h"
#include "isa/x86/kvmclock.h"
#include "isa/x86/mmu.h"
#include "isa/x86/system.h"

enum {
    MSR_TSC = 0x10, MSR_PLATFORM_ID = 0x17, MSR_APIC_BASE = 0x1b, MSR_FEATURE_CONTROL = 0x3a, MSR_TSC_ADJUST = 0x3b,
    MSR_SPEC_CTRL = 0x48, MSR_PRED_CMD = 0x49, MSR_BIOS_SIGN_ID = 0x8b, MSR_MTRR_CAP = 0xfe,
    MSR_ARCH_CAPABILITIES = 0x10a, MSR_SYSENTER_CS = 0x174, MSR_SYSENTER_ESP, MSR_SYSENTER_EIP,
    MSR_MCG_CAP = 0x179, MSR_MCG_STATUS = 0x17a, MSR_MISC_ENABLE = 0x1a0, MSR_DEBUGCTL = 0x1d9, MSR_MTRR_PHYS = 0x200,
    MSR_MTRR_FIX64K = 0x250, MSR_MTRR_FIX16K_80000 = 0x258, MSR_MTRR_FIX16K_A0000 = 0x259, MSR_MTRR_FIX4K = 0x268,
    MSR_PAT = 0x277, MSR_MTRR_DEF_TYPE = 0x2ff, MSR_TSC_DEADLINE = 0x6e0, MSR_X2APIC = 0x800, MSR_X2APIC_END = 0x8ff,
    MSR_XSS = 0xda0, MSR_KVM_OLD_WALL_CLOCK = 0x11, MSR_KVM_OLD_SYSTEM_TIME = 0x12, MSR_KVM_WALL_CLOCK = 0x4b564d00,
    MSR_KVM_SYSTEM_TIME = 0x4b564d01,
};
#define MSR_EFER 0xc0000080u
#define MSR_STAR 0xc0000081u
#define MSR_LSTAR 0xc0000082u
#define MSR_CSTAR 0xc0000083u
#define MSR_SFMASK 0xc0000084u
#define MSR_FS_BASE 0xc0000100u
#define MSR_GS_BASE 0xc0000101u
#define MSR_KERNEL_GS_BASE 0xc0000102u
#define MSR_TSC_AUX 0xc0000103u

#define EFER_AUTO_IBRS (1ull << 21)

/* What an Intel processor says it needs no help with: see the note on speculation in cpuid_features.def. */
#define ARCH_CAPABILITIES (1ull << 0 /* RDCL_NO */ | 1ull << 1 /* IBRS_ALL */ | 1ull << 3 /* SKIP_L1DFL */ | \
                           1ull << 5 /* MDS_NO */ | 1ull << 6 /* IF_PSCHANGE_MC_NO */ | 1ull << 8 /* TAA_NO */ | \
                           1ull << 13 /* SBDR_SSDP_NO */ | 1ull << 14 /* FBSDP_NO */ | 1ull << 15 /* PSDP_NO */ | \
                           1ull << 20 /* BHI_NO */ | 1ull << 24 /* PBRSB_NO */ | 1ull << 26 /* GDS_NO */ | \
                           1ull << 27 /* RFDS_NO */ | 1ull << 62 /* ITS_NO */)

enum vendor { ANY, AMD, INTEL };

/* A register without effects of its own. */
struct plain_msr {
    uint32_t msr;
    uint8_t vendor;
    uint8_t check;
    uint16_t offset;            /* of a uint64_t in struct x86_state; 0: none, reads as value */
    uint64_t value;
    uint64_t writable;          /* writing other bits raises #GP; storing nothing, they are dropped */
};
enum check { NO_CHECK, CANONICAL, READ_ONLY };
#define FIELD(f) offsetof(struct x86_state, f)
#define ALL ~0ull

static const struct plain_msr plain[] = {
    { MSR_PLATFORM_ID, INTEL, READ_ONLY, 0, 0, 0 },
    { MSR_FEATURE_CONTROL, INTEL, READ_ONLY, 0, 1, 0 },             /* locked, nothing enabled */
    { MSR_SPEC_CTRL, INTEL, NO_CHECK, FIELD(spec_ctrl), 0, 1 },     /* IBRS */
    { MSR_PRED_CMD, INTEL, NO_CHECK, 0, 0, 1 },                     /* IBPB */
    { MSR_BIOS_SIGN_ID, ANY, NO_CHECK, 0, 0, ALL },                 /* microcode: none to speak of */
    { MSR_MTRR_CAP, ANY, READ_ONLY, 0, 0x508, 0 },                  /* write combining, fixed ranges, 8 variable ones */
    { MSR_ARCH_CAPABILITIES, INTEL, READ_ONLY, 0, ARCH_CAPABILITIES, 0 },
    { MSR_SYSENTER_CS, ANY, NO_CHECK, FIELD(sysenter_cs), 0, 0xffffffff },
    { MSR_SYSENTER_ESP, ANY, CANONICAL, FIELD(sysenter_esp), 0, ALL },
    { MSR_SYSENTER_EIP, ANY, CANONICAL, FIELD(sysenter_eip), 0, ALL },
    { MSR_MCG_CAP, ANY, READ_ONLY, 0, 0, 0 },                       /* no error banks */
    { MSR_MCG_STATUS, ANY, NO_CHECK, 0, 0, 7 },
    { MSR_MISC_ENABLE, INTEL, NO_CHECK, FIELD(misc_enable), 0, 0x400041 | 1 << 3 | 1 << 11 | 1 << 12 | 1 << 16 },
    { MSR_DEBUGCTL, ANY, NO_CHECK, 0, 0, 3 },                       /* branch records and branch traps never happen */
    { MSR_STAR, ANY, NO_CHECK, FIELD(star), 0, ALL },
    { MSR_LSTAR, ANY, CANONICAL, FIELD(lstar), 0, ALL },
    { MSR_CSTAR, ANY, CANONICAL, FIELD(cstar), 0, ALL },
    { MSR_SFMASK, ANY, NO_CHECK, FIELD(sfmask), 0, 0xffffffff },
    { MSR_FS_BASE, ANY, CANONICAL, FIELD(seg[SEG_FS].base), 0, ALL },
    { MSR_GS_BASE, ANY, CANONICAL, FIELD(seg[SEG_GS].base), 0, ALL },
    { MSR_KERNEL_GS_BASE, ANY, CANONICAL, FIELD(kernel_gs_base), 0, ALL },
    { MSR_TSC_AUX, ANY, NO_CHECK, FIELD(tsc_aux), 0, 0xffffffff },
    { MSR_XSS, ANY, NO_CHECK, FIELD(xss), 0, 0 },                   /* no supervisor state components */

    /* Last-branch registers that kernels dump and clear, P-state limits. */
    { 0x1db, ANY, READ_ONLY, 0, 0, 0 },
    { 0x1dc, ANY, READ_ONLY, 0, 0, 0 },
    { 0x1dd, ANY, READ_ONLY, 0, 0, 0 },
    { 0x1de, ANY, READ_ONLY, 0, 0, 0 },
    { 0x2a, INTEL, NO_CHECK, 0, 0, ALL },                           /* EBL_CR_POWERON */
    { 0xce, INTEL, READ_ONLY, 0, 0, 0 },                            /* PLATFORM_INFO */
    { 0x140, INTEL, NO_CHECK, 0, 0, 0 },                            /* MISC_FEATURES_ENABLES */

    { 0xc0010010, AMD, NO_CHECK, 0, 0, 0 },                         /* SYSCFG: no memory encryption */
    { 0xc0010015, AMD, NO_CHECK, 0, 1 << 24, 1 << 24 | 1 << 18 | 1 << 8 | 1 << 6 | 1 << 3 }, /* HWCR: TSC at P0 rate */
    { 0xc001001a, AMD, NO_CHECK, 0, 0, 0 },                         /* TOP_MEM */
    { 0xc001001d, AMD, NO_CHECK, 0, 0, 0 },                         /* TOP_MEM2 */
    { 0xc001001f, AMD, NO_CHECK, 0, 0, 1ull << 46 },                /* NB_CFG: extended 0xCF8 accesses */
    { 0xc0010020, AMD, NO_CHECK, 0, 0, ALL },                       /* PATCH_LOADER */
    { 0xc0010112, AMD, NO_CHECK, 0, 0, 0 },                         /* SMM_ADDR */
    { 0xc0010113, AMD, NO_CHECK, 0, 0, 0 },                         /* SMM_MASK */
    { 0xc0010114, AMD, NO_CHECK, 0, 1 << 4 | 1 << 3, 1 << 4 | 1 << 3 }, /* VM_CR: SVM disabled and locked */
    { 0xc0011022, AMD, NO_CHECK, 0, 0, 0 },                         /* DC_CFG */
    { 0xc0011029, AMD, NO_CHECK, 0, 1 << 1, 1 << 1 },               /* DE_CFG: LFENCE waits */
};

static const struct plain_msr *find_plain(const struct x86_cpu *cpu, uint32_t msr)
{
    for (unsigned i = 0; i < ARRAY_SIZE(plain); i++)
        if (plain[i].msr == msr)
            return plain[i].vendor == ANY || plain[i].vendor == (cpu->amd ? AMD : INTEL) ? &plain[i] : NULL;
    return NULL;
}

static uint64_t *field(struct x86_cpu *cpu, const struct plain_msr *p)
{
    return (uint64_t *)((char *)&cpu->s + p->offset);
}

/* ---- memory types ---- */

static bool memory_type_ok(uint8_t type)
{
    return type == 0 || type == 1 || (type >= 4 && type <= 6);
}

/* The table's index of a fixed-range register, or -1. */
static int mtrr_fixed_index(uint32_t msr)
{
    if (msr == MSR_MTRR_FIX64K)
        return 0;
    if (msr == MSR_MTRR_FIX16K_80000 || msr == MSR_MTRR_FIX16K_A0000)
        return 1 + (int)(msr - MSR_MTRR_FIX16K_80000);
    if (msr >= MSR_MTRR_FIX4K && msr < MSR_MTRR_FIX4K + 8)
        return 3 + (int)(msr - MSR_MTRR_FIX4K);
    return -1;
}

static uint64_t *mtrr_register(struct x86_cpu *cpu, uint32_t msr)
{
    int fixed = mtrr_fixed_index(msr);

    if (fixed >= 0)
        return &cpu->s.mtrr_fixed[fixed];
    if (msr >= MSR_MTRR_PHYS && msr < MSR_MTRR_PHYS + 16)
        return msr & 1 ? &cpu->s.mtrr_mask[(msr - MSR_MTRR_PHYS) / 2] : &cpu->s.mtrr_base[(msr - MSR_MTRR_PHYS) / 2];
    return msr == MSR_MTRR_DEF_TYPE ? &cpu->s.mtrr_def_type : NULL;
}

/*
 * Guest memory is cached whatever these say; they are kept because kernels set them and compare them
 * between processors.
 */
static int mtrr_write(struct x86_cpu *cpu, uint32_t msr, uint64_t value)
{
    uint64_t address = ((1ull << cpu->phys_bits) - 1) & ~0xfffull;

    if (mtrr_fixed_index(msr) >= 0) {
        for (unsigned i = 0; i < 8; i++)
            if (!memory_type_ok((uint8_t)(value >> 8 * i)))
                return -EINVAL;
    } else if (msr == MSR_MTRR_DEF_TYPE) {
        if ((value & ~0xcffull) || !memory_type_ok((uint8_t)value))
            return -EINVAL;
    } else if (msr & 1) {
        if (value & ~(address | 0x800))
            return -EINVAL;
    } else if ((value & ~(address | 0xff)) || !memory_type_ok((uint8_t)value)) {
        return -EINVAL;
    }
    *mtrr_register(cpu, msr) = value;
    return 0;
}

static int pat_write(struct x86_cpu *cpu, uint64_t value)
{
    for (unsigned i = 0; i < 8; i++) {
        uint8_t type = (uint8_t)(value >> 8 * i);

        if (!memory_type_ok(type) && type != 7)
            return -EINVAL;
    }
    cpu->s.pat = value;
    return 0;
}

/* ---- EFER ---- */

static int efer_write(struct x86_cpu *cpu, uint64_t value)
{
    uint64_t known = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE | (cpu->amd ? EFER_AUTO_IBRS : 0);
    uint64_t changed = cpu->s.efer ^ value;

    if (value & ~known)
        return -EINVAL;
    if ((changed & EFER_LME) && (cpu->s.cr0 & CR0_PG))
        return -EINVAL;
    /* LMA is the processor's own. */
    cpu->s.efer = (value & ~EFER_LMA) | (cpu->s.efer & EFER_LMA);
    if (changed & EFER_NXE)
        x86_tlb_flush_all(cpu);
    x86_update_mode(cpu);
    return 0;
}

/* ---- time ---- */

static int tsc_write(struct x86_cpu *cpu, uint64_t value)
{
    uint64_t delta = value - x86_guest_tsc(cpu);

    cpu->s.tsc_offset += delta;
    cpu->s.tsc_adjust += delta;
    x86_kvmclock_update(cpu);
    return 0;
}

static int tsc_adjust_write(struct x86_cpu *cpu, uint64_t value)
{
    cpu->s.tsc_offset += value - cpu->s.tsc_adjust;
    cpu->s.tsc_adjust = value;
    x86_kvmclock_update(cpu);
    return 0;
}

/* ---- the local APIC ---- */

static int apic_base_write(struct x86_cpu *cpu, uint64_t value)
{
    int r;

    if (cpu->lapic == NULL || value >> cpu->phys_bits != 0)
        return -EINVAL;
    r = lapic_set_base(cpu->lapic, value);
    if (r < 0)
        return r;
    value = lapic_base(cpu->lapic);
    /* Enabled (bit 11), and not in x2APIC mode (bit 10). */
    cpu->apic_base = (value & 0xc00) == 0x800 ? value & GUEST_PAGE_MASK : ~(gpa_t)0;
    x86_tlb_flush_all(cpu);
    x86_request(cpu, REQUEST_INTR);
    return 0;
}

static int x2apic_write(struct x86_cpu *cpu, uint32_t msr, uint64_t value)
{
    int r = cpu->lapic != NULL ? lapic_msr_write(cpu->lapic, msr, value) : -EINVAL;

    if (r == 0 && lapic_pending(cpu->lapic) >= 0)
        x86_request(cpu, REQUEST_INTR);
    return r;
}

/* ---- all of them ---- */

int x86_msr_read(struct x86_cpu *cpu, uint32_t msr, uint64_t *value)
{
    const struct plain_msr *p;
    uint64_t *reg;

    if (msr >= MSR_X2APIC && msr <= MSR_X2APIC_END)
        return cpu->lapic != NULL ? lapic_msr_read(cpu->lapic, msr, value) : -EINVAL;
    switch (msr) {
    case MSR_TSC:
        *value = x86_guest_tsc(cpu);
        return 0;
    case MSR_TSC_ADJUST:
        *value = cpu->s.tsc_adjust;
        return 0;
    case MSR_APIC_BASE:
        if (cpu->lapic == NULL)
            return -EINVAL;
        *value = lapic_base(cpu->lapic);
        return 0;
    case MSR_TSC_DEADLINE:
        if (cpu->lapic == NULL)
            return -EINVAL;
        *value = lapic_tsc_deadline(cpu->lapic);
        return 0;
    case MSR_PAT:
        *value = cpu->s.pat;
        return 0;
    case MSR_EFER:
        *value = cpu->s.efer;
        return 0;
    case MSR_KVM_OLD_WALL_CLOCK:
    case MSR_KVM_WALL_CLOCK:
        *value = cpu->s.kvm_wall_clock;
        return 0;
    case MSR_KVM_OLD_SYSTEM_TIME:
    case MSR_KVM_SYSTEM_TIME:
        *value = cpu->s.kvm_system_time;
        return 0;
    }
    p = find_plain(cpu, msr);
    if (p != NULL) {
        *value = p->offset != 0 ? *field(cpu, p) : p->value;
        return 0;
    }
    reg = mtrr_register(cpu, msr);
    if (reg != NULL) {
        *value = *reg;
        return 0;
    }
    return -EINVAL;
}

int x86_msr_write(struct x86_cpu *cpu, uint32_t msr, uint64_t value)
{
    const struct plain_msr *p;

    if (msr >= MSR_X2APIC && msr <= MSR_X2APIC_END)
        return x2apic_write(cpu, msr, value);
    switch (msr) {
    case MSR_TSC:
        return tsc_write(cpu, value);
    case MSR_TSC_ADJUST:
        return tsc_adjust_write(cpu, value);
    case MSR_APIC_BASE:
        return apic_base_write(cpu, value);
    case MSR_TSC_DEADLINE:
        if (cpu->lapic == NULL)
            return -EINVAL;
        lapic_set_tsc_deadline(cpu->lapic, value, x86_guest_tsc(cpu));
        return 0;
    case MSR_PAT:
        return pat_write(cpu, value);
    case MSR_EFER:
        return efer_write(cpu, value);
    case MSR_KVM_OLD_WALL_CLOCK:
    case MSR_KVM_WALL_CLOCK:
        return x86_kvmclock_set_wall_clock(cpu, value);
    case MSR_KVM_OLD_SYSTEM_TIME:
    case MSR_KVM_SYSTEM_TIME:
        return x86_kvmclock_set_system_time(cpu, value);
    }
    p = find_plain(cpu, msr);
    if (p != NULL) {
        if (p->check == READ_ONLY || (value & ~p->writable) || (p->check == CANONICAL && !x86_canonical(cpu, value)))
            return -EINVAL;
        if (p->offset != 0)
            *field(cpu, p) = value;
        return 0;
    }
    return mtrr_register(cpu, msr) != NULL ? mtrr_write(cpu, msr, value) : -EINVAL;
}

