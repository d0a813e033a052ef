/*
 * The block cache: decoded blocks by guest address, host address and mode, the code pages they come from, and
 * what happens when guest code changes.
 *
 * Memory comes from one arena that is only ever emptied as a whole, at a safe point (no handler running). A dropped
 * block stays readable until then: its ops turn into op_leave, so whoever still runs in it or is linked to
 * it leaves at the next instruction.
 */
#include "engine/interp/interp.h"
#include "isa/x86/mmu.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "base/log.h"
#include "device/machine.h"

#define HASH_SIZE (1u << BLOCK_HASH_BITS)
#define PAGE_HASH_SIZE (1u << 12)
#define MAX_BLOCK_INSNS 64
#define GRANULE_SHIFT 6         /* 64 bytes: a page has as many granules as a word has bits */

/* A page with decoded code of this vCPU. */
struct code_page {
    gpa_t gpa;
    struct block *blocks;       /* linked by next_in() */
    uint64_t granules;          /* which granules blocks cover; may be too many after blocks were dropped */
    struct code_page *next_hash;
};

static unsigned page_hash(gpa_t gpa) { return (gpa >> GUEST_PAGE_SHIFT) & (PAGE_HASH_SIZE - 1); }

int block_cache_init(struct interp *it, size_t arena_size)
{
    it->hash = calloc(HASH_SIZE, sizeof(*it->hash));
    it->page_hash = calloc(PAGE_HASH_SIZE, sizeof(*it->page_hash));
    it->arena = mmap(NULL, arena_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (it->arena == MAP_FAILED)
        it->arena = NULL;
    if (!it->hash || !it->page_hash || !it->arena) {
        log_error("cannot allocate the interpreter's block cache of %zu MiB", arena_size >> 20);
        return -ENOMEM;
    }
    it->arena_size = arena_size;
    it->scratch = calloc(1, sizeof(struct block) + 2 * sizeof(struct op));
    it->scratch_insn = calloc(1, sizeof(struct slow_insn));
    if (!it->scratch || !it->scratch_insn)
        return -ENOMEM;
    it->scratch->dead = true;           /* never linked to */
    return 0;
}

void block_cache_destroy(struct interp *it)
{
    free(it->hash);
    free(it->page_hash);
    free(it->scratch);
    free(it->scratch_insn);
    if (it->arena)
        munmap(it->arena, it->arena_size);
}

void *block_alloc(struct interp *it, size_t size)
{
    void *p = it->arena + it->arena_used;

    if (it->arena_reserve)
        return it->scratch_insn;
    it->arena_used += align_up(size, 16);
    return p;
}

/* More than any one block can need. */
static bool arena_low(const struct interp *it)
{
    return it->arena_size - it->arena_used <
           MAX_BLOCK_INSNS * (sizeof(struct op) + sizeof(struct slow_insn) + 32) + sizeof(struct block) + KIB(4);
}

/* ---- code pages ---- */

static struct code_page *code_page_find(struct interp *it, gpa_t gpa)
{
    struct code_page *p = it->page_hash[page_hash(gpa)];

    while (p && p->gpa != gpa)
        p = p->next_hash;
    return p;
}

static struct code_page *code_page_get(struct interp *it, gpa_t gpa, const uint8_t *host, _Atomic uint8_t *flags)
{
    struct code_page *p = code_page_find(it, gpa);

    if (p)
        return p;
    p = block_alloc(it, sizeof(*p));
    *p = (struct code_page){ .gpa = gpa, .next_hash = it->page_hash[page_hash(gpa)] };
    it->page_hash[page_hash(gpa)] = p;
    soft_page_becomes_code(&it->soft, gpa, host, flags);
    return p;
}

static void code_page_drop(struct interp *it, struct code_page *page)
{
    struct code_page **p = &it->page_hash[page_hash(page->gpa)];

    while (*p != page)
        p = &(*p)->next_hash;
    *p = page->next_hash;
    soft_page_code_dropped(&it->soft, page->gpa);
}

/* A block is in the list of its first page by next_page, in that of its second by next_page2. */
static struct block **next_in(const struct code_page *page, struct block *b)
{
    return page->gpa == (b->gpa & GUEST_PAGE_MASK) ? &b->next_page : &b->next_page2;
}

static uint64_t granules_of(gpa_t page, gpa_t gpa, unsigned len)
{
    uint64_t first = gpa < page ? 0 : (gpa - page) >> GRANULE_SHIFT;
    uint64_t last = MIN(gpa + len - 1 - page, (uint64_t)GUEST_PAGE_SIZE - 1) >> GRANULE_SHIFT;

    return (~0ull << first) & (~0ull >> (63 - last));
}

static void code_page_add(struct code_page *page, struct block *b, gpa_t gpa, unsigned len)
{
    *next_in(page, b) = page->blocks;
    page->blocks = b;
    page->granules |= granules_of(page->gpa, gpa, len);
}

void block_depends(struct interp *it, struct block *b, unsigned from, unsigned to)
{
    gpa_t gpa = b->gpa & GUEST_PAGE_MASK;
    struct code_page *page = code_page_find(it, gpa);

    if (b->seen_from == b->seen_to) {
        b->seen_from = (uint16_t)from;
        b->seen_to = (uint16_t)to;
    }
    b->seen_from = MIN(b->seen_from, (uint16_t)from);
    b->seen_to = MAX(b->seen_to, (uint16_t)to);
    if (page)
        page->granules |= granules_of(gpa, gpa + b->seen_from, b->seen_to - (unsigned)b->seen_from);
}

/* ---- dropping ---- */

static void unlink_from_page(struct interp *it, struct block *b, gpa_t gpa)
{
    struct code_page *page = code_page_find(it, gpa);
    struct block **p;

    if (!page)
        return;
    for (p = &page->blocks; *p; p = next_in(page, *p)) {
        if (*p == b) {
            *p = *next_in(page, b);
            break;
        }
    }
    /* Who was linked to it looks its target up again. */
    for (struct block *o = page->blocks; o; o = *next_in(page, o))
        for (unsigned i = 0; i < 2; i++)
            if (o->link[i] == b->op)
                o->link[i] = NULL;
    if (it->block_hooks)
        for (struct block *o = page->blocks; o; o = *next_in(page, o))
            it->block_hooks->unlink(o, b);
    if (!page->blocks)
        code_page_drop(it, page);
}

void block_kill(struct interp *it, struct block *b)
{
    struct jump_entry *e = &it->jump[jump_index(b->host)];
    struct block **p = &it->hash[block_hash(b->host)];

    if (b->dead)
        return;
    b->dead = true;
    while (*p != b)
        p = &(*p)->next_hash;
    *p = b->next_hash;
    if (e->op == b->op)
        *e = (struct jump_entry){ 0 };
    b->link[0] = b->link[1] = NULL;
    if (it->block_hooks)
        it->block_hooks->killed(it, b);
    for (unsigned i = 0; i < b->ops; i++)
        b->op[i].fn = op_leave;
    unlink_from_page(it, b, b->gpa & GUEST_PAGE_MASK);
    if (b->host2 && b->gpa2 != (b->gpa & GUEST_PAGE_MASK))
        unlink_from_page(it, b, b->gpa2);
}

static bool covers(const struct block *b, gpa_t page, gpa_t gpa, unsigned len)
{
    unsigned first = MIN((unsigned)b->bytes, GUEST_PAGE_SIZE - (unsigned)(b->gpa & (GUEST_PAGE_SIZE - 1)));

    if (page == (b->gpa & GUEST_PAGE_MASK) &&
        ((gpa < b->gpa + first && b->gpa < gpa + len) || (gpa < page + b->seen_to && page + b->seen_from < gpa + len)))
        return true;
    return b->host2 && page == b->gpa2 && gpa < b->gpa2 + b->second && b->gpa2 < gpa + len;
}

static bool invalidate_in_page(struct interp *it, gpa_t page_gpa, gpa_t gpa, unsigned len)
{
    struct code_page *page = code_page_find(it, page_gpa);
    bool any = false;

    if (!page || !(page->granules & granules_of(page_gpa, gpa, len)))
        return false;
    for (struct block *b = page->blocks, *next; b; b = next) {
        next = *next_in(page, b);
        if (covers(b, page_gpa, gpa, len)) {
            block_kill(it, b);  /* the page's record goes with its last block, then next is NULL */
            any = true;
        }
    }
    return any;
}

bool block_invalidate(struct interp *it, gpa_t gpa, unsigned len)
{
    gpa_t end = gpa + len;
    bool any = false;

    it->code_writes++;
    for (gpa_t page = gpa & GUEST_PAGE_MASK; page < end; page += GUEST_PAGE_SIZE) {
        gpa_t from = MAX(gpa, page), to = MIN(end, page + GUEST_PAGE_SIZE);

        any |= invalidate_in_page(it, page, from, (unsigned)(to - from));
    }
    return any;
}

void block_flush_all(struct interp *it)
{
    for (unsigned i = 0; i < PAGE_HASH_SIZE; i++)
        for (struct code_page *p = it->page_hash[i]; p; p = p->next_hash)
            soft_page_code_dropped(&it->soft, p->gpa);
    memset(it->hash, 0, HASH_SIZE * sizeof(*it->hash));
    memset(it->page_hash, 0, PAGE_HASH_SIZE * sizeof(*it->page_hash));
    memset(it->jump, 0, sizeof(it->jump));
    it->arena_used = 0;
    it->flush_wanted = false;
    it->block_flushes++;
    if (it->block_hooks)
        it->block_hooks->flushed(it);
}

/* ---- building ---- */

/* Ends a chain of handlers; s.rip is set already. */
static const struct op *op_exit(struct x86_cpu *cpu, const struct op *op) { return NULL; }
static struct block exit_block = { .dead = true, .op = { { .fn = op_exit } } };

bool block_linkable(const struct op *op) { return !container_of(op, struct block, op)->dead; }

static gpa_t host_to_gpa(struct memory *m, const uint8_t *host, _Atomic uint8_t **flags)
{
    for (unsigned i = 0; i < m->regions; i++) {
        struct memory_region *r = &m->region[i];

        if (host >= r->host && host < r->host + r->size) {
            *flags = &r->flags[(uint64_t)(host - r->host) >> GUEST_PAGE_SHIFT];
            return r->base + (uint64_t)(host - r->host);
        }
    }
    __builtin_unreachable();    /* executable TLB entries point into RAM only */
}

static uint8_t *page_start(const uint8_t *host) { return (uint8_t *)((uintptr_t)host & GUEST_PAGE_MASK); }

/*
 * Lowers the instruction in bytes[0…len) to *op, which has rip and n. One that cannot be decoded becomes an op that raises what
 * it should, and counts for as long as what was looked at: a change of any of it makes another instruction. Returns
 * x86_decode()'s result; *ends: the block ends with it.
 */
static int lower_bytes(struct interp *it, struct op *op, const uint8_t *bytes, unsigned len, bool *ends)
{
    struct x86_insn insn;
    bool gp = false;
    int err = x86_decode(&insn, bytes, len, it->cpu.code_size, &gp);

    *ends = true;
    if (err) {
        op->fn = gp ? op_too_long : op_undefined;
        op->len = (uint8_t)MIN(len, (unsigned)X86_MAX_INSN);
        return err;
    }
    op->len = insn.length;
    *ends = lower(it, op, &insn);
    return 0;
}

/* An op that is no instruction: goes on at rip. */
static struct op end_op(uint64_t rip, unsigned insns)
{
    return (struct op){ .fn = op_end, .rip = rip, .imm = rip, .n = (uint16_t)insns, .aux = BLOCK_SELF };
}

/* Makes the block and enters it everywhere. ops are copied; bytes: guest bytes that they cover. */
static const struct op *finish(struct interp *it, uint64_t rip, const uint8_t *host, const uint8_t *host2,
                               const struct op *ops, unsigned count, unsigned bytes)
{
    unsigned prologue = it->block_hooks ? 1 : 0;
    struct block *b = block_alloc(it, sizeof(*b) + (count + prologue) * sizeof(struct op));
    struct block **head = &it->hash[block_hash(host)];
    _Atomic uint8_t *flags;
    unsigned first = GUEST_PAGE_SIZE - (unsigned)((uintptr_t)host & (GUEST_PAGE_SIZE - 1));

    *b = (struct block){ .origin = block_origin(&it->cpu), .host = host, .host2 = host2, .bytes = (uint16_t)bytes,
                         .ops = (uint16_t)(count + prologue),
                         .mode = (uint8_t)interp_mode(&it->cpu), .next_hash = *head };
    b->gpa = host_to_gpa(it->cpu.mem, host, &flags);
    if (prologue)
        b->op[0] = (struct op){ .fn = it->block_hooks->prologue, .rip = rip, .aux = b };
    memcpy(b->op + prologue, ops, count * sizeof(*ops));
    for (unsigned i = prologue; i < b->ops; i++)
        if (b->op[i].aux == BLOCK_SELF)
            b->op[i].aux = b;
    *head = b;
    code_page_add(code_page_get(it, b->gpa & GUEST_PAGE_MASK, page_start(host), flags), b, b->gpa, MIN(bytes, first));
    if (host2) {
        b->gpa2 = host_to_gpa(it->cpu.mem, host2, &flags);
        b->second = (uint16_t)(bytes - first);
        if (b->gpa2 != (b->gpa & GUEST_PAGE_MASK))
            code_page_add(code_page_get(it, b->gpa2, host2, flags), b, b->gpa2, bytes - first);
    }
    it->blocks_decoded++;
    return b->op;
}

bool block_extends(struct interp *it, struct block *b, const struct block *crossing)
{
    _Atomic uint8_t *flags;

    if (b->host2 == crossing->host2)
        return true;
    if (b->host2 || crossing->gpa2 == (b->gpa & GUEST_PAGE_MASK))
        return false;
    host_to_gpa(it->cpu.mem, crossing->host2, &flags);
    b->host2 = crossing->host2;
    b->gpa2 = crossing->gpa2;
    b->second = crossing->second;
    code_page_add(code_page_get(it, b->gpa2, b->host2, flags), b, b->gpa2, b->second);
    return true;
}

unsigned block_fetch(const struct block *b, unsigned offset, uint8_t bytes[X86_MAX_INSN])
{
    const uint8_t *page = (const uint8_t *)((uintptr_t)b->host & GUEST_PAGE_MASK);
    unsigned first = MIN(GUEST_PAGE_SIZE - offset, X86_MAX_INSN);
    unsigned second = b->host2 ? MIN((unsigned)b->second, X86_MAX_INSN - first) : 0;

    memcpy(bytes, page + offset, first);
    if (second)
        memcpy(bytes + first, b->host2, second);
    return first + second;
}

/* One instruction in the scratch block, not entered anywhere: for single steps and for code outside RAM. */
static const struct op *build_scratch(struct interp *it, uint64_t rip, const uint8_t *bytes, unsigned len)
{
    struct block *b = it->scratch;
    bool ends;

    b->op[0] = (struct op){ .rip = rip };
    it->arena_reserve = true;           /* lower() takes its memory from beside the arena */
    lower_bytes(it, &b->op[0], bytes, len, &ends);
    it->arena_reserve = false;
    b->op[1] = end_op(rip + b->op[0].len, 1);
    b->op[1].fn = op_leave;
    for (unsigned i = 0; i < 2; i++)
        if (b->op[i].aux == BLOCK_SELF)
            b->op[i].aux = b;
    return b->op;
}

/* All bytes of the instruction at rip that can be fetched; when they stop short of what it needs, the fault of the second page. */
static unsigned fetch_whole(struct x86_cpu *cpu, gva_t va, uint8_t bytes[X86_MAX_INSN])
{
    unsigned n = x86_fetch(cpu, va, bytes);
    struct x86_insn insn;
    bool gp;

    if (n < X86_MAX_INSN && x86_decode(&insn, bytes, n, cpu->code_size, &gp) == -EAGAIN) {
        uint8_t more[X86_MAX_INSN];
        unsigned m = x86_fetch(cpu, va + n, more);

        memcpy(bytes + n, more, MIN(m, X86_MAX_INSN - n));
        n = MIN(n + m, X86_MAX_INSN);
    }
    return n;
}

/* The first instruction at rip reaches into the next page, room bytes away. */
static const struct op *build_crossing(struct interp *it, uint64_t rip, const uint8_t *host, unsigned room)
{
    struct x86_cpu *cpu = &it->cpu;
    gva_t va = cpu->code_base + cpu->code_page + rip;
    uint8_t bytes[X86_MAX_INSN];
    unsigned n = fetch_whole(cpu, va, bytes), count = 0;
    const uint8_t *second = tlb_lookup(cpu->tlb_fetch, (va & GUEST_PAGE_MASK) + GUEST_PAGE_SIZE, 1, TLB_EXEC);
    _Atomic uint8_t *flags;
    struct op ops[3];
    bool ends;

    if (n > room && !second)
        return build_scratch(it, rip, bytes, n);
    if (n > room) {
        /* Declare the page code before taking its bytes for good. */
        gpa_t gpa2 = host_to_gpa(cpu->mem, second, &flags);

        code_page_get(it, gpa2, second, flags);
        memcpy(bytes + room, second, n - room);
    }
    ops[count++] = (struct op){ .fn = op_cross_check, .rip = rip, .aux = BLOCK_SELF };
    ops[count] = (struct op){ .rip = rip };
    lower_bytes(it, &ops[count], bytes, n, &ends);
    count++;
    if (n <= room)                              /* undecodable before the page's end */
        return finish(it, rip, host, NULL, ops + 1, 1, n);
    if (!ends)
        ops[count++] = end_op(rip + ops[1].len, 1);
    return finish(it, rip, host, second, ops, count, ops[1].len);
}

static const struct op *build(struct interp *it, uint64_t rip, const uint8_t *host)
{
    struct x86_cpu *cpu = &it->cpu;
    unsigned room = GUEST_PAGE_SIZE - (unsigned)rip;
    struct op ops[MAX_BLOCK_INSNS + 1];
    unsigned insns = 0, offset = 0;
    _Atomic uint8_t *flags;
    gpa_t gpa = host_to_gpa(cpu->mem, host, &flags);
    bool ends = false;

    /* From here on the page's bytes do not change unseen. */
    code_page_get(it, gpa & GUEST_PAGE_MASK, page_start(host), flags);
    while (!ends && insns < MAX_BLOCK_INSNS && offset < room) {
        struct op *op = &ops[insns];
        unsigned len = MIN(room - offset, X86_MAX_INSN);

        *op = (struct op){ .rip = rip + offset, .n = (uint16_t)insns };
        if (lower_bytes(it, op, host + offset, len, &ends) && len < X86_MAX_INSN) {
            if (insns == 0)
                return build_crossing(it, rip, host, room);
            ends = false;
            break;
        }
        offset += op->len;
        insns++;
    }
    if (ends)
        return finish(it, rip, host, NULL, ops, insns, offset);
    ops[insns] = end_op(rip + offset, insns);
    return finish(it, rip, host, NULL, ops, insns + 1, offset);
}

const struct op *block_find_slow(struct x86_cpu *cpu, uint64_t rip)
{
    struct interp *it = interp_of(cpu);
    gva_t va = cpu->code_base + rip;
    unsigned offset = va & (GUEST_PAGE_SIZE - 1);
    const uint8_t *host = tlb_lookup(cpu->tlb_fetch, va, 1, TLB_EXEC);
    const struct op *op;
    const struct block *b;

    cpu->code_page = rip - offset;
    if (!host) {
        host = x86_fetch_pointer(cpu, va);
        if (!host) {
            uint8_t bytes[X86_MAX_INSN];
            unsigned n = fetch_whole(cpu, va, bytes);

            return build_scratch(it, offset, bytes, n);
        }
    }
    b = block_lookup(cpu, host);
    if (b) {
        op = b->op;
    } else {
        if (arena_low(it)) {
            it->flush_wanted = true;
            return exit_block.op;
        }
        op = build(it, offset, host);
        if (op == it->scratch->op)
            return op;
    }
    it->jump[jump_index(host)] = (struct jump_entry){ block_origin(cpu), host, op, interp_mode(cpu) };
    return op;
}

const struct op *block_step(struct x86_cpu *cpu)
{
    gva_t va = cpu->code_base + cpu->s.rip;
    unsigned offset = va & (GUEST_PAGE_SIZE - 1);
    uint8_t bytes[X86_MAX_INSN];
    unsigned n = fetch_whole(cpu, va, bytes);

    cpu->code_page = cpu->s.rip - offset;
    return build_scratch(interp_of(cpu), offset, bytes, n);
}
