/*
 * A software-run vCPU: canonical state plus what software engines derive and cache, and the
 * functions that give instructions their meaning ("semantics"), shared by the interpreter
 * and by the translator's helpers.
 *
 * Calling convention of semantics functions
 *   - s.rip is the address of the instruction being executed; cpu->next_rip that of the following one (control
 *     transfers overwrite next_rip; the engine continues there).
 *   - An exception does not return: x86_raise() stores it and jumps to cpu->fault_jmp (set by the engine's
 *     run loop), which delivers it. So a function changes guest state only after all that can fault is done,
 *     except where the architecture says otherwise (REP strings).
 *   - Arithmetic flags live in cpu->arith while a software engine runs; x86_rflags() composes them.
 * One thread: the vCPU's own, except where "any thread" is said.
 */
#ifndef RINGFORT_ISA_X86_CPU_H
#define RINGFORT_ISA_X86_CPU_H

#include <setjmp.h>
#include <stdatomic.h>

#include "isa/x86/insn.h"
#include "isa/x86/state.h"
#include "memory/memory.h"
#include "memory/tlb.h"

struct machine;
struct lapic;
struct x86_cpu_model;
struct x86_trial;

/* Exception vectors. */
enum { X86_DE, X86_DB, X86_NMI, X86_BP, X86_OF, X86_BR, X86_UD, X86_NM, X86_DF, X86_CSO, X86_TS, X86_NP,
       X86_SS, X86_GP, X86_PF, X86_MF = 16, X86_AC, X86_MC, X86_XM };

/* Bits of cpu->request: reasons to leave straight execution, checked at block boundaries. Any thread sets them. */
#define REQUEST_INTR 0x01u      /* LAPIC may have an interrupt, or IF/shadow changed: look */
#define REQUEST_NMI 0x02u
#define REQUEST_INIT 0x04u
#define REQUEST_SIPI 0x08u
#define REQUEST_EXIT 0x10u      /* leave the engine's run(): pause, stop, engine switch */
#define REQUEST_CODE 0x20u      /* code pages were written by others: drop decoded code */
#define REQUEST_SYNC 0x40u      /* another thread waits for this vCPU to drop TLB entries */
#define REQUEST_DEBUG 0x80u     /* single step trap pending after this instruction */
#define REQUEST_START 0x100u    /* the engine's own: a SIPI came, whose vector is not in the state yet */

/* Whose permissions an access has. */
enum { VIEW_USER, VIEW_KERNEL, VIEW_KERNEL_AC, VIEWS };   /* KERNEL: SMAP bites; KERNEL_AC: it does not */

#define X86_TLB_SPACES 8
#define X86_TLB_LOCALS 62
#define X86_TLB_FETCHED 16384       /* bits */

/* One set of the soft TLB and what flushing it needs to know; all but the set itself is space.c's. */
struct x86_tlb {
    struct tlb_set set;
    uint64_t large[16];         /* which ranges were filled from large pages (hashed): INVLPG there drops all of the page */
    uint16_t local[X86_TLB_LOCALS]; /* supervisor's sets: entries that are not global… */
    uint16_t locals;            /* …and how many; more than fit: all may be */
    uint64_t *fetched;          /* fetch sets: pages that entries were made for since it was empty (hashed); else NULL */
    uint8_t view;
    bool dirty;                 /* may hold entries; a clean one needs no flush */
} __attribute__((aligned(64)));

/* User mode has sets of its own for each of several address spaces (PCID), and for fetches apart from data. */
struct x86_tlb_space {
    struct x86_tlb data, fetch;
    uint64_t fetched[X86_TLB_FETCHED / 64];
    uint64_t cr3_key;           /* PCID and validity */
    uint64_t used;              /* for replacement */
};

/* The supervisor's sets are shared by all address spaces: a change of CR3 drops only what is not global. */
struct x86_tlbs {
    struct x86_tlb kernel, kernel_ac, kernel_fetch;
    uint64_t kernel_fetched[X86_TLB_FETCHED / 64];
    struct x86_tlb_space space[X86_TLB_SPACES];
};

/* What the engine above wants to know. */
struct x86_cpu;

