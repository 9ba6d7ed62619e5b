/* worker/engine_open.c - an engine comes and goes: how many pages there are, tables, replicas, steps in
 * flight. */
// SPDX-License-Identifier: Apache-2.0
#include "common/check.h"
#include "kernels/dev.h"
#include "worker/engine_int.h"
#include "worker/ranks.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static size_t bytes_per_page(const td_engine_opts *o, const td_model_desc *d)
{
    size_t sum = 0;
    const td_group_desc *group = td_model_groups(o->model);
    for (int g = 0; g < d->n_groups; g++) {
        td_kv kv = {.dtype = o->ops->kv_dtype, .P = o->page_size, .G = group[g].G, .D = group[g].D};
        sum += td_kv_page_bytes(&kv) * (size_t)group[g].n_slots;
    }
    return sum;
}

enum { DEVICE_MARGIN = 1 << 30 };

/* What pages may take: of this host a quarter of what the model's workspaces leave; of a device, whose
 * workspaces have been reserved, all but the logits and a margin: an eighth of what is left, at most 1 GiB.
 */
static int64_t free_memory(const td_engine_opts *o, const td_model_desc *d)
{
    td_dev *dev = o->ops->dev;
    size_t left = 0, logits = (size_t)o->max_logits * (size_t)d->V * sizeof(float);
    if (!dev)
        return TD_MAX((int64_t)sysconf(_SC_AVPHYS_PAGES) * sysconf(_SC_PAGESIZE) -
                          (int64_t)td_model_workspace_bytes(o->model),
                      0) /
               4;
    if (dev->free_bytes(dev, &left) < 0 || left < logits) return 0;
    left -= logits;
    return (int64_t)TD_MIN(left - TD_MIN(left / 8, (size_t)DEVICE_MARGIN), (size_t)INT64_MAX);
}

/* Pages per group: as told; else from the memory told; else from what is free now, but no more than
 * could ever be used. */
int64_t td_engine_choose_pages(const td_engine_opts *o)
{
    const td_model_desc *d = td_model_descr(o->model);
    if (o->kv_pages > 0) return o->kv_pages;
    int64_t page = (int64_t)bytes_per_page(o, d), memory = o->kv_memory_bytes;
    int64_t len = o->max_model_len > 0 ? o->max_model_len : d->max_positions;
    td_kvmap map = td_model_kvmap(o->model);
    int64_t useful = ((int64_t)td_kvmap_most(map, (uint32_t)len) / o->page_size + 2) * TD_MAX(o->max_seqs, 1);
    if (memory > 0) return page ? memory / page : useful;
    memory = free_memory(o, d);
    if (o->ranks) memory /= td_grid_ranks(&o->ranks->grid); /* they may all be on this host */
    if (page == 0) return useful;                           /* a stage without layers of any group */
    return TD_MIN(memory / page, useful);
}

/* How many tokens so many pages surely hold. */
int64_t td_engine_tokens_of(const td_engine_opts *o, int64_t pages)
{
    td_kvmap m = td_model_kvmap(o->model);
    int64_t local = pages * o->page_size;
    return m.ranks > 1 ? local / m.split * m.split * m.ranks + local % m.split : local;
}

static void open_tables(td_engine *e)
{
    const td_engine_opts *o = &e->o;
    uint32_t seqs = (uint32_t)o->max_seqs;
    e->leg = td_xalloc(((size_t)o->max_legs + (size_t)seqs * (size_t)e->depth) * sizeof *e->leg);
    td_map_init(&e->by_key, (size_t)o->max_legs);
    e->cand = td_xalloc(seqs * sizeof *e->cand);
    e->sched = td_xalloc(seqs * sizeof *e->sched);
    e->ids = td_xalloc(((size_t)e->max_len + 1) * sizeof *e->ids);
    e->blocked.changes = UINT64_MAX;
    e->flight = td_xalloc((size_t)(e->depth + 1) * sizeof *e->flight);
    for (int i = 0; i <= e->depth; i++) {
        td_engine_flight *f = &e->flight[i];
        f->item = td_xalloc(seqs * sizeof *f->item);
        f->cap_draw = seqs + (uint32_t)e->max_logits;
        f->draw = td_xalloc(f->cap_draw * sizeof *f->draw);
        f->res = td_xalloc(f->cap_draw * sizeof *f->res);
        f->build = td_xalloc(e->n_replicas * sizeof *f->build);
        f->step = td_xalloc(e->n_replicas * sizeof *f->step);
        f->logits = td_xalloc(e->n_replicas * sizeof *f->logits);
        for (uint32_t r = 0; r < e->n_replicas; r++)
            f->build[r] = td_step_build_open(e->desc->n_groups, o->page_size, td_model_kvmap(o->model));
    }
}

