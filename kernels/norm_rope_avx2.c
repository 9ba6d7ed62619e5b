// SPDX-License-Identifier: Apache-2.0
/* kernels/norm_rope_avx2.c - RMSNorm, rotary embedding and append for AVX2. */
#if defined(__x86_64__)
#define NORM_ROPE_FILL td_norm_rope_fill_avx2
#include "kernels/norm_rope_tile.h"
#endif
