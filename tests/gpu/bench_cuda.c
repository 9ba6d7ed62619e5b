// SPDX-License-Identifier: Apache-2.0
/* tests/gpu/bench_cuda.c - speed of the CUDA kernels beside the two ceilings of the same run. One JSON object a line:
 *   {"case":..., "us":median, "gb_s":..., "tflop_s":..., "of_read":..., "of_product":..., "share":the larger,
 * "goal":...} and ratios of two of them, or to cuBLASLt by its own default: {"ratio":..., "value":..., "goal": or
 * "goal_at_most":...} Weights, pages and rows rotate over more memory than the L2 holds, or are larger. Median of 9
 * samples by events, each of enough launches for 2 ms. What goals are about comes first. Hopper's own kernels are
 * measured whether or not they are chosen yet. usage: bench_cuda [part of a case's name]. BENCH_TINY: the same cases, of
 * sizes that the shim can do. */
#include "common/clock.h"
#include "kernels/choose_cuda.h"
#include "kernels/cuda.h"
#include "kernels/cuda_attn.h"
#include "kernels/cuda_gemm.h"
#include "kernels/cuda_lt.h"
#include "tests/gpu/ceiling.h"
#include "tests/simt/support.h"

#ifdef BENCH_TINY
enum {
    SAMPLES = 1,
    SAMPLE_US = 1,
    COLD_BYTES = 0,
    READ_BYTES = 1 << 16,
    PIECE = 1 << 20,
    CEILING_N = 64,
    SHRINK = 128,
    WARM_READS = 1
};
#else
enum {
    SAMPLES = 9,
    SAMPLE_US = 2000,
    COLD_BYTES = 384 << 20,
    READ_BYTES = 1 << 30,
    PIECE = 16 << 20,
    CEILING_N = 8192,
    SHRINK = 1,
    WARM_READS = 500
};
#endif
static const char *only = "";
static double read_s, product_s; /* bytes and operations a second */

static td_stream stream(void)
{
    return dev()->stream[TD_STREAM_COMPUTE];
}

static void must(int code, const char *what)
{
    if (!code) return;
    printf("{\"error\":\"%s: code %d\"}\n", what, code);
    exit(1);
}

static void sync(void)
{
    if (dev()->sync(dev(), TD_STREAM_COMPUTE) != TD_OK) must(1, td_reason());
}

typedef int call_fn(void *arg, int i);

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double sample_us(call_fn *fn, void *arg, int n, int *at)
{
    static td_event *from, *to;
    double us = 0;
    if (!from) TD_CHECK(dev()->event_open(dev(), &from) == TD_OK && dev()->event_open(dev(), &to) == TD_OK);
    dev()->record(dev(), TD_STREAM_COMPUTE, from);
    for (int i = 0; i < n; i++) must(fn(arg, (*at)++), "launch");
    dev()->record(dev(), TD_STREAM_COMPUTE, to);
    sync();
    TD_CHECK(dev()->elapsed_us(dev(), from, to, &us) == TD_OK);
    return us / n;
}

static double median_us(call_fn *fn, void *arg)
{
    int at = 0, n = 1;
    double us[SAMPLES], once = sample_us(fn, arg, 1, &at);
    once = sample_us(fn, arg, 3, &at);
    if (once * n < SAMPLE_US) n = (int)(SAMPLE_US / (once + 0.5)) + 1;
    for (int i = 0; i < SAMPLES; i++) us[i] = sample_us(fn, arg, n, &at);
    qsort(us, SAMPLES, sizeof *us, ascending);
    return us[SAMPLES / 2];
}

