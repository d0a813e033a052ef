/*
 * Dirty logging loses no write: test_dirty ENGINE EPOCHS SEED. ENGINE: kvm-bitmap, too, and direct for translate that runs all this
 * as user code in its sandboxes.
 *
 * Three vCPUs write at random, each in its own ways, and so does a device, while this thread fetches the log and keeps a copy
 * of all memory by it alone. After each epoch everything is stopped; a last fetch must make the copy the same as the memory.
 * The vCPUs' ways: plain stores, LOCKed ones through another mapping, repeated strings, stores beside code that runs, and
 * dirty bits that the page walk sets.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "engine_guest.h"
#include "engine/kvm/kvm.h"
#include "engine/translate/options.h"
#include "engine/translate/sandbox.h"

#define VCPUS 3
#define CODE 0x400000ull
#define CODE_GPA 0x200000u
/* Apart also by their index in the soft TLB. */
#define DATA 0x10000000ull
#define ALIAS 0x20180000ull
#define DATA_GPA 0x1000000u
#define DATA_PAGES 256u         /* few enough that write tags stay in the TLB between two writes */
#define WALKED 0x30300000ull    /* a page for each vCPU, whose PTE's dirty bit it clears */
#define WALKED_GPA 0x400000u
#define PTES 0x40310000ull      /* the page table that maps WALKED */

static struct engine_guest *guest;
static struct vcpu vcpu[VCPUS];
static pthread_barrier_t begin, finish;
static _Atomic bool ending, stopping;
static bool user;
static uint8_t *copy;
static uint64_t *bitmap[MEMORY_MAX_REGIONS];
static uint64_t rounds, fetched;

static uint64_t next(uint64_t *x)
{
    *x ^= *x << 13;
    *x ^= *x >> 7;
    *x ^= *x << 17;
    return *x;
}

/* ---- the guest's code ---- */

static const uint8_t code[] = {
    /* loop: R8 = xorshift(R8) */
    0x4d, 0x89, 0xc1, 0x49, 0xc1, 0xe1, 0x0d, 0x4d, 0x31, 0xc8, /* mov %r8, %r9; shl $13, %r9; xor %r9, %r8 */
    0x4d, 0x89, 0xc1, 0x49, 0xc1, 0xe9, 0x07, 0x4d, 0x31, 0xc8,
    0x4d, 0x89, 0xc1, 0x49, 0xc1, 0xe1, 0x11, 0x4d, 0x31, 0xc8,
    0x4c, 0x89, 0xc0, 0x25, 0xf8, 0xff, 0x0f, 0x00,             /* mov %r8, %rax; and $0xffff8, %eax */
    0x4c, 0x89, 0x04, 0x03, 0x4c, 0x89, 0x44, 0x03, 0x08,       /* mov %r8, (%rbx,%rax); mov %r8, 8(%rbx,%rax) */
    0x4c, 0x89, 0xc0, 0x48, 0xc1, 0xe8, 0x14, 0x25, 0xf8, 0xff, 0x0f, 0x00,
    0xf0, 0x48, 0xff, 0x44, 0x05, 0x00,                         /* lock incq (%rbp,%rax) */
    0x4d, 0x89, 0x45, 0x00,                                     /* mov %r8, (%r13): walks only after its tag was dropped */
    0x41, 0xf6, 0xc0, 0x3f, 0x75, 0,                            /* test $63, %r8b; jnz end */
    0x4c, 0x89, 0xc0, 0x48, 0xc1, 0xe8, 0x1c, 0x25, 0xf8, 0xff, 0x0f, 0x00,
    0x48, 0x8d, 0x3c, 0x03,                                     /* lea (%rbx,%rax), %rdi */
    0xb9, 16, 0, 0, 0, 0xf3, 0x48, 0xab,                        /* mov $16, %ecx; rep stosq */
    0x41, 0xf6, 0xc0, 0x40, 0x75, 3,                            /* test $64, %r8b; jnz 1f */
    0x4d, 0x89, 0x06,                                           /* mov %r8, (%r14) */
    /* 1: So rarely that the page table is mostly dirtied by the walk alone. */
    0x41, 0xf7, 0xc0, 0xc0, 0x3f, 0, 0, 0x75, 7,                /* test $0x3fc0, %r8d; jnz end */
    0xf0, 0x49, 0x0f, 0xba, 0x34, 0x24, 6,                      /* lock btrq $6, (%r12) */
    0xe9,                                                       /* end: jmp loop */
};

