// SPDX-License-Identifier: Apache-2.0
/* worker/model/moe.c - a layer's mixture of experts: route, sort the slots by expert, two grouped products,
 * combine. Dropless: every slot has a row. Weights are applied at the end, by the token's own order of slots,
 * so a token's sum does not depend on where its experts were computed.
 *
 *   one rank         as it stands
 *   tensor parallel  each rank has some columns of every expert: the slots' parts are summed before they are
 * combined expert parallel  each rank has some experts, or copies, whole; each row of the stage has one
 * source rank (its block): slots travel to their experts and back (all-to-all, dropless), and the source
 * combines them */
#include "common/check.h"
#include "worker/devmem.h"
#include "worker/model/experts.h"
#include "worker/model/share.h"
#include <stdlib.h>

/* What the products with these weights read (td_operand_ops); rows that travel to parallel experts are f32. */
static td_dtype operand(const td_model *m, const td_weight *w)
{
    return m->scratch.operand && !m->experts ? m->ops->operand->dtype(w->dtype) : TD_F32;
}

/* Rows of x, of that type, through their experts, [n] of them; row0 [n + 1]; the results are f32 in y, which may be x. */
static void run_experts(td_model *m, const td_weight *w_up, const td_weight *w_down, const int32_t *row0, int n, int rows, const void *x,
                        td_dtype x_dtype, float *gate_up, float *y)
{
    const td_ops *o = m->ops;
    int F = m->local.moe_F;
    size_t E = (size_t)m->desc.E, F2 = 2 * (size_t)F;
    td_grouped up = {w_up, n, row0, rows, x, E, gate_up, F2, x_dtype};
    td_grouped down = {w_down, n, row0, rows, gate_up, F2, y, E, operand(m, w_down)};
    o->linear_grouped(o, m->pool, m->scratch.ops, &up);
    if (down.x_dtype == TD_F32) o->silu_mul(m->pool, gate_up, F2, rows, F, gate_up, F2);
    else {
        down.x = m->scratch.operand, down.ldx = (size_t)F;
        o->operand->silu_mul(m->pool, gate_up, F2, rows, F, m->scratch.operand, down.x_dtype, down.ldx);
    }
    o->linear_grouped(o, m->pool, m->scratch.ops, &down);
}

/* T rows of h: where their slots' rows are, and those rows, sorted by expert; with parallel experts by the copy that is
 * chosen, which is by rank first. */
static td_status sort_rows(td_model *m, const td_layer *l, const float *h, int T, td_dtype to)
{
    const td_ops *o = m->ops;
    const td_route_law *law = &m->desc.moe.route;
    td_scratch *s = &m->scratch;
    size_t E = (size_t)m->desc.E;
    o->moe_logits(m->pool, &l->moe.router, h, E, T, s->route_logits);
    o->moe_route(m->pool, law, s->route_logits, T, s->route_ids, s->route_weights);
    int places = law->n_experts;
    if (m->experts)
        TD_TRY(td_experts_choose(m, (int)(l - m->weights.layer), s->route_ids, (size_t)T * (size_t)law->top_k,
                                 &places));
    o->moe_place(m->pool, s->route_ids, T, law->top_k, places, s->expert_row0, s->expert_row);
    if (to == TD_F32) o->moe_gather(m->pool, h, E, s->expert_row, T, law->top_k, m->desc.E, s->expert_x, E);
    else o->operand->moe_gather(m->pool, h, E, s->expert_row, T, law->top_k, m->desc.E, s->expert_x, to, E);
    return TD_OK;
}

/* x[0..T) += the slots of T rows, whose first is row t0 of the routing tables. */
static void combine(td_model *m, const float *y, int t0, int T, float *x)
{
    const td_scratch *s = &m->scratch;
    int k = m->desc.moe.route.top_k;
    size_t E = (size_t)m->desc.E, at = (size_t)t0 * (size_t)k;
    m->ops->moe_combine(m->pool, y, E, s->expert_row + at, s->route_weights + at, T, k, m->desc.E, x, E);
}

static td_status by_columns(td_model *m, const td_layer *l, int T)
{
    td_scratch *s = &m->scratch;
    int rows = T * m->desc.moe.route.top_k, a = 0, b = T;
    td_dtype x = operand(m, l->moe.gate_up);
    TD_TRY(sort_rows(m, l, s->h, T, x));
    run_experts(m, l->moe.gate_up, l->moe.down, s->expert_row0, m->desc.moe.route.n_experts, rows, s->expert_x, x,
                s->expert_gate_up, s->expert_x);
    if (m->blocks) td_model_block(m, T, &a, &b);
    if (td_model_tp(m) > 1) TD_TRY(td_share_sum(m, s->expert_x, rows, NULL, s->expert_x, false, false));
    combine(m, s->expert_x, a, b - a, s->x);
    return TD_OK;
}

/* ---- expert parallel ---- */

typedef struct route_plan {
    int ranks, x0, X;               /* of the stage; this rank's slots of experts */
    int32_t *count;                 /* [ranks][X]: rows that come from each rank for each expert */
    int32_t *row0;                  /* [X + 1]: of the rows as they are computed, by expert, then source */
    int32_t *by_expert, *by_source; /* [rows]: of a row in one order, its place in the other */
    const int32_t *row0_at, *by_expert_at, *by_source_at; /* the same where the kernels work */
    size_t *send, *from, *recv, *to;                      /* [ranks] bytes and offsets */
    int rows;
} route_plan;

