// SPDX-License-Identifier: Apache-2.0
/* kernels/attn_cuda_sm90a.cu - attention of prompt rows on Hopper, in the manner of FlashAttention-3 (Shah et
 * al. 2024, sections 3.1 and 3.2). Not run on a device yet: off until its results are recorded; its bits are
 * its own (one online softmax over tiles of 128 keys, no splits), so never with --deterministic.
 *
 * A block has 128 packed rows of one kv head. Warpgroup 0 copies K and V pages through the tensor map (a box:
 * one page's rows, 64 columns) into two stages each; warpgroups 1 and 2 hold 64 rows each. Within one, Q K'
 * of a tile runs beside P V of the tile before; between the two, named barriers keep one's products under the
 * other's softmax. Tiles run from the last to the first, so that masked ones come first. Keys outside the
 * sequence are other keys of its pages: masked. Where V of a masked tile holds NaN or infinity, 0 * inf would
 * reach rows that do not see the key: the block is marked in `redo`, and the portable kernel does it again. */
#include "kernels/attn_cuda_launch.h"
#include "kernels/attn_cuda_tile.h"
#include "kernels/sm90a.h"
#include <string.h>

enum { KEYS = 128, STAGES = 2, THREADS = 384, BAR_TURN = 2, BAR_GROUP = 4 };

template <int D> struct hopper_shape {
    enum {
        SUBS = D / 64,
        Q_BYTES = SUBS * 64 * 128, /* of one warpgroup */
        TILE_BYTES = SUBS * KEYS * 128,
        K_AT = 2 * Q_BYTES,
        V_AT = K_AT + STAGES * TILE_BYTES,
        BAR_AT = V_AT + STAGES * TILE_BYTES,
        BYTES = BAR_AT + 8 * STAGES * 4
    };
};
struct hopper_bars {
    uint64_t *k_full, *k_empty, *v_full, *v_empty;
};
/* What a block works on. */
struct hopper_block {
    td_cuda_attn_seq s;
    int g, n, pr0, begin, end, tile0, tiles;
};

static TD_DEV hopper_block hopper_find(const attn_args &a, int item)
{
    hopper_block b;
    const int si = plan_find(plan_blocks(a), a.n_seq, item), rem = item - plan_blocks(a)[si];
    b.s = a.seq[si];
    b.g = rem % a.G;
    b.n = b.s.n_rows * a.group;
    b.pr0 = ((b.n + 127) / 128 - 1 - rem / a.G) * 128;
    b.begin = attn_first_key(b.s.pos0 + b.pr0 / a.group, a.window);
    b.end = b.s.pos0 + (min(b.pr0 + 128, b.n) - 1) / a.group + 1;
    b.tile0 = b.begin / KEYS;
    b.tiles = (b.end + KEYS - 1) / KEYS - b.tile0;
    return b;
}

/* One warp brings tile `tile` of K (kv 0) or V (kv 1). box: rows of a box. */
template <int D>
static TD_DEV void hopper_bring(unsigned char *to, const CUtensorMap *map, const attn_args &a,
                                const hopper_block &b, int tile, int kv, int box, uint64_t *full, int lane)
{
    typedef hopper_shape<D> S;
    if (lane == 0) sm90_expect(full, S::TILE_BYTES);
    __syncwarp(); /* bytes may come before they are expected, by the ISA: nothing here rests on that */
    const int32_t *pages = a.pages + b.s.page0;
    for (int i = lane; i < KEYS / box * S::SUBS; i += 32) {
        const int r = i / S::SUBS * box, sub = i % S::SUBS, key = tile * KEYS + r;
        const int page = min(max(key / a.P, b.begin / a.P), (b.end - 1) / a.P);
        sm90_copy_box(to + sub * KEYS * 128 + r * 128, map, sub * 64,
                      ((pages[page] * 2 + kv) * a.G + b.g) * a.P + key % a.P, full);
    }
}

template <int D>
static TD_DEV void hopper_produce(const CUtensorMap *map, const attn_args &a, const hopper_block &b,
                                  unsigned char *smem, const hopper_bars &bar, int box, int lane)
{
    typedef hopper_shape<D> S;
    for (int i = 0; i < b.tiles; i++) {
        const int stage = i % STAGES, turn = i / STAGES, tile = b.tile0 + b.tiles - 1 - i;
        if (turn) sm90_wait(&bar.k_empty[stage], (turn - 1) & 1);
        hopper_bring<D>(smem + S::K_AT + stage * S::TILE_BYTES, map, a, b, tile, 0, box, &bar.k_full[stage],
                        lane);
        if (turn) sm90_wait(&bar.v_empty[stage], (turn - 1) & 1);
        hopper_bring<D>(smem + S::V_AT + stage * S::TILE_BYTES, map, a, b, tile, 1, box, &bar.v_full[stage],
                        lane);
    }
}

