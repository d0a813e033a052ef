/*
 * Sandboxed host processes for guest user code: see sandbox.h for what they are and why they are safe.
 *
 * A sandbox begins as a program of one page, written here as an ELF image into a memfd and executed from there: so it starts with an
 * address space of its own and not with a copy of ours. The page has three routines. "once" makes the system call
 * whose registers it is given; "batch" makes those of a list, which lies in pages that it sees for reading only; "flags" loads
 * flags from there. All end in INT3.
 */
#include "engine/translate/sandbox.h"

#include <asm/prctl.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

#include "base/util.h"

#define PAGE 4096ull
#define LIST_SIZE (16 * PAGE)
#define VECTORS_MAX 16384u      /* with AMX's 8 KiB of tiles */
#define FIRST_FILE 3            /* descriptors of the sandbox: the list's, until it is mapped, then the files */
#define NAME "ringfort-user"    /* of the process */
#define CHILD_STACK 16384u      /* of the child, until it executes the program */
#ifndef MFD_EXEC
#define MFD_EXEC 0x0010u
#endif

/* What "batch" takes a system call from. */
struct call {
    uint64_t number, argument[6];
};
#define CALLS ((LIST_SIZE - 8) / sizeof(struct call))
#define FLAGS_AT (LIST_SIZE - 8)        /* in the list: flags to load */

struct sandbox {
    pid_t pid;                  /* -1: none, or reaped */
    int handle;                 /* a pidfd, -1: none yet */
    uint64_t base;              /* of the page of ours; the list lies behind it */
    struct call *list;          /* our view */
    unsigned calls;
    int error;                  /* of a batch that had to be made before the commit */
    bool interrupted;           /* while a batch ran: for the next sandbox_run() */
    struct user_regs_struct regs;
    uint64_t flags;             /* it has */
    size_t vectors_size;
    uint8_t vectors[VECTORS_MAX] __attribute__((aligned(64)));
};

/* ---- the program ---- */

/*
 * once:  syscall; int3
 * flags: (RSP: where they are) popf; int3
 * batch: (RBX: list, EBP: how many) loads the registers, makes the call, ends at an error or when all are made
 */
static const uint8_t program[] = {
    0x0f, 0x05, 0xcc, 0x90,                     /* once: syscall; int3; and a nop: behind an INT3 nothing begins */
    0x9d, 0xcc, 0x90, 0x90,                     /* flags: popfq; int3 */
    0x48, 0x8b, 0x03,                           /* batch: mov (%rbx),%rax */
    0x48, 0x8b, 0x7b, 0x08,                     /* mov 8(%rbx),%rdi */
    0x48, 0x8b, 0x73, 0x10,                     /* mov 16(%rbx),%rsi */
    0x48, 0x8b, 0x53, 0x18,                     /* mov 24(%rbx),%rdx */
    0x4c, 0x8b, 0x53, 0x20,                     /* mov 32(%rbx),%r10 */
    0x4c, 0x8b, 0x43, 0x28,                     /* mov 40(%rbx),%r8 */
    0x4c, 0x8b, 0x4b, 0x30,                     /* mov 48(%rbx),%r9 */
    0x0f, 0x05,                                 /* syscall */
    0x48, 0x3d, 0x00, 0xf0, 0xff, 0xff,         /* cmp $-4096,%rax */
    0x77, 0x08,                                 /* ja out */
    0x48, 0x83, 0xc3, 0x38,                     /* add $56,%rbx */
    0xff, 0xcd,                                 /* dec %ebp */
    0x75, 0xd3,                                 /* jnz batch */
    0xcc,                                       /* out: int3 */
};
#define ONCE 0
#define ONCE_END 3              /* behind its INT3 */
#define FLAGS 4
#define FLAGS_END 6
#define BATCH 8
#define PROGRAM_AT (sizeof(Elf64_Ehdr) + sizeof(Elf64_Phdr))
_Static_assert(sizeof(struct call) == 0x38, "batch steps by it");

