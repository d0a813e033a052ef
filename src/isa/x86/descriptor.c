/*
 * Instructions on descriptor tables, selectors and segment bases. The loading itself, with its checks, is
 * segment.c's. SDM vol. 2. In the vCPU's thread.
 */
#include "isa/x86/mmu.h"
#include "isa/x86/segment.h"
#include "isa/x86/system.h"

/* User-mode instruction prevention: SGDT, SIDT, SLDT, STR, SMSW show where the kernel keeps its tables. */
static void umip(struct x86_cpu *cpu)
{
    if ((cpu->s.cr4 & CR4_UMIP) && cpu->cpl != 0)
        x86_raise_error(cpu, X86_GP, 0);
}

static void require_protected_mode(struct x86_cpu *cpu)
{
    if (!x86_in_protected_mode(cpu))
        x86_raise(cpu, X86_UD);
}

/* ---- GDTR and IDTR ---- */

static void store_table(struct x86_cpu *cpu, const struct x86_insn *insn, const struct x86_table *t)
{
    uint8_t image[10];
    unsigned size = cpu->code_size == 8 ? 10 : 6;

    umip(cpu);
    __builtin_memcpy(image, &t->limit, 2);
    __builtin_memcpy(image + 2, &t->base, 8);
    x86_write_bytes(cpu, x86_linear(cpu, insn, size, true), image, size);
}

void x86_insn_sgdt(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    store_table(cpu, insn, &cpu->s.gdt);
}

void x86_insn_sidt(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    store_table(cpu, insn, &cpu->s.idt);
}

static struct x86_table read_table(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    struct x86_table t = { 0 };
    uint8_t image[10] = { 0 };
    unsigned size = cpu->code_size == 8 ? 10 : 6;

    x86_require_cpl0(cpu);
    x86_read_bytes(cpu, x86_linear(cpu, insn, size, false), image, size);
    __builtin_memcpy(&t.limit, image, 2);
    __builtin_memcpy(&t.base, image + 2, 8);
    if (cpu->code_size != 8 && insn->op_size == 2)
        t.base &= 0xffffff;
    if (!x86_canonical(cpu, t.base))
        x86_raise_error(cpu, X86_GP, 0);
    return t;
}

void x86_insn_lgdt(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    cpu->s.gdt = read_table(cpu, insn);
}

void x86_insn_lidt(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    cpu->s.idt = read_table(cpu, insn);
}

/* ---- selectors ---- */

/* A selector or machine status word: 16 bits to memory, zero-extended to the operand size in a register. */
static void store_selector(struct x86_cpu *cpu, const struct x86_insn *insn, uint16_t selector)
{
    const struct x86_operand *o = &insn->operand[0];

    if (o->kind == OPERAND_GPR)
        x86_set_gpr(cpu, o->reg, selector, insn->op_size == 1 ? 2 : insn->op_size);
    else
        x86_write16(cpu, x86_linear(cpu, insn, 2, true), selector);
}

void x86_insn_sldt(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    require_protected_mode(cpu);
    umip(cpu);
    store_selector(cpu, insn, cpu->s.ldtr.selector);
}

void x86_insn_str(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    require_protected_mode(cpu);
    umip(cpu);
    store_selector(cpu, insn, cpu->s.tr.selector);
}

void x86_insn_lldt(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    require_protected_mode(cpu);
    x86_require_cpl0(cpu);
    x86_load_ldt(cpu, (uint16_t)x86_read_operand(cpu, insn, 0, 2));
}

void x86_insn_ltr(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    require_protected_mode(cpu);
    x86_require_cpl0(cpu);
    x86_load_task_register(cpu, (uint16_t)x86_read_operand(cpu, insn, 0, 2));
}

static void set_zf(struct x86_cpu *cpu, bool zf)
{
    uint64_t flags = x86_rflags(cpu) & ~(uint64_t)RFLAGS_ZF;

    x86_set_arith(cpu, flags | (zf ? RFLAGS_ZF : 0));
}

/* Whether a descriptor that is no conforming code segment may be seen from here. */
static bool visible(const struct x86_cpu *cpu, uint16_t selector, uint64_t d)
{
    unsigned rpl = selector & 3;

    return desc_is_conforming(d) || (desc_dpl(d) >= cpu->cpl && desc_dpl(d) >= rpl);
}

