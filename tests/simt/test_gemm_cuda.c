// SPDX-License-Identifier: Apache-2.0
/* tests/simt/test_gemm_cuda.c - kernels/cuda_gemm.h: against double, and every kernel, batch, position, input
 * type and cut into ranks against one row computed alone, bit for bit. */
#include "kernels/cuda_gemm.h"
#include "tests/simt/support.h"
#include <math.h>

typedef struct gemm_case {
    int N, K, slices;
    td_cuda_wtype type;
    bool bias;
    int scale_rows; /* 0: 128 */
} gemm_case;

static const gemm_case cases[] = {
    {1, 1, 0, TD_CUDA_W_BF16, false, 0},
    {40, 72, 0, TD_CUDA_W_BF16, true, 0},
    {33, 130, 1, TD_CUDA_W_F16, true, 0},
    {130, 520, 0, TD_CUDA_W_BF16, true, 0},
    {150, 1056, 0, TD_CUDA_W_F16, false, 0},
    {37, 2112, 0, TD_CUDA_W_BF16, false, 0},
    {70, 144, 8, TD_CUDA_W_BF16, false, 0},
    {144, 320, 4, TD_CUDA_W_BF16, true, 0},
    {50, 68, 2, TD_CUDA_W_F16, true, 0},
    {96, 200, 0, TD_CUDA_W_E4M3_ROW, true, 0},
    {33, 576, 8, TD_CUDA_W_E4M3_ROW, false, 0},
    {140, 328, 0, TD_CUDA_W_E4M3_BLOCK, true, 0},
    {150, 1024, 4, TD_CUDA_W_E4M3_BLOCK, false, 0},
    {40, 1100, 0, TD_CUDA_W_E4M3_BLOCK, true, 0},
    {150, 300, 0, TD_CUDA_W_E4M3_BLOCK, false, 64},
    {140, 328, 0, TD_CUDA_W_E4M3_BLOCK, true, 16},
    {140, 768, 8, TD_CUDA_W_E4M3_BLOCK, true, 32}, /* slices of 96: a scale for every 32 columns */
    {40, 512, 8, TD_CUDA_W_E4M3_BLOCK, false, 0},  /* of 64 */
};
enum { MAX_ROWS = 140 };

static bool fp8(td_cuda_wtype t)
{
    return t >= TD_CUDA_W_E4M3_ROW;
}

static double e4m3(uint8_t c)
{
    int e = c >> 3 & 15, m = c & 7;
    double v = e ? ldexp(1 + m / 8.0, e - 7) : ldexp(m / 8.0, -6);
    return c & 0x80 ? -v : v;
}

/* One weight on the host (f32 and as stored) and on the device. */
typedef struct weight {
    gemm_case c;
    double *value; /* [N, K], scaled */
    void *raw;     /* row-major elements */
    float *bias, *scale;
    td_cuda_weight dev;
} weight;

