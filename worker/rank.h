/* worker/rank.h - one process of a worker of several ranks: its start, and what ranks other than 0 do.
 *
 * Rank 0 is the worker as everybody knows it; the others execute its steps. They start by agreeing: every option that
 * changes what is computed, the build and the model are compared, and all stop, naming rank and value, where they differ.
 * Threads: main. Errors: EBADREQ: an impossible shape; EPROTO: started differently; ETIME: a rank was not there in time. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_RANK_H
#define TD_WORKER_RANK_H

#include "common/conf.h"
#include "common/buf.h"
#include "worker/beat.h"
#include "worker/ranks.h"
#include "worker/ship/ship.h"

enum { TD_RANK_MEET_MS = 10000 }; /* ranks that do not meet within this time give up */

/* The shape that the options ask for; sizes only. */
td_grid td_rank_grid(const td_conf *c);
/* MPI, the agreement and the groups. Only for shapes of more than one rank. */
td_status td_rank_open(const td_conf *c, int *argc, char ***argv, td_ranks *out);
void td_rank_close(td_ranks *r);
/* Starts the beats among the ranks (worker/beat.h). Collective, before loading: it may take long. */
td_status td_rank_beat(const td_conf *c, td_ranks *r, td_zctx *z, const td_curve *curve, td_beat **out);
/* Rank 0's, which frames are addressed to on every rank. Collective, before the ships are opened. */
td_status td_rank_incarnation(td_ranks *r, uint64_t *incarnation);
/* Every rank's bulk endpoint, as Reserved carries them (rank 0; others: out NULL). Collective: all are loaded then. */
td_status td_rank_endpoints(td_ranks *r, const td_ship_grid *grid, const char *mine, td_buf *out);
/* Ranks other than 0: model, pages, steps, until rank 0 ends it. */
td_status td_rank_serve(const td_conf *c, td_ranks *r);

#endif
