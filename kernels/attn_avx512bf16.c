// SPDX-License-Identifier: Apache-2.0
/* kernels/attn_avx512bf16.c - attention with vdpbf16ps; 4 rows x 64 columns in 16 registers. */
#if defined(__x86_64__)
#define NATIVE_DP 1
#define NV_MAX 4
#define ATTN_FILL td_attn_fill_avx512bf16
#include "kernels/attn_tile.h"
#endif