static void weight_make(weight *w, const gemm_case *c, uint64_t seed)
{
    size_t n = (size_t)c->N * (size_t)c->K;
    int block = c->scale_rows ? c->scale_rows : 128;
    int sr = c->type == TD_CUDA_W_E4M3_BLOCK ? (c->N + block - 1) / block : c->N,
        sc = c->type == TD_CUDA_W_E4M3_BLOCK ? (c->K + 127) / 128 : 1;
    *w = (weight){
        .c = *c, .value = block_alloc(n * 8), .raw = block_alloc(n * 4), .bias = floats((size_t)c->N)};
    w->scale = floats((size_t)(sr * sc));
    for (int i = 0; i < sr * sc; i++) w->scale[i] = 0.01f + 0.02f * (float)(rnd_next(&seed) % 1000) / 1000;
    rnd_fill(w->bias, (size_t)c->N, seed + 1, 1);
    for (size_t i = 0; i < n; i++) {
        if (fp8(c->type)) {
            uint8_t v = (uint8_t)(rnd_next(&seed) >> 8);
            if ((v & 0x7f) == 0x7f) v ^= 1;
            ((uint8_t *)w->raw)[i] = v;
            size_t row = i / (size_t)c->K, col = i % (size_t)c->K;
            size_t at = c->type == TD_CUDA_W_E4M3_BLOCK ? row / (size_t)block * (size_t)sc + col / 128 : row;
            w->value[i] = e4m3(v) * (double)w->scale[at];
        } else {
            float f = rnd_float(&seed, 0.5f);
            uint16_t u = c->type == TD_CUDA_W_F16 ? td_f32_to_f16(f) : td_f32_to_bf16(f);
            ((uint16_t *)w->raw)[i] = u;
            w->value[i] = (double)(c->type == TD_CUDA_W_F16 ? td_f16_to_f32(u) : td_bf16_to_f32(u));
        }
    }
    T_OK(!td_cuda_gemm_refuses(c->N, c->K, c->slices, c->type));
    size_t bytes = td_cuda_gemm_packed_bytes(c->N, c->K, c->slices, c->type);
    void *packed = block_alloc(bytes), *again = block_alloc(bytes), *p = dev_new(bytes);
    int half = c->N / 2 / 16 * 16;
    td_dtype from = c->type == TD_CUDA_W_F16 ? TD_F16 : TD_BF16;
    td_cuda_gemm_pack_host(packed, w->raw, from, c->N, c->K, c->slices, c->type, 0, half);
    td_cuda_gemm_pack_host(packed, w->raw, from, c->N, c->K, c->slices, c->type, half, c->N);
    void *raw = dev_put(w->raw, n * (fp8(c->type) ? 1 : 2));
    T_EQ(td_cuda_gemm_pack(dev()->stream[0], p, raw, c->N, c->K, c->slices, c->type, half, c->N), 0);
    T_EQ(td_cuda_gemm_pack(dev()->stream[0], p, raw, c->N, c->K, c->slices, c->type, 0, half), 0);
    T_OK(dev_get(again, p, bytes));
    T_OK(!memcmp(packed, again, bytes), "packed on the host and on the device");
    w->dev = (td_cuda_weight){
        .N = c->N, .K = c->K, .slices = c->slices, .type = c->type, .p = p, .scale_rows = c->scale_rows};
    if (c->bias) w->dev.bias = dev_put(w->bias, (size_t)c->N * 4);
    if (fp8(c->type)) w->dev.scale = dev_put(w->scale, (size_t)(sr * sc) * 4);
    free(packed);
    free(again);
}
static void weight_free(weight *w)
{
    free(w->value);
    free(w->raw);
    free(w->bias);
    free(w->scale);
}

static void *workspace(int T, int N, int K)
{
    void *ws = dev_new(td_cuda_gemm_ws_bytes(T, N, K));
    TD_CHECK(dev()->fill(dev(), TD_STREAM_COMPUTE, ws, 0, TD_CUDA_GEMM_COUNTERS * 4) == TD_OK);
    return ws;
}

/* How x goes in: f32 with an aligned leading dimension, f32 with an odd one, the operand type. */
typedef enum { X_F32, X_ODD, X_OP, X_KINDS } x_kind;

static bool run(const weight *w, const float *x, int T, x_kind kind, int kernel, void *ws, const float *y0,
                float *y)
{
    int K = w->c.K, ld = kind == X_ODD ? K + 1 + K % 2 : (K + 7) / 8 * 8;
    bool f16 = w->c.type == TD_CUDA_W_F16;
    size_t n = (size_t)T * (size_t)ld;
    float *host = floats(n);
    uint16_t *half = block_alloc(n * 2);
    for (int t = 0; t < T; t++)
        for (int k = 0; k < K; k++) {
            float v = x[(size_t)t * (size_t)K + (size_t)k];
            host[(size_t)t * (size_t)ld + (size_t)k] = v;
            half[(size_t)t * (size_t)ld + (size_t)k] = f16 ? td_f32_to_f16(v) : td_f32_to_bf16(v);
        }
    void *dx = kind == X_OP ? dev_put(half, n * 2) : dev_put(host, n * 4);
    size_t bytes = (size_t)T * (size_t)w->c.N * 4;
    float *dy = y0 ? dev_put(y0, bytes) : dev_new(bytes);
    td_cuda_gemm_args a = {&w->dev,        dx,         kind != X_OP, (size_t)ld, T, dy,
                           (size_t)w->c.N, y0 != NULL, ws,           kernel};
    int e = td_cuda_gemm(dev()->stream[0], &a);
    bool ok = e == 0 && dev_get(y, dy, bytes);
    free(host);
    free(half);
    return ok;
}

/* Rows against double: of the rounded operands within the error of f32 sums, of the given ones within 2x of
 * one rounding. */
