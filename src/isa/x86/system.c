/*
 * System instructions without a file of their own: HLT, CPUID, time stamps, MSR access, TLB and cache
 * maintenance, hypercalls, random numbers, ENTER, BOUND, the undefined ones. SDM vol. 2. In the vCPU's thread.
 */
#include <cpuid.h>
#include <immintrin.h>
#include <string.h>
#include <sys/random.h>

#include "base/util.h"
#include "isa/x86/cpuid.h"
#include "isa/x86/mmu.h"
#include "isa/x86/msr.h"
#include "isa/x86/segment.h"
#include "isa/x86/system.h"

void x86_insn_undefined(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    x86_raise(cpu, X86_UD);
}

void x86_insn_hlt(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    x86_require_cpl0(cpu);
    cpu->s.activity = X86_HALTED;
    cpu->halts++;
}

void x86_insn_cpuid(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    uint32_t out[4];

    x86_cpuid(cpu, (uint32_t)cpu->s.gpr[RAX], (uint32_t)cpu->s.gpr[RCX], out);
    cpu->s.gpr[RAX] = out[0];
    cpu->s.gpr[RBX] = out[1];
    cpu->s.gpr[RCX] = out[2];
    cpu->s.gpr[RDX] = out[3];
}

/* ---- time stamps, performance counters ---- */

static void read_tsc(struct x86_cpu *cpu)
{
    uint64_t tsc;

    if ((cpu->s.cr4 & CR4_TSD) && cpu->cpl != 0)
        x86_raise_error(cpu, X86_GP, 0);
    tsc = x86_guest_tsc(cpu);
    cpu->s.gpr[RAX] = (uint32_t)tsc;
    cpu->s.gpr[RDX] = tsc >> 32;
}

void x86_insn_rdtsc(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    read_tsc(cpu);
}

void x86_insn_rdtscp(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    read_tsc(cpu);
    cpu->s.gpr[RCX] = (uint32_t)cpu->s.tsc_aux;
}

void x86_insn_rdpid(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    x86_set_gpr(cpu, insn->operand[0].reg, (uint32_t)cpu->s.tsc_aux, cpu->code_size == 8 ? 8 : 4);
}

void x86_insn_rdpmc(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    /* There are no counters, so every index is wrong, with or without permission. */
    x86_raise_error(cpu, X86_GP, 0);
}

/* ---- model-specific registers ---- */

void x86_insn_rdmsr(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    uint64_t value;

    x86_require_cpl0(cpu);
    if (x86_msr_read(cpu, (uint32_t)cpu->s.gpr[RCX], &value) < 0)
        x86_raise_error(cpu, X86_GP, 0);
    cpu->s.gpr[RAX] = (uint32_t)value;
    cpu->s.gpr[RDX] = value >> 32;
}

void x86_insn_wrmsr(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    x86_require_cpl0(cpu);
    if (x86_msr_write(cpu, (uint32_t)cpu->s.gpr[RCX], (uint32_t)cpu->s.gpr[RAX] | cpu->s.gpr[RDX] << 32) < 0)
        x86_raise_error(cpu, X86_GP, 0);
}

/* ---- TLB ---- */

void x86_insn_invlpg(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    const struct x86_seg *seg = &cpu->s.seg[insn->mem.seg];
    uint64_t va = x86_effective(cpu, insn);

    x86_require_cpl0(cpu);
    /* No segment checks; a non-canonical address names no page. */
    if (cpu->code_size != 8)
        va = (uint32_t)(va + seg->base);
    else if (insn->mem.seg >= SEG_FS)
        va += seg->base;
    if (x86_canonical(cpu, va))
        x86_tlb_flush_page(cpu, va);
}

void x86_insn_invpcid(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    uint64_t type = x86_get_gpr(cpu, insn->operand[0].reg, cpu->code_size == 8 ? 8 : 4);
    uint64_t descriptor[2];

    if (x86_in_v86(cpu))
        x86_raise_error(cpu, X86_GP, 0);
    x86_require_cpl0(cpu);
    x86_read_bytes(cpu, x86_linear(cpu, insn, 16, false), descriptor, 16);
    if (type > 3)
        x86_raise_error(cpu, X86_GP, 0);
    if (type < 2) {
        if (descriptor[0] >> 12 != 0 || (descriptor[0] != 0 && !(cpu->s.cr4 & CR4_PCIDE)))
            x86_raise_error(cpu, X86_GP, 0);
        if (type == 0 && !x86_canonical(cpu, descriptor[1]))
            x86_raise_error(cpu, X86_GP, 0);
    }
    x86_tlb_invpcid(cpu, (unsigned)type, (unsigned)descriptor[0] & 0xfff, descriptor[1]);
}

/* ---- caches: guest memory is always coherent, so only what faults matters ---- */

/* INVD, WBINVD, WBNOINVD. */
void x86_insn_cache_all(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    x86_require_cpl0(cpu);
}

/* CLFLUSH, CLFLUSHOPT, CLWB: faults like a read of one byte. */
void x86_insn_cache_line(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    x86_host_pointer(cpu, x86_linear(cpu, insn, 1, false), 1, ACCESS_READ);
}

void x86_insn_prefetch(struct x86_cpu *cpu, const struct x86_insn *insn)
{
}

