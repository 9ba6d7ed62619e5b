/* kernels/amx.h - internal: whether this process may use the tiles of Intel AMX, and how fast they can be.
 *
 * Rules:   1. A process asks for the tiles' state once (ARCH_REQ_XCOMP_PERM); all its threads have it then, those that run
 *             already too, and forked children. exec loses it.
 *          2. A thread configures its tiles when an item of work begins and releases them at its end (gemm_amx.c): a switch
 *             of threads saves 8 KiB less, and an idle core sleeps deeper.
 * Source:  Intel SDM volume 1, chapter 18 (programming with Intel AMX), volume 2, CPUID leaves 7, 1DH, 1EH; Linux,
 *          Documentation/arch/x86/xstate.rst. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_KERNELS_AMX_H
#define TD_KERNELS_AMX_H

#include <stdbool.h>
#include <stdint.h>

/* What CPUID and XGETBV say, as far as it matters here. */
typedef struct td_amx_words {
    uint32_t features;              /* leaf 7, EDX */
    uint64_t xcr0;                  /* state that the kernel saves; 0: no XSAVE */
    uint32_t size, shape, max_rows; /* leaf 1DH, palette 1: EAX, EBX, ECX */
    uint32_t tmul;                  /* leaf 1EH: EBX */
} td_amx_words;

/* bf16 products on eight tiles of 16 rows of 64 bytes, and a kernel that saves them? */
bool td_amx_fits(const td_amx_words *w);
/* The same of this CPU, which has AVX-512 BF16 as well, and the kernel gave its permission, which this asks for. */
bool td_amx_supported(void);

/* steps x TD_AMX_LOOP_OPS operations on tiles; what the calling thread can do at most. Needs td_amx_supported. */
#define TD_AMX_LOOP_OPS (4 * 2.0 * 16 * 16 * 32)
float td_amx_loop(long steps);

#endif
