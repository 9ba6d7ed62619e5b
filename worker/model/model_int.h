/* worker/model/model_int.h - a loaded model: descriptor, weights, rope and the step's scratch. Shared by
 * model.c, forward.c and moe.c. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_MODEL_MODEL_INT_H
#define TD_WORKER_MODEL_MODEL_INT_H

#include "worker/model/image.h"
#include "worker/model/model.h"
#include "worker/model/place.h"
#include "worker/model/rope.h"
#include "worker/model/weights.h"
#include "worker/kvmap.h"
#include "worker/ranks.h"

typedef struct td_buffer {
    float *p;
    size_t cap;
} td_buffer;

/* The step's rows as this rank sees them (share.h). With one CP rank: the step's own order. */
typedef struct td_share {
    int T, own0, n_own, n_seqs;     /* rows of the step; own ones; pieces of all ranks */
    int *rank_row0;                 /* [cp + 1]: first row of each rank in shared order */
    int32_t *row;                   /* [T]: the step's row at a place of the shared order */
    int32_t *ids, *pos;             /* [T], shared order */
    int32_t *local_ids;             /* [T]: own rows' ids in this rank's part of the vocabulary; once placed, for other numbers */
    int32_t *page, *in_page;        /* [n_groups][T], shared order; page -1: kept elsewhere */
    td_attn_seq *seq;               /* [n_groups][max pieces], shared order, ascending */
    int32_t *of_seq;                /* [pieces]: the step's sequence a piece is of */
    int own_seq0, n_own_seqs;       /* own pieces among seq */
    int32_t *want;                  /* [n_want]: own rows (0: own0) whose logits are wanted, ascending */
    int n_want;
    td_logit_place *place;          /* [n_logits] of the step */
    int32_t *in_order;              /* 0, 1, .. max_rows - 1, where the kernels work; several CP ranks, or fully sharded */
} td_share;

/* Attention over several CP ranks (context.h). */
typedef struct td_context {
    size_t part_floats, own_part_floats, key_bytes; /* of a round: parts when queries travel, when keys do, keys */
    td_attn_seq *seq;               /* [max_rows]: of a round */
    int32_t *ids, *table;           /* [cap_ids]: pages that travel; tables of pages among them */
    int32_t *first;                 /* [max_rows]: where a sequence's table begins */
    int32_t *place;                 /* [cap_place]: of a page among ids, -1 between rounds */
    size_t cap_ids;
    int cap_place;
    uint64_t n_keys, n_queries;     /* attentions of a layer for which keys, or queries, travelled */
} td_context;

/* Where a pointer of a layer's weights is, and to which place of the gathered unit it points. */
typedef struct td_fix { const void **to; size_t offset; } td_fix;

/* Fully sharded weights (shard.h). */
typedef struct td_shard {
    td_unit *unit;                  /* [layers]; NULL: weights are whole */
    td_fix *fix;                    /* by layer */
    size_t fix0[TD_MAX_LAYERS + 1]; /* the first of each layer */
    uint8_t *buffer[2];
    size_t buffer_bytes;
    int layer[2];                   /* whose bytes are, or come, there; -1: nobody's */
    bool pending[2];
    size_t *table;                  /* [4][shards]: of an exchange */
    int32_t *counts;                /* [shards][2]: rows that each rank embeds, and wants logits of */
    int rows[2], at;                /* of each rank in one exchange, likewise; the first of those at hand */
    int *v0;                        /* [shards + 1]: first vocabulary row of each */
    int32_t *all_ids, *pick;        /* [shards][max_rows] each: of an exchange at the model's ends */
    double us_per_byte;             /* of a gather alone */
    int64_t copied_us;              /* by this rank, for gathers that were waited for already */
    td_shard_stats stats;
} td_shard;

/* Activations of one step; T = max_rows. */
typedef struct td_scratch {
    td_dev *dev;             /* whose memory it is; NULL: this host's */
    uint8_t *block;          /* everything below is in it */
    size_t bytes;
    float *x, *h;            /* [T, E] residual; [T, E] normed */
    float *qkv, *att;        /* [T, (H + 2G) D]; [T, H D] */
    float *gate_up;          /* [T, 2F] */
    /* mixture of experts; R = T * top_k */
    float *route_logits, *route_weights;  /* [T, n_experts]; [T, top_k] */
    int32_t *route_ids, *expert_row;      /* [T, top_k]; [T, top_k] */
    int32_t *expert_row0;                 /* [slots of the stage + 1] */
    float *expert_x, *expert_gate_up;     /* [R, E] gathered rows, then results; [R, 2F] */
    void *operand;           /* [T, F] or [R, moe_F] between activation and product (td_operand_ops); NULL: in place */
    void *ops;               /* td_ops.scratch_bytes */
    float *cs, *q_scale;     /* [T][rot_dim/2][2]; [T]; always of this host: place.h sends them */
} td_scratch;

