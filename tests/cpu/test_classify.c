/*
 * The classification of instructions against the host processor's behaviour in user mode: what is privileged traps,
 * what is innocuous or critical does not.
 *
 * First one encoding of each privileged and critical instruction, with sensible operands; then random ones. Usage:
 * test_classify [seed [cases]]; the seed is printed.
 */
#include <cpuid.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <time.h>

#include "base/util.h"
#include "isa/x86/cpuid.h"
#include "isa/x86/insn.h"
#include "isa/x86/state.h"
#include "run_native.h"

#define DEFAULT_CASES 150000
#define VECTOR_UD 6
#define VECTOR_GP 13

static const char *const class_names[] = { "innocuous", "privileged", "sensitive", "critical" };

/* With EAX all ones, ECX, EDX, … zero, and RBX on data. */
static const struct {
    const char *bytes;
    unsigned len;
    unsigned code_size;
} list[] = {
#define I64(b) { b, sizeof(b) - 1, 8 }
#define I32(b) { b, sizeof(b) - 1, 4 }
    /* Privileged. */
    I64("\xf4"), I64("\x0f\x06"), I64("\x0f\x01\xf0"), I64("\x0f\x01\x13"), I64("\x0f\x01\x1b"), I64("\x0f\x00\xd1"),
    I64("\x0f\x00\xd9"), I64("\x0f\x01\x3b"), I64("\x66\x0f\x38\x82\x0b"), I64("\x0f\x08"), I64("\x0f\x09"),
    I64("\x0f\x32"), I64("\x0f\x30"), I64("\x0f\x01\xf8"), I64("\x48\x0f\x07"), I64("\x0f\x35"), I64("\x0f\x01\xd1"),
    I64("\x0f\xc7\x2b"), I64("\x0f\xc7\x1b"), I64("\x0f\x01\xcb"), I64("\x0f\x01\xca"), I64("\x0f\x01\xc8"),
    I64("\x0f\x01\xc9"), I64("\x0f\xaa"), I64("\x0f\x37"), I64("\xfa"), I64("\xfb"), I64("\xec"), I64("\xee"),
    I64("\xe4\x70"), I64("\xe6\x70"), I64("\x66\xed"), I64("\xef"), I64("\x6c"), I64("\x6d"), I64("\x6e"), I64("\x6f"),
    I64("\x0f\x01\xd8"), I64("\x0f\x01\xda"), I64("\x0f\x01\xdb"), I64("\x0f\x01\xdc"), I64("\x0f\x01\xdd"),
    I64("\x0f\x01\xde"), I64("\x0f\x01\xdf"), I64("\xf3\x0f\xc7\x33"), I64("\x0f\x01\xc4"), I64("\x66\x0f\xc7\x33"),
    I64("\x0f\xc7\x33"), I64("\x0f\xc7\x3b"), I64("\x0f\x78\xc1"), I64("\x0f\x79\xc1"), I64("\x0f\x01\xc2"),
    I64("\x0f\x01\xc3"), I64("\x66\x0f\x38\x80\x0b"), I64("\x66\x0f\x38\x81\x0b"), I64("\x0f\x01\xcf"),
    I64("\x0f\x20\xc0"), I64("\x0f\x22\xc0"), I64("\x0f\x20\xd0"), I64("\x0f\x20\xd8"), I64("\x0f\x20\xe0"),
    I64("\x44\x0f\x20\xc0"), I64("\x0f\x21\xc0"), I64("\x0f\x23\xc0"), I64("\x0f\x21\xf0"), I64("\x0f\x23\xf8"),
    I32("\xfa"), I32("\xfb"), I32("\xf4"), I32("\xec"), I32("\xee"), I32("\x0f\x20\xc0"), I32("\x0f\x32"),
    /* Critical. */
    I64("\x9c"), I64("\x66\x9c"), I64("\x9d"), I64("\x66\x9d"), I64("\x0f\x01\x03"), I64("\x0f\x01\x0b"),
    I64("\x0f\x00\xc0"), I64("\x0f\x00\xc8"), I64("\x0f\x01\xe0"), I64("\x0f\x02\xc1"), I64("\x0f\x03\xc1"),
    I64("\x0f\x00\xe1"), I64("\x0f\x00\xe9"), I64("\x0f\xa2"), I64("\x0f\x31"), I64("\x0f\x01\xf9"),
    I64("\xf3\x0f\xc7\xf9"), I64("\xf3\x48\x0f\xae\xc1"), I64("\xf3\x48\x0f\xae\xc9"), I64("\xf3\x48\x0f\xae\xd1"),
    I64("\xf3\x48\x0f\xae\xd9"), I64("\x0f\x01\xd0"), I64("\x8c\xd8"), I64("\x8c\xc8"), I64("\x0f\xa0"), I64("\x0f\xa8"),
    I64("\x0f\xae\x03"), I64("\x48\x0f\xae\x03"), I64("\x0f\xae\x0b"), I64("\x48\x0f\xae\x0b"), I64("\x0f\xae\x23"),
    I64("\x48\x0f\xae\x23"), I64("\x0f\xae\x33"), I64("\x48\x0f\xae\x33"), I64("\x0f\xc7\x23"), I64("\x48\x0f\xc7\x23"),
    I64("\x0f\xae\x2b"), I64("\x48\x0f\xae\x2b"), I64("\xd9\x33"), I64("\xdd\x33"), I32("\x9c"), I32("\x9d"),
    I32("\x63\xc8"), I32("\x0f\x02\xc1"), I32("\x0f\x31"), I32("\x1e"), I32("\x0e"),
    /* Innocuous, and not obviously so. */
    I64("\x0f\xae\x3b"), I64("\xf8"), I64("\xfd"), I64("\x9f"), I64("\x9e"), I64("\xc8\x00\x00\x00"),
    I64("\x0f\x18\x0b"), I64("\x0f\xae\xe8"), I64("\xf3\x90"), I64("\x0f\xc7\x0b"), I64("\x87\x03"), I64("\xd7"),
};

