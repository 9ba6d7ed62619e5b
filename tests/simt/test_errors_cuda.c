// SPDX-License-Identifier: Apache-2.0
/* tests/simt/test_errors_cuda.c - results in bf16 and f16, and what kernels/cuda.h has beyond td_ops: the error against double
 * is at most twice PyTorch's in the same type (tests/kernels/test_errors.c has the rest). */
#include "kernels/cuda.h"
#include "kernels/cuda_attn.h"
#include "tests/kernels/case_error.h"
#include "tests/simt/simt_c.h"
#include "tests/simt/support.h"

static td_stream stream(void)
{
    return dev()->stream[TD_STREAM_COMPUTE];
}

/* n results of type t, as f32. */
static float *results(const void *device, td_dtype t, size_t n)
{
    void *raw = block_alloc(n * 4);
    float *out = floats(n);
    T_OK(dev_get(raw, device, n * td_dtype_bytes(t)), "%s", simt_last_error());
    td_convert(out, TD_F32, raw, t, n);
    free(raw);
    return out;
}

static void norm(td_dtype type, bool add)
{
    enum { T = ERR_T, E = ERR_E };
    op_error e = error_begin("cuda", add ? "add_rmsnorm" : "rmsnorm", type);
    float *x = error_in(&e, 21, 3, T * E), *d = add ? error_in(&e, 23, 1, T * E) : NULL, *w = error_in(&e, 22, 1, E);
    float *dx = dev_put(x, T * E * 4), *dw = dev_put(w, E * 4);
    void *o = dev_new(T * E * td_dtype_bytes(type));
    T_EQ(add ? td_cuda_add_rmsnorm(stream(), dx, E, dev_put(d, T * E * 4), E, dw, 1e-5f, T, E, o, type, E)
             : td_cuda_rmsnorm(stream(), dx, E, dw, 1e-5f, T, E, o, type, E),
         0);
    float *out = results(o, type, T * E);
    double want[E];
    for (int t = 0; t < T; t++) {
        exact_norm(x + t * E, add ? d + t * E : NULL, w, E, want);
        for (int i = 0; i < E; i++) error_add(&e, (double)out[t * E + i], want[i]);
    }
    free(out);
    dev_done();
    error_end(&e);
}

static double act_of(td_act a, double g)
{
    if (a == TD_ACT_SILU) return g / (1 + exp(-g));
    if (a == TD_ACT_GELU) return 0.5 * g * (1 + erf(g / sqrt(2)));
    return 0.5 * g * (1 + tanh(sqrt(2 / M_PI) * (g + 0.044715 * g * g * g)));
}

static void act(td_dtype type, td_act a)
{
    enum { T = ERR_T, F = ERR_F };
    static const char *const names[] = {"silu_mul", "gelu_mul", "gelu_tanh_mul"};
    op_error e = error_begin("cuda", names[a], type);
    float *x = error_in(&e, 31, 3, T * 2 * F);
    void *o = dev_new(T * F * td_dtype_bytes(type));
    T_EQ(td_cuda_act_mul(stream(), a, dev_put(x, T * 2 * F * 4), 2 * F, T, F, o, type, F), 0);
    float *out = results(o, type, T * F);
    for (int t = 0; t < T; t++)
        for (int i = 0; i < F; i++)
            error_add(&e, (double)out[t * F + i], act_of(a, (double)x[t * 2 * F + i]) * (double)x[t * 2 * F + F + i]);
    free(out);
    dev_done();
    error_end(&e);
}

/* Keys, values and the result of one type; rows of the prompt kernel, or (few) some by the one for generated rows. */
static void attention(td_dtype type, bool few)
{
    enum { H = ERR_H, G = ERR_G, D = ERR_D, L = ERR_L, P = 16, PAGES = (L + P - 1) / P, SLOTS = 4096 };
    op_error e = error_begin("cuda", "attention", type);
    float *q = error_in(&e, 71, 2, L * H * D), *k = error_in(&e, 72, 1, L * G * D), *v = error_in(&e, 73, 1, L * G * D);
    td_kv kv = {.dtype = type, .n_pages = PAGES, .P = P, .G = G, .D = D};
    uint16_t *host = block_alloc(PAGES * td_kv_page_bytes(&kv));
    int32_t pages[PAGES];
    for (int i = 0; i < PAGES; i++) pages[i] = i;
    for (int t = 0; t < L; t++)
        for (int g = 0; g < G; g++) {
            uint16_t *at = host + (size_t)(t / P) * td_kv_page_bytes(&kv) / 2 + (g * P + t % P) * D;
            td_convert(at, type, k + (t * G + g) * D, TD_F32, D);
            td_convert(at + G * P * D, type, v + (t * G + g) * D, TD_F32, D);
        }
    kv.base = dev_put(host, PAGES * td_kv_page_bytes(&kv));
    enum { STEP = 6, MOST = L / STEP };
    td_cuda_attn_seq seq[MOST];
    int n = 0;
    for (int i = 0; i < MOST; i++) /* STEP rows at a time; the whole prompt at once otherwise */
        if (few) seq[n++] = (td_cuda_attn_seq){i * STEP, STEP, i * STEP, 0};
    if (!few) seq[n++] = (td_cuda_attn_seq){0, L, 0, 0};
    void *d_seq = dev_put(seq, sizeof seq[0] * (size_t)n), *plan = dev_new(td_cuda_attn_plan_bytes(n)), *o = dev_new(L * H * D * 2);
    T_EQ(td_cuda_attn_plan(stream(), d_seq, n, H, G, D, 0, SLOTS, few ? TD_CUDA_ATTN_FEW : 0, plan), 0);
    td_cuda_attn_args a = {.q = dev_put(q, L * H * D * 4), .ldq = H * D, .out = o, .ldo = H * D, .out_dtype = type, .kv = &kv, .seq = d_seq,
                           .n_seq = n, .pages = dev_put(pages, sizeof pages), .H = H, .G = G, .D = D, .scale = 0.125f, .T = L,
                           .prompts = true, .few = few, .plan = plan, .ws = dev_new(td_cuda_attn_ws_bytes(SLOTS, D)), .max_slots = SLOTS};
    T_EQ(td_cuda_attention(stream(), &a), 0);
    float *out = results(o, type, L * H * D);
    for (int t = 0; t < L; t++)
        for (int h = 0; h < H; h++) {
            double want[D];
            exact_attention(q, k, v, t, h, want);
            for (int d = 0; d < D; d++) error_add(&e, (double)out[(t * H + h) * D + d], want[d]);
        }
    free(out), free(host);
    dev_done();
    error_end(&e);
}

int main(void)
{
    static const td_dtype types[] = {TD_F32, TD_BF16, TD_F16};
    for (size_t i = 0; i < TD_COUNT(types); i++) {
        norm(types[i], false), norm(types[i], true);
        for (int a = TD_ACT_SILU; a <= TD_ACT_GELU_TANH; a++) act(types[i], (td_act)a);
        for (int few = 0; few < 2 && types[i] != TD_F32; few++) attention(types[i], few);
    }
    return T_DONE();
}
