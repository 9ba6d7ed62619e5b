// SPDX-License-Identifier: Apache-2.0
/* tests/simt/support_staged.c - the CUDA table behind host pointers, so that the tests of tests/kernels run
 * on it as they are: every call uploads what it reads and what it may write, runs, downloads what it may have
 * written. Operations that the table has not are ref's. */
#include "tests/simt/support_staged.h"
#include "kernels/draw.h"
#include "kernels/cuda.h"
#include "tests/simt/support.h"

static const td_ops *cuda;
static td_ops staged;

/* [T] rows of `width` elements, ld apart: the bytes from the first to the last element. */
static size_t span(int T, size_t ld, size_t width, size_t unit)
{
    return T > 0 ? ((size_t)(T - 1) * ld + width) * unit : 0;
}

static void fetch(void *host, const void *device, size_t bytes)
{
    TD_CHECK(td_cuda_ops_status() == TD_OK);
    TD_CHECK(bytes == 0 || dev_get(host, device, bytes));
}

static void *give(const void *host, size_t bytes)
{
    return host && bytes ? dev_put(host, bytes) : NULL;
}

static td_weight weight_of(const td_weight *w)
{
    td_weight d = *w; /* what it is made from does not matter: the packed type alone decides the bytes */
    size_t bytes = cuda->packed_bytes(w->N, w->K, w->slices, w->dtype);
    if (w->scale_rows) bytes = w->scale_at + td_weight_scale_count(w) * sizeof(float);
    d.p = give(w->p, bytes);
    d.bias = give(w->bias, (size_t)w->N * 4);
    return d;
}

static void linear(td_pool *pool, void *scratch, const td_weight *w, const float *x, size_t ldx, int T,
                   float *y, size_t ldy, bool add)
{
    size_t bytes = span(T, ldy, (size_t)w->N, 4);
    td_weight d = weight_of(w);
    float *o = give(y, bytes);
    cuda->linear(pool, scratch, &d, give(x, span(T, ldx, (size_t)w->K, 4)), ldx, T, o, ldy, add);
    fetch(y, o, bytes);
    dev_done();
}

static void linear_grouped(const td_ops *ops, td_pool *pool, void *scratch, const td_grouped *a)
{
    td_grouped d = *a;
    td_weight w[TD_MAX_EXPERTS];
    int first = a->row0[0], rows = a->row0[a->n];
    (void)ops;
    if (rows <= first) return;
    size_t bytes = span(rows, a->ldy, (size_t)a->w[0].N, 4);
    for (int e = 0; e < a->n; e++) {
        w[e] = a->w[e];
        if (a->row0[e + 1] > a->row0[e]) w[e] = weight_of(&a->w[e]);
    }
    d.w = w;
    d.row0 = give(a->row0, (size_t)(a->n + 1) * 4);
    d.x = give(a->x, span(rows, a->ldx, (size_t)a->w[0].K, 4));
    d.y = give(a->y, bytes);
    cuda->linear_grouped(cuda, pool, scratch, &d);
    fetch(a->y, d.y, bytes);
    dev_done();
}

static void embed_packed(td_pool *pool, const td_weight *w, const int32_t *ids, int T, float *out, size_t ldo)
{
    size_t bytes = span(T, ldo, (size_t)w->K, 4);
    td_weight d = weight_of(w);
    float *o = give(out, bytes);
    cuda->embed_packed(pool, &d, give(ids, (size_t)T * 4), T, o, ldo);
    fetch(out, o, bytes);
    dev_done();
}

/* Rows of the sequences only: others of out are not written. */
static void attention(td_pool *pool, void *scratch, const td_attn_args *a)
{
    int T = 0;
    for (int i = 0; i < a->n_seq; i++)
        T = a->seq[i].row0 + a->seq[i].n_rows > T ? a->seq[i].row0 + a->seq[i].n_rows : T;
    size_t width = (size_t)(a->H * a->D), bytes = span(T, a->ldo, width, 4);
    td_attn_args d = *a;
    td_kv kv = *a->kv;
    kv.base = give(a->kv->base, (size_t)(a->slot + 1) * (size_t)a->kv->n_pages * td_kv_page_bytes(a->kv));
    d.kv = &kv;
    d.q = give(a->q, span(T, a->ldq, width, 4));
    d.out = give(a->out, bytes);
    cuda->attention(pool, scratch, &d);
    fetch(a->out, d.out, bytes);
    dev_done();
}

