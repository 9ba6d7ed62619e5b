// SPDX-License-Identifier: Apache-2.0
/* tests/gpu/test_hopper.c - the kernels for Hopper alone (files *_sm90a.cu) beside the portable ones: values,
 * a row's bits whatever shares its call, the same bits twice, NaN and infinity in their rows. On a device of
 * that kind, one JSON object a kernel on standard output:
 *   {"kernel":"gemm_sm90a","cases":N,"failed":0}
 * A name stands in kernels/proven_cuda.h once a run without failures is in tests/gpu/results.
 *
 * On the shim (tests/simt/simt_sm90a.h) small cases, or with the argument `all` a device's; then every
 * mistake that the shim can plant in the kernels must be seen. `few`: the small cases on a device (compute-sanitizer). */
#include "common/log.h"
#include "kernels/cuda.h"
#include "kernels/cuda_attn.h"
#include "kernels/cuda_gemm.h"
#include "tests/simt/simt_c.h"
#include "tests/simt/support.h"

static int cases, failed;
static bool expecting; /* a planted mistake: */
static int seen;

#define CHECK(ok, ...)                                                                                       \
    do {                                                                                                     \
        const bool is = (ok);                                                                                \
        if (expecting)                                                                                       \
            seen += !is;                                                                                     \
        else                                                                                                 \
            T_OK(is, __VA_ARGS__);                                                                           \
    } while (0)

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
    CHECK(dev_get(f, p, n * 4), "%s", td_reason());
    return f;
}

/* Largest difference beside the largest value; what is not a number, or not finite, must be so on both sides.
 */
