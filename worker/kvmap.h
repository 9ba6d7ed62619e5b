/* worker/kvmap.h - which context-parallel rank keeps a token's keys and values, and where in its pages.
 *
 *   split u = t / S lies on rank u % R, as that rank's split u / R:
 *   R = 2:   rank 0: [0, S) [2S, 3S) ..      rank 1: [S, 2S) [3S, 4S) ..
 *
 * A page id means the same place on every rank: page k of a sequence holds the k-th P tokens that each rank keeps of it. So
 * one page table serves all ranks, and a full stripe of R * S tokens takes S / P pages everywhere.
 * Threads: pure. S is a multiple of P and of 64 (TD_ATTN_SPLIT). */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_KVMAP_H
#define TD_WORKER_KVMAP_H

#include <stdint.h>

typedef struct td_kvmap { uint32_t split, ranks; } td_kvmap; /* ranks 1: every token is here */

static inline uint32_t td_kvmap_owner(td_kvmap m, uint32_t t) { return m.ranks > 1 ? t / m.split % m.ranks : 0; }
/* Its index among the tokens that its rank keeps. */
static inline uint32_t td_kvmap_local(td_kvmap m, uint32_t t)
{
    return m.ranks > 1 ? t / (m.split * m.ranks) * m.split + t % m.split : t;
}
/* Tokens of [0, n) on the rank that keeps most of them (rank 0). */
static inline uint32_t td_kvmap_most(td_kvmap m, uint32_t n)
{
    if (m.ranks <= 1) return n;
    uint32_t stripe = m.split * m.ranks, rest = n % stripe;
    return n / stripe * m.split + (rest < m.split ? rest : m.split);
}

#endif
