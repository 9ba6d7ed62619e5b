/* worker/model/shard.h - fully sharded weights: ranks that would hold the same weights (dp x cp, one pipeline stage, one TP
 * place) keep an equal part of each, and put a layer together one layer ahead of its use.
 *
 *   layer i is computed from one buffer   |   layer i + 1 is gathered into the other   |   then i's buffer is free
 *
 * Rules:     1. Only bytes move: the result is that of whole weights, to the bit.
 *            2. All ranks of the group take every step together, those without rows too. The gather of a step's first layer
 *               is started in the step before it, with its last layer.
 *            3. Embedding and output matrices are never gathered: they stay cut by vocabulary. The token ids go to all ranks
 *               and embedding rows come back; hidden rows go to all ranks and their logits come back. Each by so many rows
 *               of every rank at a time that a buffer has 64 MiB at most, if a row of each fits: made at open.
 *            4. On a device parts, buffers and rows are its memory; ids and counts go between the hosts. Over NCCL a gather runs
 *               beside the layer before it, on a stream of its own; staged, each start waits for what is queued.
 * Threads:   the rank's engine thread. Errors: those of the collectives; the step is then lost on all ranks.
 * Source:    ZeRO-Inference (Aminabadi et al. 2022) 5; algorithms notes 9.7. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_MODEL_SHARD_H
#define TD_WORKER_MODEL_SHARD_H

#include "worker/model/model_int.h"

/* After the weights were loaded by this plan. Nothing to do when they are whole. */
td_status td_shard_open(td_model *m, const td_plan *plan);
void td_shard_close(td_model *m);

/* Of this host, that the ends of the model put where the kernels work at once (td_place_put); 0: weights are whole. */
size_t td_shard_numbers(const td_model *m);

/* At the start of a step: how many rows each rank embeds, and how many rows' logits it wants. */
td_status td_shard_begin(td_model *m, int n_embed, int n_head);
/* Some rank of the group wants logits in this step. */
bool td_shard_wants(const td_model *m);
/* out [T, E]: the embeddings of those ids that are in this TP rank's part of the vocabulary; zeros for others. ids: of this host. */
td_status td_shard_embed(td_model *m, const int32_t *ids, int T, float *out);
/* out [T, local.V]: logits of normed rows h [T, E]. */
td_status td_shard_head(td_model *m, const float *h, int T, float *out);

#endif