/* System descriptor types that LAR and LSL know, one bit each (SDM vol. 2, tables at LAR and LSL). */
#define LAR_TYPES (1u << DESC_TSS16 | 1u << DESC_LDT | 1u << DESC_TSS16_BUSY | 1u << DESC_CALL_GATE16 | \
                   1u << DESC_TASK_GATE | 1u << DESC_TSS | 1u << DESC_TSS_BUSY | 1u << DESC_CALL_GATE)
#define LAR_TYPES_LONG (1u << DESC_LDT | 1u << DESC_TSS | 1u << DESC_TSS_BUSY | 1u << DESC_CALL_GATE)
#define LSL_TYPES (1u << DESC_TSS16 | 1u << DESC_LDT | 1u << DESC_TSS16_BUSY | 1u << DESC_TSS | 1u << DESC_TSS_BUSY)
#define LSL_TYPES_LONG (1u << DESC_LDT | 1u << DESC_TSS | 1u << DESC_TSS_BUSY)

/* Reads the source selector and its descriptor: true when the instruction may show it. */
static bool inspect(struct x86_cpu *cpu, const struct x86_insn *insn, unsigned operand, unsigned system_types,
                    uint64_t *d)
{
    uint16_t selector;

    require_protected_mode(cpu);
    selector = (uint16_t)x86_read_operand(cpu, insn, operand, 2);
    if (!x86_read_descriptor(cpu, selector, d))
        return false;
    if (!desc_s(*d) && !(system_types >> desc_type(*d) & 1))
        return false;
    return visible(cpu, selector, *d);
}

void x86_insn_lar(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    uint64_t d;
    bool ok = inspect(cpu, insn, 1, cpu->long_mode ? LAR_TYPES_LONG : LAR_TYPES, &d);

    set_zf(cpu, ok);
    if (ok)
        x86_set_gpr(cpu, insn->operand[0].reg, d >> 32 & 0xf0ff00, insn->op_size);
}

void x86_insn_lsl(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    uint64_t d;
    bool ok = inspect(cpu, insn, 1, cpu->long_mode ? LSL_TYPES_LONG : LSL_TYPES, &d);

    set_zf(cpu, ok);
    if (ok)
        x86_set_gpr(cpu, insn->operand[0].reg, desc_limit(d), insn->op_size);
}

void x86_insn_verr(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    uint64_t d;
    bool ok = inspect(cpu, insn, 0, 0, &d);

    /* Data can always be read, code where it says so. */
    set_zf(cpu, ok && (!desc_is_code(d) || (desc_type(d) & 2)));
}

void x86_insn_verw(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    uint64_t d;
    bool ok = inspect(cpu, insn, 0, 0, &d);

    set_zf(cpu, ok && desc_is_writable_data(d));
}

void x86_insn_arpl(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    uint16_t source = (uint16_t)x86_get_gpr(cpu, insn->operand[1].reg, 2);
    const struct x86_operand *o = &insn->operand[0];
    uint16_t value;
    gva_t va = 0;
    bool adjust;

    require_protected_mode(cpu);
    if (o->kind == OPERAND_GPR) {
        value = (uint16_t)x86_get_gpr(cpu, o->reg, 2);
    } else {
        va = x86_linear(cpu, insn, 2, true);
        x86_probe_write(cpu, va, 2);
        value = x86_read16(cpu, va);
    }
    adjust = (value & 3) < (source & 3);
    if (adjust) {
        value = (value & ~3) | (source & 3);
        if (o->kind == OPERAND_GPR)
            x86_set_gpr(cpu, o->reg, value, 2);
        else
            x86_write16(cpu, va, value);
    }
    set_zf(cpu, adjust);
}

/* ---- segment registers ---- */

void x86_insn_mov_from_seg(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    store_selector(cpu, insn, cpu->s.seg[insn->operand[1].reg].selector);
}

