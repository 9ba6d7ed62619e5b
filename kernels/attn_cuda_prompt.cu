// SPDX-License-Identifier: Apache-2.0
/* kernels/attn_cuda_prompt.cu - attention of prompt rows: a block of 128 packed rows (64 when D > 128) of one
 * kv head passes over its keys once; 16 rows a warp.
 *
 * K and V have one buffer each: V of a tile is on its way during Q K', K of the next tile during the rest
 * (cp.async, two barriers a tile). The split's o is in registers; the row's O too, or, when D > 128, in
 * shared memory, where it is touched once per 256 keys. Blocks of a sequence start with its last rows, whose
 * work is longest. */
#include "kernels/attn_cuda_launch.h"
#include "kernels/attn_cuda_tile.h"

template <int DM, int NW> struct prompt_shape {
    enum {
        STASH = DM > 128,
        THREADS = NW * 32,
        K_AT = 0,
        V_AT = attn_shape<DM>::TILE_BYTES,
        Q_AT = 2 * attn_shape<DM>::TILE_BYTES,
        O_AT = Q_AT + NW * attn_shape<DM>::Q_BYTES,
        OFF_AT = O_AT + (STASH ? THREADS * attn_shape<DM>::NV * 4 * 4 : 0),
        BYTES = OFF_AT + 2 * ATTN_TILE * 4
    };
};

/* The running (M, L, O) of the lane's rows. */
template <int DM, bool STASH> struct prompt_sum {
    float O[STASH ? 1 : attn_shape<DM>::NV][4], M[2], L[2];
};
template <int DM, int NW, bool STASH>
static TD_DEV void prompt_merge(prompt_sum<DM, STASH> &r, float *stash, attn_state<DM> &st)
{
    attn_sum(st);
    const attn_scale c[2] = {attn_merge(r.M[0], r.L[0], st.m[0], st.l[0]),
                             attn_merge(r.M[1], r.L[1], st.m[1], st.l[1])};
#pragma unroll
    for (int n = 0; n < attn_shape<DM>::NV; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if constexpr (STASH) {
                float *p = stash + (n * 4 + i) * NW * 32;
                *p = attn_merge_o(*p, st.o[n][i], c[i >> 1]);
            } else
                r.O[n][i] = attn_merge_o(r.O[n][i], st.o[n][i], c[i >> 1]);
        }
    attn_reset(st);
}

