/* kernels/attn_dots.h - internal: the products of attn_tile.h in vectors, four rows at a time; included by it once per
 * instruction set.
 *
 * Law:     scores are one chain over D pairs, P V one chain over key pairs, in order, onto o alpha.
 * Masked:  whole pairs outside a row's keys are never multiplied, halves of the border pairs are 0 (guarded_row where 0
 *          would not be enough). */
// SPDX-License-Identifier: Apache-2.0

/* ---- inner products: c[m] = c[m] * scale[m] (or 0) + sum over steps of pair a[m][k] . pairs b[k] ---- */

typedef struct dots_arg {
    const uint32_t *a; /* row m at a + m * lda, XD dwords per step */
    size_t lda;
    const uint32_t *b;
    size_t ldb;
    int steps;
    float *c;
    size_t ldc;
    const float *scale; /* NULL: start at 0 */
} dots_arg;

TD_INLINE void dots(const dots_arg *t, const int rows, const int NV)
{
    vec s[MR][NV_MAX];
    const uint32_t *a = t->a, *b = t->b;
    TD_UNROLL for (int m = 0; m < rows; m++)
        TD_UNROLL for (int v = 0; v < NV; v++)
            s[m][v] = t->scale
                          ? vec_mul(vec_load(t->c + (size_t)m * t->ldc + v * LANES), vec_set1(t->scale[m]))
                          : vec_zero();
    TD_ONCE for (int k = 0; k < t->steps; k++) {
        veci w[NV_MAX];
        TD_UNROLL for (int v = 0; v < NV; v++) w[v] = veci_load(b + v * LANES);
#if NATIVE_DP
        TD_UNROLL for (int m = 0; m < rows; m++) {
            veci x = veci_set1(a[(size_t)m * t->lda]);
            TD_UNROLL for (int v = 0; v < NV; v++)
                s[m][v] = _mm512_dpbf16_ps(s[m][v], (__m512bh)w[v], (__m512bh)x);
        }
#else
        const float *f = (const float *)a;
        vec half[NV_MAX];
        TD_UNROLL for (int v = 0; v < NV; v++) half[v] = vec_odd(w[v]);
        TD_UNROLL for (int m = 0; m < rows; m++) {
            vec x = vec_set1(f[(size_t)m * t->lda + 1]);
            TD_UNROLL for (int v = 0; v < NV; v++) s[m][v] = vec_fma(half[v], x, s[m][v]);
        }
        TD_UNROLL for (int v = 0; v < NV; v++) half[v] = vec_even(w[v]);
        TD_UNROLL for (int m = 0; m < rows; m++) {
            vec x = vec_set1(f[(size_t)m * t->lda]);
            TD_UNROLL for (int v = 0; v < NV; v++) s[m][v] = vec_fma(half[v], x, s[m][v]);
        }
#endif
        a += XD;
        b += t->ldb;
    }
    TD_UNROLL for (int m = 0; m < rows; m++)
        TD_UNROLL for (int v = 0; v < NV; v++) vec_store(t->c + (size_t)m * t->ldc + v * LANES, s[m][v]);
}

/* dots_wide: all columns (a multiple of 16), as many vectors at a time as the registers take. */
#if NV_MAX == 2 /* 16 columns of AVX2 */
TD_INLINE void all_columns(dots_arg t, int columns, const int rows)
{
    TD_ONCE for (; columns > 0; columns -= NV_MAX * LANES) {
        dots(&t, rows, NV_MAX);
        t.b += NV_MAX * LANES;
        t.c += NV_MAX * LANES;
    }
}
#define WIDE(rows) TD_NOINLINE void wide_##rows(const dots_arg *t, int n) { all_columns(*t, n, rows); }
WIDE(1) WIDE(2) WIDE(3) WIDE(4)
typedef void wide_fn(const dots_arg *t, int columns);
static wide_fn *const wide_of[MR] = {wide_1, wide_2, wide_3, wide_4};
TD_INLINE void dots_wide(dots_arg t, int rows, int columns) { wide_of[rows - 1](&t, columns); }
#else
#define DOTS(rows, NV) TD_NOINLINE void dots_##rows##_##NV(const dots_arg *t) { dots(t, rows, NV); }
#define DOTS_ROWS(NV) DOTS(1, NV) DOTS(2, NV) DOTS(3, NV) DOTS(4, NV)
#define DOTS_NAMES(NV) {dots_1_##NV, dots_2_##NV, dots_3_##NV, dots_4_##NV}
typedef void dots_fn(const dots_arg *t);
DOTS_ROWS(1) DOTS_ROWS(2) DOTS_ROWS(3) DOTS_ROWS(4)
static dots_fn *const dots_of[NV_MAX][MR] = {DOTS_NAMES(1), DOTS_NAMES(2), DOTS_NAMES(3), DOTS_NAMES(4)};

