/* worker/ship/plan.h - which rectangles of a leg's KV go into which frame: arithmetic only.
 *
 * A rectangle is slots [layer0, layer0 + n_layers) of one page group x tokens [tok0, tok0 + n_tok). Finished
 * layers of one chunk are gathered until the next would take the frame over TD_KVF_FRAME_BYTES, or the
 * model's last layer is in; one layer of a long chunk is cut by tokens.
 *
 * Rules:   1. Over a leg the rectangles of a group cover slots x [td_ship_plan_first(...), n_tokens) exactly
 *             once: tokens the other side has, and tokens that fell out of a window group's window, are never
 *             shipped.
 *          2. Chunks come in any size, layers of a chunk in ascending order.
 * Threads: pure. Limits: one token of one layer fits a frame (td_ship_plan_open refuses otherwise). */
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

typedef struct td_ship_plan {
    const td_model_desc *desc;
    size_t token_bytes[TD_MAX_GROUPS];  /* of one token in one slot: 2 * G * D * element */
    uint32_t hit, n_tokens;
    td_rect pending[TD_MAX_GROUPS];     /* n_layers 0: none */
} td_ship_plan;

/* First token of a group that a decode worker with `hit` tokens needs of a context of n tokens. The next
 * query stands at position n and attends keys in [n - window + 1, n]. */
uint32_t td_ship_plan_first(int window, uint32_t hit, uint32_t n_tokens);
size_t td_ship_plan_token_bytes(const td_model_desc *d, int group, td_dtype kv);

td_status td_ship_plan_open(td_ship_plan *p, const td_model_desc *d, td_dtype kv, uint32_t hit,
                            uint32_t n_tokens);
/* Layers [layer0, layer1) of tokens [tok0, tok1) are computed: emits the frames that are full. */
void td_ship_plan_add(td_ship_plan *p, int layer0, int layer1, uint32_t tok0, uint32_t tok1, td_rect_fn *emit,
                      void *arg);
/* At most how many frames a leg of this size can take, whatever its chunks: a bound for tables. */
uint32_t td_ship_plan_max_frames(const td_model_desc *d, uint32_t n_tokens);

#endif
