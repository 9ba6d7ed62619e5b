/* kernels/attn_cuda_tile.h - the arithmetic of cuda_attn.h: one warp, 16 packed rows, tiles of 64 keys.
 *
 * Fragments: lane (g = lane / 4, q = lane % 4) holds rows g and g + 8. Q K': the sum over d runs in chunks of
 * 32 whose order inside is permuted alike on both sides (as in gemm_cuda_tile.h), so a key's fragment is 16
 * contiguous bytes of its row. The scores' fragment is the weights' fragment of the second product; V comes
 * transposed by ldmatrix. Shared memory: a tile's rows are padded to 128, 256 or 512 bytes; piece c (16
 * bytes) of row r lies at c ^ swizzle(r), which lets both kinds of reading and the copies touch all banks. A
 * tile in which some row sees only a part of the loaded keys is looked through for NaN and infinity in V (0 *
 * inf would spread to rows that do not see the key); where some are found they are taken out of the product
 * and added apart, to the rows that see them. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_KERNELS_ATTN_CUDA_TILE_H
#define TD_KERNELS_ATTN_CUDA_TILE_H

#include "kernels/cuda_attn.h"
#include "kernels/td_cuda.h"

#define TD_ATTN_HOSTDEV static __host__ __device__ inline
enum { ATTN_TILE = 64 };

/* What a launch has in common. */
typedef struct attn_args {
    const float *q;
    size_t ldq;
    void *out;
    size_t ldo;
    int out_dtype;
    const uint16_t *kv; /* first page of the slot */
    size_t v_elems, head_elems;
    uint32_t page_pieces; /* of 16 bytes */
    int P, p_shift; /* p_shift: log2 of P, or -1 */
    const td_cuda_attn_seq *seq;
    int n_seq;
    const int32_t *pages, *plan;
    int G, group, D, window;
    float scale2, softcap, cap_in, cap_out; /* base 2: scale2 = scale * log2(e) */
    const float *sinks;
    float *part_o, *part_ml;
    float *part; /* NULL, or parts of this rank's splits (cuda_attn.h) */
    int part0, n_parts, rank, ranks;
    int32_t
        *redo; /* NULL, or a mark per block of the prompt kernel: marked ones are done, and unmarked again */
} attn_args;

/* The plan: three counts, then four prefix sums over the sequences, [n_seq + 1] each: warps' items (16 rows,
 * one split), partial results, rows times heads of the split kernel, blocks of the prompt kernel. */
enum { PLAN_ITEMS, PLAN_ROWS, PLAN_BLOCKS, PLAN_HEAD = 8 };
static TD_DEV const int32_t *plan_items(const attn_args &a)
{
    return a.plan + PLAN_HEAD;
}
static TD_DEV const int32_t *plan_slots(const attn_args &a)
{
    return a.plan + PLAN_HEAD + (a.n_seq + 1);
}
static TD_DEV const int32_t *plan_rows(const attn_args &a)
{
    return a.plan + PLAN_HEAD + 2 * (a.n_seq + 1);
}
static TD_DEV const int32_t *plan_blocks(const attn_args &a)
{
    return a.plan + PLAN_HEAD + 3 * (a.n_seq + 1);
}
/* The sequence that holds i: base[s] <= i < base[s + 1]. */
static TD_DEV int plan_find(const int32_t *base, int n, int i)
{
    int lo = 0, hi = n - 1;
    while (lo < hi) {
        int mid = (lo + hi + 1) / 2;
        if (base[mid] <= i)
            lo = mid;
        else
            hi = mid - 1;
    }
    return lo;
}
static TD_DEV int attn_first_key(int pos, int window)
{
    return window > 0 && pos + 1 > window ? pos + 1 - window : 0;
}

