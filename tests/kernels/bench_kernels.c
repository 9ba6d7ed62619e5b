// SPDX-License-Identifier: Apache-2.0
/* Speed of the kernels beside the machine's limits. usage: bench_kernels [family] [gemm|slices|attn|rows|sample|all]
 * [threads] [part of the name] Each line: best of many short calls; bytes and flops; share of the roofline
 * max(bytes / read stream, flops / the family's multiply-add loop), the two limits being measured right before the group
 * (the machine's bandwidth changes by the minute). One thread: processor time, which others on the machine do not
 * touch. */
#include "tests/kernels/case_attn.h"
#include "tests/kernels/case_gemm.h"
#include "tests/kernels/case_sample.h"
#include "tests/kernels/support.h"
#include "worker/profile.h"
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <time.h>

static struct { double gb_s, gf_s; } limits;
static td_pool *pool;
static double budget_s = 0.3; /* per case */
static const char *only = ""; /* part of a case's name */

static double seconds(clockid_t of)
{
    struct timespec t;
    clock_gettime(of, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static double now_s(void) { return seconds(CLOCK_MONOTONIC); }
/* One member: this process's processor time. */
static double clock_s(void) { return seconds(td_pool_size(pool) > 1 ? CLOCK_MONOTONIC : CLOCK_PROCESS_CPUTIME_ID); }
static int64_t clock_us(void) { return (int64_t)(clock_s() * 1e6); }

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
    printf("%-34s %10.1f us  %8.1f GF/s  %6.1f GB/s  %5.1f %% of roofline\n", name, best_s * 1e6,
           flops / best_s * 1e-9, bytes / best_s * 1e-9, 100 * least / best_s);
    fflush(stdout);
}

static void group(const char *what, const td_ops *o)
{
    TD_CHECK(td_profile_read(pool, clock_us, (size_t)1 << 30, 4, &limits.gb_s) == TD_OK);
    limits.gb_s *= 1e-9;
    limits.gf_s = td_profile_multiply(pool, clock_us, o) * 1e-9;
    printf("-- %s (read %.1f GB/s, multiply-adds %.0f GF/s)\n", what, limits.gb_s, limits.gf_s);
}

/* Best time of fn(arg, i) over at least 3 and at most budget_s of calls. */
static double best_of(void (*fn)(void *, int), void *arg)
{
    double best = 1e9, until = now_s() + budget_s;
    for (int i = 0; i < 3 || (now_s() < until && i < 4000); i++) {
        double t = clock_s();
        fn(arg, i);
        t = clock_s() - t;
        if (t < best) best = t;
    }
    return best;
}

/* ---- gemm: weights always cold, rotating over a pool larger than the caches ---- */

enum { POOL_BYTES = 1536 << 20 };
typedef struct gemm_bench {
    const td_ops *o;
    gemm_case c;
    int M, copies, slices;
    char *weights;
    void *scratch;
    float *x, *y;
} gemm_bench;

static void gemm_call(void *arg, int i)
{
    gemm_bench *b = arg;
    size_t bytes = b->o->packed_bytes(b->c.N, b->c.K, b->slices, TD_BF16);
    td_weight w = {.N = b->c.N, .K = b->c.K, .dtype = b->o->packed_dtype(TD_BF16), .slices = b->slices};
    w.p = b->weights + (size_t)(i % b->copies) * bytes;
    b->o->linear(pool, b->scratch, &w, b->x, (size_t)b->c.K, b->M, b->y, (size_t)b->c.N, false);
}

static gemm_bench gemm_open(const td_ops *o)
{
    gemm_bench b = {.o = o,
                    .weights = huge_alloc(POOL_BYTES),
                    .x = huge_alloc(512 * 8192 * 4),
                    .y = huge_alloc(512 * 8192 * 4)};
    b.scratch = huge_alloc(o->scratch_bytes(512, 8192, 128, td_pool_size(pool)));
    uint16_t values[4096];
    uint64_t seed = 7;
    for (int i = 0; i < 4096; i++) values[i] = td_f32_to_bf16(rnd_float(&seed, 1));
    for (size_t i = 0; i < POOL_BYTES; i += sizeof values) memcpy(b.weights + i, values, sizeof values);
    rnd_fill(b.x, 512 * 8192, 8, 1);
    return b;
}

static void gemm_close(gemm_bench *b)
{
    free(b->weights), free(b->x), free(b->y), free(b->scratch);
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Eight slices of K against one chain, call by call in turn, where ranks add: o_proj and down_proj of 1b. */
static void bench_slices(const td_ops *o)
{
    enum { CALLS = 4000 };
    static double t[2][CALLS];
    gemm_bench b = gemm_open(o);
    for (size_t c = 0; c < 2; c++)
        for (b.M = 1; b.M <= 512; b.M = b.M == 1 ? 8 : b.M * 64) {
            int n = 0;
            b.c = (gemm_case){2048, c ? 8192 : 2048};
            b.copies = (int)(POOL_BYTES / o->packed_bytes(b.c.N, b.c.K, b.slices, TD_BF16));
            for (double until = now_s() + (b.M > 8 ? 40 : 10) * budget_s; n < 8 || (n < CALLS && now_s() < until); n++)
                for (int s = 0; s < 2; s++) {
                    b.slices = s ? 8 : 1;
                    double from = clock_s();
                    gemm_call(&b, 2 * n + s);
                    t[s][n] = clock_s() - from;
                }
            for (int s = 0; s < 2; s++) qsort(t[s], (size_t)n, sizeof t[s][0], by_value);
            printf("N=%d K=%d M=%-3d  one chain: least %8.1f quartile %8.1f us   8 slices: %+5.2f %% %+5.2f %%\n",
                   b.c.N, b.c.K, b.M, t[0][0] * 1e6, t[0][n / 4] * 1e6, 100 * (t[1][0] / t[0][0] - 1),
                   100 * (t[1][n / 4] / t[0][n / 4] - 1));
        }
    gemm_close(&b);
}

static void bench_gemm(const td_ops *o)
{
    gemm_bench b = gemm_open(o);
    for (size_t c = 0; c < TD_COUNT(gemm_model); c++) {
        b.c = gemm_model[c];
        size_t bytes = o->packed_bytes(b.c.N, b.c.K, b.slices, TD_BF16);
        b.copies = (int)(POOL_BYTES / bytes);
        char title[64];
        snprintf(title, sizeof title, "%s gemm N=%d K=%d", o->family, b.c.N, b.c.K);
        group(title, o);
        for (size_t m = 0; m < TD_COUNT(gemm_rows); m++) {
            b.M = gemm_rows[m];
            snprintf(title, sizeof title, "M=%d", b.M);
            line(title, best_of(gemm_call, &b), (double)bytes, 2.0 * b.M * b.c.N * b.c.K);
        }
    }
    gemm_close(&b);
}

/* ---- attention: many layers of one context, so that decode reads its KV from memory ---- */

typedef struct attn_bench {
    const td_ops *o;
    td_attn_args a;
    td_attn_seq seq[8];
    int layers;
    void *scratch;
} attn_bench;

static void attn_call(void *arg, int i)
{
    attn_bench *b = arg;
    b->a.slot = i % b->layers;
    b->o->attention(pool, b->scratch, &b->a);
}

static void attn_line(attn_bench *b, const char *name, int n_seq, int rows, int pos0)
{
    double flops = 0, bytes = 0;
    const attn_case *c = &attn_model;
    if (!strstr(name, only)) return;
    for (int s = 0; s < n_seq; s++) {
        b->seq[s].row0 = s * rows, b->seq[s].n_rows = rows, b->seq[s].pos0 = pos0;
        flops += 4.0 * c->D * c->H * (rows * (pos0 + 0.5 * (rows + 1)));
        bytes += 2.0 * c->G * c->D * (double)td_dtype_bytes(b->o->kv_dtype) * (pos0 + rows);
    }
    b->a.n_seq = n_seq;
    line(name, best_of(attn_call, b), bytes, flops);
}

static void bench_attn(const td_ops *o, int P)
{
    const attn_case *c = &attn_model;
    size_t HD = (size_t)(c->H * c->D);
    attn_bench b = {.o = o, .layers = 4};
    td_kv kv = {.dtype = o->kv_dtype, .P = P, .G = c->G, .D = c->D, .n_pages = c->tokens / P};
    size_t bytes = (size_t)b.layers * (size_t)kv.n_pages * td_kv_page_bytes(&kv);
    kv.base = huge_alloc(bytes);
    float value[256];
    rnd_fill(value, 256, 3, 1);
    for (size_t i = 0; i < bytes; i += 256 * td_dtype_bytes(kv.dtype))
        td_convert(kv.base + i, kv.dtype, value, TD_F32, 256);
    int32_t *table = malloc((size_t)kv.n_pages * 4);
    for (int i = 0; i < kv.n_pages; i++) table[i] = (i * 37) % kv.n_pages;
    float *q = huge_alloc(512 * HD * 4), *out = huge_alloc(512 * HD * 4);
    rnd_fill(q, 512 * HD, 4, 1);
    b.scratch = huge_alloc(o->scratch_bytes(512, 64, c->D, td_pool_size(pool)));
    for (int s = 0; s < 8; s++) b.seq[s].pages = table;
    b.a = (td_attn_args){.q = q,
                         .ldq = HD,
                         .out = out,
                         .ldo = HD,
                         .kv = &kv,
                         .seq = b.seq,
                         .H = c->H,
                         .G = c->G,
                         .D = c->D,
                         .scale = 0.125f};
    char title[64];
    snprintf(title, sizeof title, "%s attention, 32/8 heads of 64, P=%d", o->family, P);
    group(title, o);
    attn_line(&b, "decode, context 8192", 1, 1, 8191);
    attn_line(&b, "decode, context 1024", 1, 1, 1023);
    attn_line(&b, "decode, 8 x context 1024", 8, 1, 1023);
    attn_line(&b, "prefill 512 from empty", 1, 512, 0);
    attn_line(&b, "prefill 512 at 8192", 1, 512, 7680);
    free(kv.base), free(table), free(q), free(out), free(b.scratch);
}

/* ---- row-wise operations, for the shape of a 1b model ---- */

typedef struct rows_bench {
    const td_ops *o;
    int T;
    float *x, *y, *w;
    td_rope_args rope;
} rows_bench;

static void call_norm(void *arg, int i)
{
    rows_bench *b = arg;
    (void)i;
    b->o->rmsnorm(pool, b->x, 2048, b->w, 1e-5f, b->T, 2048, b->y, 2048);
}
static void call_rope(void *arg, int i)
{
    rows_bench *b = arg;
    (void)i;
    b->rope.T = b->T;
    b->o->rope_append(pool, &b->rope);
}
static void call_silu(void *arg, int i)
{
    rows_bench *b = arg;
    (void)i;
    b->o->silu_mul(pool, b->x, 16384, b->T, 8192, b->y, 8192);
}

static void bench_rows(const td_ops *o)
{
    rows_bench b = {.o = o,
                    .x = huge_alloc(512 * 16384 * 4),
                    .y = huge_alloc(512 * 16384 * 4),
                    .w = huge_alloc(8192 * 4)};
    float *cs = huge_alloc(512 * 64 * 4);
    static int32_t page[512], in[512];
    td_kv kv = {.dtype = o->kv_dtype, .P = 16, .G = 8, .D = 64, .n_pages = 32};
    kv.base = huge_alloc(32 * td_kv_page_bytes(&kv));
    rnd_fill(b.x, 512 * 16384, 1, 1), rnd_fill(b.w, 8192, 2, 1);
    for (int i = 0; i < 512 * 32; i++)
        cs[2 * i] = 1, cs[2 * i + 1] = 0; /* no rotation: values stay what they are, call after call */
    for (int t = 0; t < 512; t++) page[t] = t / 16, in[t] = t % 16;
    b.rope = (td_rope_args){b.y, 3072, 0, cs, NULL, NULL, NULL, 1e-5f, 32, 8, 64, 64, &kv, 0, page, in};
    group(o->family, o);
    for (b.T = 1; b.T <= 512; b.T *= 8) {
        char name[64];
        snprintf(name, sizeof name, "norm 2048, T=%d", b.T);
        line(name, best_of(call_norm, &b), b.T * 2048 * 8.0, 0);
        snprintf(name, sizeof name, "rope and append 32/8 x 64, T=%d", b.T);
        line(name, best_of(call_rope, &b), b.T * 3072 * 8.0, 0);
        snprintf(name, sizeof name, "silu 8192, T=%d", b.T);
        line(name, best_of(call_silu, &b), b.T * 8192 * 12.0, 0);
    }
    free(b.x), free(b.y), free(b.w), free(cs), free(kv.base);
}

/* ---- token choice over 128256 logits ---- */

enum { VOCAB = 128256 };
typedef struct sample_bench {
    const td_ops *o;
    float *logits;
    td_sample_row row;
} sample_bench;

static void call_sample(void *arg, int i)
{
    sample_bench *b = arg;
    td_sample_out out;
    b->row.position = (uint32_t)i;
    b->o->sample(pool, b->logits, VOCAB, VOCAB, &b->row, 1, &out);
}

static void bench_sample(const td_ops *o)
{
    sample_bench b = {.o = o, .logits = huge_alloc(VOCAB * 4)};
    rnd_fill(b.logits, VOCAB, 5, 2);
    group("token choice, one row of 128256 logits", o);
    for (size_t c = 0; c < TD_COUNT(sample_cases); c++)
        for (int logprobs = -1; logprobs < (c ? 0 : 21); logprobs += 21) {
            const sample_case *s = &sample_cases[c];
            b.row = (td_sample_row){.temperature = s->temperature,
                                    .top_p = s->top_p,
                                    .min_p = s->min_p,
                                    .top_k = s->top_k,
                                    .repetition_penalty = 1,
                                    .seed = 1,
                                    .logprobs = logprobs};
            char name[64];
            snprintf(name, sizeof name, "T=%g k=%d p=%g min %g lp %d", (double)s->temperature, s->top_k,
                     (double)s->top_p, (double)s->min_p, logprobs);
            line(name, best_of(call_sample, &b), VOCAB * 4.0, 0);
        }
    free(b.logits);
}

/* One member per CPU: left alone, both can share a CPU for seconds. */
static void pin_member(void *arg, int i, int member)
{
    (void)i;
    atomic_int *pinned = arg;
    static _Thread_local bool done;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET((unsigned)member, &set);
    if (!done && !pthread_setaffinity_np(pthread_self(), sizeof set, &set)) atomic_fetch_add(pinned, 1);
    done = true;
    for (int64_t until = (int64_t)(now_s() * 1e6) + 2000; (int64_t)(now_s() * 1e6) < until;) {}
}

int main(int argc, char **argv)
{
    const td_ops *o;
    if (td_ops_open(argc > 1 ? argv[1] : "auto", &o)) return 1;
    const char *what = argc > 2 ? argv[2] : "all";
    pool = td_pool_open(argc > 3 ? atoi(argv[3]) : 2);
    if (argc > 4) only = argv[4];
    atomic_int pinned = 0;
    for (int i = 0; i < 50 && atomic_load(&pinned) < td_pool_size(pool); i++)
        td_pool_for(pool, 2 * td_pool_size(pool), pin_member, &pinned);
    bool all = !strcmp(what, "all");
    if (all || !strcmp(what, "gemm")) bench_gemm(o);
    if (all || !strcmp(what, "slices")) bench_slices(o);
    if (all || !strcmp(what, "attn")) bench_attn(o, 16), bench_attn(o, 64);
    if (all || !strcmp(what, "rows")) bench_rows(o);
    if (all || !strcmp(what, "sample")) bench_sample(o);
    td_pool_close(pool);
    return 0;
}
