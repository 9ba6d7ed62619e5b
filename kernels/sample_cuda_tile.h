/* kernels/sample_cuda_tile.h - what choosing tokens on a device is made of, for rows whose vocabulary is here
 * whole (sample_cuda.cu) or in parts on several ranks (draw_cuda.cu): fixed point, reductions of a block, the
 * cut, processors, the race. One block works on a row; V or n: tokens here, v0 the first.
 * Source: sample_cuda.cu. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_KERNELS_SAMPLE_CUDA_TILE_H
#define TD_KERNELS_SAMPLE_CUDA_TILE_H

#include "common/noise.h"
#include "kernels/cuda.h"
#include "kernels/sample_math.h"
#include "kernels/td_cuda.h"

enum { BINS = 2048, MAX_WARPS = 32 };
typedef unsigned long long u64;

/* ---- values as the CPU families have them ---- */

/* e in [0, 1] as a multiple of 2^-44, to nearest even as on the CPU; V below 2^19 of them fit 63 bits. */
TD_DEV u64 fixed(float e)
{
    return (u64)rint((double)e * 17592186044416.0);
}

/* The larger value, among equals the lower id; 0 is "none". */
TD_DEV u64 rank_of(float v, int id)
{
    return (u64)key_of(v + 0.0f) << 32 | (0xffffffffu - (unsigned)id);
}
TD_DEV int id_of(u64 rank)
{
    return (int)(0xffffffffu - (unsigned)rank);
}

/* ---- the block ---- */

struct shared_space {
    u64 part[MAX_WARPS];
    u64 mass[BINS];
    u64 before; /* mass of the keys above the crossing bin */
    u64 in_bin; /* mass of the crossing bin */
    uint32_t prefix;
    int found, count;
    td_top top[TD_MAX_TOP_LOGPROBS];
};

template <class F> TD_DEV u64 block_reduce(shared_space *s, u64 v, F join)
{
    for (int o = 16; o > 0; o >>= 1) v = join(v, __shfl_xor_sync(0xffffffffu, v, o));
    if (threadIdx.x % 32 == 0) s->part[threadIdx.x / 32] = v;
    __syncthreads();
    v = s->part[0];
    for (unsigned w = 1; w < blockDim.x / 32; w++) v = join(v, s->part[w]);
    __syncthreads();
    return v;
}
TD_DEV u64 block_max(shared_space *s, u64 v)
{
    return block_reduce(s, v, [](u64 a, u64 b) { return a > b ? a : b; });
}
TD_DEV u64 block_sum(shared_space *s, u64 v)
{
    return block_reduce(s, v, [](u64 a, u64 b) { return a + b; });
}

/* ---- the cut ---- */

struct cut {
    uint32_t key;
    int id;
};

/* Warp 0: the descending bin in which the mass reaches `target`; the last one with mass if none does; -1: no
 * mass. */
TD_DEV void crossing_bin(shared_space *s, int bins, u64 target)
{
    if (threadIdx.x >= 32) return;
    const int lane = threadIdx.x, each = bins / 32,
              top = bins - 1 - lane * each; /* lane 0 has the highest bins */
    u64 sum = 0;
    for (int i = 0; i < each; i++) sum += s->mass[top - i];
    u64 incl = sum;
    for (int o = 1; o < 32; o <<= 1) {
        const u64 v = __shfl_up_sync(0xffffffffu, incl, (unsigned)o);
        if (lane >= o) incl += v;
    }
    const u64 start = s->before;
    const unsigned reach = __ballot_sync(0xffffffffu, sum > 0 && start + incl >= target);
    const unsigned with = __ballot_sync(0xffffffffu, sum > 0);
    const int owner = reach ? __ffs((int)reach) - 1 : with ? 31 - __clz((int)with) : -1;
    if (owner < 0 && lane == 0) s->found = -1;
    __syncwarp(); /* all have read before: it is about to change */
    if (lane != owner) return;
    u64 before = start + incl - sum, bin_before = before;
    int bin = -1;
    for (int i = 0; i < each; i++) {
        const u64 m = s->mass[top - i];
        if (m == 0) continue;
        bin = top - i;
        bin_before = before;
        before += m;
        if (before >= target) break;
    }
    s->found = bin;
    s->before = bin_before;
    s->in_bin = s->mass[bin];
}

