/* Pipelines: at least as many micro-batches are in flight as there are stages, each of its own sequences, and chunks
 * of one prompt follow each other without waiting for the one before; and that is the depth that a worker opens with.
 * That the tokens are those of one rank: test_ranks.c. Ranks are threads. */
// SPDX-License-Identifier: Apache-2.0
#include "common/conf.h"
#include "common/log.h"
#include "tests/worker/support_engine.h"
#include "tests/worker/support_ranks.h"
#include "worker/boot.h"
#include "worker/engine_int.h"
#include "worker/rank.h"

enum { V = 509, SEQS = 8, CHUNK = 64, CHUNKS = 6 };

static const td_engine *engine;

/* What was in flight when each step left, itself included. */
typedef struct flights {
    int most, least, steps; /* least: from the step on that first had `want` */
    int want;
    uint32_t rows;
} flights;

static void note(void *arg, const td_step *s)
{
    flights *f = arg;
    int n = engine->n_flights + 1;
    f->steps++;
    f->most = TD_MAX(f->most, n);
    if (f->most >= f->want) f->least = TD_MIN(f->least, n), f->rows = TD_MAX(f->rows, s->n_rows);
}

static void run_out(td_engine *e, uint32_t legs)
{
    td_engine_out out;
    while (legs) {
        T_OK(td_engine_turn(e, &out) == TD_OK, "%s", td_reason());
        legs -= out.n_end;
    }
    te_drain(e);
}

static void run(td_engine *e, void *arg)
{
    int pp = *(const int *)arg;
    te_spec spec[SEQS], prompt = te_make(100, CHUNK * CHUNKS, 1, V);
    flights decode = {.want = pp, .least = 100}, chunks = {.want = pp, .least = 100};
    td_engine_out out;
    engine = e;
    for (int i = 0; i < SEQS; i++) {
        spec[i] = te_make((uint64_t)i + 1, 5, 40, V);
        T_OK(td_engine_start(e, te_leg(&spec[i])) == TD_OK, "%s", td_reason());
    }
    for (int turn = 0; turn < 3 * pp; turn++) T_OK(td_engine_turn(e, &out) == TD_OK, "%s", td_reason());
    td_engine_on_step(e, note, &decode);
    for (int turn = 0; turn < 5 * pp; turn++) T_OK(td_engine_turn(e, &out) == TD_OK, "%s", td_reason());
    T_OK(decode.most >= pp && decode.least >= pp && decode.rows <= (uint32_t)(SEQS / pp),
         "%d stages: %d to %d steps in flight, of up to %u rows", pp, decode.least, decode.most, decode.rows);
    td_engine_on_step(e, NULL, NULL);
    run_out(e, SEQS);
    td_engine_on_step(e, note, &chunks);
    T_OK(td_engine_start(e, te_leg(&prompt)) == TD_OK, "%s", td_reason());
    run_out(e, 1);
    T_OK(chunks.most >= pp && chunks.least >= pp && chunks.steps >= CHUNKS,
         "%d stages: %d to %d of %d chunks in flight", pp, chunks.least, chunks.most, chunks.steps);
}

/* ---- what a worker opens with ---- */

typedef struct member {
    pthread_t thread;
    td_coll *world;
    const char *role;
    int depth;
} member;

static void *open_worker(void *arg)
{
    member *m = arg;
    char *argv[] = {"worker",        "--load-format=dummy",         "--shape=ranks-tiny",
                    "--threads=1",   "--pipeline-parallel-size=2",  "--ops=ref",
                    "--kv-pages=16", "--max-num-batched-tokens=16", (char[32]){0}};
    snprintf(argv[8], 32, "--role=%s", m->role);
    int n = 0;
    td_conf c = {0};
    td_boot b;
    td_ranks r;
    td_model_desc *d = td_xalloc(sizeof *d);
    td_status s = td_conf_parse(&c, TD_CONF_WORKER, (int)TD_COUNT(argv), argv, NULL, 0, &n);
    td_grid g = td_rank_grid(&c);
    if (s >= 0) s = td_boot_describe(&c, c.model, d);
    if (s >= 0) s = td_grid_check(&g, d);
    if (s >= 0) s = td_ranks_open(m->world, &g, &r);
    if (s >= 0) {
        r.desc = d;
        s = td_boot_open(&c, c.model, 0, &r, &b);
        if (s >= 0) m->depth = b.opts.depth, td_boot_close(&b);
        td_ranks_close(&r);
    }
    if (s < 0) fprintf(stderr, "%s\n", td_reason());
    free(d);
    td_conf_deinit(&c);
    td_coll_close(m->world);
    return NULL;
}

static void opened(const char *role, int least)
{
    td_coll *end[2];
    member m[2];
    T_OK(td_coll_threads_open(2, end) == TD_OK);
    for (int i = 0; i < 2; i++) {
        m[i] = (member){.world = end[i], .role = role};
        if (pthread_create(&m[i].thread, NULL, open_worker, &m[i])) abort();
    }
    for (int i = 0; i < 2; i++) pthread_join(m[i].thread, NULL);
    for (int i = 0; i < 2; i++) T_OK(m[i].depth >= least, "%s: %d steps in flight", role, m[i].depth);
}

int main(void)
{
    const td_ops *ops;
    td_log_open("test", TD_LOG_ERROR);
    T_OK(td_ops_open("ref", &ops) == TD_OK);
    for (int pp = 2; pp <= 4; pp *= 2) {
        tr_opts o = {.shape = "ranks-tiny",
                     .ops = ops,
                     .attn_split = 64,
                     .depth = pp,
                     .grid = {.tp = 1, .pp = pp, .cp = 1, .dp = 1},
                     .engine = {.page_size = 16,
                                .kv_pages = 200,
                                .max_batched_tokens = CHUNK,
                                .max_seqs = SEQS,
                                .max_legs = 2 * SEQS,
                                .max_model_len = 500,
                                .hash_key = {3, 4}}};
        T_OK(tr_run(&o, run, &pp), "%d stages", pp);
    }
    opened("decode", 2);
    opened("prefill", 3);
    opened("mixed", 2);
    return T_DONE();
}
