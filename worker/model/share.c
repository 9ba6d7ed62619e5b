// SPDX-License-Identifier: Apache-2.0
#include "worker/model/share.h"
#include "common/check.h"
#include "worker/devmem.h"
#include "worker/model/quant.h"
#include <stdlib.h>
#include <string.h>

float *td_share_room(td_buffer *b, size_t n)
{
    if (!b->p || b->cap < n) { /* never NULL, which memcpy does not take for no bytes either */
        free(b->p);
        b->cap = n;
        b->p = aligned_alloc(64, (n * sizeof *b->p + 64) / 64 * 64);
        TD_CHECK(b->p);
    }
    return b->p;
}

/* ---- rows ---- */

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
    return TD_OK;
}

void td_share_close(td_model *m)
{
    td_share *s = &m->share;
    free(s->rank_row0), free(s->row), free(s->ids), free(s->pos), free(s->local_ids), free(s->want), free(s->place), free(s->page), free(s->in_page), free(s->seq);
    for (size_t i = 0; i < TD_COUNT(m->wire); i++) free(m->wire[i].p);
}

/* Rows [first, first + n) of sequence q come next in shared order. */
static void add_piece(td_model *m, const td_step *step, const td_kv *kv, const td_step_seq *q, int first, int n)
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
        if (w[mid] < row) lo = mid + 1;
        else hi = mid;
    }
    return lo < (int)step->n_logits && w[lo] == row ? lo : -1;
}

void td_share_rows(td_model *m, const td_step *step, const td_kv *kv)
{
    td_share *s = &m->share;
    int R = td_model_cp(m), me = m->ranks ? m->ranks->at.cp : 0;
    s->T = s->n_seqs = s->n_want = s->longest = 0;
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
    const td_step_seq *q = td_step_seqs(step);
    for (uint32_t i = 0; i < step->n_seqs; i++) s->longest = TD_MAX(s->longest, (int)(q[i].pos0 + q[i].n_rows));
    m->blocks = td_model_tp(m) > 1 && (m->ranks->grid.ep || s->n_own >= m->block_rows);
}

/* ---- tensor parallel ---- */

/* Bytes and offsets of the ranks' blocks of T rows of `width` floats. */
static void block_table(const td_model *m, int T, size_t width, size_t *bytes, size_t *offset)
{
    for (int i = 0; i < td_model_tp(m); i++) {
        int a, b;
        td_grid_rows(T, td_model_tp(m), i, &a, &b);
        bytes[i] = (size_t)(b - a) * width * sizeof(float);
        offset[i] = (size_t)a * width * sizeof(float);
    }
}

/* Parts [T, E] of all TP ranks -> [tp][rows][E]: all rows, or this rank's block. */
static td_status gather_parts(td_model *m, const float *part, int T, bool blocks, float **all, int *rows)
{
    size_t E = (size_t)m->desc.E, tp = (size_t)td_model_tp(m);
    if (!blocks) {
        *rows = T;
        *all = td_share_room(&m->wire[0], tp * (size_t)T * E);
        return td_coll_all_gather(m->ranks->tp, part, *all, (size_t)T * E * sizeof(float));
    }
    size_t send[TD_MAX_RANKS], from[TD_MAX_RANKS], recv[TD_MAX_RANKS], to[TD_MAX_RANKS];
    int a, b;
    td_model_block(m, T, &a, &b);
    *rows = b - a;
    block_table(m, T, E, send, from);
    for (size_t i = 0; i < tp; i++) {
        recv[i] = (size_t)*rows * E * sizeof(float);
        to[i] = i * recv[i];
    }
    *all = td_share_room(&m->wire[0], tp * (size_t)*rows * E);
    return td_coll_all_to_allv(m->ranks->tp, part, send, from, *all, recv, to);
}

/* As gather_parts, with all parts as integers on the way, this rank's too: so that all ranks add the same. */
static td_status gather_quantized(td_model *m, const float *part, int T, bool blocks, float **all, int *rows)
{
    size_t E = (size_t)m->desc.E, tp = (size_t)td_model_tp(m), row = td_quant_row_bytes(m->desc.E);
    size_t send[TD_MAX_RANKS], from[TD_MAX_RANKS], recv[TD_MAX_RANKS], to[TD_MAX_RANKS];
    int a = 0, b = T;
    if (blocks) td_model_block(m, T, &a, &b);
    *rows = b - a;
    void *mine = td_share_room(&m->wire[1], (size_t)T * row / sizeof(float)), *got = td_share_room(&m->wire[2], tp * (size_t)*rows * row / sizeof(float));
    td_quant_rows(m->pool, part, T, m->desc.E, mine);
    if (blocks) block_table(m, T, row / sizeof(float), send, from);
    for (size_t i = 0; i < tp; i++) {
        recv[i] = (size_t)*rows * row;
        to[i] = i * recv[i];
    }
    if (blocks) TD_TRY(td_coll_all_to_allv(m->ranks->tp, mine, send, from, got, recv, to));
    else TD_TRY(td_coll_all_gather(m->ranks->tp, mine, got, (size_t)T * row));
    *all = td_share_room(&m->wire[0], tp * (size_t)*rows * E);
    td_dequant_rows(m->pool, got, (int)tp * *rows, m->desc.E, *all);
    return TD_OK;
}

