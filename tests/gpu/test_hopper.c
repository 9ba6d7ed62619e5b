// SPDX-License-Identifier: Apache-2.0
/* tests/gpu/test_hopper.c - the kernels for Hopper alone (files *_sm90a.cu) beside the portable ones, on a
 * device of that kind: values, a row's bits whatever shares its call, and the same bits twice. One JSON
 * object a kernel on standard output:
 *   {"kernel":"gemm_sm90a","cases":N,"failed":0}
 * A name stands in kernels/proven_cuda.h once a run without failures is in tests/gpu/results. */
#include "kernels/cuda.h"
#include "kernels/cuda_attn.h"
#include "kernels/cuda_gemm.h"
#include "tests/simt/simt_c.h"
#include "tests/simt/support.h"

static int cases, failed;

static void begin(void)
{
    cases = 0;
    failed = t_failed;
}

static void end(const char *kernel)
{
    printf("{\"kernel\":\"%s\",\"cases\":%d,\"failed\":%d}\n", kernel, cases, t_failed - failed);
    fflush(stdout);
}

static td_stream stream(void)
{
    return dev()->stream[TD_STREAM_COMPUTE];
}

static float *fetch(const void *p, size_t n)
{
    float *f = floats(n);
    T_OK(dev_get(f, p, n * 4), "%s", td_reason());
    return f;
}

/* Largest difference beside the largest value; NaN counts as infinite. */
static double apart(const float *a, const float *b, size_t n)
{
    double most = 0, size = 1e-30;
    for (size_t i = 0; i < n; i++) {
        double d = fabs((double)a[i] - (double)b[i]);
        most = d <= most ? most : d == d ? d : INFINITY;
        size = fmax(size, fabs((double)b[i]));
    }
    return most / size;
}

/* ---- products ---- */

static float *product(td_cuda_gemm_args a, int T, int t0, bool hopper)
{
    size_t n = (size_t)T * (size_t)a.w->N;
    a.x = (const float *)a.x + (size_t)t0 * a.ldx;
    a.T = T;
    a.y = dev_new(n * 4);
    T_EQ(hopper ? td_cuda_gemm_hopper(stream(), &a) : td_cuda_gemm(stream(), &a), 0);
    return fetch(a.y, n);
}

static void product_case(int N, int K, td_cuda_wtype type, int T, bool bias)
{
    td_cuda_weight w = {.N = N, .K = K, .type = type};
    size_t packed = td_cuda_gemm_packed_bytes(N, K, 0, type), n = (size_t)N * (size_t)K,
           ws = td_cuda_gemm_ws_bytes(T, N, K);
    uint16_t *raw = block_alloc(n * 2);
    uint64_t seed = (uint64_t)(N + K + T);
    for (size_t i = 0; i < n; i++) {
        uint8_t code = (uint8_t)(rnd_next(&seed) >> 8);
        if (type == TD_CUDA_W_BF16)
            raw[i] = td_f32_to_bf16(rnd_float(&seed, 0.5f));
        else
            ((uint8_t *)raw)[i] = (code & 0x7f) > 0x5f ? (uint8_t)(code ^ 0x40) : code;
    }
    void *host = block_alloc(packed);
    td_cuda_gemm_pack_host(host, raw, TD_BF16, N, K, 0, type, 0, N);
    w.p = dev_put(host, packed);
    float *x = floats((size_t)T * (size_t)K), *b = floats((size_t)N);
    rnd_fill(x, (size_t)T * (size_t)K, 3, 1), rnd_fill(b, (size_t)N, 4, 1);
    if (bias) w.bias = dev_put(b, (size_t)N * 4);
    for (int i = 0; i < N; i++) b[i] = 0.5f + (float)(i % 7) / 8;
    if (type == TD_CUDA_W_E4M3_ROW) w.scale = dev_put(b, (size_t)N * 4);
    td_cuda_gemm_args a = {.w = &w,
                           .x = dev_put(x, (size_t)T * (size_t)K * 4),
                           .x_is_f32 = true,
                           .ldx = (size_t)K,
                           .ldy = (size_t)N,
                           .ws = dev_new(ws)};
    TD_CHECK(dev()->fill(dev(), TD_STREAM_COMPUTE, a.ws, 0, TD_CUDA_GEMM_COUNTERS * 4) == TD_OK);
    float *want = product(a, T, 0, false), *got = product(a, T, 0, true), *again = product(a, T, 0, true),
          *alone = product(a, 1, T - 1, true);
    double e = apart(got, want, (size_t)T * (size_t)N);
    T_OK(e <= 1e-4, "product %d x %d, type %d, %d rows: off by %g", N, K, type, T, e);
    T_OK(!memcmp(got, again, (size_t)T * (size_t)N * 4), "product %d x %d, %d rows: not the same twice", N, K,
         T);
    T_OK(!memcmp(got + (size_t)(T - 1) * (size_t)N, alone, (size_t)N * 4),
         "product %d x %d: a row of %d is not a row alone", N, K, T);
    cases++;
    free(raw), free(host), free(x), free(b), free(want), free(got), free(again), free(alone);
    dev_done();
}

