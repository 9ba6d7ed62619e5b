// SPDX-License-Identifier: Apache-2.0
/* tests/simt/test_products_cuda.c - products of the CUDA table in the device's memory: the experts' in one call
 * are those of one call each, bit for bit, and neither waits for the device nor brings anything back; their lists
 * follow the weights. Slices of K on one rank or several, of any width: the same bits (of codes:
 * of whole chunks of 32 columns, others are refused). Whole models whose operations
 * write operands of products (td_operand_ops) against the same without: the same bits. */
#include "kernels/choose_cuda.h"
#include "kernels/cuda.h"
#include "tests/simt/simt_c.h"
#include "tests/simt/support.h"
#include "tests/worker/support_step.h"
#include "worker/ranks.h"

static const td_ops *cuda;

/* ---- waits, counted ---- */

static struct {
    td_status (*sync)(td_dev *, td_stream_kind);
    td_status (*download)(td_dev *, td_stream_kind, void *, const void *, size_t);
    int waits, uploads;
    td_status (*upload)(td_dev *, td_stream_kind, void *, const void *, size_t);
} real;

static td_status counted_sync(td_dev *d, td_stream_kind s)
{
    real.waits++;
    return real.sync(d, s);
}
static td_status counted_download(td_dev *d, td_stream_kind s, void *dst, const void *src, size_t n)
{
    real.waits++;
    return real.download(d, s, dst, src, n);
}
static td_status counted_upload(td_dev *d, td_stream_kind s, void *dst, const void *src, size_t n)
{
    real.uploads++;
    return real.upload(d, s, dst, src, n);
}

static void count_from_here(void)
{
    if (!real.sync) {
        real.sync = dev()->sync, real.download = dev()->download, real.upload = dev()->upload;
        dev()->sync = counted_sync, dev()->download = counted_download, dev()->upload = counted_upload;
    }
    real.waits = real.uploads = 0;
}

/* ---- experts ---- */

enum { X = 7, MAX_ROWS = 150 };

typedef struct expert_case {
    int N, K;
    td_dtype from;
    int scale_rows, scale_cols;
    bool bias;
    int row0[X + 1];
} expert_case;

static const expert_case cases[] = {
    {40, 144, TD_BF16, 0, 0, false, {0, 3, 3, 4, 20, 20, 25, 29}},
    {33, 72, TD_F16, 0, 0, true, {0, 0, 70, 70, 71, 140, 150, 150}}, /* many to some */
    {96, 264, TD_E4M3, 1, 264, true, {0, 5, 9, 9, 9, 10, 12, 13}},
    {96, 264, TD_E4M3, 32, 128, false, {0, 5, 50, 50, 50, 90, 130, 149}},
    {24, 64, TD_BF16, 0, 0, true, {0, 0, 0, 0, 0, 0, 0, 0}},         /* none at all */
    {24, 64, TD_BF16, 0, 0, false, {2, 2, 9, 9, 12, 12, 12, 12}},    /* the first rows are nobody's */
};

/* Packed on the device: as the loader lays a weight out, scales behind the codes. */
static td_weight make_weight(const expert_case *c, uint64_t seed)
{
    size_t n = (size_t)c->N * (size_t)c->K, packed = cuda->packed_bytes(c->N, c->K, 0, c->from), at = (packed + 63) / 64 * 64;
    td_weight w = {.N = c->N, .K = c->K, .dtype = cuda->packed_dtype(c->from), .scale_rows = c->scale_rows, .scale_cols = c->scale_cols};
    size_t scales = td_weight_scale_count(&w), all = at + scales * 4;
    float *v = floats(n);
    void *stored = block_alloc(n * 4);
    char *image = block_alloc(all);
    rnd_fill(v, n, seed, 1);
    td_convert(stored, c->from, v, TD_F32, n);
    cuda->pack(image, stored, c->from, c->N, c->K, 0, 0, c->N);
    rnd_fill((float *)(void *)(image + at), scales, seed + 1, 1);
    w.p = dev_put(image, all);
    if (scales) w.scale_at = at;
    if (c->bias) w.bias = dev_put(v, (size_t)c->N * 4);
    free(v), free(stored), free(image);
    return w;
}

