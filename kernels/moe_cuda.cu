// SPDX-License-Identifier: Apache-2.0
/* kernels/moe_cuda.cu - mixture of experts around the grouped product: router logits, choice, placement,
 * gathering, combination. Counts are integers and rows are placed by rank, so nothing depends on the order of
 * atomics. */
#include "kernels/cuda.h"
#include "kernels/cuda_row.h"
#include "kernels/td_cuda.h"

/* ---- router logits: one warp an expert, 4 tokens; lane l adds k = l, l + 32, .. in one chain, then the
 * butterfly ---- */

enum { LOGIT_ROWS = 4, LOGIT_WARPS = 8 };

// limits: regs 48, spill 0, smem 0
template <class W>
static __global__ void __launch_bounds__(LOGIT_WARPS * 32)
    moe_logits(const W *router, int N, int K, const float *x, size_t ldx, int T, float *logits)
{
    td_grid_wait();
    const int lane = threadIdx.x % 32, n = blockIdx.y * LOGIT_WARPS + threadIdx.x / 32,
              t0 = blockIdx.x * LOGIT_ROWS;
    if (n >= N) return;
    float sum[LOGIT_ROWS] = {};
    for (int k = lane; k < K; k += 32) {
        const float w = td_get(router + (size_t)n * K + k);
#pragma unroll
        for (int i = 0; i < LOGIT_ROWS; i++)
            if (t0 + i < T) sum[i] = fmaf(x[(size_t)(t0 + i) * ldx + k], w, sum[i]);
    }
#pragma unroll
    for (int i = 0; i < LOGIT_ROWS; i++) {
        const float v = td_warp_sum(sum[i]);
        if (lane == 0 && t0 + i < T) logits[(size_t)(t0 + i) * N + n] = v;
    }
}

extern "C" int td_cuda_moe_logits(td_stream s, const void *router, td_dtype dtype, int N, int K,
                                  const float *x, size_t ldx, int T, float *logits)
{
    if (T == 0 || N == 0) return 0;
    dim3 grid((unsigned)(T + LOGIT_ROWS - 1) / LOGIT_ROWS, (unsigned)(N + LOGIT_WARPS - 1) / LOGIT_WARPS);
    return td_with_type(dtype, [&](auto type) -> int {
        typedef decltype(type) W;
        return td_launch(moe_logits<W>, grid, LOGIT_WARPS * 32, 0, (cudaStream_t)s, (const W *)router, N, K,
                         x, ldx, T, logits);
    });
}

/* ---- choice: one warp a token, the logits in its registers ---- */

enum { ROUTE_WARPS = 4, PER_LANE = TD_MAX_EXPERTS / 32 };

/* Larger is better; among equals the lower id; NaN is below everything and never 0. */
TD_DEV unsigned long long route_rank(float v, int id)
{
    const unsigned u = __float_as_uint(v + 0.0f); /* -0 becomes +0 */
    const unsigned key = v != v ? 0u : u >> 31 ? ~u : u | 0x80000000u;
    return (unsigned long long)key << 32 | (0xffffffffu - (unsigned)id);
}

TD_DEV unsigned long long warp_best(unsigned long long v)
{
    for (int o = 16; o > 0; o >>= 1) {
        const unsigned long long other = __shfl_xor_sync(0xffffffffu, v, o);
        v = other > v ? other : v;
    }
    return v;
}

// limits: regs 80, spill 0, smem 0
static __global__ void __launch_bounds__(ROUTE_WARPS * 32)
    moe_route(const __grid_constant__ td_route_law law, const float *logits, int T, int32_t *ids,
              float *weights)
{
    td_grid_wait();
    const int lane = threadIdx.x % 32, t = blockIdx.x * ROUTE_WARPS + threadIdx.x / 32, n = law.n_experts;
    if (t >= T) return;
    const float *row = logits + (size_t)t * n;
    unsigned long long rank[PER_LANE];
    bool bad = false;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        const int e = lane + 32 * i;
        rank[i] = e < n ? route_rank(row[e], e) : 0ull;
        bad = bad || (e < n && row[e] != row[e]);
    }
    int mine = 0; /* slot `lane`'s expert */
    for (int s = 0; s < law.top_k; s++) {
        unsigned long long best = 0;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) best = rank[i] > best ? rank[i] : best;
        best = warp_best(best);
        const int id = (int)(0xffffffffu - (unsigned)best);
        if (lane == s) mine = id;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++)
            if (rank[i] == best) rank[i] = 0ull; /* ids make ranks distinct */
    }
    const bool chosen = lane < law.top_k;
    const float value = chosen ? row[mine] : 0.f, first = __shfl_sync(0xffffffffu, value, 0);
    const float e = chosen ? expf(value - first) : 0.f;
    float sum = e;
    if (law.score == TD_ROUTE_SOFTMAX && !law.renormalise) {
        sum = 0.f;
        for (int i = lane; i < n; i += 32) sum += expf(row[i] - first);
    }
    sum = td_warp_sum(sum);
    bad = __any_sync(0xffffffffu, bad);
    if (!chosen) return;
    ids[(size_t)t * law.top_k + lane] = mine;
    weights[(size_t)t * law.top_k + lane] = bad ? NAN : e / sum * law.scale;
}

