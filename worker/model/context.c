// SPDX-License-Identifier: Apache-2.0
#include "worker/model/context.h"
#include "common/check.h"
#include "worker/model/share.h"
#include <stdlib.h>

/* The buffers of a round (td_share_room). */
enum { OWN, ALL, PARTS, HOME, STATE, KEYS = OWN, OTHER_KEYS = ALL };
enum { PART_FLOATS = 16 << 20, KEY_BYTES = 32 << 20, LEAST_SEQS = 16 };

static size_t unit_of(const td_model *m)
{
    return (size_t)m->local.H * (size_t)(m->desc.D + 2);
}
static int own_rows(const td_share *s, int rank)
{
    return s->rank_row0[rank + 1] - s->rank_row0[rank];
}

/* ---- the workspace ---- */

/* Own rows of any step, at most: dealt piece by piece (share.c), a rank gets less than twice its share. */
static size_t most_own(const td_model *m)
{
    size_t T = (size_t)m->max_rows, R = (size_t)td_model_cp(m);
    return TD_MIN(T, 2 * T / R + R);
}

static size_t most_parts(const td_model *m)
{
    size_t R = (size_t)td_model_cp(m), S = (size_t)m->split,
           splits = ((size_t)m->desc.max_positions + S - 1) / S;
    return (splits + R - 1) / R;
}

td_status td_context_open(td_model *m)
{
    td_context *c = &m->context;
    size_t T = (size_t)m->max_rows, R = (size_t)td_model_cp(m), unit = unit_of(m), own = most_own(m), G = 0;
    size_t HD = (size_t)m->local.H * (size_t)m->desc.D;
    float *p;
    if (R == 1) return TD_OK;
    for (int g = 0; g < m->desc.n_groups; g++) G = TD_MAX(G, (size_t)m->group[g].G);
    size_t width = 2 * G * (size_t)m->desc.D,
           split_bytes = (size_t)m->split * width * td_dtype_bytes(m->ops->kv_dtype);
    c->part_floats = m->least_workspace
                         ? R * unit
                         : TD_MAX(R * unit, TD_MIN(R * own * unit * most_parts(m), (size_t)PART_FLOATS));
    c->own_part_floats = TD_MAX(c->part_floats, R * own * unit);
    c->key_bytes = m->least_workspace
                       ? LEAST_SEQS * split_bytes
                       : TD_MAX(LEAST_SEQS * split_bytes,
                                TD_MIN(most_parts(m) * LEAST_SEQS * split_bytes, (size_t)KEY_BYTES));
    TD_TRY(td_share_room(m, OWN, TD_MAX(own * TD_MAX(width, HD), c->key_bytes / sizeof(float)), &p));
    TD_TRY(td_share_room(m, ALL, TD_MAX(T * TD_MAX(width, HD), c->key_bytes / sizeof(float)), &p));
    TD_TRY(td_share_room(m, PARTS, c->own_part_floats, &p));
    TD_TRY(td_share_room(m, HOME, c->part_floats, &p));
    TD_TRY(td_share_room(m, STATE, own * unit, &p));
    c->seq = td_xalloc(T * sizeof *c->seq);
    return TD_OK;
}

void td_context_close(td_model *m)
{
    td_context *c = &m->context;
    free(c->seq), free(c->ids), free(c->table), free(c->first), free(c->place);
}

/* ---- keys to where they are kept ---- */

/* What each CP rank has of [T, width] floats in shared order. */
static void row_table(const td_model *m, size_t width, size_t *bytes, size_t *offset)
{
    const td_share *s = &m->share;
    for (int c = 0; c < td_model_cp(m); c++) {
        bytes[c] = (size_t)own_rows(s, c) * width * sizeof(float);
        offset[c] = (size_t)s->rank_row0[c] * width * sizeof(float);
    }
}

