/*
 * What programs do that a sandbox does in another way than the guest's processor: code is run by the interpreter and directly, and
 * everything that the guest can see has to be the same afterwards. Random code is difftest's; this is what that never makes. So many
 * random changes of page tables: test_direct [SEEDS].
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "engine/translate/options.h"
#include "engine/translate/sandbox.h"
#include "engine_guest.h"

#define CODE 0x400000ull
#define CODE_GPA 0x200000u
#define DATA 0x610000ull        /* two pages, then nothing */
#define DATA_GPA 0x320000u
#define DATA_SIZE 0x2000u
#define SYSCALLED (KERNEL_BASE + 0x7000 + 254 * 16)     /* the handler of vector 254, which no exception is */
#define SYSENTERED (KERNEL_BASE + 0x7000 + 253 * 16)

struct snippet {
    const char *name;
    const uint8_t *code, *end;
    bool no_syscall;            /* EFER.SCE is clear */
    uint64_t cr0, cr4;          /* bits that are set */
    uint64_t lstar;             /* 0: SYSCALL ends it */
    bool not_direct;            /* is not expected to run directly */
    bool loses_rax;             /* by what the host's kernel does in its place */
};

#define GUEST(name, text) \
    __asm__(".pushsection .rodata\n" #name ":\n" text "\n" #name "_end:\n.popsection\n"); \
    extern const uint8_t name[], name##_end[]
#define BEGIN "mov $0x1111222233334444, %rax; mov $0x610000, %ebx; mov $0x5555, %ecx; mov $0x6666, %r11d; mov %rcx, (%rbx);"

GUEST(syscall_, BEGIN "syscall");
GUEST(int80, BEGIN "int $0x80");
GUEST(sysenter_, BEGIN "sysenter");
GUEST(int3_, BEGIN "int3");
GUEST(int_3, BEGIN ".byte 0xcd, 3");
GUEST(int1_, BEGIN ".byte 0xf1");
GUEST(into_kernel, BEGIN "mov $0xffffa00000000000, %rdx; mov (%rdx), %rdx");
GUEST(far_up, BEGIN "mov $0x7ffffffff123, %rdx; mov (%rdx), %rdx");
GUEST(far_down, BEGIN "mov 0x123, %rdx");
GUEST(jump_to_kernel, BEGIN "mov $0xffffa00000007000, %rdx; jmp *%rdx");
GUEST(jump_to_vsyscall, BEGIN "mov $0xffffffffff600000, %rdx; call *%rdx");
GUEST(ds_of_other_level, BEGIN "mov $0x28, %eax; mov %eax, %ds; mov %eax, %es; mov 0x612000, %rdx");
GUEST(null_selectors, BEGIN "mov $3, %eax; mov %eax, %ds; mov $1, %eax; mov %eax, %es; mov $2, %eax; mov %eax, %fs; mov 0x612000, %rdx");
GUEST(segments, BEGIN "mov $0x2b, %eax; mov %eax, %ds; mov %eax, %es; mov %eax, %fs; mov %eax, %gs; mov %eax, %ss; hlt");
GUEST(bad_selector, BEGIN "mov $0x63, %eax; mov %eax, %ds; hlt");
GUEST(kernel_fs_base, BEGIN "mov $0xffffa00000000000, %rdx; wrfsbase %rdx; mov 0x612000, %rdx");
GUEST(kernel_gs_base, BEGIN "mov $0xffffa00000000000, %rdx; wrgsbase %rdx; incq 8(%rbx); syscall");
GUEST(bases, BEGIN "mov $0x7fffffffe000, %rdx; wrfsbase %rdx; wrgsbase %rbx; incq %gs:8; mov 0x612000, %rdx");
GUEST(flags_back_and_forth, BEGIN "mov $3, %edi; 1: pushfq; xorl $0x204400, (%rsp); popfq; pushfq; pop 16(%rbx); call 2f; dec %edi; jnz 1b; hlt;"
      "2: mov 0x611000, %rdx; ret");
GUEST(alignment, BEGIN "pushfq; orl $0x40000, (%rsp); popfq; mov 1(%rbx), %edx; hlt");
GUEST(steps, BEGIN "pushfq; orl $0x100, (%rsp); popfq; inc %rdx; inc %rdx");
GUEST(steps_into_syscall, BEGIN "pushfq; orl $0x100, (%rsp); popfq; syscall");
GUEST(cpuid_, BEGIN "mov $1, %eax; xor %ecx, %ecx; cpuid; and $0xffffff, %ebx; mov $7, %eax; xor %ecx, %ecx; cpuid; hlt");
GUEST(tables, BEGIN "lar %ecx, %edx; mov $0x40, %ecx; lsl %ecx, %esi; verr %cx; sldt %edi; hlt");
GUEST(xgetbv_, BEGIN "xor %ecx, %ecx; xgetbv; hlt");
GUEST(to_32_bit, BEGIN "movl $0x400080, (%rsp); movl $0x23, 4(%rsp); ljmp *(%rsp); .balign 128, 0x90; .code32; mov $5, %esi; inc %edi; inc %edi; 1: dec %esi;"
      "jnz 1b; mov 0x611000, %edx; int $0x80; .code64");
GUEST(to_32_bit_and_back, BEGIN "movl $0x400080, (%rsp); movl $0x23, 4(%rsp); ljmp *(%rsp); .balign 128, 0x90; .code32; incl 0x611000; ljmp $0x33, $0x400100;"
      ".balign 128, 0x90; .code64; mov $0x123456789abcdef, %r9; incq 0x611008; syscall");
GUEST(to_kernel_segment, BEGIN "movl $0x400080, (%rsp); movl $0x13, 4(%rsp); ljmp *(%rsp)");
GUEST(writes_itself, BEGIN "lea 1f(%rip), %rdx; mov $20, %edi; 2: incb 1(%rdx); 1: mov $0, %al; add %al, %r8b; dec %edi; jnz 2b; hlt");
/* A stop with one MXCSR, then the default one with AVX's component in use and SSE's not. */
GUEST(default_mxcsr, BEGIN "movl $0x5f80, (%rbx); ldmxcsr (%rbx); rdtsc; lea 0x400(%rbx), %rdi; xor %eax, %eax; mov $8, %ecx; rep stosq;"
      "movl $0x1f80, 0x218(%rbx); movl $4, 0x400(%rbx); mov $6, %eax; xor %edx, %edx; xrstor 0x200(%rbx); rdtsc; xor %eax, %eax; xor %edx, %edx;"
      "stmxcsr 8(%rbx); hlt");
GUEST(port, BEGIN "in $0x10, %al");
GUEST(privileged, BEGIN "wbinvd");
GUEST(random_stack, BEGIN "mov $0x612004, %esp; push %rax");

GUEST(vector, BEGIN "pxor %xmm0, %xmm0; hlt");
GUEST(x87, BEGIN "fld1; hlt");
GUEST(reads_time, BEGIN "rdtsc; hlt");

static const struct snippet snippets[] = {
#define S(name) { #name, name, name##_end }
    S(syscall_), S(int80), S(sysenter_), S(int3_), S(int_3), S(int1_), S(into_kernel), S(far_up), S(far_down), S(jump_to_kernel), { "jump_to_vsyscall", jump_to_vsyscall, jump_to_vsyscall_end, .loses_rax = true },
    S(ds_of_other_level), S(null_selectors), S(segments), S(bad_selector), S(kernel_fs_base), S(kernel_gs_base), S(bases), S(flags_back_and_forth),
    S(alignment), S(steps), S(steps_into_syscall), S(cpuid_), S(tables), S(xgetbv_), S(to_32_bit), S(to_32_bit_and_back), S(to_kernel_segment),
    S(writes_itself), S(default_mxcsr), S(port), S(privileged), S(random_stack), { "no_syscall", syscall_, syscall__end, .no_syscall = true, .not_direct = true },
    { "no_vectors", vector, vector_end, .cr0 = CR0_TS, .not_direct = true }, { "no_x87", x87, x87_end, .cr0 = CR0_EM, .not_direct = true },
    { "no_time", reads_time, reads_time_end, .cr4 = CR4_TSD, .not_direct = true },
};

struct result {
    struct x86_state state;
    enum guest_end end;
    uint8_t frame[48], data[DATA_SIZE];
    uint64_t runs;              /* directly */
};
static struct result *result[2];

static uint64_t direct_runs(const struct engine_guest *g)
{
    struct engine_counters c = { 0 };

    g->engine->counters(&g->vcpu, &c);
    return c.native_runs;
}

static void run_one(struct engine_guest *g, const struct snippet *p, struct result *r)
{
    struct x86_state *s = &r->state;

    memory_fill(&g->machine.memory, CODE_GPA, 0xf4, GUEST_PAGE_SIZE);
    memory_write(&g->machine.memory, CODE_GPA, p->code, (size_t)(p->end - p->code));
    memory_fill(&g->machine.memory, DATA_GPA, 0, DATA_SIZE);
    memset(g->ram + 0x6000 - sizeof(r->frame), 0, sizeof(r->frame));
    *s = g->base;
    s->rip = CODE;
    s->gpr[RSP] = DATA + 0xf00;
    s->rflags = 0x202;
    s->seg[SEG_CS] = engine_guest_segment(g, SEL_CODE64);
    s->seg[SEG_DS] = s->seg[SEG_ES] = (struct x86_seg){ .attr = SEG_UNUSABLE };
    s->star = (uint64_t)SEL_CODE32 << 48 | (uint64_t)SEL_KERNEL_CODE << 32;
    s->sfmask = RFLAGS_IF;
    s->lstar = p->lstar ? p->lstar : SYSCALLED;
    s->sysenter_cs = SEL_KERNEL_CODE;
    s->sysenter_eip = SYSENTERED;
    s->sysenter_esp = KERNEL_BASE + 0x6000;
    s->cr0 |= p->cr0;
    s->cr4 |= p->cr4;
    if (p->no_syscall)
        s->efer &= ~(uint64_t)EFER_SCE;
    r->runs = direct_runs(g);
    r->end = engine_guest_run(g, s);
    r->runs = direct_runs(g) - r->runs;
    memcpy(r->frame, g->ram + 0x6000 - sizeof(r->frame), sizeof(r->frame));
    memcpy(r->data, g->ram + DATA_GPA, DATA_SIZE);
}

static void map(struct engine_guest *g)
{
    engine_guest_map(g, CODE, CODE_GPA, PTE_U | PTE_W);
    engine_guest_map(g, DATA, DATA_GPA, PTE_U | PTE_W | PTE_NX);
    engine_guest_map(g, DATA + 4096, DATA_GPA + 4096, PTE_U | PTE_W | PTE_NX);
}

static void run_all(struct result *r, const char *engine)
{
    struct engine_guest *g = aligned_alloc(64, align_up(sizeof(*g), 64));

    memset(g, 0, sizeof(*g));
    engine_guest_init(g, engine, "host");
    map(g);
    for (unsigned i = 0; i < ARRAY_SIZE(snippets); i++) {
        run_one(g, &snippets[i], &r[i]);
        engine_guest_renew(g);  /* what is in a page of code is looked at once */
    }
    engine_guest_destroy(g);
    free(g);
}

static void compare(const struct snippet *p, const struct result *want, const struct result *got)
{
    const struct x86_state *w = &want->state, *s = &got->state;
    bool equal = want->end == got->end && w->rip == s->rip && w->rflags == s->rflags && w->cr2 == s->cr2;

    for (unsigned i = 0; i < 16; i++)
        if (w->gpr[i] != s->gpr[i] && (i != RAX || !p->loses_rax)) {
            print_message("  register %u: %llx, should be %llx\n", i, (unsigned long long)s->gpr[i], (unsigned long long)w->gpr[i]);
            equal = false;
        }
    for (unsigned i = 0; i < 6; i++)
        equal = equal && w->seg[i].selector == s->seg[i].selector && w->seg[i].base == s->seg[i].base;
    for (unsigned i = 0; i < sizeof(want->frame); i += 8)
        if (memcmp(want->frame + i, got->frame + i, 8) != 0) {
            print_message("  frame at %u: %llx, should be %llx\n", i, *(const unsigned long long *)(const void *)(got->frame + i),
                          *(const unsigned long long *)(const void *)(want->frame + i));
            equal = false;
        }
    if (!equal || memcmp(want->data, got->data, DATA_SIZE) != 0)
        fail_msg("%s: end %d at %llx, flags %llx, CR2 %llx; should be %d at %llx, %llx, %llx", p->name, (int)got->end, (unsigned long long)s->rip,
                 (unsigned long long)s->rflags, (unsigned long long)s->cr2, (int)want->end, (unsigned long long)w->rip,
                 (unsigned long long)w->rflags, (unsigned long long)w->cr2);
    if ((got->runs > 0) == p->not_direct)
        fail_msg("%s ran directly %llu times", p->name, (unsigned long long)got->runs);
}

static void same(void **state)
{
    for (unsigned i = 0; i < ARRAY_SIZE(snippets); i++)
        compare(&snippets[i], &result[0][i], &result[1][i]);
}

/* ---- page tables that change ---- */

#define PAGES_VA 0x40000000ull  /* 16 pages in a table, */
#define LARGE_VA 0x40200000ull  /* …16 in another one or in a large page, */
#define PAGES_GPA 0x400000u     /* …which are any of these 16, */
#define LARGE_GPA 0x800000u     /* …or of the first 16 of these two large ones */
#define STEPS_VA 0x50000000ull
#define STEPS_GPA 0x500000u
#define STEPS 6000u
#define KERNEL_CODE 0xa000u
#define TABLES_VA (KERNEL_BASE + 0x10000000)
#define TABLES_END 0x40000u

/* An entry that the kernel writes, unless its address is 0, with INVLPG for va (0: CR3 is loaded instead); then an access. */
struct step {
    uint64_t entry, value, va, access, write;
};

GUEST(changes_entry, "mov %rsi, (%rdi); test %rdx, %rdx; jz 1f; invlpg (%rdx); sysretq; 1: mov %cr3, %rax; mov %rax, %cr3; sysretq");
GUEST(takes_steps, "1: mov (%rbx), %rdi; mov 8(%rbx), %rsi; mov 16(%rbx), %rdx; test %rdi, %rdi; jz 2f; syscall; 2: mov 24(%rbx), %r8;"
      "cmpq $0, 32(%rbx); jnz 3f; rol $7, %r12; add (%r8), %r12; jmp 4f; 3: mov %r12, (%r8); 4: add $40, %rbx; dec %ebp; jnz 1b; hlt");

static uint64_t chance(uint64_t *x)
{
    *x ^= *x << 13;
    *x ^= *x >> 7;
    *x ^= *x << 17;
    return *x >> 11;
}

/* What each page's entry is changes with the steps; all accesses are allowed. tables: PTEs of both, and PDE of the second. */
static void make_steps(struct engine_guest *g, gpa_t table, gpa_t second, gpa_t directory, uint64_t x)
{
    struct step *step = (struct step *)(void *)(g->ram + STEPS_GPA);
    bool large = false, writable[32];

    memset(writable, true, sizeof(writable));
    for (unsigned i = 0; i < STEPS; i++) {
        unsigned page = chance(&x) % 32;
        struct step *s = &step[i];
        gva_t va = (page < 16 ? PAGES_VA : LARGE_VA - 16 * 4096ull) + page * 4096ull;
        gpa_t place = (page < 16 ? PAGES_GPA : LARGE_GPA + (chance(&x) & 1) * MIB(2)) + chance(&x) % 16 * 4096;
        uint64_t bits = PTE_P | PTE_U | chance(&x) % 2 * PTE_W | chance(&x) % 2 * PTE_A | chance(&x) % 2 * PTE_D | PTE_NX;

        *s = (struct step){ .access = va + chance(&x) % 512 * 8 };
        switch (chance(&x) % 8) {
        case 0: case 1:
            if (page >= 16 && large)
                break;
            s->entry = TABLES_VA + (page < 16 ? table + page * 8 : second + (page - 16) * 8);
            s->value = place | bits;
            s->va = chance(&x) % 8 ? va + 8 : 0;
            writable[page] = bits & PTE_W;
            break;
        case 2:
            if (page < 16)
                break;
            /* Any address in a large page drops all of it; what was a table needs more. */
            s->entry = TABLES_VA + directory;
            s->va = large ? LARGE_VA + chance(&x) % MIB(2) : 0;
            large = chance(&x) % 2;
            s->value = large ? (place & ~(uint64_t)(MIB(2) - 1)) | bits | PTE_W | 0x80 : second | PTE_P | PTE_U | PTE_W | chance(&x) % 2 * PTE_A;
            break;
        }
        s->write = (chance(&x) & 1) && (writable[page] || (page >= 16 && large));
    }
}

static unsigned long seeds = 4;

struct changed {
    struct result result;
    uint8_t tables[TABLES_END - 0x10000], pages[16 * 4096], large[2][16 * 4096];
};

static void change_tables(struct changed *c, const char *engine, uint64_t seed)
{
    struct engine_guest *g = aligned_alloc(64, align_up(sizeof(*g), 64));
    struct snippet p = { "takes_steps", takes_steps, takes_steps_end };
    gpa_t table = 0, second = 0, directory;

    memset(g, 0, sizeof(*g));
    engine_guest_init(g, engine, "host");
    map(g);
    for (unsigned i = 0; i < 16; i++) {
        gpa_t a = engine_guest_map(g, PAGES_VA + i * 4096, PAGES_GPA + i * 4096, PTE_U | PTE_W | PTE_NX);
        gpa_t b = engine_guest_map(g, LARGE_VA + i * 4096, LARGE_GPA + i * 4096, PTE_U | PTE_W | PTE_NX);

        table = a & GUEST_PAGE_MASK;
        second = b & GUEST_PAGE_MASK;
    }
    for (unsigned i = 0; i * 4096 < STEPS * sizeof(struct step); i++)
        engine_guest_map(g, STEPS_VA + i * 4096, STEPS_GPA + i * 4096, PTE_U | PTE_W | PTE_NX);
    for (gpa_t pa = 0x10000; pa < TABLES_END; pa += 4096)
        engine_guest_map(g, TABLES_VA + pa, pa, PTE_W | PTE_NX);
    assert_true(g->next_table <= TABLES_END);
    /* The entry that has the second table's address. */
    for (directory = 0x10000; engine_guest_get(g, directory) >> 12 != second >> 12; directory += 8)
        ;
    for (unsigned i = 0; i < 16 * 4096; i++) {
        g->ram[PAGES_GPA + i] = (uint8_t)(i * 7 + (i >> 12));
        g->ram[LARGE_GPA + i] = (uint8_t)(i * 11 + (i >> 12));
        g->ram[LARGE_GPA + MIB(2) + i] = (uint8_t)(i * 13 + (i >> 12));
    }
    memcpy(g->ram + KERNEL_CODE, changes_entry, (size_t)(changes_entry_end - changes_entry));
    make_steps(g, table, second, directory, seed);
    g->base.gpr[RBX] = STEPS_VA;
    g->base.gpr[RBP] = STEPS;
    p.lstar = KERNEL_BASE + KERNEL_CODE;
    run_one(g, &p, &c->result);
    memcpy(c->tables, g->ram + 0x10000, sizeof(c->tables));
    memcpy(c->pages, g->ram + PAGES_GPA, sizeof(c->pages));
    memcpy(c->large[0], g->ram + LARGE_GPA, sizeof(c->large[0]));
    memcpy(c->large[1], g->ram + LARGE_GPA + MIB(2), sizeof(c->large[1]));
    engine_guest_destroy(g);
    free(g);
}

/* The shadow follows; also accessed and dirty bits are what they are without it. */
static void page_tables(void **state)
{
    struct changed *c[2];

    for (unsigned i = 0; i < 2; i++)
        assert_non_null(c[i] = aligned_alloc(64, align_up(sizeof(*c[i]), 64)));
    for (uint64_t seed = 1; seed <= seeds; seed++) {
        for (unsigned i = 0; i < 2; i++) {
            memset(c[i], 0, sizeof(*c[i]));
            change_tables(c[i], i ? "translate" : "interp", seed * 0x9e3779b97f4a7c15);
        }
        if (c[0]->result.state.gpr[RBP] || c[1]->result.end != GUEST_ENDED)
            fail_msg("seed %u: %u steps are left, the run ended as %d", (unsigned)seed, (unsigned)c[0]->result.state.gpr[RBP], (int)c[1]->result.end);
        compare(&(struct snippet){ .name = "takes_steps" }, &c[0]->result, &c[1]->result);
        for (unsigned i = 0; i < sizeof(c[0]->tables); i += 8)
            if (memcmp(c[0]->tables + i, c[1]->tables + i, 8) != 0)
                fail_msg("seed %u: table entry at %x is %llx, should be %llx", (unsigned)seed, 0x10000 + i,
                         *(unsigned long long *)(void *)(c[1]->tables + i), *(unsigned long long *)(void *)(c[0]->tables + i));
        assert_memory_equal(c[0]->pages, c[1]->pages, sizeof(c[0]->pages));
        assert_memory_equal(c[0]->large, c[1]->large, sizeof(c[0]->large));
        if (c[1]->result.runs <= STEPS / 8)
            fail_msg("seed %u: it ran directly %u times only", (unsigned)seed, (unsigned)c[1]->result.runs);
    }
    free(c[0]);
    free(c[1]);
}

GUEST(counts_down, "mov $200000000, %edi; 1: dec %edi; jnz 1b; hlt");

/* Processor time of what runs in the sandbox is none of this process', and is counted. */
static void processor_time(void **state)
{
    static const struct snippet p = { "counts_down", counts_down, counts_down_end };
    struct engine_guest *g = aligned_alloc(64, align_up(sizeof(*g), 64));
    struct engine_counters c = { 0 };
    struct timespec before, after;
    int64_t own;

    memset(g, 0, sizeof(*g));
    engine_guest_init(g, "translate", "host");
    map(g);
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &before);
    run_one(g, &p, result[0]);
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &after);
    own = (after.tv_sec - before.tv_sec) * 1000000000 + after.tv_nsec - before.tv_nsec;
    g->engine->counters(&g->vcpu, &c);
    engine_guest_destroy(g);
    free(g);
    assert_true(result[0]->runs > 0);
    /* No processor does two of these loops in a cycle, nor has it 8 GHz. */
    assert_true(c.native_cpu_ns > 200000000 / 8);
    assert_true(own < (int64_t)c.native_cpu_ns);
    assert_true(c.native_cpu_ns < c.native_ns + 20000000);
}

