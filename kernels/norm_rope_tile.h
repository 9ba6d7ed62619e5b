/* kernels/norm_rope_tile.h - RMSNorm, rotary embedding and append for the x86 families; included by
 * norm_rope_avx*.c.
 *
 * Sums of squares: four vectors of 16 lanes in turn, then a fixed tree: a function of the row alone.
 * Rotation: a c - b s and a s + b c with the second product fused. The includer defines NORM_ROPE_FILL. */
// SPDX-License-Identifier: Apache-2.0
#include "kernels/family.h"
#include "kernels/simd.h"
#include <math.h>

TD_INLINE float row_scale(const float *x, int n, float eps)
{
    v16 s[4] = {v16_zero(), v16_zero(), v16_zero(), v16_zero()};
    int i = 0;
    for (; i + 64 <= n; i += 64)
        TD_UNROLL for (int j = 0; j < 4; j++) {
            v16 v = v16_load(x + i + 16 * j);
            s[j] = v16_fma(v, v, s[j]);
        }
    for (int j = 0; i < n; i += 16, j++) {
        v16 v = v16_load_n(x + i, n - i);
        s[j] = v16_fma(v, v, s[j]);
    }
    float sum = v16_sum(v16_add(v16_add(s[0], s[1]), v16_add(s[2], s[3])));
    return 1.0f / sqrtf(sum / (float)n + eps);
}

TD_INLINE void norm_row(const float *x, const float *w, float eps, int n, float *out)
{
    v16 scale = v16_set1(row_scale(x, n, eps));
    int i = 0;
    for (; i + 16 <= n; i += 16)
        v16_store(out + i, v16_mul(v16_mul(v16_load(x + i), scale), v16_load(w + i)));
    if (i < n)
        v16_store_n(out + i, v16_mul(v16_mul(v16_load_n(x + i, n - i), scale), v16_load_n(w + i, n - i)),
                    n - i);
}

typedef struct norm_job {
    const float *x, *w;
    float *out;
    size_t ldx, ldo;
    float eps;
    int T, E, rows;
} norm_job;

static void norm_rows(void *arg, int i, int member)
{
    (void)member;
    const norm_job *j = arg;
    int t1 = (i + 1) * j->rows < j->T ? (i + 1) * j->rows : j->T;
    unsigned fp = td_fp_enter();
    for (int t = i * j->rows; t < t1; t++)
        norm_row(j->x + (size_t)t * j->ldx, j->w, j->eps, j->E, j->out + (size_t)t * j->ldo);
    td_fp_leave(fp);
}

static void rmsnorm(td_pool *pool, const float *x, size_t ldx, const float *w, float eps, int T, int E,
                    float *out, size_t ldo)
{
    norm_job j = {x, w, out, ldx, ldo, eps, T, E, td_rows_per_item(T, (size_t)E)};
    td_pool_for(pool, (T + j.rows - 1) / j.rows, norm_rows, &j);
}

/* ---- rope and append ---- */

typedef struct rope_job {
    const td_rope_args *a;
    int rows;
} rope_job;

typedef struct angles {
    float c[TD_MAX_HEAD_DIM / 2], s[TD_MAX_HEAD_DIM / 2];
} angles;

TD_INLINE void rotate(float *x, const angles *r, int half)
{
    for (int i = 0; i < half; i += 16) {
        int n = half - i < 16 ? half - i : 16;
        v16 a = v16_load_n(x + i, n), b = v16_load_n(x + half + i, n);
        v16 c = v16_load_n(r->c + i, n), s = v16_load_n(r->s + i, n);
        v16_store_n(x + i, v16_fnma(b, s, v16_mul(a, c)), n);
        v16_store_n(x + half + i, v16_fma(b, c, v16_mul(a, s)), n);
    }
}

TD_INLINE void to_page(void *page, size_t at, const float *x, int D, td_dtype dtype)
{
    if (dtype != TD_BF16) {
        td_convert((char *)page + at * td_dtype_bytes(dtype), dtype, x, TD_F32, (size_t)D);
        return;
    }
    uint16_t *to = (uint16_t *)page + at;
    int d = 0;
    for (; d + 16 <= D; d += 16) store_bf16_16(to + d, v16_load(x + d));
    for (; d < D; d++) to[d] = td_f32_to_bf16(x[d]);
}

static void rope_row(const td_rope_args *a, int t)
{
    int D = a->D, half = a->rot_dim / 2;
    float *q = a->qkv + (size_t)t * a->ld;
    float *k = q + (size_t)a->H * (size_t)D, *v = k + (size_t)a->G * (size_t)D;
    const float *cs = a->cs + (size_t)t * (size_t)half * 2;
    angles r;
    for (int i = 0; i < half; i++) r.c[i] = cs[2 * i], r.s[i] = cs[2 * i + 1];
    for (int h = 0; h < a->H; h++) {
        float *x = q + (size_t)h * (size_t)D;
        if (a->q_norm) norm_row(x, a->q_norm, a->norm_eps, D, x);
        rotate(x, &r, half);
        for (int d = 0; a->q_scale && d < D; d++) x[d] *= a->q_scale[t];
    }
    for (int g = 0; g < a->G; g++) {
        float *x = k + (size_t)g * (size_t)D;
        if (a->k_norm) norm_row(x, a->k_norm, a->norm_eps, D, x);
        rotate(x, &r, half);
        if (a->row_page[t] < 0) continue;
        void *page = td_kv_page(a->kv, a->slot, a->row_page[t]);
        size_t P = (size_t)a->kv->P, at = ((size_t)g * P + (size_t)a->row_in_page[t]) * (size_t)D;
        to_page(page, at, x, D, a->kv->dtype);
        to_page(page, (size_t)a->G * P * (size_t)D + at, v + (size_t)g * (size_t)D, D, a->kv->dtype);
    }
}

static void rope_rows(void *arg, int i, int member)
{
    (void)member;
    const rope_job *j = arg;
    int t1 = (i + 1) * j->rows < j->a->T ? (i + 1) * j->rows : j->a->T;
    unsigned fp = td_fp_enter();
    for (int t = i * j->rows; t < t1; t++) rope_row(j->a, t);
    td_fp_leave(fp);
}

static void rope_append(td_pool *pool, const td_rope_args *a)
{
    rope_job j = {a, td_rows_per_item(a->T, (size_t)(a->H + 2 * a->G) * (size_t)a->D)};
    td_pool_for(pool, (a->T + j.rows - 1) / j.rows, rope_rows, &j);
}

void NORM_ROPE_FILL(td_ops *t)
{
    t->rmsnorm = rmsnorm;
    t->rope_append = rope_append;
}
