// SPDX-License-Identifier: Apache-2.0
/* kernels/gemm_avx2.c - y = W x for AVX2 and FMA: tiles of 2 x 32 or 6 x 16 in 16 registers, the same bits.
 * */
#if defined(__x86_64__)
#define NATIVE_DP 0
#define MR_MAX 6
#define MR_WIDE 2
#define NV_HALF 2
#define QUIET_AHEAD (1 << 10)
#define PIECE 512
#define GEMM_FILL td_gemm_fill_avx2
#include "kernels/gemm_tile.h"
#endif
