// SPDX-License-Identifier: Apache-2.0
/* kernels/gemm_cuda.cu - packing of weights, the copy of x that is padded like the weight, and the choice of
 * a kernel. */
#include "kernels/gemm_cuda_tile.h"
#include <string.h>

enum { GROUP_BYTES = 4 * (TD_CUDA_GEMM_GROUPS + 64) };

static bool is_fp8(td_cuda_wtype type)
{
    return type == TD_CUDA_W_E4M3_ROW || type == TD_CUDA_W_E4M3_BLOCK;
}
static int row_blocks_of(int N)
{
    return (N + 15) / 16;
}
static size_t up256(size_t n)
{
    return (n + 255) & ~(size_t)255;
}

const char *td_cuda_gemm_refuses(int N, int K, int slices, td_cuda_wtype type)
{
    if (N < 1 || K < 1 || N > 1 << 20 || K > 1 << 20) return "N and K must be 1 to 2^20";
    if ((unsigned)type >= TD_CUDA_W_TYPES) return "unknown weight type";
    if (slices != 0 && slices != 1 && slices != 2 && slices != 4 && slices != 8)
        return "slices must be 0, 1, 2, 4 or 8";
    if (slices && K % slices) return "K must be a multiple of slices";
    if (slices && type == TD_CUDA_W_E4M3_BLOCK && !gemm_scale_unit(K / slices))
        return "K / slices must be a multiple of 32 under block scales";
    return NULL;
}

size_t td_cuda_gemm_packed_bytes(int N, int K, int slices, td_cuda_wtype type)
{
    gemm_cut c = gemm_cut_of(K, slices, type);
    return (size_t)row_blocks_of(N) * 16 * (size_t)c.n_blocks * 64 * (is_fp8(type) ? 1 : 2);
}

size_t td_cuda_gemm_ws_bytes(int max_T, int max_N, int max_K)
{
    size_t k = (size_t)(max_K + 64 * GEMM_MAX_LEAVES + 63) / 64 * 64;
    int few = max_T < TD_CUDA_GEMM_FEW ? max_T : TD_CUDA_GEMM_FEW;
    size_t part = (size_t)(GEMM_MAX_LEAVES / 2) * (size_t)few * (size_t)row_blocks_of(max_N) * 16 * 4;
    return TD_CUDA_GEMM_COUNTERS * 4 + GROUP_BYTES + up256((size_t)(max_T + 127) / 128 * 128 * k * 2) +
           up256(part);
}

void td_cuda_gemm_pack_host(void *dst, const void *src, td_dtype from, int N, int K, int slices,
                            td_cuda_wtype type, int n0, int n1)
{
    gemm_cut c = gemm_cut_of(K, slices, type);
    bool fp8 = is_fp8(type);
    td_dtype to = type == TD_CUDA_W_F16 ? TD_F16 : TD_BF16;
    for (int n = n0; n < (n1 + 15) / 16 * 16; n++)
        for (int b = 0; b < c.n_blocks; b++) {
            int end, col = gemm_block_col(c, b, &end), have = n < N ? end - col < 64 ? end - col : 64 : 0;
            uint16_t v[64] = {0};
            size_t at = (size_t)n * (size_t)K + (size_t)col;
            if (have > 0 && !fp8)
                td_convert(v, to, (const char *)src + at * td_dtype_bytes(from), from, (size_t)have);
            for (int j = 0; j < 64; j++) {
                size_t i = gemm_packed_at(c, n, b, j, fp8);
                if (fp8)
                    ((uint8_t *)dst)[i] = j < have ? ((const uint8_t *)src)[at + (size_t)j] : 0;
                else
                    ((uint16_t *)dst)[i] = v[j];
            }
        }
}

