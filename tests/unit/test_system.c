/*
 * System instructions: flags, descriptors, segment bases, port input and output, and the rest of system.c, by privilege
 * level and mode.
 */
#include "x86_guest.h"

#include <string.h>

#include "isa/x86/cpuid.h"
#include "isa/x86/system.h"

#define RUN RUN_SYSTEM

static int setup(void **state)
{
    struct guest *g;

    if (guest_setup(state) != 0)
        return -1;
    g = *state;
    g->cpu.model = x86_cpu_model_find("x86-64-v3");
    guest_system(g, GUEST_LONG);
    guest_put(g, GUEST_TSS + 102, 0x68, 2);                    /* no bit map of port permissions */
    return 0;
}

static void set_iopl(struct guest *g, unsigned iopl)
{
    g->cpu.s.rflags = (g->cpu.s.rflags & ~(uint64_t)RFLAGS_IOPL) | iopl << 12;
}

/* ---- flags ---- */

static uint64_t popf(struct guest *g, uint64_t value)
{
    uint64_t rsp = g->cpu.s.gpr[RSP];

    g->cpu.s.gpr[RSP] -= 8;
    x86_write64(&g->cpu, g->cpu.s.gpr[RSP], value);
    assert_int_equal(RUN(g, "\x9d"), -1);
    assert_int_equal(g->cpu.s.gpr[RSP], rsp);
    return x86_rflags(&g->cpu);
}

static void popf_by_privilege(void **state)
{
    struct guest *g = *state;
    const uint64_t everyone = RFLAGS_ARITH | RFLAGS_TF | RFLAGS_DF | RFLAGS_NT | RFLAGS_AC | RFLAGS_ID;

    assert_int_equal(popf(g, ~0ull), everyone | RFLAGS_IF | RFLAGS_IOPL | 2);
    assert_int_equal(popf(g, 0), 2);
    guest_enter_user(g, true);
    assert_int_equal(popf(g, ~0ull), everyone | 2);             /* IF and IOPL stay */
    assert_int_equal(popf(g, 0), 2);
    set_iopl(g, 3);
    assert_int_equal(popf(g, RFLAGS_IF), RFLAGS_IF | RFLAGS_IOPL | 2);
    assert_int_equal(popf(g, RFLAGS_ZF), RFLAGS_ZF | RFLAGS_IOPL | 2);

    /* 16 bits: the rest stays. */
    x86_set_rflags(&g->cpu, RFLAGS_ID | RFLAGS_CF);
    x86_write16(&g->cpu, g->cpu.s.gpr[RSP] -= 2, 0);
    assert_int_equal(RUN(g, "\x66\x9d"), -1);
    assert_int_equal(x86_rflags(&g->cpu), RFLAGS_ID | 2);
}

static void pushf_hides_vm_and_rf(void **state)
{
    struct guest *g = *state;

    x86_set_rflags(&g->cpu, RFLAGS_RF | RFLAGS_OF | RFLAGS_SF | RFLAGS_PF | RFLAGS_IF);
    assert_int_equal(RUN(g, "\x9c"), -1);
    assert_int_equal(x86_read64(&g->cpu, g->cpu.s.gpr[RSP]), RFLAGS_OF | RFLAGS_SF | RFLAGS_PF | RFLAGS_IF | 2);
    assert_int_equal(g->cpu.s.gpr[RSP], KERNEL_STACK - 8);
}

static void virtual_8086(void **state)
{
    struct guest *g = *state;

    guest_system(g, GUEST_32);
    guest_put(g, GUEST_TSS + 102, 0x68, 2);
    guest_enter_user(g, false);
    for (unsigned i = 0; i < 6; i++)
        g->cpu.s.seg[i] = (struct x86_seg){.base = 0x200000, .limit = 0xffff, .attr = 0xf3, .selector = 0x2000};
    x86_set_rflags(&g->cpu, RFLAGS_VM | RFLAGS_IF);
    x86_update_mode(&g->cpu);
    assert_int_equal(RUN(g, "\x9c"), X86_GP);
    assert_int_equal(RUN(g, "\x9d"), X86_GP);
    assert_int_equal(RUN(g, "\xfa"), X86_GP);
    assert_int_equal(RUN(g, "\xfb"), X86_GP);
    assert_int_equal(RUN(g, "\xe4\x60"), X86_GP);
    assert_int_equal(RUN(g, "\x0f\x00\xd0"), X86_UD);          /* LLDT */
    assert_int_equal(RUN(g, "\x0f\x02\xc1"), X86_UD);          /* LAR */
    set_iopl(g, 3);
    assert_int_equal(RUN(g, "\xfa"), -1);
    assert_int_equal(g->cpu.s.rflags & RFLAGS_IF, 0);
    g->cpu.s.gpr[RSP] = 0x1000;
    assert_int_equal(RUN(g, "\x9c"), -1);
    assert_int_equal(g->cpu.s.gpr[RSP], 0xffe);
    x86_write16(&g->cpu, 0x200ffe, RFLAGS_IF);
    assert_int_equal(RUN(g, "\x9d"), -1);
    assert_int_equal(x86_rflags(&g->cpu), RFLAGS_IF | RFLAGS_IOPL | RFLAGS_VM | 2);     /* IOPL stays */
    assert_int_equal(RUN(g, "\xe4\x60"), X86_GP);              /* ports go by the bit map alone */
}

