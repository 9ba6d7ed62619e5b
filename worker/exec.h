/* worker/exec.h - runs steps on the ranks of a worker: forward pass and draws, in the order they were submitted.
 *
 *   rank 0:      td_exec_submit(step) .. td_exec_submit(step) .. td_exec_collect() .. td_exec_collect()
 *   other ranks: td_exec_serve(): receive a step, do this rank's part, pass it on; until rank 0 closes
 *
 * The step travels with the data: rank 0 gives it to the ranks of its pipeline stage, and every stage passes it
 * on with its hidden rows. A stage works on its step while the one before works on the next. With one rank the same
 * calls compute at once.
 *
 * Data parallel: every replica has a step of its own, possibly without rows, and all are submitted together: rank 0 gives
 * the first stage all of them, each rank takes its replica's, and each replica's last stage answers rank 0.
 *
 * Rules:     1. Steps are executed in order on every rank; page copies of a step before its rows.
 *            2. Ranks decide nothing: what a step does is in the step.
 *            3. An error on any rank ends the worker (td_coll_abort): ranks never go apart.
 *            4. A command (td_exec_command) reaches every rank's on_command between the steps before and after it.
 *            5. A step is collected when its last stage has answered, and so every stage has computed it, results or not.
 *            6. On a device: an EDEVICE of submit or collect is final, every later one answers the same.
 *            7. On a device, one rank: submit waits for nothing, collect for its own step only.
 * Ownership: a step is copied by submit. model, ops, pool and ranks are borrowed.
 * Threads:   one owner per rank (its engine thread). Limits: `depth` steps in flight; with several replicas of one
 *            stage at most TD_EXEC_MAX_DEPTH.
 * Source:    DESIGN 3 (submit/collect), 5. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_EXEC_H
#define TD_WORKER_EXEC_H

#include "worker/model/model.h"

enum { TD_EXEC_MAX_DEPTH = 4 };

typedef struct td_exec td_exec;
typedef struct td_ranks td_ranks;

typedef struct td_exec_opts {
    td_model *model;
    const td_ops *ops;
    td_pool *pool;
    const td_ranks *ranks;             /* NULL: one */
    int depth, max_rows, max_logits;
    int balance_steps;                 /* rank 0: experts are balanced every so many steps; 0: never */
    const td_kv *kv;                   /* [n_groups] of this rank */
    void (*on_layer)(void *arg, const td_step *step, int layer); /* keys and values of a layer are in their pages; or NULL */
    td_status (*on_command)(void *arg, const void *p, size_t n); /* ranks other than 0; or NULL. An error: rule 3 */
    size_t (*on_poll)(void *arg, void *out, size_t cap);         /* ranks other than 0: news for rank 0; or NULL */
    void *arg;
} td_exec_opts;

enum { TD_EXEC_POLL_BYTES = 32768 };

/* Whether the ranks that read a step's ids have the results of the step before it: then ids may refer to them
 * (step.h). One pipeline stage; not with context parallel ranks, whose draws are one rank's; not with several
 * ranks on devices. */
bool td_exec_knows_draws(const td_ops *ops, const td_ranks *ranks);
td_status td_exec_open(const td_exec_opts *o, td_exec **out);
void td_exec_close(td_exec *x); /* rank 0: the others' serve returns TD_OK */

/* step[i]: of replica i. EPROTO: a step is outside the model's limits, or refers to draws that there were not:
 * submit it not. */
td_status td_exec_check(const td_exec *x, const td_step *const *step);
/* Steps that passed the check. On a device this queues; what goes wrong there may be told by collect. */
td_status td_exec_submit(td_exec *x, const td_step *const *step);
/* Results of the oldest step in flight: out[n_samples], replica after replica. logits[i]: [n_logits][V] when replica i's
 * step asked for them (want_logits), else NULL; valid until the next submit. */
td_status td_exec_collect(td_exec *x, td_sample_out *out, const float **logits);

td_status td_exec_command(td_exec *x, const void *p, size_t n);
/* Rank 0 asks every other rank for its news, and takes them once all steps that were in flight then are collected: nobody
 * waits for the pipeline. AGAIN: asked, not answered yet: call again. OK: answered, so all that was told before the call that
 * asked is done. An error of take: rule 3. */
td_status td_exec_poll(td_exec *x, td_status (*take)(void *arg, const void *p, size_t n), void *arg);
/* Every stage's experts move to where the load is even (td_model_balance), between the steps before and after. */
td_status td_exec_balance(td_exec *x, bool force);
td_status td_exec_serve(td_exec *x);

#endif
