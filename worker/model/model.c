// SPDX-License-Identifier: Apache-2.0
/* worker/model/model.c - opening a model: descriptor, files, plan, image, scratch. */
#include "worker/model/model.h"
#include "common/check.h"
#include "common/log.h"
#include "worker/devmem.h"
#include "worker/model/context.h"
#include "worker/model/experts.h"
#include "worker/model/replay.h"
#include "worker/model/shard.h"
#include "worker/model/share.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- the descriptor ---- */

static td_h128 mix(td_h128 a, td_h128 b)
{
    const td_hkey key = {0x74616e64656d2d6dull, 0x6f64656c2d303031ull};
    td_h128 both[2] = {a, b};
    return td_siphash128(key, both, sizeof both);
}

static td_status read_desc(const td_model_opts *o, td_model_desc *d)
{
    if (!o->dummy_shape && !o->dir) return td_fail(TD_EBADREQ, "no model folder given");
    if (o->desc) *d = *o->desc;
    else if (o->dir) TD_TRY(td_model_desc_read(o->dir, d));
    else TD_TRY(td_model_desc_shape(o->dummy_shape, d));
    if (o->dummy_shape && o->dir) d->digest = mix(d->digest, (td_h128){0x64756d6d79ull, 0});
    return TD_OK;
}

/* The dtype of a checkpoint is what its weights are, whatever config.json says. */
static void settle_dtype(td_model_desc *d, const td_safetensors *files)
{
    td_dtype t;
    const td_st_tensor *e = files ? td_safetensors_find(files, "model.embed_tokens.weight") : NULL;
    if (e && td_st_weight_dtype(e, &t))
        snprintf(d->dtype, sizeof d->dtype, "%s", td_dtype_name(t));
    else if (!d->dtype[0])
        snprintf(d->dtype, sizeof d->dtype, "bf16");
}

/* ---- weights ---- */

typedef struct fill_call {
    const td_plan *plan;
    const td_model_opts *o;
} fill_call;

static void fill(void *arg, uint8_t *data)
{
    const fill_call *c = arg;
    td_plan_fill(c->plan, data, c->o->pool, c->o->progress, c->o->arg);
}

static void settle_matrix(td_weight *w, td_weight **out, int *n)
{
    if (w->p) out[(*n)++] = w;
}

/* The matrices that every row meets, in the order of a step. */
static int dense_matrices(td_model *m, td_weight **out)
{
    int n = 0;
    for (int i = m->local.layer0; i < m->local.layer1; i++) {
        td_layer *l = &m->weights.layer[i];
        td_weight *of_layer[] = {&l->qkv, &l->o, &l->gate_up, &l->down};
        for (size_t k = 0; k < TD_COUNT(of_layer); k++) settle_matrix(of_layer[k], out, &n);
    }
    settle_matrix(&m->weights.head, out, &n);
    return n;
}

static td_status weights_fit(td_dev *dev, size_t bytes)
{
    size_t left;
    TD_TRY(dev->free_bytes(dev, &left));
    if (bytes <= left) return TD_OK;
    return td_fail(TD_EFULL, "device %s:%d (%s): the weights need %zu MiB, %zu MiB of %zu MiB are free: a device with more "
                   "than %zu MiB, or more ranks, would do", dev->kind, dev->index, dev->name, (bytes >> 20) + 1, left >> 20,
                   dev->total_bytes >> 20, (dev->total_bytes - left + bytes) >> 20);
}

static td_status all_ranks(void *arg, bool mine, bool *out)
{
    return td_ranks_all(((const td_model *)arg)->ranks->world, mine, out);
}

/* Of sharded weights a rank has no layer for longer than it takes to compute it. */
static td_status keep_beside(td_model *m)
{
    enum { OF_LAYER = 4 };
    td_weight *w[TD_MAX_LAYERS * OF_LAYER + 1];
    const td_ops_agree ranks = {all_ranks, m};
    if (!m->ops->beside || m->local.shards > 1) return TD_OK;
    return m->ops->beside(w, dense_matrices(m, w), m->ranks ? &ranks : NULL, &m->beside);
}

