/*
 * Semantics of plain instructions that only code outside 64-bit mode uses, or that are rare in it: stack
 * instructions of any size, decimal arithmetic, XLAT.
 */
#ifndef RINGFORT_ISA_X86_LEGACY_H
#define RINGFORT_ISA_X86_LEGACY_H

#include "isa/x86/cpu.h"

/* NULL: not one of them. */
x86_semantics_fn *x86_legacy_semantics(const struct x86_insn *insn);

#endif
