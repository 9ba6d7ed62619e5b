// SPDX-License-Identifier: Apache-2.0
/* kernels/gemm_avx512.c - y = W x for AVX-512 without bf16 dot products: two fused multiply-adds per pair,
 * the same bits. */
#if defined(__x86_64__)
#define NATIVE_DP 0
#define MR_MAX 12
#define MR_WIDE 12
#define NV_HALF 2
#define QUIET_AHEAD 0
#define PIECE 0
#define GEMM_FILL td_gemm_fill_avx512
#include "kernels/gemm_tile.h"
#endif
