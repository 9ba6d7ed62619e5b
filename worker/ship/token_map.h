/* worker/ship/token_map.h - which ranks of a context-parallel group hold which tokens, and where.
 *
 *   all         every rank holds every token, at its own index
 *   interleave  blocks of `unit` tokens go round: owner(t) = (t / unit) % n
 *   zigzag      of every 2n blocks of `unit` tokens, rank r holds blocks r and 2n - 1 - r. With unit = a
 *               prompt's length / 2n, rounded up to attention splits, that is the balanced split of a causal
 *               prefill.
 *
 * A rank keeps its tokens in ascending order, without holes: token t, if held, is its token number before(t).
 *
 * Rules:   1. at(before(t)) == t for every token held; before(at(i)) == i for every i.
 *          2. n 1 is `all`, whatever the kind.
 * Threads: pure. Limits: n in [1, 1024], unit in [1, 2^20] (td_token_map_ok). */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_SHIP_TOKEN_MAP_H
#define TD_WORKER_SHIP_TOKEN_MAP_H

#include <stdbool.h>
#include <stdint.h>

typedef enum { TD_TOKENS_ALL, TD_TOKENS_ZIGZAG, TD_TOKENS_INTERLEAVE, TD_TOKENS_KINDS } td_token_kind;
typedef struct td_token_map { td_token_kind kind; uint32_t n, unit; } td_token_map;
/* What one rank of the group holds. */
typedef struct td_token_set { td_token_map map; uint32_t rank; } td_token_set;

bool td_token_map_ok(const td_token_map *m);
/* The rank that holds t; of `all`, 0 of many. */
uint32_t td_token_owner(const td_token_map *m, uint32_t t);
bool td_token_held(const td_token_set *s, uint32_t t);
uint32_t td_token_before(const td_token_set *s, uint32_t t); /* how many of [0, t) are held */
uint32_t td_token_at(const td_token_set *s, uint32_t local);
/* The first held token from t on, and in *n how many follow each other from there, all below end; end and 0:
 * none. */
uint32_t td_token_run(const td_token_set *s, uint32_t t, uint32_t end, uint32_t *n);

#endif