/* The id of the m-th member (from 1) of the row with this key, in ascending order. */
template <class W> TD_DEV int nth_member(shared_space *s, int V, uint32_t key, u64 m, const float *x, W weigh)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u64 seen = 0;
    if (threadIdx.x == 0) s->found = V;
    for (int base = 0; base < V && seen < m; base += (int)blockDim.x) {
        const int i = base + (int)threadIdx.x;
        const bool mine = i < V && weigh(x[i]) > 0 && key_of(x[i] + 0.0f) == key;
        const unsigned votes = __ballot_sync(0xffffffffu, mine);
        if (lane == 0) s->part[warp] = (u64)__popc(votes);
        __syncthreads();
        u64 before = seen, all = 0;
        for (unsigned w = 0; w < blockDim.x / 32; w++) {
            if ((int)w < warp) before += s->part[w];
            all += s->part[w];
        }
        if (mine && before + (u64)__popc(votes & ((1u << lane) - 1u)) + 1 == m) s->found = i;
        seen += all;
        __syncthreads();
    }
    __syncthreads();
    return s->found;
}

/* Walks descending keys until the mass before a token reaches `target`; weigh(x) is a token's mass, 0: not in
 * the race. ties: all tokens with the last one's value stay. */
template <class W> TD_DEV cut find_cut(shared_space *s, const float *x, int V, u64 target, bool ties, W weigh)
{
    uint32_t prefix = 0;
    if (threadIdx.x == 0) s->before = 0;
    for (int pass = 0; pass < 3; pass++) {
        const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0, bins = pass == 2 ? 1024 : BINS;
        const uint32_t above = pass == 0 ? 0u : ~0u << (pass == 1 ? 21 : 10);
        for (int b = threadIdx.x; b < bins; b += (int)blockDim.x) s->mass[b] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < V; i += (int)blockDim.x) {
            const uint32_t key = key_of(x[i] + 0.0f);
            if ((key & above) != prefix) continue;
            const u64 m = weigh(x[i]);
            if (m) atomicAdd(&s->mass[key >> shift & (uint32_t)(bins - 1)], m);
        }
        __syncthreads();
        crossing_bin(s, bins, target);
        __syncthreads();
        if (s->found < 0) return cut{0u, V};
        prefix |= (uint32_t)s->found << shift;
    }
    if (ties) return cut{prefix, V};
    const u64 one = weigh(value_of(prefix)), before = s->before, in_bin = s->in_bin;
    const u64 left = target > before ? target - before : 0, want = left ? (left + one - 1) / one : 1;
    __syncthreads(); /* before found is used again */
    if (want * one >= in_bin) return cut{prefix, V};
    return cut{prefix, nth_member(s, V, prefix, want, x, weigh)};
}

TD_DEV bool kept(cut c, float x, int id)
{
    const uint32_t k = key_of(x);
    return k > c.key || (k == c.key && id <= c.id);
}

/* ---- logits processors ---- */

/* Several entries of one id are added in their order, by the thread of the first. */
TD_DEV void apply_bias(float *x, int v0, int n, const td_sample_row &r)
{
    for (uint32_t i = threadIdx.x; i < r.n_bias; i += blockDim.x) {
        const uint32_t id = r.bias[i].id, at = id - (uint32_t)v0;
        bool first = at < (uint32_t)n;
        for (uint32_t j = 0; j < i && first; j++) first = r.bias[j].id != id;
        if (!first) continue;
        float v = x[at];
        for (uint32_t j = i; j < r.n_bias; j++)
            if (r.bias[j].id == id) v = canonical(v + r.bias[j].add);
        x[at] = v;
    }
}

