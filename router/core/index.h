/* router/core/index.h - which worker has probably cached which prompt prefix: block hash -> bitmap of fleet
 * slots.
 *
 * It records what the router itself sent where; a worker may have evicted a page since. So it is a hint for
 * placement and never a promise: the worker compares token ids on every hit.
 * Rules:     1. Bounded: a fixed number of entries, least recently used first out.
 *            2. A prefix counts for a worker only from block 0 without a gap.
 * Threads:   one owner (core). Limits: entries given at open, 64 slots. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_CORE_INDEX_H
#define TD_ROUTER_CORE_INDEX_H

#include "common/hash.h"
#include <stddef.h>
#include <stdint.h>

enum { TD_INDEX_SLOTS = 64 };
typedef struct td_index td_index;

td_index *td_index_open(uint32_t max_entries);
void td_index_close(td_index *x);
/* The worker in `slot` now holds these blocks. */
void td_index_add(td_index *x, unsigned slot, const td_h128 *blocks, uint32_t n);
/* out[slot] = number of leading blocks it holds, for every slot. */
void td_index_match(td_index *x, const td_h128 *blocks, uint32_t n, uint32_t out[TD_INDEX_SLOTS]);
/* Forget a worker (it died, its slot will be reused). */
void td_index_drop(td_index *x, unsigned slot);
uint32_t td_index_len(const td_index *x);

#endif