static void test_experts(const expert_case *c)
{
    td_weight *w = malloc(X * sizeof *w); /* at a place that another case may have had */
    size_t in = (size_t)MAX_ROWS * (size_t)c->K, out = (size_t)MAX_ROWS * (size_t)c->N;
    float *x = floats(in), *y = floats(out), *want = floats(out);
    rnd_fill(x, in, 3, 1);
    for (int e = 0; e < X; e++) w[e] = make_weight(c, (uint64_t)e * 7 + 1);
    const int32_t *row0 = dev_put(c->row0, sizeof c->row0);
    memset(y, 0xff, out * 4);
    const float *dx = dev_put(x, in * 4);
    float *one = dev_put(y, out * 4), *all = dev_put(y, out * 4);
    for (int e = 0; e < X; e++)
        cuda->linear(NULL, NULL, &w[e], dx + (size_t)c->row0[e] * (size_t)c->K, (size_t)c->K, c->row0[e + 1] - c->row0[e],
                     one + (size_t)c->row0[e] * (size_t)c->N, (size_t)c->N, false);
    td_grouped g = {w, X, row0, MAX_ROWS, dx, (size_t)c->K, all, (size_t)c->N, TD_F32};
    cuda->linear_grouped(cuda, NULL, NULL, &g); /* workspaces may grow here */
    T_OK(dev_get(want, one, out * 4) && dev_get(y, all, out * 4) && td_cuda_ops_status() == TD_OK);
    T_OK(!memcmp(want, y, out * 4), "%d x %d: experts together and one by one", c->N, c->K);

    count_from_here();
    for (int i = 0; i < 3; i++) cuda->linear_grouped(cuda, NULL, NULL, &g);
    T_OK(real.waits == 0 && real.uploads == 0, "%d waits, %d uploads", real.waits, real.uploads);

    td_weight second = w[2]; /* experts change places: the lists follow, without a wait */
    w[2] = w[1], w[1] = second;
    real.waits = real.uploads = 0;
    cuda->linear_grouped(cuda, NULL, NULL, &g);
    cuda->linear_grouped(cuda, NULL, NULL, &g);
    T_OK(real.waits == 0 && real.uploads == 1, "%d waits, %d uploads", real.waits, real.uploads);
    for (int e = 1; e < 3; e++)
        cuda->linear(NULL, NULL, &w[e], dx + (size_t)c->row0[e] * (size_t)c->K, (size_t)c->K, c->row0[e + 1] - c->row0[e],
                     one + (size_t)c->row0[e] * (size_t)c->N, (size_t)c->N, false);
    T_OK(dev_get(want, one, out * 4) && dev_get(y, all, out * 4) && td_cuda_ops_status() == TD_OK);
    T_OK(!memcmp(want, y, out * 4), "%d x %d: after a change of places", c->N, c->K);
    free(w), free(x), free(y), free(want);
    dev_done();
}

/* A stored matrix [N, all]: values, or codes with scales of rows or of blocks of 128 columns by `rows` rows. */
typedef struct stored {
    td_dtype type;
    int N, all, scale_rows; /* codes: 1 or 32 */
    char *p;
    float *scale; /* [ceil(N / scale_rows)][ceil(all / 128), or 1] */
} stored;

enum { SCALE_COLS = 128 };

/* The scales of columns [k0, k0 + K), as the loader cuts them: of the largest power of two up to 128 that k0 allows. */
static void put_scales(const stored *m, int k0, int K, td_weight *w, float *to)
{
    const int cols = (m->all + SCALE_COLS - 1) / SCALE_COLS;
    for (int n = 0; n < m->N; n += m->scale_rows)
        for (int k = 0; k < K; k += w->scale_cols)
            *to++ = m->scale_rows == 1 ? m->scale[n] : m->scale[n / m->scale_rows * cols + (k0 + k) / SCALE_COLS];
}

