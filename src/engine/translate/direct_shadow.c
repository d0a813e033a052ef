/*
 * What a sandbox is shown of the guest's memory: a shadow of the page tables of user code, as another TLB would hold it.
 *
 * Rules: docs/direct.md. In the vCPU's thread, except direct_writes_dropped(), which takes from whoever may change the vCPU's TLB.
 */
#include <stdlib.h>
#include <x86intrin.h>

#include "engine/translate/direct_internal.h"
#include "isa/x86/mmu.h"

#define PAGES 60000u            /* the kernel gives a process some 65,000 mappings */
#define PAGES_MIN 8192u         /* with less it does not pay to begin again and again */
#define HASH_BITS 17
#define AROUND 16u              /* pages that are looked at around one that is touched, */
#define AROUND_LARGE 128u       /* …if that is part of a large one */

bool direct_make_tables(struct direct_space *s)
{
    s->page = calloc(PAGES, sizeof(*s->page));
    s->hash = calloc(1u << HASH_BITS, sizeof(*s->hash));
    if (s->page && s->hash)
        return true;
    free(s->page);
    free(s->hash);
    s->page = NULL;
    s->hash = NULL;
    return false;
}

static unsigned hash_of(gva_t page) { return (unsigned)((page >> GUEST_PAGE_SHIFT) * 0x9e3779b97f4a7c15ull >> (64 - HASH_BITS)); }

struct direct_page *direct_page(struct direct_space *s, gva_t page, bool make)
{
    unsigned h = hash_of(page);

    for (; s->hash[h]; h = (h + 1) & ((1u << HASH_BITS) - 1))
        if ((s->page[s->hash[h] - 1].va & GUEST_PAGE_MASK) == page)
            return &s->page[s->hash[h] - 1];
    if (!make)
        return NULL;
    s->page[s->pages] = (struct direct_page){ .va = page };
    s->hash[h] = (uint16_t)++s->pages;
    return &s->page[s->pages - 1];
}

void direct_forget(struct direct_space *s)
{
    if (s->cpuid_stops)
        sandbox_stop_at_cpuid(s->box, false);
    s->cpuid_stops = s->lingers = false;
    s->switch_cost = 0;
    memset(s->hash, 0, sizeof(*s->hash) << HASH_BITS);
    s->pages = s->pendings = s->drops = 0;
    s->large = s->huge = s->stale = false;
    sandbox_clear(s->box);
}

void direct_forget_all(struct direct *d, struct direct_space *s)
{
    bool few = s->pages < PAGES_MIN;

    direct_forget(s);
    if (few)
        direct_demote(d, s, __rdtsc(), DIRECT_BACKOFF_MAX);
}

/* ---- code ---- */

/*
 * Instructions that would do something else in a sandbox than in the guest, without stopping it: they show the host's tables, its
 * processor's number and features, or what it has more than the guest. Or they stop it, but what they had in registers is lost then:
 * RIP and RSP, the upper half of RAX.
 */
static bool runs_wrongly(const struct direct *d, const struct direct_space *s, const struct x86_insn *insn)
{
    switch (insn->mnemonic) {
    case ZYDIS_MNEMONIC_CPUID:
        return !s->cpuid_stops;
    case ZYDIS_MNEMONIC_RDPID: case ZYDIS_MNEMONIC_LSL: case ZYDIS_MNEMONIC_LAR: case ZYDIS_MNEMONIC_VERR:
    case ZYDIS_MNEMONIC_VERW: case ZYDIS_MNEMONIC_SGDT: case ZYDIS_MNEMONIC_SIDT: case ZYDIS_MNEMONIC_SLDT: case ZYDIS_MNEMONIC_STR: case ZYDIS_MNEMONIC_SMSW:
    case ZYDIS_MNEMONIC_SYSENTER: case ZYDIS_MNEMONIC_INT:
        return true;
    case ZYDIS_MNEMONIC_RDFSBASE: case ZYDIS_MNEMONIC_RDGSBASE: case ZYDIS_MNEMONIC_WRFSBASE: case ZYDIS_MNEMONIC_WRGSBASE:
        return !(d->t->it.cpu.s.cr4 & CR4_FSGSBASE);
    case ZYDIS_MNEMONIC_XGETBV:
    case ZYDIS_MNEMONIC_XSAVE: case ZYDIS_MNEMONIC_XSAVE64: case ZYDIS_MNEMONIC_XSAVEC: case ZYDIS_MNEMONIC_XSAVEC64:
    case ZYDIS_MNEMONIC_XSAVEOPT: case ZYDIS_MNEMONIC_XSAVEOPT64: case ZYDIS_MNEMONIC_XRSTOR: case ZYDIS_MNEMONIC_XRSTOR64:
        return !d->same_components;
    default:
        return false;
    }
}

