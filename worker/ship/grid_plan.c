// SPDX-License-Identifier: Apache-2.0
#include "worker/ship/grid_plan.h"
#include "common/check.h"
#include "proto/kvframe.h"
#include <stdlib.h>

enum { MAX_PENDING = 16 };

/* What is gathered for one destination and group; n_layers 0: none. Oldest first. */
typedef struct pending { td_rect r[MAX_PENDING]; uint32_t n; } pending;

struct td_grid_plan {
    td_grid_plan_opts o;
    td_ship_grid src, dst;
    uint32_t n_src, n_dst;
    td_ship_part *src_part, *dst_part;
    uint32_t first[TD_MAX_GROUPS];
    /* tokens to send, by (source CP rank, destination CP rank, turn); axes that do not matter have length 1
     */
    uint32_t n_cs, n_cd, turns[TD_MAX_GROUPS];
    uint64_t *tokens[TD_MAX_GROUPS];
    pending *pend;               /* [n_dst][n_groups] */
};

/* ---- what a rank holds ---- */
td_ship_grid td_ship_grid_one(const td_model_desc *d)
{
    return (td_ship_grid){.tp = 1, .pp = 1, .cp = 1, .stage = {0, (uint16_t)d->L},
                          .tokens = {.kind = TD_TOKENS_ALL, .n = 1}};
}

td_ship_grid td_ship_grid_of(const td_grid *g, uint32_t split)
{
    td_ship_grid x = {.tp = (uint16_t)TD_MIN(g->tp, UINT16_MAX), .pp = (uint16_t)TD_MIN(g->pp, UINT16_MAX),
                      .cp = (uint16_t)TD_MIN(g->cp, UINT16_MAX)};
    x.tokens = (td_token_map){x.cp > 1 ? TD_TOKENS_INTERLEAVE : TD_TOKENS_ALL, x.cp, split};
    for (int s = 0; s <= g->pp && s <= TD_SHIP_MAX_RANKS && s <= TD_MAX_STAGES; s++)
        x.stage[s] = (uint16_t)g->layer0[s];
    return x; /* td_ship_grid_check refuses what is beyond its limits */
}

void td_ship_grid_stages(td_ship_grid *g, uint32_t L)
{
    for (uint32_t s = 0; s <= g->pp; s++) g->stage[s] = (uint16_t)((s * L + g->pp - 1) / g->pp);
}

uint32_t td_ship_grid_ranks(const td_ship_grid *g)
{
    return (uint32_t)g->tp * g->pp * g->cp;
}

td_status td_ship_grid_check(const td_ship_grid *g, const td_model_desc *d)
{
    if (!g->tp || !g->pp || !g->cp || g->tp > TD_SHIP_MAX_RANKS || g->pp > TD_SHIP_MAX_RANKS ||
        g->cp > TD_SHIP_MAX_RANKS || td_ship_grid_ranks(g) > TD_SHIP_MAX_RANKS)
        return td_refuse(TD_EBADREQ, "grid of %u x %u x %u ranks, not 1 to %d", g->tp, g->pp, g->cp,
                         TD_SHIP_MAX_RANKS);
    if (!td_token_map_ok(&g->tokens) || g->tokens.n != g->cp)
        return td_refuse(TD_EBADREQ,
                         "token map of kind %d over %u ranks in blocks of %u, for context parallel %u",
                         (int)g->tokens.kind, g->tokens.n, g->tokens.unit, g->cp);
    for (uint32_t s = 0; s < g->pp; s++)
        if (g->stage[s] >= g->stage[s + 1])
            return td_refuse(TD_EBADREQ, "pipeline stage %u has layers %u to %u", s, g->stage[s],
                             g->stage[s + 1]);
    if (g->stage[0] || g->stage[g->pp] != d->L)
        return td_refuse(TD_EBADREQ, "stages cover layers %u to %u of %d", g->stage[0], g->stage[g->pp],
                         d->L);
    int next[TD_MAX_GROUPS] = {0};
    for (int l = 0; l < d->L; l++) /* contiguous layers must be contiguous slots */
        if (d->layer[l].slot != next[d->layer[l].group]++)
            return td_refuse(TD_EBADREQ, "the slots of page group %d do not follow the layers",
                             d->layer[l].group);
    for (int i = 0; i < d->n_groups; i++)
        if (d->group[i].G < 1 || (d->group[i].G % g->tp && g->tp % d->group[i].G))
            return td_refuse(TD_EBADREQ,
                             "tensor parallel %u neither divides nor is a multiple of %d KV heads", g->tp,
                             d->group[i].G);
    return TD_OK;
}

