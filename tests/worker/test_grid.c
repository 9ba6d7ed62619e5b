/* Grids: what the ranks hold together is the model, each part once (or by as many replicas as there must be); impossible
 * shapes are refused by their rule; layers are dealt by cost. */
// SPDX-License-Identifier: Apache-2.0
#include "common/check.h"
#include "common/log.h"
#include "tests/t.h"
#include "worker/grid.h"
#include "worker/kvmap.h"
#include "worker/profile.h"
#include <string.h>

static td_model_desc shape(const char *name)
{
    td_model_desc d;
    T_OK(td_model_desc_shape(name, &d) == TD_OK);
    return d;
}

static void count(int *n, int first, int len, int most)
{
    T_OK(first >= 0 && len >= 0 && first + len <= most);
    for (int i = first; i < first + len && i < most; i++) n[i]++;
}

/* Every row of each kind of part is held by `times` ranks of the grid. */
static void all_held(const int *n, int len, int times, const char *what, const td_grid *g)
{
    for (int i = 0; i < len; i++)
        T_OK(n[i] == times, "%s %d: %d of %d, tp %d pp %d cp %d dp %d ep %d", what, i, n[i], times, g->tp,
             g->pp, g->cp, g->dp, g->ep);
}

static void test_cover(const char *name)
{
    enum { MOST = 1 << 18 };
    td_model_desc d = shape(name);
    for (int cut = 0; cut < 4 * 4 * 4 * 2 * 2; cut++) {
        static int H[MOST], G[MOST], F[MOST], V[MOST], L[MOST], X[MOST];
        td_grid g = {.tp = 1 << (cut & 3),
                     .pp = 1 << (cut >> 2 & 3),
                     .cp = 1 << (cut >> 4 & 3),
                     .dp = 1 << (cut >> 6 & 1),
                     .ep = cut >> 7 & 1};
        if (td_grid_check(&g, &d) < 0) continue;
        int ranks = td_grid_ranks(&g), others = g.pp * g.cp * g.dp;
        memset(H, 0, sizeof H), memset(G, 0, sizeof G), memset(F, 0, sizeof F), memset(V, 0, sizeof V),
            memset(L, 0, sizeof L), memset(X, 0, sizeof X);
        for (int r = 0; r < ranks; r++) {
            td_coord c = td_grid_coord(&g, r);
            T_EQ(td_grid_rank(&g, c), r);
            td_local l = td_grid_local(&g, &d, r);
            count(H, l.h0, l.H, d.H), count(G, l.g0, l.G, d.G), count(F, l.f0, l.F, d.F);
            count(L, l.layer0, l.layer1 - l.layer0, d.L), count(X, l.x0, l.X, d.moe.route.n_experts);
            count(V, l.v0, l.V, d.V);
            T_OK(l.h0 / (d.H / d.G) == l.g0 || l.H > d.H / d.G || (l.h0 + l.H - 1) / (d.H / d.G) < l.g0 + l.G,
                 "a query head without its kv head");
            T_OK(l.first == (c.pp == 0) && l.last == (c.pp == g.pp - 1));
        }
        all_held(H, d.H, others, "head", &g);
        all_held(G, d.G, g.tp > d.G ? others * (g.tp / d.G) : others, "kv head", &g);
        all_held(F, d.F, others, "column", &g);
        all_held(V, d.V, others, "vocabulary row", &g);
        all_held(L, d.L, g.tp * g.cp * g.dp, "layer", &g);
        all_held(X, d.moe.route.n_experts, g.ep ? g.pp : ranks, "expert", &g);
    }
}

static void refused(const char *name, td_grid g, const char *rule)
{
    td_model_desc d = shape(name);
    T_OK(td_grid_check(&g, &d) < 0 && strstr(td_reason(), rule), "%s: %s", rule, td_reason());
}

/* Models whose sizes do not go with a grid that fits others. */
static void odd_sizes(void)
{
    static const struct {
        int H, G, F, moe_F, window, tp, cp;
        const char *rule;
    } odd[] = {
        {24, 6, 256, 0, 0, 4, 1, "kv heads 6 cannot be divided among tensor-parallel-size 4"},
        {24, 3, 256, 0, 0, 4, 1, "tensor-parallel-size 4 is no multiple of the 3 kv heads it exceeds"},
        {8, 2, 254, 0, 0, 4, 1, "feed-forward size 254 cannot be divided among tensor-parallel-size 4"},
        {8, 2, 256, 126, 0, 4, 1,
         "expert feed-forward size 126 cannot be divided among tensor-parallel-size 4"},
        {8, 2, 256, 0, 64, 1, 2,
         "context-parallel-size 2: LlamaForCausalLM has layers with a sliding window"}};
    for (size_t i = 0; i < TD_COUNT(odd); i++) {
        td_model_desc d = shape("ranks-tiny");
        td_grid g = {.tp = odd[i].tp, .pp = 1, .cp = odd[i].cp, .dp = 1},
                one = {.tp = 1, .pp = 1, .cp = 1, .dp = 1};
        d.H = odd[i].H, d.G = odd[i].G, d.F = odd[i].F, d.moe.F = odd[i].moe_F,
        d.group[0].window = odd[i].window;
        if (odd[i].moe_F) d.moe.route.n_experts = 8;
        T_OK(td_grid_check(&one, &d) == TD_OK, "%s", td_reason());
        T_OK(td_grid_check(&g, &d) < 0 && strstr(td_reason(), odd[i].rule), "%s: %s", odd[i].rule,
             td_reason());
    }
}