static void interrupt_flag(void **state)
{
    struct guest *g = *state;
    struct x86_state *s = &g->cpu.s;

    assert_int_equal(RUN(g, "\xfa"), -1);
    assert_int_equal(s->rflags & RFLAGS_IF, 0);
    assert_int_equal(RUN(g, "\xfb"), -1);
    assert_int_equal(s->rflags & RFLAGS_IF, RFLAGS_IF);
    assert_int_equal(s->interrupt_shadow, 1);
    s->interrupt_shadow = 0;
    assert_int_equal(RUN(g, "\xfb"), -1);
    assert_int_equal(s->interrupt_shadow, 0);                   /* only when it was off */
    guest_enter_user(g, true);
    assert_int_equal(RUN(g, "\xfa"), X86_GP);
    assert_int_equal(RUN(g, "\xfb"), X86_GP);
    set_iopl(g, 3);
    assert_int_equal(RUN(g, "\xfa"), -1);
}

static void access_flag(void **state)
{
    struct guest *g = *state;

    g->cpu.s.cr4 |= CR4_SMAP;
    x86_update_mode(&g->cpu);
    assert_int_equal(RAISED(g, x86_read8(&g->cpu, USER_CODE)), X86_PF);
    assert_int_equal(RUN(g, "\x0f\x01\xcb"), -1);
    assert_int_equal(g->cpu.s.rflags & RFLAGS_AC, RFLAGS_AC);
    assert_int_equal(RAISED(g, x86_read8(&g->cpu, USER_CODE)), -1);
    assert_int_equal(RUN(g, "\x0f\x01\xca"), -1);
    assert_int_equal(RAISED(g, x86_read8(&g->cpu, USER_CODE)), X86_PF);
    guest_enter_user(g, true);
    assert_int_equal(RUN(g, "\x0f\x01\xcb"), X86_UD);
    assert_int_equal(RUN(g, "\x0f\x01\xca"), X86_UD);
}

/* ---- descriptor tables ---- */

static void table_registers(void **state)
{
    struct guest *g = *state;
    struct x86_state *s = &g->cpu.s;

    s->gpr[RBX] = 0x100000;
    s->gdt = (struct x86_table){.base = 0xffff888012345678, .limit = 0xabcd};
    assert_int_equal(RUN(g, "\x0f\x01\x03"), -1);              /* SGDT */
    assert_int_equal(guest_get(g, 0x100000, 2), 0xabcd);
    assert_int_equal(guest_get(g, 0x100002, 8), 0xffff888012345678);
    s->gdt = (struct x86_table){.base = 0, .limit = 0};
    assert_int_equal(RUN(g, "\x0f\x01\x13"), -1);              /* LGDT */
    assert_int_equal(s->gdt.base, 0xffff888012345678);
    assert_int_equal(s->gdt.limit, 0xabcd);
    assert_int_equal(RUN(g, "\x0f\x01\x1b"), -1);              /* LIDT */
    assert_int_equal(s->idt.base, 0xffff888012345678);
    guest_put(g, 0x100002, 1ull << 63, 8);
    assert_int_equal(RUN(g, "\x0f\x01\x13"), X86_GP);          /* not canonical */
    assert_int_equal(s->gdt.base, 0xffff888012345678);
    guest_put(g, 0x10000a, 0x7777, 2);
    assert_int_equal(RUN(g, "\x0f\x01\x0b"), -1);              /* SIDT writes ten bytes */
    assert_int_equal(guest_get(g, 0x10000a, 2), 0x7777);

    guest_enter_user(g, true);
    s->gpr[RBX] = USER_CODE;
    assert_int_equal(RUN(g, "\x0f\x01\x13"), X86_GP);
    assert_int_equal(RUN(g, "\x0f\x01\x03"), -1);
    assert_int_equal(RUN(g, "\x0f\x00\xc8"), -1);              /* STR EAX */
    assert_int_equal(s->gpr[RAX], SEL_TSS);
    s->gpr[RAX] = 0x1111222233334444;
    assert_int_equal(RUN(g, "\x66\x0f\x00\xc8"), -1);
    assert_int_equal(s->gpr[RAX], 0x1111222233330000 | SEL_TSS);
    s->cr4 |= CR4_UMIP;
    assert_int_equal(RUN(g, "\x0f\x01\x03"), X86_GP);          /* SGDT, SIDT, SLDT, STR, SMSW */
    assert_int_equal(RUN(g, "\x0f\x01\x0b"), X86_GP);
    assert_int_equal(RUN(g, "\x0f\x00\xc0"), X86_GP);
    assert_int_equal(RUN(g, "\x0f\x00\xc8"), X86_GP);
    assert_int_equal(RUN(g, "\x0f\x01\xe0"), X86_GP);
}

