/*
 * The interpreter as an engine: code that changes under it, by its own stores, a device's and
 * another vCPU's; single steps; instructions over page bounds; what other threads ask of a vCPU.
 *
 * The machine has two vCPUs and 4 MiB of RAM, mapped one to one for everybody; code is assembled by
 * hand. Each exception has a handler that writes to PORT_END, which ends the run.
 */
#include <pthread.h>
#include <semaphore.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/util.h"
#include "device/machine.h"
#include "engine/engine.h"
#include "engine/soft.h"
#include "isa/x86/cpuid.h"
#include "isa/x86/native.h"

#define RAM_SIZE  MIB(4)
#define GDT       0x2000u
#define IDT       0x3000u
#define TSS       0x4000u
#define STACK_TOP 0x7000u
#define HANDLERS  0x8000u  /* 16 bytes for each vector */
#define TABLES    0x10000u /* root, directory pointers, directory, page table of the first 2 MiB */
#define CODE      0x20000u
#define DATA      0x40000u
#define PORT_END  0x10u /* ends the run of the vCPU that writes its number */
#define PORT_TELL 0x11u /* posts a byte to the test */

enum { KERNEL_CS = 0x10, KERNEL_DS = 0x18, USER_DS = 0x2b, USER_CS = 0x33, TSS_SEL = 0x40 };
#define PTE_ALL 0x67ull /* present, writable, user, accessed, dirty */
#define TF      0x100u
#define AC      0x40000u

/* Longer than any run may take. */
#define PATIENCE 60

struct guest {
    struct machine machine;
    struct irqchip *chip;
    struct soft_group *group;
    struct vcpu vcpu[2];
    struct x86_state base, state;
    uint8_t *ram;
    sem_t told;
    uint8_t value;
};

static void put(struct guest *g, gpa_t pa, uint64_t v, unsigned size)
{
    memcpy(g->ram + pa, &v, size);
}
static uint64_t get(struct guest *g, gpa_t pa)
{
    uint64_t v;
    memcpy(&v, g->ram + pa, 8);
    return v;
}

/* As a device writes: code that was decoded from there is dropped. */
static void write_code(struct guest *g, gpa_t pa, const void *bytes, size_t len)
{
    assert_int_equal(memory_write(&g->machine.memory, pa, bytes, len), 0);
}
#define CODE_AT(g, pa, ...) \
    write_code(g, pa, (uint8_t[]){__VA_ARGS__}, sizeof((uint8_t[]){__VA_ARGS__}))
#define END 0xb0, 0x00, 0xe6, PORT_END, 0xf4 /* mov $0, %al; out %al, $PORT_END; hlt */

/* ---- the machine ---- */

static void make_tables(struct guest *g)
{
    put(g, TABLES, (TABLES + 0x1000) | PTE_ALL, 8);
    put(g, TABLES + 0x1000, (TABLES + 0x2000) | PTE_ALL, 8);
    put(g, TABLES + 0x2000, (TABLES + 0x3000) | PTE_ALL, 8);
    put(g, TABLES + 0x2008, MIB(2) | PTE_ALL | 0x80, 8);
    for (unsigned i = 0; i < 512; i++)
        put(g, TABLES + 0x3000 + i * 8, i * 4096ull | PTE_ALL, 8);

    put(g, GDT + KERNEL_CS, 0x00af9b000000ffff, 8);
    put(g, GDT + KERNEL_DS, 0x00cf93000000ffff, 8);
    put(g, GDT + (USER_DS & ~7), 0x00cff3000000ffff, 8);
    put(g, GDT + (USER_CS & ~7), 0x00affb000000ffff, 8);
    put(g, TSS + 4, STACK_TOP, 8);
    for (unsigned v = 0; v < 256; v++) {
        put(g, IDT + v * 16, (HANDLERS + v * 16) | KERNEL_CS << 16 | 0x8e0000000000, 8);
        put(g, IDT + v * 16 + 8, 0, 8);
        memcpy(g->ram + HANDLERS + v * 16, (uint8_t[]){END}, 5);
    }
}