/* Of two calls, whose samples take turns. */
static void median_of_both(call_fn *fn, void *arg, call_fn *other, void *other_arg, double *us,
                           double *other_us)
{
    double a[SAMPLES], b[SAMPLES];
    int at = 0, n = 1;
    double once = sample_us(fn, arg, 2, &at) + sample_us(other, other_arg, 2, &at);
    if (once * n < 2 * SAMPLE_US) n = (int)(2 * SAMPLE_US / (once + 0.5)) + 1;
    for (int i = 0; i < SAMPLES; i++) {
        a[i] = sample_us(fn, arg, n, &at);
        b[i] = sample_us(other, other_arg, n, &at);
    }
    qsort(a, SAMPLES, sizeof *a, ascending);
    qsort(b, SAMPLES, sizeof *b, ascending);
    *us = a[SAMPLES / 2], *other_us = b[SAMPLES / 2];
}

static bool wanted(const char *name)
{
    return strstr(name, only) != NULL;
}

static double report(const char *name, double us, double bytes, double flops, double goal)
{
    double of_read = bytes / (us * 1e-6) / read_s, of_product = product_s > 0 ? flops / (us * 1e-6) / product_s : 0;
    printf("{\"case\":\"%s\",\"us\":%.2f,\"gb_s\":%.1f,\"tflop_s\":%.2f,\"of_read\":%.3f,\"of_product\":%.3f,\"share\":%.3f", name,
           us, bytes / us * 1e-3, flops / us * 1e-6, of_read, of_product, fmax(of_read, of_product));
    if (goal > 0) printf(",\"goal\":%.2f", goal);
    printf("}\n");
    fflush(stdout);
    return us;
}

/* Device memory of a piece of the host's, repeated. */
static void *repeated(const void *host, size_t bytes)
{
    const size_t first = bytes < PIECE ? bytes : PIECE;
    char *p = dev_new(bytes);
    TD_CHECK(dev()->upload(dev(), TD_STREAM_COMPUTE, p, host, first) == TD_OK);
    for (size_t at = first, n; at < bytes; at += n) { /* what is there already doubles */
        n = bytes - at < at ? bytes - at : at;
        TD_CHECK(dev()->copy(dev(), TD_STREAM_COMPUTE, p + at, p, n) == TD_OK);
    }
    sync();
    return p;
}

/* bf16 of 0.5 to 2 and both signs: of zeros, or of equal values, a product takes less power and so less time. */
static void *values(size_t bytes)
{
    static uint16_t *host;
    if (!host) {
        host = block_alloc(PIECE);
        uint64_t r = 1;
        for (size_t i = 0; i < PIECE / 2; i++) host[i] = (uint16_t)(0x3f00u + (rnd_next(&r) & 0x80ffu));
    }
    return repeated(host, bytes);
}

/* The same as E4M3 codes, none of them NaN. */
static void *code_values(size_t bytes)
{
    static uint8_t *host;
    if (!host) {
        host = block_alloc(PIECE);
        uint64_t r = 2;
        for (size_t i = 0; i < PIECE; i++) host[i] = (uint8_t)(0x30u + (rnd_next(&r) & 0x8fu));
    }
    return repeated(host, bytes);
}

/* ---- ceilings ---- */

typedef struct stream_arg {
    char *p;
    unsigned *out;
} stream_arg;

static int stream_call(void *arg, int i)
{
    stream_arg *a = arg;
    (void)i;
    return td_cuda_read(stream(), a->p, READ_BYTES, a->out);
}

static int product_call(void *arg, int i)
{
    (void)i;
    return ceiling_product_run(arg);
}

static void ceilings(const char *when)
{
    enum { N = CEILING_N };
    stream_arg a = {values(READ_BYTES), dev_new(64)};
    for (int i = 0; i < WARM_READS; i++)
        must(stream_call(&a, i), "launch"); /* clocks rise from where they idle */
    sync();
    double r = READ_BYTES / (median_us(stream_call, &a) * 1e-6), m = 0;
    void *x = values((size_t)N * N * 2), *w = values((size_t)N * N * 2), *y = dev_new((size_t)N * N * 2);
    ceiling_product *p = NULL;
    const ceiling_args c = {.T = N, .N = N, .K = N, .x = x, .w = w, .y = y, .choices = 8};
    if (ceiling_product_open(stream(), &c, &p) == 0) {
        m = 2.0 * N * N * N / (median_us(product_call, p) * 1e-6);
        ceiling_product_close(p);
    }
    read_s = fmax(read_s, r), product_s = fmax(product_s, m);
    printf("{\"ceiling\":\"%s\",\"read_gb_s\":%.1f,\"product_tflop_s\":%.1f}\n", when, r * 1e-9, m * 1e-12);
    fflush(stdout);
    dev_done();
}

