// SPDX-License-Identifier: Apache-2.0
/* tests/simt/test_launchers.c - what kernels/cuda.h has beyond td_ops: the fused norm, outputs in bf16 and
 * f16, GELU, rows by index, pages to payload and back, page copies; refusals; the table's refusals and
 * errors. Device memory is poisoned and, in check mode, an output byte that no kernel wrote fails the
 * download. */
#include "kernels/cuda.h"
#include "tests/simt/simt_c.h"
#include "tests/simt/support.h"

static td_stream stream(void)
{
    return dev()->stream[TD_STREAM_COMPUTE];
}

static float element(const void *p, td_dtype t, size_t i)
{
    float v;
    td_convert(&v, TD_F32, (const char *)p + i * td_dtype_bytes(t), t, 1);
    return v;
}

static const td_dtype types[] = {TD_F32, TD_BF16, TD_F16};
/* Half a unit in the last place of a value in [1, 2), with a little for the f32 arithmetic before it. */
static double half_ulp(td_dtype t)
{
    return t == TD_F32 ? 4e-7 : t == TD_BF16 ? 0x1.01p-9 : 0x1.01p-12;
}

static void test_add_rmsnorm(int E, td_dtype type)
{
    enum { T = 5 };
    size_t n = (size_t)T * (size_t)E;
    float *x = floats(n), *d = floats(n), *w = floats((size_t)E), *sum = floats(n);
    void *out = block_alloc(n * 4), *alone = block_alloc((size_t)E * 4);
    rnd_fill(x, n, 1, 2), rnd_fill(d, n, 2, 1), rnd_fill(w, (size_t)E, 3, 1);
    d[2 * E] = NAN;
    float *dx = dev_put(x, n * 4), *dd = dev_put(d, n * 4), *dw = dev_put(w, (size_t)E * 4);
    void *o = dev_new(n * td_dtype_bytes(type));
    T_EQ(td_cuda_add_rmsnorm(stream(), dx, (size_t)E, dd, (size_t)E, dw, 1e-5f, T, E, o, type, (size_t)E), 0);
    T_OK(dev_get(out, o, n * td_dtype_bytes(type)) && dev_get(sum, dx, n * 4), "%s", simt_last_error());
    double worst = 0;
    for (int t = 0; t < T; t++) {
        double s = 0;
        const float *row = sum + (size_t)t * (size_t)E;
        for (int i = 0; i < E; i++) {
            T_OK(t == 2 && i == 0 ? row[0] != row[0] : row[i] == x[t * E + i] + d[t * E + i]);
            s += (double)row[i] * (double)row[i];
        }
        for (int i = 0; i < E; i++) {
            double want = (double)row[i] / sqrt(s / E + (double)1e-5f) * (double)w[i],
                   got = (double)element(out, type, (size_t)(t * E + i));
            if (t == 2)
                T_OK(got != got);
            else
                worst = fmax(worst, fabs(got - want) / (fabs(want) + (type == TD_F16 ? 1e-4 : 1e-20)));
        }
    }
    T_OK(worst <= 2 * half_ulp(type), "E=%d type %d: %g", E, type, worst);
    /* A row alone has the bits it has among others. */
    float *x3 = dev_put(x + (size_t)3 * (size_t)E, (size_t)E * 4);
    void *o3 = dev_new((size_t)E * td_dtype_bytes(type));
    T_EQ(td_cuda_add_rmsnorm(stream(), x3, (size_t)E, dd + (size_t)3 * (size_t)E, (size_t)E, dw, 1e-5f, 1, E,
                             o3, type, (size_t)E),
         0);
    T_OK(dev_get(alone, o3, (size_t)E * td_dtype_bytes(type)));
    T_OK(!memcmp(alone, (char *)out + (size_t)3 * (size_t)E * td_dtype_bytes(type),
                 (size_t)E * td_dtype_bytes(type)));
    dev_done();
    free(x), free(d), free(w), free(sum), free(out), free(alone);
}

static double act_of(td_act a, double g)
{
    if (a == TD_ACT_SILU) return g / (1 + exp(-g));
    if (a == TD_ACT_GELU) return 0.5 * g * (1 + erf(g / sqrt(2)));
    return 0.5 * g * (1 + tanh(sqrt(2 / M_PI) * (g + 0.044715 * g * g * g)));
}