static void check_values(const weight *w, const float *x, const float *y, int T)
{
    int N = w->c.N, K = w->c.K;
    bool f16 = w->c.type == TD_CUDA_W_F16;
    double worst = 0;
    for (int t = 0; t < T; t++)
        for (int n = 0; n < N; n++) {
            double rounded = w->c.bias ? (double)w->bias[n] : 0, given = rounded, size = fabs(rounded);
            for (int k = 0; k < K; k++) {
                float v = x[(size_t)t * (size_t)K + (size_t)k];
                double p = w->value[(size_t)n * (size_t)K + (size_t)k];
                float r = f16 ? td_f16_to_f32(td_f32_to_f16(v)) : td_bf16_to_f32(td_f32_to_bf16(v));
                rounded += (double)r * p;
                given += (double)v * p;
                size += fabs((double)v * p);
            }
            double got = (double)y[(size_t)t * (size_t)N + (size_t)n];
            double e = fabs(got - rounded) / (size * (8 + K / 16) * 0x1p-24 + 1e-30);
            double g = fabs(got - given) / (2 * size * (f16 ? 0x1p-12 : 0x1p-9) + 1e-30);
            if (!(e <= worst)) worst = e;
            if (!(g <= worst)) worst = g;
        }
    T_OK(worst <= 1, "N %d K %d slices %d type %d: error %g of the bound", N, K, w->c.slices, w->c.type,
         worst);
}

/* Rows x[perm[t]] in one call give the rows of `alone`. */
static void check_batch(const weight *w, const float *x, const float *alone, int T, int first, x_kind kind,
                        int kernel, void *ws)
{
    size_t N = (size_t)w->c.N, K = (size_t)w->c.K;
    float *xs = floats((size_t)T * K), *y = floats((size_t)T * N);
    for (int t = 0; t < T; t++)
        memcpy(xs + (size_t)t * K, x + (size_t)((first + t * 7) % MAX_ROWS) * K, K * 4);
    bool ok = run(w, xs, T, kind, kernel, ws, NULL, y);
    int bad = 0;
    for (int t = 0; t < T; t++)
        bad += !ok || memcmp(y + (size_t)t * N, alone + (size_t)((first + t * 7) % MAX_ROWS) * N, N * 4) != 0;
    T_OK(!bad, "N %d K %d slices %d type %d: %d of %d rows, input %d, kernel %d", w->c.N, w->c.K, w->c.slices,
         w->c.type, bad, T, kind, kernel);
    free(xs);
    free(y);
}

static void test_case(const gemm_case *c, uint64_t seed)
{
    weight w;
    weight_make(&w, c, seed);
    size_t N = (size_t)c->N, K = (size_t)c->K;
    float *x = floats(MAX_ROWS * K), *alone = floats(MAX_ROWS * N);
    rnd_fill(x, MAX_ROWS * K, seed + 7, 1);
    void *ws = workspace(MAX_ROWS, c->N, c->K);
    T_OK(run(&w, x, MAX_ROWS, X_F32, 2, ws, NULL,
             alone)); /* the rows; those below show that each is its own */
    check_values(&w, x, alone, 12);
    for (int t = 0; t < 3; t++) check_batch(&w, x, alone, 1, t * 31, (x_kind)(t % X_KINDS), 0, ws);
    static const int few[] = {3, 8, 9, 16, 17, 32, 33, 64};
    for (size_t i = 0; i < TD_COUNT(few); i++)
        check_batch(&w, x, alone, few[i], (int)i * 11, (x_kind)(i % X_KINDS), 1, ws);
    check_batch(&w, x, alone, 5, 50, X_OP, 2, ws);
    check_batch(&w, x, alone, 66, 3, X_ODD, 0, ws);
    check_batch(&w, x, alone, 130, 9, X_OP, 3, ws);
    /* y += */
    float *y0 = floats(5 * N), *y = floats(5 * N);
    for (int kernel = 1; kernel <= 2; kernel++) {
        rnd_fill(y0, 5 * N, seed + 9, 1);
        T_OK(run(&w, x, 5, X_F32, kernel, ws, y0, y));
        int bad = 0;
        for (size_t i = 0; i < 5 * N; i++) bad += y[i] != y0[i] + alone[i];
        T_EQ(bad, 0);
    }
    free(y0);
    free(y);
    free(x);
    free(alone);
    weight_free(&w);
    dev_done();
}

