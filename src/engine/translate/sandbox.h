/*
 * A process of the host in which a guest's user code runs natively: nothing is mapped in it but pages of guest RAM and
 * one page of code of ours, it holds no file but guest RAM, and it cannot make a system call. All that it could do is
 * compute on the memory that it was given, until it stops for one of the reasons below.
 *
 * How it is kept so: its vCPU's thread traces it (ptrace), and lets guest code go on by PTRACE_SYSEMU alone, under which the kernel
 * reports system calls and does none. What has to be mapped, it maps itself, by the page of ours, while it is continued
 * otherwise, and comes back before guest code runs again. A seccomp filter refuses all else, from anywhere else, too. Signals never
 * reach it. It dies with the thread that traces it.
 *
 * The thread that makes a sandbox is the one that uses it. sandbox_destroy(): any thread, when no other uses it or its handle.
 */
#ifndef RINGFORT_ENGINE_TRANSLATE_SANDBOX_H
#define RINGFORT_ENGINE_TRANSLATE_SANDBOX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/user.h>

struct sandbox;

/* Guest addresses that can be mapped; the page of ours is somewhere in the middle, at a place drawn by lot. */
#define SANDBOX_BEGIN 0x10000ull
#define SANDBOX_END 0x7ffffffff000ull
#define SANDBOX_FILES 8

/* What the host lets us do; asked once, costs a process. */
struct sandbox_abilities {
    bool usable;
    char text[160];             /* why not usable, and what to do */
};
const struct sandbox_abilities *sandbox_abilities(void);

enum sandbox_stop {
    /*
     * SYSCALL or INT 0x80 was executed: RIP is behind it, ORIG_RAX is RAX, of which kernels keep the lower half alone for INT 0x80.
     * Also after SYSENTER, where processors have it in 64-bit code: RIP and RSP are lost then.
     */
    SANDBOX_SYSCALL,
    SANDBOX_PAGE_FAULT,         /* at RIP, for an access to address */
    SANDBOX_FAULT,              /* at RIP: any other exception. Of calls into the vsyscall page: RAX may be lost */
    SANDBOX_BREAKPOINT,         /* INT3 or INT1 was executed: RIP is behind it */
    SANDBOX_STEPPED,            /* guest code set RFLAGS.TF: RIP is behind an instruction */
    SANDBOX_INTERRUPTED,
    SANDBOX_REFUSED,            /* it has not run: the kernel takes no such segments or bases as the registers have, which code itself can load */
    SANDBOX_DEAD,               /* it has not run: somebody killed it before, or the kernel does not continue it any more */
    SANDBOX_GONE,               /* somebody killed it while it ran: what it had in registers is lost */
};

/* 0 or a negative errno (silent). files: what sandbox_map() has to do with, -1 for none; they stay the caller's. */
int sandbox_create(struct sandbox **s, const int *files, unsigned count);
void sandbox_destroy(struct sandbox *s);

/*
 * Maps [offset, offset+size) of files[file] at va with prot as of mmap(), or takes away what is there. At the latest with the next
 * sandbox_commit(); in order. Multiples of the page size inside [SANDBOX_BEGIN, SANDBOX_END). False: it lies over the page of ours.
 */
bool sandbox_map(struct sandbox *s, uint64_t va, uint64_t size, unsigned file, uint64_t offset, int prot);
bool sandbox_unmap(struct sandbox *s, uint64_t va, uint64_t size);
/* Takes everything away. */
void sandbox_clear(struct sandbox *s);
/* 0; or a negative errno: of the mapping that failed, after which those behind it have not been done; -ESRCH: it is gone. */
int sandbox_commit(struct sandbox *s);

/*
 * CPUID stops it with SANDBOX_FAULT from now on, or shows the host's features again. 0 or a negative errno: the processor or kernel
 * cannot. The kernel sets a register for it at each switch, which costs 24 µs where the host is itself a virtual machine.
 */
int sandbox_stop_at_cpuid(struct sandbox *s, bool stop);

/* Registers of the guest; orig_rax is none of its. Valid while it stands. */
struct user_regs_struct *sandbox_regs(struct sandbox *s);
/* Vector registers as an XSAVE image in the standard format, of *size bytes. 0 or a negative errno. */
uint8_t *sandbox_vectors(struct sandbox *s, size_t *size);
int sandbox_get_vectors(struct sandbox *s);
int sandbox_set_vectors(struct sandbox *s);

/*
 * Runs it with the registers until it stops; the registers are what it stopped with. After sandbox_commit(). address is for page
 * faults.
 */
enum sandbox_stop sandbox_run(struct sandbox *s, uint64_t *address);
/* Into the page of ours and back: what sandbox_run() costs besides what guest code does, in ticks of the TSC. */
uint64_t sandbox_trip(struct sandbox *s);
/*
 * For other threads: a descriptor that means this process and no other, also when it is gone and its number is somebody else's. It is the
 * sandbox's, open until sandbox_destroy().
 */
int sandbox_handle(const struct sandbox *s);
/*
 * Makes sandbox_run() return soon; when it does not run, the next one. Does nothing to one that is gone. Any thread, signal handlers too;
 * errno stays.
 */
void sandbox_interrupt(int handle);
/* -1: gone. */
pid_t sandbox_pid(const struct sandbox *s);
/* Its processor time in ns. */
uint64_t sandbox_time(const struct sandbox *s);

#endif
