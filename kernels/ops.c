// SPDX-License-Identifier: Apache-2.0
/* kernels/ops.c - the families of this build and CPU, best last, and the check that precedes their use. */
#include "common/check.h"
#include "common/log.h"
#include "kernels/family.h"
#include <math.h>
#include <pthread.h>
#include <stdlib.h>

enum { MAX_FAMILIES = 5 };

typedef struct family {
    const char *name, *numerics;
    const char *needs; /* for the error text */
    bool (*supported)(void);
    void (*fill)(td_ops *t);
} family;

static bool always(void)
{
    return true;
}

static void fill_ref(td_ops *t)
{
    td_gemm_fill_ref(t);
    td_attn_fill_ref(t);
    td_norm_rope_fill_ref(t);
    td_act_fill_ref(t);
    td_embed_fill_ref(t);
    td_sample_fill_ref(t);
    td_moe_fill_ref(t);
}

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

static bool has_avx512bf16(void)
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
#endif

static const family families[] = {
    {"ref", "cpu-ref-f32", "nothing", always, fill_ref},
#if defined(__x86_64__)
    {"avx2", "cpu-x86-bf16", "AVX2 and FMA", has_avx2, fill_avx2},
    {"avx512", "cpu-x86-bf16", "AVX-512 F, BW, CD, DQ and VL", has_avx512, fill_avx512},
    {"avx512bf16", "cpu-x86-bf16", "AVX-512 BF16", has_avx512bf16, fill_avx512bf16},
#endif
};

static td_ops tables[MAX_FAMILIES];
static const td_ops *available[MAX_FAMILIES];
static int n_available;
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

static const td_ops *find(const char *name)
{
    for (int i = 0; i < n_available; i++)
        if (!strcmp(available[i]->family, name)) return available[i];
    return NULL;
}

/* ---- the check before use ----
 * A CPU, or an emulator, whose dot product rounds otherwise would silently leave the numerics id. */

enum { CHECK_M = 13, CHECK_N = 40, CHECK_K = 35 };

static float law(const float *x, const float *w)
{
    float acc = 0;
    for (int k = 0; k < CHECK_K; k += 2) {
        float x1 = k + 1 < CHECK_K ? x[k + 1] : 0, w1 = k + 1 < CHECK_K ? w[k + 1] : 0;
        acc = fmaf(x[k], w[k], fmaf(x1, w1, acc));
    }
    return acc;
}

static bool keeps_law(const td_ops *t)
{
    static float w[CHECK_N * CHECK_K], x[CHECK_M * CHECK_K];
    float y[CHECK_M * CHECK_N];
    uint32_t u = 1;
    for (size_t i = 0; i < TD_COUNT(w) + TD_COUNT(x); i++) {
        u = u * 1664525u + 1013904223u;
        float v = td_bf16_to_f32(td_f32_to_bf16(((float)(u >> 8) * 0x1p-24f - 0.5f) * (float)(1 << (u & 7))));
        if (i < TD_COUNT(w)) w[i] = v;
        else x[i - TD_COUNT(w)] = v;
    }
    void *packed = aligned_alloc(64, td_round64(t->packed_bytes(CHECK_N, CHECK_K, 1, TD_F32)));
    void *scratch = aligned_alloc(64, td_round64(t->scratch_bytes(CHECK_M, CHECK_K, 16, 1)));
    td_pool *pool = td_pool_open(1);
    TD_CHECK(packed && scratch);
    t->pack(packed, w, TD_F32, CHECK_N, CHECK_K, 1, 0, CHECK_N);
    td_weight weight = {.N = CHECK_N, .K = CHECK_K, .dtype = t->packed_dtype(TD_F32), .p = packed, .slices = 1};
    t->linear(pool, scratch, &weight, x, CHECK_K, CHECK_M, y, CHECK_N, false);
    bool same = true;
    for (int m = 0; m < CHECK_M; m++)
        for (int n = 0; n < CHECK_N; n++) {
            float want = law(x + m * CHECK_K, w + n * CHECK_K);
            same = same && !memcmp(&want, &y[m * CHECK_N + n], sizeof want);
        }
    td_pool_close(pool);
    free(packed);
    free(scratch);
    return same;
}

static bool usable(const td_ops *t)
{
    if (t->layout == TD_LAYOUT_ROWS || keeps_law(t)) return true;
    TD_WARN("kernel family %s does not keep the matrix law on this CPU: not used", t->family);
    return false;
}

td_status td_ops_open(const char *name, const td_ops **out)
{
    pthread_once(&once, fill_tables);
    if (!strcmp(name, "auto")) {
        int i = n_available - 1;
        while (i > 0 && !usable(available[i])) i--; /* ref, the first, needs no check */
        *out = available[i];
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
