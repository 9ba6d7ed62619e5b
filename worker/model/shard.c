// SPDX-License-Identifier: Apache-2.0
/* worker/model/shard.c - layers put together from their parts, and the vocabulary's ends of the model. */
#include "worker/model/shard.h"
#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include "worker/devmem.h"
#include "worker/model/share.h"
#include <stdlib.h>
#include <string.h>

/* Of what lies where the kernels work; of numbers of this host. */
static td_coll *group(const td_model *m) { return m->ranks->data.shard; }
static td_coll *host_group(const td_model *m) { return m->ranks->shard; }
/* This rank's parts of all units. */
static const uint8_t *image(const td_model *m) { return m->ops->dev ? m->device_image : m->image.data; }
static size_t part_bytes(const td_model *m, int layer) { return m->shard.unit[layer].bytes / (size_t)m->local.shards; }

/* ---- layers ---- */

static td_status start(td_model *m, int layer, int buffer)
{
    td_shard *s = &m->shard;
    s->layer[buffer] = layer;
    s->pending[buffer] = true;
    return td_coll_all_gather_start(group(m), buffer, image(m) + s->unit[layer].part, s->buffer[buffer], part_bytes(m, layer));
}

static td_status finish(td_model *m, int buffer)
{
    td_shard *s = &m->shard;
    if (!s->pending[buffer]) return TD_OK;
    s->pending[buffer] = false;
    return td_coll_all_gather_wait(group(m), buffer);
}

/* The layer's pointers into the bytes at p. */
static void point(td_model *m, int layer, const uint8_t *p)
{
    const td_shard *s = &m->shard;
    for (size_t i = s->fix0[layer]; i < s->fix0[layer + 1]; i++) *s->fix[i].to = p + s->fix[i].offset;
}

const td_layer *td_layer_acquire(td_model *m, int layer)
{
    td_shard *s = &m->shard;
    if (!s->unit) return &m->weights.layer[layer];
    int b = s->layer[0] == layer && s->pending[0] ? 0 : s->layer[1] == layer && s->pending[1] ? 1 : -1;
    if (b < 0) { /* the first step of all */
        b = 0;
        if (start(m, layer, b) < 0) return NULL;
    }
    /* Where the cores that compute also copy, bytes of the gather came in whatever waited for something else: that hid nothing. */
    int64_t before = td_now_us(), elsewhere = td_coll_started_us(group(m)) - s->copied_us;
    if (finish(m, b) < 0) return NULL;
    s->stats.waited_us += td_now_us() - before + elsewhere;
    s->copied_us = td_coll_started_us(group(m));
    s->stats.gathers++;
    s->stats.bytes += s->unit[layer].bytes;
    int next = layer + 1 < m->local.layer1 ? layer + 1 : m->local.layer0;
    if (start(m, next, 1 - b) < 0) return NULL;
    point(m, layer, s->buffer[b]);
    return &m->weights.layer[layer];
}

void td_layer_release(td_model *m, int layer)
{
    if (m->shard.unit) m->shard.layer[m->shard.layer[0] == layer && !m->shard.pending[0] ? 0 : 1] = -1;
}

/* ---- opening ---- */

static const void **address_of(const td_piece *e)
{
    switch (e->kind) {
    case TD_PIECE_VECTOR: return (const void **)(uintptr_t)e->vector;
    case TD_PIECE_TABLE: return &e->table->p;
    case TD_PIECE_MATRIX: break;
    }
    return &e->weight->p;
}

static void list_pointers(td_shard *s, const td_plan *plan)
{
    size_t n = 0;
    s->fix = td_xalloc((plan->n + 1) * sizeof *s->fix);
    for (int l = 0; l < plan->desc->L; l++) {
        s->fix0[l] = n;
        for (size_t i = 0; i < plan->n; i++)
            if (plan->piece[i].unit == l) s->fix[n++] = (td_fix){address_of(&plan->piece[i]), plan->piece[i].offset};
    }
    s->fix0[plan->desc->L] = n;
}