TD_INLINE void dots_wide(dots_arg t, int rows, int columns)
{
    for (int left = columns / LANES, n; left > 0; left -= n) {
        n = left < NV_MAX ? left : NV_MAX;
        dots_of[n - 1][rows - 1](&t);
        t.b += n * LANES;
        t.c += n * LANES;
    }
}
#endif

/* ---- rows ---- */

/* q K of rows r .. r+n-1 and keys [0, hi) of the tile. */
static void scores(const item *it, int buffer, int r, int n, int hi)
{
    const space *sp = &it->sp;
    size_t D = (size_t)it->a->D;
    dots_arg t = {sp->q + (size_t)r * D / 2 * XD,  D / 2 * XD, sp->k, TILE, (int)D / 2,
                  sp->s + buffer * MR * TILE, TILE, NULL};
    dots_wide(t, n, (hi + 15) / 16 * 16);
}

/* o = o alpha + P V of rows r .. r+n-1 and keys [lo, hi) of the tile. */
static void values(const item *it, int buffer, int r, int n, int lo, int hi, const float *alpha)
{
    const space *sp = &it->sp;
    size_t D = (size_t)it->a->D;
    int pair = lo / 2;
    const uint32_t *p = sp->p + (buffer * MR * PAIRS + pair) * XD;
    dots_arg t = {p, PAIRS * XD, sp->v + (size_t)pair * D, D, (hi + 1) / 2 - pair, sp->o + (size_t)r * D, D, alpha};
    dots_wide(t, n, (int)D);
}

/* Rows r .. r+n-1 over the tile; their valid keys span [lo, hi). */
static void row_group(const item *it, int r, int n, int k0, int lo, int hi)
{
    int row_lo[MR] = {0}, row_hi[MR] = {0};
    float alpha[MR];
    for (int i = 0; i < n; i++) valid_keys(it, r + i, k0, &row_lo[i], &row_hi[i]);
    scores(it, 0, r, n, hi);
    softmax_rows(&it->sp, 0, r, n, row_lo, row_hi, false, alpha);
    values(it, 0, r, n, lo, hi, alpha);
}

/* A tile whose every key is valid for every row. Three groups are under way at a time: what follows in the
 * instruction stream never waits for what stands right before it. */
static void whole_tile(const item *it)
{
    float alpha[2][MR];
    int groups = (it->n_rows + MR - 1) / MR;
    for (int i = 0; i < groups + 2; i++) {
        int r = i * MR, left = it->n_rows - r;
        if (i < groups) scores(it, i & 1, r, left < MR ? left : MR, TILE);
        r -= MR, left += MR;
        if (i > 0 && i <= groups)
            softmax_rows(&it->sp, ~i & 1, r, left < MR ? left : MR, NULL, NULL, true, alpha[~i & 1]);
        r -= MR, left += MR;
        if (i > 1) values(it, i & 1, r, left < MR ? left : MR, 0, TILE, alpha[i & 1]);
    }
}

/* One row over a tile that holds a value which is not finite: 0 x NaN is NaN, so the masked halves of the
 * row's two border pairs are taken out for its time (whole pairs outside its range are never multiplied). */
static void guarded_row(const item *it, int r, int k0, int lo, int hi)
{
    size_t D = (size_t)it->a->D;
    uint32_t saved[2][TD_MAX_HEAD_DIM];
    uint32_t *first = it->sp.v + (size_t)(lo / 2) * D, *last = it->sp.v + (size_t)(hi / 2) * D;
    memcpy(saved[0], first, D * 4);
    if (hi & 1) memcpy(saved[1], last, D * 4);
    for (size_t d = 0; d < D; d++) {
        if (lo & 1) first[d] &= 0xffff0000u;
        if (hi & 1) last[d] &= 0x0000ffffu;
    }
    row_group(it, r, 1, k0, lo, hi);
    if (hi & 1) memcpy(last, saved[1], D * 4);
    memcpy(first, saved[0], D * 4);
}
