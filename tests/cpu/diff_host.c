/*
 * The host processor as the oracle: starts the child that runs cases, hands it batches, and turns what it saw
 * into results. A child that dies is replaced, and the case that it ran counts as a crash.
 */
#include "diff_host.h"

#include <cpuid.h>
#include <errno.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/util.h"
#include "isa/x86/xsave.h"

#define HWCAP2_FSGSBASE_BIT 2u
#define PATIENCE_MS 20000

const struct window_page window[WINDOW_PAGES] = {
    { WINDOW_NONE, 0 }, { WINDOW_WRITE, 0 }, { WINDOW_WRITE, 1 }, { WINDOW_READ, 2 },
    { WINDOW_WRITE, 3 }, { WINDOW_NONE, 0 }, { WINDOW_WRITE, 4 }, { WINDOW_NONE, 0 },
};

struct host {
    struct host_memory memory;
    pid_t child;
    unsigned count;             /* slots of the batch */
};

static const uint8_t greg_of[16] = {
    [RAX] = REG_RAX, [RCX] = REG_RCX, [RDX] = REG_RDX, [RBX] = REG_RBX, [RSP] = REG_RSP, [RBP] = REG_RBP,
    [RSI] = REG_RSI, [RDI] = REG_RDI, [R8] = REG_R8, [R9] = REG_R9, [R10] = REG_R10, [R11] = REG_R11,
    [R12] = REG_R12, [R13] = REG_R13, [R14] = REG_R14, [R15] = REG_R15,
};

/* ---- the child ---- */

/* True when done counted up to expected; false when the child is gone or does not move. */
static bool wait_done(struct host *h, uint32_t expected)
{
    _Atomic uint32_t *word = &h->memory.shared->done;
    const struct timespec slice = { .tv_nsec = 100000000 };

    for (unsigned i = 0; i < PATIENCE_MS / 100;) {
        uint32_t now = atomic_load(word);
        int status;

        if (now == expected)
            return true;
        if (syscall(SYS_futex, word, FUTEX_WAIT, now, &slice, NULL, 0) == 0 || errno != ETIMEDOUT)
            continue;
        if (waitpid(h->child, &status, WNOHANG) == h->child) {
            h->child = 0;
            return atomic_load(word) == expected;
        }
        i++;
    }
    return false;
}

static void end_child(struct host *h)
{
    if (h->child) {
        kill(h->child, SIGKILL);
        waitpid(h->child, NULL, 0);
    }
    h->child = 0;
}

static bool start_child(struct host *h)
{
    struct host_shared *s = h->memory.shared;

    end_child(h);
    atomic_store(&s->posted, 0);
    atomic_store(&s->done, UINT32_MAX);
    s->image_size = 0;
    fflush(NULL);
    h->child = fork();
    if (h->child < 0) {
        h->child = 0;
        perror("difftest: fork");
        return false;
    }
    if (h->child == 0)
        host_child(&h->memory);
    if (!wait_done(h, 0) || !s->image_size) {
        fprintf(stderr, "difftest: the native side does not start\n");
        return false;
    }
    return true;
}

struct host *host_create(bool *skip, bool writes_code, bool code16, bool null_segments)
{
    struct host *h = calloc(1, sizeof(*h));

