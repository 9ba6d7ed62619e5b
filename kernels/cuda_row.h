/* kernels/cuda_row.h - internal to .cu files: stores in any element type, 4 elements at a time where alignment allows.
 *
 * Rules: a row of n elements is cut in groups of 4 (thread t of N: groups t, t + N, ..), whether or not the addresses
 * allow 16-byte access, so that alignment changes no order of summation. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_KERNELS_CUDA_ROW_H
#define TD_KERNELS_CUDA_ROW_H

#include "kernels/td_cuda.h"

static inline bool td_host_aligned16(const void *p, size_t ld_bytes)
{
    return ((uintptr_t)p | ld_bytes) % 16 == 0;
}

/* Element types as C++ types of two bytes, or float. */
TD_DEV void td_put(float *p, float v)
{
    *p = v;
}
TD_DEV void td_put(__nv_bfloat16 *p, float v)
{
    *p = __float2bfloat16_rn(v);
}
TD_DEV void td_put(__half *p, float v)
{
    *p = __float2half_rn(v);
}
TD_DEV float td_get(const float *p)
{
    return *p;
}
TD_DEV float td_get(const __nv_bfloat16 *p)
{
    return __bfloat162float(*p);
}
TD_DEV float td_get(const __half *p)
{
    return __half2float(*p);
}

TD_DEV uint32_t td_pack(__nv_bfloat162 v)
{
    return (uint32_t)__bfloat16_as_ushort(v.x) | (uint32_t)__bfloat16_as_ushort(v.y) << 16;
}
TD_DEV uint32_t td_pack(__half2 v)
{
    return (uint32_t)__half_as_ushort(v.x) | (uint32_t)__half_as_ushort(v.y) << 16;
}
TD_DEV void td_put4(float *p, float4 v)
{
    *reinterpret_cast<float4 *>(p) = v;
}
TD_DEV void td_put4(__nv_bfloat16 *p, float4 v)
{
    *reinterpret_cast<uint2 *>(p) =
        make_uint2(td_pack(__floats2bfloat162_rn(v.x, v.y)), td_pack(__floats2bfloat162_rn(v.z, v.w)));
}
TD_DEV void td_put4(__half *p, float4 v)
{
    *reinterpret_cast<uint2 *>(p) =
        make_uint2(td_pack(__floats2half2_rn(v.x, v.y)), td_pack(__floats2half2_rn(v.z, v.w)));
}

/* Group g of a row: elements 4g .. 4g + 3, those past n are zero / not stored. VEC: everything is aligned and n % 4 is 0. */
template <bool VEC> TD_DEV float4 td_load4(const float *row, int g, int n)
{
    if (VEC) return *reinterpret_cast<const float4 *>(row + 4 * g);
    const int i = 4 * g;
    return make_float4(row[i], i + 1 < n ? row[i + 1] : 0.f, i + 2 < n ? row[i + 2] : 0.f,
                       i + 3 < n ? row[i + 3] : 0.f);
}
template <bool VEC, class T> TD_DEV void td_store4(T *row, int g, int n, float4 v)
{
    const int i = 4 * g;
    if (VEC) {
        td_put4(row + i, v);
        return;
    }
    td_put(row + i, v.x);
    if (i + 1 < n) td_put(row + i + 1, v.y);
    if (i + 2 < n) td_put(row + i + 2, v.z);
    if (i + 3 < n) td_put(row + i + 3, v.w);
}

/* Sum over a block of N threads: butterfly in each warp, then the warps' sums by a butterfly again; same bits for all. */
template <int N> TD_DEV float td_block_sum(float v)
{
    static_assert(N % 32 == 0 && N <= 1024, "whole warps");
    __shared__ float part[N / 32];
    v = td_warp_sum(v);
    if (N == 32) return v;
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
    __syncthreads();
    v = threadIdx.x % 32 < N / 32 ? part[threadIdx.x % 32] : 0.f;
    v = td_warp_sum(v);
    __syncthreads(); /* part may be used again */
    return v;
}

/* Calls f(T()) with the C++ type of an element type; an unknown one is an invalid value. */
template <class F> static inline int td_with_type(td_dtype t, F f)
{
    switch (t) {
    case TD_F32: return f((float)0);
    case TD_BF16: return f(__nv_bfloat16());
    case TD_F16: return f(__half());
    case TD_E4M3: break;
    }
    return (int)cudaErrorInvalidValue;
}

#endif
