/* common/hash.h - SipHash-2-4-128: keyed, for hashes that peers or prompts could attack. (Payload checks: crc.h.)
 * Source: Aumann & Bernstein, SipHash (2012), 128-bit variant.
 * Threads: any (pure). */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_COMMON_HASH_H
#define TD_COMMON_HASH_H

#include <stddef.h>
#include <stdint.h>

typedef struct td_h128 { uint64_t lo, hi; } td_h128;
typedef struct td_hkey { uint64_t k0, k1; } td_hkey;

td_h128 td_siphash128(td_hkey key, const void *p, size_t n);
uint64_t td_mix64(uint64_t x);                             /* bijective finalizer, for hash tables */

#endif
