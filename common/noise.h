/* common/noise.h - the noise of one token (the law is in rng.h), one text for host and devices: rng.c, whose vector
 * paths have these bits, and kernels/sample_cuda_tile.h. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_COMMON_NOISE_H
#define TD_COMMON_NOISE_H

#include "common/both.h"
#include <math.h>

/* Philox4x32: multipliers and Weyl constants of the paper's section 4.3. */
#define TD_PHILOX_M0 0xD2511F53u
#define TD_PHILOX_M1 0xCD9E8D57u
#define TD_PHILOX_W0 0x9E3779B9u
#define TD_PHILOX_W1 0xBB67AE85u
enum { TD_PHILOX_ROUNDS = 10 };

/* log(1+f) = f + f^2 (-1/2 + f P(f)) for f in [sqrt(1/2)-1, sqrt(2)-1]: minimax of the relative error (0.013
 * ulp before rounding), P's first and further coefficients, highest power first. log(2) is split so that e * LN2_HI
 * is exact for |e| < 2^8. */
#define TD_LN2_HI 0x1.62e4p-1f
#define TD_LN2_LO 0x1.7f7d1cp-20f
#define TD_SQRT_HALF_BITS 0x3f3504f3
#define TD_LOG_P0 0x1.1462f2p-4f
#define TD_LOG_P(X)                                                                                        \
    X(-0x1.de4f98p-4f)                                                                                     \
    X(0x1.e6f610p-4f)                                                                                      \
    X(-0x1.fc1f6ep-4f)                                                                                     \
    X(0x1.2336e2p-3f)                                                                                      \
    X(-0x1.555c5ap-3f) X(0x1.99a4bcp-3f) X(-0x1.000006p-2f) X(0x1.555548p-2f)
#define TD_UNIFORM_MAX 0x1.fffffep-1f
/* No token's noise is above: -log(2^-33) = 22.88. */
#define TD_NOISE_MAX 23.0f

TD_BOTH float td_noise_log_of(float f, float e)
{
    float p = TD_LOG_P0;
#define X(c) p = fmaf(p, f, c);
    TD_LOG_P(X)
#undef X
    const float q = f * f * fmaf(p, f, -0.5f);
    return e * TD_LN2_HI + (f + fmaf(e, TD_LN2_LO, q));
}

/* x = 2^e (1+f) with 1+f in [sqrt(1/2), sqrt(2)). */
TD_BOTH int32_t td_noise_exponent(float x)
{
    return (int32_t)(td_bits_of_float(x) - TD_SQRT_HALF_BITS) >> 23;
}

TD_BOTH float td_noise_log(float x)
{
    const int32_t e = td_noise_exponent(x);
    return td_noise_log_of(td_float_of_bits(td_bits_of_float(x) - ((uint32_t)e << 23)) - 1.0f, (float)e);
}

/* The rounded 1+x only chooses e; f = 2^-e (1+x) - 1 is rounded once, so nothing is lost for small x. */
TD_BOTH float td_noise_log1p(float x)
{
    const int32_t e = td_noise_exponent(1.0f + x);
    const float scale = td_float_of_bits((uint32_t)(127 - e) << 23);
    return td_noise_log_of(fmaf(x, scale, scale - 1.0f), (float)e);
}

TD_BOTH float td_noise_uniform(uint32_t x)
{
    const float u = fmaf((float)x, 0x1p-32f, 0x1p-33f);
    return u < TD_UNIFORM_MAX ? u : TD_UNIFORM_MAX;
}

TD_BOTH float td_noise_gumbel(uint32_t x)
{
    return -td_noise_log(-td_noise_log1p(-td_noise_uniform(x)));
}

TD_BOTH void td_noise_philox(const uint32_t ctr[4], const uint32_t key[2], uint32_t out[4])
{
    uint32_t a = ctr[0], b = ctr[1], c = ctr[2], d = ctr[3], k0 = key[0], k1 = key[1];
    for (int r = 0; r < TD_PHILOX_ROUNDS; r++) {
        const uint64_t p = (uint64_t)TD_PHILOX_M0 * a, q = (uint64_t)TD_PHILOX_M1 * c;
        a = (uint32_t)(q >> 32) ^ b ^ k0;
        c = (uint32_t)(p >> 32) ^ d ^ k1;
        b = (uint32_t)q;
        d = (uint32_t)p;
        k0 += TD_PHILOX_W0;
        k1 += TD_PHILOX_W1;
    }
    out[0] = a;
    out[1] = b;
    out[2] = c;
    out[3] = d;
}

/* Of the four tokens of a block: what becomes their noise. */
TD_BOTH void td_noise_block(uint64_t seed, uint32_t position, uint32_t stream, uint32_t block, uint32_t out[4])
{
    const uint32_t ctr[4] = {block, position, stream, 0}, key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    td_noise_philox(ctr, key, out);
}

#endif