static struct engine_guest *new_guest(void)
{
    struct engine_guest *g = aligned_alloc(64, align_up(sizeof(*g), 64));

    memset(g, 0, sizeof(*g));
    engine_guest_init(g, "translate", "host");
    map(g);
    return g;
}

GUEST(adds_up, "mov $0x610000, %ebx; incq (%rbx); mov (%rbx), %rsi; hlt");

/* Natively; but not all of it if something is refused. */
static void run_adds_up(struct engine_guest *g)
{
    static const struct snippet p = { "adds_up", adds_up, adds_up_end };

    run_one(g, &p, result[0]);
    assert_int_equal(result[0]->end, GUEST_ENDED);
    assert_true(result[0]->runs > 0);
    assert_int_equal(result[0]->state.gpr[RSI], 1);
}

/* The machine gets other memory, in a file with the same descriptor: what runs natively has that, too. */
static void other_memory(void **state)
{
    struct engine_guest *g = new_guest();
    struct memory_region *r = memory_find(&g->machine.memory, DATA_GPA);
    uint8_t *copy = malloc(r->size);
    int fd;

    run_adds_up(g);
    fd = memfd_create("other", MFD_CLOEXEC);
    memcpy(copy, r->host, r->size);
    assert_int_equal(ftruncate(fd, (off_t)r->size), 0);
    assert_ptr_equal(mmap(r->host, r->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0), r->host);
    memcpy(r->host, copy, r->size);
    assert_int_equal(dup3(fd, r->fd, O_CLOEXEC), r->fd);
    close(fd);
    free(copy);
    run_adds_up(g);
    engine_guest_destroy(g);
    free(g);
}

