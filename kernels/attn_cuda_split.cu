// SPDX-License-Identifier: Apache-2.0
/* kernels/attn_cuda_split.cu - attention of few rows (generated tokens, drafts): a warp is a block of its own
 * and takes 16 packed rows over one split of 256 keys; the result goes to the workspace (attn_merge_kernel
 * adds them up), or to where parts are wanted, of rows however many.
 *
 * The grid stays: a warp walks over its share of the plan's items, and K of the next tile is on its way
 * across the border of two items. One buffer each for K and V, no block barrier; 6 warps of an SM (D 128)
 * keep 16 KiB and more in flight each. */
#include "kernels/attn_cuda_launch.h"
#include "kernels/attn_cuda_tile.h"

template <int DM> struct split_shape {
    enum {
        V_AT = attn_shape<DM>::TILE_BYTES,
        OFF_AT = 2 * attn_shape<DM>::TILE_BYTES,
        Q_AT = OFF_AT + 2 * ATTN_TILE * 4,
        AT_AT = Q_AT + attn_shape<DM>::Q_BYTES,
        BYTES = AT_AT + 2 * 64
    };
};

/* A place in the work: an item and a tile of it. item < 0: the end. */
struct split_at {
    int item, seq, split, g, pr0, n, key0, end;
    attn_src src;
    int elsewhere; /* keys before the split that are not in the page table */
};
static_assert(sizeof(split_at) <= 64, "two fit their place in shared memory");

static TD_DEV void split_seek(split_at *w, const attn_args &a, int item)
{
    w->item = item < a.plan[PLAN_ITEMS] ? item : -1;
    if (item >= a.plan[PLAN_ITEMS]) return;
    const int seq = plan_find(plan_items(a), a.n_seq, item);
    const td_cuda_attn_seq s = a.seq[seq];
    const int n = s.n_rows * a.group, rem = item - plan_items(a)[seq], tiles = (n + 15) / 16,
              g = rem / tiles % a.G;
    const int nth = rem / (tiles * a.G), pr0 = rem % tiles * 16;
    const int split = a.part ? a.rank + (a.part0 + nth) * a.ranks
                             : attn_first_key(s.pos0, a.window) / TD_CUDA_ATTN_SPLIT + nth;
    const int begin = attn_first_key(s.pos0 + pr0 / a.group, a.window),
              stop = s.pos0 + (min(pr0 + 16, n) - 1) / a.group + 1;
    const int k0 = split * TD_CUDA_ATTN_SPLIT, key0 = max(k0, begin / ATTN_TILE * ATTN_TILE);
    const int end = min(k0 + TD_CUDA_ATTN_SPLIT, stop);
    w->seq = seq;
    w->split = split;
    w->g = g;
    w->pr0 = pr0;
    w->n = n;
    w->key0 = key0 < end ? key0 : k0; /* no row sees a key here: one tile of zeros makes the empty result */
    w->end = end;
    w->elsewhere = a.part ? (split - nth) * TD_CUDA_ATTN_SPLIT : 0;
    w->src.kv = a.kv + (size_t)g * a.head_elems;
    w->src.pages = a.pages + s.page0;
    w->src.begin = begin;
    w->src.end = stop;
}
static TD_DEV bool split_is_last(const split_at *w)
{
    return w->key0 + ATTN_TILE >= w->end;
}
static TD_DEV void split_next(split_at *r, const attn_args &a, const split_at *w)
{
    if (split_is_last(w)) {
        split_seek(r, a, w->item + (int)gridDim.x);
        return;
    }
    r->item = w->item;
    r->seq = w->seq;
    r->split = w->split;
    r->g = w->g;
    r->pr0 = w->pr0;
    r->n = w->n;
    r->key0 = w->key0 + ATTN_TILE;
    r->end = w->end;
    r->src.kv = w->src.kv;
    r->src.pages = w->src.pages;
    r->src.begin = w->src.begin;
    r->src.end = w->src.end;
    r->elsewhere = w->elsewhere;
}

template <int DM>
static TD_DEV void split_store(attn_state<DM> &st, const attn_args &a, const split_at *w, int lane)
{
    attn_sum(st);
    const td_cuda_attn_seq s = a.seq[w->seq];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int pr = w->pr0 + (lane >> 2) + h * 8;
        if (pr >= w->n) continue;
        float *ml, *o;
        if (a.part) {
            const int nth = (w->split - a.rank) / a.ranks - a.part0, head = w->g * a.group + pr % a.group;
            const size_t at =
                ((size_t)(s.row0 + pr / a.group) * a.n_parts + nth) * (size_t)(a.G * a.group) + head;
            ml = a.part + at * (size_t)(a.D + 2);
            o = ml + 2;
        } else {
            const int nth = w->split - attn_first_key(s.pos0, a.window) / TD_CUDA_ATTN_SPLIT;
            const size_t slot = (size_t)plan_slots(a)[w->seq] + (size_t)nth * (size_t)(w->n * a.G) +
                                (size_t)(w->g * w->n + pr);
            ml = a.part_ml + slot * 2;
            o = a.part_o + slot * (size_t)a.D;
        }
        if ((lane & 3) == 0) {
            ml[0] = st.m[h];
            ml[1] = st.l[h];
        }
        o += (lane & 3) * 2;
#pragma unroll
        for (int k = 0; k < attn_shape<DM>::NV; k++)
            if (k * 8 < a.D) *(float2 *)(o + k * 8) = make_float2(st.o[k][h * 2], st.o[k][h * 2 + 1]);
    }
    attn_reset(st);
}