/* A memfd with the program as an executable that is loaded at base. */
static int make_program(uint64_t base)
{
    struct {
        Elf64_Ehdr e;
        Elf64_Phdr p;
        uint8_t text[sizeof(program)];
    } image = {
        .e = { .e_ident = { ELFMAG0, ELFMAG1, ELFMAG2, ELFMAG3, ELFCLASS64, ELFDATA2LSB, EV_CURRENT }, .e_type = ET_EXEC,
               .e_machine = EM_X86_64, .e_version = EV_CURRENT, .e_entry = base + PROGRAM_AT, .e_phoff = sizeof(Elf64_Ehdr),
               .e_ehsize = sizeof(Elf64_Ehdr), .e_phentsize = sizeof(Elf64_Phdr), .e_phnum = 1 },
        .p = { .p_type = PT_LOAD, .p_flags = PF_R | PF_X, .p_vaddr = base, .p_paddr = base, .p_filesz = sizeof(image),
               .p_memsz = sizeof(image), .p_align = PAGE },
    };
    int fd = memfd_create("ringfort-sandbox", MFD_CLOEXEC | MFD_EXEC);

    /* Kernels before 6.3 do not know the flag, later ones may be set up to ask for it. */
    if (fd < 0 && errno == EINVAL)
        fd = memfd_create("ringfort-sandbox", MFD_CLOEXEC);
    memcpy(image.text, program, sizeof(program));
    if (fd >= 0 && write(fd, &image, sizeof(image)) != sizeof(image)) {
        close(fd);
        errno = EIO;
        return -1;
    }
    return fd;
}

/* ---- control ---- */

static long send_signal(int handle, int number) { return syscall(SYS_pidfd_send_signal, handle, number, NULL, 0); }

static void end(struct sandbox *s)
{
    int status;

    if (s->pid <= 0)
        return;
    if (send_signal(s->handle, SIGKILL) && errno != ESRCH)
        kill(s->pid, SIGKILL);  /* nobody has reaped it: see give_birth() for those without a handle */
    while (waitpid(s->pid, &status, __WALL) == s->pid ? WIFSTOPPED(status) : errno == EINTR)
        ;
    s->pid = -1;
}

/* Whether the signal is the kernel's word on an exception, and not somebody's. */
static bool raised(const siginfo_t *info) { return info->si_code > 0; }

/* Waits until it stops. False: it is gone. */
static bool wait_stop(struct sandbox *s, int *status)
{
    pid_t pid;

    do
        pid = waitpid(s->pid, status, __WALL | WUNTRACED);
    while (pid < 0 && errno == EINTR);
    if (pid == s->pid && WIFSTOPPED(*status))
        return true;
    s->pid = -1;                /* reaped, or never ours to reap */
    return false;
}

/* Continues it, as our own code, until it is behind the INT3. The registers are what it stopped with. */
static int run_program(struct sandbox *s, struct user_regs_struct *regs)
{
    const uint64_t text = s->base + PROGRAM_AT;
    siginfo_t info;
    int status;

    regs->orig_rax = (unsigned long long)-1;
    regs->cs = 0x33;
    regs->ss = 0x2b;
    if (s->pid < 0 || ptrace(PTRACE_SETREGS, s->pid, NULL, regs))
        return -ESRCH;
    for (;;) {
        if (ptrace(PTRACE_CONT, s->pid, NULL, NULL) || !wait_stop(s, &status) || ptrace(PTRACE_GETREGS, s->pid, NULL, regs))
            return -ESRCH;
        if (WSTOPSIG(status) == SIGTRAP && (regs->rip == text + ONCE_END || regs->rip == text + FLAGS_END || regs->rip == text + sizeof(program)))
            return 0;
        if (ptrace(PTRACE_GETSIGINFO, s->pid, NULL, &info))
            return -ESRCH;
        if (raised(&info))
            return -EFAULT;
        /* Others are from a process, and one of them may be for the guest. */
        s->interrupted = s->interrupted || WSTOPSIG(status) == SIGUSR1;
    }
}

