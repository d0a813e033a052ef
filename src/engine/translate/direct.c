/*
 * Direct execution of user code: when it is worth it, what the sandbox is shown of memory, and the way in and out.
 *
 * See direct.h, and docs/direct.md for the reasons. Coming out of a sandbox costs some ten microseconds, so this is for code that
 * computes for much longer than that between two system calls or faults; figures below are in ticks of the host's TSC.
 */
#include "engine/translate/direct.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
#include <x86intrin.h>

#include "base/clock.h"
#include "base/log.h"
#include "device/machine.h"
#include "engine/translate/sandbox.h"
#include "engine/translate/translate.h"
#include "isa/x86/cpuid.h"
#include "isa/x86/mmu.h"
#include "isa/x86/segment.h"
#include "isa/x86/transfer.h"
#include "isa/x86/xsave.h"

/* ---- what is mapped ---- */

#define PAGES 60000u            /* the kernel gives a process some 65,000 mappings */
#define HASH_BITS 17
#define PENDING 64u
#define AROUND 16u              /* pages that are looked at around one that is touched, */
#define AROUND_LARGE 128u       /* …if that is part of a large one */

enum { CAN_READ = PROT_READ, CAN_WRITE = PROT_WRITE, CAN_EXECUTE = PROT_EXEC, CANS = 7, LARGE = 8, HUGE = 16 };

struct page {
    uint64_t va;                /* and in the low bits what is mapped of it (CAN_…; none: nothing), and LARGE (2 MiB), HUGE (1 GiB) */
    uint64_t place;             /* offset in its region's file, and in the low bits the region */
};

/* One address space of the soft TLB. */
struct direct_space {
    struct sandbox *box;        /* NULL: none yet */
    struct page *page;          /* [PAGES] */
    uint16_t *hash;             /* [1 << HASH_BITS]: index in page[], plus 1 */
    unsigned pages;
    bool large, huge;           /* some page may belong to one of that size */
    uint64_t root;              /* of the page tables that all this is for */
    /* What the guest has invalidated since it last ran here; more than fit: everything. */
    gva_t pending[PENDING];
    unsigned pendings;
    bool stale;
    bool writes_dropped;
    bool cpuid_stops;           /* CPUID stops the sandbox: its code need not be kept from running there, but switching is dearer */
    bool lingers;               /* code that has to be kept from running there is in its way often */
    gva_t touched;              /* the page fault that went to the guest, to be mapped when it comes back; 0: none */
    int processor;              /* it is bound to, or -1 */
    uint64_t cpu_ns, noted;     /* the sandbox's processor time when it was last looked at, and when that was */
    /* Whether it is worth it. */
    uint64_t judged_root;       /* what follows is about the program with these page tables */
    uint64_t total, average;    /* ticks in user code by translation; per stay */
    uint64_t not_before;        /* tried again from then on, */
    uint64_t backoff;           /* after this long */
    uint64_t ran;               /* ticks natively, and stops, of the window */
    unsigned stops, detours;
    unsigned all_detours;       /* of former windows in which there were many */
};

struct direct {
    struct translator *t;
    struct direct_space space[X86_TLB_SPACES];
    bool always;                /* without asking whether it pays (tests) */
    bool same_components;       /* XCR0 of host and guest agree where all that the guest may have is on */
    uint64_t host_xcr0;
    int file[MEMORY_MAX_REGIONS];
    uint64_t entered;           /* TSC when user code was entered; 0: it is the supervisor's turn */
    uint64_t tick;              /* TSC ticks of a microsecond */
    pid_t thread;               /* whom the sandboxes answer to */
    /* Processors. */
    cpu_set_t allowed;
    bool bound;
    int processor;
    uint64_t watched_ran, watched_runs, watched_time;   /* since the processor was last judged */
    /* Figures. */
    uint64_t runs, faults, mapped, steps, demotions, boxes, ticks;
    _Atomic uint64_t cpu_ns;    /* of all sandboxes that there were; asked for while the vCPU runs */
};

static struct x86_cpu *cpu_of(struct direct *d) { return &d->t->it.cpu; }

static unsigned hash_of(gva_t page) { return (unsigned)((page >> GUEST_PAGE_SHIFT) * 0x9e3779b97f4a7c15ull >> (64 - HASH_BITS)); }

/* The entry of a page; when it has none yet: NULL, or a new one. There is room. */
static struct page *page_entry(struct direct_space *s, gva_t page, bool make)
{
    unsigned h = hash_of(page);

    for (; s->hash[h]; h = (h + 1) & ((1u << HASH_BITS) - 1))
        if ((s->page[s->hash[h] - 1].va & GUEST_PAGE_MASK) == page)
            return &s->page[s->hash[h] - 1];
    if (!make)
        return NULL;
    s->page[s->pages] = (struct page){ .va = page };
    s->hash[h] = (uint16_t)++s->pages;
    return &s->page[s->pages - 1];
}

static void forget_pages(struct direct_space *s)
{
    if (s->cpuid_stops)
        sandbox_stop_at_cpuid(s->box, false);
    s->cpuid_stops = s->lingers = false;
    memset(s->hash, 0, sizeof(*s->hash) << HASH_BITS);
    s->pages = s->pendings = 0;
    s->large = s->huge = false;
    s->stale = s->writes_dropped = false;
    sandbox_clear(s->box);
}

