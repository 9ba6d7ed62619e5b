/* worker/model/share.h - what the ranks of a worker do together inside a forward pass: the rows each of them
 * computes, the sums over tensor-parallel ranks, and attention over keys that lie on several ranks.
 *
 * Context parallel: the rows of a step are dealt to the CP ranks, piece by piece (zigzag: of 2R pieces of a
 * chunk rank c gets pieces c and 2R-1-c, whose attention work adds up to the same for all). In *shared order*
 * rank 0's rows come first, then rank 1's, ..; own rows are [own0, own0 + n_own). Tensor parallel: partial
 * sums [T, E] become sums either by giving every rank all parts (few rows: one message), or by giving each
 * rank the parts of its block of rows, so that it adds, norms and keeps only those (sequence parallel). Both
 * give the same bits.
 *
 * On a device what is exchanged lies in its memory, and goes through groups of ranks that take it
 * (td_ranks.data).
 *
 * Threads: the rank's engine thread. Errors: those of the collectives; the step is then lost on all ranks.
 * Limits:  buffers are made at open, from max_rows and the model alone: a sum over more rows, attention over
 * longer contexts (context.h), more rows for a rank's experts than twice an even share (moe.c), more rows at
 * the ends of a fully sharded model (shard.h) are done in several exchanges. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_MODEL_SHARE_H
#define TD_WORKER_MODEL_SHARE_H

#include "worker/kvmap.h"
#include "worker/model/model_int.h"

td_status td_share_open(td_model *m);
void td_share_close(td_model *m);

/* Buffer i of m->wire with room for so many floats, where the kernels work; each function uses them anew. Grows
 * at open; in a step there is room (td_model_workspace_bytes stays).
 * EFULL. */
td_status td_share_room(td_model *m, int i, size_t n_floats, float **out);
/* Columns of T rows -> [T, width]. */
void td_share_pack(td_model *m, const float *from, size_t ld, int T, int width, float *to);

/* [T, width] -> columns of T rows that lie ld apart. */
void td_share_unpack(td_model *m, const float *from, int T, int width, float *to, size_t ld);

/* The step's rows in shared order, who owns them. Fills m->share from the step. */
void td_share_rows(td_model *m, const td_step *step, const td_kv *kv);

/* Own rows' ids in this rank's part of the vocabulary, once all ids are known here. */
void td_share_local_ids(td_model *m);

/* y (+)= the tree sum over TP ranks of part + bias; part [T, E] on each rank. In block mode y is this rank's
 * block of the T rows. y may be part. The parts are integers on the way if the model is opened so. */
td_status td_share_sum(td_model *m, const float *part, int T, const float *bias, float *y, bool blocks,
                       bool add);
/* Blocks of T rows of `row` bytes on each TP rank -> all rows on all. */
td_status td_share_gather(td_model *m, const void *block, int T, size_t row, void *out);
/* Fills m->share.place for the step whose rows are at hand. */
void td_share_places(td_model *m, const td_step *step);
/* Own rows' logits [n_want, V_local] on each rank -> [n_logits, V] on all ranks, in the order the step asked
 * for. */
td_status td_share_logits(td_model *m, const td_step *step, const float *part, float *logits);

/* x = the embeddings, of which each TP rank has those of its part of the vocabulary in `part`. */
td_status td_share_embed(td_model *m, const float *part, const int32_t *ids, int T, float *x, bool blocks);

#endif
