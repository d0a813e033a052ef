/*
 * How the boot CPU starts: the state that each boot protocol promises a kernel.
 *
 * PVH: docs/misc/pvh.pandoc of Xen. Multiboot: specification 0.6.96 §3.2. Linux:
 * Documentation/arch/x86/boot.rst, "64-bit Boot Protocol".
 */
#ifndef RINGFORT_BOARD_ENTRY_H
#define RINGFORT_BOARD_ENTRY_H

#include <stdint.h>

struct x86_state;

enum x86_entry_mode {
    X86_ENTRY_PVH,       /* 32-bit protected mode, no paging, RBX = start info */
    X86_ENTRY_MULTIBOOT, /* the same, RAX = magic, RBX = Multiboot information */
    X86_ENTRY_LINUX64,   /* 64-bit mode, identity-mapped by page tables at cr3, RSI = zero page */
};

struct x86_entry {
    enum x86_entry_mode mode;
    uint64_t rip; /* physical = linear address */
    uint64_t rax, rbx, rsi, rsp;
    uint64_t cr3;      /* LINUX64 only */
    uint64_t gdt_base; /* a table in guest memory that matches the segments: PC_GDT_* of layout.h */
    uint16_t gdt_limit;
};

/*
 * Changes s, a boot CPU's power-on state (x86_state_reset()), into the entry state: general
 * registers, segments, tables, control registers, EFER, RIP, RFLAGS. The rest stays.
 */
void pc_entry_state(struct x86_state *s, const struct x86_entry *entry);

#endif
