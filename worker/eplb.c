// SPDX-License-Identifier: Apache-2.0
#include "worker/eplb.h"
#include "common/check.h"
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum { FRACTION = 16, LOAD_BITS = 36, TRIES = 8 };

typedef struct item { uint64_t load; int expert; } item; /* a copy, or a group of experts */

/* Packs with room for room[p] items; of one key a pack takes one item at most. */
typedef struct packing {
    const item *in;
    int n, packs;
    const int32_t *room;
    int32_t *pack;           /* [n] */
    int32_t *used;           /* [packs] */
    uint64_t *weight;        /* [packs] */
} packing;

/* ---- copies ---- */

/* Is a / na < b / nb? Loads have at most LOAD_BITS bits. */
static bool less(uint64_t a, int na, uint64_t b, int nb)
{
    return a * (uint64_t)nb < b * (uint64_t)na;
}

/* Right shift that leaves LOAD_BITS of the largest load. */
static int shift_of(const uint64_t *load, int n)
{
    int shift = 0;
    for (int e = 0; e < n; e++)
        while (load[e] >> shift >> LOAD_BITS) shift++;
    return shift;
}

void td_eplb_replicate(const uint64_t *load, int n, int extra, int most, int32_t *count)
{
    int shift = shift_of(load, n);
    for (int e = 0; e < n; e++) count[e] = 1;
    for (; extra > 0; extra--) {
        int best = -1;
        for (int e = 0; e < n; e++)
            if (count[e] < most &&
                (best < 0 || less(load[best] >> shift, count[best], load[e] >> shift, count[e])))
                best = e;
        TD_CHECK(best >= 0); /* slots <= experts * ranks */
        count[best]++;
    }
}

/* ---- packing ---- */

static int heavier_first(const void *pa, const void *pb)
{
    const item *a = pa, *b = pb;
    if (a->load != b->load) return a->load > b->load ? -1 : 1;
    return a->expert < b->expert ? -1 : a->expert > b->expert;
}

static bool holds(const packing *k, int p, int expert)
{
    for (int i = 0; i < k->n; i++)
        if (k->pack[i] == p && k->in[i].expert == expert) return true;
    return false;
}

static void put(packing *k, int i, int p)
{
    if (k->pack[i] >= 0) {
        k->used[k->pack[i]]--;
        k->weight[k->pack[i]] -= k->in[i].load;
    }
    k->pack[i] = p;
    k->used[p]++;
    k->weight[p] += k->in[i].load;
}

/* Only packs that have a copy of i's expert have room. A full one without makes room: something of its goes to one with. It
 * exists: the full pack has at least as many others as the one with room, and that has the expert besides. */
static void make_room(packing *k, int i)
{
    for (int full = 0; full < k->packs; full++) {
        if (k->used[full] < k->room[full] || holds(k, full, k->in[i].expert)) continue;
        for (int p = 0; p < k->packs; p++) {
            if (k->used[p] == k->room[p]) continue;
            for (int j = 0; j < k->n; j++) {
                if (k->pack[j] != full || holds(k, p, k->in[j].expert)) continue;
                put(k, j, p);
                put(k, i, full);
                return;
            }
        }
    }
    TD_CHECK(!"a copy has a place");
}

static uint64_t larger(uint64_t a, uint64_t b) { return a > b ? a : b; }

/* One exchange between the heaviest pack and another after which both are lighter than it was. The best; false: none. */
static bool exchange(packing *k)
{
    int heavy = 0, best_i = -1, best_j = -1;
    for (int p = 1; p < k->packs; p++)
        if (k->weight[p] > k->weight[heavy]) heavy = p;
    uint64_t most = k->weight[heavy], least = most;
    for (int i = 0; i < k->n; i++) {
        if (k->pack[i] != heavy) continue;
        for (int j = 0; j < k->n; j++) {
            int p = k->pack[j];
            if (p == heavy || k->in[j].load >= k->in[i].load) continue;
            uint64_t d = k->in[i].load - k->in[j].load, after = larger(most - d, k->weight[p] + d);
            if (after >= least || holds(k, p, k->in[i].expert) || holds(k, heavy, k->in[j].expert)) continue;
            least = after, best_i = i, best_j = j;
        }
    }
    if (best_i < 0) return false;
    int p = k->pack[best_j];
    put(k, best_j, heavy);
    put(k, best_i, p);
    return true;
}

static void pack_all(packing *k)
{
    for (int i = 0; i < k->n; i++) k->pack[i] = -1;
    for (int i = 0; i < k->n; i++) {
        int best = -1;
        for (int p = 0; p < k->packs; p++)
            if (k->used[p] < k->room[p] && (best < 0 || k->weight[p] < k->weight[best]) &&
                !holds(k, p, k->in[i].expert))
                best = p;
        if (best >= 0) put(k, i, best);
        else make_room(k, i);
    }
    for (int tries = 4 * k->n; tries > 0 && exchange(k); tries--) {}
}

