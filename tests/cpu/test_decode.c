/*
 * The decoder against the host processor: instruction lengths, and which bytes are no instruction, in 64-, 32-
 * and (where the kernel lets programs have such segments) 16-bit code.
 *
 * Two tries per case tell whether x86_decode()'s length is the processor's: with one byte less it must miss one, with all it
 * must not. A SIGILL says what is undefined. Usage: test_decode [seed [cases]]; the seed is printed.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "isa/x86/cpuid.h"
#include "isa/x86/insn.h"
#include "isa/x86/state.h"
#include "run_native.h"

#define DEFAULT_CASES 150000

/* Known differences: not what this test is about. */
static bool exempt(const struct x86_insn *insn)
{
    switch (insn->mnemonic) {
    /* Undefined where they are tried, and meant so; emulated by the kernel, which forgets the trap. */
    case ZYDIS_MNEMONIC_UD0:
    case ZYDIS_MNEMONIC_UD1:
    case ZYDIS_MNEMONIC_UD2:
    case ZYDIS_MNEMONIC_RSM:
    case ZYDIS_MNEMONIC_STAC:
    case ZYDIS_MNEMONIC_CLAC:
    case ZYDIS_MNEMONIC_SGDT:
    case ZYDIS_MNEMONIC_SIDT:
    case ZYDIS_MNEMONIC_SLDT:
    case ZYDIS_MNEMONIC_STR:
    case ZYDIS_MNEMONIC_SMSW:
    /* May hang, or leave the process. */
    case ZYDIS_MNEMONIC_MWAITX:
    case ZYDIS_MNEMONIC_SYSCALL:
    case ZYDIS_MNEMONIC_SYSENTER:
    case ZYDIS_MNEMONIC_INT:
        return true;
    /* No trap behind these. */
    case ZYDIS_MNEMONIC_MOV:
    case ZYDIS_MNEMONIC_POP:
        return insn->operand[0].kind == OPERAND_SEG && insn->operand[0].reg == SEG_SS;
    case ZYDIS_MNEMONIC_LSS:
        return true;
    /* With VEX.W in 32-bit code Intel takes these, AMD does not. */
    case ZYDIS_MNEMONIC_VPINSRD:
    case ZYDIS_MNEMONIC_VPEXTRD:
        return insn->code_size != 8;
    default:
        return false;
    }
}

/*
 * Undefined for a guest, but a program sees something else: AMD takes LOCK MOV CR0 for MOV CR8 (a feature that no model
 * has), looks at LOCK VERR's memory operand before it refuses it, and does not mind VEX.W0 in VPERMQ and VPERMPD.
 */
static bool exempt_undefined(const uint8_t *bytes)
{
    bool lock = false;
    unsigned i;

    for (i = 0; i < 12 && bytes[i] != 0x0f && bytes[i] != 0xc4; i++)
        lock |= bytes[i] == 0xf0;
    if (bytes[i] == 0xc4)
        return (bytes[i + 1] & 0x1f) == 3 && !(bytes[i + 2] & 0x80) && bytes[i + 3] <= 1;
    /* A hypervisor may know VMCALL with prefixes. */
    if (bytes[i + 1] == 0x01 && bytes[i + 2] == 0xc1)
        return true;
    return lock && (bytes[i + 1] == 0x00 || bytes[i + 1] == 0x20 || bytes[i + 1] == 0x22);
}

static void run_case(struct native_totals *t)
{
    static const unsigned sizes[4] = { 8, 8, 4, 2 };
    const struct x86_cpu_model *model = x86_cpu_model_find("host");
    unsigned code_size = sizes[t->next % 4];
    struct native_result r;
    struct x86_insn insn;
    uint8_t bytes[CASE_BYTES];
    bool gp, ok;

    if (code_size == 2 && !native_run_can_16_bit())
        return;
    native_case(bytes, t->seed, t->next, code_size);
    ok = x86_decode(&insn, bytes, 15, code_size, &gp) == 0;
    if (ok && (exempt(&insn) || !x86_model_has_insn(model, &insn)))
        return;
    if (ok) {
        t->done[0]++;
        r = native_run(bytes, insn.length, code_size);
        if (r.fetch_fault)
            native_report(t, bytes, code_size, "the processor wants more bytes");
        else if (r.signal == SIGILL)
            native_report(t, bytes, code_size, "undefined on the processor");
        if (insn.length > 1 && !native_run(bytes, insn.length - 1u, code_size).fetch_fault)
            native_report(t, bytes, code_size, "the processor needs fewer bytes");
    } else if (!gp && !exempt_undefined(bytes)) {
        t->done[1]++;
        r = native_run(bytes, 15, code_size);
        /* With so many prefixes that it is too long, which a processor says first: look at it with fewer. */
        for (unsigned less = 1; r.signal == SIGSEGV && less < 5; less++)
            r = native_run(bytes + less, 15, code_size);
        if (r.signal != SIGILL)
            native_report(t, bytes, code_size, "the processor knows this");
    }
}

int main(int argc, char **argv)
{
    struct native_totals *t = native_run_cases(argc > 1 ? strtoull(argv[1], NULL, 0) : (uint64_t)time(NULL),
                                               argc > 2 ? strtoull(argv[2], NULL, 0) : DEFAULT_CASES, run_case);

    if (t == NULL)
        return 99;
    printf("%llu decoded, %llu undefined, %llu lost, %llu differences\n", (unsigned long long)t->done[0],
           (unsigned long long)t->done[1], (unsigned long long)t->lost, (unsigned long long)t->differences);
    return t->differences != 0;
}
