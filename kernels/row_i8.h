/* kernels/row_i8.h - rows of floats as 8-bit integers on their way between tensor-parallel ranks (--quantized-collectives):
 * what the article's "quantized gradients" become in inference, where the sums that ranks exchange are of activations.
 *
 *   row of E floats -> [int8, padded to a multiple of 4][f32 scale of each TD_QUANT_GROUP]: 3.9 times fewer bytes
 *
 * Rules:     1. scale = largest magnitude of the group / 127; q = x / scale, to the nearest, ties to even; 0 for a group of
 *               zeros. A group with an infinite or NaN value becomes NaN.
 *            2. A row's bytes depend on the row alone, not on how many rows travel or how they are cut into blocks.
 *            3. Every family has the same bytes; a device's are its memory (td_ops.rows_to_i8, rows_of_i8), those of the
 *               functions below this host's.
 * Threads:   run on the pool. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_KERNELS_ROW_I8_H
#define TD_KERNELS_ROW_I8_H

#include "common/pool.h"
#include <stddef.h>

enum { TD_QUANT_GROUP = 128 };

static inline size_t td_quant_row_bytes(int E)
{
    return ((size_t)E + 3) / 4 * 4 + ((size_t)E + TD_QUANT_GROUP - 1) / TD_QUANT_GROUP * sizeof(float);
}
void td_quant_rows(td_pool *pool, const float *x, int T, int E, void *out);
void td_dequant_rows(td_pool *pool, const void *in, int T, int E, float *x);

#endif
