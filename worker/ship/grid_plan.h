/* worker/ship/grid_plan.h - which rank of a prefill worker sends which rectangle to which rank of a decode
 * worker, whatever the two grids are: arithmetic only.
 *
 * A worker's ranks are numbered ((pp * cp_size) + cp) * tp_size + tp. A rank holds, of each page group, the
 * slots of its stage's layers x heads x tokens:
 *   heads   TP <= G: [tp * G / TP, (tp + 1) * G / TP); TP > G: head tp * G / TP, so that TP / G ranks are
 *           replicas
 *   tokens  those of its context-parallel rank (token_map.h); with `all` the CP ranks are replicas too
 * What a source sends to a destination is the intersection of the two, less the tokens that the destination
 * has (hit) and those before a group's window. Of R source replicas one sends: replica d % R to the d-th
 * destination replica if R divides their number; else they take turns, every TD_SHIP_TURN tokens.
 *
 * A rectangle is slots (numbered in the whole model) x heads (likewise) x the tokens of [tok0, tok0 + n_tok)
 * that the destination holds; the source holds all of them. So a destination whose tokens are interleaved
 * gets few large frames. Finished layers of a chunk are gathered, per destination, group and token range,
 * until the next would take the frame over TD_KVF_FRAME_BYTES or the stage's last layer is in; a layer that
 * does not fit is cut by tokens.
 *
 * Rules:   1. Each element (group, slot, head, token, k|v, dim) that a destination holds and lacks is in
 *             exactly one rectangle of exactly one source.
 *          2. Who sends depends on the two grids, hit and n_tokens only: every rank computes the same, so
 *             that each knows how many sources a destination hears.
 *          3. A source with nothing for a destination stays silent, except that rank 0 always tells rank 0
 *             (the first tokens go that way).
 *          4. Chunks come in any size; of each, the layers in ascending order.
 * Threads: one owner. Limits: TD_SHIP_MAX_RANKS a side.
 * Source:  algorithms.md 9.1, 9.4, 10.1. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_SHIP_GRID_PLAN_H
#define TD_WORKER_SHIP_GRID_PLAN_H

#include "worker/grid.h"
#include "worker/ship/plan.h"
#include "worker/ship/token_map.h"

enum { TD_SHIP_MAX_RANKS = 64, TD_SHIP_TURN = 256 };

typedef struct td_ship_grid {
    uint16_t tp, pp, cp;
    /* stage s computes layers [stage[s], stage[s + 1]); [0] is 0, [pp] is L */
    uint16_t stage[TD_SHIP_MAX_RANKS + 1];
    td_token_map tokens;                   /* n is cp */
} td_ship_grid;

/* What one rank holds. */
typedef struct td_ship_part {
    uint16_t rank, layer0, layer1;
    uint16_t slot0[TD_MAX_GROUPS], n_slots[TD_MAX_GROUPS], head0[TD_MAX_GROUPS], n_heads[TD_MAX_GROUPS];
    uint16_t replica[TD_MAX_GROUPS], n_replicas[TD_MAX_GROUPS]; /* of this part in its worker */
    td_token_set tokens;
} td_ship_part;

/* One rank that holds everything. */
td_ship_grid td_ship_grid_one(const td_model_desc *d);
/* A worker's grid (one replica of its data parallelism); CP ranks hold blocks of `split` tokens in turn. */
td_ship_grid td_ship_grid_of(const td_grid *g, uint32_t split);
/* pp stages of as equal a number of layers as possible, the first ones larger. */
void td_ship_grid_stages(td_ship_grid *g, uint32_t L);
uint32_t td_ship_grid_ranks(const td_ship_grid *g);
/* EBADREQ: not a grid for this model, with the rule it breaks. */
td_status td_ship_grid_check(const td_ship_grid *g, const td_model_desc *d);
void td_ship_part_of(const td_ship_grid *g, const td_model_desc *d, uint32_t rank, td_ship_part *out);
/* Tokens [first, n_tokens) of a group that this part lacks and holds, in its own numbering. */
uint64_t td_ship_part_lacks(const td_ship_part *p, const td_model_desc *d, int group, uint32_t hit,
                            uint32_t n_tokens);

typedef struct td_grid_plan td_grid_plan;
typedef struct td_grid_plan_opts {
    const td_model_desc *desc;             /* of the whole model; borrowed */
    td_dtype kv;
    const td_ship_grid *src, *dst;         /* copied */
    uint32_t rank;                         /* the source rank that add is called for */
    uint32_t hit, n_tokens;
} td_grid_plan_opts;

td_status td_grid_plan_open(const td_grid_plan_opts *o, td_grid_plan **out); /* EBADREQ, ENOSUP (plan.h) */
void td_grid_plan_close(td_grid_plan *p);
/* Elements (bytes / element size) that src sends to dst in all. */
uint64_t td_grid_plan_elements(const td_grid_plan *p, uint32_t src, uint32_t dst);
bool td_grid_plan_pair(const td_grid_plan *p, uint32_t src, uint32_t dst); /* rule 3: they talk */
uint32_t td_grid_plan_sources(const td_grid_plan *p, uint32_t dst);        /* how many talk to it */
const td_ship_part *td_grid_plan_dst(const td_grid_plan *p, uint32_t dst);
/* Layers [layer0, layer1) of tokens [tok0, tok1) are computed on this rank (of a chunk, all ranks of its
 * stage and CP group say the whole chunk): emits the frames that are full, with dst set. */
void td_grid_plan_add(td_grid_plan *p, int layer0, int layer1, uint32_t tok0, uint32_t tok1, td_rect_fn *emit,
                      void *arg);

#endif
