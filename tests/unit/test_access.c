/*
 * Guest accesses: page crossings, devices, pages of code, alignment checks, non-canonical
 * addresses, atomics, fetch.
 */
#include "x86_guest.h"

#include <string.h>

#define VA  0x40000000ull /* two pages that are not neighbours physically */
#define PA0 0x300000
#define PA1 0x500000

static void map_two(struct guest *g)
{
    guest_paging(g, PAGING_4LEVEL);
    guest_map(g, VA, PA0, KIB(4), PTE_W | PTE_U, PTE_W | PTE_U);
    guest_map(g, VA + 0x1000, PA1, KIB(4), PTE_W | PTE_U, PTE_W | PTE_U);
}

static void sizes_and_crossings(void **state)
{
    struct guest *g = *state;
    struct x86_cpu *cpu = &g->cpu;

    map_two(g);
    for (unsigned i = 0; i < 16; i++) {
        guest_put(g, PA0 + 0xff0 + i, 0x10 + i, 1);
        guest_put(g, PA1 + i, 0x20 + i, 1);
    }
    uint8_t all[32];
    for (unsigned i = 0; i < 32; i++)
        all[i] = (uint8_t)(0x10 + i);
    for (unsigned offset = 0; offset < 24; offset++) {
        gva_t va = VA + 0xff0 + offset;
        assert_int_equal(x86_read8(cpu, va), all[offset]);
        assert_int_equal(x86_read16(cpu, va), load_le16(all + offset));
        assert_int_equal(x86_read32(cpu, va), load_le32(all + offset));
        assert_true(x86_read64(cpu, va) == load_le64(all + offset));
    }
    for (unsigned offset = 0; offset < 8; offset++) {
        gva_t va = VA + 0xff8 + offset;
        x86_write64(cpu, va, 0x1122334455667788ull * (offset + 1));
        assert_true(x86_read64(cpu, va) == 0x1122334455667788ull * (offset + 1));
        x86_write16(cpu, VA + 0xfff, (uint16_t)(0xa0b0 + offset));
        assert_int_equal(guest_get(g, PA0 + 0xfff, 1), 0xb0 + offset);
        assert_int_equal(guest_get(g, PA1, 1), 0xa0);
    }
    uint8_t block[8192], back[8192];
    guest_map(g, VA + 0x2000, PA1 + 0x3000, KIB(4), PTE_W | PTE_U, PTE_W | PTE_U);
    for (unsigned i = 0; i < sizeof(block); i++)
        block[i] = (uint8_t)(i * 7 + i / 256);
    x86_write_bytes(cpu, VA + 0x800, block, sizeof(block));
    x86_read_bytes(cpu, VA + 0x800, back, sizeof(back));
    assert_memory_equal(block, back, sizeof(block));
    assert_memory_equal(guest_ram(g, PA0 + 0x800), block, 0x800);
    assert_memory_equal(guest_ram(g, PA1), block + 0x800, 0x1000);
    assert_memory_equal(guest_ram(g, PA1 + 0x3000), block + 0x1800, 0x800);
}

static void faults_change_nothing(void **state)
{
    struct guest *g = *state;
    struct x86_cpu *cpu = &g->cpu;
    uint8_t block[64];

    guest_paging(g, PAGING_4LEVEL);
    guest_map(g, VA, PA0, KIB(4), PTE_W, PTE_W);
    memset(block, 0xaa, sizeof(block));
    /* The second page is absent, then read-only: CR2 names its first byte. */
    for (unsigned round = 0; round < 2; round++) {
        uint32_t present = round ? PF_PRESENT : 0;
        if (round)
            guest_map(g, VA + 0x1000, PA1, KIB(4), 0, PTE_W);
        cpu->s.cr2 = 0;
        assert_int_equal(RAISED(g, x86_write32(cpu, VA + 0xffe, 0x55555555)), X86_PF);
        assert_int_equal(cpu->exc_error, PF_WRITE | present);
        assert_int_equal(cpu->s.cr2, VA + 0x1000);
        assert_int_equal(RAISED(g, x86_write_bytes(cpu, VA + 0xff0, block, sizeof(block))), X86_PF);
        assert_int_equal(cpu->s.cr2, VA + 0x1000);
        assert_int_equal(RAISED(g, x86_probe_write(cpu, VA + 0xff0, 32)), X86_PF);
        assert_int_equal(guest_get(g, PA0 + 0xff0, 8) | guest_get(g, PA0 + 0xff8, 8), 0);
        if (!round) {
            assert_int_equal(RAISED(g, x86_read64(cpu, VA + 0xff9)), X86_PF);
            assert_int_equal(cpu->exc_error, 0);
            assert_int_equal(RAISED(g, x86_read_bytes(cpu, VA + 0xff0, block, sizeof(block))),
                             X86_PF);
            assert_int_equal(cpu->s.cr2, VA + 0x1000);
        } else {
            assert_int_equal(RAISED(g, x86_read64(cpu, VA + 0xff9)), -1);
        }
    }
    /* The first page absent: CR2 is the address itself. */
    assert_int_equal(RAISED(g, x86_read32(cpu, VA - 2)), X86_PF);
    assert_int_equal(cpu->s.cr2, VA - 2);
    assert_int_equal(RAISED(g, x86_probe_write(cpu, VA + 0x800, 32)), -1);
    /* A user's access says so. */
    guest_set_cpl(g, 3);
    assert_int_equal(RAISED(g, x86_read8(cpu, VA)), X86_PF);
    assert_int_equal(cpu->exc_error, PF_PRESENT | PF_USER);
}