/* The number of our only child: the sandbox. */
static pid_t sandbox_number(void)
{
    char path[64];
    int pid = 0;
    FILE *f;

    snprintf(path, sizeof(path), "/proc/self/task/%d/children", (int)gettid());
    f = fopen(path, "r");
    assert_non_null(f);
    assert_int_equal(fscanf(f, "%d", &pid), 1);
    fclose(f);
    return pid;
}

/* The kernel refuses the sandbox all mappings: the interpreter goes on, an instruction at least each time. */
static void no_room(void **state)
{
    struct engine_guest *g = new_guest();

    run_adds_up(g);
    assert_int_equal(prlimit(sandbox_number(), RLIMIT_AS, &(struct rlimit){ 0, 0 }, NULL), 0);
    /* Data lies elsewhere now, which would have to be mapped. */
    for (unsigned i = 1; i <= 3; i++) {
        engine_guest_map(g, DATA, DATA_GPA + i * 0x10000, PTE_U | PTE_W | PTE_NX);
        memory_fill(&g->machine.memory, DATA_GPA + i * 0x10000, 0, GUEST_PAGE_SIZE);
        run_adds_up(g);
    }
    engine_guest_destroy(g);
    free(g);
}

/* ---- threads ---- */

struct kicker {
    struct engine_guest *g;
    atomic_bool stop;
};