/* Rows that a rank gives to one exchange, and room for those of all: the same on every rank of the group. */
static td_status open_rows(td_model *m)
{
    enum { FLOATS = 1 << 24, LEAST_ROWS = 3 };
    td_shard *s = &m->shard;
    size_t n = (size_t)m->local.shards, E = (size_t)m->desc.E, V = (size_t)m->local.V, own = (size_t)m->local.shard_V;
    size_t embed = m->least_workspace ? LEAST_ROWS : TD_MAX(FLOATS / (n * E), 1),
           head = m->least_workspace ? LEAST_ROWS : TD_MAX(FLOATS / TD_MAX(n * E, V), 1);
    embed = TD_MIN(embed, (size_t)m->max_rows), head = TD_MIN(head, (size_t)m->max_logits);
    s->rows[0] = (int)embed, s->rows[1] = (int)head;
    float *p;
    TD_TRY(td_share_room(m, 0, n * head * E + 1, &p));
    TD_TRY(td_share_room(m, 1, n * TD_MAX(embed * E, head * own) + 1, &p));
    return td_share_room(m, 2, TD_MAX(embed * E, head * V) + 1, &p);
}

/* What a gather takes when nothing else is done: against it the time spent waiting is held. */
static td_status measure(td_model *m)
{
    enum { TRIES = 3 };
    td_shard *s = &m->shard;
    int layer = m->local.layer0;
    int64_t best = INT64_MAX;
    for (int i = 0; i < TRIES; i++) {
        TD_TRY(td_coll_barrier(group(m)));
        int64_t before = td_now_us();
        TD_TRY(start(m, layer, 0));
        TD_TRY(finish(m, 0));
        best = TD_MIN(best, td_now_us() - before);
    }
    s->layer[0] = -1;
    s->copied_us = td_coll_started_us(group(m));
    s->us_per_byte = (double)TD_MAX(best, 1) / (double)TD_MAX(s->unit[layer].bytes, (size_t)1);
    return TD_OK;
}

td_status td_shard_open(td_model *m, const td_plan *plan)
{
    td_shard *s = &m->shard;
    int n = m->local.shards;
    if (n == 1) return TD_OK;
    s->unit = td_xalloc(TD_MAX_LAYERS * sizeof *s->unit);
    memcpy(s->unit, plan->unit, TD_MAX_LAYERS * sizeof *s->unit);
    list_pointers(s, plan);
    for (int i = 0; i < m->desc.L; i++) s->buffer_bytes = TD_MAX(s->buffer_bytes, s->unit[i].bytes);
    for (int i = 0; i < 2; i++) {
        s->layer[i] = -1;
        void *p;
        TD_TRY(td_devmem_alloc(m->ops->dev, TD_MAX(s->buffer_bytes, (size_t)64), "a layer that is put together", &p));
        s->buffer[i] = p;
    }
    s->all_ids = td_xalloc((size_t)n * (size_t)m->max_rows * sizeof *s->all_ids);
    s->pick = td_xalloc(td_shard_numbers(m) * sizeof *s->pick);
    s->table = td_xalloc(4 * (size_t)n * sizeof *s->table);
    s->counts = td_xalloc(2 * (size_t)n * sizeof *s->counts);
    s->v0 = td_xalloc(((size_t)n + 1) * sizeof *s->v0);
    td_grid g = m->ranks->grid;
    for (int i = 0; i < n; i++) {
        td_coord c = {m->ranks->at.tp, m->ranks->at.pp, i % g.cp, i / g.cp};
        s->v0[i] = td_grid_local(&g, &m->desc, td_grid_rank(&g, c)).shard_v0;
    }
    s->v0[n] = m->local.v0 + m->local.V;
    TD_TRY(open_rows(m));
    return measure(m);
}

void td_shard_close(td_model *m)
{
    td_shard *s = &m->shard;
    for (int i = 0; i < 2; i++) {
        if (s->unit) (void)finish(m, i); /* every rank has started it */
        td_devmem_free(m->ops->dev, s->buffer[i]);
    }
    if (s->stats.gathers && !m->ranks->grid.rank && !m->ops->dev) /* a device's queue waits, not this thread */
        TD_INFO("fully sharded: %llu layers of %.1f MB gathered, %.0f %% of it beside other work", (unsigned long long)s->stats.gathers,
                (double)s->stats.bytes / (double)s->stats.gathers / 1e6, 100 * td_model_shard_overlap(m));
    free(s->unit), free(s->fix), free(s->table), free(s->counts), free(s->v0), free(s->all_ids), free(s->pick);
}

td_shard_stats td_model_shard_stats(const td_model *m)
{
    td_shard_stats s = m->shard.stats;
    s.alone_us = (int64_t)((double)s.bytes * m->shard.us_per_byte);
    return s;
}

