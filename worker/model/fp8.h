/* worker/model/fp8.h - weights that a checkpoint stores as FP8 codes (e4m3) with scales: which they are, their
 * scales' tensors, and where each scale goes when matrices are joined or cut.
 *
 *   W[n][k] = f32(code[n][k] * scale)     one scale a row (TD_FP8_ROWS), or one a block of 128 x 128 (TD_FP8_BLOCKS)
 *
 * Rules:     1. A matrix is FP8 exactly if quantization_config says so: the tensor's dtype, the presence of its
 * scales and the list of what stays as it is must agree, or the tensor is refused by name. lm_head may be either.
 *            2. Activations are not rounded to FP8, whatever the checkpoint's scheme is for them: a product has the
 * exact weights and its family's own operand type. (The rounding is a loss taken for speed, not part of the model:
 * it is taken in one place alone, steps of more than 64 rows in the CUDA family's fast mode on Hopper,
 *           kernels/choose_cuda.h.)  3. Families that compute with codes (td_ops.packed_dtype of E4M3 is E4M3:
 * ref, cuda) get them with the scales behind them; for the others the product above is packed as any f32 matrix.
 *            4. Joined and cut matrices keep the stored scales: td_piece.scale_rows and scale_cols are the largest
 * powers of two up to 128 at which every join and cut falls on a boundary, so a scale may be written several times.
 * Names:     weight + "_scale_inv" (transformers' fp8) or + "_scale" (compressed-tensors); both multiply.
 * Threads:   pure. Errors: EPROTO, ENOSUP. Source: transformers 5.5.4 finegrained_fp8; compressed-tensors 0.12. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_MODEL_FP8_H
#define TD_WORKER_MODEL_FP8_H

#include "worker/model/weights.h"

enum { TD_FP8_BLOCK = 128 };

/* Does the list keep this module ("model.layers.0.mlp.down_proj") from being FP8? */
bool td_fp8_keeps(const td_fp8_desc *f, const char *module);
/* Entries that can be matched: names; where any_part is off also "re:" and an expression of characters, ., [..], *,
 * +, ?, ^ and $. */
bool td_fp8_pattern_ok(const char *entry, bool any_part);

/* Finds and checks the scales of a part whose tensor is bound (src); leaves part->scale NULL where it is not FP8. */
td_status td_fp8_bind(const td_plan *p, const td_piece *e, td_part *part);
/* scale_rows and scale_cols of a bound piece. */
void td_fp8_arrange(const td_plan *p, td_piece *e);

/* The piece's scales, as td_weight has them. */
void td_fp8_scales(const td_piece *e, td_fp8_kind kind, float *out);
/* Rows [n0, n1) of codes [.., K] times their scales. */
void td_fp8_multiply(const td_piece *e, td_fp8_kind kind, const uint8_t *codes, int n0, int n1, float *out);

#endif