extern "C" int td_cuda_moe_route(td_stream s, const td_route_law *law, const float *logits, int T,
                                 int32_t *ids, float *weights)
{
    if (law->n_experts < 1 || law->n_experts > TD_MAX_EXPERTS || law->top_k < 1 ||
        law->top_k > TD_MAX_TOP_K || law->top_k > law->n_experts)
        return cudaErrorInvalidValue;
    if (T == 0) return 0;
    return td_launch(moe_route, (unsigned)(T + ROUTE_WARPS - 1) / ROUTE_WARPS, ROUTE_WARPS * 32, 0,
                     (cudaStream_t)s, *law, logits, T, ids, weights);
}

/* ---- placement: a stable counting sort ---- */

enum { COUNT_THREADS = 512, PLACE_THREADS = 256 };

// limits: regs 32, spill 0, smem 4096
static __global__ void __launch_bounds__(COUNT_THREADS)
    moe_count(const int32_t *ids, int n, int n_experts, int32_t *row0)
{
    __shared__ int count[TD_MAX_EXPERTS], total[TD_MAX_EXPERTS / 32];
    const int e = threadIdx.x, lane = e % 32;
    count[e] = 0;
    __syncthreads();
    for (int i = e; i < n; i += COUNT_THREADS)
        if (ids[i] >= 0 && ids[i] < n_experts) atomicAdd(&count[ids[i]], 1);
    __syncthreads();
    int sum = count[e]; /* inclusive scan in the warp, then over the warps */
    for (int o = 1; o < 32; o <<= 1) {
        const int v = __shfl_up_sync(0xffffffffu, sum, (unsigned)o);
        if (lane >= o) sum += v;
    }
    if (lane == 31) total[e / 32] = sum;
    __syncthreads();
    for (int w = 0; w < e / 32; w++) sum += total[w];
    if (e < n_experts) row0[e + 1] = sum;
    if (e == 0) row0[0] = 0;
}

/* Block e ranks the slots of expert e; block n_experts marks slots of no expert. */
// limits: regs 40, spill 0, smem 128
static __global__ void __launch_bounds__(PLACE_THREADS)
    moe_place(const int32_t *ids, int n, int n_experts, const int32_t *row0, int32_t *row)
{
    __shared__ int found[PLACE_THREADS / 32];
    const int e = (int)blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (e == n_experts) {
        for (int i = threadIdx.x; i < n; i += PLACE_THREADS)
            if (ids[i] < 0 || ids[i] >= n_experts) row[i] = -1;
        return;
    }
    int next = row0[e];
    const int end = row0[e + 1];
    for (int base = 0; base < n && next < end; base += PLACE_THREADS) {
        const int i = base + threadIdx.x;
        const bool mine = i < n && ids[i] == e;
        const unsigned votes = __ballot_sync(0xffffffffu, mine);
        if (lane == 0) found[warp] = __popc(votes);
        __syncthreads();
        int before = 0, all = 0;
        for (int w = 0; w < PLACE_THREADS / 32; w++) {
            if (w < warp) before += found[w];
            all += found[w];
        }
        if (mine) row[i] = next + before + __popc(votes & ((1u << lane) - 1u));
        next += all;
        __syncthreads();
    }
}

