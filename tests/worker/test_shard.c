/* Fully sharded weights: a model opened on ranks as threads gives the bits of the whole model, from a checkpoint, from a
 * cache of packed images and as a dummy, with replicas that take different steps, and keeps the memory that it should. */
// SPDX-License-Identifier: Apache-2.0
#include "common/check.h"
#include "common/log.h"
#include "tests/t.h"
#include "tests/worker/support_step.h"
#include "worker/ranks.h"
#include <ftw.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

enum { RANKS = 8, ROWS = 96, P = 16, TOKENS = 300, STEPS = 4 };

typedef struct job {
    const char *dir, *shape, *cache;
    const td_ops *ops;
    td_grid grid;
    float *logits[RANKS];   /* [STEPS][ROWS][V] */
    size_t resident[RANKS], unit[RANKS];
    td_shard_stats stats[RANKS];
    td_status status[RANKS];
} job;

typedef struct rank { job *j; int rank; td_coll *world; pthread_t thread; } rank;

/* Step k of replica dp: two sequences, chunks of odd lengths; every row's logits. */
static td_step *make_step(const ts_kv *kv, const td_model_desc *d, int dp, int k)
{
    static const int n[2][STEPS] = {{37, 33, 1, 1}, {41, 1, 7, 29}};
    int32_t ids[2][ROWS];
    ts_seq q[2];
    for (int s = 0; s < 2; s++) {
        int len = n[s][(k + dp) % STEPS], pos = 0;
        for (int i = 0; i < k; i++) pos += n[s][(i + dp) % STEPS];
        for (int i = 0; i < len; i++)
            ids[s][i] = (int32_t)(td_mix64((uint64_t)(((dp * 2 + s) * 1000) + pos + i)) % (uint64_t)d->V);
        q[s] = (ts_seq){s, pos, len, ids[s]};
    }
    return ts_step(kv, d, q, 2, true);
}

static td_status steps(td_model *m, int dp, const td_ops *ops, float *logits)
{
    float *part = calloc((size_t)ROWS * (size_t)td_model_descr(m)->V, sizeof *part);
    td_model_desc local = *td_model_descr(m), *d = &local;
    td_status st = TD_OK;
    ts_kv kv;
    memcpy(local.group, td_model_groups(m), sizeof local.group); /* this rank's heads */
    ts_kv_open(&kv, d, ops, P, TOKENS, 2);
    for (int k = 0; k < STEPS && st >= 0; k++) {
        td_step *s = make_step(&kv, d, dp, k);
        st = td_model_forward(m, s, kv.kv, part, NULL, NULL);
        if (st >= 0) st = td_model_join_logits(m, s, part, logits + (size_t)k * ROWS * (size_t)d->V);
        free(s);
    }
    ts_kv_close(&kv);
    free(part);
    return st;
}

static td_model_opts model_opts(const job *j, td_pool *pool)
{
    return (td_model_opts){.dir = j->dir,
                           .dummy_shape = j->shape,
                           .ops = j->ops,
                           .pool = pool,
                           .max_rows = ROWS,
                           .max_logits = ROWS,
                           .cache_dir = j->cache,
                           .attn_split = 64};
}

static td_status run_rank(rank *r, const td_ranks *ranks, td_pool *pool)
{
    job *j = r->j;
    td_model *m;
    td_model_opts o = model_opts(j, pool);
    o.ranks = ranks;
    TD_TRY(td_model_open(&o, &m));
    j->logits[r->rank] = calloc((size_t)STEPS * ROWS * (size_t)td_model_descr(m)->V, sizeof(float));
    j->resident[r->rank] = td_model_resident_bytes(m), j->unit[r->rank] = td_model_unit_bytes(m);
    td_status st = steps(m, ranks->at.dp, j->ops, j->logits[r->rank]);
    j->stats[r->rank] = td_model_shard_stats(m);
    td_model_close(m);
    return st;
}

static void *rank_main(void *arg)
{
    rank *r = arg;
    td_pool *pool = td_pool_open(1);
    td_grid grid = r->j->grid;
    td_ranks ranks;
    td_model_desc d;
    td_status st = r->j->dir ? td_model_desc_read(r->j->dir, &d) : td_model_desc_shape(r->j->shape, &d);
    if (st >= 0) st = td_grid_check(&grid, &d);
    if (st >= 0) st = td_ranks_open(r->world, &grid, &ranks);
    if (st >= 0) {
        st = run_rank(r, &ranks, pool);
        td_ranks_close(&ranks);
    }
    if (st < 0) td_coll_abort(r->world, td_reason());
    r->j->status[r->rank] = st;
    td_pool_close(pool);
    return NULL;
}

static void run(job *j)
{
    rank r[RANKS];
    td_coll *end[RANKS];
    int n = td_grid_ranks(&j->grid);
    T_OK(td_coll_threads_open(n, end) == TD_OK);
    for (int i = 0; i < n; i++) {
        r[i] = (rank){.j = j, .rank = i, .world = end[i]};
        T_OK(!pthread_create(&r[i].thread, NULL, rank_main, &r[i]));
    }
    for (int i = 0; i < n; i++) pthread_join(r[i].thread, NULL);
    for (int i = 0; i < n; i++) td_coll_close(end[i]);
}