static void test_refused(void)
{
    refused("ranks-tiny", (td_grid){.tp = 16, .pp = 1, .cp = 1, .dp = 1}, "query heads 8");
    refused("ranks-tiny", (td_grid){.tp = 3, .pp = 1, .cp = 1, .dp = 1}, "no power of two");
    refused("ranks-tiny", (td_grid){.tp = 1, .pp = 5, .cp = 1, .dp = 1}, "4 layers");
    refused("ranks-tiny", (td_grid){.tp = 1, .pp = 1, .cp = 1, .dp = 1, .ep = true}, "no experts");
    refused("ranks-tiny", (td_grid){.tp = 2, .pp = 1, .cp = 1, .dp = 1, .fsdp = true}, "there is one");
    refused("moe-tiny", (td_grid){.tp = 8, .pp = 1, .cp = 2, .dp = 1, .ep = true},
            "16 ranks of a stage for 8 experts");
    refused("ranks-tiny", (td_grid){.tp = 0, .pp = 1, .cp = 1, .dp = 1}, "at least 1");
    refused("ranks-tiny", (td_grid){.tp = 8, .pp = 4, .cp = 1024, .dp = 1}, "more than 1024 ranks");
    odd_sizes();
}

/* The heaviest stage is as light as any cut into runs of layers could make it, to a tenth of a layer. */
static void test_deal(void)
{
    td_model_desc d = shape("1b");
    for (int pp = 2; pp <= 4; pp++)
        for (int cost = 1; cost < 80; cost += 7) {
            td_grid g = {.tp = 1, .pp = pp, .cp = 1, .dp = 1, .head_cost = cost};
            T_OK(td_grid_check(&g, &d) == TD_OK && g.layer0[0] == 0 && g.layer0[pp] == d.L);
            int heaviest = 0, ideal = (10 * d.L + cost + pp - 1) / pp;
            for (int s = 0; s < pp; s++) {
                int w = 10 * (g.layer0[s + 1] - g.layer0[s]) + (s == pp - 1 ? cost : 0);
                T_OK(w > 0 && g.layer0[s + 1] > g.layer0[s]);
                if (w > heaviest) heaviest = w;
            }
            T_OK(heaviest <= (ideal > cost ? ideal : cost) + 10, "%d stages, head %d: %d, ideal %d", pp, cost,
                 heaviest, ideal);
        }
}

/* The output matrix's share is measured, not worked out: 64 times the rows take longer by much more than any other
 * work on the machine could hide, and such a last stage gets fewer layers. */
static void test_measured(void)
{
    td_model_desc few = shape("0.5b"), many = few;
    const td_ops *ops;
    T_OK(td_ops_open("auto", &ops) == TD_OK);
    td_pool *pool = td_pool_open(1);
    few.V = few.V / 64;
    int low = td_profile_head_cost(pool, ops, &few, 1), high = td_profile_head_cost(pool, ops, &many, 1);
    T_OK(low >= 1 && high > 4 * low, "%d tenths of a layer, with 64 times the rows %d", low, high);
    td_grid a = {.tp = 1, .pp = 2, .cp = 1, .dp = 1, .head_cost = low}, b = a;
    b.head_cost = high;
    T_OK(td_grid_check(&a, &few) == TD_OK && td_grid_check(&b, &many) == TD_OK);
    T_OK(many.L - b.layer0[1] < few.L - a.layer0[1],
         "the last stage: %d layers beside a small matrix, %d beside a large one", few.L - a.layer0[1],
         many.L - b.layer0[1]);
    td_pool_close(pool);
}

static void test_kvmap(void)
{
    for (uint32_t R = 1; R <= 5; R++)
        for (uint32_t n = 0; n < 700; n += 13) {
            td_kvmap m = {64, R};
            uint32_t held[5] = {0}, most = 0;
            for (uint32_t t = 0; t < n; t++) {
                uint32_t o = td_kvmap_owner(m, t);
                T_OK(o < R);
                T_EQ(td_kvmap_local(m, t), held[o]); /* in order, without holes */
                if (++held[o] > most) most = held[o];
            }
            T_EQ(td_kvmap_most(m, n), most);
        }
}

int main(void)
{
    td_log_open("test", TD_LOG_ERROR);
    test_cover("ranks-tiny");
    test_cover("ranks-mqa");
    test_cover("moe-tiny");
    test_cover("tiny");
    test_refused();
    test_deal();
    test_measured();
    test_kvmap();
    return T_DONE();
}
