// SPDX-License-Identifier: Apache-2.0
/* tests/simt/test_choose_cuda.c - kernels/choose_cuda.h: what each mode may run and what it calls itself, the
 * check that finds planted errors, which kernel a call runs (seen by its bits), copies and the memory they
 * may take. */
#include "common/log.h"
#include "kernels/choose_cuda.h"
#include "kernels/cuda.h"
#include "kernels/cuda_lt.h"
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
    if (open_as(true, true, 0, TD_OK)) expect_numerics("cuda-fast-sm80-lt1-bf16");
    if (open_as(true, true, all, TD_OK)) expect_numerics("cuda-fast-sm80-lt1-bf16"); /* not a Hopper */
    arch(90);
    if (open_as(true, true, 0, TD_OK)) expect_numerics("cuda-fast-sm90-lt1-bf16"); /* not proven */
    if (open_as(true, true, all, TD_OK)) expect_numerics("cuda-fast-sm90-lt1-h6-bf16");
    if (open_as(true, true, TD_CUDA_ATTN_SM90A, TD_OK)) expect_numerics("cuda-fast-sm90-lt1-h4-bf16");
    arch(80);
}

/* ---- the check ---- */

static void test_planted(void)
{
    static const struct {
        int wrong;
        const char *numerics;
    } cases[] = {{2, "cuda-fast-sm90-h6-bf16"},
                 {4, "cuda-fast-sm90-lt1-h4-bf16"},
                 {8, "cuda-fast-sm90-lt1-h2-bf16"},
                 {2 | 4 | 8, TD_CUDA_NUMERICS},
                 {0, "cuda-fast-sm90-lt1-h6-bf16"}};
    if (!emulated) return;
    arch(90);
    for (size_t i = 0; i < TD_COUNT(cases); i++) {
        (void)simt_set_option("wrong", cases[i].wrong);
        if (open_as(true, true, TD_CUDA_GEMM_SM90A | TD_CUDA_ATTN_SM90A, TD_OK))
            expect_numerics(cases[i].numerics);
    }
    (void)simt_set_option("wrong", 4); /* nobody looks at what was not asked for */
    if (open_as(true, true, 0, TD_OK)) expect_numerics("cuda-fast-sm90-lt1-bf16");
    arch(80);
    (void)simt_set_option("wrong", 1); /* the portable kernels themselves */
    open_as(false, true, 0, TD_ENOSUP);
    T_OK(strstr(td_reason(), "product of few rows") != NULL, "%s", td_reason());
    (void)simt_set_option("wrong", 0);
    if (open_as(false, true, 0, TD_OK)) td_cuda_ops_close();
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
    } cases[] = {{16, 64, 1, TD_BF16, true},
                 {200, 328, 1, TD_BF16, true},
                 {40, 72, 1, TD_F16, true},
                 {40, 320, 8, TD_BF16, true},
                 {33, 64, 1, TD_BF16, false},
                 {16, 36, 1, TD_BF16, false}};
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
    T_EQ(table->beside(w, N_CASES, &block), TD_OK);
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

/* Copies that would take more than half of what is free are not made, and the table says that it computes
 * without them. */
static void test_memory(void)
{
    matrix *m = td_xalloc(sizeof *m);
    td_weight *w[600];
    void *block = dev();
    if (!emulated || !open_as(true, false, 0, TD_OK)) return;
    matrix_make(m, 200, 328, 1, TD_BF16, false);
    for (size_t i = 0; i < TD_COUNT(w); i++) w[i] = &m->w;
    (void)simt_set_option("memory", 150); /* 32 of them cuBLASLt's, 75 wanted */
    T_EQ(table->beside(w, TD_COUNT(w), &block), TD_OK);
    (void)simt_set_option("memory", 4096);
    T_OK(!block && !m->w.rows, "copies were made");
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
    td_ops_room room = {.max_rows = MAX_T,
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
    T_EQ(table->beside(w, 1, &block), TD_OK);
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
    td_dev_close(dev());
    return T_DONE();
}
