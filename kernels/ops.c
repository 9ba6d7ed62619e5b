// SPDX-License-Identifier: Apache-2.0
/* kernels/ops.c - the families of this build and CPU, best last, and the check that precedes their use. */
#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include "kernels/amx.h"
#include "kernels/family.h"
#include "kernels/peak.h"
#include <math.h>
#include <pthread.h>
#include <stdlib.h>

enum { MAX_FAMILIES = 5 };

typedef struct family {
    const char *name, *numerics;
    const char *needs; /* for the error text */
    bool (*supported)(void);
    void (*fill)(td_ops *t);
    float (*law)(const float *x, const float *w, int K); /* one output of a product without slices; NULL: not checked */
} family;

static td_ops tables[MAX_FAMILIES];
static const td_ops *available[MAX_FAMILIES];
static int n_available;

static bool always(void)
{
    return true;
}

static void fill_ref(td_ops *t)
{
    t->full_rows = 64;
    td_gemm_fill_ref(t);
    td_attn_fill_ref(t);
    td_norm_rope_fill_ref(t);
    td_act_fill_ref(t);
    td_row_i8_fill_ref(t);
    td_embed_fill_ref(t);
    td_sample_fill_ref(t);
    td_moe_fill_ref(t);
}

static const td_ops *find(const char *name)
{
    for (int i = 0; i < n_available; i++)
        if (!strcmp(available[i]->family, name)) return available[i];
    return NULL;
}

/* ---- which of two that compute the same ---- */

enum { RATE_STEPS = 1000, RATE_ROUNDS = 5 };

/* Operations per microsecond of a family's multiply-add loop. */
static double rate(const char *name)
{
    int64_t t = td_spin_us();
    double ops = td_peak_multiply(name, RATE_STEPS);
    return ops / (double)TD_MAX(td_spin_us() - t, 1);
}

/* vdpbf16ps does the work of two multiply-adds, but on some CPUs takes four times as long as one (Emerald Rapids: one in
 * two cycles, against two in one). The bits are the same, so the choice is free. About 0.2 ms. */
static bool dot_product_pays(void)
{
    double dot = 0, fma = 0;
    for (int i = 0; i < RATE_ROUNDS; i++) {
        dot = TD_MAX(dot, rate("avx512bf16"));
        fma = TD_MAX(fma, rate("avx512"));
    }
    return dot > 0.9 * fma; /* the rest: two halves of each weight have to be taken apart first */
}

/* Is it faster than the families before it? */
static bool pays(const td_ops *t)
{
    return strcmp(t->family, "avx512bf16") != 0 || dot_product_pays();
}

/* ---- assembling ---- */

#if defined(__x86_64__)
static bool has_avx2(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}

static bool has_avx512(void)
{
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512cd");
}

bool td_has_avx512bf16(void)
{
    return has_avx512() && __builtin_cpu_supports("avx512bf16");
}

static void fill_avx2(td_ops *t)
{
    td_gemm_fill_avx2(t);
    td_attn_fill_avx2(t);
    td_norm_rope_fill_avx2(t);
    td_act_fill_avx2(t);
    td_sample_fill_avx2(t);
    td_moe_fill_avx2(t);
}

static void fill_avx512(td_ops *t)
{
    td_gemm_fill_avx512(t);
    td_attn_fill_avx512(t);
    td_norm_rope_fill_avx512(t);
    td_act_fill_avx512(t);
    td_sample_fill_avx512(t);
    td_moe_fill_avx512(t);
}

static void fill_avx512bf16(td_ops *t)
{
    fill_avx512(t);
    td_gemm_fill_avx512bf16(t);
    td_attn_fill_avx512bf16(t);
}

/* Products of bf16 matrices and attention on tiles; all else is the fastest other family's. */
static void fill_amx(td_ops *t)
{
    int i = n_available - 1;
    while (!pays(available[i])) i--;
    *t = *available[i];
    t->full_rows = 256;
    td_gemm_fill_amx(t);
    td_attn_fill_amx(t);
}

/* ---- the matrix laws of ops.h ---- */

static float law_chain(const float *x, const float *w, int K)
{
    float acc = 0;
    for (int k = 0; k < K; k += 2) {
        float x1 = k + 1 < K ? x[k + 1] : 0, w1 = k + 1 < K ? w[k + 1] : 0;
        acc = fmaf(x[k], w[k], fmaf(x1, w1, acc));
    }
    return acc;
}

static float law_amx(const float *x, const float *w, int K)
{
    float acc = 0;
    for (int run = 0; run < K; run += 32) {
        float s[2] = {0};
        for (int k = run; k < run + 32; k++) s[k & 1] = fmaf(k < K ? x[k] : 0, k < K ? w[k] : 0, s[k & 1]);
        acc = acc + (s[0] + s[1]);
    }
    return acc;
}
#endif

static const family families[] = {
    {"ref", "cpu-ref-f32", "nothing", always, fill_ref, NULL},
#if defined(__x86_64__)
    {"avx2", "cpu-x86-bf16", "AVX2 and FMA", has_avx2, fill_avx2, law_chain},
    {"avx512", "cpu-x86-bf16", "AVX-512 F, BW, CD, DQ and VL", has_avx512, fill_avx512, law_chain},
    {"avx512bf16", "cpu-x86-bf16", "AVX-512 BF16", td_has_avx512bf16, fill_avx512bf16, law_chain},
    {"amx", "cpu-amx-bf16", "AMX (tiles and BF16) and a kernel that lets a process use them", td_amx_supported, fill_amx,
     law_amx},
#endif
};

