// SPDX-License-Identifier: Apache-2.0
/* kernels/moe_avx512.c - router and combination of a mixture of experts for AVX-512. */
#if defined(__x86_64__)
#define MOE_FILL td_moe_fill_avx512
#include "kernels/moe_tile.h"
#endif