/* ---- code ---- */

/*
 * Instructions that would do something else in a sandbox than in the guest, without stopping it: they show the host's tables, its
 * processor's number and features, or what it has more than the guest. Or they stop it, but what they had in registers is lost then:
 * RIP and RSP, the upper half of RAX.
 */
static bool runs_wrongly(const struct direct *d, const struct direct_space *s, const struct x86_insn *insn)
{
    switch (insn->mnemonic) {
    case ZYDIS_MNEMONIC_CPUID:
        return !s->cpuid_stops;
    case ZYDIS_MNEMONIC_RDPID: case ZYDIS_MNEMONIC_LSL: case ZYDIS_MNEMONIC_LAR: case ZYDIS_MNEMONIC_VERR:
    case ZYDIS_MNEMONIC_VERW: case ZYDIS_MNEMONIC_SGDT: case ZYDIS_MNEMONIC_SIDT: case ZYDIS_MNEMONIC_SLDT: case ZYDIS_MNEMONIC_STR: case ZYDIS_MNEMONIC_SMSW:
    case ZYDIS_MNEMONIC_SYSENTER: case ZYDIS_MNEMONIC_INT:
        return true;
    case ZYDIS_MNEMONIC_RDFSBASE: case ZYDIS_MNEMONIC_RDGSBASE: case ZYDIS_MNEMONIC_WRFSBASE: case ZYDIS_MNEMONIC_WRGSBASE:
        return !(d->t->it.cpu.s.cr4 & CR4_FSGSBASE);
    case ZYDIS_MNEMONIC_XGETBV:
    case ZYDIS_MNEMONIC_XSAVE: case ZYDIS_MNEMONIC_XSAVE64: case ZYDIS_MNEMONIC_XSAVEC: case ZYDIS_MNEMONIC_XSAVEC64:
    case ZYDIS_MNEMONIC_XSAVEOPT: case ZYDIS_MNEMONIC_XSAVEOPT64: case ZYDIS_MNEMONIC_XRSTOR: case ZYDIS_MNEMONIC_XRSTOR64:
        return !d->same_components;
    default:
        return false;
    }
}

/* Whether an opcode of theirs may begin here. */
static bool suspicious(const uint8_t *p)
{
    if (likely(p[0] != 0x0f))
        return p[0] == 0xcd && p[1] == 0x80;
    switch (p[1]) {
    case 0x00: case 0x01: case 0x02: case 0x03: case 0x34: case 0xa2: case 0xae: case 0xc7:
        return true;
    default:
        return false;
    }
}

/*
 * Decoding that starts so many bytes before an instruction comes to its beginning, almost whatever the first byte was; and what it says of
 * fewer bytes is worth nothing.
 */
#define SYNC 64u
#define SYNC_MIN 24u

/*
 * Whether one of those instructions is in the page. Not seen are those that begin it or cross its end, code that is
 * written later, and code that is jumped into askew: what they show then is the host's.
 */
static bool page_runs_wrongly(const struct direct *d, const struct direct_space *s, const uint8_t *bytes)
{
    unsigned at = 0, began = 0; /* an instruction begins at the first, found by decoding from the second on */

    for (unsigned i = SYNC_MIN; i < GUEST_PAGE_SIZE - 2; i++) {
        if (likely(!suspicious(bytes + i)))
            continue;
        if (i > at + SYNC)
            at = began = i - SYNC;
        while (at <= i) {
            struct x86_insn insn;
            bool gp;

            if (x86_decode(&insn, bytes + at, MIN(GUEST_PAGE_SIZE - at, X86_MAX_INSN), 8, &gp) < 0) {
                began = ++at;
                continue;
            }
            if (at + insn.length > i && i - began >= SYNC_MIN && runs_wrongly(d, s, &insn))
                return true;
            at += insn.length;
        }
    }
    return false;
}

/* ---- the shadow ---- */

/* Whether writes to the page may pass unseen; if so others know it (memory.h). */
static bool may_write(const struct memory *m, _Atomic uint8_t *flags)
{
    uint8_t f = atomic_load(flags);

    if ((f & (PAGE_CODE | PAGE_SAVE)) || (!(f & PAGE_DIRTY) && atomic_load(&m->dirty_logging)))
        return false;
    if (!(f & PAGE_WRITABLE))
        f = atomic_fetch_or(flags, PAGE_WRITABLE);
    return !(f & PAGE_CODE);
}

/*
 * What may be mapped at va without the guest's noticing: what its page tables allow with accessed and dirty bits as they are.
 * known: what is mapped there now, or NULL.
 */
static struct page look_up(struct direct *d, struct direct_space *s, gva_t va, const struct page *known)
{
    struct x86_cpu *cpu = cpu_of(d);
    struct page p = { .va = va & GUEST_PAGE_MASK };
    struct memory_region *r;
    struct x86_ready ready;
    uint64_t offset;

