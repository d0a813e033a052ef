/*
 * What the parts of the probe share: see probe.c for what it is.
 *
 * A part is a function that is called again and again, with the number of the round, until its time is over; it ends the program
 * by wrong() when something is not as the processor's manual or the kernel's interface says.
 */
#ifndef PROBE_H
#define PROBE_H

#include <stddef.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdnoreturn.h>
#include <sys/types.h>

#define PAGE 4096ul

/* No file shares a page of code with another: where instructions like CPUID are in a page, all of it may be run in another way. */
__asm__(".text\n.balign 4096\n");

noreturn __attribute__((format(printf, 1, 2))) void wrong(const char *format, ...);
/* Says that something is not there to be tested; once for each reason. */
__attribute__((format(printf, 1, 2))) void lacking(const char *format, ...);

/* Anonymous memory, or the end. */
uint8_t *map(size_t size, int protection);
pid_t split(void);              /* fork() */
void join(pid_t pid);           /* …which has to end with status 0 */
uint64_t next(uint64_t *state); /* pseudo-random, not of 0 */
double seconds(void);
/* Whether programs may use RDFSBASE and its like. */
int has_fsgsbase(void);
/* A guest of the tests, where what concerns the whole machine may be done. */
bool guest_of_ours(void);
/* Writes the text into the file; false: that cannot be. */
bool put(const char *file, const char *text);
/* Pins the thread; false: there is no such processor. */
int pin(unsigned cpu);
void unpin(void);

/* ---- faults that are expected (probe_faults.c) ---- */

struct fault {
    int signal, code;
    uint64_t address, rip, error, trap, cr2, rcx, rsi, rdi;
};
/* Calls f(argument); gives the signal that ended it; signal 0: none did. rip_wanted() inside is what f says it should be. */
struct fault attempt(void (*f)(void *), void *argument);
extern volatile uint64_t rip_wanted;

/* Sets RFLAGS.TF, counts the traps of the code, clears it; so many, without those of the three instructions that clear it. */
extern volatile unsigned steps;
void on_step(int signal, siginfo_t *info, void *context);
#define SET_TF "pushfq; orl $0x100, (%%rsp); popfq;"
#define CLEAR_TF "pushfq; andl $~0x100, (%%rsp); popfq;"
#define STEPPED(count, what, code) do { \
        steps = 0; \
        __asm__ volatile(SET_TF code CLEAR_TF :: "r"(words) : "rax", "rbx", "rcx", "rdx", "r11", "xmm0", "memory", "cc"); \
        if (steps != (count) + 3) \
            wrong("%s: %u steps, not %u", what, steps, (count) + 3); \
    } while (0)

/* A memory operand's fault: rip_wanted is set to the instruction's address. */
#define FAULTS_HERE "lea 77f(%%rip), %%rax; mov %%rax, %[wanted]; 77: "
#define WANTED [wanted] "=m"(rip_wanted)

/* ---- instructions that keep a page from being run natively (probe_asides.c) ---- */

struct user_desc;
int vector_level(void);         /* 0: SSE, 1: AVX, 2: AVX-512 */
/* set_thread_area(), which only INT 0x80 has. at: room below 4 GiB. The entry's number, or -1. */
int tls_entry(struct user_desc *at, void *base, int number);
void odd_sysenter(void);

void part_registers(uint64_t round);
void part_x87_pointers(uint64_t round);
void part_switches(uint64_t round);
void part_storm(uint64_t round);
void part_memory_faults(uint64_t round);
void part_jumps(uint64_t round);
void part_exceptions(uint64_t round);
void part_traps(uint64_t round);
void part_stacks(uint64_t round);
void part_oddities(uint64_t round);
void part_features(uint64_t round);
void part_stepped(uint64_t round);
void part_lingering(uint64_t round);
void part_clocks(uint64_t round);
void part_numbers(uint64_t round);
void part_vsyscall(uint64_t round);
void part_segments(uint64_t round);
void part_bases(uint64_t round);
void part_code32(uint64_t round);
void part_code(uint64_t round);
void part_aliases(uint64_t round);
void part_code_steps(uint64_t round);
void part_code_races(uint64_t round);
void part_code_reclaimed(uint64_t round);
void part_code_breakpoints(uint64_t round);
void part_copies(uint64_t round);
void part_shared(uint64_t round);
void part_protections(uint64_t round);
void part_remaps(uint64_t round);
void part_huge(uint64_t round);
void part_moved(uint64_t round);
void part_merged(uint64_t round);
void part_many(uint64_t round);
void part_proc_mem(uint64_t round);
void part_soft_dirty(uint64_t round);
void part_userfault(uint64_t round);
void part_atomics(uint64_t round);
void part_trace_steps(uint64_t round);
void part_trace_breakpoints(uint64_t round);
void part_trace_watch(uint64_t round);
void part_exec(uint64_t round);

#endif
