// SPDX-License-Identifier: Apache-2.0
/* worker/model/moe.c - a layer's mixture of experts: route, sort the slots by expert, two grouped products,
 * combine. Dropless: every slot has a row. Weights are applied at the end, by the token's own order of slots,
 * so a token's sum does not depend on where its experts were computed.
 *
 *   one rank         as it stands
 *   tensor parallel  each rank has some columns of every expert: the slots' parts are summed before they are combined
 *   expert parallel  each rank has some experts, or copies, whole; each row of the stage has one source rank (its
 *                    block): slots travel to their experts and back (all-to-all, dropless, in rounds where experts
 *                    of a rank get more than twice an even share), and the source combines them */
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
        o->operand->silu_mul(m->pool, gate_up, F2, rows, F, m->scratch.operand, (td_operand){down.x_dtype, 0},
                             down.ldx);
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

/* Whose rows go where. A rank's rows are in a list by source, then expert; a list longer than there is room for is
 * computed in several rounds, a window of it in each. All of it follows from the counts, which every rank has. */
struct td_travel {
    int ranks, x0, X;               /* of the stage; this rank's slots of experts */
    int room, rounds;               /* rows of a window; windows of the longest list */
    int32_t *counts;                /* [ranks][all slots]: rows of each rank for each slot */
    int32_t *first;                 /* [all slots + 1]: of this rank's rows as they are sorted here */
    int32_t *before;                /* [ranks]: where this rank's rows begin in each rank's list */
    /* of a window: */
    int32_t *count;                 /* [ranks][X]: rows that come from each rank for each expert */
    int32_t *place;                 /* [td_moe_numbers]: the three below, in one block */
    int32_t *by_expert, *by_source; /* [rows]: of a row in one order, its place in the other */
    int32_t *row0;                  /* [X + 1]: of the rows as they are computed, by expert, then source */
    const int32_t *row0_at, *by_expert_at, *by_source_at; /* the same where the kernels work */
    size_t *send, *from, *recv, *to;                      /* [ranks] bytes and offsets */
    int rows;
};

/* Twice an even share, or all there can be. */
int td_moe_most_rows(const td_model *m)
{
    enum { LEAST_ROWS = 24 };
    int k = m->desc.moe.route.top_k, rows = m->max_rows * k;
    if (!m->ranks || !m->ranks->grid.ep) return rows;
    const td_grid *g = &m->ranks->grid;
    int even = (m->max_rows + g->cp * g->tp - 1) / (g->cp * g->tp) * k;
    return m->least_workspace ? LEAST_ROWS : TD_MIN(2 * even, rows * g->dp);
}

/* Places in both orders, and where each expert's rows begin. */
size_t td_moe_numbers(const td_model *m)
{
    return m->experts ? 2 * (size_t)td_moe_most_rows(m) + (size_t)m->experts->slots + 1 : 0;
}

td_status td_moe_open(td_model *m)
{
    const td_experts *x = m->experts;
    float *p;
    if (!x) return TD_OK;
    td_travel *v = m->experts->travel = td_xalloc(sizeof *v);
    size_t n = (size_t)(v->ranks = x->shape.ranks), all = (size_t)x->all;
    v->x0 = x->slot0[x->me], v->X = x->slots, v->room = td_moe_most_rows(m);
    size_t rows = (size_t)v->room, E = (size_t)m->desc.E;
    v->counts = td_xalloc((n + 1) * all * sizeof *v->counts); /* and what this rank tells */
    v->first = td_xalloc((all + 1) * sizeof *v->first);
    v->before = td_xalloc(n * sizeof *v->before);
    v->count = td_xalloc(n * (size_t)(v->X + 1) * sizeof *v->count);
    v->place = td_xalloc(td_moe_numbers(m) * sizeof *v->place);
    v->send = td_xalloc(4 * n * sizeof *v->send);
    v->from = v->send + n, v->recv = v->from + n, v->to = v->recv + n;
    TD_TRY(td_share_room(m, 0, rows * E, &p));
    TD_TRY(td_share_room(m, 1, rows * E, &p));
    return td_share_room(m, 2, rows * 2 * (size_t)m->local.moe_F, &p);
}

void td_moe_close(td_model *m)
{
    td_travel *v = m->experts ? m->experts->travel : NULL;
    if (!v) return;
    free(v->counts), free(v->first), free(v->before), free(v->count), free(v->place), free(v->send), free(v);
    m->experts->travel = NULL;
}

/* Rows come by source, then expert; they are computed by expert, then source. */
static td_status order_rows(td_model *m, td_travel *v)
{
    size_t n = (size_t)v->rows;
    const void *at;
    v->by_expert = v->place, v->by_source = v->by_expert + n, v->row0 = v->by_source + n;
    v->row0[0] = 0;
    for (int e = 0, row = 0; e < v->X; e++) {
        for (int r = 0; r < v->ranks; r++) row += v->count[r * v->X + e];
        v->row0[e + 1] = row;
    }
    for (int r = 0, source = 0; r < v->ranks; r++)
        for (int e = 0; e < v->X; e++) {
            int row = v->row0[e];
            for (int q = 0; q < r; q++) row += v->count[q * v->X + e];
            for (int i = 0; i < v->count[r * v->X + e]; i++, row++, source++) {
                v->by_expert[row] = source;
                v->by_source[source] = row;
            }
        }
    TD_TRY(td_place_put(m, v->place, (2 * n + (size_t)v->X + 1) * sizeof *v->place, &at));
    v->by_expert_at = at, v->by_source_at = v->by_expert_at + n, v->row0_at = v->by_source_at + n;
    return TD_OK;
}

