/*
 * How long a vCPU goes on after somebody wants it: guests that do all they can not to be interrupted, kicked at random moments.
 *
 *     test_latency ENGINE [KICKS [BOUND_US]]
 *
 * What is measured is processor time of the vCPU's thread, between the kick and the end of the run, so that a busy host does not
 * matter. An interrupt of a device takes the same way through an engine as a kick. Prints a line for each guest; exit status 1 when one
 * took longer than the bound, 77 when this host lacks the engine.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "engine_guest.h"

/*
 * A unit to be translated or some pages of REP MOVSB may come first, some 0.1 ms; seldom, when memory for code is full, all of it is
 * dropped, which took 1.4 ms. What the guests do at a time takes up to seconds.
 */
#define BOUND_US 5000.0
#define KICKS 60
#define KICKER_US 50.0          /* a kick that took longer was itself interrupted */

#define CODE 0x400000ull
#define CODE_GPA 0x200000u
#define CODE_SIZE 0x40000u
#define DATA 0x10000000ull      /* 32 MiB, all of it zeros to begin with */
#define DATA_GPA 0x1000000u
#define DATA_SIZE 0x2000000u
#define HOLE 0x30000000ull      /* addresses where no memory is: each access leaves the processor */
#define HOLE_GPA 0xd0000000u
#define STACK_TOP (DATA + DATA_SIZE - 0x1000)