void td_ship_part_of(const td_ship_grid *g, const td_model_desc *d, uint32_t rank, td_ship_part *out)
{
    uint32_t tp = rank % g->tp, cp = rank / g->tp % g->cp, pp = rank / g->tp / g->cp;
    td_ship_part p = {.rank = (uint16_t)rank, .layer0 = g->stage[pp], .layer1 = g->stage[pp + 1],
                      .tokens = {g->tokens, cp}};
    bool all = g->tokens.kind == TD_TOKENS_ALL;
    for (int l = 0; l < p.layer1; l++) {
        int i = d->layer[l].group;
        if (l < p.layer0) p.slot0[i]++;
        else p.n_slots[i]++;
    }
    for (int i = 0; i < d->n_groups; i++) {
        uint32_t G = (uint32_t)d->group[i].G, same = TD_MAX(g->tp / G, 1u); /* ranks with one head */
        p.head0[i] = (uint16_t)(tp * G / g->tp);
        p.n_heads[i] = (uint16_t)TD_MAX(G / g->tp, 1u);
        p.replica[i] = (uint16_t)(tp % same + (all ? cp * same : 0));
        p.n_replicas[i] = (uint16_t)(same * (all ? g->cp : 1u));
    }
    *out = p;
}

uint64_t td_ship_part_lacks(const td_ship_part *p, const td_model_desc *d, int group, uint32_t hit,
                            uint32_t n_tokens)
{
    uint32_t first = td_ship_plan_first(d->group[group].window, hit, n_tokens);
    return td_token_before(&p->tokens, n_tokens) - td_token_before(&p->tokens, first);
}

/* ---- who sends ---- */
/* Whether the replicas of a source part take turns for a destination. */
static bool in_turns(const td_ship_part *s, const td_ship_part *d, int g)
{
    return d->n_replicas[g] % s->n_replicas[g] != 0;
}

/* The turn at which source part s sends to d; of those without turns, whether it sends at all. */
static uint32_t turn_of(const td_ship_part *s, const td_ship_part *d, int g)
{
    uint32_t R = s->n_replicas[g];
    return (s->replica[g] + R - d->replica[g] % R) % R;
}

static uint32_t common(uint32_t a0, uint32_t an, uint32_t b0, uint32_t bn, uint32_t *first)
{
    uint32_t lo = TD_MAX(a0, b0), hi = TD_MIN(a0 + an, b0 + bn);
    *first = lo;
    return hi > lo ? hi - lo : 0;
}

static uint64_t *cell(const td_grid_plan *p, int g, uint32_t cs, uint32_t cd, uint32_t turn)
{
    return &p->tokens[g][(cs % p->n_cs * p->n_cd + cd % p->n_cd) * p->turns[g] + turn];
}

/* One pass over the tokens of a group: stretches with one owner on each side and one turn. */
static void count_tokens(td_grid_plan *p, int g)
{
    const td_token_map *a = &p->src.tokens, *b = &p->dst.tokens;
    for (uint32_t t = p->first[g], end; t < p->o.n_tokens; t = end) {
        end = p->o.n_tokens;
        if (p->n_cs > 1) end = TD_MIN(end, (t / a->unit + 1) * a->unit);
        if (p->n_cd > 1) end = TD_MIN(end, (t / b->unit + 1) * b->unit);
        if (p->turns[g] > 1) end = TD_MIN(end, (t / TD_SHIP_TURN + 1) * TD_SHIP_TURN);
        *cell(p, g, td_token_owner(a, t), td_token_owner(b, t), t / TD_SHIP_TURN % p->turns[g]) += end - t;
    }
}

static uint64_t tokens_between(const td_grid_plan *p, const td_ship_part *s, const td_ship_part *d, int g)
{
    uint32_t cs = s->tokens.rank, cd = d->tokens.rank, turn = turn_of(s, d, g);
    if (in_turns(s, d, g)) return *cell(p, g, cs, cd, turn);
    uint64_t n = 0;
    for (uint32_t k = 0; k < p->turns[g] && !turn; k++) n += *cell(p, g, cs, cd, k);
    return n;
}

