// SPDX-License-Identifier: Apache-2.0
#include "worker/rank.h"
#include "common/check.h"
#include "common/log.h"
#include "worker/boot.h"
#include "common/chan.h"
#include "worker/kvpool.h"
#include "worker/mirror.h"
#include "worker/profile.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

td_grid td_rank_grid(const td_conf *c)
{
    return (td_grid){.tp = c->tensor_parallel_size, .pp = c->pipeline_parallel_size, .cp = c->context_parallel_size,
                     .dp = c->data_parallel_size, .ep = c->expert_parallel, .fsdp = c->fully_sharded,
                     .redundant = c->expert_parallel ? (int)c->redundant_experts : 0};
}

static td_status describe(const td_conf *c, td_model_desc *d)
{
    bool dummy = c->load_format[0] == 'd';
    return dummy && !c->model[0] ? td_model_desc_shape(c->shape, d) : td_model_desc_read(c->model, d);
}

/* What must be the same everywhere, one line each. */
static td_status agree(const td_conf *c, td_coll *world, const td_model_desc *d)
{
    char text[4096];
    snprintf(text, sizeof text,
             "build: %s\nmodel: %s\nconfig.json: %016llx\nrole: %s\nload-format: %s\nshape: %s\nops: %s\nnumerics: %s\n"
             "tensor-parallel-size: %d\npipeline-parallel-size: %d\ncontext-parallel-size: %d\ndata-parallel-size: %d\n"
             "expert-parallel: %d\nredundant-experts: %d\nfully-sharded: %d\nquantized-collectives: %d\nattention-split: %d\npage-size: %d\n"
             "kv-pages: %lld\nkv-memory: %lld\nmax-model-len: %lld\nmax-num-batched-tokens: %d\nmax-num-seqs: %d\n"
             "max-prefill-chunk: %d\nseed: %llu\n",
             TD_VERSION, c->model, (unsigned long long)d->digest.lo, c->role, c->load_format, c->shape, c->ops, c->numerics,
             (int)c->tensor_parallel_size, (int)c->pipeline_parallel_size, (int)c->context_parallel_size,
             (int)c->data_parallel_size, c->expert_parallel, (int)c->redundant_experts, c->fully_sharded, c->quantized_collectives, (int)c->attention_split,
             (int)c->page_size, (long long)c->kv_pages, (long long)c->kv_memory, (long long)c->max_model_len,
             (int)c->max_num_batched_tokens, (int)c->max_num_seqs, (int)c->max_prefill_chunk, (unsigned long long)c->seed);
    return td_ranks_agree(world, text);
}

/* Layers are dealt by measured time: rank 0 measures while the others wait, and all take its figure. */
static td_status measure_head(const td_conf *c, td_coll *world, const td_model_desc *d, td_grid *grid)
{
    const td_ops *ops;
    int cost = 0;
    if (td_coll_rank(world) == 0 && grid->tp <= d->H && td_ops_open(c->ops, &ops) == TD_OK) {
        td_pool *pool = td_pool_open(c->threads ? (int)c->threads : td_boot_cores());
        cost = td_profile_head_cost(pool, ops, d, grid->tp);
        td_pool_close(pool);
        TD_INFO("the output matrix takes as long as %d.%d layers", cost / 10, cost % 10);
    }
    TD_TRY(td_coll_bcast(world, &cost, sizeof cost, 0));
    grid->head_cost = cost;
    return TD_OK;
}

/* Hand-offs know one replica's ranks: where requests change workers, replicas are workers of their own. */
static td_status may_replicate(const td_conf *c)
{
    if (c->data_parallel_size > 1 && strcmp(c->role, "mixed"))
        return td_fail(TD_EBADREQ, "data-parallel-size %d: only for role mixed, this is %s; start more workers instead",
                       (int)c->data_parallel_size, c->role);
    return TD_OK;
}

