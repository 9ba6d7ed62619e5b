// SPDX-License-Identifier: Apache-2.0
#include "worker/boot.h"
#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include "kernels/cuda.h"
#include "worker/ranks.h"
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_THREADS = 256, LEGS_PER_SEQ = 4, MIN_LEGS = 64, PROGRESS_US = 2 * 1000000 };

int td_boot_cores(void)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof set, &set)) return 1;
    int n = CPU_COUNT(&set);
    return n < 1 ? 1 : TD_MIN(n, MAX_THREADS);
}

/* This process's number among those of its host, as what started it says; modulo the devices that it may see. */
static int local_rank(void)
{
    static const char *const names[] = {"OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"};
    int n = td_dev_count(), rank = 0;
    for (size_t i = 0; i < TD_COUNT(names) && n > 1; i++) {
        const char *v = getenv(names[i]);
        char *end;
        long r = v && *v ? strtol(v, &end, 10) : -1;
        if (r < 0 || *end) continue;
        rank = (int)(r % n);
        break;
    }
    return rank;
}

/* Deterministic when told so, when its id is what is pinned, and where weights are sharded, which have no copies. */
static td_status open_cuda(const td_conf *c, const td_ranks *ranks, td_boot *b)
{
    bool sharded = ranks && ranks->grid.fsdp;
    td_cuda_mode mode = {.fast = !sharded && !c->deterministic && strcmp(c->numerics, TD_CUDA_NUMERICS), .check = true};
    TD_TRY(td_dev_open("cuda", c->device >= 0 ? c->device : local_rank(), &b->dev));
    TD_TRY(td_cuda_ops_open_as(b->dev, &mode, &b->ops));
    td_cuda_ops_steps(!strcmp(c->device_steps, "replay"), strcmp(c->device_steps, "apart") != 0);
    TD_INFO("device cuda:%d: %s, sm_%d, %zu MiB, %s", b->dev->index, b->dev->name, b->dev->arch, b->dev->total_bytes >> 20,
            mode.fast ? "fast" : "deterministic");
    if (sharded && !c->deterministic) TD_INFO("fully sharded weights are computed as with --deterministic");
    return TD_OK;
}

/* A pinned id. What it is, is known once the model is open: copies of weights may not fit (kernels/choose_cuda.h). */
static td_status numerics_kept(const td_conf *c, const td_boot *b)
{
    if (!c->numerics[0] || !strcmp(c->numerics, b->ops->numerics)) return TD_OK;
    return td_fail(TD_ENOSUP, "kernel family %s computes as %s, not as %s", b->ops->family, b->ops->numerics, c->numerics);
}

static void close_device(td_boot *b)
{
    if (b->dev && b->ops) td_cuda_ops_close();
    td_dev_close(b->dev);
    b->dev = NULL;
    b->ops = NULL;
}

/* One CPU family by name; with a pinned numerics id, the best family that has it. */
static td_status choose_family(const td_conf *c, const td_ops **out)
{
    const td_ops *found = NULL;
    TD_TRY(td_ops_open(c->ops, &found));
    if (c->numerics[0] && strcmp(found->numerics, c->numerics)) {
        if (strcmp(c->ops, "auto"))
            return td_fail(TD_ENOSUP, "kernel family %s computes as %s, not as %s", found->family,
                           found->numerics, c->numerics);
        TD_TRY(td_ops_open_as(c->numerics, &found));
    }
    *out = found;
    return TD_OK;
}

/* NULL: keep packed weights in memory only. */
static const char *cache_dir(const td_conf *c, char *buf, size_t n)
{
    if (!c->pack_cache) return NULL;
    if (c->cache_dir[0]) return c->cache_dir;
    const char *xdg = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    int w = -1;
    if (xdg && xdg[0] == '/') w = snprintf(buf, n, "%s/tandem", xdg);
    else if (home && home[0] == '/') w = snprintf(buf, n, "%s/.cache/tandem", home);
    return w > 0 && (size_t)w < n ? buf : NULL;
}

/* A load that takes long says how far it is every PROGRESS_US; a short one says nothing. */
static void progress(void *arg, const char *what, double fraction)
{
    int64_t *said_us = arg, now = td_now_us();
    if (now - *said_us < PROGRESS_US) return;
    *said_us = now;
    TD_INFO("model: %s, %.0f %%", what, fraction * 100);
}

/* As many pages as every rank has room for. */
static td_status agree_on_pages(const td_ranks *ranks, td_boot *b)
{
    int n = td_coll_size(ranks->world);
    int64_t mine = td_engine_choose_pages(&b->opts), *all = td_xalloc((size_t)n * sizeof *all);
    td_status s = td_coll_all_gather(ranks->world, &mine, all, sizeof mine);
    for (int i = 0; i < n; i++) mine = TD_MIN(mine, all[i]);
    free(all);
    b->opts.kv_pages = mine;
    return s;
}