    *skip = !(getauxval(AT_HWCAP2) & HWCAP2_FSGSBASE_BIT);
    if (!h || *skip) {
        fprintf(stderr, "difftest: %s\n", h ? "this host has no FSGSBASE instructions for programs" : "no memory");
        free(h);
        return NULL;
    }
    h->memory.code_fd = memfd_create("difftest-code", MFD_CLOEXEC);
    h->memory.data_fd = memfd_create("difftest-data", MFD_CLOEXEC);
    h->memory.shared = mmap(NULL, sizeof(*h->memory.shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (h->memory.code_fd < 0 || h->memory.data_fd < 0 || h->memory.shared == MAP_FAILED ||
        ftruncate(h->memory.code_fd, CODE_SIZE) || ftruncate(h->memory.data_fd, DATA_SIZE)) {
        perror("difftest: memory for the native side");
        return NULL;
    }
    h->memory.shared->writes_code = writes_code;
    h->memory.shared->code16 = code16;
    h->memory.shared->null_segments = null_segments;
    if (!start_child(h)) {
        host_destroy(h);
        return NULL;
    }
    return h;
}

void host_destroy(struct host *h)
{
    end_child(h);
    close(h->memory.code_fd);
    close(h->memory.data_fd);
    munmap(h->memory.shared, sizeof(*h->memory.shared));
    free(h);
}

/* The child's pages are restored from this copy when they differ, so the next case must find them equal. */
void host_set_data(struct host *h, const uint8_t data[DATA_SIZE])
{
    uint8_t *view = mmap(NULL, DATA_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, h->memory.data_fd, 0);

    memcpy(h->memory.shared->data, data, DATA_SIZE);
    if (view != MAP_FAILED) {
        memcpy(view, data, DATA_SIZE);
        munmap(view, DATA_SIZE);
    }
}

/* ---- XSAVE images, standard format ---- */

static void put_image(uint8_t *image, const struct x86_fpu *f)
{
    uint32_t avx = x86_xsave_offset(XSTATE_AVX), opmask = x86_xsave_offset(XSTATE_OPMASK);
    uint32_t high = x86_xsave_offset(XSTATE_ZMM_HI256), more = x86_xsave_offset(XSTATE_HI16_ZMM);

    store_le16(image, f->fcw);
    store_le16(image + 2, f->fsw);
    image[4] = f->ftw;
    image[5] = 0;
    store_le16(image + 6, f->fop);
    store_le64(image + 8, f->fip);
    store_le64(image + 16, f->fdp);
    store_le32(image + 24, f->mxcsr);
    memcpy(image + 32, f->st, sizeof(f->st));
    for (unsigned i = 0; i < 16; i++)
        memcpy(image + 160 + 16 * i, f->zmm[i], 16);
    memset(image + 416, 0, 48);
    memset(image + 512, 0, 64);
    store_le64(image + 512, x86_xinuse(f) & x86_xsave_host_components());
    for (unsigned i = 0; i < 16; i++) {
        if (avx)
            memcpy(image + avx + 16 * i, f->zmm[i] + 16, 16);
        if (high)
            memcpy(image + high + 32 * i, f->zmm[i] + 32, 32);
        if (more)
            memcpy(image + more + 64 * i, f->zmm[16 + i], 64);
    }
    if (opmask)
        memcpy(image + opmask, f->k, sizeof(f->k));
}

static void get_image(struct x86_fpu *f, const uint8_t *image)
{
    uint64_t present = load_le64(image + 512);
    uint32_t avx = present >> XSTATE_AVX & 1 ? x86_xsave_offset(XSTATE_AVX) : 0;
    uint32_t opmask = present >> XSTATE_OPMASK & 1 ? x86_xsave_offset(XSTATE_OPMASK) : 0;
    uint32_t high = present >> XSTATE_ZMM_HI256 & 1 ? x86_xsave_offset(XSTATE_ZMM_HI256) : 0;
    uint32_t more = present >> XSTATE_HI16_ZMM & 1 ? x86_xsave_offset(XSTATE_HI16_ZMM) : 0;

    memset(f, 0, sizeof(*f));
    f->fcw = 0x37f;
    if (present & 1) {
        f->fcw = load_le16(image);
        f->fsw = load_le16(image + 2);
        f->ftw = image[4];
        f->fop = load_le16(image + 6);
        f->fip = load_le64(image + 8);
        f->fdp = load_le64(image + 16);
        memcpy(f->st, image + 32, sizeof(f->st));
    }
    f->mxcsr = load_le32(image + 24);
    for (unsigned i = 0; i < 16; i++) {
        if (present & 2)
            memcpy(f->zmm[i], image + 160 + 16 * i, 16);
        if (avx)
            memcpy(f->zmm[i] + 16, image + avx + 16 * i, 16);
        if (high)
            memcpy(f->zmm[i] + 32, image + high + 32 * i, 32);
        if (more)
            memcpy(f->zmm[16 + i], image + more + 64 * i, 64);
    }
    if (opmask)
        memcpy(f->k, image + opmask, sizeof(f->k));
}

/* ---- running ---- */

static void put_case(struct host_slot *s, const struct cpu_case *c)
{
    for (unsigned i = 0; i < 16; i++)
        s->gregs[greg_of[i]] = (greg_t)c->in.gpr[i];
    s->gregs[REG_RIP] = (greg_t)(c->in.rip - (c->code_size == 2 ? CODE_BASE : 0));
    s->gregs[REG_EFL] = (greg_t)c->in.rflags;
    s->fs_base = c->in.fs_base;
    s->gs_base = c->in.gs_base;
    s->start = c->start;
    s->bytes = c->bytes;
    s->code_size = c->code_size;
    s->end = END_CRASH;
    memcpy(s->code, c->code, c->bytes);
    put_image(s->image, &c->in.fpu);
}

static void get_result(struct cpu_result *r, const struct host_slot *s)
{
    r->end = s->end;
    if (s->end != END_FAULT)
        return;
    r->vector = (uint8_t)s->gregs[REG_TRAPNO];
    r->error = (uint32_t)s->gregs[REG_ERR];
    r->cr2 = (uint64_t)s->gregs[REG_CR2];
    for (unsigned i = 0; i < 16; i++)
        r->out.gpr[i] = (uint64_t)s->gregs[greg_of[i]];
    r->out.rip = (uint64_t)s->gregs[REG_RIP] + (s->code_size == 2 ? CODE_BASE : 0);
    r->out.rflags = (uint64_t)s->gregs[REG_EFL];
    r->out.fs_base = s->fs_base;
    r->out.gs_base = s->gs_base;
    get_image(&r->out.fpu, s->image);
    memcpy(r->changed, s->changed, sizeof(r->changed));
    for (unsigned i = 0; i < DATA_LINES; i++)
        if (s->changed[i / 64] >> (i % 64) & 1)
            memcpy(r->line[i], s->line[i], LINE);
}

static void post(struct host *h, unsigned from)
{
    struct host_shared *s = h->memory.shared;

    s->first = from;
    s->count = h->count;
    atomic_store(&s->current, from);
    atomic_fetch_add(&s->posted, 1);
    syscall(SYS_futex, &s->posted, FUTEX_WAKE, 1, NULL, NULL, 0);
}

void host_start(struct host *h, const struct cpu_case *cases, unsigned count)
{
    for (unsigned i = 0; i < count; i++)
        put_case(&h->memory.shared->slot[i], &cases[i]);
    h->count = count;
    post(h, 0);
}

void host_finish(struct host *h, struct cpu_result *results)
{
    struct host_shared *s = h->memory.shared;

    while (!wait_done(h, atomic_load(&s->posted))) {
        unsigned next = atomic_load(&s->current) + 1;

        s->slot[next - 1].end = END_CRASH;
        if (!start_child(h))
            exit(2);
        if (next == h->count)
            break;
        post(h, next);
    }
    for (unsigned i = 0; i < h->count; i++)
        get_result(&results[i], &s->slot[i]);
}
