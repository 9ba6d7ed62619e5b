// SPDX-License-Identifier: Apache-2.0
/* tests/simt/test_choose_cuda.c - kernels/choose_cuda.h: what each mode may run and what it calls itself, the
 * check that finds planted errors, which kernel a call runs (seen by its bits), copies and the memory they
 * may take. */
#include "common/log.h"
#include "kernels/choose_cuda.h"
#include "kernels/cuda.h"
#include "kernels/cuda_lt.h"
#include "tests/said.h"
#include "tests/simt/simt_c.h"
#include "tests/simt/support.h"

static const td_ops *table;
static bool emulated; /* the shim: its devices and errors are ours to choose */

static bool open_as(bool fast, bool check, unsigned also, td_status want)
{
    td_cuda_mode m = {fast, check, also};
    table = NULL;
    td_status s = td_cuda_ops_open_as(dev(), &m, &table);
    T_OK(s == want, "%s: %s", td_status_name(s), td_reason());
    return s == TD_OK && want == TD_OK;
}

static void expect_numerics(const char *want)
{
    T_OK(!strcmp(table->numerics, want), "%s, not %s", table->numerics, want);
    td_cuda_ops_close();
}

static void arch(int value)
{
    (void)simt_set_option("arch", value);
    dev()->arch = value;
}

/* ---- modes ---- */

static void test_modes(void)
{
    unsigned all = TD_CUDA_GEMM_SM90A | TD_CUDA_ATTN_SM90A;
    if (open_as(false, true, all, TD_OK)) expect_numerics(TD_CUDA_NUMERICS);
    if (!emulated) return;
    if (open_as(true, true, 0, TD_OK)) expect_numerics("cuda-fast-sm80-lt120901-bf16");
    if (open_as(true, true, all, TD_OK)) expect_numerics("cuda-fast-sm80-lt120901-bf16"); /* not a Hopper */
    arch(90);
    if (open_as(true, true, 0, TD_OK)) expect_numerics("cuda-fast-sm90-lt120901-f8-bf16"); /* not proven */
    if (open_as(true, true, all, TD_OK)) expect_numerics("cuda-fast-sm90-lt120901-f8-h6-bf16");
    if (open_as(true, true, TD_CUDA_ATTN_SM90A, TD_OK)) expect_numerics("cuda-fast-sm90-lt120901-f8-h4-bf16");
    arch(80);
}

/* ---- the check ---- */

static const char *numerics_wanted;
static void open_planted(void)
{
    if (open_as(true, true, TD_CUDA_GEMM_SM90A | TD_CUDA_ATTN_SM90A, TD_OK)) expect_numerics(numerics_wanted);
}

/* Each candidate that computes wrongly is dropped, with one line. */
static void test_planted(void)
{
    static const struct {
        int wrong;
        const char *numerics;
    } cases[] = {{2, "cuda-fast-sm90-f8lt120901-h6-bf16"},  {16, "cuda-fast-sm90-lt120901-h6-bf16"},
                 {4, "cuda-fast-sm90-lt120901-f8-h4-bf16"}, {8, "cuda-fast-sm90-lt120901-f8-h2-bf16"},
                 {2 | 4 | 8 | 16, TD_CUDA_NUMERICS},        {0, "cuda-fast-sm90-lt120901-f8-h6-bf16"}};
    if (!emulated) return;
    arch(90);
    for (size_t i = 0; i < TD_COUNT(cases); i++) {
        (void)simt_set_option("wrong", cases[i].wrong);
        numerics_wanted = cases[i].numerics;
        td_log_open("test", TD_LOG_WARN);
        const char *text = said(open_planted);
        td_log_open("test", TD_LOG_ERROR);
        int lines = times_said(text, "computes otherwise than the portable kernel on"), planted = 0;
        for (int bit = 2; bit <= 16; bit *= 2) planted += (cases[i].wrong & bit) != 0;
        T_OK(lines == planted && times_said(text, "\n") == planted, "%d planted: %s", planted, text);
    }
    (void)simt_set_option("wrong", 4); /* nobody looks at what was not asked for */
    if (open_as(true, true, 0, TD_OK)) expect_numerics("cuda-fast-sm90-lt120901-f8-bf16");
    arch(80);
    (void)simt_set_option("wrong", 1); /* the portable kernels themselves */
    open_as(false, true, 0, TD_ENOSUP);
    T_OK(strstr(td_reason(), "product of few rows") != NULL, "%s", td_reason());
    (void)simt_set_option("wrong", 0);
    if (open_as(false, true, 0, TD_OK)) td_cuda_ops_close();
}