td_status td_share_parts(td_model *m, const float *part, int T, bool blocks, float **all, int *rows)
{
    return (m->quantized ? gather_quantized : gather_parts)(m, part, T, blocks, all, rows);
}

td_status td_share_sum(td_model *m, float *part, int T, const float *bias, float *x, bool blocks)
{
    size_t E = (size_t)m->desc.E;
    float *all;
    int rows;
    TD_TRY(td_share_parts(m, part, T, blocks, &all, &rows));
    m->ops->sum_tree(m->pool, all, (size_t)rows * E, td_model_tp(m), rows, m->desc.E, E, bias, x, E, true);
    return TD_OK;
}

td_status td_share_gather(td_model *m, const float *block, int T, float *out)
{
    size_t bytes[TD_MAX_RANKS], offset[TD_MAX_RANKS];
    block_table(m, T, (size_t)m->desc.E, bytes, offset);
    return td_coll_all_gatherv(m->ranks->tp, block, out, bytes, offset);
}

/* First vocabulary row of TP rank i. */
static int vocab0(const td_model *m, int i)
{
    td_coord c = m->ranks->at;
    c.tp = i;
    return td_grid_local(&m->ranks->grid, &m->desc, td_grid_rank(&m->ranks->grid, c)).v0;
}

td_status td_share_embed(td_model *m, float *part, const int32_t *ids, int T, float *x, bool blocks)
{
    size_t E = (size_t)m->desc.E;
    float *all;
    int rows, a = 0, b = T, first[TD_MAX_RANKS + 1], tp = td_model_tp(m);
    TD_TRY(gather_parts(m, part, T, blocks, &all, &rows));
    if (blocks) td_model_block(m, T, &a, &b);
    for (int i = 0; i < tp; i++) first[i] = vocab0(m, i);
    first[tp] = m->desc.V;
    for (int t = a; t < b; t++) {
        int owner = 0;
        while (ids[t] >= first[owner + 1]) owner++;
        memcpy(x + (size_t)(t - a) * E, all + ((size_t)owner * (size_t)rows + (size_t)(t - a)) * E, E * sizeof *x);
    }
    return TD_OK;
}

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
    float *all = td_share_room(&m->wire[1], (size_t)T * V);
    TD_TRY(td_coll_all_gatherv(m->ranks->tp, part, all, bytes, offset));
    for (int i = 0; i < tp; i++) {
        size_t n = (size_t)(first[i + 1] - first[i]);
        const float *from = all + offset[i] / sizeof(float);
        for (int t = 0; t < T; t++) memcpy(out + (size_t)t * V + first[i], from + (size_t)t * n, n * sizeof *out);
    }
    return TD_OK;
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
    float *all = td_share_room(&m->wire[2], (size_t)step->n_logits * V);
    TD_TRY(td_coll_all_gatherv(m->ranks->cp, own, all, bytes, offset));
    for (uint32_t k = 0; k < step->n_logits; k++)
        memcpy(logits + k * V, all + offset[place[k].cp] / sizeof(float) + (size_t)place[k].row * V, V * sizeof *logits);
    return TD_OK;
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

td_status td_share_logits(td_model *m, const td_step *step, const float *part, float *logits)
{
    int T = m->share.n_want;
    size_t V = (size_t)m->desc.V;
    if (td_model_cp(m) == 1 && td_model_tp(m) == 1) {
        return td_devmem_fetch(m->ops->dev, logits, part, (size_t)T * V * sizeof *logits);
    }
    if (td_model_cp(m) == 1) return join_vocabulary(m, part, T, logits);
    if (td_model_tp(m) == 1) return join_rows(m, step, part, logits);
    float *own = td_share_room(&m->wire[3], (size_t)T * V);
    TD_TRY(join_vocabulary(m, part, T, own));
    return join_rows(m, step, own, logits);
}

