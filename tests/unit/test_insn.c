/*
 * Decoding: operands, sizes, segments, prefixes and encoding positions of known instructions, in all code sizes;
 * bytes that are no instruction; random bytes.
 */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"
#include "isa/x86/cpu.h"
#include "isa/x86/insn.h"

/* Hexadecimal with blanks. Returns x86_decode()'s value. */
static int decode(struct x86_insn *insn, unsigned code_size, const char *hex, bool *gp)
{
    uint8_t bytes[32];
    unsigned n = 0;

    for (const char *p = hex; *p;) {
        char digits[3] = { p[0], p[1], 0 };

        if (*p == ' ') {
            p++;
            continue;
        }
        bytes[n++] = (uint8_t)strtoul(digits, NULL, 16);
        p += 2;
    }
    return x86_decode(insn, bytes, n, code_size, gp);
}

static struct x86_insn must(unsigned code_size, const char *hex)
{
    struct x86_insn insn;
    bool gp;

    if (decode(&insn, code_size, hex, &gp) != 0)
        fail_msg("%s does not decode", hex);
    return insn;
}

/* ---- a table: mnemonic, length, operand size and the operands in short ---- */

/*
 * Operands as text: r4:0 register of 4 bytes number 0; h:0 AH; m8 memory of 8 bytes; i immediate; j branch; s:3 segment
 * register; v64:1 vector; c:0, d:0, k:1, t:0 (x87), f far pointer, x other.
 */
static void describe(const struct x86_insn *insn, char *out)
{
    *out = 0;
    for (unsigned i = 0; i < insn->visible; i++) {
        const struct x86_operand *o = &insn->operand[i];

        switch (o->kind) {
        case OPERAND_GPR: out += sprintf(out, "r%u:%u ", o->size, o->reg); break;
        case OPERAND_GPR8H: out += sprintf(out, "h:%u ", o->reg); break;
        case OPERAND_SEG: out += sprintf(out, "s:%u ", o->reg); break;
        case OPERAND_CR: out += sprintf(out, "c:%u ", o->reg); break;
        case OPERAND_DR: out += sprintf(out, "d:%u ", o->reg); break;
        case OPERAND_VEC: out += sprintf(out, "v%u:%u ", o->size, o->reg); break;
        case OPERAND_MM: out += sprintf(out, "mm:%u ", o->reg); break;
        case OPERAND_ST: out += sprintf(out, "t:%u ", o->reg); break;
        case OPERAND_K: out += sprintf(out, "k:%u ", o->reg); break;
        case OPERAND_MEM: out += sprintf(out, "m%u ", o->size); break;
        case OPERAND_IMM: out += sprintf(out, "i%lld ", (long long)insn->imm[o->reg]); break;
        case OPERAND_REL: out += sprintf(out, "j%lld ", (long long)insn->imm[0]); break;
        case OPERAND_FAR: out += sprintf(out, "f%llx:%llx ", (long long)insn->imm[1], (long long)insn->imm[0]); break;
        default: out += sprintf(out, "x "); break;
        }
    }
}

