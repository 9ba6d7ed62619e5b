// SPDX-License-Identifier: Apache-2.0
/* tests/simt/test_quant_cuda.c - kernels/cuda_quant.h: codes and scales bit for bit what the host makes of the
 * same f32, of norms and activations within their rounding; those of transformers' FP8 linear layers for the same
 * x; NaN and infinity stay in their row; values of codes. */
#include "kernels/cuda_quant.h"
#include "tests/simt/simt_c.h"
#include "tests/simt/support.h"
#include "worker/model/safetensors.h"

enum { MAX_T = 9, MAX_K = 1536 };

typedef struct got {
    uint8_t *code;
    float *scale;
    td_cuda_codes at; /* on the device */
} got;

static td_stream stream(void)
{
    return dev()->stream[TD_STREAM_COMPUTE];
}

static got got_open(int T, int K, int group)
{
    got g = {block_alloc((size_t)T * (size_t)K), floats(td_cuda_code_scales(T, K, group)), {0}};
    g.at = td_cuda_codes_in(dev_new(td_cuda_codes_bytes((size_t)K, T, K, group)), (size_t)K, T, K, group);
    return g;
}

static void got_fetch(got *g, int launched)
{
    const td_cuda_codes *c = &g->at;
    T_EQ(launched, 0);
    T_OK(dev_get(g->code, c->code, (size_t)c->T * (size_t)c->K), "codes: %s", simt_last_error());
    T_OK(dev_get(g->scale, c->scale, td_cuda_code_scales(c->T, c->K, c->group) * 4), "scales: %s",
         simt_last_error());
}

static void got_close(got *g)
{
    free(g->code), free(g->scale);
    dev_done();
}

static float scale_of(const float *x, int n)
{
    float most = 0;
    for (int i = 0; i < n; i++) most = fmaxf(most, fabsf(x[i]));
    return fmaxf(most / 448, 0x1p-126f);
}

/* Exact: bit for bit; else each value within a rounding of x, which itself differs by rounding. */
static void expect(const got *g, const float *x, bool exact, const char *what)
{
    const int T = g->at.T, K = g->at.K, group = g->at.group, n = group ? group : K;
    int bad = 0;
    for (int t = 0; t < T; t++)
        for (int k = 0; k < K; k++) {
            const float s = g->scale[td_cuda_code_scale_at(T, K, group, t, k / 128)], v = x[t * K + k],
                        want = scale_of(x + t * K + k / n * n, n);
            const uint8_t code = g->code[t * K + k];
            if (exact)
                bad += memcmp(&s, &want, 4) != 0 || code != td_f32_to_e4m3(v / want);
            else
                bad += !(fabsf(td_e4m3_to_f32(code) * s - v) <= fabsf(v) * 0x1.01p-4f + s * 0x1.01p-10f &&
                         fabsf(s / want - 1) < 1e-5f);
        }
    T_OK(bad == 0, "%s, %d x %d, groups of %d: %d of %d", what, T, K, group, bad, T * K);
}

static void fill(float *x, int n)
{
    uint64_t s = (uint64_t)n;
    for (int i = 0; i < n; i++) x[i] = rnd_float(&s, 1) * expf(rnd_float(&s, 5));
}

static void test_as_it_is(int T, int K, int group, td_dtype dtype)
{
    float *x = floats((size_t)T * (size_t)K);
    uint16_t *h = block_alloc((size_t)T * (size_t)K * 4);
    got g = got_open(T, K, group);
    fill(x, T * K);
    if (K > 128) memset(x + 128, 0, 128 * sizeof *x); /* a group of zeros */
    td_convert(h, dtype, x, TD_F32, (size_t)(T * K));
    td_convert(x, TD_F32, h, dtype, (size_t)(T * K));
    got_fetch(&g, td_cuda_quant(stream(), dev_put(h, (size_t)(T * K) * td_dtype_bytes(dtype)), dtype,
                                (size_t)K, &g.at));
    expect(&g, x, true, td_dtype_name(dtype));
    got_close(&g);
    free(x), free(h);
}

static void test_fused(int T, int K, int group)
{
    float *x = floats((size_t)T * 2 * (size_t)K), *w = floats((size_t)K), *y = floats((size_t)T * (size_t)K);
    got g = got_open(T, K, group);
    fill(x, T * 2 * K);
    fill(w, K);
    for (int t = 0; t < T; t++) {
        double sum = 0;
        for (int k = 0; k < K; k++) sum += (double)x[t * K + k] * (double)x[t * K + k];
        for (int k = 0; k < K; k++) y[t * K + k] = (float)(x[t * K + k] / sqrt(sum / K + 1e-5) * w[k]);
    }
    got_fetch(&g, td_cuda_rmsnorm_quant(stream(), dev_put(x, (size_t)(T * K) * 4), (size_t)K,
                                        dev_put(w, (size_t)K * 4), 1e-5f, &g.at));
    expect(&g, y, false, "norm");
    for (int t = 0; t < T; t++)
        for (int k = 0; k < K; k++) {
            double a = x[t * 2 * K + k];
            y[t * K + k] = (float)(a / (1 + exp(-a)) * x[t * 2 * K + K + k]);
        }
    got_fetch(&g, td_cuda_act_quant(stream(), TD_ACT_SILU, dev_put(x, (size_t)(T * 2 * K) * 4), 2 * (size_t)K,
                                    &g.at));
    expect(&g, y, false, "activation");
    got_close(&g);
    free(x), free(w), free(y);
}

