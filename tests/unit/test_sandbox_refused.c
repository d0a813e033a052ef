/*
 * Sandboxes on hosts that refuse something, from the beginning or from some moment on: each time there is an error, no process is left over,
 * and nothing waits for ever.
 */
#include "sandbox_box.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/util.h"

#define ANY (~0u)

/* From now on this thread, and what it makes, gets error from the system call with that first argument. */
static bool refuse(unsigned number, unsigned first, unsigned error)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, first, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | error),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };

    if (first == ANY)
        code[3] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JA, 0, 0, 0);
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
           syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &(struct sock_fprog){ ARRAY_SIZE(code), code }) == 0;
}

static const struct refusal {
    const char *name;
    unsigned number, first, error;
} refusals[] = {
    { "memfd_create", SYS_memfd_create, ANY, EACCES }, { "clone", SYS_clone, ANY, EAGAIN }, { "execveat", SYS_execveat, ANY, EPERM },
    { "seccomp", SYS_seccomp, ANY, EPERM }, { "pidfd_send_signal", SYS_pidfd_send_signal, ANY, EPERM }, { "prctl", SYS_prctl, PR_SET_TSC, EPERM },
    { "all of ptrace", SYS_ptrace, ANY, ENOSYS },
#define PTRACE(name, error) { #name, SYS_ptrace, PTRACE_##name, error }
    PTRACE(TRACEME, EPERM), PTRACE(CONT, EPERM), PTRACE(SYSEMU, EIO), PTRACE(GETREGS, EPERM), PTRACE(SETREGS, EIO), PTRACE(GETREGSET, EINVAL),
    PTRACE(SETOPTIONS, EINVAL), PTRACE(SETSIGMASK, EIO),
    { "setting registers: ESRCH", SYS_ptrace, PTRACE_SETREGS, ESRCH }, { "reading registers: ESRCH", SYS_ptrace, PTRACE_GETREGS, ESRCH },
};
static const struct refusal *refusal;

static bool nothing_left(void) { return waitpid(-1, NULL, WNOHANG | __WALL) == -1 && errno == ECHILD; }

static int made_child(void)
{
    struct sandbox *s;

    if (!refuse(refusal->number, refusal->first, refusal->error))
        return 1;
    /* As one that is started with less rights is told. */
    if (sandbox_create(&s, NULL, 0) >= 0)
        return 2;
    return nothing_left() ? 0 : 3;
}

static void while_it_is_made(void **state)
{
    for (unsigned i = 0; i < ARRAY_SIZE(refusals); i++) {
        refusal = &refusals[i];
        print_message("%s\n", refusal->name);
        in_child(made_child);
    }
}

static int used_child(void)
{
    struct box b = { 0 };
    enum sandbox_stop stop = SANDBOX_INTERRUPTED;

    if (!open_box(&b) || !works(&b) || !refuse(refusal->number, refusal->first, refusal->error))
        return 1;
    START(&b, does_syscall);
    for (unsigned i = 0; i < 3 && stop == SANDBOX_INTERRUPTED; i++)
        stop = run(&b);
    /* Nothing else depends on what is refused, or nobody may believe that it stopped for the guest. */
    if (refusal->number == SYS_ptrace && stop != SANDBOX_DEAD && stop != SANDBOX_REFUSED && stop != SANDBOX_GONE && stop != SANDBOX_SYSCALL)
        return 2;
    if (stop == SANDBOX_DEAD && sandbox_regs(b.s)->rip != CODE)
        return 3;
    sandbox_map(b.s, 0x50000000, PAGE, 0, 0, PROT_READ);
    sandbox_commit(b.s);
    sandbox_stop_at_cpuid(b.s, true);
    sandbox_get_vectors(b.s);
    sandbox_set_vectors(b.s);
    close_box(&b);
    return nothing_left() ? 0 : 4;
}

static void while_it_is_used(void **state)
{
    for (unsigned i = 0; i < ARRAY_SIZE(refusals); i++) {
        refusal = &refusals[i];
        print_message("%s\n", refusal->name);
        in_child(used_child);
    }
}

/* That is no end of what has run: the guest goes on in another way. */
static int not_continued_child(void)
{
    struct box b = { 0 };

    if (!open_box(&b) || !works(&b) || !refuse(SYS_ptrace, PTRACE_SYSEMU, EPERM))
        return 1;
    START(&b, spins);
    sandbox_regs(b.s)->rbx = 77;
    if (run(&b) != SANDBOX_DEAD || sandbox_regs(b.s)->rbx != 77 || sandbox_get_vectors(b.s))
        return 2;
    close_box(&b);
    return nothing_left() ? 0 : 3;
}