double td_model_shard_overlap(const td_model *m)
{
    td_shard_stats s = td_model_shard_stats(m);
    return s.alone_us > 0 ? TD_MAX(0.0, 1 - (double)s.waited_us / (double)s.alone_us) : 0;
}

/* ---- the ends of the model ---- */

/* Per rank of the group: bytes it sends, where from, bytes it gets, where to. */
static size_t *column(const td_model *m, int i) { return m->shard.table + (size_t)i * (size_t)m->local.shards; }
static int rows_of_step(const td_model *m, int rank, int what) { return m->shard.counts[2 * rank + what]; }
/* Of the exchange at hand: the step's [at, at + rows) of each rank. */
static int rows_of(const td_model *m, int rank, int what)
{
    return TD_MAX(TD_MIN(rows_of_step(m, rank, what) - m->shard.at, m->shard.rows[what]), 0);
}

static size_t rows_of_all(const td_model *m, int what)
{
    size_t n = 0;
    for (int r = 0; r < m->local.shards; r++) n += (size_t)rows_of(m, r, what);
    return n;
}

/* Exchanges until every rank's rows are through. */
static bool more_rows(const td_model *m, int what)
{
    for (int r = 0; r < m->local.shards; r++)
        if (rows_of_step(m, r, what) > m->shard.at) return true;
    return false;
}

td_status td_shard_begin(td_model *m, int n_embed, int n_head)
{
    int32_t mine[2] = {n_embed, n_head};
    if (!m->shard.unit) return TD_OK;
    m->shard.at = 0;
    return td_coll_all_gather(host_group(m), mine, m->shard.counts, sizeof mine);
}

bool td_shard_wants(const td_model *m)
{
    return m->shard.unit && more_rows(m, 1);
}

/* Blocks of `width` bytes a row of all ranks, one after the other. */
static void row_blocks(const td_model *m, int what, size_t width, size_t *bytes, size_t *offset)
{
    size_t at = 0;
    for (int r = 0; r < m->local.shards; r++) {
        bytes[r] = (size_t)rows_of(m, r, what) * width;
        offset[r] = at;
        at += bytes[r];
    }
}

static int owner_of(const td_model *m, int32_t id)
{
    int r = 0;
    if (id < m->local.v0 || id >= m->local.v0 + m->local.V) return -1; /* another TP rank's */
    while (id >= m->shard.v0[r + 1]) r++;
    return r;
}

size_t td_shard_numbers(const td_model *m)
{
    return m->local.shards > 1 ? (size_t)m->local.shards * (size_t)m->max_rows : 0;
}

/* ids: of this host. */
static td_status embed_own(td_model *m, const int32_t *ids, int n, float *out)
{
    const void *there;
    TD_TRY(td_place_put(m, ids, (size_t)n * sizeof *ids, &there));
    if (m->weights.table.p) m->ops->embed_table(m->pool, &m->weights.table, there, n, out, (size_t)m->desc.E);
    else m->ops->embed_packed(m->pool, &m->weights.head, there, n, out, (size_t)m->desc.E);
    return TD_OK;
}

/* out [T, E] from the rows that came, each rank's in the order of the ids; zeros where another TP rank has the id. */
static td_status put_rows(td_model *m, const int32_t *ids, int T, const size_t *recv, const float *got, float *out)
{
    int32_t next[TD_MAX_RANKS], *pick = m->shard.pick;
    size_t E = (size_t)m->desc.E, row = E * sizeof *got, n = 0;
    const void *there;
    for (int r = 0; r < m->local.shards; r++) {
        next[r] = (int32_t)n;
        n += recv[r] / row;
    }
    for (int t = 0; t < T; t++) {
        int r = owner_of(m, ids[t]);
        pick[t] = r < 0 ? -1 : next[r]++;
    }
    td_table rows = {(int)n, m->desc.E, TD_F32, got};
    TD_TRY(td_place_put(m, pick, (size_t)T * sizeof *pick, &there));
    if (T > 0) m->ops->embed_table(m->pool, &rows, there, T, out, E);
    return TD_OK;
}

