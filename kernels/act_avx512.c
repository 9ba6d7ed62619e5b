// SPDX-License-Identifier: Apache-2.0
/* kernels/act_avx512.c - the gated activation for AVX-512. */
#if defined(__x86_64__)
#define ACT_FILL td_act_fill_avx512
#include "kernels/act_tile.h"
#endif