/* ---- products ---- */

typedef struct gemm_arg {
    td_cuda_weight w;
    td_cuda_gemm_args a;
    char *packed;
    size_t stride;
    int copies;
    bool hopper;
} gemm_arg;

static int gemm_call(void *arg, int i)
{
    gemm_arg *g = arg;
    g->w.p = g->packed + (size_t)(i % g->copies) * g->stride;
    return (g->hopper ? td_cuda_gemm_hopper : td_cuda_gemm)(stream(), &g->a);
}

static const char *type_name(td_cuda_wtype t)
{
    return t == TD_CUDA_W_BF16 ? "bf16" : t == TD_CUDA_W_E4M3_ROW ? "fp8" : "fp8 blocks";
}

/* n values of one. */
static float *ones(size_t n)
{
    float *v = floats(n);
    for (size_t i = 0; i < n; i++) v[i] = 1;
    float *p = dev_put(v, n * sizeof *v);
    free(v);
    return p;
}

static void bench_gemm(const char *what, int N, int K, td_cuda_wtype type, int T, bool hopper)
{
    char name[96];
    snprintf(name, sizeof name, "gemm %s %s T=%d%s", what, type_name(type), T, hopper ? " Hopper's" : "");
    if (!wanted(name) || (hopper && dev()->arch != 90)) return;
    gemm_arg g = {.w = {.N = N, .K = K, .type = type}, .hopper = hopper};
    g.stride = (td_cuda_gemm_packed_bytes(N, K, 0, type) + 255) / 256 * 256;
    g.copies = (int)((size_t)COLD_BYTES / g.stride) + 1;
    g.packed = (type == TD_CUDA_W_BF16 ? values : code_values)(g.stride * (size_t)g.copies);
    if (type != TD_CUDA_W_BF16) g.w.scale = ones((size_t)N * (size_t)(K + 127) / 128 + (size_t)N);
    size_t ws = td_cuda_gemm_ws_bytes(T, N, K);
    g.a = (td_cuda_gemm_args){.w = &g.w, .x = values((size_t)T * (size_t)K * 4), .x_is_f32 = true, .ldx = (size_t)K, .T = T,
                              .y = dev_new((size_t)T * (size_t)N * 4), .ldy = (size_t)N, .ws = dev_new(ws)};
    dev()->fill(dev(), TD_STREAM_COMPUTE, g.a.ws, 0, TD_CUDA_GEMM_COUNTERS * 4);
    double bytes = (double)N * K * (type == TD_CUDA_W_BF16 ? 2 : 1) + 4.0 * T * (N + K), flops = 2.0 * N * K * T;
    report(name, median_us(gemm_call, &g), bytes, flops, T <= 16 ? (type == TD_CUDA_W_BF16 ? 0.90 : 0.85) : 0);
    dev_done();
}

/* ---- cuBLASLt as the fast mode calls it ---- */

typedef struct lt_arg {
    td_cuda_choice *c;
    td_cuda_gemm_args a;
    const void *rows;
    const td_cuda_codes *codes;
} lt_arg;

static int lt_call(void *arg, int i)
{
    lt_arg *l = arg;
    (void)i;
    return td_cuda_choice_gemm(l->c, stream(), &l->a, l->rows, l->codes);
}

