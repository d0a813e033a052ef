/*
 * From guest bytes to struct x86_insn, with Zydis behind it.
 *
 * Three decoders, one per code size, are set up once and then only read: any thread may decode. Where
 * processors differ in what bytes mean, the host's vendor decides, because copied instructions run on the
 * host: AMD honours the operand-size prefix on near branches in 64-bit mode, Intel ignores it. Extensions that
 * no model offers and that reuse no-operation opcodes (MPX, CET, CLDEMOTE) decode as NOP.
 *
 * Operands keep Zydis' order: those that assembly syntax shows first (also implied ones such as AL in ADD AL, imm8),
 * hidden ones after them, cut at X86_MAX_OPERANDS. The EVEX opmask is not an operand but mask_reg.
 */
#include <cpuid.h>
#include <errno.h>
#include <pthread.h>
#include <string.h>

#include "isa/x86/insn.h"
#include "isa/x86/state.h"

struct register_info {
    uint8_t kind, number;
    uint8_t size;
};

static pthread_once_t once = PTHREAD_ONCE_INIT;
static ZydisDecoder decoder[3];     /* 16, 32, 64 bit */
static bool amd_branches;
static struct register_info registers[ZYDIS_REGISTER_MAX_VALUE + 1];

static void map_registers(ZydisRegister first, unsigned count, uint8_t kind, unsigned number, uint8_t size)
{
    for (unsigned i = 0; i < count; i++)
        registers[first + i] = (struct register_info){ kind, (uint8_t)(number + i), size };
}

static void setup(void)
{
    static const ZydisMachineMode mode[3] = { ZYDIS_MACHINE_MODE_LEGACY_16, ZYDIS_MACHINE_MODE_LEGACY_32,
                                              ZYDIS_MACHINE_MODE_LONG_64 };
    static const ZydisStackWidth stack[3] = { ZYDIS_STACK_WIDTH_16, ZYDIS_STACK_WIDTH_32, ZYDIS_STACK_WIDTH_64 };
    unsigned eax, ebx = 0, ecx, edx;

    __get_cpuid(0, &eax, &ebx, &ecx, &edx);
    amd_branches = ebx == signature_AMD_ebx || ebx == 0x6f677948;   /* "Auth", Hygon's "Hygo" */
    for (unsigned i = 0; i < 3; i++) {
        ZydisDecoderInit(&decoder[i], mode[i], stack[i]);
        ZydisDecoderEnableMode(&decoder[i], ZYDIS_DECODER_MODE_AMD_BRANCHES, amd_branches);
        ZydisDecoderEnableMode(&decoder[i], ZYDIS_DECODER_MODE_MPX, ZYAN_FALSE);
        ZydisDecoderEnableMode(&decoder[i], ZYDIS_DECODER_MODE_CET, ZYAN_FALSE);
        ZydisDecoderEnableMode(&decoder[i], ZYDIS_DECODER_MODE_CLDEMOTE, ZYAN_FALSE);
    }

    map_registers(ZYDIS_REGISTER_NONE, ZYDIS_REGISTER_MAX_VALUE + 1, OPERAND_OTHER, 0, 0);
    map_registers(ZYDIS_REGISTER_AL, 4, OPERAND_GPR, 0, 1);
    map_registers(ZYDIS_REGISTER_AH, 4, OPERAND_GPR8H, 0, 1);
    map_registers(ZYDIS_REGISTER_SPL, 12, OPERAND_GPR, 4, 1);
    map_registers(ZYDIS_REGISTER_AX, 16, OPERAND_GPR, 0, 2);
    map_registers(ZYDIS_REGISTER_EAX, 16, OPERAND_GPR, 0, 4);
    map_registers(ZYDIS_REGISTER_RAX, 16, OPERAND_GPR, 0, 8);
    map_registers(ZYDIS_REGISTER_ST0, 8, OPERAND_ST, 0, 10);
    map_registers(ZYDIS_REGISTER_MM0, 8, OPERAND_MM, 0, 8);
    map_registers(ZYDIS_REGISTER_XMM0, 32, OPERAND_VEC, 0, 16);
    map_registers(ZYDIS_REGISTER_YMM0, 32, OPERAND_VEC, 0, 32);
    map_registers(ZYDIS_REGISTER_ZMM0, 32, OPERAND_VEC, 0, 64);
    map_registers(ZYDIS_REGISTER_ES, 6, OPERAND_SEG, SEG_ES, 2);
    map_registers(ZYDIS_REGISTER_CR0, 16, OPERAND_CR, 0, 8);
    map_registers(ZYDIS_REGISTER_DR0, 16, OPERAND_DR, 0, 8);
    map_registers(ZYDIS_REGISTER_K0, 8, OPERAND_K, 0, 8);
    map_registers(ZYDIS_REGISTER_BND0, 4, OPERAND_BND, 0, 16);
}