struct x86_engine_hooks {
    /*
     * This vCPU's store hit a PAGE_CODE page (slow path), after the bytes were written. The engine drops decoded code that
     * overlaps [gpa, gpa+len), for all vCPUs.
     */
    void (*code_written)(struct x86_cpu *cpu, gpa_t gpa, unsigned len);
    /*
     * What the engine remembers of where code is by virtual address (jump caches) is void in this address space of the user, or
     * for the supervisor (NULL): pages that were fetched from were flushed. Called before or after it happens; not called when
     * another address space, CPL or code size comes into force.
     */
    void (*mapping_changed)(struct x86_cpu *cpu, const struct x86_tlb_space *space);
    /*
     * For engines that keep translations of user addresses besides the soft TLB's (NULL for others): the guest invalidated va, or all
     * of the space; writes to that page of the host's view of memory (NULL: to any) are to be seen again, from where
     * x86_tlb_drop_writes() may be called.
     */
    void (*flushed)(struct x86_cpu *cpu, const struct x86_tlb_space *space, gva_t va, bool all);
    void (*writes_dropped)(struct x86_cpu *cpu, const void *host_page);
    /*
     * For engines whose vCPU may be where it does not look at its requests (NULL for others): there are some now, and there were none
     * before. Any thread that may make requests. It does not block.
     */
    void (*requested)(struct x86_cpu *cpu);
};

struct x86_cpu {
    struct x86_state s;

    /* Arithmetic flags as LAHF and SETO leave them: bits 15:8 SF ZF 0 AF 0 PF 1 CF, bit 0 OF. */
    uint32_t arith;
    _Atomic uint32_t request;
    uint64_t next_rip;
    uint64_t zero;              /* always 0: stands for an absent register in an address */

    /* Derived from s by x86_update_mode(): */
    struct tlb_set *tlb;        /* for data accesses at CPL */
    struct tlb_set *tlb_fetch;  /* for instruction fetch at CPL */
    struct x86_tlb_space *space;    /* address space in force */
    /*
     * The engine's: what s.rip is at the start of the page that code is being executed from, so that decoded code can be
     * independent of the address it was mapped at.
     */
    uint64_t code_page;
    uint64_t code_base;         /* linear address of an instruction minus s.rip: CS base outside 64-bit mode, else 0 */
    uint8_t cpl;
    uint8_t code_size;          /* 2, 4, 8 */
    uint8_t stack_size;         /* 2, 4, 8: width of the stack pointer */
    bool long_mode;             /* EFER.LMA: also in compatibility mode */
    bool flat;                  /* legacy mode: ES, CS, SS, DS base 0, limit 4 GiB, so no checks are needed; always true for code_size 8 */
    uint8_t simd_trap;          /* bit 0: x87 raises #NM or #UD by CR0; 1: SSE #UD/#NM; 2: AVX #UD (CR4.OSXSAVE/XCR0); 3: AVX-512 #UD */

    /* The exception being raised, for fault_jmp's target. */
    jmp_buf *fault_jmp;
    uint8_t exc_vector;
    bool exc_has_error, exc_software;   /* software: INT n, INT3, INTO: return address is next_rip */
    uint32_t exc_error;

    /* The surroundings. Borrowed. */
    struct machine *machine;
    struct memory *mem;
    struct lapic *lapic;
    const struct x86_cpu_model *model;
    const struct x86_engine_hooks *hooks;
    void *engine;               /* the engine's own per-vCPU data */
    struct x86_trial *trial;    /* trial.h; NULL: none is under way */
    unsigned index;             /* APIC id */
    unsigned cpus;              /* how many the machine has, for CPUID's topology; 0 counts as 1 */
    uint64_t tsc_hz;
    gpa_t apic_base;            /* page of the xAPIC window when enabled in xAPIC mode, else ~0 */

    /* Counters. */
    uint64_t insns;             /* guest instructions retired */
    uint64_t first_user_ns;     /* clock_now() at first CPL 3 instruction, 0: not yet */
    uint64_t tlb_misses, tlb_flushes, page_walks, exceptions, interrupts, mmio_exits, port_exits, halts;

