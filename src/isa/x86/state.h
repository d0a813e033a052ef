/*
 * The canonical state of an x86-64 processor: what is read out of one engine and given
 * to another, saved, and sent to another host. Nothing in it depends on an engine.
 */
#ifndef RINGFORT_ISA_X86_STATE_H
#define RINGFORT_ISA_X86_STATE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15 };
enum x86_segreg { SEG_ES, SEG_CS, SEG_SS, SEG_DS, SEG_FS, SEG_GS };

/*
 * A segment register with its hidden part. attr has the layout of bits 55:40 of a descriptor (as in
 * the VMCS access rights): type 3:0, S 4, DPL 6:5, P 7, AVL 12, L 13, D/B 14, G 15; bit 16: unusable (null).
 * limit is in bytes, already scaled by G.
 */
struct x86_seg {
    uint64_t base;
    uint32_t limit;
    uint32_t attr;
    uint16_t selector;
};
#define SEG_TYPE 0x000fu
#define SEG_S 0x0010u
#define SEG_DPL(attr) (((attr) >> 5) & 3u)
#define SEG_P 0x0080u
#define SEG_L 0x2000u
#define SEG_DB 0x4000u
#define SEG_G 0x8000u
#define SEG_UNUSABLE 0x10000u

struct x86_table {
    uint64_t base;
    uint16_t limit;
};

enum x86_activity { X86_RUNNING, X86_HALTED, X86_WAIT_FOR_SIPI, X86_SHUTDOWN };

#define RFLAGS_CF 0x1u
#define RFLAGS_PF 0x4u
#define RFLAGS_AF 0x10u
#define RFLAGS_ZF 0x40u
#define RFLAGS_SF 0x80u
#define RFLAGS_TF 0x100u
#define RFLAGS_IF 0x200u
#define RFLAGS_DF 0x400u
#define RFLAGS_OF 0x800u
#define RFLAGS_IOPL 0x3000u
#define RFLAGS_NT 0x4000u
#define RFLAGS_RF 0x10000u
#define RFLAGS_VM 0x20000u
#define RFLAGS_AC 0x40000u
#define RFLAGS_VIF 0x80000u
#define RFLAGS_VIP 0x100000u
#define RFLAGS_ID 0x200000u
#define RFLAGS_ARITH (RFLAGS_CF | RFLAGS_PF | RFLAGS_AF | RFLAGS_ZF | RFLAGS_SF | RFLAGS_OF)

#define CR0_PE 0x1ull
#define CR0_MP 0x2ull
#define CR0_EM 0x4ull
#define CR0_TS 0x8ull
#define CR0_ET 0x10ull
#define CR0_NE 0x20ull
#define CR0_WP 0x10000ull
#define CR0_AM 0x40000ull
#define CR0_NW 0x20000000ull
#define CR0_CD 0x40000000ull
#define CR0_PG 0x80000000ull

#define CR4_VME 0x1ull
#define CR4_PVI 0x2ull
#define CR4_TSD 0x4ull
#define CR4_DE 0x8ull
#define CR4_PSE 0x10ull
#define CR4_PAE 0x20ull
#define CR4_MCE 0x40ull
#define CR4_PGE 0x80ull
#define CR4_PCE 0x100ull
#define CR4_OSFXSR 0x200ull
#define CR4_OSXMMEXCPT 0x400ull
#define CR4_UMIP 0x800ull
#define CR4_LA57 0x1000ull
#define CR4_FSGSBASE 0x10000ull
#define CR4_PCIDE 0x20000ull
#define CR4_OSXSAVE 0x40000ull
#define CR4_SMEP 0x100000ull
#define CR4_SMAP 0x200000ull
#define CR4_PKE 0x400000ull

#define EFER_SCE 0x1ull
#define EFER_LME 0x100ull
#define EFER_LMA 0x400ull
#define EFER_NXE 0x800ull

/* Vector and floating-point state. zmm[n] holds XMM, YMM and ZMM n in one 64-byte little-endian value. */
struct x86_fpu {
    uint8_t zmm[32][64] __attribute__((aligned(64)));
    uint64_t k[8];
    uint8_t st[8][16];          /* ST(0)…ST(7) in stack order as FXSAVE stores them; 10 bytes each used */
    uint16_t fcw, fsw;
    uint8_t ftw;                /* abridged, as FXSAVE: bit n set: physical register n is not empty */
    uint16_t fop;               /* 11 bits */
    uint64_t fip, fdp;
    uint16_t fcs, fds;
    uint32_t mxcsr;
    uint64_t xinuse_hint;       /* components that were ever written since XRSTOR init: XINUSE may be this */
};

struct x86_state {
    uint64_t gpr[16];
    uint64_t rip;
    uint64_t rflags;            /* bit 1 set; see cpu.h for where a running engine keeps the arithmetic flags */
    struct x86_seg seg[6];
    struct x86_seg ldtr, tr;
    struct x86_table gdt, idt;
    uint64_t cr0, cr2, cr3, cr4;    /* CR8 is the local APIC's TPR */
    uint64_t xcr0, xss, efer;
    uint64_t dr[4], dr6, dr7;
    /* Model-specific registers. */
    uint64_t star, lstar, cstar, sfmask, kernel_gs_base;
    uint64_t sysenter_cs, sysenter_esp, sysenter_eip;
    uint64_t pat, tsc_aux, misc_enable, spec_ctrl, mtrr_def_type;
    uint64_t mtrr_fixed[11], mtrr_base[8], mtrr_mask[8];
    /*
     * Guest TSC minus host TSC, while an engine has the state or it stands paused. Saved, it is relative to
     * guest time instead (x86_tsc_ticks() of the machine's clock), as a host's counter means nothing elsewhere.
     */
    uint64_t tsc_offset;
    uint64_t tsc_adjust;
    uint64_t kvm_wall_clock, kvm_system_time, kvm_steal_time, kvm_poll_control;
    /* What holds an event back or is on its way. */
    uint8_t interrupt_shadow;   /* 1: by STI, 2: by MOV SS / POP SS; for the next instruction only */
    bool nmi_blocked;           /* from NMI delivery to IRET */
    bool nmi_pending;
    uint8_t activity;           /* enum x86_activity */
    /* On their way and not taken yet; sipi_vector is the pending SIPI's, or else the last one's. */
    bool init_pending, sipi_pending;
    uint8_t sipi_vector;
    struct x86_fpu fpu;
};

/* Power-on state of a vCPU (SDM vol. 3A table 9-1). The boot CPU runs at FFFF:FFF0, others wait for SIPI. */
void x86_state_reset(struct x86_state *s, bool boot_cpu);
/* State after INIT: like reset, but keeps what the SDM says INIT keeps. */
void x86_state_init_signal(struct x86_state *s, bool boot_cpu);

struct state_writer;
struct state_reader;
/* The section "x86-cpu". Load checks values that no processor can have: -EINVAL (logged). */
void x86_state_save(const struct x86_state *s, struct state_writer *w);
int x86_state_load(struct x86_state *s, const struct state_reader *r);

#endif
