/* kernels/choose_cuda.h - which kernel a product or an attention call of the CUDA table runs, and whether it may.
 *
 * Model:   Two modes. Deterministic: the portable kernels (cuda_gemm.h, cuda_attn.h), one arithmetic for every row
 *          count. Fast: besides them cuBLASLt from TD_CUDA_LT_ROWS rows on, for weights that have a row-major copy,
 *          and Hopper's kernels. Weights that are FP8 codes: cuBLASLt multiplies codes, so x becomes codes, too
 *          (cuda_quant.h): one scale a row where W has one a row, one per 128 columns where W has blocks. That is
 *          a loss that the portable kernels, which read the exact x as bf16, do not have: a step of the fast mode
 *          alone. The same kernel for the same shape always: a run repeats, and rows are invariant inside one
 *          kernel; but a row's bits depend on how many rows share its step.
 * Rules:   1. A kernel for Hopper is a candidate only if its results on a device are recorded (proven_cuda.h): the
 *             shim runs it by the text of the ISA alone. cuBLASLt is the vendor's: for it rule 2 is enough.
 *          2. td_cuda_choice_check runs the smallest cases of every candidate: the portable kernels against the
 *             host, the others against the portable ones. A candidate that differs is dropped with one line; a
 *             portable kernel that differs is an error.
 *          3. numerics says what arithmetic is left: with no candidate left it is the deterministic mode's.
 *          4. A call that a candidate does not take (shape, alignment) goes to the portable kernel; so do the last
 *             T % 4 rows of a product with blocks of scales, from x's codes.
 * Copies:  td_cuda_choice_copies: row-major beside the packed ones, all of a model's or none, and only if they take
 *          at most half of what is free then, on every rank of a worker; else one line, and the model is computed by the
 *          portable kernels.
 * Ownership: memory of the check is given back, copies are the caller's; x16 and cuBLASLt's workspace are the choice's until cuBLASLt
 *          is dropped, before the first step, redo until close.
 * Threads: one. Errors: EDEVICE, EFULL; ENOSUP: a portable kernel computes otherwise than the host. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_KERNELS_CHOOSE_CUDA_H
#define TD_KERNELS_CHOOSE_CUDA_H

#include "kernels/cuda_attn.h"
#include "kernels/cuda_gemm.h"
#include "kernels/cuda_quant.h"
#include "kernels/dev.h"
#include "kernels/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    TD_CUDA_LT_ROWS = TD_CUDA_GEMM_FEW + 1,
    TD_CUDA_COPY_SHARE = 2 /* one part in so many of the free memory */
};
/* What is not portable, as bits. */
enum { TD_CUDA_LT = 1, TD_CUDA_GEMM_SM90A = 2, TD_CUDA_ATTN_SM90A = 4, TD_CUDA_LT_E4M3 = 8 };

typedef struct td_cuda_choice {
    td_dev *dev;
    unsigned may; /* candidates that are left */
    char numerics[96];
    struct td_cuda_lt *lt;
    char *lt_ws, *x16; /* x16: x in the type of the product; or its codes and their scales */
    size_t x16_bytes;
    int32_t *redo; /* of cuda_attn.h, zeros between calls */
    int max_blocks;
    bool copied; /* some model has row-major copies */
} td_cuda_choice;

/* fast: candidates as the rules say, and those of `also`, which tests take as proven. */
td_status td_cuda_choice_open(td_dev *dev, bool fast, unsigned also, td_cuda_choice *c);
void td_cuda_choice_close(td_cuda_choice *c);
void td_cuda_choice_drop(td_cuda_choice *c, unsigned bits);
td_status td_cuda_choice_check(td_cuda_choice *c);
/* Room for calls of up to so many rows (of all sequences), columns, blocks of the prompt kernel. Nothing is
 * allocated by calls within it; a larger one goes to the portable kernel. 0: as before. */
td_status td_cuda_choice_reserve(td_cuda_choice *c, int max_rows, int max_K, long long max_blocks);
/* Row-major copies of n packed weights, of codes with their scales as cuda_lt.h has them, in one block of device
 * memory, which the caller frees; rows[i] is set where there is one. *block NULL: there are none, for the reason
 * that was logged. ranks: as of td_ops.beside; they have the same candidates. */
td_status td_cuda_choice_copies(td_cuda_choice *c, const td_cuda_weight *w, const void **rows, int n,
                                const td_ops_agree *ranks, void **block);
/* One of them: its bytes, and the copy itself (device to device). */
size_t td_cuda_choice_copy_bytes(const td_cuda_weight *w);
int td_cuda_choice_copy(void *stream, const td_cuda_weight *w, void *to);

/* The group of cuda_quant.h if a product of T rows with this weight is one of codes, else -1. */
int td_cuda_choice_codes(const td_cuda_choice *c, const td_cuda_weight *w, const void *rows, int T);
/* rows: the row-major copy or NULL. codes: x as codes instead of a->x, for td_cuda_choice_codes alone; else NULL. */
td_status td_cuda_choice_gemm(td_cuda_choice *c, void *stream, const td_cuda_gemm_args *a, const void *rows,
                              const td_cuda_codes *codes);
td_status td_cuda_choice_attention(td_cuda_choice *c, void *stream, const td_cuda_attn_args *a);

/* Device to device: the row-major [N, K] matrix that a packed one was made from. */
int td_cuda_gemm_unpack(void *stream, void *dst, const void *packed, int N, int K, int slices, bool codes);

#ifdef __cplusplus
}
#endif
#endif
