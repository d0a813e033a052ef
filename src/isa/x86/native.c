/*
 * Which instructions run natively, and what has to happen around the host's execution: traps by control
 * registers, the memory operand, pending and new floating-point exceptions.
 *
 * Prepared instructions are cached by their bytes without what the memory operand is made of, so code that is
 * decoded again costs nothing.
 */
#include <cpuid.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include "base/log.h"
#include "base/util.h"
#include "isa/x86/mmu.h"
#include "isa/x86/native_internal.h"

#define CACHE_SIZE 4096u

struct entry {
    struct native_insn n;
    struct x86_insn insn;       /* the one it was made from */
    struct entry *next;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct entry *cache[CACHE_SIZE];

/* ---- what an instruction is ---- */

static bool has_operand(const struct x86_insn *insn, enum x86_operand_kind kind)
{
    for (unsigned i = 0; i < insn->operands; i++)
        if (insn->operand[i].kind == kind)
            return true;
    return false;
}

/* Extensions whose instructions compute on registers and one memory operand, and nothing else. */
static bool computes(const struct x86_insn *insn)
{
    switch ((unsigned)insn->isa_ext) {
    case ZYDIS_ISA_EXT_X87: case ZYDIS_ISA_EXT_MMX: case ZYDIS_ISA_EXT_SSE: case ZYDIS_ISA_EXT_SSE2:
    case ZYDIS_ISA_EXT_SSE3: case ZYDIS_ISA_EXT_SSSE3: case ZYDIS_ISA_EXT_SSE4: case ZYDIS_ISA_EXT_SSE4A:
    case ZYDIS_ISA_EXT_AES: case ZYDIS_ISA_EXT_PCLMULQDQ: case ZYDIS_ISA_EXT_SHA: case ZYDIS_ISA_EXT_AVX:
    case ZYDIS_ISA_EXT_AVX2: case ZYDIS_ISA_EXT_AVX2GATHER: case ZYDIS_ISA_EXT_AVXAES: case ZYDIS_ISA_EXT_AVX_VNNI:
    case ZYDIS_ISA_EXT_AVX512EVEX: case ZYDIS_ISA_EXT_AVX512VEX: case ZYDIS_ISA_EXT_F16C: case ZYDIS_ISA_EXT_FMA:
    case ZYDIS_ISA_EXT_GFNI: case ZYDIS_ISA_EXT_VAES: case ZYDIS_ISA_EXT_VPCLMULQDQ: case ZYDIS_ISA_EXT_BMI1:
    case ZYDIS_ISA_EXT_BMI2: case ZYDIS_ISA_EXT_ADOX_ADCX: case ZYDIS_ISA_EXT_MOVBE:
        return true;
    default:
        switch (insn->mnemonic) {
        case ZYDIS_MNEMONIC_CMPXCHG: case ZYDIS_MNEMONIC_XADD:
            return !insn->has_mem;
        case ZYDIS_MNEMONIC_CRC32: case ZYDIS_MNEMONIC_MOVNTI: case ZYDIS_MNEMONIC_MOVDIRI:
            return true;
        default:
            return false;
        }
    }
}

/* From memory these name no vector register. */
static bool converts_to_integer(const struct x86_insn *insn)
{
    switch (insn->mnemonic) {
    case ZYDIS_MNEMONIC_CVTPS2PI: case ZYDIS_MNEMONIC_CVTTPS2PI: case ZYDIS_MNEMONIC_CVTPD2PI: case ZYDIS_MNEMONIC_CVTTPD2PI:
    case ZYDIS_MNEMONIC_CVTSS2SI: case ZYDIS_MNEMONIC_CVTTSS2SI: case ZYDIS_MNEMONIC_CVTSD2SI: case ZYDIS_MNEMONIC_CVTTSD2SI:
    case ZYDIS_MNEMONIC_VCVTSS2SI: case ZYDIS_MNEMONIC_VCVTTSS2SI: case ZYDIS_MNEMONIC_VCVTSD2SI:
    case ZYDIS_MNEMONIC_VCVTTSD2SI:
        return true;
    default:
        return false;
    }
}

static enum native_kind kind_of(const struct x86_insn *insn)
{
    bool vec = has_operand(insn, OPERAND_VEC);

