// SPDX-License-Identifier: Apache-2.0
/* tests/simt/ceiling_none.c - the shim has no largest product: the benchmark does without. What stands in for the
 * library's own default is tests/simt/cublaslt.cu, so that the ratio to it is computed. */
#include "common/check.h"
#include "kernels/cuda_lt.h"
#include "tests/gpu/ceiling.h"
#include <stdlib.h>

struct ceiling_product {
    td_cuda_lt_args a;
    void *stream;
};

int ceiling_product_open(void *stream, const ceiling_args *a, ceiling_product **out)
{
    if (!a->y_f32) return 1;
    ceiling_product *p = td_xalloc(sizeof *p);
    p->stream = stream;
    p->a = (td_cuda_lt_args){.N = a->N,
                             .K = a->K,
                             .T = a->T,
                             .dtype = TD_BF16,
                             .w = a->w,
                             .x = a->x,
                             .ldx = (size_t)a->K,
                             .w_scale = a->w_scale,
                             .x_scale = a->x_scale,
                             .y = a->y,
                             .y_dtype = TD_F32,
                             .ldy = (size_t)a->N,
                             .scaling = a->w_scale ? TD_CUDA_LT_ROW_SCALES : TD_CUDA_LT_PLAIN};
    *out = p;
    return 0;
}

int ceiling_product_run(ceiling_product *p)
{
    return td_cuda_lt_gemm(NULL, p->stream, &p->a) != TD_OK;
}

void ceiling_product_close(ceiling_product *p)
{
    free(p);
}