    if (va < SANDBOX_BEGIN || va >= SANDBOX_END || !x86_walk_ready(cpu, va, &ready))
        return p;
    r = memory_find(cpu->mem, ready.gpa);
    if (!r || r->fd < 0 || (ready.gpa & GUEST_PAGE_MASK) == cpu->apic_base)
        return p;
    offset = (ready.gpa & GUEST_PAGE_MASK) - r->base;
    p.place = offset | (uint64_t)(r - cpu->mem->region);
    p.va |= CAN_READ | (ready.page_size == GUEST_PAGE_SIZE ? 0 : ready.page_size == GIB(1) ? HUGE : LARGE);
    /* Also if nothing else of it has changed: how it is flushed has. */
    s->large |= (p.va & LARGE) != 0;
    s->huge |= (p.va & HUGE) != 0;
    if (ready.writable && may_write(cpu->mem, &r->flags[offset >> GUEST_PAGE_SHIFT]))
        p.va |= CAN_WRITE;
    if (ready.executable &&
        ((known && known->place == p.place && (known->va & CAN_EXECUTE)) || !page_runs_wrongly(d, s, r->host + offset)))
        p.va |= CAN_EXECUTE;
    return p;
}

/* Brings the sandbox to what was looked up. False: that cannot be. */
static bool show(struct direct *d, struct direct_space *s, struct page *e, const struct page *p)
{
    bool done;

    if (!(p->va & CANS))
        done = sandbox_unmap(s->box, p->va & GUEST_PAGE_MASK, GUEST_PAGE_SIZE);
    else
        done = sandbox_map(s->box, p->va & GUEST_PAGE_MASK, GUEST_PAGE_SIZE, (unsigned)(p->place & ~GUEST_PAGE_MASK),
                           p->place & GUEST_PAGE_MASK, (int)(p->va & CANS));
    if (!done)
        return false;
    d->mapped++;
    *e = *p;
    return true;
}

/* A page that is mapped may not be as the guest has it any more. What it may do in addition, it gets when it asks. */
static void check_page(struct direct *d, struct direct_space *s, struct page *e)
{
    struct page p;

    if (!(e->va & CANS))
        return;
    p = look_up(d, s, e->va & GUEST_PAGE_MASK, e);
    if (p.place != e->place || (e->va & CANS & ~p.va))
        show(d, s, e, &p);
}

static uint64_t root_now(struct direct *d)
{
    struct x86_cpu *cpu = cpu_of(d);

    return cpu->s.cr3 & ((1ull << cpu->phys_bits) - 1) & GUEST_PAGE_MASK;
}

/* Makes the sandbox agree with what happened since user code ran in it. */
static void catch_up(struct direct *d, struct direct_space *s)
{
    uint64_t root = root_now(d);

    if (s->root != root || s->pages + 2 * AROUND_LARGE > PAGES) {
        forget_pages(s);
        s->root = root;
        return;
    }
    for (unsigned i = 0; s->stale && i < s->pages; i++)
        check_page(d, s, &s->page[i]);
    for (unsigned i = 0; !s->stale && i < s->pendings; i++) {
        gva_t size = s->large ? MIB(2) : GUEST_PAGE_SIZE, first = align_down(s->pending[i], size);

        for (gva_t at = first; at < first + size; at += GUEST_PAGE_SIZE) {
            struct page *e = page_entry(s, at, false);

            if (e)
                check_page(d, s, e);
        }
    }
    if (s->writes_dropped && !s->stale)
        for (unsigned i = 0; i < s->pages; i++)
            if (s->page[i].va & CAN_WRITE)
                check_page(d, s, &s->page[i]);
    s->stale = s->writes_dropped = false;
    s->pendings = 0;
}

/* Maps the page at va and those around it that the guest has used. True if that gives the page rights that it had not. */
static bool grant(struct direct *d, struct direct_space *s, gva_t va)
{
    const gva_t page = va & GUEST_PAGE_MASK;
    struct page p = look_up(d, s, page, page_entry(s, page, false));
    gva_t size = (gva_t)(p.va & (LARGE | HUGE) ? AROUND_LARGE : AROUND) * GUEST_PAGE_SIZE, first = align_down(va, size);
    bool granted = false;

    if (!(p.va & CANS) || s->pages + AROUND_LARGE > PAGES)      /* the next catch_up() makes room */
        return false;
    for (gva_t at = first; at < first + size; at += GUEST_PAGE_SIZE) {
        struct page *e = page_entry(s, at, false);

        p = look_up(d, s, at, e);
        if (!(p.va & CANS) || (e && e->place == p.place && !(p.va & CANS & ~e->va)))
            continue;
        if (!e)
            e = page_entry(s, at, true);
        if (show(d, s, e, &p) && at == page)
            granted = true;
    }
    return granted;
}

/* Whether the fetch at address, where RIP is, failed because the page's code must not run natively. */
static bool runs_wrongly_at(struct direct *d, struct direct_space *s, gva_t address)
{
    const struct page *e = page_entry(s, address & GUEST_PAGE_MASK, false);
    struct x86_ready ready;

    return sandbox_regs(s->box)->rip == address && e && (e->va & CANS) && !(e->va & CAN_EXECUTE) &&
           x86_walk_ready(cpu_of(d), address, &ready) && ready.executable;
}

