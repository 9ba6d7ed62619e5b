// SPDX-License-Identifier: Apache-2.0
/* kernels/embed_ref.c - rows of a table as f32. An id outside [0, N) gives a row of zeros (what a vocabulary shard adds for
 * foreign ids). Tables are read once per token: one code for all families. */
#include "kernels/family.h"

static void embed_table(td_pool *pool, const td_table *w, const int32_t *ids, int T, float *out, size_t ldo)
{
    (void)pool;
    for (int t = 0; t < T; t++) {
        float *o = out + (size_t)t * ldo;
        size_t row = (size_t)w->K * td_dtype_bytes(w->dtype);
        if (ids[t] < 0 || ids[t] >= w->N) memset(o, 0, (size_t)w->K * 4);
        else td_convert(o, TD_F32, (const char *)w->p + (size_t)ids[t] * row, w->dtype, (size_t)w->K);
    }
}

static void embed_packed(td_pool *pool, const td_weight *w, const int32_t *ids, int T, float *out, size_t ldo)
{
    td_table table = {w->N, w->K, w->dtype, w->p};
    embed_table(pool, &table, ids, T, out, ldo);
}

void td_embed_fill_ref(td_ops *t)
{
    t->embed_table = embed_table;
    t->embed_packed = embed_packed;
}
