/* common/map.h - u64 -> u64 open-addressing hash map (linear probing, backward-shift deletion). Any key is
 * allowed. Grows up to max entries, then put returns false. Threads: one owner. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_COMMON_MAP_H
#define TD_COMMON_MAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct td_map {
    struct td_map_slot *slot;
    size_t n, cap, max;
} td_map;

void td_map_init(td_map *m, size_t max_entries);
void td_map_deinit(td_map *m);
bool td_map_put(td_map *m, uint64_t key, uint64_t value); /* insert or replace; false: at max */
bool td_map_get(const td_map *m, uint64_t key, uint64_t *value);
bool td_map_del(td_map *m, uint64_t key);
/* Iterate: start with *it = 0; false at the end. The map must not change meanwhile. */
bool td_map_next(const td_map *m, size_t *it, uint64_t *key, uint64_t *value);

#endif
