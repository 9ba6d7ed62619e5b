/* router/core/index.c - open addressing over an array of entries that are also a doubly linked LRU list. */
// SPDX-License-Identifier: Apache-2.0
#include "router/core/index.h"
#include "common/check.h"

#include <stdlib.h>
#include <string.h>

enum { NONE = UINT32_MAX };

typedef struct entry {
    td_h128 hash;
    uint64_t bits;
    uint32_t newer, older; /* LRU list; free entries are chained by `older` */
} entry;

struct td_index {
    entry *e;
    uint32_t *slot; /* hash table of entry numbers + 1; 0: empty */
    uint32_t mask, max, n, free_list, newest, oldest;
};

td_index *td_index_open(uint32_t max_entries)
{
    td_index *x = td_xalloc(sizeof *x);
    uint32_t cap = 16;
    while (cap < max_entries * 2) cap *= 2;
    x->max = max_entries;
    x->mask = cap - 1;
    x->slot = td_xalloc(cap * sizeof *x->slot);
    x->e = td_xalloc(max_entries * sizeof *x->e);
    x->newest = x->oldest = NONE;
    for (uint32_t i = 0; i < max_entries; i++) x->e[i].older = i + 1 < max_entries ? i + 1 : NONE;
    x->free_list = max_entries ? 0 : NONE;
    return x;
}

void td_index_close(td_index *x)
{
    if (!x) return;
    free(x->slot);
    free(x->e);
    free(x);
}

/* The hash is keyed and already uniform; its low half is enough to spread. */
static uint32_t home(const td_index *x, td_h128 h) { return (uint32_t)h.lo & x->mask; }

static uint32_t find_slot(const td_index *x, td_h128 h)
{
    uint32_t i = home(x, h);
    while (x->slot[i]) {
        const entry *e = &x->e[x->slot[i] - 1];
        if (e->hash.lo == h.lo && e->hash.hi == h.hi) break;
        i = (i + 1) & x->mask;
    }
    return i;
}

static void unlink_entry(td_index *x, uint32_t n)
{
    entry *e = &x->e[n];
    if (e->newer == NONE) x->newest = e->older;
    else x->e[e->newer].older = e->older;
    if (e->older == NONE) x->oldest = e->newer;
    else x->e[e->older].newer = e->newer;
}

static void link_newest(td_index *x, uint32_t n)
{
    entry *e = &x->e[n];
    e->newer = NONE;
    e->older = x->newest;
    if (x->newest != NONE) x->e[x->newest].newer = n;
    x->newest = n;
    if (x->oldest == NONE) x->oldest = n;
}

/* Backward-shift deletion keeps probe chains whole without tombstones. */
static void remove_entry(td_index *x, uint32_t n)
{
    uint32_t i = find_slot(x, x->e[n].hash), j = i;
    for (;;) {
        j = (j + 1) & x->mask;
        if (!x->slot[j]) break;
        uint32_t h = home(x, x->e[x->slot[j] - 1].hash);
        if (((j - h) & x->mask) < ((j - i) & x->mask)) continue;
        x->slot[i] = x->slot[j];
        i = j;
    }
    x->slot[i] = 0;
    unlink_entry(x, n);
    x->e[n].older = x->free_list;
    x->free_list = n;
    x->n--;
}

void td_index_add(td_index *x, unsigned slot, const td_h128 *blocks, uint32_t n)
{
    TD_CHECK(slot < TD_INDEX_SLOTS);
    /* Newest last block would be evicted last; a prefix is useless without its head, so the head is touched
     * last. */
    if (n > x->max) n = x->max;
    for (uint32_t j = n; j-- > 0;) {
        uint32_t i = find_slot(x, blocks[j]);
        if (!x->slot[i]) {
            if (x->free_list == NONE) {
                remove_entry(x, x->oldest);
                i = find_slot(x, blocks[j]);
            }
            uint32_t k = x->free_list;
            x->free_list = x->e[k].older;
            x->e[k] = (entry){.hash = blocks[j]};
            x->slot[i] = k + 1;
            x->n++;
        } else {
            unlink_entry(x, x->slot[i] - 1);
        }
        x->e[x->slot[i] - 1].bits |= UINT64_C(1) << slot;
        link_newest(x, x->slot[i] - 1);
    }
}

void td_index_match(td_index *x, const td_h128 *blocks, uint32_t n, uint32_t out[TD_INDEX_SLOTS])
{
    memset(out, 0, TD_INDEX_SLOTS * sizeof *out);
    uint64_t alive = UINT64_MAX;
    for (uint32_t j = 0; j < n && alive; j++) {
        uint32_t i = find_slot(x, blocks[j]);
        if (!x->slot[i]) return;
        alive &= x->e[x->slot[i] - 1].bits;
        for (uint64_t b = alive; b; b &= b - 1) out[__builtin_ctzll(b)] = j + 1;
    }
}

void td_index_drop(td_index *x, unsigned slot)
{
    TD_CHECK(slot < TD_INDEX_SLOTS);
    uint32_t n = x->oldest;
    while (n != NONE) {
        uint32_t newer = x->e[n].newer;
        x->e[n].bits &= ~(UINT64_C(1) << slot);
        if (!x->e[n].bits) remove_entry(x, n);
        n = newer;
    }
}

uint32_t td_index_len(const td_index *x) { return x->n; }