td_status td_rank_open(const td_conf *c, int *argc, char ***argv, td_ranks *out)
{
    td_grid grid = td_rank_grid(c);
    td_model_desc d;
    td_coll *world;
    TD_TRY(td_coll_mpi_open(argc, argv, &world));
    td_coll_deadline(world, (int64_t)TD_RANK_MEET_MS * 1000);
    td_status s = may_replicate(c);
    if (s >= 0) s = describe(c, &d);
    if (s >= 0) s = agree(c, world, &d);
    if (s >= 0 && grid.pp > 1) s = measure_head(c, world, &d, &grid);
    if (s >= 0) s = td_grid_check(&grid, &d);
    if (s >= 0) s = td_ranks_open(world, &grid, out);
    if (s < 0) {
        /* All find the same fault, or this one alone, which the others must hear of. */
        td_coll_abort(world, td_reason());
        return s;
    }
    TD_INFO("rank %d of %d: tensor %d, pipeline %d, context %d, data %d", grid.rank = out->grid.rank, td_grid_ranks(&grid), out->at.tp,
            out->at.pp, out->at.cp, out->at.dp);
    td_ranks_deadline(out, 0); /* loading and steps take what they take: that the ranks are alive is told by beats */
    return TD_OK;
}

void td_rank_close(td_ranks *r)
{
    td_coll *world = r->world;
    if (!world) return;
    td_ranks_close(r);
    td_coll_close(world);
}

td_status td_rank_beat(const td_conf *c, td_ranks *r, td_zctx *z, const td_curve *curve, td_beat **out)
{
    enum { BYTES = 256 };
    char where[BYTES] = "", bound[BYTES] = "";
    const char *bulk = c->bulk_bind, *colon = strrchr(bulk, ':');
    /* Beside the bulk sockets: a port of its own on their address, or a path beside theirs. */
    if (!strncmp(bulk, "ipc:", 4)) snprintf(where, sizeof where, "%s.beat", bulk);
    else if (colon) snprintf(where, sizeof where, "%.*s:*", (int)(colon - bulk), bulk);
    else return td_fail(TD_EBADREQ, "bulk-bind %s is no endpoint", bulk);
    td_beat_opts o = {.z = z, .rank = r->grid.rank, .n_ranks = td_coll_size(r->world), .curve = curve,
                      .timeout_us = (int64_t)c->rank_timeout_ms * 1000};
    td_status s = TD_OK;
    o.endpoint = where;
    if (o.rank == 0) {
        s = td_beat_open(&o, bound, sizeof bound, out);
        if (s < 0) td_coll_abort(r->world, td_reason());
    }
    td_ship_reachable(bound, where, sizeof where);
    if (s >= 0) s = td_coll_bcast(r->world, where, sizeof where, 0);
    return s < 0 || o.rank == 0 ? s : td_beat_open(&o, NULL, 0, out);
}

td_status td_rank_incarnation(td_ranks *r, uint64_t *incarnation)
{
    return td_coll_bcast(r->world, incarnation, sizeof *incarnation, 0);
}

td_status td_rank_endpoints(td_ranks *r, const td_ship_grid *grid, const char *mine, td_buf *out)
{
    enum { BYTES = 256 };
    int n = td_coll_size(r->world);
    char own[BYTES] = "", *all = td_xalloc((size_t)n * BYTES);
    const char *end[TD_SHIP_MAX_RANKS];
    snprintf(own, sizeof own, "%s", mine);
    td_status s = td_coll_all_gather(r->world, own, all, BYTES);
    for (int i = 0; i < TD_MIN(n, (int)TD_SHIP_MAX_RANKS); i++) end[i] = all + (size_t)i * BYTES;
    if (s >= 0 && out && mine[0]) s = td_ship_ranks(grid, end, out);
    free(all);
    return s;
}

/* A place of its own for each rank's socket: ipc paths get a suffix, fixed ports count up. */
static void bind_of(const char *bulk_bind, int rank, char *out, size_t n)
{
    const char *colon = strrchr(bulk_bind, ':');
    int port = colon && !strncmp(bulk_bind, "tcp:", 4) ? atoi(colon + 1) : 0;
    if (!strncmp(bulk_bind, "ipc:", 4)) snprintf(out, n, "%s.%d", bulk_bind, rank);
    else if (port > 0) snprintf(out, n, "%.*s:%d", (int)(colon - bulk_bind), bulk_bind, port + rank);
    else snprintf(out, n, "%s", bulk_bind);
}

