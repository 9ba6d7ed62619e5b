/* kernels/cuda_gemm.h - matrix products on a CUDA device: y[T,N] (+)= x[T,K] W[N,K]' + bias, own kernels for
 * every T.
 *
 * Model:   Weights stand on the M side of the tensor cores' 16 x 8 x 16 product, tokens on its N side. A
 *          weight is packed once into the order in which lanes hold fragments (gemm_cuda_tile.h), in blocks of
 *          16 rows by 64 columns. K is cut into 1, 2, 4 or 8 leaves, a function of (N, K, slices, type) alone;
 *          a leaf is one chain of products in ascending k, starting at 0, and the leaves are added as a binary
 *          tree. bias is added after the tree, y last.
 * Rules:   1. One arithmetic for every T: the kernel for few rows (weights streamed once, up to 64 rows) and
 *             the one for many (tiles of 128 weights by 64 or 128 tokens) give the same bits, so a row's
 *             result depends on its row only.
 *          2. slices = s > 0: leaf i is exactly columns [i K/s, (i+1) K/s), so that ranks holding 8, 4, 2 or 1
 *             of eight slices add up to the same bits over their own part of the same tree. 0: the cut is
 *             chosen here.
 *          3. x is f32 (rounded to the weight's operand type, bf16 or f16, once, to nearest even) or already
 *             that type.
 *          4. A NaN or infinity stays in its row of x. Every element of y [T, N] is written.
 * Types:   BF16, F16; E4M3_ROW: FP8 codes, scale[N] f32 multiplies a leaf's sum; E4M3_BLOCK:
 *          scale[N/scale_rows][K/scale_cols] f32 up, multiplies the sum of each 128 columns (f32); of slices of
 *          64 k or 32 k columns (k odd) of each 64 or 32, so that a slice has one order of summation wherever in
 *          the checkpoint's blocks it begins. Codes become bf16 exactly. Code 0x7f (NaN) reads as 480.
 * Workspace: td_cuda_gemm_ws_bytes(); its first TD_CUDA_GEMM_COUNTERS words must be zero before the first call
 *          and are zero after each. One call at a time per workspace (a stream's order is enough).
 * Threads: any. Errors: cudaError_t as int, 0 is success; shapes the kernels do not take are told by
 *          td_cuda_gemm_refuses when a model is loaded. Limits: N <= 2^20, K <= 2^20, T <= 2^20. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_KERNELS_CUDA_GEMM_H
#define TD_KERNELS_CUDA_GEMM_H

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif
#include "kernels/tensor.h"

typedef enum {
    TD_CUDA_W_BF16,
    TD_CUDA_W_F16,
    TD_CUDA_W_E4M3_ROW,
    TD_CUDA_W_E4M3_BLOCK,
    TD_CUDA_W_TYPES
} td_cuda_wtype;
enum { TD_CUDA_GEMM_COUNTERS = 8192, TD_CUDA_GEMM_FEW = 64, TD_CUDA_GEMM_GROUPS = 512 };

typedef struct td_cuda_weight {
    int N, K;
    int slices; /* 0, or 1, 2, 4, 8: see rule 2 */
    td_cuda_wtype type;
    const void *p;      /* packed, on the device, 256-byte aligned */
    const float *bias;  /* [N] on the device, or NULL */
    const float *scale; /* on the device; FP8 only */
    /* E4M3_BLOCK: rows and columns that share a scale, 16, 32, 64 or 128; 0: 128. Columns: of slices at least the
     * largest of 128, 64, 32 that divides one, without slices 128. */
    int scale_rows, scale_cols;
} td_cuda_weight;

typedef struct td_cuda_gemm_args {
    const td_cuda_weight *w;
    const void *x; /* [T, K] on the device */
    bool x_is_f32; /* else bf16 (F16 weights: f16) */
    size_t ldx;
    int T;
    float *y; /* [T, N] */
    size_t ldy;
    bool add;   /* y += */
    void *ws;   /* 256-byte aligned */
    int kernel; /* 0: by T; tests: 1 few rows (T <= 64), 2 tiles of 64 tokens, 3 tiles of 128 */
} td_cuda_gemm_args;

/* NULL, or why this shape cannot be computed. */
const char *td_cuda_gemm_refuses(int N, int K, int slices, td_cuda_wtype type);
size_t td_cuda_gemm_packed_bytes(int N, int K, int slices, td_cuda_wtype type);
size_t td_cuda_gemm_ws_bytes(int max_T, int max_N, int max_K);
/* Rows [n0, n1) (n0 a multiple of 16; n1 too or N) of a row-major [N, K] matrix into the whole packed dst.
 * Host to host: src is bf16, f16 or f32 for BF16 and F16 (converted), codes for FP8 (`from` unused). Device
 * to device: src of the weight's own element type. Padding is written. */
void td_cuda_gemm_pack_host(void *dst, const void *src, td_dtype from, int N, int K, int slices,
                            td_cuda_wtype type, int n0, int n1);
int td_cuda_gemm_pack(void *stream, void *dst, const void *src, int N, int K, int slices, td_cuda_wtype type,
                      int n0, int n1);
/* out[t] = row ids[t] as f32 (tied embeddings); BF16 and F16; an id outside [0, N): zeros. ids on the device.
 */
int td_cuda_gemm_embed(void *stream, const td_cuda_weight *w, const int32_t *ids, int T, float *out,
                       size_t ldo);
int td_cuda_gemm(void *stream, const td_cuda_gemm_args *a);

/* Products of one shape, the rows' owners known on the device only (experts): rows row0[e] .. row0[e + 1] - 1
 * of x and y belong to weight e. Each row's bits are those of td_cuda_gemm with that weight. */
typedef struct td_cuda_grouped_args {
    td_cuda_weight shape;      /* N, K, slices, type of all; its pointers are not read */
    int n;                     /* weights, at most TD_CUDA_GEMM_GROUPS */
    const void *const *p;      /* device, [n] packed weights */
    const float *const *bias;  /* device, [n], or NULL */
    const float *const *scale; /* device, [n]; FP8 only */
    const int32_t *row0;       /* device, [n + 1], ascending */
    int max_rows;              /* row0[n] is at most this */
    const void *x;
    bool x_is_f32;
    size_t ldx;
    float *y;
    size_t ldy;
    void *ws;   /* td_cuda_gemm_ws_bytes(max_rows, N, K) */
    int kernel; /* 0: by max_rows / n; tests: 1 and 2 tiles of 8 and 16 rows, 3 of 64 */
} td_cuda_grouped_args;
int td_cuda_gemm_grouped(void *stream, const td_cuda_grouped_args *a);

/* Hopper's kernel (sm_90a; BF16 and E4M3_ROW; x f32 or bf16; T <= 65408): the same leaves and tree, but
 * products whose inner sums are wgmma's, so its bits are its own. Off by default until
 * a run on a GPU is recorded. */
int td_cuda_gemm_hopper(void *stream, const td_cuda_gemm_args *a);

#ifdef __cplusplus
}
#endif
#endif
