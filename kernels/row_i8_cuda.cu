// SPDX-License-Identifier: Apache-2.0
/* kernels/row_i8_cuda.cu - rows as 8-bit integers with a scale for every 128 of them, and back (row_i8.h), to the byte
 * what row_i8_ref.c makes of them. A warp has a group: each lane every 32nd value. */
#include "kernels/cuda.h"
#include "kernels/row_i8.h"
#include "kernels/td_cuda.h"

namespace
{
enum { GROUP = TD_QUANT_GROUP, WARPS = 4, EACH = GROUP / 32 };

TD_DEV int scales_at(int E)
{
    return (E + 3) / 4 * 4;
}

/* Infinity where some value is not finite. */
TD_DEV float largest_of_group(const float (&v)[EACH])
{
    float most = 0.f;
#pragma unroll
    for (int i = 0; i < EACH; i++) most = fmaxf(most, fabsf(v[i]) < INFINITY ? fabsf(v[i]) : INFINITY);
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, o));
    return most;
}

/* grid: (rows, groups / WARPS) */
// limits: regs 32, spill 0, smem 0
static __global__ void __launch_bounds__(WARPS * 32) to_i8(const float *x, int E, char *out, size_t row_bytes)
{
    const int lane = (int)threadIdx.x % 32, g = (int)blockIdx.y * WARPS + (int)threadIdx.x / 32, at = scales_at(E);
    char *row = out + (size_t)blockIdx.x * row_bytes;
    float v[EACH];
    if (g * GROUP >= E) return; /* the whole warp */
    x += (size_t)blockIdx.x * (size_t)E;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int e = g * GROUP + i * 32 + lane;
        v[i] = e < E ? x[e] : 0.f;
    }
    const float most = largest_of_group(v);
    const float scale = most < INFINITY ? most / 127.f : __uint_as_float(0x7fc00000u);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int e = g * GROUP + i * 32 + lane;
        if (e < at) row[e] = (char)(scale > 0.f ? (int)rintf(fminf(fmaxf(v[i] / scale, -127.f), 127.f)) : 0);
    }
    if (lane == 0) ((float *)(void *)(row + at))[g] = scale;
}

/* grid: (rows, columns / 256) */
// limits: regs 32, spill 0, smem 0
static __global__ void __launch_bounds__(256) of_i8(const char *in, int E, size_t row_bytes, float *x)
{
    const int e = (int)(blockIdx.y * 256 + threadIdx.x);
    const char *row = in + (size_t)blockIdx.x * row_bytes;
    if (e >= E) return;
    const float scale = ((const float *)(const void *)(row + scales_at(E)))[e / GROUP];
    x[(size_t)blockIdx.x * (size_t)E + (size_t)e] = (float)(signed char)row[e] * scale;
}
} // namespace

extern "C" int td_cuda_rows_to_i8(td_stream s, const float *x, int T, int E, void *out)
{
    const int groups = (E + GROUP - 1) / GROUP;
    if (T <= 0 || E <= 0) return 0;
    return td_launch(to_i8, dim3((unsigned)T, (unsigned)((groups + WARPS - 1) / WARPS)), WARPS * 32, 0, (cudaStream_t)s, x, E,
                     (char *)out, td_quant_row_bytes(E));
}

extern "C" int td_cuda_rows_of_i8(td_stream s, const void *in, int T, int E, float *x)
{
    if (T <= 0 || E <= 0) return 0;
    return td_launch(of_i8, dim3((unsigned)T, (unsigned)((E + 255) / 256)), 256, 0, (cudaStream_t)s, (const char *)in, E,
                     td_quant_row_bytes(E), x);
}
