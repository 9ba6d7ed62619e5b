/* worker/model/replay.h - steps that a device replays (td_replay of kernels/ops.h): which ones, and where their arrays
 * lie.
 *
 * A step of generated rows alone, one of each sequence and all of them wanted, is padded to one of few numbers of
 * rows. Its arrays (ids, pages, cosines, the sequences that attention sees) are at fixed addresses: one block of the
 * device serves all such steps, each array has room for the padded rows and lies where their number says, and page
 * tables come last. All of it is written on the host, in one of two page-locked blocks in turn, and sent in one
 * transfer before the step's launches. So the launches of two such steps differ in nothing, and those of the first
 * are run for the second. Padding: id 0, page -1, no sequence: such rows are computed like others, write no page, and
 * nobody looks at them.
 *
 * Ownership: the addresses are good for one step. Threads: the rank's engine thread. Errors: EFULL, EDEVICE.
 * Limits:    ranks that need no other one inside their part of the pass (a stage of a pipeline, a data-parallel
 *            replica; why: kernels/README.md, a whole step); TD_REPLAY_MAX_ROWS. The blocks grow with the page
 *            tables: from 1 MiB on. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_MODEL_REPLAY_H
#define TD_WORKER_MODEL_REPLAY_H

#include "worker/model/model_int.h"

/* The blocks; without effect on the host. */
td_status td_replay_open(td_model *m);
void td_replay_close(td_model *m);

/* How many rows the step gets, after td_share_rows; 0: it is not replayed. */
int td_replay_rows(const td_model *m, const td_step *step);
/* In place of td_place_step: f->at, f->attn and f->key. */
td_status td_replay_step(td_forward *f, int rows, const float *cs, const float *q_scale);
/* All of a step is queued, of whatever kind. */
void td_replay_step_ends(td_model *m);

#endif