/* Columns [k0, k0 + K) in slices, packed by the table. */
static td_weight make_columns(const stored *m, int k0, int K, int slices)
{
    const size_t each = td_dtype_bytes(m->type), N = (size_t)m->N, at = (cuda->packed_bytes(m->N, K, slices, m->type) + 63) / 64 * 64;
    td_weight w = {.N = m->N, .K = K, .dtype = m->type, .slices = slices};
    if (m->scale) {
        w.scale_rows = m->scale_rows, w.scale_cols = m->scale_rows == 1 ? K : SCALE_COLS, w.scale_at = at;
        while (m->scale_rows > 1 && k0 % w.scale_cols) w.scale_cols /= 2;
    }
    const size_t bytes = at + td_weight_scale_count(&w) * 4;
    char *part = block_alloc(N * (size_t)K * each), *packed = block_alloc(bytes);
    for (size_t n = 0; n < N; n++)
        memcpy(part + n * (size_t)K * each, m->p + (n * (size_t)m->all + (size_t)k0) * each, (size_t)K * each);
    cuda->pack(packed, part, m->type, m->N, K, slices, 0, m->N);
    if (m->scale) put_scales(m, k0, K, &w, (float *)(void *)(packed + at));
    T_OK(!cuda->refuses(&w), "%d columns in %d slices: %s", K, slices, cuda->refuses(&w));
    w.p = dev_put(packed, bytes);
    free(part), free(packed);
    return w;
}

/* The first row of a product against double, beside its largest value. */
static double off_by(const stored *m, const float *x, const float *y)
{
    const int cols = (m->all + SCALE_COLS - 1) / SCALE_COLS;
    double worst = 0, largest = 0;
    float v;
    for (int n = 0; n < m->N; n++) {
        double sum = 0;
        for (int k = 0; k < m->all; k++) {
            double s = !m->scale             ? 1
                       : m->scale_rows == 1 ? (double)m->scale[n]
                                            : (double)m->scale[n / m->scale_rows * cols + k / SCALE_COLS];
            td_convert(&v, TD_F32, m->p + ((size_t)n * (size_t)m->all + (size_t)k) * td_dtype_bytes(m->type), m->type, 1);
            sum += (double)v * s * (double)x[k];
        }
        worst = fmax(worst, fabs(sum - (double)y[n])), largest = fmax(largest, fabs(sum));
    }
    return worst / largest;
}

/* The row-major copy of codes (choose_cuda.h). */
static void check_copy(const stored *m, const td_weight *w)
{
    const size_t bytes = (size_t)m->N * (size_t)m->all;
    if (!m->scale) return;
    uint8_t *got = block_alloc(bytes);
    void *rows = dev_new(bytes);
    T_EQ(td_cuda_gemm_unpack(dev()->stream[TD_STREAM_COMPUTE], rows, w->p, m->N, m->all, w->slices, true), 0);
    T_OK(dev_get(got, rows, bytes) && !memcmp(got, m->p, bytes), "slices of %d columns: %s", m->all / w->slices, simt_last_error());
    free(got);
}

/* Eight slices of any width on one rank, or some each on several and the tree over their parts: the same bits.
 * scale_rows: of codes. */
static void test_slices(td_dtype type, int width, int scale_rows)
{
    enum { N = 40, T = 69, S = 8 };
    const int K = S * width;
    const size_t in = (size_t)T * (size_t)K, size = (size_t)N * T * 4, all = (size_t)N * (size_t)K;
    float *v = floats(all), *x = floats(in), *want = floats(N * T), *got = floats(N * T), *scale = floats((size_t)N * (size_t)K);
    stored m = {type, N, K, scale_rows, block_alloc(all * 4), scale_rows ? scale : NULL};
    rnd_fill(v, all, 5, 1), rnd_fill(x, in, 6, 1), rnd_fill(scale, all, 7, 1);
    td_convert(m.p, type, v, TD_F32, all);
    td_weight whole = make_columns(&m, 0, K, S);
    const float *dx = dev_put(x, in * 4);
    float *y = dev_new(size), *parts = dev_new(S * size);
    static const int rows[] = {T, 21, 5};
    for (size_t i = simt_checks() ? 1 : 0; i < TD_COUNT(rows); i++) {
        const size_t bytes = (size_t)N * (size_t)rows[i] * 4;
        cuda->linear(NULL, NULL, &whole, dx, (size_t)K, rows[i], y, N, false);
        T_OK(dev_get(want, y, bytes));
        check_copy(&m, &whole);
        T_OK(off_by(&m, x, want) < 0.01, "slices of %d, type %d, scales of %d rows: off by %g", width, (int)type, scale_rows,
             off_by(&m, x, want));
        for (int ranks = 2; ranks <= S; ranks *= 2) {
            const int k = K / ranks;
            for (int r = 0; r < ranks; r++) {
                td_weight w = make_columns(&m, r * k, k, S / ranks);
                cuda->linear(NULL, NULL, &w, dx + r * k, (size_t)K, rows[i], parts + (size_t)r * N * T, N, false);
            }
            cuda->sum_tree(NULL, parts, N * T, ranks, rows[i], N, N, NULL, y, N, false);
            T_OK(dev_get(got, y, bytes) && td_cuda_ops_status() == TD_OK, "%s", td_reason());
            T_OK(!memcmp(got, want, bytes), "slices of %d, type %d, scales of %d rows, %d rows on %d ranks", width, (int)type,
                 scale_rows, rows[i], ranks);
        }
    }
    free(v), free(x), free(want), free(got), free(scale), free(m.p);
    dev_done();
}

