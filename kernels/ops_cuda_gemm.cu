// SPDX-License-Identifier: Apache-2.0
/* kernels/ops_cuda_gemm.cu - the CUDA table's matrix products: packing, linear, experts, tied embeddings. */
#include "kernels/gemm_cuda_tile.h"
#include "kernels/ops_cuda.h"
#include <stdlib.h>

namespace td_ops_cuda
{
enum { LAYOUT_FRAGMENT = 4 /* family.h */ };
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

/* Each slice begins at a block of its own, so that a rank that has some has them as one rank that has all. Of codes
 * only slices of whole chunks of 32 columns: narrower ones may cross a block of scales inside a chunk. */
static bool slices_fit(bool codes, int K, int slices)
{
    return slices > 0 && (!codes || K / slices % 32 == 0);
}

static int packed_slices(td_cuda_wtype type, int K, int slices)
{
    return slices_fit(type == TD_CUDA_W_E4M3_ROW, K, slices) ? slices : 0;
}

static size_t ops_packed_bytes(int N, int K, int slices, td_dtype from)
{
    const td_cuda_wtype type = type_of(ops_packed_dtype(from));
    return td_cuda_gemm_packed_bytes(N, K, packed_slices(type, K, slices), type);
}

static void ops_pack(void *dst, const void *src, td_dtype from, int N, int K, int slices, int n0, int n1)
{
    const td_cuda_wtype type = type_of(ops_packed_dtype(from));
    td_cuda_gemm_pack_host(dst, src, from, N, K, packed_slices(type, K, slices), type, n0, n1);
}

static size_t ops_scratch_bytes(int, int, int, int)
{
    return padded(1); /* workspaces are the table's own */
}

static td_cuda_weight device_weight(const td_weight *w)
{
    td_cuda_weight d = {};
    d.N = w->N;
    d.K = w->K;
    d.type = type_of(w->dtype);
    /* 1 is one chain, as a rank of eight has it; 0 leaves the cut of K to the kernel */
    d.slices = packed_slices(d.type, w->K, w->slices);
    if (w->scale_rows > 1 || w->scale_cols < w->K) d.type = w->scale_rows ? TD_CUDA_W_E4M3_BLOCK : d.type;
    d.p = w->p;
    d.bias = w->bias;
    d.scale = td_weight_scales(w);
    d.scale_rows = w->scale_rows;
    d.scale_cols = w->scale_cols;
    return d;
}

static const char *ops_refuses(const td_weight *w)
{
    const td_cuda_weight d = device_weight(w);
    const bool blocks = d.type == TD_CUDA_W_E4M3_BLOCK;
    const int columns = blocks && d.slices ? gemm_scale_unit(w->K / d.slices) : 128;
    /* Fewer than all slices: other ranks have the rest, and one rank that has all adds otherwise. */
    if (w->dtype == TD_E4M3 && w->slices > 0 && w->slices < TD_MAX_SLICES && !d.slices)
        return "tensor-parallel-size cuts FP8 codes into slices (an eighth of all columns) that are no multiple of 32 columns";
    if (blocks && w->scale_rows < 16) return "blocks of FP8 scales are joined or cut off a multiple of 16 rows";
    if (blocks && w->scale_cols < columns) return "blocks of FP8 scales are cut off a multiple of 128 columns";
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

/* The workspace of a product; its counters are zero. */
static bool want_ws(int T, int N, int K)
{
    size_t had = ws.bytes;
    if (!want(&ws, td_cuda_gemm_ws_bytes(T, N, K))) return false;
    if (ws.bytes != had) kept(ctx.dev->fill(ctx.dev, TD_STREAM_COMPUTE, ws.p, 0, TD_CUDA_GEMM_COUNTERS * 4));
    return may_run();
}

static void product(const td_weight *w, const void *x, td_operand type, size_t ldx, int T, float *y,
                    size_t ldy, bool add)
{
    td_cuda_weight d;
    if (T == 0 || !may_run() || !weight_of(w, &d) || !want_ws(T, w->N, w->K)) return;
    td_cuda_gemm_args a = {};
    a.w = &d;
    a.x = x;
    a.x_is_f32 = type.dtype == TD_F32;
    a.ldx = ldx;
    a.T = T;
    a.y = y;
    a.ldy = ldy;
    a.add = add;
    a.ws = ws.p;
    const td_cuda_codes codes = td_cuda_codes_in((void *)(uintptr_t)x, ldx, T, w->K, type.group);
    kept(td_cuda_choice_gemm(&ctx.kernels, stream(), &a, w->rows, type.dtype == TD_E4M3 ? &codes : nullptr));
}

static void ops_linear(td_pool *, void *, const td_weight *w, const float *x, size_t ldx, int T, float *y,
                       size_t ldy, bool add)
{
    product(w, x, td_operand{TD_F32, 0}, ldx, T, y, ldy, add);
}

static td_dtype operand_dtype(td_dtype weight)
{
    return weight == TD_F16 ? TD_F16 : TD_BF16;
}

static td_operand operand_type(const td_weight *w, int T)
{
    const td_cuda_weight d = device_weight(w);
    const int group = td_cuda_choice_codes(&ctx.kernels, &d, w->rows, T);
    return group >= 0 ? td_operand{TD_E4M3, group} : td_operand{operand_dtype(w->dtype), 0};
}

static void operand_linear(td_pool *, void *, const td_weight *w, const void *x, td_operand type, size_t ldx,
                           int T, float *y, size_t ldy, bool add)
{
    product(w, x, type, ldx, T, y, ldy, add);
}

/* Row-major copies for cuBLASLt. */
static td_status ops_beside(td_weight *const *w, int n, const td_ops_agree *ranks, void **block)
{
    td_cuda_weight *d = (td_cuda_weight *)calloc((size_t)n + 1, sizeof *d);
    const void **rows = (const void **)calloc((size_t)n + 1, sizeof *rows);
    td_status s = d && rows ? TD_OK : td_fail(TD_EFULL, "out of memory for %d weights", n);
    for (int i = 0; i < n && s == TD_OK; i++) d[i] = device_weight(w[i]);
    if (s == TD_OK) s = td_cuda_choice_copies(&ctx.kernels, d, rows, n, ranks, block);
    for (int i = 0; i < n && s == TD_OK; i++) w[i]->rows = rows[i];
    free(d);
    free(rows);
    return s;
}

/* ---- experts ----
 * A group of weights as the device has it: the addresses of their bytes, biases and scales, one list after the other. A
 * layer's group is found by where its weights are described, sent the first time, and again when the addresses change. */

struct group_copy {
    const td_weight *w;
    int n;
    const void **host; /* [3 n], as sent */
    block data;
};
static group_copy *groups;
static int n_groups, next_group;

/* The group's entry; entries come in the order of a step's calls, so the next one is looked at first. */
static group_copy *group_of(const td_grouped *a)
{
    for (int k = 0; k < n_groups; k++) {
        group_copy *g = &groups[(next_group + k) % n_groups];
        if (g->w != a->w || g->n != a->n) continue;
        next_group = (int)(g - groups) + 1;
        return g;
    }
    group_copy *more = (group_copy *)realloc(groups, (size_t)(n_groups + 1) * sizeof *groups);
    const void **host = (const void **)calloc((size_t)a->n * 3, sizeof *host);
    if (more) groups = more;
    if (!more || !host) {
        free(host);
        failed(td_fail(TD_EFULL, "out of memory for %d experts", a->n));
        return nullptr;
    }
    groups[n_groups] = group_copy{a->w, a->n, host, {nullptr, 0, true}};
    return &groups[n_groups++];
}

static bool send_group(group_copy *g, const void *const *now)
{
    const size_t bytes = (size_t)g->n * 3 * sizeof *now;
    if (!want(&g->data, bytes) || !send_to(g->data.p, now, bytes)) return false;
    memcpy(g->host, now, bytes);
    return true;
}

/* The lists on the device, or NULL after an error. */
static const void *const *lists_of(const td_grouped *a)
{
    const void *now[3 * TD_CUDA_GEMM_GROUPS];
    group_copy *g = group_of(a);
    if (!g) return nullptr;
    for (int e = 0; e < a->n; e++) {
        now[e] = a->w[e].p;
        now[a->n + e] = a->w[e].bias;
        now[2 * a->n + e] = a->w[e].p ? td_weight_scales(&a->w[e]) : nullptr;
    }
    if (memcmp(g->host, now, (size_t)a->n * 3 * sizeof *now) && !send_group(g, now)) return nullptr;
    return (const void *const *)g->data.p;
}

/* Only the device knows how many rows an expert has: nothing waits. */
static void ops_linear_grouped(const td_ops *, td_pool *, void *, const td_grouped *a)
{
    td_cuda_grouped_args d = {};
    if (a->n == 0 || a->max_rows == 0 || !may_run()) return;
    if (a->n > TD_CUDA_GEMM_GROUPS) failed(td_fail(TD_ENOSUP, "CUDA: %d experts in one product", a->n));
    if (!may_run() || !weight_of(&a->w[0], &d.shape) || !want_ws(a->max_rows, d.shape.N, d.shape.K)) return;
    const void *const *lists = lists_of(a);
    if (!lists) return;
    d.n = a->n;
    d.p = lists;
    d.bias = (const float *const *)(lists + a->n);
    d.scale = a->w[0].scale_rows ? (const float *const *)(lists + 2 * a->n) : nullptr;
    d.row0 = a->row0;
    d.max_rows = a->max_rows;
    d.x = a->x;
    d.x_is_f32 = a->x_dtype == TD_F32;
    d.ldx = a->ldx;
    d.y = a->y;
    d.ldy = a->ldy;
    d.ws = ws.p;
    launched(td_cuda_gemm_grouped(stream(), &d), "products of experts");
}

static void ops_embed_packed(td_pool *, const td_weight *w, const int32_t *ids, int T, float *out, size_t ldo)
{
    td_cuda_weight d;
    if (T && may_run() && weight_of(w, &d))
        launched(td_cuda_gemm_embed(stream(), &d, ids, T, out, ldo), "embedding");
}

void products_fill(td_ops *t, td_operand_ops *o)
{
    o->type = operand_type;
    o->dtype = operand_dtype;
    o->linear = operand_linear;
    t->weight_dtype = TD_BF16;
    t->layout = LAYOUT_FRAGMENT;
    t->packed_dtype = ops_packed_dtype;
    t->packed_bytes = ops_packed_bytes;
    t->pack = ops_pack;
    t->refuses = ops_refuses;
    t->scratch_bytes = ops_scratch_bytes;
    t->linear = ops_linear;
    t->beside = ops_beside;
    t->linear_grouped = ops_linear_grouped;
    t->embed_packed = ops_embed_packed;
}

void products_reserve(const td_ops_room *r)
{
    const int rows = r->max_rows > r->max_expert_rows ? r->max_rows : r->max_expert_rows;
    const char *x16 = ctx.kernels.x16;
    if (want_ws(rows, r->N, r->K)) kept(td_cuda_choice_reserve(&ctx.kernels, r->max_rows, r->K, 0));
    ctx.moved += x16 && x16 != ctx.kernels.x16; /* recordings have its address */
}

void products_close()
{
    drop(&ws);
    for (int i = 0; i < n_groups; i++) {
        free(groups[i].host);
        drop(&groups[i].data);
    }
    free(groups);
    groups = nullptr;
    n_groups = next_group = 0;
}
} // namespace td_ops_cuda