/* Scores of a tile -> weights, in place; alpha: how much the older part shrinks. */
static TD_DEV void hopper_softmax(float (&s)[64], float (&m)[2], float (&l)[2], float (&alpha)[2],
                                  const attn_args &a, const attn_rows &rows, int key0, int lane)
{
    const bool mask = key0 + KEYS - 1 > rows.pos_min || key0 < rows.first_max;
#pragma unroll
    for (int i = 0; i < 64; i++)
        s[i] = a.softcap > 0.f ? a.cap_out * tanhf(s[i] * a.cap_in) : s[i] * a.scale2;
    if (mask) {
#pragma unroll
        for (int i = 0; i < 64; i++) {
            const int key = key0 + i / 4 * 8 + (lane & 3) * 2 + (i & 1);
            if (key > rows.pos[i >> 1 & 1] || key < rows.first[i >> 1 & 1]) s[i] = -INFINITY;
        }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float top = m[h], sum = 0.f;
#pragma unroll
        for (int i = 0; i < 64; i += 4) top = fmaxf(top, fmaxf(s[i + 2 * h], s[i + 2 * h + 1]));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        const float ref = top == -INFINITY ? 0.f : top;
        alpha[h] = td_exp2(m[h] - ref);
#pragma unroll
        for (int i = 0; i < 64; i += 4)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                s[i + 2 * h + e] = td_exp2(s[i + 2 * h + e] - ref);
                sum = sum + s[i + 2 * h + e];
            }
        m[h] = top;
        l[h] = fmaf(l[h], alpha[h], sum);
    }
}
/* Weights as fragments of A. */
static TD_DEV void hopper_pack(uint32_t (&p)[8][4], const float (&s)[64])
{
#pragma unroll
    for (int k = 0; k < 8; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) p[k][i] = attn_bf16::pack(s[k * 8 + i * 2], s[k * 8 + i * 2 + 1]);
}

template <int D>
static TD_DEV void hopper_scores(float (&s)[64], const unsigned char *q, const unsigned char *k)
{
#pragma unroll
    for (int c = 0; c < D / 16; c++)
        sm90_mma_n128_ss(s, sm90_along_k(q + c / 4 * 64 * 128 + c % 4 * 32),
                         sm90_along_k(k + c / 4 * KEYS * 128 + c % 4 * 32), c > 0);
    sm90_mma_commit();
}
template <int D>
static TD_DEV void hopper_values(float (&o)[D / 2], const uint32_t (&p)[8][4], const unsigned char *v)
{
#pragma unroll
    for (int k = 0; k < 8; k++) {
        if constexpr (D == 128)
            sm90_mma_n128_rs_t(o, p[k], sm90_across_k(v + k * 16 * 128, KEYS * 128), 1);
        else
            sm90_mma_n64_rs_t(o, p[k], sm90_across_k(v + k * 16 * 128, KEYS * 128), 1);
    }
    sm90_mma_commit();
}

/* The keys that all rows of a warpgroup see: pos_min is the first row's own, first_max the last row's first. */
struct hopper_seen {
    int first_max, pos_min;
};
static TD_DEV hopper_seen hopper_seen_by(const attn_args &a, const hopper_block &b, int pr0)
{
    hopper_seen all;
    all.pos_min = b.s.pos0 + pr0 / a.group;
    all.first_max = attn_first_key(b.s.pos0 + (min(pr0 + 64, b.n) - 1) / a.group, a.window);
    return all;
}
/* NaN or infinity in this thread's part of a tile of V that some row of the warpgroup sees in part: its threads
 * share the tile, so they look or do not look together. */
template <int D> static TD_DEV bool hopper_odd(const unsigned char *v, const hopper_seen &all, int key0, int t)
{
    if (key0 + KEYS - 1 <= all.pos_min && key0 >= all.first_max) return false;
    bool odd = false;
    for (int i = t; i < KEYS * D / 8; i += 128) {
        const uint4 u = *(const uint4 *)(v + i * 16);
        odd = odd || attn_odd<attn_bf16>(u.x) || attn_odd<attn_bf16>(u.y) || attn_odd<attn_bf16>(u.z) ||
              attn_odd<attn_bf16>(u.w);
    }
    return odd;
}