/* Slices of codes that are no whole chunks of 32 columns: one rank takes them as one sum, several are refused. */
static void test_narrow_slices(void)
{
    td_weight w = {.N = 32, .K = 8 * 80, .slices = 8, .dtype = TD_E4M3, .scale_rows = 32, .scale_cols = 128, .p = "", .scale_at = 64};
    T_OK(!cuda->refuses(&w), "%s", cuda->refuses(&w));
    for (int blocks = 0; blocks < 2; blocks++) {
        w.K = 4 * 80, w.slices = 4;
        w.scale_rows = blocks ? 32 : 1, w.scale_cols = blocks ? 64 : w.K;
        T_OK(cuda->refuses(&w) && strstr(cuda->refuses(&w), "multiple of 32 columns"), "%s", cuda->refuses(&w));
    }
    w.slices = 0, w.scale_rows = 32, w.scale_cols = 64; /* no tree: its numerics id says so (worker/boot.c) */
    T_OK(cuda->refuses(&w) && strstr(cuda->refuses(&w), "multiple of 128 columns"));

    static const char *const dirs[] = {"tests/golden/quantized/fp8-block", "tests/golden/quantized/fp8-row"};
    for (int i = 0; i < 2; i++) { /* slices of 16 and 40 columns */
        td_model_desc *d = malloc(sizeof *d);
        td_model *m = NULL;
        td_ranks ranks = {.grid = {.tp = 2, .pp = 1, .cp = 1, .dp = 1}, .dev = dev()};
        td_model_opts o = {.dir = dirs[i], .ops = cuda, .pool = team(1), .max_rows = 8, .max_logits = 8, .ranks = &ranks};
        T_OK(td_model_desc_read(dirs[i], d) == TD_OK && td_grid_check(&ranks.grid, d) == TD_OK, "%s", td_reason());
        T_OK(td_model_open(&o, &m) == TD_ENOSUP && strstr(td_reason(), "o_proj") && strstr(td_reason(), "tensor-parallel-size") &&
                 strstr(td_reason(), "multiple of 32 columns"),
             "%s: %s", dirs[i], td_reason());
        td_model_close(m);
        free(d);
    }
}

static void test_limits(void)
{
    td_weight w = {.N = 24, .K = 256, .dtype = TD_E4M3, .scale_rows = 8, .scale_cols = 128, .p = "", .scale_at = 64};
    T_OK(cuda->refuses(&w) && strstr(cuda->refuses(&w), "16 rows"));
    w.scale_rows = 16, w.scale_cols = 64;
    T_OK(cuda->refuses(&w) && strstr(cuda->refuses(&w), "128 columns"));
    w.scale_cols = 128;
    T_OK(!cuda->refuses(&w));
    w.scale_rows = 1, w.scale_cols = 256;
    T_OK(!cuda->refuses(&w));
    td_grouped g = {&w, 513, NULL, 5, NULL, 64, NULL, 24, TD_F32};
    cuda->linear_grouped(cuda, NULL, NULL, &g);
    T_OK(td_cuda_ops_status() == TD_ENOSUP && strstr(td_reason(), "513 experts"), "%s", td_reason());
}

