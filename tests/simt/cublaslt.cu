// SPDX-License-Identifier: Apache-2.0
/* tests/simt/cublaslt.cu - kernels/cuda_lt.h on the shim: one thread an output, one chain in ascending k.
 * Bits of its own, so that tests see which kernel ran; option "wrong" 2 plants an error, and N = 8 is a shape
 * that it does not take. */
#include "kernels/cuda_lt.h"
#include "kernels/td_cuda.h"
#include <stdlib.h>

struct td_cuda_lt {
    void *ws;
};

size_t td_cuda_lt_version(void)
{
    return 1;
}

td_status td_cuda_lt_open(void *ws, td_cuda_lt **out)
{
    *out = (td_cuda_lt *)malloc(sizeof **out);
    (*out)->ws = ws;
    return TD_OK;
}

void td_cuda_lt_close(td_cuda_lt *lt)
{
    free(lt);
}

static TD_DEV float element(const uint16_t *p, bool f16)
{
    return f16 ? __half2float(__ushort_as_half(*p)) : __bfloat162float(__ushort_as_bfloat16(*p));
}

static __global__ void product_kernel(td_cuda_lt_args a, int wrong)
{
    const int n = (int)(blockIdx.x * blockDim.x + threadIdx.x), t = (int)blockIdx.y;
    if (n >= a.N) return;
    const uint16_t *w = (const uint16_t *)a.w + (size_t)n * (size_t)a.K,
                   *x = (const uint16_t *)a.x + (size_t)t * a.ldx;
    const bool f16 = a.dtype == TD_F16;
    float s = 0;
    for (int k = 0; k < a.K; k++) s = fmaf(element(x + k, f16), element(w + k, f16), s);
    if (wrong && n == 2) s += 1;
    float *y = (float *)a.y + (size_t)t * a.ldy + n;
    if (a.add) s += *y;
    if (a.bias) s += ((const float *)a.bias)[n];
    *y = s;
}

td_status td_cuda_lt_gemm(td_cuda_lt *lt, void *stream, const td_cuda_lt_args *a)
{
    (void)lt;
    if (a->T <= 0) return TD_OK;
    if (a->N == 8 || a->fp8 || a->y_dtype != TD_F32)
        return td_refuse(TD_ENOSUP, "cuBLASLt on the shim: not this shape");
    cudaError_t e = td_launch(product_kernel, dim3((unsigned)(a->N + 63) / 64, (unsigned)a->T), dim3(64), 0,
                              (cudaStream_t)stream, *a, simt::opt.wrong & 2);
    return e == cudaSuccess ? TD_OK : td_fail(TD_EDEVICE, "cuBLASLt on the shim: %s", cudaGetErrorString(e));
}