void x86_decode_offer(bool lzcnt, bool tzcnt)
{
    pthread_once(&once, setup);
    for (unsigned i = 0; i < 3; i++) {
        ZydisDecoderEnableMode(&decoder[i], ZYDIS_DECODER_MODE_LZCNT, lzcnt);
        ZydisDecoderEnableMode(&decoder[i], ZYDIS_DECODER_MODE_TZCNT, tzcnt);
    }
}

static uint8_t address_register(ZydisRegister reg)
{
    const struct register_info *r = &registers[reg];

    if (reg == ZYDIS_REGISTER_RIP || reg == ZYDIS_REGISTER_EIP || reg == ZYDIS_REGISTER_IP)
        return X86_REG_RIP;
    return r->kind == OPERAND_GPR || r->kind == OPERAND_VEC ? r->number : X86_NO_REG;
}

static void fill_mem(struct x86_insn *insn, const ZydisDecodedInstructionRaw *raw, const ZydisDecodedOperandMem *m)
{
    struct x86_mem *mem = &insn->mem;

    mem->base = address_register(m->base);
    mem->index = address_register(m->index);
    mem->scale = mem->index == X86_NO_REG ? 0 : m->scale;
    mem->vsib_size = m->type == ZYDIS_MEMOP_TYPE_VSIB ? registers[m->index].size : 0;
    mem->disp = m->disp.value;
    /* This SIB byte means no base but a displacement, whatever REX.B says; Zydis takes it for R13. */
    if (raw->modrm.mod == 0 && raw->modrm.rm == 4 && raw->sib.base == 5 && raw->sib.offset) {
        mem->base = X86_NO_REG;
        mem->disp = raw->disp.value;
    }
    mem->seg = registers[m->segment].kind == OPERAND_SEG ? registers[m->segment].number : SEG_DS;
    mem->addr_size = insn->addr_size;
}

/* Memory operands that only name an address, or a cache line: no bytes are accessed as an operand. */
static bool names_address_only(uint16_t mnemonic)
{
    switch (mnemonic) {
    case ZYDIS_MNEMONIC_LEA:
    case ZYDIS_MNEMONIC_NOP:
    case ZYDIS_MNEMONIC_INVLPG:
    case ZYDIS_MNEMONIC_CLFLUSH:
    case ZYDIS_MNEMONIC_CLFLUSHOPT:
    case ZYDIS_MNEMONIC_CLWB:
    case ZYDIS_MNEMONIC_PREFETCH:
    case ZYDIS_MNEMONIC_PREFETCHNTA:
    case ZYDIS_MNEMONIC_PREFETCHT0:
    case ZYDIS_MNEMONIC_PREFETCHT1:
    case ZYDIS_MNEMONIC_PREFETCHT2:
    case ZYDIS_MNEMONIC_PREFETCHW:
    case ZYDIS_MNEMONIC_PREFETCHWT1:
        return true;
    default:
        return false;
    }
}

