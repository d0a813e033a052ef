/*
 * Code that changes: by its own stores, by stores through another mapping, by devices, by page tables; and instructions
 * that reach into another page. Usage: test_smc ENGINE.
 *
 * Each test assembles a few instructions into a small machine (engine_guest.h) at privilege level 0, runs it until it writes to
 * the port, and looks at registers.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#include "engine_guest.h"

/* Two pages of code side by side, and places for others to map them from. All writable and executable. */
#define CODE 0x400000ull
#define CODE_GPA 0x200000u
#define SECOND (CODE + 0x1000)
#define SECOND_GPA (CODE_GPA + 0x1000)
#define OTHER_GPA 0x300000u             /* a page to put in SECOND's place */
#define ALIAS 0x800000ull               /* SECOND's page again */
#define STACK 0x600000ull               /* a page below */
#define STACK_GPA 0x310000u
#define PTE_WINDOW 0xa00000ull          /* the page table that maps CODE and SECOND */
#define DATA 0x610000ull
#define DATA_GPA 0x320000u

static const char *engine_name;
static struct engine_guest *guest;
static gpa_t second_pte;

static int setup(void **state)
{
    guest = aligned_alloc(64, align_up(sizeof(*guest), 64));
    memset(guest, 0, sizeof(*guest));
    engine_guest_init(guest, engine_name, "host");
    engine_guest_map(guest, CODE, CODE_GPA, PTE_W);
    second_pte = engine_guest_map(guest, SECOND, SECOND_GPA, PTE_W);
    engine_guest_map(guest, ALIAS, SECOND_GPA, PTE_W | PTE_NX);
    engine_guest_map(guest, STACK - 0x1000, STACK_GPA, PTE_W | PTE_NX);
    engine_guest_map(guest, DATA, DATA_GPA, PTE_W | PTE_NX);
    engine_guest_map(guest, PTE_WINDOW, second_pte & GUEST_PAGE_MASK, PTE_W | PTE_NX);
    return 0;
}

static int teardown(void **state)
{
    engine_guest_destroy(guest);
    free(guest);
    return 0;
}

/* ---- assembling ---- */

struct code {
    gpa_t gpa;
    gva_t va;
};

static struct code at(gva_t va)
{
    return (struct code){ .va = va, .gpa = CODE_GPA + (gpa_t)(va - CODE) };
}

/* As a device would, so that the vCPU, which may have run before, hears of it. */
static void emit(struct code *c, const void *bytes, unsigned n)
{
    assert_int_equal(memory_write(&guest->machine.memory, c->gpa, bytes, n), 0);
    c->gpa += n;
    c->va += n;
}

#define EMIT(c, ...) emit((c), (const uint8_t[]){ __VA_ARGS__ }, sizeof((const uint8_t[]){ __VA_ARGS__ }))

static void emit32(struct code *c, uint32_t v) { emit(c, &v, 4); }
static void emit64(struct code *c, uint64_t v) { emit(c, &v, 8); }

/* mov $v, %eax: the immediate is what most tests change. Returns where it is. */
static gva_t mov_eax(struct code *c, uint32_t v)
{
    EMIT(c, 0xb8);
    emit32(c, v);
    return c->va - 4;
}

/* mov $v, %reg (64 bits), registers 0…7. */
static void mov_imm(struct code *c, unsigned reg, uint64_t v)
{
    EMIT(c, 0x48, (uint8_t)(0xb8 | reg));
    emit64(c, v);
}

static void call(struct code *c, gva_t target)
{
    EMIT(c, 0xe8);
    emit32(c, (uint32_t)(target - (c->va + 4)));
}

static void end(struct code *c) { EMIT(c, 0xe6, GUEST_PORT, 0xf4, 0xeb, 0xfd); }

/* A function in the second page that returns v in EAX. */
static gva_t function(gva_t va, uint32_t v)
{
    struct code c = at(va);
    gva_t imm = mov_eax(&c, v);

    EMIT(&c, 0xc3);
    return imm;
}

static struct x86_state start(void)
{
    struct x86_state s = guest->base;