/* Only D 128 on sm_100 spills, 6 registers. */
// limits: regs 255, spill 24, smem 0
template <int DM, class E, int NW>
static __global__ void __launch_bounds__(NW * 32) attn_prompt_kernel(const attn_args a)
{
    typedef attn_shape<DM> S;
    typedef prompt_shape<DM, NW> L;
    TD_DYN_SMEM(unsigned char, smem);
    const int tid = (int)threadIdx.x, lane = tid & 31, warp = tid >> 5, item = (int)blockIdx.x;
    td_grid_wait();
    if (item >= a.plan[PLAN_BLOCKS] || (a.redo && !a.redo[item])) return;
    const int si = plan_find(plan_blocks(a), a.n_seq, item);
    const td_cuda_attn_seq s = a.seq[si];
    const int rem = item - plan_blocks(a)[si], g = rem % a.G, n = s.n_rows * a.group,
              blocks = (n + NW * 16 - 1) / (NW * 16);
    const int pr0 = (blocks - 1 - rem / a.G) * NW * 16, pr1 = min(pr0 + NW * 16, n);
    const attn_rows rows = attn_rows_of(a, s, pr0 + warp * 16, n, lane);
    const attn_src src = {a.kv + (size_t)g * a.head_elems, a.pages + s.page0,
                          attn_first_key(s.pos0 + pr0 / a.group, a.window), s.pos0 + (pr1 - 1) / a.group + 1};
    unsigned char *qs = smem + L::Q_AT + warp * S::Q_BYTES;
    float *stash = (float *)(smem + L::O_AT) + tid;
    uint32_t *off = (uint32_t *)(smem + L::OFF_AT);
    int key0 = src.begin / ATTN_TILE * ATTN_TILE, buf = 0;
    attn_offsets(off, a, &src, key0, 0, tid, L::THREADS);
    __syncthreads();
    attn_copy<DM>(smem + L::K_AT, src.kv, off, a.D, tid, L::THREADS);
    td_cp_async_commit();
    attn_load_q<DM, E>(qs, a, s, g, pr0 + warp * 16, n, lane);
    prompt_sum<DM, L::STASH> sum = {{}, {-INFINITY, -INFINITY}, {0.f, 0.f}};
    if constexpr (L::STASH)
        for (int i = 0; i < S::NV * 4; i++) stash[i * L::THREADS] = 0.f;
    attn_state<DM> st;
    attn_reset(st);
    for (; key0 < src.end; key0 += ATTN_TILE, buf ^= 1) {
        const int next = key0 + ATTN_TILE;
        const bool active = key0 <= rows.pos_max && next > rows.first_min;
        float p[8][4];
        if (next < src.end) attn_offsets(off + (buf ^ 1) * ATTN_TILE, a, &src, next, 0, tid, L::THREADS);
        td_cp_async_wait<0>();
        __syncthreads(); /* K is here, V's buffer is free, the next offsets are written */
        attn_copy<DM>(smem + L::V_AT, src.kv + a.v_elems, off + buf * ATTN_TILE, a.D, tid, L::THREADS);
        td_cp_async_commit();
        if (active) attn_scores<DM, E>(p, qs, smem + L::K_AT, lane);
        td_cp_async_wait<0>();
        __syncthreads(); /* V is here, K's buffer is free */
        if (next < src.end)
            attn_copy<DM>(smem + L::K_AT, src.kv, off + (buf ^ 1) * ATTN_TILE, a.D, tid, L::THREADS);
        td_cp_async_commit();
        if (active) attn_tile_end<DM, E>(p, st, a, rows, key0, src.end, smem + L::V_AT, lane);
        if (next % TD_CUDA_ATTN_SPLIT == 0 || next >= src.end) prompt_merge<DM, NW, L::STASH>(sum, stash, st);
    }
    td_cp_async_wait<0>();
    if (a.redo && tid == 0) a.redo[item] = 0;
    td_grid_launch();
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int pr = pr0 + warp * 16 + (lane >> 2) + h * 8;
        if (pr >= n) continue;
        const int head = g * a.group + pr % a.group;
        const float end = attn_end(sum.M[h], sum.L[h], a.sinks, head);
        const size_t at = (size_t)(s.row0 + pr / a.group) * a.ldo + (size_t)(head * a.D + (lane & 3) * 2);
#pragma unroll
        for (int k = 0; k < S::NV; k++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float v;
                if constexpr (L::STASH)
                    v = stash[(k * 4 + h * 2 + i) * L::THREADS];
                else
                    v = sum.O[k][h * 2 + i];
                if (k * 8 < a.D) attn_store(a, at + (size_t)(k * 8 + i), v * end);
            }
    }
}

template <int DM, class E> static int prompt_launch(void *stream, const attn_args &a, int blocks)
{
    constexpr int NW = DM <= 128 ? 8 : 4;
    return (int)td_launch_big(attn_prompt_kernel<DM, E, NW>, dim3((unsigned)blocks), dim3(NW * 32),
                              (size_t)prompt_shape<DM, NW>::BYTES, (cudaStream_t)stream, a);
}
template <class E> static int prompt_by_dim(void *stream, const attn_args &a, int blocks)
{
    if (a.D <= 64) return prompt_launch<64, E>(stream, a, blocks);
    if (a.D <= 96) return prompt_launch<96, E>(stream, a, blocks);
    if (a.D <= 128) return prompt_launch<128, E>(stream, a, blocks);
    return prompt_launch<256, E>(stream, a, blocks);
}
int attn_prompt(void *stream, const attn_args &a, bool f16, int blocks)
{
    return f16 ? prompt_by_dim<attn_f16>(stream, a, blocks) : prompt_by_dim<attn_bf16>(stream, a, blocks);
}