/* One system call of the sandbox's; its result. */
static long call_once(struct sandbox *s, long number, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f)
{
    struct user_regs_struct regs = {
        .rip = s->base + PROGRAM_AT + ONCE, .rax = (uint64_t)number, .rdi = a, .rsi = b, .rdx = c, .r10 = d, .r8 = e, .r9 = f, .eflags = 2,
    };
    int err = run_program(s, &regs);

    return err ? err : (long)regs.rax;
}

static void run_batch(struct sandbox *s)
{
    struct user_regs_struct regs = {
        .rip = s->base + PROGRAM_AT + BATCH, .rbx = s->base + PAGE, .rbp = s->calls, .eflags = 2,
    };
    int err = run_program(s, &regs);

    if (!err && regs.rbp)
        err = (int)(long)regs.rax;
    if (!s->error)
        s->error = err;
    s->calls = 0;
}

static void add_call(struct sandbox *s, long number, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f)
{
    if (s->calls == CALLS)
        run_batch(s);
    if (s->error)
        return;                 /* what follows a call that failed is not made */
    s->list[s->calls++] = (struct call){ (uint64_t)number, { a, b, c, d, e, f } };
}

/* ---- birth ---- */

/*
 * System calls are for the page of ours alone, and of them those that map memory, and that one by which CPUID stops it. The kernel looks at the address behind the
 * instruction. Under PTRACE_SYSEMU it never comes to that; the page for vsyscalls is decided here too.
 */
static int confine(struct sandbox *s)
{
    uint64_t once = s->base + PROGRAM_AT + ONCE + 2, batch = s->base + PROGRAM_AT + BATCH + 29;
    struct sock_filter *filter = (struct sock_filter *)((uint8_t *)s->list + sizeof(struct sock_fprog));
    struct sock_fprog *prog = (struct sock_fprog *)s->list;
    const struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 0, 9),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, instruction_pointer) + 4),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)(batch >> 32), 0, 7),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, instruction_pointer)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)batch, 1, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)once, 0, 4),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_mmap, 3, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_munmap, 2, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_arch_prctl, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };

    memcpy(filter, code, sizeof(code));
    *prog = (struct sock_fprog){ .len = ARRAY_SIZE(code), .filter = (void *)(s->base + PAGE + sizeof(*prog)) };
    if (call_once(s, SYS_prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0) < 0)
        return -EPERM;
    return (int)call_once(s, SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, s->base + PAGE, 0, 0, 0);
}

struct birth {
    int program, list;
    int files[SANDBOX_FILES];   /* -1: none */
    unsigned count;
    pid_t parent;
};

/* Of the child's functions: what a sanitizer notes of the stack on entry stays with us, since they are never left. */
#define IN_CHILD __attribute__((no_sanitize_address, no_sanitize_undefined))

static IN_CHILD void close_files(unsigned first, unsigned last)
{
    struct rlimit limit;

    if (syscall(SYS_close_range, first, last, 0) == 0)
        return;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0)  /* a kernel before 5.9 */
        for (unsigned fd = first; fd <= last && fd < limit.rlim_cur; fd++)
            close((int)fd);
}

/* Leaves nothing open but the list and the files, in their places, and the program, which goes by itself. Its descriptor, or -1. */
static IN_CHILD int arrange_files(struct birth *b)
{
    int *of[2 + SANDBOX_FILES], executed, top = FIRST_FILE + 2 + (int)b->count;
    unsigned n = 0, from = 0;

    of[n++] = &b->program;
    of[n++] = &b->list;
    for (unsigned i = 0; i < b->count; i++)
        if (b->files[i] >= 0)
            of[n++] = &b->files[i];
    /* All others first: there may be no room for more. */
    for (;;) {
        unsigned next = ~0u;

        for (unsigned i = 0; i < n; i++)
            if ((unsigned)*of[i] >= from)
                next = MIN(next, (unsigned)*of[i]);
        if (next == ~0u)
            break;
        if (next > from)
            close_files(from, next - 1);
        from = next + 1;
    }
    close_files(from, ~0u);
    /* Out of the way, then into place. */
    for (unsigned i = 0; i < n; i++)
        if ((*of[i] = fcntl(*of[i], F_DUPFD, top)) < 0)
            return -1;
    close_files(0, (unsigned)top - 1);
    for (unsigned i = 0; i < b->count; i++)
        if (b->files[i] >= 0 && dup2(b->files[i], FIRST_FILE + 1 + (int)i) < 0)
            return -1;
    executed = dup3(b->program, top - 1, O_CLOEXEC);
    if (executed < 0 || dup2(b->list, FIRST_FILE) < 0)
        return -1;
    close_files((unsigned)top, ~0u);
    return executed;
}