/* Whether an opcode of theirs may begin here; state: XGETBV, XSAVE and those for FS and GS are among them. */
static bool suspicious(const uint8_t *p, bool state)
{
    unsigned reg = p[2] >> 3 & 7;

    if (likely(p[0] != 0x0f))
        return p[0] == 0xcd && p[1] == 0x80;
    switch (p[1]) {
    case 0x00:                              /* SLDT, STR, VERR, VERW */
        return reg < 2 || reg == 4 || reg == 5;
    case 0x01:                              /* SGDT, SIDT, SMSW; XGETBV */
        return p[2] < 0xc0 ? reg < 2 || reg == 4 : reg == 4 || (state && p[2] == 0xd0);
    case 0x02: case 0x03: case 0x34: case 0xa2:
        return true;
    case 0xae:
        return state;
    case 0xc7:
        return state || p[2] >= 0xf8;       /* RDPID */
    default:
        return false;
    }
}

/*
 * Decoding that starts so many bytes before an instruction comes to its beginning, almost whatever the first byte was; and what it says of
 * fewer bytes is worth nothing.
 */
#define SYNC 64u
#define SYNC_MIN 24u

/*
 * Whether one of those instructions is in the page. Not seen are those that begin it or cross its end, code that is
 * written later, and code that is jumped into askew: what they show then is the host's.
 */
static bool search_page(const struct direct *d, const struct direct_space *s, const uint8_t *bytes)
{
    unsigned at = 0, began = 0; /* an instruction begins at the first, found by decoding from the second on */

    const bool state = !d->same_components || !(d->t->it.cpu.s.cr4 & CR4_FSGSBASE);

    for (unsigned i = SYNC_MIN; i < GUEST_PAGE_SIZE - 2; i++) {
        if (likely(!suspicious(bytes + i, state)))
            continue;
        if (i > at + SYNC)
            at = began = i - SYNC;
        while (at <= i) {
            struct x86_insn insn;
            bool gp;

            if (x86_decode(&insn, bytes + at, MIN(GUEST_PAGE_SIZE - at, X86_MAX_INSN), 8, &gp) < 0) {
                began = ++at;
                continue;
            }
            if (at + insn.length > i && i - began >= SYNC_MIN && runs_wrongly(d, s, &insn))
                return true;
            at += insn.length;
        }
    }
    return false;
}

