/* Between native.c (what runs natively and how), native_stub.c (the host code) and native_special.c (what needs C). */
#ifndef RINGFORT_ISA_X86_NATIVE_INTERNAL_H
#define RINGFORT_ISA_X86_NATIVE_INTERNAL_H

#include "isa/x86/native.h"

/* What state an instruction belongs to, for traps and for what the stub carries. */
enum native_kind { NATIVE_INTEGER, NATIVE_X87, NATIVE_MMX, NATIVE_SSE, NATIVE_AVX, NATIVE_AVX512 };

struct native_insn;
typedef void native_stub(struct x86_cpu *cpu, void *mem);
typedef void native_special_fn(struct x86_cpu *cpu, const struct x86_insn *insn);

struct native_insn {
    native_stub *stub;          /* NULL with special */
    native_special_fn *special;
    const uint8_t *resume;      /* in the stub: behind the guest's instruction */
    uint8_t kind;               /* enum native_kind */
    bool uses_fx;               /* x87 or MMX registers */
    bool raises_simd;           /* reads MXCSR: may raise #XM */
    bool aligned;               /* memory operand must be aligned to its size: #GP */
    bool never_misaligned;      /* nor is its alignment ever checked, on this vendor's processors: VCVTPH2PS and its inverse on Intel's */
    bool x87_waits;             /* reports a pending x87 exception first */
    bool x87_pointers;          /* updates FOP, FIP, FDP */
    bool masked;                /* EVEX write mask on a memory operand: suppressed elements do not fault */
    uint8_t repeats;            /* then: how many mask bits each element of it stands for, memory elements apart */
    bool compressed;            /* as many elements in memory as the mask has ones */
    bool mem_read, mem_write;
    uint8_t mem_size;           /* bytes accessed */
    uint8_t element;            /* of the memory operand */
    uint8_t components;         /* XSAVE components it touches */
};

/*
 * Emits the stub for insn (n->kind, uses_fx, raises_simd are set) and sets n->resume. NULL: the code memory is full or not to be
 * had (logged), or there are no registers. Caller holds the cache's lock.
 */
native_stub *native_emit(const struct x86_insn *insn, struct native_insn *n);
/* No more stubs fit. Caller holds the cache's lock. */
bool native_code_full(void);
/* The same for one use by this vCPU, until its next call; in the vCPU's thread. */
native_stub *native_emit_once(const struct x86_insn *insn, struct native_insn *n, unsigned cpu);
void native_code_free(void);

/* Instructions done in C; NULL: not one. */
native_special_fn *native_special(const struct x86_insn *insn);
/* The x87 state between struct x86_fpu and cpu->native_fx. */
void native_fx_load(struct x86_cpu *cpu);
void native_fx_store(struct x86_cpu *cpu);
/*
 * What Intel's processors find out of a masked operand, or VMASKMOV's, before its elements: non-canonical ends; then misaligned,
 * told if alignment is checked; of a store over the end of a page, a fault of its last byte before others in that page. mask: of
 * elements, not 0.
 */
void native_check_masked(struct x86_cpu *cpu, const struct x86_insn *insn, unsigned element, uint64_t mask, bool write,
                         bool misaligned);
/* TOP becomes 0; the registers stay, at other places of st[]. */
void native_clear_top(struct x86_fpu *f);

#endif