/* A thread writes 8 elements of a lane (2 bytes: one step of a chunk; codes: the same half). */
// limits: regs 40, spill 0, smem 0
template <class T>
static __global__ void gemm_pack_kernel(T *dst, const T *src, int N, int K, gemm_cut c, int n0, int rows)
{
    const bool fp8 = sizeof(T) == 1;
    long long i = (long long)blockIdx.x * 256 + threadIdx.x;
    int lane = (int)(i & 31), j = (int)(i >> 5 & 1), half = (int)(i >> 6 & 1);
    long long unit = i >> 7;
    int block = (int)(unit % c.n_blocks), rb = (int)(unit / c.n_blocks);
    if (rb * 16 >= rows) return;
    int end, col = gemm_block_col(c, block, &end);
    for (int e = 0; e < 8; e++) {
        int reg = e >> 1, r = (lane >> 2) + (reg & 1) * 8,
            k = half * 32 + (lane & 3) * 8 + j * 4 + (reg >> 1) * 2 + (e & 1);
        int n = n0 + rb * 16 + r;
        T v = 0;
        if (n < N && col + k < end) v = src[(size_t)n * (size_t)K + (size_t)(col + k)];
        dst[gemm_packed_at(c, n, block, k, fp8)] = v;
    }
}

int td_cuda_gemm_pack(void *stream, void *dst, const void *src, int N, int K, int slices, td_cuda_wtype type,
                      int n0, int n1)
{
    gemm_cut c = gemm_cut_of(K, slices, type);
    int rows = (n1 - n0 + 15) / 16 * 16;
    if (rows <= 0) return 0;
    dim3 grid((unsigned)(((long long)rows / 16 * c.n_blocks * 128 + 255) / 256));
    cudaStream_t s = (cudaStream_t)stream;
    if (is_fp8(type))
        return (int)td_launch(gemm_pack_kernel<uint8_t>, grid, dim3(256), 0, s, (uint8_t *)dst,
                              (const uint8_t *)src, N, K, c, n0, rows);
    return (int)td_launch(gemm_pack_kernel<uint16_t>, grid, dim3(256), 0, s, (uint16_t *)dst,
                          (const uint16_t *)src, N, K, c, n0, rows);
}

/* grid: rows. */
// limits: regs 40, spill 0, smem 0
template <bool F16>
static __global__ void gemm_embed_kernel(const uint16_t *w, const int32_t *ids, int N, gemm_cut c, float *out,
                                         size_t ldo)
{
    int id = ids[blockIdx.x];
    for (int b = (int)threadIdx.x >> 6; b < c.n_blocks; b += (int)blockDim.x >> 6) {
        int end, col = gemm_block_col(c, b, &end), j = (int)threadIdx.x & 63;
        if (col + j >= end) continue;
        float v = 0.f;
        if (id >= 0 && id < N) {
            uint16_t u = w[gemm_packed_at(c, id, b, j, false)];
            v = F16 ? __half2float(__ushort_as_half(u)) : __bfloat162float(__ushort_as_bfloat16(u));
        }
        out[(size_t)blockIdx.x * ldo + (size_t)(col + j)] = v;
    }
}

int td_cuda_gemm_embed(void *stream, const td_cuda_weight *w, const int32_t *ids, int T, float *out,
                       size_t ldo)
{
    if (T <= 0) return 0;
    gemm_cut c = gemm_cut_of(w->K, w->slices, w->type);
    if (is_fp8(w->type)) return (int)cudaErrorInvalidValue;
    return (int)td_launch(w->type == TD_CUDA_W_F16 ? gemm_embed_kernel<true> : gemm_embed_kernel<false>,
                          dim3((unsigned)T), dim3(256), 0, (cudaStream_t)stream, (const uint16_t *)w->p, ids,
                          w->N, c, out, ldo);
}

/* out[t][block * 64 + j]: x rounded to the operand type, leaves padded with zeros. A thread makes 8 columns;
 * grid: (, T). */
