/*
 * The process in which cases run natively.
 *
 * Its whole life is inside one signal handler on its own stack: a fault ends a case, the handler stores the state
 * from the signal frame and puts the next case's state into the same frame, and the return from the handler
 * enters it. So state is loaded and read by the kernel, exactly and completely, for two kernel entries a case.
 *
 * Behind the entry no sanitizer is at work: this file is compiled without, its memory of bookkeeping lies where cases expect none and is
 * unmapped, and nothing is called that a sanitizer intercepts.
 *
 * System calls are forbidden to the cases by a filter; a timer finds endless loops. Of this process's memory a case can reach
 * everything, but it does not know where it is; what lies at the top, where interesting addresses are, is unmapped.
 */
#include "diff_host.h"

#include <asm/ldt.h>
#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <unistd.h>

#include "base/util.h"

#define TICK_US 4000            /* a case that sees two ticks is taken for endless */
#define SELECTOR_CODE64 0x33
#define SELECTOR_CODE32 0x23
#define SELECTOR_DATA 0x2b
#define USER_END 0x800000000000ul
/* Where AddressSanitizer keeps what it knows about memory; without it nothing is there at first. */
#define SHADOW_START 0x7fff8000ul
#define SHADOW_END 0x10007fff8000ul
#define FRAME_KERNEL_BYTES 464  /* of the legacy area: what follows up to 512 is the kernel's */

static struct host_shared *shared;
static uint8_t *code_view, *data_view;
static uint32_t position;       /* slot that runs; count: none */
static uint32_t tick_position = UINT32_MAX;
static uint8_t alternate_stack[256 * 1024] __attribute__((aligned(64)));

/* Mappings above the libraries, where random addresses like to be: the first stack, vDSO and its data. */
static struct range { uint64_t start, end; } top[16];
static unsigned tops;

/* Of the interrupted case, and this process's own; used by the entry below. */
uint64_t host_case_fs, host_case_gs, host_own_fs, host_own_gs;
void host_entry(int number, siginfo_t *info, void *context);
void host_handle(int number, siginfo_t *info, ucontext_t *context);

/* Before any C code: AC, DF, NT and ID as compiled code and the next case expect them, and the thread's own FS base. */
__asm__(".text\n"
        ".globl host_entry\n"
        ".type host_entry, @function\n"
        "host_entry:\n"
        "pushfq\n\t"
        "andl $~0x244400, (%rsp)\n\t"
        "popfq\n\t"
        "rdfsbase %rax\n\t"
        "movq %rax, host_case_fs(%rip)\n\t"
        "rdgsbase %rax\n\t"
        "movq %rax, host_case_gs(%rip)\n\t"
        "movq host_own_fs(%rip), %rax\n\t"
        "wrfsbase %rax\n\t"
        "movq host_own_gs(%rip), %rax\n\t"
        "wrgsbase %rax\n\t"
        "subq $8, %rsp\n\t"
        "call host_handle\n\t"
        "addq $8, %rsp\n\t"
        "movq host_case_fs(%rip), %rax\n\t"
        "wrfsbase %rax\n\t"
        "movq host_case_gs(%rip), %rax\n\t"
        "wrgsbase %rax\n\t"
        "ret\n"
        ".size host_entry, . - host_entry\n");

static void copy(void *to, const void *from, size_t n)
{
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n) : : "memory");
}

static void fill(void *to, int value, size_t n)
{
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(n) : "a"(value) : "memory");
}

static long futex(_Atomic uint32_t *word, int op, uint32_t value)
{
    return syscall(SYS_futex, word, op, value, NULL, NULL, 0);
}

static void wait_for_batch(void)
{
    uint32_t done = atomic_load(&shared->done);

    while (atomic_load(&shared->posted) == done)
        futex(&shared->posted, FUTEX_WAIT, done);
    position = shared->first;
}

static void batch_done(void)
{
    atomic_fetch_add(&shared->done, 1);
    futex(&shared->done, FUTEX_WAKE, 1);
}

/* ---- memory ---- */

static bool equal_line(const uint8_t *a, const uint8_t *b)
{
    const uint64_t *x = (const uint64_t *)(const void *)a, *y = (const uint64_t *)(const void *)b;
    uint64_t difference = 0;

    for (unsigned i = 0; i < LINE / 8; i++)
        difference |= x[i] ^ y[i];
    return !difference;
}

