/* tests/gpu/ceiling.h - the largest matrix product that cuBLASLt does (the other limit, a read-only stream, is
 * td_cuda_read of kernels/cuda.h). Device pointers; 0 or an error code. Threads: one. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_TESTS_GPU_CEILING_H
#define TD_TESTS_GPU_CEILING_H

#include <stdbool.h>
#include <stddef.h>
#ifdef __cplusplus
extern "C" {
#endif

/* y[T,N] = x[T,K] W[N,K]', without an epilogue. open takes the library's first heuristic, or the best of up to 8
 * by timing; run queues one. Fails without cuBLASLt, and for scales where the device has none. */
typedef struct ceiling_product ceiling_product;
typedef struct ceiling_args {
    int T, N, K;
    const void *x, *w; /* bf16, or e4m3 with scales */
    void *y;           /* bf16, or f32 */
    bool y_f32;
    const float *w_scale, *x_scale; /* NULL, or [N] and [T] */
    int choices;
} ceiling_args;
int ceiling_product_open(void *stream, const ceiling_args *a, ceiling_product **out);
int ceiling_product_run(ceiling_product *p);
void ceiling_product_close(ceiling_product *p);

#ifdef __cplusplus
}
#endif
#endif
