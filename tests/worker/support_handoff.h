/* tests/worker/support_handoff.h - one leg by hand-off between two engines in one process: prefill on `a`,
 * pages copied as its layers are done, decode on `b`. The two may have different page sizes.
 *
 * The result is what a client sees: first tokens from the prefill leg, the rest from the decode leg. With
 * `lost` the decode side is told that the pages do not come. Every (layer, token) is counted: on_kv tells
 * each from the decode side's hit on exactly once. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_TESTS_SUPPORT_HANDOFF_H
#define TD_TESTS_SUPPORT_HANDOFF_H

#include "tests/worker/support_engine.h"

typedef struct te_carrier {
    td_engine *from, *to;
    uint64_t key;
    uint32_t hit, n_tokens; /* n_tokens: that the decode side's next row will stand at */
    uint8_t told[TD_MAX_LAYERS][TE_MAX_PROMPT + TE_MAX_OUT];
} te_carrier;

static inline void te_copy_token(const te_carrier *c, int layer, uint32_t t)
{
    const td_model_desc *d = td_engine_descr(c->from);
    int g = d->layer[layer].group, slot = d->layer[layer].slot;
    uint32_t n;
    const td_kv *a = td_engine_kv(c->from, g), *b = td_engine_kv(c->to, g);
    const int32_t *pa = td_engine_pages(c->from, c->key, g, &n), *pb = td_engine_pages(c->to, c->key, g, &n);
    size_t row = (size_t)d->group[g].D * td_dtype_bytes(a->dtype), PA = (size_t)a->P, PB = (size_t)b->P;
    for (size_t kv = 0; kv < 2 * (size_t)d->group[g].G; kv++)
        memcpy(td_kv_page(b, slot, pb[t / PB]) + (kv * PB + t % PB) * row,
               td_kv_page(a, slot, pa[t / PA]) + (kv * PA + t % PA) * row, row);
}

/* What a shipment does: only what the other side needs; the same arithmetic as td_ship_plan_first. */
static inline void te_carry(void *arg, uint64_t key, int layer0, int layer1, uint32_t tok0, uint32_t tok1)
{
    te_carrier *c = arg;
    const td_model_desc *d = td_engine_descr(c->from);
    T_OK(tok0 >= c->hit && tok0 < tok1 && tok1 <= c->n_tokens && key == c->key && layer0 < layer1,
         "kv hook: tokens %u to %u", tok0, tok1);
    for (int l = layer0; l < layer1; l++) {
        uint32_t W = (uint32_t)d->layer[l].window, first = W && c->n_tokens + 1 > W ? c->n_tokens + 1 - W : 0;
        for (uint32_t t = tok0; t < tok1; t++) {
            c->told[l][t]++;
            if (t >= first) te_copy_token(c, l, t);
        }
    }
}

static inline bool te_told_once(const te_carrier *c)
{
    for (int l = 0; l < td_engine_descr(c->from)->L; l++)
        for (uint32_t t = 0; t < c->n_tokens; t++)
            if (c->told[l][t] != (t >= c->hit)) return false;
    return true;
}

/* The prefill leg of s on c->from. True: a decode leg has something to do. */
static inline bool te_prefill(te_carrier *c, const te_spec *s, te_result *out, const char *why)
{
    te_spec p = *s;
    p.leg.kind = TD_LEG_PREFILL;
    p.leg.hit_tokens = c->hit;
    td_engine_on_kv(c->from, te_carry, c);
    te_expect(&p, out);
    T_OK(td_engine_start(c->from, te_leg(&p)) == TD_OK, "%s: start: %s", why, td_reason());
    (void)td_engine_hold(c->from, p.leg.key);
    te_finish(c->from, &p, out, 1);
    bool over = true;
    for (uint32_t k = 0; k < s->leg.sampling.n; k++) over &= out->finish[k] != TD_FINISH_NONE;
    if (!over)
        T_OK(te_told_once(c), "%s: leg %llu: not every layer and token was told once", why,
             (unsigned long long)s->leg.key);
    td_engine_unhold(c->from, p.leg.key);
    td_engine_on_kv(c->from, NULL, NULL);
    return !over;
}

static inline void te_append_rest(te_result *out, const te_result *second, uint32_t n)
{
    for (uint32_t k = 0; k < n; k++) {
        uint32_t from = out->n[k];
        T_OK(second->n[k] >= from && !memcmp(out->token[k], second->token[k], from * sizeof(uint32_t)));
        memcpy(&out->token[k][from], &second->token[k][from], (TE_MAX_OUT - from) * sizeof(uint32_t));
        memcpy(&out->logprob[k][from], &second->logprob[k][from], (TE_MAX_OUT - from) * sizeof(float));
        memcpy(out->top[k][from], second->top[k][from], (TE_MAX_OUT - from) * sizeof out->top[0][0]);
        out->n[k] = second->n[k];
        if (out->finish[k] == TD_FINISH_NONE) out->finish[k] = second->finish[k];
    }
}

static inline void te_hand_off(td_engine *a, td_engine *b, const te_spec *s, te_result *out, bool lost,
                               const char *why)
{
    te_result second = {0};
    te_spec d = *s;
    uint32_t hit = 0, n = s->leg.sampling.n, first[TE_MAX_N], n_first;
    bool resumes = false;
    for (uint32_t c = 0; c < n; c++) resumes |= s->n_resume[c] > 0;
    d.leg.kind = TD_LEG_DECODE;
    T_OK(td_engine_reserve(b, te_leg(&d), &hit) == TD_OK, "%s: reserve: %s", why, td_reason());
    (void)td_engine_hold(b, d.leg.key);
    te_carrier *c = td_xalloc(sizeof *c);
    *c = (te_carrier){.from = a,
                      .to = b,
                      .key = s->leg.key,
                      .hit = hit,
                      .n_tokens = s->leg.n_prompt + (n == 1 ? s->n_resume[0] : 0)};
    bool goes_on = te_prefill(c, s, out, why);
    free(c);
    te_expect(&d, &second);
    n_first = resumes && n > 1
                  ? 0
                  : n; /* several choices that resume: the decode side goes on from the logs it has */
    for (uint32_t k = 0; k < n_first && goes_on; k++) {
        first[k] = out->token[k][out->n[k] - 1];
        if (lost) continue;
        memcpy(second.token[k], out->token[k], sizeof second.token[k]);
        second.n[k] = out->n[k];
    }
    if (!goes_on)
        T_OK(td_engine_cancel(b, d.leg.key) == TD_OK, "%s", td_reason());
    else if (lost)
        T_OK(td_engine_recompute(b, d.leg.key) == TD_OK, "%s", td_reason());
    else
        T_OK(td_engine_land(b, d.leg.key, first, n_first) == TD_OK, "%s: land: %s", why, td_reason());
    td_engine_unhold(b, d.leg.key);
    te_finish(b, &d, &second, 1);
    if (goes_on) te_append_rest(out, &second, n);
    te_result_free(&second);
}

#endif