/* The child, which shares our memory until it executes the program: system calls and nothing else. */
static IN_CHILD int become_program(void *opaque)
{
    static char *const none[] = { NULL };
    struct birth *b = opaque;
    int executed = arrange_files(b);
    sigset_t trap;

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (executed < 0 || getppid() != b->parent)
        _exit(1);
    /* By which the kernel says that the program has been executed. */
    sigemptyset(&trap);
    sigaddset(&trap, SIGTRAP);
    sigprocmask(SIG_UNBLOCK, &trap, NULL);
    if (ptrace(PTRACE_TRACEME, 0, NULL, NULL) == 0)
        syscall(SYS_execveat, executed, "", none, none, AT_EMPTY_PATH);
    _exit(1);
}

/* Waits until the program has been executed. */
static int wait_born(struct sandbox *s)
{
    struct user_regs_struct regs;
    const uint64_t none = 0;
    int status;

    for (;;) {
        if (!wait_stop(s, &status))
            return -EPERM;
        if (ptrace(PTRACE_GETREGS, s->pid, NULL, &regs) == 0) {
            if (regs.rip == s->base + PROGRAM_AT)
                break;
            /* SIGSTOP from somebody: nothing can block that. */
            if (ptrace(PTRACE_CONT, s->pid, NULL, NULL))
                return -errno;
        } else if (errno != ESRCH || WSTOPSIG(status) == SIGTRAP || send_signal(s->handle, SIGCONT)) {
            return -errno;
        }
        /* Else such a one before it was traced, which stopped it for good. */
    }
    if (ptrace(PTRACE_SETOPTIONS, s->pid, NULL, PTRACE_O_EXITKILL | PTRACE_O_TRACESYSGOOD) ||
        ptrace(PTRACE_SETSIGMASK, s->pid, (void *)sizeof(none), &none))
        return -errno;
    return 0;
}

/*
 * Not by vfork(): a child that is stopped before it executes the program would wait for us, and we for it. All signals are
 * blocked meanwhile, so that no handler of ours runs in the child, which has our memory but other files; and no
 * other code of this thread, with which it shares errno.
 */
static int give_birth(struct sandbox *s, int program_fd, int list_fd, const int *files, unsigned count)
{
    uint8_t stack[CHILD_STACK] __attribute__((aligned(16)));
    struct birth b = { .program = program_fd, .list = list_fd, .count = count, .parent = getpid() };
    sigset_t all, before;
    int err;

    for (unsigned i = 0; i < count; i++)
        b.files[i] = files[i];
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    s->pid = clone(become_program, stack + sizeof(stack), CLONE_VM | CLONE_PIDFD | SIGCHLD, &b, &s->handle);
    err = s->pid < 0 ? -errno : wait_born(s);
    /* Kernels before 5.2 do not know such handles; whatever runs in their place may not let us use them. */
    if (err == 0 && send_signal(s->handle, 0))
        err = s->handle < 0 ? -ENOSYS : -errno;
    /* It must not run on our stack any longer, whatever went wrong. */
    if (err < 0)
        end(s);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return err;
}

/*
 * What all depends on: a system call is reported, and not made. Where it is made all the same, the filter raises a signal in its place. Each
 * turn of the loop takes somebody's signal.
 */
