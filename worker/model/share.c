// SPDX-License-Identifier: Apache-2.0
#include "worker/model/share.h"
#include "common/check.h"
#include "worker/devmem.h"
#include "worker/model/quant.h"
#include <stdlib.h>
#include <string.h>

td_status td_share_room(td_model *m, int i, size_t n, float **out)
{
    td_buffer *b = &m->wire[i];
    td_dev *dev = m->ops->dev;
    if (!b->p || b->cap < n) { /* never NULL, which memcpy does not take for no bytes either */
        void *p;
        if (dev && b->p) TD_TRY(dev->sync(dev, TD_STREAM_COMPUTE));
        td_devmem_free(dev, b->p);
        *b = (td_buffer){0};
        TD_TRY(td_devmem_alloc(dev, n * sizeof *b->p, "what ranks exchange", &p));
        b->p = p;
        b->cap = n;
    }
    *out = b->p;
    return TD_OK;
}

void td_share_pack(td_model *m, const float *from, size_t ld, int T, int width, float *to)
{
    if (T > 0) m->ops->take_rows(m->pool, from, ld, m->share.in_order, T, width, to, (size_t)width);
}

void td_share_unpack(td_model *m, const float *from, int T, int width, float *to, size_t ld)
{
    if (T > 0 && width > 0) m->ops->take_rows(m->pool, from, (size_t)width, m->share.in_order, T, width, to, ld);
}

/* ---- rows ---- */

/* Rows of sums that are exchanged together, each rank giving all parts to all: more are cut. */
static size_t sum_rows(const td_model *m)
{
    enum { SUM_FLOATS = 1 << 20, LEAST_ROWS = 3 };
    return m->least_workspace ? (size_t)LEAST_ROWS
                              : (size_t)TD_MAX(TD_MAX(m->block_rows, SUM_FLOATS / m->desc.E), 1);
}

/* Room for the largest sum: all rows of a block from every rank, or all of a few rows. */
static td_status open_sums(td_model *m)
{
    size_t T = (size_t)m->max_rows, E = (size_t)m->desc.E, tp = (size_t)td_model_tp(m),
           k = (size_t)TD_MAX(m->desc.moe.route.top_k, 1);
    size_t few = TD_MIN(T * k, sum_rows(m)), all = TD_MAX(tp * few, T + tp),
           row = td_quant_row_bytes(m->desc.E) / sizeof(float);
    float *p;
    TD_TRY(td_share_room(m, 0, all * E, &p));
    TD_TRY(td_share_room(m, 1, TD_MAX((T / tp + 1) * E, m->quantized ? TD_MAX(T, few) * row : 0), &p));
    return m->quantized ? td_share_room(m, 2, all * row, &p) : TD_OK;
}

static td_status open_order(td_model *m)
{
    td_share *s = &m->share;
    size_t bytes = (size_t)m->max_rows * sizeof *s->in_order;
    void *p;
    for (int t = 0; t < m->max_rows; t++) s->local_ids[t] = t;
    TD_TRY(td_devmem_alloc(m->ops->dev, bytes, "the order of rows", &p));
    s->in_order = p;
    return td_devmem_put(m->ops->dev, s->in_order, s->local_ids, bytes);
}

td_status td_share_open(td_model *m)
{
    td_share *s = &m->share;
    size_t T = (size_t)m->max_rows, G = (size_t)m->desc.n_groups;
    s->rank_row0 = td_xalloc(((size_t)td_model_cp(m) + 1) * sizeof *s->rank_row0);
    s->row = td_xalloc(T * sizeof *s->row);
    s->ids = td_xalloc(T * sizeof *s->ids);
    s->pos = td_xalloc(T * sizeof *s->pos);
    s->local_ids = td_xalloc(T * sizeof *s->local_ids);
    s->want = td_xalloc(T * sizeof *s->want);
    s->place = td_xalloc(T * sizeof *s->place);
    s->page = td_xalloc(G * T * sizeof *s->page);
    s->in_page = td_xalloc(G * T * sizeof *s->in_page);
    s->seq = td_xalloc(G * T * sizeof *s->seq);
    s->of_seq = td_xalloc(T * sizeof *s->of_seq);
    if (td_model_tp(m) > 1) TD_TRY(open_sums(m));
    return td_model_cp(m) > 1 || m->local.shards > 1 ? open_order(m) : TD_OK;
}

void td_share_close(td_model *m)
{
    td_share *s = &m->share;
    free(s->rank_row0), free(s->row), free(s->ids), free(s->pos), free(s->local_ids), free(s->want),
        free(s->place), free(s->page), free(s->in_page), free(s->seq), free(s->of_seq);
    td_devmem_free(m->ops->dev, s->in_order);
    for (size_t i = 0; i < TD_COUNT(m->wire); i++) td_devmem_free(m->ops->dev, m->wire[i].p);
}