static void not_continued(void **state) { in_child(not_continued_child); }

static int no_processes_child(void)
{
    struct sandbox *s;

    /* Root is exempt from the limit. */
    if (setresuid(65534, 65534, 65534) && geteuid() == 0)
        return 1;
    if (setrlimit(RLIMIT_NPROC, &(struct rlimit){ 0, 0 }))
        return 2;
    if (sandbox_create(&s, NULL, 0) != -EAGAIN || sandbox_abilities()->usable || !strstr(sandbox_abilities()->text, "RLIMIT_NPROC"))
        return 3;
    return nothing_left() ? 0 : 4;
}

static void no_processes(void **state) { in_child(no_processes_child); }

static int no_files_child(void)
{
    struct sandbox *s;
    int free_files[4];
    unsigned n = 0;

    if (setrlimit(RLIMIT_NOFILE, &(struct rlimit){ 40, 40 }))
        return 1;
    while (dup(2) >= 0)
        ;
    /* With none, with one, with two… until it is enough. */
    for (n = 0; n < ARRAY_SIZE(free_files); n++) {
        int err = sandbox_create(&s, NULL, 0);

        if (err >= 0) {
            sandbox_destroy(s);
            break;
        }
        if (err != -EMFILE || !nothing_left())
            return 2;
        close(30 + (int)n);
    }
    return n == 3 && nothing_left() ? 0 : 3;
}

static void no_files(void **state) { in_child(no_files_child); }

static int no_executable_child(void)
{
    int file = open("/proc/sys/vm/memfd_noexec", O_WRONLY | O_CLOEXEC);
    struct sandbox *s;

    if (file < 0 || pwrite(file, "1", 1, 0) != 1)
        return 0;               /* no such setting, or not allowed here */
    if (sandbox_create(&s, NULL, 0))
        return 1;
    sandbox_destroy(s);
    if (pwrite(file, "2", 1, 0) != 1)
        return 0;
    if (sandbox_create(&s, NULL, 0) != -EACCES || sandbox_abilities()->usable || !strstr(sandbox_abilities()->text, "memfd_noexec"))
        return 2;
    return nothing_left() ? 0 : 3;
}

/* The setting is the namespace's. */
static int no_executable_parent(void)
{
    int status;
    pid_t first;

    if (unshare(CLONE_NEWPID))
        return 0;               /* not allowed here; as root it is */
    first = fork();
    if (first == 0)
        _exit(no_executable_child());
    return waitpid(first, &status, 0) == first ? WEXITSTATUS(status) : 1;
}

static void no_executable(void **state) { in_child(no_executable_parent); }

/* The kernel has no room for mappings: said, and good again when there is. */
static void no_room(void **state)
{
    struct box *b = *state;
    const struct rlimit none = { 0, RLIM_INFINITY }, all = { RLIM_INFINITY, RLIM_INFINITY };

    assert_int_equal(prlimit(sandbox_pid(b->s), RLIMIT_AS, &none, NULL), 0);
    sandbox_map(b->s, 0x50000000, PAGE, 0, 0, PROT_READ);
    assert_int_equal(sandbox_commit(b->s), -ENOMEM);
    assert_true(works(b));
    sandbox_clear(b->s);
    assert_int_equal(sandbox_commit(b->s), 0);
    sandbox_map(b->s, CODE, PAGE, 0, 0, PROT_READ);
    assert_int_equal(sandbox_commit(b->s), -ENOMEM);
    assert_int_equal(prlimit(sandbox_pid(b->s), RLIMIT_AS, &all, NULL), 0);
    sandbox_map(b->s, CODE, PAGE, 0, 0, PROT_READ | PROT_EXEC);
    assert_int_equal(sandbox_commit(b->s), 0);
    assert_true(works(b));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(while_it_is_made), cmocka_unit_test(while_it_is_used), cmocka_unit_test(not_continued), cmocka_unit_test(no_processes),
        cmocka_unit_test(no_files), cmocka_unit_test(no_executable), WITH_BOX(no_room),
    };
    struct sandbox *s;

    /* Not sandbox_abilities(), which would remember it. */
    if (sandbox_create(&s, NULL, 0)) {
        fprintf(stderr, "skipped: no sandbox can be made here\n");
        return 77;
    }
    sandbox_destroy(s);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