static void fill_operand(struct x86_insn *insn, const ZydisDecodedInstructionRaw *raw, struct x86_operand *o,
                         const ZydisDecodedOperand *z, unsigned *immediates)
{
    const struct register_info *r;

    o->size = z->size / 8;
    o->read = (z->actions & ZYDIS_OPERAND_ACTION_MASK_READ) != 0;
    o->write = (z->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE) != 0;
    o->encoding = (uint8_t)z->encoding;
    o->element = (uint8_t)(z->element_size / 8);
    o->implicit = z->visibility != ZYDIS_OPERAND_VISIBILITY_EXPLICIT;
    switch (z->type) {
    case ZYDIS_OPERAND_TYPE_REGISTER:
        r = &registers[z->reg.value];
        o->kind = r->kind;
        o->reg = r->number;
        if (r->size != 0)
            o->size = r->size;
        break;
    case ZYDIS_OPERAND_TYPE_MEMORY:
        o->kind = OPERAND_MEM;
        if (z->visibility != ZYDIS_OPERAND_VISIBILITY_HIDDEN) {
            insn->has_mem = true;
            fill_mem(insn, raw, &z->mem);
            if (names_address_only(insn->mnemonic))
                o->size = 0;
        } else if (!insn->has_mem && z->mem.base != ZYDIS_REGISTER_NONE) {
            uint8_t base = address_register(z->mem.base);

            /*
             * String instructions, XLAT and the like: of the two of MOVS and CMPS, the operand whose segment
             * can be overridden. Stack operands are not described.
             */
            if (base != RSP && base != RBP && (insn->mem.base == X86_NO_REG || base == RSI))
                fill_mem(insn, raw, &z->mem);
        }
        break;
    case ZYDIS_OPERAND_TYPE_POINTER:
        o->kind = OPERAND_FAR;
        insn->imm[0] = z->ptr.offset;
        insn->imm[1] = z->ptr.segment;
        break;
    case ZYDIS_OPERAND_TYPE_IMMEDIATE:
        o->kind = z->imm.is_relative ? OPERAND_REL : OPERAND_IMM;
        o->reg = (uint8_t)(*immediates < 2 ? *immediates : 1);
        insn->imm[o->reg] = z->imm.value.s;
        ++*immediates;
        break;
    default:
        o->kind = OPERAND_OTHER;
        break;
    }
}

static bool is_near_branch(const ZydisDecodedInstruction *z)
{
    return (z->meta.branch_type == ZYDIS_BRANCH_TYPE_SHORT || z->meta.branch_type == ZYDIS_BRANCH_TYPE_NEAR ||
            (z->meta.category == ZYDIS_CATEGORY_RET && z->mnemonic == ZYDIS_MNEMONIC_RET && z->opcode != 0xcb &&
             z->opcode != 0xca));
}

static bool is_legacy_prefix(uint8_t b)
{
    return b == 0x66 || b == 0x67 || b == 0xf0 || b == 0xf2 || b == 0xf3 || b == 0x2e || b == 0x36 || b == 0x3e ||
           b == 0x26 || b == 0x64 || b == 0x65;
}

static uint8_t broadcast_count(const ZydisDecodedInstruction *z)
{
    switch (z->avx.broadcast.mode) {
    case ZYDIS_BROADCAST_MODE_1_TO_2: return 2;
    case ZYDIS_BROADCAST_MODE_1_TO_4: return 4;
    case ZYDIS_BROADCAST_MODE_1_TO_8: return 8;
    case ZYDIS_BROADCAST_MODE_1_TO_16: return 16;
    default: return 32;
    }
}