/* Of products alone: the rest is as small as it may be. */
static td_ops_room products_room(int max_rows, int N, int K)
{
    return (td_ops_room){.max_rows = max_rows,
                         .max_logits = 1,
                         .N = N,
                         .K = K,
                         .V = 8,
                         .H = 1,
                         .G = 1,
                         .D = 16,
                         .max_seqs = 1,
                         .max_len = 16,
                         .page_size = 16};
}

/* ---- copies ---- */

enum { MAX_N = 200, MAX_K = 328, MAX_T = 70 };

typedef struct matrix {
    int N, K;
    td_dtype dtype;
    uint16_t raw[MAX_N * MAX_K];
    float bias[MAX_N];
    td_weight w;
} matrix;

static void matrix_make(matrix *m, int N, int K, int slices, td_dtype t, bool bias)
{
    uint64_t s = (uint64_t)(N * 1000 + K);
    m->N = N, m->K = K, m->dtype = t;
    for (int i = 0; i < N * K; i++) {
        float v = rnd_float(&s, 0.5f);
        m->raw[i] = t == TD_F16 ? td_f32_to_f16(v) : td_f32_to_bf16(v);
    }
    rnd_fill(m->bias, (size_t)N, 9, 1);
    size_t bytes = table->packed_bytes(N, K, slices, t);
    void *packed = block_alloc(bytes);
    table->pack(packed, m->raw, t, N, K, slices, 0, N);
    m->w = (td_weight){.N = N,
                       .K = K,
                       .dtype = t,
                       .p = dev_put(packed, bytes),
                       .slices = slices,
                       .bias = bias ? dev_put(m->bias, (size_t)N * 4) : NULL};
    free(packed);
}

static void test_copies(void)
{
    static const struct {
        int N, K, slices;
        td_dtype t;
        bool copied;
    } cases[] = {{16, 64, 1, TD_BF16, true},  {200, 328, 1, TD_BF16, true}, {40, 72, 1, TD_F16, true},
                 {40, 320, 8, TD_BF16, true}, {33, 64, 1, TD_BF16, false},  {16, 36, 1, TD_BF16, false}};
    enum { N_CASES = TD_COUNT(cases) };
    matrix *m = td_xalloc(N_CASES * sizeof *m);
    td_weight *w[N_CASES];
    void *block = NULL;
    uint16_t *got = block_alloc(MAX_N * MAX_K * 2);
    if (!emulated || !open_as(true, false, 0, TD_OK)) return;
    for (int i = 0; i < N_CASES; i++) {
        matrix_make(&m[i], cases[i].N, cases[i].K, cases[i].slices, cases[i].t, false);
        w[i] = &m[i].w;
    }
    T_EQ(table->beside(w, N_CASES, NULL, &block), TD_OK);
    for (int i = 0; i < N_CASES; i++) {
        T_EQ(w[i]->rows != NULL, cases[i].copied);
        size_t bytes = (size_t)(m[i].N * m[i].K) * 2;
        if (w[i]->rows) T_OK(dev_get(got, w[i]->rows, bytes) && !memcmp(got, m[i].raw, bytes), "copy %d", i);
    }
    dev()->free(dev(), block);
    td_cuda_ops_close();
    dev_done();
    free(m), free(got);
}

/* ---- codes ---- */

enum { C_K = 384, C_T = 71 };

/* A matrix of codes with scales, and its copy. */
typedef struct coded {
    int N, rows, cols; /* that share a scale; cols C_K: a scale a row */
    uint8_t code[MAX_N * C_K];
    float scale[MAX_N * 3], bias[MAX_N];
    td_weight w;
} coded;