    /* native.c's: what its stubs load and store besides the state. */
    uint32_t native_mxcsr_in, native_mxcsr_out, native_mxcsr_host;
    uint8_t native_fx[512] __attribute__((aligned(64)));

    struct x86_tlbs *tlbs;

    /* Of mmu.c. */
    uint64_t pdpte[4];          /* PAE paging: loaded with CR3 */
    uint64_t space_clock;       /* for x86_tlb_space.used */
    uint8_t phys_bits;          /* MAXPHYADDR of the model */
    bool has_gib_pages, has_nx;
    bool amd;                   /* the model's vendor is AMD (or Hygon): a few instructions differ */
};

/* ---- life cycle (cpu.c) ---- */
/* Allocates the TLB; state is power-on. 0 or -ENOMEM. */
int x86_cpu_init(struct x86_cpu *cpu, struct machine *m, struct lapic *lapic, const struct x86_cpu_model *model,
                 unsigned index);
void x86_cpu_destroy(struct x86_cpu *cpu);
/* Between canonical state and the running form: s.rflags ↔ arith, derived fields, TLB flushed. */
void x86_cpu_import(struct x86_cpu *cpu, const struct x86_state *s);
void x86_cpu_export(struct x86_cpu *cpu, struct x86_state *s);
/* Recomputes the derived fields after CR0/3/4, EFER, CS, SS, CPL or RFLAGS.AC/VM changed. */
void x86_update_mode(struct x86_cpu *cpu);
/* The vCPU's own thread. It wakes nobody: other threads go through the engine. */
static inline void x86_request(struct x86_cpu *cpu, uint32_t bits)
{
    atomic_fetch_or(&cpu->request, bits);
}

/* ---- flags ---- */
static inline uint64_t x86_rflags(const struct x86_cpu *cpu)
{
    return (cpu->s.rflags & ~(uint64_t)RFLAGS_ARITH) | ((cpu->arith >> 8) & 0xd5) | ((cpu->arith & 1) << 11);
}
/* Sets all of RFLAGS (no privilege checks); bit 1 is forced; calls x86_update_mode if AC or VM changed, requests INTR if IF rises and the LAPIC has one. */
void x86_set_rflags(struct x86_cpu *cpu, uint64_t v);
static inline void x86_set_arith(struct x86_cpu *cpu, uint64_t rflags)
{
    cpu->arith = (uint32_t)((rflags & 0xd5) | 2) << 8 | ((rflags >> 11) & 1);
}

/* ---- exceptions and interrupts (exception.c) ---- */
_Noreturn void x86_raise(struct x86_cpu *cpu, unsigned vector);
_Noreturn void x86_raise_error(struct x86_cpu *cpu, unsigned vector, uint32_t error);
_Noreturn void x86_raise_page_fault(struct x86_cpu *cpu, gva_t address, uint32_t error);
/*
 * Delivers the stored exception (called by the run loop after fault_jmp): pushes the frame, loads CS:RIP, handles double and
 * triple fault. Afterwards s.rip is the handler. On triple fault s.activity becomes X86_SHUTDOWN. Does not longjmp.
 */
void x86_deliver_exception(struct x86_cpu *cpu);
/* An external interrupt, NMI; s.rip is where it returns to. Does not longjmp. */
void x86_deliver_interrupt(struct x86_cpu *cpu, unsigned vector);
/* INT n, INT3, INTO, INT1 as an instruction. */
void x86_software_interrupt(struct x86_cpu *cpu, unsigned vector);
/*
 * Handles cpu->request except EXIT, CODE and SYNC, at an instruction boundary (s.rip current): INIT, SIPI, NMI, interrupts if IF and no shadow.
 * Clears what it handled, wakes from HALTED. The interrupt shadow is the engine's to end: it clears s.interrupt_shadow after one instruction.
 */
void x86_handle_requests(struct x86_cpu *cpu);

/* ---- memory (mmu.c, access.c) ---- */
enum x86_access { ACCESS_READ = 0, ACCESS_WRITE = 1, ACCESS_EXEC = 2 };
/*
 * The page walk (SDM vol. 3A ch. 4): permissions as for the given privilege view, accessed and dirty bits set.
 * 0 and *gpa, *page_size (4K, 2M, 1G); else the page-fault error code in *error and -EFAULT.
 */