static void table_registers_16_bit_operand(void **state)
{
    struct guest *g = *state;

    guest_system(g, GUEST_32);
    g->cpu.s.gpr[RBX] = 0x100000;
    guest_put(g, 0x100000, 0x7f, 2);
    guest_put(g, 0x100002, 0x89abcdef, 4);
    assert_int_equal(RUN(g, "\x66\x0f\x01\x13"), -1);
    assert_int_equal(g->cpu.s.gdt.base, 0xabcdef);
    assert_int_equal(RUN(g, "\x0f\x01\x13"), -1);
    assert_int_equal(g->cpu.s.gdt.base, 0x89abcdef);
    guest_put(g, 0x100006, 0x5555, 2);
    assert_int_equal(RUN(g, "\x0f\x01\x03"), -1);
    assert_int_equal(guest_get(g, 0x100006, 2), 0x5555);       /* six bytes */
}

static void local_tables(void **state)
{
    struct guest *g = *state;
    struct x86_state *s = &g->cpu.s;

    guest_gdt(g, SEL_LDT, guest_desc(GUEST_LDT, 0xff, 0x82));
    guest_gdt(g, SEL_LDT + 8, 0);
    s->gpr[RAX] = SEL_LDT;
    assert_int_equal(RUN(g, "\x0f\x00\xd0"), -1);              /* LLDT */
    assert_int_equal(s->ldtr.base, GUEST_LDT);
    assert_int_equal(RUN(g, "\x0f\x00\xc3"), -1);              /* SLDT EBX */
    assert_int_equal(s->gpr[RBX], SEL_LDT);
    s->gpr[RAX] = SEL_KDATA;
    assert_int_equal(RUN(g, "\x0f\x00\xd0"), X86_GP);
    assert_int_equal(g->cpu.exc_error, SEL_KDATA);
    assert_int_equal(RUN(g, "\x0f\x00\xd8"), X86_GP);          /* LTR of a data segment */
    guest_gdt(g, SEL_TSS, guest_desc(GUEST_TSS, 0x67, 0x89));
    guest_gdt(g, SEL_TSS + 8, 0);
    s->gpr[RAX] = SEL_TSS;
    assert_int_equal(RUN(g, "\x0f\x00\xd8"), -1);
    assert_int_equal(desc_type(guest_get(g, GUEST_GDT + SEL_TSS, 8)), DESC_TSS_BUSY);
    assert_int_equal(RUN(g, "\x0f\x00\xd8"), X86_GP);          /* busy */
    guest_enter_user(g, true);
    assert_int_equal(RUN(g, "\x0f\x00\xd0"), X86_GP);
    assert_int_equal(g->cpu.exc_error, 0);
    assert_int_equal(RUN(g, "\x0f\x00\xd8"), X86_GP);
}

/* LAR EAX, ECX: the value, or -1 when ZF says no. */
static int64_t look(struct guest *g, const char *bytes, unsigned selector)
{
    g->cpu.s.gpr[RCX] = selector;
    g->cpu.s.gpr[RAX] = 0xffffffff5a5a5a5a;
    assert_int_equal(guest_run_system(g, bytes, 3), -1);
    if (x86_rflags(&g->cpu) & RFLAGS_ZF)
        return (int64_t)g->cpu.s.gpr[RAX];
    assert_int_equal(g->cpu.s.gpr[RAX], 0xffffffff5a5a5a5a);
    return -1;
}
#define LAR "\x0f\x02\xc1"
#define LSL "\x0f\x03\xc1"
#define VERR "\x0f\x00\xe1"
#define VERW "\x0f\x00\xe9"

static void looking_at_descriptors(void **state)
{
    struct guest *g = *state;

    guest_gdt(g, SEL_TSS, guest_desc(GUEST_TSS, 0x67, 0x8b));
    guest_gdt(g, SEL_FREE, guest_desc(0, 0x1234, 0x0084));     /* a 16-bit call gate */
    guest_gdt(g, SEL_FREE + 16, guest_desc(0, 0xfff, 0x00f8)); /* user code that cannot be read */
    assert_int_equal(look(g, LAR, SEL_UDATA), 0xc0f200);
    assert_int_equal(look(g, LAR, SEL_KCODE), 0xa09a00);
    assert_int_equal(look(g, LAR, SEL_TSS), 0x008b00);
    assert_int_equal(look(g, LAR, SEL_FREE), -1);              /* no 16-bit gates in long mode */
    assert_int_equal(look(g, LAR, 0), -1);
    assert_int_equal(look(g, LAR, 0x2000), -1);
    assert_int_equal(look(g, LAR, SEL_LDT | 4), -1);           /* there is no LDT */
    assert_int_equal(look(g, LAR, SEL_KDATA | 3), -1);         /* RPL counts */
    assert_int_equal(look(g, LSL, SEL_UDATA), 0xffffffff);
    assert_int_equal(look(g, LSL, SEL_TSS), 0x67);
    assert_int_equal(look(g, LSL, SEL_DATA16), 0xffff);
    assert_true(look(g, VERR, SEL_UDATA) != -1);
    assert_true(look(g, VERW, SEL_UDATA) != -1);
    assert_true(look(g, VERR, SEL_UCODE64) != -1);
    assert_int_equal(look(g, VERW, SEL_UCODE64), -1);
    assert_int_equal(look(g, VERR, SEL_FREE + 16), -1);
    assert_int_equal(look(g, VERR, SEL_TSS), -1);

    guest_enter_user(g, true);
    assert_int_equal(look(g, LAR, SEL_KDATA), -1);
    assert_int_equal(look(g, LAR, SEL_CONFORMING), 0xa09e00);
    assert_true(look(g, VERR, SEL_CONFORMING) != -1);
    assert_int_equal(look(g, VERW, SEL_KDATA), -1);

    guest_system(g, GUEST_32);
    guest_gdt(g, SEL_FREE, guest_desc(0, 0x1234, 0x0084));
    g->cpu.s.gpr[RCX] = SEL_FREE;
    assert_int_equal(RUN(g, LAR), -1);
    assert_true(x86_rflags(&g->cpu) & RFLAGS_ZF);
    assert_int_equal(RUN(g, LSL), -1);
    assert_false(x86_rflags(&g->cpu) & RFLAGS_ZF);
    guest_system(g, GUEST_REAL);
    assert_int_equal(RUN(g, LAR), X86_UD);
    assert_int_equal(RUN(g, "\x63\xc8"), X86_UD);
}