uint64_t td_grid_plan_elements(const td_grid_plan *p, uint32_t src, uint32_t dst)
{
    const td_ship_part *s = &p->src_part[src], *d = &p->dst_part[dst];
    uint64_t n = 0;
    uint32_t x;
    for (int g = 0; g < p->o.desc->n_groups; g++)
        n += (uint64_t)common(s->slot0[g], s->n_slots[g], d->slot0[g], d->n_slots[g], &x) *
            common(s->head0[g], s->n_heads[g], d->head0[g], d->n_heads[g], &x) * 2 *
            (uint64_t)p->o.desc->group[g].D * tokens_between(p, s, d, g);
    return n;
}

bool td_grid_plan_pair(const td_grid_plan *p, uint32_t src, uint32_t dst)
{
    return (!src && !dst) || td_grid_plan_elements(p, src, dst) > 0;
}

uint32_t td_grid_plan_sources(const td_grid_plan *p, uint32_t dst)
{
    uint32_t n = 0;
    for (uint32_t s = 0; s < p->n_src; s++) n += td_grid_plan_pair(p, s, dst);
    return n;
}

const td_ship_part *td_grid_plan_dst(const td_grid_plan *p, uint32_t dst)
{
    return &p->dst_part[dst];
}

/* ---- open ---- */
static td_ship_part *parts(const td_ship_grid *g, const td_model_desc *d, uint32_t *n)
{
    *n = td_ship_grid_ranks(g);
    td_ship_part *p = td_xalloc(*n * sizeof *p);
    for (uint32_t r = 0; r < *n; r++) td_ship_part_of(g, d, r, &p[r]);
    return p;
}

td_status td_grid_plan_open(const td_grid_plan_opts *o, td_grid_plan **out)
{
    const td_model_desc *d = o->desc;
    TD_TRY(td_ship_plan_check(d, o->kv));
    TD_TRY(td_ship_grid_check(o->src, d));
    TD_TRY(td_ship_grid_check(o->dst, d));
    if (o->rank >= td_ship_grid_ranks(o->src))
        return td_refuse(TD_EBADREQ, "no rank %u in the grid", o->rank);
    td_grid_plan *p = td_xalloc(sizeof *p);
    p->o = *o;
    p->src = *o->src;
    p->dst = *o->dst;
    p->o.src = p->o.dst = NULL;
    p->src_part = parts(&p->src, d, &p->n_src);
    p->dst_part = parts(&p->dst, d, &p->n_dst);
    p->n_cs = p->src.tokens.kind == TD_TOKENS_ALL ? 1 : p->src.cp;
    p->n_cd = p->dst.tokens.kind == TD_TOKENS_ALL ? 1 : p->dst.cp;
    for (int g = 0; g < d->n_groups; g++) {
        p->first[g] = td_ship_plan_first(d->group[g].window, o->hit, o->n_tokens);
        p->turns[g] = p->src_part[0].n_replicas[g];
        p->tokens[g] = td_xalloc((size_t)p->n_cs * p->n_cd * p->turns[g] * sizeof *p->tokens[g]);
        count_tokens(p, g);
    }
    p->pend = td_xalloc((size_t)p->n_dst * (size_t)d->n_groups * sizeof *p->pend);
    *out = p;
    return TD_OK;
}

void td_grid_plan_close(td_grid_plan *p)
{
    if (!p) return;
    for (int g = 0; g < TD_MAX_GROUPS; g++) free(p->tokens[g]);
    free(p->src_part);
    free(p->dst_part);
    free(p->pend);
    free(p);
}

/* ---- frames ---- */
typedef struct out { td_rect_fn *emit; void *arg; } out;

static uint32_t held(const td_ship_part *d, uint32_t t0, uint32_t t1)
{
    return td_token_before(&d->tokens, t1) - td_token_before(&d->tokens, t0);
}

/* One layer that does not fit a frame: pieces with nearly equal numbers of the destination's tokens. */
static void emit_cut(const td_ship_part *d, td_rect r, size_t token_bytes, const out *o)
{
    uint32_t n = held(d, r.tok0, r.tok0 + r.n_tok), per = (uint32_t)(TD_KVF_FRAME_BYTES / token_bytes);
    uint32_t pieces = (n + per - 1) / per, end = r.tok0 + r.n_tok, base = td_token_before(&d->tokens, r.tok0);
    for (uint32_t i = 1; i <= pieces; i++) {
        uint32_t to =
            i == pieces ? end : td_token_at(&d->tokens, base + (uint32_t)((uint64_t)n * i / pieces));
        r.n_tok = to - r.tok0;
        o->emit(o->arg, &r);
        r.tok0 = to;
    }
}

