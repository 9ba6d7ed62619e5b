/* kernels/amx_block.h - internal: two by two tiles: up to 32 rows of A against 32 columns of B, four accumulators.
 *
 * A is [rows][32] bf16, B [16 pairs][32] pairs of bf16 as the panels of x86.h have them, C f32. Rows beyond 16 are in the
 * second tiles, if `two`; columns beyond 16 likewise, if `wide`. Strides in bytes. Between block_configure and
 * td_tile_release nothing else may use the thread's tiles. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_KERNELS_AMX_BLOCK_H
#define TD_KERNELS_AMX_BLOCK_H

#include "kernels/amx_tile.h"
#include "kernels/simd.h"

enum {
    TILE_ROWS = 16,
    ROW_BYTES = 64, /* of a tile */
    STEP_K = 32,
    STEP_PAIRS = STEP_K / 2,
    BLOCK_ROWS = 2 * TILE_ROWS
};
/* Literals: they become parts of instructions. */
#define C00 0
#define C01 1
#define C10 2
#define C11 3
#define A0 4
#define A1 5
#define B0 6
#define B1 7

/* upper, lower: rows of the first and of the second tiles, 1 .. 16 and 0 .. 16. Tiles have as many rows as there are. */
TD_INLINE void block_configure(int upper, int lower)
{
    td_tile_config c = {.palette = 1};
    for (int t = C00; t <= B1; t++) {
        int rows = t == B0 || t == B1 ? STEP_PAIRS : t == C10 || t == C11 || t == A1 ? lower : upper;
        c.rows[t] = (uint8_t)rows;
        c.row_bytes[t] = rows ? ROW_BYTES : 0;
    }
    td_tile_configure(&c);
}

TD_INLINE void block_zero(const bool two)
{
    td_tile_zero(C00);
    td_tile_zero(C01);
    if (!two) return;
    td_tile_zero(C10);
    td_tile_zero(C11);
}

/* upper: as configured. */
TD_INLINE void block_load(const float *c, size_t stride, int upper, const bool two, const bool wide)
{
    const float *low = (const float *)((const char *)c + (size_t)upper * stride);
    td_tile_load(C00, c, stride);
    if (wide) td_tile_load(C01, c + TILE_ROWS, stride);
    if (two) td_tile_load(C10, low, stride);
    if (two && wide) td_tile_load(C11, low + TILE_ROWS, stride);
}

TD_INLINE void block_store(float *c, size_t stride, int upper, const bool two, const bool wide)
{
    float *low = (float *)((char *)c + (size_t)upper * stride);
    td_tile_store(C00, c, stride);
    if (wide) td_tile_store(C01, c + TILE_ROWS, stride);
    if (two) td_tile_store(C10, low, stride);
    if (two && wide) td_tile_store(C11, low + TILE_ROWS, stride);
}

/* One run of 32 k. low: bytes from the first tile of A to the second. */
TD_INLINE void block_step(const void *a, size_t a_stride, size_t low, const void *b, size_t b_stride, const bool two,
                          const bool wide)
{
    td_tile_load(B0, b, b_stride);
    if (wide) td_tile_load(B1, (const char *)b + ROW_BYTES, b_stride);
    td_tile_load(A0, a, a_stride);
    td_tile_dp(C00, A0, B0);
    if (wide) td_tile_dp(C01, A0, B1);
    if (!two) return;
    td_tile_load(A1, (const char *)a + low, a_stride);
    td_tile_dp(C10, A1, B0);
    if (wide) td_tile_dp(C11, A1, B1);
}

#endif
