/*
 * Single instructions of any bytes, run by the host's processor in a child process that they may destroy.
 *
 * Bytes are put in front of a page that cannot be executed, and single-stepped with harmless register values: zero, RAX all
 * ones, RSP in a stack of its own, FS and GS bases zero; RBX points to an aligned page of data. A processor that wants
 * more bytes than there are faults on the fetch at that page.
 */
#ifndef RINGFORT_TESTS_RUN_NATIVE_H
#define RINGFORT_TESTS_RUN_NATIVE_H

#include <stdbool.h>
#include <stdint.h>

/* What came of it. */
struct native_result {
    int signal;                 /* SIGTRAP: executed */
    unsigned vector;            /* of the exception behind the signal */
    bool fetch_fault;           /* it needs more bytes */
};

/* Sets up the process it is called in: signal handlers, pages. False: not possible here. */
bool native_run_setup(void);
/* 16-bit code needs a segment that not every kernel grants. */
bool native_run_can_16_bit(void);
/* Executes the last n (≤ 15) bytes before the boundary as code of 2, 4 or 8 bytes' operand width. */
struct native_result native_run(const uint8_t *bytes, unsigned n, unsigned code_size);
/* Where RBX points: 4 KiB of data, below 4 GiB. */
uint8_t *native_run_data(void);

#define CASE_BYTES 24           /* more than an instruction has */
/* Random bytes by seed and number, more often such as begin something interesting. */
void native_case(uint8_t bytes[CASE_BYTES], uint64_t seed, uint64_t number, unsigned code_size);

/* Counters that survive the child. */
struct native_totals {
    uint64_t seed;
    volatile uint64_t next;     /* the case being run, or to be run next */
    volatile uint64_t done[4], differences, lost;
};

/*
 * Runs run_case() for the cases 0 … count-1, in children one after the other: when one dies, the next goes on behind the
 * case that killed it. NULL when it does not work here (printed).
 */
struct native_totals *native_run_cases(uint64_t seed, uint64_t count, void (*run_case)(struct native_totals *));
/* One line about a difference, the first twenty of them. */
void native_report(struct native_totals *t, const uint8_t *bytes, unsigned code_size, const char *what);

#endif
