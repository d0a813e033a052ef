/*
 * What the parts of direct execution share: direct.c (in and out), direct_shadow.c (what a sandbox is shown of memory),
 * direct_judge.c (whether it pays, and where it runs). In the vCPU's thread.
 */
#ifndef RINGFORT_ENGINE_TRANSLATE_DIRECT_INTERNAL_H
#define RINGFORT_ENGINE_TRANSLATE_DIRECT_INTERNAL_H

#include <sched.h>
#include <sys/mman.h>
#include <sys/types.h>

#include "engine/translate/direct.h"
#include "engine/translate/sandbox.h"
#include "engine/translate/translate.h"

#define DIRECT_PENDING 64u       /* addresses, or places, that are looked at one by one */
#define DIRECT_SEARCHED 16384u

enum { CAN_READ = PROT_READ, CAN_WRITE = PROT_WRITE, CAN_EXECUTE = PROT_EXEC, CANS = 7, LARGE = 8, HUGE = 16 };

struct direct_page {
    uint64_t va;                /* and in the low bits what is mapped of it (CAN_…; none: nothing), and LARGE (2 MiB), HUGE (1 GiB) */
    uint64_t place;             /* offset in its region's file, and in the low bits the region */
};

/* One address space of the soft TLB. */
struct direct_space {
    struct sandbox *box;        /* NULL: none yet */
    struct direct_page *page;   /* as many as direct_shadow.c says */
    uint16_t *hash;             /* index in page[], plus 1 */
    unsigned pages;
    bool large, huge;           /* some page may belong to one of that size */
    uint64_t root;              /* of the page tables that all this is for */
    /* What the guest has invalidated since it last ran here; more than fit: everything. */
    gva_t pending[DIRECT_PENDING];
    unsigned pendings;
    bool stale;
    /* Places whose writes are to be seen again since then; more than fit: all. */
    uint64_t dropped[DIRECT_PENDING];
    unsigned drops;
    bool cpuid_stops;           /* CPUID stops the sandbox: its code need not be kept from running there, but switching is dearer */
    bool lingers;               /* code that has to be kept from running there is in its way often */
    gva_t touched;              /* the page fault that went to the guest, to be mapped when it comes back; 0: none */
    int processor;              /* it is bound to, or -1 */
    uint64_t switch_cost;       /* ticks that there and back took last; 0: not known */
    uint64_t cpu_ns, noted;     /* the sandbox's processor time when it was last looked at, and when that was */
    /* Whether it is worth it. */
    uint64_t judged_root;       /* what follows is about the program with these page tables */
    uint64_t total, average;    /* ticks in user code by translation; per stay */
    uint64_t not_before;        /* tried again from then on, */
    uint64_t backoff;           /* after this long */
    uint64_t ran;               /* of the window: ticks natively, with switches */
    unsigned switches, stops, detours;  /* all, and those that are not the first touch of a page */
    unsigned all_detours;       /* of former windows in which there were many */
};

struct direct {
    struct translator *t;
    struct direct_space space[X86_TLB_SPACES];
    bool always;                /* without asking whether it pays (tests) */
    bool same_components;       /* XCR0 of host and guest agree where all that the guest may have is on */
    ino_t file[MEMORY_MAX_REGIONS];     /* that hold the memory which sandboxes have; 0: none */
    bool told;                  /* that no sandbox can be made */
    /* Pages of code that were searched: a hash of what is in them, and in bit 0 whether it must not run natively. */
    uint64_t searched[DIRECT_SEARCHED];
    uint64_t secret[4];         /* of the hash */
    uint64_t entered;           /* TSC when user code was entered; 0: it is the supervisor's turn */
    uint64_t tick;              /* TSC ticks of a microsecond */
    bool ran_now;               /* since it was entered, user code has run natively */
    uint64_t switch_cost;       /* what it was last in a space where CPUID does not stop; a guess if that is long ago */
    uint64_t measured;          /* when: TSC */
    pid_t thread;               /* whom the sandboxes answer to */
    /* Of other threads that want something of the vCPU: direct_requested(). */
    _Atomic int running;        /* handle of the sandbox that is about to run, or runs; -1: none */
    _Atomic unsigned interrupting;      /* how many threads use that handle just now */
    /* Processors. */
    cpu_set_t allowed;
    bool bound;
    int processor;
    uint64_t watched_ran, watched_runs, watched_time;   /* since the processor was last judged */
    /* Figures. */
    uint64_t runs, faults, mapped, steps, demotions, boxes, ticks;
    _Atomic uint64_t cpu_ns;    /* of all sandboxes that there were; asked for while the vCPU runs */
};

static inline struct x86_cpu *direct_cpu(struct direct *d) { return &d->t->it.cpu; }

static inline struct direct_space *direct_space_now(struct direct *d)
{
    struct x86_cpu *cpu = direct_cpu(d);

    return &d->space[cpu->space - cpu->tlbs->space];
}

static inline uint64_t direct_root(struct direct *d)
{
    struct x86_cpu *cpu = direct_cpu(d);

    return cpu->s.cr3 & ((1ull << cpu->phys_bits) - 1) & GUEST_PAGE_MASK;
}

/* ---- direct.c ---- */
/* Code that can run natively as things stand. */
bool direct_eligible(const struct direct *d);

/* ---- direct_shadow.c ---- */
/* The tables of a space without any. False: no memory. */
bool direct_make_tables(struct direct_space *s);
/* The entry of a page; when it has none yet: NULL, or a new one. There is room. */
struct direct_page *direct_page(struct direct_space *s, gva_t page, bool make);
/* Nothing is mapped any more, with the next commit. */
void direct_forget(struct direct_space *s);
/* The kernel has refused a mapping: the same; and demoted, if that cannot help because there were few. */
void direct_forget_all(struct direct *d, struct direct_space *s);
/* Makes the sandbox agree with what happened since user code ran in it. */
void direct_catch_up(struct direct *d, struct direct_space *s);
/* Maps the page at va and those around it that the guest has used. True if that gives the page rights that it had not. */
bool direct_grant(struct direct *d, struct direct_space *s, gva_t va);
/* Whether the fetch at address, where RIP is, failed because the page's code must not run natively. */
bool direct_runs_wrongly_at(struct direct *d, struct direct_space *s, gva_t address);

/* ---- direct_judge.c ---- */
void direct_judge_begin(struct direct *d);
/* Puts the vCPU's thread and the sandbox on one processor; lets the thread go where it may again. */
void direct_bind(struct direct *d, struct direct_space *s);
void direct_unbind(struct direct *d);
/* Not in this space until so many µs from now. */
void direct_demote(struct direct *d, struct direct_space *s, uint64_t now, uint64_t backoff);
/* After a stop; ran: ticks. first: for the first touch of a page, which says nothing of what follows. */
void direct_judge(struct direct *d, struct direct_space *s, uint64_t ran, uint64_t now, bool first);
void direct_judge_processor(struct direct *d, struct direct_space *s);
/* The interpreter is asked for code that must not run natively. */
void direct_judge_detour(struct direct_space *s);
#define DIRECT_BACKOFF_MAX 8000000u     /* µs */

#endif