static void flush_one(pending *q, uint32_t i, const out *o)
{
    td_rect r = q->r[i];
    for (q->n--; i < q->n; i++) q->r[i] = q->r[i + 1];
    o->emit(o->arg, &r);
}

static void gather(td_grid_plan *p, const td_ship_part *d, td_rect r, const out *o)
{
    pending *q = &p->pend[(size_t)r.dst * (size_t)p->o.desc->n_groups + r.group];
    size_t token = 2 * (size_t)r.n_heads * (size_t)p->o.desc->group[r.group].D * td_dtype_bytes(p->o.kv);
    size_t layer = token * held(d, r.tok0, r.tok0 + r.n_tok);
    if (!layer) return;
    uint32_t i = 0;
    while (i < q->n && !(q->r[i].tok0 == r.tok0 && q->r[i].n_tok == r.n_tok)) i++;
    if (i < q->n && q->r[i].layer0 + q->r[i].n_layers == r.layer0 &&
        layer * (q->r[i].n_layers + 1u) <= TD_KVF_FRAME_BYTES) {
        q->r[i].n_layers++;
    } else {
        if (i < q->n) flush_one(q, i, o);
        if (layer > TD_KVF_FRAME_BYTES) {
            emit_cut(d, r, token, o);
            return;
        }
        if (q->n == MAX_PENDING) flush_one(q, 0, o);
        i = q->n++;
        q->r[i] = r;
    }
    /* a full frame need not wait for the next layer to find that out */
    if (layer * (q->r[i].n_layers + 1u) > TD_KVF_FRAME_BYTES) flush_one(q, i, o);
}

/* The stretches of [t0, t1) that source part s holds and sends to d. */
static void add_tokens(td_grid_plan *p, const td_ship_part *s, const td_ship_part *d, td_rect r, uint32_t t0,
                       uint32_t t1, const out *o)
{
    bool turns = in_turns(s, d, r.group);
    uint32_t turn = turn_of(s, d, r.group), R = s->n_replicas[r.group], n;
    if (!turns && turn) return;
    for (uint32_t t = t0; (t = td_token_run(&s->tokens, t, t1, &n)) < t1; t += n) {
        if (turns) {
            uint32_t b = t / TD_SHIP_TURN;
            n = TD_MIN(n, (b + 1) * TD_SHIP_TURN - t);
            if (b % R != turn) continue;
        }
        r.tok0 = t;
        r.n_tok = n;
        gather(p, d, r, o);
    }
}

static void add_layer(td_grid_plan *p, int layer, uint32_t tok0, uint32_t tok1, const out *o)
{
    const td_ship_part *s = &p->src_part[p->o.rank];
    int g = p->o.desc->layer[layer].group;
    uint32_t slot = (uint32_t)p->o.desc->layer[layer].slot, head0, n_heads;
    if (layer < s->layer0 || layer >= s->layer1) return;
    tok0 = TD_MAX(tok0, p->first[g]);
    tok1 = TD_MIN(tok1, p->o.n_tokens);
    if (tok0 >= tok1) return;
    for (uint32_t k = 0; k < p->n_dst; k++) {
        const td_ship_part *d = &p->dst_part[k];
        n_heads = common(s->head0[g], s->n_heads[g], d->head0[g], d->n_heads[g], &head0);
        if (layer < d->layer0 || layer >= d->layer1 || !n_heads) continue;
        td_rect r = {.group = (uint16_t)g, .layer0 = (uint16_t)slot, .n_layers = 1, .head0 = (uint16_t)head0,
                     .n_heads = (uint16_t)n_heads, .dst = (uint16_t)k};
        add_tokens(p, s, d, r, tok0, tok1, o);
    }
}

void td_grid_plan_add(td_grid_plan *p, int layer0, int layer1, uint32_t tok0, uint32_t tok1, td_rect_fn *emit,
                      void *arg)
{
    const out o = {emit, arg};
    for (int l = layer0; l < layer1; l++) add_layer(p, l, tok0, tok1, &o);
    if (layer1 < p->src_part[p->o.rank].layer1) return;
    for (uint32_t k = 0; k < p->n_dst * (uint32_t)p->o.desc->n_groups; k++)
        while (p->pend[k].n) flush_one(&p->pend[k], 0, &o);
}
