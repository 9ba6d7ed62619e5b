/* worker/rank_ship.h - ranks that receive and send pages: what tandem-worker's processes do beside the steps of worker/rank.h.
 *
 * Threads: main. Errors: as td_ship_open; a rank that fails ends all. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_RANK_SHIP_H
#define TD_WORKER_RANK_SHIP_H

#include "common/buf.h"
#include "worker/beat.h"
#include "worker/rank.h"
#include "worker/ship/ship.h"

/* Starts the beats among the ranks (worker/beat.h). Collective, before loading: it may take long. */
td_status td_rank_beat(const td_conf *c, td_ranks *r, td_zctx *z, const td_curve *curve, td_beat **out);
/* Rank 0's, which frames are addressed to on every rank. Collective, before the ships are opened. */
td_status td_rank_incarnation(td_ranks *r, uint64_t *incarnation);
/* Where each replica's ranks receive (rank 0: out[dp], to be closed; others: NULL). Collective: all are loaded then. */
td_status td_rank_endpoints(td_ranks *r, const td_ship_grid *grid, const char *mine, td_ship_home *out);
/* Ranks other than 0 of a worker: td_rank_serve with a ship. */
td_status td_rank_ship_serve(const td_conf *c, td_ranks *r);

#endif