/* Takes what changed, and undoes it. */
static void collect_data(struct host_slot *s)
{
    fill(s->changed, 0, sizeof(s->changed));
    for (unsigned i = 0; i < DATA_LINES; i++) {
        if (equal_line(data_view + i * LINE, shared->data + i * LINE))
            continue;
        s->changed[i / 64] |= 1ull << (i % 64);
        copy(s->line[i], data_view + i * LINE, LINE);
        copy(data_view + i * LINE, shared->data + i * LINE, LINE);
    }
}

/* ---- frames ---- */

static void store_case(const ucontext_t *u)
{
    struct host_slot *s = &shared->slot[position];

    copy(s->gregs, u->uc_mcontext.gregs, sizeof(s->gregs));
    s->fs_base = host_case_fs;
    s->gs_base = host_case_gs;
    copy(s->image, u->uc_mcontext.fpregs, shared->image_size);
    collect_data(s);
    if (shared->writes_code)
        fill(code_view, CODE_FILL, CODE_SIZE);
    else
        fill(code_view + s->start, CODE_FILL, s->bytes);
}

static void load_case(ucontext_t *u)
{
    struct host_slot *s = &shared->slot[position];
    greg_t *g = u->uc_mcontext.gregs;
    uint8_t *image = (uint8_t *)u->uc_mcontext.fpregs;
    uint64_t code = s->code_size == 8 ? SELECTOR_CODE64 : s->code_size == 4 ? SELECTOR_CODE32 : SEL_CODE16;
    uint64_t stack = s->code_size == 2 ? SEL_DATA16 : SELECTOR_DATA;

    atomic_store(&shared->current, position);
    copy(code_view + s->start, s->code, s->bytes);
    copy(g, s->gregs, (REG_EFL + 1) * sizeof(greg_t));
    g[REG_CSGSFS] = (greg_t)(code | stack << 48);
    copy(image, s->image, FRAME_KERNEL_BYTES);
    copy(image + 512, s->image + 512, shared->image_size - 512);
    host_case_fs = s->fs_base;
    host_case_gs = s->gs_base;
}

/* The size of the XSAVE image in a frame (Linux, struct _fpx_sw_bytes). */
static uint32_t frame_image_size(const ucontext_t *u)
{
    const uint8_t *image = (const uint8_t *)u->uc_mcontext.fpregs;
    uint32_t magic, size;

    magic = load_le32(image + 464);
    size = load_le32(image + 480);
    return magic == 0x46505853 && size <= IMAGE_SIZE ? size : 0;
}

static _Noreturn void fail(const char *what)
{
    fprintf(stderr, "difftest: native side: %s: %s\n", what, strerror(errno));
    _exit(1);
}

