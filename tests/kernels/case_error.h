/* tests/kernels/case_error.h - each operation's error against double beside PyTorch's own in the same type: at most twice as
 * large, the largest and the root mean square, on the same inputs (torch_errors.h).
 *
 * Model:   error_in makes the inputs that tests/golden/make_op_errors.py made, rounded to the type; error_add takes results;
 *          error_end compares. E4M3 is a type of weights alone: everything else is bf16 then.
 * Without a line of their own: operations that copy (embed, take_rows, fill_ids, moe_place, moe_gather, pages), whose tests ask
 * for equality; linear_grouped, attn_merge and the draws in parts, whose tests ask for the bits of linear, attention, sample. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_TESTS_KERNELS_CASE_ERROR_H
#define TD_TESTS_KERNELS_CASE_ERROR_H

#include "tests/kernels/support.h"
#include "tests/kernels/torch_errors.h"

enum { ERR_T = 24, ERR_E = 2048, ERR_F = 1200, ERR_N = 96, ERR_K = 1024, ERR_H = 8, ERR_G = 2, ERR_D = 64, ERR_L = 300 };
enum { ERR_X = 128, ERR_TOP = 8, ERR_V = 8501, ERR_PARTS = 8, ERR_INPUTS = 4 };

typedef struct op_error {
    const char *op, *who;
    td_dtype dtype;
    uint32_t inputs;
    double most, sum;
    size_t n;
    float *made[ERR_INPUTS];
    int n_made;
} op_error;

static inline op_error error_begin(const char *who, const char *op, td_dtype dtype)
{
    return (op_error){.op = op, .who = who, .dtype = dtype, .inputs = 2166136261u};
}

static inline void error_round(float *p, size_t n, td_dtype dtype)
{
    uint16_t v;
    for (size_t i = 0; i < n && dtype != TD_F32; i++) td_convert(&v, dtype, p + i, TD_F32, 1), td_convert(p + i, TD_F32, &v, dtype, 1);
}

/* n values, freed by error_end. */
static inline float *error_in(op_error *e, uint64_t seed, float scale, size_t n)
{
    float *p = e->made[e->n_made++] = floats(n);
    rnd_fill(p, n, seed, scale);
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, p + i, 4);
        e->inputs = (e->inputs ^ bits) * 16777619u;
    }
    error_round(p, n, e->dtype == TD_E4M3 ? TD_F32 : e->dtype);
    return p;
}

static inline void error_add(op_error *e, double got, double want)
{
    double d = fabs(got - want);
    e->most = d <= e->most ? e->most : d; /* NaN counts */
    e->sum += d * d, e->n++;
}

static inline void error_end(op_error *e)
{
    const torch_error *t = NULL;
    for (size_t i = 0; i < TD_COUNT(torch_errors); i++)
        if (!strcmp(torch_errors[i].op, e->op) && torch_errors[i].dtype == e->dtype) t = &torch_errors[i];
    for (int i = 0; i < e->n_made; i++) free(e->made[i]);
    TD_CHECK(t);
    double square = sqrt(e->sum / (double)e->n);
    T_OK(e->inputs == t->inputs, "%s %s: other inputs than PyTorch's: 0x%08x", e->op, td_dtype_name(e->dtype), e->inputs);
    T_OK(e->most <= 2 * t->most && square <= 2 * t->square, "%s %s %s: at most %.3g, square %.3g; PyTorch %.3g, %.3g", e->who, e->op,
         td_dtype_name(e->dtype), e->most, square, t->most, t->square);
    if (getenv("TEST_VERBOSE"))
        printf("%-12s %-14s %-5s of PyTorch's error: largest %.3f, square %.3f\n", e->who, e->op, td_dtype_name(e->dtype),
               e->most / t->most, square / t->square);
}

/* ---- double ---- */

static inline void exact_norm(const float *x, const float *d, const float *w, int E, double *out)
{
    double sum = 0;
    for (int i = 0; i < E; i++) out[i] = (double)x[i] + (d ? (double)d[i] : 0), sum += out[i] * out[i];
    for (int i = 0; i < E; i++) out[i] = out[i] / sqrt(sum / E + (double)1e-5f) * (double)w[i];
}

/* Row t, head h of a causal prompt: q [L][H][D], k and v [L][G][D]. */
static inline void exact_attention(const float *q, const float *k, const float *v, int t, int h, double *out)
{
    double p[ERR_L], top = -INFINITY, sum = 0;
    for (int j = 0; j <= t; j++) {
        p[j] = 0;
        for (int d = 0; d < ERR_D; d++)
            p[j] += (double)q[(t * ERR_H + h) * ERR_D + d] * (double)k[(j * ERR_G + h / (ERR_H / ERR_G)) * ERR_D + d];
        p[j] /= sqrt(ERR_D);
        top = fmax(top, p[j]);
    }
    for (int d = 0; d < ERR_D; d++) out[d] = 0;
    for (int j = 0; j <= t; j++) {
        double w = exp(p[j] - top);
        sum += w;
        for (int d = 0; d < ERR_D; d++) out[d] += w * (double)v[(j * ERR_G + h / (ERR_H / ERR_G)) * ERR_D + d];
    }
    for (int d = 0; d < ERR_D; d++) out[d] /= sum;
}

#endif
