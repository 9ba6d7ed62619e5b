/* kernels/cuda_quant.h - activations as FP8 codes (E4M3) with scales, for products whose weights are FP8 too.
 *
 *   x[t][k] is about code[t][k] * scale;   scale = largest magnitude of the group / 448, at least 2^-126
 *
 * Groups:  group 0: a row has one scale, scale[t]. group 128: 128 columns of a row share one, and rows are in two
 *          parts, because cuBLASLt takes multiples of four: T4 = T / 4 * 4 rows, then the rest, each part
 *          [K / 128][its rows]: td_cuda_code_scale_at.
 * Rules:   1. Rounding is to nearest even, magnitudes over 448 (the division rounds, too) become 448: the codes
 *             are those of td_f32_to_e4m3. A NaN is a NaN code; a group with an infinity has an infinite scale and
 *             NaN or zero codes: its row of the product is NaN, no other.
 *          2. A row's codes depend on nothing but the row. What is fused (norm, activation) rounds to f32 where the
 *             operation by itself does, and skips the operand's bf16.
 *          3. Every code and scale is written. x is 16-byte aligned, as its rows; K a multiple of 16, of 128 with
 *             groups.
 * Errors, threads, streams: as cuda.h. Source: Llama 3 herd, 6.2 (rows); DeepSeek-V3, 3.3 (1 x 128). */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_KERNELS_CUDA_QUANT_H
#define TD_KERNELS_CUDA_QUANT_H

#include "kernels/cuda.h"

#ifdef __CUDACC__
#define TD_QUANT_INLINE static inline __host__ __device__
#else
#define TD_QUANT_INLINE static inline
#endif
#ifdef __cplusplus
extern "C" {
#endif

typedef struct td_cuda_codes {
    uint8_t *code; /* [T, K] on the device, 16-byte aligned, as its rows */
    size_t ld;
    float *scale; /* td_cuda_code_scales of them, 16-byte aligned */
    int T, K, group;
} td_cuda_codes;

static inline size_t td_cuda_code_scales(int T, int K, int group)
{
    return (size_t)T * (size_t)(group ? K / 128 : 1);
}
/* Of row t and columns 128 b .. 128 b + 127. */
TD_QUANT_INLINE size_t td_cuda_code_scale_at(int T, int K, int group, int t, int b)
{
    const int T4 = T & ~3;
    if (!group) return (size_t)t;
    if (t < T4) return (size_t)b * (size_t)T4 + (size_t)t;
    return (size_t)(K / 128) * (size_t)T4 + (size_t)b * (size_t)(T - T4) + (size_t)(t - T4);
}
/* Codes and scales in one block: the scales are behind T * ld codes. */
static inline td_cuda_codes td_cuda_codes_in(void *block, size_t ld, int T, int K, int group)
{
    td_cuda_codes c = {(uint8_t *)block,
                       ld,
                       (float *)(void *)((uint8_t *)block + ((size_t)T * ld + 255) / 256 * 256),
                       T,
                       K,
                       group};
    return c;
}
static inline size_t td_cuda_codes_bytes(size_t ld, int T, int K, int group)
{
    return ((size_t)T * ld + 255) / 256 * 256 + 4 * td_cuda_code_scales(T, K, group);
}

/* x: f32, bf16 or f16. */
int td_cuda_quant(td_stream s, const void *x, td_dtype dtype, size_t ldx, const td_cuda_codes *to);
/* Of x / sqrt(mean(x^2) + eps) * w, x [T, K]. */
int td_cuda_rmsnorm_quant(td_stream s, const float *x, size_t ldx, const float *w, float eps,
                          const td_cuda_codes *to);
/* Of act(x[t][f]) * x[t][K + f], x [T, 2 K]. */
int td_cuda_act_quant(td_stream s, td_act act, const float *x, size_t ldx, const td_cuda_codes *to);
/* Rows [t0, T) as bf16: code * scale, rounded. */
int td_cuda_dequant(td_stream s, const td_cuda_codes *from, int t0, uint16_t *out, size_t ldo);

#ifdef __cplusplus
}
#endif
#endif
