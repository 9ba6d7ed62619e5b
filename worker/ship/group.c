// SPDX-License-Identifier: Apache-2.0
#include "worker/ship/group.h"
#include "common/check.h"
#include "common/map.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct entry {
    uint64_t heard; /* bit per rank of its replica */
    uint32_t replica;
    bool sending, bad, lost, over;
    char reason[160];
    td_ship_event *own; /* what will be said: rank 0's word, or made from the first rank's of its replica */
    uint64_t bytes;
    uint32_t frames;
    int64_t transfer_us, exposed_us;
} entry;

typedef struct waiting { struct waiting *next; td_ship_event *e; } waiting;

struct td_ship_group {
    uint32_t n_ranks;
    td_map keys;                 /* -> entry * */
    waiting *first, **last;
};

td_ship_group *td_ship_group_open(uint32_t n_ranks, uint32_t max_keys)
{
    td_ship_group *g = td_xalloc(sizeof *g);
    TD_CHECK(n_ranks >= 1 && n_ranks <= 64);
    g->n_ranks = n_ranks;
    td_map_init(&g->keys, max_keys);
    g->last = &g->first;
    return g;
}

void td_ship_group_free(td_ship_group *g)
{
    if (!g) return;
    size_t it = 0;
    uint64_t k, v;
    td_ship_event *e;
    while ((e = td_ship_group_next(g))) td_ship_event_free(e);
    while (td_map_next(&g->keys, &it, &k, &v)) {
        entry *x = (entry *)(uintptr_t)v;
        if (x->own) td_ship_event_free(x->own);
        free(x);
    }
    td_map_deinit(&g->keys);
    free(g);
}

static entry *find(td_ship_group *g, uint64_t key)
{
    uint64_t v;
    return td_map_get(&g->keys, key, &v) ? (entry *)(uintptr_t)v : NULL;
}

void td_ship_group_begin(td_ship_group *g, uint64_t key, bool sending, uint32_t replica)
{
    if (find(g, key)) return;
    entry *x = td_xalloc(sizeof *x);
    x->sending = sending;
    x->replica = replica;
    if (!td_map_put(&g->keys, key, (uint64_t)(uintptr_t)x))
        free(x); /* its words are dropped: never more keys */
}

static void put(td_ship_group *g, td_ship_event *e)
{
    waiting *w = td_xalloc(sizeof *w);
    w->e = e;
    *g->last = w;
    g->last = &w->next;
}

td_ship_event *td_ship_group_next(td_ship_group *g)
{
    waiting *w = g->first;
    if (!w) return NULL;
    td_ship_event *e = w->e;
    g->first = w->next;
    if (!g->first) g->last = &g->first;
    free(w);
    return e;
}

static void recall(td_ship_group *g, uint64_t key, const entry *x)
{
    td_ship_event *e = td_xalloc(sizeof *e);
    e->type = TD_SHIP_RECALL;
    e->key = key;
    e->sending = x->sending;
    e->over = x->over;
    memcpy(e->reason, x->reason, sizeof e->reason);
    td_arena_init(&e->arena, 0);
    put(g, e);
}

static void decide(td_ship_group *g, uint64_t key, entry *x)
{
    td_ship_event *e = x->own;
    e->sending = x->sending;
    e->bytes = x->bytes;
    e->frames = x->frames;
    e->transfer_us = x->transfer_us;
    e->exposed_us = x->exposed_us;
    if (x->sending) e->ok = !x->bad;
    else if (x->bad) e->type = x->lost ? TD_SHIP_LOST : TD_SHIP_CLOSED;
    e->over = x->over;
    if (x->bad) memcpy(e->reason, x->reason, sizeof e->reason);
    put(g, e);
    td_map_del(&g->keys, key);
    free(x);
}

static void word(td_ship_group *g, entry *x, const td_ship_report *r)
{
    bool good = r->type == TD_SHIP_LANDED || (r->type == TD_SHIP_SENT && r->ok);
    uint64_t all = g->n_ranks == 64 ? ~0ull : (1ull << g->n_ranks) - 1;
    x->heard |= 1ull << r->rank % g->n_ranks;
    x->bytes += r->bytes;
    x->frames += r->frames;
    x->transfer_us = TD_MAX(x->transfer_us, r->transfer_us);
    x->exposed_us = TD_MAX(x->exposed_us, r->exposed_us);
    x->over |= r->over;
    x->lost |= r->type == TD_SHIP_LOST;
    if (!good && !x->bad) {
        x->bad = true;
        size_t n = strnlen(r->reason, sizeof r->reason - 1);
        if (r->rank) snprintf(x->reason, sizeof x->reason, "rank %u: %.*s", r->rank, (int)n, r->reason);
        else snprintf(x->reason, sizeof x->reason, "%.*s", (int)n, r->reason);
        if (x->heard != all) recall(g, r->key, x);
    }
    if (x->heard == all) decide(g, r->key, x);
}

void td_ship_group_own(td_ship_group *g, td_ship_event *e)
{
    entry *x = find(g, e->key);
    if (!x || x->own || x->replica) {
        td_ship_event_free(e);
        return;
    }
    td_ship_report r;
    td_ship_event_report(e, 0, &r);
    x->own = e;
    word(g, x, &r);
}

/* The word of the first rank of a replica that rank 0 is not of, as rank 0's own would be. */
static td_ship_event *event_of(td_ship_report *r, const void *commit)
{
    td_ship_event *e = td_xalloc(sizeof *e);
    e->type = (td_ship_event_type)r->type;
    e->key = r->key;
    td_arena_init(&e->arena, 1 << 20);
    if (r->type != TD_SHIP_LANDED ||
        td_commit_read(&e->arena, commit, r->commit_bytes, r->n_first, &e->commit) == TD_OK)
        return e;
    e->type = TD_SHIP_LOST;
    r->type = TD_SHIP_LOST;
    snprintf(r->reason, sizeof r->reason, "%s", td_reason());
    return e;
}

void td_ship_group_peer(td_ship_group *g, const td_ship_report *r, const void *commit)
{
    entry *x = find(g, r->key);
    uint32_t place = r->rank % g->n_ranks;
    if (!x || !r->rank || r->rank / g->n_ranks != x->replica || x->heard >> place & 1) return;
    if (x->sending != (r->type == TD_SHIP_SENT) || r->type > TD_SHIP_CLOSED) return;
    td_ship_report said = *r;
    if (!place) x->own = event_of(&said, commit);
    word(g, x, &said);
}