static void coded_make(coded *m, int N, int rows, int cols, bool bias)
{
    uint64_t s = (uint64_t)(N * 7 + rows);
    m->N = N, m->rows = rows, m->cols = cols;
    for (int i = 0; i < N * C_K; i++) m->code[i] = td_f32_to_e4m3(rnd_float(&s, 20));
    td_weight *w = &m->w;
    *w = (td_weight){.N = N, .K = C_K, .dtype = TD_E4M3, .slices = 1, .scale_rows = rows, .scale_cols = cols};
    for (size_t i = 0; i < td_weight_scale_count(w); i++) m->scale[i] = 0.01f + fabsf(rnd_float(&s, 0.2f));
    rnd_fill(m->bias, (size_t)N, 9, 1);
    size_t bytes = table->packed_bytes(N, C_K, 1, TD_E4M3);
    w->scale_at = (bytes + 255) / 256 * 256;
    char *packed = block_alloc(w->scale_at + sizeof m->scale);
    table->pack(packed, m->code, TD_E4M3, N, C_K, 1, 0, N);
    memcpy(packed + w->scale_at, m->scale, td_weight_scale_count(w) * 4);
    w->p = dev_put(packed, w->scale_at + td_weight_scale_count(w) * 4);
    w->bias = bias ? dev_put(m->bias, (size_t)N * 4) : NULL;
    free(packed);
}

static float coded_scale(const coded *m, int n, int k)
{
    return m->scale[n / m->rows * (C_K / m->cols) + k / m->cols];
}

/* Where the codes of x, and their scales, come from: this one text of the rule in cuda_quant.h. */
static void quantize(const float *x, int cols, float *value)
{
    for (int t = 0; t < C_T; t++)
        for (int k0 = 0; k0 < C_K; k0 += cols) {
            float most = 0, scale;
            for (int k = k0; k < k0 + cols; k++) most = fmaxf(most, fabsf(x[t * C_K + k]));
            scale = fmaxf(most / 448, 0x1p-126f);
            for (int k = k0; k < k0 + cols; k++)
                value[t * C_K + k] = td_e4m3_to_f32(td_f32_to_e4m3(x[t * C_K + k] / scale)) * scale;
        }
}

/* Largest difference from y = x W' + bias with these values of x, beside the sum of magnitudes. */
static double coded_error(const coded *m, const float *value, int T, const float *y)
{
    double most = 0;
    for (int t = 0; t < T; t++)
        for (int n = 0; n < m->N; n++) {
            double s = m->w.bias ? m->bias[n] : 0, size = 1e-30;
            for (int k = 0; k < C_K; k++) {
                double v =
                    (double)value[t * C_K + k] * td_e4m3_to_f32(m->code[n * C_K + k]) * coded_scale(m, n, k);
                s += v, size += fabs(v);
            }
            double e = fabs(y[t * m->N + n] - s) / size;
            most = e <= most ? most : e;
        }
    return most;
}

/* The product of T rows through the table: x as f32, as bf16, or as codes that a norm with weights of one made. */
static void coded_linear(const coded *m, const float *x, int T, int how, float *y)
{
    const td_operand to = table->operand->type(&m->w, T);
    size_t bytes = (size_t)T * (size_t)m->N * 4;
    float *d = dev_new(bytes), ones[C_K];
    const void *p = dev_put(x, (size_t)T * C_K * 4);
    for (int i = 0; i < C_K; i++) ones[i] = 1;
    if (how == 0) table->linear(NULL, NULL, &m->w, p, C_K, T, d, (size_t)m->N, false);
    if (how == 1) {
        void *operand = dev_new((size_t)T * C_K * 2 + 256);
        table->operand->rmsnorm(NULL, p, C_K, dev_put(ones, sizeof ones), 0, T, C_K, operand, to, C_K);
        table->operand->linear(NULL, NULL, &m->w, operand, to, C_K, T, d, (size_t)m->N, false);
    }
    T_EQ(td_cuda_ops_status(), TD_OK);
    T_OK(dev_get(y, d, bytes), "%s", simt_last_error());
}

static void norm_rows(float *x)
{
    for (int t = 0; t < C_T; t++) {
        double s = 0;
        for (int k = 0; k < C_K; k++) s += (double)x[t * C_K + k] * (double)x[t * C_K + k];
        float r = (float)(1 / sqrt(s / C_K));
        for (int k = 0; k < C_K; k++) x[t * C_K + k] *= r;
    }
}

