/*
 * What programs do that a sandbox does in another way than the guest's processor: code is run by the interpreter and directly, and
 * everything that the guest can see has to be the same afterwards. Random code is difftest's; this is what that never makes.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

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
    S(writes_itself), S(port), S(privileged), S(random_stack), { "no_syscall", syscall_, syscall__end, .no_syscall = true, .not_direct = true },
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
    s->star = (uint64_t)SEL_KERNEL_CODE << 32;
    s->lstar = SYSCALLED;
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

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(same), cmocka_unit_test(processor_time) };

    if (!sandbox_abilities()->usable) {
        fprintf(stderr, "skipped: %s\n", sandbox_abilities()->text);
        return 77;
    }
    return cmocka_run_group_tests(tests, setup, teardown);
}
