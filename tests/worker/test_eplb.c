/* Experts' places: copies and packing against every possible choice for small sizes, their rules for large ones. */
// SPDX-License-Identifier: Apache-2.0
#include "tests/t.h"
#include "worker/eplb.h"
#include "common/check.h"
#include <stdbool.h>

static uint64_t state = 1;
static uint32_t draw(uint32_t n)
{
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)((state >> 33) % n);
}

/* ---- every choice ---- */

typedef struct search {
    int experts, slots, ranks;
    const uint64_t *load;
    const int32_t *slot0;
    int32_t count[8];
    int rank_used[4];
    double rank_load[4], best_copy, best;
    bool has[4][8];
} search;

/* Copy c of expert e on every rank that may have it; copies of one expert on ascending ranks. */
static void place_all(search *s, int e, int c, int from)
{
    if (e == s->experts) {
        double most = 0;
        for (int r = 0; r < s->ranks; r++) most = TD_MAX(most, s->rank_load[r]);
        s->best = TD_MIN(s->best, most);
        return;
    }
    if (c == s->count[e]) {
        place_all(s, e + 1, 0, 0);
        return;
    }
    double load = (double)s->load[e] / s->count[e];
    for (int r = from; r < s->ranks; r++) {
        if (s->rank_used[r] == s->slot0[r + 1] - s->slot0[r]) continue;
        s->rank_used[r]++, s->rank_load[r] += load;
        place_all(s, e, c + 1, r + 1);
        s->rank_used[r]--, s->rank_load[r] -= load;
    }
}

static void count_all(search *s, int e, int left)
{
    if (e == s->experts) {
        double most = 0;
        for (int i = 0; i < s->experts; i++) most = TD_MAX(most, (double)s->load[i] / s->count[i]);
        if (left) return;
        s->best_copy = TD_MIN(s->best_copy, most);
        place_all(s, 0, 0, 0);
        return;
    }
    for (int c = 1; c <= TD_MIN(s->ranks, left + 1); c++) {
        s->count[e] = c;
        count_all(s, e + 1, left - (c - 1));
    }
}

/* ---- the rules ---- */

static void deal(int experts, int slots, int ranks, int32_t *slot0)
{
    int32_t own[256];
    for (int r = 0; r < ranks; r++) own[r] = experts * (r + 1) / ranks - experts * r / ranks;
    td_eplb_deal(slots, ranks, own, slot0);
    T_EQ(slot0[ranks], slots);
    for (int r = 0; r < ranks; r++) {
        int n = slot0[r + 1] - slot0[r];
        T_OK(n >= own[r] && n >= slots / ranks && n <= (slots + ranks - 1) / ranks,
             "rank %d of %d: %d slots, %d experts", r, ranks, n, own[r]);
    }
}

static bool valid(const td_eplb_shape *s, const int32_t *map)
{
    int seen[512] = {0};
    for (int r = 0; r < s->ranks; r++)
        for (int i = s->slot0[r]; i < s->slot0[r + 1]; i++) {
            if (map[i] < 0 || map[i] >= s->experts) return false;
            seen[map[i]]++;
            for (int j = s->slot0[r]; j < i; j++)
                if (map[j] == map[i]) return false;
        }
    for (int e = 0; e < s->experts; e++)
        if (!seen[e]) return false;
    return true;
}

static void loads(int kind, int n, uint64_t *load)
{
    for (int e = 0; e < n; e++)
        switch (kind) {
        case 0: load[e] = 1 + draw(100); break;
        case 1: load[e] = 100000 / ((uint64_t)e + 1); break; /* as words are */
        case 2: load[e] = draw(3) ? draw(5) : 1000 + draw(1000); break;
        case 3: load[e] = e == (int)draw((uint32_t)n) ? 1000 : 0; break;
        case 4: load[e] = 0; break;
        default: load[e] = ((uint64_t)1 << 61) + ((uint64_t)draw(1u << 30) << 28); break;
        }
}

static double worst = 0, total = 0;
static int cases;