static void close_flights(td_engine *e)
{
    for (int i = 0; e->flight && i <= e->depth; i++) {
        td_engine_flight *f = &e->flight[i];
        for (uint32_t r = 0; f->build && r < e->n_replicas; r++) td_step_build_close(f->build[r]);
        free(f->item), free(f->draw), free(f->res), free(f->build), free(f->step), free(f->logits);
    }
    free(e->flight);
}

/* Copy on write is part of the step that is being planned, so that every rank does it at the same point. */
static void copy_page(void *arg, int group, int32_t from, int32_t to)
{
    const td_engine_replica *r = arg;
    r->engine->copies++;
    td_step_build_copy(td_engine_flight_at(r->engine, r->engine->n_flights)->build[r->index], group, from,
                       to);
}

static void layer_written(void *arg, const td_step *step, int layer)
{
    td_engine *e = arg;
    if (e->on_kv) td_engine_layer_written(e, step, layer);
}

static td_status open_exec(td_engine *e)
{
    td_kv kv[TD_MAX_GROUPS];
    for (int g = 0; g < e->desc->n_groups; g++) kv[g] = *td_kvpool_kv(td_engine_any_pool(e), g);
    td_exec_opts x = {.model = e->o.model,
                      .ops = e->o.ops,
                      .pool = e->o.pool,
                      .ranks = e->o.ranks,
                      .depth = e->depth,
                      .max_rows = e->o.max_batched_tokens,
                      .max_logits = e->max_logits,
                      .balance_steps = e->o.eplb_interval,
                      .kv = kv,
                      .on_layer = layer_written,
                      .arg = e};
    return td_exec_open(&x, &e->exec);
}

/* The books of every replica's pages, and memory for those of this rank's own. */
static td_status open_replicas(td_engine *e, td_kvpool_opts k)
{
    e->replica = td_xalloc(e->n_replicas * sizeof *e->replica);
    for (uint32_t r = 0; r < e->n_replicas; r++) {
        e->replica[r] = (td_engine_replica){.engine = e, .index = r};
        k.copy_arg = &e->replica[r];
        for (int g = 0; g < k.n_groups && r; g++)
            k.group[g].n_slots = 0; /* that replica's ranks have the memory */
        TD_TRY(td_kvpool_open(&k, &e->replica[r].pool));
    }
    return TD_OK;
}

static void close_replicas(td_engine *e)
{
    for (uint32_t r = 0; e->replica && r < e->n_replicas; r++) td_kvpool_close(e->replica[r].pool);
    free(e->replica);
}

/* With what would fit. */
static td_status too_few_pages(const td_engine_opts *o, int64_t pages, int64_t least)
{
    size_t page = bytes_per_page(o, td_model_descr(o->model));
    long long len = (long long)(pages - 2) * o->page_size;
    char fits[64] = "";
    if (len > 0 && pages < least) snprintf(fits, sizeof fits, "; --max-model-len %lld would fit", len);
    return td_fail(TD_EFULL,
                   "%lld KV pages of %d tokens: at least %lld (%lld MiB) are needed for one sequence%s",
                   (long long)pages, o->page_size, (long long)least,
                   (long long)(((size_t)least * page >> 20) + 1), fits);
}

/* The kernel hands out memory that it does not have, and ends the process when it is used. */
static td_status check_memory(const td_engine_opts *o, int64_t pages)
{
    int64_t page = (int64_t)bytes_per_page(o, td_model_descr(o->model)), all = sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE);
    if (o->ops->dev || all <= 0 || !page || pages <= all / page) return TD_OK;
    return td_fail(TD_EFULL, "%lld KV pages of %d tokens take %.1f GiB, this machine has %.1f GiB", (long long)pages, o->page_size,
                   (double)pages * (double)page / (1 << 30), (double)all / (1 << 30));
}

