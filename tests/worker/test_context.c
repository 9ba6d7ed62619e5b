/* Context parallel ranks: a chunk's rows are dealt so that all have the same attention work (zigzag), prefix hits
 * included, and what travels is what is cheaper: keys under a chunk, queries where few rows have many keys behind
 * them. That all ways give the bits of one rank: test_ranks.c. Ranks are threads. */
// SPDX-License-Identifier: Apache-2.0
#include "common/log.h"
#include "tests/worker/support_engine.h"
#include "tests/worker/support_ranks.h"
#include "worker/engine_int.h"
#include "worker/model/model_int.h"

enum { V = 509, PROMPT = 333, HIT = 256, ROWS = 340 };

/* Keys that each rank's rows look at, of the step that has just been computed: pieces differ by a row, so the ranks
 * by no more than two rows' keys. */
static void look_at_work(const td_model *m, const char *what)
{
    const td_share *s = &m->share;
    int R = td_model_cp(m);
    double most = 0, least = INFINITY, row = 0;
    for (int c = 0; c < R; c++) {
        double work = 0;
        for (int t = s->rank_row0[c]; t < s->rank_row0[c + 1]; t++)
            work += s->pos[t] + 1, row = TD_MAX(row, s->pos[t] + 1);
        most = TD_MAX(most, work), least = TD_MIN(least, work);
    }
    T_OK(row > 0 && most - least <= 2 * row, "%s on %d ranks: one has %.0f keys to look at, one %.0f", what,
         R, most, least);
}

/* One leg to its end. What travelled in its first step, and in all others. */
static void follow(td_engine *e, te_spec *s, bool keys_first, bool dealt, const char *what)
{
    const td_model *m = e->o.model;
    td_engine_out out;
    bool over = false;
    T_OK(td_engine_start(e, te_leg(s)) == TD_OK, "%s", td_reason());
    for (int step = 0; !over; step++) {
        uint64_t keys = m->context.n_keys, queries = m->context.n_queries;
        T_OK(td_engine_turn(e, &out) == TD_OK, "%s", td_reason());
        over = out.n_end > 0;
        keys = m->context.n_keys - keys, queries = m->context.n_queries - queries;
        uint64_t layers = (uint64_t)m->desc.L;
        if (!keys && !queries) continue; /* a turn that only told */
        bool first = m->share.T > 1;
        T_OK(keys == (first && keys_first ? layers : 0) && queries == layers - keys,
             "%s, %d rows: keys travelled for %llu layers, queries for %llu", what, m->share.T,
             (unsigned long long)keys, (unsigned long long)queries);
        if (first && dealt) look_at_work(m, what);
    }
}

static void run(td_engine *e, void *arg)
{
    te_spec a = te_make(1, PROMPT, 6, V), b = te_make(2, PROMPT, 6, V), c = te_make(3, HIT + 4, 6, V);
    (void)arg;
    memcpy(b.prompt, a.prompt, HIT * sizeof *b.prompt);
    memcpy(c.prompt, a.prompt, HIT * sizeof *c.prompt);
    follow(e, &a, true, true, "a prompt");
    td_engine_stats stats;
    follow(e, &b, true, true, "the rest behind a hit");
    follow(e, &c, false, false, "four rows behind a hit");
    td_engine_stats_get(e, &stats);
    T_EQ(stats.hit_tokens, 2 * HIT);
    te_drain(e);
}

int main(void)
{
    static const char *const shapes[] = {"ranks-tiny", "ranks-mqa"};
    const td_ops *ops;
    td_log_open("test", TD_LOG_ERROR);
    T_OK(td_ops_open("auto", &ops) == TD_OK);
    for (size_t i = 0; i < TD_COUNT(shapes); i++)
        for (int cp = 2; cp <= 4; cp *= 2) {
            tr_opts o = {.shape = shapes[i],
                         .ops = ops,
                         .attn_split = 64,
                         .depth = 1,
                         .grid = {.tp = 1, .pp = 1, .cp = cp, .dp = 1},
                         .engine = {.page_size = 16,
                                    .kv_pages = 200,
                                    .max_batched_tokens = ROWS,
                                    .max_seqs = 4,
                                    .max_legs = 8,
                                    .max_model_len = 400,
                                    .prefix_cache = true,
                                    .hash_key = {3, 4}}};
            T_OK(tr_run(&o, run, NULL), "%s, context %d", shapes[i], cp);
        }
    return T_DONE();
}