/* 8 slices on one rank = 2, 4 or 8 ranks with their own columns, added as the same tree. */
static void test_ranks(td_cuda_wtype type)
{
    enum { N = 48, K = 8 * 72, T = 20 };
    weight all;
    weight_make(&all, &(gemm_case){N, K, 8, type, false, 0}, 5);
    float *x = floats(T * K), *y = floats(T * N), *part = floats(8 * T * N), *xr = floats(T * K);
    rnd_fill(x, T * K, 6, 1);
    void *ws = workspace(T, N, K);
    T_OK(run(&all, x, T, X_F32, 0, ws, NULL, y));
    size_t size = fp8(type) ? 1 : 2;
    for (int ranks = 2; ranks <= 8; ranks *= 2) {
        int kr = K / ranks;
        for (int r = 0; r < ranks; r++) {
            char *raw = block_alloc(N * (size_t)kr * size);
            for (int n = 0; n < N; n++)
                memcpy(raw + (size_t)(n * kr) * size, (char *)all.raw + (size_t)(n * K + r * kr) * size,
                       (size_t)kr * size);
            for (int t = 0; t < T; t++) memcpy(xr + t * kr, x + t * K + r * kr, (size_t)kr * 4);
            weight w = all;
            w.c.K = kr;
            w.dev.K = kr;
            w.dev.slices = 8 / ranks;
            size_t bytes = td_cuda_gemm_packed_bytes(N, kr, 8 / ranks, type);
            void *packed = block_alloc(bytes);
            td_cuda_gemm_pack_host(packed, raw, type == TD_CUDA_W_F16 ? TD_F16 : TD_BF16, N, kr, 8 / ranks,
                                   type, 0, N);
            w.dev.p = dev_put(packed, bytes);
            T_OK(run(&w, xr, T, X_F32, r & 1 ? 2 : 1, ws, NULL, part + r * T * N));
            free(packed);
            free(raw);
        }
        for (int s = 1; s < ranks; s *= 2)
            for (int r = 0; r < ranks; r += 2 * s)
                for (int i = 0; i < T * N; i++) part[r * T * N + i] += part[(r + s) * T * N + i];
        T_OK(!memcmp(part, y, T * N * 4), "%d ranks, type %d", ranks, type);
    }
    free(x);
    free(xr);
    free(y);
    free(part);
    weight_free(&all);
    dev_done();
}

static void test_nan(void)
{
    weight w;
    gemm_case c = {70, 544, 0, TD_CUDA_W_BF16, true, 0};
    weight_make(&w, &c, 3);
    size_t N = (size_t)c.N, K = (size_t)c.K;
    float *x = floats(70 * K), *good = floats(70 * N), *y = floats(70 * N);
    rnd_fill(x, 70 * K, 4, 1);
    void *ws = workspace(70, c.N, c.K);
    for (int kernel = 1; kernel <= 3; kernel++) {
        int T = kernel == 1 ? 20 : 70;
        T_OK(run(&w, x, T, X_F32, kernel, ws, NULL, good));
        float old[3] = {x[3 * K + 17], x[9 * K + 543], x[19 * K]};
        x[3 * K + 17] = NAN;
        x[9 * K + 543] = INFINITY;
        x[19 * K] = -INFINITY;
        T_OK(run(&w, x, T, X_F32, kernel, ws, NULL, y));
        for (int t = 0; t < T; t++) {
            const float *a = y + (size_t)t * N, *b = good + (size_t)t * N;
            if (t == 3)
                T_EQ(count_nan(a, N), c.N);
            else if (t == 9 || t == 19)
                for (size_t n = 0; n < N; n++) T_OK(!isfinite(a[n]));
            else
                T_OK(!memcmp(a, b, N * 4), "row %d, kernel %d", t, kernel);
        }
        x[3 * K + 17] = old[0];
        x[9 * K + 543] = old[1];
        x[19 * K] = old[2];
    }
    free(x);
    free(good);
    free(y);
    weight_free(&w);
    dev_done();
}

/* Experts: each row as if its expert's product had been called with it alone; rows without an owner stay as
 * they are. */