static struct x86_seg segment(struct guest *g, unsigned selector)
{
    return (struct x86_seg){.limit = UINT32_MAX,
                            .attr = (uint32_t)(get(g, GDT + (selector & ~7u)) >> 40) & 0xf0ff,
                            .selector = (uint16_t)selector};
}

static uint64_t no_read(void *opaque, uint64_t offset, unsigned size)
{
    return 0;
}

static void end_write(void *opaque, uint64_t offset, uint64_t value, unsigned size)
{
    struct guest *g = opaque;

    interp_engine.kick(&g->vcpu[value & 1]);
}

static void tell_write(void *opaque, uint64_t offset, uint64_t value, unsigned size)
{
    struct guest *g = opaque;

    g->value = (uint8_t)value;
    sem_post(&g->told);
}

static const struct bus_ops end_ops = {.read = no_read, .write = end_write};
static const struct bus_ops tell_ops = {.read = no_read, .write = tell_write};

static void on_code_written(void *opaque, gpa_t page)
{
    struct guest *g = opaque;

    for (unsigned i = 0; i < 2; i++)
        interp_engine.code_written(&g->vcpu[i], page);
}

static int setup(void **state)
{
    struct guest *g = aligned_alloc(64, align_up(sizeof(*g), 64));
    const struct x86_cpu_model *model = x86_cpu_model_find("x86-64-v2");
    struct x86_state *s;

    assert_non_null(g);
    memset(g, 0, sizeof(*g));
    s = &g->base;
    sem_init(&g->told, 0, 0);
    x86_cpu_model_select(model);
    assert_int_equal(machine_init(&g->machine, true), 0);
    assert_int_equal(memory_add_ram(&g->machine.memory, 0, RAM_SIZE), 0);
    g->ram = memory_map(&g->machine.memory, 0, RAM_SIZE);
    make_tables(g);
    pthread_mutex_lock(&g->machine.lock);
    g->chip = irqchip_create(&g->machine, 2, 1000000000);
    assert_non_null(g->chip);
    assert_int_equal(bus_add(&g->machine.ports, PORT_END, 1, &end_ops, g, "end"), 0);
    assert_int_equal(bus_add(&g->machine.ports, PORT_TELL, 1, &tell_ops, g, "tell"), 0);
    pthread_mutex_unlock(&g->machine.lock);

    g->group = soft_group_create(&g->machine);
    assert_non_null(g->group);
    for (unsigned i = 0; i < 2; i++) {
        g->vcpu[i] = (struct vcpu){.machine = &g->machine,
                                   .lapic = irqchip_lapic(g->chip, i),
                                   .model = model,
                                   .index = i,
                                   .count = 2,
                                   .group = g->group,
                                   .tsc_hz = 1000000000,
                                   .engine = &interp_engine};
        assert_int_equal(interp_engine.vcpu_create(&g->vcpu[i]), 0);
    }
    g->machine.memory.code_written = on_code_written;
    g->machine.memory.code_written_opaque = g;

    x86_state_reset(s, true);
    s->cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_PG;
    s->cr3 = TABLES;
    s->cr4 = CR4_PAE;
    s->efer = EFER_LME | EFER_LMA;
    s->gdt = (struct x86_table){.base = GDT, .limit = 0x7f};
    s->idt = (struct x86_table){.base = IDT, .limit = 0xfff};
    s->tr = (struct x86_seg){.base = TSS, .limit = 0x67, .attr = 0x8b, .selector = TSS_SEL};
    s->ldtr = (struct x86_seg){.attr = SEG_UNUSABLE};
    s->seg[SEG_CS] = segment(g, KERNEL_CS);
    s->seg[SEG_SS] = s->seg[SEG_DS] = s->seg[SEG_ES] = segment(g, KERNEL_DS);
    s->seg[SEG_FS] = s->seg[SEG_GS] = (struct x86_seg){.attr = SEG_UNUSABLE};
    s->rip = CODE;
    s->rflags = 2;
    s->gpr[RSP] = STACK_TOP;
    g->state = *s;
    alarm(PATIENCE);
    *state = g;
    return 0;
}