struct attn_bf16 {
    static TD_DEV uint32_t pack(float lo, float hi)
    {
        __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
        return (uint32_t)__bfloat16_as_ushort(v.x) | (uint32_t)__bfloat16_as_ushort(v.y) << 16;
    }
    static TD_DEV float value(uint32_t u)
    {
        return __bfloat162float(__ushort_as_bfloat16((unsigned short)u));
    }
    enum { EXPONENT = 0x7f80 };
    static TD_DEV void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2])
    {
        td_mma_m16n8k16_bf16(d, a, b, d);
    }
};
struct attn_f16 {
    static TD_DEV uint32_t pack(float lo, float hi)
    {
        __half2 v = __floats2half2_rn(lo, hi);
        return (uint32_t)__half_as_ushort(v.x) | (uint32_t)__half_as_ushort(v.y) << 16;
    }
    static TD_DEV float value(uint32_t u) { return __half2float(__ushort_as_half((unsigned short)u)); }
    enum { EXPONENT = 0x7c00 };
    static TD_DEV void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2])
    {
        td_mma_m16n8k16_f16(d, a, b, d);
    }
};

TD_ATTN_HOSTDEV int attn_block_rows(int D)
{
    return D <= 128 ? 128 : 64;
} /* packed rows of a block of the prompt kernel */
template <int DM> struct attn_shape { /* DM: 64, 96, 128, 256; D is at most that */
    enum {
        CHUNKS = DM / 32,
        PIECES = DM / 8,
        NV = DM / 8,
        ROW_BYTES = DM <= 64    ? 128
                    : DM <= 128 ? 256
                                : 512,
        TILE_BYTES = ATTN_TILE * ROW_BYTES,
        Q_BYTES = CHUNKS * 2 * 512 /* of one warp, in fragment order */
    };
};
static TD_DEV int attn_swizzle(int r)
{
    return (r & 1) << 2 | (r >> 1 & 3);
}

/* Where the keys of one (sequence, kv head) lie; keys outside [begin, end) are not read. */
struct attn_src {
    const uint16_t *kv; /* page 0, this head's K */
    const int32_t *pages;
    int begin, end;
};

/* Where every key of a tile lies, in pieces of 16 bytes (D is whole ones); NO_KEY: zeros. By the block's first 64
 * threads. elsewhere: keys before this tile that are not in the page table. */
enum : uint32_t { ATTN_NO_KEY = 0xffffffffu };
static TD_DEV void attn_offsets(uint32_t *off, const attn_args &a, const attn_src *s, int key0, int elsewhere,
                                int tid, int n_threads)
{
    for (int i = tid; i < ATTN_TILE; i += n_threads) {
        int key = key0 + i, at = key - elsewhere, page = a.p_shift >= 0 ? at >> a.p_shift : at / a.P;
        uint32_t v = ATTN_NO_KEY;
        if (key >= s->begin && key < s->end)
            v = (uint32_t)s->pages[page] * a.page_pieces + (uint32_t)(at - page * a.P) * (uint32_t)(a.D / 8);
        off[i] = v;
    }
}
template <int DM>
static TD_DEV void attn_copy(unsigned char *dst, const uint16_t *base, const uint32_t *off, int D, int tid,
                             int n_threads)
{
    typedef attn_shape<DM> S;
#pragma unroll 4
    for (int i = tid; i < ATTN_TILE * S::PIECES; i += n_threads) {
        int r = i / S::PIECES, c = i % S::PIECES;
        const uint32_t o = off[r];
        bool ok = o != ATTN_NO_KEY && c * 8 < D;
        td_cp_async_16(dst + r * S::ROW_BYTES + (c ^ attn_swizzle(r)) * 16,
                       (const uint4 *)base + (ok ? o + (uint32_t)c : 0u), ok);
    }
}

/* The state of 16 rows: o, the largest score and this lane's part of the sum, of rows g and g + 8. */
template <int DM> struct attn_state {
    float o[attn_shape<DM>::NV][4], m[2], l[2];
};
template <int DM> static TD_DEV void attn_reset(attn_state<DM> &s)
{
#pragma unroll
    for (int n = 0; n < attn_shape<DM>::NV; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) s.o[n][i] = 0.f;
    s.m[0] = s.m[1] = -INFINITY;
    s.l[0] = s.l[1] = 0.f;
}
/* The lane's two rows: positions (-1: no row) and first keys; of the warp's rows: the extremes over those
 * that exist. */
