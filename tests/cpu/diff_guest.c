/*
 * The engine under test: a machine with one vCPU, whose user address space is the one that the native side has.
 *
 * Everything of the supervisor lies in one 64 KiB piece at KERNEL_BASE. A case starts by importing its state at
 * privilege level 3. Whatever exception ends it goes through the IDT to its own handler, which writes to a port; that kicks
 * the vCPU out of the engine, and the frame on the stack, the handler's address and the exported state say what happened.
 * The selectors are those that Linux gives to programs, so that frames and x87 pointers agree.
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/util.h"
#include "device/machine.h"
#include "diff.h"
#include "engine/engine.h"
#include "engine/soft.h"
#include "isa/x86/cpuid.h"
#include "isa/x86/native.h"

#define RAM_SIZE MIB(64)
#define KERNEL_BASE 0xffff800000000000ull
#define GDT 0x2000u
#define IDT 0x3000u
#define TSS 0x4000u
#define STACK_TOP 0x6000u
#define HANDLERS 0x7000u        /* 16 bytes for each vector */
#define KERNEL_SIZE 0x10000u
#define TABLES 0x10000u         /* page tables; the first is the root */
#define TABLES_END 0x80000u
#define DATA_GPA 0x100000u
#define CODE_GPA 0x200000u
#define PORT 0x10

enum { SEL_KERNEL_CODE = 0x10, SEL_KERNEL_DATA = 0x18, SEL_CODE32 = 0x23, SEL_DATA = 0x2b, SEL_CODE64 = 0x33, SEL_TSS = 0x40 };

#define PTE_P 1ull
#define PTE_W 2ull
#define PTE_U 4ull
#define PTE_A 0x20ull
#define PTE_D 0x40ull
#define PTE_NX (1ull << 63)

#define PATIENCE_MS 5000
/* So that what a case does to caches of the engine shows up, but prepared code does not grow without end. */
#define CASES_PER_VCPU 20000u

struct guest {
    struct machine machine;
    struct irqchip *chip;
    struct vcpu vcpu;
    struct soft_group *group;
    const struct engine *engine;
    struct x86_state base;      /* what every case's state is made from */
    struct x86_state state;
    gpa_t next_table;
    uint8_t *ram;
    uint8_t data[DATA_SIZE];
    uint16_t code_start, code_bytes;    /* the last case's */
    unsigned cases;             /* of this vCPU */
    uint64_t instructions;      /* of vCPUs before */
    /* The watchdog. */
    pthread_t watchdog;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool stop;
    uint64_t started;           /* counts cases */
    bool running, expired;
};

/* ---- memory ---- */

static void put(struct guest *g, gpa_t pa, uint64_t v, unsigned size) { memcpy(g->ram + pa, &v, size); }
static uint64_t get(struct guest *g, gpa_t pa)
{
    uint64_t v;
    memcpy(&v, g->ram + pa, 8);
    return v;
}

static void map_page(struct guest *g, gva_t va, gpa_t pa, uint64_t bits)
{
    gpa_t table = TABLES;

    for (unsigned level = 4; level > 1; level--) {
        gpa_t entry = table + (va >> (12 + 9 * (level - 1)) & 511) * 8;

        if (!(get(g, entry) & PTE_P)) {
            if (g->next_table >= TABLES_END)
                abort();
            put(g, entry, g->next_table | PTE_P | PTE_W | PTE_U | PTE_A, 8);
            g->next_table += GUEST_PAGE_SIZE;
        }
        table = get(g, entry) & 0x000ffffffffff000;
    }
    put(g, table + (va >> 12 & 511) * 8, pa | bits | PTE_P | PTE_A | PTE_D, 8);
}

static void map_window(struct guest *g, gva_t base)
{
    for (unsigned i = 0; i < WINDOW_PAGES; i++)
        if (window[i].access != WINDOW_NONE)
            map_page(g, base + i * 4096, DATA_GPA + window[i].page * 4096u,
                     PTE_U | PTE_NX | (window[i].access == WINDOW_WRITE ? PTE_W : 0));
}

