/*
 * The state of a whole machine, against a run that nobody interrupts: a guest is stopped at random moments, saved, loaded
 * into a machine made anew (with the other engine, too), and goes on; what it computed in the end must be the same, and a
 * state that was loaded must be saved with the same bytes.
 *
 *     test_machine_state [seed [rounds]]
 */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "base/log.h"
#include "base/state.h"
#include "engine_guest.h"
#include "vm/state.h"

#define CODE 0x100000u
#define DATA 0x200000u          /* 1 MiB that the guest works on */
#define STACK 0x400000u
#define MODEL "x86-64-v2"

/*
 * The guest: integer, vector and string instructions over 1 MiB, with flags that live across instructions, and a page of
 * code that it writes itself. RDI: data; RCX: rounds.
 */
__asm__(".section .rodata\n"
        ".global guest_begin, guest_end\n"
        "guest_begin:\n"
        "    mov $1442695040888963407, %r9\n"
        "    mov $6364136223846793005, %r10\n"
        "    xor %eax, %eax\n"
        "    pxor %xmm0, %xmm0\n"
        "    lea made(%rip), %r12\n"
        "1:  imul %r10, %rax\n"
        "    add %r9, %rax\n"
        "    mov %rax, %rbx\n"
        "    shr $44, %rbx\n"
        "    and $~15, %ebx\n"
        "    adc %rax, (%rdi,%rbx)\n"
        "    rol $3, %r8\n"
        "    xor (%rdi,%rbx), %r8\n"
        "    movdqu (%rdi,%rbx), %xmm1\n"
        "    paddq %xmm1, %xmm0\n"
        "    pshufd $0x39, %xmm0, %xmm0\n"
        "    mov %r8d, %r11d\n"
        "    and $0x8d5, %r11d\n"              /* arithmetic flags */
        "    push %r11\n"
        "    popfq\n"
        "    sbb %rdx, %r8\n"
        "    pushfq\n"
        "    pop %r11\n"
        "    add %r11, %r8\n"
        "    test $0x3ff, %ecx\n"
        "    jnz 2f\n"
        "    cld\n"
        "    mov %rcx, %r13\n"
        "    mov %rdi, %r14\n"
        "    lea 0x80000(%rdi), %rsi\n"
        "    mov $0x8000, %ecx\n"
        "    rep movsb\n"
        "    mov %r14, %rdi\n"
        "    mov %r13, %rcx\n"
        "    mov %eax, 1(%r12)\n"               /* the operand of made's MOV */
        "    call *%r12\n"
        "2:  dec %rcx\n"
        "    jnz 1b\n"
        "    movdqu %xmm0, (%rdi)\n"
        "    mov %r8, 16(%rdi)\n"
        "    mov %rdx, 24(%rdi)\n"
        "    out %al, $0x10\n"
        "3:  jmp 3b\n"
        "    .balign 4096\n"
        "made:\n"
        "    mov $0, %edx\n"
        "    ret\n"
        "guest_end:\n"
        ".previous\n");
extern const uint8_t guest_begin[], guest_end[];

static uint64_t seed;

static uint64_t next_random(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed;
}

static _Noreturn void fail(const char *what)
{
    printf("FAIL: %s\n", what);
    exit(1);
}

static struct engine_guest *make(const char *engine)
{
    struct engine_guest *g = calloc(1, sizeof(*g));

    engine_guest_init(g, engine, MODEL);
    for (gpa_t at = CODE; at < STACK; at += GUEST_PAGE_SIZE)
        engine_guest_map(g, at, at, PTE_W);
    return g;
}

static void start(struct engine_guest *g, uint64_t rounds)
{
    struct x86_state s = g->base;

    memcpy(g->ram + CODE, guest_begin, (size_t)(guest_end - guest_begin));
    for (unsigned i = 0; i < MIB(1); i++)
        g->ram[DATA + i] = (uint8_t)(i * 7 + (i >> 9));
    s.seg[SEG_CS] = engine_guest_segment(g, SEL_KERNEL_CODE);
    s.seg[SEG_SS] = engine_guest_segment(g, SEL_KERNEL_DATA);
    s.rip = CODE;
    s.gpr[RSP] = STACK;
    s.gpr[RDI] = DATA;
    s.gpr[RCX] = rounds;
    s.tsc_offset = 1234567;
    g->engine->import_state(&g->vcpu, &s);
}

/* Kicks the vCPU after some microseconds. */
struct kicker {
    struct engine_guest *g;
    unsigned microseconds;
};

