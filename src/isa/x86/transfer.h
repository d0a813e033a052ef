/*
 * Control transfers between code segments and privilege levels: functions of x86_semantics_fn for
 * the table in system.c. Each puts the target into cpu->next_rip.
 */
#ifndef RINGFORT_ISA_X86_TRANSFER_H
#define RINGFORT_ISA_X86_TRANSFER_H

#include "isa/x86/cpu.h"

void x86_insn_jmp_far(struct x86_cpu *cpu, const struct x86_insn *insn);
void x86_insn_call_far(struct x86_cpu *cpu, const struct x86_insn *insn);
void x86_insn_ret_far(struct x86_cpu *cpu, const struct x86_insn *insn);
void x86_insn_iret(struct x86_cpu *cpu, const struct x86_insn *insn); /* IRET, IRETD, IRETQ */
void x86_insn_int(struct x86_cpu *cpu, const struct x86_insn *insn);  /* INT n, INT1, INT3, INTO */
void x86_insn_syscall(struct x86_cpu *cpu, const struct x86_insn *insn);
void x86_insn_sysret(struct x86_cpu *cpu, const struct x86_insn *insn);
void x86_insn_sysenter(struct x86_cpu *cpu, const struct x86_insn *insn);
void x86_insn_sysexit(struct x86_cpu *cpu, const struct x86_insn *insn);

/* INT1 (exception.c): #DB as an instruction; no gate privilege check. */
void x86_icebp(struct x86_cpu *cpu);

#endif