static int teardown(void **state)
{
    struct guest *g = *state;

    alarm(0);
    for (unsigned i = 0; i < 2; i++)
        interp_engine.vcpu_destroy(&g->vcpu[i]);
    soft_group_destroy(g->group);
    machine_destroy(&g->machine);
    native_shutdown();
    sem_destroy(&g->told);
    free(g);
    return 0;
}

/* Runs vCPU 0 from g->state, which is what it ended with afterwards. The vector that ended it, or
 * -1: its own END. */
static int run(struct guest *g)
{
    struct x86_state *s = &g->state;

    interp_engine.import_state(&g->vcpu[0], s);
    assert_int_equal(interp_engine.run(&g->vcpu[0]), VM_EXIT_KICK);
    interp_engine.export_state(&g->vcpu[0], s);
    return s->rip - HANDLERS < 256 * 16 ? (int)((s->rip - HANDLERS) / 16) : -1;
}

static int run_fresh(struct guest *g)
{
    g->state = g->base;
    return run(g);
}

/* Of the exception frame on the stack, without error code. */
static uint64_t frame_rip(struct guest *g)
{
    return get(g, g->state.gpr[RSP]);
}

/* ---- code that changes ---- */

static void test_store_into_the_next_instruction(void **state)
{
    struct guest *g = *state;

    /* movb $7, 1(%rip) [the immediate]; mov $1, %ecx; END */
    CODE_AT(g, CODE, 0xc6, 0x05, 1, 0, 0, 0, 7, 0xb9, 1, 0, 0, 0, END);
    for (unsigned i = 0; i < 3; i++) {
        CODE_AT(g, CODE + 8, 1);
        assert_int_equal(run_fresh(g), -1);
        assert_int_equal(g->state.gpr[RCX], 7);
    }
}

static void test_device_write(void **state)
{
    struct guest *g = *state;

    CODE_AT(g, CODE, 0xb9, 1, 0, 0, 0, END); /* mov $1, %ecx */
    assert_int_equal(run_fresh(g), -1);
    assert_int_equal(g->state.gpr[RCX], 1);
    CODE_AT(g, CODE + 4, 0x12);
    assert_int_equal(run_fresh(g), -1);
    assert_int_equal(g->state.gpr[RCX], 0x12000001);
}

/* An undefined instruction becomes a defined one by a byte that is not its first. */
static void test_undefined_instruction_changes(void **state)
{
    struct guest *g = *state;

    CODE_AT(g, CODE, 0x0f, 0x04, END);
    assert_int_equal(run_fresh(g), X86_UD);
    assert_int_equal(frame_rip(g), CODE);
    CODE_AT(g, CODE + 1, 0xc9); /* bswap %ecx */
    g->base.gpr[RCX] = 0x11223344;
    assert_int_equal(run_fresh(g), -1);
    assert_int_equal(g->state.gpr[RCX], 0x44332211);
    /* The same with bytes in two pages. */
    g->base.rip = CODE + 0xfff;
    CODE_AT(g, CODE + 0xfff, 0x0f, 0x04, END);
    assert_int_equal(run_fresh(g), X86_UD);
    CODE_AT(g, CODE + 0x1000, 0xc9);
    assert_int_equal(run_fresh(g), -1);
    assert_int_equal(g->state.gpr[RCX], 0x44332211);
}

/* An instruction in two pages: both may be written, and the second may become another page. */
static void test_crossing_instruction(void **state)
{
    struct guest *g = *state;

    g->base.rip = CODE + 0xffd;
    CODE_AT(g, CODE + 0xffd, 0xb9, 1, 2, 3, 4, END);
    CODE_AT(g, DATA, 5, 6, END);
    assert_int_equal(run_fresh(g), -1);
    assert_int_equal(g->state.gpr[RCX], 0x04030201);
    CODE_AT(g, CODE + 0x1001, 8);
    assert_int_equal(run_fresh(g), -1);
    assert_int_equal(g->state.gpr[RCX], 0x08030201);
    put(g, TABLES + 0x3000 + (CODE / 4096 + 1) * 8, DATA | PTE_ALL, 8);
    assert_int_equal(run_fresh(g), -1);
    assert_int_equal(g->state.gpr[RCX], 0x06050201);
    /* No such page: the fault is of the second page, the instruction is not executed. */
    put(g, TABLES + 0x3000 + (CODE / 4096 + 1) * 8, 0, 8);
    assert_int_equal(run_fresh(g), X86_PF);
    assert_int_equal(g->state.cr2, CODE + 0x1000);
    assert_int_equal(g->state.gpr[RCX], 0);
}