/* ---- models ---- */

enum { N = 37, SEQS = 2, STEPS = 4 };

typedef struct step_plan {
    int from, n;
    bool all; /* logits of every row; else of the last of each sequence */
} step_plan;
static const step_plan plan[STEPS] = {{0, 33, true}, {33, 2, false}, {35, 1, false}, {36, 1, true}}; /* 66 rows, 4, 2, 2 */

/* Logits of all steps one after another; how many. */
static size_t run_model(const char *dir, const td_ops *ops, float *out)
{
    td_model *m = NULL;
    td_model_opts o = {.dir = dir, .ops = ops, .pool = team(1), .max_rows = 80, .max_logits = 80};
    T_OK(td_model_open(&o, &m) == TD_OK, "%s: %s", dir, td_reason());
    if (!m) return 0;
    const td_model_desc *d = td_model_descr(m);
    size_t V = (size_t)d->V, done = 0;
    int32_t ids[SEQS * N];
    ts_kv kv;
    ts_kv_open(&kv, d, ops, 16, N, SEQS);
    td_kv there[TD_MAX_GROUPS];
    for (int i = 0; i < SEQS * N; i++) ids[i] = (i * 37 + 5) % d->V;
    for (int g = 0; g < d->n_groups; g++) {
        there[g] = kv.kv[g];
        there[g].base = dev_new(td_kv_page_bytes(&kv.kv[g]) * (size_t)kv.kv[g].n_pages * (size_t)d->group[g].n_slots);
    }
    float *logits = dev_new(80 * V * 4);
    for (int i = 0; i < STEPS; i++) {
        ts_seq q[SEQS];
        for (int k = 0; k < SEQS; k++) q[k] = (ts_seq){k, plan[i].from, plan[i].n, ids + k * N + plan[i].from};
        td_step *s = ts_step(&kv, d, q, SEQS, plan[i].all);
        size_t n = (size_t)s->n_logits * V;
        T_OK(td_model_forward(m, s, there, logits, NULL, NULL) == TD_OK, "%s", td_reason());
        T_OK(dev_get(out + done, logits, n * 4) && td_cuda_ops_status() == TD_OK, "%s: step %d", dir, i);
        done += n;
        free(s);
    }
    ts_kv_close(&kv);
    td_model_close(m);
    dev_done();
    return done;
}

static void test_model(const char *dir)
{
    td_ops plain = *cuda;
    plain.operand = NULL;
    size_t room = (size_t)STEPS * 80 * 512;
    float *a = floats(room), *b = floats(room);
    size_t n = run_model(dir, cuda, a), m = run_model(dir, &plain, b);
    T_OK(n == m && n > 0 && !memcmp(a, b, n * 4), "%s: rounded by the producer, not the same bits", dir);
    free(a), free(b);
}

/* Largest difference beside the largest value. */
static double apart(const float *a, const float *b, size_t n)
{
    double most = 0, size = 0;
    for (size_t i = 0; i < n; i++) {
        double d = fabs((double)a[i] - (double)b[i]);
        most = d <= most ? most : d;
        size = fmax(size, fabs((double)a[i]));
    }
    return most / size;
}

/* The deterministic product of what x is as codes (cuda_quant.h), for FP8 weights and more than 64 rows. */
static void linear_of_codes(td_pool *pool, void *scratch, const td_weight *w, const float *x, size_t ldx,
                            int T, float *y, size_t ldy, bool add)
{
    if (w->dtype != TD_E4M3 || T <= 64) {
        cuda->linear(pool, scratch, w, x, ldx, T, y, ldy, add);
        return;
    }
    const int K = w->K, group = w->scale_cols < K || w->scale_rows > 1 ? 128 : K;
    float *v = floats((size_t)T * ldx);
    T_OK(dev_get(v, x, ((size_t)(T - 1) * ldx + (size_t)K) * 4), "%s", simt_last_error());
    for (int t = 0; t < T; t++)
        for (int k0 = 0; k0 < K; k0 += group) {
            float most = 0, *p = v + (size_t)t * ldx + k0, scale;
            for (int k = 0; k < group && k0 + k < K; k++) most = fmaxf(most, fabsf(p[k]));
            scale = fmaxf(most / 448, 0x1p-126f);
            for (int k = 0; k < group && k0 + k < K; k++)
                p[k] = td_e4m3_to_f32(td_f32_to_e4m3(p[k] / scale)) * scale;
        }
    float *codes = dev_put(v, (size_t)T * ldx * 4);
    cuda->linear(pool, scratch, w, codes, ldx, T, y, ldy, add);
    T_EQ(dev()->sync(dev(), TD_STREAM_COMPUTE), TD_OK);
    free(v);
}

