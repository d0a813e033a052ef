/*
 * A vCPU with memory, devices and page tables of the test's making, for tests of paging,
 * accesses, exceptions and control transfers without an engine.
 */
#ifndef RINGFORT_TESTS_X86_GUEST_H
#define RINGFORT_TESTS_X86_GUEST_H

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

#include "base/util.h"
#include "device/irqchip/irqchip.h"
#include "device/machine.h"
#include "isa/x86/cpu.h"
#include "isa/x86/mmu.h"
#include "isa/x86/segment.h"
#include "isa/x86/transfer.h"

#define RAM_SIZE      MIB(16)
#define HIGH_RAM_BASE GIB(5) /* needs 33 address bits */
#define HIGH_RAM_SIZE MIB(4)
#define DEVICE_BASE   0x80000000ull /* two pages of a device that remembers accesses */

/* Physical places, all below 1 MiB. */
#define GUEST_ROOT   0x10000 /* CR3 */
#define GUEST_TABLES 0x11000 /* further tables are taken from here upwards */
#define GUEST_GDT    0x80000
#define GUEST_IDT    0x82000
#define GUEST_TSS    0x84000
#define GUEST_LDT    0x86000

struct guest {
    struct machine machine;
    struct x86_cpu cpu;
    struct irqchip *chip;
    gpa_t next_table;
    /* What the device at DEVICE_BASE saw last; reads return device_value. */
    unsigned device_reads, device_writes;
    uint64_t device_offset, device_value;
    unsigned device_size;
    /* What the code_written hook saw last. */
    unsigned code_calls;
    gpa_t code_gpa;
    unsigned code_len;
    /* What the mapping_changed hook was told since the test cleared it. */
    bool user_code_moved, supervisor_code_moved;
};

/* cmocka fixtures: *state is a struct guest *. The vCPU is in 32-bit protected mode without paging,
 * CPL 0, flat. */
int guest_setup(void **state);
int guest_teardown(void **state);

/* Paging modes and the page sizes in them. */
enum paging { PAGING_32, PAGING_PAE, PAGING_4LEVEL };
/* Turns paging on with empty tables; EFER.NXE where it exists; 4-level: in 64-bit mode. CPL stays
 * 0. */
void guest_paging(struct guest *g, enum paging mode);
/* The current privilege level, by SS and CS; flat segments. */
void guest_set_cpl(struct guest *g, unsigned cpl);

/*
 * Maps a page of the given size (4 KiB, 2/4 MiB, 1 GiB) with these entry bits (P is added to all
 * levels): leaf in the last entry, upper in all above. Returns the host address of the leaf entry.
 * Does not flush.
 */
void *guest_map(struct guest *g, gva_t va, gpa_t pa, uint64_t size, uint64_t leaf, uint64_t upper);
/* The entry for va at this level (1: the last), made if need be: as guest_map does. */
void *guest_entry(struct guest *g, gva_t va, unsigned level, uint64_t upper);

#define PTE_P  0x001ull
#define PTE_W  0x002ull
#define PTE_U  0x004ull
#define PTE_A  0x020ull
#define PTE_D  0x040ull
#define PTE_PS 0x080ull
#define PTE_G  0x100ull
#define PTE_NX (1ull << 63)

/* Raw guest-physical memory. */
uint8_t *guest_ram(struct guest *g, gpa_t pa);
uint64_t guest_get(struct guest *g, gpa_t pa, unsigned size);
void guest_put(struct guest *g, gpa_t pa, uint64_t value, unsigned size);
_Atomic uint8_t *guest_flags(struct guest *g, gpa_t pa);

/* An 8-byte segment descriptor: attr in the layout of struct x86_seg. */
uint64_t guest_desc(uint32_t base, uint32_t limit, uint32_t attr);

/* RAISED's callers change no local variable between setjmp and longjmp, which gcc cannot see. */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wclobbered"
#endif

/*
 * Runs a statement that may raise. The value is the vector, or -1 when it came through; the error
 * code is in cpu.exc_error.
 */
#define RAISED(g, ...)                               \
    __extension__({                                  \
        jmp_buf raised_env_;                         \
        jmp_buf *raised_outer_ = (g)->cpu.fault_jmp; \
        volatile int raised_vector_ = -1;            \
        (g)->cpu.fault_jmp = &raised_env_;           \
        if (setjmp(raised_env_) == 0) {              \
            __VA_ARGS__;                             \
        } else {                                     \
            raised_vector_ = (g)->cpu.exc_vector;    \
        }                                            \
        (g)->cpu.fault_jmp = raised_outer_;          \
        (int)raised_vector_;                         \
    })

/*
 * A small system in one of the three modes, for events and transfers: CPL 0, interrupts on. In the
 * paged modes the first 2 MiB are the supervisor's, [2 MiB, 4 MiB) the user's, the rest not mapped.
 * Selectors:
 */
enum {
    SEL_KCODE = 0x08,
    SEL_KDATA = 0x10,
    SEL_UCODE32 = 0x18,
    SEL_UDATA = 0x20,
    SEL_UCODE64 = 0x28,
    SEL_TSS = 0x30,
    SEL_CONFORMING = 0x40,
    SEL_ABSENT_CODE = 0x48,
    SEL_KCODE_OTHER = 0x50,
    SEL_ABSENT_DATA = 0x58,
    SEL_CODE16 = 0x60,
    SEL_DATA16 = 0x68,
    SEL_LDT = 0x70,
    SEL_FREE = 0x80
};
#define KERNEL_STACK \
    0x90000ull /* RSP in force and RSP0 in the TSS: RSP0 is KERNEL_STACK - 0x1000 */
#define IST_STACK(n)    (0xa0000ull + (n)*0x1000)
#define USER_STACK      0x300000ull
#define USER_CODE       0x200000ull
#define HANDLER(vector) (0x100000ull + (vector)*0x10)
/* KCODE is of the mode's own width, KCODE_OTHER is 32-bit code in long mode. All vectors have
 * interrupt gates, DPL 3. */
enum guest_mode { GUEST_LONG, GUEST_32, GUEST_REAL };
void guest_system(struct guest *g, enum guest_mode mode);
/* Loads CS and SS as user code would have them: 64-bit or, with wide false, 32-bit. RSP is
 * USER_STACK, RIP USER_CODE. */
void guest_enter_user(struct guest *g, bool wide);
void guest_gdt(struct guest *g, unsigned selector, uint64_t desc);
/* An IDT entry; type: 14, 15, 6, 7, 5. */
void guest_gate(struct guest *g, unsigned vector, unsigned selector, uint64_t offset, unsigned type,
                unsigned dpl, bool present, unsigned ist);

/* Decodes the instruction at s.rip's bytes as given and makes next_rip follow it. */
struct x86_insn guest_insn(struct guest *g, const void *bytes, unsigned len);
/* Runs one of isa/x86/system.h's instructions; the vector raised, or -1. */
int guest_run_system(struct guest *g, const char *bytes, unsigned len);
#define RUN_SYSTEM(g, bytes) guest_run_system(g, bytes, sizeof(bytes) - 1)

#endif