// limits: regs 40, spill 0, smem 0
template <class OP, bool F32>
static __global__ void gemm_x_kernel(uint4 *out, const void *x, size_t ldx, gemm_cut c, const int32_t *row0,
                                     int n_groups, int t0)
{
    int i = (int)(blockIdx.x * 256 + threadIdx.x), t = (int)blockIdx.y;
    td_grid_launch();
    td_grid_wait();
    if (i >= c.n_blocks * 8) return;
    if (row0 && (t0 + t < row0[0] || t0 + t >= row0[n_groups])) return;
    int end, col = gemm_block_col(c, i / 8, &end) + i % 8 * 8;
    uint32_t r[4];
    for (int k = 0; k < 4; k++) {
        size_t at = (size_t)t * ldx + (size_t)(col + 2 * k);
        bool a = col + 2 * k < end, b = col + 2 * k + 1 < end;
        if constexpr (F32) {
            const float *p = (const float *)x + at;
            r[k] = OP::pack(a ? p[0] : 0.f, b ? p[1] : 0.f);
        } else {
            const uint16_t *p = (const uint16_t *)x + at;
            r[k] = (a ? (uint32_t)p[0] : 0u) | (b ? (uint32_t)p[1] : 0u) << 16;
        }
    }
    out[(size_t)t * (size_t)(c.n_blocks * 8) + (size_t)i] = make_uint4(r[0], r[1], r[2], r[3]);
}

/* Rows of x [T] as operands, padded like the weight; with groups only rows that have an owner. */
static int copy_x(void *stream, void *out, gemm_args &g, bool x_is_f32, bool f16)
{
    typedef void (*kernel)(uint4 *, const void *, size_t, gemm_cut, const int32_t *, int, int);
    kernel k = !x_is_f32 ? (kernel)gemm_x_kernel<gemm_bf16, false>
               : f16     ? (kernel)gemm_x_kernel<gemm_f16, true>
                         : (kernel)gemm_x_kernel<gemm_bf16, true>;
    const gemm_cut c = g.cut;
    for (int t = 0; t < g.T; t += 65535) { /* the grid's second dimension */
        int n = g.T - t < 65535 ? g.T - t : 65535;
        const char *x = (const char *)g.x + (size_t)t * g.ldx * (x_is_f32 ? 4 : 2);
        int e =
            (int)td_launch_next(k, dim3((unsigned)((c.n_blocks * 8 + 255) / 256), (unsigned)n), dim3(256), 0,
                                (cudaStream_t)stream, (uint4 *)out + (size_t)t * (size_t)(c.n_blocks * 8),
                                (const void *)x, g.ldx, c, g.row0, g.n_groups, t);
        if (e) return e;
    }
    g.x = out;
    g.ldx = (size_t)c.n_blocks * 64;
    g.x_cut.K = c.n_blocks * 64;
    g.x_cut.slice_blocks = g.x_cut.slice_cols = 0;
    return 0;
}
/* x is read where it is when 8 columns are 8 aligned columns of one leaf. */
static bool x_aligned(const gemm_args &g, bool x_is_f32)
{
    int cols = g.cut.slice_cols ? g.cut.slice_cols : g.cut.K;
    return cols % 8 == 0 && g.ldx % (x_is_f32 ? 4 : 8) == 0 && ((size_t)g.x & 15) == 0;
}

/* Of 16, 32, 64, 128; 0: 128. */
static int shift_of(int n)
{
    return n == 16 ? 4 : n == 32 ? 5 : n == 64 ? 6 : 7;
}

gemm_args gemm_args_of(const td_cuda_gemm_args *a)
{
    const td_cuda_weight *w = a->w;
    gemm_args g;
    memset(&g, 0, sizeof g);
    g.w = (const unsigned char *)w->p;
    g.x = a->x;
    g.ldx = a->ldx;
    g.y = a->y;
    g.ldy = a->ldy;
    g.bias = w->bias;
    g.scale = w->scale;
    g.N = w->N;
    g.T = a->T;
    g.row_blocks = row_blocks_of(w->N);
    g.scale_shift = shift_of(w->scale_rows);
    g.scale_col_shift = shift_of(w->scale_cols);
    g.scale_cols = (w->K + (1 << g.scale_col_shift) - 1) >> g.scale_col_shift;
    g.scale_unit = w->slices ? gemm_scale_unit(w->K / w->slices) : 128;
    g.add = a->add;
    g.cut = g.x_cut = gemm_cut_of(w->K, w->slices, w->type);
    g.count = (unsigned *)a->ws;
    return g;
}

