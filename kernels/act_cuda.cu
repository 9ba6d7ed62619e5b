// SPDX-License-Identifier: Apache-2.0
/* kernels/act_cuda.cu - gated activations, conversion of activations, the fixed tree over parts of a sum.
 * Element-wise: each thread 4 elements (the tree: one). */
#include "kernels/act_cuda.h"
#include "kernels/cuda.h"
#include "kernels/cuda_row.h"
#include "kernels/td_cuda.h"

// limits: regs 48, spill 0, smem 0
template <td_act ACT, bool VEC, class OUT>
static __global__ void __launch_bounds__(256)
    act_mul_rows(const float *x, size_t ldx, int F, OUT *out, size_t ldo)
{
    td_grid_launch();
    td_grid_wait();
    const int g = blockIdx.y * 256 + threadIdx.x;
    if (g >= (F + 3) / 4) return;
    const float *row = x + (size_t)blockIdx.x * ldx;
    const float4 a = td_load4<VEC>(row, g, F), b = td_load4<VEC>(row + F, g, F);
    td_store4<VEC>(out + (size_t)blockIdx.x * ldo, g, F,
                   make_float4(td_act_of<ACT>(a.x) * b.x, td_act_of<ACT>(a.y) * b.y,
                               td_act_of<ACT>(a.z) * b.z, td_act_of<ACT>(a.w) * b.w));
}

template <td_act ACT, class OUT>
static int act_mul(cudaStream_t s, const float *x, size_t ldx, int T, int F, OUT *out, size_t ldo)
{
    if (T == 0 || F == 0) return 0;
    dim3 grid((unsigned)T, (unsigned)((F + 3) / 4 + 255) / 256);
    bool vec = F % 4 == 0 && td_host_aligned16(x, ldx * 4) && td_host_aligned16(out, ldo * sizeof(OUT));
    return vec ? td_launch_next(act_mul_rows<ACT, true, OUT>, grid, 256, 0, s, x, ldx, F, out, ldo)
               : td_launch_next(act_mul_rows<ACT, false, OUT>, grid, 256, 0, s, x, ldx, F, out, ldo);
}

extern "C" int td_cuda_act_mul(td_stream s, td_act kind, const float *x, size_t ldx, int T, int F, void *out,
                               td_dtype out_dtype, size_t ldo)
{
    return td_with_type(out_dtype, [&](auto type) -> int {
        auto *o = (decltype(type) *)out;
        switch (kind) {
        case TD_ACT_SILU:
            return act_mul<TD_ACT_SILU>((cudaStream_t)s, x, ldx, T, F, o, ldo);
        case TD_ACT_GELU:
            return act_mul<TD_ACT_GELU>((cudaStream_t)s, x, ldx, T, F, o, ldo);
        case TD_ACT_GELU_TANH:
            return act_mul<TD_ACT_GELU_TANH>((cudaStream_t)s, x, ldx, T, F, o, ldo);
        }
        return cudaErrorInvalidValue;
    });
}

// limits: regs 32, spill 0, smem 0
template <bool VEC, class OUT>
static __global__ void __launch_bounds__(256)
    convert_rows(const float *x, size_t ldx, int E, OUT *out, size_t ldo)
{
    td_grid_wait();
    const int g = blockIdx.y * 256 + threadIdx.x;
    if (g >= (E + 3) / 4) return;
    td_store4<VEC>(out + (size_t)blockIdx.x * ldo, g, E, td_load4<VEC>(x + (size_t)blockIdx.x * ldx, g, E));
}

extern "C" int td_cuda_convert(td_stream s, const float *x, size_t ldx, int T, int E, void *out,
                               td_dtype out_dtype, size_t ldo)
{
    if (T == 0 || E == 0) return 0;
    dim3 grid((unsigned)T, (unsigned)((E + 3) / 4 + 255) / 256);
    return td_with_type(out_dtype, [&](auto type) -> int {
        typedef decltype(type) OUT;
        bool vec = E % 4 == 0 && td_host_aligned16(x, ldx * 4) && td_host_aligned16(out, ldo * sizeof(OUT));
        OUT *o = (OUT *)out;
        return vec ? td_launch(convert_rows<true, OUT>, grid, 256, 0, (cudaStream_t)s, x, ldx, E, o, ldo)
                   : td_launch(convert_rows<false, OUT>, grid, 256, 0, (cudaStream_t)s, x, ldx, E, o, ldo);
    });
}

// limits: regs 40, spill 0, smem 0
static __global__ void __launch_bounds__(256)
    sum_tree_rows(const float *parts, size_t part_stride, int n_parts, int N, size_t ld, const float *bias,
                  float *y, size_t ldy, bool add)
{
    td_grid_launch();
    td_grid_wait();
    const int n = blockIdx.y * 256 + threadIdx.x;
    if (n >= N) return;
    float part[TD_MAX_SLICES];
#pragma unroll
    for (int i = 0; i < TD_MAX_SLICES; i++)
        part[i] = i < n_parts ? parts[(size_t)i * part_stride + (size_t)blockIdx.x * ld + n] : 0.f;
#pragma unroll
    for (int step = 1; step < TD_MAX_SLICES; step *= 2)
#pragma unroll
        for (int i = 0; i + step < TD_MAX_SLICES; i += 2 * step)
            if (i + step < n_parts) part[i] = part[i] + part[i + step];
    const float v = bias ? part[0] + bias[n] : part[0];
    float *o = y + (size_t)blockIdx.x * ldy + n;
    *o = add ? *o + v : v;
}

extern "C" int td_cuda_sum_tree(td_stream s, const float *parts, size_t part_stride, int n_parts, int T,
                                int N, size_t ld, const float *bias, float *y, size_t ldy, bool add)
{
    if (n_parts < 1 || n_parts > TD_MAX_SLICES || (n_parts & (n_parts - 1))) return cudaErrorInvalidValue;
    if (T == 0 || N == 0) return 0;
    return td_launch_next(sum_tree_rows, dim3((unsigned)T, (unsigned)(N + 255) / 256), 256, 0, (cudaStream_t)s,
                     parts, part_stride, n_parts, N, ld, bias, y, ldy, add);
}