/* The exception classes of SDM vol. 2A 2.8 without "NF". */
static bool suppresses_faults(ZydisExceptionClass c)
{
    switch (c) {
    case ZYDIS_EXCEPTION_CLASS_E1: case ZYDIS_EXCEPTION_CLASS_E2: case ZYDIS_EXCEPTION_CLASS_E3: case ZYDIS_EXCEPTION_CLASS_E4:
    case ZYDIS_EXCEPTION_CLASS_E5: case ZYDIS_EXCEPTION_CLASS_E6: case ZYDIS_EXCEPTION_CLASS_E10:
    case ZYDIS_EXCEPTION_CLASS_E11:
        return true;
    default:
        return false;
    }
}

static void fill_encoding(struct x86_insn *insn, const ZydisDecodedInstruction *z)
{
    const ZydisDecodedInstructionRaw *raw = &z->raw;
    unsigned n = 0;

    insn->encoding = (uint8_t)z->encoding;
    insn->modrm_offset = z->attributes & ZYDIS_ATTRIB_HAS_MODRM ? raw->modrm.offset : 0;
    insn->sib_offset = z->attributes & ZYDIS_ATTRIB_HAS_SIB ? raw->sib.offset : 0;
    insn->disp_offset = raw->disp.size != 0 ? raw->disp.offset : 0;
    insn->disp_size = raw->disp.size / 8;
    insn->imm_offset = raw->imm[0].size != 0 ? raw->imm[0].offset : 0;
    insn->imm_size = (raw->imm[0].size + raw->imm[1].size) / 8;
    if (z->attributes & ZYDIS_ATTRIB_HAS_REX) {
        insn->has_rex = true;
        insn->rex_offset = raw->rex.offset;
    }
    if (z->attributes & ZYDIS_ATTRIB_HAS_VEX) {
        insn->has_vex = true;
        insn->vex_offset = raw->vex.offset;
        insn->vex_size = raw->vex.size;
    }
    if (z->attributes & ZYDIS_ATTRIB_HAS_EVEX) {
        insn->has_evex = true;
        insn->evex_offset = raw->evex.offset;
        insn->mask_reg = raw->evex.aaa;
        insn->mask_zeroing = raw->evex.z;
        insn->broadcast = raw->evex.b && raw->modrm.mod != 3 ? broadcast_count(z) : 0;
        insn->suppresses_faults = suppresses_faults(z->meta.exception_class);
    }
    /* A REX prefix that another prefix follows has no effect; it counts as one of those in front. */
    while (n < insn->length && (is_legacy_prefix(insn->bytes[n]) ||
           (insn->code_size == 8 && (insn->bytes[n] & 0xf0) == 0x40 && !(insn->has_rex && n == insn->rex_offset))))
        n++;
    insn->prefix_count = (uint8_t)n;
}

/* On AMD processors a repeat prefix, the last one, decides between LOOPE and LOOPNE. */
static uint16_t amd_loop(const ZydisDecodedInstruction *z)
{
    for (unsigned i = z->raw.prefix_count; i-- > 0;) {
        if (z->raw.prefixes[i].value == 0xf3)
            return ZYDIS_MNEMONIC_LOOPE;
        if (z->raw.prefixes[i].value == 0xf2)
            return ZYDIS_MNEMONIC_LOOPNE;
    }
    return (uint16_t)z->mnemonic;
}

/* F3 90 is PAUSE, but with REX.B the register counts: XCHG with R8. Made from the form without F3. */
static void make_xchg_r8(struct x86_insn *insn, const ZydisDecodedInstruction *z)
{
    static const struct x86_operand operand = { .kind = OPERAND_GPR, .read = true, .write = true };

    insn->mnemonic = ZYDIS_MNEMONIC_XCHG;
    insn->rep = false;
    insn->op_size = z->raw.rex.W ? 8 : z->attributes & ZYDIS_ATTRIB_HAS_OPERANDSIZE ? 2 : 4;
    insn->operand[0] = insn->operand[1] = operand;
    insn->operand[0].reg = R8;
    insn->operand[0].size = insn->operand[1].size = insn->op_size;
    insn->operand[0].encoding = ZYDIS_OPERAND_ENCODING_OPCODE;
    insn->operand[1].encoding = ZYDIS_OPERAND_ENCODING_NONE;
    insn->operands = insn->visible = 2;
}

