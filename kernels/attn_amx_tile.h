/* kernels/attn_amx_tile.h - internal: the products of attn_tile.h on the tiles of Intel AMX, 32 rows at a time; included by
 * it.
 *
 * Law:     that of products on tiles (ops.h, amx_tile.h): scores are runs of 32 d, the last one padded with zeros; P V
 *          adds runs of 32 keys onto o alpha.
 * Masked:  a key beyond a row's is multiplied, by an exact 0; where its value is not finite, the row gets a copy of the tile
 *          without it (guarded_row). */
// SPDX-License-Identifier: Apache-2.0
#include "common/check.h"
#include "kernels/amx_block.h"

/* Tiles for groups of n rows. */
static void shape(const item *it, int n)
{
    if (*it->tiles == n) return;
    int upper = TD_MIN(n, (int)TILE_ROWS);
    block_configure(upper, n - upper);
    *it->tiles = n;
}

/* q K of rows r .. r+n-1 and keys [0, hi) of the tile, rounded up. */
TD_INLINE void score_tiles(const item *it, int buffer, int r, int hi, const bool two)
{
    const space *sp = &it->sp;
    size_t width = padded(it->a->D), stride = width * 2;
    const char *q = (const char *)(sp->q + (size_t)r * width / 2);
    float *s = sp->s + buffer * MR * TILE;
    for (int key = 0; key < hi; key += 32) {
        block_zero(two);
        TD_ONCE for (size_t d = 0; d < width; d += STEP_K)
            block_step(q + d * 2, stride, TILE_ROWS * stride, sp->k + d / 2 * TILE + key, TILE * 4, two, true);
        block_store(s + key, TILE * 4, TILE_ROWS, two, true);
    }
}

static void scores(const item *it, int buffer, int r, int n, int hi)
{
    shape(it, n);
    if (n > TILE_ROWS) score_tiles(it, buffer, r, hi, true);
    else score_tiles(it, buffer, r, hi, false);
}

/* o = o alpha + P V of rows r .. r+n-1 and keys [lo, hi) of the tile, rounded out to runs. */
TD_INLINE void value_tiles(const item *it, int buffer, int r, int lo, int hi, const bool two)
{
    const space *sp = &it->sp;
    size_t D = (size_t)it->a->D;
    const uint32_t *p = sp->p + buffer * MR * PAIRS;
    float *o = sp->o + (size_t)r * D;
    for (size_t d = 0; d < D; d += 32) {
        bool wide = d + 32 <= D;
        if (wide) block_load(o + d, D * 4, TILE_ROWS, two, true);
        else block_load(o + d, D * 4, TILE_ROWS, two, false);
        for (int key = lo & ~31; key < hi; key += STEP_K) {
            const uint32_t *v = sp->v + (size_t)(key / 2) * D + d;
            if (wide) block_step(p + key / 2, PAIRS * 4, TILE_ROWS * PAIRS * 4, v, D * 4, two, true);
            else block_step(p + key / 2, PAIRS * 4, TILE_ROWS * PAIRS * 4, v, D * 4, two, false);
        }
        if (wide) block_store(o + d, D * 4, TILE_ROWS, two, true);
        else block_store(o + d, D * 4, TILE_ROWS, two, false);
    }
}

static void values(const item *it, int buffer, int r, int n, int lo, int hi, const float *alpha)
{
    int D = it->a->D;
    for (int i = 0; i < n; i++) {
        if (alpha[i] == 1) continue; /* no new maximum */
        float *o = it->sp.o + (r + i) * D;
        v16 by = v16_set1(alpha[i]);
        for (int d = 0; d < D; d += 16) v16_store(o + d, v16_mul(v16_load(o + d), by));
    }
    shape(it, n);
    if (n > TILE_ROWS) value_tiles(it, buffer, r, lo, hi, true);
    else value_tiles(it, buffer, r, lo, hi, false);
}

/* lo, hi: valid keys of each row, unless all are. */
static void softmax_group(const item *it, int buffer, int r, int n, const int *lo, const int *hi, float *alpha)
{
    for (int i = 0; i < n; i += MR) {
        int left = TD_MIN(n - i, (int)MR);
        if (lo) softmax_rows(&it->sp, buffer + i / MR, r + i, left, lo + i, hi + i, false, alpha + i);
        else softmax_rows(&it->sp, buffer + i / MR, r + i, left, NULL, NULL, true, alpha + i);
    }
}

/* Rows r .. r+n-1 over the tile; their valid keys span [lo, hi). */
static void row_group(const item *it, int r, int n, int k0, int lo, int hi)
{
    int row_lo[GROUP] = {0}, row_hi[GROUP] = {0};
    float alpha[GROUP];
    for (int i = 0; i < n; i++) valid_keys(it, r + i, k0, &row_lo[i], &row_hi[i]);
    scores(it, 0, r, n, hi);
    softmax_group(it, 0, r, n, row_lo, row_hi, alpha);
    values(it, 0, r, n, lo, hi, alpha);
}

/* A tile whose every key is valid for every row. Three groups are under way at a time: the tiles have one group's scores
 * and another's values to do while the vectors are at a third's probabilities. */
static void whole_tile(const item *it)
{
    float alpha[2][GROUP];
    int groups = (it->n_rows + GROUP - 1) / GROUP;
    for (int i = 0; i < groups + 2; i++) {
        int r = i * GROUP, left = it->n_rows - r, set = i & 1, other = !set;
        if (i < groups) scores(it, set * (BUFFERS / 2), r, TD_MIN(left, (int)GROUP), TILE);
        r -= GROUP, left += GROUP;
        if (i > 0 && i <= groups)
            softmax_group(it, other * (BUFFERS / 2), r, TD_MIN(left, (int)GROUP), NULL, NULL, alpha[other]);
        r -= GROUP, left += GROUP;
        if (i > 1) values(it, set * (BUFFERS / 2), r, TD_MIN(left, (int)GROUP), 0, TILE, alpha[set]);
    }
}

/* One row over a tile that holds a value which is not finite: 0 x NaN is NaN, so the masked keys' values are taken out for
 * its time. */
static void guarded_row(const item *it, int r, int k0, int lo, int hi)
{
    size_t D = (size_t)it->a->D;
    uint32_t saved[PAIRS * TD_MAX_HEAD_DIM], *v = it->sp.v;
    memcpy(saved, v, PAIRS * D * 4);
    for (int pair = 0; pair < PAIRS; pair++, v += D) {
        uint32_t keep = (2 * pair >= lo && 2 * pair < hi ? 0x0000ffffu : 0) |
                        (2 * pair + 1 >= lo && 2 * pair + 1 < hi ? 0xffff0000u : 0);
        for (size_t d = 0; d < D; d++) v[d] &= keep;
    }
    row_group(it, r, 1, k0, lo, hi);
    memcpy(it->sp.v, saved, PAIRS * D * 4);
}
