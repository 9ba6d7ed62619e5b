// SPDX-License-Identifier: Apache-2.0
/* Every operation that computes, of every family: its error against double is at most twice PyTorch's (case_error.h). */
#include "tests/kernels/case_error.h"

static void rmsnorm(const td_ops *o)
{
    enum { T = ERR_T, E = ERR_E };
    op_error e = error_begin(o->family, "rmsnorm", TD_F32);
    float *x = error_in(&e, 21, 3, T * E), *w = error_in(&e, 22, 1, E), *out = floats(T * E);
    double want[E];
    o->rmsnorm(team(2), x, E, w, 1e-5f, T, E, out, E);
    for (int t = 0; t < T; t++) {
        exact_norm(x + t * E, NULL, w, E, want);
        for (int i = 0; i < E; i++) error_add(&e, (double)out[t * E + i], want[i]);
    }
    free(out);
    error_end(&e);
}

static void silu_mul(const td_ops *o)
{
    enum { T = ERR_T, F = ERR_F };
    op_error e = error_begin(o->family, "silu_mul", TD_F32);
    float *x = error_in(&e, 31, 3, T * 2 * F), *out = floats(T * F);
    o->silu_mul(team(2), x, 2 * F, T, F, out, F);
    for (int t = 0; t < T; t++)
        for (int i = 0; i < F; i++) {
            double g = (double)x[t * 2 * F + i], u = (double)x[t * 2 * F + F + i];
            error_add(&e, (double)out[t * F + i], g / (1 + exp(-g)) * u);
        }
    free(out);
    error_end(&e);
}

/* q and k as the call leaves them; what goes to the pages is a rounding of that (test_rows.c). */
static void rope(const td_ops *o, bool norm)
{
    enum { T = ERR_T, H = ERR_H, G = ERR_G, D = ERR_D, W = (H + 2 * G) * D };
    op_error e = error_begin(o->family, norm ? "norm_rope" : "rope", TD_F32);
    float *x = error_in(&e, 41, 1, T * W), *cs = error_in(&e, 42, 1, T * D), *y = floats(T * W);
    float *qn = norm ? error_in(&e, 43, 1, D) : NULL, *kn = norm ? error_in(&e, 44, 1, D) : NULL;
    int32_t page[T], in[T];
    td_kv kv = {.dtype = o->kv_dtype, .n_pages = 2, .P = 16, .G = G, .D = D};
    kv.base = block_alloc(2 * td_kv_page_bytes(&kv));
    for (int t = 0; t < T; t++) page[t] = t / 16, in[t] = t % 16;
    memcpy(y, x, T * W * 4);
    o->rope_append(team(2), &(td_rope_args){.qkv = y, .ld = W, .T = T, .cs = cs, .q_norm = qn, .k_norm = kn, .norm_eps = 1e-5f, .H = H,
                                            .G = G, .D = D, .rot_dim = D, .kv = &kv, .row_page = page, .row_in_page = in});
    for (int t = 0; t < T; t++)
        for (int h = 0; h < H + G; h++) {
            const float *v = x + t * W + h * D, *got = y + t * W + h * D;
            double n[D];
            if (norm) exact_norm(v, NULL, h < H ? qn : kn, D, n);
            for (int d = 0; d < D && !norm; d++) n[d] = (double)v[d];
            for (int d = 0; d < D / 2; d++) {
                double c = (double)cs[t * D + 2 * d], s = (double)cs[t * D + 2 * d + 1];
                error_add(&e, (double)got[d], n[d] * c - n[d + D / 2] * s);
                error_add(&e, (double)got[d + D / 2], n[d] * s + n[d + D / 2] * c);
            }
        }
    free(y), free(kv.base);
    error_end(&e);
}

/* Whether 16-bit products are added up so that they are as near as PyTorch's f32 sums. The law of x86 is one chain over K
 * (1.8 times as far at K = 1024, unless in slices); on a device the inner sums are the tensor cores'. */
static bool sums_near(const td_ops *o, int slices)
{
    return is_ref(o) || !strcmp(o->numerics, "cpu-amx-bf16") || (slices > 1 && !strcmp(o->numerics, "cpu-x86-bf16"));
}

