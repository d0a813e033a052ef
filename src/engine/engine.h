/*
 * A way to run a vCPU: the one interface of the interpreter, the translator and KVM.
 *
 * The machine's state belongs to the machine: an engine holds a vCPU's state only between
 * import_state() and export_state(), and both are possible whenever run() is not running.
 */
#ifndef RINGFORT_ENGINE_ENGINE_H
#define RINGFORT_ENGINE_ENGINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "device/irqchip/irqchip.h"
#include "isa/x86/state.h"
#include "memory/memory.h"

struct machine;
struct x86_cpu_model;
struct engine;
struct soft_group;

/* Why run() came back. */
enum vm_exit {
    VM_EXIT_KICK,               /* vcpu_kick(): pause, stop, engine switch */
    VM_EXIT_SHUTDOWN,           /* triple fault */
    VM_EXIT_ERROR,              /* the engine cannot go on (logged) */
};

struct engine_counters {
    uint64_t instructions;      /* retired by the guest; 0 where the engine does not count */
    uint64_t first_user_ns;     /* guest clock at the first user-mode instruction; 0: none yet */
    uint64_t mmio_exits, port_exits, halts, exceptions, interrupts;
    uint64_t tlb_misses, tlb_flushes, page_walks;
    uint64_t blocks_decoded, block_flushes, code_writes;
    /* The translator's; 0 elsewhere. */
    uint64_t units, units_apart, units_looping; /* translated; again without shared checks; again as loops with hoisted checks */
    uint64_t unit_bytes, guest_bytes;   /* of host code made, and of guest code that it was made from */
    uint64_t chains;                    /* jumps patched from translation to translation */
    uint64_t entries;                   /* into translated code from the run loop */
    uint64_t checks_missed, groups_missed;      /* inline checks of the soft TLB; those that several accesses share */
    uint64_t interpreted_ops;           /* instructions that translated code had interpreted */
    uint64_t jumps_missed;      /* targets of indirect and far jumps that the jump table did not have yet, or any more */
    uint64_t returns_missed, return_overflows;  /* returns that the return stack did not predict; its overflows */
    /* Of direct execution: times that user code was entered natively, for how long in all, page faults there, pages that were mapped… */
    uint64_t native_runs, native_ns, native_faults, native_pages;
    uint64_t native_steps, native_demotions, native_sandboxes;  /* instructions interpreted in between; times it did not pay; processes made */
    uint64_t native_cpu_ns;     /* processor time of those processes, which is none of ours */
};

struct vcpu {
    struct machine *machine;
    struct lapic *lapic;
    const struct x86_cpu_model *model;
    unsigned index;             /* APIC id */
    unsigned count;             /* vCPUs of the machine */
    struct soft_group *group;   /* what the software engines' vCPUs of one machine share */
    uint64_t tsc_hz;
    const struct engine *engine;
    void *data;                 /* the engine's own */
};

struct engine_report {
    bool usable;
    bool fast;                  /* guest kernel code runs natively or nearly so */
    char text[256];             /* one or two sentences for people: what was found, and what to do if unusable */
};

struct engine {
    const char *name;           /* "interp", "translate", "kvm" */
    const char *summary;
    bool checks_pages;          /* a vCPU looks at the flags of a page before it writes it (memory.h) */
    void (*probe)(struct engine_report *);
    /*
     * For people who ask what this host can do: how the engine, which is usable, does here; size bytes. May cost some ms and a process. NULL:
     * the report's text says it all.
     */
    void (*describe)(char *text, size_t size);
    /* See engine_offer(). NULL: all that the host's processor can run (x86_cpu_model_usable()). */
    const struct x86_cpu_model *(*offer)(const struct x86_cpu_model *m, bool exact, const char **missing);
    /* Power-on state until import_state. 0 or a negative errno (logged). */
    int (*vcpu_create)(struct vcpu *);
    void (*vcpu_destroy)(struct vcpu *);
    /* The vCPU's own thread, without the machine lock. Waits inside while the guest halts. */
    enum vm_exit (*run)(struct vcpu *);
    /* Any thread: makes run() return soon; if it is not running, the next call returns at once. */
    void (*kick)(struct vcpu *);
    /* Any thread: from the local APIC. */
    void (*signal)(struct vcpu *, enum lapic_signal, unsigned value);
    /*
     * While no vCPU of the machine is inside run(). The LAPIC's state is not in there but in the machine's irqchip, which is up to
     * date then. export: what is pending too, so that an import of it elsewhere goes on as if nothing had been; the vCPU here keeps
     * it. import: devices have their state already. Clock pages that the guest has stay true by themselves: they
     * are in terms of its TSC, which goes on from where it stood.
     */
    void (*export_state)(struct vcpu *, struct x86_state *);
    void (*import_state)(struct vcpu *, const struct x86_state *);
    /* While run() is not running: the guest's TSC moves by ticks (modulo 2^64). NULL: by export and import. */
    void (*shift_tsc)(struct vcpu *, uint64_t ticks);
    /* Any thread: guest memory of this page was written by something that is not a vCPU. */
    void (*code_written)(struct vcpu *, gpa_t page);
    /* Any thread; figures may be slightly old. */
    void (*counters)(const struct vcpu *, struct engine_counters *);
};

/*
 * The model as the engine can run it on this host: m itself, or, unless exact, one with fewer features. It stays valid. NULL and the
 * name of what is missing: it cannot. A machine keeps the model that it was started with; before it changes its engine, ask
 * for exactly that.
 */
const struct x86_cpu_model *engine_offer(const struct engine *e, const struct x86_cpu_model *m, bool exact, const char **missing);

extern const struct engine interp_engine, translate_engine, kvm_engine;

/* NULL: no such engine. "auto" is not an engine: see engine_choose(). */
const struct engine *engine_find(const char *name);
const struct engine *engine_at(unsigned i);     /* NULL after the last */
/* The engine that "auto" stands for on this host. */
const struct engine *engine_choose(void);

#endif
