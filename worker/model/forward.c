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
    TD_TRY(td_model_check(m, step, kv));
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

void *td_model_hidden(td_model *m, const td_step *step, size_t *bytes)
{
    *bytes = (size_t)step->n_rows * (size_t)m->desc.E * sizeof(float);
    return m->scratch.x;
}

int td_model_slots(const td_model *m, int group)
{
    return m->desc.group[group].n_slots;
}