/* Segments outside 64-bit mode may begin anywhere: what lies in one page of offsets may lie in two
 * of addresses. */
static void test_code_segment_off_page_bounds(void **state)
{
    struct guest *g = *state;
    const gpa_t pte = TABLES + 0x3000 + (CODE / 4096 + 1) * 8;

    g->base.seg[SEG_CS].base = CODE + 0x800;
    g->base.seg[SEG_CS].attr = 0xc09b; /* 32 bits */
    g->base.rip = 0x7f0;
    /* jnz +0x10, to offset 0x802: the next page */
    CODE_AT(g, CODE + 0xff0, 0x75, 0x10);
    CODE_AT(g, CODE + 0x1002, 0xb9, 1, 0, 0, 0, END);
    CODE_AT(g, DATA + 2, 0xb9, 2, 0, 0, 0, END);
    for (unsigned i = 0; i < 3; i++) {
        put(g, pte, (CODE + 0x1000) | PTE_ALL, 8);
        assert_int_equal(run_fresh(g), -1);
        assert_int_equal(g->state.gpr[RCX], 1);
        put(g, pte, DATA | PTE_ALL, 8);
        assert_int_equal(run_fresh(g), -1);
        assert_int_equal(g->state.gpr[RCX], 2);
    }
}

/* ---- single steps ---- */

static void test_step(void **state)
{
    struct guest *g = *state;

    /* nop; nop: the trap comes behind the first. */
    g->base.rflags |= TF;
    CODE_AT(g, CODE, 0x90, 0x90, END);
    assert_int_equal(run_fresh(g), X86_DB);
    assert_int_equal(frame_rip(g), CODE + 1);
    assert_true(g->state.dr6 & 0x4000);

    /* rep stosb: after each element, at the instruction itself while there are more. */
    CODE_AT(g, CODE, 0xf3, 0xaa, END);
    g->base.gpr[RCX] = 2;
    g->base.gpr[RDI] = DATA;
    assert_int_equal(run_fresh(g), X86_DB);
    assert_int_equal(frame_rip(g), CODE);
    assert_int_equal(g->state.gpr[RCX], 1);
    g->base.gpr[RCX] = 1;
    assert_int_equal(run_fresh(g), X86_DB);
    assert_int_equal(frame_rip(g), CODE + 2);
    assert_int_equal(g->state.gpr[RCX], 0);
}

static void test_step_into_a_handler(void **state)
{
    struct guest *g = *state;

    /* int $0x20 clears TF: no trap at the handler's first instruction. */
    g->base.rflags |= TF;
    CODE_AT(g, CODE, 0xcd, 0x20, END);
    assert_int_equal(run_fresh(g), 0x20);
    assert_int_equal(frame_rip(g), CODE + 2);
    assert_false(g->state.dr6 & 0x4000);
    assert_true(get(g, g->state.gpr[RSP] + 16) & TF);
}

static void test_step_out_of_popf(void **state)
{
    struct guest *g = *state;

    /* popf that clears TF still traps; its frame shows TF clear. */
    g->base.rflags |= TF;
    g->base.gpr[RSP] = STACK_TOP - 0x100;
    put(g, STACK_TOP - 0x100, 2, 8);
    CODE_AT(g, CODE, 0x9d, 0x90, END);
    assert_int_equal(run_fresh(g), X86_DB);
    assert_int_equal(frame_rip(g), CODE + 1);
    assert_false(get(g, g->state.gpr[RSP] + 16) & TF);
}

static void test_step_over_mov_ss(void **state)
{
    struct guest *g = *state;

    /* mov %eax, %ss; nop: one trap, behind the nop. */
    g->base.rflags |= TF;
    g->base.gpr[RAX] = KERNEL_DS;
    CODE_AT(g, CODE, 0x8e, 0xd0, 0x90, END);
    assert_int_equal(run_fresh(g), X86_DB);
    assert_int_equal(frame_rip(g), CODE + 3);
}

