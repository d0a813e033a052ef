/*
 * Differential tests of a processor engine: the same instructions from the same state on the host processor (the
 * oracle) and in a Ringfort engine, and everything that user code can see compared.
 *
 *   diff_generate.c   makes cases: instructions and the state they start from
 *   diff_encode.c     the bytes of instructions
 *   diff_shapes.c     longer cases of a certain shape
 *   diff_host.c       runs them natively in a child process
 *   diff_guest.c      runs them in a small Ringfort machine
 *   diff_compare.c    compares and prints
 *   difftest.c        the program: options, batches, minimizing, figures
 *
 * Both sides have the same user address space: two pages of code that cannot be written, and a window of data pages of
 * different permissions that is mapped at several addresses. A case is a function of seed and number alone.
 */
#ifndef RINGFORT_TESTS_CPU_DIFF_H
#define RINGFORT_TESTS_CPU_DIFF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "isa/x86/state.h"

/* ---- address space ---- */
#define CODE_BASE 0x10000000u
#define CODE_PAGES 2u           /* the page after them is not mapped */
#define CODE_SIZE (CODE_PAGES * 4096u)
#define CODE_FILL 0xcc          /* INT3 wherever there is no case */

/* The window: its pages in order. Physical pages, or none. */
#define WINDOW_PAGES 8u
enum window_access { WINDOW_NONE, WINDOW_READ, WINDOW_WRITE };
struct window_page {
    uint8_t access;             /* enum window_access */
    uint8_t page;               /* of the data pages */
};
extern const struct window_page window[WINDOW_PAGES];
#define DATA_PAGES 7u
#define DATA_SIZE (DATA_PAGES * 4096u)
#define LINE 64u                /* memory is compared and restored in lines */
#define DATA_LINES (DATA_SIZE / LINE)

/*
 * With code_size 2: a code segment at CODE_BASE, and one for DS, ES and SS at WINDOW_LOW that ends with the window. RIP is then the offset,
 * but in struct cpu_view it is linear.
 */
enum { SEL_CODE16 = 0x07, SEL_DATA16 = 0x0f };
#define CODE16_LIMIT 0xffffu
#define DATA16_LIMIT (WINDOW_PAGES * 4096u - 1)

#define WINDOW_LOW 0x20000000ull
#define WINDOW_HIGH 0x5a5a20000000ull       /* the same pages; out of reach in 32-bit code */
#define EDGE_LOW 0xfffff000ull  /* around 4 GiB: two pages of their own */
#define EDGE_HIGH 0x100000000ull
#define EDGE_PAGE 5u            /* the first of them */

/* ---- cases ---- */
#define MAX_INSNS 48
#define MAX_CODE 640

struct case_insn {
    uint16_t offset;            /* in code[] */
    uint8_t length;
    uint16_t mnemonic;
};

/* What user code sees of the processor. */
struct cpu_view {
    uint64_t gpr[16];
    uint64_t rip, rflags;
    uint64_t fs_base, gs_base;
    struct x86_fpu fpu;         /* k, st, zmm, control and status; xinuse_hint unused */
};

struct cpu_case {
    uint64_t number;
    uint8_t code_size;          /* 8: 64-bit mode, 4: compatibility mode, 2: the same with 16-bit segments */
    uint16_t start;             /* of code[] in the code pages */
    uint16_t bytes;             /* of code[] */
    uint16_t insns;
    struct case_insn insn[MAX_INSNS];
    uint8_t code[MAX_CODE];
    struct cpu_view in;
};

enum case_end { END_FAULT, END_TIMEOUT, END_SYSTEM_CALL, END_CRASH };

struct cpu_result {
    uint8_t end;                /* enum case_end; the rest is valid with END_FAULT */
    uint8_t vector;
    uint32_t error;
    uint64_t cr2;
    struct cpu_view out;
    /* Lines of data memory that are not as they were. */
    uint64_t changed[DATA_LINES / 64];
    uint8_t line[DATA_LINES][LINE];         /* valid where changed says so */
};
_Static_assert(DATA_LINES % 64 == 0, "one bit for each line");

/* ---- random numbers: splitmix64 ---- */
struct rng { uint64_t state; };
static inline uint64_t rng64(struct rng *r)
{
    uint64_t z = r->state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}
