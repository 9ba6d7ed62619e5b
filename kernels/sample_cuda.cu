// SPDX-License-Identifier: Apache-2.0
/* kernels/sample_cuda.cu - choosing tokens on the device: one block a row, steps and tie rules of
 * kernels/sample_tile.h.
 *
 *   raw logits -> mask, bias, penalties -> greedy, or: /T -> top_k -> top_p -> min_p -> exponential race;
 *   a second kernel reports log probabilities of the raw logits.
 * Rules:   1. Every f32 value that a choice depends on (processed logits, exp, noise) is the same sequence of
 * exactly rounded operations as on the CPU (-fmad=false); masses are integers, 2^-44 each, so no order
 * matters.
 *          2. The kept set is {key > cut.key} + {key == cut.key and id <= cut.id}, found by three radix
 * passes of 11, 11 and 10 key bits over the row, which stays in L2: nothing is sorted.
 *          3. Tokens whose logit plus the largest noise cannot beat the likeliest token's draw draw no noise.
 * Cost:    a row is read 2 (greedy) to 9 times by one SM: 5 to 45 us at V = 128k by estimate, not measured.
 */
#include "kernels/cuda.h"
#include "kernels/td_cuda.h"

enum { BINS = 2048, MAX_WARPS = 32 };
#define NOISE_MAX 23.0f /* -log(2^-33) = 22.88 */
#define GREEDY_BELOW 1e-5f
typedef unsigned long long u64;

/* ---- the bits of common/rng.c ---- */

TD_DEV float log_of(float f, float e)
{
    float p = 0x1.1462f2p-4f;
    p = fmaf(p, f, -0x1.de4f98p-4f);
    p = fmaf(p, f, 0x1.e6f610p-4f);
    p = fmaf(p, f, -0x1.fc1f6ep-4f);
    p = fmaf(p, f, 0x1.2336e2p-3f);
    p = fmaf(p, f, -0x1.555c5ap-3f);
    p = fmaf(p, f, 0x1.99a4bcp-3f);
    p = fmaf(p, f, -0x1.000006p-2f);
    p = fmaf(p, f, 0x1.555548p-2f);
    const float q = f * f * fmaf(p, f, -0.5f);
    return e * 0x1.62e4p-1f + (f + fmaf(e, 0x1.7f7d1cp-20f, q));
}

TD_DEV int exponent_of(float x)
{
    return (int)(__float_as_uint(x) - 0x3f3504f3u) >> 23;
}

TD_DEV float log_f32(float x)
{
    const int e = exponent_of(x);
    return log_of(__uint_as_float(__float_as_uint(x) - ((unsigned)e << 23)) - 1.0f, (float)e);
}

TD_DEV float log1p_f32(float x)
{
    const int e = exponent_of(1.0f + x);
    const float scale = __uint_as_float((unsigned)(127 - e) << 23);
    return log_of(fmaf(x, scale, scale - 1.0f), (float)e);
}

TD_DEV float gumbel(uint32_t x)
{
    float u = fmaf((float)x, 0x1p-32f, 0x1p-33f);
    u = u < 0x1.fffffep-1f ? u : 0x1.fffffep-1f;
    return -log_f32(-log1p_f32(-u));
}