/* A model of FP8 weights in the fast mode on Hopper: its step of 66 rows is of codes, made by norms and
 * activations or by the products themselves; the logits are nearer to those of a model whose activations go
 * through codes on the host than to those of the model itself. (Not near: a difference in the last bits of x sends
 * one code in twenty to its neighbour, 1/16 away.) A scale from the wrong row leaves nothing of them. Steps of
 * fewer rows follow from the first one's keys and values. */
static void test_fast_codes(const char *dir)
{
    const td_cuda_mode fast = {.fast = true};
    const size_t room = (size_t)STEPS * 80 * 512;
    const char *emulated = strncmp(dev()->name, "simt", 4) ? NULL : "simt";
    float *exact = floats(room), *coded = floats(room), *fused = floats(room), *apart_made = floats(room);
    td_ops oracle = *cuda;
    oracle.operand = NULL;
    oracle.linear = linear_of_codes;
    size_t n = run_model(dir, cuda, exact);
    T_EQ(run_model(dir, &oracle, coded), n);
    td_cuda_ops_close();
    (void)simt_set_option("arch", 90);
    if (emulated) dev()->arch = 90;
    if (dev()->arch == 90 && td_cuda_ops_open_as(dev(), &fast, &cuda) == TD_OK) {
        td_ops plain = *cuda;
        plain.operand = NULL;
        T_EQ(run_model(dir, cuda, fused), n);
        T_EQ(run_model(dir, &plain, apart_made), n);
        double lost = apart(exact, fused, n), off = apart(coded, fused, n),
               off_too = apart(coded, apart_made, n);
        T_OK(lost < 0.3 && off < lost && off_too < lost,
             "%s: codes cost %g of the logits; off by %g, made by the products %g", dir, lost, off, off_too);
        if (emulated) {
            (void)simt_set_option("wrong", 16);
            T_EQ(run_model(dir, cuda, fused), n);
            (void)simt_set_option("wrong", 0);
            T_OK(!(apart(exact, fused, n) < 0.5), "%s: wrong scales are only %g away", dir,
                 apart(exact, fused, n));
        }
        td_cuda_ops_close();
    }
    (void)simt_set_option("arch", 80);
    if (emulated) dev()->arch = 80;
    T_EQ(td_cuda_ops_open(dev(), &cuda), TD_OK);
    free(exact), free(coded), free(fused), free(apart_made);
}

int main(void)
{
    static const char *const models[] = {"models/llama-bias", "models/llama-f16", "models/qwen3", "models/mixtral", "quantized/fp8-block"};
    if (td_cuda_ops_open(dev(), &cuda) != TD_OK) return 1;
    for (size_t i = 0; i < TD_COUNT(cases); i++) test_experts(&cases[i]);
    test_limits();
    test_slices(TD_BF16, 16, 0);
    test_slices(TD_F16, 18, 0);
    test_slices(TD_BF16, 76, 0);
    static const int widths[] = {32, 64, 96, 128, 160, 192};
    for (size_t i = 0; i < TD_COUNT(widths); i++) {
        if (simt_checks() && i != 2) continue;
        test_slices(TD_E4M3, widths[i], 1);
        test_slices(TD_E4M3, widths[i], 32);
    }
    test_narrow_slices();
    for (size_t i = 0; i < TD_COUNT(models); i++) {
        char dir[100];
        snprintf(dir, sizeof dir, "tests/golden/%s", models[i]);
        test_model(dir);
    }
    if (!simt_checks()) {
        test_fast_codes("tests/golden/quantized/fp8-block");
        test_fast_codes("tests/golden/quantized/fp8-row");
    }
    td_cuda_ops_close();
    return T_DONE();
}
