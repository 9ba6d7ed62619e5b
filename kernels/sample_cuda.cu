// SPDX-License-Identifier: Apache-2.0
/* kernels/sample_cuda.cu - choosing tokens on the device: one block a row, steps and tie rules of
 * kernels/sample_tile.h.
 *
 *   raw logits -> mask, bias, penalties -> greedy, or: /T -> top_k -> top_p -> min_p -> exponential race;
 *   a second kernel reports log probabilities of the raw logits.
 * Rules:   1. Every f32 value that a choice depends on (processed logits, exp, noise) is the same sequence of
 *             exactly rounded operations as on the CPU (-fmad=false); masses are integers, 2^-44 each, so no
 *             order matters.
 *          2. The kept set is {key > cut.key} + {key == cut.key and id <= cut.id}, found by three radix
 *             passes of 11, 11 and 10 key bits over the row, which stays in L2: nothing is sorted.
 *          3. Tokens whose logit plus the largest noise cannot beat the likeliest token's draw draw no noise.
 * Cost:    a row is read 2 (greedy) to 9 times by one SM: 5 to 45 us at V = 128k by estimate, not measured.
 */
#include "kernels/sample_cuda_tile.h"

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
    return id_of(block_max(s, run_race(r, x, 0, V, row, first)));
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
    const bool greedy = row.temperature < TD_GREEDY_BELOW;
    float *x = space + (size_t)blockIdx.x * ld_space;
    const bool plain = greedy && !row.mask && !row.n_bias && !row.n_pen;
    if (!plain) process(raw, x, 0, V, row);
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
    if (n) top_n(&s, raw, V, n, lse, o->top);
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
