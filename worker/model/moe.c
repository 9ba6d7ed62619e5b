// SPDX-License-Identifier: Apache-2.0
/* worker/model/moe.c - a layer's mixture of experts: route, sort the slots by expert, two grouped products,
 * combine. Dropless: every slot has a row. Weights are applied at the end, by the token's own order of slots,
 * so a token's sum does not depend on where its experts were computed. */
#include "worker/model/model_int.h"

void td_moe_forward(td_model *m, const td_layer *l, int T)
{
    const td_ops *o = m->ops;
    const td_route_law *law = &m->desc.moe.route;
    td_scratch *s = &m->scratch;
    int k = law->top_k, F = m->desc.moe.F;
    size_t E = (size_t)m->desc.E, F2 = 2 * (size_t)F;
    o->moe_logits(m->pool, &l->moe.router, s->h, E, T, s->route_logits);
    o->moe_route(m->pool, law, s->route_logits, T, s->route_ids, s->route_weights);
    o->moe_place(m->pool, s->route_ids, T, k, law->n_experts, s->expert_row0, s->expert_row);
    o->moe_gather(m->pool, s->h, E, s->expert_row, T, k, m->desc.E, s->expert_x, E);
    td_grouped up = {l->moe.gate_up, law->n_experts, s->expert_row0, s->expert_x, E, s->expert_gate_up, F2};
    o->linear_grouped(o, m->pool, s->ops, &up);
    o->silu_mul(m->pool, s->expert_gate_up, F2, T * k, F, s->expert_gate_up, F2);
    td_grouped down = {l->moe.down, law->n_experts, s->expert_row0, s->expert_gate_up, F2, s->expert_x, E};
    o->linear_grouped(o, m->pool, s->ops, &down);
    o->moe_combine(m->pool, s->expert_x, E, s->expert_row, s->route_weights, T, k, m->desc.E, s->x, E);
}