static void attn_merge(td_pool *pool, const td_merge_args *a)
{
    size_t unit = (size_t)a->T * (size_t)a->H * (size_t)(a->D + 2) * 4, bytes = span(a->T, a->ldo, (size_t)(a->H * a->D), 4);
    const float *part[TD_MAX_SLICES];
    td_merge_args d = *a;
    TD_CHECK(a->ranks <= TD_MAX_SLICES);
    for (int r = 0; r < a->ranks; r++) part[r] = give(a->part[r], unit * (size_t)a->n_parts);
    d.part = part;
    d.before = give(a->before, unit);
    d.state = a->state ? dev_new(unit) : NULL;
    d.out = a->state ? NULL : give(a->out, bytes);
    cuda->attn_merge(pool, &d);
    if (a->state) fetch(a->state, d.state, unit);
    else fetch(a->out, d.out, bytes);
    dev_done();
}

/* The page numbers stay on the host (ops.h). */
static void gather_pages(td_pool *pool, const td_kv *kv, int slot, const int32_t *pages, int n, void *out)
{
    td_kv d = *kv;
    size_t page = td_kv_page_bytes(kv), bytes = (size_t)n * page;
    d.base = give(kv->base, (size_t)(slot + 1) * (size_t)kv->n_pages * page);
    void *o = give(out, bytes);
    cuda->gather_pages(pool, &d, slot, pages, n, o);
    fetch(out, o, bytes);
    dev_done();
}

static void embed_table(td_pool *pool, const td_table *w, const int32_t *ids, int T, float *out, size_t ldo)
{
    size_t bytes = span(T, ldo, (size_t)w->K, 4);
    td_table d = *w;
    d.p = give(w->p, (size_t)w->N * (size_t)w->K * td_dtype_bytes(w->dtype));
    float *o = give(out, bytes);
    cuda->embed_table(pool, &d, give(ids, (size_t)T * 4), T, o, ldo);
    fetch(out, o, bytes);
    dev_done();
}

static void rmsnorm(td_pool *pool, const float *x, size_t ldx, const float *w, float eps, int T, int E,
                    float *out, size_t ldo)
{
    size_t bytes = span(T, ldo, (size_t)E, 4);
    float *o = give(out, bytes), *in = out == x ? o : give(x, span(T, ldx, (size_t)E, 4));
    cuda->rmsnorm(pool, in, ldx, give(w, (size_t)E * 4), eps, T, E, o, ldo);
    fetch(out, o, bytes);
    dev_done();
}

static void sum_tree(td_pool *pool, const float *parts, size_t part_stride, int n_parts, int T, int N,
                     size_t ld, const float *bias, float *y, size_t ldy, bool add)
{
    size_t bytes = span(T, ldy, (size_t)N, 4),
           in = (size_t)(n_parts - 1) * part_stride * 4 + span(T, ld, (size_t)N, 4);
    float *o = give(y, bytes);
    cuda->sum_tree(pool, give(parts, in), part_stride, n_parts, T, N, ld, give(bias, (size_t)N * 4), o, ldy,
                   add);
    fetch(y, o, bytes);
    dev_done();
}

static int n_slots(const td_kv *kv, int slot)
{
    (void)kv;
    return slot + 1;
}

static void rope_append(td_pool *pool, const td_rope_args *a)
{
    size_t T = (size_t)a->T, D = (size_t)a->D, width = (size_t)(a->H + 2 * a->G) * D;
    size_t bytes = span(a->T, a->ld, width, 4);
    size_t kv_bytes = (size_t)n_slots(a->kv, a->slot) * (size_t)a->kv->n_pages * td_kv_page_bytes(a->kv);
    td_rope_args d = *a;
    td_kv kv = *a->kv;
    kv.base = give(a->kv->base, kv_bytes);
    d.kv = &kv;
    d.qkv = give(a->qkv, bytes);
    d.cs = give(a->cs, T * (size_t)(a->rot_dim / 2) * 8);
    d.q_scale = give(a->q_scale, T * 4);
    d.q_norm = give(a->q_norm, D * 4);
    d.k_norm = give(a->k_norm, D * 4);
    d.row_page = give(a->row_page, T * 4);
    d.row_in_page = give(a->row_in_page, T * 4);
    cuda->rope_append(pool, &d);
    fetch(a->qkv, d.qkv, bytes);
    fetch(a->kv->base, kv.base, kv_bytes);
    dev_done();
}

