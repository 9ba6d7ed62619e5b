/* worker/sampler.h - runs a step's draws and scores over its logits: td_step words -> td_ops.sample /
 * td_ops.score.
 *
 * Several samples may share one row of logits (n choices): each works on a copy, so none sees another's
 * penalties.
 * A pure function of the step and the logits. Threads: the engine thread. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_SAMPLER_H
#define TD_WORKER_SAMPLER_H

#include "worker/step.h"

typedef struct td_sampler td_sampler;

td_sampler *td_sampler_open(const td_ops *ops, td_pool *pool, int V);
void td_sampler_close(td_sampler *s);
/* out[step->n_samples]. logits[step->n_logits][V] are changed. */
void td_sampler_run(td_sampler *s, const td_step *step, float *logits, td_sample_out *out);

#endif
