/* worker/sampler.h - runs a step's draws and scores over its logits: td_step words -> td_ops.sample /
 * td_ops.score; where the vocabulary lies in parts on tensor-parallel ranks, -> td_ops.draw_say / draw_hear.
 *
 *   tensor parallel   the ranks that share rows of logits draw them together: each has [rows][n] for its
 *                     tokens; exchanged are maxima, histograms and sums (kernels/draw.h), never logits
 *   context parallel  rows of logits lie on the rank that computed them, which draws them; rank 0 gets the
 *                     results
 *
 * Rules:     1. All ranks of a replica's last stage run the same step; the results are one rank's, byte for
 *               byte.
 *            2. Several samples may share one row of logits (n choices): each works on a copy, so none sees
 *               another's penalties. A pure function of the step and the logits.
 * Ownership: ops, pool and ranks are borrowed; out is where td_results_at is: with one rank where the kernels
 *            work, with several this host's.
 * Threads:   the engine thread.
 * Errors:    run: those of the collectives; the step is then lost on all ranks. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_SAMPLER_H
#define TD_WORKER_SAMPLER_H

#include "worker/step.h"

typedef struct td_sampler td_sampler;
typedef struct td_ranks td_ranks;

/* V: of the model; this rank has tokens [v0, v0 + n), v0 a multiple of 32. ranks NULL: one. ENOSUP: these
 * kernels cannot draw over parts. */
td_status td_sampler_open(const td_ops *ops, td_pool *pool, int V, int v0, int n, const td_ranks *ranks,
                          td_sampler **out);
void td_sampler_close(td_sampler *s);
/* out[step->n_samples], complete where the tensor and the context rank are 0. logits: this rank's rows
 * [..][n], are changed. place: [step->n_logits]; NULL: all rows are here, in the step's order. */
td_status td_sampler_run(td_sampler *s, const td_step *step, const td_logit_place *place, float *logits,
                         td_sample_out *out);

#endif