static void silu_mul(td_pool *pool, const float *x, size_t ldx, int T, int F, float *out, size_t ldo)
{
    bool in_place = out == x;
    size_t in_bytes = span(T, ldx, 2 * (size_t)F, 4),
           bytes = in_place ? in_bytes : span(T, ldo, (size_t)F, 4);
    float *in = give(x, in_bytes), *o = in_place ? in : give(out, bytes);
    cuda->silu_mul(pool, in, ldx, T, F, o, ldo);
    fetch(out, o, bytes);
    dev_done();
}

static void moe_logits(td_pool *pool, const td_table *router, const float *x, size_t ldx, int T,
                       float *logits)
{
    size_t bytes = (size_t)T * (size_t)router->N * 4;
    td_table d = *router;
    d.p = give(router->p, (size_t)router->N * (size_t)router->K * td_dtype_bytes(router->dtype));
    float *o = dev_new(bytes);
    cuda->moe_logits(pool, &d, give(x, span(T, ldx, (size_t)router->K, 4)), ldx, T, o);
    fetch(logits, o, bytes);
    dev_done();
}

static void moe_route(td_pool *pool, const td_route_law *law, const float *logits, int T, int32_t *ids,
                      float *weights)
{
    size_t bytes = (size_t)T * (size_t)law->top_k * 4;
    int32_t *i = dev_new(bytes);
    float *w = dev_new(bytes);
    cuda->moe_route(pool, law, give(logits, (size_t)T * (size_t)law->n_experts * 4), T, i, w);
    fetch(ids, i, bytes);
    fetch(weights, w, bytes);
    dev_done();
}

static void moe_place(td_pool *pool, const int32_t *ids, int T, int top_k, int n_experts, int32_t *row0,
                      int32_t *row)
{
    size_t bytes = (size_t)T * (size_t)top_k * 4;
    int32_t *r0 = dev_new((size_t)(n_experts + 1) * 4), *r = dev_new(bytes);
    cuda->moe_place(pool, give(ids, bytes), T, top_k, n_experts, r0, r);
    fetch(row0, r0, (size_t)(n_experts + 1) * 4);
    fetch(row, r, bytes);
    dev_done();
}

static int last_row(const int32_t *row, int n)
{
    int last = -1;
    for (int i = 0; i < n; i++) last = row[i] > last ? row[i] : last;
    return last;
}

static void moe_gather(td_pool *pool, const float *x, size_t ldx, const int32_t *row, int T, int top_k, int E,
                       float *out, size_t ldo)
{
    size_t bytes = span(last_row(row, T * top_k) + 1, ldo, (size_t)E, 4);
    float *o = give(out, bytes);
    cuda->moe_gather(pool, give(x, span(T, ldx, (size_t)E, 4)), ldx, give(row, (size_t)(T * top_k) * 4), T,
                     top_k, E, o, ldo);
    fetch(out, o, bytes);
    dev_done();
}

static void take_rows(td_pool *pool, const float *x, size_t ldx, const int32_t *rows, int n, int width, float *out,
                      size_t ldo)
{
    size_t bytes = span(n, ldo, (size_t)width, 4);
    if (!n) return;
    float *o = give(out, bytes);
    cuda->take_rows(pool, give(x, span(last_row(rows, n) + 1, ldx, (size_t)width, 4)), ldx,
                    give(rows, (size_t)n * 4), n, width, o, ldo);
    fetch(out, o, bytes);
    dev_done();
}