/* Position-independent code that never ends, in 64-bit mode at privilege level 0. RBX: DATA. */
#define GUEST(name, text) \
    __asm__(".section .rodata\n.global guest_" #name ", guest_" #name "_end\nguest_" #name ":\n" text "\nguest_" #name "_end:\n.previous"); \
    extern const uint8_t guest_##name[], guest_##name##_end[];

GUEST(loop, "1: dec %rcx; jmp 1b")
GUEST(straight, "1: .rept 8000; add %rax, %rcx; lea 3(%rcx), %rax; xor %rcx, %rdx; .endr; jmp 1b")
GUEST(loads, "1: .rept 6000; mov 64(%rbx), %rcx; add %rcx, (%rbx); .endr; jmp 1b")
GUEST(vectors, "1: .rept 4000; mulpd %xmm1, %xmm2; addpd 16(%rbx), %xmm2; divpd %xmm2, %xmm3; .endr; jmp 1b")
GUEST(x87, "fninit; fldpi; 1: fsin; fptan; fstp %st(0); fpatan; fldpi; jmp 1b")
GUEST(indirect, "1: lea 2f(%rip), %rax; jmp *%rax; 2: lea 3f(%rip), %rdx; jmp *%rdx; 3: dec %rcx; lea 1b(%rip), %rax; jmp *%rax")
GUEST(calls, "1: call 2f; call 3f; jmp 1b; 2: call 3f; ret; 3: ret")
GUEST(recursion, "0: mov $400000, %ecx; call 1f; jmp 0b; 1: dec %ecx; jz 2f; call 1b; 2: ret")
GUEST(movs, "1: lea 0x1000000(%rbx), %rdi; mov %rbx, %rsi; mov $0xff0000, %ecx; rep movsb; jmp 1b")
GUEST(movs_near, "1: lea 1(%rbx), %rdi; mov %rbx, %rsi; mov $0x1000000, %ecx; rep movsb; jmp 1b")
GUEST(movs_down, "std; 1: lea 0x1000003(%rbx), %rdi; lea 0x1000000(%rbx), %rsi; mov $0x100000, %ecx; rep movsq; jmp 1b")
GUEST(stos, "1: mov %rbx, %rdi; xor %eax, %eax; mov $0x400000, %ecx; rep stosl; jmp 1b")
GUEST(lods, "1: mov %rbx, %rsi; mov $0x1000000, %ecx; rep lodsb; jmp 1b")
GUEST(lods_loop, "1: mov %rbx, %rsi; mov $0x1000000, %ecx; 2: lodsb; dec %ecx; jnz 2b; jmp 1b")
GUEST(scas, "1: mov %rbx, %rdi; mov $0xa5, %al; mov $0x1000000, %ecx; repne scasb; jmp 1b")
GUEST(cmps, "1: mov %rbx, %rdi; lea 0x1000(%rbx), %rsi; mov $0x1000000, %ecx; repe cmpsb; jmp 1b")
GUEST(outs, "1: mov %rbx, %rsi; mov $0x700, %edx; mov $0x1000000, %ecx; rep outsb; jmp 1b")
GUEST(ins, "1: lea 0x1000000(%rbx), %rdi; mov $0x700, %edx; mov $0x100000, %ecx; rep insl; jmp 1b")
GUEST(stos_hole, "1: mov $0x30000000, %edi; mov $0x100000, %ecx; rep stosb; jmp 1b")
GUEST(movs_hole, "1: mov %rbx, %rdi; mov $0x30000000, %esi; mov $0x100000, %ecx; rep movsb; jmp 1b")
GUEST(fences, "1: mov $0x10000000, %ebx; mfence; lock incq (%rbx); xor %eax, %eax; xor %ecx, %ecx; cpuid; jmp 1b")
GUEST(flushes, "1: mov %cr3, %rax; mov %rax, %cr3; incq (%rbx); jmp 1b")
GUEST(faults, "1: ud2; jmp 1b")
GUEST(self, "1: incl 2f-4(%rip); mov $0, %eax; 2: dec %rcx; jmp 1b")
GUEST(halted, "cli; 1: hlt; jmp 1b")

static const struct program {
    const char *name;
    const uint8_t *code, *end;
} programs[] = {
#define PROGRAM(name) { #name, guest_##name, guest_##name##_end },
    PROGRAM(loop) PROGRAM(straight) PROGRAM(loads) PROGRAM(vectors) PROGRAM(x87) PROGRAM(indirect) PROGRAM(calls) PROGRAM(recursion)
    PROGRAM(movs) PROGRAM(movs_near) PROGRAM(movs_down) PROGRAM(stos) PROGRAM(lods) PROGRAM(lods_loop) PROGRAM(scas) PROGRAM(cmps) PROGRAM(outs)
    PROGRAM(ins) PROGRAM(stos_hole) PROGRAM(movs_hole) PROGRAM(fences) PROGRAM(flushes) PROGRAM(faults) PROGRAM(self) PROGRAM(halted)
};

static struct engine_guest *guest;
static clockid_t vcpu_clock;
static atomic_uint wanted, kicking, kicked;     /* kicks that the vCPU's thread waits for, that begin, and that were given */
static _Atomic uint64_t before, after;          /* processor time of the vCPU's thread around the kick */

static uint64_t read_clock(clockid_t clock)
{
    struct timespec t;

    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

/* Gives each kick 0.2 to 3 ms after it is wanted. */
static void *kick(void *opaque)
{
    uint64_t random = 88172645463325252;

    for (unsigned n = 1;; n++) {
        random ^= random << 13, random ^= random >> 7, random ^= random << 17;
        while (atomic_load(&wanted) < n)
            usleep(50);
        usleep((useconds_t)(200 + random % 2800));
        atomic_store(&before, read_clock(vcpu_clock));
        atomic_store(&kicking, n);
        guest->engine->kick(&guest->vcpu);
        atomic_store(&after, read_clock(vcpu_clock));
        atomic_store(&kicked, n);
    }
    return NULL;
}

static struct x86_state *start(const struct program *p)
{
    struct x86_state *s = aligned_alloc(64, align_up(sizeof(*s), 64));

    *s = guest->base;
    memory_write(&guest->machine.memory, CODE_GPA, p->code, (uint64_t)(p->end - p->code));
    memory_fill(&guest->machine.memory, DATA_GPA, 0, DATA_SIZE);
    s->seg[SEG_CS] = engine_guest_segment(guest, SEL_KERNEL_CODE);
    s->seg[SEG_SS] = engine_guest_segment(guest, SEL_KERNEL_DATA);
    s->rip = CODE;
    s->gpr[RSP] = STACK_TOP;
    s->gpr[RBX] = DATA;
    return s;
}

static bool run(const struct program *p, unsigned kicks, double bound)
{
    static unsigned given;
    struct x86_state *s = start(p);
    double most = 0, sum = 0;

    for (unsigned i = 0, tries = 0; i < kicks && tries < 10 * kicks; tries++) {
        uint64_t now;
        double spent;

        given++;
        atomic_store(&wanted, given);
        do {                    /* a guest that faults, where the handler's port kicks: the next instruction */
            if (engine_guest_run(guest, s) != GUEST_ENDED) {
                printf("FAIL %s: the run did not end\n", p->name);
                free(s);
                return false;
            }
            now = read_clock(CLOCK_THREAD_CPUTIME_ID);
            if (s->rip >= KERNEL_BASE) {
                s->gpr[RSP] = STACK_TOP;
                s->rip = CODE;
            }
        } while (atomic_load(&kicking) != given);
        while (atomic_load(&kicked) != given)
            usleep(10);
        /* One that ended by itself just then does not count either; the kick ends the next run at once, which is then gone on with. */
        if (now < atomic_load(&before) || (double)(atomic_load(&after) - atomic_load(&before)) / 1e3 > KICKER_US)
            continue;
        i++;
        spent = (double)(now - atomic_load(&before)) / 1e3;
        sum += spent;
        most = MAX(most, spent);
    }
    free(s);
    printf("%s %-10s %8.1f µs at most, %6.1f on average\n", most <= bound ? "    " : "FAIL", p->name, most, sum / kicks);
    fflush(stdout);
    return most <= bound;
}

int main(int argc, char **argv)
{
    unsigned kicks = argc > 2 ? (unsigned)atoi(argv[2]) : KICKS;
    double bound = argc > 3 ? atof(argv[3]) : BOUND_US;
    pthread_t kicker;
    bool good = true;

    guest = aligned_alloc(64, align_up(sizeof(*guest), 64));
    memset(guest, 0, sizeof(*guest));
    engine_guest_init(guest, argc > 1 ? argv[1] : "translate", "host");
    if (guest->emulated) {
        fprintf(stderr, "skipped: this host's KVM emulates the guest\n");
        return 77;
    }
    for (unsigned at = 0; at < CODE_SIZE; at += GUEST_PAGE_SIZE)
        engine_guest_map(guest, CODE + at, CODE_GPA + at, PTE_W);
    for (unsigned at = 0; at < DATA_SIZE; at += GUEST_PAGE_SIZE)
        engine_guest_map(guest, DATA + at, DATA_GPA + at, PTE_W);
    for (unsigned at = 0; at < 0x100000; at += GUEST_PAGE_SIZE)
        engine_guest_map(guest, HOLE + at, HOLE_GPA + at, PTE_W);
    if (pthread_getcpuclockid(pthread_self(), &vcpu_clock) || pthread_create(&kicker, NULL, kick, NULL))
        return 2;
    for (unsigned i = 0; i < ARRAY_SIZE(programs); i++)
        good &= run(&programs[i], kicks, bound);
    return good ? 0 : 1;
}