TD_DEV void philox(uint32_t block, uint32_t position, uint32_t stream, uint64_t seed, uint32_t (&out)[4])
{
    uint32_t a = block, b = position, c = stream, d = 0, k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma unroll
    for (int r = 0; r < 10; r++) {
        const uint32_t ph = __umulhi(0xD2511F53u, a), pl = 0xD2511F53u * a;
        const uint32_t qh = __umulhi(0xCD9E8D57u, c), ql = 0xCD9E8D57u * c;
        a = qh ^ b ^ k0;
        c = ph ^ d ^ k1;
        b = ql;
        d = pl;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = a;
    out[1] = b;
    out[2] = c;
    out[3] = d;
}

/* ---- values as the CPU families have them ---- */

TD_DEV float canonical(float v)
{
    return v == v ? v + 0.0f : -INFINITY;
}

TD_DEV float exp_neg(float x)
{
    const float lo = x < -87.0f ? -87.0f : x;
    const float n = lo * 1.44269504f + 12582912.0f - 12582912.0f;
    const float r = lo - n * 0.693359375f - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const float scale = __uint_as_float((unsigned)((int)n + 127) << 23);
    return x >= -87.0f ? p * scale : 0.0f;
}

TD_DEV uint32_t key_of(float x)
{
    const uint32_t u = __float_as_uint(x);
    return u ^ (u >> 31 ? 0xffffffffu : 0x80000000u);
}

TD_DEV float value_of(uint32_t key)
{
    return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu));
}

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
TD_DEV void apply_bias(float *x, int V, const td_sample_row &r)
{
    for (uint32_t i = threadIdx.x; i < r.n_bias; i += blockDim.x) {
        const uint32_t id = r.bias[i].id;
        bool first = id < (uint32_t)V;
        for (uint32_t j = 0; j < i && first; j++) first = r.bias[j].id != id;
        if (!first) continue;
        float v = x[id];
        for (uint32_t j = i; j < r.n_bias; j++)
            if (r.bias[j].id == id) v = canonical(v + r.bias[j].add);
        x[id] = v;
    }
}

TD_DEV void apply_penalties(float *x, int V, const td_sample_row &r)
{
    for (uint32_t i = threadIdx.x; i < r.n_pen; i += blockDim.x) {
        const td_penalty p = r.pen[i];
        if (p.id >= (uint32_t)V) continue;
        float v = x[p.id];
        if (p.n_out || p.in_prompt) v = v > 0 ? v / r.repetition_penalty : v * r.repetition_penalty;
        if (p.n_out) v -= r.presence_penalty + r.frequency_penalty * (float)p.n_out;
        x[p.id] = canonical(v);
    }
}

