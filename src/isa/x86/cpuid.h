/*
 * Processor models: what a guest's CPUID shows and which instructions and registers exist.
 */
#ifndef RINGFORT_ISA_X86_CPUID_H
#define RINGFORT_ISA_X86_CPUID_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct x86_cpu;

struct x86_cpuid_leaf {
    uint32_t leaf, subleaf;
    uint32_t eax, ebx, ecx, edx;
};

struct x86_cpu_model {
    const char *name;           /* "x86-64-v2", "x86-64-v3", "x86-64-v4", "host" */
    const char *summary;        /* one line for help */
    const struct x86_cpuid_leaf *leaves;
    unsigned leaf_count;
    uint64_t xcr0_allowed;      /* XCR0 bits that may be set */
    uint64_t cr4_allowed;       /* the same for CR4 */
};

/* NULL: no such model. */
const struct x86_cpu_model *x86_cpu_model_find(const char *name);
/* For listings: NULL after the last. */
const struct x86_cpu_model *x86_cpu_model_at(unsigned i);
/* 0, or -ENOTSUP with *missing naming a feature that the host cannot run for the software engines. Any thread. */
int x86_cpu_model_usable(const struct x86_cpu_model *m, const char **missing);
/*
 * The model without what offered (leaves of somebody's CPUID, an engine's) lacks: a new one under the same name, to be freed
 * with x86_cpu_model_free() when nobody uses it. required: what is lacking and more than Ringfort's own doing (an instruction set of
 * a named model) is an error. NULL and the name of a feature in *missing, or NULL there: out of memory.
 */
struct x86_cpu_model *x86_cpu_model_restrict(const struct x86_cpu_model *m, const struct x86_cpuid_leaf *offered, unsigned count,
                                             const char **missing);
void x86_cpu_model_free(struct x86_cpu_model *m);
/* The name of a feature that m shows and other does not; NULL: none, so a guest that was started on m can go on on other. */
const char *x86_cpu_model_lacks(const struct x86_cpu_model *other, const struct x86_cpu_model *m);
/* Makes the decoders follow this model (LZCNT and TZCNT). Before any vCPU runs; one model per process. */
void x86_cpu_model_select(const struct x86_cpu_model *m);
/* What CPUID returns on this vCPU now (OSXSAVE, APIC id, XSAVE sizes, KVM leaves at 0x40000000 filled in). */
void x86_cpuid(const struct x86_cpu *cpu, uint32_t leaf, uint32_t subleaf, uint32_t out[4]);
/* Whether the model has the feature that this instruction needs (by its ISA set): false → #UD. */
struct x86_insn;
bool x86_model_has_insn(const struct x86_cpu_model *m, const struct x86_insn *insn);

#endif