extern "C" int td_cuda_moe_place(td_stream s, const int32_t *ids, int T, int top_k, int n_experts,
                                 int32_t *row0, int32_t *row)
{
    if (n_experts < 1 || n_experts > TD_MAX_EXPERTS) return cudaErrorInvalidValue;
    cudaError_t e =
        td_launch(moe_count, 1, COUNT_THREADS, 0, (cudaStream_t)s, ids, T * top_k, n_experts, row0);
    if (e != cudaSuccess || T * top_k == 0) return e;
    return td_launch(moe_place, (unsigned)n_experts + 1, PLACE_THREADS, 0, (cudaStream_t)s, ids, T * top_k,
                     n_experts, (const int32_t *)row0, row);
}

/* ---- gathering and combination: element-wise, one read or write of every element ---- */

// limits: regs 40, spill 0, smem 0
template <bool VEC, class OUT>
static __global__ void __launch_bounds__(256)
    moe_gather(const float *x, size_t ldx, const int32_t *row, int top_k, int E, OUT *out, size_t ldo)
{
    td_grid_wait();
    const int g = blockIdx.y * 256 + threadIdx.x;
    if (g >= (E + 3) / 4) return;
    const float4 v = td_load4<VEC>(x + (size_t)blockIdx.x * ldx, g, E);
    for (int s = 0; s < top_k; s++) {
        const int r = row[(size_t)blockIdx.x * top_k + s];
        if (r >= 0) td_store4<VEC>(out + (size_t)r * ldo, g, E, v);
    }
}

extern "C" int td_cuda_moe_gather(td_stream s, const float *x, size_t ldx, const int32_t *row, int T,
                                  int top_k, int E, void *out, td_dtype out_dtype, size_t ldo)
{
    if (T == 0 || E == 0) return 0;
    dim3 grid((unsigned)T, (unsigned)((E + 3) / 4 + 255) / 256);
    return td_with_type(out_dtype, [&](auto type) -> int {
        typedef decltype(type) OUT;
        bool vec = E % 4 == 0 && td_host_aligned16(x, ldx * 4) && td_host_aligned16(out, ldo * sizeof(OUT));
        OUT *o = (OUT *)out;
        return vec ? td_launch(moe_gather<true, OUT>, grid, 256, 0, (cudaStream_t)s, x, ldx, row, top_k, E, o,
                               ldo)
                   : td_launch(moe_gather<false, OUT>, grid, 256, 0, (cudaStream_t)s, x, ldx, row, top_k, E,
                               o, ldo);
    });
}

// limits: regs 48, spill 0, smem 0
template <bool VEC>
static __global__ void __launch_bounds__(256)
    moe_combine(const float *y, size_t ldy, const int32_t *row, const float *weights, int top_k, int E,
                float *out, size_t ldo)
{
    td_grid_wait();
    const int g = blockIdx.y * 256 + threadIdx.x;
    if (g >= (E + 3) / 4) return;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int s = 0; s < top_k; s++) {
        const int r = row[(size_t)blockIdx.x * top_k + s];
        if (r < 0) continue;
        const float w = weights[(size_t)blockIdx.x * top_k + s];
        const float4 v = td_load4<VEC>(y + (size_t)r * ldy, g, E);
        sum = make_float4(fmaf(w, v.x, sum.x), fmaf(w, v.y, sum.y), fmaf(w, v.z, sum.z), fmaf(w, v.w, sum.w));
    }
    float *o = out + (size_t)blockIdx.x * ldo;
    const float4 v = td_load4<VEC>(o, g, E);
    td_store4<VEC>(o, g, E, make_float4(v.x + sum.x, v.y + sum.y, v.z + sum.z, v.w + sum.w));
}

extern "C" int td_cuda_moe_combine(td_stream s, const float *y, size_t ldy, const int32_t *row,
                                   const float *weights, int T, int top_k, int E, float *out, size_t ldo)
{
    if (T == 0 || E == 0) return 0;
    dim3 grid((unsigned)T, (unsigned)((E + 3) / 4 + 255) / 256);
    bool vec = E % 4 == 0 && td_host_aligned16(y, ldy * 4) && td_host_aligned16(out, ldo * 4);
    return vec ? td_launch(moe_combine<true>, grid, 256, 0, (cudaStream_t)s, y, ldy, row, weights, top_k, E,
                           out, ldo)
               : td_launch(moe_combine<false>, grid, 256, 0, (cudaStream_t)s, y, ldy, row, weights, top_k, E,
                           out, ldo);
}
