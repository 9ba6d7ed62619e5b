// SPDX-License-Identifier: Apache-2.0
/* kernels/gemm_cuda_few.cu - up to 64 rows of x: weights are streamed once, straight from memory into
 * fragments.
 *
 * A warp takes MT row blocks of 16 weights, one leaf of K, and all tokens; loads run U chunks
 * ahead of the products in registers, so that nothing waits for a barrier. Up to 16 tokens the 8 warps of a
 * CTA are the 8 leaves of the same rows and the tree is added in shared memory. Above, x would be read too
 * often: a CTA takes 4 times the rows and 2 leaves (its warps share x through L1), the pairs go through L2,
 * and the CTA that comes last adds them in the tree's order. */
#include "kernels/gemm_cuda_tile.h"

template <class W, int MT> struct few_weights {
    uint4 v[MT][W::V];
};
template <bool F32, int NT> struct few_x {
    uint4 v[NT][F32 ? 2 : 1];
};

template <class W, int MT>
static TD_DEV void few_load_w(few_weights<W, MT> &f, const gemm_args &a, int rb0, int chunk, int lane)
{
    size_t row = (size_t)a.cut.n_blocks * 2 * W::CHUNK_BYTES;
#pragma unroll
    for (int m = 0; m < MT; m++) {
        const unsigned char *p = a.w + (size_t)(rb0 + m) * row + (size_t)chunk * W::CHUNK_BYTES + lane * 16;
#pragma unroll
        for (int i = 0; i < W::V; i++)
            f.v[m][i] = rb0 + m < a.row_blocks ? td_ld_stream(p + i * 512) : make_uint4(0, 0, 0, 0);
    }
}

/* Eight columns of each token from column `col` of x on; past `end` is the leaf's padding. */
template <bool F32, int NT>
static TD_DEV void few_load_x(few_x<F32, NT> &f, const gemm_args &a, int col, int end, int lane)
{
    col += (lane & 3) * 8;
#pragma unroll
    for (int n = 0; n < NT; n++) {
        int t = n * 8 + (lane >> 2);
        bool ok = t < a.T && col < end;
        size_t at = (size_t)t * a.ldx + (size_t)col;
        const uint4 *p =
            F32 ? (const uint4 *)((const float *)a.x + at) : (const uint4 *)((const uint16_t *)a.x + at);
#pragma unroll
        for (int i = 0; i < (F32 ? 2 : 1); i++) f.v[n][i] = ok ? p[i] : make_uint4(0, 0, 0, 0);
    }
}

template <class OP, bool F32> static TD_DEV void few_x_step(const uint4 *v, int j, uint32_t (&b)[2])
{
    if constexpr (F32) {
        uint4 u = v[j];
        b[0] = OP::pack(__uint_as_float(u.x), __uint_as_float(u.y));
        b[1] = OP::pack(__uint_as_float(u.z), __uint_as_float(u.w));
    } else {
        b[0] = j ? v[0].z : v[0].x;
        b[1] = j ? v[0].w : v[0].y;
    }
}

/* Sums of one leaf: acc[m][n] is the product's fragment of row block m and tokens 8n .. 8n + 7. U chunks of
 * weights and XU of x are under way; a chunk's registers are loaded again as soon as its products are queued.
 */