    s.seg[SEG_CS] = engine_guest_segment(guest, SEL_KERNEL_CODE);
    s.seg[SEG_SS] = engine_guest_segment(guest, SEL_KERNEL_DATA);
    s.rip = CODE;
    s.gpr[RSP] = STACK;
    return s;
}

static void run(struct x86_state *s)
{
    struct guest_exception e;

    assert_int_equal(engine_guest_run(guest, s), GUEST_ENDED);
    if (engine_guest_exception(guest, s, &e))
        fail_msg("exception %u, error %x, at %llx, cr2 %llx", e.vector, e.error, (unsigned long long)e.rip,
                 (unsigned long long)s->cr2);
}

/* ---- the same page ---- */

/* A store changes the instruction behind it, in a block that ran before. */
static void test_next_instruction(void **state)
{
    struct x86_state s = start();
    struct code c = at(CODE);
    gva_t loop;

    EMIT(&c, 0xb9, 3, 0, 0, 0);                 /* mov $3, %ecx */
    loop = c.va;
    EMIT(&c, 0x89, 0x0d);                       /* mov %ecx, imm(%rip): its operand is 5 bytes ahead */
    emit32(&c, 1);
    mov_eax(&c, 0x11111111);
    EMIT(&c, 0x01, 0xc3);                       /* add %eax, %ebx */
    EMIT(&c, 0xff, 0xc9);                       /* dec %ecx */
    EMIT(&c, 0x75, (uint8_t)(loop - (c.va + 2)));       /* jnz loop */
    end(&c);
    run(&s);
    assert_int_equal(s.gpr[RBX], 3 + 2 + 1);
}

/* One further up, which the loop reaches again. */
static void test_earlier_instruction(void **state)
{
    struct x86_state s = start();
    struct code c = at(CODE);
    gva_t loop, imm;

    EMIT(&c, 0xb9, 4, 0, 0, 0);
    loop = c.va;
    imm = mov_eax(&c, 100);
    EMIT(&c, 0x01, 0xc3);
    EMIT(&c, 0xff, 0x05);                       /* incl imm(%rip) */
    emit32(&c, (uint32_t)(imm - (c.va + 4)));
    EMIT(&c, 0xff, 0xc9);
    EMIT(&c, 0x75, (uint8_t)(loop - (c.va + 2)));
    end(&c);
    run(&s);
    assert_int_equal(s.gpr[RBX], 100 + 101 + 102 + 103);
}

/* Another instruction altogether, of another length: a two-byte NOP becomes a jump over what follows. */
static void test_other_instruction(void **state)
{
    struct x86_state s = start();
    struct code c = at(CODE);
    gva_t loop, nop;

    EMIT(&c, 0xb9, 2, 0, 0, 0);
    loop = c.va;
    nop = c.va;
    EMIT(&c, 0x66, 0x90);
    EMIT(&c, 0xff, 0xc3);                       /* inc %ebx */
    EMIT(&c, 0x66, 0xc7, 0x05);                 /* movw $0x02eb, nop(%rip) */
    emit32(&c, (uint32_t)(nop - (c.va + 6)));
    EMIT(&c, 0xeb, 0x02);
    EMIT(&c, 0xff, 0xc9);
    EMIT(&c, 0x75, (uint8_t)(loop - (c.va + 2)));
    end(&c);
    run(&s);
    assert_int_equal(s.gpr[RBX], 1);
}

/* Data beside code changes all the time: that must work, whatever it costs. */
static void test_data_beside_code(void **state)
{
    struct x86_state s = start();
    struct code c = at(CODE);
    gva_t loop;

    mov_imm(&c, RDI, CODE + 0x800);
    EMIT(&c, 0xb9);
    emit32(&c, 5000);
    loop = c.va;
    EMIT(&c, 0xff, 0x07);                       /* incl (%rdi) */
    EMIT(&c, 0xff, 0xc9);
    EMIT(&c, 0x75, (uint8_t)(loop - (c.va + 2)));
    end(&c);
    run(&s);
    assert_int_equal((uint32_t)engine_guest_get(guest, CODE_GPA + 0x800), 5000);
}

/* ---- another page, by every kind of store ---- */