/* In the fast mode on Hopper products of more than 64 rows are of codes, below and otherwise they are of x as
 * bf16: seen by the error from either. Row scales, blocks, blocks that were cut; a bias; rows that are left over
 *       from a multiple of 4. */
static void test_codes(int N, int rows, int cols, bool bias)
{
    coded *m = td_xalloc(sizeof *m);
    float *x = floats(C_T * C_K), *value = floats(C_T * C_K), *y = floats((size_t)(C_T * N)),
          *z = floats((size_t)(C_T * N));
    td_weight *w[1] = {&m->w};
    void *block = NULL;
    td_ops_room room = products_room(C_T, N, C_K);
    uint64_t seed = 11;
    for (int i = 0; i < C_T * C_K; i++) x[i] = rnd_float(&seed, 1) * expf(rnd_float(&seed, 2));
    norm_rows(x);
    arch(90);
    if (open_as(true, true, 0, TD_OK)) {
        coded_make(m, N, rows, cols, bias);
        T_EQ(table->beside(w, 1, NULL, &block), TD_OK);
        T_EQ(table->reserve(&room), TD_OK);
        const bool taken = N != 30; /* not a multiple of 4 */
        T_EQ(m->w.rows != NULL, taken);
        td_operand few = table->operand->type(&m->w, TD_CUDA_LT_ROWS - 1),
                   many = table->operand->type(&m->w, C_T);
        T_EQ(few.dtype, TD_BF16);
        T_EQ(many.dtype, taken ? TD_E4M3 : TD_BF16);
        T_EQ(many.group, taken && cols < C_K ? 128 : 0);
        quantize(x, cols, value);
        for (int how = 0; how < 2; how++) {
            coded_linear(m, x, C_T, how, y);
            double exact = coded_error(m, x, C_T, y), of_values = coded_error(m, value, C_T, y);
            bool of_codes = taken && (N != 8 || how == 1); /* refused: of x itself, where it is there */
            T_OK(of_codes ? of_values < 0x1p-8 && exact > 2 * of_values : exact < 0x1p-8,
                 "N %d, scales of %d x %d, way %d: %g of x, %g of codes", N, rows, cols, how, exact, of_values);
        }
        coded_linear(m, x, TD_CUDA_LT_ROWS - 1, 0, z);
        double few_error = coded_error(m, x, TD_CUDA_LT_ROWS - 1, z);
        T_OK(few_error < 0x1p-8, "few rows are of x itself: %g", few_error);
        T_EQ(td_cuda_ops_grown(), 0);
        dev()->free(dev(), block);
        td_cuda_ops_close();
    }
    dev_done();
    arch(80);
    free(m), free(x), free(value), free(y), free(z);
}

static td_status another_has_none(void *arg, bool mine, bool *out)
{
    *(bool *)arg = mine;
    *out = false;
    return TD_OK;
}

/* Copies that would take more than half of what is free are not made, nor are those that another rank has no room for; the table
 * says that it computes without them, and gives back what only cuBLASLt works in. */
static void test_memory(void)
{
    matrix *m = td_xalloc(sizeof *m);
    td_weight *w[600];
    void *block = dev();
    size_t before = 0, after = 0;
    bool here = false;
    const td_ops_agree ranks = {another_has_none, &here};
    if (!emulated || !open_as(true, false, 0, TD_OK)) return;
    matrix_make(m, 200, 328, 1, TD_BF16, false);
    for (size_t i = 0; i < TD_COUNT(w); i++) w[i] = &m->w;
    (void)simt_set_option("memory", 150); /* 32 of them cuBLASLt's, 75 wanted */
    T_EQ(table->beside(w, TD_COUNT(w), NULL, &block), TD_OK);
    (void)simt_set_option("memory", 4096);
    T_OK(!block && !m->w.rows, "copies were made");
    expect_numerics(TD_CUDA_NUMERICS);
    dev_done();
    if (!open_as(true, false, 0, TD_OK)) return;
    dev()->free_bytes(dev(), &before);
    T_EQ(table->beside(w, 1, &ranks, &block), TD_OK);
    dev()->free_bytes(dev(), &after);
    T_OK(here && !block && !m->w.rows && after >= before + TD_CUDA_LT_WS_BYTES,
         "another rank has no room: %zu bytes more are free", after - before);
    expect_numerics(TD_CUDA_NUMERICS);
    dev_done();
    free(m);
}

