/*
 * What has to be equal, and how differences and cases are shown.
 *
 * What is not compared, and why:
 *   - RFLAGS: IF, IOPL, ID and VIP/VIF are the system's. RF in the frame of a fault says how the processor got there.
 *   - The P bit of a page fault at a supervisor address: Linux sets it always, so that programs learn nothing.
 *   - x87 error pointers without a pending exception: AMD's processors do not let the kernel see them, and FNSTENV shows
 *     them until the next context switch.
 *   - MXCSR_MASK in stored images: bit 17 of an AMD host's says that it has MXCSR.MM, which no model offers.
 */
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/util.h"
#include "diff.h"
#include "isa/x86/insn.h"

#define FLAGS_COMPARED (RFLAGS_ARITH | RFLAGS_DF | RFLAGS_TF | RFLAGS_NT | RFLAGS_AC)
#define USER_END 0x7ffffffff000ull
#define VECTOR_DB 1
#define VECTOR_BP 3
#define VECTOR_UD 6
#define VECTOR_GP 13
#define VECTOR_PF 14
#define FSW_ES 0x80u
#define POINTER_MASK 0xffffffffffffull    /* how many bits above are kept depends on what the host has beside 48 */

static const char *const gpr_name[16] = { "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
                                          "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15" };

struct report {
    char *text;
    size_t size, used;
    bool equal;
};