/* Each rank tells each other how many rows each of its experts gets. */
static td_status count_rows(td_model *m, td_travel *v)
{
    const td_experts *x = m->experts;
    int32_t *mine = v->counts + (size_t)v->ranks * (size_t)x->all;
    TD_TRY(td_devmem_fetch(m->ops->dev, v->first, m->scratch.expert_row0, (size_t)(x->all + 1) * sizeof *v->first));
    for (int e = 0; e < x->all; e++) mine[e] = v->first[e + 1] - v->first[e];
    TD_TRY(td_coll_all_gather(m->ranks->stage, mine, v->counts, (size_t)x->all * sizeof *mine));
    v->rounds = 0;
    for (int d = 0; d < v->ranks; d++) {
        int list = 0;
        for (int r = 0; r < v->ranks; r++) {
            if (r == x->me) v->before[d] = list;
            for (int e = x->slot0[d]; e < x->slot0[d + 1]; e++) list += v->counts[r * x->all + e];
        }
        v->rounds = TD_MAX(v->rounds, (list + v->room - 1) / v->room);
    }
    return TD_OK;
}

/* Of the rows [at, at + n) of a list, those before row w of it. */
static int rows_before(int at, int n, int w)
{
    return TD_MAX(TD_MIN(w - at, n), 0);
}

/* Window i of this rank's list, and what this rank has in the others'. */
static td_status window(td_model *m, td_travel *v, int i)
{
    const td_experts *x = m->experts;
    size_t row = (size_t)m->desc.E * sizeof(float);
    int w0 = i * v->room, w1 = w0 + v->room, at = 0;
    v->rows = 0;
    for (int r = 0; r < v->ranks; r++) {
        int of_r = v->first[x->slot0[r]], n = v->first[x->slot0[r + 1]] - of_r;
        int a = rows_before(v->before[r], n, w0), b = rows_before(v->before[r], n, w1);
        v->from[r] = (size_t)(of_r + a) * row;
        v->send[r] = (size_t)(b - a) * row;
        v->to[r] = (size_t)v->rows * row;
        for (int e = 0; e < v->X; e++) {
            n = v->counts[r * x->all + v->x0 + e];
            v->rows += v->count[r * v->X + e] = rows_before(at, n, w1) - rows_before(at, n, w0);
            at += n;
        }
        v->recv[r] = (size_t)v->rows * row - v->to[r];
    }
    return order_rows(m, v);
}

/* To their experts and back to where they were. */
static td_status travel(td_model *m, td_expert_layer *w, td_travel *v)
{
    td_coll *stage = m->ranks->data.stage;
    float *sorted = m->scratch.expert_x, *in, *x, *gate_up;
    size_t E = (size_t)m->desc.E, n = (size_t)v->rows;
    TD_TRY(td_share_room(m, 0, n * E, &in));
    TD_TRY(td_share_room(m, 1, n * E, &x));
    TD_TRY(td_share_room(m, 2, n * 2 * (size_t)m->local.moe_F, &gate_up));
    TD_TRY(td_coll_all_to_allv(stage, sorted, v->send, v->from, in, v->recv, v->to));
    m->ops->take_rows(m->pool, in, E, v->by_expert_at, v->rows, m->desc.E, x, E);
    run_experts(m, w->up, w->down, v->row0_at, v->X, v->rows, x, TD_F32, gate_up, x);
    w->rows += (uint64_t)v->rows;
    m->ops->take_rows(m->pool, x, E, v->by_source_at, v->rows, m->desc.E, in, E);
    return td_coll_all_to_allv(stage, in, v->recv, v->to, sorted, v->send, v->from);
}

static td_status by_experts(td_model *m, const td_layer *l, int T)
{
    td_scratch *s = &m->scratch;
    td_travel *v = m->experts->travel;
    int a = 0, b = T;
    if (m->blocks) td_model_block(m, T, &a, &b);
    TD_TRY(sort_rows(m, l, s->h + (size_t)a * (size_t)m->desc.E, b - a, TD_F32)); /* as they travel */
    TD_TRY(count_rows(m, v));
    for (int i = 0; i < v->rounds; i++) {
        TD_TRY(window(m, v, i));
        TD_TRY(travel(m, &m->experts->layer[l - m->weights.layer], v));
    }
    combine(m, s->expert_x, 0, b - a, s->x);
    return TD_OK;
}

td_status td_moe_forward(td_model *m, const td_layer *l, int T)
{
    return m->experts ? by_experts(m, l, T) : by_columns(m, l, T);
}
