/* worker/model/context.h - attention over keys that lie on several context-parallel ranks (kvmap.h).
 *
 *   pass-Q    queries go to the keys: every rank computes the parts of its own splits for all rows, and parts
 *             come home
 *   pass-KV   keys go to the queries, round the ring: own rows meet one rank's splits after the other's
 *
 * Whichever is fewer bytes; both give the bits of one rank, since parts are merged in the order of their
 * splits. A layer's attention is done in rounds that fit a workspace of fixed size: pass-Q takes some rows of
 * each rank at a time, with as many parts as the longest of these rows has, and where one row's parts are too
 * many, some of those; pass-KV some splits of all sequences, each page once, however many sequences share it.
 *
 * Limits:  the workspace is made when the model is opened, from max_rows, heads and the longest context: parts
 *          at most 64 MiB (or one split of all own rows, if that is more), twice; keys 32 MiB, twice. Rounds
 *          that keys cannot make in that are made with queries, of which one row and one split always fit.
 * Threads: the rank's engine thread. Errors: those of the collectives; the step is then lost on all ranks.
 * Source:  algorithms notes 9.5; Yang et al. 2024 (context parallelism for million-token inference). */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_MODEL_CONTEXT_H
#define TD_WORKER_MODEL_CONTEXT_H

#include "worker/model/model_int.h"

/* With several CP ranks: the workspace. */
td_status td_context_open(td_model *m);
void td_context_close(td_model *m);

/* Keys and values of own rows (before rope, in qkv) go to the ranks that keep them. */
td_status td_context_append(td_model *m, const td_rope_args *own);
/* Attention of own rows over all ranks' keys of a page group. */
td_status td_context_attend(td_model *m, const td_step *step, int group, const td_attn_args *own);

#endif
