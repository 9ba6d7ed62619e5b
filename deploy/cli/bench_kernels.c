/* tandem bench kernels - each large kernel of a model's shape on the family at hand, beside the machine's limits.
 *
 *   product NAME T=N     the layer's matrices and the output matrix, for N rows
 *   decode B x C         attention of B sequences of C tokens, one row each
 *   prompt N of C        attention of the last N rows of a sequence of C tokens
 *
 * Bytes are those that must be read (weights, keys and values), operations two a multiply-add; the share is of the
 * limit that is nearer. Matrices and pages rotate over more memory than caches hold. Times: the least of --repeats
 * runs, each of several calls, with one wait at the end. */
// SPDX-License-Identifier: Apache-2.0
#include "common/buf.h"
#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include "deploy/cli/cli.h"
#include "kernels/cuda.h"
#include "worker/boot.h"
#include "worker/devmem.h"
#include "worker/profile.h"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { COLD_BYTES = 256 << 20, MAX_T = 512, MAX_COPIES = 64, PAGE = 16, RUN_US = 20000 };

typedef struct bench {
    td_conf conf;
    td_boot boot;
    td_model_desc desc;
    double read_s, multiply_s;
    void *scratch, *x, *y; /* [MAX_T] rows of the widest input and output */
    FILE *table, *json;
} bench;

/* ---- time and report ---- */

typedef void call_fn(bench *b, void *arg, int i);

static td_status finish(bench *b)
{
    return b->boot.ops->wait ? b->boot.ops->wait() : TD_OK;
}

static td_status time_us(bench *b, call_fn *call, void *arg, double *out)
{
    int n = 1, at = 0;
    int64_t best = INT64_MAX;
    for (int i = -1; i < b->conf.repeats; i++) { /* the first run says how many calls make one */
        int64_t t = td_now_us();
        for (int k = 0; k < n; k++) call(b, arg, at++);
        TD_TRY(finish(b));
        t = TD_MAX(td_now_us() - t, 1);
        if (i < 0) n = (int)TD_MIN(RUN_US / t + 1, 1000);
        else best = TD_MIN(best, t);
    }
    *out = (double)best / n;
    return TD_OK;
}

static td_status report(bench *b, const char *name, call_fn *call, void *arg, double bytes, double ops)
{
    double us;
    TD_TRY(time_us(b, call, arg, &us));
    double of_read = bytes / us * 1e6 / b->read_s, of_multiply = b->multiply_s > 0 ? ops / us * 1e6 / b->multiply_s : 0;
    fprintf(b->table, "%-28s %10.1f us %9.2f GB/s %10.2f GFLOP/s %6.1f %%\n", name, us, bytes / us * 1e-3, ops / us * 1e-3,
            100 * TD_MAX(of_read, of_multiply));
    if (b->json)
        fprintf(b->json, "{\"case\":\"%s\",\"us\":%.2f,\"gb_s\":%.3f,\"gflop_s\":%.2f,\"of_bandwidth\":%.4f,\"of_arithmetic\":%.4f,"
                "\"family\":\"%s\",\"numerics\":\"%s\"}\n", name, us, bytes / us * 1e-3, ops / us * 1e-3, of_read, of_multiply,
                b->boot.ops->family, b->boot.ops->numerics);
    return TD_OK;
}

/* ---- memory ---- */

/* Values of about 1 where the kernels work. */
static td_status values(bench *b, size_t floats, void **out)
{
    float *host = td_xalloc(floats * sizeof *host);
    for (size_t i = 0; i < floats; i++) host[i] = (float)((i * 2654435761u >> 8) % 1000) / 1000 - 0.5f;
    td_status s = td_devmem_alloc(b->boot.dev, floats * sizeof *host, "a benchmark", out);
    if (s == TD_OK) s = td_devmem_put(b->boot.dev, *out, host, floats * sizeof *host);
    free(host);
    return s;
}

/* ---- products ---- */

typedef struct product {
    td_weight w[MAX_COPIES];
    int n, T;
} product;

static void run_product(bench *b, void *arg, int i)
{
    product *p = arg;
    const td_weight *w = &p->w[i % p->n];
    b->boot.ops->linear(b->boot.pool, b->scratch, w, b->x, (size_t)w->K, p->T, b->y, (size_t)w->N, false);
}

