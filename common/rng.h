/* common/rng.h - stateless randomness: Philox4x32-10 and the exponential race built on it.
 *
 * Noise for a token is a pure function of (seed, absolute position, stream, token id): nothing to rewind,
 * ship or lose.
 *   key = seed, counter = (token_id/4, position, stream, 0), lane = token_id % 4; 
 *   stream = choice << 8 | purpose.
 *   u = (x + 0.5) * 2^-32, E = -log1p(-u); the sample is argmax(logit - log E), ties to the lower id.
 * u is float(x) (round to nearest), one fma with 2^-32 and 2^-33, at most 1 - 2^-24. td_log and td_log1p are
 * our own f32 FMA polynomials: a sequence of exactly rounded f32 operations, so that every CPU and GPU gets
 * the same bits.
 * Source: Salmon et al., Parallel Random Numbers (SC 2011); algorithms notes 13.4. Threads: any (pure). */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_COMMON_RNG_H
#define TD_COMMON_RNG_H

#include <stdbool.h>
#include <stdint.h>

enum { TD_RNG_SAMPLE = 0, TD_RNG_ACCEPT = 1, TD_RNG_RESIDUAL = 2, TD_RNG_DRAFT = 3 };

void td_philox4x32(const uint32_t ctr[4], const uint32_t key[2], uint32_t out[4]);
/* -log(E) for tokens 4*block .. 4*block+3: what is added to a logit before the argmax. */
void td_gumbel4(uint64_t seed, uint32_t position, uint32_t stream, uint32_t block, float out[4]);
/* The same bits for tokens id0 .. id0+n-1 (any id0): 3 to 4 ns a token with AVX-512, 5 with AVX2. */
void td_gumbel_row(uint64_t seed, uint32_t position, uint32_t stream, uint32_t id0, uint32_t n, float *out);
/* The same by a named path, for tests: 0 scalar, 1 AVX2, 2 AVX-512; false if this machine has it not. */
bool td_gumbel_row_path(int path, uint64_t seed, uint32_t position, uint32_t stream, uint32_t id0, uint32_t n,
                        float *out);
float td_uniform_f32(uint32_t x); /* the u above, in [2^-33, 1 - 2^-24] */
float td_log_f32(float x);    /* x > 0, normal; error <= 2 ulp */
float td_log1p_f32(float x);  /* x in (-1, 0]; error <= 4 ulp */

#endif
