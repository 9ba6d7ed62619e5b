// SPDX-License-Identifier: Apache-2.0
/* kernels/attn_ref.c - paged attention with an online softmax in double, one item per (row, query head), any
 * page size and KV type. Tiles of 64 keys at absolute multiples of 64, so that nothing of the size of the
 * context is ever held. */
#include "kernels/family.h"
#include <math.h>

enum { TILE = 64 };

typedef struct state {
    double m, l, o[TD_MAX_HEAD_DIM], q[TD_MAX_HEAD_DIM];
} state;

/* Offset in elements of (key, d = 0) of head g inside its page's K half. */
static size_t key_offset(const td_kv *kv, int g, int key)
{
    return ((size_t)g * (size_t)kv->P + (size_t)(key % kv->P)) * (size_t)kv->D;
}

static void tile(state *s, const td_attn_args *a, const td_attn_seq *seq, int g, int k0, int k1)
{
    const td_kv *kv = a->kv;
    size_t v_half = (size_t)kv->G * (size_t)kv->P * (size_t)kv->D;
    double score[TILE], top = s->m;
    for (int k = k0; k < k1; k++) {
        const void *page = td_kv_page(kv, a->slot, seq->pages[k / kv->P]);
        size_t at = key_offset(kv, g, k);
        double dot = 0;
        for (int d = 0; d < a->D; d++) dot += s->q[d] * (double)td_load_f32(page, kv->dtype, at + (size_t)d);
        score[k - k0] = dot;
        if (dot > top) top = dot;
    }
    double alpha = s->m == top ? 1.0 : exp(s->m - top);
    s->m = top;
    s->l *= alpha;
    for (int d = 0; d < a->D; d++) s->o[d] *= alpha;
    for (int k = k0; k < k1; k++) {
        const void *page = td_kv_page(kv, a->slot, seq->pages[k / kv->P]);
        size_t at = v_half + key_offset(kv, g, k);
        double p = exp(score[k - k0] - top);
        s->l += p;
        for (int d = 0; d < a->D; d++) s->o[d] += p * (double)td_load_f32(page, kv->dtype, at + (size_t)d);
    }
}

static void row_head(void *arg, int i, int member)
{
    (void)member;
    const td_attn_args *a = arg;
    int row = i / a->H, h = i % a->H, s = 0;
    while (row >= a->seq[s].n_rows) row -= a->seq[s++].n_rows;
    const td_attn_seq *seq = &a->seq[s];
    int pos = seq->pos0 + row, first = a->window > 0 && pos + 1 > a->window ? pos + 1 - a->window : 0;
    const float *q = a->q + (size_t)(seq->row0 + row) * a->ldq + (size_t)h * (size_t)a->D;
    float *out = a->out + (size_t)(seq->row0 + row) * a->ldo + (size_t)h * (size_t)a->D;
    state st = {.m = -INFINITY};
    for (int d = 0; d < a->D; d++) st.q[d] = (double)q[d] * (double)a->scale;
    for (int k0 = first; k0 <= pos; k0 = (k0 / TILE + 1) * TILE) {
        int k1 = (k0 / TILE + 1) * TILE;
        tile(&st, a, seq, h / (a->H / a->G), k0, k1 < pos + 1 ? k1 : pos + 1);
    }
    for (int d = 0; d < a->D; d++) out[d] = (float)(st.o[d] / st.l);
}

static void attention(td_pool *pool, void *scratch, const td_attn_args *a)
{
    (void)scratch;
    int rows = 0;
    for (int s = 0; s < a->n_seq; s++) rows += a->seq[s].n_rows;
    td_pool_for(pool, rows * a->H, row_head, (void *)(uintptr_t)a);
}

void td_attn_fill_ref(td_ops *t)
{
    t->kv_dtype = TD_F32;
    t->attention = attention;
}
