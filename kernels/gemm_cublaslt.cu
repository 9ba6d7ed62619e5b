// SPDX-License-Identifier: Apache-2.0
/* kernels/gemm_cublaslt.cu - see cuda_lt.h. In the library's column-major words the product is y' [N, T] = W'
 * transposed [N, K] times x' [K, T]: the "TN" form, the only one for FP8. */
#include "kernels/cuda_lt.h"
extern "C" {
#include "common/check.h"
}
#include <cublasLt.h>
#include <stdlib.h>
#include <string.h>

typedef struct lt_key {
    int N, K, rows; /* rows: T up to a power of two */
    int scaling, dtype, y_dtype, bias, add, ldx, ldy;
} lt_key;

/* What the library needs for one shape; the layouts' row count is set at each call. */
typedef struct lt_plan {
    lt_key key;
    cublasLtMatmulDesc_t op;
    cublasLtMatrixLayout_t w, x, y;
    cublasLtMatmulAlgo_t algo;
    bool refused; /* the library has nothing for it: said once */
    unsigned long long used;
} lt_plan;

struct td_cuda_lt {
    cublasLtHandle_t handle;
    void *ws;
    lt_plan plan[TD_CUDA_LT_PLANS];
    int n;
    unsigned long long clock;
};

static td_status lt_failed(cublasStatus_t s, const char *what)
{
    if (s == CUBLAS_STATUS_SUCCESS) return TD_OK;
    /* for the library the same: which of them it says of a combination that it lacks differs from version to
     * version */
    if (s == CUBLAS_STATUS_NOT_SUPPORTED || s == CUBLAS_STATUS_INVALID_VALUE ||
        s == CUBLAS_STATUS_ARCH_MISMATCH)
        return td_fail(TD_ENOSUP, "cuBLASLt: %s: %s", what, cublasLtGetStatusString(s));
    return td_fail(TD_EDEVICE, "cuBLASLt: %s: %s", what, cublasLtGetStatusString(s));
}
#define LT_TRY(call) TD_TRY(lt_failed(call, #call))

static cudaDataType_t type_of(td_dtype t)
{
    return t == TD_F32 ? CUDA_R_32F : t == TD_BF16 ? CUDA_R_16BF : CUDA_R_16F;
}

size_t td_cuda_lt_version(void)
{
    return cublasLtGetVersion();
}

td_status td_cuda_lt_open(void *ws, td_cuda_lt **out)
{
    td_cuda_lt *lt = (td_cuda_lt *)td_xalloc(sizeof *lt);
    td_status s = lt_failed(cublasLtCreate(&lt->handle), "no handle");
    if (s != TD_OK) {
        free(lt);
        return s;
    }
    lt->ws = ws;
    *out = lt;
    return TD_OK;
}

static void plan_close(lt_plan *p)
{
    if (p->op) cublasLtMatmulDescDestroy(p->op);
    if (p->w) cublasLtMatrixLayoutDestroy(p->w);
    if (p->x) cublasLtMatrixLayoutDestroy(p->x);
    if (p->y) cublasLtMatrixLayoutDestroy(p->y);
    memset(p, 0, sizeof *p);
}

void td_cuda_lt_close(td_cuda_lt *lt)
{
    if (!lt) return;
    for (int i = 0; i < lt->n; i++) plan_close(&lt->plan[i]);
    cublasLtDestroy(lt->handle);
    free(lt);
}

static td_status set_op(lt_plan *p, cublasLtMatmulDescAttributes_t what, const void *v, size_t n)
{
    return lt_failed(cublasLtMatmulDescSetAttribute(p->op, what, v, n), "attribute of the product");
}

static td_status plan_heuristic(td_cuda_lt *lt, lt_plan *p)
{
    cublasLtMatmulPreference_t pref;
    LT_TRY(cublasLtMatmulPreferenceCreate(&pref));
    size_t ws = TD_CUDA_LT_WS_BYTES;
    cublasLtMatmulHeuristicResult_t r;
    memset(&r, 0, sizeof r);
    int n = 0;
    cublasStatus_t s =
        cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &ws, sizeof ws);
    static const cublasLtMatmulPreferenceAttributes_t aligned[] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    const uint32_t alignment = 16; /* what cuda_lt.h asks for; the library would take 256 for granted */
    for (cublasLtMatmulPreferenceAttributes_t which : aligned)
        if (s == CUBLAS_STATUS_SUCCESS)
            s = cublasLtMatmulPreferenceSetAttribute(pref, which, &alignment, sizeof alignment);
    if (s == CUBLAS_STATUS_SUCCESS)
        s = cublasLtMatmulAlgoGetHeuristic(lt->handle, p->op, p->w, p->x, p->y, p->y, pref, 1, &r, &n);
    cublasLtMatmulPreferenceDestroy(pref);
    TD_TRY(lt_failed(s, "heuristics"));
    if (!n) return td_fail(TD_ENOSUP, "cuBLASLt: no algorithm for %d x %d", p->key.N, p->key.K);
    p->algo = r.algo;
    return TD_OK;
}

