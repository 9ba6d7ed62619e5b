/* worker/model/model_int.h - a loaded model: descriptor, weights, rope and the step's scratch. Shared by
 * model.c, forward.c and moe.c. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_MODEL_MODEL_INT_H
#define TD_WORKER_MODEL_MODEL_INT_H

#include "worker/model/image.h"
#include "worker/model/model.h"
#include "worker/model/rope.h"
#include "worker/model/weights.h"

/* Activations of one step; T = max_rows. */
typedef struct td_scratch {
    uint8_t *block;   /* everything below is in it */
    float *x, *h;     /* [T, E] residual; [T, E] normed */
    float *qkv, *att; /* [T, (H + 2G) D]; [T, H D] */
    float *gate_up;   /* [T, 2F] */
    /* mixture of experts; R = T * top_k */
    float *route_logits, *route_weights; /* [T, n_experts]; [T, top_k] */
    int32_t *route_ids, *expert_row;     /* [T, top_k]; [T, top_k] */
    int32_t *expert_row0;                /* [n_experts + 1] */
    float *expert_x, *expert_gate_up;    /* [R, E] gathered rows, then results; [R, 2F] */
    float *cs, *q_scale;                 /* [T][rot_dim/2][2]; [T] */
    int32_t *page, *in_page; /* [n_groups][T]; [n_groups][T]: where each row's keys and values go */
    td_attn_seq *seq;        /* [n_groups][T] */
    void *ops;               /* td_ops.scratch_bytes */
} td_scratch;

struct td_model {
    td_model_desc desc;
    const td_ops *ops;
    td_pool *pool;
    int max_rows, max_logits;
    td_safetensors *files; /* kept while something is read as stored */
    td_image image;
    td_weights weights;
    size_t row_bytes;
    td_rope rope;
    td_scratch scratch;
};

/* x += the experts' sum of h, for the first T rows. */
void td_moe_forward(td_model *m, const td_layer *l, int T);

td_status td_scratch_open(td_scratch *s, const td_model *m);
void td_scratch_close(td_scratch *s);

/* A layer's weights while it runs: a pointer today, a gather under sharding. */
const td_layer *td_layer_acquire(td_model *m, int layer);
void td_layer_release(td_model *m, int layer);

#endif
