// SPDX-License-Identifier: Apache-2.0
/* worker/model/forward.c - the one forward pass, of one rank.
 *
 *   x = embed(ids);  per layer: x += o(attention(rope(qkv(norm(x)))));  x += down(silu(gate) * up) of
 * norm(x);  logits = head(norm(x))
 *
 * or, in a layer with experts, x += their weighted sum (moe.c). A rank has its layers, its heads and columns, its rows of
 * the step and its tokens' keys; where it needs the others, share.h says what is exchanged. With one rank nothing is.
 *
 * Activations, weights and pages may be a device's memory (td_ops.dev): here they are only handed to td_ops.
 *
 * On a device a step of generated rows alone may be padded and replayed (replay.h).
 *
 * In the last layer only rows whose logits are wanted go on after the keys and values are written: a prompt's
 * chunk that wants none ends there. Rows never see each other outside attention, so this changes no bit. */
#include "common/check.h"
#include "worker/model/context.h"
#include "worker/model/replay.h"
#include "worker/model/shard.h"
#include "worker/model/share.h"

/* ---- what all layers share ---- */

static td_status prepare(td_forward *f)
{
    td_model *m = f->m;
    const td_share *s = &m->share;
    td_share_rows(m, f->step, f->kv);
    f->T = s->n_own;
    f->n_want = s->n_want;
    td_rope_rows(&m->rope, s->pos, s->T, m->scratch.cs);
    bool unknown = f->step->n_before > 0, device = m->ops->dev != NULL; /* on a device: one rank has all ids */
    if (unknown && !device) m->ops->fill_ids(m->pool, s->ids + s->own0, f->T, m->drawn);
    td_share_local_ids(m);
    const float *q_scale = td_rope_q_scale(&m->rope, s->pos + s->own0, f->T, m->scratch.q_scale);
    int rows = td_replay_rows(m, f->step);
    TD_TRY(rows ? td_replay_step(f, rows, m->scratch.cs, q_scale) : td_place_step(m, m->scratch.cs, q_scale, &f->at));
    if (unknown && device) m->ops->fill_ids(m->pool, f->at.ids, f->T, m->drawn);
    return TD_OK;
}

/* ---- one layer ---- */

static size_t qkv_width(const td_model *m)
{
    return (size_t)(m->local.H + 2 * m->local.G) * (size_t)m->desc.D;
}

static const td_operand plain = {TD_F32, 0};

/* What is computed for T rows and products with w only: their operand type, where the family has one (td_operand_ops).
 * What one function wrote as this type another reads, so nothing that changes between them, as m->blocks does, may
 * decide it. */
static td_operand operand(const td_model *m, const td_weight *w, int T)
{
    return m->ops->operand ? m->ops->operand->type(w, T) : plain;
}

/* The same of rows that ranks put together (norm): values, since codes have their scales elsewhere. */
static td_operand shared_operand(const td_model *m, const td_weight *w, int T)
{
    td_operand to = operand(m, w, T);
    return to.dtype == TD_E4M3 && td_model_tp(m) > 1 ? (td_operand){m->ops->operand->dtype(w->dtype), 0} : to;
}

/* T rows of x, normed, as `to`. */
static void norm_rows(td_model *m, const float *w, int T, td_operand to, void *out)
{
    size_t E = (size_t)m->desc.E;
    float eps = (float)m->desc.rms_eps;
    if (to.dtype == TD_F32) m->ops->rmsnorm(m->pool, m->scratch.x, E, w, eps, T, m->desc.E, out, E);
    else m->ops->operand->rmsnorm(m->pool, m->scratch.x, E, w, eps, T, m->desc.E, out, to, E);
}

/* h = norm(x), as `to`, for T rows, on all TP ranks; in block mode each norms its own and they are put together. */
static td_status norm(td_model *m, const float *w, int T, td_operand to)
{
    size_t E = (size_t)m->desc.E;
    if (!m->blocks) {
        norm_rows(m, w, T, to, m->scratch.h);
        return TD_OK;
    }
    int a, b;
    td_model_block(m, T, &a, &b);
    float *block;
    TD_TRY(td_share_room(m, 1, (size_t)(b - a) * E, &block));
    norm_rows(m, w, b - a, to, block);
    return td_share_gather(m, block, T, E * td_dtype_bytes(to.dtype), m->scratch.h);
}

