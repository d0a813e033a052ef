/*
 * Writing down what the software engines execute: --trace-exec FILE. Each block of instructions is written when it is
 * entered, an instruction a line: processor, privilege (k or u), address, disassembly; with registers=on a line of them
 * before. What faults or is interrupted in the middle of a block is written as a whole; single-stepped instructions are not
 * written. Where a translation ends in front of an instruction that the interpreter does, that one is written again. Files are
 * bounded. It costs nothing when it is off: then blocks have no op that asks.
 */
#ifndef RINGFORT_ENGINE_INTERP_TRACE_H
#define RINGFORT_ENGINE_INTERP_TRACE_H

#include "engine/interp/interp.h"
#include "engine/interp/trace_options.h"

/* Before the first vCPU is made. 0 or a negative errno (logged). path is used until trace_close(). */
int trace_open(const struct trace_options *o);
void trace_close(void);
bool trace_on(void);
/* The block is about to be executed in the state in force, with cpu->code_page set. Any vCPU's thread. */
void trace_block(const struct x86_cpu *cpu, const struct block *b);
/* For the interpreter: a prologue that does that. */
extern const struct block_hooks trace_hooks;

#endif
