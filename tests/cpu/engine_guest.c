/* See engine_guest.h. */
#include "engine_guest.h"

#include "engine/translate/options.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "isa/x86/native.h"

#define GDT 0x2000u
#define IDT 0x3000u
#define TSS 0x4000u
#define STACK_TOP 0x6000u
#define NMI_STACK_TOP 0x5800u
#define HANDLERS 0x7000u        /* 16 bytes for each vector */
#define KERNEL_SIZE 0x10000u
#define TABLES 0x10000u         /* page tables; the first is the root */
#define TSC_HZ 1000000000u
#define PATIENCE_S 5

/* ---- memory ---- */

uint64_t engine_guest_get(struct engine_guest *g, gpa_t pa)
{
    uint64_t v;

    memcpy(&v, g->ram + pa, 8);
    return v;
}

void engine_guest_put(struct engine_guest *g, gpa_t pa, uint64_t value, unsigned size)
{
    memcpy(g->ram + pa, &value, size);
}

gpa_t engine_guest_map(struct engine_guest *g, gva_t va, gpa_t pa, uint64_t bits)
{
    gpa_t table = TABLES, entry;

    for (unsigned level = 4; level > 1; level--) {
        entry = table + (va >> (12 + 9 * (level - 1)) & 511) * 8;
        if (!(engine_guest_get(g, entry) & PTE_P)) {
            if (g->next_table >= GUEST_FREE_GPA)
                abort();
            engine_guest_put(g, entry, g->next_table | PTE_P | PTE_W | PTE_U | PTE_A, 8);
            g->next_table += GUEST_PAGE_SIZE;
        }
        table = engine_guest_get(g, entry) & 0x000ffffffffff000;
    }
    entry = table + (va >> 12 & 511) * 8;
    engine_guest_put(g, entry, pa | bits | PTE_P | PTE_A | PTE_D, 8);
    return entry;
}

static void make_kernel(struct engine_guest *g)
{
    /* The segments that Linux has: kernel and user code and data, flat. */
    engine_guest_put(g, GDT + SEL_KERNEL_CODE, 0x00af9b000000ffff, 8);
    engine_guest_put(g, GDT + SEL_KERNEL_DATA, 0x00cf93000000ffff, 8);
    engine_guest_put(g, GDT + (SEL_CODE32 & ~7), 0x00cffb000000ffff, 8);
    engine_guest_put(g, GDT + (SEL_DATA & ~7), 0x00cff3000000ffff, 8);
    engine_guest_put(g, GDT + (SEL_CODE64 & ~7), 0x00affb000000ffff, 8);
    engine_guest_put(g, TSS + 4, KERNEL_BASE + STACK_TOP, 8);
    engine_guest_put(g, TSS + 36, KERNEL_BASE + STACK_TOP, 8);  /* IST 1: also for faults of the kernel itself */
    engine_guest_put(g, TSS + 102, 0x68, 2);    /* no I/O permission map: it would lie beyond the limit */
    for (unsigned v = 0; v < 256; v++) {
        uint64_t handler = KERNEL_BASE + HANDLERS + v * 16;
        uint64_t dpl = v == 3 || v == 4 ? 3 : 0;

        engine_guest_put(g, IDT + v * 16, (handler & 0xffff) | SEL_KERNEL_CODE << 16 | 1ull << 32 | 0x8e0000000000 |
                         dpl << 45 | (handler & 0xffff0000) << 32, 8);
        engine_guest_put(g, IDT + v * 16 + 8, handler >> 32, 8);
        /* out %al, $PORT; hlt; jmp to the hlt */
        memcpy(g->ram + HANDLERS + v * 16, (uint8_t[]){ 0xe6, GUEST_PORT, 0xf4, 0xeb, 0xfd }, 5);
    }
    for (gpa_t pa = 0; pa < KERNEL_SIZE; pa += GUEST_PAGE_SIZE)
        engine_guest_map(g, KERNEL_BASE + pa, pa, PTE_W);
}

void engine_guest_ignore_nmi(struct engine_guest *g)
{
    engine_guest_put(g, TSS + 44, KERNEL_BASE + NMI_STACK_TOP, 8);      /* IST 2: an NMI may come in another handler */
    engine_guest_put(g, IDT + 2 * 16 + 4, 2, 1);
    memcpy(g->ram + HANDLERS + 2 * 16, (uint8_t[]){ 0x48, 0xcf }, 2);   /* iretq */
}

struct x86_seg engine_guest_segment(struct engine_guest *g, unsigned selector)
{
    uint64_t d = engine_guest_get(g, GDT + (selector & ~7u));