static void test_grouped(td_cuda_wtype type, int K, int slices)
{
    enum { E = 6, N = 40, ROWS = 120 };
    static const int32_t row0[E + 1] = {2, 2, 5, 25, 26, 96, 110};
    gemm_case c = {N, K, slices, type, true, 0};
    weight w[E];
    const void *p[E];
    const float *bias[E], *scale[E];
    for (int e = 0; e < E; e++) {
        weight_make(&w[e], &c, 40 + (uint64_t)e);
        p[e] = w[e].dev.p;
        bias[e] = w[e].dev.bias;
        scale[e] = w[e].dev.scale;
    }
    float *x = floats(ROWS * (size_t)K), *want = floats(ROWS * N), *y = floats(ROWS * N);
    rnd_fill(x, ROWS * (size_t)K, 50, 1);
    rnd_fill(want, ROWS * N, 51, 1);
    void *ws = workspace(ROWS, N, K);
    float *dx = dev_put(x, ROWS * (size_t)K * 4), *dy = dev_put(want, ROWS * N * 4);
    for (int e = 0; e < E; e++) {
        td_cuda_gemm_args a = {&w[e].dev,
                               dx + (size_t)row0[e] * (size_t)K,
                               true,
                               (size_t)K,
                               row0[e + 1] - row0[e],
                               dy + row0[e] * N,
                               N,
                               false,
                               ws,
                               0};
        T_EQ(td_cuda_gemm(dev()->stream[0], &a), 0);
    }
    T_OK(dev_get(y, dy, ROWS * N * 4));
    td_cuda_grouped_args g = {.shape = w[0].dev,
                              .n = E,
                              .p = dev_put(p, sizeof p),
                              .bias = dev_put(bias, sizeof bias),
                              .scale = fp8(type) ? dev_put(scale, sizeof scale) : NULL,
                              .row0 = dev_put(row0, sizeof row0),
                              .max_rows = ROWS,
                              .x = dx,
                              .x_is_f32 = true,
                              .ldx = (size_t)K,
                              .ldy = N,
                              .ws = ws};
    for (g.kernel = 0; g.kernel <= 3; g.kernel++) {
        float *again = floats(ROWS * N);
        g.y = dev_put(want, ROWS * N * 4);
        T_EQ(td_cuda_gemm_grouped(dev()->stream[0], &g), 0);
        T_OK(dev_get(again, g.y, ROWS * N * 4));
        T_OK(!memcmp(again, y, ROWS * N * 4), "kernel %d type %d K %d", g.kernel, type, K);
        free(again);
    }
    free(x);
    free(want);
    free(y);
    for (int e = 0; e < E; e++) weight_free(&w[e]);
    dev_done();
}

static void test_embed(void)
{
    for (int s = 0; s <= 4; s += 4) {
        weight w;
        gemm_case c = {50, 144, s, s ? TD_CUDA_W_F16 : TD_CUDA_W_BF16, false, 0};
        weight_make(&w, &c, 8);
        int32_t ids[] = {0, 49, 17, -1, 50, 16};
        float out[6 * 144];
        float *d = dev_new(sizeof out);
        T_EQ(td_cuda_gemm_embed(dev()->stream[0], &w.dev, dev_put(ids, sizeof ids), 6, d, 144), 0);
        T_OK(dev_get(out, d, sizeof out));
        int bad = 0;
        for (int i = 0; i < 6; i++)
            for (int k = 0; k < 144; k++)
                bad +=
                    (double)out[i * 144 + k] != (ids[i] < 0 || ids[i] >= 50 ? 0 : w.value[ids[i] * 144 + k]);
        T_EQ(bad, 0);
        weight_free(&w);
        dev_done();
    }
}

static void test_refused(void)
{
    T_OK(td_cuda_gemm_refuses(0, 8, 0, TD_CUDA_W_BF16));
    T_OK(td_cuda_gemm_refuses(8, 8, 3, TD_CUDA_W_BF16));
    T_OK(td_cuda_gemm_refuses(8, 12, 8, TD_CUDA_W_BF16));
    T_OK(td_cuda_gemm_refuses(8, 384, 8, TD_CUDA_W_E4M3_BLOCK));
    T_OK(td_cuda_gemm_refuses(8, 8, 0, TD_CUDA_W_TYPES));
}

int main(void)
{
    for (size_t i = 0; i < TD_COUNT(cases); i++) test_case(&cases[i], 100 + i);
    test_ranks(TD_CUDA_W_BF16);
    test_ranks(TD_CUDA_W_E4M3_ROW);
    test_nan();
    test_grouped(TD_CUDA_W_BF16, 72, 0);
    test_grouped(TD_CUDA_W_F16, 2050, 0);
    test_grouped(TD_CUDA_W_E4M3_BLOCK, 520, 0);
    test_grouped(TD_CUDA_W_E4M3_ROW, 80, 8);
    test_embed();
    test_refused();
    return T_DONE();
}
