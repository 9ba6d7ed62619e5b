/* worker/profile.h - what this machine can do at most, measured in the process that is compared with it.
 *
 *   read      one pass of all threads over memory far larger than the caches: bytes/s, best of several
 *   multiply  each thread repeats the kernel family's own multiply-add on registers: operations/s (two each)
 *
 * By the clock of what they are compared with: td_profile_clock, microseconds; NULL: the wall's.
 * Both move with frequency and with neighbours on a shared machine: measure beside the figure they are to be
 * compared with.
 * Threads: the pool's caller. Errors: EFULL: no memory for the stream. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_PROFILE_H
#define TD_WORKER_PROFILE_H

#include "kernels/ops.h"
#include "worker/model/model.h"

typedef int64_t (*td_profile_clock)(void);
/* Best of `passes` reads of `bytes` (a gigabyte takes about 0.1 s a pass), in bytes/s. */
td_status td_profile_read(td_pool *pool, td_profile_clock clock, size_t bytes, int passes, double *out);
/* In operations/s, about 50 ms. 0 when the family has no loop here. */
double td_profile_multiply(td_pool *pool, td_profile_clock clock, const td_ops *ops);

/* Work of one sequence's rows [pos0, pos0 + n_rows) in a step, logits of n_logits of them: operations (two
 * per multiply-add) of the matrix products and attention; and the KV bytes they read. Weights are read once a
 * step: td_model_weight_bytes. */
typedef struct td_work {
    double ops, kv_bytes;
} td_work;
td_work td_profile_work(const td_model_desc *d, td_dtype kv, uint32_t pos0, uint32_t n_rows,
                        uint32_t n_logits);

/* Time of a step's output matrix against that of one layer's matrices, in tenths, with 8 rows and weights that come from
 * memory: how a pipeline's layers are dealt (td_grid.head_cost). tp: the part that one rank has. Under a second. */
int td_profile_head_cost(td_pool *pool, const td_ops *ops, const td_model_desc *d, int tp);

#endif
