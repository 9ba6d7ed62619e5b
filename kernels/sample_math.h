/* kernels/sample_math.h - values of token choice that no backend may have otherwise, one text for host and devices
 * (sample_tile.h, sample_cuda_tile.h): order-preserving keys, exp. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_KERNELS_SAMPLE_MATH_H
#define TD_KERNELS_SAMPLE_MATH_H

#include "common/both.h"
#include <math.h>

/* NaN becomes -inf, -0 becomes +0: afterwards equal values have equal keys. */
TD_BOTH float canonical(float v)
{
    return v == v ? v + 0.0f : -INFINITY;
}

/* Descending keys are descending values. */
TD_BOTH uint32_t key_of(float x)
{
    const uint32_t u = td_bits_of_float(x);
    return u ^ (u >> 31 ? UINT32_C(0xffffffff) : UINT32_C(0x80000000));
}

TD_BOTH float value_of(uint32_t key)
{
    return td_float_of_bits(key ^ (key >> 31 ? UINT32_C(0x80000000) : UINT32_C(0xffffffff)));
}

/* exp(x), x <= 0: two-constant reduction and a polynomial, no fma (so that every instruction set rounds
 * alike); 1e-7 relative. */
TD_BOTH float exp_neg(float x)
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
    const float scale = td_float_of_bits((uint32_t)((int32_t)n + 127) << 23);
    return x >= -87.0f ? p * scale : 0.0f; /* false for NaN too */
}

#endif