static void arpl(void **state)
{
    struct guest *g = *state;
    struct x86_state *s = &g->cpu.s;

    guest_system(g, GUEST_32);
    s->gpr[RAX] = 0x12340010;
    s->gpr[RCX] = 3;
    assert_int_equal(RUN(g, "\x63\xc8"), -1);                  /* ARPL AX, CX */
    assert_int_equal(s->gpr[RAX], 0x12340013);
    assert_true(x86_rflags(&g->cpu) & RFLAGS_ZF);
    s->gpr[RCX] = 2;
    assert_int_equal(RUN(g, "\x63\xc8"), -1);
    assert_int_equal(s->gpr[RAX], 0x12340013);
    assert_false(x86_rflags(&g->cpu) & RFLAGS_ZF);
    s->gpr[RBX] = 0x100000;
    guest_put(g, 0x100000, 0x8, 2);
    assert_int_equal(RUN(g, "\x63\x0b"), -1);
    assert_int_equal(guest_get(g, 0x100000, 2), 0xa);
}

/* ---- segment registers ---- */

static void segment_moves(void **state)
{
    struct guest *g = *state;
    struct x86_state *s = &g->cpu.s;

    s->gpr[RAX] = SEL_KDATA;
    assert_int_equal(RUN(g, "\x8e\xd0"), -1);                  /* MOV SS */
    assert_int_equal(s->seg[SEG_SS].selector, SEL_KDATA);
    assert_int_equal(s->interrupt_shadow, 2);
    s->interrupt_shadow = 0;
    assert_int_equal(RUN(g, "\x8e\xd8"), -1);
    assert_int_equal(s->interrupt_shadow, 0);
    s->gpr[RCX] = ~0ull;
    assert_int_equal(RUN(g, "\x8c\xd9"), -1);                  /* MOV ECX, DS */
    assert_int_equal(s->gpr[RCX], SEL_KDATA);
    s->gpr[RCX] = ~0ull;
    assert_int_equal(RUN(g, "\x66\x8c\xd9"), -1);
    assert_int_equal(s->gpr[RCX], 0xffffffffffff0000 | SEL_KDATA);
    s->gpr[RBX] = 0x100000;
    guest_put(g, 0x100000, ~0ull, 8);
    assert_int_equal(RUN(g, "\x48\x8c\x1b"), -1);              /* to memory: 16 bits */
    assert_int_equal(guest_get(g, 0x100000, 8), 0xffffffffffff0000 | SEL_KDATA);
    s->gpr[RAX] = SEL_ABSENT_DATA;
    assert_int_equal(RUN(g, "\x8e\xd8"), X86_NP);
    assert_int_equal(g->cpu.exc_error, SEL_ABSENT_DATA);

    assert_int_equal(RUN(g, "\x0f\xa0"), -1);                  /* PUSH FS */
    assert_int_equal(s->gpr[RSP], KERNEL_STACK - 8);
    assert_int_equal(x86_read64(&g->cpu, s->gpr[RSP]), s->seg[SEG_FS].selector);
    x86_write64(&g->cpu, s->gpr[RSP], SEL_ABSENT_DATA);
    assert_int_equal(RUN(g, "\x0f\xa9"), X86_NP);              /* POP GS: RSP stays */
    assert_int_equal(s->gpr[RSP], KERNEL_STACK - 8);
    x86_write64(&g->cpu, s->gpr[RSP], SEL_UDATA | 3);
    assert_int_equal(RUN(g, "\x0f\xa9"), -1);
    assert_int_equal(s->gpr[RSP], KERNEL_STACK);
    assert_int_equal(s->seg[SEG_GS].selector, SEL_UDATA | 3);

    guest_put(g, 0x100000, 0x89abcdef, 4);
    guest_put(g, 0x100004, SEL_KDATA, 2);
    s->gpr[RAX] = ~0ull;
    assert_int_equal(RUN(g, "\x0f\xb4\x03"), -1);              /* LFS EAX, [RBX] */
    assert_int_equal(s->gpr[RAX], 0x89abcdef);
    assert_int_equal(s->seg[SEG_FS].selector, SEL_KDATA);
    guest_put(g, 0x100004, SEL_KCODE | 3, 2);
    s->gpr[RAX] = 1;
    assert_int_equal(RUN(g, "\x0f\xb4\x03"), X86_GP);
    assert_int_equal(s->gpr[RAX], 1);
}

