// SPDX-License-Identifier: Apache-2.0
/* worker/model/weights.c - the plan: which tensors, of which shape, joined how and placed where. Filling is
 * in weights_fill.c. */
#include "worker/model/weights.h"
#include "common/check.h"
#include "common/log.h"
#include "worker/model/fp8.h"
#include <stdio.h>
#include <stdlib.h>

enum { PIECES_PER_LAYER = 12, PIECES_PER_EXPERT = 2, PIECES_AROUND = 3, ALIGN = 64 };

/* ---- the list ---- */

typedef struct builder {
    td_plan *p;
    int layer;
} builder;

static td_piece *add(builder *b, td_piece_kind kind, int K)
{
    td_piece *e = &b->p->piece[b->p->n++];
    *e = (td_piece){.kind = kind, .K = K, .src_K = K, .unit = b->p->local.shards > 1 ? b->layer : -1};
    return e;
}

static void add_part(builder *b, td_piece *e, const char *name, const char *suffix, int rows)
{
    td_part *part = &e->part[e->n_parts++];
    if (b->layer < 0)
        snprintf(part->name, sizeof part->name, "%s%s", name, suffix);
    else
        snprintf(part->name, sizeof part->name, "model.layers.%d.%s%s", b->layer, name, suffix);
    part->rows = part->src_rows = rows;
    e->N += rows;
}

/* Of the part added last, rows [row0, row0 + n) are taken. */
static void take_rows(td_piece *e, int row0, int n)
{
    td_part *part = &e->part[e->n_parts - 1];
    e->N += n - part->rows;
    part->row0 = row0;
    part->rows = n;
}

/* Columns [k0, k0 + K) of src_K are taken, in slices. */
static void take_columns(td_piece *e, int k0, int src_K, int n_slices)
{
    e->k0 = k0;
    e->src_K = src_K;
    e->slices = n_slices;
}

static void add_norm(builder *b, const char *name, int rows, const float **to)
{
    td_piece *e = add(b, TD_PIECE_VECTOR, 1);
    add_part(b, e, name, ".weight", rows);
    e->dummy = 1.0f;
    e->vector = to;
}

typedef struct named_rows {
    const char *name;
    int rows, row0, n; /* of the tensor; which are taken */
} named_rows;

static void add_parts(builder *b, td_piece *e, const named_rows *parts, int n, const char *suffix)
{
    for (int i = 0; i < n; i++) {
        add_part(b, e, parts[i].name, suffix, parts[i].rows);
        take_rows(e, parts[i].row0, parts[i].n);
    }
}

/* A linear layer of up to three parts, and its bias. */
static td_piece *add_linear(builder *b, const named_rows *parts, int n, int K, bool bias, td_weight *to)
{
    td_piece *e = add(b, TD_PIECE_MATRIX, K);
    add_parts(b, e, parts, n, ".weight");
    e->weight = to;
    if (!bias) return e;
    td_piece *v = add(b, TD_PIECE_VECTOR, 1);
    add_parts(b, v, parts, n, ".bias");
    v->vector = &to->bias;
    return e;
}

/* ---- experts ---- */

typedef struct expert_names {
    const char *block, *gate, *up, *down;
    bool fused; /* gate names the tensor of all gates and ups, down the one of all downs */
} expert_names;

static bool has(const builder *b, const char *block, const char *name)
{
    char full[112];
    snprintf(full, sizeof full, "model.layers.%d.%s.%s", b->layer, block, name);
    return b->p->files && td_safetensors_find(b->p->files, full);
}

static expert_names find_names(const builder *b)
{
    const char *mixtral = "block_sparse_moe";
    bool old = has(b, mixtral, "gate.weight") || has(b, mixtral, "experts.0.w2.weight");
    const char *block = old ? mixtral : "mlp";
    if (has(b, block, "experts.gate_up_proj") || has(b, block, "experts.down_proj"))
        return (expert_names){block, "experts.gate_up_proj", NULL, "experts.down_proj", true};
    if (old || has(b, block, "experts.0.w1.weight") || has(b, block, "experts.0.w2.weight"))
        return (expert_names){block, "w1", "w3", "w2", false};
    return (expert_names){block, "gate_proj", "up_proj", "down_proj", false};
}