static const struct {
    unsigned code_size;
    const char *bytes;
    ZydisMnemonic mnemonic;
    unsigned length, op_size, addr_size;
    const char *operands;
} table[] = {
    { 8, "04 12", ZYDIS_MNEMONIC_ADD, 2, 1, 8, "r1:0 i18 " },
    { 8, "48 83 c0 ff", ZYDIS_MNEMONIC_ADD, 4, 8, 8, "r8:0 i-1 " },
    { 8, "66 81 c3 00 80", ZYDIS_MNEMONIC_ADD, 5, 2, 8, "r2:3 i-32768 " },
    { 8, "00 e1", ZYDIS_MNEMONIC_ADD, 2, 1, 8, "r1:1 h:0 " },
    { 8, "40 00 e1", ZYDIS_MNEMONIC_ADD, 3, 1, 8, "r1:1 r1:4 " },
    { 8, "45 00 e1", ZYDIS_MNEMONIC_ADD, 3, 1, 8, "r1:9 r1:12 " },
    { 8, "8d 04 8d 10 00 00 00", ZYDIS_MNEMONIC_LEA, 7, 4, 8, "r4:0 m0 " },
    { 8, "48 b8 88 77 66 55 44 33 22 11", ZYDIS_MNEMONIC_MOV, 10, 8, 8, "r8:0 i1234605616436508552 " },
    { 8, "a1 88 77 66 55 44 33 22 11", ZYDIS_MNEMONIC_MOV, 9, 4, 8, "r4:0 m4 " },
    { 8, "d1 e0", ZYDIS_MNEMONIC_SHL, 2, 4, 8, "r4:0 i1 " },
    { 8, "d3 e0", ZYDIS_MNEMONIC_SHL, 2, 4, 8, "r4:0 r1:1 " },
    { 8, "6a 80", ZYDIS_MNEMONIC_PUSH, 2, 8, 8, "i-128 " },
    { 8, "c8 10 00 02", ZYDIS_MNEMONIC_ENTER, 4, 8, 8, "i16 i2 " },
    { 8, "eb fe", ZYDIS_MNEMONIC_JMP, 2, 8, 8, "j-2 " },
    { 8, "e8 00 01 00 00", ZYDIS_MNEMONIC_CALL, 5, 8, 8, "j256 " },
    { 8, "0f 20 c0", ZYDIS_MNEMONIC_MOV, 3, 8, 8, "r8:0 c:0 " },
    { 8, "44 0f 22 c1", ZYDIS_MNEMONIC_MOV, 4, 8, 8, "c:8 r8:1 " },
    { 8, "0f 20 00", ZYDIS_MNEMONIC_MOV, 3, 8, 8, "r8:0 c:0 " },    /* mod is ignored */
    { 8, "0f 23 f8", ZYDIS_MNEMONIC_MOV, 3, 8, 8, "d:7 r8:0 " },
    { 8, "8e d8", ZYDIS_MNEMONIC_MOV, 2, 4, 8, "s:3 r2:0 " },
    { 8, "8c d0", ZYDIS_MNEMONIC_MOV, 2, 4, 8, "r4:0 s:2 " },
    { 8, "d8 c1", ZYDIS_MNEMONIC_FADD, 2, 4, 8, "t:0 t:1 " },
    { 8, "0f 6f c1", ZYDIS_MNEMONIC_MOVQ, 3, 4, 8, "mm:0 mm:1 " },
    { 8, "0f 58 00", ZYDIS_MNEMONIC_ADDPS, 3, 4, 8, "v16:0 m16 " },
    { 8, "c5 f4 58 c2", ZYDIS_MNEMONIC_VADDPS, 4, 4, 8, "v32:0 v32:1 v32:2 " },
    { 8, "62 f1 74 49 58 c2", ZYDIS_MNEMONIC_VADDPS, 6, 4, 8, "v64:0 v64:1 v64:2 " },
    { 8, "62 a1 74 40 58 c2", ZYDIS_MNEMONIC_VADDPS, 6, 4, 8, "v64:16 v64:17 v64:18 " },
    { 8, "62 f1 75 48 76 c2", ZYDIS_MNEMONIC_VPCMPEQD, 6, 4, 8, "k:0 v64:1 v64:2 " },
    { 8, "f3 0f 1e fa", ZYDIS_MNEMONIC_NOP, 4, 4, 8, "r4:2 r4:7 " },
    { 8, "0f 1a 00", ZYDIS_MNEMONIC_NOP, 3, 4, 8, "m0 " },
    { 8, "0f ae 38", ZYDIS_MNEMONIC_CLFLUSH, 3, 4, 8, "m0 " },
    { 8, "0f 01 38", ZYDIS_MNEMONIC_INVLPG, 3, 1, 8, "m0 " },
    { 8, "0f 01 00", ZYDIS_MNEMONIC_SGDT, 3, 8, 8, "m10 " },
    { 8, "66 ed", ZYDIS_MNEMONIC_IN, 2, 2, 8, "r2:0 r2:2 " },
    { 8, "63 c1", ZYDIS_MNEMONIC_MOVSXD, 2, 4, 8, "r4:0 r4:1 " },
    { 8, "f3 0f 09", ZYDIS_MNEMONIC_WBINVD, 3, 4, 8, "" },
    { 8, "f1", ZYDIS_MNEMONIC_INT1, 1, 4, 8, "" },
    { 4, "66 8b 00", ZYDIS_MNEMONIC_MOV, 3, 2, 4, "r2:0 m2 " },
    { 4, "67 8b 00", ZYDIS_MNEMONIC_MOV, 3, 4, 2, "r4:0 m4 " },
    { 4, "40", ZYDIS_MNEMONIC_INC, 1, 4, 4, "r4:0 " },
    { 4, "ea 78 56 34 12 08 00", ZYDIS_MNEMONIC_JMP, 7, 4, 4, "f8:12345678 " },
    { 4, "c4 00", ZYDIS_MNEMONIC_LES, 2, 4, 4, "r4:0 m6 " },
    { 4, "62 00", ZYDIS_MNEMONIC_BOUND, 2, 4, 4, "r4:0 m8 " },
    { 4, "63 c8", ZYDIS_MNEMONIC_ARPL, 2, 4, 4, "r2:0 r2:1 " },
    { 4, "1e", ZYDIS_MNEMONIC_PUSH, 1, 4, 4, "s:3 " },
    { 4, "d6", ZYDIS_MNEMONIC_SALC, 1, 4, 4, "" },
    { 4, "60", ZYDIS_MNEMONIC_PUSHAD, 1, 4, 4, "" },
    { 4, "66 e9 00 80", ZYDIS_MNEMONIC_JMP, 4, 2, 4, "j-32768 " },
    { 2, "b8 34 12", ZYDIS_MNEMONIC_MOV, 3, 2, 2, "r2:0 i4660 " },
    { 2, "66 b8 78 56 34 12", ZYDIS_MNEMONIC_MOV, 6, 4, 2, "r4:0 i305419896 " },
    { 2, "8b 42 05", ZYDIS_MNEMONIC_MOV, 3, 2, 2, "r2:0 m2 " },
    { 2, "ea 00 01 00 f0", ZYDIS_MNEMONIC_JMP, 5, 2, 2, "ff000:100 " },
    { 2, "0f 01 16 10 00", ZYDIS_MNEMONIC_LGDT, 5, 2, 2, "m6 " },
};