/* The whole model on one rank: logits of each replica's steps. */
static size_t whole(const job *j, int dp, float **out, int *V)
{
    td_pool *pool = td_pool_open(1);
    td_model_opts o = model_opts(j, pool);
    td_model *m;
    o.cache_dir = NULL;
    T_OK(td_model_open(&o, &m) == TD_OK, "%s", td_reason());
    *V = td_model_descr(m)->V;
    for (int i = 0; i < dp; i++) {
        out[i] = calloc((size_t)STEPS * ROWS * (size_t)*V, sizeof(float));
        T_OK(steps(m, i, j->ops, out[i]) == TD_OK, "%s", td_reason());
    }
    size_t bytes = td_model_resident_bytes(m);
    T_EQ(td_model_unit_bytes(m), 0);
    td_model_close(m);
    td_pool_close(pool);
    return bytes;
}

/* Its share, the two largest layers, and what does not divide: the last norm, and a step of vocabulary per matrix. */
static void check_memory(const job *j, int r, size_t full, int E)
{
    size_t slack = (size_t)E * 4 * (2 * TD_VOCAB_STEP + 1) + 4 * 64 * 64, n = (size_t)(j->grid.dp * j->grid.cp);
    if (j->grid.fsdp && !j->grid.ep && j->grid.tp == 1 && j->grid.pp == 1)
        T_OK(j->resident[r] <= full / n + 2 * j->unit[r] + slack, "%zu of %zu bytes, layers of %zu",
             j->resident[r], full, j->unit[r]);
    T_OK(!j->grid.fsdp == !j->unit[r] && !j->grid.fsdp == !j->stats[r].gathers);
    if (!j->grid.fsdp) return;
    T_OK(j->stats[r].gathers % STEPS == 0 && j->stats[r].alone_us > 0 && j->stats[r].waited_us >= 0);
}

static void check(job j, const char *what)
{
    float *want[RANKS];
    int V, n = td_grid_ranks(&j.grid);
    td_model_desc d;
    T_OK((j.dir ? td_model_desc_read(j.dir, &d) : td_model_desc_shape(j.shape, &d)) == TD_OK);
    size_t full = whole(&j, j.grid.dp, want, &V), bytes = (size_t)STEPS * ROWS * (size_t)V * sizeof(float);
    run(&j);
    for (int r = 0; r < n; r++) {
        td_coord c = td_grid_coord(&j.grid, r);
        T_OK(j.status[r] >= 0 && j.logits[r] && !memcmp(j.logits[r], want[c.dp], bytes),
             "%s %s: tensor %d context %d data %d%s%s, rank %d", j.dir ? j.dir : j.shape, what, j.grid.tp,
             j.grid.cp, j.grid.dp, j.grid.ep ? " experts" : "", j.grid.fsdp ? " sharded" : "", r);
        check_memory(&j, r, full, d.E);
        free(j.logits[r]);
    }
    for (int i = 0; i < j.grid.dp; i++) free(want[i]);
}

static void grids(job j, const char *what, bool experts, bool window)
{
    static const td_grid all[] = {{.tp = 1, .pp = 1, .cp = 1, .dp = 2, .fsdp = true},
                                  {.tp = 1, .pp = 1, .cp = 2, .dp = 1, .fsdp = true},
                                  {.tp = 1, .pp = 1, .cp = 2, .dp = 2, .fsdp = true},
                                  {.tp = 1, .pp = 1, .cp = 1, .dp = 2}};
    for (size_t i = 0; i < TD_COUNT(all); i++) {
        if (window && all[i].cp > 1) continue;
        j.grid = all[i];
        check(j, what);
        j.grid.ep = true;
        if (experts) check(j, what);
    }
}

static int drop(const char *path, const struct stat *s, int type, struct FTW *f)
{
    (void)s, (void)type, (void)f;
    return remove(path);
}

static void from_cache(const td_ops *ops)
{
    char dir[] = "/tmp/tandem-shard-XXXXXX";
    T_OK(mkdtemp(dir) != NULL);
    job j = {.dir = "tests/golden/models/qwen3-moe",
             .ops = ops,
             .cache = dir,
             .grid = {.tp = 1, .pp = 1, .cp = 1, .dp = 2, .fsdp = true}};
    check(j, "made");
    check(j, "read");
    nftw(dir, drop, 8, FTW_DEPTH | FTW_PHYS);
}

int main(void)
{
    static const struct {
        const char *dir;
        bool experts, window;
    } models[] = {{"llama-bias", false, false},
                  {"llama-mha-tied", false, false},
                  {"mistral-swa", false, true},
                  {"qwen3-moe", true, false},
                  {"mixtral", true, false}};
    const td_ops *fast, *ref;
    char dir[200];
    td_log_open("test", TD_LOG_ERROR);
    T_OK(td_ops_open("auto", &fast) == TD_OK && td_ops_open("ref", &ref) == TD_OK);
    for (size_t i = 0; i < TD_COUNT(models); i++) {
        snprintf(dir, sizeof dir, "tests/golden/models/%s", models[i].dir);
        grids((job){.dir = dir, .ops = fast}, "fast", models[i].experts, models[i].window);
        if (i % 2) grids((job){.dir = dir, .ops = ref}, "ref", models[i].experts, models[i].window);
    }
    check(
        (job){.shape = "ranks-tiny", .ops = fast, .grid = {.tp = 2, .pp = 1, .cp = 2, .dp = 2, .fsdp = true}},
        "dummy");
    check((job){.shape = "moe-tiny",
                .ops = fast,
                .grid = {.tp = 2, .pp = 1, .cp = 1, .dp = 4, .fsdp = true, .ep = true}},
          "dummy");
    from_cache(fast);
    return T_DONE();
}
