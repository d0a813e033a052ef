/*
 * Which function gives a system instruction its meaning: the one place that knows all of them.
 * Called once per decoded instruction, from any thread.
 */
#include "isa/x86/system.h"
#include "isa/x86/transfer.h"

static x86_semantics_fn *mov_semantics(const struct x86_insn *insn)
{
    switch (insn->operand[0].kind) {
    case OPERAND_CR:
        return x86_insn_mov_to_cr;
    case OPERAND_DR:
        return x86_insn_mov_to_dr;
    case OPERAND_SEG:
        return x86_insn_mov_to_seg;
    }
    switch (insn->operand[1].kind) {
    case OPERAND_CR:
        return x86_insn_mov_from_cr;
    case OPERAND_DR:
        return x86_insn_mov_from_dr;
    case OPERAND_SEG:
        return x86_insn_mov_from_seg;
    }
    return NULL;
}

x86_semantics_fn *x86_system_semantics(const struct x86_insn *insn)
{
    /* AVX instructions have mnemonics of their own, but nothing here is VEX or EVEX encoded. */
    if (insn->has_vex || insn->has_evex)
        return NULL;
    switch (insn->mnemonic) {
    case ZYDIS_MNEMONIC_MOV:
        return mov_semantics(insn);
    case ZYDIS_MNEMONIC_PUSH:
        return insn->operand[0].kind == OPERAND_SEG ? x86_insn_push_seg : NULL;
    case ZYDIS_MNEMONIC_POP:
        return insn->operand[0].kind == OPERAND_SEG ? x86_insn_pop_seg : NULL;
    case ZYDIS_MNEMONIC_LDS:
    case ZYDIS_MNEMONIC_LES:
    case ZYDIS_MNEMONIC_LSS:
    case ZYDIS_MNEMONIC_LFS:
    case ZYDIS_MNEMONIC_LGS:
        return x86_insn_load_far_pointer;

    case ZYDIS_MNEMONIC_JMP:
        return x86_is_far(insn) ? x86_insn_jmp_far : NULL;
    case ZYDIS_MNEMONIC_CALL:
        return x86_is_far(insn) ? x86_insn_call_far : NULL;
    case ZYDIS_MNEMONIC_RET:
        return x86_is_far(insn) ? x86_insn_ret_far : NULL;
    case ZYDIS_MNEMONIC_IRET:
    case ZYDIS_MNEMONIC_IRETD:
    case ZYDIS_MNEMONIC_IRETQ:
        return x86_insn_iret;
    case ZYDIS_MNEMONIC_INT:
    case ZYDIS_MNEMONIC_INT1:
    case ZYDIS_MNEMONIC_INT3:
    case ZYDIS_MNEMONIC_INTO:
        return x86_insn_int;
    case ZYDIS_MNEMONIC_SYSCALL:
        return x86_insn_syscall;
    case ZYDIS_MNEMONIC_SYSRET:
        return x86_insn_sysret;
    case ZYDIS_MNEMONIC_SYSENTER:
        return x86_insn_sysenter;
    case ZYDIS_MNEMONIC_SYSEXIT:
        return x86_insn_sysexit;

    case ZYDIS_MNEMONIC_PUSHF:
    case ZYDIS_MNEMONIC_PUSHFD:
    case ZYDIS_MNEMONIC_PUSHFQ:
        return x86_insn_pushf;
    case ZYDIS_MNEMONIC_POPF:
    case ZYDIS_MNEMONIC_POPFD:
    case ZYDIS_MNEMONIC_POPFQ:
        return x86_insn_popf;
    case ZYDIS_MNEMONIC_CLI:
        return x86_insn_cli;
    case ZYDIS_MNEMONIC_STI:
        return x86_insn_sti;
    case ZYDIS_MNEMONIC_CLAC:
        return x86_insn_clac;
    case ZYDIS_MNEMONIC_STAC:
        return x86_insn_stac;

    case ZYDIS_MNEMONIC_CLTS:
        return x86_insn_clts;
    case ZYDIS_MNEMONIC_LMSW:
        return x86_insn_lmsw;
    case ZYDIS_MNEMONIC_SMSW:
        return x86_insn_smsw;
    case ZYDIS_MNEMONIC_XGETBV:
        return x86_insn_xgetbv;
    case ZYDIS_MNEMONIC_XSETBV:
        return x86_insn_xsetbv;

    case ZYDIS_MNEMONIC_SGDT:
        return x86_insn_sgdt;
    case ZYDIS_MNEMONIC_SIDT:
        return x86_insn_sidt;
    case ZYDIS_MNEMONIC_LGDT:
        return x86_insn_lgdt;
    case ZYDIS_MNEMONIC_LIDT:
        return x86_insn_lidt;
    case ZYDIS_MNEMONIC_SLDT:
        return x86_insn_sldt;
    case ZYDIS_MNEMONIC_STR:
        return x86_insn_str;
    case ZYDIS_MNEMONIC_LLDT:
        return x86_insn_lldt;
    case ZYDIS_MNEMONIC_LTR:
        return x86_insn_ltr;
    case ZYDIS_MNEMONIC_LAR:
        return x86_insn_lar;
    case ZYDIS_MNEMONIC_LSL:
        return x86_insn_lsl;
    case ZYDIS_MNEMONIC_VERR:
        return x86_insn_verr;
    case ZYDIS_MNEMONIC_VERW:
        return x86_insn_verw;
    case ZYDIS_MNEMONIC_ARPL:
        return x86_insn_arpl;
    case ZYDIS_MNEMONIC_RDFSBASE:
        return x86_insn_rdfsbase;
    case ZYDIS_MNEMONIC_RDGSBASE:
        return x86_insn_rdgsbase;
    case ZYDIS_MNEMONIC_WRFSBASE:
        return x86_insn_wrfsbase;
    case ZYDIS_MNEMONIC_WRGSBASE:
        return x86_insn_wrgsbase;
    case ZYDIS_MNEMONIC_SWAPGS:
        return x86_insn_swapgs;

    case ZYDIS_MNEMONIC_HLT:
        return x86_insn_hlt;
    case ZYDIS_MNEMONIC_CPUID:
        return x86_insn_cpuid;
    case ZYDIS_MNEMONIC_RDTSC:
        return x86_insn_rdtsc;
    case ZYDIS_MNEMONIC_RDTSCP:
        return x86_insn_rdtscp;
    case ZYDIS_MNEMONIC_RDPID:
        return x86_insn_rdpid;
    case ZYDIS_MNEMONIC_RDPMC:
        return x86_insn_rdpmc;
    case ZYDIS_MNEMONIC_RDMSR:
        return x86_insn_rdmsr;
    case ZYDIS_MNEMONIC_WRMSR:
        return x86_insn_wrmsr;
    case ZYDIS_MNEMONIC_INVLPG:
        return x86_insn_invlpg;
    case ZYDIS_MNEMONIC_INVPCID:
        return x86_insn_invpcid;
    case ZYDIS_MNEMONIC_INVD:
    case ZYDIS_MNEMONIC_WBINVD:
        return x86_insn_cache_all;
    case ZYDIS_MNEMONIC_CLFLUSH:
    case ZYDIS_MNEMONIC_CLFLUSHOPT:
    case ZYDIS_MNEMONIC_CLWB:
        return x86_insn_cache_line;
    case ZYDIS_MNEMONIC_CLZERO:
        return x86_insn_clzero;
    case ZYDIS_MNEMONIC_PREFETCH:
    case ZYDIS_MNEMONIC_PREFETCHNTA:
    case ZYDIS_MNEMONIC_PREFETCHT0:
    case ZYDIS_MNEMONIC_PREFETCHT1:
    case ZYDIS_MNEMONIC_PREFETCHT2:
    case ZYDIS_MNEMONIC_PREFETCHW:
    case ZYDIS_MNEMONIC_PREFETCHWT1:
        return x86_insn_prefetch;
    case ZYDIS_MNEMONIC_VMCALL:
    case ZYDIS_MNEMONIC_VMMCALL:
        return x86_insn_hypercall;
    case ZYDIS_MNEMONIC_RDRAND:
        return x86_insn_rdrand;
    case ZYDIS_MNEMONIC_RDSEED:
        return x86_insn_rdseed;
    case ZYDIS_MNEMONIC_ENTER:
        return x86_insn_enter;
    case ZYDIS_MNEMONIC_BOUND:
        return x86_insn_bound;
    case ZYDIS_MNEMONIC_UD0:
    case ZYDIS_MNEMONIC_UD1:
    case ZYDIS_MNEMONIC_UD2:
    case ZYDIS_MNEMONIC_RSM:
    case ZYDIS_MNEMONIC_MONITOR:
    case ZYDIS_MNEMONIC_MWAIT:
        return x86_insn_undefined;

    case ZYDIS_MNEMONIC_IN:
        return x86_insn_in;
    case ZYDIS_MNEMONIC_OUT:
        return x86_insn_out;
    case ZYDIS_MNEMONIC_INSB:
    case ZYDIS_MNEMONIC_INSW:
    case ZYDIS_MNEMONIC_INSD:
        return x86_insn_ins;
    case ZYDIS_MNEMONIC_OUTSB:
    case ZYDIS_MNEMONIC_OUTSW:
    case ZYDIS_MNEMONIC_OUTSD:
        return x86_insn_outs;

    case ZYDIS_MNEMONIC_FXSAVE:
    case ZYDIS_MNEMONIC_FXSAVE64:
        return x86_insn_fxsave;
    case ZYDIS_MNEMONIC_FXRSTOR:
    case ZYDIS_MNEMONIC_FXRSTOR64:
        return x86_insn_fxrstor;
    case ZYDIS_MNEMONIC_XSAVE:
    case ZYDIS_MNEMONIC_XSAVE64:
        return x86_insn_xsave;
    case ZYDIS_MNEMONIC_XSAVEOPT:
    case ZYDIS_MNEMONIC_XSAVEOPT64:
        return x86_insn_xsaveopt;
    case ZYDIS_MNEMONIC_XSAVEC:
    case ZYDIS_MNEMONIC_XSAVEC64:
        return x86_insn_xsavec;
    case ZYDIS_MNEMONIC_XSAVES:
    case ZYDIS_MNEMONIC_XSAVES64:
        return x86_insn_xsaves;
    case ZYDIS_MNEMONIC_XRSTOR:
    case ZYDIS_MNEMONIC_XRSTOR64:
        return x86_insn_xrstor;
    case ZYDIS_MNEMONIC_XRSTORS:
    case ZYDIS_MNEMONIC_XRSTORS64:
        return x86_insn_xrstors;
    default:
        return NULL;
    }
}
