/*
 * /dev/kvm: what it can do, and whether it is fast.
 *
 * A /dev/kvm can exist that emulates the guest's kernel mode, a thousand times slower than a processor with VT-x or AMD-V runs it. So
 * the probe lets a few instructions run in ring 0 for about a millisecond and compares with the same loop on the host.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "base/util.h"
#include "engine/kvm/kvm.h"

int kvm_ioctl(int fd, unsigned long request, void *argument)
{
    int r;

    do
        r = ioctl(fd, request, argument);
    while (r < 0 && errno == EINTR);
    return r < 0 ? -errno : r;
}

static int extension(int fd, long cap) { return ioctl(fd, KVM_CHECK_EXTENSION, cap); }

/* ---- what there is ---- */

static const struct {
    int cap;
    const char *name;
} needed[] = {
#define CAP(name) { KVM_CAP_##name, #name }
    CAP(USER_MEMORY), CAP(SET_TSS_ADDR), CAP(EXT_CPUID), CAP(MP_STATE), CAP(VCPU_EVENTS), CAP(DEBUGREGS), CAP(XSAVE),
    CAP(ADJUST_CLOCK), CAP(GET_TSC_KHZ), CAP(SIGNAL_MSI), CAP(IRQ_ROUTING), CAP(SPLIT_IRQCHIP), CAP(X2APIC_API), CAP(IMMEDIATE_EXIT),
    CAP(VCPU_ATTRIBUTES),
#undef CAP
};

static struct kvm_host the_host;
static char unusable[192];
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void look(void)
{
    struct kvm_host *h = &the_host;
    int version, size;

    h->fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (h->fd < 0) {
        snprintf(unusable, sizeof(unusable), "/dev/kvm: %s; %s", strerror(errno),
                 errno == EACCES || errno == EPERM
                     ? "become a member of its group (usually: adduser $USER kvm) and log in again"
                     : "the processor or the hypervisor around this host offers no VT-x or AMD-V, firmware has it switched off, or the "
                       "module kvm_intel or kvm_amd is not loaded");
        return;
    }
    version = ioctl(h->fd, KVM_GET_API_VERSION, 0);
    if (version != KVM_API_VERSION) {
        snprintf(unusable, sizeof(unusable), "/dev/kvm answers with API version %d instead of %d", version, KVM_API_VERSION);
        goto out;
    }
    for (unsigned i = 0; i < ARRAY_SIZE(needed); i++)
        if (extension(h->fd, needed[i].cap) <= 0) {
            snprintf(unusable, sizeof(unusable), "/dev/kvm lacks KVM_CAP_%s; a newer kernel is needed (6.1 or later)", needed[i].name);
            goto out;
        }
    size = ioctl(h->fd, KVM_GET_VCPU_MMAP_SIZE, 0);
    if (size < (int)sizeof(struct kvm_run)) {
        snprintf(unusable, sizeof(unusable), "/dev/kvm gives vCPUs %d bytes to share, which is too little", size);
        goto out;
    }
    h->run_size = (size_t)size;
    size = extension(h->fd, KVM_CAP_XSAVE2);
    h->xsave_size = MAX(size > 0 ? (size_t)size : 0, sizeof(struct kvm_xsave));
    h->xcrs = extension(h->fd, KVM_CAP_XCRS) > 0;
    h->tsc_control = extension(h->fd, KVM_CAP_TSC_CONTROL) > 0;
    h->dirty_ring = (uint32_t)MAX(extension(h->fd, KVM_CAP_DIRTY_LOG_RING), 0);
    h->manual_protect = extension(h->fd, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE;
    return;
out:
    close(h->fd);
    h->fd = -1;
}

const struct kvm_host *kvm_host(const char **why)
{
    pthread_once(&once, look);
    if (why)
        *why = unusable;
    return the_host.fd >= 0 ? &the_host : NULL;
}

/* ---- how fast it is ---- */

#define PROBE_NS 1000000        /* for one run */
#define PROBE_RUNS 20
#define PROBE_ROUNDS 20000      /* enough to judge by: a run natively has a million */
/* A guest's loop may take so many times as long as the host's, on a busy host that runs it a bit at a time. Emulated it takes a thousand. */
#define NATIVE_RATIO 40

/* 32-bit code: 1: inc %eax; jnz 1b; jmp 1b. */
static const uint8_t loop_code[] = { 0x40, 0x75, 0xfd, 0xeb, 0xfb };

static uint64_t thread_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
    return (uint64_t)ts.tv_sec * 1000000000 + (uint64_t)ts.tv_nsec;
}

/* The same two instructions here: ns for one round. */
static double host_loop_ns(void)
{
    const uint32_t rounds = 500000;
    uint32_t counter = -rounds;
    uint64_t start = thread_ns();

    __asm__ volatile("1: incl %0; jnz 1b" : "+r"(counter) : : "cc");
    return (double)MAX(thread_ns() - start, 1u) / rounds;
}

struct probe_vm {
    int vm, vcpu;
    struct kvm_run *run;
    uint8_t *page;
};

