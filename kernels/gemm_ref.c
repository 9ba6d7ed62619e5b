// SPDX-License-Identifier: Apache-2.0
/* kernels/gemm_ref.c - y = W x in double; weights row-major as stored.
 * Order per output (per slice): eight partial sums over k mod 8, then a fixed tree, whatever the number of
 * rows. */
#include "kernels/family.h"

enum { COLS = 4 };

static td_dtype packed_dtype(td_dtype from)
{
    return from;
}

static size_t packed_bytes(int N, int K, int slices, td_dtype from)
{
    (void)slices;
    return (size_t)N * (size_t)K * td_dtype_bytes(from);
}

static void pack(void *dst, const void *src, td_dtype from, int N, int K, int slices, int n0, int n1)
{
    (void)N, (void)slices;
    size_t row = (size_t)K * td_dtype_bytes(from);
    memcpy((char *)dst + (size_t)n0 * row, (const char *)src + (size_t)n0 * row, (size_t)(n1 - n0) * row);
}

typedef struct job {
    float *scratch; /* K floats per member */
    size_t stride;
    const td_weight *w;
    const float *x;
    float *y;
    size_t ldx, ldy;
    int T;
    bool add;
} job;

static double dot(const float *a, const float *b, int K)
{
    double s[8] = {0};
    int k = 0;
    for (; k + 8 <= K; k += 8)
        for (int j = 0; j < 8; j++) s[j] += (double)a[k + j] * (double)b[k + j];
    for (int j = 0; k + j < K; j++) s[j] += (double)a[k + j] * (double)b[k + j];
    return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}

/* ((0 + 1) + (2 + 3)) + ... of n values, n a power of two; v is used up. */
static float tree(float *v, int n)
{
    for (int step = 1; step < n; step *= 2)
        for (int i = 0; i + step < n; i += 2 * step) v[i] = v[i] + v[i + step];
    return v[0];
}

static float product(const td_weight *w, const float *row, const float *x, int n)
{
    if (w->slices <= 1) return (float)(dot(row, x, w->K) + (w->bias ? (double)w->bias[n] : 0.0));
    float part[TD_MAX_SLICES];
    int len = w->K / w->slices;
    for (int s = 0; s < w->slices; s++) part[s] = (float)dot(row + s * len, x + s * len, len);
    float v = tree(part, w->slices);
    return w->bias ? v + w->bias[n] : v;
}

/* Row n as f32; FP8 codes times their scales. */
static void unpack(const td_weight *w, int n, float *out)
{
    const char *row = (const char *)w->p + (size_t)n * (size_t)w->K * td_dtype_bytes(w->dtype);
    td_convert(out, TD_F32, row, w->dtype, (size_t)w->K);
    if (!w->scale_rows) return;
    size_t groups = (size_t)((w->K + w->scale_cols - 1) / w->scale_cols);
    const float *scale = td_weight_scales(w) + (size_t)(n / w->scale_rows) * groups;
    for (int k = 0; k < w->K; k++) out[k] *= scale[k / w->scale_cols];
}

static void columns(void *arg, int i, int member)
{
    const job *j = arg;
    const td_weight *w = j->w;
    float *wf = j->scratch + (size_t)member * j->stride;
    int n1 = (i + 1) * COLS < w->N ? (i + 1) * COLS : w->N;
    for (int n = i * COLS; n < n1; n++) {
        unpack(w, n, wf);
        for (int t = 0; t < j->T; t++) {
            float v = product(w, wf, j->x + (size_t)t * j->ldx, n);
            float *y = j->y + (size_t)t * j->ldy + n;
            *y = j->add ? *y + v : v;
        }
    }
}

static void linear(td_pool *pool, void *scratch, const td_weight *w, const float *x, size_t ldx, int T,
                   float *y, size_t ldy, bool add)
{
    job j = {scratch, td_round64((size_t)w->K * 4) / 4, w, x, y, ldx, ldy, T, add};
    td_pool_for(pool, (w->N + COLS - 1) / COLS, columns, &j);
}

typedef struct tree_job {
    const float *parts, *bias;
    float *y;
    size_t part_stride, ld, ldy;
    int n_parts, N;
    bool add;
} tree_job;

static void tree_row(void *arg, int t, int member)
{
    (void)member;
    const tree_job *j = arg;
    float *y = j->y + (size_t)t * j->ldy, part[TD_MAX_SLICES];
    for (int n = 0; n < j->N; n++) {
        for (int i = 0; i < j->n_parts; i++)
            part[i] = j->parts[(size_t)i * j->part_stride + (size_t)t * j->ld + (size_t)n];
        float v = tree(part, j->n_parts);
        if (j->bias) v = v + j->bias[n];
        y[n] = j->add ? y[n] + v : v;
    }
}

static void sum_tree(td_pool *pool, const float *parts, size_t part_stride, int n_parts, int T, int N, size_t ld,
                     const float *bias, float *y, size_t ldy, bool add)
{
    tree_job j = {parts, bias, y, part_stride, ld, ldy, n_parts, N, add};
    td_pool_for(pool, T, tree_row, &j);
}

static size_t scratch_bytes(int max_rows, int max_K, int max_D, int n_threads)
{
    (void)max_rows, (void)max_D;
    return td_round64((size_t)max_K * 4) * (size_t)n_threads;
}

void td_gemm_fill_ref(td_ops *t)
{
    t->weight_dtype = TD_F32;
    t->layout = TD_LAYOUT_ROWS;
    t->packed_dtype = packed_dtype;
    t->packed_bytes = packed_bytes;
    t->pack = pack;
    t->scratch_bytes = scratch_bytes;
    t->linear = linear;
    t->sum_tree = sum_tree;
}
