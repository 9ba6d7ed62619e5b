/* kernels/moe_tile.h - router and combination for the x86 families; included by moe_avx*.c, which define
 * MOE_FILL.
 *
 * Router's law, the same bits in every family: f32, inputs not rounded; lane l of 16 is one chain
 * acc = fma(x[16 i + l], w[16 i + l], acc) over ascending i, padded with zero; lanes are summed by v16_sum's
 * tree. */
// SPDX-License-Identifier: Apache-2.0
#include "kernels/moe.h"
#include "kernels/simd.h"

enum { ROWS = 4, EXPERTS = 32, SERIAL = 1 << 15 };

typedef struct logits_job {
    const td_table *w;
    const float *x;
    float *out;
    size_t ldx;
    int T, row_blocks;
} logits_job;

/* 16 elements of a row of the router; n < 16: the rest is zero. */
TD_INLINE v16 load_w(const td_table *w, size_t at, int n)
{
    if (n >= 16 && w->dtype == TD_BF16) return load_bf16_16((const uint16_t *)w->p + at);
    if (n >= 16 && w->dtype == TD_F32) return v16_load((const float *)w->p + at);
    float v[16] = {0};
    for (int i = 0; i < 16 && i < n; i++) v[i] = td_load_f32(w->p, w->dtype, at + (size_t)i);
    return v16_load(v);
}

TD_INLINE void dots(const logits_job *j, int t0, int n, const int R)
{
    int K = j->w->K, N = j->w->N, k = 0;
    const float *x = j->x + (size_t)t0 * j->ldx;
    size_t base = (size_t)n * (size_t)K;
    v16 acc[ROWS];
    TD_UNROLL for (int r = 0; r < R; r++) acc[r] = v16_zero();
    for (; k + 16 <= K; k += 16) {
        v16 w = load_w(j->w, base + (size_t)k, 16);
        TD_UNROLL for (int r = 0; r < R; r++) acc[r] =
            v16_fma(v16_load(x + (size_t)r * j->ldx + k), w, acc[r]);
    }
    if (k < K) {
        v16 w = load_w(j->w, base + (size_t)k, K - k);
        TD_UNROLL for (int r = 0; r < R; r++) acc[r] =
            v16_fma(v16_load_n(x + (size_t)r * j->ldx + k, K - k), w, acc[r]);
    }
    TD_UNROLL for (int r = 0; r < R; r++) j->out[(size_t)(t0 + r) * (size_t)N + (size_t)n] = v16_sum(acc[r]);
}

static void logits_item(void *arg, int i, int member)
{
    const logits_job *j = arg;
    int t0 = i % j->row_blocks * ROWS, n0 = i / j->row_blocks * EXPERTS;
    int n1 = n0 + EXPERTS < j->w->N ? n0 + EXPERTS : j->w->N;
    unsigned fp = td_fp_enter();
    (void)member;
    for (int n = n0; n < n1; n++) {
        if (t0 + ROWS <= j->T)
            dots(j, t0, n, ROWS);
        else
            for (int t = t0; t < j->T; t++) dots(j, t, n, 1);
    }
    td_fp_leave(fp);
}

static void logits(td_pool *pool, const td_table *w, const float *x, size_t ldx, int T, float *out)
{
    logits_job j = {w, x, out, ldx, T, (T + ROWS - 1) / ROWS};
    int items = j.row_blocks * ((w->N + EXPERTS - 1) / EXPERTS);
    if ((size_t)T * (size_t)w->N * (size_t)w->K < SERIAL)
        for (int i = 0; i < items; i++) logits_item(&j, i, 0);
    else
        td_pool_for(pool, items, logits_item, &j);
}

/* ---- choice and weights ---- */

typedef struct route_job {
    const td_route_law *law;
    const float *logits;
    int32_t *ids;
    float *weights;
    int T, rows;
} route_job;

