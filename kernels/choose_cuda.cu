// SPDX-License-Identifier: Apache-2.0
/* kernels/choose_cuda.cu - see choose_cuda.h: candidates, row-major copies, and the two calls. */
#include "kernels/attn_cuda_launch.h"
#include "kernels/choose_cuda.h"
#include "kernels/cuda.h"
#include "kernels/cuda_lt.h"
#include "kernels/gemm_cuda_tile.h"
#include "kernels/proven_cuda.h"
extern "C" {
#include "common/log.h"
}
#include <stdio.h>
#include <string.h>

/* ---- candidates ---- */

static unsigned proven()
{
    unsigned bits = 0;
#define X(bit, name, file) bits |= (bit);
    TD_CUDA_PROVEN(X)
#undef X
    return bits;
}

static void name_numerics(td_cuda_choice *c)
{
    char lt[32] = "", sm[16] = "";
    if (c->may & TD_CUDA_LT) snprintf(lt, sizeof lt, "-lt%u", (unsigned)td_cuda_lt_version());
    if (c->may & (TD_CUDA_GEMM_SM90A | TD_CUDA_ATTN_SM90A))
        snprintf(sm, sizeof sm, "-h%u", c->may & (TD_CUDA_GEMM_SM90A | TD_CUDA_ATTN_SM90A));
    if (c->may)
        snprintf(c->numerics, sizeof c->numerics, "cuda-fast-sm%d%s%s-bf16", c->dev->arch, lt, sm);
    else
        snprintf(c->numerics, sizeof c->numerics, "%s", TD_CUDA_NUMERICS);
}

void td_cuda_choice_drop(td_cuda_choice *c, unsigned bits)
{
    c->may &= ~bits;
    name_numerics(c);
}

static td_status open_lt(td_cuda_choice *c)
{
    void *p;
    TD_TRY(c->dev->alloc(c->dev, TD_CUDA_LT_WS_BYTES, &p));
    c->lt_ws = (char *)p;
    return td_cuda_lt_open(p, &c->lt);
}

td_status td_cuda_choice_open(td_dev *dev, bool fast, unsigned also, td_cuda_choice *c)
{
    *c = td_cuda_choice{};
    c->dev = dev;
    if (fast) c->may = proven() | also;
    if (fast && td_cuda_lt_version()) c->may |= TD_CUDA_LT;
    if (dev->arch != 90) c->may &= ~(unsigned)(TD_CUDA_GEMM_SM90A | TD_CUDA_ATTN_SM90A);
    if (c->may & TD_CUDA_LT && open_lt(c) < 0) {
        TD_WARN("cuBLASLt is not used: %s", td_reason());
        c->may &= ~(unsigned)TD_CUDA_LT;
    }
    name_numerics(c);
    return TD_OK;
}

void td_cuda_choice_close(td_cuda_choice *c)
{
    if (!c->dev) return;
    td_cuda_lt_close(c->lt);
    void *blocks[] = {c->lt_ws, c->x16, c->redo};
    for (void *p : blocks)
        if (p) c->dev->free(c->dev, p);
    *c = td_cuda_choice{};
}

td_status td_cuda_choice_reserve(td_cuda_choice *c, int max_rows, int max_K, long long max_blocks)
{
    td_dev *d = c->dev;
    size_t x = (size_t)max_rows * (size_t)max_K * 2;
    void *p;
    if (c->may & TD_CUDA_LT && x > c->x16_bytes) {
        TD_TRY(d->sync(d, TD_STREAM_COMPUTE));
        if (c->x16) d->free(d, c->x16);
        c->x16 = nullptr;
        c->x16_bytes = 0;
        TD_TRY(d->alloc(d, x, &p));
        c->x16 = (char *)p;
        c->x16_bytes = x;
    }
    if (c->may & TD_CUDA_ATTN_SM90A && max_blocks > c->max_blocks && max_blocks < 1 << 24) {
        TD_TRY(d->sync(d, TD_STREAM_COMPUTE));
        if (c->redo) d->free(d, c->redo);
        c->redo = nullptr;
        c->max_blocks = 0;
        TD_TRY(d->alloc(d, (size_t)max_blocks * 4, &p));
        c->redo = (int32_t *)p;
        TD_TRY(d->fill(d, TD_STREAM_COMPUTE, p, 0, (size_t)max_blocks * 4));
        c->max_blocks = (int)max_blocks;
    }
    return TD_OK;
}

/* ---- row-major copies ---- */

/* A thread writes 8 columns of a row; grid: (, N). */
// limits: regs 40, spill 0, smem 0
static __global__ void gemm_unpack_kernel(uint16_t *dst, const uint16_t *src, int K, gemm_cut c)
{
    const int n = (int)blockIdx.y, k0 = (int)(blockIdx.x * 128 + threadIdx.x) * 8;
    for (int k = k0; k < k0 + 8 && k < K; k++) {
        const int slice = c.slice_blocks ? k / c.slice_cols : 0, in = k - slice * c.slice_cols;
        dst[(size_t)n * (size_t)K + (size_t)k] =
            src[gemm_packed_at(c, n, slice * c.slice_blocks + in / 64, in % 64, false)];
    }
}

int td_cuda_gemm_unpack(void *stream, void *dst, const void *packed, int N, int K, int slices)
{
    gemm_cut c = gemm_cut_of(K, slices, TD_CUDA_W_BF16);
    for (int n0 = 0; n0 < N; n0 += 65520) { /* the grid's second dimension; a multiple of 16 */
        int n = N - n0 < 65520 ? N - n0 : 65520;
        int e = (int)td_launch(gemm_unpack_kernel, dim3((unsigned)((K + 1023) / 1024), (unsigned)n),
                               dim3(128), 0, (cudaStream_t)stream, (uint16_t *)dst + (size_t)n0 * (size_t)K,
                               (const uint16_t *)packed + (size_t)n0 * (size_t)c.n_blocks * 64, K, c);
        if (e) return e;
    }
    return 0;
}

