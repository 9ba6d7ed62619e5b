// SPDX-License-Identifier: Apache-2.0
#include "worker/model/experts.h"
#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include "worker/devmem.h"
#include <stdlib.h>
#include <string.h>

enum { LEAST_GAIN = 5, ALIGN = 64, MOVE_BYTES = 256 << 20 }; /* gain: percent */

static int experts_of(const td_model *m) { return m->desc.moe.route.n_experts; }
static size_t aligned(size_t n) { return (n + ALIGN - 1) / ALIGN * ALIGN; }
static bool is_moe(const td_model *m, int i) { return m->desc.layer[i].moe; }

static int moe_layers(const td_model *m)
{
    int n = 0;
    for (int i = m->local.layer0; i < m->local.layer1; i++) n += is_moe(m, i);
    return n;
}

/* ---- a layer's tables ---- */

static void index_map(td_experts *x, td_expert_layer *l)
{
    int at = 0, slot0 = x->slot0[x->me];
    for (int e = 0; e < x->shape.experts; e++) {
        l->first[e] = at;
        l->own[e] = -1;
        for (int i = 0; i < x->all; i++) {
            if (l->map[i] != e) continue;
            l->place[at++] = i;
            if (i >= slot0 && i < slot0 + x->slots) l->own[e] = i - slot0;
        }
        int copies = at - l->first[e], own = 0;
        while (own < copies && l->own[e] >= 0 && l->place[l->first[e] + own] != slot0 + l->own[e]) own++;
        l->start[e] = l->first[e] + (l->own[e] >= 0 ? own : x->me % copies);
    }
    l->first[x->shape.experts] = at;
}

/* The image's experts in the first slots of each rank; the redundant slots are empty until the load is known. */
static void open_layer(td_experts *x, td_expert_layer *l, const td_moe *w)
{
    size_t n = (size_t)x->shape.experts, slots = (size_t)x->slots;
    int home = x->home0[x->me];
    l->map = td_xalloc((size_t)x->all * sizeof *l->map), l->place = td_xalloc((size_t)x->all * sizeof *l->place);
    l->first = td_xalloc((n + 1) * sizeof *l->first), l->own = td_xalloc(n * sizeof *l->own);
    l->start = td_xalloc(n * sizeof *l->start);
    l->up = td_xalloc(slots * sizeof *l->up), l->down = td_xalloc(slots * sizeof *l->down);
    l->block = td_xalloc(slots * sizeof *l->block), l->load = td_xalloc(n * sizeof *l->load);
    for (int r = 0; r < x->shape.ranks; r++)
        for (int i = x->slot0[r], e = x->home0[r]; i < x->slot0[r + 1]; i++, e++) l->map[i] = e < x->home0[r + 1] ? e : -1;
    for (int i = 0; i < x->slots; i++) {
        bool here = home + i < x->home0[x->me + 1];
        l->up[i] = w->gate_up[here ? home + i : home], l->down[i] = w->down[here ? home + i : home];
        if (!here) l->up[i].p = l->down[i].p = NULL;
    }
    index_map(x, l);
}

static void close_layer(td_dev *dev, td_experts *x, td_expert_layer *l)
{
    for (int i = 0; l->block && i < x->slots; i++) td_devmem_free(dev, l->block[i]);
    free(l->map), free(l->first), free(l->start), free(l->place), free(l->own), free(l->up), free(l->down), free(l->block), free(l->load);
}

/* ---- opening ---- */

/* Bytes of an expert, by layer. All must be alike to change places. */
static void measure(td_model *m, const td_plan *plan)
{
    td_experts *x = m->experts;
    for (size_t i = 0; i < plan->n; i++) {
        const td_piece *e = &plan->piece[i];
        if (e->read != TD_READ_EXPERT) continue;
        size_t bytes = e->as_stored ? (size_t)e->N * (size_t)e->K * td_dtype_bytes(e->to) : e->bytes;
        for (int k = m->local.layer0; k < m->local.layer1; k++) {
            const td_moe *w = &m->weights.layer[k].moe;
            td_expert_layer *l = &x->layer[k];
            bool up = e->weight >= w->gate_up && e->weight < w->gate_up + experts_of(m);
            bool down = e->weight >= w->down && e->weight < w->down + experts_of(m);
            if (!is_moe(m, k) || (!up && !down)) continue;
            size_t *of = up ? &l->up_bytes : &l->down_bytes;
            const td_weight *first = up ? l->up : l->down;
            x->uneven |= (*of && *of != bytes) || first->dtype != e->to;
            *of = bytes;
        }
    }
}

