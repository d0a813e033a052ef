/*
 * One decoded x86 instruction, as all engines use it. Made from guest bytes by
 * x86_decode() (Zydis behind it), in the processor's current code size.
 */
#ifndef RINGFORT_ISA_X86_INSN_H
#define RINGFORT_ISA_X86_INSN_H

#include <Zydis/Zydis.h>
#include <stdbool.h>
#include <stdint.h>

#define X86_MAX_INSN 15
#define X86_NO_REG 0xff
#define X86_REG_RIP 16          /* as base only: displacement is then relative to the next instruction */

enum x86_operand_kind {
    OPERAND_NONE,
    OPERAND_GPR,                /* reg 0…15; size 1, 2, 4, 8 */
    OPERAND_GPR8H,              /* AH, CH, DH, BH: reg 0…3 */
    OPERAND_SEG,                /* reg: enum x86_segreg */
    OPERAND_CR, OPERAND_DR,
    OPERAND_VEC,                /* XMM, YMM, ZMM by size 16, 32, 64 */
    OPERAND_MM, OPERAND_ST, OPERAND_K, OPERAND_BND,
    OPERAND_MEM,                /* the one memory operand: insn->mem */
    OPERAND_IMM,                /* insn->imm[reg]; sign-extended as the instruction does */
    OPERAND_REL,                /* branch: insn->imm[0] is the displacement from the next instruction */
    OPERAND_FAR,                /* ptr16:16/32: insn->imm[0] offset, imm[1] selector */
    OPERAND_OTHER,              /* implicit registers such as GDTR, flags, … */
};

struct x86_operand {
    uint8_t kind;               /* enum x86_operand_kind */
    uint8_t reg;
    uint16_t size;              /* bytes; 0: no size (LEA's, CLFLUSH's memory) */
    bool read, write;           /* conditional ones count */
    bool implicit;              /* not in the encoding */
    uint8_t encoding;           /* ZydisOperandEncoding: which field names it */
    uint8_t element;            /* bytes of one element of a vector or vector in memory */
};

struct x86_mem {
    uint8_t base, index;        /* GPR number, X86_REG_RIP (base), or X86_NO_REG; with VSIB: vector number */
    uint8_t scale;              /* 1, 2, 4, 8; 0 without an index */
    uint8_t seg;                /* effective segment, default or prefixed: enum x86_segreg */
    uint8_t addr_size;          /* 2, 4, 8: effective address is truncated to it */
    uint8_t vsib_size;          /* bytes of the vector index register, 0: no VSIB */
    int64_t disp;
};

#define X86_MAX_OPERANDS 6      /* those that assembly syntax shows first, then hidden ones; without the EVEX opmask */

struct x86_insn {
    uint8_t bytes[X86_MAX_INSN];
    uint8_t length;
    uint16_t mnemonic;          /* ZydisMnemonic */
    uint8_t code_size;          /* 2, 4, 8: CS mode it was decoded for */
    uint8_t op_size;            /* effective operand size 1?, 2, 4, 8 */
    uint8_t addr_size;          /* 2, 4, 8 */
    uint8_t encoding;           /* ZydisInstructionEncoding */
    bool lock, rep, repne;      /* rep: F3 as REP/REPE, repne: F2; only where they have that meaning */
    bool has_mem;               /* a memory operand is encoded; else mem describes the hidden one of string
                                   instructions, XLAT, …: the one whose segment can be overridden */
    uint8_t operands;           /* how many of operand[] are filled */
    uint8_t visible;            /* how many of those assembly syntax shows: ADD AL, 1 has two */
    struct x86_operand operand[X86_MAX_OPERANDS];
    struct x86_mem mem;
    int64_t imm[2];
    ZydisISAExt isa_ext;
    ZydisISASet isa_set;
    ZydisInstructionCategory category;
    /* For re-encoding with another memory operand: positions in bytes[] (0: absent) and EVEX facts. */
    uint8_t modrm_offset, sib_offset, disp_offset, disp_size, imm_offset, imm_size;
    uint8_t rex_offset, vex_offset, vex_size, evex_offset;   /* *_offset valid when the prefix is there: see has_* */
    bool has_rex, has_vex, has_evex;
    uint8_t prefix_count;       /* bytes before REX, VEX, EVEX or opcode: legacy prefixes, REX without effect */
    uint8_t mask_reg;           /* EVEX opmask k1…k7, 0: none */
    uint8_t mask_zeroing;
    uint8_t broadcast;          /* EVEX.b with memory: to how many elements, 0: not */
    uint16_t flags_read, flags_written;     /* arithmetic flags, as bits of RFLAGS; undefined ones are in neither */
    bool suppresses_faults;     /* EVEX: elements of the memory operand that the opmask leaves out do not fault */
};

/*
 * Decodes the instruction in bytes[0…len). code_size 2, 4, 8.
 * Returns 0; -EAGAIN: more bytes are needed than len; -EINVAL: no valid instruction (#UD), or longer than 15 bytes (#GP): *gp set.
 * LOCK on an instruction that does not take it is -EINVAL.
 */
int x86_decode(struct x86_insn *insn, const uint8_t *bytes, unsigned len, unsigned code_size, bool *gp);

/*
 * For models without LZCNT or BMI1, which run those opcodes as BSR and BSF. Both are on at start. Before
 * any vCPU runs: all threads share the decoders.
 */
void x86_decode_offer(bool lzcnt, bool tzcnt);

/* CALL, JMP, RET: whether it goes through a code segment selector. */
bool x86_is_far(const struct x86_insn *insn);

/* Intel syntax, for traces. */
void x86_format(char *out, size_t size, const uint8_t *bytes, unsigned len, unsigned code_size, uint64_t rip);

/* Popek and Goldberg. Critical: sensitive, yet does not trap in user mode. */
enum x86_class { X86_INNOCUOUS, X86_PRIVILEGED, X86_SENSITIVE, X86_CRITICAL };
/* From the one table in classify.c. Depends on the mnemonic and, for a few, on operands (MOV to segment, CR, DR). */
enum x86_class x86_classify(const struct x86_insn *insn);

#endif