static void products(void)
{
    static const int shape[][2] = {{48, 200},    {128, 64},    {640, 1024},
                                   {1000, 4096}, {4096, 4096}, {130, 14336}},
                     rows[] = {1, 65, 128, 300};
    begin();
    for (size_t i = 0; i < TD_COUNT(shape); i++)
        for (size_t k = 0; k < TD_COUNT(rows); k++)
            for (int type = 0; type < 2; type++)
                product_case(shape[i][0], shape[i][1], type ? TD_CUDA_W_E4M3_ROW : TD_CUDA_W_BF16, rows[k],
                             k % 2);
    end("gemm_sm90a");
}

/* ---- attention ---- */

enum { MAX_SEQ = 3, BLOCKS = 1 << 14 };

static void attention_case(int H, int G, int D, int P, int window, const int (*seqs)[2], int n_seq)
{
    td_cuda_attn_seq seq[MAX_SEQ];
    int T = 0, pages = 0;
    for (int i = 0; i < n_seq; i++) {
        seq[i] = (td_cuda_attn_seq){T, seqs[i][0], seqs[i][1], pages};
        T += seqs[i][0];
        pages += (seqs[i][0] + seqs[i][1] + P - 1) / P;
    }
    td_kv kv = {.dtype = TD_BF16, .n_pages = pages, .P = P, .G = G, .D = D};
    size_t n = (size_t)(T * H * D), elems = (size_t)pages * td_kv_page_bytes(&kv) / 2;
    uint16_t *v = block_alloc(elems * 2);
    uint64_t seed = (uint64_t)(H * D + P);
    for (size_t i = 0; i < elems; i++) v[i] = td_f32_to_bf16(rnd_float(&seed, 1));
    kv.base = dev_put(v, elems * 2);
    float *q = floats(n);
    rnd_fill(q, n, 8, 2);
    int32_t *table = block_alloc((size_t)pages * 4);
    for (int i = 0; i < pages; i++) table[i] = pages - 1 - i;
    void *plan = dev_new(td_cuda_attn_plan_bytes(n_seq));
    int32_t *redo = dev_new(BLOCKS * 4);
    TD_CHECK(dev()->fill(dev(), TD_STREAM_COMPUTE, redo, 0, BLOCKS * 4) == TD_OK);
    td_cuda_attn_args a = {.q = dev_put(q, n * 4),
                           .ldq = (size_t)(H * D),
                           .out = dev_new(n * 4),
                           .ldo = (size_t)(H * D),
                           .out_dtype = TD_F32,
                           .kv = &kv,
                           .seq = dev_put(seq, (size_t)n_seq * sizeof *seq),
                           .n_seq = n_seq,
                           .pages = dev_put(table, (size_t)pages * 4),
                           .H = H,
                           .G = G,
                           .D = D,
                           .scale = 1 / sqrtf((float)D),
                           .window = window,
                           .T = T,
                           .prompts = true,
                           .few = false,
                           .plan = plan,
                           .max_slots = 1};
    a.ws = dev_new(td_cuda_attn_ws_bytes(1, D));
    T_EQ(td_cuda_attn_plan(stream(), a.seq, n_seq, H, G, D, window, 1, 0, plan), 0);
    T_EQ(td_cuda_attention(stream(), &a), 0);
    float *want = fetch(a.out, n);
    for (int round = 0; round < 2; round++) {
        TD_CHECK(dev()->fill(dev(), TD_STREAM_COMPUTE, a.out, 0xff, n * 4) == TD_OK);
        T_EQ(td_cuda_attention_hopper(stream(), &a, redo, BLOCKS), 0);
        float *got = fetch(a.out, n);
        double e = apart(got, want, n);
        T_OK(e <= 0.02, "attention %d/%d x %d, pages of %d, window %d: off by %g", H, G, D, P, window, e);
        free(got);
    }
    cases++;
    free(v), free(q), free(table), free(want);
    dev_done();
}

static void attention(void)
{
    static const int one[][2] = {{128, 0}}, odd[][2] = {{77, 0}, {1, 500}, {130, 300}},
                     deep[][2] = {{512, 3584}};
    begin();
    for (int D = 64; D <= 128; D += 64)
        for (int P = 8; P <= 256; P *= 4) {
            attention_case(8, 2, D, P, 0, one, 1);
            attention_case(32, 8, D, P, 0, odd, 3);
            attention_case(4, 4, D, P, 200, odd, 3);
            attention_case(8, 1, D, P, 0, deep, 1);
        }
    end("attn_sm90a");
}

int main(void)
{
    if (dev()->arch != 90) T_SKIP("not a Hopper");
    products();
    attention();
    return T_DONE();
}
