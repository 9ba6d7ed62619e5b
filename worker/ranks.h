/* worker/ranks.h - one rank's place in the worker's grid and its groups of ranks.
 *
 * Ownership: `world` is borrowed; the groups are closed with td_ranks_close. Threads: the rank's engine thread.
 * Errors:    ranks that were started differently (grid, model, build, options) are refused on every rank, with
 *            the rank and the value that differs. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_RANKS_H
#define TD_WORKER_RANKS_H

#include "worker/coll/coll.h"
#include "worker/grid.h"

typedef struct td_ranks {
    td_grid grid;
    td_coord at;
    td_coll *world;
    td_coll *tp, *cp, *pp; /* ranks that differ in that coordinate alone */
    td_coll *stage;        /* all of this pipeline stage: rank (dp * CP + cp) * TP + tp */
    td_coll *shard;        /* that hold the same weights: rank dp * CP + cp */
    struct {
        td_coll *tp, *cp, *pp, *stage, *shard;
    } data;             /* the same, for buffers where the kernels work */
    struct td_dev *dev; /* whose memory those are; NULL: this host's, and data are the groups above */
    td_coll *back,
        *news; /* as world: results to rank 0, and its ranks' news, beside whatever else is under way */
    struct td_model_desc *desc; /* the model's, as td_rank_open read it; NULL: not read. td_rank_close frees it */
} td_ranks;

/* Collective over world. */
td_status td_ranks_open(td_coll *world, const td_grid *grid, td_ranks *out);
/* Opens r->data for buffers in dev's memory: over NCCL where every rank can, else staged through this host.
 * Collective. */
td_status td_ranks_device(td_ranks *r, struct td_dev *dev);
void td_ranks_close(td_ranks *r);
void td_ranks_deadline(td_ranks *r, int64_t timeout_us); /* of every group and of world */
/* What rank 0 works out (fn, on a thread of its own) while the others wait: it says every tick_us that it is
 * still at it, so that however long it takes, a rank that dies is noticed within the deadline of `world`,
 * which is to be longer than a tick. fn is waited for in any case. Collective. */
td_status td_ranks_compute(td_coll *world, int (*fn)(void *arg), void *arg, int64_t tick_us, int *out);
/* Every rank says the same bytes of `text`, or all get EPROTO naming the first rank that differs, and both
 * values. Lines "name: value". Collective. What is exchanged has one size whatever the build, so that ranks of
 * different builds can tell each other so. */
enum { TD_RANKS_TEXT = 4096 };
td_status td_ranks_agree(td_coll *world, const char *text);
/* Whether every rank says yes. Collective. */
td_status td_ranks_all(td_coll *world, bool mine, bool *all);

#endif