static void plan_close(route_plan *p)
{
    free(p->count), free(p->by_expert), free(p->send);
}

/* Rows come by source, then expert; they are computed by expert, then source. */
static td_status order_rows(td_model *m, route_plan *p)
{
    size_t n = (size_t)p->rows, all = 2 * n + (size_t)p->X + 1;
    const void *at;
    p->by_expert = td_xalloc(all * sizeof *p->by_expert), p->by_source = p->by_expert + n,
    p->row0 = p->by_source + n;
    for (int e = 0, row = 0; e < p->X; e++) {
        for (int r = 0; r < p->ranks; r++) row += p->count[r * p->X + e];
        p->row0[e + 1] = row;
    }
    for (int r = 0, source = 0; r < p->ranks; r++)
        for (int e = 0; e < p->X; e++) {
            int row = p->row0[e];
            for (int q = 0; q < r; q++) row += p->count[q * p->X + e];
            for (int i = 0; i < p->count[r * p->X + e]; i++, row++, source++) {
                p->by_expert[row] = source;
                p->by_source[source] = row;
            }
        }
    TD_TRY(td_place_put(m, p->by_expert, all * sizeof *p->by_expert, &at));
    p->by_expert_at = at, p->by_source_at = p->by_expert_at + n, p->row0_at = p->by_source_at + n;
    return TD_OK;
}

/* Whose rows go where: each rank tells each other how many rows each of its experts gets. */
static td_status plan_open(td_model *m, route_plan *p)
{
    const td_experts *x = m->experts;
    int32_t *row0 = td_xalloc((size_t)(x->all + 1) * sizeof *row0);
    int n = p->ranks = x->shape.ranks, X = x->all;
    p->x0 = x->slot0[x->me], p->X = x->slots;
    p->count = td_xalloc((size_t)n * (size_t)(p->X + 1) * sizeof *p->count);
    p->send = td_xalloc(4 * (size_t)n * sizeof *p->send);
    p->from = p->send + n, p->recv = p->from + n, p->to = p->recv + n;
    int32_t *mine = td_xalloc((size_t)X * sizeof *mine),
            *all = td_xalloc((size_t)n * (size_t)X * sizeof *all);
    td_status st = td_devmem_fetch(m->ops->dev, row0, m->scratch.expert_row0, (size_t)(X + 1) * sizeof *row0);
    for (int e = 0; e < X; e++) mine[e] = row0[e + 1] - row0[e];
    if (st >= 0) st = td_coll_all_gather(m->ranks->stage, mine, all, (size_t)X * sizeof *mine);
    size_t row = (size_t)m->desc.E * sizeof(float);
    for (int r = 0; r < n && st >= 0; r++) {
        int a = row0[x->slot0[r]], b = row0[x->slot0[r + 1]];
        p->from[r] = (size_t)a * row;
        p->send[r] = (size_t)(b - a) * row;
        p->to[r] = (size_t)p->rows * row;
        for (int e = 0; e < p->X; e++) p->rows += p->count[r * p->X + e] = all[r * X + p->x0 + e];
        p->recv[r] = (size_t)p->rows * row - p->to[r];
    }
    free(mine), free(all), free(row0);
    return st >= 0 ? order_rows(m, p) : st;
}

static td_status by_experts(td_model *m, const td_layer *l, int T)
{
    td_scratch *s = &m->scratch;
    td_expert_layer *w = &m->experts->layer[l - m->weights.layer];
    size_t E = (size_t)m->desc.E;
    int a = 0, b = T;
    route_plan p = {0};
    if (m->blocks) td_model_block(m, T, &a, &b);
    td_status st = sort_rows(m, l, s->h + (size_t)a * E, b - a, TD_F32); /* as they travel */
    if (st >= 0) st = plan_open(m, &p);
    float *in = NULL, *x = NULL, *gate_up = NULL;
    if (st >= 0) st = td_share_room(m, 0, (size_t)p.rows * E, &in);
    if (st >= 0) st = td_share_room(m, 1, (size_t)p.rows * E, &x);
    if (st >= 0) st = td_share_room(m, 2, (size_t)p.rows * 2 * (size_t)m->local.moe_F, &gate_up);
    if (st >= 0)
        st = td_coll_all_to_allv(m->ranks->data.stage, s->expert_x, p.send, p.from, in, p.recv, p.to);
    if (st >= 0) {
        m->ops->take_rows(m->pool, in, E, p.by_expert_at, p.rows, m->desc.E, x, E);
        run_experts(m, w->up, w->down, p.row0_at, p.X, p.rows, x, TD_F32, gate_up, x);
        w->rows += (uint64_t)p.rows;
        m->ops->take_rows(m->pool, x, E, p.by_source_at, p.rows, m->desc.E, in, E);
        st = td_coll_all_to_allv(m->ranks->data.stage, in, p.recv, p.to, s->expert_x, p.send, p.from);
    }
    if (st >= 0) combine(m, s->expert_x, 0, b - a, s->x);
    plan_close(&p);
    return st;
}

td_status td_moe_forward(td_model *m, const td_layer *l, int T)
{
    return m->experts ? by_experts(m, l, T) : by_columns(m, l, T);
}
