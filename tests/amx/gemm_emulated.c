// SPDX-License-Identifier: Apache-2.0
/* tests/amx/gemm_emulated.c - the amx family's products on emulated tiles, for AVX2 (emulated.h). */
#include "tests/amx/emulated.h"
#include "kernels/gemm_amx.c"