/* Beside the library by its own default, plain, on the same bytes. x is what its producer left: bf16, codes. */
static void bench_lt(td_cuda_choice *c, const char *what, int N, int K, td_cuda_wtype type, int T)
{
    char name[96];
    const bool coded = type != TD_CUDA_W_BF16;
    snprintf(name, sizeof name, "cublasLt path %s %s T=%d", what, type_name(type), T);
    if (!wanted(name)) return;
    td_cuda_weight w = {.N = N, .K = K, .type = type, .scale_rows = coded ? 1 : 0};
    if (type == TD_CUDA_W_E4M3_BLOCK) w.scale_rows = 128;
    w.p = (coded ? code_values : values)(td_cuda_gemm_packed_bytes(N, K, 0, type));
    if (coded)
        w.scale = ones((size_t)N * (size_t)(K / 128 + 1));
    else
        w.bias = ones((size_t)N);
    void *rows = dev_new(td_cuda_choice_copy_bytes(&w)), *y = dev_new((size_t)T * (size_t)N * 4);
    must(td_cuda_choice_copy(stream(), &w, rows), "copy");
    td_cuda_codes codes = td_cuda_codes_in(values((size_t)T * (size_t)K * 2 + 4096), (size_t)K, T, K,
                                           type == TD_CUDA_W_E4M3_BLOCK ? 128 : 0);
    lt_arg l = {c,
                {.w = &w, .x = codes.code, .ldx = (size_t)K, .T = T, .y = y, .ldy = (size_t)N},
                rows,
                coded ? &codes : NULL};
    if (coded)
        must(td_cuda_quant(stream(), values((size_t)T * (size_t)K * 4), TD_F32, (size_t)K, &codes), "codes");
    const ceiling_args plain = {.T = T,
                                .N = N,
                                .K = K,
                                .x = codes.code,
                                .w = rows,
                                .y = y,
                                .y_f32 = true,
                                .choices = 1,
                                .w_scale = coded ? w.scale : NULL,
                                .x_scale = coded ? codes.scale : NULL};
    const double bytes = (double)N * K * (coded ? 1 : 2) + (double)T * ((coded ? 1.0 : 2.0) * K + 4.0 * N),
                 flops = 2.0 * N * K * T;
    ceiling_product *p = NULL;
    double us, other;
    if (coded && td_cuda_choice_codes(c, &w, rows, T) <
                     0) { /* only what it is: the portable kernel is measured above */
        printf("{\"skipped\":\"%s: this device, or this cuBLASLt, has no product of codes\"}\n", name);
    } else if (type == TD_CUDA_W_E4M3_BLOCK || ceiling_product_open(stream(), &plain, &p) != 0) {
        report(name, median_us(lt_call, &l), bytes, flops, 0);
    } else {
        median_of_both(lt_call, &l, product_call, p, &us, &other);
        report(name, us, bytes, flops, 0);
        printf("{\"ratio\":\"%s to its default, speed\",\"value\":%.3f,\"goal\":1.00}\n", name, other / us);
        ceiling_product_close(p);
    }
    dev_done();
}

/* What the codes of a layer's activations cost: fused with what makes them, and by themselves. */
typedef struct codes_arg {
    float *x, *w;
    td_cuda_codes to;
} codes_arg;

/* Rows of one matrix in turn with another's: one and its codes may stay in the L2. */
static float *codes_rows(const codes_arg *c, int i)
{
    return c->x + (size_t)(i % 2) * (size_t)c->to.T * (size_t)c->to.K;
}
static int codes_call(void *arg, int i)
{
    codes_arg *c = arg;
    return td_cuda_quant(stream(), codes_rows(c, i), TD_F32, (size_t)c->to.K, &c->to);
}
static int norm_codes_call(void *arg, int i)
{
    codes_arg *c = arg;
    return td_cuda_rmsnorm_quant(stream(), codes_rows(c, i), (size_t)c->to.K, c->w, 1e-5f, &c->to);
}
static int act_codes_call(void *arg, int i)
{
    codes_arg *c = arg;
    (void)i;
    return td_cuda_act_quant(stream(), TD_ACT_SILU, c->x, 2 * (size_t)c->to.K, &c->to);
}

static void bench_codes(const char *name, call_fn *fn, int K, int group, double inputs)
{
    const int T = 4096 / SHRINK;
    if (!wanted(name)) return;
    codes_arg c = {values((size_t)T * 2 * (size_t)K * 4), ones((size_t)K), {0}};
    c.to = td_cuda_codes_in(dev_new(td_cuda_codes_bytes((size_t)K, T, K, group)), (size_t)K, T, K, group);
    report(name, median_us(fn, &c), (double)T * K * (4 * inputs + 1), 0, 0);
    dev_done();
}

