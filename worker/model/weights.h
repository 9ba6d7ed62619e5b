/* worker/model/weights.h - the list of a model's weights: one list of pieces says names, shapes, how parts
 * are joined, where the packed bytes lie and which pointer of the model they fill.
 *
 *   descriptor -> pieces (build) -> source tensors (bind) -> offsets in the image (place)
 *              -> packed bytes (fill) -> pointers (attach)
 *
 * Rules:     1. q, k, v are one matrix [(H + 2G) D, E]; gate and up are one [2F, E]; their biases are joined
 *               likewise, in f32.
 *            2. A missing tensor, a wrong shape or a dtype the kernels cannot take is refused by name. An
 *               unknown tensor is ignored: rotary inv_freq (and lm_head of a tied model) silently, others
 *               with one line for all.
 *            3. Parts used as stored (the ref family where nothing is joined; the untied embedding table)
 *               have no bytes in the image.
 *            4. The plan, and so the image, is a function of the descriptor, the stored dtypes and the
 *               family's layout only.
 * Ownership: names are in the plan; tensors are borrowed from td_safetensors.
 * Threads:   one owner; fill runs on the pool. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_MODEL_WEIGHTS_H
#define TD_WORKER_MODEL_WEIGHTS_H

#include "common/hash.h"
#include "worker/model/model.h"
#include "worker/model/safetensors.h"

typedef struct td_layer {
    const float *attn_norm, *ffn_norm, *q_norm, *k_norm; /* q_norm, k_norm: NULL unless qk_norm */
    td_weight qkv, o, gate_up, down;
} td_layer;

typedef struct td_weights {
    td_layer layer[TD_MAX_LAYERS];
    const float *final_norm;
    td_weight head; /* lm_head; the packed embedding when tied */
    td_table table; /* embedding rows when not tied (p NULL: tied) */
} td_weights;

typedef enum { TD_PIECE_MATRIX, TD_PIECE_VECTOR, TD_PIECE_TABLE } td_piece_kind;

typedef struct td_part {
    char name[112];
    int rows;
    const td_st_tensor *src;
} td_part;

typedef struct td_piece {
    td_piece_kind kind;
    int N, K, n_parts; /* vector: K = 1 */
    td_part part[3];
    td_dtype from, to;    /* as stored; as packed */
    bool as_stored;       /* read straight from the file */
    float dummy;          /* vectors of a dummy model: 1 for norms, 0 for biases */
    size_t offset, bytes; /* in the image; 0 bytes if as_stored */
    td_weight *weight;    /* what attach fills */
    const float **vector;
    td_table *table;
} td_piece;

typedef struct td_plan {
    const td_model_desc *desc;
    const td_ops *ops;
    td_piece *piece;
    size_t n, image_bytes;
    const td_safetensors *files; /* NULL: dummy */
} td_plan;

typedef void td_progress_fn(void *arg, const char *what, double fraction);

/* files NULL: a dummy model of desc->dtype. The pointers of w are filled by attach. On error nothing has to
 * be released. */
td_status td_plan_open(td_plan *p, const td_model_desc *d, const td_ops *ops, const td_safetensors *files,
                       td_weights *w);
void td_plan_close(td_plan *p);
td_h128 td_plan_digest(const td_plan *p);  /* of every offset, size and dtype */
bool td_plan_uses_files(const td_plan *p); /* some piece is read as stored */
void td_plan_fill(const td_plan *p, uint8_t *image, td_pool *pool, td_progress_fn *progress, void *arg);
void td_plan_attach(const td_plan *p, const uint8_t *image);
size_t td_plan_row_bytes(const td_plan *p); /* weight bytes read by one forward pass of one row */

#endif
