/*
 * XSAVE images: where each state component lies, and conversion of the canonical state to and from them.
 * SDM vol. 1 ch. 13. The standard format has the host's layout (AMD and Intel place AVX-512 differently), so
 * that images made by guest code on the host and by these functions agree.
 */
#ifndef RINGFORT_ISA_X86_XSAVE_H
#define RINGFORT_ISA_X86_XSAVE_H

#include <stdbool.h>
#include <stdint.h>

#include "isa/x86/state.h"

enum { XSTATE_X87, XSTATE_SSE, XSTATE_AVX, XSTATE_OPMASK = 5, XSTATE_ZMM_HI256, XSTATE_HI16_ZMM, XSTATE_COUNT };

#define XSAVE_LEGACY_SIZE 512u
#define XSAVE_HEADER_SIZE 64u
#define XSAVE_MIN_SIZE (XSAVE_LEGACY_SIZE + XSAVE_HEADER_SIZE)
#define XSAVE_MAX_SIZE 4096u    /* of any image with the components above; host layouts beyond are refused */
#define MXCSR_DEFAULT 0x1f80u
#define MXCSR_MASK 0xffffu

/* Of extended components (AVX on): bytes, and offset in the standard format. Sizes are 0 for what there is not. */
uint32_t x86_xsave_size(unsigned component);
uint32_t x86_xsave_offset(unsigned component);
/* Whether it begins at a multiple of 64 bytes in the compacted format. */
bool x86_xsave_aligned(unsigned component);
/* Components that this host can run for guest code: XCR0 here, without what Ringfort does not know. */
uint64_t x86_xsave_host_components(void);
/* Bytes of an image with these components. */
uint32_t x86_xsave_standard_bytes(uint64_t components);
uint32_t x86_xsave_compact_bytes(uint64_t components);

/* True when these XCR0 bits may stand together, whatever the model: x87 always, AVX needs SSE, AVX-512 is all or nothing. */
bool x86_xcr0_consistent(uint64_t xcr0);

/* Components that are not in their initial configuration. MXCSR does not count as SSE here. */
uint64_t x86_xinuse(const struct x86_fpu *f);
/*
 * The initial configuration: what FNINIT leaves, and zeros. vectors: 16, or 8 outside 64-bit mode, where the
 * other registers stay. MXCSR stays.
 */
void x86_fpu_init_components(struct x86_fpu *f, uint64_t components, unsigned vectors);

/*
 * All of it, in the standard format, as KVM takes and gives it; from and to which components that are not in the initial
 * configuration, and not beyond components. The error pointers are 64 bits wide.
 */
void x86_fpu_to_image(const struct x86_fpu *f, uint64_t components, uint8_t image[XSAVE_MAX_SIZE]);
void x86_fpu_from_image(struct x86_fpu *f, const uint8_t image[XSAVE_MAX_SIZE]);

#endif