static void known_encodings(void **state)
{
    for (unsigned i = 0; i < ARRAY_SIZE(table); i++) {
        struct x86_insn insn = must(table[i].code_size, table[i].bytes);
        char operands[128];

        describe(&insn, operands);
        if (insn.mnemonic != table[i].mnemonic || insn.length != table[i].length || insn.op_size != table[i].op_size ||
            insn.addr_size != table[i].addr_size || strcmp(operands, table[i].operands) != 0)
            fail_msg("%s: %s, length %u, operand size %u, address size %u, operands %s", table[i].bytes,
                     ZydisMnemonicGetString(insn.mnemonic), insn.length, insn.op_size, insn.addr_size, operands);
    }
}

static void addresses(void **state)
{
    struct x86_insn insn;

    insn = must(8, "8b 84 8b 00 01 00 00");
    assert_int_equal(insn.mem.base, RBX);
    assert_int_equal(insn.mem.index, RCX);
    assert_int_equal(insn.mem.scale, 4);
    assert_int_equal(insn.mem.disp, 0x100);
    assert_int_equal(insn.mem.seg, SEG_DS);
    assert_true(insn.has_mem);

    insn = must(8, "8b 05 f0 ff ff ff");
    assert_int_equal(insn.mem.base, X86_REG_RIP);
    assert_int_equal(insn.mem.index, X86_NO_REG);
    assert_int_equal(insn.mem.scale, 0);
    assert_int_equal(insn.mem.disp, -16);

    insn = must(8, "8b 45 00");
    assert_int_equal(insn.mem.seg, SEG_SS);
    insn = must(8, "41 8b 45 00");      /* R13 is not RBP */
    assert_int_equal(insn.mem.seg, SEG_DS);
    insn = must(8, "8b 04 24");
    assert_int_equal(insn.mem.seg, SEG_SS);

    /* In 64-bit code only FS and GS override, whatever comes after them. */
    insn = must(8, "2e 8b 00");
    assert_int_equal(insn.mem.seg, SEG_DS);
    insn = must(8, "64 2e 8b 00");
    assert_int_equal(insn.mem.seg, SEG_FS);
    insn = must(8, "64 65 8b 00");
    assert_int_equal(insn.mem.seg, SEG_GS);
    insn = must(4, "64 2e 8b 00");
    assert_int_equal(insn.mem.seg, SEG_CS);

    insn = must(8, "67 8b 00");
    assert_int_equal(insn.mem.addr_size, 4);
    insn = must(2, "8b 42 05");         /* [BP+SI+5] */
    assert_int_equal(insn.mem.base, RBP);
    assert_int_equal(insn.mem.index, RSI);
    assert_int_equal(insn.mem.scale, 1);
    assert_int_equal(insn.mem.seg, SEG_SS);
    assert_int_equal(insn.mem.addr_size, 2);

    insn = must(8, "a1 88 77 66 55 44 33 22 11");
    assert_int_equal(insn.mem.base, X86_NO_REG);
    assert_int_equal(insn.mem.disp, 0x1122334455667788);
}