void direct_flushed(struct translator *t, const struct x86_tlb_space *space, gva_t va, bool all)
{
    struct direct_space *s;

    if (!t->direct)
        return;
    s = &t->direct->space[space - t->it.cpu.tlbs->space];
    /* INVLPG for one address drops all of a large page. */
    va = align_down(va, s->large ? MIB(2) : GUEST_PAGE_SIZE);
    if (s->stale || !s->pages || (!all && s->pendings && s->pending[s->pendings - 1] == va))
        return;
    if (all || s->huge || s->pendings == PENDING)
        s->stale = true;
    else
        s->pending[s->pendings++] = va;
}

void direct_writes_dropped(struct translator *t, const void *host_page)
{
    for (unsigned i = 0; t->direct && i < X86_TLB_SPACES; i++)
        t->direct->space[i].writes_dropped = true;
}

/* ---- processors ---- */

/* µs that switching to a sandbox and back costs. */
#define SWITCH 6u
#define SWITCH_CPUID 30u

static unsigned switch_cost(const struct direct_space *s) { return s->cpuid_stops ? SWITCH_CPUID : SWITCH; }

/*
 * The vCPU's thread and the sandbox take turns, so they belong on one processor: to wake an idle one costs twenty times as much as to
 * switch. The scheduler does not see that, so both are bound to one, and to the next if they do not get enough of it.
 */
static void bind_thread(struct direct *d, int processor)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    CPU_SET(processor, &set);
    if (sched_setaffinity(0, sizeof(set), &set) == 0) {
        d->bound = true;
        d->processor = processor;
    }
}

static void unbind_thread(struct direct *d)
{
    if (d->bound)
        sched_setaffinity(0, sizeof(d->allowed), &d->allowed);
    d->bound = false;
}

static void bind(struct direct *d, struct direct_space *s)
{
    cpu_set_t set;

    if (!d->bound) {
        int now = sched_getcpu();

        if (CPU_COUNT(&d->allowed) < 2 || now < 0 || now >= CPU_SETSIZE)
            return;
        bind_thread(d, now);
    }
    if (!d->bound || s->processor == d->processor)
        return;
    CPU_ZERO(&set);
    CPU_SET(d->processor, &set);
    if (sched_setaffinity(sandbox_pid(s->box), sizeof(set), &set) == 0)
        s->processor = d->processor;
    d->watched_ran = d->watched_runs = 0;
    d->watched_time = sandbox_time(s->box);
}

/* Every 20 ms: has it got the processor that it ran on, or does somebody else have half of it? */
static void judge_processor(struct direct *d, struct direct_space *s)
{
    uint64_t ran = d->watched_ran * 1000 / d->tick, had;
    int next;

    if (ran < 20000000)
        return;
    had = sandbox_time(s->box) - d->watched_time;
    d->watched_time += had;
    had += d->watched_runs * switch_cost(s) * 1000;
    d->watched_ran = d->watched_runs = 0;
    /* By lot, or two vCPUs on one processor would move together. */
    if (!d->bound || had > ran - ran / 4 || (__rdtsc() >> 5 & 1))
        return;
    for (next = (d->processor + 1) % CPU_SETSIZE; !CPU_ISSET(next, &d->allowed); next = (next + 1) % CPU_SETSIZE)
        ;
    bind_thread(d, next);
    bind(d, s);
}

/* ---- whether it is worth it ---- */

#define STAY 20u                /* µs that user code by translation is to run between entries of the kernel, on average, */
#define TRIAL 4000u             /* …after so many in all */
#define WINDOW 256u             /* stops that are judged together */
#define WORTH 4u                /* µs natively for each of them, without the switch */
#define DETOURS_MAX 500u        /* a program asks for the processor's features when it starts, and that is that */
#define DETOUR 4u               /* stops that an excursion of the interpreter's counts as */
#define BACKOFF_MIN 50000u
#define BACKOFF_MAX 8000000u
#define NOTE 10000u             /* µs between two looks at a sandbox's processor time */

static struct direct_space *space_now(struct direct *d)
{
    struct x86_cpu *cpu = cpu_of(d);

    return &d->space[cpu->space - cpu->tlbs->space];
}

static void demote(struct direct *d, struct direct_space *s, uint64_t now, uint64_t backoff)
{
    s->backoff = backoff;
    s->not_before = now + backoff * d->tick;
    s->ran = s->stops = s->detours = 0;
    d->t->native_space = NULL;
    d->demotions++;
}

/* After a stop. first: for the first touch of a page, which says nothing of what follows. */
static void judge(struct direct *d, struct direct_space *s, uint64_t ran, uint64_t now, bool first)
{
    d->ticks += ran;
    d->watched_ran += ran;
    d->watched_runs++;
    s->ran += ran - MIN(ran, switch_cost(s) * d->tick);
    if (first || d->always || ++s->stops < WINDOW)
        return;
    if (s->ran < (uint64_t)s->stops * WORTH * d->tick) {
        if (s->detours * DETOUR > s->stops / 2 && !s->lingers) {
            s->all_detours += s->detours;
            s->lingers = s->all_detours > DETOURS_MAX;
            s->ran = s->stops = s->detours = 0;
            return;
        }
        demote(d, s, now, MIN(MAX(s->backoff * 2, BACKOFF_MIN), BACKOFF_MAX));
        return;
    }
    if (s->backoff)
        s->backoff /= 2;
    s->ran = s->stops = s->detours = 0;
}

