// SPDX-License-Identifier: Apache-2.0
#include "worker/grid.h"
#include "common/check.h"

/* The output matrix in tenths of a layer, by weights. Embedding copies rows: nothing. */
static int64_t head_cost(const td_model_desc *d)
{
    int64_t E = d->E, ffn = d->moe.route.n_experts ? (int64_t)d->moe.route.top_k * d->moe.F : d->F;
    int64_t layer = E * ((int64_t)(d->H + 2 * d->G) * d->D + (int64_t)d->H * d->D + 3 * ffn);
    return 10 * E * d->V / layer;
}

td_grid td_grid_one(const td_model_desc *d)
{
    td_grid g = {.tp = 1, .pp = 1, .cp = 1, .dp = 1};
    g.layer0[1] = d->L;
    return g;
}

/* Layers dealt so that no stage is heavier than it must be: stage s ends where its share of the whole cost does. */
static void deal_layers(td_grid *g, const td_model_desc *d)
{
    int64_t total = 10 * (int64_t)d->L + (g->head_cost > 0 ? g->head_cost : head_cost(d));
    g->layer0[0] = 0;
    for (int s = 1; s < g->pp; s++) {
        int64_t end = total * s / g->pp;
        int layer = (int)((end + 5) / 10), least = g->layer0[s - 1] + 1, most = d->L - (g->pp - s);
        g->layer0[s] = TD_MIN(TD_MAX(layer, least), most);
    }
    g->layer0[g->pp] = d->L;
}

static td_status whole_parts(const char *what, int n, const char *by, int parts)
{
    return n % parts ? td_fail(TD_EBADREQ, "%s %d cannot be divided among %s %d", what, n, by, parts) : TD_OK;
}

td_status td_grid_check(td_grid *g, const td_model_desc *d)
{
    if (g->tp < 1 || g->pp < 1 || g->cp < 1 || g->dp < 1)
        return td_fail(TD_EBADREQ, "tensor %d, pipeline %d, context %d, data %d: each must be at least 1",
                       g->tp, g->pp, g->cp, g->dp);
    if ((int64_t)g->tp * g->pp * g->cp * g->dp > TD_MAX_RANKS)
        return td_fail(TD_EBADREQ, "tensor %d x pipeline %d x context %d x data %d is more than %d ranks",
                       g->tp, g->pp, g->cp, g->dp, TD_MAX_RANKS);
    if (g->pp > d->L || g->pp > TD_MAX_STAGES)
        return td_fail(
            TD_EBADREQ,
            "pipeline-parallel-size %d: the model has %d layers, and at most %d stages are possible", g->pp,
            d->L, TD_MAX_STAGES);
    if (g->tp & (g->tp - 1))
        return td_fail(TD_EBADREQ,
                       "tensor-parallel-size %d is no power of two: sums over ranks are a binary tree",
                       g->tp);
    TD_TRY(whole_parts("query heads", d->H, "tensor-parallel-size", g->tp));
    if (g->tp <= d->G) TD_TRY(whole_parts("kv heads", d->G, "tensor-parallel-size", g->tp));
    else if (g->tp % d->G)
        return td_fail(TD_EBADREQ, "tensor-parallel-size %d is no multiple of the %d kv heads it exceeds",
                       g->tp, d->G);
    if (d->F) TD_TRY(whole_parts("feed-forward size", d->F, "tensor-parallel-size", g->tp));
    if (g->ep && !d->moe.route.n_experts) return td_fail(TD_EBADREQ, "expert-parallel: %s has no experts", d->arch);
    if (d->moe.route.n_experts && !g->ep)
        TD_TRY(whole_parts("expert feed-forward size", d->moe.F, "tensor-parallel-size", g->tp));
    if (g->ep && g->dp * g->cp * g->tp > d->moe.route.n_experts)
        return td_fail(TD_EBADREQ, "expert-parallel: %d ranks of a stage for %d experts",
                       g->dp * g->cp * g->tp, d->moe.route.n_experts);
    if (g->redundant && !g->ep)
        return td_fail(TD_EBADREQ, "redundant-experts %d: experts are not parallel", g->redundant);
    if (g->redundant < 0 || g->redundant > d->moe.route.n_experts * (g->dp * g->cp * g->tp - 1) ||
        d->moe.route.n_experts + g->redundant > TD_MAX_EXPERTS)
        return td_fail(
            TD_EBADREQ,
            "redundant-experts %d: at most one copy of each of %d experts on each of %d ranks, and %d in all",
            g->redundant, d->moe.route.n_experts, g->dp * g->cp * g->tp, TD_MAX_EXPERTS);
    if (g->fsdp && g->dp * g->cp == 1)
        return td_fail(
            TD_EBADREQ,
            "fully-sharded: weights are sharded over data- and context-parallel ranks, and there is one");
    for (int i = 0; i < d->n_groups && g->cp > 1; i++)
        if (d->group[i].window)
            return td_fail(TD_ENOSUP, "context-parallel-size %d: %s has layers with a sliding window", g->cp,
                           d->arch);
    deal_layers(g, d);
    return TD_OK;
}

