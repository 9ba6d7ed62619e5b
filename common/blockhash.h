/* common/blockhash.h - the cluster-wide name of a prompt prefix: one 128-bit hash per block of 16 tokens,
 * chained.
 *
 * h[j] = SipHash128(key, h[j-1] || tokens of block j), h[-1] = SipHash128(key, tagged fingerprint). Only full
 * blocks have a name. Independent of page size. Token ids are compared on every hit, so a collision costs a
 * miss, never a wrong page.
 * Source: reference notes, algorithms 5.4. Threads: any (pure). */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_COMMON_BLOCKHASH_H
#define TD_COMMON_BLOCKHASH_H

#include "common/hash.h"

enum { TD_BLOCK_TOKENS = 16 };

/* Seed of a chain: domain = every thing the KV bytes depend on besides tokens, already tagged and
 * length-prefixed. */
td_h128 td_blockhash_root(td_hkey key, const void *domain, size_t n);
td_h128 td_blockhash_next(td_hkey key, td_h128 parent, const uint32_t tokens[TD_BLOCK_TOKENS]);
/* out[n/16]; returns the count. */
size_t td_blockhash_chain(td_hkey key, td_h128 root, const uint32_t *tokens, size_t n, td_h128 *out);

#endif