/*
 * Whether vector code does natively what it does in the guest, where it uses what the guest's processor has. Of a model with less than
 * the host, such as x86-64-v3, programs know by CPUID what they may not use; that would work, but is lost when they stop.
 */
static bool vectors_agree(const struct x86_cpu *cpu)
{
    const uint64_t has = cpu->model->xcr0_allowed, avx = 1u << XSTATE_SSE | 1u << XSTATE_AVX, avx512 = 7u << XSTATE_OPMASK;
    unsigned missing = (has & avx) != avx ? 12 : (has & avx512) != avx512 ? 8 : 0;    /* of simd_trap */

    return !(cpu->simd_trap & ~missing) && (!(has & ~3ull) || cpu->s.xcr0 == has);
}

/* Code that can run natively as things stand. */
static bool eligible(const struct direct *d)
{
    const struct x86_cpu *cpu = &d->t->it.cpu;
    const struct x86_state *s = &cpu->s;
    const uint64_t flags = RFLAGS_TF | RFLAGS_IF | RFLAGS_IOPL | RFLAGS_NT | RFLAGS_VM | RFLAGS_AC | RFLAGS_VIF | RFLAGS_VIP | RFLAGS_ID;

    if (cpu->cpl != 3 || cpu->code_size != 8 || (s->rflags & flags) != RFLAGS_IF || s->interrupt_shadow || !vectors_agree(cpu) ||
        (s->dr7 & 0xff) || (s->cr4 & (CR4_TSD | CR4_LA57)) || !(s->efer & EFER_SCE))
        return false;
    /* The selectors that a sandbox has, which are Linux'. */
    if (s->seg[SEG_CS].selector != 0x33 || s->seg[SEG_SS].selector != 0x2b)
        return false;
    for (unsigned i = 0; i < 6; i++)
        if (i != SEG_CS && i != SEG_SS && (s->seg[i].selector || s->seg[i].base >= (i >= SEG_FS ? SANDBOX_END : 1)))
            return false;
    return s->rip < SANDBOX_END;
}

static bool wanted(struct direct *d, uint64_t now)
{
    struct direct_space *s = space_now(d);

    if (d->always)
        return eligible(d);
    return s->average > STAY * d->tick && s->total > TRIAL * d->tick && now >= s->not_before && eligible(d);
}

void direct_entered(struct translator *t, bool user)
{
    struct direct *d = t->direct;
    struct direct_space *s = space_now(d);
    uint64_t now = __rdtsc();

    if (user) {
        uint64_t root = root_now(d);

        if (s->judged_root != root) {
            s->judged_root = root;
            s->total = s->average = s->backoff = s->not_before = 0;
            s->all_detours = 0;
            s->ran = s->stops = s->detours = 0;
        }
        d->entered = now;
        d->t->native_space = wanted(d, now) ? t->it.cpu.space : NULL;
        if (!d->t->native_space)
            unbind_thread(d);
    } else if (d->entered) {
        uint64_t stay = now - d->entered;

        d->entered = 0;
        s->total += stay;
        s->average += (int64_t)(stay - s->average) / 8;
    }
}

/*
 * The interpreter has been busy in one page that must not run natively. If that is because of CPUID, switching may become dearer
 * instead; else the translator is faster.
 */
void direct_lingers(struct translator *t)
{
    struct direct_space *s = space_now(t->direct);

    if (s->cpuid_stops || s->lingers)
        demote(t->direct, s, __rdtsc(), MIN(MAX(s->backoff * 2, BACKOFF_MIN), BACKOFF_MAX));
    s->lingers = true;
}

/* ---- in and out ---- */

/* Other threads cannot ask the sandbox itself, which comes and goes. */
static void note_time(struct direct *d, struct direct_space *s, uint64_t now)
{
    uint64_t ns = s->box ? sandbox_time(s->box) : 0;

    if (ns > s->cpu_ns) {
        atomic_fetch_add_explicit(&d->cpu_ns, ns - s->cpu_ns, memory_order_relaxed);
        s->cpu_ns = ns;
    }
    s->noted = now;
}

static void drop_box(struct direct *d, struct direct_space *s)
{
    note_time(d, s, 0);
    sandbox_destroy(s->box);
    s->box = NULL;
    s->pages = 0;
    s->touched = 0;
}