int x86_walk(struct x86_cpu *cpu, gva_t va, enum x86_access access, unsigned view, gpa_t *gpa, uint64_t *page_size,
             uint32_t *error);
/* The same without side effects, for debuggers and the monitor: -EFAULT when not mapped. */
int x86_walk_quiet(const struct x86_cpu *cpu, gva_t va, gpa_t *gpa);
void x86_tlb_flush_all(struct x86_cpu *cpu);            /* with global pages, all spaces */
void x86_tlb_flush_page(struct x86_cpu *cpu, gva_t va); /* INVLPG */
/* CR3 loaded: selects or flushes the space. no_flush: bit 63 with PCID. */
void x86_tlb_load_cr3(struct x86_cpu *cpu, uint64_t old_cr3, bool no_flush);
/*
 * Fills the set for the access ahead of time or after a miss, if it is RAM and can be had without anything that the guest could
 * notice: raises nothing, and a write only where the page is dirty already. Uses no vector registers.
 */
bool x86_tlb_try_fill(struct x86_cpu *cpu, struct tlb_set *set, gva_t va, enum x86_access access);
/* Another vCPU decodes this RAM page: drop write tags for it in all sets. */
void x86_tlb_drop_writes_to(struct x86_cpu *cpu, const void *host_page);
/* Dirty logging starts, or wants to hear of writes again: drop all write tags. */
void x86_tlb_drop_writes(struct x86_cpu *cpu);

/*
 * Accesses by linear address in the given TLB set (cpu->tlb for ordinary data). They raise #PF, #GP, #SS, #AC; MMIO is performed.
 * Any alignment and page crossing. The inline parts are the fast path.
 */