td_status td_engine_open(const td_engine_opts *o, td_engine **out)
{
    const td_model_desc *d = td_model_descr(o->model);
    if (o->max_seqs < 1 || o->max_legs < 1 || o->max_batched_tokens < 1)
        return td_fail(TD_EBADREQ, "max_seqs, max_legs and max_batched_tokens must be at least 1");
    if (o->max_model_len > d->max_positions)
        return td_fail(TD_EBADREQ, "--max-model-len %d: the model has %d positions (max_position_embeddings)", o->max_model_len, d->max_positions);
    td_engine *e = td_xalloc(sizeof *e);
    e->o = *o;
    e->desc = d;
    e->max_logits = o->max_logits > 0 ? o->max_logits : td_engine_logit_rows(o->max_seqs);
    e->depth = o->depth > 0 ? o->depth : 1;
    e->n_replicas = o->ranks ? (uint32_t)o->ranks->grid.dp : 1;
    e->ahead = e->depth > 1 && td_exec_knows_draws(o->ops, o->ranks);
    int64_t pages = td_engine_choose_pages(o);
    td_kvmap map = td_model_kvmap(o->model);
    int64_t least = td_kvmap_most(map, (uint32_t)TD_MAX(o->max_model_len, 2)) / (uint32_t)o->page_size + 2;
    if (map.ranks > 1 && map.split % (uint32_t)o->page_size) {
        free(e);
        return td_fail(
            TD_EBADREQ,
            "page size %d does not divide the attention splits of %u keys that context parallel ranks keep",
            o->page_size, map.split);
    }
    td_status s = check_memory(o, pages);
    if (s >= 0 && pages > INT32_MAX) s = td_fail(TD_EFULL, "%lld KV pages: at most %d can be counted", (long long)pages, INT32_MAX);
    if (s >= 0 && pages < TD_MAX(least, 3)) s = too_few_pages(o, pages, TD_MAX(least, 3));
    if (s < 0) {
        free(e);
        return s;
    }
    e->max_len = (int)TD_MIN((int64_t)d->max_positions, td_engine_tokens_of(o, pages - 1));
    if (o->max_model_len > 0) e->max_len = TD_MIN(e->max_len, o->max_model_len);
    td_kvpool_opts k = {.n_groups = d->n_groups,
                        .page_size = o->page_size,
                        .n_pages = (int)pages,
                        /* a held leg keeps its trunk; an ended one all it has in flight */
                        .max_seqs = o->max_seqs * (e->depth + 1) + o->max_legs,
                        .max_pages_per_seq = (int)td_kvmap_most(map, (uint32_t)e->max_len) / o->page_size + 2,
                        .kv_dtype = o->ops->kv_dtype,
                        .dev = o->ops->dev,
                        .prefix_cache = o->prefix_cache,
                        .hash_key = o->hash_key,
                        .copy = copy_page};
    k.kvmap = td_model_kvmap(o->model);
    memcpy(k.group, td_model_groups(o->model), sizeof k.group);
    s = open_replicas(e, k);
    if (s < 0) {
        close_replicas(e);
        free(e);
        return s;
    }
    open_tables(e);
    s = open_exec(e);
    if (s < 0) {
        td_engine_close(e);
        return s;
    }
    *out = e;
    return TD_OK;
}

void td_engine_close(td_engine *e)
{
    if (!e) return;
    while (e->n_leg) {
        td_seq *q = e->leg[e->n_leg - 1];
        for (uint32_t c = 0; c < q->d.sampling.n; c++)
            td_kvseq_release(td_engine_pool(e, q), &q->choice[c].kv);
        td_seq_close(q);
        e->n_leg--;
    }
    for (int i = 0; i < 2; i++) {
        td_engine_news *n = &e->news[i];
        td_engine_news_reset(n);
        free(n->tokens), free(n->prompt), free(n->end), free(n->token), free(n->sample), free(n->scores),
            free(n->reason);
    }
    td_exec_close(e->exec);
    close_flights(e);
    close_replicas(e);
    td_map_deinit(&e->by_key);
    free(e->leg), free(e->cand), free(e->sched), free(e->ids);
    free(e);
}
