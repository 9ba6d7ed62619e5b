// SPDX-License-Identifier: Apache-2.0
/* worker/model/forward.c - the one forward pass.
 *
 *   x = embed(ids);  per layer: x += o(attention(rope(qkv(norm(x)))));  x += down(silu(gate) * up) of
 * norm(x);  logits = head(norm(x))
 *
 * or, in a layer with experts, x += their weighted sum (moe.c).
 *
 * In the last layer only rows whose logits are wanted go on after the keys and values are written: a prompt's
 * chunk that wants none ends there. Rows never see each other outside attention, so this changes no bit. */
#include "common/check.h"
#include "worker/model/model_int.h"
#include <string.h>

typedef struct forward {
    td_model *m;
    const td_step *step;
    const td_kv *kv;
    int T, n_seqs;
    const float *q_scale;
} forward;

/* ---- the step's limits ---- */

/* [off, off + count * size) inside the step, 8-byte aligned. */
static bool inside(const td_step *s, uint32_t off, uint64_t count, size_t size)
{
    return count == 0 ||
           (off % 8 == 0 && off >= sizeof *s && off <= s->bytes && count <= (s->bytes - off) / size);
}

static td_status bad_step(const td_step *s, const char *what, long long value)
{
    return td_fail(TD_EPROTO, "step %llu: %s (%lld)", (unsigned long long)s->number, what, value);
}

static td_status check_shape(const td_model *m, const td_step *s)
{
    if (s->bytes < sizeof *s) return bad_step(s, "too short", s->bytes);
    if (s->n_rows < 1 || s->n_rows > (uint32_t)m->max_rows)
        return bad_step(s, "rows out of range", s->n_rows);
    if (s->n_seqs < 1 || s->n_seqs > s->n_rows) return bad_step(s, "sequences out of range", s->n_seqs);
    if (s->n_logits > (uint32_t)m->max_logits || s->n_logits > s->n_rows)
        return bad_step(s, "logit rows out of range", s->n_logits);
    if (s->n_groups != (uint32_t)m->desc.n_groups)
        return bad_step(s, "page groups differ from the model's", s->n_groups);
    if (!inside(s, s->ids, s->n_rows, 4) || !inside(s, s->pos, s->n_rows, 4) ||
        !inside(s, s->logit_rows, s->n_logits, 4) || !inside(s, s->seqs, s->n_seqs, sizeof(td_step_seq)))
        return bad_step(s, "an array lies outside the step", s->bytes);
    return TD_OK;
}

static td_status check_kv(const td_model *m, const td_step *s, const td_kv *kv)
{
    for (int g = 0; g < m->desc.n_groups; g++) {
        if (kv[g].G != m->desc.group[g].G || kv[g].D != m->desc.group[g].D || kv[g].dtype != m->ops->kv_dtype)
            return bad_step(s, "pages of another shape or type than the model's, group", g);
        if (kv[g].P < 1 || kv[g].n_pages < 1) return bad_step(s, "no pages, group", g);
    }
    return TD_OK;
}

/* One sequence's pages in one group: all that its rows write or read must be there. */
static td_status check_pages(const td_model *m, const td_step *s, const td_step_seq *q, const td_kv *kv,
                             int g)
{
    uint32_t P = (uint32_t)kv->P, need = (q->pos0 + q->n_rows + P - 1) / P, live = 0;
    int window = m->desc.group[g].window;
    if (q->n_pages[g] < need || !inside(s, q->pages[g], q->n_pages[g], 4))
        return bad_step(s, "page table too short", q->n_pages[g]);
    if (window > 0 && q->pos0 + 1 > (uint32_t)window)
        live = (q->pos0 + 1 - (uint32_t)window) / P; /* first page still read */
    const int32_t *pages = td_step_pages(s, q, g);
    for (uint32_t i = live; i < need; i++)
        if (pages[i] < 0 || pages[i] >= kv->n_pages) return bad_step(s, "page out of range", pages[i]);
    return TD_OK;
}

