/* worker/eplb.h - which rank holds which experts, so that all have about the same to do: copies of the experts that get the
 * most tokens, and a fair packing of all copies. Arithmetic only.
 *
 *   load of each expert -> copies of each expert -> which rank has which -> slots, so that as few as can be change
 *
 * A map has one entry per slot of the stage: the expert in it, or -1. Rank r has slots [slot0[r], slot0[r + 1]).
 *
 * Rules:     1. Every expert has a copy; no rank has two of one expert (the second would do nothing).
 *            2. Copies: each of the redundant ones goes to the expert with the most load per copy. Packing: copies by
 *               descending load, each to the lightest rank with room; then exchanges while the heaviest rank gets lighter.
 *               Some numbers of redundant copies are tried, the others going to the least loaded experts: the best counts.
 *            3. Groups of experts that divide evenly among nodes, and nodes of equal slots: groups are packed into nodes
 *               first, and both steps are taken inside each node. Else the nodes are not looked at.
 *            4. A function of its arguments, in integers: the same on every machine. Ties: the lower number.
 * Threads:   pure. Limits: ranks' slots differ by at most one; experts <= slots <= experts * ranks. Loads up to 2^63.
 * Source:    DeepSeek-V3 (2024) 3.4 and its EPLB; Graham 1969 (longest first); algorithms notes 8.4. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_EPLB_H
#define TD_WORKER_EPLB_H

#include <stdint.h>

typedef struct td_eplb_shape {
    int experts, ranks;
    int groups, nodes;        /* 0 or 1: none */
    const int32_t *slot0;     /* [ranks + 1] */
} td_eplb_shape;

/* slot0 [ranks + 1]: where each rank's slots start when `slots` are dealt and rank r holds own[r] experts to begin with. */
void td_eplb_deal(int slots, int ranks, const int32_t *own, int32_t *slot0);
/* count [n]: copies of each expert, `extra` more than one each, at most `most` of one. */
void td_eplb_replicate(const uint64_t *load, int n, int extra, int most, int32_t *count);
void td_eplb_plan(const td_eplb_shape *s, const uint64_t *load, int32_t *map);
/* Slots and ranks of map renamed so that more of old's entries stay where they are; ranks only within a node. */
void td_eplb_settle(const td_eplb_shape *s, const int32_t *old, int32_t *map);
/* The heaviest rank's load against the mean; each copy of an expert gets an equal part of its load. 1: nobody waits. */
double td_eplb_balance(const td_eplb_shape *s, const uint64_t *load, const int32_t *map);

#endif
