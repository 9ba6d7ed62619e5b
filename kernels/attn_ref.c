// SPDX-License-Identifier: Apache-2.0
/* kernels/attn_ref.c - paged attention with an online softmax in double, one item per (row, query head), any
 * page size and KV type. Tiles of 64 keys at absolute multiples of 64, so that nothing of the size of the
 * context is ever held. A split's part is rounded to f32, as it is when it travels, and so is the sum after each part:
 * it may travel too. */
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

/* Where this rank keeps key t. */
static int local_key(const td_attn_args *a, int t)
{
    return a->part ? (t / (a->split * a->ranks) - a->part0) * a->split + t % a->split : t;
}

static void tile(state *s, const td_attn_args *a, const td_attn_seq *seq, int g, int k0, int k1)
{
    const td_kv *kv = a->kv;
    size_t v_half = (size_t)kv->G * (size_t)kv->P * (size_t)kv->D;
    double score[TILE], top = s->m;
    for (int k = k0; k < k1; k++) {
        int key = local_key(a, k);
        const void *page = td_kv_page(kv, a->slot, seq->pages[key / kv->P]);
        size_t at = key_offset(kv, g, key);
        double dot = 0;
        for (int d = 0; d < a->D; d++) dot += s->q[d] * (double)td_load_f32(page, kv->dtype, at + (size_t)d);
        score[k - k0] = dot;
        if (dot > top) top = dot;
    }
    top = (double)(float)top; /* the exponentials are relative to a number that a part can carry */
    double alpha = s->m == top ? 1.0 : exp(s->m - top);
    s->m = top;
    s->l *= alpha;
    for (int d = 0; d < a->D; d++) s->o[d] *= alpha;
    for (int k = k0; k < k1; k++) {
        int key = local_key(a, k);
        const void *page = td_kv_page(kv, a->slot, seq->pages[key / kv->P]);
        size_t at = v_half + key_offset(kv, g, key);
        double p = exp(score[k - k0] - top);
        s->l += p;
        for (int d = 0; d < a->D; d++) s->o[d] += p * (double)td_load_f32(page, kv->dtype, at + (size_t)d);
    }
}

typedef struct total {
    double m, l, o[TD_MAX_HEAD_DIM];
    bool any;
} total;

static void merge(total *t, const float *part, int D)
{
    double m = (double)part[0], l = (double)part[1];
    if (!t->any) {
        t->any = true;
        t->m = m, t->l = l;
        for (int d = 0; d < D; d++) t->o[d] = (double)part[2 + d];
        return;
    }
    double top = m > t->m ? m : t->m, a = t->m == top ? 1.0 : exp(t->m - top), b = m == top ? 1.0 : exp(m - top);
    t->m = top;
    t->l = (double)(float)(t->l * a + l * b);
    for (int d = 0; d < D; d++) t->o[d] = (double)(float)(t->o[d] * a + (double)part[2 + d] * b);
}

/* Keys [first, pos] of split u as a part; one without keys: maximum -inf, the rest 0. */
static void make_part(const td_attn_args *a, const td_attn_seq *seq, int h, const double *q, int u, int first, int pos,
                      float *part)
{
    state st = {.m = -INFINITY};
    memcpy(st.q, q, sizeof st.q);
    int begin = u * a->split, end = begin + a->split;
    if (begin < first) begin = first;
    if (end > pos + 1) end = pos + 1;
    for (int k0 = begin; k0 < end; k0 = (k0 / TILE + 1) * TILE) {
        int k1 = (k0 / TILE + 1) * TILE;
        tile(&st, a, seq, h / (a->H / a->G), k0, k1 < end ? k1 : end);
    }
    part[0] = (float)st.m;
    part[1] = (float)st.l;
    for (int d = 0; d < a->D; d++) part[2 + d] = (float)st.o[d];
}

static void finish(const total *t, float *out, int D)
{
    for (int d = 0; d < D; d++) out[d] = (float)(t->o[d] / t->l);
}

/* What was merged so far, as a part. */
static void keep(const total *t, float *part, int D)
{
    part[0] = t->any ? (float)t->m : -INFINITY;
    part[1] = t->any ? (float)t->l : 0;
    for (int d = 0; d < D; d++) part[2 + d] = t->any ? (float)t->o[d] : 0;
}

static void row_head(void *arg, int i, int member)
{
    (void)member;
    const td_attn_args *a = arg;
    int row = i / a->H, h = i % a->H, s = 0;
    while (row >= a->seq[s].n_rows) row -= a->seq[s++].n_rows;
    const td_attn_seq *seq = &a->seq[s];
    int pos = seq->pos0 + row, first = a->window > 0 && pos + 1 > a->window ? pos + 1 - a->window : 0;
    const float *qf = a->q + (size_t)(seq->row0 + row) * a->ldq + (size_t)h * (size_t)a->D;
    double q[TD_MAX_HEAD_DIM];
    for (int d = 0; d < a->D; d++) q[d] = (double)qf[d] * (double)a->scale;
    if (a->part) {
        float *part = a->part + ((size_t)(seq->row0 + row) * (size_t)a->n_parts * (size_t)a->H + (size_t)h) *
                                    (size_t)(a->D + 2);
        for (int p = 0; p < a->n_parts; p++, part += (size_t)a->H * (size_t)(a->D + 2))
            make_part(a, seq, h, q, a->rank + (a->part0 + p) * a->ranks, first, pos, part);
        return;
    }
    total t = {.any = false};
    float part[TD_MAX_HEAD_DIM + 2];
    for (int u = first / a->split; u <= pos / a->split; u++) {
        make_part(a, seq, h, q, u, first, pos, part);
        merge(&t, part, a->D);
    }
    finish(&t, a->out + (size_t)(seq->row0 + row) * a->ldo + (size_t)h * (size_t)a->D, a->D);
}

static void merge_row(void *arg, int i, int member)
{
    (void)member;
    const td_merge_args *a = arg;
    size_t unit = (size_t)(a->D + 2), at = ((size_t)(i / a->H) * (size_t)a->n_parts * (size_t)a->H + (size_t)(i % a->H)) * unit;
    total t = {.any = false};
    size_t row = (size_t)i * unit; /* of before and state */
    if (a->before && a->before[row + 1] != 0) merge(&t, a->before + row, a->D);
    for (int u = 0; u < a->n_parts * a->ranks; u++) {
        const float *part = a->part[u % a->ranks] + at + (size_t)(u / a->ranks) * (size_t)a->H * unit;
        if (part[1] != 0) merge(&t, part, a->D); /* NaN is not 0 */
    }
    if (a->state) keep(&t, a->state + row, a->D);
    else finish(&t, a->out + (size_t)(i / a->H) * a->ldo + (size_t)(i % a->H) * (size_t)a->D, a->D);
}

static void attn_merge(td_pool *pool, const td_merge_args *a)
{
    td_pool_for(pool, a->T * a->H, merge_row, (void *)(uintptr_t)a);
}

static void attention(td_pool *pool, void *scratch, const td_attn_args *a)
{
    (void)scratch;
    int rows = 0;
    td_attn_args b = *a;
    if (!b.split) b.split = TD_ATTN_SPLIT;
    for (int s = 0; s < a->n_seq; s++) rows += a->seq[s].n_rows;
    td_pool_for(pool, rows * a->H, row_head, &b);
}

void td_attn_fill_ref(td_ops *t)
{
    t->kv_dtype = TD_F32;
    t->attention = attention;
    t->attn_merge = attn_merge;
}