static int try_emulation(struct sandbox *s)
{
    enum sandbox_stop stop;
    uint64_t address;

    do {
        s->regs = (struct user_regs_struct){ .rip = s->base + PROGRAM_AT + ONCE, .rax = SYS_getpid, .eflags = 2, .cs = 0x33, .ss = 0x2b };
        stop = sandbox_run(s, &address);
    } while (stop == SANDBOX_INTERRUPTED);
    return stop == SANDBOX_SYSCALL && s->regs.orig_rax == SYS_getpid ? 0 : -EPERM;
}

static int furnish(struct sandbox *s)
{
    struct iovec io = { s->vectors, sizeof(s->vectors) };
    long at;
    int err;

    at = call_once(s, SYS_mmap, s->base + PAGE, LIST_SIZE, PROT_READ, MAP_SHARED | MAP_FIXED, FIRST_FILE, 0);
    if (at != (long)(s->base + PAGE))
        return at < 0 ? (int)at : -ENOMEM;
    if (call_once(s, SYS_close, FIRST_FILE, 0, 0, 0, 0, 0) < 0)
        return -EPERM;
    /* The stack, and what the kernel put there. */
    if (call_once(s, SYS_munmap, 0, s->base, 0, 0, 0, 0) < 0 ||
        call_once(s, SYS_munmap, s->base + PAGE + LIST_SIZE, SANDBOX_END - s->base - PAGE - LIST_SIZE, 0, 0, 0, 0) < 0)
        return -EPERM;
    /* For those who look at processes. */
    memcpy(s->list, NAME, sizeof(NAME));
    if (call_once(s, SYS_prctl, PR_SET_NAME, s->base + PAGE, 0, 0, 0, 0) < 0)
        return -EPERM;
    if (call_once(s, SYS_prctl, PR_SET_TSC, PR_TSC_SIGSEGV, 0, 0, 0, 0) < 0)
        return -EPERM;
    err = confine(s);
    if (err < 0)
        return err;
    if (ptrace(PTRACE_GETREGSET, s->pid, (void *)NT_X86_XSTATE, &io))
        return -errno;
    s->vectors_size = io.iov_len;
    return try_emulation(s);
}

int sandbox_create(struct sandbox **out, const int *files, unsigned count)
{
    struct sandbox *s = aligned_alloc(64, align_up(sizeof(*s), 64));
    int program_fd = -1, list_fd = -1, err = -ENOMEM;
    uint64_t lot = 0;

    if (!s)
        return -ENOMEM;
    if (count > SANDBOX_FILES) {
        free(s);
        return -EINVAL;
    }
    memset(s, 0, sizeof(*s));
    s->pid = s->handle = -1;
    s->list = MAP_FAILED;
    /* Between what programs usually map low and high. */
    if (getrandom(&lot, sizeof(lot), 0) != sizeof(lot))
        goto out;
    s->base = 0x200000000000 + (lot % 0x300000000) * PAGE;
    program_fd = make_program(s->base);
    list_fd = memfd_create("ringfort-sandbox-list", MFD_CLOEXEC);
    if (program_fd < 0 || list_fd < 0 || ftruncate(list_fd, LIST_SIZE))
        goto errno_out;
    s->list = mmap(NULL, LIST_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, list_fd, 0);
    if (s->list == MAP_FAILED)
        goto errno_out;
    err = give_birth(s, program_fd, list_fd, files, count);
    if (err < 0)
        goto out;
    err = furnish(s);
    goto out;
errno_out:
    err = -errno;
out:
    if (program_fd >= 0)
        close(program_fd);
    if (list_fd >= 0)
        close(list_fd);
    if (err < 0) {
        sandbox_destroy(s);
        return err;
    }
    *out = s;
    return 0;
}

void sandbox_destroy(struct sandbox *s)
{
    if (!s)
        return;
    end(s);
    if (s->handle >= 0)
        close(s->handle);
    if (s->list != MAP_FAILED)
        munmap(s->list, LIST_SIZE);
    free(s);
}

static struct sandbox_abilities abilities;

