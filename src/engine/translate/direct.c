/*
 * Direct execution of user code: the way in and out of a sandbox.
 *
 * See direct.h, and docs/direct.md for the reasons.
 */
#include <errno.h>
#include <stdlib.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>
#include <x86intrin.h>

#include "base/log.h"
#include "device/machine.h"
#include "engine/translate/direct_internal.h"
#include "isa/x86/cpuid.h"
#include "isa/x86/mmu.h"
#include "isa/x86/segment.h"
#include "isa/x86/transfer.h"
#include "isa/x86/xsave.h"

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

bool direct_eligible(const struct direct *d)
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

#define NOTE 10000u             /* µs between two looks at a sandbox's processor time */

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

/*
 * Who makes a request and who runs a sandbox meet like this: the one sets the request, then looks whether one runs; the other says that
 * one runs, then looks for a request. So one of them sees the other, or both do. And a handle that somebody has seen here stays
 * good until he has done with it, for a sandbox is destroyed only when it is not named here and nobody is in between.
 */
void direct_requested(struct translator *t)
{
    struct direct *d = t->direct;
    int handle;

    if (!d || atomic_load(&d->running) < 0)
        return;
    atomic_fetch_add(&d->interrupting, 1);
    handle = atomic_load(&d->running);
    if (handle >= 0)
        sandbox_interrupt(handle);
    atomic_fetch_sub(&d->interrupting, 1);
}

/* The sandbox does not run. */
static void drop_box(struct direct *d, struct direct_space *s)
{
    while (atomic_load(&d->interrupting))       /* for the time of a system call */
        sched_yield();
    note_time(d, s, 0);
    sandbox_destroy(s->box);
    s->box = NULL;
    s->pages = 0;
    s->touched = 0;
}

static bool make_box(struct direct *d, struct direct_space *s)
{
    const struct memory *m = direct_cpu(d)->mem;
    int files[MEMORY_MAX_REGIONS], err;

    for (unsigned i = 0; i < m->regions; i++) {
        files[i] = m->region[i].fd;
        if (files[i] < 0)
            return false;       /* private to this process */
    }
    if (s->box)
        return true;
    if (!s->page && !direct_make_tables(s))
        return false;
    err = sandbox_create(&s->box, files, m->regions);
    if (err) {
        s->box = NULL;
        if (!d->told)
            log_warn("vCPU %u: user code is translated, which is slower, until a process can be made to run it: %s", direct_cpu(d)->index, strerror(-err));
        d->told = true;
        return false;
    }
    direct_forget(s);
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
    struct x86_cpu *cpu = direct_cpu(d);
    int last = code_byte(cpu, cpu->s.rip - 1);
    const struct direct_page *e;

    if (stop == SANDBOX_SYSCALL ? follows(cpu, cpu->s.rip, 0x0f, 0x05) || follows(cpu, cpu->s.rip, 0xcd, 0x80)
                                : last == 0xcc || last == 0xf1 || follows(cpu, cpu->s.rip, 0xcd, 3)) {
        cpu->s.rip -= last == 0xcc || last == 0xf1 ? 1 : 2;
        d->t->interpret_once = stop == SANDBOX_SYSCALL;
        return stop == SANDBOX_SYSCALL ? INTERP_USER_BLOCK : INTERP_USER_STEP;
    }
    e = direct_page(s, (cpu->s.rip - 1) & GUEST_PAGE_MASK, false);
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
    struct x86_cpu *cpu = direct_cpu(d);
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
              "restart the machine from its last snapshot", direct_cpu(d)->index);
    d->t->lost = true;
    x86_request(direct_cpu(d), REQUEST_EXIT);
    return INTERP_USER_AGAIN;
}

/* Not here for a long time. */
static enum interp_user give_up(struct direct *d, struct direct_space *s)
{
    drop_box(d, s);
    direct_demote(d, s, __rdtsc(), DIRECT_BACKOFF_MAX);
    return INTERP_USER_BLOCK;
}

/* Makes the sandbox what the guest is: memory and registers. False: that cannot be. */
static bool prepare(struct direct *d, struct direct_space *s)
{
    struct x86_cpu *cpu = direct_cpu(d);
    int err;

    if (!make_box(d, s))
        return false;
    direct_bind(d, s);
    direct_catch_up(d, s);
    if (s->lingers && !s->cpuid_stops) {
        s->cpuid_stops = sandbox_stop_at_cpuid(s->box, true) == 0;
        s->switch_cost = 0;
    }
    if (s->touched)
        direct_grant(d, s, s->touched);
    s->touched = 0;
    err = sandbox_commit(s->box);
    if (err == -ENOMEM && s->pages) {
        direct_forget_all(d, s);        /* more mappings than the kernel gives it */
        err = sandbox_commit(s->box);
    }
    if (err < 0 || put_vectors(cpu, s->box) < 0)
        return false;
    put_registers(cpu, sandbox_regs(s->box));
    return true;
}

/* Runs the sandbox until it stops by itself or for a request; address is for page faults. */
static enum sandbox_stop run_once(struct direct *d, struct direct_space *s, gva_t *address)
{
    enum sandbox_stop stop = SANDBOX_INTERRUPTED;
    uint64_t before = __rdtsc(), now;

    /* See direct_requested(). */
    atomic_store(&d->running, sandbox_handle(s->box));
    if (atomic_load(&direct_cpu(d)->request)) {
        atomic_store(&d->running, -1);
        return stop;
    }
    stop = sandbox_run(s->box, address);
    atomic_store(&d->running, -1);
    if (stop == SANDBOX_GONE || stop == SANDBOX_DEAD || stop == SANDBOX_REFUSED)
        return stop;
    now = __rdtsc();
    d->ran_now = true;
    direct_judge(d, s, now - before, now, stop == SANDBOX_PAGE_FAULT && !direct_page(s, *address & GUEST_PAGE_MASK, false));
    direct_judge_processor(d, s);
    if (now - s->noted > NOTE * d->tick)
        note_time(d, s, now);
    return stop;
}