/* Calls the function, runs the bytes that change it (RDI: its immediate), calls it again: sums of both in EBX. */
static void change_by(const uint8_t *bytes, unsigned n, gva_t through, uint32_t expected)
{
    struct x86_state s = start();
    struct code c = at(CODE);
    gva_t imm = function(SECOND + 0x40, 1);

    mov_imm(&c, RDI, imm - SECOND + through);
    mov_imm(&c, RSI, DATA);
    EMIT(&c, 0xb8, 2, 0, 0, 0);
    EMIT(&c, 0x89, 0x06);                       /* mov %eax, (%rsi) */
    call(&c, SECOND + 0x40);
    EMIT(&c, 0x01, 0xc3);
    emit(&c, bytes, n);
    call(&c, SECOND + 0x40);
    EMIT(&c, 0x01, 0xc3);
    end(&c);
    run(&s);
    assert_int_equal(s.gpr[RBX], expected);
}
#define CHANGE_BY(through, expected, ...) \
    change_by((const uint8_t[]){ __VA_ARGS__ }, sizeof((const uint8_t[]){ __VA_ARGS__ }), through, expected)

static void test_other_page(void **state)
{
    CHANGE_BY(SECOND, 1 + 2, 0xc7, 0x07, 2, 0, 0, 0);                   /* movl $2, (%rdi) */
    CHANGE_BY(SECOND, 1 + 2, 0xc6, 0x07, 2);                            /* movb $2, (%rdi) */
    CHANGE_BY(SECOND, 1 + 2, 0xff, 0x07);                               /* incl (%rdi) */
}

static void test_alias(void **state)
{
    CHANGE_BY(ALIAS, 1 + 2, 0xc7, 0x07, 2, 0, 0, 0);
    CHANGE_BY(ALIAS, 1 + 2, 0xf0, 0xff, 0x07);                          /* lock incl (%rdi) */
}

static void test_atomic(void **state)
{
    CHANGE_BY(SECOND, 1 + 2, 0xf0, 0xff, 0x07);
    CHANGE_BY(SECOND, 1 + 2, 0xb8, 2, 0, 0, 0, 0x87, 0x07);             /* xchg %eax, (%rdi) */
    CHANGE_BY(SECOND, 1 + 2, 0xb8, 1, 0, 0, 0, 0xb9, 2, 0, 0, 0, 0xf0, 0x0f, 0xb1, 0x0f);      /* lock cmpxchg */
}

static void test_string(void **state)
{
    /* mov $4, %ecx; rep movsb */
    CHANGE_BY(SECOND, 1 + 2, 0xb9, 4, 0, 0, 0, 0xf3, 0xa4);
    /* movsd */
    CHANGE_BY(SECOND, 1 + 2, 0xa5);
    /* mov $2, %eax; stosb */
    CHANGE_BY(SECOND, 1 + 2, 0xb0, 2, 0xaa);
}

static void test_vector(void **state)
{
    if (guest->emulated)
        skip();
    /* movd (%rsi), %xmm0; movd %xmm0, (%rdi) */
    CHANGE_BY(SECOND, 1 + 2, 0x66, 0x0f, 0x6e, 0x06, 0x66, 0x0f, 0x7e, 0x07);
    /* fninit; fildl (%rsi); fistpl (%rdi) */
    CHANGE_BY(SECOND, 1 + 2, 0xdb, 0xe3, 0xdb, 0x06, 0xdb, 0x1f);
}

static void test_push(void **state)
{
    struct x86_state s = start();
    struct code c = at(CODE);
    gva_t imm = function(SECOND + 0x40, 1);

    call(&c, SECOND + 0x40);
    EMIT(&c, 0x01, 0xc3);
    EMIT(&c, 0x48, 0x89, 0xe2);                 /* mov %rsp, %rdx */
    mov_imm(&c, RSP, imm + 8);
    mov_imm(&c, RAX, 0xc300000002);             /* the immediate and RET behind it */
    EMIT(&c, 0x50);                             /* push %rax */
    EMIT(&c, 0x48, 0x89, 0xd4);                 /* mov %rdx, %rsp */
    call(&c, SECOND + 0x40);
    EMIT(&c, 0x01, 0xc3);
    end(&c);
    run(&s);
    assert_int_equal(s.gpr[RBX], 1 + 2);
}