/* ---- context parallel ---- */

/* What each CP rank has of [T, width] floats in shared order. */
static void row_table(const td_model *m, size_t width, size_t *bytes, size_t *offset)
{
    const int *r0 = m->share.rank_row0;
    for (int c = 0; c < td_model_cp(m); c++) {
        bytes[c] = (size_t)(r0[c + 1] - r0[c]) * width * sizeof(float);
        offset[c] = (size_t)r0[c] * width * sizeof(float);
    }
}

static void pack_columns(const float *from, size_t ld, int T, size_t width, float *to)
{
    for (int t = 0; t < T; t++) memcpy(to + (size_t)t * width, from + (size_t)t * ld, width * sizeof *to);
}

td_status td_share_append(td_model *m, const td_rope_args *own)
{
    const td_share *s = &m->share;
    size_t width = 2 * (size_t)own->G * (size_t)own->D, bytes[TD_MAX_RANKS], offset[TD_MAX_RANKS];
    float *mine = td_share_room(&m->wire[0], (size_t)s->n_own * width), *all = td_share_room(&m->wire[1], (size_t)s->T * width);
    pack_columns(own->qkv + (size_t)own->H * (size_t)own->D, own->ld, s->n_own, width, mine);
    row_table(m, width, bytes, offset);
    TD_TRY(td_coll_all_gatherv(m->ranks->cp, mine, all, bytes, offset));
    td_rope_args a = *own;
    a.qkv = all, a.ld = width, a.T = s->T, a.H = 0;
    a.cs = own->cs - (size_t)s->own0 * (size_t)own->rot_dim;
    a.row_page = own->row_page - s->own0, a.row_in_page = own->row_in_page - s->own0;
    a.q_scale = NULL;
    m->ops->rope_append(m->pool, &a);
    a = *own;
    a.G = 0;
    m->ops->rope_append(m->pool, &a);
    return TD_OK;
}

static void merge(td_model *m, const td_attn_args *own, const float *parts, size_t stride, int n_parts)
{
    const float *part[TD_MAX_RANKS];
    for (int r = 0; r < td_model_cp(m); r++) part[r] = parts + (size_t)r * stride;
    td_merge_args a = {.part = part, .out = own->out, .ldo = own->ldo, .T = m->share.n_own, .H = own->H, .D = own->D,
                       .n_parts = n_parts, .ranks = td_model_cp(m)};
    m->ops->attn_merge(m->pool, &a);
}

/* Queries go to the keys: every rank computes all rows' parts over its own splits, and parts come home. */
static td_status pass_q(td_model *m, const td_attn_args *own, int n_parts)
{
    const td_share *s = &m->share;
    size_t HD = (size_t)own->H * (size_t)own->D, unit = (size_t)n_parts * (size_t)own->H * (size_t)(own->D + 2);
    size_t bytes[TD_MAX_RANKS], offset[TD_MAX_RANKS], recv[TD_MAX_RANKS], to[TD_MAX_RANKS];
    float *mine = td_share_room(&m->wire[0], (size_t)s->n_own * HD), *q = td_share_room(&m->wire[1], (size_t)s->T * HD);
    pack_columns(own->q, own->ldq, s->n_own, HD, mine);
    row_table(m, HD, bytes, offset);
    TD_TRY(td_coll_all_gatherv(m->ranks->cp, mine, q, bytes, offset));
    td_attn_args a = *own;
    a.q = q, a.ldq = HD, a.seq = own->seq - s->own_seq0, a.n_seq = s->n_seqs;
    a.part = td_share_room(&m->wire[2], (size_t)s->T * unit);
    a.n_parts = n_parts, a.rank = m->ranks->at.cp, a.ranks = td_model_cp(m);
    m->ops->attention(m->pool, m->scratch.ops, &a);
    float *home = td_share_room(&m->wire[3], (size_t)td_model_cp(m) * (size_t)s->n_own * unit);
    row_table(m, unit, bytes, offset);
    for (int r = 0; r < td_model_cp(m); r++) {
        recv[r] = (size_t)s->n_own * unit * sizeof(float);
        to[r] = (size_t)r * recv[r];
    }
    TD_TRY(td_coll_all_to_allv(m->ranks->cp, a.part, bytes, offset, home, recv, to));
    merge(m, own, home, (size_t)s->n_own * unit, n_parts);
    return TD_OK;
}