static td_status open_product(bench *b, product *p, int N, int K, uint8_t **block, void **beside)
{
    const td_ops *o = b->boot.ops;
    td_weight *w[MAX_COPIES];
    size_t bytes = (o->packed_bytes(N, K, 0, TD_BF16) + 255) / 256 * 256;
    uint16_t *raw = td_xalloc((size_t)N * (size_t)K * sizeof *raw);
    void *packed = aligned_alloc(256, bytes), *at = NULL;
    TD_CHECK(packed);
    for (size_t i = 0; i < (size_t)N * (size_t)K; i++) raw[i] = (uint16_t)(0x3c00u + (i * 2654435761u >> 16 & 0x80ffu));
    o->pack(packed, raw, TD_BF16, N, K, 0, 0, N);
    free(raw);
    p->n = (int)TD_MIN((size_t)COLD_BYTES / bytes + 1, (size_t)MAX_COPIES);
    td_status s = td_devmem_alloc(b->boot.dev, bytes * (size_t)p->n, "matrices", &at);
    *block = at;
    for (int i = 0; i < p->n && s == TD_OK; i++) {
        s = td_devmem_put(b->boot.dev, *block + (size_t)i * bytes, packed, o->packed_bytes(N, K, 0, TD_BF16));
        p->w[i] = (td_weight){.N = N, .K = K, .dtype = o->packed_dtype(TD_BF16), .p = *block + (size_t)i * bytes, .slices = 1};
        w[i] = &p->w[i];
    }
    free(packed);
    return s == TD_OK && o->beside ? o->beside(w, p->n, NULL, beside) : s;
}

static td_status products_of(bench *b, const char *name, int N, int K)
{
    static const int rows[] = {1, 8, 64, MAX_T};
    product p = {.n = 0};
    uint8_t *block = NULL;
    void *beside = NULL;
    td_status s = open_product(b, &p, N, K, &block, &beside);
    for (size_t i = 0; i < TD_COUNT(rows) && s == TD_OK; i++) {
        char what[64];
        snprintf(what, sizeof what, "product %s T=%d", name, p.T = rows[i]);
        s = report(b, what, run_product, &p, (double)b->boot.ops->packed_bytes(N, K, 0, TD_BF16), 2.0 * N * K * p.T);
    }
    td_devmem_free(b->boot.dev, beside);
    td_devmem_free(b->boot.dev, block);
    return s;
}

static td_status products(bench *b)
{
    const td_model_desc *d = &b->desc;
    int HD = d->H * d->D;
    TD_TRY(products_of(b, "qkv", HD + 2 * d->G * d->D, d->E));
    TD_TRY(products_of(b, "o", d->E, HD));
    TD_TRY(products_of(b, "gate_up", 2 * d->F, d->E));
    TD_TRY(products_of(b, "down", d->E, d->F));
    return products_of(b, "head", TD_MIN(d->V, 32768), d->E);
}

/* ---- attention ---- */

typedef struct attention {
    td_attn_args a;
    td_kv kv;
    td_attn_seq seq[64];
} attention;

static void run_attention(bench *b, void *arg, int i)
{
    attention *t = arg;
    (void)i;
    b->boot.ops->attention(b->boot.pool, b->scratch, &t->a);
}

static td_status attention_of(bench *b, const char *name, int n, int rows, int context)
{
    const td_model_desc *d = &b->desc;
    attention t = {.kv = {.dtype = b->boot.ops->kv_dtype, .P = PAGE, .G = d->G, .D = d->D}};
    int each = (context + PAGE - 1) / PAGE;
    int32_t *pages = td_xalloc((size_t)(n * each) * sizeof *pages);
    void *base = NULL;
    t.kv.n_pages = n * each;
    for (int i = 0; i < n * each; i++) pages[i] = n * each - 1 - i;
    for (int i = 0; i < n; i++) t.seq[i] = (td_attn_seq){i * rows, rows, context - rows, pages + i * each};
    size_t width = (size_t)d->H * (size_t)d->D, bytes = td_kv_page_bytes(&t.kv) * (size_t)t.kv.n_pages;
    t.a = (td_attn_args){.q = b->x, .ldq = width, .out = b->y, .ldo = width, .kv = &t.kv, .seq = t.seq, .n_seq = n, .H = d->H, .G = d->G,
                         .D = d->D, .scale = 0.1f};
    td_status s = td_devmem_alloc(b->boot.dev, bytes, "pages", &base);
    if (s == TD_OK && b->boot.dev) s = b->boot.dev->fill(b->boot.dev, TD_STREAM_COMPUTE, base, 0x3c, bytes);
    else if (s == TD_OK) memset(base, 0x3c, bytes);
    t.kv.base = base;
    double keys = context - (rows - 1) * 0.5, kv = 2.0 * d->G * d->D * (double)td_dtype_bytes(t.kv.dtype) * context * n;
    if (s == TD_OK) s = report(b, name, run_attention, &t, kv, 4.0 * d->H * d->D * rows * keys * n);
    td_devmem_free(b->boot.dev, base);
    free(pages);
    return s;
}