int x86_decode(struct x86_insn *insn, const uint8_t *memory, unsigned len, unsigned code_size, bool *gp)
{
    uint8_t bytes[X86_MAX_INSN + 1];
    const ZydisDecoder *d = &decoder[code_size == 8 ? 2 : code_size == 4 ? 1 : 0];
    ZydisDecodedInstruction z;
    ZydisDecodedOperand operand[ZYDIS_MAX_OPERAND_COUNT];
    ZydisDecoderContext context;
    ZyanStatus status;
    unsigned count, immediates = 0;

    pthread_once(&once, setup);
    *gp = false;
    /* What is looked at must not change any more: it may end up as host code, and other vCPUs write guest memory. */
    len = len > sizeof(bytes) ? sizeof(bytes) : len;
    memcpy(bytes, memory, len);
    __asm__ volatile("" : "+m"(bytes));
    /* One byte beyond the limit lets Zydis tell "too long" from "more to come". */
    status = ZydisDecoderDecodeInstruction(d, &context, bytes, len, &z);
    if (!ZYAN_SUCCESS(status)) {
        if (status == ZYDIS_STATUS_NO_MORE_DATA && len < X86_MAX_INSN)
            return -EAGAIN;
        *gp = status == ZYDIS_STATUS_NO_MORE_DATA || status == ZYDIS_STATUS_INSTRUCTION_TOO_LONG;
        return -EINVAL;
    }
    /* 0F 0D is PREFETCH; with a register Intel processors let it pass. */
    if (amd_branches && z.opcode_map == ZYDIS_OPCODE_MAP_0F && z.opcode == 0x0d && z.raw.modrm.mod == 3)
        return -EINVAL;
    /* Intel processors have no SYSRET outside 64-bit mode. */
    if (!amd_branches && z.mnemonic == ZYDIS_MNEMONIC_SYSRET && code_size != 8)
        return -EINVAL;
    /* CLZERO has no meaning with these, which Zydis overlooks. */
    if (z.mnemonic == ZYDIS_MNEMONIC_CLZERO)
        for (unsigned i = 0; i < z.raw.prefix_count; i++)
            if (z.raw.prefixes[i].value == 0xf2 || z.raw.prefixes[i].value == 0xf3)
                return -EINVAL;
    /* There is no VPINSRQ or VPEXTRQ outside 64-bit mode, nor are they the D form then. */
    if (code_size != 8 && z.encoding == ZYDIS_INSTRUCTION_ENCODING_VEX && z.raw.vex.W &&
        (z.mnemonic == ZYDIS_MNEMONIC_VPINSRD || z.mnemonic == ZYDIS_MNEMONIC_VPEXTRD))
        return -EINVAL;
    count = z.operand_count;
    if (!ZYAN_SUCCESS(ZydisDecoderDecodeOperands(d, &context, &z, operand, (ZyanU8)count)))
        return -EINVAL;

    memset(insn, 0, sizeof(*insn));
    memcpy(insn->bytes, bytes, z.length);
    insn->length = z.length;
    insn->mnemonic = (uint16_t)z.mnemonic;
    insn->code_size = (uint8_t)code_size;
    insn->op_size = z.operand_width / 8;
    insn->addr_size = z.address_width / 8;
    insn->isa_ext = z.meta.isa_ext;
    insn->isa_set = z.meta.isa_set;
    insn->category = z.meta.category;
    insn->lock = (z.attributes & ZYDIS_ATTRIB_HAS_LOCK) != 0;
    if (z.attributes & (ZYDIS_ATTRIB_HAS_REP | ZYDIS_ATTRIB_HAS_REPE))
        insn->rep = true;
    else if (z.attributes & ZYDIS_ATTRIB_HAS_REPNE) {
        /* F2 repeats the instructions that do not compare like F3. */
        insn->rep = (z.attributes & ZYDIS_ATTRIB_ACCEPTS_REP) != 0;
        insn->repne = !insn->rep;
    }
    insn->mem.base = insn->mem.index = X86_NO_REG;
    insn->mem.seg = SEG_DS;
    insn->mem.addr_size = insn->addr_size;

    for (unsigned i = 0; i < count && insn->operands < X86_MAX_OPERANDS; i++) {
        if (operand[i].encoding == ZYDIS_OPERAND_ENCODING_MASK)
            continue;
        fill_operand(insn, &z.raw, &insn->operand[insn->operands], &operand[i], &immediates);
        insn->operands++;
        if (i < z.operand_count_visible)
            insn->visible++;
    }
    fill_encoding(insn, &z);
    if (z.cpu_flags) {
        insn->flags_read = z.cpu_flags->tested & RFLAGS_ARITH;
        insn->flags_written = (z.cpu_flags->modified | z.cpu_flags->set_0 | z.cpu_flags->set_1) & RFLAGS_ARITH;
    }

    if (amd_branches && insn->mnemonic == ZYDIS_MNEMONIC_PAUSE && insn->has_rex && z.raw.rex.B)
        make_xchg_r8(insn, &z);
    if (amd_branches && (insn->mnemonic == ZYDIS_MNEMONIC_LOOPE || insn->mnemonic == ZYDIS_MNEMONIC_LOOPNE))
        insn->mnemonic = amd_loop(&z);

    /* MOVSXD to 16 bits reads 16 on Intel's processors, 32 on AMD's. */
    if (!amd_branches && insn->mnemonic == ZYDIS_MNEMONIC_MOVSXD && insn->op_size == 2)
        insn->operand[1].size = insn->operand[1].element = 2;

    /* Zydis widens these; an AMD processor takes 16 bits from memory or stack and truncates RIP. */
    if (amd_branches && code_size == 8 && (z.attributes & ZYDIS_ATTRIB_HAS_OPERANDSIZE) &&
        !(insn->has_rex && z.raw.rex.W) && is_near_branch(&z)) {
        insn->op_size = 2;
        if (insn->visible > 0 && (insn->operand[0].kind == OPERAND_GPR || insn->operand[0].kind == OPERAND_MEM))
            insn->operand[0].size = 2;
    }
    return 0;
}