static td_status embed_rows(td_model *m, const int32_t *ids, int T, float *out)
{
    size_t E = (size_t)m->desc.E, row = E * sizeof(float);
    size_t *send = column(m, 0), *from = column(m, 1), *recv = column(m, 2), *to = column(m, 3);
    int n = m->local.shards, me = m->local.shard, n_own = 0;
    int32_t *all = m->shard.all_ids, *own = m->shard.pick;
    float *rows, *got;
    row_blocks(m, 0, sizeof *ids, recv, to);
    TD_TRY(td_coll_all_gatherv(host_group(m), ids, all, recv, to));
    const int32_t *id = all;
    for (int r = 0; r < n; r++) {
        from[r] = (size_t)n_own * row;
        for (int t = 0; t < rows_of(m, r, 0); t++, id++)
            if (owner_of(m, *id) == me) own[n_own++] = *id - m->local.shard_v0;
        send[r] = (size_t)n_own * row - from[r];
        recv[r] = 0;
    }
    for (int t = 0; t < T; t++)
        if (owner_of(m, ids[t]) >= 0) recv[owner_of(m, ids[t])] += row;
    for (int r = 0; r < n; r++) to[r] = r ? to[r - 1] + recv[r - 1] : 0;
    TD_TRY(td_share_room(m, 1, (size_t)n_own * E + 1, &rows));
    TD_TRY(td_share_room(m, 2, (size_t)T * E + 1, &got));
    TD_TRY(embed_own(m, own, n_own, rows));
    TD_TRY(td_coll_all_to_allv(group(m), rows, send, from, got, recv, to));
    return put_rows(m, ids, T, recv, got, out);
}

td_status td_shard_embed(td_model *m, const int32_t *ids, int T, float *out)
{
    td_shard *s = &m->shard;
    td_status st = TD_OK;
    for (s->at = 0; st >= 0 && more_rows(m, 0); s->at += s->rows[0]) {
        int t = TD_MIN(s->at, T);
        st = embed_rows(m, ids + t, TD_MIN(T - t, s->rows[0]), out + (size_t)t * (size_t)m->desc.E);
    }
    s->at = 0;
    return st;
}

static td_status head_rows(td_model *m, const float *h, int T, float *out)
{
    size_t rows = rows_of_all(m, 1), E = (size_t)m->desc.E, V = (size_t)m->local.V, own = (size_t)m->local.shard_V;
    size_t *send = column(m, 0), *from = column(m, 1), *recv = column(m, 2), *to = column(m, 3);
    float *all, *part, *got;
    TD_TRY(td_share_room(m, 0, rows * E + 1, &all));
    TD_TRY(td_share_room(m, 1, rows * own + 1, &part));
    TD_TRY(td_share_room(m, 2, (size_t)T * V + 1, &got));
    row_blocks(m, 1, E * sizeof(float), recv, to);
    TD_TRY(td_coll_all_gatherv(group(m), h, all, recv, to));
    for (size_t r = 0; r < rows && own; r += (size_t)m->max_rows) /* as many as the kernels' scratch is for */
        m->ops->linear(m->pool, m->scratch.ops, &m->weights.head, all + r * E, E, (int)TD_MIN(rows - r, (size_t)m->max_rows),
                       part + r * own, own, false);
    row_blocks(m, 1, own * sizeof(float), send, from);
    for (int r = 0, at = 0; r < m->local.shards; r++) {
        int columns = m->shard.v0[r + 1] - m->shard.v0[r];
        to[r] = (size_t)T * (size_t)at * sizeof(float);
        recv[r] = (size_t)T * (size_t)columns * sizeof(float);
        at += columns;
    }
    TD_TRY(td_coll_all_to_allv(group(m), part, send, from, got, recv, to));
    for (int r = 0; r < m->local.shards; r++) {
        size_t columns = (size_t)(m->shard.v0[r + 1] - m->shard.v0[r]);
        const float *block = got + to[r] / sizeof(float);
        float *at = out + m->shard.v0[r] - m->local.v0;
        td_share_unpack(m, block, T, (int)columns, at, V);
    }
    return TD_OK;
}

td_status td_shard_head(td_model *m, const float *h, int T, float *out)
{
    td_shard *s = &m->shard;
    td_status st = TD_OK;
    for (s->at = 0; st >= 0 && more_rows(m, 1); s->at += s->rows[1]) {
        int t = TD_MIN(s->at, T);
        st = head_rows(m, h + (size_t)t * (size_t)m->desc.E, TD_MIN(T - t, s->rows[1]),
                       out + (size_t)t * (size_t)m->local.V);
    }
    s->at = 0;
    return st;
}