td_status td_context_append(td_model *m, const td_rope_args *own)
{
    const td_share *s = &m->share;
    size_t width = 2 * (size_t)own->G * (size_t)own->D, bytes[TD_MAX_RANKS], offset[TD_MAX_RANKS];
    float *mine, *all;
    TD_TRY(td_share_room(m, OWN, (size_t)s->n_own * width, &mine));
    TD_TRY(td_share_room(m, ALL, (size_t)s->T * width, &all));
    td_share_pack(m, own->qkv + (size_t)own->H * (size_t)own->D, own->ld, s->n_own, (int)width, mine);
    row_table(m, width, bytes, offset);
    TD_TRY(td_coll_all_gatherv(m->ranks->data.cp, mine, all, bytes, offset));
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

/* ---- rounds ---- */

/* Rows [row, row + rows) of each rank's own ones. */
typedef struct round_rows {
    int row, rows;
    int all, most; /* of all ranks together; of one */
    int parts;     /* of a row on a rank, at most */
} round_rows;

static int rows_in(const td_model *m, const round_rows *r, int rank)
{
    return TD_MAX(0, TD_MIN(own_rows(&m->share, rank) - r->row, r->rows));
}

static void measure(const td_model *m, round_rows *r)
{
    const td_share *s = &m->share;
    int last = 0, R = td_model_cp(m);
    r->all = r->most = 0;
    for (int c = 0; c < R; c++) {
        int n = rows_in(m, r, c);
        const int32_t *pos = s->pos + s->rank_row0[c] + r->row;
        r->all += n;
        r->most = TD_MAX(r->most, n);
        for (int i = 0; i < n; i++) last = TD_MAX(last, pos[i]);
    }
    r->parts = last / m->split / R + 1;
}

/* Rows from `row` on, as many as the workspace holds with all their parts, or one. */
static round_rows next_rows(const td_model *m, int row, int left)
{
    round_rows r = {.row = row, .rows = left};
    for (;;) {
        measure(m, &r);
        size_t n = (size_t)TD_MAX(r.all, td_model_cp(m) * r.most) * (size_t)r.parts * unit_of(m);
        if (n <= m->context.part_floats || r.rows == 1) return r;
        r.rows = (r.rows + 1) / 2;
    }
}

/* Parts of own rows [row, row + T) of all ranks, `stride` floats apart, into out, or into the state. */
static void merge(td_model *m, const td_attn_args *own, int row, int T, const float *parts, size_t stride,
                  int n_parts, bool first, bool last, float *state)
{
    const float *part[TD_MAX_RANKS];
    for (int r = 0; r < td_model_cp(m); r++) part[r] = parts + (size_t)r * stride;
    td_merge_args a = {.part = part,
                       .before = first ? NULL : state,
                       .state = last ? NULL : state,
                       .out = own->out + (size_t)row * own->ldo,
                       .ldo = own->ldo,
                       .T = T,
                       .H = own->H,
                       .D = own->D,
                       .n_parts = n_parts,
                       .ranks = td_model_cp(m)};
    m->ops->attn_merge(m->pool, &a);
}

/* A piece's page table from part p0 on. */
static const int32_t *pages_from(const td_model *m, const td_attn_seq *q, int P, int p0)
{
    int n = ((int)td_kvmap_most(m->kvmap, (uint32_t)(q->pos0 + q->n_rows)) + P - 1) / P;
    return q->pages + TD_MIN(p0 * (m->split / P), n);
}

/* ---- queries go to the keys ---- */

/* The round's rows as sequences, rank after rank; pages from part p0 on. */
static int round_seqs(td_model *m, int group, const round_rows *r, int P, int p0)
{
    const td_share *s = &m->share;
    const td_attn_seq *q = s->seq + (size_t)group * (size_t)m->max_rows;
    int n = 0, c = 0, base = 0; /* of rank c: where its rows of this round begin */
    for (int i = 0; i < s->n_seqs; i++, q++) {
        while (q->row0 >= s->rank_row0[c + 1]) base += rows_in(m, r, c++);
        int first = s->rank_row0[c] + r->row, a = TD_MAX(q->row0, first),
            b = TD_MIN(q->row0 + q->n_rows, first + r->rows);
        if (a >= b) continue;
        m->context.seq[n++] =
            (td_attn_seq){base + a - first, b - a, q->pos0 + a - q->row0, pages_from(m, q, P, p0)};
    }
    return n;
}

/* Bytes and offsets of each rank's rows of the round, `width` floats each. */
static void round_table(const td_model *m, const round_rows *r, size_t width, size_t *bytes, size_t *offset)
{
    size_t at = 0;
    for (int c = 0; c < td_model_cp(m); c++) {
        bytes[c] = (size_t)rows_in(m, r, c) * width * sizeof(float);
        offset[c] = at;
        at += bytes[c];
    }
}

static td_status round_of_queries(td_model *m, int group, const td_attn_args *own, const round_rows *r)
{
    size_t HD = (size_t)own->H * (size_t)own->D, unit = unit_of(m);
    size_t bytes[TD_MAX_RANKS], offset[TD_MAX_RANKS], recv[TD_MAX_RANKS], to[TD_MAX_RANKS];
    int R = td_model_cp(m), me = m->ranks->at.cp, n = rows_in(m, r, me), step = r->parts;
    float *mine, *q, *part, *home, *state;
    if (r->rows == 1) step = TD_MIN(step, (int)(m->context.part_floats / ((size_t)R * unit)));
    TD_TRY(td_share_room(m, OWN, (size_t)n * HD, &mine));
    TD_TRY(td_share_room(m, ALL, (size_t)r->all * HD, &q));
    TD_TRY(td_share_room(m, PARTS, (size_t)r->all * (size_t)step * unit, &part));
    TD_TRY(td_share_room(m, HOME, (size_t)(R * n) * (size_t)step * unit, &home));
    TD_TRY(td_share_room(m, STATE, (size_t)n * unit, &state));
    td_share_pack(m, own->q + (size_t)r->row * own->ldq, own->ldq, n, (int)HD, mine);
    round_table(m, r, HD, bytes, offset);
    TD_TRY(td_coll_all_gatherv(m->ranks->data.cp, mine, q, bytes, offset));
    for (int p = 0, k; p < r->parts; p += k) {
        k = TD_MIN(step, r->parts - p);
        td_attn_args a = *own;
        a.q = q, a.ldq = HD, a.n_seq = round_seqs(m, group, r, own->kv->P, p), a.seq = m->context.seq;
        a.part = part, a.part0 = p, a.n_parts = k, a.rank = me, a.ranks = R;
        m->ops->attention(m->pool, m->scratch.ops, &a);
        round_table(m, r, (size_t)k * unit, bytes, offset);
        for (int c = 0; c < R; c++) {
            recv[c] = (size_t)n * (size_t)k * unit * sizeof(float);
            to[c] = (size_t)c * recv[c];
        }
        TD_TRY(td_coll_all_to_allv(m->ranks->data.cp, part, bytes, offset, home, recv, to));
        merge(m, own, r->row, n, home, (size_t)n * (size_t)k * unit, k, p == 0, p + k == r->parts, state);
    }
    return TD_OK;
}

static td_status pass_q(td_model *m, int group, const td_attn_args *own, int most)
{
    for (int row = 0; row < most;) {
        round_rows r = next_rows(m, row, most - row);
        TD_TRY(round_of_queries(m, group, own, &r));
        row += r.rows;
    }
    return TD_OK;
}

/* ---- keys go to the queries ---- */

/* Pages of sequence q in parts [p0, p0 + n): the first and the end. */
static void pages_in(const td_model *m, const td_step_seq *q, int P, int p0, int n, int *a, int *b)
{
    int per = m->split / P, all = ((int)td_kvmap_most(m->kvmap, q->pos0 + q->n_rows) + P - 1) / P;
    *a = TD_MIN(p0 * per, all);
    *b = TD_MIN((p0 + n) * per, all);
}

/* Parts from p0 on whose pages, of all sequences, fit the workspace: at most n, at least one (fits_keys). */
static int parts_that_fit(const td_model *m, const td_step *step, const td_kv *kv, int p0, int n)
{
    const td_step_seq *q = td_step_seqs(step);
    for (;; n = (n + 1) / 2) {
        size_t pages = 0;
        for (uint32_t i = 0; i < step->n_seqs; i++) {
            int a, b;
            pages_in(m, &q[i], kv->P, p0, n, &a, &b);
            pages += (size_t)(b - a);
        }
        if (n == 1 || pages * td_kv_page_bytes(kv) <= m->context.key_bytes) return n;
    }
}

/* Tables of the round: pages that travel, each once; where every sequence's pages are among them. The same on
 * every rank, as pages are. */
static void list_pages(td_model *m, const td_step *step, int group, const td_kv *kv, int p0, int n,
                       int *n_ids)
{
    td_context *c = &m->context;
    size_t most = m->context.key_bytes / td_kv_page_bytes(kv) + 1;
    const td_step_seq *q = td_step_seqs(step);
    if (c->cap_ids < most) {
        c->cap_ids = most;
        c->ids = td_xrealloc(c->ids, most * sizeof *c->ids),
        c->table = td_xrealloc(c->table, most * sizeof *c->table);
    }
    if (!c->first) c->first = td_xalloc((size_t)m->max_rows * sizeof *c->first);
    if (c->cap_place < kv->n_pages) {
        c->place = td_xrealloc(c->place, (size_t)kv->n_pages * sizeof *c->place);
        for (int i = c->cap_place; i < kv->n_pages; i++) c->place[i] = -1;
        c->cap_place = kv->n_pages;
    }
    int at = 0;
    *n_ids = 0;
    for (uint32_t i = 0; i < step->n_seqs; i++) {
        const int32_t *pages = td_step_pages(step, &q[i], group);
        int a, b;
        pages_in(m, &q[i], kv->P, p0, n, &a, &b);
        c->first[i] = at;
        for (int k = a; k < b; k++) {
            int32_t *place = &c->place[pages[k]];
            if (*place < 0) *place = *n_ids, c->ids[(*n_ids)++] = pages[k];
            c->table[at++] = *place;
        }
    }
    for (int i = 0; i < *n_ids; i++) c->place[c->ids[i]] = -1;
}

/* Own rows against this round's splits of each rank, whose keys come round. */
static td_status round_of_keys(td_model *m, const td_step *step, int group, const td_attn_args *own, int p0,
                               int n, bool last)
{
    const td_share *s = &m->share;
    td_context *c = &m->context;
    int R = td_model_cp(m), me = m->ranks->at.cp, n_ids;
    size_t stride = (size_t)s->n_own * (size_t)n * unit_of(m);
    float *keys[2], *parts, *state;
    list_pages(m, step, group, own->kv, p0, n, &n_ids);
    size_t bytes = (size_t)n_ids * td_kv_page_bytes(own->kv);
    TD_TRY(td_share_room(m, KEYS, (bytes + 3) / sizeof(float), &keys[0]));
    TD_TRY(td_share_room(m, OTHER_KEYS, (bytes + 3) / sizeof(float), &keys[1]));
    TD_TRY(td_share_room(m, PARTS, (size_t)R * stride, &parts));
    TD_TRY(td_share_room(m, STATE, (size_t)s->n_own * unit_of(m), &state));
    m->ops->gather_pages(m->pool, own->kv, own->slot, c->ids, n_ids, keys[0]);
    for (int i = 0; i < s->n_own_seqs; i++) {
        c->seq[i] = own->seq[i];
        c->seq[i].pages = c->table + c->first[s->of_seq[s->own_seq0 + i]];
        c->seq[i].row0 -= s->own0; /* of own rows, which q and out hold */
    }
    for (int i = 0; i < R; i++) {
        int from = (me - i + R) % R; /* whose splits are here now */
        td_kv kv = *own->kv;
        kv.base = (void *)keys[i % 2], kv.n_pages = n_ids;
        td_attn_args a = *own;
        a.kv = &kv, a.slot = 0, a.seq = c->seq, a.part = parts + (size_t)from * stride;
        a.part0 = p0, a.n_parts = n, a.rank = from, a.ranks = R;
        m->ops->attention(m->pool, m->scratch.ops, &a);
        if (i + 1 < R)
            TD_TRY(td_coll_sendrecv(m->ranks->data.cp, (me + 1) % R, keys[i % 2], bytes, (me - 1 + R) % R,
                                    keys[(i + 1) % 2], bytes));
    }
    merge(m, own, 0, s->n_own, parts, stride, n, p0 == 0, last, state);
    return TD_OK;
}

static td_status pass_kv(td_model *m, const td_step *step, int group, const td_attn_args *own,
                         const round_rows *all)
{
    int most = (int)TD_MIN(m->context.own_part_floats / ((size_t)(td_model_cp(m) * all->most) * unit_of(m)),
                           (size_t)all->parts);
    for (int p = 0, n; p < all->parts; p += n) {
        n = parts_that_fit(m, step, own->kv, p, TD_MIN(most, all->parts - p));
        TD_TRY(round_of_keys(m, step, group, own, p, n, p + n == all->parts));
    }
    return TD_OK;
}

/* ---- which of the two ---- */

/* One split of all sequences, and its parts of all own rows. */
static bool fits_keys(const td_model *m, const td_step *step, const td_attn_args *own, const round_rows *all)
{
    size_t split = (size_t)(m->split / own->kv->P) * td_kv_page_bytes(own->kv);
    return step->n_seqs * split <= m->context.key_bytes &&
           (size_t)(td_model_cp(m) * all->most) * unit_of(m) <= m->context.own_part_floats;
}

/* Floats on the wire, per rank, one way and the other. The same on every rank. */
static bool keys_are_cheaper(const td_model *m, const td_step *step, const td_attn_args *own)
{
    const td_share *s = &m->share;
    double R = td_model_cp(m), H = own->H, D = own->D, T = s->T, keys = 0, parts = 0;
    const td_step_seq *q = td_step_seqs(step);
    for (uint32_t i = 0; i < step->n_seqs; i++) keys += td_kvmap_most(m->kvmap, q[i].pos0 + q[i].n_rows);
    for (int t = 0; t < s->T; t++) parts += s->pos[t] / m->split / td_model_cp(m) + 1;
    double kv = (R - 1) * keys * 2 * own->G * D * (double)td_dtype_bytes(own->kv->dtype) / 4;
    double qs = (R - 1) / R * H * (T * D + parts * (D + 2));
    return kv < qs;
}

td_status td_context_attend(td_model *m, const td_step *step, int group, const td_attn_args *own)
{
    round_rows all = {.row = 0, .rows = m->share.T};
    measure(m, &all);
    bool keys = m->cp_mode == TD_CP_PASS_KV || (m->cp_mode == TD_CP_AUTO && keys_are_cheaper(m, step, own));
    keys &= fits_keys(m, step, own, &all);
    *(keys ? &m->context.n_keys : &m->context.n_queries) += 1;
    if (keys) return pass_kv(m, step, group, own, &all);
    return pass_q(m, group, own, all.most);
}
