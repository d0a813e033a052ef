/*
 * Segmentation: descriptors, and the loading of segment registers.
 * SDM vol. 3A ch. 3 and 5. In the vCPU's thread; functions raise like all semantics (cpu.h) and
 * change nothing when they do.
 */
#ifndef RINGFORT_ISA_X86_SEGMENT_H
#define RINGFORT_ISA_X86_SEGMENT_H

#include "isa/x86/cpu.h"

/* Types of system descriptors (S = 0). */
enum {
    DESC_TSS16 = 1,
    DESC_LDT = 2,
    DESC_TSS16_BUSY = 3,
    DESC_CALL_GATE16 = 4,
    DESC_TASK_GATE = 5,
    DESC_INT_GATE16 = 6,
    DESC_TRAP_GATE16 = 7,
    DESC_TSS = 9,
    DESC_TSS_BUSY = 11,
    DESC_CALL_GATE = 12,
    DESC_INT_GATE = 14,
    DESC_TRAP_GATE = 15
};

/* Fields of an 8-byte descriptor. */
static inline unsigned desc_type(uint64_t d)
{
    return (unsigned)(d >> 40) & 15;
}
static inline bool desc_s(uint64_t d)
{
    return d >> 44 & 1;
}
static inline unsigned desc_dpl(uint64_t d)
{
    return (unsigned)(d >> 45) & 3;
}
static inline bool desc_present(uint64_t d)
{
    return d >> 47 & 1;
}
static inline bool desc_l(uint64_t d)
{
    return d >> 53 & 1;
}
static inline bool desc_db(uint64_t d)
{
    return d >> 54 & 1;
}
static inline bool desc_is_code(uint64_t d)
{
    return desc_s(d) && (desc_type(d) & 8);
}
static inline bool desc_is_data(uint64_t d)
{
    return desc_s(d) && !(desc_type(d) & 8);
}
static inline bool desc_is_writable_data(uint64_t d)
{
    return desc_is_data(d) && (desc_type(d) & 2);
}
static inline bool desc_is_conforming(uint64_t d)
{
    return desc_is_code(d) && (desc_type(d) & 4);
}
static inline uint64_t desc_base(uint64_t d)
{
    return (d >> 16 & 0xffffff) | (d >> 32 & 0xff000000);
}
static inline uint32_t desc_limit(uint64_t d)
{
    uint32_t limit = (uint32_t)((d & 0xffff) | (d >> 32 & 0xf0000));
    return d >> 55 & 1 ? limit << 12 | 0xfff : limit;
}
static inline uint32_t desc_attr(uint64_t d)
{
    return (uint32_t)(d >> 40) & 0xf0ff;
}

static inline bool selector_null(unsigned selector)
{
    return (selector & 0xfffc) == 0;
}

/* The segment register that a code or data descriptor makes. */
static inline struct x86_seg x86_seg_from_desc(uint16_t selector, uint64_t d)
{
    return (struct x86_seg){
        .base = desc_base(d), .limit = desc_limit(d), .attr = desc_attr(d), .selector = selector};
}

/* Reads a descriptor from the GDT or LDT. False when the selector is null or beyond the table's
 * limit. May raise #PF. */
bool x86_read_descriptor(struct x86_cpu *cpu, unsigned selector, uint64_t *d);
/* Of a system descriptor in long mode: its second half (call gates, TSS, LDT). False as above. */
bool x86_read_descriptor_high(struct x86_cpu *cpu, unsigned selector, uint64_t *high);
/* Sets the accessed bit of a code or data descriptor in the table and in *d, unless set. */
void x86_set_accessed(struct x86_cpu *cpu, unsigned selector, uint64_t *d);

/*
 * MOV, POP, LDS… to ES, SS, DS, FS, GS: all checks of the mode in force. MOV SS and POP SS's
 * interrupt shadow is the caller's.
 */
void x86_load_segment(struct x86_cpu *cpu, unsigned seg, uint16_t selector);
/* LLDT and LTR behind their privilege check (CPL 0, protected mode). */
void x86_load_ldt(struct x86_cpu *cpu, uint16_t selector);
void x86_load_task_register(struct x86_cpu *cpu, uint16_t selector);

/*
 * Whether [offset, offset+size) lies in the segment, by its limit alone (expand-down too). For
 * legacy and compatibility mode.
 */
bool x86_in_limit(const struct x86_seg *seg, uint64_t offset, unsigned size);

/*
 * A stack that a transfer builds or takes apart without touching RSP until it is certain to
 * succeed. fault_error: error code of #SS, for a limit violation or a non-canonical address.
 */
struct x86_stack {
    struct tlb_set *set;
    struct x86_seg ss;
    uint64_t sp;
    unsigned width; /* of the stack pointer: 2, 4, 8 */
    uint32_t fault_error;
};
/* The stack in force. */
void x86_stack_current(struct x86_cpu *cpu, struct x86_stack *st);
void x86_stack_push(struct x86_cpu *cpu, struct x86_stack *st, uint64_t value, unsigned size);
uint64_t x86_stack_pop(struct x86_cpu *cpu, struct x86_stack *st, unsigned size);
/* Moves the pointer only. */
void x86_stack_skip(struct x86_stack *st, uint64_t bytes);
/* RSP := st->sp, by width. */
void x86_stack_commit(struct x86_cpu *cpu, const struct x86_stack *st);

/*
 * The stack for privilege level cpl from the TSS (SDM vol. 3A 5.8.5): SS with all its checks
 * outside long mode; in long mode the null selector, and ist 1…7 chooses the interrupt stack table.
 * ext: bit 0 of error codes.
 */
void x86_stack_from_tss(struct x86_cpu *cpu, unsigned cpl, unsigned ist, uint32_t ext,
                        struct x86_stack *st);

#endif
