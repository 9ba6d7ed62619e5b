// SPDX-License-Identifier: Apache-2.0
/* common/map.c - key 0 marks an empty slot; the entry whose key is 0 lives in one extra slot behind the
 * table. */
#include "common/map.h"
#include "common/check.h"
#include "common/hash.h"
#include <stdlib.h>

typedef struct td_map_slot {
    uint64_t key, value; /* extra slot: key 1 = present */
} slot;

enum { FIRST_CAP = 16 };

void td_map_init(td_map *m, size_t max_entries)
{
    *m = (td_map){.max = max_entries};
}

void td_map_deinit(td_map *m)
{
    free(m->slot);
    *m = (td_map){.max = m->max};
}

/* Slot of key (not 0), or the empty slot where it belongs. */
static size_t find(const td_map *m, uint64_t key)
{
    size_t i = (size_t)td_mix64(key) & (m->cap - 1);
    while (m->slot[i].key && m->slot[i].key != key) i = (i + 1) & (m->cap - 1);
    return i;
}

static void grow(td_map *m)
{
    td_map bigger = {.cap = m->cap ? m->cap * 2 : FIRST_CAP, .n = m->n, .max = m->max};
    bigger.slot = td_xalloc((bigger.cap + 1) * sizeof(slot));
    for (size_t i = 0; i < m->cap; i++)
        if (m->slot[i].key) bigger.slot[find(&bigger, m->slot[i].key)] = m->slot[i];
    if (m->cap) bigger.slot[bigger.cap] = m->slot[m->cap];
    free(m->slot);
    *m = bigger;
}

bool td_map_put(td_map *m, uint64_t key, uint64_t value)
{
    if (!m->cap) {
        if (!m->max) return false;
        grow(m);
    }
    size_t i = key ? find(m, key) : m->cap;
    if (m->slot[i].key) {
        m->slot[i].value = value;
        return true;
    }
    if (m->n >= m->max) return false;
    if (m->n + 1 > m->cap / 4 * 3) {
        grow(m);
        i = key ? find(m, key) : m->cap;
    }
    m->slot[i] = (slot){key ? key : 1, value};
    m->n++;
    return true;
}

bool td_map_get(const td_map *m, uint64_t key, uint64_t *value)
{
    if (!m->n) return false;
    size_t i = key ? find(m, key) : m->cap;
    if (!m->slot[i].key) return false;
    if (value) *value = m->slot[i].value;
    return true;
}

bool td_map_del(td_map *m, uint64_t key)
{
    if (!m->n) return false;
    size_t i = key ? find(m, key) : m->cap;
    if (!m->slot[i].key) return false;
    m->slot[i] = (slot){0, 0};
    m->n--;
    if (!key) return true;
    /* Close the gap: move back every later entry of the run whose home is not between the gap and itself. */
    size_t mask = m->cap - 1;
    for (size_t j = (i + 1) & mask; m->slot[j].key; j = (j + 1) & mask) {
        size_t home = (size_t)td_mix64(m->slot[j].key) & mask;
        if (((j - home) & mask) < ((j - i) & mask)) continue;
        m->slot[i] = m->slot[j];
        m->slot[j] = (slot){0, 0};
        i = j;
    }
    return true;
}

bool td_map_next(const td_map *m, size_t *it, uint64_t *key, uint64_t *value)
{
    if (!m->cap) return false;
    while (*it <= m->cap) {
        const slot *s = &m->slot[*it];
        bool zero = (*it)++ == m->cap;
        if (!s->key) continue;
        *key = zero ? 0 : s->key;
        *value = s->value;
        return true;
    }
    return false;
}