static void dirty_before_write(void **state)
{
    struct guest *g = *state;

    guest_paging(g, PAGING_4LEVEL);
    uint64_t *leaf = guest_map(g, VA, PA0, KIB(4), PTE_W, PTE_W);
    x86_read8(&g->cpu, VA);
    assert_int_equal(*leaf & (PTE_A | PTE_D), PTE_A);
    x86_write8(&g->cpu, VA, 1);
    assert_int_equal(*leaf & (PTE_A | PTE_D), PTE_A | PTE_D);
    assert_true(atomic_load(guest_flags(g, PA0)) & PAGE_WRITABLE);
}

static void devices(void **state)
{
    struct guest *g = *state;
    struct x86_cpu *cpu = &g->cpu;

    guest_paging(g, PAGING_4LEVEL);
    guest_map(g, VA, PA0, KIB(4), PTE_W, PTE_W);
    guest_map(g, VA + 0x1000, DEVICE_BASE, KIB(4), PTE_W, PTE_W);
    guest_map(g, VA + 0x2000, 0x90000000, KIB(4), PTE_W, PTE_W);
    gva_t dev = VA + 0x1000;

    g->device_value = 0x8877665544332211;
    assert_int_equal(x86_read8(cpu, dev + 1), 0x22);
    assert_int_equal(g->device_size, 1);
    assert_int_equal(x86_read16(cpu, dev + 2), 0x4433);
    assert_int_equal(x86_read32(cpu, dev + 4), 0x88776655);
    assert_int_equal(g->device_offset, 4);
    assert_true(x86_read64(cpu, dev) == g->device_value);
    assert_int_equal(g->device_size, 8);
    assert_int_equal(g->device_reads, 4);
    assert_int_equal(cpu->mmio_exits, 4);
    /* An unaligned operand is one access, as on the bus. */
    x86_read32(cpu, dev + 2);
    assert_int_equal(g->device_reads, 5);
    assert_int_equal(g->device_size, 4);

    x86_write32(cpu, dev + 8, 0xcafebabe);
    assert_int_equal(g->device_writes, 1);
    assert_int_equal(g->device_offset, 8);
    assert_int_equal(g->device_value, 0xcafebabe);
    x86_write32(cpu, dev + 8, 0xcafebabf);
    assert_int_equal(g->device_writes, 2);

    /* From RAM into the device: RAM's bytes go to RAM, the rest in aligned pieces. */
    x86_write64(cpu, dev - 3, 0x0807060504030201);
    assert_int_equal(guest_get(g, PA0 + 0xffd, 2) | guest_get(g, PA0 + 0xfff, 1) << 16, 0x030201);
    assert_int_equal(g->device_writes, 4);
    assert_int_equal(g->device_offset, 4);
    assert_int_equal(g->device_value, 0x08);
    assert_int_equal(g->device_size, 1);
    /* A fault later in the operand keeps the device untouched. */
    guest_map(g, VA + 0x1000, PA0, KIB(4), 0, PTE_W);
    guest_map(g, VA, DEVICE_BASE, KIB(4), PTE_W, PTE_W);
    x86_tlb_flush_all(cpu);
    assert_int_equal(RAISED(g, x86_write64(cpu, VA + 0xffc, 0)), X86_PF);
    assert_int_equal(g->device_writes, 4);

    /* Nobody there. */
    assert_int_equal(x86_read32(cpu, VA + 0x2000), UINT32_MAX);
    x86_write32(cpu, VA + 0x2000, 1);
    /* Pointers into devices do not exist. */
    assert_null(x86_host_pointer(cpu, VA, 4, ACCESS_READ));
    assert_null(x86_rmw_pointer(cpu, VA, 4));
}