template <class W, bool F32, int MT, int NT, int U, int XU>
static TD_DEV void few_leaf(float (&acc)[MT][NT][4], const gemm_args &a, int rb0, int leaf, int lane)
{
    static_assert(U % XU == 0, "the buffers of x repeat within those of the weights");
    const int c0 = 2 * gemm_leaf_begin(a.cut, leaf), c1 = 2 * gemm_leaf_begin(a.cut, leaf + 1);
    few_weights<W, MT> w[U];
    few_x<F32, NT> x[XU];
    float sum[W::BLOCK_SCALE ? MT : 1][NT][4] = {};
#pragma unroll
    for (int u = 0; u < U; u++)
        if (c0 + u < c1) few_load_w<W, MT>(w[u], a, rb0, c0 + u, lane);
    td_grid_wait(); /* weights need nobody's result; x does */
    if (c0 == c1) return;
    int w_end, x_end;
    const int w_col = gemm_block_col(a.cut, c0 / 2, &w_end) - c0 * 32; /* likewise of the weight */
    const int x_col =
        gemm_block_col(a.x_cut, c0 / 2, &x_end) - c0 * 32; /* column of chunk 0, were it in this leaf */
#pragma unroll
    for (int u = 0; u < XU; u++)
        if (c0 + u < c1) few_load_x<F32, NT>(x[u], a, x_col + (c0 + u) * 32, x_end, lane);
    for (int c = c0; c < c1; c += U) {
#pragma unroll
        for (int u = 0; u < U; u++) {
            const int chunk = c + u;
            if (chunk >= c1) continue;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                uint32_t b[NT][2], f[4];
#pragma unroll
                for (int n = 0; n < NT; n++) few_x_step<typename W::op, F32>(x[u % XU].v[n], j, b[n]);
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    W::step(w[u].v[m], j, f);
#pragma unroll
                    for (int n = 0; n < NT; n++) W::op::mma(acc[m][n], f, b[n]);
                }
            }
            if (chunk + U < c1) few_load_w<W, MT>(w[u], a, rb0, chunk + U, lane);
            if (chunk + XU < c1) few_load_x<F32, NT>(x[u % XU], a, x_col + (chunk + XU) * 32, x_end, lane);
            if constexpr (W::BLOCK_SCALE) {
                if (gemm_scale_ends(a, chunk, c1, w_col + chunk * 32, w_end)) {
#pragma unroll
                    for (int m = 0; m < MT; m++) {
                        float s = rb0 + m < a.row_blocks ? gemm_block_scale(a, (rb0 + m) * 16, w_col + chunk * 32) : 0.f;
#pragma unroll
                        for (int n = 0; n < NT; n++)
#pragma unroll
                            for (int i = 0; i < 4; i++) {
                                sum[m][n][i] = fmaf(acc[m][n][i], s, sum[m][n][i]);
                                acc[m][n][i] = 0.f;
                            }
                    }
                }
            }
        }
    }
    if constexpr (W::BLOCK_SCALE)
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) acc[m][n][i] = sum[m][n][i];
}

/* grid: (row blocks / (groups * MT), leaves >> lw, tiles of groups' rows); block: groups << lw warps; lw:
 * log2 of the leaves in a CTA. */
// limits: regs 255, spill 0, smem 128
template <class W, bool F32, int MT, int NT, int U, int XU>
static __global__ void __launch_bounds__(256, (NT == 1 ? 2 : 1)) gemm_few_kernel(gemm_args a, int lw)
{
    constexpr int ROWS = MT * 16, TOKENS = NT * 8, STRIDE = ROWS + 4; /* + 4: no two lanes meet in a bank */
    TD_DYN_SMEM(float, red);                                          /* [warp][token][row] */
    __shared__ unsigned last;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n_leaf = 1 << lw, threads = (int)blockDim.x,
              groups = threads / 32 >> lw;
    const int rb0 = ((int)blockIdx.x * groups + (warp >> lw)) * MT;
    float acc[MT][NT][4] = {};
    td_grid_launch();
    if (a.n_groups) td_grid_wait();
    if (!gemm_enter(a, TOKENS, F32 ? 4 : 2)) return;
    few_leaf<W, F32, MT, NT, U, XU>(acc, a, rb0, (int)blockIdx.y * n_leaf + (warp & (n_leaf - 1)), lane);
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int row = m * 16 + (lane >> 2) + (i >> 1) * 8, n = rb0 * 16 + row;
            float s = 1.f;
            if constexpr (W::ROW_SCALE) s = n < a.N ? a.scale[n] : 0.f;
#pragma unroll
            for (int k = 0; k < NT; k++) {
                float v = acc[m][k][i];
                if constexpr (W::ROW_SCALE) v = v * s;
                red[(warp * TOKENS + k * 8 + (lane & 3) * 2 + (i & 1)) * STRIDE + row] = v;
            }
        }
    __syncthreads();
    const int n0 = (int)blockIdx.x * groups * ROWS, parts = (int)gridDim.y, np = a.row_blocks * 16;
    for (int e = (int)threadIdx.x; e < groups * TOKENS * ROWS; e += threads) {
        int row = e % ROWS, t = e / ROWS % TOKENS, g = e / (ROWS * TOKENS), n = n0 + g * ROWS + row;
        float v[GEMM_MAX_LEAVES];
#pragma unroll
        for (int i = 0; i < GEMM_MAX_LEAVES; i++)
            v[i] = i < n_leaf ? red[((g * n_leaf + i) * TOKENS + t) * STRIDE + row] : 0.f;
        float s = gemm_tree(v, n_leaf);
        if (parts == 1)
            gemm_end(a, n, t, s);
        else if (n < np && t < a.T)
            a.part[((size_t)blockIdx.y * (size_t)a.T + (size_t)t) * (size_t)np + (size_t)n] = s;
    }
    if (parts == 1) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(&a.count[blockIdx.x], 1u) == (unsigned)parts - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    TD_ACQUIRE_ALL();
    for (int e = (int)threadIdx.x; e < groups * ROWS * a.T; e += threads) {
        int n = n0 + e % (groups * ROWS), t = e / (groups * ROWS);
        if (n >= a.N) continue;
        float v[GEMM_MAX_LEAVES];
#pragma unroll
        for (int i = 0; i < GEMM_MAX_LEAVES; i++)
            v[i] = i < parts ? __ldcg(&a.part[((size_t)i * (size_t)a.T + (size_t)t) * (size_t)np + (size_t)n])
                             : 0.f;
        gemm_end(a, n, t, gemm_tree(v, parts));
    }
    if (threadIdx.x == 0) a.count[blockIdx.x] = 0;
}