/* Inputs of `type`, added up in f32: beside a product of PyTorch in that type, and beside its sums in f32. */
static void linear(const td_ops *o, const char *op, td_dtype type, int slices)
{
    enum { T = ERR_T, N = ERR_N, K = ERR_K };
    if (o->packed_dtype(type) != type) return;
    op_error e = error_begin(o->family, op, type);
    bool codes = type == TD_E4M3;
    td_dtype other = codes ? TD_BF16 : type;
    float *x = error_in(&e, 51, 1, T * K), *w = error_in(&e, codes ? 54 : 52, codes ? 100 : 0.5f, N * K),
          *s = codes ? error_in(&e, 55, 1, N) : NULL, *b = error_in(&e, 53, 1, N), *y = floats(T * N);
    error_round(x, T * K, other), error_round(b, N, other);
    size_t bytes = o->packed_bytes(N, K, slices, type);
    void *stored = block_alloc(N * K * 4), *packed = block_alloc(bytes + N * 4), *scratch = block_alloc(o->scratch_bytes(T, K, 16, 2));
    td_convert(stored, type, w, TD_F32, N * K);
    for (int n = 0; n < N; n += 32) o->pack(packed, stored, type, N, K, slices, n, n + 32);
    td_weight weight = {.N = N, .K = K, .dtype = type, .p = packed, .bias = b, .slices = slices};
    if (codes) weight.scale_rows = 1, weight.scale_cols = K, weight.scale_at = bytes;
    for (int n = 0; n < N && codes; n++) {
        s[n] = fabsf(s[n]) * 0x1p-7f + 0x1p-7f;
        memcpy((char *)packed + bytes + (size_t)n * 4, s + n, 4);
    }
    o->linear(team(2), scratch, &weight, x, K, T, y, N, false);
    for (int t = 0; t < T; t++)
        for (int n = 0; n < N; n++) {
            double want = (double)b[n];
            for (int k = 0; k < K; k++) {
                float v = codes ? td_e4m3_to_f32(((uint8_t *)stored)[n * K + k]) * s[n] : w[n * K + k];
                want += (double)x[t * K + k] * (double)v;
            }
            error_add(&e, (double)y[t * N + n], want);
        }
    free(y), free(stored), free(packed), free(scratch);
    error_end(&e);
}

static void sum_tree(const td_ops *o)
{
    enum { T = ERR_T, N = ERR_N, P = ERR_PARTS };
    op_error e = error_begin(o->family, "sum_tree", TD_F32);
    float *p = error_in(&e, 61, 1, P * T * N), *b = error_in(&e, 53, 1, N), *y = floats(T * N);
    o->sum_tree(team(2), p, T * N, P, T, N, N, b, y, N, false);
    for (int i = 0; i < T * N; i++) {
        double want = (double)b[i % N];
        for (int k = 0; k < P; k++) want += (double)p[k * T * N + i];
        error_add(&e, (double)y[i], want);
    }
    free(y);
    error_end(&e);
}

static void attention(const td_ops *o)
{
    enum { H = ERR_H, G = ERR_G, D = ERR_D, L = ERR_L, P = 16, PAGES = (L + P - 1) / P };
    op_error e = error_begin(o->family, "attention", o->kv_dtype);
    float *q = error_in(&e, 71, 2, L * H * D), *k = error_in(&e, 72, 1, L * G * D), *v = error_in(&e, 73, 1, L * G * D),
          *out = floats(L * H * D);
    td_kv kv = {.dtype = o->kv_dtype, .n_pages = PAGES, .P = P, .G = G, .D = D};
    size_t unit = td_dtype_bytes(kv.dtype);
    int32_t pages[PAGES];
    kv.base = block_alloc(PAGES * td_kv_page_bytes(&kv));
    for (int i = 0; i < PAGES; i++) pages[i] = PAGES - 1 - i;
    for (int t = 0; t < L; t++)
        for (int g = 0; g < G; g++) {
            uint8_t *at = td_kv_page(&kv, 0, pages[t / P]) + (size_t)((g * P + t % P) * D) * unit;
            td_convert(at, kv.dtype, k + (t * G + g) * D, TD_F32, D);
            td_convert(at + (size_t)(G * P * D) * unit, kv.dtype, v + (t * G + g) * D, TD_F32, D);
        }
    td_attn_seq seq = {0, L, 0, pages};
    void *scratch = block_alloc(o->scratch_bytes(L, D, D, 2));
    o->attention(team(2), scratch, &(td_attn_args){.q = q, .ldq = H * D, .out = out, .ldo = H * D, .kv = &kv, .seq = &seq, .n_seq = 1, .H = H,
                                                   .G = G, .D = D, .scale = 0.125f});
    for (int t = 0; t < L; t++)
        for (int h = 0; h < H; h++) {
            double want[D];
            exact_attention(q, k, v, t, h, want);
            for (int d = 0; d < D; d++) error_add(&e, (double)out[(t * H + h) * D + d], want[d]);
        }
    free(out), free(kv.base), free(scratch);
    error_end(&e);
}

