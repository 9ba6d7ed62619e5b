// SPDX-License-Identifier: Apache-2.0
#include "worker/rank.h"
#include "common/check.h"
#include "common/log.h"
#include "worker/boot.h"
#include "worker/kvpool.h"
#include <stdio.h>
#include <stdlib.h>

td_grid td_rank_grid(const td_conf *c)
{
    return (td_grid){.tp = c->tensor_parallel_size, .pp = c->pipeline_parallel_size, .cp = c->context_parallel_size,
                     .dp = c->data_parallel_size, .ep = c->expert_parallel, .fsdp = c->fully_sharded};
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
             "expert-parallel: %d\nfully-sharded: %d\nquantized-collectives: %d\nattention-split: %d\npage-size: %d\n"
             "kv-pages: %lld\nkv-memory: %lld\nmax-model-len: %lld\nmax-num-batched-tokens: %d\nmax-num-seqs: %d\n"
             "max-prefill-chunk: %d\nseed: %llu\n",
             TD_VERSION, c->model, (unsigned long long)d->digest.lo, c->role, c->load_format, c->shape, c->ops, c->numerics,
             (int)c->tensor_parallel_size, (int)c->pipeline_parallel_size, (int)c->context_parallel_size,
             (int)c->data_parallel_size, c->expert_parallel, c->fully_sharded, c->quantized_collectives, (int)c->attention_split,
             (int)c->page_size, (long long)c->kv_pages, (long long)c->kv_memory, (long long)c->max_model_len,
             (int)c->max_num_batched_tokens, (int)c->max_num_seqs, (int)c->max_prefill_chunk, (unsigned long long)c->seed);
    return td_ranks_agree(world, text);
}

td_status td_rank_open(const td_conf *c, int *argc, char ***argv, td_ranks *out)
{
    td_grid grid = td_rank_grid(c);
    td_model_desc d;
    td_coll *world;
    TD_TRY(td_coll_mpi_open(argc, argv, &world));
    td_coll_deadline(world, (int64_t)TD_RANK_MEET_MS * 1000);
    td_status s = describe(c, &d);
    if (s >= 0) s = agree(c, world, &d);
    if (s >= 0) s = td_grid_check(&grid, &d);
    if (s >= 0) s = td_ranks_open(world, &grid, out);
    if (s < 0) {
        /* All find the same fault, or this one alone, which the others must hear of. */
        td_coll_abort(world, td_reason());
        return s;
    }
    TD_INFO("rank %d of %d: tensor %d, pipeline %d, context %d, data %d", grid.rank = out->grid.rank, td_grid_ranks(&grid), out->at.tp,
            out->at.pp, out->at.cp, out->at.dp);
    td_ranks_deadline(out, 0); /* loading takes what it takes; a rank that fails ends all */
    return TD_OK;
}

void td_rank_close(td_ranks *r)
{
    td_coll *world = r->world;
    if (!world) return;
    td_ranks_close(r);
    td_coll_close(world);
}

td_status td_rank_serve(const td_conf *c, td_ranks *r)
{
    td_boot b;
    td_exec *x = NULL;
    td_kv kv[TD_MAX_GROUPS] = {0};
    TD_TRY(td_boot_open(c, c->model, 0, r, &b));
    const td_group_desc *group = td_model_groups(b.model);
    int n = td_model_descr(b.model)->n_groups;
    td_status s = td_kvmem_open(group, n, (int)b.opts.kv_pages, b.opts.page_size, b.ops->kv_dtype, kv);
    td_exec_opts o = {.model = b.model, .ops = b.ops, .pool = b.pool, .ranks = r, .depth = 1, .max_rows = b.opts.max_batched_tokens,
                      .max_logits = b.opts.max_logits, .kv = kv};
    if (s >= 0) s = td_exec_open(&o, &x);
    if (s >= 0) s = td_coll_barrier(r->world); /* all are loaded */
    td_ranks_deadline(r, (int64_t)c->rank_timeout_ms * 1000);
    if (s >= 0) s = td_exec_serve(x);
    else td_coll_abort(r->world, td_reason());
    td_exec_close(x);
    td_kvmem_close(group, n, kv);
    td_boot_close(&b);
    return s;
}