typedef struct fact { uint64_t up_bytes, down_bytes, up_dtype, down_dtype; } fact;

static td_status compare(td_model *m)
{
    td_experts *x = m->experts;
    fact *mine = td_xalloc((size_t)m->desc.L * sizeof *mine), *first = td_xalloc((size_t)m->desc.L * sizeof *first);
    for (int i = m->local.layer0; i < m->local.layer1; i++) {
        const td_expert_layer *l = &x->layer[i];
        if (l->map) mine[i] = (fact){l->up_bytes, l->down_bytes, (uint64_t)l->up->dtype, (uint64_t)l->down->dtype};
    }
    memcpy(first, mine, (size_t)m->desc.L * sizeof *mine);
    td_status s = td_coll_bcast(m->ranks->stage, first, (size_t)m->desc.L * sizeof *first, 0);
    x->uneven |= memcmp(first, mine, (size_t)m->desc.L * sizeof *mine) != 0;
    free(mine), free(first);
    return s;
}

td_status td_experts_open(td_model *m, const td_plan *plan)
{
    if (!m->ranks || !m->ranks->grid.ep) return TD_OK;
    const td_grid *g = &m->ranks->grid;
    td_experts *x = m->experts = td_xalloc(sizeof *x);
    int n = g->dp * g->cp * g->tp;
    x->slot0 = td_xalloc((size_t)(n + 1) * sizeof *x->slot0), x->home0 = td_xalloc((size_t)(n + 1) * sizeof *x->home0);
    int32_t *own = td_xalloc((size_t)n * sizeof *own);
    for (int r = 0; r < n; r++) {
        td_coord c = {r % g->tp, m->ranks->at.pp, r / g->tp % g->cp, r / (g->tp * g->cp)};
        own[r] = td_grid_local(g, &m->desc, td_grid_rank(g, c)).X;
        x->home0[r + 1] = x->home0[r] + own[r];
    }
    x->all = experts_of(m) + g->redundant;
    x->move_bytes = MOVE_BYTES;
    td_eplb_deal(x->all, n, own, x->slot0);
    free(own);
    x->me = td_coll_rank(m->ranks->stage);
    x->slots = x->slot0[x->me + 1] - x->slot0[x->me];
    x->shape = (td_eplb_shape){.experts = experts_of(m), .ranks = n, .slot0 = x->slot0};
    x->turn = td_xalloc((size_t)x->shape.experts * sizeof *x->turn);
    x->layer = td_xalloc((size_t)m->desc.L * sizeof *x->layer);
    for (int i = m->local.layer0; i < m->local.layer1; i++)
        if (is_moe(m, i)) open_layer(x, &x->layer[i], &m->weights.layer[i].moe);
    measure(m, plan);
    return compare(m);
}

void td_experts_close(td_model *m)
{
    td_experts *x = m->experts;
    if (!x) return;
    for (int i = 0; x->layer && i < m->desc.L; i++) close_layer(m->ops->dev, x, &x->layer[i]);
    free(x->slot0), free(x->home0), free(x->turn), free(x->layer), free(x);
    m->experts = NULL;
}

size_t td_experts_bytes(const td_model *m)
{
    size_t bytes = 0;
    for (int i = 0; m->experts && i < m->desc.L; i++) {
        const td_expert_layer *l = &m->experts->layer[i];
        for (int s = 0; l->block && s < m->experts->slots; s++)
            if (l->block[s]) bytes += aligned(l->up_bytes) + aligned(l->down_bytes);
    }
    return bytes;
}

td_expert_stats td_model_expert_stats(const td_model *m)
{
    return m->experts ? m->experts->stats : (td_expert_stats){0};
}

/* ---- steps ---- */

td_status td_experts_choose(td_model *m, int layer, int32_t *ids, size_t n, int *slots)
{
    td_experts *x = m->experts;
    td_expert_layer *l = &x->layer[layer];
    td_dev *dev = m->ops->dev;
    int32_t *here = dev ? td_xalloc((n + 1) * sizeof *here) : ids; /* on a device: its copy */
    td_status s = dev ? td_devmem_fetch(dev, here, ids, n * sizeof *here) : TD_OK;
    for (int e = 0; e < x->shape.experts; e++) x->turn[e] = l->start[e];
    for (size_t i = 0; i < n && s >= 0; i++) {
        int e = here[i];
        int32_t *turn = &x->turn[e];
        l->load[e]++;
        here[i] = l->place[*turn];
        if (++*turn == l->first[e + 1]) *turn = l->first[e];
    }
    if (dev && s >= 0) s = td_devmem_put(dev, ids, here, n * sizeof *here);
    if (dev) free(here);
    *slots = x->all;
    return s;
}