template <int D>
static TD_DEV void hopper_load_q(unsigned char *q, const attn_args &a, const hopper_block &b, int pr0, int t)
{
    for (int i = t; i < 64 * D / 8; i += 128) {
        const int r = i / (D / 8), c = i % (D / 8), pr = pr0 + r;
        float4 x = make_float4(0.f, 0.f, 0.f, 0.f), y = x;
        if (pr < b.n) {
            const float *p = a.q + (size_t)(b.s.row0 + pr / a.group) * a.ldq +
                             (size_t)((b.g * a.group + pr % a.group) * D + c * 8);
            x = *(const float4 *)p;
            y = *(const float4 *)(p + 4);
        }
        *(uint4 *)(q + c / 8 * 64 * 128 + r * 128 + (c % 8 ^ (r & 7)) * 16) =
            make_uint4(attn_bf16::pack(x.x, x.y), attn_bf16::pack(x.z, x.w), attn_bf16::pack(y.x, y.y),
                       attn_bf16::pack(y.z, y.w));
    }
    sm90_fence_stores();
}

template <int D>
static TD_DEV void hopper_consume(const attn_args &a, const hopper_block &b, unsigned char *smem,
                                  const hopper_bars &bar, int group, int t, int32_t *redo)
{
    typedef hopper_shape<D> S;
    const int lane = t & 31, pr0 = b.pr0 + group * 64 + t / 32 * 16;
    const attn_rows rows = attn_rows_of(a, b.s, pr0, b.n, lane);
    const hopper_seen all = hopper_seen_by(a, b, b.pr0 + group * 64);
    unsigned char *q = smem + group * S::Q_BYTES;
    hopper_load_q<D>(q, a, b, b.pr0 + group * 64, t);
    sm90_bar_sync(BAR_GROUP + group, 128);
    if (group == 1 && b.tiles > 1) sm90_bar_arrive(BAR_TURN, 256); /* the first turn is group 0's */
    float s[64], o[D / 2], m[2] = {-INFINITY, -INFINITY}, l[2] = {0.f, 0.f}, alpha[2];
    uint32_t p[8][4];
    bool odd = false;
#pragma unroll
    for (int i = 0; i < D / 2; i++) o[i] = 0.f;
    int key0 = (b.tile0 + b.tiles - 1) * KEYS;
    sm90_wait(&bar.k_full[0], 0);
    sm90_hold(o);
    sm90_mma_fence();
    hopper_scores<D>(s, q, smem + S::K_AT);
    sm90_mma_wait<0>();
    sm90_hold(s);
    if (lane == 0) sm90_arrive(&bar.k_empty[0]);
    hopper_softmax(s, m, l, alpha, a, rows, key0, lane);
    hopper_pack(p, s);
    for (int i = 1; i < b.tiles; i++, key0 -= KEYS) {
        const int at = i % STAGES, last = (i - 1) % STAGES;
        const unsigned char *v = smem + S::V_AT + last * S::TILE_BYTES;
        sm90_wait(&bar.k_full[at], i / STAGES & 1);
        sm90_wait(&bar.v_full[last], (i - 1) / STAGES & 1);
        sm90_bar_sync(BAR_TURN + group, 256);
        sm90_hold(o);
        sm90_hold(p);
        sm90_mma_fence();
        hopper_scores<D>(s, q, smem + S::K_AT + at * S::TILE_BYTES);
        hopper_values<D>(o, p, v);
        if (group == 0 || i + 1 < b.tiles) sm90_bar_arrive(BAR_TURN + 1 - group, 256);
        odd = hopper_odd<D>(v, all, key0, t) || odd;
        sm90_mma_wait<1>();
        sm90_hold(s);
        if (lane == 0) sm90_arrive(&bar.k_empty[at]);
        hopper_softmax(s, m, l, alpha, a, rows, key0 - KEYS, lane);
        sm90_mma_wait<0>();
        sm90_hold(o);
        sm90_hold(p);
        if (lane == 0) sm90_arrive(&bar.v_empty[last]);
#pragma unroll
        for (int k = 0; k < D / 2; k++) o[k] *= alpha[k >> 1 & 1];
        hopper_pack(p, s);
    }
    const int last = (b.tiles - 1) % STAGES;
    sm90_wait(&bar.v_full[last], (b.tiles - 1) / STAGES & 1);
    sm90_hold(o);
    sm90_hold(p);
    sm90_mma_fence();
    hopper_values<D>(o, p, smem + S::V_AT + last * S::TILE_BYTES);
    odd = hopper_odd<D>(smem + S::V_AT + last * S::TILE_BYTES, all, key0, t) || odd;
    sm90_mma_wait<0>();
    sm90_hold(o);
    if (odd) atomicOr(redo, 1);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        l[h] = l[h] + __shfl_xor_sync(0xffffffffu, l[h], 1);
        l[h] = l[h] + __shfl_xor_sync(0xffffffffu, l[h], 2);
        const int pr = pr0 + (lane >> 2) + h * 8;
        if (pr >= b.n) continue;
        const int head = b.g * a.group + pr % a.group;
        const float end = attn_end(m[h], l[h], a.sinks, head);
        const size_t at = (size_t)(b.s.row0 + pr / a.group) * a.ldo + (size_t)(head * D + (lane & 3) * 2);
#pragma unroll
        for (int k = 0; k < D / 8; k++)
#pragma unroll
            for (int e = 0; e < 2; e++) attn_store(a, at + (size_t)(k * 8 + e), o[k * 4 + h * 2 + e] * end);
    }
}

