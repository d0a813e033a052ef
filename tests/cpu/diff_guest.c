/*
 * The engine under test: a machine (engine_guest.h) whose user address space is the one that the native side has. A case
 * starts by importing its state at privilege level 3; whatever exception ends it, its handler ends the run.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "diff.h"
#include "engine_guest.h"

#define DATA_GPA GUEST_FREE_GPA
#define CODE_GPA (GUEST_FREE_GPA + 0x100000u)
/* So that what a case does to caches of the engine shows up, but prepared code does not grow without end. */
#define CASES_PER_VCPU 20000u

struct guest {
    struct engine_guest engine;
    struct x86_state state;
    uint8_t data[DATA_SIZE];
    uint16_t code_start, code_bytes;    /* the last case's */
    unsigned cases;             /* of this vCPU */
    /* With --interrupts; the lock is held while there is no vCPU. */
    bool interrupted;
    atomic_bool stop;
    pthread_t interrupter;
    pthread_mutex_t lock;
    uint64_t interrupts, direct_runs;   /* of vCPUs before */
};

static bool keep_vcpu;
static bool kernel_mode, code_written, null_segments;
static uint64_t owner;          /* PTE_U, or 0 for the supervisor's pages */

void guest_keep_vcpu(bool keep) { keep_vcpu = keep; }

static void map_window(struct guest *g, gva_t base)
{
    for (unsigned i = 0; i < WINDOW_PAGES; i++)
        if (window[i].access != WINDOW_NONE)
            engine_guest_map(&g->engine, base + i * 4096, DATA_GPA + window[i].page * 4096u,
                             owner | PTE_NX | (window[i].access == WINDOW_WRITE ? PTE_W : 0));
}

struct guest *guest_create(const char *engine, const char *model, bool direct, bool kernel, bool writes_code)
{
    struct guest *g = aligned_alloc(64, align_up(sizeof(*g), 64));
    struct engine_guest *e = &g->engine;

    kernel_mode = kernel;
    code_written = writes_code;
    null_segments = direct;
    owner = kernel ? 0 : PTE_U;
    memset(g, 0, sizeof(*g));
    engine_guest_init(e, engine, model);
    for (unsigned i = 0; i < CODE_PAGES; i++)
        engine_guest_map(e, CODE_BASE + i * 4096, CODE_GPA + i * 4096, owner | (writes_code ? PTE_W : 0));
    map_window(g, WINDOW_LOW);
    map_window(g, WINDOW_HIGH);
    engine_guest_map(e, EDGE_LOW, DATA_GPA + EDGE_PAGE * 4096, owner | PTE_W | PTE_NX);
    engine_guest_map(e, EDGE_HIGH, DATA_GPA + EDGE_PAGE * 4096 + 4096, owner | PTE_W | PTE_NX);
    memset(e->ram + CODE_GPA, CODE_FILL, CODE_SIZE);
    return g;
}

/* ---- interrupts ---- */

static uint64_t interrupts_now(const struct guest *g)
{
    struct engine_counters counters;

    g->engine.engine->counters(&g->engine.vcpu, &counters);
    return counters.interrupts;
}

static uint64_t direct_runs_now(const struct guest *g)
{
    struct engine_counters counters = { 0 };

    g->engine.engine->counters(&g->engine.vcpu, &counters);
    return counters.native_runs;
}

uint64_t guest_direct_runs(const struct guest *g) { return g->direct_runs + direct_runs_now(g); }

uint64_t guest_interrupts(const struct guest *g) { return g->interrupts + interrupts_now(g); }

/*
 * One after the other, at all distances in time. Kicks among them: then the state is taken out of the engine and put in again.
 */
static void *interrupt(void *opaque)
{
    struct guest *g = opaque;
    struct rng r = { 1 };

    while (!atomic_load(&g->stop)) {
        pthread_mutex_lock(&g->lock);
        if (rng_percent(&r, 20))
            g->engine.engine->kick(&g->engine.vcpu);
        else
            g->engine.engine->signal(&g->engine.vcpu, LAPIC_NMI, 0);
        pthread_mutex_unlock(&g->lock);
        for (unsigned i = rng_below(&r, 2000); i > 0; i--)
            __builtin_ia32_pause();
    }
    return NULL;
}

void guest_interrupt(struct guest *g)
{
    engine_guest_ignore_nmi(&g->engine);
    pthread_mutex_init(&g->lock, NULL);
    g->interrupted = pthread_create(&g->interrupter, NULL, interrupt, g) == 0;
}

static void renew(struct guest *g)
{
    if (g->interrupted)
        pthread_mutex_lock(&g->lock);
    g->interrupts += interrupts_now(g);
    g->direct_runs += direct_runs_now(g);
    engine_guest_renew(&g->engine);
    g->cases = 0;
    if (g->interrupted)
        pthread_mutex_unlock(&g->lock);
}