static double apart(const float *a, const float *b, size_t n)
{
    double most = 0, size = 1e-30;
    for (size_t i = 0; i < n; i++) {
        if (!isfinite(b[i])) {
            if (isnan(b[i]) ? !isnan(a[i]) : !(a[i] == b[i])) most = INFINITY;
            continue;
        }
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
    a.x = (const char *)a.x + (size_t)t0 * a.ldx * (a.x_is_f32 ? 4 : 2);
    a.T = T;
    a.y = dev_new(n * 4);
    if (a.add) TD_CHECK(dev()->fill(dev(), TD_STREAM_COMPUTE, a.y, 0x3f, n * 4) == TD_OK);
    CHECK((hopper ? td_cuda_gemm_hopper(stream(), &a) : td_cuda_gemm(stream(), &a)) == 0, "%s",
          simt_last_error());
    return fetch(a.y, n);
}

/* slices: besides, x as bf16, and added to y. */
static void product_case(int N, int K, td_cuda_wtype type, int T, bool bias, int slices)
{
    td_cuda_weight w = {.N = N, .K = K, .type = type, .slices = slices};
    size_t packed = td_cuda_gemm_packed_bytes(N, K, slices, type), n = (size_t)N * (size_t)K,
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
    td_cuda_gemm_pack_host(host, raw, TD_BF16, N, K, slices, type, 0, N);
    w.p = dev_put(host, packed);
    float *x = floats((size_t)T * (size_t)K), *b = floats((size_t)N);
    rnd_fill(x, (size_t)T * (size_t)K, 3, 1), rnd_fill(b, (size_t)N, 4, 1);
    if (bias) w.bias = dev_put(b, (size_t)N * 4);
    for (int i = 0; i < N; i++) b[i] = 0.5f + (float)(i % 7) / 8;
    if (type == TD_CUDA_W_E4M3_ROW) w.scale = dev_put(b, (size_t)N * 4);
    if (slices)
        for (size_t i = 0; i < (size_t)T * (size_t)K; i++) ((uint16_t *)x)[i] = td_f32_to_bf16(x[i]);
    td_cuda_gemm_args a = {.w = &w,
                           .x = dev_put(x, (size_t)T * (size_t)K * (slices ? 2 : 4)),
                           .x_is_f32 = !slices,
                           .ldx = (size_t)K,
                           .ldy = (size_t)N,
                           .add = slices != 0,
                           .ws = dev_new(ws)};
    TD_CHECK(dev()->fill(dev(), TD_STREAM_COMPUTE, a.ws, 0, TD_CUDA_GEMM_COUNTERS * 4) == TD_OK);
    float *want = product(a, T, 0, false), *got = product(a, T, 0, true), *again = product(a, T, 0, true),
          *alone = product(a, 1, T - 1, true);
    double e = apart(got, want, (size_t)T * (size_t)N);
    CHECK(e <= 1e-4, "product %d x %d, type %d, %d rows: off by %g", N, K, type, T, e);
    CHECK(!memcmp(got, again, (size_t)T * (size_t)N * 4), "product %d x %d, %d rows: not the same twice", N,
          K, T);
    CHECK(!memcmp(got + (size_t)(T - 1) * (size_t)N, alone, (size_t)N * 4),
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
                             k % 2, 0);
    for (int slices = 1; slices <= 8; slices *= 2)
        product_case(200, slices * 52, TD_CUDA_W_BF16, 130, true, slices);
    end("gemm_sm90a");
}

static void few_products(void)
{
    begin();
    product_case(48, 200, TD_CUDA_W_BF16, 130, true, 0);      /* rows and columns that end inside of tiles */
    product_case(130, 64, TD_CUDA_W_E4M3_ROW, 3, false, 0);   /* one block of K; two tiles of weights */
    product_case(16, 2100, TD_CUDA_W_BF16, 1, false, 0);      /* all leaves of K */
    product_case(20, 1030, TD_CUDA_W_E4M3_ROW, 65, false, 0); /* half of them */
    product_case(16, 208, TD_CUDA_W_BF16, 9, true, 4);
    end("gemm_sm90a");
}

/* ---- attention ---- */

enum { MAX_SEQ = 3, BLOCKS = 1 << 14 };

/* V of key `at` of the last sequence, in every head: NaN and infinity. */
static void spoil_key(uint16_t *v, const td_kv *kv, const int32_t *table, const td_cuda_attn_seq *s, int at)
{
    const size_t page = (size_t)table[s->page0 + at / kv->P], row = (size_t)(at % kv->P);
    for (size_t g = 0; g < (size_t)kv->G; g++) {
        uint16_t *k = v + (((page * 2 + 1) * (size_t)kv->G + g) * (size_t)kv->P + row) * (size_t)kv->D;
        k[3] = 0x7fc0, k[40] = 0xff80;
    }
}

/* odd: 0, or a key of the last sequence whose V is spoilt; -1: sinks and a soft cap. */
static void attention_case(int H, int G, int D, int P, int window, const int (*seqs)[2], int n_seq, int odd)
{
    static const float sinks[] = {0.5f, -1, 3, 0, 1, 2, -3, 0.25f};
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
    float *q = floats(n);
    rnd_fill(q, n, 8, 2);
    int32_t *table = block_alloc((size_t)pages * 4);
    for (int i = 0; i < pages; i++) table[i] = pages - 1 - i;
    if (odd > 0) spoil_key(v, &kv, table, &seq[n_seq - 1], odd);
    kv.base = dev_put(v, elems * 2);
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
                           .softcap = odd < 0 ? 2.f : 0,
                           .sinks = odd < 0 ? dev_put(sinks, sizeof sinks) : NULL,
                           .prompts = true,
                           .few = false,
                           .plan = plan,
                           .max_slots = 1};
    a.ws = dev_new(td_cuda_attn_ws_bytes(1, D));
    CHECK(td_cuda_attn_plan(stream(), a.seq, n_seq, H, G, D, window, 1, 0, plan) == 0, "%s",
          simt_last_error());
    CHECK(td_cuda_attention(stream(), &a) == 0, "%s", simt_last_error());
    float *want = fetch(a.out, n);
    float *first = NULL;
    for (int round = 0; round < 2 && !seen; round++) {
        TD_CHECK(dev()->fill(dev(), TD_STREAM_COMPUTE, a.out, 0xfe, n * 4) == TD_OK);
        CHECK(td_cuda_attention_hopper(stream(), &a, redo, BLOCKS) == 0, "%s", simt_last_error());
        float *got = fetch(a.out, n);
        double e = apart(got, want, n);
        CHECK(e <= 0.02, "attention %d/%d x %d, pages of %d, window %d: off by %g", H, G, D, P, window, e);
        CHECK(odd > 0 || e > 0, "attention %d/%d x %d: the portable kernel's bits", H, G, D);
        CHECK(!first || !memcmp(got, first, n * 4), "attention %d/%d x %d: not the same twice", H, G, D);
        if (first)
            free(got);
        else
            first = got;
    }
    cases++;
    free(v), free(q), free(table), free(want), free(first);
    dev_done();
}