/* Sum of exp(l - most) over all experts: lanes first, then their tree. */
static float sum_exp(const float *l, int n, float most)
{
    v16 sum = v16_zero(), m = v16_set1(most);
    for (int i = 0; i < n; i += 16)
        sum = v16_add(sum, v16_keep(v16_exp(v16_sub(v16_load_n(l + i, n - i), m)), 0, n - i, v16_zero()));
    return v16_sum(sum);
}

static void route_row(const route_job *j, int t)
{
    const td_route_law *law = j->law;
    const float *l = j->logits + (size_t)t * (size_t)law->n_experts;
    float *w = j->weights + (size_t)t * (size_t)law->top_k, value[TD_MAX_TOP_K] = {0}, sum = 0;
    td_moe_top(l, law->n_experts, law->top_k, j->ids + (size_t)t * (size_t)law->top_k, value);
    float most = value[0];
    for (int i = 0; i < law->top_k; i += 16)
        v16_store(value + i, v16_exp(v16_sub(v16_load(value + i), v16_set1(most))));
    if (td_moe_over_top(law))
        for (int i = 0; i < law->top_k; i++) sum += value[i];
    else
        sum = sum_exp(l, law->n_experts, most);
    for (int i = 0; i < law->top_k; i++) w[i] = value[i] / sum * law->scale;
}

static void route_rows(void *arg, int i, int member)
{
    const route_job *j = arg;
    unsigned fp = td_fp_enter();
    (void)member;
    for (int t = i * j->rows; t < (i + 1) * j->rows && t < j->T; t++) route_row(j, t);
    td_fp_leave(fp);
}

static void route(td_pool *pool, const td_route_law *law, const float *l, int T, int32_t *ids, float *weights)
{
    route_job j = {law, l, ids, weights, T, td_rows_per_item(T, 4 * (size_t)law->n_experts)};
    td_pool_for(pool, (T + j.rows - 1) / j.rows, route_rows, &j);
}

/* ---- combination: one chain over the slots, then the residual ---- */

typedef struct combine_job {
    const float *y, *weights;
    float *out;
    size_t ldy, ldo;
    const int32_t *row;
    int T, top_k, E, rows;
} combine_job;

TD_INLINE v16 chain(const combine_job *j, int t, int i, int n)
{
    const int32_t *row = j->row + (size_t)t * (size_t)j->top_k;
    const float *w = j->weights + (size_t)t * (size_t)j->top_k;
    v16 s = v16_zero();
    for (int k = 0; k < j->top_k; k++) {
        if (row[k] < 0) continue;
        const float *y = j->y + (size_t)row[k] * j->ldy + i;
        s = v16_fma(v16_set1(w[k]), n >= 16 ? v16_load(y) : v16_load_n(y, n), s);
    }
    return s;
}

static void combine_rows(void *arg, int item, int member)
{
    const combine_job *j = arg;
    unsigned fp = td_fp_enter();
    (void)member;
    for (int t = item * j->rows; t < (item + 1) * j->rows && t < j->T; t++) {
        float *out = j->out + (size_t)t * j->ldo;
        int i = 0;
        for (; i + 16 <= j->E; i += 16) v16_store(out + i, v16_add(v16_load(out + i), chain(j, t, i, 16)));
        int n = j->E - i;
        if (n > 0) v16_store_n(out + i, v16_add(v16_load_n(out + i, n), chain(j, t, i, n)), n);
    }
    td_fp_leave(fp);
}

static void combine(td_pool *pool, const float *y, size_t ldy, const int32_t *row, const float *weights,
                    int T, int top_k, int E, float *out, size_t ldo)
{
    combine_job j = {y,   weights, out,   ldy, ldo,
                     row, T,       top_k, E,   td_rows_per_item(T, (size_t)E * (size_t)(top_k + 1))};
    td_pool_for(pool, (T + j.rows - 1) / j.rows, combine_rows, &j);
}

void MOE_FILL(td_ops *t)
{
    t->moe_logits = logits;
    t->moe_route = route;
    t->moe_combine = combine;
}
