/* Experts that move between the ranks of a stage while sequences are under way: every output is, byte for byte, that of one
 * rank. Prompts of few different tokens, so that few experts get most rows; no, two and four redundant experts; balancing
 * forced every few turns, and by itself every few steps. */
// SPDX-License-Identifier: Apache-2.0
#include "common/log.h"
#include "tests/worker/support_engine.h"
#include "tests/worker/support_ranks.h"
#include "worker/engine_int.h"
#include "worker/model/experts.h"

enum { N = 8, V = 509, LAST = 24 };

static te_spec spec[N];
static te_result want[N], got[N];
static const td_ops *ops;

static void make_specs(void)
{
    static const uint32_t lengths[N] = {3, 40, 64, 90, 120, 33, 70, 150};
    for (uint32_t i = 0; i < N; i++) {
        spec[i] = te_make(i + 1, lengths[i], 12 + i, V);
        te_vary(&spec[i], V);
        for (uint32_t k = 0; k < lengths[i]; k++) spec[i].prompt[k] = (k * k + i) % 3 ? 17 : te_draw(V);
    }
}

typedef struct job {
    te_result *to;
    int every;                       /* turns between forced balancings; 0: none */
    size_t move_bytes;               /* 0: as it is */
    td_expert_stats stats;
    uint64_t forced;
    double measured;                 /* of the balancings up to turn LAST, without the first */
} job;

static void run_all(td_engine *e, void *arg)
{
    job *j = arg;
    if (j->move_bytes) e->o.model->experts->move_bytes = j->move_bytes;
    for (int i = 0; i < N; i++) {
        te_expect(&spec[i], &j->to[i]);
        if (i < N / 2) T_OK(td_engine_start(e, te_leg(&spec[i])) == TD_OK, "%s", td_reason());
    }
    for (int turn = 1; turn < 60; turn++) {
        td_engine_out out;
        if (j->every && turn % j->every == 0) {
            T_OK(td_engine_balance(e, true) == TD_OK, "%s", td_reason());
            td_expert_stats s = td_model_expert_stats(e->o.model);
            if (j->move_bytes && !j->forced) T_EQ(s.left, 3);
            if (j->forced++ && turn <= LAST) j->measured += s.measured / (double)(LAST / j->every - 1);
            if (!j->measured && turn == LAST) j->measured = s.measured;
        }
        if (turn % 3 == 0 && turn / 3 <= N / 2)
            T_OK(td_engine_start(e, te_leg(&spec[N / 2 + turn / 3 - 1])) == TD_OK, "%s", td_reason());
        if (td_engine_turn(e, &out) == TD_OK) te_take(spec, j->to, N, &out);
    }
    te_finish(e, spec, j->to, N);
    T_OK(te_ledger(e, true), "pages are left");
    j->stats = td_model_expert_stats(e->o.model);
}

static job run(td_grid g, int depth, int every, int interval, size_t move_bytes, const char *what)
{
    bool one = td_grid_ranks(&g) == 1;
    job j = {.to = one ? want : got, .every = every, .move_bytes = move_bytes};
    tr_opts o = {.shape = "moe-tiny",
                 .ops = ops,
                 .grid = g,
                 .attn_split = 64,
                 .depth = depth,
                 .block_rows = 8,
                 .engine = {.page_size = 16,
                            .kv_pages = 400,
                            .max_batched_tokens = 64,
                            .max_seqs = 16,
                            .max_legs = 32,
                            .max_model_len = 300,
                            .prefix_cache = true,
                            .hash_key = {3, 4},
                            .eplb_interval = interval}};
    T_OK(tr_run(&o, run_all, &j), "%s", what);
    for (int i = 0; i < N && !one; i++) te_same(&spec[i], &want[i], &got[i], what);
    return j;
}

