/*
 * A sandbox with a few pages of a file as its memory, for the tests of sandboxes. Each process of theirs is looked at from outside, by
 * /proc. Each wait is bounded by the test's time.
 */
#ifndef RINGFORT_TESTS_UNIT_SANDBOX_BOX_H
#define RINGFORT_TESTS_UNIT_SANDBOX_BOX_H

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "engine/translate/sandbox.h"

#define PAGE UINT64_C(4096)
#define FILE_PAGES 4096u
#define CODE 0x400000ull        /* first page of the file */
#define DATA 0x600000ull        /* second one */
#define STACK 0x7fff0000ull     /* third one */

/* Code for the sandbox, which goes to CODE. */
#define GUEST(name, text) \
    __asm__(".pushsection .rodata\n" #name ":\n" text "\n" #name "_end:\n.popsection\n"); \
    extern const uint8_t name[], name##_end[]

struct box {
    struct sandbox *s;
    int file;
    uint8_t *ram;               /* our view of the file */
    uint64_t ours;              /* its page of ours */
};

/* What several tests run. */
GUEST(does_syscall, "mov $0x1122334455667788, %rax; syscall; ud2");
GUEST(does_int3, "nop; int3; ud2");
GUEST(spins, "1: inc %rax; jmp 1b");
GUEST(loads, "mov (%rdi), %rax; int3");
GUEST(stores, "movq $0x77, (%rdi); int3");
GUEST(tells, "movb $1, 0x600000; 1: inc %rax; jmp 1b");

/* A file for memory, and our view of it; -1. */
int make_file(uint8_t **ram);
/* With CODE, DATA and STACK mapped. */
bool open_box(struct box *b);
void close_box(struct box *b);
/* cmocka's: *state is an open box. */
int setup_box(void **state);
int teardown_box(void **state);
#define WITH_BOX(f) cmocka_unit_test_setup_teardown(f, setup_box, teardown_box)

/* The code is in place, and the registers lead there. */
void start_at(struct box *b, const uint8_t *code, const uint8_t *end);
#define START(b, name) start_at(b, name, name##_end)
enum sandbox_stop run(struct box *b);
/* Runs a load or a store of 0x77. */
enum sandbox_stop touch(struct box *b, uint64_t va, bool write);
bool works(struct box *b);

/* A file of /proc/PID. */
void read_text(pid_t pid, const char *name, char *text, size_t size);
/* Everything that is mapped. The vsyscall page is nobody's. */
void read_maps(const struct box *b, char *text, size_t size);
unsigned lines(const char *text);
unsigned files_of(pid_t pid);
/* The page of ours, the list behind it, and nothing else. */
void assert_only_ours(const struct box *b);

/* In a process of its own; what it returns has to be 0. Whatever it leaves behind comes to us. */
void in_child(int (*fn)(void));

/* What another thread does when the code is seen to run: it writes to DATA. */
struct other {
    struct box *b;
    int signal;                 /* 0: sandbox_interrupt() */
};
void *when_it_runs(void *other);

#endif
