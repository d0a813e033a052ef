/*
 * Guest memory accesses that the soft TLB's inline part cannot do: misses, page crossings,
 * devices, pages of decoded code, alignment checks; blocks of bytes; instruction fetch.
 *
 * Runs in the vCPU's thread. Everything that can fault is found out before the first byte
 * is written or the first device is touched. Devices are reached with no lock held: the bus takes
 * the machine lock itself.
 */
#include <pthread.h>
#include <string.h>

#include "base/util.h"
#include "device/bus.h"
#include "device/irqchip/irqchip.h"
#include "device/machine.h"
#include "isa/x86/mmu.h"
#include "isa/x86/trial.h"

/* A block of at most two pages' length touches at most three. */
#define MAX_BLOCK  8192u
#define MAX_PLACES 3

static unsigned room(gva_t va)
{
    return GUEST_PAGE_SIZE - (unsigned)(va & ~GUEST_PAGE_MASK);
}

/* The linear address after a page: it wraps at 4 GiB outside 64-bit mode. */
static gva_t next_page(const struct x86_cpu *cpu, gva_t va)
{
    gva_t next = (va | ~GUEST_PAGE_MASK) + 1;
    return cpu->code_size != 8 && va <= UINT32_MAX ? (uint32_t)next : next;
}

/* ---- non-canonical addresses ---- */

/* Instructions that use the stack besides their operands. */
static bool uses_stack(const struct x86_insn *insn)
{
    switch (insn->category) {
    case ZYDIS_CATEGORY_PUSH:
    case ZYDIS_CATEGORY_POP:
    case ZYDIS_CATEGORY_CALL:
    case ZYDIS_CATEGORY_RET:
        return true;
    default:
        return insn->mnemonic == ZYDIS_MNEMONIC_ENTER || insn->mnemonic == ZYDIS_MNEMONIC_LEAVE;
    }
}

static bool tests_bits(const struct x86_insn *insn)
{
    switch (insn->mnemonic) {
    case ZYDIS_MNEMONIC_BT:
    case ZYDIS_MNEMONIC_BTC:
    case ZYDIS_MNEMONIC_BTR:
    case ZYDIS_MNEMONIC_BTS:
        return true;
    default:
        return false;
    }
}

void x86_raise_non_canonical(struct x86_cpu *cpu, gva_t va)
{
    uint8_t bytes[X86_MAX_INSN];
    unsigned n = 0;
    struct x86_insn insn;
    bool gp;

    /* Rare enough to look at the instruction again. Without side effects: it was fetched once
     * already. */
    for (gva_t at = cpu->s.rip; n < X86_MAX_INSN; n++, at++) {
        gpa_t gpa;
        if (x86_walk_quiet(cpu, at, &gpa) < 0 || memory_read(cpu->mem, gpa, &bytes[n], 1) < 0)
            break;
    }
    if (x86_decode(&insn, bytes, n, cpu->code_size, &gp) < 0)
        x86_raise_error(cpu, X86_GP, 0);

    bool through_ss = false;
    if (insn.has_mem && insn.mem.seg == SEG_SS) {
        /*
         * Accesses of parts start a little after the operand's address; a bit offset in a register and a
         * vector of indices lead anywhere.
         */
        through_ss = tests_bits(&insn) || insn.mem.vsib_size || va - x86_effective(cpu, &insn) < MAX_BLOCK;
    }
    /* PUSH and CALL read their operand first, POP the stack. */
    bool operand = insn.has_mem && insn.mem.seg != SEG_SS && va - x86_effective(cpu, &insn) < 8 &&
                   !(insn.category == ZYDIS_CATEGORY_POP && va - cpu->s.gpr[RSP] < 8);
    if (uses_stack(&insn) && !operand) {
        uint64_t base = insn.mnemonic == ZYDIS_MNEMONIC_LEAVE ? cpu->s.gpr[RBP] : cpu->s.gpr[RSP];
        through_ss = through_ss || va - (base - 64) < 128;
    }
    x86_raise_error(cpu, through_ss ? X86_SS : X86_GP, 0);
}

/* An access that ends beyond the canonical addresses raises for that before its first page is
 * looked at. */
static void check_end(struct x86_cpu *cpu, gva_t va, unsigned len)
{
    gva_t last = va + len - 1;

    if (x86_canonical(cpu, va) && !x86_canonical(cpu, last))
        x86_raise_non_canonical(cpu, last & GUEST_PAGE_MASK);
}

