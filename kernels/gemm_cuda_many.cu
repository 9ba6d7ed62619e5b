// SPDX-License-Identifier: Apache-2.0
/* kernels/gemm_cuda_many.cu - any number of rows of x: tiles of 128 weights by 64 or 128 tokens, three stages
 * of 64 columns brought by cp.async, the same chains and the same tree as gemm_cuda_few.cu.
 *
 * The tree over 8 leaves needs three partial sums beside the running one: the lowest level stays in
 * registers, the upper two lie in shared memory, touched three times per tile. 8 warps; a warp owns 64 x 32
 * (128 tokens) or 32 x 32 (64 tokens). Shared memory: 3 stages of weights in fragment order (each lane reads
 * its own 16 bytes) and of x in rows of 128 bytes whose 16-byte pieces are exchanged by row parity, so that a
 * quarter warp reads 8 different bank groups. */
#include "kernels/gemm_cuda_tile.h"

enum { STAGES = 3, MANY_THREADS = 256 };

template <class W, int TOKENS> struct many_shape {
    enum {
        WN = TOKENS == 128 ? 4 : 2, /* warps along tokens */
        WM = 8 / WN,
        MT = 8 / WM,
        NT = TOKENS / 8 / WN,
        W_BYTES = 8 * 2 * W::CHUNK_BYTES,
        X_BYTES = TOKENS * 128,
        STAGE = W_BYTES + X_BYTES,
        REGS = MT * NT * 4,
        LEVEL_FLOATS = MANY_THREADS * REGS
    };
};

template <class W, int TOKENS>
static TD_DEV void many_load(unsigned char *stage, const gemm_args &a, int rb0, int t0, int block)
{
    typedef many_shape<W, TOKENS> S;
    constexpr int PIECES = 2 * W::CHUNK_BYTES / 16; /* of one row block */
    for (int i = (int)threadIdx.x; i < 8 * PIECES; i += MANY_THREADS) {
        int rb = rb0 + i / PIECES;
        bool ok = rb < a.row_blocks;
        const unsigned char *p =
            a.w + ((size_t)(ok ? rb : 0) * (size_t)a.cut.n_blocks + (size_t)block) * 2 * W::CHUNK_BYTES;
        td_cp_async_16(stage + i * 16, p + i % PIECES * 16, ok);
    }
    int end, col = gemm_block_col(a.x_cut, block, &end);
    for (int i = (int)threadIdx.x; i < TOKENS * 8; i += MANY_THREADS) {
        int r = i >> 3, c = i & 7, t = t0 + r;
        bool ok = t < a.T && col + c * 8 < end;
        const uint16_t *p = (const uint16_t *)a.x + (ok ? (size_t)t * a.ldx + (size_t)(col + c * 8) : 0);
        td_cp_async_16(stage + S::W_BYTES + r * 128 + (c ^ (r & 1) << 2) * 16, p, ok);
    }
}

/* Chunk c of the block that the stage holds. */
template <class W, int TOKENS>
static TD_DEV void many_chunk(float (&acc)[many_shape<W, TOKENS>::MT][many_shape<W, TOKENS>::NT][4],
                              const unsigned char *stage, int c, int wm, int wn, int lane)
{
    typedef many_shape<W, TOKENS> S;
    uint4 f[S::MT][W::V], x[S::NT];
#pragma unroll
    for (int m = 0; m < S::MT; m++)
#pragma unroll
        for (int i = 0; i < W::V; i++)
            f[m][i] = *(const uint4 *)(stage + ((wm * S::MT + m) * 2 + c) * W::CHUNK_BYTES + i * 512 + lane * 16);
#pragma unroll
    for (int n = 0; n < S::NT; n++) {
        int r = (wn * S::NT + n) * 8 + (lane >> 2);
        x[n] = *(const uint4 *)(stage + S::W_BYTES + r * 128 + ((c * 4 + (lane & 3)) ^ (r & 1) << 2) * 16);
    }
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int m = 0; m < S::MT; m++) {
            uint32_t fa[4];
            W::step(f[m], j, fa);
#pragma unroll
            for (int n = 0; n < S::NT; n++) {
                const uint32_t b[2] = {j ? x[n].z : x[n].x, j ? x[n].w : x[n].y};
                W::op::mma(acc[m][n], fa, b);
            }
        }
}

/* grid: (tiles of tokens, tiles of 128 weights, 1), with groups (1, tiles of weights, tiles of groups' rows).
 */