static void add_expert_part(builder *b, td_piece *e, const expert_names *n, const char *name, int expert,
                            int rows)
{
    char full[100];
    if (n->fused) snprintf(full, sizeof full, "%s.%s", n->block, name);
    else snprintf(full, sizeof full, "%s.experts.%d.%s", n->block, expert, name);
    add_part(b, e, full, n->fused ? "" : ".weight", rows);
    if (!n->fused) return;
    e->part[e->n_parts - 1].index = expert;
    e->part[e->n_parts - 1].of = b->p->desc->moe.route.n_experts;
}

static void add_expert(builder *b, const expert_names *n, int i, td_moe *to)
{
    const td_model_desc *d = b->p->desc;
    const td_local *l = &b->p->local;
    int F = d->moe.F, rows = n->fused ? 2 * F : F;
    td_piece *e = add(b, TD_PIECE_MATRIX, d->E);
    e->read = TD_READ_EXPERT;
    if (l->X < d->moe.route.n_experts) e->unit = -1; /* nobody else has it */
    e->weight = &to->gate_up[i];
    add_expert_part(b, e, n, n->gate, i, rows);
    take_rows(e, l->moe_f0, l->moe_F);
    add_expert_part(b, e, n, n->fused ? n->gate : n->up, i, rows);
    take_rows(e, l->moe_f0 + (n->fused ? F : 0), l->moe_F);
    e = add(b, TD_PIECE_MATRIX, l->moe_F);
    take_columns(e, l->moe_f0, F, l->moe_slices);
    e->read = TD_READ_EXPERT;
    if (l->X < d->moe.route.n_experts) e->unit = -1;
    e->weight = &to->down[i];
    add_expert_part(b, e, n, n->down, i, d->E);
}

static void add_experts(builder *b, td_layer *l)
{
    expert_names n = find_names(b);
    char router[40];
    td_piece *e = add(b, TD_PIECE_TABLE, b->p->desc->E);
    snprintf(router, sizeof router, "%s.gate", n.block);
    add_part(b, e, router, ".weight", b->p->desc->moe.route.n_experts);
    e->table = &l->moe.router;
    for (int i = b->p->local.x0; i < b->p->local.x0 + b->p->local.X; i++) add_expert(b, &n, i, &l->moe);
}

/* ---- the list ---- */

static void add_layer(builder *b, td_layer *l)
{
    const td_model_desc *d = b->p->desc;
    const td_local *m = &b->p->local;
    int D = d->D;
    const named_rows qkv[] = {{"self_attn.q_proj", d->H * D, m->h0 * D, m->H * D},
                              {"self_attn.k_proj", d->G * D, m->g0 * D, m->G * D},
                              {"self_attn.v_proj", d->G * D, m->g0 * D, m->G * D}};
    const named_rows o[] = {{"self_attn.o_proj", d->E, 0, d->E}}, down[] = {{"mlp.down_proj", d->E, 0, d->E}};
    const named_rows gate_up[] = {{"mlp.gate_proj", d->F, m->f0, m->F}, {"mlp.up_proj", d->F, m->f0, m->F}};
    add_norm(b, "input_layernorm", d->E, &l->attn_norm);
    add_linear(b, qkv, 3, d->E, d->qkv_bias, &l->qkv);
    if (d->qk_norm) {
        add_norm(b, "self_attn.q_norm", d->D, &l->q_norm);
        add_norm(b, "self_attn.k_norm", d->D, &l->k_norm);
    }
    take_columns(add_linear(b, o, 1, m->H * D, d->o_bias, &l->o), m->h0 * D, d->H * D, m->o_slices);
    add_norm(b, "post_attention_layernorm", d->E, &l->ffn_norm);
    if (d->layer[b->layer].moe) {
        add_experts(b, l);
        return;
    }
    add_linear(b, gate_up, 2, d->E, d->mlp_bias, &l->gate_up);
    take_columns(add_linear(b, down, 1, m->F, d->mlp_bias, &l->down), m->f0, d->F, m->down_slices);
}