static packing packing_open(const item *in, int n, int packs, const int32_t *room)
{
    return (packing){in,
                     n,
                     packs,
                     room,
                     td_xalloc((size_t)n * sizeof(int32_t)),
                     td_xalloc((size_t)packs * sizeof(int32_t)),
                     td_xalloc((size_t)packs * sizeof(uint64_t))};
}

static void packing_close(packing *k)
{
    free(k->pack), free(k->used), free(k->weight);
}

/* ---- the plan ---- */

/* Some ranks' part of a plan: experts ids[n] with these loads on ranks [r0, r0 + ranks). */
typedef struct part {
    const td_eplb_shape *s;
    const uint64_t *load;    /* [n], of LOAD_BITS */
    const int32_t *ids;
    int n, r0, ranks, slots;
    int32_t *count, *room;   /* [n], [ranks] */
    item *items;             /* [slots] */
} part;

/* The least loaded experts get the copies that are not for balance. */
static void fill_up(const part *t, int more)
{
    for (; more > 0; more--) {
        int best = -1;
        for (int e = 0; e < t->n; e++)
            if (t->count[e] < t->ranks &&
                (best < 0 || less(t->load[e], t->count[e], t->load[best], t->count[best])))
                best = e;
        TD_CHECK(best >= 0);
        t->count[best]++;
    }
}

/* `useful` of the redundant copies by load; the map is written if its heaviest rank is below *least. */
static void try_copies(const part *t, int useful, uint64_t *least, int32_t *map)
{
    int at = 0;
    uint64_t most = 0;
    td_eplb_replicate(t->load, t->n, useful, t->ranks, t->count);
    fill_up(t, t->slots - t->n - useful);
    for (int e = 0; e < t->n; e++)
        for (int c = 0; c < t->count[e]; c++)
            t->items[at++] = (item){(t->load[e] << FRACTION) / (uint64_t)t->count[e], t->ids[e]};
    qsort(t->items, (size_t)t->slots, sizeof *t->items, heavier_first);
    packing k = packing_open(t->items, t->slots, t->ranks, t->room);
    pack_all(&k);
    for (int r = 0; r < t->ranks; r++) most = larger(most, k.weight[r]);
    for (int r = 0; r < t->ranks && most < *least; r++) {
        int32_t *slot = map + t->s->slot0[t->r0 + r];
        for (int i = 0; i < t->slots; i++)
            if (k.pack[i] == r) *slot++ = t->items[i].expert;
    }
    if (most < *least) *least = most;
    packing_close(&k);
}

/* All redundant copies by load are not always best: the copy of a middling expert is one more piece to place. */
static void plan_ranks(const td_eplb_shape *s, const uint64_t *load, const int32_t *ids, int n, int r0,
                       int ranks, int32_t *map)
{
    part t = {.s = s, .ids = ids, .n = n, .r0 = r0, .ranks = ranks, .slots = s->slot0[r0 + ranks] - s->slot0[r0]};
    int shift = shift_of(load, s->experts), extra = t.slots - n, step = (extra + TRIES - 1) / TRIES;
    uint64_t *own = td_xalloc((size_t)n * sizeof *own), least = UINT64_MAX, even = 0;
    for (int e = 0; e < n; e++) own[e] = load[ids[e]] >> shift;
    t.load = own;
    t.count = td_xalloc((size_t)n * sizeof *t.count), t.room = td_xalloc((size_t)ranks * sizeof *t.room);
    t.items = td_xalloc((size_t)t.slots * sizeof *t.items);
    for (int r = 0; r < ranks; r++) t.room[r] = s->slot0[r0 + r + 1] - s->slot0[r0 + r];
    for (int e = 0; e < n; e++) even += own[e] << FRACTION;
    even = even / (uint64_t)ranks / 100 * 101; /* good enough */
    try_copies(&t, extra, &least, map);
    for (int useful = extra - step; step && useful >= 0 && least > even; useful -= step)
        try_copies(&t, useful, &least, map);
    free(own), free(t.count), free(t.room), free(t.items);
}

static bool by_nodes(const td_eplb_shape *s)
{
    int slots = s->slot0[s->ranks], m = s->nodes;
    if (s->groups < 2 || m < 2 || s->groups % m || s->experts % s->groups || s->ranks % m || slots % m) return false;
    for (int i = 0; i <= m; i++)
        if (s->slot0[s->ranks / m * i] != slots / m * i) return false;
    return slots / m <= s->experts / m * (s->ranks / m);
}

static void plan_nodes(const td_eplb_shape *s, const uint64_t *load, int32_t *map)
{
    int per = s->experts / s->groups, m = s->nodes, shift = shift_of(load, s->experts), ranks = s->ranks / m;
    item *group = td_xalloc((size_t)s->groups * sizeof *group);
    int32_t *room = td_xalloc((size_t)m * sizeof *room), *ids = td_xalloc((size_t)s->experts * sizeof *ids);
    for (int g = 0; g < s->groups; g++) {
        group[g].expert = g;
        for (int e = 0; e < per; e++) group[g].load += load[g * per + e] >> shift;
    }
    qsort(group, (size_t)s->groups, sizeof *group, heavier_first);
    for (int i = 0; i < m; i++) room[i] = s->groups / m;
    packing k = packing_open(group, s->groups, m, room);
    pack_all(&k);
    for (int i = 0; i < m; i++) {
        int n = 0;
        for (int g = 0; g < s->groups; g++)
            for (int e = 0; k.pack[g] == i && e < per; e++) ids[n++] = group[g].expert * per + e;
        plan_ranks(s, load, ids, n, i * ranks, ranks, map);
    }
    packing_close(&k);
    free(group), free(room), free(ids);
}

