/*
 * The interrupt shadow of STI where it is done in line: nothing comes in between it and the next instruction, whichever way that
 * instruction goes. A guest disables and enables interrupts all the time, another thread sends NMIs, which the engines hold back
 * like any interrupt there, and where each was taken is looked at.
 */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#include "engine/translate/translate.h"
#include "engine_guest.h"

#define CODE 0x400000ull        /* two pages */
#define CODE_GPA 0x200000u
#define STACK 0x610000ull       /* two pages */
#define STACK_GPA 0x320000u
#define NMIS 1500u
#define PAUSES 1500u            /* at most, from one NMI to the next */

/* Position-independent. The label _behind is the instruction behind STI, which comes from there with 1 in RCX. */
#define GUEST(name, text) \
    __asm__(".section .rodata\n.global guest_" #name ", guest_" #name "_behind, guest_" #name "_end\nguest_" #name ":\n" text \
            "\nguest_" #name "_end:\n.previous"); \
    extern const uint8_t guest_##name[], guest_##name##_behind[], guest_##name##_end[];

/* A return over the end of a page. */
GUEST(ret, "1: xor %ecx, %ecx; lea 2f(%rip), %rax; mov %rax, 0xffc(%rbx); lea 0xffc(%rbx), %rsp; mov $1, %ecx; cli; sti; "
           "guest_ret_behind: ret; 2: xor %ecx, %ecx; jmp 1b")
/* What has no form in translated code. */
GUEST(loop, "1: mov $1, %ecx; cli; sti; guest_loop_behind: jrcxz 2f; 2: jmp 1b")
/*
 * An instruction over the end of a page that the TLB has not got. Its first three bytes are in front: CODE + 0xffd. RBP: the next page. It is
 * jumped to at first, because such an instruction belongs to a unit only if it has been seen by itself.
 */
GUEST(cross, "xor %ecx, %ecx; jmp guest_cross_behind; 1: mov $1, %ecx; invlpg (%rbp); nop; cli; sti; "
             "guest_cross_behind: mov $0x12345678, %eax; jmp 1b")

static struct engine_guest *guest;
static atomic_bool stop;

static void *send(void *opaque)
{
    unsigned x = 1;

    while (!atomic_load(&stop)) {
        guest->engine->signal(&guest->vcpu, LAPIC_NMI, 0);
        x = x * 1103515245u + 12345;
        for (unsigned i = (x >> 8) % PAUSES; i > 0; i--)
            __builtin_ia32_pause();
    }
    return NULL;
}

static void check(const uint8_t *code, const uint8_t *behind, const uint8_t *end, gva_t at)
{
    struct translator *t = guest->vcpu.data;
    gva_t forbidden = at + (uint64_t)(behind - code);
    unsigned inside = 0, wrong = 0;
    pthread_t sender;

    memory_write(&guest->machine.memory, CODE_GPA + (at - CODE), code, (size_t)(end - code));
    atomic_store(&stop, false);
    assert_int_equal(pthread_create(&sender, NULL, send, NULL), 0);
    for (unsigned i = 0; i < NMIS; i++) {
        struct x86_state s = guest->base;
        struct guest_exception e;

        s.rip = at;
        s.gpr[RBX] = STACK;
        s.gpr[RBP] = CODE + GUEST_PAGE_SIZE;
        s.gpr[RSP] = STACK + 0x1800;
        s.seg[SEG_CS] = engine_guest_segment(guest, SEL_KERNEL_CODE);
        s.seg[SEG_SS] = engine_guest_segment(guest, SEL_KERNEL_DATA);
        if (engine_guest_run(guest, &s) != GUEST_ENDED || !engine_guest_exception(guest, &s, &e) || e.vector != 2)
            break;
        inside += e.rip != at;
        wrong += e.rip == forbidden && s.gpr[RCX] == 1;
    }
    atomic_store(&stop, true);
    pthread_join(sender, NULL);
    assert_in_range(inside, NMIS / 100, NMIS);
    assert_true(t->entered > 0);
    assert_int_equal(wrong, 0);
}

static int setup(void **state)
{
    guest = aligned_alloc(64, align_up(sizeof(*guest), 64));
    memset(guest, 0, sizeof(*guest));
    engine_guest_init(guest, "translate", "host");
    for (unsigned i = 0; i < 2; i++) {
        engine_guest_map(guest, CODE + i * GUEST_PAGE_SIZE, CODE_GPA + i * GUEST_PAGE_SIZE, PTE_W);
        engine_guest_map(guest, STACK + i * GUEST_PAGE_SIZE, STACK_GPA + i * GUEST_PAGE_SIZE, PTE_W | PTE_NX);
    }
    return 0;
}

static int teardown(void **state)
{
    engine_guest_destroy(guest);
    free(guest);
    return 0;
}

static void test_ret(void **state) { check(guest_ret, guest_ret_behind, guest_ret_end, CODE); }
static void test_loop(void **state) { check(guest_loop, guest_loop_behind, guest_loop_end, CODE); }

static void test_cross(void **state)
{
    check(guest_cross, guest_cross_behind, guest_cross_end, CODE + GUEST_PAGE_SIZE - 3 - (uint64_t)(guest_cross_behind - guest_cross));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_ret, setup, teardown),
        cmocka_unit_test_setup_teardown(test_loop, setup, teardown),
        cmocka_unit_test_setup_teardown(test_cross, setup, teardown),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