static td_status check_seqs(const td_model *m, const td_step *s, const td_kv *kv)
{
    const td_step_seq *q = td_step_seqs(s);
    uint32_t row = 0, limit = (uint32_t)m->desc.max_positions;
    for (uint32_t i = 0; i < s->n_seqs; i++, q++) {
        if (q->row0 != row || q->n_rows < 1 || q->n_rows > s->n_rows - row)
            return bad_step(s, "rows of a sequence", q->row0);
        if (q->pos0 >= limit || q->n_rows > limit - q->pos0)
            return bad_step(s, "position beyond the model's", q->pos0);
        for (int g = 0; g < m->desc.n_groups; g++) TD_TRY(check_pages(m, s, q, &kv[g], g));
        row += q->n_rows;
    }
    return row == s->n_rows ? TD_OK : bad_step(s, "rows without a sequence", s->n_rows - row);
}

static td_status check_rows(const td_model *m, const td_step *s)
{
    const int32_t *ids = td_step_ids(s), *pos = td_step_pos(s), *want = td_step_logit_rows(s);
    const td_step_seq *q = td_step_seqs(s);
    for (uint32_t i = 0; i < s->n_seqs; i++, q++)
        for (uint32_t t = 0; t < q->n_rows; t++)
            if (pos[q->row0 + t] != (int32_t)(q->pos0 + t))
                return bad_step(s, "positions are not consecutive", pos[q->row0 + t]);
    for (uint32_t t = 0; t < s->n_rows; t++)
        if (ids[t] < 0 || ids[t] >= m->desc.V) return bad_step(s, "token id out of range", ids[t]);
    for (uint32_t i = 0; i < s->n_logits; i++)
        if (want[i] < 0 || want[i] >= (int32_t)s->n_rows || (i && want[i] <= want[i - 1]))
            return bad_step(s, "logit rows are not ascending rows", want[i]);
    return TD_OK;
}

static td_status check_step(const td_model *m, const td_step *s, const td_kv *kv)
{
    TD_TRY(check_shape(m, s));
    TD_TRY(check_kv(m, s, kv));
    TD_TRY(check_seqs(m, s, kv));
    return check_rows(m, s);
}

/* ---- what all layers share ---- */

static void prepare_group(forward *f, int g)
{
    td_scratch *s = &f->m->scratch;
    size_t base = (size_t)g * (size_t)f->m->max_rows;
    const td_step_seq *q = td_step_seqs(f->step);
    const int P = f->kv[g].P;
    for (int i = 0; i < f->n_seqs; i++, q++) {
        const int32_t *pages = td_step_pages(f->step, q, g);
        s->seq[base + (size_t)i] = (td_attn_seq){(int)q->row0, (int)q->n_rows, (int)q->pos0, pages};
        for (uint32_t t = 0; t < q->n_rows; t++) {
            int pos = (int)(q->pos0 + t);
            s->page[base + q->row0 + t] = pages[pos / P];
            s->in_page[base + q->row0 + t] = pos % P;
        }
    }
}

static void prepare(forward *f)
{
    td_model *m = f->m;
    const int32_t *pos = td_step_pos(f->step);
    for (int g = 0; g < m->desc.n_groups; g++) prepare_group(f, g);
    td_rope_rows(&m->rope, pos, f->T, m->scratch.cs);
    f->q_scale = td_rope_q_scale(&m->rope, pos, f->T, m->scratch.q_scale);
}

/* ---- one layer ---- */

static size_t qkv_width(const td_model_desc *d)
{
    return (size_t)(d->H + 2 * d->G) * (size_t)d->D;
}

static void norm(td_model *m, const float *w, int T)
{
    size_t E = (size_t)m->desc.E;
    m->ops->rmsnorm(m->pool, m->scratch.x, E, w, (float)m->desc.rms_eps, T, m->desc.E, m->scratch.h, E);
}

/* y = W x, or y += W x; x of width K. */
static void linear(td_model *m, const td_weight *w, const float *x, size_t ldx, int T, float *y, bool add_to)
{
    m->ops->linear(m->pool, m->scratch.ops, w, x, ldx, T, y, (size_t)w->N, add_to);
}

static void append_keys(forward *f, const td_layer *l, int layer)
{
    td_model *m = f->m;
    const td_model_desc *d = &m->desc;
    int g = d->layer[layer].group;
    size_t base = (size_t)g * (size_t)m->max_rows;
    norm(m, l->attn_norm, f->T);
    linear(m, &l->qkv, m->scratch.h, (size_t)d->E, f->T, m->scratch.qkv, false);
    td_rope_args a = {.qkv = m->scratch.qkv,
                      .ld = qkv_width(d),
                      .T = f->T,
                      .cs = m->scratch.cs,
                      .q_scale = f->q_scale,
                      .q_norm = l->q_norm,
                      .k_norm = l->k_norm,
                      .norm_eps = (float)d->rms_eps,
                      .H = d->H,
                      .G = d->G,
                      .D = d->D,
                      .rot_dim = d->rope.rot_dim,
                      .kv = &f->kv[g],
                      .slot = d->layer[layer].slot,
                      .row_page = m->scratch.page + base,
                      .row_in_page = m->scratch.in_page + base};
    m->ops->rope_append(m->pool, &a);
}

