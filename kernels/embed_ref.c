// SPDX-License-Identifier: Apache-2.0
/* kernels/embed_ref.c - rows of a table as f32. An id outside [0, N) gives a row of zeros (what a vocabulary
 * shard adds for foreign ids). Tables are read once per token: one code for all families. */
#include "common/check.h"
#include "kernels/family.h"

typedef struct job {
    const td_table *w;
    const int32_t *ids;
    float *out;
    size_t ldo;
    int T, rows;
} job;

static void rows(void *arg, int i, int member)
{
    (void)member;
    const job *j = arg;
    const td_table *w = j->w;
    size_t row = (size_t)w->K * td_dtype_bytes(w->dtype);
    int t1 = (i + 1) * j->rows < j->T ? (i + 1) * j->rows : j->T;
    for (int t = i * j->rows; t < t1; t++) {
        float *o = j->out + (size_t)t * j->ldo;
        int id = j->ids[t];
        if (id < 0 || id >= w->N) memset(o, 0, (size_t)w->K * sizeof *o);
        else td_convert(o, TD_F32, (const char *)w->p + (size_t)id * row, w->dtype, (size_t)w->K);
    }
}

static void embed_table(td_pool *pool, const td_table *w, const int32_t *ids, int T, float *out, size_t ldo)
{
    job j = {w, ids, out, ldo, T, td_rows_per_item(T, (size_t)w->K)};
    td_pool_for(pool, (T + j.rows - 1) / j.rows, rows, &j);
}

static void embed_packed(td_pool *pool, const td_weight *w, const int32_t *ids, int T, float *out, size_t ldo)
{
    td_table table = {w->N, w->K, w->dtype, w->p};
    embed_table(pool, &table, ids, T, out, ldo);
}

/* A few rows, once a step: not worth the hand-out. */
static void take_rows(td_pool *pool, const float *x, size_t ldx, const int32_t *which, int n, int width, float *out,
                      size_t ldo)
{
    (void)pool;
    for (int i = 0; i < n; i++) memcpy(out + (size_t)i * ldo, x + (size_t)which[i] * ldx, (size_t)width * sizeof *out);
}

static void fill_ids(td_pool *pool, int32_t *ids, int n, const td_sample_out *before)
{
    (void)pool;
    for (int i = 0; i < n; i++)
        if (ids[i] < 0) ids[i] = TD_MAX(before[-1 - ids[i]].token, 0);
}

void td_embed_fill_ref(td_ops *t)
{
    t->fill_ids = fill_ids;
    t->take_rows = take_rows;
    t->embed_table = embed_table;
    t->embed_packed = embed_packed;
}
