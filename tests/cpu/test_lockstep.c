/*
 * Lock-step mode finds a translation that is wrong, and only that: a loop runs in it, then a constant in its translation is
 * changed behind the translator's back, and it runs again.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#include "engine/translate/translate.h"
#include "engine_guest.h"

#define CODE 0x400000ull
#define CODE_GPA 0x200000u
#define DATA 0x610000ull
#define DATA_GPA 0x320000u
#define ROUNDS 20u

/*
 *     mov $ROUNDS, %ecx
 * 1:  add $0x11223344, %eax;  mov %eax, (%rbx);  add $8, %rbx;  dec %ecx;  jnz 1b
 *     out %al, $GUEST_PORT
 */
static const uint8_t code[] = { 0xb9, ROUNDS, 0, 0, 0, 0x05, 0x44, 0x33, 0x22, 0x11, 0x89, 0x03, 0x48, 0x83, 0xc3, 0x08,
                                0xff, 0xc9, 0x75, 0xf1, 0xe6, GUEST_PORT };
#define CONSTANT 0x11223344u

static struct engine_guest *guest;

static enum guest_end run(struct x86_state *s)
{
    *s = guest->base;
    s->rip = CODE;
    s->gpr[RBX] = DATA;
    s->gpr[RAX] = 0;
    s->seg[SEG_CS] = engine_guest_segment(guest, SEL_KERNEL_CODE);
    s->seg[SEG_SS] = engine_guest_segment(guest, SEL_KERNEL_DATA);
    return engine_guest_run(guest, s);
}

static int setup(void **state)
{
    guest = aligned_alloc(64, align_up(sizeof(*guest), 64));
    memset(guest, 0, sizeof(*guest));
    translate_options.lockstep = true;
    engine_guest_init(guest, "translate", "host");
    engine_guest_map(guest, CODE, CODE_GPA, PTE_W);
    engine_guest_map(guest, DATA, DATA_GPA, PTE_W | PTE_NX);
    return memory_write(&guest->machine.memory, CODE_GPA, code, sizeof(code));
}

static int teardown(void **state)
{
    engine_guest_destroy(guest);
    free(guest);
    return 0;
}

/* Puts value in place of what stands at offset in each copy of pattern. Returns how many there were. */
static unsigned patch(const void *pattern, unsigned size, unsigned offset, uint8_t value)
{
    struct translator *t = guest->vcpu.data;
    unsigned found = 0;

    for (size_t i = t->code.fixed; i + size <= t->code.used; i++)
        if (memcmp(t->code.write + i, pattern, size) == 0) {
            t->code.write[i + offset] = value;
            found++;
        }
    return found;
}

static void test_right(void **state)
{
    struct x86_state s;

    assert_int_equal(run(&s), GUEST_ENDED);
    assert_int_equal((uint32_t)s.gpr[RAX], CONSTANT * ROUNDS);
    assert_int_equal((uint32_t)engine_guest_get(guest, DATA_GPA + 8 * (ROUNDS - 1)), CONSTANT * ROUNDS);
    assert_int_equal(run(&s), GUEST_ENDED);
    assert_true(((struct translator *)guest->vcpu.data)->entered > ROUNDS);
}

static void test_wrong_register(void **state)
{
    uint32_t constant = CONSTANT;
    struct x86_state s;

    assert_int_equal(run(&s), GUEST_ENDED);
    assert_true(patch(&constant, 4, 0, 0x45) > 0);
    assert_int_equal(run(&s), GUEST_DIED);
    /* Not beyond the block that differed. */
    assert_int_equal(s.gpr[RCX], ROUNDS - 1);
}

/* Four bytes become eight: registers are right, memory is not. */
static void test_wrong_memory(void **state)
{
    struct translator *t;
    struct x86_state s;
    unsigned found = 0;

    assert_int_equal(run(&s), GUEST_ENDED);
    engine_guest_put(guest, DATA_GPA + 4, 0xffffffff, 4);
    t = guest->vcpu.data;
    /* mov %eax, (…) with a REX prefix for its base register gets REX.W. */
    for (size_t i = t->code.fixed; i + 3 <= t->code.used; i++) {
        uint8_t *p = t->code.write + i;

        if ((p[0] & 0xfc) == 0x40 && p[1] == 0x89 && (p[2] & 0x3f) == 0x04) {
            p[0] |= 8;
            found++;
        }
    }
    assert_true(found > 0);
    assert_int_equal(run(&s), GUEST_DIED);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_right, setup, teardown),
        cmocka_unit_test_setup_teardown(test_wrong_register, setup, teardown),
        cmocka_unit_test_setup_teardown(test_wrong_memory, setup, teardown),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