typedef struct shape {
    const char *name;
    int N, K;
} shape;
static const shape shapes[] = {{"qkv 6144x4096", 6144, 4096},
                               {"o 4096x4096", 4096, 4096},
                               {"gate_up 28672x4096", 28672, 4096},
                               {"down 4096x14336", 4096, 14336}};

enum { N_SHAPES = SHRINK > 1 ? 1 : TD_COUNT(shapes) };

static void few_products(void)
{
    static const int few[] = {1, 8, 16, 32, 64};
    for (size_t k = 0; k < TD_COUNT(few); k++)
        for (size_t i = 0; i < N_SHAPES; i++)
            for (int t = 0; t < 3; t++) {
                static const td_cuda_wtype types[] = {TD_CUDA_W_BF16, TD_CUDA_W_E4M3_ROW,
                                                      TD_CUDA_W_E4M3_BLOCK};
                if (t == 0 || few[k] <= 16)
                    bench_gemm(shapes[i].name, shapes[i].N / SHRINK, shapes[i].K / SHRINK, types[t], few[k],
                               false);
            }
}

static void many_products(void)
{
    static const int many[] = {256, 1024, 4096};
    for (size_t i = 0; i < N_SHAPES; i++)
        for (size_t k = 0; k < TD_COUNT(many); k++)
            for (int hopper = 0; hopper < 2; hopper++)
                bench_gemm(shapes[i].name, shapes[i].N / SHRINK, shapes[i].K / SHRINK, TD_CUDA_W_BF16,
                           many[k] / (SHRINK > 1 ? 64 : 1), hopper);
}

static void lt_products(void)
{
    static const td_cuda_wtype types[] = {TD_CUDA_W_BF16, TD_CUDA_W_E4M3_ROW, TD_CUDA_W_E4M3_BLOCK};
    td_cuda_choice c;
    if (!td_cuda_lt_version()) {
        printf("{\"skipped\":\"cublasLt path: this build has no cuBLASLt\"}\n");
        return;
    }
    must(td_cuda_choice_open(dev(), true, 0, &c), "choice");
    for (size_t i = 0; i < N_SHAPES; i++)
        for (size_t t = 0; t < TD_COUNT(types); t++)
            for (int T = 1024; T <= 4096; T *= 4)
                bench_lt(&c, shapes[i].name, shapes[i].N / SHRINK, SHRINK > 1 ? 128 : shapes[i].K, types[t],
                         SHRINK > 1 ? T / 16 + 4 : T);
    td_cuda_choice_close(&c);
}

static void codes(void)
{
    bench_codes("codes 4096 rows of 4096", codes_call, 4096 / (SHRINK > 1 ? 32 : 1), 0, 1);
    bench_codes("norm + codes 4096 rows of 4096", norm_codes_call, 4096 / (SHRINK > 1 ? 32 : 1), 0, 1);
    bench_codes("norm + codes in groups 4096 rows of 4096", norm_codes_call, 4096 / (SHRINK > 1 ? 32 : 1),
                128, 1);
    bench_codes("silu + codes 4096 rows of 14336", act_codes_call, 14336 / (SHRINK > 1 ? 112 : 1), 0, 2);
    bench_codes("silu + codes in groups 4096 rows of 14336", act_codes_call, 14336 / (SHRINK > 1 ? 112 : 1),
                128, 2);
}

/* ---- attention ---- */

enum { HEADS = 32, KV_HEADS = 8, DIM = 128 };

typedef struct attn_arg {
    td_cuda_attn_args a;
    int32_t *redo; /* Hopper's kernel; NULL: the portable ones */
} attn_arg;

enum { MOST_BLOCKS = 1 << 16 };

