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

/* Column-major view: y' [N,T] = W' [K,N] transposed times x' [K,T]. */
extern "C" int ceiling_product_open(void *stream, int T, int N, int K, const void *x, const void *w, void *y, int choices,
                                    ceiling_product **out)
{
    ceiling_product *p = new ceiling_product{};
    cublasLtMatmulPreference_t pref = nullptr;
    cublasLtMatmulHeuristicResult_t found[8];
    cublasOperation_t t = CUBLAS_OP_T;
    int n = 0, rc = 0;
    p->stream = (cudaStream_t)stream;
    p->pw = w;
    p->px = x;
    p->py = y;
    rc |= cublasLtCreate(&p->lt);
    rc |= cublasLtMatmulDescCreate(&p->op, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    rc |= cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_TRANSA, &t, sizeof t);
    rc |= cublasLtMatrixLayoutCreate(&p->w, CUDA_R_16BF, (uint64_t)K, (uint64_t)N, K);
    rc |= cublasLtMatrixLayoutCreate(&p->x, CUDA_R_16BF, (uint64_t)K, (uint64_t)T, K);
    rc |= cublasLtMatrixLayoutCreate(&p->y, CUDA_R_16BF, (uint64_t)N, (uint64_t)T, N);
    rc |= cublasLtMatmulPreferenceCreate(&pref);
    if (rc == 0)
        rc = cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE,
                                                  sizeof WORKSPACE);
    if (rc == 0) rc = (int)cudaMalloc(&p->ws, WORKSPACE);
    if (rc == 0)
        rc = cublasLtMatmulAlgoGetHeuristic(p->lt, p->op, p->w, p->x, p->y, p->y, pref, choices < 8 ? choices : 8, found,
                                            &n);
    if (rc == 0 && n == 0) rc = -1;
    float best = 1e31f;
    for (int i = 0; i < n && rc == 0; i++) {
        float ms = n == 1 ? 0.f : time_of(p, &found[i].algo);
        if (ms < best) p->algo = found[i].algo;
        best = ms < best ? ms : best;
    }
    if (pref) cublasLtMatmulPreferenceDestroy(pref);
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