static void strings_and_repeats(void **state)
{
    struct x86_insn insn = must(8, "f3 48 a5");

    assert_true(insn.rep && !insn.repne && !insn.has_mem);
    assert_int_equal(insn.mem.base, RSI);
    assert_int_equal(insn.mem.seg, SEG_DS);
    insn = must(8, "64 f2 a4");         /* F2 repeats, too */
    assert_true(insn.rep && !insn.repne);
    assert_int_equal(insn.mem.seg, SEG_FS);
    insn = must(8, "f2 ae");
    assert_true(!insn.rep && insn.repne);
    insn = must(8, "f3 a6");
    assert_true(insn.rep && !insn.repne);
    insn = must(8, "f3 90");
    assert_int_equal(insn.mnemonic, ZYDIS_MNEMONIC_PAUSE);
    assert_false(insn.rep);
    insn = must(8, "f3 c3");
    assert_false(insn.rep || insn.repne);
    insn = must(8, "f2 0f 58 c1");      /* a mandatory prefix repeats nothing */
    assert_false(insn.rep || insn.repne);
    insn = must(8, "d7");
    assert_int_equal(insn.mem.base, RBX);
}

static void encoding_positions(void **state)
{
    struct x86_insn insn = must(8, "66 64 44 0f 6f 84 24 00 01 00 00");    /* MOVDQA XMM8, FS:[RSP+0x100] */

    assert_int_equal(insn.mnemonic, ZYDIS_MNEMONIC_MOVDQA);
    assert_int_equal(insn.prefix_count, 2);
    assert_true(insn.has_rex);
    assert_int_equal(insn.rex_offset, 2);
    assert_int_equal(insn.modrm_offset, 5);
    assert_int_equal(insn.sib_offset, 6);
    assert_int_equal(insn.disp_offset, 7);
    assert_int_equal(insn.disp_size, 4);
    assert_int_equal(insn.imm_size, 0);
    assert_memory_equal(insn.bytes, "\x66\x64\x44\x0f\x6f\x84\x24\x00\x01\x00\x00", 11);

    insn = must(8, "48 66 83 00 7f");   /* REX without effect */
    assert_false(insn.has_rex);
    assert_int_equal(insn.prefix_count, 2);
    assert_int_equal(insn.op_size, 2);
    assert_int_equal(insn.imm_offset, 4);
    assert_int_equal(insn.imm_size, 1);

    insn = must(8, "c4 e2 7d 18 00");   /* VBROADCASTSS YMM0, [RAX] */
    assert_true(insn.has_vex && !insn.has_evex);
    assert_int_equal(insn.vex_size, 3);
    assert_int_equal(insn.vex_offset, 0);

    insn = must(8, "62 f1 74 c9 58 40 01");     /* VADDPS ZMM0{k1}{z}, ZMM1, [RAX+0x40] */
    assert_true(insn.has_evex);
    assert_int_equal(insn.mask_reg, 1);
    assert_true(insn.mask_zeroing);
    assert_false(insn.broadcast);
    assert_int_equal(insn.mem.disp, 64);        /* disp8 is scaled */
    assert_int_equal(insn.disp_size, 1);
    insn = must(8, "62 f1 74 58 58 00");        /* VADDPS ZMM0, ZMM1, [RAX]{1to16} */
    assert_true(insn.broadcast);
    assert_int_equal(insn.mask_reg, 0);
    insn = must(8, "62 f1 74 18 58 c2");        /* a rounding mode is no broadcast */
    assert_false(insn.broadcast);

    insn = must(8, "62 f2 7d 49 90 04 88");     /* VPGATHERDD ZMM0{k1}, [RAX+ZMM1*4] */
    assert_int_equal(insn.mem.vsib_size, 64);
    assert_int_equal(insn.mem.index, 1);
    assert_int_equal(insn.mem.scale, 4);
    assert_int_equal(insn.mask_reg, 1);
}

