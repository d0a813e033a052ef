/*
 * The one table that classifies instructions: classify.def, and the few mnemonics whose operands decide.
 * Any thread.
 */
#include "isa/x86/insn.h"

static const uint8_t table[ZYDIS_MNEMONIC_MAX_VALUE + 1] = {
#define CLASS(mnemonic, class) [ZYDIS_MNEMONIC_##mnemonic] = X86_##class,
#include "isa/x86/classify.def"
#undef CLASS
};

enum x86_class x86_classify(const struct x86_insn *insn)
{
    switch (insn->mnemonic) {
    case ZYDIS_MNEMONIC_MOV:
        for (unsigned i = 0; i < 2; i++) {
            if (insn->operand[i].kind == OPERAND_CR || insn->operand[i].kind == OPERAND_DR)
                return X86_PRIVILEGED;
            /* Loading a segment register may fault by the descriptor; reading one shows its privilege level. */
            if (insn->operand[i].kind == OPERAND_SEG)
                return i == 0 ? X86_SENSITIVE : X86_CRITICAL;
        }
        return X86_INNOCUOUS;
    case ZYDIS_MNEMONIC_PUSH:
        return insn->operand[0].kind == OPERAND_SEG ? X86_CRITICAL : X86_INNOCUOUS;
    case ZYDIS_MNEMONIC_POP:
        return insn->operand[0].kind == OPERAND_SEG ? X86_SENSITIVE : X86_INNOCUOUS;
    case ZYDIS_MNEMONIC_JMP:
    case ZYDIS_MNEMONIC_CALL:
    case ZYDIS_MNEMONIC_RET:
        return x86_is_far(insn) ? X86_SENSITIVE : X86_INNOCUOUS;
    }
    return insn->mnemonic <= ZYDIS_MNEMONIC_MAX_VALUE ? table[insn->mnemonic] : X86_SENSITIVE;
}
