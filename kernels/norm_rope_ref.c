// SPDX-License-Identifier: Apache-2.0
/* kernels/norm_rope_ref.c - RMSNorm, rotary position embedding and the append to the pages, sums in double.
 * */
#include "kernels/family.h"
#include <math.h>

static void norm_row(const float *x, const float *w, double eps, int n, float *out)
{
    double sum = 0;
    for (int i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
    double scale = 1.0 / sqrt(sum / n + eps);
    for (int i = 0; i < n; i++) out[i] = (float)((double)x[i] * scale * (double)w[i]);
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
    for (int t = i * j->rows; t < t1; t++)
        norm_row(j->x + (size_t)t * j->ldx, j->w, (double)j->eps, j->E, j->out + (size_t)t * j->ldo);
}

static void rmsnorm(td_pool *pool, const float *x, size_t ldx, const float *w, float eps, int T, int E,
                    float *out, size_t ldo)
{
    norm_job j = {x, w, out, ldx, ldo, eps, T, E, td_rows_per_item(T, (size_t)E)};
    td_pool_for(pool, (T + j.rows - 1) / j.rows, norm_rows, &j);
}

static void rotate(float *x, const float *cs, int half)
{
    for (int i = 0; i < half; i++) {
        double a = (double)x[i], b = (double)x[i + half], c = (double)cs[2 * i], s = (double)cs[2 * i + 1];
        x[i] = (float)(a * c - b * s);
        x[i + half] = (float)(a * s + b * c);
    }
}

static void append(const td_rope_args *a, int t, int g, const float *k, const float *v)
{
    if (a->row_page[t] < 0) return;
    uint8_t *page = td_kv_page(a->kv, a->slot, a->row_page[t]);
    size_t D = (size_t)a->D, P = (size_t)a->kv->P, unit = td_dtype_bytes(a->kv->dtype);
    size_t at = ((size_t)g * P + (size_t)a->row_in_page[t]) * D, v_half = (size_t)a->G * P * D;
    td_convert(page + at * unit, a->kv->dtype, k, TD_F32, D);
    td_convert(page + (v_half + at) * unit, a->kv->dtype, v, TD_F32, D);
}

static void rope_row(void *arg, int t, int member)
{
    (void)member;
    const td_rope_args *a = arg;
    int D = a->D, half = a->rot_dim / 2;
    float *q = a->qkv + (size_t)t * a->ld, *k = q + (size_t)a->H * (size_t)D,
          *v = k + (size_t)a->G * (size_t)D;
    const float *cs = a->cs + (size_t)t * (size_t)half * 2;
    for (int h = 0; h < a->H; h++) {
        float *x = q + (size_t)h * (size_t)D;
        if (a->q_norm) norm_row(x, a->q_norm, (double)a->norm_eps, D, x);
        rotate(x, cs, half);
        for (int d = 0; a->q_scale && d < D; d++) x[d] *= a->q_scale[t];
    }
    for (int g = 0; g < a->G; g++) {
        float *x = k + (size_t)g * (size_t)D;
        if (a->k_norm) norm_row(x, a->k_norm, (double)a->norm_eps, D, x);
        rotate(x, cs, half);
        append(a, t, g, x, v + (size_t)g * (size_t)D);
    }
}

static void rope_append(td_pool *pool, const td_rope_args *a)
{
    td_pool_for(pool, a->T, rope_row, (void *)(uintptr_t)a);
}

void td_norm_rope_fill_ref(td_ops *t)
{
    t->rmsnorm = rmsnorm;
    t->rope_append = rope_append;
}