/* Rows [first, first + n) of sequence q come next in shared order. */
static void add_piece(td_model *m, const td_step *step, const td_kv *kv, const td_step_seq *q, int first,
                      int n)
{
    td_share *s = &m->share;
    if (n <= 0) return;
    for (int g = 0; g < m->desc.n_groups; g++) {
        const int32_t *pages = td_step_pages(step, q, g);
        size_t base = (size_t)g * (size_t)m->max_rows;
        uint32_t P = (uint32_t)kv[g].P, me = m->ranks ? (uint32_t)m->ranks->at.cp : 0;
        s->seq[base + (size_t)s->n_seqs] = (td_attn_seq){s->T, n, (int)q->pos0 + first, pages};
        for (int i = 0; i < n; i++) {
            uint32_t pos = q->pos0 + (uint32_t)(first + i), at = td_kvmap_local(m->kvmap, pos);
            bool here = td_kvmap_owner(m->kvmap, pos) == me;
            s->page[base + (size_t)(s->T + i)] = here ? pages[at / P] : -1;
            s->in_page[base + (size_t)(s->T + i)] = (int32_t)(at % P);
        }
    }
    for (int i = 0; i < n; i++) {
        int row = (int)q->row0 + first + i;
        s->row[s->T + i] = row;
        s->ids[s->T + i] = td_step_ids(step)[row];
        s->pos[s->T + i] = td_step_pos(step)[row];
    }
    s->of_seq[s->n_seqs] = (int32_t)(q - td_step_seqs(step));
    s->T += n;
    s->n_seqs++;
}

static void add_rank(td_model *m, const td_step *step, const td_kv *kv, int c, int R)
{
    const td_step_seq *q = td_step_seqs(step);
    for (int i = 0; i < (int)step->n_seqs; i++, q++) {
        int n = (int)q->n_rows;
        if (R == 1) {
            add_piece(m, step, kv, q, 0, n);
        } else if (n < 2 * R) { /* row by row, in turn */
            for (int k = 0; k < n; k++)
                if ((i + k) % R == c) add_piece(m, step, kv, q, k, 1);
        } else {
            int pieces[2] = {c, 2 * R - 1 - c};
            for (int k = 0; k < 2; k++) {
                int a, b;
                td_grid_rows(n, 2 * R, pieces[k], &a, &b);
                add_piece(m, step, kv, q, a, b - a);
            }
        }
    }
}

