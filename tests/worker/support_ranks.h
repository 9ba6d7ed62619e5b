/* tests/worker/support_ranks.h - a worker of several ranks inside one process: a thread per rank, the threads
 * back end between them; rank 0 runs the engine, the others serve. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_TESTS_SUPPORT_RANKS_H
#define TD_TESTS_SUPPORT_RANKS_H

#include "tests/t.h"
#include "worker/engine.h"
#include "worker/kvpool.h"
#include "worker/ranks.h"
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct tr_opts {
    const char *shape, *dir;
    const td_ops *ops;
    td_grid grid; /* sizes and modes */
    int attn_split, block_rows, depth;
    td_cp_mode cp_mode;
    bool quantized, least_workspace;
    td_engine_opts engine;
    size_t (*on_poll)(void *arg, void *out, size_t cap); /* other ranks' answers; arg: int *, the rank */
    td_status (*on_command)(void *arg, const void *p, size_t n); /* likewise */
} tr_opts;

typedef struct tr_rank {
    struct tr_group *group;
    int rank;
    td_coll *world;
    pthread_t thread;
    td_status status;
} tr_rank;

/* fn runs on rank 0's thread with the engine. */
typedef struct tr_group {
    tr_opts o;
    void (*fn)(td_engine *e, void *arg);
    void *arg;
    tr_rank rank[64];
} tr_group;

static inline td_status tr_open_model(const tr_rank *r, const td_ranks *ranks, td_pool *pool, td_model **out)
{
    const tr_opts *o = &r->group->o;
    td_model_opts m = {.dir = o->dir,
                       .dummy_shape = o->shape,
                       .ops = o->ops,
                       .pool = pool,
                       .max_rows = o->engine.max_batched_tokens,
                       .max_logits = td_engine_logit_rows(o->engine.max_seqs),
                       .ranks = ranks,
                       .attn_split = o->attn_split,

                       .block_rows = o->block_rows,
                       .least_workspace = o->least_workspace,
                       .cp_mode = o->cp_mode,
                       .quantized = o->quantized};
    return td_model_open(&m, out);
}

static inline td_status tr_serve(tr_rank *r, td_model *m, const td_ranks *ranks, td_pool *pool)
{
    const tr_opts *o = &r->group->o;
    td_kv kv[TD_MAX_GROUPS];
    int n = td_model_descr(m)->n_groups;
    TD_TRY(td_kvmem_open(o->ops->dev, td_model_groups(m), n, (int)o->engine.kv_pages, o->engine.page_size,
                         o->ops->kv_dtype, kv));
    td_exec_opts x = {.model = m,
                      .ops = o->ops,
                      .pool = pool,
                      .ranks = ranks,
                      .depth = 1,
                      .max_rows = o->engine.max_batched_tokens,
                      .max_logits = td_engine_logit_rows(o->engine.max_seqs),
                      .kv = kv,
                      .on_poll = o->on_poll,
                      .on_command = o->on_command,
                      .arg = &r->rank};
    td_exec *e;
    td_status s = td_exec_open(&x, &e);
    if (s >= 0) {
        s = td_exec_serve(e);
        td_exec_close(e);
    }
    td_kvmem_close(o->ops->dev, td_model_groups(m), n, kv);
    return s;
}

static inline td_status tr_lead(const tr_rank *r, td_model *m, const td_ranks *ranks, td_pool *pool)
{
    td_engine_opts o = r->group->o.engine;
    td_engine *e;
    size_t workspace = td_model_workspace_bytes(m);
    o.model = m, o.ops = r->group->o.ops, o.pool = pool, o.ranks = ranks, o.depth = r->group->o.depth;
    TD_TRY(td_engine_open(&o, &e));
    r->group->fn(e, r->group->arg);
    td_engine_close(e);
    /* what steps need was made at open, whatever their contexts are and wherever their rows went */
    T_EQ(td_model_workspace_bytes(m), workspace);
    return TD_OK;
}