static pthread_once_t once = PTHREAD_ONCE_INIT;

static void fill_tables(void)
{
    for (size_t i = 0; i < TD_COUNT(families); i++) {
        if (!families[i].supported()) continue;
        td_ops *t = &tables[i];
        fill_ref(t);
        families[i].fill(t);
        t->family = families[i].name;
        t->numerics = families[i].numerics;
        available[n_available++] = t;
    }
}

const td_ops *td_ops_family(int i)
{
    pthread_once(&once, fill_tables);
    return i >= 0 && i < n_available ? available[i] : NULL;
}

/* ---- the check before use ----
 * A CPU, or an emulator, whose dot product rounds otherwise would silently leave the numerics id. Whole blocks of rows and
 * parts of them, runs of k and the rest, two panels. */

enum { CHECK_M = 37, CHECK_N = 40, CHECK_K = 99 };
static const int check_rows[] = {CHECK_M, 13, 1};

static bool keeps_law(const td_ops *t, float (*law)(const float *x, const float *w, int K))
{
    float w[CHECK_N * CHECK_K], x[CHECK_M * CHECK_K], want[CHECK_M * CHECK_N], y[CHECK_M * CHECK_N];
    uint32_t u = 1;
    for (size_t i = 0; i < TD_COUNT(w) + TD_COUNT(x); i++) {
        u = u * 1664525u + 1013904223u;
        float v = td_bf16_to_f32(td_f32_to_bf16(((float)(u >> 8) * 0x1p-24f - 0.5f) * (float)(1 << (u & 7))));
        if (i < TD_COUNT(w)) w[i] = v;
        else x[i - TD_COUNT(w)] = v;
    }
    for (int m = 0; m < CHECK_M; m++)
        for (int n = 0; n < CHECK_N; n++) want[m * CHECK_N + n] = law(x + m * CHECK_K, w + n * CHECK_K, CHECK_K);
    void *packed = aligned_alloc(64, td_round64(t->packed_bytes(CHECK_N, CHECK_K, 1, TD_F32)));
    void *scratch = aligned_alloc(64, td_round64(t->scratch_bytes(CHECK_M, CHECK_K, 16, 1)));
    td_pool *pool = td_pool_open(1);
    TD_CHECK(packed && scratch);
    t->pack(packed, w, TD_F32, CHECK_N, CHECK_K, 1, 0, CHECK_N);
    td_weight weight = {.N = CHECK_N, .K = CHECK_K, .dtype = t->packed_dtype(TD_F32), .p = packed, .slices = 1};
    bool same = true;
    for (size_t i = 0; i < TD_COUNT(check_rows); i++) {
        t->linear(pool, scratch, &weight, x, CHECK_K, check_rows[i], y, CHECK_N, false);
        same = same && !memcmp(y, want, (size_t)check_rows[i] * CHECK_N * sizeof *y);
    }
    td_pool_close(pool);
    free(packed);
    free(scratch);
    return same;
}

static const family *family_of(const td_ops *t)
{
    for (size_t i = 0; i < TD_COUNT(families); i++)
        if (!strcmp(families[i].name, t->family)) return &families[i];
    return NULL;
}

static bool usable(const td_ops *t)
{
    const family *f = family_of(t);
    if (!f->law || keeps_law(t, f->law)) return true;
    TD_WARN("kernel family %s does not keep the matrix law on this CPU: not used", t->family);
    return false;
}

/* The last family, of those with this id if one is given, that passes its check and pays; NULL: none. */
static const td_ops *best(const char *numerics)
{
    for (int i = n_available - 1; i >= 0; i--) {
        const td_ops *t = available[i];
        if (numerics && strcmp(t->numerics, numerics)) continue;
        if (usable(t) && pays(t)) return t;
    }
    return NULL;
}

td_status td_ops_open(const char *name, const td_ops **out)
{
    pthread_once(&once, fill_tables);
    if (!strcmp(name, "auto")) {
        *out = best(NULL); /* ref, the first, needs no check */
        return TD_OK;
    }
    for (size_t i = 0; i < TD_COUNT(families); i++) {
        if (strcmp(families[i].name, name)) continue;
        const td_ops *t = find(name);
        if (!t)
            return td_fail(TD_ENOSUP, "kernel family \"%s\" needs a CPU with %s", name, families[i].needs);
        if (!usable(t))
            return td_fail(TD_ENOSUP,
                           "kernel family \"%s\" computes otherwise than its numerics id on this CPU", name);
        *out = t;
        return TD_OK;
    }
    return td_fail(TD_ENOSUP, "kernel family \"%s\" is not in this build", name);
}

td_status td_ops_open_as(const char *numerics, const td_ops **out)
{
    pthread_once(&once, fill_tables);
    const td_ops *t = best(numerics);
    if (!t) return td_fail(TD_ENOSUP, "no kernel family of this CPU computes as %s", numerics);
    *out = t;
    return TD_OK;
}