static void apic_window(void **state)
{
    struct guest *g = *state;
    struct x86_cpu *cpu = &g->cpu;

    guest_paging(g, PAGING_4LEVEL);
    guest_map(g, VA, 0xfee00000, KIB(4), PTE_W, PTE_W);
    assert_int_equal(cpu->apic_base, 0xfee00000);
    assert_int_equal(x86_read32(cpu, VA + 0x30) & 0xff, 0x14);
    x86_write32(cpu, VA + 0x80, 0x20);
    assert_int_equal(lapic_cr8(cpu->lapic), 2);
    /* Moved over RAM, it hides the RAM. */
    guest_map(g, VA, PA0, KIB(4), PTE_W, PTE_W);
    x86_tlb_flush_all(cpu);
    cpu->apic_base = PA0;
    x86_write32(cpu, VA + 0x80, 0x30);
    assert_int_equal(lapic_cr8(cpu->lapic), 3);
    assert_int_equal(guest_get(g, PA0 + 0x80, 4), 0);
}

static void code_pages(void **state)
{
    struct guest *g = *state;
    struct x86_cpu *cpu = &g->cpu;
    _Atomic uint8_t *flags;

    map_two(g);
    flags = guest_flags(g, PA0);
    atomic_store(flags, PAGE_CODE);
    x86_read32(cpu, VA);
    /* Each write is told after it happened, again and again. */
    for (unsigned i = 1; i <= 3; i++) {
        x86_write32(cpu, VA + 0x10 * i, i);
        assert_int_equal(g->code_calls, i);
        assert_int_equal(g->code_gpa, PA0 + 0x10 * i);
        assert_int_equal(g->code_len, 4);
        assert_int_equal(guest_get(g, PA0 + 0x10 * i, 4), i);
    }
    assert_false(atomic_load(flags) & PAGE_WRITABLE);
    assert_null(x86_host_pointer(cpu, VA, 4, ACCESS_WRITE));
    assert_non_null(x86_host_pointer(cpu, VA, 4, ACCESS_READ));
    /* Crossing into or out of it tells its part. */
    x86_write64(cpu, VA + 0xffd, 0);
    assert_int_equal(g->code_calls, 4);
    assert_int_equal(g->code_gpa, PA0 + 0xffd);
    assert_int_equal(g->code_len, 3);
    /* Atomics get a pointer and tell at the end. */
    uint32_t *p = x86_rmw_pointer(cpu, VA + 8, 4);
    assert_ptr_equal(p, guest_ram(g, PA0 + 8));
    assert_int_equal(g->code_calls, 4);
    x86_rmw_done(cpu, VA + 8, 4, p);
    assert_int_equal(g->code_calls, 5);
    assert_int_equal(g->code_gpa, PA0 + 8);
    x86_write_bytes(cpu, VA + 0x100, "0123456789", 10);
    assert_int_equal(g->code_calls, 6);
    assert_int_equal(g->code_len, 10);

    /* No code any more: writes pass unseen again. */
    atomic_store(flags, 0);
    x86_write32(cpu, VA, 9);
    assert_int_equal(g->code_calls, 6);
    assert_true(atomic_load(flags) & PAGE_WRITABLE);
    assert_non_null(tlb_lookup(cpu->tlb, VA, 4, TLB_WRITE));
    p = x86_rmw_pointer(cpu, VA + 8, 4);
    x86_rmw_done(cpu, VA + 8, 4, p);
    assert_int_equal(g->code_calls, 6);
    assert_null(x86_rmw_pointer(cpu, VA + 0xffd, 8));
    /* And back: whoever decodes drops the write tags in all views. */
    x86_write32(cpu, VA + 0x1000, 9);
    guest_set_cpl(g, 3);
    x86_write32(cpu, VA, 9);
    x86_tlb_drop_writes_to(cpu, guest_ram(g, PA0));
    assert_null(tlb_lookup(&cpu->space->data.set, VA, 4, TLB_WRITE));
    assert_null(tlb_lookup(&cpu->tlbs->kernel_ac.set, VA, 4, TLB_WRITE));
    assert_non_null(tlb_lookup(&cpu->tlbs->kernel_ac.set, VA + 0x1000, 4, TLB_WRITE));

    /* The processor's own writes to page tables count as well. */
    uint64_t *leaf = guest_map(g, VA + 0x5000, PA0, KIB(4), PTE_W | PTE_U, PTE_W | PTE_U);
    for (gpa_t t = GUEST_TABLES; t < g->next_table; t += 4096)
        if ((uintptr_t)guest_ram(g, t) == ((uintptr_t)leaf & GUEST_PAGE_MASK))
            atomic_fetch_or(guest_flags(g, t), PAGE_CODE);
    unsigned calls = g->code_calls;
    x86_read8(cpu, VA + 0x5000);
    assert_int_equal(*leaf & PTE_A, PTE_A);
    assert_int_equal(g->code_calls, calls + 1);
    assert_int_equal(g->code_len, 8);
    assert_ptr_equal(guest_ram(g, g->code_gpa), leaf);
}