/* The processed row in x: a thread's own elements need no barrier before its next pass. */
TD_DEV void process(const float *raw, float *x, int V, const td_sample_row &r)
{
    for (int i = threadIdx.x; i < V; i += (int)blockDim.x) {
        const bool allowed = !r.mask || (r.mask[i / 32] >> (i % 32) & 1u);
        x[i] = allowed ? canonical(raw[i]) : -INFINITY;
    }
    if (r.n_bias) {
        __syncthreads();
        apply_bias(x, V, r);
    }
    if (r.n_pen) {
        __syncthreads();
        apply_penalties(x, V, r);
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

/* A thread takes blocks of 4 tokens: one Philox call for each that can win. */
TD_DEV u64 run_race(const race &r, const float *x, int V, const td_sample_row &row, int first)
{
    uint32_t bits[4];
    philox((uint32_t)first / 4, row.position, row.stream, row.seed, bits);
    float bar = x[first] + gumbel(bits[first % 4]);
    u64 best = rank_of(bar, first);
    for (int i0 = (int)threadIdx.x * 4; i0 < V; i0 += (int)blockDim.x * 4) {
        bool drawn = false;
        for (int j = 0; j < 4 && i0 + j < V; j++) {
            const float v = x[i0 + j];
            if (!(v >= r.floor && v + NOISE_MAX >= bar) || !candidate(r, v, i0 + j)) continue;
            if (!drawn) philox((uint32_t)i0 / 4, row.position, row.stream, row.seed, bits);
            drawn = true;
            const float sum = v + gumbel(bits[j]);
            const u64 rank = rank_of(sum, i0 + j);
            if (rank > best) best = rank;
            if (sum > bar) bar = sum;
        }
    }
    return best;
}

TD_DEV int choose_random(shared_space *s, float *x, int V, const td_sample_row &row)
{
    u64 best = 0;
    for (int i = threadIdx.x; i < V; i += (int)blockDim.x) {
        const float v = x[i] / row.temperature + 0.0f;
        x[i] = v;
        const u64 rank = rank_of(v, i);
        best = rank > best ? rank : best;
    }
    best = block_max(s, best);
    const int first = id_of(best);
    const float max = value_of((uint32_t)(best >> 32));
    if (fabsf(max) == INFINITY) return first;
    const bool by_k = row.top_k > 0 && row.top_k < V, by_p = row.top_p < 1.0f;
    race r = {{0u, V}, max, -INFINITY, row.min_p, by_k || by_p || row.min_p > 0.f};
    if (by_k) {
        r.c = find_cut(s, x, V, (u64)row.top_k, true, [](float) { return (u64)1; });
        r.floor = value_of(r.c.key);
    }
    if (by_p) {
        const float floor = r.floor;
        auto weigh = [max, floor](float v) { return v >= floor ? fixed(exp_neg(v - max)) : (u64)0; };
        u64 total = 0;
        for (int i = threadIdx.x; i < V; i += (int)blockDim.x) total += weigh(x[i]);
        total = block_sum(s, total);
        r.c = find_cut(s, x, V, (u64)((double)row.top_p * (double)total), false, weigh);
        r.floor = value_of(r.c.key);
    }
    __syncthreads();
    return id_of(block_max(s, run_race(r, x, V, row, first)));
}

/* raw: only read; x: the row's workspace. The whole of out is written. */
// limits: regs 64, spill 0, smem 18432
static __global__ void __launch_bounds__(1024, 1)
    sample_row(const float *logits, size_t ld, int V, const td_sample_row *rows, float *space,
               size_t ld_space, td_sample_out *out)
{
    __shared__ shared_space s;
    td_grid_wait();
    const float *raw = logits + (size_t)blockIdx.x * ld;
    const td_sample_row row = rows[blockIdx.x];
    const bool greedy = row.temperature < GREEDY_BELOW;
    float *x = space + (size_t)blockIdx.x * ld_space;
    const bool plain = greedy && !row.mask && !row.n_bias && !row.n_pen;
    if (!plain) process(raw, x, V, row);
    u64 best = 0;
    for (int i = threadIdx.x; i < V; i += (int)blockDim.x) {
        const float v = plain ? canonical(raw[i]) : x[i];
        const u64 rank = v > -INFINITY ? rank_of(v, i) : 0;
        best = rank > best ? rank : best;
    }
    best = block_max(&s, best);
    int token = best ? id_of(best) : -1;
    if (best && !greedy) token = choose_random(&s, x, V, row);
    td_sample_out *o = out + blockIdx.x;
    if (threadIdx.x == 0) {
        o->token = token;
        o->logprob = 0.f;
        o->n_top = 0;
    }
    for (int i = threadIdx.x; i < TD_MAX_TOP_LOGPROBS; i += (int)blockDim.x) o->top[i] = td_top{0u, 0.f};
}

/* ---- log probabilities of the raw logits ---- */

/* log of the sum of exp over the row (NaN left out), and how many are no NaN. */
TD_DEV double log_sum_exp(shared_space *s, const float *raw, int V, u64 *n_real)
{
    u64 best = 0, n = 0, sum = 0;
    for (int i = threadIdx.x; i < V; i += (int)blockDim.x) {
        const float v = raw[i];
        if (v != v) continue;
        const u64 rank = rank_of(v, i);
        best = rank > best ? rank : best;
        n++;
    }
    best = block_max(s, best);
    *n_real = block_sum(s, n);
    const float max = best ? value_of((uint32_t)(best >> 32)) : -INFINITY;
    if (fabsf(max) == INFINITY) return (double)max;
    for (int i = threadIdx.x; i < V; i += (int)blockDim.x)
        if (raw[i] == raw[i]) sum += fixed(exp_neg(raw[i] - max));
    sum = block_sum(s, sum);
    return (double)max + log((double)sum / 17592186044416.0);
}

/* The n largest, descending, ties to the lower id: their cut, all of them into shared memory, each to its
 * rank. */
TD_DEV void top_n(shared_space *s, const float *raw, int V, int n, double lse, td_sample_out *o)
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
        o->top[place] = td_top{mine.id, (float)((double)mine.logprob - lse)};
    }
}

