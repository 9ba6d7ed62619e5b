/* kernels/cuda_attn.h - attention over paged keys and values on a CUDA device: prompts, chunks and generated
 * rows.
 *
 * Model:   A row's keys are cut into splits of 256 at absolute multiples of 256, a split into tiles of 64. A
 *          split is one online softmax over its tiles (f32, base 2; scores from bf16 or f16 products, weights
 *          rounded to that type before the product with V) from an empty state; splits are merged in ascending
 *          order. The prompt kernel does all of a row's splits in turn; the kernel for few rows gives every
 *          split to a warp of its own and a third kernel merges. All of it is one text (attn_cuda_tile.h), so
 *          both ways give the same bits. Rows of the H / G query heads that share a kv head are packed into the
 *          M side of the products.
 * Rules:   1. A row's bits depend on its query, its keys and values, and nothing else: not on the page size,
 *             the chunk, the batch, nor on which kernel ran.
 *          2. A key that a row does not see contributes an exact zero, finite or not.
 *          3. Every element of the rows of all sequences is written; a row without keys gives zeros.
 * Plan:    td_cuda_attn_plan() makes the work list of a step on the device; it serves every layer of the page
 *          group (one window). Sequences of up to 64 rows times heads per group go to the split kernel as long
 *          as their partial results fit `max_slots`, all others to the prompt kernel. A split costs 1 to 4
 *          tiles, so lengths however skewed spread evenly.
 * Shapes:  q [T, H*D] f32, 16-byte aligned, ldq % 4 = 0; out [T, H*D] of out_dtype; D a multiple of 8 up to 256
 *          (D 64, 96, 128 and 256 at full speed, others padded to the next); kv->base 16-byte aligned on the
 *          device, kv itself and the arguments host memory; any P (8 and less and odd ones are slower). Pages
 *          before the window may be -1.
 * Threads: any. Errors: a cudaError_t as int. Limits: positions below 2^30; n_seq <= TD_CUDA_ATTN_MAX_SEQ; pages
 *          of one slot below 64 GiB. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_KERNELS_CUDA_ATTN_H
#define TD_KERNELS_CUDA_ATTN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#include "kernels/ops.h"

enum {
    TD_CUDA_ATTN_SPLIT = TD_ATTN_SPLIT,
    TD_CUDA_ATTN_FEW = 64,
    TD_CUDA_ATTN_MAX_SEQ = 8192,
    TD_CUDA_ATTN_MAX_RANKS = 64
};

typedef td_attn_place td_cuda_attn_seq;

typedef struct td_cuda_attn_args {
    const float *q;
    size_t ldq;
    void *out;
    size_t ldo;
    td_dtype out_dtype; /* f32, or the type of the next product's input */
    const td_kv *kv;    /* bf16 or f16 */
    int slot;
    const td_cuda_attn_seq *seq; /* device, [n_seq] */
    int n_seq;
    const int32_t *pages; /* device */
    int H, G, D;
    float scale;
    int window;         /* 0: none */
    float softcap;      /* 0: none; else scores become c * tanh(s / c) */
    const float *sinks; /* device, [H]; NULL: none. A logit per head that adds to the denominator only */
    int T;              /* rows in all, an upper bound */
    bool prompts; /* false: the caller knows that every sequence goes to the split kernel (rule in Plan) */
    bool few;     /* false: ... that none does */
    const void *plan; /* of td_cuda_attn_plan with the same seq, H, G, window */
    void *ws;         /* td_cuda_attn_ws_bytes(max_slots, D) */
    size_t max_slots;
    /* NULL, or as td_attn_args.part, 8-byte aligned: then no out; sinks are not added. All sequences go to the
     * split kernel; plan is of td_cuda_attn_plan_parts with the same seq and n_parts. */
    float *part;
    int part0, n_parts, rank, ranks;
} td_cuda_attn_args;

/* NULL, or why these shapes cannot be computed. */
const char *td_cuda_attn_refuses(int H, int G, int D, int P, td_dtype kv_dtype);
size_t td_cuda_attn_plan_bytes(int n_seq);
size_t td_cuda_attn_ws_bytes(size_t max_slots, int D);
/* few: TD_CUDA_ATTN_FEW (tests: 0 sends every sequence to the prompt kernel). */
int td_cuda_attn_plan(void *stream, const td_cuda_attn_seq *seq, int n_seq, int H, int G, int D, int window,
                      size_t max_slots, int few, void *plan);
int td_cuda_attn_plan_parts(void *stream, const td_cuda_attn_seq *seq, int n_seq, int H, int G, int n_parts,
                            void *plan);
/* As td_ops.attn_merge; part: host array of device addresses. */
int td_cuda_attn_merge(void *stream, const float *const *part, const float *before, float *state, float *out,
                       size_t ldo, int T, int H, int D, int n_parts, int ranks);
int td_cuda_attention(void *stream, const td_cuda_attn_args *a);
/* Hopper's kernel for the sequences of the prompt kernel (sm_90a; bf16, D 64 and 128, P 8 to 128 a power of
 * two or a multiple of 128); its bits are its own. redo: max_blocks marks, zero before the first call and
 * after each. Off by default until a run on a GPU is recorded. Rows of the split
 * kernel: td_cuda_attention with prompts = false. */
int td_cuda_attention_hopper(void *stream, const td_cuda_attn_args *a, int32_t *redo, int max_blocks);

#ifdef __cplusplus
}
#endif
#endif
