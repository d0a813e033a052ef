/*
 * What integer instructions compute: the host's own instruction on plain values, with the flags word
 * (struct x86_cpu.arith) in and out. Used by the handlers of registers, memory, and LOCKed memory alike.
 *
 * Flags that an instruction leaves alone or undefined come out as on the host: where that can matter, it runs with the
 * guest's flags loaded.
 */
#ifndef RINGFORT_ENGINE_INTERP_COMPUTE_H
#define RINGFORT_ENGINE_INTERP_COMPUTE_H

#include "engine/interp/interp.h"

#define REG8 "q"
#define REG16 "r"
#define REG32 "r"
#define REG64 "r"
#define SFX8 "b"
#define SFX16 "w"
#define SFX32 "l"
#define SFX64 "q"

/* For all sizes. */
#define FOR_SIZES(M, ...) M(8, __VA_ARGS__) M(16, __VA_ARGS__) M(32, __VA_ARGS__) M(64, __VA_ARGS__)
#define FOR_WIDE_SIZES(M, ...) M(16, __VA_ARGS__) M(32, __VA_ARGS__) M(64, __VA_ARGS__)

/* ---- two operands, old flags not needed but for the carry ---- */
#define DEFINE_COMPUTE_ALU(bits, name, shape) \
    static inline uint##bits##_t compute_##name##bits(uint##bits##_t a, uint##bits##_t b, uint32_t *flags) \
    { \
        uint32_t f = *flags; \
        __asm__(shape(#name, bits) : [a] "+" REG##bits(a), "=a"(f) : [b] REG##bits(b), [c] "r"(f) : "cc"); \
        *flags = (uint16_t)f; \
        return a; \
    }
#define PLAIN(insn, bits) insn SFX##bits " %[b], %[a]" SAVE_FLAGS
#define WITH_CARRY(insn, bits) "btl $8, %[c]\n\t" insn SFX##bits " %[b], %[a]" SAVE_FLAGS
FOR_SIZES(DEFINE_COMPUTE_ALU, add, PLAIN)
FOR_SIZES(DEFINE_COMPUTE_ALU, or, PLAIN)
FOR_SIZES(DEFINE_COMPUTE_ALU, adc, WITH_CARRY)
FOR_SIZES(DEFINE_COMPUTE_ALU, sbb, WITH_CARRY)
FOR_SIZES(DEFINE_COMPUTE_ALU, and, PLAIN)
FOR_SIZES(DEFINE_COMPUTE_ALU, sub, PLAIN)
FOR_SIZES(DEFINE_COMPUTE_ALU, xor, PLAIN)
FOR_SIZES(DEFINE_COMPUTE_ALU, cmp, PLAIN)
FOR_SIZES(DEFINE_COMPUTE_ALU, test, PLAIN)

/*
 * ---- the rest runs with the guest's flags loaded ----
 * Flags pass through EAX, so no operand may be there: "+&".
 */
#define DEFINE_COMPUTE_UNARY(bits, name) \
    static inline uint##bits##_t compute_##name##bits(uint##bits##_t a, uint32_t *flags) \
    { \
        uint32_t f = *flags; \
        __asm__(LOAD_FLAGS #name SFX##bits " %[a]" SAVE_FLAGS : [a] "+&" REG##bits(a), "+&a"(f) : : "cc"); \
        *flags = (uint16_t)f; \
        return a; \
    }
FOR_SIZES(DEFINE_COMPUTE_UNARY, inc)
FOR_SIZES(DEFINE_COMPUTE_UNARY, dec)
FOR_SIZES(DEFINE_COMPUTE_UNARY, neg)
FOR_SIZES(DEFINE_COMPUTE_UNARY, not)

/* Counts go through CL also when immediate; the host masks them and leaves flags alone for 0. */
#define DEFINE_COMPUTE_SHIFT(bits, name) \
    static inline uint##bits##_t compute_##name##bits(uint##bits##_t a, uint8_t count, uint32_t *flags) \
    { \
        uint32_t f = *flags; \
        __asm__(LOAD_FLAGS #name SFX##bits " %%cl, %[a]" SAVE_FLAGS \
                : [a] "+&" REG##bits(a), "+&a"(f) \
                : "c"(count) \
                : "cc"); \
        *flags = (uint16_t)f; \
        return a; \
    }
FOR_SIZES(DEFINE_COMPUTE_SHIFT, rol)
FOR_SIZES(DEFINE_COMPUTE_SHIFT, ror)
FOR_SIZES(DEFINE_COMPUTE_SHIFT, rcl)
FOR_SIZES(DEFINE_COMPUTE_SHIFT, rcr)
FOR_SIZES(DEFINE_COMPUTE_SHIFT, shl)
FOR_SIZES(DEFINE_COMPUTE_SHIFT, shr)
FOR_SIZES(DEFINE_COMPUTE_SHIFT, sar)

#define DEFINE_COMPUTE_DOUBLE(bits, name) \
    static inline uint##bits##_t compute_##name##bits(uint##bits##_t a, uint##bits##_t b, uint8_t count, \
                                                      uint32_t *flags) \
    { \
        uint32_t f = *flags; \
        __asm__(LOAD_FLAGS #name SFX##bits " %%cl, %[b], %[a]" SAVE_FLAGS \
                : [a] "+&r"(a), "+&a"(f) \
                : [b] "r"(b), "c"(count) \
                : "cc"); \
        *flags = (uint16_t)f; \
        return a; \
    }
FOR_WIDE_SIZES(DEFINE_COMPUTE_DOUBLE, shld)
FOR_WIDE_SIZES(DEFINE_COMPUTE_DOUBLE, shrd)

/* Multiplication, bit tests and counts: a op b with b unchanged. */
#define DEFINE_COMPUTE_BINARY(bits, name) \
    static inline uint##bits##_t compute_##name##bits(uint##bits##_t a, uint##bits##_t b, uint32_t *flags) \
    { \
        uint32_t f = *flags; \
        __asm__(LOAD_FLAGS #name SFX##bits " %[b], %[a]" SAVE_FLAGS \
                : [a] "+&r"(a), "+&a"(f) \
                : [b] "r"(b) \
                : "cc"); \
        *flags = (uint16_t)f; \
        return a; \
    }
FOR_WIDE_SIZES(DEFINE_COMPUTE_BINARY, imul)
FOR_WIDE_SIZES(DEFINE_COMPUTE_BINARY, bt)
FOR_WIDE_SIZES(DEFINE_COMPUTE_BINARY, bts)
FOR_WIDE_SIZES(DEFINE_COMPUTE_BINARY, btr)
FOR_WIDE_SIZES(DEFINE_COMPUTE_BINARY, btc)
FOR_WIDE_SIZES(DEFINE_COMPUTE_BINARY, tzcnt)
FOR_WIDE_SIZES(DEFINE_COMPUTE_BINARY, lzcnt)
FOR_WIDE_SIZES(DEFINE_COMPUTE_BINARY, popcnt)

/*
 * BSF and BSR of zero leave the destination alone, with 32-bit operands all 64 bits of it on many processors:
 * the host decides, in a 64-bit register.
 */
#define SCAN_REG16 "w"
#define SCAN_REG32 "k"
#define SCAN_REG64 "q"
#define DEFINE_COMPUTE_SCAN(bits, name) \
    static inline uint64_t compute_##name##bits(uint64_t a, uint##bits##_t b, uint32_t *flags) \
    { \
        uint32_t f = *flags; \
        __asm__(LOAD_FLAGS #name SFX##bits " %[b], %" SCAN_REG##bits "[a]" SAVE_FLAGS \
                : [a] "+&r"(a), "+&a"(f) \
                : [b] "r"(b) \
                : "cc"); \
        *flags = (uint16_t)f; \
        return a; \
    }
FOR_WIDE_SIZES(DEFINE_COMPUTE_SCAN, bsf)
FOR_WIDE_SIZES(DEFINE_COMPUTE_SCAN, bsr)

#endif