static void test_step_over_hlt(void **state)
{
    struct guest *g = *state;

    g->base.rflags |= TF;
    CODE_AT(g, CODE, 0xf4, 0x90, END);
    assert_int_equal(run_fresh(g), X86_DB);
    assert_int_equal(frame_rip(g), CODE + 1);
}

/* ---- strings ---- */

static void test_string_alignment(void **state)
{
    struct guest *g = *state;

    /* Eight single bytes are aligned wherever they are; words are not. The OUT behind is privileged
     * here. */
    g->base.seg[SEG_CS] = segment(g, USER_CS);
    g->base.seg[SEG_SS] = g->base.seg[SEG_DS] = g->base.seg[SEG_ES] = segment(g, USER_DS);
    g->base.rflags |= AC;
    g->base.gpr[RCX] = 8;
    g->base.gpr[RSI] = DATA + 1;
    g->base.gpr[RDI] = DATA + 0x803;
    put(g, DATA + 1, 0x1122334455667788, 8);
    CODE_AT(g, CODE, 0xf3, 0xa4, 0xf4); /* rep movsb; hlt */
    assert_int_equal(run_fresh(g), X86_GP);
    assert_int_equal(g->state.gpr[RCX], 0);
    assert_int_equal(get(g, DATA + 0x803), 0x1122334455667788);
    CODE_AT(g, CODE, 0x66, 0xf3, 0xa5); /* rep movsw */
    assert_int_equal(run_fresh(g), X86_AC);
    assert_int_equal(g->state.gpr[RCX], 8);
}

/* A fault in the middle leaves what was done done, and the instruction to go on with. */
static void test_string_fault(void **state)
{
    struct guest *g = *state;

    put(g, TABLES + 0x3000 + (DATA / 4096 + 1) * 8, 0, 8);
    g->base.gpr[RAX] = 0x5a;
    g->base.gpr[RCX] = 0x20;
    g->base.gpr[RDI] = DATA + 0xff0;
    CODE_AT(g, CODE, 0xf3, 0xaa, END);
    assert_int_equal(run_fresh(g), X86_PF);
    assert_int_equal(g->state.cr2, DATA + 0x1000);
    assert_int_equal(g->state.gpr[RCX], 0x10);
    assert_int_equal(g->state.gpr[RDI], DATA + 0x1000);
    assert_int_equal(g->ram[DATA + 0xfff], 0x5a);
}

/* ---- other threads ---- */

static void test_import_forgets(void **state)
{
    struct guest *g = *state;

    /* An NMI for the state before is not for the one that takes its place, but goes along with its
     * own. */
    CODE_AT(g, CODE, 0x90, END);
    interp_engine.signal(&g->vcpu[0], LAPIC_NMI, 0);
    assert_int_equal(run_fresh(g), -1);
    interp_engine.signal(&g->vcpu[0], LAPIC_NMI, 0);
    interp_engine.export_state(&g->vcpu[0], &g->state);
    assert_true(g->state.nmi_pending);
    g->state.rip = CODE;
    assert_int_equal(run(g), X86_NMI);
}

static void *run_second(void *opaque)
{
    struct guest *g = opaque;

    interp_engine.run(&g->vcpu[1]);
    return NULL;
}

static void change_and_call(struct guest *g, unsigned rounds)
{
    pthread_t thread;
    struct x86_state s;

    put(g, DATA, 0, 8);
    put(g, DATA + 64, 0, 8);
    CODE_AT(g, 0x25000, 0xb8, 0, 0, 0, 0, 0xc3); /* FUNCTION: mov $0, %eax; ret */
    g->base.gpr[RDX] = rounds;
    s = g->base;
    s.rip = 0x24000;
    s.gpr[RSP] = STACK_TOP - 0x800;
    interp_engine.import_state(&g->vcpu[1], &s);
    assert_int_equal(pthread_create(&thread, NULL, run_second, g), 0);
    assert_int_equal(run_fresh(g), -1);
    pthread_join(thread, NULL);
    interp_engine.export_state(&g->vcpu[1], &s);
    assert_int_equal(s.gpr[RCX], rounds);
    assert_int_equal(g->state.gpr[RCX], rounds);
    assert_int_equal(get(g, DATA + 64), rounds);
}