TD_DEV void apply_penalties(float *x, int v0, int n, const td_sample_row &r)
{
    for (uint32_t i = threadIdx.x; i < r.n_pen; i += blockDim.x) {
        const td_penalty p = r.pen[i];
        const uint32_t at = p.id - (uint32_t)v0;
        if (at >= (uint32_t)n) continue;
        float v = x[at];
        if (p.n_out || p.in_prompt) v = v > 0 ? v / r.repetition_penalty : v * r.repetition_penalty;
        if (p.n_out) v -= r.presence_penalty + r.frequency_penalty * (float)p.n_out;
        x[at] = canonical(v);
    }
}

/* The processed tokens [v0, v0 + n) in x, v0 a multiple of 32: a thread's own elements need no barrier before
 * its next pass. */
TD_DEV void process(const float *raw, float *x, int v0, int n, const td_sample_row &r)
{
    for (int i = threadIdx.x; i < n; i += (int)blockDim.x) {
        const bool allowed = !r.mask || (r.mask[(v0 + i) / 32] >> (i % 32) & 1u);
        x[i] = allowed ? canonical(raw[i]) : -INFINITY;
    }
    if (r.n_bias) {
        __syncthreads();
        apply_bias(x, v0, n, r);
    }
    if (r.n_pen) {
        __syncthreads();
        apply_penalties(x, v0, n, r);
    }
    __syncthreads();
}

/* ---- the race ---- */

struct race {
    cut c;
    float max, floor, min_p;
    bool filtered;
};

TD_DEV bool candidate(const race &r, float x, int i)
{
    if (!(x > -INFINITY)) return false;
    if (!r.filtered) return true;
    return kept(r.c, x, i) && (r.min_p <= 0.f || exp_neg(x - r.max) >= r.min_p);
}

/* The winner among tokens [v0, v0 + n) and `first`, the likeliest of all, as rank_of. A thread takes blocks
 * of 4 tokens: one Philox call for each that can win. */
TD_DEV u64 run_race(const race &r, const float *x, int v0, int n, const td_sample_row &row, int first)
{
    uint32_t bits[4];
    td_noise_block(row.seed, row.position, row.stream, (uint32_t)first / 4, bits);
    float bar = r.max + td_noise_gumbel(bits[first % 4]);
    u64 best = rank_of(bar, first);
    for (int i0 = (int)threadIdx.x * 4; i0 < n; i0 += (int)blockDim.x * 4) {
        bool drawn = false;
        for (int j = 0; j < 4 && i0 + j < n; j++) {
            const float v = x[i0 + j];
            if (!(v >= r.floor && v + TD_NOISE_MAX >= bar) || !candidate(r, v, v0 + i0 + j)) continue;
            if (!drawn) td_noise_block(row.seed, row.position, row.stream, (uint32_t)(v0 + i0) / 4, bits);
            drawn = true;
            const float sum = v + td_noise_gumbel(bits[j]);
            const u64 rank = rank_of(sum, v0 + i0 + j);
            if (rank > best) best = rank;
            if (sum > bar) bar = sum;
        }
    }
    return best;
}

/* ---- the largest raw logits ---- */

/* The n largest, descending, ties to the lower id: their cut, all of them into shared memory, each to its
 * rank, less lse. */
TD_DEV void top_n(shared_space *s, const float *raw, int V, int n, double lse, td_top *to)
{
    const cut c = find_cut(s, raw, V, (u64)n, false, [](float v) { return v == v ? (u64)1 : (u64)0; });
    __syncthreads();
    if (threadIdx.x == 0) s->count = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < V; i += (int)blockDim.x) {
        const float v = raw[i] + 0.0f;
        if (v != v || !kept(c, v, i)) continue;
        const int at = atomicAdd(&s->count, 1);
        if (at < TD_MAX_TOP_LOGPROBS) s->top[at] = td_top{(uint32_t)i, v};
    }
    __syncthreads();
    if ((int)threadIdx.x < n) {
        const td_top mine = s->top[threadIdx.x];
        int place = 0;
        for (int i = 0; i < n; i++)
            if (rank_of(s->top[i].logprob, (int)s->top[i].id) > rank_of(mine.logprob, (int)mine.id)) place++;
        to[place] = td_top{mine.id, (float)((double)mine.logprob - lse)};
    }
}

#endif
