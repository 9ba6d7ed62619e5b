/* worker/ship/plan.h - what is shipped of a leg's KV, and the unit it goes in: arithmetic only. Which rank sends
 * it where, and in which frames, is grid_plan.h's.
 *
 * A rectangle is slots [layer0, layer0 + n_layers) of one page group x heads x tokens [tok0, tok0 + n_tok).
 *
 * Rules:   Of a group tokens [td_ship_plan_first(...), n_tokens) are shipped: those the other side has, and those
 *          that fell out of a window group's window, never.
 * Threads: pure. Limits: one token of one layer fits a frame (td_ship_plan_check). */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_SHIP_PLAN_H
#define TD_WORKER_SHIP_PLAN_H

#include "worker/model/model.h"

/* head0, n_heads: of the group's; dst: the destination's rank (grid_plan.h); one rank to one: all heads, 0.
 */
typedef struct td_rect {
    uint16_t group, layer0, n_layers, head0, n_heads, dst;
    uint32_t tok0, n_tok;
} td_rect;
typedef void td_rect_fn(void *arg, const td_rect *r);

/* First token of a group that a decode worker with `hit` tokens needs of a context of n tokens. The next
 * query stands at position n and attends keys in [n - window + 1, n]. */
uint32_t td_ship_plan_first(int window, uint32_t hit, uint32_t n_tokens);
size_t td_ship_plan_token_bytes(const td_model_desc *d, int group, td_dtype kv);

td_status td_ship_plan_check(const td_model_desc *d, td_dtype kv); /* ENOSUP: a token does not fit a frame */
/* At most how many frames a leg of this size can take, whatever its chunks: a bound for tables. */
uint32_t td_ship_plan_max_frames(const td_model_desc *d, uint32_t n_tokens);

#endif