static td_status set_scaling(lt_plan *p)
{
    static const struct {
        int32_t w, x;
    } modes[] = {{CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F, CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F},
                 {CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F, CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F},
                 {CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F, CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F},
                 {CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F, CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F}};
    if (p->key.scaling == TD_CUDA_LT_PLAIN) return TD_OK;
    TD_TRY(set_op(p, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &modes[p->key.scaling].w, sizeof(int32_t)));
    return set_op(p, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &modes[p->key.scaling].x, sizeof(int32_t));
}

/* Addresses that a call has; the heuristics look at them, too (a scaling without a pointer has no algorithm). */
static td_status set_pointers(lt_plan *p, const td_cuda_lt_args *a)
{
    if (a->bias) TD_TRY(set_op(p, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &a->bias, sizeof a->bias));
    if (a->scaling == TD_CUDA_LT_PLAIN) return TD_OK;
    TD_TRY(set_op(p, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &a->w_scale, sizeof a->w_scale));
    return set_op(p, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &a->x_scale, sizeof a->x_scale);
}

static td_status plan_open(td_cuda_lt *lt, lt_plan *p, const td_cuda_lt_args *a)
{
    const lt_key *k = &p->key;
    cudaDataType_t in = k->scaling ? CUDA_R_8F_E4M3 : type_of((td_dtype)k->dtype),
                   out = type_of((td_dtype)k->y_dtype);
    cublasOperation_t t = CUBLAS_OP_T, n = CUBLAS_OP_N;
    LT_TRY(cublasLtMatmulDescCreate(&p->op, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    TD_TRY(set_op(p, CUBLASLT_MATMUL_DESC_TRANSA, &t, sizeof t));
    TD_TRY(set_op(p, CUBLASLT_MATMUL_DESC_TRANSB, &n, sizeof n));
    if (k->bias) {
        cublasLtEpilogue_t e = CUBLASLT_EPILOGUE_BIAS;
        TD_TRY(set_op(p, CUBLASLT_MATMUL_DESC_EPILOGUE, &e, sizeof e));
        TD_TRY(set_op(p, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &out, sizeof out));
    }
    TD_TRY(set_scaling(p));
    TD_TRY(set_pointers(p, a));
    LT_TRY(cublasLtMatrixLayoutCreate(&p->w, in, (uint64_t)k->K, (uint64_t)k->N, k->K));
    LT_TRY(cublasLtMatrixLayoutCreate(&p->x, in, (uint64_t)k->K, (uint64_t)k->rows, k->ldx));
    LT_TRY(cublasLtMatrixLayoutCreate(&p->y, out, (uint64_t)k->N, (uint64_t)k->rows, k->ldy));
    return plan_heuristic(lt, p);
}

static td_status plan_of(td_cuda_lt *lt, const td_cuda_lt_args *a, lt_plan **out)
{
    lt_key k;
    memset(&k, 0, sizeof k);
    k.N = a->N;
    k.K = a->K;
    for (k.rows = 1; k.rows < a->T;) k.rows *= 2;
    k.scaling = a->scaling;
    k.dtype = a->scaling ? 0 : a->dtype;
    k.y_dtype = a->y_dtype;
    k.bias = a->bias != NULL;
    k.add = a->add;
    k.ldx = (int)a->ldx;
    k.ldy = (int)a->ldy;
    lt_plan *old = &lt->plan[0];
    for (int i = 0; i < lt->n; i++) {
        lt_plan *p = &lt->plan[i];
        if (!memcmp(&p->key, &k, sizeof k)) {
            p->used = ++lt->clock;
            *out = p;
            return TD_OK;
        }
        if (p->used < old->used) old = p;
    }
    lt_plan *p = lt->n < TD_CUDA_LT_PLANS ? &lt->plan[lt->n] : old;
    plan_close(p);
    p->key = k;
    td_status s = plan_open(lt, p, a);
    p->refused = s == TD_ENOSUP;
    if (s != TD_OK && !p->refused) {
        plan_close(p);
        return s;
    }
    if (p == &lt->plan[lt->n]) lt->n++;
    p->used = ++lt->clock;
    *out = p;
    return TD_OK;
}

td_status td_cuda_lt_gemm(td_cuda_lt *lt, void *stream, const td_cuda_lt_args *a)
{
    if (a->T <= 0) return TD_OK;
    lt_plan *p;
    TD_TRY(plan_of(lt, a, &p));
    if (p->refused) return td_refuse(TD_ENOSUP, "cuBLASLt: no algorithm for %d x %d", a->N, a->K);
    uint64_t rows = (uint64_t)a->T;
    LT_TRY(cublasLtMatrixLayoutSetAttribute(p->x, CUBLASLT_MATRIX_LAYOUT_COLS, &rows, sizeof rows));
    LT_TRY(cublasLtMatrixLayoutSetAttribute(p->y, CUBLASLT_MATRIX_LAYOUT_COLS, &rows, sizeof rows));
    TD_TRY(set_pointers(p, a));
    float one = 1, beta = a->add ? 1.f : 0.f;
    return lt_failed(cublasLtMatmul(lt->handle, p->op, &one, a->w, p->w, a->x, p->x, &beta, a->y, p->y, a->y,
                                    p->y, &p->algo, lt->ws, TD_CUDA_LT_WS_BYTES, (cudaStream_t)stream),
                     "product");
}
