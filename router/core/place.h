/* router/core/place.h - where a request goes: the cheapest of all (decode, prefill) pairs and single workers,
 * in milliseconds.
 *
 *   pair  = wait for p's queue + compute what p has not cached
 *           + the part of the transfer that compute cannot hide + decode on d
 *   alone = wait for m's queue + compute + decode on m + what the prompt costs those who decode there
 *
 * Rules:     1. Roles are policies: any worker can do everything. A pair takes p from the PREFILL pool and d
 *               from the DECODE pool; alone is a MIXED worker, or, when one of the two pools is empty, a
 *               worker of the other pool (so a request survives the loss of all prefill or all decode
 *               workers).
 *            2. `usable` says who may be chosen at all (ready, not excluded); `room` who can take it now.
 *               Usable but no room: WAIT.
 *            3. Equal cost within 2 %: by hash of (tie, worker), so that equal workers share and equal
 *               prompts stay together.
 *            4. The link of a pair is as fast as its slower end, of those that were measured.
 * Threads:   pure. Limits: TD_INDEX_SLOTS workers. Source: reference notes, router G.3. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_CORE_PLACE_H
#define TD_ROUTER_CORE_PLACE_H

#include "common/wire/msg.h"
#include <stdbool.h>
#include <stdint.h>

typedef struct td_place_worker {
    td_role role;
    bool usable, room_prefill, room_decode;
    double prefill_tok_s;       /* > 0 */
    double step_ms;             /* of a decode step; > 0 */
    double pending_tokens;      /* prompt tokens queued before ours */
    uint32_t seqs, max_seqs;    /* choices running or reserved */
    double kv_used;             /* fraction of KV tokens in use with this request added */
    uint32_t hit_tokens;        /* of this prompt, probably cached here */
    double link_bytes_per_s;    /* as measured; 0: not yet */
    uint64_t id;
} td_place_worker;

typedef struct td_place_ask {
    uint32_t tokens;            /* prompt and resume tokens to compute */
    uint32_t n;                 /* choices */
    uint32_t out_tokens;        /* expected output */
    double kv_bytes_per_token;
    double link_bytes_per_s;    /* where neither end was measured; > 0 */
    uint64_t tie;
} td_place_ask;

typedef enum { TD_PLACE_NONE, TD_PLACE_WAIT, TD_PLACE_PAIR, TD_PLACE_ALONE } td_place_kind;
typedef struct td_placement {
    td_place_kind kind;
    int decode, prefill;        /* indices; ALONE: decode is the worker, prefill -1 */
    double ms;
} td_placement;

td_placement td_place_choose(const td_place_worker *w, int n, const td_place_ask *ask);

#endif
