// SPDX-License-Identifier: Apache-2.0
/* kernels/ops.c - the families of this build and CPU, best last in `all`, and the check that precedes their use. */
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
}

#if defined(__x86_64__)
static bool has_avx2(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}

static bool has_avx512(void)
{
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd");
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
}

static void fill_avx512(td_ops *t)
{
    td_gemm_fill_avx512(t);
    td_attn_fill_avx512(t);
    td_norm_rope_fill_avx512(t);
    td_act_fill_avx512(t);
    td_sample_fill_avx512(t);
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

td_status td_ops_open(const char *name, const td_ops **out)
{
    pthread_once(&once, fill_tables);
    if (strcmp(name, "auto")) {
        for (size_t i = 0; i < TD_COUNT(families); i++) {
            if (strcmp(families[i].name, name)) continue;
            const td_ops *t = find(name);
            if (!t) return td_fail(TD_ENOSUP, "kernel family \"%s\" needs a CPU with %s", name, families[i].needs);
            *out = t;
            return TD_OK;
        }
        return td_fail(TD_ENOSUP, "kernel family \"%s\" is not in this build", name);
    }
    *out = available[n_available - 1];
    return TD_OK;
}
