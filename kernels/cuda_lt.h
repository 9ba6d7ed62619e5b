/* kernels/cuda_lt.h - matrix products by cuBLASLt, for many rows in the fast mode: y[T,N] (+)= x[T,K] W[N,K]'
 * + bias.
 *
 * Model:   W is row-major as in the checkpoint (not packed), bf16, f16 or E4M3 with scales; x is of the same type
 *          (bf16, f16, e4m3 with scales: cuda_quant.h), y f32, bf16 or f16; sums in f32, of codes too (the library's
 *          fast accumulation, about 14 bits, stays off). The bias is added in the product's own epilogue; with codes
 *          there is none (the library takes it as bf16 then). For each (N, K, T rounded up to a power of two, types)
 *          the first call asks for the library's heuristics and keeps the answer, so a shape always runs the same
 *          kernel: runs repeat, but rows are not invariant to T. Never used with --deterministic.
 * Ownership: open/close; the workspace is the caller's.
 * Threads: one at a time per handle, all on one stream order.
 * Errors:  TD_ENOSUP (no algorithm for the shape), TD_EDEVICE; the cause is logged.
 * Limits:  TD_CUDA_LT_PLANS shapes; when they are used up, the oldest is dropped. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_KERNELS_CUDA_LT_H
#define TD_KERNELS_CUDA_LT_H

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif
#include "common/status.h"
#include "kernels/tensor.h"

typedef struct td_cuda_lt td_cuda_lt;
enum { TD_CUDA_LT_PLANS = 256, TD_CUDA_LT_WS_BYTES = 32 << 20 };

/* How codes are scaled; the library has these on sm_90, from its version TD_CUDA_LT_SCALES on. All f32, 16-byte
 * aligned.
 *   ROWS    y[t][n] = w_scale[n] * x_scale[t] * sum           w_scale [N], x_scale [T]
 *   BLOCKS  each 128 columns: w_scale * x_scale * their sum   w_scale [ceil(N / 128)][K / 128 up to a multiple of 4],
 *                                                             x_scale [K / 128][T]
 *   GROUPS  the same, w_scale [K / 128][N]
 * BLOCKS and GROUPS: N and T multiples of 4, K of 128 (the library's own limit is not so tight). */
typedef enum {
    TD_CUDA_LT_PLAIN,
    TD_CUDA_LT_ROW_SCALES,
    TD_CUDA_LT_BLOCK_SCALES,
    TD_CUDA_LT_GROUP_SCALES
} td_cuda_lt_scaling;
enum { TD_CUDA_LT_SCALES = 120900 };

typedef struct td_cuda_lt_args {
    int N, K, T;
    td_cuda_lt_scaling scaling; /* PLAIN: w and x are `dtype` (bf16 or f16); else e4m3 */
    td_dtype dtype;
    const void *w; /* [N, K] on the device, 16-byte aligned; K a multiple of 8 (fp8: 16) */
    const void *x; /* [T, K], 16-byte aligned, as y and their rows */
    size_t ldx;
    const float *w_scale, *x_scale;
    const void *bias; /* PLAIN: [N] of y_dtype (y f32: f32) on the device, 16-byte aligned; or NULL */
    void *y;
    td_dtype y_dtype;
    size_t ldy;
    bool add; /* y += (with a bias: of the first call of the sum only) */
} td_cuda_lt_args;

size_t td_cuda_lt_version(void); /* of the library; 0: this build has none */
/* ws: TD_CUDA_LT_WS_BYTES on the device, 256-byte aligned, borrowed. */
td_status td_cuda_lt_open(void *ws, td_cuda_lt **out);
void td_cuda_lt_close(td_cuda_lt *lt); /* NULL: nothing */
td_status td_cuda_lt_gemm(td_cuda_lt *lt, void *stream, const td_cuda_lt_args *a);

#ifdef __cplusplus
}
#endif
#endif
