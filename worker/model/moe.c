// SPDX-License-Identifier: Apache-2.0
/* worker/model/moe.c - a layer's mixture of experts: route, sort the slots by expert, two grouped products, combine.
 * Dropless: every slot has a row. Weights are applied at the end, by the token's own order of slots, so a token's sum
 * does not depend on where its experts were computed.
 *
 *   one rank         as it stands
 *   tensor parallel  each rank has some columns of every expert: the slots' parts are summed before they are combined
 *   expert parallel  each rank has some experts, or copies, whole; each row of the stage has one source rank (its block): slots travel
 *                    to their experts and back (all-to-all, dropless), and the source combines them */
#include "common/check.h"
#include "worker/model/experts.h"
#include "worker/model/share.h"
#include <stdlib.h>
#include <string.h>

/* What the products with these weights read (td_operand_ops); rows that travel between ranks are f32. */
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
static void sort_rows(td_model *m, const td_layer *l, const float *h, int T, td_dtype to)
{
    const td_ops *o = m->ops;
    const td_route_law *law = &m->desc.moe.route;
    td_scratch *s = &m->scratch;
    size_t E = (size_t)m->desc.E;
    o->moe_logits(m->pool, &l->moe.router, h, E, T, s->route_logits);
    o->moe_route(m->pool, law, s->route_logits, T, s->route_ids, s->route_weights);
    int places = law->n_experts;
    if (m->experts) places = td_experts_choose(m, (int)(l - m->weights.layer), s->route_ids, (size_t)T * (size_t)law->top_k);
    o->moe_place(m->pool, s->route_ids, T, law->top_k, places, s->expert_row0, s->expert_row);
    if (to == TD_F32) o->moe_gather(m->pool, h, E, s->expert_row, T, law->top_k, m->desc.E, s->expert_x, E);
    else o->operand->moe_gather(m->pool, h, E, s->expert_row, T, law->top_k, m->desc.E, s->expert_x, to, E);
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
    int rows = T * m->desc.moe.route.top_k, tp = td_model_tp(m), a = 0, b = T;
    size_t E = (size_t)m->desc.E, n = (size_t)rows * E;
    td_dtype x = operand(m, l->moe.gate_up);
    sort_rows(m, l, s->h, T, x);
    run_experts(m, l->moe.gate_up, l->moe.down, s->expert_row0, m->desc.moe.route.n_experts, rows, s->expert_x, x, s->expert_gate_up,
                s->expert_x);
    if (m->blocks) td_model_block(m, T, &a, &b);
    if (tp > 1) {
        float *all;
        TD_TRY(td_share_parts(m, s->expert_x, rows, false, &all, &rows));
        m->ops->sum_tree(m->pool, all, n, tp, rows, m->desc.E, E, NULL, s->expert_x, E, false);
    }
    combine(m, s->expert_x, a, b - a, s->x);
    return TD_OK;
}

/* ---- expert parallel ---- */

typedef struct route_plan {
    int ranks, x0, X;              /* of the stage; this rank's slots of experts */
    int32_t *count;                /* [ranks][X]: rows that come from each rank for each expert */
    int32_t *row0;                 /* [X + 1]: of the rows as they are computed, by expert, then source */
    size_t *send, *from, *recv, *to; /* [ranks] bytes and offsets */
    int rows;
} route_plan;

static void plan_close(route_plan *p)
{
    free(p->count), free(p->row0), free(p->send);
}

/* Whose rows go where: each rank tells each other how many rows each of its experts gets. */
static td_status plan_open(td_model *m, route_plan *p)
{
    const td_experts *x = m->experts;
    const td_scratch *s = &m->scratch;
    int n = p->ranks = x->shape.ranks, X = x->all;
    p->x0 = x->slot0[x->me], p->X = x->slots;
    p->count = td_xalloc((size_t)n * (size_t)(p->X + 1) * sizeof *p->count);
    p->row0 = td_xalloc((size_t)(p->X + 1) * sizeof *p->row0);
    p->send = td_xalloc(4 * (size_t)n * sizeof *p->send);
    p->from = p->send + n, p->recv = p->from + n, p->to = p->recv + n;
    int32_t *mine = td_xalloc((size_t)X * sizeof *mine), *all = td_xalloc((size_t)n * (size_t)X * sizeof *all);
    for (int e = 0; e < X; e++) mine[e] = s->expert_row0[e + 1] - s->expert_row0[e];
    td_status st = td_coll_all_gather(m->ranks->stage, mine, all, (size_t)X * sizeof *mine);
    size_t row = (size_t)m->desc.E * sizeof(float);
    for (int r = 0; r < n && st >= 0; r++) {
        int a = s->expert_row0[x->slot0[r]], b = s->expert_row0[x->slot0[r + 1]];
        p->from[r] = (size_t)a * row;
        p->send[r] = (size_t)(b - a) * row;
        p->to[r] = (size_t)p->rows * row;
        for (int e = 0; e < p->X; e++) p->rows += p->count[r * p->X + e] = all[r * X + p->x0 + e];
        p->recv[r] = (size_t)p->rows * row - p->to[r];
    }
    for (int e = 0, at = 0; e < p->X; e++) {
        for (int r = 0; r < n; r++) at += p->count[r * p->X + e];
        p->row0[e + 1] = at;
    }
    free(mine), free(all);
    return st;
}

/* Rows by source, then expert, to rows by expert, then source; or back. */
static void reorder(const td_model *m, const route_plan *p, float *by_source, float *by_expert, bool back)
{
    size_t E = (size_t)m->desc.E;
    float *src = by_source;
    for (int r = 0; r < p->ranks; r++)
        for (int e = 0; e < p->X; e++) {
            size_t at = (size_t)p->row0[e], n = (size_t)p->count[r * p->X + e] * E;
            for (int q = 0; q < r; q++) at += (size_t)p->count[q * p->X + e];
            if (back) memcpy(src, by_expert + at * E, n * sizeof *src);
            else memcpy(by_expert + at * E, src, n * sizeof *src);
            src += n;
        }
}

static td_status by_experts(td_model *m, const td_layer *l, int T)
{
    td_scratch *s = &m->scratch;
    td_expert_layer *w = &m->experts->layer[l - m->weights.layer];
    size_t E = (size_t)m->desc.E;
    int a = 0, b = T;
    route_plan p = {0};
    if (m->blocks) td_model_block(m, T, &a, &b);
    sort_rows(m, l, s->h + (size_t)a * E, b - a, TD_F32); /* as they travel */
    td_status st = plan_open(m, &p);
    float *in = td_share_room(&m->wire[0], (size_t)p.rows * E), *x = td_share_room(&m->wire[1], (size_t)p.rows * E);
    float *gate_up = td_share_room(&m->wire[2], (size_t)p.rows * 2 * (size_t)m->local.moe_F);
    if (st >= 0) st = td_coll_all_to_allv(m->ranks->stage, s->expert_x, p.send, p.from, in, p.recv, p.to);
    if (st >= 0) {
        reorder(m, &p, in, x, false);
        run_experts(m, w->up, w->down, p.row0, p.X, p.rows, x, TD_F32, gate_up, x);
        w->rows += (uint64_t)p.rows;
        reorder(m, &p, in, x, true);
        st = td_coll_all_to_allv(m->ranks->stage, in, p.recv, p.to, s->expert_x, p.send, p.from);
    }
    if (st >= 0) combine(m, s->expert_x, 0, b - a, s->x);
    plan_close(&p);
    return st;
}

td_status td_moe_forward(td_model *m, const td_layer *l, int T)
{
    return m->experts ? by_experts(m, l, T) : by_columns(m, l, T);
}