static void attend(forward *f, int layer)
{
    td_model *m = f->m;
    const td_model_desc *d = &m->desc;
    int g = d->layer[layer].group;
    td_attn_args a = {.q = m->scratch.qkv,
                      .ldq = qkv_width(d),
                      .out = m->scratch.att,
                      .ldo = (size_t)d->H * (size_t)d->D,
                      .kv = &f->kv[g],
                      .slot = d->layer[layer].slot,
                      .seq = m->scratch.seq + (size_t)g * (size_t)m->max_rows,
                      .n_seq = f->n_seqs,
                      .H = d->H,
                      .G = d->G,
                      .D = d->D,
                      .scale = (float)d->attn_scale,
                      .window = d->layer[layer].window};
    m->ops->attention(m->pool, m->scratch.ops, &a);
}

/* Projection of the attention and the feed-forward network, for the first T rows. */
static void feed_forward(td_model *m, const td_layer *l, int T, bool moe)
{
    const td_model_desc *d = &m->desc;
    td_scratch *s = &m->scratch;
    size_t F2 = 2 * (size_t)d->F;
    linear(m, &l->o, s->att, (size_t)d->H * (size_t)d->D, T, s->x, true);
    norm(m, l->ffn_norm, T);
    if (moe) {
        td_moe_forward(m, l, T);
        return;
    }
    linear(m, &l->gate_up, s->h, (size_t)d->E, T, s->gate_up, false);
    m->ops->silu_mul(m->pool, s->gate_up, F2, T, d->F, s->gate_up, F2);
    linear(m, &l->down, s->gate_up, F2, T, s->x, true);
}

/* Move the wanted rows to the front, in place: they ascend, so a row is read before it is overwritten. */
static void keep_rows(float *p, size_t width, const int32_t *rows, int n)
{
    for (int i = 0; i < n; i++)
        if (rows[i] != i) memcpy(p + (size_t)i * width, p + (size_t)rows[i] * width, width * sizeof *p);
}

/* ---- the pass ---- */

static void embed(forward *f)
{
    td_model *m = f->m;
    size_t E = (size_t)m->desc.E;
    const int32_t *ids = td_step_ids(f->step);
    if (m->weights.table.p)
        m->ops->embed_table(m->pool, &m->weights.table, ids, f->T, m->scratch.x, E);
    else
        m->ops->embed_packed(m->pool, &m->weights.head, ids, f->T, m->scratch.x, E);
}

td_status td_model_forward(td_model *m, const td_step *step, const td_kv *kv, float *logits,
                           void (*on_layer)(void *arg, int layer), void *arg)
{
    TD_TRY(check_step(m, step, kv));
    forward f = {m, step, kv, (int)step->n_rows, (int)step->n_seqs, NULL};
    const td_model_desc *d = &m->desc;
    int n_logits = (int)step->n_logits, T = f.T;
    prepare(&f);
    embed(&f);
    for (int i = 0; i < d->L; i++) {
        const td_layer *l = td_layer_acquire(m, i);
        append_keys(&f, l, i);
        if (on_layer) on_layer(arg, i);
        bool last = i == d->L - 1;
        if (!last || n_logits > 0) attend(&f, i);
        if (last) {
            keep_rows(m->scratch.att, (size_t)d->H * (size_t)d->D, td_step_logit_rows(step), n_logits);
            keep_rows(m->scratch.x, (size_t)d->E, td_step_logit_rows(step), n_logits);
            T = n_logits;
        }
        if (T > 0) feed_forward(m, l, T, d->layer[i].moe);
        td_layer_release(m, i);
    }
    if (n_logits == 0) return TD_OK;
    norm(m, m->weights.final_norm, n_logits);
    linear(m, &m->weights.head, m->scratch.h, (size_t)d->E, n_logits, logits, false);
    return TD_OK;
}
