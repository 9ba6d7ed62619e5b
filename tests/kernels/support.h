/* tests/kernels/support.h - what every kernel test needs: seeded values, aligned blocks, teams of 1 to 3
 * members, families. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_TESTS_KERNELS_SUPPORT_H
#define TD_TESTS_KERNELS_SUPPORT_H

#include "common/check.h"
#include "common/pool.h"
#include "kernels/ops.h"
#include "tests/t.h"
#include <stdint.h>

enum { MAX_TEAM = 3 };

static inline uint32_t rnd_next(uint64_t *s)
{
    *s = *s * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    uint64_t x = *s;
    return (uint32_t)((x ^ (x >> 29)) >> 31);
}
/* Roughly normal, mean 0, deviation `scale`. */
static inline float rnd_float(uint64_t *s, float scale)
{
    float sum = 0;
    for (int i = 0; i < 4; i++) sum += (float)(rnd_next(s) >> 8) * 0x1p-24f - 0.5f;
    return sum * 1.7320508f * scale;
}
static inline void rnd_fill(float *p, size_t n, uint64_t seed, float scale)
{
    for (size_t i = 0; i < n; i++) p[i] = rnd_float(&seed, scale);
}
static inline void *block_alloc(size_t bytes)
{
    void *p = aligned_alloc(64, (bytes + 64) / 64 * 64);
    TD_CHECK(p != NULL);
    memset(p, 0xff, (bytes + 64) / 64 * 64); /* NaN everywhere: what is not written shows */
    return p;
}
static inline float *floats(size_t n) { return block_alloc(n * sizeof(float)); }

static inline td_pool *team(int n)
{
    static td_pool *pools[MAX_TEAM + 1];
    if (!pools[n]) pools[n] = td_pool_open(n);
    return pools[n];
}
static inline bool is_ref(const td_ops *o) { return !strcmp(o->family, "ref"); }
static inline int count_nan(const float *p, size_t n)
{
    int c = 0;
    for (size_t i = 0; i < n; i++) c += p[i] != p[i];
    return c;
}

#endif
