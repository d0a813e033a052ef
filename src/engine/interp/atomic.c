/*
 * Atomic read-modify-write of memory: LOCKed instructions, XCHG, and the memory forms of XADD and CMPXCHG.
 *
 * Each is a loop around the host's compare-and-exchange, so vCPUs and devices see it whole, and the
 * same compute functions give result and flags. A location that crosses a page or is not RAM is
 * serialized by the machine's split lock instead.
 */
#include "engine/interp/compute.h"

/* What op->sub makes of the old value; commits nothing. */
#define DEFINE_NEW_VALUE(bits, bit_cases) \
    static inline uint##bits##_t new_value##bits(struct x86_cpu *cpu, const struct op *op, uint##bits##_t old, \
                                                 uint##bits##_t src, uint32_t *f) \
    { \
        switch (op->sub) { \
        case AT_ADD: case AT_XADD: return compute_add##bits(old, src, f); \
        case AT_OR: return compute_or##bits(old, src, f); \
        case AT_ADC: return compute_adc##bits(old, src, f); \
        case AT_SBB: return compute_sbb##bits(old, src, f); \
        case AT_AND: return compute_and##bits(old, src, f); \
        case AT_SUB: return compute_sub##bits(old, src, f); \
        case AT_XOR: return compute_xor##bits(old, src, f); \
        case AT_INC: return compute_inc##bits(old, f); \
        case AT_DEC: return compute_dec##bits(old, f); \
        case AT_NEG: return compute_neg##bits(old, f); \
        case AT_NOT: return (uint##bits##_t)~old; \
        case AT_XCHG: return src; \
        case AT_CMPXCHG: \
            compute_cmp##bits(R##bits(RAX_), old, f); \
            return R##bits(RAX_) == old ? src : old; \
        bit_cases \
        default: __builtin_unreachable(); \
        } \
    }
#define BIT_CASES(bits) \
    case AT_BTS: return compute_bts##bits(old, src, f); \
    case AT_BTR: return compute_btr##bits(old, src, f); \
    case AT_BTC: return compute_btc##bits(old, src, f);
DEFINE_NEW_VALUE(8, )
DEFINE_NEW_VALUE(16, BIT_CASES(16))
DEFINE_NEW_VALUE(32, BIT_CASES(32))
DEFINE_NEW_VALUE(64, BIT_CASES(64))

/* The word that a bit offset in a register selects: BTS, BTR, BTC with a register (op->scale's top bit). */
static gva_t atomic_bit_word(struct x86_cpu *cpu, const struct op *op, int64_t offset, unsigned size)
{
    int64_t distance = (offset >> (size == 8 ? 6 : size == 4 ? 5 : 4)) * (int64_t)size;

    if (op->aux)
        return bit_ea_slow(cpu, op, distance, size, true);
    return R64(op->base) + (R64(op->index) << (op->scale & ~ATOMIC_BIT_REG)) + (uint64_t)op->disp + R64(op->seg_base) +
           (uint64_t)distance;
}

/*
 * After the exchange: registers and flags. CMPXCHG that fails writes the accumulator; with 32 bits it leaves the
 * upper half of RAX alone when it succeeds.
 */
#define DEFINE_ATOMIC(bits) \
    static __attribute__((noinline, cold)) uint##bits##_t atomic_slow##bits(struct x86_cpu *cpu, const struct op *op, \
                                                                            gva_t va, uint##bits##_t src, uint32_t *f) \
    { \
        uint32_t before = *f; \
        uint##bits##_t old, *p; \
        enter_slow(cpu, op); \
        p = x86_rmw_pointer(cpu, va, bits / 8); \
        if (p) { \
            old = __atomic_load_n(p, __ATOMIC_RELAXED); \
            do { \
                *f = before; \
            } while (!__atomic_compare_exchange_n(p, &old, new_value##bits(cpu, op, old, src, f), false, \
                                                  __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)); \
            x86_rmw_done(cpu, va, bits / 8, p); \
        } else { \
            x86_probe_write(cpu, va, bits / 8); \
            x86_split_lock(cpu); \
            old = (uint##bits##_t)x86_read_slow(cpu, cpu->tlb, va, bits / 8); \
            x86_write_slow(cpu, cpu->tlb, va, new_value##bits(cpu, op, old, src, f), bits / 8); \
            x86_split_unlock(cpu); \
        } \
        return old; \
    } \
    HANDLER(atomic##bits) \
    { \
        gva_t va; \
        uint##bits##_t src = R##bits(op->src), old; \
        uint32_t f; \
        uint##bits##_t *p; \
        if (op->src == offsetof(struct x86_cpu, zero)) \
            src = (uint##bits##_t)op->imm; \
        if (op->scale & ATOMIC_BIT_REG) \
            va = atomic_bit_word(cpu, op, (int64_t)(int##bits##_t)src, bits / 8); \
        else \
            va = op->aux ? ea_slow(cpu, op, bits / 8, true) : ea_x(cpu, op); \
        p = tlb_lookup(cpu->tlb, va, bits / 8, TLB_WRITE); \
        f = cpu->arith; \
        if (likely(p != NULL)) { \
            old = __atomic_load_n(p, __ATOMIC_RELAXED); \
            for (;;) { \
                f = cpu->arith; \
                if (__atomic_compare_exchange_n(p, &old, new_value##bits(cpu, op, old, src, &f), false, \
                                                __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) \
                    break; \
            } \
        } else { \
            old = atomic_slow##bits(cpu, op, va, src, &f); \
        } \
        if (op->sub == AT_XCHG || op->sub == AT_XADD) \
            SET##bits(op->src, old); \
        else if (op->sub == AT_CMPXCHG && R##bits(RAX_) != old) \
            SET##bits(RAX_, old); \
        cpu->arith = op->sub == AT_XCHG || op->sub == AT_NOT ? cpu->arith : f; \
        NEXT; \
    }

DEFINE_ATOMIC(8)
DEFINE_ATOMIC(16)
DEFINE_ATOMIC(32)
DEFINE_ATOMIC(64)
op_fn *const atomic_handlers[SIZES] = { atomic8, atomic16, atomic32, atomic64 };

/* Compares EDX:EAX with [va]; the result is whether they were equal, else EDX:EAX is what is there. */
static bool cmpxchg8b(struct x86_cpu *cpu, gva_t va)
{
    uint64_t *gpr = cpu->s.gpr;
    uint64_t expected = (uint32_t)gpr[RAX] | gpr[RDX] << 32, found = expected;
    uint64_t desired = (uint32_t)gpr[RBX] | gpr[RCX] << 32;
    uint64_t *p = x86_rmw_pointer(cpu, va, 8);

    if (p) {
        __atomic_compare_exchange_n(p, &found, desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
        x86_rmw_done(cpu, va, 8, p);
    } else {
        x86_probe_write(cpu, va, 8);
        x86_split_lock(cpu);
        found = x86_read_slow(cpu, cpu->tlb, va, 8);
        x86_write_slow(cpu, cpu->tlb, va, found == expected ? desired : found, 8);
        x86_split_unlock(cpu);
    }
    if (found == expected)
        return true;
    gpr[RAX] = (uint32_t)found;
    gpr[RDX] = found >> 32;
    return false;
}

/* The same with RDX:RAX; va is aligned. */
static bool cmpxchg16b(struct x86_cpu *cpu, gva_t va)
{
    uint64_t *gpr = cpu->s.gpr;
    uint64_t lo = gpr[RAX], hi = gpr[RDX];
    void *p = x86_rmw_pointer(cpu, va, 16);
    bool equal;

    if (p) {
        __asm__ volatile("lock cmpxchg16b %[m]"
                         : [m] "+m"(*(unsigned __int128 *)p), "+a"(lo), "+d"(hi), "=@ccz"(equal)
                         : "b"(gpr[RBX]), "c"(gpr[RCX])
                         : "memory");
        x86_rmw_done(cpu, va, 16, p);
    } else {
        uint64_t value[2];

        x86_probe_write(cpu, va, 16);
        x86_split_lock(cpu);
        x86_read_bytes(cpu, va, value, 16);
        equal = value[0] == lo && value[1] == hi;
        lo = value[0];
        hi = value[1];
        if (equal) {
            value[0] = gpr[RBX];
            value[1] = gpr[RCX];
        }
        x86_write_bytes(cpu, va, value, 16);
        x86_split_unlock(cpu);
    }
    if (!equal) {
        gpr[RAX] = lo;
        gpr[RDX] = hi;
    }
    return equal;
}

/* CMPXCHG8B and CMPXCHG16B; op->sub: bytes. Only ZF changes. */
const struct op *op_cmpxchg_wide(struct x86_cpu *cpu, const struct op *op)
{
    const struct slow_insn *slow = op->aux;
    gva_t va;
    bool equal;

    enter_slow(cpu, op);
    va = x86_linear(cpu, &slow->insn, op->sub, true);
    if (op->sub == 16 && (va & 15))
        x86_raise_error(cpu, X86_GP, 0);
    equal = op->sub == 8 ? cmpxchg8b(cpu, va) : cmpxchg16b(cpu, va);
    cpu->arith = equal ? cpu->arith | 0x4000u : cpu->arith & ~0x4000u;
    NEXT;
}
