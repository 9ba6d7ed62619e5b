// SPDX-License-Identifier: Apache-2.0
/* kernels/quant_cuda.cu - see cuda_quant.h. One block a row; a thread has 4 columns at a time, so a warp has the
 * 128 of a group. What a row is made of is a parameter: f32, bf16 or f16 as they are, a norm, a gated activation.
 * With one scale a row it is made twice, once for its largest magnitude (the second time from L1 or L2). */
#include "kernels/act_cuda.h"
#include "kernels/cuda_quant.h"
#include "kernels/cuda_row.h"

namespace
{
enum { N = 256 };

/* td_f32_to_e4m3, for |v| up to a little over 448, and NaN. */
TD_DEV uint32_t quant_code(float v)
{
    const uint32_t u = __float_as_uint(v), sign = u >> 24 & 0x80u;
    uint32_t a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return sign | 0x7fu;
    if (a < 0x3c800000u) return sign | (__float_as_uint(__uint_as_float(a) + 0x1p14f) & 15u);
    a += 0x7ffffu + (a >> 20 & 1u);
    return sign | min((a >> 20) - 960u, 0x7eu);
}

TD_DEV float quant_value(uint32_t code)
{
    const uint32_t e = code >> 3 & 15u, m = code & 7u;
    const float v = e ? __uint_as_float((e + 120u) << 23 | m << 20) : (float)m * 0x1p-9f;
    return (code & 0x7fu) == 0x7fu ? __uint_as_float(0x7fc00000u) : code & 0x80u ? -v : v;
}

TD_DEV float quant_scale(float largest)
{
    return fmaxf(largest / 448.f, 0x1p-126f);
}

TD_DEV float largest_of(float4 v)
{
    return fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
}

/* The same in every lane. */
TD_DEV float warp_max(float v)
{
    for (int o = 16; o > 0; o >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, o));
    return v;
}

TD_DEV float block_max(float v)
{
    __shared__ float part[N / 32];
    v = warp_max(v);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
    __syncthreads();
    return warp_max(part[threadIdx.x % (N / 32)]);
}

/* ---- what a row is made of ---- */

struct row_f32 {
    const float *x;
    size_t ld;
    TD_DEV void open(int t, int) { x += (size_t)t * ld; }
    TD_DEV float4 at(int g) const { return td_load4<true>(x, g, 0); }
};

template <class T> struct row_16 {
    const T *x;
    size_t ld;
    TD_DEV void open(int t, int) { x += (size_t)t * ld; }
    TD_DEV float4 at(int g) const
    {
        const T *p = x + 4 * g;
        return make_float4(td_get(p), td_get(p + 1), td_get(p + 2), td_get(p + 3));
    }
};

/* The sums and products of rmsnorm_row for 256 threads. */
struct row_norm {
    const float *x;
    size_t ld;
    const float *w;
    float eps, scale;
    TD_DEV void open(int t, int K)
    {
        x += (size_t)t * ld;
        float sum = 0.f;
        for (int g = (int)threadIdx.x; g < K / 4; g += N) {
            const float4 v = td_load4<true>(x, g, 0);
            sum = fmaf(v.x, v.x, sum);
            sum = fmaf(v.y, v.y, sum);
            sum = fmaf(v.z, v.z, sum);
            sum = fmaf(v.w, v.w, sum);
        }
        scale = 1.0f / sqrtf(td_block_sum<N>(sum) / (float)K + eps);
    }
    TD_DEV float4 at(int g) const
    {
        const float4 v = td_load4<true>(x, g, 0), k = td_load4<true>(w, g, 0);
        return make_float4(v.x * scale * k.x, v.y * scale * k.y, v.z * scale * k.z, v.w * scale * k.w);
    }
};

template <td_act ACT> struct row_act {
    const float *x;
    size_t ld;
    int F;
    TD_DEV void open(int t, int) { x += (size_t)t * ld; }
    TD_DEV float4 at(int g) const
    {
        const float4 a = td_load4<true>(x, g, 0), b = td_load4<true>(x + F, g, 0);
        return make_float4(td_act_of<ACT>(a.x) * b.x, td_act_of<ACT>(a.y) * b.y, td_act_of<ACT>(a.z) * b.z,
                           td_act_of<ACT>(a.w) * b.w);
    }
};

/* ---- the kernel ---- */

TD_DEV void store_codes(uint8_t *row, int g, float4 v, float scale)
{
    reinterpret_cast<uint32_t *>(row)[g] = quant_code(v.x / scale) | quant_code(v.y / scale) << 8 |
                                           quant_code(v.z / scale) << 16 | quant_code(v.w / scale) << 24;
}