/* ---- devices ---- */

static void test_device(void **state)
{
    struct x86_state s = start();
    struct code c = at(CODE);
    gva_t imm = function(SECOND + 0x40, 1);
    uint32_t two = 2;

    call(&c, SECOND + 0x40);
    EMIT(&c, 0x01, 0xc3);
    EMIT(&c, 0xe6, GUEST_PORT);
    call(&c, SECOND + 0x40);
    EMIT(&c, 0x01, 0xc3);
    end(&c);
    run(&s);
    assert_int_equal(s.gpr[RBX], 1);
    assert_int_equal(memory_write(&guest->machine.memory, SECOND_GPA + (imm - SECOND), &two, 4), 0);
    run(&s);
    assert_int_equal(s.gpr[RBX], 1 + 2);
}

/* The way of zero-copy devices: a host pointer, and told afterwards. */
static void test_device_mapped(void **state)
{
    struct x86_state s = start();
    struct code c = at(CODE);
    gva_t imm = function(SECOND + 0x40, 1);
    uint8_t *p = memory_map(&guest->machine.memory, SECOND_GPA + (imm - SECOND), 4);

    call(&c, SECOND + 0x40);
    EMIT(&c, 0x01, 0xc3);
    EMIT(&c, 0xe6, GUEST_PORT);
    call(&c, SECOND + 0x40);
    EMIT(&c, 0x01, 0xc3);
    end(&c);
    run(&s);
    *p = 7;
    memory_mark_written(&guest->machine.memory, SECOND_GPA + (imm - SECOND), 4);
    run(&s);
    assert_int_equal(s.gpr[RBX], 1 + 7);
}

/* ---- page tables ---- */

/* Emits: new value of SECOND's page table entry; INVLPG. */
static void remap_second(struct code *c, uint64_t entry)
{
    mov_imm(c, RDX, PTE_WINDOW + (second_pte & 0xfff));
    mov_imm(c, RAX, entry);
    EMIT(c, 0x48, 0x89, 0x02);                  /* mov %rax, (%rdx) */
    mov_imm(c, RDX, SECOND);
    EMIT(c, 0x0f, 0x01, 0x3a);                  /* invlpg (%rdx) */
}

static void test_remapped(void **state)
{
    struct x86_state s = start();
    struct code c = at(CODE);

    function(SECOND + 0x40, 1);
    memcpy(guest->ram + OTHER_GPA, guest->ram + SECOND_GPA, 4096);
    engine_guest_put(guest, OTHER_GPA + 0x41, 5, 4);
    for (unsigned i = 0; i < 4; i++) {
        call(&c, SECOND + 0x40);
        EMIT(&c, 0x01, 0xc3);
        remap_second(&c, (i & 1 ? SECOND_GPA : OTHER_GPA) | PTE_P | PTE_W | PTE_A | PTE_D);
    }
    end(&c);
    run(&s);
    assert_int_equal(s.gpr[RBX], 1 + 5 + 1 + 5);
}