static void make_kernel(struct guest *g)
{
    /* The segments that Linux has: kernel and user code and data, flat. */
    put(g, GDT + SEL_KERNEL_CODE, 0x00af9b000000ffff, 8);
    put(g, GDT + SEL_KERNEL_DATA, 0x00cf93000000ffff, 8);
    put(g, GDT + (SEL_CODE32 & ~7), 0x00cffb000000ffff, 8);
    put(g, GDT + (SEL_DATA & ~7), 0x00cff3000000ffff, 8);
    put(g, GDT + (SEL_CODE64 & ~7), 0x00affb000000ffff, 8);
    put(g, TSS + 4, KERNEL_BASE + STACK_TOP, 8);
    put(g, TSS + 102, 0x68, 2);         /* no I/O permission map: it would lie beyond the limit */
    for (unsigned v = 0; v < 256; v++) {
        uint64_t handler = KERNEL_BASE + HANDLERS + v * 16;
        uint64_t dpl = v == 3 || v == 4 ? 3 : 0;

        put(g, IDT + v * 16, (handler & 0xffff) | SEL_KERNEL_CODE << 16 | 0x8e0000000000 | dpl << 45 |
            (handler & 0xffff0000) << 32, 8);
        put(g, IDT + v * 16 + 8, handler >> 32, 8);
        /* out %al, $PORT; hlt; jmp to the hlt */
        memcpy(g->ram + HANDLERS + v * 16, (uint8_t[]){ 0xe6, PORT, 0xf4, 0xeb, 0xfd }, 5);
    }
}

static struct x86_seg segment(struct guest *g, unsigned selector)
{
    uint64_t d = get(g, GDT + (selector & ~7u));

    return (struct x86_seg){ .limit = UINT32_MAX, .attr = (uint32_t)(d >> 40) & 0xf0ff, .selector = (uint16_t)selector };
}

static void make_state(struct guest *g, const struct x86_cpu_model *model)
{
    struct x86_state *s = &g->base;

    x86_state_reset(s, true);
    s->cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_PG;
    s->cr3 = TABLES;
    s->cr4 = CR4_PAE | CR4_PGE | CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_OSXSAVE | CR4_FSGSBASE | CR4_SMEP | CR4_SMAP | CR4_UMIP;
    s->efer = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE;
    s->xcr0 = model->xcr0_allowed;
    s->gdt = (struct x86_table){ .base = KERNEL_BASE + GDT, .limit = 0x7f };
    s->idt = (struct x86_table){ .base = KERNEL_BASE + IDT, .limit = 0xfff };
    s->tr = (struct x86_seg){ .base = KERNEL_BASE + TSS, .limit = 0x67, .attr = 0x8b, .selector = SEL_TSS };
    s->ldtr = (struct x86_seg){ .attr = SEG_UNUSABLE };
    s->seg[SEG_SS] = s->seg[SEG_DS] = s->seg[SEG_ES] = segment(g, SEL_DATA);
    s->seg[SEG_FS] = s->seg[SEG_GS] = (struct x86_seg){ .attr = SEG_UNUSABLE };
}

/* ---- the port ---- */

static uint64_t port_read(void *opaque, uint64_t offset, unsigned size) { return 0; }

static void port_write(void *opaque, uint64_t offset, uint64_t value, unsigned size)
{
    struct guest *g = opaque;

    g->engine->kick(&g->vcpu);
}

static const struct bus_ops port_ops = { .read = port_read, .write = port_write };

/* ---- the watchdog: ends a case that the engine does not finish ---- */

static void *watch(void *opaque)
{
    struct guest *g = opaque;

    pthread_mutex_lock(&g->lock);
    while (!g->stop) {
        struct timespec until;
        uint64_t seen = g->started;

        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_sec += PATIENCE_MS / 1000;
        if (pthread_cond_timedwait(&g->changed, &g->lock, &until) == ETIMEDOUT && g->running && seen == g->started) {
            g->expired = true;
            g->engine->kick(&g->vcpu);
        }
    }
    pthread_mutex_unlock(&g->lock);
    return NULL;
}

/* ---- life ---- */

