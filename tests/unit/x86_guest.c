/* See x86_guest.h. */
#include "x86_guest.h"

#include <stdlib.h>
#include <string.h>

#include "isa/x86/system.h"

static uint64_t device_read(void *opaque, uint64_t offset, unsigned size)
{
    struct guest *g = opaque;
    g->device_reads++;
    g->device_offset = offset;
    g->device_size = size;
    return g->device_value >> (offset & 7) * 8;
}

static void device_write(void *opaque, uint64_t offset, uint64_t value, unsigned size)
{
    struct guest *g = opaque;
    g->device_writes++;
    g->device_offset = offset;
    g->device_size = size;
    g->device_value = value;
}

static const struct bus_ops device_ops = {.read = device_read, .write = device_write};

static void code_written(struct x86_cpu *cpu, gpa_t gpa, unsigned len)
{
    struct guest *g = container_of(cpu, struct guest, cpu);
    g->code_calls++;
    g->code_gpa = gpa;
    g->code_len = len;
}

static void mapping_changed(struct x86_cpu *cpu, const struct x86_tlb_space *space)
{
    struct guest *g = container_of(cpu, struct guest, cpu);
    g->user_code_moved = g->user_code_moved || space;
    g->supervisor_code_moved = g->supervisor_code_moved || !space;
}

static const struct x86_engine_hooks hooks = {.code_written = code_written,
                                              .mapping_changed = mapping_changed};

int guest_setup(void **state)
{
    struct guest *g = aligned_alloc(64, align_up(sizeof(*g), 64));

    memset(g, 0, sizeof(*g));
    assert_int_equal(machine_init(&g->machine, true), 0);
    assert_int_equal(memory_add_ram(&g->machine.memory, 0, RAM_SIZE), 0);
    assert_int_equal(memory_add_ram(&g->machine.memory, HIGH_RAM_BASE, HIGH_RAM_SIZE), 0);
    pthread_mutex_lock(&g->machine.lock);
    assert_int_equal(bus_add(&g->machine.mmio, DEVICE_BASE, 0x2000, &device_ops, g, "test"), 0);
    g->chip = irqchip_create(&g->machine, 1, 1000000000);
    pthread_mutex_unlock(&g->machine.lock);
    assert_non_null(g->chip);

    assert_int_equal(x86_cpu_init(&g->cpu, &g->machine, irqchip_lapic(g->chip, 0), NULL, 0), 0);
    g->cpu.hooks = &hooks;
    struct x86_state *s = &g->cpu.s;
    s->cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_WP;
    s->cr3 = GUEST_ROOT;
    s->rflags = 2;
    s->gdt = (struct x86_table){.base = GUEST_GDT, .limit = 0xfff};
    s->idt = (struct x86_table){.base = GUEST_IDT, .limit = 0xfff};
    g->next_table = GUEST_TABLES;
    x86_set_arith(&g->cpu, s->rflags);
    guest_set_cpl(g, 0);
    x86_tlb_flush_all(&g->cpu);
    *state = g;
    return 0;
}

int guest_teardown(void **state)
{
    struct guest *g = *state;

    x86_cpu_destroy(&g->cpu);
    machine_destroy(&g->machine);
    free(g);
    return 0;
}

void guest_set_cpl(struct guest *g, unsigned cpl)
{
    struct x86_state *s = &g->cpu.s;
    bool wide = s->efer & EFER_LMA;

    for (unsigned i = 0; i < 6; i++)
        s->seg[i] = (struct x86_seg){
            .limit = UINT32_MAX, .attr = 0xc093 | cpl << 5, .selector = (uint16_t)(0x10 | cpl)};
    s->seg[SEG_CS].attr = (wide ? 0xa09b : 0xc09b) | cpl << 5;
    s->seg[SEG_CS].selector = (uint16_t)(8 | cpl);
    x86_update_mode(&g->cpu);
}

void guest_paging(struct guest *g, enum paging mode)
{
    struct x86_state *s = &g->cpu.s;

    memset(guest_ram(g, GUEST_ROOT), 0, GUEST_GDT - GUEST_ROOT);
    g->next_table = GUEST_TABLES;
    s->efer = mode == PAGING_32    ? 0
              : mode == PAGING_PAE ? EFER_NXE
                                   : EFER_NXE | EFER_LME | EFER_LMA;
    s->cr4 = (mode == PAGING_32 ? CR4_PSE : CR4_PAE) | CR4_OSFXSR;
    s->cr0 |= CR0_PG | CR0_PE;
    s->cr3 = GUEST_ROOT;
    if (mode == PAGING_PAE) {
        for (unsigned i = 0; i < 4; i++) {
            guest_put(g, GUEST_ROOT + i * 8, g->next_table | PTE_P, 8);
            g->next_table += GUEST_PAGE_SIZE;
        }
    }
    guest_set_cpl(g, 0);
    x86_tlb_flush_all(&g->cpu);
}

static unsigned entry_size(const struct guest *g)
{
    return g->cpu.s.cr4 & CR4_PAE ? 8 : 4;
}