static const int one[][2] = {{128, 0}}, odd[][2] = {{77, 0}, {1, 500}, {130, 300}}, deep[][2] = {{512, 3584}},
                 late[][2] = {{7, 0}, {64, 100}}, turns[][2] = {{40, 300}};

static void attention(void)
{
    begin();
    for (int D = 64; D <= 128; D += 64)
        for (int P = 8; P <= 512; P *= 4) {
            attention_case(8, 2, D, P, 0, one, 1, 0);
            attention_case(32, 8, D, P, 0, odd, 3, 0);
            attention_case(4, 4, D, P, 200, odd, 3, 0);
            attention_case(8, 1, D, P, 0, deep, 1, 0);
            attention_case(8, 2, D, P, 0, odd, 3, -1);
            for (int key = 101; key < 164; key += 9) attention_case(2, 2, D, P, 0, late, 2, key);
        }
    end("attn_sm90a");
}

static void few_attention(void)
{
    begin();
    for (int D = 64; D <= 128; D += 64) {
        attention_case(2, 1, D, 16, 0, odd, 3, 0);
        attention_case(1, 1, D, 8, 200, odd, 3, 0);
        attention_case(2, 2, D, D * 2, 0, one, 1, -1);
        attention_case(1, 1, D, 32, 0, late, 2, 120); /* seen by some rows of a warp, by all, by none */
    }
    end("attn_sm90a");
}

/* ---- planted mistakes: SEEN_P, SEEN_A: by the product, by attention; SEEN_C: in check mode alone ---- */

enum { SEEN_P = 1, SEEN_A = 2, SEEN_C = 4 };

static bool is_seen(bool product)
{
    expecting = true, seen = 0;
    if (product)
        product_case(48, 328, TD_CUDA_W_BF16, 20, false, 0);
    else
        attention_case(1, 1, 128, 16, 0, turns, 1, 0);
    expecting = false;
    simt_clear_error();
    return seen > 0;
}

static void planted(void)
{
    static const int by[] = {[PLANT_SBO] = 3,
                             [PLANT_LBO] = SEEN_A,
                             [PLANT_SWIZZLE] = 3,
                             [PLANT_START] = 3,
                             [PLANT_NO_EXPECT] = 3,
                             [PLANT_MORE_BYTES] = 3,
                             [PLANT_PARITY] = 3,
                             [PLANT_NO_ARRIVE] = 3,
                             [PLANT_NO_FULL_WAIT] = 3,
                             [PLANT_NO_FREE_WAIT] = 3,
                             [PLANT_NO_MMA_WAIT] = 3,
                             [PLANT_LATE_WAIT] = 3,
                             [PLANT_NO_COMMIT] = 3,
                             [PLANT_NO_MMA_FENCE] = 3,
                             [PLANT_NO_STORE_FENCE] = SEEN_A | SEEN_C,
                             [PLANT_NO_BAR_SYNC] = SEEN_A | SEEN_C,
                             [PLANT_NO_TURN_SYNC] = SEEN_A,
                             [PLANT_NO_BAR_ARRIVE] = SEEN_A,
                             [PLANT_MAP_STRIDE] = SEEN_A,
                             [PLANT_MAP_SWIZZLE] = SEEN_A};
    simt_quiet(1);
    for (int p = 0; p < PLANT_COUNT; p++) {
        const int want = by[p] & SEEN_C && !simt_checks() ? 0 : by[p] & 3;
        (void)simt_set_option("plant", p);
        for (int kernel = SEEN_P; kernel <= SEEN_A; kernel++)
            T_OK(is_seen(kernel == SEEN_P) == ((want & kernel) != 0), "mistake %d in kernel %d: %s", p,
                 kernel, want & kernel ? "not seen" : "seen");
    }
    (void)simt_set_option("plant", PLANT_NONE);
    simt_quiet(0);
}

int main(int argc, char **argv)
{
    td_log_open("test", TD_LOG_ERROR);
    const bool shim = simt_set_option("arch", 90) >= 0, all = argc > 1 ? !strcmp(argv[1], "all") : !shim;
    if (dev()->arch != 90) T_SKIP("not a Hopper");
    if (all) (void)simt_set_option("timeout", 0); /* seconds a launch; the largest take minutes */
    all ? products() : few_products();
    all ? attention() : few_attention();
    if (shim) planted();
    return T_DONE();
}
