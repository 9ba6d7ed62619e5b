// SPDX-License-Identifier: Apache-2.0
/* kernels/gemm_cuda_sm90a.cu - many rows of x on Hopper: gemm_cuda_many.cu's tile (128 weights by 128
 * tokens), leaves and tree with wgmma and bulk copies. Not run on a device yet: off until its results are
 * recorded (numerics of its own).
 *
 * The packed order of a weight is also wgmma's order of A in registers, so weights need no second copy and
 * FP8 becomes bf16 on the way. x is first copied into the image that a tile has in shared memory (columns
 * permuted like the weights', swizzled, padded): a stage is then 9 plain bulk copies, no tensor map.
 * Warpgroup 0 copies, 1 and 2 hold 64 weights each. */
#include "kernels/gemm_cuda_tile.h"
#include "kernels/sm90a.h"

enum {
    STAGES = 3,
    TOKENS = 128,
    THREADS = 384,
    X_BYTES = TOKENS * 128,
    REGS = TOKENS / 2,
    LEVEL_FLOATS = 256 * REGS
};

template <class W> struct hopper_shape {
    enum {
        W_BYTES = 8 * 2 * W::CHUNK_BYTES,
        STAGE = W_BYTES + X_BYTES,
        LEVELS_AT = STAGES * STAGE,
        BAR_AT = LEVELS_AT + 2 * LEVEL_FLOATS * 4,
        BYTES = BAR_AT + 2 * STAGES * 8
    };
};

/* The image of x: [tile of 128 tokens][block][token][piece of 16 bytes, exchanged by token % 8]. A thread
 * makes a piece. */
// limits: regs 40, spill 0, smem 0
template <bool F32>
static __global__ void gemm_image_kernel(uint4 *out, const void *x, size_t ldx, int T, gemm_cut c)
{
    int i = (int)(blockIdx.x * 256 + threadIdx.x), t = (int)blockIdx.y;
    if (i >= c.n_blocks * 8) return;
    int block = i / 8, piece = i % 8, end, col = gemm_block_col(c, block, &end);
    uint32_t r[4];
    for (int k = 0; k < 4; k++) {
        /* places 16 s + m of the tile, m = 8 (piece % 2) + 2 k: k = 2 q + {0, 1} of step s = piece / 2, upper
         * half if m >= 8 */
        int s = piece / 2, at = col + s / 2 * 32 + 8 * k + 4 * (s & 1) + 2 * (piece & 1);
        float v[2];
        for (int e = 0; e < 2; e++) {
            size_t from = (size_t)t * ldx + (size_t)(at + e);
            bool ok = t < T && at + e < end;
            if constexpr (F32)
                v[e] = ok ? ((const float *)x)[from] : 0.f;
            else
                v[e] = ok ? __bfloat162float(((const __nv_bfloat16 *)x)[from]) : 0.f;
        }
        r[k] = gemm_bf16::pack(v[0], v[1]);
    }
    size_t tile = (size_t)(t / TOKENS) * (size_t)c.n_blocks + (size_t)block;
    out[(tile * TOKENS + (size_t)(t % TOKENS)) * 8 + (size_t)(piece ^ (t & 7))] =
        make_uint4(r[0], r[1], r[2], r[3]);
}

template <class W>
static TD_DEV void hopper_produce(const gemm_args &a, unsigned char *smem, uint64_t *full, uint64_t *empty)
{
    typedef hopper_shape<W> S;
    const int rb0 = (int)blockIdx.y * 8, have = min(8, a.row_blocks - rb0);
    const unsigned char *x =
        (const unsigned char *)a.x + (size_t)blockIdx.x * (size_t)a.cut.n_blocks * X_BYTES;
    for (int block = 0; block < a.cut.n_blocks; block++) {
        const int stage = block % STAGES, turn = block / STAGES;
        if (turn) sm90_wait(&empty[stage], (turn - 1) & 1);
        sm90_expect(&full[stage], have * 2 * W::CHUNK_BYTES + X_BYTES);
        unsigned char *to = smem + stage * S::STAGE;
        for (int r = 0; r < have; r++)
            sm90_copy(to + r * 2 * W::CHUNK_BYTES,
                      a.w + ((size_t)(rb0 + r) * (size_t)a.cut.n_blocks + (size_t)block) * 2 * W::CHUNK_BYTES,
                      2 * W::CHUNK_BYTES, &full[stage]);
        sm90_copy(to + S::W_BYTES, x + (size_t)block * X_BYTES, X_BYTES, &full[stage]);
    }
}

/* One leaf's end: the tree of gemm_cuda_many.cu on this thread's 64 sums. */
static TD_DEV void hopper_leaf_end(float (&acc)[REGS], float (&low)[REGS], float *level, int leaf, int leaves)
{
#pragma unroll
    for (int i = 0; i < REGS; i++) {
        float v = acc[i], *l1 = level + i * 256, *l2 = l1 + LEVEL_FLOATS;
        if (leaf & 1) v = low[i] + v;
        if ((leaf & 3) == 3) v = *l1 + v;
        if ((leaf & 7) == 7) v = *l2 + v;
        if (leaf + 1 == leaves || !(leaf & 1))
            low[i] = v;
        else if ((leaf & 3) == 1)
            *l1 = v;
        else
            *l2 = v;
    }
}

