// SPDX-License-Identifier: Apache-2.0
/* tests/simt/cublaslt.cu - kernels/cuda_lt.h on the shim: one thread an output, one chain in ascending k (of
 * codes: one a group of 128 columns). Bits of its own, so that tests see which kernel ran; it holds its callers to
 * the library's rules (alignment, multiples). Option "wrong" 2 plants an error in plain products, 16 in those of
 * codes: the scale of the row before; N = 8 is a shape that it does not take. */
#include "kernels/cuda_lt.h"
#include "kernels/td_cuda.h"
#include <stdlib.h>

struct td_cuda_lt {
    void *ws;
};

size_t td_cuda_lt_version(void)
{
    return TD_CUDA_LT_SCALES + 1;
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

static TD_DEV float code(const uint8_t *p)
{
    const unsigned e = *p >> 3 & 15u, m = *p & 7u;
    const float v = e ? (float)(8 + m) * exp2f((float)e - 10.f) : (float)m * 0x1p-9f;
    return (*p & 0x7fu) == 0x7fu ? NAN : *p & 0x80u ? -v : v;
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

/* Where cuda_lt.h says that the scales of this element are. */
static TD_DEV float scale_at(const td_cuda_lt_args &a, int t, int n, int k, int wrong)
{
    const int r = wrong && n ? n - 1 : n, b = k / 128, wide = (a.K / 128 + 3) / 4 * 4;
    if (a.scaling == TD_CUDA_LT_ROW_SCALES) return a.w_scale[r] * a.x_scale[t];
    const float x = a.x_scale[(size_t)b * (size_t)a.T + (size_t)t];
    if (a.scaling == TD_CUDA_LT_BLOCK_SCALES)
        return a.w_scale[(size_t)(r / 128) * (size_t)wide + (size_t)(wrong ? !b : b)] * x;
    return a.w_scale[(size_t)b * (size_t)a.N + (size_t)r] * x;
}

static __global__ void codes_kernel(td_cuda_lt_args a, int wrong)
{
    const int n = (int)(blockIdx.x * blockDim.x + threadIdx.x), t = (int)blockIdx.y,
              group = a.scaling == TD_CUDA_LT_ROW_SCALES ? a.K : 128;
    if (n >= a.N) return;
    const uint8_t *w = (const uint8_t *)a.w + (size_t)n * (size_t)a.K,
                  *x = (const uint8_t *)a.x + (size_t)t * a.ldx;
    float sum = 0;
    for (int k0 = 0; k0 < a.K; k0 += group) {
        float s = 0;
        for (int k = k0; k < k0 + group; k++) s = fmaf(code(x + k), code(w + k), s);
        sum = fmaf(s, scale_at(a, t, n, k0, wrong), sum);
    }
    float *y = (float *)a.y + (size_t)t * a.ldy + n;
    *y = a.add ? *y + sum : sum;
}

/* What the library's documentation asks for; a caller that does not keep it is an error, not a refusal. */
static bool kept(const td_cuda_lt_args *a)
{
    const bool groups = a->scaling == TD_CUDA_LT_BLOCK_SCALES || a->scaling == TD_CUDA_LT_GROUP_SCALES;
    const size_t bytes = a->scaling ? 1 : 2;
    if (((uintptr_t)a->w | (uintptr_t)a->x | (uintptr_t)a->y) % 16 || a->ldx * bytes % 16 || a->ldy % 4)
        return false;
    if ((size_t)a->K * bytes % 16 || a->N % 4 || a->bias)
        return !a->scaling && (size_t)a->K * bytes % 16 == 0;
    if (a->scaling && ((uintptr_t)a->w_scale | (uintptr_t)a->x_scale) % 16) return false;
    return !groups || (a->T % 4 == 0 && a->K % 128 == 0);
}

td_status td_cuda_lt_gemm(td_cuda_lt *lt, void *stream, const td_cuda_lt_args *a)
{
    (void)lt;
    if (a->T <= 0) return TD_OK;
    if (!kept(a))
        return td_fail(TD_EDEVICE, "cuBLASLt on the shim: %d x %d, %d rows: a rule of cuda_lt.h", a->N, a->K,
                       a->T);
    if (a->N == 8 || a->y_dtype != TD_F32)
        return td_refuse(TD_ENOSUP, "cuBLASLt on the shim: not this shape");
    cudaError_t e = td_launch(a->scaling ? codes_kernel : product_kernel,
                              dim3((unsigned)(a->N + 63) / 64, (unsigned)a->T), dim3(64), 0,
                              (cudaStream_t)stream, *a, simt::opt.wrong & (a->scaling ? 16 : 2));
    return e == cudaSuccess ? TD_OK : td_fail(TD_EDEVICE, "cuBLASLt on the shim: %s", cudaGetErrorString(e));
}