/*
 * #AC: only the checking set is ever asked to look. Vectors are checked for 16 bytes on AMD's processors, not at all on Intel's;
 * 80-bit operands for 8; areas of other sizes have rules of their own. A non-canonical address comes first (on AMD's also that of
 * the end), a page fault later.
 */
static void check_alignment(struct x86_cpu *cpu, const struct tlb_set *set, gva_t va, unsigned size)
{
    unsigned vector = cpu->amd ? 16 : 1;
    unsigned align = size == 10 ? 8 : size > 64 || size & (size - 1) ? 1 : size < 16 ? size : vector;

    if (likely(set != &x86_checking_set) || !(va & (align - 1)))
        return;
    if (!x86_canonical(cpu, va))
        x86_raise_non_canonical(cpu, va);
    if (cpu->amd)
        check_end(cpu, va, size);
    x86_raise_error(cpu, X86_AC, 0);
}

/* ---- devices ---- */

static uint64_t mmio_read(struct x86_cpu *cpu, gpa_t gpa, unsigned size)
{
    x86_trial_device(cpu);
    cpu->mmio_exits++;
    if ((gpa & GUEST_PAGE_MASK) == cpu->apic_base)
        return lapic_mmio_read(cpu->lapic, (unsigned)(gpa & ~GUEST_PAGE_MASK), size);
    return bus_read(&cpu->machine->mmio, gpa, size);
}

static void mmio_write(struct x86_cpu *cpu, gpa_t gpa, uint64_t value, unsigned size)
{
    x86_trial_device(cpu);
    cpu->mmio_exits++;
    if ((gpa & GUEST_PAGE_MASK) == cpu->apic_base)
        lapic_mmio_write(cpu->lapic, (unsigned)(gpa & ~GUEST_PAGE_MASK), value, size);
    else
        bus_write(&cpu->machine->mmio, gpa, value, size);
}

/* The largest naturally aligned access that starts at gpa and has at most len bytes. */
static unsigned mmio_piece(gpa_t gpa, unsigned len)
{
    unsigned size = 8;
    while (size > len || (gpa & (size - 1)))
        size /= 2;
    return size;
}

static void mmio_read_block(struct x86_cpu *cpu, gpa_t gpa, uint8_t *buf, unsigned len)
{
    while (len) {
        unsigned n = mmio_piece(gpa, len);
        uint64_t v = mmio_read(cpu, gpa, n);
        memcpy(buf, &v, n);
        gpa += n;
        buf += n;
        len -= n;
    }
}

static void mmio_write_block(struct x86_cpu *cpu, gpa_t gpa, const uint8_t *buf, unsigned len)
{
    while (len) {
        unsigned n = mmio_piece(gpa, len);
        uint64_t v = 0;
        memcpy(&v, buf, n);
        mmio_write(cpu, gpa, v, n);
        gpa += n;
        buf += n;
        len -= n;
    }
}

/* ---- one place ---- */

static void told_written(struct x86_cpu *cpu, const struct x86_place *p, unsigned len)
{
    if (p->code && cpu->trial && cpu->trial->noting)
        cpu->trial->code_written = true;
    else if (p->code && cpu->hooks)
        cpu->hooks->code_written(cpu, p->gpa, len);
}

static void read_place(struct x86_cpu *cpu, const struct x86_place *p, void *buf, unsigned len)
{
    if (p->host)
        memcpy(buf, p->host, len);
    else
        mmio_read_block(cpu, p->gpa, buf, len);
}

static void write_place(struct x86_cpu *cpu, const struct x86_place *p, const void *buf,
                        unsigned len)
{
    if (p->host) {
        x86_trial_writing(cpu, p->host, len);
        memcpy(p->host, buf, len);
        told_written(cpu, p, len);
    } else {
        mmio_write_block(cpu, p->gpa, buf, len);
    }
}

/* Whole operands are single host accesses, as atomic as the guest may expect. */
static uint64_t load_operand(struct x86_cpu *cpu, const struct x86_place *p, unsigned size)
{
    if (!p->host)
        return mmio_read(cpu, p->gpa, size);
    switch (size) {
    case 1:
        return *p->host;
    case 2:
        return load_le16(p->host);
    case 4:
        return load_le32(p->host);
    default:
        return load_le64(p->host);
    }
}

static void store_operand(struct x86_cpu *cpu, const struct x86_place *p, uint64_t value,
                          unsigned size)
{
    if (!p->host) {
        mmio_write(cpu, p->gpa, value, size);
        return;
    }
    x86_trial_writing(cpu, p->host, size);
    switch (size) {
    case 1:
        *p->host = (uint8_t)value;
        break;
    case 2:
        store_le16(p->host, (uint16_t)value);
        break;
    case 4:
        store_le32(p->host, (uint32_t)value);
        break;
    default:
        store_le64(p->host, value);
        break;
    }
    told_written(cpu, p, size);
}