template <class W>
static TD_DEV void hopper_consume(const gemm_args &a, unsigned char *smem, uint64_t *full, uint64_t *empty,
                                  int tid)
{
    typedef hopper_shape<W> S;
    const int lane = tid & 31, warp = tid >> 5; /* of 8: row block `warp` of the tile */
    const int n0 = ((int)blockIdx.y * 8 + warp) * 16 + (lane >> 2), t0 = (int)blockIdx.x * TOKENS;
    const bool copied = (int)blockIdx.y * 8 + warp < a.row_blocks;
    float acc[REGS], low[REGS], *level = (float *)(smem + S::LEVELS_AT) + tid;
#pragma unroll
    for (int i = 0; i < REGS; i++) acc[i] = low[i] = 0.f;
    int block = 0;
    for (int leaf = 0; leaf < a.cut.leaves; leaf++) {
        const int leaf_end = gemm_leaf_begin(a.cut, leaf + 1);
        if (block == leaf_end) /* an empty leaf */
#pragma unroll
            for (int i = 0; i < REGS; i++) acc[i] = 0.f;
        for (int first = 1; block < leaf_end; block++) {
            const int stage = block % STAGES;
            sm90_wait(&full[stage], block / STAGES & 1);
            const unsigned char *w = smem + stage * S::STAGE + warp * 2 * W::CHUNK_BYTES,
                                *x = smem + stage * S::STAGE + S::W_BYTES;
            uint32_t f[4][4];
#pragma unroll
            for (int c = 0; c < 2; c++) {
                uint4 v[W::V];
#pragma unroll
                for (int i = 0; i < W::V; i++)
                    v[i] = copied ? *(const uint4 *)(w + c * W::CHUNK_BYTES + i * 512 + lane * 16)
                                  : make_uint4(0, 0, 0, 0);
                W::step(v, 0, f[2 * c]);
                W::step(v, 1, f[2 * c + 1]);
            }
            sm90_hold(acc);
            sm90_hold(f);
            sm90_mma_fence();
#pragma unroll
            for (int s = 0; s < 4; s++) {
                sm90_mma_n128_rs(acc, f[s], sm90_along_k(x + s * 32), !first);
                first = 0;
            }
            sm90_mma_commit();
            sm90_mma_wait<0>();
            sm90_hold(acc);
            if (lane == 0) sm90_arrive(&empty[stage]);
        }
        if constexpr (W::ROW_SCALE) {
            const float s[2] = {n0 < a.N ? a.scale[n0] : 0.f, n0 + 8 < a.N ? a.scale[n0 + 8] : 0.f};
#pragma unroll
            for (int i = 0; i < REGS; i++) acc[i] = acc[i] * s[i >> 1 & 1];
        }
        hopper_leaf_end(acc, low, level, leaf, a.cut.leaves);
    }
#pragma unroll
    for (int i = 0; i < REGS; i++)
        gemm_end(a, n0 + (i >> 1 & 1) * 8, t0 + i / 4 * 8 + (lane & 3) * 2 + (i & 1), low[i]);
}

/* grid: (tiles of tokens, tiles of 128 weights). */
// limits: regs 168, spill 0, smem 0
template <class W> static __global__ void __launch_bounds__(384, 1) gemm_hopper_kernel(const gemm_args a)
{
    TD_DYN_SMEM(unsigned char, raw);
    unsigned char *smem = raw + ((1024 - (td_smem_u32(raw) & 1023)) & 1023);
    uint64_t *full = (uint64_t *)(smem + hopper_shape<W>::BAR_AT), *empty = full + STAGES;
    const int group = (int)threadIdx.x / 128;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            sm90_barrier_init(&full[i], 1);
            sm90_barrier_init(&empty[i], 8); /* one per warp that reads */
        }
        sm90_barrier_fence();
    }
    __syncthreads();
    td_grid_wait();
    if (group == 0) {
        sm90_fewer_registers<24>();
        if (threadIdx.x == 0) hopper_produce<W>(a, smem, full, empty);
    } else {
        sm90_more_registers<240>();
        hopper_consume<W>(a, smem, full, empty, (int)threadIdx.x - 128);
    }
}

int td_cuda_gemm_hopper(void *stream, const td_cuda_gemm_args *args)
{
    if (args->T <= 0) return 0;
    const td_cuda_wtype type = args->w->type;
    const int tiles = (args->T + TOKENS - 1) / TOKENS;
    if (tiles * TOKENS > 65535 || (type != TD_CUDA_W_BF16 && type != TD_CUDA_W_E4M3_ROW))
        return (int)cudaErrorInvalidValue;
    gemm_args a = gemm_args_of(args);
    cudaStream_t s = (cudaStream_t)stream;
    uint4 *image = (uint4 *)((char *)args->ws + TD_CUDA_GEMM_COUNTERS * 4);
    dim3 grid((unsigned)((a.cut.n_blocks * 8 + 255) / 256), (unsigned)(tiles * TOKENS));
    cudaError_t e = td_launch(args->x_is_f32 ? gemm_image_kernel<true> : gemm_image_kernel<false>, grid,
                              dim3(256), 0, s, image, a.x, a.ldx, a.T, a.cut);
    if (e != cudaSuccess) return (int)e;
    a.x = image;
    dim3 tile((unsigned)tiles, (unsigned)((a.row_blocks + 7) / 8));
    if (type == TD_CUDA_W_BF16)
        return (int)td_launch_big(gemm_hopper_kernel<gemm_w16<gemm_bf16>>, tile, dim3(THREADS),
                                  (size_t)hopper_shape<gemm_w16<gemm_bf16>>::BYTES + 1024, s, a);
    return (int)td_launch_big(gemm_hopper_kernel<gemm_e4m3<false>>, tile, dim3(THREADS),
                              (size_t)hopper_shape<gemm_e4m3<false>>::BYTES + 1024, s, a);
}