/* Which of the step's rows of logits a row is; -1: none. */
static int wanted(const td_step *step, int row)
{
    const int32_t *w = td_step_logit_rows(step);
    int lo = 0, hi = (int)step->n_logits;
    while (lo < hi) {
        int mid = (lo + hi) / 2;
        if (w[mid] < row)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo < (int)step->n_logits && w[lo] == row ? lo : -1;
}

void td_share_rows(td_model *m, const td_step *step, const td_kv *kv)
{
    td_share *s = &m->share;
    int R = td_model_cp(m), me = m->ranks ? m->ranks->at.cp : 0;
    s->T = s->n_seqs = s->n_want = 0;
    for (int c = 0; c < R; c++) {
        if (c == me) s->own_seq0 = s->n_seqs;
        s->rank_row0[c] = s->T;
        add_rank(m, step, kv, c, R);
        if (c == me) s->n_own_seqs = s->n_seqs - s->own_seq0;
    }
    s->rank_row0[R] = s->T;
    s->own0 = s->rank_row0[me];
    s->n_own = s->rank_row0[me + 1] - s->own0;
    for (int i = 0; i < s->n_own; i++)
        if (wanted(step, s->row[s->own0 + i]) >= 0) s->want[s->n_want++] = i;
    m->blocks = td_model_tp(m) > 1 && (m->ranks->grid.ep || s->n_own >= m->block_rows);
}

void td_share_local_ids(td_model *m)
{
    td_share *s = &m->share;
    for (int i = 0; i < s->n_own; i++) s->local_ids[i] = s->ids[s->own0 + i] - m->local.v0;
}

/* ---- tensor parallel ---- */

/* Bytes and offsets of the ranks' blocks of T rows of `row` bytes. */
static void block_table(const td_model *m, int T, size_t row, size_t *bytes, size_t *offset)
{
    for (int i = 0; i < td_model_tp(m); i++) {
        int a, b;
        td_grid_rows(T, td_model_tp(m), i, &a, &b);
        bytes[i] = (size_t)(b - a) * row;
        offset[i] = (size_t)a * row;
    }
}

/* Parts [T, E] of all TP ranks -> [tp][rows][E]: all rows, or this rank's block. */
static td_status gather_parts(td_model *m, const float *part, int T, bool blocks, float **all, int *rows)
{
    size_t E = (size_t)m->desc.E, tp = (size_t)td_model_tp(m);
    if (!blocks) {
        *rows = T;
        TD_TRY(td_share_room(m, 0, tp * (size_t)T * E, all));
        return td_coll_all_gather(m->ranks->data.tp, part, *all, (size_t)T * E * sizeof(float));
    }
    size_t send[TD_MAX_RANKS], from[TD_MAX_RANKS], recv[TD_MAX_RANKS], to[TD_MAX_RANKS];
    int a, b;
    td_model_block(m, T, &a, &b);
    *rows = b - a;
    block_table(m, T, E * sizeof *part, send, from);
    for (size_t i = 0; i < tp; i++) {
        recv[i] = (size_t)*rows * E * sizeof(float);
        to[i] = i * recv[i];
    }
    TD_TRY(td_share_room(m, 0, tp * (size_t)*rows * E, all));
    return td_coll_all_to_allv(m->ranks->data.tp, part, send, from, *all, recv, to);
}

/* As gather_parts, with all parts as integers on the way, this rank's too: so that all ranks add the same. */
static td_status gather_quantized(td_model *m, const float *part, int T, bool blocks, float **all, int *rows)
{
    size_t E = (size_t)m->desc.E, tp = (size_t)td_model_tp(m), row = td_quant_row_bytes(m->desc.E);
    size_t send[TD_MAX_RANKS], from[TD_MAX_RANKS], recv[TD_MAX_RANKS], to[TD_MAX_RANKS];
    int a = 0, b = T;
    if (blocks) td_model_block(m, T, &a, &b);
    *rows = b - a;
    float *mine, *got;
    TD_TRY(td_share_room(m, 1, (size_t)T * row / sizeof(float), &mine));
    TD_TRY(td_share_room(m, 2, tp * (size_t)*rows * row / sizeof(float), &got));
    td_quant_rows(m->pool, part, T, m->desc.E, mine);
    if (blocks) block_table(m, T, row, send, from);
    for (size_t i = 0; i < tp; i++) {
        recv[i] = (size_t)*rows * row;
        to[i] = i * recv[i];
    }
    if (blocks)
        TD_TRY(td_coll_all_to_allv(m->ranks->tp, mine, send, from, got, recv, to));
    else
        TD_TRY(td_coll_all_gather(m->ranks->tp, mine, got, (size_t)T * row));
    TD_TRY(td_share_room(m, 0, tp * (size_t)*rows * E, all));
    td_dequant_rows(m->pool, got, (int)tp * *rows, m->desc.E, *all);
    return TD_OK;
}

td_status td_share_sum(td_model *m, const float *part, int T, const float *bias, float *y, bool blocks,
                       bool add)
{
    size_t E = (size_t)m->desc.E;
    int n = blocks ? T : (int)TD_MIN((size_t)T, sum_rows(m)), rows;
    for (int t = 0; t < T; t += n) {
        float *all;
        n = TD_MIN(n, T - t);
        TD_TRY((m->quantized ? gather_quantized : gather_parts)(m, part + (size_t)t * E, n, blocks, &all,
                                                                &rows));
        m->ops->sum_tree(m->pool, all, (size_t)rows * E, td_model_tp(m), rows, m->desc.E, E, bias,
                         y + (size_t)t * E, E, add);
    }
    return TD_OK;
}

td_status td_share_gather(td_model *m, const void *block, int T, size_t row, void *out)
{
    size_t bytes[TD_MAX_RANKS], offset[TD_MAX_RANKS];
    block_table(m, T, row, bytes, offset);
    return td_coll_all_gatherv(m->ranks->data.tp, block, out, bytes, offset);
}

/* First vocabulary row of TP rank i. */
static int vocab0(const td_model *m, int i)
{
    td_coord c = m->ranks->at;
    c.tp = i;
    return td_grid_local(&m->ranks->grid, &m->desc, td_grid_rank(&m->ranks->grid, c)).v0;
}

/* Rows [t, t + n) of the ids' embeddings, from the ranks whose part of the vocabulary has them. */
static td_status embed_rows(td_model *m, const float *part, const int32_t *ids, int n, float *x, bool blocks)
{
    size_t E = (size_t)m->desc.E;
    float *all;
    const void *pick;
    int rows, a = 0, b = n, first[TD_MAX_RANKS + 1], tp = td_model_tp(m);
    TD_TRY(gather_parts(m, part, n, blocks, &all, &rows));
    if (blocks) td_model_block(m, n, &a, &b);
    for (int i = 0; i < tp; i++) first[i] = vocab0(m, i);
    first[tp] = m->desc.V;
    for (int t = a; t < b; t++) {
        int owner = 0;
        while (ids[t] >= first[owner + 1]) owner++;
        m->share.local_ids[t - a] = owner * rows + t - a;
    }
    TD_TRY(td_place_put(m, m->share.local_ids, (size_t)(b - a) * sizeof *ids, &pick));
    if (b > a) m->ops->take_rows(m->pool, all, E, pick, b - a, m->desc.E, x, E);
    return TD_OK;
}

td_status td_share_embed(td_model *m, const float *part, const int32_t *ids, int T, float *x, bool blocks)
{
    size_t E = (size_t)m->desc.E;
    int n = blocks ? T : (int)TD_MIN((size_t)T, sum_rows(m));
    for (int t = 0; t < T; t += n) {
        n = TD_MIN(n, T - t);
        TD_TRY(embed_rows(m, part + (size_t)t * E, ids + t, n, x + (size_t)t * E, blocks));
    }
    return TD_OK;
}

/* ---- whole rows of logits: for tools, in this host's memory ---- */

/* [T, V_i] of each TP rank -> [T, V]. */
static td_status join_vocabulary(td_model *m, const float *part, int T, float *out)
{
    int tp = td_model_tp(m);
    size_t V = (size_t)m->desc.V, bytes[TD_MAX_RANKS], offset[TD_MAX_RANKS], at = 0;
    int first[TD_MAX_RANKS + 1];
    for (int i = 0; i < tp; i++) first[i] = vocab0(m, i);
    first[tp] = m->desc.V;
    for (int i = 0; i < tp; i++) {
        bytes[i] = (size_t)T * (size_t)(first[i + 1] - first[i]) * sizeof(float);
        offset[i] = at;
        at += bytes[i];
    }
    float *all = td_xalloc(((size_t)T * V + 1) * sizeof *all);
    td_status st = td_coll_all_gatherv(m->ranks->tp, part, all, bytes, offset);
    for (int i = 0; i < tp && st >= 0; i++) {
        size_t n = (size_t)(first[i + 1] - first[i]);
        const float *from = all + offset[i] / sizeof(float);
        for (int t = 0; t < T; t++)
            memcpy(out + (size_t)t * V + first[i], from + (size_t)t * n, n * sizeof *out);
    }
    free(all);
    return st;
}

/* Rows of all CP ranks, each in its own order, to the order of the step. */
static td_status join_rows(td_model *m, const td_step *step, const float *own, float *logits)
{
    const td_logit_place *place = m->share.place;
    size_t V = (size_t)m->desc.V, bytes[TD_MAX_RANKS] = {0}, offset[TD_MAX_RANKS], at = 0;
    for (uint32_t k = 0; k < step->n_logits; k++) bytes[place[k].cp] += V * sizeof(float);
    for (int c = 0; c < td_model_cp(m); c++) {
        offset[c] = at;
        at += bytes[c];
    }
    float *all = td_xalloc(((size_t)step->n_logits * V + 1) * sizeof *all);
    td_status st = td_coll_all_gatherv(m->ranks->cp, own, all, bytes, offset);
    for (uint32_t k = 0; k < step->n_logits && st >= 0; k++)
        memcpy(logits + k * V, all + offset[place[k].cp] / sizeof(float) + (size_t)place[k].row * V,
               V * sizeof *logits);
    free(all);
    return st;
}

void td_share_places(td_model *m, const td_step *step)
{
    td_share *s = &m->share;
    for (int c = 0; c < td_model_cp(m); c++) {
        int32_t n = 0;
        for (int i = s->rank_row0[c]; i < s->rank_row0[c + 1]; i++) {
            int k = wanted(step, s->row[i]);
            if (k >= 0) s->place[k] = (td_logit_place){c, n++};
        }
    }
}

/* part: in this host's memory. */
static td_status join_logits(td_model *m, const td_step *step, const float *part, float *logits)
{
    int T = m->share.n_want;
    if (td_model_cp(m) == 1) return join_vocabulary(m, part, T, logits);
    if (td_model_tp(m) == 1) return join_rows(m, step, part, logits);
    float *own = td_xalloc(((size_t)T * (size_t)m->desc.V + 1) * sizeof *own);
    td_status st = join_vocabulary(m, part, T, own);
    if (st >= 0) st = join_rows(m, step, own, logits);
    free(own);
    return st;
}

td_status td_share_logits(td_model *m, const td_step *step, const float *part, float *logits)
{
    size_t bytes = (size_t)m->share.n_want * (size_t)m->local.V * sizeof *part;
    td_dev *dev = m->ops->dev;
    if (td_model_cp(m) == 1 && td_model_tp(m) == 1) return td_devmem_fetch(dev, logits, part, bytes);
    if (!dev) return join_logits(m, step, part, logits);
    float *mine = td_xalloc(bytes + 1);
    td_status st = td_devmem_fetch(dev, mine, part, bytes);
    if (st >= 0) st = join_logits(m, step, mine, logits);
    free(mine);
    return st;
}