static void small(int experts, int slots, int ranks)
{
    int32_t slot0[5], map[8], count[8];
    uint64_t load[8];
    deal(experts, slots, ranks, slot0);
    for (int kind = 0; kind < 6; kind++) {
        loads(kind, experts, load);
        search s = {.experts = experts,
                    .slots = slots,
                    .ranks = ranks,
                    .load = load,
                    .slot0 = slot0,
                    .best = 1e30,
                    .best_copy = 1e30};
        td_eplb_shape shape = {.experts = experts, .ranks = ranks, .slot0 = slot0};
        count_all(&s, 0, slots - experts);
        td_eplb_replicate(load, experts, slots - experts, ranks, count);
        double copy = 0, mean = 0;
        for (int e = 0; e < experts; e++)
            copy = TD_MAX(copy, (double)load[e] / count[e]), mean += (double)load[e] / ranks;
        T_OK(copy <= s.best_copy * (1 + 1e-9), "%d experts, %d slots, %d ranks: %g a copy, %g is possible",
             experts, slots, ranks, copy, s.best_copy);
        td_eplb_plan(&shape, load, map);
        T_OK(valid(&shape, map));
        double got = td_eplb_balance(&shape, load, map), best = mean > 0 ? s.best / mean : 1;
        T_OK(got <= best * 4 / 3 + 1e-9 && got >= best - 1e-6,
             "%d experts, %d slots, %d ranks, kind %d: %g, %g is possible", experts, slots, ranks, kind, got,
             best);
        worst = TD_MAX(worst, got / best);
        total += got / best, cases++;
    }
}

static void large(int experts, int slots, int ranks, int groups, int nodes)
{
    int32_t slot0[257], map[512], again[512], old[512];
    uint64_t load[512];
    deal(experts, slots, ranks, slot0);
    td_eplb_shape shape = {experts, ranks, groups, nodes, slot0};
    for (int i = 0; i < slots; i++) old[i] = -1;
    for (int r = 0, e = 0; r < ranks; r++)
        for (int i = 0; e < experts * (r + 1) / ranks; i++) old[slot0[r] + i] = e++;
    for (int kind = 0; kind < 6; kind++) {
        loads(kind, experts, load);
        td_eplb_plan(&shape, load, map);
        td_eplb_plan(&shape, load, again);
        T_OK(valid(&shape, map) && !memcmp(map, again, (size_t)slots * sizeof *map),
             "%d experts, %d slots, %d ranks", experts, slots, ranks);
        /* Better than blocks of experts, or as good as even. */
        double planned = td_eplb_balance(&shape, load, map), before = td_eplb_balance(&shape, load, old);
        if (nodes < 2)
            T_OK(planned <= before + 1e-9 || planned < 1.2,
                 "%d experts, %d slots, %d ranks, kind %d: %g, was %g", experts, slots, ranks, kind, planned,
                 before);
        memcpy(again, map, sizeof map);
        td_eplb_settle(&shape, old, map);
        T_OK(valid(&shape, map) && fabs(td_eplb_balance(&shape, load, map) - planned) < 1e-9);
        int stay = 0, stayed = 0;
        for (int i = 0; i < slots; i++) stay += map[i] == old[i], stayed += again[i] == old[i];
        T_OK(stay >= stayed, "%d slots stay, %d did", stay, stayed);
        memcpy(again, map, sizeof map);
        td_eplb_settle(&shape, map, again);
        T_OK(!memcmp(again, map, (size_t)slots * sizeof *map), "what has settled stays");
        if (nodes < 2) continue;
        int of[512];
        for (int g = 0; g < groups; g++) of[g] = -1;
        for (int r = 0; r < ranks; r++)
            for (int i = slot0[r]; i < slot0[r + 1]; i++) {
                int *at = &of[map[i] / (experts / groups)], node = r / (ranks / nodes);
                T_OK(*at < 0 || *at == node, "a group's experts are on two nodes");
                *at = node;
            }
    }
}

int main(void)
{
    for (int experts = 1; experts <= 6; experts++)
        for (int ranks = 1; ranks <= 4; ranks++)
            for (int slots = TD_MAX(experts, ranks); slots <= TD_MIN(8, experts * ranks); slots++)
                for (int i = 0; i < 20; i++) small(experts, slots, ranks);
    for (int i = 0; i < 40; i++) {
        int ranks = 1 + (int)draw(16), experts = ranks + (int)draw(60), most = TD_MIN(experts * ranks - experts, 20);
        large(experts, experts + (int)draw((uint32_t)most + 1), ranks, 0, 0);
    }
    large(256, 288, 32, 8, 4);
    large(64, 64, 8, 8, 2);
    large(64, 80, 8, 8, 4);
    large(12, 16, 4, 4, 2);
    printf("%d small cases: at worst %.3f of the best possible, %.3f on average\n", cases, worst, total / cases);
    return T_DONE();
}