static void *kick(void *opaque)
{
    struct kicker *k = opaque;

    while (!atomic_load(&k->stop)) {
        k->g->engine->signal(&k->g->vcpu, LAPIC_NMI, 0);
        sched_yield();
    }
    return NULL;
}

static void *run_in_thread(void *g)
{
    run_adds_up(g);
    return NULL;
}

/* Each time in another thread, so that sandboxes come and go, while another one wants something of the vCPU without end. */
static void other_threads(void **state)
{
    struct engine_guest *g = new_guest();
    struct kicker k = { .g = g };
    pthread_t kicking, running;
    uint64_t before;
    struct engine_counters c = { 0 };

    engine_guest_ignore_nmi(g);
    g->engine->counters(&g->vcpu, &c);
    before = c.native_sandboxes;
    assert_int_equal(pthread_create(&kicking, NULL, kick, &k), 0);
    for (unsigned i = 0; i < 30; i++) {
        assert_int_equal(pthread_create(&running, NULL, run_in_thread, g), 0);
        pthread_join(running, NULL);
    }
    atomic_store(&k.stop, true);
    pthread_join(kicking, NULL);
    g->engine->counters(&g->vcpu, &c);
    assert_true(c.native_sandboxes >= before + 30);
    engine_guest_destroy(g);
    free(g);
}