/* ---- balancing ---- */

static size_t count_words(const td_model *m) { return (size_t)moe_layers(m) * ((size_t)experts_of(m) + 1) + 1; }

/* [layers][experts tokens, rows computed here], whether experts are uneven. */
static void take_counts(const td_model *m, uint64_t *out)
{
    const td_experts *x = m->experts;
    for (int i = m->local.layer0; i < m->local.layer1; i++) {
        const td_expert_layer *l = &x->layer[i];
        if (!l->map) continue;
        memcpy(out, l->load, (size_t)x->shape.experts * sizeof *out);
        out += x->shape.experts;
        *out++ = l->rows;
    }
    *out = x->uneven;
}

/* The heaviest rank's rows against the mean of all; 1 when there were none. */
static double measured(const uint64_t *rows, int ranks, size_t stride)
{
    uint64_t most = 0, all = 0;
    for (int r = 0; r < ranks; r++) {
        uint64_t n = rows[(size_t)r * stride];
        most = TD_MAX(most, n);
        all += n;
    }
    return all ? (double)most * ranks / (double)all : 1;
}

static bool gains(double old, double planned) { return old * 100 > planned * (100 + LEAST_GAIN); }

/* Does the rank have the expert without being sent it? */
static bool has(const td_experts *x, const td_expert_layer *l, int rank, int e)
{
    if (e >= x->home0[rank] && e < x->home0[rank + 1]) return true;
    for (int i = x->slot0[rank]; i < x->slot0[rank + 1]; i++)
        if (l->map[i] == e) return true;
    return false;
}

static int rank_of(const td_experts *x, int slot)
{
    int r = 0;
    while (slot >= x->slot0[r + 1]) r++;
    return r;
}

/* ---- the plan, on the stage's first rank ---- */

typedef struct planning {
    td_model *m;
    const uint64_t *counts;      /* [ranks][words] */
    uint64_t *load;              /* [experts] */
    bool force, uneven;
    size_t budget;               /* bytes that may still move */
    double measured, before, after;
} planning;

/* Bytes that go to other ranks when l gets this map. */
static size_t moving_bytes(const td_experts *x, const td_expert_layer *l, const int32_t *map)
{
    size_t bytes = 0;
    for (int i = 0; i < x->all; i++)
        if (map[i] >= 0 && !has(x, l, rank_of(x, i), map[i])) bytes += l->up_bytes + l->down_bytes;
    return bytes;
}

/* The map of the k-th layer with experts. */
static void plan_layer(planning *p, const td_expert_layer *l, int k, int32_t *map)
{
    td_experts *x = p->m->experts;
    size_t words = count_words(p->m), X = (size_t)x->shape.experts;
    const uint64_t *counts = p->counts + (size_t)k * (X + 1);
    for (size_t e = 0; e < X; e++) {
        p->load[e] = 0;
        for (int r = 0; r < x->shape.ranks; r++) p->load[e] += counts[(size_t)r * words + e];
    }
    double old = td_eplb_balance(&x->shape, p->load, l->map), planned = old;
    if (!p->uneven && (p->force || gains(old, 1))) {
        td_eplb_plan(&x->shape, p->load, map);
        td_eplb_settle(&x->shape, l->map, map);
        planned = td_eplb_balance(&x->shape, p->load, map);
    }
    if (p->uneven || !(p->force || gains(old, planned))) {
        memcpy(map, l->map, (size_t)x->all * sizeof *map);
        planned = old;
    }
    size_t bytes = moving_bytes(x, l, map);
    p->budget -= TD_MIN(bytes, p->budget);
    p->measured += measured(counts + X, x->shape.ranks, words), p->before += old, p->after += planned;
}

/* Counts of all ranks -> for each layer [all slots] of its map, and whether it was planned. From where the last planning
 * stopped, until as many bytes are to move as a pause between two steps may take. */
