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
    if (c->may & TD_CUDA_LT)
        snprintf(lt, sizeof lt, "-lt%u%s", (unsigned)td_cuda_lt_version(),
                 c->may & TD_CUDA_LT_E4M3 ? "-f8" : "");
    else if (c->may & TD_CUDA_LT_E4M3)
        snprintf(lt, sizeof lt, "-f8lt%u", (unsigned)td_cuda_lt_version());
    if (c->may & (TD_CUDA_GEMM_SM90A | TD_CUDA_ATTN_SM90A))
        snprintf(sm, sizeof sm, "-h%u", c->may & (TD_CUDA_GEMM_SM90A | TD_CUDA_ATTN_SM90A));
    if (c->may)
        snprintf(c->numerics, sizeof c->numerics, "cuda-fast-sm%d%s%s-bf16", c->dev->arch, lt, sm);
    else
        snprintf(c->numerics, sizeof c->numerics, "%s", TD_CUDA_NUMERICS);
}

static void close_lt(td_cuda_choice *c)
{
    void *blocks[] = {c->lt_ws, c->x16};
    td_cuda_lt_close(c->lt);
    for (void *p : blocks)
        if (p) c->dev->free(c->dev, p);
    c->lt = nullptr;
    c->lt_ws = c->x16 = nullptr;
    c->x16_bytes = 0;
}

/* What only cuBLASLt works in is given back with it: who has no room for copies is short of memory. */
void td_cuda_choice_drop(td_cuda_choice *c, unsigned bits)
{
    const unsigned lt = TD_CUDA_LT | TD_CUDA_LT_E4M3;
    const bool last = c->may & lt && !(c->may & ~bits & lt);
    c->may &= ~bits;
    if (last) close_lt(c);
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
    if (fast && td_cuda_lt_version() >= TD_CUDA_LT_SCALES) c->may |= TD_CUDA_LT_E4M3;
    if (dev->arch != 90) c->may &= ~(unsigned)(TD_CUDA_GEMM_SM90A | TD_CUDA_ATTN_SM90A | TD_CUDA_LT_E4M3);
    if (c->may & TD_CUDA_LT && open_lt(c) < 0) {
        TD_WARN("cuBLASLt is not used: %s", td_reason());
        c->may &= ~(unsigned)(TD_CUDA_LT | TD_CUDA_LT_E4M3);
    }
    name_numerics(c);
    return TD_OK;
}

void td_cuda_choice_close(td_cuda_choice *c)
{
    if (!c->dev) return;
    close_lt(c);
    if (c->redo) c->dev->free(c->dev, c->redo);
    *c = td_cuda_choice{};
}