    return (struct x86_seg){ .limit = UINT32_MAX, .attr = (uint32_t)(d >> 40) & 0xf0ff, .selector = (uint16_t)selector };
}

static void make_state(struct engine_guest *g)
{
    struct x86_state *s = &g->base;

    x86_state_reset(s, true);
    s->cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_PG;
    s->cr3 = TABLES;
    s->cr4 = CR4_PAE | CR4_PGE | CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_OSXSAVE | CR4_FSGSBASE | CR4_SMEP | CR4_SMAP | CR4_UMIP;
    s->cr4 &= g->model->cr4_allowed;
    s->efer = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE;
    s->xcr0 = s->cr4 & CR4_OSXSAVE ? g->model->xcr0_allowed : 1;
    s->rflags = 2;
    s->gdt = (struct x86_table){ .base = KERNEL_BASE + GDT, .limit = 0x7f };
    s->idt = (struct x86_table){ .base = KERNEL_BASE + IDT, .limit = 0xfff };
    s->tr = (struct x86_seg){ .base = KERNEL_BASE + TSS, .limit = 0x67, .attr = 0x8b, .selector = SEL_TSS };
    s->ldtr = (struct x86_seg){ .attr = SEG_UNUSABLE };
    s->seg[SEG_SS] = s->seg[SEG_DS] = s->seg[SEG_ES] = engine_guest_segment(g, SEL_DATA);
    s->seg[SEG_FS] = s->seg[SEG_GS] = (struct x86_seg){ .attr = SEG_UNUSABLE };
}

/* ---- the port ---- */

static uint64_t port_read(void *opaque, uint64_t offset, unsigned size) { return 0; }

static void port_write(void *opaque, uint64_t offset, uint64_t value, unsigned size)
{
    struct engine_guest *g = opaque;

    g->engine->kick(&g->vcpu);
}

static const struct bus_ops port_ops = { .read = port_read, .write = port_write };

/* ---- the watchdog: ends a run that the engine does not finish ---- */