static uint64_t fold(uint64_t a, uint64_t b)
{
    unsigned __int128 product = (unsigned __int128)a * b;

    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

/* Of a page's bytes. Which pages look alike depends on the secret: a guest that does not know it cannot tell. */
static uint64_t content(const struct direct *d, const uint8_t *bytes)
{
    uint64_t lane[2] = { d->secret[0], d->secret[1] }, word[4];

    for (unsigned i = 0; i < GUEST_PAGE_SIZE; i += sizeof(word)) {
        memcpy(word, bytes + i, sizeof(word));
        lane[0] = fold(word[0] ^ d->secret[2], word[1] ^ lane[0]);
        lane[1] = fold(word[2] ^ d->secret[3], word[3] ^ lane[1]);
    }
    return fold(lane[0] ^ d->secret[2], lane[1] ^ d->secret[3]);
}

/* Programs share most of their code, so what was found is remembered. */
static bool page_runs_wrongly(struct direct *d, const struct direct_space *s, const uint8_t *bytes)
{
    unsigned kind = s->cpuid_stops | (d->t->it.cpu.s.cr4 & CR4_FSGSBASE ? 2u : 0);
    uint64_t key = (content(d, bytes) & ~7ull) | kind << 1, *known = &d->searched[key >> 32 & (DIRECT_SEARCHED - 1)];

    if ((*known & ~1ull) != key)
        *known = key | search_page(d, s, bytes);
    return *known & 1;
}

/* ---- the shadow ---- */

/* Whether writes to the page may pass unseen; if so others know it (memory.h). */
static bool may_write(const struct memory *m, _Atomic uint8_t *flags)
{
    uint8_t f = atomic_load(flags);

    if ((f & (PAGE_CODE | PAGE_SAVE)) || (!(f & PAGE_DIRTY) && atomic_load(&m->dirty_logging)))
        return false;
    if (!(f & PAGE_WRITABLE))
        f = atomic_fetch_or(flags, PAGE_WRITABLE);
    return !(f & PAGE_CODE);
}

/*
 * What may be mapped at va without the guest's noticing: what its page tables allow with accessed and dirty bits as they are.
 * known: what is mapped there now, or NULL.
 */
static struct direct_page look_up(struct direct *d, struct direct_space *s, gva_t va, const struct direct_page *known)
{
    struct x86_cpu *cpu = direct_cpu(d);
    struct direct_page p = { .va = va & GUEST_PAGE_MASK };
    struct memory_region *r;
    struct x86_ready ready;
    uint64_t offset;

    if (va < SANDBOX_BEGIN || va >= SANDBOX_END || !x86_walk_ready(cpu, va, &ready))
        return p;
    r = memory_find(cpu->mem, ready.gpa);
    if (!r || r->fd < 0 || (ready.gpa & GUEST_PAGE_MASK) == cpu->apic_base)
        return p;
    offset = (ready.gpa & GUEST_PAGE_MASK) - r->base;
    p.place = offset | (uint64_t)(r - cpu->mem->region);
    p.va |= CAN_READ | (ready.page_size == GUEST_PAGE_SIZE ? 0 : ready.page_size == GIB(1) ? HUGE : LARGE);
    /* Also if nothing else of it has changed: how it is flushed has. */
    s->large |= (p.va & LARGE) != 0;
    s->huge |= (p.va & HUGE) != 0;
    if (ready.writable && may_write(cpu->mem, &r->flags[offset >> GUEST_PAGE_SHIFT]))
        p.va |= CAN_WRITE;
    if (ready.executable &&
        ((known && known->place == p.place && (known->va & CAN_EXECUTE)) || !page_runs_wrongly(d, s, r->host + offset)))
        p.va |= CAN_EXECUTE;
    return p;
}

/* Brings the sandbox to what was looked up. False: that cannot be. */
static bool show(struct direct *d, struct direct_space *s, struct direct_page *e, const struct direct_page *p)
{
    bool done;

    if (!(p->va & CANS))
        done = sandbox_unmap(s->box, p->va & GUEST_PAGE_MASK, GUEST_PAGE_SIZE);
    else
        done = sandbox_map(s->box, p->va & GUEST_PAGE_MASK, GUEST_PAGE_SIZE, (unsigned)(p->place & ~GUEST_PAGE_MASK),
                           p->place & GUEST_PAGE_MASK, (int)(p->va & CANS));
    if (!done)
        return false;
    d->mapped++;
    *e = *p;
    return true;
}

/* A page that is mapped may not be as the guest has it any more. What it may do in addition, it gets when it asks. */
static void check_page(struct direct *d, struct direct_space *s, struct direct_page *e)
{
    struct direct_page p;

    if (!(e->va & CANS))
        return;
    p = look_up(d, s, e->va & GUEST_PAGE_MASK, e);
    if (p.place != e->place || (e->va & CANS & ~p.va))
        show(d, s, e, &p);
}

/* Whether writes to the page are to be seen again. */
static bool is_dropped(const struct direct_space *s, const struct direct_page *e)
{
    if (s->drops > DIRECT_PENDING)
        return true;
    for (unsigned i = 0; i < s->drops; i++)
        if (s->dropped[i] == e->place)
            return true;
    return false;
}

void direct_catch_up(struct direct *d, struct direct_space *s)
{
    uint64_t root = direct_root(d);

    if (s->root != root || s->pages + 2 * AROUND_LARGE > PAGES) {
        direct_forget(s);
        s->root = root;
        return;
    }
    for (unsigned i = 0; s->stale && i < s->pages; i++)
        check_page(d, s, &s->page[i]);
    for (unsigned i = 0; !s->stale && i < s->pendings; i++) {
        gva_t size = s->large ? MIB(2) : GUEST_PAGE_SIZE, first = align_down(s->pending[i], size);

        for (gva_t at = first; at < first + size; at += GUEST_PAGE_SIZE) {
            struct direct_page *e = direct_page(s, at, false);

            if (e)
                check_page(d, s, e);
        }
    }
    if (s->drops && !s->stale)
        for (unsigned i = 0; i < s->pages; i++)
            if ((s->page[i].va & CAN_WRITE) && is_dropped(s, &s->page[i]))
                check_page(d, s, &s->page[i]);
    s->stale = false;
    s->pendings = s->drops = 0;
}

bool direct_grant(struct direct *d, struct direct_space *s, gva_t va)
{
    const gva_t page = va & GUEST_PAGE_MASK;
    struct direct_page p = look_up(d, s, page, direct_page(s, page, false));
    gva_t size = (gva_t)(p.va & (LARGE | HUGE) ? AROUND_LARGE : AROUND) * GUEST_PAGE_SIZE, first = align_down(va, size);
    bool granted = false;

    if (!(p.va & CANS) || s->pages + AROUND_LARGE > PAGES)      /* the next direct_catch_up() makes room */
        return false;
    for (gva_t at = first; at < first + size; at += GUEST_PAGE_SIZE) {
        struct direct_page *e = direct_page(s, at, false);

        p = look_up(d, s, at, e);
        if (!(p.va & CANS) || (e && e->place == p.place && !(p.va & CANS & ~e->va)))
            continue;
        if (!e)
            e = direct_page(s, at, true);
        if (show(d, s, e, &p) && at == page)
            granted = true;
    }
    return granted;
}

bool direct_runs_wrongly_at(struct direct *d, struct direct_space *s, gva_t address)
{
    const struct direct_page *e = direct_page(s, address & GUEST_PAGE_MASK, false);
    struct x86_ready ready;

    return sandbox_regs(s->box)->rip == address && e && (e->va & CANS) && !(e->va & CAN_EXECUTE) &&
           x86_walk_ready(direct_cpu(d), address, &ready) && ready.executable;
}

void direct_flushed(struct translator *t, const struct x86_tlb_space *space, gva_t va, bool all)
{
    struct direct_space *s;

    if (!t->direct)
        return;
    s = &t->direct->space[space - t->it.cpu.tlbs->space];
    /* INVLPG for one address drops all of a large page. */
    va = align_down(va, s->large ? MIB(2) : GUEST_PAGE_SIZE);
    if (s->stale || !s->pages || (!all && s->pendings && s->pending[s->pendings - 1] == va))
        return;
    if (all || s->huge || s->pendings == DIRECT_PENDING)
        s->stale = true;
    else
        s->pending[s->pendings++] = va;
}

/* The place of a page of our view of guest RAM; false: it is none. */
static bool place_of(const struct memory *m, const void *host_page, uint64_t *place)
{
    for (unsigned i = 0; i < m->regions; i++) {
        uint64_t offset = (uintptr_t)host_page - (uintptr_t)m->region[i].host;

        if (offset < m->region[i].size) {
            *place = offset | i;
            return true;
        }
    }
    return false;
}

void direct_writes_dropped(struct translator *t, const void *host_page)
{
    uint64_t place;

    if (!t->direct)
        return;
    for (unsigned i = 0; i < X86_TLB_SPACES; i++) {
        struct direct_space *s = &t->direct->space[i];

        if (!s->pages)
            continue;
        if (s->drops < DIRECT_PENDING && host_page && place_of(t->it.cpu.mem, host_page, &place))
            s->dropped[s->drops++] = place;
        else
            s->drops = DIRECT_PENDING + 1;
    }
}