static void no_instructions(void **state)
{
    static const char *const undefined[] = {
        "06", "60", "d6", "ea", "0f 04", "f0 90", "f0 01 c0", "f0 8b 00", "8e c8", "0f 22 c8", "0f 20 e8",
        "66 c5 f8 58 c0", "48 c5 f8 58 c0", "f0 0f 58 00", "fe f8", "0f c7 c8", "0f b8 c0", "f2 0f 01 fc",
    };
    struct x86_insn insn;
    bool gp;

    for (unsigned i = 0; i < ARRAY_SIZE(undefined); i++) {
        char padded[64];
        int r;

        snprintf(padded, sizeof(padded), "%s 00 00 00 00 00 00 00 00", undefined[i]);
        r = decode(&insn, 8, padded, &gp);
        if (r != -EINVAL || gp)
            fail_msg("%s: %d", undefined[i], r);
    }
    /* Fifteen bytes are the limit, and the sixteenth a #GP. */
    assert_int_equal(decode(&insn, 8, "66 66 66 66 66 66 66 66 66 66 66 66 66 66 90", &gp), 0);
    assert_int_equal(insn.length, 15);
    assert_int_equal(decode(&insn, 8, "66 66 66 66 66 66 66 66 66 66 66 66 66 66 66 90", &gp), -EINVAL);
    assert_true(gp);
    assert_int_equal(decode(&insn, 8, "66 66 66 66 66 66 66 66 66 66 66 66 66 66 66", &gp), -EINVAL);
    assert_true(gp);
    /* Too few bytes. */
    assert_int_equal(decode(&insn, 8, "48 b8 11 22", &gp), -EAGAIN);
    assert_int_equal(decode(&insn, 8, "", &gp), -EAGAIN);
    assert_int_equal(decode(&insn, 8, "66", &gp), -EAGAIN);
}

/* Whatever the bytes, decoding ends, and says the same whether it sees the rest or not. */
static void random_bytes(void **state)
{
    static const unsigned sizes[] = { 2, 4, 8 };
    uint64_t x = 88172645463325252u;

    for (unsigned n = 0; n < 300000; n++) {
        struct x86_insn a, b;
        uint8_t bytes[15];
        bool gp;

        for (unsigned i = 0; i < sizeof(bytes); i++) {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            bytes[i] = (uint8_t)x;
        }
        if (n % 3 == 0)
            bytes[0] = 0x62;
        if (x86_decode(&a, bytes, 15, sizes[n % 3], &gp) != 0)
            continue;
        assert_in_range(a.length, 1, 15);
        assert_in_range(a.operands, 0, X86_MAX_OPERANDS);
        assert_true(a.visible <= a.operands);
        assert_true(a.prefix_count < a.length);
        assert_true(a.mem.seg <= SEG_GS);
        assert_int_equal(x86_decode(&b, bytes, a.length, sizes[n % 3], &gp), 0);
        assert_memory_equal(&a, &b, sizeof(a));
        if (a.length > 1)
            assert_int_equal(x86_decode(&b, bytes, a.length - 1u, sizes[n % 3], &gp), -EAGAIN);
        /* The questions about it end, too. */
        x86_classify(&a);
        x86_system_semantics(&a);
    }
}

static void far_or_near(void **state)
{
    struct x86_insn insn;

    insn = must(8, "ff 20");
    assert_false(x86_is_far(&insn));
    insn = must(8, "48 ff 28");
    assert_true(x86_is_far(&insn));
    insn = must(8, "ff 18");
    assert_true(x86_is_far(&insn));
    insn = must(8, "c3");
    assert_false(x86_is_far(&insn));
    insn = must(8, "48 cb");
    assert_true(x86_is_far(&insn));
    insn = must(8, "e8 cb cb cb cb");
    assert_false(x86_is_far(&insn));
    insn = must(4, "9a 00 00 00 00 08 00");
    assert_true(x86_is_far(&insn));
}

static void bit_counts_by_model(void **state)
{
    struct x86_insn insn;

    x86_decode_offer(false, false);
    insn = must(8, "f3 0f bd c1");
    assert_int_equal(insn.mnemonic, ZYDIS_MNEMONIC_BSR);
    insn = must(8, "f3 0f bc c1");
    assert_int_equal(insn.mnemonic, ZYDIS_MNEMONIC_BSF);
    x86_decode_offer(true, true);
    insn = must(8, "f3 0f bd c1");
    assert_int_equal(insn.mnemonic, ZYDIS_MNEMONIC_LZCNT);
    insn = must(8, "f3 0f bc c1");
    assert_int_equal(insn.mnemonic, ZYDIS_MNEMONIC_TZCNT);
}