void td_eplb_plan(const td_eplb_shape *s, const uint64_t *load, int32_t *map)
{
    if (by_nodes(s)) {
        plan_nodes(s, load, map);
        return;
    }
    int32_t *ids = td_xalloc((size_t)s->experts * sizeof *ids);
    for (int e = 0; e < s->experts; e++) ids[e] = e;
    plan_ranks(s, load, ids, s->experts, 0, s->ranks, map);
    free(ids);
}

/* ---- slots ---- */

void td_eplb_deal(int slots, int ranks, const int32_t *own, int32_t *slot0)
{
    int each = slots / ranks, more = slots % ranks;
    for (int r = 0; r < ranks; r++) slot0[r + 1] = each;
    for (int pass = 0; pass < 2; pass++) /* first to those that need it */
        for (int r = 0; r < ranks && more; r++)
            if (slot0[r + 1] == each && (pass || own[r] > each)) slot0[r + 1]++, more--;
    slot0[0] = 0;
    for (int r = 0; r < ranks; r++) slot0[r + 1] += slot0[r];
}

static int common(const td_eplb_shape *s, const int32_t *old, int r, const int32_t *map, int q)
{
    int n = 0;
    for (int i = s->slot0[r]; i < s->slot0[r + 1]; i++)
        for (int j = s->slot0[q]; j < s->slot0[q + 1]; j++) n += old[i] >= 0 && old[i] == map[j];
    return n;
}

/* Which of the planned contents each rank takes: the one that has most of what it has already. */
static void settle_ranks(const td_eplb_shape *s, const int32_t *old, const int32_t *plan, int32_t *map)
{
    int per = by_nodes(s) ? s->ranks / s->nodes : s->ranks;
    int32_t *shared = td_xalloc((size_t)s->ranks * (size_t)per * sizeof *shared);
    bool *has = td_xalloc((size_t)s->ranks), *taken = td_xalloc((size_t)s->ranks);
    for (int r = 0; r < s->ranks; r++)
        for (int i = 0; i < per; i++) shared[r * per + i] = common(s, old, r, plan, r / per * per + i);
    for (int n = 0; n < s->ranks; n++) {
        int best = -1, of = -1;
        for (int r = 0; r < s->ranks; r++)
            for (int i = 0; i < per && !has[r]; i++) {
                int q = r / per * per + i;
                bool fits = s->slot0[r + 1] - s->slot0[r] == s->slot0[q + 1] - s->slot0[q];
                if (fits && !taken[q] && (best < 0 || shared[r * per + i] > shared[best * per + of % per]))
                    best = r, of = q;
            }
        TD_CHECK(best >= 0); /* as many contents of each size as ranks */
        has[best] = taken[of] = true;
        memcpy(map + s->slot0[best], plan + s->slot0[of], (size_t)(s->slot0[of + 1] - s->slot0[of]) * sizeof *map);
    }
    free(shared), free(has), free(taken);
}

/* Of one rank: what it has already stays in its slot. */
static void settle_slots(const int32_t *old, int32_t *map, int n)
{
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n && old[i] != map[i]; j++)
            if (map[j] == old[i]) {
                int32_t t = map[i];
                map[i] = map[j], map[j] = t;
            }
}

void td_eplb_settle(const td_eplb_shape *s, const int32_t *old, int32_t *map)
{
    size_t n = (size_t)s->slot0[s->ranks];
    int32_t *plan = td_xalloc(n * sizeof *plan);
    memcpy(plan, map, n * sizeof *plan);
    settle_ranks(s, old, plan, map);
    for (int r = 0; r < s->ranks; r++)
        settle_slots(old + s->slot0[r], map + s->slot0[r], s->slot0[r + 1] - s->slot0[r]);
    free(plan);
}

double td_eplb_balance(const td_eplb_shape *s, const uint64_t *load, const int32_t *map)
{
    double most = 0, all = 0;
    int32_t *count = td_xalloc((size_t)s->experts * sizeof *count);
    for (int i = 0; i < s->slot0[s->ranks]; i++)
        if (map[i] >= 0) count[map[i]]++;
    for (int r = 0; r < s->ranks; r++) {
        double sum = 0;
        for (int i = s->slot0[r]; i < s->slot0[r + 1]; i++)
            if (map[i] >= 0) sum += (double)load[map[i]] / count[map[i]];
        all += sum;
        if (sum > most) most = sum;
    }
    free(count);
    return all > 0 ? most * s->ranks / all : 1;
}