template <class W, bool F32, int MT, int NT, int U, int XU>
static int few_launch(void *stream, const gemm_args &a, int leaves_in_cta, int tiles)
{
    int lw = 0, sms = 0, device = 0;
    cudaError_t e = cudaGetDevice(&device);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
    if (e != cudaSuccess) return (int)e;
    while (1 << (lw + 1) <= leaves_in_cta && 1 << (lw + 1) <= a.cut.leaves) lw++;
    int groups = 8 >> lw, parts = a.cut.leaves >> lw;
    while (groups > 1 && a.row_blocks * parts * tiles < sms * groups * MT)
        groups /= 2; /* no SM without a CTA; same bits */
    int per = groups * MT;
    dim3 grid((unsigned)((a.row_blocks + per - 1) / per), (unsigned)parts, (unsigned)tiles);
    size_t smem = sizeof(float) * (size_t)(groups << lw) * NT * 8 * (MT * 16 + 4);
    return (int)td_launch_next(gemm_few_kernel<W, F32, MT, NT, U, XU>, grid,
                              dim3((unsigned)(32 * groups << lw)), smem, (cudaStream_t)stream, a, lw);
}

template <class W> static int few_by_tokens(void *stream, const gemm_args &a, bool x_is_f32, int tiles)
{
    constexpr int U = W::V == 1 ? 8 : 4; /* chunks of two row blocks that fill 64 registers */
    constexpr int U64 = W::BLOCK_SCALE ? 6 : U; /* sums of 128 columns beside 64 tokens: with 8, sm_100 spills */
    if (a.T <= 8) {
        if (x_is_f32) return few_launch<W, true, 1, 1, 8, 2>(stream, a, 8, tiles);
        return few_launch<W, false, 1, 1, 8, 4>(stream, a, 8, tiles);
    }
    if (a.T <= 16) return few_launch<W, false, 2, 2, U, 2>(stream, a, 8, tiles);
    if (a.T <= 32) return few_launch<W, false, 2, 4, U, 2>(stream, a, 2, tiles);
    return few_launch<W, false, 2, 8, U64, 1>(stream, a, 2, tiles);
}

int gemm_few(void *stream, const gemm_args &a, td_cuda_wtype type, bool x_is_f32, int tiles)
{
    switch (type) {
    case TD_CUDA_W_BF16:
        return few_by_tokens<gemm_w16<gemm_bf16>>(stream, a, x_is_f32, tiles);
    case TD_CUDA_W_F16:
        return few_by_tokens<gemm_w16<gemm_f16>>(stream, a, x_is_f32, tiles);
    case TD_CUDA_W_E4M3_ROW:
        return few_by_tokens<gemm_e4m3<false>>(stream, a, x_is_f32, tiles);
    case TD_CUDA_W_E4M3_BLOCK:
        return few_by_tokens<gemm_e4m3<true>>(stream, a, x_is_f32, tiles);
    default:
        return (int)cudaErrorInvalidValue;
    }
}