struct attn_rows {
    int pos[2], first[2], pos_min, pos_max, first_min, first_max;
};

/* Rows pr0 + g and pr0 + g + 8 of n packed rows, row = token * group + head. */
static TD_DEV attn_rows attn_rows_of(const attn_args &a, const td_cuda_attn_seq &s, int pr0, int n, int lane)
{
    attn_rows r;
    for (int h = 0; h < 2; h++) {
        int pr = pr0 + (lane >> 2) + h * 8;
        r.pos[h] = pr < n ? s.pos0 + pr / a.group : -1;
        r.first[h] = attn_first_key(r.pos[h], a.window);
    }
    int last = (pr0 + 15 < n ? pr0 + 15 : n - 1) / a.group;
    r.pos_min = s.pos0 + pr0 / a.group;
    r.pos_max = pr0 < n ? s.pos0 + last : -1;
    r.first_min = attn_first_key(r.pos_min, a.window);
    r.first_max = attn_first_key(r.pos_max, a.window);
    return r;
}

/* Q of the lane's rows as fragments in shared memory: [chunk][step][lane][16 bytes]; a lane reads its own
 * pieces only. */
template <int DM, class E>
static TD_DEV void attn_load_q(unsigned char *qs, const attn_args &a, const td_cuda_attn_seq &s, int g,
                               int pr0, int n, int lane)
{
    const float *row[2];
    for (int h = 0; h < 2; h++) {
        int pr = pr0 + (lane >> 2) + h * 8;
        row[h] = pr < n ? a.q + (size_t)(s.row0 + pr / a.group) * a.ldq +
                              (size_t)((g * a.group + pr % a.group) * a.D)
                        : NULL;
    }
#pragma unroll 2 /* more would take all registers at once */
    for (int c = 0; c < attn_shape<DM>::CHUNKS; c++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            int d = c * 32 + (lane & 3) * 8 + j * 4;
            float4 v[2];
            for (int h = 0; h < 2; h++)
                v[h] = row[h] && d < a.D ? *(const float4 *)(row[h] + d) : make_float4(0.f, 0.f, 0.f, 0.f);
            *(uint4 *)(qs + (c * 2 + j) * 512 + lane * 16) =
                make_uint4(E::pack(v[0].x, v[0].y), E::pack(v[1].x, v[1].y), E::pack(v[0].z, v[0].w),
                           E::pack(v[1].z, v[1].w));
        }
}

/* s = Q K' of the tile. */
template <int DM, class E>
static TD_DEV void attn_scores(float (&s)[8][4], const unsigned char *qs, const unsigned char *k, int lane)
{
    typedef attn_shape<DM> S;
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) s[n][i] = 0.f;
#pragma unroll
    for (int c = 0; c < S::CHUNKS; c++) {
        const uint4 u0 = *(const uint4 *)(qs + c * 1024 + lane * 16),
                    u1 = *(const uint4 *)(qs + c * 1024 + 512 + lane * 16);
        const uint32_t q0[4] = {u0.x, u0.y, u0.z, u0.w}, q1[4] = {u1.x, u1.y, u1.z, u1.w};
#pragma unroll
        for (int n = 0; n < 8; n++) {
            int r = n * 8 + (lane >> 2);
            uint4 v = *(const uint4 *)(k + r * S::ROW_BYTES + ((c * 4 + (lane & 3)) ^ attn_swizzle(r)) * 16);
            const uint32_t b0[2] = {v.x, v.y}, b1[2] = {v.z, v.w};
            E::mma(s[n], q0, b0);
            E::mma(s[n], q1, b1);
        }
    }
}

/* Scores -> weights; m, l and o follow. mask: some key is not seen by some row. */
template <int DM>
static TD_DEV void attn_softmax(float (&s)[8][4], attn_state<DM> &st, const attn_args &a,
                                const attn_rows &rows, int key0, bool mask, int lane)
{
    if (a.softcap > 0.f) {
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) s[n][i] = a.cap_out * tanhf(s[n][i] * a.cap_in);
    } else {
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) s[n][i] = s[n][i] * a.scale2;
    }
    if (mask) {
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int key = key0 + n * 8 + (lane & 3) * 2 + (i & 1);
                if (key > rows.pos[i >> 1] || key < rows.first[i >> 1]) s[n][i] = -INFINITY;
            }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float top = -INFINITY;