static void block(int n, int parts, int i, int *first, int *count)
{
    *first = (int)((int64_t)n * i / parts);
    *count = (int)((int64_t)n * (i + 1) / parts) - *first;
}

/* Slices of one rank's part of K; 0: K does not allow the tree, or there are more ranks than slices. */
static int slices(int K, int tp)
{
    if (!K || TD_SLICES % tp || K % (2 * TD_SLICES)) return 0;
    return TD_SLICES / tp;
}

bool td_grid_tree(const td_grid *g, const td_model_desc *d)
{
    bool dense = false, experts = false;
    for (int i = 0; i < d->L; i++) *(d->layer[i].moe ? &experts : &dense) = true;
    return slices(d->H * d->D, g->tp) && (!dense || slices(d->F, g->tp)) &&
           (!experts || g->ep || slices(d->moe.F, g->tp));
}

/* Member i's rows of [v0, v0 + V), which n members cut into blocks of whole TD_VOCAB_STEPs. */
static void vocabulary(int v0, int V, int n, int i, int *first, int *count)
{
    int per = (V + n - 1) / n;
    if (n > 1) per = (per + TD_VOCAB_STEP - 1) / TD_VOCAB_STEP * TD_VOCAB_STEP;
    int a = TD_MIN(i * per, V), b = TD_MIN(a + per, V);
    *first = v0 + a;
    *count = b - a;
}

td_local td_grid_local(const td_grid *g, const td_model_desc *d, int rank)
{
    td_coord c = td_grid_coord(g, rank);
    td_local l = {.layer0 = g->layer0[c.pp],
                  .layer1 = g->layer0[c.pp + 1],
                  .first = c.pp == 0,
                  .last = c.pp == g->pp - 1};
    l.H = d->H / g->tp, l.h0 = c.tp * l.H;
    l.G = g->tp <= d->G ? d->G / g->tp : 1;
    l.g0 = g->tp <= d->G ? c.tp * l.G : c.tp * d->G / g->tp;
    l.F = d->F / g->tp, l.f0 = c.tp * l.F;
    vocabulary(0, d->V, g->tp, c.tp, &l.v0, &l.V);
    l.shards = g->fsdp ? g->dp * g->cp : 1, l.shard = g->fsdp ? c.dp * g->cp + c.cp : 0;
    vocabulary(l.v0, l.V, l.shards, l.shard, &l.shard_v0, &l.shard_V);
    l.x0 = 0, l.X = d->moe.route.n_experts, l.moe_F = d->moe.F;
    if (g->ep)
        block(d->moe.route.n_experts, g->dp * g->cp * g->tp, (c.dp * g->cp + c.cp) * g->tp + c.tp, &l.x0,
              &l.X);
    else l.moe_F = d->moe.F / g->tp, l.moe_f0 = c.tp * l.moe_F;
    l.o_slices = slices(d->H * d->D, g->tp);
    l.down_slices = slices(d->F, g->tp);
    /* An expert computed whole on one rank adds the same tree as one cut by columns. */
    l.moe_slices = slices(d->moe.F, g->ep ? 1 : g->tp);
    return l;
}