static void segment_bases(void **state)
{
    struct guest *g = *state;
    struct x86_state *s = &g->cpu.s;

    assert_int_equal(RUN(g, "\xf3\x48\x0f\xae\xc0"), X86_UD);  /* RDFSBASE without CR4.FSGSBASE */
    s->cr4 |= CR4_FSGSBASE;
    s->gpr[RAX] = 0xffff888000001000;
    assert_int_equal(RUN(g, "\xf3\x48\x0f\xae\xd8"), -1);      /* WRGSBASE */
    assert_int_equal(s->seg[SEG_GS].base, 0xffff888000001000);
    assert_int_equal(RUN(g, "\xf3\x0f\xae\xc9"), -1);          /* RDGSBASE ECX */
    assert_int_equal(s->gpr[RCX], 0x1000);
    s->gpr[RAX] = 1ull << 47;
    assert_int_equal(RUN(g, "\xf3\x48\x0f\xae\xd0"), X86_GP);  /* WRFSBASE */
    assert_int_equal(RUN(g, "\xf3\x0f\xae\xd0"), -1);          /* 32 bits of it */
    assert_int_equal(s->seg[SEG_FS].base, 0);

    s->kernel_gs_base = 0x7000;
    assert_int_equal(RUN(g, "\x0f\x01\xf8"), -1);              /* SWAPGS */
    assert_int_equal(s->seg[SEG_GS].base, 0x7000);
    assert_int_equal(s->kernel_gs_base, 0xffff888000001000);
    guest_enter_user(g, true);
    assert_int_equal(RUN(g, "\x0f\x01\xf8"), X86_GP);
    s->gpr[RAX] = 0x5000;
    assert_int_equal(RUN(g, "\xf3\x48\x0f\xae\xd0"), -1);
    assert_int_equal(s->seg[SEG_FS].base, 0x5000);
}

/* ---- ports ---- */

static struct {
    unsigned reads, writes, size;
    uint64_t offset, last, give;
} port;

static uint64_t port_read(void *opaque, uint64_t offset, unsigned size)
{
    port.reads++;
    port.offset = offset;
    port.size = size;
    return port.give++;
}

static void port_write(void *opaque, uint64_t offset, uint64_t value, unsigned size)
{
    port.writes++;
    port.offset = offset;
    port.size = size;
    port.last = value;
}

static const struct bus_ops port_ops = {.read = port_read, .write = port_write};

static void add_port(struct guest *g)
{
    memset(&port, 0, sizeof(port));
    pthread_mutex_lock(&g->machine.lock);
    assert_int_equal(bus_add(&g->machine.ports, 0x100, 0x10, &port_ops, NULL, "test"), 0);
    pthread_mutex_unlock(&g->machine.lock);
}

static void port_access(void **state)
{
    struct guest *g = *state;
    struct x86_state *s = &g->cpu.s;

    add_port(g);
    port.give = 0x11223344556677ull;
    s->gpr[RDX] = 0xffff0104;
    s->gpr[RAX] = ~0ull;
    assert_int_equal(RUN(g, "\xec"), -1);                      /* IN AL, DX */
    assert_int_equal(s->gpr[RAX], 0xffffffffffffff77);
    assert_int_equal(port.offset, 4);
    assert_int_equal(RUN(g, "\x66\xed"), -1);
    assert_int_equal(s->gpr[RAX], 0xffffffffffff6678);
    assert_int_equal(RUN(g, "\xed"), -1);
    assert_int_equal(s->gpr[RAX], 0x44556679);
    assert_int_equal(RUN(g, "\x48\xed"), -1);                  /* there is no 64-bit IN */
    assert_int_equal(port.size, 4);
    s->gpr[RAX] = 0xaabbccdd;
    assert_int_equal(RUN(g, "\x66\xef"), -1);
    assert_int_equal(port.last, 0xccdd);
    assert_int_equal(RUN(g, "\xe6\x80"), -1);                  /* nobody there */
    assert_int_equal(RUN(g, "\xe4\x80"), -1);
    assert_int_equal(s->gpr[RAX] & 0xff, 0xff);
    assert_int_equal(port.writes, 1);
}