static int moe_layers(const td_model_desc *d)
{
    int n = 0;
    for (int i = 0; i < d->L; i++) n += d->layer[i].moe;
    return n;
}

static void open_experts(const td_model_desc *d, td_weights *w)
{
    size_t X = (size_t)d->moe.route.n_experts, n = (size_t)moe_layers(d) * X * 2;
    if (n == 0) return;
    td_weight *at = w->experts = td_xalloc(n * sizeof *at);
    for (int i = 0; i < d->L; i++) {
        if (!d->layer[i].moe) continue;
        w->layer[i].moe.gate_up = at;
        w->layer[i].moe.down = at + X;
        at += 2 * X;
    }
}

void td_weights_close(td_weights *w)
{
    free(w->experts);
    *w = (td_weights){0};
}

static void build(td_plan *p, td_weights *w)
{
    const td_model_desc *d = p->desc;
    const td_local *m = &p->local;
    builder b = {p, -1};
    if (!d->tied && m->first) {
        td_piece *e = add(&b, TD_PIECE_TABLE, d->E);
        e->read = TD_READ_LOOKUP;
        add_part(&b, e, "model.embed_tokens", ".weight", d->V);
        take_rows(e, m->shard_v0, m->shard_V);
        e->table = &w->table;
    }
    for (b.layer = m->layer0; b.layer < m->layer1; b.layer++) add_layer(&b, &w->layer[b.layer]);
    b.layer = -1;
    if (m->last) add_norm(&b, "model.norm", d->E, &w->final_norm);
    const named_rows head[] = {{d->tied ? "model.embed_tokens" : "lm_head", d->V, m->shard_v0, m->shard_V}};
    if (m->last || (d->tied && m->first)) add_linear(&b, head, 1, d->E, false, &w->head);
}

/* ---- binding to the files ---- */

static td_status wrong_shape(const td_safetensors *files, const td_st_tensor *t, const td_piece *e,
                            const td_part *part)
{
    char got[160] = "";
    for (int i = 0, n = 0; i < t->rank; i++)
        n += snprintf(got + n, sizeof got - (size_t)n, "%s%lld", i ? ", " : "", (long long)t->shape[i]);
    char want[60];
    if (e->kind == TD_PIECE_VECTOR) snprintf(want, sizeof want, "%d", part->src_rows);
    else if (part->of) snprintf(want, sizeof want, "%d, %d, %d", part->of, part->src_rows, e->src_K);
    else snprintf(want, sizeof want, "%d, %d", part->src_rows, e->src_K);
    return td_fail(TD_EPROTO, "%s: tensor \"%.200s\" has shape [%s], config.json makes it [%s]",
                   td_safetensors_file(files, t->file), t->name, got, want);
}

static bool has_shape(const td_st_tensor *t, const td_piece *e, const td_part *part)
{
    const int64_t *s = t->shape;
    if (e->kind == TD_PIECE_VECTOR) return t->rank == 1 && s[0] == part->src_rows;
    if (part->of)
        return t->rank == 3 && s[0] == part->of && s[1] == part->src_rows && s[2] == e->src_K;
    return t->rank == 2 && s[0] == part->src_rows && s[1] == e->src_K;
}

const uint8_t *td_piece_data(const td_piece *e, int part)
{
    const td_part *p = &e->part[part];
    size_t row = (size_t)p->index * (size_t)p->src_rows + (size_t)p->row0;
    return p->src->data + (row * (size_t)e->src_K + (size_t)e->k0) * td_dtype_bytes(e->from);
}

