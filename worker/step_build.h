/* worker/step_build.h - makes the flat td_step from what the scheduler chose. All of a step's facts about
 * sampling are worked out here.
 *
 * Use: begin, rows for each sequence (in order), samples for those that end, finish. The buffer is the
 *      builder's, reused every step.
 * Threads: the engine thread. Limits: rows, seqs and samples as opened; penalties and biases are bounded by
 *          max_seqs * (vocabulary + 1024). */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_STEP_BUILD_H
#define TD_WORKER_STEP_BUILD_H

#include "common/rng.h"
#include "worker/seq.h"

typedef struct td_step_build td_step_build;

td_step_build *td_step_build_open(int n_groups, int page_size, td_kvmap kvmap);
void td_step_build_close(td_step_build *b);
/* Copies of a step that was begun and never finished (nothing could be planned) stay. */
void td_step_build_begin(td_step_build *b, uint64_t number);
/* Page `to` becomes a copy of page `from` before any row is computed. */
void td_step_build_copy(td_step_build *b, int group, int32_t from, int32_t to);
void td_step_build_want_logits(td_step_build *b);
/* Choice c computes positions [pos0, pos0 + n_rows) in the tables kv. Returns the index of its first row. */
uint32_t td_step_build_rows(td_step_build *b, const td_seq *q, uint32_t c, const td_kvseq *kv, uint32_t pos0,
                            uint32_t n_rows);
/* Logits of a row, in ascending order of rows. Returns the index among the step's logits. */
uint32_t td_step_build_logit(td_step_build *b, uint32_t row);
/* Draw the token at `position` for choice c, after those in flight, from logits `logit`. Returns the sample's index. */
uint32_t td_step_build_draw(td_step_build *b, const td_seq *q, uint32_t c, uint32_t logit, uint32_t position);
/* Log probability of the prompt's token at `position` from logits `logit`. */
void td_step_build_score(td_step_build *b, const td_seq *q, uint32_t logit, uint32_t position);
const td_step *td_step_build_finish(td_step_build *b); /* valid until begin */

#endif