#pragma unroll
        for (int n = 0; n < 8; n++) top = fmaxf(top, fmaxf(s[n][h * 2], s[n][h * 2 + 1]));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        top = fmaxf(top, st.m[h]);
        float ref = top == -INFINITY ? 0.f : top, alpha = td_exp2(st.m[h] - ref), sum = 0.f;
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                s[n][h * 2 + i] = td_exp2(s[n][h * 2 + i] - ref);
                sum = sum + s[n][h * 2 + i];
            }
        st.m[h] = top;
        st.l[h] = fmaf(st.l[h], alpha, sum);
#pragma unroll
        for (int n = 0; n < attn_shape<DM>::NV; n++) {
            st.o[n][h * 2] *= alpha;
            st.o[n][h * 2 + 1] *= alpha;
        }
    }
}

template <class E> static TD_DEV bool attn_odd(uint32_t u)
{
    return (u & E::EXPONENT) == E::EXPONENT || (u >> 16 & E::EXPONENT) == E::EXPONENT;
}
template <class E> static TD_DEV uint32_t attn_finite(uint32_t u)
{
    if ((u & E::EXPONENT) == E::EXPONENT) u &= 0xffff0000u;
    if ((u >> 16 & E::EXPONENT) == E::EXPONENT) u &= 0xffffu;
    return u;
}

/* o += weights * V. CLEAN: NaN and infinity of V count as 0. */
template <int DM, class E, bool CLEAN>
static TD_DEV void attn_values(attn_state<DM> &st, const float (&p)[8][4], const unsigned char *v, int lane)
{
    typedef attn_shape<DM> S;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const uint32_t f[4] = {E::pack(p[2 * k][0], p[2 * k][1]), E::pack(p[2 * k][2], p[2 * k][3]),
                               E::pack(p[2 * k + 1][0], p[2 * k + 1][1]),
                               E::pack(p[2 * k + 1][2], p[2 * k + 1][3])};
#pragma unroll
        for (int n = 0; n < S::NV; n += 2) {
            uint32_t r[4];
            int row = k * 16 + (lane & 15);
            td_ldmatrix_x4_trans(r, v + row * S::ROW_BYTES + ((n + (lane >> 4)) ^ attn_swizzle(row)) * 16);
            if constexpr (CLEAN)
                for (int i = 0; i < 4; i++) r[i] = attn_finite<E>(r[i]);
            const uint32_t b0[2] = {r[0], r[1]}, b1[2] = {r[2], r[3]};
            E::mma(st.o[n], f, b0);
            E::mma(st.o[n + 1], f, b1);
        }
    }
}

template <int DM, class E> static TD_DEV bool attn_any_odd(const unsigned char *v, int lane)
{
    typedef attn_shape<DM> S;
    bool odd = false;
    for (int i = lane; i < ATTN_TILE * S::PIECES; i += 32) {
        int r = i / S::PIECES;
        uint4 u = *(const uint4 *)(v + r * S::ROW_BYTES + ((i % S::PIECES) ^ attn_swizzle(r)) * 16);
        odd = odd || attn_odd<E>(u.x) || attn_odd<E>(u.y) || attn_odd<E>(u.z) || attn_odd<E>(u.w);
    }
    return __any_sync(0xffffffffu, odd) != 0;
}

