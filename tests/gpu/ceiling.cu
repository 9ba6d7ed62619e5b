// SPDX-License-Identifier: Apache-2.0
/* tests/gpu/ceiling.cu - see ceiling.h. */
#include "kernels/td_cuda.h"
#include "tests/gpu/ceiling.h"
#include <cublasLt.h>

struct ceiling_product {
    cublasLtHandle_t lt;
    cublasLtMatmulDesc_t op;
    cublasLtMatrixLayout_t w, x, y;
    cublasLtMatmulAlgo_t algo;
    cudaStream_t stream;
    const void *pw, *px;
    void *py, *ws;
};

static const size_t WORKSPACE = (size_t)64 << 20;

static int run_with(ceiling_product *p, const cublasLtMatmulAlgo_t *algo)
{
    const float one = 1, zero = 0;
    return (int)cublasLtMatmul(p->lt, p->op, &one, p->pw, p->w, p->px, p->x, &zero, p->py, p->y, p->py, p->y, algo, p->ws,
                               WORKSPACE, p->stream);
}

extern "C" int ceiling_product_run(ceiling_product *p)
{
    return run_with(p, &p->algo);
}

static float time_of(ceiling_product *p, const cublasLtMatmulAlgo_t *algo)
{
    cudaEvent_t a, b;
    float ms = 1e30f;
    cudaEventCreate(&a);
    cudaEventCreate(&b);
    if (run_with(p, algo) == 0) {
        cudaEventRecord(a, p->stream);
        for (int i = 0; i < 3; i++) run_with(p, algo);
        cudaEventRecord(b, p->stream);
        if (cudaEventSynchronize(b) == cudaSuccess) cudaEventElapsedTime(&ms, a, b);
    }
    cudaEventDestroy(a);
    cudaEventDestroy(b);
    return ms;
}

static int set_op(ceiling_product *p, cublasLtMatmulDescAttributes_t what, const void *v, size_t n)
{
    return (int)cublasLtMatmulDescSetAttribute(p->op, what, v, n);
}

/* Column-major view: y' [N,T] = W' [K,N] transposed times x' [K,T]. */
static int describe(ceiling_product *p, const ceiling_args *a)
{
    const cudaDataType_t in = a->w_scale ? CUDA_R_8F_E4M3 : CUDA_R_16BF,
                         out = a->y_f32 ? CUDA_R_32F : CUDA_R_16BF;
    const int32_t rows = CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
    const cublasOperation_t t = CUBLAS_OP_T;
    int rc = (int)cublasLtCreate(&p->lt);
    if (rc == 0) rc = (int)cublasLtMatmulDescCreate(&p->op, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    if (rc == 0) rc = set_op(p, CUBLASLT_MATMUL_DESC_TRANSA, &t, sizeof t);
    if (rc == 0 && a->w_scale) {
        rc = set_op(p, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &rows, sizeof rows);
        if (rc == 0) rc = set_op(p, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &rows, sizeof rows);
        if (rc == 0) rc = set_op(p, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &a->w_scale, sizeof a->w_scale);
        if (rc == 0) rc = set_op(p, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &a->x_scale, sizeof a->x_scale);
    }
    if (rc == 0) rc = (int)cublasLtMatrixLayoutCreate(&p->w, in, (uint64_t)a->K, (uint64_t)a->N, a->K);
    if (rc == 0) rc = (int)cublasLtMatrixLayoutCreate(&p->x, in, (uint64_t)a->K, (uint64_t)a->T, a->K);
    if (rc == 0) rc = (int)cublasLtMatrixLayoutCreate(&p->y, out, (uint64_t)a->N, (uint64_t)a->T, a->N);
    return rc;
}

static int choose(ceiling_product *p, int choices)
{
    cublasLtMatmulPreference_t pref = nullptr;
    cublasLtMatmulHeuristicResult_t found[8];
    float best = 1e31f;
    int n = 0, rc = (int)cublasLtMatmulPreferenceCreate(&pref);
    if (rc == 0)
        rc = (int)cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                       &WORKSPACE, sizeof WORKSPACE);
    if (rc == 0)
        rc = (int)cublasLtMatmulAlgoGetHeuristic(p->lt, p->op, p->w, p->x, p->y, p->y, pref,
                                                 choices < 8 ? choices : 8, found, &n);
    if (pref) cublasLtMatmulPreferenceDestroy(pref);
    if (rc == 0 && n == 0) rc = -1;
    for (int i = 0; i < n && rc == 0; i++) {
        float ms = n == 1 ? 0.f : time_of(p, &found[i].algo);
        if (ms < best) p->algo = found[i].algo;
        best = ms < best ? ms : best;
    }
    return rc;
}

extern "C" int ceiling_product_open(void *stream, const ceiling_args *a, ceiling_product **out)
{
    ceiling_product *p = new ceiling_product{};
    p->stream = (cudaStream_t)stream;
    p->pw = a->w;
    p->px = a->x;
    p->py = a->y;
    int rc = describe(p, a);
    if (rc == 0) rc = (int)cudaMalloc(&p->ws, WORKSPACE);
    if (rc == 0) rc = choose(p, a->choices);
    if (rc == 0) *out = p;
    else ceiling_product_close(p);
    return rc;
}

extern "C" void ceiling_product_close(ceiling_product *p)
{
    if (!p) return;
    if (p->ws) cudaFree(p->ws);
    if (p->w) cublasLtMatrixLayoutDestroy(p->w);
    if (p->x) cublasLtMatrixLayoutDestroy(p->x);
    if (p->y) cublasLtMatrixLayoutDestroy(p->y);
    if (p->op) cublasLtMatmulDescDestroy(p->op);
    if (p->lt) cublasLtDestroy(p->lt);
    delete p;
}