static void *kick(void *opaque)
{
    struct kicker *k = opaque;
    struct timespec t = { .tv_nsec = k->microseconds * 1000l };

    nanosleep(&t, NULL);
    k->g->engine->kick(&k->g->vcpu);
    return NULL;
}

/* Until the guest is done, or for some time. True when it is done. */
static bool run(struct engine_guest *g, unsigned microseconds)
{
    struct kicker k = { g, microseconds };
    struct x86_state s;
    pthread_t thread;

    if (microseconds && pthread_create(&thread, NULL, kick, &k))
        fail("no thread");
    if (g->engine->run(&g->vcpu) != VM_EXIT_KICK)
        fail("the guest died");
    if (microseconds)
        pthread_join(thread, NULL);
    g->engine->export_state(&g->vcpu, &s);
    if (s.rip >= KERNEL_BASE)
        fail("the guest had an exception");
    return s.gpr[RCX] == 0 && g->ram[s.rip] == 0xeb;     /* at the jump to itself */
}

static struct vm_hardware hardware(struct engine_guest *g)
{
    return (struct vm_hardware){ .machine = &g->machine, .engine = g->engine, .vcpus = { &g->vcpu }, .cpus = 1,
                                 .model = g->model, .tsc_hz = g->vcpu.tsc_hz };
}

struct saved {
    struct state_writer *w;
    const void *data;
    size_t len;
};

static struct saved save(struct engine_guest *g)
{
    struct vm_hardware hw = hardware(g);
    struct vm_standstill still;
    struct saved s = { .w = state_writer_create() };

    pthread_mutex_lock(&g->machine.lock);
    vm_stand_still(&hw, &still);
    vm_state_save(&hw, &still, s.w);
    vm_go_on(&hw, &still);
    pthread_mutex_unlock(&g->machine.lock);
    if (state_writer_finish(s.w, &s.data, &s.len))
        fail("the state cannot be written");
    return s;
}

static void load(struct engine_guest *g, const struct saved *s)
{
    struct vm_hardware hw = hardware(g);
    struct vm_standstill still;
    struct state_reader r;
    int err;

    state_reader_init(&r, s->data, s->len);
    pthread_mutex_lock(&g->machine.lock);
    err = vm_state_load(&hw, &still, &r);
    if (!err)
        vm_go_on(&hw, &still);
    pthread_mutex_unlock(&g->machine.lock);
    if (err)
        fail("the state cannot be loaded");
}

/* Moves the guest into a machine made anew, which takes the place of the old one. */
static struct engine_guest *move(struct engine_guest *g, const char *engine)
{
    struct engine_guest *to = make(engine);
    struct saved before = save(g), after;

    memcpy(to->ram, g->ram, GUEST_RAM_SIZE);
    load(to, &before);
    after = save(to);
    if (before.len != after.len || memcmp(before.data, after.data, before.len) != 0)
        fail("a loaded state is saved with other bytes");
    state_writer_free(before.w);
    state_writer_free(after.w);
    engine_guest_destroy(g);
    free(g);
    return to;
}

static void check_same(const char *engine, unsigned rounds, bool other_engine)
{
    struct engine_guest *straight = make(engine), *moved = make(engine);
    struct saved a, b;
    unsigned moves = 0;

    start(straight, rounds);
    start(moved, rounds);
    while (!run(straight, 0))
        ;
    while (!run(moved, 1 + (unsigned)(next_random() % 2000))) {
        bool other = other_engine && next_random() % 2;

        moved = move(moved, other && strcmp(moved->engine->name, "interp") == 0 ? "translate" : other ? "interp" : moved->engine->name);
        moves++;
    }
    a = save(straight);
    b = save(moved);
    if (a.len != b.len || memcmp(a.data, b.data, a.len) != 0)
        fail("a guest that was moved ends in another state");
    if (memcmp(straight->ram, moved->ram, GUEST_RAM_SIZE) != 0)
        fail("a guest that was moved leaves another memory behind");
    printf("%s%s: %u rounds, moved %u times\n", engine, other_engine ? " and others" : "", rounds, moves);
    state_writer_free(a.w);
    state_writer_free(b.w);
    engine_guest_destroy(straight);
    engine_guest_destroy(moved);
    free(straight);
    free(moved);
}

int main(int argc, char **argv)
{
    unsigned rounds = argc > 2 ? (unsigned)strtoul(argv[2], NULL, 0) : 200000;

    seed = argc > 1 ? strtoull(argv[1], NULL, 0) : 1;
    if (!seed)
        seed = 1;
    check_same("interp", rounds / 4, false);
    check_same("translate", rounds, false);
    check_same("translate", rounds, true);
    return 0;
}