static void dirty_logging(void **state)
{
    struct guest *g = *state;
    struct x86_cpu *cpu = &g->cpu;

    map_two(g);
    atomic_store(&g->machine.memory.dirty_logging, true);
    x86_read32(cpu, VA);
    assert_false(atomic_load(guest_flags(g, PA0)) & PAGE_DIRTY);
    x86_write32(cpu, VA, 1);
    assert_true(atomic_load(guest_flags(g, PA0)) & PAGE_DIRTY);
    x86_write16(cpu, VA + 0xfff, 1);
    assert_true(atomic_load(guest_flags(g, PA1)) & PAGE_DIRTY);
    /* Page tables are dirtied by accessed bits. */
    uint8_t seen = 0;
    for (gpa_t t = GUEST_ROOT; t < g->next_table; t += 4096)
        seen |= atomic_load(guest_flags(g, t));
    assert_true(seen & PAGE_DIRTY);
}

static void alignment(void **state)
{
    struct guest *g = *state;
    struct x86_cpu *cpu = &g->cpu;

    map_two(g);
    cpu->s.cr0 |= CR0_AM;
    guest_set_cpl(g, 3);
    x86_read32(cpu, VA + 1);
    x86_set_rflags(cpu, RFLAGS_AC);
    for (unsigned i = 0; i < 8; i++) {
        assert_int_equal(RAISED(g, x86_read8(cpu, VA + i)), -1);
        assert_int_equal(RAISED(g, x86_read16(cpu, VA + i)), i % 2 ? X86_AC : -1);
        assert_int_equal(RAISED(g, x86_write32(cpu, VA + i, 0)), i % 4 ? X86_AC : -1);
        assert_int_equal(RAISED(g, x86_write64(cpu, VA + i, 0)), i % 8 ? X86_AC : -1);
        assert_int_equal(RAISED(g, x86_host_pointer(cpu, VA + i, 4, ACCESS_READ)),
                         i % 4 ? X86_AC : -1);
    }
    assert_int_equal(cpu->exc_error, 0);
    /* Accesses work and the set stays empty. */
    x86_write32(cpu, VA + 4, 77);
    assert_int_equal(x86_read32(cpu, VA + 4), 77);
    assert_null(tlb_lookup(&x86_checking_set, VA + 4, 4, TLB_READ));
    /* Not checked for the supervisor, and not without AM or AC. */
    guest_set_cpl(g, 0);
    assert_int_equal(RAISED(g, x86_read32(cpu, VA + 1)), -1);
    guest_set_cpl(g, 3);
    x86_set_rflags(cpu, 0);
    assert_int_equal(RAISED(g, x86_read32(cpu, VA + 1)), -1);
}

static void smap(void **state)
{
    struct guest *g = *state;
    struct x86_cpu *cpu = &g->cpu;

    map_two(g);
    cpu->s.cr4 |= CR4_SMAP;
    x86_update_mode(cpu);
    assert_int_equal(RAISED(g, x86_read8(cpu, VA)), X86_PF);
    assert_int_equal(cpu->exc_error, PF_PRESENT);
    x86_set_rflags(cpu, RFLAGS_AC);
    assert_int_equal(RAISED(g, x86_read8(cpu, VA)), -1);
    assert_int_equal(RAISED(g, x86_read8_in(cpu, x86_system_set(cpu), VA)), X86_PF);
    x86_set_rflags(cpu, 0);
    assert_int_equal(RAISED(g, x86_read8(cpu, VA)), X86_PF);
}