static void on_lapic(void *opaque, enum lapic_signal signal, unsigned value)
{
    struct guest *g = opaque;

    g->engine->signal(&g->vcpu, signal, value);
}

static void on_code_written(void *opaque, gpa_t page)
{
    struct guest *g = opaque;

    g->engine->code_written(&g->vcpu, page);
}

static void make_vcpu(struct guest *g, const struct x86_cpu_model *model)
{
    g->group = soft_group_create(&g->machine);
    translate_threshold = 1;    /* everything is translated, if that is the engine */
    g->vcpu = (struct vcpu){ .machine = &g->machine, .lapic = irqchip_lapic(g->chip, 0), .model = model, .count = 1,
                             .group = g->group, .tsc_hz = 1000000000, .engine = g->engine };
    if (!g->group || g->engine->vcpu_create(&g->vcpu))
        exit(2);
    lapic_connect(g->vcpu.lapic, on_lapic, g);
    g->cases = 0;
}

static void end_vcpu(struct guest *g)
{
    g->instructions = guest_instructions(g);
    g->engine->vcpu_destroy(&g->vcpu);
    soft_group_destroy(g->group);
    native_shutdown();
}

struct guest *guest_create(const char *engine, const char *model_name)
{
    struct guest *g = aligned_alloc(64, align_up(sizeof(*g), 64));
    const struct x86_cpu_model *model = x86_cpu_model_find(model_name);
    const char *missing;

    memset(g, 0, sizeof(*g));
    g->engine = engine_find(engine);
    if (!g->engine || !model) {
        fprintf(stderr, "difftest: no engine '%s' or no model '%s'\n", engine, model_name);
        exit(2);
    }
    if (x86_cpu_model_usable(model, &missing)) {
        fprintf(stderr, "difftest: this host cannot run model %s: it lacks %s\n", model_name, missing);
        exit(2);
    }
    x86_cpu_model_select(model);
    if (machine_init(&g->machine, true) || memory_add_ram(&g->machine.memory, 0, RAM_SIZE))
        exit(2);
    g->machine.memory.code_written = on_code_written;
    g->machine.memory.code_written_opaque = g;
    pthread_mutex_lock(&g->machine.lock);
    g->chip = irqchip_create(&g->machine, 1, 1000000000);
    if (!g->chip || bus_add(&g->machine.ports, PORT, 1, &port_ops, g, "difftest"))
        exit(2);
    pthread_mutex_unlock(&g->machine.lock);

    g->ram = memory_map(&g->machine.memory, 0, RAM_SIZE);
    g->next_table = TABLES + GUEST_PAGE_SIZE;
    make_kernel(g);
    for (gpa_t pa = 0; pa < KERNEL_SIZE; pa += GUEST_PAGE_SIZE)
        map_page(g, KERNEL_BASE + pa, pa, PTE_W);
    for (unsigned i = 0; i < CODE_PAGES; i++)
        map_page(g, CODE_BASE + i * 4096, CODE_GPA + i * 4096, PTE_U);
    map_window(g, WINDOW_LOW);
    map_window(g, WINDOW_HIGH);
    map_page(g, EDGE_LOW, DATA_GPA + EDGE_PAGE * 4096, PTE_U | PTE_W | PTE_NX);
    map_page(g, EDGE_HIGH, DATA_GPA + EDGE_PAGE * 4096 + 4096, PTE_U | PTE_W | PTE_NX);
    memset(g->ram + CODE_GPA, CODE_FILL, CODE_SIZE);
    make_state(g, model);
    make_vcpu(g, model);

    pthread_mutex_init(&g->lock, NULL);
    pthread_cond_init(&g->changed, NULL);
    if (pthread_create(&g->watchdog, NULL, watch, g))
        exit(2);
    return g;
}

void guest_destroy(struct guest *g)
{
    pthread_mutex_lock(&g->lock);
    g->stop = true;
    pthread_cond_signal(&g->changed);
    pthread_mutex_unlock(&g->lock);
    pthread_join(g->watchdog, NULL);
    end_vcpu(g);
    machine_destroy(&g->machine);
    free(g);
}