static int attn_call(void *arg, int i)
{
    attn_arg *t = arg;
    (void)i;
    return t->redo ? td_cuda_attention_hopper(stream(), &t->a, t->redo, MOST_BLOCKS)
                   : td_cuda_attention(stream(), &t->a);
}

/* n sequences with `rows` new rows each; sequence i has len(i) tokens, the first one `longest`. */
static double bench_attn(const char *name, int n, int rows, int longest, int others, int P, double goal,
                         bool hopper)
{
    if (!wanted(name) || (hopper && dev()->arch != 90)) return 0;
    if (SHRINK > 1) n = n < 2 ? n : 2, longest = longest / SHRINK + 1, others = others / SHRINK + 1, rows = rows / SHRINK + 1;
    td_cuda_attn_seq *seq = td_xalloc((size_t)n * sizeof *seq);
    size_t pages = 0, slots = 0, tokens = 0;
    double flops = 0;
    for (int i = 0; i < n; i++) {
        int len = i ? others : longest;
        seq[i] = (td_cuda_attn_seq){i * rows, rows, len - rows, (int32_t)pages};
        pages += (size_t)(len + P - 1) / (size_t)P;
        tokens += (size_t)len;
        slots += td_attn_parts(rows, len - rows, 0, HEADS);
        flops += 4.0 * HEADS * DIM * rows * (len - (rows - 1) * 0.5);
    }
    bool few = rows * (HEADS / KV_HEADS) <= TD_CUDA_ATTN_FEW;
    int32_t *table = td_xalloc(pages * sizeof *table);
    for (size_t i = 0; i < pages; i++) table[i] = (int32_t)(i * 7919 % pages);
    if (pages % 7919 == 0)
        for (size_t i = 0; i < pages; i++) table[i] = (int32_t)(pages - 1 - i);
    td_kv kv = {NULL, TD_BF16, (int)pages, P, KV_HEADS, DIM};
    kv.base = values(pages * td_kv_page_bytes(&kv));
    size_t width = HEADS * DIM, T = (size_t)(n * rows), max_slots = few ? slots : 1;
    attn_arg t = {.redo = hopper ? dev_new(MOST_BLOCKS * 4) : NULL};
    if (hopper) TD_CHECK(dev()->fill(dev(), TD_STREAM_COMPUTE, t.redo, 0, MOST_BLOCKS * 4) == TD_OK);
    t.a = (td_cuda_attn_args){.q = values(T * width * 4),
                              .ldq = width,
                              .out = dev_new(T * width * 4),
                              .ldo = width,
                              .out_dtype = TD_F32,
                              .kv = &kv,
                              .seq = dev_put(seq, (size_t)n * sizeof *seq),
                              .n_seq = n,
                              .pages = dev_put(table, pages * sizeof *table),
                              .H = HEADS,
                              .G = KV_HEADS,
                              .D = DIM,
                              .scale = 0.088388f,
                              .T = (int)T,
                              .prompts = !few,
                              .few = few,
                              .max_slots = max_slots};
    void *plan = dev_new(td_cuda_attn_plan_bytes(n));
    t.a.plan = plan, t.a.ws = dev_new(td_cuda_attn_ws_bytes(max_slots, DIM));
    must(td_cuda_attn_plan(stream(), t.a.seq, n, HEADS, KV_HEADS, DIM, 0, max_slots, TD_CUDA_ATTN_FEW, plan),
         "plan");
    double us = report(name, median_us(attn_call, &t), (double)tokens * 2 * KV_HEADS * DIM * 2, flops, goal);
    free(seq), free(table);
    dev_done();
    return us;
}

