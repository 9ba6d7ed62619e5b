// SPDX-License-Identifier: Apache-2.0
/* Random123's known answers; bounds of the logarithms against double; rows equal blocks bit for bit; the race's distribution. */
#include "tests/t.h"
#include "common/check.h"
#include "common/rng.h"

static void test_philox(void)
{
    static const struct { uint32_t ctr[4], key[2], out[4]; } kat[] = {
        {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (size_t i = 0; i < TD_COUNT(kat); i++) {
        uint32_t out[4];
        td_philox4x32(kat[i].ctr, kat[i].key, out);
        T_OK(!memcmp(out, kat[i].out, sizeof out), "vector %zu", i);
    }
}

static double ulps(float got, double want)
{
    float f = fabsf((float)want);
    return fabs((double)got - want) / (double)(nextafterf(f, INFINITY) - f);
}

static void test_log(void)
{
    double worst = 0, worst1 = 0;
    for (uint32_t b = 0x00800000; b < 0x7f800000; b += 1009) {
        float x;
        memcpy(&x, &b, 4);
        if (x != 1) worst = fmax(worst, ulps(td_log_f32(x), log((double)x)));
    }
    for (uint32_t b = 0x3f000000; b < 0x40000000; b += 61) { /* around 1, where cancellation would show */
        float x;
        memcpy(&x, &b, 4);
        if (x != 1) worst = fmax(worst, ulps(td_log_f32(x), log((double)x)));
    }
    for (uint32_t b = 0x2e800000; b < 0x3f800000; b += 101) {
        float x;
        memcpy(&x, &b, 4);
        worst1 = fmax(worst1, ulps(td_log1p_f32(-x), log1p(-(double)x)));
    }
    T_OK(worst <= 2 && worst > 0, "log: %g ulp", worst);
    T_OK(worst1 <= 4 && worst1 > 0, "log1p: %g ulp", worst1);
    T_OK(td_log_f32(1.0f) == 0 && td_log1p_f32(0.0f) == 0);
    T_OK(td_uniform_f32(0) == 0x1p-33f && td_uniform_f32(~0u) == 1 - 0x1p-24f && td_uniform_f32(1u << 31) == 0.5f);
    T_OK(isfinite(td_log1p_f32(-td_uniform_f32(~0u))));
    int bad = 0; /* the vector path converts in halves: any rounding difference would show here */
    for (uint32_t i = 0; i < 1000000; i++) {
        uint32_t x = i * 4294967u;
        float u = fmaf((float)x, 0x1p-32f, 0x1p-33f);
        bad += td_uniform_f32(x) != (u < 1 - 0x1p-24f ? u : 1 - 0x1p-24f);
    }
    T_EQ(bad, 0);
}

static void test_row(void)
{
    enum { N = 4000 };
    static float row[N + 8], scalar[N + 8];
    static const uint64_t seeds[] = {0, 1, 0xdeadbeefcafef00d, UINT64_MAX};
    for (int s = 0; s < 4; s++)
        for (uint32_t id0 = 0; id0 < 9; id0++)
            for (uint32_t n = 0; n < N; n = n * 2 + 1) {
                uint32_t position = 77 * id0, stream = (3 << 8) | TD_RNG_DRAFT;
                scalar[n] = 42;
                T_OK(td_gumbel_row_path(0, seeds[s], position, stream, id0 + 1000, n, scalar));
                for (int path = 1; path <= 3; path++) { /* 3: the one chosen for this machine */
                    row[n] = 42;
                    if (path == 3) td_gumbel_row(seeds[s], position, stream, id0 + 1000, n, row);
                    else if (!td_gumbel_row_path(path, seeds[s], position, stream, id0 + 1000, n, row)) continue;
                    T_OK(!memcmp(row, scalar, n * sizeof *row) && row[n] == 42 && scalar[n] == 42,
                         "path %d seed %d id0 %u n %u", path, s, id0, n);
                }
                for (uint32_t i = 0; i < n; i += 13) {
                    float g[4];
                    td_gumbel4(seeds[s], 77 * id0, (3 << 8) | TD_RNG_DRAFT, (id0 + 1000 + i) / 4, g);
                    T_OK(!memcmp(&g[(id0 + 1000 + i) % 4], &row[i], 4));
                }
            }
    float a[4], b[4];
    td_gumbel4(1, 2, 3, 4, a);
    td_gumbel4(1, 3, 2, 4, b);
    T_OK(memcmp(a, b, sizeof a), "position and stream are different words");
    td_gumbel4(1ull << 32, 2, 3, 4, b);
    T_OK(memcmp(a, b, sizeof a), "both halves of the seed count");
}

/* Pinned: a change of these bits would change what every user was given for a seed. */
static void test_pinned(void)
{
    static const uint32_t want[4] = {0xbede7f72, 0xbd93191b, 0x3f748f62, 0xbf33e8e8};
    float g[4];
    td_gumbel4(42, 7, 0, 123, g);
    for (int i = 0; i < 4; i++) {
        uint32_t b;
        memcpy(&b, &g[i], 4);
        T_OK(b == want[i], "lane %d: 0x%08x", i, b);
    }
}

/* argmax(logit + noise) must follow softmax(logit): chi-square over 64 tokens, 63 degrees: 99.99 % is below 112. */
static void test_distribution(void)
{
    enum { V = 64, N = 100000 };
    double p[V], sum = 0, chi = 0;
    float logit[V], g[V];
    static int count[V];
    for (int i = 0; i < V; i++) {
        logit[i] = (float)(i % 16) * 0.2f - (float)(i / 16);
        sum += p[i] = exp((double)logit[i]);
    }
    for (uint32_t pos = 0; pos < N; pos++) {
        td_gumbel_row(99, pos, 0, 0, V, g);
        int best = 0;
        for (int i = 1; i < V; i++)
            if (logit[i] + g[i] > logit[best] + g[best]) best = i;
        count[best]++;
    }
    for (int i = 0; i < V; i++) {
        double e = N * p[i] / sum;
        chi += (count[i] - e) * (count[i] - e) / e;
    }
    T_OK(chi < 112 && chi > 25, "chi-square %g", chi);
}

int main(void)
{
    test_philox();
    test_log();
    test_row();
    test_pinned();
    test_distribution();
    return T_DONE();
}