/* One for each pipeline stage. A prefill worker has one more, made ahead, so that a stage that was late once delays nobody;
 * where answers are decoded it would stand before their rows. */
static int flights(const td_conf *c, const td_ranks *ranks, const td_ops *ops)
{
    int stages = ranks ? ranks->grid.pp : 1;
    if (stages == 1) return ops->dev ? 2 : 1;
    return stages + !strcmp(c->role, "prefill");
}

td_status td_boot_describe(const td_conf *c, const char *dir, td_model_desc *out)
{
    if (dir && dir[0]) return td_model_desc_read(dir, out);
    if (!strcmp(c->load_format, "dummy")) return td_model_desc_shape(c->shape, out);
    return td_refuse(TD_EBADREQ, "no model given: --model DIR, the folder with config.json (or --load-format dummy --shape NAME)");
}

static td_status open_model(const td_conf *c, const char *dir, const td_model_desc *d, int max_logits,
                            const td_ranks *ranks, td_boot *b)
{
    char cache[4096];
    int64_t said_us = td_now_us();
    td_model_opts o = {.dir = dir && dir[0] ? dir : NULL,
                       .desc = d,
                       .dummy_shape = !strcmp(c->load_format, "dummy") ? c->shape : NULL,
                       .ops = b->ops,
                       .pool = b->pool,
                       .max_rows = c->max_num_batched_tokens,
                       .max_seqs = c->max_num_seqs,
                       .max_len = c->max_model_len,
                       .page_size = c->page_size,
                       .max_logits = max_logits ? max_logits : td_engine_logit_rows(c->max_num_seqs),
                       .cache_dir = cache_dir(c, cache, sizeof cache),
                       .cache_limit = (uint64_t)c->cache_limit,
                       .progress = progress,
                       .arg = &said_us,
                       .ranks = ranks,
                       .attn_split = (int)c->attention_split,
                       .quantized = c->quantized_collectives};
    b->quantized = o.quantized;
    b->attn_split = o.attn_split;
    TD_TRY(td_model_open(&o, &b->model));
    if (b->dev) TD_TRY(numerics_kept(c, b));
    b->opts = (td_engine_opts){.model = b->model,
                               .ops = b->ops,
                               .pool = b->pool,
                               .page_size = c->page_size,
                               .kv_pages = c->kv_pages,
                               .kv_memory_bytes = c->kv_memory,
                               .max_model_len = c->max_model_len,
                               .max_batched_tokens = c->max_num_batched_tokens,
                               .max_seqs = c->max_num_seqs,
                               .max_legs = TD_MAX((int)MIN_LEGS, LEGS_PER_SEQ * c->max_num_seqs),
                               .max_prefill_chunk = c->max_prefill_chunk,
                               .prefix_cache = c->prefix_cache,
                               .max_logits = o.max_logits,
                               .ranks = ranks,
                               .depth = flights(c, ranks, b->ops),
                               .eplb_interval = (int)c->eplb_interval};
    return ranks ? agree_on_pages(ranks, b) : TD_OK;
}

/* With --ops auto a model that the fast families do not take is computed by ref. */
static td_status fall_back(const td_conf *c, const td_model_desc *d, const td_ops **ops)
{
    if (strcmp(c->ops, "auto") || c->numerics[0] || !d || td_model_fits(d, *ops)) return TD_OK;
    TD_INFO("kernel family %s does not take head dimension %d: ref is used", (*ops)->family, d->D);
    return td_ops_open("ref", ops);
}

/* With --ops auto: a model that these kernels take, in a way that they can, and whose arithmetic nobody pinned to another's. */
static bool device_serves(const td_conf *c, const td_model_desc *d, const td_boot *b)
{
    return (!d || td_model_fits(d, b->ops)) && (!c->numerics[0] || !strcmp(c->numerics, b->ops->numerics)) &&
           (!c->attention_split || c->attention_split == TD_ATTN_SPLIT);
}

/* Of the kernels that one rank may choose beside the portable ones those that all may: a check may have dropped some. Where
 * devices or versions of cuBLASLt differ, and so the names of their arithmetic, none. */
static td_status same_kernels(const td_ranks *ranks, const td_ops *ops)
{
    enum { NAME = 128 };
    int n = td_coll_size(ranks->world);
    unsigned mine = td_cuda_ops_kernels(), all = mine, *each = td_xalloc((size_t)n * sizeof *each);
    char name[NAME] = "", *names = td_xalloc((size_t)n * NAME);
    td_status s = td_coll_all_gather(ranks->world, &mine, each, sizeof mine);
    for (int i = 0; i < n; i++) all &= each[i];
    td_cuda_ops_keep(all);
    snprintf(name, sizeof name, "%s", ops->numerics);
    if (s >= 0) s = td_coll_all_gather(ranks->world, name, names, NAME);
    for (int i = 0; i < n; i++)
        if (memcmp(names, names + (size_t)i * NAME, NAME)) td_cuda_ops_keep(0);
    if (mine != td_cuda_ops_kernels()) TD_INFO("devices of other ranks differ: all compute as %s", ops->numerics);
    free(each), free(names);
    return s;
}