static inline unsigned rng_below(struct rng *r, unsigned n) { return (unsigned)((rng64(r) >> 32) * n >> 32); }
static inline bool rng_percent(struct rng *r, unsigned percent) { return rng_below(r, 100) < percent; }
#define RNG_PICK(r, array) ((array)[rng_below((r), sizeof(array) / sizeof((array)[0]))])

/* ---- generator (diff_generate.c) ---- */
#define BATCH 64u               /* consecutive cases that start from the same data memory */

struct generate_options {
    uint64_t seed;
    unsigned percent32;         /* of cases in compatibility mode */
    unsigned percent_ac;        /* of cases with alignment checking */
    unsigned max_insns;         /* instructions of a case before fix-ups; 0: the usual mix */
    bool code16;                /* cases of code_size 2 only */
    bool kernel;                /* the engine runs the cases at privilege level 0: nothing that means something else there */
    unsigned shape;             /* 0: random instructions; else 1 + index of shape_names */
    const struct x86_cpu_model *model;  /* instructions and registers that the engine's processor has; NULL: the host's */
    const bool *only;           /* by ZydisMnemonic: the ones that cases consist of; NULL: all. The same in all calls. */
};
void generate_case(struct cpu_case *c, const struct generate_options *o, uint64_t number);
/* NULL-terminated. generate_shape() fills code and registers, x87 and vector state apart, of a 64-bit case (diff_shapes.c). */
extern const char *const shape_names[];
#define SHAPE_WRITES_CODE 6u    /* generate_options.shape of those that do */
void generate_shape(struct cpu_case *c, unsigned shape, struct rng *r);
/* Data memory that case number starts from. */
void generate_data(uint8_t data[DATA_SIZE], const struct generate_options *o, uint64_t number);

/* ---- the host processor (diff_host.c) ---- */
struct host;
/*
 * NULL with a reason on stderr; *skip: the host lacks something that the test needs. writes_code: cases may write the code
 * pages; code16: they are all of code_size 2; null_segments: DS and ES are null.
 */
struct host *host_create(bool *skip, bool writes_code, bool code16, bool null_segments);
void host_destroy(struct host *h);
/* The data memory for the cases that follow. */
void host_set_data(struct host *h, const uint8_t data[DATA_SIZE]);
/*
 * Runs count ≤ BATCH cases in order, each from the data memory as set. host_start() returns at once, cases may then be
 * reused; host_finish() waits for the results of as many cases.
 */
void host_start(struct host *h, const struct cpu_case *cases, unsigned count);
void host_finish(struct host *h, struct cpu_result *results);

/* ---- the engine (diff_guest.c) ---- */
struct guest;
/* kernel: cases run at privilege level 0, in memory that is the supervisor's. writes_code: they may write the code pages. direct: data segments
 * as programs have them that the engine runs natively. */
struct guest *guest_create(const char *engine, const char *model, bool direct, bool kernel, bool writes_code);
void guest_destroy(struct guest *g);
void guest_set_data(struct guest *g, const uint8_t data[DATA_SIZE]);
void guest_run(struct guest *g, const struct cpu_case *c, struct cpu_result *result);
/* It is a /dev/kvm that emulates, whose differences are its own. */
bool guest_emulated(const struct guest *g);
/* What its engine can show of the model. */
const struct x86_cpu_model *guest_model(const struct guest *g);
uint64_t guest_instructions(const struct guest *g);
/* From now on NMIs and kicks come all the time. guest_interrupts(): how many were taken. */
void guest_interrupt(struct guest *g);
uint64_t guest_interrupts(const struct guest *g);
/* How often user code ran in a sandbox. */
uint64_t guest_direct_runs(const struct guest *g);
/* One vCPU for all cases, so that its caches and the memory for prepared code fill up. Before the first case. */
void guest_keep_vcpu(bool keep);

/* ---- comparison (diff_compare.c) ---- */
/* Whether arithmetic flags in the frame of a fault count: not where an engine keeps only those that code can come to read. */
extern bool compare_flags_at_faults;
/* The guest was at privilege level 0, which error codes of page faults say. */
extern bool compare_kernel;
extern bool compare_direct;     /* the engine runs code in a sandbox */
/* True when equal. text: NULL, or where differences are described (always terminated). */
bool compare_results(const struct cpu_case *c, const struct cpu_result *host, const struct cpu_result *guest, char *text,
                     size_t size);
/* Differing results: why that is all right, or NULL. */
const char *known_difference(const struct cpu_case *c, const struct cpu_result *host, const struct cpu_result *guest);
void print_case(const struct cpu_case *c);

#endif
