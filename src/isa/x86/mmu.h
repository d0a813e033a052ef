/*
 * What mmu.c and access.c offer beyond cpu.h: to control registers, INVPCID, and to each other.
 * In the vCPU's thread only.
 */
#ifndef RINGFORT_ISA_X86_MMU_H
#define RINGFORT_ISA_X86_MMU_H

#include "isa/x86/cpu.h"

/* Bits of a page fault's error code. */
#define PF_PRESENT 0x01u
#define PF_WRITE 0x02u
#define PF_USER 0x04u
#define PF_RESERVED 0x08u
#define PF_FETCH 0x10u

/* Whether a linear address is canonical for the paging mode in force (CR4.LA57). */
static inline bool x86_canonical(const struct x86_cpu *cpu, uint64_t va)
{
    unsigned unused = cpu->s.cr4 & CR4_LA57 ? 7 : 16;
    return (uint64_t)((int64_t)(va << unused) >> unused) == va;
}

/*
 * The TLB set for implicit supervisor accesses (GDT, LDT, IDT, TSS): those never may touch user pages under
 * SMAP, whatever AC says (SDM vol. 3A 4.6.1).
 */
static inline struct tlb_set *x86_system_set(struct x86_cpu *cpu)
{
    return &cpu->space->view[cpu->s.cr4 & CR4_SMAP ? VIEW_KERNEL : VIEW_KERNEL_AC];
}

/* The set for explicit accesses at a privilege level that a transfer is about to enter. */
static inline struct tlb_set *x86_set_for_cpl(struct x86_cpu *cpu, unsigned cpl)
{
    if (cpl == 3)
        return &cpu->space->view[VIEW_USER];
    return &cpu->space->view[cpu->s.cr4 & CR4_SMAP && !(cpu->s.rflags & RFLAGS_AC) ? VIEW_KERNEL : VIEW_KERNEL_AC];
}

/*
 * A set that misses always: cpu->tlb while alignment is checked (CPL 3, CR0.AM, RFLAGS.AC), so that every access comes
 * to the slow path, which stands for the user view then. Read only.
 */
extern struct tlb_set x86_checking_set;
void x86_checking_set_init(void);   /* idempotent, any thread */

/*
 * PAE paging keeps four page directory pointers in the processor. To be called before CR0, CR3 or CR4 are committed, with
 * their new values: -EINVAL when they turn PAE paging on (or load CR3 under it) with reserved bits in a present entry, which
 * is #GP(0); 0 otherwise, with the entries loaded if PAE paging is to be in force.
 */
int x86_load_pdptes(struct x86_cpu *cpu, uint64_t cr0, uint64_t cr3, uint64_t cr4);

/* INVPCID types 0…3 (operands already checked): 0 address in pcid, 1 pcid, 2 all, 3 all but global. */
void x86_tlb_invpcid(struct x86_cpu *cpu, unsigned type, unsigned pcid, gva_t va);

/* Makes cpu->space fit CR3, CR4.PCIDE after a reset or import. All spaces are empty afterwards. */
void x86_tlb_reset(struct x86_cpu *cpu);

/* Where an access goes, page by page. */
struct x86_place {
    uint8_t *host;              /* the byte at va, NULL: not RAM */
    gpa_t gpa;                  /* valid when host is NULL or code is true */
    bool code;                  /* a write to a page that holds decoded code: tell after writing */
};
/* Translates for the given set and fills the TLB. Raises #PF, and #GP or #SS for a non-canonical address. */
void x86_translate(struct x86_cpu *cpu, struct tlb_set *set, gva_t va, enum x86_access access,
                   struct x86_place *place);

/* Raises #GP(0) or #SS(0) for a non-canonical data address, by whether the current instruction reached it through SS. */
_Noreturn void x86_raise_non_canonical(struct x86_cpu *cpu, gva_t va);

/* What a store to guest memory by the processor itself (page tables) must tell. len bytes at gpa were written. */
void x86_phys_written(struct x86_cpu *cpu, gpa_t gpa, unsigned len, _Atomic uint8_t *flags);

/* Blocks in a given set; as x86_read_bytes() and x86_write_bytes(). */
void x86_read_bytes_in(struct x86_cpu *cpu, struct tlb_set *set, gva_t va, void *buf, unsigned len);
void x86_write_bytes_in(struct x86_cpu *cpu, struct tlb_set *set, gva_t va, const void *buf, unsigned len);

#endif
