/* worker/grid.h - the ranks of a worker as a grid, and which part of a model each of them holds. Arithmetic only.
 *
 *   rank = ((dp * PP + pp) * CP + cp) * TP + tp
 *
 *   TP  query heads, kv heads, feed-forward columns, vocabulary rows    PP  layers
 *   CP  tokens of a sequence's KV, rows of a step                       DP  sequences
 *   EP  whole experts, over all ranks of a pipeline stage               FSDP  1/N of every layer's weights, over dp and cp
 *
 * Rules:     1. Every shape that cannot be computed is refused by td_grid_check with the rule it breaks.
 *            2. KV heads: TP <= G: G / TP heads a rank; TP > G: head t * G / TP, each held by TP / G ranks.
 *            3. Vocabulary: blocks of ceil(V / TP) rounded up to TD_VOCAB_STEP rows; the last ones may be short or empty.
 *            4. Sums over K of row-parallel matrices are a tree over TD_SLICES slices where K allows it; a rank holds
 *               TD_SLICES / TP neighbouring slices, so that every TP gives the same bits (kernels/ops.h, matrix law).
 *               Fully sharded, each part is cut into such blocks again, one for each rank that shares it.
 *            5. Tokens: split u = t / S of a sequence's keys lies on CP rank u % CP (S: keys per attention split).
 * Threads:   pure.
 * Source:    DESIGN 5; Megatron-LM (Shoeybi et al. 2019) 3; algorithms notes 9.1-9.4. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_GRID_H
#define TD_WORKER_GRID_H

#include "worker/model/model.h"

enum { TD_SLICES = 8, TD_VOCAB_STEP = 32, TD_MAX_RANKS = 1024, TD_MAX_STAGES = 64 };

typedef struct td_grid {
    int tp, pp, cp, dp;
    bool ep, fsdp;
    int redundant;                        /* with EP: slots of a stage for second copies of experts */
    int rank;                             /* in the worker */
    int head_cost;                        /* time of the output matrix in tenths of a layer's; 0: by its weights */
    int layer0[TD_MAX_STAGES + 1];        /* stage s holds layers [layer0[s], layer0[s + 1]) */
} td_grid;

typedef struct td_coord { int tp, pp, cp, dp; } td_coord;

static inline int td_grid_ranks(const td_grid *g) { return g->dp * g->pp * g->cp * g->tp; }
static inline td_coord td_grid_coord(const td_grid *g, int rank)
{
    return (td_coord){rank % g->tp, rank / (g->tp * g->cp) % g->pp, rank / g->tp % g->cp, rank / (g->tp * g->cp * g->pp)};
}
static inline int td_grid_rank(const td_grid *g, td_coord c) { return ((c.dp * g->pp + c.pp) * g->cp + c.cp) * g->tp + c.tp; }

/* One rank, all of the model. */
td_grid td_grid_one(const td_model_desc *d);
/* Fills layer0 so that stages take equal times, the last one lighter by what the output matrix costs (head_cost).
 * EBADREQ with the rule that is broken. */
td_status td_grid_check(td_grid *g, const td_model_desc *d);

/* What one rank holds. */
typedef struct td_local {
    int H, G, F, V;                       /* heads, kv heads, feed-forward columns, vocabulary rows */
    int h0, g0, f0, v0;                   /* the first of each */
    int layer0, layer1;
    int X, x0;                            /* experts: all of them, or with EP a block */
    int moe_F, moe_f0;                    /* columns of each expert: with EP all */
    int o_slices, down_slices, moe_slices; /* slices of this rank's part of the row-parallel matrices; 0: one chain */
    bool first, last;                     /* stage */
    int shards, shard;                    /* fully sharded: ranks that share these weights, and which of them; else 1, 0 */
    int shard_V, shard_v0;                /* the vocabulary rows kept here: of [v0, v0 + V) this shard's; else all of them */
} td_local;
/* Whether every sum over TP ranks is the tree of rule 4, so that the bits are those of one rank. */
bool td_grid_tree(const td_grid *g, const td_model_desc *d);
td_local td_grid_local(const td_grid *g, const td_model_desc *d, int rank);

/* Rows [*r0, *r1) of T that member i of n computes (sequence-parallel norms, expert sources): even blocks. */
static inline void td_grid_rows(int T, int n, int i, int *r0, int *r1)
{
    *r0 = (int)((long long)T * i / n);
    *r1 = (int)((long long)T * (i + 1) / n);
}

#endif
