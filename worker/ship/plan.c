// SPDX-License-Identifier: Apache-2.0
#include "worker/ship/plan.h"
#include "common/check.h"
#include "proto/kvframe.h"

uint32_t td_ship_plan_first(int window, uint32_t hit, uint32_t n_tokens)
{
    uint32_t live = 0;
    if (window > 0 && n_tokens + 1 > (uint32_t)window) live = n_tokens + 1 - (uint32_t)window;
    return TD_MIN(TD_MAX(hit, live), n_tokens);
}

size_t td_ship_plan_token_bytes(const td_model_desc *d, int group, td_dtype kv)
{
    return 2 * (size_t)d->group[group].G * (size_t)d->group[group].D * td_dtype_bytes(kv);
}

td_status td_ship_plan_open(td_ship_plan *p, const td_model_desc *d, td_dtype kv, uint32_t hit,
                            uint32_t n_tokens)
{
    td_ship_plan q = {.desc = d, .hit = hit, .n_tokens = n_tokens};
    for (int g = 0; g < d->n_groups; g++) {
        q.token_bytes[g] = td_ship_plan_token_bytes(d, g, kv);
        if (q.token_bytes[g] > TD_KVF_FRAME_BYTES)
            return td_refuse(TD_ENOSUP, "one token of page group %d has %zu bytes, a frame %d", g,
                             q.token_bytes[g], TD_KVF_FRAME_BYTES);
    }
    *p = q;
    return TD_OK;
}

static void flush(td_ship_plan *p, int g, td_rect_fn *emit, void *arg)
{
    if (p->pending[g].n_layers) emit(arg, &p->pending[g]);
    p->pending[g] = (td_rect){0};
}

/* One layer that does not fit a frame: pieces of nearly equal size. */
static void emit_cut(const td_ship_plan *p, td_rect r, td_rect_fn *emit, void *arg)
{
    uint32_t per = (uint32_t)(TD_KVF_FRAME_BYTES / p->token_bytes[r.group]);
    uint32_t pieces = (r.n_tok + per - 1) / per, end = r.tok0 + r.n_tok, n = r.n_tok;
    for (uint32_t i = 0; i < pieces; i++) {
        r.n_tok = (uint32_t)((uint64_t)n * (i + 1) / pieces - (uint64_t)n * i / pieces);
        emit(arg, &r);
        r.tok0 += r.n_tok;
    }
    TD_ASSERT(r.tok0 == end);
}

static void add_layer(td_ship_plan *p, int layer, uint32_t tok0, uint32_t tok1, td_rect_fn *emit, void *arg)
{
    const td_layer_desc *l = &p->desc->layer[layer];
    int g = l->group;
    tok0 = TD_MAX(tok0, td_ship_plan_first(p->desc->group[g].window, p->hit, p->n_tokens));
    tok1 = TD_MIN(tok1, p->n_tokens);
    if (tok0 >= tok1) return;
    td_rect r = {.group = (uint16_t)g, .layer0 = (uint16_t)l->slot, .n_layers = 1,
                 .n_heads = (uint16_t)p->desc->group[g].G, .tok0 = tok0, .n_tok = tok1 - tok0};
    td_rect *q = &p->pending[g];
    size_t bytes = p->token_bytes[g] * r.n_tok;
    bool joins = q->n_layers && q->tok0 == r.tok0 && q->n_tok == r.n_tok &&
        q->layer0 + q->n_layers == r.layer0 && bytes * (q->n_layers + 1u) <= TD_KVF_FRAME_BYTES;
    if (joins) {
        q->n_layers++;
    } else {
        flush(p, g, emit, arg);
        if (bytes > TD_KVF_FRAME_BYTES) emit_cut(p, r, emit, arg);
        else *q = r;
    }
    /* a full frame need not wait for the next layer to find that out */
    if (q->n_layers && bytes * (q->n_layers + 1u) > TD_KVF_FRAME_BYTES) flush(p, g, emit, arg);
}

void td_ship_plan_add(td_ship_plan *p, int layer0, int layer1, uint32_t tok0, uint32_t tok1, td_rect_fn *emit,
                      void *arg)
{
    for (int l = layer0; l < layer1; l++) add_layer(p, l, tok0, tok1, emit, arg);
    if (layer1 == p->desc->L)
        for (int g = 0; g < p->desc->n_groups; g++) flush(p, g, emit, arg);
}

uint32_t td_ship_plan_max_frames(const td_model_desc *d, uint32_t n_tokens)
{
    uint64_t n = (uint64_t)d->L * ((uint64_t)n_tokens + 1);
    return n > 1u << 22 ? 1u << 22 : (uint32_t)n;
}