static void make_code(void)
{
    uint8_t *ram = guest->ram + CODE_GPA;
    size_t branch = sizeof(code) - 1;

    memcpy(ram, code, sizeof(code));
    *(int32_t *)(void *)(ram + sizeof(code)) = -(int32_t)(sizeof(code) + 4);
    /* The distance of the first branch, so that nobody has to count. */
    for (size_t i = 0; i + 6 < sizeof(code); i++)
        if (memcmp(code + i, (uint8_t[]){ 0x41, 0xf6, 0xc0, 0x3f, 0x75 }, 5) == 0)
            ram[i + 5] = (uint8_t)(branch - (i + 6));
}

static void on_code_written(void *opaque, gpa_t page)
{
    for (unsigned i = 0; i < VCPUS; i++)
        guest->engine->code_written(&vcpu[i], page);
}

static void make_vcpus(uint64_t seed)
{
    const uint64_t bits = PTE_W | (user ? PTE_U : 0);
    gpa_t pte = 0;

    engine_guest_map(guest, CODE, CODE_GPA, bits);
    make_code();
    for (unsigned i = 0; i <= DATA_PAGES; i++) {
        engine_guest_map(guest, DATA + i * 0x1000, DATA_GPA + i * 0x1000, bits | PTE_NX);
        engine_guest_map(guest, ALIAS + i * 0x1000, DATA_GPA + i * 0x1000, bits | PTE_NX);
    }
    for (unsigned i = 0; i < VCPUS; i++)
        pte = engine_guest_map(guest, WALKED + i * 0x1000, WALKED_GPA + i * 0x1000, bits | PTE_NX);
    engine_guest_map(guest, PTES, pte & GUEST_PAGE_MASK, bits | PTE_NX);

    for (unsigned i = 0; i < VCPUS; i++) {
        struct x86_state s = guest->base;

        vcpu[i] = (struct vcpu){ .machine = &guest->machine, .lapic = irqchip_lapic(guest->chip, i), .model = guest->model,
                                 .index = i, .count = VCPUS, .group = guest->group, .tsc_hz = guest->vcpu.tsc_hz,
                                 .engine = guest->engine };
        if (i == 0)
            guest->engine->vcpu_destroy(&guest->vcpu);
        if (guest->engine->vcpu_create(&vcpu[i]))
            exit(2);
        s.seg[SEG_CS] = engine_guest_segment(guest, user ? SEL_CODE64 : SEL_KERNEL_CODE);
        s.seg[SEG_SS] = engine_guest_segment(guest, user ? SEL_DATA : SEL_KERNEL_DATA);
        if (user) {
            s.seg[SEG_DS] = s.seg[SEG_ES] = (struct x86_seg){ .attr = SEG_UNUSABLE };
            s.rflags |= RFLAGS_IF;
        }
        s.rip = CODE;
        s.gpr[RBX] = DATA;
        s.gpr[RBP] = ALIAS;
        s.gpr[R8] = seed * 7919 + i + 1;
        s.gpr[R12] = PTES + (WALKED >> 12 & 511) * 8 + i * 8;
        s.gpr[R13] = WALKED + i * 0x1000;
        s.gpr[R14] = CODE + 0x800 + i * 64;
        guest->engine->import_state(&vcpu[i], &s);
    }
    guest->machine.memory.code_written = on_code_written;
}

/* ---- threads ---- */

static void *run_vcpu(void *opaque)
{
    struct vcpu *v = opaque;

    for (;;) {
        pthread_barrier_wait(&begin);
        if (ending)
            return NULL;
        if (guest->engine->run(v) != VM_EXIT_KICK) {
            fprintf(stderr, "vCPU %u died\n", v->index);
            exit(1);
        }
        pthread_barrier_wait(&finish);
    }
}

static void *run_device(void *opaque)
{
    struct memory *m = &guest->machine.memory;
    uint64_t x = *(uint64_t *)opaque;

    for (;;) {
        pthread_barrier_wait(&begin);
        if (ending)
            return NULL;
        while (!stopping) {
            gpa_t gpa = DATA_GPA + next(&x) % (DATA_PAGES * GUEST_PAGE_SIZE - 64);

            if (x & 64) {
                memory_write(m, gpa, &x, 8);
            } else {
                memset(memory_map(m, gpa, 64), (int)x, 64);
                memory_mark_written(m, gpa, 64);
            }
        }
        pthread_barrier_wait(&finish);
    }
}

static void fetch(void)
{
    struct memory *m = &guest->machine.memory;

    if (memory_dirty_fetch(m, bitmap)) {
        fprintf(stderr, "fetching failed\n");
        exit(1);
    }
    for (size_t w = 0; w < memory_bitmap_words(&m->region[0]); w++)
        for (; bitmap[0][w]; bitmap[0][w] &= bitmap[0][w] - 1) {
            size_t at = (w * 64 + (size_t)__builtin_ctzll(bitmap[0][w])) * GUEST_PAGE_SIZE;

            memcpy(copy + at, guest->ram + at, GUEST_PAGE_SIZE);
            fetched++;
        }
    rounds++;
}