static bool make_box(struct direct *d, struct direct_space *s)
{
    const struct memory *m = cpu_of(d)->mem;
    int err;

    for (unsigned i = 0; i < m->regions; i++) {
        if (m->region[i].fd < 0)
            return false;       /* private to this process */
        if (s->box && d->file[i] != m->region[i].fd)
            drop_box(d, s);     /* memory is another one since the machine was reset */
    }
    if (s->box)
        return true;
    if (!s->page) {
        s->page = calloc(PAGES, sizeof(*s->page));
        s->hash = calloc(1u << HASH_BITS, sizeof(*s->hash));
        if (!s->page || !s->hash) {
            free(s->page);
            free(s->hash);
            s->page = NULL;
            return false;
        }
    }
    for (unsigned i = 0; i < m->regions; i++)
        d->file[i] = m->region[i].fd;
    err = sandbox_create(&s->box, d->file, m->regions);
    if (err) {
        log_debug("no sandbox for vCPU %u: %s", cpu_of(d)->index, strerror(-err));
        return false;
    }
    forget_pages(s);
    s->root = 0;
    s->processor = -1;
    s->cpu_ns = s->noted = 0;
    d->boxes++;
    return true;
}

/* The flags that user code can change, arithmetic ones apart. */
#define USER_FLAGS (RFLAGS_TF | RFLAGS_DF | RFLAGS_NT | RFLAGS_AC | RFLAGS_ID)

static void put_registers(struct x86_cpu *cpu, struct user_regs_struct *r)
{
    const uint64_t *g = cpu->s.gpr;

    *r = (struct user_regs_struct){
        .rax = g[RAX], .rcx = g[RCX], .rdx = g[RDX], .rbx = g[RBX], .rsp = g[RSP], .rbp = g[RBP], .rsi = g[RSI], .rdi = g[RDI],
        .r8 = g[8], .r9 = g[9], .r10 = g[10], .r11 = g[11], .r12 = g[12], .r13 = g[13], .r14 = g[14], .r15 = g[15],
        .rip = cpu->s.rip, .eflags = x86_rflags(cpu) & (RFLAGS_ARITH | RFLAGS_DF), .cs = 0x33, .ss = 0x2b,
        .fs_base = cpu->s.seg[SEG_FS].base, .gs_base = cpu->s.seg[SEG_GS].base,
    };
}

static void get_registers(struct x86_cpu *cpu, const struct user_regs_struct *r)
{
    uint64_t *g = cpu->s.gpr;

    g[RAX] = r->rax, g[RCX] = r->rcx, g[RDX] = r->rdx, g[RBX] = r->rbx;
    g[RSP] = r->rsp, g[RBP] = r->rbp, g[RSI] = r->rsi, g[RDI] = r->rdi;
    g[8] = r->r8, g[9] = r->r9, g[10] = r->r10, g[11] = r->r11;
    g[12] = r->r12, g[13] = r->r13, g[14] = r->r14, g[15] = r->r15;
    cpu->s.rip = r->rip;
    cpu->s.seg[SEG_FS].base = r->fs_base;
    cpu->s.seg[SEG_GS].base = r->gs_base;
    x86_set_rflags(cpu, (x86_rflags(cpu) & ~(uint64_t)(RFLAGS_ARITH | USER_FLAGS)) | (r->eflags & (RFLAGS_ARITH | USER_FLAGS)));
}

/* All but what is there already. */
static int put_vectors(struct x86_cpu *cpu, struct sandbox *box)
{
    uint8_t image[XSAVE_MAX_SIZE] __attribute__((aligned(64)));
    size_t size;
    uint8_t *there = sandbox_vectors(box, &size);

    x86_fpu_to_image(&cpu->s.fpu, cpu->model->xcr0_allowed, image);
    if (memcmp(image, there, MIN(size, sizeof(image))) == 0)
        return 0;
    memset(there, 0, size);
    memcpy(there, image, MIN(size, sizeof(image)));
    return sandbox_set_vectors(box);
}

/* The byte of guest code at va, or -1. */
static int code_byte(struct x86_cpu *cpu, gva_t va)
{
    const uint8_t *page;
    gpa_t gpa;

    if (x86_walk_quiet(cpu, va, &gpa) < 0)
        return -1;
    page = memory_page(cpu->mem, gpa, NULL);
    return page ? page[va & ~GUEST_PAGE_MASK] : -1;
}

static bool follows(struct x86_cpu *cpu, uint64_t rip, int first, int second)
{
    return code_byte(cpu, rip - 2) == first && code_byte(cpu, rip - 1) == second;
}

/*
 * RIP is behind an instruction that is to enter the guest's kernel: back to it, for the interpreter. But another vCPU may have taken
 * it away since it was executed, with the page or by writing over it; then what it does is done here.
 */
static enum interp_user enter_kernel(struct direct *d, struct direct_space *s, enum sandbox_stop stop)
{
    struct x86_cpu *cpu = cpu_of(d);
    int last = code_byte(cpu, cpu->s.rip - 1);
    const struct page *e;

    if (stop == SANDBOX_SYSCALL ? follows(cpu, cpu->s.rip, 0x0f, 0x05) || follows(cpu, cpu->s.rip, 0xcd, 0x80)
                                : last == 0xcc || last == 0xf1 || follows(cpu, cpu->s.rip, 0xcd, 3)) {
        cpu->s.rip -= last == 0xcc || last == 0xf1 ? 1 : 2;
        d->t->interpret_once = stop == SANDBOX_SYSCALL;
        return stop == SANDBOX_SYSCALL ? INTERP_USER_BLOCK : INTERP_USER_STEP;
    }
    e = page_entry(s, (cpu->s.rip - 1) & GUEST_PAGE_MASK, false);
    if (!e || !(e->va & CAN_EXECUTE))
        return INTERP_USER_STEP;        /* in the page of ours: nothing is there in the guest */
    cpu->next_rip = cpu->s.rip;
    if (stop == SANDBOX_BREAKPOINT)
        x86_software_interrupt(cpu, X86_BP);
    else if (cpu->s.gpr[RCX] == cpu->s.rip)
        x86_insn_syscall(cpu, NULL);
    else
        x86_software_interrupt(cpu, 0x80);
    cpu->s.rip = cpu->next_rip;
    return INTERP_USER_AGAIN;
}