typedef struct other { /* a rank that is not 0 */
    td_boot boot;
    td_kv kv[TD_MAX_GROUPS];
    td_zctx *z;
    td_curve curve;
    td_ship *ship;
    td_mirror *mirror;
    td_beat *beat;
    int wake_fd;
} other;

static td_status open_ship(const td_conf *c, td_ranks *r, other *o)
{
    td_ship_grid grid = td_ship_grid_of(&r->grid, (uint32_t)c->attention_split);
    char where[300], endpoint[256] = "";
    uint64_t incarnation = 0;
    TD_TRY(td_rank_incarnation(r, &incarnation));
    bool keys = c->curve_secret_file[0], receives = strcmp(c->role, "prefill");
    bind_of(c->bulk_bind, r->grid.rank, where, sizeof where);
    o->wake_fd = td_wake_open();
    /* Hand-offs know the ranks of one replica (may_replicate): a rank's place among them. */
    uint32_t place = (uint32_t)(r->grid.rank % (r->grid.tp * r->grid.cp * r->grid.pp));
    td_ship_opts so = {.z = o->z, .desc = td_model_descr(o->boot.model), .grid = &grid, .rank = place,
                       .incarnation = incarnation, .bulk_bind = receives ? where : NULL, .curve = keys ? &o->curve : NULL,
                       .max_keys = (uint32_t)o->boot.opts.max_legs, .timeout_us = (int64_t)c->ship_timeout_ms * 1000,
                       .wake_fd = o->wake_fd};
    for (int g = 0; g < so.desc->n_groups; g++) so.kv[g] = &o->kv[g];
    TD_TRY(td_ship_open(&so, &o->ship));
    td_ship_advertised(o->ship, c->bulk_advertise, endpoint, sizeof endpoint);
    o->mirror = td_mirror_open(o->ship, so.desc, r->grid.rank, r->grid.layer0[r->at.pp], r->grid.layer0[r->at.pp + 1], so.max_keys);
    return td_rank_endpoints(r, &grid, endpoint, NULL);
}

static td_status serve(const td_conf *c, td_ranks *r, other *o)
{
    bool keys = c->curve_secret_file[0];
    if (keys) TD_TRY(td_curve_load(&o->curve, c->curve_secret_file, c->curve_public_file[0] ? c->curve_public_file : NULL));
    o->z = td_zctx_open();
    TD_TRY(td_rank_beat(c, r, o->z, keys ? &o->curve : NULL, &o->beat));
    TD_TRY(td_boot_open(c, c->model, 0, r, &o->boot));
    const td_engine_opts *e = &o->boot.opts;
    td_exec *x;
    TD_TRY(td_kvmem_open(td_model_groups(o->boot.model), td_model_descr(o->boot.model)->n_groups, (int)e->kv_pages, e->page_size,
                         o->boot.ops->kv_dtype, o->kv));
    TD_TRY(open_ship(c, r, o));
    td_exec_opts xo = {.model = o->boot.model, .ops = o->boot.ops, .pool = o->boot.pool, .ranks = r, .depth = 1,
                       .max_rows = e->max_batched_tokens, .max_logits = e->max_logits, .kv = o->kv, .on_layer = td_mirror_on_layer,
                       .on_command = td_mirror_on_command, .on_poll = td_mirror_on_poll, .arg = o->mirror};
    TD_TRY(td_exec_open(&xo, &x));
    td_status s = td_exec_serve(x);
    td_exec_close(x);
    return s;
}

td_status td_rank_serve(const td_conf *c, td_ranks *r)
{
    other o = {.wake_fd = -1};
    td_status s = serve(c, r, &o);
    if (s < 0) td_coll_abort(r->world, td_reason());
    td_beat_close(o.beat); /* the others need not wait for this rank to give its memory back */
    td_ship_close(o.ship);
    td_mirror_close(o.mirror);
    if (o.boot.model) td_kvmem_close(td_model_groups(o.boot.model), td_model_descr(o.boot.model)->n_groups, o.kv);
    td_boot_close(&o.boot);
    if (o.z) td_zctx_close(o.z);
    if (o.wake_fd >= 0) close(o.wake_fd);
    return s;
}