/* ---- which kernel runs ---- */

static void linear(const td_weight *w, const float *x, int T, float *y)
{
    size_t bytes = (size_t)T * (size_t)w->N * 4;
    float *d = dev_new(bytes);
    table->linear(NULL, NULL, w, dev_put(x, (size_t)T * (size_t)w->K * 4), (size_t)w->K, T, d, (size_t)w->N,
                  false);
    T_EQ(td_cuda_ops_status(), TD_OK);
    T_OK(dev_get(y, d, bytes), "%s", simt_last_error());
}

/* The chain of the emulated cuBLASLt. */
static void chain(const matrix *m, const float *x, int T, float *y)
{
    for (int t = 0; t < T; t++)
        for (int n = 0; n < m->N; n++) {
            float s = 0;
            for (int k = 0; k < m->K; k++)
                s = fmaf(td_bf16_to_f32(td_f32_to_bf16(x[t * m->K + k])),
                         td_bf16_to_f32(m->raw[n * m->K + k]), s);
            y[t * m->N + n] = m->w.bias ? s + m->bias[n] : s;
        }
}

static void test_dispatch(bool bias, int N)
{
    enum { K = 328 };
    matrix *m = td_xalloc(sizeof *m);
    float *x = floats(MAX_T * K), *own = floats((size_t)(MAX_T * N)), *got = floats((size_t)(MAX_T * N)),
          *lt = floats((size_t)(MAX_T * N));
    td_weight *w[1] = {&m->w};
    void *block = NULL;
    td_ops_room room = products_room(MAX_T, N, K);
    rnd_fill(x, MAX_T * K, 4, 1);
    if (!emulated || !open_as(false, false, 0, TD_OK)) return;
    matrix_make(m, N, K, 1, TD_BF16, bias);
    linear(&m->w, x, MAX_T, own);
    chain(m, x, MAX_T, lt);
    T_OK(memcmp(own, lt, (size_t)(MAX_T * N) * 4) != 0, "the two kernels cannot be told apart");
    m->w.rows = m->w.p; /* deterministic: looked at by nobody */
    linear(&m->w, x, MAX_T, got);
    T_OK(!memcmp(own, got, (size_t)(MAX_T * N) * 4), "deterministic, %d rows", MAX_T);
    td_cuda_ops_close();
    if (!open_as(true, false, 0, TD_OK)) return;
    m->w.rows = NULL;
    T_EQ(table->beside(w, 1, NULL, &block), TD_OK);
    T_EQ(table->reserve(&room), TD_OK);
    for (int T = TD_CUDA_LT_ROWS - 1; T <= MAX_T; T += T == TD_CUDA_LT_ROWS ? MAX_T - T : 1) {
        bool by_lt = T >= TD_CUDA_LT_ROWS && N != 8; /* 8: a shape that it refuses */
        linear(&m->w, x, T, got);
        T_OK(!memcmp(got, by_lt ? lt : own, (size_t)(T * N) * 4), "fast, N %d, %d rows", N, T);
    }
    T_EQ(td_cuda_ops_grown(), 0);
    dev()->free(dev(), block);
    td_cuda_ops_close();
    dev_done();
    free(m), free(x), free(own), free(got), free(lt);
}

int main(void)
{
    td_log_open("test", TD_LOG_ERROR);
    emulated = !strncmp(dev()->name, "simt", 4);
    test_modes();
    test_planted();
    test_copies();
    test_memory();
    test_dispatch(true, 40);
    test_dispatch(false, 8);
    if (emulated) {
        test_codes(64, 32, 128, true);
        test_codes(8, 128, 128, true); /* the library refuses it: all rows from their codes */
    }
    if (emulated && !simt_checks()) { /* time: every kernel has run above */
        test_codes(144, 1, C_K, true);
        test_codes(200, 128, 128, false);
        test_codes(30, 128, 128, false);
    }
    td_dev_close(dev());
    return T_DONE();
}
