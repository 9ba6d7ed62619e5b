/* worker/model/experts.h - where the experts of an expert-parallel pipeline stage are, how much each of them is asked, and
 * moving them to where the load is even (worker/eplb.h).
 *
 *   each rank has slots; the map says which expert is in which slot; an expert may have copies on several ranks
 *   step: expert ids -choose-> slots, and the experts' tokens are counted -> rows travel to slots
 *   balance: counts of all ranks -> rank 0 of the stage plans -> maps to all -> weights move -> maps and slots change
 *
 * Rules:     1. A row's result does not depend on which copy computes it: bytes of weights are copied, nothing else changes.
 *            2. Counted are all tokens of the stage, each once, by the rank that sends it.
 *            3. Choice: a step's tokens of an expert go round its copies, an own one first: few tokens stay here, many are
 *               spread, whoever has them. It is the sender's alone: the receivers are told how many rows come.
 *            4. Maps change between steps, at the same place of the order of steps on all ranks. A layer's weights are
 *               received beside those in use, and the old ones freed after; an expert that is in a rank's image from the
 *               start is never sent there.
 *            5. A layer keeps its map unless the new one is expected to be better by 5 %, or balancing is forced.
 *            6. A balancing is a pause: it ends with the layer that brings it to 256 MiB of moves (stats.left: layers that
 *               were not looked at); td_exec_balance goes on after the next step.
 * Ownership: of the model. Threads: the rank's engine thread.
 * Errors:    those of the collectives; the worker is then lost. Experts of unequal sizes stay where they are.
 * Source:    DeepSeek-V3 (2024) 3.4; algorithms notes 8.3, 8.4. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_MODEL_EXPERTS_H
#define TD_WORKER_MODEL_EXPERTS_H

#include "worker/eplb.h"
#include "worker/model/model_int.h"

typedef struct td_expert_layer {     /* all NULL: a layer without experts, or of another stage */
    int32_t *map;                    /* [all slots] */
    int32_t *first, *place;          /* [experts + 1], [all slots]: the slots of each expert, ascending */
    int32_t *own;                    /* [experts]: slot of this rank, from 0; -1: none */
    int32_t *start;                  /* [experts]: where in place a step's tokens begin */
    td_weight *up, *down;            /* [slots]; p NULL: empty */
    uint8_t **block;                 /* [slots]: what was received; NULL: it is in the image */
    size_t up_bytes, down_bytes;     /* of an expert */
    uint64_t *load;                  /* [experts]: tokens of this rank's rows */
    uint64_t rows;                   /* computed here since the last balancing */
} td_expert_layer;

typedef struct td_travel td_travel; /* moe.c */
typedef struct td_experts {
    td_eplb_shape shape;
    int32_t *slot0, *home0;          /* [ranks + 1]: first slot, and first expert of the image, of each rank */
    int me, slots, all;              /* this rank; its slots; all slots */
    int32_t *turn;                   /* [experts]: where in place the next token goes */
    size_t move_bytes;               /* a balancing plans no more layers once so many bytes are to move */
    int next;                        /* of the layers with experts: planned first the next time */
    bool uneven;                     /* experts of different sizes or types */
    td_expert_layer *layer;          /* [desc.L] */
    td_travel *travel;               /* whose rows go where, of the layer at hand */
    td_expert_stats stats;
} td_experts;

/* After the weights were loaded. Collective over the stage. Nothing to do unless experts are parallel. */
td_status td_experts_open(td_model *m, const td_plan *plan);
void td_experts_close(td_model *m);
size_t td_experts_bytes(const td_model *m); /* received, beside the image */
/* ids [n] of experts, where the kernels work, become slots, and are counted. slots: of the stage. On a device: two waits. */
td_status td_experts_choose(td_model *m, int layer, int32_t *ids, size_t n, int *slots);

#endif