/* x: f32 or an operand of w */
static void product(td_model *m, const td_weight *w, const void *x, td_operand type, size_t ldx, int T,
                    float *y, bool sum)
{
    if (type.dtype == TD_F32)
        m->ops->linear(m->pool, m->scratch.ops, w, x, ldx, T, y, (size_t)w->N, sum);
    else
        m->ops->operand->linear(m->pool, m->scratch.ops, w, x, type, ldx, T, y, (size_t)w->N, sum);
}

/* x += W y of a row-parallel matrix: this rank has some of its columns. The part goes through h, which is free then. */
static td_status add_linear(td_model *m, const td_weight *w, const void *y, td_operand type, size_t ldy,
                            int T)
{
    if (td_model_tp(m) == 1) {
        product(m, w, y, type, ldy, T, m->scratch.x, true);
        return TD_OK;
    }
    td_weight part = *w;
    part.bias = NULL;
    product(m, &part, y, type, ldy, T, m->scratch.h, false);
    return td_share_sum(m, m->scratch.h, T, w->bias, m->scratch.x, m->blocks, true);
}

static td_status append_keys(td_forward *f, const td_layer *l, int layer)
{
    td_model *m = f->m;
    const td_model_desc *d = &m->desc;
    int g = d->layer[layer].group;
    td_operand type = shared_operand(m, &l->qkv, f->T);
    TD_TRY(norm(m, l->attn_norm, f->T, type));
    product(m, &l->qkv, m->scratch.h, type, (size_t)d->E, f->T, m->scratch.qkv, false);
    td_rope_args a = {.qkv = m->scratch.qkv,
                      .ld = qkv_width(m),
                      .T = f->T,
                      .cs = f->at.cs,
                      .q_scale = f->at.q_scale,
                      .q_norm = l->q_norm,
                      .k_norm = l->k_norm,
                      .norm_eps = (float)d->rms_eps,
                      .H = m->local.H,
                      .G = m->local.G,
                      .D = d->D,
                      .rot_dim = d->rope.rot_dim,
                      .kv = &f->kv[g],
                      .slot = m->slot[layer],
                      .row_page = f->at.page[g],
                      .row_in_page = f->at.in_page[g]};
    if (td_model_cp(m) > 1) return td_context_append(m, &a);
    m->ops->rope_append(m->pool, &a);
    return TD_OK;
}

/* What attention is stored as: context-parallel ranks merge parts of it. */
static td_dtype attended(const td_model *m, const td_layer *l)
{
    return td_model_cp(m) > 1 || !m->ops->operand ? TD_F32 : m->ops->operand->dtype(l->o.dtype);
}

static td_status attend(td_forward *f, const td_layer *l, int layer)
{
    td_model *m = f->m;
    const td_model_desc *d = &m->desc;
    const td_share *s = &m->share;
    int g = d->layer[layer].group;
    td_attn_args a = {.q = m->scratch.qkv,
                      .ldq = qkv_width(m),
                      .out = m->scratch.att,
                      .ldo = (size_t)m->local.H * (size_t)d->D,
                      .out_dtype = attended(m, l),
                      .kv = &f->kv[g],
                      .slot = m->slot[layer],
                      .seq = s->seq + (size_t)g * (size_t)m->max_rows + (size_t)s->own_seq0,
                      .n_seq = s->n_own_seqs,
                      .H = m->local.H,
                      .G = m->local.G,
                      .D = d->D,
                      .scale = (float)d->attn_scale,
                      .window = d->layer[layer].window,
                      .split = m->split};
    if (f->replayed) {
        a.placed = &f->attn[g];
        f->attn[g].fresh = m->slot[layer] == 0;
    }
    if (td_model_cp(m) > 1) return td_context_attend(m, f->step, g, &a);
    m->ops->attention(m->pool, m->scratch.ops, &a);
    return TD_OK;
}

