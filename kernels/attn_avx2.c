// SPDX-License-Identifier: Apache-2.0
/* kernels/attn_avx2.c - attention for AVX2 and FMA: 4 rows x 16 columns in 8 registers, the same bits. */
#if defined(__x86_64__)
#define NATIVE_DP 0
#define NV_MAX 2
#define ATTN_FILL td_attn_fill_avx2
#include "kernels/attn_tile.h"
#endif
