// SPDX-License-Identifier: Apache-2.0
/* kernels/moe_avx2.c - router and combination of a mixture of experts for AVX2. */
#if defined(__x86_64__)
#define MOE_FILL td_moe_fill_avx2
#include "kernels/moe_tile.h"
#endif