/* To the device, once; the host's copy is given back. Nothing is read as stored then. */
static td_status upload_image(td_model *m, const td_plan *plan, const td_model_opts *o)
{
    td_dev *dev = m->ops->dev;
    TD_TRY(weights_fit(dev, plan->image_bytes));
    TD_TRY(td_devmem_alloc(dev, plan->image_bytes, "weights", &m->device_image));
    TD_TRY(td_devmem_put_staged(dev, o->pool, m->device_image, m->image.data, plan->image_bytes, o->progress, o->arg));
    td_image_close(&m->image);
    td_plan_attach(plan, m->device_image);
    return keep_beside(m);
}

static td_status open_image(td_model *m, const td_plan *plan, const td_model_opts *o)
{
    td_image_key key = {m->desc.digest, td_plan_digest(plan), (uint32_t)m->ops->layout, (uint32_t)m->local.shard,
                        (uint32_t)m->local.shards, 0};
    fill_call call = {plan, o};
    /* ref keeps weights as stored: a file of copies would only cost disk. */
    const char *dir = strcmp(m->ops->family, "ref") ? o->cache_dir : NULL;
    TD_TRY(td_image_open(&m->image, dir, o->cache_limit, &key, plan->image_bytes, o->pool, fill, &call));
    if (m->ops->dev) TD_TRY(upload_image(m, plan, o));
    else td_plan_attach(plan, m->image.data);
    m->row_bytes = td_plan_row_bytes(plan);
    m->resident_bytes = td_plan_resident_bytes(plan);
    if (!td_plan_uses_files(plan)) {
        td_safetensors_close(m->files);
        m->files = NULL;
    }
    return TD_OK;
}

/* Ranks on several hosts read their own disks: one path may hold other weights of the same configuration. */
static td_status same_weights(const td_model *m)
{
    char text[64];
    if (!m->ranks || !m->ranks->world) return TD_OK; /* a part opened without the others has nobody to ask */
    snprintf(text, sizeof text, "weights: %016llx%016llx\n", (unsigned long long)m->desc.digest.hi, (unsigned long long)m->desc.digest.lo);
    return td_ranks_agree(m->ranks->world, text);
}

static td_status load_weights(td_model *m, const td_model_opts *o)
{
    td_plan plan;
    if (!o->dummy_shape) {
        TD_TRY(td_safetensors_open_dir(o->dir, &m->files));
        m->desc.digest = mix(m->desc.digest, td_safetensors_digest(m->files));
        TD_TRY(same_weights(m));
    }
    settle_dtype(&m->desc, m->files);
    TD_TRY(td_plan_open(&plan, &m->desc, &m->local, m->ops, m->files, &m->weights));
    td_status st = open_image(m, &plan, o);
    if (st >= 0) st = td_shard_open(m, &plan);
    if (st >= 0) st = td_experts_open(m, &plan);
    td_plan_close(&plan);
    return st;
}

/* ---- this rank's part ---- */

enum { BLOCK_FLOATS = 1 << 16 }; /* rows x E from which a block of rows on each TP rank costs less than all rows on all */

static td_status find_part(td_model *m, const td_model_opts *o)
{
    const td_model_desc *d = &m->desc;
    td_grid one = td_grid_one(d);
    const td_grid *g = o->ranks ? &o->ranks->grid : &one;
    m->ranks = o->ranks;
    m->local = td_grid_local(g, d, o->ranks ? g->rank : 0);
    m->split = o->attn_split ? o->attn_split : TD_ATTN_SPLIT;
    m->kvmap = (td_kvmap){(uint32_t)m->split, (uint32_t)g->cp};
    m->cp_mode = o->cp_mode;
    m->quantized = o->quantized && g->tp > 1;
    m->block_rows = o->block_rows ? o->block_rows : TD_MAX(2 * g->tp, BLOCK_FLOATS / d->E);
    if (m->split % 64) return td_fail(TD_EBADREQ, "attention splits of %d keys: a multiple of 64 is needed", m->split);
    for (int i = 0; i < d->n_groups; i++) {
        m->group[i] = d->group[i];
        m->group[i].G = g->tp <= d->group[i].G ? d->group[i].G / g->tp : 1;
        m->group[i].n_slots = 0;
    }
    for (int i = m->local.layer0; i < m->local.layer1; i++) m->slot[i] = m->group[d->layer[i].group].n_slots++;
    return TD_OK;
}

/* ---- scratch ---- */

static size_t padded(size_t bytes)
{
    return (bytes + 63) / 64 * 64;
}

