// SPDX-License-Identifier: Apache-2.0
#include "worker/rank.h"
#include "common/build.h"
#include "common/check.h"
#include "common/log.h"
#include "worker/kvpool.h"
#include "worker/profile.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

td_grid td_rank_grid(const td_conf *c)
{
    return (td_grid){.tp = c->tensor_parallel_size, .pp = c->pipeline_parallel_size, .cp = c->context_parallel_size,
                     .dp = c->data_parallel_size, .ep = c->expert_parallel, .fsdp = c->fully_sharded,
                     .redundant = c->expert_parallel ? (int)c->redundant_experts : 0};
}

/* What must be the same everywhere, one line each: what computes, on what, and every option that is not a place's
 * own. */
static td_status agree(const td_conf *c, td_coll *world, const td_model_desc *d)
{
    enum { TEXT = 16384 };
    char *text = td_xalloc(TEXT);
    int n =
        snprintf(text, TEXT, "build: %s\nmodel: %s, %d layers, config.json %016llx\nkeys: %s\n", td_build(),
                 d->arch, d->L, (unsigned long long)d->digest.lo, c->curve_secret_file[0] ? "yes" : "none");
    TD_CHECK(n > 0 &&
             td_conf_to_text(c, TD_CONF_WORKER | TD_CONF_BENCH_ENGINE, text + n, (size_t)(TEXT - n)));
    td_status s = td_ranks_agree(world, text);
    free(text);
    return s;
}

td_status td_rank_alone(const td_conf *c)
{
    td_grid g = td_rank_grid(c);
    const char *size = getenv("OMPI_COMM_WORLD_SIZE"), *rank = getenv("OMPI_COMM_WORLD_RANK");
    if (td_grid_ranks(&g) > 1 || !size || atoi(size) <= 1) return TD_OK;
    return td_fail(TD_EBADREQ,
                   "this is rank %s of %s that mpirun started, but its sizes are those of one rank: tensor 1 "
                   "x pipeline 1 x "
                   "context 1 x data 1 (a worker of its own inside an MPI job: `tandem launch-worker`)",
                   rank ? rank : "?", size);
}

typedef struct head_call { const td_conf *c; const td_model_desc *d; const td_grid *grid; } head_call;

static int head_cost(void *arg)
{
    const head_call *h = arg;
    const td_ops *ops;
    if (h->grid->tp > h->d->H || td_ops_open(h->c->ops, &ops) != TD_OK) return 0;
    td_pool *pool = td_pool_open(h->c->threads ? (int)h->c->threads : td_boot_cores());
    int cost = td_profile_head_cost(pool, ops, h->d, h->grid->tp);
    td_pool_close(pool);
    TD_INFO("the output matrix takes as long as %d.%d layers", cost / 10, cost % 10);
    return cost;
}

/* Layers are dealt by measured time: rank 0 measures while the others wait, and all take its figure. A large model on a slow
 * machine takes longer than ranks may take to meet. */
static td_status measure_head(const td_conf *c, td_coll *world, const td_model_desc *d, td_grid *grid)
{
    head_call call = {c, d, grid};
    int cost = 1;
    if (strcmp(c->role, "prefill")) TD_TRY(td_ranks_compute(world, head_cost, &call, TD_RANK_MEET_MS * 1000 / 10, &cost));
    grid->head_cost = cost; /* prefill: few rows of many need it */
    return TD_OK;
}

td_status td_rank_open(const td_conf *c, int *argc, char ***argv, td_ranks *out)
{
    td_grid grid = td_rank_grid(c);
    td_model_desc *d = td_xalloc(sizeof *d);
    td_coll *world = NULL;
    td_status s = td_coll_mpi_open(argc, argv, &world);
    if (s >= 0) td_coll_deadline(world, (int64_t)TD_RANK_MEET_MS * 1000);
    if (s >= 0) s = td_boot_describe(c, c->model, d);
    if (s >= 0) s = agree(c, world, d);
    if (s >= 0 && grid.pp > 1) s = measure_head(c, world, d, &grid);
    if (s >= 0) s = td_grid_check(&grid, d);
    if (s >= 0) s = td_ranks_open(world, &grid, out);
    if (s < 0) {
        /* All find the same fault, or this one alone, which the others must hear of. */
        if (world) td_coll_abort(world, td_reason_take());
        free(d);
        return s;
    }
    out->desc = d;
    TD_INFO("rank %d of %d: tensor %d, pipeline %d, context %d, data %d", grid.rank = out->grid.rank, td_grid_ranks(&grid), out->at.tp,
            out->at.pp, out->at.cp, out->at.dp);
    td_ranks_deadline(out, 0); /* loading and steps take what they take: that the ranks are alive is told by beats */
    return TD_OK;
}

void td_rank_close(td_ranks *r)
{
    td_coll *world = r->world;
    if (!world) return;
    free(r->desc);
    td_ranks_close(r);
    td_coll_close(world);
}

static td_status serve(const td_conf *c, td_ranks *r, const td_rank_hooks *h, td_rank_self *self)
{
    TD_TRY(td_boot_open(c, c->model, 0, r, &self->boot));
    const td_boot *b = &self->boot;
    const td_engine_opts *e = &b->opts;
    td_exec *x;
    TD_TRY(td_kvmem_open(b->dev, td_model_groups(b->model), td_model_descr(b->model)->n_groups, (int)e->kv_pages, e->page_size,
                         b->ops->kv_dtype, self->kv));
    td_exec_opts xo = {.model = b->model, .ops = b->ops, .pool = b->pool, .ranks = r, .depth = 1, .max_rows = e->max_batched_tokens,
                       .max_logits = e->max_logits, .kv = self->kv, .arg = h->arg};
    TD_TRY(h->opened(h->arg, self, &xo));
    TD_TRY(td_exec_open(&xo, &x));
    td_status s = td_exec_serve(x);
    td_exec_close(x);
    return s;
}

td_status td_rank_serve(const td_conf *c, td_ranks *r, const td_rank_hooks *h)
{
    td_rank_self self = {.conf = c, .ranks = r};
    td_status s = serve(c, r, h, &self);
    if (s < 0) td_coll_abort(r->world, td_reason());
    if (h->closing) h->closing(h->arg);
    if (self.boot.model) td_kvmem_close(self.boot.dev, td_model_groups(self.boot.model), td_model_descr(self.boot.model)->n_groups, self.kv);
    td_boot_close(&self.boot);
    return s;
}