static void non_canonical(void **state)
{
    struct guest *g = *state;
    struct x86_cpu *cpu = &g->cpu;
    const uint64_t bad = 0x800000000000;
    static const struct {
        uint8_t bytes[8];
        int vector;
    } cases[] = {
        {{0x8b, 0x03}, X86_GP},             /* mov (%rbx),%eax */
        {{0x8b, 0x45, 0x00}, X86_SS},       /* mov 0(%rbp),%eax */
        {{0x8b, 0x04, 0x24}, X86_SS},       /* mov (%rsp),%eax */
        {{0x8b, 0x44, 0x2b, 0x00}, X86_GP}, /* mov 0(%rbx,%rbp),%eax: base rbx */
        {{0x3e, 0x8b, 0x45, 0x00}, X86_SS}, /* a DS prefix means nothing in 64-bit mode */
        {{0x64, 0x8b, 0x45, 0x00}, X86_GP}, /* but FS does */
        {{0x50}, X86_SS},                   /* push %rax */
        {{0xff, 0x33}, X86_GP},             /* pushq (%rbx): its operand, the stack is good */
        {{0xc3}, X86_SS},                   /* ret */
        {{0xc9}, X86_SS},                   /* leave */
        {{0xa5}, X86_GP},                   /* movsl */
    };

    map_two(g);
    cpu->s.rip = VA + 0x800;
    for (unsigned i = 0; i < ARRAY_SIZE(cases); i++) {
        bool memory_only = cases[i].bytes[0] == 0xff;
        memcpy(guest_ram(g, PA0 + 0x800), cases[i].bytes, 8);
        for (unsigned r = 0; r < 16; r++)
            cpu->s.gpr[r] = bad;
        if (memory_only)
            cpu->s.gpr[RSP] = VA + 0x100;
        if (cases[i].bytes[2] == 0x2b)
            cpu->s.gpr[RBP] = 0;
        gva_t va = cases[i].bytes[0] == 0x50 ? bad - 8 + 0x10 : bad;
        assert_int_equal(RAISED(g, x86_read32(cpu, va)), cases[i].vector);
        assert_int_equal(cpu->exc_error, 0);
    }
    /* The first page is the last canonical one. */
    guest_map(g, 0x7ffffffff000, PA1, KIB(4), PTE_W, PTE_W);
    memcpy(guest_ram(g, PA0 + 0x800), cases[0].bytes, 8);
    cpu->s.gpr[RBX] = bad - 2;
    assert_int_equal(RAISED(g, x86_read16(cpu, bad - 2)), -1);
    assert_int_equal(RAISED(g, x86_read32(cpu, bad - 2)), X86_GP);
    assert_int_equal(RAISED(g, x86_write32(cpu, bad - 2, 1)), X86_GP);
    assert_int_equal(guest_get(g, PA1 + 0xffe, 2), 0);
    assert_int_equal(RAISED(g, x86_read8(cpu, 0xffff7fffffffffff)), X86_GP);
    assert_int_equal(RAISED(g, x86_read8(cpu, 0xffff800000000000)), X86_PF);
}

