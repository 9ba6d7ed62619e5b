/* tests/gpu/ceiling.h - the largest matrix product that cuBLASLt does (the other limit, a read-only stream, is td_cuda_read of
 * kernels/cuda.h). Device pointers; 0 or an error code. Threads: one. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_TESTS_GPU_CEILING_H
#define TD_TESTS_GPU_CEILING_H

#include <stddef.h>
#ifdef __cplusplus
extern "C" {
#endif

/* bf16 y[T,N] = x[T,K] W[N,K]'. open chooses the best of 8 heuristics by timing; run queues one. Fails without cuBLASLt. */
typedef struct ceiling_product ceiling_product;
int ceiling_product_open(void *stream, int T, int N, int K, const void *x, const void *w, void *y, int choices,
                         ceiling_product **out);
int ceiling_product_run(ceiling_product *p);
void ceiling_product_close(ceiling_product *p);

#ifdef __cplusplus
}
#endif
#endif