/*
 * User code loaded segment registers, natively from the host's table, where the flat segments have the numbers that they have in
 * Linux guests. Raises what the guest's table says. A far transfer to 32-bit code leads to the interpreter.
 */
static void get_segments(struct x86_cpu *cpu, const struct user_regs_struct *r)
{
    uint64_t descriptor;

    if (likely(r->cs == 0x33 && r->ss == 0x2b && !(r->ds | r->es | r->fs | r->gs)))
        return;
    if (r->ds)
        x86_load_segment(cpu, SEG_DS, (uint16_t)r->ds);
    if (r->es)
        x86_load_segment(cpu, SEG_ES, (uint16_t)r->es);
    if (r->fs)
        x86_load_segment(cpu, SEG_FS, (uint16_t)r->fs);
    if (r->gs)
        x86_load_segment(cpu, SEG_GS, (uint16_t)r->gs);
    if (r->ss != 0x2b)
        x86_load_segment(cpu, SEG_SS, (uint16_t)r->ss);
    if (r->cs != 0x33) {
        if (!x86_read_descriptor(cpu, (unsigned)r->cs, &descriptor) || !desc_is_code(descriptor))
            x86_raise_error(cpu, X86_GP, (uint32_t)r->cs & 0xfffc);
        cpu->s.seg[SEG_CS] = x86_seg_from_desc((uint16_t)r->cs, descriptor);
        x86_update_mode(cpu);
    }
}

/* Guest state comes home. */
static bool take_back(struct direct *d, struct direct_space *s)
{
    struct x86_cpu *cpu = cpu_of(d);
    size_t size;

    if (sandbox_get_vectors(s->box) < 0)
        return false;
    x86_fpu_from_image(&cpu->s.fpu, sandbox_vectors(s->box, &size));
    get_registers(cpu, sandbox_regs(s->box));
    return true;
}

/* Whether the kernel would take the registers again: it refuses some that programs can have. */
static bool can_go_on(const struct user_regs_struct *r)
{
    return r->cs == 0x33 && r->ss == 0x2b && !(r->ds | r->es | r->fs | r->gs) && r->fs_base < SANDBOX_END && r->gs_base < SANDBOX_END;
}

static enum interp_user lost(struct direct *d)
{
    log_error("vCPU %u: the process that ran the guest's user code was killed, and what it had computed is lost; "
              "restart the machine from its last snapshot", cpu_of(d)->index);
    d->t->diverged = true;
    x86_request(cpu_of(d), REQUEST_EXIT);
    return INTERP_USER_AGAIN;
}

/* Not here for a long time. */
static enum interp_user give_up(struct direct *d, struct direct_space *s)
{
    drop_box(d, s);
    demote(d, s, __rdtsc(), BACKOFF_MAX);
    return INTERP_USER_BLOCK;
}

enum interp_user direct_run(struct interp *it)
{
    struct translator *t = (struct translator *)it;
    struct direct *d = t->direct;
    struct x86_cpu *cpu = &it->cpu;
    struct direct_space *s;
    enum sandbox_stop stop;
    bool ran = false;
    int err;

