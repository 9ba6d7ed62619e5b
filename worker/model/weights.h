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
 *            4. A rank's matrices are rows [row0, row0 + rows) and columns [k0, k0 + K) of the stored ones; vectors
 *               that all ranks of a row-parallel matrix add after their sum (its bias) are whole.
 *            5. A dummy's values depend on name, row and column alone: parts of it are parts of one model.
 *            6. Fully sharded: the pieces of a layer lie one after the other in a unit, padded to so many times 64 bytes as
 *               ranks share it; a rank's image has what belongs to no layer, its experts where experts are parallel, and
 *               its equal part of every unit. The embedding and output matrices have this rank's rows only.
 *            7. The plan, and so the image, is a function of the descriptor, the stored dtypes and the
 *               family's layout
 *               and the part only.
 *            8. Experts: one matrix gate and up [2F, E] and one down [E, F] each. On disk they are tensors of their own
 *               (experts.N.{w1,w3,w2} or .{gate,up,down}_proj) or, as transformers 5 keeps them in memory, one tensor
 *               of all: experts.gate_up_proj [n, 2F, E], experts.down_proj [n, E, F]; which, is seen per layer.
 * Ownership: names are in the plan; tensors are borrowed from td_safetensors.
 * Threads:   one owner; fill runs on the pool. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_MODEL_WEIGHTS_H
#define TD_WORKER_MODEL_WEIGHTS_H

#include "common/hash.h"
#include "worker/grid.h"
#include "worker/model/model.h"
#include "worker/model/safetensors.h"

/* gate_up, down: [n_experts], NULL in a layer without experts. */
typedef struct td_moe {
    td_table router; /* [n_experts, E], dtype as stored */
    td_weight *gate_up, *down;
} td_moe;

typedef struct td_layer {
    const float *attn_norm, *ffn_norm, *q_norm, *k_norm; /* q_norm, k_norm: NULL unless qk_norm */
    td_weight qkv, o, gate_up, down;                     /* gate_up, down: of a layer without experts */
    td_moe moe;
} td_layer;

typedef struct td_weights {
    td_layer layer[TD_MAX_LAYERS];
    const float *final_norm;
    td_weight head; /* lm_head; the packed embedding when tied */
    td_table table; /* embedding rows when not tied (p NULL: tied) */
    td_weight *experts; /* what every td_moe points into; owned */
} td_weights;

typedef enum { TD_PIECE_MATRIX, TD_PIECE_VECTOR, TD_PIECE_TABLE } td_piece_kind;
/* By whom a piece is read: every row all of it; one of its rows; the rows that go to this expert. */
typedef enum { TD_READ_ALWAYS, TD_READ_LOOKUP, TD_READ_EXPERT } td_piece_read;

typedef struct td_part {
    char name[112];
    int rows;           /* that are taken, from row0 */
    int row0, src_rows; /* src_rows: of the stored matrix or vector */
    int index, of; /* of > 0: matrix `index` of a tensor [of, src_rows, src_K] of all experts */
    const td_st_tensor *src, *scale; /* scale: of FP8 codes (fp8.h) */
} td_part;

typedef struct td_piece {
    td_piece_kind kind;
    td_piece_read read;
    int N, K, n_parts; /* vector: K = 1 */
    int k0, src_K;     /* the K columns from k0 are taken of src_K that are stored */
    int slices;        /* of K, as td_weight.slices */
    td_part part[3];
    td_dtype from, to;    /* as stored; as packed */
    bool as_stored;       /* read straight from the file */
    float dummy;          /* vectors of a dummy model: 1 for norms, 0 for biases */
    int unit;             /* the layer whose unit it is in; -1: it is in the image as it stands */
    size_t offset, bytes; /* in the image or the unit; 0 bytes if as_stored */
    int scale_rows, scale_cols; /* of FP8 codes; 0: from is another type */
    size_t scale_at;            /* packed as codes: the scales lie so far behind them; else 0 */
    td_weight *weight;    /* what attach fills */
    const float **vector;
    td_table *table;
} td_piece;

/* A sharded layer: bytes of all ranks' parts together; where this rank's part is in the image. */
typedef struct td_unit { size_t bytes, part; } td_unit;

typedef struct td_plan {
    const td_model_desc *desc;
    td_local local; /* the part of the model that is planned */
    const td_ops *ops;
    td_piece *piece;
    size_t n, image_bytes;
    td_unit unit[TD_MAX_LAYERS]; /* fully sharded: of the layers that are planned */
    const td_safetensors *files; /* NULL: dummy */
} td_plan;

typedef void td_progress_fn(void *arg, const char *what, double fraction);

/* files NULL: a dummy model of desc->dtype. local: whose part. The pointers of w are filled by attach; w is zeroed
 * before and closed after use, also on error. */
td_status td_plan_open(td_plan *p, const td_model_desc *d, const td_local *local, const td_ops *ops,
                       const td_safetensors *files, td_weights *w);
void td_plan_close(td_plan *p);
void td_weights_close(td_weights *w);
const uint8_t *td_piece_data(const td_piece *e, int part); /* first byte of a bound part: row row0, column k0 */
td_h128 td_plan_digest(const td_plan *p);  /* of every offset, size and dtype */
bool td_plan_uses_files(const td_plan *p); /* some piece is read as stored */
void td_plan_fill(const td_plan *p, uint8_t *image, td_pool *pool, td_progress_fn *progress, void *arg);
/* Pieces of units get everything but the address of their bytes. */
void td_plan_attach(const td_plan *p, const uint8_t *image);
/* Bytes that this rank keeps or maps for good: its image and what it reads as stored. */
size_t td_plan_resident_bytes(const td_plan *p);
/* Weight bytes read by one forward pass of one row: top_k of each layer's n_experts. A batch reads more of them. */
size_t td_plan_row_bytes(const td_plan *p);

#endif