static void port_permission(void **state)
{
    struct guest *g = *state;
    struct x86_state *s = &g->cpu.s;

    add_port(g);
    guest_enter_user(g, true);
    s->gpr[RDX] = 0x104;
    assert_int_equal(RUN(g, "\xec"), X86_GP);                  /* the TSS ends before a bit map */
    s->tr.limit = 0x68 + 0x30;
    memset(guest_ram(g, GUEST_TSS + 0x68), 0xff, 0x31);
    assert_int_equal(RUN(g, "\xec"), X86_GP);
    guest_put(g, GUEST_TSS + 0x68 + 0x104 / 8, 0xef, 1);       /* port 0x104 alone */
    assert_int_equal(RUN(g, "\xec"), -1);
    assert_int_equal(RUN(g, "\x66\xed"), X86_GP);
    guest_put(g, GUEST_TSS + 0x68 + 0x104 / 8, 0x0f, 1);       /* 0x104 to 0x107 */
    assert_int_equal(RUN(g, "\xed"), -1);
    s->gpr[RDX] = 0x107;
    assert_int_equal(RUN(g, "\x66\xed"), X86_GP);              /* 0x108 is not allowed: the next byte is read, too */
    guest_put(g, GUEST_TSS + 0x68 + 0x108 / 8, 0xfe, 1);
    assert_int_equal(RUN(g, "\x66\xed"), -1);
    s->tr.limit = 0x68 + 0x20;                                 /* the second byte lies outside */
    s->gpr[RDX] = 0x104;
    assert_int_equal(RUN(g, "\xec"), X86_GP);
    s->tr.limit++;
    assert_int_equal(RUN(g, "\xec"), -1);
    s->gpr[RDX] = 0xffff;
    assert_int_equal(RUN(g, "\xec"), X86_GP);
    set_iopl(g, 3);
    assert_int_equal(RUN(g, "\xec"), -1);
    s->tr.attr = 0x83;                                         /* 16-bit TSS */
    set_iopl(g, 0);
    s->gpr[RDX] = 0x104;
    assert_int_equal(RUN(g, "\xec"), X86_GP);
}

static void port_strings(void **state)
{
    struct guest *g = *state;
    struct x86_state *s = &g->cpu.s;

    add_port(g);
    atomic_store(&g->cpu.request, 0);
    port.give = 0x30;
    s->gpr[RDX] = 0x100;
    s->gpr[RDI] = 0x100000;
    s->gpr[RCX] = 5;
    guest_put(g, 0x100000, 0, 8);
    assert_int_equal(RUN(g, "\xf3\x6c"), -1);                  /* REP INSB */
    assert_int_equal(guest_get(g, 0x100000, 8), 0x3433323130);
    assert_int_equal(s->gpr[RDI], 0x100005);
    assert_int_equal(s->gpr[RCX], 0);
    assert_int_equal(g->cpu.next_rip, s->rip + 2);
    assert_int_equal(RUN(g, "\xf3\x6c"), -1);                  /* nothing to do */
    assert_int_equal(port.reads, 5);

    s->rflags |= RFLAGS_DF;
    s->gpr[RSI] = 0x100004;
    s->gpr[RCX] = 2;
    assert_int_equal(RUN(g, "\xf3\x66\x6f"), -1);              /* REP OUTSW, backwards */
    assert_int_equal(port.last, 0x3332);
    assert_int_equal(s->gpr[RSI], 0x100000);
    s->rflags &= ~(uint64_t)RFLAGS_DF;

    /* A pending request ends it between two elements, with RIP still on it. */
    s->gpr[RCX] = 3;
    x86_request(&g->cpu, REQUEST_INTR);
    assert_int_equal(RUN(g, "\xf3\x6e"), -1);
    assert_int_equal(s->gpr[RCX], 2);
    assert_int_equal(s->gpr[RSI], 0x100001);
    assert_int_equal(g->cpu.next_rip, s->rip);
    atomic_store(&g->cpu.request, 0);

    /* A fault leaves the device alone and the registers at the element. */
    port.reads = 0;
    s->gpr[RDI] = MIB(4) - 2;
    s->gpr[RCX] = 4;
    assert_int_equal(RUN(g, "\xf3\x6c"), X86_PF);
    assert_int_equal(s->cr2, MIB(4));
    assert_int_equal(port.reads, 2);
    assert_int_equal(s->gpr[RCX], 2);
    assert_int_equal(s->gpr[RDI], MIB(4));

    /* 32-bit addresses. */
    s->gpr[RSI] = 0xffffffff00100000;
    s->gpr[RCX] = 0xffffffff00000001;
    assert_int_equal(RUN(g, "\x67\xf3\x6e"), -1);
    assert_int_equal(s->gpr[RSI], 0x100001);
    assert_int_equal(s->gpr[RCX], 0);
    guest_enter_user(g, true);
    s->gpr[RCX] = 1;
    assert_int_equal(RUN(g, "\xf3\x6c"), X86_GP);
}

/* ---- the rest ---- */

static void halt(void **state)
{
    struct guest *g = *state;

    assert_int_equal(RUN(g, "\xf4"), -1);
    assert_int_equal(g->cpu.s.activity, X86_HALTED);
    g->cpu.s.activity = X86_RUNNING;
    guest_enter_user(g, true);
    assert_int_equal(RUN(g, "\xf4"), X86_GP);
    assert_int_equal(g->cpu.s.activity, X86_RUNNING);
}