td_status td_cuda_choice_reserve(td_cuda_choice *c, int max_rows, int max_K, long long max_blocks)
{
    td_dev *d = c->dev;
    size_t x = (size_t)max_rows * (size_t)max_K * 2;
    void *p;
    if (c->may & (TD_CUDA_LT | TD_CUDA_LT_E4M3) && x > c->x16_bytes) {
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
template <class T> static __global__ void gemm_unpack_kernel(T *dst, const T *src, int K, gemm_cut c)
{
    const int n = (int)blockIdx.y, k0 = (int)(blockIdx.x * 128 + threadIdx.x) * 8;
    for (int k = k0; k < k0 + 8 && k < K; k++) {
        const int slice = c.slice_blocks ? k / c.slice_cols : 0, in = k - slice * c.slice_cols;
        dst[(size_t)n * (size_t)K + (size_t)k] =
            src[gemm_packed_at(c, n, slice * c.slice_blocks + in / 64, in % 64, sizeof(T) == 1)];
    }
}

template <class T>
static int unpack(void *stream, T *dst, const T *packed, int N, int K, int slices, td_cuda_wtype type)
{
    gemm_cut c = gemm_cut_of(K, slices, type);
    for (int n0 = 0; n0 < N; n0 += 65520) { /* the grid's second dimension; a multiple of 16 */
        int n = N - n0 < 65520 ? N - n0 : 65520;
        int e = (int)td_launch(gemm_unpack_kernel<T>, dim3((unsigned)((K + 1023) / 1024), (unsigned)n),
                               dim3(128), 0, (cudaStream_t)stream, dst + (size_t)n0 * (size_t)K,
                               packed + (size_t)n0 * (size_t)c.n_blocks * 64, K, c);
        if (e) return e;
    }
    return 0;
}

int td_cuda_gemm_unpack(void *stream, void *dst, const void *packed, int N, int K, int slices, bool codes)
{
    return codes ? unpack(stream, (uint8_t *)dst, (const uint8_t *)packed, N, K, slices, TD_CUDA_W_E4M3_ROW)
                 : unpack(stream, (uint16_t *)dst, (const uint16_t *)packed, N, K, slices, TD_CUDA_W_BF16);
}

/* Scales as cuda_lt.h has them, from [ceil(N / rows)][cols]; a thread each, zeros where a row of blocks is padded. */
// limits: regs 32, spill 0, smem 0
static __global__ void __launch_bounds__(256)
    lt_scales_kernel(float *dst, const float *src, td_cuda_lt_scaling how, int N, int cols, int rows_shift,
                     size_t n)
{
    const size_t i = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (i >= n) return;
    if (how == TD_CUDA_LT_ROW_SCALES) {
        dst[i] = src[i];
    } else if (how == TD_CUDA_LT_BLOCK_SCALES) {
        const size_t wide = ((size_t)cols + 3) / 4 * 4, r = i / wide, k = i % wide;
        dst[i] = k < (size_t)cols ? src[r * (size_t)cols + k] : 0.f;
    } else {
        const size_t k = i / (size_t)N, r = i % (size_t)N;
        dst[i] = src[(r >> rows_shift) * (size_t)cols + k];
    }
}

/* What cuBLASLt takes without padding, and how; PLAIN: of codes, not at all. */
static td_cuda_lt_scaling scaling_of(const td_cuda_weight *w)
{
    if (w->N % 4 || w->K % 16) return TD_CUDA_LT_PLAIN;
    if (w->type == TD_CUDA_W_E4M3_ROW) return TD_CUDA_LT_ROW_SCALES;
    if (w->type != TD_CUDA_W_E4M3_BLOCK || w->K % 128 || (w->scale_cols && w->scale_cols < 128)) return TD_CUDA_LT_PLAIN;
    return w->scale_rows && w->scale_rows < 128 ? TD_CUDA_LT_GROUP_SCALES : TD_CUDA_LT_BLOCK_SCALES;
}

static bool is_codes(const td_cuda_weight *w)
{
    return w->type == TD_CUDA_W_E4M3_ROW || w->type == TD_CUDA_W_E4M3_BLOCK;
}

static bool copied(const td_cuda_choice *c, const td_cuda_weight *w)
{
    if (is_codes(w)) return c->may & TD_CUDA_LT_E4M3 && scaling_of(w) != TD_CUDA_LT_PLAIN;
    return c->may & TD_CUDA_LT && w->K % 8 == 0 && w->N % 8 == 0;
}

static size_t row_major_bytes(const td_cuda_weight *w)
{
    return ((size_t)w->N * (size_t)w->K * (is_codes(w) ? 1 : 2) + 255) / 256 * 256;
}

static size_t scales_of(const td_cuda_weight *w)
{
    const size_t N = (size_t)w->N, cols = (size_t)w->K / 128;
    if (!is_codes(w)) return 0;
    const td_cuda_lt_scaling how = scaling_of(w);
    return how == TD_CUDA_LT_ROW_SCALES     ? N
           : how == TD_CUDA_LT_GROUP_SCALES ? N * cols
                                            : (N + 127) / 128 * ((cols + 3) / 4 * 4);
}

size_t td_cuda_choice_copy_bytes(const td_cuda_weight *w)
{
    return row_major_bytes(w) + (scales_of(w) * sizeof(float) + 255) / 256 * 256;
}

int td_cuda_choice_copy(void *stream, const td_cuda_weight *w, void *to)
{
    int e = td_cuda_gemm_unpack(stream, to, w->p, w->N, w->K, w->slices, is_codes(w));
    if (e || !is_codes(w)) return e;
    int shift = 0;
    while (1 << shift < w->scale_rows) shift++;
    const size_t n = scales_of(w);
    return (int)td_launch(lt_scales_kernel, dim3((unsigned)((n + 255) / 256)), dim3(256), 0,
                          (cudaStream_t)stream, (float *)(void *)((char *)to + row_major_bytes(w)), w->scale,
                          scaling_of(w), w->N, w->K / 128, shift, n);
}

static void without_copies(td_cuda_choice *c, bool here, size_t bytes, size_t left)
{
    char why[120] = "there is no room for row-major copies on another rank";
    if (!c->copied) td_cuda_choice_drop(c, TD_CUDA_LT | TD_CUDA_LT_E4M3);
    if (!here)
        snprintf(why, sizeof why,
                 "row-major copies of the weights need %zu MiB, more than half of the %zu MiB that are free",
                 bytes >> 20, left >> 20);
    TD_WARN("%s: cuBLASLt is not used, kernels compute as %s", why, c->numerics);
}

td_status td_cuda_choice_copies(td_cuda_choice *c, const td_cuda_weight *w, const void **rows, int n,
                                const td_ops_agree *ranks, void **block)
{
    td_dev *d = c->dev;
    size_t bytes = 0, left = 0;
    *block = nullptr;
    if (!(c->may & (TD_CUDA_LT | TD_CUDA_LT_E4M3))) return TD_OK;
    for (int i = 0; i < n; i++)
        if (copied(c, &w[i])) bytes += td_cuda_choice_copy_bytes(&w[i]);
    TD_TRY(d->free_bytes(d, &left));
    const bool here = bytes <= left / TD_CUDA_COPY_SHARE;
    bool all = here;
    if (ranks) TD_TRY(ranks->all(ranks->arg, here, &all));
    if (!all) {
        without_copies(c, here, bytes, left);
        return TD_OK;
    }
    char *at;
    TD_TRY(d->alloc(d, bytes ? bytes : 1, block));
    at = (char *)*block;
    for (int i = 0; i < n; i++) {
        if (!copied(c, &w[i])) continue;
        TD_TRY(
            td_cuda_status(td_cuda_choice_copy(d->stream[TD_STREAM_COMPUTE], &w[i], at), "copy of a weight"));
        rows[i] = at;
        at += td_cuda_choice_copy_bytes(&w[i]);
    }
    c->copied = true;
    return d->sync(d, TD_STREAM_COMPUTE);
}

/* ---- products ---- */

static bool aligned_for_lt(const td_cuda_gemm_args *a)
{
    return (uintptr_t)a->y % 16 == 0 && a->ldy % 4 == 0;
}

/* What products of values and of codes have alike. */
static td_cuda_lt_args lt_args(const td_cuda_gemm_args *a, const void *rows, int T)
{
    td_cuda_lt_args l = {};
    l.N = a->w->N;
    l.K = a->w->K;
    l.T = T;
    l.w = rows;
    l.y = a->y;
    l.y_dtype = TD_F32;
    l.ldy = a->ldy;
    l.add = a->add;
    return l;
}

/* AGAIN: cuBLASLt does not take this one. */
static td_status lt_run(td_cuda_choice *c, void *stream, const td_cuda_lt_args *l)
{
    td_status s = td_cuda_lt_gemm(c->lt, stream, l);
    return s == TD_ENOSUP ? TD_AGAIN : s;
}

/* The product by cuBLASLt; AGAIN: it does not take this one. */
static td_status lt_gemm(td_cuda_choice *c, void *stream, const td_cuda_gemm_args *a, const void *rows)
{
    const td_cuda_weight *w = a->w;
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
    if ((uintptr_t)x % 16 || ldx % 8 || !aligned_for_lt(a)) return TD_AGAIN;
    td_cuda_lt_args l = lt_args(a, rows, a->T);
    l.dtype = t;
    l.x = x;
    l.ldx = ldx;
    l.bias = w->bias;
    return lt_run(c, stream, &l);
}

int td_cuda_choice_codes(const td_cuda_choice *c, const td_cuda_weight *w, const void *rows, int T)
{
    if (!(c->may & TD_CUDA_LT_E4M3) || !rows || T < TD_CUDA_LT_ROWS || !is_codes(w)) return -1;
    const td_cuda_lt_scaling how = scaling_of(w);
    return how == TD_CUDA_LT_PLAIN ? -1 : how == TD_CUDA_LT_ROW_SCALES ? 0 : 128;
}

/* Rows [t0, T) from their codes, by the portable kernel. */
static td_status rest_of_rows(td_cuda_choice *c, void *stream, const td_cuda_gemm_args *a,
                              const td_cuda_codes *x, int t0)
{
    const size_t K = (size_t)x->K,
                 at = (size_t)((char *)x->code == c->x16) * td_cuda_codes_bytes(x->ld, x->T, x->K, x->group),
                 from = (at + 255) / 256 * 256;
    td_cuda_gemm_args rest = *a;
    if (t0 >= a->T) return TD_OK;
    if (from + (size_t)(a->T - t0) * K * 2 > c->x16_bytes) return TD_AGAIN;
    TD_TRY(td_cuda_status(td_cuda_dequant(stream, x, t0, (uint16_t *)(void *)(c->x16 + from), K),
                          "values of codes"));
    rest.x = c->x16 + from;
    rest.x_is_f32 = false;
    rest.ldx = K;
    rest.T = a->T - t0;
    rest.y = a->y + (size_t)t0 * a->ldy;
    return td_cuda_status(td_cuda_gemm(stream, &rest), "product");
}

/* The same with codes; the bias has a pass of its own. */
static td_status lt_codes(td_cuda_choice *c, void *stream, const td_cuda_gemm_args *a, const void *rows,
                          const td_cuda_codes *x)
{
    const td_cuda_weight *w = a->w;
    const int T = x->group ? a->T & ~3 : a->T;
    td_cuda_lt_args l = lt_args(a, rows, T);
    if (!aligned_for_lt(a)) return TD_AGAIN;
    l.scaling = scaling_of(w);
    l.w_scale = (const float *)(const void *)((const char *)rows + row_major_bytes(w));
    l.x = x->code;
    l.x_scale = x->scale;
    l.ldx = x->ld;
    td_status s = lt_run(c, stream, &l);
    if (s != TD_OK) return s;
    if (w->bias)
        TD_TRY(td_cuda_status(
            td_cuda_sum_tree(stream, a->y, 0, 1, T, w->N, a->ldy, w->bias, a->y, a->ldy, false), "bias"));
    return rest_of_rows(c, stream, a, x, T);
}

/* x as codes in x16, where it fits; AGAIN: not this one. */
static td_status make_codes(td_cuda_choice *c, void *stream, const td_cuda_gemm_args *a, int group,
                            td_cuda_codes *out)
{
    const int K = a->w->K;
    const td_dtype type = a->x_is_f32 ? TD_F32 : TD_BF16;
    const size_t rest = 3 * (size_t)K * 2 + 512;
    if (td_cuda_codes_bytes((size_t)K, a->T, K, group) + rest > c->x16_bytes) return TD_AGAIN;
    if ((uintptr_t)a->x % 16 || a->ldx * td_dtype_bytes(type) % 16) return TD_AGAIN;
    *out = td_cuda_codes_in(c->x16, (size_t)K, a->T, K, group);
    return td_cuda_status(td_cuda_quant(stream, a->x, type, a->ldx, out), "codes of activations");
}

/* A product that has only codes, in which cuBLASLt has no part after all: all rows from them. */
static td_status portable_codes(td_cuda_choice *c, void *stream, const td_cuda_gemm_args *a,
                                const td_cuda_codes *x)
{
    td_status s = rest_of_rows(c, stream, a, x, 0);
    return s == TD_AGAIN ? td_fail(TD_EFULL, "no room for the values of %d x %d codes", a->T, a->w->K) : s;
}

td_status td_cuda_choice_gemm(td_cuda_choice *c, void *stream, const td_cuda_gemm_args *a, const void *rows,
                              const td_cuda_codes *codes)
{
    const td_cuda_wtype type = a->w->type;
    const int group = td_cuda_choice_codes(c, a->w, rows, a->T);
    td_status s = TD_AGAIN;
    if (codes) {
        s = lt_codes(c, stream, a, rows, codes);
        return s == TD_AGAIN ? portable_codes(c, stream, a, codes) : s;
    }
    if (group >= 0) {
        td_cuda_codes made;
        s = make_codes(c, stream, a, group, &made);
        if (s == TD_OK) s = lt_codes(c, stream, a, rows, &made);
    } else if (c->may & TD_CUDA_LT && rows && a->T >= TD_CUDA_LT_ROWS && !is_codes(a->w)) {
        s = lt_gemm(c, stream, a, rows);
    }
    if (s != TD_AGAIN) return s;
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
    return c->may & TD_CUDA_ATTN_SM90A && a->prompts && !a->part && pages && a->kv->dtype == TD_BF16 &&
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