static void classes(void **state)
{
    static const struct {
        const char *bytes;
        enum x86_class class;
    } list[] = {
        { "01 c0", X86_INNOCUOUS }, { "8b 00", X86_INNOCUOUS }, { "0f 58 c1", X86_INNOCUOUS }, { "c3", X86_INNOCUOUS },
        { "f4", X86_PRIVILEGED }, { "0f 22 c0", X86_PRIVILEGED }, { "0f 21 c0", X86_PRIVILEGED },
        { "fa", X86_PRIVILEGED }, { "ec", X86_PRIVILEGED }, { "0f 30", X86_PRIVILEGED }, { "0f 01 38", X86_PRIVILEGED },
        { "8e d8", X86_SENSITIVE }, { "0f a1", X86_SENSITIVE }, { "cb", X86_SENSITIVE }, { "0f 05", X86_SENSITIVE },
        { "48 ff 28", X86_SENSITIVE }, { "9d", X86_CRITICAL }, { "8c d8", X86_CRITICAL }, { "0f a0", X86_CRITICAL },
        { "0f 01 e0", X86_CRITICAL }, { "0f a2", X86_CRITICAL }, { "0f 31", X86_CRITICAL }, { "0f 02 c1", X86_CRITICAL },
    };

    for (unsigned i = 0; i < ARRAY_SIZE(list); i++) {
        struct x86_insn insn = must(8, list[i].bytes);

        if (x86_classify(&insn) != list[i].class)
            fail_msg("%s: class %d", list[i].bytes, x86_classify(&insn));
    }
}

/* What is not innocuous has semantics of its own, unless no model offers it; what has is not plain computing. */
static void classes_and_semantics_agree(void **state)
{
    static const char *const innocuous_but_special[] = { "c8 00 00 00", "0f ae 38", "0f 01 fc", "0f 18 08", "0f c7 f0",
                                                          "0f c7 f8", "66 0f ae 38" };
    uint64_t x = 1234567;

    for (unsigned i = 0; i < ARRAY_SIZE(innocuous_but_special); i++) {
        struct x86_insn insn = must(8, innocuous_but_special[i]);

        assert_int_equal(x86_classify(&insn), X86_INNOCUOUS);
        assert_non_null(x86_system_semantics(&insn));
    }
    for (unsigned n = 0; n < 200000; n++) {
        struct x86_insn insn;
        uint8_t bytes[15];
        bool gp;

        for (unsigned i = 0; i < sizeof(bytes); i++) {
            x = x * 6364136223846793005u + 1442695040888963407u;
            bytes[i] = (uint8_t)(x >> 33);
        }
        bytes[0] = n % 2 ? 0x0f : bytes[0];
        if (x86_decode(&insn, bytes, 15, 8, &gp) != 0 || insn.encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY)
            continue;
        if (x86_classify(&insn) == X86_PRIVILEGED && x86_system_semantics(&insn) == NULL &&
            insn.isa_set != ZYDIS_ISA_SET_VTX && insn.isa_set != ZYDIS_ISA_SET_SVM &&
            insn.isa_set != ZYDIS_ISA_SET_SMX && insn.isa_set != ZYDIS_ISA_SET_SGX &&
            insn.isa_set != ZYDIS_ISA_SET_PCONFIG && insn.isa_set != ZYDIS_ISA_SET_SNP &&
            insn.isa_set != ZYDIS_ISA_SET_AMD_INVLPGB && insn.isa_set != ZYDIS_ISA_SET_ENQCMD &&
            insn.isa_set != ZYDIS_ISA_SET_HRESET)
            fail_msg("%s has no semantics", ZydisMnemonicGetString(insn.mnemonic));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(known_encodings),
        cmocka_unit_test(addresses),
        cmocka_unit_test(strings_and_repeats),
        cmocka_unit_test(encoding_positions),
        cmocka_unit_test(no_instructions),
        cmocka_unit_test(random_bytes),
        cmocka_unit_test(far_or_near),
        cmocka_unit_test(bit_counts_by_model),
        cmocka_unit_test(classes),
        cmocka_unit_test(classes_and_semantics_agree),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
