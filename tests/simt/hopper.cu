// SPDX-License-Identifier: Apache-2.0
/* tests/simt/hopper.cu - in place of the files for sm_90a, which the shim cannot run: the portable kernels
 * behind their names, so that the choice among kernels is tested. Options "wrong" 4 and 8 plant an error in
 * the product and in attention. */
#include "kernels/cuda_attn.h"
#include "kernels/cuda_gemm.h"
#include "kernels/td_cuda.h"

/* The first element, somewhat larger: bits of its own. wrong: much larger. */
static __global__ void nudge_kernel(float *y, int wrong)
{
    y[0] = wrong ? y[0] + 1.f : __uint_as_float(__float_as_uint(y[0]) ^ 1u);
}

static int nudge(void *stream, void *y, int wrong)
{
    return (int)td_launch(nudge_kernel, dim3(1), dim3(1), 0, (cudaStream_t)stream, (float *)y, wrong);
}

int td_cuda_gemm_hopper(void *stream, const td_cuda_gemm_args *a)
{
    td_cuda_gemm_args b = *a;
    b.kernel = 3;
    int e = td_cuda_gemm(stream, &b);
    return e || !(simt::opt.wrong & 4) ? e : nudge(stream, a->y, 1);
}

int td_cuda_attention_hopper(void *stream, const td_cuda_attn_args *a, int32_t *redo, int max_blocks)
{
    td_cuda_attn_args b = *a;
    b.few = false;
    (void)redo, (void)max_blocks;
    int e = td_cuda_attention(stream, &b);
    return e ? e : nudge(stream, a->out, simt::opt.wrong & 8);
}
