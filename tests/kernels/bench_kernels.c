// SPDX-License-Identifier: Apache-2.0
/* Speed of the kernels beside the machine's limits. usage: bench_kernels [family] [gemm|attn|rows|sample|all] [threads]
 * Each line: best of many short calls; bytes and flops; share of the roofline max(bytes / read stream, flops / dot product loop), the
 * two limits being measured right before the group (the machine's bandwidth changes by the minute). */
#include "tests/kernels/bench_probe.h"
#include "tests/kernels/case_gemm.h"
#include "tests/kernels/support.h"
#include <sys/mman.h>

static probe limits;
static td_pool *pool;
static double budget_s = 0.15; /* per case */

static void *huge_alloc(size_t bytes)
{
    size_t a = (size_t)2 << 20;
    void *p = aligned_alloc(a, (bytes + a - 1) / a * a);
    TD_CHECK(p != NULL);
    madvise(p, bytes, MADV_HUGEPAGE);
    memset(p, 0, bytes);
    return p;
}

static void line(const char *name, double best_s, double bytes, double flops)
{
    double least = TD_MAX(bytes / (limits.gb_s * 1e9), flops / (limits.gf_s * 1e9));
    printf("%-34s %10.1f us  %8.1f GF/s  %6.1f GB/s  %5.1f %% of roofline\n", name, best_s * 1e6, flops / best_s * 1e-9,
           bytes / best_s * 1e-9, 100 * least / best_s);
    fflush(stdout);
}

static void group(const char *what)
{
    limits = probe_run(pool);
    printf("-- %s (read %.1f GB/s, dot products %.0f GF/s)\n", what, limits.gb_s, limits.gf_s);
}

/* Best time of fn(arg, i) over at least 3 and at most budget_s of calls. */
static double best_of(void (*fn)(void *, int), void *arg)
{
    double best = 1e9, until = probe_now() + budget_s;
    for (int i = 0; i < 3 || (probe_now() < until && i < 4000); i++) {
        double t = probe_now();
        fn(arg, i);
        t = probe_now() - t;
        if (t < best) best = t;
    }
    return best;
}

/* ---- gemm: weights always cold, rotating over a pool larger than the caches ---- */

enum { POOL_BYTES = 256 << 20 };
typedef struct gemm_bench {
    const td_ops *o;
    gemm_case c;
    int M, copies;
    char *weights;
    void *scratch;
    float *x, *y;
} gemm_bench;

static void gemm_call(void *arg, int i)
{
    gemm_bench *b = arg;
    size_t bytes = b->o->packed_bytes(b->c.N, b->c.K, TD_BF16);
    td_weight w = {b->c.N, b->c.K, b->o->packed_dtype(TD_BF16), b->weights + (size_t)(i % b->copies) * bytes, NULL};
    b->o->linear(pool, b->scratch, &w, b->x, (size_t)b->c.K, b->M, b->y, (size_t)b->c.N, false);
}

static void bench_gemm(const td_ops *o)
{
    gemm_bench b = {.o = o, .weights = huge_alloc(POOL_BYTES), .x = huge_alloc(512 * 8192 * 4), .y = huge_alloc(512 * 8192 * 4)};
    b.scratch = huge_alloc(o->scratch_bytes(512, 8192, 128, td_pool_size(pool)));
    uint16_t values[4096];
    uint64_t seed = 7;
    for (int i = 0; i < 4096; i++) values[i] = td_f32_to_bf16(rnd_float(&seed, 1));
    for (size_t i = 0; i < POOL_BYTES; i += sizeof values) memcpy(b.weights + i, values, sizeof values);
    rnd_fill(b.x, 512 * 8192, 8, 1);
    for (size_t c = 0; c < TD_COUNT(gemm_model); c++) {
        b.c = gemm_model[c];
        size_t bytes = o->packed_bytes(b.c.N, b.c.K, TD_BF16);
        b.copies = (int)(POOL_BYTES / bytes);
        char title[64];
        snprintf(title, sizeof title, "%s gemm N=%d K=%d", o->family, b.c.N, b.c.K);
        group(title);
        for (size_t m = 0; m < TD_COUNT(gemm_rows); m++) {
            b.M = gemm_rows[m];
            snprintf(title, sizeof title, "M=%d", b.M);
            line(title, best_of(gemm_call, &b), (double)bytes, 2.0 * b.M * b.c.N * b.c.K);
        }
    }
    free(b.weights), free(b.x), free(b.y), free(b.scratch);
}

int main(int argc, char **argv)
{
    const td_ops *o;
    if (td_ops_open(argc > 1 ? argv[1] : "auto", &o)) return 1;
    const char *what = argc > 2 ? argv[2] : "all";
    pool = td_pool_open(argc > 3 ? atoi(argv[3]) : 2);
    bool all = !strcmp(what, "all");
    if (all || !strcmp(what, "gemm")) bench_gemm(o);
    td_pool_close(pool);
    return 0;
}
