/* worker/ship/group.h - rank 0's book of hand-offs that all ranks of its worker take part in, as a pure
 * machine: a key is decided when every rank has said its last word about it.
 *
 * Rules:   1. All ranks well: the key's own event goes out, with frames and bytes of all. One not: the
 *             failure goes out, with the reason of the rank that failed first.
 *          2. With the first failure the other ranks are recalled, once: RECALL asks the worker to close the
 *             key on every rank (rank 0's own ship is told by the caller). The decision still waits for all.
 *          3. A second word of a rank about a key, and a word about no key, are dropped.
 *          4. Of a data parallel worker the ranks of one replica take part in a key, n_ranks of them; rank 0 is of the
 *             first. Of another replica's key the first tokens come with the report of its first rank.
 * Ownership: events given are the group's, events taken the caller's.
 * Threads:   one owner (the engine thread). Limits: as many keys as are opened; TD_SHIP_MAX_RANKS ranks. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_SHIP_GROUP_H
#define TD_WORKER_SHIP_GROUP_H

#include "worker/ship/ship.h"

typedef struct td_ship_group td_ship_group;

td_ship_group *td_ship_group_open(uint32_t n_ranks, uint32_t max_keys);
void td_ship_group_free(td_ship_group *g);
void td_ship_group_begin(td_ship_group *g, uint64_t key, bool sending, uint32_t replica);
void td_ship_group_own(td_ship_group *g, td_ship_event *e);               /* rank 0's last word */
/* Another rank's; commit: r->commit_bytes of it. */
void td_ship_group_peer(td_ship_group *g, const td_ship_report *r, const void *commit);
td_ship_event *td_ship_group_next(td_ship_group *g);                      /* NULL: none */

#endif
