/*
 * A machine with one vCPU of a given engine, for tests that look at what guest code does: page tables of the test's
 * making, a kernel of exception handlers, and a port that ends a run.
 *
 * Everything of the supervisor lies in one 64 KiB piece of physical memory at 0 that is mapped at KERNEL_BASE. Each exception
 * has a handler that writes to PORT, which kicks the vCPU out of its engine. Selectors are those that Linux has.
 */
#ifndef RINGFORT_TESTS_CPU_ENGINE_GUEST_H
#define RINGFORT_TESTS_CPU_ENGINE_GUEST_H

#include <pthread.h>

#include "base/util.h"
#include "device/machine.h"
#include "engine/engine.h"
#include "engine/soft.h"
#include "isa/x86/cpuid.h"
#include "isa/x86/state.h"

#define GUEST_RAM_SIZE MIB(64)
#define GUEST_FREE_GPA 0x100000u        /* physical memory below is the kernel's and of page tables */
#define KERNEL_BASE 0xffffa00000000000ull       /* not an address that tests come to by design */
#define ENGINE_GUEST_CPUS 4             /* local APICs; vCPUs beyond the first are the test's to make */
#define GUEST_PORT 0x10                 /* any write ends engine_guest_run() */

enum { SEL_KERNEL_CODE = 0x10, SEL_KERNEL_DATA = 0x18, SEL_CODE32 = 0x23, SEL_DATA = 0x2b, SEL_CODE64 = 0x33, SEL_TSS = 0x40 };

#define PTE_P 1ull
#define PTE_W 2ull
#define PTE_U 4ull
#define PTE_A 0x20ull
#define PTE_D 0x40ull
#define PTE_NX (1ull << 63)

struct engine_guest {
    struct machine machine;
    struct irqchip *chip;
    const struct engine *engine;
    bool emulated;              /* it is a /dev/kvm that emulates the supervisor's code, with less than all instructions */
    const struct x86_cpu_model *model;
    struct vcpu vcpu;
    struct soft_group *group;
    uint8_t *ram;
    struct x86_state base;      /* 64-bit mode, paging, flat segments; CS, RIP and RSP are the test's */
    const char *other_engine;   /* NULL, or one that has to be able to go on with the model */
    bool real_clock;            /* time passes by itself, and a thread runs the machine's timers; else it stands still */
    pthread_t loop;
    gpa_t next_table;
    uint64_t instructions;      /* of vCPUs before */
    /* The watchdog. */
    pthread_t watchdog;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool stop, running, expired;
    uint64_t runs;
};

/*
 * Ends the process with status 2 and a message when it cannot, with 77 when this host lacks the engine. g: zeroed but for
 * real_clock and other_engine.
 */
void engine_guest_init(struct engine_guest *g, const char *engine, const char *model);
void engine_guest_destroy(struct engine_guest *g);
/* Another engine goes on with the state. The model stays, which the other engine has to be able to run. g->engine runs nothing. */
void engine_guest_switch(struct engine_guest *g, const char *engine);
/* A fresh vCPU, without anything that the old one had decoded or prepared. */
void engine_guest_renew(struct engine_guest *g);

/* Maps 4 KiB; bits are added to P, A, D. Returns where the entry is in RAM. Flushes nothing. */
gpa_t engine_guest_map(struct engine_guest *g, gva_t va, gpa_t pa, uint64_t bits);
uint64_t engine_guest_get(struct engine_guest *g, gpa_t pa);
void engine_guest_put(struct engine_guest *g, gpa_t pa, uint64_t value, unsigned size);
/* From now on NMIs are taken and returned from, which user code cannot notice. */
void engine_guest_ignore_nmi(struct engine_guest *g);
struct x86_seg engine_guest_segment(struct engine_guest *g, unsigned selector);

enum guest_end { GUEST_ENDED, GUEST_EXPIRED, GUEST_DIED };
/* Runs from s until the port is written, and stores the state then into s. Bounded in time. */
enum guest_end engine_guest_run(struct engine_guest *g, struct x86_state *s);

/* What an exception handler found: the frame on the supervisor's stack. */
struct guest_exception {
    uint8_t vector;
    uint32_t error;
    uint64_t rip, rflags, rsp;
};
/* True when s is in an exception handler with a sound frame. */
bool engine_guest_exception(struct engine_guest *g, const struct x86_state *s, struct guest_exception *e);

uint64_t engine_guest_instructions(const struct engine_guest *g);

#endif