static void test_act(td_act a, int F, td_dtype type)
{
    enum { T = 3 };
    size_t ld = 2 * (size_t)F + 4, n = (size_t)T * (size_t)F;
    float *x = floats(T * ld);
    void *out = block_alloc(n * 4), *o = dev_new(n * td_dtype_bytes(type));
    rnd_fill(x, T * ld, 9, 2);
    T_EQ(td_cuda_act_mul(stream(), a, dev_put(x, T * ld * 4), ld, T, F, o, type, (size_t)F), 0);
    T_OK(dev_get(out, o, n * td_dtype_bytes(type)), "%s", simt_last_error());
    double worst = 0;
    for (int t = 0; t < T; t++)
        for (int f = 0; f < F; f++) {
            double g = (double)x[(size_t)t * ld + (size_t)f],
                   want = act_of(a, g) * (double)x[(size_t)t * ld + (size_t)(F + f)];
            /* 1 + erf(g) cancels in the tail, as everywhere: a rounding of g u is allowed there. */
            double got = (double)element(out, type, (size_t)(t * F + f)), u = want / act_of(a, g);
            double e = fabs(got - want) / (fabs(want) + 0.2 * fabs(g * u) + (type == TD_F16 ? 1e-3 : 0));
            worst = e <= worst ? worst : e;
        }
    T_OK(worst <= 2 * half_ulp(type), "act %d F=%d type %d: %g", a, F, type, worst);
    dev_done();
    free(x), free(out);
}

static void test_rows(void)
{
    enum { T = 9, W = 37 };
    float x[T * W], d[T * W], out[T * W], y[T * W];
    uint16_t half[T * W];
    int32_t rows[] = {8, 0, 3, 3, 5};
    rnd_fill(x, T * W, 4, 1), rnd_fill(d, T * W, 5, 1);
    float *dx = dev_put(x, sizeof x), *o = dev_new(5 * W * 4);
    T_EQ(td_cuda_take_rows(stream(), dx, W, dev_put(rows, sizeof rows), 5, W, o, W), 0);
    T_OK(dev_get(out, o, 5 * W * 4));
    for (int i = 0; i < 5; i++) T_OK(!memcmp(out + i * W, x + rows[i] * W, W * 4));
    uint16_t *h = dev_new(sizeof half);
    for (int f16 = 0; f16 < 2; f16++) {
        T_EQ(td_cuda_convert(stream(), dx, W, T, W, h, f16 ? TD_F16 : TD_BF16, W), 0);
        T_OK(dev_get(half, h, sizeof half));
        for (int i = 0; i < T * W; i++) T_EQ(half[i], f16 ? td_f32_to_f16(x[i]) : td_f32_to_bf16(x[i]));
    }
    T_EQ(td_cuda_add(stream(), dx, W, dev_put(d, sizeof d), W, T, W), 0);
    T_OK(dev_get(y, dx, sizeof y));
    for (int i = 0; i < T * W; i++) T_OK(y[i] == x[i] + d[i]);
    dev_done();
}

/* ---- pages ---- */

typedef struct pool_case {
    td_dtype dtype;
    int P, G, D, odd; /* odd: bytes by which the payload is off a 16-byte boundary */
} pool_case;

static size_t at(const td_kv *kv, int slot, int page, int side, int in_page)
{
    return ((((size_t)slot * (size_t)kv->n_pages + (size_t)page) * 2 * (size_t)kv->G + (size_t)side) *
                (size_t)kv->P +
            (size_t)in_page) *
           (size_t)kv->D * td_dtype_bytes(kv->dtype);
}

/* Payload by its definition: [slot][k|v][head][token][D]. row: where the tokens are. */
static void gather_plain(const td_kv_rows *r, const uint8_t *base, const int32_t *rows, uint8_t *payload)
{
    const td_kv *kv = r->kv;
    size_t row = (size_t)kv->D * td_dtype_bytes(kv->dtype);
    for (int s = 0; s < r->n_slots; s++)
        for (int kv2 = 0; kv2 < 2; kv2++)
            for (int h = r->head0; h < r->head0 + r->n_heads; h++)
                for (uint32_t t = 0; t < r->n_tok; t++, payload += row)
                    memcpy(payload,
                           base + at(kv, r->slot0 + s, rows[t] / kv->P, kv2 * kv->G + h, rows[t] % kv->P),
                           row);
}

/* n tokens from tok0 on, every step-th, in these pages. */
static const int32_t *rows_of(int32_t *rows, const int32_t *pages, int P, int tok0, uint32_t n, int step)
{
    for (uint32_t i = 0; i < n; i++) {
        int t = tok0 + (int)i * step;
        rows[i] = pages[t / P] * P + t % P;
    }
    return dev_put(rows, n * sizeof *rows);
}