static void *watch(void *opaque)
{
    struct engine_guest *g = opaque;

    pthread_mutex_lock(&g->lock);
    while (!g->stop) {
        struct timespec until;
        uint64_t seen = g->runs;

        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_sec += PATIENCE_S;
        if (pthread_cond_timedwait(&g->changed, &g->lock, &until) == ETIMEDOUT && g->running && seen == g->runs) {
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
    struct engine_guest *g = opaque;

    g->engine->signal(&g->vcpu, signal, value);
}

static void on_code_written(void *opaque, gpa_t page)
{
    struct engine_guest *g = opaque;

    g->engine->code_written(&g->vcpu, page);
}

static uint64_t tsc_hz(const struct engine_guest *g) { return g->real_clock ? tsc_frequency_hz() : TSC_HZ; }

static void make_vcpu(struct engine_guest *g)
{
    g->group = soft_group_create(&g->machine);
    g->vcpu = (struct vcpu){ .machine = &g->machine, .lapic = irqchip_lapic(g->chip, 0), .model = g->model, .count = 1,
                             .group = g->group, .tsc_hz = tsc_hz(g), .engine = g->engine };
    if (!g->group || g->engine->vcpu_create(&g->vcpu))
        exit(2);
    lapic_connect(g->vcpu.lapic, on_lapic, g);
}

static void end_vcpu(struct engine_guest *g)
{
    g->instructions = engine_guest_instructions(g);
    lapic_connect(g->vcpu.lapic, NULL, NULL);
    g->engine->vcpu_destroy(&g->vcpu);
    soft_group_destroy(g->group);
    native_shutdown();
}

void engine_guest_switch(struct engine_guest *g, const char *engine)
{
    struct x86_state *s = aligned_alloc(64, align_up(sizeof(*s), 64));
    const char *missing;

    g->engine->export_state(&g->vcpu, s);
    /* No timer goes off meanwhile. */
    pthread_mutex_lock(&g->machine.lock);
    end_vcpu(g);
    g->engine = engine_find(engine);
    if (!engine_offer(g->engine, g->model, true, &missing)) {
        fprintf(stderr, "engine %s cannot go on with model %s: it lacks %s\n", engine, g->model->name, missing);
        exit(2);
    }
    make_vcpu(g);
    g->engine->import_state(&g->vcpu, s);
    pthread_mutex_unlock(&g->machine.lock);
    free(s);
}

static void *run_loop(void *opaque)
{
    loop_run(((struct engine_guest *)opaque)->machine.loop);
    return NULL;
}

void engine_guest_renew(struct engine_guest *g)
{
    end_vcpu(g);
    make_vcpu(g);
}

void engine_guest_init(struct engine_guest *g, const char *engine, const char *model)
{
    struct engine_report report;
    const char *missing;

    /* Translation begins with the first execution. */
    translate_options.threshold = 1;
    g->engine = engine_find(engine);
    g->model = x86_cpu_model_find(model);
    if (!g->engine || !g->model) {
        fprintf(stderr, "no engine '%s' or no model '%s'\n", engine, model);
        exit(2);
    }
    g->engine->probe(&report);
    if (!report.usable) {
        fprintf(stderr, "skipped: %s\n", report.text);
        exit(77);
    }
    g->emulated = g->engine == &kvm_engine && !report.fast;
    g->model = engine_offer(g->engine, g->model, false, &missing);
    if (g->model && g->other_engine)
        g->model = engine_offer(engine_find(g->other_engine), g->model, false, &missing);
    if (!g->model) {
        fprintf(stderr, "this host cannot run model %s: it lacks %s\n", model, missing);
        exit(2);
    }
    x86_cpu_model_select(g->model);
    if (machine_init(&g->machine, !g->real_clock) || memory_add_ram(&g->machine.memory, 0, GUEST_RAM_SIZE))
        exit(2);
    g->machine.memory.code_written = on_code_written;
    g->machine.memory.code_written_opaque = g;
    pthread_mutex_lock(&g->machine.lock);
    g->chip = irqchip_create(&g->machine, ENGINE_GUEST_CPUS, tsc_hz(g));
    if (!g->chip || bus_add(&g->machine.ports, GUEST_PORT, 1, &port_ops, g, "test"))
        exit(2);
    pthread_mutex_unlock(&g->machine.lock);

    g->ram = memory_map(&g->machine.memory, 0, GUEST_RAM_SIZE);
    g->next_table = TABLES + GUEST_PAGE_SIZE;
    make_kernel(g);
    make_state(g);
    make_vcpu(g);
    pthread_mutex_init(&g->lock, NULL);
    pthread_cond_init(&g->changed, NULL);
    if (pthread_create(&g->watchdog, NULL, watch, g) || (g->real_clock && pthread_create(&g->loop, NULL, run_loop, g)))
        exit(2);
}

void engine_guest_destroy(struct engine_guest *g)
{
    pthread_mutex_lock(&g->lock);
    g->stop = true;
    pthread_cond_signal(&g->changed);
    pthread_mutex_unlock(&g->lock);
    pthread_join(g->watchdog, NULL);
    end_vcpu(g);
    if (g->real_clock) {
        loop_stop(g->machine.loop);
        pthread_join(g->loop, NULL);
    }
    machine_destroy(&g->machine);
}

uint64_t engine_guest_instructions(const struct engine_guest *g)
{
    struct engine_counters counters;

    g->engine->counters(&g->vcpu, &counters);
    return g->instructions + counters.instructions;
}

/* ---- running ---- */

enum guest_end engine_guest_run(struct engine_guest *g, struct x86_state *s)
{
    enum vm_exit exit;

    g->engine->import_state(&g->vcpu, s);
    pthread_mutex_lock(&g->lock);
    g->runs++;
    g->running = true;
    g->expired = false;
    pthread_mutex_unlock(&g->lock);
    exit = g->engine->run(&g->vcpu);
    pthread_mutex_lock(&g->lock);
    g->running = false;
    pthread_mutex_unlock(&g->lock);
    g->engine->export_state(&g->vcpu, s);
    if (g->expired)
        return GUEST_EXPIRED;
    return exit == VM_EXIT_KICK ? GUEST_ENDED : GUEST_DIED;
}

static bool has_error_code(unsigned vector)
{
    return vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21;
}

bool engine_guest_exception(struct engine_guest *g, const struct x86_state *s, struct guest_exception *e)
{
    uint64_t handler = s->rip - (KERNEL_BASE + HANDLERS), sp = s->gpr[RSP] - KERNEL_BASE;
    bool error;

    if (handler >= 256 * 16)
        return false;
    *e = (struct guest_exception){ .vector = (uint8_t)(handler / 16) };
    error = has_error_code(e->vector);
    if (sp != STACK_TOP - (error ? 48 : 40))
        return false;
    if (error) {
        e->error = (uint32_t)engine_guest_get(g, sp);
        sp += 8;
    }
    e->rip = engine_guest_get(g, sp);
    e->rflags = engine_guest_get(g, sp + 16);
    e->rsp = engine_guest_get(g, sp + 24);
    return true;
}