static void fetch(void **state)
{
    struct guest *g = *state;
    struct x86_cpu *cpu = &g->cpu;
    uint8_t bytes[X86_MAX_INSN];

    guest_paging(g, PAGING_4LEVEL);
    guest_map(g, VA, PA0, KIB(4), 0, PTE_W);
    guest_map(g, VA + 0x1000, PA1, KIB(4), PTE_NX, PTE_W);
    for (unsigned i = 0; i < 0x1000; i++)
        guest_put(g, PA0 + i, i, 1);
    for (unsigned offset = 0; offset < 64; offset++) {
        unsigned n = x86_fetch(cpu, VA + 0xfff - offset, bytes);
        assert_int_equal(n, MIN(offset + 1, 15));
        for (unsigned i = 0; i < n; i++)
            assert_int_equal(bytes[i], (uint8_t)(0xff - offset + i));
    }
    assert_int_equal(RAISED(g, x86_fetch(cpu, VA + 0x1000, bytes)), X86_PF);
    assert_int_equal(cpu->exc_error, PF_PRESENT | PF_FETCH);
    assert_int_equal(cpu->s.cr2, VA + 0x1000);
    assert_int_equal(RAISED(g, x86_fetch(cpu, VA + 0x2000, bytes)), X86_PF);
    assert_int_equal(cpu->exc_error, PF_FETCH);
    assert_int_equal(RAISED(g, x86_fetch(cpu, 0x800000000000, bytes)), X86_GP);
    /* Both pages runnable: one piece, once the second is known. */
    guest_map(g, VA + 0x1000, PA1, KIB(4), 0, PTE_W);
    guest_put(g, PA1, 0xabcd, 2);
    assert_int_equal(x86_fetch(cpu, VA + 0x1000, bytes), 15);
    assert_int_equal(x86_fetch(cpu, VA + 0xffd, bytes), 15);
    assert_int_equal(bytes[2], 0xff);
    assert_int_equal(bytes[3], 0xcd);

    /* From a device, and from nowhere. */
    guest_map(g, VA + 0x3000, DEVICE_BASE, KIB(4), 0, PTE_W);
    guest_map(g, VA + 0x4000, 0x90000000, KIB(4), 0, PTE_W);
    g->device_value = 0x9090909090909090;
    assert_int_equal(x86_fetch(cpu, VA + 0x3000, bytes), 15);
    assert_int_equal(bytes[14], 0x90);
    assert_int_equal(x86_fetch(cpu, VA + 0x4000, bytes), 15);
    assert_int_equal(bytes[0], 0xff);

    /* SMEP. */
    guest_map(g, VA + 0x5000, PA0, KIB(4), PTE_U, PTE_W | PTE_U);
    assert_int_equal(RAISED(g, x86_fetch(cpu, VA + 0x5000, bytes)), -1);
    cpu->s.cr4 |= CR4_SMEP;
    x86_tlb_flush_all(cpu);
    assert_int_equal(RAISED(g, x86_fetch(cpu, VA + 0x5000, bytes)), X86_PF);
    assert_int_equal(cpu->exc_error, PF_PRESENT | PF_FETCH);

    /* The limit of CS counts outside 64-bit mode. */
    struct x86_seg *cs = &cpu->s.seg[SEG_CS];
    cs->attr = 0xc09b;
    cs->base = VA;
    cs->limit = 0x104;
    x86_update_mode(cpu);
    assert_int_equal(x86_fetch(cpu, VA + 0x100, bytes), 5);
    assert_int_equal(RAISED(g, x86_fetch(cpu, VA + 0x105, bytes)), X86_GP);
    assert_int_equal(cpu->exc_error, 0);
}

static void wraps_at_4g(void **state)
{
    struct guest *g = *state;
    struct x86_cpu *cpu = &g->cpu;

    guest_paging(g, PAGING_32);
    guest_map(g, 0xfffff000, PA0, KIB(4), PTE_W, PTE_W);
    guest_map(g, 0, PA1, KIB(4), PTE_W, PTE_W);
    x86_write32(cpu, 0xfffffffe, 0x11223344);
    assert_int_equal(guest_get(g, PA0 + 0xffe, 2), 0x3344);
    assert_int_equal(guest_get(g, PA1, 2), 0x1122);
    assert_int_equal(x86_read32(cpu, 0xfffffffe), 0x11223344);
}

static void split_locks_are_released_by_faults(void **state)
{
    struct guest *g = *state;

    guest_paging(g, PAGING_4LEVEL);
    for (unsigned i = 0; i < 3; i++) {
        int vector = RAISED(g, {
            x86_split_lock(&g->cpu);
            x86_read32(&g->cpu, VA);
            x86_split_unlock(&g->cpu);
        });
        assert_int_equal(vector, X86_PF);
    }
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, guest_setup, guest_teardown)
    const struct CMUnitTest tests[] = {
        TEST(sizes_and_crossings),
        TEST(faults_change_nothing),
        TEST(dirty_before_write),
        TEST(devices),
        TEST(apic_window),
        TEST(code_pages),
        TEST(dirty_logging),
        TEST(alignment),
        TEST(smap),
        TEST(non_canonical),
        TEST(fetch),
        TEST(wraps_at_4g),
        TEST(split_locks_are_released_by_faults),
    };
    return cmocka_run_group_tests_name("access", tests, NULL, NULL);
}
