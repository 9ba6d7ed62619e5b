/* worker/model/share.h - what the ranks of a worker do together inside a forward pass: the rows each of them computes, the
 * sums over tensor-parallel ranks, and attention over keys that lie on several ranks.
 *
 * Context parallel: the rows of a step are dealt to the CP ranks, piece by piece (zigzag: of 2R pieces of a chunk rank c gets
 * pieces c and 2R-1-c, whose attention work adds up to the same for all). In *shared order* rank 0's rows come first, then rank
 * 1's, ..; own rows are [own0, own0 + n_own).
 * Tensor parallel: partial sums [T, E] become sums either by giving every rank all parts (few rows: one message), or by
 * giving each rank the parts of its block of rows, so that it adds, norms and keeps only those (sequence parallel). Both give
 * the same bits.
 *
 * Threads: the rank's engine thread. Errors: those of the collectives; the step is then lost on all ranks.
 * Limits:  exchange buffers grow to what the largest step needs and stay so. Context parallel, the largest are parts of
 *          attention: max_rows * ceil(max_model_len / split / CP) * own heads * (D + 2) floats, twice when queries travel;
 *          and, when keys travel, twice one layer's pages of the step's sequences. They are beside the KV memory. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_MODEL_SHARE_H
#define TD_WORKER_MODEL_SHARE_H

#include "worker/kvmap.h"
#include "worker/model/model_int.h"

td_status td_share_open(td_model *m);
void td_share_close(td_model *m);

/* A growable buffer; grows to what the largest step needs. */
float *td_share_room(td_buffer *b, size_t n_floats);

/* The step's rows in shared order, who owns them. Fills m->share from the step. */
void td_share_rows(td_model *m, const td_step *step, const td_kv *kv);

/* x += the tree sum over TP ranks of part + bias; part [T, E] on each rank. In block mode x and the result are this rank's
 * block of the T rows. */
td_status td_share_sum(td_model *m, float *part, int T, const float *bias, float *x, bool blocks);
/* Parts [T, E] of all TP ranks, [tp][rows][E] in *all: of all rows, or of this rank's block; as integers on the way if the
 * model is opened so. */
td_status td_share_parts(td_model *m, const float *part, int T, bool blocks, float **all, int *rows);
/* Blocks of [T, E] on each TP rank -> all rows on all. */
td_status td_share_gather(td_model *m, const float *block, int T, float *out);
/* Fills m->share.place for the step whose rows are at hand. */
void td_share_places(td_model *m, const td_step *step);
/* Own rows' logits [n_want, V_local] on each rank -> [n_logits, V] on all ranks, in the order the step asked for. */
td_status td_share_logits(td_model *m, const td_step *step, const float *part, float *logits);

/* x = the embeddings, of which each TP rank has those of its part of the vocabulary in `part`. */
td_status td_share_embed(td_model *m, float *part, const int32_t *ids, int T, float *x, bool blocks);

/* Keys and values of own rows (before rope, in qkv) go to the ranks that keep them. */
td_status td_share_append(td_model *m, const td_rope_args *own);
/* Attention of own rows over all ranks' keys of a page group. By passing queries or keys round, whichever is fewer bytes. */
td_status td_share_attend(td_model *m, const td_step *step, int group, const td_attn_args *own);

#endif