static void cpuid(void **state)
{
    struct guest *g = *state;
    struct x86_state *s = &g->cpu.s;

    s->gpr[RAX] = 0xffffffff40000000;
    s->gpr[RBX] = s->gpr[RCX] = s->gpr[RDX] = ~0ull;
    guest_enter_user(g, true);
    assert_int_equal(RUN(g, "\x0f\xa2"), -1);
    assert_int_equal(s->gpr[RAX], 0x40000001);
    assert_int_equal(s->gpr[RBX], 0x4b4d564b);
    assert_int_equal(s->gpr[RDX], 0x4d);
}

static void privileged(void **state)
{
    static const struct {
        const char *bytes;
        unsigned len;
    } list[] = { { "\x0f\x01\x3b", 3 }, { "\x66\x0f\x38\x82\x03", 5 }, { "\x0f\x08", 2 }, { "\x0f\x09", 2 },
                 { "\xf3\x0f\x09", 3 }, { "\x0f\x01\xf0", 3 } };
    struct guest *g = *state;

    g->cpu.s.gpr[RBX] = USER_CODE;
    guest_enter_user(g, true);
    for (unsigned i = 0; i < ARRAY_SIZE(list); i++)
        assert_int_equal(guest_run_system(g, list[i].bytes, list[i].len), X86_GP);
    assert_int_equal(RUN(g, "\x0f\x0b"), X86_UD);
    assert_int_equal(RUN(g, "\x0f\xaa"), X86_UD);
    assert_int_equal(RUN(g, "\x0f\x01\xc8"), X86_UD);
}

static void cache_lines(void **state)
{
    struct guest *g = *state;

    g->cpu.s.gpr[RBX] = USER_CODE;
    guest_enter_user(g, true);
    assert_int_equal(RUN(g, "\x0f\xae\x3b"), -1);              /* CLFLUSH */
    g->cpu.s.gpr[RBX] = 0x100000;
    assert_int_equal(RUN(g, "\x0f\xae\x3b"), X86_PF);          /* the kernel's */
    assert_int_equal(RUN(g, "\x66\x0f\xae\x33"), X86_PF);      /* CLWB */
    assert_int_equal(RUN(g, "\x66\x0f\xae\x3b"), X86_PF);      /* CLFLUSHOPT */
    assert_int_equal(RUN(g, "\x0f\x18\x0b"), -1);              /* a prefetch never faults */
    g->cpu.s.gpr[RBX] = 1ull << 63;
    assert_int_equal(RUN(g, "\x0f\x18\x0b"), -1);
    assert_int_equal(RUN(g, "\x0f\xae\x3b"), X86_GP);
    memset(guest_ram(g, USER_CODE), 0x5a, 256);
    g->cpu.s.gpr[RAX] = USER_CODE + 100;
    assert_int_equal(RUN(g, "\x0f\x01\xfc"), -1);              /* CLZERO */
    assert_int_equal(guest_get(g, USER_CODE + 63, 1), 0x5a);
    assert_int_equal(guest_get(g, USER_CODE + 64, 8), 0);
    assert_int_equal(guest_get(g, USER_CODE + 120, 8), 0);
    assert_int_equal(guest_get(g, USER_CODE + 128, 1), 0x5a);
}

static void hypercalls(void **state)
{
    struct guest *g = *state;

    g->cpu.s.gpr[RAX] = 12345;
    assert_int_equal(RUN(g, "\x0f\x01\xc1"), -1);
    assert_int_equal(g->cpu.s.gpr[RAX], (uint64_t)-1000);
    g->cpu.s.gpr[RAX] = 1;
    assert_int_equal(RUN(g, "\x0f\x01\xd9"), -1);
    assert_int_equal(g->cpu.s.gpr[RAX], 0);
    guest_enter_user(g, true);
    g->cpu.s.gpr[RAX] = 1;
    assert_int_equal(RUN(g, "\x0f\x01\xc1"), -1);
    assert_int_equal(g->cpu.s.gpr[RAX], (uint64_t)-1);
}

static void random_numbers(void **state)
{
    struct guest *g = *state;
    uint64_t first;

    x86_set_rflags(&g->cpu, RFLAGS_ARITH);
    assert_int_equal(RUN(g, "\x48\x0f\xc7\xf0"), -1);
    assert_int_equal(x86_rflags(&g->cpu) & RFLAGS_ARITH, RFLAGS_CF);
    first = g->cpu.s.gpr[RAX];
    assert_int_equal(RUN(g, "\x48\x0f\xc7\xf0"), -1);
    assert_true(first != g->cpu.s.gpr[RAX]);
    g->cpu.s.gpr[RBX] = ~0ull;
    assert_int_equal(RUN(g, "\x0f\xc7\xf3"), -1);
    assert_int_equal(g->cpu.s.gpr[RBX] >> 32, 0);
    g->cpu.s.gpr[RBX] = ~0ull;
    assert_int_equal(RUN(g, "\x66\x0f\xc7\xfb"), -1);          /* RDSEED BX */
    assert_int_equal(g->cpu.s.gpr[RBX] >> 16, 0xffffffffffff);
}

