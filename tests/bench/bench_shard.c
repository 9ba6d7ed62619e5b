// SPDX-License-Identifier: Apache-2.0
/* tests/bench/bench_shard.c - two replicas of a model, with whole and with fully sharded weights: memory of a rank, time of
 * steps of 1, 64 and 256 rows each, and how much of the gathers was hidden. One line of JSON. tests/bench/shard.py runs it.
 *
 *   bench_shard threads|mpi SHAPE */
#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include "tests/worker/support_step.h"
#include "worker/ranks.h"
#include <pthread.h>
#include <stdio.h>

enum { RANKS = 2, MODES = 2, SIZES = 3, ROUNDS = 4, P = 16 };
static const int rows[SIZES] = {1, 64, 256};

typedef struct figures {
    size_t resident, unit;
    double step_us[SIZES], wait_us[SIZES], alone_us[SIZES];
} figures;

typedef struct job {
    const char *shape;
    const td_ops *ops;
    td_coll *world;
    figures f[MODES];
    td_status status;
} job;

static td_status time_steps(td_model *m, const job *j, td_coll *world, figures *f)
{
    const td_model_desc *d = td_model_descr(m);
    float *logits = td_xalloc((size_t)d->V * sizeof *logits);
    int32_t *ids = td_xalloc((size_t)rows[SIZES - 1] * sizeof *ids);
    td_status s = TD_OK;
    ts_kv kv;
    ts_kv_open(&kv, d, j->ops, P, rows[SIZES - 1], 1);
    for (int i = 0; i < SIZES && s >= 0; i++) {
        ts_seq q = {0, 0, rows[i], ids};
        td_step *step = ts_step(&kv, d, &q, 1, false);
        f->step_us[i] = 1e18;
        for (int k = 0; k < ROUNDS && s >= 0; k++) {
            td_shard_stats before = td_model_shard_stats(m);
            s = td_coll_barrier(world);
            int64_t t = td_now_us();
            if (s >= 0) s = td_model_forward(m, step, kv.kv, logits, NULL, NULL);
            if (s >= 0) s = td_coll_barrier(world); /* the slower one's time */
            double us = (double)(td_now_us() - t);
            td_shard_stats after = td_model_shard_stats(m);
            if (us >= f->step_us[i]) continue;
            f->step_us[i] = us;
            f->wait_us[i] = (double)(after.waited_us - before.waited_us);
            f->alone_us[i] = (double)(after.alone_us - before.alone_us);
        }
        free(step);
    }
    ts_kv_close(&kv);
    free(logits), free(ids);
    return s;
}

static td_status run_mode(job *j, bool fsdp, td_pool *pool, figures *f)
{
    td_grid grid = {.tp = 1, .pp = 1, .cp = 1, .dp = RANKS, .fsdp = fsdp};
    td_model_desc d;
    td_ranks ranks;
    td_model *m = NULL;
    TD_TRY(td_model_desc_shape(j->shape, &d));
    TD_TRY(td_grid_check(&grid, &d));
    TD_TRY(td_ranks_open(j->world, &grid, &ranks));
    td_model_opts o = {.dummy_shape = j->shape, .ops = j->ops, .pool = pool, .max_rows = rows[SIZES - 1], .max_logits = 4, .ranks = &ranks};
    td_status s = td_model_open(&o, &m);
    if (s >= 0) {
        f->resident = td_model_resident_bytes(m), f->unit = td_model_unit_bytes(m);
        s = time_steps(m, j, ranks.world, f);
    }
    td_model_close(m);
    td_ranks_close(&ranks);
    return s;
}

static void *rank_main(void *arg)
{
    job *j = arg;
    td_pool *pool = td_pool_open(1);
    for (int i = 0; i < MODES && j->status >= 0; i++) j->status = run_mode(j, i, pool, &j->f[i]);
    if (j->status < 0) td_coll_abort(j->world, td_reason());
    td_pool_close(pool);
    return NULL;
}

static void print(const job *j)
{
    const figures *w = &j->f[0], *s = &j->f[1];
    printf("{\"whole_bytes\": %zu, \"resident_bytes\": %zu, \"unit_bytes\": %zu", w->resident, s->resident, s->unit);
    for (int i = 0; i < SIZES; i++)
        printf(", \"rows_%d\": {\"whole_us\": %.0f, \"sharded_us\": %.0f, \"waited_us\": %.0f, \"gather_alone_us\": %.0f}", rows[i],
               w->step_us[i], s->step_us[i], s->wait_us[i], s->alone_us[i]);
    printf("}\n");
}

int main(int argc, char **argv)
{
    static job j[RANKS];
    td_log_open("bench", TD_LOG_ERROR);
    if (argc < 3) {
        fprintf(stderr, "bench_shard threads|mpi SHAPE\n");
        return 2;
    }
    bool mpi = !strcmp(argv[1], "mpi");
    td_coll *end[RANKS];
    pthread_t thread[RANKS];
    if ((mpi ? td_coll_mpi_open(&argc, &argv, &end[0]) : td_coll_threads_open(RANKS, end)) < 0) return 1;
    for (int i = 0; i < (mpi ? 1 : RANKS); i++) {
        j[i] = (job){.shape = argv[2], .world = end[i]};
        if (td_ops_open("auto", &j[i].ops) < 0) return 1;
        if (mpi) rank_main(&j[i]);
        else if (pthread_create(&thread[i], NULL, rank_main, &j[i])) return 1;
    }
    for (int i = 0; i < RANKS && !mpi; i++) pthread_join(thread[i], NULL);
    if (j[0].status >= 0 && td_coll_rank(end[0]) == 0) print(&j[0]);
    for (int i = 0; i < (mpi ? 1 : RANKS); i++) td_coll_close(end[i]);
    return j[0].status < 0;
}