uint64_t guest_instructions(const struct guest *g)
{
    struct engine_counters counters;

    g->engine->counters(&g->vcpu, &counters);
    return g->instructions + counters.instructions;
}

void guest_set_data(struct guest *g, const uint8_t data[DATA_SIZE])
{
    memcpy(g->data, data, DATA_SIZE);
    memory_write(&g->machine.memory, DATA_GPA, data, DATA_SIZE);
}

/* ---- running ---- */

/* As a device would: engines find out by themselves that code changed. */
static void load_code(struct guest *g, const struct cpu_case *c)
{
    memory_fill(&g->machine.memory, CODE_GPA + g->code_start, CODE_FILL, g->code_bytes);
    memory_write(&g->machine.memory, CODE_GPA + c->start, c->code, c->bytes);
    g->code_start = c->start;
    g->code_bytes = c->bytes;
}

static void collect_data(struct guest *g, struct cpu_result *r)
{
    uint8_t *now = g->ram + DATA_GPA;

    memset(r->changed, 0, sizeof(r->changed));
    for (unsigned i = 0; i < DATA_LINES; i++) {
        if (memcmp(now + i * LINE, g->data + i * LINE, LINE) == 0)
            continue;
        r->changed[i / 64] |= 1ull << (i % 64);
        memcpy(r->line[i], now + i * LINE, LINE);
        memcpy(now + i * LINE, g->data + i * LINE, LINE);
    }
}

static bool has_error_code(unsigned vector)
{
    return vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21;
}

static void run_watched(struct guest *g)
{
    pthread_mutex_lock(&g->lock);
    g->started++;
    g->running = true;
    g->expired = false;
    pthread_mutex_unlock(&g->lock);
    g->engine->run(&g->vcpu);
    pthread_mutex_lock(&g->lock);
    g->running = false;
    pthread_mutex_unlock(&g->lock);
}

void guest_run(struct guest *g, const struct cpu_case *c, struct cpu_result *r)
{
    struct x86_state *s = &g->state;
    uint64_t handler, frame[6], sp;

    if (g->cases++ >= CASES_PER_VCPU) {
        const struct x86_cpu_model *model = g->vcpu.model;

        end_vcpu(g);
        make_vcpu(g, model);
    }
    load_code(g, c);
    *s = g->base;
    memcpy(s->gpr, c->in.gpr, sizeof(s->gpr));
    s->rip = c->in.rip;
    s->rflags = c->in.rflags;
    s->seg[SEG_CS] = segment(g, c->code_size == 8 ? SEL_CODE64 : SEL_CODE32);
    s->seg[SEG_FS].base = c->in.fs_base;
    s->seg[SEG_GS].base = c->in.gs_base;
    s->fpu = c->in.fpu;
    g->engine->import_state(&g->vcpu, s);
    run_watched(g);
    g->engine->export_state(&g->vcpu, s);

    collect_data(g, r);
    handler = s->rip - (KERNEL_BASE + HANDLERS);
    if (g->expired || s->activity == X86_SHUTDOWN || handler >= 256 * 16) {
        r->end = g->expired ? END_TIMEOUT : END_CRASH;
        return;
    }
    r->end = END_FAULT;
    r->vector = (uint8_t)(handler / 16);
    sp = s->gpr[RSP] - KERNEL_BASE;
    if (sp > STACK_TOP - 40 || sp < STACK_TOP - 64) {
        r->end = END_CRASH;
        return;
    }
    memcpy(frame, g->ram + sp, sizeof(frame));
    r->error = 0;
    if (has_error_code(r->vector)) {
        r->error = (uint32_t)frame[0];
        memmove(frame, frame + 1, 40);
    }
    r->cr2 = s->cr2;
    memcpy(r->out.gpr, s->gpr, sizeof(s->gpr));
    r->out.rip = frame[0];
    r->out.rflags = frame[2];
    r->out.gpr[RSP] = frame[3];
    r->out.fs_base = s->seg[SEG_FS].base;
    r->out.gs_base = s->seg[SEG_GS].base;
    r->out.fpu = s->fpu;
}