static td_status bind_part(td_plan *p, td_piece *e, int i)
{
    td_part *part = &e->part[i];
    const td_st_tensor *t = td_safetensors_find(p->files, part->name);
    if (!t)
        return td_fail(TD_EPROTO, "%s: the checkpoint has no tensor \"%s\"", td_safetensors_list(p->files), part->name);
    bool vector = e->kind == TD_PIECE_VECTOR;
    if (!has_shape(t, e, part)) return wrong_shape(p->files, t, e, part);
    part->src = t;
    TD_TRY(td_fp8_bind(p, e, part));
    td_dtype from = TD_E4M3;
    if (!part->scale && !td_st_weight_dtype(t, &from))
        return td_fail(TD_ENOSUP, "%s: tensor \"%s\": dtype %s is not supported (F32, BF16 and F16 are)",
                       td_safetensors_file(p->files, t->file), t->name, td_st_dtype_name(t->dtype));
    if (i > 0 && !vector && from != e->from)
        return td_fail(TD_ENOSUP, "%s: tensor \"%s\" is %s, but the parts joined with it are %s",
                       td_safetensors_file(p->files, t->file), t->name, td_dtype_name(from),
                       td_dtype_name(e->from));
    e->from = from;
    return TD_OK;
}

static int by_text(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static bool ends_with(const char *s, const char *end)
{
    size_t n = strlen(s), m = strlen(end);
    return n >= m && !strcmp(s + n - m, end);
}

/* One line for all tensors that nobody asked for. */
static void report_extra(const td_plan *p)
{
    size_t n = 0, extra = 0;
    const char **names = td_xalloc(6 * p->n * sizeof *names), *first = NULL;
    for (size_t i = 0; i < p->n; i++)
        for (int k = 0; k < p->piece[i].n_parts; k++) {
            const td_part *part = &p->piece[i].part[k];
            names[n++] = part->name;
            if (part->scale) names[n++] = part->scale->name;
        }
    qsort(names, n, sizeof *names, by_text);
    for (size_t i = 0; i < td_safetensors_count(p->files); i++) {
        const char *name = td_safetensors_at(p->files, i)->name;
        if (bsearch(&name, names, n, sizeof *names, by_text) || ends_with(name, "rotary_emb.inv_freq"))
            continue;
        if (p->desc->tied && !strcmp(name, "lm_head.weight")) continue;
        if (!extra++) first = name;
    }
    if (extra)
        TD_WARN("ignoring %zu tensors that %s does not have, such as \"%.200s\"", extra, p->desc->arch,
                first);
    free(names);
}

static td_status bind(td_plan *p)
{
    for (size_t i = 0; i < p->n; i++)
        for (int k = 0; k < p->piece[i].n_parts; k++) TD_TRY(bind_part(p, &p->piece[i], k));
    const td_local *l = &p->local; /* of a part of the model the rest is no surprise */
    if (l->first && l->last && l->X == p->desc->moe.route.n_experts) report_extra(p);
    return TD_OK;
}

static void bind_dummy(td_plan *p)
{
    td_dtype from = !strcmp(p->desc->dtype, "f32")   ? TD_F32
                    : !strcmp(p->desc->dtype, "f16") ? TD_F16
                                                     : TD_BF16;
    for (size_t i = 0; i < p->n; i++) p->piece[i].from = from;
}

/* ---- placing ---- */

/* May the kernels read the stored bytes? The embedding table: any family; matrices and routers: ref, whose
 * packed order is the stored one. */
static bool usable_as_stored(const td_plan *p, const td_piece *e)
{
    if (p->ops->dev) return false; /* the image is what goes to the device */
    if (e->unit >= 0 || !e->part[0].src || e->kind == TD_PIECE_VECTOR || e->n_parts != 1 || e->K != e->src_K) return false;
    if (e->read != TD_READ_LOOKUP && strcmp(p->ops->family, "ref")) return false;
    if (e->from == TD_E4M3) return false; /* the scales lie elsewhere in the file */
    return (uintptr_t)td_piece_data(e, 0) % td_dtype_bytes(e->from) == 0;
}

static size_t aligned(size_t n, size_t to)
{
    return (n + to - 1) / to * to;
}

static td_weight weight_of(const td_piece *e, const void *at, const float *bias)
{
    bool scaled = e->scale_at > 0;
    return (td_weight){.N = e->N,
                       .K = e->K,
                       .dtype = e->to,
                       .p = at,
                       .bias = bias,
                       .slices = e->slices,
                       .scale_rows = scaled ? e->scale_rows : 0,
                       .scale_cols = scaled ? e->scale_cols : 0,
                       .scale_at = e->scale_at};
}

static size_t matrix_bytes(const td_plan *p, td_piece *e)
{
    size_t bytes = p->ops->packed_bytes(e->N, e->K, e->slices, e->from);
    if (e->to != TD_E4M3) return bytes;
    e->scale_at = aligned(bytes, ALIGN);
    td_weight w = weight_of(e, NULL, NULL);
    return e->scale_at + td_weight_scale_count(&w) * sizeof(float);
}

/* A device computes a layer's experts in one product: they are of one type. */
static bool like_last_expert(const td_plan *p, const td_piece *e)
{
    const td_piece *last = e - 2; /* the same matrix of the expert before */
    if (!p->ops->dev || e->read != TD_READ_EXPERT || e - p->piece < 2 || last->read != TD_READ_EXPERT) return true;
    return last->weight + 1 != e->weight || (last->to == e->to && last->scale_rows == e->scale_rows);
}

static td_status check_product(const td_plan *p, const td_piece *e)
{
    td_weight w = weight_of(e, NULL, NULL);
    const char *why = p->ops->refuses && e->N ? p->ops->refuses(&w) : NULL;
    if (!like_last_expert(p, e)) why = "it is stored otherwise than the expert before it";
    if (!why) return TD_OK;
    return td_fail(TD_ENOSUP, "kernel family %s does not take \"%s\" [%d, %d]: %s", p->ops->family, e->part[0].name, e->N,
                   e->K, why);
}

static td_status place(td_plan *p)
{
    size_t at = 0;
    for (size_t i = 0; i < p->n; i++) {
        td_piece *e = &p->piece[i];
        size_t elements = (size_t)e->N * (size_t)e->K;
        td_fp8_arrange(p, e);
        e->as_stored = usable_as_stored(p, e);
        e->to = e->kind == TD_PIECE_MATRIX  ? p->ops->packed_dtype(e->from)
                : e->kind == TD_PIECE_TABLE ? e->from
                                            : TD_F32;
        if (e->as_stored) continue;
        e->bytes = e->kind == TD_PIECE_MATRIX ? matrix_bytes(p, e) : elements * td_dtype_bytes(e->to);
        if (e->kind == TD_PIECE_MATRIX) TD_TRY(check_product(p, e));
        size_t *in = e->unit < 0 ? &at : &p->unit[e->unit].bytes;
        e->offset = *in;
        *in += aligned(e->bytes, ALIGN);
    }
    for (int i = 0; i < p->desc->L; i++) {
        td_unit *u = &p->unit[i];
        u->bytes = aligned(u->bytes, (size_t)p->local.shards * ALIGN);
        u->part = at;
        at += u->bytes / (size_t)p->local.shards;
    }
    p->image_bytes = at;
    return TD_OK;
}

td_status td_plan_open(td_plan *p, const td_model_desc *d, const td_local *local, const td_ops *ops,
                       const td_safetensors *files, td_weights *w)
{
    size_t most = (size_t)d->L * PIECES_PER_LAYER + PIECES_AROUND +
                  (size_t)moe_layers(d) * (size_t)d->moe.route.n_experts * PIECES_PER_EXPERT;
    *p = (td_plan){.desc = d, .local = *local, .ops = ops, .files = files, .piece = td_xalloc(most * sizeof *p->piece)};
    open_experts(d, w);
    build(p, w);
    TD_CHECK(p->n <= most);
    td_status st = TD_OK;
    if (files)
        st = bind(p);
    else
        bind_dummy(p);
    if (st >= 0) st = place(p);
    if (st < 0) td_plan_close(p);
    return st;
}

void td_plan_close(td_plan *p)
{
    free(p->piece);
    *p = (td_plan){0};
}

/* ---- facts about a plan ---- */

/* Which stored tensor's rows: ranks with other layers or experts have plans that are alike in all sizes. */
static uint64_t part_digest(const td_part *t, td_hkey key)
{
    const int32_t rows[] = {t->rows, t->row0, t->index};
    key.k1 ^= td_siphash128(key, t->name, strlen(t->name)).lo;
    return td_siphash128(key, rows, sizeof rows).lo;
}

td_h128 td_plan_digest(const td_plan *p)
{
    typedef struct fact {
        uint64_t offset, bytes, part[TD_COUNT(((td_piece *)0)->part)];
        int32_t kind, N, K, from, to, as_stored, k0, scale_rows, scale_cols, zero;
    } fact;
    const td_hkey key = {0x74616e64656d2d70ull, 0x6c616e2d30303032ull};
    fact *facts = td_xalloc(p->n * sizeof *facts);
    for (size_t i = 0; i < p->n; i++) {
        const td_piece *e = &p->piece[i];
        facts[i] = (fact){.offset = e->offset, .bytes = e->bytes, .kind = (int32_t)e->kind, .N = e->N, .K = e->K,
                          .from = (int32_t)e->from, .to = (int32_t)e->to, .as_stored = e->as_stored, .k0 = e->k0,
                          .scale_rows = e->scale_rows, .scale_cols = e->scale_cols};
        for (int k = 0; k < e->n_parts; k++) facts[i].part[k] = part_digest(&e->part[k], key);
    }
    td_h128 h = td_siphash128(key, facts, p->n * sizeof *facts);
    free(facts);
    return h;
}

size_t td_plan_resident_bytes(const td_plan *p)
{
    size_t bytes = p->image_bytes;
    for (size_t i = 0; i < p->n; i++) {
        const td_piece *e = &p->piece[i];
        if (e->as_stored) bytes += (size_t)e->N * (size_t)e->K * td_dtype_bytes(e->to);
    }
    return bytes;
}

bool td_plan_uses_files(const td_plan *p)
{
    for (size_t i = 0; i < p->n; i++)
        if (p->piece[i].as_stored) return true;
    return false;
}

size_t td_plan_row_bytes(const td_plan *p)
{
    const td_route_law *law = &p->desc->moe.route;
    size_t bytes = 0, experts = 0;
    for (size_t i = 0; i < p->n; i++) {
        const td_piece *e = &p->piece[i];
        size_t n = e->as_stored ? (size_t)e->N * (size_t)e->K * td_dtype_bytes(e->to) : e->bytes;
        if (e->read == TD_READ_ALWAYS) bytes += n;
        if (e->read == TD_READ_EXPERT) experts += n;
    }
    return experts ? bytes + experts / (size_t)law->n_experts * (size_t)law->top_k : bytes;
}

void td_plan_attach(const td_plan *p, const uint8_t *image)
{
    for (size_t i = 0; i < p->n; i++) {
        const td_piece *e = &p->piece[i];
        const void *at = e->unit >= 0   ? NULL
                         : e->as_stored ? (const void *)td_piece_data(e, 0)
                                        : (const void *)(image + e->offset);
        switch (e->kind) {
        case TD_PIECE_VECTOR:
            *e->vector = at;
            break;
        case TD_PIECE_TABLE:
            *e->table = (td_table){e->N, e->K, e->to, at};
            break;
        case TD_PIECE_MATRIX:
            *e->weight = weight_of(e, at, e->weight->bias);
            break;
        }
    }
}