void x86_insn_mov_to_seg(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    unsigned seg = insn->operand[0].reg;

    x86_load_segment(cpu, seg, (uint16_t)x86_read_operand(cpu, insn, 1, 2));
    if (seg == SEG_SS)
        cpu->s.interrupt_shadow = 2;
}

void x86_insn_push_seg(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    uint16_t selector = cpu->s.seg[insn->operand[0].reg].selector;
    struct x86_stack st;

    if (insn->op_size != 4 || cpu->amd) {
        x86_push(cpu, selector, insn->op_size);
        return;
    }
    /* Intel's processors store 16 bits of the 32 that it takes on the stack (SDM vol. 2B, PUSH). */
    x86_stack_current(cpu, &st);
    x86_stack_skip(&st, -2ull);
    x86_stack_push(cpu, &st, selector, 2);
    x86_stack_commit(cpu, &st);
}

void x86_insn_pop_seg(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    unsigned seg = insn->operand[0].reg;
    struct x86_stack st;
    uint16_t selector;

    x86_stack_current(cpu, &st);
    /* Only 16 bits are read, whatever the pointer moves by. */
    selector = (uint16_t)x86_stack_pop(cpu, &st, 2);
    x86_stack_skip(&st, insn->op_size - 2u);
    x86_load_segment(cpu, seg, selector);
    x86_stack_commit(cpu, &st);
    if (seg == SEG_SS)
        cpu->s.interrupt_shadow = 2;
}

void x86_insn_load_far_pointer(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    unsigned size = insn->op_size;
    gva_t va = x86_linear(cpu, insn, size + 2, false);
    uint8_t image[10];
    uint64_t offset = 0;
    uint16_t selector;
    unsigned seg;

    switch (insn->mnemonic) {
    case ZYDIS_MNEMONIC_LDS:
        seg = SEG_DS;
        break;
    case ZYDIS_MNEMONIC_LES:
        seg = SEG_ES;
        break;
    case ZYDIS_MNEMONIC_LSS:
        seg = SEG_SS;
        break;
    case ZYDIS_MNEMONIC_LFS:
        seg = SEG_FS;
        break;
    default:
        seg = SEG_GS;
        break;
    }
    x86_read_bytes(cpu, va, image, size + 2);
    __builtin_memcpy(&offset, image, size);
    __builtin_memcpy(&selector, image + size, 2);
    x86_load_segment(cpu, seg, selector);
    x86_set_gpr(cpu, insn->operand[0].reg, offset, size);
}

/* ---- FS and GS bases ---- */

static void require_fsgsbase(struct x86_cpu *cpu)
{
    if (cpu->code_size != 8 || !(cpu->s.cr4 & CR4_FSGSBASE))
        x86_raise(cpu, X86_UD);
}

static void read_base(struct x86_cpu *cpu, const struct x86_insn *insn, unsigned seg)
{
    require_fsgsbase(cpu);
    x86_set_gpr(cpu, insn->operand[0].reg, cpu->s.seg[seg].base, insn->op_size == 8 ? 8 : 4);
}

static void write_base(struct x86_cpu *cpu, const struct x86_insn *insn, unsigned seg)
{
    uint64_t base = x86_get_gpr(cpu, insn->operand[0].reg, insn->op_size == 8 ? 8 : 4);

    require_fsgsbase(cpu);
    if (!x86_canonical(cpu, base))
        x86_raise_error(cpu, X86_GP, 0);
    cpu->s.seg[seg].base = base;
}

void x86_insn_rdfsbase(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    read_base(cpu, insn, SEG_FS);
}

void x86_insn_rdgsbase(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    read_base(cpu, insn, SEG_GS);
}

void x86_insn_wrfsbase(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    write_base(cpu, insn, SEG_FS);
}

void x86_insn_wrgsbase(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    write_base(cpu, insn, SEG_GS);
}

void x86_insn_swapgs(struct x86_cpu *cpu, const struct x86_insn *insn)
{
    uint64_t base = cpu->s.seg[SEG_GS].base;

    if (cpu->code_size != 8)
        x86_raise(cpu, X86_UD);
    x86_require_cpl0(cpu);
    cpu->s.seg[SEG_GS].base = cpu->s.kernel_gs_base;
    cpu->s.kernel_gs_base = base;
}
