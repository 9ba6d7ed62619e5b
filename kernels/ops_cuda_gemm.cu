// SPDX-License-Identifier: Apache-2.0
/* kernels/ops_cuda_gemm.cu - the CUDA table's matrix products: packing, linear, experts, tied embeddings. */
#include "kernels/cuda_gemm.h"
#include "kernels/ops_cuda.h"

namespace td_ops_cuda
{
enum { LAYOUT_FRAGMENT = 2 /* family.h */ };
static block ws = {nullptr, 0, true}; /* its counters are zero between calls */

static td_dtype ops_packed_dtype(td_dtype from)
{
    return from == TD_F16 || from == TD_E4M3 ? from : TD_BF16;
}

/* Of the packed bytes: how codes are scaled changes nothing in them. */
static td_cuda_wtype type_of(td_dtype packed)
{
    return packed == TD_F16 ? TD_CUDA_W_F16 : packed == TD_E4M3 ? TD_CUDA_W_E4M3_ROW : TD_CUDA_W_BF16;
}

static size_t ops_packed_bytes(int N, int K, td_dtype from)
{
    return td_cuda_gemm_packed_bytes(N, K, 0, type_of(ops_packed_dtype(from)));
}

static void ops_pack(void *dst, const void *src, td_dtype from, int N, int K, int n0, int n1)
{
    td_cuda_gemm_pack_host(dst, src, from, N, K, 0, type_of(ops_packed_dtype(from)), n0, n1);
}

static size_t ops_scratch_bytes(int, int, int, int)
{
    return padded(1); /* workspaces are the table's own */
}

/* Packing knows no slices: the order is the same when slices are whole blocks of 64 columns (128 under block scales).
 * Other matrices have bits of this table alone and cannot be cut over ranks. */
static td_cuda_weight device_weight(const td_weight *w)
{
    td_cuda_weight d = {};
    d.N = w->N;
    d.K = w->K;
    d.type = type_of(w->dtype);
    if (w->scale_rows > 1 || w->scale_cols < w->K) d.type = w->scale_rows ? TD_CUDA_W_E4M3_BLOCK : d.type;
    const int unit = d.type == TD_CUDA_W_E4M3_BLOCK ? 128 : 64;
    /* 1 is one chain, as a rank of eight has it; 0 leaves the cut of K to the kernel */
    d.slices = w->slices > 1 && w->K / w->slices % unit ? 0 : w->slices;
    d.p = w->p;
    d.bias = w->bias;
    d.scale = td_weight_scales(w);
    d.scale_rows = w->scale_rows;
    return d;
}

static const char *ops_refuses(const td_weight *w)
{
    const td_cuda_weight d = device_weight(w);
    if (d.type == TD_CUDA_W_E4M3_BLOCK && (w->scale_rows < 16 || w->scale_cols < 128))
        return "blocks of FP8 scales are joined or cut off a multiple of 16 rows or 128 columns";
    return td_cuda_gemm_refuses(d.N, d.K, d.slices, d.type);
}

static bool weight_of(const td_weight *w, td_cuda_weight *out)
{
    const char *why = ops_refuses(w);
    *out = device_weight(w);
    if (why)
        failed(td_fail(TD_ENOSUP, "CUDA: product of %d x %d in %d slices: %s", w->N, w->K, w->slices, why));
    return !why;
}

static void ops_linear(td_pool *, void *, const td_weight *w, const float *x, size_t ldx, int T, float *y,
                       size_t ldy, bool add)
{
    td_cuda_weight d;
    if (T == 0 || !may_run() || !weight_of(w, &d)) return;
    size_t had = ws.bytes;
    if (!want(&ws, td_cuda_gemm_ws_bytes(T, w->N, w->K))) return;
    if (ws.bytes != had) {
        td_status s = ctx.dev->fill(ctx.dev, TD_STREAM_COMPUTE, ws.p, 0, TD_CUDA_GEMM_COUNTERS * 4);
        if (s != TD_OK) failed(s);
    }
    td_cuda_gemm_args a = {};
    a.w = &d;
    a.x = x;
    a.x_is_f32 = true;
    a.ldx = ldx;
    a.T = T;
    a.y = y;
    a.ldy = ldy;
    a.add = add;
    a.ws = ws.p;
    launched(td_cuda_gemm(stream(), &a), "product");
}

/* Row counts come to the host first: one wait for each grouped product. */
static void ops_linear_grouped(const td_ops *, td_pool *, void *, const td_grouped *a)
{
    int32_t row0[TD_MAX_EXPERTS + 1];
    td_dev *d = ctx.dev;
    if (!may_run() || a->n > TD_MAX_EXPERTS) return;
    if (ctx.rec.on) {
        failed(td_refuse(TD_ENOSUP, "the host has to know how many rows each expert gets"));
        return;
    }
    td_status s = d->download(d, TD_STREAM_COMPUTE, row0, a->row0, ((size_t)a->n + 1) * sizeof *row0);
    if (s == TD_OK) s = d->sync(d, TD_STREAM_COMPUTE);
    if (s != TD_OK) failed(s);
    for (int e = 0; e < a->n && may_run(); e++)
        if (row0[e + 1] > row0[e])
            ops_linear(nullptr, nullptr, &a->w[e], a->x + (size_t)row0[e] * a->ldx, a->ldx,
                       row0[e + 1] - row0[e], a->y + (size_t)row0[e] * a->ldy, a->ldy, false);
}

static void ops_embed_packed(td_pool *, const td_weight *w, const int32_t *ids, int T, float *out, size_t ldo)
{
    td_cuda_weight d;
    if (T && may_run() && weight_of(w, &d))
        launched(td_cuda_gemm_embed(stream(), &d, ids, T, out, ldo), "embedding");
}

void products_fill(td_ops *t)
{
    t->weight_dtype = TD_BF16;
    t->layout = LAYOUT_FRAGMENT;
    t->packed_dtype = ops_packed_dtype;
    t->packed_bytes = ops_packed_bytes;
    t->pack = ops_pack;
    t->refuses = ops_refuses;
    t->scratch_bytes = ops_scratch_bytes;
    t->linear = ops_linear;
    t->linear_grouped = ops_linear_grouped;
    t->embed_packed = ops_embed_packed;
}

void products_close()
{
    drop(&ws);
}
} // namespace td_ops_cuda