uint64_t x86_read_slow(struct x86_cpu *cpu, struct tlb_set *set, gva_t va, unsigned size)
{
    struct x86_place p[2];
    unsigned first = room(va);
    uint64_t value = 0;

    check_alignment(cpu, set, va, size);
    if (size > first)
        check_end(cpu, va, size);
    x86_translate(cpu, set, va, ACCESS_READ, &p[0]);
    if (size <= first)
        return load_operand(cpu, &p[0], size);
    x86_translate(cpu, set, next_page(cpu, va), ACCESS_READ, &p[1]);
    read_place(cpu, &p[0], &value, first);
    read_place(cpu, &p[1], (uint8_t *)&value + first, size - first);
    return value;
}

void x86_write_slow(struct x86_cpu *cpu, struct tlb_set *set, gva_t va, uint64_t value,
                    unsigned size)
{
    struct x86_place p[2];
    unsigned first = room(va);

    check_alignment(cpu, set, va, size);
    if (size > first)
        check_end(cpu, va, size);
    x86_translate(cpu, set, va, ACCESS_WRITE, &p[0]);
    if (size <= first) {
        store_operand(cpu, &p[0], value, size);
        return;
    }
    x86_translate(cpu, set, next_page(cpu, va), ACCESS_WRITE, &p[1]);
    write_place(cpu, &p[0], &value, first);
    write_place(cpu, &p[1], (uint8_t *)&value + first, size - first);
}

/* ---- blocks ---- */

static unsigned translate_block(struct x86_cpu *cpu, struct tlb_set *set, gva_t va, unsigned len,
                                enum x86_access access, struct x86_place p[MAX_PLACES])
{
    unsigned n = 0;

    check_alignment(cpu, set, va, len);
    if (len > room(va))
        check_end(cpu, va, len);
    while (len) {
        unsigned part = MIN(len, room(va));
        x86_translate(cpu, set, va, access, &p[n++]);
        va = next_page(cpu, va);
        len -= part;
    }
    return n;
}

void x86_read_bytes_in(struct x86_cpu *cpu, struct tlb_set *set, gva_t va, void *buf, unsigned len)
{
    struct x86_place p[MAX_PLACES];
    uint8_t *to = buf;
    const void *direct = len && len <= GUEST_PAGE_SIZE ? tlb_lookup(set, va, len, TLB_READ) : NULL;

    if (direct) {
        memcpy(buf, direct, len);
        return;
    }
    translate_block(cpu, set, va, len, ACCESS_READ, p);
    for (unsigned i = 0; len; i++) {
        unsigned part = MIN(len, room(va));
        read_place(cpu, &p[i], to, part);
        va += part;
        to += part;
        len -= part;
    }
}

void x86_write_bytes_in(struct x86_cpu *cpu, struct tlb_set *set, gva_t va, const void *buf,
                        unsigned len)
{
    struct x86_place p[MAX_PLACES];
    const uint8_t *from = buf;
    void *direct = len && len <= GUEST_PAGE_SIZE ? tlb_lookup(set, va, len, TLB_WRITE) : NULL;

    if (direct) {
        memcpy(direct, buf, len);
        return;
    }
    translate_block(cpu, set, va, len, ACCESS_WRITE, p);
    for (unsigned i = 0; len; i++) {
        unsigned part = MIN(len, room(va));
        write_place(cpu, &p[i], from, part);
        va += part;
        from += part;
        len -= part;
    }
}

void x86_read_bytes(struct x86_cpu *cpu, gva_t va, void *buf, unsigned len)
{
    x86_read_bytes_in(cpu, cpu->tlb, va, buf, len);
}

void x86_write_bytes(struct x86_cpu *cpu, gva_t va, const void *buf, unsigned len)
{
    x86_write_bytes_in(cpu, cpu->tlb, va, buf, len);
}

void x86_probe_write_in(struct x86_cpu *cpu, struct tlb_set *set, gva_t va, unsigned len)
{
    struct x86_place p[MAX_PLACES];

    if (len && len <= GUEST_PAGE_SIZE && tlb_lookup(set, va, len, TLB_WRITE))
        return;
    translate_block(cpu, set, va, len, ACCESS_WRITE, p);
}

void x86_probe_write(struct x86_cpu *cpu, gva_t va, unsigned len)
{
    x86_probe_write_in(cpu, cpu->tlb, va, len);
}