/* Only what this process needs itself; anything else ends the case by SIGSYS. */
static void forbid_system_calls(void)
{
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 0, 4),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_rt_sigreturn, 3, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_futex, 2, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_exit_group, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = { .len = sizeof(filter) / sizeof(filter[0]), .filter = filter };

    if (syscall(SYS_prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || syscall(SYS_prctl, PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
        fail("seccomp");
}

void host_handle(int number, siginfo_t *info, ucontext_t *u)
{
    if (number == SIGUSR1) {            /* from ourselves: the beginning; nothing returns to the first stack */
        for (unsigned i = 0; i < tops; i++)
            syscall(SYS_munmap, top[i].start, top[i].end - top[i].start);
        forbid_system_calls();
        shared->image_size = frame_image_size(u);
        position = shared->count = 0;
    } else {
        if (number == SIGPROF && tick_position != position) {
            tick_position = position;
            return;                     /* the case goes on */
        }
        shared->slot[position].end = number == SIGPROF ? END_TIMEOUT : number == SIGSYS ? END_SYSTEM_CALL : END_FAULT;
        store_case(u);
        position++;
    }
    tick_position = UINT32_MAX;
    if (position == shared->count) {
        batch_done();
        wait_for_batch();
    }
    load_case(u);
}

/* ---- setting up ---- */

static void find_top(void)
{
    FILE *maps = fopen("/proc/self/maps", "re");
    char line[512];

    while (maps && fgets(line, sizeof(line), maps) && tops < sizeof(top) / sizeof(top[0])) {
        char access[5];
        bool shadow;

        if (sscanf(line, "%lx-%lx %4s", &top[tops].start, &top[tops].end, access) != 3)
            continue;
        shadow = top[tops].start < SHADOW_END && top[tops].end > SHADOW_START;
        if (shadow && access[0] == '-')         /* the gap in it, where pages around 4 GiB are to be */
            munmap((void *)top[tops].start, top[tops].end - top[tops].start);
        else if (shadow || ((strstr(line, "[stack]") || strstr(line, "[v")) && top[tops].end <= USER_END))
            tops++;
    }
    if (!maps)
        fail("/proc/self/maps");
    fclose(maps);
}

static void *map(uint64_t address, size_t size, int protection, int fd, size_t offset)
{
    void *p = mmap((void *)address, size, protection, MAP_SHARED | MAP_POPULATE | (address ? MAP_FIXED_NOREPLACE : 0), fd,
                   (off_t)offset);

    if (p == MAP_FAILED)
        fail("mmap");
    return p;
}

static void add_segment(unsigned selector, uint32_t base, uint32_t limit, unsigned contents)
{
    struct user_desc d = { .entry_number = selector >> 3, .base_addr = base, .limit = limit, .contents = contents };

    if (syscall(SYS_modify_ldt, 0x11, &d, sizeof(d)))
        fail("modify_ldt");
}

static void map_window(uint64_t base, int fd)
{
    for (unsigned i = 0; i < WINDOW_PAGES; i++)
        if (window[i].access != WINDOW_NONE)
            map(base + i * 4096, 4096, window[i].access == WINDOW_WRITE ? PROT_READ | PROT_WRITE : PROT_READ, fd,
                window[i].page * 4096u);
}

void host_child(const struct host_memory *memory)
{
    static const int signals[] = { SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, SIGSYS, SIGPROF, SIGUSR1 };
    stack_t stack = { .ss_sp = alternate_stack, .ss_size = sizeof(alternate_stack) };
    struct itimerval timer = { .it_interval.tv_usec = TICK_US, .it_value.tv_usec = TICK_US };
    struct sigaction action = { .sa_sigaction = host_entry, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART };

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    shared = memory->shared;
    find_top();
    code_view = map(0, CODE_SIZE, PROT_READ | PROT_WRITE, memory->code_fd, 0);
    data_view = map(0, DATA_SIZE, PROT_READ | PROT_WRITE, memory->data_fd, 0);
    memset(code_view, CODE_FILL, CODE_SIZE);
    memset(data_view, 0, DATA_SIZE);
    memcpy(data_view, shared->data, DATA_SIZE);
    map(CODE_BASE, CODE_SIZE, PROT_READ | PROT_EXEC | (shared->writes_code ? PROT_WRITE : 0), memory->code_fd, 0);
    map_window(WINDOW_LOW, memory->data_fd);
    map_window(WINDOW_HIGH, memory->data_fd);
    map(EDGE_LOW, 2 * 4096, PROT_READ | PROT_WRITE, memory->data_fd, EDGE_PAGE * 4096);

    if (sigaltstack(&stack, NULL))
        fail("sigaltstack");
    sigfillset(&action.sa_mask);
    for (unsigned i = 0; i < sizeof(signals) / sizeof(signals[0]); i++)
        if (sigaction(signals[i], &action, NULL))
            fail("sigaction");
    if (shared->code16) {
        add_segment(SEL_CODE16, CODE_BASE, CODE16_LIMIT, MODIFY_LDT_CONTENTS_CODE);
        add_segment(SEL_DATA16, (uint32_t)WINDOW_LOW, DATA16_LIMIT, MODIFY_LDT_CONTENTS_DATA);
    }
    __asm__ volatile("movl %0, %%ds\n\tmovl %0, %%es" : : "r"(shared->code16 ? SEL_DATA16 : shared->null_segments ? 0 : SELECTOR_DATA));
    __asm__ volatile("rdfsbase %0\n\trdgsbase %1" : "=r"(host_own_fs), "=r"(host_own_gs));
    if (setitimer(ITIMER_PROF, &timer, NULL))
        fail("setitimer");
    raise(SIGUSR1);
    fail("the first case did not start");
}