static uint64_t seconds(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec;
}

/*
 * One vCPU changes a function and then raises a number; the other one sees the number, calls the
 * function, and compares. It answers before the next change. Where both share a processor with others each
 * answer takes as long as the host's scheduler likes, so how often this is done depends on the time.
 */
static void test_code_changed_by_another_vcpu(void **state)
{
    struct guest *g = *state;
    uint64_t until = seconds() + 5;

    /*
     * The writer: 1: inc %ecx; mov %ecx, FUNCTION+1; mov %ecx, DATA; 2: pause; cmp %ecx, DATA+64;
     * jne 2b; cmp %edx, %ecx; jb 1b; END
     */
    CODE_AT(g, CODE, 0xff, 0xc1, 0x89, 0x0c, 0x25, 0x01, 0x50, 0x02, 0x00, 0x89, 0x0c, 0x25, 0x00,
            0x00, 0x04, 0x00, 0xf3, 0x90, 0x3b, 0x0c, 0x25, 0x40, 0x00, 0x04, 0x00, 0x75, 0xf5,
            0x39, 0xd1, 0x72, 0xe1, END);
    /*
     * The caller: 1: inc %ecx; 2: pause; cmp %ecx, DATA; jne 2b; call FUNCTION; cmp %eax, %ecx; jne
     * 3f; mov %ecx, DATA+64; cmp %edx, %ecx; jb 1b; mov $1, %al; out %al, $PORT_END; hlt; 3: ends
     * both
     */
    CODE_AT(g, 0x24000, 0xff, 0xc1, 0xf3, 0x90, 0x3b, 0x0c, 0x25, 0x00, 0x00, 0x04, 0x00, 0x75,
            0xf5, 0xe8, 0xee, 0x0f, 0x00, 0x00, 0x39, 0xc1, 0x75, 0x10, 0x89, 0x0c, 0x25, 0x40,
            0x00, 0x04, 0x00, 0x39, 0xd1, 0x72, 0xdf, 0xb0, 0x01, 0xe6, PORT_END, 0xf4, 0xb0, 0x00,
            0xe6, PORT_END, 0xb0, 0x01, 0xe6, PORT_END, 0xf4);
    for (unsigned i = 0; i < 20000; i += 500) {
        change_and_call(g, 500);
        if (seconds() >= until)
            break;
    }
}

/* The start of a processor: SIPI may come while INIT is being worked on. */
static void test_sipi_behind_init(void **state)
{
    struct guest *g = *state;
    pthread_t thread;
    struct x86_state s;

    for (unsigned v = 0x80; v < 0xc0; v++) /* mov $v, %al; out %al, $PORT_TELL; cli; hlt */
        CODE_AT(g, v << 12, 0xb0, (uint8_t)v, 0xe6, PORT_TELL, 0xfa, 0xf4);
    x86_state_reset(&s, false);
    interp_engine.import_state(&g->vcpu[1], &s);
    assert_int_equal(pthread_create(&thread, NULL, run_second, g), 0);
    for (unsigned i = 0; i < 5000; i++) {
        unsigned v = 0x80 + i * 37 % 0x40;

        interp_engine.signal(&g->vcpu[1], LAPIC_INIT, 0);
        interp_engine.signal(&g->vcpu[1], LAPIC_SIPI, v);
        while (sem_wait(&g->told))
            ;
        assert_int_equal(g->value, v);
    }
    interp_engine.kick(&g->vcpu[1]);
    pthread_join(thread, NULL);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_store_into_the_next_instruction),
        TEST(test_device_write),
        TEST(test_undefined_instruction_changes),
        TEST(test_crossing_instruction),
        TEST(test_code_segment_off_page_bounds),
        TEST(test_step),
        TEST(test_step_into_a_handler),
        TEST(test_step_out_of_popf),
        TEST(test_step_over_mov_ss),
        TEST(test_step_over_hlt),
        TEST(test_string_alignment),
        TEST(test_string_fault),
        TEST(test_import_forgets),
        TEST(test_code_changed_by_another_vcpu),
        TEST(test_sipi_behind_init),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