/* The same call and the same jump again and again, while the page that they lead to is now this one, now that one. */
static void test_remapped_in_loop(void **state)
{
    struct x86_state s = start();
    struct code c = at(CODE);
    struct code jump = at(SECOND + 0x80);
    gva_t head, back;

    function(SECOND + 0x40, 1);
    /* At SECOND + 0x80: mov $…, %eax; jmp *%rdi. */
    mov_eax(&jump, 16);
    EMIT(&jump, 0xff, 0xe7);
    memcpy(guest->ram + OTHER_GPA, guest->ram + SECOND_GPA, 4096);
    engine_guest_put(guest, OTHER_GPA + 0x41, 5, 4);
    engine_guest_put(guest, OTHER_GPA + 0x81, 512, 4);

    EMIT(&c, 0xb9);
    emit32(&c, 40);                             /* mov $40, %ecx */
    head = c.va;
    call(&c, SECOND + 0x40);
    EMIT(&c, 0x01, 0xc3);                       /* add %eax, %ebx */
    back = c.va + 10 + 5;
    mov_imm(&c, RDI, back);
    EMIT(&c, 0xe9);                             /* jmp SECOND + 0x80 */
    emit32(&c, (uint32_t)(SECOND + 0x80 - (c.va + 4)));
    EMIT(&c, 0x01, 0xc3);
    mov_imm(&c, RDX, PTE_WINDOW + (second_pte & 0xfff));
    mov_imm(&c, RAX, SECOND_GPA ^ OTHER_GPA);
    EMIT(&c, 0x48, 0x31, 0x02);                 /* xor %rax, (%rdx) */
    mov_imm(&c, RDX, SECOND);
    EMIT(&c, 0x0f, 0x01, 0x3a);                 /* invlpg (%rdx) */
    EMIT(&c, 0xff, 0xc9);                       /* dec %ecx */
    EMIT(&c, 0x0f, 0x85);                       /* jnz head */
    emit32(&c, (uint32_t)(head - (c.va + 4)));
    end(&c);
    run(&s);
    assert_int_equal(s.gpr[RBX], 20 * (1 + 16) + 20 * (5 + 512));
}

/* After a switch of the address space with other tables. */
static void test_other_space(void **state)
{
    struct x86_state s = start();
    struct code c = at(CODE);
    gpa_t root = 0x400000, pdpt = 0x401000, pd = 0x402000, pt = 0x403000, entry;
    uint64_t cr3 = guest->base.cr3;

    /* A copy of the path to SECOND, with another page in its place. */
    memcpy(guest->ram + root, guest->ram + cr3, 4096);
    entry = engine_guest_get(guest, cr3) & 0x000ffffffffff000;
    memcpy(guest->ram + pdpt, guest->ram + entry, 4096);
    entry = engine_guest_get(guest, entry) & 0x000ffffffffff000;
    memcpy(guest->ram + pd, guest->ram + entry, 4096);
    memcpy(guest->ram + pt, guest->ram + (second_pte & GUEST_PAGE_MASK), 4096);
    engine_guest_put(guest, root, pdpt | 7, 8);
    engine_guest_put(guest, pdpt, pd | 7, 8);
    engine_guest_put(guest, pd + (SECOND >> 21 & 511) * 8, pt | 7, 8);
    engine_guest_put(guest, pt + (second_pte & 0xfff), OTHER_GPA | PTE_P | PTE_W | PTE_A | PTE_D, 8);

    function(SECOND + 0x40, 1);
    memcpy(guest->ram + OTHER_GPA, guest->ram + SECOND_GPA, 4096);
    engine_guest_put(guest, OTHER_GPA + 0x41, 5, 4);
    for (unsigned i = 0; i < 4; i++) {
        call(&c, SECOND + 0x40);
        EMIT(&c, 0x01, 0xc3);
        mov_imm(&c, RAX, i & 1 ? cr3 : root);
        EMIT(&c, 0x0f, 0x22, 0xd8);             /* mov %rax, %cr3 */
    }
    end(&c);
    run(&s);
    assert_int_equal(s.gpr[RBX], 1 + 5 + 1 + 5);
}

/* ---- instructions across pages ---- */

/* MOV EAX with its immediate divided: two bytes of it here, two there; then RET. Returns its address. */
static gva_t crossing(uint32_t v)
{
    struct code c = at(SECOND - 3);

    mov_eax(&c, v);
    EMIT(&c, 0xc3);
    return SECOND - 3;
}

static void test_crossing_changed(void **state)
{
    struct x86_state s = start();
    struct code c = at(CODE);
    gva_t f = crossing(0x00010001);

    mov_imm(&c, RDI, SECOND);
    mov_imm(&c, RSI, SECOND - 2);
    call(&c, f);
    EMIT(&c, 0x01, 0xc3);
    EMIT(&c, 0x66, 0xc7, 0x07, 2, 0);           /* movw $2, (%rdi): the half in the second page */
    call(&c, f);
    EMIT(&c, 0x01, 0xc3);
    EMIT(&c, 0x66, 0xc7, 0x06, 3, 0);           /* movw $3, (%rsi): the one in the first */
    call(&c, f);
    EMIT(&c, 0x01, 0xc3);
    end(&c);
    run(&s);
    assert_int_equal(s.gpr[RBX], 0x00010001 + 0x00020001 + 0x00020003);
}