// limits: regs 255, spill 16, smem 0
template <class W, int TOKENS> static __global__ void __launch_bounds__(256) gemm_many_kernel(gemm_args a)
{
    typedef many_shape<W, TOKENS> S;
    TD_DYN_SMEM(unsigned char, smem); /* stages, then up to two levels of the tree */
    const int tid = (int)threadIdx.x, lane = tid & 31, warp = tid >> 5, wm = warp / S::WN, wn = warp % S::WN;
    const int rb0 = (int)blockIdx.y * 8, t0 = (int)blockIdx.x * TOKENS, blocks = a.cut.n_blocks;
    float *level = (float *)(smem + STAGES * S::STAGE);
    float acc[S::MT][S::NT][4] = {}, low[S::MT][S::NT][4] = {},
          sum[W::BLOCK_SCALE ? S::MT : 1][S::NT][4] = {};
    td_grid_wait();
    if (!gemm_enter(a, TOKENS, 2)) return;
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < blocks) many_load<W, TOKENS>(smem + s * S::STAGE, a, rb0, t0, s);
        td_cp_async_commit();
    }
    int block = 0, stage = 0;
    for (int leaf = 0; leaf < a.cut.leaves; leaf++) {
        const int leaf_end = gemm_leaf_begin(a.cut, leaf + 1);
        for (; block < leaf_end; block++) {
            td_cp_async_wait<STAGES - 2>();
            __syncthreads();
            int ahead = stage == 0 ? STAGES - 1 : stage - 1;
            if (block + STAGES - 1 < blocks)
                many_load<W, TOKENS>(smem + ahead * S::STAGE, a, rb0, t0, block + STAGES - 1);
            td_cp_async_commit();
#pragma unroll
            for (int c = 0; c < 2; c++) {
                many_chunk<W, TOKENS>(acc, smem + stage * S::STAGE, c, wm, wn, lane);
                if constexpr (W::BLOCK_SCALE) {
                    int end, col = gemm_block_col(a.cut, block, &end) + c * 32;
                    if (!gemm_scale_ends(a, block * 2 + c, leaf_end * 2, col, end)) continue;
#pragma unroll
                    for (int m = 0; m < S::MT; m++) {
                        const int rb = rb0 + wm * S::MT + m;
                        const float s = rb < a.row_blocks ? gemm_block_scale(a, rb * 16, col) : 0.f;
#pragma unroll
                        for (int n = 0; n < S::NT; n++)
#pragma unroll
                            for (int i = 0; i < 4; i++) {
                                sum[m][n][i] = fmaf(acc[m][n][i], s, sum[m][n][i]);
                                acc[m][n][i] = 0.f;
                            }
                    }
                }
            }
            stage = stage == STAGES - 1 ? 0 : stage + 1;
        }
#pragma unroll
        for (int m = 0; m < S::MT; m++)
#pragma unroll
            for (int n = 0; n < S::NT; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float v = acc[m][n][i];
                    if constexpr (W::BLOCK_SCALE) {
                        v = sum[m][n][i];
                        sum[m][n][i] = 0.f;
                    }
                    if constexpr (W::ROW_SCALE) {
                        int row = (rb0 + wm * S::MT + m) * 16 + (lane >> 2) + (i >> 1) * 8;
                        v = v * (row < a.N ? a.scale[row] : 0.f);
                    }
                    float *l1 = level + ((m * S::NT + n) * 4 + i) * MANY_THREADS + tid,
                          *l2 = l1 + S::LEVEL_FLOATS;
                    if (leaf & 1) v = low[m][n][i] + v;
                    if ((leaf & 3) == 3) v = *l1 + v;
                    if ((leaf & 7) == 7) v = *l2 + v;
                    if (leaf + 1 == a.cut.leaves || !(leaf & 1))
                        low[m][n][i] = v;
                    else if ((leaf & 3) == 1)
                        *l1 = v;
                    else
                        *l2 = v;
                    acc[m][n][i] = 0.f;
                }
    }
    td_grid_launch();
#pragma unroll
    for (int m = 0; m < S::MT; m++)
#pragma unroll
        for (int n = 0; n < S::NT; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int row = (rb0 + wm * S::MT + m) * 16 + (lane >> 2) + (i >> 1) * 8;
                int t = t0 + (wn * S::NT + n) * 8 + (lane & 3) * 2 + (i & 1);
                gemm_end(a, row, t, low[m][n][i]);
            }
}

template <class W, int TOKENS> static int many_launch(void *stream, const gemm_args &a, int tiles)
{
    typedef many_shape<W, TOKENS> S;
    int levels = a.cut.leaves == 8 ? 2 : a.cut.leaves == 4 ? 1 : 0;
    dim3 grid(a.n_groups ? 1u : (unsigned)((a.T + TOKENS - 1) / TOKENS), (unsigned)((a.row_blocks + 7) / 8),
              (unsigned)tiles);
    return (int)td_launch_big(gemm_many_kernel<W, TOKENS>, grid, dim3(MANY_THREADS),
                              (size_t)STAGES * S::STAGE + (size_t)levels * S::LEVEL_FLOATS * 4,
                              (cudaStream_t)stream, a);
}

/* Tiles of 128 tokens want up to 224 KiB of shared memory (Hopper and later); the bits are those of tiles
 * of 64. */
static bool fits_large()
{
    static int bytes;
    int device = 0;
    if (!bytes &&
        (cudaGetDevice(&device) != cudaSuccess ||
         cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess))
        return false;
    return bytes >= 224 * 1024;
}

template <class W> static int many_by_tokens(void *stream, const gemm_args &a, int tokens, int tiles)
{
    if constexpr (!W::BLOCK_SCALE)
        if (tokens == 128 && fits_large()) return many_launch<W, 128>(stream, a, tiles);
    return many_launch<W, 64>(stream, a, tiles);
}

int gemm_many(void *stream, const gemm_args &a, td_cuda_wtype type, int tokens, int tiles)
{
    switch (type) {
    case TD_CUDA_W_BF16:
        return many_by_tokens<gemm_w16<gemm_bf16>>(stream, a, tokens, tiles);
    case TD_CUDA_W_F16:
        return many_by_tokens<gemm_w16<gemm_f16>>(stream, a, tokens, tiles);
    case TD_CUDA_W_E4M3_ROW:
        return many_by_tokens<gemm_e4m3<false>>(stream, a, tokens, tiles);
    case TD_CUDA_W_E4M3_BLOCK:
        return many_by_tokens<gemm_e4m3<true>>(stream, a, tokens, tiles);
    default:
        return (int)cudaErrorInvalidValue;
    }
}