/* 6 blocks an SM: for the 8 of 32 registers the compiler spills. */
// limits: regs 40, spill 0, smem 64
template <bool GROUPS, class ROW>
static __global__ void __launch_bounds__(N, 6) quant_rows(ROW row, const td_cuda_codes to)
{
    td_grid_launch();
    td_grid_wait();
    const int t = (int)blockIdx.x, groups = to.K / 4;
    uint8_t *code = to.code + (size_t)t * to.ld;
    row.open(t, to.K);
    float scale = 0.f;
    if (!GROUPS) {
        float largest = 0.f;
        for (int g = (int)threadIdx.x; g < groups; g += N) largest = fmaxf(largest, largest_of(row.at(g)));
        scale = quant_scale(block_max(largest));
        if (threadIdx.x == 0) to.scale[t] = scale;
    }
    for (int g = (int)threadIdx.x; g < groups; g += N) { /* with groups whole warps: K is a multiple of 128 */
        const float4 v = row.at(g);
        if (GROUPS) {
            scale = quant_scale(warp_max(largest_of(v)));
            if (threadIdx.x % 32 == 0) to.scale[td_cuda_code_scale_at(to.T, to.K, 128, t, g / 32)] = scale;
        }
        store_codes(code, g, v, scale);
    }
}

bool takes(const td_cuda_codes *to)
{
    return to->K > 0 && to->K % (to->group ? 128 : 16) == 0 && (to->group == 0 || to->group == 128) &&
           td_host_aligned16(to->code, to->ld) && td_host_aligned16(to->scale, 0);
}

template <class ROW> int quant(td_stream s, const ROW &row, const td_cuda_codes *to)
{
    if (to->T <= 0) return 0;
    if (!takes(to)) return (int)cudaErrorInvalidValue;
    return (int)td_launch_next(to->group ? quant_rows<true, ROW> : quant_rows<false, ROW>,
                               dim3((unsigned)to->T), dim3(N), 0, (cudaStream_t)s, row, *to);
}

// limits: regs 32, spill 0, smem 0
static __global__ void __launch_bounds__(N)
    dequant_rows(const td_cuda_codes from, int t0, uint16_t *out, size_t ldo)
{
    td_grid_launch();
    td_grid_wait();
    const int t = t0 + (int)blockIdx.x, k = (int)(blockIdx.y * N + threadIdx.x);
    if (k >= from.K) return;
    const float v = quant_value(from.code[(size_t)t * from.ld + (size_t)k]) *
                    from.scale[td_cuda_code_scale_at(from.T, from.K, from.group, t, k / 128)];
    out[(size_t)blockIdx.x * ldo + (size_t)k] = __bfloat16_as_ushort(__float2bfloat16_rn(v));
}
} // namespace

extern "C" int td_cuda_quant(td_stream s, const void *x, td_dtype dtype, size_t ldx, const td_cuda_codes *to)
{
    if (!td_host_aligned16(x, ldx * td_dtype_bytes(dtype))) return (int)cudaErrorInvalidValue;
    if (dtype == TD_F32) return quant(s, row_f32{(const float *)x, ldx}, to);
    if (dtype == TD_BF16) return quant(s, row_16<__nv_bfloat16>{(const __nv_bfloat16 *)x, ldx}, to);
    if (dtype == TD_F16) return quant(s, row_16<__half>{(const __half *)x, ldx}, to);
    return (int)cudaErrorInvalidValue;
}

extern "C" int td_cuda_rmsnorm_quant(td_stream s, const float *x, size_t ldx, const float *w, float eps,
                                     const td_cuda_codes *to)
{
    if (!td_host_aligned16(x, ldx * 4) || !td_host_aligned16(w, 0)) return (int)cudaErrorInvalidValue;
    return quant(s, row_norm{x, ldx, w, eps, 0.f}, to);
}

extern "C" int td_cuda_act_quant(td_stream s, td_act act, const float *x, size_t ldx, const td_cuda_codes *to)
{
    if (!td_host_aligned16(x, ldx * 4)) return (int)cudaErrorInvalidValue;
    switch (act) {
    case TD_ACT_SILU:
        return quant(s, row_act<TD_ACT_SILU>{x, ldx, to->K}, to);
    case TD_ACT_GELU:
        return quant(s, row_act<TD_ACT_GELU>{x, ldx, to->K}, to);
    case TD_ACT_GELU_TANH:
        return quant(s, row_act<TD_ACT_GELU_TANH>{x, ldx, to->K}, to);
    }
    return (int)cudaErrorInvalidValue;
}

extern "C" int td_cuda_dequant(td_stream s, const td_cuda_codes *from, int t0, uint16_t *out, size_t ldo)
{
    if (t0 >= from->T) return 0;
    return (int)td_launch_next(dequant_rows, dim3((unsigned)(from->T - t0), (unsigned)(from->K + N - 1) / N),
                               dim3(N), 0, (cudaStream_t)s, *from, t0, out, ldo);
}