static void test_crossing_remapped(void **state)
{
    struct x86_state s = start();
    struct code c = at(CODE);
    gva_t f = crossing(0x00010001);

    memcpy(guest->ram + OTHER_GPA, guest->ram + SECOND_GPA, 4096);
    engine_guest_put(guest, OTHER_GPA, 5, 2);
    for (unsigned i = 0; i < 4; i++) {
        call(&c, f);
        EMIT(&c, 0x01, 0xc3);
        remap_second(&c, (i & 1 ? SECOND_GPA : OTHER_GPA) | PTE_P | PTE_W | PTE_A | PTE_D);
    }
    end(&c);
    run(&s);
    assert_int_equal(s.gpr[RBX], 2 * 0x00010001 + 2 * 0x00050001);
}

/* Runs it once as it is, once with this entry for the second page: a page fault there with this error code. */
static void crossing_fault(uint64_t entry, uint32_t error)
{
    struct x86_state s = start();
    struct code c = at(CODE);
    gva_t f = crossing(0x00010001);
    struct guest_exception e;

    call(&c, f);
    EMIT(&c, 0x01, 0xc3);
    remap_second(&c, entry);
    call(&c, f);
    EMIT(&c, 0x01, 0xc3);
    end(&c);
    assert_int_equal(engine_guest_run(guest, &s), GUEST_ENDED);
    assert_true(engine_guest_exception(guest, &s, &e));
    assert_int_equal(e.vector, 14);
    assert_int_equal(e.error, error);
    assert_int_equal(e.rip, f);
    assert_int_equal(s.cr2, SECOND);
    assert_int_equal(s.gpr[RBX], 0x00010001);
}

static void test_crossing_unmapped(void **state) { crossing_fault(0, 0x10); }

static void test_crossing_no_execute(void **state)
{
    crossing_fault(SECOND_GPA | PTE_P | PTE_W | PTE_A | PTE_D | PTE_NX, 0x11);
}

/* An instruction that ends with the page does not need the next one. */
static void test_page_end(void **state)
{
    struct x86_state s = start();
    struct code c = at(CODE), f = at(SECOND - 6);
    struct guest_exception e;

    mov_eax(&f, 9);
    EMIT(&f, 0xc3);
    call(&c, SECOND - 6);
    EMIT(&c, 0x01, 0xc3);
    remap_second(&c, 0);
    call(&c, SECOND - 6);
    EMIT(&c, 0x01, 0xc3);
    /* Now without RET: what follows is not there. */
    EMIT(&c, 0xc6, 0x05);                       /* movb $0x90, SECOND - 1 */
    emit32(&c, (uint32_t)(SECOND - 1 - (c.va + 5)));
    EMIT(&c, 0x90);
    call(&c, SECOND - 6);
    end(&c);
    assert_int_equal(engine_guest_run(guest, &s), GUEST_ENDED);
    assert_true(engine_guest_exception(guest, &s, &e));
    assert_int_equal(s.gpr[RBX], 18);
    assert_int_equal(e.vector, 14);
    assert_int_equal(e.error, 0x10);
    assert_int_equal(e.rip, SECOND);
    assert_int_equal(s.cr2, SECOND);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
#define TEST(name) cmocka_unit_test_setup_teardown(test_##name, setup, teardown)
        TEST(next_instruction),
        TEST(earlier_instruction),
        TEST(other_instruction),
        TEST(data_beside_code),
        TEST(other_page),
        TEST(alias),
        TEST(atomic),
        TEST(string),
        TEST(vector),
        TEST(push),
        TEST(device),
        TEST(device_mapped),
        TEST(remapped),
        TEST(remapped_in_loop),
        TEST(other_space),
        TEST(crossing_changed),
        TEST(crossing_remapped),
        TEST(crossing_unmapped),
        TEST(crossing_no_execute),
        TEST(page_end),
#undef TEST
    };

    engine_name = argc > 1 ? argv[1] : "interp";
    return cmocka_run_group_tests(tests, NULL, NULL);
}
