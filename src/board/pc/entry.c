/* The boot CPU's state at a kernel's entry. See entry.h. */
#include "board/pc/entry.h"

#include <string.h>

#include "board/pc/layout.h"
#include "isa/x86/state.h"

/* Flat segments, as the descriptors that boot.c writes to guest memory say. */
#define ATTR_CODE32 (0xbu | SEG_S | SEG_P | SEG_DB | SEG_G)
#define ATTR_CODE64 (0xbu | SEG_S | SEG_P | SEG_L | SEG_G)
#define ATTR_DATA   (0x3u | SEG_S | SEG_P | SEG_DB | SEG_G)
#define ATTR_TSS    (0xbu | SEG_P)
#define TSS_LIMIT   0x67u

void pc_entry_state(struct x86_state *s, const struct x86_entry *entry)
{
    bool is_64 = entry->mode == X86_ENTRY_LINUX64;

    memset(s->gpr, 0, sizeof(s->gpr));
    s->gpr[RAX] = entry->rax;
    s->gpr[RBX] = entry->rbx;
    s->gpr[RSI] = entry->rsi;
    s->gpr[RSP] = entry->rsp;
    s->rip = entry->rip;
    s->rflags = 2;

    for (int i = 0; i < 6; i++)
        s->seg[i] =
            (struct x86_seg){.selector = PC_GDT_DATA, .limit = UINT32_MAX, .attr = ATTR_DATA};
    s->seg[SEG_CS] = (struct x86_seg){
        .selector = PC_GDT_CODE, .limit = UINT32_MAX, .attr = is_64 ? ATTR_CODE64 : ATTR_CODE32};
    s->tr = (struct x86_seg){.selector = PC_GDT_TSS, .limit = TSS_LIMIT, .attr = ATTR_TSS};
    s->ldtr = (struct x86_seg){.attr = SEG_UNUSABLE};
    s->gdt = (struct x86_table){.base = entry->gdt_base, .limit = entry->gdt_limit};
    s->idt = (struct x86_table){0};

    s->cr0 = CR0_PE | CR0_ET;
    s->cr2 = s->cr3 = s->cr4 = s->efer = 0;
    if (is_64) {
        s->cr0 |= CR0_PG;
        s->cr3 = entry->cr3;
        s->cr4 = CR4_PAE;
        s->efer = EFER_LME | EFER_LMA;
    }
    s->activity = X86_RUNNING;
}