bool x86_is_far(const struct x86_insn *insn)
{
    unsigned opcode_offset = insn->prefix_count + insn->has_rex;
    uint8_t opcode = insn->bytes[opcode_offset];

    if (opcode == 0xff) {
        unsigned reg = insn->bytes[insn->modrm_offset] >> 3 & 7;

        return reg == 3 || reg == 5;
    }
    return opcode == 0x9a || opcode == 0xea || opcode == 0xca || opcode == 0xcb;
}

void x86_format(char *out, size_t size, const uint8_t *bytes, unsigned len, unsigned code_size, uint64_t rip)
{
    const ZydisDecoder *d = &decoder[code_size == 8 ? 2 : code_size == 4 ? 1 : 0];
    ZydisDecodedInstruction z;
    ZydisDecodedOperand operand[ZYDIS_MAX_OPERAND_COUNT];
    ZydisFormatter formatter;

    if (size == 0)
        return;
    pthread_once(&once, setup);
    ZydisFormatterInit(&formatter, ZYDIS_FORMATTER_STYLE_INTEL);
    if (!ZYAN_SUCCESS(ZydisDecoderDecodeFull(d, bytes, len, &z, operand)) ||
        !ZYAN_SUCCESS(ZydisFormatterFormatInstruction(&formatter, &z, operand, z.operand_count_visible, out, size,
                                                      rip, NULL))) {
        static const char bad[] = "(bad)";

        memcpy(out, bad, size < sizeof(bad) ? size : sizeof(bad));
        out[size - 1] = 0;
    }
}