static const char *advice(int err)
{
    switch (err) {
    case EPERM: return ": ptrace or seccomp; look at the container's seccomp profile, and whether kernel.yama.ptrace_scope is 3";
    case EACCES: return ": an executable memfd; vm.memfd_noexec has to be less than 2";
    case ENOSYS: return ": Linux 5.2 or a later one is needed";
    case EAGAIN: return ": a process; look at RLIMIT_NPROC and the control group's pids.max";
    case EMFILE: case ENFILE: return ": look at RLIMIT_NOFILE and fs.file-max";
    default: return "";
    }
}

static void find_abilities(void)
{
    struct sandbox *s;
    int err = sandbox_create(&s, NULL, 0);

    abilities.usable = err >= 0;
    if (err < 0)
        snprintf(abilities.text, sizeof(abilities.text), "%s%s", strerror(-err), advice(-err));
    else
        sandbox_destroy(s);
}

const struct sandbox_abilities *sandbox_abilities(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;

    pthread_once(&once, find_abilities);
    return &abilities;
}

/* ---- memory ---- */

static bool ours(const struct sandbox *s, uint64_t va, uint64_t size)
{
    return va < s->base + PAGE + LIST_SIZE && s->base < va + size;
}

bool sandbox_map(struct sandbox *s, uint64_t va, uint64_t size, unsigned file, uint64_t offset, int prot)
{
    struct call *last = s->calls ? &s->list[s->calls - 1] : NULL;
    uint64_t fd = FIRST_FILE + 1 + file;

    if (ours(s, va, size))
        return false;
    if (last && last->number == SYS_mmap && last->argument[0] + last->argument[1] == va && last->argument[2] == (uint64_t)prot &&
        last->argument[4] == fd && last->argument[5] + last->argument[1] == offset)
        last->argument[1] += size;
    else
        add_call(s, SYS_mmap, va, size, (uint64_t)prot, MAP_SHARED | MAP_FIXED | MAP_POPULATE, fd, offset);
    return true;
}

bool sandbox_unmap(struct sandbox *s, uint64_t va, uint64_t size)
{
    struct call *last = s->calls ? &s->list[s->calls - 1] : NULL;

    if (ours(s, va, size))
        return false;
    if (last && last->number == SYS_munmap && last->argument[0] + last->argument[1] == va)
        last->argument[1] += size;
    else
        add_call(s, SYS_munmap, va, size, 0, 0, 0, 0);
    return true;
}

void sandbox_clear(struct sandbox *s)
{
    uint64_t after = s->base + PAGE + LIST_SIZE;

    s->calls = 0;
    s->error = 0;
    add_call(s, SYS_munmap, SANDBOX_BEGIN, s->base - SANDBOX_BEGIN, 0, 0, 0, 0);
    add_call(s, SYS_munmap, after, SANDBOX_END - after, 0, 0, 0, 0);
}

int sandbox_commit(struct sandbox *s)
{
    int err;

    if (s->calls)
        run_batch(s);
    err = s->error;
    s->error = 0;
    return err;
}

int sandbox_stop_at_cpuid(struct sandbox *s, bool stop)
{
    return (int)call_once(s, SYS_arch_prctl, ARCH_SET_CPUID, !stop, 0, 0, 0, 0);
}

/* ---- running ---- */

struct user_regs_struct *sandbox_regs(struct sandbox *s) { return &s->regs; }

uint8_t *sandbox_vectors(struct sandbox *s, size_t *size)
{
    *size = s->vectors_size;
    return s->vectors;
}

int sandbox_get_vectors(struct sandbox *s)
{
    struct iovec io = { s->vectors, s->vectors_size };

    return s->pid < 0 || ptrace(PTRACE_GETREGSET, s->pid, (void *)NT_X86_XSTATE, &io) ? -ESRCH : 0;
}

int sandbox_set_vectors(struct sandbox *s)
{
    struct iovec io = { s->vectors, s->vectors_size };

    return s->pid < 0 ? -ESRCH : ptrace(PTRACE_SETREGSET, s->pid, (void *)NT_X86_XSTATE, &io) ? -errno : 0;
}