void x86_insn_clzero(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    static const uint8_t zero[64];
    unsigned size = insn->addr_size, seg = SEG_DS;
    gva_t va;

    /* Its memory operand is not one that the decoder knows of. */
    for (unsigned i = 0; i < insn->prefix_count; i++) {
        switch (insn->bytes[i]) {
        case 0x26: seg = insn->code_size == 8 ? seg : SEG_ES; break;
        case 0x2e: seg = insn->code_size == 8 ? seg : SEG_CS; break;
        case 0x36: seg = insn->code_size == 8 ? seg : SEG_SS; break;
        case 0x3e: seg = insn->code_size == 8 ? seg : SEG_DS; break;
        case 0x64: seg = SEG_FS; break;
        case 0x65: seg = SEG_GS; break;
        }
    }
    va = x86_seg_linear(cpu, seg, x86_get_gpr(cpu, RAX, size), 1, true);
    x86_write_bytes(cpu, va & ~63ull, zero, 64);
}

/* ---- hypercalls: Linux, Documentation/virt/kvm/x86/hypercalls.rst ---- */

#define KVM_HC_VAPIC_POLL_IRQ 1
#define KVM_ENOSYS 1000
#define KVM_EPERM 1

void x86_insn_hypercall(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    unsigned size = cpu->code_size == 8 ? 8 : 4;
    int64_t result;

    if (cpu->cpl != 0)
        result = -KVM_EPERM;
    else if (x86_get_gpr(cpu, RAX, size) == KVM_HC_VAPIC_POLL_IRQ)
        result = 0;     /* its effect is that the hypervisor was entered */
    else
        result = -KVM_ENOSYS;
    x86_set_gpr(cpu, RAX, (uint64_t)result, size);
}

/* ---- random numbers ---- */

__attribute__((target("rdrnd"))) static bool host_rdrand(uint64_t *v)
{
    unsigned long long r;

    if (!_rdrand64_step(&r))
        return false;
    *v = r;
    return true;
}

__attribute__((target("rdseed"))) static bool host_rdseed(uint64_t *v)
{
    unsigned long long r;

    if (!_rdseed64_step(&r))
        return false;
    *v = r;
    return true;
}

/* The bit of CPUID leaf 1 or 7 says whether the host has the instruction. */
static bool host_has(uint32_t leaf, bool ecx_not_ebx, unsigned bit)
{
    uint32_t a, b, c, d;

    return __get_cpuid_count(leaf, 0, &a, &b, &c, &d) && (ecx_not_ebx ? c : b) >> bit & 1;
}

static bool kernel_random(uint64_t *v)
{
    return getrandom(v, sizeof(*v), GRND_NONBLOCK) == sizeof(*v);
}

/* CF: a number was there. The other flags are cleared. */
static void give_random(struct x86_cpu *cpu, const struct x86_insn *insn, bool ok, uint64_t v)
{
    x86_set_arith(cpu, ok ? RFLAGS_CF : 0);
    x86_set_gpr(cpu, insn->operand[0].reg, ok ? v : 0, insn->operand[0].size);
}

void x86_insn_rdrand(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    static _Atomic int host = -1;
    uint64_t v = 0;
    bool ok;

    if (host < 0)
        host = host_has(1, true, 30);
    ok = host ? host_rdrand(&v) : kernel_random(&v);
    give_random(cpu, insn, ok, v);
}

void x86_insn_rdseed(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    static _Atomic int host = -1;
    uint64_t v = 0;
    bool ok;

    if (host < 0)
        host = host_has(7, false, 18);
    ok = host ? host_rdseed(&v) : kernel_random(&v);
    give_random(cpu, insn, ok, v);
}

/* ---- ENTER, BOUND ---- */

void x86_insn_enter(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    unsigned size = insn->op_size, level = (unsigned)insn->imm[1] & 31, width = cpu->stack_size;
    uint64_t frame, bp = cpu->s.gpr[RBP];
    struct x86_stack st;

    x86_stack_current(cpu, &st);
    x86_stack_push(cpu, &st, bp, size);
    frame = st.sp;
    if (level > 0) {
        /* Copies of the enclosing procedures' frame pointers, then this one's. */
        struct x86_stack outer = st;

        outer.sp = x86_get_gpr(cpu, RBP, width);
        for (unsigned i = 1; i < level; i++) {
            uint64_t pointer;

            outer.sp = (outer.sp - size) & (width == 8 ? ~0ull : width == 4 ? UINT32_MAX : 0xffffull);
            pointer = outer.sp;
            x86_stack_push(cpu, &st, x86_stack_pop(cpu, &outer, size), size);
            outer.sp = pointer;
        }
        x86_stack_push(cpu, &st, frame, size);
    }
    st.sp = (st.sp - (uint16_t)insn->imm[0]) & (width == 8 ? ~0ull : width == 4 ? UINT32_MAX : 0xffffull);
    /* The new top must be writable, though nothing is written there. */
    x86_probe_write(cpu, x86_seg_linear(cpu, SEG_SS, st.sp, size, true), size);
    x86_stack_commit(cpu, &st);
    x86_set_gpr(cpu, RBP, frame, size);
}

void x86_insn_bound(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    unsigned size = insn->op_size;
    uint64_t offset = x86_effective(cpu, insn), mask = insn->addr_size == 2 ? 0xffff : UINT32_MAX;
    int32_t index = (int32_t)x86_get_gpr(cpu, insn->operand[0].reg, size), bound[2];

    if (size == 2)
        index = (int16_t)index;
    for (unsigned i = 0; i < 2; i++) {
        gva_t va = x86_seg_linear(cpu, insn->mem.seg, (offset + i * size) & mask, size, false);

        bound[i] = size == 2 ? (int16_t)x86_read16(cpu, va) : (int32_t)x86_read32(cpu, va);
        /* Intel's processors compare before they read the upper bound. */
        if (i == 0 && !cpu->amd && index < bound[0])
            x86_raise(cpu, X86_BR);
    }
    if (index < bound[0] || index > bound[1])
        x86_raise(cpu, X86_BR);
}