    if (insn->isa_ext == ZYDIS_ISA_EXT_X87 || insn->mnemonic == ZYDIS_MNEMONIC_FISTTP)
        return NATIVE_X87;
    if (insn->has_evex || has_operand(insn, OPERAND_K))
        return NATIVE_AVX512;
    switch (insn->mnemonic) {
    case ZYDIS_MNEMONIC_LDMXCSR: case ZYDIS_MNEMONIC_STMXCSR:
        return NATIVE_SSE;
    case ZYDIS_MNEMONIC_VLDMXCSR: case ZYDIS_MNEMONIC_VSTMXCSR: case ZYDIS_MNEMONIC_VZEROUPPER:
    case ZYDIS_MNEMONIC_VZEROALL:
        return NATIVE_AVX;
    default:
        if (vec || converts_to_integer(insn))
            return insn->has_vex ? NATIVE_AVX : NATIVE_SSE;
        return has_operand(insn, OPERAND_MM) || insn->isa_ext == ZYDIS_ISA_EXT_MMX ? NATIVE_MMX : NATIVE_INTEGER;
    }
}

/* By name: floating-point arithmetic, comparison and conversion. Too many only cost time. */
static bool raises_simd(const struct x86_insn *insn)
{
    static const char *const stems[] = {
        "add", "sub", "mul", "div", "sqrt", "min", "max", "cmp", "comi", "ucomi", "cvt", "round", "rndscale", "dp",
        "hadd", "hsub", "fmadd", "fmsub", "fnmadd", "fnmsub", "fixup", "getexp", "getmant", "range", "reduce",
        "scalef", "fcmadd", "fcmul", "fmul", "rcp", "rsqrt", "fpclass",
    };
    const char *name = ZydisMnemonicGetString((ZydisMnemonic)insn->mnemonic);

    if (!name)
        return false;
    if (*name == 'v')
        name++;
    for (unsigned i = 0; i < ARRAY_SIZE(stems); i++)
        if (strncmp(name, stems[i], strlen(stems[i])) == 0)
            return true;
    return false;
}

/* The stubs run on the host, so where processors differ its vendor decides. */
static bool host_is_amd(void)
{
    static _Atomic int8_t known;        /* 1: it is, -1: it is not. CPUID takes long where a hypervisor answers */
    unsigned eax, ebx = 0, ecx, edx;

    if (!known) {
        __get_cpuid(0, &eax, &ebx, &ecx, &edx);
        known = ebx == signature_AMD_ebx || ebx == 0x6f677948 ? 1 : -1;         /* "Auth", Hygon's "Hygo" */
    }
    return known > 0;
}

static bool must_be_aligned(const struct x86_insn *insn, enum native_kind kind, unsigned size)
{
    if (kind == NATIVE_SSE && size == 16) {
        switch (insn->mnemonic) {
        case ZYDIS_MNEMONIC_MOVUPS: case ZYDIS_MNEMONIC_MOVUPD: case ZYDIS_MNEMONIC_MOVDQU: case ZYDIS_MNEMONIC_LDDQU:
        case ZYDIS_MNEMONIC_PCMPESTRI: case ZYDIS_MNEMONIC_PCMPESTRM: case ZYDIS_MNEMONIC_PCMPISTRI:
        case ZYDIS_MNEMONIC_PCMPISTRM:
            return false;
        case ZYDIS_MNEMONIC_SHA1MSG1: case ZYDIS_MNEMONIC_SHA1MSG2: case ZYDIS_MNEMONIC_SHA1NEXTE:
        case ZYDIS_MNEMONIC_SHA1RNDS4: case ZYDIS_MNEMONIC_SHA256MSG1: case ZYDIS_MNEMONIC_SHA256MSG2:
        case ZYDIS_MNEMONIC_SHA256RNDS2:
            return !host_is_amd();
        default:
            return true;
        }
    }
    switch (insn->mnemonic) {
    case ZYDIS_MNEMONIC_VMOVAPS: case ZYDIS_MNEMONIC_VMOVAPD: case ZYDIS_MNEMONIC_VMOVDQA: case ZYDIS_MNEMONIC_VMOVDQA32:
    case ZYDIS_MNEMONIC_VMOVDQA64: case ZYDIS_MNEMONIC_VMOVNTDQ: case ZYDIS_MNEMONIC_VMOVNTDQA:
    case ZYDIS_MNEMONIC_VMOVNTPS: case ZYDIS_MNEMONIC_VMOVNTPD:
        return true;
    default:
        return false;
    }
}

static bool x87_control(const struct x86_insn *insn)
{
    switch (insn->mnemonic) {
    case ZYDIS_MNEMONIC_FNINIT: case ZYDIS_MNEMONIC_FNCLEX: case ZYDIS_MNEMONIC_FNSTCW: case ZYDIS_MNEMONIC_FNSTSW:
    case ZYDIS_MNEMONIC_FNSAVE: case ZYDIS_MNEMONIC_FNSTENV: case ZYDIS_MNEMONIC_FLDCW: case ZYDIS_MNEMONIC_FLDENV:
    case ZYDIS_MNEMONIC_FRSTOR: case ZYDIS_MNEMONIC_FWAIT:
    /* Of the 8087 and 80287; nothing now. */
    case ZYDIS_MNEMONIC_FENI8087_NOP: case ZYDIS_MNEMONIC_FDISI8087_NOP: case ZYDIS_MNEMONIC_FSETPM287_NOP:
        return true;
    default:
        return false;
    }
}

static bool x87_no_wait(const struct x86_insn *insn)
{
    return x87_control(insn) && insn->mnemonic != ZYDIS_MNEMONIC_FLDCW && insn->mnemonic != ZYDIS_MNEMONIC_FLDENV &&
           insn->mnemonic != ZYDIS_MNEMONIC_FRSTOR && insn->mnemonic != ZYDIS_MNEMONIC_FWAIT;
}

static bool compresses(const struct x86_insn *insn)
{
    const char *name = ZydisMnemonicGetString((ZydisMnemonic)insn->mnemonic);

    return name && (strstr(name, "compress") || strstr(name, "expand"));
}

/*
 * How many mask bits belong to one element of the memory operand: several when it is broadcast. 0: the mask does not go by
 * its elements.
 */
static uint8_t mask_repeats(const struct x86_insn *insn, const struct native_insn *n)
{
    const struct x86_operand *d = &insn->operand[0];
    const char *name = ZydisMnemonicGetString((ZydisMnemonic)insn->mnemonic);
    unsigned in_memory = n->element ? n->mem_size / n->element : 0, in_register;

    switch (insn->mnemonic) {
    /* Class E4NF, which Zydis does not know of: the mask does not go by elements of the memory operand. */
    case ZYDIS_MNEMONIC_VGF2P8AFFINEQB: case ZYDIS_MNEMONIC_VGF2P8AFFINEINVQB: case ZYDIS_MNEMONIC_VCVTNE2PS2BF16:
        return 0;
    }
    if (insn->broadcast)
        return insn->broadcast;
    if (!in_memory || d->kind != OPERAND_VEC || !d->element)
        return 1;
    in_register = d->size / d->element;
    if (name && (strncmp(name, "vbroadcast", 10) == 0 || strncmp(name, "vpbroadcast", 11) == 0))
        return (uint8_t)(in_register / in_memory);
    /* Conversions to narrower elements can leave half of the register. */
    if (d->element * 2u == n->element && in_memory * 2 == in_register)
        return 1;
    /* Scalars are one element in memory. */
    return in_memory == 1 || in_memory == in_register;
}

/* What one mask bit stands for in memory. Zydis gives extracted quadwords as doublewords. */
static uint8_t mask_element(const struct x86_insn *insn, const struct x86_operand *o)
{
    switch (insn->mnemonic) {
    case ZYDIS_MNEMONIC_VEXTRACTF64X2: case ZYDIS_MNEMONIC_VEXTRACTF64X4: case ZYDIS_MNEMONIC_VEXTRACTI64X2:
    case ZYDIS_MNEMONIC_VEXTRACTI64X4:
        return 8;
    default:
        return o->element;
    }
}

static void describe(struct native_insn *n, const struct x86_insn *insn)
{
    static const uint8_t components[] = {
        [NATIVE_INTEGER] = 0, [NATIVE_X87] = 1, [NATIVE_MMX] = 1, [NATIVE_SSE] = 2, [NATIVE_AVX] = 6, [NATIVE_AVX512] = 0xe6,
    };

    *n = (struct native_insn){ .kind = (uint8_t)kind_of(insn) };
    n->uses_fx = n->kind == NATIVE_X87 || n->kind == NATIVE_MMX || has_operand(insn, OPERAND_MM);
    n->raises_simd = n->kind >= NATIVE_SSE && raises_simd(insn);
    n->never_misaligned = !host_is_amd() && (insn->mnemonic == ZYDIS_MNEMONIC_VCVTPH2PS || insn->mnemonic == ZYDIS_MNEMONIC_VCVTPS2PH);
    n->x87_waits = n->uses_fx && !(n->kind == NATIVE_X87 && x87_no_wait(insn));
    n->x87_pointers = n->kind == NATIVE_X87 && !x87_control(insn);
    n->components = components[n->kind] | (n->uses_fx ? 1 : 0);
    for (unsigned i = 0; i < insn->operands; i++) {
        const struct x86_operand *o = &insn->operand[i];

        if (o->kind != OPERAND_MEM || o->implicit)
            continue;
        n->mem_size = (uint8_t)MIN(o->size, 255);
        n->mem_read = o->read;
        n->mem_write = o->write;
        n->element = mask_element(insn, o);
    }
    if (insn->has_mem) {
        n->aligned = must_be_aligned(insn, n->kind, n->mem_size);
        n->repeats = mask_repeats(insn, n);
        n->masked = insn->mask_reg && n->element && insn->suppresses_faults && n->repeats;
        n->compressed = n->masked && compresses(insn);
    }
}

/*
 * ---- what the host may raise in a stub ----
 * SIGFPE: an unmasked SIMD exception. Which exceptions an operation has when some are unmasked cannot be told from what
 * it does when all are masked, so a stub runs with the guest's masks. SIGILL: encodings that decode but that this
 * host does not have, found by a trial when the stub is made. Either way the signal handler makes the stub go on behind
 * the instruction, which has changed nothing but MXCSR's flags.
 */
static __thread const struct native_insn *volatile running;
static __thread volatile bool raised;
static const int caught[] = { SIGFPE, SIGILL };
static struct sigaction previous_action[ARRAY_SIZE(caught)];

static void on_raised(int number, siginfo_t *info, void *context)
{
    greg_t *rip = &((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP];
    const struct native_insn *n = running;

    if (n && (uint64_t)n->resume - (uint64_t)*rip <= X86_MAX_INSN) {
        raised = true;
        *rip = (greg_t)n->resume;
        return;
    }
    /* Not ours: it happens again, with whoever was here before. */
    sigaction(number, &previous_action[number == SIGILL], NULL);
}

static void catch_raised(void)
{
    struct sigaction action = { .sa_sigaction = on_raised, .sa_flags = SA_SIGINFO | SA_RESTART };

    for (unsigned i = 0; i < ARRAY_SIZE(caught); i++)
        sigaction(caught[i], &action, &previous_action[i]);
}

/* Runs the stub; raised says how it went. */
static void run_caught(struct x86_cpu *cpu, const struct native_insn *n, void *mem)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;

    pthread_once(&once, catch_raised);
    raised = false;
    running = n;
    n->stub(cpu, mem);
    running = NULL;
}

/* Does this host have the instruction? On a processor of zeros, with the cache's lock held. */
static bool host_executes(const struct native_insn *n)
{
    static struct x86_cpu trial;
    uint8_t mem[256] __attribute__((aligned(64))) = { 0 };

    memset(&trial, 0, sizeof(trial));
    trial.s.fpu.fcw = 0x37f;
    trial.native_mxcsr_in = trial.native_mxcsr_host = 0x1f80;
    native_fx_load(&trial);
    run_caught(&trial, n, mem);
    return !raised;
}

/* ---- the cache ---- */

/* Equal but for the registers and displacement of the memory operand. */
static bool same(const struct x86_insn *a, const struct x86_insn *b)
{
    if (a->mnemonic != b->mnemonic || a->has_mem != b->has_mem || a->code_size != b->code_size)
        return false;
    if (!a->has_mem)
        return a->length == b->length && memcmp(a->bytes, b->bytes, a->length) == 0;
    if (a->op_size != b->op_size || a->has_rex != b->has_rex || a->has_vex != b->has_vex || a->has_evex != b->has_evex ||
        a->vex_size != b->vex_size || a->imm_size != b->imm_size || a->mask_reg != b->mask_reg ||
        a->mask_zeroing != b->mask_zeroing || a->broadcast != b->broadcast || a->operands != b->operands)
        return false;
    if (memcmp(a->operand, b->operand, sizeof(a->operand)) != 0)
        return false;
    if (memcmp(a->bytes + a->length - a->imm_size, b->bytes + b->length - b->imm_size, a->imm_size) != 0)
        return false;
    if (a->has_rex && (a->bytes[a->rex_offset] & 0xc) != (b->bytes[b->rex_offset] & 0xc))
        return false;
    if (a->has_evex && (a->bytes[a->evex_offset + 2] != b->bytes[b->evex_offset + 2] ||
                        a->bytes[a->evex_offset + 3] != b->bytes[b->evex_offset + 3]))
        return false;
    if (a->has_vex && a->bytes[a->vex_offset + a->vex_size - 1] != b->bytes[b->vex_offset + b->vex_size - 1])
        return false;
    return ((a->bytes[a->modrm_offset] ^ b->bytes[b->modrm_offset]) & 0x38) == 0;
}

/* Only what same() compares, for hashing. */
static unsigned hash(const struct x86_insn *insn)
{
    uint32_t h = insn->mnemonic * 31u + insn->code_size;

    for (unsigned i = 0; i < insn->operands; i++)
        h = h * 33 + insn->operand[i].reg * 7u + insn->operand[i].kind;
    if (insn->imm_size)
        h = h * 33 + insn->bytes[insn->length - insn->imm_size];
    return (h ^ h >> 12) & (CACHE_SIZE - 1);
}

/*
 * Code memory is bounded, and a guest that runs long enough, or wants to, fills it. From then on what is not prepared yet gets
 * its stub each time that it is executed.
 */
static void execute_unprepared(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    struct native_insn n;
    bool executes;

    describe(&n, insn);
    n.stub = native_emit_once(insn, &n, cpu->index);
    if (!n.stub)
        x86_raise(cpu, X86_UD);
    pthread_mutex_lock(&lock);
    executes = host_executes(&n);
    pthread_mutex_unlock(&lock);
    if (!executes)
        x86_raise(cpu, X86_UD);
    native_execute(cpu, insn, &n);
}

static const struct native_insn unprepared = { .special = execute_unprepared };

const struct native_insn *native_prepare(const struct x86_insn *insn)
{
    struct entry *e, **head = &cache[hash(insn)];
    native_special_fn *special;

    if (!computes(insn))
        return NULL;
    pthread_mutex_lock(&lock);
    for (e = *head; e; e = e->next)
        if (same(&e->insn, insn))
            goto out;
    special = native_special(insn);
    e = native_code_full() && !special ? NULL : calloc(1, sizeof(*e));
    if (!e) {
        pthread_mutex_unlock(&lock);
        return &unprepared;
    }
    e->insn = *insn;
    describe(&e->n, insn);
    e->n.special = special;
    if (!special)
        e->n.stub = native_emit(insn, &e->n);
    if (!e->n.special && (!e->n.stub || !host_executes(&e->n))) {
        free(e);
        e = NULL;
        goto out;
    }
    e->next = *head;
    *head = e;
out:
    pthread_mutex_unlock(&lock);
    return e ? &e->n : NULL;
}

void native_shutdown(void)
{
    pthread_mutex_lock(&lock);
    for (unsigned i = 0; i < CACHE_SIZE; i++)
        while (cache[i]) {
            struct entry *e = cache[i];

            cache[i] = e->next;
            free(e);
        }
    native_code_free();
    pthread_mutex_unlock(&lock);
}

/* ---- execution ---- */

static __attribute__((noinline, cold)) void unavailable(struct x86_cpu *cpu, enum native_kind kind)
{
    const struct x86_state *s = &cpu->s;
    bool undefined;

    switch (kind) {
    case NATIVE_X87:
        x86_raise(cpu, X86_NM);
    case NATIVE_MMX: undefined = s->cr0 & CR0_EM; break;
    case NATIVE_SSE: undefined = (s->cr0 & CR0_EM) || !(s->cr4 & CR4_OSFXSR); break;
    case NATIVE_AVX: undefined = !(s->cr0 & CR0_PE) || !(s->cr4 & CR4_OSXSAVE) || (s->xcr0 & 6) != 6; break;
    default: undefined = !(s->cr0 & CR0_PE) || !(s->cr4 & CR4_OSXSAVE) || (s->xcr0 & 0xe6) != 0xe6; break;
    }
    x86_raise(cpu, undefined ? X86_UD : X86_NM);
}

/* FWAIT asks for CR0.MP and TS, not for EM. */
static bool fwait_passes(const struct x86_cpu *cpu, const struct x86_insn *insn)
{
    return insn->mnemonic == ZYDIS_MNEMONIC_FWAIT && (cpu->s.cr0 & (CR0_MP | CR0_TS)) != (CR0_MP | CR0_TS);
}

static void check_available(struct x86_cpu *cpu, const struct x86_insn *insn, const struct native_insn *n)
{
    static const uint8_t trap_bit[] = {
        [NATIVE_INTEGER] = 0, [NATIVE_X87] = 1, [NATIVE_MMX] = 1, [NATIVE_SSE] = 2, [NATIVE_AVX] = 4, [NATIVE_AVX512] = 8,
    };

    if (unlikely(cpu->simd_trap & trap_bit[n->kind]) && !fwait_passes(cpu, insn))
        unavailable(cpu, n->kind);
}

/* Runs the stub. An unmasked SIMD exception leaves everything as it was but MXCSR's flags, and is raised. */
static void run(struct x86_cpu *cpu, const struct native_insn *n, void *mem)
{
    struct x86_fpu *fpu = &cpu->s.fpu;

    if (n->uses_fx)
        native_fx_load(cpu);
    if (!n->raises_simd) {
        n->stub(cpu, mem);
    } else {
        cpu->native_mxcsr_host = 0x1f80;
        cpu->native_mxcsr_in = fpu->mxcsr;
        if (likely((fpu->mxcsr & 0x1f80) == 0x1f80)) {
            n->stub(cpu, mem);
            fpu->mxcsr = cpu->native_mxcsr_out;
        } else {
            run_caught(cpu, n, mem);
            fpu->mxcsr = cpu->native_mxcsr_out;
            if (raised) {
                if (n->uses_fx)         /* the change to MMX state stays */
                    native_fx_store(cpu);
                x86_raise(cpu, cpu->s.cr4 & CR4_OSXMMEXCPT ? X86_XM : X86_UD);
            }
        }
    }
    if (n->uses_fx)
        native_fx_store(cpu);
}

/* The elements of the memory operand that the opmask wants, a bit for each. */
static uint64_t wanted_elements(const struct x86_cpu *cpu, const struct x86_insn *insn, const struct native_insn *n)
{
    unsigned count = n->mem_size / n->element;
    uint64_t all = count < 64 ? (1ull << count) - 1 : ~0ull, mask = cpu->s.fpu.k[insn->mask_reg];

    if (n->compressed) {
        /* The mask counts elements of the register, which the memory holds side by side. */
        unsigned ones = (unsigned)__builtin_popcountll(mask & all);

        return ones < 64 ? (1ull << ones) - 1 : ~0ull;
    }
    for (unsigned i = 1; i < n->repeats; i++)
        mask |= cpu->s.fpu.k[insn->mask_reg] >> (i * count);
    return mask & all;
}

void native_check_masked(struct x86_cpu *cpu, const struct x86_insn *insn, unsigned element, uint64_t mask, bool write,
                         bool misaligned)
{
    struct tlb_set *set = x86_unchecked_set(cpu);
    uint64_t offset = x86_effective(cpu, insn);
    unsigned from = (unsigned)__builtin_ctzll(mask) * element, to = (64 - (unsigned)__builtin_clzll(mask)) * element - 1;
    gva_t first = x86_seg_linear(cpu, insn->mem.seg, offset + from, 1, write);
    gva_t last = x86_seg_linear(cpu, insn->mem.seg, offset + to, 1, write);

    if (!x86_canonical(cpu, first))
        x86_raise_non_canonical(cpu, first);
    if (!x86_canonical(cpu, last))
        x86_raise_non_canonical(cpu, last);
    if (misaligned && cpu->tlb == &x86_checking_set)
        x86_raise_error(cpu, X86_AC, 0);
    if (write && ((first ^ last) & GUEST_PAGE_MASK)) {
        x86_probe_write_in(cpu, set, first, 1);
        x86_probe_write_in(cpu, set, last, 1);
    }
}

/* Only the elements that the mask names are touched, one by one. */
static void run_masked(struct x86_cpu *cpu, const struct x86_insn *insn, const struct native_insn *n, uint64_t mask)
{
    uint64_t offset = x86_effective(cpu, insn);
    uint8_t buf[64] __attribute__((aligned(64))) = { 0 };
    /* AMD's processors check the elements' alignment, Intel's that of operands of at most 8 bytes. */
    struct tlb_set *set = cpu->amd ? cpu->tlb : x86_unchecked_set(cpu);
    gva_t va[64];

    if (mask && !cpu->amd) {
        gva_t at = x86_seg_linear(cpu, insn->mem.seg, offset, 1, n->mem_write);

        native_check_masked(cpu, insn, n->element, mask, n->mem_write,
                            n->mem_size <= 8 && !n->never_misaligned && (at & (n->mem_size - 1u)));
    }

    for (unsigned i = 0; i < n->mem_size / n->element; i++) {
        if (!(mask >> i & 1))
            continue;
        va[i] = x86_seg_linear(cpu, insn->mem.seg, offset + i * n->element, n->element, n->mem_write);
        if (n->mem_write)
            x86_probe_write_in(cpu, set, va[i], n->element);
        if (n->mem_read || n->mem_write)
            x86_read_bytes_in(cpu, set, va[i], buf + i * n->element, n->element);
    }
    run(cpu, n, buf);
    if (n->mem_write)
        for (uint64_t left = mask; left; left &= left - 1) {
            unsigned i = (unsigned)__builtin_ctzll(left);

            x86_write_bytes_in(cpu, set, va[i], buf + i * n->element, n->element);
        }
}

/* FSTP and FBSTP of 80 bits: mantissa, then sign and exponent. */
static void run_in_parts(struct x86_cpu *cpu, const struct native_insn *n, gva_t va)
{
    struct x86_fpu before = cpu->s.fpu, after;
    uint8_t buf[16] __attribute__((aligned(16))) = { 0 };

    x86_probe_write(cpu, va, 8);
    run(cpu, n, buf);
    after = cpu->s.fpu;
    cpu->s.fpu = before;        /* for faults */
    x86_write_bytes(cpu, va, buf, 8);
    x86_write_bytes(cpu, va + 8, buf + 8, 2);
    cpu->s.fpu = after;
}

/* Where the operand is not all plain RAM in one page. */
static __attribute__((noinline, cold)) void run_bounced(struct x86_cpu *cpu, const struct x86_insn *insn,
                                                        const struct native_insn *n, gva_t va)
{
    struct tlb_set *set = n->never_misaligned ? x86_unchecked_set(cpu) : cpu->tlb;
    uint8_t buf[256] __attribute__((aligned(64))) = { 0 };

    /* Processors take 80 bits in two parts. Intel's have stored the first when the second faults. */
    if (n->mem_size == 10 && n->mem_write && !cpu->amd) {
        run_in_parts(cpu, n, va);
        return;
    }
    if (n->mem_size == 10) {
        if (n->mem_write)
            x86_probe_write(cpu, va, 8);
        else
            x86_read_bytes(cpu, va, buf, 8);
    }
    if (n->mem_write)
        x86_probe_write_in(cpu, set, va, n->mem_size);
    /* What is not stored stays: masked elements, and everything when x87 raises. */
    if (n->mem_read || n->kind == NATIVE_X87 || insn->mask_reg)
        x86_read_bytes_in(cpu, set, va, buf, n->mem_size);
    run(cpu, n, buf);
    if (n->mem_write)
        x86_write_bytes_in(cpu, set, va, buf, n->mem_size);
}

/* The exceptions of x87 that keep a store from being done, when unmasked: IE, OE, UE. */
#define STORE_EXCEPTIONS 0x19u

/*
 * An x87 store that raises an unmasked exception does not get to memory, nor to its faults, on Intel's processors. True: that
 * was so.
 */
static __attribute__((noinline, cold)) bool stores_nothing(struct x86_cpu *cpu, const struct native_insn *n)
{
    struct x86_fpu before = cpu->s.fpu;
    uint8_t buf[16] __attribute__((aligned(16))) = { 0 };

    run(cpu, n, buf);
    if (cpu->s.fpu.fsw & ~cpu->s.fpu.fcw & STORE_EXCEPTIONS)
        return true;
    cpu->s.fpu = before;
    return false;
}

static void run_with_memory(struct x86_cpu *cpu, const struct x86_insn *insn, const struct native_insn *n)
{
    uint64_t wanted = n->masked ? wanted_elements(cpu, insn, n) : 1;
    /* To Intel's processors a scalar that the mask wants is stored like any other: CR2, and #AC before the operand's end. */
    bool masked = n->masked && !(wanted && n->mem_write && n->mem_size == n->element && !cpu->amd);
    gva_t va;
    void *p;

    if (n->kind == NATIVE_X87 && n->x87_waits && n->mem_write && !cpu->amd && (~cpu->s.fpu.fcw & STORE_EXCEPTIONS) && stores_nothing(cpu, n))
        return;
    /* VCVTPS2PH has its exceptions before the store's. */
    if (n->raises_simd && n->mem_write && !cpu->amd) {
        uint8_t buf[64] __attribute__((aligned(64)));

        run(cpu, n, buf);
    }
    /* An MMX store has changed TOP, not the tags, when it faults on Intel's processors. */
    if (n->kind == NATIVE_MMX && n->mem_write && !cpu->amd)
        native_clear_top(&cpu->s.fpu);

    /* Before segment limits. */
    if (n->aligned && wanted) {
        bool based = cpu->code_size != 8 || insn->mem.seg >= SEG_FS;

        va = x86_effective(cpu, insn) + (based ? cpu->s.seg[insn->mem.seg].base : 0);
        if (unlikely(va & (n->mem_size - 1u)))
            x86_raise_error(cpu, X86_GP, 0);
    }
    if (masked) {
        /* All of it there: nothing to suppress. Otherwise the faults of the elements decide. */
        p = NULL;
        if (cpu->code_size == 8 && !n->compressed)
            p = tlb_lookup(cpu->tlb, x86_linear(cpu, insn, n->mem_size, n->mem_write), n->mem_size,
                           n->mem_write ? TLB_WRITE : TLB_READ);
        if (p)
            run(cpu, n, p);
        else
            run_masked(cpu, insn, n, wanted);
        return;
    }
    va = x86_linear(cpu, insn, n->mem_size, n->mem_write);
    p = NULL;
    if (likely(!n->never_misaligned || cpu->tlb != &x86_checking_set))
        p = x86_host_pointer(cpu, va, n->mem_size, n->mem_write ? ACCESS_WRITE : ACCESS_READ);
    if (likely(p != NULL))
        run(cpu, n, p);
    else
        run_bounced(cpu, insn, n, va);
}

void native_execute(struct x86_cpu *cpu, const struct x86_insn *insn, const struct native_insn *n)
{
    check_available(cpu, insn, n);
    if (unlikely(n->x87_waits && (cpu->s.fpu.fsw & 0x80)))
        x86_raise(cpu, X86_MF);
    if (n->special)
        n->special(cpu, insn);
    else if (insn->has_mem && n->mem_size)
        run_with_memory(cpu, insn, n);
    else
        run(cpu, n, NULL);
    cpu->s.fpu.xinuse_hint |= n->components;
    if (n->x87_pointers) {
        cpu->s.fpu.fip = cpu->s.rip;
        cpu->s.fpu.fcs = cpu->s.seg[SEG_CS].selector;
        /* On Intel's processors the others are of the last unmasked exception (SDM vol. 1 8.1.8, 8.1.9). */
        if (!cpu->amd && !(cpu->s.fpu.fsw & 0x80))
            return;
        cpu->s.fpu.fop = (uint16_t)((insn->bytes[insn->modrm_offset - 1] & 7) << 8 | insn->bytes[insn->modrm_offset]);
        if (insn->has_mem) {
            cpu->s.fpu.fdp = x86_effective(cpu, insn);
            cpu->s.fpu.fds = cpu->s.seg[insn->mem.seg].selector;
        }
    }
}