/* ---- the command ---- */

static td_status limits(bench *b)
{
    if (b->boot.dev) return td_cuda_probe(b->boot.dev, &b->read_s, &b->multiply_s);
    b->multiply_s = td_profile_multiply(b->boot.pool, NULL, b->boot.ops);
    return td_profile_read(b->boot.pool, NULL, (size_t)COLD_BYTES, 5, &b->read_s);
}

static td_status open_rows(bench *b)
{
    const td_model_desc *d = &b->desc;
    size_t HD = (size_t)d->H * (size_t)d->D, E = (size_t)d->E, F = (size_t)d->F, V = (size_t)TD_MIN(d->V, 32768);
    size_t in = TD_MAX(TD_MAX(HD, E), F), out = TD_MAX(TD_MAX(2 * F, V), HD + 2 * (size_t)d->G * (size_t)d->D);
    const td_ops *o = b->boot.ops;
    td_ops_room room = {.max_rows = MAX_T, .max_logits = 1, .N = (int)out, .K = (int)in, .V = d->V, .H = d->H, .G = d->G, .D = d->D,
                        .max_seqs = 64, .max_len = 4096, .page_size = PAGE};
    TD_TRY(td_devmem_alloc(b->boot.dev, o->scratch_bytes(MAX_T, (int)in, d->D, td_pool_size(b->boot.pool)), "scratch", &b->scratch));
    TD_TRY(values(b, in * MAX_T, &b->x));
    TD_TRY(values(b, out * MAX_T, &b->y));
    return o->reserve ? o->reserve(&room) : TD_OK;
}

static td_status run(bench *b)
{
    bool to_stdout = !strcmp(b->conf.json, "-");
    b->table = to_stdout ? stderr : stdout;
    if (b->conf.json[0]) b->json = to_stdout ? stdout : fopen(b->conf.json, "w");
    if (b->conf.json[0] && !b->json) return td_refuse(TD_EIO, "%s: %s", b->conf.json, strerror(errno));
    TD_TRY(td_model_desc_shape(b->conf.shape, &b->desc));
    TD_TRY(td_boot_ops(&b->conf, &b->boot));
    TD_TRY(limits(b));
    TD_TRY(open_rows(b));
    fprintf(b->table, "shape %s, kernels %s (%s), read %.1f GB/s, multiply-add %.0f GFLOP/s\n", b->conf.shape, b->boot.ops->family,
            b->boot.ops->numerics, b->read_s * 1e-9, b->multiply_s * 1e-9);
    TD_TRY(products(b));
    TD_TRY(attention_of(b, "decode 1 x 1024", 1, 1, 1024));
    TD_TRY(attention_of(b, "decode 32 x 1024", 32, 1, 1024));
    TD_TRY(attention_of(b, "prompt 512 of 512", 1, 512, 512));
    TD_TRY(attention_of(b, "prompt 512 of 4096", 1, 512, 4096));
    if (b->json && !to_stdout && fclose(b->json)) return td_refuse(TD_EIO, "%s: %s", b->conf.json, strerror(errno));
    return TD_OK;
}

int cmd_bench_kernels(int argc, char **argv)
{
    bench *b = td_xalloc(sizeof *b);
    int n = 0;
    td_status s = td_conf_parse(&b->conf, TD_CONF_BENCH_KERNELS, argc, argv, NULL, 0, &n);
    bool parsed = s == TD_OK, usage = s < 0;
    td_log_open("bench", parsed ? td_log_parse(b->conf.log_level) : TD_LOG_WARN);
    if (parsed) s = run(b);
    if (s < 0) fprintf(stderr, "tandem bench kernels: %s\n", td_reason_take());
    td_devmem_free(b->boot.dev, b->scratch);
    td_devmem_free(b->boot.dev, b->x);
    td_devmem_free(b->boot.dev, b->y);
    td_boot_close(&b->boot);
    td_conf_deinit(&b->conf);
    free(b);
    return usage ? 2 : s < 0;
}