/* td_refuse: some rank has no such device. */
static td_status choose_device(const td_conf *c, const td_model_desc *d, td_ranks *ranks, td_boot *b)
{
    bool told = !strcmp(c->ops, "cuda"), all;
    td_status s = open_cuda(c, ranks, b);
    if (s >= 0 && told) s = numerics_kept(c, b);
    if (s >= 0 && !told && !device_serves(c, d, b)) s = td_refuse(TD_ENOSUP, "not for this model");
    all = s >= 0;
    if (ranks) TD_TRY(td_ranks_all(ranks->world, s >= 0, &all)); /* every rank, or none */
    if (s >= 0 && !all) s = td_refuse(TD_ENOSUP, "another rank has no device that can serve");
    if (s >= 0 && ranks) s = same_kernels(ranks, b->ops);
    if (s >= 0 && told) s = numerics_kept(c, b);
    return s >= 0 && ranks ? td_ranks_device(ranks, b->dev) : s;
}

/* Hosts of one worker may differ, and with them what `auto` finds: amx computes otherwise than the families beside it. */
static td_status compute_alike(const td_ranks *ranks, const td_ops *ops)
{
    char text[128];
    snprintf(text, sizeof text, "numerics: %s\n", ops->numerics);
    return td_ranks_agree(ranks->world, text);
}

/* d: the model's; NULL: there is none. */
static td_status choose_ops(const td_conf *c, const td_model_desc *d, td_ranks *ranks, td_boot *b)
{
    td_ranks *many = ranks && td_grid_ranks(&ranks->grid) > 1 ? ranks : NULL;
    if (!strcmp(c->ops, "cuda")) return choose_device(c, d, many, b);
    if (!strcmp(c->ops, "auto")) {
        if (choose_device(c, d, many, b) >= 0) return TD_OK;
        TD_DEBUG_LOG("kernels of this CPU are used: %s", td_reason());
        close_device(b);
    }
    TD_TRY(choose_family(c, &b->ops));
    TD_TRY(fall_back(c, d, &b->ops));
    return many ? compute_alike(many, b->ops) : TD_OK;
}

void td_boot_numerics(const td_boot *b, char *out, size_t n)
{
    const td_ranks *r = b->opts.ranks;
    char split[32] = "", tp[32] = "", quantized[32] = "";
    if (b->attn_split != TD_ATTN_SPLIT) snprintf(split, sizeof split, "-split%d", b->attn_split);
    if (r && r->grid.tp > 1 && !td_grid_tree(&r->grid, td_model_descr(b->model))) snprintf(tp, sizeof tp, "-tp%d", r->grid.tp);
    if (r && r->grid.tp > 1 && b->quantized) snprintf(quantized, sizeof quantized, "-q8tp%d", r->grid.tp);
    snprintf(out, n, "%s%s%s%s", b->ops->numerics, split, tp, quantized);
}

td_status td_boot_open(const td_conf *c, const char *dir, int max_logits, td_ranks *ranks, td_boot *out)
{
    td_boot b = {0};
    td_model_desc *own = NULL;
    const td_model_desc *d = ranks ? ranks->desc : NULL;
    td_status s = TD_OK;
    if (!d) {
        d = own = td_xalloc(sizeof *own);
        s = td_boot_describe(c, dir, own);
    }
    if (s >= 0) s = choose_ops(c, d, ranks, &b);
    if (s >= 0) {
        b.pool = td_pool_open(c->threads ? c->threads : td_boot_cores());
        s = open_model(c, dir, d, max_logits, ranks, &b);
    }
    free(own);
    if (s < 0) {
        td_boot_close(&b);
        return s;
    }
    TD_INFO("model %s, kernels %s, %d threads", td_model_descr(b.model)->arch, b.ops->family,
            td_pool_size(b.pool));
    *out = b;
    return TD_OK;
}

td_status td_boot_ops(const td_conf *c, td_boot *out)
{
    td_boot b = {0};
    td_status s = choose_ops(c, NULL, NULL, &b);
    if (s < 0) {
        td_boot_close(&b);
        return s;
    }
    b.pool = td_pool_open(c->threads ? c->threads : td_boot_cores());
    *out = b;
    return TD_OK;
}

void td_boot_close(td_boot *b)
{
    td_model_close(b->model);
    if (b->pool) td_pool_close(b->pool);
    close_device(b);
    *b = (td_boot){0};
}
