// SPDX-License-Identifier: Apache-2.0
/* kernels/gemm_avx512bf16.c - y = W x with vdpbf16ps; 12 x 32 tiles in 24 of the 32 registers. */
#if defined(__x86_64__)
#define NATIVE_DP 1
#define MR_MAX 12
#define MR_WIDE 12
#define NV_HALF 2
#define QUIET_AHEAD 0
#define PIECE 0
#define GEMM_FILL td_gemm_fill_avx512bf16
#include "kernels/gemm_tile.h"
#endif