static bool host_bit(uint32_t leaf, uint32_t subleaf, unsigned reg, unsigned bit)
{
    uint32_t r[4];

    return __get_cpuid_count(leaf, subleaf, &r[0], &r[1], &r[2], &r[3]) && r[reg] >> bit & 1;
}

/* The host's processor and kernel let programs use it at all. */
static bool host_offers(const struct x86_insn *insn)
{
    switch (insn->mnemonic) {
    case ZYDIS_MNEMONIC_RDFSBASE:
    case ZYDIS_MNEMONIC_RDGSBASE:
    case ZYDIS_MNEMONIC_WRFSBASE:
    case ZYDIS_MNEMONIC_WRGSBASE:
        return getauxval(AT_HWCAP2) & 2;
    case ZYDIS_MNEMONIC_RDPID:
        return host_bit(7, 0, 2, 22);
    case ZYDIS_MNEMONIC_XSAVEOPT:
    case ZYDIS_MNEMONIC_XSAVEOPT64:
        return host_bit(0xd, 1, 0, 0);
    case ZYDIS_MNEMONIC_XSAVEC:
    case ZYDIS_MNEMONIC_XSAVEC64:
        return host_bit(0xd, 1, 0, 1);
    case ZYDIS_MNEMONIC_XGETBV:
    case ZYDIS_MNEMONIC_XSAVE:
    case ZYDIS_MNEMONIC_XSAVE64:
    case ZYDIS_MNEMONIC_XRSTOR:
    case ZYDIS_MNEMONIC_XRSTOR64:
        return host_bit(1, 0, 2, 27);
    case ZYDIS_MNEMONIC_RDRAND:
        return host_bit(1, 0, 2, 30);
    case ZYDIS_MNEMONIC_RDSEED:
        return host_bit(7, 0, 1, 18);
    case ZYDIS_MNEMONIC_CLFLUSHOPT:
        return host_bit(7, 0, 1, 23);
    case ZYDIS_MNEMONIC_CLWB:
        return host_bit(7, 0, 1, 24);
    default:
        return x86_model_has_insn(x86_cpu_model_find("host"), insn);
    }
}

/* UMIP makes these trap; kernels emulate some of them for programs. */
static bool umip_may_stop(const struct x86_insn *insn)
{
    switch (insn->mnemonic) {
    case ZYDIS_MNEMONIC_SGDT:
    case ZYDIS_MNEMONIC_SIDT:
    case ZYDIS_MNEMONIC_SLDT:
    case ZYDIS_MNEMONIC_STR:
    case ZYDIS_MNEMONIC_SMSW:
        return host_bit(7, 0, 2, 2);
    default:
        return false;
    }
}

static bool trapped(struct native_result r)
{
    return r.signal == SIGILL || r.signal == SIGSEGV || r.signal == SIGBUS;
}