/* A page fault: true if only the sandbox lacked the page, and has it now. Else it is the guest's, or a detour begins. */
static bool supply_page(struct direct *d, struct direct_space *s, gva_t address)
{
    d->faults++;
    s->touched = address;
    if (direct_grant(d, s, address)) {
        s->touched = 0;
        if (sandbox_commit(s->box) == 0)
            return true;
        direct_forget_all(d, s);        /* the interpreter goes on for one instruction, so something goes on */
    } else if (direct_runs_wrongly_at(d, s, address)) {
        s->touched = 0;
        d->t->detour = address & GUEST_PAGE_MASK;
        d->t->detour_blocks = 0;
        direct_judge_detour(s);
    }
    return false;
}

/* Runs it as long as it stops for nothing that concerns the guest. */
static enum sandbox_stop stay(struct direct *d, struct direct_space *s)
{
    for (;;) {
        gva_t address = 0;
        enum sandbox_stop stop = run_once(d, s, &address);

        if (stop == SANDBOX_PAGE_FAULT) {
            if (!supply_page(d, s, address))
                return stop;
            if (!d->t->native_space)
                return SANDBOX_INTERRUPTED;
        } else if (stop != SANDBOX_INTERRUPTED || atomic_load(&direct_cpu(d)->request)) {
            return stop;
        }
        if (!can_go_on(sandbox_regs(s->box)))
            return SANDBOX_INTERRUPTED;
    }
}

/* What the guest does on account of the stop. Its state is here again. */
static enum interp_user follow(struct direct *d, struct direct_space *s, enum sandbox_stop stop)
{
    struct x86_cpu *cpu = direct_cpu(d);

    switch (stop) {
    case SANDBOX_SYSCALL:
        cpu->s.gpr[RAX] = sandbox_regs(s->box)->orig_rax;
        return enter_kernel(d, s, stop);
    case SANDBOX_BREAKPOINT:
        return enter_kernel(d, s, stop);
    case SANDBOX_STEPPED:
        cpu->s.dr6 |= 0x4000;
        x86_raise(cpu, X86_DB);
    case SANDBOX_INTERRUPTED: case SANDBOX_DEAD: case SANDBOX_REFUSED:
        return INTERP_USER_AGAIN;
    default:
        break;
    }
    if (d->t->detour != NO_DETOUR)
        return INTERP_USER_BLOCK;
    d->steps++;
    return INTERP_USER_STEP;
}

enum interp_user direct_run(struct interp *it)
{
    struct translator *t = (struct translator *)it;
    struct direct *d = t->direct;
    struct direct_space *s;
    enum sandbox_stop stop;

    if (t->native_space != it->cpu.space || t->interpret_once)
        return INTERP_USER_BLOCK;
    if (!direct_eligible(d) || !memory_complete(it->cpu.mem)) {
        t->native_space = NULL;
        return INTERP_USER_BLOCK;
    }
    s = direct_space_now(d);
    if (!prepare(d, s))
        return give_up(d, s);
    d->runs++;
    d->entered = 0;             /* no stay of translated code */
    d->ran_now = false;
    stop = stay(d, s);
    if (stop == SANDBOX_GONE)
        return lost(d);
    /* Somebody killed it, or it has what it cannot be continued with from outside, as code itself can load: what it computed before counts. */
    if (!d->ran_now)
        return stop == SANDBOX_INTERRUPTED ? INTERP_USER_AGAIN : give_up(d, s);
    if (!take_back(d, s))
        return lost(d);
    get_segments(&it->cpu, sandbox_regs(s->box));
    return follow(d, s, stop);
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
    if (getrandom(d->secret, sizeof(d->secret), 0) != sizeof(d->secret)) {
        free(d);
        return 0;
    }
    d->t = t;
    atomic_init(&d->running, -1);
    d->always = t->options.direct == TRANSLATE_DIRECT_ALWAYS;
    d->same_components = host_xcr0() == t->it.cpu.model->xcr0_allowed;
    direct_judge_begin(d);
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

/*
 * Whether guest RAM is in the same files as before. It changes only while no vCPU runs: a machine that is restored or reset gets other
 * ones, which may have the descriptors' numbers of the former.
 */
static bool same_memory(struct direct *d)
{
    const struct memory *m = direct_cpu(d)->mem;
    bool same = true;

    for (unsigned i = 0; i < MEMORY_MAX_REGIONS; i++) {
        struct stat st;
        ino_t file = i < m->regions && m->region[i].fd >= 0 && fstat(m->region[i].fd, &st) == 0 ? st.st_ino : 0;

        same = same && d->file[i] == file;
        d->file[i] = file;
    }
    return same;
}

void direct_attach(struct translator *t)
{
    struct direct *d = t->direct;

    if (!d)
        return;
    /* Sandboxes obey the thread that made them, and die with it; and they have the memory that was there then. */
    if (!same_memory(d) || d->thread != gettid())
        for (unsigned i = 0; i < X86_TLB_SPACES; i++)
            drop_box(d, &d->space[i]);
    d->thread = gettid();
    t->native_space = NULL;
    t->user_mode = false;    /* what user code it stands in is entered anew */
    CPU_ZERO(&d->allowed);
    sched_getaffinity(0, sizeof(d->allowed), &d->allowed);
}

void direct_detach(struct translator *t)
{
    struct direct *d = t->direct;

    if (!d)
        return;
    direct_unbind(d);
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
