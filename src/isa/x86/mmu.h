/*
 * What mmu.c and access.c offer beyond cpu.h: to control registers, INVPCID, and to each other.
 * In the vCPU's thread only.
 */
#ifndef RINGFORT_ISA_X86_MMU_H
#define RINGFORT_ISA_X86_MMU_H

#include "isa/x86/cpu.h"

/* Bits of a page fault's error code. */
#define PF_PRESENT  0x01u
#define PF_WRITE    0x02u
#define PF_USER     0x04u
#define PF_RESERVED 0x08u
#define PF_FETCH    0x10u

/* Whether a linear address is canonical for the paging mode in force (CR4.LA57). */
static inline bool x86_canonical(const struct x86_cpu *cpu, uint64_t va)
{
    unsigned unused = cpu->s.cr4 & CR4_LA57 ? 7 : 16;
    return (uint64_t)((int64_t)(va << unused) >> unused) == va;
}

/* The set for data accesses of the supervisor; ac: user pages may be touched under SMAP. */
static inline struct tlb_set *x86_kernel_set(const struct x86_cpu *cpu, bool ac)
{
    return cpu->s.cr4 & CR4_SMAP && !ac ? &cpu->tlbs->kernel.set : &cpu->tlbs->kernel_ac.set;
}

/*
 * The TLB set for implicit supervisor accesses (GDT, LDT, IDT, TSS): those never may touch user
 * pages under SMAP, whatever AC says (SDM vol. 3A 4.6.1).
 */
static inline struct tlb_set *x86_system_set(const struct x86_cpu *cpu)
{
    return x86_kernel_set(cpu, false);
}

/* The set for explicit accesses at a privilege level that a transfer is about to enter. */
static inline struct tlb_set *x86_set_for_cpl(const struct x86_cpu *cpu, unsigned cpl)
{
    return cpl == 3 ? &cpu->space->data.set : x86_kernel_set(cpu, cpu->s.rflags & RFLAGS_AC);
}

/*
 * A set that misses always: cpu->tlb while alignment is checked (CPL 3, CR0.AM, RFLAGS.AC), so that
 * every access comes to the slow path, which uses the user's set then. Read only.
 */
extern struct tlb_set x86_checking_set;

/*
 * PAE paging keeps four page directory pointers in the processor. To be called before CR0, CR3 or
 * CR4 are committed, with their new values: -EINVAL when they turn PAE paging on (or load CR3 under
 * it) with reserved bits in a present entry, which is #GP(0); 0 otherwise, with the entries loaded
 * if PAE paging is to be in force.
 */
int x86_load_pdptes(struct x86_cpu *cpu, uint64_t cr0, uint64_t cr3, uint64_t cr4);

/* INVPCID types 0…3 (operands already checked): 0 address in pcid, 1 pcid, 2 all, 3 all but global.
 */
void x86_tlb_invpcid(struct x86_cpu *cpu, unsigned type, unsigned pcid, gva_t va);

/* The TLB's memory, empty and for the current CR3. 0 or -ENOMEM. */
int x86_tlb_create(struct x86_cpu *cpu);
void x86_tlb_destroy(struct x86_cpu *cpu);

/* Where an access goes, page by page. */
struct x86_place {
    uint8_t *host; /* the byte at va, NULL: not RAM */
    gpa_t gpa;     /* valid when host is NULL or code is true */
    bool code;     /* a write to a page that holds decoded code: tell after writing */
};
/* Translates for the given set and fills the TLB. Raises #PF, and #GP or #SS for a non-canonical
 * address. */
void x86_translate(struct x86_cpu *cpu, struct tlb_set *set, gva_t va, enum x86_access access,
                   struct x86_place *place);

/* Raises #GP(0) or #SS(0) for a non-canonical data address, by whether the current instruction
 * reached it through SS. */
_Noreturn void x86_raise_non_canonical(struct x86_cpu *cpu, gva_t va);

/* A walk that succeeded, for filling the TLB. */
struct x86_walk_result {
    gpa_t gpa;
    uint64_t page_size;
    bool global;      /* stays when CR3 is loaded */
    bool write_ready; /* the same view may write, and the dirty bit is set already */
};
int x86_walk_for_fill(struct x86_cpu *cpu, gva_t va, enum x86_access access, unsigned view,
                      struct x86_walk_result *w, uint32_t *error);

/*
 * What a processor may hold of the user's mapping of va without having changed anything: all accessed bits are set, writable with
 * the dirty bit too. 4-level paging. False: nothing of it.
 */
struct x86_ready {
    gpa_t gpa;
    bool writable, executable;
    uint64_t page_size;
};
bool x86_walk_ready(struct x86_cpu *cpu, gva_t va, struct x86_ready *r);

/* What a store to guest memory by the processor itself (page tables) must tell. len bytes at gpa
 * were written. */
void x86_phys_written(struct x86_cpu *cpu, gpa_t gpa, unsigned len, _Atomic uint8_t *flags);

/*
 * The host page to execute at va, which it makes known to cpu->tlb_fetch. NULL when the code is not
 * in RAM: x86_fetch gets its bytes. Raises what a fetch of the byte at va raises.
 */
const uint8_t *x86_fetch_pointer(struct x86_cpu *cpu, gva_t va);

/* Blocks in a given set; as x86_read_bytes() and x86_write_bytes(). */
void x86_read_bytes_in(struct x86_cpu *cpu, struct tlb_set *set, gva_t va, void *buf, unsigned len);
void x86_write_bytes_in(struct x86_cpu *cpu, struct tlb_set *set, gva_t va, const void *buf,
                        unsigned len);
void x86_probe_write_in(struct x86_cpu *cpu, struct tlb_set *set, gva_t va, unsigned len);
/* The set for accesses at CPL that alignment checking leaves alone. */
static inline struct tlb_set *x86_unchecked_set(struct x86_cpu *cpu)
{
    return cpu->tlb == &x86_checking_set ? &cpu->space->data.set : cpu->tlb;
}

#endif