uint64_t x86_read_slow(struct x86_cpu *cpu, struct tlb_set *set, gva_t va, unsigned size);
void x86_write_slow(struct x86_cpu *cpu, struct tlb_set *set, gva_t va, uint64_t value, unsigned size);
#define X86_DEFINE_ACCESS(bits) \
    static inline uint##bits##_t x86_read##bits##_in(struct x86_cpu *cpu, struct tlb_set *set, gva_t va) \
    { \
        const void *p = tlb_lookup(set, va, bits / 8, TLB_READ); \
        uint##bits##_t v; \
        if (__builtin_expect(p != NULL, 1)) { \
            __builtin_memcpy(&v, p, sizeof(v)); \
            return v; \
        } \
        return (uint##bits##_t)x86_read_slow(cpu, set, va, bits / 8); \
    } \
    static inline void x86_write##bits##_in(struct x86_cpu *cpu, struct tlb_set *set, gva_t va, uint##bits##_t v) \
    { \
        void *p = tlb_lookup(set, va, bits / 8, TLB_WRITE); \
        if (__builtin_expect(p != NULL, 1)) \
            __builtin_memcpy(p, &v, sizeof(v)); \
        else \
            x86_write_slow(cpu, set, va, v, bits / 8); \
    } \
    static inline uint##bits##_t x86_read##bits(struct x86_cpu *cpu, gva_t va) \
    { \
        return x86_read##bits##_in(cpu, cpu->tlb, va); \
    } \
    static inline void x86_write##bits(struct x86_cpu *cpu, gva_t va, uint##bits##_t v) \
    { \
        x86_write##bits##_in(cpu, cpu->tlb, va, v); \
    }
X86_DEFINE_ACCESS(8)
X86_DEFINE_ACCESS(16)
X86_DEFINE_ACCESS(32)
X86_DEFINE_ACCESS(64)

/* Blocks of bytes (XSAVE areas, vectors, bounce buffers), all-or-nothing: raises before a byte is changed. len ≤ 8192. */
void x86_read_bytes(struct x86_cpu *cpu, gva_t va, void *buf, unsigned len);
void x86_write_bytes(struct x86_cpu *cpu, gva_t va, const void *buf, unsigned len);
/*
 * A host pointer to [va, va+len) for the access, when it lies in one page of RAM that needs no slow path; fills the TLB, raises
 * faults. NULL: MMIO, a code page (for writes), dirty logging, or a page crossing: use read/write.
 */
void *x86_host_pointer(struct x86_cpu *cpu, gva_t va, unsigned len, enum x86_access access);
/* Raises what a write would raise, without writing. For read-modify-write and stores of several parts. */
void x86_probe_write(struct x86_cpu *cpu, gva_t va, unsigned len);
/*
 * For atomic read-modify-write: a host pointer to [va, va+len), len ≤ 16, valid for read and write, to one aligned or in-page location even on
 * a code page (then call x86_rmw_done() afterwards, always). NULL for MMIO or page crossing: x86_split_lock() then serializes.
 */
void *x86_rmw_pointer(struct x86_cpu *cpu, gva_t va, unsigned len);
void x86_rmw_done(struct x86_cpu *cpu, gva_t va, unsigned len, void *pointer);
/* One lock of the machine for what no host atomic can do. */
void x86_split_lock(struct x86_cpu *cpu);
void x86_split_unlock(struct x86_cpu *cpu);
/* Bytes at va for decoding, at most 15, up to the end of what may be executed; raises #PF if not even one. Sets *host_page(s). */
unsigned x86_fetch(struct x86_cpu *cpu, gva_t va, uint8_t bytes[X86_MAX_INSN]);

/* ---- addressing (segment.c) ---- */
/* Linear address of the instruction's memory operand, for an access of size bytes; in legacy and compatibility mode with segment checks (raises). */
gva_t x86_linear(struct x86_cpu *cpu, const struct x86_insn *insn, unsigned size, bool write);
/* Offset only (LEA). */
uint64_t x86_effective(const struct x86_cpu *cpu, const struct x86_insn *insn);
/* seg:offset → linear with all checks of the current mode. */
gva_t x86_seg_linear(struct x86_cpu *cpu, unsigned seg, uint64_t offset, unsigned size, bool write);
/* Stack of the current mode (outside 64-bit mode with SS checks): size 2, 4, 8. */
void x86_push(struct x86_cpu *cpu, uint64_t value, unsigned size);
uint64_t x86_pop(struct x86_cpu *cpu, unsigned size);

/* ---- registers by operand ---- */
static inline uint64_t x86_get_gpr(const struct x86_cpu *cpu, unsigned reg, unsigned size)
{
    uint64_t v = cpu->s.gpr[reg];
    return size == 8 ? v : size == 4 ? (uint32_t)v : size == 2 ? (uint16_t)v : (uint8_t)v;
}
static inline void x86_set_gpr(struct x86_cpu *cpu, unsigned reg, uint64_t v, unsigned size)
{
    if (size == 8)
        cpu->s.gpr[reg] = v;
    else if (size == 4)
        cpu->s.gpr[reg] = (uint32_t)v;
    else if (size == 2)
        __builtin_memcpy(&cpu->s.gpr[reg], &v, 2);
    else
        __builtin_memcpy(&cpu->s.gpr[reg], &v, 1);
}

/* ---- system and other rare instructions (system.c, msr.c, control.c, transfer.c, io.c, xsave.c, …) ---- */
typedef void x86_semantics_fn(struct x86_cpu *cpu, const struct x86_insn *insn);
/*
 * The semantics of an instruction that is not plain computing, or NULL: far transfers, IRET, SYSCALL…, segment
 * loads, CR/DR/MSR, descriptor tables, CPUID, IN/OUT/INS/OUTS (with REP), HLT, POPF/PUSHF, CLI/STI, RDTSC, XSAVE family, FXSAVE, LDMXCSR
 * excluded, INVLPG, INVPCID, SWAPGS, FSGSBASE, STAC/CLAC, VERR…, RDRAND, VMCALL, ENTER, BOUND, MOV SS …
 * HLT sets s.activity; the engine looks at it.
 */
x86_semantics_fn *x86_system_semantics(const struct x86_insn *insn);

/* ---- vector, x87 and rarer integer instructions, run natively (native.c; see native.h) ---- */

#endif
