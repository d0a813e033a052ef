/* What perf is told of translations: the units that run are in the map, in order and where they are. Usage: test_perf. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/translate/translate.h"
#include "engine_guest.h"

#define CODE 0x400000ull
#define CODE_GPA 0x200000u

/* mov $5, %ecx;  1: dec %ecx;  jnz 1b;  out %al, $GUEST_PORT */
static const uint8_t code[] = { 0xb9, 5, 0, 0, 0, 0xff, 0xc9, 0x75, 0xfc, 0xe6, GUEST_PORT };

static void test_map(void **state)
{
    struct engine_guest *g = aligned_alloc(64, align_up(sizeof(*g), 64));
    const struct translator *t;
    struct x86_state s;
    char path[64], name[64];
    uintptr_t at, end = 0;
    size_t size;
    bool loop = false;
    FILE *f;

    snprintf(path, sizeof(path), "/tmp/perf-%d.map", (int)getpid());
    unlink(path);
    memset(g, 0, sizeof(*g));
    translate_options.perf = TRANSLATE_PERF_MAP;
    engine_guest_init(g, "translate", "host");
    engine_guest_map(g, CODE, CODE_GPA, PTE_W);
    assert_int_equal(memory_write(&g->machine.memory, CODE_GPA, code, sizeof(code)), 0);
    s = g->base;
    s.rip = CODE;
    s.seg[SEG_CS] = engine_guest_segment(g, SEL_KERNEL_CODE);
    s.seg[SEG_SS] = engine_guest_segment(g, SEL_KERNEL_DATA);
    assert_int_equal(engine_guest_run(g, &s), GUEST_ENDED);
    t = g->vcpu.data;

    f = fopen(path, "re");
    assert_non_null(f);
    while (fscanf(f, "%" SCNxPTR " %zx %63s\n", &at, &size, name) == 3) {
        assert_true(at >= end && size > 0);
        end = at + size;
        assert_true(at >= (uintptr_t)t->code.exec && end <= (uintptr_t)t->code.exec + t->code.used);
        if (at == (uintptr_t)t->code.exec)
            assert_string_equal(name, "ringfort_runtime");
        loop |= strcmp(name, "guest_400005") == 0;
    }
    assert_true(feof(f) && loop);
    fclose(f);
    unlink(path);
    engine_guest_destroy(g);
    free(g);
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_map) };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
