// SPDX-License-Identifier: Apache-2.0
/* The two limits that benchmarks divide by, and the choice of a family that stands on one of them. */
#include "kernels/peak.h"
#include "tests/kernels/support.h"

static void reads(void)
{
    enum { N = 1 << 16 };
    uint8_t *p = block_alloc(N);
    uint64_t s = 1, all = td_peak_read(p, N, false);
    for (size_t i = 0; i < N; i++) p[i] = (uint8_t)rnd_next(&s);
    T_OK(td_peak_read(p, N, false) != all, "what is read makes the digest");
    all = td_peak_read(p, N, false);
    T_OK(td_peak_read(p, N, true) == all, "fetching ahead reads the same");
    int seen = 0;
    for (size_t i = 0; i < N; i += 64) { /* every line, by a bit that no load may miss */
        p[i] ^= 1;
        seen += td_peak_read(p, N, false) != all && td_peak_read(p, N, true) != all;
        p[i] ^= 1;
    }
    T_OK(seen == N / 64, "%d of %d lines are read", seen, N / 64);
    free(p);
}

int main(void)
{
    reads();
    const td_ops *o, *best;
    double least = 0;
    for (int f = 0; (o = td_ops_family(f)); f++) {
        double one = td_peak_multiply(o->family, 1000), two = td_peak_multiply(o->family, 2000);
        T_OK(one > 0 && two == 2 * one, "%s: operations follow the steps (%.0f, %.0f)", o->family, one, two);
        T_OK(one > least, "%s: wider than the family before it", o->family);
        least = one;
    }
    T_OK(td_peak_multiply("nonsense", 1000) == 0, "no such family");
    T_EQ(td_ops_open("auto", &best), TD_OK);
    for (int f = 0; (o = td_ops_family(f)); f++)
        T_OK(!strcmp(o->numerics, best->numerics) || td_ops_family(f + 1),
             "the choice of %s leaves the arithmetic what %s, the last, has", best->family, o->family);
    return T_DONE();
}