static void attention(void)
{
    double p16 = bench_attn("decode attention B=32 ctx 4k page 16", 32, 1, 4096, 4096, 16, 0.90, false);
    double flat = bench_attn("decode attention B=32 ctx 4k contiguous", 32, 1, 4096, 4096, 4096, 0, false);
    double skew = bench_attn("decode attention 1x128k + 31x4k page 16", 32, 1, 131072, 4096, 16, 0, false);
    double even = bench_attn("decode attention B=32 ctx 8k page 16", 32, 1, 8064, 8064, 16, 0,
                             false); /* as many tokens */
    for (int hopper = 0; hopper < 2; hopper++) {
        bench_attn(hopper ? "prompt attention 16k causal page 16 Hopper's"
                          : "prompt attention 16k causal page 16",
                   1, 16384, 16384, 0, 16, 0.75, hopper);
        bench_attn(hopper ? "prompt attention chunk 512 of 32k page 16 Hopper's"
                          : "prompt attention chunk 512 of 32k page 16",
                   1, 512, 32768, 0, 16, 0.68, hopper);
    }
    bench_attn("decode attention B=1 ctx 32k page 16", 1, 1, 32768, 0, 16, 0, false);
    if (p16 > 0 && flat > 0)
        printf("{\"ratio\":\"page 16 to contiguous, speed\",\"value\":%.3f,\"goal\":0.97}\n", flat / p16);
    if (skew > 0 && even > 0)
        printf("{\"ratio\":\"skewed to uniform, time\",\"value\":%.3f,\"goal_at_most\":1.15}\n", skew / even);
    fflush(stdout);
}

/* ---- rows, tokens, pages ---- */

typedef struct row_arg {
    float *x, *y, *w, *cs;
    int32_t *ids, *pages, *place;
    td_sample_row *rows;
    td_sample_out *out;
    void *ws;
    td_kv kv;
} row_arg;

enum {
    ROWS = 4096 / SHRINK,
    E = 4096 / SHRINK,
    F = 14336 / SHRINK,
    V = 128256 / SHRINK,
    BATCH = SHRINK > 1 ? 2 : 64,
    QKV = 6144,
    KV = 2 * 8 * 128,
    SLOTS = 16
};

static int norm_call(void *arg, int i)
{
    row_arg *r = arg;
    (void)i;
    return td_cuda_add_rmsnorm(stream(), r->x, E, r->y, E, r->w, 1e-5f, ROWS, E, r->ws, TD_BF16, E);
}
static int norm_one(void *arg, int i)
{
    row_arg *r = arg;
    (void)i;
    return td_cuda_add_rmsnorm(stream(), r->x, E, r->y, E, r->w, 1e-5f, 1, E, r->ws, TD_BF16, E);
}
static int act_call(void *arg, int i)
{
    row_arg *r = arg;
    (void)i;
    return td_cuda_act_mul(stream(), TD_ACT_SILU, r->x, 2 * F, ROWS, F, r->ws, TD_BF16, F);
}
static int rope_call(void *arg, int i)
{
    row_arg *r = arg;
    (void)i;
    td_rope_args a = {.qkv = r->x, .ld = QKV, .T = ROWS, .cs = r->cs, .norm_eps = 1e-5f, .H = 32, .G = 8, .D = 128,
                      .rot_dim = 128, .kv = &r->kv, .row_page = r->pages, .row_in_page = r->ids};
    return td_cuda_rope_append(stream(), &a);
}
static int sample_call(void *arg, int i)
{
    row_arg *r = arg;
    (void)i;
    return td_cuda_sample(stream(), r->x, V, V, r->rows, BATCH, false, r->ws, r->out);
}
/* A slot after the other: one of them and its payload would stay in the L2. */
static int gather_call(void *arg, int i)
{
    row_arg *r = arg;
    td_kv_rows rows = {
        .kv = &r->kv, .row = r->place, .n_tok = ROWS, .slot0 = i % SLOTS, .n_slots = 1, .n_heads = r->kv.G};
    return td_cuda_kv_gather(stream(), &rows, r->ws);
}