/* The part that attn_values<CLEAN> left out, added to the rows that see the key. */
template <int DM, class E>
static TD_DEV void attn_add_odd(attn_state<DM> &st, const float (&p)[8][4], const unsigned char *v,
                                const attn_rows &rows, int key0, int lane)
{
    typedef attn_shape<DM> S;
#pragma unroll
    for (int n = 0; n < 8; n++)
        for (int k = 0; k < 8; k++) {
            float w[2];
            for (int h = 0; h < 2; h++) {
                float mine = E::value(E::pack(k & 1 ? p[n][h * 2 + 1] : p[n][h * 2], 0.f) & 0xffffu);
                w[h] = __shfl_sync(0xffffffffu, mine, (lane & ~3) | k >> 1);
            }
            int key = key0 + n * 8 + k, r = n * 8 + k;
            const unsigned char *row = v + r * S::ROW_BYTES;
#pragma unroll
            for (int d = 0; d < S::NV; d++) {
                uint32_t u = *(const uint32_t *)(row + (d ^ attn_swizzle(r)) * 16 + (lane & 3) * 4);
                if (!attn_odd<E>(u)) continue;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    uint32_t e = i & 1 ? u >> 16 : u & 0xffffu;
                    bool sees = key <= rows.pos[i >> 1] && key >= rows.first[i >> 1];
                    if (sees && (e & E::EXPONENT) == E::EXPONENT)
                        st.o[d][i] = fmaf(w[i >> 1], E::value(e), st.o[d][i]);
                }
            }
        }
}

/* After a split: the lane's parts of the sum become the row's, in all four lanes. */
template <int DM> static TD_DEV void attn_sum(attn_state<DM> &st)
{
#pragma unroll
    for (int h = 0; h < 2; h++) {
        st.l[h] = st.l[h] + __shfl_xor_sync(0xffffffffu, st.l[h], 1);
        st.l[h] = st.l[h] + __shfl_xor_sync(0xffffffffu, st.l[h], 2);
    }
}

/* Merging a split's (m, l, o) into the row's (M, L, O), and the end of a row. Used by element in all kernels.
 */
struct attn_scale {
    float old_, add;
};
static TD_DEV attn_scale attn_merge(float &M, float &L, float m, float l)
{
    attn_scale s = {1.f, 0.f};
    if (l == 0.f) return s; /* no key of this split is seen; NaN is not 0 */
    float top = fmaxf(M, m);
    s.old_ = td_exp2(M - top);
    s.add = td_exp2(m - top);
    M = top;
    L = fmaf(l, s.add, L * s.old_);
    return s;
}
static TD_DEV float attn_merge_o(float O, float o, const attn_scale &s)
{
    return s.add == 0.f && s.old_ == 1.f ? O : fmaf(o, s.add, O * s.old_);
}
/* The factor for o: 1 / L, after the sink has joined. */
static TD_DEV float attn_end(float M, float L, const float *sinks, int head)
{
    if (sinks) {
        float z = sinks[head] * 1.44269504088896340736f, top = fmaxf(M, z);
        float old_ = td_exp2(M - top);
        return old_ / fmaf(L, old_, td_exp2(z - top));
    }
    return L == 0.f ? 0.f : 1.f / L;
}
static TD_DEV void attn_store(const attn_args &a, size_t at, float v)
{
    v = v + 0.f; /* one zero */
    if (a.out_dtype == TD_F32)
        ((float *)a.out)[at] = v;
    else if (a.out_dtype == TD_BF16)
        ((uint16_t *)a.out)[at] = (uint16_t)attn_bf16::pack(v, 0.f);
    else
        ((uint16_t *)a.out)[at] = (uint16_t)attn_f16::pack(v, 0.f);
}

/* One tile of a warp: scores before, this after V has come. */
template <int DM, class E>
static TD_DEV void attn_tile_end(float (&s)[8][4], attn_state<DM> &st, const attn_args &a,
                                 const attn_rows &rows, int key0, int kv_end, const unsigned char *v,
                                 int lane)
{
    bool mask = key0 + ATTN_TILE - 1 > rows.pos_min || key0 < rows.first_max;
    attn_softmax<DM>(s, st, a, rows, key0, mask, lane);
    int last = (key0 + ATTN_TILE < kv_end ? key0 + ATTN_TILE : kv_end) - 1;
    if ((last > rows.pos_min || key0 < rows.first_max) && attn_any_odd<DM, E>(v, lane)) {
        attn_values<DM, E, true>(st, s, v, lane);
        attn_add_odd<DM, E>(st, s, v, rows, key0, lane);
    } else
        attn_values<DM, E, false>(st, s, v, lane);
}

#endif