void *x86_host_pointer(struct x86_cpu *cpu, gva_t va, unsigned len, enum x86_access access)
{
    struct tlb_set *set = access == ACCESS_EXEC ? cpu->tlb_fetch : cpu->tlb;
    struct x86_place p;
    void *direct = tlb_lookup(set, va, len, (enum tlb_kind)access);

    if (direct)
        return direct;
    if (len > room(va))
        return NULL;
    check_alignment(cpu, set, va, len);
    x86_translate(cpu, set, va, access, &p);
    if (access == ACCESS_WRITE && p.host && !p.code)
        x86_trial_writing(cpu, p.host, len);
    return p.code ? NULL : p.host;
}

/* ---- atomics ---- */

void *x86_rmw_pointer(struct x86_cpu *cpu, gva_t va, unsigned len)
{
    struct x86_place p;
    void *direct = tlb_lookup(cpu->tlb, va, len, TLB_WRITE);

    if (direct)
        return direct;
    check_alignment(cpu, cpu->tlb, va, len);
    if (len > room(va))
        return NULL;
    x86_translate(cpu, cpu->tlb, va, ACCESS_WRITE, &p);
    if (p.host)
        x86_trial_writing(cpu, p.host, len);
    return p.host;
}

void x86_rmw_done(struct x86_cpu *cpu, gva_t va, unsigned len, void *pointer)
{
    const uint8_t *host = pointer;

    if (tlb_lookup(cpu->tlb, va, len, TLB_WRITE) || (cpu->trial && cpu->trial->noting))
        return;
    for (unsigned i = 0; i < cpu->mem->regions; i++) {
        struct memory_region *r = &cpu->mem->region[i];
        uint64_t offset = (uint64_t)(host - r->host);
        if (host >= r->host && offset < r->size) {
            x86_phys_written(cpu, r->base + offset, len, &r->flags[offset >> GUEST_PAGE_SHIFT]);
            return;
        }
    }
}

/*
 * Serializes split and device RMW among the vCPUs of all machines in the process. Plain stores of
 * other vCPUs are not held off: on a real bus lock they would be, but code that mixes both on one
 * operand is not what split locks are for. The machine lock may be taken inside.
 */
static pthread_mutex_t split_mutex = PTHREAD_MUTEX_INITIALIZER;
static __thread bool split_held;

void x86_split_lock(struct x86_cpu *cpu)
{
    pthread_mutex_lock(&split_mutex);
    split_held = true;
}

void x86_split_unlock(struct x86_cpu *cpu)
{
    if (split_held) {
        split_held = false;
        pthread_mutex_unlock(&split_mutex);
    }
}

/* ---- fetch ---- */

const uint8_t *x86_fetch_pointer(struct x86_cpu *cpu, gva_t va)
{
    struct x86_place p;

    if (cpu->code_size != 8) {
        if ((uint32_t)(va - cpu->s.seg[SEG_CS].base) > cpu->s.seg[SEG_CS].limit)
            x86_raise_error(cpu, X86_GP, 0);
        va = (uint32_t)va;
    }
    x86_translate(cpu, cpu->tlb_fetch, va, ACCESS_EXEC, &p);
    return p.host;
}

unsigned x86_fetch(struct x86_cpu *cpu, gva_t va, uint8_t bytes[X86_MAX_INSN])
{
    struct x86_place p;
    unsigned len = X86_MAX_INSN;

    if (cpu->code_size != 8) {
        const struct x86_seg *cs = &cpu->s.seg[SEG_CS];
        uint32_t offset = (uint32_t)(va - cs->base);
        if (offset > cs->limit)
            x86_raise_error(cpu, X86_GP, 0);
        len = (unsigned)MIN((uint64_t)len, (uint64_t)cs->limit - offset + 1);
        va = (uint32_t)va;
    }
    const void *direct = tlb_lookup(cpu->tlb_fetch, va, len, TLB_EXEC);
    if (direct) {
        memcpy(bytes, direct, len);
        return len;
    }
    x86_translate(cpu, cpu->tlb_fetch, va, ACCESS_EXEC, &p);
    unsigned first = MIN(len, room(va));
    read_place(cpu, &p, bytes, first);
    if (first == len)
        return len;
    /* What of the next page is needed only decoding tells, so its faults wait until somebody asks
     * for its bytes. */
    gva_t next = next_page(cpu, va);
    const void *more = tlb_lookup(cpu->tlb_fetch, next, len - first, TLB_EXEC);
    if (!more)
        return first;
    memcpy(bytes + first, more, len - first);
    return len;
}