static int compare(unsigned epoch)
{
    int bad = 0;

    for (size_t at = 0; at < GUEST_RAM_SIZE; at += GUEST_PAGE_SIZE)
        if (memcmp(copy + at, guest->ram + at, GUEST_PAGE_SIZE)) {
            fprintf(stderr, "epoch %u: a write to page %#zx was lost\n", epoch, at);
            bad = 1;
        }
    return bad;
}

int main(int argc, char **argv)
{
    struct memory *m;
    pthread_t thread[VCPUS + 1];
    uint64_t seed, x;
    unsigned epochs;
    int bad = 0;

    if (argc != 4)
        return 2;
    translate_options.threshold = 1;
    user = strcmp(argv[1], "direct") == 0;
    if (user && !sandbox_abilities()->usable) {
        fprintf(stderr, "skipped: %s\n", sandbox_abilities()->text);
        return 77;
    }
    if (user)
        translate_options.direct = TRANSLATE_DIRECT_ALWAYS;
    kvm_use_dirty_ring = strcmp(argv[1], "kvm-bitmap") != 0;
    epochs = (unsigned)strtoul(argv[2], NULL, 0);
    seed = x = strtoull(argv[3], NULL, 0) | 1;
    guest = aligned_alloc(64, align_up(sizeof(*guest), 64));
    memset(guest, 0, sizeof(*guest));
    engine_guest_init(guest, user ? "translate" : kvm_use_dirty_ring ? argv[1] : "kvm", "host");
    m = &guest->machine.memory;
    make_vcpus(seed);
    copy = malloc(GUEST_RAM_SIZE);
    bitmap[0] = calloc(memory_bitmap_words(&m->region[0]), 8);
    pthread_barrier_init(&begin, NULL, VCPUS + 2);
    pthread_barrier_init(&finish, NULL, VCPUS + 2);
    for (unsigned i = 0; i < VCPUS; i++)
        pthread_create(&thread[i], NULL, run_vcpu, &vcpu[i]);
    pthread_create(&thread[VCPUS], NULL, run_device, &x);

    for (unsigned epoch = 0; epoch < epochs && !bad; epoch++) {
        unsigned n = next(&seed) % 12;

        stopping = false;
        /* Logging may begin while all is still or while all runs. */
        bool early = epoch & 1;
        if (early && memory_dirty_start(m))
            return 1;
        if (early)
            memcpy(copy, guest->ram, GUEST_RAM_SIZE);
        pthread_barrier_wait(&begin);
        if (!early) {
            nanosleep(&(struct timespec){ .tv_nsec = (long)(next(&seed) % 3000000) }, NULL);
            if (memory_dirty_start(m) || memory_dirty_start(m) != -EBUSY)
                return 1;
            memcpy(copy, guest->ram, GUEST_RAM_SIZE);
        }
        for (unsigned i = 0; i < n; i++) {
            /* Time for the vCPUs to fill their TLBs again; also none at all. */
            if (next(&seed) & 3)
                nanosleep(&(struct timespec){ .tv_nsec = (long)(next(&seed) % 3000000) }, NULL);
            fetch();
        }
        stopping = true;
        for (unsigned i = 0; i < VCPUS; i++)
            guest->engine->kick(&vcpu[i]);
        pthread_barrier_wait(&finish);
        fetch();
        bad = compare(epoch);
        memory_dirty_stop(m);
    }
    ending = true;
    pthread_barrier_wait(&begin);
    for (unsigned i = 0; i <= VCPUS; i++)
        pthread_join(thread[i], NULL);
    if (!bad && fetched < rounds) {
        fprintf(stderr, "nothing was written: %llu pages in %llu rounds\n", (unsigned long long)fetched, (unsigned long long)rounds);
        bad = 1;
    }
    printf("%llu pages in %llu rounds%s\n", (unsigned long long)fetched, (unsigned long long)rounds,
           strcmp(guest->engine->name, "kvm") == 0 && ((struct kvm_vcpu *)vcpu[0].data)->ring ? ", by rings" : "");
    for (unsigned i = 0; user && i < VCPUS; i++) {
        struct engine_counters c = { 0 };

        guest->engine->counters(&vcpu[i], &c);
        printf("vCPU %u: %llu times in its sandbox, for %.3f s\n", i, (unsigned long long)c.native_runs, (double)c.native_ns / 1e9);
        bad |= c.native_ns == 0;
    }
    for (unsigned i = 1; i < VCPUS; i++)
        guest->engine->vcpu_destroy(&vcpu[i]);
    guest->vcpu = vcpu[0];
    engine_guest_destroy(guest);
    free(guest);
    free(copy);
    free(bitmap[0]);
    return bad;
}
