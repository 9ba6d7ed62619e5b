/* kernels/sample_scan.h - passes over a row of logits for sample_tile.h, compiled with it: maxima, copies, masses,
 * the largest few. Loops of LANES lanes that the compiler turns into vectors. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_KERNELS_SAMPLE_SCAN_H
#define TD_KERNELS_SAMPLE_SCAN_H

#include "kernels/ops.h"
#include "kernels/sample_math.h"

enum { LANES = 16, CHUNK = 64 };

/* Largest value, NaN ignored; -inf when there is none. */
static float scan_max(const float *x, int n)
{
    float m[LANES], best = -INFINITY;
    for (int j = 0; j < LANES; j++) m[j] = -INFINITY;
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) m[j] = x[i + j] > m[j] ? x[i + j] : m[j];
    for (int j = 0; i + j < n; j++) m[j] = x[i + j] > m[j] ? x[i + j] : m[j];
    for (int j = 0; j < LANES; j++) best = m[j] > best ? m[j] : best;
    return best;
}

static int scan_find(const float *x, int n, float value)
{
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        int any = 0;
        for (int j = 0; j < LANES; j++) any |= x[i + j] == value;
        if (any) break;
    }
    for (; i < n; i++)
        if (x[i] == value) return i;
    return -1;
}

/* out may be x. */
static void scan_copy(float *out, const float *x, int n)
{
    for (int i = 0; i < n; i++) out[i] = canonical(x[i]);
}

static void scan_divide(float *x, int n, float t)
{
    for (int i = 0; i < n; i++) x[i] = x[i] / t + 0.0f; /* no -0: see canonical */
}

/* A mass in units of 2^-44, to nearest even, plus MASS_ZERO: the bits of e + 256, whose last place that is.
 */
#define MASS_ZERO UINT64_C(0x4070000000000000)
static inline uint64_t mass_bits(float e)
{
    double d = (double)e + 256.0;
    uint64_t u;
    memcpy(&u, &d, 8);
    return u;
}
static inline uint64_t mass_of(float e)
{
    return mass_bits(e) - MASS_ZERO;
}

/* The sum of the masses of exp(x - max), NaN left out. */
static uint64_t scan_mass(const float *x, int n, float max)
{
    uint64_t s[LANES] = {0}, sum = 0;
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        float e[LANES];
        for (int j = 0; j < LANES; j++) e[j] = exp_neg(x[i + j] - max);
        for (int j = 0; j < LANES; j++) s[j] += mass_bits(e[j]);
    }
    for (int j = 0; i + j < n; j++) s[j] += mass_bits(exp_neg(x[i + j] - max));
    for (int j = 0; j < LANES; j++) sum += s[j];
    return sum - (uint64_t)n * MASS_ZERO; /* modulo 2^64, and the sum of the masses is below that */
}

/* ---- log probabilities of the raw logits ---- */

/* Into a list of `have` of at most n, descending, ties to the lower id; the last one falls out of a full
 * list. */
static int insert(td_top *top, int have, int n, td_top t)
{
    int at = have;
    while (at > 0 &&
           (t.logprob > top[at - 1].logprob || (t.logprob == top[at - 1].logprob && t.id < top[at - 1].id))) {
        if (at < n) top[at] = top[at - 1];
        at--;
    }
    if (at < n) top[at] = t;
    return have < n ? have + 1 : n;
}

/* The n largest, descending. The list is short: insertion behind a threshold. */
static int top_n(const float *x, int V, int n, td_top *top)
{
    int have = 0;
    for (int i0 = 0; i0 < V && n > 0; i0 += CHUNK) {
        int c = V - i0 < CHUNK ? V - i0 : CHUNK;
        if (have == n && !(scan_max(x + i0, c) > top[n - 1].logprob)) continue;
        for (int i = i0; i < i0 + c; i++) {
            if (x[i] != x[i] || (have == n && !(x[i] > top[n - 1].logprob))) continue;
            have = insert(top, have, n, (td_top){(uint32_t)i, x[i]});
        }
    }
    return have;
}

#endif