/* Row 1 has a NaN, row 2 an infinity: the others' codes are as without, these rows' values are what a product
 * makes NaN. */
static void test_confined(int group)
{
    enum { T = 5, K = 256 };
    float *x = floats(T * K), *clean = floats(T * K);
    got g = got_open(T, K, group);
    fill(clean, T * K);
    memcpy(x, clean, T * K * sizeof *x);
    x[K + 7] = NAN;
    x[2 * K + 200] = INFINITY;
    got_fetch(&g, td_cuda_quant(stream(), dev_put(x, T * K * 4), TD_F32, K, &g.at));
    for (int t = 0; t < T; t++) {
        double sum = 0;
        for (int k = 0; k < K; k++)
            sum += td_e4m3_to_f32(g.code[t * K + k]) *
                   (double)g.scale[td_cuda_code_scale_at(T, K, group, t, k / 128)];
        T_OK(isfinite(sum) == (t != 1 && t != 2), "row %d: %g", t, sum);
    }
    uint16_t *back = block_alloc(T * K * 2), *d = dev_new(T * K * 2);
    T_EQ(td_cuda_dequant(stream(), &g.at, 1, d, K), 0);
    T_OK(dev_get(back, d, (T - 1) * K * 2), "values: %s", simt_last_error());
    int bad = 0;
    for (int i = 0; i < (T - 1) * K; i++) {
        int t = i / K + 1, k = i % K;
        float v = td_e4m3_to_f32(g.code[t * K + k]) * g.scale[td_cuda_code_scale_at(T, K, group, t, k / 128)],
              r = td_bf16_to_f32(back[i]);
        bad += isnan(v) ? !isnan(r) : td_f32_to_bf16(v) != back[i];
    }
    T_OK(bad == 0, "%d values of codes", bad);
    got_close(&g);
    free(x), free(clean), free(back);
}

/* x_i (bf16), its codes q_i and scales s_i. */
static void test_golden(const char *dir, int i, int group)
{
    td_safetensors *f = NULL;
    const td_st_tensor *t[3];
    char path[100], name[16];
    snprintf(path, sizeof path, "tests/golden/quantized/%s/golden.safetensors", dir);
    T_OK(td_safetensors_open(path, &f) == TD_OK, "%s", td_reason());
    if (!f) return;
    for (int k = 0; k < 3; k++) {
        snprintf(name, sizeof name, "%c_%d", "xqs"[k], i);
        t[k] = td_safetensors_find(f, name);
        TD_CHECK(t[k]);
    }
    const int T = (int)t[0]->shape[0], K = (int)t[0]->shape[1];
    got g = got_open(T, K, group);
    got_fetch(&g,
              td_cuda_quant(stream(), dev_put(t[0]->data, (size_t)(T * K) * 2), TD_BF16, (size_t)K, &g.at));
    const int wide = group ? K / group : 1;
    float *s = floats((size_t)(T * wide));
    memcpy(s, t[2]->data, (size_t)(T * wide) * sizeof *s);
    int bad = 0;
    for (int r = 0; r < T; r++)
        for (int b = 0; b < wide; b++)
            bad += g.scale[td_cuda_code_scale_at(T, K, group, r, b)] != s[r * wide + b];
    free(s);
    T_OK(bad == 0 && !memcmp(g.code, t[1]->data, (size_t)(T * K)), "%s: codes of x_%d, %d scales differ", dir,
         i, bad);
    got_close(&g);
    td_safetensors_close(f);
}

static void test_refused(void)
{
    got g = got_open(4, 256, 0);
    void *x = dev_new(4 * 256 * 4 + 64);
    td_cuda_codes odd = g.at;
    odd.K = 200;
    T_EQ(td_cuda_quant(stream(), x, TD_F32, 256, &odd), 1);
    odd = g.at, odd.group = 64;
    T_EQ(td_cuda_quant(stream(), x, TD_F32, 256, &odd), 1);
    T_EQ(td_cuda_quant(stream(), (char *)x + 4, TD_F32, 256, &g.at), 1);
    odd = g.at, odd.T = 0;
    T_EQ(td_cuda_quant(stream(), x, TD_F32, 256, &odd), 0);
    got_close(&g);
}

int main(void)
{
    static const int Ts[] = {1, 4, MAX_T}, Ks[] = {128, 384, MAX_K};
    for (size_t i = 0; i < TD_COUNT(Ts); i++)
        for (size_t k = 0; k < TD_COUNT(Ks); k++)
            for (int group = 0; group <= 128; group += 128) {
                test_as_it_is(Ts[i], Ks[k], group, TD_F32);
                test_as_it_is(Ts[i], Ks[k], group, TD_BF16);
                test_as_it_is(Ts[i], Ks[k], group, TD_F16);
                test_fused(Ts[i], Ks[k], group);
            }
    test_as_it_is(3, 48, 0, TD_F32);
    for (int i = 0; i < 3; i++) test_golden("fp8-row", i, 0);
    for (int i = 0; i < 2; i++) test_golden("fp8-block", i, 128);
    test_confined(0);
    test_confined(128);
    test_refused();
    td_dev_close(dev());
    return T_DONE();
}