static void differ(struct report *r, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void differ(struct report *r, const char *format, ...)
{
    va_list args;
    int n;

    r->equal = false;
    if (!r->text || r->used >= r->size)
        return;
    va_start(args, format);
    n = vsnprintf(r->text + r->used, r->size - r->used, format, args);
    va_end(args);
    r->used += n > 0 ? (size_t)n : 0;
}

static void number(struct report *r, const char *name, uint64_t host, uint64_t guest)
{
    if (host != guest)
        differ(r, "  %-8s host %016" PRIx64 " engine %016" PRIx64 "\n", name, host, guest);
}

static void hex(char *out, const uint8_t *bytes, unsigned n)
{
    for (unsigned i = 0; i < n; i++)        /* as a number: the highest byte first */
        sprintf(out + 2 * i, "%02x", bytes[n - 1 - i]);
}

static void bytes(struct report *r, const char *name, unsigned index, const uint8_t *host, const uint8_t *guest, unsigned n)
{
    char h[2 * 64 + 1], g[2 * 64 + 1];

    if (memcmp(host, guest, n) == 0)
        return;
    hex(h, host, n);
    hex(g, guest, n);
    differ(r, "  %s%-5u host   %s\n  %s%-5u engine %s\n", name, index, h, name, index, g);
}

static void compare_fpu(struct report *r, const struct x86_fpu *host, const struct x86_fpu *guest)
{
    if (memcmp(host->zmm, guest->zmm, sizeof(host->zmm)))
        for (unsigned i = 0; i < 32; i++)
            bytes(r, "zmm", i, host->zmm[i], guest->zmm[i], 64);
    for (unsigned i = 0; i < 8; i++) {
        bytes(r, "k", i, (const uint8_t *)&host->k[i], (const uint8_t *)&guest->k[i], 8);
        bytes(r, "st", i, host->st[i], guest->st[i], 10);
    }
    number(r, "fcw", host->fcw, guest->fcw);
    number(r, "fsw", host->fsw, guest->fsw);
    number(r, "ftw", host->ftw, guest->ftw);
    if (host->fsw & guest->fsw & FSW_ES) {
        number(r, "fop", host->fop, guest->fop);
        number(r, "fip", host->fip & POINTER_MASK, guest->fip & POINTER_MASK);
        number(r, "fdp", host->fdp & POINTER_MASK, guest->fdp & POINTER_MASK);
    }
    number(r, "mxcsr", host->mxcsr, guest->mxcsr);
}

static const char *end_name(unsigned end)
{
    static const char *const name[] = { "fault", "timeout", "system call", "crash" };
    return name[end];
}

/* Equal but for MXCSR_MASK, wherever it was copied to. */
static bool same_line(const uint8_t *host, const uint8_t *guest)
{
    for (unsigned i = 0; i < LINE; i++)
        if (host[i] != guest[i] && !(host[i] == 2 && guest[i] == 0 && (i < 1 || host[i - 1] == 0xff) && (i < 2 || host[i - 2] == 0xff)))
            return false;
    return true;
}

static void compare_data(struct report *r, const struct cpu_result *host, const struct cpu_result *guest)
{
    for (unsigned i = 0; i < DATA_LINES; i++) {
        bool h = host->changed[i / 64] >> (i % 64) & 1, g = guest->changed[i / 64] >> (i % 64) & 1;

        if (h && g && !same_line(host->line[i], guest->line[i]))
            bytes(r, "data ", i * LINE, host->line[i], guest->line[i], LINE);
        if (h != g)
            differ(r, "  data %u changed only on the %s\n", i * LINE, h ? "host" : "engine");
    }
}

/* ---- what is known to be different ---- */

static bool canonical(uint64_t va) { return (uint64_t)((int64_t)(va << 16) >> 16) == va; }

static int64_t sign_extended(uint64_t v, unsigned size)
{
    return size == 8 ? (int64_t)v : size == 4 ? (int32_t)v : (int16_t)v;
}

/*
 * AMD's processors also want the offset inside FS and GS to be canonical, before the base is added. The engines check what the
 * architecture says, the linear address.
 */
static bool offset_not_canonical(const struct cpu_case *c, const struct cpu_result *host)
{
    const struct cpu_view *v = &host->out;
    struct x86_insn insn;
    uint64_t at = v->rip - CODE_BASE - c->start, offset;
    unsigned size = 1;
    bool gp;

    if (host->vector != VECTOR_GP || c->code_size != 8 || at >= c->bytes)
        return false;
    if (x86_decode(&insn, c->code + at, c->bytes - (unsigned)at, 8, &gp) || insn.mem.seg < SEG_FS || insn.mem.addr_size != 8)
        return false;
    offset = (uint64_t)insn.mem.disp;
    if (insn.mem.base == X86_REG_RIP)
        offset += v->rip + insn.length;
    else if (insn.mem.base < 16)
        offset += v->gpr[insn.mem.base];
    if (insn.mem.index < 16 && !insn.mem.vsib_size)
        offset += v->gpr[insn.mem.index] * insn.mem.scale;
    for (unsigned i = 0; i < insn.operands; i++)
        if (insn.operand[i].kind == OPERAND_MEM && insn.operand[i].size)
            size = insn.operand[i].size;
    switch (insn.mnemonic) {    /* a bit offset counts */
    case ZYDIS_MNEMONIC_BT: case ZYDIS_MNEMONIC_BTS: case ZYDIS_MNEMONIC_BTR: case ZYDIS_MNEMONIC_BTC:
        if (insn.operand[1].kind == OPERAND_GPR)
            offset += (uint64_t)(sign_extended(v->gpr[insn.operand[1].reg], size) >> 3) & -(uint64_t)size;
    }
    return !canonical(offset) || !canonical(offset + size - 1);
}

/* Where the mapped code ends, what comes first: that the bytes so far are no instruction, or that there are no more. */
static bool undefined_at_end(const struct cpu_result *host, const struct cpu_result *guest)
{
    const struct cpu_result *fetch = host->vector == VECTOR_UD ? guest : host;

    if (host->out.rip != guest->out.rip || CODE_BASE + CODE_SIZE - host->out.rip > X86_MAX_INSN)
        return false;
    return (host->vector == VECTOR_UD || guest->vector == VECTOR_UD) && fetch->vector == VECTOR_PF &&
           fetch->cr2 == CODE_BASE + CODE_SIZE;
}

static bool decode_at(const struct cpu_case *c, uint64_t rip, struct x86_insn *insn)
{
    uint64_t at = rip - CODE_BASE - c->start;
    bool gp;

    return at < c->bytes && x86_decode(insn, c->code + at, c->bytes - (unsigned)at, c->code_size, &gp) == 0;
}

static bool stores_state(uint16_t mnemonic)
{
    switch (mnemonic) {
    case ZYDIS_MNEMONIC_XSAVE: case ZYDIS_MNEMONIC_XSAVE64: case ZYDIS_MNEMONIC_XSAVEOPT: case ZYDIS_MNEMONIC_XSAVEOPT64:
    case ZYDIS_MNEMONIC_XSAVEC: case ZYDIS_MNEMONIC_XSAVEC64:
        return true;
    default:
        return false;
    }
}

static bool made_of_parts(uint16_t mnemonic)
{
    switch (mnemonic) {
    case ZYDIS_MNEMONIC_FNSAVE: case ZYDIS_MNEMONIC_FRSTOR: case ZYDIS_MNEMONIC_FNSTENV: case ZYDIS_MNEMONIC_FLDENV:
    case ZYDIS_MNEMONIC_FXSAVE: case ZYDIS_MNEMONIC_FXRSTOR: case ZYDIS_MNEMONIC_FXSAVE64: case ZYDIS_MNEMONIC_FXRSTOR64:
    case ZYDIS_MNEMONIC_FBLD: case ZYDIS_MNEMONIC_FBSTP: case ZYDIS_MNEMONIC_FLD: case ZYDIS_MNEMONIC_FSTP:
    case ZYDIS_MNEMONIC_XRSTOR: case ZYDIS_MNEMONIC_XRSTOR64:
    case ZYDIS_MNEMONIC_MASKMOVQ: case ZYDIS_MNEMONIC_MASKMOVDQU: case ZYDIS_MNEMONIC_VMASKMOVDQU:
        return true;
    default:
        return stores_state(mnemonic);
    }
}

/* On AMD the parts of x87 operands and of state images wrap with 32 and 16-bit addresses; other accesses do not. */
static bool image_wraps(const struct cpu_case *c, const struct cpu_result *host)
{
    const uint64_t *gpr = host->out.gpr;
    struct x86_insn insn;
    uint64_t at;

    if (!decode_at(c, host->out.rip, &insn) || insn.addr_size == 8 || !made_of_parts(insn.mnemonic))
        return false;
    at = (uint64_t)insn.mem.disp + (insn.mem.base == X86_REG_RIP ? host->out.rip + insn.length : 0) +
         (insn.mem.base < 16 ? gpr[insn.mem.base] : 0) + (insn.mem.index < 16 ? gpr[insn.mem.index] * insn.mem.scale : 0);
    return insn.addr_size == 4 ? (uint32_t)at > 0xfffff000u - 4096 : (uint16_t)at > 0xf000;
}

/* Of an image that is misaligned, beyond its segment's limit and in no memory at once, which comes first. */
static bool image_beyond_limit(const struct cpu_case *c, const struct cpu_result *host, const struct cpu_result *guest)
{
    struct x86_insn insn;

    return c->code_size == 2 && host->out.rip == guest->out.rip && host->vector != guest->vector &&
           decode_at(c, host->out.rip, &insn) && made_of_parts(insn.mnemonic);
}

/* MXCSR.MM, which no model offers. */
static bool misaligned_mode(const struct cpu_result *host, const struct cpu_result *guest)
{
    return host->out.fpu.mxcsr & 0x20000 && guest->vector == VECTOR_GP;
}

/* Single steps of a gather or scatter: the trap comes between elements if a later one would fault. */
static bool gather_steps(const struct cpu_case *c, const struct cpu_result *host)
{
    struct x86_insn insn;

    return host->vector == VECTOR_DB && decode_at(c, host->out.rip, &insn) && insn.mem.vsib_size;
}

/*
 * Which components are in use the processor finds out in its own way: registers that were written with zeros may count. A case
 * starts with exactly the used ones in use, except in a sandbox: there MXCSR alone makes its component so. And what is stored here as MXCSR_MASK may be read again.
 */
static bool stored_state(const struct cpu_case *c)
{
    for (unsigned i = 0; i < c->insns; i++) {
        uint16_t m = c->insn[i].mnemonic;

        if (stores_state(m) && (c->insns > 1 || compare_direct))
            return true;
        if ((m == ZYDIS_MNEMONIC_FXSAVE || m == ZYDIS_MNEMONIC_FXSAVE64) && i + 1u < c->insns)
            return true;
    }
    return false;
}

/* x87 error pointers that an image brought, stored again: how many bits a processor keeps depends on how wide its addresses are. */
static bool wide_pointers(const struct cpu_case *c)
{
    bool loaded = false;

    for (unsigned i = 0; i < c->insns; i++)
        switch (c->insn[i].mnemonic) {
        case ZYDIS_MNEMONIC_FXRSTOR64: case ZYDIS_MNEMONIC_XRSTOR64:
            loaded = true;
            break;
        case ZYDIS_MNEMONIC_FXSAVE64: case ZYDIS_MNEMONIC_XSAVE64: case ZYDIS_MNEMONIC_XSAVEOPT64: case ZYDIS_MNEMONIC_XSAVEC64:
            if (loaded)
                return true;
        }
    return false;
}

/*
 * Undefined, but AMD's processors do them: VPERMQ and VPERMPD with VEX.W 0; outside 64-bit mode VCVTUSI2SD and VCVTSI2SD
 * from a register with rounding, if EVEX.W is 1.
 */
static bool undefined_but_done(const struct cpu_case *c, const struct cpu_result *guest)
{
    uint64_t at = guest->out.rip - CODE_BASE - c->start;
    struct x86_insn insn;

    if (guest->vector != VECTOR_UD || at + 5 > c->bytes || decode_at(c, guest->out.rip, &insn))
        return false;
    for (unsigned i = 0; i < 4 && at + 5 < c->bytes && c->code[at] != 0xc4 && c->code[at] != 0x62; i++)     /* prefixes */
        at++;
    if (c->code[at] == 0x62 && c->code_size < 8)
        return (c->code[at + 2] & 0x83) == 0x83 && c->code[at + 3] & 0x10 && (c->code[at + 4] == 0x7b || c->code[at + 4] == 0x2a);
    return c->code[at] == 0xc4 && (c->code[at + 1] & 0x1f) == 3 && !(c->code[at + 2] & 0x80) && c->code[at + 3] <= 1;
}

/*
 * A repeated MOVS from one view of the window to overlapping bytes in the other: Intel's processors go by linear addresses when they
 * decide to move more than an element at a time.
 */
static bool moves_between_views(const struct cpu_case *c)
{
    unsigned views = 0;
    bool moves = false;

    for (unsigned i = 0; i < 2; i++)
        views |= c->in.gpr[i ? RSI : RDI] >= WINDOW_HIGH ? 2 : 1;
    for (unsigned i = 0; i < c->insns; i++) {
        const uint8_t *b = c->code + c->insn[i].offset;

        switch (c->insn[i].mnemonic) {
        case ZYDIS_MNEMONIC_MOVSB: case ZYDIS_MNEMONIC_MOVSW: case ZYDIS_MNEMONIC_MOVSD: case ZYDIS_MNEMONIC_MOVSQ:
            moves = true;
            break;
        case ZYDIS_MNEMONIC_MOV:        /* to RSI or RDI, in front of it */
            if (c->insn[i].length == 10 && b[0] == 0x48 && (b[1] == 0xb8 + RSI || b[1] == 0xb8 + RDI))
                views |= load_le64(b + 2) >= WINDOW_HIGH ? 2 : 1;
        }
    }
    return moves && views == 3;
}

const char *known_difference(const struct cpu_case *c, const struct cpu_result *host, const struct cpu_result *guest)
{
    if (offset_not_canonical(c, host))
        return "non-canonical offset in FS or GS";
    if (undefined_at_end(host, guest))
        return "undefined instruction at the end of code";
    if (image_wraps(c, host))
        return "image around 4 GiB";
    if (image_beyond_limit(c, host, guest))
        return "image beyond a segment's limit";
    if (misaligned_mode(host, guest))
        return "MXCSR.MM";
    if (gather_steps(c, host))
        return "single steps of a gather";
    if (undefined_but_done(c, guest))
        return "undefined, but done";
    if (moves_between_views(c))
        return "repeated moves between two views of a page";
    if (wide_pointers(c))
        return "bits of x87 error pointers";
    if (stored_state(c))
        return "components in use, MXCSR_MASK";
    return NULL;
}

bool compare_flags_at_faults = true;
bool compare_kernel;
bool compare_direct;

bool compare_results(const struct cpu_case *c, const struct cpu_result *host, const struct cpu_result *guest, char *text,
                     size_t size)
{
    struct report r = { .text = text, .size = size, .equal = true };
    uint64_t flags = FLAGS_COMPARED;
    uint64_t gpr_mask = ~0ull;

    /* KMOVD with VEX.W 1 writes 64 bits even in compatibility mode. */
    for (unsigned i = 0; i < c->insns; i++)
        if (c->code_size < 8 && c->insn[i].mnemonic == ZYDIS_MNEMONIC_KMOVD)
            gpr_mask = UINT32_MAX;
    if (text && size)
        *text = 0;
    if (host->end != guest->end) {
        differ(&r, "  end      host %s engine %s\n", end_name(host->end), end_name(guest->end));
        return false;
    }
    number(&r, "vector", host->vector, guest->vector);
    if (host->vector == guest->vector) {
        uint32_t error = host->error ^ guest->error;

        if (host->vector == VECTOR_PF && host->cr2 >= USER_END)
            error &= ~1u;
        if (host->vector == VECTOR_PF && compare_kernel)
            error ^= 4;
        if (error)
            number(&r, "error", host->error, guest->error);
        if (host->vector == VECTOR_PF)
            number(&r, "cr2", host->cr2, guest->cr2);
    }
    if (host->vector != guest->vector && (host->vector == VECTOR_PF || guest->vector == VECTOR_PF))
        differ(&r, "  cr2      %016" PRIx64 "\n", host->vector == VECTOR_PF ? host->cr2 : guest->cr2);
    for (unsigned i = 0; i < 16; i++)
        number(&r, gpr_name[i], host->out.gpr[i] & gpr_mask, guest->out.gpr[i] & gpr_mask);
    number(&r, "rip", host->out.rip, guest->out.rip);
    if (host->vector != VECTOR_BP && !compare_flags_at_faults)
        flags &= ~(uint64_t)RFLAGS_ARITH;
    number(&r, "rflags", host->out.rflags & flags, guest->out.rflags & flags);
    number(&r, "fs base", host->out.fs_base, guest->out.fs_base);
    number(&r, "gs base", host->out.gs_base, guest->out.gs_base);
    compare_fpu(&r, &host->out.fpu, &guest->out.fpu);
    compare_data(&r, host, guest);
    return r.equal;
}

/* ---- showing ---- */

static uint64_t insn_address(const struct cpu_case *c, unsigned i) { return CODE_BASE + c->start + c->insn[i].offset; }

/* Where the memory operand would be if the case began here. */
static uint64_t initial_address(const struct cpu_case *c, const struct x86_insn *insn, uint64_t next)
{
    const struct x86_mem *m = &insn->mem;
    uint64_t at = (uint64_t)m->disp;

    at += m->base == X86_REG_RIP ? next : m->base < 16 ? c->in.gpr[m->base] : 0;
    if (m->index < 16 && !m->vsib_size)
        at += c->in.gpr[m->index] * m->scale;
    at = m->addr_size == 8 ? at : m->addr_size == 4 ? (uint32_t)at : (uint16_t)at;
    return at + (c->code_size != 8 ? 0 : m->seg == SEG_FS ? c->in.fs_base : m->seg == SEG_GS ? c->in.gs_base : 0);
}

static void print_insn(const struct cpu_case *c, const struct case_insn *i)
{
    char text[128];

    x86_format(text, sizeof(text), c->code + i->offset, i->length, c->code_size, CODE_BASE + c->start + i->offset);
    printf("  %08x  %-44s", CODE_BASE + c->start + i->offset, text);
    for (unsigned k = 0; k < i->length; k++)
        printf(" %02x", c->code[i->offset + k]);
    putchar('\n');
}

void print_case(const struct cpu_case *c)
{
    const struct cpu_view *v = &c->in;
    const struct x86_fpu *f = &v->fpu;
    char text[2 * 64 + 1];

    for (unsigned i = 0; i < c->insns; i++)
        print_insn(c, &c->insn[i]);
    for (unsigned i = 0; i < 16; i++)
        printf("  %-3s %016" PRIx64 "%s", gpr_name[i], v->gpr[i], i % 4 == 3 ? "\n" : "");
    printf("  rflags %" PRIx64 " fs %" PRIx64 " gs %" PRIx64 " fcw %04x fsw %04x ftw %02x mxcsr %04x\n", v->rflags,
           v->fs_base, v->gs_base, f->fcw, f->fsw, f->ftw, f->mxcsr);
    for (unsigned i = 0; i < c->insns; i++) {
        struct x86_insn insn;
        bool gp;

        if (x86_decode(&insn, c->code + c->insn[i].offset, c->insn[i].length, c->code_size, &gp))
            continue;
        if (insn.mem.base != X86_NO_REG || insn.mem.index != X86_NO_REG)
            printf("  initially at %016" PRIx64 "\n", initial_address(c, &insn, insn_address(c, i) + insn.length));
        for (unsigned k = 0; k < insn.operands; k++) {
            const struct x86_operand *o = &insn.operand[k];

            if (o->kind == OPERAND_VEC) {
                hex(text, f->zmm[o->reg], o->size);
                printf("  v%-2u %s\n", o->reg, text);
            } else if (o->kind == OPERAND_K) {
                printf("  k%u  %016" PRIx64 "\n", o->reg, f->k[o->reg]);
            } else if (o->kind == OPERAND_ST || o->kind == OPERAND_MM) {
                hex(text, f->st[o->reg], 10);
                printf("  st%u %s\n", o->reg, text);
            }
        }
        if (insn.mask_reg)
            printf("  k%u  %016" PRIx64 "\n", insn.mask_reg, f->k[insn.mask_reg]);
    }
}