/* Projection of the attention `att` and the feed-forward network, for T rows. */
static td_status feed_forward(td_model *m, const td_layer *l, const float *att, int T, bool moe)
{
    const td_model_desc *d = &m->desc;
    td_scratch *s = &m->scratch;
    size_t F = (size_t)m->local.F;
    TD_TRY(add_linear(m, &l->o, att, (td_operand){attended(m, l), 0}, (size_t)m->local.H * (size_t)d->D, T));
    td_operand type = moe ? plain : shared_operand(m, &l->gate_up, T); /* a router reads f32 */
    TD_TRY(norm(m, l->ffn_norm, T, type));
    if (moe) return td_moe_forward(m, l, T);
    product(m, &l->gate_up, s->h, type, (size_t)d->E, T, s->gate_up, false);
    type = operand(m, &l->down, T);
    if (type.dtype != TD_F32) {
        m->ops->operand->silu_mul(m->pool, s->gate_up, 2 * F, T, (int)F, s->operand, type, F);
        return add_linear(m, &l->down, s->operand, type, F, T);
    }
    m->ops->silu_mul(m->pool, s->gate_up, 2 * F, T, (int)F, s->gate_up, 2 * F);
    return add_linear(m, &l->down, s->gate_up, plain, 2 * F, T);
}

/* From here on only the wanted rows count: how many of this rank's those are, and where their attention is (qkv is free
 * now). Where all rows are wanted, nothing moves. */
static td_status keep_wanted(td_forward *f, const td_layer *l, int *T, const float **att)
{
    td_model *m = f->m;
    td_scratch *s = &m->scratch;
    const int32_t *want = f->at.want;
    int E = m->desc.E, HD = m->local.H * m->desc.D, n = f->n_want, all = f->T;
    if (attended(m, l) != TD_F32) HD /= 2; /* in words; D is even */
    *T = n;
    if (n < all) {
        m->ops->take_rows(m->pool, s->att, (size_t)HD, want, n, HD, s->qkv, (size_t)HD);
        *att = s->qkv;
    }
    if (m->blocks) { /* all rows, then the wanted ones, or this rank's block of those */
        int a = 0, b = n;
        TD_TRY(td_share_gather(m, s->x, all, (size_t)E * sizeof *s->x, s->h));
        m->blocks = m->ranks->grid.ep;
        if (m->blocks) td_model_block(m, n, &a, &b);
        m->ops->take_rows(m->pool, s->h, (size_t)E, want + a, b - a, E, s->x, (size_t)E);
    } else if (n < all) {
        float *x = s->x;
        m->ops->take_rows(m->pool, x, (size_t)E, want, n, E, s->h, (size_t)E);
        s->x = s->h; /* their places change */
        s->h = x;
    }
    return TD_OK;
}

/* ---- the pass ---- */

static td_status embed(td_forward *f)
{
    td_model *m = f->m;
    size_t E = (size_t)m->desc.E;
    const int32_t *all = m->share.ids + m->share.own0, *ids = f->at.ids;
    bool whole = td_model_tp(m) == 1;
    float *to = whole ? m->scratch.x : m->scratch.h;
    /* ids outside this rank's part of the vocabulary make rows of zeros */
    if (m->local.shards > 1)
        TD_TRY(td_shard_embed(m, all, f->T, to));
    else if (m->weights.table.p)
        m->ops->embed_table(m->pool, &m->weights.table, ids, f->T, to, E);
    else
        m->ops->embed_packed(m->pool, &m->weights.head, ids, f->T, to, E);
    return whole ? TD_OK : td_share_embed(m, to, all, f->T, m->scratch.x, m->blocks);
}

/* This rank's rows and part of the vocabulary. */
static td_status head(td_forward *f, int T, float *logits)
{
    td_model *m = f->m;
    if (f->step->n_logits == 0) {
        if (!td_shard_wants(m)) return TD_OK;
        T = 0; /* others' rows need this rank's part of the vocabulary */
    }
    td_operand type = m->local.shards > 1 ? plain : shared_operand(m, &m->weights.head, T); /* td_shard_head takes f32 */
    TD_TRY(norm(m, m->weights.final_norm, T, type));
    if (m->local.shards > 1) TD_TRY(td_shard_head(m, m->scratch.h, T, logits));
    else if (m->local.V > 0) product(m, &m->weights.head, m->scratch.h, type, (size_t)m->desc.E, T, logits, false);
    if (td_model_cp(m) > 1) td_share_places(m, f->step);
    return TD_OK;
}