/* rows: sample's (out->token is set); else score's ids and n_alternatives. */
// limits: regs 64, spill 0, smem 18432
static __global__ void __launch_bounds__(1024, 1)
    report_row(const float *logits, size_t ld, int V, const td_sample_row *rows, const int32_t *ids,
               int n_alternatives, td_sample_out *out)
{
    __shared__ shared_space s;
    td_grid_wait();
    const float *raw = logits + (size_t)blockIdx.x * ld;
    td_sample_out *o = out + blockIdx.x;
    const int want = rows ? rows[blockIdx.x].logprobs : n_alternatives;
    const int token = rows ? o->token : ids[blockIdx.x];
    if (rows && want < 0) return;
    u64 n_real;
    const double lse = log_sum_exp(&s, raw, V, &n_real);
    int n = want < TD_MAX_TOP_LOGPROBS ? want : TD_MAX_TOP_LOGPROBS;
    n = n < 0 ? 0 : (u64)n > n_real ? (int)n_real : n;
    if (n) top_n(&s, raw, V, n, lse, o);
    for (int i = n + (int)threadIdx.x; i < TD_MAX_TOP_LOGPROBS; i += (int)blockDim.x)
        o->top[i] = td_top{0u, 0.f};
    if (threadIdx.x != 0) return;
    o->token = token;
    o->n_top = n;
    o->logprob = token >= 0 && token < V ? (float)((double)raw[token] - lse) : 0.f;
}

// limits: regs 32, spill 0, smem 0
static __global__ void __launch_bounds__(256) fill_ids(int32_t *ids, int n, const td_sample_out *before)
{
    const int i = blockIdx.x * 256 + threadIdx.x;
    if (i >= n || ids[i] >= 0) return;
    const int token = before[-1 - ids[i]].token;
    ids[i] = token < 0 ? 0 : token;
}

/* ---- launchers ---- */

static size_t space_row(int V)
{
    return ((size_t)V + 31) / 32 * 32;
}

/* By V alone: a row's work is the same whatever n is. */
static unsigned block_of(int V)
{
    return V <= 1024 ? 128 : V <= 8192 ? 512 : 1024;
}

extern "C" size_t td_cuda_sample_bytes(int n, int V)
{
    return (size_t)n * space_row(V) * sizeof(float);
}

extern "C" int td_cuda_sample(td_stream s, const float *logits, size_t ld, int V, const td_sample_row *rows,
                              int n, bool with_logprobs, void *workspace, td_sample_out *out)
{
    if (n == 0) return 0;
    if (V < 1 || V >= 1 << 19) return cudaErrorInvalidValue;
    cudaError_t e = td_launch(sample_row, (unsigned)n, block_of(V), 0, (cudaStream_t)s, logits, ld, V, rows,
                              (float *)workspace, space_row(V), out);
    if (e != cudaSuccess || !with_logprobs) return e;
    return td_launch(report_row, (unsigned)n, block_of(V), 0, (cudaStream_t)s, logits, ld, V, rows,
                     (const int32_t *)nullptr, 0, out);
}

extern "C" int td_cuda_score(td_stream s, const float *logits, size_t ld, int V, const int32_t *ids,
                             int n_alternatives, int n, td_sample_out *out)
{
    if (n == 0) return 0;
    if (V < 1 || V >= 1 << 19) return cudaErrorInvalidValue;
    return td_launch(report_row, (unsigned)n, block_of(V), 0, (cudaStream_t)s, logits, ld, V,
                     (const td_sample_row *)nullptr, ids, n_alternatives, out);
}

extern "C" int td_cuda_fill_ids(td_stream s, int32_t *ids, int n, const td_sample_out *before)
{
    if (n == 0) return 0;
    return td_launch(fill_ids, (unsigned)(n + 255) / 256, 256, 0, (cudaStream_t)s, ids, n, before);
}