static void moe_combine(td_pool *pool, const float *y, size_t ldy, const int32_t *row, const float *weights,
                        int T, int top_k, int E, float *out, size_t ldo)
{
    size_t bytes = span(T, ldo, (size_t)E, 4), n = (size_t)(T * top_k) * 4;
    float *o = give(out, bytes);
    cuda->moe_combine(pool, give(y, span(last_row(row, T * top_k) + 1, ldy, (size_t)E, 4)), ldy, give(row, n),
                      give(weights, n), T, top_k, E, o, ldo);
    fetch(out, o, bytes);
    dev_done();
}

static void sample(td_pool *pool, float *logits, size_t ld, int V, const td_sample_row *rows, int n,
                   td_sample_out *out)
{
    td_sample_out *o = dev_new((size_t)n * sizeof *o);
    cuda->sample(pool, give(logits, span(n, ld, (size_t)V, 4)), ld, V, rows, n, o);
    fetch(out, o, (size_t)n * sizeof *o);
    dev_done();
}

static void score(td_pool *pool, const float *logits, size_t ld, int V, const int32_t *ids,
                  int n_alternatives, int n, td_sample_out *out)
{
    td_sample_out *o = dev_new((size_t)n * sizeof *o);
    cuda->score(pool, give(logits, span(n, ld, (size_t)V, 4)), ld, V, ids, n_alternatives, n, o);
    fetch(out, o, (size_t)n * sizeof *o);
    dev_done();
}

static void fill_ids(td_pool *pool, int32_t *ids, int n, const td_sample_out *before)
{
    int least = -1;
    for (int i = 0; i < n; i++) least = TD_MIN(least, ids[i]);
    int32_t *o = give(ids, (size_t)n * 4);
    cuda->fill_ids(pool, o, n, give(before, (size_t)-least * sizeof *before));
    fetch(ids, o, (size_t)n * 4);
    dev_done();
}

/* x of a draw is written in its first stage, and read in others. */
static void draw_say(td_pool *pool, const td_vocab *v, td_draw *d, int n, uint8_t *message)
{
    size_t row = (size_t)v->n * sizeof(float);
    td_draw *c = malloc((size_t)n * sizeof *c);
    for (int i = 0; i < n; i++) {
        c[i] = d[i];
        c[i].raw = give(d[i].raw, row);
        c[i].x = d[i].x == d[i].raw ? (float *)(uintptr_t)c[i].raw : d[i].x ? give(d[i].x, row) : NULL;
    }
    cuda->draw_say(pool, v, c, n, message);
    for (int i = 0; i < n; i++)
        if (d[i].x) fetch(d[i].x, c[i].x, row);
    dev_done();
    free(c);
}

static const td_ops *open_staged(void)
{
    const td_ops *ref = NULL;
    (void)t_passed, (void)t_failed;
    TD_CHECK(td_ops_open("ref", &ref) == TD_OK && td_cuda_ops_open(dev(), &cuda) == TD_OK);
    staged = *ref;
    staged.family = cuda->family;
    staged.numerics = cuda->numerics;
    staged.kv_dtype = cuda->kv_dtype;
    staged.weight_dtype = cuda->weight_dtype;
    staged.layout = cuda->layout;
    staged.packed_dtype = cuda->packed_dtype;
    staged.packed_bytes = cuda->packed_bytes;
    staged.pack = cuda->pack;
    staged.refuses = cuda->refuses;
    staged.scratch_bytes = cuda->scratch_bytes;
    staged.linear = linear;
    staged.linear_grouped = linear_grouped;
    staged.attention = attention;
    staged.attn_merge = attn_merge;
    staged.gather_pages = gather_pages;
    staged.embed_packed = embed_packed;
    staged.embed_table = embed_table;
    staged.rmsnorm = rmsnorm;
    staged.sum_tree = sum_tree;
    staged.take_rows = take_rows;
    staged.rope_append = rope_append;
    staged.silu_mul = silu_mul;
    staged.moe_logits = moe_logits;
    staged.moe_route = moe_route;
    staged.moe_place = moe_place;
    staged.moe_gather = moe_gather;
    staged.moe_combine = moe_combine;
    staged.sample = sample;
    staged.score = score;
    staged.fill_ids = fill_ids;
    staged.draw_say = draw_say;
    staged.draw_hear = cuda->draw_hear;
    return &staged;
}

const td_ops *td_staged_family(int i)
{
    if (i != 0) return NULL;
    return cuda ? &staged : open_staged();
}
