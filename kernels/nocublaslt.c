// SPDX-License-Identifier: Apache-2.0
/* kernels/nocublaslt.c - stands in for gemm_cublaslt.cu where cuBLASLt is not found. */
#include "kernels/cuda_lt.h"

size_t td_cuda_lt_version(void)
{
    return 0;
}

td_status td_cuda_lt_open(void *ws, td_cuda_lt **out)
{
    (void)ws, (void)out;
    return td_refuse(TD_ENOSUP, "cuBLASLt is not in this build");
}

void td_cuda_lt_close(td_cuda_lt *lt)
{
    (void)lt;
}

td_status td_cuda_lt_gemm(td_cuda_lt *lt, void *stream, const td_cuda_lt_args *a)
{
    (void)lt, (void)stream, (void)a;
    return td_refuse(TD_ENOSUP, "cuBLASLt is not in this build");
}