static void plan_all(td_model *m, const uint64_t *counts, bool force, int32_t *maps)
{
    td_experts *x = m->experts;
    int n = moe_layers(m), done = 0;
    size_t words = count_words(m), stride = (size_t)x->all + 1;
    planning p = {.m = m, .counts = counts, .force = force, .budget = x->move_bytes, .load = td_xalloc((size_t)x->shape.experts * sizeof *p.load)};
    const td_expert_layer **layer = td_xalloc((size_t)n * sizeof *layer);
    for (int i = m->local.layer0, k = 0; i < m->local.layer1; i++)
        if (x->layer[i].map) layer[k++] = &x->layer[i];
    for (int r = 0; r < x->shape.ranks; r++) p.uneven |= counts[(size_t)(r + 1) * words - 1] != 0;
    if (p.uneven) TD_WARN("experts differ in size or type: they stay where they are");
    for (int i = 0; i < n; i++) {
        int k = (x->next + i) % n;
        int32_t *map = maps + (size_t)k * stride;
        map[x->all] = p.budget > 0;
        if (map[x->all]) plan_layer(&p, layer[k], k, map), done++;
        else memcpy(map, layer[k]->map, (size_t)x->all * sizeof *map);
    }
    x->next = (x->next + done) % n;
    x->stats.left = (uint64_t)(n - done);
    x->stats.measured = p.measured / done, x->stats.before = p.before / done, x->stats.after = p.after / done;
    free(p.load), free(layer);
}

/* ---- the moves ---- */

/* What a layer becomes. */
typedef struct change {
    td_model *m;
    td_expert_layer *l;
    const int32_t *map;
    td_weight *up, *down;        /* [slots] */
    uint8_t **block;
    int turn;                    /* sends under way, a ring */
    bool busy[TD_COLL_MAX_PENDING];
} change;

static td_status send_part(change *c, int to, const void *p, size_t bytes)
{
    td_coll *stage = c->m->ranks->data.stage;
    int i = c->turn;
    c->turn = (i + 1) % TD_COLL_MAX_PENDING;
    if (c->busy[i]) TD_TRY(td_coll_send_wait(stage, i));
    c->busy[i] = false;
    TD_TRY(td_coll_send_start(stage, i, to, p, bytes));
    c->busy[i] = true;
    return TD_OK;
}

/* Every rank goes through the same list of moves in the same order, so that whoever waits, waits for one that is on its way. */
static td_status move(change *c)
{
    td_experts *x = c->m->experts;
    td_expert_layer *l = c->l;
    for (int i = 0; i < x->all; i++) {
        int e = c->map[i], to = rank_of(x, i);
        if (e < 0 || has(x, l, to, e)) continue;
        int from = rank_of(x, l->place[l->first[e] + i % (l->first[e + 1] - l->first[e])]), own = l->own[e];
        x->stats.moved++;
        x->stats.bytes += l->up_bytes + l->down_bytes;
        if (from == x->me) {
            TD_TRY(send_part(c, to, l->up[own].p, l->up_bytes));
            TD_TRY(send_part(c, to, l->down[own].p, l->down_bytes));
        }
        if (to != x->me) continue;
        int s = i - x->slot0[x->me];
        void *room;
        TD_TRY(td_devmem_alloc(c->m->ops->dev, aligned(l->up_bytes) + aligned(l->down_bytes), "an expert", &room));
        uint8_t *p = c->block[s] = room;
        c->up[s].p = p, c->down[s].p = p + aligned(l->up_bytes);
        TD_TRY(td_coll_recv(c->m->ranks->data.stage, from, p, l->up_bytes));
        TD_TRY(td_coll_recv(c->m->ranks->data.stage, from, p + aligned(l->up_bytes), l->down_bytes));
    }
    for (int k = 0; k < TD_COLL_MAX_PENDING; k++)
        if (c->busy[k]) TD_TRY(td_coll_send_wait(c->m->ranks->data.stage, k));
    return TD_OK;
}

/* What this rank has already: in a slot, or in the image. */
static void keep(change *c)
{
    td_experts *x = c->m->experts;
    td_expert_layer *l = c->l;
    const td_moe *w = &c->m->weights.layer[l - x->layer].moe;
    for (int s = 0; s < x->slots; s++) {
        int e = c->map[x->slot0[x->me] + s], home = x->home0[x->me];
        c->up[s] = w->gate_up[home], c->down[s] = w->down[home];
        c->up[s].p = c->down[s].p = NULL;
        if (e < 0) continue;
        int old = l->own[e];
        if (old >= 0) {
            c->up[s] = l->up[old], c->down[s] = l->down[old];
            c->block[s] = l->block[old];
        } else if (e >= home && e < x->home0[x->me + 1]) {
            c->up[s] = w->gate_up[e], c->down[s] = w->down[e];
        }
    }
}