static void moves(void)
{
    static const td_grid grids[] = {
        {.tp = 2, .pp = 1, .cp = 1, .dp = 1}, {.tp = 4, .pp = 1, .cp = 1, .dp = 1},
        {.tp = 1, .pp = 2, .cp = 2, .dp = 1}, {.tp = 1, .pp = 1, .cp = 1, .dp = 3},
        {.tp = 2, .pp = 2, .cp = 1, .dp = 2}, {.tp = 1, .pp = 1, .cp = 2, .dp = 2, .fsdp = true},
        {.tp = 8, .pp = 1, .cp = 1, .dp = 1}};
    for (size_t i = 0; i < TD_COUNT(grids); i++)
        for (int redundant = 0; redundant <= 4; redundant += 2) {
            td_grid g = grids[i];
            char what[120];
            g.ep = true, g.redundant = redundant;
            for (int mode = 0; mode < 2; mode++) {
                snprintf(what, sizeof what, "tensor %d, pipeline %d, context %d, data %d, %d redundant, %s",
                         g.tp, g.pp, g.cp, g.dp, redundant, mode ? "by itself" : "forced");
                job j = run(g, g.pp, mode ? 0 : 2, mode ? 3 : 0, 0, what);
                T_OK((j.stats.moved > 0) == (g.tp < 8 || redundant) &&
                         (mode ? j.stats.balanced > 5 : j.stats.balanced == j.forced),
                     "%s: balanced %llu times, %llu moves", what, (unsigned long long)j.stats.balanced,
                     (unsigned long long)j.stats.moved);
                T_OK(mode || j.stats.after <= j.stats.before + 0.2, "%s: %.3f, was %.3f", what, j.stats.after,
                     j.stats.before);
            }
        }
}

/* The same legs with and without balancing: the heaviest rank's rows, as they were counted. */
static void balance(void)
{
    for (int redundant = 0; redundant <= 8; redundant += 4) {
        td_grid g = {.tp = 1, .pp = 1, .cp = 1, .dp = 4, .ep = true, .redundant = redundant};
        job still = run(g, 1, LAST, 0, 0, "at the end"), moved = run(g, 1, 2, 0, 0, "moved");
        T_OK(moved.measured < still.measured, "%.3f, was %.3f", moved.measured, still.measured);
        printf("%d redundant: heaviest of 4 ranks has %.2f of the mean's rows, balanced every 2 turns %.2f\n",
               redundant, still.measured, moved.measured);
    }
}

/* A balancing that may move next to nothing: a layer at a time, and soon the next. */
static void bit_by_bit(void)
{
    td_grid g = {.tp = 2, .pp = 1, .cp = 1, .dp = 2, .ep = true, .redundant = 4};
    job forced = run(g, 1, 2, 0, 1, "a layer at a time"), often = run(g, 1, 0, 8, 0, "every 8 steps");
    job soon = run(g, 1, 0, 8, 1, "every 8 steps, a layer at a time");
    T_OK(forced.stats.moved > 0);
    T_OK(soon.stats.balanced > often.stats.balanced + 4, "balanced %llu times, all layers at once %llu",
         (unsigned long long)soon.stats.balanced, (unsigned long long)often.stats.balanced);
}

static void refused(void)
{
    td_model_desc d;
    T_OK(td_model_desc_shape("moe-tiny", &d) == TD_OK);
    td_grid g = {.tp = 2, .pp = 1, .cp = 1, .dp = 1, .redundant = 1};
    T_OK(td_grid_check(&g, &d) == TD_EBADREQ && strstr(td_reason(), "not parallel"));
    g.ep = true;
    T_OK(td_grid_check(&g, &d) == TD_OK);
    g.redundant = 9; /* eight experts: one copy more of each at most */
    T_OK(td_grid_check(&g, &d) == TD_EBADREQ);
    g.redundant = -1;
    T_OK(td_grid_check(&g, &d) == TD_EBADREQ);
}

int main(void)
{
    td_log_open("test", TD_LOG_ERROR);
    make_specs();
    T_OK(td_ops_open("auto", &ops) == TD_OK);
    run((td_grid){.tp = 1, .pp = 1, .cp = 1, .dp = 1}, 1, 0, 0, 0, "one rank");
    refused();
    moves();
    balance();
    bit_by_bit();
    for (int i = 0; i < N; i++) te_result_free(&want[i]), te_result_free(&got[i]);
    return T_DONE();
}