/* The table that a present entry points to, or a new one with these bits put into it. */
static gpa_t descend(struct guest *g, gpa_t entry, uint64_t bits)
{
    unsigned size = entry_size(g);
    uint64_t e = guest_get(g, entry, size);

    if (!(e & PTE_P)) {
        e = g->next_table;
        g->next_table += GUEST_PAGE_SIZE;
        assert_true(g->next_table < GUEST_GDT);
    }
    gpa_t table = e & 0x000ffffffffff000;
    guest_put(g, entry, table | PTE_P | bits, size);
    return table;
}

void *guest_entry(struct guest *g, gva_t va, unsigned level, uint64_t upper)
{
    bool wide = g->cpu.s.efer & EFER_LMA;
    gpa_t table = g->cpu.s.cr3 & 0x000ffffffffff000;

    if (!(g->cpu.s.cr4 & CR4_PAE)) {
        gpa_t entry = table + (va >> 22 & 1023) * 4;
        if (level == 1)
            entry = descend(g, entry, upper) + (va >> 12 & 1023) * 4;
        return guest_ram(g, entry);
    }
    unsigned at = 4;
    if (!wide) {
        table = guest_get(g, table + (va >> 30 & 3) * 8, 8) & 0x000ffffffffff000;
        at = 2;
    }
    for (;; at--) {
        gpa_t entry = table + (va >> (12 + 9 * (at - 1)) & 511) * 8;
        if (at == level)
            return guest_ram(g, entry);
        table = descend(g, entry, upper);
    }
}

void *guest_map(struct guest *g, gva_t va, gpa_t pa, uint64_t size, uint64_t leaf, uint64_t upper)
{
    unsigned level = size == GUEST_PAGE_SIZE ? 1 : size == GIB(1) ? 3 : 2;
    void *e = guest_entry(g, va, level, upper);
    uint64_t value = pa | leaf | PTE_P | (level > 1 ? PTE_PS : 0);

    if (entry_size(g) == 4 && level == 2)
        value = (value & 0xffffffff) | (pa >> 32) << 13;
    memcpy(e, &value, entry_size(g));
    return e;
}

uint8_t *guest_ram(struct guest *g, gpa_t pa)
{
    uint8_t *page = memory_page(&g->machine.memory, pa, NULL);
    assert_non_null(page);
    return page + (pa & 0xfff);
}

uint64_t guest_get(struct guest *g, gpa_t pa, unsigned size)
{
    uint64_t v = 0;
    memcpy(&v, guest_ram(g, pa), size);
    return v;
}

void guest_put(struct guest *g, gpa_t pa, uint64_t value, unsigned size)
{
    memcpy(guest_ram(g, pa), &value, size);
}

_Atomic uint8_t *guest_flags(struct guest *g, gpa_t pa)
{
    _Atomic uint8_t *flags;
    assert_non_null(memory_page(&g->machine.memory, pa, &flags));
    return flags;
}

uint64_t guest_desc(uint32_t base, uint32_t limit, uint32_t attr)
{
    if (attr & SEG_G)
        limit >>= 12;
    return (limit & 0xffff) | (uint64_t)(base & 0xffffff) << 16 | (uint64_t)(attr & 0xf0ff) << 40 |
           (uint64_t)(limit >> 16 & 0xf) << 48 | (uint64_t)(base >> 24) << 56;
}

void guest_gdt(struct guest *g, unsigned selector, uint64_t desc)
{
    guest_put(g, GUEST_GDT + (selector & ~7u), desc, 8);
}

void guest_gate(struct guest *g, unsigned vector, unsigned selector, uint64_t offset, unsigned type,
                unsigned dpl, bool present, unsigned ist)
{
    uint64_t low = (offset & 0xffff) | (uint64_t)selector << 16 | (uint64_t)ist << 32 |
                   (uint64_t)type << 40 | (uint64_t)dpl << 45 | (uint64_t)present << 47 |
                   (offset >> 16 & 0xffff) << 48;

    if (g->cpu.s.efer & EFER_LMA) {
        guest_put(g, GUEST_IDT + vector * 16, low, 8);
        guest_put(g, GUEST_IDT + vector * 16 + 8, offset >> 32, 8);
    } else {
        guest_put(g, GUEST_IDT + vector * 8, low, 8);
    }
}

static struct x86_seg loaded(struct guest *g, unsigned selector)
{
    return x86_seg_from_desc((uint16_t)selector, guest_get(g, GUEST_GDT + (selector & ~7u), 8));
}

