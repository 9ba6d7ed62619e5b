// SPDX-License-Identifier: Apache-2.0
/* tests/amx/attn_emulated.c - the amx family's attention on emulated tiles, for AVX2 (emulated.h). */
#include "tests/amx/emulated.h"
#include "kernels/attn_amx.c"
