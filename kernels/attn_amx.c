// SPDX-License-Identifier: Apache-2.0
/* kernels/attn_amx.c - attention on the tiles of Intel AMX: 32 rows against 32 columns at a time. */
#if defined(__x86_64__)
#define ATTN_TILES 1
#define ATTN_FILL td_attn_fill_amx
#include "kernels/attn_tile.h"
#endif