int td_cuda_gemm(void *stream, const td_cuda_gemm_args *a)
{
    const td_cuda_weight *w = a->w;
    if (a->T <= 0) return 0;
    gemm_args g = gemm_args_of(a);
    char *copy = (char *)a->ws + TD_CUDA_GEMM_COUNTERS * 4;
    bool few = a->kernel ? a->kernel == 1 : a->T <= TD_CUDA_GEMM_FEW;
    bool direct =
        x_aligned(g, a->x_is_f32) && (!a->x_is_f32 || (few && a->T <= 8)); /* f32 only for the fewest rows */
    if (!direct) {
        int e = copy_x(stream, copy, g, a->x_is_f32, w->type == TD_CUDA_W_F16);
        if (e) return e;
        copy += up256((size_t)a->T * g.ldx * 2);
    }
    g.part = (float *)copy;
    if (few) return gemm_few(stream, g, w->type, direct && a->x_is_f32);
    return gemm_many(stream, g, w->type, a->kernel == 2 || (!a->kernel && a->T <= 256) ? 64 : 128);
}

/* tile0[e]: tiles of `tokens` rows of the groups before e. One block. */
// limits: regs 32, spill 0, smem 2048
static __global__ void __launch_bounds__(512)
    gemm_tiles_kernel(const int32_t *row0, int n, int tokens, int32_t *tile0)
{
    __shared__ int s[TD_CUDA_GEMM_GROUPS];
    const int e = (int)threadIdx.x;
    td_grid_wait();
    const int mine = e < n ? (row0[e + 1] - row0[e] + tokens - 1) / tokens : 0;
    s[e] = mine;
    __syncthreads();
    for (int step = 1; step < TD_CUDA_GEMM_GROUPS; step *= 2) {
        const int add = e >= step ? s[e - step] : 0;
        __syncthreads();
        s[e] += add;
        __syncthreads();
    }
    if (e < n) tile0[e + 1] = s[e];
    if (e == 0) tile0[0] = 0;
}

int td_cuda_gemm_grouped(void *stream, const td_cuda_grouped_args *a)
{
    if (a->max_rows <= 0 || a->n <= 0) return 0;
    if (a->n > TD_CUDA_GEMM_GROUPS) return (int)cudaErrorInvalidValue;
    td_cuda_gemm_args one;
    memset(&one, 0, sizeof one);
    one.w = &a->shape;
    one.x = a->x;
    one.ldx = a->ldx;
    one.T = a->max_rows;
    one.y = a->y;
    one.ldy = a->ldy;
    one.ws = a->ws;
    gemm_args g = gemm_args_of(&one);
    int32_t *tile0 = (int32_t *)((char *)a->ws + TD_CUDA_GEMM_COUNTERS * 4);
    char *copy = (char *)tile0 + GROUP_BYTES;
    g.bias = g.scale = NULL;
    g.n_groups = a->n;
    g.row0 = a->row0;
    g.tile0 = tile0;
    g.group_w = a->p;
    g.group_bias = a->bias;
    g.group_scale = a->scale;
    const int mean = (a->max_rows + a->n - 1) / a->n;
    const int kernel = a->kernel ? a->kernel : mean <= 8 ? 1 : mean <= 24 ? 2 : 3;
    const int tokens = kernel == 1 ? 8 : kernel == 2 ? 16 : 64;
    const int tiles = a->max_rows / tokens + a->n < a->max_rows ? a->max_rows / tokens + a->n : a->max_rows;
    if (tiles > 65535) return (int)cudaErrorInvalidValue;
    int e = (int)td_launch(gemm_tiles_kernel, dim3(1), dim3(TD_CUDA_GEMM_GROUPS), 0, (cudaStream_t)stream,
                           a->row0, a->n, tokens, tile0);
    if (e) return e;
    const bool direct = x_aligned(g, a->x_is_f32) && (!a->x_is_f32 || kernel == 1);
    if (!direct && (e = copy_x(stream, copy, g, a->x_is_f32, a->shape.type == TD_CUDA_W_F16))) return e;
    g.T = tokens;
    if (kernel < 3) return gemm_few(stream, g, a->shape.type, direct && a->x_is_f32, tiles);
    return gemm_many(stream, g, a->shape.type, tokens, tiles);
}