/* ENTER on the host's own stack. */
#define HOST_ENTER(bytes, alloc, level) \
    __asm__ volatile("mov %%rbp, %%r12\n\tmov %%rsp, %%r13\n\t" \
                     "mov %[sp], %%rsp\n\tmov %[bp], %%rbp\n\t" \
                     "enter $" #alloc ", $" #level "\n\t" \
                     "mov %%rsp, %%r14\n\tmov %%rbp, %%r15\n\t" \
                     "mov %%r13, %%rsp\n\tmov %%r12, %%rbp\n\t" \
                     "mov %%r14, %[out_sp]\n\tmov %%r15, %[out_bp]\n\t" \
                     : [out_sp] "=&r"(out_sp), [out_bp] "=&r"(out_bp) \
                     : [sp] "r"(sp), [bp] "r"(bp) \
                     : "memory", "r12", "r13", "r14", "r15")

static void enter_as_on_the_host(void **state)
{
    static uint8_t stack[4096] __attribute__((aligned(4096)));
    struct guest *g = *state;

    for (unsigned level = 0; level < 4; level++) {
        uint64_t sp = (uint64_t)stack + 2048, bp = (uint64_t)stack + 3072, out_sp, out_bp;
        const gpa_t at = 0x100000;
        char bytes[] = { (char)0xc8, 0x40, 0, (char)level };

        for (unsigned i = 0; i < sizeof(stack); i++)
            stack[i] = (uint8_t)(i * 7);
        memcpy(guest_ram(g, at), stack, sizeof(stack));
        switch (level) {
        case 0: HOST_ENTER(bytes, 0x40, 0); break;
        case 1: HOST_ENTER(bytes, 0x40, 1); break;
        case 2: HOST_ENTER(bytes, 0x40, 2); break;
        default: HOST_ENTER(bytes, 0x40, 3); break;
        }
        g->cpu.s.gpr[RSP] = at + 2048;
        g->cpu.s.gpr[RBP] = at + 3072;
        assert_int_equal(guest_run_system(g, bytes, 4), -1);
        assert_int_equal(g->cpu.s.gpr[RSP] - at, out_sp - (uint64_t)stack);
        assert_int_equal(g->cpu.s.gpr[RBP] - at, out_bp - (uint64_t)stack);
        /* Addresses on the stacks differ as the stacks do. */
        for (uint64_t p = out_sp; p < sp; p += 8) {
            uint64_t h, v = guest_get(g, at + (p - (uint64_t)stack), 8);

            memcpy(&h, (void *)p, 8);
            if (h - (uint64_t)stack < sizeof(stack))
                assert_int_equal(v - at, h - (uint64_t)stack);
            else
                assert_int_equal(v, h);
        }
    }
    /* The new top must be writable, or nothing has happened. */
    g->cpu.s.gpr[RSP] = MIB(2) + 16;
    g->cpu.s.gpr[RBP] = 5;
    guest_enter_user(g, true);
    g->cpu.s.gpr[RSP] = MIB(2) + 16;
    assert_int_equal(RUN(g, "\xc8\x40\x00\x00"), X86_PF);
    assert_int_equal(g->cpu.s.gpr[RSP], MIB(2) + 16);
    assert_int_equal(g->cpu.s.gpr[RBP], 5);
}

static void bound(void **state)
{
    struct guest *g = *state;
    struct x86_state *s = &g->cpu.s;

    guest_system(g, GUEST_32);
    s->gpr[RBX] = 0x100000;
    guest_put(g, 0x100000, (uint32_t)-5, 4);
    guest_put(g, 0x100004, 10, 4);
    s->gpr[RAX] = (uint32_t)-5;
    assert_int_equal(RUN(g, "\x62\x03"), -1);
    s->gpr[RAX] = 10;
    assert_int_equal(RUN(g, "\x62\x03"), -1);
    s->gpr[RAX] = 11;
    assert_int_equal(RUN(g, "\x62\x03"), X86_BR);
    s->gpr[RAX] = (uint32_t)-6;
    assert_int_equal(RUN(g, "\x62\x03"), X86_BR);
    guest_put(g, 0x100000, 0x0005fffe, 4);                     /* -2 … 5 in 16 bits */
    s->gpr[RAX] = 0x7fffffff;
    assert_int_equal(RUN(g, "\x66\x62\x03"), -1);
    s->gpr[RAX] = 6;
    assert_int_equal(RUN(g, "\x66\x62\x03"), X86_BR);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, guest_teardown)
        TEST(popf_by_privilege),
        TEST(pushf_hides_vm_and_rf),
        TEST(virtual_8086),
        TEST(interrupt_flag),
        TEST(access_flag),
        TEST(table_registers),
        TEST(table_registers_16_bit_operand),
        TEST(local_tables),
        TEST(looking_at_descriptors),
        TEST(arpl),
        TEST(segment_moves),
        TEST(segment_bases),
        TEST(port_access),
        TEST(port_permission),
        TEST(port_strings),
        TEST(halt),
        TEST(cpuid),
        TEST(privileged),
        TEST(cache_lines),
        TEST(hypercalls),
        TEST(random_numbers),
        TEST(enter_as_on_the_host),
        TEST(bound),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