/* Only D 256 spills; a tile of it reloads 54 registers. */
// limits: regs 255, spill 1152, smem 0
template <int DM, class E>
static __global__ void __launch_bounds__(32, (DM <= 96 ? 8 : 1)) attn_split_kernel(const attn_args a)
{
    typedef split_shape<DM> L;
    TD_DYN_SMEM(unsigned char, smem);
    const int lane = (int)threadIdx.x;
    uint32_t *off = (uint32_t *)(smem + L::OFF_AT);
    unsigned char *qs = smem + L::Q_AT;
    split_at *at =
        (split_at *)(smem + L::AT_AT); /* this tile and the next: in shared memory, for the registers' sake */
    td_grid_launch();
    td_grid_wait();
    if (lane == 0) split_seek(&at[0], a, (int)blockIdx.x);
    __syncwarp();
    if (at[0].item < 0) return;
    attn_offsets(off, a, &at[0].src, at[0].key0, at[0].elsewhere, lane, 32);
    __syncwarp();
    attn_copy<DM>(smem, at[0].src.kv, off, a.D, lane, 32);
    td_cp_async_commit();
    attn_state<DM> st;
    attn_reset(st);
    attn_rows rows = {};
    for (int buf = 0, loaded = -1; at[buf].item >= 0; buf ^= 1) {
        const split_at *w = &at[buf], *next = &at[buf ^ 1];
        if (w->item != loaded) {
            const td_cuda_attn_seq s = a.seq[w->seq];
            rows = attn_rows_of(a, s, w->pr0, w->n, lane);
            attn_load_q<DM, E>(qs, a, s, w->g, w->pr0, w->n, lane);
            loaded = w->item;
        }
        if (lane == 0) split_next(&at[buf ^ 1], a, w);
        __syncwarp();
        const bool more = next->item >= 0;
        if (more)
            attn_offsets(off + (buf ^ 1) * ATTN_TILE, a, &next->src, next->key0, next->elsewhere, lane, 32);
        td_cp_async_wait<0>();
        __syncwarp(); /* K is here, V's buffer is free, the next offsets are written */
        attn_copy<DM>(smem + L::V_AT, w->src.kv + a.v_elems, off + buf * ATTN_TILE, a.D, lane, 32);
        td_cp_async_commit();
        float p[8][4];
        attn_scores<DM, E>(p, qs, smem, lane);
        td_cp_async_wait<0>();
        __syncwarp(); /* V is here, K's buffer is free */
        if (more) attn_copy<DM>(smem, next->src.kv, off + (buf ^ 1) * ATTN_TILE, a.D, lane, 32);
        td_cp_async_commit();
        attn_tile_end<DM, E>(p, st, a, rows, w->key0, w->src.end, smem + L::V_AT, lane);
        if (split_is_last(w)) split_store<DM>(st, a, w, lane);
        __syncwarp(); /* all have read this place before the one after the next takes it */
    }
    td_cp_async_wait<0>();
}

template <int DM, class E> static int split_launch(void *stream, const attn_args &a, int sms)
{
    constexpr int BYTES = split_shape<DM>::BYTES;
    static_assert(DM > 128 || 6 * (BYTES + 1024) <= 228 * 1024, "6 warps of an SM of Hopper");
    int device = 0, shared = 0;
    cudaError_t e = cudaGetDevice(&device);
    if (e == cudaSuccess)
        e = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    if (e == cudaSuccess) e = td_shared_before_l1(attn_split_kernel<DM, E>);
    if (e != cudaSuccess) return (int)e;
    const int per = shared / (BYTES + 1024); /* resident warps of an SM, by shared memory: a block costs 1 KiB more */
    return (int)td_launch_next(attn_split_kernel<DM, E>, dim3((unsigned)(sms * (per < 8 ? per : 8))), dim3(32),
                               (size_t)BYTES, (cudaStream_t)stream, a);
}
template <class E> static int split_by_dim(void *stream, const attn_args &a, int sms)
{
    if (a.D <= 64) return split_launch<64, E>(stream, a, sms);
    if (a.D <= 96) return split_launch<96, E>(stream, a, sms);
    if (a.D <= 128) return split_launch<128, E>(stream, a, sms);
    return split_launch<256, E>(stream, a, sms);
}
int attn_split(void *stream, const attn_args &a, bool f16, int sms)
{
    return f16 ? split_by_dim<attn_f16>(stream, a, sms) : split_by_dim<attn_bf16>(stream, a, sms);
}