static void moe_logits(const td_ops *o)
{
    enum { T = ERR_T, E = ERR_E, X = ERR_X };
    op_error e = error_begin(o->family, "moe_logits", TD_F32);
    float *x = error_in(&e, 81, 1, T * E), *w = error_in(&e, 82, 1, X * E), *out = floats(T * X);
    o->moe_logits(team(2), &(td_table){X, E, TD_F32, w}, x, E, T, out);
    for (int t = 0; t < T; t++)
        for (int i = 0; i < X; i++) {
            double want = 0;
            for (int k = 0; k < E; k++) want += (double)x[t * E + k] * (double)w[i * E + k];
            error_add(&e, (double)out[t * X + i], want);
        }
    free(out);
    error_end(&e);
}

static int descending(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}

static void moe_route(const td_ops *o)
{
    enum { T = ERR_T, X = ERR_X, TOP = ERR_TOP };
    op_error e = error_begin(o->family, "moe_route", TD_F32);
    float *l = error_in(&e, 83, 2, T * X), w[T * TOP];
    int32_t ids[T * TOP];
    o->moe_route(team(2), &(td_route_law){X, TOP, TD_ROUTE_SOFTMAX, true, 1}, l, T, ids, w);
    for (int t = 0; t < T; t++) {
        double sum = 0;
        qsort(l + t * X, X, sizeof *l, descending);
        for (int i = 0; i < TOP; i++) sum += exp((double)l[t * X + i] - (double)l[t * X]);
        for (int i = 0; i < TOP; i++) error_add(&e, (double)w[t * TOP + i], exp((double)l[t * X + i] - (double)l[t * X]) / sum);
    }
    error_end(&e);
}

static void moe_combine(const td_ops *o)
{
    enum { T = ERR_T, E = ERR_E, TOP = ERR_TOP };
    op_error e = error_begin(o->family, "moe_combine", TD_F32);
    float *y = error_in(&e, 84, 1, T * TOP * E), *w = error_in(&e, 85, 1, T * TOP), *old = error_in(&e, 86, 1, T * E), *out = floats(T * E);
    int32_t row[T * TOP];
    for (int i = 0; i < T * TOP; i++) row[i] = i;
    memcpy(out, old, T * E * 4);
    o->moe_combine(team(2), y, E, row, w, T, TOP, E, out, E);
    for (int i = 0; i < T * E; i++) {
        double want = (double)old[i];
        for (int k = 0; k < TOP; k++) want += (double)w[i / E * TOP + k] * (double)y[(size_t)(i / E * TOP + k) * E + (size_t)(i % E)];
        error_add(&e, (double)out[i], want);
    }
    free(out);
    error_end(&e);
}

/* The likeliest and some others of each row, through score; sample reports the same numbers (test_sample.c). */
static void score(const td_ops *o)
{
    enum { T = ERR_T, V = ERR_V, IDS = 6 };
    op_error e = error_begin(o->family, "score", TD_F32);
    float *x = error_in(&e, 91, 3, (size_t)T * V);
    for (int t = 0; t < T; t++) {
        const float *row = x + (size_t)t * V;
        double sum = 0;
        for (int i = 0; i < V; i++) sum += exp((double)row[i]);
        for (int k = 0; k < IDS; k++) {
            int32_t id = (t * 353 + k * 1417) % V;
            td_sample_out out;
            o->score(team(2), row, V, V, &id, k ? 0 : TD_MAX_TOP_LOGPROBS, 1, &out);
            error_add(&e, (double)out.logprob, (double)row[id] - log(sum));
            for (int i = 0; i < out.n_top; i++) error_add(&e, (double)out.top[i].logprob, (double)row[out.top[i].id] - log(sum));
        }
    }
    error_end(&e);
}

int main(void)
{
    static const td_dtype types[] = {TD_F32, TD_BF16, TD_F16, TD_E4M3};
    const td_ops *o;
    for (int f = 0; (o = td_ops_family(f)); f++) {
        rmsnorm(o), silu_mul(o), rope(o, false), rope(o, true), sum_tree(o), attention(o);
        for (size_t i = 0; i < TD_COUNT(types); i++)
            for (int slices = 0; slices <= 8; slices += 8) linear(o, "linear", types[i], slices);
        for (size_t i = 1; i < 3; i++)
            for (int slices = 0; slices <= 8; slices += 8)
                if (sums_near(o, slices)) linear(o, "linear_sums", types[i], slices);
        moe_logits(o), moe_route(o), moe_combine(o), score(o);
    }
    return T_DONE();
}