void guest_system(struct guest *g, enum guest_mode mode)
{
    struct x86_state *s = &g->cpu.s;
    bool wide = mode == GUEST_LONG;

    if (mode == GUEST_REAL) {
        s->cr0 &= ~(CR0_PE | CR0_PG);
        s->idt = (struct x86_table){.base = 0, .limit = 0x3ff};
        for (unsigned v = 0; v < 256; v++)
            guest_put(g, v * 4, 0x10000000u + v * 0x10, 4);
        for (unsigned i = 0; i < 6; i++)
            s->seg[i] = (struct x86_seg){
                .base = 0x20000, .limit = 0xffff, .attr = 0x93, .selector = 0x2000};
        s->seg[SEG_CS].attr = 0x9b;
        s->gpr[RSP] = 0x1000;
        s->rip = 0x345;
        x86_tlb_flush_all(&g->cpu);
        x86_set_rflags(&g->cpu, RFLAGS_IF);
        return;
    }

    guest_paging(g, wide ? PAGING_4LEVEL : PAGING_PAE);
    guest_map(g, 0, 0, MIB(2), PTE_W, PTE_W | PTE_U);
    guest_map(g, MIB(2), MIB(2), MIB(2), PTE_W | PTE_U, PTE_W | PTE_U);

    memset(guest_ram(g, GUEST_GDT), 0, 0x1000);
    guest_gdt(g, SEL_KCODE, guest_desc(0, UINT32_MAX, wide ? 0xa09a : 0xc09a));
    guest_gdt(g, SEL_KDATA, guest_desc(0, UINT32_MAX, 0xc092));
    guest_gdt(g, SEL_UCODE32, guest_desc(0, UINT32_MAX, 0xc0fa));
    guest_gdt(g, SEL_UDATA, guest_desc(0, UINT32_MAX, 0xc0f2));
    guest_gdt(g, SEL_UCODE64, guest_desc(0, UINT32_MAX, 0xa0fa));
    guest_gdt(g, SEL_CONFORMING, guest_desc(0, UINT32_MAX, wide ? 0xa09e : 0xc09e));
    guest_gdt(g, SEL_ABSENT_CODE, guest_desc(0, UINT32_MAX, wide ? 0xa01a : 0xc01a));
    guest_gdt(g, SEL_KCODE_OTHER, guest_desc(0, UINT32_MAX, 0xc09a));
    guest_gdt(g, SEL_ABSENT_DATA, guest_desc(0, UINT32_MAX, 0xc012));
    guest_gdt(g, SEL_CODE16, guest_desc(0, 0xffff, 0x009a));
    guest_gdt(g, SEL_DATA16, guest_desc(0, 0xffff, 0x0092));
    s->gdt = (struct x86_table){.base = GUEST_GDT, .limit = 0xfff};
    s->idt = (struct x86_table){.base = GUEST_IDT, .limit = wide ? 0xfff : 0x7ff};
    for (unsigned v = 0; v < 256; v++)
        guest_gate(g, v, SEL_KCODE, HANDLER(v), 14, 3, true, 0);

    memset(guest_ram(g, GUEST_TSS), 0, 0x100);
    s->tr = (struct x86_seg){.base = GUEST_TSS, .limit = 0x67, .attr = 0x8b, .selector = SEL_TSS};
    if (wide) {
        guest_put(g, GUEST_TSS + 4, KERNEL_STACK - 0x1000, 8);
        for (unsigned i = 1; i <= 7; i++)
            guest_put(g, GUEST_TSS + 0x1c + 8 * i, IST_STACK(i), 8);
    } else {
        guest_put(g, GUEST_TSS + 4, KERNEL_STACK - 0x1000, 4);
        guest_put(g, GUEST_TSS + 8, SEL_KDATA, 2);
    }
    s->ldtr = (struct x86_seg){.attr = SEG_UNUSABLE};

    s->seg[SEG_CS] = loaded(g, SEL_KCODE);
    s->seg[SEG_SS] = loaded(g, SEL_KDATA);
    for (unsigned i = SEG_DS; i <= SEG_GS; i++)
        s->seg[i] = loaded(g, SEL_UDATA | 3);
    s->seg[SEG_ES] = s->seg[SEG_DS];
    s->gpr[RSP] = KERNEL_STACK;
    s->rip = 0x150000;
    x86_tlb_flush_all(&g->cpu);
    x86_set_rflags(&g->cpu, RFLAGS_IF);
}

void guest_enter_user(struct guest *g, bool wide)
{
    struct x86_state *s = &g->cpu.s;

    s->seg[SEG_CS] = loaded(g, (wide ? SEL_UCODE64 : SEL_UCODE32) | 3);
    s->seg[SEG_SS] = loaded(g, SEL_UDATA | 3);
    s->gpr[RSP] = USER_STACK;
    s->rip = USER_CODE;
    x86_update_mode(&g->cpu);
}

struct x86_insn guest_insn(struct guest *g, const void *bytes, unsigned len)
{
    struct x86_insn insn;
    bool gp;

    assert_int_equal(x86_decode(&insn, bytes, len, g->cpu.code_size, &gp), 0);
    g->cpu.next_rip = g->cpu.s.rip + insn.length;
    return insn;
}

int guest_run_system(struct guest *g, const char *bytes, unsigned len)
{
    struct x86_insn insn = guest_insn(g, bytes, len);
    x86_semantics_fn *fn = x86_system_semantics(&insn);

    assert_non_null(fn);
    return RAISED(g, fn(&g->cpu, &insn));
}