/* What cuBLASLt takes without padding. */
static bool copied(const td_weight *w)
{
    return (w->dtype == TD_BF16 || w->dtype == TD_F16) && w->K % 8 == 0 && w->N % 8 == 0;
}

static size_t copy_bytes(const td_weight *w)
{
    return ((size_t)w->N * (size_t)w->K * 2 + 255) / 256 * 256;
}

td_status td_cuda_choice_copies(td_cuda_choice *c, td_weight *const *w, int n, void **block)
{
    td_dev *d = c->dev;
    size_t bytes = 0, left = 0;
    *block = nullptr;
    if (!(c->may & TD_CUDA_LT)) return TD_OK;
    for (int i = 0; i < n; i++)
        if (copied(w[i])) bytes += copy_bytes(w[i]);
    TD_TRY(d->free_bytes(d, &left));
    if (bytes > left / TD_CUDA_COPY_SHARE) {
        if (!c->copied) td_cuda_choice_drop(c, TD_CUDA_LT);
        TD_WARN("row-major copies of the weights need %zu MiB, more than half of the %zu MiB that are free: "
                "cuBLASLt is "
                "not used, kernels compute as %s",
                bytes >> 20, left >> 20, c->numerics);
        return TD_OK;
    }
    char *at;
    TD_TRY(d->alloc(d, bytes ? bytes : 1, block));
    at = (char *)*block;
    for (int i = 0; i < n; i++) {
        if (!copied(w[i])) continue;
        TD_TRY(td_cuda_status(td_cuda_gemm_unpack(d->stream[TD_STREAM_COMPUTE], at, w[i]->p, w[i]->N, w[i]->K,
                                                  w[i]->slices),
                              "copy of a weight"));
        w[i]->rows = at;
        at += copy_bytes(w[i]);
    }
    c->copied = true;
    return d->sync(d, TD_STREAM_COMPUTE);
}

/* ---- products ---- */

/* The product by cuBLASLt; AGAIN: it does not take this one. */
static td_status lt_gemm(td_cuda_choice *c, void *stream, const td_cuda_gemm_args *a, const void *rows)
{
    const td_cuda_weight *w = a->w;
    td_cuda_lt_args l = {};
    size_t K = (size_t)w->K;
    td_dtype t = w->type == TD_CUDA_W_F16 ? TD_F16 : TD_BF16;
    const void *x = a->x;
    size_t ldx = a->ldx;
    if (a->x_is_f32) {
        if ((size_t)a->T * K * 2 > c->x16_bytes) return TD_AGAIN;
        TD_TRY(td_cuda_status(td_cuda_convert(stream, (const float *)a->x, a->ldx, a->T, w->K, c->x16, t, K),
                              "rounding of activations"));
        x = c->x16;
        ldx = K;
    }
    if ((uintptr_t)x % 16 || ldx % 8 || (uintptr_t)a->y % 16 || a->ldy % 4) return TD_AGAIN;
    l.N = w->N;
    l.K = w->K;
    l.T = a->T;
    l.dtype = t;
    l.w = rows;
    l.x = x;
    l.ldx = ldx;
    l.bias = w->bias;
    l.y = a->y;
    l.y_dtype = TD_F32;
    l.ldy = a->ldy;
    l.add = a->add;
    td_status s = td_cuda_lt_gemm(c->lt, stream, &l);
    return s == TD_ENOSUP ? TD_AGAIN : s;
}

td_status td_cuda_choice_gemm(td_cuda_choice *c, void *stream, const td_cuda_gemm_args *a, const void *rows)
{
    const td_cuda_wtype type = a->w->type;
    if (c->may & TD_CUDA_LT && rows && a->T >= TD_CUDA_LT_ROWS && type <= TD_CUDA_W_F16) {
        td_status s = lt_gemm(c, stream, a, rows);
        if (s != TD_AGAIN) return s;
    }
    if (c->may & TD_CUDA_GEMM_SM90A && a->T >= TD_CUDA_LT_ROWS && a->T <= 65408 &&
        (type == TD_CUDA_W_BF16 || type == TD_CUDA_W_E4M3_ROW))
        return td_cuda_status(td_cuda_gemm_hopper(stream, a), "product (Hopper)");
    return td_cuda_status(td_cuda_gemm(stream, a), "product");
}

/* ---- attention ---- */

static bool hopper_takes(const td_cuda_choice *c, const td_cuda_attn_args *a)
{
    const int P = a->kv->P;
    bool pages = P % 128 == 0 || (P >= 8 && 128 % P == 0);
    return c->may & TD_CUDA_ATTN_SM90A && a->prompts && pages && a->kv->dtype == TD_BF16 &&
           (a->D == 64 || a->D == 128) && attn_most_blocks(a) <= c->max_blocks;
}

td_status td_cuda_choice_attention(td_cuda_choice *c, void *stream, const td_cuda_attn_args *a)
{
    if (!hopper_takes(c, a)) return td_cuda_status(td_cuda_attention(stream, a), "attention");
    TD_TRY(td_cuda_status(td_cuda_attention_hopper(stream, a, c->redo, c->max_blocks), "attention (Hopper)"));
    if (!a->few) return TD_OK;
    td_cuda_attn_args rest = *a;
    rest.prompts = false;
    return td_cuda_status(td_cuda_attention(stream, &rest), "attention");
}
