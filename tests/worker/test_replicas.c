/* One worker with replicas: where legs go, that they stay there, that each replica's pages are its own and go back, that
 * one replica's shortage is not the other's, and that a replica without work does its part. Ranks are threads. */
// SPDX-License-Identifier: Apache-2.0
#include "common/log.h"
#include "tests/worker/support_engine.h"
#include "tests/worker/support_ranks.h"

enum { N = 8, V = 509 };

static const td_ops *ops;
static te_spec spec[N];
static te_result want[N], got[N];

static tr_opts options(int dp)
{
    return (tr_opts){.shape = "moe-tiny",
                     .ops = ops,
                     .attn_split = 64,
                     .depth = 1,
                     .grid = {.tp = 1, .pp = 1, .cp = 1, .dp = dp, .ep = dp > 1, .fsdp = dp > 1},
                     .engine = {.page_size = 16,
                                .kv_pages = 64,
                                .max_batched_tokens = 64,
                                .max_seqs = 8,
                                .max_legs = 32,
                                .max_model_len = 200,
                                .prefix_cache = true,
                                .hash_key = {3, 4}}};
}

static void plain(te_spec *s, uint64_t key, uint32_t n_prompt, uint32_t max_tokens)
{
    *s = te_make(key, n_prompt, max_tokens, V);
}

/* Turns until the leg is over; its tokens are not looked at. */
static void run_out(td_engine *e, uint32_t legs)
{
    td_engine_out out;
    for (uint32_t ended = 0, turns = 0; ended < legs && turns < 1000; turns++) {
        T_OK(td_engine_turn(e, &out) >= 0, "%s", td_reason());
        ended += out.n_end;
    }
}

static uint32_t place_of(td_engine *e, te_spec *s)
{
    td_engine_out out;
    T_OK(td_engine_start(e, te_leg(s)) == TD_OK, "%s", td_reason());
    T_OK(td_engine_turn(e, &out) == TD_OK);
    return td_engine_replica_of(e, s->leg.key);
}

static void places(td_engine *e, void *arg)
{
    te_spec s[6];
    (void)arg;
    plain(&s[0], 1, 100, 30), plain(&s[1], 2, 33, 30), plain(&s[2], 3, 33, 30), plain(&s[3], 4, 33, 30);
    T_EQ(place_of(e, &s[0]), 0); /* nothing runs */
    T_EQ(place_of(e, &s[1]), 1);
    T_OK(place_of(e, &s[2]) + place_of(e, &s[3]) == 1); /* one each */
    s[4] = s[0], s[4].leg.key = 5; /* its prompt's pages are of replica 0, which has fewer left */
    T_EQ(place_of(e, &s[4]), 0);
    T_EQ(td_engine_replica_of(e, 2), 1);
    run_out(e, 5);
    te_drain(e);
    T_OK(te_ledger(e, true));
    s[5] = s[0], s[5].leg.key = 6, s[5].leg.sampling.max_tokens = 3; /* cached, where it ran before */
    T_EQ(place_of(e, &s[5]), 0);
    run_out(e, 1);
    for (int i = 0; i < 6; i++) s[i].leg.key = 10 + (uint64_t)i, s[i].leg.sampling.max_tokens = 30;
    for (int i = 1; i < 6; i++)
        s[i] = s[0], s[i].leg.key = 10 + (uint64_t)i; /* hits, until the replica has its share of 4 */
    uint32_t at[2] = {0};
    for (int i = 0; i < 6; i++) at[place_of(e, &s[i])]++;
    T_OK(at[0] == 4 && at[1] == 2, "%u and %u", at[0], at[1]);
    T_OK(td_engine_cancel(e, 10) == TD_OK);
    run_out(e, 6);
    te_drain(e);
    T_OK(te_ledger(e, true));
}

typedef struct load { te_result *to; uint64_t preemptions; } load;

static void run_load(td_engine *e, void *arg)
{
    load *l = arg;
    td_engine_stats st;
    for (int i = 0; i < N; i++) te_expect(&spec[i], &l->to[i]);
    te_run(e, spec, l->to, N);
    td_engine_stats_get(e, &st);
    l->preemptions = st.preemptions;
    te_drain(e);
    T_OK(te_ledger(e, true));
    T_EQ(td_engine_capacity_tokens(e) % 16, 0);
}

/* Pages for one sequence to its end and little more: legs wait and are preempted, replica by replica. */
static void shortage(void)
{
    load l = {want, 0};
    tr_opts o = options(1);
    for (int i = 0; i < N; i++) plain(&spec[i], (uint64_t)i + 1, 20 + 7 * (uint32_t)i, 40);
    T_OK(tr_run(&o, run_load, &l));
    l.to = got;
    for (int dp = 2; dp <= 4; dp *= 2) {
        o = options(dp);
        o.engine.kv_pages = 9;
        o.engine.max_model_len = 110;
        o.depth = dp / 2;
        T_OK(tr_run(&o, run_load, &l));
        for (int i = 0; i < N; i++) te_same(&spec[i], &want[i], &got[i], "few pages");
        T_OK(dp > 2 || l.preemptions > 0, "nothing was preempted");
    }
}

/* One leg at a time: the other replica has no rows in any step. */
static void alone(td_engine *e, void *arg)
{
    te_result *to = arg;
    for (int i = 0; i < 2; i++) {
        te_expect(&spec[i], &to[i]);
        te_run(e, &spec[i], &to[i], 1);
    }
}

static void too_deep(void)
{
    td_model_desc d;
    td_grid g = {.tp = 1, .pp = 1, .cp = 1, .dp = 2000};
    T_OK(td_model_desc_shape("ranks-tiny", &d) == TD_OK && td_grid_check(&g, &d) == TD_EBADREQ);
    g.dp = 0;
    T_OK(td_grid_check(&g, &d) == TD_EBADREQ);
    g = (td_grid){.tp = 2, .pp = 1, .cp = 1, .dp = 1, .fsdp = true};
    T_OK(td_grid_check(&g, &d) == TD_EBADREQ && strstr(td_reason(), "fully-sharded"));
}

int main(void)
{
    td_log_open("test", TD_LOG_ERROR);
    T_OK(td_ops_open("auto", &ops) == TD_OK);
    tr_opts o = options(2);
    T_OK(tr_run(&o, places, NULL));
    shortage();
    T_OK(tr_run(&o, alone, got));
    for (int i = 0; i < 2; i++) te_same(&spec[i], &want[i], &got[i], "alone");
    too_deep();
    for (int i = 0; i < N; i++) te_result_free(&want[i]), te_result_free(&got[i]);
    return T_DONE();
}