void td_model_drawn(td_model *m, const td_sample_out *before)
{
    m->drawn = before;
}

void td_model_vocab(const td_model *m, int *v0, int *n)
{
    *v0 = m->local.v0;
    *n = m->local.V;
}

const td_logit_place *td_model_logit_places(const td_model *m)
{
    return td_model_cp(m) > 1 ? m->share.place : NULL;
}

td_status td_model_join_logits(td_model *m, const td_step *step, const float *part, float *logits)
{
    return step->n_logits ? td_share_logits(m, step, part, logits) : TD_OK;
}

static td_status layer(td_forward *f, int i, int *T)
{
    td_model *m = f->m;
    const td_layer *l = td_layer_acquire(m, i);
    if (!l) return TD_EGONE;
    bool last = i == m->desc.L - 1, rows = m->share.T > 0, goes_on = rows && (!last || f->step->n_logits > 0);
    if (rows) TD_TRY(append_keys(f, l, i));
    if (f->on_layer && rows) f->on_layer(f->arg, i);
    if (goes_on) TD_TRY(attend(f, l, i));
    const float *att = m->scratch.att;
    if (goes_on && last) TD_TRY(keep_wanted(f, l, T, &att));
    if (goes_on) TD_TRY(feed_forward(m, l, att, *T, m->desc.layer[i].moe));
    else if (m->desc.layer[i].moe && td_model_meets(m)) TD_TRY(td_moe_forward(m, l, 0));
    td_layer_release(m, i);
    return TD_OK;
}

static td_status layers(td_forward *f)
{
    td_model *m = f->m;
    int T = f->T;
    if (m->local.first) TD_TRY(embed(f));
    for (int i = m->local.layer0; i < m->local.layer1; i++) TD_TRY(layer(f, i, &T));
    return m->local.last ? head(f, T, f->logits) : TD_OK;
}

/* From the step's arrays, or the hidden rows of the stage before, to its logits. The rows are where they were again
 * (keep_wanted): recordings have the address at which a stage takes them. */
static td_status pass(td_forward *f)
{
    td_scratch *s = &f->m->scratch;
    float *x = s->x, *h = s->h;
    td_status st = layers(f);
    s->x = x, s->h = h;
    return st;
}

td_status td_model_forward(td_model *m, const td_step *step, const td_kv *kv, float *logits,
                           void (*on_layer)(void *arg, int layer), void *arg)
{
    TD_TRY(td_model_check(m, step, kv));
    if (step->n_before && !m->drawn)
        return td_fail(TD_EPROTO, "step %llu: the tokens of the step before are not here",
                       (unsigned long long)step->number);
    td_forward f = {.m = m, .step = step, .kv = kv, .logits = logits, .on_layer = on_layer, .arg = arg};
    m->unrecorded.replayed = false;
    TD_TRY(prepare(&f));
    m->replay.last = -1; /* until this step ends */
    TD_TRY(td_shard_begin(m, f.T, m->share.n_want));
    if (!f.replayed || !m->ops->replay->run(&f.key)) {
        m->unrecorded = f;
        return pass(&f);
    }
    for (int i = m->local.layer0; on_layer && i < m->local.layer1; i++) on_layer(arg, i);
    return TD_OK;
}

void td_model_record(td_model *m)
{
    td_forward *f = &m->unrecorded;
    td_replay_step_ends(m);
    bool now = f->replayed && m->ops->replay->record_begin(&f->key);
    f->on_layer = NULL;
    if (now) {
        (void)pass(f); /* nothing but launches, whose errors are the recording's */
        m->ops->replay->record_end();
    }
    f->replayed = false;
}

void *td_model_hidden(td_model *m, const td_step *step, const td_kv *kv, size_t *bytes)
{
    td_share_rows(m, step, kv);
    int rows = m->share.n_own, a = 0;
    if (m->blocks) {
        int b;
        td_model_block(m, rows, &a, &b);
        rows = b - a;
    }
    *bytes = (size_t)rows * (size_t)m->desc.E * sizeof(float);
    return m->scratch.x;
}

const td_group_desc *td_model_groups(const td_model *m)
{
    return m->group;
}

td_kvmap td_model_kvmap(const td_model *m)
{
    return m->kvmap;
}
