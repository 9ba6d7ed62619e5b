// SPDX-License-Identifier: Apache-2.0
/* kernels/norm_rope_cuda.cu - RMSNorm with and without the residual before it; head norm, rotary embedding
 * and the append to the pages. All are bound by memory: each element is read once and written once (the
 * second read of a row in the norm hits L1). Sums in f32: at most 16 chained per thread at E = 8192, then two
 * butterflies. */
#include "kernels/cuda.h"
#include "kernels/cuda_row.h"
#include "kernels/td_cuda.h"

/* One block a row. ADD: x += delta first. */
// limits: regs 64, spill 0, smem 128
template <int N, bool ADD, bool VEC, class OUT>
static __global__ void __launch_bounds__(N)
    rmsnorm_row(float *x, size_t ldx, const float *delta, size_t ldd, const float *w, float eps, int E,
                OUT *out, size_t ldo)
{
    td_grid_launch();
    td_grid_wait();
    float *row = x + (size_t)blockIdx.x * ldx;
    const int groups = (E + 3) / 4;
    float sum = 0.f;
    for (int g = threadIdx.x; g < groups; g += N) {
        float4 v = td_load4<VEC>(row, g, E);
        if (ADD) {
            const float4 d = td_load4<VEC>(delta + (size_t)blockIdx.x * ldd, g, E);
            v = make_float4(v.x + d.x, v.y + d.y, v.z + d.z, v.w + d.w);
            td_store4<VEC>(row, g, E, v);
        }
        sum = fmaf(v.x, v.x, sum);
        sum = fmaf(v.y, v.y, sum);
        sum = fmaf(v.z, v.z, sum);
        sum = fmaf(v.w, v.w, sum);
    }
    sum = td_block_sum<N>(sum);
    const float scale = 1.0f / sqrtf(sum / (float)E + eps);
    OUT *o = out + (size_t)blockIdx.x * ldo;
    for (int g = threadIdx.x; g < groups; g += N) {
        const float4 v = td_load4<VEC>(row, g, E), k = td_load4<VEC>(w, g, E);
        td_store4<VEC>(
            o, g, E, make_float4(v.x * scale * k.x, v.y * scale * k.y, v.z * scale * k.z, v.w * scale * k.w));
    }
}

template <bool ADD, class OUT>
static int norm(cudaStream_t s, float *x, size_t ldx, const float *delta, size_t ldd, const float *w,
                float eps, int T, int E, OUT *out, size_t ldo)
{
    if (T == 0) return 0;
    if (E < 1) return cudaErrorInvalidValue;
    bool vec = E % 4 == 0 && td_host_aligned16(x, ldx * 4) && td_host_aligned16(w, 0) &&
               td_host_aligned16(out, ldo * sizeof(OUT)) && (!ADD || td_host_aligned16(delta, ldd * 4));
#define RUN(N)                                                                                               \
    (vec ? td_launch_next(rmsnorm_row<N, ADD, true, OUT>, T, N, 0, s, x, ldx, delta, ldd, w, eps, E, out, ldo)    \
         : td_launch_next(rmsnorm_row<N, ADD, false, OUT>, T, N, 0, s, x, ldx, delta, ldd, w, eps, E, out, ldo))
    return E <= 512 ? RUN(64) : E <= 4096 ? RUN(256) : RUN(512);
#undef RUN
}

extern "C" int td_cuda_rmsnorm(td_stream s, const float *x, size_t ldx, const float *w, float eps, int T,
                               int E, void *out, td_dtype out_dtype, size_t ldo)
{
    return td_with_type(out_dtype, [&](auto type) {
        return norm<false>((cudaStream_t)s, (float *)x, ldx, (const float *)nullptr, 0, w, eps, T, E,
                           (decltype(type) *)out, ldo);
    });
}

extern "C" int td_cuda_add_rmsnorm(td_stream s, float *x, size_t ldx, const float *delta, size_t ldd,
                                   const float *w, float eps, int T, int E, void *out, td_dtype out_dtype,
                                   size_t ldo)
{
    return td_with_type(out_dtype, [&](auto type) {
        return norm<true>((cudaStream_t)s, x, ldx, delta, ldd, w, eps, T, E, (decltype(type) *)out, ldo);
    });
}

// limits: regs 40, spill 0, smem 0
template <bool VEC>
static __global__ void __launch_bounds__(256)
    add_rows(float *x, size_t ldx, const float *delta, size_t ldd, int E)
{
    float *row = x + (size_t)blockIdx.y * ldx;
    const int g = blockIdx.x * 256 + threadIdx.x;
    if (g >= (E + 3) / 4) return;
    const float4 v = td_load4<VEC>(row, g, E), d = td_load4<VEC>(delta + (size_t)blockIdx.y * ldd, g, E);
    td_store4<VEC>(row, g, E, make_float4(v.x + d.x, v.y + d.y, v.z + d.z, v.w + d.w));
}