static void bench_sample(const char *name, float temperature, float top_p, int top_k)
{
    if (!wanted(name)) return;
    td_sample_row rows[BATCH];
    for (int i = 0; i < BATCH; i++)
        rows[i] = (td_sample_row){.temperature = temperature, .top_p = top_p, .top_k = top_k, .repetition_penalty = 1,
                                  .seed = 5, .position = (uint32_t)i, .stream = 256, .logprobs = -1};
    float *x = floats((size_t)BATCH * V);
    rnd_fill(x, (size_t)BATCH * V, 3, 3);
    row_arg r = {.x = dev_put(x, (size_t)BATCH * V * 4), .rows = dev_put(rows, sizeof rows),
                 .out = dev_new(BATCH * sizeof(td_sample_out)), .ws = dev_new(td_cuda_sample_bytes(BATCH, V))};
    free(x);
    report(name, median_us(sample_call, &r), 4.0 * BATCH * V, 0, 0);
    dev_done();
}

static void rows(void)
{
    row_arg r = {.x = values((size_t)ROWS * (2 * F > QKV ? 2 * F : QKV) * 4), .y = values((size_t)ROWS * E * 4), .w = values(E * 4),
                 .cs = values(ROWS * 64 * 8), .ws = dev_new((size_t)ROWS * (F > KV ? F : KV) * 2)};
    int32_t *page = td_xalloc(ROWS * sizeof *page), *in = td_xalloc(ROWS * sizeof *in);
    r.kv = (td_kv){values((size_t)SLOTS * ROWS * KV * 2), TD_BF16, ROWS / 16, 16, 8, 128};
    for (int i = 0; i < ROWS; i++) page[i] = i / 16, in[i] = i % 16;
    int32_t *place = td_xalloc(ROWS * sizeof *place);
    for (int i = 0; i < ROWS; i++)
        place[i] = (ROWS / 16 - 1 - i / 16) * 16 + i % 16; /* pages in another order */
    r.place = dev_put(place, ROWS * sizeof *place);
    free(place);
    r.pages = dev_put(page, ROWS * sizeof *page), r.ids = dev_put(in, ROWS * sizeof *in);
    if (wanted("residual + norm 4096 rows")) report("residual + norm 4096 rows", median_us(norm_call, &r), 14.0 * ROWS * E, 0, 0);
    if (wanted("residual + norm 1 row")) report("residual + norm 1 row", median_us(norm_one, &r), 14.0 * E, 0, 0);
    if (wanted("silu 4096 rows")) report("silu 4096 rows", median_us(act_call, &r), 10.0 * ROWS * F, 0, 0);
    if (wanted("rope + append 4096 rows"))
        report("rope + append 4096 rows", median_us(rope_call, &r),
               ROWS * (8.0 * 40 * 128 + 4.0 * 8 * 128 + 4.0 * 8 * 128 + 512), 0, 0);
    if (wanted("gather 4096 tokens")) report("gather 4096 tokens", median_us(gather_call, &r), 2.0 * ROWS * 2 * 8 * 128 * 2, 0, 0);
    free(page), free(in);
    dev_done();
    bench_sample("sample 64 x 128256 greedy", 0, 1, 0);
    bench_sample("sample 64 x 128256 temperature 1", 1, 1, 0);
    bench_sample("sample 64 x 128256 top-k 50 top-p 0.9", 0.8f, 0.9f, 50);
}

/* As at the start of a worker: kernels are loaded by their first use. */
static void first_check(void)
{
    td_cuda_choice c;
    must(td_cuda_choice_open(dev(), true, 0, &c), "choice");
    int64_t start = td_now_us();
    must(td_cuda_choice_check(&c), "check of the kernels");
    printf("{\"took\":\"check of the kernels before use\",\"ms\":%.1f,\"goal_ms_at_most\":200}\n", (double)(td_now_us() - start) * 1e-3);
    td_cuda_choice_close(&c);
}

int main(int argc, char **argv)
{
    if (argc > 1) only = argv[1];
    td_dev *d = dev();
    printf("{\"device\":\"%s\",\"arch\":%d,\"sm\":%d,\"memory_gib\":%.1f}\n", d->name, d->arch, d->n_sm,
           (double)d->total_bytes / (1 << 30));
    if (!*only) first_check();
    ceilings("before");
    attention();
    few_products();
    lt_products();
    many_products();
    codes();
    rows();
    ceilings("after");
    (void)t_passed, (void)t_failed;
    return 0;
}