    if (d->t->native_space != cpu->space || t->interpret_once)
        return INTERP_USER_BLOCK;
    if (!eligible(d) || !memory_complete(cpu->mem)) {
        d->t->native_space = NULL;
        return INTERP_USER_BLOCK;
    }
    s = space_now(d);
    if (!make_box(d, s))
        return give_up(d, s);
    bind(d, s);
    catch_up(d, s);
    if (s->lingers && !s->cpuid_stops)
        s->cpuid_stops = sandbox_stop_at_cpuid(s->box, true) == 0;
    if (s->touched)
        grant(d, s, s->touched);
    s->touched = 0;
    err = sandbox_commit(s->box);
    if (err == -ENOMEM && s->pages) {
        forget_pages(s);        /* more mappings than the kernel gives it */
        err = sandbox_commit(s->box);
    }
    if (err < 0 || put_vectors(cpu, s->box) < 0)
        return give_up(d, s);
    put_registers(cpu, sandbox_regs(s->box));
    d->runs++;
    d->entered = 0;             /* no stay of translated code */
    for (;;) {
        uint64_t before, now;
        gva_t address = 0;

        /* Either we see the request, or who makes it sees that it has to stop the sandbox. */
        atomic_store(&cpu->native, sandbox_pid(s->box));
        if (atomic_load(&cpu->request)) {
            atomic_store(&cpu->native, 0);
            stop = SANDBOX_INTERRUPTED;
            break;
        }
        before = __rdtsc();
        stop = sandbox_run(s->box, &address);
        now = __rdtsc();
        atomic_store(&cpu->native, 0);
        if (stop == SANDBOX_GONE)
            return lost(d);
        if (stop == SANDBOX_DEAD || stop == SANDBOX_REFUSED) {
            if (!ran)
                return give_up(d, s);
            /* It is another one's fault; or the code's, which loaded what it cannot be continued with from outside. */
            stop = SANDBOX_INTERRUPTED;
            break;
        }
        ran = true;
        judge(d, s, now - before, now, stop == SANDBOX_PAGE_FAULT && !page_entry(s, address & GUEST_PAGE_MASK, false));
        judge_processor(d, s);
        if (now - s->noted > NOTE * d->tick)
            note_time(d, s, now);
        if (stop == SANDBOX_PAGE_FAULT) {
            d->faults++;
            s->touched = address;
            if (grant(d, s, address)) {
                s->touched = 0;
                err = sandbox_commit(s->box);
                if (err == 0 && t->native_space && can_go_on(sandbox_regs(s->box)))
                    continue;
                if (err)
                    forget_pages(s);
                stop = SANDBOX_INTERRUPTED;
            } else if (runs_wrongly_at(d, s, address)) {
                s->touched = 0;
                t->detour = address & GUEST_PAGE_MASK;
                t->detour_blocks = 0;
                s->stops += DETOUR;
                s->detours++;
            }
        } else if (stop == SANDBOX_INTERRUPTED && !atomic_load(&cpu->request) && can_go_on(sandbox_regs(s->box))) {
            continue;
        }
        break;
    }
    if (!ran)
        return INTERP_USER_AGAIN;
    if (!take_back(d, s))
        return lost(d);
    get_segments(cpu, sandbox_regs(s->box));
    switch (stop) {
    case SANDBOX_SYSCALL:
        cpu->s.gpr[RAX] = sandbox_regs(s->box)->orig_rax;
        return enter_kernel(d, s, stop);
    case SANDBOX_BREAKPOINT:
        return enter_kernel(d, s, stop);
    case SANDBOX_STEPPED:
        cpu->s.dr6 |= 0x4000;
        x86_raise(cpu, X86_DB);
    case SANDBOX_INTERRUPTED:
        return INTERP_USER_AGAIN;
    default:
        break;
    }
    if (t->detour != NO_DETOUR)
        return INTERP_USER_BLOCK;
    d->steps++;
    return INTERP_USER_STEP;
}

/* ---- life ---- */

static uint64_t host_xcr0(void)
{
    uint32_t low, high;

    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low | (uint64_t)high << 32;
}

int direct_create(struct translator *t)
{
    const struct sandbox_abilities *a;
    struct direct *d;

    if (t->options.direct == TRANSLATE_DIRECT_OFF || t->options.lockstep || t->options.count || t->tracing || !t->options.tier)
        return 0;
    a = sandbox_abilities();
    if (!a->usable) {
        log_debug("no direct execution: %s", a->text);
        return 0;
    }
    d = calloc(1, sizeof(*d));
    if (!d)
        return -ENOMEM;
    d->t = t;
    d->always = t->options.direct == TRANSLATE_DIRECT_ALWAYS;
    d->same_components = host_xcr0() == t->it.cpu.model->xcr0_allowed;
    d->tick = MAX(tsc_frequency_hz() / 1000000, 1ul);
    t->direct = d;
    t->it.run_user = direct_run;
    return 0;
}

void direct_destroy(struct translator *t)
{
    struct direct *d = t->direct;

    if (!d)
        return;
    for (unsigned i = 0; i < X86_TLB_SPACES; i++) {
        drop_box(d, &d->space[i]);
        free(d->space[i].page);
        free(d->space[i].hash);
    }
    free(d);
    t->direct = NULL;
}

void direct_attach(struct translator *t)
{
    struct direct *d = t->direct;

    if (!d)
        return;
    /* Sandboxes obey the thread that made them, and die with it. */
    if (d->thread != gettid())
        for (unsigned i = 0; i < X86_TLB_SPACES; i++)
            drop_box(d, &d->space[i]);
    d->thread = gettid();
    d->t->native_space = NULL;
    d->t->user_mode = false;    /* what user code it stands in is entered anew */
    CPU_ZERO(&d->allowed);
    sched_getaffinity(0, sizeof(d->allowed), &d->allowed);
}

void direct_detach(struct translator *t)
{
    struct direct *d = t->direct;

    if (!d)
        return;
    unbind_thread(d);
    for (unsigned i = 0; i < X86_TLB_SPACES; i++)
        note_time(d, &d->space[i], 0);
}

void direct_counters(const struct translator *t, struct engine_counters *c)
{
    const struct direct *d = t->direct;

    if (!d)
        return;
    c->native_runs = d->runs;
    c->native_faults = d->faults;
    c->native_pages = d->mapped;
    c->native_steps = d->steps;
    c->native_demotions = d->demotions;
    c->native_sandboxes = d->boxes;
    c->native_cpu_ns = atomic_load_explicit(&d->cpu_ns, memory_order_relaxed);
    c->native_ns = d->ticks * 1000 / d->tick;
}