/* Pages that the step's sequences have on each rank, one after the other: their number; table[i]: first of sequence i. */
static int count_pages(const td_model *m, const td_step *step, int P, int *first)
{
    const td_step_seq *q = td_step_seqs(step);
    int n = 0;
    for (uint32_t i = 0; i < step->n_seqs; i++) {
        first[i] = n;
        n += ((int)td_kvmap_most(m->kvmap, q[i].pos0 + q[i].n_rows) + P - 1) / P;
    }
    return n;
}

/* Keys go to the queries, round the ring: own rows meet one rank's splits after the other's. */
static td_status pass_kv(td_model *m, const td_step *step, int group, const td_attn_args *own, int n_parts)
{
    const td_share *s = &m->share;
    int R = td_model_cp(m), me = m->ranks->at.cp, P = own->kv->P, *first = td_xalloc(step->n_seqs * sizeof *first);
    int n_pages = count_pages(m, step, P, first);
    size_t page = td_kv_page_bytes(own->kv), bytes = page * (size_t)n_pages;
    uint8_t *now = (uint8_t *)td_share_room(&m->wire[0], bytes / 4 + 16), *then = (uint8_t *)td_share_room(&m->wire[1], bytes / 4 + 16);
    int32_t *table = td_xalloc((size_t)(n_pages + 1) * sizeof *table);
    for (int i = 0; i < n_pages; i++) table[i] = i;
    td_attn_seq *seq = td_xalloc((size_t)(s->n_own_seqs + 1) * sizeof *seq);
    const td_step_seq *q = td_step_seqs(step);
    size_t at = 0;
    for (uint32_t i = 0; i < step->n_seqs; i++) {
        int end = i + 1 < step->n_seqs ? first[i + 1] : n_pages;
        const int32_t *pages = td_step_pages(step, &q[i], group);
        for (int k = 0; k < end - first[i]; k++, at += page) memcpy(now + at, td_kv_page(own->kv, own->slot, pages[k]), page);
    }
    for (int i = 0; i < s->n_own_seqs; i++) {
        seq[i] = own->seq[i];
        uint32_t k = 0; /* the sequence whose table it is */
        while (td_step_pages(step, &q[k], group) != own->seq[i].pages) k++;
        seq[i].pages = table + first[k];
        seq[i].row0 -= s->own0; /* of own rows, which q and out hold */
    }
    size_t stride = (size_t)s->n_own * (size_t)n_parts * (size_t)own->H * (size_t)(own->D + 2);
    float *parts = td_share_room(&m->wire[2], (size_t)R * stride);
    td_status st = TD_OK;
    for (int i = 0; i < R && st >= 0; i++) {
        int from = (me - i + R) % R; /* whose splits are here now */
        td_kv kv = *own->kv;
        kv.base = now, kv.n_pages = n_pages;
        td_attn_args a = *own;
        a.kv = &kv, a.slot = 0, a.seq = seq, a.part = parts + (size_t)from * stride;
        a.n_parts = n_parts, a.rank = from, a.ranks = R;
        m->ops->attention(m->pool, m->scratch.ops, &a);
        if (i + 1 == R) break;
        st = td_coll_sendrecv(m->ranks->cp, (me + 1) % R, now, bytes, (me - 1 + R) % R, then, bytes);
        uint8_t *t = now;
        now = then, then = t;
    }
    if (st >= 0) merge(m, own, parts, stride, n_parts);
    free(first), free(table), free(seq);
    return st;
}

/* Floats on the wire, per rank, one way and the other. The same on every rank. */
static bool keys_are_cheaper(const td_model *m, const td_step *step, const td_attn_args *own, int n_parts)
{
    const td_share *s = &m->share;
    double R = td_model_cp(m), H = own->H, D = own->D, T = s->T, keys = 0;
    const td_step_seq *q = td_step_seqs(step);
    for (uint32_t i = 0; i < step->n_seqs; i++) keys += td_kvmap_most(m->kvmap, q[i].pos0 + q[i].n_rows);
    double kv = (R - 1) * keys * 2 * own->G * D * (double)td_dtype_bytes(own->kv->dtype) / 4;
    double qs = (R - 1) / R * T * H * (D + n_parts * (D + 2));
    return kv < qs;
}

td_status td_share_attend(td_model *m, const td_step *step, int group, const td_attn_args *own)
{
    int S = m->split, R = td_model_cp(m), splits = (m->share.longest + S - 1) / S, n_parts = (splits + R - 1) / R;
    if (m->cp_mode != TD_CP_PASS_Q && (m->cp_mode == TD_CP_PASS_KV || keys_are_cheaper(m, step, own, n_parts)))
        return pass_kv(m, step, group, own, n_parts);
    return pass_q(m, own, n_parts);
}