static inline void *tr_thread(void *arg)
{
    tr_rank *r = arg;
    td_pool *pool = td_pool_open(1);
    td_ranks ranks;
    td_grid grid = r->group->o.grid;
    td_model_desc d;
    td_status s = r->group->o.dir ? td_model_desc_read(r->group->o.dir, &d)
                                  : td_model_desc_shape(r->group->o.shape, &d);
    if (s >= 0) s = td_grid_check(&grid, &d);
    if (s >= 0) s = td_ranks_open(r->world, &grid, &ranks);
    if (s >= 0 && r->group->o.ops->dev && td_grid_ranks(&grid) > 1)
        s = td_ranks_device(&ranks, r->group->o.ops->dev);
    if (s >= 0) {
        td_model *m = NULL;
        s = tr_open_model(r, &ranks, pool, &m);
        if (s >= 0) s = r->rank ? tr_serve(r, m, &ranks, pool) : tr_lead(r, m, &ranks, pool);
        td_model_close(m);
        td_ranks_close(&ranks);
        if (s >= 0)
            s = td_coll_barrier(r->world); /* they part in good order: nobody waited for what never came */
    }
    r->status = s;
    if (s < 0) {
        fprintf(stderr, "rank %d: %s: %s\n", r->rank, td_status_name(s), td_reason());
        td_coll_abort(r->world, td_reason());
    }
    td_pool_close(pool);
    return NULL;
}

/* A folder with a config.json alone, for random weights (shape and dir together): 8 heads of 16, vocabulary 509. */
typedef struct tr_config {
    int layers, kv_heads, ffn, experts;
} tr_config;

static inline void tr_make_dir(char dir[32], tr_config c)
{
    char path[64];
    strcpy(dir, "/tmp/td-ranks-XXXXXX");
    if (!mkdtemp(dir)) abort();
    snprintf(path, sizeof path, "%s/config.json", dir);
    FILE *f = fopen(path, "w");
    if (!f) abort();
    fprintf(f,
            "{\"architectures\": [\"%s\"], \"model_type\": \"%s\", \"hidden_size\": 128, "
            "\"intermediate_size\": %d,"
            " \"num_hidden_layers\": %d, \"num_attention_heads\": 8, \"num_key_value_heads\": %d, "
            "\"vocab_size\": 509,"
            " \"max_position_embeddings\": 1024, \"rms_norm_eps\": 1e-5, \"eos_token_id\": 1",
            c.experts ? "MixtralForCausalLM" : "LlamaForCausalLM", c.experts ? "mixtral" : "llama", c.ffn,
            c.layers, c.kv_heads);
    if (c.experts) fprintf(f, ", \"num_local_experts\": %d, \"num_experts_per_tok\": 2", c.experts);
    fprintf(f, "}\n");
    if (fclose(f)) abort();
}

static inline void tr_drop_dir(const char *dir)
{
    char path[64];
    snprintf(path, sizeof path, "%s/config.json", dir);
    unlink(path);
    rmdir(dir);
}

/* This process is one rank of `world` (MPI); NULL: the ranks are threads. */
static td_coll *tr_world;

/* All ranks from start to end. True: none failed, as far as this process knows. */
static inline bool tr_run(const tr_opts *o, void (*fn)(td_engine *e, void *arg), void *arg)
{
    static tr_group g;
    td_coll *end[64];
    int n = td_grid_ranks(&o->grid);
    bool ok = true;
    g.o = *o, g.fn = fn, g.arg = arg;
    if (tr_world) {
        g.rank[0] = (tr_rank){.group = &g, .rank = td_coll_rank(tr_world), .world = tr_world};
        tr_thread(&g.rank[0]);
        return g.rank[0].status >= 0;
    }
    T_OK(td_coll_threads_open(n, end) == TD_OK);
    for (int i = 0; i < n; i++) {
        g.rank[i] = (tr_rank){.group = &g, .rank = i, .world = end[i]};
        if (pthread_create(&g.rank[i].thread, NULL, tr_thread, &g.rank[i]))
            abort(); /* the harness counts on rank 0's thread now */
    }
    for (int i = 0; i < n; i++) {
        pthread_join(g.rank[i].thread, NULL);
        ok &= g.rank[i].status >= 0;
    }
    for (int i = 0; i < n; i++) td_coll_close(end[i]);
    return ok;
}

#endif