/* Pages out to a pool of another size and back to other places: as swapped and resumed. Nothing else of either changes. */
static void test_swap(const td_kv *kv, const uint8_t *host, size_t bytes, int slots)
{
    enum { OTHER = 4 };
    static const int32_t out[] = {8, 0, 3}, there[] = {2, 1, 3}, back[] = {4, 6, 1};
    td_kv other = *kv;
    size_t page = td_kv_page_bytes(kv), n = (size_t)slots * OTHER * page;
    uint8_t *far = block_alloc(n), *far_before = block_alloc(n), *now = block_alloc(bytes);
    other.n_pages = OTHER;
    memset(far_before, 0x77, n);
    other.base = dev_put(far_before, n);
    const int32_t *d_there = dev_put(there, sizeof there);
    T_EQ(td_cuda_kv_copy(stream(), &other, d_there, kv, dev_put(out, sizeof out), 3, slots), 0);
    T_EQ(td_cuda_kv_copy(stream(), kv, dev_put(back, sizeof back), &other, d_there, 3, slots), 0);
    T_OK(dev_get(far, other.base, n) && dev_get(now, kv->base, bytes), "%s", simt_last_error());
    int bad = 0;
    for (int s = 0; s < slots; s++) {
        bad += memcmp(far + at(&other, s, 0, 0, 0), far_before, page) != 0;
        for (int i = 0; i < kv->n_pages; i++) {
            int k = 0, of = i;
            for (; k < 3; k++)
                if (back[k] == i) of = out[k];
            bad += memcmp(now + at(kv, s, i, 0, 0), host + at(kv, s, of, 0, 0), page) != 0;
        }
        for (int k = 0; k < 3; k++) bad += memcmp(far + at(&other, s, there[k], 0, 0), host + at(kv, s, out[k], 0, 0), page) != 0;
    }
    T_OK(!bad, "P=%d G=%d D=%d: %d pages", kv->P, kv->G, kv->D, bad);
    free(far), free(far_before), free(now);
}

static void test_pages(pool_case c)
{
    enum { PAGES = 11, SLOTS = 3, MAX = 400 };
    td_kv kv = {NULL, c.dtype, PAGES, c.P, c.G, c.D};
    size_t bytes = (size_t)SLOTS * PAGES * td_kv_page_bytes(&kv);
    uint8_t *host = block_alloc(bytes), *back = block_alloc(bytes);
    int32_t rows[MAX];
    for (size_t i = 0; i < bytes; i++) host[i] = (uint8_t)(i * 2654435761u >> 13);
    int32_t pages[] = {7, 2, 9, 0, 4};
    td_kv_rows r = {.kv = &kv, .slot0 = 1, .n_slots = 2, .head0 = c.G / 2, .n_heads = c.G - c.G / 2,
                    .n_tok = (uint32_t)(c.P + c.P / 2 + 1)};
    TD_CHECK(r.n_tok <= MAX);
    size_t n = td_cuda_rows_bytes(&r);
    uint8_t *want = block_alloc(n), *got = block_alloc(n);
    r.row = rows_of(rows, pages, c.P, c.P / 2, r.n_tok, 2);
    gather_plain(&r, host, rows, want);
    kv.base = dev_put(host, bytes);
    uint8_t *payload = (uint8_t *)dev_new(n + (size_t)c.odd) + c.odd;
    T_EQ(td_cuda_kv_gather(stream(), &r, payload), 0);
    T_OK(dev_get(got, payload, n) && !memcmp(got, want, n), "P=%d G=%d D=%d: %s", c.P, c.G, c.D,
         simt_last_error());
    /* Scatter into other pages, then gather from there; nothing else changes. */
    int32_t others[] = {1, 10, 3, 8, 6};
    r.row = rows_of(rows, others, c.P, c.P / 2, r.n_tok, 1);
    T_EQ(td_cuda_kv_scatter(stream(), &r, payload), 0);
    T_OK(dev_get(back, kv.base, bytes));
    gather_plain(&r, back, rows, got);
    T_OK(!memcmp(got, want, n));
    size_t changed = 0;
    for (size_t i = 0; i < bytes; i++) changed += back[i] != host[i];
    T_OK(changed > 0 && changed <= n);
    /* Pages 7 and 2 to 5 and 0, in every slot. */
    int32_t from[] = {7, 2}, to[] = {5, 0};
    T_EQ(td_cuda_kv_copy(stream(), &kv, dev_put(to, sizeof to), &kv, dev_put(from, sizeof from), 2, SLOTS),
         0);
    T_OK(dev_get(got, kv.base, 0) && dev_get(host, kv.base, bytes));
    size_t page = td_kv_page_bytes(&kv);
    for (int s = 0; s < SLOTS; s++)
        for (int i = 0; i < PAGES; i++) {
            int of = i == 5 ? 7 : i == 0 ? 2 : i;
            T_OK(!memcmp(host + at(&kv, s, i, 0, 0), back + at(&kv, s, of, 0, 0), page));
        }
    test_swap(&kv, host, bytes, SLOTS);
    dev_done();
    free(host), free(back), free(want), free(got);
}