static int probe_create(const struct kvm_host *h, struct probe_vm *p)
{
    struct kvm_userspace_memory_region memory = { .memory_size = 4096 };
    struct kvm_segment flat = { .limit = UINT32_MAX, .present = 1, .s = 1, .db = 1, .g = 1, .type = 3, .selector = 0x10 };
    struct kvm_sregs sregs;
    int r;

    p->vm = ioctl(h->fd, KVM_CREATE_VM, 0);
    if (p->vm < 0)
        return -errno;
    ioctl(p->vm, KVM_SET_TSS_ADDR, 0xfeffd000ul);
    p->page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p->page == MAP_FAILED)
        return -errno;
    memcpy(p->page, loop_code, sizeof(loop_code));
    memory.userspace_addr = (uintptr_t)p->page;
    r = kvm_ioctl(p->vm, KVM_SET_USER_MEMORY_REGION, &memory);
    if (r < 0)
        return r;
    p->vcpu = ioctl(p->vm, KVM_CREATE_VCPU, 0);
    if (p->vcpu < 0)
        return -errno;
    p->run = mmap(NULL, h->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, p->vcpu, 0);
    if (p->run == MAP_FAILED)
        return -errno;
    r = kvm_ioctl(p->vcpu, KVM_GET_SREGS, &sregs);
    if (r < 0)
        return r;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_NE;
    sregs.ds = sregs.es = sregs.ss = sregs.fs = sregs.gs = flat;
    flat.type = 0xb;
    flat.selector = 8;
    sregs.cs = flat;
    return kvm_ioctl(p->vcpu, KVM_SET_SREGS, &sregs);
}

static void probe_destroy(const struct kvm_host *h, struct probe_vm *p)
{
    if (p->run != MAP_FAILED)
        munmap(p->run, h->run_size);
    if (p->vcpu >= 0)
        close(p->vcpu);
    if (p->vm >= 0)
        close(p->vm);
    if (p->page != MAP_FAILED)
        munmap(p->page, 4096);
}

/* Runs the loop until the timer's next signal. Its rounds, or a negative errno; -EPROTO: it stopped. */
static int64_t run_once(const struct probe_vm *p)
{
    struct kvm_regs regs = { .rflags = 2 };
    int r = kvm_ioctl(p->vcpu, KVM_SET_REGS, &regs);

    if (r < 0)
        return r;
    r = ioctl(p->vcpu, KVM_RUN, 0);
    if (r == 0 || errno != EINTR)
        return r == 0 ? -EPROTO : -errno;
    r = kvm_ioctl(p->vcpu, KVM_GET_REGS, &regs);
    /* The counter goes around after four thousand million rounds, which no probe takes. */
    return r < 0 ? r : (int64_t)(uint32_t)regs.rax;
}

/* ns of this thread for one round of the guest's loop. The first runs are for what is slow once, such as making page tables. */
static int guest_loop_ns(const struct probe_vm *p, double *ns)
{
    struct sigevent event = { .sigev_notify = SIGEV_THREAD_ID, .sigev_signo = kvm_kick_signal() };
    struct itimerspec when = { .it_value = { .tv_nsec = PROBE_NS }, .it_interval = { .tv_nsec = PROBE_NS } };
    uint64_t used = 0;
    int64_t rounds = 0, n = 0;
    timer_t timer;

    event._sigev_un._tid = (pid_t)syscall(SYS_gettid);
    if (timer_create(CLOCK_MONOTONIC, &event, &timer))
        return -errno;
    timer_settime(timer, 0, &when, NULL);
    for (unsigned i = 0; i < PROBE_RUNS && rounds < PROBE_ROUNDS && n >= 0; i++) {
        uint64_t start = thread_ns();

        n = run_once(p);
        if (n < PROBE_ROUNDS && rounds == 0 && i < PROBE_RUNS - 3)
            continue;           /* the signal came before it was in the guest */
        used += thread_ns() - start;
        rounds += MAX(n, 0);
    }
    timer_delete(timer);
    *ns = (double)used / (double)MAX(rounds, 1);
    return n < 0 ? (int)n : 0;
}

/* Once: auto, `ringfort host` and the run itself may all ask. */
static struct engine_report report;
static pthread_once_t report_once = PTHREAD_ONCE_INIT;

static void make_report(void)
{
    struct probe_vm p = { .vm = -1, .vcpu = -1, .run = MAP_FAILED, .page = MAP_FAILED };
    const char *why;
    const struct kvm_host *h = kvm_host(&why);
    double guest = 0, host;
    int r;

    if (!h) {
        snprintf(report.text, sizeof(report.text), "%s", why);
        return;
    }
    kvm_signal_setup();
    r = probe_create(h, &p);
    if (r >= 0)
        r = guest_loop_ns(&p, &guest);
    if (r < 0) {
        snprintf(report.text, sizeof(report.text), "/dev/kvm is there, but runs no guest: %s%s", strerror(-r),
                 r == -EPROTO ? " (exit at the first instructions)" : "");
        if (r == -EPROTO && p.run != MAP_FAILED)
            snprintf(report.text, sizeof(report.text), "/dev/kvm is there, but its guest stops at the first instructions (exit reason %u)",
                     p.run->exit_reason);
        goto out;
    }
    host = host_loop_ns();
    report.usable = true;
    report.fast = guest <= host * NATIVE_RATIO;
    if (report.fast)
        snprintf(report.text, sizeof(report.text), "runs guest kernel code natively (%.2f ns for a loop that takes %.2f ns on the host)",
                 guest, host);
    else
        snprintf(report.text, sizeof(report.text),
                 "emulates guest kernel code in software (%.0f ns for a loop that takes %.2f ns natively): good for tests only",
                 guest, host);
out:
    probe_destroy(h, &p);
}

void kvm_probe(struct engine_report *r)
{
    pthread_once(&report_once, make_report);
    *r = report;
}