/* One block, cut twice: first to count, then to hand out. */
static size_t cut(td_scratch *s, const td_model *m, uint8_t *block)
{
    const td_model_desc *d = &m->desc;
    size_t T = (size_t)m->max_rows, H = (size_t)m->local.H, D = (size_t)d->D,
           E = (size_t)d->E, at = 0;
    size_t k = (size_t)d->moe.route.top_k, X = (size_t)d->moe.route.n_experts; /* 0: no experts */
    size_t dense_F = 0;
    for (int i = 0; i < d->L; i++)
        if (!d->layer[i].moe) dense_F = (size_t)m->local.F;
    int max_K = TD_MAX(TD_MAX(d->E, d->H * d->D), (int)dense_F), members = td_pool_size(m->pool);
#define CUT(field, count)                                                                                    \
    do {                                                                                                     \
        if (block) s->field = (void *)(block + at);                                                          \
        at += padded((size_t)(count) * sizeof *s->field);                                                    \
    } while (0)
    CUT(x, T * E);
    CUT(h, T * E);
    CUT(qkv, T * (H + 2 * (size_t)m->local.G) * D);
    CUT(att, T * H * D);
    CUT(gate_up, T * 2 * dense_F);
    CUT(route_logits, T * X);
    CUT(route_weights, T * k);
    CUT(route_ids, T * k);
    CUT(expert_row, T * k);
    CUT(expert_row0, X + (m->ranks ? (size_t)m->ranks->grid.redundant : 0) + 1);
    CUT(expert_x, T * k * E);
    CUT(expert_gate_up, m->experts ? 0 : T * k * 2 * (size_t)m->local.moe_F); /* of parallel ones: td_moe_open */
#undef CUT
    size_t operands = TD_MAX(T * dense_F, T * k * (size_t)m->local.moe_F);
    if (m->ops->operand) {
        if (block) s->operand = block + at;
        at += padded(operands * td_dtype_bytes(TD_BF16) + 256); /* codes: their scales begin at a multiple */
    }
    if (block) s->ops = block + at;
    size_t ops = m->ops->scratch_bytes(m->max_rows, max_K, d->D, members);
    if (X) {
        ops = TD_MAX(ops, td_moe_scratch_bytes(m->ops, td_moe_most_rows(m), TD_MAX(d->E, d->moe.F), members));
    }
    return at + padded(ops);
}

static td_status activations_fit(const td_model *m, size_t bytes)
{
    td_dev *dev = m->ops->dev;
    size_t left;
    TD_TRY(dev->free_bytes(dev, &left));
    if (bytes <= left) return TD_OK;
    return td_fail(TD_EFULL, "device %s:%d (%s): activations of %d rows need %zu MiB, %zu MiB of %zu MiB are free beside the weights: "
                   "--max-num-batched-tokens %zu would fit", dev->kind, dev->index, dev->name, m->max_rows, (bytes >> 20) + 1,
                   left >> 20, dev->total_bytes >> 20, left / (bytes / (size_t)m->max_rows + 1));
}

td_status td_scratch_open(td_scratch *s, const td_model *m)
{
    size_t T = (size_t)m->max_rows;
    void *block;
    s->dev = m->ops->dev;
    s->bytes = cut(s, m, NULL);
    if (s->dev) TD_TRY(activations_fit(m, s->bytes));
    TD_TRY(td_devmem_alloc(s->dev, s->bytes, "activations", &block));
    s->block = block;
    cut(s, m, s->block);
    s->cs = td_xalloc((T * (size_t)m->desc.rope.rot_dim + 1) * sizeof *s->cs);
    s->q_scale = td_xalloc(T * sizeof *s->q_scale);
    return TD_OK;
}

void td_scratch_close(td_scratch *s)
{
    td_devmem_free(s->dev, s->block);
    free(s->cs), free(s->q_scale);
    *s = (td_scratch){0};
}

/* Workspaces of the kernels, before pages take what is left of a device. */
static td_status reserve_ops(const td_model *m, const td_model_opts *o)
{
    const td_model_desc *d = &m->desc;
    const td_local *l = &m->local;
    if (!m->ops->reserve) return TD_OK;
    int HD = l->H * d->D, qkv = (l->H + 2 * l->G) * d->D, E = d->E, F = TD_MAX(l->F, l->moe_F);
    td_ops_room r = {.max_rows = m->max_rows, .max_logits = m->max_logits, .V = l->V, .H = l->H, .G = l->G, .D = d->D,
                    
                     .max_len = o->max_len > 0 ? TD_MIN(o->max_len, d->max_positions) : d->max_positions,
                     .max_seqs = o->max_seqs > 0 ? o->max_seqs : m->max_rows,
                     .page_size = o->page_size > 0 ? o->page_size : 16, .max_expert_rows = m->max_rows * d->moe.route.top_k,
                     .N = TD_MAX(TD_MAX(TD_MAX(qkv, E), 2 * F), l->V), .K = TD_MAX(TD_MAX(HD, E), F)};
    return m->ops->reserve(&r);
}

