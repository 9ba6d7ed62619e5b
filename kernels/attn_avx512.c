// SPDX-License-Identifier: Apache-2.0
/* kernels/attn_avx512.c - attention for AVX-512 without bf16 dot products, the same bits. */
#if defined(__x86_64__)
#define NATIVE_DP 0
#define NV_MAX 4
#define ATTN_FILL td_attn_fill_avx512
#include "kernels/attn_tile.h"
#endif