/* grid: blocks of the plan, at least. */
// limits: regs 168, spill 32, smem 0
template <int D>
static __global__ void __launch_bounds__(384, 1)
    attn_hopper_kernel(const __grid_constant__ CUtensorMap map, const attn_args a, int box, int32_t *redo)
{
    typedef hopper_shape<D> S;
    TD_DYN_SMEM(unsigned char, raw);
    unsigned char *smem = raw + ((1024 - (td_smem_u32(raw) & 1023)) & 1023);
    uint64_t *bars = (uint64_t *)(smem + S::BAR_AT);
    const hopper_bars bar = {bars, bars + STAGES, bars + 2 * STAGES, bars + 3 * STAGES};
    const int item = (int)blockIdx.x, group = (int)threadIdx.x / 128;
    td_grid_wait();
    if (item >= a.plan[PLAN_BLOCKS]) return;
    const hopper_block b = hopper_find(a, item);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            sm90_barrier_init(&bar.k_full[i], 1);
            sm90_barrier_init(&bar.v_full[i], 1);
            sm90_barrier_init(&bar.k_empty[i], 8); /* one per warp that reads */
            sm90_barrier_init(&bar.v_empty[i], 8);
        }
        sm90_barrier_fence();
    }
    __syncthreads();
    if (group == 0) {
        sm90_fewer_registers<24>();
        if (threadIdx.x < 32) hopper_produce<D>(&map, a, b, smem, bar, box, (int)threadIdx.x);
    } else {
        sm90_more_registers<240>();
        hopper_consume<D>(a, b, smem, bar, group - 1, (int)threadIdx.x & 127, redo + item);
    }
}

/* Rows of a box for pages of P tokens; 0: not supported. */
static int box_of(int P)
{
    if (P % KEYS == 0) return KEYS;
    return P >= 8 && KEYS % P == 0 ? P : 0;
}

/* The driver's function, asked for once (every thread would find the same one); NULL: it has none. */
static PFN_cuTensorMapEncodeTiled_v12000 encoder()
{
    static void *found;
    void *entry = NULL;
    cudaDriverEntryPointQueryResult how;
    if (!found &&
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &how) ==
            cudaSuccess &&
        how == cudaDriverEntryPointSuccess)
        found = entry;
    return (PFN_cuTensorMapEncodeTiled_v12000)found;
}

int td_cuda_attention_hopper(void *stream, const td_cuda_attn_args *a, int32_t *redo, int max_blocks)
{
    if (a->n_seq <= 0 || a->T <= 0) return 0;
    const td_kv *kv = a->kv;
    const int box = box_of(kv->P);
    if (!box || kv->dtype != TD_BF16 || (a->D != 64 && a->D != 128)) return (int)cudaErrorInvalidValue;
    const PFN_cuTensorMapEncodeTiled_v12000 encode = encoder();
    if (!encode) return (int)cudaErrorNotSupported;
    CUtensorMap map;
    cuuint64_t dim[2] = {(cuuint64_t)a->D,
                         (cuuint64_t)kv->n_pages * 2 * (cuuint64_t)kv->G * (cuuint64_t)kv->P};
    cuuint64_t stride[1] = {(cuuint64_t)a->D * 2};
    cuuint32_t shape[2] = {64, (cuuint32_t)box}, step[2] = {1, 1};
    if (encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, td_kv_page(kv, a->slot, 0), dim, stride, shape, step,
               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE))
        return (int)cudaErrorInvalidValue;
    attn_args r = attn_args_of(a);
    long long blocks = attn_most_blocks(a);
    if (blocks > max_blocks) return (int)cudaErrorInvalidValue;
    cudaError_t e =
        a->D == 128
            ? td_launch_big(attn_hopper_kernel<128>, dim3((unsigned)blocks), dim3(THREADS),
                            (size_t)hopper_shape<128>::BYTES + 1024, (cudaStream_t)stream, map, r, box, redo)
            : td_launch_big(attn_hopper_kernel<64>, dim3((unsigned)blocks), dim3(THREADS),
                            (size_t)hopper_shape<64>::BYTES + 1024, (cudaStream_t)stream, map, r, box, redo);
    if (e != cudaSuccess) return (int)e;
    r.redo = redo;
    return attn_prompt(stream, r, false, (int)blocks);
}