static void test_refusals(void)
{
    float *x = dev_new(64);
    td_kv a = {(uint8_t *)x, TD_BF16, 1, 16, 1, 16}, b = a;
    b.P = 8;
    T_OK(td_cuda_kv_copy(stream(), &a, NULL, &b, NULL, 1, 1) != 0);
    td_kv_rows r = {.kv = &a, .n_slots = 1, .head0 = 1, .n_heads = 1, .n_tok = 3};
    T_OK(td_cuda_kv_gather(stream(), &r, x) != 0); /* there is one head */
    td_route_law law = {2, 3, TD_ROUTE_SOFTMAX, false, 1};
    T_OK(td_cuda_moe_route(stream(), &law, x, 1, (int32_t *)x, x) != 0);
    T_OK(td_cuda_sum_tree(stream(), x, 1, 3, 1, 1, 1, NULL, x, 1, false) != 0);
    T_EQ(td_cuda_rmsnorm(stream(), x, 1, x, 1e-5f, 0, 16, x, TD_F32, 16), 0); /* no rows: nothing */
    T_EQ(td_cuda_status(0, "x"), TD_OK);
    T_EQ(td_cuda_status(1, "x"), TD_ENOSUP);
    td_dev *host = NULL;
    const td_ops *ops = NULL;
    T_EQ(td_dev_open("host", 0, &host), TD_OK);
    T_EQ(td_cuda_ops_open(host, &ops), TD_ENOSUP);
    td_dev_close(host);
    dev_done();
}

/* A call that no kernel takes is told once, and nothing is queued behind it until it is. */
static void test_table_errors(void)
{
    const td_ops *o = NULL, *again = NULL;
    T_EQ(td_cuda_ops_open(dev(), &o), TD_OK);
    T_EQ(td_cuda_ops_open(dev(), &again), TD_EFULL);
    float *x = dev_new(64 * 4), host[64];
    rnd_fill(host, 64, 1, 1);
    T_EQ(dev()->upload(dev(), TD_STREAM_COMPUTE, x, host, sizeof host), TD_OK);
    o->sum_tree(NULL, x, 1, 3, 1, 1, 1, NULL, x, 1, false);
    o->rmsnorm(NULL, x, 64, x, 1e-5f, 1, 64, x, 64);
    T_EQ(td_cuda_ops_status(), TD_ENOSUP);
    float seen[64];
    T_OK(dev_get(seen, x, sizeof seen) && !memcmp(seen, host, sizeof host));
    T_EQ(td_cuda_ops_status(), TD_OK);
    /* A row of bias longer than half of the ring: the ring grows. */
    enum { N = 200000 };
    td_bias *bias = block_alloc(N * sizeof *bias);
    for (int i = 0; i < N; i++) bias[i] = (td_bias){i < 1 ? 7u : 100u, 50}; /* ids past V are passed over */
    td_sample_row row = {
        .temperature = 0, .top_p = 1, .repetition_penalty = 1, .logprobs = -1, .bias = bias, .n_bias = 4};
    td_sample_out out, *drawn = dev_new(sizeof out);
    row.n_bias = 4;
    o->sample(NULL, x, 64, 64, &row, 1, drawn);
    T_OK(dev_get(&out, drawn, sizeof out) && out.token == 7, "%d", out.token);
    td_penalty *pen = block_alloc(N * sizeof *pen);
    for (int i = 0; i < N; i++) pen[i] = (td_penalty){(uint32_t)i + 64, 1, 0};
    row.pen = pen, row.n_pen = N;
    for (int i = 0; i < 3; i++) {
        dev()->fill(dev(), TD_STREAM_COMPUTE, drawn, 0, sizeof out);
        o->sample(NULL, x, 64, 64, &row, 1, drawn);
        T_OK(dev_get(&out, drawn, sizeof out) && out.token == 7, "%d", out.token);
    }
    T_EQ(td_cuda_ops_status(), TD_OK);
    td_cuda_ops_close();
    free(bias), free(pen);
    dev_done();
}

int main(void)
{
    static const int widths[] = {1, 6, 64, 515, 2048, 4100};
    for (size_t i = 0; i < TD_COUNT(widths); i++)
        for (size_t k = 0; k < TD_COUNT(types); k++) test_add_rmsnorm(widths[i], types[k]);
    for (int a = TD_ACT_SILU; a <= TD_ACT_GELU_TANH; a++)
        for (size_t k = 0; k < TD_COUNT(types); k++)
            test_act((td_act)a, 5, types[k]), test_act((td_act)a, 1200, types[k]);
    test_rows();
    static const pool_case pools[] = {{TD_BF16, 16, 2, 64, 0},  {TD_F32, 1, 1, 16, 0},
                                      {TD_BF16, 5, 3, 20, 0},   {TD_F16, 16, 1, 6, 2},
                                      {TD_BF16, 64, 4, 128, 4}, {TD_BF16, 3, 1, 1, 2}};
    for (size_t i = 0; i < TD_COUNT(pools); i++) test_pages(pools[i]);
    test_refusals();
    test_table_errors();
    return T_DONE();
}