static void try_list(struct native_totals *t)
{
    static uint8_t padded[CASE_BYTES];
    struct native_result r;
    struct x86_insn insn;
    enum x86_class class;
    bool gp;

    memcpy(padded, list[t->next].bytes, list[t->next].len);
    if (x86_decode(&insn, padded, list[t->next].len, list[t->next].code_size, &gp) != 0 ||
        insn.length != list[t->next].len) {
        native_report(t, padded, list[t->next].code_size, "does not decode");
        return;
    }
    class = x86_classify(&insn);
    if (class != X86_PRIVILEGED && (!host_offers(&insn) || umip_may_stop(&insn)))
        return;
    t->done[class]++;
    memset(native_run_data(), 0, 4096);
    /* A valid image for those that restore: default control words. */
    native_run_data()[0] = 0x7f;
    native_run_data()[1] = 0x03;
    native_run_data()[24] = 0x80;
    native_run_data()[25] = 0x1f;
    r = native_run(padded, list[t->next].len, list[t->next].code_size);
    if (!r.fetch_fault && trapped(r) != (class == X86_PRIVILEGED)) {
        char what[64];

        snprintf(what, sizeof(what), "%s, but signal %d", class_names[class], r.signal);
        native_report(t, padded, list[t->next].code_size, what);
    }
}

/* With a memory operand, encoded or not, it may fault for other reasons. */
static bool touches_memory(const struct x86_insn *insn)
{
    for (unsigned i = 0; i < insn->operands; i++)
        if (insn->operand[i].kind == OPERAND_MEM)
            return true;
    switch (insn->mnemonic) {
    case ZYDIS_MNEMONIC_PUSHA:      /* more hidden operands than are decoded */
    case ZYDIS_MNEMONIC_PUSHAD:
    case ZYDIS_MNEMONIC_POPA:
    case ZYDIS_MNEMONIC_POPAD:
        return true;
    default:
        return insn->has_mem;
    }
}

/* May hang or leave the process; or jump. */
static bool exempt(const struct x86_insn *insn)
{
    switch (insn->mnemonic) {
    case ZYDIS_MNEMONIC_MWAITX:
    case ZYDIS_MNEMONIC_MONITORX:
    case ZYDIS_MNEMONIC_SYSCALL:
    case ZYDIS_MNEMONIC_SYSENTER:
    case ZYDIS_MNEMONIC_INT:
    case ZYDIS_MNEMONIC_CLZERO:     /* its memory operand is RAX alone */
        return true;
    default:
        return insn->category == ZYDIS_CATEGORY_UNCOND_BR || insn->category == ZYDIS_CATEGORY_COND_BR ||
               insn->category == ZYDIS_CATEGORY_CALL || insn->category == ZYDIS_CATEGORY_RET;
    }
}

static void try_random(struct native_totals *t)
{
    unsigned code_size = t->next % 4 == 3 ? 4 : 8;
    struct native_result r;
    struct x86_insn insn;
    uint8_t bytes[CASE_BYTES];
    enum x86_class class;
    bool gp;

    native_case(bytes, t->seed, t->next, code_size);
    if (x86_decode(&insn, bytes, 15, code_size, &gp) != 0 || exempt(&insn))
        return;
    class = x86_classify(&insn);
    if (class == X86_SENSITIVE || (class != X86_PRIVILEGED && (!host_offers(&insn) || umip_may_stop(&insn))))
        return;
    if (class != X86_PRIVILEGED && touches_memory(&insn))
        return;
    t->done[class]++;
    r = native_run(bytes, insn.length, code_size);
    /* Another vendor's instruction may have another length here. */
    if (r.fetch_fault)
        return;
    if (class == X86_PRIVILEGED ? !trapped(r) : r.vector == VECTOR_UD || r.vector == VECTOR_GP) {
        char what[64];

        snprintf(what, sizeof(what), "%s, but signal %d, vector %u", class_names[class], r.signal, r.vector);
        native_report(t, bytes, code_size, what);
    }
}

int main(int argc, char **argv)
{
    struct native_totals *t;
    uint64_t differences;

    t = native_run_cases(0, ARRAY_SIZE(list), try_list);
    if (t == NULL)
        return 99;
    printf("listed: %llu privileged, %llu critical, %llu innocuous, %llu lost, %llu differences\n",
           (unsigned long long)t->done[X86_PRIVILEGED], (unsigned long long)t->done[X86_CRITICAL],
           (unsigned long long)t->done[X86_INNOCUOUS], (unsigned long long)t->lost, (unsigned long long)t->differences);
    differences = t->differences + t->lost;

    t = native_run_cases(argc > 1 ? strtoull(argv[1], NULL, 0) : (uint64_t)time(NULL),
                         argc > 2 ? strtoull(argv[2], NULL, 0) : DEFAULT_CASES, try_random);
    if (t == NULL)
        return 99;
    printf("random: %llu privileged, %llu critical, %llu innocuous, %llu lost, %llu differences\n",
           (unsigned long long)t->done[X86_PRIVILEGED], (unsigned long long)t->done[X86_CRITICAL],
           (unsigned long long)t->done[X86_INNOCUOUS], (unsigned long long)t->lost, (unsigned long long)t->differences);
    return differences + t->differences != 0;
}