void guest_destroy(struct guest *g)
{
    if (g->interrupted) {
        atomic_store(&g->stop, true);
        pthread_join(g->interrupter, NULL);
    }
    engine_guest_destroy(&g->engine);
    free(g);
}

bool guest_emulated(const struct guest *g) { return g->engine.emulated; }

const struct x86_cpu_model *guest_model(const struct guest *g) { return g->engine.model; }

uint64_t guest_instructions(const struct guest *g) { return engine_guest_instructions(&g->engine); }

void guest_set_data(struct guest *g, const uint8_t data[DATA_SIZE])
{
    memcpy(g->data, data, DATA_SIZE);
    memory_write(&g->engine.machine.memory, DATA_GPA, data, DATA_SIZE);
}

/* As a device would: engines find out by themselves that code changed. */
static void load_code(struct guest *g, const struct cpu_case *c)
{
    struct memory *m = &g->engine.machine.memory;

    if (code_written)
        memory_fill(m, CODE_GPA, CODE_FILL, CODE_SIZE);
    else
        memory_fill(m, CODE_GPA + g->code_start, CODE_FILL, g->code_bytes);
    memory_write(m, CODE_GPA + c->start, c->code, c->bytes);
    g->code_start = c->start;
    g->code_bytes = c->bytes;
}

static void collect_data(struct guest *g, struct cpu_result *r)
{
    uint8_t *now = g->engine.ram + DATA_GPA;

    memset(r->changed, 0, sizeof(r->changed));
    for (unsigned i = 0; i < DATA_LINES; i++) {
        if (memcmp(now + i * LINE, g->data + i * LINE, LINE) == 0)
            continue;
        r->changed[i / 64] |= 1ull << (i % 64);
        memcpy(r->line[i], now + i * LINE, LINE);
        memcpy(now + i * LINE, g->data + i * LINE, LINE);
    }
}

void guest_run(struct guest *g, const struct cpu_case *c, struct cpu_result *r)
{
    struct x86_state *s = &g->state;
    struct guest_exception e;
    enum guest_end end;
    bool ended = false;

    if (g->cases++ >= CASES_PER_VCPU && !keep_vcpu)
        renew(g);
    load_code(g, c);
    *s = g->engine.base;
    memcpy(s->gpr, c->in.gpr, sizeof(s->gpr));
    s->rip = c->in.rip - (c->code_size == 2 ? CODE_BASE : 0);
    s->rflags = c->in.rflags;
    s->seg[SEG_CS] = engine_guest_segment(&g->engine, kernel_mode ? SEL_KERNEL_CODE : c->code_size == 8 ? SEL_CODE64 : SEL_CODE32);
    if (c->code_size == 2) {
        s->seg[SEG_CS] = (struct x86_seg){ .base = CODE_BASE, .limit = CODE16_LIMIT, .attr = 0xfb, .selector = SEL_CODE16 };
        s->seg[SEG_DS] = (struct x86_seg){ .base = WINDOW_LOW, .limit = DATA16_LIMIT, .attr = 0xf3, .selector = SEL_DATA16 };
        s->seg[SEG_ES] = s->seg[SEG_SS] = s->seg[SEG_DS];
    }
    if (kernel_mode)
        s->seg[SEG_SS] = engine_guest_segment(&g->engine, SEL_KERNEL_DATA);
    /* As Linux' programs have them. */
    if (null_segments)
        s->seg[SEG_DS] = s->seg[SEG_ES] = (struct x86_seg){ .attr = SEG_UNUSABLE };
    s->seg[SEG_FS].base = c->in.fs_base;
    s->seg[SEG_GS].base = c->in.gs_base;
    s->fpu = c->in.fpu;
    do
        end = engine_guest_run(&g->engine, s);
    while (end == GUEST_ENDED && !(ended = engine_guest_exception(&g->engine, s, &e)) && g->interrupted);

    collect_data(g, r);
    if (end != GUEST_ENDED || !ended) {
        r->end = end == GUEST_EXPIRED ? END_TIMEOUT : END_CRASH;
        return;
    }
    r->end = END_FAULT;
    r->vector = e.vector;
    r->error = e.error;
    r->cr2 = s->cr2;
    memcpy(r->out.gpr, s->gpr, sizeof(s->gpr));
    r->out.rip = e.rip + (c->code_size == 2 ? CODE_BASE : 0);
    r->out.rflags = e.rflags;
    r->out.gpr[RSP] = e.rsp;
    r->out.fs_base = s->seg[SEG_FS].base;
    r->out.gs_base = s->seg[SEG_GS].base;
    r->out.fpu = s->fpu;
}
