/*
 * Instructions that run on the host processor itself, one at a time.
 *
 * x87, MMX, SSE…AVX-512 and rarer integer instructions are executed by a small host stub made from the guest's own
 * bytes, with the memory operand redirected to a host pointer and the registers loaded from and stored to struct x86_cpu.
 * So their results, flags and rounding are the host's by construction.
 */
#ifndef RINGFORT_ISA_X86_NATIVE_H
#define RINGFORT_ISA_X86_NATIVE_H

#include "isa/x86/cpu.h"

struct native_insn;

/*
 * Prepares insn. NULL: not an instruction this way can run (it is for the interpreter or x86_system_semantics), and then the
 * caller raises #UD if nobody else knows it. Shared and cached by content; never freed before native_shutdown(). Any thread.
 */
const struct native_insn *native_prepare(const struct x86_insn *insn);
/* Executes: memory access, alignment (#GP, #AC), #NM/#UD by CR0/CR4/XCR0, SIMD exceptions (#XM), pending x87 (#MF). Raises like all semantics. */
void native_execute(struct x86_cpu *cpu, const struct x86_insn *insn, const struct native_insn *native);
void native_shutdown(void);

#endif