/* ---- the model ---- */

bool td_model_fits(const td_model_desc *d, const td_ops *ops)
{
    return !strcmp(ops->family, "ref") || (d->D % 16 == 0 && d->D <= TD_MAX_HEAD_DIM);
}

/* What several ranks on a device lack. */
static td_status check_ranks(const td_model_opts *o)
{
    const td_ranks *r = o->ranks;
    if (!o->ops->dev) return TD_OK;
    if (o->attn_split && o->attn_split != TD_ATTN_SPLIT)
        return td_fail(TD_ENOSUP, "kernel family %s: attention splits of %d keys, only %d are possible", o->ops->family, o->attn_split, TD_ATTN_SPLIT);
    if (!r || td_grid_ranks(&r->grid) == 1) return TD_OK;
    if (r->dev != o->ops->dev) return td_fail(TD_EBADREQ, "the ranks' groups do not take this device's memory: td_ranks_device comes first");
    return TD_OK;
}

td_status td_model_open(const td_model_opts *o, td_model **out)
{
    enum { MAX_ROWS = 1 << 20 };
    if (o->max_rows < 1 || o->max_rows > MAX_ROWS || o->max_logits < 1 || o->max_logits > MAX_ROWS)
        return td_fail(TD_EBADREQ, "max_rows %d and max_logits %d must be from 1 to %d", o->max_rows,
                       o->max_logits, MAX_ROWS);
    td_model *m = td_xalloc(sizeof *m);
    m->ops = o->ops;
    m->pool = o->pool;
    m->max_rows = o->max_rows;
    m->max_logits = o->max_logits;
    m->place.dev = o->ops->dev;
    m->least_workspace = o->least_workspace;
    td_status st = check_ranks(o);
    if (st >= 0) st = read_desc(o, &m->desc);
    if (st >= 0 && !td_model_fits(&m->desc, o->ops))
        st = td_fail(TD_ENOSUP, "kernel family %s does not take head dimension %d", o->ops->family, m->desc.D);
    if (st >= 0) st = find_part(m, o);
    if (st >= 0) st = load_weights(m, o);
    if (st >= 0) st = td_scratch_open(&m->scratch, m);
    if (st >= 0) st = td_share_open(m);
    if (st >= 0) st = td_moe_open(m);
    if (st >= 0) st = td_context_open(m);
    if (st >= 0) st = td_place_open(m);
    if (st >= 0) st = reserve_ops(m, o);
    if (st >= 0) st = td_replay_open(m);
    if (st < 0) {
        td_model_close(m);
        return st;
    }
    td_rope_init(&m->rope, &m->desc);
    *out = m;
    return TD_OK;
}

void td_model_close(td_model *m)
{
    if (!m) return;
    td_replay_close(m);
    td_moe_close(m);
    td_experts_close(m);
    td_shard_close(m);
    td_rope_deinit(&m->rope);
    td_scratch_close(&m->scratch);
    td_context_close(m);
    td_share_close(m);
    td_place_close(&m->place);
    td_image_close(&m->image);
    td_devmem_free(m->ops->dev, m->beside);
    td_devmem_free(m->ops->dev, m->device_image);
    td_weights_close(&m->weights);
    td_safetensors_close(m->files);
    free(m);
}

const td_model_desc *td_model_descr(const td_model *m)
{
    return &m->desc;
}
size_t td_model_weight_bytes(const td_model *m)
{
    return m->row_bytes;
}
size_t td_model_resident_bytes(const td_model *m)
{
    return m->resident_bytes + 2 * m->shard.buffer_bytes + td_experts_bytes(m);
}
size_t td_model_workspace_bytes(const td_model *m)
{
    size_t bytes = m->scratch.bytes;
    for (size_t i = 0; i < TD_COUNT(m->wire); i++) bytes += m->wire[i].cap * sizeof(float);
    return bytes;
}
size_t td_model_unit_bytes(const td_model *m)
{
    return m->shard.buffer_bytes;
}