static enum sandbox_stop stop_of_signal(struct sandbox *s, int signal, uint64_t *address)
{
    siginfo_t info;

    if (ptrace(PTRACE_GETSIGINFO, s->pid, NULL, &info))
        return SANDBOX_GONE;
    if (!raised(&info))
        return SANDBOX_INTERRUPTED;
    switch (signal) {
    case SIGSEGV:
        if (info.si_code != SEGV_MAPERR && info.si_code != SEGV_ACCERR)
            return SANDBOX_FAULT;
        *address = (uint64_t)(uintptr_t)info.si_addr;
        return SANDBOX_PAGE_FAULT;
    case SIGTRAP:
        return info.si_code == TRAP_TRACE ? SANDBOX_STEPPED : SANDBOX_BREAKPOINT;
    case SIGSYS:
        /* A call of the page for vsyscalls, from which the kernel has returned already: nothing has happened yet. */
        if ((uint64_t)(uintptr_t)info.si_call_addr >= SANDBOX_END) {
            s->regs.rip = (uint64_t)(uintptr_t)info.si_call_addr;
            s->regs.rsp -= 8;
        }
        return SANDBOX_FAULT;
    case SIGBUS: case SIGFPE: case SIGILL:
        return SANDBOX_FAULT;
    default:
        return SANDBOX_INTERRUPTED;
    }
}

/* Flags that code can change and ptrace cannot. */
#define FLAGS_KEPT 0x204000ull  /* NT, ID */

static void load_flags(struct sandbox *s)
{
    struct user_regs_struct regs = { .rip = s->base + PROGRAM_AT + FLAGS, .rsp = s->base + PAGE + FLAGS_AT, .eflags = 2 };

    *(uint64_t *)((uint8_t *)s->list + FLAGS_AT) = s->regs.eflags & FLAGS_KEPT;
    run_program(s, &regs);      /* if that fails, so does what follows */
}

enum sandbox_stop sandbox_run(struct sandbox *s, uint64_t *address)
{
    int status;

    if (s->pid < 0)
        return SANDBOX_DEAD;
    if (s->interrupted) {
        s->interrupted = false;
        return SANDBOX_INTERRUPTED;
    }
    if ((s->regs.eflags ^ s->flags) & FLAGS_KEPT)
        load_flags(s);
    s->regs.orig_rax = (unsigned long long)-1;
    if (ptrace(PTRACE_SETREGS, s->pid, NULL, &s->regs))
        return errno == ESRCH ? SANDBOX_DEAD : SANDBOX_REFUSED;
    if (ptrace(PTRACE_SYSEMU, s->pid, NULL, NULL))
        return SANDBOX_DEAD;    /* or not to be continued for another reason: the registers are as they were */
    if (!wait_stop(s, &status) || ptrace(PTRACE_GETREGS, s->pid, NULL, &s->regs))
        return SANDBOX_GONE;
    s->flags = s->regs.eflags;
    if (WSTOPSIG(status) == (SIGTRAP | 0x80))
        return SANDBOX_SYSCALL;
    return stop_of_signal(s, WSTOPSIG(status), address);
}

uint64_t sandbox_trip(struct sandbox *s)
{
    struct user_regs_struct regs = { .rip = s->base + PROGRAM_AT + ONCE_END - 1, .eflags = 2 };
    uint64_t before = __rdtsc();

    run_program(s, &regs);
    return __rdtsc() - before;
}

int sandbox_handle(const struct sandbox *s) { return s->handle; }

void sandbox_interrupt(int handle)
{
    int before = errno;

    send_signal(handle, SIGUSR1);
    errno = before;
}

pid_t sandbox_pid(const struct sandbox *s) { return s->pid; }

uint64_t sandbox_time(const struct sandbox *s)
{
    struct timespec t;
    clockid_t clock;

    if (s->pid < 0 || clock_getcpuclockid(s->pid, &clock) || clock_gettime(clock, &t))
        return 0;
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}