/* Of steps that are replayed (replay.h): the device's block, and two page-locked ones in turn that go there. */
typedef struct td_replay_stage {
    td_devmem_post post;
    td_event *before; /* the end of the step before, borrowed; NULL: not known */
} td_replay_stage;
typedef struct td_replay_place {
    td_dev *dev; /* NULL: no step is */
    uint8_t *fixed;
    size_t fixed_bytes;
    td_replay_stage stage[2];
    int turn;
    td_event *end[4]; /* of the last steps, in turn: the stages refer to at most two of them */
    int next, last;   /* the last step's; -1: no step has ended since one began */
    td_model_idle idle;
} td_replay_place;

/* A step as this rank computes it (forward.c). */
typedef struct td_forward {
    td_model *m;
    const td_step *step;
    const td_kv *kv;
    int T, n_want;            /* rows: own ones, or padded; those whose logits are wanted */
    float *logits;
    void (*on_layer)(void *arg, int layer);
    void *arg;
    td_placed at;
    bool replayed;            /* of a kind that is (replay.h), with */
    td_attn_placed attn[TD_MAX_GROUPS];
    td_replay_key key;
} td_forward;

struct td_model {
    td_model_desc desc;
    const td_ops *ops;
    td_pool *pool;
    int max_rows, max_logits;
    td_safetensors *files; /* kept while something is read as stored */
    td_image image;
    void *device_image; /* what is read on a device instead of the image */
    void *beside;       /* what the kernels keep beside it (td_ops.beside) */
    td_weights weights;
    size_t row_bytes, resident_bytes;
    td_shard shard;
    struct td_experts *experts; /* NULL: not expert parallel (experts.h) */
    td_rope rope;
    td_scratch scratch;
    td_place place;
    td_replay_place replay;
    td_forward unrecorded;   /* the last step, if it could be replayed and has to be recorded for that */
    /* this rank's part */
    const td_ranks *ranks;   /* NULL: one */
    td_local local;
    td_group_desc group[TD_MAX_GROUPS]; /* as desc.group, of this rank's layers and heads */
    int slot[TD_MAX_LAYERS];            /* as desc.layer[].slot, among this rank's */
    int split;                          /* keys per attention split */
    int block_rows;                     /* from so many rows on each TP rank keeps a block of them */
    td_kvmap kvmap;
    td_cp_mode cp_mode;
    td_share share;
    td_context context;
    td_buffer wire[5];       /* what is exchanged, where the kernels work */
    bool least_workspace;
    bool quantized;          /* what TP ranks exchange for their sums */
    const td_sample_out *drawn; /* by the step before; NULL: not known here */
    bool blocks;             /* of the step at hand: x holds this rank's block of rows only */
};

static inline int td_model_tp(const td_model *m) { return m->ranks ? m->ranks->grid.tp : 1; }
/* Experts serve several replicas: a rank without rows takes part in their exchanges too. */
static inline bool td_model_meets(const td_model *m) { return m->ranks && m->ranks->grid.ep && m->ranks->grid.dp > 1; }
static inline int td_model_cp(const td_model *m) { return m->ranks ? m->ranks->grid.cp : 1; }
/* This rank's block of T rows. */
static inline void td_model_block(const td_model *m, int T, int *r0, int *r1)
{
    td_grid_rows(T, td_model_tp(m), m->ranks ? m->ranks->at.tp : 0, r0, r1);
}

/* x += the experts' sum of h, for T rows (block mode: x is this rank's block of them). */
td_status td_moe_forward(td_model *m, const td_layer *l, int T);
/* Of parallel experts: room for the rows that travel; without effect if they are not parallel. */
td_status td_moe_open(td_model *m);
void td_moe_close(td_model *m);
int td_moe_most_rows(const td_model *m);   /* that experts of this rank compute at once */
size_t td_moe_numbers(const td_model *m);  /* that a layer puts where the kernels work (td_place_put); 0: not parallel */

td_status td_scratch_open(td_scratch *s, const td_model *m);
void td_scratch_close(td_scratch *s);

/* A layer's weights while it runs: a pointer today, a gather under sharding. */
const td_layer *td_layer_acquire(td_model *m, int layer);
void td_layer_release(td_model *m, int layer);

#endif