extern "C" int td_cuda_add(td_stream s, float *x, size_t ldx, const float *delta, size_t ldd, int T, int E)
{
    const int at_once = 65535; /* rows of a grid's y */
    bool vec = E % 4 == 0 && td_host_aligned16(x, ldx * 4) && td_host_aligned16(delta, ldd * 4);
    for (int t = 0; t < T; t += at_once) {
        dim3 grid((unsigned)((E + 3) / 4 + 255) / 256, (unsigned)min(T - t, at_once));
        float *to = x + (size_t)t * ldx;
        const float *from = delta + (size_t)t * ldd;
        cudaError_t e =
            vec ? td_launch(add_rows<true>, grid, 256, 0, (cudaStream_t)s, to, ldx, from, ldd, E)
                : td_launch(add_rows<false>, grid, 256, 0, (cudaStream_t)s, to, ldx, from, ldd, E);
        if (e != cudaSuccess) return e;
    }
    return 0;
}

/* ---- rope and append ---- */

enum { ROPE_WARPS = 4, ROPE_MAX_D = TD_MAX_HEAD_DIM };

/* One warp a head of q, k or v; lane l has elements l, l + 32, ..: one order of the norm's sum whatever else
 * runs. */
template <class KV> struct rope_args {
    td_rope_args a;
    KV *base;
    size_t slot0; /* element of the slot's first page */
    int P;
};

TD_DEV void rope_head(float *h, const float *cs, int half, int lane)
{
    for (int i = lane; i < half; i += 32) {
        const float a = h[i], b = h[i + half], c = cs[2 * i], s = cs[2 * i + 1];
        h[i] = fmaf(a, c, -(b * s));
        h[i + half] = fmaf(a, s, b * c);
    }
}

// limits: regs 56, spill 0, smem 4096
template <class KV>
static __global__ void __launch_bounds__(ROPE_WARPS * 32) rope_rows(const __grid_constant__ rope_args<KV> p)
{
    __shared__ float heads[ROPE_WARPS][ROPE_MAX_D];
    td_grid_launch();
    td_grid_wait();
    const td_rope_args &a = p.a;
    const int lane = threadIdx.x % 32, t = blockIdx.x;
    const int head = blockIdx.y * ROPE_WARPS + threadIdx.x / 32, D = a.D, half = a.rot_dim / 2;
    if (head >= a.H + 2 * a.G) return;
    float *x = a.qkv + (size_t)t * a.ld + (size_t)head * D, *h = heads[threadIdx.x / 32];
    const bool is_q = head < a.H, is_v = head >= a.H + a.G;
    const float *norm = is_v ? nullptr : is_q ? a.q_norm : a.k_norm;
    float sum = 0.f;
    for (int d = lane; d < D; d += 32) {
        h[d] = x[d];
        sum = fmaf(h[d], h[d], sum);
    }
    if (norm) {
        const float scale = 1.0f / sqrtf(td_warp_sum(sum) / (float)D + a.norm_eps);
        for (int d = lane; d < D; d += 32) h[d] = h[d] * scale * norm[d];
    }
    __syncwarp();
    if (!is_v) rope_head(h, a.cs + (size_t)t * half * 2, half, lane);
    __syncwarp();
    const float q_scale = is_q && a.q_scale ? a.q_scale[t] : 1.0f;
    for (int d = lane; d < D && !is_v; d += 32) x[d] = is_q && a.q_scale ? h[d] * q_scale : h[d];
    if (is_q || a.row_page[t] < 0) return;
    const int g = is_v ? head - a.H - a.G : head - a.H;
    const size_t side = (size_t)a.G * p.P * D,
                 at = ((size_t)g * p.P + a.row_in_page[t]) * D + (is_v ? side : 0);
    KV *to = p.base + p.slot0 + (size_t)a.row_page[t] * 2 * side + at;
    for (int d = lane; d < D; d += 32) td_put(to + d, h[d]);
}

extern "C" int td_cuda_rope_append(td_stream s, const td_rope_args *a)
{
    if (a->T == 0) return 0;
    if (a->D < 1 || a->D > ROPE_MAX_D || a->rot_dim < 0 || a->rot_dim > a->D || a->rot_dim % 2)
        return cudaErrorInvalidValue;
    unsigned y = (unsigned)(a->H + 2 * a->G + ROPE_WARPS - 1) / ROPE_WARPS;
    return td_with_type(a->kv->dtype, [&](auto type) {
        typedef decltype(type) KV;
        rope_args<KV> p = {*a, (KV *)a->kv->base, 0, a->kv->P};
        p.slot0 = (size_t)a->slot * a->kv->n_pages * td_kv_page_bytes(a->kv) / sizeof(KV);
        return (int)td_launch_next(rope_rows<KV>, dim3((unsigned)a->T, y), ROPE_WARPS * 32, 0, (cudaStream_t)s, p);
    });
}