/* Blocks of one that the other does not have are freed. */
static void drop(td_dev *dev, const td_experts *x, uint8_t **of, uint8_t **but)
{
    for (int i = 0; i < x->slots; i++) {
        bool kept = false;
        for (int k = 0; k < x->slots; k++) kept |= but[k] == of[i];
        if (!kept) td_devmem_free(dev, of[i]);
    }
    free(of);
}

static td_status change_layer(td_model *m, td_expert_layer *l, const int32_t *map)
{
    td_experts *x = m->experts;
    size_t n = (size_t)x->slots;
    if (!memcmp(l->map, map, (size_t)x->all * sizeof *map)) return TD_OK;
    change c = {.m = m, .l = l, .map = map, .up = td_xalloc(n * sizeof *c.up), .down = td_xalloc(n * sizeof *c.down),
                .block = td_xalloc(n * sizeof *c.block)};
    keep(&c);
    td_status s = move(&c);
    if (s < 0) {
        drop(m->ops->dev, x, c.block, l->block);
        free(c.up), free(c.down);
        return s;
    }
    drop(m->ops->dev, x, l->block, c.block);
    free(l->up), free(l->down);
    l->up = c.up, l->down = c.down, l->block = c.block;
    memcpy(l->map, map, (size_t)x->all * sizeof *map);
    index_map(x, l);
    return TD_OK;
}

/* Maps of all layers, from the stage's first rank. What was counted before a planning counts half in the next one. */
static td_status change_all(td_model *m, const int32_t *maps)
{
    td_experts *x = m->experts;
    for (int i = m->local.layer0; i < m->local.layer1; i++) {
        td_expert_layer *l = &x->layer[i];
        if (!l->map) continue;
        for (int e = 0; maps[x->all] && e < x->shape.experts; e++) l->load[e] /= 2;
        if (maps[x->all]) l->rows = 0;
        TD_TRY(change_layer(m, l, maps));
        maps += x->all + 1;
    }
    return TD_OK;
}

static td_status exchange_counts(td_model *m, bool force, int32_t *maps)
{
    td_experts *x = m->experts;
    size_t words = count_words(m), ranks = (size_t)x->shape.ranks, n_maps = (size_t)moe_layers(m) * ((size_t)x->all + 1);
    size_t *bytes = td_xalloc(2 * ranks * sizeof *bytes), *offset = bytes + ranks;
    uint64_t *mine = td_xalloc(words * sizeof *mine), *all = x->me ? NULL : td_xalloc(ranks * words * sizeof *all);
    take_counts(m, mine);
    for (size_t r = 0; r < ranks; r++) bytes[r] = words * sizeof *mine, offset[r] = r * words * sizeof *mine;
    td_status s = td_coll_gatherv(m->ranks->stage, mine, all, bytes, offset, 0);
    if (s >= 0 && !x->me) plan_all(m, all, force, maps);
    if (s >= 0) s = td_coll_bcast(m->ranks->stage, maps, n_maps * sizeof *maps, 0);
    free(bytes), free(mine), free(all);
    return s;
}

td_status td_model_balance(td_model *m, bool force)
{
    td_experts *x = m->experts;
    if (!x || !moe_layers(m)) return TD_OK;
    int64_t start = td_now_us();
    uint64_t moved = x->stats.moved, bytes = x->stats.bytes;
    int32_t *maps = td_xalloc((size_t)moe_layers(m) * ((size_t)x->all + 1) * sizeof *maps);
    td_status s = exchange_counts(m, force, maps);
    if (s >= 0) s = change_all(m, maps);
    free(maps);
    x->stats.balanced++;
    if (s < 0 || x->me) return s;
    if (x->stats.moved > moved)
        TD_INFO("experts of layers %d to %d: heaviest rank %.2f of the mean (counted %.2f), now %.2f; %llu moved, %.1f MB, %.1f ms",
                m->local.layer0, m->local.layer1 - 1, x->stats.before, x->stats.measured, x->stats.after,
                (unsigned long long)(x->stats.moved - moved), (double)(x->stats.bytes - bytes) / 1e6, (double)(td_now_us() - start) / 1e3);
    else
        TD_DEBUG_LOG("experts of layers %d to %d stay: heaviest rank %.2f of the mean", m->local.layer0, m->local.layer1 - 1,
                     x->stats.measured);
    return TD_OK;
}