/* Who starts a machine asks which engine to take, and does not want to pay for what it may not use. */
static void probe_is_cheap(void **state)
{
    struct engine_report report;
    struct rusage before, after;
    char text[256] = "";

    getrusage(RUSAGE_CHILDREN, &before);
    translate_engine.probe(&report);
    getrusage(RUSAGE_CHILDREN, &after);
    assert_true(report.usable);
    assert_memory_equal(&before, &after, sizeof(before));
    translate_engine.describe(text, sizeof(text));
    assert_non_null(strstr(text, "natively"));
}

static int setup(void **state)
{
    translate_options.direct = TRANSLATE_DIRECT_ALWAYS;
    for (unsigned i = 0; i < 2; i++) {
        size_t size = align_up(sizeof(struct result) * ARRAY_SIZE(snippets), 64);

        result[i] = aligned_alloc(64, size);
        if (!result[i])
            return -1;
        memset(result[i], 0, size);
        run_all(result[i], i ? "translate" : "interp");
    }
    return 0;
}

static int teardown(void **state)
{
    free(result[0]);
    free(result[1]);
    return 0;
}

int main(int argc, char **argv)
{
    int failed;

    const struct CMUnitTest first[] = { cmocka_unit_test(probe_is_cheap) };     /* before anybody asks for sandboxes */
    const struct CMUnitTest tests[] = { cmocka_unit_test(same), cmocka_unit_test(page_tables), cmocka_unit_test(processor_time),
                                        cmocka_unit_test(other_memory), cmocka_unit_test(no_room), cmocka_unit_test(other_threads) };

    if (argc > 1)
        seeds = strtoul(argv[1], NULL, 0);
    failed = cmocka_run_group_tests(first, NULL, NULL);
    if (!sandbox_abilities()->usable) {
        fprintf(stderr, "skipped: %s\n", sandbox_abilities()->text);
        return failed ? 1 : 77;
    }
    return failed + cmocka_run_group_tests(tests, setup, teardown);
}
